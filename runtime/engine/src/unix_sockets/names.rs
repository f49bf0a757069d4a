//! Names of unix sockets, and the nodes that paths lead to.
//!
//! The kernel keeps two things of a socket that was bound to a path: the text as it was given, which may be relative to a
//! directory of then, and the node, which may have been renamed or unlinked since. Whoever connects finds the socket by the
//! node. So a restored socket is bound to the same text below a directory made for that, as its root, and the new node is
//! then moved to where the old one was.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::UnixAddr;
use rustix::fs::{AtFlags, Timespec, Timestamps, utimensat};
use samara_capsule::record::{Bytes, SocketNode};
use samara_kernel::unix;

use crate::root::Root;

/// A node, and its device and inode.
pub(crate) type Node = (SocketNode, (u64, u64));

/// The node of a socket. `None`: it was not bound to a path.
pub(crate) fn node(
    socket: BorrowedFd<'_>,
    root: &Root,
) -> io::Result<Result<Option<Node>, String>> {
    let Some(node) = unix::node(socket)? else { return Ok(Ok(None)) };
    let node = File::from(node);
    let metadata = node.metadata()?;
    let identity = (metadata.dev(), metadata.ino());
    let link = fs::read_link(format!("/proc/self/fd/{}", node.as_raw_fd()))?;
    let link = link.as_os_str().as_bytes();
    let path = if root.identity(link).ok() == Some(identity) {
        Some(Bytes::from(link.to_vec()))
    } else if link.ends_with(b" (deleted)") {
        None
    } else {
        let link = String::from_utf8_lossy(link);
        return Ok(Err(format!(
            "a unix socket whose node {link} lies outside the container is not supported"
        )));
    };
    if metadata.nlink() > 1 {
        return Ok(Err("a unix socket with several names is not supported".to_owned()));
    }
    let modified_ns = metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec();
    let owner = (metadata.uid(), metadata.gid());
    let mode = metadata.mode() & 0o7777;
    Ok(Ok(Some((SocketNode { path, mode, owner, modified_ns }, identity))))
}

/// How a restored socket is found.
#[derive(Debug)]
pub(crate) enum Address {
    Abstract(Vec<u8>),
    /// A node by its directory and its name there.
    Node(OwnedFd, Vec<u8>),
}

impl Address {
    /// What `connect` takes, once the caller is in [`Address::directory`].
    pub(crate) fn name(&self) -> &[u8] {
        match self {
            Address::Abstract(name) | Address::Node(_, name) => name,
        }
    }

    pub(crate) fn directory(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Address::Abstract(_) => None,
            Address::Node(directory, _) => Some(directory.as_fd()),
        }
    }

    pub(crate) fn socket_address(&self) -> io::Result<UnixAddr> {
        Ok(match self {
            Address::Abstract(name) => UnixAddr::new_abstract(name.get(1..).unwrap_or_default())?,
            Address::Node(_, name) => UnixAddr::new(name.as_slice())?,
        })
    }

    /// Acts where the address means the socket.
    pub(crate) fn reach<T: Send>(
        &self,
        act: impl FnOnce() -> io::Result<T> + Send,
    ) -> io::Result<T> {
        let Some(directory) = self.directory() else { return act() };
        apart(|| {
            nix::unistd::fchdir(directory)?;
            act()
        })
    }
}

/// Acts in a thread with a root and working directory of its own.
fn apart<T: Send>(act: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        scope
            .spawn(|| {
                unshare(CloneFlags::CLONE_FS)?;
                act()
            })
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the thread in another directory panicked")))
    })
}

/// A directory for a moment, with all that is in it.
#[derive(Debug)]
struct Scratch {
    parent: OwnedFd,
    path: PathBuf,
    /// Of the parent, before.
    times: Timestamps,
}

