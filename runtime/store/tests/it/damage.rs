//! Every kind of blob, damaged in every way: it is refused with the damaged blob named, before anything is read and while it is.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use samara_capsule::digest::Digest;
use samara_store::CapsuleReader;

use crate::sample::{chain, check, check_reader, open, take_epoch, write};

type Damage = fn(&Path);

fn flip_first(path: &Path) {
    change(path, |bytes| bytes[0] ^= 1);
}

fn flip_middle(path: &Path) {
    change(path, |bytes| {
        let middle = bytes.len() / 2;
        bytes[middle] ^= 0x40;
    });
}

fn flip_last(path: &Path) {
    change(path, |bytes| *bytes.last_mut().unwrap() ^= 0x80);
}

fn truncate(path: &Path) {
    change(path, |bytes| bytes.truncate(bytes.len() / 2));
}

fn empty(path: &Path) {
    change(path, Vec::clear);
}

fn extend(path: &Path) {
    change(path, |bytes| bytes.extend_from_slice(b"more"));
}

fn miss(path: &Path) {
    fs::remove_file(path).unwrap();
}

fn change(path: &Path, change: impl Fn(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

fn blob(folder: &Path, digest: &Digest) -> PathBuf {
    folder.join("blobs/sha256").join(digest.hex())
}

/// Name and digest of each blob of a fresh capsule, with the manifest.
fn sample(folder: &Path) -> Vec<(String, Digest)> {
    let store = open(folder);
    let committed = write(&store, &mut take_epoch(&store), 1).unwrap();
    let reader = CapsuleReader::open_latest(&store).unwrap();
    let blobs = reader.manifest().blobs().map(|(kind, blob)| (kind.to_string(), blob.digest));
    let blobs: Vec<_> = blobs.chain([("manifest".into(), committed.capsule.digest)]).collect();
    let kinds: BTreeSet<_> = blobs.iter().map(|(kind, _)| kind.as_str()).collect();
    assert_eq!(
        kinds,
        BTreeSet::from(["config", "manifest", "pack", "page map", "records", "stream"])
    );
    blobs
}

fn refused(folder: &Path, what: &str, digest: &Digest) {
    let store = open(folder);
    let names_it = |text: String| {
        assert!(text.contains(&digest.hex()), "{what}: the message doesn't name {digest}: {text}");
    };
    let checked = CapsuleReader::open_latest(&store).and_then(|mut reader| reader.check());
    names_it(chain(&checked.expect_err(&format!("{what} was accepted"))));
    match check(&store, 1) {
        Err(error) => names_it(chain(&*error)),
        // Around its frames is what no reader of pages needs. What was read was right.
        Ok(()) => assert!(what.starts_with("pack, flipped "), "{what} was read"),
    }
    // Verification finds the same, unless the capsule can't even be opened.
    if let Ok(reader) = CapsuleReader::open_latest(&store) {
        let report = reader.verify(&|_, _| ());
        let texts: Vec<String> = report.faults.iter().map(|fault| chain(fault)).collect();
        assert!(texts.iter().any(|text| text.contains(&digest.hex())), "{what}: {texts:?}");
    }
}

#[test]
fn damaged_blobs_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = sample(folder.path());
    let damages: [(&str, Damage); 7] = [
        ("flipped first bit", flip_first),
        ("flipped middle bit", flip_middle),
        ("flipped last bit", flip_last),
        ("truncated", truncate),
        ("empty", empty),
        ("extended", extend),
        ("missing", miss),
    ];
    for (kind, digest) in &blobs {
        let path = blob(folder.path(), digest);
        let whole = fs::read(&path).unwrap();
        for (how, damage) in damages {
            damage(&path);
            refused(folder.path(), &format!("{kind}, {how}"), digest);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, &whole).unwrap();
        }
    }
    check(&open(folder.path()), 1).unwrap();
}

#[test]
fn swapped_blobs_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let blobs = sample(folder.path());
    for (kind, digest) in &blobs {
        for (other_kind, other) in blobs.iter().filter(|(_, other)| other != digest) {
            let path = blob(folder.path(), digest);
            let whole = fs::read(&path).unwrap();
            fs::copy(blob(folder.path(), other), &path).unwrap();
            refused(folder.path(), &format!("{kind} replaced by {other_kind}"), digest);
            fs::write(&path, &whole).unwrap();
        }
    }
    check(&open(folder.path()), 1).unwrap();
}

/// A blob that changes or goes between the check and its use must not matter, or a small capsule is read twice.
#[test]
fn what_was_checked_is_not_read_again() {
    let folder = tempfile::tempdir().unwrap();
    sample(folder.path());
    let store = open(folder.path());
    let mut reader = CapsuleReader::open_latest(&store).unwrap();
    let other = CapsuleReader::open_latest(&store).unwrap();
    reader.check().unwrap();
    fs::remove_dir_all(folder.path().join("blobs")).unwrap();
    check_reader(&reader, 1).unwrap();
    assert!(check_reader(&other, 1).is_err());
    check_reader(&other.with_kept(reader.kept()), 1).unwrap();
}

#[test]
fn damaged_slots_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    sample(folder.path());
    let slot = folder.path().join("log/00000000000000000001.json");
    let whole = fs::read(&slot).unwrap();
    for damage in [truncate, empty, flip_first, extend] {
        damage(&slot);
        let error = check(&open(folder.path()), 1).unwrap_err();
        assert!(chain(&*error).contains("00000000000000000001.json"), "{}", chain(&*error));
        fs::write(&slot, &whole).unwrap();
    }
    check(&open(folder.path()), 1).unwrap();
}
