//! One plain record per kernel object.
//!
//! Records hold no host-specific value: process ids are those of the container's own pid namespace, paths are relative to its
//! root, devices are given by number only where the number is the device's meaning. Whatever differs from host to host
//! arrives as an argument of the restore.

use serde::{Deserialize, Serialize};

/// Bytes, encoded as a byte string instead of a list of numbers.
pub type Bytes = serde_bytes::ByteBuf;

/// A container at one instant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    pub clocks: Clocks,
    /// Parents before their children; the first is the container's init.
    pub processes: Vec<Process>,
    /// Every open file description, each once, however many descriptors refer to it.
    pub files: Vec<OpenFile>,
    pub pipes: Vec<Pipe>,
    /// Of capsules that have no `unix_sockets`.
    pub socket_pairs: Vec<SocketPair>,
    pub shared_memory: Vec<SharedMemory>,
    pub unlinked_files: Vec<UnlinkedFile>,
    #[serde(default)]
    pub unix_sockets: Vec<UnixSocket>,
    /// The addresses of its network interfaces, each with the interface's name.
    #[serde(default)]
    pub addresses: Vec<(Bytes, Bytes)>,
    /// What the program has called its machine, where that is not what its creator did.
    #[serde(default)]
    pub names: Option<Names>,
    /// Directories that are open or worked in and have no name, parents before what was in them.
    #[serde(default)]
    pub unlinked_directories: Vec<UnlinkedDirectory>,
    /// Files of other kinds that have no name.
    #[serde(default)]
    pub unlinked_nodes: Vec<UnlinkedNode>,
    /// Processes that have ended and been waited for, and of which somebody has a descriptor.
    #[serde(default)]
    pub ended: Vec<EndedProcess>,
    #[serde(default)]
    pub terminals: Vec<Terminal>,
    /// The vdso's code, by digest: addresses inside it are in registers and in the memory of language runtimes.
    pub vdso_sha256: Bytes,
    /// What its IPC namespace holds.
    #[serde(default)]
    pub system_v: SystemV,
    #[serde(default)]
    pub posix_queues: Vec<PosixQueue>,
}

/// Names of a UTS namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    pub host: Bytes,
    pub domain: Bytes,
}

/// Clocks at the instant of the capture, as the container saw them, in nanoseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Clocks {
    pub monotonic_ns: i64,
    pub boottime_ns: i64,
    pub realtime_ns: i64,
    /// For how long after these times the container's state was read; its clocks go on from the end of that.
    #[serde(default)]
    pub reading_ns: u64,
}

/// A process that runs, or a zombie that its parent has not waited for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub pid: i32,
    /// 0 for the container's init.
    pub parent: i32,
    pub group: i32,
    pub session: i32,
    pub name: Bytes,
    pub state: ProcessState,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ProcessState {
    Alive(Box<Alive>),
    /// The status that `wait` will return, the signal that its parent has got for the end, and whose process it was.
    Zombie {
        exit_status: i32,
        #[serde(default = "child_signal")]
        exit_signal: i32,
        #[serde(default)]
        uid: u32,
    },
}

/// SIGCHLD: what the end of a process that `fork` has made is told by.
fn child_signal() -> i32 {
    17
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alive {
    /// The page space of its private memory: page numbers are addresses.
    pub space: u32,
    pub mappings: Vec<Mapping>,
    pub layout: Layout,
    pub executable: Path,
    pub auxiliary_vector: Bytes,
    pub working_directory: Path,
    pub umask: u32,
    pub descriptors: Vec<Descriptor>,
    pub locks: Vec<Lock>,
    /// Soft and hard, by `RLIMIT_` number; `u64::MAX` is none.
    pub limits: Vec<(u64, u64)>,
    /// By signal number from 1.
    pub actions: Vec<SignalAction>,
    pub pending: Vec<Bytes>,
    /// Real, virtual and profiling, as `getitimer` returns them: interval and rest in microseconds.
    pub interval_timers: [IntervalTimer; 3],
    pub posix_timers: Vec<PosixTimer>,
    pub stopped: Option<Stopped>,
    pub dumpable: bool,
    pub subreaper: bool,
    /// What the process has registered for `membarrier`, as its `MEMBARRIER_CMD_GET_REGISTRATIONS` tells.
    pub membarrier: u32,
    /// Vector state that the process may use on demand: features of XCR0, as `ARCH_GET_XCOMP_PERM` tells.
    pub vector_features: u64,
    pub oom_score_adjust: i32,
    pub personality: u32,
    #[serde(default)]
    pub memory: MemoryAttributes,
    /// The signal that its parent gets when it ends.
    pub exit_signal: i32,
    /// The process's leader first.
    pub threads: Vec<Thread>,
    #[serde(default)]
    pub sharing: Sharing,
    /// SIGCONT has ended a stop, and its parent has not waited for that.
    #[serde(default)]
    pub continued: bool,
    /// Empty for the container's own root.
    #[serde(default)]
    pub root_directory: Path,
    /// Index into [`Container::unlinked_directories`] where the working directory has no name.
    #[serde(default)]
    pub removed_directory: Option<u32>,
    /// Where the working directory belongs to a process that has ended.
    #[serde(default)]
    pub ended_directory: Option<EndedDirectory>,
    /// Set where `executable` leads nowhere.
    #[serde(default)]
    pub nameless_executable: Option<NamelessExecutable>,
    /// What of its memory a dump has, as `/proc/PID/coredump_filter` tells.
    #[serde(default)]
    pub dump_filter: Option<u32>,
    /// The local descriptor table, as `modify_ldt` reads it.
    #[serde(default)]
    pub descriptor_table: Bytes,
    /// The nice value that its session has among others, as `/proc/PID/autogroup` tells.
    #[serde(default)]
    pub autogroup_nice: i32,
}

/// Where a thread is that has left what its process shares by `CLONE_FS`. The fields are as those of [`Alive`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Directories {
    pub root_directory: Path,
    pub working_directory: Path,
    pub removed_directory: Option<u32>,
    pub umask: u32,
}

