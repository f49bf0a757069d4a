//! Blobs of a capsule that were read and checked, in memory, so that they need not be read again.
//!
//! Plain data without a store behind it: it outlives the threads that fetched it, which a caller that forks needs.

use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;

use bytes::Bytes;
use samara_capsule::digest::Digest;
use samara_capsule::manifest::BlobRef;

use crate::store::{Store, StoreError};

/// Stored bytes that are kept at most. With the packs that are fetched or decoded meanwhile a reader stays below 256 MiB.
const KEPT_BYTES_MAX: usize = 64 << 20;

/// Checked blobs, by digest. Clones share them.
#[derive(Clone, Default)]
pub struct Kept(Arc<HashMap<Digest, Bytes>>);

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Kept({} blobs)", self.0.len())
    }
}

impl Kept {
    /// A whole blob, checked: a kept one, or from the store.
    pub(crate) async fn blob(&self, store: &Store, blob: BlobRef) -> Result<Bytes, StoreError> {
        match self.get(&blob.digest) {
            Some(content) => Ok(content),
            None => Ok(store.get_blob(blob).await?.into()),
        }
    }

    pub(crate) fn get(&self, digest: &Digest) -> Option<Bytes> {
        self.0.get(digest).cloned()
    }
}

/// What is kept, while it is being read.
#[derive(Default)]
pub(crate) struct Keeping {
    blobs: HashMap<Digest, Bytes>,
    bytes: usize,
}

impl Keeping {
    /// Keeps a checked blob, or gives it back if there is no room for it.
    pub(crate) fn keep(&mut self, digest: Digest, mut content: Vec<u8>) -> Result<(), Vec<u8>> {
        if content.len() > KEPT_BYTES_MAX - self.bytes {
            return Err(content);
        }
        // A buffer that was used before may have more room than this blob needs.
        content.shrink_to_fit();
        self.bytes += content.len();
        self.blobs.insert(digest, content.into());
        Ok(())
    }

    pub(crate) fn end(self) -> Kept {
        Kept(Arc::new(self.blobs))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Memory would grow with the capsule.
    #[test]
    fn no_more_is_kept_than_there_is_room_for() {
        let mut keeping = Keeping::default();
        let blob = vec![7; KEPT_BYTES_MAX / 4 + 1];
        let digests: Vec<Digest> = (0..4u8).map(|number| Digest::of(&[number])).collect();
        let kept =
            digests.iter().filter(|digest| keeping.keep(**digest, blob.clone()).is_ok()).count();
        assert_eq!(kept, 3);
        let kept = keeping.end();
        assert_eq!(kept.get(&digests[0]).unwrap(), blob);
        assert_eq!(kept.get(&digests[3]), None);
    }
}
