//! Packs that lie on this node, for reading single frames of earlier capsules: bases of differences.
//!
//! An address that is a folder of a local file system has its packs here anyway. For all others the node keeps copies of the packs
//! that it uploads, in one folder for all containers, bounded in size. A pack that is not there costs nothing but room: what would
//! have been stored as differences is stored as a whole.
//!
//! What is read is checked against the frame's digest in a page map, so that it does not matter who wrote a file, how much of it
//! arrived before a power failure, or which capsule it came from. The folder belongs to one user alone all the same, since it holds
//! what was in the memory of containers.
//!
//! Several writers use the folder at a time, without locks: a file comes by being renamed when it is complete, one that is being
//! read may be removed by anybody, and the oldest go when there is no room. The bound may be exceeded by one pack for each that is
//! being written.
//!
//! What this module does not do: it fetches nothing, and waits for no disk to be written.

use std::collections::HashMap;
use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use rustix::fs::{AtFlags, Mode, OFlags, Timespec, Timestamps, UTIME_NOW};
use samara_capsule::digest::{Digest, FrameDigest};
use samara_capsule::pagemap::MapFrame;

use crate::config::PacksSettings;
use crate::location::Location;

/// Packs that are open at a time. A process may have 1024 descriptors as a rule, and most are for connections and trackers.
const OPEN_MAX: usize = 64;

/// The last of the disk's room is for others: no pack is kept that would leave less than this part of it.
const FREE_DIVISOR: u64 = 10;

/// Entries of the folder that are looked at: a million MiB of packs, and what fails to be removed.
const ENTRIES_MAX: usize = 200_000;

/// Nothing but a file is waited for.
const READING: OFlags =
    OFlags::RDONLY.union(OFlags::NOFOLLOW).union(OFlags::NONBLOCK).union(OFlags::CLOEXEC);

/// What a file is called until it is complete.
const UNFINISHED: &str = ".new-";

/// Packs of one address.
#[derive(Debug)]
pub(crate) struct LocalPacks {
    place: Place,
    /// None: it is not here.
    open: Mutex<HashMap<Digest, Option<Arc<File>>>>,
}

#[derive(Debug)]
enum Place {
    /// The address's own.
    Store(PathBuf),
    Kept(KeptPacks),
    Nowhere,
}

impl LocalPacks {
    /// Those of the address `location`. Where the node's folder can't be used, there are none; why is told in the log.
    pub(crate) fn of(location: &Location, settings: &PacksSettings) -> LocalPacks {
        let place = match location.as_folder() {
            Some(folder) if is_local(&folder) => Place::Store(folder.join("blobs/sha256")),
            _ => match KeptPacks::open(settings) {
                Ok(Some(kept)) => Place::Kept(kept),
                Ok(None) => Place::Nowhere,
                Err(error) => {
                    let folder = settings.folder().display().to_string();
                    tracing::warn!(%error, folder, "no packs are kept on this node");
                    Place::Nowhere
                }
            },
        };
        LocalPacks { place, open: Mutex::default() }
    }

    /// The stored bytes of a frame, if they are here: `frame` lies in `pack`.
    pub(crate) fn frame(&self, pack: &Digest, frame: &MapFrame) -> Option<Vec<u8>> {
        let file = self.file(pack)?;
        let mut stored = vec![0; usize::try_from(frame.stored_bytes).ok()?];
        file.read_exact_at(&mut stored, frame.offset.into()).ok()?;
        (FrameDigest::of(&stored) == frame.digest).then_some(stored)
    }

    /// Keeps a copy of a pack, if that is what is done for this address and there is room.
    pub(crate) fn keep(&self, pack: &Digest, content: &[u8]) {
        let Place::Kept(kept) = &self.place else { return };
        if let Err(error) = kept.keep(pack, content) {
            tracing::debug!(%error, %pack, "a pack is not kept on this node");
        }
    }

