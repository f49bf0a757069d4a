//! Directories: how far one has been read, and those that have no name.
//!
//! A position in a directory means something to one file system only; on another, or in the same directory made anew, the
//! entries may come in another order. So a directory goes on where all is behind it that the program has read. Where the new
//! order mixes what was read with what was not, it goes on so early that nothing is missed, and some entries come twice; only
//! tmpfs lets the order be made.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Seek, SeekFrom};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use nix::fcntl::{OFlag, RenameFlags, openat, renameat2};
use nix::sys::stat::{Mode, futimens, mkdirat};
use nix::sys::time::{TimeSpec, TimeValLike};
use nix::unistd::{UnlinkatFlags, unlinkat};
use rustix::fs::RawDir;
use samara_capsule::record::{Bytes, Container, UnlinkedDirectory};

use crate::capture::{CaptureError, Tables, index, read};
use crate::restore::{RestoreError, make};
use crate::root::Root;

/// Directories deeper than this inside of each other are not found without a name.
const DEPTH_MAX: usize = 256;

/// The names that a directory has given before `position`, and whether none is left. `link` is a link in `/proc` to it.
pub(crate) fn read_so_far(link: &str, position: u64) -> io::Result<(Vec<Bytes>, bool)> {
    if position == 0 {
        return Ok((Vec::new(), false));
    }
    let directory = File::options().read(true).custom_flags(libc::O_DIRECTORY).open(link)?;
    let all = entries(&directory)?;
    (&directory).seek(SeekFrom::Start(position))?;
    let left: BTreeSet<OsString> = entries(&directory)?.into_iter().map(|(name, _)| name).collect();
    let names = all.into_iter().map(|(name, _)| name).filter(|name| !left.contains(name));
    Ok((names.map(|name| Bytes::from(name.into_vec())).collect(), left.is_empty()))
}

/// Lets a directory go on behind the names that have been read.
pub(crate) fn go_on(directory: &File, names: &[Bytes], whole: bool) -> io::Result<()> {
    let mut all = entries(directory)?;
    // Reading has brought it to its end.
    if whole {
        return Ok(());
    }
    let names: BTreeSet<&OsStr> = names.iter().map(|name| OsStr::from_bytes(name)).collect();
    let is_read = |(name, _): &&(OsString, u64)| names.contains(name.as_os_str());
    if all.iter().skip_while(is_read).any(|entry| is_read(&entry)) && is_tmpfs(directory)? {
        bring_forward(directory, all.iter().filter(is_read).map(|(name, _)| name.as_os_str()))?;
        rewind(directory)?;
        all = entries(directory)?;
    }
    let behind = all.iter().take_while(is_read).last();
    let mut directory = directory;
    directory.seek(SeekFrom::Start(behind.map_or(0, |(_, next)| *next)))?;
    Ok(())
}

fn rewind(mut directory: &File) -> io::Result<()> {
    directory.rewind()
}

pub(crate) fn is_tmpfs(file: &File) -> io::Result<bool> {
    /// linux/magic.h
    const TMPFS: i64 = 0x0102_1994;
    Ok(nix::sys::statfs::fstatfs(file)?.filesystem_type().0 == TMPFS)
}

/// Makes names the first of a directory of tmpfs, which lists what got its name last first.
fn bring_forward<'a>(directory: &File, names: impl Iterator<Item = &'a OsStr>) -> io::Result<()> {
    const MEANWHILE: &str = ".samara-moved";
    let (accessed, modified) = times(&directory.metadata()?);
    let rename = |from: &OsStr, to: &OsStr| {
        renameat2(directory, from, directory, to, RenameFlags::RENAME_NOREPLACE)
    };
    for name in names.filter(|name| ![".", ".."].contains(&name.to_str().unwrap_or_default())) {
        // Where something is mounted, the name has to stay; it may come twice.
        if rename(name, OsStr::new(MEANWHILE)).is_ok() {
            rename(OsStr::new(MEANWHILE), name)?;
        }
    }
    Ok(futimens(directory, &accessed, &modified)?)
}

/// The entries from where a directory stands to its end, each with the position behind it.
fn entries(directory: &File) -> io::Result<Vec<(OsString, u64)>> {
    let mut buffer = [MaybeUninit::uninit(); 32 << 10];
    let mut reader = RawDir::new(directory, &mut buffer);
    let mut found = Vec::new();
    while let Some(entry) = reader.next() {
        let entry = entry?;
        found.push((
            OsString::from_vec(entry.file_name().to_bytes().to_vec()),
            entry.next_entry_cookie(),
        ));
    }
    Ok(found)
}

/// The index of a directory without a name. `link` is a link in `/proc` to it.
pub(crate) fn collect_unlinked(
    link: &str,
    target: &[u8],
    metadata: &Metadata,
    tables: &mut Tables<'_>,
) -> Result<u32, CaptureError> {
    collect_at_depth(link, target, metadata, tables, 0)
}

