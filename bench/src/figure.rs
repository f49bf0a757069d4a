//! A measured figure beside its peer's, and how it is printed.

use serde_json::json;

/// What a figure must be to hold. Both sides were measured in the same run, in alternation.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Goal {
    /// The peer's is at least this many times ours.
    TimesLess(f64),
    /// Ours divided by the peer's is at most this.
    RatioMax(f64),
    /// Ours divided by the peer's is at least this.
    RatioMin(f64),
    /// Ours is at most this, whatever the peer's.
    OursMax(f64),
    /// Printed for the reader; holds always.
    None,
}

/// One line of the result.
#[derive(Clone, Debug)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    /// `None` when only the peer was measured.
    pub(crate) ours: Option<f64>,
    /// `None` where nobody else promises anything of the kind.
    pub(crate) peer: Option<f64>,
    pub(crate) goal: Goal,
    /// What the instrument shows when nothing is done, where that could be taken for a part of the figure.
    pub(crate) undisturbed: Option<f64>,
}

/// A count as a sample.
#[expect(clippy::cast_precision_loss, reason = "counts and sizes far below 2^53")]
pub(crate) fn number(count: u64) -> f64 {
    count as f64
}

/// The middle of the samples; the mean of the two in the middle when their number is even.
pub(crate) fn median(mut samples: Vec<f64>) -> Option<f64> {
    samples.sort_by(f64::total_cmp);
    let middle = samples.len() / 2;
    match (
        samples.len() % 2,
        samples.get(middle),
        middle.checked_sub(1).and_then(|below| samples.get(below)),
    ) {
        (1, Some(value), _) => Some(*value),
        (0, Some(above), Some(below)) => Some(f64::midpoint(*above, *below)),
        _ => None,
    }
}

fn shown(value: Option<f64>, unit: &str) -> String {
    value.map_or_else(
        || "-".to_owned(),
        |value| format!("{value:.*}{unit}", if value < 10.0 { 3 } else { 1 }),
    )
}

impl Figure {
    pub(crate) fn ratio(&self) -> Option<f64> {
        Some(self.ours? / self.peer?)
    }

    /// `None` when there is nothing to judge.
    pub(crate) fn holds(&self) -> Option<bool> {
        let ours = self.ours?;
        match self.goal {
            Goal::RatioMax(most) => self.ratio().map(|ratio| ratio <= most),
            Goal::RatioMin(least) => self.ratio().map(|ratio| ratio >= least),
            Goal::TimesLess(times) => self.ratio().map(|ratio| ratio * times <= 1.0),
            Goal::OursMax(most) => Some(ours <= most),
            Goal::None => Some(true),
        }
    }

    fn goal_shown(&self) -> String {
        match self.goal {
            Goal::RatioMax(most) => format!("ratio<={most}"),
            Goal::RatioMin(least) => format!("ratio>={least}"),
            Goal::TimesLess(times) => format!("ratio<=1/{times}"),
            Goal::OursMax(most) => format!("ours<={most}{}", self.unit),
            Goal::None => "none".to_owned(),
        }
    }

    fn verdict(&self) -> &'static str {
        match self.holds() {
            Some(true) => "holds",
            Some(false) => "short",
            None => "unmeasured",
        }
    }

    /// `NAME ours=… peer=… ratio=… goal=… holds|short`, and `undisturbed=…` before the verdict where it is known.
    pub(crate) fn line(&self) -> String {
        let undisturbed = self
            .undisturbed
            .map(|value| format!("undisturbed={} ", shown(Some(value), self.unit)))
            .unwrap_or_default();
        format!(
            "{} ours={} peer={} ratio={} goal={} {undisturbed}{}",
            self.name,
            shown(self.ours, self.unit),
            shown(self.peer, self.unit),
            shown(self.ratio(), ""),
            self.goal_shown(),
            self.verdict()
        )
    }

    pub(crate) fn json(&self) -> String {
        json!({
            "figure": self.name, "unit": self.unit, "ours": self.ours, "peer": self.peer,
            "ratio": self.ratio(), "goal": self.goal_shown(), "undisturbed": self.undisturbed,
            "verdict": self.verdict(),
        })
        .to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn medians() {
        let check = |samples: &[f64], expected| {
            assert_eq!(median(samples.to_vec()), expected, "{samples:?}")
        };
        check(&[], None);
        check(&[3.0], Some(3.0));
        check(&[9.0, 1.0, 5.0], Some(5.0));
        check(&[4.0, 1.0, 2.0, 9.0], Some(3.0));
    }

    /// CI reads the exit status, which comes from here.
    #[test]
    fn a_figure_is_judged_by_its_goal() {
        let figure = |ours, goal| Figure {
            name: "x".to_owned(),
            unit: "s",
            ours,
            peer: Some(2.0),
            goal,
            undisturbed: None,
        };
        assert_eq!(figure(Some(2.0), Goal::RatioMax(1.0)).holds(), Some(true));
        assert_eq!(figure(Some(2.1), Goal::RatioMax(1.0)).holds(), Some(false));
        assert_eq!(figure(Some(1.6), Goal::RatioMin(0.8)).holds(), Some(true));
        assert_eq!(figure(Some(1.5), Goal::RatioMin(0.8)).holds(), Some(false));
        assert_eq!(figure(Some(5.0), Goal::OursMax(6.0)).holds(), Some(true));
        assert_eq!(figure(None, Goal::OursMax(6.0)).holds(), None);
        assert_eq!(
            figure(Some(1.0), Goal::RatioMax(0.6)).line(),
            "x ours=1.000s peer=2.000s ratio=0.500 goal=ratio<=0.6 holds"
        );
        assert_eq!(figure(Some(0.1), Goal::TimesLess(20.0)).holds(), Some(true));
        assert_eq!(figure(Some(0.11), Goal::TimesLess(20.0)).holds(), Some(false));
        let alone =
            Figure { peer: None, undisturbed: Some(0.5), ..figure(Some(1.0), Goal::OursMax(0.5)) };
        assert_eq!(
            alone.line(),
            "x ours=1.000s peer=- ratio=- goal=ours<=0.5s undisturbed=0.500s short"
        );
    }
}
