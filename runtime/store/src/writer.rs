//! Writing a capsule: pages and streams in, blobs and one committed slot out.
//!
//! ```text
//! caller: small batches are joined -> jobs, tens of MiB -> workers: drop zero pages, find bases, compress, hash
//!   -> in the order of submission: packs, parts of streams, page maps -> uploads, at most eight -> store
//! ```
//!
//! Frames go into packs in the order in which they were submitted, so that equal input gives equal blobs, however
//! many threads there are; but whether pages are stored as differences depends on what lies on the node, and on how earlier trials
//! went. Every stage is bounded, and each holds back the one before it: memory does not depend on
//! the size of the capsule, except for its page map (about five bytes a run, 56 a frame).
//!
//! Nothing is visible before [`CapsuleWriter::commit`] returns; after an error nothing is, except where the store did
//! not answer to the very last write. What was uploaded in vain stays behind as unreferenced blobs.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender};
use samara_capsule::cbor::RECORDS_BYTES_MAX;
use samara_capsule::config::{
    CapsuleConfig, ConfigError, MemoryReport, PhaseReport, Provenance, Report, Requirements,
    Statistics, StoreReport,
};
use samara_capsule::digest::Digest;
use samara_capsule::frame::FrameEncoder;
use samara_capsule::log::CapsuleRef;
use samara_capsule::manifest::{BlobKind, BlobRef, Manifest, ManifestError};
use samara_capsule::pack::PackBuilder;
use samara_capsule::pagemap::{
    Base, BasePlace, CompleteMap, MapBuilder, MapError, MapFrame, MapRun, ParentRuns, Segment,
};
use samara_capsule::stream::{STREAMS_MAX, StreamNameError, check_name};
use samara_capsule::transfer::{
    BATCH_BYTES_MAX, BaseId, PAGE_BYTES, PageBatch, PageRun, SEGMENT_BYTES_MAX, SegmentId, Sink,
    SpaceId, StoredSegment, StreamName,
};
use samara_capsule::{BLOB_BYTES_MAX, FORMAT_VERSION};
use tokio::sync::Semaphore;

use crate::condemned::another_form;
use crate::encode::{Encoded, PageEncoder, StoredBefore, Trials};
use crate::frames::FrameCounts;
use crate::local_packs::LocalPacks;
use crate::log::{Lease, LogError, LogHead, rfc3339};
use crate::pace::{self, Pace, Plan, Share, UploadLimit};
use crate::pool::Pool;
use crate::reader::{CapsuleReader, ReadError};
use crate::store::{Store, StoreError, blob_path};

/// Size of the packs and parts of streams that are written. Half of what the format allows: twice as many uploads in
/// flight for the same memory, and one request still takes longer to transfer than to start.
pub(crate) const PACK_BYTES: usize = 8 << 20;

/// How soon an upload that waits for bandwidth notices that it need not any more.
const LIFTED_WITHIN: Duration = Duration::from_millis(20);

/// A batch of at least this size becomes a frame of its own, without being copied.
const LONE_BATCH_BYTES: usize = BATCH_BYTES_MAX / 2;

/// Bytes of streams that wait, all streams together, before the longest becomes a job or a blob early.
const STREAMS_PENDING_BYTES_MAX: usize = PACK_BYTES;

/// Buffers of results that are kept, as many as there are workers at most.
const STORED_BUFFERS_MAX: usize = 16;

/// A stream with at least this much waiting gets a batch's buffer; so no more than 32 streams have one at a time.
const STREAM_BUFFER_BYTES_MIN: usize = STREAMS_PENDING_BYTES_MAX / 32;

/// Blobs of the address that are remembered, so that they aren't uploaded again: at 40 bytes, a few megabytes.
const KNOWN_BLOBS_MAX: usize = 200_000;

/// Why a capsule could not be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error("the pages that were passed can't be stored")]
    Map(#[from] MapError),
    #[error("can't read the capsule that this one continues")]
    Parent(#[source] Box<ReadError>),
    #[error("a batch of {owner} has {bytes} bytes for {pages} pages")]
    Batch { owner: String, bytes: usize, pages: u64 },
    #[error("the base {} was not made by this writer", base.0)]
    Base { base: BaseId },
    #[error("can't write a stream")]
    Stream(#[from] StreamNameError),
    #[error("a capsule has at most {STREAMS_MAX} streams")]
    Streams,
    #[error("a segment of {bytes} bytes in {parts} parts can't be stored")]
    SegmentBytes { bytes: usize, parts: usize },
    #[error("the segment {} was not made by this writer", segment.0)]
    Segment { segment: SegmentId },
    #[error("can't compress")]
    Compress(#[source] io::Error),
    #[error("the records take {bytes} bytes, of at most {bytes_max}")]
    Records { bytes: usize, bytes_max: usize },
    #[error("can't make the capsule's config")]
    Config(#[from] ConfigError),
    #[error("can't make the capsule's manifest")]
    Manifest(#[from] ManifestError),
    #[error("can't start a thread for compression")]
    Thread(#[source] io::Error),
    #[error("a thread of the writer ended unexpectedly")]
    Panicked,
    #[error(
        "the capsule can't be committed at {address}: it names {digest}, which was not there when the capsule was begun; save again"
    )]
    Unknown { address: String, digest: Digest },
    #[error(transparent)]
    Earlier(SharedError),
}

impl WriteError {
    /// Whether a newer epoch was taken: this copy of the container must end.
    pub fn is_fenced(&self) -> bool {
        match self {
            WriteError::Log(error) => error.is_fenced(),
            WriteError::Earlier(error) => error.0.is_fenced(),
            _ => false,
        }
    }
}

/// The first error of a writer, which every later call reports again.
#[derive(Clone, Debug)]
pub struct SharedError(Arc<WriteError>);

impl std::fmt::Display for SharedError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for SharedError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        std::error::Error::source(&*self.0)
    }
}

/// What the writer can't know of a capsule.
#[derive(Clone, Debug)]
pub struct CapsuleFacts {
    /// Instant of the capture.
    pub created: SystemTime,
    pub parent: Option<Digest>,
    pub provenance: Provenance,
    pub requirements: Requirements,
    /// How the capsule came about, as far as it's known without the writer.
    pub report: Option<Report>,
}

/// A capsule that is in the store, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Committed {
    pub capsule: CapsuleRef,
    pub epoch: u64,
    /// Bytes of pages, streams and records before compression. Pages that several spaces have in common count once.
    pub raw_bytes: u64,
    /// Bytes of all blobs but config and manifest, each counted once.
    pub stored_bytes: u64,
    /// Bytes that were really uploaded.
    pub uploaded_bytes: u64,
    pub pages: u64,
    pub zero_pages: u64,
    /// Frames that it does not have from the capsule before. Those whose packs the address had already are counted too.
    pub new_frames: FrameCounts,
    /// Where the segments are that stand in its streams.
    pub segments: HashMap<SegmentId, StoredSegment>,
}

/// How far a writer is, readable from any thread.
#[derive(Debug, Default)]
pub struct Progress {
    raw_bytes: AtomicU64,
    uploaded_bytes: AtomicU64,
    uploads: AtomicU64,
    waited_us: AtomicU64,
    longest_us: AtomicU64,
}

impl Progress {
    /// Bytes that were passed to the writer so far.
    pub fn raw_bytes(&self) -> u64 {
        self.raw_bytes.load(Relaxed)
    }

    /// Bytes that have arrived in the store.
    pub fn uploaded_bytes(&self) -> u64 {
        self.uploaded_bytes.load(Relaxed)
    }

    fn add_upload(&self, took: Duration) {
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.uploads.fetch_add(1, Relaxed);
        self.waited_us.fetch_add(took_us, Relaxed);
        self.longest_us.fetch_max(took_us, Relaxed);
    }

    fn store_report(&self) -> StoreReport {
        StoreReport {
            uploads: self.uploads.load(Relaxed),
            waited_us: self.waited_us.load(Relaxed),
            longest_us: self.longest_us.load(Relaxed),
        }
    }
}

/// Writes one capsule. Dropping it without [`CapsuleWriter::commit`] leaves nothing but unreferenced blobs.
#[derive(Debug)]
pub struct CapsuleWriter {
    store: Store,
    parent: Option<Parent>,
    /// What [`Sink::unchanged`] has said, until all drafts are stored.
    unchanged: Vec<Unchanged>,
    /// The log before anything was looked up or stored.
    head: LogHead,
    shared: Arc<Shared>,
    jobs: Option<Sender<Job>>,
    workers: Vec<JoinHandle<()>>,
    next_sequence: u64,
    /// Small batches that wait for others.
    pending: PendingPages,
    streams: BTreeMap<StreamName, PendingStream>,
}

/// The capsule before, and how its packs and frames are numbered here.
#[derive(Debug)]
struct Parent {
    capsule: CapsuleReader,
    /// What its streams consist of.
    stream_blobs: HashSet<BlobRef>,
    packs: HashMap<Digest, u32>,
    /// By number of the pack, and offset.
    frames: HashMap<(u32, u32), u32>,
}

#[derive(Debug, Default)]
struct PendingPages {
    parts: Vec<Part>,
    bytes: Vec<u8>,
}

/// A stream while it is written.
#[derive(Debug, Default)]
struct PendingStream {
    /// What it consists of, in order, by number.
    parts: Vec<usize>,
    /// Whether the last of them is still appended to.
    is_open: bool,
    /// What waits for more.
    bytes: Vec<u8>,
}

#[derive(Debug)]
struct Part {
    owner: Owner,
    exact: bool,
    runs: Vec<PageRun>,
}

impl Part {
    fn reaches(&self, page: u64) -> bool {
        self.runs.last().is_some_and(|run| page < run.first.saturating_add(run.count))
    }
}

/// Whose pages they are.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Owner {
    Spaces(Arc<[SpaceId]>),
    Base(BaseId),
}

