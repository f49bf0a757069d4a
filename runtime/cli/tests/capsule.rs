//! `samara capsule` as its user calls it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, and tells what it measured")]

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Output};
use std::time::SystemTime;

use samara_capsule::cbor::encode_record;
use samara_capsule::config::{Provenance, Requirements};
use samara_capsule::transfer::{PAGE_BYTES, PageBatch, PageRun, Sink as _, SpaceId, StreamName};
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
        report: None,
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
    let count = |codec: &str| json["frames"][codec]["pages"].as_u64().unwrap();
    assert_eq!((count("raw") + count("zstd"), count("delta")), (2, 0));

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

/// An address with a capsule for each of `pages`: so many pages of one process, in which the first is always the same.
fn write_history(folder: &Path, pages: &[u64]) {
    let store =
        Store::open(&Location::folder(folder).unwrap(), &StoreConfig::default(), true).unwrap();
    let mut lease = store.take_epoch(&BTreeMap::new()).unwrap().lease;
    for (number, count) in pages.iter().enumerate() {
        let mut writer = CapsuleWriter::new(&store).unwrap();
        let fill = u8::try_from(number + 1).unwrap();
        for (space, count, fill) in [(0, 4, 7), (1, *count, fill)] {
            let runs = vec![PageRun { first: 16, count }];
            let bytes = vec![fill; usize::try_from(count).unwrap() * PAGE_BYTES];
            writer.pages(PageBatch { spaces: [SpaceId(space)].into(), runs, bytes }).unwrap();
        }
        let mut layer = tar::Builder::new(Vec::new());
        for name in ["same", &format!("only-{number}")] {
            let mut header = tar::Header::new_ustar();
            header.set_size(3);
            layer.append_data(&mut header, name, b"abc".as_slice()).unwrap();
        }
        writer.append(&StreamName("root".into()), &layer.into_inner().unwrap()).unwrap();
        let facts = CapsuleFacts {
            created: SystemTime::UNIX_EPOCH,
            parent: None,
            provenance: Provenance::default(),
            requirements: Requirements::default(),
            report: None,
        };
        let process = |pid: u64, space: u64| {
            BTreeMap::from([("pid", pid), ("space", space), ("umask", 18 + number as u64 * pid)])
        };
        let record = BTreeMap::from([("processes", vec![process(0, 0), process(17, 1)])]);
        writer.commit(&mut lease, &encode_record(&record).unwrap(), facts).unwrap();
    }
}

fn json(args: &[&str]) -> Value {
    serde_json::from_str(&good(&[&["--json", "capsule"], args].concat())).unwrap()
}

/// Users would not see what an address costs, or remove what they want to keep.
#[test]
fn an_address_is_looked_through_and_collected() {
    let root = tempfile::tempdir().unwrap();
    let url = format!("file://{}", root.path().display());
    write_history(root.path(), &[2, 2, 5]);

    let history = json(&["history", &url]);
    let digests: Vec<&str> =
        history.as_array().unwrap().iter().map(|row| row["digest"].as_str().unwrap()).collect();
    assert_eq!(digests.len(), 3);
    assert_eq!(history[2]["latest"], true);
    assert_eq!(history[1]["latest"], false);
    assert_eq!(history[0]["epoch"], 1);
    assert!(history[0]["new_bytes"].as_u64() > history[0]["stored_bytes"].as_u64());
    let text = good(&["capsule", "history", &url]);
    let lines: Vec<&str> = text.lines().collect();
    assert!(lines[0].starts_with("COMMITTED") && lines[0].ends_with("STATE"), "{text}");
    assert!(lines[3].ends_with("newest"), "{text}");
    assert!(lines[3].contains(&digests[2]["sha256:".len()..][..12]), "{text}");

    let usage = json(&["du", &url]);
    assert_eq!(usage["unreferenced_bytes"], 0);
    let sum = |name: &str| -> u64 {
        let rows = usage["capsules"].as_array().unwrap().iter();
        rows.map(|row| row[name].as_u64().unwrap()).sum()
    };
    assert!(sum("alone_bytes") > 0);
    assert!(sum("alone_bytes") <= usage["total_bytes"].as_u64().unwrap());
    std::fs::write(root.path().join("blobs/sha256").join("0".repeat(64)), "left").unwrap();
    let text = good(&["capsule", "du", &url]);
    assert!(text.contains("of which 4 B in 1 blobs belong to no capsule"), "{text}");

    let told = json(&["gc", &url, "--keep-last", "2", "--dry-run"]);
    assert_eq!(told["dropped"][0]["digest"], digests[0]);
    assert_eq!(told["young_bytes"], 4);
    assert_eq!(json(&["history", &url]), history);
    assert!(good(&["capsule", "gc", &url]).contains("removed 0 capsules"));
    assert!(good(&["capsule", "gc", &url, "--keep-within", "1h"]).contains("removed 0 capsules"));
    let text = good(&["capsule", "gc", &url, "--keep-last", "2"]);
    assert!(text.contains("removed 1 capsules") && text.contains("2 capsules are kept"), "{text}");
    assert_eq!(json(&["history", &url]).as_array().unwrap().len(), 2);
    assert!(good(&["capsule", "verify", &url]).contains("is whole"));
    let gone = bad(&["capsule", "diff", &url, "--from", digests[0]], 1);
    assert!(gone.contains("has no capsule sha256:"), "{gone}");
    good(&["capsule", "gc", &url, "--keep-last", "1"]);
    let few = bad(&["capsule", "diff", &url], 1);
    assert!(few.contains("has 1 capsules; a comparison takes two"), "{few}");
}

