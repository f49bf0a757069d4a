//! Stopping all of a container, and letting it go on.
//!
//! The stop is made of ptrace stops alone: when the engine dies, the kernel detaches all of them and the container runs on.
//! A container that its engine has paused (frozen in a cgroup) is seized while it is frozen; the caller then thaws the cgroup,
//! and each thread goes from the freezer into its ptrace stop without executing an instruction.
//!
//! What this module does not do: write to cgroup files.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::time::{Duration, Instant};

use samara_kernel::kcmp::{self, Resource};
use samara_kernel::pid_namespaces::View;
use samara_kernel::ptrace::{self, Options};
use samara_kernel::thread_list::ThreadFacts;
use samara_kernel::wait::{self, Status};
use samara_kernel::{Pid, proc};

use crate::restart::{self, Sleeper};
use crate::tracee::{self, OwnState, Process, Thread, TraceeError, failed};
use crate::{inotify, snapshot, thread_facts};

/// Why a container could not be stopped. It runs on in every case.
#[derive(Debug, thiserror::Error)]
pub enum FreezeError {
    #[error("could not look for the container's processes")]
    Discover { source: io::Error },
    #[error("process {pid} ({name}) is traced by process {tracer}: end the debugger first")]
    Traced { pid: Pid, name: String, tracer: Pid },
    #[error(
        "process {pid} ({name}) is in a pid namespace inside the container's: nested pid namespaces are not supported"
    )]
    NestedPidNamespace { pid: Pid, name: String },
    #[error(
        "the container has no pid namespace of its own, so its processes can't be told from others (process {pid}): start it without sharing one (docker's --pid)"
    )]
    SharedPidNamespace { pid: Pid },
    #[error(
        "the first thread of process {pid} ({name}) has ended while others go on, which is not supported"
    )]
    LeaderEnded { pid: Pid, name: String },
    #[error("could not seize thread {tid} of process {pid}")]
    Seize { pid: Pid, tid: Pid, source: io::Error },
    #[error(
        "thread {tid} ({name}) of process {pid} did not stop within {waited:?}; it is in state {state}"
    )]
    Late { pid: Pid, tid: Pid, name: String, state: char, waited: Duration },
    #[error("the container's init (process {pid}) has ended")]
    InitEnded { pid: Pid },
    #[error(transparent)]
    Tracee(#[from] TraceeError),
}

/// How long all threads together may take to stop. A thread in an uninterruptible sleep (NFS, FUSE) never does.
const FREEZE_MAX: Duration = Duration::from_secs(10);
/// A thread that has not stopped by then is looked at: it may be waiting for its vfork child.
const VFORK_LOOK: Duration = Duration::from_millis(5);
/// Between two looks for stops when there was none for [`BUSY`]: a fraction of the time that a stop takes.
const POLL: Duration = Duration::from_micros(50);
/// For so long after the last stop the next one is looked for without a pause, since a sleep takes longer than most stops: with
/// it, each stop was seen 50 to 120 us late.
const BUSY: Duration = Duration::from_micros(400);

/// How threads are traced that still run.
const TRACED: Options = Options::SYSGOOD.and(Options::FOLLOW).and(Options::EXEC);

/// A process that has ended and that its parent has not waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Zombie {
    pub(crate) pid: Pid,
}

/// A container all of whose threads are in ptrace stops. Dropping it lets them go on.
#[derive(Debug)]
pub struct FrozenTree {
    /// Init and its descendants, by pid.
    pub(crate) processes: BTreeMap<Pid, Process>,
    pub(crate) zombies: Vec<Zombie>,
    /// Processes that joined from outside (`exec`), and their descendants: stopped, never saved.
    pub(crate) sessions: BTreeMap<Pid, Process>,
    pub(crate) init: Pid,
    pub(crate) stopped_at: Instant,
    /// Threads that were found asleep in a call with a timeout.
    pub(crate) sleepers: BTreeMap<Pid, Sleeper>,
    /// What must not tell of the capture when the container goes on.
    pub(crate) watchers: Vec<inotify::Watcher>,
    /// What is left of forks of an engine that was killed: maker, and number in the pid namespace.
    pub(crate) ended_forks: Vec<(Pid, Pid)>,
    /// Other threads of the container run.
    pub(crate) is_part: bool,
    /// What is known of threads without asking them, taken when all stood and nothing had been done with them.
    pub(crate) facts: BTreeMap<Pid, ThreadFacts>,
}

