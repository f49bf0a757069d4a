//! The log of a capsule address: the one order in which starts and capsules of a container happened.
//!
//! The log is a row of slots, numbered without gaps. A slot comes into being by put-if-absent and never changes.
//! Each holds one event and the whole state after it, so that the newest slot alone tells everything: who may commit,
//! what to resume from, how often that failed. Whoever wants to add an event reads the newest slot, computes the next
//! state here and creates the next slot; if somebody else was faster, it starts over with what they wrote. So checking
//! and committing are one atomic step.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::FORMAT_VERSION;
use crate::digest::Digest;

/// A slot takes at most this many bytes.
pub const SLOT_BYTES_MAX: usize = 64 << 10;

/// Texts that others supply for a slot are cut to this many bytes.
pub const SLOT_TEXT_BYTES_MAX: usize = 256;

/// Entries of a start's facts at most.
pub const FACTS_MAX: usize = 16;

/// One slot of the log.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Slot {
    /// Version of the format, see [`FORMAT_VERSION`].
    pub format: u32,
    /// Unique to this slot: tells a writer whose answer was lost that the slot is its own.
    pub nonce: String,
    /// When the slot was written, as RFC 3339 in UTC, by the clock of its writer. For information.
    pub created: String,
    pub event: Event,
    /// The state after the event.
    pub state: LogState,
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum Event {
    /// Somebody took the next epoch. From here on, older epochs can't commit.
    Start { facts: BTreeMap<String, String> },
    /// A capsule was committed.
    Capsule { manifest: CapsuleRef },
    /// The program ended by itself with success: later starts begin anew.
    Close,
    /// The container that was resumed from this capsule failed.
    FailedResume { manifest: Digest, reason: String },
    /// Capsules were dropped and blobs condemned, as the list says that this names.
    Collect { collection: Collection },
    /// The collection of slot `collection` has deleted what it condemned, and will delete nothing more.
    Swept { collection: u64 },
}

/// A committed capsule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapsuleRef {
    pub digest: Digest,
    /// Size of the manifest.
    pub bytes: u64,
    /// Number of the slot that committed it.
    pub slot: u64,
}

/// The newest collection of an address: where its list lies, and whether blobs are still being deleted.
///
/// The list is [`crate::collection::CollectionList`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Collection {
    /// Digest of the list.
    pub list: Digest,
    /// Size of the list.
    pub bytes: u64,
    /// Number of the slot that made it binding.
    pub slot: u64,
    /// Whether all that it condemned itself has been deleted.
    pub swept: bool,
    /// Earlier collections that were not seen to end: what they condemned may still be deleted.
    pub unfinished: u32,
}

impl Collection {
    /// Whether somebody may still be deleting blobs.
    pub fn is_open(&self) -> bool {
        !self.swept || self.unfinished != 0
    }
}

/// What is so after some slot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogState {
    /// Newest epoch that was taken; 0 before the first.
    pub epoch: u64,
    /// Number of the open generation, from 0.
    pub generation: u64,
    /// Newest capsule of the open generation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub latest: Option<CapsuleRef>,
    /// How often resuming from that capsule failed.
    pub failed_resumes: u32,
    /// The newest collection, if there was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub collection: Option<Collection>,
}

/// Why an event can't happen.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum EventRefused {
    #[error(
        "epoch {ours} can't commit: epoch {newest} was taken since, another copy of this container runs"
    )]
    Fenced { ours: u64, newest: u64 },
    #[error("epoch {ours} can't commit: the job of this generation has ended with success")]
    Closed { ours: u64 },
    #[error("the collection of slot {ours} can't end: another one has begun since")]
    Superseded { ours: u64 },
}

/// Why bytes are no slot.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    #[error("a slot of the log takes {bytes} bytes, of at most {SLOT_BYTES_MAX}")]
    TooLarge { bytes: usize },
    #[error(
        "the log has format version {found}, this samara reads up to {FORMAT_VERSION}; use a newer one"
    )]
    Version { found: u64 },
    #[error("a slot of the log is malformed")]
    Malformed(#[source] serde_json::Error),
}

