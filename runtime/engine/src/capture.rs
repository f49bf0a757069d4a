//! Checkpoint: a stopped container becomes records and pages.
//!
//! What this module does not do: commit. It returns the frozen tree, and the caller thaws it or ends it when the capsule is
//! where it belongs.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use samara_capsule::record::{self, Bytes, Container, ProcessState};
use samara_capsule::transfer::{Sink, SpaceId};
use samara_kernel::{Pid, proc};

use crate::files::{LeasedFiles, MappedFiles, moment};
use crate::freeze::{FreezeError, FrozenTree};
use crate::memory::PrivateMemory;
use crate::names::{self, GivenNames};
use crate::phase::{self, Phase};
use crate::plan::{self, PlanError};
use crate::prepared::{Awaited, Prepared};
use crate::process::LookedAt;
use crate::restart::Slept;
use crate::root::Root;
use crate::snapshot::{self, Rest, SnapshotRequest, Way};
use crate::tracee::TraceeError;
use crate::tracking::Tracking;
use crate::unsupported::{Place, Unsupported, UnsupportedList};
use crate::{
    aio, clocks, copy_on_write, datagrams, descriptors, epoll, file_names, inotify, mappings,
    memory, nameless, notices, posix_queues, process, system_v, tcp, terminals, unix_sockets, vdso,
};

/// Why no capsule came of a capture. The container runs on in every case.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error(transparent)]
    Freeze(#[from] FreezeError),
    #[error(transparent)]
    Tracee(#[from] TraceeError),
    #[error("the container holds state that Samara can't save: {0}")]
    Unsupported(UnsupportedList),
    #[error("the container's processes can't be made again")]
    Plan(#[source] PlanError),
    #[error("could not read {what}")]
    Read { what: String, source: io::Error },
    #[error("could not copy the memory of process {pid} at {start:#x}-{end:#x}")]
    Pages { pid: Pid, start: u64, end: u64, source: io::Error },
    #[error("could not store the container's memory")]
    Sink { source: io::Error },
}

/// A stream that the container was given from outside, by device and inode of what its descriptor referred to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OutsideStream {
    pub device: u64,
    pub inode: u64,
}

/// What to capture.
#[derive(Clone, Debug, Default)]
pub struct CaptureRequest {
    /// The container's init, as this process numbers it.
    pub init: Pid,
    /// The streams 0, 1 and 2 of the container, as its creator recorded them.
    pub outside: Vec<OutsideStream>,
    /// The names that the container was given.
    pub names: GivenNames,
    /// Whether memory may be left in forks, to be read when the container runs again.
    pub snapshot: Option<SnapshotRequest>,
}

/// A container at one instant, still stopped.
#[derive(Debug)]
pub struct Captured {
    pub container: Container,
    pub frozen: FrozenTree,
    pub report: CaptureReport,
    /// How those files are read that may not be opened.
    pub leased: LeasedFiles,
    /// Files that somebody, who stands, may store to without a trace.
    pub mapped: MappedFiles,
    /// What the sink has yet to be given of its memory.
    pub rest: Rest,
}

/// What happened, for the user.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaptureReport {
    pub processes: usize,
    pub threads: usize,
    /// Copied while the container stood.
    pub pages: u64,
    /// Stored before.
    pub unchanged_pages: u64,
    /// Left in forks.
    pub forked_pages: u64,
    pub forks: usize,
    /// Why they were made, or not.
    pub way: Way,
    /// Processes that had joined from outside and were left out, by name.
    pub sessions: Vec<String>,
    /// While the container ran.
    pub prepare: Duration,
    pub freeze: Duration,
    pub collect: Duration,
    pub copy: Duration,
    /// Of it, for forks.
    pub fork: Duration,
}

