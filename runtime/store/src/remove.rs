//! Removing what lies at a capsule address, in an order in which nobody ever sees a capsule whose blobs are missing.
//!
//! First an epoch is taken and the generation closed: from then on no writer can commit and no reader finds a capsule.
//! Then the older slots go, newest first, then the blobs, and last the two slots that kept everybody out. A removal that
//! was interrupted is completed by the next one.

use std::collections::BTreeMap;

use futures::{StreamExt as _, TryStreamExt as _};

use crate::log::{LogError, slot_path};
use crate::store::{Store, StoreError};

/// Requests under way at a time.
const REQUESTS_MAX: usize = 16;

/// What was removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    pub objects: u64,
    pub bytes: u64,
}

/// Why an address could not be removed. What was removed before stays removed, and no capsule is visible.
#[derive(Debug, thiserror::Error)]
pub enum RemoveError {
    #[error("there is no capsule at {address}")]
    None { address: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Log(#[from] LogError),
}

impl Store {
    /// Removes everything at this address. A container that is running on it goes on, but can't commit any more.
    ///
    /// `progress` is told how many objects are gone, of how many.
    pub fn remove(&self, progress: &(dyn Fn(u64, u64) + Sync)) -> Result<Removed, RemoveError> {
        let blobs = self.block_on(self.list("blobs/sha256"))?;
        if self.slots()?.is_empty() && blobs.is_empty() {
            return Err(RemoveError::None { address: self.location().to_string() });
        }
        let facts = BTreeMap::from([("purpose".to_owned(), "removal".to_owned())]);
        let mut lease = self.take_epoch(&facts)?.lease;
        self.close(&mut lease)?;

        let mut slots = self.slots()?;
        let keepers = slots.split_off(slots.partition_point(|&slot| slot < lease.start_slot));
        // Listed again: a writer that was not yet fenced may have added some.
        let blobs = self.block_on(self.list("blobs/sha256"))?;
        let total = (slots.len() + blobs.len() + keepers.len()) as u64;
        let mut removed = Removed::default();
        for slot in slots.into_iter().rev() {
            self.block_on(self.delete(&slot_path(slot)))?;
            removed.objects += 1;
            progress(removed.objects, total);
        }
        self.block_on(async {
            let paths = blobs.iter().map(|(name, bytes)| (format!("blobs/sha256/{name}"), *bytes));
            let deletes = futures::stream::iter(paths).map(|(path, bytes)| async move {
                self.delete(&path).await?;
                Ok::<_, StoreError>(bytes)
            });
            let mut deletes = deletes.buffered(REQUESTS_MAX);
            while let Some(bytes) = deletes.try_next().await? {
                removed.objects += 1;
                removed.bytes += bytes;
                progress(removed.objects, total);
            }
            Ok::<_, StoreError>(())
        })?;
        for slot in keepers {
            self.block_on(self.delete(&slot_path(slot)))?;
            removed.objects += 1;
            progress(removed.objects, total);
        }
        Ok(removed)
    }
}
