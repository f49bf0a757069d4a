//! Files that have lost their names.
//!
//! The kernel shows the last name of such a file wherever it shows the file: in `/proc/PID/fd`, `maps`, `exe`. So it is made
//! at the path that it had, opened, and its name removed again. Where that name is taken by now, or its directory gone, it has
//! another one.
//!
//! What has content or a state of its own is elsewhere: regular files, directories, FIFOs that somebody reads or writes. Here are
//! *nodes*: links, and FIFOs, sockets and devices of which somebody has a handle, and devices that are open.
//!
//! Limits: a handle on the node of a socket or FIFO that is in use leads to whoever uses it; such nodes are refused. Of devices
//! there are those that have no state.

use std::collections::BTreeMap;
use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::{AtFlags, OFlag, openat};
use nix::sys::stat::{Mode, SFlag, futimens, makedev, mknodat};
use nix::unistd::{UnlinkatFlags, fchownat, symlinkat, unlinkat};
use rustix::fs::{Timespec, Timestamps};
use samara_capsule::record::{Bytes, Container, FileKind, NodeKind, OpenFile, UnlinkedNode};

use crate::capture::{CaptureError, Tables, index, read};
use crate::descriptors::{Found, PLAIN_DEVICES, device_number};
use crate::directories;
use crate::memory::Shared;
use crate::restore::{RestoreError, make};
use crate::root::Root;
use crate::unsupported::Place;

/// The path that the kernel shows for a file without a name.
pub(crate) fn former_path(target: &[u8]) -> &[u8] {
    target.strip_suffix(b" (deleted)").unwrap_or(target)
}

/// Whether a file was made without a name (`O_TMPFILE`), which lets it get one: the kernel shows it by its number.
pub(crate) fn is_temporary(name: &[u8]) -> bool {
    name.strip_prefix(b"#").is_some_and(|number| number.iter().all(u8::is_ascii_digit))
}

/// Gives something a name for as long as `with` takes: the one of `path` where that is free, else one with `number` in it.
///
/// `create` makes it under a name in a directory and fails with EEXIST where there is something. The directory is as it was
/// afterwards, but for the time of its last change.
pub(crate) fn while_named<T>(
    root: &Root,
    path: &[u8],
    number: u32,
    create: &dyn Fn(&File, &OsStr) -> io::Result<()>,
    with: impl FnOnce(&File, &OsStr) -> io::Result<T>,
) -> io::Result<T> {
    let path = Path::new(OsStr::from_bytes(path));
    let spare = OsString::from(format!(".samara-unlinked-{number}"));
    let (directory, is_its_own) = nearest(root, path.parent().unwrap_or(Path::new("/")))?;
    let wanted = path.file_name().filter(|_| is_its_own);
    let (accessed, modified) = directories::times(&directory.metadata()?);
    let mut name = wanted.unwrap_or(&spare);
    match create(&directory, name) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && name != spare => {
            name = &spare;
            create(&directory, name)?;
        }
        other => other?,
    }
    let result = with(&directory, name);
    unlinkat(&directory, name, UnlinkatFlags::NoRemoveDir)?;
    futimens(&directory, &accessed, &modified)?;
    result
}

/// Opens a directory, or the nearest one above it that is there; and whether it is the wanted one.
pub(crate) fn nearest(root: &Root, path: &Path) -> io::Result<(File, bool)> {
    let mut error = io::ErrorKind::NotFound.into();
    for above in path.ancestors() {
        match root.open(above.as_os_str().as_bytes(), libc::O_DIRECTORY | libc::O_RDONLY) {
            Ok(directory) => return Ok((directory.into(), above == path)),
            Err(failed) => error = failed,
        }
    }
    Err(error)
}

