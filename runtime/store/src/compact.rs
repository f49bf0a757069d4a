//! Packs that are mostly dead: which they are, and their live frames, for the next capsule to put elsewhere.
//!
//! After many increments a pack may hold little that the newest capsule still names, and all of it is kept for that. A
//! capsule never changes, so that nothing can be moved under it; but the next one may name the same frames in a pack of its
//! own. Once the older capsules are dropped, the old pack is garbage.
//!
//! ```text
//! Survey::of the parent -> mostly_dead: which packs, within a bound -> live_frames: each frame as it is stored
//!   -> the writer puts it into a pack of its own, and names it there wherever the parent's map has the old place
//! ```
//!
//! Frames are copied as they are, compressed, and keep their digest. What of a frame is dead travels with it. The base of a frame
//! of differences counts as live, whether or not a page lies in it, and is told beside that: either may move, or both.
//!
//! What this module does not do: it writes nothing, and knows nothing of packs that the parent does not name.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use samara_capsule::digest::{Digest, FrameDigest};
use samara_capsule::manifest::BlobRef;
use samara_capsule::pagemap::MapFrame;

use crate::frames::FrameCounts;
use crate::reader::{CapsuleReader, ReadError};
use crate::store::{Store, StoreError, blob_path};

/// Packs whose live frames are fetched at a time. Each is at most a pack in memory.
const FETCHES_MAX: usize = 2;

/// A pack, and how much of it a capsule names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackUse {
    pub pack: BlobRef,
    /// Stored bytes of the frames that any page map names, each counted once.
    pub live_bytes: u64,
}

impl PackUse {
    /// Live bytes of a hundred.
    pub fn live_percent(&self) -> u64 {
        self.live_bytes.saturating_mul(100).checked_div(self.pack.bytes).unwrap_or(100)
    }
}

/// Which frames of which packs the page maps of a capsule name. It takes about 60 bytes a frame.
#[derive(Debug)]
pub struct Survey {
    /// By pack and offset.
    frames: HashMap<Digest, BTreeMap<u32, NamedFrame>>,
    pack_bytes: HashMap<Digest, u64>,
}

/// Where a frame lies: pack, and offset in that.
pub type FramePlace = (Digest, u32);

/// A frame as page maps name it.
#[derive(Clone, Copy, Debug)]
struct NamedFrame {
    /// Its indices count nothing.
    frame: MapFrame,
    base: Option<FramePlace>,
}

/// A frame that a capsule names, as it is stored.
#[derive(Clone, Debug)]
pub struct LiveFrame {
    /// Where it lies: the pack, and within it the offset, which together name the frame in every map.
    pub pack: Digest,
    /// `pack` and `base` in it count nothing.
    pub frame: MapFrame,
    /// Where its base lies. That is a live frame too.
    pub base: Option<FramePlace>,
    /// Checked against the digest that the map has.
    pub stored: Bytes,
}

/// The page maps name one place for two different frames.
#[derive(Debug, thiserror::Error)]
pub enum CompactError<E> {
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("can't take a frame of another pack")]
    Take(#[source] E),
}

impl Survey {
    /// Reads all page maps of a capsule.
    ///
    /// # Errors
    /// A map that can't be read, or maps of which one names another frame than the other at the same place.
    pub fn of(reader: &CapsuleReader) -> Result<Survey, ReadError> {
        let pack_bytes =
            reader.manifest().packs.iter().map(|pack| (pack.digest, pack.bytes)).collect();
        let mut survey = Survey { frames: HashMap::new(), pack_bytes };
        for space in reader.spaces() {
            reader.segments(space, |segment| {
                const CHECKED: &str = "a segment's indices were checked";
                let place = |frame: &MapFrame| -> FramePlace {
                    (*segment.packs().get(frame.pack as usize).expect(CHECKED), frame.offset)
                };
                for frame in segment.frames() {
                    let (pack, offset) = place(frame);
                    let base = frame.base.map(|base| segment.frames().get(base as usize));
                    let base = base.map(|base| place(base.expect(CHECKED)));
                    let named = survey.frames.entry(pack).or_default();
                    let known = named.entry(offset).or_insert(NamedFrame { frame: *frame, base });
                    let known = known.frame;
                    if (known.digest, known.stored_bytes) != (frame.digest, frame.stored_bytes) {
                        return Err(ReadError::FrameDigest { pack, offset });
                    }
                }
                Ok(())
            })?;
        }
        Ok(survey)
    }

