//! A directory tree on one file system, reached through its root's descriptor only.
//!
//! Invariants: every lookup stays beneath the root, on the root's mount, and follows no symbolic link, whatever the
//! tree's owner put there. At most a few descriptors are open at a time, however deep the tree is: directories are
//! opened by their path from the root, not from their parent.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, ResolveFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;

/// Longest name of one directory entry, in bytes (`NAME_MAX`).
pub(super) const NAME_BYTES_MAX: usize = 255;
/// Longest path from the tree's root, in bytes (`PATH_MAX` less the final NUL): what one `openat2` takes.
pub(super) const PATH_BYTES_MAX: usize = 4095;

/// A path from a tree's root: no leading `/`, no empty, `.` or `..` component, bounded. The root itself is empty.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub(super) struct TreePath(Vec<u8>);

impl TreePath {
    pub(super) fn root() -> TreePath {
        TreePath::default()
    }

    /// Takes a path as an archive has it; a final `/` is dropped. The error says what is wrong with it.
    pub(super) fn parse(bytes: &[u8]) -> Result<TreePath, &'static str> {
        let bytes = bytes.strip_suffix(b"/").unwrap_or(bytes);
        if bytes == b"." || bytes.is_empty() {
            return Ok(TreePath::root());
        }
        let mut path = TreePath::root();
        for component in bytes.split(|&b| b == b'/') {
            path = path.child(OsStr::from_bytes(component))?;
        }
        Ok(path)
    }

    pub(super) fn child(&self, name: &OsStr) -> Result<TreePath, &'static str> {
        let name = name.as_bytes();
        if name.is_empty() || name == b"." || name == b".." {
            return Err("a path has an empty, `.` or `..` component");
        }
        if name.iter().any(|&b| b == 0 || b == b'/') {
            return Err("a name holds a NUL or a slash");
        }
        if name.len() > NAME_BYTES_MAX {
            return Err("a name is longer than 255 bytes");
        }
        if self.0.len() + 1 + name.len() > PATH_BYTES_MAX {
            return Err("its path is longer than 4095 bytes");
        }
        let mut path = Vec::with_capacity(self.0.len() + 1 + name.len());
        path.extend_from_slice(&self.0);
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        Ok(TreePath(path))
    }

    pub(super) fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The directory that holds it and its name there; none for the root.
    pub(super) fn split(&self) -> Option<(TreePath, &OsStr)> {
        if self.is_root() {
            return None;
        }
        Some(match self.0.iter().rposition(|&b| b == b'/') {
            Some(at) => (TreePath(self.0[..at].to_vec()), OsStr::from_bytes(&self.0[at + 1..])),
            None => (TreePath::root(), OsStr::from_bytes(&self.0)),
        })
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// For messages and reports: absolute, as a process in the tree would name it.
    pub(super) fn absolute(&self) -> PathBuf {
        let mut bytes = vec![b'/'];
        bytes.extend_from_slice(&self.0);
        PathBuf::from(OsString::from_vec(bytes))
    }

    fn lookup_path(&self) -> &Path {
        if self.is_root() { Path::new(".") } else { Path::new(OsStr::from_bytes(&self.0)) }
    }
}

impl From<&TreePath> for PathBuf {
    fn from(path: &TreePath) -> PathBuf {
        path.absolute()
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    File,
    Directory,
    Symlink,
    Fifo,
    Socket,
    CharDevice,
    BlockDevice,
}

/// A point in time as files carry it. Nanoseconds count forward, also before 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Time {
    pub(super) seconds: i64,
    pub(super) nanoseconds: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Stat {
    pub(super) kind: Kind,
    /// Permission bits with set-id and sticky bits.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) size: u64,
    /// In units of 512 bytes.
    pub(super) blocks: u64,
    pub(super) links: u32,
    /// Device and inode number: two names with the same pair are one object.
    pub(super) identity: (u32, u32, u64),
    pub(super) device: (u32, u32),
    pub(super) modified: Time,
    /// When anything of it changed last (ctime).
    pub(super) changed: Time,
    pub(super) mount: u64,
    /// Immutable or append-only.
    pub(super) flagged: bool,
}

pub(super) fn stat_at(dir: impl AsFd, name: &OsStr, flags: AtFlags) -> Result<Stat, Errno> {
    let wanted = StatxFlags::BASIC_STATS | StatxFlags::MNT_ID;
    let x = rustix::fs::statx(
        dir,
        name,
        flags | AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT,
        wanted,
    )?;
    let kind = match FileType::from_raw_mode(x.stx_mode.into()) {
        FileType::RegularFile => Kind::File,
        FileType::Directory => Kind::Directory,
        FileType::Symlink => Kind::Symlink,
        FileType::Fifo => Kind::Fifo,
        FileType::Socket => Kind::Socket,
        FileType::CharacterDevice => Kind::CharDevice,
        FileType::BlockDevice => Kind::BlockDevice,
        FileType::Unknown => return Err(Errno::NOTSUP),
    };
    Ok(Stat {
        kind,
        mode: u32::from(x.stx_mode) & 0o7777,
        uid: x.stx_uid,
        gid: x.stx_gid,
        size: x.stx_size,
        blocks: x.stx_blocks,
        links: x.stx_nlink,
        identity: (x.stx_dev_major, x.stx_dev_minor, x.stx_ino),
        device: (x.stx_rdev_major, x.stx_rdev_minor),
        modified: Time { seconds: x.stx_mtime.tv_sec, nanoseconds: x.stx_mtime.tv_nsec },
        changed: Time { seconds: x.stx_ctime.tv_sec, nanoseconds: x.stx_ctime.tv_nsec },
        mount: x.stx_mnt_id,
        flagged: x.stx_attributes.intersects(StatxAttributes::IMMUTABLE | StatxAttributes::APPEND),
    })
}

/// The object that a descriptor stands for.
pub(super) fn stat_fd(fd: impl AsFd) -> Result<Stat, Errno> {
    stat_at(fd, OsStr::new(""), AtFlags::EMPTY_PATH)
}

/// The object of that name, or none.
pub(super) fn stat_name(dir: impl AsFd, name: &OsStr) -> Result<Option<Stat>, Errno> {
    match stat_at(dir, name, AtFlags::empty()) {
        Ok(stat) => Ok(Some(stat)),
        Err(Errno::NOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

/// All names in a directory but `.` and `..`, in byte order.
pub(super) fn names(dir: impl AsFd) -> Result<Vec<OsString>, Errno> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(OsString::from_vec(name.to_vec()));
        }
    }
    names.sort_unstable();
    Ok(names)
}

/// A path for the calls on extended attributes, which take no directory descriptor: the link in /proc leads to the
/// directory itself, and the calls that are used with it don't follow the last component.
pub(super) fn proc_path(dir: BorrowedFd<'_>, name: &OsStr) -> PathBuf {
    let mut path = PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd()));
    path.push(name);
    path
}

