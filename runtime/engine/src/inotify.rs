//! Inotify instances and what they watch, under the numbers that it has.
//!
//! The kernel tells of a watched file its device and inode, so that it has to be looked for. Watches are set up when nothing of
//! the restore touches the container's files any more, so that it causes no events.
//!
//! A capture reads the container's files, and a program that watches them would be told. It is not: what is queued while the
//! container stands is taken out before it goes on, and watches that were used up by it are set up again.
//!
//! Limits: events that nobody has read can be neither looked at without taking them nor made, and are refused. The next number
//! is taken for the one after the highest that is in use.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::inotify::{self, WatchFlags};
use samara_capsule::record::{Container, FileKind, InotifyWatch, WatchTarget};
use samara_kernel::Pid;
use samara_kernel::inotify::set_next_watch;

use crate::capture::{CaptureError, Tables, index, read};
use crate::descriptors::Found;
use crate::file_names::Identity;
use crate::memory::Shared;
use crate::restore::{RestoreError, make};
use crate::root::Root;
use crate::unsupported::{Place, UNREAD_EVENTS};

/// An instance that was found, with what `fdinfo` says it watches.
#[derive(Debug)]
pub(crate) struct Instance {
    /// Index into [`Container::files`].
    file: u32,
    pid: Pid,
    fd: i32,
    descriptor: OwnedFd,
    lines: Vec<Line>,
}

/// An instance of a container that will go on.
#[derive(Debug)]
pub(crate) struct Watcher {
    descriptor: OwnedFd,
    /// Watches that end with the first event: number, mask, and the watched file as an `O_PATH` descriptor.
    once: Vec<(i32, u32, OwnedFd)>,
    next: i32,
}

impl Watcher {
    /// Takes out the events that have been queued since the capture began, all of which it caused.
    pub(crate) fn forget_events(&self) -> io::Result<()> {
        /// Room for some events with the longest names.
        const BUFFER_BYTES: usize = 64 << 10;
        /// `struct inotify_event`: watch, mask, cookie, bytes of the name.
        const HEADER_BYTES: usize = 16;
        let mut buffer = vec![0; BUFFER_BYTES];
        // A read of nothing would wait, or fail.
        while rustix::io::ioctl_fionread(&self.descriptor)? > 0 {
            let count = rustix::io::read(&self.descriptor, &mut buffer)?;
            let mut rest = buffer.get(..count).unwrap_or_default();
            while let Some((header, names)) = rest.split_at_checked(HEADER_BYTES) {
                let [watch, mask, _, bytes] = words(header);
                if mask & IN_IGNORED != 0 {
                    self.watch_again(watch.cast_signed())?;
                }
                rest = names.get(bytes as usize..).unwrap_or_default();
            }
        }
        Ok(())
    }

    fn watch_again(&self, number: i32) -> io::Result<()> {
        let Some((_, mask, target)) = self.once.iter().find(|(known, ..)| *known == number) else {
            return Ok(());
        };
        set_next_watch(self.descriptor.as_fd(), number)?;
        let path = format!("/proc/self/fd/{}", target.as_raw_fd());
        inotify::add_watch(&self.descriptor, path, WatchFlags::from_bits_retain(*mask) & KEPT)?;
        set_next_watch(self.descriptor.as_fd(), self.next)
    }
}

/// linux/inotify.h: the watch has ended.
const IN_IGNORED: u32 = 0x8000;

/// What of a mask is the program's, and not the kernel's own.
const KEPT: WatchFlags =
    WatchFlags::ALL_EVENTS.union(WatchFlags::ONESHOT).union(WatchFlags::EXCL_UNLINK);

fn words(bytes: &[u8]) -> [u32; 4] {
    let mut words = [0; 4];
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().expect("chunks of four bytes"));
    }
    words
}

/// `inotify wd:3 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 …`
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Line {
    number: i32,
    identity: Identity,
    mask: u32,
}

