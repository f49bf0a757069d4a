//! What can be said of files from their times: whether one is what it was when it was read.
//!
//! A change of a file changes its ctime, which nobody can set, and so a file with the ctime that it had has not changed, but for these:
//!
//! | what | so |
//! |---|---|
//! | times have the resolution of a tick (10 ms at most), on many kernels and file systems | a file that changed shortly before the instant is not proven |
//! | `write(2)` sets the times first and copies then, for as long as it takes | while the container runs, [`let_writes_end`] comes before reading |
//! | a store through a shared mapping sets them only where the page was clean | a file that somebody has mapped so at the instant is not proven |
//! | stores through shared mappings of tmpfs need not set them at all | nothing on tmpfs is proven, nor on a file system that is not known here |
//! | a device writes for direct asynchronous I/O whenever it likes | while the container runs, nothing is proven where anybody has a context for it |
//! | the clock was set back | nothing is proven |
//!
//! While everything stands, all this is known of all processes. While the container runs, what counts is what was there before the
//! look and is still there after it: a mapping through which a store may come unnoticed has been there since the file's times were
//! set, which is longer ago, so that looking at one process after the other finds it. Only one that is moved past the place that is
//! being read, in both of two looks, would be missed.
//!
//! What is not proven is read again, and compared.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::io::Errno;
use samara_kernel::pid_namespaces::View;
use samara_kernel::proc::Mapping;
use samara_kernel::{Pid, proc};
use serde::{Deserialize, Serialize};

use super::tree::{Stat, Tree};
use crate::aio;

/// By device and inode, as `stat(2)` tells them.
pub(crate) type Identity = (u32, u32, u64);

/// Ticks take 1 to 10 ms (`CONFIG_HZ`), and a time may be one tick behind.
const RESOLUTION_NS: i128 = 50_000_000;

/// Times of files on these are set by this kernel alone, and by each write. The numbers are those of statfs(2).
const KNOWN_FILE_SYSTEMS: [u64; 3] = [0xef53, 0x5846_5342, 0x9123_683e];

/// Files that are mapped shared, and that the mapping may be written through.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MappedFiles(pub(crate) BTreeSet<Identity>);

/// An instant, and what was known at it of who may change files without a trace.
#[derive(Clone, Debug)]
pub struct Moment {
    at_ns: i128,
    mapped: MappedFiles,
    /// Something may change files later that has begun before.
    is_blind: bool,
}

/// What is left alone while the container runs, by the numbers of inodes.
#[derive(Clone, Debug, Default)]
pub struct LeftAlone {
    /// Somebody would be told that they are read.
    watched: HashSet<u64>,
    /// Somebody's lease might end.
    leased: HashSet<u64>,
}

impl LeftAlone {
    pub(super) fn contains(&self, stat: &Stat) -> bool {
        let (_, _, inode) = stat.identity;
        self.watched.contains(&inode) || self.leased.contains(&inode)
    }

    pub(super) fn watches_anything(&self) -> bool {
        !self.watched.is_empty()
    }
}

fn nanoseconds(time: SystemTime) -> i128 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i128::try_from(since.as_nanos()).unwrap_or(i128::MAX)
}

impl Moment {
    /// A stop: everything that could change files stands, and `mapped` is known of all of it. `before` is a time before it stood.
    pub fn of_stop(before: SystemTime, mapped: MappedFiles) -> Moment {
        Moment { at_ns: nanoseconds(before), mapped, is_blind: false }
    }

    /// Looks at a container that runs; `init` is its init. None where there is somebody who must not be told that files are read, and it
    /// can't be known of which files.
    pub fn of_running(init: Pid) -> io::Result<Option<(Moment, LeftAlone)>> {
        let at_ns = nanoseconds(SystemTime::now());
        let mut moment = Moment { at_ns, mapped: MappedFiles::default(), is_blind: false };
        let mut alone = LeftAlone { watched: HashSet::new(), leased: leased()? };
        for _ in 0..2 {
            for pid in members(init)? {
                moment.note_mappings(pid);
            }
        }
        for pid in members(init)? {
            let Ok(descriptors) = proc::descriptors(pid) else { continue };
            for fd in descriptors {
                let Ok(target) = proc::descriptor_target(pid, fd) else { continue };
                match target.to_str() {
                    Some("anon_inode:[io_uring]") => moment.is_blind = true,
                    Some("anon_inode:[fanotify]") => return Ok(None),
                    Some("anon_inode:inotify" | "anon_inode:[inotify]") => {
                        let text = fs::read_to_string(format!("/proc/{pid}/fdinfo/{fd}"));
                        for line in text.unwrap_or_default().lines() {
                            if line.starts_with("inotify ") {
                                let Some(inode) = field(line, "ino:") else { return Ok(None) };
                                alone.watched.insert(inode);
                            }
                        }
                    }
                    _ => {}
                }
            }
        }
        Ok(Some((moment, alone)))
    }

