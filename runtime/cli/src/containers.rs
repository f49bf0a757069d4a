//! `samara ps` and `samara save`: containers that run here under samara-runtime, by the names that their users know.
//!
//! [`discovery`] finds their state, [`identity`] their engines and names. A save is the runtime's own `checkpoint`, through the
//! container's monitor; there is no second way.
//!
//! What is absent: calls of an engine. What is needed stands in its files, so that a save works while the engine hangs or is gone.

mod discovery;
mod identity;

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use clap::Args;
use samara_oci::capsule_verbs::{CheckpointArgs, ImageArgs};
use samara_oci::capture::{self, CheckpointError, Held, Summary};
use samara_oci::state_dir::{Record, StateDir, StateError, Status};
use samara_store::Location;
use samara_store::location::LocationError;
use serde::Serialize;

use crate::output::{Output, table};
use identity::{Engine, Identity};

#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// Look here too, where samara-runtime was given this --root
    #[arg(long = "root", value_name = "DIR")]
    roots: Vec<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct Save {
    /// The container's name, its ID, or the beginning of its ID
    #[arg(value_name = "NAME|ID")]
    container: String,
    /// End the container once its capsule is stored, with status 143
    #[arg(long)]
    stop: bool,
    /// Save at once with all that the node has, whatever its budget for captures
    #[arg(long)]
    now: bool,
    /// Save here instead of at the address that the container was started with
    #[arg(long, value_name = "URL")]
    to: Option<String>,
    /// Look here too, where samara-runtime was given this --root
    #[arg(long = "root", value_name = "DIR")]
    roots: Vec<PathBuf>,
}

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ContainersError {
    #[error("containers belong to root: run `samara {verb}` as root")]
    NotRoot { verb: &'static str },
    #[error("cannot look through /proc for containers")]
    Processes(#[source] io::Error),
    #[error("no container {wanted} runs under samara-runtime; {}", listed("there is", known))]
    Unknown { wanted: String, known: Vec<String> },
    #[error("{wanted} means more than one container; {}", listed("it can be", candidates))]
    Ambiguous { wanted: String, candidates: Vec<String> },
    #[error(
        "{name} was started without an address for its capsule: say where to save it, with --to URL"
    )]
    NoAddress { name: String },
    #[error("--to")]
    To(#[source] LocationError),
    #[error("cannot save {name}")]
    Save { name: String, source: Box<CheckpointError> },
}

/// Enough to see a slip of the pen; `samara ps` has them all.
const NAMED_MAX: usize = 8;

fn listed(beginning: &str, names: &[String]) -> String {
    match names {
        [] => format!("{beginning} none"),
        names => {
            let more = names.len().saturating_sub(NAMED_MAX);
            let shown: Vec<&str> = names.iter().take(NAMED_MAX).map(String::as_str).collect();
            let rest = if more > 0 { format!(" and {more} more") } else { String::new() };
            format!("{beginning} {}{rest}", shown.join(", "))
        }
    }
}

/// A container whose state was read.
#[derive(Debug)]
struct Found {
    dir: StateDir,
    record: Record,
    identity: Identity,
}

impl Found {
    fn read(dir: StateDir) -> Result<Found, StateError> {
        let record = dir.load()?;
        let identity = Identity::of(&dir, &record);
        Ok(Found { dir, record, identity })
    }

    /// As its user calls it.
    fn name(&self) -> &str {
        self.identity.name.as_deref().unwrap_or(&self.record.id)
    }

    /// As an error tells it from others: two engines may have one name, two folders one ID.
    fn described(&self) -> String {
        let (name, id, folder) = (self.name(), short(&self.record.id), self.dir.path().display());
        match self.identity.engine {
            Engine::None => format!("{name} ({folder})"),
            engine => format!("{name} ({} {id})", engine.as_str()),
        }
    }
}

/// As engines shorten IDs.
fn short(id: &str) -> &str {
    id.get(..12).unwrap_or(id)
}

/// Every container whose state can be read, by name; what can't be read is a warning.
fn all(
    verb: &'static str,
    roots: &[PathBuf],
    output: &mut Output,
) -> Result<Vec<Found>, ContainersError> {
    let me = std::fs::metadata("/proc/self").map_err(ContainersError::Processes)?;
    if me.uid() != 0 {
        return Err(ContainersError::NotRoot { verb });
    }
    let mut found = Vec::new();
    for dir in discovery::state_dirs(roots).map_err(ContainersError::Processes)? {
        match Found::read(dir) {
            Ok(container) => found.push(container),
            // Not made yet, gone since, or another runtime's.
            Err(StateError::Missing) => {}
            Err(error) => output.warning(&error),
        }
    }
    found.sort_by(|a, b| (a.name(), a.dir.path()).cmp(&(b.name(), b.dir.path())));
    Ok(found)
}

/// Lists containers. On error nothing was printed.
pub(crate) fn ps(args: &Ps, output: &mut Output) -> Result<(), ContainersError> {
    #[derive(Serialize)]
    struct Row<'a> {
        name: &'a str,
        id: &'a str,
        engine: Engine,
        status: &'static str,
        /// Of the init; 0 once it has ended.
        pid: i32,
        processes: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        capsule: Option<String>,
        since: String,
        state_dir: &'a Path,
    }
    let found = all("ps", &args.roots, output)?;
    let rows: Vec<Row<'_>> = found
        .iter()
        .map(|container| {
            let record = &container.record;
            let status = record.status();
            let ended = status == Status::Stopped;
            Row {
                name: container.name(),
                id: &record.id,
                engine: container.identity.engine,
                status: status.as_str(),
                pid: if ended { 0 } else { record.init.pid },
                processes: if ended { 0 } else { record.cgroup.processes().len() },
                capsule: Held::load(&container.dir)
                    .and_then(|held| held.usual_target().map(str::to_owned)),
                since: record.created.format("%Y-%m-%dT%H:%M:%SZ").to_string(),
                state_dir: container.dir.path(),
            }
        })
        .collect();
    output.result(&rows, |rows| {
        let cells = |row: &Row<'_>| {
            vec![
                row.name.to_owned(),
                short(row.id).to_owned(),
                row.engine.as_str().to_owned(),
                row.status.to_owned(),
                row.processes.to_string(),
                row.capsule.clone().unwrap_or_else(|| "-".to_owned()),
                row.since.clone(),
            ]
        };
        let rows: Vec<_> = rows.iter().map(cells).collect();
        table(&["NAME", "ID", "ENGINE", "STATUS", "PIDS ", "CAPSULE", "SINCE"], &rows)
    });
    Ok(())
}