impl LogState {
    /// The state after somebody took the next epoch.
    pub fn started(&self) -> LogState {
        LogState { epoch: self.epoch.saturating_add(1), ..*self }
    }

    /// The state after `epoch` committed `capsule` in the generation that it started in.
    pub fn committed(
        &self,
        epoch: u64,
        generation: u64,
        capsule: CapsuleRef,
    ) -> Result<LogState, EventRefused> {
        self.check(epoch, generation)?;
        Ok(LogState { latest: Some(capsule), failed_resumes: 0, ..*self })
    }

    /// The state after the program of `epoch` ended by itself with success.
    pub fn closed(&self, epoch: u64, generation: u64) -> Result<LogState, EventRefused> {
        self.check(epoch, generation)?;
        Ok(LogState {
            epoch,
            generation: generation.saturating_add(1),
            latest: None,
            failed_resumes: 0,
            collection: self.collection,
        })
    }

    /// The state after a collection, which needs no epoch: it may drop any capsule but the newest of the open generation.
    pub fn collected(&self, collection: Collection) -> LogState {
        LogState { collection: Some(collection), ..*self }
    }

    /// The state after the collection of slot `slot` has deleted what it condemned. Once there is a newer one it can't tell: that one
    /// has counted it among the unfinished.
    pub fn swept(&self, slot: u64) -> Result<LogState, EventRefused> {
        match self.collection {
            Some(newest) if newest.slot == slot => {
                Ok(self.collected(Collection { swept: true, ..newest }))
            }
            _ => Err(EventRefused::Superseded { ours: slot }),
        }
    }

    /// The state after resuming from `capsule` failed in `epoch`. A capsule that is no longer the newest is not counted.
    pub fn resume_failed(
        &self,
        epoch: u64,
        generation: u64,
        capsule: Digest,
    ) -> Result<LogState, EventRefused> {
        self.check(epoch, generation)?;
        let counts = self.latest.is_some_and(|latest| latest.digest == capsule);
        Ok(LogState { failed_resumes: self.failed_resumes.saturating_add(counts.into()), ..*self })
    }

    fn check(&self, epoch: u64, generation: u64) -> Result<(), EventRefused> {
        if epoch != self.epoch {
            return Err(EventRefused::Fenced { ours: epoch, newest: self.epoch });
        }
        match generation == self.generation {
            true => Ok(()),
            false => Err(EventRefused::Closed { ours: epoch }),
        }
    }
}

impl Slot {
    /// The slot's bytes.
    pub fn encode(&self) -> Result<Vec<u8>, SlotError> {
        let bytes = serde_json::to_vec(self).map_err(SlotError::Malformed)?;
        match bytes.len() {
            0..=SLOT_BYTES_MAX => Ok(bytes),
            bytes => Err(SlotError::TooLarge { bytes }),
        }
    }