/// What a save cost could not be explained.
#[test]
fn two_capsules_are_compared() {
    let root = tempfile::tempdir().unwrap();
    let url = format!("file://{}", root.path().display());
    write_history(root.path(), &[2, 5]);
    let diff = json(&["diff", &url]);
    let memory = |owner: &str| {
        let rows = diff["memory"].as_array().unwrap();
        rows.iter().find(|row| row["owner"] == owner).unwrap_or_else(|| panic!("{diff}")).clone()
    };
    // Both processes' pages lie in one frame, which differs: they were stored anew.
    assert_eq!(memory("process 17")["added_pages"], 3);
    assert_eq!(memory("process 17")["changed_pages"], 2);
    assert_eq!(memory("process 17")["bytes"], 5 * 4096);
    assert_eq!(memory("process 0")["added_pages"], 0);
    assert_eq!(diff["records"].as_array().unwrap().len(), 1);
    assert_eq!(diff["records"][0]["path"], "processes[pid 17].umask");
    assert_eq!(diff["records"][0]["from"], 18);
    assert_eq!(diff["records"][0]["to"], 35);
    let files: Vec<_> = diff["files"].as_array().unwrap().iter().collect();
    assert_eq!(files.len(), 2);
    assert_eq!((&files[0]["path"], &files[0]["change"]), (&"only-0".into(), &"removed".into()));
    assert_eq!((&files[1]["path"], &files[1]["change"]), (&"only-1".into(), &"added".into()));

    let history = json(&["history", &url]);
    let digest = |row: usize| history[row]["digest"].as_str().unwrap().to_owned();
    let same = json(&["diff", &url, "--from", &digest(1), "--to", &digest(1)]);
    assert_eq!(same["records"].as_array().unwrap().len(), 0);
    assert_eq!(same["memory"][0]["changed_pages"], 0);
    assert_eq!(same["memory"][0]["unchanged_pages"], 4);
    let text = good(&["capsule", "diff", &url, "--from", &digest(1), "--to", &digest(0)]);
    for part in
        ["- only-1 (file, 3 B)", "~ processes[pid 17].umask 35 -> 18", "process 17", "stored anew"]
    {
        assert!(text.contains(part), "{part} is not in {text}");
    }
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
    for verb in ["rm", "history", "du", "gc", "diff"] {
        let expected =
            if verb == "diff" { "has 0 capsules; a comparison" } else { "there is no capsule at" };
        check(&["capsule", verb, &url], expected);
    }
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
    for wrong in [["--keep-last", "0"], ["--keep-within", "soon"]] {
        let output = samara(&[&["capsule", "gc", &url], wrong.as_slice()].concat());
        assert_eq!(output.status.code(), Some(2));
        let errors = String::from_utf8(output.stderr).unwrap();
        assert!(errors.contains(wrong[1]), "{errors}");
    }
    assert_eq!(samara(&["capsule", "inspect", &url, "--digest", "x"]).status.code(), Some(2));
}
