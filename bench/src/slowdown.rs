//! `slowdown`: how much longer a job takes that uses every processor when it is saved every minute, with a tenth of its 1 GiB
//! written from one capsule to the next. The goal is a share of its time; there is no peer.
//!
//! A run is one such minute: a capsule and what a tenth of the pages cost that are written afterwards. The job starts, is
//! saved for the first time, writes a tenth, and then does a fixed amount of work, at the beginning of which it is saved
//! again. It runs in alternation with a job that is never saved and does the same.
//!
//! Capsules go to a folder: the server of an S3 store on the same machine would take processor time from the job that it does
//! not take elsewhere.

use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::figure::{Figure, Goal, median, number};
use crate::program::PAGES;
use crate::runtime::Runtime;
use crate::subject::{Engine as _, Subject};
use crate::{Bench, Group};

const PERCENT_MAX: f64 = 1.0;
const MEBIBYTES: u64 = 1024;
const DIRTY_PERCENT: u64 = 10;

/// Pairs of runs. Three of a minute each, twice, are the six minutes that one may wait for a figure.
const PAIRS: usize = 3;
const RUN: Duration = Duration::from_secs(60);

/// Work by which is found how much makes a run: a second or two.
const TRIAL_UNITS: u64 = 4000;

pub(crate) fn groups() -> Vec<Group> {
    vec![vec!["slowdown"]]
}

pub(crate) fn measure(bench: &Bench, _names: &[&str]) -> Result<Vec<Figure>> {
    let percent = match bench.ours_in_folder()? {
        Some(ours) => Some(slowdown(bench, &ours)?),
        None => None,
    };
    Ok(vec![Figure {
        name: "slowdown".to_owned(),
        unit: "%",
        ours: percent,
        peer: None,
        goal: Goal::OursMax(PERCENT_MAX),
        undisturbed: None,
    }])
}

fn slowdown(bench: &Bench, ours: &Runtime<'_>) -> Result<f64> {
    let mebibytes = bench.mebibytes(MEBIBYTES);
    let subject = Subject::memory(&bench.folder, mebibytes);
    let share = mebibytes * PAGES * DIRTY_PERCENT / 100;
    let run = |name: &str, units: u64, is_saved: bool, is_last: bool| -> Result<Duration> {
        let mut running = ours.start(&subject, &format!("slowdown-{name}"))?;
        let report = running.report();
        report.watch_clock(false)?;
        if is_saved {
            running.save().context("the first capsule")?;
        }
        report.write_pages(share)?;
        let written = report.written()?;
        let took = report.work(units, share, || if is_saved { running.save() } else { Ok(()) })?;
        if is_last {
            running.bring_back_and_check(written)?;
        }
        Ok(took)
    };
    let trial = run("trial", TRIAL_UNITS, false, false)?.as_secs_f64();
    let length = if bench.rounds(PAIRS) == PAIRS { RUN } else { RUN / 16 };
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive number of units, of which thousands take a second"
    )]
    let units = (number(TRIAL_UNITS) * length.as_secs_f64() / trial) as u64;
    let (mut with, mut without) = (Vec::new(), Vec::new());
    let pairs = bench.rounds(PAIRS);
    for pair in 0..pairs {
        for is_saved in [pair % 2 == 0, pair % 2 != 0] {
            let name = format!("{pair}-{is_saved}");
            let took = run(&name, units, is_saved, is_saved && pair + 1 == pairs)?.as_secs_f64();
            eprintln!("bench: slowdown: {}: {took:.2} s", if is_saved { "saved" } else { "alone" });
            if is_saved { &mut with } else { &mut without }.push(took);
        }
    }
    let middle = |times| median(times).context("no run");
    Ok((middle(with)? / middle(without)? - 1.0) * 100.0)
}
