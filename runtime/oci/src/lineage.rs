//! What one capture leaves for the next: the trackers of the container's memory, where its files are stored, and which capsule it was that
//! they began with, so that the next capsule has only what changed; and the calls that the kernel goes on with, whose number nobody else
//! can tell then.
//!
//! It lives in descriptors: the trackers, and a file in memory with the notes. The container's monitor keeps them and does not look at
//! them. A worker that dies takes them along, and a monitor too; then the next capsule is a full one.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};

use samara_capsule::digest::Digest;
use samara_engine::files::FileNotes;
use samara_engine::tracking::{Notes, Tracking};
use samara_store::{CapsuleReader, Store};
use serde::{Deserialize, Serialize};

use crate::hand_over;

/// Trackers that are handed over at most: about half of the descriptors that a process may have where nobody raised the limit.
const TRACKERS_MAX: usize = 500;

/// Notes of more bytes are not kept: a full capsule is faster then.
const NOTES_BYTES_MAX: u64 = 16 << 20;

/// The container's memory since its last capsule.
#[derive(Debug, Default)]
pub(crate) struct Lineage {
    last: Option<Last>,
    pub(crate) tracking: Tracking,
    pub(crate) files: FileNotes,
}

/// The capsule that tracking began with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Last {
    address: String,
    manifest: Digest,
}

/// What is in the file.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    last: Option<Last>,
    notes: Notes,
    #[serde(default)]
    files: FileNotes,
}

impl Lineage {
    /// Receives what was left: `count` descriptors. What can't be understood counts as nothing.
    pub(crate) fn receive(socket: impl AsFd, count: usize) -> io::Result<Lineage> {
        let mut fds = Vec::with_capacity(count);
        while fds.len() < count {
            let some = hand_over::receive(&socket)?;
            if some.is_empty() {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            fds.extend(some);
        }
        let mut fds = fds.into_iter();
        let Some(notes) = fds.next() else { return Ok(Lineage::default()) };
        match read(notes) {
            Ok(Kept { last, notes, files }) => {
                let tracking = Tracking::from_parts(notes, fds.collect());
                Ok(Lineage { last, tracking, files })
            }
            Err(error) => {
                tracing::warn!(%error, "what the last capture left can't be read");
                Ok(Lineage::default())
            }
        }
    }

    /// That of a container which has been brought back from a capsule. Of its files nothing is known: they are others, and their times
    /// are those of the restore. The next capture reads them while the container runs, cuts them as they were cut, and stores none of
    /// them again.
    pub(crate) fn of_restored(address: &str, manifest: Digest, tracking: Tracking) -> Lineage {
        let last = Some(Last { address: address.to_owned(), manifest });
        Lineage { last, tracking, files: FileNotes::default() }
    }

    /// Leaves everything for the next capture, as the worker of one.
    pub(crate) fn leave(self, socket: impl AsFd) -> io::Result<()> {
        let fds = self.into_descriptors()?;
        fds.chunks(hand_over::AT_ONCE).try_for_each(|some| hand_over::send(&socket, some))
    }

    /// What the monitor keeps; nothing where there is nothing to gain.
    pub(crate) fn into_descriptors(self) -> io::Result<Vec<OwnedFd>> {
        let (notes, trackers) = self.tracking.into_parts(TRACKERS_MAX);
        if notes.is_empty() && self.files.is_empty() {
            return Ok(Vec::new());
        }
        let mut file = File::from(rustix::fs::memfd_create(
            "samara-lineage",
            rustix::fs::MemfdFlags::CLOEXEC,
        )?);
        let kept = Kept { last: self.last, notes, files: self.files };
        file.write_all(&serde_json::to_vec(&kept)?)?;
        if file.stream_position()? > NOTES_BYTES_MAX {
            return Ok(Vec::new());
        }
        Ok(std::iter::once(file.into()).chain(trackers).collect())
    }

    /// The capsule that the next one at `address` continues, where `newest` is the newest there.
    pub(crate) fn parent_at(
        &self,
        store: &Store,
        address: &str,
        newest: Option<Digest>,
    ) -> Option<CapsuleReader> {
        let last = self.last.as_ref()?;
        if last.address != address || newest != Some(last.manifest) {
            return None;
        }
        CapsuleReader::open_digest(store, last.manifest)
            .inspect_err(|error| tracing::warn!(%error, "the next capsule is a full one"))
            .ok()
    }

    /// A capsule was committed; `files` is where it has the container's files.
    pub(crate) fn committed(&mut self, address: &str, manifest: Digest, files: FileNotes) {
        self.tracking.committed();
        self.files = files;
        self.last = Some(Last { address: address.to_owned(), manifest });
    }
}

fn read(file: OwnedFd) -> io::Result<Kept> {
    let mut file = File::from(file);
    file.rewind()?;
    let mut text = Vec::new();
    file.take(NOTES_BYTES_MAX).read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}
