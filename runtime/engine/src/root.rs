//! The container's root directory, seen from outside.
//!
//! Every path that comes from a container or a capsule is resolved below it: neither `..` nor a symbolic link leads out.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::sys::stat::Mode;
use samara_kernel::{Pid, mount_namespace};

/// A directory that paths are resolved below, through the mounts that its processes see.
#[derive(Debug)]
pub(crate) struct Root(OwnedFd);

impl Root {
    /// The container's, of which a process runs that may have moved its own (`chroot`).
    pub(crate) fn of(pid: Pid) -> io::Result<Root> {
        Ok(Root(mount_namespace::root(pid)?.into()))
    }

    /// Opens a path as `open(2)` would inside.
    pub(crate) fn open(&self, path: &[u8], flags: i32) -> io::Result<OwnedFd> {
        let how = OpenHow::new()
            .flags(OFlag::from_bits_retain(flags) | OFlag::O_CLOEXEC)
            .mode(Mode::empty())
            .resolve(ResolveFlag::RESOLVE_IN_ROOT);
        Ok(openat2(self.0.as_fd(), OsStr::from_bytes(path), how)?)
    }

    /// Device and inode of what is at a path itself, be it a symbolic link.
    pub(crate) fn identity(&self, path: &[u8]) -> io::Result<(u64, u64)> {
        let metadata = File::from(self.open(path, libc::O_PATH | libc::O_NOFOLLOW)?).metadata()?;
        Ok((metadata.dev(), metadata.ino()))
    }
}
