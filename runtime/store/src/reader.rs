//! Reading a capsule: everything is checked against its digest before anything of it is used, packs frame by frame.
//!
//! [`CapsuleReader::check`] reads all blobs before any is used, for who must know that the capsule is whole before it begins
//! something. What is read later than that is checked when it arrives all the same.
//!
//! A transfer fetches each pack that it needs once, a few at a time, and decodes them on several threads. It needs the
//! page maps of the spaces in memory, 16 bytes a run; beyond that memory does not depend on the size of the capsule.
//!
//! Frames of differences are small: they are fetched before the packs in which their bases lie, and applied while a base is decoded
//! anyway. Where there are more of them than there is memory for, the transfer is made in passes over one part of the bases after
//! the other.

use std::collections::{BTreeMap, HashMap, HashSet, VecDeque};
use std::io::{self, Read};
use std::ops::Range;
use std::sync::Mutex;

use bytes::Bytes;
use crossbeam_channel::Receiver;
use futures::StreamExt as _;
use samara_capsule::BLOB_BYTES_MAX;
use samara_capsule::cbor::RECORDS_BYTES_MAX;
use samara_capsule::config::{CapsuleConfig, ConfigError};
use samara_capsule::digest::{Digest, FrameDigest};
use samara_capsule::frame::{BaseFrame, FRAME_PAGES_MAX, FrameDecoder, FrameError};
use samara_capsule::log::CapsuleRef;
use samara_capsule::manifest::{BlobKind, BlobRef, MANIFEST_BYTES_MAX, Manifest, ManifestError};
use samara_capsule::pagemap::{MapFrame, MapRun, PAGE_NUMBER_END, Segment, SegmentError};
use samara_capsule::stream::WINDOW_LOG_MAX;
use samara_capsule::transfer::{
    PAGE_BYTES, PageRun, Place, Source, SpaceId, StoredRun, StreamName,
};
use tokio::task::JoinHandle;

use crate::kept::{Keeping, Kept};
use crate::log::LogError;
use crate::pool::Pool;
use crate::store::{Store, StoreError, blob_path};

/// Packs that are fetched at a time, at least two, less one for each thread that decodes.
const FETCHES_MAX: usize = 6;

/// Threads that decode. Each holds a pack: with those that are fetched or wait, twelve packs are in memory at most,
/// 96 MiB of those that this version writes, 192 MiB of the largest that the format allows.
const DECODERS_MAX: usize = 8;

/// Blobs that [`CapsuleReader::check`] reads at a time: one that arrives for each that is hashed, on two cores.
const CHECKS_MAX: usize = 4;

/// Stored bytes of frames of differences that wait for their bases. Of heaps that is what has changed in gigabytes.
const DELTAS_BYTES_MAX: usize = 32 << 20;

/// Packs from which frames of differences are fetched at a time: each may be in memory as a whole while that lasts.
const DELTA_FETCHES_MAX: usize = 2;

/// Page-map segments that are fetched at a time: their sizes are tens to hundreds of KiB.
const SEGMENT_FETCHES_MAX: usize = 16;

