//! `pidfd_open(2)`, `pidfd_getfd(2)`, `pidfd_send_signal(2)`, `ioctl_pidfd(2)`: processes by handle instead of by number.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::{Pid, check};

/// A handle on a process: stays with that process when its number is given to another.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl From<PidFd> for OwnedFd {
    fn from(process: PidFd) -> OwnedFd {
        process.0
    }
}

impl From<OwnedFd> for PidFd {
    fn from(process: OwnedFd) -> PidFd {
        PidFd(process)
    }
}

impl PidFd {
    /// A handle on one thread (`PIDFD_THREAD`, since Linux 6.9).
    ///
    /// # Errors
    /// ESRCH: no such thread. EINVAL: the kernel has no such handles.
    pub fn open_thread(tid: Pid) -> io::Result<PidFd> {
        // SAFETY: the call takes numbers only.
        let result = unsafe { libc::syscall(libc::SYS_pidfd_open, tid, libc::O_EXCL) };
        Ok(PidFd(own(result)?))
    }

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

    /// Sends `signal`, which may be a real-time one, to the process.
    ///
    /// # Errors
    /// ESRCH when the process has ended, EINVAL for a number that is no signal.
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

    /// How the process ended, as `wait` encodes it, once its parent has waited for it.
    ///
    /// `None` before that, and always where the kernel does not keep it (before Linux 6.15).
    #[must_use]
    pub fn exit_status(&self) -> Option<i32> {
        let mut info = Info { mask: INFO_EXIT, ..Info::default() };
        // SAFETY: the kernel writes at most the bytes that the number of the request tells, which are those of `info`.
        let result = unsafe { libc::ioctl(self.0.as_raw_fd(), GET_INFO, &raw mut info) };
        (result == 0 && info.mask & INFO_EXIT != 0).then_some(info.exit_code)
    }
}

/// The descriptor itself: readable once the process has ended, hung up once its parent has waited for it.
impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// `struct pidfd_info` of linux/pidfd.h in its first version.
#[repr(C)]
#[derive(Debug, Default)]
struct Info {
    mask: u64,
    cgroup: u64,
    ids: [u32; 11],
    exit_code: i32,
}

const _: () = assert!(size_of::<Info>() == 64);

/// `PIDFD_GET_INFO`: `_IOWR(0xFF, 11, struct pidfd_info)`.
const GET_INFO: libc::Ioctl = 0xC040_FF0B;
/// `PIDFD_INFO_EXIT`.
const INFO_EXIT: u64 = 1 << 3;

fn own(result: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(check(result)?).expect("descriptors are ints");
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a monitor tells an address about a container's end rests on this, and the container's parent is another process.
    #[test]
    fn the_status_is_known_after_the_parent_has_waited() {
        let mut child = std::process::Command::new("sh").args(["-c", "exit 7"]).spawn().unwrap();
        let handle = PidFd::open(Pid::try_from(child.id()).unwrap()).unwrap();
        assert_eq!(handle.exit_status(), None);
        child.wait().unwrap();
        assert_eq!(handle.exit_status(), Some(7 << 8));
    }
}
