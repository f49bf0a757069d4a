//! What is written comes back: pages of several spaces, zero pages, streams and records.

use std::collections::{BTreeMap, HashMap};
use std::io::Read as _;

use samara_capsule::transfer::{
    BATCH_BYTES_MAX, PAGE_BYTES, PageBatch, PageRun, Sink as _, Source as _, SpaceId,
};
use samara_store::config::StoreConfig;
use samara_store::{CapsuleReader, CapsuleWriter, Location, Store};

use crate::sample::{
    batch, collect_pages, facts, folder_config, name, open, page, read_pages, take_epoch,
};

#[test]
fn everything_comes_back() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    everything_comes_back_from(&store, &open(folder.path()));
}

/// First and count of pages that two spaces have in common.
const COMMON: (u64, u64) = (2_000_000, 100);

/// Writes through one handle and reads through another.
pub(crate) fn everything_comes_back_from(store: &Store, other: &Store) {
    let mut lease = take_epoch(store);
    let mut writer = CapsuleWriter::new(store).unwrap();

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
        spaces: [SpaceId(space)].into(),
        runs: vec![PageRun { first: 1_000_000, count: 2 }],
        bytes: vec![0; 2 * PAGE_BYTES],
    };
    writer.pages(zeros(0)).unwrap();
    writer.exact_pages(zeros(5)).unwrap();
    for number in [1_000_000, 1_000_001] {
        wanted.insert((SpaceId(5), number), vec![0; PAGE_BYTES]);
    }

    // Pages that spaces have in common, beside some of their own.
    let common = PageBatch { spaces: [SpaceId(0), SpaceId(5)].into(), ..batch(77, &[COMMON]) };
    writer.pages(common).unwrap();
    writer.pages(batch(5, &[(COMMON.0 + COMMON.1, 2)])).unwrap();
    for number in COMMON.0..COMMON.0 + COMMON.1 {
        for space in [0, 5] {
            wanted.insert((SpaceId(space), number), page(77, number));
        }
    }
    for number in [COMMON.0 + COMMON.1, COMMON.0 + COMMON.1 + 1] {
        wanted.insert((SpaceId(5), number), page(5, number));
    }

    // A layer of several parts, because most of it can't be compressed.
    let layer: Vec<u8> =
        (0..30_000u64).flat_map(|number| page(9, number)[..700].to_vec()).collect();
    for piece in layer.chunks(100_000) {
        writer.append(&name("root"), piece).unwrap();
    }
    writer.append(&name("small"), b"x").unwrap();
    writer.append(&name("none"), b"").unwrap();

    let committed = writer.commit(&mut lease, b"the records", facts()).unwrap();
    assert_eq!(committed.pages, wanted.len() as u64);
    assert_eq!(committed.zero_pages, 2);
    let others = (layer.len() + 1 + b"the records".len()) as u64;
    let once = wanted.len() as u64 - COMMON.1;
    assert_eq!(committed.raw_bytes, once * PAGE_BYTES as u64 + others);
    assert!(committed.stored_bytes < committed.raw_bytes);

    let reader = CapsuleReader::open_latest(other).unwrap();
    assert_eq!(reader.digest(), committed.capsule.digest);
    assert_eq!(reader.records().unwrap(), b"the records");
    assert_eq!(reader.spaces(), [SpaceId(0), SpaceId(5)]);
    assert!(reader.manifest().streams[&name("root")].len() > 1);
    assert!(reader.manifest().packs.len() > 1);
    assert!(read_pages(&reader, &reader.spaces()).unwrap() == wanted);
    let only = read_pages(&reader, &[SpaceId(5)]).unwrap();
    assert_eq!(only.len(), wanted.keys().filter(|(space, _)| *space == SpaceId(5)).count());
    let runs = reader.runs(SpaceId(5)).unwrap();
    assert_eq!(runs.iter().map(|run| run.count).sum::<u64>(), only.len() as u64);
    assert!(reader.runs(SpaceId(77)).unwrap().is_empty());

    // What is in common lies in the same place, and nothing else does.
    let spaces = [SpaceId(0), SpaceId(77), SpaceId(5)];
    let stored = reader.stored(&spaces).unwrap();
    let places = |index: usize| -> BTreeMap<u64, u64> {
        let runs = stored[index].iter();
        runs.flat_map(|stored| {
            (0..stored.run.count).map(|i| (stored.place + i, stored.run.first + i))
        })
        .collect()
    };
    let (first, second) = (places(0), places(2));
    assert_eq!(second.len(), only.len());
    assert!(stored[1].is_empty());
    let both = first.iter().filter(|(place, page)| second.get(place) == Some(page));
    let both: Vec<u64> = both.map(|(_, page)| *page).collect();
    assert_eq!(both, (COMMON.0..COMMON.0 + COMMON.1).collect::<Vec<_>>());
    assert_eq!(first.keys().filter(|place| second.contains_key(place)).count(), both.len());

    // Parts of spaces, cut within frames.
    let parts = [PageRun { first: 0, count: 5 }, PageRun { first: COMMON.0 + 90, count: 11 }];
    let some = [(SpaceId(5), parts.as_slice()), (SpaceId(0), &parts[1..])];
    let some = collect_pages(|place| reader.transfer_some(&some, place)).unwrap();
    let of_five = (0..5).chain(COMMON.0 + 90..COMMON.0 + 101).map(|number| (SpaceId(5), number));
    let of_first = (COMMON.0 + 90..COMMON.0 + 100).map(|number| (SpaceId(0), number));
    let numbers: Vec<_> = of_first.chain(of_five).collect();
    assert_eq!(some.len(), numbers.len());
    assert!(numbers.iter().all(|number| some.get(number) == wanted.get(number)));

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
        let config = StoreConfig { threads: Some(threads), ..folder_config() };
        let store = Store::open(&Location::folder(folder.path()).unwrap(), &config, true).unwrap();
        let mut lease = take_epoch(&store);
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
    let mut lease = take_epoch(&store);
    let mut writer = CapsuleWriter::new(&store).unwrap();
    let short = PageBatch {
        spaces: [SpaceId(0)].into(),
        runs: vec![PageRun { first: 0, count: 2 }],
        bytes: vec![1; PAGE_BYTES],
    };
    assert!(writer.pages(short).is_err());
    assert!(writer.pages(batch(0, &[(0, BATCH_BYTES_MAX as u64 / PAGE_BYTES as u64)])).is_err());
    assert!(writer.commit(&mut lease, b"", facts()).is_err());
    assert!(CapsuleReader::open_latest(&store).is_err());
}

