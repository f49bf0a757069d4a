//! `signalfd(2)`.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use crate::check;

/// A descriptor from which whoever reads takes signals of its own that are in `mask` (bit 0 is signal 1).
pub fn create(mask: u64) -> io::Result<OwnedFd> {
    const MASK_BYTES: usize = 8;
    // SAFETY: the kernel reads the mask, whose size is passed along.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, MASK_BYTES, libc::SFD_CLOEXEC)
    })?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).expect("descriptors are ints")) })
}
