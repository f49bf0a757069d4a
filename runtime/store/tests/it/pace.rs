//! Writers whose share of the node changes while they work.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use samara_capsule::cbor::encode_record;
use samara_capsule::transfer::Sink as _;
use samara_store::pace::{Share, UploadLimit};
use samara_store::{CapsuleReader, CapsuleWriter, Store};

use crate::sample::{facts, name, open, page, take_epoch};

const SMALL: Share = Share { threads: 1, bytes: 32 << 20 };

/// Lets everything pass, and counts.
#[derive(Debug, Default)]
struct Counter {
    bytes: AtomicU64,
    is_lifted: AtomicBool,
}

impl UploadLimit for Counter {
    fn note(&self, bytes: u64) -> Duration {
        self.bytes.fetch_add(bytes, Ordering::SeqCst);
        // For ever, unless it is lifted.
        Duration::from_secs(u64::from(u32::MAX))
    }

    fn is_lifted(&self) -> bool {
        self.is_lifted.load(Ordering::SeqCst)
    }
}

fn fill(writer: &mut CapsuleWriter) {
    for number in 0..6000 {
        writer.append(&name("files"), &page(3, number)).unwrap();
    }
}

fn blobs(store: &Store) -> Vec<String> {
    let reader = CapsuleReader::open_latest(store).unwrap();
    assert!(reader.verify(&|_, _| {}).faults.is_empty());
    reader.manifest().streams.values().flatten().map(|blob| blob.digest.to_string()).collect()
}

/// Without this, a capture that gives cores back or gets more would wait for ever, or would not be what it was of.
#[test]
fn a_share_that_changes_changes_no_capsule() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let [plain, changing] = [open(folders[0].path()), open(folders[1].path())];
    let records = encode_record(&"records").unwrap();
    let mut writer = CapsuleWriter::new(&plain).unwrap();
    fill(&mut writer);
    writer.commit(&mut take_epoch(&plain), &records, facts()).unwrap();

    let mut lease = take_epoch(&changing);
    for round in 0..5 {
        let mut writer = CapsuleWriter::new(&changing.with_share(SMALL)).unwrap();
        let (pace, done) = (writer.pace(), AtomicBool::new(false));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                // Also while the writer ends.
                while !done.load(Ordering::SeqCst) {
                    pace.set_share(Share::WHOLE);
                    pace.set_share(SMALL);
                }
            });
            fill(&mut writer);
            if round < 4 {
                writer.abort();
            } else {
                writer.commit(&mut lease, &records, facts()).unwrap();
            }
            done.store(true, Ordering::SeqCst);
        });
        assert!(pace.threads().is_empty(), "they have ended");
    }
    assert_eq!(blobs(&changing), blobs(&plain));
}

/// An owner who sets a limit pays for more. And a container that stands would wait for it.
#[test]
fn every_upload_counts_and_waits_only_until_the_limit_is_lifted() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    let mut writer = CapsuleWriter::new(&store).unwrap();
    let limit = Arc::new(Counter::default());
    writer.pace().limit_uploads(limit.clone());
    let progress = writer.progress();
    let lift = limit.clone();
    let waited = std::thread::spawn(move || {
        while lift.bytes.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        let uploaded = progress.uploaded_bytes();
        lift.is_lifted.store(true, Ordering::SeqCst);
        uploaded
    });
    fill(&mut writer);
    let records = encode_record(&"records").unwrap();
    let committed = writer.commit(&mut lease, &records, facts()).unwrap();
    assert_eq!(waited.join().unwrap(), 0, "nothing was uploaded before");
    assert_eq!(limit.bytes.load(Ordering::SeqCst), committed.uploaded_bytes);
}