    /// All frames, those among them that are needed as bases alone.
    pub fn frame_counts(&self) -> FrameCounts {
        let mut counts = FrameCounts::default();
        for NamedFrame { frame, .. } in self.frames.values().flat_map(BTreeMap::values) {
            counts.add(frame.codec, frame.pages.into(), frame.stored_bytes.into());
        }
        counts
    }

    /// All packs of the capsule, by digest.
    pub fn packs(&self) -> Vec<PackUse> {
        let mut packs: Vec<PackUse> = self
            .pack_bytes
            .iter()
            .map(|(&digest, &bytes)| {
                let frames = self.frames.get(&digest).into_iter().flatten();
                let live_bytes = frames.map(|(_, named)| u64::from(named.frame.stored_bytes)).sum();
                PackUse { pack: BlobRef { digest, bytes }, live_bytes }
            })
            .collect();
        packs.sort_unstable_by_key(|one| one.pack);
        packs
    }

    /// The packs of which less than `live_percent_min` of a hundred bytes are live: see [`mostly_dead`].
    pub fn mostly_dead(&self, live_percent_min: u64, copied_bytes_max: u64) -> Vec<PackUse> {
        mostly_dead(&self.packs(), live_percent_min, copied_bytes_max)
    }

    /// Passes the live frames of `packs`, which [`Survey::mostly_dead`] has chosen, pack by pack and in the order in which they
    /// lie there. `store` is the address of the capsule that was surveyed. Only what is live is fetched.
    ///
    /// # Errors
    /// The first frame that can't be read or is damaged, or the first error of `take`.
    pub fn live_frames<E>(
        &self,
        store: &Store,
        packs: &[PackUse],
        mut take: impl FnMut(LiveFrame) -> Result<(), E>,
    ) -> Result<(), CompactError<E>> {
        let nothing = BTreeMap::new();
        let fetches =
            futures::stream::iter(packs).map(|one| {
                let frames = self.frames.get(&one.pack.digest).unwrap_or(&nothing);
                async move {
                    Ok((one.pack.digest, frames, fetch(store, one.pack.digest, frames).await?))
                }
            });
        let mut fetches = fetches.buffered(FETCHES_MAX);
        while let Some((pack, frames, contents)) =
            store.block_on(fetches.try_next()).map_err(CompactError::<E>::Read)?
        {
            for (&NamedFrame { frame, base }, stored) in frames.values().zip(contents) {
                let offset = frame.offset;
                if stored.len() != frame.stored_bytes as usize {
                    return Err(ReadError::Frame { pack, offset }.into());
                }
                if FrameDigest::of(&stored) != frame.digest {
                    return Err(ReadError::FrameDigest { pack, offset }.into());
                }
                take(LiveFrame { pack, frame, base, stored }).map_err(CompactError::Take)?;
            }
        }
        Ok(())
    }
}

async fn fetch(
    store: &Store,
    pack: Digest,
    frames: &BTreeMap<u32, NamedFrame>,
) -> Result<Vec<Bytes>, ReadError> {
    let range = |NamedFrame { frame, .. }: &NamedFrame| -> Range<u64> {
        let start = u64::from(frame.offset);
        start..start + u64::from(frame.stored_bytes)
    };
    let ranges: Vec<Range<u64>> = frames.values().map(range).collect();
    match ranges.is_empty() {
        true => Ok(Vec::new()),
        false => Ok(store
            .get_parts(&blob_path(&pack), &ranges)
            .await
            .map_err(|error: StoreError| error)?),
    }
}

