//! `timerfd_create(2)`: the one operation that libraries lack.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::check;

/// Sets how many expirations the next read returns (`TFD_IOC_SET_TICKS`).
///
/// # Errors
/// EINVAL: none. ENOTTY: the kernel was built without `CONFIG_CHECKPOINT_RESTORE`.
pub fn set_ticks(timer: BorrowedFd<'_>, ticks: u64) -> io::Result<()> {
    const TFD_IOC_SET_TICKS: libc::Ioctl = 0x4008_5400;
    // SAFETY: the kernel reads eight bytes of `ticks`.
    let result = unsafe { libc::ioctl(timer.as_raw_fd(), TFD_IOC_SET_TICKS, &raw const ticks) };
    check(result.into()).map(drop)
}
