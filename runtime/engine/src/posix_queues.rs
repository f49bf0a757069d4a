//! POSIX message queues.
//!
//! Their messages can be looked at only by taking them: a capture takes all and puts all back, in the order in which they come.
//! Nobody notices but who has asked to be told of the next message; that is refused where there are messages, and everywhere
//! if a signal was to tell, since the kernel does not show the value that would come with it.

use std::collections::BTreeMap;
use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::fs::OpenOptionsExt;

use samara_capsule::record::{Bytes, Container, Descriptor, FileKind, PosixQueue, ProcessState};
use samara_kernel::Pid;
use samara_kernel::mq_overview::{self, Limits};
use samara_kernel::setns::{Namespace, inside};
use samara_kernel::tape::End;

use crate::capture::{CaptureError, Tables, index, inner_pid, read};
use crate::pipes::LARGE_FILE;
use crate::restore::{RestoreError, Tree, make};
use crate::system_v;
use crate::unsupported::Place;

/// What a kernel allows at most (HARD_MSGMAX, HARD_MSGSIZEMAX of linux/ipc_namespace.h).
const MESSAGES_MAX: i64 = 65536;
const MESSAGE_BYTES_MAX: i64 = 16 << 20;

/// What a capture knows of queues.
#[derive(Debug, Default)]
pub(crate) struct Known {
    /// The file system of the container's queues, if it has some of its own.
    device: Option<u64>,
    numbers: BTreeMap<(u64, u64), u32>,
    pub(crate) records: Vec<PosixQueue>,
    /// Of each record.
    queues: Vec<File>,
}

/// A view of the queues of the container's namespace, wherever they are mounted; none where it has none of its own.
pub(crate) fn view(init: Pid) -> io::Result<Option<OwnedFd>> {
    if system_v::shares_namespace(init)? {
        return Ok(None);
    }
    inside(init, Namespace::Ipc, mount).map(Some)
}

/// Lists the queues that a view shows.
pub(crate) fn list(view: &OwnedFd, tables: &mut Tables<'_>) -> Result<(), CaptureError> {
    let what = || read("the container's message queues");
    let path = format!("/proc/self/fd/{}", view.as_raw_fd());
    tables.posix_queues.device = Some(fs::metadata(&path).map_err(what())?.dev());
    for entry in fs::read_dir(&path).map_err(what())? {
        let entry = entry.map_err(what())?;
        let name = entry.file_name();
        let metadata = entry.metadata().map_err(what())?;
        let link = format!("{path}/{}", name.display());
        queue(tables, &link, name.as_encoded_bytes(), true, &metadata)?;
    }
    Ok(())
}

/// A view of the queues of the calling thread's IPC namespace.
fn mount() -> io::Result<OwnedFd> {
    use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags};
    let context = rustix::mount::fsopen("mqueue", FsOpenFlags::FSOPEN_CLOEXEC)?;
    rustix::mount::fsconfig_create(context.as_fd())?;
    let (flags, attributes) = (FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty());
    Ok(rustix::mount::fsmount(context.as_fd(), flags, attributes)?)
}

/// The index of the queue that a descriptor is for; `None` if it is for something else. `path` is what `/proc` calls it.
pub(crate) fn of_descriptor(
    tables: &mut Tables<'_>,
    link: &str,
    path: &[u8],
    metadata: &Metadata,
) -> Result<Option<u32>, CaptureError> {
    if tables.posix_queues.device != Some(metadata.dev()) || !metadata.is_file() {
        return Ok(None);
    }
    let name = path.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
    let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
    queue(tables, link, name, false, metadata).map(Some)
}

