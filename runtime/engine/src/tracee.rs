//! Stopped threads in which the engine runs system calls.
//!
//! Capture runs reading calls in them, restore runs building calls; both go through [`Process::run`].
//!
//! Invariants:
//! - Between two calls of this module every thread is in a ptrace stop.
//! - While a process is being captured, the engine may be killed between any two instructions: each thread then goes on as if
//!   nothing had been. Registers are set before the signal mask is, and put back after it, because the code in the tracee
//!   puts back both by itself.
//!
//! What this module does not do: decide what to call.

use std::borrow::Cow;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use samara_capsule::record::Restart;
use samara_kernel::pidfd::PidFd;
use samara_kernel::ptrace::{self, Registers, Rseq};
use samara_kernel::tape::{
    self, CALL_BYTES, Call, End, ONCE_BYTES, ONCE_PREFIX, OPENING_BYTES, RETURN_BLOCK,
    RETURN_BLOCK_BYTES, SLOT_BYTES, SLOTS, TRAP_FLAG,
};
use samara_kernel::userfaultfd::{self, WriteTracker};
use samara_kernel::wait::{self, Status};
use samara_kernel::{Pid, proc};

use crate::restart;

/// Why something could not be done in a tracee.
#[derive(Debug, thiserror::Error)]
pub enum TraceeError {
    #[error("could not {what} thread {tid}")]
    Ptrace { what: &'static str, tid: Pid, source: io::Error },
    #[error("could not {what} the memory of process {pid} at {address:#x}")]
    Memory { what: &'static str, pid: Pid, address: u64, source: io::Error },
    #[error("thread {tid} ended while it was stopped ({status:?})")]
    Ended { tid: Pid, status: Status },
    #[error("thread {tid} stopped unexpectedly at {rip:#x} ({status:?})")]
    Astray { tid: Pid, rip: u64, status: Status },
    #[error("process {pid} has no room for the engine's code: {why}")]
    NoRoom { pid: Pid, why: &'static str },
    #[error("process {pid} could not {what}")]
    Call { pid: Pid, what: String, source: io::Error },
}

/// Calls that one run takes.
pub(crate) const CALLS_MAX: usize = 2048;
/// From a copy of the interpreter to the data of its tape, which begins behind the block and ends with the calls, so that a short
/// run touches a single page.
const DATA: u64 = RETURN_BLOCK + RETURN_BLOCK_BYTES.next_multiple_of(CALL_BYTES) as u64;
/// Bytes of data that the calls of one run may refer to.
pub(crate) const DATA_BYTES: u64 = 256 << 10;
/// The part of the arena that is code: a copy of the interpreter in each slot.
const CODE_BYTES: u64 = SLOTS as u64 * SLOT_BYTES;
/// The slot of tapes that are run alone: behind its block there is room for the longest.
const LAST_SLOT: usize = SLOTS - 1;
/// Size of the mapping that the engine makes in a tracee.
pub(crate) const ARENA_BYTES: u64 =
    (LAST_SLOT as u64 * SLOT_BYTES + DATA + DATA_BYTES + (CALLS_MAX * CALL_BYTES) as u64)
        .next_multiple_of(4096);

/// The part at the end of the vdso's last page that the engine uses. Kernels leave more than a kilobyte there.
pub(crate) const PADDING_BYTES: usize = 1024;
/// What [`tape::once`] needs of it, at its end. In what is no vdso, the last page may be nearly full.
const STUB_BYTES: usize = ONCE_BYTES.next_multiple_of(16);

/// Padding behind code, where a process can run code of the engine's: so many bytes before `end`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Room {
    end: u64,
    bytes: usize,
}

impl Room {
    /// That of a vdso that ends here.
    pub(crate) fn in_vdso(end: u64) -> Room {
        Room { end, bytes: PADDING_BYTES }
    }
}

const ALL_SIGNALS: u64 = u64::MAX;

/// A thread in a ptrace stop.
#[derive(Debug)]
pub(crate) struct Thread {
    pub(crate) tid: Pid,
    /// The registers with which it goes on, as the kernel shows them in a stop: a call that was interrupted still has its
    /// restart code in `rax`.
    pub(crate) stop: Registers,
    pub(crate) mask: u64,
    /// The signal of the group stop that it was found in, or 0.
    pub(crate) group_stop: i32,
    /// When the wait from which the stop took it would have ended by itself.
    pub(crate) expires: Option<Instant>,
    /// A stop signal came while the thread was ours; it gets it back when it goes on.
    pub(crate) owed_signal: i32,
    /// No filter of its own meets the calls that it makes for the engine.
    pub(crate) unfiltered: bool,
    /// What only it could change, where it was asked when it stopped.
    pub(crate) own: Option<OwnState>,
    /// It is in a stop from which it can go on, with the registers for it.
    settled: bool,
}

/// State of a thread that no other thread can change, and that a tracer can ask for.
#[derive(Clone, Debug)]
pub(crate) struct OwnState {
    /// The XSAVE area.
    pub(crate) vectors: Vec<u8>,
    pub(crate) dispatches_calls: bool,
    pub(crate) uses_ports: bool,
    pub(crate) rseq: Option<Rseq>,
}

impl OwnState {
    pub(crate) fn of(tid: Pid) -> Result<OwnState, TraceeError> {
        Ok(OwnState {
            vectors: ptrace::xstate(tid).map_err(failed("read the vector registers of", tid))?,
            dispatches_calls: ptrace::dispatches_calls(tid)
                .map_err(failed("read the dispatch of calls of", tid))?,
            uses_ports: ptrace::uses_ports(tid)
                .map_err(failed("read the I/O permissions of", tid))?,
            rseq: ptrace::rseq(tid).map_err(failed("read the rseq registration of", tid))?,
        })
    }
}

impl Thread {
    /// Reads the state of a thread that has just stopped.
    pub(crate) fn at_stop(tid: Pid, group_stop: i32) -> Result<Thread, TraceeError> {
        let stop = ptrace::registers(tid).map_err(failed("read the registers of", tid))?;
        let mask = ptrace::signal_mask(tid).map_err(failed("read the signal mask of", tid))?;
        Ok(Thread {
            tid,
            stop,
            mask,
            group_stop,
            expires: None,
            owed_signal: 0,
            unfiltered: false,
            own: None,
            settled: false,
        })
    }

    /// Brings the thread to the stop from which it goes on with [`Thread::stop`].
    ///
    /// The registers are set in a signal stop, because only there the kernel still looks at the restart code: a signal that came
    /// meanwhile then has the effect on the interrupted call that it would have had.
    pub(crate) fn settle(&mut self) -> Result<(), TraceeError> {
        let tid = self.tid;
        if self.expires.is_some_and(|end| end <= Instant::now()) {
            self.stop.rax = i64::from(-libc::EAGAIN).cast_unsigned();
            self.settled = false;
        }
        if self.settled {
            return Ok(());
        }
        if ptrace::registers(tid).map_err(failed("read the registers of", tid))? == self.stop {
            return Ok(());
        }
        ptrace::interrupt(tid).map_err(failed("interrupt", tid))?;
        ptrace::cont(tid, 0).map_err(failed("resume", tid))?;
        loop {
            match wait::one(tid).map_err(failed("wait for", tid))? {
                Status::EventStop(_) => break,
                status @ (Status::Exited(_) | Status::Killed(_)) => {
                    return Err(TraceeError::Ended { tid, status });
                }
                // The mask is the program's own again, so a signal may be taken first: it is given back with the release.
                Status::SignalStop(signal) => {
                    self.owed_signal = signal;
                    break;
                }
                // Which has taken the interrupt.
                Status::SyscallStop | Status::Event(_) | Status::Continued => {
                    ptrace::interrupt(tid).map_err(failed("interrupt", tid))?;
                    ptrace::cont(tid, 0).map_err(failed("resume", tid))?;
                }
            }
        }
        ptrace::set_registers(tid, &self.stop).map_err(failed("set the registers of", tid))
    }

    /// Receives the SIGSTOP that waits for its process, as `signal`, and so begins a group stop. False: the kernel drops this
    /// signal, as it does SIGTSTP in a group that nobody controls.
    fn begin_group_stop(&mut self, signal: i32) -> Result<bool, TraceeError> {
        let tid = self.tid;
        ptrace::set_signal_mask(tid, 0).map_err(failed("unblock the signals of", tid))?;
        let mut delivered = false;
        let mut status = Status::Continued;
        loop {
            match status {
                Status::EventStop(stop) if stop != libc::SIGTRAP => {
                    self.group_stop = stop;
                    break;
                }
                Status::EventStop(_) if delivered => break,
                Status::SignalStop(libc::SIGSTOP) if !delivered => {
                    delivered = true;
                    // So that the thread stops in any case before it runs.
                    ptrace::interrupt(tid).map_err(failed("interrupt", tid))?;
                    ptrace::cont(tid, signal).map_err(failed("stop", tid))?;
                }
                Status::Exited(_) | Status::Killed(_) => {
                    return Err(TraceeError::Ended { tid, status });
                }
                Status::EventStop(_)
                | Status::SignalStop(_)
                | Status::SyscallStop
                | Status::Event(_)
                | Status::Continued => ptrace::cont(tid, 0).map_err(failed("resume", tid))?,
            }
            status = wait::one(tid).map_err(failed("wait for", tid))?;
        }
        ptrace::set_signal_mask(tid, self.mask).map_err(failed("set the signal mask of", tid))?;
        Ok(self.group_stop != 0)
    }

    /// Takes part in the group stop that another thread of its process has begun.
    fn join_group_stop(&mut self) -> Result<(), TraceeError> {
        let tid = self.tid;
        ptrace::interrupt(tid).map_err(failed("interrupt", tid))?;
        ptrace::cont(tid, 0).map_err(failed("resume", tid))?;
        match wait::one(tid).map_err(failed("wait for", tid))? {
            Status::EventStop(stop) if stop != libc::SIGTRAP => {
                self.group_stop = stop;
                Ok(())
            }
            status => Err(TraceeError::Astray { tid, rip: self.stop.rip, status }),
        }
    }

    /// Lets a settled thread go on. False: it was killed in its stop.
    pub(crate) fn release(&self) -> Result<bool, TraceeError> {
        match ptrace::detach(self.tid, self.owed_signal) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => Ok(false),
            outcome => outcome.map(|()| true).map_err(failed("let go of", self.tid)),
        }
    }
}

/// Lets settled processes go on. Those that a signal had stopped are so again before any other runs and could look; nobody can
/// where they are `frozen` in a cgroup.
///
/// What is let go first may end or replace its process while other threads of it are still in their stops: they are gone then,
/// which is no failure.
///
/// # Errors
/// The first that occurred; all that can be let go has been let go.
pub(crate) fn release(processes: &[Process], frozen: bool) -> Result<(), TraceeError> {
    /// The way from one stop to the other takes microseconds.
    const STOP_MAX: Duration = Duration::from_secs(2);
    let (stopped, running): (Vec<&Process>, Vec<&Process>) =
        processes.iter().partition(|process| process.threads.iter().any(|t| t.group_stop != 0));
    let mut killed = Vec::new();
    let mut first_error = None;
    let mut let_go = |list: &[&Process]| {
        for thread in list.iter().flat_map(|process| &process.threads) {
            match thread.release() {
                Ok(true) => {}
                Ok(false) => killed.push(thread.tid),
                Err(error) => {
                    first_error.get_or_insert(error);
                }
            }
        }
    };
    let_go(&stopped);
    let deadline = Instant::now() + STOP_MAX;
    let stands = |process: &Process| {
        let wanted = process.threads.iter().all(|thread| thread.group_stop != 0);
        !wanted || proc::stat(process.pid).map_or(true, |stat| matches!(stat.state, 'T' | 'Z'))
    };
    while !frozen && !stopped.iter().all(|process| stands(process)) && Instant::now() < deadline {
        std::thread::sleep(Duration::from_micros(20));
    }
    let_go(&running);
    see_end_of(killed);
    first_error.map_or(Ok(()), Err)
}

/// Waits for threads that were killed in their stops, as a tracer has to: their processes neither end nor run another program
/// before. Children of our own are left to whoever waits for their exit status.
fn see_end_of(mut killed: Vec<Pid>) {
    /// The way from a stop to the end takes microseconds, but a core may be written on it. What is left then is seen to by the
    /// kernel when this process ends.
    const END_MAX: Duration = Duration::from_secs(2);
    let own = i32::try_from(std::process::id()).expect("pids are ints");
    killed.retain(|tid| proc::stat(*tid).is_ok_and(|stat| stat.ppid != own));
    let deadline = Instant::now() + END_MAX;
    while !killed.is_empty() && Instant::now() < deadline {
        killed.retain(|tid| {
            !matches!(
                wait::poll_one(*tid),
                Ok(Some(Status::Exited(_) | Status::Killed(_))) | Err(_)
            )
        });
        std::thread::sleep(Duration::from_micros(20));
    }
}

/// A process all of whose threads are in ptrace stops.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: Pid,
    pub(crate) threads: Vec<Thread>,
    pub(crate) memory: File,
    /// Code at whose end there is room for the engine's: the vdso, as a rule.
    room: Option<Room>,
    /// Start of the engine's mapping.
    pub(crate) arena: Option<u64>,
    /// Processes and threads that calls of this one have made since the list was last taken, as the engine numbers them.
    pub(crate) born: Vec<Pid>,
    /// Places for timespecs that processes with the same memory use.
    pub(crate) scratch_taken: usize,
    /// Signals that the process is known to ignore, by which a tape may end ([`End::Signal`]): bit 0 is signal 1.
    ignored: u64,
    /// Whether a thread may send them to itself, which a security module can forbid. `None`: it has to turn out.
    pub(crate) may_signal: Option<bool>,
    /// Slots whose copy of the interpreter has been written, a bit each.
    slots: u32,
    /// The data of the last tape that asked for something, and where it was.
    answers: (u64, Vec<u8>),
}