impl FrozenTree {
    /// Stops everything in the pid namespace of `init`.
    ///
    /// `thaw` is called once when every thread known so far has been asked to stop: for a container that arrives frozen in a
    /// cgroup, it has to thaw it.
    ///
    /// # Errors
    /// The container runs on, with whatever was stopped released.
    pub fn stop(
        init: Pid,
        thaw: &mut dyn FnMut() -> io::Result<()>,
    ) -> Result<FrozenTree, FreezeError> {
        let status = proc::status(init).map_err(discover)?;
        let leads = status.nspid.last() == Some(&1);
        if !leads || init == 1 {
            return Err(FreezeError::SharedPidNamespace { pid: init });
        }
        let view = View::of(init).inspect_err(|error| {
            tracing::debug!(%error, "all processes of the host are looked at, which takes longer");
        });
        let mut freezer = Freezer {
            init,
            namespace: proc::namespace(init, "pid").map_err(discover)?,
            view: view.ok(),
            only: None,
            inside: BTreeSet::new(),
            running: BTreeMap::new(),
            stopped: BTreeMap::new(),
            zombies: BTreeSet::new(),
            deadline: Instant::now() + FREEZE_MAX,
            stopped_at: Instant::now(),
            sleepers: BTreeMap::new(),
        };
        // `freezer` releases what it holds when it is dropped on an error.
        freezer.seize_new(Halted::Later)?;
        thaw().map_err(discover)?;
        loop {
            freezer.wait_for_stops()?;
            if freezer.seize_new(Halted::Too)? == 0 && freezer.running.is_empty() {
                break;
            }
        }
        freezer.into_tree()
    }

    /// Stops one thread of a process, and what it makes meanwhile; the others run on. No longer than a moment is waited for it.
    ///
    /// # Errors
    /// All run on.
    pub(crate) fn stop_thread(pid: Pid, tid: Pid) -> Result<FrozenTree, FreezeError> {
        const STOP_MAX: Duration = Duration::from_millis(500);
        let mut freezer = Freezer {
            init: pid,
            namespace: proc::namespace(pid, "pid").map_err(discover)?,
            view: None,
            only: Some(tid),
            inside: BTreeSet::new(),
            running: BTreeMap::new(),
            stopped: BTreeMap::new(),
            zombies: BTreeSet::new(),
            deadline: Instant::now() + STOP_MAX,
            stopped_at: Instant::now(),
            sleepers: BTreeMap::new(),
        };
        freezer.seize_new(Halted::Too)?;
        freezer.wait_for_stops()?;
        freezer.into_tree()
    }

    /// When the first thread was asked to stop.
    #[must_use]
    pub fn stopped_at(&self) -> Instant {
        self.stopped_at
    }

    /// Lets everything go on.
    ///
    /// # Errors
    /// The first that occurred; all that can be let go has been let go.
    pub fn thaw(mut self) -> Result<(), TraceeError> {
        self.release(None)
    }

    /// As [`FrozenTree::thaw`], for a container that was frozen in a cgroup: `freeze` freezes it again before any thread runs.
    pub fn thaw_into(mut self, freeze: &mut dyn FnMut()) -> Result<(), TraceeError> {
        self.release(Some(freeze))
    }

