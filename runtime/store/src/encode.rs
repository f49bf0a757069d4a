//! Pages to frames: which of them are told by what has changed since the capsule before, and how the others are stored.
//!
//! The pages of a batch whose earlier versions lie in one plain frame become one frame of differences over that, if there are
//! enough of them, if the frame is on this node, and if it saves enough. Where an earlier version is told by differences
//! itself, its base is taken: a base is always plain. All other pages are compressed together, in frames of 256 KiB.
//!
//! What this module does not do: it knows no maps and no packs, and fetches nothing over a network.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use samara_capsule::digest::{Digest, FrameDigest};
use samara_capsule::frame::{
    BaseFrame, Codec, DeltaHead, FrameDecoder, FrameEncoder, delta_overhead_bytes,
};
use samara_capsule::pagemap::{MapFrame, ParentRuns};
use samara_capsule::transfer::{PAGE_BYTES, PageRun};

/// Pages are compressed in frames of this size. Four frames of 256 KiB take 5-10 % less time than one of 1 MiB, as they
/// stay in the processor's caches, and about the same space; see `docs/decisions/frames.md`.
const FRAME_BYTES: usize = 256 << 10;

/// A frame of a batch is read and decoded for so many changed pages on the average, or more: for fewer it costs more than most
/// links for what it saves; see `docs/decisions/differences.md`.
const DELTA_PAGES_MEAN_MIN: usize = 16;

/// And for so many at least, since naming a frame takes as much as what is saved of two pages. So few are those of a frame at
/// either end of a batch, as a rule.
const DELTA_PAGES_MIN: usize = 4;

/// Differences must take no more than this part of what the pages would as a whole: a restore has to decode two frames for them.
/// They grow from capsule to capsule, as the base stays the same, until the pages are stored whole and become a base again.
const DELTA_SHARE_MAX: (usize, usize) = (1, 2);

/// What is stored already of the pages that are being encoded.
pub(crate) trait StoredBefore<O> {
    /// Where the pages of an owner were in the capsule before.
    fn memory(&self, owner: &O) -> Option<ParentRuns>;

    /// A frame that [`StoredBefore::memory`] or another frame names as its base, and its pack.
    fn frame(&self, number: u32) -> Option<(Digest, MapFrame)>;

    /// The stored bytes of a frame, checked, if they can be had at once.
    fn stored(&self, pack: &Digest, frame: &MapFrame) -> Option<Vec<u8>>;

    /// How differences have done so far.
    fn trials(&self) -> &Trials;
}

/// How often differences are tried: a trial that fails costs a fifth of what the batch takes to compress. After each failure in a row
/// more batches are stored whole without a trial.
#[derive(Debug, Default)]
pub(crate) struct Trials {
    /// Batches without a trial to come.
    skipped: AtomicU32,
    lost_in_a_row: AtomicU32,
}

impl Trials {
    /// 15 of 16 batches, where nothing is ever gained.
    const DOUBLINGS_MAX: u32 = 4;

    fn is_due(&self) -> bool {
        self.skipped.fetch_update(Relaxed, Relaxed, |skipped| skipped.checked_sub(1)).is_err()
    }

    fn won(&self) {
        self.lost_in_a_row.store(0, Relaxed);
    }

    fn lost(&self) {
        let lost = self.lost_in_a_row.fetch_add(1, Relaxed).saturating_add(1);
        self.skipped.store((1 << lost.min(Trials::DOUBLINGS_MAX)) - 1, Relaxed);
    }
}

