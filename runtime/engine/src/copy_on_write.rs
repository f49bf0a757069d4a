//! Pages that a fork has left in common.
//!
//! Processes that were forked from each other have the same physical pages where none has written since. A capture stores such
//! a page once, and the page maps of all that have it name the same place. A restore builds a tree that shares them again: what
//! several processes have in common is put into the memory of the one from which all of them are made, before they are.
//!
//! What comes back shared: anonymous memory and own pages of private file mappings at the same address, in the version that the
//! most have where a common maker could hold but one. What is stored once and comes back as copies: stacks that grow, huge pages,
//! private mappings of files without names, and other versions. What is stored twice: pages that were moved (`mremap`) by one of
//! those that have them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;

use samara_capsule::record::{self, Alive, Backing, Container, FileCheck, Mapping, ProcessState};
use samara_capsule::transfer::{BaseId, PageRun, Sink, Source, SpaceId, StoredRun};
use samara_kernel::pagemap::PhysicalPage;
use samara_kernel::tape::End;

use crate::capture::{CaptureError, read};
use crate::descriptors::Channel;
use crate::memory::{self, Batcher, Copied, OwnRun, PAGE, PrivateMemory, write_runs};
use crate::plan::Step;
use crate::restore::RestoreError;
use crate::root::Root;
use crate::snapshot::{Cost, Planned, SnapshotRequest};
use crate::tracee::Process;

/// Memory is looked at in windows of this size: what is noted of them takes 16 bytes a page and process.
const WINDOW: u64 = 16 << 20;

/// Pages from `start` to `end` that are those of all `owners`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    run: OwnRun,
    owners: Rc<[usize]>,
    /// The owner whose base has them.
    clean: Option<usize>,
}

/// Copies the private memory of stopped processes, what they have in common once, and nothing that has been stored already.
///
/// With `request`, what is to be read from forks is not copied, but named in the second result. The sink has been told of it as of pages
/// that are unchanged: they have to be passed as drafts of their bases.
pub(crate) fn copy_private(
    mut members: Vec<PrivateMemory<'_>>,
    request: Option<&SnapshotRequest>,
    sink: &mut dyn Sink,
) -> Result<(Copied, Planned), CaptureError> {
    let bases: Vec<Option<BaseId>> =
        members.iter_mut().map(|member| member.base(sink)).collect::<Result<_, _>>()?;
    let room = sink.room();
    let mut batcher = Batcher::new(sink);
    // Pages to copy, where it has to be known first how many there are.
    let mut dirty = Vec::new();
    let mut groups = Groups::default();
    // Those that have something left, by where it begins.
    let mut queue = BTreeSet::new();
    for (index, member) in members.iter_mut().enumerate() {
        queue.extend(member.peek()?.map(|start| (start, index)));
    }
    while let Some((start, _)) = queue.first().copied() {
        let end = (start / WINDOW + 1) * WINDOW;
        let mut parts = BTreeMap::new();
        while let Some((_, index)) = queue.first().copied().filter(|(start, _)| *start < end) {
            queue.pop_first();
            let Some(member) = members.get_mut(index) else { continue };
            parts.insert(index, member.take_below(end)?);
            queue.extend(member.peek()?.map(|start| (start, index)));
        }
        for Piece { run, owners, clean } in pieces(&members, parts)? {
            let number = groups.number_of(owners, &members);
            let Some(group) = groups.get(number) else { continue };
            let base = clean.and_then(|owner| bases.get(owner).copied().flatten());
            match (base, members.get(group.reader)) {
                (Some(base), _) => batcher
                    .unchanged(&group.spaces, base, run)
                    .map_err(|source| CaptureError::Sink { source })?,
                (None, Some(_)) if request.is_some() => dirty.push(Dirty::new(run, number)),
                (None, Some(reader)) => reader.copy(run, &group.spaces, &mut batcher)?,
                (None, None) => {}
            }
        }
    }
    let planned = match request {
        Some(request) => {
            copy_or_plan(&members, &dirty, &groups, bases, request, room, &mut batcher)?
        }
        None => Planned::default(),
    };
    let copied = batcher.finish().map_err(|source| CaptureError::Sink { source })?;
    Ok((copied, planned))
}