impl std::fmt::Display for Owner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Owner::Spaces(spaces) => match spaces.first() {
                Some(space) => space.fmt(f),
                None => f.write_str("no space"),
            },
            Owner::Base(BaseId(base)) => write!(f, "base {base}"),
        }
    }
}

#[derive(Debug)]
struct Unchanged {
    spaces: Arc<[SpaceId]>,
    base: BaseId,
    run: PageRun,
    exact: bool,
}

#[derive(Debug)]
struct Job {
    sequence: u64,
    work: Work,
}

#[derive(Debug)]
enum Work {
    Pages {
        parts: Vec<Part>,
        bytes: Vec<u8>,
    },
    /// `last`: the blob is complete with it.
    Stream {
        number: usize,
        bytes: Vec<u8>,
        last: bool,
    },
}

/// What a worker made of a job.
#[derive(Debug)]
enum Done {
    Pages { encoded: Encoded<Owner>, zeros: Vec<(BaseId, PageRun)> },
    Stream { number: usize, stored: Vec<u8>, last: bool },
}

/// A run of pages, and who has it.
type OwnedRun = (Owner, PageRun);

/// What a blob that is uploaded is for.
#[derive(Clone, Copy, Debug)]
enum Purpose {
    Pack { number: u32 },
    StreamPart { stream: usize, part: usize },
    Segment { space: SpaceId, index: usize },
    Records,
}

