//! Restore: records and pages become a running container.
//!
//! It begins with a container that the caller has prepared: namespaces, mounts, cgroups and all, with a *blank* init that
//! does nothing, runs as root with all capabilities and without seccomp. The engine empties the blank init, lets it fork
//! the tree, builds each process from inside by system calls, and confines it last.
//!
//! Until the last step every process is traced with `EXITKILL`: if the engine dies, nothing half-built runs.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use samara_capsule::record::{
    Alive, Backing, Clocks, Container, OpenFile, Process as Record, ProcessState, Stopped,
};
use samara_capsule::transfer::{Source, SpaceId};
use samara_kernel::pidfd::PidFd;
use samara_kernel::ptrace::{self, Options};
use samara_kernel::tape::{Call, End};
use samara_kernel::wait::{self, Status};
use samara_kernel::{Pid, proc};

use crate::copy_on_write::{Heritage, Inheritance};
use crate::descriptors::{Channel, Processes};
use crate::memory::{HUGE_PAGE, Shared};
use crate::phase::{self, Phase};
use crate::plan::{self, PlanError, Step};
use crate::process::Confinement;
use crate::root::Root;
use crate::tracee::{self, ARENA_BYTES, Process, Thread, TraceeError, failed};
use crate::tracking::Tracking;
use crate::{
    clocks, descriptors, internet, labels, memory, names, notices, posix_queues, process,
    procfiles, sqlite, system_v, terminals, unix_sockets, vdso,
};

/// Why a container could not be restored. Nothing of it is left but the blank init, if that still lives, for the caller to remove.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Tracee(#[from] TraceeError),
    #[error("this host can't run the capsule: {0}")]
    Incompatible(String),
    #[error("the capsule is damaged: {0}")]
    Damaged(String),
    #[error("could not make {what} again")]
    Make { what: String, source: io::Error },
    #[error("could not fill the container's memory")]
    Fill { source: io::Error },
    #[error("the restored container ended at once")]
    Ended,
}

/// What to restore, and into what.
#[derive(Debug)]
pub struct RestoreRequest<'a> {
    /// The blank init, as this process numbers it.
    pub init: Pid,
    pub container: &'a Container,
    /// What the new container is allowed.
    pub confinement: Confinement,
}

/// What happened, for the user.
#[derive(Debug)]
pub struct RestoreReport {
    pub processes: usize,
    pub threads: usize,
    pub spawn: Duration,
    pub map: Duration,
    pub fill: Duration,
    pub finish: Duration,
    /// What was written since.
    pub tracking: Tracking,
}

