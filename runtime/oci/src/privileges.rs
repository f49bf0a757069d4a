//! What a capsule may bring into a container: never more than the container's own program could have got by itself.
//!
//! Capabilities end at the bounding set, which the engine sees to; seccomp filters are the new specification's. Here is what
//! remains: under `no_new_privs` a program has no way to a user, group or capability that its specification does not give it, so
//! a capsule has none either. Without it, a file with a set-user-id bit is a way to every user within the bounding set, and the
//! files are the capsule's too.

use oci_spec::runtime::{LinuxDeviceType, Process, Spec};
use rustix::thread::CapabilitySet;
use samara_capsule::record::{Container, Credentials, ProcessState};
use samara_engine::files::{DeviceNode, DeviceNodes};

use crate::confine::{ConfineError, capability_sets};

/// Character devices that every container has (runtime-spec, "Default Devices"), by number.
const DEFAULT_DEVICES: [(u32, u32); 7] = [(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2)];

/// The device nodes that the files of a capsule may have.
pub(crate) fn device_nodes(spec: &Spec) -> Result<DeviceNodes, ConfineError> {
    let bounding = match spec.process() {
        Some(process) => capability_sets(process)?.bounding,
        None => CapabilitySet::empty(),
    };
    if bounding.contains(CapabilitySet::MKNOD) {
        return Ok(DeviceNodes::Any);
    }
    let default = DEFAULT_DEVICES.map(|(major, minor)| DeviceNode { block: false, major, minor });
    let given = spec.linux().as_ref().and_then(|linux| linux.devices().as_ref());
    let given = given.into_iter().flatten().filter_map(|device| {
        let block = match device.typ() {
            LinuxDeviceType::B => true,
            LinuxDeviceType::C | LinuxDeviceType::U => false,
            LinuxDeviceType::P | LinuxDeviceType::A => return None,
        };
        let major = u32::try_from(device.major()).ok()?;
        Some(DeviceNode { block, major, minor: u32::try_from(device.minor()).ok()? })
    });
    Ok(DeviceNodes::Known(default.into_iter().chain(given).collect()))
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
}
