//! `setns(2)`: acting in another process's namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use crate::{Pid, check};

/// A kind of namespace that a single thread can enter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Namespace {
    /// Sockets belong to the one that they are made in.
    Network,
    /// System V objects are listed for the one that asks.
    Ipc,
    /// Host name and domain name.
    Uts,
}

/// Runs `act` in a namespace of process `pid`.
///
/// # Errors
/// Of entering the namespace, and of `act`.
pub fn inside<T: Send>(
    pid: Pid,
    namespace: Namespace,
    act: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    let (name, kind) = match namespace {
        Namespace::Network => ("net", libc::CLONE_NEWNET),
        Namespace::Ipc => ("ipc", libc::CLONE_NEWIPC),
        Namespace::Uts => ("uts", libc::CLONE_NEWUTS),
    };
    enter(&File::open(format!("/proc/{pid}/ns/{name}"))?, kind, act)
}

/// Runs `act` in the network namespace of a socket.
///
/// # Errors
/// As [`inside`]; EPERM without CAP_NET_ADMIN there.
pub fn beside<T: Send>(
    socket: BorrowedFd<'_>,
    act: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    /// Of linux/sockios.h.
    const SIOCGSKNS: libc::Ioctl = 0x894c;
    // SAFETY: the request takes no argument.
    let fd = check(unsafe { libc::ioctl(socket.as_raw_fd(), SIOCGSKNS) }.into())?;
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel just made this descriptor for us, and nobody else knows it.
    let namespace = unsafe { OwnedFd::from_raw_fd(fd) };
    enter(&File::from(namespace), libc::CLONE_NEWNET, act)
}

fn enter<T: Send>(
    namespace: &File,
    kind: libc::c_int,
    act: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    in_thread(|| {
        // SAFETY: the call takes a descriptor that lives, and changes this thread only.
        check(unsafe { libc::setns(namespace.as_raw_fd(), kind) }.into())?;
        act()
    })
}

/// Runs `act` in a thread that ends with it: whoever enters a namespace stays there.
pub(crate) fn in_thread<T: Send>(act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(act)
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in another namespace panicked")))
    })
}
