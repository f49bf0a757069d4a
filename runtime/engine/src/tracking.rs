//! Which memory was written since the capsule before, and copying it while the container runs.
//!
//! A process whose memory is tracked has a [`WriteTracker`]: the kernel write-protects pages that are *armed*, and takes the
//! protection away, without anybody's help, with the first write. A scan tells which pages have lost it and arms them again in
//! the same step. So what is clean in the final scan, while everything stands, has the content that was stored last: by the capsule before,
//! or by a round of copying since.
//!
//! What never counts as clean, and so is copied while the container stands: memory of processes that were born, or have replaced their
//! program, since the last capsule; mappings made or moved since; shared memory; huge pages of hugetlbfs; all of a process with
//! a context of asynchronous I/O, where devices write without the processor's seeing it. Nor what a round has armed while somebody may have
//! held it who writes without a trace (`held_pages`): so a round arms, has that found out, and then copies.
//!
//! Pages that forks have left in common are copied while the container stands, where they can be told
//! (`copy_on_write`).

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use samara_capsule::record::{Container, ProcessState};
use samara_capsule::transfer::{BATCH_BYTES_MAX, BaseId, PageRun, Sink, Source, SpaceId};
use samara_kernel::kcmp::{self, Resource};
use samara_kernel::pagemap::{Pagemap, Run};
use samara_kernel::pid_namespaces::View;
use samara_kernel::proc::Mapping;
use samara_kernel::task_list::MemoryId;
use samara_kernel::userfaultfd::{self, WriteTracker};
use samara_kernel::{Pid, proc};
use serde::{Deserialize, Serialize};

use crate::capture::{CaptureError, inner_pid, read};
use crate::freeze::FrozenTree;
use crate::left_calls::LeftCalls;
use crate::memory::PAGE;
use crate::phase::{self, Phase};
use crate::ranges::Ranges;
use crate::restore::Tree;
use crate::{aio, held_pages, mappings, process, restart, vdso};

/// A process with less memory of its own is not tracked: a tracker costs as much as copying this.
const TRACKED_PAGES_MIN: u64 = 256;

/// For so many pages that are not tracked yet the container is stopped before the rounds, so that they can be copied ahead: to copy them
/// while it stands would take about as long as such a stop does.
const COVERED_AHEAD_PAGES_MIN: u64 = 1024;

/// Rounds of copying at most.
const ROUNDS_MAX: usize = 6;

/// What a round has copied at most for the last one to be worth while: about what is copied in a millisecond.
const ENOUGH_BYTES: u64 = 4 << 20;

/// What is armed, about, before it is found out whether anybody holds it, and copied: that takes 0.1 ms as a rule, copying so much 100 ms.
const ARMED_BYTES_MAX: u64 = 256 << 20;

/// What one scan goes through, written or not.
const SCANNED_BYTES_MAX: u64 = 1 << 30;

/// Runs that one scan passes.
const RUNS_AT_ONCE: usize = 2048;

/// The memory of all processes of a container that is tracked, by process.
#[derive(Debug, Default)]
pub struct Tracking {
    memories: BTreeMap<Pid, TrackedMemory>,
    stays: bool,
    pub(crate) left_calls: LeftCalls,
}

/// The memory of one process.
#[derive(Debug)]
pub(crate) struct TrackedMemory {
    identity: Identity,
    tracker: WriteTracker,
    pagemap: Pagemap,
    memory: File,
    /// The space that it was in the capsule before, if there is one.
    parent: Option<SpaceId>,
    /// What was armed again since that capsule.
    since: Ranges,
    /// And what the final scan has armed.
    last: Ranges,
    /// In the capsule that is being made.
    base: Option<BaseId>,
    space: Option<SpaceId>,
    /// Armed pages whose content is not in `base`.
    unstored: Ranges,
    mappings: Vec<Mapping>,
    /// One that can't be tracked ([`WriteTracker::await_lock`]).
    special: Option<(u64, u64)>,
    /// How the kernel tells it from others; none where it can't.
    id: Option<MemoryId>,
    /// Somebody outside may have held pages of it all the time: what is clean after this capsule need not be as it was.
    in_doubt: bool,
}

