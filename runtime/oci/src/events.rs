//! `events`: what a container uses, in runc's JSON.
//!
//! Read from the cgroup files themselves: libcgroups fails as a whole where one file is missing,
//! and files come and go with kernels.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use samara_kernel::sched::parse_list;
use serde_json::{Map, Value, json};

use crate::cgroup::{Cgroup, is_unified};
use crate::state_dir::{StateDir, StateError, Status};

#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error("container with id {0} is not running")]
    NotRunning(String),
    #[error("cannot write the output")]
    Output(#[source] std::io::Error),
    #[error("cannot wait for the container")]
    Wait(#[source] std::io::Error),
}

/// Prints statistics: once, or every `interval_seconds` until the container ends; then out-of-memory
/// kills too.
pub fn events(
    dir: &StateDir,
    once: bool,
    interval_seconds: u64,
    out: &mut impl Write,
) -> Result<(), EventsError> {
    let record = dir.load()?;
    if record.status() == Status::Stopped {
        return Err(EventsError::NotRunning(record.id));
    }
    let mut print = |kind: &str, data: Option<Value>| {
        let mut event = Map::new();
        event.insert("type".to_owned(), kind.into());
        event.insert("id".to_owned(), record.id.clone().into());
        if let Some(data) = data {
            event.insert("data".to_owned(), data);
        }
        writeln!(out, "{}", Value::Object(event))
            .and_then(|()| out.flush())
            .map_err(EventsError::Output)
    };
    if once {
        return print("stats", Some(stats(&record.cgroup)));
    }
    let Some(init) = record.init.pidfd() else { return Ok(()) };
    let mut kills = oom_kills(&record.cgroup);
    let interval =
        Timespec { tv_sec: i64::try_from(interval_seconds).unwrap_or(i64::MAX), tv_nsec: 0 };
    loop {
        let mut fds = [PollFd::new(&init, PollFlags::IN)];
        match poll(&mut fds, Some(&interval)) {
            Ok(0) => print("stats", Some(stats(&record.cgroup)))?,
            Ok(_) => return Ok(()),
            Err(rustix::io::Errno::INTR) => continue,
            Err(errno) => return Err(EventsError::Wait(errno.into())),
        }
        let now = oom_kills(&record.cgroup);
        if now > kills {
            print("oom", None)?;
        }
        kills = now;
    }
}

fn oom_kills(cgroup: &Cgroup) -> u64 {
    let file = if is_unified() { "memory.events" } else { "memory.oom_control" };
    cgroup
        .folder("memory")
        .and_then(|folder| flat(&folder.join(file)).get("oom_kill").copied())
        .unwrap_or(0)
}

fn stats(cgroup: &Cgroup) -> Value {
    let version = if is_unified() { unified } else { legacy };
    let mut data = version(cgroup);
    data.insert("hugetlb".to_owned(), json!({}));
    data.insert("intel_rdt".to_owned(), json!({}));
    data.insert("network_interfaces".to_owned(), Value::Null);
    Value::Object(data)
}

/// Kernel ticks, 100 a second on every architecture of ours (`getconf CLK_TCK`), in nanoseconds.
const TICK_NS: u64 = 10_000_000;

fn legacy(cgroup: &Cgroup) -> Map<String, Value> {
    let mut data = Map::new();
    let cpu = cgroup.folder("cpuacct").map(|folder| {
        let stat = flat(&folder.join("cpuacct.stat"));
        let ticks = |name| stat.get(name).copied().unwrap_or(0).saturating_mul(TICK_NS);
        json!({
            "total": number(&folder.join("cpuacct.usage")),
            "percpu": numbers(&folder.join("cpuacct.usage_percpu")),
            "percpu_kernel": numbers(&folder.join("cpuacct.usage_percpu_sys")),
            "percpu_user": numbers(&folder.join("cpuacct.usage_percpu_user")),
            "kernel": ticks("system"),
            "user": ticks("user"),
        })
    });
    let throttling = cgroup
        .folder("cpu")
        .map(|folder| throttling(&flat(&folder.join("cpu.stat")), "throttled_time", 1));
    data.insert("cpu".to_owned(), json!({"usage": cpu, "throttling": throttling}));
    if let Some(folder) = cgroup.folder("cpuset") {
        let file = |name: &str| number(&folder.join(format!("cpuset.{name}")));
        let relax = text(&folder.join("cpuset.sched_relax_domain_level"));
        data.insert(
            "cpuset".to_owned(),
            json!({
                "cpus": list(&folder.join("cpuset.cpus")),
                "cpu_exclusive": file("cpu_exclusive"),
                "mems": list(&folder.join("cpuset.mems")),
                "mem_hardwall": file("mem_hardwall"),
                "mem_exclusive": file("mem_exclusive"),
                "memory_migrate": file("memory_migrate"),
                "memory_spread_page": file("memory_spread_page"),
                "memory_spread_slab": file("memory_spread_slab"),
                "memory_pressure": file("memory_pressure"),
                "sched_load_balance": file("sched_load_balance"),
                "sched_relax_domain_level": relax.parse::<i64>().unwrap_or(-1),
            }),
        );
    }
    if let Some(folder) = cgroup.folder("memory") {
        let raw = flat(&folder.join("memory.stat"));
        let part = |prefix: &str| {
            let file = |name: &str| folder.join(format!("memory.{prefix}{name}"));
            file("limit_in_bytes").exists().then(|| {
                json!({
                    "limit": number(&file("limit_in_bytes")),
                    "usage": number(&file("usage_in_bytes")),
                    "max": number(&file("max_usage_in_bytes")),
                    "failcnt": number(&file("failcnt")),
                })
            })
        };
        data.insert(
            "memory".to_owned(),
            json!({
                "cache": raw.get("cache").copied().unwrap_or(0),
                "usage": part(""),
                "swap": part("memsw."),
                "kernel": part("kmem."),
                "kernelTCP": part("kmem.tcp."),
                "raw": raw,
            }),
        );
    }
    if let Some(folder) = cgroup.folder("pids") {
        data.insert("pids".to_owned(), pids(folder));
    }
    let io = cgroup.folder("blkio").map(|folder| {
        let table = |throttle: &str, bfq: &str| {
            let recursive = operations(&folder.join(format!("blkio.bfq.{bfq}_recursive")));
            if recursive.is_empty() {
                operations(&folder.join(format!("blkio.throttle.{throttle}_recursive")))
            } else {
                recursive
            }
        };
        json!({
            "ioServiceBytesRecursive": table("io_service_bytes", "io_service_bytes"),
            "ioServicedRecursive": table("io_serviced", "io_serviced"),
        })
    });
    data.insert("blkio".to_owned(), io.unwrap_or_else(|| json!({})));
    data
}

fn unified(cgroup: &Cgroup) -> Map<String, Value> {
    let mut data = Map::new();
    let Some(folder) = cgroup.folder("freezer") else { return data };
    let stat = flat(&folder.join("cpu.stat"));
    let microseconds = |name| stat.get(name).copied().unwrap_or(0).saturating_mul(1000);
    data.insert(
        "cpu".to_owned(),
        json!({
            "usage": {
                "total": microseconds("usage_usec"),
                "kernel": microseconds("system_usec"),
                "user": microseconds("user_usec"),
            },
            "throttling": throttling(&stat, "throttled_usec", 1000),
        }),
    );
    let raw = flat(&folder.join("memory.stat"));
    let part = |name: &str| {
        json!({
            "limit": number(&folder.join(format!("memory.{name}max"))),
            "usage": number(&folder.join(format!("memory.{name}current"))),
            "max": number(&folder.join(format!("memory.{name}peak"))),
            "failcnt": flat(&folder.join("memory.events")).get("max").copied().unwrap_or(0),
        })
    };
    data.insert(
        "memory".to_owned(),
        json!({
            "cache": raw.get("file").copied().unwrap_or(0),
            "usage": part(""),
            "swap": part("swap."),
            "raw": raw,
        }),
    );
    data.insert("pids".to_owned(), pids(folder));
    let io: Vec<Value> = text(&folder.join("io.stat"))
        .lines()
        .flat_map(|line| {
            let (device, fields) = line.split_once(' ').unwrap_or_default();
            fields
                .split(' ')
                .filter_map(|field| {
                    let (name, value) = field.split_once('=')?;
                    let op = match name {
                        "rbytes" => "Read",
                        "wbytes" => "Write",
                        _ => return None,
                    };
                    operation(device, op, value)
                })
                .collect::<Vec<_>>()
        })
        .collect();
    data.insert("blkio".to_owned(), json!({"ioServiceBytesRecursive": io}));
    data
}

/// Go leaves zeros out here.
fn throttling(stat: &BTreeMap<String, u64>, time: &str, unit_ns: u64) -> Value {
    let fields = [
        ("periods", "nr_periods", 1),
        ("throttledPeriods", "nr_throttled", 1),
        ("throttledTime", time, unit_ns),
    ];
    fields
        .into_iter()
        .filter_map(|(name, key, unit)| {
            let value = stat.get(key).copied().filter(|&value| value != 0)?;
            Some((name.to_owned(), value.saturating_mul(unit).into()))
        })
        .collect::<Map<_, _>>()
        .into()
}

fn pids(folder: &Path) -> Value {
    let mut pids = Map::new();
    pids.insert("current".to_owned(), number(&folder.join("pids.current")).into());
    if let Ok(limit) = text(&folder.join("pids.max")).parse::<u64>() {
        pids.insert("limit".to_owned(), limit.into());
    }
    pids.into()
}

/// Lines such as `8:0 Read 4096`.
fn operations(path: &Path) -> Vec<Value> {
    text(path)
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            operation(fields.next()?, fields.next()?, fields.next()?)
        })
        .collect()
}