/// Saves a container.
///
/// Success: the capsule is in the store, whole; the container runs on, or has ended if that was asked for.
/// Failure: no capsule is visible, and the container is as it was.
pub(crate) fn save(
    args: &Save,
    config: Option<PathBuf>,
    output: &mut Output,
) -> Result<(), ContainersError> {
    #[derive(Serialize)]
    struct Saved<'a> {
        name: &'a str,
        id: &'a str,
        stopped: bool,
        #[serde(flatten)]
        summary: Summary,
    }
    let to = args.to.as_deref().map(Location::parse).transpose().map_err(ContainersError::To)?;
    let found = all("save", &args.roots, output)?;
    let Found { dir, record, .. } = choose(&found, &args.container)?;
    let name = &args.container;
    let held = Held::load(dir);
    let url = match (to, held.as_ref().and_then(Held::usual_target)) {
        (Some(location), _) => location.to_string(),
        (None, Some(target)) => target.to_owned(),
        (None, None) => return Err(ContainersError::NoAddress { name: name.clone() }),
    };
    let order = CheckpointArgs {
        id: dir.id().clone(),
        image: ImageArgs { capsule: Some(url), ..ImageArgs::default() },
        parent_path: None,
        leave_running: !args.stop,
        every: None,
        now: args.now,
        tcp_skip_in_flight: false,
        link_remap: false,
        status_fd: None,
        page_server: None,
        pre_dump: false,
    };
    let config = match config {
        // The monitor's working directory is another.
        Some(path) => Some(std::path::absolute(&path).unwrap_or(path)),
        None => held.and_then(|held| held.config),
    };
    let phases = output.phases();
    let summary = capture::checkpoint(dir, &order, config, &phases)
        .map_err(|source| ContainersError::Save { name: name.clone(), source: source.into() })?;
    drop(phases);
    let saved = Saved { name, id: &record.id, stopped: args.stop, summary };
    output.result(&saved, |saved| saved.summary.line() + "\n");
    Ok(())
}

