//! `waitpid(2)` with `__WALL`: how stops of tracees are learnt of.

use std::io;

use crate::{Pid, check};

/// What happened to a tracee.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It ended by itself, with this code.
    Exited(i32),
    /// This signal ended it.
    Killed(i32),
    /// Stopped before or after a system call (needs `Options::SYSGOOD`).
    SyscallStop,
    /// Stopped with a signal that has been taken from the queue: let it run with this signal, or the signal is lost.
    SignalStop(i32),
    /// Stopped by [`crate::ptrace::interrupt`], or as a new thread, or in a group stop by the given signal.
    EventStop(i32),
    /// Stopped by an event that was asked for in the options, such as `PTRACE_EVENT_EXEC`.
    Event(i32),
    /// Runs again after a stop.
    Continued,
}

/// `PTRACE_EVENT_EXEC` of `<linux/ptrace.h>`.
pub const EVENT_EXEC: i32 = libc::PTRACE_EVENT_EXEC;

/// Waits for one thread.
pub fn one(tid: Pid) -> io::Result<Status> {
    wait(tid, libc::__WALL).map(|found| found.expect("waitpid without WNOHANG returns a pid"))
}

/// As [`one`], but returns `None` where nothing has happened.
///
/// # Errors
/// ECHILD: it is neither a tracee nor a child.
pub fn poll_one(tid: Pid) -> io::Result<Option<Status>> {
    wait(tid, libc::__WALL | libc::WNOHANG)
}

fn wait(pid: Pid, flags: libc::c_int) -> io::Result<Option<Status>> {
    loop {
        let mut status = 0;
        // SAFETY: `status` outlives the call.
        let result = unsafe { libc::waitpid(pid, &raw mut status, flags) };
        match check(result.into()) {
            Ok(0) => return Ok(None),
            Ok(_) => return Ok(Some(decode(status))),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn decode(status: i32) -> Status {
    if libc::WIFEXITED(status) {
        return Status::Exited(libc::WEXITSTATUS(status));
    }
    if libc::WIFSIGNALED(status) {
        return Status::Killed(libc::WTERMSIG(status));
    }
    if libc::WIFCONTINUED(status) {
        return Status::Continued;
    }
    let signal = libc::WSTOPSIG(status);
    match status >> 16 {
        0 if signal == libc::SIGTRAP | 0x80 => Status::SyscallStop,
        0 => Status::SignalStop(signal),
        libc::PTRACE_EVENT_STOP => Status::EventStop(signal),
        event => Status::Event(event),
    }
}
