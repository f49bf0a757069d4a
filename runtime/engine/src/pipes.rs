//! Pipes and FIFOs: capacity, and the data in flight.
//!
//! The data is copied with `tee(2)`, which takes nothing out. A pipe of which only one end is open in the container is
//! restored with one end: its reader sees the end of the file, its writer a broken pipe, as before.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, tee};
use nix::unistd::pipe2;
use samara_capsule::record::{Bytes, Pipe};
use std::os::unix::fs::MetadataExt;

use crate::capture::{CaptureError, Tables, read};
use crate::descriptors::{Found, new_pipe};

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