/// Why a capsule could not be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("there is no capsule at {address}")]
    None { address: String },
    #[error("the manifest {digest} is not that of a capsule which can be read")]
    Manifest { digest: Digest, source: ManifestError },
    #[error("the capsule's config {digest} can't be read")]
    Config { digest: Digest, source: ConfigError },
    #[error("the records {digest} of the capsule are damaged")]
    Records { digest: Digest, source: io::Error },
    #[error("the page map {digest} of {space} is damaged")]
    Segment { space: SpaceId, digest: Digest, source: SegmentError },
    #[error("the page map of {space} is damaged: its segments are out of order")]
    SegmentOrder { space: SpaceId },
    #[error(
        "the page map of {space} is damaged: it names the pack {pack}, which the manifest does not"
    )]
    UnknownPack { space: SpaceId, pack: Digest },
    #[error("the pack {pack} is damaged: a frame at {offset} lies outside of it")]
    Frame { pack: Digest, offset: u32 },
    #[error("the pack {pack} is damaged: the frame at {offset} has another digest")]
    FrameDigest { pack: Digest, offset: u32 },
    #[error("the pack {pack} is damaged at the frame at {offset}")]
    FrameContent { pack: Digest, offset: u32, source: FrameError },
    #[error(
        "the page maps are damaged: the frame at {offset} of the pack {pack} has a base that has a base itself"
    )]
    Base { pack: Digest, offset: u32 },
    #[error("the stream {name} is damaged")]
    Stream { name: String, source: io::Error },
    #[error("can't start a thread that decompresses")]
    Thread(#[source] io::Error),
    #[error("can't decompress")]
    Decompress(#[source] io::Error),
    #[error("a thread of the reader ended unexpectedly")]
    Panicked,
}

impl ReadError {
    /// Whether what is stored is not a whole capsule that this version can read: another attempt would find the same.
    pub fn is_damage(&self) -> bool {
        match self {
            ReadError::Store(error) => matches!(
                error,
                StoreError::NotFound { .. }
                    | StoreError::TooLarge { .. }
                    | StoreError::Damaged { .. }
                    | StoreError::Length { .. }
            ),
            ReadError::Log(_)
            | ReadError::None { .. }
            | ReadError::Thread(_)
            | ReadError::Decompress(_)
            | ReadError::Panicked => false,
            ReadError::Manifest { .. }
            | ReadError::Config { .. }
            | ReadError::Records { .. }
            | ReadError::Segment { .. }
            | ReadError::SegmentOrder { .. }
            | ReadError::UnknownPack { .. }
            | ReadError::Frame { .. }
            | ReadError::FrameDigest { .. }
            | ReadError::FrameContent { .. }
            | ReadError::Base { .. }
            | ReadError::Stream { .. } => true,
        }
    }
}

/// One capsule, ready to be read. Manifest and config have been checked.
#[derive(Debug)]
pub struct CapsuleReader {
    store: Store,
    digest: Digest,
    manifest: Manifest,
    config: CapsuleConfig,
    pack_bytes: HashMap<Digest, u64>,
    kept: Kept,
    /// [`DELTAS_BYTES_MAX`], but in tests.
    deltas_bytes_max: usize,
}

impl CapsuleReader {
    /// The newest capsule of the open generation.
    pub fn open_latest(store: &Store) -> Result<CapsuleReader, ReadError> {
        match store.head()?.state.latest {
            Some(latest) => CapsuleReader::open(store, &latest),
            None => Err(ReadError::None { address: store.location().to_string() }),
        }
    }

    /// A capsule that the log names.
    pub fn open(store: &Store, capsule: &CapsuleRef) -> Result<CapsuleReader, ReadError> {
        CapsuleReader::open_digest(store, capsule.digest)
    }

    /// The capsule whose manifest has this digest, whether or not the log names it.
    pub fn open_digest(store: &Store, digest: Digest) -> Result<CapsuleReader, ReadError> {
        store.block_on(CapsuleReader::load(store, digest))
    }

    /// The manifest with this digest.
    pub(crate) async fn load_manifest(
        store: &Store,
        digest: Digest,
    ) -> Result<Manifest, ReadError> {
        let content = store.get(&blob_path(&digest), MANIFEST_BYTES_MAX).await?;
        store.check_blob(BlobRef { digest, bytes: content.len() as u64 }, &content)?;
        Manifest::decode(&content).map_err(|source| ReadError::Manifest { digest, source })
    }

    pub(crate) async fn load(store: &Store, digest: Digest) -> Result<CapsuleReader, ReadError> {
        let manifest = CapsuleReader::load_manifest(store, digest).await?;
        let digest_of_config = manifest.config.digest;
        let config = store.get_blob(manifest.config).await?;
        let config = CapsuleConfig::decode(&config);
        let config =
            config.map_err(|source| ReadError::Config { digest: digest_of_config, source })?;
        let pack_bytes = manifest.packs.iter().map(|pack| (pack.digest, pack.bytes)).collect();
        let kept = Kept::default();
        Ok(CapsuleReader {
            store: store.clone(),
            digest,
            manifest,
            config,
            pack_bytes,
            kept,
            deltas_bytes_max: DELTAS_BYTES_MAX,
        })
    }

    /// Reads all blobs, checks their digests, and keeps what there is room for: [`CapsuleReader::kept`].
    ///
    /// On success the whole capsule was there. What is not kept is fetched again when it is needed, and then checked again.
    ///
    /// # Errors
    /// The first blob that is damaged or can't be read.
    pub fn check(&mut self) -> Result<(), ReadError> {
        let mut seen = HashSet::from([self.manifest.config.digest]);
        let (packs, others): (Vec<_>, Vec<_>) = self
            .manifest
            .blobs()
            .filter(|(_, blob)| seen.insert(blob.digest))
            .partition(|(kind, _)| *kind == BlobKind::Pack);
        let pool = Pool::default();
        // Packs last: what is kept of them is what there is room for.
        let checks = futures::stream::iter(others.into_iter().chain(packs)).map(|(_, blob)| {
            let (store, buffer) = (self.store.for_task(), pool.take());
            let task = AbortOnDrop(self.store.handle().spawn(checked_blob(store, blob, buffer)));
            async move { (blob, task.join().await) }
        });
        let mut checks = checks.buffered(CHECKS_MAX);
        let mut keeping = Keeping::default();
        while let Some((blob, content)) = self.store.block_on(checks.next()) {
            if let Err(content) = keeping.keep(blob.digest, content?) {
                pool.give(content);
            }
        }
        drop(checks);
        self.kept = keeping.end();
        Ok(())
    }

    /// What [`CapsuleReader::check`] has kept.
    pub fn kept(&self) -> Kept {
        self.kept.clone()
    }

    /// Takes from `kept` what it holds, instead of fetching it.
    pub fn with_kept(self, kept: Kept) -> CapsuleReader {
        CapsuleReader { kept, ..self }
    }

    pub(crate) fn store(&self) -> &Store {
        &self.store
    }

    /// Digest of the manifest, which names this capsule.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    pub fn config(&self) -> &CapsuleConfig {
        &self.config
    }

    pub(crate) fn pack_bytes(&self, pack: &Digest) -> Option<u64> {
        self.pack_bytes.get(pack).copied()
    }

    /// The spaces that hold pages, in ascending order.
    pub fn spaces(&self) -> Vec<SpaceId> {
        self.manifest.maps.keys().copied().collect()
    }

    /// The records, as they were passed to the writer.
    pub fn records(&self) -> Result<Vec<u8>, ReadError> {
        let blob = self.manifest.records;
        let content = self.store.block_on(self.kept.blob(&self.store, blob))?;
        let damaged = |source| ReadError::Records { digest: blob.digest, source };
        let mut records = Vec::new();
        let decoder = stream_decoder(content.as_ref()).map_err(damaged)?;
        decoder.take(RECORDS_BYTES_MAX as u64 + 1).read_to_end(&mut records).map_err(damaged)?;
        match records.len() {
            0..=RECORDS_BYTES_MAX => Ok(records),
            _ => Err(damaged(io::Error::other("they are larger than the format allows"))),
        }
    }

    /// Passes the segments of a space in ascending order, while further ones are being fetched.
    pub(crate) fn segments(
        &self,
        space: SpaceId,
        mut take: impl FnMut(Segment) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        self.segments_of([space], |_, segment| take(segment))
    }

    /// As [`CapsuleReader::segments`] for one space after the other, each with its index.
    fn segments_of(
        &self,
        spaces: impl IntoIterator<Item = SpaceId>,
        mut take: impl FnMut(usize, Segment) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        let blobs = spaces.into_iter().enumerate().flat_map(|(index, space)| {
            let blobs = self.manifest.maps.get(&space).into_iter().flatten();
            blobs.map(move |&blob| (index, space, blob))
        });
        let fetches = futures::stream::iter(blobs).map(|(index, space, blob)| async move {
            let content = self.kept.blob(&self.store, blob).await?;
            let digest = blob.digest;
            let decoded = Segment::decode(&content);
            let segment = decoded.map_err(|source| ReadError::Segment { space, digest, source })?;
            Ok::<_, ReadError>((index, space, segment))
        });
        let mut segments = fetches.buffered(SEGMENT_FETCHES_MAX);
        let (mut current, mut end) = (0, 0);
        self.store.block_on(async {
            while let Some(segment) = segments.next().await {
                let (index, space, segment) = segment?;
                if index != current {
                    (current, end) = (index, 0);
                }
                let (Some(first), Some(last)) = (segment.runs().first(), segment.runs().last())
                else {
                    continue;
                };
                if first.first < end {
                    return Err(ReadError::SegmentOrder { space });
                }
                end = last.first + u64::from(last.count);
                if let Some(&pack) =
                    segment.packs().iter().find(|pack| !self.pack_bytes.contains_key(pack))
                {
                    return Err(ReadError::UnknownPack { space, pack });
                }
                take(index, segment)?;
            }
            Ok(())
        })
    }

    /// The runs of a space, neighbours joined.
    fn all_runs(&self, space: SpaceId) -> Result<Vec<PageRun>, ReadError> {
        let mut runs: Vec<PageRun> = Vec::new();
        self.segments(space, |segment| {
            for &MapRun { first, count, .. } in segment.runs() {
                let count = u64::from(count);
                match runs.last_mut() {
                    Some(last) if last.first + last.count == first => last.count += count,
                    _ => runs.push(PageRun { first, count }),
                }
            }
            Ok(())
        })?;
        Ok(runs)
    }

    /// The runs of spaces, and where they lie.
    fn all_stored(&self, spaces: &[SpaceId]) -> Result<Vec<Vec<StoredRun>>, ReadError> {
        let mut frames = Frames::default();
        let mut stored = vec![Vec::new(); spaces.len()];
        self.segments_of(spaces.iter().copied(), |index, segment| {
            let mut numbers = frames.of_segment(&segment, &self.pack_bytes);
            for run in segment.runs() {
                let place =
                    u64::from(numbers.number(run)?) << PAGE_IN_FRAME_BITS | u64::from(run.page);
                let run = PageRun { first: run.first, count: run.count.into() };
                stored.get_mut(index).expect("the space's index").push(StoredRun { run, place });
            }
            Ok(())
        })?;
        Ok(stored)
    }

    fn transfer_wanted(
        &self,
        wanted: &[(SpaceId, &[PageRun])],
        place: &Place<'_>,
    ) -> Result<(), TransferError> {
        let plan = self.plan(wanted)?;
        plan.passes(self.deltas_bytes_max)
            .into_iter()
            .try_for_each(|pass| self.transfer_pass(&plan, pass, place))
    }

    fn transfer_pass(
        &self,
        plan: &Plan,
        pass: Pass,
        place: &Place<'_>,
    ) -> Result<(), TransferError> {
        let deltas = self.fetch_deltas(plan, &pass.deltas)?;
        let packs = plan.packs_of(&pass);
        let threads = self.store.threads().min(packs.len()).min(DECODERS_MAX);
        if threads == 0 {
            return Ok(());
        }
        // One pack's content waits here at most; the others that are in memory are being fetched or decoded.
        let (fetched, queue) = crossbeam_channel::bounded::<(usize, Bytes)>(1);
        let pool = Pool::default();
        let failed = Mutex::new(None);
        let fail = |error: TransferError| {
            failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).get_or_insert(error);
        };
        std::thread::scope(|scope| {
            for _ in 0..threads {
                let (queue, packs, deltas, fail) = (queue.clone(), &packs, &deltas, &fail);
                let decode = move || {
                    if let Err(error) = self.decode_packs(&queue, plan, packs, deltas, place) {
                        fail(error);
                    }
                };
                if let Err(error) = std::thread::Builder::new().spawn_scoped(scope, decode) {
                    fail(ReadError::Thread(error).into());
                    break;
                }
            }
            // Once every worker has ended, as they do on their first error each, sending fails and the fetches end.
            drop(queue);
            let fetches = futures::stream::iter(packs.iter().enumerate());
            let in_flight = FETCHES_MAX.saturating_sub(threads).max(2);
            let mut fetches = fetches
                .map(|(index, &(blob, _))| {
                    let content = self.fetch_pack(blob, &pool);
                    async move { (index, content.await) }
                })
                .buffered(in_flight);
            while let Some((index, content)) = self.store.block_on(fetches.next()) {
                match content {
                    Ok(content) => {
                        if fetched.send((index, content)).is_err() {
                            break;
                        }
                    }
                    Err(error) => {
                        fail(error.into());
                        break;
                    }
                }
                if failed.lock().unwrap_or_else(std::sync::PoisonError::into_inner).is_some() {
                    break;
                }
            }
            drop(fetched);
        });
        match failed.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner) {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// A pack whose frames are not checked yet. The fetch begins with the call.
    fn fetch_pack(
        &self,
        pack: BlobRef,
        pool: &Pool,
    ) -> impl Future<Output = Result<Bytes, ReadError>> + use<> {
        let kept = self.kept.get(&pack.digest);
        let pool = pool.clone();
        let fetch = kept.is_none().then(|| {
            let (store, buffer) = (self.store.for_task(), pool.take());
            let fetch = async move { store.get_blob_unchecked(pack, buffer).await };
            AbortOnDrop(self.store.handle().spawn(fetch))
        });
        async move {
            match fetch {
                Some(fetch) => Ok(pool.lend(fetch.join().await?)),
                None => Ok(kept.unwrap_or_default()),
            }
        }
    }

    /// The stored bytes of frames, by their numbers. They are not checked yet.
    fn fetch_deltas(&self, plan: &Plan, frames: &[u32]) -> Result<Deltas, ReadError> {
        let mut by_pack: BTreeMap<u32, Vec<u32>> = BTreeMap::new();
        for &number in frames {
            by_pack.entry(plan.frame(number).pack).or_default().push(number);
        }
        let fetches = futures::stream::iter(by_pack).map(|(pack, mut numbers)| async move {
            let pack = plan.pack(pack).digest;
            numbers.sort_unstable_by_key(|number| plan.frame(*number).offset);
            let range = |number: &u32| {
                let MapFrame { offset, stored_bytes, .. } = plan.frame(*number);
                u64::from(*offset)..u64::from(*offset) + u64::from(*stored_bytes)
            };
            let ranges: Vec<Range<u64>> = numbers.iter().map(range).collect();
            let parts = match self.kept.get(&pack) {
                Some(content) => ranges.iter().map(|range| part_of(&content, range)).collect(),
                None => self.store.get_parts(&blob_path(&pack), &ranges).await?,
            };
            let mut found = Vec::with_capacity(parts.len());
            for (number, part) in numbers.into_iter().zip(parts) {
                let MapFrame { offset, stored_bytes, .. } = *plan.frame(number);
                if part.len() != stored_bytes as usize {
                    return Err(ReadError::Frame { pack, offset });
                }
                // A copy: what a store returns may be a piece of much more.
                found.push((number, Bytes::copy_from_slice(&part)));
            }
            Ok(found)
        });
        let mut fetches = fetches.buffer_unordered(DELTA_FETCHES_MAX);
        let mut deltas = Deltas::new();
        while let Some(found) = self.store.block_on(fetches.next()) {
            deltas.extend(found?);
        }
        Ok(deltas)
    }

    /// Which pages of which frames are wanted, ordered by pack and frame: those of differences beside the pages of their bases.
    fn plan(&self, wanted: &[(SpaceId, &[PageRun])]) -> Result<Plan, ReadError> {
        let mut plan =
            Plan { spaces: wanted.iter().map(|(space, _)| *space).collect(), ..Plan::default() };
        self.segments_of(plan.spaces.clone(), |index, segment| {
            let (_, runs) = wanted.get(index).expect("the space's index");
            let space = count(index);
            let mut numbers = plan.frames.of_segment(&segment, &self.pack_bytes);
            for run in segment.runs() {
                for part in parts_within(run, runs) {
                    plan.wanted.push(Wanted::new(&part, numbers.number(&part)?, space));
                }
            }
            Ok(())
        })?;
        // By plain frame, that before what is told by differences from it, and within a frame by space and page: what lies
        // together is placed together.
        let mut list = std::mem::take(&mut plan.wanted);
        list.sort_unstable_by_key(|wanted| {
            let plain = plan.plain(wanted.frame);
            let is_delta = plain != wanted.frame;
            (plan.frame(plain).pack, plain, is_delta, wanted.frame, wanted.space(), wanted.first())
        });
        plan.wanted = list;
        Ok(plan)
    }

    fn decode_packs(
        &self,
        queue: &Receiver<(usize, Bytes)>,
        plan: &Plan,
        packs: &[(BlobRef, Range<usize>)],
        deltas: &Deltas,
        place: &Place<'_>,
    ) -> Result<(), TransferError> {
        let mut decoder = FrameDecoder::new().map_err(ReadError::Decompress)?;
        let (mut base, mut changed) = (Vec::new(), Vec::new());
        for (index, content) in queue {
            let (pack, range) = packs.get(index).expect("the index is that of a planned pack");
            let wanted = plan.wanted.get(range.clone()).expect("the plan's ranges are its own");
            for wanted in wanted.chunk_by(|a, b| plan.plain(a.frame) == plan.plain(b.frame)) {
                let [first, ..] = wanted else { continue };
                let plain_number = plan.plain(first.frame);
                let plain = plan.frame(plain_number);
                decode_frame(&mut decoder, pack.digest, plain, &content, &mut base)?;
                for wanted in wanted.chunk_by(|a, b| a.frame == b.frame) {
                    let [first, ..] = wanted else { continue };
                    if first.frame == plain_number {
                        plan.place(wanted, &base, place)?;
                        continue;
                    }
                    let stored = deltas.get(&first.frame);
                    let stored = stored.expect("all differences of a pass were fetched for it");
                    let frame = plan.frame(first.frame);
                    let own_pack = plan.pack(frame.pack).digest;
                    let over = BaseFrame { digest: plain.digest, raw: &base };
                    decode_delta(&mut decoder, own_pack, frame, stored, over, &mut changed)?;
                    plan.place(wanted, &changed, place)?;
                }
            }
        }
        Ok(())
    }
}

