//! System calls that a stop has interrupted.
//!
//! A thread that sleeps in a call leaves it when it is stopped. The kernel marks in `rax` how the call goes on:
//!
//! | `rax` | kernel's meaning | here |
//! |---|---|---|
//! | `-ERESTARTSYS`, `-ERESTARTNOINTR`, `-ERESTARTNOHAND` | issue it again, unless a signal handler runs first | nothing to do |
//! | `-ERESTART_RESTARTBLOCK` | go on with the rest of the time, which only the kernel knows | thaw: nothing to do; restore: issue it again with what is left |
//! | `-EINTR`, of calls that `signal(7)` lists as never restarted | fails, even without a signal handler | issue it again with what is left |
//!
//! A call that has moved a part of its data returns that part. [`take_interrupted_error`] is about what `recvmmsg` does besides.
//!
//! What is left is known where the call wrote it to memory, or from the time at which the scheduler put the thread to sleep.
//! A thread that woke in between without returning is taken to have begun then: timeouts may come late, never early.
//!
//! A thread that goes on with the rest of its time does so by `restart_syscall`, which hides from the next stop what call it is, and when
//! that began: `left_calls` notes it from one capture to the next. Where others have stopped the thread (SIGSTOP, a freezer), what it
//! waits for and its code tell the call.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, RawFd};
use std::time::{Duration, Instant};

use samara_capsule::record::Restart;
use samara_kernel::pidfd::PidFd;
use samara_kernel::ptrace::Registers;
use samara_kernel::thread_list::ThreadFacts;
use samara_kernel::{Pid, proc, process_vm, sockopt};

const ERESTARTSYS: i64 = 512;
const ERESTARTNOINTR: i64 = 513;
const ERESTARTNOHAND: i64 = 514;
const ERESTART_RESTARTBLOCK: i64 = 516;

/// The registers of a thread that was stopped, in a form that needs no restart by the kernel: the call is about to be issued.
///
/// For a thread whose rest of time the kernel holds, that is `restart_syscall`; nothing that the engine runs in a tracee
/// touches what it refers to.
pub(crate) fn explicit(stop: &Registers) -> Registers {
    let mut registers = *stop;
    registers.orig_rax = u64::MAX;
    if stop.orig_rax.cast_signed() < 0 {
        return registers;
    }
    let again = match -stop.rax.cast_signed() {
        ERESTARTSYS | ERESTARTNOINTR | ERESTARTNOHAND => stop.orig_rax,
        ERESTART_RESTARTBLOCK => libc::SYS_restart_syscall.unsigned_abs(),
        _ => return registers,
    };
    registers.rax = again;
    registers.rip -= 2;
    registers
}

/// Undoes the failure that the stop itself has caused: a call that `signal(7)` lists as never restarted has just returned EINTR.
///
/// It becomes one that is issued again unless a signal handler runs first, so a signal that really came still ends it.
/// A thread that shows EINTR with a call number has not run anything since: a handler's return clears the number.
/// The timeout is corrected by [`shorten`] later, when there is time to look at memory.
pub(crate) fn mend_interrupted(stop: &mut Registers) {
    let number = stop.orig_rax.cast_signed();
    if -stop.rax.cast_signed() == i64::from(libc::EINTR) && never_restarted(number) {
        stop.rax = (-ERESTARTNOHAND).cast_unsigned();
    }
}

/// Takes back the error that an interrupted `recvmmsg` leaves in its socket.
///
/// Where it has received a part of its messages, it returns their number and keeps the reason for the next call on the socket
/// (net/socket.c, `do_recvmmsg`): ERESTARTSYS too, which no program knows. An error that came from the network at this very moment
/// would be taken with it.
pub(crate) fn take_interrupted_error(pid: Pid, stop: &Registers) {
    let received = stop.rax.cast_signed();
    let asked = stop.rdx & u64::from(u32::MAX);
    let cut = stop.orig_rax.cast_signed() == libc::SYS_recvmmsg
        && received > 0
        && received.unsigned_abs() < asked;
    if !cut {
        return;
    }
    // The kernel looks at the lower half of the register.
    let bytes = stop.rdi.to_le_bytes();
    let number = bytes.first_chunk().map_or(-1, |low| RawFd::from_le_bytes(*low));
    let taken = PidFd::open(pid)
        .and_then(|process| process.get_fd(number))
        .and_then(|socket| sockopt::get(socket.as_fd(), libc::SOL_SOCKET, libc::SO_ERROR, 4));
    if let Err(error) = taken {
        tracing::debug!(%error, pid, number, "the error of an interrupted recvmmsg stays");
    }
}

