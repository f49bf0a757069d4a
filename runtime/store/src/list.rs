//! Finding the capsule addresses under a prefix.
//!
//! An address is a place with a `log/` of slots. Folders are looked through level by level; `log/` and `blobs/` of an
//! address are not, so that the work grows with the number of addresses and not with their size.

use futures::{StreamExt as _, TryStreamExt as _};
use samara_capsule::config::CapsuleConfig;
use samara_capsule::log::LogState;

use crate::location::Location;
use crate::log::slot_number;
use crate::reader::{CapsuleReader, ReadError};
use crate::store::{Store, StoreError};

/// Addresses that one list shows at most.
pub const ADDRESSES_MAX: usize = 100_000;

/// Folders that one list looks into at most.
const FOLDERS_MAX: usize = 1_000_000;

/// Folders lie at most this deep under the prefix.
const DEPTH_MAX: usize = 32;

/// Requests under way at a time.
const REQUESTS_MAX: usize = 16;

/// One capsule address.
#[derive(Debug)]
pub struct Address {
    pub location: Location,
    pub state: LogState,
    /// The newest capsule of the open generation, or why it can't be read.
    pub capsule: Option<Result<Summary, ReadError>>,
}

/// What a list tells about a capsule.
#[derive(Clone, Debug)]
pub struct Summary {
    pub config: CapsuleConfig,
    /// Bytes of all its blobs.
    pub stored_bytes: u64,
}

/// Why a list could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("there are more than {ADDRESSES_MAX} capsules or {FOLDERS_MAX} folders under {location}; use a longer prefix")]
    Crowded { location: Location },
}

impl Store {
    /// The capsule addresses at or under this place, ordered by name.
    ///
    /// A capsule that can't be read doesn't fail the list; the reason stands in its place.
    pub fn addresses(&self) -> Result<Vec<Address>, ListError> {
        self.block_on(async {
            let found = self.find_addresses().await?;
            let described = futures::stream::iter(found).map(|parts| self.at(&parts).describe_address());
            let mut addresses: Vec<Address> = described.buffered(REQUESTS_MAX).try_collect().await?;
            addresses.sort_by_key(|address| address.location.to_string());
            Ok(addresses)
        })
    }

    async fn find_addresses(&self) -> Result<Vec<Vec<String>>, ListError> {
        let crowded = || ListError::Crowded { location: self.location().clone() };
        let mut level = vec![Vec::new()];
        let mut found = Vec::new();
        let mut looked_into = 0;
        for _ in 0..=DEPTH_MAX {
            looked_into += level.len();
            let listed = futures::stream::iter(level).map(|parts: Vec<String>| async move {
                let (folders, _) = self.at(&parts).list_folder("").await?;
                Ok::<_, StoreError>((parts, folders))
            });
            let mut listed = listed.buffered(REQUESTS_MAX);
            let mut next = Vec::new();
            while let Some((parts, folders)) = listed.try_next().await? {
                let mut is_address = false;
                if folders.iter().any(|folder| folder == "log") {
                    let (_, objects) = self.at(&parts).list_folder("log").await?;
                    is_address = objects.iter().any(|name| slot_number(name).is_some());
                }
                for folder in folders {
                    if !(is_address && matches!(folder.as_str(), "log" | "blobs")) {
                        next.push(parts.iter().cloned().chain([folder]).collect());
                    }
                }
                if is_address {
                    found.push(parts);
                }
                if found.len() > ADDRESSES_MAX || looked_into + next.len() > FOLDERS_MAX {
                    return Err(crowded());
                }
            }
            if next.is_empty() {
                return Ok(found);
            }
            level = next;
        }
        Err(crowded())
    }

    async fn describe_address(self) -> Result<Address, ListError> {
        let state = self.read_head().await.map_err(ReadError::Log)?.state;
        let capsule = match state.latest {
            None => None,
            Some(latest) => Some(CapsuleReader::load(&self, latest.digest).await.map(|reader| Summary {
                config: reader.config().clone(),
                stored_bytes: reader.manifest().stored_bytes(),
            })),
        };
        Ok(Address { location: self.location().clone(), state, capsule })
    }
}
