//! `pidfd_send_signal(2)`, for real-time signals too.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Sends signal `number` to the process of `pidfd`.
///
/// # Errors
/// ESRCH when the process has ended, EINVAL for a number that is no signal.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    // SAFETY: a null siginfo is allowed and makes the kernel fill its own.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_raw_fd(),
            number,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
