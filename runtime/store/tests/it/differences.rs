//! Capsules that tell pages by what has changed in them: they are small, whole in every generation, and need no earlier one.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use object_store::memory::InMemory;
use samara_capsule::cbor::encode_record;
use samara_capsule::digest::Digest;
use samara_capsule::frame::Codec;
use samara_capsule::manifest::{BlobRef, Manifest};
use samara_capsule::pagemap::{MapBuilder, MapFrame, MapRun, Segment};
use samara_capsule::transfer::{PAGE_BYTES, PageBatch, PageRun, Sink, Source as _, SpaceId};
use samara_store::collect::CollectOptions;
use samara_store::config::{PacksSettings, S3Settings, Secret, StoreConfig};
use samara_store::layout::{export, import};
use samara_store::writer::Committed;
use samara_store::{CapsuleReader, CapsuleWriter, Lease, Location, Retention, Store};

use crate::sample::{chain, facts, folder_config, open, read_pages, take_epoch};

const SPACE: SpaceId = SpaceId(0);

/// Version of each page.
type Versions = BTreeMap<u64, u64>;

/// Noise, and a word of the version: whole pages can't be compressed, and differences are next to nothing.
fn page(number: u64, version: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut page = Vec::with_capacity(PAGE_BYTES);
    while page.len() < PAGE_BYTES {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        page.extend_from_slice(&(state >> 8).to_le_bytes());
    }
    let at = 8 * usize::try_from(version % 500).unwrap();
    page[at..at + 8].copy_from_slice(&version.to_le_bytes());
    page
}

fn records() -> Vec<u8> {
    encode_record(&"records").unwrap()
}

/// Where batches and frames are cut, some pages of a frame are too few.
fn assert_differences(committed: &Committed, pages: u64) {
    let found = committed.new_frames.delta.pages;
    assert!(found > pages * 9 / 10 && found <= pages, "{found} of {pages} pages");
}

fn batches<'a>(pages: impl Iterator<Item = (&'a u64, &'a u64)>) -> Vec<(Vec<PageRun>, Vec<u8>)> {
    let pages: Vec<_> = pages.collect();
    let batch = |pages: &[(&u64, &u64)]| {
        let runs = pages.iter().map(|(number, _)| PageRun { first: **number, count: 1 }).collect();
        (runs, pages.iter().flat_map(|(number, version)| page(**number, **version)).collect())
    };
    pages.chunks(256).map(batch).collect()
}

fn write_full(store: &Store, lease: &mut Lease, versions: &Versions) -> Committed {
    let mut writer = CapsuleWriter::new(store).unwrap();
    for (runs, bytes) in batches(versions.iter()) {
        writer.pages(PageBatch { spaces: [SPACE].into(), runs, bytes }).unwrap();
    }
    writer.commit(lease, &records(), facts()).unwrap()
}

/// The next capsule: `updates` are passed while the container runs, as drafts, or while it stands.
fn write_next(
    store: &Store,
    lease: &mut Lease,
    versions: &mut Versions,
    updates: &Versions,
    as_drafts: bool,
) -> Committed {
    let parent = CapsuleReader::open_latest(store).unwrap();
    let mut writer = CapsuleWriter::after(parent).unwrap();
    let base = Sink::base(&mut writer, Some(SPACE)).unwrap();
    if as_drafts {
        for (runs, bytes) in batches(updates.iter()) {
            writer.draft(base, false, runs, bytes).unwrap();
        }
    }
    writer.earlier(SPACE, base);
    versions.extend(updates);
    for number in versions.keys() {
        if as_drafts || !updates.contains_key(number) {
            let run = PageRun { first: *number, count: 1 };
            writer.unchanged(&[SPACE].into(), base, run, true).unwrap();
        }
    }
    if !as_drafts {
        for (runs, bytes) in batches(updates.iter()) {
            writer.pages(PageBatch { spaces: [SPACE].into(), runs, bytes }).unwrap();
        }
    }
    writer.commit(lease, &records(), facts()).unwrap()
}