/// Stored bytes of frames of differences, by number of the frame.
type Deltas = HashMap<u32, Bytes>;

/// A part of a pack; what lies outside of it is missing.
fn part_of(content: &Bytes, range: &Range<u64>) -> Bytes {
    let bytes = content.len() as u64;
    let end = usize::try_from(range.end.min(bytes)).expect("no more than the content has");
    let start = usize::try_from(range.start).map_or(end, |start| start.min(end));
    content.slice(start..end)
}

/// Reads a blob into the memory of `buffer`, which must be empty, and hashes it where nothing else waits for it.
async fn checked_blob(store: Store, blob: BlobRef, buffer: Vec<u8>) -> Result<Vec<u8>, ReadError> {
    let content = store.get_blob_unchecked(blob, buffer).await?;
    let check = move || store.check_blob(blob, &content).map(|()| content);
    let checked = tokio::task::spawn_blocking(check).await;
    Ok(checked.map_err(|_| ReadError::Panicked)??)
}

/// Checks and decodes one frame of a pack.
///
/// Its own digest is what is checked, in the page map, which was checked against the manifest: it costs a quarter of the
/// pack's, and also serves who fetches less than a pack.
fn decode_frame(
    decoder: &mut FrameDecoder,
    pack: Digest,
    frame: &MapFrame,
    content: &[u8],
    raw: &mut Vec<u8>,
) -> Result<(), ReadError> {
    let offset = frame.offset;
    let end = offset.checked_add(frame.stored_bytes).ok_or(ReadError::Frame { pack, offset })?;
    let stored =
        content.get(offset as usize..end as usize).ok_or(ReadError::Frame { pack, offset })?;
    if FrameDigest::of(stored) != frame.digest {
        return Err(ReadError::FrameDigest { pack, offset });
    }
    let raw_bytes = usize::from(frame.pages) * PAGE_BYTES;
    let decoded = decoder.decode(frame.codec, stored, raw_bytes, raw);
    decoded.map_err(|source| ReadError::FrameContent { pack, offset, source })
}

