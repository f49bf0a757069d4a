//! Address spaces and shared memory.
//!
//! | mapping | capsule | restore |
//! |---|---|---|
//! | private anonymous | pages that were written | mapped, filled |
//! | private of a file | pages that the process has of its own | file mapped, own pages filled |
//! | shared of a file | nothing: the content belongs to the file; of one in memory, what is behind its end | file mapped |
//! | shared anonymous, memfd | pages of the object, once | object made anew, filled, mapped |
//! | ring of asynchronous I/O | unread events | its context made anew, and the ring moved there |
//! | vdso and its data | where they were | the new host's own, moved there |
//!
//! Memory is read through `/proc/PID/mem`: `process_vm_readv` pins pages, which makes the kernel copy every page that a
//! forked child still shares with its parent.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ffi::OsStr;
use std::fs::{self, File, FileTimes, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use samara_capsule::pagemap::PAGE_NUMBER_END;
use samara_capsule::record::{
    self, Advice, Alive, Backing, Bytes, Container, FileCheck, FileKind, NamelessExecutable,
    ProcessState, SharedMemoryKind,
};
use samara_capsule::transfer::{
    BATCH_BYTES_MAX, BaseId, PAGE_BYTES, PageBatch, PageRun, Sink, Source, SpaceId,
};
use samara_kernel::pagemap::{Pagemap, Run};
use samara_kernel::proc::Mapping;
use samara_kernel::tape::End;
use samara_kernel::{Pid, file_end, proc, process_vm};

use crate::capture::{CaptureError, Tables, read};
use crate::copy_on_write::{Heritage, Inheritance};
use crate::descriptors::Channel;
use crate::directories;
use crate::files::moment;
use crate::restore::{RestoreError, Tree, is_filled, make, open_checked};
use crate::root::Root;
use crate::tracee::{ARENA_BYTES, Output, Process, Tape, TraceeError};
use crate::tracking::TrackedMemory;
use crate::unsupported::Place;
use crate::{aio, nameless, posix_queues, process, system_v, vdso};

pub(crate) const PAGE: u64 = PAGE_BYTES as u64;
/// The largest pages that there is room for.
pub(crate) const HUGE_PAGE: u64 = 2 << 20;

/// `VmFlags` that a restore brings back, or that follow from what it brings back.
const KNOWN_FLAGS: &[&[u8; 2]] = &[
    b"rd", b"wr", b"ex", b"sh", b"mr", b"mw", b"me", b"ms", b"gd", b"lo", b"lf", b"sr", b"rr",
    b"dc", b"de", b"ac", b"nr", b"sf", b"wf", b"dd", b"sd", b"hg", b"nh", b"mg", b"dw", b"nl",
    b"gu", b"ht", b"sl", b"dp",
    // Tracking of writes: our own, as a process that handles faults itself has a descriptor which is refused.
    b"uw",
];

/// Describes the mappings of a process, and registers the objects that they share.
pub(crate) fn describe(
    pid: Pid,
    mappings: &[Mapping],
    tables: &mut Tables<'_>,
) -> Result<Vec<record::Mapping>, CaptureError> {
    let mut records = Vec::new();
    vdso::check(pid, mappings, tables);
    for mapping in mappings {
        if mapping.name == "[vsyscall]" {
            continue;
        }
        let protection = vdso::protection(mapping);
        let backing = match vdso::is_part(mapping) {
            true => vdso::describe(pid, mapping, tables)?,
            false => backing(pid, mapping, tables)?,
        };
        let backing = match backing {
            Ok(backing) => backing,
            Err(what) => {
                tables.refuse(pid, Place::Mapping(mapping.start), what);
                continue;
            }
        };
        records.push(record::Mapping {
            start: mapping.start,
            end: mapping.end,
            protection,
            backing,
            advice: advice(mapping),
            guards: Vec::new(),
            name: Bytes::from(given_name(mapping).to_vec()),
            memory_policy: None,
            behind_end: Bytes::new(),
        });
    }
    Ok(records)
}

/// What `PR_SET_VMA_ANON_NAME` called a mapping: `[anon:name]`, `[anon_shmem:name]`.
fn given_name(mapping: &Mapping) -> &[u8] {
    let name = mapping.name.as_bytes();
    name.strip_prefix(b"[anon:")
        .or_else(|| name.strip_prefix(b"[anon_shmem:"))
        .and_then(|name| name.strip_suffix(b"]"))
        .unwrap_or_default()
}

/// Reads what lies behind the ends of shared files in memory. They are opened, which nobody's lease may forbid.
pub(crate) fn read_behind_ends(
    pid: Pid,
    mappings: &mut [record::Mapping],
    tables: &Tables<'_>,
) -> Result<(), CaptureError> {
    for mapping in mappings {
        mapping.behind_end = behind_end(pid, mapping, tables)?;
    }
    Ok(())
}

/// What lies behind the end of a shared file in memory, in its last page. Only mappings see it, and on tmpfs it stays: a program
/// may have a file that is too short for what it keeps there, and never notice. Files on disks get zeros there when they are
/// written back.
fn behind_end(
    pid: Pid,
    mapping: &record::Mapping,
    tables: &Tables<'_>,
) -> Result<Bytes, CaptureError> {
    let (offset, bytes) = match mapping.backing {
        Backing::SharedFile { offset, check, .. } => (offset, Some(check.bytes)),
        Backing::SharedUnlinked { offset, file, .. } => {
            (offset, tables.unlinked.get(file as usize).map(|file| file.bytes))
        }
        Backing::Shared { offset, memory, .. } => {
            (offset, tables.shared_memory.get(memory as usize).map(|memory| memory.bytes))
        }
        _ => return Ok(Bytes::new()),
    };
    let bytes = bytes.expect("the object was registered with its mapping");
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
    let what = || read(link.as_str());
    let last_page = bytes / PAGE * PAGE;
    let is_mapped = (offset..offset + (mapping.end - mapping.start)).contains(&last_page);
    if bytes == last_page || !is_mapped {
        return Ok(Bytes::new());
    }
    // Looking at it is no access of the program.
    let mut options = File::options();
    let file = options.read(true).custom_flags(libc::O_NOATIME).open(&link).map_err(what())?;
    if !directories::is_tmpfs(&file).map_err(what())? {
        return Ok(Bytes::new());
    }
    // What nobody has touched is not to be made by looking at it.
    match lseek(&file, last_page.cast_signed(), Whence::SeekData) {
        Ok(_) => {}
        Err(Errno::ENXIO) => return Ok(Bytes::new()),
        Err(error) => return Err(what()(error.into())),
    }
    let mut behind = file_end::read_behind(file.as_fd(), bytes).map_err(what())?;
    behind.truncate(behind.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
    Ok(Bytes::from(behind))
}

fn advice(mapping: &Mapping) -> Advice {
    Advice {
        no_reserve: mapping.has_flag(b"nr"),
        dont_fork: mapping.has_flag(b"dc"),
        dont_dump: mapping.has_flag(b"dd"),
        wipe_on_fork: mapping.has_flag(b"wf"),
        huge_page: mapping.has_flag(b"hg"),
        no_huge_page: mapping.has_flag(b"nh"),
        mergeable: mapping.has_flag(b"mg"),
        sequential: mapping.has_flag(b"sr"),
        random: mapping.has_flag(b"rr"),
        locked: mapping.has_flag(b"lo"),
        locked_on_fault: mapping.has_flag(b"lf"),
        sync_faults: mapping.has_flag(b"sf"),
        sealed: mapping.has_flag(b"sl"),
    }
}

/// What is behind a mapping, or why it can't be saved.
fn backing(
    pid: Pid,
    mapping: &Mapping,
    tables: &mut Tables<'_>,
) -> Result<Result<Backing, String>, CaptureError> {
    let refuse = |what: String| Ok(Err(what));
    if let Some(flag) = mapping.flags.iter().find(|flag| !KNOWN_FLAGS.contains(flag)) {
        let flag = String::from_utf8_lossy(flag.as_slice()).into_owned();
        return refuse(format!("memory with the property `{flag}` of VmFlags is not supported"));
    }
    // Memory that can only be executed gets a key from the kernel.
    if mapping.protection_key != 0 && (mapping.read || mapping.write) {
        return refuse("memory with a protection key is not supported".to_owned());
    }
    let name = mapping.name.as_bytes();
    let anonymous = mapping.inode == 0 && (name.is_empty() || name.starts_with(b"["));
    if anonymous && !mapping.shared {
        return Ok(Ok(Backing::Anonymous {
            grows_down: mapping.has_flag(b"gd"),
            huge_page_bytes: None,
            droppable: mapping.has_flag(b"dp"),
        }));
    }
    if name.starts_with(b"anon_inode:")
        || name.starts_with(b"/anon_inode:")
        || name.starts_with(b"socket:")
    {
        return refuse(format!("a mapping of {} is not supported", mapping.name.display()));
    }
    if name.starts_with(b"/secretmem") {
        return refuse("secret memory (memfd_secret) is not supported".to_owned());
    }
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
    if name.starts_with(b"/SYSV") {
        let (offset, may_write) = (mapping.offset, mapping.has_flag(b"mw"));
        let segment = system_v::segment(tables, mapping.inode, &link)?;
        return Ok(segment.map(|segment| Backing::SystemV { segment, offset, may_write }));
    }
    // The kernel shows the same device and number of an inode for all mappings of a file, while it stands.
    let file = (mapping.device, mapping.inode, mapping.name.clone());
    let metadata = match tables.behind_mappings.get(&file) {
        Some(metadata) => metadata.clone(),
        None => {
            let metadata = fs::metadata(&link).map_err(read(link.as_str()))?;
            tables.behind_mappings.entry(file).or_insert(metadata).clone()
        }
    };
    let identity = (metadata.dev(), metadata.ino());
    let may_write = mapping.has_flag(b"mw");
    let offset = mapping.offset;
    if name.starts_with(aio::MAPPING) && metadata.mode() & libc::S_IFMT == 0 {
        // What is in it is asked for later.
        let unread = Bytes::new();
        return Ok(Ok(Backing::AsynchronousIo { events: 0, head: 0, tail: 0, unread }));
    }
    let huge = name.starts_with(b"/anon_hugepage");
    if huge && !mapping.shared {
        let file = File::open(&link).map_err(read(link.as_str()))?;
        let huge_page_bytes = huge_page_bytes(&file).map_err(read(link.as_str()))?;
        if huge_page_bytes.is_some_and(|bytes| bytes > HUGE_PAGE) {
            return refuse("huge pages of more than 2 MiB are not supported".to_owned());
        }
        return Ok(Ok(Backing::Anonymous { grows_down: false, huge_page_bytes, droppable: false }));
    }
    let nameless = name == b"/dev/zero (deleted)" || name.starts_with(b"[anon_shmem:") || huge;
    if name.starts_with(b"/memfd:") || nameless {
        // The link has the name as it is, where the list of mappings writes a line feed as four characters.
        let link_name = fs::read_link(&link).map_err(read(link.as_str()))?;
        let memfd = link_name
            .as_os_str()
            .as_bytes()
            .strip_prefix(b"/memfd:")
            .map(|name| name.strip_suffix(b" (deleted)").unwrap_or(name));
        let memory = tables.shared_memory(identity, &link, memfd)?;
        if tables
            .shared_memory
            .get(memory as usize)
            .is_some_and(|memory| memory.huge_page_bytes.is_some_and(|bytes| bytes > HUGE_PAGE))
        {
            return refuse("huge pages of more than 2 MiB are not supported".to_owned());
        }
        return Ok(Ok(if mapping.shared {
            Backing::Shared { memory, offset, may_write }
        } else {
            Backing::PrivateMemory { memory, offset }
        }));
    }
    if mapping.has_flag(b"ht") {
        let path = String::from_utf8_lossy(name).into_owned();
        return refuse(format!("the file {path} of huge pages is not supported"));
    }
    tables.mapped_files.insert(identity);
    if mapping.shared && may_write {
        tables.mapped_for_writing.0.insert(moment::identity(&metadata));
    }
    if metadata.nlink() == 0 {
        if !metadata.is_file() {
            let path = mapping.name.to_string_lossy();
            return refuse(format!("the mapped device {path} is not supported"));
        }
        let path = fs::read_link(&link)
            .map_err(|source| CaptureError::Read { what: link.clone(), source })?;
        let file = tables.unlinked(identity, &link, &path, &metadata)?;
        return Ok(Ok(if mapping.shared {
            Backing::SharedUnlinked { file, offset, may_write }
        } else {
            Backing::PrivateUnlinked { file, offset }
        }));
    }
    let path = proc::unescape(Path::new(&mapping.name));
    let path = path.as_os_str().as_bytes();
    // glibc's semaphores are linked to their names after they were mapped.
    let open_as = path.strip_suffix(b" (deleted)").unwrap_or(path);
    let Some(path) = tables.path_of(identity, path)? else {
        let path = String::from_utf8_lossy(open_as).into_owned();
        return refuse(format!("the mapped file {path} has no name in the container"));
    };
    let check = FileCheck { bytes: metadata.size() };
    Ok(Ok(if mapping.shared {
        Backing::SharedFile { path, offset, may_write, check }
    } else {
        Backing::PrivateFile { path, offset, check }
    }))
}

/// Flags of `mlockall` that hold for mappings to come, told by the one that the engine has just made. `before` is what was
/// known of the process before that.
pub(crate) fn lock_future(process: &Process, before: &proc::Status) -> Result<u32, CaptureError> {
    const MCL_FUTURE: u32 = 2;
    const MCL_ONFAULT: u32 = 4;
    let pid = process.pid;
    let now = proc::status(pid).map_err(read(format!("process {pid} in /proc")))?;
    let Some(arena) = process.arena else { return Ok(0) };
    if now.vmlck <= before.vmlck {
        return Ok(0);
    }
    // Locked at once, all pages are there; else the last one has not been needed yet.
    let end = arena + ARENA_BYTES;
    let pagemap = Pagemap::open(pid).map_err(read(format!("/proc/{pid}/pagemap")))?;
    let there = pagemap.populated(end - PAGE, end).map_err(read(format!("/proc/{pid}/pagemap")))?;
    Ok(if there.is_empty() { MCL_FUTURE | MCL_ONFAULT } else { MCL_FUTURE })
}

/// Asks for the memory policies of mappings: where mode and nodes of each will be.
pub(crate) fn ask_policies(tape: &mut Tape, mappings: &[record::Mapping]) -> Vec<(Output, Output)> {
    const MPOL_F_ADDR: u64 = 2;
    let ask = |mapping: &record::Mapping| {
        let (mode, nodes) = (tape.output(8), tape.output(process::NODE_WORDS * 8));
        let arguments =
            [mode.address, nodes.address, process::NODES_MAX, mapping.start, MPOL_F_ADDR, 0];
        // A kernel without NUMA has no such call.
        tape.try_call("ask for a memory policy", libc::SYS_get_mempolicy, arguments);
        (mode, nodes)
    };
    mappings.iter().map(ask).collect()
}

/// Takes the answers to [`ask_policies`].
pub(crate) fn set_policies(
    process: &Process,
    mappings: &mut [record::Mapping],
    policies: Vec<(Output, Output)>,
) -> Result<(), TraceeError> {
    for (mapping, (mode, nodes)) in mappings.iter_mut().zip(policies) {
        let [mode] = process::words(&process.output(mode)?);
        if let Ok(mode) = u32::try_from(mode)
            && mode != 0
        {
            let nodes: [u64; process::NODE_WORDS] = process::words(&process.output(nodes)?);
            mapping.memory_policy = Some((mode, nodes.to_vec()));
        }
    }
    Ok(())
}

/// Pages that a capsule has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Copied {
    /// Whose content was copied.
    pub(crate) pages: u64,
    /// That are as they were.
    pub(crate) unchanged: u64,
}

/// Collects page runs into batches.
pub(crate) struct Batcher<'a> {
    sink: &'a mut dyn Sink,
    spaces: Arc<[SpaceId]>,
    runs: Vec<PageRun>,
    bytes: Vec<u8>,
    exact: bool,
    pub(crate) pages: u64,
    pub(crate) unchanged: u64,
}

