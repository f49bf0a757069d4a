//! Descriptors and open file descriptions.
//!
//! Restore makes every description once, in the engine, below the container's root, and hands it to each process that has a
//! descriptor for it. Descriptors that were shared by `fork`, `dup` or a message thus share their position and flags again.

use std::cmp::Ordering;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use nix::sys::epoll::{Epoll, EpollCreateFlags};
use nix::sys::eventfd::{EfdFlags, EventFd};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
use samara_capsule::record::{
    Alive, Bytes, Container, Descriptor, FileKind, Lock, LockKind, Notices, OpenFile, Pipe,
};
use samara_kernel::pidfd::PidFd;
use samara_kernel::proc::DescriptorInfo;
use samara_kernel::tape::End;
use samara_kernel::{Pid, fcntl, kcmp, proc, signalfd};

use crate::capture::{CaptureError, OutsideStream, Tables, index, read};
use crate::memory::Shared;
use crate::restore::{RestoreError, make, open_below, open_checked};
use crate::root::Root;
use crate::tracee::Process;
use crate::unsupported::Place;
use crate::{
    clocks, directories, epoll, inotify, internet, nameless, notices, pipes, posix_queues, process,
    procfiles, sockets, terminals, timers, unix_sockets,
};

/// The descriptors and locks of one process.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    pub(crate) list: Vec<Descriptor>,
    pub(crate) locks: Vec<Lock>,
}

/// Flags that `open` takes only while it opens, or that belong to the descriptor.
const NOT_KEPT: i32 =
    libc::O_CLOEXEC | libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY;

/// Character devices without a state of their own: null, zero, full, random, urandom, of major 1.
pub(crate) const PLAIN_DEVICES: [(u32, u32); 5] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];

/// Describes the descriptors of a stopped process, registering what they share.
pub(crate) fn collect(pid: Pid, tables: &mut Tables<'_>) -> Result<Descriptors, CaptureError> {
    let mut found = Descriptors::default();
    let handle = PidFd::open(pid).map_err(read(format!("process {pid}")))?;
    for fd in proc::descriptors(pid).map_err(read(format!("/proc/{pid}/fd")))? {
        let info =
            proc::descriptor_info(pid, fd).map_err(read(format!("/proc/{pid}/fdinfo/{fd}")))?;
        locks(pid, fd, &info, &mut found.locks, tables);
        let close_on_exec = info.flags & libc::O_CLOEXEC != 0;
        match register(pid, fd, &handle, &info, tables)? {
            Ok(file) => found.list.push(Descriptor { fd, file, close_on_exec }),
            Err(what) => tables.refuse(pid, Place::Descriptor(fd), what),
        }
    }
    Ok(found)
}

/// The index of the open file description that a descriptor in flight refers to, of which the engine has one of its own.
pub(crate) fn register_in_flight(
    file: &OwnedFd,
    tables: &mut Tables<'_>,
) -> Result<Result<u32, String>, CaptureError> {
    let (pid, fd) = (Pid::try_from(std::process::id()).expect("pids are ints"), file.as_raw_fd());
    let what = || read("a descriptor in flight");
    let handle = PidFd::open(pid).map_err(what())?;
    let info = proc::descriptor_info(pid, fd).map_err(what())?;
    let known = tables.files.len();
    let file = register(pid, fd, &handle, &info, tables)?;
    let is_new = tables.files.len() > known;
    if is_new && info.others.iter().any(|(name, _)| name == "lock") {
        return Ok(Err("a locked file that no process has open is not supported".to_owned()));
    }
    if is_new && tables.files.last().is_some_and(notices::has_notices) {
        return Ok(Err(
            "a file that sends signals and no process has open is not supported".to_owned()
        ));
    }
    Ok(file)
}

/// The index of the open file description that a descriptor refers to, or why it can't be saved.
fn register(
    pid: Pid,
    fd: i32,
    handle: &PidFd,
    info: &DescriptorInfo,
    tables: &mut Tables<'_>,
) -> Result<Result<u32, String>, CaptureError> {
    let link = format!("/proc/{pid}/fd/{fd}");
    let metadata = fs::metadata(&link).map_err(read(link.clone()))?;
    let identity = (metadata.dev(), metadata.ino());
    let holders = |tables: &Tables<'_>| tables.known_files.get(&identity).map_or(0, Vec::len);
    let place = match known(pid, fd, identity, tables)? {
        Ok(file) => return Ok(Ok(file)),
        Err(place) => place,
    };
    let held = holders(tables);
    let target = fs::read_link(&link).map_err(read(link.clone()))?;
    let target = target.as_os_str().as_bytes();
    let metadata = &metadata;
    let descriptor = Found { pid, fd, handle, link: &link, target, metadata, info };
    let described = match classify(&descriptor, tables)? {
        Ok(kind) if info.flags & libc::O_PATH != 0 => Ok((kind, Notices::default())),
        Ok(kind) => notices::collect(&descriptor, &kind, tables)?.map(|notices| (kind, notices)),
        Err(what) => Err(what),
    };
    match described {
        Ok((kind, notices)) => {
            let file = index(tables.files.len());
            tables.files.push(OpenFile { flags: info.flags & !NOT_KEPT, kind, notices });
            // What was found on the way may be in the list too.
            let place = match holders(tables) == held {
                true => place,
                false => known(pid, fd, identity, tables)?.err().unwrap_or(0),
            };
            tables.known_files.entry(identity).or_default().insert(place, (pid, fd, file));
            Ok(Ok(file))
        }
        Err(what) => Ok(Err(what)),
    }
}