/// Checks and decodes a frame of differences over its base.
fn decode_delta(
    decoder: &mut FrameDecoder,
    pack: Digest,
    frame: &MapFrame,
    stored: &[u8],
    base: BaseFrame<'_>,
    raw: &mut Vec<u8>,
) -> Result<(), ReadError> {
    let offset = frame.offset;
    if FrameDigest::of(stored) != frame.digest {
        return Err(ReadError::FrameDigest { pack, offset });
    }
    let raw_bytes = usize::from(frame.pages) * PAGE_BYTES;
    let decoded = decoder.decode_delta(stored, raw_bytes, base, raw);
    decoded.map_err(|source| ReadError::FrameContent { pack, offset, source })
}

fn count(index: usize) -> u32 {
    u32::try_from(index).expect("a capsule has fewer than 2^32 packs and frames")
}

/// A task that ends when nobody waits for it any more.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T, E> AbortOnDrop<Result<T, E>>
where
    ReadError: From<E>,
{
    async fn join(mut self) -> Result<T, ReadError> {
        match (&mut self.0).await {
            Ok(result) => Ok(result?),
            Err(_) => Err(ReadError::Panicked),
        }
    }
}

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Packs and frames of a capsule, in the order in which they were first asked for.
#[derive(Debug, Default)]
struct Frames {
    packs: Vec<BlobRef>,
    /// `pack` counts `packs`, `base` these frames.
    frames: Vec<MapFrame>,
    pack_numbers: HashMap<Digest, u32>,
    /// By pack and offset.
    frame_numbers: HashMap<(u32, u32), u32>,
}