fn assert_holds(reader: &CapsuleReader, versions: &Versions) {
    let pages = read_pages(reader, &reader.spaces()).unwrap();
    assert_eq!(pages.len(), versions.len());
    for (number, version) in versions {
        assert!(pages[&(SPACE, *number)] == page(*number, *version), "page {number}");
    }
    let report = reader.verify(&|_, _| ());
    assert!(report.faults.is_empty(), "{:?}", report.faults);
}

fn full(pages: u64) -> Versions {
    (0..pages).map(|number| (number, 0)).collect()
}

fn updates(numbers: impl Iterator<Item = u64>, version: u64) -> Versions {
    numbers.map(|number| (number, version)).collect()
}

/// A folder with a full capsule and four that continue it; what each of them holds.
fn generations(store: &Store) -> Vec<(Digest, Versions)> {
    let mut lease = take_epoch(store);
    let mut versions = full(2000);
    let first = write_full(store, &mut lease, &versions);
    let mut all = vec![(first.capsule.digest, versions.clone())];
    let mut next = |numbers: Vec<u64>, version, as_drafts| {
        let changed = updates(numbers.into_iter(), version);
        let committed = write_next(store, &mut lease, &mut versions, &changed, as_drafts);
        all.push((committed.capsule.digest, versions.clone()));
        (committed, changed.len() as u64)
    };
    let (committed, count) = next((100..900).collect(), 1, false);
    assert_differences(&committed, count);
    assert!(committed.uploaded_bytes < 100_000, "{committed:?}");
    // In part over pages that are told by differences already, and with some that are new.
    let (committed, count) = next((500..1300).chain(2000..2100).collect(), 2, true);
    assert_differences(&committed, count - 100);
    assert!(committed.uploaded_bytes < 120 * 4096 + 100_000, "{committed:?}");
    let (committed, count) = next((0..1800).step_by(2).collect(), 3, false);
    assert_differences(&committed, count);
    // Too few of each frame.
    let (committed, _) = next((0..1800).step_by(32).collect(), 4, true);
    assert_eq!(committed.new_frames.delta.pages, 0);
    all
}

/// An increment would be as large as its pages, or a capsule be others' pages.
#[test]
fn what_has_changed_comes_back_in_every_generation() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    for (digest, versions) in generations(&store) {
        let mut reader = CapsuleReader::open_digest(&store, digest).unwrap();
        assert_holds(&reader, &versions);
        // As a restore does it: all is read first, and much of it kept.
        reader.check().unwrap();
        assert_holds(&reader, &versions);
        // A part, cut anywhere.
        let parts = [PageRun { first: 33, count: 700 }, PageRun { first: 1001, count: 3 }];
        let some =
            crate::sample::collect_pages(|place| reader.transfer_some(&[(SPACE, &parts)], place));
        let some = some.unwrap();
        assert_eq!(some.len(), 703);
        assert!(
            some.iter()
                .all(|((_, number), content)| { *content == page(*number, versions[number]) })
        );
    }
}

#[test]
fn a_copy_elsewhere_is_whole() {
    let root = tempfile::tempdir().unwrap();
    let store = open(&root.path().join("store"));
    let (digest, versions) = generations(&store).pop().unwrap();
    let layout = root.path().join("layout");
    export(&CapsuleReader::open_digest(&store, digest).unwrap(), &layout, &|_, _| ()).unwrap();
    drop(store);
    fs::remove_dir_all(root.path().join("store")).unwrap();
    let other = open(&root.path().join("other"));
    import(&layout, &other, &|_, _| ()).unwrap();
    assert_holds(&CapsuleReader::open_latest(&other).unwrap(), &versions);
}

/// A base of which no page is left would be deleted with the capsule that it came from.
#[test]
fn collections_leave_the_bases() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    let mut versions = full(2000);
    write_full(&store, &mut lease, &versions);
    let changed = updates(0..2000, 1);
    let committed = write_next(&store, &mut lease, &mut versions, &changed, false);
    assert_eq!(committed.new_frames.delta.pages, 2000);
    let collected = store
        .collect(
            &"last=1".parse::<Retention>().unwrap(),
            SystemTime::now(),
            &CollectOptions { grace: Duration::ZERO, dry_run: false },
            &|_, _| (),
        )
        .unwrap();
    assert_eq!(store.capsules().unwrap().len(), 1, "{collected:?}");
    let reader = CapsuleReader::open_latest(&store).unwrap();
    assert!(reader.manifest().packs.len() > 1);
    assert_holds(&reader, &versions);
    // And the next one still has them.
    let changed = updates(300..700, 2);
    let committed = write_next(&store, &mut lease, &mut versions, &changed, true);
    assert_differences(&committed, 400);
    assert_holds(&CapsuleReader::open_latest(&store).unwrap(), &versions);
}

