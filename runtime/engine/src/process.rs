//! Processes and threads: ids, registers, signals, credentials, scheduling, limits.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Instant;

use samara_capsule::record::{
    self, Alive, AlternateStack, Bytes, Clocks, Credentials, Directories, EndedDirectory,
    IntervalTimer, NamelessExecutable, PosixTimer, ProcessState, Restart, Scheduling, Seccomp,
    SeccompFilter, Sharing, SignalAction, ThreadAttributes,
};
use samara_capsule::transfer::SpaceId;
use samara_kernel::kcmp::{self, Resource};
use samara_kernel::ptrace::{self, Queue, Registers, Rseq};
use samara_kernel::tape::{Call, End};
use samara_kernel::thread_list::ThreadFacts;
use samara_kernel::wait::{self, Status};
use samara_kernel::{Pid, proc, process_vm, robust_list, sched};

use crate::capture::{CaptureError, Tables, attribute, inner_pid, link, read, unsupported};
use crate::descriptors::{Channel, Descriptors};
use crate::memory::Shared;
use crate::restart::{self, Goal, Slept};
use crate::restore::{RestoreError, make, open_below};
use crate::root::Root;
use crate::tracee::{Output, OwnState, Process, Tape, Thread, TraceeError, failed};
use crate::unsupported::Place;
use crate::{attributes, clocks, directories, labels, memory, procfiles, sockets, timers};

/// Signals are numbered from 1 to this.
pub(crate) const SIGNALS: u32 = 64;
/// Bytes of the kernel's `struct sigaction`: handler, flags, restorer, mask.
pub(crate) const SIGACTION_BYTES: usize = 32;
/// Bytes of `stack_t`.
pub(crate) const STACK_BYTES: usize = 24;
/// Bytes of `struct itimerval`.
pub(crate) const ITIMERVAL_BYTES: usize = 32;

/// `prctl` operations that libc has no name for on every target.
const PR_GET_TID_ADDRESS: u64 = 40;
pub(crate) const PR_SET_MDWE: u64 = 65;
pub(crate) const PR_SET_MEMORY_MERGE: u64 = 67;
const PR_GET_MDWE: u64 = 66;
const PR_GET_THP_DISABLE: u64 = 42;
const PR_GET_MEMORY_MERGE: u64 = 68;
const SECCOMP_STRICT: u32 = 1;

const SIGINFO_BYTES: usize = 128;

/// linux/membarrier.h, linux/sched.h, asm/prctl.h, linux/ioprio.h
const MEMBARRIER_CMD_GET_REGISTRATIONS: u64 = 1 << 9;
const SCHED_DEADLINE: u32 = 6;
const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
const ARCH_REQ_XCOMP_PERM: u64 = 0x1023;
/// Feature of XCR0 that a process has to ask for.
const TILE_DATA: u64 = 18;
const IOPRIO_WHO_PROCESS: u64 = 1;
/// The node masks that we exchange with the kernel have a bit for each node that it has at most.
pub(crate) const NODE_WORDS: usize = 16;
pub(crate) const NODES_MAX: u64 = NODE_WORDS as u64 * 64;

/// All that is seen of a stopped process without code that runs in it.
#[derive(Debug)]
pub(crate) struct LookedAt {
    pub(crate) mappings: Vec<record::Mapping>,
    pub(crate) descriptors: Descriptors,
    pub(crate) examined: Examined,
}

/// What `/proc` says of a stopped process.
#[derive(Debug)]
pub(crate) struct Examined {
    stat: proc::Stat,
    status: proc::Status,
    /// Without their times.
    posix_timers: Vec<PosixTimer>,
    /// For each thread.
    threads: Vec<ExaminedThread>,
    paths: Paths,
    /// As [`Tables::clocks_read`].
    clocks_read: Instant,
}

/// Where a process is, and what it runs.
#[derive(Debug)]
struct Paths {
    executable: record::Path,
    nameless_executable: Option<NamelessExecutable>,
    directories: Directories,
    ended_directory: Option<EndedDirectory>,
}

#[derive(Debug)]
struct ExaminedThread {
    told: Told,
    vectors: Vec<u8>,
    own_directories: Option<Directories>,
}

/// What anybody may ask of a thread.
#[derive(Debug)]
pub(crate) struct Told {
    status: proc::Status,
    label: Option<Bytes>,
    login_user: Option<u32>,
    scheduling: sched::Attributes,
    affinity: Vec<u32>,
    robust_list: (u64, u64),
}

impl Told {
    pub(crate) fn of(tid: Pid, common: &Common) -> io::Result<Told> {
        Ok(Told {
            status: proc::status(tid)?,
            scheduling: sched::attributes(tid)?,
            affinity: sched::affinity(tid)?,
            robust_list: robust_list::get(tid)?,
            label: match common.labels {
                true => labels::of_thread(tid)?.map(Bytes::from),
                false => None,
            },
            login_user: common.audit.then(|| attributes::login_user(tid)).flatten(),
        })
    }
}

/// What is the same for all threads, and is asked once.
#[derive(Clone, Debug)]
pub(crate) struct Common {
    /// Security modules give labels to threads.
    labels: bool,
    /// The kernel has an audit, and keeps for it who has logged in.
    audit: bool,
    /// The processors that the engine may run on: all, as a rule.
    processors: Vec<u32>,
    /// The time slice of who has asked for none.
    slice_ns: u64,
}

impl Common {
    pub(crate) fn look() -> io::Result<Common> {
        let own = |file: &str| std::fs::read(format!("/proc/self/{file}")).is_ok();
        Ok(Common {
            labels: own("attr/current"),
            audit: own("loginuid"),
            processors: sched::affinity(0)?,
            slice_ns: sched::attributes(0)?.slice_ns(),
        })
    }
}

/// Notes what of a process itself can't be saved.
pub(crate) fn examine(
    process: &mut Process,
    told: &mut BTreeMap<Pid, io::Result<Told>>,
    tables: &mut Tables<'_>,
) -> Result<Examined, CaptureError> {
    let pid = process.pid;
    let what = || read(format!("process {pid} in /proc"));
    let stat = proc::stat(pid).map_err(what())?;
    let mut told = |tid: Pid, common: &Common| {
        let found = told.remove(&tid).unwrap_or_else(|| Told::of(tid, common));
        found
            .map_err(|source| CaptureError::Read { what: format!("thread {tid} in /proc"), source })
    };
    let mut leader = Some(told(pid, &tables.common)?);
    let status = leader.as_ref().map(|told| told.status.clone()).unwrap_or_default();
    process.set_signals(status.sigign, status.sigcgt);
    check(pid, &status, tables)?;
    let paths = paths(pid, &status, tables)?;
    let mut threads = Vec::with_capacity(process.threads.len());
    for thread in &mut process.threads {
        /// Code segments of 64-bit programs (USER_CS of arch/x86/include/asm/segment.h).
        const USER_CS: u64 = 0x33;
        let tid = thread.tid;
        let told = match leader.take() {
            Some(leader) if tid == pid => leader,
            other => {
                leader = other;
                told(tid, &tables.common)?
            }
        };
        let own = match &mut thread.own {
            Some(own) => own,
            none => none.insert(OwnState::of(tid)?),
        };
        if thread.stop.cs != USER_CS {
            tables.refuse(pid, Place::Thread(tid), "32-bit code is not supported");
        }
        if uses_tiles(&own.vectors) {
            // The kernel takes them only from a thread that has used the unit before.
            tables.refuse(pid, Place::Thread(tid), "tile registers (AMX) are not supported");
        }
        if own.dispatches_calls {
            let what = "dispatch of its system calls to itself (PR_SET_SYSCALL_USER_DISPATCH) is not supported";
            tables.refuse(pid, Place::Thread(tid), what);
        }
        if own.uses_ports {
            tables.refuse(pid, Place::Thread(tid), "use of I/O ports (ioperm) is not supported");
        }
        if told.scheduling.policy == SCHED_DEADLINE {
            tables.refuse(pid, Place::Thread(tid), "SCHED_DEADLINE is not supported");
        }
        let vectors = std::mem::take(&mut own.vectors);
        let own_directories = match tables.own_directories.contains(&tid) {
            true => Some(directories(pid, tid, &told.status, tables)?.0),
            false => None,
        };
        threads.push(ExaminedThread { told, vectors, own_directories });
    }
    let timers = proc::attribute(pid, "timers").map_err(what())?;
    let timers = timers::parse_posix(
        &timers,
        &|tid| inner_pid(tid).ok().filter(|number| *number != 0),
        &|number| lives(tables.request.init, number),
    );
    if timers.is_none() {
        let why = "a POSIX timer on the processor clock of a process that has ended, or for a thread that has ended, is not supported";
        tables.refuse(pid, Place::Process, why);
    }
    Ok(Examined {
        stat,
        status,
        posix_timers: timers.unwrap_or_default(),
        threads,
        paths,
        clocks_read: tables.clocks_read,
    })
}

/// Whether the container of `init` has a thread of this number. Only for what is rare: all threads are asked.
fn lives(init: Pid, number: i32) -> bool {
    let namespace = |pid: Pid| proc::namespace(pid, "pid").ok();
    let wanted = namespace(init);
    let processes = proc::processes().unwrap_or_default();
    let members = processes.into_iter().filter(|pid| wanted.is_some() && namespace(*pid) == wanted);
    members
        .flat_map(|pid| proc::threads(pid).unwrap_or_default())
        .any(|tid| inner_pid(tid).is_ok_and(|found| found == number))
}

/// Whether an XSAVE area says that the tile data is in use (Intel SDM volume 1, 13.4.2: XSTATE_BV).
fn uses_tiles(state: &[u8]) -> bool {
    const XSTATE_BV: std::ops::Range<usize> = 512..520;
    let [present] = state.get(XSTATE_BV).map_or([0], words);
    present >> TILE_DATA & 1 == 1
}