    /// Ends the container: its init with an exit code, everything else by SIGKILL.
    ///
    /// # Errors
    /// If a process could not be ended; the rest of the container is ended by the kernel when init is.
    pub fn end(mut self, code: u8) -> Result<(), TraceeError> {
        let init = self.init;
        // A tree that is stopped only to be ended has not been looked at.
        if let Some(process) = self.processes.get_mut(&init).filter(|found| !found.has_room()) {
            let what = |source| TraceeError::Ptrace { what: "find room in", tid: init, source };
            process.find_room(&proc::mappings(init).map_err(what)?);
        }
        for pid in self.processes.keys().chain(self.sessions.keys()).filter(|pid| **pid != init) {
            let sent = samara_kernel::pidfd::PidFd::open(*pid)
                .and_then(|process| process.send_signal(libc::SIGKILL));
            match sent {
                Err(source) if source.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(TraceeError::Ptrace { what: "kill", tid: *pid, source });
                }
                Ok(()) | Err(_) => {}
            }
        }
        if let Some(process) = self.processes.get_mut(&init) {
            process.begin_exit(code)?;
        }
        // A tracee that has ended stays until its tracer has waited for it, and init until the rest is gone.
        let mut left: Vec<Pid> = self
            .processes
            .values()
            .chain(self.sessions.values())
            .flat_map(|process| process.threads.iter().map(|thread| thread.tid))
            .collect();
        self.processes.clear();
        self.sessions.clear();
        let deadline = Instant::now() + FREEZE_MAX;
        while !left.is_empty() && Instant::now() < deadline {
            left.retain(|tid| match wait::poll_one(*tid) {
                Ok(Some(Status::Exited(_) | Status::Killed(_))) | Err(_) => false,
                Ok(Some(_)) => {
                    // A stop on the way to the end; the thread may be gone already.
                    let _ = ptrace::cont(*tid, 0);
                    true
                }
                Ok(None) => true,
            });
            std::thread::sleep(POLL);
        }
        Ok(())
    }

    /// `freeze` freezes the container in a cgroup, if it was.
    fn release(&mut self, freeze: Option<&mut dyn FnMut()>) -> Result<(), TraceeError> {
        let mut first_error = Ok(());
        for watcher in std::mem::take(&mut self.watchers) {
            if let Err(error) = watcher.forget_events() {
                tracing::warn!(%error, "a program is told by inotify that its files have been read");
            }
        }
        let everything = std::mem::take(&mut self.processes).into_values();
        let mut everything: Vec<Process> =
            everything.chain(std::mem::take(&mut self.sessions).into_values()).collect();
        for process in &mut everything {
            let unmapped = process.unmap_arena();
            let settled = process.threads.iter_mut().map(Thread::settle).fold(Ok(()), Result::and);
            first_error = first_error.and(unmapped).and(settled);
        }
        let frozen = freeze.is_some();
        if let Some(freeze) = freeze {
            freeze();
        }
        first_error.and(tracee::release(&everything, frozen))
    }
}

impl Drop for FrozenTree {
    fn drop(&mut self) {
        if let Err(error) = self.release(None) {
            tracing::warn!(error = %error, "a thread could not be let go cleanly; the kernel does it when this process ends");
        }
    }
}

#[derive(Debug)]
struct Freezer {
    init: Pid,
    namespace: (u64, u64),
    /// Shows the namespace's processes and no others, where the kernel can do that.
    view: Option<View>,
    /// Of the process `init` this thread alone is stopped.
    only: Option<Pid>,
    /// Processes that were seen to be in the namespace itself, and not in one below it. They can't leave it.
    inside: BTreeSet<Pid>,
    /// Seized and asked to stop: thread to process, and since when.
    running: BTreeMap<Pid, (Pid, Instant)>,
    stopped: BTreeMap<Pid, (Pid, Thread)>,
    zombies: BTreeSet<Pid>,
    deadline: Instant,
    stopped_at: Instant,
    sleepers: BTreeMap<Pid, Sleeper>,
}

/// What became of a thread that was to be seized.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seized {
    Now,
    /// The kernel has done it when the thread was made.
    Before,
    /// It is gone, or a zombie.
    Gone,
}

/// When processes are seized that a signal has stopped: they are in another state from then on, which others of the container would see
/// that still run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Halted {
    Later,
    Too,
}

