//! Containers with an address: what their ends and their resumes leave there, and what the next start makes of it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/site.rs"]
mod site;

use std::os::unix::fs::PermissionsExt as _;

use rustix::process::{Signal, kill_process};
use samara_capsule::digest::Digest;
use samara_capsule::log::Event;
use sandbox::{SAMARA, poll, spec, text};
use serde_json::{Value, json};
use site::{COUNTER, Site, monitors};

/// A finished job that is started again must not continue from a capsule of before.
#[test]
fn the_programs_own_success_closes_the_generation() {
    let site = Site::new();
    let id = site.start(&site.spec("exit 0"));
    site.wait_until_stopped(&id);
    site.ok(&["delete", &id]);
    assert_eq!(site.state().generation, 1, "delete waits until the address knows");
    // In the foreground the caller is the one who waits for the init.
    let bundle = site.sandbox.bundle("attached", &site.spec("exit 0"));
    let id = site.sandbox.new_id(SAMARA);
    site.ok(&["run", "-b", bundle.to_str().unwrap(), &id]);
    assert_eq!(site.state().generation, 2);
}

/// Neither a failure nor an end that somebody asked for is success: what was done must not be thrown away.
#[test]
fn other_ends_leave_the_generation_open() {
    let site = Site::new();
    let id = site.start(&site.spec("exit 3"));
    site.wait_until_stopped(&id);
    site.ok(&["delete", &id]);
    let script = "trap 'exit 0' TERM; touch /tmp/up; while :; do busybox usleep 20000; done";
    let id = site.start(&site.spec(script));
    poll("the trap", || site.sandbox.rootfs().join("tmp/up").exists());
    site.ok(&["kill", &id, "TERM"]);
    site.wait_until_stopped(&id);
    site.ok(&["delete", &id]);
    assert_eq!(site.state().generation, 0);
    assert_eq!(site.state().epoch, 2);
}

/// The log of an address names who started there.
#[test]
fn the_log_names_the_container() {
    let site = Site::new();
    let mut spec = site.spec("exit 0");
    spec["annotations"] = json!({"io.kubernetes.cri.container-name": "the-job"});
    let id = site.start(&spec);
    site.wait_until_stopped(&id);
    let Event::Start { facts } = site.store().slot(0).unwrap().event else { panic!() };
    assert_eq!((&facts["container"], facts["name"].as_str()), (&id, "the-job"));
}

/// Somebody kills the monitor, and then its successor: the end is still seen.
#[test]
fn the_end_is_seen_though_monitors_die() {
    let site = Site::new();
    let id = site.start(&site.spec("while [ ! -e /tmp/go ]; do busybox usleep 20000; done"));
    for _ in 0..2 {
        poll("a monitor and its standby", || monitors(&id).len() == 2);
        let seen = monitors(&id);
        let (monitor, _) = seen.iter().find(|(_, line)| line.len() == 3).unwrap();
        kill_process(*monitor, Signal::KILL).unwrap();
        poll("a new monitor", || {
            let now = monitors(&id);
            now.len() == 2 && now.iter().all(|(pid, _)| seen.iter().all(|(old, _)| old != pid))
        });
    }
    let (standby, _) = monitors(&id).into_iter().find(|(_, line)| line.len() == 4).unwrap();
    kill_process(standby, Signal::KILL).unwrap();
    poll("a new standby", || {
        monitors(&id).iter().any(|(pid, line)| line.len() == 4 && *pid != standby)
    });
    std::fs::write(site.sandbox.rootfs().join("tmp/go"), "").unwrap();
    site.wait_until_stopped(&id);
    poll("the generation is closed", || site.state().generation == 1);
    poll("all of them are gone", || monitors(&id).is_empty());
}

