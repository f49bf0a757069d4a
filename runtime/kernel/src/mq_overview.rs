//! `mq_overview(7)`: POSIX message queues, by descriptors of them.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::check;

/// What a queue takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    pub messages: i64,
    pub message_bytes: i64,
}

/// `struct mq_attr`: flags, maxmsg, msgsize, curmsgs, reserved.
type Attributes = [i64; 8];

/// Makes a queue in the IPC namespace of the calling thread. `name` has no slash.
///
/// # Errors
/// EEXIST: there is one of this name.
pub fn create(name: &[u8], mode: u32, limits: Limits) -> io::Result<OwnedFd> {
    let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    let attributes: Attributes = [0, limits.messages, limits.message_bytes, 0, 0, 0, 0, 0];
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_EXCL | libc::O_CLOEXEC | libc::O_NONBLOCK;
    // SAFETY: name and attributes outlive the call, which reads them.
    let fd = check(unsafe {
        libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, mode, attributes.as_ptr())
    })?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).expect("descriptors are ints")) })
}

/// Opens a queue of the IPC namespace of the calling thread. `flags` are the access mode and `O_NONBLOCK`.
///
/// # Errors
/// ENOENT: there is none of this name.
pub fn open(name: &[u8], flags: i32) -> io::Result<OwnedFd> {
    let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    // Closed by `exec` it is anyway; asked for, that would stay among the flags of the description.
    // SAFETY: the name outlives the call.
    let fd = check(unsafe { libc::syscall(libc::SYS_mq_open, name.as_ptr(), flags, 0, 0) })?;
    // SAFETY: the kernel has just made it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(RawFd::try_from(fd).expect("descriptors are ints")) })
}

/// Takes the name of a queue away, in the IPC namespace of the calling thread.
pub fn unlink(name: &[u8]) -> io::Result<()> {
    let name = CString::new(name).map_err(|_| io::ErrorKind::InvalidInput)?;
    // SAFETY: the name outlives the call.
    check(unsafe { libc::syscall(libc::SYS_mq_unlink, name.as_ptr()) }).map(drop)
}

pub fn limits(queue: impl AsFd) -> io::Result<Limits> {
    let mut attributes: Attributes = [0; 8];
    let fd = queue.as_fd().as_raw_fd();
    // SAFETY: the kernel writes one structure, for which there is room.
    check(unsafe {
        libc::syscall(libc::SYS_mq_getsetattr, fd, std::ptr::null::<i64>(), attributes.as_mut_ptr())
    })?;
    let [_, messages, message_bytes, ..] = attributes;
    Ok(Limits { messages, message_bytes })
}

/// Takes the oldest message of the highest priority, through a descriptor that does not wait; `None` from an empty queue.
/// `bytes_max` is the queue's own limit.
pub fn receive(queue: impl AsFd, bytes_max: usize) -> io::Result<Option<(u32, Vec<u8>)>> {
    let mut content = vec![0u8; bytes_max];
    let mut priority = 0u32;
    let fd = queue.as_fd().as_raw_fd();
    // SAFETY: the buffer has room for `bytes_max` bytes, and the priority outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mq_timedreceive,
            fd,
            content.as_mut_ptr(),
            content.len(),
            &raw mut priority,
            std::ptr::null::<libc::timespec>(),
        )
    };
    match check(result) {
        Ok(count) => {
            content.truncate(usize::try_from(count).expect("-1 is the only negative result"));
            Ok(Some((priority, content)))
        }
        Err(error) if error.raw_os_error() == Some(libc::EAGAIN) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Appends a message, through a descriptor that does not wait.
pub fn send(queue: impl AsFd, priority: u32, content: &[u8]) -> io::Result<()> {
    let fd = queue.as_fd().as_raw_fd();
    // SAFETY: the kernel reads the content, whose length is passed along.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mq_timedsend,
            fd,
            content.as_ptr(),
            content.len(),
            priority,
            std::ptr::null::<libc::timespec>(),
        )
    };
    check(result).map(drop)
}
