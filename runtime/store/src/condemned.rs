//! Blobs that a collection has condemned, as a writer sees them: what it may not name, and how it avoids to.
//!
//! A condemned blob is deleted some time, perhaps long after it has been written again. So a writer never stores one: a
//! blob that would have its digest is stored in another form, which means the same to every reader.

use std::collections::HashSet;
use std::io;

use samara_capsule::collection::{CollectionList, LIST_BYTES_MAX};
use samara_capsule::digest::Digest;
use samara_capsule::frame::FrameEncoder;
use samara_capsule::log::{Collection, LogState};
use samara_capsule::manifest::{BlobKind, BlobRef};
use samara_capsule::pack::{PackBuilder, read_pack};
use samara_capsule::transfer::PAGE_BYTES;

use crate::log::{LogError, LogHead};
use crate::store::{Store, StoreError, blob_path};

/// Between reading the newest slot and reading its list, a collection may have replaced both; this often in a row is a fault.
const READS_MAX: usize = 5;

/// What tells one form of a blob from another.
const SALT_BYTES: usize = 16;

/// Magic number of a skippable zstd frame (RFC 8878, 3.1.2).
const SKIPPABLE_MAGIC: u32 = 0x184D_2A50;

/// Magic, version and size of the body come before the zstd data of a segment (`docs/capsule-format.md`, section 7).
const SEGMENT_HEAD_BYTES: usize = 16;

impl Store {
    /// The newest slot, and all blobs that collections up to it may still be deleting.
    pub(crate) async fn read_condemned(&self) -> Result<(LogHead, HashSet<Digest>), LogError> {
        let mut reads = 0;
        loop {
            reads += 1;
            let head = self.read_head().await?;
            match self.condemned_at(&head.state).await {
                Err(LogError::Store(StoreError::NotFound { .. })) if reads < READS_MAX => {}
                result => return Ok((head, result?)),
            }
        }
    }

    async fn condemned_at(&self, state: &LogState) -> Result<HashSet<Digest>, LogError> {
        let Some(newest) = state.collection.filter(Collection::is_open) else {
            return Ok(HashSet::new());
        };
        let list = self.read_list(newest.list).await?;
        let mut condemned = HashSet::new();
        if !newest.swept {
            condemned.extend(list.condemned);
        }
        for unfinished in list.unfinished {
            condemned.extend(self.read_list(unfinished.list).await?.condemned);
        }
        Ok(condemned)
    }

    pub(crate) async fn read_list(&self, list: Digest) -> Result<CollectionList, LogError> {
        let path = blob_path(&list);
        let content = self.get(&path, LIST_BYTES_MAX).await?;
        self.check_blob(BlobRef { digest: list, bytes: content.len() as u64 }, &content)?;
        CollectionList::decode(&content)
            .map_err(|source| LogError::List { object: self.describe(&path), source })
    }

    /// Refuses a capsule that names what the collection of `slot` condemned.
    pub(crate) fn refuse_condemned(
        &self,
        slot: u64,
        collection: &Collection,
        names: &HashSet<Digest>,
    ) -> Result<(), LogError> {
        let address = || self.location().to_string();
        let list = match self.block_on(self.read_list(collection.list)) {
            // Lists that were replaced are kept as long as blobs of writers that died.
            Err(LogError::Store(StoreError::NotFound { .. })) => {
                return Err(LogError::Outlived { address: address(), slot });
            }
            list => list?,
        };
        match list.condemned.into_iter().find(|digest| names.contains(digest)) {
            Some(digest) => Err(LogError::Condemned { address: address(), slot, digest }),
            None => Ok(()),
        }
    }
}

/// Another blob that means the same to every reader.
pub(crate) fn another_form(kind: BlobKind, content: &[u8]) -> io::Result<Vec<u8>> {
    let mut salt = [0; SALT_BYTES];
    getrandom::fill(&mut salt).map_err(|error| io::Error::other(error.to_string()))?;
    match kind {
        BlobKind::Records | BlobKind::Stream => Ok([&skippable(&salt), content].concat()),
        BlobKind::PageMap => {
            let (head, body) = content.split_at(content.len().min(SEGMENT_HEAD_BYTES));
            Ok([head, &skippable(&salt), body].concat())
        }
        BlobKind::Pack => {
            let mut page = salt.to_vec();
            page.resize(PAGE_BYTES, 0);
            let mut stored = Vec::new();
            let codec = FrameEncoder::new()?.encode(&page, &mut stored)?;
            let mut pack = PackBuilder::new(Vec::with_capacity(content.len() + 256));
            for frame in read_pack(content).map_err(io::Error::other)? {
                let start = frame.offset as usize;
                let bytes = content.get(start..start + frame.stored_bytes as usize);
                let bytes = bytes.expect("the frames of a pack that was read lie inside of it");
                pack.push(frame.codec, bytes, frame.raw_bytes);
            }
            // Behind all others, which stay where they are; no page map names it.
            pack.push(codec, &stored, u32::try_from(PAGE_BYTES).expect("a page is small"));
            Ok(pack.finish())
        }
        // White space behind the value.
        BlobKind::Config => {
            let bits = salt.iter().flat_map(|byte| (0..8).map(move |bit| byte >> bit & 1));
            let blanks = bits.map(|bit| if bit == 0 { b' ' } else { b'\t' });
            Ok(content.iter().copied().chain(blanks).collect())
        }
    }
}

/// A zstd frame without content.
fn skippable(salt: &[u8; SALT_BYTES]) -> [u8; 8 + SALT_BYTES] {
    let mut frame = [0; 8 + SALT_BYTES];
    let (magic, rest) = frame.split_at_mut(4);
    let (bytes, content) = rest.split_at_mut(4);
    magic.copy_from_slice(&SKIPPABLE_MAGIC.to_le_bytes());
    bytes.copy_from_slice(&u32::try_from(SALT_BYTES).expect("a salt is small").to_le_bytes());
    content.copy_from_slice(salt);
    frame
}
