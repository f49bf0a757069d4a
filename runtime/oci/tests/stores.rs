//! Stores that refuse, stall, cut off, vanish or damage, and disks that are full, under a container that runs: it runs on, half a
//! capsule is not to be seen, and what was whole comes back.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/s3.rs"]
mod s3;
#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/site.rs"]
mod site;

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Output;

use rustix::process::Signal;
use s3::{Fault, Reach, Server};
use samara_capsule::digest::Digest;
use samara_engine::phase::Phase;
use samara_oci::fail_point;
use samara_store::CapsuleReader;
use sandbox::{SAMARA, poll, text};
use serde_json::{Value, json};
use site::{COUNTER, Site, assert_whole, signal};

/// A site whose address is in an S3 store.
fn remote() -> (Site, Server) {
    let mut server = None;
    let site = Site::with_store("s3://capsules/job", "capsules/job", |sandbox| {
        let server = server.insert(Server::start(sandbox));
        server.configuration()
    });
    (site, server.unwrap())
}

fn save(site: &Site, id: &str, leave_running: bool) -> Output {
    let address = site.address();
    let mut args = vec!["checkpoint", "--capsule", &address];
    args.extend(leave_running.then_some("--leave-running"));
    args.push(id);
    site.call(&args)
}

/// Starts a container that counts and has been saved once.
fn start_saved_counter(site: &Site, spec: &Value) -> String {
    let id = site.start(spec);
    poll("it counts", || site.count() > 0);
    let output = save(site, &id, true);
    assert!(output.status.success(), "{}", text(&output.stderr));
    id
}

/// After a save that was to end the container and did: it goes on from there.
#[track_caller]
fn bring_back(site: &Site, id: &str, spec: &Value) -> String {
    site.wait_until_stopped(id);
    site.ok(&["delete", id]);
    let saved = site.count();
    let id = site.start(spec);
    poll("it counts on", || site.count() > saved);
    id
}

/// The error is one line that says what was attempted, and where.
#[track_caller]
fn says_where(output: &Output, place: &str, at: &str) {
    let words = text(&output.stderr);
    let attempts = ["can't read", "can't write", "can't list", "can't look up", "can't use"];
    let says = attempts.iter().any(|attempt| words.contains(attempt)) && words.contains(place);
    assert!(says && words.lines().count() == 1, "{at}: {words}");
}

/// Runs `test` with each of the faults, side by side: most of the time they wait.
fn with_each<T: Copy + Send + std::fmt::Debug>(faults: &[T], test: impl Fn(T) + Sync) {
    std::thread::scope(|scope| {
        let threads: Vec<_> = faults
            .iter()
            .map(|&fault| {
                (
                    fault,
                    scope.spawn({
                        let test = &test;
                        move || test(fault)
                    }),
                )
            })
            .collect();
        let failed: Vec<T> = threads
            .into_iter()
            .filter_map(|(fault, run)| run.join().err().map(|_| fault))
            .collect();
        assert!(failed.is_empty(), "{failed:?}");
    });
}

