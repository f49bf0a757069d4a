//! `close_range(2)`: descriptors closed or marked by number.

use std::io;

/// Closes every descriptor of this process from `first` upwards.
///
/// Only for a process that owns none of them any more: a value that still holds one of these
/// descriptors would later close whatever has taken its number.
pub fn close_from(first: u32) -> io::Result<()> {
    close_range(first, 0)
}

/// Marks every descriptor of this process from `first` upwards to be closed by `execve(2)`.
pub fn close_on_exec_from(first: u32) -> io::Result<()> {
    close_range(first, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: u32, flags: u32) -> io::Result<()> {
    // SAFETY: the call takes three integers and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, u32::MAX, flags) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