/// Tells one memory from others that a process may have: it gets a new one with each program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    started: u64,
    code: u64,
    stack: u64,
    arguments: Option<u64>,
}

impl Identity {
    fn of(pid: Pid) -> io::Result<Identity> {
        let stat = proc::stat(pid)?;
        Ok(Identity {
            started: stat.starttime,
            code: stat.startcode,
            stack: stat.startstack,
            arguments: stat.arg_start,
        })
    }
}

/// What a process that keeps trackers has to know of them, beside their descriptors.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Notes {
    memories: Vec<NotedMemory>,
    left_calls: LeftCalls,
}

impl Notes {
    /// Whether they say nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.memories.is_empty() && self.left_calls.is_empty()
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct NotedMemory {
    pid: Pid,
    identity: Identity,
    /// None where the capsule before does not have it.
    parent: Option<u32>,
    since: Ranges,
}

/// What copying in advance has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PreCopy {
    /// Pages and time of each round.
    pub rounds: Vec<(u64, Duration)>,
    /// Why there were none, or no more.
    pub ended: &'static str,
    /// How long the container stood before them, so that all of its memory is tracked.
    pub stopped: Duration,
}

impl Tracking {
    /// Takes up what [`Tracking::into_parts`] has left. What can't be taken up is not tracked any more.
    pub fn from_parts(notes: Notes, trackers: Vec<OwnedFd>) -> Tracking {
        let Notes { memories: noted, left_calls } = notes;
        let mut memories = BTreeMap::new();
        for (noted, tracker) in noted.into_iter().zip(trackers) {
            let NotedMemory { pid, identity, parent, since } = noted;
            let same = Identity::of(pid).is_ok_and(|now| now == identity);
            if !same {
                continue;
            }
            let Ok(tracked) = TrackedMemory::new(pid, WriteTracker::from_ready(tracker)) else {
                continue;
            };
            let tracked = TrackedMemory {
                parent: parent.map(SpaceId),
                unstored: since.clone(),
                since,
                ..tracked
            };
            memories.insert(pid, tracked);
        }
        Tracking { memories, stays: true, left_calls }
    }

    /// A new capsule begins. `continues`: the one that the notes speak of is the one before it. `stays`: the container runs on, and there
    /// may be another one.
    pub fn begin(&mut self, continues: bool, stays: bool) {
        self.stays = stays;
        for tracked in self.memories.values_mut() {
            tracked.in_doubt = false;
        }
        for tracked in self.memories.values_mut().filter(|_| !continues) {
            tracked.parent = None;
        }
        for tracked in self.memories.values_mut().filter(|tracked| tracked.parent.is_none()) {
            tracked.since = Ranges::all();
            tracked.unstored = Ranges::all();
        }
    }

    /// Notes and descriptors for whoever keeps them until the next capture.
    ///
    /// With more than `trackers_max` trackers the next capture begins without any.
    pub fn into_parts(mut self, trackers_max: usize) -> (Notes, Vec<OwnedFd>) {
        self.went_on();
        if self.memories.len() > trackers_max {
            self.memories.clear();
        }
        let mut notes = Notes { left_calls: self.left_calls, ..Notes::default() };
        let mut trackers = Vec::new();
        for (pid, tracked) in self.memories {
            let TrackedMemory { identity, parent, since, last, tracker, .. } = tracked;
            let since = since.union(&last);
            let parent = parent.map(|space| space.0);
            notes.memories.push(NotedMemory { pid, identity, parent, since });
            trackers.push(tracker.into());
        }
        (notes, trackers)
    }

    /// The container was let go, now, or before where that was said.
    pub fn went_on(&mut self) {
        self.left_calls.released();
    }

    /// The capsule was committed: the next one continues it.
    pub fn committed(&mut self) {
        self.memories.retain(|_, tracked| {
            tracked.parent = tracked.space.take();
            tracked.since = Ranges::default();
            tracked.last = Ranges::default();
            // One that is in doubt is begun anew.
            tracked.parent.is_some() && !tracked.in_doubt
        });
    }

