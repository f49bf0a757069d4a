//! Lists, verification and removal.

use std::fs;

use samara_store::{CapsuleReader, Location, Store};

use crate::sample::{check, folder_config, open, take_epoch, write};

/// Addresses in folders of every depth are found, with what they hold, and removed one by one.
pub(crate) fn addresses_are_listed_and_removed(open: impl Fn(&str) -> Store) {
    for (index, path) in ["/a", "/deep/er/b", "/deep", "/closed"].into_iter().enumerate() {
        let store = open(path);
        let mut lease = take_epoch(&store);
        write(&store, &mut lease, index as u64).unwrap();
        if path == "/closed" {
            store.close(&mut lease).unwrap();
        }
    }
    let list = || {
        let addresses = open("").addresses().unwrap();
        let root = open("").location().to_string();
        let name = |location: &Location| location.to_string().strip_prefix(&root).unwrap().to_owned();
        addresses.into_iter().map(|a| (name(&a.location), a.capsule.map(|c| c.unwrap().config.statistics.pages)))
            .collect::<Vec<_>>()
    };
    let expect = |wanted: &[(&str, Option<u64>)]| {
        let wanted: Vec<_> = wanted.iter().map(|(path, pages)| ((*path).to_owned(), *pages)).collect();
        assert_eq!(list(), wanted);
    };
    let pages = Some(204);
    expect(&[("/a", pages), ("/closed", None), ("/deep", pages), ("/deep/er/b", pages)]);
    let removed = open("/deep").remove(&|done, total| assert!(done <= total)).unwrap();
    assert!(removed.objects > 6 && removed.bytes > 0);
    expect(&[("/a", pages), ("/closed", None), ("/deep/er/b", pages)]);
    check(&open("/deep/er/b"), 1).unwrap();
    assert!(open("/deep").remove(&|_, _| ()).is_err());
    for path in ["/a", "/closed", "/deep/er/b"] {
        open(path).remove(&|_, _| ()).unwrap();
    }
    expect(&[]);
    assert!(open("").addresses().unwrap().is_empty());
}

#[test]
fn addresses_in_folders() {
    let root = tempfile::tempdir().unwrap();
    addresses_are_listed_and_removed(|path| {
        let location = Location::folder(&root.path().join(path.trim_start_matches('/'))).unwrap();
        Store::open(&location, &folder_config(), true).unwrap()
    });
}

#[test]
fn a_capsule_that_cannot_be_read_does_not_hide_others() {
    let root = tempfile::tempdir().unwrap();
    for (name, seed) in [("a", 1), ("b", 2)] {
        let store = open(&root.path().join(name));
        write(&store, &mut take_epoch(&store), seed).unwrap();
    }
    fs::remove_dir_all(root.path().join("a/blobs")).unwrap();
    let addresses = open(root.path()).addresses().unwrap();
    assert_eq!(addresses.len(), 2);
    assert!(addresses[0].capsule.as_ref().unwrap().is_err());
    assert!(addresses[1].capsule.as_ref().unwrap().is_ok());
}

#[test]
fn an_interrupted_removal_is_completed_by_the_next() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    write(&store, &mut take_epoch(&store), 1).unwrap();
    // As if the removal had ended after its first two steps, and half of its third.
    let mut lease = take_epoch(&store);
    store.close(&mut lease).unwrap();
    fs::remove_file(root.path().join("log/00000000000000000001.json")).unwrap();
    assert!(CapsuleReader::open_latest(&store).is_err());
    store.remove(&|_, _| ()).unwrap();
    assert!(store.addresses().unwrap().is_empty());
    assert!(!root.path().join("blobs").exists());
}

#[test]
fn verification_counts_what_it_read() {
    let root = tempfile::tempdir().unwrap();
    let store = open(root.path());
    write(&store, &mut take_epoch(&store), 1).unwrap();
    let reader = CapsuleReader::open_latest(&store).unwrap();
    let report = reader.verify(&|done, total| assert!(done <= total));
    assert!(report.faults.is_empty(), "{:?}", report.faults);
    assert_eq!(report.pages, 204);
    assert_eq!(report.bytes, reader.manifest().stored_bytes());
}