impl Freezer {
    /// Seizes threads that are not ours yet, and returns how many there were.
    ///
    /// In rounds, so that the first thread to stop does not wait until everything is known of the last one.
    fn seize_new(&mut self, halted: Halted) -> Result<usize, FreezeError> {
        self.zombies.clear();
        let mut new = Vec::new();
        let members = match self.only {
            Some(_) => vec![self.init],
            None => self.members()?,
        };
        for pid in members {
            if halted == Halted::Later && proc::stat(pid).is_ok_and(|stat| stat.state == 'T') {
                continue;
            }
            let Ok(threads) = proc::threads(pid) else { continue };
            let wanted = |tid: &Pid| self.only.is_none_or(|only| only == *tid);
            new.extend(threads.into_iter().filter(wanted).map(|tid| (pid, tid)).filter(
                |(_, tid)| !self.running.contains_key(tid) && !self.stopped.contains_key(tid),
            ));
        }
        for (_, tid) in &new {
            // Whoever wakes from here on is found out by [`Sleeper::still_slept`].
            if let Some(sleeper) = Sleeper::observe(*tid) {
                self.sleepers.insert(*tid, sleeper);
            }
        }
        let mut ours = 0;
        let mut to_interrupt = Vec::with_capacity(new.len());
        for (pid, tid) in new {
            match self.seize(pid, tid)? {
                Seized::Now => to_interrupt.push((pid, tid)),
                Seized::Before => {}
                Seized::Gone => continue,
            }
            ours += 1;
        }
        if self.stopped.is_empty() {
            self.stopped_at = Instant::now();
        }
        for (pid, tid) in to_interrupt {
            ptrace::interrupt(tid).or_else(gone_is_fine).map_err(|source| FreezeError::Seize {
                pid,
                tid,
                source,
            })?;
        }
        Ok(ours)
    }

    /// Processes of the container's pid namespace.
    fn members(&mut self) -> Result<Vec<Pid>, FreezeError> {
        let Some(view) = &self.view else { return self.members_of_host() };
        let mut members = Vec::new();
        for pid in view.processes().map_err(discover)? {
            if !self.inside.contains(&pid) {
                match proc::namespace(pid, "pid") {
                    Ok(namespace) if namespace == self.namespace => drop(self.inside.insert(pid)),
                    Ok(_) => {
                        let name = proc::stat(pid).map(|stat| stat.comm).unwrap_or_default();
                        return Err(FreezeError::NestedPidNamespace { pid, name });
                    }
                    // A zombie has no namespaces any more.
                    Err(_) => {
                        if !proc::stat(pid).is_ok_and(|stat| stat.state == 'Z') {
                            continue;
                        }
                    }
                }
            }
            members.push(pid);
        }
        Ok(members)
    }

    /// As [`Freezer::members`], from a look at all processes.
    fn members_of_host(&self) -> Result<Vec<Pid>, FreezeError> {
        let mut members = Vec::new();
        let mut others = Vec::new();
        for pid in proc::processes().map_err(discover)? {
            match proc::namespace(pid, "pid") {
                Ok(namespace) if namespace == self.namespace => members.push(pid),
                Ok(_) => others.push(pid),
                // A zombie has no namespaces any more, but still a parent.
                Err(_) => {
                    if proc::stat(pid).is_ok_and(|stat| stat.state == 'Z') {
                        others.push(pid);
                    }
                }
            }
        }
        let inside: BTreeSet<Pid> = members.iter().copied().collect();
        for pid in others {
            let Ok(stat) = proc::stat(pid) else { continue };
            if !inside.contains(&stat.ppid) {
                continue;
            }
            if stat.state == 'Z' {
                members.push(pid);
            } else if proc::namespace(pid, "pid").is_ok_and(|namespace| namespace != self.namespace)
            {
                return Err(FreezeError::NestedPidNamespace { pid, name: stat.comm });
            }
        }
        Ok(members)
    }