/// What each process shares with others. Notes threads that do not share what the threads of a process do.
pub(crate) fn sharing(
    processes: &BTreeMap<Pid, Process>,
    tables: &mut Tables<'_>,
) -> BTreeMap<Pid, Sharing> {
    let mut found: BTreeMap<Pid, Sharing> = BTreeMap::new();
    type Field = fn(&mut Sharing) -> &mut Option<i32>;
    let kinds: [(Resource, Field); 4] = [
        (Resource::Vm, |sharing| &mut sharing.memory),
        (Resource::Files, |sharing| &mut sharing.descriptors),
        (Resource::Fs, |sharing| &mut sharing.directory),
        (Resource::Sighand, |sharing| &mut sharing.actions),
    ];
    for (kind, field) in kinds {
        let order = |a: &Pid, b: &Pid| kcmp::resource(*a, *b, kind).unwrap_or_else(|_| a.cmp(b));
        let mut pids: Vec<Pid> = processes.keys().copied().collect();
        pids.sort_by(order);
        for sharers in pids.chunk_by(|a, b| order(a, b).is_eq()).filter(|some| some.len() > 1) {
            let numbers = |pid: &Pid| (inner_pid(*pid).unwrap_or(*pid), *pid);
            let Some((first, first_here)) = sharers.iter().map(numbers).min() else { continue };
            for pid in sharers.iter().filter(|pid| **pid != first_here) {
                *field(found.entry(*pid).or_default()) = Some(first);
            }
        }
    }
    for process in processes.values() {
        for thread in process.threads.iter().skip(1) {
            let (pid, tid) = (process.pid, thread.tid);
            if is_own(pid, tid, Resource::Files) {
                let what = "it has a table of descriptors of its own, which is not supported";
                tables.refuse(pid, Place::Thread(tid), what);
            }
            if is_own(pid, tid, Resource::Fs) {
                let others = processes.keys().chain(&tables.own_directories);
                if others.into_iter().any(|other| !is_own(*other, tid, Resource::Fs)) {
                    let what = "it shares a working directory with others than the threads of its process, which is not supported";
                    tables.refuse(pid, Place::Thread(tid), what);
                }
                tables.own_directories.insert(tid);
            }
        }
    }
    found
}

/// Whether a thread does not share something with another one.
fn is_own(other: Pid, tid: Pid, kind: Resource) -> bool {
    kcmp::resource(other, tid, kind).is_ok_and(|order| order.is_ne())
}

/// Describes a stopped process. Its memory has been described already, since this maps the engine's own.
///
/// Every thread is left with the engine's corrections of interrupted calls, ready to be thawed.
pub(crate) fn collect(
    process: &mut Process,
    looked_at: LookedAt,
    space: SpaceId,
    sharing: Sharing,
    elapsed: &BTreeMap<Pid, Slept>,
    facts: &BTreeMap<Pid, ThreadFacts>,
    common: &Common,
) -> Result<record::Process, CaptureError> {
    let pid = process.pid;
    let what = || read(format!("process {pid} in /proc"));
    let LookedAt { mut mappings, descriptors, examined } = looked_at;
    let Examined { stat, status, posix_timers, threads: looks, paths, clocks_read } = examined;
    let (stat, status) = (&stat, &status);
    let registrations = leave_critical_sections(process)?;
    // What the capsule gets is decided before the corrections for the thaw change the registers.
    let restored: Vec<(Registers, Restart)> = process
        .threads
        .iter()
        .map(|thread| corrected(process, thread, Goal::Restore, elapsed))
        .collect();
    mend_for_thaw(process, elapsed)?;
    process.may_signal = (!common.labels).then_some(true);
    process.map_arena(None)?;
    let lock_future = memory::lock_future(process, status)?;
    let answers = Answers::ask(process, &posix_timers, clocks_read, &mut mappings)?;
    let descriptor_table = match answers.has_descriptor_table {
        true => attributes::descriptor_table(process)?,
        false => Bytes::new(),
    };
    let timers = !answers.posix_timers.is_empty();
    let one_label =
        looks.iter().all(|look| Some(&look.told.label) == looks.first().map(|it| &it.told.label));
    let answers_of_threads = ask_threads(process, &looks, facts, one_label)?;
    let seen = restored.into_iter().zip(registrations).zip(looks);
    let seen =
        seen.map(|(((registers, restart), rseq), look)| Seen { registers, restart, rseq, look });
    let mut threads = Vec::with_capacity(process.threads.len());
    for ((index, seen), answers) in seen.enumerate().zip(answers_of_threads) {
        threads.push(describe_thread(process, index, answers, seen, timers, common)?);
    }
    process.unmap_arena()?;

    let layout = proc::layout(stat);
    let identity = identity(status)?;
    // A session from outside is not the container's to change.
    let own_session = identity.session != 0;
    let alive = Alive {
        space: space.0,
        mappings,
        layout: record::Layout {
            start_code: layout.start_code,
            end_code: layout.end_code,
            start_data: layout.start_data,
            end_data: layout.end_data,
            start_brk: layout.start_brk,
            brk: answers.brk,
            start_stack: layout.start_stack,
            arg_start: layout.arg_start,
            arg_end: layout.arg_end,
            env_start: layout.env_start,
            env_end: layout.env_end,
        },
        executable: paths.executable.clone(),
        auxiliary_vector: Bytes::from(proc::auxiliary_vector(pid).map_err(what())?),
        working_directory: paths.directories.working_directory.clone(),
        umask: paths.directories.umask,
        descriptors: descriptors.list,
        locks: descriptors.locks,
        limits: proc::limits(pid).map_err(what())?,
        actions: answers.actions,
        pending: pending(process.threads.first().map_or(pid, |thread| thread.tid), Queue::Process)?,
        interval_timers: answers.interval_timers,
        posix_timers: answers.posix_timers,
        stopped: process
            .threads
            .iter()
            .find(|thread| thread.group_stop != 0)
            // Whether its parent knows is asked of the parent, later.
            .map(|thread| record::Stopped { signal: thread.group_stop, reported: true }),
        dumpable: answers.dumpable,
        subreaper: answers.subreaper,
        membarrier: answers.membarrier,
        vector_features: answers.vector_features,
        oom_score_adjust: attribute(pid, "oom_score_adj")?.parse().unwrap_or(0),
        memory: record::MemoryAttributes { lock_future, ..answers.memory },
        personality: u32::from_str_radix(&attribute(pid, "personality")?, 16).unwrap_or(0),
        exit_signal: stat.exit_signal.unwrap_or(libc::SIGCHLD),
        threads,
        sharing,
        continued: false,
        root_directory: paths.directories.root_directory.clone(),
        removed_directory: paths.directories.removed_directory,
        ended_directory: paths.ended_directory.clone(),
        nameless_executable: paths.nameless_executable,
        dump_filter: attributes::dump_filter(pid),
        descriptor_table,
        autogroup_nice: if own_session { attributes::autogroup_nice(pid) } else { 0 },
    };
    Ok(record::Process { state: ProcessState::Alive(Box::new(alive)), ..identity })
}

/// For each child, as `parent` numbers it, whether a wait for such an event (`WSTOPPED`, `WCONTINUED`) would report one. No wait is
/// used up.
pub(crate) fn would_report(
    parent: &mut Process,
    children: &[(i32, i32)],
) -> Result<Vec<bool>, TraceeError> {
    /// What fits on a tape with room to spare.
    const AT_ONCE: usize = 512;
    parent.map_arena(None)?;
    let mut reports = Vec::with_capacity(children.len());
    for children in children.chunks(AT_ONCE) {
        let mut tape = parent.tape()?;
        let mut answers = Vec::new();
        for (child, event) in children {
            let information = tape.output(SIGINFO_BYTES);
            let arguments =
                wait_for(*child, information.address, event | libc::WNOHANG | libc::WNOWAIT);
            tape.call("ask for events of a child", libc::SYS_waitid, arguments);
            answers.push(information);
        }
        parent.run_all(0, &tape, End::Call)?;
        for answer in answers {
            // `si_signo`, which stays 0 where there is nothing to report.
            reports.push(parent.output(answer)?.starts_with(&libc::SIGCHLD.to_le_bytes()));
        }
    }
    parent.unmap_arena()?;
    Ok(reports)
}

/// Uses up the report that a child has stopped.
pub(crate) fn take_stop_report(parent: &mut Process, child: i32) -> Result<(), TraceeError> {
    let mut tape = parent.tape()?;
    let arguments = wait_for(child, 0, libc::WSTOPPED | libc::WNOHANG);
    tape.call("take note of a stopped child", libc::SYS_waitid, arguments);
    parent.run_all(0, &tape, End::Breakpoint)?;
    Ok(())
}

fn wait_for(child: i32, information: u64, flags: i32) -> [u64; 6] {
    let (kind, child) = (u64::from(libc::P_PID), u64::from(child.unsigned_abs()));
    // A child counts whatever signal its end will send.
    let flags = flags | libc::__WALL;
    [kind, child, information, u64::from(flags.unsigned_abs()), 0, 0]
}

pub(crate) fn collect_zombie(pid: Pid) -> Result<record::Process, CaptureError> {
    let what = || read(format!("process {pid} in /proc"));
    let status = proc::status(pid).map_err(what())?;
    let stat = proc::stat(pid).map_err(what())?;
    let state = ProcessState::Zombie {
        exit_status: stat.exit_code.unwrap_or(0),
        exit_signal: stat.exit_signal.unwrap_or(libc::SIGCHLD),
        uid: status.uids[0],
    };
    Ok(record::Process { state, ..identity(&status)? })
}

/// The ids of a process in the innermost namespace; the state is the caller's to set.
fn identity(status: &proc::Status) -> Result<record::Process, CaptureError> {
    let last = |list: &[i32]| list.last().copied().unwrap_or(0);
    let inner = last(&status.nspid);
    let parent =
        if inner == 1 { 0 } else { inner_pid(status.ppid).map_err(read("a parent process"))? };
    Ok(record::Process {
        pid: inner,
        parent,
        group: last(&status.nspgid),
        session: last(&status.nssid),
        name: Bytes::from(status.name.clone()),
        state: ProcessState::Zombie { exit_status: 0, exit_signal: 0, uid: 0 },
    })
}

/// Sorts processes so that each comes after its parent.
pub(crate) fn parents_first(mut processes: Vec<record::Process>) -> Vec<record::Process> {
    processes.sort_by_key(|process| process.pid);
    let mut sorted: Vec<record::Process> = Vec::with_capacity(processes.len());
    while !processes.is_empty() {
        let (ready, waiting): (Vec<_>, Vec<_>) = processes.into_iter().partition(|process| {
            process.parent == 0 || sorted.iter().any(|earlier| earlier.pid == process.parent)
        });
        if ready.is_empty() {
            // Only a broken capsule has processes whose parents are missing; they are kept for whoever checks.
            sorted.extend(waiting);
            break;
        }
        sorted.extend(ready);
        processes = waiting;
    }
    sorted
}

