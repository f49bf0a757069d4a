//! Owner, mode, extended attributes and modification time of an object: read here, and set here.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;

use super::tree::{Kind, Stat, Time, proc_path};

/// Most that the kernel returns as a list of names, and as one value (`XATTR_LIST_MAX`, `XATTR_SIZE_MAX`).
pub(super) const XATTR_BYTES_MAX: usize = 64 << 10;
/// Longest name of an attribute (`XATTR_NAME_MAX`).
pub(super) const XATTR_NAME_BYTES_MAX: usize = 255;

#[derive(Clone, Debug, PartialEq, Eq, Default)]
pub(super) struct Metadata {
    /// Permission bits with set-id and sticky bits. Of no meaning for a symbolic link.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) modified: Time,
    /// Names and values, in the order of names.
    pub(super) xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Metadata {
    pub(super) fn of(stat: &Stat, xattrs: Vec<(Vec<u8>, Vec<u8>)>) -> Metadata {
        Metadata { mode: stat.mode, uid: stat.uid, gid: stat.gid, modified: stat.modified, xattrs }
    }
}

/// Whether an attribute is part of a container's state.
///
/// SELinux labels carry the categories of one container on one host, and EVM signs with a host's key: a mount option
/// and the host give the new ones. Other `system.` attributes are views of a file system's own data.
pub(super) fn is_kept(name: &[u8]) -> bool {
    match name {
        b"security.selinux" | b"security.evm" => false,
        b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        _ => {
            [&b"user."[..], b"trusted.", b"security."].iter().any(|prefix| name.starts_with(prefix))
        }
    }
}

/// An object that is already there.
#[derive(Clone, Copy, Debug)]
pub(super) enum Object<'a> {
    /// A regular file or directory, opened.
    Open(BorrowedFd<'a>),
    /// Anything else, which can't be opened without side effects.
    Named(BorrowedFd<'a>, &'a OsStr),
}

/// Calls `fill` with a small buffer first, since most objects have few or no attributes, and then with the largest.
fn sized(fill: impl Fn(&mut [u8]) -> Result<usize, Errno>) -> Result<Vec<u8>, Errno> {
    for bytes in [1024, XATTR_BYTES_MAX] {
        let mut buffer = vec![0; bytes];
        match fill(&mut buffer) {
            Ok(used) => {
                buffer.truncate(used);
                return Ok(buffer);
            }
            Err(Errno::RANGE) => {}
            Err(e) => return Err(e),
        }
    }
    Err(Errno::RANGE)
}

fn xattr_names(object: Object<'_>) -> Result<Vec<Vec<u8>>, Errno> {
    let list = sized(|buffer| match object {
        Object::Open(fd) => rustix::fs::flistxattr(fd, buffer),
        Object::Named(dir, name) => rustix::fs::llistxattr(proc_path(dir, name), buffer),
    });
    let list = match list {
        Ok(list) => list,
        // No attributes on this file system at all.
        Err(Errno::NOTSUP) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let mut names: Vec<Vec<u8>> =
        list.split(|&b| b == 0).filter(|n| is_kept(n)).map(<[u8]>::to_vec).collect();
    names.sort_unstable();
    Ok(names)
}

pub(super) fn xattr(object: Object<'_>, name: &[u8]) -> Result<Option<Vec<u8>>, Errno> {
    let value = sized(|buffer| match object {
        Object::Open(fd) => rustix::fs::fgetxattr(fd, name, buffer),
        Object::Named(dir, file) => rustix::fs::lgetxattr(proc_path(dir, file), name, buffer),
    });
    match value {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NODATA | Errno::NOTSUP) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The attributes that are kept.
pub(super) fn xattrs(object: Object<'_>) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut found = Vec::new();
    for name in xattr_names(object)? {
        if let Some(value) = xattr(object, &name)? {
            found.push((name, value));
        }
    }
    Ok(found)
}

fn set_xattrs(object: Object<'_>, wanted: &[(Vec<u8>, Vec<u8>)]) -> Result<(), Errno> {
    for name in xattr_names(object)? {
        if !wanted.iter().any(|(w, _)| *w == name) {
            match object {
                Object::Open(fd) => rustix::fs::fremovexattr(fd, &name[..])?,
                Object::Named(dir, file) => {
                    rustix::fs::lremovexattr(proc_path(dir, file), &name[..])?
                }
            }
        }
    }
    for (name, value) in wanted {
        match object {
            Object::Open(fd) => rustix::fs::fsetxattr(fd, &name[..], value, XattrFlags::empty())?,
            Object::Named(dir, file) => {
                rustix::fs::lsetxattr(proc_path(dir, file), &name[..], value, XattrFlags::empty())?;
            }
        }
    }
    Ok(())
}

/// New objects in a directory inherit its default ACL, which must not get in the way of exact modes.
pub(super) fn drop_default_acl(dir: impl AsFd) -> Result<(), Errno> {
    match rustix::fs::fremovexattr(dir, "system.posix_acl_default") {
        Ok(()) | Err(Errno::NODATA | Errno::NOTSUP) => Ok(()),
        Err(e) => Err(e),
    }
}

/// Makes an object's metadata equal to `metadata`, attributes that it has beyond them removed.
///
/// Content must be complete, and for a directory everything in it: both change the modification time. The owner comes
/// first, since a change of owner clears set-id bits and file capabilities; the mode after the ACLs, whose mask it is.
pub(super) fn set(object: Object<'_>, kind: Kind, metadata: &Metadata) -> Result<(), Errno> {
    let (uid, gid) = (Some(Uid::from_raw(metadata.uid)), Some(Gid::from_raw(metadata.gid)));
    match object {
        Object::Open(fd) => rustix::fs::fchown(fd, uid, gid)?,
        Object::Named(dir, name) => {
            rustix::fs::chownat(dir, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?
        }
    }
    set_xattrs(object, &metadata.xattrs)?;
    let mode = Mode::from_raw_mode(metadata.mode);
    match object {
        Object::Open(fd) => rustix::fs::fchmod(fd, mode)?,
        Object::Named(..) if kind == Kind::Symlink => {}
        Object::Named(dir, name) => rustix::fs::chmodat(dir, name, mode, AtFlags::empty())?,
    }
    set_modified(object, metadata.modified)
}

pub(super) fn set_modified(object: Object<'_>, modified: Time) -> Result<(), Errno> {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec {
            tv_sec: modified.seconds,
            tv_nsec: modified.nanoseconds.into(),
        },
    };
    match object {
        Object::Open(fd) => rustix::fs::futimens(fd, &times),
        Object::Named(dir, name) => {
            rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)
        }
    }
}
