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
//! What is left is known where the call wrote it to memory, or from the time at which the scheduler put the thread to sleep.
//! A thread that woke in between without returning is taken to have begun then: timeouts may come late, never early.

use samara_kernel::ptrace::Registers;

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