/// Notes what of a process can't be saved.
fn check(pid: Pid, status: &proc::Status, tables: &mut Tables<'_>) -> Result<(), CaptureError> {
    let init = tables.request.init;
    for kind in ["ipc", "mnt", "net", "uts", "user", "cgroup", "time"] {
        if pid == init {
            break;
        }
        let (Ok(own), Ok(init)) = (proc::namespace(pid, kind), proc::namespace(init, kind)) else {
            continue;
        };
        if own != init {
            tables.refuse(
                pid,
                Place::Process,
                format!("it has a {kind} namespace of its own, which is not supported"),
            );
        }
    }
    for kind in ["pid", "time"] {
        let own = proc::namespace(pid, kind).ok();
        let children = proc::namespace(pid, &format!("{kind}_for_children")).ok();
        // A pid namespace without a process does not show.
        if own != children {
            let what =
                format!("it has a {kind} namespace for its children, which is not supported");
            tables.refuse(pid, Place::Process, what);
        }
    }
    let cgroups = |pid| proc::attribute(pid, "cgroup").ok();
    if pid != init && cgroups(pid) != cgroups(init) {
        let what = "it is in another cgroup than the container's init, which is not supported";
        tables.refuse(pid, Place::Process, what);
    }
    let layers = |pid: Pid| proc::status(pid).map_or(0, |status| status.nspid.len());
    if pid != init && status.nspid.len() != layers(init) {
        tables.refuse(pid, Place::Process, "it is in a nested pid namespace");
    }
    Ok(())
}

/// What `/proc` appends to the path of what has been removed.
const REMOVED: &[u8] = b" (deleted)";

/// Finds the program and the directories of a process, and notes which of them can't be found again.
fn paths(pid: Pid, status: &proc::Status, tables: &mut Tables<'_>) -> Result<Paths, CaptureError> {
    let (mut executable, identity, metadata) = look(pid, "exe")?;
    let mut nameless_executable = None;
    if tables.root.identity(&executable).ok() != Some(identity) {
        let file = format!("/proc/{pid}/exe");
        let before = executable.strip_suffix(REMOVED).filter(|_| metadata.nlink() == 0);
        match before.map(<[u8]>::to_vec) {
            Some(path) if path.starts_with(b"/memfd:") => {
                let name = path.strip_prefix(b"/memfd:").unwrap_or_default();
                let memory = tables.shared_memory(identity, &file, Some(name))?;
                nameless_executable = Some(NamelessExecutable::SharedMemory { memory });
            }
            Some(path) => {
                let place = Path::new(OsStr::from_bytes(&executable));
                let file = tables.unlinked(identity, &file, place, &metadata)?;
                nameless_executable = Some(NamelessExecutable::Unlinked { file });
                executable = Bytes::from(path);
            }
            None => {
                let path = String::from_utf8_lossy(&executable).into_owned();
                let what = format!("its program {path} is no longer at its path");
                tables.refuse(pid, Place::Process, what);
            }
        }
    }
    let (directories, ended_directory) = directories(pid, pid, status, tables)?;
    Ok(Paths { executable, nameless_executable, directories, ended_directory })
}

/// Finds the directories of a thread, and notes which of them can't be found again.
fn directories(
    pid: Pid,
    tid: Pid,
    status: &proc::Status,
    tables: &mut Tables<'_>,
) -> Result<(Directories, Option<EndedDirectory>), CaptureError> {
    let place = if tid == pid { Place::Process } else { Place::Thread(tid) };
    let (mut root_directory, identity, _) = look(tid, "root")?;
    let shown = String::from_utf8_lossy(&root_directory).into_owned();
    if root_directory.as_slice() == b"/" {
        root_directory.clear();
    } else if tables.root.identity(&root_directory).ok() != Some(identity) {
        let what = format!("its root directory {shown} is no longer at its path");
        tables.refuse(pid, place, what);
    }
    let (mut working_directory, identity, metadata) = look(tid, "cwd")?;
    let mut removed_directory = None;
    let link = format!("/proc/{tid}/cwd");
    let ended = procfiles::ended_directory(&link, &working_directory, identity, tables)?;
    let mut ended_directory = None;
    if let Some(ended) = ended {
        let is_elsewhere = tid != pid || !root_directory.is_empty();
        match ended {
            Ok(_) if is_elsewhere => {
                let what = "a working directory of an ended process is not supported of a thread that has directories of its own, or beside a root directory";
                tables.refuse(pid, place, what);
            }
            Ok(ended) => ended_directory = Some(ended),
            Err(what) => tables.refuse(pid, place, what),
        }
    } else if metadata.nlink() == 0 {
        let found = directories::collect_unlinked(&link, &working_directory, &metadata, tables)?;
        removed_directory = Some(found);
    } else if let Some(path) = tables.path_of(identity, &working_directory)? {
        working_directory = path;
    } else {
        let path = String::from_utf8_lossy(&working_directory).into_owned();
        let what = format!("its working directory {path} has no name in the container");
        tables.refuse(pid, place, what);
    }
    let umask = status.umask.unwrap_or(0o022);
    let directories = Directories { root_directory, working_directory, removed_directory, umask };
    Ok((directories, ended_directory))
}

/// The target of a link in `/proc/TID`, device and inode of it, and the rest.
fn look(tid: Pid, file: &str) -> Result<(record::Path, (u64, u64), Metadata), CaptureError> {
    let path = format!("/proc/{tid}/{file}");
    let metadata = std::fs::metadata(&path).map_err(read(path))?;
    Ok((link(tid, file)?, (metadata.dev(), metadata.ino()), metadata))
}

/// Lets threads that were stopped inside a restartable sequence start it anew, as the kernel does after a preemption.
///
/// The kernel looks at the instruction pointer when a thread returns to user mode; it would see the engine's code there, and
/// take the sequence for finished. Returns what each thread has registered.
fn leave_critical_sections(process: &mut Process) -> Result<Vec<Option<Rseq>>, TraceeError> {
    /// Offset of `rseq_cs` in `struct rseq`, and the size of `struct rseq_cs` (linux/rseq.h).
    const SECTION: u64 = 8;
    const SECTION_BYTES: usize = 32;
    let mut registrations = Vec::with_capacity(process.threads.len());
    for index in 0..process.threads.len() {
        let Some(thread) = process.threads.get(index) else { continue };
        let tid = thread.tid;
        let rseq = thread.own.as_ref().and_then(|own| own.rseq);
        registrations.push(rseq);
        let Some(rseq) = rseq else { continue };
        let Ok(section) = process.read(rseq.address + SECTION, 8) else { continue };
        let [section] = words(&section);
        if section == 0 {
            continue;
        }
        let Ok(section) = process.read(section, SECTION_BYTES) else { continue };
        let [_, start, bytes, abort] = words(&section);
        if let Some(thread) = process.threads.get_mut(index)
            && thread.stop.rip.wrapping_sub(start) < bytes
        {
            thread.stop.rip = abort;
            ptrace::set_registers(tid, &thread.stop)
                .map_err(failed("set the registers of", tid))?;
        }
    }
    Ok(registrations)
}

/// Lets processes with the same memory, as `memory` names it, put their timespecs into different places.
pub(crate) fn part_scratch<M: Ord>(
    processes: &mut BTreeMap<Pid, Process>,
    mut memory: impl FnMut(Pid) -> M,
) {
    let mut taken: BTreeMap<M, usize> = BTreeMap::new();
    for (pid, process) in processes {
        let taken = taken.entry(memory(*pid)).or_default();
        process.scratch_taken = *taken;
        *taken += process.threads.len();
    }
}

/// Corrects the interrupted calls of all threads of a process that will be thawed.
pub(crate) fn mend_for_thaw(
    process: &mut Process,
    elapsed: &BTreeMap<Pid, Slept>,
) -> Result<(), TraceeError> {
    let corrections: Vec<(Registers, Restart)> = process
        .threads
        .iter()
        .map(|thread| corrected(process, thread, Goal::Thaw, elapsed))
        .collect();
    for thread in &process.threads {
        if let Some((address, before)) = elapsed.get(&thread.tid).and_then(|slept| slept.remainder)
        {
            process.write(address, &before)?;
        }
    }
    for thread in &mut process.threads {
        let since = elapsed.get(&thread.tid).and_then(|slept| slept.since);
        if let (Some((fd, direction)), Some(since)) = (restart::socket_wait(&thread.stop), since) {
            // A socket that can't be asked is one that the program closed while it waited.
            thread.expires = sockets::timeout(process.pid, fd, direction)
                .ok()
                .filter(|timeout| !timeout.is_zero())
                .and_then(|timeout| since.checked_add(timeout));
        }
    }
    let places = process.scratch_for(corrections.iter().map(|(_, restart)| *restart))?;
    for (thread, ((mut registers, restart), place)) in
        process.threads.iter_mut().zip(corrections.into_iter().zip(places))
    {
        if let (Restart::Timespec { argument, .. }, Some(address)) = (restart, place) {
            restart::point_at(&mut registers, argument, address);
        }
        if registers != thread.stop {
            thread.stop = registers;
            let tid = thread.tid;
            ptrace::set_registers(tid, &registers).map_err(failed("set the registers of", tid))?;
        }
    }
    Ok(())
}

fn corrected(
    process: &Process,
    thread: &Thread,
    goal: Goal,
    elapsed: &BTreeMap<Pid, Slept>,
) -> (Registers, Restart) {
    let is_ours = |address| process.is_scratch(address);
    let before_call = restart::in_call(&thread.stop, &|address| process.is_call(address), &is_ours);
    let mut registers = before_call.unwrap_or(thread.stop);
    let elapsed_ns = elapsed.get(&thread.tid).map_or(0, |slept| slept.elapsed_ns);
    let read = |address| process.read(address, 16).ok().and_then(|bytes| bytes.try_into().ok());
    let restart = restart::shorten(&mut registers, goal, elapsed_ns, &read, &is_ours);
    (registers, restart)
}

/// What only the process itself can ask the kernel.
struct Answers {
    actions: Vec<SignalAction>,
    interval_timers: [IntervalTimer; 3],
    posix_timers: Vec<PosixTimer>,
    brk: u64,
    dumpable: bool,
    subreaper: bool,
    membarrier: u32,
    vector_features: u64,
    has_descriptor_table: bool,
    /// Without what is locked.
    memory: record::MemoryAttributes,
}

