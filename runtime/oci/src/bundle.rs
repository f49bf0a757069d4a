//! A bundle: the `config.json` that an engine wrote, read once, checked once.
//!
//! Two things come of it: a list of demands that nobody would carry out, which refuses the bundle,
//! and the specification that libcontainer is handed (`Bundle::for_libcontainer`), which differs
//! from the engine's in the parts that our own executor does (docs/decisions/process-confinement.md).
//! On disk, `state`, `exec`, `update` and `delete` see the engine's own.

use std::collections::HashMap;
use std::io::Read;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{
    Linux, LinuxBlockIo, LinuxCpu, LinuxDeviceCgroup, LinuxMemory, LinuxNamespace,
    LinuxNamespaceType, LinuxResources, LinuxTimeOffset, Mount, Process, Root, Spec, User,
};
use sha2::{Digest, Sha256};

use crate::container_id::ContainerId;
use crate::create::{Init, TimeOffsets};
use crate::hooks;

/// A specification is at most this long: the longest that we have seen, docker's with a large
/// seccomp profile, has 40 KiB; a limit keeps a broken engine from filling our memory.
const CONFIG_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    #[error(
        "there is no bundle in {path}: it has to be a folder with a config.json; name it with --bundle"
    )]
    None { path: PathBuf },
    #[error("cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{path} is longer than {CONFIG_BYTES_MAX} bytes")]
    TooLong { path: PathBuf },
    #[error("{path} is not a container specification")]
    Parse { path: PathBuf, source: serde_json::Error },
    #[error("config.json: {field} is missing")]
    Missing { field: &'static str },
    /// A demand that is not carried out is refused, never ignored.
    #[error("config.json: {field} is not supported: {reason}")]
    Refused { field: String, reason: &'static str },
    #[error("config.json: root.path {path} cannot be used")]
    Rootfs { path: PathBuf, source: std::io::Error },
}

/// A specification whose demands are all carried out by somebody.
#[derive(Debug)]
pub struct Bundle {
    pub spec: Spec,
    /// The folder, absolute.
    pub path: PathBuf,
    pub rootfs: PathBuf,
    /// `config.json` as the engine wrote it.
    pub config: Vec<u8>,
}

impl Bundle {
    /// Reads and checks the bundle in `folder`.
    pub fn load(folder: &Path) -> Result<Self, BundleError> {
        let path = std::fs::canonicalize(folder).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => BundleError::None { path: folder.to_owned() },
            _ => BundleError::Read { path: folder.to_owned(), source },
        })?;
        let config_path = path.join("config.json");
        if !config_path.exists() {
            return Err(BundleError::None { path });
        }
        let config = read_bounded(&config_path)?;
        let mut spec = parse(&config_path, &config)?;
        let root = spec.root().as_ref().ok_or(BundleError::Missing { field: "root" })?;
        let joined = path.join(root.path());
        let rootfs = std::fs::canonicalize(&joined)
            .map_err(|source| BundleError::Rootfs { path: joined, source })?;
        drop_empty_values(&mut spec);
        refuse_unsupported(&spec)?;
        Ok(Self { spec, path, rootfs, config })
    }

    /// Reads the specification that `create` kept; it was checked then.
    pub fn reload(config_path: &Path) -> Result<Spec, BundleError> {
        let config = read_bounded(config_path)?;
        let mut spec = parse(config_path, &config)?;
        drop_empty_values(&mut spec);
        Ok(spec)
    }

    pub fn process(&self) -> Result<&Process, BundleError> {
        self.spec.process().as_ref().ok_or(BundleError::Missing { field: "process" })
    }

    pub fn linux(&self) -> Result<&Linux, BundleError> {
        self.spec.linux().as_ref().ok_or(BundleError::Missing { field: "linux" })
    }

    /// `sha256:` and the digest of `config.json`.
    pub fn config_digest(&self) -> String {
        Sha256::digest(&self.config).iter().fold("sha256:".to_owned(), |mut text, byte| {
            text.push_str(&format!("{byte:02x}"));
            text
        })
    }

    /// The specification for libcontainer: the same namespaces, mounts, cgroups and devices, but a
    /// process of root that keeps everything, since the executor confines it.
    pub fn for_libcontainer(
        &self,
        cgroup_path: &Path,
        relay: &hooks::Relay,
        init: &Init,
    ) -> Result<Spec, BundleError> {
        let mut spec = self.spec.clone();
        let mut root = Root::default();
        root.set_path(self.rootfs.clone());
        root.set_readonly(spec.root().as_ref().and_then(Root::readonly));
        spec.set_root(Some(root));
        let process = match init {
            Init::Program => unconfined(self.process()?),
            Init::Blank { .. } => blank(self.process()?),
        };
        spec.set_process(Some(process));
        spec.set_hooks(relay.wrap(self.spec.hooks().as_ref()));
        spec.set_mounts(
            spec.mounts().as_ref().map(|mounts| mounts.iter().map(plain_mount).collect()),
        );
        let mut linux = self.linux()?.clone();
        linux.set_cgroups_path(Some(cgroup_path.to_owned()));
        linux.set_seccomp(None);
        linux.set_resources(Some(resources_for_libcgroups(linux.resources().as_ref())));
        if let Init::Blank { offsets } = init {
            add_time_namespace(&mut linux, *offsets);
        }
        spec.set_linux(Some(linux));
        Ok(spec)
    }
}

