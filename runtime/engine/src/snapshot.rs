//! A fork as the snapshot of a process's memory.
//!
//! Where much has been written, the container need not stand until it is copied: a fork of the process has all that it has now, and the
//! kernel copies what the process writes from then on. The fork stands, is read, and ends. Why and when: `docs/decisions/snapshot-fork.md`.
//!
//! What a program can see of it: another process in its pid namespace that does nothing, and is nobody's child to a wait that does not
//! ask for all kinds (`__WALL`).
//!
//! Invariants:
//! - The fork ends with the engine: it runs nothing but the way to its end, and the kernel kills it when its tracer dies.
//! - When memory runs out, the kernel takes it before anything of the program's.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::{self, File};
use std::io;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use samara_capsule::transfer::{BaseId, Sink};
use samara_kernel::pidfd::PidFd;
use samara_kernel::ptrace::{self, Options};
use samara_kernel::wait::{self, Status};
use samara_kernel::{Pid, proc, tape};

use crate::capture::{CaptureError, inner_pid};
use crate::freeze::FrozenTree;
use crate::left_calls::LeftCalls;
use crate::memory::{OwnRun, PAGE};
use crate::ranges::Ranges;
use crate::tracee::{Process, TraceeError, failed};
use crate::tracking::{self, Draft, Tracking};
use crate::{mappings, process, restart};

/// The name of every fork, by which what is left of one is found whose engine was killed.
const NAME: &[u8; 16] = b"samara-snapshot\0";

/// What a page costs while everything stands, in nanoseconds: copied, scattered ones from `/proc/PID/mem`; compressed by one processor,
/// where buffers are full; taken over by a fork, if it is no part of a huge one. And a fork, whatever its size
/// (`docs/decisions/snapshot-fork.md`).
const COPY_NS: u64 = 1_200;
const COMPRESS_NS: u64 = 20_000;
const FORK_PAGE_NS: u64 = 45;
const FORK_NS: u64 = 400_000;

/// Whether forks may be made, and when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// How long copying may take while the container stands; where more is expected, a fork that is expected to take less is made.
    pub budget: Duration,
    /// Whether it is made in any case.
    pub always: bool,
    /// Memory that the container, and the host, can have beyond what they have, in bytes. What is forked must fit: the program may write
    /// to all of it.
    pub spare_bytes: u64,
}

/// What there is to do for the memory of one process, in pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cost {
    to_copy: u64,
    to_fork: u64,
}

impl Cost {
    pub(crate) fn of(pid: Pid, to_copy: u64) -> Cost {
        Cost { to_copy, to_fork: tracking::own_pages(pid) }
    }

    /// What copying takes, `room` pages of it without waiting for compression.
    fn copying_ns(self, room: u64) -> u64 {
        self.to_copy * COPY_NS + self.to_copy.saturating_sub(room) * COMPRESS_NS
    }

    fn forking_ns(self) -> u64 {
        FORK_NS + self.to_fork * FORK_PAGE_NS
    }
}

/// How the memory of a container came into its capsule, and why so. It ends with milliseconds that were expected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Way {
    /// The container had to stand anyway.
    #[default]
    Copied,
    CopiedInBudget {
        copying: Duration,
    },
    /// No fork of a process would have been shorter.
    CopiedAsShorter {
        copying: Duration,
    },
    /// There was no room for one.
    CopiedForRoom {
        copying: Duration,
    },
    /// The kernel refused.
    CopiedAsRefused {
        copying: Duration,
    },
    Forked {
        copying: Duration,
        forking: Duration,
    },
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: &Duration| format!("{:.1} ms", time.as_secs_f64() * 1000.0);
        match self {
            Way::Copied => write!(f, "copied"),
            Way::CopiedInBudget { copying } => {
                write!(f, "copied: {} were expected, which is within the budget", ms(copying))
            }
            Way::CopiedAsShorter { copying } => {
                write!(
                    f,
                    "copied: {} were expected, and a fork would have taken longer",
                    ms(copying)
                )
            }
            Way::CopiedForRoom { copying } => {
                write!(
                    f,
                    "copied: {} were expected, and there was no memory for a fork",
                    ms(copying)
                )
            }
            Way::CopiedAsRefused { copying } => {
                write!(f, "copied: {} were expected, and the kernel made no fork", ms(copying))
            }
            Way::Forked { copying, forking } => write!(
                f,
                "forked: {} were expected for it, and {} for copying",
                ms(forking),
                ms(copying)
            ),
        }
    }
}