#[test]
fn pages_out_of_order_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    let mut writer = CapsuleWriter::new(&store).unwrap();
    writer.pages(batch(0, &[(500, 256)])).unwrap();
    // The error may show in this call or in a later one, at the latest in the commit.
    let _ = writer.pages(batch(0, &[(0, 256)]));
    let refused = writer.commit(&mut lease, b"", facts()).unwrap_err();
    assert!(crate::sample::chain(&refused).contains("after pages that lie behind"), "{refused:?}");
}

#[test]
fn an_error_of_the_receiver_ends_the_transfer() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    crate::sample::write(&store, &mut take_epoch(&store), 1).unwrap();
    let reader = CapsuleReader::open_latest(&store).unwrap();
    let failed =
        reader.transfer(&reader.spaces(), &|_, _, _| Err(std::io::Error::other("no room")));
    assert_eq!(failed.unwrap_err().to_string(), "no room");
}

#[test]
fn a_default_configuration_syncs_to_disk() {
    let folder = tempfile::tempdir().unwrap();
    let store =
        Store::open(&Location::folder(folder.path()).unwrap(), &StoreConfig::default(), true)
            .unwrap();
    assert!(StoreConfig::default().file.sync);
    crate::sample::write(&store, &mut take_epoch(&store), 1).unwrap();
    crate::sample::check(&store, 1).unwrap();
}
