//! `kill -9` of every process of ours at every edge between phases, and capsules that are damaged.
//!
//! Each test stops a process at an edge, and fails if the edge is not reached.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/sandbox.rs"]
mod sandbox;

use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use samara_engine::phase::Phase;
use samara_oci::fail_point;
use samara_store::config::StoreConfig;
use samara_store::{CapsuleReader, Location, Store};
use sandbox::{SAMARA, Sandbox, poll, spec, text};

/// Counts into a file of its root, without other processes.
const COUNTER: &str = "n=0; while :; do n=$((n + 1)); echo $n > /count; done";

struct Site {
    sandbox: Sandbox,
}

/// Which process ends by SIGKILL while another one stands at the edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    /// The one at the edge.
    Worker,
    Monitor,
    /// `samara-runtime checkpoint`.
    Caller,
}

impl Site {
    fn new() -> Site {
        let site = Site { sandbox: Sandbox::new() };
        let text =
            format!("[store]\nallowed_prefixes = [\"file://{}\"]\n", site.path("").display());
        std::fs::write(site.path("node.toml"), text).unwrap();
        std::fs::set_permissions(site.path("node.toml"), std::fs::Permissions::from_mode(0o600))
            .unwrap();
        site
    }

    fn path(&self, name: &str) -> PathBuf {
        self.sandbox.path().join(name)
    }

    fn address(&self) -> String {
        format!("file://{}", self.path("address").display())
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.sandbox.command(SAMARA, args);
        let log = std::fs::File::create(self.path("stderr")).unwrap();
        command
            .current_dir(self.path("/"))
            .env("SAMARA_CONFIG", self.path("node.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        command
    }

    fn stderr(&self) -> String {
        text(&std::fs::read(self.path("stderr")).unwrap())
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) {
        let status = self.command(args).status().unwrap();
        assert!(status.success(), "{args:?}: {}", self.stderr());
    }

    /// The flags of a run or restore that uses `bundle`.
    fn bundle(&self) -> String {
        let spec = spec(&self.sandbox, &["sh", "-c", COUNTER]);
        self.sandbox.bundle("bundle", &spec).display().to_string()
    }

    fn start_counter(&self) -> String {
        let id = self.sandbox.new_id(SAMARA);
        self.ok(&["run", "-d", "-b", &self.bundle(), &id]);
        poll("it counts", || self.count() > 0);
        id
    }

    fn count(&self) -> u64 {
        // Empty for the moment between opening and writing.
        let text = std::fs::read_to_string(self.sandbox.rootfs().join("count"));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    #[track_caller]
    fn counts_on(&self, what: &str) {
        let before = (0..100).map(|_| self.count()).max().unwrap();
        poll(what, || self.count() > before);
    }

    fn init(&self, id: &str) -> i32 {
        i32::try_from(self.sandbox.state(SAMARA, id)["pid"].as_i64().unwrap()).unwrap()
    }

    /// Digest of the newest capsule, which is whole.
    #[track_caller]
    fn newest(&self) -> Option<String> {
        let location = Location::parse(&self.address()).unwrap();
        let store = Store::open(&location, &StoreConfig::default(), true).unwrap();
        let latest = store.head().unwrap().state.latest?;
        let report = CapsuleReader::open_digest(&store, latest.digest).unwrap().verify(&|_, _| ());
        assert!(report.faults.is_empty(), "{:?}", report.faults);
        Some(latest.digest.to_string())
    }

    /// Our processes that know this sandbox: their pid, name, and state.
    fn ours(&self) -> Vec<(i32, String, char)> {
        let folder = self.sandbox.path().display().to_string();
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter_map(|pid: i32| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let ours = text(&words).contains(&folder) || {
                let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
                text(&environment).contains(&folder)
            };
            let parent = parent(pid)?;
            let child_of_ours = std::fs::read(format!("/proc/{parent}/cmdline"))
                .is_ok_and(|words| text(&words).contains(&folder));
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
            let state = rest.trim_start().chars().next()?;
            ((ours || child_of_ours) && name.starts_with("samara")).then(|| {
                let role = text(&words).replace('\0', " ");
                (pid, format!("{name} {role}"), state)
            })
        })
        .collect()
    }

    /// Waits until one of our processes stands at an edge.
    #[track_caller]
    fn wait_at(&self, edge: &str, caller: &mut Child) -> i32 {
        for _ in 0..2000 {
            if let Some((pid, _, _)) = self.ours().into_iter().find(|(_, _, state)| *state == 'T') {
                return pid;
            }
            if let Some(status) = caller.try_wait().unwrap() {
                panic!("{edge} was never reached: {status}, {}", self.stderr());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{edge} was not reached in time");
    }
}

fn parent(pid: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

fn signal(pid: i32, signal: Signal) {
    // Gone already is as good.
    let _ = kill_process(Pid::from_raw(pid).unwrap(), signal);
}

/// A container that stays frozen, ends, or loses its newest capsule because a process of ours died.
#[test]
fn a_kill_at_any_edge_of_a_capture_harms_nothing() {
    let site = Site::new();
    let id = site.start_counter();
    for leave_running in [true, false] {
        for edge in Phase::CHECKPOINT {
            // A container that ends is not let go; and once it is committed, it ends in the next moment.
            if !leave_running && matches!(edge, Phase::Thawed | Phase::Committed) {
                continue;
            }
            for victim in [Victim::Worker, Victim::Monitor, Victim::Caller] {
                let edge = edge.name();
                let at = format!("{victim:?} killed at {edge}, leave_running {leave_running}");
                let before = site.newest();
                let url = site.address();
                let mut args = vec!["checkpoint", "--capsule", &url];
                args.extend(leave_running.then_some("--leave-running"));
                args.push(&id);
                let mut caller =
                    site.command(&args).env(fail_point::VARIABLE, edge).spawn().unwrap();
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
                poll("the worker's end", || {
                    !std::path::Path::new(&format!("/proc/{worker}")).exists()
                });
                if !leave_running && site.sandbox.state(SAMARA, &id)["status"] == "stopped" {
                    panic!("{at}: the container ended");
                }
                site.counts_on(&at);
                let init = site.init(&id);
                let status = std::fs::read_to_string(format!("/proc/{init}/status")).unwrap();
                assert!(status.contains("TracerPid:\t0"), "{at}: it is still traced");
                let after = site.newest();
                if done {
                    assert!(
                        after.is_some() && after != before,
                        "{at}: a success without a capsule"
                    );
                } else if edge != Phase::Committed.name() && victim == Victim::Worker {
                    assert_eq!(before, after, "{at}: half a capsule is visible");
                }
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
    let id = site.start_counter();
    site.ok(&["checkpoint", "--capsule", &site.address(), &id]);
    site.ok(&["delete", &id]);
    let saved = site.count();
    for edge in Phase::RESTORE {
        let edge = edge.name();
        let id = site.sandbox.new_id(SAMARA);
        let url = site.address();
        let bundle = site.bundle();
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
    site.ok(&["restore", "-d", "--capsule", &site.address(), "-b", &site.bundle(), &id]);
    site.counts_on("the container after all failed restores");
}