/// The index of a description that another descriptor has led to before, or where in the list of its inode it belongs: event
/// counters and the like have all the same one, so the list is kept in the order of `kcmp`.
fn known(
    pid: Pid,
    fd: i32,
    identity: (u64, u64),
    tables: &Tables<'_>,
) -> Result<Result<u32, usize>, CaptureError> {
    let holders = tables.known_files.get(&identity).map(Vec::as_slice).unwrap_or_default();
    let mut failed = None;
    let found = holders.binary_search_by(|(other, other_fd, _)| {
        kcmp::file((*other, *other_fd), (pid, fd)).unwrap_or_else(|error| {
            failed = Some(error);
            Ordering::Equal
        })
    });
    if let Some(error) = failed {
        return Err(read(format!("/proc/{pid}/fd/{fd}"))(error));
    }
    Ok(match found {
        Ok(place) => Ok(holders.get(place).map_or(0, |(_, _, file)| *file)),
        Err(place) => Err(place),
    })
}

/// A descriptor and all that `/proc` says of it.
#[derive(Debug)]
pub(crate) struct Found<'a> {
    pub(crate) pid: Pid,
    pub(crate) fd: i32,
    pub(crate) handle: &'a PidFd,
    pub(crate) link: &'a str,
    pub(crate) target: &'a [u8],
    pub(crate) metadata: &'a fs::Metadata,
    pub(crate) info: &'a DescriptorInfo,
}

