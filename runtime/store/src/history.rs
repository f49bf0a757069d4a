//! What an address has: its capsules in order, and who holds which of its bytes.
//!
//! Both read manifests, and no page map.

use std::collections::{HashMap, HashSet};

use samara_capsule::collection::Catalogued;
use samara_capsule::config::CapsuleConfig;
use samara_capsule::digest::Digest;

use crate::log::LogError;
use crate::reader::{CapsuleReader, ReadError};
use crate::store::{Store, StoreError};

/// One capsule of an address's history.
#[derive(Debug)]
pub struct Told {
    pub catalogued: Catalogued,
    /// Whether it is the newest of the open generation, from which a start would go on.
    pub is_latest: bool,
    /// What it tells of itself, or why it can't be read.
    pub capsule: Result<ToldCapsule, ReadError>,
}

/// What a capsule tells of itself.
#[derive(Clone, Debug)]
pub struct ToldCapsule {
    pub config: CapsuleConfig,
    /// Bytes of all its blobs but the manifest.
    pub stored_bytes: u64,
    /// Bytes of its blobs, the manifest too, that none of the capsules before it names. What its save really uploaded may
    /// have been more, if those it shared them with are gone, or less, if it found blobs that nobody named.
    pub new_bytes: u64,
}

/// Who holds which bytes of an address.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// In the order of their commits.
    pub capsules: Vec<CapsuleUsage>,
    /// Blobs that no capsule names: of saves that are under way, and of those that failed.
    pub unreferenced_blobs: u64,
    pub unreferenced_bytes: u64,
    /// Lists of collections that are still needed.
    pub list_bytes: u64,
    /// Bytes of all blobs.
    pub total_bytes: u64,
}

/// The bytes of one capsule, its manifest among them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CapsuleUsage {
    pub catalogued: Catalogued,
    /// Bytes that would be free without it.
    pub alone_bytes: u64,
    /// Bytes that others need too.
    pub shared_bytes: u64,
}

/// Why it is not known what an address has.
#[derive(Debug, thiserror::Error)]
pub enum HistoryError {
    #[error("there is no capsule at {address}")]
    None { address: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("what the capsule {digest} needs is not known")]
    Unknown { digest: Digest, source: Box<ReadError> },
}

impl Store {
    /// All capsules that this address has, of all generations, in the order of their commits. One that can't be read hides
    /// no other.
    pub fn history(&self) -> Result<Vec<Told>, HistoryError> {
        let (capsules, latest) = self.catalogue()?;
        let mut seen = HashSet::new();
        let tell = |catalogued: Catalogued| {
            let digest = catalogued.capsule.digest;
            let capsule = CapsuleReader::open_digest(self, digest).map(|reader| {
                let blobs: HashSet<_> = reader.manifest().blobs().map(|(_, blob)| blob).collect();
                let new_blobs = blobs.into_iter().filter(|blob| seen.insert(blob.digest));
                let new_bytes = new_blobs.map(|blob| blob.bytes).sum::<u64>();
                ToldCapsule {
                    config: reader.config().clone(),
                    stored_bytes: reader.manifest().stored_bytes(),
                    new_bytes: new_bytes + catalogued.capsule.bytes,
                }
            });
            Told { is_latest: latest == Some(digest), catalogued, capsule }
        };
        Ok(capsules.into_iter().map(tell).collect())
    }

    /// Who holds which bytes of this address.
    pub fn usage(&self) -> Result<Usage, HistoryError> {
        let (capsules, _) = self.catalogue()?;
        let mut needs: HashMap<Digest, HashMap<Digest, u64>> = HashMap::new();
        for (digest, manifest) in self.block_on(self.manifests(&capsules)) {
            let manifest = manifest
                .map_err(|source| HistoryError::Unknown { digest, source: Box::new(source) })?;
            let blobs = manifest.blobs().map(|(_, blob)| (blob.digest, blob.bytes)).collect();
            needs.insert(digest, blobs);
        }
        for one in &capsules {
            needs
                .entry(one.capsule.digest)
                .or_default()
                .insert(one.capsule.digest, one.capsule.bytes);
        }
        let mut holders: HashMap<Digest, u32> = HashMap::new();
        for digest in needs.values().flat_map(HashMap::keys) {
            *holders.entry(*digest).or_default() += 1;
        }
        let mut usage = Usage::default();
        for catalogued in capsules {
            let (mut alone_bytes, mut shared_bytes) = (0, 0);
            for (digest, bytes) in needs.get(&catalogued.capsule.digest).into_iter().flatten() {
                match holders.get(digest) {
                    Some(1) => alone_bytes += bytes,
                    _ => shared_bytes += bytes,
                }
            }
            usage.capsules.push(CapsuleUsage { catalogued, alone_bytes, shared_bytes });
        }
        let lists = self.block_on(self.needed_lists())?;
        for (name, bytes) in self.block_on(self.list("blobs/sha256"))? {
            usage.total_bytes += bytes;
            let digest = Digest::from_hex(&name).ok();
            match digest {
                Some(digest) if holders.contains_key(&digest) => {}
                Some(digest) if lists.contains(&digest) => usage.list_bytes += bytes,
                _ => {
                    usage.unreferenced_blobs += 1;
                    usage.unreferenced_bytes += bytes;
                }
            }
        }
        Ok(usage)
    }

    /// The capsules that there are, and which of them is the newest of the open generation.
    fn catalogue(&self) -> Result<(Vec<Catalogued>, Option<Digest>), HistoryError> {
        match self.block_on(self.read_view())? {
            Some(view) => Ok((view.capsules, view.state.latest.map(|latest| latest.digest))),
            None => Err(HistoryError::None { address: self.location().to_string() }),
        }
    }
}