/// A directory of `/proc/PID` of a process that has ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedDirectory {
    /// Index into [`Container::ended`].
    pub process: u32,
    /// Below `/proc/PID`.
    pub path: Bytes,
}

/// A program that runs and whose file has no name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NamelessExecutable {
    /// Index into [`Container::unlinked_files`].
    Unlinked { file: u32 },
    /// A memfd: index into [`Container::shared_memory`].
    SharedMemory { memory: u32 },
}

/// What a process shares with others by `clone`: each time the first process that has it, which has the rest of its record.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sharing {
    /// `CLONE_VM`: the mappings.
    pub memory: Option<i32>,
    /// `CLONE_FILES`: the descriptors, and locks that belong to a process.
    pub descriptors: Option<i32>,
    /// `CLONE_FS`: working directory, root and umask.
    pub directory: Option<i32>,
    /// `CLONE_SIGHAND`: the actions of signals.
    pub actions: Option<i32>,
}

/// What holds for an address space as a whole.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemoryAttributes {
    /// Flags of `mlockall` for mappings to come: `MCL_FUTURE`, `MCL_ONFAULT`.
    pub lock_future: u32,
    /// As `PR_GET_MDWE` tells.
    pub deny_write_execute: u32,
    /// As `PR_GET_THP_DISABLE` tells.
    pub no_huge_pages: u32,
    /// `PR_SET_MEMORY_MERGE`.
    pub merge: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntervalTimer {
    pub interval_us: u64,
    pub rest_us: u64,
}

/// What `timer_create` has made. Times are in nanoseconds; a timer without a rest is not armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixTimer {
    pub id: i32,
    pub clock: i32,
    pub signal: i32,
    pub value: u64,
    /// `SIGEV_SIGNAL`, `SIGEV_NONE` or `SIGEV_THREAD`, without `SIGEV_THREAD_ID`.
    pub notify: i32,
    /// The thread that gets the signal; none for the process.
    pub thread: Option<i32>,
    pub rest_ns: u64,
    pub interval_ns: u64,
}

/// The boundaries that `prctl(PR_SET_MM_MAP)` takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Layout {
    pub start_code: u64,
    pub end_code: u64,
    pub start_data: u64,
    pub end_data: u64,
    pub start_brk: u64,
    pub brk: u64,
    pub start_stack: u64,
    pub arg_start: u64,
    pub arg_end: u64,
    pub env_start: u64,
    pub env_end: u64,
}

/// A path relative to the container's root, as raw bytes, beginning with `/`.
pub type Path = Bytes;