/// Stops a container and passes all it consists of to `sink`; files of its root are the caller's business, while it is stopped.
/// Memory that `tracking` knows to be stored is not copied again.
///
/// Success: the container is stopped, and `sink` has taken everything but the [`Rest`]. Failure: the container runs, unharmed, and
/// `tracking` still knows all that no capsule has.
/// `thaw` is called as [`FrozenTree::stop`] says.
pub fn capture(
    request: &CaptureRequest,
    tracking: &mut Tracking,
    thaw: &mut dyn FnMut() -> io::Result<()>,
    sink: &mut dyn Sink,
) -> Result<Captured, CaptureError> {
    let begun = Instant::now();
    let prepared = Prepared::look(request.init).map_err(read("the host and its namespaces"))?;
    let mut frozen = FrozenTree::stop(request.init, thaw)?;
    let prepare = frozen.stopped_at.duration_since(begun);
    let clocks = clocks::of_container(request.init, prepared.own_offsets);
    let mut clocks = clocks.map_err(read("the container's clocks"))?;
    let clocks_read = Instant::now();
    let (vdso, common, mut awaited) =
        prepared.go(request.init, &frozen.processes).map_err(read("the container's namespaces"))?;
    let freeze = frozen.stopped_at.elapsed();
    phase::reached(Phase::Stopped);

    let begun = Instant::now();
    let mut tables = Tables::new(request, clocks_read, vdso, common)?;
    let mut slept = crate::restart::elapsed(&frozen.sleepers, frozen.stopped_at, &frozen.facts);
    tracking.left_calls.pass_on(&mut frozen, &mut slept);
    let mut processes = collect(&mut frozen, &slept, &mut awaited, &mut tables)?;
    let names = awaited.names().map_err(read("the host's name"))?;
    let names = names::changed(names, &request.names);
    let addresses = awaited.interfaces();
    tables.addresses = addresses.map_err(read("the container's network interfaces"))?;
    let collect = begun.elapsed();
    clocks.reading_ns = u64::try_from(clocks_read.elapsed().as_nanos()).unwrap_or(u64::MAX);
    phase::reached(Phase::Collected);

    let begun = Instant::now();
    let mut report = CaptureReport { prepare, freeze, collect, ..CaptureReport::default() };
    tracking.attach(&mut frozen)?;
    snapshot::take_ended(&mut frozen);
    let mut members = Vec::new();
    let mut tracked = tracking.by_process();
    for (pid, record) in &mut processes {
        let ProcessState::Alive(alive) = &mut record.state else { continue };
        let Some(process) = frozen.processes.get(pid) else { continue };
        report.threads += alive.threads.len();
        members.push(PrivateMemory::of(process, alive, tracked.remove(pid))?);
    }
    let (copied, planned) = copy_on_write::copy_private(members, request.snapshot.as_ref(), sink)?;
    let (rest, forked) = planned.carry_out(&mut frozen, sink)?;
    report.pages = copied.pages + forked.copied;
    report.unchanged_pages = copied.unchanged;
    (report.forks, report.forked_pages) = (forked.forks, forked.pages);
    (report.way, report.fork) = (forked.way, forked.took);
    if forked.forks > 0 {
        phase::reached(Phase::Forked);
    }
    for (content, space, bytes) in &tables.contents {
        report.pages += content.copy(&tables.leased, *space, *bytes, sink)?;
    }
    // What is saved was looked at; the others are stopped only.
    let sessions = frozen.sessions.keys().copied();
    let by_sessions = moment::mapped_by(sessions).map_err(read("the mappings of sessions"))?;
    tables.mapped_for_writing.0.extend(by_sessions.0);
    report.copy = begun.elapsed();
    phase::reached(Phase::Copied);
    report.processes = processes.len();
    report.sessions = frozen.sessions.keys().map(|pid| name(*pid)).collect();

    // Late, as they are the one thing that can't be looked at without touching it.
    let terminals = terminals::collect(&mut tables)?;
    let container = Container {
        clocks,
        processes: process::parents_first(
            processes.into_iter().map(|(_, record)| record).collect(),
        ),
        files: tables.files,
        pipes: tables.pipes,
        socket_pairs: Vec::new(),
        unix_sockets: tables.sockets.into_records(),
        shared_memory: tables.shared_memory,
        unlinked_files: tables.unlinked,
        addresses: tables.addresses,
        names,
        unlinked_directories: tables.unlinked_directories,
        unlinked_nodes: tables.unlinked_nodes,
        ended: tables.ended,
        terminals,
        vdso_sha256: Bytes::from(tables.vdso.sha256().to_vec()),
        system_v: tables.system_v.record,
        posix_queues: tables.posix_queues.records,
    };
    let (leased, mapped) = (tables.leased, tables.mapped_for_writing);
    Ok(Captured { container, frozen, report, leased, mapped, rest })
}

