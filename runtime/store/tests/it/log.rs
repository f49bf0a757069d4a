//! One order of events, whoever writes: races, fencing, generations, crashes.

use std::collections::{BTreeMap, HashSet};

use samara_store::log::LogError;
use samara_store::{CapsuleReader, CapsuleWriter, Store};

use crate::sample::{chain, check, facts, fill, open, take_epoch, write};

/// Many take epochs at once: each gets one of its own, and the log has no gap.
pub(crate) fn racing_starts_get_epochs_of_their_own(stores: &[Store], rounds: usize) {
    let epochs: Vec<u64> = std::thread::scope(|scope| {
        let take = |store: &Store| -> Vec<u64> { (0..rounds).map(|_| take_epoch(store).epoch).collect() };
        let threads: Vec<_> = stores.iter().map(|store| scope.spawn(move || take(store))).collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    let total = stores.len() * rounds;
    assert_eq!(epochs.iter().collect::<HashSet<_>>().len(), total);
    assert_eq!(epochs.iter().max(), Some(&(total as u64)));
    assert_eq!(stores[0].slots().unwrap(), (0..total as u64).collect::<Vec<_>>());
}

/// Two holders of leases commit at the same moment: only the newer epoch's capsule is committed.
pub(crate) fn an_older_epoch_cannot_commit(store: &Store, other: &Store) {
    let mut old = take_epoch(store);
    write(store, &mut old, 1).unwrap();
    let mut writer = CapsuleWriter::new(store).unwrap();
    fill(&mut writer, 2).unwrap();

    let started = other.take_epoch(&BTreeMap::new()).unwrap();
    let mut new = started.lease;
    assert_eq!(started.latest, store.head().unwrap().state.latest);
    let refused = writer.commit(&mut old, b"", facts()).unwrap_err();
    assert!(refused.is_fenced(), "{refused:?}");
    assert!(chain(&refused).contains("epoch 1 can't commit: epoch 2 was taken"), "{}", chain(&refused));
    check(other, 1).unwrap();

    write(other, &mut new, 3).unwrap();
    check(store, 3).unwrap();
    assert!(store.close(&mut old).unwrap_err().is_fenced());
}

#[test]
fn starts_race() {
    let folder = tempfile::tempdir().unwrap();
    let stores: Vec<Store> = (0..4).map(|_| open(folder.path())).collect();
    racing_starts_get_epochs_of_their_own(&stores, 10);
}

#[test]
fn old_epochs_are_fenced() {
    let folder = tempfile::tempdir().unwrap();
    an_older_epoch_cannot_commit(&open(folder.path()), &open(folder.path()));
}

#[test]
fn a_lease_outlives_its_process() {
    let folder = tempfile::tempdir().unwrap();
    let text = serde_json::to_string(&take_epoch(&open(folder.path()))).unwrap();
    let mut lease = serde_json::from_str(&text).unwrap();
    write(&open(folder.path()), &mut lease, 4).unwrap();
    check(&open(folder.path()), 4).unwrap();
}

#[test]
fn success_closes_the_generation() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    write(&store, &mut lease, 1).unwrap();
    store.close(&mut lease).unwrap();
    assert!(CapsuleReader::open_latest(&store).is_err());
    let refused = write(&store, &mut lease, 2).unwrap_err();
    assert!(chain(&refused).contains("ended with success"), "{}", chain(&refused));

    let started = store.take_epoch(&BTreeMap::new()).unwrap();
    assert_eq!(started.latest, None);
    let mut lease = started.lease;
    write(&store, &mut lease, 3).unwrap();
    check(&store, 3).unwrap();
}

#[test]
fn failed_resumes_are_counted() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let committed = write(&store, &mut take_epoch(&store), 1).unwrap();
    for expected in [0, 1, 2] {
        let started = store.take_epoch(&BTreeMap::new()).unwrap();
        assert_eq!(started.failed_resumes, expected);
        assert_eq!(started.latest, Some(committed.capsule));
        let mut lease = started.lease;
        store.note_failed_resume(&mut lease, committed.capsule.digest, "exit 139\n".repeat(100).as_str()).unwrap();
    }
    write(&store, &mut take_epoch(&store), 2).unwrap();
    assert_eq!(store.head().unwrap().state.failed_resumes, 0);
}

#[test]
fn a_writer_that_ends_before_its_commit_leaves_nothing_visible() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    write(&store, &mut lease, 1).unwrap();
    let before = store.slots().unwrap();
    let mut writer = CapsuleWriter::new(&store).unwrap();
    fill(&mut writer, 2).unwrap();
    writer.abort();
    assert_eq!(store.slots().unwrap(), before);
    check(&store, 1).unwrap();
    // The next capsule is not hindered by what was left.
    write(&store, &mut lease, 2).unwrap();
    check(&store, 2).unwrap();
}

#[test]
fn a_writer_whose_address_was_removed_cannot_commit() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let mut lease = take_epoch(&store);
    write(&store, &mut lease, 1).unwrap();
    let mut writer = CapsuleWriter::new(&store).unwrap();
    fill(&mut writer, 2).unwrap();
    open(folder.path()).remove(&|_, _| ()).unwrap();
    let refused = writer.commit(&mut lease, b"", facts()).unwrap_err();
    assert!(chain(&refused).contains("was removed"), "{}", chain(&refused));
    assert!(store.slots().unwrap().is_empty());
}

#[test]
fn a_log_of_a_newer_format_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    take_epoch(&store);
    std::fs::write(folder.path().join("log/00000000000000000001.json"), r#"{"format": 2}"#).unwrap();
    for refused in [store.head().unwrap_err(), store.take_epoch(&BTreeMap::new()).unwrap_err()] {
        assert!(matches!(refused, LogError::Slot { .. }));
        assert!(chain(&refused).contains("format version 2"), "{}", chain(&refused));
    }
}