    /// What was mapped.
    pub fn mapped(&self) -> &MappedFiles {
        &self.mapped
    }

    /// What a process has mapped. Of one that is gone nothing is left.
    fn note_mappings(&mut self, pid: Pid) {
        /// A mapping that is not where it was listed may have been moved, cut or joined: then all are listed again, so often at most.
        const LISTS_MAX: usize = 5;
        for _ in 0..LISTS_MAX {
            let list = proc::mappings_without_flags(pid).unwrap_or_default();
            if list.iter().all(|mapping| self.note_mapping(pid, mapping).is_ok()) {
                return;
            }
        }
        // Nobody knows which files they were of.
        self.is_blind = true;
    }

    fn note_mapping(&mut self, pid: Pid, mapping: &Mapping) -> io::Result<()> {
        let name = mapping.name.as_encoded_bytes();
        if name.starts_with(aio::MAPPING) || name.starts_with(b"anon_inode:[io_uring]") {
            self.is_blind = true;
        }
        self.mapped.0.extend(through(pid, mapping)?);
        Ok(())
    }

    /// Whether what has changed last as `stat` says can't have changed since this moment without another ctime. It must lie on a
    /// file system that [`keeps_times`].
    pub(super) fn proves(&self, stat: &Stat) -> bool {
        let changed =
            i128::from(stat.changed.seconds) * 1_000_000_000 + i128::from(stat.changed.nanoseconds);
        !self.is_blind
            && changed + RESOLUTION_NS < self.at_ns
            && !self.mapped.0.contains(&stat.identity)
    }

    /// Whether some file of the device is mapped.
    pub(super) fn maps_some_of(&self, device: (u32, u32)) -> bool {
        self.mapped.0.iter().any(|(major, minor, _)| (*major, *minor) == device)
    }
}