/// A place in a store that is no folder, with packs kept on the node.
fn open_remote(objects: &Arc<InMemory>, packs: &Path) -> Store {
    let config = StoreConfig {
        packs: PacksSettings { folder: Some(packs.to_owned()), mebibytes_max: Some(64) },
        s3: S3Settings {
            region: Some("x".into()),
            access_key_id: Some("x".into()),
            secret_access_key: Some(Secret("x".into())),
            ..S3Settings::default()
        },
        ..StoreConfig::default()
    };
    let location = Location::parse("s3://bucket/x").unwrap();
    Store::open_through(&location, &config, true, |_| objects.clone()).unwrap()
}

/// Without the node's copies nothing would be saved where the store is far away; damaged ones must not be used.
#[test]
fn other_stores_have_their_bases_on_the_node() {
    let folder = tempfile::tempdir().unwrap();
    let packs = folder.path().join("packs");
    let objects = Arc::new(InMemory::new());
    let store = open_remote(&objects, &packs);
    let mut lease = take_epoch(&store);
    let mut versions = full(1000);
    write_full(&store, &mut lease, &versions);
    let kept =
        || -> Vec<_> { fs::read_dir(&packs).unwrap().map(|entry| entry.unwrap().path()).collect() };
    assert_eq!(kept().len(), 1);
    let mut next = |version, as_drafts| {
        let changed = updates(200..600, version);
        let committed = write_next(&store, &mut lease, &mut versions, &changed, as_drafts);
        assert_holds(&CapsuleReader::open_latest(&store).unwrap(), &versions);
        committed
    };
    assert_differences(&next(1, false), 400);
    // The differences are kept, too: they tell where in their base a page was.
    assert_eq!(kept().len(), 2);
    assert_differences(&next(2, true), 400);

    for path in kept() {
        let mut content = fs::read(&path).unwrap();
        for at in (0..content.len()).step_by(1000) {
            content[at] ^= 1;
        }
        fs::write(&path, content).unwrap();
    }
    assert_eq!(next(3, false).new_frames.delta.pages, 0);
    // What was stored whole is the next base.
    assert_differences(&next(4, false), 400);
    fs::remove_dir_all(&packs).unwrap();
    assert_eq!(next(5, true).new_frames.delta.pages, 0);
}

#[test]
fn a_last_capsule_keeps_nothing_on_the_node() {
    let folder = tempfile::tempdir().unwrap();
    let packs = folder.path().join("packs");
    let store = open_remote(&Arc::new(InMemory::new()), &packs);
    let mut lease = take_epoch(&store);
    let mut writer = CapsuleWriter::new(&store).unwrap().as_last();
    for (runs, bytes) in batches(full(300).iter()) {
        writer.pages(PageBatch { spaces: [SPACE].into(), runs, bytes }).unwrap();
    }
    writer.commit(&mut lease, &records(), facts()).unwrap();
    assert_eq!(fs::read_dir(&packs).unwrap().count(), 0);
    assert_holds(&CapsuleReader::open_latest(&store).unwrap(), &full(300));
}