impl SnapshotRequest {
    /// Which of the processes are to be forked, and why.
    pub(crate) fn choose(&self, costs: &[Cost], room: u64) -> (Vec<bool>, Way) {
        let mut forks = vec![false; costs.len()];
        let pages = costs.iter().map(|cost| cost.to_copy).sum();
        let copying_ns = Cost { to_copy: pages, to_fork: 0 }.copying_ns(room);
        let copying = Duration::from_nanos(copying_ns);
        if !self.always && copying <= self.budget {
            return (forks, Way::CopiedInBudget { copying });
        }
        let mut order: Vec<usize> = (0..costs.len()).collect();
        let cost =
            |index: usize| costs.get(index).copied().unwrap_or(Cost { to_copy: 0, to_fork: 0 });
        order.sort_by_key(|index| std::cmp::Reverse(cost(*index).to_copy));
        let (mut spare, mut forking_ns, mut refused) = (self.spare_bytes, 0, false);
        for index in order {
            let cost = cost(index);
            let is_shorter = cost.forking_ns() < cost.copying_ns(room);
            if cost.to_copy == 0 || !(self.always || is_shorter) {
                continue;
            }
            match spare.checked_sub(cost.to_fork * PAGE) {
                Some(rest) => spare = rest,
                None => {
                    refused = true;
                    continue;
                }
            }
            if let Some(fork) = forks.get_mut(index) {
                *fork = true;
                forking_ns += cost.forking_ns();
            }
        }
        let way = match (forks.contains(&true), refused) {
            (true, _) => Way::Forked { copying, forking: Duration::from_nanos(forking_ns) },
            (false, true) => Way::CopiedForRoom { copying },
            (false, false) => Way::CopiedAsShorter { copying },
        };
        (forks, way)
    }
}

/// What is to be read from a fork: address, and number of pages, with one bit that says whether those of zeros count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct LaterRun {
    start: u64,
    pages_exact: u64,
}

impl LaterRun {
    fn end(self) -> u64 {
        self.start + (self.pages_exact >> 1) * PAGE
    }

    fn is_exact(self) -> bool {
        self.pages_exact & 1 != 0
    }
}

/// Of which processes forks are to be made, and what is to be read from them.
#[derive(Debug, Default)]
pub(crate) struct Planned {
    way: Way,
    processes: BTreeMap<Pid, (BaseId, Vec<LaterRun>)>,
}

impl Planned {
    pub(crate) fn new(way: Way) -> Planned {
        Planned { way, processes: BTreeMap::new() }
    }

    /// A further run of process `pid`, to be passed as what `base` has. They come in ascending order.
    pub(crate) fn add(&mut self, pid: Pid, base: BaseId, run: OwnRun) {
        let (_, runs) = self.processes.entry(pid).or_insert_with(|| (base, Vec::new()));
        let pages_exact = ((run.end - run.start) / PAGE) << 1 | u64::from(run.exact);
        match runs.last_mut() {
            Some(last) if last.end() == run.start && last.is_exact() == run.exact => {
                last.pages_exact += pages_exact & !1;
            }
            _ => runs.push(LaterRun { start: run.start, pages_exact }),
        }
    }

    /// Makes the forks. What can't be forked is copied now.
    pub(crate) fn carry_out(
        self,
        frozen: &mut FrozenTree,
        sink: &mut dyn Sink,
    ) -> Result<(Rest, Outcome), CaptureError> {
        let mut rest = Rest::default();
        let mut outcome = Outcome { way: self.way, ..Outcome::default() };
        let begun = Instant::now();
        for (pid, (base, runs)) in self.processes {
            let Some(process) = frozen.processes.get_mut(&pid) else { continue };
            match Snapshot::take(process) {
                Ok(snapshot) => {
                    outcome.forks += 1;
                    outcome.pages += runs.iter().map(|run| run.pages_exact >> 1).sum::<u64>();
                    rest.parts.push(Part { snapshot, base, runs });
                }
                Err(error) => {
                    tracing::info!(%error, pid, "no fork is made");
                    outcome.copied += pass(&process.memory, pid, base, &runs, sink)?;
                }
            }
        }
        outcome.took = begun.elapsed();
        if let (Way::Forked { copying, .. }, 0) = (outcome.way, outcome.forks) {
            outcome.way = Way::CopiedAsRefused { copying };
        }
        Ok((rest, outcome))
    }
}

