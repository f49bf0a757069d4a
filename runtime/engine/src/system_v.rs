//! System V shared memory, semaphores and message queues.
//!
//! They belong to the container's IPC namespace. Restore asks the kernel for their old ids (`/proc/sys/kernel/*_next_id`) and
//! makes each in the process that had made it, as far as that lives, because the kernel notes who does what.
//!
//! What `SEM_UNDO` owes shows nowhere. It is found out by operations that are bound to fail, and with what: the kernel
//! checks whether an adjustment stays in its range before it sees that another part of the same operation would have to wait.
//!
//! Not restored: the times of the last operations.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::FileExt as _;

use samara_capsule::record::{
    Bytes, Container, IpcIdentity, MessageQueue, Segment, Semaphore, SemaphoreSet, SemaphoreUndo,
    SystemV,
};
use samara_capsule::transfer::{PAGE_BYTES, Source, SpaceId};
use samara_kernel::kcmp::{self, Resource};
use samara_kernel::setns::{Namespace, Visitor, inside};
use samara_kernel::tape::{Call, End};
use samara_kernel::{Pid, proc, sysvipc};

use crate::capture::{CaptureError, Content, Tables, index, inner_pid, read};
use crate::freeze::FrozenTree;
use crate::memory::{huge_page_bytes, write_runs};
use crate::restore::{RestoreError, Tree, make};
use crate::tracee::{Process, Tape, TraceeError};
use crate::unsupported::Place;

/// Bits of `ipc_perm.mode` (linux/shm.h).
const SHM_DEST: u32 = 0o1000;
const SHM_LOCKED: u32 = 0o2000;
/// The largest value of a semaphore and of an adjustment (SEMVMX, SEMAEM of linux/sem.h).
const VALUE_MAX: i32 = 32767;
/// A message has to fit on a tape.
const MESSAGE_BYTES_MAX: usize = 128 << 10;
/// Semaphores of a set that a kernel allows by default (SEMMSL of linux/sem.h).
const SEMAPHORES_MAX: usize = 32000;
const SEM_UNDO: u16 = 0x1000;
const SETVAL: u64 = 16;
const SETALL: u64 = 17;
const SHM_LOCK: u64 = 11;
const PAGE: u64 = PAGE_BYTES as u64;

/// What a capture knows of System V objects.
#[derive(Debug, Default)]
pub(crate) struct Known {
    pub(crate) record: SystemV,
    /// Whether the namespace is the container's own.
    own: bool,
    /// Files for the content of segments, where one is at hand.
    content: Vec<Option<File>>,
}

/// Whether a container shares the IPC namespace of its host, whose objects say nothing about the container.
pub(crate) fn shares_namespace(init: Pid) -> io::Result<bool> {
    let own = i32::try_from(std::process::id()).expect("pids are ints");
    Ok(proc::namespace(init, "ipc")? == proc::namespace(own, "ipc")?)
}

/// A thread that will list the objects of the container's namespace; none where it has none of its own.
pub(crate) fn visit(init: Pid) -> io::Result<Option<Visitor<SystemV>>> {
    if shares_namespace(init)? {
        return Ok(None);
    }
    // What is open belongs to the namespace that it was opened in.
    let prepare = || {
        let table = |name: &str| File::open(format!("/proc/sysvipc/{name}"));
        Ok(Open {
            limits: open_settings(&LIMITS),
            next_ids: open_settings(&NEXT_IDS),
            tables: [table("shm")?, table("sem")?, table("msg")?],
        })
    };
    Visitor::send(init, Namespace::Ipc, prepare, list_here).map(Some)
}

/// Takes the objects of the container's namespace, whose processes have the engine's numbers yet.
pub(crate) fn list(
    mut record: SystemV,
    frozen: &FrozenTree,
    tables: &mut Tables<'_>,
) -> Result<(), CaptureError> {
    let init = tables.request.init;
    if !record.segments.is_empty() || !record.semaphores.is_empty() || !record.queues.is_empty() {
        // The dead can do nothing, and what they have done nobody can do again.
        let numbers: BTreeMap<Pid, i32> =
            frozen.processes.keys().filter_map(|pid| Some((*pid, inner_pid(*pid).ok()?))).collect();
        let translate = |pid: &mut i32| *pid = numbers.get(pid).copied().unwrap_or(0);
        for segment in &mut record.segments {
            translate(&mut segment.creator_pid);
            translate(&mut segment.last_pid);
        }
        for semaphore in record.semaphores.iter_mut().flat_map(|set| &mut set.semaphores) {
            translate(&mut semaphore.last_pid);
        }
        for queue in &mut record.queues {
            translate(&mut queue.last_sender);
            translate(&mut queue.last_receiver);
        }
    }
    for segment in &mut record.segments {
        segment.space = tables.new_space().0;
    }
    if record.semaphores.iter().any(|set| set.semaphores.len() > SEMAPHORES_MAX) {
        let what = "its container has a set of more than 32000 semaphores, which is not supported";
        tables.refuse(init, Place::Process, what);
    }
    for queue in &record.queues {
        if queue.messages.iter().any(|(_, content)| content.len() > MESSAGE_BYTES_MAX) {
            let what =
                "its container has a System V message of more than 128 KiB, which is not supported";
            tables.refuse(init, Place::Process, what);
        }
    }
    let content = record.segments.iter().map(|_| None).collect();
    tables.system_v = Known { record, own: true, content };
    Ok(())
}

