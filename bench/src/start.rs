//! `start`: a container that does nothing, from call to end, beside runc.

use anyhow::{Context as _, Result};

use crate::figure::{Figure, Goal, median};
use crate::runtime::Runtime;
use crate::{Bench, Group};

/// No slower than runc.
const RATIO_MAX: f64 = 1.0;
const RUNS: usize = 61;

pub(crate) fn groups() -> Vec<Group> {
    vec![vec!["start"]]
}

pub(crate) fn measure(bench: &Bench, _names: &[&str]) -> Result<Vec<Figure>> {
    let peer = Runtime::runc(&bench.folder);
    let ours = bench.ours()?;
    let (mut our_times, mut peer_times) = (Vec::new(), Vec::new());
    // The first of each finds cold caches.
    for number in 0..=bench.rounds(RUNS) {
        // What one leaves behind (control groups, namespaces) is taken down while the next runs: the order changes each time.
        for side in [number % 2, (number + 1) % 2] {
            let (runtime, times) = match (side, &ours) {
                (0, _) => (&peer, &mut peer_times),
                (_, Some(ours)) => (ours, &mut our_times),
                (_, None) => continue,
            };
            let took = runtime.run_nothing()?.as_secs_f64() * 1000.0;
            if number > 0 {
                times.push(took);
            }
        }
    }
    Ok(vec![Figure {
        name: "start".to_owned(),
        unit: "ms",
        ours: median(our_times),
        peer: Some(median(peer_times).context("no run of runc")?),
        goal: Goal::RatioMax(RATIO_MAX),
        undisturbed: None,
    }])
}