/// A capsule whose program fails again and again is not resumed for ever; one whose container was only stopped is.
#[test]
fn a_capsule_that_failed_twice_is_not_tried_again() {
    let site = Site::new();
    let spec = site.save_counter();
    let id = site.start(&spec);
    site.ok(&["kill", &id, "KILL"]);
    site.wait_until_stopped(&id);
    site.ok(&["delete", &id]);
    assert_eq!(site.state().failed_resumes, 0, "that was its user's wish");

    for failures in 1..=2 {
        let id = site.start(&spec);
        kill_process(site.init(&id), Signal::KILL).unwrap();
        site.wait_until_stopped(&id);
        site.ok(&["delete", &id]);
        assert_eq!(site.state().failed_resumes, failures);
    }
    site.refused(&spec, "failed twice");
    site.refused(&spec, &format!("samara capsule rm {}", site.address()));

    // Whoever asks for just this capsule gets it.
    let id = site.sandbox.new_id(SAMARA);
    let bundle = site.sandbox.bundle(&id, &spec);
    let bundle = bundle.to_str().unwrap();
    site.ok(&["restore", "--capsule", &site.address(), "-b", bundle, "-d", &id]);
}

/// What is damaged only after it was looked at, and found while the container is filled, leaves nothing behind, and is not tried
/// for ever.
#[test]
fn a_start_that_fails_by_the_capsule_leaves_nothing_and_counts() {
    let site = Site::new();
    let spec = site.save_counter();
    let manifest = site.read_blob(&json!(site.state().latest.unwrap().digest.to_string()));
    let layers = manifest["layers"].as_array().unwrap();
    let is_pack =
        |layer: &&Value| layer["mediaType"].as_str().unwrap().ends_with("capsule.pack.v1");
    let pack = layers.iter().find(is_pack).unwrap()["digest"].as_str().unwrap();
    let pack = site.path("address/blobs").join(pack.replace(':', "/"));
    let away = site.path("away");
    for failures in 1..=2 {
        let id = site.sandbox.new_id(SAMARA);
        let bundle = site.sandbox.bundle(&id, &spec);
        site.ok(&["create", "-b", bundle.to_str().unwrap(), &id]);
        std::fs::rename(&pack, &away).unwrap();
        let output = site.call(&["start", &id]);
        std::fs::rename(&away, &pack).unwrap();
        let words = text(&output.stderr);
        assert_eq!(output.status.code(), Some(176), "{words}");
        assert!(words.contains("is not there"), "{words}");
        site.ok(&["delete", "--force", &id]);
        site.nothing_is_left_of(&id, "a start that failed");
        assert_eq!(site.state().failed_resumes, failures);
    }
    site.refused(&spec, "failed twice");
}

/// A capsule that nobody could bring back must not be made.
#[test]
fn a_container_in_a_user_namespace_is_not_saved() {
    let site = Site::new();
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    let mut spec = site.spec("while :; do busybox usleep 20000; done");
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
    spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["type"] != "cgroup");
    std::fs::set_permissions(site.path(""), std::fs::Permissions::from_mode(0o755)).unwrap();
    let id = site.start(&spec);
    let output = site.call(&["checkpoint", "--capsule", &site.address(), &id]);
    let words = text(&output.stderr);
    assert!(!output.status.success() && words.contains("user namespace"), "{words}");
    assert_eq!(site.state().latest, None);
    assert_eq!(site.sandbox.state(SAMARA, &id)["status"], "running");
}

/// What stands against a restore is said before the root is another one and a process runs.
#[test]
fn a_capsule_that_does_not_fit_changes_nothing() {
    let site = Site::new();
    let spec = site.save_counter();
    let whole = std::cell::RefCell::new(None);
    let check = |change: &dyn Fn(&mut Value), words: &str| {
        site.forge(|config| {
            *config = whole.borrow_mut().get_or_insert_with(|| config.clone()).clone();
            change(config);
        });
        site.refused(&spec, words);
    };
    let requirement = |name: &'static str, value: Value| {
        move |config: &mut Value| config["requirements"][name] = value.clone()
    };
    check(&requirement("architecture", json!("vax")), "it was saved on vax");
    check(&requirement("cpu_features", json!(["warp9"])), "this processor lacks warp9");
    let other = Digest::of(b"another kernel's").to_string();
    check(&requirement("vdso", json!(other)), "restore it on a host with the same kernel");
    check(&requirement("base_image", json!("sha256:0")), "start it with the image");
    check(&requirement("kernel_features", json!(["mind-reading"])), "use a newer samara");
    check(&requirement("other", json!({"tape": "9-track"})), "tape = 9-track");
    check(&|config| config["format"] = json!(2), "use a newer one");

    site.forge(|config| *config = whole.borrow().clone().unwrap());
    let mut other = site.spec("exit 0");
    site.refused(&other, "another command");
    other = site.spec(COUNTER);
    other["process"]["env"].as_array_mut().unwrap().push(json!("C=3"));
    site.refused(&other, "another environment");

    site.start(&spec);
}