/// Not in the libc crate for this target (asm/unistd_64.h).
const SYS_IO_PGETEVENTS: i64 = 333;

/// Calls that fail with EINTR when a stop interrupts them (`signal(7)`, "Interruption of system calls … by stop signals").
fn never_restarted(number: i64) -> bool {
    matches!(
        number,
        libc::SYS_epoll_wait
            | libc::SYS_epoll_pwait
            | libc::SYS_epoll_pwait2
            | libc::SYS_semop
            | libc::SYS_semtimedop
            | libc::SYS_rt_sigtimedwait
            | libc::SYS_io_getevents
            | SYS_IO_PGETEVENTS
            | libc::SYS_io_uring_enter
            | libc::SYS_read
            | libc::SYS_readv
            | libc::SYS_write
            | libc::SYS_writev
            | libc::SYS_accept
            | libc::SYS_accept4
            | libc::SYS_connect
            | libc::SYS_recvfrom
            | libc::SYS_recvmsg
            | libc::SYS_recvmmsg
            | libc::SYS_sendto
            | libc::SYS_sendmsg
            | libc::SYS_sendmmsg
            | libc::SYS_msgrcv
            | libc::SYS_msgsnd
            | libc::SYS_futex
            | libc::SYS_getrandom
    )
}

/// A thread that was found asleep in a call with a timeout, and since when.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sleeper {
    /// The scheduler's figure, in nanoseconds of the task clock of `processor`.
    since_ns: u64,
    /// How often it had gone to sleep by then.
    sleeps: u64,
    processor: i32,
    /// The call, also where the kernel goes on with it by `restart_syscall`.
    number: i64,
    /// Where a sleep will write what is left when it is interrupted, and what stands there before.
    remainder: Option<(u64, [u8; 16])>,
}

/// What is known of a thread that was asleep when it was stopped.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Slept {
    pub(crate) since: Option<Instant>,
    pub(crate) elapsed_ns: u64,
    /// What the program had where the kernel has written the rest of a sleep that nobody interrupted.
    pub(crate) remainder: Option<(u64, [u8; 16])>,
}

impl Sleeper {
    pub(crate) fn number(&self) -> i64 {
        self.number
    }

    /// Looks at a thread that still runs undisturbed. `None`: it is not in a call whose timeout would have to be corrected.
    pub(crate) fn observe(tid: Pid) -> Option<Sleeper> {
        let call = proc::attribute(tid, "syscall").ok()?;
        let mut words = call.split(' ');
        let mut number: i64 = words.next()?.parse().ok()?;
        if number != libc::SYS_restart_syscall && timeout(number).is_none() {
            return None;
        }
        let arguments: Vec<u64> = words
            .filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok())
            .collect();
        if number == libc::SYS_restart_syscall {
            number = waited_for(&proc::attribute(tid, "wchan").ok()?, *arguments.first()?)?;
        }
        let timeout = timeout(number)?;
        let argument = |which: Argument| arguments.get(which.position()).copied();
        let remainder = match timeout {
            // Without an end there is nothing to correct, and most threads wait so.
            Timeout::Milliseconds(which) if is_for_ever(argument(which)?) => return None,
            Timeout::Timespec(which) if argument(which)? == 0 => return None,
            Timeout::Milliseconds(_) | Timeout::Timespec(_) | Timeout::Socket(_) => None,
            Timeout::Sleep { request, rest } => remainder(tid, &arguments, request, rest),
        };
        let (since_ns, sleeps) = proc::scheduled(tid)?;
        let processor = proc::stat(tid).ok()?.processor?;
        Some(Sleeper { since_ns, sleeps, processor, number, remainder })
    }

    /// Whether a thread that has stopped was asleep until then, and had not woken since it was observed: it has gone to sleep
    /// once more, in its stop.
    fn still_slept(&self, tid: Pid, facts: &BTreeMap<Pid, ThreadFacts>) -> bool {
        let sleeps = match facts.get(&tid) {
            Some(facts) => Some(facts.voluntary_switches),
            None => proc::status(tid).ok().and_then(|status| status.voluntary_switches),
        };
        sleeps == Some(self.sleeps + 1)
    }
}