    /// For the final scan.
    pub(crate) fn by_process(&mut self) -> BTreeMap<Pid, &mut TrackedMemory> {
        self.memories.retain(|pid, tracked| tracked.is_of(*pid));
        for tracked in self.memories.values_mut() {
            // Of a final scan whose pages came to nothing.
            let last = std::mem::take(&mut tracked.last);
            tracked.since = tracked.since.union(&last);
            tracked.unstored = tracked.unstored.union(&last);
        }
        self.memories.iter_mut().map(|(pid, tracked)| (*pid, tracked)).collect()
    }

    /// Copies what was written, in rounds, while the container runs. It stands for a moment before them where much of its memory is not
    /// tracked yet.
    ///
    /// # Errors
    /// Those of stopping, and of the sink. What can't be tracked or read is left for the pause.
    pub fn copy_ahead(&mut self, init: Pid, sink: &mut dyn Sink) -> Result<PreCopy, CaptureError> {
        let mut done = PreCopy::default();
        mappings::prepare();
        if !held_pages::can_be_told() {
            done.ended = "this kernel does not tell who holds pages";
            return Ok(done);
        }
        if self.lacks_pages(init, COVERED_AHEAD_PAGES_MIN) {
            done.stopped = self.cover_ahead(init)?;
        }
        if self.memories.is_empty() {
            done.ended = "nothing is tracked";
            return Ok(done);
        }
        for (pid, tracked) in &mut self.memories {
            tracked.id = held_pages::memory(*pid).ok();
            tracked.mappings = mappings::of(*pid).unwrap_or_default();
            let special = tracked.mappings.iter().find(|mapping| mapping.name == "[vvar]");
            tracked.special = special.map(|mapping| (mapping.start, mapping.end));
            tracked
                .mappings
                .retain(|mapping| mapping.has_flag(COVERED) && exact(mapping).is_some());
        }
        let mut last = u64::MAX;
        done.ended = loop {
            if done.rounds.len() == ROUNDS_MAX {
                break "the last round";
            }
            let begun = Instant::now();
            let (pages, all_counts) = self.round(sink)?;
            sink.settle().map_err(|source| CaptureError::Sink { source })?;
            done.rounds.push((pages, begun.elapsed()));
            if !all_counts {
                break "somebody holds pages";
            }
            if pages * PAGE <= ENOUGH_BYTES {
                break "little is left";
            }
            if pages > last / 2 {
                break "as much is written as is copied";
            }
            last = pages;
        };
        Ok(done)
    }

    /// Copies what was written since the round before. Returns the number of pages, and whether all of it counts as stored.
    fn round(&mut self, sink: &mut dyn Sink) -> Result<(u64, bool), CaptureError> {
        let alone = self.memories.len() == 1;
        let mut round = Round::default();
        let mut armed = Vec::new();
        let mut armed_bytes = 0;
        for pid in self.memories.keys().copied().collect::<Vec<Pid>>() {
            let mut next = Some(Cursor::default());
            while let Some(from) = next {
                let Some(tracked) = self.memories.get_mut(&pid) else { break };
                let room = ARMED_BYTES_MAX.saturating_sub(armed_bytes);
                let batch = tracked.arm(pid, from, room);
                next = batch.next;
                armed_bytes += batch.bytes;
                armed.push(batch);
                if armed_bytes >= ARMED_BYTES_MAX {
                    self.copy_armed(std::mem::take(&mut armed), alone, &mut round, sink)?;
                    armed_bytes = 0;
                }
            }
        }
        self.copy_armed(armed, alone, &mut round, sink)?;
        if round.held_by_others {
            // They may have held pages since before they were armed at any time.
            for tracked in self.memories.values_mut() {
                tracked.unstored = Ranges::all();
                tracked.in_doubt = true;
            }
        }
        Ok((round.pages, !round.held))
    }

