//! Captures that leave memory in forks: the program notices nothing, nothing is left of them, and the capsule has the memory of its instant.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/site.rs"]
mod site;

use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::Signal;
use samara_capsule::config::MemoryReport;
use samara_engine::phase::Phase;
use samara_oci::fail_point;
use samara_store::CapsuleReader;
use sandbox::poll;
use serde_json::{Value, json};
use site::{Site, signal};

/// A site where forks are made as `fork` says, and the specification of `tests/snapshots/parent.c` there.
fn site(fork: &str) -> (Site, Value) {
    let site = Site::new();
    configure(&site, fork);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots/parent.c");
    let program = site.sandbox.rootfs().join("parent");
    let compiled =
        Command::new("gcc").args(["-O1", "-static", "-o"]).args([&program, &source]).status();
    assert!(compiled.unwrap().success());
    let spec = site.spec("exec /parent");
    (site, spec)
}

fn configure(site: &Site, fork: &str) {
    let prefix = site.path("").display().to_string();
    site.configure(&format!(
        "[store]\nallowed_prefixes = [\"file://{prefix}\"]\n[pause]\nbudget_ms = 0\nfork = \"{fork}\"\n"
    ));
}

fn checkpoint(site: &Site, id: &str) -> MemoryReport {
    site.ok(&["checkpoint", "--leave-running", "--capsule", &site.address(), id]);
    let reader = CapsuleReader::open_digest(&site.store(), site.newest().unwrap()).unwrap();
    reader.config().report.clone().unwrap().memory
}

/// What the program has found to be wrong; the rounds that it has done go on.
#[track_caller]
fn goes_on(site: &Site) {
    let wrong = std::fs::read_to_string(site.sandbox.rootfs().join("tmp/wrong"));
    assert!(wrong.is_err(), "{wrong:?}");
    site.counts_on("the program");
}

/// Forks, living or ended, in the container of `id`.
fn forks(site: &Site, id: &str) -> Vec<PathBuf> {
    let init = site.init(id);
    let of_init = |name: &str| std::fs::read_link(format!("/proc/{init}/ns/{name}")).unwrap();
    let pids = std::fs::read_dir("/proc").unwrap().flatten().map(|entry| entry.path());
    pids.filter(|path| {
        let name = std::fs::read_to_string(path.join("comm")).unwrap_or_default();
        // What has ended has no namespaces, but a parent.
        let stat = std::fs::read_to_string(path.join("stat")).unwrap_or_default();
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
        let inside = std::fs::read_link(path.join("ns/pid")).is_ok_and(|ns| ns == of_init("pid"));
        name.trim() == "samara-snapshot" && (inside || parent == Some(&init.to_string()))
    })
    .collect()
}

/// A child that the program finds, a pipe that does not end, memory of a later instant, a process that stays: each of them would be a
/// difference to a run without a capture.
#[test]
fn a_program_notices_nothing_of_forks() {
    let (site, spec) = site("always");
    let id = site.start(&spec);
    poll("it counts", || site.count() > 1);
    for _ in 0..4 {
        let memory = checkpoint(&site, &id);
        assert_eq!(memory.forks, 1, "{memory:?}");
        assert!(memory.forked > 0, "{memory:?}");
        assert_eq!(forks(&site, &id), [] as [PathBuf; 0]);
        goes_on(&site);
    }
    // What comes back is what was there at one instant: the program looks at all of it.
    site.ok(&["kill", &id, "KILL"]);
    site.wait_until_stopped(&id);
    site.ok(&["delete", &id]);
    let id = site.start(&spec);
    goes_on(&site);
    site.ok(&["kill", &id, "KILL"]);
    site.wait_until_stopped(&id);
}

/// A fork that outlives its engine, whether it runs as a second copy of the program or is left as an ended process for ever.
#[test]
fn a_kill_while_a_fork_is_read_harms_nothing() {
    let (site, spec) = site("always");
    let id = site.start(&spec);
    poll("it counts", || site.count() > 1);
    for edge in [Phase::Forked, Phase::Thawed, Phase::Drained] {
        let before = site.newest();
        let (edge, url) = (edge.name(), site.address());
        let args = ["checkpoint", "--leave-running", "--capsule", &url, &id];
        let mut caller = site.command(&args).env(fail_point::VARIABLE, edge).spawn().unwrap();
        let worker = site.wait_at(edge, &mut caller);
        signal(worker, Signal::KILL);
        assert!(!caller.wait().unwrap().success(), "{edge}");
        poll("the worker's end", || !Path::new(&format!("/proc/{worker}")).exists());
        assert_eq!(before, site.newest(), "{edge}: half a capsule is visible");
        goes_on(&site);
        site.runs_undisturbed(&id, edge);
    }
    // The next capture takes what is left.
    let memory = checkpoint(&site, &id);
    assert_eq!(memory.forks, 1, "{memory:?}");
    assert_eq!(forks(&site, &id), [] as [PathBuf; 0]);
    goes_on(&site);
}

/// A container that ends while a fork of it is read has to end at once, and its engine to say so.
#[test]
fn a_container_ends_while_a_fork_is_read() {
    let (site, spec) = site("always");
    let id = site.start(&spec);
    poll("it counts", || site.count() > 1);
    let url = site.address();
    let args = ["checkpoint", "--leave-running", "--capsule", &url, &id];
    let thawed = Phase::Thawed.name();
    let mut caller = site.command(&args).env(fail_point::VARIABLE, thawed).spawn().unwrap();
    let worker = site.wait_at(thawed, &mut caller);
    site.ok(&["kill", &id, "KILL"]);
    signal(worker, Signal::CONT);
    site.wait_until_stopped(&id);
    // Whether all of it was read before the end or not: a capsule is whole or not there.
    let done = caller.wait().unwrap().success();
    assert_eq!(site.newest().is_some(), done);
}

/// A program must not be killed for the memory that its capture needs.
#[test]
fn nothing_is_forked_where_the_container_may_not_have_more_memory() {
    const MIB: u64 = 1 << 20;
    let (site, mut spec) = site("always");
    spec["linux"]["resources"] = json!({ "memory": { "limit": 36 * MIB } });
    let id = site.start(&spec);
    poll("it counts", || site.count() > 1);
    let memory = checkpoint(&site, &id);
    assert_eq!(memory.forks, 0, "{memory:?}");
    assert!(memory.way.contains("no memory for a fork"), "{memory:?}");
    goes_on(&site);
    site.ok(&["update", "--memory", &(256 * MIB).to_string(), &id]);
    let memory = checkpoint(&site, &id);
    assert_eq!(memory.forks, 1, "{memory:?}");
    configure(&site, "never");
    let memory = checkpoint(&site, &id);
    assert_eq!((memory.forks, memory.way.as_str()), (0, "copied"), "{memory:?}");
    goes_on(&site);
}
