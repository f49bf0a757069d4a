//! Pipes and FIFOs: capacity, and the data in flight.
//!
//! The data is copied with `tee(2)`, which takes nothing out. A pipe of which only one end is open in the container is
//! restored with one end: its reader sees the end of the file, its writer a broken pipe, as before.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee};
use nix::unistd::pipe2;
use samara_capsule::record::{Bytes, Pipe};
use std::os::unix::fs::MetadataExt;

use crate::capture::{CaptureError, Tables, read};
use crate::descriptors::{Found, new_pipe};
use crate::root::Root;

/// The most that a pipe can hold: `fs.pipe-max-size` may be raised by root, but not beyond this (fs/pipe.c, round_pipe_size).
const CONTENT_BYTES_MAX: usize = 1 << 31;

/// The index of the pipe that a descriptor refers to, or why it can't be saved.
pub(crate) fn collect(
    found: &Found<'_>,
    tables: &mut Tables<'_>,
) -> Result<Result<u32, String>, CaptureError> {
    if found.info.flags & libc::O_DIRECT != 0 {
        return Ok(Err("pipes in packet mode (O_DIRECT) are not supported".to_owned()));
    }
    if let Some(pipe) = tables.known_pipes.get(&found.identity()) {
        return Ok(Ok(*pipe));
    }
    let source = reading_end(found)?;
    let capacity = fcntl(&source, FcntlArg::F_GETPIPE_SZ)
        .map_err(io::Error::from)
        .map_err(read(found.link))?;
    let content = peek(&source, capacity).map_err(read(found.link))?;
    let owner = (found.metadata.uid(), found.metadata.gid());
    let capacity = capacity.unsigned_abs();
    Ok(Ok(new_pipe(
        tables,
        found.identity(),
        Pipe { capacity, content: Bytes::from(content), owner },
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

/// Makes a pipe with the capacity and content that was saved: reading end, writing end.
pub(crate) fn restore(pipe: &Pipe) -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, writer) = pipe2(OFlag::O_CLOEXEC)?;
    let capacity = i32::try_from(pipe.capacity).map_err(|_| io::ErrorKind::InvalidData)?;
    fcntl(&writer, FcntlArg::F_SETPIPE_SZ(capacity))?;
    fill(&writer, &pipe.content)?;
    nix::unistd::fchown(&reader, Some(pipe.owner.0.into()), Some(pipe.owner.1.into()))?;
    Ok((reader, writer))
}

/// Puts the saved data into a pipe or FIFO.
///
/// # Errors
/// `WouldBlock`: the data does not fit.
pub(crate) fn fill(writer: &OwnedFd, content: &[u8]) -> io::Result<()> {
    let before = OFlag::from_bits_retain(fcntl(writer, FcntlArg::F_GETFL)?);
    fcntl(writer, FcntlArg::F_SETFL(before | OFlag::O_NONBLOCK))?;
    let mut file = File::from(writer.try_clone()?);
    let written = file.write_all(content);
    fcntl(writer, FcntlArg::F_SETFL(before))?;
    written
}

/// Pipes that have been made, until every description that refers to one has its end.
#[derive(Debug, Default)]
pub(crate) struct Made {
    pipes: BTreeMap<u32, (OwnedFd, OwnedFd)>,
    fifos: BTreeMap<u32, OwnedFd>,
}

impl Made {
    /// An end of a pipe, with a description and flags of its own.
    pub(crate) fn pipe_end(
        &mut self,
        number: u32,
        record: &Pipe,
        flags: i32,
    ) -> io::Result<OwnedFd> {
        let (reader, _) = match self.pipes.entry(number) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => entry.insert(restore(record)?),
        };
        reopen(reader, flags)
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
        let both = match self.fifos.entry(number) {
            Entry::Occupied(entry) => entry.into_mut(),
            Entry::Vacant(entry) => {
                // Opened for both, a FIFO does not wait for the other side.
                let both = root.open(path, libc::O_RDWR | libc::O_NONBLOCK)?;
                let capacity =
                    i32::try_from(record.capacity).map_err(|_| io::ErrorKind::InvalidData)?;
                fcntl(&both, FcntlArg::F_SETPIPE_SZ(capacity))?;
                fill(&both, &record.content)?;
                entry.insert(both)
            }
        };
        reopen(both, flags)
    }
}

/// Opens a pipe once more through its link in `/proc`.
fn reopen(pipe: &OwnedFd, flags: i32) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    let access = flags & libc::O_ACCMODE;
    let file = File::options()
        .read(access != libc::O_WRONLY)
        .write(access != libc::O_RDONLY)
        .custom_flags((flags & !libc::O_ACCMODE) | libc::O_NONBLOCK)
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
        fill(&writer, &data).expect("fits");
        assert_eq!(peek(&reader, capacity).expect("peek"), data);
        assert_eq!(peek(&reader, capacity).expect("peek"), data);
        let owner = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        let pipe =
            Pipe { capacity: capacity.unsigned_abs(), content: Bytes::from(data.clone()), owner };
        let (again, writer) = restore(&pipe).expect("restore");
        assert_eq!(fcntl(&again, FcntlArg::F_GETPIPE_SZ).expect("capacity"), capacity);
        drop(writer);
        let mut read = Vec::new();
        File::from(again).read_to_end(&mut read).expect("read");
        assert_eq!(read, data);
    }
}
