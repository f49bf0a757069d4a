//! How a capture hands its data to whoever stores it, and how a restore gets it back.
//!
//! The engine knows processes and no network; the store knows networks and no processes.
//! They meet in the two traits of this module, and in nothing else.

use std::fmt;
use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::manifest::BlobRef;
use crate::pagemap::PAGE_NUMBER_END;

/// Size of a page in a capsule, in bytes. Every supported host uses 4 KiB base pages.
pub const PAGE_BYTES: usize = 4096;

/// A run of pages is passed in batches of at most this many bytes, which is also the most that a frame holds.
pub const BATCH_BYTES_MAX: usize = 1 << 20;

/// Names one paged object of a capsule: an address space, a shared memory object, or the content of an unlinked file.
///
/// Ids are given by the engine, from 0 upwards, and are only unique within one capsule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SpaceId(pub u32);

impl fmt::Display for SpaceId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "space {}", self.0)
    }
}

/// `count` pages from page number `first` (an address or file offset divided by [`PAGE_BYTES`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRun {
    pub first: u64,
    pub count: u64,
}

/// Pages of a space, or of several that have them in common: `bytes` holds the content of all `runs`, one after another. In each of
/// `spaces` the pages have the same numbers.
///
/// Runs are in ascending order and do not overlap, within a batch and from batch to batch of a space.
/// `bytes.len()` is [`PAGE_BYTES`] times the sum of the counts, and at most [`BATCH_BYTES_MAX`].
#[derive(Debug)]
pub struct PageBatch {
    pub spaces: Arc<[SpaceId]>,
    pub runs: Vec<PageRun>,
    pub bytes: Vec<u8>,
}

/// Names what has been stored of a paged object before the capsule's instant: by the capsule before it, and while the container ran.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BaseId(pub u32);

/// A segment of a stream is at most this long before compression: it is one blob, however badly it can be compressed.
pub const SEGMENT_BYTES_MAX: usize = 8 << 20;

/// Names a segment of a stream: bytes that lie in a blob of their own, and in as many places of streams as one likes.
///
/// Numbers are the sink's, and mean nothing in another capsule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct SegmentId(pub u32);

/// Where a segment is stored: its blob, and its bytes before compression.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct StoredSegment {
    pub blob: BlobRef,
    pub raw_bytes: u64,
}

/// A named sequence of bytes beside the pages, such as the layer of changed files.
///
/// The name becomes part of the manifest: lower-case letters, digits, `-` and `.`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StreamName(pub String);

/// Where a capture writes.
///
/// A sink has bounded buffers: each call blocks while they are full. After an error the sink stays failed, and
/// the capsule can't be committed.
pub trait Sink {
    /// An empty buffer with room for [`BATCH_BYTES_MAX`], recycled from an earlier batch if there is one.
    fn buffer(&mut self) -> Vec<u8>;

    /// Takes pages. Pages that are all zeros may be passed; the sink leaves them out of the page map, where an absent
    /// page means zeros (or, for a private file mapping, the file's own content: such pages are passed by [`Sink::exact_pages`]).
    fn pages(&mut self, batch: PageBatch) -> io::Result<()>;

    /// Takes pages that have to be in the page map even when they are all zeros.
    fn exact_pages(&mut self, batch: PageBatch) -> io::Result<()>;

    /// A base: what `parent` names in the capsule that this one continues, or nothing.
    ///
    /// Its pages count for nothing until [`Sink::unchanged`] says which of them the capsule has.
    fn base(&mut self, parent: Option<SpaceId>) -> io::Result<BaseId>;

    /// Pages of `space` that are passed with their content are later versions of those that the capsule before has in `base`: a sink
    /// may store what has changed in them. Of what is passed nothing else depends on it.
    fn earlier(&mut self, space: SpaceId, base: BaseId) {
        let _ = (space, base);
    }