/// A container that stays stopped or ends, or a half capsule that hides a whole one, because a store failed in the middle.
#[test]
fn a_store_that_fails_at_any_request_of_a_capture_harms_nothing() {
    use Reach::{FromThenOn, Once};
    let ends = false;
    let stays = true;
    let faults = [
        (Fault::Refuse(403), FromThenOn, ends),
        (Fault::Refuse(500), FromThenOn, ends),
        (Fault::Refuse(500), FromThenOn, stays),
        (Fault::Refuse(500), Once, ends),
        (Fault::Stall, FromThenOn, ends),
        (Fault::Stall, FromThenOn, stays),
        (Fault::CutAnswer, FromThenOn, ends),
        (Fault::CutAnswer, Once, ends),
        (Fault::CutRequest, FromThenOn, ends),
        (Fault::CutRequest, Once, ends),
        (Fault::Vanish, FromThenOn, ends),
        (Fault::Vanish, FromThenOn, stays),
    ];
    with_each(&faults, |(fault, reach, leave_running)| {
        let (site, server) = remote();
        let spec = site.spec(COUNTER);
        let mut id = start_saved_counter(&site, &spec);
        for request in 0..REQUESTS_MAX {
            let before = site.newest();
            server.fail(fault, request, reach);
            let output = save(&site, &id, leave_running);
            let Some(struck) = server.heal() else {
                // No request is left to fail.
                assert!(output.status.success(), "{}", text(&output.stderr));
                assert!(request > 8, "a capture takes more requests than {request}");
                if !leave_running {
                    bring_back(&site, &id, &spec);
                }
                return;
            };
            let at = format!("request {request}, {struck}");
            let after = site.newest();
            assert_whole(&site.store(), before.unwrap());
            if output.status.success() {
                assert_ne!(before, after, "{at}: a success without a capsule");
                if !leave_running {
                    id = bring_back(&site, &id, &spec);
                }
            } else {
                says_where(&output, "s3://capsules/job", &at);
                site.runs_undisturbed(&id, &at);
                // What failed then is the question after the commit, or its answer.
                let committed = struck.contains("/log/")
                    && (struck.starts_with("HEAD") || fault == Fault::CutAnswer);
                assert!(before == after || committed, "{at}: a capsule in spite of the failure");
                if before != after {
                    // The container does not know of that one. It finds its way to where it may write.
                    assert!(save(&site, &id, true).status.success(), "{at}: {}", site.stderr());
                }
            }
            site.runs_undisturbed(&id, &at);
        }
        panic!("more than {REQUESTS_MAX} requests");
    });
}

/// A capture of a small container takes less than half of it.
const REQUESTS_MAX: usize = 40;

/// A container that is half there, or one that can't be brought back any more, because a store failed while it was brought back.
#[test]
fn a_store_that_fails_at_any_request_of_a_restore_leaves_nothing() {
    let faults =
        [Fault::Refuse(403), Fault::Refuse(500), Fault::Stall, Fault::CutAnswer, Fault::Vanish];
    with_each(&faults, |fault| {
        let (site, server) = remote();
        let spec = site.spec(COUNTER);
        let mut id = start_saved_counter(&site, &spec);
        // An engine calls `create` and `start`; then the second reads again.
        for at_once in [true, false] {
            assert!(save(&site, &id, false).status.success());
            site.wait_until_stopped(&id);
            site.ok(&["delete", &id]);
            let (saved, before) = (site.count(), site.newest());
            for request in 0..REQUESTS_MAX {
                id = site.sandbox.new_id(SAMARA);
                let bundle = site.sandbox.bundle(&id, &spec);
                let bundle = bundle.to_str().unwrap();
                if !at_once {
                    site.ok(&["create", "-b", bundle, &id]);
                }
                server.fail(fault, request, Reach::FromThenOn);
                let output = match at_once {
                    true => site.call(&["run", "-d", "-b", bundle, &id]),
                    false => site.call(&["start", &id]),
                };
                let Some(struck) = server.heal() else {
                    assert!(output.status.success(), "{}", text(&output.stderr));
                    assert!(request > 5, "a restore takes more requests than {request}");
                    break;
                };
                let at = format!("{fault:?} at request {request}, {struck}, at once {at_once}");
                assert_eq!(output.status.code(), Some(1), "{at}: {}", text(&output.stderr));
                says_where(&output, "s3://capsules/job", &at);
                if !at_once {
                    site.ok(&["delete", "--force", &id]);
                }
                site.nothing_is_left_of(&id, &at);
                assert_eq!(site.count(), saved, "{at}: the program ran");
                assert_eq!(site.newest(), before, "{at}");
                assert_eq!(
                    site.state().failed_resumes,
                    0,
                    "{at}: it was not the capsule's fault: {}",
                    text(&output.stderr)
                );
            }
            poll("it counts on", || site.count() > saved);
        }
    });
}