impl Process {
    /// Takes over a process whose threads have stopped.
    pub(crate) fn new(pid: Pid, threads: Vec<Thread>) -> Result<Process, TraceeError> {
        let path = format!("/proc/{pid}/mem");
        let memory = OpenOptions::new()
            .read(true)
            .write(true)
            .open(path)
            .map_err(|source| TraceeError::Memory { what: "open", pid, address: 0, source })?;
        Ok(Process {
            pid,
            threads,
            memory,
            room: None,
            arena: None,
            born: Vec::new(),
            scratch_taken: 0,
            ignored: 0,
            may_signal: None,
            slots: 0,
            answers: (0, Vec::new()),
        })
    }

    /// Tells which signals the process ignores (`SigIgn`) and for which it has handlers (`SigCgt`).
    pub(crate) fn set_signals(&mut self, ignored: u64, caught: u64) {
        let set =
            |signals: &[i32]| signals.iter().fold(0u64, |set, signal| set | 1 << (signal - 1));
        let by_default = set(&[libc::SIGCHLD, libc::SIGURG, libc::SIGWINCH]) & !caught;
        // Sending one of these has effects of its own.
        let never = [libc::SIGCONT, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU];
        self.ignored = (ignored | by_default) & !set(&never);
    }

    fn usable_signal(&self, index: usize) -> Option<i32> {
        let thread = self.threads.get(index).filter(|thread| thread.unfiltered)?;
        let usable = self.ignored & !thread.mask;
        (usable != 0).then(|| i32::try_from(usable.trailing_zeros() + 1).expect("64 signals"))
    }

