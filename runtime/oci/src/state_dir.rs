//! The folder of one container, `<root>/<id>`, mode 0700:
//!
//! ```text
//! samara.json      what we know of the container (Record); absent while it is being created
//! config.json      the specification as the engine wrote it
//! monitor.sock     the monitor's control socket
//! hooks.json       the hooks, for the relay
//! bundle/          the specification that libcontainer was given
//! <id>/            libcontainer's own folder
//! ```
//!
//! Invariant: `samara.json` is replaced as a whole, so a reader sees the old or the new one.
//! What is not kept: a status. It follows from the processes and the freezer, each time.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use samara_capsule::digest::Digest;
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::container_id::ContainerId;
use crate::process::ProcessIdentity;

/// Where containers live unless `--root` says otherwise.
pub const DEFAULT_ROOT: &str = "/run/samara";

const RECORD_VERSION: u32 = 1;
/// Annotations are the only part without a small bound; 4 MiB of them is no container of ours.
const RECORD_BYTES_MAX: u64 = 4 << 20;

#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Engines look for these words.
    #[error("container does not exist")]
    Missing,
    #[error("container with given ID already exists")]
    Exists,
    #[error("cannot {attempt} {path}")]
    Io { attempt: &'static str, path: PathBuf, source: std::io::Error },
    #[error("{path} is damaged")]
    Damaged { path: PathBuf, source: serde_json::Error },
    #[error("{path} has version {found}, this program knows {RECORD_VERSION}")]
    Version { path: PathBuf, found: u32 },
}

/// Which file a descriptor leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIdentity {
    pub device: u64,
    pub inode: u64,
}

/// A container, from the end of `create` on.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Record {
    pub version: u32,
    pub id: String,
    /// The engine's bundle.
    pub bundle: PathBuf,
    pub rootfs: PathBuf,
    pub created: chrono::DateTime<chrono::Utc>,
    pub annotations: BTreeMap<String, String>,
    pub init: ProcessIdentity,
    /// Whether `start` was called.
    pub started: bool,
    /// Whether the init has a terminal.
    pub console: bool,
    /// Files of the init's descriptors 0, 1, 2 at creation; none for one that was closed.
    pub stdio: [Option<FileIdentity>; 3],
    /// Whether the container shares its caller's session keyring.
    pub no_new_keyring: bool,
    /// Filters that this program installs in the init; a program may add its own.
    pub seccomp_filters: u32,
    /// `sha256:…` of the bundle's config.json.
    pub config_digest: String,
    pub cgroup: Cgroup,
}

/// `status` as runc prints it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    Created,
    Running,
    Paused,
    Stopped,
}

impl Status {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Stopped => "stopped",
        }
    }
}

impl Record {
    pub fn status(&self) -> Status {
        if !self.init.is_alive() {
            Status::Stopped
        } else if self.cgroup.is_frozen() {
            Status::Paused
        } else if self.started {
            Status::Running
        } else {
            Status::Created
        }
    }
}

/// The version that `create` writes.
pub(crate) fn record_version() -> u32 {
    RECORD_VERSION
}

/// A container's folder; it may or may not exist.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
    id: ContainerId,
}

impl StateDir {
    pub fn new(root: &Path, id: &ContainerId) -> Self {
        Self { path: root.join(id.as_str()), id: id.clone() }
    }