    /// Seizes one thread, without stopping it.
    fn seize(&mut self, pid: Pid, tid: Pid) -> Result<Seized, FreezeError> {
        // Without suspending seccomp: the thread still runs, under its filters, until it has stopped.
        match ptrace::seize(tid, TRACED) {
            Ok(()) => {
                self.running.insert(tid, (pid, Instant::now()));
                Ok(Seized::Now)
            }
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(Seized::Gone),
            Err(source) => {
                let Ok(status) = proc::status(tid) else { return Ok(Seized::Gone) };
                let own = i32::try_from(std::process::id()).expect("pids are ints");
                if matches!(status.state, 'Z' | 'X') {
                    if tid == pid {
                        if pid == self.init {
                            return Err(FreezeError::InitEnded { pid });
                        }
                        self.zombies.insert(pid);
                    }
                    Ok(Seized::Gone)
                } else if status.tracerpid == own {
                    // Attached by the kernel as the child of a tracee; its stop is on its way.
                    self.running.insert(tid, (pid, Instant::now()));
                    Ok(Seized::Before)
                } else if status.tracerpid != 0 {
                    Err(FreezeError::Traced {
                        pid,
                        name: String::from_utf8_lossy(&status.name).into_owned(),
                        tracer: status.tracerpid,
                    })
                } else {
                    Err(FreezeError::Seize { pid, tid, source })
                }
            }
        }
    }

    fn wait_for_stops(&mut self) -> Result<(), FreezeError> {
        let mut last_stop = Instant::now();
        while !self.running.is_empty() {
            let mut quiet = true;
            for tid in self.running.keys().copied().collect::<Vec<Pid>>() {
                match wait::poll_one(tid) {
                    Ok(Some(status)) => {
                        quiet = false;
                        self.on_stop(tid, status)?;
                    }
                    Ok(None) => {}
                    // Reaped by somebody else, or merged into its leader by an exec.
                    Err(error) if error.raw_os_error() == Some(libc::ECHILD) => {
                        self.running.remove(&tid);
                    }
                    Err(source) => return Err(FreezeError::Discover { source }),
                }
            }
            if !quiet {
                last_stop = Instant::now();
            } else if last_stop.elapsed() < BUSY {
                std::thread::yield_now();
            } else {
                self.look_at_late()?;
                std::thread::sleep(POLL);
            }
        }
        Ok(())
    }

    fn on_stop(&mut self, tid: Pid, status: Status) -> Result<(), FreezeError> {
        // Whatever trap a thread runs into takes the interrupt that was due (kernel/signal.c, ptrace_stop), so it is asked again.
        let resume = |signal| {
            ptrace::interrupt(tid).or_else(gone_is_fine).map_err(failed("interrupt", tid))?;
            ptrace::cont(tid, signal).or_else(gone_is_fine).map_err(failed("resume", tid))
        };
        match status {
            Status::EventStop(signal) => {
                let (pid, _) = match self.running.remove(&tid) {
                    Some(found) => found,
                    None if self.stopped.contains_key(&tid) => return Ok(()),
                    // A new task whose first stop came before its parent's event.
                    None => (process_of(tid).map_err(discover)?, Instant::now()),
                };
                let group_stop = if signal == libc::SIGTRAP { 0 } else { signal };
                // Only a tracer without CAP_SYS_ADMIN, or with a filter of its own, is refused this; its calls then meet the filters.
                let unfiltered = ptrace::set_options(tid, TRACED.and(Options::SUSPEND_SECCOMP))
                    .inspect_err(|error| {
                        tracing::debug!(%error, tid, "seccomp can't be suspended");
                    });
                let mut thread = Thread::at_stop(tid, group_stop)?;
                thread.unfiltered = unfiltered.is_ok();
                // While others are still on their way, and what the kernel has of this one is in the processor's caches.
                thread.own = Some(OwnState::of(tid)?);
                restart::mend_interrupted(&mut thread.stop);
                restart::take_interrupted_error(pid, &thread.stop);
                self.stopped.insert(tid, (pid, thread));
            }
            // Delivered now; the interrupt stops the thread before the first instruction of the handler.
            Status::SignalStop(signal) => resume(signal)?,
            Status::Event(wait::EVENT_EXEC) => {
                // The other threads of the process are gone, and this one has the leader's number.
                let pid = tid;
                self.running.retain(|other, (owner, _)| *owner != pid || *other == tid);
                self.stopped.retain(|_, (owner, _)| *owner != pid);
                self.running.insert(tid, (pid, Instant::now()));
                resume(0)?;
            }
            Status::Event(_) => {
                let child = ptrace::event_message(tid).map_err(failed("read the event of", tid))?;
                if let Ok(child) = Pid::try_from(child)
                    && !self.stopped.contains_key(&child)
                    && let Ok(pid) = process_of(child)
                {
                    self.running.insert(child, (pid, Instant::now()));
                }
                resume(0)?;
            }
            Status::SyscallStop | Status::Continued => resume(0)?,
            Status::Exited(_) | Status::Killed(_) => {
                self.running.remove(&tid);
                self.stopped.remove(&tid);
                if tid == self.init {
                    return Err(FreezeError::InitEnded { pid: tid });
                }
            }
        }
        Ok(())
    }