/// What became of a plan.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) way: Way,
    pub(crate) forks: usize,
    /// Pages that are left in them.
    pub(crate) pages: u64,
    /// Pages that were copied instead.
    pub(crate) copied: u64,
    pub(crate) took: Duration,
}

/// Memory of a container at the instant of its capture that is still to be read. The container may run.
///
/// Dropping it ends the forks; what is left of them is taken by the next capture.
#[derive(Debug, Default)]
pub struct Rest {
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    snapshot: Snapshot,
    base: BaseId,
    runs: Vec<LaterRun>,
}

impl Rest {
    /// Passes all to the sink that has taken the rest of the capture, and ends the forks.
    ///
    /// # Errors
    /// Those of the sink; that a fork has ended, as the container has, or as the kernel needed memory. The capsule can't be committed then.
    pub fn drain(
        mut self,
        tracking: &mut Tracking,
        sink: &mut dyn Sink,
    ) -> Result<(), CaptureError> {
        for part in &mut self.parts {
            // Without it the container's end would wait for the sink.
            part.snapshot.watch().map_err(|source| CaptureError::Read {
                what: "the memory of a process: no thread can be started".to_owned(),
                source,
            })?;
        }
        let mut outcome = Ok(());
        let mut ended = Vec::new();
        for Part { snapshot, base, runs } in self.parts {
            if outcome.is_ok() {
                let passed = pass(&snapshot.memory, snapshot.maker, base, &runs, sink);
                outcome = passed.map(drop);
            }
            ended.push(snapshot.end());
        }
        let_go_of(&ended, &mut tracking.left_calls);
        outcome
    }
}

/// Passes pages that are read from `memory`, those of process `pid`, as `base` has them. Returns how many there were.
fn pass(
    memory: &File,
    pid: Pid,
    base: BaseId,
    runs: &[LaterRun],
    sink: &mut dyn Sink,
) -> Result<u64, CaptureError> {
    let mut pages = 0;
    for exact in [false, true] {
        let mut drafts = Draft::new(base, exact, sink);
        for run in runs.iter().filter(|run| run.is_exact() == exact) {
            let mut unread = Ranges::default();
            pages += drafts.copy(memory, run.start, run.end(), &mut unread)?;
            if !unread.is_empty() {
                let (start, end) = (run.start, run.end());
                let source = io::Error::other("the process that had it has ended");
                return Err(CaptureError::Pages { pid, start, end, source });
            }
        }
        drafts.finish()?;
    }
    Ok(pages)
}

/// A process that has the memory which another one had.
#[derive(Debug)]
pub(crate) struct Snapshot {
    pid: Pid,
    handle: PidFd,
    /// Who has made it, and its number there.
    maker: Pid,
    inner: Pid,
    pub(crate) memory: File,
    /// Sees its end, where the container runs and may end it.
    watch: Option<JoinHandle<()>>,
}