/// Limits that belong to an IPC namespace, below `/proc/sys`.
const LIMITS: [&str; 13] = [
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "kernel/shmall",
    "kernel/shmmax",
    "kernel/shmmni",
    "kernel/shm_rmid_forced",
    "fs/mqueue/queues_max",
    "fs/mqueue/msg_max",
    "fs/mqueue/msgsize_max",
    "fs/mqueue/msg_default",
    "fs/mqueue/msgsize_default",
];

/// What the next objects are to be called, for once; -1 as long as nobody asks for anything.
const NEXT_IDS: [&str; 3] = ["kernel/msg_next_id", "kernel/sem_next_id", "kernel/shm_next_id"];

/// Files that show the objects of a namespace.
struct Open {
    limits: Vec<(&'static str, File)>,
    next_ids: Vec<(&'static str, File)>,
    /// `/proc/sysvipc/shm`, `sem`, `msg`.
    tables: [File; 3],
}

/// Settings of the namespace that the calling thread is in, as far as the kernel has them.
fn settings_here(names: &[&'static str]) -> Vec<(String, String)> {
    settings_in(&open_settings(names))
}

fn open_settings(names: &[&'static str]) -> Vec<(&'static str, File)> {
    let open = |name: &&'static str| Some((*name, File::open(format!("/proc/sys/{name}")).ok()?));
    names.iter().filter_map(open).collect()
}

fn settings_in(files: &[(&str, File)]) -> Vec<(String, String)> {
    let setting = |(name, file): &(&str, File)| {
        // At once: the second read of such a file finds its end, wherever the first has stopped.
        let mut text = [0; 4096];
        let count = file.read_at(&mut text, 0).ok()?;
        let text = String::from_utf8(text.get(..count)?.to_vec()).ok()?;
        Some(((*name).to_owned(), text.trim_end().to_owned()))
    };
    files.iter().filter_map(setting).collect()
}

/// Sets what differs. What the engine may not set stays the new container's.
fn set_here(names: &[&'static str], settings: &[(String, String)]) {
    let here = settings_here(names);
    for setting in settings.iter().filter(|setting| !here.contains(setting)) {
        let (name, value) = setting;
        if names.contains(&name.as_str())
            && let Err(error) = fs::write(format!("/proc/sys/{name}"), value)
        {
            tracing::warn!(%error, name, "a setting for IPC stays that of the new container");
        }
    }
}

/// Lists the objects of the calling thread's namespace, with the numbers that processes have in its pid namespace.
fn list_here(open: Open) -> io::Result<SystemV> {
    let number = |pid: u64| i32::try_from(pid).unwrap_or(0);
    let mut next_ids = settings_in(&open.next_ids);
    next_ids.retain(|(_, id)| id != "-1");
    let mut found = SystemV { limits: settings_in(&open.limits), next_ids, ..SystemV::default() };
    let [segments, semaphores, queues] = &open.tables;
    for row in table(segments)? {
        let identity = row.identity("shmid")?;
        let mode = row.mode()?;
        found.segments.push(Segment {
            identity,
            space: 0,
            bytes: row.field("size")?,
            huge_page_bytes: None,
            locked: mode & SHM_LOCKED != 0,
            removed: mode & SHM_DEST != 0,
            creator_pid: number(row.field("cpid")?),
            last_pid: number(row.field("lpid")?),
        });
    }
    for row in table(semaphores)? {
        let identity = row.identity("semid")?;
        let count = usize::try_from(row.field("nsems")?).unwrap_or(0);
        let values = sysvipc::semaphore_values(identity.id, count)?;
        let semaphores = (0i32..)
            .zip(values)
            .map(|(index, value)| {
                let pid = sysvipc::semaphore_pid(identity.id, index)?;
                Ok(Semaphore { value, last_pid: number(u64::from(pid.unsigned_abs())) })
            })
            .collect::<io::Result<_>>()?;
        let operated = row.field("otime")? != 0;
        found.semaphores.push(SemaphoreSet { identity, semaphores, operated, undo: Vec::new() });
    }
    for row in table(queues)? {
        let identity = row.identity("msqid")?;
        let bytes = usize::try_from(row.field("cbytes")?).unwrap_or(0);
        let mut messages = Vec::new();
        while let Some((kind, content)) = sysvipc::message(identity.id, messages.len(), bytes)? {
            messages.push((kind, Bytes::from(content)));
        }
        found.queues.push(MessageQueue {
            identity,
            bytes_max: sysvipc::queue_bytes_max(identity.id)?,
            messages,
            last_sender: number(row.field("lspid")?),
            last_receiver: number(row.field("lrpid")?),
        });
    }
    Ok(found)
}

/// A line of a table in `/proc/sysvipc`, by the headings of its columns.
struct Row(BTreeMap<String, String>);

fn table(mut file: &File) -> io::Result<Vec<Row>> {
    let mut text = String::new();
    file.read_to_string(&mut text)?;
    let mut lines = text.lines().map(str::split_ascii_whitespace);
    let headings: Vec<&str> = lines.next().into_iter().flatten().collect();
    let row = |line: std::str::SplitAsciiWhitespace<'_>| {
        Row(headings.iter().zip(line).map(|(a, b)| ((*a).to_owned(), b.to_owned())).collect())
    };
    Ok(lines.map(row).collect())
}

impl Row {
    fn text(&self, column: &str) -> io::Result<&str> {
        self.0.get(column).map(String::as_str).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, format!("/proc/sysvipc has no {column}"))
        })
    }

    fn field(&self, column: &str) -> io::Result<u64> {
        self.text(column)?.parse().map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn int<T: TryFrom<i64>>(&self, column: &str) -> io::Result<T> {
        let number = self.text(column)?.parse::<i64>().ok();
        number.and_then(|number| number.try_into().ok()).ok_or(io::ErrorKind::InvalidData.into())
    }

    fn mode(&self) -> io::Result<u32> {
        u32::from_str_radix(self.text("perms")?, 8).map_err(|_| io::ErrorKind::InvalidData.into())
    }

    fn identity(&self, id: &str) -> io::Result<IpcIdentity> {
        Ok(IpcIdentity {
            id: self.int(id)?,
            key: self.int("key")?,
            owner: (self.int("uid")?, self.int("gid")?),
            creator: (self.int("cuid")?, self.int("cgid")?),
            mode: self.mode()? & 0o777,
        })
    }
}

/// The segment behind a mapping of `/SYSV…`, whose inode number is its id. `link` leads to its content.
pub(crate) fn segment(
    tables: &mut Tables<'_>,
    inode: u64,
    link: &str,
) -> Result<Result<u32, String>, CaptureError> {
    let known = &mut tables.system_v;
    if !known.own {
        let what = "System V shared memory of an IPC namespace that the container shares with its host is not supported";
        return Ok(Err(what.to_owned()));
    }
    let wanted = |segment: &Segment| u64::try_from(segment.identity.id) == Ok(inode);
    let Some(place) = known.record.segments.iter().position(wanted) else {
        return Ok(Err(
            "System V shared memory of another IPC namespace is not supported".to_owned()
        ));
    };
    if let Some(content) = known.content.get_mut(place)
        && content.is_none()
    {
        *content = Some(File::open(link).map_err(read(link))?);
    }
    Ok(Ok(index(place)))
}

/// Asks the processes for what only they can tell: the content of segments that nobody has attached, and what `SEM_UNDO` owes.
///
/// They have to be ready to be thawed: what can't be asked is noted in `tables`.
pub(crate) fn ask(frozen: &mut FrozenTree, tables: &mut Tables<'_>) -> Result<(), CaptureError> {
    let init = tables.request.init;
    for place in 0..tables.system_v.content.len() {
        let Some(segment) = tables.system_v.record.segments.get(place) else { continue };
        if tables.system_v.content.get(place).is_some_and(Option::is_some) {
            continue;
        }
        let (last, id, bytes) = (segment.last_pid, segment.identity.id, segment.bytes);
        let by = frozen.processes.keys().copied().find(|pid| inner_pid(*pid).ok() == Some(last));
        let Some(process) = frozen.processes.get_mut(&by.unwrap_or(init)) else { continue };
        match attached_for_a_moment(process, id, bytes)? {
            Some(file) => {
                if let Some(content) = tables.system_v.content.get_mut(place) {
                    *content = Some(file);
                }
            }
            None => {
                let what = format!(
                    "System V shared memory {id} may not be read by it, and is attached nowhere"
                );
                tables.refuse(init, Place::Process, what);
            }
        }
    }
    let Known { record, content, .. } = &mut tables.system_v;
    for (segment, file) in record.segments.iter_mut().zip(content.drain(..)) {
        let Some(file) = file else { continue };
        segment.huge_page_bytes = huge_page_bytes(&file).map_err(read("shared memory"))?;
        tables.contents.push((Content::Open(file), SpaceId(segment.space), segment.bytes));
    }
    if !record.semaphores.is_empty() {
        ask_for_undo(frozen, tables)?;
    }
    Ok(())
}

/// A file for the content of a segment; `None` if the process may not read it.
fn attached_for_a_moment(
    process: &mut Process,
    id: i32,
    bytes: u64,
) -> Result<Option<File>, CaptureError> {
    process.map_arena(None)?;
    let mut tape = process.tape()?;
    let read_only = u64::from(libc::SHM_RDONLY.unsigned_abs());
    tape.try_call("attach shared memory", libc::SYS_shmat, [word(id), 0, read_only, 0, 0, 0]);
    let results = process.run_all(0, &tape, End::Call)?;
    let address = results.first().map_or(Err(libc::EIO), |result| Call::outcome(*result));
    let file = match address {
        Err(_) => None,
        Ok(address) => {
            let mappings = proc::mappings(process.pid).map_err(read("the mappings"))?;
            let end = mappings.iter().find(|mapping| mapping.start == address);
            let end = end.map_or(address + bytes.next_multiple_of(PAGE), |mapping| mapping.end);
            let link = format!("/proc/{}/map_files/{address:x}-{end:x}", process.pid);
            let file = File::open(&link).map_err(read(link));
            let mut tape = process.tape()?;
            tape.call("detach shared memory", libc::SYS_shmdt, [address, 0, 0, 0, 0, 0]);
            process.run_all(0, &tape, End::Call)?;
            Some(file?)
        }
    };
    process.unmap_arena()?;
    Ok(file)
}

/// Completes the sets by what `SEM_UNDO` owes.
fn ask_for_undo(frozen: &mut FrozenTree, tables: &mut Tables<'_>) -> Result<(), CaptureError> {
    let what = || read("who has used SEM_UNDO");
    let same = |a: Pid, b: Pid| kcmp::resource(a, b, Resource::SemaphoreUndo);
    let pids: Vec<Pid> = frozen.processes.keys().copied().collect();
    let users = with_undo(&pids).map_err(what())?;
    let mut owing: Vec<Pid> = Vec::new();
    for (pid, process) in &mut frozen.processes {
        if !users.contains(pid) {
            continue;
        }
        for other in &owing {
            if same(*pid, *other).map_err(what())?.is_eq() {
                let what =
                    "it shares what SEM_UNDO owes with another process, which is not supported";
                tables.refuse(*pid, Place::Process, what);
            }
        }
        for thread in &process.threads {
            if !same(*pid, thread.tid).map_err(what())?.is_eq() {
                let what =
                    "it does not share what SEM_UNDO owes with its process, which is not supported";
                tables.refuse(*pid, Place::Thread(thread.tid), what);
            }
        }
        owing.push(*pid);
        let inner = inner_pid(*pid).map_err(what())?;
        process.map_arena(None)?;
        let sets = &mut tables.system_v.record.semaphores;
        for set in sets.iter_mut().filter(|set| set.operated) {
            match adjustments(process, set)? {
                Some(found) => {
                    set.undo.extend(found.into_iter().map(|(number, adjustment)| SemaphoreUndo {
                        pid: inner,
                        number,
                        adjustment,
                    }));
                }
                None => {
                    let id = set.identity.id;
                    tables.unsupported.push(crate::unsupported::Unsupported {
                        pid: inner,
                        process: crate::capture::name(*pid),
                        place: Place::Process,
                        what: format!("it may not change the System V semaphores {id}, so what SEM_UNDO owes can't be told"),
                    });
                }
            }
        }
        process.unmap_arena()?;
    }
    Ok(())
}

/// Which of these processes have a list of what `SEM_UNDO` owes: those that have used it, or made threads.
fn with_undo(pids: &[Pid]) -> io::Result<Vec<Pid>> {
    use nix::sched::{CloneFlags, unshare};
    // A thread that has left its process's list has none until it uses one, and can be compared with.
    let ask = || {
        unshare(CloneFlags::CLONE_SYSVSEM)?;
        let without = nix::unistd::gettid().as_raw();
        let mut with = Vec::new();
        for pid in pids {
            if !kcmp::resource(*pid, without, Resource::SemaphoreUndo)?.is_eq() {
                with.push(*pid);
            }
        }
        Ok(with)
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().spawn_scoped(scope, ask)?;
        thread.join().unwrap_or_else(|_| Err(io::Error::other("a thread panicked")))
    })
}

/// One part of a `semop`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Operation {
    number: u16,
    change: i32,
    undo: bool,
}