/// Builds the container that was saved from a blank one and lets it go on.
///
/// `ready` is called when all is there and nothing runs yet: what ends from then on has ended by itself.
/// Success: it runs. Failure: every process that was made has been killed; the blank init too, if it was touched.
pub fn restore(
    request: &RestoreRequest<'_>,
    source: &dyn Source,
    ready: &mut dyn FnMut(),
) -> Result<RestoreReport, RestoreError> {
    let container = request.container;
    let begun = Instant::now();
    let mut tree = Tree::begin(request)?;
    if let Some(names) = &container.names {
        names::restore(request.init, names).map_err(make("the host's name"))?;
    }
    phase::reached(Phase::Begun);
    descriptors::make_room().map_err(make("room for the container's descriptors"))?;
    let root = Root::of(request.init).map_err(make("the container's root directory"))?;
    let mut terminals = terminals::restore(container, &root, &tree.outside)?;
    let inheritance = tree.spawn(container, &terminals, &root, source)?;
    // The dead too: somebody may have been at the other end of a socket.
    let numbers = tree.processes.iter().map(|(pid, process)| (*pid, process.pid)).collect();
    let mut sockets = unix_sockets::restore(&mut tree, container, &root, &numbers)?;
    let processes = tree.number(container)?;
    for record in &container.processes {
        if let ProcessState::Zombie { exit_status, uid, .. } = record.state {
            tree.bury(record.pid, &record.name, exit_status, uid)?;
        }
    }
    // After the ends: the last one of a group that could continue its stopped members hangs them up.
    tree.stop_all(&container.processes)?;
    let spawn = begun.elapsed();
    phase::reached(Phase::Spawned);

    let begun = Instant::now();
    system_v::restore_limits(request.init, &container.system_v)?;
    let mut shared = memory::make_shared(&mut tree, container, &root, source)?;
    system_v::restore(&mut tree, container, source)?;
    system_v::restore_next_ids(request.init, &container.system_v)?;
    for record in &container.processes {
        if let ProcessState::Alive(alive) = &record.state {
            let heritage = inheritance.heritage(record.pid);
            tree.map(record.pid, alive, &root, &shared, heritage, source)?;
        }
    }
    tree.note_shared_memory(&container.processes)?;
    let map = begun.elapsed();
    phase::reached(Phase::Mapped);

    let begun = Instant::now();
    memory::seal(&shared, container)?;
    system_v::finish(&mut tree, &container.system_v)?;
    memory::fill(&tree, container, &inheritance, source)?;
    let fill = begun.elapsed();
    phase::reached(Phase::Filled);

    let begun = Instant::now();
    terminals.open_files(container, &root, &mut tree)?;
    let internet = internet::restore(request.init, container)?;
    let files = descriptors::make_files(
        request.init,
        container,
        &root,
        &tree.outside,
        &shared,
        &processes,
        &mut sockets,
        internet,
        &mut terminals,
    )?;
    sockets.end(&mut tree)?;
    tree.work_in_ended(container, &root, &processes.ended)?;
    tree.end_again(container, &processes.ended)?;
    for record in &container.processes {
        if let ProcessState::Alive(alive) = &record.state {
            tree.furnish(record, alive, &root, &shared)?;
        }
    }
    // Closes the channel, in all that share a table of descriptors.
    for record in &container.processes {
        if let ProcessState::Alive(alive) = &record.state
            && alive.sharing.descriptors.is_none()
        {
            tree.install(record.pid, alive, &files)?;
        }
    }
    for record in &container.processes {
        if let ProcessState::Alive(alive) = &record.state
            && alive.sharing.memory.is_none()
        {
            tree.follow_databases(record.pid, alive, &container.files, source)?;
        }
    }
    shared.let_go_of_leased(container)?;
    let registrars = notices::registrars(container);
    for record in &container.processes {
        if let ProcessState::Alive(alive) = &record.state {
            let asks = notices::of_process(&registrars, alive);
            files.ask_for_notices(tree.process(record.pid)?, asks, container)?;
        }
    }
    files.watch(container, &root, &shared)?;
    drop(files);
    posix_queues::wait_again(&mut tree, container)?;
    terminals.hand_over(container)?;
    phase::reached(Phase::Furnished);
    let mut tracking = Tracking::of_restored(&mut tree, container, source);
    for record in &container.processes {
        if let ProcessState::Alive(alive) = &record.state {
            tree.confine(record.pid, alive, &request.confinement, &container.clocks)?;
        }
    }
    labels::check(&tree, &container.processes)?;
    phase::reached(Phase::Confined);
    let threads = tree.processes.values().map(|process| process.threads.len()).sum();
    tracking.identify();
    ready();
    tree.resume(&container.processes, &container.clocks)?;
    phase::reached(Phase::Resumed);
    terminals.resize();
    let finish = begun.elapsed();
    if !proc::stat(request.init).is_ok_and(|stat| stat.state != 'Z') {
        return Err(RestoreError::Ended);
    }
    let processes = container.processes.len();
    Ok(RestoreReport { processes, threads, spawn, map, fill, finish, tracking })
}

/// The processes of a restore under way, by their number in the container. Dropping it kills them.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) processes: BTreeMap<i32, Process>,
    /// Where the engine's mapping is, in all of them.
    arena: u64,
    /// Room for mappings that are made for a moment.
    pub(crate) parking: u64,
    pub(crate) channel: Channel,
    /// The new container's own streams.
    pub(crate) outside: Vec<Option<OwnedFd>>,
    finished: bool,
}

/// Room that [`plan::gap`] finds for the vdso on its way.
pub(crate) const PARKING_BYTES: u64 = 1 << 20;