    /// As [`Process::usable_signal`], where it is known that a thread may send it to itself.
    fn sure_signal(&self, index: usize) -> Option<i32> {
        self.usable_signal(index).filter(|_| self.may_signal == Some(true))
    }

    /// The signal by which a tape of this thread may end. `None`: there is none, and a tape stops at each of its calls.
    fn end_signal(&mut self, index: usize) -> Result<Option<i32>, TraceeError> {
        let Some(signal) = self.usable_signal(index) else { return Ok(None) };
        if self.may_signal.is_none() {
            let empty = self.tape()?;
            let told = self.run_until(index, &empty, End::Signal(signal), Until::Marker)?;
            self.may_signal = Some(told == 0);
        }
        Ok(self.may_signal.filter(|may| *may).map(|_| signal))
    }

    /// Stops a process as a signal does, until SIGCONT comes. Its threads stay in ptrace stops, and calls can be made.
    pub(crate) fn stop(&mut self, signal: i32) -> Result<(), TraceeError> {
        let pid = self.pid;
        let handle = PidFd::open(pid).map_err(failed("open", pid))?;
        let [leader, others @ ..] = self.threads.as_mut_slice() else { return Ok(()) };
        let mut begun = false;
        for signal in [signal, libc::SIGSTOP] {
            if !begun {
                handle.send_signal(libc::SIGSTOP).map_err(failed("stop", pid))?;
                begun = leader.begin_group_stop(signal)?;
            }
        }
        others.iter_mut().try_for_each(Thread::join_group_stop)
    }

    /// Lets a process go on that [`Process::stop`] has stopped, as SIGCONT does; its threads stay in ptrace stops.
    pub(crate) fn cont(&mut self) -> Result<(), TraceeError> {
        let pid = self.pid;
        let handle = PidFd::open(pid).map_err(failed("open", pid))?;
        // Ends the group stop at once; the signal itself stays pending and goes with the actions that are set later.
        handle.send_signal(libc::SIGCONT).map_err(failed("continue", pid))?;
        for thread in &mut self.threads {
            thread.group_stop = 0;
        }
        Ok(())
    }

    /// Looks for room for the engine's first code, which [`Process::map_arena`] needs: behind the vdso's image, or, where a
    /// process has none that it may run, behind that of a program or library.
    pub(crate) fn find_room(&mut self, mappings: &[proc::Mapping]) {
        let code = || mappings.iter().filter(|mapping| mapping.execute && !mapping.shared);
        let vdso = code().find(|mapping| mapping.name == "[vdso]");
        let vdso = vdso.map(|mapping| Room::in_vdso(mapping.end));
        let files = code().filter(|mapping| mapping.inode != 0);
        let files = files.map(|mapping| Room { end: mapping.end, bytes: STUB_BYTES });
        let places: Vec<Room> = vdso.into_iter().chain(files).collect();
        self.room = places.iter().copied().find(|place| self.stub_in(Some(*place)).is_ok());
        // What is wrong with the vdso is the reason that is told.
        self.room = self.room.or(places.first().copied());
    }

    pub(crate) fn has_room(&self) -> bool {
        self.room.is_some()
    }

    pub(crate) fn room(&self) -> Option<Room> {
        self.room
    }

    /// Says where there is room, as in the process that has made this one or has the same memory.
    pub(crate) fn set_room(&mut self, place: Option<Room>) {
        self.room = place;
    }

    /// Whether an address is where [`Process::scratch_for`] places timespecs.
    pub(crate) fn is_scratch(&self, address: u64) -> bool {
        self.room.is_some_and(|Room { end, bytes }| address < end && end - address <= bytes as u64)
    }

    /// Whether a thread at this place would make a system call.
    pub(crate) fn is_call(&self, address: u64) -> bool {
        const SYSCALL: [u8; 2] = [0x0f, 0x05];
        self.read(address, SYSCALL.len()).is_ok_and(|code| code == SYSCALL)
    }

    pub(crate) fn read(&self, address: u64, bytes: usize) -> Result<Vec<u8>, TraceeError> {
        let mut buffer = vec![0; bytes];
        self.memory.read_exact_at(&mut buffer, address).map_err(|source| TraceeError::Memory {
            what: "read",
            pid: self.pid,
            address,
            source,
        })?;
        Ok(buffer)
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) -> Result<(), TraceeError> {
        self.memory.write_all_at(bytes, address).map_err(|source| TraceeError::Memory {
            what: "write",
            pid: self.pid,
            address,
            source,
        })
    }

    /// Makes the mapping that tapes need: at `address` if one is given, else where the kernel likes.
    ///
    /// The first call is made by code in the padding behind the vdso's image, which no program uses, or another one's
    /// ([`Process::find_room`]). The page becomes the process's own copy by that, and stays so.
    pub(crate) fn map_arena(&mut self, address: Option<u64>) -> Result<(), TraceeError> {
        match self.map_arena_within_limits(address) {
            Err(TraceeError::Call { source, .. })
                if matches!(source.raw_os_error(), Some(libc::EAGAIN | libc::ENOMEM)) =>
            {
                self.unmap_arena()?;
                self.map_arena_beyond_limits(address)
            }
            other => other,
        }
    }

    /// For a process that has used up what it may map, write to, or lock: its soft limits are lifted for this moment.
    fn map_arena_beyond_limits(&mut self, address: Option<u64>) -> Result<(), TraceeError> {
        let pid = self.pid;
        let failed = |source| TraceeError::Call {
            pid,
            what: "get room for the engine's memory".to_owned(),
            source,
        };
        let limits = proc::limits(pid).map_err(failed)?;
        let lifted: Vec<(u32, u64, u64)> =
            [libc::RLIMIT_AS, libc::RLIMIT_DATA, libc::RLIMIT_MEMLOCK]
                .into_iter()
                .filter_map(|resource| {
                    let (soft, hard) = limits.get(resource as usize).copied()?;
                    Some((resource, soft, hard))
                })
                .collect();
        for (resource, _, hard) in &lifted {
            proc::set_limit(pid, *resource, *hard, *hard).map_err(failed)?;
        }
        let mapped = self.map_arena_within_limits(address);
        for (resource, soft, hard) in &lifted {
            proc::set_limit(pid, *resource, *soft, *hard).map_err(failed)?;
        }
        mapped
    }

