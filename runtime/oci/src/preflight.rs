//! What a saved container takes, against what its new container and this host have: all that falls short is found at once, and
//! before anything is made.
//!
//! What is not here: whether the host is of the right kind (processor, kernel, image), which [`crate::restore`] looks at, and what
//! the configuration does not allow ([`crate::privileges`]).

use std::fs;
use std::io;
use std::ops::RangeInclusive;
use std::path::Path;

use oci_spec::runtime::Spec;
use rustix::fs::statvfs;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capabilities};
use samara_capsule::config::Statistics;
use samara_capsule::record::ProcessState;

use crate::saved::{ROOT_STREAM, Saved};

/// What a restore takes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Needs {
    memory_bytes: u64,
    /// Processes and threads.
    tasks: u64,
    /// Descriptor numbers that a process has to have: one more than the highest.
    descriptors: u64,
    /// The address space of the process that has most.
    mapped_bytes: u64,
    /// Pending signals, and timers, which hold a place in the queue of signals.
    signals: u64,
    /// What the container has changed in its root.
    root_bytes: u64,
    /// Mount points of the file systems in memory, and what they hold.
    trees: Vec<(String, u64)>,
}

/// What this host has. A limit that is none is `u64::MAX`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Host {
    memory_bytes: u64,
    swap_bytes: u64,
    /// Where the changes to the container's root go.
    free_bytes: u64,
    /// Of what is made again, before it gets its own limits.
    descriptors_max: u64,
    mapped_bytes_max: u64,
    signals_max: u64,
    /// Numbers of the processors and of the memory nodes that are online, as the kernel lists them: `0-3,8`.
    processors: String,
    memory_nodes: String,
    /// Monotonic clocks can go on from where they were.
    has_time_namespaces: bool,
}

impl Needs {
    pub(crate) fn of(saved: &Saved, statistics: &Statistics) -> Needs {
        let stream = |name: &str| statistics.streams.get(name).copied().unwrap_or(0);
        let mut needs = Needs {
            memory_bytes: statistics.pages.saturating_mul(4096),
            root_bytes: stream(ROOT_STREAM),
            trees: saved
                .trees
                .iter()
                .map(|tree| (tree.path.clone(), stream(&tree.stream)))
                .collect(),
            ..Needs::default()
        };
        for process in &saved.container.processes {
            let alive = match &process.state {
                ProcessState::Alive(alive) => alive,
                ProcessState::Zombie { .. } => {
                    needs.tasks += 1;
                    continue;
                }
            };
            needs.tasks += alive.threads.len() as u64;
            let highest = alive.descriptors.iter().map(|descriptor| descriptor.fd).max();
            let count = highest.map_or(0, |highest| u64::try_from(highest).unwrap_or(0) + 1);
            needs.descriptors = needs.descriptors.max(count);
            let mapped = alive.mappings.iter().fold(0u64, |sum, mapping| {
                sum.saturating_add(mapping.end.saturating_sub(mapping.start))
            });
            needs.mapped_bytes = needs.mapped_bytes.max(mapped);
            let own = alive.threads.iter().map(|thread| thread.pending.len()).sum::<usize>();
            needs.signals += (own + alive.pending.len() + alive.posix_timers.len()) as u64;
        }
        needs
    }
}

impl Host {
    /// Looks at this host. `rootfs` is the root of the new container.
    pub(crate) fn of(rootfs: &Path) -> io::Result<Host> {
        let text = fs::read_to_string("/proc/meminfo")?;
        let bytes = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
            kib.unwrap_or(0).saturating_mul(1024)
        };
        let disk = statvfs(rootfs)?;
        let may_raise = capabilities(None)?.effective.contains(CapabilitySet::SYS_RESOURCE);
        let descriptors = getrlimit(Resource::Nofile);
        Ok(Host {
            memory_bytes: bytes("MemTotal"),
            swap_bytes: bytes("SwapTotal"),
            free_bytes: disk.f_bavail.saturating_mul(disk.f_frsize),
            descriptors_max: match may_raise {
                true => u64::MAX,
                false => descriptors.maximum.unwrap_or(u64::MAX),
            },
            mapped_bytes_max: getrlimit(Resource::As).current.unwrap_or(u64::MAX),
            signals_max: getrlimit(Resource::Sigpending).current.unwrap_or(u64::MAX),
            processors: online("cpu")?,
            memory_nodes: online("node")?,
            has_time_namespaces: Path::new("/proc/self/ns/time").exists(),
        })
    }
}