    /// Lets vfork children run whose parents wait for them, and gives up when time is out.
    fn look_at_late(&mut self) -> Result<(), FreezeError> {
        let now = Instant::now();
        let late: Vec<(Pid, Pid)> = self
            .running
            .iter()
            .filter(|(_, (_, since))| now.duration_since(*since) > VFORK_LOOK)
            .map(|(tid, (pid, _))| (*tid, *pid))
            .collect();
        for (tid, pid) in late {
            let Ok(stat) = proc::stat(tid) else {
                self.running.remove(&tid);
                continue;
            };
            if now > self.deadline {
                let waited = now.duration_since(self.stopped_at);
                return Err(FreezeError::Late {
                    pid,
                    tid,
                    name: stat.comm,
                    state: stat.state,
                    waited,
                });
            }
            // A parent in vfork sleeps without taking signals until its child no longer uses its address space.
            if stat.state == 'D' {
                self.run_vfork_children(pid)?;
            }
            if let Some((_, since)) = self.running.get_mut(&tid) {
                *since = now;
            }
        }
        Ok(())
    }

    fn run_vfork_children(&mut self, parent: Pid) -> Result<(), FreezeError> {
        let children: Vec<Pid> = self
            .stopped
            .iter()
            .filter(|(tid, (pid, _))| {
                *tid == pid
                    && *pid != parent
                    && kcmp::resource(parent, *pid, Resource::Vm).is_ok_and(|order| order.is_eq())
            })
            .map(|(tid, _)| *tid)
            .collect();
        for child in children {
            if let Some((pid, thread)) = self.stopped.remove(&child) {
                // Not asked to stop again: it stops at its exec, or ends.
                self.running.insert(child, (pid, Instant::now()));
                ptrace::set_registers(child, &thread.stop)
                    .map_err(failed("set the registers of", child))?;
                ptrace::cont(child, 0).or_else(gone_is_fine).map_err(failed("resume", child))?;
            }
        }
        Ok(())
    }