    fn file(&self, pack: &Digest) -> Option<Arc<File>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = open.get(pack) {
            return file.clone();
        }
        let file = match &self.place {
            Place::Store(folder) => {
                let path = folder.join(pack.hex());
                rustix::fs::open(path, READING, Mode::empty()).map(File::from).ok()
            }
            Place::Kept(kept) => kept.read(pack).ok(),
            Place::Nowhere => None,
        };
        if open.len() >= OPEN_MAX {
            open.clear();
        }
        let file = file.map(Arc::new);
        open.insert(*pack, file.clone());
        file
    }
}

/// Whether a folder lies on a disk or in memory of this machine, as far as its kind tells: one on a network is read like a store.
fn is_local(folder: &Path) -> bool {
    /// `statfs(2)`: ext2 to ext4, XFS, Btrfs, tmpfs, ramfs, overlay, F2FS, ZFS, bcachefs.
    const LOCAL: [u64; 9] = [
        0xef53,
        0x5846_5342,
        0x9123_683e,
        0x0102_1994,
        0x8584_58f6,
        0x794c_7630,
        0xf2f5_2010,
        0x2fc1_2fc1,
        0xca45_1a4e,
    ];
    let kind = rustix::fs::statfs(folder).map(|found| u64::try_from(found.f_type));
    matches!(kind, Ok(Ok(kind)) if LOCAL.contains(&kind))
}

/// The node's folder.
#[derive(Debug)]
struct KeptPacks {
    folder: OwnedFd,
    bytes_max: u64,
}

/// A file of the folder that is one of ours.
#[derive(Debug)]
struct Entry {
    name: String,
    bytes: u64,
    modified: SystemTime,
}