    /// Makes the folder, which no other container may have.
    pub fn claim(root: &Path, id: &ContainerId) -> Result<Self, StateError> {
        let dir = Self::new(root, id);
        let io = |attempt, path: &Path, source| StateError::Io {
            attempt,
            path: path.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(root)
            .map_err(|source| io("create", root, source))?;
        DirBuilder::new().mode(0o700).create(&dir.path).map_err(|source| {
            if source.kind() == std::io::ErrorKind::AlreadyExists {
                StateError::Exists
            } else {
                io("create", &dir.path, source)
            }
        })?;
        Ok(dir)
    }

    pub fn id(&self) -> &ContainerId {
        &self.id
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    pub fn config(&self) -> PathBuf {
        self.path.join("config.json")
    }

    pub fn hooks(&self) -> PathBuf {
        self.path.join("hooks.json")
    }

    /// The bundle that libcontainer is given.
    pub fn inner_bundle(&self) -> PathBuf {
        self.path.join("bundle")
    }

    /// libcontainer's own folder, which it makes.
    pub fn libcontainer(&self) -> PathBuf {
        self.path.join(self.id.as_str())
    }

    /// What is known of the container.
    pub fn load(&self) -> Result<Record, StateError> {
        let path = self.record();
        let io = |source| StateError::Io { attempt: "read", path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Err(StateError::Missing),
            Err(source) => return Err(io(source)),
        };
        let mut text = Vec::new();
        file.take(RECORD_BYTES_MAX).read_to_end(&mut text).map_err(io)?;
        let damaged = |source| StateError::Damaged { path: path.clone(), source };
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let found = serde_json::from_slice::<Versioned>(&text).map_err(damaged)?.version;
        if found != RECORD_VERSION {
            return Err(StateError::Version { path, found });
        }
        serde_json::from_slice(&text).map_err(damaged)
    }

    /// Keeps `record` in place of the one before.
    pub fn save(&self, record: &Record) -> Result<(), StateError> {
        let path = self.record();
        let io = |source| StateError::Io { attempt: "write", path: path.clone(), source };
        let text = serde_json::to_vec(record).map_err(|e| io(e.into()))?;
        replace(&path, &text).map_err(io)
    }

    /// Removes the folder and all in it; one that is gone already is no error.
    pub fn remove(&self) -> Result<(), StateError> {
        // Under a name that no container can have: a standby that looks here must find all of it or nothing, and cannot
        // put anything into it.
        // A digest, since the container's own name may be as long as names can be.
        let id = Digest::of(self.id.as_str().as_bytes()).hex();
        let gone = self.path.with_file_name(format!("@gone-{id}"));
        // What an earlier one of this name left when it was killed here.
        let _ = std::fs::remove_dir_all(&gone);
        let removed =
            std::fs::rename(&self.path, &gone).and_then(|()| std::fs::remove_dir_all(&gone));
        match removed {
            Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
                Err(StateError::Io { attempt: "remove", path: self.path.clone(), source })
            }
            _ => Ok(()),
        }
    }

    fn record(&self) -> PathBuf {
        self.path.join("samara.json")
    }
}

/// The containers under `root`, by name; folders without a readable record are left out.
pub fn list(root: &Path) -> Result<Vec<Record>, StateError> {
    let entries = match std::fs::read_dir(root) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => {
            return Err(StateError::Io { attempt: "list", path: root.to_owned(), source });
        }
    };
    let mut records: Vec<Record> = entries
        .flatten()
        .filter_map(|entry| ContainerId::parse(entry.file_name().to_str()?).ok())
        .filter_map(|id| StateDir::new(root, &id).load().ok())
        .collect();
    records.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(records)
}

/// Writes a file that only root reads, as a whole: others see it as it was or as it will be.
pub(crate) fn replace(path: &Path, text: &[u8]) -> std::io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(format!(".{}", std::process::id()));
    std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(text))
        .and_then(|()| std::fs::rename(&temporary, path))
        .inspect_err(|_| {
            // On a full disk it would be in the way of whoever makes room.
            let _ = std::fs::remove_file(&temporary);
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_containers_cannot_have_one_name() {
        let root = tempfile::tempdir().unwrap();
        let id = ContainerId::parse("a").unwrap();
        let dir = StateDir::claim(root.path(), &id).unwrap();
        assert!(matches!(StateDir::claim(root.path(), &id), Err(StateError::Exists)));
        assert!(matches!(dir.load(), Err(StateError::Missing)));
        dir.remove().unwrap();
        StateDir::claim(root.path(), &id).unwrap();
    }

    /// A record that a newer program wrote must not be half understood.
    #[test]
    fn records_of_other_versions_are_refused() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir::claim(root.path(), &ContainerId::parse("a").unwrap()).unwrap();
        std::fs::write(dir.record(), r#"{"version": 2, "whatever": true}"#).unwrap();
        assert!(matches!(dir.load(), Err(StateError::Version { found: 2, .. })));
        std::fs::write(dir.record(), "{").unwrap();
        assert!(matches!(dir.load(), Err(StateError::Damaged { .. })));
        assert!(list(root.path()).unwrap().is_empty());
    }
}
