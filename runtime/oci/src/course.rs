//! What a capture did when, for the report in its capsule.

use std::sync::Arc;
use std::time::{Duration, Instant};

use samara_capsule::config::PhaseReport;
use samara_store::Progress;

/// The phases so far.
#[derive(Debug)]
pub(crate) struct Course {
    begun: Instant,
    writer: Arc<Progress>,
    /// End of the last phase, and what the writer had taken and uploaded by then.
    last: (Instant, u64, u64),
    phases: Vec<PhaseReport>,
}

impl Course {
    /// Of a capture that began then.
    pub(crate) fn new(begun: Instant, writer: Arc<Progress>) -> Course {
        Course { begun, writer, last: (begun, 0, 0), phases: Vec::new() }
    }

    /// A phase has ended that began with the end of the one before.
    pub(crate) fn ended(&mut self, name: &str) {
        let (start, raw, uploaded) = self.last;
        self.last = (Instant::now(), self.writer.raw_bytes(), self.writer.uploaded_bytes());
        self.phases.push(PhaseReport {
            name: name.to_owned(),
            start_us: us(start.duration_since(self.begun)),
            duration_us: us(self.last.0.duration_since(start)),
            raw_bytes: self.last.1 - raw,
            uploaded_bytes: self.last.2 - uploaded,
        });
    }

    /// The last phase ended with parts, which took so long each; what it passed to the writer was in the last of them.
    pub(crate) fn divide(&mut self, parts: &[(&str, Duration)]) {
        let Some(whole) = self.phases.pop() else { return };
        let known: u64 = parts.iter().map(|(_, took)| us(*took)).sum();
        let mut start_us = whole.start_us;
        let before = PhaseReport {
            duration_us: whole.duration_us.saturating_sub(known),
            raw_bytes: 0,
            uploaded_bytes: 0,
            ..whole.clone()
        };
        start_us += before.duration_us;
        self.phases.push(before);
        for (name, took) in parts {
            let (name, duration_us) = ((*name).to_owned(), us(*took));
            self.phases.push(PhaseReport { name, start_us, duration_us, ..PhaseReport::default() });
            start_us += duration_us;
        }
        if let Some(last) = self.phases.last_mut() {
            (last.raw_bytes, last.uploaded_bytes) = (whole.raw_bytes, whole.uploaded_bytes);
        }
    }

    pub(crate) fn into_phases(self) -> Vec<PhaseReport> {
        self.phases
    }
}

/// Microseconds, as reports have them.
pub(crate) fn us(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_make_up_their_phase() {
        let begun = Instant::now();
        let mut course = Course::new(begun, Arc::default());
        course.ended("prepare");
        std::thread::sleep(Duration::from_millis(2));
        course.ended("look");
        let whole = course.phases.last().cloned().expect("a phase");
        course
            .divide(&[("stop", Duration::from_micros(300)), ("copy", Duration::from_micros(500))]);
        let phases = course.into_phases();
        let names: Vec<&str> = phases.iter().map(|phase| phase.name.as_str()).collect();
        assert_eq!(names, ["prepare", "look", "stop", "copy"]);
        let ends = phases.iter().map(|phase| phase.start_us + phase.duration_us);
        let starts = phases.iter().skip(1).map(|phase| phase.start_us);
        // Microseconds are cut off.
        assert!(ends.zip(starts).all(|(end, start)| start.abs_diff(end) <= 1), "{phases:?}");
        let parts: u64 = phases.iter().skip(1).map(|phase| phase.duration_us).sum();
        assert_eq!(parts, whole.duration_us);
    }
}