/// The one container that is meant by a name, an ID, the beginning of an ID, or the folder of its state.
fn choose<'a>(all: &'a [Found], wanted: &str) -> Result<&'a Found, ContainersError> {
    let exact = |found: &&Found| {
        found.name() == wanted || found.record.id == wanted || found.dir.path() == Path::new(wanted)
    };
    let prefix = |found: &&Found| !wanted.is_empty() && found.record.id.starts_with(wanted);
    let mut meant: Vec<&Found> = all.iter().filter(exact).collect();
    if meant.is_empty() {
        meant = all.iter().filter(prefix).collect();
    }
    // What is left of an ended container does not stand in the way of the one that took its name.
    if meant.len() > 1 && meant.iter().any(|found| found.record.status() != Status::Stopped) {
        meant.retain(|found| found.record.status() != Status::Stopped);
    }
    let described = |found: &[&Found]| found.iter().map(|found| found.described()).collect();
    match meant.as_slice() {
        [one] => Ok(one),
        [] => Err(ContainersError::Unknown {
            wanted: wanted.to_owned(),
            known: described(&all.iter().collect::<Vec<_>>()),
        }),
        several => Err(ContainersError::Ambiguous {
            wanted: wanted.to_owned(),
            candidates: described(several),
        }),
    }
}

#[cfg(test)]
mod tests {
    use samara_oci::container_id::ContainerId;
    use serde_json::json;

    use super::*;

    /// A container as `create` leaves it, whose init is this process, or one that is gone.
    pub(super) fn container(root: &Path, id: &str, bundle: &Path, lives: bool) -> Found {
        let dir = StateDir::claim(root, &ContainerId::parse(id).unwrap()).unwrap();
        let me = i32::try_from(std::process::id()).unwrap();
        let mut init = samara_oci::process::ProcessIdentity::of(me).unwrap();
        if !lives {
            init.start_ticks += 1;
        }
        let record = json!({
            "version": 1, "id": id, "bundle": bundle, "rootfs": root.join("data/overlay2/x/merged"),
            "created": "2026-01-02T03:04:05Z", "annotations": {}, "init": init, "started": true,
            "console": false, "stdio": [null, null, null], "no_new_keyring": false,
            "seccomp_filters": 0, "config_digest": "sha256:0",
            "cgroup": {"path": "/x", "systemd": false, "name": "x", "folders": []},
        });
        dir.save(&serde_json::from_value(record).unwrap()).unwrap();
        Found::read(dir).unwrap()
    }

    fn named(root: &Path, id: &str, name: &str, lives: bool) -> Found {
        let mut found = container(root, id, Path::new("/b"), lives);
        found.identity = Identity { engine: Engine::Docker, name: Some(name.to_owned()) };
        found
    }

    /// A wrong guess saves, and with --stop ends, another job.
    #[test]
    fn one_container_is_meant_or_none() {
        let folder = tempfile::tempdir().unwrap();
        let root = |name: &str| folder.path().join(name);
        let all = [
            named(&root("a"), "aaa1111111111111", "web", true),
            named(&root("a"), "aaa2222222222222", "aaa1", true),
            named(&root("b"), "bbb1111111111111", "job", true),
            named(&root("c"), "ccc1111111111111", "job", true),
            named(&root("a"), "ddd1111111111111", "old", false),
            named(&root("b"), "ddd2222222222222", "old", true),
        ];
        let check =
            |wanted: &str, expected: Result<&str, &str>| match (choose(&all, wanted), expected) {
                (Ok(found), Ok(id)) => assert_eq!(found.record.id, id, "{wanted}"),
                (Err(error), Err(text)) => {
                    assert!(error.to_string().contains(text), "{wanted}: {error}");
                }
                (found, _) => panic!("{wanted}: {found:?}"),
            };
        check("web", Ok("aaa1111111111111"));
        check("aaa11", Ok("aaa1111111111111"));
        // A name goes before the beginning of an ID.
        check("aaa1", Ok("aaa2222222222222"));
        check("bbb", Ok("bbb1111111111111"));
        check("old", Ok("ddd2222222222222"));
        check(
            "job",
            Err(
                "job means more than one container; it can be job (docker bbb111111111), job (docker ccc111111111)",
            ),
        );
        check("aaa", Err("aaa means more than one container"));
        check(
            "none",
            Err("no container none runs under samara-runtime; there is web (docker aaa1"),
        );
        check("", Err("no container "));
        check(&root("c").join("ccc1111111111111").display().to_string(), Ok("ccc1111111111111"));
        assert!(choose(&[], "x").unwrap_err().to_string().ends_with("there is none"));
    }
}