impl Answers {
    fn ask(
        process: &mut Process,
        timers: &[PosixTimer],
        clocks_read: Instant,
        mappings: &mut [record::Mapping],
    ) -> Result<Answers, TraceeError> {
        /// Mappings that are asked for with all else; of others there are tapes of their own.
        const MAPPINGS_MAX: usize = 512;
        let posix_timers = posix_timers(process, timers, clocks_read)?;
        let mut tape = process.tape()?;
        let actions: Vec<Output> = (1..=SIGNALS)
            .map(|signal| {
                let output = tape.output(SIGACTION_BYTES);
                let arguments = [u64::from(signal), 0, output.address, 8, 0, 0];
                tape.call("ask for a signal action", libc::SYS_rt_sigaction, arguments);
                output
            })
            .collect();
        let timers: Vec<Output> = (0..3)
            .map(|which| {
                let output = tape.output(ITIMERVAL_BYTES);
                tape.call(
                    "ask for an interval timer",
                    libc::SYS_getitimer,
                    [which, output.address, 0, 0, 0, 0],
                );
                output
            })
            .collect();
        let subreaper = tape.output(8);
        prctl(&mut tape, libc::PR_GET_CHILD_SUBREAPER, subreaper.address);
        let dumpable = tape.len();
        prctl(&mut tape, libc::PR_GET_DUMPABLE, 0);
        let membarrier = tape.len();
        // An error before Linux 6.3, where nothing tells.
        let query = [MEMBARRIER_CMD_GET_REGISTRATIONS, 0, 0, 0, 0, 0];
        tape.try_call("ask for its membarrier registrations", libc::SYS_membarrier, query);
        let features = tape.output(8);
        let query = [ARCH_GET_XCOMP_PERM, features.address, 0, 0, 0, 0];
        tape.try_call("ask for its vector features", libc::SYS_arch_prctl, query);
        let memory = tape.len();
        for operation in [PR_GET_MDWE, PR_GET_THP_DISABLE, PR_GET_MEMORY_MERGE] {
            // A kernel that does not know the one or other has nothing to tell of it.
            let query = [operation, 0, 0, 0, 0, 0];
            tape.try_call("ask for an attribute of its memory", libc::SYS_prctl, query);
        }
        let brk = tape.len();
        tape.call("ask for its break", libc::SYS_brk, [0; 6]);
        let descriptor_table = tape.len();
        attributes::ask_for_descriptor(&mut tape);
        let (mappings, others) = mappings.split_at_mut(MAPPINGS_MAX.min(mappings.len()));
        let policies = memory::ask_policies(&mut tape, mappings);
        let results = process.run_all(0, &tape, End::Call)?;
        let asked = clocks_read.elapsed();
        memory::set_policies(process, mappings, policies)?;
        let result = |index: usize| results.get(index).copied().unwrap_or(0);

        let attribute = |index: usize| -> u32 {
            let value = Call::outcome(result(memory + index)).ok();
            value.and_then(|value| u32::try_from(value).ok()).unwrap_or(0)
        };
        let memory = record::MemoryAttributes {
            lock_future: 0,
            deny_write_execute: attribute(0),
            no_huge_pages: attribute(1),
            merge: attribute(2) != 0,
        };
        let mut table = Vec::new();
        for output in actions {
            let [handler, flags, restorer, mask] = words(&process.output(output)?);
            table.push(SignalAction { handler, flags, restorer, mask });
        }
        let mut interval_timers = [IntervalTimer::default(); 3];
        for (timer, output) in interval_timers.iter_mut().zip(timers) {
            let [interval_s, interval_us, rest_s, rest_us] = words(&process.output(output)?);
            let us = |seconds: u64, us: u64| seconds.saturating_mul(1_000_000).saturating_add(us);
            *timer = IntervalTimer {
                interval_us: us(interval_s, interval_us),
                rest_us: us(rest_s, rest_us),
            };
        }
        let [real, _, _] = &mut interval_timers;
        real.rest_us = timers::left(real.rest_us, asked.as_micros());
        let [subreaper] = words(&process.output(subreaper)?);
        let [vector_features] = words(&process.output(features)?);
        for mappings in others.chunks_mut(MAPPINGS_MAX) {
            let mut tape = process.tape()?;
            let policies = memory::ask_policies(&mut tape, mappings);
            process.run_all(0, &tape, End::Call)?;
            memory::set_policies(process, mappings, policies)?;
        }
        Ok(Answers {
            actions: table,
            interval_timers,
            posix_timers,
            brk: result(brk),
            // 2 (root only) can't be set by anybody but the kernel; it counts as not dumpable.
            dumpable: result(dumpable) == 1,
            subreaper: subreaper & 0xffff_ffff != 0,
            membarrier: Call::outcome(result(membarrier))
                .ok()
                .and_then(|commands| u32::try_from(commands).ok())
                .unwrap_or(0),
            vector_features,
            has_descriptor_table: Call::outcome(result(descriptor_table))
                .is_ok_and(|bytes| bytes > 0),
            memory,
        })
    }
}

/// The timers of a process with their times.
fn posix_timers(
    process: &mut Process,
    timers: &[PosixTimer],
    clocks_read: Instant,
) -> Result<Vec<PosixTimer>, TraceeError> {
    /// What fits on a tape with room to spare.
    const AT_ONCE: usize = 1024;
    let mut timers = timers.to_vec();
    for group in timers.chunks_mut(AT_ONCE) {
        let mut tape = process.tape()?;
        let outputs: Vec<Output> = group
            .iter()
            .map(|timer| {
                let output = tape.output(timers::ITIMERSPEC_BYTES);
                let id = u64::from(timer.id.unsigned_abs());
                let arguments = [id, output.address, 0, 0, 0, 0];
                tape.call("ask for a timer", libc::SYS_timer_gettime, arguments);
                output
            })
            .collect();
        process.run_all(0, &tape, End::Call)?;
        let asked = clocks_read.elapsed();
        for (timer, output) in group.iter_mut().zip(outputs) {
            timers::set_times(timer, words(&process.output(output)?), asked);
        }
    }
    Ok(timers)
}

/// What a thread has been asked by a tape that is yet to run.
struct ThreadQuestions {
    stack: Output,
    clear: Output,
    death: Output,
    slack: usize,
    bits: usize,
    io_priority: usize,
    mode: Output,
    nodes: Output,
    attributes: attributes::Questions,
}

impl ThreadQuestions {
    fn ask(tape: &mut Tape) -> ThreadQuestions {
        let stack = tape.output(STACK_BYTES);
        let arguments = [0, stack.address, 0, 0, 0, 0];
        tape.call("ask for its alternate stack", libc::SYS_sigaltstack, arguments);
        let clear = tape.output(8);
        prctl(
            tape,
            libc::c_int::try_from(PR_GET_TID_ADDRESS).expect("a small number"),
            clear.address,
        );
        let death = tape.output(8);
        prctl(tape, libc::PR_GET_PDEATHSIG, death.address);
        let slack = tape.len();
        prctl(tape, libc::PR_GET_TIMERSLACK, 0);
        let bits = tape.len();
        prctl(tape, libc::PR_GET_SECUREBITS, 0);
        let io_priority = tape.len();
        let arguments = [IOPRIO_WHO_PROCESS, 0, 0, 0, 0, 0];
        tape.call("ask for its I/O priority", libc::SYS_ioprio_get, arguments);
        let mode = tape.output(8);
        let nodes = tape.output(NODE_WORDS * 8);
        let query = [mode.address, nodes.address, NODES_MAX, 0, 0, 0];
        // A kernel without NUMA has no such call.
        tape.try_call("ask for its memory policy", libc::SYS_get_mempolicy, query);
        let attributes = attributes::Questions::ask(tape);
        ThreadQuestions { stack, clear, death, slack, bits, io_priority, mode, nodes, attributes }
    }
}

/// What a thread goes on with where it is restored, and what has been seen of it.
struct Seen {
    registers: Registers,
    restart: Restart,
    rseq: Option<Rseq>,
    look: ExaminedThread,
}

/// What a thread alone can tell.
#[derive(Clone, Debug)]
struct ThreadAnswers {
    alternate_stack: AlternateStack,
    clear_child_tid: u64,
    parent_death_signal: i32,
    timer_slack_ns: u64,
    secure_bits: u32,
    io_priority: u32,
    memory_policy: Option<(u32, Vec<u64>)>,
    attributes: ThreadAttributes,
}

impl ThreadAnswers {
    /// What the calls of a tape have returned and written.
    fn of(
        process: &Process,
        index: usize,
        questions: &ThreadQuestions,
        results: &[u64],
    ) -> Result<ThreadAnswers, CaptureError> {
        let ThreadQuestions {
            stack,
            clear,
            death,
            slack,
            bits,
            io_priority,
            mode,
            nodes,
            attributes,
        } = questions;
        let result = |index: usize| results.get(index).copied().unwrap_or(0);
        if let Some(what) = attributes.kept_keys(process, results)? {
            let tid = process.threads.get(index).map_or(process.pid, |thread| thread.tid);
            return Err(unsupported(process.pid, Place::Thread(tid), what));
        }
        let [address, flags, bytes] = words(&process.output(*stack)?);
        let [clear_child_tid] = words(&process.output(*clear)?);
        let [death] = words(&process.output(*death)?);
        let [mode] = words(&process.output(*mode)?);
        let mode = low_int(mode).cast_unsigned();
        let nodes: [u64; NODE_WORDS] = words(&process.output(*nodes)?);
        Ok(ThreadAnswers {
            alternate_stack: AlternateStack { address, flags: low_int(flags), bytes },
            clear_child_tid,
            parent_death_signal: low_int(death),
            timer_slack_ns: result(*slack),
            secure_bits: u32::try_from(result(*bits)).unwrap_or(0),
            io_priority: u32::try_from(result(*io_priority)).unwrap_or(0),
            memory_policy: (mode != 0).then(|| (mode, nodes.to_vec())),
            attributes: attributes.answers(process, results)?,
        })
    }

    /// Those of a thread that is like this one but for what is known of it.
    fn like(&self, facts: &ThreadFacts) -> ThreadAnswers {
        let (address, bytes, flags) = facts.alternate_stack;
        let none = if bytes == 0 { libc::SS_DISABLE } else { 0 };
        ThreadAnswers {
            alternate_stack: AlternateStack { address, flags: flags.cast_signed() | none, bytes },
            clear_child_tid: facts.clear_child_tid,
            parent_death_signal: facts.parent_death_signal.cast_signed(),
            timer_slack_ns: facts.timer_slack_ns,
            ..self.clone()
        }
    }
}

