//! Retention and garbage collection at one address. Why no capsule ever misses a blob: `docs/decisions/garbage-collection.md`.
//!
//! ```text
//! look     the newest slot, the catalogue, the manifests of all capsules, the listing of all blobs
//! condemn  a list of what is to go, and the slot that makes it binding: put-if-absent right behind what was looked at
//! sweep    manifests, then the other blobs
//! end      a slot that says that nothing more will be deleted
//! ```
//!
//! Whoever deletes a blob has condemned it in a slot of his own before. A collection that ends half-way leaves blobs that
//! no capsule names; the next one condemns them again, and deletes them.
//!
//! What this module does not do: it reads no page map, as a manifest names all that its capsule needs; it rewrites
//! nothing; and it deletes no slots.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use samara_capsule::FORMAT_VERSION;
use samara_capsule::collection::{
    CONDEMNED_MAX, Catalogued, CollectionList, ListError, UNFINISHED_MAX, Unfinished,
};
use samara_capsule::digest::Digest;
use samara_capsule::log::{Collection, Event, EventRefused, LogState};
use samara_capsule::manifest::{BlobKind, BlobRef, Manifest};

use crate::log::{LogError, nonce, slot_number, slot_path};
use crate::reader::{CapsuleReader, ReadError};
use crate::store::{Listed, Store, StoreError, blob_path};

/// Blobs that no capsule names are left alone until they are this old: a writer may be about to name them.
pub const GRACE: Duration = Duration::from_secs(24 * 3600);

/// A collection deletes nothing any more once it has taken this long, and leaves the rest to the next one.
const SWEEP_MAX: Duration = Duration::from_secs(3600);

/// An unfinished collection of this age is taken for dead. Until then nothing that it condemned is stored again, so that
/// it may come back from a pause of days and do no harm.
const ABANDONED_AFTER: Duration = Duration::from_secs(7 * 24 * 3600);

/// Somebody committed or collected between a look and its slot: this often in a row, the collection is left for later.
const LOOKS_MAX: usize = 10;

/// Slots behind the last catalogue from which on a new one is written even if nothing is to go: so many are read by
/// whoever wants to know which capsules there are.
const CATALOGUE_SLOTS_MAX: usize = 512;

/// Requests under way at a time.
const REQUESTS_MAX: usize = 16;

/// Manifests in memory at a time while they are read.
const MANIFESTS_MAX: usize = 2;

/// Blobs that are deleted between two looks whether this collection is still in the log and in time.
const SWEEP_BATCH: usize = 256;

/// Which capsules an address keeps, beside the newest one of the open generation, which is always kept.
///
/// A capsule is kept if any of the two says so. If none is given, all are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// So many of the newest.
    pub keep_last: Option<NonZeroU32>,
    /// Those that were committed within this time.
    pub keep_within: Option<Duration>,
}

/// Why a text is no retention.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum RetentionError {
    #[error("{0:?} is no number of capsules to keep: 1 or more")]
    Last(String),
    #[error("{0:?} is no age; write 90m, 12h or 7d")]
    Age(String),
    #[error("{0:?} is none of last=N and within=AGE")]
    Term(String),
}

impl Retention {
    /// The number of capsules, as users write it.
    pub fn parse_last(text: &str) -> Result<NonZeroU32, RetentionError> {
        text.parse().map_err(|_| RetentionError::Last(text.to_owned()))
    }

    /// The age, as users write it: `90m`, `12h`, `7d`.
    pub fn parse_age(text: &str) -> Result<Duration, RetentionError> {
        humantime::parse_duration(text).map_err(|_| RetentionError::Age(text.to_owned()))
    }

    /// Whether every capsule is kept.
    pub fn keeps_all(&self) -> bool {
        self.keep_last.is_none() && self.keep_within.is_none()
    }

    /// For each of `capsules`, which are in the order of their commits, whether it is kept.
    ///
    /// `latest` is the newest of the open generation. A capsule whose time of commit is not known, or lies ahead of `now`,
    /// counts as young.
    fn keeps(&self, capsules: &[Catalogued], latest: Option<Digest>, now: SystemTime) -> Vec<bool> {
        let last =
            self.keep_last.map_or(0, |last| usize::try_from(last.get()).unwrap_or(usize::MAX));
        let first_of_last = capsules.len().saturating_sub(last);
        let is_young = |committed: &str, within: Duration| {
            let committed = humantime::parse_rfc3339_weak(committed).ok();
            let age = committed.and_then(|committed| now.duration_since(committed).ok());
            age.is_none_or(|age| age < within)
        };
        let keep = |(index, one): (usize, &Catalogued)| {
            self.keeps_all()
                || index >= first_of_last
                || latest == Some(one.capsule.digest)
                || self.keep_within.is_some_and(|within| is_young(&one.committed, within))
        };
        capsules.iter().enumerate().map(keep).collect()
    }
}

