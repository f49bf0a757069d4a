//! How much memory Samara's own processes take.
//!
//! `monitor-memory-peak`: the most that the monitor and its worker take together while they save programs of 64 MiB, 1 GiB and
//! 8 GiB, for the first time and again after half of their pages were written. `monitor-memory-idle`: what the monitor takes
//! alone, before the first capsule and after the last. Both by the proportional set: what is shared with other processes, as
//! the program's own text is, counts by its share.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use samara_tests::process::{of_folder, program_name};

use crate::figure::{Figure, Goal, number};
use crate::program::PAGES;
use crate::runtime::Runtime;
use crate::subject::{Engine as _, Running, Subject};
use crate::{Bench, Group, criu};

/// SPECIFICATION: memory in use while writing or reading stays under this, whatever the container's size.
pub(crate) const PEAK_MEBIBYTES_MAX: f64 = 256.0;

/// There is one monitor for each container, also where hundreds run.
const IDLE_MEBIBYTES_MAX: f64 = 8.0;

/// From small to what fills a machine.
const SIZES: [u64; 3] = [64, 1024, 8192];

/// Of the pages, written between two capsules.
const DIRTY_PERCENT: u64 = 50;

/// After which a monitor has given back what the last capture took.
const IDLE_AFTER: Duration = Duration::from_secs(2);

/// Looks how much memory programs use together, until it is stopped.
#[derive(Debug)]
pub(crate) struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Sampler {
    fn start(look: impl Fn() -> u64 + Send + 'static) -> Sampler {
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&stop);
        let thread = std::thread::spawn(move || {
            let mut most = 0;
            while !seen.load(Ordering::Relaxed) {
                most = most.max(look());
                // Buffers of megabytes live longer than this.
                std::thread::sleep(Duration::from_millis(5));
            }
            most
        });
        Sampler { stop, thread }
    }

    /// The largest sum seen, in bytes.
    pub(crate) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("looking at /proc does not panic")
    }
}

/// Anonymous and shared memory of all programs of ours; mapped files are page cache.
pub(crate) fn memory_of_ours(ours: &Runtime<'_>) -> Sampler {
    let state = ours.state().to_path_buf();
    Sampler::start(move || sum_of_ours(&state, "status", &["RssAnon:", "RssShmem:"]))
}

/// The same of the programs that the peer is made of.
pub(crate) fn memory_of_peer() -> Sampler {
    Sampler::start(|| {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let is_peer = |process: &Path| {
            std::fs::read_to_string(process.join("comm"))
                .is_ok_and(|name| criu::PROGRAMS.contains(&name.trim_end()))
        };
        entries
            .map(|entry| entry.path())
            .filter(|process| is_peer(process))
            .map(|process| fields(&process.join("status"), &["RssAnon:", "RssShmem:"]))
            .sum()
    })
}

/// Of those of ours that name `state` in their command line and of those that they have started, as a monitor does its worker.
/// A process in a container is no program of ours, though it begins as one where it is brought back: what it has then is the
/// saved program's memory.
fn sum_of_ours(state: &Path, file: &str, names: &[&str]) -> u64 {
    let namespace = |process: &Path| std::fs::read_link(process.join("ns/pid")).ok();
    let outside = namespace(Path::new("/proc/self"));
    let folder = |pid: i32| Path::new("/proc").join(pid.to_string());
    let children = |pid: i32| {
        // A thread's children are listed at that thread.
        let tasks = std::fs::read_dir(folder(pid).join("task")).into_iter().flatten().flatten();
        let lists =
            tasks.filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
        lists.collect::<Vec<_>>().join(" ")
    };
    let mut seen: Vec<i32> = of_folder(state).into_iter().map(nix::unistd::Pid::as_raw).collect();
    let mut next = 0;
    while let Some(pid) = seen.get(next) {
        for child in children(*pid).split_ascii_whitespace().filter_map(|word| word.parse().ok()) {
            if !seen.contains(&child) {
                seen.push(child);
            }
        }
        next += 1;
    }
    seen.into_iter()
        .map(folder)
        .filter(|process| program_name(process).is_some() && namespace(process) == outside)
        .map(|process| fields(&process.join(file), names))
        .sum()
}

/// The sum of these fields of a file of /proc, in bytes. Nothing for a process that has ended meanwhile.
fn fields(file: &Path, names: &[&str]) -> u64 {
    let text = std::fs::read_to_string(file).unwrap_or_default();
    let field = |name: &&str| {
        text.lines().find_map(|line| {
            line.strip_prefix(*name)?.trim().strip_suffix(" kB")?.parse::<u64>().ok()
        })
    };
    names.iter().filter_map(field).sum::<u64>() * 1024
}

pub(crate) fn groups() -> Vec<Group> {
    vec![vec!["monitor-memory"]]
}

pub(crate) fn measure(bench: &Bench, _names: &[&str]) -> Result<Vec<Figure>> {
    let (mut peak, mut idle) = (None, None);
    if let Some(ours) = bench.ours()? {
        for mebibytes in SIZES.map(|size| bench.mebibytes(size)) {
            let taken = one(bench, &ours, mebibytes)?;
            eprintln!("bench: monitor-memory: {mebibytes} MiB: {taken:?}");
            peak = peak.max(Some(taken.peak));
            idle = idle.max(Some(taken.idle));
        }
    }
    let figure = |name: &str, bytes: Option<u64>, most| Figure {
        name: name.to_owned(),
        unit: "MiB",
        ours: bytes.map(|bytes| number(bytes) / number(1 << 20)),
        peer: None,
        goal: Goal::OursMax(most),
        undisturbed: None,
    };
    Ok(vec![
        figure("monitor-memory-peak", peak, PEAK_MEBIBYTES_MAX),
        figure("monitor-memory-idle", idle, IDLE_MEBIBYTES_MAX),
    ])
}

/// In bytes.
#[derive(Clone, Copy, Debug)]
struct Taken {
    peak: u64,
    idle: u64,
}

fn one(bench: &Bench, ours: &Runtime<'_>, mebibytes: u64) -> Result<Taken> {
    let state = ours.state().to_path_buf();
    let now = {
        let state = state.clone();
        move || sum_of_ours(&state, "smaps_rollup", &["Pss:"])
    };
    let idle = || -> Result<u64> {
        std::thread::sleep(IDLE_AFTER);
        match now() {
            0 => bail!("no monitor names {} in its command line", state.display()),
            bytes => Ok(bytes),
        }
    };
    let subject = Subject::memory(&bench.folder, mebibytes);
    let mut running = ours.start(&subject, &format!("monitor-memory-{mebibytes}"))?;
    running.report().watch_clock(false)?;
    let before = idle()?;
    let sampler = Sampler::start(now.clone());
    let written = save_twice(running.as_ref(), mebibytes);
    let peak = sampler.stop();
    let after = idle()?;
    running.bring_back_and_check(written.context("saving")?)?;
    Ok(Taken { peak, idle: before.max(after) })
}

/// The first capsule and one of what was written since. Answers how many pages had been written when the second began.
fn save_twice(running: &dyn Running, mebibytes: u64) -> Result<u64> {
    running.save()?;
    let share = mebibytes * PAGES * DIRTY_PERCENT / 100;
    running.report().write_on(share, share)?;
    let written = running.report().written()?;
    running.save()?;
    running.report().set_rate(0)?;
    Ok(written)
}