/// `struct sembuf`s. None of them waits.
fn operations(list: &[Operation]) -> Vec<u8> {
    list.iter()
        .flat_map(|operation| {
            let change = i16::try_from(operation.change).expect("semaphores have 15 bits");
            let undo = if operation.undo { SEM_UNDO } else { 0 };
            let wait = libc::IPC_NOWAIT.unsigned_abs();
            let flags = undo | u16::try_from(wait).expect("a small flag");
            [operation.number.to_le_bytes(), change.to_le_bytes(), flags.to_le_bytes()]
        })
        .flatten()
        .collect()
}

/// An operation that fails with ERANGE if a semaphore's adjustment is `threshold` or beyond, seen from 0, and with EAGAIN if not.
fn probe(number: u16, value: u16, threshold: i32) -> Vec<Operation> {
    let step = |change: i32, undo: bool| Operation { number, change, undo };
    let value = i32::from(value);
    let mut list = Vec::new();
    if threshold > 0 {
        // To the top, then down by so much that the adjustment, which grows by it, leaves its range.
        if value < VALUE_MAX {
            list.push(step(VALUE_MAX - value, false));
        }
        list.push(step(threshold - VALUE_MAX - 1, true));
        // Below the top this can't be done at once.
        list.push(step(-VALUE_MAX, false));
    } else {
        // To zero, then up; the range reaches further here by one.
        if value > 0 {
            list.push(step(-value, false));
        }
        match VALUE_MAX + 2 + threshold {
            up if up <= VALUE_MAX => list.push(step(up, true)),
            _ => list.extend([step(1, true), step(-1, false), step(VALUE_MAX, true)]),
        }
        // Waits for zero.
        list.push(step(0, false));
    }
    list
}