fn operation(device: &str, op: &str, value: &str) -> Option<Value> {
    let (major, minor) = device.split_once(':')?;
    Some(json!({
        "major": major.parse::<u64>().ok()?,
        "minor": minor.parse::<u64>().ok()?,
        "op": op,
        "value": value.parse::<u64>().ok()?,
    }))
}

fn text(path: &Path) -> String {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// `max` is the largest number, as in runc.
fn number(path: &Path) -> u64 {
    match text(path).as_str() {
        "max" => u64::MAX,
        other => other.parse().unwrap_or(0),
    }
}

fn numbers(path: &Path) -> Vec<u64> {
    text(path).split_whitespace().filter_map(|word| word.parse().ok()).collect()
}

/// Lines of a name and a number.
fn flat(path: &Path) -> BTreeMap<String, u64> {
    text(path)
        .lines()
        .filter_map(|line| {
            let (name, value) = line.split_once(' ')?;
            Some((name.to_owned(), value.parse().ok()?))
        })
        .collect()
}

/// The numbers of a cpuset; none where the file is not there.
fn list(path: &Path) -> Vec<u32> {
    parse_list(&text(path)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_lists_are_unfolded() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "0-2,7\n").unwrap();
        assert_eq!(list(file.path()), [0, 1, 2, 7]);
        std::fs::write(file.path(), "\n").unwrap();
        assert!(list(file.path()).is_empty());
    }
}