impl Snapshot {
    /// Forks a process that stands.
    ///
    /// # Errors
    /// Nothing is left of an attempt.
    pub(crate) fn take(process: &mut Process) -> Result<Snapshot, TraceeError> {
        let maker = process.pid;
        let (pid, inner) = process.fork(NAME)?;
        let ends = Options::SYSGOOD.and(Options::EXIT_KILL);
        let unfiltered = ends.and(Options::SUSPEND_SECCOMP);
        let stand = || -> Result<PidFd, TraceeError> {
            match wait::one(pid).map_err(failed("wait for", pid))? {
                Status::EventStop(_) => {}
                status => return Err(TraceeError::Ended { tid: pid, status }),
            }
            ptrace::set_options(pid, unfiltered)
                .or_else(|_| ptrace::set_options(pid, ends))
                .map_err(failed("bind to this process", pid))?;
            let handle = PidFd::open(pid).map_err(failed("open", pid))?;
            // So that the kernel takes this one where memory is short.
            let path = format!("/proc/{pid}/oom_score_adj");
            fs::write(path, "1000").map_err(failed("offer to the kernel", pid))?;
            // Up to where it would end.
            for _ in 0..2 * tape::FORK_CALLS - 1 {
                ptrace::cont_to_syscall(pid, 0).map_err(failed("resume", pid))?;
                match wait::one(pid).map_err(failed("wait for", pid))? {
                    Status::SyscallStop => {}
                    status => return Err(TraceeError::Ended { tid: pid, status }),
                }
            }
            Ok(handle)
        };
        let memory = |source| TraceeError::Memory { what: "open", pid, address: 0, source };
        let opened = stand().and_then(|handle| {
            Ok((handle, File::open(format!("/proc/{pid}/mem")).map_err(memory)?))
        });
        match opened {
            Ok((handle, memory)) => Ok(Snapshot { pid, handle, maker, inner, memory, watch: None }),
            Err(error) => {
                if let Ok(handle) = PidFd::open(pid) {
                    let _ = handle.send_signal(libc::SIGKILL);
                }
                see_end(pid);
                process.reap(inner)?;
                Err(error)
            }
        }
    }

    /// The container goes on. Should it end, the kernel waits until its tracer has seen the end of each of its processes.
    pub(crate) fn watch(&mut self) -> io::Result<()> {
        let pid = self.pid;
        let watch = std::thread::Builder::new().name("samara-snapshot".into());
        self.watch = Some(watch.spawn(move || see_end(pid))?);
        Ok(())
    }

    /// Ends it. Its maker, which runs, has to [`let_go_of`] what is left.
    pub(crate) fn end(self) -> EndedFork {
        EndedFork { pid: self.pid, maker: self.maker, inner: self.inner }
    }
}

impl Drop for Snapshot {
    fn drop(&mut self) {
        // One that is gone is what is wanted.
        let _ = self.handle.send_signal(libc::SIGKILL);
        match self.watch.take() {
            Some(watch) => drop(watch.join()),
            None => see_end(self.pid),
        }
    }
}

/// Waits until a process has ended, as its tracer has to.
fn see_end(pid: Pid) {
    while !matches!(wait::one(pid), Ok(Status::Exited(_) | Status::Killed(_)) | Err(_)) {}
}

/// What is left of a snapshot: an ended process whose maker has not taken notice.
#[derive(Clone, Copy, Debug)]
pub(crate) struct EndedFork {
    pid: Pid,
    maker: Pid,
    inner: Pid,
}

/// Has their makers, which run, take what is left of ended snapshots: one thread of each is stopped for a moment.
///
/// What fails is done by the next stop ([`FrozenTree::ended_forks`]).
pub(crate) fn let_go_of(ended: &[EndedFork], left_calls: &mut LeftCalls) {
    for EndedFork { pid, maker, inner } in ended {
        // Its maker may be gone, and then it is its new parent's.
        if !proc::stat(*pid).is_ok_and(|stat| stat.ppid == *maker) {
            continue;
        }
        if let Err(error) = reap_in(*maker, *inner, left_calls) {
            tracing::info!(%error, maker, "what is left of a snapshot stays until the next capture");
        }
    }
}

fn reap_in(
    maker: Pid,
    inner: Pid,
    left_calls: &mut LeftCalls,
) -> Result<(), Box<dyn std::error::Error>> {
    let threads = proc::threads(maker)?;
    // One that computes is in no call that a stop could interrupt.
    let state = |tid: &Pid| proc::stat(*tid).map_or('X', |stat| stat.state);
    let computes = threads.iter().find(|tid| state(tid) == 'R');
    let tid = computes.or_else(|| threads.iter().find(|tid| state(tid) == 'S'));
    let tid = *tid.ok_or("it has no thread that could be stopped")?;
    let mut frozen = FrozenTree::stop_thread(maker, tid)?;
    let mut slept = restart::elapsed(&frozen.sleepers, frozen.stopped_at, &frozen.facts);
    left_calls.pass_on(&mut frozen, &mut slept);
    for (pid, process) in frozen.processes.iter_mut().chain(&mut frozen.sessions) {
        process.find_room(&mappings::of(*pid)?);
        // Places for timespecs that the other threads use.
        process.scratch_taken = threads.len();
        process::mend_for_thaw(process, &slept)?;
    }
    if let Some(process) = frozen.processes.get_mut(&maker) {
        process.reap(inner)?;
    }
    frozen.thaw()?;
    left_calls.released();
    Ok(())
}