/// Copies what no fork is to be made for, and returns the rest.
fn copy_or_plan(
    members: &[PrivateMemory<'_>],
    dirty: &[Dirty],
    groups: &Groups,
    mut bases: Vec<Option<BaseId>>,
    request: &SnapshotRequest,
    room: u64,
    batcher: &mut Batcher<'_>,
) -> Result<Planned, CaptureError> {
    let failed = |source| CaptureError::Sink { source };
    let mut to_copy = vec![0; members.len()];
    for one in dirty {
        let reader = groups.get(one.group).and_then(|group| to_copy.get_mut(group.reader));
        if let Some(pages) = reader {
            *pages += one.pages();
        }
    }
    let costs = members.iter().zip(to_copy);
    let costs: Vec<Cost> = costs.map(|(member, pages)| Cost::of(member.pid, pages)).collect();
    let (forks, way) = request.choose(&costs, room / PAGE);
    let mut planned = Planned::new(way);
    for (base, fork) in bases.iter_mut().zip(&forks) {
        if *fork && base.is_none() {
            *base = Some(batcher.new_base().map_err(failed)?);
        }
    }
    for one in dirty {
        let Some(Group { reader: index, spaces, .. }) = groups.get(one.group) else { continue };
        let Some(reader) = members.get(*index) else { continue };
        let run = one.run();
        let is_forked = forks.get(*index).is_some_and(|fork| *fork) && reader.is_forked(&run);
        match bases.get(*index).copied().flatten().filter(|_| is_forked) {
            Some(base) => {
                batcher.unchanged_later(spaces, base, run).map_err(failed)?;
                planned.add(reader.pid, base, run);
            }
            None => reader.copy(run, spaces, batcher)?,
        }
    }
    Ok(planned)
}

/// Processes that have pages in common: who they are, who of them is read, and their spaces.
struct Group {
    owners: Rc<[usize]>,
    reader: usize,
    spaces: Arc<[SpaceId]>,
}

/// All groups that have been seen, by number.
#[derive(Default)]
struct Groups {
    all: Vec<Group>,
    numbers: BTreeMap<Rc<[usize]>, u32>,
    last: u32,
}

impl Groups {
    fn get(&self, number: u32) -> Option<&Group> {
        self.all.get(number as usize)
    }

    fn number_of(&mut self, owners: Rc<[usize]>, members: &[PrivateMemory<'_>]) -> u32 {
        // As a rule it is the same one as before.
        if self.get(self.last).is_some_and(|group| group.owners == owners) {
            return self.last;
        }
        let Groups { all, numbers, last } = self;
        *last = *numbers.entry(owners.clone()).or_insert_with(|| {
            let spaces = owners.iter().filter_map(|index| members.get(*index));
            let spaces = spaces.map(|member| member.space).collect();
            let reader = owners.first().copied().unwrap_or_default();
            all.push(Group { owners, reader, spaces });
            u32::try_from(all.len() - 1).expect("there are fewer groups than pages")
        });
        *last
    }
}

/// Pages to copy, in few bytes.
#[derive(Clone, Copy, Debug)]
struct Dirty {
    start: u64,
    /// Number of pages, and whether those of zeros count.
    pages_exact: u32,
    /// Whose they are.
    group: u32,
}

impl Dirty {
    /// A piece lies in a window, so its pages are few.
    fn new(run: OwnRun, group: u32) -> Dirty {
        let pages = u32::try_from((run.end - run.start) / PAGE).expect("a window");
        Dirty { start: run.start, pages_exact: pages << 1 | u32::from(run.exact), group }
    }

    fn pages(self) -> u64 {
        u64::from(self.pages_exact >> 1)
    }

    fn run(self) -> OwnRun {
        let end = self.start + self.pages() * PAGE;
        OwnRun { start: self.start, end, exact: self.pages_exact & 1 != 0, clean: false }
    }
}

/// Says whom the pages of a window belong to, in ascending order for each process.
fn pieces(
    members: &[PrivateMemory<'_>],
    parts: BTreeMap<usize, Vec<OwnRun>>,
) -> Result<Vec<Piece>, CaptureError> {
    let mut seen = Vec::new();
    // Nobody has pages in common with himself, and where nothing changed there is nothing to save.
    if parts.len() > 1 && parts.values().flatten().any(|run| !run.clean) {
        look(members, &parts, &mut seen)?;
    }
    Ok(divide(parts, seen))
}

/// A page of which others may have a copy: its number, what it is, whether zeros count, whose, and whether his base has it.
type Seen<P = PhysicalPage> = (u64, P, bool, usize, bool);

/// Finds the physical pages of a window.
///
/// They move: the kernel compacts memory, and swaps. So each is looked at twice, the second time after all have been looked at
/// once. What did not change for either of two processes, both had at the same moment, and as both are stopped that is enough.
fn look(
    members: &[PrivateMemory<'_>],
    parts: &BTreeMap<usize, Vec<OwnRun>>,
    seen: &mut Vec<Seen>,
) -> Result<(), CaptureError> {
    let looked_at = |index: usize, runs: &[OwnRun], pages: &mut Vec<_>| match (
        members.get(index),
        runs.first(),
        runs.last(),
    ) {
        (Some(member), Some(first), Some(last)) => member
            .pagemap
            .shared(first.start, last.end, pages)
            .map_err(read(format!("the pagemap of {}", member.space))),
        _ => Ok(()),
    };
    let mut before = BTreeMap::new();
    for (index, runs) in parts {
        let mut pages = Vec::new();
        looked_at(*index, runs, &mut pages)?;
        before.insert(*index, pages);
    }
    let mut after = Vec::new();
    for (index, runs) in parts {
        looked_at(*index, runs, &mut after)?;
        let (Some(before), Some(base)) = (before.get(index), runs.first()) else { continue };
        for run in runs {
            let first = usize::try_from((run.start - base.start) / PAGE).expect("in a window");
            let count = usize::try_from((run.end - run.start) / PAGE).expect("in a window");
            let both = before.iter().zip(&after).skip(first).take(count);
            for (number, (before, after)) in (run.start / PAGE..).zip(both) {
                if let Some(page) = before.filter(|_| before == after) {
                    seen.push((number, page, run.exact, *index, run.clean));
                }
            }
        }
    }
    Ok(())
}

/// Divides the pages of a window into those that several have in common and the rest of each process.
fn divide<P: Copy + Ord>(
    parts: BTreeMap<usize, Vec<OwnRun>>,
    mut seen: Vec<Seen<P>>,
) -> Vec<Piece> {
    seen.sort_unstable();
    let mut pieces: Vec<Piece> = Vec::new();
    let mut taken: BTreeMap<usize, Vec<u64>> = BTreeMap::new();
    let same = |a: &Seen<P>, b: &Seen<P>| (a.0, a.1, a.2) == (b.0, b.1, b.2);
    for group in seen.chunk_by(same).filter(|group| group.len() > 1) {
        let Some((number, _, exact, ..)) = group.first().copied() else { continue };
        let clean = group.iter().find(|(.., clean)| *clean).map(|(.., owner, _)| *owner);
        for (.., owner, _) in group {
            taken.entry(*owner).or_default().push(number);
        }
        let owners = || group.iter().map(|(.., owner, _)| *owner);
        let (start, end) = (number * PAGE, (number + 1) * PAGE);
        match pieces.last_mut() {
            Some(last)
                if last.run.end == start
                    && last.run.exact == exact
                    && last.clean == clean
                    && last.owners.iter().copied().eq(owners()) =>
            {
                last.run.end = end;
            }
            _ => {
                let run = OwnRun { start, end, exact, clean: clean.is_some() };
                pieces.push(Piece { run, owners: owners().collect(), clean })
            }
        }
    }
    let in_common = !pieces.is_empty();
    for (owner, runs) in parts {
        let owners: Rc<[usize]> = [owner].into();
        let mut taken = taken.remove(&owner).unwrap_or_default().into_iter().peekable();
        for mut run in runs {
            let clean = run.clean.then_some(owner);
            while let Some(number) = taken.next_if(|number| number * PAGE < run.end) {
                if run.start < number * PAGE {
                    let own = OwnRun { end: number * PAGE, ..run };
                    pieces.push(Piece { run: own, owners: owners.clone(), clean });
                }
                run.start = (number + 1) * PAGE;
            }
            if run.start < run.end {
                pieces.push(Piece { run, owners: owners.clone(), clean });
            }
        }
    }
    if in_common {
        pieces.sort_by_key(|piece| piece.run.start);
    }
    pieces
}

/// A range of addresses that a maker of processes maps for what they have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Region {
    start: u64,
    end: u64,
    kind: Kind,
}

/// What no process can change about a mapping that it has inherited.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Kind {
    no_reserve: bool,
    /// Of a private mapping of a file.
    file: Option<MappedFile>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct MappedFile {
    path: record::Path,
    /// The offset in the file, less the address.
    base: u64,
    check: FileCheck,
}

impl Kind {
    /// None for a mapping that is not inherited.
    fn of(mapping: &Mapping) -> Option<Kind> {
        let file = match &mapping.backing {
            Backing::Anonymous { grows_down: false, huge_page_bytes: None, droppable: false } => {
                None
            }
            Backing::PrivateFile { path, offset, check } => Some(MappedFile {
                path: path.clone(),
                base: offset.wrapping_sub(mapping.start),
                check: *check,
            }),
            Backing::Anonymous { .. }
            | Backing::PrivateUnlinked { .. }
            | Backing::PrivateMemory { .. }
            | Backing::SharedFile { .. }
            | Backing::SharedUnlinked { .. }
            | Backing::Shared { .. }
            | Backing::SystemV { .. }
            | Backing::AsynchronousIo { .. }
            | Backing::InheritedRing { .. }
            | Backing::Vdso { .. } => return None,
        };
        Some(Kind { no_reserve: mapping.advice.no_reserve, file })
    }
}

/// What a process has to have in its memory before it makes the first other one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Bequest {
    regions: Vec<Region>,
    pages: Vec<(SpaceId, Vec<PageRun>)>,
}

/// What to do with memory that a process was born with, or has put there for its children.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Heritage {
    /// What is no part of its memory.
    unmapped: Vec<(u64, u64)>,
    /// Mappings that are there already.
    kept: Vec<(u64, u64)>,
    /// Pages in those that have to be empty.
    stale: Vec<PageRun>,
    /// Pages that are not there yet.
    pub(crate) missing: Vec<PageRun>,
}

impl Heritage {
    /// Whether the whole of a mapping is there.
    pub(crate) fn keeps(&self, mapping: &Mapping) -> bool {
        self.kept.binary_search(&(mapping.start, mapping.end)).is_ok()
    }

    /// Removes what is not the process's own. Comes before anything else is mapped.
    pub(crate) fn reduce(&self, process: &mut Process) -> Result<(), RestoreError> {
        let unmapped = self.unmapped.iter();
        let unmapped = unmapped.map(|(start, end)| (libc::SYS_munmap, *start, *end, 0));
        let advice = u64::from(libc::MADV_DONTNEED.unsigned_abs());
        let stale = self.stale.iter().map(|run| (run.first * PAGE, (run.first + run.count) * PAGE));
        let stale = stale.map(|(start, end)| (libc::SYS_madvise, start, end, advice));
        let mut tape = process.tape()?;
        for (call, start, end, argument) in unmapped.chain(stale) {
            if !tape.has_room(1, 0) {
                process.run_all(0, &tape, End::Breakpoint)?;
                tape = process.tape()?;
            }
            let what = format!("remove inherited memory at {start:#x}");
            tape.call(what, call, [start, end - start, argument, 0, 0, 0]);
        }
        process.run_all(0, &tape, End::Breakpoint)?;
        Ok(())
    }
}

/// How a tree of processes comes to share memory again.
#[derive(Debug, Default)]
pub(crate) struct Inheritance {
    /// By the number of the process that does it, which is one of those that have the memory.
    bequests: BTreeMap<usize, Bequest>,
    /// Whose memory a process has, by its number: an index.
    memories: BTreeMap<i32, usize>,
    /// By the number of the process that the page map belongs to. Nothing for a process that begins empty.
    heritages: BTreeMap<i32, Heritage>,
}

impl Inheritance {
    /// Decides it from the steps that make the tree, and from what the page maps say.
    pub(crate) fn plan(
        container: &Container,
        steps: &[Step],
        source: &dyn Source,
    ) -> Result<Inheritance, RestoreError> {
        let owners: Vec<(i32, &Alive)> = container
            .processes
            .iter()
            .filter_map(|record| match &record.state {
                ProcessState::Alive(alive) if alive.sharing.memory.is_none() => {
                    Some((record.pid, &**alive))
                }
                ProcessState::Alive(_) | ProcessState::Zombie { .. } => None,
            })
            .collect();
        if owners.len() < 2 {
            return Ok(Inheritance::default());
        }
        let spaces: Vec<SpaceId> = owners.iter().map(|(_, alive)| SpaceId(alive.space)).collect();
        let stored = source.stored(&spaces).map_err(|source| RestoreError::Fill { source })?;
        let owners: Vec<Owner> = owners
            .iter()
            .zip(stored)
            .map(|((pid, alive), stored)| Owner::new(*pid, alive, stored))
            .collect();
        Ok(decide(&Lineage::of(steps), &owners))
    }

    /// What a process has to have in its memory before it makes another one, told once.
    fn take_bequest(&mut self, pid: i32) -> Option<Bequest> {
        self.bequests.remove(self.memories.get(&pid)?)
    }

    /// Puts into the memory of a process what those that it is about to make have in common.
    pub(crate) fn bequeath(
        &mut self,
        pid: i32,
        process: &mut Process,
        channel: &mut Channel,
        root: &Root,
        source: &dyn Source,
    ) -> Result<(), RestoreError> {
        /// With one tape and one message of descriptors.
        const AT_ONCE: usize = 100;
        let Some(bequest) = self.take_bequest(pid) else { return Ok(()) };
        for regions in bequest.regions.chunks(AT_ONCE) {
            map_regions(regions, process, channel, root)?;
        }
        let wanted: Vec<(SpaceId, &[PageRun])> =
            bequest.pages.iter().map(|(space, runs)| (*space, runs.as_slice())).collect();
        let pid = process.pid;
        source
            .transfer_some(&wanted, &|_, runs, bytes| write_runs(pid, 0, runs, bytes))
            .map_err(|source| RestoreError::Fill { source })
    }

    pub(crate) fn heritage(&self, pid: i32) -> Option<&Heritage> {
        self.heritages.get(&pid)
    }
}

/// Maps regions to be filled.
fn map_regions(
    regions: &[Region],
    process: &mut Process,
    channel: &mut Channel,
    root: &Root,
) -> Result<(), RestoreError> {
    const RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE;
    let files = regions.iter().filter_map(|region| region.kind.file.as_ref());
    let files: Vec<File> = files
        .map(|file| memory::open_mapped(root, &file.path, libc::O_RDONLY, file.check))
        .collect::<Result<_, _>>()?;
    let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let numbers = channel.send(process, &borrowed)?;
    let mut left = numbers.iter().map(|number| u64::from(number.unsigned_abs()));
    let mut tape = process.tape()?;
    for Region { start, end, kind } in regions {
        let (fd, offset) = match &kind.file {
            None => (u64::MAX, 0),
            Some(file) => (left.next().unwrap_or(u64::MAX), file.base.wrapping_add(*start)),
        };
        let flags = PRIVATE
            | if kind.file.is_none() { libc::MAP_ANONYMOUS } else { 0 }
            | if kind.no_reserve { libc::MAP_NORESERVE } else { 0 };
        let flags = u64::from(flags.unsigned_abs());
        let what = format!("map {start:#x}-{end:#x} for its children");
        tape.call(what, libc::SYS_mmap, [*start, end - start, RW, flags, fd, offset]);
    }
    for number in &numbers {
        let number = u64::from(number.unsigned_abs());
        tape.call("close a mapped file", libc::SYS_close, [number, 0, 0, 0, 0, 0]);
    }
    process.run_all(0, &tape, End::Breakpoint)?;
    Ok(())
}

/// Who has been made by whom, as far as memory goes.
#[derive(Clone, Debug)]
struct Lineage {
    /// Whose memory a process has, by its number.
    memories: BTreeMap<i32, usize>,
    /// The memory that each began as a copy of. It comes before the copy.
    makers: Vec<usize>,
}

impl Lineage {
    fn of(steps: &[Step]) -> Lineage {
        let mut lineage = Lineage { memories: BTreeMap::from([(1, 0)]), makers: vec![0] };
        for step in steps {
            let Step::Fork { creator, pid, shared, .. } = *step else { continue };
            let maker = lineage.memories.get(&creator).copied().unwrap_or(0);
            let memory = if shared & libc::CLONE_VM != 0 {
                maker
            } else {
                lineage.makers.push(maker);
                lineage.makers.len() - 1
            };
            lineage.memories.insert(pid, memory);
        }
        lineage
    }

    fn maker(&self, memory: usize) -> usize {
        self.makers.get(memory).copied().unwrap_or(0)
    }

    /// The last memory of which all of these began as copies.
    fn common(&self, memories: impl IntoIterator<Item = usize>) -> Option<usize> {
        memories.into_iter().reduce(|mut a, mut b| {
            while a != b {
                // Makers have smaller numbers.
                if a > b { a = self.maker(a) } else { b = self.maker(b) }
            }
            a
        })
    }
}

/// A process with a page map.
#[derive(Clone, Debug)]
struct Owner {
    pid: i32,
    space: SpaceId,
    /// Mappings that may be inherited.
    plain: Vec<Region>,
    stored: Vec<StoredRun>,
}

impl Owner {
    fn new(pid: i32, alive: &Alive, stored: Vec<StoredRun>) -> Owner {
        let plain = alive.mappings.iter().filter_map(|mapping| {
            let kind = Kind::of(mapping)?;
            Some(Region { start: mapping.start, end: mapping.end, kind })
        });
        Owner { pid, space: SpaceId(alive.space), plain: plain.collect(), stored }
    }

    /// What of its pages may be inherited, cut where mappings end.
    fn heritable(&self) -> Vec<StoredRun> {
        let ranges: Vec<PageRun> = self.plain.iter().map(|region| region.pages()).collect();
        within(&self.stored, &ranges)
    }

    /// The index of the plain mapping in which a page lies.
    fn mapping(&self, page: u64) -> Option<usize> {
        around(&self.plain, page)
    }
}

/// Which of a list of regions, in ascending order, a page lies in.
fn around(regions: &[Region], page: u64) -> Option<usize> {
    let after = regions.partition_point(|region| region.start <= page * PAGE);
    let index = after.checked_sub(1)?;
    regions.get(index).filter(|region| page * PAGE < region.end).map(|_| index)
}

impl Region {
    fn pages(&self) -> PageRun {
        PageRun { first: self.start / PAGE, count: (self.end - self.start) / PAGE }
    }

    fn has_all_of(&self, mapping: &Region) -> bool {
        self.start <= mapping.start && mapping.end <= self.end && self.kind == mapping.kind
    }
}

/// Pages that several processes have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Common {
    stored: StoredRun,
    /// Indices of processes.
    owners: Vec<usize>,
}