/// One mapping of an address space.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    /// `PROT_READ` 1, `PROT_WRITE` 2, `PROT_EXEC` 4.
    pub protection: u32,
    pub backing: Backing,
    pub advice: Advice,
    /// Ranges inside that are guard pages (`MADV_GUARD_INSTALL`).
    pub guards: Vec<(u64, u64)>,
    /// The name that `PR_SET_VMA_ANON_NAME` gave it; empty for none.
    #[serde(default)]
    pub name: Bytes,
    /// Mode and nodes of `mbind`; `None` for what the thread's own policy says.
    #[serde(default)]
    pub memory_policy: Option<(u32, Vec<u64>)>,
    /// Of a shared file in memory: what its last page has behind the file's end, without the zeros that come last.
    #[serde(default)]
    pub behind_end: Bytes,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Backing {
    /// Private, zero until written. `grows_down`: a stack.
    Anonymous {
        grows_down: bool,
        /// Of pages other than the usual ones (`MAP_HUGETLB`).
        #[serde(default)]
        huge_page_bytes: Option<u64>,
        /// The kernel may drop its content (`MAP_DROPPABLE`).
        #[serde(default)]
        droppable: bool,
    },
    /// A private view of a file: pages of the process's space are its own, others are the file's.
    PrivateFile { path: Path, offset: u64, check: FileCheck },
    /// A shared view of a file of the container.
    SharedFile { path: Path, offset: u64, may_write: bool, check: FileCheck },
    /// A private view of a file that has no name any more.
    PrivateUnlinked { file: u32, offset: u64 },
    /// A shared view of a file that has no name any more.
    SharedUnlinked { file: u32, offset: u64, may_write: bool },
    /// A shared memory object: index into [`Container::shared_memory`].
    Shared { memory: u32, offset: u64, may_write: bool },
    /// A private view of a shared memory object: index into [`Container::shared_memory`].
    PrivateMemory { memory: u32, offset: u64 },
    /// An attached segment of System V: index into [`SystemV::segments`].
    SystemV { segment: u32, offset: u64, may_write: bool },
    /// The ring of a context of asynchronous I/O (`io_setup`), which no request uses: so many places, where the next event is read
    /// and where it is written, and the events (`struct io_event`) between these.
    AsynchronousIo { events: u32, head: u32, tail: u32, unread: Bytes },
    /// The ring of a context that the process does not have, as a child does not have its parent's: its content, or nothing once
    /// the context has ended.
    InheritedRing { content: Bytes },
    /// The vdso and its data pages: one block, put back as the new host has it. `index` counts from the block's start.
    Vdso { index: u32 },
}

/// What a mapped file looked like: private pages are only right over the same content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileCheck {
    pub bytes: u64,
}

/// The `madvise` and `mlock` state that shows in `VmFlags`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Advice {
    pub no_reserve: bool,
    pub dont_fork: bool,
    pub dont_dump: bool,
    pub wipe_on_fork: bool,
    pub huge_page: bool,
    pub no_huge_page: bool,
    pub mergeable: bool,
    pub sequential: bool,
    pub random: bool,
    pub locked: bool,
    pub locked_on_fault: bool,
    pub sync_faults: bool,
    /// `mseal`.
    #[serde(default)]
    pub sealed: bool,
}

/// A descriptor of a process: index into [`Container::files`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    pub fd: i32,
    pub file: u32,
    pub close_on_exec: bool,
}

/// An advisory lock that a process holds through one of its descriptors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lock {
    pub fd: i32,
    pub kind: LockKind,
    pub exclusive: bool,
    /// First byte, and number of bytes; 0 bytes reach to the end of the file, however long it grows.
    pub start: u64,
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockKind {
    /// `fcntl(F_SETLK)`: belongs to the process.
    Posix,
    /// `fcntl(F_OFD_SETLK)`: belongs to the open file description.
    OpenFile,
    /// `flock`: belongs to the open file description.
    Flock,
}

/// An open file description.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFile {
    /// Flags of `open`, without `O_CLOEXEC`.
    pub flags: i32,
    pub kind: FileKind,
    #[serde(default)]
    pub notices: Notices,
}

/// What an open file description makes the kernel tell its owner by signal, and leases that it holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Notices {
    pub owner: Option<SignalOwner>,
    /// `fcntl(F_SETSIG)`; 0 is SIGIO without information.
    pub signal: i32,
    pub lease: Option<Lease>,
    /// `fcntl(F_SET_RW_HINT)`, of the file.
    pub write_hint: u64,
}

/// Who gets the signals: `fcntl(F_SETOWN_EX)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalOwner {
    /// `F_OWNER_TID`, `F_OWNER_PID` or `F_OWNER_PGRP`.
    pub kind: i32,
    /// By its number in the container.
    pub id: i32,
}

