//! Pipes and FIFOs: capacity, and the data in flight.
//!
//! The data is copied with `tee(2)`, which takes nothing out. A pipe of which only one end is open in the container is
//! restored with one end: its reader sees the end of the file, its writer a broken pipe, as before.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee};
use nix::unistd::pipe2;
use samara_capsule::record::{Bytes, Pipe};
use std::os::unix::fs::MetadataExt;

use crate::capture::{CaptureError, Tables, read};
use crate::descriptors::{Found, new_pipe};
use crate::nameless;
use crate::root::Root;

/// The most that a pipe can hold: `fs.pipe-max-size` may be raised by root, but not beyond this (fs/pipe.c, round_pipe_size).
const CONTENT_BYTES_MAX: usize = 1 << 31;

/// The index of the pipe that a descriptor refers to, or why it can't be saved.
pub(crate) fn collect(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Result<u32, String>, CaptureError> {
    if let Some(pipe) = tables.known_pipes.get(&found.identity()) {
        return Ok(Ok(*pipe));
    }
    let source = reading_end(found)?;
    let capacity = fcntl(&source, FcntlArg::F_GETPIPE_SZ)
        .map_err(io::Error::from)
        .map_err(read(found.link))?;
    let content = peek(&source, capacity).map_err(read(found.link))?;
    let packets = packets(&source, capacity, content.len()).map_err(read(found.link))?;
    let owner = (found.metadata.uid(), found.metadata.gid());
    let capacity = capacity.unsigned_abs();
    Ok(Ok(new_pipe(
        tables,
        found.identity(),
        Pipe { capacity, content: Bytes::from(content), owner, packets },
    )))
}

/// A descriptor for reading the same pipe, whichever end was found.
///
/// The link in `/proc` opens the pipe anew, so the description that the container holds keeps its flags.
fn reading_end(found: &Found<'_>) -> Result<OwnedFd, CaptureError> {
    use std::os::unix::fs::OpenOptionsExt;
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(found.link)
        .map_err(read(found.link))?;
    Ok(file.into())
}

/// Copies what is in a pipe.
fn peek(source: &OwnedFd, capacity: i32) -> io::Result<Vec<u8>> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    // Room for as many buffers as the source has, or `tee` would leave some behind.
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(capacity))?;
    match tee(source, &writer, CONTENT_BYTES_MAX, SpliceFFlags::SPLICE_F_NONBLOCK) {
        Ok(count) => {
            let mut content = vec![0; count];
            File::from(reader).read_exact(&mut content)?;
            Ok(content)
        }
        Err(nix::errno::Errno::EAGAIN) => Ok(Vec::new()),
        Err(error) => Err(error.into()),
    }
}

/// The lengths of the packets that a pipe holds; none where its content is a stream.
///
/// A read ends with a packet, whatever the mode of the pipe is by then. So two copies are put behind each other, and what a
/// read gives of them, if it may give all, is a packet, or both copies of a stream.
fn packets(source: &OwnedFd, capacity: i32, bytes: usize) -> io::Result<Vec<u32>> {
    if bytes == 0 {
        return Ok(Vec::new());
    }
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
    if fcntl(&writer, FcntlArg::F_SETPIPE_SZ(capacity.saturating_mul(2))).is_err() {
        // More than anybody may have without CAP_SYS_RESOURCE.
        fcntl(&writer, FcntlArg::F_SETPIPE_SZ(capacity))?;
    }
    tee(source, &writer, CONTENT_BYTES_MAX, SpliceFFlags::SPLICE_F_NONBLOCK)?;
    // The beginning of the second copy is enough.
    let is_doubled =
        tee(source, &writer, CONTENT_BYTES_MAX, SpliceFFlags::SPLICE_F_NONBLOCK).is_ok();
    let mut reader = File::from(reader);
    let mut buffer = vec![0; bytes * 2];
    let mut lengths = Vec::new();
    let mut left = bytes;
    while left > 0 {
        let count = reader.read(&mut buffer)?;
        // A pipe without room for any more, all of which one read gives, holds a stream.
        if lengths.is_empty() && (count > bytes || count == bytes && !is_doubled) {
            break;
        }
        let count = count.min(left);
        lengths.push(u32::try_from(count).map_err(|_| io::ErrorKind::InvalidData)?);
        left -= count;
    }
    Ok(lengths)
}

