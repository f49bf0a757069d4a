//! How long until what is saved is durable, in an S3 server on the loopback: a program of 8 GiB, beside a dump by CRIU to memory,
//! packed by `zstd -T2` and PUT to the same server.
//!
//! - `durable-full`: the first capsule.
//! - `durable-increment`: the next one, when 2 % of the pages have been written, while the program writes on at 2 % a second.
//!   The peer has no increments, and does the same again.

use std::time::{Duration, Instant};

use anyhow::Result;

use crate::figure::{Figure, Goal};
use crate::program::PAGES;
use crate::samples::Samples;
use crate::subject::{Running, Subject};
use crate::{Bench, Group};

const MEBIBYTES: u64 = 8192;
const DIRTY_PERCENT: u64 = 2;
const ROUNDS: usize = 5;

/// One pass instead of three.
const FULL_TIMES_LESS: f64 = 2.0;
/// 2 % of the data, and the price of a scan and of some requests.
const INCREMENT_TIMES_LESS: f64 = 25.0;

#[derive(Clone, Copy, Debug)]
struct Durable {
    full: Duration,
    /// The peer's is its full one.
    increment: Duration,
}

pub(crate) fn groups() -> Vec<Group> {
    vec![vec!["durable-full", "durable-increment"]]
}

pub(crate) fn measure(bench: &Bench, names: &[&str]) -> Result<Vec<Figure>> {
    let peer = bench.peer_in_memory()?;
    let mebibytes = bench.mebibytes(MEBIBYTES);
    bench.warm("durable", &peer, mebibytes)?;
    let ours = bench.ours()?;
    let subject = Subject::memory(&bench.folder, mebibytes);
    let share = mebibytes * PAGES * DIRTY_PERCENT / 100;
    let rounds = bench.rounds(ROUNDS);
    let samples =
        Samples::take("durable", rounds, ours.as_ref(), &peer, |engine, round, _, is_last| {
            let mut running = engine.start(&subject, round)?;
            let report = running.report();
            report.watch_clock(false)?;
            let full = time(running.as_ref())?;
            let mut durable = Durable { full, increment: full };
            let mut written = 0;
            if engine.has_increments() {
                report.write_on(share, share)?;
                written = report.written()?;
                durable.increment = time(running.as_ref())?;
                report.set_rate(0)?;
            }
            if is_last {
                running.bring_back_and_check(written)?;
            }
            Ok(vec![durable])
        })?;
    let figure = |name: &str, times, part: fn(&Durable) -> Duration| {
        let part = |durable: &Durable| Some(part(durable).as_secs_f64());
        samples.figure(name, "s", Goal::TimesLess(times), part)
    };
    let mut figures = vec![
        figure("durable-full", FULL_TIMES_LESS, |durable| durable.full),
        figure("durable-increment", INCREMENT_TIMES_LESS, |durable| durable.increment),
    ];
    figures.retain(|figure| names.contains(&figure.name.as_str()));
    Ok(figures)
}

fn time(running: &dyn Running) -> Result<Duration> {
    let begin = Instant::now();
    running.save()?;
    running.make_durable()?;
    Ok(begin.elapsed())
}