/// `fcntl(F_SETLEASE)`
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// `F_RDLCK` or `F_WRLCK`.
    pub kind: i32,
    /// What somebody who opens the file waits for it to become: `F_RDLCK` or `F_UNLCK`.
    pub breaking_to: Option<i32>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    /// A regular file by path.
    Regular {
        path: Path,
        position: u64,
        bytes: u64,
        /// Device and inode as the program saw them. It may remember them: SQLite does, and stops writing if they change.
        device: u64,
        inode: u64,
    },
    /// A regular file without a name: index into [`Container::unlinked_files`].
    Unlinked {
        file: u32,
        position: u64,
    },
    Directory {
        path: Path,
        position: u64,
        /// The names that have been read, where the position is not 0; the position has a meaning on one file system only.
        #[serde(default)]
        names: Vec<Bytes>,
        /// It has been read to its end.
        #[serde(default)]
        whole: bool,
    },
    /// A directory without a name: index into [`Container::unlinked_directories`].
    UnlinkedDirectory {
        directory: u32,
    },
    /// A file of another kind without a name, opened with `O_PATH` if it is no device: index into [`Container::unlinked_nodes`].
    UnlinkedNode {
        node: u32,
    },
    /// A name, opened with `O_PATH`, whatever it is the name of.
    Name {
        path: Path,
    },
    /// A file or directory whose content the kernel makes up: of `/proc` or `/sys`.
    Pseudo {
        path: Path,
        position: u64,
    },
    /// A file of `/proc/PID` of a process that has ended: index into [`Container::ended`], and the path below `/proc/PID`.
    EndedPseudo {
        process: u32,
        path: Bytes,
    },
    /// A namespace of the container, by its name in `/proc/PID/ns`.
    Namespace {
        name: Bytes,
    },
    /// A character device that has no state of its own.
    Device {
        path: Path,
        major: u32,
        minor: u32,
    },
    /// One end of a pipe: index into [`Container::pipes`].
    Pipe {
        pipe: u32,
    },
    /// A named pipe that is open: index into [`Container::pipes`] for what it holds.
    Fifo {
        pipe: u32,
        path: Path,
    },
    /// A named pipe that is open and has no name any more; `path` is the one that it had.
    UnlinkedFifo {
        pipe: u32,
        path: Path,
        mode: u32,
    },
    EventFd {
        count: u64,
        semaphore: bool,
    },
    Epoll {
        watches: Vec<Watch>,
    },
    TimerFd(TimerFd),
    /// Signals that it takes: bit 0 is signal 1.
    SignalFd {
        mask: u64,
    },
    /// A process of the container, by its number there.
    PidFd {
        pid: i32,
    },
    /// A thread of the container, by its number there (`PIDFD_THREAD`).
    ThreadFd {
        tid: i32,
    },
    /// A process or thread that has ended: index into [`Container::ended`].
    EndedPidFd {
        process: u32,
        thread: bool,
    },
    Inotify {
        watches: Vec<InotifyWatch>,
        /// The number that the next watch gets.
        next: i32,
    },
    /// One end of a pair: index into [`Container::socket_pairs`], and 0 or 1.
    SocketPair {
        pair: u32,
        end: u32,
    },
    /// Index into [`Container::unix_sockets`].
    UnixSocket {
        socket: u32,
    },
    Internet(Box<InternetSocket>),
    Netlink(Box<NetlinkSocket>),
    Packet(Box<PacketSocket>),
    /// A shared memory object (memfd): index into [`Container::shared_memory`].
    SharedMemory {
        memory: u32,
        position: u64,
    },
    /// A POSIX message queue: index into [`Container::posix_queues`].
    PosixQueue {
        queue: u32,
    },
    /// A stream that the container was given from outside: its standard input, output or error.
    Outside {
        stream: u32,
    },
    /// Such a stream, opened once more through `/proc/self/fd` or `/dev/stdout`: flags and position are its own.
    OutsideAgain {
        stream: u32,
        position: u64,
    },
    /// A terminal: index into [`Container::terminals`], and the name that it was opened by, which may be `/dev/tty`.
    Terminal {
        terminal: u32,
        path: Path,
    },
    /// The master of a pseudo-terminal: index into [`Container::terminals`].
    TerminalMaster {
        terminal: u32,
        path: Path,
    },
}

/// What an inotify instance watches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InotifyWatch {
    pub number: i32,
    pub mask: u32,
    pub target: WatchTarget,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WatchTarget {
    Path(Path),
    /// Index into [`Container::unlinked_files`].
    Unlinked(u32),
    /// Index into [`Container::unlinked_directories`].
    UnlinkedDirectory(u32),
}

/// A process that has ended and been waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndedProcess {
    /// The number that it had in the container, where the kernel tells.
    pub pid: Option<i32>,
    /// As `wait` returned it, where the kernel tells.
    pub exit_status: i32,
}

/// What an epoll instance watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// The number under which it was registered; the descriptor may have been closed since.
    pub fd: i32,
    /// Index into [`Container::files`].
    pub file: u32,
    pub events: u32,
    pub data: u64,
    /// What the file was ready for, where an entry for edges had told of it.
    #[serde(default)]
    pub told: u32,
}

/// A timer that is read. Times are in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimerFd {
    pub clock: i32,
    /// Expirations that nobody has read.
    pub ticks: u64,
    /// As `timerfd_settime` was given them.
    pub flags: i32,
    /// Until the next expiration, on whatever clock; 0 if it is not armed, or has expired and waits to be read.
    pub rest_ns: u64,
    pub interval_ns: u64,
}

/// A pipe or FIFO and what it holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pipe {
    pub capacity: u32,
    pub content: Bytes,
    pub owner: (u32, u32),
    /// In packet mode the length of each packet that it holds; empty where the content is a stream.
    #[serde(default)]
    pub packets: Vec<u32>,
}