/// What processes have mapped that stand, and that the capture does not look at otherwise.
pub(crate) fn mapped_by(pids: impl Iterator<Item = Pid>) -> io::Result<MappedFiles> {
    let mut found = MappedFiles::default();
    for pid in pids {
        let mapped = proc::mappings_without_flags(pid).and_then(|list| {
            list.iter().map(|mapping| through(pid, mapping)).collect::<io::Result<Vec<_>>>()
        });
        match mapped {
            Ok(mapped) => found.0.extend(mapped.into_iter().flatten()),
            // It was killed while it stood.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// The file behind a mapping, if stores to the mapping are stores to the file.
fn through(pid: Pid, mapping: &Mapping) -> io::Result<Option<Identity>> {
    if !mapping.shared || mapping.inode == 0 {
        return Ok(None);
    }
    let link = format!("/proc/{pid}/map_files/{:x}-{:x}", mapping.start, mapping.end);
    // The link is writable if the mapped description is: then `mprotect(2)` may allow stores, to pages that are dirty already too.
    if !mapping.write && fs::symlink_metadata(&link)?.permissions().mode() & 0o200 == 0 {
        return Ok(None);
    }
    match fs::metadata(link) {
        Ok(metadata) => Ok(Some(identity(&metadata))),
        // What the kernel makes up, and is no file of anybody's.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(None),
        Err(error) => Err(error),
    }
}

pub(crate) fn identity(metadata: &fs::Metadata) -> Identity {
    let device = metadata.dev();
    (libc::major(device), libc::minor(device), metadata.ino())
}

/// All processes in the pid namespace of `init`.
fn members(init: Pid) -> io::Result<Vec<Pid>> {
    if let Ok(view) = View::of(init) {
        return view.processes();
    }
    let own = proc::namespace(init, "pid")?;
    let mut all = proc::processes()?;
    all.retain(|pid| proc::namespace(*pid, "pid").is_ok_and(|namespace| namespace == own));
    Ok(all)
}

/// Files that somebody has a lease on (`/proc/locks`, see proc_locks(5)).
fn leased() -> io::Result<HashSet<u64>> {
    let text = fs::read_to_string("/proc/locks")?;
    Ok(text.lines().filter_map(leased_inode).collect())
}

fn leased_inode(line: &str) -> Option<u64> {
    let mut words = line.split_ascii_whitespace();
    let is_lease = words.by_ref().any(|word| word == "LEASE");
    let place = words.find(|word| word.matches(':').count() == 2)?;
    if !is_lease {
        return None;
    }
    place.rsplit(':').next()?.parse().ok()
}

/// A hexadecimal field of a line of `/proc/PID/fdinfo`.
fn field(line: &str, name: &str) -> Option<u64> {
    let word = line.split_ascii_whitespace().find_map(|word| word.strip_prefix(name))?;
    u64::from_str_radix(word, 16).ok()
}

/// Whether times say everything on the file system of a tree that the table above allows them to.
pub(super) fn keeps_times(tree: &Tree) -> bool {
    let kind = tree.file_system_kind();
    kind.is_ok_and(|kind| KNOWN_FILE_SYSTEMS.contains(&kind))
}

/// Waits until no call is under way that has set the times of a file already and writes to it still. False where that can't be told.
///
/// Such calls hold the inode's lock, and so does the removal of an attribute: here of one that is not there, which changes nothing.
pub(super) fn let_writes_end(file: impl AsFd) -> bool {
    // Nobody knows the name before.
    static NAME: std::sync::OnceLock<String> = std::sync::OnceLock::new();
    let name = NAME.get_or_init(|| {
        let random = std::hash::BuildHasher::hash_one(&std::hash::RandomState::new(), 0);
        format!("user.samara-{random:016x}")
    });
    rustix::fs::fremovexattr(file, name.as_str()) == Err(Errno::NODATA)
}

/// Two clocks at one moment: between two of these one can see whether somebody has set the clock that files have their times from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Clocks {
    real_ns: i64,
    boot_ns: i64,
}

impl Clocks {
    pub(super) fn now() -> Clocks {
        let read = |clock| {
            let time = rustix::time::clock_gettime(clock);
            time.tv_sec.saturating_mul(1_000_000_000).saturating_add(time.tv_nsec)
        };
        Clocks {
            real_ns: read(rustix::time::ClockId::Realtime),
            boot_ns: read(rustix::time::ClockId::Boottime),
        }
    }

    /// Whether the clock ran on from `self` to `later` without a step back. Slewing takes at most 500 us a second (adjtimex(2)).
    pub(super) fn ran_on(self, later: Clocks) -> bool {
        let real = later.real_ns.saturating_sub(self.real_ns);
        let boot = later.boot_ns.saturating_sub(self.boot_ns);
        /// Reading the two takes a moment as well.
        const READING_NS: i64 = 5_000_000;
        boot >= 0 && real >= boot - boot / 1000 - READING_NS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lease that is overlooked ends by the capture.
    #[test]
    fn leases_are_told_from_locks() {
        for (line, inode) in [
            ("1: LEASE  ACTIVE    WRITE 4711 08:01:1234567 0 EOF", Some(1_234_567)),
            ("2: LEASE  BREAKING  READ  4711 00:2b:17 0 EOF", Some(17)),
            ("3: POSIX  ADVISORY  WRITE 4711 08:01:99 0 EOF", None),
            ("4: -> FLOCK  ADVISORY  WRITE 4711 08:01:99 0 EOF", None),
        ] {
            assert_eq!(leased_inode(line), inode, "{line}");
        }
    }

    /// A clock that was set back gives a change the time of an earlier one.
    #[test]
    fn a_clock_that_was_set_back_is_seen() {
        const SECOND: i64 = 1_000_000_000;
        let then = Clocks { real_ns: 1000 * SECOND, boot_ns: 10 * SECOND };
        let check = |real: i64, boot: i64, ran_on: bool| {
            let now = Clocks { real_ns: then.real_ns + real, boot_ns: then.boot_ns + boot };
            assert_eq!(then.ran_on(now), ran_on, "{real} {boot}");
        };
        check(0, 0, true);
        check(60 * SECOND, 60 * SECOND, true);
        check(3600 * SECOND - SECOND, 3600 * SECOND, true);
        check(3 * 3600 * SECOND, 60 * SECOND, true);
        check(60 * SECOND - SECOND, 60 * SECOND, false);
        check(-SECOND, 60 * SECOND, false);
    }

    /// Without it, a file is read in the midst of a write whose time it has already.
    #[test]
    fn a_write_that_is_under_way_is_waited_for() {
        use std::os::unix::fs::FileExt;
        // On the file system of the sources, which is no tmpfs.
        let folder = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = folder.path().join("file");
        const BYTES: usize = 256 << 20;
        fs::write(&path, vec![1; BYTES]).unwrap();
        let before = fs::metadata(&path).unwrap();
        let writer = fs::File::options().write(true).open(&path).unwrap();
        let content = vec![2; BYTES];
        let changed = |metadata: &fs::Metadata| (metadata.ctime(), metadata.ctime_nsec());
        std::thread::scope(|scope| {
            scope.spawn(|| assert_eq!(writer.write_at(&content, 0).unwrap(), BYTES));
            let file = fs::File::open(&path).unwrap();
            while changed(&file.metadata().unwrap()) == changed(&before) {
                std::hint::spin_loop();
            }
            let seen = file.metadata().unwrap();
            assert!(let_writes_end(&file));
            let mut last = [0];
            file.read_exact_at(&mut last, BYTES as u64 - 1).unwrap();
            assert_eq!(last, [2], "the end of a write was not there");
            assert_eq!(changed(&file.metadata().unwrap()), changed(&seen));
        });
    }
}
