//! Files that may not be opened, because a lease for writing ends when anybody else opens its file, even to read.
//!
//! Their content is read without opening them: of an overlay from the file in the upper layer, which is another inode and has no
//! leases, else through the open file description of whoever holds the lease ([decision]).
//!
//! A description that belongs to the program is read at given positions only: a search for holes would move it, and leave it moved
//! should this process end. Pages of zeros are taken for the holes of such a file.
//!
//! [decision]: ../../../../docs/decisions/leased-files.md

use std::collections::BTreeMap;
use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};

use super::content::{SEGMENTS_MAX, Segment};

/// By device and inode.
type Identity = (u32, u32, u64);

/// The files of a container that somebody holds a lease for writing on, with the descriptions that hold them.
#[derive(Debug, Default)]
pub struct LeasedFiles(BTreeMap<Identity, File>);

impl LeasedFiles {
    pub(crate) fn insert(&mut self, metadata: &Metadata, description: OwnedFd) {
        self.0.insert(identity(metadata), description.into());
    }

    pub(crate) fn of_file(&self, metadata: &Metadata) -> Option<&File> {
        self.0.get(&identity(metadata))
    }

    pub(super) fn get(&self, identity: Identity) -> Option<&File> {
        self.0.get(&identity)
    }
}

fn identity(metadata: &Metadata) -> Identity {
    let device = metadata.dev();
    (libc::major(device), libc::minor(device), metadata.ino())
}

/// Whether a description can be read from.
pub(crate) fn is_readable(description: impl AsFd) -> io::Result<bool> {
    let mode = rustix::fs::fcntl_getfl(description)? & rustix::fs::OFlags::ACCMODE;
    Ok(mode != rustix::fs::OFlags::WRONLY)
}

/// Where a file that has holes has data, found by its content. The whole file where it has more stretches than are kept.
pub(super) fn segments_by_content(file: &File, size: u64) -> io::Result<Vec<Segment>> {
    const BLOCK_BYTES: usize = 4096;
    let mut found: Vec<Segment> = Vec::new();
    let mut block = [0; BLOCK_BYTES];
    let mut offset = 0;
    while offset < size {
        let length = (size - offset).min(BLOCK_BYTES as u64);
        let bytes = usize::try_from(length).expect("at most a block");
        let block = block.get_mut(..bytes).expect("at most a block");
        file.read_exact_at(block, offset)?;
        if block.iter().any(|byte| *byte != 0) {
            let is_full = found.len() == SEGMENTS_MAX;
            match found.last_mut() {
                Some(last) if last.offset + last.length == offset => last.length += length,
                _ if is_full => return Ok(vec![Segment { offset: 0, length: size }]),
                _ => found.push(Segment { offset, length }),
            }
        }
        offset += length;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A byte that is taken for a hole is lost.
    #[test]
    fn all_that_is_not_zero_is_data() {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(5 * 4096 + 7).expect("a size");
        for offset in [4095, 4096, 3 * 4096, 5 * 4096 + 6] {
            file.write_all_at(b"x", offset).expect("written");
        }
        let found = segments_by_content(&file, 5 * 4096 + 7).expect("read");
        let found: Vec<_> = found.iter().map(|part| (part.offset, part.length)).collect();
        assert_eq!(found, [(0, 8192), (3 * 4096, 4096), (5 * 4096, 7)]);
    }
}
