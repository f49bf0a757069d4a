//! Page maps: for each space, which pages a capsule holds and in which frame of which pack they lie.
//!
//! The map of a space is cut into segments, each a blob. A segment is complete in itself: it names packs by digest and
//! frames with their place, length, codec and digest, so that one frame can be fetched by range and checked without
//! any other part of the capsule. A segment does not know the number of its space, which may change from capsule to
//! capsule. The base of a frame of differences is one of the segment's frames too, whether or not a run lies in it: whoever
//! counts what a capsule needs finds it there. A base is plain, which is checked: no page needs more than two frames.
//!
//! Where a map is cut depends only on the pages around the cut: the page numbers form a binary tree, and a node with
//! more than [`SEGMENT_RUNS_MAX`] runs is split in half. So a change in one place leaves the segments of other places,
//! and their digests, as they were.
//!
//! ```text
//! segment = "SamaraPM" | version u32 | body bytes u32 | one zstd frame of the body
//! body    = packs  : count, then 32 bytes each
//!           frames : count, then (pack, offset, stored bytes, pages, codec, 32 bytes of digest) each;
//!                    where the codec says that there is a base, its index stands before the digest
//!           runs   : count, then (gap, pages, 0) or (gap, pages, 1 + zigzag(frame difference), page in frame) each
//! ```

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::sync::Arc;

use crate::digest::{Digest, FrameDigest};
use crate::frame::{Codec, FRAME_PAGES_MAX, FrameError};
use crate::transfer::{PageRun, SpaceId};
use crate::{BLOB_BYTES_MAX, FORMAT_VERSION, varint};

/// Runs of a segment at most. A dense gigabyte is about a thousand runs; a scattered one up to 131,072.
pub const SEGMENT_RUNS_MAX: usize = 16384;

/// Page numbers are below this bound: an address or file offset of 64 bits, divided by the page size.
pub const PAGE_NUMBER_END: u64 = 1 << 52;

/// Spaces of a capsule are numbered below this bound. A space is a process or a shared object; Linux has at most
/// 4,194,304 processes.
pub const SPACES_MAX: u32 = 1 << 24;

const MAGIC: &[u8; 8] = b"SamaraPM";

/// Frames of a segment at most, and packs: every run may have a frame of its own, and that a base of its own.
pub const SEGMENT_FRAMES_MAX: usize = 2 * SEGMENT_RUNS_MAX;

/// Every frame may have a pack of its own: 32 bytes a pack, 32 bytes and six numbers a frame (at most 50 bytes together), four
/// numbers a run. This is no less than that, so no segment that can be built is refused.
const BODY_BYTES_MAX: usize = SEGMENT_RUNS_MAX * 192 + 64;

/// `count` pages from page `first` lie in frame `frame`, from the frame's page `page` on.
///
/// What `frame` counts is said where a value of this type is handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapRun {
    pub first: u64,
    pub frame: u32,
    pub count: u16,
    pub page: u16,
}

impl MapRun {
    fn end(&self) -> u64 {
        self.first + u64::from(self.count)
    }

    /// The part of the run that lies in `[low, high)`, which it must touch.
    #[must_use]
    pub fn clip(&self, low: u64, high: u64) -> MapRun {
        let first = self.first.max(low);
        let end = self.end().min(high);
        let skipped = u16::try_from(first - self.first).expect("a run has fewer than 65,536 pages");
        let count = u16::try_from(end - first).expect("a run has fewer than 65,536 pages");
        MapRun { first, frame: self.frame, count, page: self.page + skipped }
    }
}

/// A frame as a segment names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapFrame {
    /// Index into the packs of the segment.
    pub pack: u32,
    pub offset: u32,
    pub stored_bytes: u32,
    pub pages: u16,
    pub codec: Codec,
    /// The frame whose pages it changes: there for [`Codec::Delta`], and for no other. It counts what holds this frame, and
    /// is itself plain.
    pub base: Option<u32>,
    /// Digest of the stored bytes.
    pub digest: FrameDigest,
}

impl MapFrame {
    /// Whether its pages are told by what they differ in from those of another frame.
    pub fn is_delta(self) -> bool {
        self.base.is_some()
    }
}

/// One decoded segment. Its runs are in ascending order and don't overlap, and every index in it is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    packs: Vec<Digest>,
    frames: Vec<MapFrame>,
    runs: Vec<MapRun>,
}

/// Why bytes are no segment of a page map.
#[derive(Debug, thiserror::Error)]
pub enum SegmentError {
    #[error(
        "a page-map segment of {bytes} bytes is shorter than its fixed parts, or longer than {BLOB_BYTES_MAX}"
    )]
    Size { bytes: usize },
    #[error("the blob is no page-map segment")]
    Magic,
    #[error(
        "the page-map segment has format version {found}, this samara reads up to {FORMAT_VERSION}; use a newer one"
    )]
    Version { found: u32 },
    #[error("the page-map segment declares a body of {bytes} bytes, of at most {BODY_BYTES_MAX}")]
    BodySize { bytes: usize },
    #[error("the page-map segment is no zstd data")]
    Zstd(#[source] io::Error),
    #[error("the page-map segment is cut short or has bytes left over in its {table}")]
    Truncated { table: &'static str },
    #[error("the page-map segment declares too many entries in its {table}")]
    Count { table: &'static str },
    #[error(
        "frame {frame} of the page-map segment lies outside of a pack, or has no valid number of pages"
    )]
    Frame { frame: usize },
    #[error("frame {frame} of the page-map segment")]
    Codec { frame: usize, source: FrameError },
    #[error("frame {frame} of the page-map segment has a base that does not come before it")]
    Base { frame: usize },
    #[error(
        "frame {frame} of the page-map segment has a base that has a base itself, which is one too many"
    )]
    Depth { frame: usize },
    #[error("run {run} of the page-map segment is out of order or outside of its frame")]
    Run { run: usize },
}

impl Segment {
    /// The packs that the segment refers to.
    pub fn packs(&self) -> &[Digest] {
        &self.packs
    }

    /// The frames that the segment refers to.
    pub fn frames(&self) -> &[MapFrame] {
        &self.frames
    }

