//! The list of a collection: which capsules an address still has, and which blobs are condemned.
//!
//! A slot of the log names it, and is what makes it binding (`docs/decisions/garbage-collection.md`). From that slot on
//! nobody may commit a capsule that names one of its condemned blobs. The catalogue in it spares readers of an address's
//! history the slots before it.

use serde::{Deserialize, Serialize};

use crate::FORMAT_VERSION;
use crate::digest::Digest;
use crate::log::CapsuleRef;

/// A list takes at most this many bytes: what [`CAPSULES_MAX`] and [`CONDEMNED_MAX`] need.
pub const LIST_BYTES_MAX: usize = 32 << 20;

/// Capsules of an address that a list can name.
pub const CAPSULES_MAX: usize = 50_000;

/// Blobs that one collection condemns at most.
pub const CONDEMNED_MAX: usize = 200_000;

/// Collections that may be unfinished at a time. A writer reads the list of each before it begins.
pub const UNFINISHED_MAX: usize = 64;

/// What a collection decided.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CollectionList {
    /// Version of the format, see [`FORMAT_VERSION`].
    pub format: u32,
    /// Unique to this list, so that no other has its digest.
    pub nonce: String,
    /// The capsules that the address has after the collection, in the order of their commits.
    pub capsules: Vec<Catalogued>,
    /// Blobs that are deleted, in this order; none that one of `capsules` names.
    pub condemned: Vec<Digest>,
    /// Earlier collections that were not seen to end.
    pub unfinished: Vec<Unfinished>,
}

/// A capsule that an address has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Catalogued {
    pub capsule: CapsuleRef,
    /// When the slot that committed it was written, as it tells itself.
    pub committed: String,
}

/// A collection that may still be deleting.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Unfinished {
    /// Digest of its list.
    pub list: Digest,
    /// Size of its list.
    pub bytes: u64,
    /// Number of its slot.
    pub slot: u64,
}

/// Why bytes are no list of a collection, or why one can't be made.
#[derive(Debug, thiserror::Error)]
pub enum ListError {
    #[error("the list of a collection takes {bytes} bytes, of at most {LIST_BYTES_MAX}")]
    TooLarge { bytes: usize },
    #[error(
        "the list of a collection has format version {found}, this samara reads up to {FORMAT_VERSION}; use a newer one"
    )]
    Version { found: u64 },
    #[error("the list of a collection is malformed")]
    Malformed(#[source] serde_json::Error),
    #[error("the list of a collection has {found} {what}, of at most {found_max}")]
    Count { what: &'static str, found: usize, found_max: usize },
}

impl CollectionList {
    /// The list's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, ListError> {
        self.check()?;
        let bytes = serde_json::to_vec(self).map_err(ListError::Malformed)?;
        match bytes.len() {
            0..=LIST_BYTES_MAX => Ok(bytes),
            bytes => Err(ListError::TooLarge { bytes }),
        }
    }

    /// Reads a list. One of a newer format is refused by its version.
    pub fn decode(bytes: &[u8]) -> Result<CollectionList, ListError> {
        #[derive(Deserialize)]
        struct Version {
            format: u64,
        }
        if bytes.len() > LIST_BYTES_MAX {
            return Err(ListError::TooLarge { bytes: bytes.len() });
        }
        let Version { format } = serde_json::from_slice(bytes).map_err(ListError::Malformed)?;
        if format != u64::from(FORMAT_VERSION) {
            return Err(ListError::Version { found: format });
        }
        let list: CollectionList = serde_json::from_slice(bytes).map_err(ListError::Malformed)?;
        list.check()?;
        Ok(list)
    }

    fn check(&self) -> Result<(), ListError> {
        for (what, found, found_max) in [
            ("capsules", self.capsules.len(), CAPSULES_MAX),
            ("condemned blobs", self.condemned.len(), CONDEMNED_MAX),
            ("unfinished collections", self.unfinished.len(), UNFINISHED_MAX),
        ] {
            if found > found_max {
                return Err(ListError::Count { what, found, found_max });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> CollectionList {
        let digest = Digest::of(b"blob");
        CollectionList {
            format: FORMAT_VERSION,
            nonce: "0123456789abcdef".into(),
            capsules: vec![Catalogued {
                capsule: CapsuleRef { digest, bytes: 9, slot: 4 },
                committed: "2026-01-02T03:04:05Z".into(),
            }],
            condemned: vec![digest],
            unfinished: vec![Unfinished { list: digest, bytes: 7, slot: 2 }],
        }
    }

    #[test]
    fn a_list_comes_back() {
        assert_eq!(CollectionList::decode(&sample().encode().unwrap()).unwrap(), sample());
        let refused = CollectionList::decode(br#"{"format": 2, "else": 1}"#).unwrap_err();
        assert!(matches!(refused, ListError::Version { found: 2 }));
    }

    /// A collection could condemn what it cannot write down, and never end.
    #[test]
    fn the_largest_list_can_be_written() {
        let mut list = sample();
        let (capsule, unfinished) = (list.capsules[0].clone(), list.unfinished[0]);
        let capsule = Catalogued {
            capsule: CapsuleRef { bytes: u64::MAX, slot: u64::MAX, ..capsule.capsule },
            ..capsule
        };
        list.capsules = vec![capsule; CAPSULES_MAX];
        list.condemned = vec![Digest::of(b"blob"); CONDEMNED_MAX];
        list.unfinished = vec![unfinished; UNFINISHED_MAX];
        assert!(list.encode().is_ok());
        list.condemned.push(Digest::of(b"blob"));
        assert!(matches!(list.encode(), Err(ListError::Count { .. })));
    }

    proptest! {
        #[test]
        fn mutated_lists_never_panic(at: usize, value: u8) {
            let mut bytes = sample().encode().unwrap();
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = CollectionList::decode(&bytes);
        }
    }
}