/// Two connected unix sockets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketPair {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: i32,
    pub ends: [SocketEnd; 2],
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketEnd {
    /// What this end will receive: one entry a message, or a single one for a stream.
    pub queue: Vec<Bytes>,
    pub send_buffer: u32,
    pub receive_buffer: u32,
    /// `SHUT_RD` was called here, or `SHUT_WR` at the other end.
    pub read_shut: bool,
    pub write_shut: bool,
    pub pass_credentials: bool,
    pub receive_timeout_us: u64,
    pub send_timeout_us: u64,
    /// Nobody holds this end any more.
    pub closed: bool,
}

/// What sockets of every family have.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOptions {
    /// As `getsockopt` has returned them.
    pub values: Vec<SocketOption>,
    /// The classic BPF program through which everything goes that comes in: an array of `struct sock_filter`.
    pub filter: Bytes,
    /// What `fstat` tells.
    pub owner: (u32, u32),
    pub mode: u32,
}

/// An option of a socket: its `SOL_` or `IPPROTO_` level, its number there, its value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketOption {
    pub level: i32,
    pub name: i32,
    pub value: Bytes,
}

/// A unix socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixSocket {
    /// `SOCK_STREAM`, `SOCK_DGRAM` or `SOCK_SEQPACKET`.
    pub kind: i32,
    /// The path that it was bound to, as it was given, or an abstract name after a zero byte.
    pub name: Option<Bytes>,
    /// The name is that of the socket that accepted this one.
    pub accepted: bool,
    /// What its path has become; none without a path, and of one that was accepted.
    pub node: Option<SocketNode>,
    pub state: UnixSocketState,
    /// Whom `SO_PEERCRED` tells.
    pub peer_credentials: Option<PeerCredentials>,
    /// What it will receive: one entry a message; of a stream one a sender, or more where descriptors came.
    pub queue: Vec<UnixMessage>,
    /// `SHUT_RD` was called here, or `SHUT_WR` at the other end.
    pub read_shut: bool,
    pub write_shut: bool,
    /// The next call gets ECONNRESET.
    pub reset: bool,
    pub options: SocketOptions,
    /// Nobody holds it any more, but another is connected to it.
    pub closed: bool,
}

/// The node of a bound socket in the file system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketNode {
    /// Where it is now; none if it was unlinked.
    pub path: Option<Path>,
    pub mode: u32,
    pub owner: (u32, u32),
    pub modified_ns: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum UnixSocketState {
    /// Not connected, or waits to be accepted.
    Idle,
    Listening {
        backlog: u32,
        /// In the order in which they will be accepted.
        waiting: Vec<WaitingConnection>,
    },
    /// Index into [`Container::unix_sockets`]; of a datagram socket the one that it sends to.
    Connected { peer: u32 },
}

/// A connection that nobody has accepted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaitingConnection {
    /// Index into [`Container::unix_sockets`].
    pub client: u32,
    /// Of who connected.
    pub credentials: Option<PeerCredentials>,
    /// What has been sent to the one that will accept it.
    pub queue: Vec<UnixMessage>,
}

/// Who made a connection or listened for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PeerCredentials {
    pub ids: MessageCredentials,
    pub groups: Vec<u32>,
}

/// `struct ucred`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageCredentials {
    /// 0: a process from outside of the container.
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
}

/// A message in the queue of a unix socket.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnixMessage {
    pub bytes: Bytes,
    /// Descriptors that come with it: indexes into [`Container::files`].
    pub files: Vec<u32>,
    pub credentials: Option<MessageCredentials>,
    /// The name of who sent a datagram.
    pub sender: Option<Bytes>,
    /// The byte was sent with `MSG_OOB`.
    pub urgent: bool,
}

/// A socket of the internet: TCP, UDP, ping or raw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InternetSocket {
    /// As `socket` takes them.
    pub domain: i32,
    pub kind: i32,
    pub protocol: i32,
    pub options: SocketOptions,
    /// Where it is bound; none where it is not.
    pub local: Option<SocketAddress>,
    pub memberships: Vec<Membership>,
    pub state: InternetState,
}

/// An address of 4 or 16 bytes, with what `struct sockaddr_in6` has beside it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketAddress {
    pub ip: Bytes,
    pub port: u16,
    pub flow: u32,
    pub scope: u32,
}

/// A multicast group that a socket has joined.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    pub group: Bytes,
    /// By name: numbers of interfaces differ.
    pub interface: Bytes,
    /// `sources` are those that it does not want, instead of those that it wants.
    pub exclude: bool,
    pub sources: Vec<Bytes>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum InternetState {
    /// TCP: neither connected nor listening.
    Idle,
    Listening {
        backlog: u32,
    },
    /// The other end has not answered yet.
    Connecting {
        peer: SocketAddress,
    },
    Connection(Box<Connection>),
    /// A connection that is no more, or will not be after a move.
    Ended {
        unread: Bytes,
        /// ECONNRESET or ECONNREFUSED, which the next call gets.
        error: Option<i32>,
        /// Whom it was connected to, where the kernel tells.
        #[serde(default)]
        peer: Option<SocketAddress>,
    },
    /// Whatever is not TCP.
    Datagrams(Box<Datagrams>),
}