    /// Copies what was just armed, as far as nobody can have held it since before that.
    fn copy_armed(
        &mut self,
        armed: Vec<Armed>,
        alone: bool,
        round: &mut Round,
        sink: &mut dyn Sink,
    ) -> Result<(), CaptureError> {
        // Whatever happens: what is armed is not stored, before it has been copied.
        for batch in &armed {
            let Some(tracked) = self.memories.get_mut(&batch.pid) else { continue };
            tracked.since = tracked.since.union(&batch.written);
            tracked.unstored = tracked.unstored.union(&batch.written);
        }
        let pids: BTreeSet<Pid> = armed.iter().map(|batch| batch.pid).collect();
        let mut ids = BTreeSet::new();
        let mut counts = BTreeMap::new();
        for pid in pids {
            let Some(tracked) = self.memories.get(&pid) else { continue };
            let passed = tracked.special.is_some_and(|special| {
                tracked
                    .tracker
                    .await_lock(special)
                    .inspect_err(|error| tracing::debug!(%error, pid, "no round counts"))
                    .is_ok()
            });
            if let Some(id) = tracked.id.filter(|_| passed) {
                ids.insert(id);
                counts.insert(pid, id);
            }
        }
        let held = held_pages::settle(&ids);
        counts.retain(|_, id| !held.has(*id));
        round.held_by_others |= held.by_others;
        for batch in armed {
            if !counts.contains_key(&batch.pid) {
                round.held |= batch.bytes > 0;
                continue;
            }
            let Some(tracked) = self.memories.get_mut(&batch.pid) else { continue };
            round.pages += tracked.copy_armed(&batch, alone, sink)?;
        }
        Ok(())
    }

    /// Tracks the memory of a container that has been brought back and does not run yet: the capsule that comes next continues the one that
    /// `source` has. What can't be tracked is left out.
    ///
    /// [`Tracking::identify`] completes it.
    pub(crate) fn of_restored(
        tree: &mut Tree,
        container: &Container,
        source: &dyn Source,
    ) -> Tracking {
        let mut tracking = Tracking::default();
        if !kernel_tells() {
            return tracking;
        }
        for record in &container.processes {
            let ProcessState::Alive(alive) = &record.state else { continue };
            let Some(process) = tree.processes.get_mut(&record.pid) else { continue };
            let pid = process.pid;
            if alive.sharing.memory.is_some()
                || own_pages(pid) < TRACKED_PAGES_MIN
                || aio::has_context(pid)
            {
                continue;
            }
            let space = SpaceId(alive.space);
            let tracked =
                process.make_tracker_in_arena().map_err(io::Error::other).and_then(|tracker| {
                    let tracker = tracker.ok_or(io::ErrorKind::Unsupported)?;
                    TrackedMemory::restored(pid, tracker, space, source)
                });
            match tracked {
                Ok(tracked) => drop(tracking.memories.insert(pid, tracked)),
                Err(error) => tracing::info!(%error, pid, "its memory is not tracked"),
            }
        }
        tracking
    }

    /// The processes have become those that were saved in every respect, and do not run yet.
    pub(crate) fn identify(&mut self) {
        self.memories.retain(|pid, tracked| match Identity::of(*pid) {
            Ok(identity) => {
                tracked.identity = identity;
                true
            }
            Err(_) => false,
        });
    }

    /// Makes trackers for the memories that have none, if the container stays. Their mappings are covered by the scan that follows.
    /// The processes have been looked at, and room for code was found in them.
    ///
    /// # Errors
    /// A process can't be read. One that can't have a tracker is no error: it is copied in full each time.
    pub(crate) fn attach(&mut self, frozen: &mut FrozenTree) -> Result<(), CaptureError> {
        if self.stays { self.make_trackers(frozen) } else { Ok(()) }
    }

    /// Whether there are so many pages that are not tracked and could be.
    fn lacks_pages(&self, init: Pid, enough: u64) -> bool {
        let Ok(namespace) = proc::namespace(init, "pid") else { return false };
        let processes = match View::of(init).and_then(|view| view.processes()) {
            Ok(processes) => processes,
            Err(_) => proc::processes().unwrap_or_default(),
        };
        let mut found = 0;
        for pid in processes {
            found += match self.memories.get(&pid) {
                Some(tracked) => uncovered_pages(pid, &tracked.pagemap, enough),
                None if proc::namespace(pid, "pid").is_ok_and(|other| other == namespace)
                    && !self.memories.keys().any(|other| same_memory(*other, pid)) =>
                {
                    own_pages(pid)
                }
                None => 0,
            };
            if found >= enough {
                return kernel_tells();
            }
        }
        false
    }