fn queue(
    tables: &mut Tables<'_>,
    link: &str,
    name: &[u8],
    named: bool,
    metadata: &Metadata,
) -> Result<u32, CaptureError> {
    let identity = (metadata.dev(), metadata.ino());
    if let Some(number) = tables.posix_queues.numbers.get(&identity) {
        return Ok(*number);
    }
    let mut options = File::options();
    let queue = options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let queue = queue.open(link).map_err(read(link))?;
    let limits = mq_overview::limits(&queue).map_err(read(link))?;
    let (bytes, notified) = state(&queue).map_err(read(link))?;
    let mut waiting = None;
    if let Some((kind, pid)) = notified {
        let inner = inner_pid(pid).ok();
        let shown = String::from_utf8_lossy(name).into_owned();
        match (kind, inner) {
            (libc::SIGEV_NONE, Some(inner)) if bytes == 0 => waiting = Some(inner),
            (libc::SIGEV_NONE, _) => {
                let what = format!(
                    "it waits for a message (mq_notify) of the queue /{shown}, which has some"
                );
                tables.refuse(pid, Place::Process, what);
            }
            (_, _) => {
                let what = format!(
                    "it is to be told (mq_notify) of the next message of the queue /{shown}, which is not supported"
                );
                tables.refuse(pid, Place::Process, what);
            }
        }
    }
    let known = &mut tables.posix_queues;
    let number = index(known.records.len());
    known.records.push(PosixQueue {
        name: Bytes::from(name.to_vec()),
        named,
        mode: metadata.mode() & 0o7777,
        owner: (metadata.uid(), metadata.gid()),
        messages_max: limits.messages,
        message_bytes_max: limits.message_bytes,
        messages: Vec::new(),
        waiting,
    });
    known.queues.push(queue);
    known.numbers.insert(identity, number);
    Ok(number)
}

/// Bytes that a queue holds, and how whom it is to tell of the next message: `QSIZE:6 NOTIFY:0 SIGNO:10 NOTIFY_PID:26798`.
fn state(queue: &File) -> io::Result<(u64, Option<(i32, Pid)>)> {
    use std::os::unix::fs::FileExt;
    let mut text = [0u8; 256];
    let count = queue.read_at(&mut text, 0)?;
    let text = String::from_utf8_lossy(text.get(..count).unwrap_or_default()).into_owned();
    let field = |name: &str| -> io::Result<i64> {
        text.split_ascii_whitespace()
            .find_map(|field| field.strip_prefix(name)?.strip_prefix(':')?.parse().ok())
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    };
    let pid = Pid::try_from(field("NOTIFY_PID")?).unwrap_or(0);
    let kind = i32::try_from(field("NOTIFY")?).unwrap_or(libc::SIGEV_SIGNAL);
    Ok((field("QSIZE")?.unsigned_abs(), (pid != 0).then_some((kind, pid))))
}