impl Common {
    /// Forgets owners for which the page does not lie in a mapping of the region's kind. False if less than two are left.
    fn reduce_to(&mut self, regions: &[Region], owners: &[Owner]) -> bool {
        let page = self.stored.run.first;
        let Some(region) = around(regions, page).and_then(|index| regions.get(index)) else {
            return false;
        };
        self.owners.retain(|index| {
            let owner = owners.get(*index);
            let mapping = owner.and_then(|owner| owner.plain.get(owner.mapping(page)?));
            mapping.is_some_and(|mapping| region.has_all_of(mapping))
        });
        self.owners.len() > 1
    }
}

/// Pages that a memory holds, and the regions that are mapped in it, each in ascending order.
type Holding = (Rc<[StoredRun]>, Rc<[Region]>);

/// The decision: which memory holds what before copies are made of it, and what each process makes of its own.
fn decide(lineage: &Lineage, owners: &[Owner]) -> Inheritance {
    let heritable: Vec<Vec<StoredRun>> = owners.iter().map(Owner::heritable).collect();
    let mut common = in_common(&heritable);
    let regions = regions(&common, owners);
    common.retain_mut(|common| common.reduce_to(&regions, owners));
    if common.is_empty() {
        return Inheritance::default();
    }
    let mut bequeathed = bequeathed(&common, lineage, owners);
    let mut bequests = BTreeMap::new();
    // What each memory holds when it is copied, and in which regions.
    let mut held: Vec<Holding> = Vec::new();
    for memory in 0..lineage.makers.len() {
        let inherited = held.get(lineage.maker(memory)).cloned();
        let (below, mapped) = inherited.unwrap_or_else(|| ([].into(), [].into()));
        let Some(pages) = bequeathed.remove(&memory) else {
            held.push((below, mapped));
            continue;
        };
        let own: Vec<StoredRun> = pages.iter().map(|(stored, _)| *stored).collect();
        let needed = regions.iter().filter(|region| {
            !mapped.contains(region) && !within(&own, &[region.pages()]).is_empty()
        });
        let needed: Vec<Region> = needed.cloned().collect();
        let mut mapped: Vec<Region> = mapped.iter().chain(&needed).cloned().collect();
        mapped.sort_unstable_by_key(|region| region.start);
        held.push((overlaid(&below, &own).into(), mapped.into()));
        bequests.insert(memory, Bequest { regions: needed, pages: by_space(pages) });
    }
    let mut heritages = BTreeMap::new();
    for (owner, heritable) in owners.iter().zip(&heritable) {
        let memory = lineage.memories.get(&owner.pid).and_then(|memory| held.get(*memory));
        if let Some((pages, mapped)) = memory.filter(|(_, mapped)| !mapped.is_empty()) {
            heritages.insert(owner.pid, heritage(owner, heritable, pages, mapped));
        }
    }
    Inheritance { bequests, memories: lineage.memories.clone(), heritages }
}

