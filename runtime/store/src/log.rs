//! Taking epochs, committing capsules, closing generations: the log of a capsule address.
//!
//! The slots and the state machine are `samara_capsule::log`; here they are read and created. The only conditional write
//! is put-if-absent of the next slot.

use std::collections::{BTreeMap, HashSet};
use std::time::SystemTime;

use bytes::Bytes;
use samara_capsule::FORMAT_VERSION;
use samara_capsule::collection::ListError;
use samara_capsule::digest::Digest;
use samara_capsule::log::{
    CapsuleRef, Event, EventRefused, FACTS_MAX, LogState, SLOT_BYTES_MAX, SLOT_TEXT_BYTES_MAX,
    Slot, SlotError,
};
use samara_capsule::manifest::BlobRef;

use crate::store::{Store, StoreError};

/// Somebody else was faster this often in a row: that is no race but a fault.
const RACES_MAX: usize = 1000;

/// Slots are numbered below this bound: far beyond any log, and far from where the next number would overflow.
const SLOT_END: u64 = 1 << 53;

/// Why an operation on the log failed.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("the log of {object} is not valid")]
    Slot { object: String, source: SlotError },
    #[error("{address}")]
    Refused { address: String, source: EventRefused },
    #[error("slot {slot} of {address} can't be written: others wrote {RACES_MAX} slots in a row")]
    Contended { address: String, slot: u64 },
    #[error("{address} was removed while this epoch was running")]
    Removed { address: String },
    #[error("the list of a collection, {object}, is not valid")]
    List { object: String, source: ListError },
    #[error(
        "the capsule can't be committed at {address}: the collection of slot {slot} removed {digest} while it was written; save again"
    )]
    Condemned { address: String, slot: u64, digest: Digest },
    #[error(
        "the capsule can't be committed at {address}: what the collection of slot {slot} removed is known no longer, as it took too long to write; save again"
    )]
    Outlived { address: String, slot: u64 },
    #[error("slot {slot} of {address} was written by somebody else meanwhile")]
    Overtaken { address: String, slot: u64 },
}

impl LogError {
    /// Whether a newer epoch was taken: this copy of the container must end.
    pub fn is_fenced(&self) -> bool {
        matches!(self, LogError::Refused { source: EventRefused::Fenced { .. }, .. })
    }
}

/// The right to commit at an address, until somebody takes a newer epoch.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    pub epoch: u64,
    pub generation: u64,
    /// Slot of the start. It is there as long as the address is.
    pub start_slot: u64,
    /// The newest slot that is known, and the state after it.
    newest_slot: u64,
    newest: LogState,
}

impl Lease {
    /// The newest state of the log that the holder knows: right after a start, that of the start.
    pub fn state(&self) -> &LogState {
        &self.newest
    }

    /// The newest slot that the holder knows, with the state after it.
    /// Number of the slot behind the newest that the holder knows, with the state before it.
    fn next(&self) -> (u64, LogState) {
        (self.newest_slot + 1, self.newest)
    }
}

/// The newest state of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogHead {
    /// Number of the newest slot, `None` for an empty log.
    pub slot: Option<u64>,
    pub state: LogState,
}

/// What taking an epoch found.
#[derive(Clone, Debug)]
pub struct Started {
    pub lease: Lease,
    /// The capsule to resume from: the newest of the open generation.
    pub latest: Option<CapsuleRef>,
    /// How often resuming from it has failed.
    pub failed_resumes: u32,
}

pub(crate) fn slot_path(slot: u64) -> String {
    format!("log/{slot:020}.json")
}

/// The number of a slot, from the name of its object in `log/`.
pub(crate) fn slot_number(name: &str) -> Option<u64> {
    let digits = name.strip_suffix(".json")?;
    let plain = digits.len() == 20 && digits.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| digits.parse().ok()).flatten().filter(|&slot: &u64| slot < SLOT_END)
}

/// Instants as the format writes them.
pub(crate) fn rfc3339(time: SystemTime) -> String {
    humantime::format_rfc3339_seconds(time).to_string()
}

impl Store {
    /// Numbers of all slots, in ascending order.
    pub fn slots(&self) -> Result<Vec<u64>, StoreError> {
        self.block_on(self.list_slots())
    }

    pub(crate) async fn list_slots(&self) -> Result<Vec<u64>, StoreError> {
        let names = self.list("log").await?;
        let mut slots: Vec<u64> = names.iter().filter_map(|(name, _)| slot_number(name)).collect();
        slots.sort_unstable();
        Ok(slots)
    }