/// The frames of a batch, and where its pages lie in them.
#[derive(Debug)]
pub(crate) struct Encoded<O> {
    pub(crate) frames: Vec<Frame>,
    /// In the order in which the pages were passed.
    pub(crate) runs: Vec<PlacedRun<O>>,
    /// What the frames store, one behind the other.
    pub(crate) stored: Vec<u8>,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct Frame {
    pub(crate) pages: usize,
    pub(crate) codec: Codec,
    /// By the number that [`StoredBefore`] has for it.
    pub(crate) base: Option<u32>,
    pub(crate) digest: FrameDigest,
    pub(crate) stored_bytes: usize,
}

#[derive(Clone, Debug)]
pub(crate) struct PlacedRun<O> {
    pub(crate) owner: O,
    pub(crate) run: PageRun,
    /// Index into the batch's frames.
    pub(crate) frame: usize,
    /// Of the frame's pages the first one.
    pub(crate) page: u16,
}

/// Pages of a batch by the plain frame of their earlier versions: place in that, and index in the batch.
type Changed = BTreeMap<u32, Vec<(u8, usize)>>;

/// Encodes batches, one after another.
#[derive(Debug)]
pub(crate) struct PageEncoder {
    encoder: FrameEncoder,
    decoder: FrameDecoder,
    base: Vec<u8>,
    scratch: Vec<u8>,
}

impl PageEncoder {
    /// Fails only where memory for compression can't be had.
    pub(crate) fn new() -> io::Result<PageEncoder> {
        Ok(PageEncoder {
            encoder: FrameEncoder::new()?,
            decoder: FrameDecoder::new()?,
            base: Vec::new(),
            scratch: Vec::new(),
        })
    }

    /// What encodes bytes that are no pages.
    pub(crate) fn plain(&mut self) -> &mut FrameEncoder {
        &mut self.encoder
    }

    /// Encodes the pages of `runs`, whose content is `bytes`. That is in disorder afterwards; `stored` is used for the result, and
    /// must be empty.
    pub(crate) fn encode<O: Clone + PartialEq>(
        &mut self,
        runs: Vec<(O, PageRun)>,
        bytes: &mut [u8],
        stored: Vec<u8>,
        before: &impl StoredBefore<O>,
    ) -> io::Result<Encoded<O>> {
        let mut encoded = Encoded { frames: Vec::new(), runs: Vec::new(), stored };
        // For each page its frame, and its place in that.
        let mut places: Vec<Option<(usize, usize)>> = vec![None; bytes.len() / PAGE_BYTES];
        self.encode_changes(&runs, bytes, before, &mut places, &mut encoded)?;

        let mut rest = 0;
        for (index, place) in places.iter_mut().enumerate().filter(|(_, place)| place.is_none()) {
            let from = index * PAGE_BYTES;
            if rest != from {
                bytes.copy_within(from..from + PAGE_BYTES, rest);
            }
            let frame = encoded.frames.len() + rest / FRAME_BYTES;
            *place = Some((frame, rest % FRAME_BYTES / PAGE_BYTES));
            rest += PAGE_BYTES;
        }
        for raw in bytes.get(..rest).expect("it holds all pages").chunks(FRAME_BYTES) {
            let codec = self.encoder.encode(raw, &mut self.scratch)?;
            encoded.push(raw.len() / PAGE_BYTES, codec, None, &self.scratch);
        }

        let numbers = runs.into_iter().flat_map(|(owner, run)| {
            (run.first..run.first + run.count).map(move |number| (owner.clone(), number))
        });
        for ((owner, number), place) in numbers.zip(places) {
            let (frame, page) = place.expect("every page has a place");
            let page = u16::try_from(page).expect("a frame has at most 256 pages");
            encoded.place(owner, number, frame, page);
        }
        Ok(encoded)
    }