/// What of a kind of device is online. A kernel without memory nodes has node 0.
fn online(kind: &str) -> io::Result<String> {
    match fs::read_to_string(format!("/sys/devices/system/{kind}/online")) {
        Ok(list) => Ok(list.trim_end().to_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok("0".to_owned()),
        Err(error) => Err(error),
    }
}

/// All that falls short, each with what is needed, what there is, and what to do.
pub(crate) fn shortages(spec: &Spec, needs: &Needs, host: &Host) -> Vec<String> {
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    let mut reasons = Vec::new();
    let mut short = |needed: u64, available: u64, reason: String| {
        if needed > available {
            reasons.push(reason);
        }
    };
    let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    let memory = resources.and_then(|resources| resources.memory().as_ref());
    let limit = memory.and_then(|memory| u64::try_from(memory.limit()?).ok());
    if let Some(limit) = limit.filter(|limit| *limit > 0) {
        // The limit of both together; none and -1 allow all that the host has.
        let both = memory.and_then(|memory| u64::try_from(memory.swap()?).ok());
        let swap = match both.filter(|&both| both > 0) {
            Some(both) => both.saturating_sub(limit).min(host.swap_bytes),
            None => host.swap_bytes,
        };
        let available = limit.saturating_add(swap);
        let reason = format!(
            "it holds {} MiB of memory, and the container may have {} MiB: give it more memory",
            mib(needs.memory_bytes),
            mib(available)
        );
        short(needs.memory_bytes, available, reason);
    }
    let available = host.memory_bytes.saturating_add(host.swap_bytes);
    let reason = format!(
        "it holds {} MiB of memory, and this host has {} MiB: choose a larger one",
        mib(needs.memory_bytes),
        mib(available)
    );
    short(needs.memory_bytes, available, reason);
    let pids = resources.and_then(|resources| resources.pids().as_ref());
    if let Some(limit) =
        pids.and_then(|pids| u64::try_from(pids.limit()).ok()).filter(|limit| *limit > 0)
    {
        let tasks = needs.tasks;
        let reason = format!(
            "it has {tasks} threads, and the container may have {limit}: raise its limit of pids"
        );
        short(tasks, limit, reason);
    }
    let (needed, available) = (needs.descriptors, host.descriptors_max);
    let reason = format!(
        "it has descriptors up to number {}, and only {available} are allowed here: raise the hard limit of open files of whoever starts this program",
        needed.saturating_sub(1)
    );
    short(needed, available, reason);
    let reason = format!(
        "one of its processes has {} MiB of address space, and {} MiB are allowed here: raise the limit of address space of whoever starts this program",
        mib(needs.mapped_bytes),
        mib(host.mapped_bytes_max)
    );
    short(needs.mapped_bytes, host.mapped_bytes_max, reason);
    let (needed, available) = (needs.signals, host.signals_max);
    let reason = format!(
        "it has {needed} pending signals and timers, and {available} are allowed here: raise the limit of pending signals of whoever starts this program"
    );
    short(needed, available, reason);
    let reason = format!(
        "it has changed {} MiB of its files, and there are {} MiB free for them: make room where the engine keeps its containers",
        mib(needs.root_bytes),
        mib(host.free_bytes)
    );
    short(needs.root_bytes, host.free_bytes, reason);
    for (path, bytes) in &needs.trees {
        if let Some(size) = tmpfs_bytes(spec, path) {
            let reason = format!(
                "its {path} holds {} MiB, and the new one may hold {} MiB: give it more (docker's --shm-size, or size= of the mount)",
                mib(*bytes),
                mib(size)
            );
            // The stream has names and owners beside the content, and what takes place is the content.
            short(bytes.saturating_sub(bytes / 32 + (64 << 10)), size, reason);
        }
    }
    let cpu = resources.and_then(|resources| resources.cpu().as_ref());
    let set = |set: Option<&String>| set.cloned().unwrap_or_default();
    let sets = [
        ("processors", set(cpu.and_then(|cpu| cpu.cpus().as_ref())), &host.processors),
        ("memory nodes", set(cpu.and_then(|cpu| cpu.mems().as_ref())), &host.memory_nodes),
    ];
    for (kind, wanted, here) in sets {
        let missing = missing_numbers(&wanted, here);
        if !missing.is_empty() {
            reasons.push(format!(
                "the container is to have the {kind} {wanted}, and this host has {here}, not {}: give it others (docker's --cpuset-cpus and --cpuset-mems)",
                missing.join(",")
            ));
        }
    }
    if !host.has_time_namespaces {
        reasons.push(
            "this kernel has no time namespaces, so its clocks could not go on: choose a host with Linux 5.6 and CONFIG_TIME_NS"
                .to_owned(),
        );
    }
    reasons
}

/// Those numbers of `wanted` that `here` does not have; both are lists as the kernel writes them: `0-3,8`.
fn missing_numbers(wanted: &str, here: &str) -> Vec<String> {
    let ranges = |list: &str| -> Vec<RangeInclusive<u32>> {
        let range = |part: &str| {
            let (from, to) = part.split_once('-').unwrap_or((part, part));
            Some(from.trim().parse().ok()?..=to.trim().parse().ok()?)
        };
        // What is no list at all is the kernel's to refuse, when the cgroup is made.
        list.split(',').filter_map(range).collect()
    };
    let here = ranges(here);
    // Linux knows 8192 processors at most (CONFIG_NR_CPUS).
    let numbers = ranges(wanted).into_iter().flatten().take(8192);
    numbers
        .filter(|number| !here.iter().any(|range| range.contains(number)))
        .map(|number| number.to_string())
        .collect()
}

/// How much a file system in memory may hold, where the specification says.
fn tmpfs_bytes(spec: &Spec, path: &str) -> Option<u64> {
    let mounts = spec.mounts().as_ref()?;
    // The last mount at a place is the one that shows.
    let mount = mounts.iter().rev().find(|mount| mount.destination() == Path::new(path))?;
    if mount.typ().as_deref() != Some("tmpfs") {
        return None;
    }
    let size = mount.options().as_ref()?.iter().rev().find_map(|o| o.strip_prefix("size="))?;
    let digits = size.trim_end_matches(|letter: char| letter.is_ascii_alphabetic());
    let shift = match size.strip_prefix(digits)?.to_ascii_lowercase().as_str() {
        "" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn ample() -> Host {
        Host {
            memory_bytes: u64::MAX,
            swap_bytes: 0,
            free_bytes: u64::MAX,
            descriptors_max: u64::MAX,
            mapped_bytes_max: u64::MAX,
            signals_max: u64::MAX,
            processors: "0-8191".to_owned(),
            memory_nodes: "0-1023".to_owned(),
            has_time_namespaces: true,
        }
    }

    fn check(more: &str, needs: &Needs, host: &Host, naming: &[&str]) {
        let text = format!(r#"{{"ociVersion": "1.0.2"{more}}}"#);
        let spec: Spec = serde_json::from_str(&text).unwrap();
        let reasons = shortages(&spec, needs, host);
        assert_eq!(reasons.len(), naming.len(), "{more}: {reasons:?}");
        for (reason, name) in reasons.iter().zip(naming) {
            assert!(reason.contains(name), "{name}: {reason}");
        }
    }

    /// Such a container would be killed for its memory, or fail to fork, in the middle of a restore.
    #[test]
    fn limits_below_what_was_saved_are_found() {
        let check = |resources: &str, memory_bytes, swap_bytes, naming: &[&str]| {
            let needs = Needs { memory_bytes, tasks: 3, ..Needs::default() };
            let more = format!(r#", "linux": {{"resources": {resources}}}"#);
            check(&more, &needs, &Host { swap_bytes, ..ample() }, naming);
        };
        check("{}", u64::MAX, 0, &[]);
        check(r#"{"memory": {"limit": -1}, "pids": {"limit": -1}}"#, u64::MAX, 0, &[]);
        check(r#"{"memory": {"limit": 2097152}}"#, 2 * MIB, 0, &[]);
        check(r#"{"memory": {"limit": 2097152}}"#, 3 * MIB, 0, &["may have 2 MiB"]);
        check(r#"{"memory": {"limit": 2097152}}"#, 3 * MIB, MIB, &[]);
        check(r#"{"memory": {"limit": 2097152, "swap": 2097152}}"#, 3 * MIB, MIB, &["3 MiB"]);
        check(r#"{"pids": {"limit": 3}}"#, 0, 0, &[]);
        check(r#"{"pids": {"limit": 2}}"#, 0, 0, &["3 threads"]);
    }

    /// A file system in memory that is too small would be found when half of the files are there.
    #[test]
    fn file_systems_in_memory_that_are_too_small_are_found() {
        let needs = Needs { trees: vec![("/dev/shm".to_owned(), 70 * MIB)], ..Needs::default() };
        let check = |kind: &str, size: &str, naming: &[&str]| {
            let mount = format!(
                r#"{{"destination": "/dev/shm", "type": "{kind}", "options": ["{size}"]}}"#
            );
            check(&format!(r#", "mounts": [{mount}]"#), &needs, &ample(), naming);
        };
        for size in ["size=65536k", "size=64M", "size=67108864"] {
            check("tmpfs", size, &["holds 70 MiB, and the new one may hold 64 MiB"]);
            check("bind", size, &[]);
        }
        for size in ["size=1g", "size=50%", "mode=1777", "size=70m"] {
            check("tmpfs", size, &[]);
        }
    }

    /// Who is told one thing at a time begins as often as there are things.
    #[test]
    fn everything_that_falls_short_is_named_at_once() {
        let needs = Needs {
            memory_bytes: 9 * MIB,
            tasks: 5,
            descriptors: 5001,
            mapped_bytes: 9 * MIB,
            signals: 31,
            root_bytes: 7 * MIB,
            trees: Vec::new(),
        };
        let host = Host {
            memory_bytes: 5 * MIB,
            swap_bytes: MIB,
            free_bytes: 2 * MIB,
            descriptors_max: 4096,
            mapped_bytes_max: 8 * MIB,
            signals_max: 30,
            processors: "0-3,6".to_owned(),
            memory_nodes: "0".to_owned(),
            has_time_namespaces: false,
        };
        let more = r#", "linux": {"resources": {"cpu": {"cpus": "2-6", "mems": "0-1"}}}"#;
        let named = [
            "this host has 6 MiB",
            "number 5000, and only 4096",
            "9 MiB of address space, and 8 MiB",
            "31 pending signals and timers, and 30",
            "7 MiB of its files, and there are 2 MiB",
            "the processors 2-6, and this host has 0-3,6, not 4,5",
            "the memory nodes 0-1, and this host has 0, not 1",
            "time namespaces",
        ];
        check(more, &needs, &host, &named);
        check(more, &needs, &ample(), &[]);
    }

    /// A host that is misread would refuse everything, or nothing.
    #[test]
    fn this_host_is_ample_for_nothing_and_not_for_everything() {
        let host = Host::of(Path::new("/")).unwrap();
        check("", &Needs::default(), &host, &[]);
        let needs = Needs { memory_bytes: u64::MAX, root_bytes: u64::MAX, ..Needs::default() };
        check("", &needs, &host, &["this host has", "free for them"]);
    }
}