/// `cgroupsPath`, absolute. Without one, the container's name directly under the root.
pub fn cgroup_path(linux: &Linux, id: &ContainerId, systemd: bool) -> Result<PathBuf, BundleError> {
    match linux.cgroups_path() {
        None => Ok(PathBuf::from(format!("/{id}"))),
        Some(path) if systemd => Ok(path.clone()),
        Some(path) if path.is_absolute() => Ok(path.clone()),
        Some(path) if path.to_string_lossy().matches(':').count() == 2 => {
            Err(BundleError::Refused {
                field: "linux.cgroupsPath".to_owned(),
                reason: "slice:prefix:name needs --systemd-cgroup",
            })
        }
        Some(path) => Ok(Path::new("/").join(path)),
    }
}

fn read_bounded(path: &Path) -> Result<Vec<u8>, BundleError> {
    let read = |source| BundleError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(read)?;
    let mut bytes = Vec::new();
    file.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(read)?;
    if bytes.len() as u64 > CONFIG_BYTES_MAX {
        return Err(BundleError::TooLong { path: path.to_owned() });
    }
    Ok(bytes)
}

fn parse(path: &Path, config: &[u8]) -> Result<Spec, BundleError> {
    serde_json::from_slice(config)
        .map_err(|source| BundleError::Parse { path: path.to_owned(), source })
}

/// Go writes the empty string where nothing is meant.
fn drop_empty_values(spec: &mut Spec) {
    if let Some(process) = spec.process_mut() {
        drop_empty_process_values(process);
    }
    if let Some(linux) = spec.linux_mut() {
        let label = linux.mount_label().clone().filter(|label| !label.is_empty());
        linux.set_mount_label(label);
        let path = linux.cgroups_path().clone().filter(|path| !path.as_os_str().is_empty());
        linux.set_cgroups_path(path);
        let namespaces = linux.namespaces().as_ref().map(|all| {
            all.iter()
                .cloned()
                .map(|mut namespace| {
                    let path = namespace.path().clone().filter(|p| !p.as_os_str().is_empty());
                    namespace.set_path(path);
                    namespace
                })
                .collect()
        });
        linux.set_namespaces(namespaces);
    }
}

pub(crate) fn drop_empty_process_values(process: &mut Process) {
    let profile = process.apparmor_profile().clone().filter(|profile| !profile.is_empty());
    process.set_apparmor_profile(profile);
    let label = process.selinux_label().clone().filter(|label| !label.is_empty());
    process.set_selinux_label(label);
}