    /// The runs, with `frame` counting [`Segment::frames`].
    pub fn runs(&self) -> &[MapRun] {
        &self.runs
    }

    /// The bytes of the segment's blob.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        varint::put(&mut body, self.packs.len() as u64);
        for pack in &self.packs {
            body.extend_from_slice(pack.as_bytes());
        }
        varint::put(&mut body, self.frames.len() as u64);
        for frame in &self.frames {
            varint::put(&mut body, frame.pack.into());
            varint::put(&mut body, frame.offset.into());
            varint::put(&mut body, frame.stored_bytes.into());
            varint::put(&mut body, frame.pages.into());
            body.push(frame.codec.code());
            if let Some(base) = frame.base {
                varint::put(&mut body, base.into());
            }
            body.extend_from_slice(frame.digest.as_bytes());
        }
        varint::put(&mut body, self.runs.len() as u64);
        let mut coder = RunCoder::default();
        for run in &self.runs {
            coder.put(&mut body, run);
        }

        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&FORMAT_VERSION.to_le_bytes());
        bytes.extend_from_slice(
            &u32::try_from(body.len()).expect("a segment's body is small").to_le_bytes(),
        );
        bytes.extend_from_slice(&zstd::bulk::compress(&body, crate::frame::ZSTD_LEVEL)?);
        Ok(bytes)
    }

    /// Reads a segment.
    pub fn decode(bytes: &[u8]) -> Result<Segment, SegmentError> {
        let size = || SegmentError::Size { bytes: bytes.len() };
        if bytes.len() > BLOB_BYTES_MAX {
            return Err(size());
        }
        let (magic, rest) = bytes.split_first_chunk::<8>().ok_or_else(size)?;
        if magic != MAGIC {
            return Err(SegmentError::Magic);
        }
        let (version, rest) = rest.split_first_chunk::<4>().ok_or_else(size)?;
        let (body_bytes, stored) = rest.split_first_chunk::<4>().ok_or_else(size)?;
        let version = u32::from_le_bytes(*version);
        if version != FORMAT_VERSION {
            return Err(SegmentError::Version { found: version });
        }
        let body_bytes = u32::from_le_bytes(*body_bytes) as usize;
        if body_bytes > BODY_BYTES_MAX {
            return Err(SegmentError::BodySize { bytes: body_bytes });
        }
        let body = zstd::bulk::decompress(stored, body_bytes).map_err(SegmentError::Zstd)?;
        if body.len() != body_bytes {
            return Err(SegmentError::BodySize { bytes: body.len() });
        }
        Segment::decode_body(&body)
    }

    fn decode_body(mut body: &[u8]) -> Result<Segment, SegmentError> {
        let input = &mut body;
        let count = take_count(input, "packs", SEGMENT_FRAMES_MAX)?;
        let mut packs = Vec::with_capacity(count);
        for _ in 0..count {
            packs.push(Digest::from_bytes(take_bytes(input, "packs")?));
        }

        let count = take_count(input, "frames", SEGMENT_FRAMES_MAX)?;
        let mut frames = Vec::with_capacity(count);
        for _ in 0..count {
            frames.push(take_frame(input, &frames, packs.len())?);
        }

        let count = take_count(input, "runs", SEGMENT_RUNS_MAX)?;
        let mut runs = Vec::with_capacity(count);
        let mut coder = RunCoder::default();
        for index in 0..count {
            let run = coder.take(input).map_err(|error| match error {
                RunError::Truncated => SegmentError::Truncated { table: "runs" },
                RunError::Invalid => SegmentError::Run { run: index },
            })?;
            let frame = usize::try_from(run.frame).ok().and_then(|frame| frames.get(frame));
            if frame.is_none_or(|frame| {
                u32::from(run.page) + u32::from(run.count) > u32::from(frame.pages)
            }) {
                return Err(SegmentError::Run { run: index });
            }
            runs.push(run);
        }
        match input.is_empty() {
            true => Ok(Segment { packs, frames, runs }),
            false => Err(SegmentError::Truncated { table: "runs" }),
        }
    }
}

fn take_count(
    input: &mut &[u8],
    table: &'static str,
    count_max: usize,
) -> Result<usize, SegmentError> {
    let count = varint::take(input).ok_or(SegmentError::Truncated { table })?;
    match usize::try_from(count) {
        Ok(count) if count <= count_max => Ok(count),
        _ => Err(SegmentError::Count { table }),
    }
}

fn take_bytes(input: &mut &[u8], table: &'static str) -> Result<[u8; 32], SegmentError> {
    let (bytes, rest) = input.split_first_chunk::<32>().ok_or(SegmentError::Truncated { table })?;
    *input = rest;
    Ok(*bytes)
}

/// The next frame behind those `before` it.
fn take_frame(
    input: &mut &[u8],
    before: &[MapFrame],
    packs: usize,
) -> Result<MapFrame, SegmentError> {
    let table = "frames";
    let index = before.len();
    let invalid = || SegmentError::Frame { frame: index };
    let mut number = || varint::take(input).ok_or(SegmentError::Truncated { table });
    let pack = u32::try_from(number()?).map_err(|_| invalid())?;
    let offset = u32::try_from(number()?).map_err(|_| invalid())?;
    let stored_bytes = u32::try_from(number()?).map_err(|_| invalid())?;
    let pages = u16::try_from(number()?).map_err(|_| invalid())?;
    let (&code, rest) = input.split_first().ok_or(SegmentError::Truncated { table })?;
    *input = rest;
    let codec =
        Codec::from_code(code).map_err(|source| SegmentError::Codec { frame: index, source })?;
    let base = match codec {
        Codec::Raw | Codec::Zstd => None,
        Codec::Delta => {
            let base = varint::take(input).ok_or(SegmentError::Truncated { table })?;
            let base = u32::try_from(base).map_err(|_| SegmentError::Base { frame: index })?;
            let plain = before.get(base as usize).ok_or(SegmentError::Base { frame: index })?;
            if plain.base.is_some() {
                return Err(SegmentError::Depth { frame: index });
            }
            Some(base)
        }
    };
    let digest = FrameDigest::from_bytes(take_bytes(input, table)?);

    let end = u64::from(offset) + u64::from(stored_bytes);
    let valid = (pack as usize) < packs
        && end <= BLOB_BYTES_MAX as u64
        && pages != 0
        && usize::from(pages) <= FRAME_PAGES_MAX;
    match valid {
        true => Ok(MapFrame { pack, offset, stored_bytes, pages, codec, base, digest }),
        false => Err(invalid()),
    }
}