#[derive(Debug)]
pub(super) struct Tree {
    root: OwnedFd,
    pub(super) mount: u64,
}

impl Tree {
    /// The tree at `path` without anything that is mounted below it.
    ///
    /// A private copy of the mount shows what lies under mount points. Where the kernel refuses the copy (the mount
    /// belongs to another namespace, or is unbindable), lookups stop at mount points instead.
    pub(super) fn beneath_mounts(path: &Path) -> io::Result<Tree> {
        let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let root = match rustix::mount::open_tree(rustix::fs::CWD, path, clone) {
            Ok(root) => root,
            Err(Errno::INVAL | Errno::PERM | Errno::NOSYS) => rustix::fs::openat(
                rustix::fs::CWD,
                path,
                OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
                Mode::empty(),
            )?,
            Err(e) => return Err(e.into()),
        };
        Tree::at(root)
    }

    /// The tree at a directory's descriptor. Lookups stop at mount points.
    pub(super) fn at(root: OwnedFd) -> io::Result<Tree> {
        let stat = stat_fd(&root)?;
        if stat.kind != Kind::Directory {
            return Err(Errno::NOTDIR.into());
        }
        Ok(Tree { root, mount: stat.mount })
    }

    /// The magic number of its file system (statfs(2)).
    pub(super) fn file_system_kind(&self) -> Result<u64, Errno> {
        Ok(rustix::fs::fstatfs(&self.root)?.f_type.cast_unsigned())
    }

    pub(super) fn dir(&self, path: &TreePath) -> Result<OwnedFd, Errno> {
        rustix::fs::openat2(
            &self.root,
            path.lookup_path(),
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOATIME,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV,
        )
    }

    /// The directory of that path, or none if there is no such directory.
    pub(super) fn dir_if_any(&self, path: &TreePath) -> Result<Option<OwnedFd>, Errno> {
        match self.dir(path) {
            Ok(dir) => Ok(Some(dir)),
            // A symbolic link in place of a directory is ELOOP under NO_SYMLINKS.
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// A handle to any object, that cannot be read from.
    pub(super) fn handle(&self, path: &TreePath) -> Result<OwnedFd, Errno> {
        rustix::fs::openat2(
            &self.root,
            path.lookup_path(),
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV,
        )
    }

    /// The object of that path, or none.
    pub(super) fn stat(&self, path: &TreePath) -> Result<Option<Stat>, Errno> {
        let Some((parent, name)) = path.split() else { return stat_fd(&self.root).map(Some) };
        match self.dir_if_any(&parent)? {
            Some(dir) => stat_name(dir, name),
            None => Ok(None),
        }
    }
}

/// Opens a file for reading without side effects: no waiting on a FIFO, no access time, no link followed.
pub(super) fn open_file(dir: impl AsFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOATIME | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

pub(super) fn open_subdir(dir: impl AsFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags =
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::NOATIME | OFlags::CLOEXEC;
    rustix::fs::openat(dir, name, flags, Mode::empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_that_could_leave_the_root_are_not_paths() {
        for bad in [
            "../x",
            "a/../b",
            "/etc",
            "a//b",
            "a/./b",
            "..",
            "a/..",
            "a\0b",
            &"n".repeat(256),
            &"d/".repeat(3000),
        ] {
            assert!(TreePath::parse(bad.as_bytes()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn split_undoes_child() {
        let path = TreePath::parse(b"a/b c/\xff\n").unwrap();
        let (parent, name) = path.split().unwrap();
        assert_eq!((parent.as_bytes(), name.as_bytes()), (&b"a/b c"[..], &b"\xff\n"[..]));
        assert_eq!(parent.child(name).unwrap(), path);
        assert!(TreePath::parse(b"./").unwrap().is_root());
    }
}