/// Records of all processes by the engine's number.
///
/// First everything is looked at, so that an error names all that can't be saved; then code runs in the processes.
fn collect(
    frozen: &mut FrozenTree,
    elapsed: &BTreeMap<Pid, Slept>,
    awaited: &mut Awaited,
    tables: &mut Tables<'_>,
) -> Result<Vec<(Pid, record::Process)>, CaptureError> {
    // Sessions are thawed like the rest, so their interrupted calls are mended too.
    for (pid, session) in &mut frozen.sessions {
        session.find_room(&mappings::of(*pid).map_err(read("the mappings"))?);
        process::mend_for_thaw(session, elapsed)?;
    }
    let sharing = process::sharing(&frozen.processes, tables);
    process::part_scratch(&mut frozen.processes, |pid| {
        let first = sharing.get(&pid).and_then(|sharing| sharing.memory);
        first.or_else(|| inner_pid(pid).ok())
    });
    if let Some(view) = awaited.queues() {
        posix_queues::list(view, tables)?;
    }
    // What is read beside comes last.
    let mut all_descriptors = Vec::with_capacity(frozen.processes.len());
    for pid in frozen.processes.keys() {
        all_descriptors.push(match sharing.get(pid).and_then(|shares| shares.descriptors) {
            None => descriptors::collect(*pid, tables)?,
            Some(_) => descriptors::Descriptors::default(),
        });
    }
    if let Some(record) = awaited.system_v().map_err(read("the container's System V objects"))? {
        system_v::list(record, frozen, tables)?;
    }
    let mut threads = awaited.threads();
    let mut looked_at = Vec::new();
    // Before the engine maps anything, so that the lists are the programs'.
    let mut all_mappings = awaited.mappings();
    for ((pid, process), descriptors) in frozen.processes.iter_mut().zip(all_descriptors) {
        let mappings = all_mappings.remove(pid).unwrap_or_else(|| mappings::of(*pid));
        let mappings = mappings.map_err(read("the mappings"))?;
        process.find_room(&mappings);
        let shares = sharing.get(pid).copied().unwrap_or_default();
        let described = match shares.memory {
            None => memory::describe(*pid, &mappings, tables)?,
            Some(_) => Vec::new(),
        };
        let examined = process::examine(process, &mut threads, tables)?;
        looked_at.push(LookedAt { mappings: described, descriptors, examined });
    }
    unix_sockets::collect(tables)?;
    epoll::resolve(tables)?;
    tcp::resolve(tables)?;
    inotify::resolve(tables)?;
    frozen.watchers = std::mem::take(&mut tables.watchers);
    refuse_strange_processes(frozen, tables);
    notices::refuse_mapped(tables);
    nameless::refuse_used(tables);
    let pids: Vec<Pid> = frozen.processes.keys().copied().collect();
    let zombies: Vec<Pid> = frozen.zombies.iter().map(|zombie| zombie.pid).collect();
    terminals::resolve(&pids, &zombies, tables)?;
    if !tables.unsupported.is_empty() {
        for process in frozen.processes.values_mut() {
            process::mend_for_thaw(process, elapsed)?;
        }
        let unsupported = std::mem::take(&mut tables.unsupported);
        return Err(CaptureError::Unsupported(UnsupportedList(unsupported)));
    }
    let mut records = Vec::new();
    for ((pid, process), mut looked_at) in frozen.processes.iter_mut().zip(looked_at) {
        memory::read_behind_ends(*pid, &mut looked_at.mappings, tables)?;
        let space = tables.new_space();
        let shares = sharing.get(pid).copied().unwrap_or_default();
        let common = &tables.common;
        let record =
            process::collect(process, looked_at, space, shares, elapsed, &frozen.facts, common)?;
        records.push((*pid, record));
    }
    unix_sockets::ask(&mut frozen.processes, tables)?;
    system_v::ask(frozen, tables)?;
    aio::ask(frozen, &mut records, tables)?;
    if !tables.unsupported.is_empty() {
        let unsupported = std::mem::take(&mut tables.unsupported);
        return Err(CaptureError::Unsupported(UnsupportedList(unsupported)));
    }
    posix_queues::copy(tables)?;
    ask_for_stops(frozen, &mut records)?;
    for zombie in &frozen.zombies {
        records.push((zombie.pid, process::collect_zombie(zombie.pid)?));
    }
    // Another init can be its session's leader, but not cease to be.
    let leads = records.iter().any(|(_, record)| record.pid == 1 && record.session == 1);
    plan::tree(records.iter().map(|(_, record)| record), leads).map_err(CaptureError::Plan)?;
    Ok(records)
}

