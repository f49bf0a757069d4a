//! `samara capsule` as its user calls it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, and tells what it measured")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};
use std::time::SystemTime;

use samara_capsule::cbor::encode_record;
use samara_capsule::config::{Provenance, Requirements};
use samara_capsule::transfer::{PAGE_BYTES, PageBatch, PageRun, Sink as _, SpaceId};
use samara_store::config::StoreConfig;
use samara_store::writer::CapsuleFacts;
use samara_store::{CapsuleWriter, Location, Store};
use serde_json::Value;

fn write(folder: &Path) {
    let store =
        Store::open(&Location::folder(folder).unwrap(), &StoreConfig::default(), true).unwrap();
    let mut lease = store.take_epoch(&BTreeMap::new()).unwrap().lease;
    let mut writer = CapsuleWriter::new(&store).unwrap();
    let runs = vec![PageRun { first: 16, count: 2 }];
    writer
        .pages(PageBatch { spaces: [SpaceId(0)].into(), runs, bytes: vec![7; 2 * PAGE_BYTES] })
        .unwrap();
    let facts = CapsuleFacts {
        created: SystemTime::UNIX_EPOCH,
        parent: None,
        provenance: Provenance {
            producer: "test 1".into(),
            workload: BTreeMap::from([("image".into(), "bwa".into())]),
        },
        requirements: Requirements { architecture: "x86_64".into(), ..Requirements::default() },
    };
    let record = BTreeMap::from([("processes", vec![BTreeMap::from([("pid", 17)])])]);
    writer.commit(&mut lease, &encode_record(&record).unwrap(), facts).unwrap();
}

fn samara(args: &[&str]) -> Output {
    let config = tempfile::NamedTempFile::new().unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_samara"))
        .args(args)
        .arg("--config")
        .arg(config.path())
        .output();
    output.unwrap()
}

fn good(args: &[&str]) -> String {
    let output = samara(args);
    let errors = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{args:?}: {errors}");
    assert_eq!(errors, "", "{args:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The one line that tells what went wrong.
fn bad(args: &[&str], status: i32) -> String {
    let output = samara(args);
    assert_eq!(output.status.code(), Some(status), "{args:?}");
    let errors = String::from_utf8(output.stderr).unwrap();
    assert_eq!(errors.lines().count(), 1, "{errors}");
    errors
}

#[test]
fn a_capsule_from_list_to_removal() {
    let root = tempfile::tempdir().unwrap();
    let root_url = format!("file://{}", root.path().display());
    let url = format!("{root_url}/jobs/42");
    let copy_url = format!("{root_url}/jobs/43");
    let layout = root.path().join("layout").display().to_string();
    write(&root.path().join("jobs/42"));

    let list = good(&["capsule", "ls", &root_url]);
    assert_eq!(list.lines().count(), 2);
    assert!(
        list.lines().nth(1).unwrap().starts_with(&format!("{url}  capsule  1970-01-01T00:00:00Z")),
        "{list}"
    );

    let text = good(&["capsule", "inspect", &url]);
    for part in ["x86_64", "image bwa", "processes", "pid 17", "page map"] {
        assert!(text.contains(part), "{part} is not in {text}");
    }
    let json: Value = serde_json::from_str(&good(&["--json", "capsule", "inspect", &url])).unwrap();
    assert_eq!(json["records"]["processes"][0]["pid"], 17);
    assert_eq!(json["config"]["statistics"]["pages"], 2);

    assert!(good(&["capsule", "verify", &url]).contains("is whole"));
    assert!(good(&["capsule", "export", &url, &layout]).contains("exported"));
    assert!(good(&["capsule", "import", &layout, &copy_url]).contains("imported"));
    let json: Value = serde_json::from_str(&good(&["capsule", "ls", &root_url, "--json"])).unwrap();
    assert_eq!(json[0]["capsule"]["digest"], json[1]["capsule"]["digest"]);

    assert!(good(&["capsule", "rm", &url]).contains("removed"));
    assert!(good(&["capsule", "rm", &copy_url, "--json"]).contains("objects"));
    assert_eq!(good(&["capsule", "ls", &root_url]).lines().count(), 1);
}

#[test]
fn damage_is_reported_and_fails() {
    let root = tempfile::tempdir().unwrap();
    let url = format!("file://{}", root.path().display());
    write(root.path());
    let json: Value = serde_json::from_str(&good(&["capsule", "inspect", &url, "--json"])).unwrap();
    let digest = json["digest"].as_str().unwrap().to_owned();
    let manifest = root.path().join("blobs/sha256").join(digest.strip_prefix("sha256:").unwrap());
    let manifest: Value = serde_json::from_slice(&std::fs::read(manifest).unwrap()).unwrap();
    let pack = manifest["layers"].as_array().unwrap().last().unwrap()["digest"]
        .as_str()
        .unwrap()
        .to_owned();
    std::fs::write(
        root.path().join("blobs/sha256").join(pack.strip_prefix("sha256:").unwrap()),
        "x",
    )
    .unwrap();

    assert!(bad(&["capsule", "verify", &url], 1).contains("1 of its parts"));
    let output = samara(&["capsule", "verify", &url, "--json", "--digest", &digest]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["whole"], false);
    assert!(report["faults"][0].as_str().unwrap().contains(pack.strip_prefix("sha256:").unwrap()));
}

#[test]
fn mistakes_get_one_clear_line() {
    let root = tempfile::tempdir().unwrap();
    let url = format!("file://{}", root.path().display());
    let check = |args: &[&str], expected: &str| {
        let line = bad(args, 1);
        assert!(line.starts_with("samara: ") && line.contains(expected), "{line}");
    };
    check(&["capsule", "ls", "jobs"], "is no capsule address; use file:///dir, s3://bucket/path");
    check(&["capsule", "ls", "s3://"], "names no bucket; write s3://bucket/path");
    check(&["capsule", "ls", "file://x/y"], "write file:///dir");
    check(&["capsule", "inspect", &url], "there is no capsule at");
    check(&["capsule", "rm", &url], "there is no capsule at");
    check(&["capsule", "ls", &format!("{url}/none")], "none is not there");
    check(
        &["capsule", "import", &root.path().display().to_string(), &url],
        "is no OCI image layout",
    );
    check(&["capsule", "import", "/nowhere", &url], "is no OCI image layout");
    write(root.path());
    check(&["capsule", "export", &url, &root.path().display().to_string()], "is not empty");
    let none = format!("sha256:{}", "0".repeat(64));
    check(&["capsule", "inspect", &url, "--digest", &none], "is not there");
    assert_eq!(samara(&["capsule"]).status.code(), Some(2));
    assert_eq!(samara(&["capsule", "inspect", &url, "--digest", "x"]).status.code(), Some(2));
}