/// Asks for each threshold whether the adjustment is beyond it. `None`: the process may not change the set.
fn beyond(
    process: &mut Process,
    set: &SemaphoreSet,
    thresholds: &[(u16, i32)],
) -> Result<Option<Vec<bool>>, TraceeError> {
    const AT_ONCE: usize = 1024;
    let mut answers = Vec::with_capacity(thresholds.len());
    for group in thresholds.chunks(AT_ONCE) {
        let mut tape = process.tape()?;
        for (number, threshold) in group {
            let value =
                set.semaphores.get(usize::from(*number)).map_or(0, |semaphore| semaphore.value);
            let list = probe(*number, value, *threshold);
            semop(&mut tape, set.identity.id, &list, false);
        }
        for result in process.run_all(0, &tape, End::Call)? {
            match Call::outcome(result) {
                Err(libc::ERANGE) => answers.push(true),
                Err(libc::EAGAIN) => answers.push(false),
                Ok(_) | Err(_) => return Ok(None),
            }
        }
    }
    Ok(Some(answers))
}

/// What a process's end will add to the semaphores of a set, where that is not zero.
fn adjustments(
    process: &mut Process,
    set: &SemaphoreSet,
) -> Result<Option<Vec<(u16, i32)>>, TraceeError> {
    let signs: Vec<(u16, i32)> =
        (0u16..).zip(&set.semaphores).flat_map(|(number, _)| [(number, 1), (number, -1)]).collect();
    let Some(answers) = beyond(process, set, &signs)? else { return Ok(None) };
    // Number, a value that the adjustment reaches, one that it does not.
    let mut open: Vec<(u16, i32, i32)> = signs
        .iter()
        .zip(answers)
        .filter(|(_, reached)| *reached)
        .map(|((number, sign), _)| (*number, *sign, sign * (VALUE_MAX + 2)))
        .collect();
    let middle = |reached: i32, missed: i32| reached + (missed - reached) / 2;
    // Halves 16 bits.
    for _ in 0..17 {
        let thresholds: Vec<(u16, i32)> = open
            .iter()
            .filter(|(_, reached, missed)| (missed - reached).abs() > 1)
            .map(|(number, reached, missed)| (*number, middle(*reached, *missed)))
            .collect();
        let Some(answers) = beyond(process, set, &thresholds)? else { return Ok(None) };
        let mut answers = answers.into_iter();
        for (_, reached, missed) in &mut open {
            if (*missed - *reached).abs() > 1 {
                let bound = middle(*reached, *missed);
                if answers.next() == Some(true) { *reached = bound } else { *missed = bound }
            }
        }
    }
    Ok(Some(open.into_iter().map(|(number, reached, _)| (number, reached)).collect()))
}