impl Tree {
    /// Takes over the blank init and empties it.
    fn begin(request: &RestoreRequest<'_>) -> Result<Tree, RestoreError> {
        let init = request.init;
        let container = request.container;
        let present = proc::mappings(init).map_err(make("a list of the blank init's mappings"))?;
        let mut occupied: Vec<(u64, u64)> =
            present.iter().map(|mapping| (mapping.start, mapping.end)).collect();
        let mut taken: BTreeSet<RawFd> = BTreeSet::new();
        for record in &container.processes {
            if let ProcessState::Alive(alive) = &record.state {
                occupied.extend(alive.mappings.iter().map(|mapping| (mapping.start, mapping.end)));
                taken.extend(alive.descriptors.iter().map(|descriptor| descriptor.fd));
            }
        }
        let largest = container
            .shared_memory
            .iter()
            .map(|memory| memory.bytes)
            .chain(container.system_v.segments.iter().map(|segment| segment.bytes))
            .max()
            .unwrap_or(0);
        let room = largest
            .checked_next_multiple_of(HUGE_PAGE)
            .and_then(|bytes| bytes.checked_add(PARKING_BYTES + HUGE_PAGE))
            .ok_or_else(|| RestoreError::Damaged("shared memory is too large".to_owned()))?;
        let parking = plan::gap(&occupied, room.saturating_add(ARENA_BYTES))?;
        let arena = parking + room;

        let outside = outside_streams(init)?;
        let options = Options::SYSGOOD
            .and(Options::FOLLOW)
            .and(Options::EXIT_KILL)
            .and(Options::SUSPEND_SECCOMP);
        ptrace::seize(init, options).map_err(failed("seize", init))?;
        ptrace::interrupt(init).map_err(failed("interrupt", init))?;
        let thread = first_stop(init)?;
        let mut process = Process::new(init, vec![thread])?;
        process.find_room(&present);
        check_host(&process, &present, container)?;
        process.map_arena(Some(arena))?;
        let channel = Channel::make(&mut process, &taken)?;
        let mut tree = Tree {
            processes: BTreeMap::from([(1, process)]),
            arena,
            parking,
            channel,
            outside,
            finished: false,
        };
        tree.empty_init(&present)?;
        Ok(tree)
    }

    /// Unmaps everything of the blank init but the vdso, and forgets what the kernel would inherit to its children.
    fn empty_init(&mut self, present: &[proc::Mapping]) -> Result<(), RestoreError> {
        let parking = self.parking;
        let init = self.process(1)?;
        let rseq =
            ptrace::rseq(init.pid).map_err(failed("read the rseq registration of", init.pid))?;
        let mut tape = init.tape()?;
        if let Some(rseq) = rseq {
            const UNREGISTER: u64 = 1;
            let arguments =
                [rseq.address, rseq.bytes.into(), UNREGISTER, rseq.signature.into(), 0, 0];
            tape.call("unregister its rseq area", libc::SYS_rseq, arguments);
        }
        tape.call("forget its robust list", libc::SYS_set_robust_list, [0, 24, 0, 0, 0, 0]);
        tape.call("forget its thread id address", libc::SYS_set_tid_address, [0; 6]);
        // Until each process has its own actions: that a child stops is no news to its parent.
        let quiet = tape.words(&[0, u64::from(libc::SA_NOCLDSTOP.unsigned_abs()), 0, 0]);
        let child = u64::from(libc::SIGCHLD.unsigned_abs());
        tape.call("ignore stops of children", libc::SYS_rt_sigaction, [child, quiet, 0, 8, 0, 0]);
        let off = tape.words(&[0, libc::SS_DISABLE.unsigned_abs().into(), 0]);
        tape.call("forget its alternate stack", libc::SYS_sigaltstack, [off, 0, 0, 0, 0, 0]);
        for mapping in present {
            if !vdso::is_part(mapping) && mapping.name != "[vsyscall]" {
                tape.call(
                    "unmap its memory",
                    libc::SYS_munmap,
                    [mapping.start, mapping.bytes(), 0, 0, 0, 0],
                );
            }
        }
        init.run_all(0, &tape, End::Breakpoint)?;
        vdso::park(init, parking)?;
        Ok(())
    }

    /// Where a mapping of any shared object has room for a moment, in every process.
    pub(crate) fn workspace(&self) -> u64 {
        (self.parking + PARKING_BYTES).next_multiple_of(HUGE_PAGE)
    }

    pub(crate) fn process(&mut self, pid: i32) -> Result<&mut Process, RestoreError> {
        self.processes.get_mut(&pid).ok_or_else(|| {
            RestoreError::Damaged(format!("process {pid} is referred to, but not there"))
        })
    }

