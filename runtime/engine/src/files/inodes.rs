//! Inode numbers of files that are open.
//!
//! Some programs remember the inode of a file that they hold open and look at it again by name: SQLite takes a database
//! whose number has changed for one that was moved away, and stops writing. A copy on another host has another number, unless
//! its file system can be asked for a certain one. ext4 can: `/sys/fs/ext4/DEVICE/inode_goal` (fs/ext4/ialloc.c) is where
//! the allocator begins to search.
//!
//! What this module does not do: promise. Where the number is taken, or the file system is another one, the file keeps what it has.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, XattrFlags};

use super::{Attempt, HostError, RootChanges};

/// ext4 does not give a number out again within five seconds of its file's deletion (fs/ext4/ialloc.c, recently_deleted),
/// which is what happens when a container comes back on the file system that it was just removed from.
const REUSE_WAIT: Duration = Duration::from_secs(6);

/// Gives regular files below the root the inode numbers that they are asked to have, as far as the file system lets us choose.
///
/// `wanted` are paths inside the root. Returns those whose number is another one in the end. To be called after
/// [`super::apply_root`], before anything runs or is mounted in the root.
pub fn keep_inodes(
    root: &RootChanges,
    wanted: &[(PathBuf, u64)],
) -> Result<Vec<PathBuf>, HostError> {
    let deadline = Instant::now() + REUSE_WAIT;
    let top = File::open(&root.root).attempt("open", &root.root)?;
    let mut others = Vec::new();
    for (path, inode) in wanted {
        match keep_inode(root, &top, path, *inode, deadline) {
            Ok(true) => {}
            // Not in the root: on a volume, whose files are somebody else's.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Ok(false) => others.push(path.clone()),
            Err(source) => return Err(source).attempt("choose the inode of", path),
        }
    }
    Ok(others)
}

/// Whether the file has the wanted number now.
fn keep_inode(
    root: &RootChanges,
    top: &File,
    path: &Path,
    inode: u64,
    deadline: Instant,
) -> io::Result<bool> {
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else { return Ok(false) };
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    let folder = rustix::fs::openat2(top, folder, flags, Mode::empty(), ResolveFlags::IN_ROOT)?;
    let no_link = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut source = File::from(rustix::fs::openat(&folder, name, no_link, Mode::empty())?);
    let metadata = source.metadata()?;
    if metadata.ino() == inode || !metadata.is_file() {
        return Ok(metadata.ino() == inode);
    }
    let Some(goal) = goal_file(root) else { return Ok(false) };
    let temporary = ".samara-inode";
    let create = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let patient = is_sqlite(&mut source)?;
    let mut copy = loop {
        let made = {
            let _goal = Goal::set(&goal, inode)?;
            rustix::fs::openat(&folder, temporary, create, Mode::RUSR | Mode::WUSR)
        };
        let copy = File::from(made?);
        if copy.metadata()?.ino() == inode || !patient || Instant::now() > deadline {
            break copy;
        }
        rustix::fs::unlinkat(&folder, temporary, AtFlags::empty())?;
        std::thread::sleep(Duration::from_millis(200));
    };
    let filled = (|| {
        if copy.metadata()?.ino() != inode {
            return Ok(false);
        }
        io::copy(&mut source, &mut copy)?;
        copy_metadata(&source, &metadata, &copy)?;
        rustix::fs::renameat(&folder, temporary, &folder, name)?;
        Ok(true)
    })();
    if !matches!(filled, Ok(true)) {
        rustix::fs::unlinkat(&folder, temporary, AtFlags::empty())?;
    }
    filled
}

/// Whether it is worth waiting for the number: SQLite is known to look at it.
fn is_sqlite(file: &mut File) -> io::Result<bool> {
    use std::io::{Read, Seek};
    const MAGIC: &[u8] = b"SQLite format 3\0";
    let mut begin = Vec::new();
    file.by_ref().take(MAGIC.len() as u64).read_to_end(&mut begin)?;
    file.rewind()?;
    Ok(begin == MAGIC)
}

fn copy_metadata(source: &File, metadata: &fs::Metadata, copy: &File) -> io::Result<()> {
    use std::os::unix::fs::{PermissionsExt, fchown};
    /// The kernel's own bounds on a list of names and on one value (linux/limits.h).
    const XATTR_BYTES_MAX: usize = 64 << 10;
    fchown(copy, Some(metadata.uid()), Some(metadata.gid()))?;
    copy.set_permissions(fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
    let mut names = vec![0u8; XATTR_BYTES_MAX];
    let length = rustix::fs::flistxattr(source, &mut names)?;
    let mut value = vec![0u8; XATTR_BYTES_MAX];
    for name in names
        .get(..length)
        .unwrap_or_default()
        .split(|&byte| byte == 0)
        .filter(|name| !name.is_empty())
    {
        let length = rustix::fs::fgetxattr(source, name, &mut value)?;
        rustix::fs::fsetxattr(
            copy,
            name,
            value.get(..length).unwrap_or_default(),
            XattrFlags::empty(),
        )?;
    }
    let times =
        fs::FileTimes::new().set_modified(metadata.modified()?).set_accessed(metadata.accessed()?);
    copy.set_times(times)
}

/// Where the file system behind the root takes the goal of its inode allocator; `None` for one that has none.
fn goal_file(root: &RootChanges) -> Option<PathBuf> {
    let below =
        root.overlay().map_or(&root.root, |overlay| overlay.upper.as_ref().unwrap_or(&root.root));
    let device = fs::metadata(below).ok()?.dev();
    let number = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    let device = fs::canonicalize(format!("/sys/dev/block/{number}")).ok()?;
    let goal = Path::new("/sys/fs/ext4").join(device.file_name()?).join("inode_goal");
    goal.exists().then_some(goal)
}

/// The allocator's goal while it is ours. It counts for the whole file system, so it is held for one creation only.
struct Goal<'a>(&'a Path);

impl Goal<'_> {
    fn set(path: &Path, inode: u64) -> io::Result<Goal<'_>> {
        fs::write(path, inode.to_string())?;
        Ok(Goal(path))
    }
}

impl Drop for Goal<'_> {
    fn drop(&mut self) {
        if let Err(error) = fs::write(self.0, "0") {
            tracing::warn!(%error, path = %self.0.display(), "the goal of the inode allocator could not be taken back");
        }
    }
}
