//! What a capsule holds beside memory: the engine's records, and what a new container must have in common with the old one.

use std::collections::BTreeSet;

use oci_spec::runtime::Spec;
use samara_capsule::record::Container;
use serde::{Deserialize, Serialize};

/// The records of a capsule.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Saved {
    pub container: Container,
    pub origin: Origin,
    /// Trees of files that travel beside the root: mount point and name of the stream.
    pub trees: Vec<SavedTree>,
    /// The container's root travels as the stream of [`ROOT_STREAM`].
    pub root: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SavedTree {
    /// As the container sees it.
    pub path: String,
    pub stream: String,
}

/// The stream with the changes to the container's root.
pub const ROOT_STREAM: &str = "root";

/// What the container was started as. A container that is started as something else is not the same.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    pub args: Vec<String>,
    /// Without what engines set anew for each container.
    pub env: BTreeSet<String>,
    pub user: (u32, u32),
    /// Where something is mounted; what is mounted there differs from engine to engine.
    pub mounts: BTreeSet<String>,
    /// How many filters of a thread are the specification's. They come first, and the next specification's take their place.
    pub seccomp_filters: u32,
}

/// Why a capsule is not continued by a container.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the capsule was saved from a container with another {what}: it had {saved}, this one has {now}; start a new address, or start the container as before"
)]
pub struct Differs {
    what: &'static str,
    saved: String,
    now: String,
}

/// Variables that docker and podman set to a value of the container's own, and the one that leads here.
const PER_CONTAINER: [&str; 4] =
    ["HOSTNAME", "container", "SAMARA_CAPSULE", crate::periodic::VARIABLE];

impl Origin {
    /// Reads what counts from a specification.
    pub fn of(spec: &Spec, seccomp_filters: u32) -> Origin {
        let process = spec.process().as_ref();
        let env = process.and_then(|process| process.env().clone()).unwrap_or_default();
        let kept = |variable: &String| {
            let name = variable.split('=').next().unwrap_or_default();
            !PER_CONTAINER.contains(&name)
        };
        Origin {
            args: process.and_then(|process| process.args().clone()).unwrap_or_default(),
            env: env.into_iter().filter(kept).collect(),
            user: process.map_or((0, 0), |process| (process.user().uid(), process.user().gid())),
            mounts: spec
                .mounts()
                .iter()
                .flatten()
                .map(|mount| mount.destination().to_string_lossy().into_owned())
                .collect(),
            seccomp_filters,
        }
    }

    /// Whether a container of origin `now` may go on from this one.
    pub fn continues_as(&self, now: &Origin) -> Result<(), Differs> {
        let words = |list: &[String]| format!("`{}`", list.join(" "));
        let extra = |one: &BTreeSet<String>, other: &BTreeSet<String>| {
            let only: Vec<&str> = one.difference(other).map(String::as_str).collect();
            if only.is_empty() { "nothing more".to_owned() } else { only.join(", ") }
        };
        let differs = |what, saved, now| Err(Differs { what, saved, now });
        if self.args != now.args {
            return differs("command", words(&self.args), words(&now.args));
        }
        if self.env != now.env {
            return differs("environment", extra(&self.env, &now.env), extra(&now.env, &self.env));
        }
        if self.user != now.user {
            let text = |(uid, gid)| format!("{uid}:{gid}");
            return differs("user", text(self.user), text(now.user));
        }
        if self.mounts != now.mounts {
            return differs(
                "set of mounts",
                extra(&self.mounts, &now.mounts),
                extra(&now.mounts, &self.mounts),
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(args: &[&str], env: &[&str]) -> Origin {
        let strings =
            |list: &[&str]| list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
        Origin {
            args: strings(args),
            env: strings(env).into_iter().collect(),
            user: (0, 0),
            mounts: BTreeSet::new(),
            seccomp_filters: 0,
        }
    }

    /// A job that took another job's capsule would produce the other one's result.
    #[test]
    fn another_command_or_environment_is_refused_by_name() {
        let saved = origin(&["sort", "a"], &["A=1"]);
        assert!(saved.continues_as(&saved.clone()).is_ok());
        let text = saved.continues_as(&origin(&["sort", "b"], &["A=1"])).unwrap_err().to_string();
        assert!(text.contains("another command") && text.contains("`sort b`"), "{text}");
        let text = saved.continues_as(&origin(&["sort", "a"], &["A=2"])).unwrap_err().to_string();
        assert!(text.contains("A=1") && text.contains("A=2"), "{text}");
    }
}