/// A folder that is gone in the middle of a capture: unplugged, unmounted, renamed.
#[test]
fn a_folder_that_vanishes_during_a_capture_harms_nothing() {
    let site = Site::new();
    let spec = site.spec(COUNTER);
    let id = start_saved_counter(&site, &spec);
    let away = site.path("away");
    for leave_running in [true, false] {
        for edge in Phase::CHECKPOINT {
            if edge == Phase::Committed || edge == Phase::Thawed && !leave_running {
                continue;
            }
            let at = format!("gone when {}, leave_running {leave_running}", edge.name());
            let before = site.newest();
            let address = site.address();
            let mut args = vec!["checkpoint", "--capsule", &address];
            args.extend(leave_running.then_some("--leave-running"));
            args.push(&id);
            let mut caller =
                site.command(&args).env(fail_point::VARIABLE, edge.name()).spawn().unwrap();
            let worker = site.wait_at(edge.name(), &mut caller);
            std::fs::rename(site.folder(), &away).unwrap();
            signal(worker, Signal::CONT);
            let status = caller.wait().unwrap();
            let words = site.stderr();
            assert!(!status.success() && words.contains(&address), "{at}: {words}");
            let _ = std::fs::remove_dir_all(site.folder());
            std::fs::rename(&away, site.folder()).unwrap();
            site.runs_undisturbed(&id, &at);
            assert_eq!(site.newest(), before, "{at}");
        }
    }
    assert!(save(&site, &id, false).status.success());
    bring_back(&site, &id, &spec);
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().flatten().map(|entry| entry.path());
    entries.flat_map(|path| if path.is_dir() { files_below(&path) } else { vec![path] }).collect()
}

/// A store whose disk is full: at any byte of a capture, and at a start.
#[test]
fn a_store_without_room_harms_nothing() {
    let site = Site::with_address_in("disk/job");
    let disk = site.mount("disk", 16);
    let spec = site.spec(COUNTER);
    let mut id = start_saved_counter(&site, &spec);
    for leave_running in [true, false] {
        let mut failures = 0;
        for kib in (0..).step_by(8) {
            let at = format!("{kib} KiB of room, leave_running {leave_running}");
            let before = site.newest();
            disk.leave(kib);
            let output = save(&site, &id, leave_running);
            if output.status.success() {
                assert_ne!(site.newest(), before);
                break;
            }
            failures += 1;
            says_where(&output, &site.address(), &at);
            assert!(text(&output.stderr).contains("No space left"), "{at}");
            site.runs_undisturbed(&id, &at);
            assert_eq!(site.newest(), before, "{at}");
            // A file that was begun would take the room that somebody makes.
            let begun = files_below(site.folder());
            let begun: Vec<_> =
                begun.iter().filter(|path| path.to_string_lossy().contains('#')).collect();
            assert!(begun.is_empty(), "{at}: {begun:?}");
        }
        assert!(failures > 2, "the disk was not full");
    }
    site.wait_until_stopped(&id);
    site.ok(&["delete", &id]);
    disk.leave(0);
    let output;
    (id, output) = site.run(&spec);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stderr));
    says_where(&output, &site.address(), "a start");
    site.nothing_is_left_of(&id, "a start");
    disk.clear();
    let saved = site.count();
    site.start(&spec);
    poll("it counts on", || site.count() > saved);
}