/// Notes descriptors of processes that are not restored: those that joined from outside.
fn refuse_strange_processes(frozen: &FrozenTree, tables: &mut Tables<'_>) {
    for (pid, fd, watched) in std::mem::take(&mut tables.watched_processes) {
        let threads = frozen.processes.values().flat_map(|process| &process.threads);
        let known = threads.map(|thread| thread.tid).any(|tid| tid == watched)
            || frozen.zombies.iter().any(|zombie| zombie.pid == watched);
        if !known {
            let what = "a descriptor of a process that joined the container from outside is open";
            tables.refuse(pid, Place::Descriptor(fd), what);
        }
    }
}

/// Completes the records of processes that a signal has stopped by whether their parents know.
fn ask_for_stops(
    frozen: &mut FrozenTree,
    records: &mut [(Pid, record::Process)],
) -> Result<(), CaptureError> {
    let mut by_parent: BTreeMap<Pid, Vec<(i32, i32)>> = BTreeMap::new();
    for (pid, process) in records.iter() {
        let ProcessState::Alive(alive) = &process.state else { continue };
        let parent = proc::stat(*pid).map_err(read("the parent of a process"))?.ppid;
        let event = if alive.stopped.is_some() { libc::WSTOPPED } else { libc::WCONTINUED };
        by_parent.entry(parent).or_default().push((process.pid, event));
    }
    let mut reports: BTreeMap<i32, bool> = BTreeMap::new();
    for (parent, children) in by_parent {
        // Of a parent outside of the container nothing is restored.
        let Some(parent) = frozen.processes.get_mut(&parent) else { continue };
        let answers = process::would_report(parent, &children)?;
        reports.extend(children.iter().map(|(child, _)| *child).zip(answers));
    }
    for (_, process) in records {
        let ProcessState::Alive(alive) = &mut process.state else { continue };
        let Some(report) = reports.get(&process.pid) else { continue };
        match &mut alive.stopped {
            Some(stopped) => stopped.reported = !report,
            None => alive.continued = *report,
        }
    }
    Ok(())
}

/// A descriptor that led to an open file description: process, number, index of the description.
pub(crate) type Holder = (Pid, i32, u32);

/// Where content is read from that belongs to no name.
#[derive(Debug)]
pub(crate) enum Content {
    Open(File),
    /// A link in `/proc`. It is opened only when all descriptors have been seen, as one of them may have a lease on the file.
    Linked(String),
}

impl Content {
    fn copy(
        &self,
        leased: &LeasedFiles,
        space: SpaceId,
        bytes: u64,
        sink: &mut dyn Sink,
    ) -> Result<u64, CaptureError> {
        let link = match self {
            Content::Open(file) => return memory::copy_file(file, space, bytes, sink),
            Content::Linked(link) => link,
        };
        let metadata = fs::metadata(link).map_err(read(link))?;
        if let Some(description) = leased.of_file(&metadata) {
            return memory::copy_whole_file(description, space, bytes, sink);
        }
        // What is read here, the program has not read.
        let flags = libc::O_NOATIME;
        let file = File::options().read(true).custom_flags(flags).open(link).map_err(read(link))?;
        memory::copy_file(&file, space, bytes, sink)
    }
}