/// Makes a pipe with the capacity and content that was saved: reading end, writing end.
pub(crate) fn restore(pipe: &Pipe) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    let capacity = i32::try_from(pipe.capacity).map_err(|_| io::ErrorKind::InvalidData)?;
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(capacity))?;
    fill(&writer, pipe)?;
    nix::unistd::fchown(&reader, Some(pipe.owner.0.into()), Some(pipe.owner.1.into()))?;
    Ok((reader, writer))
}

/// Puts the saved data into a pipe or FIFO.
///
/// # Errors
/// `WouldBlock`: the data does not fit.
fn fill(writer: &OwnedFd, record: &Pipe) -> io::Result<()> {
    let before = OFlag::from_bits_retain(fcntl(writer, FcntlArg::F_GETFL)?);
    let mut meanwhile = before | OFlag::O_NONBLOCK;
    meanwhile.set(OFlag::O_DIRECT, !record.packets.is_empty());
    fcntl(writer, FcntlArg::F_SETFL(meanwhile))?;
    let written = write(writer, record);
    fcntl(writer, FcntlArg::F_SETFL(before))?;
    written
}

fn write(writer: &OwnedFd, record: &Pipe) -> io::Result<()> {
    let mut file = File::from(writer.try_clone()?);
    let mut rest = record.content.as_slice();
    for packet in &record.packets {
        let (packet, others) =
            rest.split_at_checked(*packet as usize).ok_or(io::ErrorKind::InvalidData)?;
        file.write_all(packet)?;
        rest = others;
    }
    file.write_all(rest)
}

/// Pipes that have been made, until every description that refers to one has its end.
#[derive(Debug, Default)]
pub(crate) struct Made {
    pipes: BTreeMap<u32, MadePipe>,
    fifos: BTreeMap<u32, OwnedFd>,
}

#[derive(Debug)]
struct MadePipe {
    /// Open for both sides: other descriptions are opened by it.
    both: OwnedFd,
    /// The descriptions that `pipe` makes, until they are used. Those that are opened have `O_LARGEFILE`, which these lack.
    reader: Option<OwnedFd>,
    writer: Option<OwnedFd>,
}

/// As `F_GETFL` tells it; the constant of the libc crate is what `open` needs on this architecture, nothing.
pub(crate) const LARGE_FILE: i32 = 0o100_000;