/// The call that a thread goes on with by `restart_syscall`, by the function of the kernel in which it sleeps, and its first argument.
///
/// The kernel's ways back into a call are few (`set_restart_fn`): `poll`, waits for a futex, and sleeps. `None`: the kernel does not tell.
fn waited_for(function: &str, first: u64) -> Option<i64> {
    /// A clock is a small number, or a negative one; nanosleep has an address there.
    const CLOCKS: u64 = 16;
    match function {
        "" | "0" => None,
        function if function.contains("poll") => Some(libc::SYS_poll),
        function if function.contains("futex") => Some(libc::SYS_futex),
        function if function.contains("cpu_nanosleep") || first < CLOCKS => {
            Some(libc::SYS_clock_nanosleep)
        }
        _ => Some(libc::SYS_nanosleep),
    }
}

/// What stands where a sleep would write its rest, unless it reads its length from there too.
fn remainder(
    tid: Pid,
    arguments: &[u64],
    request: Argument,
    rest: Argument,
) -> Option<(u64, [u8; 16])> {
    let argument = |which: Argument| arguments.get(which.position()).copied();
    let address =
        argument(rest).filter(|address| *address != 0 && Some(*address) != argument(request))?;
    let mut before = [0; 16];
    let range = process_vm::Range { address, bytes: before.len() };
    let read = process_vm::read(tid, &[range], &mut before).ok()?;
    (read == before.len()).then_some((address, before))
}

/// Where a call has its timeout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Timeout {
    /// Milliseconds in an argument register; negative is for ever.
    Milliseconds(Argument),
    /// A relative timespec in memory that the kernel only reads.
    Timespec(Argument),
    /// What the socket in the first argument is set to: no argument of the call says it.
    Socket(Direction),
    /// A relative sleep: the timespec, and where the kernel writes what is left.
    Sleep { request: Argument, rest: Argument },
}

/// Which of a socket's two timeouts: `SO_RCVTIMEO`, `SO_SNDTIMEO`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Receive,
    Send,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Argument {
    Rdi,
    Rsi,
    Rdx,
    R10,
    R8,
}

impl Argument {
    /// The place in the list of arguments, from 0.
    fn position(self) -> usize {
        match self {
            Argument::Rdi => 0,
            Argument::Rsi => 1,
            Argument::Rdx => 2,
            Argument::R10 => 3,
            Argument::R8 => 4,
        }
    }

    fn of(self, registers: &mut Registers) -> &mut u64 {
        match self {
            Argument::Rdi => &mut registers.rdi,
            Argument::Rsi => &mut registers.rsi,
            Argument::Rdx => &mut registers.rdx,
            Argument::R10 => &mut registers.r10,
            Argument::R8 => &mut registers.r8,
        }
    }
}

/// The calls whose timeout a re-issue would start anew. `select`, `pselect6` and `ppoll` are not among them: the kernel writes
/// what is left to the program's own memory before they restart. Absolute timeouts need no correction.
fn timeout(number: i64) -> Option<Timeout> {
    Some(match number {
        libc::SYS_epoll_wait | libc::SYS_epoll_pwait => Timeout::Milliseconds(Argument::R10),
        libc::SYS_poll => Timeout::Milliseconds(Argument::Rdx),
        libc::SYS_epoll_pwait2 | libc::SYS_semtimedop | libc::SYS_futex => {
            Timeout::Timespec(Argument::R10)
        }
        libc::SYS_rt_sigtimedwait => Timeout::Timespec(Argument::Rdx),
        libc::SYS_io_getevents | SYS_IO_PGETEVENTS => Timeout::Timespec(Argument::R8),
        libc::SYS_read
        | libc::SYS_readv
        | libc::SYS_recvfrom
        | libc::SYS_recvmsg
        | libc::SYS_accept
        | libc::SYS_accept4 => Timeout::Socket(Direction::Receive),
        libc::SYS_write | libc::SYS_writev | libc::SYS_sendto | libc::SYS_sendmsg => {
            Timeout::Socket(Direction::Send)
        }
        libc::SYS_nanosleep => Timeout::Sleep { request: Argument::Rdi, rest: Argument::Rsi },
        libc::SYS_clock_nanosleep => Timeout::Sleep { request: Argument::Rdx, rest: Argument::R10 },
        _ => return None,
    })
}

/// For which way of going on a timeout is corrected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Goal {
    /// The same thread goes on: what the kernel keeps for `restart_syscall` is exact.
    Thaw,
    /// Another kernel goes on, which knows nothing.
    Restore,
}