/// A node whose own disk is full: containers are saved all the same, and a start fails without leaving anything.
#[test]
fn a_node_without_room_harms_nothing() {
    let site = Site::new();
    let disk = site.mount("disk", 4);
    std::fs::create_dir(site.path("disk/state")).unwrap();
    std::os::unix::fs::symlink("disk/state", site.sandbox.state_root(SAMARA)).unwrap();
    let spec = site.spec(COUNTER);
    let mut id = start_saved_counter(&site, &spec);
    disk.leave(0);
    for leave_running in [true, true, false] {
        let before = site.newest();
        let output = save(&site, &id, leave_running);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert_ne!(site.newest(), before);
    }
    site.wait_until_stopped(&id);
    site.ok(&["delete", &id]);
    let saved = site.count();
    let mut failures = 0;
    for kib in (0..).step_by(4) {
        let at = format!("{kib} KiB of room");
        disk.leave(kib);
        let output;
        (id, output) = site.run(&spec);
        if output.status.success() {
            break;
        }
        failures += 1;
        let words = text(&output.stderr);
        assert!(words.contains("No space left") && words.lines().count() == 1, "{at}: {words}");
        disk.clear();
        site.nothing_is_left_of(&id, &at);
        assert_eq!(site.count(), saved, "{at}: the program ran");
        assert_eq!(
            site.state().failed_resumes,
            0,
            "{at}: it was not the capsule's fault: {}",
            text(&output.stderr)
        );
    }
    assert!(failures > 2, "the disk was not full");
    poll("it counts on", || site.count() > saved);
}

/// A damaged capsule that is found when there is a container already, or not at all.
#[test]
fn a_damaged_capsule_is_refused_before_any_process_is_made() {
    let site = Site::new();
    let mut spec = site.spec(COUNTER);
    // Called when the container's first process has been made.
    let made = site.path("made");
    let script = site.path("hook");
    std::fs::write(&script, format!("#!/bin/sh\n: > {}\n", made.display())).unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o700)).unwrap();
    spec["hooks"] = json!({"createRuntime": [{"path": script}]});
    let id = start_saved_counter(&site, &spec);
    assert!(std::fs::remove_file(&made).is_ok(), "the hook is not called");
    let older = blobs(&site);
    let count = site.count();
    poll("it counts on", || site.count() > count + 5);
    assert!(save(&site, &id, false).status.success());
    site.wait_until_stopped(&id);
    site.ok(&["delete", &id]);

    let newer = blobs(&site);
    for (kind, digests) in &newer {
        for digest in digests {
            let path = site.folder().join("blobs/sha256").join(digest.hex());
            let whole = std::fs::read(&path).unwrap();
            let refused = |how: &str, damaged: Option<Vec<u8>>| {
                match damaged {
                    Some(content) => std::fs::write(&path, content).unwrap(),
                    None => std::fs::remove_file(&path).unwrap(),
                }
                site.refused(&spec, &digest.hex());
                assert!(!made.exists(), "{kind} {digest} {how}: a process was made");
                std::fs::write(&path, &whole).unwrap();
            };
            refused("truncated", Some(whole[..whole.len() / 2].to_vec()));
            for byte in [0, whole.len() / 3, whole.len() - 1] {
                let mut flipped = whole.clone();
                flipped[byte] ^= 1;
                refused(&format!("flipped at {byte}"), Some(flipped));
            }
            let other = older.get(kind).into_iter().flatten().find(|other| *other != digest);
            let other = other.map(|other| site.folder().join("blobs/sha256").join(other.hex()));
            // What did not change since has no other of its kind.
            if let Some(other) = other {
                refused("swapped", Some(std::fs::read(other).unwrap()));
            }
            refused("missing", None);
        }
    }
    assert!(newer.len() >= 6, "{newer:?}");
    let saved = site.count();
    site.start(&spec);
    poll("it counts on", || site.count() > saved);
}

/// The blobs of the newest capsule, by kind.
fn blobs(site: &Site) -> BTreeMap<String, Vec<Digest>> {
    let reader = CapsuleReader::open_latest(&site.store()).unwrap();
    let mut blobs = BTreeMap::from([("manifest".to_owned(), vec![reader.digest()])]);
    for (kind, blob) in reader.manifest().blobs() {
        blobs.entry(kind.to_string()).or_default().push(blob.digest);
    }
    blobs
}
