//! The cgroups of a container: one folder in every hierarchy, of v1 or v2.
//!
//! libcgroups makes the folders of the controllers that it knows and sets limits; this module does
//! the rest: hierarchies that libcgroups does not know (`name=systemd`, the v2 one beside v1),
//! freezing, signalling everything inside, removal, and limits that libcgroups leaves out.

use std::io;
use std::path::{Path, PathBuf};

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, ControllerOpt, FreezerState,
    create_cgroup_manager,
};
use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType, LinuxResources};
use procfs::Current as _;
use serde::{Deserialize, Serialize};

use crate::process::ProcessIdentity;
use crate::signal_name::SignalNumber;

/// Where every host of ours has them.
const ROOT: &str = "/sys/fs/cgroup";
/// Magic number of cgroup2 (linux/magic.h).
const CGROUP2_MAGIC: i64 = 0x6367_7270;

#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    #[error("cannot {attempt} {path}")]
    Io { attempt: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot find the cgroup manager")]
    Manager(#[from] libcgroups::common::CreateCgroupSetupError),
    #[error("cgroup: {attempt} failed")]
    Library { attempt: &'static str, source: libcgroups::common::AnyManagerError },
    #[error("cannot read the cgroups of process {pid}")]
    OfProcess { pid: i32, source: procfs::ProcError },
    #[error("the systemd cgroup driver (--systemd-cgroup) needs cgroup v2, this host has v1")]
    SystemdOnV1,
}

/// Whether the host has the unified hierarchy alone.
pub fn is_unified() -> bool {
    rustix::fs::statfs(ROOT).is_ok_and(|stat| stat.f_type == CGROUP2_MAGIC)
}

/// A container's cgroups, as they are kept on disk.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cgroup {
    /// As in the specification given to libcontainer.
    pub path: PathBuf,
    pub systemd: bool,
    pub name: String,
    /// Absolute folders, with the controllers of their hierarchy.
    pub folders: Vec<Folder>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Folder {
    /// Empty for the v2 hierarchy.
    pub controllers: Vec<String>,
    pub path: PathBuf,
}

impl Cgroup {
    /// Finds the folders of the container whose init is `pid`. A hierarchy in which it is in no
    /// cgroup of its own is left out.
    pub fn of_process(
        pid: i32,
        path: PathBuf,
        systemd: bool,
        name: &str,
    ) -> Result<Self, CgroupError> {
        let last = if systemd { None } else { path.file_name().map(|n| n.to_owned()) };
        let memberships = procfs::process::Process::new(pid)
            .and_then(|process| process.cgroups())
            .map_err(|source| CgroupError::OfProcess { pid, source })?;
        let mounts = hierarchies().map_err(|source| CgroupError::OfProcess { pid, source })?;
        let folders = memberships
            .0
            .into_iter()
            .filter_map(|membership| {
                let inside = Path::new(&membership.pathname);
                let own = match &last {
                    Some(last) => inside.file_name() == Some(last),
                    None => inside != Path::new("/"),
                };
                let mount = mounts.iter().find(|m| m.controllers == membership.controllers)?;
                let below = inside.strip_prefix("/").unwrap_or(inside);
                own.then(|| Folder {
                    controllers: membership.controllers,
                    path: mount.path.join(below),
                })
            })
            .collect();
        Ok(Self { path, systemd, name: name.to_owned(), folders })
    }

    pub fn manager(&self) -> Result<AnyCgroupManager, CgroupError> {
        Ok(create_cgroup_manager(CgroupConfig {
            cgroup_path: self.path.clone(),
            systemd_cgroup: self.systemd,
            container_name: self.name.clone(),
        })?)
    }

    /// The folder of the hierarchy with `controller`; of v2 if it has all.
    pub fn folder(&self, controller: &str) -> Option<&Path> {
        let v1 = |folder: &&Folder| folder.controllers.iter().any(|c| c == controller);
        let v2 = |folder: &&Folder| folder.controllers.is_empty() && is_unified();
        self.folders
            .iter()
            .find(v1)
            .or_else(|| self.folders.iter().find(v2))
            .map(|folder| folder.path.as_path())
    }

    /// How much more memory the container could have, in bytes, before a limit of its own or above it counts, or before the host has
    /// none. What the kernel can take back at once counts as free.
    pub fn spare_memory(&self) -> u64 {
        let host = procfs::Meminfo::current().ok().and_then(|info| info.mem_available);
        let folders = self.folder("memory").into_iter().flat_map(Path::ancestors);
        let below_root = folders.take_while(|folder| *folder != Path::new(ROOT));
        below_root.filter_map(spare_below_limit).chain(host).min().unwrap_or(0)
    }

    pub fn is_frozen(&self) -> bool {
        let Some(folder) = self.folder("freezer") else { return false };
        let (file, frozen) =
            if is_unified() { ("cgroup.freeze", "1") } else { ("freezer.self_freezing", "1") };
        std::fs::read_to_string(folder.join(file)).is_ok_and(|text| text.trim() == frozen)
    }

    pub fn freeze(&self) -> Result<(), CgroupError> {
        self.set_freezer(FreezerState::Frozen, "freezing")
    }

    pub fn thaw(&self) -> Result<(), CgroupError> {
        self.set_freezer(FreezerState::Thawed, "thawing")
    }

    fn set_freezer(&self, state: FreezerState, attempt: &'static str) -> Result<(), CgroupError> {
        self.manager()?.freeze(state).map_err(|source| CgroupError::Library { attempt, source })
    }

    /// Every process in the container, those of cgroups below it included.
    pub fn processes(&self) -> Vec<i32> {
        // Any hierarchy would do; these are the ones that every container is in.
        let folder = self
            .folder("devices")
            .or_else(|| self.folder("freezer"))
            .or_else(|| self.folders.first().map(|folder| folder.path.as_path()));
        let mut processes = Vec::new();
        if let Some(folder) = folder {
            collect_processes(folder, &mut processes);
        }
        processes
    }

    /// Signals every process in the container. They are frozen meanwhile, so that none escapes by
    /// forking; a container that was paused stays so, except for SIGKILL, which takes effect only
    /// when it runs.
    pub fn signal_all(&self, signal: SignalNumber) -> Result<(), CgroupError> {
        if signal == SignalNumber::KILL && self.kill_by_file() {
            return Ok(());
        }
        let was_frozen = self.is_frozen();
        // A cgroup without a freezer is signalled all the same.
        let _ = self.freeze();
        for pid in self.processes() {
            if let Some(process) = ProcessIdentity::of(pid) {
                // A process that has just ended is what the caller wants.
                let _ = process.signal(signal);
            }
        }
        if !was_frozen || signal == SignalNumber::KILL { self.thaw() } else { Ok(()) }
    }

    /// cgroup v2 since Linux 5.14.
    fn kill_by_file(&self) -> bool {
        is_unified()
            && self
                .folder("freezer")
                .is_some_and(|folder| std::fs::write(folder.join("cgroup.kill"), "1").is_ok())
    }

    /// Sets the limits that libcgroups leaves out.
    pub fn apply_rest(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        if is_unified() {
            return Ok(());
        }
        let disables =
            resources.memory().as_ref().is_some_and(|m| m.disable_oom_killer() == Some(true));
        if let Some(folder) = self.folder("memory").filter(|_| disables) {
            write(&folder.join("memory.oom_control"), "1")?;
        }
        if let (Some(cpu), Some(folder)) = (resources.cpu(), self.folder("cpu")) {
            // libcgroups looks at the burst only where another value is set.
            if let Some(burst) = cpu.burst() {
                write(&folder.join("cpu.cfs_burst_us"), &burst.to_string())?;
            }
        }
        if let (Some(io), Some(folder)) = (resources.block_io(), self.folder("blkio")) {
            for device in io.weight_device().iter().flatten() {
                let Some(weight) = device.weight().filter(|&weight| weight != 0) else { continue };
                let line = format!("{}:{} {weight}", device.major(), device.minor());
                let plain = folder.join("blkio.weight_device");
                let file =
                    if plain.exists() { plain } else { folder.join("blkio.bfq.weight_device") };
                write(&file, &line)?;
            }
        }
        Ok(())
    }

    /// Takes back what libcgroups allows every container of v1 beyond runc: the host's own
    /// console. `resources` are those of the specification, which may allow it.
    pub fn deny_host_console(&self, resources: Option<&LinuxResources>) -> Result<(), CgroupError> {
        let rules = resources.and_then(|resources| resources.devices().as_ref());
        // Later rules count more.
        let allowed = rules.into_iter().flatten().rev().find(|rule| covers_console(rule));
        match self.folder("devices") {
            Some(folder) if !is_unified() && !allowed.is_some_and(|rule| rule.allow()) => {
                write(&folder.join("devices.deny"), "c 5:1 rwm")
            }
            _ => Ok(()),
        }
    }

    /// Changes limits of the running container.
    pub fn update(&self, resources: &LinuxResources) -> Result<(), CgroupError> {
        let options = ControllerOpt {
            resources,
            disable_oom_killer: resources
                .memory()
                .as_ref()
                .and_then(|memory| memory.disable_oom_killer())
                .unwrap_or(false),
            oom_score_adj: None,
            freezer_state: None,
        };
        self.manager()?
            .apply(&options)
            .map_err(|source| CgroupError::Library { attempt: "setting limits", source })?;
        self.apply_rest(resources)
    }

    /// Removes the folders, those below them first. Fails while a process is inside.
    pub fn remove(&self) -> Result<(), CgroupError> {
        let mut outcome = Ok(());
        for folder in &self.folders {
            // One that resists is no reason to leave the others.
            outcome = outcome.and(remove_tree(&folder.path));
        }
        outcome
    }
}

fn covers_console(rule: &LinuxDeviceCgroup) -> bool {
    let of_kind = match rule.typ() {
        None | Some(LinuxDeviceType::A | LinuxDeviceType::C | LinuxDeviceType::U) => true,
        Some(LinuxDeviceType::B | LinuxDeviceType::P) => false,
    };
    let is = |number: Option<i64>, wanted| number.is_none_or(|n| n == -1 || n == wanted);
    of_kind && is(rule.major(), 5) && is(rule.minor(), 1)
}

struct Hierarchy {
    controllers: Vec<String>,
    path: PathBuf,
}

/// The mounted hierarchies, with controllers as /proc/PID/cgroup names them.
fn hierarchies() -> procfs::ProcResult<Vec<Hierarchy>> {
    let mounts = procfs::process::Process::myself()?.mountinfo()?;
    let named = procfs::process::Process::myself()?.cgroups()?;
    let unified = is_unified();
    Ok(mounts
        .0
        .into_iter()
        .filter(|mount| mount.root == "/" && mount.mount_point.starts_with(ROOT))
        // On a host with v2 alone, anything further down is covered.
        .filter(|mount| !unified || mount.mount_point == Path::new(ROOT))
        .filter_map(|mount| match mount.fs_type.as_str() {
            "cgroup2" => Some(Hierarchy { controllers: Vec::new(), path: mount.mount_point }),
            "cgroup" => named
                .0
                .iter()
                .map(|membership| &membership.controllers)
                .find(|controllers| {
                    !controllers.is_empty()
                        && controllers.iter().all(|controller| {
                            match controller.strip_prefix("name=") {
                                Some(name) => mount
                                    .super_options
                                    .get("name")
                                    .is_some_and(|value| value.as_deref() == Some(name)),
                                None => mount.super_options.contains_key(controller),
                            }
                        })
                })
                .map(|controllers| Hierarchy {
                    controllers: controllers.clone(),
                    path: mount.mount_point,
                }),
            _ => None,
        })
        .collect())
}

/// The calling process' places in hierarchies that libcgroups does not know.
///
/// The container's processes inherit the place of the process that makes them, so `join` moves
/// this process for a while; dropping the value brings it back.
#[derive(Debug)]
pub struct Elsewhere {
    back: Vec<PathBuf>,
}

/// The hierarchies that libcgroups' v1 manager joins by itself.
const KNOWN_TO_LIBCGROUPS: &[&str] = &[
    "cpu",
    "cpuacct",
    "cpuset",
    "devices",
    "hugetlb",
    "memory",
    "pids",
    "perf_event",
    "blkio",
    "net_prio",
    "net_cls",
    "freezer",
];

impl Elsewhere {
    /// Moves this process into `path` of every other hierarchy. A hierarchy that refuses is left
    /// out, as runc does: it controls nothing.
    pub fn join(path: &Path) -> Self {
        let mut elsewhere = Self { back: Vec::new() };
        if is_unified() {
            return elsewhere;
        }
        let own = procfs::process::Process::myself().and_then(|me| me.cgroups());
        let (Ok(own), Ok(hierarchies)) = (own, hierarchies()) else { return elsewhere };
        for hierarchy in hierarchies {
            let known = |c: &String| KNOWN_TO_LIBCGROUPS.contains(&c.as_str());
            if hierarchy.controllers.iter().any(known) {
                continue;
            }
            let target = hierarchy.path.join(path.strip_prefix("/").unwrap_or(path));
            let home = own
                .0
                .iter()
                .find(|membership| membership.controllers == hierarchy.controllers)
                .map(|membership| hierarchy.path.join(membership.pathname.trim_start_matches('/')));
            let joined = std::fs::create_dir_all(&target)
                .and_then(|()| std::fs::write(target.join("cgroup.procs"), "0"));
            if let (Ok(()), Some(home)) = (joined, home) {
                elsewhere.back.push(home);
            }
        }
        elsewhere
    }
}

impl Elsewhere {
    /// Leaves this process where it is: it ends soon, and each move costs milliseconds.
    pub fn stay(mut self) {
        self.back.clear();
    }
}

impl Drop for Elsewhere {
    fn drop(&mut self) {
        for home in &self.back {
            // Where that fails this process just ends in the container's cgroup.
            let _ = std::fs::write(home.join("cgroup.procs"), "0");
        }
    }
}

/// Moves the calling process to the root of every hierarchy, as far as that is allowed.
pub fn leave_all() {
    let own = procfs::process::Process::myself().and_then(|me| me.cgroups());
    let (Ok(own), Ok(hierarchies)) = (own, hierarchies()) else { return };
    for hierarchy in hierarchies {
        // A move makes the whole host wait for some milliseconds, so none is made in vain.
        let elsewhere =
            own.0.iter().any(|own| own.controllers == hierarchy.controllers && own.pathname != "/");
        if elsewhere {
            // On v1 and v2 a process may always be in the root; without the right to, it stays.
            let _ = std::fs::write(hierarchy.path.join("cgroup.procs"), "0");
        }
    }
}

/// Removes what `create` left of a container that never came to be: cgroups named by `path`.
pub fn remove_by_path(path: &Path) {
    for hierarchy in hierarchies().unwrap_or_default() {
        let folder = hierarchy.path.join(path.strip_prefix("/").unwrap_or(path));
        if folder != hierarchy.path {
            // Best effort: the failure that brought us here is what the user must see.
            let _ = remove_tree(&folder);
        }
    }
}

fn collect_processes(folder: &Path, into: &mut Vec<i32>) {
    let text = std::fs::read_to_string(folder.join("cgroup.procs")).unwrap_or_default();
    into.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()).filter(|&pid| pid > 0));
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            collect_processes(&entry.path(), into);
        }
    }
}