/// Corrects the timeout of an interrupted call in the registers that the thread will go on with.
///
/// `elapsed_ns` is how long the thread had been asleep when it was stopped, 0 if that is not known: then a timeout
/// starts anew. `read` reads the program's memory, and `is_ours` tells addresses at which an earlier stop has placed a timespec: it has
/// to be placed again, since others may get its place. The result says whether a timespec has to be placed in memory too.
pub(crate) fn shorten(
    registers: &mut Registers,
    goal: Goal,
    elapsed_ns: u64,
    read: &dyn Fn(u64) -> Option<[u8; 16]>,
    is_ours: &dyn Fn(u64) -> bool,
) -> Restart {
    const ABSOLUTE: u64 = libc::TIMER_ABSTIME as u64;
    const FUTEX_WAIT: u64 = 0;
    const FUTEX_COMMAND: u64 = 0x7f;
    const MS: u64 = 1_000_000;
    let number = registers.orig_rax.cast_signed();
    let code = -registers.rax.cast_signed();
    let by_kernel = is_left_to_kernel(registers);
    if number < 0 || !(by_kernel || code == ERESTARTNOHAND || code == ERESTARTSYS) {
        return Restart::AsIs;
    }
    if by_kernel && goal == Goal::Thaw {
        return Restart::AsIs;
    }
    if by_kernel {
        registers.rax = (-ERESTARTNOHAND).cast_unsigned();
    }
    let relative_futex = number == libc::SYS_futex && registers.rsi & FUTEX_COMMAND == FUTEX_WAIT;
    if number == libc::SYS_futex && !relative_futex
        || number == libc::SYS_clock_nanosleep && registers.rsi & ABSOLUTE != 0
    {
        return Restart::AsIs;
    }
    match timeout(number) {
        None | Some(Timeout::Socket(_)) => Restart::AsIs,
        Some(Timeout::Milliseconds(argument)) => {
            shorten_milliseconds(argument.of(registers), elapsed_ns);
            Restart::AsIs
        }
        Some(Timeout::Timespec(argument)) => {
            let index = u32::try_from(argument.position()).expect("there are six arguments");
            let address = *argument.of(registers);
            match read(address).and_then(timespec_ns) {
                Some(whole_ns) if elapsed_ns > 0 || is_ours(address) => Restart::Timespec {
                    argument: index,
                    rest_ns: whole_ns.saturating_sub(elapsed_ns),
                },
                _ => Restart::AsIs,
            }
        }
        Some(Timeout::Sleep { request, rest }) => {
            let rest_address = *rest.of(registers);
            if rest_address != 0 {
                // The kernel has written there what is left (hrtimer_nanosleep).
                return match read(rest_address).and_then(timespec_ns) {
                    Some(rest_ns) => Restart::Timespec {
                        argument: u32::try_from(request.position())
                            .expect("there are six arguments"),
                        rest_ns,
                    },
                    None => Restart::AsIs,
                };
            }
            if number == libc::SYS_clock_nanosleep && is_processor_time(registers.rdi) {
                // How much of that time has passed nobody tells: it sleeps the whole again.
                return Restart::AsIs;
            }
            let whole_ns = read(*request.of(registers)).and_then(timespec_ns).unwrap_or(0);
            let rest_ms = whole_ns.saturating_sub(elapsed_ns).div_ceil(MS);
            // Without a place for the rest a sleep is the same as polling nothing: both return 0, or EINTR for a handler.
            if i32::try_from(rest_ms).is_ok() {
                registers.orig_rax = libc::SYS_poll.unsigned_abs();
                (registers.rdi, registers.rsi, registers.rdx) = (0, 0, rest_ms);
            }
            Restart::AsIs
        }
    }
}

/// Whether a clock counts the time that processes or threads have been running.
fn is_processor_time(clock: u64) -> bool {
    // The kernel takes an int.
    let clock = ((clock & 0xffff_ffff) as u32).cast_signed();
    clock < 0 || clock == libc::CLOCK_PROCESS_CPUTIME_ID || clock == libc::CLOCK_THREAD_CPUTIME_ID
}

