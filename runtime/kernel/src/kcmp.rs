//! `kcmp(2)`: do two processes share a kernel object?

use std::cmp::Ordering;
use std::io;
use std::os::fd::RawFd;

use crate::{Pid, check};

/// A resource that two tasks may share, as `<linux/kcmp.h>` numbers them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resource {
    /// The address space.
    Vm = 1,
    /// The table of descriptors.
    Files = 2,
    /// Working directory, root and umask.
    Fs = 3,
    /// The table of signal handlers.
    Sighand = 4,
    /// The adjustments that `SEM_UNDO` owes. A task that never used it has none, which counts as one and the same.
    SemaphoreUndo = 6,
}

/// Orders the resource of two tasks; `Equal` means that they share it. The order is stable while both live.
pub fn resource(left: Pid, right: Pid, resource: Resource) -> io::Result<Ordering> {
    compare(left, right, resource as i32, 0, 0)
}

/// Orders two open file descriptions; `Equal` means that they are one.
pub fn file(left: (Pid, RawFd), right: (Pid, RawFd)) -> io::Result<Ordering> {
    const KCMP_FILE: i32 = 0;
    compare(left.0, right.0, KCMP_FILE, left.1, right.1)
}

/// Whether a descriptor of one task is what an epoll instance of another watches: the `nth` of those that it watches under the
/// number `watched`, from 0, in the order of `/proc/PID/fdinfo`.
pub fn is_watched(
    file: (Pid, RawFd),
    epoll: (Pid, RawFd),
    watched: RawFd,
    nth: u32,
) -> io::Result<bool> {
    const KCMP_EPOLL_TFD: i32 = 7;
    // struct kcmp_epoll_slot: efd, tfd, toff
    let slot = [epoll.1.cast_unsigned(), watched.cast_unsigned(), nth];
    // SAFETY: the kernel reads the three words of `slot`.
    let result = unsafe {
        libc::syscall(
            libc::SYS_kcmp,
            file.0,
            epoll.0,
            KCMP_EPOLL_TFD,
            libc::c_ulong::from(file.1.unsigned_abs()),
            slot.as_ptr(),
        )
    };
    Ok(check(result)? == 0)
}

fn compare(left: Pid, right: Pid, kind: i32, first: RawFd, second: RawFd) -> io::Result<Ordering> {
    let (first, second) =
        (libc::c_ulong::from(first.unsigned_abs()), libc::c_ulong::from(second.unsigned_abs()));
    // SAFETY: for these kinds the call takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_kcmp, left, right, kind, first, second) };
    match check(result)? {
        0 => Ok(Ordering::Equal),
        1 => Ok(Ordering::Less),
        2 => Ok(Ordering::Greater),
        // 3: different, but the kernel won't say how (kcmp(2)); any stable answer keeps callers correct.
        _ => Ok(left.cmp(&right).then(first.cmp(&second)).then(Ordering::Less)),
    }
}