    /// Stops the container, so that all of its memory is tracked that can be. Returns how long it stood.
    ///
    /// # Errors
    /// Those of stopping and of looking at it; it runs on. Memory that can't be tracked is no error.
    ///
    /// A mapping can only be covered as a whole while everything stands, or calls of the program could fail that take it for one
    /// (mremap(2)).
    fn cover_ahead(&mut self, init: Pid) -> Result<Duration, CaptureError> {
        let mut frozen = FrozenTree::stop(init, &mut || Ok(()))?;
        let mut slept = restart::elapsed(&frozen.sleepers, frozen.stopped_at, &frozen.facts);
        self.left_calls.pass_on(&mut frozen, &mut slept);
        let mut firsts: Vec<Pid> = Vec::new();
        process::part_scratch(&mut frozen.processes, |pid| {
            let first = firsts.iter().copied().find(|first| same_memory(*first, pid));
            first.unwrap_or_else(|| {
                firsts.push(pid);
                pid
            })
        });
        let mut lists = BTreeMap::new();
        for (pid, process) in frozen.processes.iter_mut().chain(&mut frozen.sessions) {
            let list = mappings::of(*pid).map_err(read("the mappings"))?;
            process.find_room(&list);
            process::mend_for_thaw(process, &slept)?;
            lists.insert(*pid, list);
        }
        self.make_trackers(&mut frozen)?;
        self.memories.retain(|pid, tracked| {
            let is_there = frozen.processes.contains_key(pid) && tracked.is_of(*pid);
            let new = lists.get(pid).into_iter().flatten().filter(|mapping| is_uncovered(mapping));
            if is_there {
                // What can't be covered is copied every time.
                new.for_each(|mapping| drop(tracked.tracker.cover(mapping.start, mapping.end)));
            }
            is_there
        });
        phase::reached(Phase::Covered);
        let stopped_at = frozen.stopped_at;
        frozen.thaw()?;
        self.left_calls.released();
        Ok(stopped_at.elapsed())
    }

    fn make_trackers(&mut self, frozen: &mut FrozenTree) -> Result<(), CaptureError> {
        if !kernel_tells() {
            return Ok(());
        }
        let mut owners: BTreeMap<Pid, Pid> = BTreeMap::new();
        for pid in frozen.processes.keys().copied() {
            let numbers = |pid: Pid| (inner_pid(pid).unwrap_or(pid), pid);
            match owners.values_mut().find(|owner| same_memory(**owner, pid)) {
                Some(owner) if numbers(pid) < numbers(*owner) => *owner = pid,
                Some(_) => {}
                None => drop(owners.insert(pid, pid)),
            }
        }
        for pid in owners.into_values() {
            let tracked =
                self.memories.keys().any(|other| *other == pid || same_memory(*other, pid));
            if tracked || own_pages(pid) < TRACKED_PAGES_MIN || aio::has_context(pid) {
                continue;
            }
            let Some(process) = frozen.processes.get_mut(&pid) else { continue };
            match process.make_tracker() {
                Ok(Some(tracker)) => {
                    let what = read(format!("process {pid} in /proc"));
                    let tracked = TrackedMemory::new(pid, tracker).map_err(what)?;
                    self.memories.insert(pid, tracked);
                }
                // The next attempt may go better, and what is not tracked is copied.
                Ok(None) => {}
                Err(error) => tracing::info!(%error, pid, "its memory is not tracked"),
            }
        }
        self.memories.retain(|pid, _| !aio::has_context(*pid));
        Ok(())
    }
}

/// What smaps says of a mapping whose writes are tracked.
const COVERED: &[u8; 2] = b"uw";

/// Whether a mapping could be tracked, and is not.
fn is_uncovered(mapping: &Mapping) -> bool {
    !mapping.has_flag(COVERED) && mapping.has_anonymous && exact(mapping).is_some()
}

