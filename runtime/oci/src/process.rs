//! A process by pid and start time, so that a reused pid is never taken for it.

use std::io;

use procfs::process::Stat;
use samara_kernel::pidfd::PidFd;
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
        Some(Self { pid, start_ticks: stat(pid)?.starttime })
    }

    /// Whether the process still runs: a zombie does not.
    pub fn is_alive(&self) -> bool {
        self.stat().is_some_and(|stat| !has_ended(&stat))
    }

    /// A handle on the process; none if it has ended.
    pub fn pidfd(&self) -> Option<PidFd> {
        self.handle().filter(|_| self.is_alive())
    }

    /// A handle on the process, which may have ended; none if its parent has waited for it already.
    pub fn handle(&self) -> Option<PidFd> {
        let handle = PidFd::open(self.pid).ok()?;
        // Looked at with the handle there: now the pid cannot be reused unseen.
        self.stat().map(|_| handle)
    }

    /// How the process that `handle` is of has ended, as `wait` encodes it. Before Linux 6.15 that is lost when its parent has
    /// waited for it.
    pub fn end_status(&self, handle: &PidFd) -> Option<i32> {
        let zombie = self.stat().filter(has_ended).and_then(|stat| stat.exit_code);
        zombie.or_else(|| handle.exit_status())
    }

    fn stat(&self) -> Option<Stat> {
        stat(self.pid).filter(|stat| stat.starttime == self.start_ticks)
    }

    /// Sends `signal`. False if the process is gone.
    pub fn signal(&self, signal: SignalNumber) -> io::Result<bool> {
        let Some(fd) = self.pidfd() else { return Ok(false) };
        match fd.send_signal(signal.get()) {
            Ok(()) => Ok(true),
            Err(e) if e.raw_os_error() == Some(rustix::io::Errno::SRCH.raw_os_error()) => Ok(false),
            Err(e) => Err(e),
        }
    }
}

fn stat(pid: i32) -> Option<Stat> {
    procfs::process::Process::new(pid).and_then(|process| process.stat()).ok()
}

fn has_ended(stat: &Stat) -> bool {
    matches!(stat.state, 'Z' | 'X')
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The monitor may come before or after whoever waits for the container's init.
    #[test]
    fn a_status_is_known_whether_it_was_fetched_or_not() {
        let mut child = std::process::Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
        let identity = ProcessIdentity::of(i32::try_from(child.id()).unwrap()).unwrap();
        let handle = identity.handle().unwrap();
        rustix::event::poll(
            &mut [rustix::event::PollFd::new(&handle, rustix::event::PollFlags::IN)],
            None,
        )
        .unwrap();
        assert!(identity.pidfd().is_none() && identity.handle().is_some());
        assert_eq!(identity.end_status(&handle), Some(7 << 8));
        child.wait().unwrap();
        assert_eq!(identity.end_status(&handle), Some(7 << 8));
        assert!(identity.handle().is_none());
    }

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