/// Has those who stand take what is left of snapshots whose engine was killed.
pub(crate) fn take_ended(frozen: &mut FrozenTree) {
    for (maker, inner) in std::mem::take(&mut frozen.ended_forks) {
        let Some(process) = frozen.processes.get_mut(&maker) else { continue };
        if let Err(error) = process.reap(inner) {
            tracing::info!(%error, maker, "what is left of a snapshot stays");
        }
    }
}

/// Who has made it, and its number, if this is what is left of a snapshot.
pub(crate) fn ended_fork(zombie: Pid) -> Option<(Pid, Pid)> {
    let stat = proc::stat(zombie).ok()?;
    let name = NAME.strip_suffix(&[0])?;
    let is_fork = stat.comm.as_bytes() == name && stat.exit_signal == Some(0);
    is_fork.then_some(())?;
    Some((stat.ppid, inner_pid(zombie).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: u64 = 32_768;

    fn request(budget_ms: u64, spare_pages: u64) -> SnapshotRequest {
        let budget = Duration::from_millis(budget_ms);
        SnapshotRequest { budget, always: false, spare_bytes: spare_pages * PAGE }
    }

    fn cost(to_copy: u64, to_fork: u64) -> Cost {
        Cost { to_copy, to_fork }
    }

    #[test]
    fn what_fits_the_budget_is_copied() {
        let (forks, way) = request(10, u64::MAX / PAGE).choose(&[cost(2621, 262_144)], ROOM);
        assert_eq!(forks, [false]);
        assert!(matches!(way, Way::CopiedInBudget { .. }), "{way}");
    }

    #[test]
    fn half_a_gibibyte_is_forked() {
        let costs = [cost(10, 700), cost(131_072, 262_144)];
        let (forks, way) = request(10, 300_000).choose(&costs, ROOM);
        assert_eq!(forks, [false, true]);
        assert!(matches!(way, Way::Forked { .. }), "{way}");
    }

    /// A fork that is longer than copying would make matters worse.
    #[test]
    fn a_little_of_much_is_copied() {
        let (forks, way) = request(10, u64::MAX / PAGE).choose(&[cost(20_000, 2 << 20)], ROOM);
        assert_eq!(forks, [false]);
        assert!(matches!(way, Way::CopiedAsShorter { .. }), "{way}");
    }

    /// What the program writes while a fork is read is charged to it.
    #[test]
    fn nothing_is_forked_beyond_the_memory_there_is() {
        let costs = [cost(131_072, 262_144), cost(100_000, 110_000)];
        let (forks, way) = request(10, 200_000).choose(&costs, ROOM);
        assert_eq!(forks, [false, true]);
        assert!(matches!(way, Way::Forked { .. }), "{way}");
        let (forks, way) = request(10, 100_000).choose(&costs, ROOM);
        assert_eq!(forks, [false, false]);
        assert!(matches!(way, Way::CopiedForRoom { .. }), "{way}");
    }

    #[test]
    fn runs_that_adjoin_are_one() {
        let mut planned = Planned::default();
        let run = |start, end, exact| OwnRun { start, end, exact, clean: false };
        for run in [run(0, PAGE, false), run(PAGE, 3 * PAGE, false), run(3 * PAGE, 4 * PAGE, true)]
        {
            planned.add(1, BaseId(0), run);
        }
        let (_, runs) = planned.processes.get(&1).expect("its runs");
        let ends: Vec<(u64, u64, bool)> =
            runs.iter().map(|run| (run.start, run.end(), run.is_exact())).collect();
        assert_eq!(ends, [(0, 3 * PAGE, false), (3 * PAGE, 4 * PAGE, true)]);
    }
}
