//! `kill -9` of every process of ours at every edge between phases, and capsules that are damaged.
//!
//! Each test stops a process at an edge, and fails if the edge is not reached.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/site.rs"]
mod site;

use std::process::Command;

use rustix::process::Signal;
use samara_engine::phase::Phase;
use samara_oci::fail_point;
use sandbox::{SAMARA, poll, spec, text};
use site::{BUSY_COUNTER, Site, parent, signal};

/// Which process ends by SIGKILL while another one stands at the edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    /// The one at the edge.
    Worker,
    Monitor,
    /// `samara-runtime checkpoint`.
    Caller,
}

/// The flags of a run or restore that uses `bundle`.
fn bundle(site: &Site, words: &str) -> String {
    let spec = spec(&site.sandbox, &["sh", "-c", words]);
    site.sandbox.bundle("bundle", &spec).display().to_string()
}

fn start_counter(site: &Site) -> String {
    start(site, BUSY_COUNTER)
}

fn start(site: &Site, words: &str) -> String {
    let id = site.sandbox.new_id(SAMARA);
    site.ok(&["run", "-d", "-b", &bundle(site, words), &id]);
    poll("it counts", || site.count() > 0);
    id
}

/// Kills a process of ours when a capture has come to an edge. Nothing may happen to the container, or to the capsules that there are.
fn kill_at(site: &Site, id: &str, edge: Phase, victim: Victim, leave_running: bool) {
    let edge = edge.name();
    let at = format!("{victim:?} killed at {edge}, leave_running {leave_running}");
    let before = site.newest();
    let url = site.address();
    let mut args = vec!["checkpoint", "--capsule", &url];
    args.extend(leave_running.then_some("--leave-running"));
    args.push(id);
    let mut caller = site.command(&args).env(fail_point::VARIABLE, edge).spawn().unwrap();
    let worker = site.wait_at(edge, &mut caller);
    match victim {
        Victim::Worker => signal(worker, Signal::KILL),
        Victim::Monitor => signal(parent(worker).unwrap(), Signal::KILL),
        Victim::Caller => caller.kill().unwrap(),
    }
    if victim != Victim::Worker {
        signal(worker, Signal::CONT);
    }
    let done = caller.wait().unwrap().success();
    poll("the worker's end", || !std::path::Path::new(&format!("/proc/{worker}")).exists());
    site.runs_undisturbed(id, &at);
    let after = site.newest();
    if done {
        assert!(after.is_some() && after != before, "{at}: a success without a capsule");
    } else if edge != Phase::Committed.name() && victim == Victim::Worker {
        assert_eq!(before, after, "{at}: half a capsule is visible");
    }
}

/// The same, in the stop that comes first where there is memory to cover.
#[test]
fn a_kill_in_the_stop_before_copying_harms_nothing() {
    let site = Site::new();
    let words = format!("x=$(head -c 9000000 /dev/zero | tr '\\0' x); {BUSY_COUNTER}");
    let id = start(&site, &words);
    for leave_running in [true, false] {
        // What it has covered is lost with the worker, and covered anew.
        for victim in [Victim::Worker, Victim::Monitor] {
            kill_at(&site, &id, Phase::Covered, victim, leave_running);
        }
    }
    site.ok(&["checkpoint", "--capsule", &site.address(), &id]);
    site.sandbox.wait_for_status(SAMARA, &id, "stopped");
    site.ok(&["delete", &id]);
}

/// A container that stays frozen, ends, or loses its newest capsule because a process of ours died.
#[test]
fn a_kill_at_any_edge_of_a_capture_harms_nothing() {
    let site = Site::new();
    let id = start_counter(&site);
    for leave_running in [true, false] {
        for edge in Phase::CHECKPOINT {
            // A container that ends is not let go; and once it is committed, it ends in the next moment.
            if !leave_running && matches!(edge, Phase::Thawed | Phase::Committed) {
                continue;
            }
            for victim in [Victim::Worker, Victim::Monitor, Victim::Caller] {
                kill_at(&site, &id, edge, victim, leave_running);
            }
        }
    }
    // What was left behind hinders nobody.
    site.ok(&["checkpoint", "--capsule", &site.address(), &id]);
    site.sandbox.wait_for_status(SAMARA, &id, "stopped");
    site.ok(&["delete", &id]);
}

/// A half-built container that runs, or whose remains keep the next attempt from succeeding.
#[test]
fn a_kill_at_any_edge_of_a_restore_leaves_nothing_that_runs() {
    let site = Site::new();
    let id = start_counter(&site);
    site.ok(&["checkpoint", "--capsule", &site.address(), &id]);
    site.ok(&["delete", &id]);
    let saved = site.count();
    for edge in Phase::RESTORE {
        let edge = edge.name();
        let id = site.sandbox.new_id(SAMARA);
        let url = site.address();
        let bundle = bundle(&site, BUSY_COUNTER);
        let args = ["restore", "-d", "--capsule", &url, "-b", &bundle, &id];
        let mut caller = site.command(&args).env(fail_point::VARIABLE, edge).spawn().unwrap();
        let runtime = site.wait_at(edge, &mut caller);
        signal(runtime, Signal::KILL);
        caller.wait().unwrap();
        if edge == Phase::Resumed.name() {
            site.counts_on("the container whose restore was complete");
        } else {
            let count = site.count();
            // Nothing of the program may run: neither now nor later.
            poll("no process of ours that works", || {
                site.ours().iter().all(|(_, name, _)| name.starts_with("samara-monitor"))
            });
            assert!(site.count() <= count.max(saved), "{edge}: the program runs");
        }
        // As an engine does with what it finds after a failure.
        let _ = site.command(&["delete", "--force", &id]).status().unwrap();
        let listed = site.sandbox.ok(SAMARA, &["list", "--quiet"]);
        assert!(!listed.contains(&id), "{edge}: it is still listed");
        let groups = Command::new("find")
            .args(["/sys/fs/cgroup", "-maxdepth", "4", "-name", &id])
            .output()
            .unwrap();
        assert_eq!(text(&groups.stdout), "", "{edge}: control groups are left");
    }
    let id = site.sandbox.new_id(SAMARA);
    site.ok(&[
        "restore",
        "-d",
        "--capsule",
        &site.address(),
        "-b",
        &bundle(&site, BUSY_COUNTER),
        &id,
    ]);
    site.counts_on("the container after all failed restores");
}
