//! What the captures of all containers of a node take together: memory, cores, bandwidth.
//!
//! [`Budget`] says what that is, and what one capture gets of it; [`begin`] waits for a turn (`turns`), before anything is held for the
//! container; [`Pacer`] keeps the capture to it afterwards, in a thread of its own:
//!
//! - Threads that compress run only where nobody else wants to (`SCHED_IDLE`), so that the job is not disturbed; where that is not enough to
//!   get on, as others for a while.
//! - While a container stands they run as others, or it would stand until a busy machine is idle; and nothing is given back.
//!
//! What a capture takes beyond its buffers is not counted: some tens of MiB, and a page map.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, OFlags, flock};
use rustix::time::{ClockId, clock_gettime};
use samara_kernel::sched;
use samara_store::config::CaptureConfig;
use samara_store::pace::{Pace, Pulse, Share, UploadLimit};

use crate::turns::{Kind, Patience, Turn, TurnError, Turns};

/// Where captures find out about one another. No container has such a name.
const FOLDER: &str = "/run/samara/@captures";

/// A capture gets this much where it can: what the backlog of a container that stands takes (`docs/decisions/backlog.md`).
const UNIT_BYTES: u64 = 128 << 20;

/// Of the machine's memory, where nothing is said: a sixteenth, within these.
const BUFFERS_BYTES_MIN: u64 = 256 << 20;
const BUFFERS_BYTES_MAX: u64 = 2048 << 20;

/// A first capsule of a TiB takes that long, and the next periodic capture tries again.
const PERIODIC_WAIT_MAX: Duration = Duration::from_secs(3600);

/// Whoever asks for a capsule is told after that time that there is none.
const ASKED_WAIT_MAX: Duration = Duration::from_secs(600);

/// Stores that don't answer hold captures up, one by one. Whoever asks for a capsule waits no longer for the first of them than `docker
/// stop` may wait, three times over.
const FIRST_WAIT_MAX: Duration = Duration::from_secs(30);

/// How often it is looked whether a capture gets on, and, every few times, whether others wait.
const TICK: Duration = Duration::from_millis(50);
const BALANCE_TICKS: u32 = 4;

/// Who has done nothing for so long (200 ticks, ten seconds), and has nothing in its buffers, is waiting for its container: others go on
/// meanwhile. Then it may be one more than the budget has room for.
const NOTHING_TICKS: u32 = 200;

/// Batches of a MiB that a thread compresses in a tick if it gets on: a tenth of what it does with a core to itself.
const BATCHES_A_TICK: u64 = 2;

/// What all captures of the node may take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Periodic captures at a time. One more is for those that somebody asks for.
    pub(crate) captures: usize,
    /// What each gets.
    unit: Share,
    cores: usize,
    upload_bytes_per_second: Option<u64>,
    folder: PathBuf,
}

/// The machine, as far as it matters.
#[derive(Clone, Copy, Debug)]
struct Machine {
    cores: usize,
    memory_bytes: u64,
}

impl Machine {
    /// All of its memory and not what is free: every capture must come to the same budget.
    fn here() -> Machine {
        let system = rustix::system::sysinfo();
        let cores = sched::affinity(0).map_or(1, |processors| processors.len());
        Machine {
            cores: cores.max(1),
            memory_bytes: system.totalram.saturating_mul(system.mem_unit.into()),
        }
    }
}

impl Budget {
    /// What the node's configuration says.
    pub(crate) fn of(config: &CaptureConfig) -> Budget {
        Budget::on(config, Machine::here())
    }