/// The descriptor and timeout of the socket on which a thread waits, if the stop has made its call fail.
///
/// Such a call begins anew with its whole timeout, as often as it is stopped. If that has passed meanwhile, it has to end with
/// EAGAIN instead, or a program that is captured more often than it is patient would wait for ever.
pub(crate) fn socket_wait(stop: &Registers) -> Option<(i32, Direction)> {
    let number = stop.orig_rax.cast_signed();
    if number < 0 || -stop.rax.cast_signed() != ERESTARTNOHAND {
        return None;
    }
    match timeout(number)? {
        Timeout::Socket(direction) => Some((i32::try_from(stop.rdi).ok()?, direction)),
        Timeout::Milliseconds(_) | Timeout::Timespec(_) | Timeout::Sleep { .. } => None,
    }
}

/// The registers of a thread that was stopped right before it makes a call again, as if it were in the call: the inverse of [`explicit`],
/// for calls whose timespec an earlier stop has placed. `None`: it is no such thread.
pub(crate) fn in_call(
    stop: &Registers,
    is_call: &dyn Fn(u64) -> bool,
    is_ours: &dyn Fn(u64) -> bool,
) -> Option<Registers> {
    let mut registers = Registers { orig_rax: stop.rax, ..*stop };
    let argument = match timeout(stop.rax.cast_signed())? {
        Timeout::Timespec(argument) | Timeout::Sleep { request: argument, .. } => argument,
        Timeout::Milliseconds(_) | Timeout::Socket(_) => return None,
    };
    if !is_ours(*argument.of(&mut registers)) || !is_call(stop.rip) {
        return None;
    }
    registers.rax = (-ERESTARTNOHAND).cast_unsigned();
    registers.rip += 2;
    Some(registers)
}

/// As [`in_call`], for a thread that goes on with a call by `restart_syscall`, in it or right before it; which call that is, stays open.
pub(crate) fn in_restarted_call(
    stop: &Registers,
    is_call: &dyn Fn(u64) -> bool,
) -> Option<Registers> {
    const RESTART: u64 = libc::SYS_restart_syscall.unsigned_abs();
    if is_left_to_kernel(stop) && stop.orig_rax == RESTART {
        return Some(*stop);
    }
    (stop.rax == RESTART && is_call(stop.rip)).then(|| Registers {
        orig_rax: RESTART,
        rax: (-ERESTART_RESTARTBLOCK).cast_unsigned(),
        rip: stop.rip + 2,
        ..*stop
    })
}

/// Whether the kernel goes on with the call by itself, with the rest of its time.
pub(crate) fn is_left_to_kernel(stop: &Registers) -> bool {
    stop.orig_rax.cast_signed() >= 0 && -stop.rax.cast_signed() == ERESTART_RESTARTBLOCK
}

/// What a thread goes on with whose restore has taken `passed_ns`: a call that begins again has so much less of its time.
pub(crate) fn later(
    mut registers: Registers,
    restart: Restart,
    passed_ns: u64,
) -> (Registers, Restart) {
    let begins_again = begins_again(&registers);
    let restart = match restart {
        Restart::Timespec { argument, rest_ns } => {
            Restart::Timespec { argument, rest_ns: rest_ns.saturating_sub(passed_ns) }
        }
        Restart::AsIs => {
            let number = registers.orig_rax.cast_signed();
            if begins_again && let Some(Timeout::Milliseconds(argument)) = timeout(number) {
                shorten_milliseconds(argument.of(&mut registers), passed_ns);
            }
            Restart::AsIs
        }
    };
    (registers, restart)
}

/// The call of a thread has left what remains of its timeout in the program's memory: there, and how many nanoseconds the second
/// number counts.
pub(crate) fn rest_in_memory(registers: &Registers) -> Option<(u64, u64)> {
    let (address, unit_ns) = match registers.orig_rax.cast_signed() {
        libc::SYS_select => (registers.r8, 1000),
        libc::SYS_pselect6 => (registers.r8, 1),
        libc::SYS_ppoll => (registers.rdx, 1),
        _ => return None,
    };
    (begins_again(registers) && address != 0).then_some((address, unit_ns))
}

/// Whether a thread makes its call again, unless a signal has a handler.
fn begins_again(registers: &Registers) -> bool {
    registers.orig_rax.cast_signed() >= 0 && -registers.rax.cast_signed() == ERESTARTNOHAND
}