/// What neither libcontainer nor we carry out.
fn refuse_unsupported(spec: &Spec) -> Result<(), BundleError> {
    if let Some(process) = spec.process() {
        refuse_unsupported_process(process)?;
    }
    let Some(linux) = spec.linux() else { return Err(BundleError::Missing { field: "linux" }) };
    if linux.mount_label().is_some() && !Path::new("/sys/fs/selinux").exists() {
        return refuse("linux.mountLabel", "SELinux is not enabled on this host");
    }
    for (index, mount) in spec.mounts().iter().flatten().enumerate() {
        let mapped = mount.uid_mappings().is_some()
            || mount.gid_mappings().is_some()
            || options(mount).any(|option| matches!(option, "idmap" | "ridmap"));
        if mapped {
            return refuse(
                &format!("mounts[{index}] (idmap)"),
                "id-mapped mounts are not implemented",
            );
        }
    }
    refuse_unsupported_resources(linux.resources().as_ref())
}

pub(crate) fn refuse_unsupported_process(process: &Process) -> Result<(), BundleError> {
    if process.selinux_label().is_some() {
        return refuse("process.selinuxLabel", "SELinux labels are not implemented");
    }
    Ok(())
}

/// Checks `resources` of a bundle or an `update`.
pub(crate) fn refuse_unsupported_resources(
    resources: Option<&LinuxResources>,
) -> Result<(), BundleError> {
    let Some(resources) = resources else { return Ok(()) };
    if resources.rdma().as_ref().is_some_and(|rdma| !rdma.is_empty()) {
        return refuse("linux.resources.rdma", "the rdma controller is not implemented");
    }
    let unified = crate::cgroup::is_unified();
    if !unified && resources.unified().as_ref().is_some_and(|unified| !unified.is_empty()) {
        return refuse("linux.resources.unified", "this host has cgroup v1");
    }
    if let Some(memory) = resources.memory() {
        if kernel_memory(memory).is_some_and(|bytes| bytes > 0) {
            return refuse(
                "linux.resources.memory.kernel",
                "Linux has no separate limit for kernel memory since 5.4",
            );
        }
        if unified && memory.disable_oom_killer() == Some(true) {
            return refuse(
                "linux.resources.memory.disableOOMKiller",
                "cgroup v2 cannot switch the OOM killer off",
            );
        }
    }
    if let Some(io) = resources.block_io() {
        if io.leaf_weight().is_some_and(|weight| weight != 0) {
            return refuse(
                "linux.resources.blockIO.leafWeight",
                "Linux has no leaf weights since 5.0",
            );
        }
        let leaf =
            |w: &oci_spec::runtime::LinuxWeightDevice| w.leaf_weight().is_some_and(|l| l != 0);
        if io.weight_device().iter().flatten().any(leaf) {
            return refuse(
                "linux.resources.blockIO.weightDevice.leafWeight",
                "Linux has no leaf weights since 5.0",
            );
        }
    }
    Ok(())
}

fn kernel_memory(memory: &LinuxMemory) -> Option<i64> {
    memory.kernel()
}

fn refuse<T>(field: &str, reason: &'static str) -> Result<T, BundleError> {
    Err(BundleError::Refused { field: field.to_owned(), reason })
}

fn options(mount: &Mount) -> impl Iterator<Item = &str> {
    mount.options().iter().flatten().map(String::as_str)
}

/// `process` with everything left in place that the executor takes away.
pub(crate) fn unconfined(process: &Process) -> Process {
    let mut open = process.clone();
    let mut user = User::default();
    user.set_umask(process.user().umask());
    open.set_user(user);
    // None, not empty: libcontainer then touches no capability.
    open.set_capabilities(None);
    open.set_no_new_privileges(None);
    open.set_rlimits(None);
    open.set_cwd("/".into());
    open.set_env(Some(Vec::new()));
    if open.args().is_none() {
        open.set_args(Some(Vec::new()));
    }
    open
}

