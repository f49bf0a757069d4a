//! Segments of streams: stored by themselves, named again by later capsules, and none of them where nobody placed it.

use std::collections::HashSet;
use std::io::Read as _;
use std::time::SystemTime;

use samara_capsule::cbor::encode_record;
use samara_capsule::digest::Digest;
use samara_capsule::manifest::BlobRef;
use samara_capsule::transfer::{BATCH_BYTES_MAX, SegmentId, Sink as _, Source as _, StoredSegment};
use samara_store::collect::CollectOptions;
use samara_store::{CapsuleReader, CapsuleWriter, Retention, Store};

use crate::sample::{facts, name, open, page, take_epoch};

/// Content that takes `kib` KiB and can't be compressed well.
fn content(seed: u64, kib: u64) -> Vec<u8> {
    (0..kib).flat_map(|number| page(3, seed * 100_000 + number)[..1024].to_vec()).collect()
}

fn records(text: &str) -> Vec<u8> {
    encode_record(&text).unwrap()
}

fn parts(bytes: &[u8]) -> Vec<Vec<u8>> {
    bytes.chunks(BATCH_BYTES_MAX).map(<[u8]>::to_vec).collect()
}

#[track_caller]
fn check_stream(store: &Store, stream: &str, expected: &[&[u8]]) {
    let reader = CapsuleReader::open_latest(store).unwrap();
    let mut back = Vec::new();
    reader.stream(&name(stream)).unwrap().unwrap().read_to_end(&mut back).unwrap();
    assert!(back == expected.concat(), "{stream}: {} bytes", back.len());
    let faults = reader.verify(&|_, _| {}).faults;
    assert!(faults.is_empty(), "{faults:?}");
}

/// Without this a segment would come back in another place, twice, or from a draft that is not the file's any more.
#[test]
fn a_stream_is_what_was_placed_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    let (large, small, draft) = (content(1, 7000), content(2, 3), content(3, 2000));
    let mut writer = CapsuleWriter::new(&store).unwrap();
    let abandoned = writer.segment(parts(&draft)).unwrap();
    let first = writer.segment(parts(&large)).unwrap();
    let second = writer.segment(parts(&small)).unwrap();
    for (stream, segment) in [("a", second), ("b", first), ("a", first), ("a", second)] {
        writer.place(&name(stream), segment).unwrap();
    }
    writer.append(&name("a"), b"appended, ").unwrap();
    writer.append(&name("a"), b"in two calls").unwrap();
    writer.place(&name("a"), second).unwrap();
    let committed = writer.commit(&mut lease, &records("one"), facts()).unwrap();
    check_stream(&store, "a", &[&small, &large, &small, b"appended, ", b"in two calls", &small]);
    check_stream(&store, "b", &[&large]);
    let raw = large.len() * 2 + small.len() * 3 + 22 + records("one").len();
    assert_eq!(committed.raw_bytes, raw as u64);
    // What was uploaded in vain was uploaded, and is named by nobody.
    assert!(committed.uploaded_bytes > committed.stored_bytes);
    let mut known: Vec<SegmentId> = committed.segments.keys().copied().collect();
    known.sort();
    assert_eq!(known, [first, second]);
    assert!(!known.contains(&abandoned));
}

