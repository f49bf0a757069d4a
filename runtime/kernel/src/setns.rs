//! `setns(2)`: acting in another process's namespace.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use crate::{Pid, check, proc};

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

impl Namespace {
    /// Its name in `/proc/PID/ns`, and what `setns` calls it.
    fn names(self) -> (&'static str, libc::c_int) {
        match self {
            Namespace::Network => ("net", libc::CLONE_NEWNET),
            Namespace::Ipc => ("ipc", libc::CLONE_NEWIPC),
            Namespace::Uts => ("uts", libc::CLONE_NEWUTS),
        }
    }
}

/// A thread that stands in a namespace and waits for when to look around there: to make and to place one takes longer than many a
/// look.
#[derive(Debug)]
pub struct Visitor<T> {
    namespace: Namespace,
    identity: (u64, u64),
    go: SyncSender<()>,
    found: Receiver<io::Result<T>>,
}

impl<T: Send + 'static> Visitor<T> {
    /// Enters a namespace of process `pid`, and does there what can be done before: `look` gets what `prepare` has returned. A
    /// visitor that is dropped goes home.
    ///
    /// # Errors
    /// Of entering the namespace, and of `prepare`.
    pub fn send<P>(
        pid: Pid,
        namespace: Namespace,
        prepare: impl FnOnce() -> io::Result<P> + Send + 'static,
        look: impl FnOnce(P) -> io::Result<T> + Send + 'static,
    ) -> io::Result<Visitor<T>> {
        let (name, kind) = namespace.names();
        let place = File::open(format!("/proc/{pid}/ns/{name}"))?;
        let metadata = place.metadata()?;
        let identity = (metadata.dev(), metadata.ino());
        let (go, wait) = sync_channel(1);
        let (tell, found) = sync_channel(1);
        let (arrived, arrival) = sync_channel(1);
        std::thread::Builder::new().spawn(move || {
            // SAFETY: the call takes a descriptor that lives, and changes this thread only.
            let entered = check(unsafe { libc::setns(place.as_raw_fd(), kind) }.into());
            match entered.and_then(|_| prepare()) {
                Err(error) => drop(arrived.send(Err(error))),
                Ok(prepared) => {
                    let _ = arrived.send(Ok(()));
                    if wait.recv().is_ok() {
                        let _ = tell.send(look(prepared));
                    }
                }
            }
        })?;
        arrival.recv().unwrap_or_else(|_| Err(lost()))?;
        Ok(Visitor { namespace, identity, go, found })
    }

    /// Whether process `pid` is still in the namespace.
    #[must_use]
    pub fn is_with(&self, pid: Pid) -> bool {
        let (name, _) = self.namespace.names();
        proc::namespace(pid, name).is_ok_and(|identity| identity == self.identity)
    }

    /// Lets it look, and does not wait for it.
    pub fn go(&self) {
        // A visitor that is not there any more is told of when its answer is asked for.
        let _ = self.go.try_send(());
    }

    /// What it has found.
    ///
    /// # Errors
    /// Of the look.
    pub fn found(self) -> io::Result<T> {
        self.found.recv().unwrap_or_else(|_| Err(lost()))
    }
}

fn lost() -> io::Error {
    io::Error::other("the thread in another namespace panicked")
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
    let (name, kind) = namespace.names();
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