/// Who may set annotations need not be who runs the node.
#[test]
fn addresses_are_bounded_wherever_they_come_from() {
    let site = Site::new();
    for annotated in [true, false] {
        let mut spec = spec(&site.sandbox, &["true"]);
        let address = "s3://somebody-elses/jobs/1";
        match annotated {
            true => spec["annotations"] = json!({"dev.samara.capsule": address}),
            false => spec["process"]["env"] = json!([format!("SAMARA_CAPSULE={address}")]),
        }
        let (_, output) = site.run(&spec);
        let words = text(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{words}");
        let source = if annotated { "dev.samara.capsule names" } else { "SAMARA_CAPSULE names" };
        assert!(words.contains(source) && words.contains("store.allowed_prefixes"), "{words}");
    }
}

/// A capsule is no way to a user or a capability that the container's program has no way to.
#[test]
fn a_capsule_brings_no_privileges() {
    let site = Site::new();
    std::fs::set_permissions(
        site.sandbox.rootfs().join("tmp"),
        std::fs::Permissions::from_mode(0o777),
    )
    .unwrap();
    let mut spec = site.spec(&format!("exec busybox su -s /bin/sh -c '{COUNTER}' u"));
    let allow = |spec: &mut Value, caps: &[&str]| {
        for set in ["bounding", "effective", "permitted"] {
            spec["process"]["capabilities"][set] = json!(caps);
        }
    };
    allow(&mut spec, &["CAP_SETUID", "CAP_SETGID", "CAP_KILL"]);
    let id = site.start(&spec);
    poll("it counts", || site.count() > 0);
    site.ok(&["checkpoint", "--capsule", &site.address(), &id]);
    site.ok(&["delete", &id]);

    let mut bound = spec.clone();
    allow(&mut bound, &["CAP_KILL"]);
    site.refused(&bound, "has the user 5");
    allow(&mut bound, &["CAP_SETUID"]);
    site.refused(&bound, "has the group 5");
    site.start(&spec);
}

/// What a user reads after a save and a restore: how it went, and what is not protected.
#[test]
fn saves_and_restores_say_how_they_went() {
    let site = Site::new();
    let mut spec = site.spec(COUNTER);
    std::fs::create_dir(site.path("volume")).unwrap();
    spec["mounts"].as_array_mut().unwrap().push(json!({"destination": "/data", "type": "bind",
        "source": site.path("volume"), "options": ["rbind", "rw"]}));
    let id = site.start(&spec);
    poll("it counts", || site.count() > 0);
    let log = site.path("log.json");
    let log_flags = ["--log", log.to_str().unwrap(), "--log-format", "json"];
    let save = ["checkpoint", "--capsule", &site.address(), &id];
    site.ok(&[&log_flags[..], &save].concat());
    let logged = std::fs::read_to_string(&log).unwrap();
    assert!(logged.contains("\"warning\"") && logged.contains("the content of /data"), "{logged}");
    site.ok(&["delete", &id]);

    let again = site.sandbox.new_id(SAMARA);
    let bundle = site.sandbox.bundle(&again, &spec);
    let bundle = bundle.to_str().unwrap();
    let output = site.call(&["restore", "--capsule", &site.address(), "-b", bundle, "-d", &again]);
    let line = text(&output.stderr);
    assert!(output.status.success(), "{line}");
    let begins = format!("restored from {}: ", site.address());
    assert!(
        line.starts_with(&begins) && line.contains("MiB/s") && line.lines().count() == 1,
        "{line}"
    );
}

/// Mistakes get one line that says what to do, and leave nothing.
#[test]
fn mistakes_get_one_clear_line() {
    let site = Site::new();
    let id = site.start(&site.spec(COUNTER));
    let nobody = site.sandbox.new_id(SAMARA);
    let bundle = site.path(&id).display().to_string();
    let nowhere = format!("file://{}", site.path("nowhere").display());
    let check = |args: &[&str], status: i32, words: &[&str]| {
        let output = site.call(args);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {said}");
        assert_eq!(said.lines().count(), 1, "{args:?}: {said}");
        assert!(words.iter().all(|word| said.contains(word)), "{args:?}: {said}");
    };
    let to = ["checkpoint", "--capsule"];
    check(&[&to[..], &[&nowhere, "nobody"]].concat(), 1, &["does not exist", "`samara ps`"]);
    check(&[&to[..], &["jobs/42", &id]].concat(), 1, &["is no capsule address; use file:///dir"]);
    check(&[&to[..], &["s3://b/../c", &id]].concat(), 1, &["'..' part"]);
    check(&["checkpoint", &id], 1, &["--capsule URL"]);
    let restore = |url: &str, bundle: &str, status, words: &[&str]| {
        check(&["restore", "--capsule", url, "-b", bundle, "-d", &nobody], status, words);
    };
    restore(&nowhere, "/nowhere", 1, &["no bundle in /nowhere", "--bundle"]);
    restore(&nowhere, &site.path("").display().to_string(), 1, &["no bundle in", "config.json"]);
    restore(&nowhere, &bundle, 176, &["there is no capsule at", "samara capsule ls"]);
    assert!(!site.path("nowhere").exists());

    // The node's configuration, wrong in every way that a store can be reached wrongly.
    let config = |text: &str, mode| {
        std::fs::write(site.path("node.toml"), text).unwrap();
        let permissions = std::fs::Permissions::from_mode(mode);
        std::fs::set_permissions(site.path("node.toml"), permissions).unwrap();
    };
    config("", 0o644);
    check(&[&to[..], &[&nowhere, &id]].concat(), 1, &["run: chmod 600"]);
    restore(&nowhere, &bundle, 1, &["run: chmod 600"]);
    config("[store]\nallowed_prefix = []", 0o600);
    restore(&nowhere, &bundle, 1, &["line 2", "allowed_prefix"]);
    // Nobody listens on port 1.
    let store = "[store]\ntimeout_seconds = 1\n[store.s3]\nendpoint = \"http://127.0.0.1:1\"\n\
                 allow_http = true\nregion = \"r\"\naccess_key_id = \"a\"\nsecret_access_key = \"b\"";
    config(store, 0o600);
    for args in [&to[..], &["restore", "-b", &bundle, "-d", "--capsule"]] {
        let id = if args.len() == 2 { &id } else { &nobody };
        check(&[args, &["s3://b/x", id]].concat(), 1, &["check its address", "network"]);
    }
    assert!(!site.sandbox.state_root(SAMARA).join(&nobody).exists());
    assert_eq!(site.sandbox.state(SAMARA, &id)["status"], "running");
}

/// A blob that is damaged or gone is found before anything is made, where the records or the layer are concerned.
#[test]
fn a_damaged_capsule_is_refused() {
    let site = Site::new();
    let spec = site.save_counter();
    let manifest = site.read_blob(&json!(site.state().latest.unwrap().digest.to_string()));
    let layers = manifest["layers"].as_array().unwrap();
    let is_records =
        |layer: &&Value| layer["mediaType"].as_str().unwrap().contains("capsule.records");
    let records = layers.iter().find(is_records).unwrap()["digest"].as_str().unwrap();
    let blob = site.path("address/blobs").join(records.replace(':', "/"));
    let mut bytes = std::fs::read(&blob).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&blob, bytes).unwrap();
    site.refused(&spec, "samara capsule verify");
    std::fs::remove_file(&blob).unwrap();
    site.refused(&spec, "is not there");
}

/// Two copies of a job would do its work twice; the older one ends when it learns of the newer.
#[test]
fn a_copy_that_learns_of_a_newer_one_ends() {
    let site = Site::new();
    let spec = site.spec(COUNTER);
    let older = site.start(&spec);
    let newer = site.start(&spec);
    let save = ["checkpoint", "--leave-running", "--capsule", &site.address()];
    let output = site.call(&[&save[..], &[&older]].concat());
    let words = text(&output.stderr);
    assert!(!output.status.success() && words.contains("another copy"), "{words}");
    site.wait_until_stopped(&older);
    assert_eq!(site.state().latest, None);
    site.ok(&[&save[..], &[&newer]].concat());
    site.ok(&["delete", &older]);
    let state = site.state();
    assert_eq!((state.failed_resumes, state.generation, state.latest.is_some()), (0, 0, true));
    assert_eq!(site.sandbox.state(SAMARA, &newer)["status"], "running");
}