/// Without this an unchanged file would be uploaded again, or a capsule name what is not at its address.
#[test]
fn the_next_capsule_names_what_its_parent_has() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    let (large, small) = (content(1, 5000), content(2, 30));
    let mut writer = CapsuleWriter::new(&store).unwrap();
    let segment = writer.segment(parts(&large)).unwrap();
    writer.place(&name("root"), segment).unwrap();
    let first = writer.commit(&mut lease, &records("one"), facts()).unwrap();
    let stored = first.segments[&segment];

    let parent = || CapsuleReader::open_latest(&store).unwrap();
    let mut writer = CapsuleWriter::after(parent()).unwrap();
    let absent =
        StoredSegment { blob: BlobRef { digest: Digest::of(b"no"), bytes: 2 }, raw_bytes: 2 };
    assert_eq!(writer.stored_segment(&absent).unwrap(), None);
    let known = writer.stored_segment(&stored).unwrap().unwrap();
    let new = writer.segment(parts(&small)).unwrap();
    writer.place(&name("root"), new).unwrap();
    writer.place(&name("root"), known).unwrap();
    let second = writer.commit(&mut lease, &records("one"), facts()).unwrap();
    check_stream(&store, "root", &[&small, &large]);
    assert!(second.uploaded_bytes < 40 << 10, "{} bytes", second.uploaded_bytes);
    assert!(second.stored_bytes > first.stored_bytes);
    assert_eq!(second.segments[&known], stored);

    // Passed again, by a writer that knows of no parent: the same blob, and no upload.
    let mut writer = CapsuleWriter::new(&store).unwrap();
    assert_eq!(writer.stored_segment(&stored).unwrap(), None);
    writer.append(&name("other"), b"between the others").unwrap();
    let again = writer.segment(parts(&large)).unwrap();
    writer.place(&name("root"), again).unwrap();
    let third = writer.commit(&mut lease, &records("one"), facts()).unwrap();
    assert_eq!(third.segments[&again], stored);
    assert!(third.uploaded_bytes < 40 << 10, "{} bytes", third.uploaded_bytes);
    check_stream(&store, "root", &[&large]);
}

/// Without this, blobs of captures that failed would stay for ever, or those go that later capsules name.
#[test]
fn collections_tell_drafts_from_what_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    let (large, draft) = (content(1, 5000), content(3, 2000));
    let mut writer = CapsuleWriter::new(&store).unwrap();
    let segment = writer.segment(parts(&large)).unwrap();
    writer.segment(parts(&draft)).unwrap();
    writer.place(&name("root"), segment).unwrap();
    let stored = writer.commit(&mut lease, &records("one"), facts()).unwrap().segments[&segment];
    let mut writer = CapsuleWriter::new(&store).unwrap();
    writer.segment(parts(&content(4, 2000))).unwrap();
    writer.settle().unwrap();
    writer.abort();

    let mut writer = CapsuleWriter::after(CapsuleReader::open_latest(&store).unwrap()).unwrap();
    let known = writer.stored_segment(&stored).unwrap().unwrap();
    writer.place(&name("root"), known).unwrap();
    writer.commit(&mut lease, &records("another one"), facts()).unwrap();
    let retention: Retention = "last=1".parse().unwrap();
    let options = CollectOptions { grace: std::time::Duration::ZERO, ..CollectOptions::default() };
    let later = SystemTime::now() + std::time::Duration::from_secs(3600 * 24 * 30);
    store.collect(&retention, later, &options, &|_, _| {}).unwrap();
    check_stream(&store, "root", &[&large]);
    let reader = CapsuleReader::open_latest(&store).unwrap();
    let named: HashSet<String> =
        reader.manifest().blobs().map(|(_, blob)| blob.digest.hex()).collect();
    let blobs = std::fs::read_dir(folder.path().join("blobs/sha256")).unwrap();
    let large_blobs: Vec<String> = blobs
        .map(|entry| entry.unwrap())
        .filter(|entry| entry.metadata().unwrap().len() > 100_000)
        .map(|entry| entry.file_name().into_string().unwrap())
        .collect();
    assert!(
        large_blobs.iter().all(|blob| named.contains(blob)),
        "drafts are left: {large_blobs:?}"
    );
}

#[test]
fn segments_that_can_not_be_one_blob_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    for wrong in [
        vec![],
        vec![Vec::new()],
        vec![vec![1; BATCH_BYTES_MAX + 1]],
        vec![vec![1; BATCH_BYTES_MAX]; 9],
    ] {
        let mut writer = CapsuleWriter::new(&store).unwrap();
        assert!(writer.segment(wrong).is_err());
        assert!(writer.commit(&mut take_epoch(&store), b"", facts()).is_err());
    }
    let mut writer = CapsuleWriter::new(&store).unwrap();
    assert!(writer.place(&name("root"), SegmentId(0)).is_err());
}
