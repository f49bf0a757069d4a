//! Descriptors and open file descriptions.
//!
//! Restore makes every description once, in the engine, below the container's root, and hands it to each process that has a
//! descriptor for it. Descriptors that were shared by `fork`, `dup` or a message thus share their position and flags again.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use samara_capsule::record::{Bytes, Descriptor, FileKind, Lock, LockKind, OpenFile, Pipe};
use samara_kernel::pidfd::PidFd;
use samara_kernel::proc::DescriptorInfo;
use samara_kernel::{Pid, kcmp, proc};

use crate::capture::{CaptureError, OutsideStream, Tables, index, read};
use crate::unsupported::Place;
use crate::{pipes, sockets};

/// The descriptors and locks of one process.
#[derive(Debug, Default)]
pub(crate) struct Descriptors {
    pub(crate) list: Vec<Descriptor>,
    pub(crate) locks: Vec<Lock>,
}

/// Flags that `open` takes only while it opens, or that belong to the descriptor.
const NOT_KEPT: i32 =
    libc::O_CLOEXEC | libc::O_CREAT | libc::O_EXCL | libc::O_TRUNC | libc::O_NOCTTY;

/// Character devices without a state of their own: null, zero, full, random, urandom, of major 1.
const PLAIN_DEVICES: [(u32, u32); 5] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9)];

/// Describes the descriptors of a stopped process, registering what they share.
pub(crate) fn collect(pid: Pid, tables: &mut Tables<'_>) -> Result<Descriptors, CaptureError> {
    let mut found = Descriptors::default();
    let handle = PidFd::open(pid).map_err(read(format!("process {pid}")))?;
    for fd in proc::descriptors(pid).map_err(read(format!("/proc/{pid}/fd")))? {
        let link = format!("/proc/{pid}/fd/{fd}");
        let info =
            proc::descriptor_info(pid, fd).map_err(read(format!("/proc/{pid}/fdinfo/{fd}")))?;
        locks(pid, fd, &info, &mut found.locks, tables);
        let metadata = fs::metadata(&link).map_err(read(link.clone()))?;
        let identity = (metadata.dev(), metadata.ino());
        let close_on_exec = info.flags & libc::O_CLOEXEC != 0;
        if let Some(file) = known(pid, fd, identity, tables)? {
            found.list.push(Descriptor { fd, file, close_on_exec });
            continue;
        }
        let target = fs::read_link(&link).map_err(read(link.clone()))?;
        let target = target.as_os_str().as_bytes();
        let descriptor = Found {
            pid,
            fd,
            handle: &handle,
            link: &link,
            target,
            metadata: &metadata,
            info: &info,
        };
        match classify(&descriptor, tables)? {
            Ok(kind) => {
                let file = index(tables.files.len());
                tables.files.push(OpenFile { flags: info.flags & !NOT_KEPT, kind });
                tables.known_files.entry(identity).or_default().push((pid, fd, file));
                found.list.push(Descriptor { fd, file, close_on_exec });
            }
            Err(what) => tables.refuse(pid, Place::Descriptor(fd), what),
        }
    }
    Ok(found)
}

/// The index of a description that another descriptor has led to before.
fn known(
    pid: Pid,
    fd: i32,
    identity: (u64, u64),
    tables: &Tables<'_>,
) -> Result<Option<u32>, CaptureError> {
    for (other, other_fd, file) in
        tables.known_files.get(&identity).map(Vec::as_slice).unwrap_or_default()
    {
        let order = kcmp::file((pid, fd), (*other, *other_fd))
            .map_err(read(format!("/proc/{pid}/fd/{fd}")))?;
        if order.is_eq() {
            return Ok(Some(*file));
        }
    }
    Ok(None)
}

/// A descriptor and all that `/proc` says of it.
#[derive(Debug)]
pub(crate) struct Found<'a> {
    pub(crate) pid: Pid,
    pub(crate) fd: i32,
    pub(crate) handle: &'a PidFd,
    pub(crate) link: &'a str,
    pub(crate) target: &'a [u8],
    pub(crate) metadata: &'a fs::Metadata,
    pub(crate) info: &'a DescriptorInfo,
}