    fn map_arena_within_limits(&mut self, address: Option<u64>) -> Result<(), TraceeError> {
        const RW: u64 = (libc::PROT_READ | libc::PROT_WRITE) as u64;
        const RX: u64 = (libc::PROT_READ | libc::PROT_EXEC) as u64;
        const PRIVATE: u64 = (libc::MAP_PRIVATE | libc::MAP_ANONYMOUS) as u64;
        const REPLACE: u64 = libc::MAP_FIXED as u64;
        const FIXED: u64 = libc::MAP_FIXED_NOREPLACE as u64;
        let flags = if address.is_some() { PRIVATE | FIXED } else { PRIVATE };
        let arguments = [address.unwrap_or(0), ARENA_BYTES, RW, flags, u64::MAX, 0];
        self.slots = 0;
        // Mapped anew: a process may have denied itself to make writable memory executable (PR_SET_MDWE).
        let make = |after: &Registers, mask, signal| {
            tape::opening(after, mask, signal, u32::try_from(CODE_BYTES).expect("some KiB"))
        };
        match self.by_signal(libc::SYS_mmap, arguments, make)? {
            Some(end) => {
                let base = self.outcome(end.r8, "map the engine's memory")?;
                self.arena = Some(base);
                self.outcome(end.r9, "map the engine's code")?;
            }
            None => {
                let base = self.once(libc::SYS_mmap, arguments, "map the engine's memory")?;
                self.arena = Some(base);
                let arguments = [base, CODE_BYTES, RX, PRIVATE | REPLACE, u64::MAX, 0];
                self.once(libc::SYS_mmap, arguments, "map the engine's code")?;
            }
        }
        Ok(())
    }

    /// Runs code from the start of the vdso's padding in the first thread, up to the signal by which it ends. `None`: that can't be
    /// done here.
    fn by_signal(
        &mut self,
        number: libc::c_long,
        [rdi, rsi, rdx, r10, r8, r9]: [u64; 6],
        make: impl FnOnce(&Registers, u64, i32) -> (Vec<u8>, u64),
    ) -> Result<Option<Registers>, TraceeError> {
        let whole = self.room.filter(|room| room.bytes == PADDING_BYTES);
        let (Some(room), Some(signal)) = (whole, self.sure_signal(0)) else { return Ok(None) };
        let stub = self.stub_address()?;
        // Shows that the padding is ours.
        self.write(stub, &ONCE_PREFIX)?;
        let Some(thread) = self.threads.first_mut() else { return Ok(None) };
        let after = restart::explicit(&thread.stop);
        let (code, stop) = make(&after, thread.mask, signal);
        let address = room.end - room.bytes as u64;
        self.memory.write_all_at(&code, address).map_err(|source| TraceeError::Memory {
            what: "write",
            pid: self.pid,
            address,
            source,
        })?;
        let (rax, orig_rax) = (number.unsigned_abs(), u64::MAX);
        let (rip, eflags) = (address, after.eflags & !TRAP_FLAG);
        let start = Registers { rip, rax, rdi, rsi, rdx, r10, r8, r9, orig_rax, eflags, ..after };
        let until = Until::Signal(signal);
        thread.run(&start, &after, until, address + stop, &mut Vec::new()).map(Some)
    }

    /// What a call has returned, or that it has failed.
    fn outcome(&self, result: u64, what: &str) -> Result<u64, TraceeError> {
        Call::outcome(result).map_err(|errno| TraceeError::Call {
            pid: self.pid,
            what: what.to_owned(),
            source: io::Error::from_raw_os_error(errno),
        })
    }

    /// Removes what [`Process::map_arena`] made. Does nothing where there is nothing.
    pub(crate) fn unmap_arena(&mut self) -> Result<(), TraceeError> {
        let Some(base) = self.arena.take() else { return Ok(()) };
        let (arguments, what) = ([base, ARENA_BYTES, 0, 0, 0, 0], "unmap the engine's memory");
        match self.by_signal(libc::SYS_munmap, arguments, tape::closing)? {
            Some(end) => self.outcome(end.r8, what),
            None => self.once(libc::SYS_munmap, arguments, what),
        }
        .map(drop)
    }

    /// Lets the process end with an exit code. Its threads have to be waited for.
    pub(crate) fn begin_exit(&mut self, code: u8) -> Result<(), TraceeError> {
        let stub = self.stub_address()?;
        let Some(thread) = self.threads.first() else { return Ok(()) };
        let tid = thread.tid;
        let rax = libc::SYS_exit_group.unsigned_abs();
        let after = restart::explicit(&thread.stop);
        let eflags = after.eflags & !TRAP_FLAG;
        let start =
            Registers { rip: stub, rax, rdi: code.into(), orig_rax: u64::MAX, eflags, ..after };
        self.write(stub, &tape::once(&after, thread.mask))?;
        ptrace::set_registers(tid, &start).map_err(failed("set the registers of", tid))?;
        ptrace::set_signal_mask(tid, ALL_SIGNALS).map_err(failed("block the signals of", tid))?;
        ptrace::cont(tid, 0).map_err(failed("resume", tid))
    }

    /// Makes one call in the first thread by code in the vdso's padding.
    fn once(
        &mut self,
        number: libc::c_long,
        arguments: [u64; 6],
        what: &str,
    ) -> Result<u64, TraceeError> {
        let stub = self.stub_address()?;
        let pid = self.pid;
        let thread =
            self.threads.first_mut().ok_or(TraceeError::NoRoom { pid, why: "it has no thread" })?;
        let after = restart::explicit(&thread.stop);
        let code = tape::once(&after, thread.mask);
        let [rdi, rsi, rdx, r10, r8, r9] = arguments;
        let rax = number.unsigned_abs();
        let (orig_rax, eflags) = (u64::MAX, after.eflags & !TRAP_FLAG);
        let start =
            Registers { rip: stub, rax, rdi, rsi, rdx, r10, r8, r9, orig_rax, eflags, ..after };
        self.memory.write_all_at(&code, stub).map_err(|source| TraceeError::Memory {
            what: "write",
            pid,
            address: stub,
            source,
        })?;
        let result = thread.run(&start, &after, Until::Calls(1), 0, &mut Vec::new())?;
        self.outcome(result.rax, what)
    }