    /// Tells pages by what they differ in from those of the capsule before, where that pays.
    fn encode_changes<O: Clone + PartialEq>(
        &mut self,
        runs: &[(O, PageRun)],
        bytes: &[u8],
        before: &impl StoredBefore<O>,
        places: &mut [Option<(usize, usize)>],
        encoded: &mut Encoded<O>,
    ) -> io::Result<()> {
        let changed = worth_a_trial(changed(runs, before));
        if changed.is_empty() || !before.trials().is_due() {
            return Ok(());
        }
        for (base, pages) in changed {
            let Some((pack, frame)) = before.frame(base) else { continue };
            let Some(base_stored) = before.stored(&pack, &frame) else { continue };
            let base_bytes = usize::from(frame.pages) * PAGE_BYTES;
            if self.decoder.decode(frame.codec, &base_stored, base_bytes, &mut self.base).is_err() {
                continue;
            }
            let new = pages.iter().filter_map(|&(slot, index)| {
                Some((slot, bytes.get(index * PAGE_BYTES..(index + 1) * PAGE_BYTES)?))
            });
            let over = BaseFrame { digest: frame.digest, raw: &self.base };
            self.encoder.encode_delta(new, over, &mut self.scratch)?;
            // The earlier versions tell what the pages would take as a whole, without a second trial.
            let whole = base_stored.len() * pages.len() / usize::from(frame.pages);
            let (part, of) = DELTA_SHARE_MAX;
            let taken = self.scratch.len() + delta_overhead_bytes(pages.len());
            if taken * of > whole * part {
                // Whoever has written these anew has likely done so with the rest, too.
                before.trials().lost();
                return Ok(());
            }
            before.trials().won();
            for (page, (_, index)) in pages.iter().enumerate() {
                *places.get_mut(*index).expect("the index of a page") =
                    Some((encoded.frames.len(), page));
            }
            encoded.push(pages.len(), Codec::Delta, Some(base), &self.scratch);
        }
        Ok(())
    }
}

/// Finds the earlier versions of pages.
fn changed<O: PartialEq>(runs: &[(O, PageRun)], before: &impl StoredBefore<O>) -> Changed {
    let mut changed = Changed::new();
    let mut known = HashMap::new();
    let mut index = 0;
    for group in runs.chunk_by(|(a, _), (b, _)| a == b) {
        let memory = group.first().and_then(|(owner, _)| before.memory(owner));
        let Some(memory) = memory else {
            let pages: u64 = group.iter().map(|(_, run)| run.count).sum();
            index += usize::try_from(pages).expect("a batch has few pages");
            continue;
        };
        let mut cursor = 0;
        for (_, run) in group {
            let numbers = run.first..run.first + run.count;
            for (number, index) in numbers.zip(index..) {
                let Some(place) = memory.place(number, &mut cursor) else { continue };
                let plain =
                    known.entry(place.frame).or_insert_with(|| PlainFrame::of(place.frame, before));
                let Some(plain) = plain else { continue };
                if let Some(slot) = plain.slot(place.page) {
                    changed.entry(plain.number).or_default().push((slot, index));
                }
            }
            index += usize::try_from(run.count).expect("a batch has few pages");
        }
    }
    changed
}

/// Leaves the frames of which enough has changed.
fn worth_a_trial(mut changed: Changed) -> Changed {
    changed.retain(|_, pages| {
        // Two processes may each have changed what they had in common: the second version stays whole.
        pages.sort_unstable();
        pages.dedup_by_key(|(slot, _)| *slot);
        pages.len() >= DELTA_PAGES_MIN
    });
    let mut pages: usize = changed.values().map(Vec::len).sum();
    while pages < DELTA_PAGES_MEAN_MIN * changed.len() {
        let fewest = changed.iter().min_by_key(|(_, pages)| pages.len()).map(|(base, _)| *base);
        let fewest = fewest.expect("nothing is not less than nothing");
        pages -= changed.remove(&fewest).map_or(0, |pages| pages.len());
    }
    changed
}

/// Where the pages of a frame lie in a plain one.
struct PlainFrame {
    number: u32,
    /// None: that frame is plain itself.
    slots: Option<Vec<u8>>,
}

impl PlainFrame {
    fn of<O>(number: u32, before: &impl StoredBefore<O>) -> Option<PlainFrame> {
        let (pack, frame) = before.frame(number)?;
        let Some(base) = frame.base else { return Some(PlainFrame { number, slots: None }) };
        let stored = before.stored(&pack, &frame)?;
        let (head, _) = DeltaHead::split(&stored, frame.pages.into()).ok()?;
        let (_, plain) = before.frame(base)?;
        head.check(plain.digest, plain.pages.into()).ok()?;
        Some(PlainFrame { number: base, slots: Some(head.slots.to_vec()) })
    }