/// The encoding of a sequence of runs: each is told by its difference from the one before.
#[derive(Debug, Default)]
struct RunCoder {
    end: u64,
    frame: u32,
    page_end: u16,
}

enum RunError {
    Truncated,
    Invalid,
}

impl RunCoder {
    fn put(&mut self, out: &mut Vec<u8>, run: &MapRun) {
        varint::put(out, run.first - self.end);
        varint::put(out, run.count.into());
        if run.frame == self.frame && run.page == self.page_end {
            varint::put(out, 0);
        } else {
            varint::put(out, 1 + varint::zigzag(i64::from(run.frame) - i64::from(self.frame)));
            varint::put(out, run.page.into());
        }
        self.after(run);
    }

    fn take(&mut self, input: &mut &[u8]) -> Result<MapRun, RunError> {
        let mut number = || varint::take(input).ok_or(RunError::Truncated);
        let gap = number()?;
        let count = number()?;
        let (frame, page) = match number()? {
            0 => (self.frame, self.page_end),
            difference => {
                let frame = varint::unzigzag(difference - 1).checked_add(i64::from(self.frame));
                let frame =
                    frame.and_then(|frame| u32::try_from(frame).ok()).ok_or(RunError::Invalid)?;
                let page = u16::try_from(number()?).map_err(|_| RunError::Invalid)?;
                // The long form of what the short one says is refused: equal maps are equal bytes.
                if frame == self.frame && page == self.page_end {
                    return Err(RunError::Invalid);
                }
                (frame, page)
            }
        };
        let first = self.end.checked_add(gap).ok_or(RunError::Invalid)?;
        let end = first.checked_add(count).ok_or(RunError::Invalid)?;
        let count = u16::try_from(count).map_err(|_| RunError::Invalid)?;
        if end > PAGE_NUMBER_END
            || count == 0
            || usize::from(page) + usize::from(count) > FRAME_PAGES_MAX
        {
            return Err(RunError::Invalid);
        }
        let run = MapRun { first, frame, count, page };
        self.after(&run);
        Ok(run)
    }

    fn after(&mut self, run: &MapRun) {
        self.end = run.end();
        self.frame = run.frame;
        self.page_end = run.page + run.count;
    }
}

/// Collects the page maps of a capsule while its packs are written.
///
/// A run takes three to six bytes, a frame 56, so that millions of scattered runs stay within tens of megabytes.
#[derive(Debug, Default)]
pub struct MapBuilder {
    spaces: BTreeMap<SpaceId, SpaceRuns>,
    /// Runs that were taken from bases, in ascending order.
    unchanged: BTreeMap<SpaceId, Vec<MapRun>>,
    frames: Vec<MapFrame>,
    packs: Vec<Option<Digest>>,
}

/// What is stored of a paged object before the capsule's instant. Later pages take the place of earlier ones.
#[derive(Debug, Default)]
pub struct Base {
    /// What the capsule before has, in ascending order.
    parent: ParentRuns,
    /// By first page: how many, and where they lie; nowhere where they are zeros. They do not overlap.
    drafts: BTreeMap<u64, (u64, Option<BasePlace>)>,
}

/// What the capsule before has of a paged object, in ascending order. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct ParentRuns(Arc<Vec<MapRun>>);

impl ParentRuns {
    /// Where a page lies: frame, of those of the [`MapBuilder`], and page in it. `cursor` makes it fast to ask for pages in
    /// ascending order; it begins with 0.
    pub fn place(&self, page: u64, cursor: &mut usize) -> Option<BasePlace> {
        let is_before = |run: &MapRun| run.end() <= page;
        let low = cursor.saturating_sub(1);
        // The run that was found last, or the one behind it, as a rule.
        *cursor = match self.0.get(low..).unwrap_or_default() {
            [before, found, ..] if is_before(before) && !is_before(found) => low + 1,
            [_, before, found, ..] if is_before(before) && !is_before(found) => low + 2,
            _ => self.0.partition_point(is_before),
        };
        let run = self.0.get(*cursor).filter(|run| run.first <= page)?;
        Some(BasePlace { frame: run.frame, page: run.page }.skip(page - run.first))
    }
}

/// Where the first page of a run lies: frame, of those of a [`MapBuilder`], and page in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BasePlace {
    pub frame: u32,
    pub page: u16,
}

impl BasePlace {
    fn skip(self, pages: u64) -> BasePlace {
        let pages = u16::try_from(pages).expect("a run lies within a frame");
        BasePlace { page: self.page + pages, ..self }
    }
}

impl Base {
    /// Appends a run of the capsule before; they come in ascending order, before all others.
    pub fn add_parent(&mut self, run: MapRun) {
        Arc::make_mut(&mut self.parent.0).push(run);
    }

    /// The runs of the capsule before, whatever has come since.
    pub fn parent(&self) -> ParentRuns {
        self.parent.clone()
    }

    /// `run` lies at `place` from now on, or is zeros where there is none.
    pub fn set(&mut self, run: PageRun, place: Option<BasePlace>) {
        let PageRun { first, count } = run;
        let end = first + count;
        // What begins before and reaches into the new run, and what begins within it.
        if let Some((&start, &(pages, before))) = self.drafts.range(..first).next_back()
            && start + pages > first
        {
            self.drafts.insert(start, (first - start, before));
            if start + pages > end {
                let rest = before.map(|place| place.skip(end - start));
                self.drafts.insert(end, (start + pages - end, rest));
            }
        }
        while let Some((&start, &(pages, before))) = self.drafts.range(first..end).next() {
            self.drafts.remove(&start);
            if start + pages > end {
                let rest = before.map(|place| place.skip(end - start));
                self.drafts.insert(end, (start + pages - end, rest));
            }
        }
        self.drafts.insert(first, (count, place));
    }