/// What each thread of a process tells, in order. Those that are like the first one are not asked.
fn ask_threads(
    process: &mut Process,
    looks: &[ExaminedThread],
    facts: &BTreeMap<Pid, ThreadFacts>,
    one_label: bool,
) -> Result<Vec<ThreadAnswers>, CaptureError> {
    let facts = process.threads.iter().map(|thread| facts.get(&thread.tid).copied());
    let facts: Vec<Option<ThreadFacts>> = facts.collect();
    let first = facts.first().copied().flatten();
    let scheduling = |index: usize| {
        let told = &looks.get(index)?.told;
        Some((told.scheduling.policy, told.scheduling.nice))
    };
    // Where labels differ, what one thread may do another one may not.
    let is_like_first = |index: usize, facts: &Option<ThreadFacts>| match (first, facts) {
        (Some(first), Some(facts)) => {
            let same = first.likeness == facts.likeness && scheduling(0) == scheduling(index);
            index > 0 && one_label && same
        }
        _ => false,
    };
    let mut asked: Vec<usize> = Vec::new();
    let mut alike: Vec<(usize, ThreadFacts)> = Vec::new();
    for (index, facts) in facts.iter().enumerate() {
        match facts.filter(|_| is_like_first(index, facts)) {
            Some(facts) => alike.push((index, facts)),
            None => asked.push(index),
        }
    }
    let mut told: BTreeMap<usize, ThreadAnswers> = BTreeMap::new();
    for some in asked.chunks(if one_label { asked.len().max(1) } else { 1 }) {
        if !one_label {
            process.may_signal = None;
        }
        process.run_each(some, ThreadQuestions::ask, |process, index, questions, results| {
            let answers = ThreadAnswers::of(process, index, &questions, &results)?;
            told.insert(index, answers);
            Ok::<(), CaptureError>(())
        })?;
    }
    if let Some(first) = told.get(&0).cloned() {
        told.extend(alike.iter().map(|(index, facts)| (*index, first.like(facts))));
    }
    Ok(told.into_values().collect())
}

/// Describes a thread that has answered.
fn describe_thread(
    process: &Process,
    index: usize,
    answers: ThreadAnswers,
    seen: Seen,
    timers: bool,
    common: &Common,
) -> Result<record::Thread, CaptureError> {
    let Seen { registers, restart, rseq, look } = seen;
    let pid = process.pid;
    let Some(thread) = process.threads.get(index) else {
        return Err(TraceeError::NoRoom { pid, why: "it has no such thread" }.into());
    };
    let tid = thread.tid;
    let what = || read(format!("thread {tid} in /proc"));
    let ExaminedThread { told, vectors, own_directories } = look;
    let Told { status, label, login_user, scheduling, affinity, robust_list } = told;
    // Only a timer for the thread itself can have sent it a signal since; what comes from outside comes after the capture.
    let pends = status.sigpnd != 0 || timers;
    let nice = match sched::is_fair(scheduling.policy) {
        true => scheduling.nice,
        false => i32::try_from(proc::stat(tid).map_err(what())?.nice).unwrap_or(0),
    };
    let slice_ns = scheduling.slice_ns();
    Ok(record::Thread {
        tid: status.nspid.last().copied().unwrap_or(tid),
        name: Bytes::from(status.name),
        registers: to_record(&registers),
        xstate: Bytes::from(vectors),
        signal_mask: thread.mask,
        pending: match pends {
            true => pending(tid, Queue::Thread)?,
            false => Vec::new(),
        },
        alternate_stack: answers.alternate_stack,
        clear_child_tid: answers.clear_child_tid,
        robust_list,
        rseq: rseq.map(|rseq| record::Rseq {
            address: rseq.address,
            bytes: rseq.bytes,
            signature: rseq.signature,
        }),
        credentials: Credentials {
            uids: status.uids,
            gids: status.gids,
            groups: status.groups,
            inheritable: status.capinh,
            permitted: status.capprm,
            effective: status.capeff,
            bounding: status.capbnd,
            ambient: status.capamb,
            secure_bits: answers.secure_bits,
        },
        scheduling: Scheduling {
            policy: scheduling.policy,
            priority: scheduling.priority,
            nice,
            reset_on_fork: scheduling.resets_on_fork(),
            io_priority: answers.io_priority,
            memory_policy: answers.memory_policy,
            affinity: if affinity == common.processors { Vec::new() } else { affinity },
            // That of the engine is the one of who has asked for none.
            slice_ns: if slice_ns == common.slice_ns { 0 } else { slice_ns },
        },
        parent_death_signal: answers.parent_death_signal,
        timer_slack_ns: answers.timer_slack_ns,
        seccomp: seccomp(tid, status.seccomp)?,
        no_new_privileges: status.nonewprivs,
        restart,
        own_directories,
        attributes: ThreadAttributes { label, login_user, ..answers.attributes },
    })
}

/// All filters of a thread, oldest first.
fn seccomp(tid: Pid, mode: u32) -> Result<Seccomp, CaptureError> {
    /// The kernel bounds the sum of all filters to 32768 instructions (kernel/seccomp.c, MAX_INSNS_PER_PATH).
    const FILTERS_MAX: usize = 32 << 10;
    match mode {
        0 => return Ok(Seccomp::Off),
        SECCOMP_STRICT => return Ok(Seccomp::Strict),
        _ => {}
    }
    let mut filters = Vec::new();
    // The kernel counts from the oldest one (kernel/seccomp.c, get_nth_filter).
    for index in 0..FILTERS_MAX {
        let program = ptrace::seccomp_filter(tid, index)
            .map_err(failed("read the seccomp filters of", tid))?;
        let Some(program) = program else { break };
        let flags = ptrace::seccomp_filter_flags(tid, index)
            .map_err(failed("read the seccomp filters of", tid))?;
        filters.push(SeccompFilter { program: Bytes::from(program), flags });
    }
    Ok(Seccomp::Filters(filters))
}

fn pending(tid: Pid, queue: Queue) -> Result<Vec<Bytes>, TraceeError> {
    let signals =
        ptrace::pending(tid, queue).map_err(failed("read the pending signals of", tid))?;
    Ok(signals.into_iter().map(|info| Bytes::from(info.to_vec())).collect())
}

/// Appends `prctl(operation, argument)`.
pub(crate) fn prctl(tape: &mut Tape, operation: libc::c_int, argument: u64) {
    let arguments = [u64::from(operation.unsigned_abs()), argument, 0, 0, 0, 0];
    tape.call(format!("do prctl {operation}"), libc::SYS_prctl, arguments);
}

pub(crate) fn words<const N: usize>(bytes: &[u8]) -> [u64; N] {
    let mut words = [0; N];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_le_bytes(bytes.try_into().expect("chunks of eight bytes"));
    }
    words
}

/// The `int` in the low half of a word.
pub(crate) fn low_int(word: u64) -> i32 {
    let [a, b, c, d, ..] = word.to_le_bytes();
    i32::from_le_bytes([a, b, c, d])
}

macro_rules! copy_registers {
    ($from:expr => $to:path) => {{
        let from = $from;
        $to {
            r15: from.r15,
            r14: from.r14,
            r13: from.r13,
            r12: from.r12,
            rbp: from.rbp,
            rbx: from.rbx,
            r11: from.r11,
            r10: from.r10,
            r9: from.r9,
            r8: from.r8,
            rax: from.rax,
            rcx: from.rcx,
            rdx: from.rdx,
            rsi: from.rsi,
            rdi: from.rdi,
            orig_rax: from.orig_rax,
            rip: from.rip,
            cs: from.cs,
            eflags: from.eflags,
            rsp: from.rsp,
            ss: from.ss,
            fs_base: from.fs_base,
            gs_base: from.gs_base,
            ds: from.ds,
            es: from.es,
            fs: from.fs,
            gs: from.gs,
        }
    }};
}

fn to_record(registers: &Registers) -> record::Registers {
    copy_registers!(registers => record::Registers)
}

pub(crate) fn from_record(registers: &record::Registers) -> Registers {
    copy_registers!(registers => Registers)
}

/// What a restored container is allowed, from its new configuration. Nothing goes beyond it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confinement {
    /// Capabilities that any thread may have.
    pub bounding: u64,
    /// The configuration demands no_new_privs.
    pub no_new_privileges: bool,
    pub seccomp: SeccompPolicy,
    /// The profile of AppArmor that the configuration demands; empty for none.
    pub app_armor_profile: String,
}

/// How the filter that the configuration demands relates to those in the capsule: the first `drop` of those were the old
/// configuration's, and `program`, which is empty if none is demanded, takes their place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SeccompPolicy {
    pub drop: usize,
    pub program: Vec<u8>,
}

/// Gives a process the name, the boundaries and the program that the kernel shows for it.
///
/// Comes before its files are mapped: the kernel replaces the program only while nothing maps the old one, which may be the same.
pub(crate) fn set_layout(
    process: &mut Process,
    channel: &mut Channel,
    alive: &Alive,
    root: &Root,
    shared: &Shared,
) -> Result<(), RestoreError> {
    const PR_SET_MM_MAP_BYTES: u64 = 104;
    let executable = match alive.nameless_executable {
        None => open_below(root, &alive.executable, libc::O_RDONLY)?,
        Some(nameless) => {
            let object = match nameless {
                NamelessExecutable::Unlinked { file } => shared.unlinked.get(file as usize),
                NamelessExecutable::SharedMemory { memory } => shared.memory.get(memory as usize),
            };
            let object = object
                .ok_or_else(|| RestoreError::Damaged("a program's file is not there".to_owned()))?;
            Shared::reopen(object, libc::O_RDONLY).map_err(make("the file of a program"))?
        }
    };
    let numbers = channel.send(process, &[executable.as_fd()])?;
    let executable = numbers.first().map_or(0, |number| number.unsigned_abs());
    let mut tape = process.tape()?;
    let layout = layout_words(alive, executable, &mut tape);
    let set_map = u64::from(libc::PR_SET_MM_MAP.unsigned_abs());
    let arguments =
        [u64::from(libc::PR_SET_MM.unsigned_abs()), set_map, layout, PR_SET_MM_MAP_BYTES, 0, 0];
    tape.call("set the layout of its memory", libc::SYS_prctl, arguments);
    tape.call("close a descriptor", libc::SYS_close, [executable.into(), 0, 0, 0, 0, 0]);
    process.run_all(0, &tape, End::Breakpoint)?;
    Ok(())
}