impl Purpose {
    fn kind(self) -> BlobKind {
        match self {
            Purpose::Pack { .. } => BlobKind::Pack,
            Purpose::StreamPart { .. } => BlobKind::Stream,
            Purpose::Segment { .. } => BlobKind::PageMap,
            Purpose::Records => BlobKind::Records,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    /// Without its threads, on which uploads hold this.
    store: Store,
    state: Mutex<State>,
    /// Told whenever room or a result comes up, and on failure.
    changed: Condvar,
    uploads: Arc<Semaphore>,
    uploads_max: usize,
    pub(crate) upload_limit: OnceLock<Arc<dyn UploadLimit>>,
    progress: Arc<Progress>,
    /// Threads that may compress, the first of them; the others wait.
    pub(crate) threads_max: AtomicUsize,
    in_flight_max: AtomicUsize,
    /// That were compressed.
    pub(crate) batches: AtomicU64,
    /// What must not be stored or named: it may be deleted at any time.
    condemned: Arc<HashSet<Digest>>,
    packs_here: Arc<LocalPacks>,
    trials: Trials,
    /// Whether packs that are uploaded are of use on this node later.
    stays: AtomicBool,
}

#[derive(Debug, Default)]
pub(crate) struct State {
    failed: Option<SharedError>,
    /// The writer is being dropped.
    closed: bool,
    /// Jobs that were submitted and whose results are not yet in a blob that is being uploaded.
    pub(crate) in_flight: usize,
    /// Of the threads that compress.
    pub(crate) thread_ids: Vec<i32>,
    /// The job whose result comes next, and results that are too early.
    next_sequence: u64,
    early: BTreeMap<u64, Done>,
    pack: Option<OpenPack>,
    parts: Vec<OpenParts>,
    /// Of those that are no segments.
    streams_open_bytes: usize,
    map: MapBuilder,
    bases: Vec<Base>,
    /// Where pages of spaces were before.
    earlier: HashMap<SpaceId, BaseId>,
    /// By the number of the pack: what is known of it.
    packs: BTreeMap<u32, BlobRef>,
    segments: BTreeMap<(SpaceId, usize), BlobRef>,
    records: Option<BlobRef>,
    /// Blobs that are being hashed or uploaded.
    pub(crate) uploading: usize,
    known: HashMap<Digest, u64>,
    /// Whether there are blobs which are not in `known`.
    known_in_part: bool,
    uploaded_bytes: u64,
    zero_pages: u64,
    new_frames: FrameCounts,
    /// Buffers for use again.
    pack_buffers: Pool,
    batch_buffers: Vec<Vec<u8>>,
    stored_buffers: Vec<Vec<u8>>,
}

#[derive(Debug)]
struct OpenPack {
    number: u32,
    builder: PackBuilder,
}

/// Consecutive bytes of a stream.
#[derive(Debug, Default)]
struct OpenParts {
    /// One blob, which depends on nothing but its bytes.
    is_segment: bool,
    raw_bytes: u64,
    open: Vec<u8>,
    blobs: Vec<Option<BlobRef>>,
}

impl CapsuleWriter {
    /// A writer to the address of `store`. What the address holds already is looked up, so as not to upload it again.
    pub fn new(store: &Store) -> Result<CapsuleWriter, WriteError> {
        CapsuleWriter::begin(store, None)
    }

    /// A writer of a capsule that may have pages in common with `parent`, which is at the same address and stays there until the commit.
    pub fn after(parent: CapsuleReader) -> Result<CapsuleWriter, WriteError> {
        let store = parent.store().clone();
        CapsuleWriter::begin(&store, Some(parent))
    }

    fn begin(store: &Store, parent: Option<CapsuleReader>) -> Result<CapsuleWriter, WriteError> {
        // The log before the blobs: what is condemned later is in a slot that the commit comes across.
        let (head, condemned) = store.block_on(store.read_condemned())?;
        let known = match store.block_on(store.list("blobs/sha256")) {
            Ok(names) => Some(names),
            // A shortcut that isn't there costs time, not correctness.
            Err(StoreError::NotFound { .. }) => Some(Vec::new()),
            Err(StoreError::Crowded { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let known_in_part = known.as_ref().is_none_or(|known| known.len() > KNOWN_BLOBS_MAX);
        let known = known.iter().flatten();
        let known = known.filter_map(|(name, bytes)| Some((Digest::from_hex(name).ok()?, *bytes)));
        let known = known.filter(|(digest, _)| !condemned.contains(digest));
        let known = known.take(KNOWN_BLOBS_MAX).collect();

        let (threads, share) = (store.threads(), store.share());
        let uploads_max = pace::uploads(share.bytes);
        let plan = Plan::of(share, uploads_max);
        let shared = Arc::new(Shared {
            store: store.for_task(),
            state: Mutex::new(State { known, known_in_part, ..State::default() }),
            changed: Condvar::new(),
            uploads: Arc::new(Semaphore::new(uploads_max)),
            uploads_max,
            upload_limit: OnceLock::new(),
            progress: Arc::default(),
            threads_max: AtomicUsize::new(plan.threads),
            in_flight_max: AtomicUsize::new(plan.in_flight_max),
            batches: AtomicU64::new(0),
            condemned: Arc::new(condemned),
            packs_here: Arc::new(store.local_packs()),
            trials: Trials::default(),
            stays: AtomicBool::new(true),
        });
        // However much may be in flight later.
        let jobs_max = pace::BUFFERS_BYTES_MAX / BATCH_BYTES_MAX;
        let (jobs, queue) = crossbeam_channel::bounded(jobs_max);
        let mut writer = CapsuleWriter {
            store: store.clone(),
            parent: parent.map(Parent::new),
            unchanged: Vec::new(),
            head,
            shared,
            jobs: Some(jobs),
            workers: Vec::with_capacity(threads),
            next_sequence: 0,
            pending: PendingPages::default(),
            streams: BTreeMap::new(),
        };
        for number in 0..threads {
            let (shared, queue) = (writer.shared.clone(), queue.clone());
            let worker = std::thread::Builder::new().name("samara-compress".into());
            let worker = worker.spawn(move || shared.work(number, &queue));
            let worker = worker.map_err(WriteError::Thread)?;
            writer.workers.push(worker);
        }
        Ok(writer)
    }

    /// How far the writer is.
    pub fn progress(&self) -> Arc<Progress> {
        self.shared.progress.clone()
    }

    /// A hold on how much of the node the writer takes.
    pub fn pace(&self) -> Pace {
        Pace(self.shared.clone())
    }

    /// What is captured will not be captured again on this node: nothing is kept here for a next capsule.
    #[must_use]
    pub fn as_last(self) -> CapsuleWriter {
        self.shared.stays.store(false, Relaxed);
        self
    }

    /// The capsule whose blobs this one may name: the newest of the open generation when the writer was made.
    pub fn base(&self) -> Option<CapsuleRef> {
        self.head.state.latest
    }

    /// Ends the writer. What it uploaded stays behind as unreferenced blobs.
    pub fn abort(self) {}

    /// Stores what is still in flight, then records, config and manifest, and commits under the lease's epoch.
    ///
    /// On success the capsule is the newest of its generation. On error it is not visible; only where the store did not
    /// answer to the last write of all it may be.
    pub fn commit(
        mut self,
        lease: &mut Lease,
        records: &[u8],
        facts: CapsuleFacts,
    ) -> Result<Committed, WriteError> {
        let (begun, uploaded_before) = (Instant::now(), self.shared.progress.uploaded_bytes());
        self.flush()?;
        let shared = self.shared.clone();
        shared.seal_rest()?;
        let mut state = shared.wait(|state| state.in_flight == 0 && state.uploading == 0)?;
        let mut unchanged = std::mem::take(&mut self.unchanged);
        let map = state.take_map(&mut unchanged)?;
        let (pages, stored_pages) = (map.pages(), map.stored_pages());
        let mut packs: Vec<BlobRef> =
            map.packs().filter_map(|number| state.packs.get(&number).copied()).collect();
        drop(state);
        shared.store_maps(map)?;
        shared.store_records(records)?;
        let mut state = shared.wait(|state| state.uploading == 0)?;

        let mut streams = BTreeMap::new();
        let mut streams_raw = BTreeMap::new();
        let mut segments = HashMap::new();
        let parts = std::mem::take(&mut state.parts);
        for (name, stream) in std::mem::take(&mut self.streams) {
            let mut blobs: Vec<BlobRef> = Vec::new();
            let mut raw_bytes = 0;
            for number in stream.parts {
                let part = parts.get(number).expect("numbers of parts are given here");
                let stored = part.blobs.iter();
                let stored = stored.map(|blob| blob.expect("every part of a stream was uploaded"));
                raw_bytes += part.raw_bytes;
                blobs.extend(stored);
                if part.is_segment
                    && let Some(blob) = blobs.last()
                {
                    let stored = StoredSegment { blob: *blob, raw_bytes: part.raw_bytes };
                    segments.insert(segment_id(number), stored);
                }
            }
            if !blobs.is_empty() {
                streams_raw.insert(name.0.clone(), raw_bytes);
                streams.insert(name, blobs);
            }
        }
        let mut maps: BTreeMap<SpaceId, Vec<BlobRef>> = BTreeMap::new();
        for ((space, _), blob) in std::mem::take(&mut state.segments) {
            maps.entry(space).or_default().push(blob);
        }
        packs.sort_unstable();
        packs.dedup();
        let raw_bytes = stored_pages * PAGE_BYTES as u64
            + streams_raw.values().sum::<u64>()
            + records.len() as u64;
        let records_blob = state.records.take().expect("the records were uploaded");
        let (zero_pages, new_frames) = (state.zero_pages, state.new_frames);
        drop(state);

        let created = rfc3339(facts.created);
        let mut manifest = Manifest {
            created: created.clone(),
            epoch: lease.epoch,
            config: BlobRef::to(b""),
            records: records_blob,
            maps,
            packs,
            streams,
        };
        let stored_bytes = manifest.stored_bytes();
        let config = CapsuleConfig {
            format: FORMAT_VERSION,
            created,
            epoch: lease.epoch,
            generation: lease.generation,
            parent: facts.parent,
            provenance: facts.provenance,
            requirements: facts.requirements,
            statistics: Statistics {
                pages,
                zero_pages,
                streams: streams_raw,
                records_bytes: records.len() as u64,
                raw_bytes,
                stored_bytes,
            },
            report: facts.report.map(|mut report| {
                let last = report.phases.last();
                report.phases.push(PhaseReport {
                    name: "store".to_owned(),
                    start_us: last.map_or(0, |last| last.start_us + last.duration_us),
                    duration_us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
                    raw_bytes: records.len() as u64,
                    uploaded_bytes: shared.progress.uploaded_bytes() - uploaded_before,
                });
                Report {
                    memory: MemoryReport { zero: zero_pages, ..report.memory },
                    frames: new_frames.report(),
                    store: shared.progress.store_report(),
                    ..report
                }
            }),
        };
        let mut config = config.encode()?;
        manifest.config = BlobRef::to(&config);
        let mut content = manifest.encode()?;
        let condemned = &shared.condemned;
        if [manifest.config.digest, Digest::of(&content)].iter().any(|d| condemned.contains(d)) {
            config = another_form(BlobKind::Config, &config).map_err(WriteError::Compress)?;
            manifest.config = BlobRef::to(&config);
            content = manifest.encode()?;
        }
        let blob = BlobRef::to(&content);
        let mut names: HashSet<Digest> = manifest.blobs().map(|(_, blob)| blob.digest).collect();
        shared.refuse_unknown(names.iter().filter(|digest| **digest != manifest.config.digest))?;
        names.insert(blob.digest);
        let store = &self.store;
        let (config_path, manifest_path) =
            (blob_path(&manifest.config.digest), blob_path(&blob.digest));
        let config = store.put(&config_path, Bytes::from(config));
        let content = store.put(&manifest_path, Bytes::from(content));
        store.block_on(futures::future::try_join(config, content))?;
        let capsule = store.commit(lease, blob, &self.head, &names)?;
        let uploaded_bytes = self.shared.lock().uploaded_bytes;
        Ok(Committed {
            capsule,
            epoch: lease.epoch,
            raw_bytes,
            stored_bytes,
            uploaded_bytes,
            pages,
            zero_pages,
            new_frames,
            segments,
        })
    }

    fn submit(&mut self, work: Work) -> Result<(), WriteError> {
        let full = &self.shared.in_flight_max;
        self.shared.wait(|state| state.in_flight < full.load(Relaxed))?.in_flight += 1;
        let sequence = self.next_sequence;
        self.next_sequence += 1;
        let jobs = self.jobs.as_ref().expect("the queue is there until the writer is dropped");
        jobs.send(Job { sequence, work }).map_err(|_| WriteError::Panicked)
    }

    fn take_pages(
        &mut self,
        owner: Owner,
        exact: bool,
        runs: Vec<PageRun>,
        bytes: Vec<u8>,
    ) -> Result<(), WriteError> {
        let pages = runs.iter().try_fold(0u64, |sum, run| sum.checked_add(run.count));
        let pages = pages.unwrap_or(u64::MAX);
        if bytes.len() > BATCH_BYTES_MAX
            || pages.checked_mul(PAGE_BYTES as u64) != Some(bytes.len() as u64)
        {
            let owner = owner.to_string();
            return Err(WriteError::Batch { owner, bytes: bytes.len(), pages });
        }
        self.shared.progress.raw_bytes.fetch_add(bytes.len() as u64, Relaxed);
        // Pages of a base may come again, and then the order matters, which only jobs have.
        if let (Owner::Base(_), Some(run)) = (&owner, runs.first())
            && self.pending.parts.iter().any(|part| part.owner == owner && part.reaches(run.first))
        {
            self.flush_pages()?;
        }
        let part = Part { owner, exact, runs };
        if self.pending.bytes.len() + bytes.len() > BATCH_BYTES_MAX
            || bytes.len() >= LONE_BATCH_BYTES
        {
            self.flush_pages()?;
        }
        if bytes.len() >= LONE_BATCH_BYTES {
            return self.submit(Work::Pages { parts: vec![part], bytes });
        }
        if self.pending.bytes.capacity() == 0 {
            self.pending.bytes = self.buffer();
        }
        self.pending.bytes.extend_from_slice(&bytes);
        self.pending.parts.push(part);
        self.shared.lock().recycle(bytes, self.shared.in_flight_max.load(Relaxed));
        Ok(())
    }

    /// Makes a base, and numbers the packs and frames of the capsule before as it comes across them.
    fn add_base(&mut self, space: Option<SpaceId>) -> Result<BaseId, WriteError> {
        let mut base = Base::default();
        if let (Some(space), Some(Parent { capsule, packs, frames, .. })) =
            (space, &mut self.parent)
        {
            let shared = &self.shared;
            let read = capsule.segments(space, |segment| {
                let mut state = shared.lock();
                // Each after its base, as in the segment.
                let mut numbers: Vec<u32> = Vec::with_capacity(segment.frames().len());
                for frame in segment.frames() {
                    const CHECKED: &str = "a segment's indices are valid";
                    let digest = *segment.packs().get(frame.pack as usize).expect(CHECKED);
                    let pack = *packs.entry(digest).or_insert_with(|| {
                        let bytes = capsule.pack_bytes(&digest).unwrap_or_default();
                        state.add_stored_pack(BlobRef { digest, bytes })
                    });
                    let base = frame.base.map(|base| *numbers.get(base as usize).expect(CHECKED));
                    if base.is_some_and(|base| state.map.frame(base).is_none_or(MapFrame::is_delta))
                    {
                        let (pack, offset) = (digest, frame.offset);
                        return Err(ReadError::Base { pack, offset });
                    }
                    numbers.push(
                        *frames.entry((pack, frame.offset)).or_insert_with(|| {
                            state.map.add_frame(MapFrame { pack, base, ..*frame })
                        }),
                    );
                }
                for run in segment.runs() {
                    if let Some(&frame) = numbers.get(run.frame as usize) {
                        base.add_parent(MapRun { frame, ..*run });
                    }
                }
                Ok(())
            });
            read.map_err(|error| WriteError::Parent(Box::new(error)))?;
        }
        let mut state = self.shared.lock();
        state.bases.push(base);
        Ok(BaseId(u32::try_from(state.bases.len() - 1).expect("there are fewer objects than 2^32")))
    }

    fn flush_pages(&mut self) -> Result<(), WriteError> {
        let PendingPages { parts, bytes } = std::mem::take(&mut self.pending);
        match parts.is_empty() {
            true => Ok(()),
            false => self.submit(Work::Pages { parts, bytes }),
        }
    }

    fn take_bytes(&mut self, name: &StreamName, mut bytes: &[u8]) -> Result<(), WriteError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let shared = self.shared.clone();
        let stream = self.stream(name)?;
        if !stream.is_open {
            stream.parts.push(shared.lock().add_part(OpenParts::default()));
            stream.is_open = true;
        }
        self.shared.progress.raw_bytes.fetch_add(bytes.len() as u64, Relaxed);
        while !bytes.is_empty() {
            let stream = self.streams.get_mut(name).expect("the stream was just made");
            let room = BATCH_BYTES_MAX - stream.bytes.len();
            let (now, later) = bytes.split_at(room.min(bytes.len()));
            if stream.bytes.capacity() < BATCH_BYTES_MAX
                && stream.bytes.len() + now.len() >= STREAM_BUFFER_BYTES_MIN
            {
                let mut buffer = take_buffer(&self.shared);
                buffer.append(&mut stream.bytes);
                stream.bytes = buffer;
            }
            stream.bytes.extend_from_slice(now);
            bytes = later;
            if stream.bytes.len() == BATCH_BYTES_MAX {
                let work = stream.take_work();
                work.map_or(Ok(()), |work| self.submit(work))?;
            }
        }
        if self.streams.values().map(|stream| stream.bytes.len()).sum::<usize>()
            > STREAMS_PENDING_BYTES_MAX
        {
            let longest = self.streams.values_mut().max_by_key(|stream| stream.bytes.len());
            let work = longest.expect("a stream was just appended to").take_work();
            work.map_or(Ok(()), |work| self.submit(work))?;
        }
        Ok(())
    }

    /// The stream of that name, which may be a new one.
    fn stream(&mut self, name: &StreamName) -> Result<&mut PendingStream, WriteError> {
        if !self.streams.contains_key(name) {
            check_name(name)?;
            if self.streams.len() == STREAMS_MAX {
                return Err(WriteError::Streams);
            }
        }
        Ok(self.streams.entry(name.clone()).or_default())
    }

    fn take_segment(&mut self, parts: Vec<Vec<u8>>) -> Result<SegmentId, WriteError> {
        let bytes = parts.iter().map(Vec::len).sum::<usize>();
        if parts.iter().any(|part| part.is_empty() || part.len() > BATCH_BYTES_MAX)
            || bytes == 0
            || bytes > SEGMENT_BYTES_MAX
        {
            return Err(WriteError::SegmentBytes { bytes, parts: parts.len() });
        }
        self.shared.progress.raw_bytes.fetch_add(bytes as u64, Relaxed);
        let segment = OpenParts { is_segment: true, ..OpenParts::default() };
        let number = self.shared.lock().add_part(segment);
        let mut parts = parts.into_iter().peekable();
        while let Some(bytes) = parts.next() {
            self.submit(Work::Stream { number, bytes, last: parts.peek().is_none() })?;
        }
        Ok(segment_id(number))
    }

    fn take_stored_segment(&self, stored: &StoredSegment) -> Option<SegmentId> {
        let parent = self.parent.as_ref()?;
        let StoredSegment { blob, raw_bytes } = *stored;
        if !parent.stream_blobs.contains(&blob) {
            return None;
        }
        let blobs = vec![Some(blob)];
        let segment = OpenParts { is_segment: true, raw_bytes, open: Vec::new(), blobs };
        Some(segment_id(self.shared.lock().add_part(segment)))
    }

    fn place_segment(&mut self, name: &StreamName, segment: SegmentId) -> Result<(), WriteError> {
        let number = segment.0 as usize;
        if !self.shared.lock().parts.get(number).is_some_and(|part| part.is_segment) {
            return Err(WriteError::Segment { segment });
        }
        let stream = self.stream(name)?;
        let work = stream.take_work();
        stream.is_open = false;
        stream.parts.push(number);
        work.map_or(Ok(()), |work| self.submit(work))
    }

    /// Submits everything that waits for more.
    fn flush(&mut self) -> Result<(), WriteError> {
        self.flush_pages()?;
        let waiting: Vec<Work> =
            self.streams.values_mut().filter_map(PendingStream::take_work).collect();
        for work in waiting {
            self.submit(work)?;
        }
        let shared = &self.shared;
        drop(shared.wait(|state| state.in_flight == 0)?);
        Ok(())
    }

    /// Makes `error` the writer's state, unless one was there before.
    fn fail<T>(&self, result: Result<T, WriteError>) -> io::Result<T> {
        result.map_err(|error| match error {
            WriteError::Earlier(shared) => io::Error::other(shared),
            error => io::Error::other(self.shared.fail(error)),
        })
    }
}

impl PendingStream {
    /// What waits, as a job.
    fn take_work(&mut self) -> Option<Work> {
        let number = *self.parts.last().filter(|_| !self.bytes.is_empty())?;
        Some(Work::Stream { number, bytes: std::mem::take(&mut self.bytes), last: false })
    }
}

fn segment_id(number: usize) -> SegmentId {
    SegmentId(u32::try_from(number).expect("a capsule has fewer segments than 2^32"))
}

/// An empty buffer for a batch. Whatever is to become a job lies in one of these, so that there are as many as jobs.
fn take_buffer(shared: &Shared) -> Vec<u8> {
    let recycled = shared.lock().batch_buffers.pop();
    recycled.unwrap_or_else(|| Vec::with_capacity(BATCH_BYTES_MAX))
}

impl Sink for CapsuleWriter {
    fn buffer(&mut self) -> Vec<u8> {
        take_buffer(&self.shared)
    }

    fn pages(&mut self, batch: PageBatch) -> io::Result<()> {
        let PageBatch { spaces, runs, bytes } = batch;
        let result = self.take_pages(Owner::Spaces(spaces), false, runs, bytes);
        self.fail(result)
    }

    fn exact_pages(&mut self, batch: PageBatch) -> io::Result<()> {
        let PageBatch { spaces, runs, bytes } = batch;
        let result = self.take_pages(Owner::Spaces(spaces), true, runs, bytes);
        self.fail(result)
    }

    fn base(&mut self, parent: Option<SpaceId>) -> io::Result<BaseId> {
        self.add_base(parent).map_err(|error| io::Error::other(self.shared.fail(error)))
    }

    fn earlier(&mut self, space: SpaceId, base: BaseId) {
        self.shared.lock().earlier.insert(space, base);
    }

    fn draft(
        &mut self,
        base: BaseId,
        exact: bool,
        runs: Vec<PageRun>,
        bytes: Vec<u8>,
    ) -> io::Result<()> {
        let result = match self.shared.lock().bases.get(base.0 as usize) {
            Some(_) => Ok(()),
            None => Err(WriteError::Base { base }),
        };
        let result = result.and_then(|()| self.take_pages(Owner::Base(base), exact, runs, bytes));
        self.fail(result)
    }

    fn unchanged(
        &mut self,
        spaces: &Arc<[SpaceId]>,
        base: BaseId,
        run: PageRun,
        exact: bool,
    ) -> io::Result<()> {
        match self.unchanged.last_mut() {
            Some(last)
                if last.spaces == *spaces
                    && last.base == base
                    && last.exact == exact
                    && last.run.first.checked_add(last.run.count) == Some(run.first) =>
            {
                last.run.count += run.count;
            }
            _ => self.unchanged.push(Unchanged { spaces: spaces.clone(), base, run, exact }),
        }
        Ok(())
    }

    fn settle(&mut self) -> io::Result<()> {
        let result = self.flush_pages();
        let shared = &self.shared;
        let result = result.and_then(|()| shared.wait(|state| state.in_flight == 0).map(drop));
        self.fail(result)
    }

    fn append(&mut self, stream: &StreamName, bytes: &[u8]) -> io::Result<()> {
        let result = self.take_bytes(stream, bytes);
        self.fail(result)
    }

    fn segment(&mut self, parts: Vec<Vec<u8>>) -> io::Result<SegmentId> {
        let result = self.take_segment(parts);
        self.fail(result)
    }

    fn stored_segment(&mut self, stored: &StoredSegment) -> io::Result<Option<SegmentId>> {
        Ok(self.take_stored_segment(stored))
    }

    fn place(&mut self, stream: &StreamName, segment: SegmentId) -> io::Result<()> {
        let result = self.place_segment(stream, segment);
        self.fail(result)
    }
}

impl Drop for CapsuleWriter {
    fn drop(&mut self) {
        self.jobs = None;
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        // Workers that wait for room to upload, and uploads that wait for a place, end now.
        self.shared.uploads.close();
        for worker in self.workers.drain(..) {
            // A worker that panicked has told so through the writer's state.
            let _ = worker.join();
        }
    }
}

/// A blob that is complete.
type Sealed = (Purpose, Vec<u8>);

impl Shared {
    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held is noted as the writer's failure by the guard of the worker.
        self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Waits until `ready`, or until something has failed. Something always happens: each call to the store is bounded.
    fn wait(&self, ready: impl Fn(&State) -> bool) -> Result<MutexGuard<'_, State>, WriteError> {
        let mut state = self.lock();
        loop {
            if let Some(error) = &state.failed {
                return Err(WriteError::Earlier(error.clone()));
            }
            if ready(&state) {
                return Ok(state);
            }
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn fail(&self, error: WriteError) -> SharedError {
        let mut state = self.lock();
        let error = state.failed.get_or_insert_with(|| SharedError(Arc::new(error))).clone();
        drop(state);
        self.uploads.close();
        self.changed.notify_all();
        error
    }

    pub(crate) fn set_share(&self, share: Share) {
        let Plan { threads, in_flight_max } = Plan::of(share, self.uploads_max);
        // Whoever looks and then waits does both under the lock.
        let state = self.lock();
        self.threads_max.store(threads, Relaxed);
        self.in_flight_max.store(in_flight_max, Relaxed);
        drop(state);
        self.changed.notify_all();
    }

    /// Waits until so many threads and one more may compress, or none need any more.
    fn wait_for_turn(&self, number: usize) {
        let mut state = self.lock();
        while number >= self.threads_max.load(Relaxed) && !state.closed {
            state = self.changed.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }

    fn work(self: Arc<Shared>, number: usize, queue: &Receiver<Job>) {
        /// Tells the others if this thread ends by a panic. The thread's number may be another's soon.
        struct Guard(Arc<Shared>, i32);
        impl Drop for Guard {
            fn drop(&mut self) {
                self.0.lock().thread_ids.retain(|id| *id != self.1);
                if std::thread::panicking() {
                    self.0.fail(WriteError::Panicked);
                }
            }
        }
        let id = rustix::thread::gettid().as_raw_nonzero().get();
        self.lock().thread_ids.push(id);
        let _guard = Guard(self.clone(), id);
        self.wait_for_turn(number);
        let mut encoder = match PageEncoder::new() {
            Ok(encoder) => encoder,
            Err(error) => {
                self.fail(WriteError::Compress(error));
                return;
            }
        };
        while let Ok(Job { sequence, work }) = queue.recv() {
            if self.lock().failed.is_some() {
                continue;
            }
            // A job that was taken is done: those after it wait for it.
            let result = match self.encode(&mut encoder, work) {
                Ok(done) => self.place(sequence, done),
                Err(error) => Err(error),
            };
            if let Err(error) = result {
                self.fail(error);
            }
            self.wait_for_turn(number);
        }
    }

    fn encode(&self, encoder: &mut PageEncoder, work: Work) -> Result<Done, WriteError> {
        let mut stored = self.lock().stored_buffers.pop().unwrap_or_default();
        stored.clear();
        match work {
            Work::Pages { parts, mut bytes } => {
                let pages_before = bytes.len() / PAGE_BYTES;
                let (runs, zeros) = drop_zero_pages(parts, &mut bytes);
                let pages = bytes.len() / PAGE_BYTES;
                let encoded = encoder.encode(runs, &mut bytes, stored, self);
                let encoded = encoded.map_err(WriteError::Compress)?;
                let done = Done::Pages { encoded, zeros };
                let mut state = self.lock();
                state.zero_pages += (pages_before - pages) as u64;
                state.recycle(bytes, self.in_flight_max.load(Relaxed));
                Ok(done)
            }
            Work::Stream { number, bytes, last } => {
                encoder.plain().compress(&bytes, &mut stored).map_err(WriteError::Compress)?;
                let mut state = self.lock();
                state.parts.get_mut(number).expect("the part was numbered").raw_bytes +=
                    bytes.len() as u64;
                state.recycle(bytes, self.in_flight_max.load(Relaxed));
                Ok(Done::Stream { number, stored, last })
            }
        }
    }

    /// Puts a result, and those that waited for it, where they belong, and uploads what is complete by that.
    fn place(self: &Arc<Shared>, sequence: u64, done: Done) -> Result<(), WriteError> {
        self.batches.fetch_add(1, Relaxed);
        let mut sealed = Vec::new();
        let mut placed = 0;
        {
            let mut state = self.lock();
            state.early.insert(sequence, done);
            loop {
                let next = state.next_sequence;
                let Some(done) = state.early.remove(&next) else { break };
                state.next_sequence += 1;
                placed += 1;
                state.place(done, &mut sealed)?;
            }
        }
        // Outside of the lock: the others go on compressing while this thread waits for room to upload. What they can
        // pile up meanwhile is bounded by the jobs in flight, which count until here.
        sealed.into_iter().try_for_each(|sealed| self.upload(sealed))?;
        self.lock().in_flight -= placed;
        self.changed.notify_all();
        Ok(())
    }

    /// Uploads the pack and the parts of streams that are still open. Only when no job is in flight.
    fn seal_rest(self: &Arc<Shared>) -> Result<(), WriteError> {
        let mut sealed = Vec::new();
        {
            let mut state = self.lock();
            state.seal_pack(&mut sealed);
            for stream in 0..state.parts.len() {
                state.seal_part(stream, &mut sealed);
            }
        }
        sealed.into_iter().try_for_each(|sealed| self.upload(sealed))
    }

    /// Cuts the page maps into segments and uploads them. Only when the digests of all packs are known.
    fn store_maps(self: &Arc<Shared>, map: CompleteMap) -> Result<(), WriteError> {
        let mut last = None;
        let mut index = 0;
        map.emit(|space, segment: Segment| {
            index = if last == Some(space) { index + 1 } else { 0 };
            last = Some(space);
            let content = segment.encode().map_err(WriteError::Compress)?;
            self.upload((Purpose::Segment { space, index }, content))
        })
    }

    fn store_records(self: &Arc<Shared>, records: &[u8]) -> Result<(), WriteError> {
        let too_large = |bytes, bytes_max| WriteError::Records { bytes, bytes_max };
        if records.len() > RECORDS_BYTES_MAX {
            return Err(too_large(records.len(), RECORDS_BYTES_MAX));
        }
        let mut stored = Vec::new();
        FrameEncoder::new()
            .and_then(|mut e| e.compress(records, &mut stored))
            .map_err(WriteError::Compress)?;
        if stored.len() > BLOB_BYTES_MAX {
            return Err(too_large(stored.len(), BLOB_BYTES_MAX));
        }
        self.upload((Purpose::Records, stored))
    }

    /// Refuses to name what was neither there when the writer began nor was stored by it: it may have been collected before.
    fn refuse_unknown<'a>(
        &self,
        mut names: impl Iterator<Item = &'a Digest>,
    ) -> Result<(), WriteError> {
        let state = self.lock();
        let unknown = |digest: &&Digest| match state.known_in_part {
            true => self.condemned.contains(*digest),
            false => !state.known.contains_key(*digest),
        };
        match names.find(unknown) {
            Some(&digest) => {
                Err(WriteError::Unknown { address: self.store.location().to_string(), digest })
            }
            None => Ok(()),
        }
    }

    /// Hands a blob to the threads that upload, as soon as there is room for it.
    fn upload(self: &Arc<Shared>, (purpose, content): Sealed) -> Result<(), WriteError> {
        let Ok(permit) = self.store.block_on(self.uploads.clone().acquire_owned()) else {
            // Closed: because of a failure, or because the writer is being dropped.
            return Err(self
                .lock()
                .failed
                .clone()
                .map_or(WriteError::Panicked, WriteError::Earlier));
        };
        self.lock().uploading += 1;
        let shared = self.clone();
        self.store.handle().spawn(async move {
            let result = shared.upload_now(purpose, content).await;
            drop(permit);
            if let Err(error) = result {
                shared.fail(error);
            }
            shared.lock().uploading -= 1;
            shared.changed.notify_all();
        });
        Ok(())
    }

    /// Before the call, which has its own bound. This wait has one too: what all writers of the node have in flight is bounded, and
    /// goes at a rate.
    async fn wait_for_bandwidth(&self, bytes: u64) -> Result<(), WriteError> {
        let Some(limit) = self.upload_limit.get().cloned() else { return Ok(()) };
        let noted = limit.clone();
        let wait = tokio::task::spawn_blocking(move || noted.note(bytes));
        let until = Instant::now() + wait.await.map_err(|_| WriteError::Panicked)?;
        while !limit.is_lifted()
            && let Some(left) = until.checked_duration_since(Instant::now())
            && !self.uploads.is_closed()
        {
            tokio::time::sleep(left.min(LIFTED_WITHIN)).await;
        }
        Ok(())
    }

    async fn upload_now(&self, purpose: Purpose, content: Vec<u8>) -> Result<(), WriteError> {
        let (condemned, packs_here) = (self.condemned.clone(), self.packs_here.clone());
        let is_kept = self.stays.load(Relaxed) && purpose.kind() == BlobKind::Pack;
        let hash = move || {
            let (blob, content) = match BlobRef::to(&content) {
                blob if condemned.contains(&blob.digest) => {
                    let content = another_form(purpose.kind(), &content)?;
                    (BlobRef::to(&content), content)
                }
                blob => (blob, content),
            };
            if is_kept {
                packs_here.keep(&blob.digest, &content);
            }
            Ok((blob, content))
        };
        let hashed = tokio::task::spawn_blocking(hash).await.map_err(|_| WriteError::Panicked)?;
        let (blob, content) = hashed.map_err(WriteError::Compress)?;
        let known = self.lock().known.get(&blob.digest) == Some(&blob.bytes);
        if !known {
            let content = self.lock().pack_buffers.lend(content);
            self.wait_for_bandwidth(blob.bytes).await?;
            let begun = Instant::now();
            self.store.put(&blob_path(&blob.digest), content).await?;
            self.progress.add_upload(begun.elapsed());
            self.progress.uploaded_bytes.fetch_add(blob.bytes, Relaxed);
        }
        let mut state = self.lock();
        if !known {
            state.uploaded_bytes += blob.bytes;
            if state.known.len() < KNOWN_BLOBS_MAX {
                state.known.insert(blob.digest, blob.bytes);
            } else {
                state.known_in_part = true;
            }
        }
        match purpose {
            Purpose::Pack { number } => {
                state.map.set_pack(number, blob.digest);
                state.packs.insert(number, blob);
            }
            Purpose::StreamPart { stream, part } => {
                let parts =
                    state.parts.get_mut(stream).and_then(|stream| stream.blobs.get_mut(part));
                *parts.expect("the part was numbered when it was sealed") = Some(blob);
            }
            Purpose::Segment { space, index } => {
                state.segments.insert((space, index), blob);
            }
            Purpose::Records => state.records = Some(blob),
        }
        Ok(())
    }
}

impl State {
    fn place(&mut self, done: Done, sealed: &mut Vec<Sealed>) -> Result<(), WriteError> {
        match done {
            Done::Pages { encoded, zeros } => {
                for (base, run) in zeros {
                    self.base(base).set(run, None);
                }
                self.place_pages(&encoded, sealed)?;
                self.keep_stored(encoded.stored);
            }
            Done::Stream { number, stored, last } => {
                let part = self.parts.get_mut(number).expect("the part was numbered");
                part.open.extend_from_slice(&stored);
                if !part.is_segment {
                    self.streams_open_bytes += stored.len();
                }
                // Nothing but its own bytes says where a segment ends.
                let is_full = !part.is_segment && part.open.len() >= PACK_BYTES;
                if last || is_full {
                    self.seal_part(number, sealed);
                }
                if self.streams_open_bytes > STREAMS_PENDING_BYTES_MAX {
                    let waiting = self.parts.iter().enumerate();
                    let longest = waiting
                        .filter(|(_, part)| !part.is_segment)
                        .max_by_key(|(_, part)| part.open.len());
                    let (longest, _) = longest.expect("some are open");
                    self.seal_part(longest, sealed);
                }
                self.keep_stored(stored);
            }
        }
        Ok(())
    }

    fn base(&mut self, base: BaseId) -> &mut Base {
        self.bases.get_mut(base.0 as usize).expect("checked when it was passed")
    }

    /// A pack that is stored already.
    fn add_stored_pack(&mut self, blob: BlobRef) -> u32 {
        let number = self.map.add_pack();
        self.map.set_pack(number, blob.digest);
        self.packs.insert(number, blob);
        number
    }

    /// The whole map, when all pages have been placed.
    fn take_map(&mut self, unchanged: &mut [Unchanged]) -> Result<CompleteMap, WriteError> {
        let mut map = std::mem::take(&mut self.map);
        unchanged.sort_unstable_by_key(|unchanged| unchanged.run.first);
        for Unchanged { spaces, base, run, exact } in unchanged {
            let found = self.bases.get(base.0 as usize);
            let found = found.ok_or(WriteError::Base { base: *base })?;
            for space in spaces.iter() {
                map.add_unchanged(*space, found, *run, *exact)?;
            }
        }
        self.bases = Vec::new();
        Ok(map.complete()?)
    }

    fn place_pages(
        &mut self,
        encoded: &Encoded<Owner>,
        sealed: &mut Vec<Sealed>,
    ) -> Result<(), WriteError> {
        let mut rest = encoded.stored.as_slice();
        let mut numbers = Vec::with_capacity(encoded.frames.len());
        for frame in &encoded.frames {
            let (stored, later) = rest.split_at(frame.stored_bytes);
            rest = later;
            if self
                .pack
                .as_ref()
                .is_some_and(|pack| !pack.builder.has_room(stored.len(), PACK_BYTES))
            {
                self.seal_pack(sealed);
            }
            let map = &mut self.map;
            let pool = &self.pack_buffers;
            let pack = self.pack.get_or_insert_with(|| OpenPack {
                number: map.add_pack(),
                builder: PackBuilder::new(pool.take()),
            });
            let pages = u16::try_from(frame.pages).expect("a frame has at most 256 pages");
            let raw_bytes = u32::from(pages) * u32::try_from(PAGE_BYTES).expect("a page is small");
            let packed = pack.builder.push(frame.codec, stored, raw_bytes);
            self.new_frames.add(frame.codec, frame.pages as u64, stored.len() as u64);
            numbers.push(map.add_frame(MapFrame {
                pack: pack.number,
                offset: packed.offset,
                stored_bytes: packed.stored_bytes,
                pages,
                codec: frame.codec,
                base: frame.base,
                digest: frame.digest,
            }));
        }
        for placed in &encoded.runs {
            let frame = *numbers.get(placed.frame).expect("runs lie in the frames beside them");
            let (run, page) = (placed.run, placed.page);
            match &placed.owner {
                Owner::Spaces(spaces) => {
                    for space in spaces.iter() {
                        self.map.add_run(*space, run, frame, page)?;
                    }
                }
                Owner::Base(base) => self.base(*base).set(run, Some(BasePlace { frame, page })),
            }
        }
        Ok(())
    }

    fn seal_pack(&mut self, sealed: &mut Vec<Sealed>) {
        if let Some(OpenPack { number, builder }) = self.pack.take() {
            sealed.push((Purpose::Pack { number }, builder.finish()));
        }
    }

    fn add_part(&mut self, part: OpenParts) -> usize {
        self.parts.push(part);
        self.parts.len() - 1
    }

    fn seal_part(&mut self, stream: usize, sealed: &mut Vec<Sealed>) {
        let parts = self.parts.get_mut(stream).expect("the part was numbered");
        if !parts.open.is_empty() {
            if !parts.is_segment {
                self.streams_open_bytes -= parts.open.len();
            }
            sealed.push((
                Purpose::StreamPart { stream, part: parts.blobs.len() },
                std::mem::take(&mut parts.open),
            ));
            parts.blobs.push(None);
        }
    }

    fn recycle(&mut self, mut buffer: Vec<u8>, buffers_max: usize) {
        if self.batch_buffers.len() < buffers_max && buffer.capacity() == BATCH_BYTES_MAX {
            buffer.clear();
            self.batch_buffers.push(buffer);
        }
    }

    fn keep_stored(&mut self, buffer: Vec<u8>) {
        if self.stored_buffers.len() < STORED_BUFFERS_MAX {
            self.stored_buffers.push(buffer);
        }
    }
}

impl StoredBefore<Owner> for Shared {
    fn memory(&self, owner: &Owner) -> Option<ParentRuns> {
        let state = self.lock();
        let base = match owner {
            Owner::Base(base) => *base,
            // What several have in common, the first had before as a rule.
            Owner::Spaces(spaces) => *state.earlier.get(spaces.first()?)?,
        };
        Some(state.bases.get(base.0 as usize)?.parent())
    }

    fn frame(&self, number: u32) -> Option<(Digest, MapFrame)> {
        let state = self.lock();
        let frame = state.map.frame(number)?;
        Some((state.map.pack(frame.pack)?, frame))
    }

    fn stored(&self, pack: &Digest, frame: &MapFrame) -> Option<Vec<u8>> {
        self.packs_here.frame(pack, frame)
    }

    fn trials(&self) -> &Trials {
        &self.trials
    }
}

/// Removes the pages that are all zeros and need not be stored. Returns the runs of those that are left, and those of bases that
/// were removed.
fn drop_zero_pages(
    parts: Vec<Part>,
    bytes: &mut Vec<u8>,
) -> (Vec<OwnedRun>, Vec<(BaseId, PageRun)>) {
    const ZEROS: [u8; PAGE_BYTES] = [0; PAGE_BYTES];
    let mut kept: Vec<OwnedRun> = Vec::new();
    let mut zeros: Vec<(BaseId, PageRun)> = Vec::new();
    // Pages before `end` are kept; the next page to look at begins at `at`.
    let (mut end, mut at) = (0, 0);
    for Part { owner, exact, runs } in parts {
        for PageRun { first, count } in runs {
            for number in first..first.saturating_add(count) {
                let page = at..at + PAGE_BYTES;
                at = page.end;
                if !exact && bytes.get(page.clone()) == Some(&ZEROS) {
                    if let Owner::Base(base) = owner {
                        append_page(&mut zeros, base, number);
                    }
                    continue;
                }
                if end != page.start {
                    bytes.copy_within(page, end);
                }
                end += PAGE_BYTES;
                append_page(&mut kept, owner.clone(), number);
            }
        }
    }
    bytes.truncate(end);
    (kept, zeros)
}

/// Appends a page to runs, to the last one if it follows it.
fn append_page<T: PartialEq>(runs: &mut Vec<(T, PageRun)>, owner: T, number: u64) {
    match runs.last_mut() {
        Some((last, run)) if *last == owner && run.first + run.count == number => run.count += 1,
        _ => runs.push((owner, PageRun { first: number, count: 1 })),
    }
}

impl Parent {
    fn new(capsule: CapsuleReader) -> Parent {
        let stream_blobs = capsule.manifest().streams.values().flatten().copied().collect();
        Parent { capsule, stream_blobs, packs: HashMap::new(), frames: HashMap::new() }
    }
}