    /// Makes a process that has the memory of this one as it is now, and nothing else of it. It stands, and ends with this process, its
    /// tracer. Its maker is not told of its end, and no wait finds it but one for all kinds of children (`__WALL`).
    ///
    /// Returns its number, and the one that it has in its pid namespace.
    pub(crate) fn fork(&mut self, name: &[u8; 16]) -> Result<(Pid, Pid), TraceeError> {
        let pid = self.pid;
        let no_room = |why| TraceeError::NoRoom { pid, why };
        let filtered = proc::status(pid).map_or(true, |status| status.seccomp != 0);
        if filtered && !self.threads.first().is_some_and(|thread| thread.unfiltered) {
            return Err(no_room("its seccomp filter stands in the way"));
        }
        let whole = self.room.filter(|room| room.bytes == PADDING_BYTES);
        let address = whole.map(|room| room.end - room.bytes as u64);
        let address = address.ok_or(no_room("it has no vdso that it may run"))?;
        // Shows that the padding is ours.
        self.write(self.stub_address()?, &ONCE_PREFIX)?;
        let thread = self.threads.first().ok_or(no_room("it has no thread"))?;
        let after = restart::explicit(&thread.stop);
        self.write(address, &tape::forking(&after, thread.mask, name))?;
        // The table of descriptors in common until the new process makes an empty one: nothing is opened or closed by it.
        let flags = u64::from(libc::CLONE_FILES.unsigned_abs());
        let (rax, orig_rax) = (libc::SYS_clone.unsigned_abs(), u64::MAX);
        let (rip, eflags) = (address, after.eflags & !TRAP_FLAG);
        let (rdi, rsi, rdx, r10, r8) = (flags, 0, 0, 0, 0);
        let start = Registers { rip, rax, rdi, rsi, rdx, r10, r8, orig_rax, eflags, ..after };
        let mut born = Vec::new();
        let thread = self.threads.first_mut().ok_or(no_room("it has no thread"))?;
        let end = thread.run(&start, &after, Until::Calls(1), 0, &mut born)?;
        let inner = self.outcome(end.rax, "be copied by a fork")?;
        let inner = Pid::try_from(inner).map_err(|_| no_room("its copy has no number"))?;
        let child = born.first().copied().ok_or(no_room("its copy is not told of"))?;
        Ok((child, inner))
    }

    /// Takes what is left of an ended process that [`Process::fork`] has made, or nothing.
    pub(crate) fn reap(&mut self, inner: Pid) -> Result<(), TraceeError> {
        let options = u64::from((libc::WNOHANG | libc::__WALL).unsigned_abs());
        let arguments = [u64::from(inner.unsigned_abs()), 0, options, 0, 0, 0];
        match self.once(libc::SYS_wait4, arguments, "take an ended process") {
            Err(TraceeError::Call { source, .. })
                if source.raw_os_error() == Some(libc::ECHILD) =>
            {
                Ok(())
            }
            other => other.map(drop),
        }
    }

    /// Where [`tape::once`]'s code goes: at the end of the room's last page, if nothing but padding is there.
    fn stub_address(&self) -> Result<u64, TraceeError> {
        self.stub_in(self.room)
    }

    fn stub_in(&self, room: Option<Room>) -> Result<u64, TraceeError> {
        let Room { end, bytes } =
            room.ok_or(TraceeError::NoRoom { pid: self.pid, why: "it has no code" })?;
        let padding = self.read(end - bytes as u64, bytes)?;
        let (_, present) = padding.split_at(bytes - STUB_BYTES);
        if padding.iter().all(|&byte| byte == 0) || present.starts_with(&ONCE_PREFIX) {
            Ok(end - STUB_BYTES as u64)
        } else {
            Err(TraceeError::NoRoom { pid: self.pid, why: "its vdso has no padding" })
        }
    }

    /// Places the timespecs that interrupted calls of the threads go on with, and returns their addresses.
    ///
    /// They live below the stub in the vdso's padding: the kernel only reads them, and no stack has to have room.
    /// A thread for which there is no room gets none, and its timeout starts anew.
    pub(crate) fn scratch_for(
        &self,
        restarts: impl Iterator<Item = Restart>,
    ) -> Result<Vec<Option<u64>>, TraceeError> {
        const SLOT: u64 = 16;
        let mut places = Vec::new();
        let mut slot = None;
        for restart in restarts {
            let Restart::Timespec { rest_ns, .. } = restart else {
                places.push(None);
                continue;
            };
            let address = match slot {
                None => self.stub_address()? - SLOT * (self.scratch_taken as u64 + 1),
                Some(last) => last - SLOT,
            };
            let Room { end, bytes } =
                self.room.ok_or(TraceeError::NoRoom { pid: self.pid, why: "it has no code" })?;
            // What lies there runs where there is a whole padding.
            let reserved = if bytes == PADDING_BYTES { OPENING_BYTES } else { 0 };
            if address < end - (bytes - reserved) as u64 {
                places.push(None);
                continue;
            }
            let mut timespec = [0u8; 16];
            let (seconds, ns) = timespec.split_at_mut(8);
            seconds.copy_from_slice(&(rest_ns / 1_000_000_000).to_le_bytes());
            ns.copy_from_slice(&(rest_ns % 1_000_000_000).to_le_bytes());
            if slot.is_none() {
                // Shows that the padding is ours; the rest of the code follows when it is used.
                self.write(self.stub_address()?, &ONCE_PREFIX)?;
            }
            self.write(address, &timespec)?;
            slot = Some(address);
            places.push(Some(address));
        }
        Ok(places)
    }

    /// Runs the calls of a tape in one thread and returns what they returned, in order; [`tape::NOT_RUN`] for those after a
    /// required call that failed.
    ///
    /// Data that the calls wrote is read with [`Process::output`] afterwards.
    pub(crate) fn run(
        &mut self,
        index: usize,
        tape: &Tape,
        end: End,
    ) -> Result<Vec<u64>, TraceeError> {
        let (end, until) = match end {
            End::Call => match self.end_signal(index)? {
                Some(signal) => (End::Signal(signal), Until::Signal(signal)),
                None => (End::Call, Until::Marker),
            },
            End::Signal(signal) => (end, Until::Signal(signal)),
            End::Breakpoint => (end, Until::Breakpoint),
        };
        self.run_until(index, tape, end, until)?;
        match until {
            Until::Breakpoint => {
                Ok(results(&self.read(tape.table(), tape.calls.len() * CALL_BYTES)?))
            }
            Until::Calls(_) | Until::Marker | Until::Signal(_) => self.take_answers(tape),
        }
    }

    /// What the calls of a tape have returned. What they have written is read with it, at once, for [`Process::output`].
    fn take_answers(&mut self, tape: &Tape) -> Result<Vec<u64>, TraceeError> {
        let start = tape.base + DATA;
        let room = usize::try_from(tape.table() - start).expect("at most an arena");
        let mut data = self.read(start, room + tape.calls.len() * CALL_BYTES)?;
        let table = data.split_off(room);
        self.answers = (start, data);
        Ok(results(&table))
    }

    /// Runs a tape in each of some threads, at the same time as far as it can be done: `make` appends the calls, the same ones
    /// for all of them, and `take` is told of each thread what they have returned, and may read what they have written.
    pub(crate) fn run_each<Q, E: From<TraceeError>>(
        &mut self,
        indices: &[usize],
        make: impl Fn(&mut Tape) -> Q,
        mut take: impl FnMut(&mut Process, usize, Q, Vec<u64>) -> Result<(), E>,
    ) -> Result<(), E> {
        for group in indices.chunks(SLOTS) {
            let mut begun = Vec::with_capacity(group.len());
            let mut outcome = Ok(());
            for (slot, index) in group.iter().enumerate() {
                match self.begin_in(slot, *index, &make) {
                    Ok(run) => begun.push((*index, run)),
                    Err(error) => outcome = outcome.and(Err(error)),
                }
                if outcome.is_err() {
                    break;
                }
            }
            // Whatever has happened, all that were let run are brought to a stop.
            let mut ended = Vec::with_capacity(begun.len());
            for (index, run) in begun {
                let end = match run.signal {
                    Some((signal, marker)) => self.end_run(index, signal, marker),
                    None => Ok(()),
                };
                outcome = outcome.and(end);
                ended.push((index, run));
            }
            outcome?;
            for (index, run) in ended {
                let results = match run.signal {
                    Some(_) => self.take_answers(&run.tape)?,
                    // One that can't be let run is run alone.
                    None => self.run(index, &run.tape, End::Call)?,
                };
                self.check(&run.tape, &results)?;
                take(self, index, run.questions, results)?;
            }
        }
        Ok(())
    }