/// Whether pages of zeros count in a mapping that can be tracked; none in one that can't.
fn exact(mapping: &Mapping) -> Option<bool> {
    let name = mapping.name.as_encoded_bytes();
    let untracked = mapping.shared
        || name.starts_with(b"/memfd:")
        || mapping.has_flag(b"ht")
        || mapping.has_flag(b"dp")
        || mapping.name == "[vsyscall]"
        || vdso::is_part(mapping);
    (!untracked).then(|| mapping.inode != 0 || !(name.is_empty() || name.starts_with(b"[")))
}

/// Whether the kernel tells of all that is written ([`userfaultfd::probe`]).
fn kernel_tells() -> bool {
    static TELLS: OnceLock<bool> = OnceLock::new();
    *TELLS.get_or_init(|| {
        let told = userfaultfd::probe();
        told.inspect_err(
            |error| tracing::info!(%error, "this kernel does not tell what is written"),
        )
        .is_ok()
    })
}

/// Pages of a process's own in mappings that could be tracked and are not, counted up to about `enough`.
fn uncovered_pages(pid: Pid, pagemap: &Pagemap, enough: u64) -> u64 {
    let mappings = mappings::of(pid).unwrap_or_default();
    let mut pages = 0;
    for mapping in mappings.iter().filter(|mapping| is_uncovered(mapping)) {
        let mut next = mapping.start;
        while next < mapping.end && pages < enough {
            let Ok((runs, after)) = pagemap.populated_some(next, mapping.end, RUNS_AT_ONCE) else {
                break;
            };
            let own = runs.iter().filter(|run| !run.file && !run.guard);
            pages += own.map(|run| (run.end - run.start) / PAGE).sum::<u64>();
            next = after;
        }
    }
    pages
}

fn same_memory(a: Pid, b: Pid) -> bool {
    kcmp::resource(a, b, Resource::Vm).is_ok_and(|order| order.is_eq())
}

/// Pages that a process has beside those of files and shared memory, about.
pub(crate) fn own_pages(pid: Pid) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap_or_default();
    let mut fields = text.split(' ').skip(1).map(|field| field.parse::<u64>().unwrap_or(0));
    let (resident, of_files) = (fields.next().unwrap_or(0), fields.next().unwrap_or(0));
    resident.saturating_sub(of_files)
}

/// What a round has come to.
#[derive(Default)]
struct Round {
    pages: u64,
    /// Some of what was written could not be copied, as it may be held.
    held: bool,
    /// By somebody outside, perhaps.
    held_by_others: bool,
}

/// Where a round goes on in a memory.
#[derive(Clone, Copy, Default)]
struct Cursor {
    mapping: usize,
    /// Address in it; before it, its start.
    address: u64,
}

/// Pages that were armed just now, or have been and are not stored.
struct Armed {
    pid: Pid,
    /// To be copied: start, end, and whether pages of zeros count.
    found: Vec<(u64, u64, bool)>,
    bytes: u64,
    /// All that was looked at.
    scanned: Ranges,
    /// What was armed, or may have been.
    written: Ranges,
    /// What can't be copied.
    failed: Ranges,
    /// Where there is more.
    next: Option<Cursor>,
}

impl TrackedMemory {
    fn new(pid: Pid, tracker: WriteTracker) -> io::Result<TrackedMemory> {
        Ok(TrackedMemory {
            identity: Identity::of(pid)?,
            tracker,
            pagemap: Pagemap::open(pid)?,
            memory: File::open(format!("/proc/{pid}/mem"))?,
            parent: None,
            since: Ranges::all(),
            last: Ranges::default(),
            base: None,
            space: None,
            unstored: Ranges::all(),
            mappings: Vec::new(),
            special: None,
            id: None,
            in_doubt: false,
        })
    }

    /// The memory of a process that has just been filled, and stands.
    fn restored(
        pid: Pid,
        tracker: WriteTracker,
        space: SpaceId,
        source: &dyn Source,
    ) -> io::Result<TrackedMemory> {
        let mut tracked = TrackedMemory::new(pid, tracker)?;
        let mut stored = Ranges::default();
        for PageRun { first, count } in source.runs(space)? {
            stored.add(first * PAGE, (first + count) * PAGE);
        }
        tracked.since = Ranges::default();
        tracked.parent = Some(space);
        for mapping in proc::mappings(pid)?.iter().filter(|mapping| is_uncovered(mapping)) {
            if tracked.tracker.cover(mapping.start, mapping.end).is_err() {
                continue;
            }
            let of_file = exact(mapping).unwrap_or(true);
            let mut next = mapping.start;
            while next < mapping.end {
                let found =
                    tracked.pagemap.tracked_some(next, mapping.end, RUNS_AT_ONCE, of_file)?;
                for run in found.0 {
                    for (start, end, is_stored) in stored.divide(run.start, run.end) {
                        // The engine's own, or pages of zeros.
                        if !is_stored {
                            tracked.since.add(start, end);
                        }
                    }
                }
                next = found.1;
            }
        }
        Ok(tracked)
    }