impl Found<'_> {
    /// A descriptor of our own for the same open file description.
    pub(crate) fn borrow(&self) -> Result<OwnedFd, CaptureError> {
        self.handle.get_fd(self.fd).map_err(read(self.link))
    }

    pub(crate) fn identity(&self) -> (u64, u64) {
        (self.metadata.dev(), self.metadata.ino())
    }

    fn line(&self, name: &str) -> Option<&str> {
        self.info.others.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

/// What kind of file is open, or why that kind can't be saved.
fn classify(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Result<FileKind, String>, CaptureError> {
    let (device, inode) = found.identity();
    let outside = OutsideStream { device, inode };
    if let Some(stream) = tables.request.outside.iter().position(|stream| *stream == outside) {
        return Ok(Ok(FileKind::Outside { stream: index(stream) }));
    }
    if found.info.flags & libc::O_PATH != 0 {
        return Ok(Err("descriptors opened with O_PATH are not supported".to_owned()));
    }
    let kind = found.metadata.file_type();
    let position = found.info.position;
    let path = || Bytes::from(found.target.to_vec());
    if kind.is_file() && found.target.starts_with(b"/memfd:") {
        let name = found.target.strip_prefix(b"/memfd:").unwrap_or_default();
        let name = name.strip_suffix(b" (deleted)").unwrap_or(name);
        let memory = tables.shared_memory((device, inode), found.link, Some(name))?;
        return Ok(Ok(FileKind::SharedMemory { memory, position }));
    }
    if kind.is_file() && found.metadata.nlink() == 0 {
        let path = std::path::Path::new(std::ffi::OsStr::from_bytes(found.target));
        let file = tables.unlinked((device, inode), found.link, path, found.metadata)?;
        return Ok(Ok(FileKind::Unlinked { file, position }));
    }
    if found.target.starts_with(b"anon_inode:") {
        return Ok(anonymous(found));
    }
    if kind.is_fifo() && found.target.starts_with(b"pipe:") {
        return pipes::collect(found, tables).map(|pipe| pipe.map(|pipe| FileKind::Pipe { pipe }));
    }
    if kind.is_socket() {
        return sockets::note(found, tables);
    }
    // Everything else has a name, and has to be found by it again.
    if tables.root.identity(found.target).ok() != Some((device, inode)) {
        let name = String::from_utf8_lossy(found.target);
        return Ok(Err(format!(
            "{name} is open, but no longer at its path, or lies outside the container"
        )));
    }
    if kind.is_file() {
        return Ok(Ok(FileKind::Regular { path: path(), position, bytes: found.metadata.size() }));
    }
    if kind.is_dir() {
        return Ok(Ok(FileKind::Directory { path: path(), position }));
    }
    if kind.is_fifo() {
        return pipes::collect(found, tables)
            .map(|pipe| pipe.map(|pipe| FileKind::Fifo { pipe, path: path() }));
    }
    if kind.is_char_device() {
        let number = device_number(found.metadata.rdev());
        if PLAIN_DEVICES.contains(&number) {
            return Ok(Ok(FileKind::Device { path: path(), major: number.0, minor: number.1 }));
        }
    }
    Ok(Err(format!(
        "{} is a device or terminal, which is not supported",
        String::from_utf8_lossy(found.target)
    )))
}

/// Major and minor number as `makedev(3)` packs them.
fn device_number(number: u64) -> (u32, u32) {
    (libc::major(number), libc::minor(number))
}

/// Files of the kernel's own that have no name anywhere.
fn anonymous(found: &Found<'_>) -> Result<FileKind, String> {
    if found.target == b"anon_inode:[eventfd]" {
        let count =
            found.line("eventfd-count").and_then(|count| u64::from_str_radix(count, 16).ok());
        let semaphore = found.line("eventfd-semaphore") == Some("1");
        return match count {
            Some(count) => Ok(FileKind::EventFd { count, semaphore }),
            None => Err("this kernel does not tell the count of an eventfd".to_owned()),
        };
    }
    let kind = found.target.strip_prefix(b"anon_inode:").unwrap_or(found.target);
    Err(format!("an open {} is not supported", String::from_utf8_lossy(kind)))
}

/// Notes the locks that `fdinfo` shows: `1: POSIX  ADVISORY  WRITE 77 fe:01:1234 0 EOF`.
fn locks(pid: Pid, fd: i32, info: &DescriptorInfo, locks: &mut Vec<Lock>, tables: &mut Tables<'_>) {
    for (_, value) in info.others.iter().filter(|(name, _)| name == "lock") {
        match parse_lock(fd, value) {
            // A lock of the process shows on each of its descriptors for the file; one of them suffices.
            Some(lock) => locks.push(lock),
            None => tables.refuse(
                pid,
                Place::Descriptor(fd),
                format!("the file lock `{value}` is not supported"),
            ),
        }
    }
}

fn parse_lock(fd: i32, text: &str) -> Option<Lock> {
    let mut fields = text.split_ascii_whitespace().skip(1);
    let kind = match fields.next()? {
        "POSIX" => LockKind::Posix,
        "OFDLCK" => LockKind::OpenFile,
        "FLOCK" => LockKind::Flock,
        _ => return None,
    };
    if fields.next()? != "ADVISORY" {
        return None;
    }
    let exclusive = match fields.next()? {
        "WRITE" => true,
        "READ" => false,
        _ => return None,
    };
    let (_, _) = (fields.next()?, fields.next()?);
    let start: u64 = fields.next()?.parse().ok()?;
    let bytes = match fields.next()? {
        "EOF" => 0,
        end => end.parse::<u64>().ok()?.checked_sub(start)?.checked_add(1)?,
    };
    Some(Lock { fd, kind, exclusive, start, bytes })
}

/// The record of a pipe that is being filled in.
pub(crate) fn new_pipe(tables: &mut Tables<'_>, identity: (u64, u64), pipe: Pipe) -> u32 {
    let number = index(tables.pipes.len());
    tables.pipes.push(pipe);
    tables.known_pipes.insert(identity, number);
    number
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A lock that is not restored lets two writers into a database at once.
    #[test]
    fn locks_are_read_as_the_kernel_writes_them() {
        let cases = [
            ("1: POSIX  ADVISORY  WRITE 77 fe:01:1234 100 199", LockKind::Posix, true, 100, 100),
            ("2: OFDLCK ADVISORY  READ -1 fe:01:1234 0 EOF", LockKind::OpenFile, false, 0, 0),
            ("1: FLOCK  ADVISORY  WRITE 9 00:2b:9 0 EOF", LockKind::Flock, true, 0, 0),
        ];
        for (text, kind, exclusive, start, bytes) in cases {
            assert_eq!(
                parse_lock(3, text),
                Some(Lock { fd: 3, kind, exclusive, start, bytes }),
                "{text}"
            );
        }
        assert_eq!(parse_lock(3, "1: LEASE  ACTIVE    WRITE 9 00:2b:9 0 EOF"), None);
    }
}