    /// Reads a slot. One of a newer format is refused by its version.
    pub fn decode(bytes: &[u8]) -> Result<Slot, SlotError> {
        #[derive(Deserialize)]
        struct Version {
            format: u64,
        }
        if bytes.len() > SLOT_BYTES_MAX {
            return Err(SlotError::TooLarge { bytes: bytes.len() });
        }
        let Version { format } = serde_json::from_slice(bytes).map_err(SlotError::Malformed)?;
        if format != u64::from(FORMAT_VERSION) {
            return Err(SlotError::Version { found: format });
        }
        serde_json::from_slice(bytes).map_err(SlotError::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn capsule(slot: u64) -> CapsuleRef {
        CapsuleRef { digest: Digest::of(&slot.to_le_bytes()), bytes: 100, slot }
    }

    #[test]
    fn an_older_epoch_is_fenced() {
        let first = LogState::default().started();
        let second = first.started();
        let refused = second.committed(first.epoch, 0, capsule(1)).unwrap_err();
        assert_eq!(refused, EventRefused::Fenced { ours: 1, newest: 2 });
        assert_eq!(second.closed(1, 0).unwrap_err(), refused);
        assert_eq!(second.committed(2, 0, capsule(1)).unwrap().latest, Some(capsule(1)));
    }

    #[test]
    fn a_closed_generation_takes_no_capsule_and_hides_its_own() {
        let running = LogState::default().started().committed(1, 0, capsule(2)).unwrap();
        let closed = running.closed(1, 0).unwrap();
        assert_eq!(closed.latest, None);
        assert_eq!(
            closed.committed(1, 0, capsule(4)).unwrap_err(),
            EventRefused::Closed { ours: 1 }
        );
        assert_eq!(closed.started().committed(2, 1, capsule(5)).unwrap().latest, Some(capsule(5)));
    }

    #[test]
    fn failed_resumes_count_for_one_capsule() {
        let state = LogState::default().started().committed(1, 0, capsule(2)).unwrap().started();
        let state = state.resume_failed(2, 0, capsule(2).digest).unwrap();
        let state = state.started().resume_failed(3, 0, capsule(2).digest).unwrap();
        assert_eq!(state.failed_resumes, 2);
        assert_eq!(state.resume_failed(3, 0, capsule(9).digest).unwrap().failed_resumes, 2);
        assert_eq!(state.committed(3, 0, capsule(7)).unwrap().failed_resumes, 0);
    }

    fn collection(slot: u64) -> Collection {
        let list = Digest::of(&slot.to_le_bytes());
        Collection { list, bytes: 100, slot, swept: false, unfinished: 0 }
    }

    /// A writer that did not hear of a collection would name what is being deleted.
    #[test]
    fn a_collection_is_remembered_whatever_comes_after_it() {
        let state = LogState::default().started().committed(1, 0, capsule(2)).unwrap();
        let state = state.collected(collection(3));
        assert_eq!(state.latest, Some(capsule(2)), "nothing else changes");
        let after = [
            state.started(),
            state.committed(1, 0, capsule(4)).unwrap(),
            state.resume_failed(1, 0, capsule(2).digest).unwrap(),
            state.closed(1, 0).unwrap(),
        ];
        for state in after {
            assert_eq!(state.collection, Some(collection(3)));
        }
    }

    /// A collection that ends in the name of another would free blobs that the other is about to delete.
    #[test]
    fn only_the_newest_collection_can_end() {
        let state = LogState::default().collected(collection(3));
        assert!(state.collection.unwrap().is_open());
        assert!(!state.swept(3).unwrap().collection.unwrap().is_open());
        let newer = Collection { unfinished: 1, ..collection(5) };
        let state = state.collected(newer);
        assert_eq!(state.swept(3), Err(EventRefused::Superseded { ours: 3 }));
        assert!(state.swept(5).unwrap().collection.unwrap().is_open(), "the older one is not over");
        assert_eq!(LogState::default().swept(0), Err(EventRefused::Superseded { ours: 0 }));
    }

    fn sample() -> Slot {
        Slot {
            format: FORMAT_VERSION,
            nonce: "0123456789abcdef".into(),
            created: "2026-01-02T03:04:05Z".into(),
            event: Event::Capsule { manifest: capsule(3) },
            state: LogState {
                epoch: 2,
                generation: 1,
                latest: Some(capsule(3)),
                failed_resumes: 0,
                collection: Some(collection(1)),
            },
        }
    }

    #[test]
    fn a_slot_comes_back() {
        let events = [
            Event::Start { facts: BTreeMap::from([("engine".into(), "docker".into())]) },
            Event::Capsule { manifest: capsule(3) },
            Event::Close,
            Event::FailedResume { manifest: capsule(3).digest, reason: "exit 1".into() },
            Event::Collect { collection: collection(3) },
            Event::Swept { collection: 3 },
        ];
        for event in events {
            let slot = Slot { event, ..sample() };
            assert_eq!(Slot::decode(&slot.encode().unwrap()).unwrap(), slot);
        }
        assert!(matches!(Slot::decode(br#"{"format": 2}"#), Err(SlotError::Version { found: 2 })));
    }

    proptest! {
        #[test]
        fn mutated_slots_never_panic(at: usize, value: u8) {
            let mut bytes = sample().encode().unwrap();
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = Slot::decode(&bytes);
        }
    }
}