/// `last=5`, `within=7d`, or both with a comma between them.
impl FromStr for Retention {
    type Err = RetentionError;

    fn from_str(text: &str) -> Result<Retention, RetentionError> {
        let mut retention = Retention::default();
        for term in text.split(',') {
            let twice = || RetentionError::Term(term.to_owned());
            match term.trim().split_once('=') {
                Some(("last", last)) if retention.keep_last.is_none() => {
                    retention.keep_last = Some(Retention::parse_last(last)?);
                }
                Some(("within", age)) if retention.keep_within.is_none() => {
                    retention.keep_within = Some(Retention::parse_age(age)?);
                }
                _ => return Err(twice()),
            }
        }
        Ok(retention)
    }
}

impl fmt::Display for Retention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let last = self.keep_last.map(|last| format!("last={last}"));
        let within = self.keep_within.map(|within| {
            format!("within={}", humantime::format_duration(within).to_string().replace(' ', ""))
        });
        let terms: Vec<String> = last.into_iter().chain(within).collect();
        f.write_str(&terms.join(","))
    }
}

/// How a collection goes about it.
#[derive(Clone, Copy, Debug)]
pub struct CollectOptions {
    /// See [`GRACE`]. It saves writers from being refused; that no capsule misses a blob does not depend on it.
    pub grace: Duration,
    /// Only tell what would be removed.
    pub dry_run: bool,
}

impl Default for CollectOptions {
    fn default() -> CollectOptions {
        CollectOptions { grace: GRACE, dry_run: false }
    }
}

/// What was removed, or would be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Collected {
    /// Capsules that the address has no more, in the order of their commits.
    pub dropped: Vec<Catalogued>,
    /// Capsules that it still has.
    pub kept: Vec<Catalogued>,
    /// Blobs that were removed.
    pub blobs: u64,
    pub bytes: u64,
    /// Blobs that no capsule names and that are too young to be removed.
    pub young_blobs: u64,
    pub young_bytes: u64,
}

/// Why a collection failed. Whatever it has done by then, every capsule that the address has is whole, and the next
/// collection goes on with it.
#[derive(Debug, thiserror::Error)]
pub enum CollectError {
    #[error("there is no capsule at {address}")]
    None { address: String },
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("nothing was removed: what the capsule {digest} needs is not known")]
    Kept { digest: Digest, source: Box<ReadError> },
    #[error("can't read the capsule {digest}")]
    Dropped { digest: Digest, source: Box<ReadError> },
    #[error("can't write down what is to be removed")]
    List(#[from] ListError),
    #[error("{address} was changed {LOOKS_MAX} times while it was looked through; try again")]
    Contended { address: String },
    #[error(
        "{UNFINISHED_MAX} collections of {address} did not end; nothing is removed until the oldest of them is 7 days old"
    )]
    Unfinished { address: String },
    #[error("the rest is left to the next collection: {removed} blobs were removed so far")]
    Late { removed: u64 },
}

/// What an address holds, at one slot of its log.
pub(crate) struct View {
    slot: u64,
    pub(crate) state: LogState,
    pub(crate) capsules: Vec<Catalogued>,
    /// Collections that may still be deleting, the newest last.
    unfinished: Vec<Unfinished>,
    /// Slots that were read because no catalogue has them.
    slots_read: usize,
    /// When each slot was written, by the store's clock.
    written: HashMap<u64, SystemTime>,
}

/// What is to be done about it.
struct Plan {
    keep: Vec<Catalogued>,
    drop: Vec<Catalogued>,
    /// Manifests first.
    condemned: Vec<BlobRef>,
    manifests: usize,
    unfinished: Vec<Unfinished>,
    young: Vec<u64>,
    /// Whether there is something to write down even though nothing is to go.
    renew: bool,
}

impl Store {
    /// The capsules that this address has, in the order of their commits, of all generations.
    pub fn capsules(&self) -> Result<Vec<Catalogued>, LogError> {
        let view = self.block_on(self.read_view())?;
        Ok(view.map(|view| view.capsules).unwrap_or_default())
    }