impl Found<'_> {
    /// A descriptor of our own for the same open file description.
    pub(crate) fn borrow(&self) -> Result<OwnedFd, CaptureError> {
        self.handle.get_fd(self.fd).map_err(read(self.link))
    }

    pub(crate) fn identity(&self) -> (u64, u64) {
        (self.metadata.dev(), self.metadata.ino())
    }

    pub(crate) fn line(&self, name: &str) -> Option<&str> {
        self.info.others.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

/// What kind of file is open, or why that kind can't be saved.
fn classify(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Result<FileKind, String>, CaptureError> {
    let kind = found.metadata.file_type();
    if kind.is_char_device()
        && found.info.flags & libc::O_PATH == 0
        && let Some(kind) = terminals::note(found, tables)?
    {
        return Ok(kind);
    }
    let (device, inode) = found.identity();
    if let Some(kind) = outside(found, tables) {
        return Ok(Ok(kind));
    }
    if let Some(queue) =
        posix_queues::of_descriptor(tables, found.link, found.target, found.metadata)?
    {
        return Ok(Ok(FileKind::PosixQueue { queue }));
    }
    let position = found.info.position;
    let handle = found.info.flags & libc::O_PATH != 0;
    if kind.is_file() && found.target.starts_with(b"/memfd:") {
        let name = found.target.strip_prefix(b"/memfd:").unwrap_or_default();
        let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
        let memory = tables.shared_memory((device, inode), found.link, Some(name))?;
        return Ok(Ok(FileKind::SharedMemory { memory, position }));
    }
    if found.target.starts_with(b"/secretmem") {
        return Ok(Err("secret memory (memfd_secret) is not supported".to_owned()));
    }
    if kind.is_file() && found.metadata.nlink() == 0 {
        let path = std::path::Path::new(std::ffi::OsStr::from_bytes(found.target));
        let file = tables.unlinked((device, inode), found.link, path, found.metadata)?;
        return Ok(Ok(FileKind::Unlinked { file, position }));
    }
    if found.target.starts_with(b"anon_inode:") {
        if found.target == b"anon_inode:[eventpoll]" {
            return Ok(Ok(epoll::note(found.pid, found.fd, found.info, tables)));
        }
        if found.target == b"anon_inode:inotify" {
            return inotify::note(found, tables);
        }
        return Ok(anonymous(found, tables));
    }
    if kind.is_fifo() && found.target.starts_with(b"pipe:") {
        return pipes::collect(found, tables).map(|pipe| pipe.map(|pipe| FileKind::Pipe { pipe }));
    }
    if kind.is_socket() && !handle {
        return sockets::note(found, tables);
    }
    if let Some(kind) = procfiles::classify(found, tables)? {
        return Ok(kind);
    }
    if kind.is_dir() && found.metadata.nlink() == 0 {
        let directory =
            directories::collect_unlinked(found.link, found.target, found.metadata, tables)?;
        return Ok(Ok(FileKind::UnlinkedDirectory { directory }));
    }
    if kind.is_fifo() && found.metadata.nlink() == 0 && !handle {
        let path = Bytes::from(nameless::former_path(found.target).to_vec());
        let mode = found.metadata.mode() & 0o7777;
        return pipes::collect(found, tables)
            .map(|pipe| pipe.map(|pipe| FileKind::UnlinkedFifo { pipe, path, mode }));
    }
    if let Some(kind) = nameless::classify(found, tables)? {
        return Ok(kind);
    }
    // Everything else has a name, and has to be found by it again.
    let Some(path) = tables.path_of((device, inode), found.target)? else {
        let name = String::from_utf8_lossy(found.target);
        return Ok(Err(format!(
            "{name} is open, but no longer at its path, or lies outside the container"
        )));
    };
    if handle {
        return Ok(Ok(FileKind::Name { path }));
    }
    if kind.is_file() {
        let bytes = found.metadata.size();
        return Ok(Ok(FileKind::Regular { path, position, bytes, device, inode }));
    }
    if kind.is_dir() {
        let (names, whole) =
            directories::read_so_far(found.link, position).map_err(read(found.link))?;
        return Ok(Ok(FileKind::Directory { path, position, names, whole }));
    }
    if kind.is_fifo() {
        return pipes::collect(found, tables)
            .map(|pipe| pipe.map(|pipe| FileKind::Fifo { pipe, path }));
    }
    if kind.is_char_device() {
        let number = device_number(found.metadata.rdev());
        if PLAIN_DEVICES.contains(&number) {
            return Ok(Ok(FileKind::Device { path, major: number.0, minor: number.1 }));
        }
    }
    Ok(Err(format!(
        "{} is a device, which is not supported",
        String::from_utf8_lossy(found.target)
    )))
}

/// A stream that the container was given from outside, if that is what a descriptor refers to.
fn outside(found: &Found<'_>, tables: &mut Tables<'_>) -> Option<FileKind> {
    let (device, inode) = found.identity();
    let wanted = OutsideStream { device, inode };
    let streams: Vec<u32> = (0u32..)
        .zip(&tables.request.outside)
        .filter(|(_, stream)| **stream == wanted)
        .map(|(number, _)| number)
        .collect();
    let (first, last) = (*streams.first()?, *streams.last()?);
    let kind = found.metadata.file_type();
    let is_plain = kind.is_file()
        || kind.is_char_device() && PLAIN_DEVICES.contains(&device_number(found.metadata.rdev()));
    // What the container has a path for it may have opened itself.
    if is_plain && tables.root.identity(found.target).ok() == Some((device, inode)) {
        return None;
    }
    // One file may have been given as several streams, for reading and for writing.
    let number = u32::try_from(found.fd).ok().filter(|fd| streams.contains(fd));
    let reads = found.info.flags & libc::O_ACCMODE == libc::O_RDONLY;
    let stream = number.unwrap_or(if reads { first } else { last });
    let file = index(tables.files.len());
    let known = *tables.known_outside.entry(stream).or_insert(file);
    Some(if known == file {
        FileKind::Outside { stream }
    } else {
        FileKind::OutsideAgain { stream, position: found.info.position }
    })
}

/// Major and minor number as `makedev(3)` packs them.
pub(crate) fn device_number(number: u64) -> (u32, u32) {
    (libc::major(number), libc::minor(number))
}

/// Files of the kernel's own that have no name anywhere.
fn anonymous(found: &Found<'_>, tables: &mut Tables<'_>) -> Result<FileKind, String> {
    if found.target == b"anon_inode:[eventfd]" {
        let count =
            found.line("eventfd-count").and_then(|count| u64::from_str_radix(count, 16).ok());
        let semaphore = found.line("eventfd-semaphore") == Some("1");
        return match count {
            Some(count) => Ok(FileKind::EventFd { count, semaphore }),
            None => Err("this kernel does not tell the count of an eventfd".to_owned()),
        };
    }
    if found.target == b"anon_inode:[timerfd]" {
        // A periodic timer that nobody has read stands still; asking for its rest lets it count what it has missed.
        let told = found.handle.get_fd(found.fd).and_then(|timer| {
            rustix::time::timerfd_gettime(&timer)?;
            proc::descriptor_info(found.pid, found.fd)
        });
        let asked = tables.clocks_read.elapsed();
        return told
            .ok()
            .and_then(|info| timers::describe(&info, asked))
            .map(FileKind::TimerFd)
            .ok_or_else(|| "this kernel does not tell the state of a timer".to_owned());
    }
    if found.target == b"anon_inode:[signalfd]" {
        return found
            .line("sigmask")
            .and_then(|mask| u64::from_str_radix(mask, 16).ok())
            .map(|mask| FileKind::SignalFd { mask })
            .ok_or_else(|| "this kernel does not tell the signals of a signalfd".to_owned());
    }
    if found.target == b"anon_inode:[pidfd]" {
        return procfiles::process(found, tables);
    }
    let kind = found.target.strip_prefix(b"anon_inode:").unwrap_or(found.target);
    Err(format!("an open {} is not supported", String::from_utf8_lossy(kind)))
}

/// Notes the locks that `fdinfo` shows: `1: POSIX  ADVISORY  WRITE 77 fe:01:1234 0 EOF`.
///
/// A lock of the process shows on each of its descriptors for the file, also on those that could not have taken it.
fn locks(pid: Pid, fd: i32, info: &DescriptorInfo, locks: &mut Vec<Lock>, tables: &mut Tables<'_>) {
    let lines =
        info.others.iter().filter(|(name, value)| name == "lock" && !notices::is_lease(value));
    for (_, value) in lines {
        let access = info.flags & libc::O_ACCMODE;
        match parse_lock(fd, value) {
            Some(Lock { kind: LockKind::Posix, exclusive, .. })
                if access == if exclusive { libc::O_RDONLY } else { libc::O_WRONLY } => {}
            Some(lock) => locks.push(lock),
            None => tables.refuse(
                pid,
                Place::Descriptor(fd),
                format!("the file lock `{value}` is not supported"),
            ),
        }
    }
}

fn parse_lock(fd: i32, text: &str) -> Option<Lock> {
    let mut fields = text.split_ascii_whitespace().skip(1);
    let kind = match fields.next()? {
        "POSIX" => LockKind::Posix,
        "OFDLCK" => LockKind::OpenFile,
        "FLOCK" => LockKind::Flock,
        _ => return None,
    };
    if fields.next()? != "ADVISORY" {
        return None;
    }
    let exclusive = match fields.next()? {
        "WRITE" => true,
        "READ" => false,
        _ => return None,
    };
    let (_, _) = (fields.next()?, fields.next()?);
    let start: u64 = fields.next()?.parse().ok()?;
    let bytes = match fields.next()? {
        "EOF" => 0,
        end => end.parse::<u64>().ok()?.checked_sub(start)?.checked_add(1)?,
    };
    Some(Lock { fd, kind, exclusive, start, bytes })
}

/// The record of a pipe that is being filled in.
pub(crate) fn new_pipe(tables: &mut Tables<'_>, identity: (u64, u64), pipe: Pipe) -> u32 {
    let number = index(tables.pipes.len());
    tables.pipes.push(pipe);
    tables.known_pipes.insert(identity, number);
    number
}

/// How the engine hands descriptors to processes that are being built: a socket that all of them inherit from the blank init.
#[derive(Debug)]
pub(crate) struct Channel {
    ours: OwnedFd,
    /// The number that it has in every process.
    number: RawFd,
}

/// Descriptors in one message; the kernel takes 253 (SCM_MAX_FD).
const DESCRIPTORS_AT_ONCE: usize = 200;

impl Channel {
    /// Closes all that the blank init has open and leaves it the channel, at a number that is not in `taken`.
    pub(crate) fn make(
        init: &mut Process,
        taken: &BTreeSet<RawFd>,
    ) -> Result<Channel, RestoreError> {
        const NOFILE: u32 = libc::RLIMIT_NOFILE;
        // Descriptors beyond the soft limit may be open: it was lowered after them.
        let limits = proc::limits(init.pid).map_err(make("the limits of the blank init"))?;
        if let Some((_, hard)) = limits.get(NOFILE as usize) {
            proc::set_limit(init.pid, NOFILE, *hard, *hard)
                .map_err(make("the limits of the blank init"))?;
        }
        let number = (0..).find(|number| !taken.contains(number)).expect("numbers do not run out");
        let mut tape = init.tape()?;
        tape.call(
            "close its descriptors",
            libc::SYS_close_range,
            [0, u64::from(u32::MAX), 0, 0, 0, 0],
        );
        let pair = tape.output(8);
        let arguments = [
            u64::from(libc::AF_UNIX.unsigned_abs()),
            u64::from(libc::SOCK_SEQPACKET.unsigned_abs()),
            0,
            pair.address,
            0,
            0,
        ];
        tape.call("make a socket pair", libc::SYS_socketpair, arguments);
        init.run_all(0, &tape, End::Breakpoint)?;
        let [pair] = process::words(&init.output(pair)?);
        let (ours, theirs) = (pair & 0xffff_ffff, pair >> 32);
        let handle = PidFd::open(init.pid).map_err(make("a handle on the blank init"))?;
        let end = handle
            .get_fd(RawFd::try_from(ours).expect("descriptors are ints"))
            .map_err(make("the engine's end of a socket pair"))?;
        let mut tape = init.tape()?;
        let wanted = u64::from(number.unsigned_abs());
        // Ours goes first: the wanted number may be the one that it has.
        tape.call("close a socket", libc::SYS_close, [ours, 0, 0, 0, 0, 0]);
        if theirs != wanted {
            tape.call("move a socket", libc::SYS_dup3, [theirs, wanted, 0, 0, 0, 0]);
            tape.call("close a socket", libc::SYS_close, [theirs, 0, 0, 0, 0, 0]);
        }
        init.run_all(0, &tape, End::Breakpoint)?;
        Ok(Channel { ours: end, number })
    }

    /// Hands over descriptors, and returns the numbers that they got: the lowest free ones, in order.
    pub(crate) fn send(
        &mut self,
        process: &mut Process,
        files: &[BorrowedFd<'_>],
    ) -> Result<Vec<RawFd>, RestoreError> {
        let mut numbers = Vec::with_capacity(files.len());
        for files in files.chunks(DESCRIPTORS_AT_ONCE) {
            numbers.extend(self.send_some(process, files)?);
        }
        Ok(numbers)
    }

    fn send_some(
        &mut self,
        process: &mut Process,
        files: &[BorrowedFd<'_>],
    ) -> Result<Vec<RawFd>, RestoreError> {
        let raw: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
        let message = [IoSlice::new(b"f")];
        sendmsg::<()>(
            self.ours.as_raw_fd(),
            &message,
            &[ControlMessage::ScmRights(&raw)],
            MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT,
            None,
        )
        .map_err(io::Error::from)
        .map_err(make("descriptors for the container"))?;
        const HEADER_BYTES: usize = 16;
        let bytes = HEADER_BYTES + files.len() * size_of::<RawFd>();
        let mut tape = process.tape()?;
        let byte = tape.output(8);
        let vector = tape.words(&[byte.address, 1]);
        let control = tape.output(bytes.next_multiple_of(8));
        let header = tape.words(&[0, 0, vector, 1, control.address, control.bytes as u64, 0]);
        let arguments = [u64::from(self.number.unsigned_abs()), header, 0, 0, 0, 0];
        tape.call("receive descriptors", libc::SYS_recvmsg, arguments);
        process.run_all(0, &tape, End::Breakpoint)?;
        let control = process.output(control)?;
        let [length] = process::words(&control);
        let numbers: Vec<RawFd> = control
            .get(HEADER_BYTES..usize::try_from(length).unwrap_or(0).min(control.len()))
            .unwrap_or_default()
            .chunks_exact(size_of::<RawFd>())
            .map(|number| RawFd::from_le_bytes(number.try_into().expect("chunks of four bytes")))
            .collect();
        if numbers.len() == files.len() {
            Ok(numbers)
        } else {
            // The process's own limit on descriptors cuts the list short.
            Err(RestoreError::Make {
                what: "descriptors".to_owned(),
                source: io::Error::from_raw_os_error(libc::EMFILE),
            })
        }
    }
}

/// The open file descriptions of a restored container, each once.
#[derive(Debug)]
pub(crate) struct Files {
    list: Vec<OwnedFd>,
    /// What processes register themselves once they have their descriptors.
    own_watches: epoll::OwnWatches,
}

/// Lets the engine have as many descriptors as it may: the container's are open here for a moment.
pub(crate) fn make_room() -> io::Result<()> {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
    let highest = rustix::process::Rlimit { current: limit.maximum, ..limit };
    Ok(rustix::process::setrlimit(rustix::process::Resource::Nofile, highest)?)
}

impl Files {
    /// Lets inotify instances watch what they watched. Nothing may touch the container's files after this.
    pub(crate) fn watch(
        &self,
        container: &Container,
        root: &Root,
        shared: &Shared,
    ) -> Result<(), RestoreError> {
        inotify::restore(container, &self.list, root, shared)
    }

    /// Lets a process ask for the signals that its files send.
    pub(crate) fn ask_for_notices(
        &self,
        process: &mut Process,
        asks: &[(i32, u32)],
        container: &Container,
    ) -> Result<(), RestoreError> {
        notices::restore(process, asks, container, &self.list)
    }
}

/// The processes and threads of a container that is being made.
#[derive(Debug)]
pub(crate) struct Processes {
    /// By their numbers in the container, as the engine numbers them.
    pub(crate) numbers: procfiles::Numbers,
    /// The numbers in the container of those of [`Container::ended`].
    pub(crate) ended: Vec<i32>,
}

/// Makes all open file descriptions, but those of terminals, which exist.
///
/// `init` is the container's, `outside` are the new container's own standard streams.
#[expect(
    clippy::too_many_arguments,
    reason = "files are made of what all other parts of the restore have made"
)]
pub(crate) fn make_files(
    init: Pid,
    container: &Container,
    root: &Root,
    outside: &[Option<OwnedFd>],
    shared: &Shared,
    processes: &Processes,
    sockets: &mut unix_sockets::Made,
    mut internet: internet::Made,
    terminals: &mut terminals::Made,
) -> Result<Files, RestoreError> {
    let mut nodes = nameless::restore(container, root)?;
    let mut files = Vec::with_capacity(container.files.len());
    let mut maker = Maker {
        init,
        container,
        root,
        outside,
        shared,
        processes,
        sockets,
        pipes: pipes::Made::default(),
        originals: Originals::default(),
    };
    for (number, file) in (0u32..).zip(&container.files) {
        if let Some(terminal) = terminals.take(number) {
            files.push(terminal);
            continue;
        }
        if let Some(queue) = shared.queues.opened(number) {
            set_flags(queue, file.flags)?;
            files.push(queue.try_clone().map_err(make("a message queue"))?);
            continue;
        }
        let socket = internet.remove(&number);
        let made = match socket.or_else(|| nodes.remove(&number)) {
            Some(made) => {
                if file.flags & libc::O_PATH == 0 {
                    set_flags(&made, file.flags)?;
                }
                made
            }
            None => maker.make(file)?,
        };
        if file.notices.write_hint != 0 {
            // It is good for speed only.
            let _ = fcntl::set_write_hint(made.as_fd(), file.notices.write_hint);
        }
        files.push(made);
    }
    // Before anybody watches: only what still waits is news.
    sockets.fill(&files, root)?;
    epoll::restore(container, &files)?;
    Ok(Files { list: files, own_watches: epoll::own_watches(container)? })
}

/// Makes open files of all kinds, one after another, from the parts of the restore that they need.
struct Maker<'a> {
    init: Pid,
    container: &'a Container,
    root: &'a Root,
    outside: &'a [Option<OwnedFd>],
    shared: &'a Shared,
    processes: &'a Processes,
    sockets: &'a unix_sockets::Made,
    pipes: pipes::Made,
    originals: Originals,
}

fn damaged(what: &str) -> RestoreError {
    RestoreError::Damaged(format!("an open file refers to {what} that is not there"))
}

impl<'a> Maker<'a> {
    fn make(&mut self, file: &OpenFile) -> Result<OwnedFd, RestoreError> {
        // A process asks for signals itself, in `notices`.
        let flags = file.flags & !libc::O_ASYNC;
        let root = self.root;
        // What is not opened gets its flags below.
        let made = match &file.kind {
            FileKind::Regular { path, position, .. } => {
                // What O_TMPFILE made and somebody named is a file like any other.
                let file = open_below(root, path, flags & !libc::O_TMPFILE)?;
                seek(&file, *position)?;
                return Ok(file.into());
            }
            FileKind::Directory { path, position, names, whole } => {
                let file = open_below(root, path, flags)?;
                if *position != 0 {
                    let what = format!("how far {} was read", String::from_utf8_lossy(path));
                    directories::go_on(&file, names, *whole).map_err(make(what))?;
                }
                return Ok(file.into());
            }
            FileKind::UnlinkedDirectory { directory } => {
                let object = self.shared.directories.get(*directory as usize);
                let object = object.ok_or_else(|| damaged("a directory"))?;
                let what = make("a directory without a name");
                return Ok(Shared::reopen(object, flags).map_err(what)?.into());
            }
            FileKind::Name { path } => {
                let what = format!("the name {}", String::from_utf8_lossy(path));
                let kept = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
                return root.open(path, flags & kept | libc::O_PATH).map_err(make(what));
            }
            FileKind::Pseudo { path, position } => {
                return Ok(procfiles::open(root, path, flags, *position)?.into());
            }
            FileKind::EndedPseudo { process, path } => {
                let number = self.ended(*process)?;
                return Ok(procfiles::open_ended(root, number, path, flags)?.into());
            }
            FileKind::Namespace { name } => {
                return Ok(procfiles::open_namespace(self.init, name, flags)?.into());
            }
            FileKind::Device { path, major, minor } => {
                return open_device(root, path, (*major, *minor), flags);
            }
            FileKind::Pipe { pipe } => {
                let record = self.pipe(*pipe, "a pipe")?;
                return self.pipes.pipe_end(*pipe, record, flags).map_err(make("a pipe"));
            }
            FileKind::Fifo { pipe, path } => {
                let record = self.pipe(*pipe, "a FIFO")?;
                let fifo = self.pipes.fifo(*pipe, record, root, path, flags);
                return fifo.map_err(make("a FIFO"));
            }
            FileKind::UnlinkedFifo { pipe, path, mode } => {
                let record = self.pipe(*pipe, "a FIFO")?;
                let fifo = self.pipes.unlinked_fifo(*pipe, record, root, path, *mode, flags);
                return fifo.map_err(make("a FIFO without a name"));
            }
            FileKind::PosixQueue { queue } => {
                let queue = self.shared.queues.get(*queue);
                let queue = queue.ok_or_else(|| damaged("a message queue"))?;
                return Ok(Shared::reopen(queue, flags).map_err(make("a message queue"))?.into());
            }
            FileKind::Outside { stream } => {
                // The description is the engine's above; of its flags this one is the program's.
                let stream = outside_stream(self.outside, *stream)?;
                let stream = stream.try_clone().map_err(make("a standard stream"))?;
                set_nonblocking(&stream, flags).map_err(make("the flags of a standard stream"))?;
                return Ok(stream);
            }
            FileKind::Internet(_) | FileKind::Netlink(_) | FileKind::Packet(_) => {
                return Err(damaged("a socket"));
            }
            FileKind::UnlinkedNode { .. } => return Err(damaged("a file without a name")),
            FileKind::Terminal { .. } | FileKind::TerminalMaster { .. } => {
                return Err(damaged("a terminal"));
            }
            FileKind::Unlinked { file, position } => {
                let file = self.unlinked(*file, flags)?;
                seek(&file, *position)?;
                file.into()
            }
            FileKind::SharedMemory { memory, position } => {
                let file = self.shared_memory(*memory, flags)?;
                seek(&file, *position)?;
                file.into()
            }
            FileKind::OutsideAgain { stream, position } => {
                self.outside_again(*stream, *position, flags)?
            }
            FileKind::EventFd { count, semaphore } => {
                event(*count, *semaphore).map_err(make("an eventfd"))?
            }
            FileKind::Epoll { .. } => {
                let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC);
                epoll.map_err(io::Error::from).map_err(make("an epoll"))?.0
            }
            FileKind::TimerFd(timer) => {
                let clocks = &self.container.clocks;
                let passed_ns = clocks::passed(self.init, clocks).map_err(make("a timer"))?;
                timers::restore(timer, clocks, passed_ns).map_err(make("a timer"))?
            }
            FileKind::SignalFd { mask } => signalfd::create(*mask).map_err(make("a signalfd"))?,
            FileKind::PidFd { pid } => self.process(*pid, false)?,
            FileKind::ThreadFd { tid } => self.process(*tid, true)?,
            FileKind::EndedPidFd { process, thread } => {
                self.process(self.ended(*process)?, *thread)?
            }
            FileKind::Inotify { .. } => {
                rustix::fs::inotify::init(rustix::fs::inotify::CreateFlags::CLOEXEC)
                    .map_err(io::Error::from)
                    .map_err(make("an inotify instance"))?
            }
            FileKind::SocketPair { pair, end } => {
                let socket = self.sockets.pair_end(*pair, *end);
                socket.ok_or_else(|| damaged("a socket"))?.map_err(make("a unix socket"))?
            }
            FileKind::UnixSocket { socket } => {
                let socket = self.sockets.file(*socket);
                socket.ok_or_else(|| damaged("a socket"))?.map_err(make("a unix socket"))?
            }
        };
        // A mere handle has none of those that can be set.
        if flags & libc::O_PATH == 0 {
            set_flags(&made, flags)?;
        }
        Ok(made)
    }

    fn pipe(&self, number: u32, what: &str) -> Result<&'a Pipe, RestoreError> {
        self.container.pipes.get(number as usize).ok_or_else(|| damaged(what))
    }

    /// The number that a process has which is there in place of one that had ended.
    fn ended(&self, process: u32) -> Result<i32, RestoreError> {
        let number = self.processes.ended.get(process as usize);
        number.copied().ok_or_else(|| damaged("a process"))
    }

    fn process(&self, number: i32, thread: bool) -> Result<OwnedFd, RestoreError> {
        procfiles::open_process(&self.processes.numbers, number, thread)
    }

    fn unlinked(&mut self, number: u32, flags: i32) -> Result<File, RestoreError> {
        let what = || make("an unlinked file");
        let object = self.shared.unlinked.get(number as usize);
        let object = object.ok_or_else(|| damaged("an unlinked file"))?;
        if self.originals.take_temporary(number, flags) {
            return object.try_clone().map_err(what());
        }
        // Opened again, what O_TMPFILE made is a file like any other.
        Shared::reopen(object, flags & !libc::O_TMPFILE).map_err(what())
    }

    fn shared_memory(&mut self, number: u32, flags: i32) -> Result<File, RestoreError> {
        let object = self.shared.memory.get(number as usize);
        let object = object.ok_or_else(|| damaged("shared memory"))?;
        let file = match self.originals.take(number, flags) {
            true => object.try_clone(),
            false => Shared::reopen(object, flags),
        };
        file.map_err(make("shared memory"))
    }

    fn outside_again(
        &self,
        stream: u32,
        position: u64,
        flags: i32,
    ) -> Result<OwnedFd, RestoreError> {
        let stream = outside_stream(self.outside, stream)?;
        let what = || make("a standard stream that was opened once more");
        let file = File::from(stream.try_clone().map_err(what())?);
        let is_file = file.metadata().map_err(what())?.is_file();
        let file = Shared::reopen(&file, flags | libc::O_NONBLOCK).map_err(what())?;
        if is_file {
            seek(&file, position)?;
        }
        Ok(file.into())
    }
}