    /// Takes pages of a container that runs: from now on they are what `base` has in their place. `exact` is as in
    /// [`Sink::exact_pages`]. Batches of one base may come in any order.
    fn draft(
        &mut self,
        base: BaseId,
        exact: bool,
        runs: Vec<PageRun>,
        bytes: Vec<u8>,
    ) -> io::Result<()>;

    /// Takes the pages of `run` as `base` has them in the end, for all of `spaces`; what it does not have is zeros, or, where `exact` is
    /// said, an error of the commit.
    ///
    /// Runs that are passed in this way come in any order, and overlap neither each other nor pages that are passed with their content.
    /// What is meant is what the base has when the capsule is committed, so drafts may still come. Costs little whatever the length:
    /// nothing is copied.
    fn unchanged(
        &mut self,
        spaces: &Arc<[SpaceId]>,
        base: BaseId,
        run: PageRun,
        exact: bool,
    ) -> io::Result<()>;

    /// How many bytes of pages could be passed now without waiting, about.
    fn room(&self) -> u64 {
        u64::MAX
    }

    /// Waits until what was passed has left the buffers, so that they are free for what comes while a container stands.
    fn settle(&mut self) -> io::Result<()>;

    /// Appends to a stream, which comes into being with its first byte.
    fn append(&mut self, stream: &StreamName, bytes: &[u8]) -> io::Result<()>;

    /// Takes a segment: all of `parts`, each of at most [`BATCH_BYTES_MAX`], together of at most [`SEGMENT_BYTES_MAX`] and not empty.
    /// Equal parts make equal blobs. It counts for nothing until [`Sink::place`] says where it stands.
    fn segment(&mut self, parts: Vec<Vec<u8>>) -> io::Result<SegmentId>;

    /// A segment that the capsule which this one continues has in a stream; none if there is no such capsule, or it has not. Nothing
    /// is read.
    fn stored_segment(&mut self, stored: &StoredSegment) -> io::Result<Option<SegmentId>>;

    /// Appends a segment to a stream.
    fn place(&mut self, stream: &StreamName, segment: SegmentId) -> io::Result<()>;
}

/// Pages of a space, and where their content is stored: that of the first one at `place`, that of the next one at `place + 1`.
///
/// Equal places are equal contents. Places mean nothing but that, and only within one source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StoredRun {
    pub run: PageRun,
    pub place: u64,
}

/// Where a restore reads. Everything it returns has been checked against its digest.
pub trait Source: Sync {
    /// The runs of pages that `space` holds, in ascending order. Empty for an unknown space.
    fn runs(&self, space: SpaceId) -> io::Result<Vec<PageRun>>;

    /// For each of `spaces` its runs of pages and their places, in ascending order. Empty for an unknown space.
    fn stored(&self, spaces: &[SpaceId]) -> io::Result<Vec<Vec<StoredRun>>>;

    /// Passes every page of `spaces` to `place`, in no promised order, from several threads at once.
    ///
    /// The first error, of the source or of `place`, ends the transfer and is returned.
    fn transfer(&self, spaces: &[SpaceId], place: &Place<'_>) -> io::Result<()> {
        let whole = [PageRun { first: 0, count: PAGE_NUMBER_END }];
        let wanted: Vec<(SpaceId, &[PageRun])> =
            spaces.iter().map(|space| (*space, whole.as_slice())).collect();
        self.transfer_some(&wanted, place)
    }

    /// As [`Source::transfer`], but of each space only the pages that lie in the runs beside it, which are in ascending order and
    /// do not overlap.
    fn transfer_some(&self, wanted: &[(SpaceId, &[PageRun])], place: &Place<'_>) -> io::Result<()>;

    /// Reads a stream from its start, or `None` if the capsule has no stream of that name.
    fn stream(&self, name: &StreamName) -> io::Result<Option<Box<dyn io::Read + Send + '_>>>;
}

/// Puts the pages of one batch where they belong.
pub type Place<'a> = dyn Fn(SpaceId, &[PageRun], &[u8]) -> io::Result<()> + Sync + 'a;
