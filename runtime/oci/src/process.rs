//! A process by pid and start time, so that a reused pid is never taken for it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags, pidfd_open};
use samara_kernel::pidfd_send_signal::pidfd_send_signal;
use serde::{Deserialize, Serialize};

use crate::signal_name::SignalNumber;

/// A process, now or in the past, as this pid namespace numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessIdentity {
    pub pid: i32,
    /// Clock ticks after boot (field 22 of proc_pid_stat(5)).
    pub start_ticks: u64,
}

impl ProcessIdentity {
    /// The process that has `pid` now; none if there is none.
    pub fn of(pid: i32) -> Option<Self> {
        let stat = procfs::process::Process::new(pid).and_then(|p| p.stat()).ok()?;
        Some(Self { pid, start_ticks: stat.starttime })
    }

    /// Whether the process still runs: a zombie does not.
    pub fn is_alive(&self) -> bool {
        procfs::process::Process::new(self.pid).and_then(|process| process.stat()).is_ok_and(
            |stat| stat.starttime == self.start_ticks && !matches!(stat.state, 'Z' | 'X'),
        )
    }

    /// A descriptor of the process, which never comes to mean another; none if it is gone.
    pub fn pidfd(&self) -> Option<OwnedFd> {
        let fd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        // Looked at again with the descriptor in hand: now the pid cannot be reused unseen.
        self.is_alive().then_some(fd)
    }

    /// Sends `signal`. False if the process is gone.
    pub fn signal(&self, signal: SignalNumber) -> io::Result<bool> {
        let Some(fd) = self.pidfd() else { return Ok(false) };
        match pidfd_send_signal(fd.as_fd(), signal.get()) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_process_with_the_same_pid_is_not_it() {
        let me = i32::try_from(std::process::id()).unwrap();
        let identity = ProcessIdentity::of(me).unwrap();
        assert!(identity.is_alive());
        let earlier = ProcessIdentity { start_ticks: identity.start_ticks - 1, ..identity };
        assert!(!earlier.is_alive());
        assert!(!earlier.signal(SignalNumber::KILL).unwrap());
    }
}
