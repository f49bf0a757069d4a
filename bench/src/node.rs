//! `node-100`: what the captures of 100 containers of one node take in each second, all of them together, beside what the captures of
//! one container take while they run. All captures share one budget, whoever they belong to: what a second is worth must not depend on it.
//!
//! Ours are 100 containers of 32 MiB that are saved at intervals of a second, which is more often than a node can: there is always somebody
//! who waits. Each writes all of its pages about once between two of its capsules. The peer is one such container of ours, alone on the
//! node, of which all pages are written before each capsule; only the time of its captures counts. Bytes are those that captures have
//! passed on, before they were compressed, as the capsules tell.
//!
//! Capsules go to a folder in memory: neither a disk nor a server is a part of the figure.

use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};

use crate::figure::{Figure, Goal, number};
use crate::program::PAGES;
use crate::runtime::{Container, Place, Runtime};
use crate::subject::{Running as _, Subject};
use crate::{Bench, Group};

const CONTAINERS: usize = 100;
const MEBIBYTES: u64 = 32;

/// SPECIFICATION: within a fifth.
const RATIO_MIN: f64 = 0.8;

/// Captures of the container that is alone, after its first.
const ALONE: usize = 20;

/// Every container has its turn a few times in this.
const WINDOW: Duration = Duration::from_secs(60);

/// In which each container writes all of its pages once: about as long as a turn of all takes on two cores.
const PASS_SECONDS: u64 = 10;

pub(crate) fn groups() -> Vec<Group> {
    vec![vec!["node-100"]]
}

pub(crate) fn measure(bench: &Bench, _names: &[&str]) -> Result<Vec<Figure>> {
    let (mut ours, mut alone) = (None, None);
    if !bench.is_peer_only() {
        let folder = bench.memory.join("node-100");
        let runtime = Runtime::ours(&bench.folder, Place::Folder(folder.clone()))?;
        let subject = Subject::memory(&bench.folder, bench.mebibytes(MEBIBYTES));
        alone = Some(of_one(bench, &runtime, &subject)?);
        ours = Some(of_many(bench, &runtime, &subject, &folder)?);
        // Capsules by the hundred.
        std::fs::remove_dir_all(&folder)?;
    }
    Ok(vec![Figure {
        name: "node-100".to_owned(),
        unit: "MiB/s",
        ours,
        peer: alone,
        goal: Goal::RatioMin(RATIO_MIN),
        undisturbed: None,
    }])
}

/// MiB that captures of one container take in a second of theirs.
fn of_one(bench: &Bench, runtime: &Runtime<'_>, subject: &Subject) -> Result<f64> {
    let running = runtime.start_one(subject, "node-alone")?;
    running.report().watch_clock(false)?;
    let pages = bench.mebibytes(MEBIBYTES) * PAGES;
    running.save().context("the first capsule")?;
    let first = running.captured()?.len();
    for _ in 0..bench.rounds(ALONE) {
        running.report().write_pages(pages)?;
        running.save()?;
    }
    let captured = running.captured()?;
    let later = captured.get(first..).context("capsules are gone")?;
    let bytes: u64 = later.iter().map(|capture| capture.raw_bytes).sum();
    let took: Duration = later.iter().map(|capture| capture.took).sum();
    let rate = number(bytes) / number(1 << 20) / took.as_secs_f64();
    eprintln!("bench: node-100: alone: {} captures, {rate:.1} MiB/s", later.len());
    Ok(rate)
}

/// MiB that captures of all containers take in a second.
fn of_many(bench: &Bench, runtime: &Runtime<'_>, subject: &Subject, folder: &Path) -> Result<f64> {
    let pages = bench.mebibytes(MEBIBYTES) * PAGES;
    let mut containers: Vec<Container<'_>> = Vec::new();
    for index in 0..bench.rounds(CONTAINERS) {
        let container = runtime.start_one(subject, &format!("node-{index}"))?;
        container.report().watch_clock(false)?;
        containers.push(container);
    }
    for container in &containers {
        container.save_every("1s")?;
        container.report().set_rate((pages / PASS_SECONDS).max(1))?;
    }
    // The first round has what nobody had captured before.
    std::thread::sleep(Duration::from_secs(PASS_SECONDS));
    let begun = SystemTime::now();
    let window = if bench.rounds(ALONE) == ALONE { WINDOW } else { WINDOW / 16 };
    std::thread::sleep(window);
    let ended = SystemTime::now();
    let (mut bytes, mut captures, mut fewest) = (0, 0, usize::MAX);
    for container in &containers {
        let slots = container.slots(folder)?;
        let within = |slot: u64| {
            let at = slots.iter().find(|(other, _)| *other == slot).map(|(_, at)| *at);
            at.is_some_and(|at| at >= begun && at < ended)
        };
        let mine: Vec<u64> = container
            .captured()?
            .into_iter()
            .filter(|capture| within(capture.slot))
            .map(|capture| capture.raw_bytes)
            .collect();
        bytes += mine.iter().sum::<u64>();
        captures += mine.len();
        fewest = fewest.min(mine.len());
    }
    let seconds = ended.duration_since(begun)?.as_secs_f64();
    let rate = number(bytes) / number(1 << 20) / seconds;
    eprintln!(
        "bench: node-100: {} containers: {captures} captures in {seconds:.1} s, {fewest} or more each, {rate:.1} MiB/s",
        containers.len()
    );
    ensure!(fewest > 0, "a container was not saved in a minute");
    Ok(rate)
}