/// Objects that several processes may share, each once, and what can't be saved.
#[derive(Debug)]
pub(crate) struct Tables<'a> {
    pub(crate) request: &'a CaptureRequest,
    /// When the clocks were read that the capsule gets. What is left until something is due counts from then.
    pub(crate) clocks_read: Instant,
    pub(crate) root: Root,
    pub(crate) vdso: vdso::Host,
    pub(crate) common: process::Common,
    /// Threads that do not share the directories of their process.
    pub(crate) own_directories: BTreeSet<Pid>,
    /// Types of file systems, by device.
    pub(crate) file_systems: BTreeMap<u64, i64>,
    /// What has been found at which path, and what is behind mappings of the same file. Files are mapped and open many times.
    at_paths: BTreeMap<Vec<u8>, Option<(u64, u64)>>,
    pub(crate) behind_mappings: BTreeMap<((u32, u32), u64, OsString), Metadata>,
    pub(crate) files: Vec<record::OpenFile>,
    pub(crate) pipes: Vec<record::Pipe>,
    pub(crate) shared_memory: Vec<record::SharedMemory>,
    pub(crate) unlinked: Vec<record::UnlinkedFile>,
    pub(crate) unsupported: Vec<Unsupported>,
    /// Content to copy, its space, its length.
    pub(crate) contents: Vec<(Content, SpaceId, u64)>,
    pub(crate) leased: LeasedFiles,
    /// Who holds leases for writing, on which files.
    pub(crate) lease_holders: Vec<((u64, u64), Pid, i32)>,
    pub(crate) mapped_files: BTreeSet<(u64, u64)>,
    pub(crate) mapped_for_writing: MappedFiles,
    /// Index of an open file description by inode, to be compared with `kcmp`.
    pub(crate) known_files: BTreeMap<(u64, u64), Vec<Holder>>,
    pub(crate) known_pipes: BTreeMap<(u64, u64), u32>,
    pub(crate) sockets: unix_sockets::Sockets,
    pub(crate) epolls: Vec<epoll::Instance>,
    pub(crate) system_v: system_v::Known,
    pub(crate) posix_queues: posix_queues::Known,
    /// Connections whose other ends are looked for when all sockets have been seen.
    pub(crate) connections: Vec<tcp::Noted>,
    /// By what the kernel knows the container's network namespace, and its multicast groups, once they were asked for.
    pub(crate) network: Option<Vec<u8>>,
    pub(crate) groups: Option<Vec<datagrams::Group>>,
    /// For which directions datagram sockets are shut, by inode, once it was asked for.
    pub(crate) shutdowns: Option<BTreeMap<u32, u8>>,
    addresses: Vec<(Bytes, Bytes)>,
    pub(crate) inotifies: Vec<inotify::Instance>,
    pub(crate) watchers: Vec<inotify::Watcher>,
    pub(crate) unlinked_directories: Vec<record::UnlinkedDirectory>,
    pub(crate) known_directories: BTreeMap<(u64, u64), u32>,
    pub(crate) unlinked_nodes: Vec<record::UnlinkedNode>,
    pub(crate) known_nodes: BTreeMap<(u64, u64), u32>,
    /// Who has them.
    pub(crate) node_holders: Vec<((u64, u64), Pid, i32)>,
    pub(crate) ended: Vec<record::EndedProcess>,
    /// Index of an ended process by the identity of a descriptor of it, or by 0 and its number.
    pub(crate) known_ended: BTreeMap<(u64, u64), u32>,
    /// Descriptors of processes: who has it, its number, and which process it is of.
    pub(crate) watched_processes: Vec<(Pid, i32, Pid)>,
    /// For each of the streams from outside the description that was found first.
    pub(crate) known_outside: BTreeMap<u32, u32>,
    /// Names of files that are not where they were opened; none where none was found.
    names: BTreeMap<(u64, u64), Option<record::Path>>,
    pub(crate) terminals: terminals::Terminals,
    known_memory: BTreeMap<(u64, u64), u32>,
    pub(crate) known_unlinked: BTreeMap<(u64, u64), u32>,
    spaces: u32,
}

