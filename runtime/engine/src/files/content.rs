//! The content of regular files, holes kept: from a file into a stream, from a stream into a file, from file to file.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::SeekFrom;
use rustix::io::Errno;

/// A file with more stretches of data than this keeps the holes before the last of them only, so that a map of
/// holes takes at most 16 MiB.
pub(super) const SEGMENTS_MAX: usize = 1 << 20;

/// Bytes read or written per call: enough that the call's own cost does not show, small enough for the cache.
pub(super) const BUFFER_BYTES: usize = 256 << 10;

/// Below this size, a file whose blocks cover its size is not asked for holes.
const ASK_BYTES_MIN: u64 = 64 << 10;

/// A stretch of data in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub(super) offset: u64,
    pub(super) length: u64,
}

/// Where a file has data: in ascending order, without overlap. None if it has no holes, or where the file system
/// can't tell.
pub(super) fn segments(
    file: impl AsFd,
    size: u64,
    blocks: u64,
) -> Result<Option<Vec<Segment>>, Errno> {
    if size == 0 || (size < ASK_BYTES_MIN && blocks.saturating_mul(512) >= size) {
        return Ok(None);
    }
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let offset = match rustix::fs::seek(&file, SeekFrom::Data(at)) {
            Ok(offset) if offset < size => offset,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(Errno::INVAL | Errno::NOTSUP | Errno::NOTTY) => return Ok(None),
            Err(e) => return Err(e),
        };
        let end = if found.len() + 1 == SEGMENTS_MAX {
            size
        } else {
            rustix::fs::seek(&file, SeekFrom::Hole(offset))?.min(size)
        };
        found.push(Segment { offset, length: end - offset });
        at = end;
    }
    let whole = found.len() == 1 && found[0] == Segment { offset: 0, length: size };
    Ok(if whole { None } else { Some(found) })
}

/// What went wrong between two ends.
#[derive(Debug)]
pub(super) enum CopyError {
    From(io::Error),
    To(io::Error),
    /// The source ended early.
    Short,
}

/// Copies one stretch of a file to a stream.
pub(super) fn read_segment(
    file: BorrowedFd<'_>,
    segment: Segment,
    out: &mut dyn Write,
    buffer: &mut [u8],
) -> Result<(), CopyError> {
    let (mut at, mut left) = (segment.offset, segment.length);
    while left > 0 {
        let take = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let got = match rustix::io::pread(file, &mut buffer[..take], at) {
            Ok(0) => return Err(CopyError::Short),
            Ok(got) => got,
            Err(Errno::INTR) => continue,
            Err(e) => return Err(CopyError::From(e.into())),
        };
        out.write_all(&buffer[..got]).map_err(CopyError::To)?;
        at += got as u64;
        left -= got as u64;
    }
    Ok(())
}

/// Copies the next bytes of a stream to one stretch of a file. With `old`, a second buffer of the same size, only what
/// differs from what the file has there is written.
pub(super) fn write_segment(
    file: BorrowedFd<'_>,
    segment: Segment,
    stream: &mut dyn Read,
    buffer: &mut [u8],
    mut old: Option<&mut [u8]>,
) -> Result<(), CopyError> {
    let (mut at, mut left) = (segment.offset, segment.length);
    while left > 0 {
        let take = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let got = match stream.read(&mut buffer[..take]) {
            Ok(0) => return Err(CopyError::Short),
            Ok(got) => got,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(CopyError::From(e)),
        };
        let new = &buffer[..got];
        let same = match &mut old {
            // A short read counts as a difference, and costs no more than writing.
            Some(old) => {
                let there = rustix::io::pread(file, &mut old[..got], at);
                there.map_err(|e| CopyError::To(e.into()))? == got && old[..got] == *new
            }
            None => false,
        };
        if !same {
            write_all_at(file, new, at).map_err(|e| CopyError::To(e.into()))?;
        }
        at += got as u64;
        left -= got as u64;
    }
    Ok(())
}

fn write_all_at(file: BorrowedFd<'_>, mut bytes: &[u8], mut at: u64) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(file, bytes, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(written) => {
                bytes = &bytes[written..];
                at += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Copies a whole file to an empty one, holes kept, by reflink where the file systems can.
pub(super) fn copy_file(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    size: u64,
    blocks: u64,
) -> Result<(), Errno> {
    rustix::fs::ftruncate(to, size)?;
    let whole = vec![Segment { offset: 0, length: size }];
    for segment in segments(from, size, blocks)?.unwrap_or(whole) {
        let (mut from_at, mut to_at) = (segment.offset, segment.offset);
        let end = segment.offset + segment.length;
        while from_at < end {
            // 1 GiB a call: the kernel cuts at 2 GiB less a page anyway.
            let take = usize::try_from(end - from_at).unwrap_or(usize::MAX).min(1 << 30);
            match rustix::fs::copy_file_range(from, Some(&mut from_at), to, Some(&mut to_at), take)
            {
                Ok(0) => return Err(Errno::IO),
                Ok(_) => {}
                Err(Errno::XDEV | Errno::INVAL | Errno::NOTSUP | Errno::NOSYS) => {
                    let mut buffer = vec![0; BUFFER_BYTES];
                    copy_by_hand(from, to, from_at, end, &mut buffer)?;
                    from_at = end;
                    to_at = end;
                }
                Err(Errno::INTR) => {}
                Err(e) => return Err(e),
            }
        }
    }
    Ok(())
}

fn copy_by_hand(
    from: BorrowedFd<'_>,
    to: BorrowedFd<'_>,
    mut at: u64,
    end: u64,
    buffer: &mut [u8],
) -> Result<(), Errno> {
    while at < end {
        let take = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        match rustix::io::pread(from, &mut buffer[..take], at) {
            Ok(0) => return Err(Errno::IO),
            Ok(got) => {
                write_all_at(to, &buffer[..got], at)?;
                at += got as u64;
            }
            Err(Errno::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