impl Frames {
    fn of_segment<'a>(
        &'a mut self,
        segment: &'a Segment,
        pack_bytes: &'a HashMap<Digest, u64>,
    ) -> SegmentFrames<'a> {
        let numbers = vec![None; segment.frames().len()];
        SegmentFrames { all: self, segment, pack_bytes, numbers }
    }
}

/// How [`Frames`] numbers the frames of a segment.
struct SegmentFrames<'a> {
    all: &'a mut Frames,
    segment: &'a Segment,
    pack_bytes: &'a HashMap<Digest, u64>,
    numbers: Vec<Option<u32>>,
}

impl SegmentFrames<'_> {
    /// The number of the frame of one of the segment's runs.
    fn number(&mut self, run: &MapRun) -> Result<u32, ReadError> {
        self.number_of(run.frame)
    }

    fn number_of(&mut self, index: u32) -> Result<u32, ReadError> {
        const CHECKED: &str = "a segment's indices were checked";
        if let Some(number) = *self.numbers.get(index as usize).expect(CHECKED) {
            return Ok(number);
        }
        let frame = *self.segment.frames().get(index as usize).expect(CHECKED);
        let digest = *self.segment.packs().get(frame.pack as usize).expect(CHECKED);
        // One level deep: in a segment bases are plain.
        let base = frame.base.map(|base| self.number_of(base)).transpose()?;
        let Frames { packs, frames, pack_numbers, frame_numbers } = &mut *self.all;
        // Another segment may have said otherwise of the same place.
        let named = base.and_then(|base| frames.get(base as usize));
        if named.is_some_and(|named| named.is_delta()) {
            return Err(ReadError::Base { pack: digest, offset: frame.offset });
        }
        let pack = *pack_numbers.entry(digest).or_insert_with(|| {
            let bytes = self.pack_bytes.get(&digest).copied().unwrap_or_default();
            packs.push(BlobRef { digest, bytes });
            count(packs.len() - 1)
        });
        let number = *frame_numbers.entry((pack, frame.offset)).or_insert_with(|| {
            frames.push(MapFrame { pack, base, ..frame });
            count(frames.len() - 1)
        });
        *self.numbers.get_mut(index as usize).expect(CHECKED) = Some(number);
        Ok(number)
    }
}