    /// Appends to `found` where the pages of `run` lie, in ascending order. Those that are zeros or unknown are left out.
    pub fn find(&self, run: PageRun, found: &mut Vec<MapRun>) {
        let end = run.first + run.count;
        let mut next = run.first;
        let before = self.drafts.range(..next).next_back();
        let reaching = before.filter(|(start, (pages, _))| *start + pages > next);
        for (&start, &(pages, place)) in reaching.into_iter().chain(self.drafts.range(next..end)) {
            self.find_parent(next, start, found);
            let (low, high) = (start.max(next), (start + pages).min(end));
            if let Some(place) = place.filter(|_| low < high) {
                let BasePlace { frame, page } = place.skip(low - start);
                let count = u16::try_from(high - low).expect("a run lies within a frame");
                found.push(MapRun { first: low, frame, count, page });
            }
            next = high;
        }
        self.find_parent(next, end, found);
    }

    fn find_parent(&self, low: u64, high: u64, found: &mut Vec<MapRun>) {
        if low >= high {
            return;
        }
        let parent = &self.parent.0;
        let from = parent.partition_point(|run| run.end() <= low);
        let runs = parent.iter().skip(from).take_while(|run| run.first < high);
        found.extend(runs.map(|run| run.clip(low, high)));
    }
}

#[derive(Debug, Default)]
struct SpaceRuns {
    coder: RunCoder,
    bytes: Vec<u8>,
    last: Option<MapRun>,
}

/// Why runs can't be part of a map.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    #[error("{space}: pages from {first:#x} on were passed after pages that lie behind them")]
    Unordered { space: SpaceId, first: u64 },
    #[error(
        "{space}: pages from {first:#x} on are empty, too many for a frame, or beyond the last page number"
    )]
    Range { space: SpaceId, first: u64 },
    #[error("{space}: spaces are numbered below {SPACES_MAX}")]
    Space { space: SpaceId },
    #[error(
        "{space}: {missing} of the pages from {first:#x} on are said to be unchanged, and were never stored"
    )]
    Unknown { space: SpaceId, first: u64, missing: u64 },
}

impl MapBuilder {
    /// A further pack, whose digest is told later by [`MapBuilder::set_pack`].
    pub fn add_pack(&mut self) -> u32 {
        self.packs.push(None);
        u32::try_from(self.packs.len() - 1).expect("a capsule has fewer than 2^32 packs")
    }

    /// Tells the digest of the pack that [`MapBuilder::add_pack`] numbered.
    pub fn set_pack(&mut self, pack: u32, digest: Digest) {
        let slot = self.packs.get_mut(pack as usize).expect("the pack was numbered by add_pack");
        *slot = Some(digest);
    }

    /// A further frame; `frame.pack` is a number from [`MapBuilder::add_pack`], `frame.base` one from an earlier call.
    ///
    /// # Panics
    /// If the base has a base itself, or has not been added.
    pub fn add_frame(&mut self, frame: MapFrame) -> u32 {
        if let Some(base) = frame.base {
            let base = self.frames.get(base as usize);
            assert!(base.is_some_and(|base| base.base.is_none()), "the base of a frame is plain");
        }
        self.frames.push(frame);
        u32::try_from(self.frames.len() - 1).expect("a capsule has fewer than 2^32 frames")
    }

    /// A frame that was added.
    pub fn frame(&self, number: u32) -> Option<MapFrame> {
        self.frames.get(number as usize).copied()
    }

    /// The digest of a pack, once it is known.
    pub fn pack(&self, number: u32) -> Option<Digest> {
        self.packs.get(number as usize).copied().flatten()
    }

    /// Appends pages of a space, which lie behind all that the space has; `frame` is a number from [`MapBuilder::add_frame`].
    /// Several spaces may have pages in the same place.
    pub fn add_run(
        &mut self,
        space: SpaceId,
        run: PageRun,
        frame: u32,
        page: u16,
    ) -> Result<(), MapError> {
        let PageRun { first, count } = run;
        let range = || MapError::Range { space, first };
        if space.0 >= SPACES_MAX {
            return Err(MapError::Space { space });
        }
        first.checked_add(count).filter(|&end| end <= PAGE_NUMBER_END).ok_or_else(range)?;
        let count = u16::try_from(count).map_err(|_| range())?;
        if count == 0 || usize::from(page) + usize::from(count) > FRAME_PAGES_MAX {
            return Err(range());
        }
        let runs = self.spaces.entry(space).or_default();
        if let Some(last) = &mut runs.last {
            if first < last.end() {
                return Err(MapError::Unordered { space, first });
            }
            if first == last.end() && frame == last.frame && page == last.page + last.count {
                last.count += count;
                return Ok(());
            }
            runs.coder.put(&mut runs.bytes, last);
        }
        runs.last = Some(MapRun { first, frame, count, page });
        Ok(())
    }

    /// Appends the pages of `run` as `base` has them, whose frames are those of this builder. They lie behind all that were added to the
    /// space in this way.
    ///
    /// `exact`: none may be missing.
    pub fn add_unchanged(
        &mut self,
        space: SpaceId,
        base: &Base,
        run: PageRun,
        exact: bool,
    ) -> Result<(), MapError> {
        let first = run.first;
        if space.0 >= SPACES_MAX {
            return Err(MapError::Space { space });
        }
        if first.checked_add(run.count).is_none_or(|end| end > PAGE_NUMBER_END) {
            return Err(MapError::Range { space, first });
        }
        let runs = self.unchanged.entry(space).or_default();
        if runs.last().is_some_and(|last| first < last.end()) {
            return Err(MapError::Unordered { space, first });
        }
        let from = runs.len();
        base.find(run, runs);
        let found: u64 = runs.iter().skip(from).map(|run| u64::from(run.count)).sum();
        match exact && found < run.count {
            true => Err(MapError::Unknown { space, first, missing: run.count - found }),
            false => Ok(()),
        }
    }