/// Notes an instance. The names of what it watches are looked up by [`resolve`] when all descriptors have been seen.
pub(crate) fn note(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Result<FileKind, String>, CaptureError> {
    let descriptor = found.borrow()?;
    let unread = rustix::io::ioctl_fionread(&descriptor)
        .map_err(io::Error::from)
        .map_err(read(found.link))?;
    if unread > 0 {
        let what = format!("inotify holds {unread} bytes of {UNREAD_EVENTS}");
        return Ok(Err(what));
    }
    let lines = found.info.others.iter().filter(|(name, _)| name == "inotify wd");
    let lines: Option<Vec<Line>> = lines.map(|(_, value)| parse(value)).collect();
    let Some(lines) = lines else {
        return Ok(Err("this kernel does not tell what inotify watches".to_owned()));
    };
    let file = index(tables.files.len());
    let (pid, fd) = (found.pid, found.fd);
    tables.inotifies.push(Instance { file, pid, fd, descriptor, lines });
    Ok(Ok(FileKind::Inotify { watches: Vec::new(), next: 1 }))
}

/// What follows `inotify wd:`.
fn parse(line: &str) -> Option<Line> {
    let mut words = line.split_ascii_whitespace();
    let number = i32::from_str_radix(words.next()?, 16).ok()?;
    let mut field = |name: &str| {
        let value = words.next()?.strip_prefix(name)?;
        u64::from_str_radix(value, 16).ok()
    };
    let inode = field("ino:")?;
    let device = u32::try_from(field("sdev:")?).ok()?;
    let mask = u32::try_from(field("mask:")?).ok()?;
    // The kernel's own form: twelve bits and twenty (linux/kdev_t.h).
    let device = libc::makedev(device >> 20, device & 0xf_ffff);
    Some(Line { number, identity: (device, inode), mask })
}

/// Finds the files that the noted instances watch.
pub(crate) fn resolve(tables: &mut Tables<'_>) -> Result<(), CaptureError> {
    let instances = std::mem::take(&mut tables.inotifies);
    let wanted: BTreeSet<Identity> = instances
        .iter()
        .flat_map(|instance| &instance.lines)
        .map(|line| line.identity)
        .filter(|identity| nameless(*identity, tables).is_none())
        .collect();
    tables.find_names(&wanted)?;
    for instance in instances {
        let mut watches = Vec::with_capacity(instance.lines.len());
        for line in &instance.lines {
            let named = || tables.name(line.identity).cloned().map(WatchTarget::Path);
            match nameless(line.identity, tables).or_else(named) {
                Some(target) => {
                    watches.push(InotifyWatch { number: line.number, mask: line.mask, target });
                }
                None => {
                    let what = format!(
                        "inotify watch {} is of a file that can't be found in the container",
                        line.number
                    );
                    tables.refuse(instance.pid, Place::Descriptor(instance.fd), what);
                }
            }
        }
        watches.sort_by_key(|watch| watch.number);
        let next = watches.last().map_or(1, |watch| watch.number.saturating_add(1));
        let once = watches
            .iter()
            .filter(|watch| watch.mask & WatchFlags::ONESHOT.bits() != 0)
            .filter_map(|watch| {
                // One without a name is not reached by a capture of files.
                let WatchTarget::Path(path) = &watch.target else { return None };
                let target = tables.root.open(path, libc::O_PATH | libc::O_NOFOLLOW).ok()?;
                Some((watch.number, watch.mask, target))
            })
            .collect();
        tables.watchers.push(Watcher { descriptor: instance.descriptor, once, next });
        if let Some(file) = tables.files.get_mut(instance.file as usize) {
            file.kind = FileKind::Inotify { watches, next };
        }
    }
    Ok(())
}

/// A file without a name that is open as well.
fn nameless(identity: Identity, tables: &Tables<'_>) -> Option<WatchTarget> {
    let file = tables.known_unlinked.get(&identity).copied().map(WatchTarget::Unlinked);
    let directory = tables.known_directories.get(&identity).copied();
    file.or(directory.map(WatchTarget::UnlinkedDirectory))
}

/// Lets restored instances watch what they watched. `files` are [`Container::files`].
pub(crate) fn restore(
    container: &Container,
    files: &[OwnedFd],
    root: &Root,
    shared: &Shared,
) -> Result<(), RestoreError> {
    for (instance, record) in files.iter().zip(&container.files) {
        let FileKind::Inotify { watches, next } = &record.kind else { continue };
        let set_next = |number: i32| {
            set_next_watch(instance.as_fd(), number).map_err(make("the numbers of inotify watches"))
        };
        for watch in watches {
            let damaged =
                || RestoreError::Damaged("inotify watches a file that is not there".to_owned());
            let opened;
            let target = match &watch.target {
                WatchTarget::Path(path) => {
                    let what = format!("a watch of {}", String::from_utf8_lossy(path));
                    let flags = libc::O_PATH | libc::O_NOFOLLOW;
                    opened = root.open(path, flags).map_err(make(what))?;
                    opened.as_raw_fd()
                }
                WatchTarget::Unlinked(file) => {
                    shared.unlinked.get(*file as usize).ok_or_else(damaged)?.as_raw_fd()
                }
                WatchTarget::UnlinkedDirectory(directory) => {
                    shared.directories.get(*directory as usize).ok_or_else(damaged)?.as_raw_fd()
                }
            };
            set_next(watch.number)?;
            let flags = WatchFlags::from_bits_retain(watch.mask) & KEPT;
            let number = inotify::add_watch(instance, format!("/proc/self/fd/{target}"), flags)
                .map_err(io::Error::from)
                .map_err(make("a watch of a file"))?;
            if number != watch.number {
                return Err(RestoreError::Damaged("a file is watched twice".to_owned()));
            }
        }
        set_next(*next)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A watch that is misread is one of another file, or for other events.
    #[test]
    fn lines_are_read_as_the_kernel_writes_them() {
        let line = "a ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8";
        let identity = (libc::makedev(8, 0x13), 0x9e7e);
        assert_eq!(parse(line), Some(Line { number: 10, identity, mask: 0x0800_afce }));
        assert_eq!(parse("a ino:9e7e mask:1"), None);
    }
}