    /// Lets a thread run a tape, without waiting for it.
    fn begin_in<Q>(
        &mut self,
        slot: usize,
        index: usize,
        make: &impl Fn(&mut Tape) -> Q,
    ) -> Result<Run<Q>, TraceeError> {
        let signal = self.sure_signal(index);
        let mut tape = self.tape_in(if signal.is_some() { slot } else { LAST_SLOT })?;
        let questions = make(&mut tape);
        let Some(signal) = signal else { return Ok(Run { tape, questions, signal: None }) };
        assert!(
            slot == LAST_SLOT
                || tape.table_end() <= tape.base + RETURN_BLOCK.next_multiple_of(SLOT_BYTES),
            "a tape for many threads is a short one"
        );
        let (start, _, marker) = self.load(index, &tape, End::Signal(signal))?;
        let pid = self.pid;
        let no_thread = TraceeError::NoRoom { pid, why: "it has no such thread" };
        let thread = self.threads.get_mut(index).ok_or(no_thread)?;
        thread.set_off(&start, Until::Signal(signal))?;
        Ok(Run { tape, questions, signal: Some((signal, marker)) })
    }

    fn end_run(&mut self, index: usize, signal: i32, marker: u64) -> Result<(), TraceeError> {
        let Some(thread) = self.threads.get_mut(index) else { return Ok(()) };
        let after = thread.stop;
        let mut born = Vec::new();
        thread.await_end(&after, Until::Signal(signal), marker, &mut born, &mut |_| {})?;
        self.born.extend(born);
        Ok(())
    }

    /// Runs a tape, and returns what its last call has returned that the tracer has stopped at.
    fn run_until(
        &mut self,
        index: usize,
        tape: &Tape,
        end: End,
        until: Until,
    ) -> Result<u64, TraceeError> {
        let pid = self.pid;
        let (start, after, marker) = self.load(index, tape, end)?;
        let thread = self
            .threads
            .get_mut(index)
            .ok_or(TraceeError::NoRoom { pid, why: "it has no such thread" })?;
        let mut born = Vec::new();
        let last = thread.run(&start, &after, until, marker, &mut born)?;
        self.born.extend(born);
        Ok(last.rax)
    }

    /// Writes a tape for a thread. Returns with what registers it starts, those after it, and where it ends.
    fn load(
        &mut self,
        index: usize,
        tape: &Tape,
        end: End,
    ) -> Result<(Registers, Registers, u64), TraceeError> {
        let pid = self.pid;
        let arena =
            self.arena.ok_or(TraceeError::NoRoom { pid, why: "the arena is not mapped" })?;
        let base = tape.base;
        let slot = base.checked_sub(arena).map(|offset| offset / SLOT_BYTES);
        let slot = slot.filter(|slot| *slot < SLOTS as u64).expect("a tape is made for one arena");
        if self.slots >> slot & 1 == 0 {
            self.write(base, tape::interpreter())?;
            self.slots |= 1 << slot;
        }
        let thread = self
            .threads
            .get(index)
            .ok_or(TraceeError::NoRoom { pid, why: "it has no such thread" })?;
        let after = restart::explicit(&thread.stop);
        let mut bytes = Vec::with_capacity(tape.bytes());
        bytes.extend(tape::return_block(&after, thread.mask));
        bytes.resize(usize::try_from(DATA - RETURN_BLOCK).expect("less than a page"), 0);
        bytes.extend(&tape.data);
        bytes.resize(usize::try_from(tape.table() - base - RETURN_BLOCK).expect("an arena"), 0);
        for call in &tape.calls {
            bytes.extend(call.to_bytes());
        }
        self.write(base + RETURN_BLOCK, &bytes)?;
        let start = tape::start(base, tape.table(), tape.calls.len() as u64, end, &after);
        let marker = match end {
            End::Signal(_) => tape::interpreter_signal(),
            End::Call | End::Breakpoint => tape::interpreter_marker(),
        };
        Ok((start, after, base + marker))
    }

    /// As [`Process::run`], and the first required call that failed is the error.
    pub(crate) fn run_all(
        &mut self,
        index: usize,
        tape: &Tape,
        end: End,
    ) -> Result<Vec<u64>, TraceeError> {
        let results = self.run(index, tape, end)?;
        self.check(tape, &results)?;
        Ok(results)
    }

    /// The first required call that failed, as an error.
    fn check(&self, tape: &Tape, results: &[u64]) -> Result<(), TraceeError> {
        for (position, (call, result)) in tape.calls.iter().zip(results).enumerate() {
            if call.is_required()
                && let Err(errno) = Call::outcome(*result)
            {
                let what = tape.names.get(position).cloned().unwrap_or_default().into_owned();
                return Err(TraceeError::Call {
                    pid: self.pid,
                    what,
                    source: io::Error::from_raw_os_error(errno),
                });
            }
        }
        Ok(())
    }

    /// Makes a tracker of writes for the process's memory, by two calls in its first thread, between which the descriptor is taken out:
    /// should the engine die there, the process still closes it. None where the process can't have one.
    ///
    /// The arena comes and goes with it.
    pub(crate) fn make_tracker(&mut self) -> Result<Option<WriteTracker>, TraceeError> {
        let filtered = proc::status(self.pid).map_or(true, |status| status.seccomp != 0);
        if filtered && !self.threads.first().is_some_and(|thread| thread.unfiltered) {
            return Ok(None);
        }
        self.map_arena(None)?;
        let made = self.make_tracker_in_arena();
        self.unmap_arena()?;
        made
    }

    /// As [`Process::make_tracker`], where the arena is.
    pub(crate) fn make_tracker_in_arena(&mut self) -> Result<Option<WriteTracker>, TraceeError> {
        let pid = self.pid;
        let failed = |source| TraceeError::Call { pid, what: "get a tracker".to_owned(), source };
        let used = proc::descriptors(pid).map_err(failed)?;
        // The kernel gives the lowest number that is free, and nobody else is running.
        let expected = (0..).find(|number| !used.contains(number)).unwrap_or(i32::MAX);
        let mut tape = self.tape()?;
        let close = [u64::from(expected.unsigned_abs()), 0, 0, 0, 0, 0];
        tape.call("make a tracker", libc::SYS_userfaultfd, [userfaultfd::FLAGS, 0, 0, 0, 0, 0]);
        tape.try_call("close the tracker", libc::SYS_close, close);
        let mut taken = None;
        let handle = PidFd::open(pid).map_err(failed)?;
        let (start, after, marker) = self.load(0, &tape, End::Call)?;
        let no_thread = TraceeError::NoRoom { pid, why: "it has no thread" };
        let thread = self.threads.first_mut().ok_or(no_thread)?;
        let until = Until::Marker;
        thread.set_off(&start, until)?;
        thread.await_end(&after, until, marker, &mut Vec::new(), &mut |calls| {
            if calls == 1 {
                taken = Some(handle.get_fd(expected));
            }
        })?;
        let results = self.take_answers(&tape)?;
        let made = results.first().copied().map(Call::outcome);
        match (made, taken) {
            (Some(Ok(number)), Some(Ok(fd))) if number == u64::from(expected.unsigned_abs()) => {
                Ok(WriteTracker::new(fd).ok())
            }
            (Some(Ok(number)), _) => {
                let mut tape = self.tape()?;
                tape.call("close the tracker", libc::SYS_close, [number, 0, 0, 0, 0, 0]);
                self.run_all(0, &tape, End::Call)?;
                Ok(None)
            }
            _ => Ok(None),
        }
    }