/// The packs of which less than `live_percent_min` of a hundred bytes are live, those with the smallest share first, as many as
/// together have no more than `copied_bytes_max` live bytes: each save pays for a part only.
pub fn mostly_dead(
    packs: &[PackUse],
    live_percent_min: u64,
    copied_bytes_max: u64,
) -> Vec<PackUse> {
    let dead = packs.iter().copied().filter(|one| one.live_percent() < live_percent_min);
    let mut dead: Vec<PackUse> = dead.collect();
    dead.sort_by_key(|one| (one.live_percent(), one.pack));
    let mut left = copied_bytes_max;
    dead.into_iter()
        .take_while(|one| match left.checked_sub(one.live_bytes) {
            Some(rest) => {
                left = rest;
                true
            }
            None => false,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::convert::Infallible;
    use std::sync::Mutex;
    use std::time::SystemTime;

    use proptest::prelude::*;
    use samara_capsule::config::{Provenance, Requirements};
    use samara_capsule::frame::{Codec, FrameEncoder};
    use samara_capsule::manifest::Manifest;
    use samara_capsule::pack::PackBuilder;
    use samara_capsule::pagemap::MapBuilder;
    use samara_capsule::transfer::{
        PAGE_BYTES, PageBatch, PageRun, Sink as _, Source as _, SpaceId,
    };

    use crate::config::StoreConfig;
    use crate::writer::{CapsuleFacts, CapsuleWriter};
    use crate::{Location, Store};

    fn pack_use(number: u8, bytes: u64, live_bytes: u64) -> PackUse {
        PackUse { pack: BlobRef { digest: Digest::of(&[number]), bytes }, live_bytes }
    }

    /// Packs that are worth keeping would be copied with every save; or one save would copy everything.
    #[test]
    fn the_deadest_packs_come_first_and_within_the_bound() {
        let packs = [
            pack_use(0, 1000, 900),
            pack_use(1, 1000, 240),
            pack_use(2, 1000, 10),
            pack_use(3, 1000, 0),
            pack_use(4, 1000, 250),
        ];
        let choose = |percent, bytes| -> Vec<u64> {
            mostly_dead(&packs, percent, bytes).iter().map(|one| one.live_bytes).collect()
        };
        assert_eq!(choose(25, 10_000), [0, 10, 240]);
        assert_eq!(choose(26, 10_000), [0, 10, 240, 250]);
        assert_eq!(choose(25, 249), [0, 10]);
        assert_eq!(choose(25, 9), [0]);
        assert_eq!(choose(0, 10_000), [0; 0]);
    }

    proptest! {
        #[test]
        fn no_more_is_copied_than_is_allowed(
            sizes in proptest::collection::vec((1u64..1000, 0u64..1000), 0..20),
            percent in 0u64..120,
            bytes_max in 0u64..3000,
        ) {
            let packs: Vec<PackUse> = sizes.iter().enumerate().map(|(number, (bytes, live))| {
                pack_use(u8::try_from(number).unwrap(), *bytes, *live.min(bytes))
            }).collect();
            let chosen = mostly_dead(&packs, percent, bytes_max);
            prop_assert!(chosen.iter().map(|one| one.live_bytes).sum::<u64>() <= bytes_max);
            prop_assert!(chosen.iter().all(|one| one.live_percent() < percent));
        }
    }

    fn page(number: u64) -> Vec<u8> {
        let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut page = Vec::with_capacity(PAGE_BYTES);
        while page.len() < PAGE_BYTES {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            page.extend_from_slice(&(state >> 8).to_le_bytes());
        }
        page
    }

    fn read(reader: &CapsuleReader) -> BTreeMap<(SpaceId, u64), Vec<u8>> {
        let pages = Mutex::new(BTreeMap::new());
        reader
            .transfer(&reader.spaces(), &|space, runs, bytes| {
                let numbers = runs.iter().flat_map(|run| run.first..run.first + run.count);
                let mut pages = pages.lock().unwrap();
                for (number, page) in numbers.zip(bytes.as_chunks::<PAGE_BYTES>().0) {
                    pages.insert((space, number), page.to_vec());
                }
                Ok(())
            })
            .unwrap();
        pages.into_inner().unwrap()
    }

    /// Writes `wanted` pages of frames of another capsule, all of them, as a capsule that names old packs.
    fn store_map(
        store: &Store,
        parent: &CapsuleReader,
        moved: &HashMap<(Digest, u32), (Digest, MapFrame)>,
        keep: impl Fn(u64) -> bool,
    ) -> Manifest {
        let mut map = MapBuilder::default();
        let mut packs = HashMap::new();
        let mut frames = HashMap::new();
        let space = SpaceId(0);
        parent
            .segments(space, |segment| {
                for run in segment.runs() {
                    for index in 0..run.count {
                        let number = run.first + u64::from(index);
                        if !keep(number) {
                            continue;
                        }
                        let frame = segment.frames()[run.frame as usize];
                        let old = (segment.packs()[frame.pack as usize], frame.offset);
                        let mut add = |frame: MapFrame, old: FramePlace, base| {
                            let (pack, frame) = moved.get(&old).copied().unwrap_or((old.0, frame));
                            let pack_number = *packs.entry(pack).or_insert_with(|| {
                                let pack_number = map.add_pack();
                                map.set_pack(pack_number, pack);
                                pack_number
                            });
                            *frames.entry((pack, frame.offset)).or_insert_with(|| {
                                map.add_frame(MapFrame { pack: pack_number, base, ..frame })
                            })
                        };
                        let base = frame.base.map(|base| {
                            let base = segment.frames()[base as usize];
                            add(base, (segment.packs()[base.pack as usize], base.offset), None)
                        });
                        let frame_number = add(frame, old, base);
                        let page_run = PageRun { first: number, count: 1 };
                        map.add_run(space, page_run, frame_number, run.page + index).unwrap();
                    }
                }
                Ok(())
            })
            .unwrap();
        let mut segments = Vec::new();
        map.complete()
            .unwrap()
            .emit(|_, segment| -> Result<(), Infallible> {
                segments.push(segment.encode().unwrap());
                Ok(())
            })
            .unwrap();
        let mut manifest = parent.manifest().clone();
        let put = |content: Vec<u8>| {
            let blob = BlobRef::to(&content);
            store.block_on(store.put(&blob_path(&blob.digest), content.into())).unwrap();
            blob
        };
        manifest.maps = BTreeMap::from([(space, segments.into_iter().map(put).collect())]);
        let bytes = |pack: &Digest| {
            let content = store.block_on(store.get(&blob_path(pack), 16 << 20)).unwrap();
            BlobRef { digest: *pack, bytes: content.len() as u64 }
        };
        manifest.packs = packs.keys().map(bytes).collect();
        manifest.packs.sort_unstable();
        manifest
    }

    fn open_manifest(store: &Store, manifest: &Manifest) -> CapsuleReader {
        let content = manifest.encode().unwrap();
        let blob = BlobRef::to(&content);
        store.block_on(store.put(&blob_path(&blob.digest), content.into())).unwrap();
        CapsuleReader::open_digest(store, blob.digest).unwrap()
    }

    /// Pages would be lost, or others come in their place, when their frames are put elsewhere; or the old pack would still
    /// be needed.
    #[test]
    fn live_frames_lie_elsewhere_and_hold_the_same_pages() {
        let folder = tempfile::tempdir().unwrap();
        let location = Location::folder(folder.path()).unwrap();
        let mut config = StoreConfig::default();
        config.file.sync = false;
        let store = Store::open(&location, &config, true).unwrap();
        let mut lease = store.take_epoch(&BTreeMap::new()).unwrap().lease;
        let mut writer = CapsuleWriter::new(&store).unwrap();
        for start in (0..8192u64).step_by(256) {
            let runs = vec![PageRun { first: start, count: 256 }];
            let bytes = (start..start + 256).flat_map(page).collect();
            writer.pages(PageBatch { spaces: [SpaceId(0)].into(), runs, bytes }).unwrap();
        }
        let facts = CapsuleFacts {
            created: SystemTime::UNIX_EPOCH,
            parent: None,
            provenance: Provenance::default(),
            requirements: Requirements::default(),
            report: None,
        };
        writer.commit(&mut lease, &[0xf6], facts).unwrap();
        let full = CapsuleReader::open_latest(&store).unwrap();
        let survey = Survey::of(&full).unwrap();
        assert!(survey.packs().len() > 3);
        assert!(survey.packs().iter().all(|one| one.live_percent() > 95));
        assert!(survey.mostly_dead(50, u64::MAX).is_empty());

        // An increment: of most of the address space a page here and there is left.
        let keep = |number: u64| number > 6000 || number % 640 == 3;
        let increment = open_manifest(&store, &store_map(&store, &full, &HashMap::new(), keep));
        let survey = Survey::of(&increment).unwrap();
        let dead = survey.mostly_dead(50, u64::MAX);
        assert!(dead.len() > 1 && dead.len() < survey.packs().len());

        let mut builder = PackBuilder::new(Vec::new());
        let mut places = Vec::new();
        let take = |live: LiveFrame| {
            let raw_bytes = u32::from(live.frame.pages) * u32::try_from(PAGE_BYTES).unwrap();
            let packed = builder.push(live.frame.codec, &live.stored, raw_bytes);
            places.push((live.pack, live.frame, packed));
            Ok::<_, Infallible>(())
        };
        survey.live_frames(&store, &dead, take).unwrap();
        let content = builder.finish();
        let live_bytes: u64 = dead.iter().map(|one| one.live_bytes).sum();
        assert_eq!(places.len() as u64, live_bytes / (256 << 10));
        let pack = BlobRef::to(&content);
        store.block_on(store.put(&blob_path(&pack.digest), content.into())).unwrap();
        let moved = places
            .into_iter()
            .map(|(old, frame, packed)| {
                let new = MapFrame { offset: packed.offset, ..frame };
                ((old, frame.offset), (pack.digest, new))
            })
            .collect();
        let compact = open_manifest(&store, &store_map(&store, &increment, &moved, |_| true));

        let expected: BTreeMap<_, _> =
            (0..8192).filter(|number| keep(*number)).map(|n| ((SpaceId(0), n), page(n))).collect();
        assert!(read(&increment) == expected);
        assert!(read(&compact) == expected);
        for one in &dead {
            assert!(!compact.manifest().packs.contains(&one.pack), "it is still needed");
        }
        assert!(Survey::of(&compact).unwrap().mostly_dead(50, u64::MAX).is_empty());
        assert!(compact.manifest().stored_bytes() < increment.manifest().stored_bytes() / 2);
    }

    /// A base that lies elsewhere, or of which no page is left, would be missed by the pages that are told by differences from it.
    #[test]
    fn bases_move_with_what_needs_them() {
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
        let space = SpaceId(0);
        let content = |number: u64, is_new: bool| {
            let mut content = page(number);
            content[77] ^= u8::from(is_new);
            content
        };
        let batch = |first: u64, is_new: bool| PageBatch {
            spaces: [space].into(),
            runs: vec![PageRun { first, count: 256 }],
            bytes: (first..first + 256).flat_map(|number| content(number, is_new)).collect(),
        };
        let mut writer = CapsuleWriter::new(&store).unwrap();
        for first in (0..8192).step_by(256) {
            writer.pages(batch(first, false)).unwrap();
        }
        writer.commit(&mut lease, &[0xf6], facts()).unwrap();
        let mut writer = CapsuleWriter::after(CapsuleReader::open_latest(&store).unwrap()).unwrap();
        let base = samara_capsule::transfer::Sink::base(&mut writer, Some(space)).unwrap();
        writer.earlier(space, base);
        for first in (0..8192).step_by(256) {
            writer.pages(batch(first, true)).unwrap();
        }
        let committed = writer.commit(&mut lease, &[0xf6], facts()).unwrap();
        assert_eq!(committed.new_frames.delta.pages, 8192);
        // Of what has changed a part is left, and nothing else: of each pack a few bases.
        let keep = |number: u64| number % 1024 < 64;
        let increment = CapsuleReader::open_latest(&store).unwrap();
        let increment =
            open_manifest(&store, &store_map(&store, &increment, &HashMap::new(), keep));
        let survey = Survey::of(&increment).unwrap();
        let counts = survey.frame_counts();
        assert_eq!((counts.delta.frames, counts.raw.frames), (8, 8));
        let dead = survey.mostly_dead(50, u64::MAX);
        assert!(dead.len() > 2);

        let mut builder = PackBuilder::new(Vec::new());
        let mut places = Vec::new();
        let take = |live: LiveFrame| {
            assert_eq!(live.base.is_some(), live.frame.is_delta());
            let raw_bytes = u32::from(live.frame.pages) * u32::try_from(PAGE_BYTES).unwrap();
            let packed = builder.push(live.frame.codec, &live.stored, raw_bytes);
            places.push((live, packed));
            Ok::<_, Infallible>(())
        };
        survey.live_frames(&store, &dead, take).unwrap();
        let content_of_pack = builder.finish();
        let pack = BlobRef::to(&content_of_pack);
        store.block_on(store.put(&blob_path(&pack.digest), content_of_pack.into())).unwrap();
        let moved: HashMap<_, _> = places
            .iter()
            .map(|(live, packed)| {
                let new = MapFrame { offset: packed.offset, ..live.frame };
                ((live.pack, live.frame.offset), (pack.digest, new))
            })
            .collect();
        assert!(
            places.iter().all(|(live, _)| live.base.is_none_or(|base| moved.contains_key(&base)))
        );
        let compact = open_manifest(&store, &store_map(&store, &increment, &moved, |_| true));
        for one in &dead {
            assert!(!compact.manifest().packs.contains(&one.pack), "it is still needed");
            store.block_on(store.delete(&blob_path(&one.pack.digest))).unwrap();
        }
        let expected: BTreeMap<_, _> = (0..8192)
            .filter(|number| keep(*number))
            .map(|number| ((space, number), content(number, true)))
            .collect();
        assert!(read(&compact) == expected);
    }

    /// A damaged frame would get a new place, and be damaged in a capsule that has only just been written.
    #[test]
    fn a_damaged_frame_is_not_copied() {
        let folder = tempfile::tempdir().unwrap();
        let store =
            Store::open(&Location::folder(folder.path()).unwrap(), &StoreConfig::default(), true)
                .unwrap();
        let mut stored = Vec::new();
        let codec = FrameEncoder::new().unwrap().encode(&page(1), &mut stored).unwrap();
        assert_eq!(codec, Codec::Raw);
        let mut builder = PackBuilder::new(Vec::new());
        let packed = builder.push(codec, &stored, u32::try_from(PAGE_BYTES).unwrap());
        let mut content = builder.finish();
        let pack = BlobRef::to(&content);
        let frame = MapFrame {
            pack: 0,
            offset: packed.offset,
            stored_bytes: packed.stored_bytes,
            pages: 1,
            codec,
            base: None,
            digest: FrameDigest::of(&stored),
        };
        let named = BTreeMap::from([(frame.offset, NamedFrame { frame, base: None })]);
        let survey = Survey {
            frames: HashMap::from([(pack.digest, named)]),
            pack_bytes: HashMap::from([(pack.digest, pack.bytes)]),
        };
        let copy = |content: Vec<u8>| {
            store.block_on(store.put(&blob_path(&pack.digest), content.into())).unwrap();
            let mut taken = 0;
            let result = survey.live_frames(&store, &survey.packs(), |_| {
                taken += 1;
                Ok::<_, Infallible>(())
            });
            (taken, result.map_err(|error| error.to_string()))
        };
        assert_eq!(copy(content.clone()), (1, Ok(())));
        content[100] ^= 1;
        let (taken, result) = copy(content);
        assert_eq!(taken, 0);
        assert!(result.unwrap_err().contains("has another digest"));
    }
}