impl<'a> Tables<'a> {
    fn new(
        request: &'a CaptureRequest,
        clocks_read: Instant,
        vdso: vdso::Host,
        common: process::Common,
    ) -> Result<Tables<'a>, CaptureError> {
        Ok(Tables {
            request,
            clocks_read,
            root: Root::of(request.init).map_err(read("the container's root directory"))?,
            vdso,
            common,
            own_directories: BTreeSet::new(),
            file_systems: BTreeMap::new(),
            at_paths: BTreeMap::new(),
            behind_mappings: BTreeMap::new(),
            files: Vec::new(),
            pipes: Vec::new(),
            shared_memory: Vec::new(),
            unlinked: Vec::new(),
            unsupported: Vec::new(),
            contents: Vec::new(),
            leased: LeasedFiles::default(),
            lease_holders: Vec::new(),
            mapped_files: BTreeSet::new(),
            mapped_for_writing: MappedFiles::default(),
            known_files: BTreeMap::new(),
            known_pipes: BTreeMap::new(),
            sockets: unix_sockets::Sockets::default(),
            epolls: Vec::new(),
            system_v: system_v::Known::default(),
            posix_queues: posix_queues::Known::default(),
            connections: Vec::new(),
            network: None,
            groups: None,
            shutdowns: None,
            addresses: Vec::new(),
            inotifies: Vec::new(),
            watchers: Vec::new(),
            unlinked_directories: Vec::new(),
            known_directories: BTreeMap::new(),
            unlinked_nodes: Vec::new(),
            known_nodes: BTreeMap::new(),
            node_holders: Vec::new(),
            ended: Vec::new(),
            known_ended: BTreeMap::new(),
            watched_processes: Vec::new(),
            known_outside: BTreeMap::new(),
            names: BTreeMap::new(),
            terminals: terminals::Terminals::default(),
            known_memory: BTreeMap::new(),
            known_unlinked: BTreeMap::new(),
            spaces: 0,
        })
    }

    pub(crate) fn new_space(&mut self) -> SpaceId {
        self.spaces += 1;
        SpaceId(self.spaces - 1)
    }

    /// Notes that something can't be saved.
    pub(crate) fn refuse(&mut self, pid: Pid, place: Place, what: impl Into<String>) {
        self.unsupported.push(refusal(pid, place, what));
    }

    /// The index of a shared memory object: of a memfd by its name, or of anonymous shared memory.
    ///
    /// `link` is a link in `/proc` by which the object can be opened.
    pub(crate) fn shared_memory(
        &mut self,
        identity: (u64, u64),
        link: &str,
        memfd: Option<&[u8]>,
    ) -> Result<u32, CaptureError> {
        if let Some(index) = self.known_memory.get(&identity) {
            return Ok(*index);
        }
        let file = File::open(link).map_err(read(link))?;
        let metadata = file.metadata().map_err(read(link))?;
        let kind = match memfd {
            None => record::SharedMemoryKind::Anonymous,
            Some(name) => record::SharedMemoryKind::Memfd {
                name: Bytes::from(name.to_vec()),
                seals: nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_GET_SEALS).unwrap_or(0),
                mode: metadata.mode() & 0o7777,
                owner: (metadata.uid(), metadata.gid()),
            },
        };
        let space = self.new_space();
        let bytes = metadata.size();
        let huge_page_bytes = memory::huge_page_bytes(&file).map_err(read(link))?;
        self.contents.push((Content::Open(file), space, bytes));
        let index = index(self.shared_memory.len());
        self.shared_memory.push(record::SharedMemory {
            space: space.0,
            bytes,
            kind,
            huge_page_bytes,
        });
        self.known_memory.insert(identity, index);
        Ok(index)
    }

    /// Looks for names of files, by device and inode; [`Tables::name`] tells what was found.
    pub(crate) fn find_names(&mut self, wanted: &BTreeSet<(u64, u64)>) -> Result<(), CaptureError> {
        let wanted: BTreeSet<(u64, u64)> =
            wanted.iter().filter(|one| !self.names.contains_key(one)).copied().collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let found = file_names::find(&self.root, self.request.init, &wanted)
            .map_err(read("the container's files"))?;
        for identity in wanted {
            self.names.insert(identity, found.get(&identity).cloned().map(Bytes::from));
        }
        Ok(())
    }

    pub(crate) fn name(&self, identity: (u64, u64)) -> Option<&record::Path> {
        self.names.get(&identity).and_then(Option::as_ref)
    }

    /// A path of a file that is open as `target`: that one, or where else it is found.
    pub(crate) fn path_of(
        &mut self,
        identity: (u64, u64),
        target: &[u8],
    ) -> Result<Option<record::Path>, CaptureError> {
        let found = match self.at_paths.get(target) {
            Some(found) => *found,
            None => {
                let found = self.root.identity(target).ok();
                *self.at_paths.entry(target.to_owned()).or_insert(found)
            }
        };
        if found == Some(identity) {
            return Ok(Some(Bytes::from(target.to_vec())));
        }
        self.find_names(&BTreeSet::from([identity]))?;
        Ok(self.name(identity).cloned())
    }

    /// The index of a regular file without a name. `path` is the one that the kernel shows for it.
    pub(crate) fn unlinked(
        &mut self,
        identity: (u64, u64),
        link: &str,
        path: &Path,
        metadata: &Metadata,
    ) -> Result<u32, CaptureError> {
        if let Some(index) = self.known_unlinked.get(&identity) {
            return Ok(*index);
        }
        let space = self.new_space();
        let bytes = metadata.size();
        self.contents.push((Content::Linked(link.to_owned()), space, bytes));
        let path = Path::new(OsStr::from_bytes(nameless::former_path(path.as_os_str().as_bytes())));
        let directory = path.parent().unwrap_or(Path::new("/")).as_os_str().as_bytes();
        let name = path.file_name().map(OsStr::as_bytes);
        let name = name.filter(|name| !nameless::is_temporary(name));
        let index = index(self.unlinked.len());
        self.unlinked.push(record::UnlinkedFile {
            space: space.0,
            bytes,
            mode: metadata.mode() & 0o7777,
            owner: (metadata.uid(), metadata.gid()),
            modified_ns: metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec(),
            accessed_ns: Some(metadata.atime() * 1_000_000_000 + metadata.atime_nsec()),
            attributes: attributes(link).map_err(read(link))?,
            directory: Bytes::from(directory.to_vec()),
            name: name.map(|name| Bytes::from(name.to_vec())),
        });
        self.known_unlinked.insert(identity, index);
        Ok(index)
    }
}