/// A connection of TCP whose other end is in the container too, or has sent all that it will send.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    pub peer: SocketAddress,
    pub other: OtherEnd,
    /// What this end can read.
    pub unread: Bytes,
    /// What the other end has sent and this one has no room for yet.
    pub in_flight: Bytes,
    pub read_shut: bool,
    pub write_shut: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum OtherEnd {
    /// Index into [`Container::files`].
    File(u32),
    /// Nobody has accepted it yet.
    Waiting,
    Closed,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagrams {
    pub peer: Option<SocketAddress>,
    pub queue: Vec<Datagram>,
    pub read_shut: bool,
    pub write_shut: bool,
}

/// A datagram that nobody has read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    pub source: SocketAddress,
    /// What its receiver has asked to be told: where it was sent to, its hop limit and traffic class.
    pub destination: Option<Bytes>,
    pub hops: Option<u8>,
    pub class: Option<u8>,
    pub data: Bytes,
}

/// A netlink socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetlinkSocket {
    pub kind: i32,
    pub protocol: i32,
    pub options: SocketOptions,
    /// 0 where it is not bound.
    pub port: u32,
    /// Numbers of the groups that it has joined, from 1.
    pub groups: Vec<u32>,
    /// Port and groups that it is connected to.
    pub peer: (u32, u32),
}

/// A socket of the link layer (`AF_PACKET`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PacketSocket {
    /// `SOCK_RAW`, `SOCK_DGRAM` or `SOCK_PACKET`.
    pub kind: i32,
    pub options: SocketOptions,
    /// What it receives, as linux/if_ether.h numbers it; 0 for nothing.
    pub protocol: u16,
    /// Where it is bound, by name; none for all interfaces.
    pub interface: Option<Bytes>,
    pub copy_threshold: u32,
    pub memberships: Vec<LinkMembership>,
    /// The group that shares what comes (`PACKET_FANOUT`); 0 for none.
    pub fanout: u32,
}

/// What an interface receives for a socket of the link layer (`PACKET_ADD_MEMBERSHIP`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkMembership {
    /// By name: numbers of interfaces differ.
    pub interface: Bytes,
    pub kind: u16,
    pub address: Bytes,
    /// How often the socket has asked for it.
    pub count: u32,
}

/// Memory that several mappings or descriptors share.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedMemory {
    /// The page space with its content: page numbers are offsets.
    pub space: u32,
    pub bytes: u64,
    pub kind: SharedMemoryKind,
    /// Of pages other than the usual ones (`MAP_HUGETLB`, `MFD_HUGETLB`).
    #[serde(default)]
    pub huge_page_bytes: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SharedMemoryKind {
    /// `mmap(MAP_SHARED | MAP_ANONYMOUS)`.
    Anonymous,
    /// `memfd_create`.
    Memfd { name: Bytes, seals: i32, mode: u32, owner: (u32, u32) },
}

/// System V objects (`sysvipc(7)`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SystemV {
    /// Limits of the namespace (`/proc/sys`), for System V objects and POSIX queues: names of files there, and contents.
    pub limits: Vec<(String, String)>,
    /// Numbers that the program has asked for its next objects (`msg_next_id` and others), in the same form.
    #[serde(default)]
    pub next_ids: Vec<(String, String)>,
    pub segments: Vec<Segment>,
    pub semaphores: Vec<SemaphoreSet>,
    pub queues: Vec<MessageQueue>,
}

/// What System V objects of all kinds have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IpcIdentity {
    pub id: i32,
    pub key: i32,
    pub owner: (u32, u32),
    pub creator: (u32, u32),
    pub mode: u32,
}