    fn on(config: &CaptureConfig, machine: Machine) -> Budget {
        let usual = (machine.memory_bytes / 16).clamp(BUFFERS_BYTES_MIN, BUFFERS_BYTES_MAX);
        let buffers = config.buffers_mebibytes.map_or(usual, |mebibytes| mebibytes << 20);
        let cores = config.cores.and_then(|cores| usize::try_from(cores).ok());
        let cores = cores.unwrap_or(machine.cores);
        // One of the shares is the reserve.
        let shares = usize::try_from(buffers / UNIT_BYTES).unwrap_or(usize::MAX);
        let captures = cores.min(shares.saturating_sub(1)).max(1);
        let bytes = usize::try_from(buffers).unwrap_or(usize::MAX) / (captures + 1);
        Budget {
            captures,
            unit: Share { threads: cores / captures, bytes },
            cores,
            upload_bytes_per_second: config.upload_mebibytes_per_second.map(|rate| rate << 20),
            folder: config.folder.clone().unwrap_or_else(|| FOLDER.into()),
        }
    }

    /// What a capture gets that has so many units. One without any takes as much as one.
    fn share(&self, units: usize) -> Share {
        let units = units.max(1);
        let threads = self.unit.threads.saturating_mul(units).min(self.cores);
        Share { threads, bytes: self.unit.bytes.saturating_mul(units) }
    }
}

/// Why and when a capture begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// In its turn.
    Waits(Kind),
    /// Its container stands, and must not stand for others.
    Stands,
    /// Nothing holds it back, neither others nor the budget: it is now or never.
    Unlimited,
}

/// A capture whose turn it is.
#[derive(Debug)]
pub(crate) struct Begun {
    budget: Budget,
    claim: Claim,
    /// None where turns can't be had on this node: a capture must not fail for that.
    turn: Option<Turn>,
    pub(crate) waited: Duration,
}

/// Waits for a turn. `stop` is a socket that is hung up when nobody wants it any more; `waiting` is called if it has to wait.
///
/// # Errors
/// It took too long, or nobody wants it.
pub(crate) fn begin(
    config: &CaptureConfig,
    claim: Claim,
    stop: BorrowedFd<'_>,
    waiting: impl FnOnce(),
) -> Result<Begun, TurnError> {
    let budget = Budget::of(config);
    let since = Instant::now();
    let turns = Turns::open(&budget.folder, budget.captures);
    let turn = turns.and_then(|turns| match claim {
        Claim::Waits(kind) => {
            let patience = match kind {
                Kind::Periodic => Patience { whole: PERIODIC_WAIT_MAX, as_first: None },
                Kind::Asked => Patience { whole: ASKED_WAIT_MAX, as_first: Some(FIRST_WAIT_MAX) },
            };
            turns.wait(kind, patience, stop, waiting)
        }
        Claim::Stands | Claim::Unlimited => turns.begin_at_once(),
    });
    let turn = match turn {
        Ok(turn) => Some(turn),
        Err(error @ (TurnError::Waited(_) | TurnError::GivenUp)) => return Err(error),
        Err(error @ (TurnError::Io { .. } | TurnError::Exposed { .. })) => {
            tracing::warn!(
                error = crate::report::chain(&error),
                "captures of this node do not wait for one another"
            );
            None
        }
    };
    Ok(Begun { budget, claim, turn, waited: since.elapsed() })
}

impl Begun {
    /// What the writer begins with.
    pub(crate) fn share(&self) -> Share {
        match self.claim {
            Claim::Unlimited => Share::WHOLE,
            Claim::Waits(_) | Claim::Stands => {
                self.budget.share(self.turn.as_ref().map_or(1, Turn::units))
            }
        }
    }