/// `unconfined`, and without labels, priorities or affinity: a restore brings the saved ones.
fn blank(process: &Process) -> Process {
    let mut open = unconfined(process);
    open.set_apparmor_profile(None);
    open.set_selinux_label(None);
    open.set_io_priority(None);
    open.set_scheduler(None);
    let mut user = open.user().clone();
    user.set_umask(None);
    open.set_user(user);
    open
}

fn add_time_namespace(linux: &mut Linux, offsets: TimeOffsets) {
    let mut namespaces = linux.namespaces().clone().unwrap_or_default();
    namespaces.retain(|namespace| namespace.typ() != LinuxNamespaceType::Time);
    let mut time = LinuxNamespace::default();
    time.set_typ(LinuxNamespaceType::Time);
    namespaces.push(time);
    linux.set_namespaces(Some(namespaces));
    let offset = |of: crate::create::ClockOffset| {
        let mut offset = LinuxTimeOffset::default();
        offset.set_secs(Some(of.seconds));
        offset.set_nanosecs(Some(of.nanoseconds));
        offset
    };
    linux.set_time_offsets(Some(HashMap::from([
        ("monotonic".to_owned(), offset(offsets.monotonic)),
        ("boottime".to_owned(), offset(offsets.boottime)),
    ])));
}

/// A mount without the options that `mounts` carries out in the container; libcontainer would
/// ignore the first kind and pass the second to a file system that does not know it.
fn plain_mount(mount: &Mount) -> Mount {
    let mut plain = mount.clone();
    plain.set_options(Some(
        options(mount)
            .filter(|option| {
                crate::mounts::propagation(option).is_none() && *option != crate::mounts::COPY_UP
            })
            .map(str::to_owned)
            .collect(),
    ));
    plain
}

/// `resources` as libcgroups carries them out like runc: zero means "as it is", and devices are
/// denied unless allowed.
pub(crate) fn resources_for_libcgroups(resources: Option<&LinuxResources>) -> LinuxResources {
    let mut resources = resources.cloned().unwrap_or_default();
    let mut rules = resources.devices().clone().unwrap_or_default();
    if rules.first().is_none_or(|first| first.allow() || first.typ().is_some_and(is_specific)) {
        let mut deny_all = LinuxDeviceCgroup::default();
        deny_all.set_access(Some("rwm".to_owned()));
        rules.insert(0, deny_all);
    }
    resources.set_devices(Some(rules));
    update_for_libcgroups(resources)
}

fn is_specific(typ: oci_spec::runtime::LinuxDeviceType) -> bool {
    typ != oci_spec::runtime::LinuxDeviceType::A
}

/// The same for an `update`, which leaves devices as they are.
pub(crate) fn update_for_libcgroups(mut resources: LinuxResources) -> LinuxResources {
    resources.set_cpu(resources.cpu().as_ref().map(nonzero_cpu));
    resources.set_memory(resources.memory().as_ref().map(nonzero_memory));
    resources.set_block_io(resources.block_io().as_ref().map(nonzero_io));
    resources.set_pids(resources.pids().filter(|pids| pids.limit() != 0));
    resources
}

fn nonzero_cpu(cpu: &LinuxCpu) -> LinuxCpu {
    let mut cpu = cpu.clone();
    cpu.set_shares(cpu.shares().filter(|&v| v != 0));
    cpu.set_quota(cpu.quota().filter(|&v| v != 0));
    cpu.set_period(cpu.period().filter(|&v| v != 0));
    cpu.set_realtime_runtime(cpu.realtime_runtime().filter(|&v| v != 0));
    cpu.set_realtime_period(cpu.realtime_period().filter(|&v| v != 0));
    let cpus = cpu.cpus().clone().filter(|cpus| !cpus.is_empty());
    cpu.set_cpus(cpus);
    let mems = cpu.mems().clone().filter(|mems| !mems.is_empty());
    cpu.set_mems(mems);
    cpu
}

