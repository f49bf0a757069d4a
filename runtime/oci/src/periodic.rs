//! Capsules at intervals: what is asked for, and where the container's monitor finds it.
//!
//! A container with an address is saved at intervals unless its specification says otherwise; any other one when `checkpoint --every` says
//! so. A note in the container's folder holds it, so that a monitor that takes another one's place goes on.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::Duration;

use oci_spec::runtime::Spec;
use samara_store::Retention;
use serde::{Deserialize, Serialize};

use crate::state_dir::{StateDir, replace};

/// The annotation, and the variable of the container's environment, that say how often a container with an address is saved.
pub const ANNOTATION: &str = "dev.samara.interval";
pub const VARIABLE: &str = "SAMARA_INTERVAL";
/// The annotation that says which of the capsules that come about in this way are kept.
pub const RETENTION_ANNOTATION: &str = "dev.samara.retention";

/// How often a container with an address is saved where nothing says so.
pub const INTERVAL: Duration = Duration::from_secs(300);
/// More often nobody's capsule would be ready.
const INTERVAL_MIN: Duration = Duration::from_secs(1);
/// Which capsules are kept where nothing says so: the newest, and two in case that it can't be resumed.
const RETENTION: &str = "last=3";

#[derive(Debug, thiserror::Error)]
pub enum PeriodicError {
    #[error(
        "{name} is {text:?}; an interval is written 90s, 5m or 1h, at least {INTERVAL_MIN:?}, and `off` means none"
    )]
    Interval { name: &'static str, text: String },
    #[error("{RETENTION_ANNOTATION}")]
    Retention(#[source] samara_store::collect::RetentionError),
}

/// How often, if at all, and which capsules stay.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Schedule {
    pub(crate) every: Option<Duration>,
    pub(crate) retention: String,
}

impl Schedule {
    /// What a specification asks for.
    pub(crate) fn of(spec: &Spec) -> Result<Schedule, PeriodicError> {
        let annotations = spec.annotations().as_ref();
        let annotation = |name: &str| annotations.and_then(|all| all.get(name)).cloned();
        let variable = || {
            let process = spec.process().as_ref();
            let variables = process.and_then(|process| process.env().as_ref());
            variables.into_iter().flatten().rev().find_map(|variable| {
                let (name, value) = variable.split_once('=')?;
                (name == VARIABLE && !value.is_empty()).then(|| value.to_owned())
            })
        };
        let every = match (annotation(ANNOTATION), variable()) {
            (Some(text), _) => interval(ANNOTATION, &text)?,
            (None, Some(text)) => interval(VARIABLE, &text)?,
            (None, None) => Some(INTERVAL),
        };
        let retention = annotation(RETENTION_ANNOTATION).unwrap_or_else(|| RETENTION.to_owned());
        retention.parse::<Retention>().map_err(PeriodicError::Retention)?;
        Ok(Schedule { every, retention })
    }
}

/// An interval as users write it; none for `off`.
pub fn interval(name: &'static str, text: &str) -> Result<Option<Duration>, PeriodicError> {
    if text == "off" {
        return Ok(None);
    }
    let every = Retention::parse_age(text).ok().filter(|every| *every >= INTERVAL_MIN);
    let wrong = || PeriodicError::Interval { name, text: text.to_owned() };
    every.map(Some).ok_or_else(wrong)
}

/// The note for the monitor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Periodic {
    every_ms: u64,
    /// What the worker is told.
    pub(crate) args: serde_json::Value,
}

impl Periodic {
    pub(crate) fn new(every: Duration, args: serde_json::Value) -> Periodic {
        Periodic { every_ms: u64::try_from(every.as_millis()).unwrap_or(u64::MAX), args }
    }

    pub(crate) fn every(&self) -> Duration {
        Duration::from_millis(self.every_ms).max(INTERVAL_MIN)
    }

    fn path(dir: &StateDir) -> PathBuf {
        dir.path().join("periodic.json")
    }

    /// What is noted for a container, if anything.
    pub(crate) fn load(dir: &StateDir) -> Option<Periodic> {
        serde_json::from_slice(&fs::read(Periodic::path(dir)).ok()?).ok()
    }

    /// Notes it, or that there is nothing.
    pub(crate) fn note(periodic: Option<&Periodic>, dir: &StateDir) -> io::Result<()> {
        match periodic {
            Some(periodic) => replace(&Periodic::path(dir), &serde_json::to_vec(periodic)?),
            None => match fs::remove_file(Periodic::path(dir)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            },
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]
mod tests {
    use super::*;

    fn schedule(annotations: &str, variables: &str) -> Result<Schedule, String> {
        let spec = format!(
            r#"{{"ociVersion": "1.0.2", "annotations": {{{annotations}}},
                "process": {{"cwd": "/", "user": {{"uid": 0, "gid": 0}}, "env": [{variables}]}}}}"#
        );
        Schedule::of(&serde_json::from_str(&spec).unwrap()).map_err(|error| error.to_string())
    }

    /// A user who asks for capsules, or for none, must get that.
    #[test]
    fn the_specification_is_taken_at_its_word() {
        let every = |annotations, variables| schedule(annotations, variables).unwrap().every;
        assert_eq!(every("", ""), Some(INTERVAL));
        assert_eq!(every(r#""dev.samara.interval": "90s""#, ""), Some(Duration::from_secs(90)));
        assert_eq!(every("", r#""SAMARA_INTERVAL=2m""#), Some(Duration::from_secs(120)));
        let both = every(r#""dev.samara.interval": "off""#, r#""SAMARA_INTERVAL=2m""#);
        assert_eq!(both, None);
        assert_eq!(
            schedule(r#""dev.samara.retention": "last=7""#, "").unwrap().retention,
            "last=7"
        );
        for wrong in ["10ms", "often", "-5s", ""] {
            let text = schedule(&format!(r#""dev.samara.interval": "{wrong}""#), "").unwrap_err();
            assert!(text.contains("dev.samara.interval is"), "{text}");
        }
        assert!(schedule(r#""dev.samara.retention": "all""#, "").is_err());
    }
}