fn refusal(pid: Pid, place: Place, what: impl Into<String>) -> Unsupported {
    let pid_inside = inner_pid(pid).unwrap_or(pid);
    Unsupported { pid: pid_inside, process: name(pid), place, what: what.into() }
}

/// The error of one thing that can't be saved, where no more is looked for.
pub(crate) fn unsupported(pid: Pid, place: Place, what: impl Into<String>) -> CaptureError {
    CaptureError::Unsupported(UnsupportedList(vec![refusal(pid, place, what)]))
}

/// The extended attributes of a file.
fn attributes(link: &str) -> io::Result<Vec<(Bytes, Bytes)>> {
    /// The kernel's bound on a list of names, and on a value (linux/limits.h).
    const BYTES_MAX: usize = 64 << 10;
    let mut buffer = vec![0; BYTES_MAX];
    let names = match rustix::fs::listxattr(link, &mut buffer) {
        Ok(count) => buffer.get(..count).unwrap_or_default().to_vec(),
        Err(rustix::io::Errno::NOTSUP) => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    let mut found = Vec::new();
    for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
        let count = match rustix::fs::getxattr(link, name, &mut buffer) {
            // Security modules list labels that not everybody may read.
            Err(rustix::io::Errno::NODATA | rustix::io::Errno::NOTSUP) => continue,
            other => other?,
        };
        let value = buffer.get(..count).unwrap_or_default();
        found.push((Bytes::from(name.to_vec()), Bytes::from(value.to_vec())));
    }
    Ok(found)
}

/// A table's length as the index of its next entry.
pub(crate) fn index(length: usize) -> u32 {
    u32::try_from(length).expect("the kernel allows fewer objects than 2^32")
}

pub(crate) fn name(pid: Pid) -> String {
    proc::attribute(pid, "comm").unwrap_or_default()
}

/// The number that a process or thread has in the innermost pid namespace.
pub(crate) fn inner_pid(tid: Pid) -> io::Result<Pid> {
    let status = proc::status(tid)?;
    Ok(status.nspid.last().copied().unwrap_or(tid))
}

pub(crate) fn read(what: impl Into<String>) -> impl FnOnce(io::Error) -> CaptureError {
    let what = what.into();
    move |source| CaptureError::Read { what, source }
}

/// A small file of `/proc/PID`, as [`proc::attribute`].
pub(crate) fn attribute(pid: Pid, file: &str) -> Result<String, CaptureError> {
    proc::attribute(pid, file).map_err(read(format!("/proc/{pid}/{file}")))
}

/// The target of a link in `/proc/PID`, as a path inside the container.
pub(crate) fn link(pid: Pid, file: &str) -> Result<record::Path, CaptureError> {
    let path = format!("/proc/{pid}/{file}");
    let target = fs::read_link(&path).map_err(read(path))?;
    Ok(Bytes::from(target.as_os_str().as_bytes().to_vec()))
}