/// Makes another capsule of one with a single segment, whose frames `change` changes; the indices are the segment's.
fn changed_map(
    folder: &Path,
    store: &Store,
    digest: Digest,
    change: impl Fn(&mut Vec<MapFrame>, &mut Vec<MapRun>),
) -> Digest {
    let put = |content: Vec<u8>| {
        let blob = BlobRef::to(&content);
        fs::write(folder.join("blobs/sha256").join(blob.digest.hex()), content).unwrap();
        blob
    };
    let reader = CapsuleReader::open_digest(store, digest).unwrap();
    let blob = reader.manifest().maps[&SPACE][0].digest.hex();
    let content = fs::read(folder.join("blobs/sha256").join(blob)).unwrap();
    let segment = Segment::decode(&content).unwrap();
    let (mut frames, mut runs) = (segment.frames().to_vec(), segment.runs().to_vec());
    change(&mut frames, &mut runs);
    let mut map = MapBuilder::default();
    for pack in segment.packs() {
        let number = map.add_pack();
        map.set_pack(number, *pack);
    }
    for frame in frames {
        map.add_frame(frame);
    }
    for run in runs {
        let pages = PageRun { first: run.first, count: run.count.into() };
        map.add_run(SPACE, pages, run.frame, run.page).unwrap();
    }
    let mut segments = Vec::new();
    map.complete()
        .unwrap()
        .emit(|_, segment| -> Result<(), ()> {
            segments.push(put(segment.encode().unwrap()));
            Ok(())
        })
        .unwrap();
    let manifest =
        Manifest { maps: BTreeMap::from([(SPACE, segments)]), ..reader.manifest().clone() };
    put(manifest.encode().unwrap()).digest
}

/// Whoever can write a map must not get pages that never were, nor make a reader fall.
#[test]
fn maps_that_name_wrong_bases_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let (digest, versions) = generations(&store).remove(1);
    let same = changed_map(folder.path(), &store, digest, |_, _| ());
    assert_holds(&CapsuleReader::open_digest(&store, same).unwrap(), &versions);
    let check = |text: &str, change: &dyn Fn(&mut Vec<MapFrame>)| {
        let digest = changed_map(folder.path(), &store, digest, |frames, _| change(frames));
        let reader = CapsuleReader::open_digest(&store, digest).unwrap();
        let error = read_pages(&reader, &[SPACE]).unwrap_err();
        assert!(chain(&error).contains(text), "{}", chain(&error));
        let faults = reader.verify(&|_, _| ()).faults;
        assert!(!faults.is_empty(), "{text}");
    };
    let delta = |frames: &[MapFrame]| frames.iter().position(|frame| frame.base.is_some()).unwrap();
    let other = |frames: &[MapFrame]| {
        let named = frames[delta(frames)].base.unwrap() as usize;
        (0..delta(frames)).find(|index| frames[*index].base.is_none() && *index != named).unwrap()
    };
    check("belongs to the base", &|frames| {
        let index = delta(frames);
        frames[index].base = Some(u32::try_from(other(frames)).unwrap());
    });
    // The right base, which is said to be shorter than it is.
    check("bytes", &|frames| {
        let base = frames[delta(frames)].base.unwrap() as usize;
        frames[base].pages -= 1;
    });
    // Differences that are said to be pages.
    check("is no zstd data", &|frames| {
        let index = delta(frames);
        frames[index].codec = Codec::Zstd;
        frames[index].base = None;
    });
    check("has another digest", &|frames| {
        let index = delta(frames);
        frames[index].offset += 1;
    });
    // A plain frame that is said to hold differences.
    check("out of order", &|frames| {
        let is_plain = |frame: &MapFrame| frame.base.is_none();
        let is_base = |index: usize| {
            frames.iter().any(|frame| frame.base.is_some_and(|base| base as usize == index))
        };
        let index = (1..frames.len()).rfind(|index| is_plain(&frames[*index]) && !is_base(*index));
        let index = index.unwrap();
        let base = frames[..index].iter().position(is_plain).unwrap();
        let base = u32::try_from(base).unwrap();
        frames[index].codec = Codec::Delta;
        frames[index].base = Some(base);
    });
}

/// A folder's packs are where they are: nothing is kept twice.
#[test]
fn a_folder_needs_no_copies() {
    let root = tempfile::tempdir().unwrap();
    let packs = root.path().join("packs");
    let settings = PacksSettings { folder: Some(packs.clone()), mebibytes_max: None };
    let config = StoreConfig { packs: settings, ..folder_config() };
    let location = Location::folder(&root.path().join("store")).unwrap();
    let store = Store::open(&location, &config, true).unwrap();
    generations(&store);
    assert!(!packs.exists());
}