    /// Makes all processes and threads, blank but for memory that they shall share by copy on write.
    fn spawn(
        &mut self,
        container: &Container,
        terminals: &terminals::Made,
        root: &Root,
        source: &dyn Source,
    ) -> Result<Inheritance, RestoreError> {
        let records = &container.processes;
        let init = self.process(1)?.pid;
        let leads = proc::status(init)
            .ok()
            .and_then(|status| status.nssid.last().copied())
            .is_some_and(|session| session == 1);
        if leads {
            terminals.take_control_of_init(container, self)?;
        }
        let steps = plan::tree(records, leads)?;
        let mut inheritance = Inheritance::plan(container, &steps, source)?;
        for step in steps {
            match step {
                Step::Fork { creator, pid, sibling, exit_signal, shared } => {
                    if let Some(process) = self.processes.get_mut(&creator) {
                        inheritance.bequeath(creator, process, &mut self.channel, root, source)?;
                    }
                    self.fork(creator, pid, sibling, exit_signal, shared)?
                }
                Step::NewSession { pid } => {
                    self.call(pid, "make a session", libc::SYS_setsid, [0; 6])?;
                    // Before it has children, which inherit it.
                    terminals.take_control(pid, container, self)?;
                }
                Step::JoinGroup { pid, group } => {
                    let arguments = [0, u64::from(group.unsigned_abs()), 0, 0, 0, 0];
                    self.call(pid, "join a process group", libc::SYS_setpgid, arguments)?;
                }
                Step::Adopt { pid, on } => {
                    let operation = u64::from(libc::PR_SET_CHILD_SUBREAPER.unsigned_abs());
                    let arguments = [operation, on.into(), 0, 0, 0, 0];
                    self.call(pid, "adopt a process", libc::SYS_prctl, arguments)?;
                }
                Step::End { pid, reaper } => {
                    self.bury(pid, b"", 0, 0)?;
                    let all = u64::from(libc::__WALL.unsigned_abs());
                    let arguments = [u64::from(pid.unsigned_abs()), 0, all, 0, 0, 0];
                    self.call(reaper, "wait for a helper", libc::SYS_wait4, arguments)?;
                }
            }
        }
        for record in records {
            if let ProcessState::Alive(alive) = &record.state {
                self.make_threads(record.pid, alive)?;
            }
        }
        terminals.share_control(container, self)?;
        self.number_on(records)?;
        Ok(inheritance)
    }

    /// Lets the numbers of what is forked later follow those that mean something already: a program may remember them.
    fn number_on(&mut self, records: &[Record]) -> Result<(), RestoreError> {
        const LAST: &str = "/proc/sys/kernel/ns_last_pid";
        let threads = |record: &Record| match &record.state {
            ProcessState::Alive(alive) => alive.threads.iter().map(|thread| thread.tid).max(),
            ProcessState::Zombie { .. } => None,
        };
        let highest = records
            .iter()
            .flat_map(|record| {
                [record.pid, record.group, record.session].into_iter().chain(threads(record))
            })
            .max()
            .unwrap_or(1);
        let file = match File::options().write(true).open(LAST) {
            // A kernel without CONFIG_CHECKPOINT_RESTORE can't be told.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            other => other.map_err(make("the number of the last process"))?,
        };
        // It counts for the namespace of whoever writes.
        let numbers = self.send(1, &[file.as_fd()])?;
        let init = self.process(1)?;
        let mut tape = init.tape()?;
        let text = highest.to_string();
        let data = tape.data(text.as_bytes());
        for number in numbers {
            let number = u64::from(number.unsigned_abs());
            let arguments = [number, data, text.len() as u64, 0, 0, 0];
            tape.call("say which number was the last", libc::SYS_write, arguments);
            tape.call("close a descriptor", libc::SYS_close, [number, 0, 0, 0, 0, 0]);
        }
        init.run_all(0, &tape, End::Breakpoint)?;
        Ok(())
    }

    fn stop_all(&mut self, records: &[Record]) -> Result<(), RestoreError> {
        for record in records {
            if let ProcessState::Alive(alive) = &record.state
                && let Some(stopped) = alive.stopped
            {
                self.stop(record, stopped)?;
            } else if let ProcessState::Alive(alive) = &record.state
                && alive.continued
            {
                let process = self.process(record.pid)?;
                process.stop(libc::SIGSTOP)?;
                process.cont()?;
            }
        }
        Ok(())
    }