fn semop(tape: &mut Tape, id: i32, list: &[Operation], required: bool) {
    let address = tape.data(&operations(list));
    let arguments = [word(id), address, list.len() as u64, 0, 0, 0];
    if required {
        tape.call(format!("operate on semaphores {id}"), libc::SYS_semop, arguments);
    } else {
        tape.try_call("operate on semaphores", libc::SYS_semop, arguments);
    }
}

/// An int as an argument of a call.
fn word(int: i32) -> u64 {
    u64::from(int.cast_unsigned())
}

/// A kind of object: its control file, and its calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Memory,
    Semaphores,
    Queue,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Kind::Memory => "shm",
            Kind::Semaphores => "sem",
            Kind::Queue => "msg",
        }
    }
}

/// Gives the container's namespace the limits that it had, if it is the container's own.
pub(crate) fn restore_limits(init: Pid, system_v: &SystemV) -> Result<(), RestoreError> {
    set_settings(init, &LIMITS, &system_v.limits)
}

/// Calls the next objects what the program has asked for, once the engine makes none any more.
pub(crate) fn restore_next_ids(init: Pid, system_v: &SystemV) -> Result<(), RestoreError> {
    set_settings(init, &NEXT_IDS, &system_v.next_ids)
}

fn set_settings(
    init: Pid,
    names: &[&'static str],
    settings: &[(String, String)],
) -> Result<(), RestoreError> {
    let what = || make("settings for IPC");
    if settings.is_empty() || shares_namespace(init).map_err(what())? {
        return Ok(());
    }
    let set = || {
        set_here(names, settings);
        Ok(())
    };
    inside(init, Namespace::Ipc, set).map_err(what())
}

/// Makes all objects, and fills segments and queues.
pub(crate) fn restore(
    tree: &mut Tree,
    container: &Container,
    source: &dyn Source,
) -> Result<(), RestoreError> {
    let SystemV { limits: _, next_ids: _, segments, semaphores, queues } = &container.system_v;
    if segments.is_empty() && semaphores.is_empty() && queues.is_empty() {
        return Ok(());
    }
    let init = tree.process(1)?.pid;
    if shares_namespace(init).map_err(make("System V objects"))? {
        return Err(RestoreError::Incompatible(
            "the container has System V objects, and no IPC namespace of its own".to_owned(),
        ));
    }
    for segment in segments {
        let huge = match segment.huge_page_bytes {
            None => 0,
            Some(bytes) => crate::memory::huge_page_flags(bytes)? | word(libc::SHM_HUGETLB),
        };
        let arguments = [word(segment.identity.key), segment.bytes, flags() | huge, 0, 0, 0];
        let creator = segment.creator_pid;
        create(tree, Kind::Memory, &segment.identity, creator, libc::SYS_shmget, arguments)?;
        set(tree, Kind::Memory, &segment.identity, 0)?;
        fill(tree, segment, source)?;
    }
    for semaphores in semaphores {
        let count = semaphores.semaphores.len();
        if count > SEMAPHORES_MAX {
            return Err(RestoreError::Damaged(format!("a set has {count} semaphores")));
        }
        let arguments = [word(semaphores.identity.key), count as u64, flags(), 0, 0, 0];
        create(tree, Kind::Semaphores, &semaphores.identity, 1, libc::SYS_semget, arguments)?;
        set(tree, Kind::Semaphores, &semaphores.identity, 0)?;
    }
    for queue in queues {
        let arguments = [word(queue.identity.key), flags(), 0, 0, 0, 0];
        create(tree, Kind::Queue, &queue.identity, 1, libc::SYS_msgget, arguments)?;
        send(tree, queue)?;
    }
    Ok(())
}

fn flags() -> u64 {
    word(libc::IPC_CREAT | libc::IPC_EXCL | 0o600)
}

/// The number of a process, or of init where that process is gone.
fn living(tree: &Tree, pid: i32) -> i32 {
    if tree.processes.contains_key(&pid) { pid } else { 1 }
}

/// Makes one object under its id, as its creator.
fn create(
    tree: &mut Tree,
    kind: Kind,
    identity: &IpcIdentity,
    by: i32,
    number: libc::c_long,
    arguments: [u64; 6],
) -> Result<(), RestoreError> {
    const KEEP: u64 = u32::MAX as u64;
    let id = identity.id;
    let what = format!("System V object {} {id}", kind.name());
    let init = tree.process(1)?.pid;
    inside(init, Namespace::Ipc, || {
        fs::write(format!("/proc/sys/kernel/{}_next_id", kind.name()), id.to_string())
    })
    .map_err(make(what.clone()))?;
    let by = living(tree, by);
    let process = tree.process(by)?;
    let mut tape = process.tape()?;
    let (user, group) = identity.creator;
    let other = (user, group) != (0, 0);
    if other {
        let group = [KEEP, group.into(), KEEP, 0, 0, 0];
        tape.call("take a creator's group", libc::SYS_setresgid, group);
        tape.call("take a creator's id", libc::SYS_setresuid, [KEEP, user.into(), KEEP, 0, 0, 0]);
    }
    let made = tape.len();
    tape.try_call("make an object", number, arguments);
    if other {
        tape.call("give back an id", libc::SYS_setresuid, [KEEP, 0, KEEP, 0, 0, 0]);
        tape.call("give back a group", libc::SYS_setresgid, [KEEP, 0, KEEP, 0, 0, 0]);
    }
    let results = process.run_all(0, &tape, End::Breakpoint)?;
    match results.get(made).map_or(Err(libc::EIO), |result| Call::outcome(*result)) {
        Ok(got) if got == word(id) => Ok(()),
        Ok(_) => Err(make(what)(io::ErrorKind::AddrInUse.into())),
        Err(errno) => Err(make(what)(io::Error::from_raw_os_error(errno))),
    }
}

/// Sets owner and mode, and the length of a queue.
fn set(
    tree: &mut Tree,
    kind: Kind,
    identity: &IpcIdentity,
    bytes_max: u64,
) -> Result<(), RestoreError> {
    /// Room for the largest of the three status structures; `ipc64_perm` is their first part, and a queue's length the 12th word.
    const STATUS_WORDS: usize = 16;
    const QUEUE_BYTES_WORD: usize = 11;
    let id = identity.id;
    let (user, group) = identity.owner;
    let pair = |low: u32, high: u32| u64::from(low) | u64::from(high) << 32;
    let mut status = [0u64; STATUS_WORDS];
    let [first, second, third, ..] = &mut status;
    // key, uid, gid, cuid, cgid, mode
    (*first, *second, *third) = (pair(0, user), pair(group, 0), pair(0, identity.mode));
    if let Some(word) = status.get_mut(QUEUE_BYTES_WORD) {
        *word = bytes_max;
    }
    let process = tree.process(1)?;
    let mut tape = process.tape()?;
    let address = tape.words(&status);
    let command = word(libc::IPC_SET);
    let what = format!("set the owner of System V object {id}");
    match kind {
        Kind::Memory => tape.call(what, libc::SYS_shmctl, [word(id), command, address, 0, 0, 0]),
        Kind::Semaphores => {
            tape.call(what, libc::SYS_semctl, [word(id), 0, command, address, 0, 0]);
        }
        Kind::Queue => tape.call(what, libc::SYS_msgctl, [word(id), command, address, 0, 0, 0]),
    }
    process.run_all(0, &tape, End::Breakpoint)?;
    Ok(())
}

/// Fills a segment through init, so that its pages are charged to the container.
fn fill(tree: &mut Tree, segment: &Segment, source: &dyn Source) -> Result<(), RestoreError> {
    let place = tree.workspace();
    let init = tree.process(1)?;
    let pid = init.pid;
    let mut tape = init.tape()?;
    let attach = [word(segment.identity.id), place, 0, 0, 0, 0];
    tape.call("attach shared memory", libc::SYS_shmat, attach);
    init.run_all(0, &tape, End::Breakpoint)?;
    source
        .transfer(&[SpaceId(segment.space)], &|_, runs, bytes| write_runs(pid, place, runs, bytes))
        .map_err(|source| RestoreError::Fill { source })?;
    let init = tree.process(1)?;
    let mut tape = init.tape()?;
    tape.call("detach shared memory", libc::SYS_shmdt, [place, 0, 0, 0, 0, 0]);
    init.run_all(0, &tape, End::Breakpoint)?;
    Ok(())
}

/// Appends the calls that attach a part of a segment at `start`.
pub(crate) fn attach(
    tape: &mut Tape,
    segment: &Segment,
    range: (u64, u64),
    offset: u64,
    writable: bool,
    workspace: u64,
) {
    const MOVE: u64 = (libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED) as u64;
    let (start, end) = range;
    let bytes = end - start;
    let page = segment.huge_page_bytes.unwrap_or(PAGE);
    let whole = segment.bytes.next_multiple_of(page);
    let flags = if writable { 0 } else { word(libc::SHM_RDONLY) };
    let id = word(segment.identity.id);
    let what = format!("attach shared memory {id} at {start:#x}");
    if offset == 0 && bytes == whole {
        tape.call(what, libc::SYS_shmat, [id, start, flags, 0, 0, 0]);
        return;
    }
    // What is left of it after the program has unmapped, moved or grown parts; these may lie behind its end.
    let from = workspace.saturating_add(offset);
    let reaches = offset.saturating_add(bytes).max(whole);
    tape.call(what.clone(), libc::SYS_shmat, [id, workspace, flags, 0, 0, 0]);
    if reaches > whole {
        tape.call(what.clone(), libc::SYS_mremap, [workspace, whole, reaches, 0, 0, 0]);
    }
    tape.call(what.clone(), libc::SYS_mremap, [from, bytes, bytes, MOVE, start, 0]);
    tape.call(what, libc::SYS_munmap, [workspace, reaches, 0, 0, 0, 0]);
}

/// Sends a queue's messages as its last sender, after a round that leaves its last receiver's trace.
fn send(tree: &mut Tree, queue: &MessageQueue) -> Result<(), RestoreError> {
    const ANY: u64 = 0;
    let id = word(queue.identity.id);
    let nowait = word(libc::IPC_NOWAIT);
    // The limit may have been lowered since.
    let content: usize = queue.messages.iter().map(|(_, content)| content.len().max(1)).sum();
    set(tree, Kind::Queue, &queue.identity, queue.bytes_max.max(content as u64).max(1))?;
    let (sender, receiver) = (living(tree, queue.last_sender), living(tree, queue.last_receiver));
    if queue.last_receiver != 0 {
        let process = tree.process(sender)?;
        let mut tape = process.tape()?;
        let message = tape.words(&[1, 0]);
        tape.call("send a message", libc::SYS_msgsnd, [id, message, 1, nowait, 0, 0]);
        process.run_all(0, &tape, End::Breakpoint)?;
        let process = tree.process(receiver)?;
        let mut tape = process.tape()?;
        let message = tape.words(&[0, 0]);
        tape.call("receive a message", libc::SYS_msgrcv, [id, message, 1, ANY, nowait, 0]);
        process.run_all(0, &tape, End::Breakpoint)?;
    }
    let process = tree.process(sender)?;
    let mut tape = process.tape()?;
    for (kind, content) in &queue.messages {
        if content.len() > MESSAGE_BYTES_MAX {
            return Err(RestoreError::Damaged("a System V message is too long".to_owned()));
        }
        if !tape.has_room(1, content.len() + 64) {
            process.run_all(0, &tape, End::Breakpoint)?;
            tape = process.tape()?;
        }
        let message = tape.data(&[&kind.to_le_bytes(), content.as_slice()].concat());
        let arguments = [id, message, content.len() as u64, nowait, 0, 0];
        tape.call(format!("send a message to queue {id}"), libc::SYS_msgsnd, arguments);
    }
    process.run_all(0, &tape, End::Breakpoint)?;
    set(tree, Kind::Queue, &queue.identity, queue.bytes_max)
}

/// Completes the objects once all processes have their mappings: locks, removals, semaphores, and who was last.
pub(crate) fn finish(tree: &mut Tree, system_v: &SystemV) -> Result<(), RestoreError> {
    let place = tree.workspace();
    for segment in &system_v.segments {
        let id = word(segment.identity.id);
        if segment.last_pid != 0 {
            let by = living(tree, segment.last_pid);
            let process = tree.process(by)?;
            let mut tape = process.tape()?;
            tape.call("attach shared memory", libc::SYS_shmat, [id, place, 0, 0, 0, 0]);
            tape.call("detach shared memory", libc::SYS_shmdt, [place, 0, 0, 0, 0, 0]);
            process.run_all(0, &tape, End::Breakpoint)?;
        }
        let process = tree.process(1)?;
        let mut tape = process.tape()?;
        if segment.locked {
            tape.call("lock shared memory", libc::SYS_shmctl, [id, SHM_LOCK, 0, 0, 0, 0]);
        }
        if segment.removed {
            let remove = word(libc::IPC_RMID);
            tape.call("remove shared memory", libc::SYS_shmctl, [id, remove, 0, 0, 0, 0]);
        }
        process.run_all(0, &tape, End::Breakpoint)?;
    }
    system_v.semaphores.iter().try_for_each(|set| set_semaphores(tree, set))
}

/// Gives semaphores their values, adjustments, and the processes that changed them last.
fn set_semaphores(tree: &mut Tree, set: &SemaphoreSet) -> Result<(), RestoreError> {
    const AT_ONCE: usize = 1024;
    let id = set.identity.id;
    if set.semaphores.iter().any(|semaphore| i32::from(semaphore.value) > VALUE_MAX) {
        return Err(RestoreError::Damaged(format!("a semaphore of set {id} is out of range")));
    }
    let mut by_process: BTreeMap<i32, Vec<(u16, u16)>> = BTreeMap::new();
    for (number, semaphore) in (0u16..).zip(&set.semaphores) {
        if semaphore.value != 0 || semaphore.last_pid != 0 {
            let by = living(tree, semaphore.last_pid);
            by_process.entry(by).or_default().push((number, semaphore.value));
        }
    }
    // The kernel goes through a whole set to change one of it: what one process has changed last of all is set at once.
    let most = by_process.iter().max_by_key(|(_, values)| values.len()).map(|(pid, _)| *pid);
    let touched: usize = by_process.values().map(Vec::len).sum();
    let at_once = most.filter(|_| touched == set.semaphores.len());
    if let Some(pid) = at_once {
        let process = tree.process(pid)?;
        let mut tape = process.tape()?;
        let values = set.semaphores.iter().flat_map(|semaphore| semaphore.value.to_le_bytes());
        let values = tape.data(&values.collect::<Vec<u8>>());
        let arguments = [word(id), 0, SETALL, values, 0, 0];
        tape.call(format!("set semaphores {id}"), libc::SYS_semctl, arguments);
        process.run_all(0, &tape, End::Breakpoint)?;
    }
    for (pid, values) in by_process.iter().filter(|(pid, _)| Some(**pid) != at_once) {
        let process = tree.process(*pid)?;
        for group in values.chunks(AT_ONCE) {
            let mut tape = process.tape()?;
            for (number, value) in group {
                let arguments = [word(id), u64::from(*number), SETVAL, u64::from(*value), 0, 0];
                tape.call(format!("set semaphore {id}"), libc::SYS_semctl, arguments);
            }
            process.run_all(0, &tape, End::Breakpoint)?;
        }
    }
    for undo in &set.undo {
        let semaphore = set.semaphores.get(usize::from(undo.number)).ok_or_else(|| {
            RestoreError::Damaged(format!("an adjustment is for no semaphore of set {id}"))
        })?;
        let process = tree.process(undo.pid)?;
        let mut tape = process.tape()?;
        for pair in owe(undo, semaphore.value) {
            semop(&mut tape, id, &pair, true);
        }
        process.run_all(0, &tape, End::Breakpoint)?;
    }
    if !set.operated {
        return Ok(());
    }
    // What leaves no trace but who did it, where another one has for the adjustments, and once that it was done.
    let adjusted: BTreeSet<u16> = set.undo.iter().map(|undo| undo.number).collect();
    let mut operated = false;
    for (pid, values) in &by_process {
        let process = tree.process(*pid)?;
        let values: Vec<(u16, u16)> = values
            .iter()
            .copied()
            .filter(|(number, _)| {
                let is_first = !std::mem::replace(&mut operated, true);
                is_first || adjusted.contains(number)
            })
            .collect();
        for group in values.chunks(AT_ONCE) {
            let mut tape = process.tape()?;
            for (number, value) in group {
                semop(&mut tape, id, &neutral(*number, *value), true);
            }
            process.run_all(0, &tape, End::Breakpoint)?;
        }
    }
    if by_process.is_empty() {
        let process = tree.process(1)?;
        let mut tape = process.tape()?;
        semop(&mut tape, id, &neutral(0, 0), true);
        process.run_all(0, &tape, End::Breakpoint)?;
    }
    Ok(())
}

fn neutral(number: u16, value: u16) -> [Operation; 2] {
    let first = if i32::from(value) < VALUE_MAX { 1 } else { -1 };
    [first, -first].map(|change| Operation { number, change, undo: false })
}

/// Operations that leave the value as it is and owe the adjustment: each changes by a part of it, and back.
fn owe(undo: &SemaphoreUndo, value: u16) -> Vec<[Operation; 2]> {
    let number = undo.number;
    let value = i32::from(value);
    let up = VALUE_MAX - value >= value;
    // At least half of the range.
    let room = if up { VALUE_MAX - value } else { value };
    let mut rest = undo.adjustment.clamp(-VALUE_MAX - 1, VALUE_MAX);
    let mut list = Vec::new();
    while rest != 0 {
        let part = rest.clamp(-room, room);
        rest -= part;
        // An adjustment of N comes of a change by -N.
        let owing = Operation { number, change: -part, undo: true };
        let plain = Operation { number, change: part, undo: false };
        // Away from the near end first.
        let owing_first = (owing.change > 0) == up;
        list.push(if owing_first { [owing, plain] } else { [plain, owing] });
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel's rules for a list of operations (`perform_atomic_semop` of ipc/sem.c); the error, or value and adjustment.
    fn kernel(list: &[Operation], value: i32, adjustment: i32) -> Result<(i32, i32), i32> {
        let (mut value, mut adjustment) = (value, adjustment);
        for operation in list {
            if operation.change == 0 && value != 0 || value + operation.change < 0 {
                return Err(libc::EAGAIN);
            }
            value += operation.change;
            if value > VALUE_MAX {
                return Err(libc::ERANGE);
            }
            if operation.undo {
                adjustment -= operation.change;
                if !(-VALUE_MAX - 1..=VALUE_MAX).contains(&adjustment) {
                    return Err(libc::ERANGE);
                }
            }
        }
        Ok((value, adjustment))
    }

    const VALUES: [u16; 5] = [0, 1, 17, 20000, 32767];
    const ADJUSTMENTS: [i32; 9] = [-32768, -32767, -20000, -1, 0, 1, 5, 20000, 32767];

    /// A probe that succeeded would change the program's semaphore.
    #[test]
    fn probes_always_fail_and_tell_the_truth() {
        for value in VALUES {
            for adjustment in ADJUSTMENTS {
                for threshold in [-32768, -32767, -5, -1, 1, 5, 6, 20000, 20001, 32767, 32768] {
                    let list = probe(3, value, threshold);
                    let reached = if threshold > 0 {
                        adjustment >= threshold
                    } else {
                        adjustment <= threshold
                    };
                    let expected = Err(if reached { libc::ERANGE } else { libc::EAGAIN });
                    let got = kernel(&list, value.into(), adjustment);
                    assert_eq!(got, expected, "{value} {adjustment} {threshold}: {list:?}");
                }
            }
        }
    }

    /// A lock that a process holds would never be freed when it dies.
    #[test]
    fn adjustments_are_owed_again() {
        for value in VALUES {
            for adjustment in ADJUSTMENTS {
                let undo = SemaphoreUndo { pid: 1, number: 0, adjustment };
                let list = owe(&undo, value);
                assert!(list.len() <= 3);
                let end = list.iter().try_fold((i32::from(value), 0), |(value, owed), pair| {
                    kernel(pair, value, owed)
                });
                assert_eq!(end, Ok((i32::from(value), adjustment)), "{value} {adjustment}");
            }
        }
    }
}
