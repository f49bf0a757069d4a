//! Many containers that are saved at intervals on one node, which lets one capture be under way at a time: each has its turn, also when
//! captures are killed, and nobody who asks for a capsule waits for them all.
//!
//! `SAMARA_TEST_CONTAINERS` (20) is how many.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/site.rs"]
mod site;

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use samara_capsule::digest::Digest;
use samara_store::config::StoreConfig;
use samara_store::{CapsuleReader, Location, Store};
use sandbox::text;
use serde_json::json;
use site::{Site, signal};

/// At a time. The reserve for those who ask comes on top.
const CAPTURES: usize = 1;

/// Does something now and then.
const PROGRAM: &str = "n=0; while :; do n=$((n + 1)); echo $n > /tmp/count; sleep 0.5; done";

/// Of each container, before and after captures are killed.
const CAPSULES: usize = 2;

/// Hundreds of containers on two cores that are busy with other tests take their time.
const BOUND: Duration = Duration::from_secs(600);

struct Member {
    id: String,
    address: String,
    seen: HashSet<Digest>,
    waited: bool,
}

impl Member {
    fn store(&self) -> Store {
        Store::open(&Location::parse(&self.address).unwrap(), &StoreConfig::default(), true)
            .unwrap()
    }

    /// Looks for new capsules, and how they came about.
    fn look(&mut self) {
        let store = self.store();
        for listed in store.capsules().unwrap() {
            let digest = listed.capsule.digest;
            if self.seen.insert(digest) {
                let reader = CapsuleReader::open_digest(&store, digest).unwrap();
                self.waited |= reader.config().report.as_ref().unwrap().waited_us > 0;
            }
        }
    }
}

/// Each has a root of its own, or they would be in each other's capsules.
fn start(site: &Site, number: usize) -> Member {
    let root = site.path(&format!("root-{number}"));
    let copied =
        std::process::Command::new("cp").arg("-al").arg(site.sandbox.rootfs()).arg(&root).status();
    assert!(copied.unwrap().success());
    let address = format!("{}-{number}", site.address());
    let mut spec = site.spec(PROGRAM);
    spec["root"]["path"] = json!(root);
    spec["annotations"] = json!({
        "dev.samara.capsule": address,
        "dev.samara.interval": "1s",
        "dev.samara.retention": "last=1000",
    });
    Member { id: site.start(&spec), address, seen: HashSet::new(), waited: false }
}

/// Our workers, and whether each has begun: only then threads compress for it.
fn workers(site: &Site) -> Vec<(i32, bool)> {
    let workers = site.ours().into_iter().filter(|(_, role, _)| role.contains("capture-worker"));
    workers.map(|(pid, ..)| (pid, has_begun(pid))).collect()
}

fn has_begun(pid: i32) -> bool {
    let threads = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let mut names =
        threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("comm")).ok());
    names.any(|name| name.starts_with("samara-compress"))
}

/// The captures that are under way at the same time: those that are both when all have been looked at and afterwards.
fn under_way(site: &Site) -> BTreeSet<i32> {
    let begun = |workers: Vec<(i32, bool)>| -> BTreeSet<i32> {
        workers.into_iter().filter(|(_, begun)| *begun).map(|(pid, _)| pid).collect()
    };
    let first = begun(workers(site));
    first.into_iter().filter(|pid| has_begun(*pid)).collect()
}

/// Waits until each member has so many more capsules. Answers how many captures were under way at most.
#[track_caller]
fn wait_for_more(site: &Site, members: &mut [Member], what: &str) -> usize {
    let wanted: Vec<usize> = members.iter().map(|member| member.seen.len() + CAPSULES).collect();
    let (begun, mut most) = (Instant::now(), 0);
    loop {
        most = most.max(under_way(site).len());
        members.iter_mut().for_each(Member::look);
        let have: Vec<usize> = members.iter().map(|member| member.seen.len()).collect();
        if have.iter().zip(&wanted).all(|(have, wanted)| have >= wanted) {
            return most;
        }
        assert!(begun.elapsed() < BOUND, "{what}: {have:?} capsules");
    }
}

/// If captures did not wait for one another, a hundred containers would take all of their node's memory and cores; if they waited without
/// order, or for ever, some would never be saved.
#[test]
fn every_container_has_its_turn() {
    let count = match std::env::var("SAMARA_TEST_CONTAINERS") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => 20,
    };
    let site = Site::new();
    let folder = site.path("turns");
    site.configure(&format!(
        "[store]\nallowed_prefixes = [\"file://{}\"]\n[capture]\nbuffers_mebibytes = 64\ncores = {CAPTURES}\nfolder = \"{}\"\n",
        site.path("").display(),
        folder.display()
    ));
    let mut members: Vec<Member> = (0..count).map(|number| start(&site, number)).collect();
    let most = wait_for_more(&site, &mut members, "at the beginning");
    assert_eq!(most, CAPTURES, "captures at a time");
    let waited = members.iter().filter(|member| member.waited).count();
    assert!(waited > 0, "there were no two at a time, so this test has shown nothing");

    // Some of those that wait, and those that are under way.
    for _ in 0..5 {
        for (pid, begun) in workers(&site) {
            if begun || pid % 4 == 0 {
                signal(pid, Signal::KILL);
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    let most = wait_for_more(&site, &mut members, "after some were killed");
    assert_eq!(most, CAPTURES, "captures at a time");

    // Who asks is served, whoever else waits, and counts for his own container too.
    for member in members.iter().take(3) {
        let before = member.store().head().unwrap().state.latest;
        site.ok(&["checkpoint", "--leave-running", "--capsule", &member.address, &member.id]);
        assert_ne!(member.store().head().unwrap().state.latest, before);
    }
    for member in &members {
        let output = site.call(&["delete", "--force", &member.id]);
        assert!(output.status.success(), "{}", text(&output.stderr));
    }
    sandbox::poll("the end of all workers", || workers(&site).is_empty());
    let left = waiting(&folder);
    assert!(left.iter().all(|name| !still_locked(&folder.join(name))), "{left:?}");
}

fn waiting(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder).unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

fn still_locked(file: &Path) -> bool {
    let file = std::fs::File::open(file).unwrap();
    file.try_lock_shared().is_err()
}
