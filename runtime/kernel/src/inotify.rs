//! `inotify(7)`: the one operation that libraries lack.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::check;

/// Sets the number that the next watch gets (`INOTIFY_IOC_SETNEXTWD`, since Linux 4.18).
///
/// # Errors
/// EINVAL: the number is negative. ENOTTY: the kernel was built without `CONFIG_CHECKPOINT_RESTORE`.
pub fn set_next_watch(instance: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    const INOTIFY_IOC_SETNEXTWD: libc::Ioctl = 0x4004_4900;
    // SAFETY: the argument is a number.
    let result = unsafe { libc::ioctl(instance.as_raw_fd(), INOTIFY_IOC_SETNEXTWD, number) };
    check(result.into()).map(drop)
}