/// A `struct timeval` or `struct timespec` that is so much shorter; `None` where it makes no sense.
pub(crate) fn shorten_in_memory(bytes: [u8; 16], unit_ns: u64, passed_ns: u64) -> Option<[u8; 16]> {
    let left_ns = time_ns(bytes, unit_ns)?.saturating_sub(passed_ns);
    let words = [left_ns / SECOND_NS, left_ns % SECOND_NS / unit_ns];
    let mut shorter = [0; 16];
    for (to, word) in shorter.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    Some(shorter)
}

/// The kernel takes an int of milliseconds, of which a negative one is no timeout.
fn is_for_ever(register: u64) -> bool {
    ((register & 0xffff_ffff) as u32).cast_signed() < 0
}

fn shorten_milliseconds(register: &mut u64, passed_ns: u64) {
    const MS: u64 = 1_000_000;
    let whole_ms = (*register & 0xffff_ffff) as u32;
    if whole_ms.cast_signed() > 0 {
        *register = (u64::from(whole_ms) * MS).saturating_sub(passed_ns).div_ceil(MS);
    }
}

/// Puts the address of a timespec into the argument that [`Restart::Timespec`] names.
pub(crate) fn point_at(registers: &mut Registers, argument: u32, address: u64) {
    let argument = match argument {
        0 => Argument::Rdi,
        1 => Argument::Rsi,
        2 => Argument::Rdx,
        3 => Argument::R10,
        _ => Argument::R8,
    };
    *argument.of(registers) = address;
}

const SECOND_NS: u64 = 1_000_000_000;

fn timespec_ns(bytes: [u8; 16]) -> Option<u64> {
    time_ns(bytes, 1)
}

/// A number of seconds, and one of so many nanoseconds each.
fn time_ns(bytes: [u8; 16], unit_ns: u64) -> Option<u64> {
    let (seconds, rest) = bytes.split_at(8);
    let seconds = u64::from_le_bytes(seconds.try_into().ok()?);
    let rest = u64::from_le_bytes(rest.try_into().ok()?);
    seconds.checked_mul(SECOND_NS)?.checked_add(rest.checked_mul(unit_ns)?)
}