fn collect_at_depth(
    link: &str,
    target: &[u8],
    metadata: &Metadata,
    tables: &mut Tables<'_>,
    depth: usize,
) -> Result<u32, CaptureError> {
    let identity = (metadata.dev(), metadata.ino());
    if let Some(known) = tables.known_directories.get(&identity) {
        return Ok(*known);
    }
    let above = format!("{link}/..");
    let parent = fs::metadata(&above).map_err(read(above.clone()))?;
    let parent = if parent.nlink() == 0 && depth < DEPTH_MAX {
        let handle = File::options()
            .read(true)
            .custom_flags(libc::O_PATH)
            .open(&above)
            .map_err(read(above.clone()))?;
        let path = format!("/proc/self/fd/{}", handle.as_raw_fd());
        let target = fs::read_link(&path).map_err(read(above.clone()))?;
        Some(collect_at_depth(&above, target.as_os_str().as_bytes(), &parent, tables, depth + 1)?)
    } else {
        None
    };
    let number = index(tables.unlinked_directories.len());
    let path = target.strip_suffix(b" (deleted)").unwrap_or(target);
    tables.unlinked_directories.push(UnlinkedDirectory {
        parent,
        path: Bytes::from(path.to_vec()),
        mode: metadata.mode() & 0o7777,
        owner: (metadata.uid(), metadata.gid()),
        modified_ns: metadata.mtime() * 1_000_000_000 + metadata.mtime_nsec(),
    });
    tables.known_directories.insert(identity, number);
    Ok(number)
}

/// Makes the directories that had no name. They have names for a moment, because they may have been inside of each other.
pub(crate) fn make_unlinked(container: &Container, root: &Root) -> Result<Vec<File>, RestoreError> {
    let mut made: Vec<Made> = Vec::with_capacity(container.unlinked_directories.len());
    let mut result = Ok(());
    for (number, record) in container.unlinked_directories.iter().enumerate() {
        let what = || make(format!("the directory {}", String::from_utf8_lossy(&record.path)));
        match make_one(record, number, &made, root).map_err(what()) {
            Ok(one) => made.push(one),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    for one in made.iter().rev() {
        one.unlink().map_err(make("a directory without a name"))?;
    }
    result?;
    for (one, record) in made.iter().zip(&container.unlinked_directories) {
        let time = TimeSpec::nanoseconds(record.modified_ns);
        futimens(&one.directory, &time, &time)
            .map_err(io::Error::from)
            .map_err(make("the times of a directory without a name"))?;
    }
    Ok(made.into_iter().map(|one| one.directory).collect())
}

struct Made {
    parent: File,
    /// Times of access and modification of a parent that keeps its name.
    parent_times: Option<(TimeSpec, TimeSpec)>,
    name: OsString,
    directory: File,
}

impl Made {
    fn unlink(&self) -> io::Result<()> {
        unlinkat(&self.parent, self.name.as_os_str(), UnlinkatFlags::RemoveDir)?;
        if let Some((accessed, modified)) = self.parent_times {
            futimens(&self.parent, &accessed, &modified)?;
        }
        Ok(())
    }
}

fn make_one(
    record: &UnlinkedDirectory,
    number: usize,
    made: &[Made],
    root: &Root,
) -> io::Result<Made> {
    let path = Path::new(OsStr::from_bytes(&record.path));
    let (parent, parent_times) = match record.parent {
        Some(parent) => {
            let parent = made.get(parent as usize).ok_or(io::ErrorKind::InvalidData)?;
            (parent.directory.try_clone()?, None)
        }
        None => {
            let above = path.parent().unwrap_or(Path::new("/")).as_os_str().as_bytes();
            let parent = File::from(
                root.open(above, libc::O_DIRECTORY | libc::O_RDONLY)
                    .or_else(|_| root.open(b"/", libc::O_DIRECTORY | libc::O_RDONLY))?,
            );
            let times = times(&parent.metadata()?);
            (parent, Some(times))
        }
    };
    let wanted = path.file_name().unwrap_or(OsStr::new("unnamed"));
    let mode = Mode::from_bits_truncate(0o700);
    let name = match mkdirat(&parent, wanted, mode) {
        Ok(()) => wanted.to_owned(),
        Err(nix::errno::Errno::EEXIST) => {
            let name = OsString::from(format!(".samara-unlinked-directory-{number}"));
            mkdirat(&parent, name.as_os_str(), mode)?;
            name
        }
        Err(error) => return Err(error.into()),
    };
    let flags = OFlag::O_DIRECTORY | OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
    let directory = File::from(openat(parent.as_fd(), name.as_os_str(), flags, Mode::empty())?);
    std::os::unix::fs::fchown(&directory, Some(record.owner.0), Some(record.owner.1))?;
    directory.set_permissions(fs::Permissions::from_mode(record.mode & 0o7777))?;
    Ok(Made { parent, parent_times, name, directory })
}

/// Times of access and modification.
pub(crate) fn times(metadata: &Metadata) -> (TimeSpec, TimeSpec) {
    (
        TimeSpec::new(metadata.atime(), metadata.atime_nsec()),
        TimeSpec::new(metadata.mtime(), metadata.mtime_nsec()),
    )
}