    /// A new tape for this process.
    pub(crate) fn tape(&self) -> Result<Tape, TraceeError> {
        self.tape_in(LAST_SLOT)
    }

    fn tape_in(&self, slot: usize) -> Result<Tape, TraceeError> {
        let arena = self
            .arena
            .ok_or(TraceeError::NoRoom { pid: self.pid, why: "the arena is not mapped" })?;
        let base = arena + slot as u64 * SLOT_BYTES;
        Ok(Tape { base, calls: Vec::new(), names: Vec::new(), data: Vec::new() })
    }

    /// Reads what a call of the last tape wrote.
    pub(crate) fn output(&self, output: Output) -> Result<Vec<u8>, TraceeError> {
        let (start, data) = &self.answers;
        let from = output.address.checked_sub(*start).and_then(|from| usize::try_from(from).ok());
        match from.and_then(|from| data.get(from..from.checked_add(output.bytes)?)) {
            Some(answer) => Ok(answer.to_vec()),
            None => self.read(output.address, output.bytes),
        }
    }
}

/// A tape that a thread runs.
struct Run<Q> {
    tape: Tape,
    questions: Q,
    /// With which signal it ends, and where. None: it has not been begun.
    signal: Option<(i32, u64)>,
}

/// What the calls of a table have returned.
fn results(table: &[u8]) -> Vec<u64> {
    let result = |call: &[u8]| u64::from_le_bytes(*call.last_chunk().expect("64 bytes"));
    table.chunks_exact(CALL_BYTES).map(result).collect()
}

#[derive(Clone, Copy)]
enum Until {
    /// This many calls have returned.
    Calls(usize),
    /// The call that ends at the marker has returned.
    Marker,
    /// The thread takes this signal at the marker.
    Signal(i32),
    /// A breakpoint instruction.
    Breakpoint,
}

impl Thread {
    /// Runs from `start` with all signals blocked but the one that is waited for, then has the registers `after` and its own mask
    /// again.
    fn run(
        &mut self,
        start: &Registers,
        after: &Registers,
        until: Until,
        marker: u64,
        born: &mut Vec<Pid>,
    ) -> Result<Registers, TraceeError> {
        self.set_off(start, until)?;
        self.await_end(after, until, marker, born, &mut |_| {})
    }

    /// Lets the thread run from `start`.
    fn set_off(&mut self, start: &Registers, until: Until) -> Result<(), TraceeError> {
        let tid = self.tid;
        self.settled = false;
        let blocked = match until {
            Until::Signal(signal) => ALL_SIGNALS & !(1 << (signal - 1)),
            Until::Calls(_) | Until::Marker | Until::Breakpoint => ALL_SIGNALS,
        };
        // In this order: see the module's invariants.
        ptrace::set_registers(tid, start).map_err(failed("set the registers of", tid))?;
        ptrace::set_signal_mask(tid, blocked).map_err(failed("block the signals of", tid))?;
        self.go_on(until)
    }

    fn go_on(&self, until: Until) -> Result<(), TraceeError> {
        match until {
            Until::Breakpoint | Until::Signal(_) => ptrace::cont(self.tid, 0),
            Until::Calls(_) | Until::Marker => ptrace::cont_to_syscall(self.tid, 0),
        }
        .map_err(failed("resume", self.tid))
    }

    /// Waits for the end of what [`Thread::set_off`] has begun. Where it stops at calls, `look` is told of each how many have returned.
    fn await_end(
        &mut self,
        after: &Registers,
        until: Until,
        marker: u64,
        born: &mut Vec<Pid>,
        look: &mut dyn FnMut(usize),
    ) -> Result<Registers, TraceeError> {
        let tid = self.tid;
        let registers = || ptrace::registers(tid).map_err(failed("read the registers of", tid));
        let mut stops = 0usize;
        let end = loop {
            let status = match until {
                Until::Signal(_) => soon(tid)?,
                Until::Calls(_) | Until::Marker | Until::Breakpoint => {
                    wait::one(tid).map_err(failed("wait for", tid))?
                }
            };
            match status {
                Status::SyscallStop => {
                    stops += 1;
                    if stops.is_multiple_of(2) {
                        look(stops / 2);
                        let now = registers()?;
                        match until {
                            Until::Calls(count) if stops == 2 * count => break now,
                            Until::Marker if now.rip == marker => break now,
                            Until::Calls(_)
                            | Until::Marker
                            | Until::Signal(_)
                            | Until::Breakpoint => {}
                        }
                    }
                }
                Status::SignalStop(libc::SIGTRAP) if matches!(until, Until::Breakpoint) => {
                    break registers()?;
                }
                Status::SignalStop(signal) if matches!(until, Until::Signal(it) if it == signal) => {
                    let now = registers()?;
                    if now.rip == marker {
                        break now;
                    }
                    // One that came from elsewhere; the program ignores it too.
                }
                // All signals are blocked but these two: a fault of the code in the tracee can't be delivered either, it kills.
                Status::SignalStop(signal) if signal == libc::SIGSTOP => self.owed_signal = signal,
                status @ Status::SignalStop(_) => {
                    let rip = registers().map_or(0, |registers| registers.rip);
                    return Err(TraceeError::Astray { tid, rip, status });
                }
                Status::Event(_) => {
                    let child =
                        ptrace::event_message(tid).map_err(failed("read the event of", tid))?;
                    born.extend(Pid::try_from(child));
                }
                // An interrupt that was still due.
                Status::EventStop(_) | Status::Continued => {}
                status @ (Status::Exited(_) | Status::Killed(_)) => {
                    return Err(TraceeError::Ended { tid, status });
                }
            }
            self.go_on(until)?;
        };
        ptrace::set_signal_mask(tid, self.mask).map_err(failed("set the signal mask of", tid))?;
        // In a signal stop the kernel still looks at the restart code ([`Thread::settle`]): the thread could go on from here.
        self.settled = matches!(until, Until::Signal(_));
        ptrace::set_registers(tid, if self.settled { &self.stop } else { after })
            .map_err(failed("set the registers of", tid))?;
        Ok(end)
    }
}

