//! One container, saved and brought back again and again while it works: its results are right, and nothing grows or stays behind.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/site.rs"]
mod site;

use std::collections::{BTreeSet, HashSet};
use std::path::Path;
use std::time::{Duration, SystemTime};

use samara_capsule::log::Event;
use samara_store::collect::CollectOptions;
use samara_store::{CapsuleReader, Retention};
use sandbox::{SAMARA, poll};
use site::{Site, monitors};

/// One process sends numbers through a pipe as fast as it can; another finds each of them in its place, keeps the last 5000 in
/// memory, and says how many there were and what digest they have.
const PROGRAM: &str = r#"n=0; while :; do n=$((n + 1)); echo $n; done | busybox awk '
    $1 != NR { print "number " NR " is " $1 > "/tmp/differs"; exit }
    {
        digest = (digest * 31 + $1) % 1000003
        last[NR % 5000] = $1
    }
    NR % 5000 == 0 {
        sum = 0
        for (i in last) sum += last[i]
        if (sum != 5000 * NR - 5000 * 4999 / 2) {
            print "the sum up to " NR " is " sum > "/tmp/differs"
            exit
        }
        print NR, digest, "." > "/tmp/said"
        close("/tmp/said")
    }'"#;

/// The digest of the numbers up to `count`.
fn digest(count: u64) -> u64 {
    (1..=count).fold(0, |digest, number| (digest * 31 + number) % 1_000_003)
}

/// How many numbers there were, and their digest.
fn said(site: &Site) -> Option<(u64, u64)> {
    let text = std::fs::read_to_string(site.sandbox.rootfs().join("tmp/said")).ok()?;
    match text.split_whitespace().collect::<Vec<_>>().as_slice() {
        // Empty, or without its end, while it is being written.
        [count, digest, "."] => Some((count.parse().ok()?, digest.parse().ok()?)),
        _ => None,
    }
}

/// What of a running container may not grow from cycle to cycle.
#[derive(Debug)]
struct Extent {
    processes: usize,
    threads: usize,
    descriptors: usize,
    mappings: usize,
    mounts: usize,
    interfaces: usize,
    monitors_descriptors: usize,
}

impl Extent {
    /// Whether nothing has grown. What was looked at while the program had a file open has one descriptor more than later.
    fn is_within(&self, wanted: &Extent) -> bool {
        let fields = |of: &Extent| {
            [
                of.processes,
                of.threads,
                of.descriptors,
                of.mappings,
                of.mounts,
                of.interfaces,
                of.monitors_descriptors,
            ]
        };
        fields(self).iter().zip(fields(wanted)).all(|(found, wanted)| *found <= wanted)
    }
}

fn names(folder: &str) -> usize {
    std::fs::read_dir(folder).unwrap().count()
}

fn lines(file: &str) -> usize {
    std::fs::read_to_string(file).unwrap().lines().count()
}

fn extent(site: &Site, id: &str) -> Extent {
    let init = site.init(id).as_raw_pid();
    let mut pids = vec![init];
    let mut next = 0;
    while let Some(pid) = pids.get(next) {
        let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
        pids.extend(children.split_whitespace().map(|pid| pid.parse::<i32>().unwrap()));
        next += 1;
    }
    let all = |count: &dyn Fn(i32) -> usize| pids.iter().map(|&pid| count(pid)).sum();
    poll("a monitor and its standby", || monitors(id).len() == 2);
    let watching = monitors(id).into_iter().map(|(pid, _)| pid.as_raw_pid());
    Extent {
        processes: pids.len(),
        threads: all(&|pid| names(&format!("/proc/{pid}/task"))),
        descriptors: all(&|pid| names(&format!("/proc/{pid}/fd"))),
        mappings: all(&|pid| lines(&format!("/proc/{pid}/maps"))),
        mounts: lines(&format!("/proc/{init}/mountinfo")),
        interfaces: lines(&format!("/proc/{init}/net/dev")),
        monitors_descriptors: watching.map(|pid| names(&format!("/proc/{pid}/fd"))).sum(),
    }
}

