//! Export to an OCI image layout and back, also by way of skopeo.

use std::fs;
use std::path::Path;
use std::process::Command;

use samara_store::layout::{export, import};
use samara_store::{CapsuleReader, Store};

use crate::sample::{chain, check, open, take_epoch, write};

fn exported(root: &Path) -> Store {
    let store = open(&root.join("store"));
    write(&store, &mut take_epoch(&store), 1).unwrap();
    let reader = CapsuleReader::open_latest(&store).unwrap();
    let copied = export(&reader, &root.join("layout"), &|done, total| assert!(done <= total)).unwrap();
    assert_eq!(copied.blobs, reader.manifest().blobs().count() as u64 + 1);
    store
}

fn skopeo(args: &[&str]) -> String {
    let output = Command::new("skopeo").args(args).output().expect("skopeo is installed");
    assert!(output.status.success(), "skopeo {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn a_capsule_keeps_its_digest_through_a_layout() {
    let root = tempfile::tempdir().unwrap();
    let first = exported(root.path());
    let second = open(&root.path().join("other"));
    write(&second, &mut take_epoch(&second), 9).unwrap();
    let (capsule, _) = import(&root.path().join("layout"), &second, &|done, total| assert!(done <= total)).unwrap();
    assert_eq!(capsule.digest, first.head().unwrap().state.latest.unwrap().digest);
    check(&second, 1).unwrap();
    assert!(CapsuleReader::open_latest(&second).unwrap().verify(&|_, _| ()).faults.is_empty());
}

#[test]
fn skopeo_inspects_and_copies_a_layout() {
    let root = tempfile::tempdir().unwrap();
    exported(root.path());
    let layout = format!("oci:{}:capsule", root.path().join("layout").display());
    let copy = format!("oci:{}:copied", root.path().join("copy").display());
    assert!(skopeo(&["inspect", "--raw", &layout]).contains("application/vnd.samara.capsule.v1"));
    skopeo(&["--insecure-policy", "copy", "--preserve-digests", &layout, &copy]);

    let store = open(&root.path().join("imported"));
    import(&root.path().join("copy"), &store, &|_, _| ()).unwrap();
    check(&store, 1).unwrap();
}

#[test]
fn damaged_layouts_are_refused_and_nothing_is_visible() {
    let root = tempfile::tempdir().unwrap();
    exported(root.path());
    let layout = root.path().join("layout");
    let store = open(&root.path().join("imported"));
    let refused = |expected: &str| {
        let error = import(&layout, &store, &|_, _| ()).unwrap_err();
        assert!(chain(&error).contains(expected), "{}", chain(&error));
        assert_eq!(store.head().unwrap().state.latest, None);
    };
    for entry in fs::read_dir(layout.join("blobs/sha256")).unwrap() {
        let path = entry.unwrap().path();
        let whole = fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        bytes[whole.len() / 2] ^= 1;
        fs::write(&path, &bytes).unwrap();
        refused("is damaged");
        fs::remove_file(&path).unwrap();
        refused("can't read");
        fs::write(&path, &whole).unwrap();
    }
    fs::write(layout.join("index.json"), r#"{"manifests": []}"#).unwrap();
    refused("holds 0 capsules");
    fs::write(layout.join("index.json"), "{").unwrap();
    refused("is no OCI image layout");
    fs::remove_file(layout.join("index.json")).unwrap();
    refused("is no OCI image layout");
    fs::create_dir(root.path().join("full")).unwrap();
    fs::write(root.path().join("full/x"), "").unwrap();
    let reader = CapsuleReader::open_latest(&open(&root.path().join("store"))).unwrap();
    assert!(chain(&export(&reader, &root.path().join("full"), &|_, _| ()).unwrap_err()).contains("is not empty"));
}