fn open_device(
    root: &Root,
    path: &[u8],
    number: (u32, u32),
    flags: i32,
) -> Result<OwnedFd, RestoreError> {
    if !PLAIN_DEVICES.contains(&number) {
        let (major, minor) = number;
        return Err(RestoreError::Damaged(format!("device {major}:{minor} is never saved")));
    }
    let expected = |metadata: &fs::Metadata| {
        metadata.file_type().is_char_device() && device_number(metadata.rdev()) == number
    };
    Ok(open_checked(root, path, flags, &expected)?.into())
}

fn event(count: u64, semaphore: bool) -> io::Result<OwnedFd> {
    let kind = if semaphore { EfdFlags::EFD_SEMAPHORE } else { EfdFlags::empty() };
    let event = EventFd::from_value_and_flags(0, kind | EfdFlags::EFD_CLOEXEC)?;
    if count > 0 {
        event.write(count)?;
    }
    Ok(event.into())
}

/// Objects whose first description, which made them, a program has by now.
#[derive(Debug, Default)]
struct Originals {
    /// Made by `memfd_create`: unlike one that was opened, it does not count as somebody who writes to the file, so that the file
    /// can be executed.
    memory: BTreeSet<u32>,
    /// Made by `O_TMPFILE`, which stays among its flags.
    temporary: BTreeSet<u32>,
}