    /// Reads one slot.
    pub fn slot(&self, slot: u64) -> Result<Slot, LogError> {
        self.block_on(self.read_slot(slot))
    }

    pub(crate) async fn read_slot(&self, slot: u64) -> Result<Slot, LogError> {
        let path = slot_path(slot);
        let content = self.get(&path, SLOT_BYTES_MAX).await?;
        Slot::decode(&content)
            .map_err(|source| LogError::Slot { object: self.describe(&path), source })
    }

    /// Reads the newest state.
    pub fn head(&self) -> Result<LogHead, LogError> {
        self.block_on(self.read_head())
    }

    pub(crate) async fn read_head(&self) -> Result<LogHead, LogError> {
        match self.list_slots().await?.last() {
            None => Ok(LogHead { slot: None, state: LogState::default() }),
            Some(&slot) => {
                Ok(LogHead { slot: Some(slot), state: self.read_slot(slot).await?.state })
            }
        }
    }

    /// Takes the next epoch.
    ///
    /// On success nobody with an older epoch can commit any more, and the capsule that is returned stays the newest until
    /// the holder of the lease commits. After an error an epoch may have been taken that nobody uses, which is harmless.
    ///
    /// `facts` describe who starts, for people; at most [`FACTS_MAX`] are kept.
    pub fn take_epoch(&self, facts: &BTreeMap<String, String>) -> Result<Started, LogError> {
        let facts: BTreeMap<_, _> = facts
            .iter()
            .take(FACTS_MAX)
            .map(|(name, fact)| (shorten(name), shorten(fact)))
            .collect();
        let head = self.head()?;
        let next = head.slot.map_or(0, |slot| slot + 1);
        let start =
            |state: &LogState, _| Ok((Event::Start { facts: facts.clone() }, state.started()));
        let (slot, state) = self.append(next, head.state, start, |_, _| Ok(()))?;
        let LogState { epoch, generation, latest, failed_resumes, collection: _ } = state;
        let lease = Lease { epoch, generation, start_slot: slot, newest_slot: slot, newest: state };
        Ok(Started { lease, latest, failed_resumes })
    }

    /// Commits a capsule whose manifest and blobs are all stored. `names` are all of these, the manifest too, and `from` is
    /// the log as it was before the first of them was looked for or stored.
    ///
    /// On success the capsule is the newest of its generation, and no collection deletes anything of it while it is kept.
    /// [`LogError::is_fenced`] tells that a newer epoch was taken; then, and after other errors, it is not visible, except
    /// where the store did not answer: then it may be.
    pub(crate) fn commit(
        &self,
        lease: &mut Lease,
        manifest: BlobRef,
        from: &LogHead,
        names: &HashSet<Digest>,
    ) -> Result<CapsuleRef, LogError> {
        let (epoch, generation) = (lease.epoch, lease.generation);
        let BlobRef { digest, bytes } = manifest;
        let refuse = |slot, found: &Slot| match &found.event {
            Event::Collect { collection } => self.refuse_condemned(slot, collection, names),
            Event::Start { .. }
            | Event::Capsule { .. }
            | Event::Close
            | Event::FailedResume { .. }
            | Event::Swept { .. } => Ok(()),
        };
        // Whatever was condemned since `from` is in one of the slots between there and the free one.
        let next = from.slot.map_or(0, |slot| slot + 1);
        for slot in next..=lease.newest_slot {
            refuse(slot, &self.slot(slot)?)?;
        }
        let from = if next > lease.newest_slot { (next, from.state) } else { lease.next() };
        let capsule = |state: &LogState, slot| {
            let manifest = CapsuleRef { digest, bytes, slot };
            Ok((Event::Capsule { manifest }, state.committed(epoch, generation, manifest)?))
        };
        let slot = self.append_as(lease, from, capsule, refuse)?;
        Ok(CapsuleRef { digest, bytes, slot })
    }

    /// Closes the generation: the program has ended by itself with success, and later starts begin anew.
    pub fn close(&self, lease: &mut Lease) -> Result<(), LogError> {
        let (epoch, generation) = (lease.epoch, lease.generation);
        let close = |state: &LogState, _| Ok((Event::Close, state.closed(epoch, generation)?));
        self.append_as(lease, lease.next(), close, |_, _| Ok(()))?;
        Ok(())
    }