    /// Puts the runs of all spaces in order.
    ///
    /// # Errors
    /// Pages of a space that were added both ways.
    pub fn complete(mut self) -> Result<CompleteMap, MapError> {
        let mut spaces = BTreeMap::new();
        let mut used: Vec<[u64; FRAME_PAGES_MAX / 64]> =
            vec![Default::default(); self.frames.len()];
        let mut pages = 0;
        let names: BTreeSet<SpaceId> =
            self.spaces.keys().chain(self.unchanged.keys()).copied().collect();
        for space in names {
            let new = self.spaces.remove(&space).map(SpaceRuns::expand).unwrap_or_default();
            let old = self.unchanged.remove(&space).unwrap_or_default();
            let runs = merge(space, new, old)?;
            for run in &runs {
                pages += u64::from(run.count);
                let used = used.get_mut(run.frame as usize).expect("numbered by add_frame");
                for page in run.page..run.page + run.count {
                    *used.get_mut(usize::from(page) / 64).expect("checked when it was added") |=
                        1 << (page % 64);
                }
            }
            spaces.insert(space, runs);
        }
        let stored = used.iter().flatten().map(|word| u64::from(word.count_ones())).sum();
        let mut used_packs = BTreeSet::new();
        for (frame, used) in self.frames.iter().zip(&used) {
            if used.iter().any(|word| *word != 0) {
                used_packs.insert(frame.pack);
                let base = frame.base.and_then(|base| self.frames.get(base as usize));
                used_packs.extend(base.map(|base| base.pack));
            }
        }
        let packs = self.packs;
        Ok(CompleteMap { spaces, frames: self.frames, packs, pages, stored, used_packs })
    }
}

/// Page maps that are whole.
#[derive(Debug)]
pub struct CompleteMap {
    spaces: BTreeMap<SpaceId, Vec<MapRun>>,
    frames: Vec<MapFrame>,
    packs: Vec<Option<Digest>>,
    pages: u64,
    stored: u64,
    used_packs: BTreeSet<u32>,
}

impl CompleteMap {
    /// Pages that the spaces have in frames: what several spaces have in common counts once.
    pub fn stored_pages(&self) -> u64 {
        self.stored
    }

    /// Pages of all spaces.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// The packs in which any page lies, or the base of its frame, by the numbers that [`MapBuilder::add_pack`] gave them.
    pub fn packs(&self) -> impl Iterator<Item = u32> {
        self.used_packs.iter().copied()
    }

    /// Passes the segments of all spaces, in ascending order, to `emit`. Ends at its first error.
    ///
    /// # Panics
    /// If the digest of a pack that is in use was not set.
    pub fn emit<E>(self, mut emit: impl FnMut(SpaceId, Segment) -> Result<(), E>) -> Result<(), E> {
        let (frames, packs) = (&self.frames, &self.packs);
        for (space, runs) in self.spaces {
            split(&runs, 0, PAGE_NUMBER_END, &mut |runs| emit(space, cut(runs, frames, packs)))?;
        }
        Ok(())
    }
}

/// Puts two ascending lists of runs into one, and joins what lies together.
fn merge(space: SpaceId, new: Vec<MapRun>, old: Vec<MapRun>) -> Result<Vec<MapRun>, MapError> {
    let mut merged: Vec<MapRun> = Vec::with_capacity(new.len() + old.len());
    let (mut new, mut old) = (new.into_iter().peekable(), old.into_iter().peekable());
    loop {
        let next = match (new.peek(), old.peek()) {
            (Some(a), Some(b)) if b.first < a.first => old.next(),
            (Some(_), _) => new.next(),
            (None, _) => old.next(),
        };
        let Some(run) = next else { return Ok(merged) };
        match merged.last_mut() {
            Some(last) if run.first < last.end() => {
                return Err(MapError::Unordered { space, first: run.first });
            }
            Some(last)
                if run.first == last.end()
                    && run.frame == last.frame
                    && run.page == last.page + last.count =>
            {
                last.count += run.count;
            }
            _ => merged.push(run),
        }
    }
}

impl SpaceRuns {
    fn expand(self) -> Vec<MapRun> {
        let mut input = self.bytes.as_slice();
        let mut coder = RunCoder::default();
        let mut runs = Vec::new();
        while !input.is_empty() {
            match coder.take(&mut input) {
                Ok(run) => runs.push(run),
                Err(_) => unreachable!("these bytes were written by the same coder"),
            }
        }
        runs.extend(self.last);
        runs
    }
}

/// Splits the node `[low, high)` of the tree of page numbers until no part has more than [`SEGMENT_RUNS_MAX`] runs.
/// The recursion ends after 52 levels: a node of one page has one run.
fn split<E>(
    runs: &[MapRun],
    low: u64,
    high: u64,
    emit: &mut impl FnMut(Vec<MapRun>) -> Result<(), E>,
) -> Result<(), E> {
    if runs.is_empty() {
        return Ok(());
    }
    if runs.len() <= SEGMENT_RUNS_MAX {
        return emit(runs.iter().map(|run| run.clip(low, high)).collect());
    }
    let middle = low + (high - low) / 2;
    let right = runs.partition_point(|run| run.end() <= middle);
    let left_end = runs.partition_point(|run| run.first < middle);
    let (left, _) = runs.split_at(left_end);
    let (_, right) = runs.split_at(right);
    split(left, low, middle, emit)?;
    split(right, middle, high, emit)
}

/// Makes a segment of `runs`, numbering packs and frames in the order of their first use; a base comes right before the first
/// frame that needs it.
fn cut(mut runs: Vec<MapRun>, all_frames: &[MapFrame], all_packs: &[Option<Digest>]) -> Segment {
    let mut named = Named {
        segment: Segment { packs: Vec::new(), frames: Vec::new(), runs: Vec::new() },
        frame_numbers: HashMap::new(),
        pack_numbers: HashMap::new(),
    };
    for run in &mut runs {
        run.frame = named.frame(run.frame, all_frames, all_packs);
    }
    named.segment.runs = runs;
    named.segment
}

/// A segment in the making, and how it numbers the frames and packs of a capsule.
struct Named {
    segment: Segment,
    frame_numbers: HashMap<u32, u32>,
    pack_numbers: HashMap<u32, u32>,
}