/// A frame has at most 256 pages.
const PAGE_IN_FRAME_BITS: u32 = 8;
const _: () = assert!(FRAME_PAGES_MAX <= 1 << PAGE_IN_FRAME_BITS);

/// The parts of a run that lie in `wanted`, which is in ascending order.
fn parts_within<'a>(run: &'a MapRun, wanted: &'a [PageRun]) -> impl Iterator<Item = MapRun> + 'a {
    let (low, high) = (run.first, run.first + u64::from(run.count));
    let first = wanted.partition_point(|one| one.first.saturating_add(one.count) <= low);
    let touching = wanted.get(first..).unwrap_or_default().iter();
    touching
        .take_while(move |one| one.first < high)
        .map(|one| run.clip(one.first, one.first.saturating_add(one.count)))
}

/// What a transfer fetches and where it goes.
#[derive(Debug, Default)]
struct Plan {
    spaces: Vec<SpaceId>,
    frames: Frames,
    /// Ordered by pack and plain frame, then that before differences from it, by frame, space and page.
    wanted: Vec<Wanted>,
}

/// A part of a transfer.
#[derive(Debug, Default)]
struct Pass {
    /// Of what is wanted.
    range: Range<usize>,
    /// The frames of differences among it.
    deltas: Vec<u32>,
}

impl Plan {
    fn frame(&self, number: u32) -> &MapFrame {
        self.frames.frames.get(number as usize).expect("the plan's indices are its own")
    }

    fn pack(&self, number: u32) -> BlobRef {
        *self.frames.packs.get(number as usize).expect("the plan's indices are its own")
    }

    /// The frame in whose pack pages are looked for first: the base, where there is one.
    fn plain(&self, number: u32) -> u32 {
        self.frame(number).base.unwrap_or(number)
    }

    /// Cuts what is wanted, so that no pass has more than so many bytes of differences, or just one frame.
    fn passes(&self, bytes_max: usize) -> Vec<Pass> {
        let mut passes = Vec::new();
        let mut pass = Pass::default();
        let mut bytes = 0;
        for wanted in self.wanted.chunk_by(|a, b| a.frame == b.frame) {
            let [first, ..] = wanted else { continue };
            let frame = self.frame(first.frame);
            if frame.is_delta() {
                let stored_bytes = frame.stored_bytes as usize;
                if bytes + stored_bytes > bytes_max && !pass.deltas.is_empty() {
                    let start = pass.range.end;
                    let range = start..start;
                    passes.push(std::mem::replace(&mut pass, Pass { range, deltas: Vec::new() }));
                    bytes = 0;
                }
                bytes += stored_bytes;
                pass.deltas.push(first.frame);
            }
            pass.range.end += wanted.len();
        }
        passes.push(pass);
        passes
    }

    /// The packs of a pass, and for each its part of what is wanted.
    fn packs_of(&self, pass: &Pass) -> Vec<(BlobRef, Range<usize>)> {
        let pack_of = |wanted: &Wanted| self.frame(self.plain(wanted.frame)).pack;
        let wanted = self.wanted.get(pass.range.clone()).unwrap_or_default();
        let mut start = pass.range.start;
        let mut packs = Vec::new();
        for wanted in wanted.chunk_by(|a, b| pack_of(a) == pack_of(b)) {
            let end = start + wanted.len();
            packs.extend(wanted.first().map(|first| (self.pack(pack_of(first)), start..end)));
            start = end;
        }
        packs
    }

    /// Places pages of one frame, whose content is `raw`.
    fn place(&self, wanted: &[Wanted], raw: &[u8], place: &Place<'_>) -> Result<(), TransferError> {
        for wanted in wanted.chunk_by(Wanted::is_followed_by) {
            let [first, ..] = wanted else { continue };
            let space = self.spaces.get(first.space() as usize);
            let space = *space.expect("the plan's indices are its own");
            let runs: Vec<PageRun> = wanted.iter().map(Wanted::run).collect();
            let pages: usize = wanted.iter().map(|wanted| usize::from(wanted.count())).sum();
            let start = usize::from(first.page()) * PAGE_BYTES;
            let outside = || {
                let MapFrame { pack, offset, .. } = *self.frame(first.frame);
                ReadError::Frame { pack: self.pack(pack).digest, offset }
            };
            let bytes = raw.get(start..start + pages * PAGE_BYTES).ok_or_else(outside)?;
            place(space, &runs, bytes).map_err(TransferError::Place)?;
        }
        Ok(())
    }
}