/// A killed process leaves its cgroup some time after it is gone: mostly at once, on a busy host
/// later. Pauses double from the first to the longest; all together last some 2 s.
const REMOVE_TRIES: u32 = 200;
const REMOVE_PAUSE_MIN: std::time::Duration = std::time::Duration::from_micros(100);
const REMOVE_PAUSE_MAX: std::time::Duration = std::time::Duration::from_millis(10);

fn remove_tree(folder: &Path) -> Result<(), CgroupError> {
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path())?;
        }
    }
    let mut tries = 0;
    let mut pause = REMOVE_PAUSE_MIN;
    loop {
        tries += 1;
        match std::fs::remove_dir(folder) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::ResourceBusy && tries < REMOVE_TRIES => {
                std::thread::sleep(pause);
                pause = (pause * 2).min(REMOVE_PAUSE_MAX);
            }
            Err(source) => {
                return Err(CgroupError::Io {
                    attempt: "remove the cgroup",
                    path: folder.to_owned(),
                    source,
                });
            }
        }
    }
}

fn write(path: &Path, text: &str) -> Result<(), CgroupError> {
    std::fs::write(path, text).map_err(|source| CgroupError::Io {
        attempt: "set a limit in",
        path: path.to_owned(),
        source,
    })
}

/// What is left below the limit of one memory cgroup, in bytes; none where there is no limit.
fn spare_below_limit(folder: &Path) -> Option<u64> {
    let number = |file: &str| -> Option<u64> {
        std::fs::read_to_string(folder.join(file)).ok()?.trim().parse().ok()
    };
    let (limits, usage, cache) = match is_unified() {
        true => (["memory.max", "memory.high"].as_slice(), "memory.current", "inactive_file"),
        false => {
            (["memory.limit_in_bytes"].as_slice(), "memory.usage_in_bytes", "total_inactive_file")
        }
    };
    let limit = limits.iter().filter_map(|file| number(file)).min()?;
    let statistics = std::fs::read_to_string(folder.join("memory.stat")).unwrap_or_default();
    let cache = statistics.lines().find_map(|line| {
        let (name, bytes) = line.split_once(' ')?;
        (name == cache).then(|| bytes.parse::<u64>().ok())?
    });
    let used = number(usage)?.saturating_sub(cache.unwrap_or(0));
    Some(limit.saturating_sub(used))
}