    /// Tells the engine's numbers of all processes and threads, the dead too: somebody may hold a descriptor of them. Those
    /// that have ended are made for this.
    fn number(&mut self, container: &Container) -> Result<Processes, RestoreError> {
        let mut numbers = BTreeMap::new();
        for record in &container.processes {
            let pid = self.process(record.pid)?.pid;
            numbers.insert(record.pid, pid);
            if let ProcessState::Alive(alive) = &record.state {
                let threads = &self.process(record.pid)?.threads;
                numbers.extend(alive.threads.iter().zip(threads).map(|(it, is)| (it.tid, is.tid)));
            }
        }
        let taken = numbers.keys().chain(self.processes.keys()).copied().collect();
        let ended = procfiles::numbers(&container.ended, &taken);
        for number in &ended {
            self.fork(1, *number, false, libc::SIGCHLD, 0)?;
            numbers.insert(*number, self.process(*number)?.pid);
        }
        Ok(Processes { numbers, ended })
    }

    /// Lets processes work in directories of those that will end.
    fn work_in_ended(
        &mut self,
        container: &Container,
        root: &Root,
        numbers: &[i32],
    ) -> Result<(), RestoreError> {
        for record in &container.processes {
            let ProcessState::Alive(alive) = &record.state else { continue };
            let Some(place) = &alive.ended_directory else { continue };
            let number = numbers.get(place.process as usize).ok_or_else(|| {
                RestoreError::Damaged("a working directory is of no process".to_owned())
            })?;
            let flags = libc::O_PATH | libc::O_DIRECTORY;
            let directory = procfiles::open_ended(root, *number, &place.path, flags)?;
            let process = self.processes.get_mut(&record.pid).ok_or_else(|| {
                RestoreError::Damaged(format!("process {} is missing", record.pid))
            })?;
            process::go_to_ended(process, &mut self.channel, &directory)?;
        }
        Ok(())
    }

    /// Ends processes that had ended, now that there are descriptors of them.
    fn end_again(&mut self, container: &Container, numbers: &[i32]) -> Result<(), RestoreError> {
        for (number, record) in numbers.iter().zip(&container.ended) {
            self.bury(*number, b"", record.exit_status, 0)?;
            let arguments = [u64::from(number.unsigned_abs()), 0, 0, 0, 0, 0];
            self.call(1, "wait for a process that had ended", libc::SYS_wait4, arguments)?;
        }
        Ok(())
    }

