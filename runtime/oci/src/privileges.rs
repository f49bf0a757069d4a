//! What a capsule may bring into a container: never more than the container's own program could have got by itself.
//!
//! Capabilities end at the bounding set, which the engine sees to; seccomp filters are the new specification's. Here is what
//! remains: under `no_new_privs` a program has no way to a user, group or capability that its specification does not give it, so
//! a capsule has none either. Without it, a file with a set-user-id bit is a way to every user within the bounding set, and the
//! files are the capsule's too.

use std::collections::BTreeSet;
use std::path::Path;

use oci_spec::runtime::{LinuxDeviceType, Process, Spec};
use rustix::thread::CapabilitySet;
use samara_capsule::record::{Container, Credentials, FileKind, ProcessState};
use samara_engine::files::{DeviceNode, DeviceNodes, GivenNodes};
use samara_engine::labels;

use crate::confine::{ConfineError, capability_sets};
use crate::plain_dev;

/// Character devices that every container has in /dev (runtime-spec, "Default Devices").
fn default_devices() -> impl Iterator<Item = (&'static str, DeviceNode)> {
    let multiplexer = ("ptmx", 5, 2);
    plain_dev::DEVICES
        .into_iter()
        .chain([multiplexer])
        .map(|(name, major, minor)| (name, DeviceNode { block: false, major, minor }))
}

/// The device nodes that the files of a capsule may have.
pub(crate) fn device_nodes(spec: &Spec) -> Result<DeviceNodes, ConfineError> {
    let bounding = match spec.process() {
        Some(process) => capability_sets(process)?.bounding,
        None => CapabilitySet::empty(),
    };
    if bounding.contains(CapabilitySet::MKNOD) {
        return Ok(DeviceNodes::Any);
    }
    let default = default_devices().map(|(_, node)| node);
    let given = devices(spec).map(|(_, node)| node);
    Ok(DeviceNodes::Known(default.chain(given).collect()))
}

/// What a new container of this specification finds of device nodes in a mount of its own: in /dev.
pub(crate) fn given_nodes(spec: &Spec, mount: &str) -> GivenNodes {
    if mount != "/dev" {
        return GivenNodes::default();
    }
    let default = default_devices().map(|(name, node)| (Path::new("/").join(name), node));
    let given = devices(spec).filter_map(|(path, node)| {
        let name = path.strip_prefix("/dev").ok()?;
        Some((Path::new("/").join(name), node))
    });
    GivenNodes(default.chain(given).collect())
}

/// The devices that a specification names.
fn devices(spec: &Spec) -> impl Iterator<Item = (&Path, DeviceNode)> {
    let given = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    given.into_iter().flatten().filter_map(|device| {
        let block = match device.typ() {
            LinuxDeviceType::B => true,
            LinuxDeviceType::C | LinuxDeviceType::U => false,
            LinuxDeviceType::P | LinuxDeviceType::A => return None,
        };
        let major = u32::try_from(device.major()).ok()?;
        let node = DeviceNode { block, major, minor: u32::try_from(device.minor()).ok()? };
        Some((device.path().as_path(), node))
    })
}

/// What processes of a capsule have and the program of `process` could not have got, in words.
pub(crate) fn beyond(
    process: &Process,
    container: &Container,
) -> Result<Vec<String>, ConfineError> {
    if !process.no_new_privileges().unwrap_or(false) {
        return Ok(Vec::new());
    }
    let sets = capability_sets(process)?;
    let user = process.user();
    let groups: Vec<u32> =
        user.additional_gids().iter().flatten().copied().chain([user.gid()]).collect();
    let mut reasons = Vec::new();
    for record in &container.processes {
        let ProcessState::Alive(alive) = &record.state else { continue };
        // The threads of a process share their privileges as a rule; one reason for each process is enough to act on.
        let excess = alive.threads.iter().find_map(|thread| {
            let had = &thread.credentials;
            capabilities_beyond(had, sets.bounding, sets.permitted)
                .or_else(|| {
                    if sets.permitted.contains(CapabilitySet::SETUID) {
                        return None;
                    }
                    let other = had.uids.iter().find(|uid| **uid != user.uid());
                    other.map(|uid| format!("the user {uid}"))
                })
                .or_else(|| {
                    if sets.permitted.contains(CapabilitySet::SETGID) {
                        return None;
                    }
                    let other =
                        had.gids.iter().chain(&had.groups).find(|gid| !groups.contains(gid));
                    other.map(|gid| format!("the group {gid}"))
                })
        });
        reasons.extend(excess.map(|excess| {
            format!(
                "its process {} has {excess}, which under no_new_privs the container could not have got: start it with the \
                 user and the capabilities that it was saved with",
                record.pid
            )
        }));
    }
    Ok(reasons)
}

/// Labels of security modules that threads of a capsule had and in the new container would not have, in words.
///
/// `own` is the label of whoever starts the container, which it keeps unless `process` says another profile. A profile's mode is
/// not known before a thread is under it; the engine compares that.
pub(crate) fn other_labels(
    process: &Process,
    container: &Container,
    own: Option<&[u8]>,
) -> Vec<String> {
    let profile = process.apparmor_profile().as_deref().filter(|profile| !profile.is_empty());
    let alive = container.processes.iter().filter_map(|record| match &record.state {
        ProcessState::Alive(alive) => Some(alive),
        ProcessState::Zombie { .. } => None,
    });
    let threads = alive.flat_map(|alive| &alive.threads);
    differing(profile, threads.map(|thread| thread.attributes.label.as_deref()), own)
}