impl Named {
    fn frame(&mut self, frame: u32, all_frames: &[MapFrame], all_packs: &[Option<Digest>]) -> u32 {
        if let Some(number) = self.frame_numbers.get(&frame) {
            return *number;
        }
        let mut named =
            *all_frames.get(frame as usize).expect("the frame was numbered by add_frame");
        // One level deep: a base is plain.
        named.base = named.base.map(|base| self.frame(base, all_frames, all_packs));
        let packs = &mut self.segment.packs;
        named.pack = *self.pack_numbers.entry(named.pack).or_insert_with_key(|&pack| {
            let digest = all_packs.get(pack as usize).copied().flatten();
            packs.push(digest.expect("the digest of every pack was set"));
            number(packs.len() - 1)
        });
        self.segment.frames.push(named);
        let new = number(self.segment.frames.len() - 1);
        self.frame_numbers.insert(frame, new);
        new
    }
}

fn number(index: usize) -> u32 {
    u32::try_from(index).expect("a segment has few entries")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn frame(pack: u32) -> MapFrame {
        MapFrame {
            pack,
            offset: 8,
            stored_bytes: 100,
            pages: 256,
            codec: Codec::Zstd,
            base: None,
            digest: FrameDigest::of(&pack.to_le_bytes()),
        }
    }

    /// A map whose pages `pages` each lie in a frame of their number divided by 256, four frames to a pack.
    fn build(space: SpaceId, pages: impl Iterator<Item = u64>) -> Vec<(SpaceId, Segment)> {
        let mut map = MapBuilder::default();
        let mut at = None;
        for page in pages {
            let frame_index = page / 256;
            let frame = match at {
                Some((index, frame)) if index == frame_index => frame,
                _ => {
                    let pack = map.add_pack();
                    map.set_pack(pack, Digest::of(&(frame_index / 4).to_le_bytes()));
                    map.add_frame(frame(pack))
                }
            };
            at = Some((frame_index, frame));
            let run = PageRun { first: page, count: 1 };
            map.add_run(space, run, frame, (page % 256) as u16).unwrap();
        }
        let mut segments = Vec::new();
        map.complete()
            .unwrap()
            .emit(|space, segment| -> Result<(), ()> {
                segments.push((space, segment));
                Ok(())
            })
            .unwrap();
        segments
    }

    fn pages(segments: &[(SpaceId, Segment)]) -> Vec<u64> {
        segments.iter().flat_map(|(_, s)| s.runs()).flat_map(|run| run.first..run.end()).collect()
    }

    #[test]
    fn neighbours_become_one_run() {
        let segments = build(SpaceId(3), 1000..2000);
        assert_eq!(segments.len(), 1);
        assert_eq!(pages(&segments), (1000..2000).collect::<Vec<_>>());
        assert_eq!(segments[0].1.runs().len(), 5);
    }

    #[test]
    fn a_change_in_one_place_leaves_other_segments_as_they_were() {
        let scattered =
            |skip: u64| (0..400_000u64).map(|i| i * 3).filter(move |&page| page != skip);
        let before = build(SpaceId(0), scattered(u64::MAX));
        let after = build(SpaceId(7), scattered(300_000));
        assert!(before.len() > 20);
        assert_eq!(before.len(), after.len());
        let digest = |(_, segment): &(SpaceId, Segment)| Digest::of(&segment.encode().unwrap());
        let differing = before.iter().zip(&after).filter(|(a, b)| digest(a) != digest(b)).count();
        assert_eq!(differing, 1);
    }

    #[test]
    fn a_run_across_a_cut_is_kept_whole() {
        // Dense around the middle of the tree, with one run across it, and too many runs for one segment.
        let middle = PAGE_NUMBER_END / 2;
        let scattered = (0..20_000).map(|i| middle - 100_000 + i * 2);
        let wanted: Vec<u64> = scattered.chain(middle - 10..middle + 10).collect();
        let segments = build(SpaceId(0), wanted.iter().copied());
        assert!(segments.len() >= 3);
        assert_eq!(pages(&segments), wanted);
        for (_, segment) in &segments {
            assert_eq!(&Segment::decode(&segment.encode().unwrap()).unwrap(), segment);
        }
    }

    #[test]
    fn a_million_scattered_runs_take_few_bytes() {
        let mut map = MapBuilder::default();
        let pack = map.add_pack();
        for index in 0..1_000_000u64 {
            let frame = match index % 256 {
                0 => map.add_frame(frame(pack)),
                _ => number(map.frames.len() - 1),
            };
            map.add_run(
                SpaceId(0),
                PageRun { first: index * 2, count: 1 },
                frame,
                (index % 256) as u16,
            )
            .unwrap();
        }
        let bytes = map.spaces.values().map(|runs| runs.bytes.len()).sum::<usize>();
        assert!(bytes < 4_000_000, "{bytes}");
    }

    /// Without this, a page of an older capsule could stand where a newer one was stored, or where nothing is.
    #[test]
    fn unchanged_pages_are_those_of_the_base_and_new_ones_their_own() {
        let mut map = MapBuilder::default();
        let pack = map.add_pack();
        map.set_pack(pack, Digest::of(b"pack"));
        let unused = map.add_pack();
        let (old, draft, new) =
            (map.add_frame(frame(pack)), map.add_frame(frame(pack)), map.add_frame(frame(pack)));
        map.add_frame(frame(unused));
        let mut base = Base::default();
        base.add_parent(MapRun { first: 0, frame: old, count: 100, page: 0 });
        base.set(PageRun { first: 10, count: 20 }, Some(BasePlace { frame: draft, page: 5 }));
        base.set(PageRun { first: 25, count: 10 }, None);
        let space = SpaceId(0);
        let run = |first, count| PageRun { first, count };
        map.add_unchanged(space, &base, run(0, 8), true).unwrap();
        map.add_unchanged(space, &base, run(9, 40), false).unwrap();
        map.add_run(space, run(8, 1), new, 0).unwrap();
        let missing = map.add_unchanged(space, &base, run(90, 20), true);
        assert!(matches!(missing, Err(MapError::Unknown { first: 90, missing: 10, .. })));
        let refused = map.add_unchanged(space, &base, run(80, 1), false);
        assert!(matches!(refused, Err(MapError::Unordered { .. })));
        let map = map.complete().unwrap();
        assert_eq!(map.packs().collect::<Vec<_>>(), [pack]);
        assert_eq!((map.pages(), map.stored_pages()), (49, 49));
        let mut found = Vec::new();
        map.emit(|_, segment| -> Result<(), ()> {
            found.extend(segment.runs().iter().map(|run| (run.first, run.count, run.page)));
            Ok(())
        })
        .unwrap();
        let expected = [(0, 8, 0), (8, 1, 0), (9, 1, 9), (10, 15, 5), (35, 14, 35), (90, 10, 90)];
        assert_eq!(found, expected);
    }

    #[test]
    fn pages_that_come_both_ways_are_refused() {
        let mut map = MapBuilder::default();
        let pack = map.add_pack();
        let frame = map.add_frame(frame(pack));
        let mut base = Base::default();
        base.add_parent(MapRun { first: 0, frame, count: 10, page: 0 });
        map.add_run(SpaceId(0), PageRun { first: 5, count: 1 }, frame, 20).unwrap();
        map.add_unchanged(SpaceId(0), &base, PageRun { first: 0, count: 10 }, true).unwrap();
        assert!(matches!(map.complete(), Err(MapError::Unordered { first: 5, .. })));
    }

    #[test]
    fn wrong_runs_are_refused() {
        let mut map = MapBuilder::default();
        let space = SpaceId(1);
        let mut add = |first, count, page| map.add_run(space, PageRun { first, count }, 0, page);
        add(10, 5, 0).unwrap();
        assert!(matches!(add(14, 1, 5), Err(MapError::Unordered { .. })));
        assert!(matches!(add(20, 0, 5), Err(MapError::Range { .. })));
        assert!(matches!(add(20, 257, 0), Err(MapError::Range { .. })));
        assert!(matches!(add(20, 2, 255), Err(MapError::Range { .. })));
        assert!(matches!(add(PAGE_NUMBER_END, 1, 0), Err(MapError::Range { .. })));
        assert!(matches!(add(u64::MAX, 2, 0), Err(MapError::Range { .. })));
        let beyond = SpaceId(SPACES_MAX);
        assert!(matches!(
            map.add_run(beyond, PageRun { first: 0, count: 1 }, 0, 0),
            Err(MapError::Space { .. })
        ));
    }

    /// Frames 0 (plain), 1 (differences over it), 2 (differences over frame 3), 3 (plain, without runs): each in a pack of its own.
    fn with_bases() -> (CompleteMap, [Digest; 4]) {
        let mut map = MapBuilder::default();
        let digests = [0u8, 1, 2, 3].map(|number| Digest::of(&[number]));
        let packs = digests.map(|digest| {
            let pack = map.add_pack();
            map.set_pack(pack, digest);
            pack
        });
        let delta = |pack, base| MapFrame {
            codec: Codec::Delta,
            base: Some(base),
            pages: 3,
            ..frame(pack)
        };
        let plain = [map.add_frame(frame(packs[0])), map.add_frame(frame(packs[3]))];
        let deltas =
            [map.add_frame(delta(packs[1], plain[0])), map.add_frame(delta(packs[2], plain[1]))];
        for (first, frame, page) in
            [(10, plain[0], 7), (20, deltas[0], 0), (30, deltas[1], 1), (40, deltas[0], 2)]
        {
            map.add_run(SpaceId(0), PageRun { first, count: 1 }, frame, page).unwrap();
        }
        (map.complete().unwrap(), digests)
    }

    fn segment_of(map: CompleteMap) -> Segment {
        let mut segments = Vec::new();
        map.emit(|_, segment| -> Result<(), ()> {
            segments.push(segment);
            Ok(())
        })
        .unwrap();
        segments.remove(0)
    }

    /// A base that is not named would be collected, or be missing when its pack is rewritten.
    #[test]
    fn bases_are_named_with_their_packs() {
        let (map, digests) = with_bases();
        assert_eq!(map.packs().count(), 4);
        assert_eq!(map.stored_pages(), 4);
        let segment = segment_of(map);
        assert_eq!(segment, Segment::decode(&segment.encode().unwrap()).unwrap());
        let bases: Vec<_> = segment.frames().iter().map(|frame| frame.base).collect();
        assert_eq!(bases, [None, Some(0), None, Some(2)]);
        let packs: Vec<Digest> =
            segment.frames().iter().map(|frame| segment.packs()[frame.pack as usize]).collect();
        assert_eq!(packs, [digests[0], digests[1], digests[3], digests[2]]);
        assert!(segment.runs().iter().all(|run| run.frame != 2));
    }

    /// A chain of bases would make a restore walk it; a base behind its frame could be the frame itself.
    #[test]
    fn bases_that_are_deep_or_missing_are_refused_by_name() {
        let (map, _) = with_bases();
        let segment = segment_of(map);
        let refused = |frame: usize, base: u32| {
            let mut segment = segment.clone();
            segment.frames[frame].codec = Codec::Delta;
            segment.frames[frame].base = Some(base);
            let refused = Segment::decode(&segment.encode().unwrap()).unwrap_err();
            (format!("{refused:?}"), refused.to_string())
        };
        assert!(refused(3, 1).0.contains("Depth { frame: 3 }"));
        assert!(refused(3, 1).1.contains("one too many"));
        assert!(refused(1, 1).0.contains("Base { frame: 1 }"));
        assert!(refused(1, 2).0.contains("Base { frame: 1 }"));
        assert!(refused(3, u32::MAX).0.contains("Base { frame: 3 }"));
        assert!(refused(0, 0).0.contains("Base { frame: 0 }"));
    }

    #[test]
    #[should_panic(expected = "the base of a frame is plain")]
    fn a_chain_can_not_be_built() {
        let mut map = MapBuilder::default();
        let plain = map.add_frame(frame(0));
        let delta = MapFrame { codec: Codec::Delta, base: Some(plain), ..frame(0) };
        let delta = map.add_frame(delta);
        map.add_frame(MapFrame { codec: Codec::Delta, base: Some(delta), ..frame(0) });
    }

    /// The largest segment that can be built must be one that is read.
    #[test]
    fn every_run_may_have_a_frame_a_base_and_packs_of_its_own() {
        let mut map = MapBuilder::default();
        for index in 0..SEGMENT_RUNS_MAX as u64 {
            let [plain, own] = [0, 1].map(|kind| {
                let pack = map.add_pack();
                map.set_pack(pack, Digest::of(&(2 * index + kind).to_le_bytes()));
                MapFrame { offset: 0xff_ff00, ..frame(pack) }
            });
            let base = map.add_frame(plain);
            let frame = map.add_frame(MapFrame { codec: Codec::Delta, base: Some(base), ..own });
            let run = PageRun { first: (index << 38) + 5, count: 1 };
            map.add_run(SpaceId(0), run, frame, 200).unwrap();
        }
        let segment = segment_of(map.complete().unwrap());
        assert_eq!(segment.runs().len(), SEGMENT_RUNS_MAX);
        assert_eq!(segment.frames().len(), SEGMENT_FRAMES_MAX);
        assert!(Segment::decode(&segment.encode().unwrap()).unwrap() == segment);
    }

    #[test]
    fn segments_of_another_version_or_kind_are_refused_by_name() {
        let (_, segment) = build(SpaceId(0), 0..1000).remove(0);
        let bytes = segment.encode().unwrap();
        let check = |at: usize, value: u8, expected: &str| {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            let found = format!("{:?}", Segment::decode(&bytes).unwrap_err());
            assert!(found.contains(expected), "{found}");
        };
        check(0, b'X', "Magic");
        check(8, 2, "Version");
        check(15, 0xff, "BodySize");
        check(17, 0xff, "Zstd");
        assert!(matches!(Segment::decode(&bytes[..10]), Err(SegmentError::Size { .. })));
    }

    /// The body of a small segment, uncompressed, for tests that damage it where compression can't hide the damage.
    fn body() -> Vec<u8> {
        let (_, segment) = build(SpaceId(0), (0..600).chain(700..702)).remove(0);
        zstd::bulk::decompress(&segment.encode().unwrap()[16..], BODY_BYTES_MAX).unwrap()
    }

    fn body_with_bases() -> Vec<u8> {
        let encoded = segment_of(with_bases().0).encode().unwrap();
        zstd::bulk::decompress(&encoded[16..], BODY_BYTES_MAX).unwrap()
    }

    proptest! {
        #[test]
        fn mutated_bodies_never_panic(at: usize, value: u8, cut in 0usize..400, bases: bool) {
            let mut body = if bases { body_with_bases() } else { body() };
            let at = at % body.len();
            body[at] = value;
            if let Ok(segment) = Segment::decode_body(&body) {
                // What is accepted is canonical: it encodes to the same bytes.
                let again = zstd::bulk::decompress(&segment.encode().unwrap()[16..], BODY_BYTES_MAX).unwrap();
                prop_assert_eq!(again, body.clone());
            }
            body.truncate(cut);
            let _ = Segment::decode_body(&body);
        }

        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Segment::decode_body(&bytes);
            let mut blob = MAGIC.to_vec();
            blob.extend_from_slice(&[1, 0, 0, 0, 100, 0, 0, 0]);
            blob.extend_from_slice(&zstd::bulk::compress(&bytes, 1).unwrap());
            let _ = Segment::decode(&blob);
        }

        /// A base is a table of pages: what was set last counts.
        #[test]
        fn bases_are_tables(
            parent in proptest::collection::vec((1u64..20, 1u16..20), 0..20),
            sets in proptest::collection::vec((0u64..300, 1u64..60, any::<bool>()), 0..40),
            (first, count) in (0u64..300, 1u64..300),
        ) {
            let mut base = Base::default();
            let mut table: HashMap<u64, (u32, u16)> = HashMap::new();
            let mut next = 0;
            for (index, (gap, count)) in parent.into_iter().enumerate() {
                let run = MapRun { first: next + gap, frame: number(index), count, page: 3 };
                base.add_parent(run);
                for page in 0..count {
                    table.insert(run.first + u64::from(page), (run.frame, run.page + page));
                }
                next = run.end();
            }
            let only_parent = table.clone();
            for (index, (first, count, zeros)) in sets.into_iter().enumerate() {
                let place = BasePlace { frame: 1000 + number(index), page: 7 };
                base.set(PageRun { first, count }, (!zeros).then_some(place));
                for (number, page) in (first..first + count).zip(place.page..) {
                    match zeros {
                        true => table.remove(&number),
                        false => table.insert(number, (place.frame, page)),
                    };
                }
            }
            let mut found = Vec::new();
            base.find(PageRun { first, count }, &mut found);
            let found: Vec<(u64, (u32, u16))> = found
                .iter()
                .flat_map(|run| {
                    (0..run.count).map(|page| {
                        (run.first + u64::from(page), (run.frame, run.page + page))
                    })
                })
                .collect();
            let parent = base.parent();
            let (mut cursor, mut other) = (0, 0);
            for page in (0..400).chain([7, 300, 20]) {
                let near = parent.place(page, &mut cursor);
                prop_assert_eq!(near, parent.place(page, &mut 0));
                prop_assert_eq!(near, parent.place(page, &mut 1_000_000));
                let back = parent.place(400 - page, &mut other);
                prop_assert_eq!(back, parent.place(400 - page, &mut 0));
                prop_assert_eq!(near.map(|place| (place.frame, place.page)), only_parent.get(&page).copied());
            }
            let wanted: Vec<(u64, (u32, u16))> = (first..first + count)
                .filter_map(|page| Some((page, *table.get(&page)?)))
                .collect();
            prop_assert_eq!(found, wanted);
        }

        #[test]
        fn any_pages_come_back(gaps in proptest::collection::vec(1u64..1000, 1..500)) {
            let mut page = 0;
            let wanted: Vec<u64> = gaps.iter().map(|gap| { page += gap; page }).collect();
            let segments = build(SpaceId(0), wanted.iter().copied());
            let back: Vec<_> = segments.iter().map(|(space, segment)| {
                (*space, Segment::decode(&segment.encode().unwrap()).unwrap())
            }).collect();
            prop_assert_eq!(pages(&back), wanted);
        }
    }
}