/// What several have at the same page numbers, in ascending order.
fn in_common(heritable: &[Vec<StoredRun>]) -> Vec<Common> {
    let all = || heritable.iter().flatten();
    let mut edges: Vec<u64> = all().flat_map(|stored| [stored.run.first, end(stored)]).collect();
    edges.sort_unstable();
    edges.dedup();
    // Cut at all edges, equal pages are equal pieces.
    let mut pieces: Vec<(u64, u64, u64, usize)> = Vec::new();
    for (owner, runs) in heritable.iter().enumerate() {
        for stored in runs {
            let mut first = stored.run.first;
            let after = edges.partition_point(|edge| *edge <= first);
            for edge in edges.get(after..).unwrap_or_default() {
                if first >= end(stored) {
                    break;
                }
                let place = stored.place + (first - stored.run.first);
                pieces.push((first, place, edge - first, owner));
                first = *edge;
            }
        }
    }
    pieces.sort_unstable();
    pieces
        .chunk_by(|a, b| (a.0, a.1) == (b.0, b.1))
        .filter_map(|group| match group {
            [(first, place, count, _), _, ..] => Some(Common {
                stored: StoredRun { run: PageRun { first: *first, count: *count }, place: *place },
                owners: group.iter().map(|(.., owner)| *owner).collect(),
            }),
            _ => None,
        })
        .collect()
}