impl KeptPacks {
    /// None where nothing is to be kept.
    ///
    /// # Errors
    /// The folder can't be made, or others have access to it.
    fn open(settings: &PacksSettings) -> io::Result<Option<KeptPacks>> {
        let bytes_max = settings.bytes_max();
        if bytes_max == 0 {
            return Ok(None);
        }
        let path = settings.folder();
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
        let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::RDONLY | OFlags::CLOEXEC;
        let folder = rustix::fs::open(path, flags, Mode::empty())?;
        // What is checked is what is used: the open folder, not its name.
        let found = rustix::fs::fstat(&folder)?;
        let ours = fs::metadata("/proc/self")?.uid();
        if found.st_uid != ours || found.st_mode & 0o077 != 0 {
            let text = "others than its owner have access to it, or it belongs to another user";
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, text));
        }
        Ok(Some(KeptPacks { folder, bytes_max }))
    }

    /// Opens a pack, and notes that it is still of use.
    fn read(&self, pack: &Digest) -> io::Result<File> {
        let file = rustix::fs::openat(&self.folder, pack.hex(), READING, Mode::empty())?;
        self.touch(&file)?;
        Ok(File::from(file))
    }

    fn touch(&self, file: &OwnedFd) -> io::Result<()> {
        let now = Timespec { tv_sec: 0, tv_nsec: UTIME_NOW };
        Ok(rustix::fs::futimens(file, &Timestamps { last_access: now, last_modification: now })?)
    }

    /// # Errors
    /// It can't be written, or there is no room for it.
    fn keep(&self, pack: &Digest, content: &[u8]) -> io::Result<()> {
        if self.read(pack).is_ok() {
            return Ok(());
        }
        self.make_room(content.len() as u64)?;
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| io::Error::other(error.to_string()))?;
        let unfinished = format!("{UNFINISHED}{:032x}", u128::from_le_bytes(random));
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.folder, &unfinished, flags, Mode::RUSR | Mode::WUSR)?;
        let written = File::from(file).write_all(content).and_then(|()| {
            Ok(rustix::fs::renameat(&self.folder, &unfinished, &self.folder, pack.hex())?)
        });
        if written.is_err() {
            self.remove(&unfinished);
        }
        written
    }

    /// Removes the oldest files until there is room for `bytes` more.
    fn make_room(&self, bytes: u64) -> io::Result<()> {
        let disk = rustix::fs::fstatvfs(&self.folder)?;
        let of_disk = |blocks: u64| blocks.saturating_mul(disk.f_frsize);
        let mut entries = self.entries()?;
        let mut kept: u64 = entries.iter().map(|entry| entry.bytes).sum();
        let mut free = of_disk(disk.f_bavail);
        let reserved = of_disk(disk.f_blocks) / FREE_DIVISOR;
        let fits = |kept: u64, free: u64| {
            kept.saturating_add(bytes) <= self.bytes_max && free.saturating_sub(bytes) >= reserved
        };
        if bytes > self.bytes_max {
            return Err(io::ErrorKind::QuotaExceeded.into());
        }
        entries.sort_unstable_by_key(|entry| std::cmp::Reverse(entry.modified));
        while !fits(kept, free) {
            let Some(oldest) = entries.pop() else {
                return Err(io::ErrorKind::StorageFull.into());
            };
            self.remove(&oldest.name);
            kept = kept.saturating_sub(oldest.bytes);
            free = free.saturating_add(oldest.bytes);
        }
        Ok(())
    }

    /// Our files. Others, which nobody but the owner can have put there, are left alone.
    fn entries(&self) -> io::Result<Vec<Entry>> {
        let mut entries = Vec::new();
        for found in rustix::fs::Dir::read_from(&self.folder)?.take(ENTRIES_MAX) {
            let found = found?;
            let Ok(name) = found.file_name().to_str() else { continue };
            if !name.starts_with(UNFINISHED) && Digest::from_hex(name).is_err() {
                continue;
            }
            // Somebody else may have removed it.
            let Ok(stat) = rustix::fs::statat(&self.folder, name, AtFlags::SYMLINK_NOFOLLOW) else {
                continue;
            };
            let since = u64::try_from(stat.st_mtime).unwrap_or(0);
            let nanoseconds = u32::try_from(stat.st_mtime_nsec).unwrap_or(0);
            let modified = SystemTime::UNIX_EPOCH + std::time::Duration::new(since, nanoseconds);
            let bytes = u64::try_from(stat.st_size).unwrap_or(0);
            entries.push(Entry { name: name.to_owned(), bytes, modified });
        }
        Ok(entries)
    }

    fn remove(&self, name: &str) {
        if let Err(error) = rustix::fs::unlinkat(&self.folder, name, AtFlags::empty())
            && error != rustix::io::Errno::NOENT
        {
            tracing::debug!(%error, name, "a pack that was kept can't be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use samara_capsule::frame::Codec;

    use super::*;

    fn settings(folder: &Path, mebibytes_max: u64) -> PacksSettings {
        PacksSettings { folder: Some(folder.to_owned()), mebibytes_max: Some(mebibytes_max) }
    }

    fn packs(folder: &Path, mebibytes_max: u64) -> LocalPacks {
        let location = Location::parse("s3://bucket/x").unwrap();
        LocalPacks::of(&location, &settings(folder, mebibytes_max))
    }

    fn content(number: u32, bytes: usize) -> (Digest, Vec<u8>) {
        let content = number.to_le_bytes().repeat(bytes / 4);
        (Digest::of(&content), content)
    }

    /// A frame that lies at 100 of some content.
    fn frame(content: &[u8]) -> MapFrame {
        MapFrame {
            pack: 0,
            offset: 100,
            stored_bytes: 1000,
            pages: 1,
            codec: Codec::Raw,
            base: None,
            digest: FrameDigest::of(&content[100..1100]),
        }
    }

    /// A folder that is for its owner alone.
    fn private_folder() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o700)).unwrap();
        folder
    }

    fn bytes_in(folder: &Path) -> u64 {
        fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
    }

    #[test]
    fn what_was_kept_is_found_by_others() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/packs");
        let (digest, content) = content(1, 4000);
        packs(&path, 1).keep(&digest, &content);
        let found = packs(&path, 1);
        assert_eq!(found.frame(&digest, &frame(&content)).unwrap(), content[100..1100]);
        assert_eq!(found.frame(&Digest::of(b"other"), &frame(&content)), None);
        let outside = MapFrame { offset: 3900, ..frame(&content) };
        assert_eq!(found.frame(&digest, &outside), None);
    }

    /// Of a disk that lies, of a file that was cut off, nothing may come into a capsule.
    #[test]
    fn what_is_damaged_counts_as_missing() {
        let folder = private_folder();
        let (digest, content) = content(1, 4000);
        packs(folder.path(), 1).keep(&digest, &content);
        let file = folder.path().join(digest.hex());
        let read = || packs(folder.path(), 1).frame(&digest, &frame(&content));
        assert!(read().is_some());
        let mut damaged = content.clone();
        damaged[500] ^= 1;
        fs::write(&file, &damaged).unwrap();
        assert_eq!(read(), None);
        fs::write(&file, &content[..600]).unwrap();
        assert_eq!(read(), None);
        fs::remove_file(&file).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", &file).unwrap();
        assert_eq!(read(), None);
    }

    #[test]
    fn the_oldest_go_when_there_is_no_room() {
        let folder = private_folder();
        fs::write(folder.path().join("notes"), vec![1; 3 << 20]).unwrap();
        fs::write(folder.path().join(".new-0123"), vec![1; 100 << 10]).unwrap();
        let all: Vec<_> = (0..12).map(|number| content(number, 300 << 10)).collect();
        for (index, (digest, content)) in all.iter().enumerate() {
            // The first one is of use each time, through another handle than that which writes.
            if index > 0 {
                let (digest, content) = &all[0];
                assert!(packs(folder.path(), 1).frame(digest, &frame(content)).is_some());
            }
            packs(folder.path(), 1).keep(digest, content);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let left: Vec<usize> =
            (0..12).filter(|index| folder.path().join(all[*index].0.hex()).exists()).collect();
        assert_eq!(left, [0, 10, 11]);
        assert!(folder.path().join("notes").exists());
        assert!(!folder.path().join(".new-0123").exists(), "a crash would leave it for good");
        let (digest, content) = content(99, 2 << 20);
        packs(folder.path(), 1).keep(&digest, &content);
        assert!(!folder.path().join(digest.hex()).exists());
        assert!(folder.path().join(all[0].0.hex()).exists());
    }

    /// Memory of containers must not be readable by others, nor what is decoded be theirs to write.
    #[test]
    fn a_folder_that_others_have_access_to_is_not_used() {
        let folder = tempfile::tempdir().unwrap();
        let (digest, content) = content(1, 4000);
        let open = folder.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o750)).unwrap();
        packs(&open, 1).keep(&digest, &content);
        assert_eq!(fs::read_dir(&open).unwrap().count(), 0);
        let link = folder.path().join("link");
        let own = folder.path().join("own");
        fs::create_dir(&own).unwrap();
        fs::set_permissions(&own, fs::Permissions::from_mode(0o700)).unwrap();
        std::os::unix::fs::symlink(&own, &link).unwrap();
        packs(&link, 1).keep(&digest, &content);
        assert_eq!(fs::read_dir(&own).unwrap().count(), 0);
        let made = folder.path().join("made");
        packs(&made, 1).keep(&digest, &content);
        assert_eq!(fs::metadata(&made).unwrap().permissions().mode() & 0o777, 0o700);
        let file = fs::metadata(made.join(digest.hex())).unwrap();
        assert_eq!(file.permissions().mode() & 0o777, 0o600);
        packs(&folder.path().join("none"), 0).keep(&digest, &content);
        assert!(!folder.path().join("none").exists());
    }

    /// Captures of many containers at once: each finds whole packs or none, and the bound holds.
    #[test]
    fn many_use_it_at_once() {
        let folder = private_folder();
        std::thread::scope(|scope| {
            for user in 0..4u32 {
                let folder = folder.path();
                scope.spawn(move || {
                    for round in 0..60u32 {
                        let packs = packs(folder, 1);
                        let (digest, content) = content(round % 7 + user % 2, 200 << 10);
                        packs.keep(&digest, &content);
                        if let Some(found) = packs.frame(&digest, &frame(&content)) {
                            assert!(found == content[100..1100]);
                        }
                    }
                });
            }
        });
        let bytes = bytes_in(folder.path());
        assert!(bytes > 0 && bytes <= (1 << 20) + 4 * (200 << 10), "{bytes}");
        let names = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        assert!(names.into_iter().all(|name| !name.to_string_lossy().starts_with(UNFINISHED)));
    }
}
