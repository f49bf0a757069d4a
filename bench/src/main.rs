//! `script/bench [--json] [--peer-only] [FIGURE…]`: one line a figure, `NAME ours=… peer=… ratio=… goal=… holds|short`, and exit
//! status 1 when one falls short. Ours and the peer run in alternation on warmed memory; what is printed are medians.
//!
//! - `start`: a container that does nothing, from call to end, beside runc.
//! - `full-64m`, `full-1g`, `full-4g`: a first capsule of a program with that much memory, beside CRIU 4.2, `zstd -T2` and a PUT to
//!   the same store: time until it is durable, its size, time until the restored program has touched all of its memory,
//!   peak memory of the programs that do it, and the pause: the largest step of the clock that a thread inside saw.
//!
//! Peak memory comes from a run of its own, since looking for it costs time.

#![expect(clippy::print_stdout, reason = "figures are what this program is for")]

mod criu;
mod figure;
mod program;
mod runtime;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use samara_tests::node::is_abandoned;
use samara_tests::object_store::ObjectStore;
use samara_tests::process::program_name;

use crate::criu::Peer;
use crate::figure::{Figure, Goal, median};
use crate::runtime::Runtime;

/// No slower than runc.
const START_RATIO_MAX: f64 = 1.0;
const START_RUNS: usize = 61;

/// SPECIFICATION: memory in use while writing or reading stays under this, whatever the container's size.
const PEAK_MEBIBYTES_MAX: f64 = 256.0;

/// The data is about as compressible as a program's heap; a ratio below this would not be the promised case.
const COMPRESSION_MIN: f64 = 2.5;

/// What one save and restore took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Full {
    pub(crate) total: Duration,
    pub(crate) bytes: u64,
    pub(crate) restore: Duration,
    pub(crate) pause_ms: f64,
    /// Bytes, in runs that looked.
    pub(crate) peak: Option<u64>,
}

/// Looks how much memory programs with these names use together, until it is stopped.
#[derive(Debug)]
pub(crate) struct Sampler {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<u64>,
}

impl Sampler {
    /// The largest sum seen, in bytes.
    pub(crate) fn stop(self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().expect("looking at /proc does not panic")
    }
}

pub(crate) fn memory_of(names: &'static [&'static str]) -> Sampler {
    let stop = Arc::new(AtomicBool::new(false));
    let seen = Arc::clone(&stop);
    let thread = std::thread::spawn(move || {
        let mut most = 0;
        while !seen.load(Ordering::Relaxed) {
            most = most.max(resident(names));
            // Buffers of megabytes live longer than this.
            std::thread::sleep(Duration::from_millis(5));
        }
        most
    });
    Sampler { stop, thread }
}

/// Anonymous and shared memory of all processes with one of these programs, or of all of ours where none is named. Mapped
/// files are page cache. A process in a container is no program of ours, though it begins as one where it is brought back:
/// what it has then is the saved program's memory.
fn resident(names: &[&str]) -> u64 {
    let namespace = |process: &Path| std::fs::read_link(process.join("ns/pid")).ok();
    let outside = namespace(Path::new("/proc/self"));
    let counts = |process: &Path, status: &str| match names {
        [] => program_name(process).is_some() && namespace(process) == outside,
        _ => status
            .lines()
            .next()
            .and_then(|line| line.strip_prefix("Name:\t"))
            .is_some_and(|name| names.contains(&name)),
    };
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let status = std::fs::read_to_string(entry.path().join("status")).ok()?;
            counts(&entry.path(), &status).then_some(status)
        })
        .flat_map(|status| {
            let field = |name: &str| {
                status.lines().find_map(|line| {
                    line.strip_prefix(name)?.trim().strip_suffix(" kB")?.parse::<u64>().ok()
                })
            };
            [field("RssAnon:"), field("RssShmem:")].map(|kibibytes| kibibytes.unwrap_or(0) * 1024)
        })
        .sum()
}

#[derive(Debug)]
struct Options {
    json: bool,
    peer_only: bool,
    figures: Vec<String>,
}

fn parse() -> Result<Options> {
    let mut options = Options { json: false, peer_only: false, figures: Vec::new() };
    for word in std::env::args().skip(1) {
        match word.as_str() {
            "--json" => options.json = true,
            "--peer-only" => options.peer_only = true,
            "start" | "full-64m" | "full-1g" | "full-4g" => options.figures.push(word),
            other => bail!(
                "no figure {other}; usage: bench [--json] [--peer-only] [start full-64m full-1g full-4g]"
            ),
        }
    }
    if options.figures.is_empty() {
        options.figures = ["start", "full-64m", "full-1g", "full-4g"].map(str::to_owned).to_vec();
    }
    Ok(options)
}

fn seconds(samples: &[Full], part: fn(&Full) -> Duration) -> Option<f64> {
    median(samples.iter().map(|sample| part(sample).as_secs_f64()).collect())
}