impl Originals {
    /// Whether a description of shared memory with these flags is to be that one: the first that reads and writes.
    fn take(&mut self, memory: u32, flags: i32) -> bool {
        flags & libc::O_ACCMODE == libc::O_RDWR && self.memory.insert(memory)
    }

    /// The same of a file.
    fn take_temporary(&mut self, file: u32, flags: i32) -> bool {
        flags & libc::O_TMPFILE == libc::O_TMPFILE
            && flags & libc::O_ACCMODE == libc::O_RDWR
            && self.temporary.insert(file)
    }
}

fn outside_stream(outside: &[Option<OwnedFd>], stream: u32) -> Result<&OwnedFd, RestoreError> {
    outside.get(stream as usize).and_then(Option::as_ref).ok_or_else(|| {
        let what = format!("standard stream {stream}: the new container has none");
        RestoreError::Make { what, source: io::ErrorKind::NotFound.into() }
    })
}

/// Gives a description that somebody else has made the `O_NONBLOCK` of `flags`.
fn set_nonblocking(fd: &OwnedFd, flags: i32) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let present = OFlag::from_bits_retain(fcntl(fd, FcntlArg::F_GETFL)?);
    let mut wanted = present;
    wanted.set(OFlag::O_NONBLOCK, flags & libc::O_NONBLOCK != 0);
    if wanted != present {
        fcntl(fd, FcntlArg::F_SETFL(wanted))?;
    }
    Ok(())
}

