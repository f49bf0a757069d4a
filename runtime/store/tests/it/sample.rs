//! A small capsule with a blob of every kind, and reading all of it.

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::io::{self, Read as _};
use std::path::Path;
use std::sync::Mutex;
use std::time::SystemTime;

use samara_capsule::cbor::encode_record;
use samara_capsule::config::{Provenance, Requirements};
use samara_capsule::transfer::{
    PAGE_BYTES, PageBatch, PageRun, Place, Sink as _, Source as _, SpaceId, StreamName,
};
use samara_store::config::StoreConfig;
use samara_store::writer::{CapsuleFacts, Committed, WriteError};
use samara_store::{CapsuleReader, CapsuleWriter, Lease, Location, Store};

pub(crate) fn facts() -> CapsuleFacts {
    CapsuleFacts {
        created: SystemTime::UNIX_EPOCH,
        parent: None,
        provenance: Provenance { producer: "test".into(), workload: BTreeMap::new() },
        requirements: Requirements { architecture: "x86_64".into(), ..Requirements::default() },
        report: None,
    }
}

pub(crate) fn folder_config() -> StoreConfig {
    let mut config = StoreConfig::default();
    config.file.sync = false;
    config
}

pub(crate) fn open(folder: &Path) -> Store {
    Store::open(&Location::folder(folder).unwrap(), &folder_config(), true).unwrap()
}

pub(crate) fn take_epoch(store: &Store) -> Lease {
    store.take_epoch(&BTreeMap::new()).unwrap().lease
}

pub(crate) fn name(text: &str) -> StreamName {
    StreamName(text.into())
}

/// The content of a page, in part repetitive.
pub(crate) fn page(space: u32, number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ u64::from(space);
    let mut page = Vec::with_capacity(PAGE_BYTES);
    while page.len() < PAGE_BYTES {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let word = if page.len() < PAGE_BYTES / 3 { state } else { number };
        page.extend_from_slice(&word.to_le_bytes());
    }
    page
}

pub(crate) fn batch(space: u32, runs: &[(u64, u64)]) -> PageBatch {
    let numbers = runs.iter().flat_map(|&(first, count)| first..first + count);
    let bytes = numbers.flat_map(|number| page(space, number)).collect();
    let runs = runs.iter().map(|&(first, count)| PageRun { first, count }).collect();
    PageBatch { spaces: [SpaceId(space)].into(), runs, bytes }
}

/// Passes the pages of a small capsule to a writer; `seed` makes them differ from others.
pub(crate) fn fill(writer: &mut CapsuleWriter, seed: u64) -> io::Result<()> {
    writer.pages(batch(0, &[(seed * 10_000, 200), (seed * 10_000 + 500, 1)]))?;
    writer.pages(batch(1, &[(7, 3)]))?;
    writer.append(&name("root"), format!("layer {seed}").repeat(1000).as_bytes())
}

pub(crate) fn write(store: &Store, lease: &mut Lease, seed: u64) -> Result<Committed, WriteError> {
    let mut writer = CapsuleWriter::new(store)?;
    fill(&mut writer, seed).unwrap();
    writer.commit(lease, &encode_record(&("record", seed)).unwrap(), facts())
}

pub(crate) type Pages = HashMap<(SpaceId, u64), Vec<u8>>;

pub(crate) fn read_pages(reader: &CapsuleReader, spaces: &[SpaceId]) -> io::Result<Pages> {
    collect_pages(|place| reader.transfer(spaces, place))
}

/// The pages that a transfer places.
pub(crate) fn collect_pages(
    transfer: impl FnOnce(&Place<'_>) -> io::Result<()>,
) -> io::Result<Pages> {
    let pages = Mutex::new(HashMap::new());
    transfer(&|space, runs, bytes| {
        let numbers = runs.iter().flat_map(|run| run.first..run.first + run.count);
        let mut pages = pages.lock().unwrap();
        let (bytes, rest) = bytes.as_chunks::<PAGE_BYTES>();
        assert!(rest.is_empty());
        assert_eq!(numbers.clone().count(), bytes.len());
        for (number, bytes) in numbers.zip(bytes) {
            assert!(
                pages.insert((space, number), bytes.to_vec()).is_none(),
                "{space} page {number} came twice"
            );
        }
        Ok(())
    })?;
    Ok(pages.into_inner().unwrap())
}

/// Reads the newest capsule, every part of it, and checks that it is what [`write`] wrote with `seed`.
pub(crate) fn check(store: &Store, seed: u64) -> Result<(), Box<dyn Error + Send + Sync>> {
    check_reader(&CapsuleReader::open_latest(store)?, seed)
}

/// Like [`check`], for a capsule that is open.
pub(crate) fn check_reader(
    reader: &CapsuleReader,
    seed: u64,
) -> Result<(), Box<dyn Error + Send + Sync>> {
    let pages = read_pages(reader, &reader.spaces())?;
    let first = seed * 10_000;
    let numbers = (first..first + 200)
        .chain([first + 500])
        .map(|number| (0, number))
        .chain((7..10).map(|n| (1, n)));
    let wanted: Pages =
        numbers.map(|(space, number)| ((SpaceId(space), number), page(space, number))).collect();
    assert!(pages == wanted);
    let mut layer = Vec::new();
    reader.stream(&name("root"))?.expect("the stream is there").read_to_end(&mut layer)?;
    assert!(layer == format!("layer {seed}").repeat(1000).as_bytes());
    assert_eq!(reader.records()?, encode_record(&("record", seed)).unwrap());
    Ok(())
}

/// An error with its causes, as the user would see it.
pub(crate) fn chain(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(error) = next {
        text = format!("{text}: {error}");
        next = error.source();
    }
    text
}