    /// The list of a collection, which a slot of the log names.
    pub fn collection_list(&self, list: Digest) -> Result<CollectionList, LogError> {
        self.block_on(self.read_list(list))
    }

    /// Removes the capsules that `retention` does not keep, and all blobs that no capsule needs.
    ///
    /// On success all that is told is gone. On error some of it may be; see [`CollectError`]. Neither harms a writer, but
    /// one that relies on a blob that goes is refused when it commits.
    ///
    /// `progress` is told how many blobs are gone, of how many.
    pub fn collect(
        &self,
        retention: &Retention,
        now: SystemTime,
        options: &CollectOptions,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<Collected, CollectError> {
        let address = || self.location().to_string();
        for _ in 0..LOOKS_MAX {
            let view = self.block_on(self.read_view())?;
            let view = view.ok_or_else(|| CollectError::None { address: address() })?;
            let plan = self.block_on(self.plan(&view, retention, now, options.grace))?;
            let nothing = plan.drop.is_empty() && plan.condemned.is_empty() && !plan.renew;
            if options.dry_run || nothing {
                let bytes = plan.condemned.iter().map(|blob| blob.bytes).sum();
                return Ok(plan.outcome(bytes));
            }
            let started = Started::now();
            let condemned = match self.condemn(&view, &plan) {
                Err(CollectError::Log(LogError::Overtaken { .. })) => continue,
                condemned => condemned?,
            };
            let bytes =
                self.sweep(condemned.0, &plan.condemned, plan.manifests, &started, progress)?;
            self.end(condemned)?;
            self.remove_half_written(now, options.grace)?;
            return Ok(plan.outcome(bytes));
        }
        Err(CollectError::Contended { address: address() })
    }

    /// What the address has at its newest slot; `None` if it has no log.
    pub(crate) async fn read_view(&self) -> Result<Option<View>, LogError> {
        let listed = self.list_dated("log").await?;
        let written: HashMap<u64, SystemTime> = listed
            .iter()
            .filter_map(|object| Some((slot_number(&object.name)?, object.modified)))
            .collect();
        let Some(&newest) = written.keys().max() else { return Ok(None) };
        let state = self.read_slot(newest).await?.state;
        let list = match state.collection {
            Some(collection) => Some((collection, self.read_list(collection.list).await?)),
            None => None,
        };
        let (mut capsules, mut unfinished, first) = match list {
            Some((Collection { list: digest, bytes, slot, swept, .. }, list)) => {
                let mut unfinished = list.unfinished;
                if !swept {
                    unfinished.push(Unfinished { list: digest, bytes, slot });
                }
                (list.capsules, unfinished, slot + 1)
            }
            None => (Vec::new(), Vec::new(), 0),
        };
        unfinished.sort_unstable_by_key(|unfinished| unfinished.slot);
        let mut slots: Vec<u64> =
            written.keys().copied().filter(|slot| (first..=newest).contains(slot)).collect();
        slots.sort_unstable();
        let slots_read = slots.len();
        let reads = futures::stream::iter(slots).map(|slot| self.read_slot(slot));
        let mut reads = reads.buffered(REQUESTS_MAX);
        while let Some(slot) = reads.try_next().await? {
            if let Event::Capsule { manifest } = slot.event {
                capsules.push(Catalogued { capsule: manifest, committed: slot.created });
            }
        }
        // The same capsule may have been imported twice; it is as new as its newest commit.
        let mut seen = HashSet::new();
        capsules.reverse();
        capsules.retain(|one| seen.insert(one.capsule.digest));
        capsules.reverse();
        Ok(Some(View { slot: newest, state, capsules, unfinished, slots_read, written }))
    }

    /// The lists of collections that somebody may need: the newest, and those of collections that did not end.
    pub(crate) async fn needed_lists(&self) -> Result<HashSet<Digest>, LogError> {
        let Some(newest) = self.read_head().await?.state.collection else {
            return Ok(HashSet::new());
        };
        let unfinished = self.read_list(newest.list).await?.unfinished;
        Ok(unfinished.iter().map(|one| one.list).chain([newest.list]).collect())
    }

    async fn plan(
        &self,
        view: &View,
        retention: &Retention,
        now: SystemTime,
        grace: Duration,
    ) -> Result<Plan, CollectError> {
        let latest = view.state.latest.map(|latest| latest.digest);
        let keeps = retention.keeps(&view.capsules, latest, now);
        let split = |wanted: bool| -> Vec<Catalogued> {
            let both = view.capsules.iter().zip(&keeps);
            both.filter(|(_, keep)| **keep == wanted).map(|(one, _)| one.clone()).collect()
        };
        let (keep, drop) = (split(true), split(false));

        let listed = self.list_dated("blobs/sha256").await?;
        let mut live: HashSet<Digest> = HashSet::new();
        for (digest, manifest) in self.manifests(&keep).await {
            let manifest = manifest
                .map_err(|source| CollectError::Kept { digest, source: Box::new(source) })?;
            live.insert(digest);
            live.extend(manifest.blobs().map(|(_, blob)| blob.digest));
        }
        let mut ranks: HashMap<Digest, Rank> = HashMap::new();
        for (digest, manifest) in self.manifests(&drop).await {
            match manifest {
                Ok(manifest) => {
                    for (kind, blob) in manifest.blobs() {
                        ranks.insert(blob.digest, Rank::of(kind));
                    }
                }
                // What a damaged one named is collected as what nobody names.
                Err(error) if error.is_damage() => {}
                Err(source) => {
                    return Err(CollectError::Dropped { digest, source: Box::new(source) });
                }
            }
            ranks.insert(digest, Rank::Manifest);
        }
        for one in &view.unfinished {
            for digest in self.read_list(one.list).await?.condemned {
                ranks.entry(digest).or_insert(Rank::Unfinished);
            }
        }
        let store_now = view.written.values().chain(listed.iter().map(|object| &object.modified));
        let unfinished = view.unfinished_at(store_now.max().copied());
        live.extend(unfinished.iter().map(|one| one.list));

        let mut young = Vec::new();
        let mut condemned = Vec::new();
        for Listed { name, bytes, modified } in &listed {
            let Ok(digest) = Digest::from_hex(name) else { continue };
            if live.contains(&digest) {
                continue;
            }
            let age = now.duration_since(*modified).unwrap_or_default();
            match ranks.get(&digest) {
                Some(rank) => condemned.push((*rank, BlobRef { digest, bytes: *bytes })),
                None if age >= grace => {
                    condemned.push((Rank::Nameless, BlobRef { digest, bytes: *bytes }));
                }
                // The newest list is nobody's garbage yet.
                None if view.state.collection.is_some_and(|newest| newest.list == digest) => {}
                None => young.push(*bytes),
            }
        }
        // A list that is in force only until this collection replaces it is no reason for one.
        let newest_list = view.state.collection.map(|newest| newest.list);
        if drop.is_empty() && condemned.iter().all(|(_, blob)| Some(blob.digest) == newest_list) {
            condemned.clear();
        }
        condemned.sort_unstable();
        condemned.truncate(CONDEMNED_MAX);
        let manifests = condemned.partition_point(|(rank, _)| *rank == Rank::Manifest);
        let renew = view.slots_read > CATALOGUE_SLOTS_MAX || unfinished != view.unfinished;
        let condemned = condemned.into_iter().map(|(_, blob)| blob).collect();
        Ok(Plan { keep, drop, condemned, manifests, unfinished, young, renew })
    }

    /// The manifests of `capsules`, in no promised order.
    pub(crate) async fn manifests(
        &self,
        capsules: &[Catalogued],
    ) -> Vec<(Digest, Result<Manifest, ReadError>)> {
        let loads = futures::stream::iter(capsules).map(|one| async move {
            let digest = one.capsule.digest;
            (digest, CapsuleReader::load_manifest(self, digest).await)
        });
        loads.buffer_unordered(MANIFESTS_MAX).collect().await
    }

    /// Makes the plan binding. Returns the slot that does, and the state after it.
    fn condemn(&self, view: &View, plan: &Plan) -> Result<(u64, LogState), CollectError> {
        let address = || self.location().to_string();
        if plan.unfinished.len() >= UNFINISHED_MAX {
            return Err(CollectError::Unfinished { address: address() });
        }
        let list = CollectionList {
            format: FORMAT_VERSION,
            nonce: nonce()?,
            capsules: plan.keep.clone(),
            condemned: plan.condemned.iter().map(|blob| blob.digest).collect(),
            unfinished: plan.unfinished.clone(),
        };
        let content = list.encode()?;
        let BlobRef { digest: list, bytes } = BlobRef::to(&content);
        self.block_on(self.put(&blob_path(&list), Bytes::from(content)))?;
        let swept = plan.condemned.is_empty();
        let unfinished = u32::try_from(plan.unfinished.len()).expect("their number is bounded");
        Ok(self.append_beside(
            view.slot,
            (view.slot + 1, view.state),
            |state, slot| {
                let collection = Collection { list, bytes, slot, swept, unfinished };
                Ok((Event::Collect { collection }, state.collected(collection)))
            },
            |slot, found| match found.event {
                // A new capsule may name what is about to be condemned; a collection has another catalogue, or another end.
                Event::Capsule { .. } | Event::Collect { .. } | Event::Swept { .. } => {
                    Err(LogError::Overtaken { address: address(), slot })
                }
                Event::Start { .. } | Event::Close | Event::FailedResume { .. } => Ok(()),
            },
        )?)
    }

    /// Deletes what slot `slot` condemns, the first `manifests` before the rest, and returns how many bytes that were.
    fn sweep(
        &self,
        slot: u64,
        condemned: &[BlobRef],
        manifests: usize,
        started: &Started,
        progress: &(dyn Fn(u64, u64) + Sync),
    ) -> Result<u64, CollectError> {
        let (mut removed, mut bytes) = (0, 0);
        let (first, then) = condemned.split_at(manifests);
        for batch in first.chunks(SWEEP_BATCH).chain(then.chunks(SWEEP_BATCH)) {
            // A removed address may be somebody's new one; and who is late may be taken for dead.
            if !self.block_on(self.exists(&slot_path(slot)))? {
                return Err(LogError::Removed { address: self.location().to_string() }.into());
            }
            if started.is_longer_ago_than(SWEEP_MAX) {
                return Err(CollectError::Late { removed });
            }
            self.block_on(async {
                let deletes = futures::stream::iter(batch).map(|blob| async move {
                    self.delete(&blob_path(&blob.digest)).await?;
                    Ok::<_, StoreError>(blob.bytes)
                });
                let mut deletes = deletes.buffer_unordered(REQUESTS_MAX);
                while let Some(gone) = deletes.try_next().await? {
                    removed += 1;
                    bytes += gone;
                    progress(removed, condemned.len() as u64);
                }
                Ok::<_, StoreError>(())
            })?;
        }
        Ok(bytes)
    }

    /// Tells that the collection of slot `slot` deletes nothing more. If another one has begun, that one keeps it among the
    /// unfinished, which costs nobody anything.
    fn end(&self, (slot, state): (u64, LogState)) -> Result<(), CollectError> {
        if state.collection.is_some_and(|collection| collection.swept) {
            return Ok(());
        }
        let swept =
            |state: &LogState, _| Ok((Event::Swept { collection: slot }, state.swept(slot)?));
        match self.append_beside(slot, (slot + 1, state), swept, |_, _| Ok(())) {
            Ok(_) | Err(LogError::Refused { source: EventRefused::Superseded { .. }, .. }) => {
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    /// What an interrupted write leaves in a folder is in no listing: a file with a `#` behind the blob's name.
    fn remove_half_written(&self, now: SystemTime, grace: Duration) -> Result<(), CollectError> {
        let Some(folder) = self.location().as_folder() else { return Ok(()) };
        let failed = |source| StoreError::Folder { location: self.location().clone(), source };
        let entries = match std::fs::read_dir(folder.join("blobs/sha256")) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let entry = entry.map_err(failed)?;
            if !entry.file_name().to_string_lossy().contains('#') {
                continue;
            }
            // Its writer may end it, or take it back, at any moment.
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let age = modified.ok().and_then(|modified| now.duration_since(modified).ok());
            if age.is_some_and(|age| age >= grace) {
                match std::fs::remove_file(entry.path()) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(failed(error).into());
                    }
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

impl View {
    /// The collections that may still be deleting at `store_now`, a time by the store's clock that is past for certain.
    fn unfinished_at(&self, store_now: Option<SystemTime>) -> Vec<Unfinished> {
        let is_abandoned = |one: &Unfinished| {
            let written = self.written.get(&one.slot);
            let age = written.zip(store_now).and_then(|(at, now)| now.duration_since(*at).ok());
            age.is_some_and(|age| age >= ABANDONED_AFTER)
        };
        self.unfinished.iter().copied().filter(|one| !is_abandoned(one)).collect()
    }
}

impl Plan {
    fn outcome(self, bytes: u64) -> Collected {
        Collected {
            blobs: self.condemned.len() as u64,
            bytes,
            young_blobs: self.young.len() as u64,
            young_bytes: self.young.iter().sum(),
            dropped: self.drop,
            kept: self.keep,
        }
    }
}

/// The order in which blobs are deleted, reverse to that in which a writer stores them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Manifest,
    Config,
    Records,
    PageMap,
    Stream,
    Pack,
    /// Left by a collection that did not end.
    Unfinished,
    /// Left by a writer that did not commit, or by a collection as its list.
    Nameless,
}

impl Rank {
    fn of(kind: BlobKind) -> Rank {
        match kind {
            BlobKind::Config => Rank::Config,
            BlobKind::Records => Rank::Records,
            BlobKind::PageMap => Rank::PageMap,
            BlobKind::Stream => Rank::Stream,
            BlobKind::Pack => Rank::Pack,
        }
    }
}

/// An instant by two clocks: one of them goes on while the machine sleeps, the other can't be set.
struct Started {
    monotonic: Instant,
    wall: SystemTime,
}

impl Started {
    fn now() -> Started {
        Started { monotonic: Instant::now(), wall: SystemTime::now() }
    }

    fn is_longer_ago_than(&self, limit: Duration) -> bool {
        self.monotonic.elapsed() > limit || self.wall.elapsed().is_ok_and(|elapsed| elapsed > limit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use samara_capsule::log::CapsuleRef;

    #[test]
    fn retention_is_read_and_shown() {
        let retention = |last, hours: Option<u64>| Retention {
            keep_last: NonZeroU32::new(last),
            keep_within: hours.map(|hours| Duration::from_secs(hours * 3600)),
        };
        for (text, expected, shown) in [
            ("last=5", retention(5, None), "last=5"),
            ("within=12h", retention(0, Some(12)), "within=12h"),
            ("within=2d, last=1", retention(1, Some(48)), "last=1,within=2days"),
        ] {
            assert_eq!(text.parse(), Ok(expected));
            assert_eq!(expected.to_string(), shown);
            assert_eq!(shown.parse(), Ok(expected));
        }
        let refused = |text: &str| text.parse::<Retention>().unwrap_err();
        assert_eq!(refused("last=0"), RetentionError::Last("0".into()));
        assert_eq!(refused("within=soon"), RetentionError::Age("soon".into()));
        for text in ["", "last", "first=1", "last=1,last=2", "last=1,"] {
            assert!(matches!(refused(text), RetentionError::Term(_)), "{text}");
        }
    }

    /// A capsule committed at each of `ages`, in seconds before [`now`], and their digests.
    fn capsules(ages: &[u64]) -> Vec<Catalogued> {
        let one = |(slot, age): (usize, &u64)| Catalogued {
            capsule: CapsuleRef {
                digest: Digest::of(&slot.to_le_bytes()),
                bytes: 1,
                slot: slot as u64,
            },
            committed: crate::log::rfc3339(now() - Duration::from_secs(*age)),
        };
        ages.iter().enumerate().map(one).collect()
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
    }

    /// What can't be dated would be lost by a clock that is wrong, or by a writer of another version.
    #[test]
    fn what_has_no_known_age_is_kept() {
        let retention = Retention { keep_last: None, keep_within: Some(Duration::from_secs(10)) };
        let mut capsules = capsules(&[100, 100, 5]);
        capsules[0].committed = "yesterday".into();
        let early = now() - Duration::from_secs(1000);
        assert_eq!(retention.keeps(&capsules, None, now()), [true, false, true]);
        assert_eq!(retention.keeps(&capsules, None, early), [true, true, true]);
    }

    proptest! {
        /// A capsule would go that the policy keeps, or the one from which the job goes on.
        #[test]
        fn exactly_what_the_policy_names_is_kept(
            mut ages in proptest::collection::vec(0u64..1000, 0..20),
            keep_last in 0u32..25,
            within in proptest::option::of(0u64..1000),
            latest: Option<prop::sample::Index>,
        ) {
            ages.sort_unstable_by(|a, b| b.cmp(a));
            let capsules = capsules(&ages);
            let latest = latest.filter(|_| !ages.is_empty()).map(|latest| latest.index(ages.len()));
            let retention = Retention {
                keep_last: NonZeroU32::new(keep_last),
                keep_within: within.map(Duration::from_secs),
            };
            let kept = retention.keeps(&capsules, latest.map(|i| capsules[i].capsule.digest), now());
            for (index, keep) in kept.into_iter().enumerate() {
                let is_last = index + (keep_last as usize) >= ages.len();
                let is_young = within.is_some_and(|within| ages[index] < within);
                let expected = (keep_last == 0 && within.is_none())
                    || (keep_last > 0 && is_last) || is_young || latest == Some(index);
                prop_assert_eq!(keep, expected, "{}", index);
            }
        }
    }
}