fn seek(file: &File, position: u64) -> Result<(), RestoreError> {
    use std::io::{Seek, SeekFrom};
    let mut file = file;
    if position != 0 {
        file.seek(SeekFrom::Start(position)).map_err(make("the position of an open file"))?;
    }
    Ok(())
}

/// Sets the status flags that `fcntl` can set.
pub(crate) fn set_flags(fd: &OwnedFd, flags: i32) -> Result<(), RestoreError> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    fcntl(fd, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags)))
        .map(drop)
        .map_err(io::Error::from)
        .map_err(make("the flags of an open file"))
}

/// Gives a process its descriptors and locks, and closes the channel in it.
///
/// Received in ascending order of the numbers they are meant for, each descriptor arrives at its number or below it; moved in
/// descending order, none is overwritten.
pub(crate) fn install(
    process: &mut Process,
    channel: &mut Channel,
    alive: &Alive,
    files: &Files,
) -> Result<(), RestoreError> {
    let mut wanted: Vec<&Descriptor> = alive.descriptors.iter().collect();
    wanted.sort_by_key(|descriptor| descriptor.fd);
    let channel_number = u64::from(channel.number.unsigned_abs());
    for group in wanted.chunks(DESCRIPTORS_AT_ONCE) {
        let borrowed: Vec<BorrowedFd<'_>> = group
            .iter()
            .map(|descriptor| {
                files.list.get(descriptor.file as usize).map(AsFd::as_fd).ok_or_else(|| {
                    RestoreError::Damaged(format!(
                        "descriptor {} refers to a file that is not there",
                        descriptor.fd
                    ))
                })
            })
            .collect::<Result<_, _>>()?;
        let numbers = channel.send(process, &borrowed)?;
        let mut tape = process.tape()?;
        for (descriptor, number) in group.iter().zip(numbers).rev() {
            let number = u64::from(number.unsigned_abs());
            let fd = u64::from(descriptor.fd.unsigned_abs());
            let close_on_exec = u64::from(descriptor.close_on_exec);
            if number == fd {
                let set = [fd, u64::from(libc::F_SETFD.unsigned_abs()), close_on_exec, 0, 0, 0];
                tape.call("set a descriptor's flags", libc::SYS_fcntl, set);
            } else {
                let flags = close_on_exec * u64::from(libc::O_CLOEXEC.unsigned_abs());
                tape.call(
                    format!("move descriptor {fd}"),
                    libc::SYS_dup3,
                    [number, fd, flags, 0, 0, 0],
                );
                tape.call("close a descriptor", libc::SYS_close, [number, 0, 0, 0, 0, 0]);
            }
        }
        process.run_all(0, &tape, End::Breakpoint)?;
    }
    let mut tape = process.tape()?;
    tape.call("close the channel", libc::SYS_close, [channel_number, 0, 0, 0, 0, 0]);
    let pid = alive.threads.first().map_or(0, |leader| leader.tid);
    epoll::register(&mut tape, files.own_watches.get(&pid).map_or(&[], Vec::as_slice));
    for lock in &alive.locks {
        let fd = u64::from(lock.fd.unsigned_abs());
        let (number, arguments) = match lock.kind {
            LockKind::Flock => {
                let operation =
                    libc::LOCK_NB | if lock.exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
                (libc::SYS_flock, [fd, u64::from(operation.unsigned_abs()), 0, 0, 0, 0])
            }
            LockKind::Posix | LockKind::OpenFile => {
                let kind = if lock.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
                // `struct flock`: type and whence (short), start, length, pid.
                let lock_words = [u64::from(kind.unsigned_abs()), lock.start, lock.bytes, 0];
                let address = tape.words(&lock_words);
                let command =
                    if lock.kind == LockKind::Posix { libc::F_SETLK } else { libc::F_OFD_SETLK };
                (libc::SYS_fcntl, [fd, u64::from(command.unsigned_abs()), address, 0, 0, 0])
            }
        };
        tape.call(format!("lock descriptor {fd}"), number, arguments);
    }
    process.run_all(0, &tape, End::Breakpoint)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lock that is not restored lets two writers into a database at once.
    #[test]
    fn locks_are_read_as_the_kernel_writes_them() {
        let cases = [
            ("1: POSIX  ADVISORY  WRITE 77 fe:01:1234 100 199", LockKind::Posix, true, 100, 100),
            ("2: OFDLCK ADVISORY  READ -1 fe:01:1234 0 EOF", LockKind::OpenFile, false, 0, 0),
            ("1: FLOCK  ADVISORY  WRITE 9 00:2b:9 0 EOF", LockKind::Flock, true, 0, 0),
        ];
        for (text, kind, exclusive, start, bytes) in cases {
            assert_eq!(
                parse_lock(3, text),
                Some(Lock { fd: 3, kind, exclusive, start, bytes }),
                "{text}"
            );
        }
        assert_eq!(parse_lock(3, "1: LEASE  ACTIVE    WRITE 9 00:2b:9 0 EOF"), None);
    }
}