    /// Stops a process for its parent and the rest of the world; for the engine it goes on.
    fn stop(&mut self, record: &Record, stopped: Stopped) -> Result<(), RestoreError> {
        const SIGNALS: [i32; 4] = [libc::SIGSTOP, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
        if !SIGNALS.contains(&stopped.signal) {
            let (pid, signal) = (record.pid, stopped.signal);
            return Err(RestoreError::Damaged(format!("process {pid} was stopped by {signal}")));
        }
        self.process(record.pid)?.stop(stopped.signal)?;
        if stopped.reported
            && let Some(parent) = self.processes.get_mut(&record.parent)
        {
            process::take_stop_report(parent, record.pid)?;
        }
        Ok(())
    }

    /// Hands descriptors of the engine to a process, and returns the numbers that they have there.
    pub(crate) fn send(
        &mut self,
        pid: i32,
        files: &[BorrowedFd<'_>],
    ) -> Result<Vec<RawFd>, RestoreError> {
        let process = self
            .processes
            .get_mut(&pid)
            .ok_or_else(|| RestoreError::Damaged(format!("process {pid} is missing")))?;
        self.channel.send(process, files)
    }

    pub(crate) fn call(
        &mut self,
        pid: i32,
        what: &str,
        number: libc::c_long,
        arguments: [u64; 6],
    ) -> Result<(), RestoreError> {
        let process = self.process(pid)?;
        let mut tape = process.tape()?;
        tape.call(what.to_owned(), number, arguments);
        process.run_all(0, &tape, End::Breakpoint)?;
        Ok(())
    }

    pub(crate) fn fork(
        &mut self,
        creator: i32,
        pid: i32,
        sibling: bool,
        exit_signal: i32,
        shared: i32,
    ) -> Result<(), RestoreError> {
        let flags = if sibling { libc::CLONE_PARENT } else { 0 } | shared;
        let flags = u64::from(flags.unsigned_abs());
        // A sibling inherits its creator's signal; clone3 refuses another one.
        let signal = if sibling { 0 } else { u64::from(exit_signal.unsigned_abs()) };
        let arena = self.arena;
        let creator = self.process(creator)?;
        let child = clone(creator, flags, signal, &[pid])?;
        let [child] = child.as_slice() else {
            return Err(RestoreError::Damaged(format!("process {pid} could not be made")));
        };
        let thread = first_stop(*child)?;
        let mut process = Process::new(*child, vec![thread])?;
        process.arena = Some(arena);
        process.set_room(creator.room());
        self.processes.insert(pid, process);
        Ok(())
    }

    fn make_threads(&mut self, pid: i32, alive: &Alive) -> Result<(), RestoreError> {
        const THREAD: i32 = libc::CLONE_VM
            | libc::CLONE_FS
            | libc::CLONE_FILES
            | libc::CLONE_SIGHAND
            | libc::CLONE_THREAD
            | libc::CLONE_SYSVSEM;
        let process = self.process(pid)?;
        let tids: Vec<i32> = alive.threads.iter().skip(1).map(|thread| thread.tid).collect();
        if alive.threads.first().map(|thread| thread.tid) != Some(pid) {
            return Err(RestoreError::Damaged(format!(
                "process {pid} does not begin with its leader"
            )));
        }
        /// A tape holds the arguments of this many clones.
        const AT_ONCE: usize = 512;
        for tids in tids.chunks(AT_ONCE) {
            for tid in clone(process, u64::from(THREAD.unsigned_abs()), 0, tids)? {
                process.threads.push(first_stop(tid)?);
            }
        }
        Ok(())
    }

    /// Maps the memory of one process, writable where it has to be filled.
    fn map(
        &mut self,
        pid: i32,
        alive: &Alive,
        root: &Root,
        shared: &memory::Shared,
        heritage: Option<&Heritage>,
        source: &dyn Source,
    ) -> Result<(), RestoreError> {
        if alive.sharing.memory.is_some() {
            return Ok(());
        }
        let runs =
            source.runs(SpaceId(alive.space)).map_err(|source| RestoreError::Fill { source })?;
        let process = self
            .processes
            .get_mut(&pid)
            .ok_or_else(|| RestoreError::Damaged(format!("process {pid} is missing")))?;
        if let Some(heritage) = heritage {
            heritage.reduce(process)?;
        }
        process::set_layout(process, &mut self.channel, alive, root, shared)?;
        memory::map(process, &mut self.channel, alive, root, shared, heritage, &runs)
    }

    /// Tells processes that share memory where the first of them has put things.
    fn note_shared_memory(&mut self, records: &[Record]) -> Result<(), RestoreError> {
        let mut taken: BTreeMap<i32, usize> = BTreeMap::new();
        for record in records {
            let ProcessState::Alive(alive) = &record.state else { continue };
            let first = alive.sharing.memory.unwrap_or(record.pid);
            let room = self.process(first)?.room();
            let taken = taken.entry(first).or_default();
            let process = self.process(record.pid)?;
            process.scratch_taken = *taken;
            *taken += process.threads.len();
            process.set_room(room);
        }
        Ok(())
    }

    /// Gives one process all that is not memory, not a descriptor and not confinement.
    fn furnish(
        &mut self,
        record: &Record,
        alive: &Alive,
        root: &Root,
        shared: &Shared,
    ) -> Result<(), RestoreError> {
        let process = self
            .processes
            .get_mut(&record.pid)
            .ok_or_else(|| RestoreError::Damaged(format!("process {} is missing", record.pid)))?;
        memory::protect(process, alive)?;
        process::furnish(process, &mut self.channel, alive, root, shared)
    }

    fn install(
        &mut self,
        pid: i32,
        alive: &Alive,
        files: &descriptors::Files,
    ) -> Result<(), RestoreError> {
        let process = self
            .processes
            .get_mut(&pid)
            .ok_or_else(|| RestoreError::Damaged(format!("process {pid} is missing")))?;
        descriptors::install(process, &mut self.channel, alive, files)
    }

    fn follow_databases(
        &mut self,
        pid: i32,
        alive: &Alive,
        files: &[OpenFile],
        source: &dyn Source,
    ) -> Result<(), RestoreError> {
        let runs =
            source.runs(SpaceId(alive.space)).map_err(|source| RestoreError::Fill { source })?;
        let process = self.process(pid)?.pid;
        sqlite::follow(process, alive, files, &runs)
            .map_err(make(format!("the open databases of process {pid}")))?;
        Ok(())
    }

    /// Ends a process so that its parent can wait for this status.
    fn bury(
        &mut self,
        pid: i32,
        name: &[u8],
        exit_status: i32,
        uid: u32,
    ) -> Result<(), RestoreError> {
        let process = self
            .processes
            .remove(&pid)
            .ok_or_else(|| RestoreError::Damaged(format!("process {pid} is missing")))?;
        process::bury(process, &mut self.channel, name, exit_status, uid)
    }

    fn confine(
        &mut self,
        pid: i32,
        alive: &Alive,
        confinement: &Confinement,
        then: &Clocks,
    ) -> Result<(), RestoreError> {
        let process = self.process(pid)?;
        process::confine(process, alive, confinement, then)
    }

    /// Removes the engine from all processes and lets them go. `then` are the clocks at the capture.
    fn resume(&mut self, records: &[Record], then: &Clocks) -> Result<(), RestoreError> {
        for record in records {
            if let ProcessState::Alive(alive) = &record.state {
                process::end_breakpoints(self.process(record.pid)?, alive)?;
            }
        }
        for record in records {
            if let ProcessState::Alive(alive) = &record.state {
                let first = alive.sharing.memory.unwrap_or(record.pid);
                if first == record.pid {
                    vdso::finish(self.process(first)?, alive)?;
                }
                let room = self.process(first)?.room();
                self.process(record.pid)?.set_room(room);
            }
        }
        for process in self.processes.values_mut() {
            process.unmap_arena()?;
        }
        let passed_ns = clocks::passed(self.process(1)?.pid, then).map_err(make("the clocks"))?;
        for record in records {
            if let ProcessState::Alive(alive) = &record.state {
                let process = self.process(record.pid)?;
                process::set_registers(process, alive, passed_ns)?;
            }
        }
        // From here on a failure kills all that has not been released when this process ends, and with init the rest.
        let mut processes: Vec<Process> =
            std::mem::take(&mut self.processes).into_values().collect();
        // Init last: as long as it is held, the kernel's EXITKILL ends everything with it.
        processes.reverse();
        for process in &mut processes {
            for thread in &mut process.threads {
                thread.settle()?;
            }
        }
        tracee::release(&processes, false)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Tree {
    fn drop(&mut self) {
        if self.finished {
            return;
        }
        // Killing its init ends a pid namespace.
        for process in self.processes.values() {
            if let Ok(handle) = PidFd::open(process.pid) {
                let _ = handle.send_signal(libc::SIGKILL);
            }
        }
    }
}

/// Makes processes or threads with the given numbers, one after another, and returns the engine's numbers for them.
fn clone(
    creator: &mut Process,
    flags: u64,
    exit_signal: u64,
    numbers: &[i32],
) -> Result<Vec<Pid>, RestoreError> {
    /// `struct clone_args` as of Linux 5.7: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls, set_tid,
    /// set_tid_size, cgroup.
    const CLONE_ARGS_BYTES: u64 = 88;
    let mut tape = creator.tape()?;
    for number in numbers {
        let set_tid = tape.data(&number.to_le_bytes());
        let arguments = tape.words(&[flags, 0, 0, 0, exit_signal, 0, 0, 0, set_tid, 1, 0]);
        let what = format!("make process or thread {number}");
        tape.call(what, libc::SYS_clone3, [arguments, CLONE_ARGS_BYTES, 0, 0, 0, 0]);
    }
    let results = creator.run(0, &tape, End::Breakpoint)?;
    for (number, result) in numbers.iter().zip(results) {
        if let Err(errno) = Call::outcome(result) {
            let what = format!("process or thread {number}");
            return Err(RestoreError::Make { what, source: io::Error::from_raw_os_error(errno) });
        }
    }
    Ok(std::mem::take(&mut creator.born))
}

/// Waits for the first stop of a new or just interrupted thread.
fn first_stop(tid: Pid) -> Result<Thread, RestoreError> {
    loop {
        match wait::one(tid).map_err(failed("wait for", tid))? {
            Status::EventStop(_) => return Ok(Thread::at_stop(tid, 0)?),
            status @ (Status::Exited(_) | Status::Killed(_)) => {
                return Err(TraceeError::Ended { tid, status }.into());
            }
            Status::SignalStop(_) | Status::SyscallStop | Status::Event(_) | Status::Continued => {
                ptrace::interrupt(tid).map_err(failed("interrupt", tid))?;
                ptrace::cont(tid, 0).map_err(failed("resume", tid))?;
            }
        }
    }
}

/// The streams 0, 1 and 2 of the blank init, which are the new container's.
fn outside_streams(init: Pid) -> Result<Vec<Option<OwnedFd>>, RestoreError> {
    let handle = PidFd::open(init).map_err(make("a handle on the blank init"))?;
    (0..3)
        .map(|fd| match handle.get_fd(fd) {
            Ok(stream) => Ok(Some(stream)),
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => Ok(None),
            Err(source) => {
                Err(RestoreError::Make { what: format!("the standard stream {fd}"), source })
            }
        })
        .collect()
}

/// Whether this kernel and processor can go on with what was saved.
fn check_host(
    process: &Process,
    present: &[proc::Mapping],
    container: &Container,
) -> Result<(), RestoreError> {
    let Some(vdso) = present.iter().find(|mapping| mapping.name == "[vdso]") else {
        return Err(RestoreError::Incompatible("its kernel offers no vdso".to_owned()));
    };
    if vdso::digest(process, vdso)? != container.vdso_sha256 {
        return Err(RestoreError::Incompatible(
            "its kernel's vdso differs from the one that the container was saved with; restore it on a host with the same kernel".to_owned(),
        ));
    }
    let tid = process.pid;
    let here = ptrace::xstate(tid).map_err(failed("read the vector registers of", tid))?.len();
    let alive = container.processes.iter().filter_map(|record| match &record.state {
        ProcessState::Alive(alive) => Some(alive),
        ProcessState::Zombie { .. } => None,
    });
    for thread in alive.flat_map(|alive| &alive.threads) {
        if thread.xstate.len() > here {
            return Err(RestoreError::Incompatible(format!(
                "its processor's vector state has {here} bytes, the capsule's has {}",
                thread.xstate.len()
            )));
        }
    }
    for alive in container.processes.iter().filter_map(|record| match &record.state {
        ProcessState::Alive(alive) => Some(alive),
        ProcessState::Zombie { .. } => None,
    }) {
        memory::check(alive)?;
    }
    memory::check_huge_pages(container)
}

pub(crate) fn make(what: impl Into<String>) -> impl FnOnce(io::Error) -> RestoreError {
    let what = what.into();
    move |source| RestoreError::Make { what, source }
}

/// A file of the container as a mapping or descriptor needs it: regular, or a directory.
///
/// What is there is looked at before it is opened: a capsule must not make the engine open a device or wait for a FIFO.
pub(crate) fn open_below(root: &Root, path: &[u8], flags: i32) -> Result<File, RestoreError> {
    open_checked(root, path, flags, &|metadata| metadata.is_file() || metadata.is_dir())
}

/// As [`open_below`], for what `expected` accepts.
pub(crate) fn open_checked(
    root: &Root,
    path: &[u8],
    flags: i32,
    expected: &dyn Fn(&Metadata) -> bool,
) -> Result<File, RestoreError> {
    let what = || make(format!("the open file {}", String::from_utf8_lossy(path)));
    let handle = File::from(root.open(path, libc::O_PATH).map_err(what())?);
    if !expected(&handle.metadata().map_err(what())?) {
        let path = String::from_utf8_lossy(path);
        return Err(RestoreError::Incompatible(format!(
            "{path} is not the kind of file here that it was"
        )));
    }
    if flags & libc::O_PATH != 0 {
        return Ok(handle);
    }
    if flags & libc::O_NOFOLLOW != 0 {
        // A flag that only the opening of a name can leave.
        return Ok(root.open(path, flags).map_err(what())?.into());
    }
    Shared::reopen(&handle, flags).map_err(what())
}

/// Whether a mapping's content comes from the capsule.
pub(crate) fn is_filled(backing: &Backing) -> bool {
    match backing {
        Backing::Anonymous { .. }
        | Backing::PrivateFile { .. }
        | Backing::PrivateMemory { .. }
        | Backing::PrivateUnlinked { .. } => true,
        Backing::SharedFile { .. }
        | Backing::SharedUnlinked { .. }
        | Backing::Shared { .. }
        | Backing::SystemV { .. }
        | Backing::AsynchronousIo { .. }
        | Backing::InheritedRing { .. }
        | Backing::Vdso { .. } => false,
    }
}
