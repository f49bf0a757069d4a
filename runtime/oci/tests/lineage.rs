//! Capsules that continue others: at intervals, after a restore, after a capture that failed, and when those who keep track are gone.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/site.rs"]
mod site;

use std::time::Duration;

use samara_capsule::digest::Digest;
use samara_store::CapsuleReader;
use sandbox::{SAMARA, poll};
use serde_json::json;
use site::{Site, monitors};

/// Keeps 12 MiB that nobody can compress well, and changes some pages. What of a capsule is not memory is about a megabyte: its root is no
/// overlay, and so the layer of changed files has all of it.
const PROGRAM: &str = r#"data=$(busybox head -c 9000000 /dev/urandom | busybox base64)
    length=${#data}
    while :; do n=$((n + 1)); echo $n $length > /tmp/n; busybox sleep 0.05; done"#;
const DATA_BYTES: u64 = 9 << 20;

/// The program runs on.
#[track_caller]
fn goes_on(site: &Site) {
    let said = || {
        let text = std::fs::read_to_string(site.sandbox.rootfs().join("tmp/n")).ok()?;
        let mut words = text.split_whitespace();
        let number = words.next()?.parse::<u64>().ok()?;
        // All of its data.
        (words.next()?.parse::<u64>().ok()? > DATA_BYTES).then_some(number)
    };
    let mut first = None;
    poll("the program works", || {
        let now = said();
        first = first.or(now);
        now > first
    });
}

/// The capsule that `capsule` continues, and the bytes that it had to store.
fn continued(site: &Site, capsule: Digest) -> (Option<Digest>, u64) {
    let reader = CapsuleReader::open_digest(&site.store(), capsule).unwrap();
    let parent = reader.config().parent;
    let before = parent.map(|parent| CapsuleReader::open_digest(&site.store(), parent).unwrap());
    let known: Vec<Digest> = before
        .iter()
        .flat_map(|parent| parent.manifest().blobs().map(|(_, blob)| blob.digest))
        .collect();
    let blobs = reader.manifest().blobs();
    let new = blobs.filter(|(_, blob)| !known.contains(&blob.digest)).map(|(_, blob)| blob.bytes);
    (parent, new.sum())
}

fn start(site: &Site) -> String {
    let bundle = site.sandbox.bundle("bundle", &site.spec(PROGRAM));
    let id = site.sandbox.new_id(SAMARA);
    site.ok(&["run", "-d", "-b", bundle.to_str().unwrap(), &id]);
    id
}

#[track_caller]
fn save(site: &Site, id: &str) -> Digest {
    site.ok(&["checkpoint", "--leave-running", "--capsule", &site.address(), id]);
    site.newest().unwrap()
}

/// Without this, every capsule would cost what the first one did, also after each move.
#[test]
fn a_capsule_stores_what_changed_also_after_a_restore() {
    let site = Site::new();
    let id = start(&site);
    goes_on(&site);
    let first = save(&site, &id);
    let (parent, bytes) = continued(&site, first);
    assert!(parent.is_none() && bytes > DATA_BYTES, "{bytes} bytes");
    let second = save(&site, &id);
    let (parent, bytes) = continued(&site, second);
    assert_eq!(parent, Some(first));
    assert!(bytes < DATA_BYTES / 4, "{bytes} bytes");

    site.ok(&["checkpoint", "--capsule", &site.address(), &id]);
    site.wait_until_stopped(&id);
    site.ok(&["delete", &id]);
    let last = site.newest().unwrap();
    let id = start(&site);
    goes_on(&site);
    let restored = save(&site, &id);
    let (parent, bytes) = continued(&site, restored);
    assert_eq!(
        parent,
        Some(last),
        "the capsule after a restore continues the one that it came from"
    );
    assert!(bytes < DATA_BYTES / 4, "{bytes} bytes");
    goes_on(&site);
}

/// A user who wants to know why a save took so long, or what it has cost, finds it in the capsule.
#[test]
fn a_capsule_tells_how_it_came_about() {
    const PAGE: u64 = 4096;
    let site = Site::new();
    let id = start(&site);
    goes_on(&site);
    let report = |capsule: Digest| {
        let reader = CapsuleReader::open_digest(&site.store(), capsule).unwrap();
        reader.config().report.clone().expect("a report")
    };
    let first = report(save(&site, &id));
    let names: Vec<&str> = first.phases.iter().map(|phase| phase.name.as_str()).collect();
    let all = [
        "prepare",
        "files ahead",
        "memory ahead",
        "look",
        "stop",
        "collect",
        "copy memory",
        "copy files",
        "go on",
        "store",
    ];
    assert_eq!(names, all);
    let ahead = first.memory.rounds.iter().sum::<u64>() * PAGE;
    assert!(ahead > DATA_BYTES, "nothing was tracked, and it was copied ahead: {first:?}");
    assert!(first.covering_us.is_some() && first.pause_us.is_some(), "{first:?}");
    assert!(first.store.uploads > 0 && first.frames.values().any(|frames| frames.pages > 0));
    let uploaded: u64 = first.phases.iter().map(|phase| phase.uploaded_bytes).sum();
    assert!(uploaded > DATA_BYTES, "{first:?}");

    let second = report(save(&site, &id));
    assert!(second.memory.unchanged * PAGE > DATA_BYTES, "{second:?}");
    assert_eq!(second.covering_us, None, "all of it is tracked");

    site.ok(&["checkpoint", "--capsule", &site.address(), &id]);
    assert_eq!(report(site.newest().unwrap()).pause_us, None, "it does not go on");
}

/// A large file that stays as it is, and a log that grows.
const FILES: &str = r#"busybox head -c 32000000 /dev/urandom > /tmp/large
    busybox head -c 4500000 /dev/urandom > /tmp/log
    data=$(busybox head -c 9000000 /dev/zero | busybox tr '\0' x)
    length=${#data}
    while :; do n=$((n + 1)); echo line $n >> /tmp/log; echo $n $((length + 1000000)) > /tmp/n; busybox sleep 0.05; done"#;

/// Without this, a file that nobody touches would be stored with each capsule, also after each move; or not come back as it was.
#[test]
fn files_that_stay_are_stored_once_also_after_a_restore() {
    const NEW_BYTES_MAX: u64 = 2 << 20;
    let site = Site::new();
    let bundle = site.sandbox.bundle("bundle", &site.spec(FILES));
    let run = || {
        let id = site.sandbox.new_id(SAMARA);
        site.ok(&["run", "-d", "-b", bundle.to_str().unwrap(), &id]);
        id
    };
    let id = run();
    goes_on(&site);
    let large = site.sandbox.rootfs().join("tmp/large");
    let log = site.sandbox.rootfs().join("tmp/log");
    let content = std::fs::read(&large).unwrap();
    let first = save(&site, &id);
    assert!(continued(&site, first).1 > 34 << 20);
    for _ in 0..3 {
        goes_on(&site);
        let (_, bytes) = continued(&site, save(&site, &id));
        assert!(bytes < NEW_BYTES_MAX, "{bytes} bytes");
    }
    site.ok(&["checkpoint", "--capsule", &site.address(), &id]);
    site.wait_until_stopped(&id);
    site.ok(&["delete", &id]);
    let last = site.newest().unwrap();
    let lines = std::fs::read(&log).unwrap();
    std::fs::write(&large, "another machine has nothing of it").unwrap();
    std::fs::remove_file(&log).unwrap();
    let id = run();
    goes_on(&site);
    assert!(std::fs::read(&large).unwrap() == content);
    assert!(std::fs::read(&log).unwrap().starts_with(&lines));
    for _ in 0..2 {
        let capsule = save(&site, &id);
        let (parent, bytes) = continued(&site, capsule);
        assert!(parent.is_some() && bytes < NEW_BYTES_MAX, "{bytes} bytes");
    }
    assert_ne!(site.newest(), Some(last));
    goes_on(&site);
}

/// Without this, what changed before a monitor died, or before another capsule came between, would be missing.
#[test]
fn who_has_lost_track_begins_anew() {
    let site = Site::new();
    let id = start(&site);
    goes_on(&site);
    let first = save(&site, &id);
    for (pid, _) in monitors(&id) {
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    // Not while the old one is going.
    let address = site.address();
    poll("a new monitor saves", || {
        let arguments = ["checkpoint", "--leave-running", "--capsule", &address, &id];
        site.call(&arguments).status.success()
    });
    let second = site.newest().unwrap();
    assert_eq!(continued(&site, second).0, None, "nobody knows what changed since {first}");
    let third = save(&site, &id);
    assert_eq!(continued(&site, third).0, Some(second));

    let elsewhere = format!("file://{}", site.path("elsewhere").display());
    site.ok(&["checkpoint", "--leave-running", "--capsule", &elsewhere, &id]);
    let fourth = save(&site, &id);
    assert_eq!(continued(&site, fourth).0, None, "the last capsule is at another address");
    goes_on(&site);
}

/// Without this, a capture that fails would cost the next one what changed before it, or all that it had to gain.
#[test]
fn a_capture_that_fails_loses_nothing() {
    let site = Site::new();
    let id = start(&site);
    goes_on(&site);
    let first = save(&site, &id);
    let blobs = site.folder().join("blobs");
    let aside = site.folder().join("aside");
    std::fs::rename(&blobs, &aside).unwrap();
    std::fs::write(&blobs, "in the way").unwrap();
    let failed = site.call(&["checkpoint", "--leave-running", "--capsule", &site.address(), &id]);
    assert!(!failed.status.success());
    std::fs::remove_file(&blobs).unwrap();
    std::fs::rename(&aside, &blobs).unwrap();
    goes_on(&site);
    let second = save(&site, &id);
    let (parent, bytes) = continued(&site, second);
    if parent.is_some() {
        assert_eq!(parent, Some(first));
        assert!(bytes < DATA_BYTES / 4, "{bytes} bytes");
    }
    site.ok(&["checkpoint", "--capsule", &site.address(), &id]);
    site.wait_until_stopped(&id);
    site.ok(&["delete", &id]);
    start(&site);
    goes_on(&site);
}

/// Without this, a container whose machine vanishes would begin anew; or its store fill up.
#[test]
fn capsules_come_at_intervals_and_old_ones_go() {
    let site = Site::new();
    let mut spec = site.spec(PROGRAM);
    spec["annotations"] = json!({"dev.samara.interval": "1s", "dev.samara.retention": "last=2"});
    let bundle = site.sandbox.bundle("bundle", &spec);
    let id = site.sandbox.new_id(SAMARA);
    site.ok(&["run", "-d", "-b", bundle.to_str().unwrap(), &id]);
    let capsules = || site.store().capsules().unwrap();
    let mut seen: Vec<Digest> = Vec::new();
    let mut wait_for_more = |count: usize, what: &str| {
        let wanted = seen.len() + count;
        poll(what, || {
            for one in capsules() {
                if !seen.contains(&one.capsule.digest) {
                    seen.push(one.capsule.digest);
                }
            }
            seen.len() >= wanted
        });
    };
    wait_for_more(5, "capsules");
    // The newest may have come while the others were being removed.
    poll("old capsules are removed", || capsules().len() <= 3);
    if let Some((pid, _)) = monitors(&id).first() {
        rustix::process::kill_process(*pid, rustix::process::Signal::KILL).unwrap();
    }
    wait_for_more(2, "capsules after the monitor's end");
    goes_on(&site);
    // Who asks is not told that somebody else is at it.
    for _ in 0..5 {
        save(&site, &id);
    }
    site.ok(&[
        "checkpoint",
        "--every",
        "off",
        "--leave-running",
        "--capsule",
        &site.address(),
        &id,
    ]);
    let last = site.newest().unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    assert_eq!(site.newest(), Some(last), "nobody wants any more");
    goes_on(&site);
}
