//! `process_vm_readv(2)` and `process_vm_writev(2)`: memory of another process.
//!
//! Both obey the protection of the mapping. For a mapping without access use `/proc/PID/mem`, which does not.

use std::io;

use crate::{Pid, check};

/// A range of another process's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    pub address: u64,
    pub bytes: usize,
}

/// Vectors per call that the kernel takes (`UIO_MAXIOV` of linux/uio.h).
pub const RANGES_MAX: usize = 1024;

/// Fills `buffer` with the content of `ranges`, one after another. Returns how many bytes were read: fewer than asked for
/// where a range could not be read.
///
/// # Errors
/// EFAULT: not even the first byte could be read. EINVAL: more than [`RANGES_MAX`] ranges.
pub fn read(pid: Pid, ranges: &[Range], buffer: &mut [u8]) -> io::Result<usize> {
    let remote = vectors(ranges);
    let local = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: the local vector covers `buffer`, which is ours to write; remote addresses are checked by the kernel against
    // the other address space.
    let result = unsafe {
        libc::process_vm_readv(
            pid,
            &raw const local,
            1,
            remote.as_ptr(),
            remote.len() as libc::c_ulong,
            0,
        )
    };
    Ok(usize::try_from(check(result as libc::c_long)?).expect("-1 is the only negative result"))
}

/// Writes `buffer` to `ranges`, one after another. Returns how many bytes were written.
///
/// # Errors
/// As [`read`].
pub fn write(pid: Pid, ranges: &[Range], buffer: &[u8]) -> io::Result<usize> {
    let remote = vectors(ranges);
    let local = libc::iovec { iov_base: buffer.as_ptr().cast_mut().cast(), iov_len: buffer.len() };
    // SAFETY: the kernel only reads the local vector; remote addresses are checked against the other address space.
    let result = unsafe {
        libc::process_vm_writev(
            pid,
            &raw const local,
            1,
            remote.as_ptr(),
            remote.len() as libc::c_ulong,
            0,
        )
    };
    Ok(usize::try_from(check(result as libc::c_long)?).expect("-1 is the only negative result"))
}

fn vectors(ranges: &[Range]) -> Vec<libc::iovec> {
    ranges
        .iter()
        .map(|range| libc::iovec {
            iov_base: std::ptr::without_provenance_mut(
                usize::try_from(range.address).expect("addresses are 64 bits wide here"),
            ),
            iov_len: range.bytes,
        })
        .collect()
}