/// Copies the messages of all queues, once it is sure that the container will be saved.
pub(crate) fn copy(tables: &mut Tables<'_>) -> Result<(), CaptureError> {
    let known = &mut tables.posix_queues;
    for (record, queue) in known.records.iter_mut().zip(&known.queues) {
        let name = String::from_utf8_lossy(&record.name).into_owned();
        let what = || read(format!("the messages of the queue /{name}"));
        let bytes_max = usize::try_from(record.message_bytes_max).unwrap_or(0);
        let mut taken = Vec::new();
        let ended = loop {
            match mq_overview::receive(queue, bytes_max) {
                Ok(Some(message)) => taken.push(message),
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        // Whatever came of the reading, all goes back.
        let back = taken
            .iter()
            .try_fold((), |(), (priority, content)| mq_overview::send(queue, *priority, content));
        ended.and(back).map_err(what())?;
        record.messages =
            taken.into_iter().map(|(priority, content)| (priority, Bytes::from(content))).collect();
    }
    Ok(())
}

/// Queues that have been made again.
#[derive(Debug, Default)]
pub(crate) struct Made {
    queues: Vec<File>,
    /// Descriptions that `mq_open` made, by the number of their file. Those that were opened by a path have `O_LARGEFILE`, which
    /// these lack.
    opened: BTreeMap<u32, OwnedFd>,
}

impl Made {
    /// The description of the file `number`, if it was made as one of its own.
    pub(crate) fn opened(&self, number: u32) -> Option<&OwnedFd> {
        self.opened.get(&number)
    }

    /// What other descriptions of a queue are opened by.
    pub(crate) fn get(&self, queue: u32) -> Option<&File> {
        self.queues.get(queue as usize)
    }
}

/// Makes all queues with their messages.
pub(crate) fn restore(init: Pid, container: &Container) -> Result<Made, RestoreError> {
    let records = &container.posix_queues;
    let mut opened = BTreeMap::new();
    if records.is_empty() {
        return Ok(Made::default());
    }
    if system_v::shares_namespace(init).map_err(make("message queues"))? {
        return Err(RestoreError::Incompatible(
            "the container has POSIX message queues, and no IPC namespace of its own".to_owned(),
        ));
    }
    // What queues may hold is counted where they are made.
    let limit = rustix::process::getrlimit(rustix::process::Resource::Msgqueue);
    let highest = rustix::process::Rlimit { current: limit.maximum, ..limit };
    rustix::process::setrlimit(rustix::process::Resource::Msgqueue, highest)
        .map_err(io::Error::from)
        .map_err(make("room for message queues"))?;
    let mut queues: Vec<Option<File>> = records.iter().map(|_| None).collect();
    // Those without a name first: another one may have it since.
    for named in [false, true] {
        for (index, (record, place)) in (0u32..).zip(records.iter().zip(&mut queues)) {
            if record.named != named {
                continue;
            }
            let name = String::from_utf8_lossy(&record.name).into_owned();
            let what = || make(format!("the message queue /{name}"));
            let descriptions: Vec<(u32, i32)> = (0u32..)
                .zip(&container.files)
                .filter(|(_, file)| {
                    file.kind == FileKind::PosixQueue { queue: index }
                        && file.flags & LARGE_FILE == 0
                })
                .map(|(number, file)| (number, file.flags))
                .collect();
            let made = inside(init, Namespace::Ipc, || restore_one(record, &descriptions));
            let (queue, own) = made.map_err(what())?;
            *place = Some(queue);
            opened.extend(own);
        }
    }
    Ok(Made { queues: queues.into_iter().flatten().collect(), opened })
}

/// Makes a queue, and descriptions of it with these numbers and flags.
fn restore_one(
    record: &PosixQueue,
    descriptions: &[(u32, i32)],
) -> io::Result<(File, Vec<(u32, OwnedFd)>)> {
    let within = 1..=MESSAGES_MAX;
    if !within.contains(&record.messages_max)
        || !(1..=MESSAGE_BYTES_MAX).contains(&record.message_bytes_max)
        || record.name.contains(&b'/')
    {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let limits = Limits { messages: record.messages_max, message_bytes: record.message_bytes_max };
    let queue = File::from(mq_overview::create(&record.name, 0o600, limits)?);
    let mut opened = Vec::new();
    for (number, flags) in descriptions {
        opened.push((*number, mq_overview::open(&record.name, flags & libc::O_ACCMODE)?));
    }
    if !record.named {
        mq_overview::unlink(&record.name)?;
    }
    for (priority, content) in &record.messages {
        mq_overview::send(&queue, *priority, content)?;
    }
    std::os::unix::fs::fchown(&queue, Some(record.owner.0), Some(record.owner.1))?;
    queue.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(record.mode))?;
    Ok((queue, opened))
}

/// Lets processes wait again for the next message of a queue, by their own descriptors of it: whoever closes one waits no more.
pub(crate) fn wait_again(tree: &mut Tree, container: &Container) -> Result<(), RestoreError> {
    for (number, record) in (0u32..).zip(&container.posix_queues) {
        let Some(pid) = record.waiting else { continue };
        let is_queue = |descriptor: &&Descriptor| {
            let file = container.files.get(descriptor.file as usize);
            file.is_some_and(|file| file.kind == FileKind::PosixQueue { queue: number })
        };
        let descriptors = container.processes.iter().find_map(|process| match &process.state {
            ProcessState::Alive(alive) if process.pid == pid => Some(&alive.descriptors),
            ProcessState::Alive(_) | ProcessState::Zombie { .. } => None,
        });
        let Some(descriptor) = descriptors.and_then(|list| list.iter().find(is_queue)) else {
            let what = format!("process {pid} waits for a message, and has no such queue");
            return Err(RestoreError::Damaged(what));
        };
        let process = tree.process(pid)?;
        let mut tape = process.tape()?;
        // `struct sigevent`: value, signal, kind.
        let event = [0, u64::from(libc::SIGEV_NONE.unsigned_abs()) << 32, 0, 0, 0, 0, 0, 0];
        let event = tape.words(&event);
        let fd = u64::from(descriptor.fd.unsigned_abs());
        tape.call("wait for a message", libc::SYS_mq_notify, [fd, event, 0, 0, 0, 0]);
        process.run_all(0, &tape, End::Breakpoint)?;
    }
    Ok(())
}