impl Made {
    /// An end of a pipe, with a description and flags of its own.
    pub(crate) fn pipe_end(
        &mut self,
        number: u32,
        record: &Pipe,
        flags: i32,
    ) -> io::Result<OwnedFd> {
        let pipe = match self.pipes.entry(number) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let (reader, writer) = restore(record)?;
                let both = reopen(&reader, libc::O_RDWR | libc::O_NONBLOCK)?;
                entry.insert(MadePipe { both, reader: Some(reader), writer: Some(writer) })
            }
        };
        let original = match flags & libc::O_ACCMODE {
            _ if flags & LARGE_FILE != 0 => None,
            libc::O_RDONLY => pipe.reader.take(),
            libc::O_WRONLY => pipe.writer.take(),
            _ => None,
        };
        match original {
            Some(end) => {
                fcntl(&end, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags)))?;
                Ok(end)
            }
            None => reopen(&pipe.both, flags),
        }
    }

    /// An open FIFO of the container's root.
    pub(crate) fn fifo(
        &mut self,
        number: u32,
        record: &Pipe,
        root: &Root,
        path: &[u8],
        flags: i32,
    ) -> io::Result<OwnedFd> {
        // Opened for both, a FIFO does not wait for the other side.
        let open = || root.open(path, libc::O_RDWR | libc::O_NONBLOCK);
        self.any_fifo(number, record, flags, open)
    }

    /// An open FIFO without a name, that had the given one.
    pub(crate) fn unlinked_fifo(
        &mut self,
        number: u32,
        record: &Pipe,
        root: &Root,
        path: &[u8],
        mode: u32,
        flags: i32,
    ) -> io::Result<OwnedFd> {
        let open = || {
            let fifo = nameless_fifo(root, path, mode, number)?;
            let (user, group) = record.owner;
            nix::unistd::fchown(&fifo, Some(user.into()), Some(group.into()))?;
            Ok(fifo)
        };
        self.any_fifo(number, record, flags, open)
    }

    fn any_fifo(
        &mut self,
        number: u32,
        record: &Pipe,
        flags: i32,
        open: impl FnOnce() -> io::Result<OwnedFd>,
    ) -> io::Result<OwnedFd> {
        let both = match self.fifos.entry(number) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                let both = open()?;
                let capacity =
                    i32::try_from(record.capacity).map_err(|_| io::ErrorKind::InvalidData)?;
                fcntl(&both, FcntlArg::F_SETPIPE_SZ(capacity))?;
                fill(&both, record)?;
                entry.insert(both)
            }
        };
        reopen(both, flags)
    }
}

/// Makes a FIFO that has lost its name, open for reading and writing.
fn nameless_fifo(root: &Root, path: &[u8], mode: u32, number: u32) -> io::Result<OwnedFd> {
    use nix::fcntl::openat;
    use nix::sys::stat::{Mode, SFlag, mknodat};
    let private = Mode::S_IRUSR | Mode::S_IWUSR;
    let create =
        |directory: &File, name: &OsStr| Ok(mknodat(directory, name, SFlag::S_IFIFO, private, 0)?);
    let fifo = nameless::while_named(root, path, number, &create, |directory, name| {
        // Opened for both, a FIFO does not wait for the other side.
        let flags = OFlag::O_RDWR | OFlag::O_NONBLOCK | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        Ok(openat(directory, name, flags, Mode::empty())?)
    })?;
    nix::sys::stat::fchmod(&fifo, Mode::from_bits_truncate(mode & 0o7777))?;
    Ok(fifo)
}

/// Opens a pipe once more through its link in `/proc`.
fn reopen(pipe: &OwnedFd, flags: i32) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    let access = flags & libc::O_ACCMODE;
    let file = File::options()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        // Packet mode is no property of a file that can be opened.
        .custom_flags(flags & !(libc::O_ACCMODE | libc::O_DIRECT) | libc::O_NONBLOCK)
        .open(format!("/proc/self/fd/{}", pipe.as_raw_fd()))?;
    fcntl(&file, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags)))?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Data in flight that is lost, doubled or taken away breaks a pipeline.
    #[test]
    fn a_pipe_is_copied_without_taking_from_it() {
        let (reader, writer) = pipe2(OFlag::O_CLOEXEC).expect("pipe");
        let capacity = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(1 << 18)).expect("capacity");
        let data: Vec<u8> = (0..200_000u32).map(|number| number.to_le_bytes()[0]).collect();
        let owner = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        let pipe = Pipe {
            capacity: capacity.unsigned_abs(),
            content: Bytes::from(data.clone()),
            owner,
            packets: Vec::new(),
        };
        fill(&writer, &pipe).expect("fits");
        assert!(packets(&reader, capacity, data.len()).expect("peek").is_empty());
        assert_eq!(peek(&reader, capacity).expect("peek"), data);
        assert_eq!(peek(&reader, capacity).expect("peek"), data);
        let (again, writer) = restore(&pipe).expect("restore");
        assert_eq!(fcntl(&again, FcntlArg::F_GETPIPE_SZ).expect("capacity"), capacity);
        drop(writer);
        let mut read = Vec::new();
        File::from(again).read_to_end(&mut read).expect("read");
        assert_eq!(read, data);
    }
}