    /// Notes that the container that was resumed from `manifest` failed.
    pub fn note_failed_resume(
        &self,
        lease: &mut Lease,
        manifest: Digest,
        reason: &str,
    ) -> Result<(), LogError> {
        let (epoch, generation) = (lease.epoch, lease.generation);
        let reason = shorten(reason);
        let failed = |state: &LogState, _| {
            let next = state.resume_failed(epoch, generation, manifest)?;
            Ok((Event::FailedResume { manifest, reason: reason.clone() }, next))
        };
        self.append_as(lease, lease.next(), failed, |_, _| Ok(()))?;
        Ok(())
    }

    /// Appends as the holder of a lease, `from` a slot on and the state before it.
    fn append_as(
        &self,
        lease: &mut Lease,
        from: (u64, LogState),
        event: impl Fn(&LogState, u64) -> Result<(Event, LogState), EventRefused>,
        found: impl Fn(u64, &Slot) -> Result<(), LogError>,
    ) -> Result<u64, LogError> {
        let (slot, state) = self.append_beside(lease.start_slot, from, event, found)?;
        lease.newest_slot = slot;
        lease.newest = state;
        Ok(slot)
    }

    /// Appends to a log that has the slot `witness`, and still has it afterwards.
    ///
    /// A log that was removed has no slots, so that an append would succeed where it must not. So a slot that must be there
    /// is looked up before, and after: if it has gone meanwhile, the new slot is taken back.
    pub(crate) fn append_beside(
        &self,
        witness: u64,
        (slot, state): (u64, LogState),
        event: impl Fn(&LogState, u64) -> Result<(Event, LogState), EventRefused>,
        found: impl Fn(u64, &Slot) -> Result<(), LogError>,
    ) -> Result<(u64, LogState), LogError> {
        let witness = slot_path(witness);
        let removed = || LogError::Removed { address: self.location().to_string() };
        if !self.block_on(self.exists(&witness))? {
            return Err(removed());
        }
        let (slot, state) = self.append(slot, state, event, found)?;
        if !self.block_on(self.exists(&witness))? {
            self.block_on(self.delete(&slot_path(slot)))?;
            return Err(removed());
        }
        Ok((slot, state))
    }

    /// Creates the next slot, from `slot` on, where `state` is the state before it. `found` is asked about each slot of
    /// somebody else that is there already, and may end it.
    fn append(
        &self,
        mut slot: u64,
        mut state: LogState,
        event: impl Fn(&LogState, u64) -> Result<(Event, LogState), EventRefused>,
        found: impl Fn(u64, &Slot) -> Result<(), LogError>,
    ) -> Result<(u64, LogState), LogError> {
        for _ in 0..RACES_MAX {
            let refused =
                |source| LogError::Refused { address: self.location().to_string(), source };
            let (event, next) = event(&state, slot).map_err(refused)?;
            let nonce = nonce()?;
            let record = Slot {
                format: FORMAT_VERSION,
                nonce: nonce.clone(),
                created: rfc3339(SystemTime::now()),
                event,
                state: next,
            };
            let path = slot_path(slot);
            let content = record
                .encode()
                .map_err(|source| LogError::Slot { object: self.describe(&path), source })?;
            let Err(error) = self.block_on(self.create(&path, Bytes::from(content))) else {
                return Ok((slot, next));
            };
            // The answer to a write that succeeded may be lost, and its repetition then fails: look who wrote the slot.
            match self.slot(slot) {
                Ok(there) if there.nonce == nonce => return Ok((slot, next)),
                Ok(there) => {
                    found(slot, &there)?;
                    (slot, state) = (slot + 1, there.state);
                }
                // Somebody's slot is there, and it is the reading that failed.
                Err(reading) if matches!(error, StoreError::Exists { .. }) => return Err(reading),
                // Not an answer to the question that matters.
                Err(_) => return Err(error.into()),
            }
        }
        Err(LogError::Contended { address: self.location().to_string(), slot })
    }
}

fn shorten(text: &str) -> String {
    let mut end = text.len().min(SLOT_TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.get(..end).unwrap_or_default().to_owned()
}

pub(crate) fn nonce() -> Result<String, StoreError> {
    let mut random = [0u8; 16];
    getrandom::fill(&mut random).map_err(|_| StoreError::Random)?;
    Ok(format!("{:032x}", u128::from_be_bytes(random)))
}