/// Gives a process all but its memory, its descriptors, its confinement and its registers.
pub(crate) fn furnish(
    process: &mut Process,
    channel: &mut Channel,
    alive: &Alive,
    root: &Root,
    shared: &Shared,
) -> Result<(), RestoreError> {
    let directories = Directories {
        root_directory: alive.root_directory.clone(),
        working_directory: alive.working_directory.clone(),
        removed_directory: alive.removed_directory,
        umask: alive.umask,
    };
    // Threads that share nothing with the process there have to part from it first.
    for (index, thread) in alive.threads.iter().enumerate().skip(1) {
        if let Some(directories) = &thread.own_directories {
            let working = working_directory(directories, root, shared)?;
            go_to(process, channel, index, directories, Some(working), root)?;
        }
    }
    let working = match &alive.ended_directory {
        None => Some(working_directory(&directories, root, shared)?),
        // It is there already.
        Some(_) => None,
    };
    go_to(process, channel, 0, &directories, working, root)?;
    let mut tape = process.tape()?;
    prctl(&mut tape, libc::PR_SET_CHILD_SUBREAPER, alive.subreaper.into());
    for command in (0..u32::BITS).map(|bit| 1 << bit).filter(|bit| alive.membarrier & bit != 0) {
        let arguments = [u64::from(command), 0, 0, 0, 0, 0];
        tape.call("register for membarrier", libc::SYS_membarrier, arguments);
    }
    if alive.vector_features >> TILE_DATA & 1 == 1 {
        let arguments = [ARCH_REQ_XCOMP_PERM, TILE_DATA, 0, 0, 0, 0];
        tape.call("ask for tile registers", libc::SYS_arch_prctl, arguments);
    }
    let ignore = tape.words(&[libc::SIG_IGN as u64, 0, 0, 0]);
    for (signal, action) in (1u64..).zip(&alive.actions) {
        if [libc::SIGKILL, libc::SIGSTOP]
            .iter()
            .any(|fixed| u64::from(fixed.unsigned_abs()) == signal)
        {
            continue;
        }
        // Ignoring it first discards what came of the making: the ends of children are no news to the program.
        let what = format!("ignore signal {signal}");
        tape.call(what, libc::SYS_rt_sigaction, [signal, ignore, 0, 8, 0, 0]);
        set_action(&mut tape, signal, action);
    }
    process.run_all(0, &tape, End::Breakpoint)?;
    let pid = process.pid;
    let current =
        proc::attribute(pid, "oom_score_adj").map_err(make("the OOM score of a process"))?;
    if current != alive.oom_score_adjust.to_string() {
        // Lowering it needs a capability that Samara does without; the container's own value holds then.
        let path = format!("/proc/{pid}/oom_score_adj");
        if let Err(error) = std::fs::write(path, alive.oom_score_adjust.to_string()) {
            tracing::warn!(%error, pid, "the OOM score of a process stays that of the new container");
        }
    }
    attributes::restore_process(process, alive)
}

/// Lets a process work in a directory of one that is about to end. Nobody can go there afterwards.
pub(crate) fn go_to_ended(
    process: &mut Process,
    channel: &mut Channel,
    directory: &File,
) -> Result<(), RestoreError> {
    let numbers = channel.send(process, &[directory.as_fd()])?;
    let mut tape = process.tape()?;
    for number in numbers {
        let number = u64::from(number.unsigned_abs());
        let what = "change its working directory to one of an ended process";
        tape.call(what, libc::SYS_fchdir, [number, 0, 0, 0, 0, 0]);
        tape.call("close a descriptor", libc::SYS_close, [number, 0, 0, 0, 0, 0]);
    }
    process.run_all(0, &tape, End::Breakpoint)?;
    Ok(())
}

const DIRECTORY: i32 = libc::O_PATH | libc::O_DIRECTORY;

fn working_directory(
    directories: &Directories,
    root: &Root,
    shared: &Shared,
) -> Result<File, RestoreError> {
    match directories.removed_directory {
        None => open_below(root, &directories.working_directory, DIRECTORY),
        Some(number) => shared
            .directories
            .get(number as usize)
            .ok_or_else(|| RestoreError::Damaged("a working directory is not there".to_owned()))?
            .try_clone()
            .map_err(make("a working directory that has no name")),
    }
}

/// Gives a process its root, working directory and umask, or (`index` > 0) a thread its own.
fn go_to(
    process: &mut Process,
    channel: &mut Channel,
    index: usize,
    to: &Directories,
    working: Option<File>,
    root: &Root,
) -> Result<(), RestoreError> {
    let other_root = match to.root_directory.as_slice() {
        b"" => None,
        path => Some(open_below(root, path, DIRECTORY)?),
    };
    let files: Vec<_> = other_root.iter().chain(&working).map(AsFd::as_fd).collect();
    let numbers = channel.send(process, &files)?;
    let mut tape = process.tape()?;
    if index > 0 {
        let directories = u64::from(libc::CLONE_FS.unsigned_abs());
        tape.call("part from its process", libc::SYS_unshare, [directories, 0, 0, 0, 0, 0]);
    }
    let mut is_root = other_root.is_some();
    for directory in numbers {
        let directory = u64::from(directory.unsigned_abs());
        tape.call("change its working directory", libc::SYS_fchdir, [directory, 0, 0, 0, 0, 0]);
        if std::mem::take(&mut is_root) {
            let here = tape.data(b".\0");
            tape.call("change its root directory", libc::SYS_chroot, [here, 0, 0, 0, 0, 0]);
        }
        tape.call("close a descriptor", libc::SYS_close, [directory, 0, 0, 0, 0, 0]);
    }
    tape.call("set its umask", libc::SYS_umask, [to.umask.into(), 0, 0, 0, 0, 0]);
    process.run_all(index, &tape, End::Breakpoint)?;
    Ok(())
}

/// `struct prctl_mm_map` of linux/prctl.h.
fn layout_words(alive: &Alive, executable: u32, tape: &mut Tape) -> u64 {
    let auxiliary = tape.data(&alive.auxiliary_vector);
    let layout = &alive.layout;
    let bytes = alive.auxiliary_vector.len() as u64;
    tape.words(&[
        layout.start_code,
        layout.end_code,
        layout.start_data,
        layout.end_data,
        layout.start_brk,
        layout.brk,
        layout.start_stack,
        layout.arg_start,
        layout.arg_end,
        layout.env_start,
        layout.env_end,
        auxiliary,
        bytes & 0xffff_ffff | u64::from(executable) << 32,
    ])
}

/// Ends a process so that its parent finds this status, the name and the user.
pub(crate) fn bury(
    mut process: Process,
    channel: &mut Channel,
    name: &[u8],
    exit_status: i32,
    uid: u32,
) -> Result<(), RestoreError> {
    /// Of a status: a core dump was written (wait(2)).
    const CORE: i32 = 0x80;
    let (code, signal) = (exit_status >> 8 & 0xff, exit_status & 0x7f);
    let tid = process.pid;
    let grave = if exit_status & CORE == 0 {
        None
    } else {
        place_for_core().map_err(make("a place for a core dump"))?
    };
    let grave = match &grave {
        Some(directory) => channel.send(&mut process, &[directory.as_fd()])?,
        None => Vec::new(),
    };
    let mut tape = process.tape()?;
    let name = tape.data(&[name, &[0]].concat());
    prctl(&mut tape, libc::PR_SET_NAME, name);
    if uid != 0 {
        let uid = u64::from(uid);
        tape.call("set its user ids", libc::SYS_setresuid, [uid, uid, uid, 0, 0, 0]);
    }
    if let Some(directory) = grave.first() {
        let directory = u64::from(directory.unsigned_abs());
        tape.call("go where it may dump", libc::SYS_fchdir, [directory, 0, 0, 0, 0, 0]);
    }
    // Nobody wants another dump of what has ended elsewhere; where the status says that there was one, it goes to nowhere.
    prctl(&mut tape, libc::PR_SET_DUMPABLE, u64::from(!grave.is_empty()));
    process.run_all(0, &tape, End::Breakpoint)?;
    if signal == 0 {
        let mut tape = process.tape()?;
        tape.call("end", libc::SYS_exit_group, [u64::from(code.unsigned_abs()), 0, 0, 0, 0, 0]);
        return match process.run(0, &tape, End::Breakpoint) {
            Err(TraceeError::Ended { .. }) => Ok(()),
            Err(error) => Err(error.into()),
            Ok(_) => Err(RestoreError::Damaged("a process did not end".to_owned())),
        };
    }
    if !grave.is_empty() {
        proc::set_limit(tid, libc::RLIMIT_CORE, u64::MAX, u64::MAX)
            .map_err(make("the limits of a process"))?;
    }
    // It ends by the signal itself: nothing else leaves that status.
    ptrace::set_signal_mask(tid, 0).map_err(failed("set the signal mask of", tid))?;
    let handle = samara_kernel::pidfd::PidFd::open(tid).map_err(make("a handle on a process"))?;
    handle.send_signal(signal).map_err(make("the end of a process"))?;
    let mut resume = 0;
    loop {
        match ptrace::cont(tid, resume) {
            // SIGKILL does not wait to be let through.
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            other => other.map_err(failed("resume", tid))?,
        }
        resume = match wait::one(tid).map_err(failed("wait for", tid))? {
            Status::Exited(_) | Status::Killed(_) => return Ok(()),
            Status::SignalStop(signal) => signal,
            Status::EventStop(_) | Status::Event(_) | Status::SyscallStop | Status::Continued => 0,
        };
    }
}

/// A directory that nobody sees and that goes with its last user; none where this kernel writes dumps to a certain place,
/// or has a program for them.
fn place_for_core() -> io::Result<Option<OwnedFd>> {
    use rustix::mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsmount, fsopen,
    };
    let pattern = std::fs::read("/proc/sys/kernel/core_pattern")?;
    if pattern.starts_with(b"/") || pattern.starts_with(b"|") {
        tracing::warn!("a process ended with a core dump; its parent will be told of none");
        return Ok(None);
    }
    let filesystem = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_set_string(&filesystem, "mode", "1777")?;
    fsconfig_create(&filesystem)?;
    Ok(Some(fsmount(&filesystem, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?))
}