fn start(folder: &Path, store: &ObjectStore, options: &Options) -> Result<Vec<Figure>> {
    let peer = Runtime::runc(folder);
    let ours = if options.peer_only { None } else { Some(Runtime::ours(folder, store)?) };
    let (mut our_times, mut peer_times) = (Vec::new(), Vec::new());
    // The first of each finds cold caches.
    for number in 0..=START_RUNS {
        // What one leaves behind (control groups, namespaces) is taken down while the next runs: the order changes each time.
        for side in [number % 2, (number + 1) % 2] {
            let (runtime, times) = match (side, &ours) {
                (0, _) => (&peer, &mut peer_times),
                (_, Some(ours)) => (ours, &mut our_times),
                (_, None) => continue,
            };
            let took = runtime.start(folder)?.as_secs_f64() * 1000.0;
            if number > 0 {
                times.push(took);
            }
        }
    }
    let peer = median(peer_times).context("no run of runc")?;
    Ok(vec![Figure {
        name: "start".to_owned(),
        unit: "ms",
        ours: median(our_times),
        peer,
        goal: Goal::RatioMax(START_RATIO_MAX),
    }])
}

fn full(name: &str, folder: &Path, store: &ObjectStore, options: &Options) -> Result<Vec<Figure>> {
    let (mebibytes, runs) = match name {
        "full-64m" => (64, 7),
        "full-1g" => (1024, 5),
        _ => (4096, 3),
    };
    let peer = Peer::start()?;
    eprintln!("bench: {name}: warming memory; the peer is CRIU {}", peer.version()?);
    // Twice: what is saved, and the page cache of the peer's images and of the store.
    program::warm(folder, mebibytes * 2 + 512)?;
    let ours = if options.peer_only { None } else { Some(Runtime::ours(folder, store)?) };
    let (mut mine, mut others) = (Vec::new(), Vec::new());
    let (mut my_peak, mut other_peak) = (None, None);
    for number in 0..=runs {
        // The first run looks at memory, and is not timed; the order changes each time.
        let look = number == 0;
        for side in [number % 2, (number + 1) % 2] {
            if side == 0 {
                let sample = peer.full(folder, mebibytes, store, look).context("CRIU")?;
                other_peak = other_peak.or(sample.peak);
                others.extend((!look).then_some(sample));
            } else if let Some(ours) = &ours {
                let sample =
                    ours.full(folder, mebibytes, store, number, look).context("samara-runtime")?;
                my_peak = my_peak.or(sample.peak);
                mine.extend((!look).then_some(sample));
            }
        }
        eprintln!(
            "bench: {name}: run {number} of {runs}: peer {:?}, ours {:?}",
            others.last(),
            mine.last()
        );
    }
    let megabytes = |bytes: f64| bytes / 1e6;
    #[expect(clippy::cast_precision_loss, reason = "sizes far below 2^53")]
    let size = |samples: &[Full]| {
        median(samples.iter().map(|sample| megabytes(sample.bytes as f64)).collect())
    };
    #[expect(clippy::cast_precision_loss, reason = "sizes far below 2^53")]
    let peak = |bytes: Option<u64>| bytes.map(|bytes| bytes as f64 / f64::from(1 << 20));
    #[expect(clippy::cast_precision_loss, reason = "sizes far below 2^53")]
    let raw = megabytes((mebibytes << 20) as f64);
    let none = "no run of CRIU";
    let peer_size = size(&others).context(none)?;
    if raw / peer_size < COMPRESSION_MIN {
        bail!(
            "the data compresses {:.2} times, {COMPRESSION_MIN} is what is promised for",
            raw / peer_size
        );
    }
    let pause = |samples: &[Full]| median(samples.iter().map(|sample| sample.pause_ms).collect());
    let figure = |part: &str, unit, ours, peer: Option<f64>, goal| -> Result<Figure> {
        Ok(Figure { name: format!("{name}-{part}"), unit, ours, peer: peer.context(none)?, goal })
    };
    Ok(vec![
        figure(
            "total",
            "s",
            seconds(&mine, |sample| sample.total),
            seconds(&others, |sample| sample.total),
            Goal::RatioMax(1.0),
        )?,
        figure("size", "MB", size(&mine), Some(peer_size), Goal::RatioMax(1.15))?,
        figure(
            "restore",
            "s",
            seconds(&mine, |sample| sample.restore),
            seconds(&others, |sample| sample.restore),
            Goal::RatioMax(1.0),
        )?,
        figure("peak", "MiB", peak(my_peak), peak(other_peak), Goal::OursMax(PEAK_MEBIBYTES_MAX))?,
        figure("pause", "ms", pause(&mine), pause(&others), Goal::None)?,
    ])
}

fn run() -> Result<bool> {
    let options = parse()?;
    // On the disk that everything else of ours is on, and the same for both sides.
    let runs = samara_tests::cache().join("bench");
    std::fs::create_dir_all(&runs)?;
    for entry in std::fs::read_dir(&runs)?.flatten().filter(|entry| is_abandoned(&entry.path())) {
        std::fs::remove_dir_all(entry.path())?;
    }
    let prefix = format!("run-{}-", std::process::id());
    let folder = tempfile::Builder::new().prefix(&prefix).rand_bytes(4).tempdir_in(&runs)?;
    program::compile(folder.path())?;
    let store = ObjectStore::start()?;
    let mut all_hold = true;
    for name in &options.figures {
        let figures = if name == "start" {
            start(folder.path(), &store, &options)?
        } else {
            full(name, folder.path(), &store, &options)?
        };
        for figure in figures {
            println!("{}", if options.json { figure.json() } else { figure.line() });
            all_hold &= figure.holds() != Some(false);
        }
    }
    Ok(all_hold)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