/// Shared memory of System V.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    pub identity: IpcIdentity,
    /// The page space with its content: page numbers are offsets.
    pub space: u32,
    pub bytes: u64,
    /// Of pages other than the usual ones.
    pub huge_page_bytes: Option<u64>,
    /// `SHM_LOCK`.
    pub locked: bool,
    /// `IPC_RMID` was called; it lives until nobody has it attached.
    pub removed: bool,
    /// 0 where it is not a process of the container any more.
    pub creator_pid: i32,
    pub last_pid: i32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemaphoreSet {
    pub identity: IpcIdentity,
    pub semaphores: Vec<Semaphore>,
    /// `semop` was called: programs wait for that before they take a set for initialized.
    pub operated: bool,
    /// What the ends of processes will add (`SEM_UNDO`).
    pub undo: Vec<SemaphoreUndo>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Semaphore {
    pub value: u16,
    /// The process that changed it last; 0 where it is not one of the container any more.
    pub last_pid: i32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SemaphoreUndo {
    pub pid: i32,
    /// Which semaphore of the set.
    pub number: u16,
    pub adjustment: i32,
}

/// A message queue of System V.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MessageQueue {
    pub identity: IpcIdentity,
    pub bytes_max: u64,
    /// Types and contents, oldest first.
    pub messages: Vec<(i64, Bytes)>,
    /// 0 where it is not a process of the container any more, or nobody has.
    pub last_sender: i32,
    pub last_receiver: i32,
}

/// A POSIX message queue (`mq_overview(7)`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PosixQueue {
    /// Without a slash. Where `named` is false it has lost that name, and lives by its descriptors.
    pub name: Bytes,
    pub named: bool,
    pub mode: u32,
    pub owner: (u32, u32),
    pub messages_max: i64,
    pub message_bytes_max: i64,
    /// Priorities and contents, in the order in which they will be received.
    pub messages: Vec<(u32, Bytes)>,
    /// The process that has reserved the next message for itself (`mq_notify` with `SIGEV_NONE`).
    pub waiting: Option<i32>,
}

/// A regular file that is open or mapped and has no name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnlinkedFile {
    /// The page space with its content: page numbers are offsets.
    pub space: u32,
    pub bytes: u64,
    pub mode: u32,
    pub owner: (u32, u32),
    pub modified_ns: i64,
    /// The directory that it had a name in, to find the same file system again.
    pub directory: Path,
    /// The last name that it had there; none if it was made without one, and can be given one.
    #[serde(default)]
    pub name: Option<Bytes>,
    #[serde(default)]
    pub accessed_ns: Option<i64>,
    /// Extended attributes: name and value.
    #[serde(default)]
    pub attributes: Vec<(Bytes, Bytes)>,
}

/// A directory that is open or worked in and has no name. It is empty: nothing can be made in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnlinkedDirectory {
    /// The one that it was in, where that has no name either: index into [`Container::unlinked_directories`].
    pub parent: Option<u32>,
    /// The path that it had.
    pub path: Path,
    pub mode: u32,
    pub owner: (u32, u32),
    pub modified_ns: i64,
}

/// A file that has neither a name nor content.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnlinkedNode {
    /// The path that it had.
    pub path: Path,
    pub kind: NodeKind,
    pub mode: u32,
    pub owner: (u32, u32),
    pub accessed_ns: i64,
    pub modified_ns: i64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeKind {
    Symlink {
        target: Bytes,
    },
    Fifo,
    Socket,
    /// A character device that has no state of its own.
    Device {
        major: u32,
        minor: u32,
    },
}

/// A process that a signal has stopped until SIGCONT comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stopped {
    pub signal: i32,
    /// Its parent has waited for the stop, so that another wait does not report it.
    pub reported: bool,
}

/// `rt_sigaction`'s kernel form.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignalAction {
    pub handler: u64,
    pub flags: u64,
    pub restorer: u64,
    pub mask: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Thread {
    pub tid: i32,
    pub name: Bytes,
    pub registers: Registers,
    /// The XSAVE area in the standard layout.
    pub xstate: Bytes,
    pub signal_mask: u64,
    pub pending: Vec<Bytes>,
    pub alternate_stack: AlternateStack,
    pub clear_child_tid: u64,
    pub robust_list: (u64, u64),
    pub rseq: Option<Rseq>,
    pub credentials: Credentials,
    pub scheduling: Scheduling,
    pub parent_death_signal: i32,
    pub timer_slack_ns: u64,
    /// Oldest first.
    pub seccomp: Seccomp,
    pub no_new_privileges: bool,
    /// Calls that were interrupted, with what is left of their time.
    pub restart: Restart,
    /// Of a thread that does not share them with its process.
    #[serde(default)]
    pub own_directories: Option<Directories>,
    #[serde(default)]
    pub attributes: ThreadAttributes,
}

/// What else `prctl` and its like have set for a thread.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThreadAttributes {
    /// Threads may have one each. None: that of the process.
    pub personality: Option<u32>,
    /// `PR_SET_TSC`: it may not read the time stamp counter.
    pub no_time_stamps: bool,
    /// `ARCH_SET_CPUID`: it may not ask what the processor is.
    pub no_cpuid: bool,
    /// `PR_MCE_KILL_GET`; none for the system's policy.
    pub machine_check: Option<u32>,
    /// Who has logged in, for the audit (`loginuid`); none where nobody has.
    #[serde(default)]
    pub login_user: Option<u32>,
    /// Kinds of speculation and what `PR_SET_SPECULATION_CTRL` has been told of them.
    pub speculation: Vec<(u32, u32)>,
    /// What its security module calls it, as `/proc/TID/attr/current` tells. None: no module gives labels.
    #[serde(default)]
    pub label: Option<Bytes>,
}

