//! What is written comes back, from a folder: pages of several spaces, zero pages, streams and records.

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;
use std::sync::Mutex;
use std::time::SystemTime;

use samara_capsule::config::{Provenance, Requirements};
use samara_capsule::transfer::{BATCH_BYTES_MAX, PAGE_BYTES, PageBatch, PageRun, Sink, Source, SpaceId, StreamName};
use samara_store::config::StoreConfig;
use samara_store::writer::CapsuleFacts;
use samara_store::{CapsuleReader, CapsuleWriter, Location, Store};

fn facts() -> CapsuleFacts {
    CapsuleFacts {
        created: SystemTime::UNIX_EPOCH,
        parent: None,
        provenance: Provenance::default(),
        requirements: Requirements { architecture: "x86_64".into(), ..Requirements::default() },
    }
}

fn open(folder: &std::path::Path) -> Store {
    let location = Location::folder(folder).unwrap();
    Store::open(&location, &StoreConfig::default(), true).unwrap()
}

/// The content of a page, in part repetitive.
fn page(space: u32, number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(space);
    let mut page = Vec::with_capacity(PAGE_BYTES);
    while page.len() < PAGE_BYTES {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let word = if page.len() < PAGE_BYTES / 3 { state } else { number };
        page.extend_from_slice(&word.to_le_bytes());
    }
    page
}

fn batch(space: u32, runs: &[(u64, u64)]) -> PageBatch {
    let bytes = runs.iter().flat_map(|&(first, count)| first..first + count).flat_map(|number| page(space, number));
    let bytes = bytes.collect();
    let runs = runs.iter().map(|&(first, count)| PageRun { first, count }).collect();
    PageBatch { space: SpaceId(space), runs, bytes }
}

fn read_pages(reader: &CapsuleReader, spaces: &[SpaceId]) -> HashMap<(SpaceId, u64), Vec<u8>> {
    let pages = Mutex::new(HashMap::new());
    reader
        .transfer(spaces, &|space, runs, bytes| {
            let numbers = runs.iter().flat_map(|run| run.first..run.first + run.count);
            let mut pages = pages.lock().unwrap();
            let (bytes, rest) = bytes.as_chunks::<PAGE_BYTES>();
            assert!(rest.is_empty());
            assert_eq!(numbers.clone().count(), bytes.len());
            for (number, bytes) in numbers.zip(bytes) {
                assert!(pages.insert((space, number), bytes.to_vec()).is_none(), "{space} page {number} came twice");
            }
            Ok(())
        })
        .unwrap();
    pages.into_inner().unwrap()
}

#[test]
fn everything_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = store.take_epoch(&BTreeMap::new()).unwrap().lease;
    let mut writer = CapsuleWriter::new(&store).unwrap();

    // Many batches of every size, from two spaces in turn.
    let mut wanted = HashMap::new();
    for round in 0..40u64 {
        for space in [0, 5] {
            let start = round * 1000;
            let runs = match round % 4 {
                0 => vec![(start, 256)],
                1 => vec![(start, 1)],
                2 => vec![(start, 3), (start + 5, 60), (start + 100, 1)],
                _ => (0..200).map(|i| (start + i * 2, 1)).collect(),
            };
            for number in runs.iter().flat_map(|&(first, count)| first..first + count) {
                wanted.insert((SpaceId(space), number), page(space, number));
            }
            writer.pages(batch(space, &runs)).unwrap();
        }
    }
    // Zeros are left out, unless they must be there.
    let zeros = |space| PageBatch {
        space: SpaceId(space),
        runs: vec![PageRun { first: 1_000_000, count: 2 }],
        bytes: vec![0; 2 * PAGE_BYTES],
    };
    writer.pages(zeros(0)).unwrap();
    writer.exact_pages(zeros(5)).unwrap();
    for number in [1_000_000, 1_000_001] {
        wanted.insert((SpaceId(5), number), vec![0; PAGE_BYTES]);
    }

    let layer: Vec<u8> = (0..30_000u64).flat_map(|number| page(9, number)[..700].to_vec()).collect();
    let name = |text: &str| StreamName(text.into());
    for piece in layer.chunks(100_000) {
        writer.append(&name("root"), piece).unwrap();
    }
    writer.append(&name("small"), b"x").unwrap();
    writer.append(&name("none"), b"").unwrap();

    let committed = writer.commit(&mut lease, b"the records", facts()).unwrap();
    assert_eq!(committed.pages, wanted.len() as u64);
    assert_eq!(committed.zero_pages, 2);
    assert!(committed.stored_bytes < committed.raw_bytes);

    let reader = CapsuleReader::open_latest(&open(folder.path())).unwrap();
    assert_eq!(reader.digest(), committed.capsule.digest);
    assert_eq!(reader.records().unwrap(), b"the records");
    assert_eq!(reader.spaces(), [SpaceId(0), SpaceId(5)]);
    assert!(read_pages(&reader, &reader.spaces()) == wanted);
    let only = read_pages(&reader, &[SpaceId(5)]);
    assert_eq!(only.len(), wanted.keys().filter(|(space, _)| *space == SpaceId(5)).count());
    let runs = reader.runs(SpaceId(5)).unwrap();
    assert_eq!(runs.iter().map(|run| run.count).sum::<u64>(), only.len() as u64);
    assert!(reader.runs(SpaceId(77)).unwrap().is_empty());

    let mut back = Vec::new();
    reader.stream(&name("root")).unwrap().unwrap().read_to_end(&mut back).unwrap();
    assert!(back == layer);
    back.clear();
    reader.stream(&name("small")).unwrap().unwrap().read_to_end(&mut back).unwrap();
    assert_eq!(back, b"x");
    assert!(reader.stream(&name("none")).unwrap().is_none());
}

#[test]
fn equal_content_is_stored_once_and_named_equally() {
    let folder = tempfile::tempdir().unwrap();
    let mut committed = Vec::new();
    for threads in [1, 2, 7] {
        let config = StoreConfig { threads: Some(threads), ..StoreConfig::default() };
        let store = Store::open(&Location::folder(folder.path()).unwrap(), &config, true).unwrap();
        let mut lease = store.take_epoch(&BTreeMap::new()).unwrap().lease;
        let mut writer = CapsuleWriter::new(&store).unwrap();
        for start in (0..8 * 256).step_by(256) {
            writer.pages(batch(0, &[(start, 256)])).unwrap();
        }
        committed.push(writer.commit(&mut lease, b"records", facts()).unwrap());
    }
    assert!(committed[0].uploaded_bytes > 0);
    assert_eq!(committed[1].uploaded_bytes, 0);
    assert_eq!(committed[2].uploaded_bytes, 0);
    assert_eq!(committed[1].stored_bytes, committed[0].stored_bytes);
}

#[test]
fn wrong_input_fails_the_writer_for_good() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = store.take_epoch(&BTreeMap::new()).unwrap().lease;
    let mut writer = CapsuleWriter::new(&store).unwrap();
    let short = PageBatch {
        space: SpaceId(0),
        runs: vec![PageRun { first: 0, count: 2 }],
        bytes: vec![1; PAGE_BYTES],
    };
    assert!(writer.pages(short).is_err());
    assert!(writer.pages(batch(0, &[(0, BATCH_BYTES_MAX as u64 / PAGE_BYTES as u64)])).is_err());
    assert!(writer.commit(&mut lease, b"", facts()).is_err());
    assert!(CapsuleReader::open_latest(&store).is_err());
}
