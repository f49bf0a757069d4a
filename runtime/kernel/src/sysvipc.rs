//! `sysvipc(7)`: System V semaphores and message queues of the calling thread's IPC namespace, looked at without a change.

use std::io;

use crate::{Pid, check};

/// linux/sem.h, linux/msg.h
const GETPID: libc::c_int = 11;
const GETALL: libc::c_int = 13;
const MSG_COPY: libc::c_int = 0o40000;

/// The values of a set of semaphores; `count` is how many it has, which never changes.
pub fn semaphore_values(id: i32, count: usize) -> io::Result<Vec<u16>> {
    let mut values = vec![0u16; count];
    // SAFETY: the kernel writes one value for each semaphore of the set, and the caller says how many those are.
    check(unsafe { libc::semctl(id, 0, GETALL, values.as_mut_ptr()) }.into())?;
    Ok(values)
}

/// The process that has changed a semaphore last; 0 for none, or one that this pid namespace does not show.
pub fn semaphore_pid(id: i32, number: i32) -> io::Result<Pid> {
    // SAFETY: the command takes numbers only.
    let pid = check(unsafe { libc::semctl(id, number, GETPID) }.into())?;
    Ok(Pid::try_from(pid).expect("pids are ints"))
}

/// How many bytes a message queue takes (`msg_qbytes`).
pub fn queue_bytes_max(id: i32) -> io::Result<u64> {
    // SAFETY: all zeros is a value of the structure.
    let mut status: libc::msqid_ds = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel fills in the structure that the command is for.
    check(unsafe { libc::msgctl(id, libc::IPC_STAT, &raw mut status) }.into())?;
    Ok(status.msg_qbytes)
}

/// A copy of a message by its position in the queue, with its type; `None` behind the last one.
///
/// # Errors
/// E2BIG: it is longer than `bytes_max`. ENOSYS: the kernel has no `CONFIG_CHECKPOINT_RESTORE`.
pub fn message(id: i32, position: usize, bytes_max: usize) -> io::Result<Option<(i64, Vec<u8>)>> {
    const TYPE_BYTES: usize = size_of::<libc::c_long>();
    let mut buffer = vec![0u8; TYPE_BYTES + bytes_max];
    let position = libc::c_long::try_from(position).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the buffer has room for the type and `bytes_max` bytes.
    let result = unsafe {
        libc::msgrcv(
            id,
            buffer.as_mut_ptr().cast(),
            bytes_max,
            position,
            MSG_COPY | libc::IPC_NOWAIT,
        )
    };
    let count = match check(result as libc::c_long) {
        Err(error) if error.raw_os_error() == Some(libc::ENOMSG) => return Ok(None),
        other => usize::try_from(other?).expect("-1 is the only negative result"),
    };
    buffer.truncate(TYPE_BYTES + count);
    let content = buffer.split_off(TYPE_BYTES);
    let kind = buffer.try_into().map_or(0, i64::from_ne_bytes);
    Ok(Some((kind, content)))
}