    /// Whether it still is the memory of the process.
    fn is_of(&self, pid: Pid) -> bool {
        Identity::of(pid).is_ok_and(|now| now == self.identity)
    }

    /// The base of the capsule that is being made.
    pub(crate) fn base(&mut self, sink: &mut dyn Sink) -> Result<BaseId, CaptureError> {
        if let Some(base) = self.base {
            return Ok(base);
        }
        let base = sink.base(self.parent).map_err(|source| CaptureError::Sink { source })?;
        self.base = Some(base);
        Ok(base)
    }

    /// The space that it is in the capsule that is being made.
    pub(crate) fn set_space(&mut self, space: SpaceId) {
        self.space = Some(space);
    }

    /// A part of a mapping in the final scan, as [`Pagemap::tracked_some`]. None where the mapping can't be covered. A new one is covered now:
    /// the next capsule need not copy it again.
    ///
    /// Everything stands, and what is passed as clean is in the base. `pagemap` has been opened since then: the one that the rounds used may
    /// be that of a program which the process has replaced.
    pub(crate) fn scan(
        &mut self,
        pagemap: &Pagemap,
        mapping: (u64, u64),
        from: u64,
        runs_max: usize,
        of_file: bool,
    ) -> io::Result<Option<(Vec<Run>, u64)>> {
        let (start, end) = mapping;
        let is_uncovered = |error: &io::Error| error.raw_os_error() == Some(libc::EPERM);
        let scan = || match of_file {
            true => pagemap.tracked_some(from, end, runs_max, of_file),
            false => pagemap.tracked_of_stopped(from, end, runs_max),
        };
        let found = match scan() {
            Err(error) if is_uncovered(&error) && self.tracker.cover(start, end).is_ok() => scan(),
            found => found,
        };
        let (runs, next) = match found {
            Ok(found) => found,
            Err(error) if is_uncovered(&error) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut judged = Vec::with_capacity(runs.len());
        for run in runs {
            if !run.clean {
                self.last.add(run.start, run.end);
                judged.push(run);
                continue;
            }
            for (start, end, unstored) in self.unstored.divide(run.start, run.end) {
                judged.push(Run { start, end, clean: !unstored, ..run });
            }
        }
        Ok(Some((judged, next)))
    }

    /// Arms what was written, from a place on, until it is about `bytes_max` that are to be copied.
    fn arm(&self, pid: Pid, from: Cursor, bytes_max: u64) -> Armed {
        let mut armed = Armed {
            pid,
            found: Vec::new(),
            bytes: 0,
            scanned: Ranges::default(),
            written: Ranges::default(),
            failed: Ranges::default(),
            next: None,
        };
        let mut first = from.address;
        for (index, mapping) in self.mappings.iter().enumerate().skip(from.mapping) {
            let (mut next, end) = (mapping.start.max(first), mapping.end);
            first = 0;
            let exact = exact(mapping).unwrap_or(true);
            while next < end {
                if armed.bytes >= bytes_max {
                    armed.next = Some(Cursor { mapping: index, address: next });
                    return armed;
                }
                // Where mappings have come that are not covered, or the process has ended. Of what comes before such a mapping some may
                // have been armed, and nobody knows what.
                let part_end = end.min(next.saturating_add(SCANNED_BYTES_MAX));
                let scan = self.pagemap.tracked_some(next, part_end, RUNS_AT_ONCE, exact);
                let Ok((runs, after)) = scan else {
                    armed.written.add(next, end);
                    armed.failed.add(next, end);
                    break;
                };
                armed.scanned.add(next, after);
                next = after;
                for run in runs {
                    if !run.clean {
                        armed.written.add(run.start, run.end);
                    }
                    if run.guard {
                        continue;
                    }
                    for (start, end, was_unstored) in self.unstored.divide(run.start, run.end) {
                        if !run.clean || was_unstored {
                            armed.found.push((start, end, exact));
                            armed.bytes += end - start;
                        }
                    }
                }
            }
        }
        armed
    }

    /// Copies what was armed; what can be copied counts as stored. Returns the number of pages.
    fn copy_armed(
        &mut self,
        armed: &Armed,
        alone: bool,
        sink: &mut dyn Sink,
    ) -> Result<u64, CaptureError> {
        let base = self.base(sink)?;
        let mut failed = armed.failed.clone();
        let mut pages = 0;
        let mut shared = Vec::new();
        for found in armed.found.chunk_by(|one, next| one.2 == next.2) {
            let exact = found.first().is_some_and(|found| found.2);
            let mut drafts = Draft::new(base, exact, sink);
            for (start, end, _) in found.iter().copied() {
                if alone {
                    pages += drafts.copy(&self.memory, start, end, &mut failed)?;
                    continue;
                }
                // What others may have too is told apart in the pause.
                if self.pagemap.shared(start, end, &mut shared).is_err() {
                    failed.add(start, end);
                    continue;
                }
                let mut first = start;
                for group in shared.chunk_by(|a, b| a.is_some() == b.is_some()) {
                    let last = first + group.len() as u64 * PAGE;
                    match group.first() {
                        Some(None) => {
                            pages += drafts.copy(&self.memory, first, last, &mut failed)?;
                        }
                        _ => failed.add(first, last),
                    }
                    first = last;
                }
            }
            drafts.finish()?;
        }
        self.unstored = self.unstored.without(&armed.scanned).union(&failed);
        Ok(pages)
    }
}

/// Collects pages of a process into batches for a base.
pub(crate) struct Draft<'a> {
    sink: &'a mut dyn Sink,
    base: BaseId,
    exact: bool,
    runs: Vec<PageRun>,
    bytes: Vec<u8>,
}