    /// Keeps a writer to its share from now on. The turn ends with what is returned.
    pub(crate) fn pace(self, writer: Pace) -> Pacer {
        let Begun { budget, claim, turn, waited: _ } = self;
        let stands = AtomicUsize::new(usize::from(!matches!(claim, Claim::Waits(_))));
        let threads = Arc::new(Threads { writer, stands, last: Mutex::default() });
        if let (Some(rate), false) = (budget.upload_bytes_per_second, claim == Claim::Unlimited) {
            match Bandwidth::open(&budget.folder, rate) {
                Ok(bandwidth) => {
                    let limit = Limit { bandwidth, threads: threads.clone() };
                    threads.writer.limit_uploads(Arc::new(limit));
                }
                Err(error) => tracing::warn!(%error, "uploads are not limited"),
            }
        }
        threads.look();
        let (stop, stopped) = channel();
        let kept = threads.clone();
        let mut turn = turn;
        let work = move || {
            let (mut ticks, mut nothing_ticks) = (0u32, 0u32);
            while stopped.recv_timeout(TICK) == Err(RecvTimeoutError::Timeout) {
                nothing_ticks = if threads.look() { 0 } else { nothing_ticks.saturating_add(1) };
                ticks = ticks.wrapping_add(1);
                if ticks.is_multiple_of(BALANCE_TICKS)
                    && !threads.stand()
                    && let Some(turn) = &mut turn
                {
                    turn.balance(usize::from(nothing_ticks < NOTHING_TICKS));
                    threads.writer.set_share(budget.share(turn.units()));
                }
            }
        };
        let thread = std::thread::Builder::new().name("samara-pace".into()).spawn(work);
        if let Err(error) = &thread {
            tracing::warn!(%error, "the capture does not give way to others");
        }
        Pacer { threads: kept, stop: Some(stop), thread: thread.ok() }
    }
}

/// Keeps a capture to its share, and its turn with it, until it is dropped.
#[derive(Debug)]
pub(crate) struct Pacer {
    threads: Arc<Threads>,
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Pacer {
    /// While what is returned lives, the container stands.
    pub(crate) fn container_stands(&self) -> Standing {
        self.threads.stands.fetch_add(1, Ordering::SeqCst);
        self.threads.look();
        Standing(self.threads.clone())
    }
}

impl Drop for Pacer {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[derive(Debug)]
pub(crate) struct Standing(Arc<Threads>);

impl Drop for Standing {
    fn drop(&mut self) {
        self.0.stands.fetch_sub(1, Ordering::SeqCst);
        self.0.look();
    }
}

/// The threads that compress.
#[derive(Debug)]
struct Threads {
    writer: Pace,
    /// How many reasons there are for which nobody may hold them back.
    stands: AtomicUsize,
    /// How far the writer was. Locked while their priority is set.
    last: Mutex<Pulse>,
}

impl Threads {
    fn stand(&self) -> bool {
        self.stands.load(Ordering::SeqCst) > 0
    }

    /// Gives them the priority that they should have now. Answers whether they or the store have had anything to do.
    fn look(&self) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let now = self.writer.pulse();
        let idle = !self.stand() && gets_on(*last, now);
        for thread in self.writer.threads() {
            // One that has just ended has no priority.
            if let Err(error) = sched::set_idle(thread, idle) {
                tracing::debug!(%error, thread, "the priority of a thread can't be set");
            }
        }
        let did_something = now.waiting + now.uploading > 0 || now.batches != last.batches;
        *last = now;
        did_something
    }
}

/// Whether a writer has done enough since the last look, or had nothing to do.
fn gets_on(last: Pulse, now: Pulse) -> bool {
    let done = now.batches.saturating_sub(last.batches);
    let enough = BATCHES_A_TICK.saturating_mul(now.threads as u64);
    last.waiting == 0 || now.waiting == 0 || done >= enough
}

/// What the node uploads, as the instant up to which its bandwidth is spoken for. A file has it, for all captures.
#[derive(Debug)]
struct Bandwidth {
    file: File,
    bytes_per_second: u64,
}

impl Bandwidth {
    fn open(folder: &Path, bytes_per_second: u64) -> io::Result<Bandwidth> {
        let flags = OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(i32::try_from(flags.bits()).unwrap_or(0))
            .open(folder.join("bandwidth"))?;
        Ok(Bandwidth { file, bytes_per_second })
    }