    fn slot(&self, page: u16) -> Option<u8> {
        match &self.slots {
            Some(slots) => slots.get(usize::from(page)).copied(),
            None => u8::try_from(page).ok(),
        }
    }
}

impl<O: PartialEq> Encoded<O> {
    fn push(&mut self, pages: usize, codec: Codec, base: Option<u32>, stored: &[u8]) {
        let (digest, stored_bytes) = (FrameDigest::of(stored), stored.len());
        self.frames.push(Frame { pages, codec, base, digest, stored_bytes });
        self.stored.extend_from_slice(stored);
    }

    /// Appends a page, to the last run if it follows that in both places.
    fn place(&mut self, owner: O, number: u64, frame: usize, page: u16) {
        if let Some(last) = self.runs.last_mut()
            && last.owner == owner
            && last.frame == frame
            && last.run.first + last.run.count == number
            && u64::from(last.page) + last.run.count == u64::from(page)
        {
            last.run.count += 1;
            return;
        }
        self.runs.push(PlacedRun { owner, run: PageRun { first: number, count: 1 }, frame, page });
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use samara_capsule::pagemap::{Base, MapRun};

    use super::*;

    /// Frames by number, with what they store; one memory.
    #[derive(Default)]
    struct Before {
        memory: Base,
        frames: Vec<(MapFrame, Vec<u8>)>,
        missing: Vec<u32>,
        trials: Trials,
    }

    impl StoredBefore<u8> for Before {
        fn memory(&self, owner: &u8) -> Option<ParentRuns> {
            (*owner < 9).then(|| self.memory.parent())
        }

        fn frame(&self, number: u32) -> Option<(Digest, MapFrame)> {
            let (frame, _) = self.frames.get(number as usize)?;
            Some((Digest::of(&number.to_le_bytes()), *frame))
        }

        fn stored(&self, pack: &Digest, frame: &MapFrame) -> Option<Vec<u8>> {
            let number = self.frames.iter().position(|(known, _)| known == frame)?;
            let number = u32::try_from(number).unwrap();
            assert_eq!(*pack, Digest::of(&number.to_le_bytes()));
            (!self.missing.contains(&number)).then(|| self.frames[number as usize].1.clone())
        }

        fn trials(&self) -> &Trials {
            &self.trials
        }
    }

    fn page(number: u64, version: u64) -> Vec<u8> {
        let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut page = Vec::with_capacity(PAGE_BYTES);
        while page.len() < PAGE_BYTES {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            page.extend_from_slice(&(state >> 8).to_le_bytes());
        }
        page[16..24].copy_from_slice(&version.to_le_bytes());
        page
    }

    fn batch(numbers: &[u64], version: u64) -> (Vec<(u8, PageRun)>, Vec<u8>) {
        let runs = numbers.iter().map(|&first| (0, PageRun { first, count: 1 })).collect();
        (runs, numbers.iter().flat_map(|&number| page(number, version)).collect())
    }

    /// Encodes pages 0 to 199 as a capsule before; then, `updates` of version 1 as one that continues it.
    fn before(updates: &[u64]) -> Before {
        let mut before = Before::default();
        let mut nothing = Before::default();
        nothing.missing.push(0);
        let number = |before: &mut Before, encoded: &Encoded<u8>| {
            let from = u32::try_from(before.frames.len()).unwrap();
            let mut rest = encoded.stored.as_slice();
            for (index, frame) in encoded.frames.iter().enumerate() {
                let (stored, later) = rest.split_at(frame.stored_bytes);
                rest = later;
                let map = MapFrame {
                    pack: 0,
                    offset: from + u32::try_from(index).unwrap(),
                    stored_bytes: u32::try_from(stored.len()).unwrap(),
                    pages: u16::try_from(frame.pages).unwrap(),
                    codec: frame.codec,
                    base: frame.base,
                    digest: frame.digest,
                };
                before.frames.push((map, stored.to_vec()));
            }
            from
        };
        let all: Vec<u64> = (0..200).collect();
        let (runs, mut bytes) = batch(&all, 0);
        let mut encoder = PageEncoder::new().unwrap();
        let full = encoder.encode(runs, &mut bytes, Vec::new(), &nothing).unwrap();
        number(&mut before, &full);
        let mut table: BTreeMap<u64, (u32, u16)> = BTreeMap::new();
        let mut note = |encoded: &Encoded<u8>, from: u32| {
            for placed in &encoded.runs {
                for (number, page) in (placed.run.first..)
                    .zip(placed.page..)
                    .take(usize::try_from(placed.run.count).unwrap())
                {
                    table.insert(number, (from + u32::try_from(placed.frame).unwrap(), page));
                }
            }
        };
        note(&full, 0);
        for run in &full.runs {
            let count = u16::try_from(run.run.count).unwrap();
            let frame = u32::try_from(run.frame).unwrap();
            before.memory.add_parent(MapRun { first: run.run.first, frame, count, page: run.page });
        }
        let (runs, mut bytes) = batch(updates, 1);
        let update = encoder.encode(runs, &mut bytes, Vec::new(), &before).unwrap();
        let from = number(&mut before, &update);
        note(&update, from);
        before.memory = Base::default();
        for (first, (frame, page)) in table {
            before.memory.add_parent(MapRun { first, frame, count: 1, page });
        }
        before
    }

    /// The pages of a batch as a reader would find them.
    fn decode(encoded: &Encoded<u8>, before: &Before) -> BTreeMap<u64, Vec<u8>> {
        let mut decoder = FrameDecoder::new().unwrap();
        let mut rest = encoded.stored.as_slice();
        let raws: Vec<Vec<u8>> = encoded
            .frames
            .iter()
            .map(|frame| {
                let (stored, later) = rest.split_at(frame.stored_bytes);
                rest = later;
                let mut raw = Vec::new();
                let raw_bytes = frame.pages * PAGE_BYTES;
                match frame.base {
                    None => decoder.decode(frame.codec, stored, raw_bytes, &mut raw).unwrap(),
                    Some(base) => {
                        let (base, base_stored) = &before.frames[base as usize];
                        assert!(!base.is_delta(), "a chain");
                        let mut base_raw = Vec::new();
                        let base_bytes = usize::from(base.pages) * PAGE_BYTES;
                        decoder.decode(base.codec, base_stored, base_bytes, &mut base_raw).unwrap();
                        let over = BaseFrame { digest: base.digest, raw: &base_raw };
                        decoder.decode_delta(stored, raw_bytes, over, &mut raw).unwrap();
                    }
                }
                raw
            })
            .collect();
        assert!(rest.is_empty());
        let mut pages = BTreeMap::new();
        for placed in &encoded.runs {
            let numbers = placed.run.first..placed.run.first + placed.run.count;
            for (number, page) in numbers.zip(usize::from(placed.page)..) {
                let raw = &raws[placed.frame][page * PAGE_BYTES..(page + 1) * PAGE_BYTES];
                assert!(pages.insert(number, raw.to_vec()).is_none());
            }
        }
        pages
    }

    fn codecs(encoded: &Encoded<u8>) -> Vec<(Codec, usize)> {
        encoded.frames.iter().map(|frame| (frame.codec, frame.pages)).collect()
    }

    fn check(numbers: &[u64], version: u64, before: &Before) -> Vec<(Codec, usize)> {
        let (runs, mut bytes) = batch(numbers, version);
        let mut encoder = PageEncoder::new().unwrap();
        let encoded = encoder.encode(runs, &mut bytes, Vec::new(), before).unwrap();
        let expected: BTreeMap<u64, Vec<u8>> =
            numbers.iter().map(|&number| (number, page(number, version))).collect();
        assert!(decode(&encoded, before) == expected);
        codecs(&encoded)
    }

    /// An increment would hold whole pages where a word has changed; or differences where there is nothing to gain.
    #[test]
    fn enough_changed_pages_of_a_frame_become_differences() {
        let before = before(&[]);
        let dense: Vec<u64> = (0..20).chain(64..130).chain(195..200).collect();
        assert_eq!(
            check(&dense, 1, &before),
            [(Codec::Delta, 20), (Codec::Delta, 64), (Codec::Delta, 5), (Codec::Raw, 2)]
        );
        // With less of the others the few are too few.
        let sparse: Vec<u64> = (0..20).chain(64..74).chain(195..200).collect();
        assert_eq!(check(&sparse, 1, &before), [(Codec::Delta, 20), (Codec::Raw, 15)]);
        // Written anew: the content of other pages.
        let (runs, _) = batch(&dense, 0);
        let mut other: Vec<u8> = dense.iter().flat_map(|number| page(number + 1000, 0)).collect();
        let mut encoder = PageEncoder::new().unwrap();
        let encoded = encoder.encode(runs, &mut other, Vec::new(), &before).unwrap();
        assert!(encoded.frames.iter().all(|frame| frame.codec == Codec::Raw));
        let owner_without = dense.iter().map(|&first| (9, PageRun { first, count: 1 })).collect();
        let (_, mut bytes) = batch(&dense, 1);
        let encoded = encoder.encode(owner_without, &mut bytes, Vec::new(), &before).unwrap();
        assert!(encoded.frames.iter().all(|frame| frame.codec == Codec::Raw));
    }

    /// Trials that fail would cost a fifth of all compression; without any, what pays again would not be found out.
    #[test]
    fn trials_become_rare_while_they_fail() {
        let trials = Trials::default();
        let mut tried = 0;
        for _ in 0..160 {
            if trials.is_due() {
                tried += 1;
                trials.lost();
            }
        }
        // The batches 1, 3, 7, 15, and from there on each 16th.
        assert_eq!(tried, 13);
        while !trials.is_due() {}
        trials.won();
        assert!((0..100).all(|_| trials.is_due()));
        trials.lost();
        assert!(!trials.is_due() && trials.is_due());
    }

    /// A restore would walk a chain.
    #[test]
    fn pages_that_are_told_by_differences_get_the_same_base() {
        let updates: Vec<u64> = (20..50).collect();
        let before = before(&updates);
        assert_eq!(before.frames.last().unwrap().0.codec, Codec::Delta);
        assert_eq!(check(&(10..60).collect::<Vec<_>>(), 2, &before), [(Codec::Delta, 50)]);
    }

    #[test]
    fn without_the_base_pages_are_stored_whole() {
        let updates: Vec<u64> = (20..50).collect();
        let all: Vec<u64> = (10..60).collect();
        let mut without = before(&updates);
        without.missing = vec![0];
        assert_eq!(check(&all, 2, &without), [(Codec::Raw, 50)]);
        // Nobody knows which pages of the base these were.
        let mut before = before(&updates);
        before.missing = vec![u32::try_from(before.frames.len() - 1).unwrap()];
        assert_eq!(check(&all, 2, &before), [(Codec::Delta, 20), (Codec::Raw, 30)]);
    }

    proptest! {
        /// A page would come back as another, or as an earlier version.
        #[test]
        fn any_pages_come_back(
            updates in proptest::collection::btree_set(0u64..200, 0..120),
            numbers in proptest::collection::btree_set(0u64..230, 1..150),
            missing in proptest::collection::vec(0u32..6, 0..2),
        ) {
            let updates: Vec<u64> = updates.into_iter().collect();
            let numbers: Vec<u64> = numbers.into_iter().collect();
            let mut before = before(&updates);
            before.missing = missing;
            check(&numbers, 2, &before);
        }
    }
}