/// How an interrupted system call goes on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Restart {
    /// As the registers say.
    #[default]
    AsIs,
    /// A relative timeout in memory: write `rest_ns` as a timespec to scratch memory, and its address into the given argument.
    Timespec { argument: u32, rest_ns: u64 },
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AlternateStack {
    pub address: u64,
    pub flags: i32,
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rseq {
    pub address: u64,
    pub bytes: u32,
    pub signature: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credentials {
    /// Real, effective, saved, file system.
    pub uids: [u32; 4],
    pub gids: [u32; 4],
    pub groups: Vec<u32>,
    pub inheritable: u64,
    pub permitted: u64,
    pub effective: u64,
    pub bounding: u64,
    pub ambient: u64,
    pub secure_bits: u32,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduling {
    pub policy: u32,
    pub priority: u32,
    pub nice: i32,
    pub reset_on_fork: bool,
    /// `ioprio_get`; 0 where the nice value decides.
    pub io_priority: u32,
    /// Mode and nodes of `get_mempolicy`; `None` for the default.
    pub memory_policy: Option<(u32, Vec<u64>)>,
    /// Processors that it may run on, as a list; empty for all that there are.
    pub affinity: Vec<u32>,
    /// The time slice that it has asked for, in nanoseconds; 0 for the kernel's own.
    #[serde(default)]
    pub slice_ns: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Seccomp {
    Off,
    Strict,
    /// Programs as arrays of `struct sock_filter`, oldest first, each with the flags it was installed with.
    Filters(Vec<SeccompFilter>),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeccompFilter {
    pub program: Bytes,
    pub flags: u64,
}

/// The general registers, as `struct user_regs_struct` of `<sys/user.h>` names them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registers {
    pub r15: u64,
    pub r14: u64,
    pub r13: u64,
    pub r12: u64,
    pub rbp: u64,
    pub rbx: u64,
    pub r11: u64,
    pub r10: u64,
    pub r9: u64,
    pub r8: u64,
    pub rax: u64,
    pub rcx: u64,
    pub rdx: u64,
    pub rsi: u64,
    pub rdi: u64,
    pub orig_rax: u64,
    pub rip: u64,
    pub cs: u64,
    pub eflags: u64,
    pub rsp: u64,
    pub ss: u64,
    pub fs_base: u64,
    pub gs_base: u64,
    pub ds: u64,
    pub es: u64,
    pub fs: u64,
    pub gs: u64,
}

/// A pseudo-terminal.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terminal {
    /// N of `/dev/pts/N`.
    pub number: u32,
    pub master: Master,
    pub settings: TerminalSettings,
    /// Rows, columns, and the same in pixels, as `TIOCGWINSZ` tells them.
    pub size: [u16; 4],
    pub owner: (u32, u32),
    pub mode: u32,
    /// The session that it controls, or 0, the foreground group, or 0, and the processes whose controlling terminal it is.
    pub session: i32,
    pub foreground: i32,
    pub members: Vec<i32>,
    /// The slave has been open at some time; if nobody has it open any more, the master is hung up.
    pub opened: bool,
    pub locked: bool,
    pub exclusive: bool,
    /// Packet mode, with the events that the master has not read yet.
    pub packet: Option<u8>,
    pub queues: TerminalQueues,
}

/// Where the master of a terminal is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Master {
    /// In the container.
    Inside,
    /// With whoever runs the container: it is the container's own terminal.
    Outside,
    /// It has been closed, and the terminal is hung up for ever.
    Closed,
}

/// `struct termios2`: modes, line discipline, special characters, speeds in baud.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalSettings {
    pub input: u32,
    pub output: u32,
    pub control: u32,
    pub local: u32,
    pub line: u8,
    pub characters: Bytes,
    pub input_speed: u32,
    pub output_speed: u32,
}

/// What is under way between the two sides of a terminal.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalQueues {
    /// What the slave has not read and the line discipline holds.
    pub input: Vec<TerminalLine>,
    /// What a master in the container has written beyond, and nobody has looked at.
    pub raw_input: Bytes,
    /// What a master in the container has not read.
    pub output: Bytes,
    pub stopped: OutputStop,
}

/// A part of the input: a line in canonical mode, or anything that no end was typed for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TerminalLine {
    pub text: Bytes,
    pub end: LineEnd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LineEnd {
    /// None yet, or the mode has none.
    Open,
    /// The last byte of the text, which is a newline.
    NewLine,
    /// The last byte of the text, which ends lines as `VEOL` or `VEOL2` does.
    Character,
    /// `VEOF`, which is not in the text.
    EndOfFile,
}

/// What has stopped a terminal's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum OutputStop {
    #[default]
    Running,
    /// The character `VSTOP`.
    Character,
    /// `tcflow(TCOOFF)`.
    Call,
}