/// The container has no more than this extent, as soon as its monitor has dealt with what just happened.
#[track_caller]
fn settles(site: &Site, id: &str, wanted: &Extent, at: &str) {
    for _ in 0..200 {
        if extent(site, id).is_within(wanted) {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    let found = extent(site, id);
    assert!(found.is_within(wanted), "{at}: {found:?} instead of {wanted:?}");
}

/// Names of the blobs in a folder, and of whatever else is there.
fn stored(folder: &Path) -> BTreeSet<String> {
    let entries = std::fs::read_dir(folder.join("blobs/sha256")).unwrap().flatten();
    entries.map(|entry| entry.file_name().into_string().unwrap()).collect()
}

/// The capsules that the log names: their blobs, and the bytes and number of each one's.
fn capsules(site: &Site) -> (BTreeSet<String>, Vec<(u64, usize)>) {
    let store = site.store();
    let (mut named, mut sizes) = (BTreeSet::new(), Vec::new());
    for slot in store.slots().unwrap() {
        let Event::Capsule { manifest } = store.slot(slot).unwrap().event else { continue };
        let reader = CapsuleReader::open_digest(&store, manifest.digest).unwrap();
        let blobs: HashSet<_> = reader.manifest().blobs().map(|(_, blob)| blob.digest).collect();
        sizes.push((reader.manifest().stored_bytes(), blobs.len()));
        named.extend(blobs.iter().map(|digest| digest.hex()));
        named.insert(manifest.digest.hex());
    }
    (named, sizes)
}

/// A container that is moved for weeks: results that drift, or a node and a store that fill up.
#[test]
fn nothing_drifts_and_nothing_piles_up() {
    let cycles: usize = match std::env::var("SAMARA_TEST_CYCLES") {
        Ok(text) => text.parse().unwrap(),
        Err(_) => 20,
    };
    let site = Site::new();
    let spec = site.spec(PROGRAM);
    let bundle = site.sandbox.bundle("bundle", &spec);
    let run = || {
        let id = site.sandbox.new_id(SAMARA);
        site.ok(&["run", "-d", "-b", bundle.to_str().unwrap(), &id]);
        id
    };
    let goes_on = |what: &str| {
        let before = said(&site).map_or(0, |(count, _)| count);
        poll(what, || said(&site).is_some_and(|(count, _)| count > before));
    };
    let mut id = run();
    let mut first = None;
    for cycle in 1..=cycles {
        goes_on(&format!("it works in cycle {cycle}"));
        let address = site.address();
        let before = extent(&site, &id);
        // What a capture leaves for the next one.
        let monitors_descriptors = before.monitors_descriptors + 1;
        let before = Extent { monitors_descriptors, ..before };
        site.ok(&["checkpoint", "--leave-running", "--capsule", &address, &id]);
        settles(&site, &id, &before, &format!("cycle {cycle}: after a save"));
        goes_on(&format!("it works after a save in cycle {cycle}"));
        site.ok(&["checkpoint", "--capsule", &address, &id]);
        site.wait_until_stopped(&id);
        site.ok(&["delete", &id]);
        site.nothing_is_left_of(&id, &format!("cycle {cycle}"));
        id = run();
        // The first container's was not brought back, and may differ by what the kernel joins.
        let first = first.get_or_insert_with(|| extent(&site, &id));
        settles(&site, &id, first, &format!("cycle {cycle}"));
        assert!(!site.sandbox.rootfs().join("tmp/differs").exists(), "cycle {cycle}: it differs");
    }
    goes_on("it works at the end");
    let (count, found) = loop {
        // Not while it is being written.
        if let Some(said) = said(&site) {
            break said;
        }
    };
    assert_eq!(found, digest(count), "the digest of {count} numbers");
    let differs = std::fs::read_to_string(site.sandbox.rootfs().join("tmp/differs"));
    assert!(differs.is_err(), "{differs:?}");

    let (named, sizes) = capsules(&site);
    assert_eq!(sizes.len(), 2 * cycles);
    let all = stored(site.folder());
    assert!(named.is_subset(&all));
    // A run of small files that was stored ahead, and of which one changed before the container stood.
    assert!(all.len() <= named.len() + 2 * cycles, "{} blobs that no capsule names", all.len());
    // The first two are of the container that was not brought back yet.
    let (bytes, blobs) = sizes[2.min(sizes.len() - 1)];
    for (later_bytes, later_blobs) in &sizes {
        assert!(*later_blobs <= blobs, "{sizes:?}");
        assert!(*later_bytes <= bytes + bytes / 4, "{sizes:?}");
    }
    assert_eq!(site.store().slots().unwrap().len(), 3 * cycles + 1, "starts and capsules");
    let retention: Retention = format!("last={}", 2 * cycles).parse().unwrap();
    let options = CollectOptions { grace: Duration::ZERO, dry_run: false };
    let later = SystemTime::now() + Duration::from_secs(3600);
    site.store().collect(&retention, later, &options, &|_, _| {}).unwrap();
    let all = stored(site.folder());
    assert!(named.is_subset(&all));
    let left: Vec<&String> = all.difference(&named).collect();
    // The collection's own list.
    assert!(left.len() <= 1, "blobs that no capsule names: {left:?}");
    let temporary = std::fs::read_dir(site.folder().join("blobs")).unwrap().count();
    assert_eq!(temporary, 1, "only the folder of blobs");
}