    /// Speaks for so many bytes; answers how long they have to wait.
    fn book(&self, bytes: u64) -> io::Result<Duration> {
        while let Err(error) = flock(&self.file, FlockOperation::LockExclusive) {
            if error != rustix::io::Errno::INTR {
                return Err(error.into());
            }
        }
        let result = self.book_alone(bytes);
        flock(&self.file, FlockOperation::Unlock)?;
        result
    }

    fn book_alone(&self, bytes: u64) -> io::Result<Duration> {
        let now = clock_gettime(ClockId::Boottime);
        let now = Duration::new(
            u64::try_from(now.tv_sec).unwrap_or(0),
            u32::try_from(now.tv_nsec).unwrap_or(0),
        );
        let mut word = [0; 8];
        // A new file is empty.
        let known = self.file.read_at(&mut word, 0)? == word.len();
        let until = if known { u64::from_le_bytes(word) } else { 0 };
        let from = spoken_for(now, Duration::from_nanos(until));
        let takes = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let until = u64::try_from((from + takes).as_nanos()).unwrap_or(u64::MAX);
        self.file.write_all_at(&until.to_le_bytes(), 0)?;
        Ok(from - now)
    }
}

/// From when on there is bandwidth, where it is spoken for until then. All that captures have in flight takes less than an hour: more is of
/// another boot.
fn spoken_for(now: Duration, until: Duration) -> Duration {
    const AHEAD_MAX: Duration = Duration::from_secs(3600);
    if until > now + AHEAD_MAX { now } else { until.max(now) }
}

/// The bandwidth, as one capture sees it.
#[derive(Debug)]
struct Limit {
    bandwidth: Bandwidth,
    threads: Arc<Threads>,
}

impl UploadLimit for Limit {
    fn note(&self, bytes: u64) -> Duration {
        match self.bandwidth.book(bytes) {
            Ok(wait) => wait,
            Err(error) => {
                tracing::warn!(%error, "an upload is not limited");
                Duration::ZERO
            }
        }
    }