fn nonzero_memory(memory: &LinuxMemory) -> LinuxMemory {
    let mut memory = *memory;
    memory.set_limit(memory.limit().filter(|&v| v != 0));
    memory.set_swap(memory.swap().filter(|&v| v != 0));
    memory.set_reservation(memory.reservation().filter(|&v| v != 0));
    memory.set_kernel(None);
    memory.set_kernel_tcp(memory.kernel_tcp().filter(|&v| v != 0));
    memory
}

fn nonzero_io(io: &LinuxBlockIo) -> LinuxBlockIo {
    let mut io = io.clone();
    io.set_weight(io.weight().filter(|&v| v != 0));
    io.set_leaf_weight(None);
    io
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(json: &str) -> Spec {
        let mut spec = parse(Path::new("config.json"), json.as_bytes()).unwrap();
        drop_empty_values(&mut spec);
        spec
    }

    #[track_caller]
    fn refused(json: &str, field: &str) {
        let error = refuse_unsupported(&spec(json)).unwrap_err().to_string();
        assert!(error.contains(field), "{error}");
    }

    #[test]
    fn demands_that_nobody_carries_out_are_refused_by_name() {
        refused(
            r#"{"linux": {}, "process": {"user": {}, "cwd": "/", "selinuxLabel": "a:b:c"}}"#,
            "process.selinuxLabel",
        );
        refused(
            r#"{"linux": {}, "mounts": [{"destination": "/x", "options": ["idmap"]}]}"#,
            "mounts[0]",
        );
        refused(
            r#"{"linux": {"resources": {"rdma": {"mlx5_1": {"hcaHandles": 3}}}}}"#,
            "linux.resources.rdma",
        );
        refused(
            r#"{"linux": {"resources": {"memory": {"kernel": 1048576}}}}"#,
            "linux.resources.memory.kernel",
        );
    }

    #[test]
    fn what_go_leaves_empty_is_no_demand() {
        let empty = spec(
            r#"{"linux": {"mountLabel": "", "namespaces": [{"type": "network", "path": ""}]},
                "process": {"user": {}, "cwd": "/", "selinuxLabel": "", "apparmorProfile": ""}}"#,
        );
        refuse_unsupported(&empty).unwrap();
        assert!(empty.process().as_ref().unwrap().apparmor_profile().is_none());
    }

    /// libcgroups denies nothing unless told to; runc starts from "deny all".
    #[test]
    fn devices_are_denied_unless_allowed() {
        let rules = |json| {
            let resources: LinuxResources = serde_json::from_str(json).unwrap();
            resources_for_libcgroups(Some(&resources)).devices().clone().unwrap()
        };
        assert!(!rules("{}")[0].allow());
        assert_eq!(rules(r#"{"devices": [{"allow": false, "access": "rwm"}]}"#).len(), 1);
        let one =
            rules(r#"{"devices": [{"allow": true, "type": "c", "major": 1, "access": "r"}]}"#);
        assert_eq!(one.len(), 2);
        assert!(!one[0].allow());
    }

    #[test]
    fn an_update_with_zeros_changes_nothing() {
        let resources = serde_json::from_str(
            r#"{"cpu": {"shares": 0, "quota": 0, "cpus": ""}, "memory": {"limit": 0, "swap": 0},
                "pids": {"limit": 0}, "blockIO": {"weight": 0}}"#,
        )
        .unwrap();
        let update = update_for_libcgroups(resources);
        assert_eq!(update.cpu().as_ref().unwrap(), &LinuxCpu::default());
        assert_eq!(update.memory().as_ref().unwrap().limit(), None);
        assert!(update.pids().is_none());
    }
}