/// How long sleepers had been asleep at `stopped_at`, in nanoseconds. Those that have woken since they were observed are left
/// out: their waits begin anew, and have hardly begun.
///
/// The scheduler's clock differs from processor to processor by the time that the host has stolen, so it is read on each in
/// turn; the container is stopped, so the visit is short.
pub(crate) fn elapsed(
    sleepers: &BTreeMap<Pid, Sleeper>,
    stopped_at: Instant,
    facts: &BTreeMap<Pid, ThreadFacts>,
) -> BTreeMap<Pid, Slept> {
    let mut by_processor: BTreeMap<i32, Vec<(Pid, Sleeper)>> = BTreeMap::new();
    let still = sleepers.iter().filter(|(tid, sleeper)| sleeper.still_slept(**tid, facts));
    for (tid, sleeper) in still {
        by_processor.entry(sleeper.processor).or_default().push((*tid, *sleeper));
    }
    let mut elapsed = BTreeMap::new();
    for (processor, members) in by_processor {
        let now_ns = samara_kernel::sched::task_clock_on(processor);
        let since_stop = u64::try_from(stopped_at.elapsed().as_nanos()).unwrap_or(u64::MAX);
        for (tid, sleeper) in members {
            let asleep = now_ns.map_or(0, |now_ns| now_ns.saturating_sub(sleeper.since_ns));
            let elapsed_ns = asleep.saturating_sub(since_stop);
            let since = stopped_at.checked_sub(Duration::from_nanos(elapsed_ns));
            elapsed.insert(tid, Slept { since, elapsed_ns, remainder: sleeper.remainder });
        }
    }
    elapsed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interrupted(number: i64, code: i64) -> Registers {
        Registers {
            orig_rax: number.cast_unsigned(),
            rax: (-code).cast_unsigned(),
            rip: 0x1002,
            ..Registers::default()
        }
    }

    /// A re-issued wait that started anew at each capture would never time out under frequent captures.
    #[test]
    fn millisecond_timeouts_shrink_and_never_turn_infinite() {
        for (whole, elapsed_ms, rest) in
            [(1000u64, 400u64, 600u64), (1000, 5000, 0), (0, 10, 0), (0xffff_ffff, 10, 0xffff_ffff)]
        {
            let mut registers = interrupted(libc::SYS_epoll_wait, i64::from(libc::EINTR));
            mend_interrupted(&mut registers);
            registers.r10 = whole;
            let restart =
                shorten(&mut registers, Goal::Thaw, elapsed_ms * 1_000_000, &|_| None, &|_| false);
            assert_eq!((registers.r10, restart), (rest, Restart::AsIs));
            assert_eq!(explicit(&registers).rax, libc::SYS_epoll_wait.unsigned_abs());
            assert_eq!(explicit(&registers).rip, 0x1000);
        }
    }

    /// The time that a restore takes counts, or every move would make the waits of a program longer.
    #[test]
    fn a_restore_takes_time() {
        let mut poll = interrupted(libc::SYS_poll, ERESTARTNOHAND);
        poll.rdx = 1000;
        let (after, _) = later(poll, Restart::AsIs, 400_000_000);
        assert_eq!((after.rdx, later(after, Restart::AsIs, u64::MAX).0.rdx), (600, 0));
        let timespec = Restart::Timespec { argument: 3, rest_ns: 7 };
        let shorter = Restart::Timespec { argument: 3, rest_ns: 2 };
        assert_eq!(later(poll, timespec, 5).1, shorter);

        let mut select = interrupted(libc::SYS_select, ERESTARTNOHAND);
        assert_eq!(rest_in_memory(&select), None);
        select.r8 = 0x7000;
        assert_eq!(rest_in_memory(&select), Some((0x7000, 1000)));
        assert_eq!(rest_in_memory(&Registers { rax: 1, ..select }), None);
        let timeval = |seconds: u64, us: u64| {
            let mut bytes = [0; 16];
            bytes[..8].copy_from_slice(&seconds.to_le_bytes());
            bytes[8..].copy_from_slice(&us.to_le_bytes());
            bytes
        };
        let shorter = |passed_ns| shorten_in_memory(timeval(2, 500_000), 1000, passed_ns);
        assert_eq!(shorter(600_000_000), Some(timeval(1, 900_000)));
        assert_eq!(shorter(9_000_000_000), Some(timeval(0, 0)));
        assert_eq!(shorten_in_memory(timeval(u64::MAX, 0), 1, 5), None);
    }

    /// A sleep that is thawed goes on with what the kernel remembers; one that is restored, with what we know.
    #[test]
    fn sleeps_keep_their_end() {
        let read = |address| {
            (address == 0x5000).then(|| {
                let mut timespec = [0; 16];
                timespec[0] = 10;
                timespec
            })
        };
        let mut registers = interrupted(libc::SYS_nanosleep, ERESTART_RESTARTBLOCK);
        registers.rdi = 0x5000;
        let stop = registers;
        shorten(&mut registers, Goal::Thaw, 4_000_000_000, &read, &|_| false);
        assert_eq!(registers, stop);
        shorten(&mut registers, Goal::Restore, 4_000_000_000, &read, &|_| false);
        assert_eq!(registers.orig_rax, libc::SYS_poll.unsigned_abs());
        assert_eq!((registers.rdi, registers.rsi, registers.rdx), (0, 0, 6000));

        // With a place for the rest, the kernel has written it there.
        let mut registers = Registers { rsi: 0x5000, rdi: 0x7000, ..stop };
        let restart = shorten(&mut registers, Goal::Restore, 0, &read, &|_| false);
        assert_eq!(registers.orig_rax, libc::SYS_nanosleep.unsigned_abs());
        assert_eq!(restart, Restart::Timespec { argument: 0, rest_ns: 10_000_000_000 });
    }

    /// A sleep of processor time that became one of real time would end before its time has been worked.
    #[test]
    fn sleeps_of_processor_time_begin_anew() {
        let mut registers = interrupted(libc::SYS_clock_nanosleep, ERESTART_RESTARTBLOCK);
        registers.rdi = libc::CLOCK_PROCESS_CPUTIME_ID as u64;
        registers.rdx = 0x5000;
        let before = registers;
        let restart =
            shorten(&mut registers, Goal::Restore, 4_000_000_000, &|_| Some([1; 16]), &|_| false);
        assert_eq!(restart, Restart::AsIs);
        assert_eq!((registers.orig_rax, registers.rdx), (before.orig_rax, before.rdx));
    }

    /// A call that really returned EINTR because of a handler must not be issued again.
    #[test]
    fn a_delivered_interruption_stays() {
        let mut registers = interrupted(-1, i64::from(libc::EINTR));
        let before = registers;
        mend_interrupted(&mut registers);
        assert_eq!(registers, before);
        assert_eq!(explicit(&registers), before);
    }
}
