//! Samples of both sides, taken in alternation, and the figures that they make.

use anyhow::{Context as _, Result};

use crate::criu::Peer;
use crate::figure::{Figure, Goal, median};
use crate::runtime::Runtime;
use crate::subject::Engine;

/// Samples of both sides.
#[derive(Debug)]
pub(crate) struct Samples<S> {
    pub(crate) ours: Vec<S>,
    pub(crate) peer: Vec<S>,
}

impl<S: std::fmt::Debug> Samples<S> {
    /// Lets both sides take samples in alternation. `take` gets the side, a name for the round, its number, and whether it is
    /// the last one.
    ///
    /// # Errors
    /// When one cannot be taken.
    pub(crate) fn take(
        name: &str,
        rounds: usize,
        ours: Option<&Runtime<'_>>,
        peer: &Peer<'_>,
        mut take: impl FnMut(&dyn Engine, &str, usize, bool) -> Result<Vec<S>>,
    ) -> Result<Samples<S>> {
        let mut samples = Samples { ours: Vec::new(), peer: Vec::new() };
        for round in 0..rounds {
            // What one leaves behind is taken down while the next runs: the order changes each time.
            for is_peer in [round % 2 == 0, round % 2 != 0] {
                let (engine, into): (&dyn Engine, _) = match (is_peer, ours) {
                    (true, _) => (peer, &mut samples.peer),
                    (false, Some(ours)) => (ours, &mut samples.ours),
                    (false, None) => continue,
                };
                let taken = take(engine, &format!("{name}-{round}"), round, round + 1 == rounds)
                    .with_context(|| format!("{name} with {}", engine.name()))?;
                eprintln!("bench: {name}: {}: {taken:.3?}", engine.name());
                into.extend(taken);
            }
        }
        Ok(samples)
    }

    /// The figure of the medians of a part of them; of those that have it.
    pub(crate) fn figure(
        &self,
        name: &str,
        unit: &'static str,
        goal: Goal,
        part: impl Fn(&S) -> Option<f64>,
    ) -> Figure {
        let middle = |side: &[S]| median(side.iter().filter_map(&part).collect());
        Figure {
            name: name.to_owned(),
            unit,
            ours: middle(&self.ours),
            peer: middle(&self.peer),
            goal,
            undisturbed: None,
        }
    }
}