/// Mappings with pages in common, those of one kind that overlap joined: each is mapped as a whole, as mappings that were inherited
/// can't be joined with others. Who needs less unmaps the rest. Of those of different kinds the first counts.
fn regions(common: &[Common], owners: &[Owner]) -> Vec<Region> {
    let mut used = BTreeSet::new();
    for Common { stored, owners: indices } in common {
        for index in indices {
            let Some(owner) = owners.get(*index) else { continue };
            used.extend(owner.mapping(stored.run.first).map(|mapping| (*index, mapping)));
        }
    }
    let mapping = |(owner, mapping): &(usize, usize)| owners.get(*owner)?.plain.get(*mapping);
    let mut parts: Vec<Region> = used.iter().filter_map(mapping).cloned().collect();
    parts.sort_unstable_by_key(|part| (part.start, part.end));
    let mut regions: Vec<Region> = Vec::new();
    for part in parts {
        match regions.last_mut() {
            Some(last) if part.start < last.end => {
                if part.kind == last.kind {
                    last.end = last.end.max(part.end);
                }
            }
            _ => regions.push(part),
        }
    }
    regions
}

/// For each memory the pages that its copies have in common, in ascending order, and from whose map to take them. Where there are
/// several versions of a page, the one that the most have.
fn bequeathed(
    common: &[Common],
    lineage: &Lineage,
    owners: &[Owner],
) -> BTreeMap<usize, Vec<(StoredRun, SpaceId)>> {
    let mut bequeathed: BTreeMap<usize, Vec<(StoredRun, SpaceId)>> = BTreeMap::new();
    let mut last: Option<(&[usize], Option<usize>)> = None;
    for versions in common.chunk_by(|a, b| a.stored.run.first == b.stored.run.first) {
        let mut best: BTreeMap<usize, &Common> = BTreeMap::new();
        for version in versions {
            let memory = match last {
                Some((owners, memory)) if owners == version.owners => memory,
                _ => {
                    let members = version.owners.iter().filter_map(|index| owners.get(*index));
                    lineage.common(
                        members.filter_map(|owner| lineage.memories.get(&owner.pid).copied()),
                    )
                }
            };
            last = Some((&version.owners, memory));
            let Some(memory) = memory else { continue };
            let best = best.entry(memory).or_insert(version);
            if version.owners.len() > best.owners.len() {
                *best = version;
            }
        }
        for (memory, version) in best {
            let space = version.owners.first().and_then(|index| owners.get(*index));
            let pages = space.map(|owner| (version.stored, owner.space));
            bequeathed.entry(memory).or_default().extend(pages);
        }
    }
    bequeathed
}

fn by_space(pages: Vec<(StoredRun, SpaceId)>) -> Vec<(SpaceId, Vec<PageRun>)> {
    let mut spaces: BTreeMap<SpaceId, Vec<PageRun>> = BTreeMap::new();
    for (stored, space) in pages {
        spaces.entry(space).or_default().push(stored.run);
    }
    spaces.into_iter().collect()
}