fn differing<'a>(
    profile: Option<&'a str>,
    had: impl Iterator<Item = Option<&'a Vec<u8>>>,
    own: Option<&'a [u8]>,
) -> Vec<String> {
    let new = own.map(|own| profile.map_or(own, str::as_bytes));
    let had = had.map(|label| {
        let label = label?.as_slice();
        match profile {
            Some(_) => label.split(|byte| *byte == b' ').next(),
            None => Some(label),
        }
    });
    let other: BTreeSet<Option<&[u8]>> = had.filter(|had| !labels::same(*had, new)).collect();
    let shown = |label: Option<&[u8]>| match label {
        Some(label) => String::from_utf8_lossy(label).into_owned(),
        None => "none".to_owned(),
    };
    other
        .into_iter()
        .map(|had| {
            format!(
                "it was saved under the security label {}, and its threads would get {}: start it under the profile or label \
                 that it was saved with (docker's --security-opt), on a host that has it",
                shown(had),
                shown(new)
            )
        })
        .collect()
}

/// Sockets of a capsule that hear or make packets of others, which a program without `CAP_NET_RAW` can't have, in words.
pub(crate) fn raw_sockets(
    process: &Process,
    container: &Container,
) -> Result<Vec<String>, ConfineError> {
    if capability_sets(process)?.bounding.contains(CapabilitySet::NET_RAW) {
        return Ok(Vec::new());
    }
    let raw = container.files.iter().any(|file| match &file.kind {
        FileKind::Packet(_) => true,
        FileKind::Internet(socket) => {
            u32::try_from(socket.kind) == Ok(rustix::net::SocketType::RAW.as_raw())
        }
        _ => false,
    });
    let reason = "it has raw or packet sockets, which a container without CAP_NET_RAW could not have made: start it with \
                  that capability";
    Ok(raw.then(|| reason.to_owned()).into_iter().collect())
}

fn capabilities_beyond(
    had: &Credentials,
    bounding: CapabilitySet,
    permitted: CapabilitySet,
) -> Option<String> {
    let sets = had.permitted | had.effective | had.inheritable | had.ambient;
    // What lies beyond the bounding set is cut off, so that a container may be started with less.
    let excess = CapabilitySet::from_bits_retain(sets) & bounding & !permitted;
    let names: Vec<String> = excess.iter_names().map(|(name, _)| format!("CAP_{name}")).collect();
    (!excess.is_empty()).then(|| format!("the capability {}", names.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(bounding: &[&str], devices: &str) -> Spec {
        let text = format!(
            r#"{{"ociVersion": "1.0.2",
                "process": {{"user": {{}}, "cwd": "/", "capabilities": {{"bounding": {bounding:?}}}}},
                "linux": {{"devices": {devices}}}}}"#
        );
        serde_json::from_str(&text).unwrap()
    }

    /// The device rules bind a container, but not those whom a shared volume shows its nodes to.
    #[test]
    fn only_who_may_make_device_nodes_gets_any() {
        assert_eq!(device_nodes(&spec(&["CAP_MKNOD"], "[]")).unwrap(), DeviceNodes::Any);
        let fuse = r#"[{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229}]"#;
        let DeviceNodes::Known(known) = device_nodes(&spec(&["CAP_KILL"], fuse)).unwrap() else {
            panic!()
        };
        assert!(known.contains(&DeviceNode { block: false, major: 1, minor: 3 }));
        assert!(known.contains(&DeviceNode { block: false, major: 10, minor: 229 }));
        assert!(!known.contains(&DeviceNode { block: true, major: 8, minor: 0 }));
    }
    /// A container that comes back under another profile may do what it must not, or fail at what it could do.
    #[test]
    fn other_labels_are_named() {
        let docker = b"docker-default (enforce)".to_vec();
        let check = |profile, had: &[Option<&Vec<u8>>], own: Option<&[u8]>, named: &[&str]| {
            let reasons = differing(profile, had.iter().copied(), own);
            assert_eq!(reasons.len(), named.len(), "{reasons:?}");
            for (reason, name) in reasons.iter().zip(named) {
                assert!(reason.contains(name), "{reason}");
            }
        };
        let host = Some(b"unconfined".as_slice());
        check(Some("docker-default"), &[Some(&docker)], host, &[]);
        check(None, &[None, None], None, &[]);
        check(None, &[None], host, &[]);
        check(
            None,
            &[Some(&docker); 2],
            None,
            &["docker-default (enforce), and its threads would get none"],
        );
        check(None, &[Some(&docker)], host, &["would get unconfined"]);
        check(
            Some("docker-default"),
            &[None],
            host,
            &["none, and its threads would get docker-default"],
        );
        check(Some("other"), &[Some(&docker), None], host, &["label none", "label docker-default"]);
    }
}
