//! Every call that docker 20.10, docker 28 and podman make to their runtime is understood.
//!
//! The calls were recorded from the engines (docs/lifecycle.md tells how). If one stops being
//! understood, that engine stops working with us.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::path::Path;

use samara_oci::capsule_verbs::{parse_checkpoint, parse_restore};
use samara_oci::command_line::{ExecProcess, Verb, parse};
use serde::Deserialize;

#[derive(Deserialize)]
struct Call {
    engine: String,
    args: Vec<String>,
    process: Option<serde_json::Value>,
    stdin: Option<serde_json::Value>,
}

fn calls() -> Vec<(String, Call)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/fixtures/engine-calls");
    let mut calls: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap())
        })
        .collect();
    calls.sort_by(|(a, _), (b, _): &(String, Call)| a.cmp(b));
    calls
}

/// Where the verb stands: behind the flags that come before it.
fn verb_index(args: &[String]) -> usize {
    let verbs = [
        "create",
        "start",
        "state",
        "kill",
        "delete",
        "exec",
        "ps",
        "pause",
        "resume",
        "update",
        "features",
        "checkpoint",
        "restore",
    ];
    args.iter().position(|arg| verbs.contains(&arg.as_str())).unwrap()
}

#[test]
fn all_engines_are_represented() {
    let calls = calls();
    for engine in ["docker-20.10", "docker-28", "podman"] {
        let verbs: Vec<&str> = calls
            .iter()
            .filter(|(_, call)| call.engine == engine)
            .map(|(_, call)| call.args[verb_index(&call.args)].as_str())
            .collect();
        for verb in ["create", "start", "kill", "delete", "exec", "pause", "resume"] {
            assert!(verbs.contains(&verb), "{engine} {verb}");
        }
    }
}

#[test]
fn every_call_is_understood() {
    for (name, call) in calls() {
        let at = verb_index(&call.args);
        let rest = &call.args[at + 1..];
        let id = call.args.last().unwrap();
        match call.args[at].as_str() {
            "checkpoint" => {
                let checkpoint = parse_checkpoint(rest).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert_eq!(checkpoint.id.as_str(), id, "{name}");
                assert!(checkpoint.image.image_path.is_some(), "{name}");
                continue;
            }
            "restore" => {
                let restore = parse_restore(rest).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert!(restore.detach && restore.pid_file.is_some(), "{name}");
                assert!(restore.image.image_path.is_some(), "{name}");
                continue;
            }
            _ => {}
        }
        let line = parse(&call.args).unwrap_or_else(|e| panic!("{name}: {e}"));
        if call.engine.starts_with("docker") && !matches!(line.verb, Verb::Features) {
            assert!(line.global.root.is_some() && line.global.log.is_some(), "{name}");
        }
        match line.verb {
            Verb::Create(create) => {
                assert_eq!(create.id.as_str(), id, "{name}");
                assert!(create.pid_file.is_some(), "{name}");
                assert_ne!(create.bundle, Path::new("."), "{name}");
            }
            Verb::Exec(exec) => {
                assert_eq!(exec.id.as_str(), id, "{name}");
                assert!(exec.detach && matches!(exec.process, ExecProcess::File(_)), "{name}");
                let process = call.process.expect("an exec has a process file");
                let process: oci_spec::runtime::Process =
                    serde_json::from_value(process).unwrap_or_else(|e| panic!("{name}: {e}"));
                let terminal = process.terminal().unwrap_or(false);
                assert_eq!(terminal, exec.console_socket.is_some(), "{name}");
                samara_oci::confine::Confinement::new(&process, None)
                    .unwrap_or_else(|e| panic!("{name}: {e}"));
            }
            Verb::Update(update) => {
                assert_eq!(update.resources.as_deref(), Some(Path::new("-")), "{name}");
                let resources = call.stdin.expect("an update has resources");
                let resources: oci_spec::runtime::LinuxResources =
                    serde_json::from_value(resources).unwrap_or_else(|e| panic!("{name}: {e}"));
                assert!(resources.memory().is_some(), "{name}");
            }
            Verb::Kill { signal, .. } => {
                assert!(samara_oci::signal_name::parse(&signal).is_some(), "{name}");
            }
            Verb::Ps { json, .. } => assert!(json, "{name}"),
            Verb::Start { id: of }
            | Verb::Pause { id: of }
            | Verb::Resume { id: of }
            | Verb::Delete { id: of, .. } => assert_eq!(of.as_str(), id, "{name}"),
            Verb::Features => {}
            other => panic!("{name}: {other:?}"),
        }
    }
}