/// A run of pages that is wanted, in 16 bytes: there may be millions.
#[derive(Clone, Copy, Debug)]
struct Wanted {
    /// The page number in the upper 52 bits, the count less one in the lower 12.
    first_and_count: u64,
    frame: u32,
    /// The index of the space in the upper 24 bits, the first page within the frame in the lower 8.
    space_and_page: u32,
}

impl Wanted {
    fn new(run: &MapRun, frame: u32, space: u32) -> Wanted {
        debug_assert!(run.first < PAGE_NUMBER_END && run.count > 0 && run.page < 256);
        Wanted {
            first_and_count: run.first << 12 | u64::from(run.count - 1),
            frame,
            space_and_page: space << 8 | u32::from(run.page),
        }
    }

    fn first(&self) -> u64 {
        self.first_and_count >> 12
    }

    fn count(&self) -> u16 {
        u16::try_from(self.first_and_count & 0xfff).expect("12 bits fit") + 1
    }

    fn space(&self) -> u32 {
        self.space_and_page >> 8
    }

    fn page(&self) -> u16 {
        u16::try_from(self.space_and_page & 0xff).expect("8 bits fit")
    }

    fn run(&self) -> PageRun {
        PageRun { first: self.first(), count: u64::from(self.count()) }
    }

    /// Whether the content of `next` lies right behind that of `self`, for the same space.
    fn is_followed_by(&self, next: &Wanted) -> bool {
        self.space() == next.space() && self.page() + self.count() == next.page()
    }
}

/// An error of the capsule, or of whoever takes its pages.
enum TransferError {
    Read(ReadError),
    Place(io::Error),
}

impl From<ReadError> for TransferError {
    fn from(error: ReadError) -> TransferError {
        TransferError::Read(error)
    }
}

impl Source for CapsuleReader {
    fn runs(&self, space: SpaceId) -> io::Result<Vec<PageRun>> {
        self.all_runs(space).map_err(io::Error::other)
    }

    fn stored(&self, spaces: &[SpaceId]) -> io::Result<Vec<Vec<StoredRun>>> {
        self.all_stored(spaces).map_err(io::Error::other)
    }

    fn transfer_some(&self, wanted: &[(SpaceId, &[PageRun])], place: &Place<'_>) -> io::Result<()> {
        self.transfer_wanted(wanted, place).map_err(|error| match error {
            TransferError::Read(error) => io::Error::other(error),
            TransferError::Place(error) => error,
        })
    }

    fn stream(&self, name: &StreamName) -> io::Result<Option<Box<dyn Read + Send + '_>>> {
        let Some(parts) = self.manifest.streams.get(name) else { return Ok(None) };
        let parts = PartsReader {
            reader: self,
            parts: parts.iter(),
            fetched: VecDeque::new(),
            fetched_bytes: 0,
            current: Bytes::new(),
        };
        let left = self.config.statistics.streams.get(&name.0).copied().unwrap_or_default();
        let decoder = stream_decoder(io::BufReader::with_capacity(1 << 17, parts))?;
        Ok(Some(Box::new(StreamReader { decoder, name: name.clone(), left })))
    }
}

fn stream_decoder<R: io::BufRead>(input: R) -> io::Result<zstd::stream::read::Decoder<'static, R>> {
    let mut decoder = zstd::stream::read::Decoder::with_buffer(input)?;
    decoder.window_log_max(WINDOW_LOG_MAX)?;
    Ok(decoder)
}

/// The stored bytes of a stream, one checked blob after another; the next ones are fetched meanwhile.
struct PartsReader<'a> {
    reader: &'a CapsuleReader,
    parts: std::slice::Iter<'a, BlobRef>,
    /// With the bytes of each.
    fetched: VecDeque<(u64, AbortOnDrop<Result<Bytes, StoreError>>)>,
    fetched_bytes: u64,
    current: Bytes,
}

/// Parts that are fetched at a time, and their bytes together, where it is more than one: the parts of a layer with many small files are
/// small, and each takes as long as a request does.
const PARTS_AHEAD_MAX: usize = 8;
const PARTS_AHEAD_BYTES_MAX: u64 = 16 << 20;

impl PartsReader<'_> {
    /// Fetches as much as may be on its way.
    fn fetch(&mut self) {
        while let Some(&blob) = self.parts.as_slice().first() {
            let bytes = self.fetched_bytes + blob.bytes;
            let is_much = bytes > PARTS_AHEAD_BYTES_MAX || self.fetched.len() == PARTS_AHEAD_MAX;
            if is_much && !self.fetched.is_empty() {
                break;
            }
            self.parts.next();
            let (store, kept) = (self.reader.store.for_task(), self.reader.kept.clone());
            let fetch = async move { kept.blob(&store, blob).await };
            let fetch = AbortOnDrop(self.reader.store.handle().spawn(fetch));
            self.fetched.push_back((blob.bytes, fetch));
            self.fetched_bytes = bytes;
        }
    }
}