/// What a process makes of the pages that its memory holds.
fn heritage(
    owner: &Owner,
    heritable: &[StoredRun],
    held: &[StoredRun],
    mapped: &[Region],
) -> Heritage {
    let usable = owner.plain.iter().filter(|mapping| {
        let pages = [mapping.pages()];
        let region = around(mapped, mapping.start / PAGE).and_then(|index| mapped.get(index));
        region.is_some_and(|region| region.has_all_of(mapping))
            && !equal(&within(heritable, &pages), &within(held, &pages)).is_empty()
    });
    let kept: Vec<&Region> = usable.collect();
    let kept_pages: Vec<PageRun> = kept.iter().map(|region| region.pages()).collect();
    let held = within(held, &kept_pages);
    let runs = |stored: &[StoredRun]| stored.iter().map(|stored| stored.run).collect::<Vec<_>>();
    let in_place = equal(heritable, &held);
    let whole: Vec<PageRun> = mapped.iter().map(Region::pages).collect();
    let range = |run: PageRun| (run.first * PAGE, (run.first + run.count) * PAGE);
    Heritage {
        unmapped: less(&whole, &kept_pages).into_iter().map(range).collect(),
        kept: kept.iter().map(|region| (region.start, region.end)).collect(),
        stale: less(&runs(&held), &runs(&owner.stored)),
        missing: less(&runs(&owner.stored), &in_place),
    }
}

fn end(stored: &StoredRun) -> u64 {
    stored.run.first + stored.run.count
}

/// The part of a run from page `low` to page `high`; none where there is none.
fn part(stored: &StoredRun, low: u64, high: u64) -> Option<StoredRun> {
    let (first, end) = (stored.run.first.max(low), end(stored).min(high));
    (first < end).then(|| StoredRun {
        run: PageRun { first, count: end - first },
        place: stored.place + (first - stored.run.first),
    })
}

/// The parts of `runs` that lie in one of `ranges`. All lists of runs here are in ascending order and without overlaps.
fn within(runs: &[StoredRun], ranges: &[PageRun]) -> Vec<StoredRun> {
    let mut parts = Vec::new();
    for range in ranges {
        let high = range.first + range.count;
        let first = runs.partition_point(|stored| end(stored) <= range.first);
        let touching = runs.get(first..).unwrap_or_default().iter();
        let touching = touching.take_while(|stored| stored.run.first < high);
        parts.extend(touching.filter_map(|stored| part(stored, range.first, high)));
    }
    parts
}

/// The pages that have the same place in both.
fn equal(a: &[StoredRun], b: &[StoredRun]) -> Vec<PageRun> {
    let mut found = Vec::new();
    for one in a {
        for other in within(b, &[one.run]) {
            if other.place.wrapping_sub(one.place) == other.run.first - one.run.first {
                found.push(other.run);
            }
        }
    }
    found
}

/// `runs` without the pages of `holes`.
fn less(runs: &[PageRun], holes: &[PageRun]) -> Vec<PageRun> {
    let mut rest = Vec::new();
    for run in runs {
        let end = run.first + run.count;
        let mut first = run.first;
        let begin = holes.partition_point(|hole| hole.first + hole.count <= first);
        for hole in holes.get(begin..).unwrap_or_default() {
            if hole.first >= end {
                break;
            }
            if first < hole.first {
                rest.push(PageRun { first, count: hole.first - first });
            }
            first = hole.first + hole.count;
        }
        if first < end {
            rest.push(PageRun { first, count: end - first });
        }
    }
    rest
}