impl Scratch {
    fn in_directory(parent: OwnedFd) -> io::Result<Scratch> {
        /// As many as could be left behind by engines that died.
        const ATTEMPTS: u32 = 1000;
        let within = link(parent.as_fd());
        let metadata = fs::metadata(&within)?;
        let time = |seconds, ns| Timespec { tv_sec: seconds, tv_nsec: ns };
        let times = Timestamps {
            last_access: time(metadata.atime(), metadata.atime_nsec()),
            last_modification: time(metadata.mtime(), metadata.mtime_nsec()),
        };
        let mut number = 0;
        loop {
            let path = within.join(format!(".samara-{}-{number}", std::process::id()));
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Scratch { parent, path, times }),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && number < ATTEMPTS => {
                    number += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Where nothing stays: of these, every container has one that can be written to.
    fn anywhere(root: &Root) -> io::Result<Scratch> {
        let mut last = io::Error::from(io::ErrorKind::NotFound);
        for path in [&b"/dev/shm"[..], b"/dev", b"/tmp", b"/"] {
            let made =
                root.open(path, libc::O_PATH | libc::O_DIRECTORY).and_then(Scratch::in_directory);
            match made {
                Ok(scratch) => return Ok(scratch),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    /// Binds a socket to a path with this directory as its root, and returns where the node is.
    fn bind(&self, socket: BorrowedFd<'_>, name: &[u8]) -> io::Result<(OwnedFd, Vec<u8>)> {
        apart(|| {
            let scratch = File::open(&self.path)?;
            nix::unistd::fchdir(&scratch)?;
            nix::unistd::chroot(".")?;
            let path = Path::new("/").join(Path::new(std::ffi::OsStr::from_bytes(name)));
            let last = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
            let directory = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
            fs::create_dir_all(directory)?;
            unix::bind(socket, name)?;
            Ok((File::open(directory)?.into(), last.as_bytes().to_vec()))
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.path) {
            tracing::warn!(%error, "a directory that was made for a moment stays");
        }
        let parent = link(self.parent.as_fd());
        let _ = utimensat(rustix::fs::CWD, &parent, &self.times, AtFlags::empty());
    }
}

/// A directory of the container. Below `/dev`, which is not saved, it may have to be made.
fn directory(root: &Root, path: &Path) -> io::Result<OwnedFd> {
    let open =
        |path: &Path| root.open(path.as_os_str().as_bytes(), libc::O_PATH | libc::O_DIRECTORY);
    let missing: Vec<&Path> = path.ancestors().take_while(|path| open(path).is_err()).collect();
    for path in missing.into_iter().rev() {
        let (Some(parent), Some(last)) = (path.parent(), path.file_name()) else { break };
        fs::create_dir(link(open(parent)?.as_fd()).join(last))?;
    }
    open(path)
}

/// A path that leads through a descriptor.
fn link(fd: BorrowedFd<'_>) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

/// Gives sockets their names. Nodes that have no name any more lose it when this is dropped.
#[derive(Debug, Default)]
pub(crate) struct Names {
    unlinked: Vec<Scratch>,
}

impl Names {
    /// Binds a socket as it was bound. `node`: what its path is now; `None` for an abstract name.
    pub(crate) fn bind(
        &mut self,
        socket: BorrowedFd<'_>,
        name: &[u8],
        node: Option<&SocketNode>,
        root: &Root,
    ) -> io::Result<Address> {
        if name.first() == Some(&0) {
            unix::bind(socket, name)?;
            return Ok(Address::Abstract(name.to_vec()));
        }
        let Some((node, place)) = node.and_then(|node| Some((node, node.path.as_ref()?))) else {
            let scratch = Scratch::anywhere(root)?;
            let (directory, last) = scratch.bind(socket, name)?;
            self.unlinked.push(scratch);
            return Ok(Address::Node(directory, last));
        };
        let place = Path::new(std::ffi::OsStr::from_bytes(place));
        let (Some(parent), Some(last)) = (place.parent(), place.file_name()) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let parent = directory(root, parent)?;
        let target = link(parent.as_fd()).join(last);
        if fs::symlink_metadata(&target).is_ok_and(|found| !found.file_type().is_socket()) {
            return Err(io::Error::other("its path leads to another kind of file here"));
        }
        let scratch = Scratch::in_directory(parent.try_clone()?)?;
        let (directory, made) = scratch.bind(socket, name)?;
        let made = link(directory.as_fd()).join(std::ffi::OsStr::from_bytes(&made));
        let (uid, gid) = node.owner;
        std::os::unix::fs::lchown(&made, Some(uid), Some(gid))?;
        fs::set_permissions(&made, Permissions::from_mode(node.mode & 0o7777))?;
        let modified = Timespec {
            tv_sec: node.modified_ns.div_euclid(1_000_000_000),
            tv_nsec: node.modified_ns.rem_euclid(1_000_000_000),
        };
        let times = Timestamps { last_access: modified, last_modification: modified };
        utimensat(rustix::fs::CWD, &made, &times, AtFlags::SYMLINK_NOFOLLOW)?;
        fs::rename(&made, &target)?;
        Ok(Address::Node(parent, last.as_bytes().to_vec()))
    }
}