/// Gives the threads of a process their attributes, and takes the engine's privileges from them. `then` are the clocks at the
/// capture.
pub(crate) fn confine(
    process: &mut Process,
    alive: &Alive,
    confinement: &Confinement,
    then: &Clocks,
) -> Result<(), RestoreError> {
    if process.threads.len() != alive.threads.len() {
        return Err(RestoreError::Damaged("a process has other threads than were made".to_owned()));
    }
    let mut due = BTreeSet::new();
    for (index, thread) in alive.threads.iter().enumerate() {
        let mut tape = process.tape()?;
        // Threads have a personality each, and most share this one.
        let personality = thread.attributes.personality.unwrap_or(alive.personality);
        let arguments = [personality.into(), 0, 0, 0, 0, 0];
        tape.call("set its personality", libc::SYS_personality, arguments);
        attributes(&mut tape, thread);
        attributes::restore_thread(&mut tape, &thread.attributes);
        process.run_all(index, &tape, End::Breakpoint)?;
        attributes::restore_login(process, index, &thread.attributes)?;
        let own = thread.pending.iter().map(|info| (Some(thread.tid), info));
        let common = alive.pending.iter().map(|info| (None, info)).filter(|_| index == 0);
        let mut tape = process.tape()?;
        for (tid, info) in own.chain(common) {
            if timers::comes_again(info, &alive.posix_timers) {
                due.extend(timers::sender(info));
                continue;
            }
            if tid.is_some() && signal_of(info) == TRAP {
                continue;
            }
            if !tape.has_room(1, info.len()) {
                process.run_all(index, &tape, End::Breakpoint)?;
                tape = process.tape()?;
            }
            queue_signal(&mut tape, alive, tid, info);
        }
        process.run_all(index, &tape, End::Breakpoint)?;
    }
    // Each takes a place in the queue of signals, as a pending signal does, and there may be as many as the limit allows.
    timers::restore_posix(process, &alive.posix_timers, &due, then)?;
    limits(process.pid, &alive.limits)?;
    let permitted =
        proc::status(process.pid).map_err(make("the capabilities of a process"))?.capprm;
    let common = common_filters(alive, confinement);
    for filter in &common {
        install_filter(process, 0, filter, alive.threads.len() > 1)?;
    }
    // The leader last: timers and the dumpable flag belong to the process, and changing ids resets the latter.
    for (index, thread) in alive.threads.iter().enumerate().rev() {
        let mut tape = process.tape()?;
        groups(&mut tape, &thread.credentials.groups);
        // As many as the kernel allows fill a tape.
        if !tape.has_room(CREDENTIAL_CALLS, CREDENTIAL_BYTES) {
            process.run_all(index, &tape, End::Breakpoint)?;
            tape = process.tape()?;
        }
        credentials(&mut tape, thread, confinement, permitted);
        process.run_all(index, &tape, End::Breakpoint)?;
        for filter in filters(thread, confinement).iter().skip(common.len()) {
            install_filter(process, index, filter, false)?;
        }
        let mut tape = process.tape()?;
        capabilities(&mut tape, thread, confinement);
        let signal = u64::from(thread.parent_death_signal.unsigned_abs());
        prctl(&mut tape, libc::PR_SET_PDEATHSIG, signal);
        if index == 0 {
            prctl(&mut tape, libc::PR_SET_DUMPABLE, alive.dumpable.into());
            for (which, timer) in (0u64..).zip(alive.interval_timers) {
                // A periodic timer of real time stands while its signal is pending, and shows no rest: taking that winds it up.
                let stands = which == 0 && timer.interval_us != 0;
                let rest_us = match which {
                    0 if stands || timer.rest_us != 0 => {
                        let passed = clocks::passed(process.pid, then).map_err(make("a timer"))?;
                        timer.rest_us.saturating_sub(passed / 1000).max(1)
                    }
                    _ => timer.rest_us,
                };
                if rest_us != 0 {
                    let split = |us: u64| [us / 1_000_000, us % 1_000_000];
                    let [interval, rest] = [split(timer.interval_us), split(rest_us)];
                    let address = tape.words(&[interval, rest].concat());
                    tape.call(
                        "set an interval timer",
                        libc::SYS_setitimer,
                        [which, address, 0, 0, 0, 0],
                    );
                }
            }
        }
        process.run_all(index, &tape, End::Breakpoint)?;
        labels::enter_profile(process, index, &confinement.app_armor_profile)?;
    }
    Ok(())
}

/// As `siginfo` has it in its first field.
fn signal_of(info: &[u8]) -> u64 {
    info.first_chunk::<4>().map_or(0, |number| u64::from(u32::from_le_bytes(*number)))
}

/// SIGTRAP, which the breakpoints send that tapes of a restore end with.
const TRAP: u64 = libc::SIGTRAP as u64;

/// Sets what breakpoints spoil: the kernel takes away the action for SIGTRAP when one is hit while the signal is blocked, and takes
/// the breakpoint's signal for one that already waits for the thread. No breakpoint may be hit after this.
pub(crate) fn end_breakpoints(process: &mut Process, alive: &Alive) -> Result<(), RestoreError> {
    let mut tape = process.tape()?;
    if let Some(action) = (1u64..).zip(&alive.actions).find(|(signal, _)| *signal == TRAP) {
        set_action(&mut tape, TRAP, action.1);
    }
    process.run_all(0, &tape, End::Call)?;
    for (index, thread) in alive.threads.iter().enumerate() {
        for info in thread.pending.iter().filter(|info| signal_of(info) == TRAP) {
            let mut tape = process.tape()?;
            queue_signal(&mut tape, alive, Some(thread.tid), info);
            process.run_all(index, &tape, End::Call)?;
        }
    }
    Ok(())
}

fn set_action(tape: &mut Tape, signal: u64, action: &SignalAction) {
    let address = tape.words(&[action.handler, action.flags, action.restorer, action.mask]);
    let what = format!("set its action for signal {signal}");
    tape.call(what, libc::SYS_rt_sigaction, [signal, address, 0, 8, 0, 0]);
}

/// Soft and hard limits. A hard limit that may not be raised stays as the new container has it.
fn limits(pid: Pid, limits: &[(u64, u64)]) -> Result<(), RestoreError> {
    let current = proc::limits(pid).map_err(make("the limits of a process"))?;
    for (resource, ((soft, hard), (_, hard_now))) in (0u32..).zip(limits.iter().zip(current)) {
        let set = match proc::set_limit(pid, resource, *soft, *hard) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                tracing::warn!(
                    pid,
                    resource,
                    hard,
                    hard_now,
                    "a limit of a process stays lower than it was"
                );
                proc::set_limit(pid, resource, (*soft).min(hard_now), (*hard).min(hard_now))
            }
            other => other,
        };
        set.map_err(make(format!("limit {resource} of a process")))?;
    }
    Ok(())
}

/// What a thread can set without being somebody else.
fn attributes(tape: &mut Tape, thread: &record::Thread) {
    tape.call(
        "set its thread id address",
        libc::SYS_set_tid_address,
        [thread.clear_child_tid, 0, 0, 0, 0, 0],
    );
    let (head, bytes) = thread.robust_list;
    if head != 0 {
        tape.call("set its robust list", libc::SYS_set_robust_list, [head, bytes, 0, 0, 0, 0]);
    }
    let stack = thread.alternate_stack;
    // SS_ONSTACK only reports; setting it would be refused.
    let settable = stack.flags & !libc::SS_ONSTACK;
    let flags = if stack.address == 0 { libc::SS_DISABLE } else { settable };
    let address = tape.words(&[stack.address, u64::from(flags.cast_unsigned()), stack.bytes]);
    tape.call("set its alternate stack", libc::SYS_sigaltstack, [address, 0, 0, 0, 0, 0]);
    if let Some(rseq) = thread.rseq {
        let arguments = [rseq.address, rseq.bytes.into(), 0, rseq.signature.into(), 0, 0];
        tape.call("register its rseq area", libc::SYS_rseq, arguments);
    }
    let mut name = thread.name.to_vec();
    name.push(0);
    let address = tape.data(&name);
    prctl(tape, libc::PR_SET_NAME, address);
    if thread.timer_slack_ns != 0 {
        prctl(tape, libc::PR_SET_TIMERSLACK, thread.timer_slack_ns);
    }
    let scheduling = &thread.scheduling;
    if scheduling.io_priority != 0 {
        let arguments = [IOPRIO_WHO_PROCESS, 0, scheduling.io_priority.into(), 0, 0, 0];
        tape.call("set its I/O priority", libc::SYS_ioprio_set, arguments);
    }
    if let Some((mode, nodes)) = &scheduling.memory_policy {
        let nodes = tape.words(nodes);
        // Another machine has other nodes; what the policy is good for is speed.
        let arguments = [u64::from(*mode), nodes, NODES_MAX, 0, 0, 0];
        tape.try_call("set its memory policy", libc::SYS_set_mempolicy, arguments);
    }
    if scheduling.policy != 0 || scheduling.reset_on_fork {
        let priority = tape.words(&[scheduling.priority.into()]);
        let reset = if scheduling.reset_on_fork { libc::SCHED_RESET_ON_FORK } else { 0 };
        let policy = u64::from(scheduling.policy) | u64::from(reset.unsigned_abs());
        let arguments = [0, policy, priority, 0, 0, 0];
        tape.call("set its scheduling policy", libc::SYS_sched_setscheduler, arguments);
    }
    if scheduling.nice != 0 {
        let nice = i64::from(scheduling.nice).cast_unsigned();
        tape.call("set its nice value", libc::SYS_setpriority, [0, 0, nice, 0, 0, 0]);
    }
    if scheduling.slice_ns != 0 && sched::is_fair(scheduling.policy) {
        let Scheduling { policy, reset_on_fork, nice, slice_ns, .. } = *scheduling;
        let words = tape.words(&sched::slice_words(policy, reset_on_fork, nice, slice_ns));
        // Kernels that know no slices of threads take it and do nothing.
        tape.call("set its time slice", libc::SYS_sched_setattr, [0, words, 0, 0, 0, 0]);
    }
    if !scheduling.affinity.is_empty() {
        let words = sched::affinity_words(&scheduling.affinity);
        let bytes = words.len() as u64 * 8;
        let address = tape.words(&words);
        // Processors that the new machine lacks leave the thread free to run on any.
        tape.try_call(
            "set its affinity",
            libc::SYS_sched_setaffinity,
            [0, bytes, address, 0, 0, 0],
        );
    }
}

