//! `full-64m`, `full-1g`, `full-4g`: a first capsule of a program with that much memory, beside CRIU 4.2, `zstd -T2` and a PUT to
//! the same store: time until it is durable, its size, time until the restored program has touched all of its memory, peak
//! memory of the programs that do it, and the pause: the largest step of the clock that a thread inside saw.
//!
//! Peak memory comes from a run of its own, since looking for it costs time.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::figure::{Figure, Goal, number};
use crate::memory::{PEAK_MEBIBYTES_MAX, Sampler, memory_of_ours, memory_of_peer};
use crate::samples::Samples;
use crate::subject::Subject;
use crate::{Bench, Group};

/// The data is about as compressible as a program's heap; a ratio below this would not be the promised case.
const COMPRESSION_MIN: f64 = 2.5;

/// Name, MiB, rounds that are timed.
const SIZES: [(&str, u64, usize); 3] =
    [("full-64m", 64, 7), ("full-1g", 1024, 5), ("full-4g", 4096, 3)];

/// What one save and restore took.
#[derive(Clone, Copy, Debug)]
struct Full {
    total: Duration,
    bytes: u64,
    restore: Duration,
    pause_ms: f64,
    /// Bytes, in the round that looked and was not timed.
    peak: Option<u64>,
}

pub(crate) fn groups() -> Vec<Group> {
    SIZES.map(|(name, ..)| vec![name]).to_vec()
}

pub(crate) fn measure(bench: &Bench, names: &[&str]) -> Result<Vec<Figure>> {
    let asked = SIZES.into_iter().filter(|(name, ..)| names.contains(name));
    let figures = asked.map(|(name, mebibytes, rounds)| {
        one(bench, name, bench.mebibytes(mebibytes), bench.rounds(rounds))
    });
    Ok(figures.collect::<Result<Vec<_>>>()?.concat())
}

fn one(bench: &Bench, name: &str, mebibytes: u64, rounds: usize) -> Result<Vec<Figure>> {
    let peer = bench.peer()?;
    bench.warm(name, &peer, mebibytes)?;
    let ours = bench.ours()?;
    let subject = Subject::memory(&bench.folder, mebibytes);
    // The first round looks at memory, and is not timed.
    let samples =
        Samples::take(name, rounds + 1, ours.as_ref(), &peer, |engine, round, count, _| {
            let look = |on: bool| match (on, &ours) {
                (false, _) => None,
                (true, Some(ours)) if engine.has_increments() => Some(memory_of_ours(ours)),
                (true, _) => Some(memory_of_peer()),
            };
            let mut running = engine.start(&subject, round)?;
            running.report().wait_running()?;
            running.report().forget_gap()?;
            let sampler = look(count == 0);
            let begin = Instant::now();
            running.save()?;
            running.make_durable()?;
            let total = begin.elapsed();
            let peak = sampler.map(Sampler::stop);
            running.report().wait_running()?;
            let pause_ms = running.report().gap_ms()?;
            let bytes = running.bytes()?;

            running.end()?;
            // Of the way there alone with CRIU, which becomes the program on the way back, and the program's memory its own.
            let sampler = look(count == 0 && engine.has_increments());
            let begin = Instant::now();
            running.restore()?;
            running.report().check(false)?;
            let restore = begin.elapsed();
            let peak = peak.max(sampler.map(Sampler::stop));
            running.report().check(true)?;
            Ok(vec![Full { total, bytes, restore, pause_ms, peak }])
        })?;
    let timed = |part: &str, unit, goal, value: fn(&Full) -> f64| {
        let value = |sample: &Full| sample.peak.is_none().then(|| value(sample));
        samples.figure(&format!("{name}-{part}"), unit, goal, value)
    };
    let size = timed("size", "MB", Goal::RatioMax(1.15), |sample| number(sample.bytes) / 1e6);
    let raw = number(mebibytes << 20) / 1e6;
    if let Some(peer) = size.peer
        && raw / peer < COMPRESSION_MIN
    {
        bail!(
            "the data compresses {:.2} times, {COMPRESSION_MIN} is what is promised for",
            raw / peer
        );
    }
    let peak = Goal::OursMax(PEAK_MEBIBYTES_MAX);
    Ok(vec![
        timed("total", "s", Goal::RatioMax(1.0), |sample| sample.total.as_secs_f64()),
        size,
        timed("restore", "s", Goal::RatioMax(1.0), |sample| sample.restore.as_secs_f64()),
        samples.figure(&format!("{name}-peak"), "MiB", peak, |sample| {
            sample.peak.map(|bytes| number(bytes) / number(1 << 20))
        }),
        timed("pause", "ms", Goal::None, |sample| sample.pause_ms),
    ])
}