    fn into_tree(mut self) -> Result<FrozenTree, FreezeError> {
        // Before anything is taken out of the freezer, which lets go of what it holds.
        let leaderless =
            self.stopped.values().map(|(pid, _)| *pid).find(|pid| self.zombies.contains(pid));
        if let Some(pid) = leaderless {
            let name = proc::stat(pid).map(|stat| stat.comm).unwrap_or_default();
            return Err(FreezeError::LeaderEnded { pid, name });
        }
        let mut threads: BTreeMap<Pid, Vec<Thread>> = BTreeMap::new();
        for (pid, thread) in std::mem::take(&mut self.stopped).into_values() {
            let list = threads.entry(pid).or_default();
            // The leader first.
            let position = if thread.tid == pid { 0 } else { list.len() };
            list.insert(position, thread);
        }
        let mut tree = FrozenTree {
            processes: BTreeMap::new(),
            zombies: Vec::new(),
            sessions: BTreeMap::new(),
            init: self.init,
            stopped_at: self.stopped_at,
            sleepers: std::mem::take(&mut self.sleepers),
            watchers: Vec::new(),
            ended_forks: Vec::new(),
            is_part: self.only.is_some(),
            facts: BTreeMap::new(),
        };
        let parents: BTreeMap<Pid, Pid> = threads
            .keys()
            .chain(&self.zombies)
            .filter_map(|pid| Some((*pid, proc::stat(*pid).ok()?.ppid)))
            .collect();
        // From here on `tree` releases on errors; what has not been moved yet goes with the engine's end.
        for (pid, list) in threads {
            let process = Process::new(pid, list)?;
            tree.facts.extend(thread_facts::of(pid, process.threads.len()));
            if descends(pid, self.init, &parents) {
                tree.processes.insert(pid, process);
            } else {
                tree.sessions.insert(pid, process);
            }
        }
        for pid in self.zombies.iter().copied() {
            if let Some(fork) = snapshot::ended_fork(pid) {
                tree.ended_forks.push(fork);
            } else if descends(pid, self.init, &parents) {
                tree.zombies.push(Zombie { pid });
            }
        }
        Ok(tree)
    }
}

impl Drop for Freezer {
    fn drop(&mut self) {
        for (_, mut thread) in std::mem::take(&mut self.stopped).into_values() {
            if let Err(error) = thread.settle().and_then(|()| thread.release().map(drop)) {
                tracing::warn!(error = %error, "a thread could not be let go cleanly");
            }
        }
        // Threads that were asked to stop and have not: wait for the stop, bounded, since only a stopped thread can be let go.
        let deadline = Instant::now() + Duration::from_secs(1);
        while !self.running.is_empty() && Instant::now() < deadline {
            self.running.retain(|tid, _| !let_go(*tid));
            std::thread::sleep(POLL);
        }
    }
}

/// Lets a thread go that was asked to stop, if it has stopped. False: not yet.
fn let_go(tid: Pid) -> bool {
    match wait::poll_one(tid) {
        Ok(None) => false,
        Ok(Some(Status::EventStop(_))) => {
            let released = Thread::at_stop(tid, 0).and_then(|mut thread| {
                restart::mend_interrupted(&mut thread.stop);
                if let Ok(pid) = process_of(tid) {
                    restart::take_interrupted_error(pid, &thread.stop);
                }
                ptrace::set_registers(tid, &thread.stop)
                    .map_err(failed("set the registers of", tid))?;
                thread.release().map(drop)
            });
            if let Err(error) = released {
                tracing::warn!(error = %error, "a thread could not be let go cleanly");
            }
            true
        }
        Ok(Some(Status::SignalStop(signal))) => ptrace::detach(tid, signal).is_ok(),
        Ok(Some(Status::SyscallStop | Status::Event(_) | Status::Continued)) => {
            ptrace::detach(tid, 0).is_ok()
        }
        Ok(Some(Status::Exited(_) | Status::Killed(_))) | Err(_) => true,
    }
}

/// Whether the chain of parents leads from `pid` to `init`.
fn descends(pid: Pid, init: Pid, parents: &BTreeMap<Pid, Pid>) -> bool {
    let mut current = pid;
    // A chain is no longer than there are processes.
    for _ in 0..=parents.len() {
        if current == init {
            return true;
        }
        match parents.get(&current) {
            Some(parent) => current = *parent,
            None => return false,
        }
    }
    false
}

fn process_of(tid: Pid) -> io::Result<Pid> {
    Ok(proc::status(tid)?.tgid)
}

fn gone_is_fine(error: io::Error) -> io::Result<()> {
    if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) }
}

fn discover(source: io::Error) -> FreezeError {
    FreezeError::Discover { source }
}