/// The pages of `above`, and those of `below` that `above` does not have.
fn overlaid(below: &[StoredRun], above: &[StoredRun]) -> Vec<StoredRun> {
    let taken: Vec<PageRun> = above.iter().map(|stored| stored.run).collect();
    let free: Vec<PageRun> = below.iter().map(|stored| stored.run).collect();
    let mut all = within(below, &less(&free, &taken));
    all.extend_from_slice(above);
    all.sort_unstable_by_key(|stored| stored.run.first);
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel knows of a memory: what is mapped, and for each page which frame it has.
    #[derive(Clone, Debug, Default)]
    struct Memory {
        mapped: BTreeSet<u64>,
        frames: BTreeMap<u64, u64>,
    }

    /// Makes a tree as the restore does. Returns the memories of the owners, and the content of each frame that was made.
    fn carry_out(steps: &[Step], owners: &[Owner]) -> (Vec<Memory>, Vec<u64>) {
        let lineage = Lineage::of(steps);
        let mut inheritance = decide(&lineage, owners);
        let mut memories = vec![Memory::default()];
        let mut contents = Vec::new();
        let content = |space: SpaceId, page: u64| -> u64 {
            let owner = owners.iter().find(|owner| owner.space == space).expect("an owner");
            let one = within(&owner.stored, &[PageRun { first: page, count: 1 }]);
            one.first().expect("a page of the map").place
        };
        for step in steps {
            let Step::Fork { creator, shared, .. } = *step else { continue };
            let maker = lineage.memories[&creator];
            if let Some(bequest) = inheritance.take_bequest(creator) {
                for page in bequest.regions.iter().flat_map(|region| numbers(&region.pages())) {
                    assert!(memories[maker].mapped.insert(page), "{page} was mapped");
                }
                for (space, runs) in &bequest.pages {
                    for page in pages(runs) {
                        assert!(memories[maker].mapped.contains(&page), "{page} is not mapped");
                        memories[maker].frames.insert(page, contents.len() as u64);
                        contents.push(content(*space, page));
                    }
                }
            }
            if shared == 0 {
                memories.push(memories[maker].clone());
            }
        }
        let mut found = Vec::new();
        for owner in owners {
            let memory = &mut memories[lineage.memories[&owner.pid]];
            let whole = Heritage {
                missing: owner.stored.iter().map(|stored| stored.run).collect(),
                ..Heritage::default()
            };
            let heritage = inheritance.heritage(owner.pid).unwrap_or(&whole);
            for (start, end) in &heritage.unmapped {
                for page in start / PAGE..end / PAGE {
                    assert!(memory.mapped.remove(&page), "{page} was not mapped");
                    memory.frames.remove(&page);
                }
            }
            for page in pages(&heritage.stale) {
                memory.frames.remove(&page);
            }
            for mapping in &owner.plain {
                let kept = heritage.kept.contains(&(mapping.start, mapping.end));
                for page in numbers(&mapping.pages()) {
                    assert_eq!(!memory.mapped.insert(page), kept, "{page} of {heritage:?}");
                }
            }
            for page in pages(&heritage.missing) {
                memory.frames.insert(page, contents.len() as u64);
                contents.push(content(owner.space, page));
            }
            found.push(memory.clone());
        }
        (found, contents)
    }

    fn numbers(run: &PageRun) -> std::ops::Range<u64> {
        run.first..run.first + run.count
    }

    fn pages(runs: &[PageRun]) -> impl Iterator<Item = u64> {
        runs.iter().flat_map(numbers)
    }

    /// Every process must have its own pages and no other ones. Returns how many frames they have together.
    fn check(steps: &[Step], owners: &[Owner]) -> usize {
        let (memories, contents) = carry_out(steps, owners);
        let mut used = BTreeSet::new();
        for (owner, memory) in owners.iter().zip(memories) {
            let wanted: BTreeMap<u64, u64> = owner
                .stored
                .iter()
                .flat_map(|stored| {
                    (0..stored.run.count).map(|i| (stored.run.first + i, stored.place + i))
                })
                .collect();
            let found: BTreeMap<u64, u64> = memory
                .frames
                .iter()
                .map(|(page, frame)| (*page, contents[usize::try_from(*frame).expect("small")]))
                .collect();
            assert_eq!(found, wanted, "process {} of {steps:?}, {owners:?}", owner.pid);
            let mapped: BTreeSet<u64> =
                owner.plain.iter().flat_map(|region| numbers(&region.pages())).collect();
            assert_eq!(memory.mapped, mapped, "process {}", owner.pid);
            used.extend(memory.frames.into_values());
        }
        used.len()
    }

    fn fork(creator: i32, pid: i32) -> Step {
        Step::Fork { creator, pid, sibling: false, exit_signal: libc::SIGCHLD, shared: 0 }
    }

    /// A process with mappings (first page, count) and pages (first page, count, place).
    fn owner(pid: i32, mappings: &[(u64, u64)], stored: &[(u64, u64, u64)]) -> Owner {
        let plain = mappings.iter().map(|(first, count)| Region {
            start: first * PAGE,
            end: (first + count) * PAGE,
            kind: Kind::default(),
        });
        let stored = stored.iter().map(|(first, count, place)| StoredRun {
            run: PageRun { first: *first, count: *count },
            place: *place,
        });
        let space = SpaceId(pid.unsigned_abs());
        Owner { pid, space, plain: plain.collect(), stored: stored.collect() }
    }

    /// Memory that is not shared again is needed several times.
    #[test]
    fn what_a_fork_left_in_common_is_there_once() {
        // A parent, three children: one has changed pages, one has unmapped some, one has mapped more; a grandchild.
        let steps = [fork(1, 2), fork(2, 3), fork(2, 4), fork(4, 5), fork(1, 6)];
        let owners = [
            owner(1, &[(500, 10)], &[(500, 10, 9000)]),
            owner(2, &[(100, 50)], &[(100, 50, 1000)]),
            owner(3, &[(100, 50)], &[(100, 10, 1000), (110, 5, 2000), (115, 35, 1015)]),
            owner(4, &[(100, 20), (130, 30)], &[(100, 20, 1000), (130, 20, 1030), (150, 5, 3000)]),
            owner(5, &[(100, 20), (130, 30)], &[(100, 20, 1000), (130, 20, 1030), (150, 5, 3000)]),
            owner(6, &[(500, 12)], &[(500, 3, 9000), (504, 6, 9004), (511, 1, 7)]),
        ];
        assert_eq!(check(&steps, &owners), 50 + 5 + 5 + 10 + 1);
    }

    #[test]
    fn a_parent_that_has_changed_its_pages_does_not_part_its_children() {
        let steps = [fork(1, 2), fork(2, 3), fork(2, 4), fork(2, 5)];
        let owners = [
            owner(1, &[(1, 1)], &[(1, 1, 5)]),
            owner(2, &[(100, 20)], &[(100, 20, 1000)]),
            owner(3, &[(100, 20)], &[(100, 10, 2000), (110, 10, 1010)]),
            owner(4, &[(100, 20)], &[(100, 10, 2000), (110, 10, 1010)]),
            owner(5, &[(100, 20)], &[(100, 10, 2000)]),
        ];
        assert_eq!(check(&steps, &owners), 1 + 10 + 20);
    }

    #[test]
    fn orphans_share_what_their_parent_had() {
        // Init makes helpers, which make the orphans and end.
        let steps = [fork(1, 90), fork(90, 3), fork(1, 91), fork(91, 4)];
        let owners = [
            owner(1, &[(100, 10)], &[(100, 10, 1)]),
            owner(3, &[(105, 20)], &[(105, 20, 1000)]),
            owner(4, &[(105, 20)], &[(105, 19, 1000)]),
        ];
        assert_eq!(check(&steps, &owners), 10 + 20);
    }

    #[test]
    fn of_two_versions_with_one_maker_the_more_frequent_is_shared() {
        let steps = [fork(1, 2), fork(1, 3), fork(1, 4), fork(1, 5), fork(1, 6)];
        let mapped = [(100, 4)];
        let owners = [
            owner(2, &mapped, &[(100, 4, 10)]),
            owner(3, &mapped, &[(100, 4, 10)]),
            owner(4, &mapped, &[(100, 4, 20)]),
            owner(5, &mapped, &[(100, 4, 20)]),
            owner(6, &mapped, &[(100, 4, 20)]),
        ];
        assert_eq!(check(&steps, &owners), 4 + 2 * 4);
    }

    #[test]
    fn memory_of_another_kind_is_not_inherited() {
        let steps = [fork(1, 2)];
        let mut child = owner(2, &[(100, 10)], &[(100, 10, 1000)]);
        for region in &mut child.plain {
            region.kind.no_reserve = true;
        }
        let owners = [owner(1, &[(100, 10)], &[(100, 10, 1000)]), child];
        assert_eq!(check(&steps, &owners), 20);
    }

    struct Draw(u64);

    impl Draw {
        /// Below `end`, by splitmix64.
        fn below(&mut self, end: u64) -> u64 {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut word = self.0;
            word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            (word ^ (word >> 31)) % end
        }
    }

    /// Pages as a page map tells them: neighbours joined now and then.
    fn stored(contents: &BTreeMap<u64, u64>, draw: &mut Draw) -> Vec<StoredRun> {
        let mut runs: Vec<StoredRun> = Vec::new();
        for (page, place) in contents {
            match runs.last_mut() {
                Some(last)
                    if end(last) == *page
                        && last.place + last.run.count == *place
                        && draw.below(4) > 0 =>
                {
                    last.run.count += 1;
                }
                _ => {
                    runs.push(StoredRun { run: PageRun { first: *page, count: 1 }, place: *place })
                }
            }
        }
        runs
    }

    fn mappings(mapped: &BTreeSet<u64>, draw: &mut Draw) -> Vec<Region> {
        let mut regions: Vec<Region> = Vec::new();
        for page in mapped {
            match regions.last_mut() {
                Some(last) if last.end == page * PAGE && draw.below(16) > 0 => last.end += PAGE,
                _ => regions.push(Region {
                    start: page * PAGE,
                    end: (page + 1) * PAGE,
                    kind: Kind { no_reserve: draw.below(8) == 0, file: None },
                }),
            }
        }
        regions
    }

    /// Whatever processes have made of what they inherited, and however they are made again, each gets what it had: here they do
    /// what comes to their minds.
    #[test]
    fn whoever_inherits_what_has_its_own_pages_in_the_end() {
        const PAGES: u64 = 40;
        for seed in 0..3000 {
            let mut draw = Draw(seed);
            let mut lived = vec![Memory::default()];
            let mut fresh = 0;
            let mut steps = Vec::new();
            for _ in 0..draw.below(60) {
                let who = usize::try_from(draw.below(lived.len() as u64)).expect("few");
                let (first, count) = (draw.below(PAGES), 1 + draw.below(12));
                let range = first..first + count;
                match draw.below(6) {
                    0 if lived.len() < 9 => {
                        lived.push(lived[who].clone());
                        // Not always the one that made it then makes it again.
                        let maker = if draw.below(3) == 0 { 0 } else { who };
                        let pid = |index: usize| i32::try_from(index + 1).expect("few");
                        steps.push(fork(pid(maker), pid(lived.len() - 1)));
                    }
                    1 => lived[who].mapped.retain(|page| !range.contains(page)),
                    2 => lived[who].mapped.extend(range),
                    _ => {
                        let Memory { mapped, frames } = &mut lived[who];
                        for page in range.filter(|page| mapped.contains(page)) {
                            fresh += 1;
                            frames.insert(page, fresh);
                        }
                    }
                }
                let Memory { mapped, frames } = &mut lived[who];
                frames.retain(|page, _| mapped.contains(page));
            }
            let owners: Vec<Owner> = (1..)
                .zip(&lived)
                .map(|(pid, memory)| Owner {
                    pid,
                    space: SpaceId(pid.unsigned_abs()),
                    plain: mappings(&memory.mapped, &mut draw),
                    stored: stored(&memory.frames, &mut draw),
                })
                .collect();
            let apart: usize = lived.iter().map(|memory| memory.frames.len()).sum();
            assert!(check(&steps, &owners) <= apart, "seed {seed}");
        }
    }

    fn run(start: u64, end: u64, exact: bool, clean: bool) -> OwnRun {
        OwnRun { start: start * PAGE, end: end * PAGE, exact, clean }
    }

    /// A page that is nobody's would be zeros after a restore, and one that is passed twice refused.
    #[test]
    fn windows_are_divided_without_loss() {
        for seed in 0..2000 {
            let mut draw = Draw(seed);
            let mut parts: BTreeMap<usize, Vec<OwnRun>> = BTreeMap::new();
            let mut seen: Vec<Seen<u64>> = Vec::new();
            let mut wanted = BTreeSet::new();
            let mut cleans = BTreeMap::new();
            for owner in 0..usize::try_from(draw.below(5)).expect("few") {
                let mut next = draw.below(10);
                while next < 60 {
                    let (end, exact) = (next + 1 + draw.below(20), draw.below(3) == 0);
                    let clean = draw.below(2) == 0;
                    for page in next..end {
                        cleans.insert((owner, page), clean);
                        wanted.insert((owner, page, exact));
                        let frame = page * 4 + draw.below(3);
                        if draw.below(4) > 0 {
                            seen.push((page, frame, exact, owner, clean));
                        }
                    }
                    parts.entry(owner).or_default().push(run(next, end, exact, clean));
                    next = end + draw.below(6);
                }
            }
            let frames: BTreeMap<(usize, u64), u64> =
                seen.iter().map(|(page, frame, _, owner, _)| ((*owner, *page), *frame)).collect();
            let mut found = BTreeSet::new();
            let mut ends: BTreeMap<usize, u64> = BTreeMap::new();
            for Piece { run, owners, clean } in divide(parts, seen) {
                for page in run.start / PAGE..run.end / PAGE {
                    // Taken from a base that has it, and from one wherever there is one.
                    let is_clean = |owner: &usize| cleans.get(&(*owner, page)) == Some(&true);
                    assert_eq!(clean.is_some(), owners.iter().any(is_clean), "seed {seed}");
                    assert!(clean.is_none_or(|owner| owners.contains(&owner) && is_clean(&owner)));
                }
                for owner in owners.iter() {
                    assert!(ends.insert(*owner, run.end).is_none_or(|end| end <= run.start));
                    for page in run.start / PAGE..run.end / PAGE {
                        assert!(found.insert((*owner, page, run.exact)), "{owner} {page} twice");
                        let first = owners.first().expect("an owner");
                        assert_eq!(frames.get(&(*owner, page)), frames.get(&(*first, page)));
                    }
                }
            }
            assert_eq!(found, wanted, "seed {seed}");
        }
    }
}