/// Waits for the next stop of a thread that runs a few calls. Looking for it again and again is faster than being woken, and lets
/// others run too.
fn soon(tid: Pid) -> Result<Status, TraceeError> {
    const BUSY: Duration = Duration::from_millis(1);
    /// Calls that ask take microseconds; a machine that is this busy is out of order.
    const RUN_MAX: Duration = Duration::from_secs(10);
    let begun = Instant::now();
    loop {
        if let Some(status) = wait::poll_one(tid).map_err(failed("wait for", tid))? {
            return Ok(status);
        }
        match begun.elapsed() {
            waited if waited < BUSY => std::thread::yield_now(),
            waited if waited < RUN_MAX => std::thread::sleep(Duration::from_micros(50)),
            _ => {
                let source = io::ErrorKind::TimedOut.into();
                return Err(failed("stop", tid)(source));
            }
        }
    }
}

/// Calls to be made in a tracee, and the data that they refer to.
#[derive(Debug)]
pub(crate) struct Tape {
    base: u64,
    calls: Vec<Call>,
    names: Vec<Cow<'static, str>>,
    data: Vec<u8>,
}

/// Where a call of a tape writes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Output {
    pub(crate) address: u64,
    pub(crate) bytes: usize,
}

impl Tape {
    /// Appends a call; after one that fails the tape ends. `what` completes "process N could not …".
    pub(crate) fn call(
        &mut self,
        what: impl Into<Cow<'static, str>>,
        number: libc::c_long,
        arguments: [u64; 6],
    ) {
        assert!(self.calls.len() < CALLS_MAX, "callers split tapes before they are full");
        self.calls.push(Call::new(number, arguments).required());
        self.names.push(what.into());
    }

    /// Appends a call that may fail.
    pub(crate) fn try_call(
        &mut self,
        what: impl Into<Cow<'static, str>>,
        number: libc::c_long,
        arguments: [u64; 6],
    ) {
        assert!(self.calls.len() < CALLS_MAX, "callers split tapes before they are full");
        self.calls.push(Call::new(number, arguments));
        self.names.push(what.into());
    }

    /// Places data and returns its address in the tracee.
    pub(crate) fn data(&mut self, bytes: &[u8]) -> u64 {
        let offset = self.data.len().next_multiple_of(16);
        assert!(
            (offset + bytes.len()) as u64 <= DATA_BYTES,
            "callers split tapes before they are full"
        );
        self.data.resize(offset, 0);
        self.data.extend(bytes);
        self.base + DATA + offset as u64
    }

    /// Places words and returns their address in the tracee.
    pub(crate) fn words(&mut self, words: &[u64]) -> u64 {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.data(&bytes)
    }

    /// Reserves room for a call to write to.
    pub(crate) fn output(&mut self, bytes: usize) -> Output {
        let offset = self.data.len().next_multiple_of(16);
        assert!((offset + bytes) as u64 <= DATA_BYTES, "callers split tapes before they are full");
        self.data.resize(offset + bytes, 0);
        Output { address: self.base + DATA + offset as u64, bytes }
    }

    /// Where the calls are, behind the data.
    fn table(&self) -> u64 {
        self.base + DATA + self.data.len().next_multiple_of(CALL_BYTES) as u64
    }

    fn table_end(&self) -> u64 {
        self.table() + (self.calls.len() * CALL_BYTES) as u64
    }

    /// Room for all that is written before it runs.
    fn bytes(&self) -> usize {
        RETURN_BLOCK_BYTES + self.data.len() + (self.calls.len() + 2) * CALL_BYTES
    }

    /// Whether another `calls` calls with `bytes` bytes of data fit.
    pub(crate) fn has_room(&self, calls: usize, bytes: usize) -> bool {
        self.calls.len() + calls <= CALLS_MAX
            && (self.data.len() + bytes + 16 * calls) as u64 <= DATA_BYTES
    }

    pub(crate) fn len(&self) -> usize {
        self.calls.len()
    }
}

pub(crate) fn failed(what: &'static str, tid: Pid) -> impl FnOnce(io::Error) -> TraceeError {
    move |source| TraceeError::Ptrace { what, tid, source }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::{Child, Command};

    /// Stops a child of this process that has one thread.
    fn stopped(child: &Child) -> Process {
        let pid = Pid::try_from(child.id()).expect("a pid");
        ptrace::seize(pid, ptrace::Options::SYSGOOD).expect("seize");
        ptrace::interrupt(pid).expect("interrupt");
        assert!(matches!(wait::one(pid).expect("a stop"), Status::EventStop(_)));
        let mut thread = Thread::at_stop(pid, 0).expect("registers");
        thread.unfiltered = true;
        let mut process = Process::new(pid, vec![thread]).expect("a process");
        let status = proc::status(pid).expect("status");
        process.set_signals(status.sigign, status.sigcgt);
        process.may_signal = Some(true);
        process.find_room(&proc::mappings(pid).expect("mappings"));
        process
    }

    fn shell() -> Child {
        let child = Command::new("sh").args(["-c", "sleep 0.6; exit 7"]).spawn().expect("sh");
        // Until it has become the shell and waits.
        std::thread::sleep(Duration::from_millis(200));
        child
    }

    /// The end of a child whose tracer, another thread of this process, may still be on its way out: its stops are seen here too.
    fn end_of(child: Child) -> Status {
        let pid = Pid::try_from(child.id()).expect("a pid");
        loop {
            match wait::one(pid).expect("its end") {
                end @ (Status::Exited(_) | Status::Killed(_)) => return end,
                Status::EventStop(_)
                | Status::SignalStop(_)
                | Status::SyscallStop
                | Status::Event(_)
                | Status::Continued => {}
            }
        }
    }

    /// A tape that ends by a signal gives back what it was asked for, and the thread could go on from its end.
    #[test]
    fn a_tape_runs_to_its_signal_without_a_stop() {
        let mut child = shell();
        let pid = u64::from(child.id());
        let mut process = stopped(&child);
        process.map_arena(None).expect("an arena");
        for _ in 0..3 {
            let mut tape = process.tape().expect("a tape");
            tape.call("ask for its number", libc::SYS_getpid, [0; 6]);
            assert_eq!(process.run_all(0, &tape, End::Call).expect("a run"), [pid]);
        }
        process.unmap_arena().expect("no arena");
        let [thread] = process.threads.as_mut_slice() else { panic!("one thread") };
        assert_eq!(ptrace::registers(thread.tid).expect("registers"), thread.stop);
        thread.settle().expect("settled");
        assert!(thread.release().expect("released"));
        assert_eq!(child.wait().expect("its end").code(), Some(7));
    }

    /// An engine that dies while a thread runs calls for it must cost the program nothing.
    #[test]
    fn a_tracer_that_ends_in_the_middle_of_a_tape_costs_nothing() {
        for alive_ms in [0, 40, 160] {
            let child = shell();
            std::thread::scope(|scope| {
                // With the thread that has seized it ends the tracing, as with a process that is killed.
                scope.spawn(|| {
                    let mut process = stopped(&child);
                    process.map_arena(None).expect("an arena");
                    let run = process.begin_in(0, 0, &|tape: &mut Tape| {
                        let time = tape.words(&[0, 80_000_000]);
                        tape.call("sleep", libc::SYS_nanosleep, [time, 0, 0, 0, 0, 0]);
                    });
                    assert!(run.expect("a run").signal.is_some());
                    std::thread::sleep(Duration::from_millis(alive_ms));
                });
            });
            assert_eq!(end_of(child), Status::Exited(7), "after {alive_ms} ms");
        }
    }
}