/// The node without a name that a descriptor refers to; `None` where it refers to something else.
pub(crate) fn classify(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Option<Result<FileKind, String>>, CaptureError> {
    let handle = found.info.flags & libc::O_PATH != 0;
    let kind = found.metadata.file_type();
    let is_device = kind.is_char_device() || kind.is_block_device();
    let is_node = kind.is_symlink() || kind.is_fifo() || kind.is_socket();
    if found.metadata.nlink() != 0 || !(is_device || handle && is_node) {
        return Ok(None);
    }
    if let Some(node) = tables.known_nodes.get(&found.identity()) {
        return Ok(Some(Ok(FileKind::UnlinkedNode { node: *node })));
    }
    let path = former_path(found.target);
    let kind = if kind.is_symlink() {
        let target = rustix::fs::readlinkat(found.borrow()?, "", Vec::new())
            .map_err(io::Error::from)
            .map_err(read(found.link))?;
        NodeKind::Symlink { target: Bytes::from(target.into_bytes()) }
    } else if kind.is_fifo() {
        NodeKind::Fifo
    } else if kind.is_socket() {
        NodeKind::Socket
    } else {
        let (major, minor) = device_number(found.metadata.rdev());
        if !kind.is_char_device() || !PLAIN_DEVICES.contains(&(major, minor)) {
            let path = String::from_utf8_lossy(path).into_owned();
            return Ok(Some(Err(format!("{path} is a device, which is not supported"))));
        }
        NodeKind::Device { major, minor }
    };
    let node = index(tables.unlinked_nodes.len());
    tables.unlinked_nodes.push(UnlinkedNode {
        path: Bytes::from(path.to_vec()),
        kind,
        mode: found.metadata.mode() & 0o7777,
        owner: (found.metadata.uid(), found.metadata.gid()),
        accessed_ns: found.metadata.atime() * 1_000_000_000 + found.metadata.atime_nsec(),
        modified_ns: found.metadata.mtime() * 1_000_000_000 + found.metadata.mtime_nsec(),
    });
    tables.known_nodes.insert(found.identity(), node);
    tables.node_holders.push((found.identity(), found.pid, found.fd));
    Ok(Some(Ok(FileKind::UnlinkedNode { node })))
}

/// Refuses handles on nodes that lead to an open FIFO or socket, once all of these have been seen.
pub(crate) fn refuse_used(tables: &mut Tables<'_>) {
    for (identity, pid, fd) in std::mem::take(&mut tables.node_holders) {
        if tables.known_pipes.contains_key(&identity) || tables.sockets.has_node(identity) {
            let what =
                "a handle on a FIFO or socket without a name that is in use is not supported";
            tables.refuse(pid, Place::Descriptor(fd), what);
        }
    }
}

/// Makes the nodes that had no names, and all descriptions of them, by their indices.
pub(crate) fn restore(
    container: &Container,
    root: &Root,
) -> Result<BTreeMap<u32, OwnedFd>, RestoreError> {
    let mut users: BTreeMap<u32, Vec<(u32, &OpenFile)>> = BTreeMap::new();
    for (number, file) in (0u32..).zip(&container.files) {
        if let FileKind::UnlinkedNode { node } = file.kind {
            users.entry(node).or_default().push((number, file));
        }
    }
    let mut made = BTreeMap::new();
    for (number, node) in (0u32..).zip(&container.unlinked_nodes) {
        let path = String::from_utf8_lossy(&node.path);
        if let NodeKind::Device { major, minor } = node.kind
            && !PLAIN_DEVICES.contains(&(major, minor))
        {
            let what = format!("device {major}:{minor} is never saved");
            return Err(RestoreError::Damaged(what));
        }
        let create = |directory: &File, name: &OsStr| create(node, directory, name);
        let files = while_named(root, &node.path, number, &create, |directory, name| {
            let handle = handle(node, directory, name)?;
            dress(node, &handle)?;
            let users = users.remove(&number).unwrap_or_default();
            users
                .into_iter()
                .map(|(number, file)| {
                    Ok((number, open(node, &handle, directory, name, file.flags)?))
                })
                .collect::<io::Result<Vec<_>>>()
        })
        .map_err(make(format!("{path}, which had no name")))?;
        made.extend(files);
    }
    Ok(made)
}

fn create(node: &UnlinkedNode, directory: &File, name: &OsStr) -> io::Result<()> {
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    let (kind, device) = match &node.kind {
        NodeKind::Symlink { target } => {
            return Ok(symlinkat(OsStr::from_bytes(target), directory, name)?);
        }
        NodeKind::Fifo => (SFlag::S_IFIFO, 0),
        NodeKind::Socket => (SFlag::S_IFSOCK, 0),
        NodeKind::Device { major, minor } => {
            (SFlag::S_IFCHR, makedev((*major).into(), (*minor).into()))
        }
    };
    Ok(mknodat(directory, name, kind, private, device)?)
}

/// A handle on a node that has just been made. Others may see its directory, too, so nothing else is done by its name.
fn handle(node: &UnlinkedNode, directory: &File, name: &OsStr) -> io::Result<File> {
    let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let handle = File::from(openat(directory, name, flags, Mode::empty())?);
    let metadata = handle.metadata()?;
    let kind = metadata.file_type();
    let is_it = match node.kind {
        NodeKind::Symlink { .. } => kind.is_symlink(),
        NodeKind::Fifo => kind.is_fifo(),
        NodeKind::Socket => kind.is_socket(),
        NodeKind::Device { major, minor } => {
            kind.is_char_device() && device_number(metadata.rdev()) == (major, minor)
        }
    };
    if is_it { Ok(handle) } else { Err(io::ErrorKind::AlreadyExists.into()) }
}

/// Gives a node its owner, mode and times.
fn dress(node: &UnlinkedNode, handle: &File) -> io::Result<()> {
    let (user, group) = node.owner;
    fchownat(handle, "", Some(user.into()), Some(group.into()), AtFlags::AT_EMPTY_PATH)?;
    if !matches!(node.kind, NodeKind::Symlink { .. }) {
        let link = format!("/proc/self/fd/{}", handle.as_raw_fd());
        std::fs::set_permissions(link, Permissions::from_mode(node.mode & 0o7777))?;
    }
    let times = Timestamps {
        last_access: timespec(node.accessed_ns),
        last_modification: timespec(node.modified_ns),
    };
    Ok(rustix::fs::utimensat(handle, "", &times, rustix::fs::AtFlags::EMPTY_PATH)?)
}

fn timespec(ns: i64) -> Timespec {
    Timespec { tv_sec: ns.div_euclid(1_000_000_000), tv_nsec: ns.rem_euclid(1_000_000_000) }
}

/// Opens a node with the flags that its descriptor had. What could keep the opener waiting is no more than a handle.
fn open(
    node: &UnlinkedNode,
    handle: &File,
    directory: &File,
    name: &OsStr,
    flags: i32,
) -> io::Result<OwnedFd> {
    let is_handle = flags & libc::O_PATH != 0;
    if !is_handle && !matches!(node.kind, NodeKind::Device { .. }) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let kept = libc::O_PATH | libc::O_NOFOLLOW;
    let flags = if is_handle { flags & kept } else { flags & !libc::O_ASYNC };
    if flags & libc::O_NOFOLLOW == 0 {
        return Ok(Shared::reopen(handle, flags)?.into());
    }
    // A flag that only the opening of a name can leave.
    let by_name = OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC;
    let opened = File::from(openat(directory, name, by_name, Mode::empty())?);
    let [is, was] = [opened.metadata()?, handle.metadata()?].map(|it| (it.dev(), it.ino()));
    if is == was { Ok(opened.into()) } else { Err(io::ErrorKind::AlreadyExists.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A file that is taken for one of `O_TMPFILE` could be given a name, which it could not before.
    #[test]
    fn temporary_files_are_told_by_their_numbers() {
        assert!(is_temporary(b"#131"));
        for name in [&b"131"[..], b"#131.log", b"a#131"] {
            assert!(!is_temporary(name), "{name:?}");
        }
        assert_eq!(former_path(b"/tmp/x (deleted)"), b"/tmp/x");
        assert_eq!(former_path(b"/tmp/x"), b"/tmp/x");
    }
}
