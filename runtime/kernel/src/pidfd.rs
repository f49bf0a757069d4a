//! `pidfd_open(2)`, `pidfd_getfd(2)`, `pidfd_send_signal(2)`: processes by handle instead of by number.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::{Pid, check};

/// A handle on a process: stays with that process when its number is given to another.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    /// # Errors
    /// ESRCH: no such process, or a thread that leads no process.
    pub fn open(pid: Pid) -> io::Result<PidFd> {
        // SAFETY: the call takes numbers only.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        Ok(PidFd(own(result)?))
    }

    /// A duplicate, in this process, of the descriptor that `fd` is in the other one: the same open file description.
    pub fn get_fd(&self, fd: RawFd) -> io::Result<OwnedFd> {
        // SAFETY: the call takes numbers only.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_getfd, self.0.as_raw_fd(), fd, 0) };
        own(result)
    }

    /// Sends `signal` to the process.
    pub fn send_signal(&self, signal: i32) -> io::Result<()> {
        // SAFETY: a null siginfo is allowed and means that of `kill`.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.0.as_raw_fd(),
                signal,
                std::ptr::null::<u8>(),
                0,
            )
        };
        check(result).map(drop)
    }

    /// The descriptor itself: readable once the process has ended.
    #[must_use]
    pub fn as_fd(&self) -> &OwnedFd {
        &self.0
    }
}

fn own(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(check(result)?).expect("descriptors are ints");
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