    /// What is uploaded then counts, and others wait for it.
    fn is_lifted(&self) -> bool {
        self.threads.stand()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::net::UnixStream;

    use samara_store::config::StoreConfig;
    use samara_store::{CapsuleWriter, Location, Store};

    use super::*;

    const MIB: u64 = 1 << 20;

    fn budget(config: &CaptureConfig, cores: usize, mebibytes: u64) -> Budget {
        Budget::on(config, Machine { cores, memory_bytes: mebibytes * MIB })
    }

    /// More captures than there are cores or memory for would only be in each other's way.
    #[test]
    fn captures_follow_from_memory_and_cores() {
        let unset = CaptureConfig::default();
        let check = |cores, mebibytes, captures, threads, unit_mebibytes| {
            let budget = budget(&unset, cores, mebibytes);
            let found = (budget.captures, budget.unit.threads, budget.unit.bytes as u64 / MIB);
            assert_eq!(
                found,
                (captures, threads, unit_mebibytes),
                "{cores} cores, {mebibytes} MiB"
            );
        };
        check(1, 1024, 1, 1, 128);
        check(2, 24 << 10, 2, 2 / 2, 512);
        check(16, 64 << 10, 15, 1, 128);
        check(64, 256 << 10, 15, 4, 128);
    }

    /// An owner's word counts: the shares of all captures, with that of one that is asked for, are no more than that.
    #[test]
    fn the_shares_are_no_more_than_the_budget() {
        for buffers_mebibytes in [64, 100, 256, 300, 1024, 5000] {
            for cores in [1, 3, 8, 100] {
                let config = CaptureConfig {
                    buffers_mebibytes: Some(buffers_mebibytes),
                    cores: Some(cores),
                    ..CaptureConfig::default()
                };
                let budget = budget(&config, 4, 8192);
                let bytes = budget.unit.bytes as u64 * (budget.captures as u64 + 1);
                assert!(bytes <= buffers_mebibytes * MIB && budget.unit.bytes as u64 >= 32 * MIB);
                assert!(budget.unit.threads >= 1);
                assert!((budget.unit.threads * budget.captures) as u64 <= cores);
                assert_eq!(budget.share(0), budget.share(1));
                let alone = budget.share(budget.captures + 1);
                assert!(
                    alone.threads as u64 <= cores && alone.bytes as u64 <= buffers_mebibytes * MIB
                );
            }
        }
    }

    /// On a machine that is never idle a capture would never end.
    #[test]
    fn who_does_not_get_on_is_found_out() {
        let pulse = |batches, waiting| Pulse { batches, waiting, uploading: 0, threads: 2 };
        let check =
            |last, now, expected| assert_eq!(gets_on(last, now), expected, "{last:?} {now:?}");
        check(pulse(0, 9), pulse(0, 9), false);
        check(pulse(0, 9), pulse(3, 9), false);
        check(pulse(0, 9), pulse(4, 9), true);
        check(pulse(0, 0), pulse(0, 9), true);
        check(pulse(5, 9), pulse(5, 0), true);
    }

    /// A busy job would be disturbed, or, worse, a container would stand until its machine is idle.
    #[test]
    fn threads_give_way_but_not_while_a_container_stands() {
        /// sched.h
        const OTHER: u32 = 0;
        const IDLE: u32 = 5;
        let folder = tempfile::tempdir().unwrap();
        let location = Location::folder(&folder.path().join("store")).unwrap();
        let store = Store::open(&location, &StoreConfig::default(), true).unwrap();
        let config =
            CaptureConfig { folder: Some(folder.path().join("turns")), ..CaptureConfig::default() };
        let (stop, _open) = UnixStream::pair().unwrap();
        let paced = |claim| {
            let writer = CapsuleWriter::new(&store).unwrap();
            let begun = begin(&config, claim, stop.as_fd(), || ()).unwrap();
            let pacer = begun.pace(writer.pace());
            (writer, pacer)
        };
        let all = |writer: &CapsuleWriter, policy: u32| {
            let threads = writer.pace().threads();
            !threads.is_empty()
                && threads.iter().all(|id| sched::attributes(*id).unwrap().policy == policy)
        };
        let wait = |writer: &CapsuleWriter, policy: u32| {
            let reached = (0..1000).any(|_| {
                std::thread::sleep(TICK);
                all(writer, policy)
            });
            assert!(reached, "policy {policy}");
        };
        let (writer, pacer) = paced(Claim::Waits(Kind::Asked));
        wait(&writer, IDLE);
        let standing = pacer.container_stands();
        assert!(all(&writer, OTHER));
        std::thread::sleep(TICK * 3);
        assert!(all(&writer, OTHER), "they stay so");
        drop(standing);
        wait(&writer, IDLE);
        for claim in [Claim::Stands, Claim::Unlimited] {
            let (writer, pacer) = paced(claim);
            wait(&writer, OTHER);
            drop(pacer.container_stands());
            std::thread::sleep(TICK * 3);
            assert!(all(&writer, OTHER), "{claim:?}");
        }
    }

    /// Two captures at the full rate would be twice of what the owner allows.
    #[test]
    fn what_one_capture_uploads_another_waits_for() {
        let folder = tempfile::tempdir().unwrap();
        let [one, other] = [0, 1].map(|_| Bandwidth::open(folder.path(), 1).unwrap());
        assert_eq!(one.book(100_000).unwrap(), Duration::ZERO);
        assert_eq!(other.book(1).unwrap(), Duration::ZERO, "so far ahead is of another boot");
        let (one, other) = (one.book(1000).unwrap(), other.book(1000).unwrap());
        assert!(other > one + Duration::from_secs(900), "{one:?} {other:?}");
    }

    #[test]
    fn bandwidth_is_spoken_for_once() {
        let at = Duration::from_secs;
        assert_eq!(spoken_for(at(10), at(0)), at(10));
        assert_eq!(spoken_for(at(10), at(12)), at(12));
        assert_eq!(spoken_for(at(10), at(99_999)), at(10));
    }
}