impl<'a> Batcher<'a> {
    pub(crate) fn new(sink: &'a mut dyn Sink) -> Batcher<'a> {
        let bytes = sink.buffer();
        Batcher {
            sink,
            spaces: [].into(),
            runs: Vec::new(),
            bytes,
            exact: false,
            pages: 0,
            unchanged: 0,
        }
    }

    /// Adds the pages of `start..end`, which all of `spaces` have, and whose content `read` supplies: it is given an address and
    /// a buffer to fill.
    ///
    /// `exact`: pages of zeros count too.
    pub(crate) fn add(
        &mut self,
        spaces: &Arc<[SpaceId]>,
        start: u64,
        end: u64,
        exact: bool,
        read: &dyn Fn(u64, &mut [u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        if exact != self.exact || *spaces != self.spaces {
            self.flush()?;
            self.exact = exact;
            self.spaces = spaces.clone();
        }
        let mut next = start;
        while next < end {
            let room = (BATCH_BYTES_MAX - self.bytes.len()) as u64;
            let bytes = (end - next).min(room);
            let from = self.bytes.len();
            self.bytes.resize(from + usize::try_from(bytes).expect("at most a batch"), 0);
            read(next, self.bytes.get_mut(from..).expect("just resized"))?;
            self.runs.push(PageRun { first: next / PAGE, count: bytes / PAGE });
            self.pages += bytes / PAGE;
            next += bytes;
            if self.bytes.len() == BATCH_BYTES_MAX {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Adds the pages of a run as `base` has them.
    pub(crate) fn unchanged(
        &mut self,
        spaces: &Arc<[SpaceId]>,
        base: BaseId,
        run: OwnRun,
    ) -> io::Result<()> {
        let pages = PageRun { first: run.start / PAGE, count: (run.end - run.start) / PAGE };
        self.unchanged += pages.count;
        self.sink.unchanged(spaces, base, pages, run.exact)
    }

    /// As [`Batcher::unchanged`], for pages that `base` is going to have; they have changed.
    pub(crate) fn unchanged_later(
        &mut self,
        spaces: &Arc<[SpaceId]>,
        base: BaseId,
        run: OwnRun,
    ) -> io::Result<()> {
        let pages = PageRun { first: run.start / PAGE, count: (run.end - run.start) / PAGE };
        self.sink.unchanged(spaces, base, pages, run.exact)
    }

    /// A base that has nothing.
    pub(crate) fn new_base(&mut self) -> io::Result<BaseId> {
        self.sink.base(None)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.runs.is_empty() {
            return Ok(());
        }
        let bytes = std::mem::replace(&mut self.bytes, self.sink.buffer());
        let (spaces, runs) = (self.spaces.clone(), std::mem::take(&mut self.runs));
        let batch = PageBatch { spaces, runs, bytes };
        if self.exact { self.sink.exact_pages(batch) } else { self.sink.pages(batch) }
    }

    /// How many pages there were, and how many of them with their content.
    pub(crate) fn finish(mut self) -> io::Result<Copied> {
        self.flush()?;
        Ok(Copied { pages: self.pages, unchanged: self.unchanged })
    }
}

/// Pages that a process has of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OwnRun {
    pub(crate) start: u64,
    pub(crate) end: u64,
    /// Pages of zeros count too.
    pub(crate) exact: bool,
    /// The content is in the base of the process's memory.
    pub(crate) clean: bool,
}

/// Goes through the private memory of a stopped process in ascending order, and fills in the guard ranges of its records.
pub(crate) struct PrivateMemory<'a> {
    pub(crate) pid: Pid,
    memory: &'a File,
    pub(crate) space: SpaceId,
    pub(crate) pagemap: Pagemap,
    tracked: Option<&'a mut TrackedMemory>,
    /// What a fork does not have: start and end.
    unforked: Vec<(u64, u64)>,
    mappings: std::slice::IterMut<'a, record::Mapping>,
    /// The mapping that is looked at, and the address up to which that is done.
    current: Option<(&'a mut record::Mapping, u64)>,
    found: VecDeque<OwnRun>,
}

impl<'a> PrivateMemory<'a> {
    pub(crate) fn of(
        process: &'a Process,
        alive: &'a mut Alive,
        mut tracked: Option<&'a mut TrackedMemory>,
    ) -> Result<PrivateMemory<'a>, CaptureError> {
        let pid = process.pid;
        let pagemap = Pagemap::open(pid).map_err(read(format!("/proc/{pid}/pagemap")))?;
        let space = SpaceId(alive.space);
        // Pages of hugetlbfs may be taken away from a fork.
        let is_unforked = |mapping: &&record::Mapping| {
            let huge =
                matches!(mapping.backing, Backing::Anonymous { huge_page_bytes: Some(_), .. });
            mapping.advice.dont_fork || mapping.advice.wipe_on_fork || huge
        };
        let unforked = alive.mappings.iter().filter(is_unforked);
        let unforked = unforked.map(|mapping| (mapping.start, mapping.end)).collect();
        let (mappings, found) = (alive.mappings.iter_mut(), VecDeque::new());
        let memory = &process.memory;
        if let Some(tracked) = &mut tracked {
            tracked.set_space(space);
        }
        let current = None;
        Ok(PrivateMemory {
            pid,
            memory,
            space,
            pagemap,
            tracked,
            unforked,
            mappings,
            current,
            found,
        })
    }

    /// Whether a fork of the process has these pages too.
    pub(crate) fn is_forked(&self, run: &OwnRun) -> bool {
        let next = self.unforked.partition_point(|(_, end)| *end <= run.start);
        self.unforked.get(next).is_none_or(|(start, _)| *start >= run.end)
    }

    /// Where clean pages are; none where nothing is tracked.
    pub(crate) fn base(&mut self, sink: &mut dyn Sink) -> Result<Option<BaseId>, CaptureError> {
        let Some(tracked) = &mut self.tracked else { return Ok(None) };
        let base = tracked.base(sink)?;
        sink.earlier(self.space, base);
        Ok(Some(base))
    }

    /// Where the next run begins.
    pub(crate) fn peek(&mut self) -> Result<Option<u64>, CaptureError> {
        while self.found.is_empty() {
            if self.current.is_none() {
                let Some(mapping) = self.mappings.next() else { return Ok(None) };
                let start = mapping.start;
                self.current = Some((mapping, start));
            }
            self.look()?;
        }
        Ok(self.found.front().map(|run| run.start))
    }

    /// The rest of what lies below `end`.
    pub(crate) fn take_below(&mut self, end: u64) -> Result<Vec<OwnRun>, CaptureError> {
        let mut taken = Vec::new();
        while self.peek()?.is_some_and(|start| start < end)
            && let Some(run) = self.found.pop_front()
        {
            if run.end > end {
                self.found.push_front(OwnRun { start: end, ..run });
            }
            taken.push(OwnRun { end: run.end.min(end), ..run });
        }
        Ok(taken)
    }

    /// Looks at a further part of the current mapping.
    fn look(&mut self) -> Result<(), CaptureError> {
        const RUNS_AT_ONCE: usize = 512;
        /// What of a mapping belongs to the process, beside its guard pages.
        enum Own {
            All,
            Changed,
            Nothing,
        }
        let Some((mapping, next)) = self.current.take() else { return Ok(()) };
        let own = match mapping.backing {
            // The kernel may drop it at any time, and whoever keeps secrets of its randomness there relies on never using them twice.
            Backing::Anonymous { droppable: true, .. } => Own::Nothing,
            Backing::Anonymous { droppable: false, .. } => Own::All,
            Backing::PrivateFile { .. }
            | Backing::PrivateUnlinked { .. }
            | Backing::PrivateMemory { .. } => Own::Changed,
            Backing::SharedFile { .. }
            | Backing::SharedUnlinked { .. }
            | Backing::Shared { .. }
            | Backing::SystemV { .. }
            | Backing::AsynchronousIo { .. }
            | Backing::InheritedRing { .. } => Own::Nothing,
            Backing::Vdso { .. } => return Ok(()),
        };
        let what = || read(format!("/proc/{}/pagemap", self.pid));
        let is_tracked = matches!(
            mapping.backing,
            Backing::Anonymous { huge_page_bytes: None, .. }
                | Backing::PrivateFile { .. }
                | Backing::PrivateUnlinked { .. }
        );
        let tracked = match (&mut self.tracked, &own) {
            (Some(tracked), Own::All | Own::Changed) if is_tracked => {
                let of_file = matches!(own, Own::Changed);
                tracked
                    .scan(&self.pagemap, (mapping.start, mapping.end), next, RUNS_AT_ONCE, of_file)
                    .map_err(what())?
            }
            _ => None,
        };
        let (runs, next) = match tracked {
            Some(found) => found,
            None => self.pagemap.populated_some(next, mapping.end, RUNS_AT_ONCE).map_err(what())?,
        };
        for run in runs {
            if run.guard {
                match mapping.guards.last_mut() {
                    Some((_, end)) if *end == run.start => *end = run.end,
                    _ => mapping.guards.push((run.start, run.end)),
                }
                continue;
            }
            let exact = match own {
                Own::All => Some(false),
                Own::Changed => (!run.file).then_some(true),
                Own::Nothing => None,
            };
            if let Some(exact) = exact {
                let Run { start, end, clean, .. } = run;
                self.found.push_back(OwnRun { start, end, exact, clean });
            }
        }
        if next < mapping.end {
            self.current = Some((mapping, next));
        }
        Ok(())
    }

    /// Copies pages that all of `spaces` have.
    pub(crate) fn copy(
        &self,
        run: OwnRun,
        spaces: &Arc<[SpaceId]>,
        batcher: &mut Batcher<'_>,
    ) -> Result<(), CaptureError> {
        let OwnRun { start, end, exact, .. } = run;
        batcher
            .add(spaces, start, end, exact, &|address, buffer| {
                self.memory.read_exact_at(buffer, address)
            })
            .map_err(|source| CaptureError::Pages { pid: self.pid, start, end, source })
    }
}

/// Copies the data of a file, leaving out its holes.
pub(crate) fn copy_file(
    file: &File,
    space: SpaceId,
    bytes: u64,
    sink: &mut dyn Sink,
) -> Result<u64, CaptureError> {
    let failed =
        |source| CaptureError::Read { what: "a shared or unlinked file".to_owned(), source };
    let spaces = [space].into();
    let mut batcher = Batcher::new(sink);
    let mut next = 0u64;
    while next < bytes {
        let at = i64::try_from(next).map_err(|_| failed(io::ErrorKind::FileTooLarge.into()))?;
        let data = match lseek(file, at, Whence::SeekData) {
            Ok(data) => data.unsigned_abs(),
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(failed(error.into())),
        };
        let hole = lseek(file, data.cast_signed(), Whence::SeekHole)
            .map_err(|error| failed(error.into()))?;
        let (start, end) =
            (data / PAGE * PAGE, hole.unsigned_abs().min(bytes).next_multiple_of(PAGE));
        let start = start.max(next.next_multiple_of(PAGE));
        if start < end {
            batcher
                .add(&spaces, start, end, false, &|address, buffer| {
                    read_padded(file, buffer, address)
                })
                .map_err(|source| CaptureError::Sink { source })?;
        }
        next = end.max(next + 1);
    }
    let copied = batcher.finish().map_err(|source| CaptureError::Sink { source })?;
    Ok(copied.pages)
}

/// As [`copy_file`], without moving the position that the description has.
pub(crate) fn copy_whole_file(
    file: &File,
    space: SpaceId,
    bytes: u64,
    sink: &mut dyn Sink,
) -> Result<u64, CaptureError> {
    let mut batcher = Batcher::new(sink);
    batcher
        .add(&[space].into(), 0, bytes.next_multiple_of(PAGE), false, &|address, buffer| {
            read_padded(file, buffer, address)
        })
        .map_err(|source| CaptureError::Sink { source })?;
    let copied = batcher.finish().map_err(|source| CaptureError::Sink { source })?;
    Ok(copied.pages)
}

/// Reads from a file; what lies behind its end is zeros.
fn read_padded(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + filled as u64) {
            Ok(0) => {
                rest.fill(0);
                break;
            }
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Refuses mappings that no kernel could have made, before anything is built from them.
pub(crate) fn check(alive: &Alive) -> Result<(), RestoreError> {
    let mut end = 0;
    for mapping in &alive.mappings {
        let aligned = mapping.start % PAGE == 0 && mapping.end % PAGE == 0;
        if !aligned || mapping.start < end || mapping.end <= mapping.start {
            return Err(RestoreError::Damaged(format!(
                "a mapping at {:#x} is out of order",
                mapping.start
            )));
        }
        end = mapping.end;
    }
    Ok(())
}

/// Whether the host has the huge pages that are needed.
pub(crate) fn check_huge_pages(container: &Container) -> Result<(), RestoreError> {
    let mut needed: BTreeMap<u64, u64> = BTreeMap::new();
    let mut need = |size: Option<u64>, bytes: u64| {
        if let Some(size) = size {
            let pages = needed.entry(size).or_default();
            *pages = pages.saturating_add(bytes.div_ceil(size.max(1)));
        }
    };
    for process in &container.processes {
        let ProcessState::Alive(alive) = &process.state else { continue };
        for mapping in &alive.mappings {
            if let Backing::Anonymous { huge_page_bytes, .. } = mapping.backing
                && !mapping.advice.no_reserve
            {
                need(huge_page_bytes, mapping.end - mapping.start);
            }
        }
    }
    for memory in &container.shared_memory {
        need(memory.huge_page_bytes, memory.bytes);
    }
    for segment in &container.system_v.segments {
        need(segment.huge_page_bytes, segment.bytes);
    }
    for (size, pages) in needed {
        let kib = size >> 10;
        let path = format!("/sys/kernel/mm/hugepages/hugepages-{kib}kB/free_hugepages");
        let text = fs::read_to_string(path).unwrap_or_default();
        let free: u64 = text.trim().parse().unwrap_or(0);
        if free < pages {
            return Err(RestoreError::Incompatible(format!(
                "{pages} huge pages of {kib} KiB are needed, {free} are free"
            )));
        }
    }
    Ok(())
}

/// Objects that mappings and descriptors share, made anew and filled; held by the engine until all have them.
#[derive(Debug, Default)]
pub(crate) struct Shared {
    pub(crate) memory: Vec<File>,
    pub(crate) unlinked: Vec<File>,
    pub(crate) queues: posix_queues::Made,
    /// Segments of System V have no files: they are attached by their ids.
    segments: Vec<record::Segment>,
    /// Room in every process for mappings that are made for a moment.
    workspace: u64,
    pub(crate) directories: Vec<File>,
}

impl Shared {
    /// Keeps what somebody runs as a handle only: a file that is open to be written is no program.
    ///
    /// A memfd gets its seals before that, because a handle can't be sealed. They forbid nothing that is still to come: nobody
    /// has mapped a program to be written.
    fn stop_writing_programs(&mut self, container: &Container) -> Result<(), RestoreError> {
        let mut programs: Vec<NamelessExecutable> = Vec::new();
        for program in self::programs(container) {
            if !programs.contains(&program) {
                programs.push(program);
            }
        }
        for program in programs {
            let file = match program {
                NamelessExecutable::Unlinked { file } => self.unlinked.get_mut(file as usize),
                NamelessExecutable::SharedMemory { memory } => {
                    let file = self.memory.get_mut(memory as usize);
                    let record = container.shared_memory.get(memory as usize);
                    if let (Some(file), Some(record)) = (&file, record) {
                        add_seals(file, record)?;
                    }
                    file
                }
            };
            if let Some(file) = file {
                *file =
                    Shared::reopen(file, libc::O_PATH).map_err(make("the file of a program"))?;
            }
        }
        Ok(())
    }

    /// Keeps what somebody is to have a lease for writing on as a handle only: whoever has such a lease must be the only one that
    /// has the file open.
    pub(crate) fn let_go_of_leased(&mut self, container: &Container) -> Result<(), RestoreError> {
        for record in &container.files {
            let FileKind::Unlinked { file, .. } = record.kind else { continue };
            let file = self.unlinked.get_mut(file as usize);
            if let Some(file) = file.filter(|_| record.notices.lease.is_some()) {
                *file = Shared::reopen(file, libc::O_PATH).map_err(make("a leased file"))?;
            }
        }
        Ok(())
    }

    /// Opens an object once more, with a description and flags of its own.
    pub(crate) fn reopen(file: &File, flags: i32) -> io::Result<File> {
        use nix::fcntl::{OFlag, open};
        use nix::sys::stat::Mode;
        use std::os::fd::AsRawFd;
        // The link in /proc is one that has to be followed.
        let flags = flags & !libc::O_NOFOLLOW | libc::O_CLOEXEC;
        let link = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok(open(link.as_str(), OFlag::from_bits_retain(flags), Mode::empty())?.into())
    }
}

/// Makes shared memory and files without names, with their content.
pub(crate) fn make_shared(
    tree: &mut Tree,
    container: &Container,
    root: &Root,
    source: &dyn Source,
) -> Result<Shared, RestoreError> {
    let mut shared = Shared {
        segments: container.system_v.segments.clone(),
        workspace: tree.workspace(),
        queues: posix_queues::restore(tree.process(1)?.pid, container)?,
        ..Shared::default()
    };
    for memory in &container.shared_memory {
        shared.memory.push(make_memory(tree, memory, source)?);
    }
    for (number, unlinked) in (0u32..).zip(&container.unlinked_files) {
        let file = make_unlinked(root, unlinked, number)?;
        let space = SpaceId(unlinked.space);
        let length = unlinked.bytes;
        source
            .transfer(&[space], &|_, runs, bytes| {
                each_run(runs, bytes, &mut |offset, bytes| {
                    let room = usize::try_from(length.saturating_sub(offset)).unwrap_or(usize::MAX);
                    file.write_all_at(
                        bytes.get(..room.min(bytes.len())).unwrap_or_default(),
                        offset,
                    )
                })
            })
            .map_err(|source| RestoreError::Fill { source })?;
        set_attributes(&file, &unlinked.attributes)
            .map_err(make("the attributes of an unlinked file"))?;
        let accessed_ns = unlinked.accessed_ns.unwrap_or(unlinked.modified_ns);
        set_times(&file, accessed_ns, unlinked.modified_ns)
            .map_err(make("the times of an unlinked file"))?;
        shared.unlinked.push(file);
    }
    shared.stop_writing_programs(container)?;
    shared.directories = directories::make_unlinked(container, root)?;
    Ok(shared)
}

fn set_times(file: &File, accessed_ns: i64, modified_ns: i64) -> io::Result<()> {
    use nix::sys::stat::futimens;
    use nix::sys::time::{TimeSpec, TimeValLike};
    let [accessed, modified] = [accessed_ns, modified_ns].map(TimeSpec::nanoseconds);
    Ok(futimens(file, &accessed, &modified)?)
}

fn set_attributes(file: &File, attributes: &[(record::Bytes, record::Bytes)]) -> io::Result<()> {
    for (name, value) in attributes {
        rustix::fs::fsetxattr(file, name.as_slice(), value, rustix::fs::XattrFlags::empty())?;
    }
    Ok(())
}

/// Makes one shared memory object. It is filled through a mapping in the container's init, so that its pages are charged there.
fn make_memory(
    tree: &mut Tree,
    record: &record::SharedMemory,
    source: &dyn Source,
) -> Result<File, RestoreError> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    const RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
    const SHARED: u64 = (libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE) as u64;
    const ANONYMOUS: u64 = libc::MAP_ANONYMOUS as u64;
    let what = || make("shared memory");
    let place = tree.workspace();
    let page = record.huge_page_bytes.unwrap_or(PAGE);
    let huge = match record.huge_page_bytes {
        None => 0,
        Some(bytes) => huge_page_flags(bytes)?,
    };
    let bytes = record.bytes.next_multiple_of(page);
    let memfd = match &record.kind {
        SharedMemoryKind::Anonymous => None,
        SharedMemoryKind::Memfd { name, mode, owner, .. } => {
            let name = std::ffi::CString::new(name.to_vec())
                .map_err(|_| RestoreError::Damaged("a memfd's name has a zero byte".to_owned()))?;
            let mut flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
            if huge != 0 {
                let size = u32::try_from(huge).expect("flags have 32 bits");
                flags |= MFdFlags::MFD_HUGETLB | MFdFlags::from_bits_retain(size);
            }
            let file = File::from(
                memfd_create(name.as_c_str(), flags).map_err(io::Error::from).map_err(what())?,
            );
            file.set_len(record.bytes).map_err(what())?;
            std::os::unix::fs::fchown(&file, Some(owner.0), Some(owner.1)).map_err(what())?;
            let mode = std::os::unix::fs::PermissionsExt::from_mode(*mode);
            file.set_permissions(mode).map_err(what())?;
            Some(file)
        }
    };
    if bytes == 0 {
        return memfd
            .ok_or_else(|| RestoreError::Damaged("anonymous shared memory of no size".to_owned()));
    }
    let numbers = match &memfd {
        Some(file) => tree.send(1, &[file.as_fd()])?,
        None => Vec::new(),
    };
    let init = tree.process(1)?;
    let mut tape = init.tape()?;
    match numbers.first() {
        Some(fd) => {
            let fd = u64::from(fd.unsigned_abs());
            tape.call("map shared memory", libc::SYS_mmap, [place, bytes, RW, SHARED, fd, 0]);
            tape.call("close shared memory", libc::SYS_close, [fd, 0, 0, 0, 0, 0]);
        }
        None => {
            const HUGE: u64 = libc::MAP_HUGETLB as u64;
            let size = if huge == 0 { 0 } else { HUGE | huge };
            let arguments = [place, bytes, RW, SHARED | ANONYMOUS | size, u64::MAX, 0];
            tape.call("map shared memory", libc::SYS_mmap, arguments);
        }
    }
    init.run_all(0, &tape, End::Breakpoint)?;
    let pid = init.pid;
    let file = match memfd {
        Some(file) => file,
        None => File::options()
            .read(true)
            .write(true)
            .open(format!("/proc/{pid}/map_files/{place:x}-{:x}", place + bytes))
            .map_err(what())?,
    };
    source
        .transfer(&[SpaceId(record.space)], &|_, runs, bytes| write_runs(pid, place, runs, bytes))
        .map_err(|source| RestoreError::Fill { source })?;
    let init = tree.process(1)?;
    let mut tape = init.tape()?;
    tape.call("unmap shared memory", libc::SYS_munmap, [place, bytes, 0, 0, 0, 0]);
    init.run_all(0, &tape, End::Breakpoint)?;
    Ok(file)
}

/// Seals memfds, once everybody has mapped them: a seal may forbid what was mapped before it. Those that are programs have been
/// sealed by [`Shared::stop_writing_programs`].
pub(crate) fn seal(shared: &Shared, container: &Container) -> Result<(), RestoreError> {
    let sealed: BTreeSet<u32> = programs(container)
        .filter_map(|program| match program {
            NamelessExecutable::SharedMemory { memory } => Some(memory),
            NamelessExecutable::Unlinked { .. } => None,
        })
        .collect();
    for (number, (record, file)) in (0u32..).zip(container.shared_memory.iter().zip(&shared.memory))
    {
        if !sealed.contains(&number) {
            add_seals(file, record)?;
        }
    }
    Ok(())
}

fn add_seals(file: &File, record: &record::SharedMemory) -> Result<(), RestoreError> {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    let SharedMemoryKind::Memfd { seals, .. } = record.kind else { return Ok(()) };
    fcntl(file, FcntlArg::F_ADD_SEALS(SealFlag::from_bits_retain(seals)))
        .map(|_| ())
        .map_err(io::Error::from)
        .map_err(make("the seals of shared memory"))
}

/// What processes run that has no name; what several run comes several times.
fn programs(container: &Container) -> impl Iterator<Item = NamelessExecutable> {
    container.processes.iter().filter_map(|record| match &record.state {
        ProcessState::Alive(alive) => alive.nameless_executable,
        ProcessState::Zombie { .. } => None,
    })
}

/// Makes a regular file without a name on the file system where it was.
fn make_unlinked(
    root: &Root,
    record: &record::UnlinkedFile,
    number: u32,
) -> Result<File, RestoreError> {
    let what =
        || make(format!("an unlinked file in {}", String::from_utf8_lossy(&record.directory)));
    let file = match &record.name {
        Some(name) => unnamed(root, &[&record.directory, b"/".as_slice(), name].concat(), number),
        None => temporary(root, record, number),
    }
    .map_err(what())?;
    file.set_len(record.bytes).map_err(what())?;
    std::os::unix::fs::fchown(&file, Some(record.owner.0), Some(record.owner.1)).map_err(what())?;
    file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(record.mode))
        .map_err(what())?;
    Ok(file)
}

/// A file that can get a name.
fn temporary(root: &Root, record: &record::UnlinkedFile, number: u32) -> io::Result<File> {
    use nix::fcntl::{OFlag, openat};
    use nix::sys::stat::Mode;
    let wanted = Path::new(OsStr::from_bytes(&record.directory));
    let (directory, _) = nameless::nearest(root, wanted)?;
    let flags = OFlag::O_TMPFILE | OFlag::O_RDWR | OFlag::O_CLOEXEC;
    match openat(&directory, c".", flags, Mode::S_IRUSR | Mode::S_IWUSR) {
        // Such as overlayfs of older kernels.
        Err(Errno::EOPNOTSUPP) => {
            let path = [&record.directory, b"/.samara-temporary".as_slice()].concat();
            unnamed(root, &path, number)
        }
        other => Ok(other?.into()),
    }
}

/// A file whose name has been removed.
fn unnamed(root: &Root, path: &[u8], number: u32) -> io::Result<File> {
    use nix::fcntl::{OFlag, openat};
    use nix::sys::stat::Mode;
    use std::cell::Cell;
    let made = Cell::new(None);
    let create = |directory: &File, name: &OsStr| {
        let flags = OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_RDWR | OFlag::O_CLOEXEC;
        made.set(Some(openat(directory, name, flags, Mode::S_IRUSR | Mode::S_IWUSR)?));
        Ok(())
    };
    nameless::while_named(root, path, number, &create, |_, _| Ok(()))?;
    Ok(made.take().expect("it was made under one of the names").into())
}

/// Maps everything that a process had, writable where it has to be filled, and moves its vdso to where it was.
pub(crate) fn map(
    process: &mut Process,
    channel: &mut Channel,
    alive: &Alive,
    root: &Root,
    shared: &Shared,
    heritage: Option<&Heritage>,
    runs: &[PageRun],
) -> Result<(), RestoreError> {
    vdso::place(process, alive)?;
    for group in alive.mappings.chunks(CHUNK) {
        map_some(process, channel, group, root, shared, heritage, runs)?;
    }
    // Last: the kernel chooses a place for each at first.
    alive.mappings.iter().try_for_each(|mapping| aio::restore(process, mapping))
}

/// Mappings that are made with one tape and one message of descriptors.
const CHUNK: usize = 100;

fn map_some(
    process: &mut Process,
    channel: &mut Channel,
    mappings: &[record::Mapping],
    root: &Root,
    shared: &Shared,
    heritage: Option<&Heritage>,
    runs: &[PageRun],
) -> Result<(), RestoreError> {
    /// What is behind a mapping: a path with the flags to open it, or what has been opened.
    enum Need<'a> {
        Path(&'a [u8], i32, FileCheck),
        Open(File),
    }
    let mut files: Vec<File> = Vec::new();
    let mut index: BTreeMap<(&[u8], i32), usize> = BTreeMap::new();
    let mut needs = Vec::new();
    for mapping in mappings {
        let access = |may_write: bool| if may_write { libc::O_RDWR } else { libc::O_RDONLY };
        let object = |list: &[File], number: u32, flags: i32| -> Result<File, RestoreError> {
            let file = list.get(number as usize).ok_or_else(|| {
                RestoreError::Damaged(format!("a mapping refers to object {number}"))
            })?;
            Shared::reopen(file, flags).map_err(make("a shared object"))
        };
        if heritage.is_some_and(|heritage| heritage.keeps(mapping)) {
            needs.push(None);
            continue;
        }
        let need = match &mapping.backing {
            Backing::Anonymous { .. }
            | Backing::SystemV { .. }
            | Backing::AsynchronousIo { .. }
            | Backing::InheritedRing { .. }
            | Backing::Vdso { .. } => None,
            Backing::PrivateFile { path, check, .. } => {
                Some(Need::Path(path, libc::O_RDONLY, *check))
            }
            Backing::SharedFile { path, may_write, check, .. } => {
                Some(Need::Path(path, access(*may_write), *check))
            }
            Backing::PrivateUnlinked { file, .. } => {
                Some(Need::Open(object(&shared.unlinked, *file, libc::O_RDONLY)?))
            }
            Backing::PrivateMemory { memory, .. } => {
                Some(Need::Open(object(&shared.memory, *memory, libc::O_RDONLY)?))
            }
            Backing::SharedUnlinked { file, may_write, .. } => {
                Some(Need::Open(object(&shared.unlinked, *file, access(*may_write))?))
            }
            Backing::Shared { memory, may_write, .. } => {
                Some(Need::Open(object(&shared.memory, *memory, access(*may_write))?))
            }
        };
        needs.push(match need {
            None => None,
            Some(Need::Open(file)) => {
                files.push(file);
                Some(files.len() - 1)
            }
            Some(Need::Path(path, flags, check)) => Some(match index.get(&(path, flags)) {
                Some(known) => *known,
                None => {
                    files.push(open_mapped(root, path, flags, check)?);
                    index.insert((path, flags), files.len() - 1);
                    files.len() - 1
                }
            }),
        });
    }
    for (mapping, need) in mappings.iter().zip(&needs) {
        let Some(file) = need.and_then(|index| files.get(index)) else { continue };
        if !mapping.behind_end.is_empty() {
            write_behind_end(file, &mapping.behind_end)
                .map_err(make("what is behind a file's end"))?;
        }
    }
    let borrowed: Vec<BorrowedFd<'_>> = files.iter().map(AsFd::as_fd).collect();
    let numbers = channel.send(process, &borrowed)?;
    let mut tape = process.tape()?;
    for (mapping, need) in mappings.iter().zip(needs) {
        if let Backing::SystemV { segment, offset, may_write } = mapping.backing {
            let segment = shared.segments.get(segment as usize).ok_or_else(|| {
                RestoreError::Damaged(format!("a mapping refers to segment {segment}"))
            })?;
            let range = (mapping.start, mapping.end);
            system_v::attach(&mut tape, segment, range, offset, may_write, shared.workspace);
            let protection = u64::from(mapping.protection);
            let arguments = [mapping.start, mapping.end - mapping.start, protection, 0, 0, 0];
            tape.call(format!("protect {:#x}", mapping.start), libc::SYS_mprotect, arguments);
            continue;
        }
        const RW: u32 = 3;
        if heritage.is_some_and(|heritage| heritage.keeps(mapping)) {
            if mapping.protection | RW != RW {
                let protection = u64::from(mapping.protection | RW);
                let arguments = [mapping.start, mapping.end - mapping.start, protection, 0, 0, 0];
                tape.call(format!("protect {:#x}", mapping.start), libc::SYS_mprotect, arguments);
            }
            continue;
        }
        let Some((flags, offset)) = placement(mapping) else { continue };
        let fd = need
            .and_then(|index| numbers.get(index))
            .map_or(u64::MAX, |fd| u64::from(fd.unsigned_abs()));
        let filled = is_filled(&mapping.backing) && touches(runs, mapping);
        let protection =
            u64::from(if filled { mapping.protection | RW } else { mapping.protection });
        let arguments = [mapping.start, mapping.end - mapping.start, protection, flags, fd, offset];
        tape.call(
            format!("map {:#x}-{:#x}", mapping.start, mapping.end),
            libc::SYS_mmap,
            arguments,
        );
    }
    for fd in &numbers {
        tape.call(
            "close a mapped file",
            libc::SYS_close,
            [u64::from(fd.unsigned_abs()), 0, 0, 0, 0, 0],
        );
    }
    process.run_all(0, &tape, End::Breakpoint)?;
    Ok(())
}

fn write_behind_end(file: &File, bytes: &[u8]) -> io::Result<()> {
    let file = Shared::reopen(file, libc::O_RDWR)?;
    let before = file.metadata()?;
    file_end::write_behind(file.as_fd(), before.len(), bytes)?;
    let times = FileTimes::new().set_accessed(before.accessed()?).set_modified(before.modified()?);
    file.set_times(times)
}

/// A regular file, or the device that gives memory.
fn is_mappable(metadata: &Metadata) -> bool {
    const ZERO: (u32, u32) = (1, 5);
    let number = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
    metadata.is_file() || metadata.file_type().is_char_device() && number == ZERO
}

/// Opens a file of the container that was mapped. Private pages are only right over the file they came from.
pub(crate) fn open_mapped(
    root: &Root,
    path: &[u8],
    flags: i32,
    check: FileCheck,
) -> Result<File, RestoreError> {
    let file = open_checked(root, path, flags, &is_mappable)?;
    let bytes = file.metadata().map_err(make("the size of a mapped file"))?.len();
    if bytes != check.bytes {
        let path = String::from_utf8_lossy(path);
        let was = check.bytes;
        return Err(RestoreError::Incompatible(format!(
            "{path} has {bytes} bytes, and had {was} when it was mapped"
        )));
    }
    Ok(file)
}

/// linux/mman.h; a type of mapping like `MAP_PRIVATE`.
const MAP_DROPPABLE: i32 = 8;

/// Flags and offset for `mmap`; `None` for what is mapped otherwise.
fn placement(mapping: &record::Mapping) -> Option<(u64, u64)> {
    const PRIVATE: i32 = libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE;
    const SHARED: i32 = libc::MAP_SHARED | libc::MAP_FIXED_NOREPLACE;
    const DROPPABLE: i32 = MAP_DROPPABLE | libc::MAP_FIXED_NOREPLACE;
    let mut huge = 0;
    let (flags, offset) = match mapping.backing {
        Backing::Anonymous { grows_down, huge_page_bytes, droppable } => {
            let kind = if droppable { DROPPABLE } else { PRIVATE };
            if let Some(bytes) = huge_page_bytes {
                huge = u64::from(libc::MAP_HUGETLB.unsigned_abs()) | huge_page_flags(bytes).ok()?;
            }
            (kind | libc::MAP_ANONYMOUS | if grows_down { libc::MAP_GROWSDOWN } else { 0 }, 0)
        }
        Backing::PrivateFile { offset, .. }
        | Backing::PrivateUnlinked { offset, .. }
        | Backing::PrivateMemory { offset, .. } => (PRIVATE, offset),
        Backing::SharedFile { offset, .. }
        | Backing::SharedUnlinked { offset, .. }
        | Backing::Shared { offset, .. } => (SHARED, offset),
        Backing::SystemV { .. }
        | Backing::AsynchronousIo { .. }
        | Backing::InheritedRing { .. }
        | Backing::Vdso { .. } => {
            return None;
        }
    };
    let flags = flags | if mapping.advice.no_reserve { libc::MAP_NORESERVE } else { 0 };
    Some((u64::from(flags.unsigned_abs()) | huge, offset))
}

/// Whether any of the runs lies in a mapping.
fn touches(runs: &[PageRun], mapping: &record::Mapping) -> bool {
    let (first, end) = (mapping.start / PAGE, mapping.end / PAGE);
    let next = runs.partition_point(|run| run.first + run.count <= first);
    runs.get(next).is_some_and(|run| run.first < end)
}

/// Copies the private memory of all processes from the capsule, but for what they have inherited.
pub(crate) fn fill(
    tree: &Tree,
    container: &Container,
    inheritance: &Inheritance,
    source: &dyn Source,
) -> Result<(), RestoreError> {
    let whole = [PageRun { first: 0, count: PAGE_NUMBER_END }];
    let mut targets: BTreeMap<SpaceId, Pid> = BTreeMap::new();
    let mut wanted: Vec<(SpaceId, &[PageRun])> = Vec::new();
    for record in &container.processes {
        if let (ProcessState::Alive(alive), Some(process)) =
            (&record.state, tree.processes.get(&record.pid))
            && alive.sharing.memory.is_none()
        {
            let space = SpaceId(alive.space);
            targets.insert(space, process.pid);
            let heritage = inheritance.heritage(record.pid);
            wanted.push((space, heritage.map_or(whole.as_slice(), |heritage| &heritage.missing)));
        }
    }
    source
        .transfer_some(&wanted, &|space, runs, bytes| {
            let pid = targets.get(&space).copied().ok_or(io::ErrorKind::InvalidData)?;
            write_runs(pid, 0, runs, bytes)
        })
        .map_err(|source| RestoreError::Fill { source })
}

/// Writes pages to a process: page numbers count from `base`.
pub(crate) fn write_runs(pid: Pid, base: u64, runs: &[PageRun], bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes;
    for runs in runs.chunks(process_vm::RANGES_MAX) {
        let ranges: Vec<process_vm::Range> = runs
            .iter()
            .map(|run| {
                let bytes =
                    run.count.checked_mul(PAGE).and_then(|bytes| usize::try_from(bytes).ok());
                let address =
                    run.first.checked_mul(PAGE).and_then(|offset| offset.checked_add(base));
                match (address, bytes) {
                    (Some(address), Some(bytes)) => Ok(process_vm::Range { address, bytes }),
                    _ => Err(io::ErrorKind::InvalidData.into()),
                }
            })
            .collect::<io::Result<_>>()?;
        let bytes = ranges.iter().map(|range| range.bytes).sum();
        let (now, later) = rest.split_at_checked(bytes).ok_or(io::ErrorKind::InvalidData)?;
        let written = process_vm::write(pid, &ranges, now)?;
        if written != bytes {
            let address = ranges.first().map_or(0, |range| range.address);
            return Err(io::Error::other(format!(
                "only {written} of {bytes} bytes fit at {address:#x} of process {pid}"
            )));
        }
        rest = later;
    }
    Ok(())
}

/// The size of a file's pages, if it lies on hugetlbfs.
pub(crate) fn huge_page_bytes(file: &File) -> io::Result<Option<u64>> {
    /// linux/magic.h
    const HUGETLBFS_MAGIC: i64 = 0x958458f6;
    let system = nix::sys::statfs::fstatfs(file)?;
    if system.filesystem_type().0 != HUGETLBFS_MAGIC {
        return Ok(None);
    }
    u64::try_from(system.block_size()).map(Some).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// How `mmap`, `shmget` and `memfd_create` are told the size of huge pages (MAP_HUGE_SHIFT of linux/mman.h).
pub(crate) fn huge_page_flags(bytes: u64) -> Result<u64, RestoreError> {
    const SHIFT: u32 = 26;
    if !bytes.is_power_of_two() {
        return Err(RestoreError::Damaged(format!("a huge page has {bytes} bytes")));
    }
    Ok(u64::from(bytes.ilog2()) << SHIFT)
}

/// Passes the runs of a batch one by one: offset in bytes, and content.
fn each_run(
    runs: &[PageRun],
    bytes: &[u8],
    write: &mut dyn FnMut(u64, &[u8]) -> io::Result<()>,
) -> io::Result<()> {
    let mut rest = bytes;
    for run in runs {
        let length = run.count.checked_mul(PAGE).and_then(|bytes| usize::try_from(bytes).ok());
        let (now, later) = length
            .and_then(|length| rest.split_at_checked(length))
            .ok_or(io::ErrorKind::InvalidData)?;
        write(run.first.checked_mul(PAGE).ok_or(io::ErrorKind::InvalidData)?, now)?;
        rest = later;
    }
    Ok(())
}

/// Gives filled mappings their own protection, and all their advice.
pub(crate) fn protect(process: &mut Process, alive: &Alive) -> Result<(), RestoreError> {
    const RW: u32 = 3;
    let mut tape = process.tape()?;
    for mapping in &alive.mappings {
        // Each mapping takes a dozen calls at most, besides its guards; a name has 80 bytes, a policy 128.
        const DATA_BYTES: usize = 512;
        if mapping.name.len() > 80
            || mapping
                .memory_policy
                .as_ref()
                .is_some_and(|(_, nodes)| nodes.len() > process::NODE_WORDS)
        {
            return Err(RestoreError::Damaged("a mapping's name or policy is too long".to_owned()));
        }
        if !tape.has_room(16 + mapping.guards.len(), DATA_BYTES) {
            process.run_all(0, &tape, End::Breakpoint)?;
            tape = process.tape()?;
        }
        let (start, bytes) = (mapping.start, mapping.end - mapping.start);
        if is_filled(&mapping.backing) && mapping.protection & RW != RW {
            let arguments = [start, bytes, mapping.protection.into(), 0, 0, 0];
            tape.call(format!("protect {start:#x}"), libc::SYS_mprotect, arguments);
        }
        for (start, end) in &mapping.guards {
            const MADV_GUARD_INSTALL: u64 = 102;
            let arguments = [*start, end.saturating_sub(*start), MADV_GUARD_INSTALL, 0, 0, 0];
            tape.call("install guard pages", libc::SYS_madvise, arguments);
        }
        for advice in advices(&mapping.advice) {
            let advice = u64::from(advice.unsigned_abs());
            tape.call(
                format!("advise on {start:#x}"),
                libc::SYS_madvise,
                [start, bytes, advice, 0, 0, 0],
            );
        }
        if !mapping.name.is_empty() {
            const PR_SET_VMA: u64 = 0x5356_4d41;
            let name = tape.data(&[mapping.name.as_slice(), &[0]].concat());
            // A kernel without such names has no use for them.
            let arguments = [PR_SET_VMA, 0, start, bytes, name, 0];
            tape.try_call("name a mapping", libc::SYS_prctl, arguments);
        }
        if let Some((mode, nodes)) = &mapping.memory_policy {
            let nodes = tape.words(nodes);
            // Another machine has other nodes; what the policy is good for is speed.
            let arguments = [start, bytes, u64::from(*mode), nodes, process::NODES_MAX, 0];
            tape.try_call("set a memory policy", libc::SYS_mbind, arguments);
        }
        if mapping.advice.locked || mapping.advice.locked_on_fault {
            let flags = u64::from(mapping.advice.locked_on_fault);
            let what = format!("lock {start:#x}");
            let arguments = [start, bytes, flags, 0, 0, 0];
            let anonymous = matches!(mapping.backing, Backing::Anonymous { .. });
            if anonymous && mapping.protection & 1 != 0 && mapping.guards.is_empty() {
                tape.call(what, libc::SYS_mlock2, arguments);
            } else {
                // It fails behind the end of a file, at a guard page, and where nothing may be read, and has locked the range
                // nevertheless.
                tape.try_call(what, libc::SYS_mlock2, arguments);
            }
        }
    }
    let future = alive.memory.lock_future;
    if future != 0 {
        tape.call("lock its future mappings", libc::SYS_mlockall, [future.into(), 0, 0, 0, 0, 0]);
    }
    let huge = alive.memory.no_huge_pages;
    if huge != 0 {
        let operation = u64::from(libc::PR_SET_THP_DISABLE.unsigned_abs());
        let arguments = [operation, 1, u64::from(huge & !1), 0, 0, 0];
        tape.call("forbid huge pages", libc::SYS_prctl, arguments);
    }
    if alive.memory.merge {
        let arguments = [process::PR_SET_MEMORY_MERGE, 1, 0, 0, 0, 0];
        tape.call("let its memory be merged", libc::SYS_prctl, arguments);
    }
    process.run_all(0, &tape, End::Breakpoint)?;
    seal_mappings(process, alive)
}

/// Forbids what a program has forbidden itself to do with its mappings. Nothing can be changed about them after this.
fn seal_mappings(process: &mut Process, alive: &Alive) -> Result<(), RestoreError> {
    const SYS_MSEAL: libc::c_long = 462;
    let mut tape = process.tape()?;
    for mapping in alive.mappings.iter().filter(|mapping| mapping.advice.sealed) {
        if !tape.has_room(2, 0) {
            process.run_all(0, &tape, End::Breakpoint)?;
            tape = process.tape()?;
        }
        let (start, bytes) = (mapping.start, mapping.end - mapping.start);
        tape.call(format!("seal {start:#x}"), SYS_MSEAL, [start, bytes, 0, 0, 0, 0]);
    }
    if alive.memory.deny_write_execute != 0 {
        let flags = u64::from(alive.memory.deny_write_execute);
        let arguments = [process::PR_SET_MDWE, flags, 0, 0, 0, 0];
        tape.call("deny writable code", libc::SYS_prctl, arguments);
    }
    process.run_all(0, &tape, End::Breakpoint)?;
    Ok(())
}

fn advices(advice: &Advice) -> impl Iterator<Item = i32> {
    [
        (advice.dont_fork, libc::MADV_DONTFORK),
        (advice.dont_dump, libc::MADV_DONTDUMP),
        (advice.wipe_on_fork, libc::MADV_WIPEONFORK),
        (advice.huge_page, libc::MADV_HUGEPAGE),
        (advice.no_huge_page, libc::MADV_NOHUGEPAGE),
        (advice.mergeable, libc::MADV_MERGEABLE),
        (advice.sequential, libc::MADV_SEQUENTIAL),
        (advice.random, libc::MADV_RANDOM),
    ]
    .into_iter()
    .filter(|(wanted, _)| *wanted)
    .map(|(_, advice)| advice)
}