impl Read for PartsReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() {
            self.fetch();
            let Some((bytes, fetch)) = self.fetched.pop_front() else { return Ok(0) };
            self.fetched_bytes -= bytes;
            self.current = self.reader.store.block_on(fetch.join()).map_err(io::Error::other)?;
            // While this one is read.
            self.fetch();
        }
        let bytes = self.current.len().min(buffer.len());
        let now = self.current.split_to(bytes);
        buffer
            .get_mut(..bytes)
            .expect("no more than the buffer has room for")
            .copy_from_slice(&now);
        Ok(bytes)
    }
}

/// The content of a stream, which must be as long as the config says.
struct StreamReader<R: io::BufRead> {
    decoder: zstd::stream::read::Decoder<'static, R>,
    name: StreamName,
    left: u64,
}

impl<R: io::BufRead> Read for StreamReader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let bytes = self.decoder.read(buffer)?;
        let ended = bytes == 0 && !buffer.is_empty();
        let left = self.left.checked_sub(bytes as u64);
        match left {
            Some(left) if !ended || left == 0 => self.left = left,
            _ => {
                let source = io::Error::other("its length is not the one that the config tells");
                return Err(io::Error::other(ReadError::Stream {
                    name: self.name.0.clone(),
                    source,
                }));
            }
        }
        Ok(bytes)
    }
}

/// Blobs of the format never exceed this; a pack that does was refused with the manifest.
const _: () = assert!(BLOB_BYTES_MAX <= u32::MAX as usize);

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::time::SystemTime;

    use samara_capsule::config::{Provenance, Requirements};
    use samara_capsule::transfer::{PageBatch, Sink};

    use super::*;
    use crate::config::StoreConfig;
    use crate::writer::CapsuleFacts;
    use crate::{CapsuleWriter, Location};

    fn page(number: u64, version: u64) -> Vec<u8> {
        let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut page = version.to_le_bytes().to_vec();
        while page.len() < PAGE_BYTES {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            page.extend_from_slice(&(state >> 8).to_le_bytes());
        }
        page
    }

    /// A capsule with more differences than there is memory for would come back without some, or with some twice.
    #[test]
    fn many_differences_come_in_passes() {
        let folder = tempfile::tempdir().unwrap();
        let location = Location::folder(folder.path()).unwrap();
        let mut config = StoreConfig::default();
        config.file.sync = false;
        let store = Store::open(&location, &config, true).unwrap();
        let mut lease = store.take_epoch(&BTreeMap::new()).unwrap().lease;
        let facts = || CapsuleFacts {
            created: SystemTime::UNIX_EPOCH,
            parent: None,
            provenance: Provenance::default(),
            requirements: Requirements::default(),
            report: None,
        };
        let batch = |first: u64, version: u64| PageBatch {
            spaces: [SpaceId(0)].into(),
            runs: vec![PageRun { first, count: 128 }],
            bytes: (first..first + 128).flat_map(|number| page(number, version)).collect(),
        };
        let mut writer = CapsuleWriter::new(&store).unwrap();
        for first in (0..4096).step_by(128) {
            writer.pages(batch(first, 0)).unwrap();
        }
        writer.commit(&mut lease, &[0xf6], facts()).unwrap();
        // Half of the pages, in turns with those that stay.
        let parent = CapsuleReader::open_latest(&store).unwrap();
        let mut writer = CapsuleWriter::after(parent).unwrap();
        let base = Sink::base(&mut writer, Some(SpaceId(0))).unwrap();
        writer.earlier(SpaceId(0), base);
        for first in (0..4096).step_by(256) {
            writer.pages(batch(first, 1)).unwrap();
            let run = PageRun { first: first + 128, count: 128 };
            writer.unchanged(&[SpaceId(0)].into(), base, run, true).unwrap();
        }
        let committed = writer.commit(&mut lease, &[0xf6], facts()).unwrap();
        assert_eq!(committed.new_frames.delta.pages, 2048);

        let mut reader = CapsuleReader::open_latest(&store).unwrap();
        let whole = [PageRun { first: 0, count: 4096 }];
        let wanted = [(SpaceId(0), whole.as_slice())];
        let plan = reader.plan(&wanted).unwrap();
        let two = usize::try_from(committed.new_frames.delta.stored_bytes / 32 * 5 / 2).unwrap();
        for (bytes_max, passes) in [(0, 32), (two, 16), (1 << 20, 1)] {
            let found = plan.passes(bytes_max);
            let deltas: usize = found.iter().map(|pass| pass.deltas.len()).sum();
            assert_eq!((found.len(), deltas), (passes, 32), "{bytes_max}");
            reader.deltas_bytes_max = bytes_max;
            let placed = Mutex::new(BTreeMap::new());
            let place = |_: SpaceId, runs: &[PageRun], bytes: &[u8]| {
                let numbers = runs.iter().flat_map(|run| run.first..run.first + run.count);
                for (number, content) in numbers.zip(bytes.chunks(PAGE_BYTES)) {
                    assert!(placed.lock().unwrap().insert(number, content.to_vec()).is_none());
                }
                Ok(())
            };
            reader.transfer_some(&wanted, &place).unwrap();
            let placed = placed.into_inner().unwrap();
            assert_eq!(placed.len(), 4096);
            for (number, content) in placed {
                assert!(content == page(number, 1 - number / 128 % 2), "page {number}");
            }
        }
    }
}