/// Queues a pending signal as it was; a thread may pretend any origin to itself.
fn queue_signal(tape: &mut Tape, alive: &Alive, tid: Option<i32>, info: &[u8]) {
    let pid = alive.threads.first().map_or(0, |thread| u64::from(thread.tid.unsigned_abs()));
    let signal = signal_of(info);
    let address = tape.data(info);
    let what = format!("queue signal {signal}");
    match tid {
        Some(tid) => {
            let arguments = [pid, u64::from(tid.unsigned_abs()), signal, address, 0, 0];
            tape.call(what, libc::SYS_rt_tgsigqueueinfo, arguments);
        }
        None => tape.call(what, libc::SYS_rt_sigqueueinfo, [pid, signal, address, 0, 0, 0]),
    }
}

/// `SECBIT_NO_SETUID_FIXUP`: changing ids leaves capabilities alone.
const NO_SETUID_FIXUP: u64 = 1 << 2;

/// More than [`credentials`] needs: a call for each capability, some more, and the two structures of capabilities.
const CREDENTIAL_CALLS: usize = 96;
const CREDENTIAL_BYTES: usize = 1024;

fn groups(tape: &mut Tape, groups: &[u32]) {
    let bytes: Vec<u8> = groups.iter().flat_map(|group| group.to_le_bytes()).collect();
    let address = tape.data(&bytes);
    let arguments = [groups.len() as u64, address, 0, 0, 0, 0];
    tape.call("set its groups", libc::SYS_setgroups, arguments);
}

/// `permitted` are the capabilities that the thread has.
fn credentials(
    tape: &mut Tape,
    thread: &record::Thread,
    confinement: &Confinement,
    permitted: u64,
) {
    let saved = &thread.credentials;
    prctl(tape, libc::PR_SET_SECUREBITS, NO_SETUID_FIXUP);
    // A capability may be inheritable that is bounded no more; only before it is bounded the kernel makes it so.
    set_capabilities(tape, [permitted, permitted, saved.inheritable & confinement.bounding]);
    let bounding = saved.bounding & confinement.bounding;
    for capability in (0..64).filter(|capability| bounding >> capability & 1 == 0) {
        // Numbers that this kernel does not know are not there to be dropped.
        let drop = u64::from(libc::PR_CAPBSET_DROP.unsigned_abs());
        tape.try_call("drop a capability", libc::SYS_prctl, [drop, capability, 0, 0, 0, 0]);
    }
    let [real, effective, set, files] = saved.gids.map(u64::from);
    tape.call("set its group ids", libc::SYS_setresgid, [real, effective, set, 0, 0, 0]);
    if files != effective {
        tape.call("set its file system group id", libc::SYS_setfsgid, [files, 0, 0, 0, 0, 0]);
    }
    let [real, effective, set, files] = saved.uids.map(u64::from);
    tape.call("set its user ids", libc::SYS_setresuid, [real, effective, set, 0, 0, 0]);
    if files != effective {
        tape.call("set its file system user id", libc::SYS_setfsuid, [files, 0, 0, 0, 0, 0]);
    }
    if thread.no_new_privileges || confinement.no_new_privileges {
        let arguments = [u64::from(libc::PR_SET_NO_NEW_PRIVS.unsigned_abs()), 1, 0, 0, 0, 0];
        tape.call("set no_new_privs", libc::SYS_prctl, arguments);
    }
}

/// The filters of a thread in the order of their installation.
fn filters(thread: &record::Thread, confinement: &Confinement) -> Vec<SeccompFilter> {
    let saved = match &thread.seccomp {
        Seccomp::Off | Seccomp::Strict => Vec::new(),
        Seccomp::Filters(filters) => filters.clone(),
    };
    let SeccompPolicy { drop, program } = &confinement.seccomp;
    let new = (!program.is_empty())
        .then(|| SeccompFilter { program: Bytes::from(program.clone()), flags: 0 });
    new.into_iter().chain(saved.into_iter().skip(*drop)).collect()
}

/// The filters that all threads of a process have installed first.
///
/// They are one list in the kernel, to which no thread can add for all (`SECCOMP_FILTER_FLAG_TSYNC`) where each has its own.
fn common_filters(alive: &Alive, confinement: &Confinement) -> Vec<SeccompFilter> {
    let mut lists = alive.threads.iter().map(|thread| filters(thread, confinement));
    let mut common = lists.next().unwrap_or_default();
    for list in lists {
        let same = common.iter().zip(&list).take_while(|(a, b)| a == b).count();
        common.truncate(same);
    }
    common
}

/// Installs one filter, for all threads at once if it is the same for `all`. It does not apply to the engine's own calls: the
/// tracer suspends it.
fn install_filter(
    process: &mut Process,
    index: usize,
    filter: &SeccompFilter,
    all: bool,
) -> Result<(), RestoreError> {
    const INSTRUCTION_BYTES: usize = 8;
    const SECCOMP_SET_MODE_FILTER: u64 = 1;
    const SECCOMP_FILTER_FLAG_TSYNC: u64 = 1;
    const SECCOMP_FILTER_FLAG_LOG: u64 = 2;
    let mut tape = process.tape()?;
    if !tape.has_room(1, filter.program.len() + 64) {
        return Err(RestoreError::Damaged(
            "a seccomp filter is longer than the kernel allows".to_owned(),
        ));
    }
    let instructions = tape.data(&filter.program);
    let count = (filter.program.len() / INSTRUCTION_BYTES) as u64;
    let program = tape.words(&[count, instructions]);
    let flags = filter.flags & SECCOMP_FILTER_FLAG_LOG;
    let flags = if all { flags | SECCOMP_FILTER_FLAG_TSYNC } else { flags };
    let arguments = [SECCOMP_SET_MODE_FILTER, flags, program, 0, 0, 0];
    tape.call("install a seccomp filter", libc::SYS_seccomp, arguments);
    let results = process.run_all(index, &tape, End::Breakpoint)?;
    // The number of a thread that can't have it.
    match results.first() {
        Some(0) => Ok(()),
        _ => Err(make("the seccomp filters of a process")(io::ErrorKind::Other.into())),
    }
}

fn capabilities(tape: &mut Tape, thread: &record::Thread, confinement: &Confinement) {
    let saved = &thread.credentials;
    if thread.seccomp == Seccomp::Strict {
        const SECCOMP_SET_MODE_STRICT: u64 = 0;
        tape.call(
            "enter strict seccomp",
            libc::SYS_seccomp,
            [SECCOMP_SET_MODE_STRICT, 0, 0, 0, 0, 0],
        );
    }
    let allowed = |set: u64| set & confinement.bounding;
    // Before the bits, of which one forbids it, and before the sets lose what it takes to set the bits.
    for capability in (0..64).filter(|capability| allowed(saved.ambient) >> capability & 1 == 1) {
        const PR_CAP_AMBIENT_RAISE: u64 = 2;
        let operation = u64::from(libc::PR_CAP_AMBIENT.unsigned_abs());
        let arguments = [operation, PR_CAP_AMBIENT_RAISE, capability, 0, 0, 0];
        tape.call("raise an ambient capability", libc::SYS_prctl, arguments);
    }
    prctl(tape, libc::PR_SET_SECUREBITS, saved.secure_bits.into());
    set_capabilities(tape, [saved.effective, saved.permitted, saved.inheritable].map(allowed));
}

/// Effective, permitted, inheritable.
fn set_capabilities(tape: &mut Tape, sets: [u64; 3]) {
    const VERSION_3: u64 = 0x2008_0522;
    let half = |shift: u32| sets.map(|set| (set >> shift & 0xffff_ffff).to_le_bytes());
    let data: Vec<u8> = [half(0), half(32)]
        .iter()
        .flatten()
        .flat_map(|set| set.first_chunk::<4>().copied().unwrap_or_default())
        .collect();
    let data = tape.data(&data);
    let header = tape.words(&[VERSION_3]);
    tape.call("set its capabilities", libc::SYS_capset, [header, data, 0, 0, 0, 0]);
}

/// Has a call that begins again wait for less by `passed_ns`, where the kernel has left in memory what remains of its time.
fn shorten_rest(pid: Pid, registers: &Registers, passed_ns: u64) {
    let Some((address, unit_ns)) = restart::rest_in_memory(registers) else { return };
    let place = [process_vm::Range { address, bytes: 16 }];
    let mut bytes = [0; 16];
    if !matches!(process_vm::read(pid, &place, &mut bytes), Ok(16)) {
        return;
    }
    if let Some(shorter) = restart::shorten_in_memory(bytes, unit_ns, passed_ns) {
        // Where the program allows nobody to write any more, it waits for longer.
        let _ = process_vm::write(pid, &place, &shorter);
    }
}

/// Of linux/personality.h: calls do not write what remains of their time.
const STICKY_TIMEOUTS: u32 = 0x400_0000;

/// Gives every thread the registers and the signal mask that it goes on with. Nothing may run in the process after this.
///
/// `passed_ns` has passed on the container's clocks since the capture.
pub(crate) fn set_registers(
    process: &mut Process,
    alive: &Alive,
    passed_ns: u64,
) -> Result<(), RestoreError> {
    let later: Vec<(Registers, Restart)> = alive
        .threads
        .iter()
        .map(|thread| restart::later(from_record(&thread.registers), thread.restart, passed_ns))
        .collect();
    let places = process.scratch_for(later.iter().map(|(_, restart)| *restart))?;
    for (((thread, record), (mut registers, restart)), place) in
        process.threads.iter_mut().zip(&alive.threads).zip(later).zip(places)
    {
        let tid = thread.tid;
        if let (Restart::Timespec { argument, .. }, Some(address)) = (restart, place) {
            restart::point_at(&mut registers, argument, address);
        }
        let personality = record.attributes.personality.unwrap_or(alive.personality);
        if personality & STICKY_TIMEOUTS == 0 {
            shorten_rest(process.pid, &registers, passed_ns);
        }
        ptrace::set_xstate(tid, &record.xstate)
            .map_err(failed("set the vector registers of", tid))?;
        ptrace::set_signal_mask(tid, record.signal_mask)
            .map_err(failed("set the signal mask of", tid))?;
        thread.mask = record.signal_mask;
        thread.stop = registers;
    }
    Ok(())
}