impl<'a> Draft<'a> {
    pub(crate) fn new(base: BaseId, exact: bool, sink: &'a mut dyn Sink) -> Draft<'a> {
        let bytes = Vec::new();
        Draft { sink, base, exact, runs: Vec::new(), bytes }
    }

    /// Copies a range, and adds to `unstored` what can't be read. Returns the number of pages.
    pub(crate) fn copy(
        &mut self,
        memory: &File,
        start: u64,
        end: u64,
        unstored: &mut Ranges,
    ) -> Result<u64, CaptureError> {
        let mut pages = 0;
        let mut next = start;
        while next < end {
            if self.bytes.capacity() == 0 {
                self.bytes = self.sink.buffer();
            }
            let room = (BATCH_BYTES_MAX - self.bytes.len()) as u64;
            let bytes = (end - next).min(room);
            let from = self.bytes.len();
            self.bytes.resize(from + usize::try_from(bytes).expect("at most a batch"), 0);
            let buffer = self.bytes.get_mut(from..).expect("just resized");
            match memory.read_exact_at(buffer, next) {
                Ok(()) => {
                    self.runs.push(PageRun { first: next / PAGE, count: bytes / PAGE });
                    pages += bytes / PAGE;
                }
                Err(_) => {
                    self.bytes.truncate(from);
                    unstored.add(next, next + bytes);
                }
            }
            next += bytes;
            if self.bytes.len() == BATCH_BYTES_MAX {
                self.flush()?;
            }
        }
        Ok(pages)
    }

    fn flush(&mut self) -> Result<(), CaptureError> {
        if self.runs.is_empty() {
            return Ok(());
        }
        let (runs, bytes) = (std::mem::take(&mut self.runs), std::mem::take(&mut self.bytes));
        self.sink
            .draft(self.base, self.exact, runs, bytes)
            .map_err(|source| CaptureError::Sink { source })
    }

    pub(crate) fn finish(mut self) -> Result<(), CaptureError> {
        self.flush()
    }
}
