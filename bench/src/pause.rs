//! How long a capsule stops a program: the largest step of the clock that a thread inside saw while it was saved, on a processor
//! of its own.
//!
//! | figure | program | between two capsules, and during the second |
//! |---|---|---|
//! | `pause-small` | 1 MiB | writes 1 % of its pages |
//! | `pause-1g-1`, `pause-8g-1` | 1 GiB, 8 GiB | writes 1 % of its pages |
//! | `pause-1g-50` | 1 GiB | writes 50 % of its pages |
//! | `pause-256t` | 16 MiB, 256 threads that wait | writes 1 % of its pages |
//! | `pause-files` | 64 MiB | writes 1 GiB to new files, 1 % of its pages and those to a log |
//!
//! Pages are written on and on, at the rate that makes the share dirty within a second, each once before any is written again,
//! in random order; the capsule is called when the share is dirty, and the program goes on at the same rate while it is
//! saved. A program that wrote its share and then kept still would be the easier case: copying before the stop would leave
//! nothing for it.
//!
//! CRIU dumps the same program at the same moment, and for `pause-files` packs the changed files while it is stopped. Its
//! images go to memory. The store's server gets only what processors have left, on both sides.
//!
//! `undisturbed` is the largest step in about a second before, with the program writing and nobody saving it.

use anyhow::{Context as _, Result};

use crate::figure::{Figure, Goal, median};
use crate::program::PAGES;
use crate::samples::Samples;
use crate::subject::Subject;
use crate::{Bench, Group};

/// A figure, and what its program does.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    mebibytes: u64,
    threads: u64,
    /// Of its pages, written each second.
    dirty_percent: u64,
    /// Written to files between two capsules.
    file_mebibytes: u64,
    /// Starts of the program, and capsules of each that are measured.
    rounds: usize,
    captures: usize,
    /// The peer's pause is at least this many times ours.
    times_less: f64,
}

const PLAIN: Case = Case {
    name: "",
    mebibytes: 1024,
    threads: 0,
    dirty_percent: 1,
    file_mebibytes: 0,
    rounds: 5,
    captures: 3,
    times_less: 1.0,
};

const CASES: [Case; 6] = [
    // What any process costs: seizing it and reading its state.
    Case { name: "pause-small", mebibytes: 1, captures: 5, times_less: 5.0, ..PLAIN },
    // A scan and 2,600 pages against all memory.
    Case { name: "pause-1g-1", times_less: 80.0, ..PLAIN },
    // Too much to copy; a snapshot by fork takes 10-15 ms a GiB.
    Case { name: "pause-1g-50", dirty_percent: 50, times_less: 25.0, ..PLAIN },
    // One capture a round: twice this memory is most of what a machine for benchmarks has.
    Case { name: "pause-8g-1", mebibytes: 8192, captures: 1, times_less: 100.0, ..PLAIN },
    // A few microseconds a thread.
    Case { name: "pause-256t", mebibytes: 16, threads: 256, captures: 5, times_less: 6.0, ..PLAIN },
    // One capture a round: the peer packs all changed files each time, ours those that have changed since.
    Case {
        name: "pause-files",
        mebibytes: 64,
        file_mebibytes: 1024,
        captures: 1,
        times_less: 20.0,
        ..PLAIN
    },
];

/// In milliseconds.
#[derive(Clone, Copy, Debug)]
struct Pause {
    gap: f64,
    undisturbed: f64,
}

pub(crate) fn groups() -> Vec<Group> {
    CASES.map(|case| vec![case.name]).to_vec()
}

pub(crate) fn measure(bench: &Bench, names: &[&str]) -> Result<Vec<Figure>> {
    bench.store.step_back(true)?;
    let asked = CASES.into_iter().filter(|case| names.contains(&case.name));
    asked.map(|case| one(bench, &case)).collect()
}

fn one(bench: &Bench, case: &Case) -> Result<Figure> {
    let peer = bench.peer_in_memory()?;
    let mebibytes = bench.mebibytes(case.mebibytes);
    let file_mebibytes =
        if case.file_mebibytes > 0 { bench.mebibytes(case.file_mebibytes) } else { 0 };
    bench.warm(case.name, &peer, mebibytes + file_mebibytes)?;
    let ours = bench.ours()?;
    let subject = Subject::busy(&bench.folder, mebibytes, case.threads, file_mebibytes > 0);
    let share = (mebibytes * PAGES * case.dirty_percent / 100).max(1);
    let samples = Samples::take(
        case.name,
        bench.rounds(case.rounds),
        ours.as_ref(),
        &peer,
        |engine, round, _, is_last| {
            let mut running = engine.start(&subject, round)?;
            let report = running.report();
            report.watch_clock(false)?;
            if engine.has_increments() {
                running.save().context("the first capsule")?;
            }
            let mut pauses = Vec::new();
            let mut written = 0;
            for _ in 0..case.captures {
                report.write_files(file_mebibytes)?;
                report.watch_clock(true)?;
                report.forget_gap()?;
                report.write_on(share, share)?;
                let undisturbed = report.gap_ms()?;
                written = report.written()?;
                report.forget_gap()?;
                running.save()?;
                report.wait_running()?;
                pauses.push(Pause { gap: report.gap_ms()?, undisturbed });
                report.set_rate(0)?;
                report.watch_clock(false)?;
            }
            if is_last {
                running.bring_back_and_check(written)?;
            }
            Ok(pauses)
        },
    )?;
    let goal = Goal::TimesLess(case.times_less);
    let figure = samples.figure(case.name, "ms", goal, |pause| Some(pause.gap));
    let undisturbed = samples.ours.iter().chain(&samples.peer).map(|pause| pause.undisturbed);
    Ok(Figure { undisturbed: median(undisturbed.collect()), ..figure })
}
