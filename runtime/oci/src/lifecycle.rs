//! The short verbs on a container that exists: `start`, `state`, `kill`, `delete`, `pause`,
//! `resume`, `list`, `ps`.
//!
//! What they do not do: keep a status. Each reads it off the processes and the freezer.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use libcontainer::container::{Container, ContainerStatus};
use libcontainer::notify_socket::{NOTIFY_FILE, NotifySocket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use samara_store::Kept;
use serde::Serialize;

use crate::bundle::{Bundle, BundleError};
use crate::capture::Held;
use crate::cgroup::CgroupError;
use crate::ending;
use crate::hooks::{self, HookError, HookState};
use crate::monitor;
use crate::process::ProcessIdentity;
use crate::report::Log;
use crate::restore::Restored;
use crate::signal_name::{self, SignalNumber};
use crate::state_dir::{self, Record, StateDir, StateError, Status};

impl LifecycleError {
    /// Whether a capsule is there that the container does not continue from.
    pub fn is_refused(&self) -> bool {
        matches!(self, LifecycleError::Restore(error) if error.is_refused())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LifecycleError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Hook(#[from] HookError),
    // Engines look for the words of the next ones, which are runc's.
    #[error("container not running")]
    NotRunning,
    #[error("cannot start a container that has stopped")]
    StartStopped,
    #[error("cannot start an already running container")]
    StartRunning,
    #[error("container not running or created: {}", .0.as_str())]
    NotPausable(Status),
    #[error("container not paused")]
    NotPaused,
    #[error("cannot delete container {id} that is not stopped: {}", status.as_str())]
    NotStopped { id: String, status: Status },
    #[error("unknown signal {0:?}")]
    UnknownSignal(String),
    #[error("cannot signal the container's init")]
    Signal(#[source] std::io::Error),
    #[error("container init still running")]
    StillRunning,
    #[error("cannot wake the container's init")]
    Notify(#[source] libcontainer::notify_socket::NotifyListenerError),
    #[error("cannot keep libcontainer's state")]
    Libcontainer(#[source] Box<libcontainer::error::LibcontainerError>),
    #[error(transparent)]
    Restore(#[from] Box<crate::restore::RestoreError>),
    #[error("cannot write the output")]
    Output(#[source] std::io::Error),
    #[error("cannot run ps")]
    Ps(#[source] std::io::Error),
    #[error("ps failed: {0}")]
    PsFailed(String),
}

/// Lets the container's init become its program, or the saved one; then what is in `kept` need not be read again.
pub fn start(dir: &StateDir, kept: Kept) -> Result<Option<Restored>, LifecycleError> {
    let mut record = dir.load()?;
    match record.status() {
        Status::Created => {}
        Status::Stopped => return Err(LifecycleError::StartStopped),
        Status::Running | Status::Paused => return Err(LifecycleError::StartRunning),
    }
    NotifySocket::new(dir.libcontainer().join(NOTIFY_FILE))
        .notify_container_start()
        .map_err(LifecycleError::Notify)?;
    let restored = crate::restore::finish(dir, kept).map_err(Box::new)?;
    record.started = true;
    dir.save(&record)?;
    mark_running(dir)?;
    let spec = Bundle::reload(&dir.config())?;
    let told = HookState::of(&record, true);
    if let Err(error) = hooks::run(hooks::Kind::Poststart, spec.hooks().as_ref(), &told, None) {
        // As runc: a container whose poststart hook fails does not run on.
        ending::ask(dir, "a failed hook");
        let _ = record.init.signal(SignalNumber::KILL);
        return Err(error.into());
    }
    Ok(restored)
}

/// libcontainer refuses `exec` into a container that it does not take for running.
fn mark_running(dir: &StateDir) -> Result<(), LifecycleError> {
    let failed = |error| LifecycleError::Libcontainer(Box::new(error));
    let mut container = Container::load(dir.libcontainer()).map_err(failed)?;
    container.set_status(ContainerStatus::Running);
    container.save().map_err(failed)
}

/// `state` of the OCI specification, with runc's additions.
#[derive(Debug, Serialize)]
struct StateOutput<'a> {
    #[serde(rename = "ociVersion")]
    oci_version: &'static str,
    id: &'a str,
    pid: i32,
    status: &'static str,
    bundle: &'a Path,
    rootfs: &'a Path,
    created: String,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
    owner: &'static str,
}

impl<'a> StateOutput<'a> {
    fn of(record: &'a Record) -> Self {
        let status = record.status();
        Self {
            oci_version: OCI_VERSION,
            id: &record.id,
            pid: if status == Status::Stopped { 0 } else { record.init.pid },
            status: status.as_str(),
            bundle: &record.bundle,
            rootfs: &record.rootfs,
            created: record.created.to_rfc3339_opts(chrono::SecondsFormat::Nanos, true),
            annotations: &record.annotations,
            owner: "",
        }
    }
}

/// Of the specification that this program follows.
pub const OCI_VERSION: &str = "1.2.0";

/// Prints the container's state as JSON.
pub fn state(dir: &StateDir, out: &mut impl Write) -> Result<(), LifecycleError> {
    let record = dir.load()?;
    print_json(out, &StateOutput::of(&record), true)
}

/// Prints every container under `root`.
pub fn list(
    root: &Path,
    json: bool,
    quiet: bool,
    out: &mut impl Write,
) -> Result<(), LifecycleError> {
    let records = state_dir::list(root)?;
    let write = |result: std::io::Result<()>| result.map_err(LifecycleError::Output);
    if quiet {
        for record in &records {
            write(writeln!(out, "{}", record.id))?;
        }
        return Ok(());
    }
    let outputs: Vec<StateOutput<'_>> = records
        .iter()
        .map(|record| StateOutput { owner: "root", ..StateOutput::of(record) })
        .collect();
    if json {
        return print_json(out, &outputs, false);
    }
    let header = ["ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER"].map(str::to_owned);
    let mut rows = vec![header];
    rows.extend(outputs.iter().map(|o| {
        [
            o.id.to_owned(),
            o.pid.to_string(),
            o.status.to_owned(),
            o.bundle.display().to_string(),
            o.created.clone(),
            o.owner.to_owned(),
        ]
    }));
    // As Go's tabwriter does for runc: columns of at least 12, three spaces between.
    let mut widths = [0; 6];
    for row in &rows {
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = (cell.len() + 3).max(*width).max(12);
        }
    }
    for row in &rows {
        let line: String =
            row.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        write(writeln!(out, "{}", line.trim_end()))?;
    }
    Ok(())
}

/// Sends a signal to the container's init, or to every process in it.
pub fn kill(dir: &StateDir, signal: &str, all: bool) -> Result<(), LifecycleError> {
    let number = signal_name::parse(signal)
        .ok_or_else(|| LifecycleError::UnknownSignal(signal.to_owned()))?;
    let record = dir.load()?;
    let status = record.status();
    if all || (number == SignalNumber::KILL && outlives_init(dir)) {
        if status == Status::Stopped && record.cgroup.processes().is_empty() {
            // runc says nothing when there is nobody left to signal.
            return if all { Ok(()) } else { Err(LifecycleError::NotRunning) };
        }
        ending::ask_by_signal(dir, number);
        return Ok(record.cgroup.signal_all(number)?);
    }
    if status == Status::Stopped {
        return Err(LifecycleError::NotRunning);
    }
    ending::ask_by_signal(dir, number);
    if !record.init.signal(number).map_err(LifecycleError::Signal)? {
        return Err(LifecycleError::NotRunning);
    }
    // On cgroup v1 a frozen process dies only when it is thawed.
    if number == SignalNumber::KILL && status == Status::Paused {
        record.cgroup.thaw()?;
    }
    Ok(())
}

/// Whether processes remain when the init ends: those of a pid namespace of its own do not.
fn outlives_init(dir: &StateDir) -> bool {
    Bundle::reload(&dir.config())
        .is_ok_and(|spec| spec.linux().as_ref().is_some_and(crate::create::shares_pid_namespace))
}

/// How long `delete --force` waits for the killed init, as runc.
const GONE_WITHIN: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Removes the container. A running one only with `force`, which kills it.
pub fn delete(dir: &StateDir, force: bool, log: &Log) -> Result<(), LifecycleError> {
    let record = match dir.load() {
        Ok(record) => record,
        Err(StateError::Missing) if dir.exists() => return delete_half_made(dir, force),
        Err(StateError::Missing) if force => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    match record.status() {
        Status::Stopped => {}
        Status::Created => kill_and_wait(dir, &record)?,
        Status::Running | Status::Paused if force => kill_and_wait(dir, &record)?,
        status @ (Status::Running | Status::Paused) => {
            return Err(LifecycleError::NotStopped { id: record.id, status });
        }
    }
    if !record.cgroup.processes().is_empty() {
        record.cgroup.signal_all(SignalNumber::KILL)?;
    }
    monitor::stop(dir);
    if let Some(held) = Held::load(dir).filter(|held| held.carried && !ending::was_seen(dir)) {
        log.warning(&format!(
            "how {} ended was not seen, since its monitor had been killed: a start at {} goes on from the last capsule, if there is one",
            record.id, held.address
        ));
    }
    record.cgroup.remove()?;
    let spec = Bundle::reload(&dir.config());
    dir.remove()?;
    let told = HookState::of(&record, false);
    let hooks = spec.as_ref().ok().and_then(|spec| spec.hooks().as_ref());
    if let Err(error) = hooks::run(hooks::Kind::Poststop, hooks, &told, None) {
        // The container is gone whatever the hook says; the specification wants a warning.
        log.warning(&crate::report::chain(&error));
    }
    Ok(())
}

/// A folder whose `create` was killed: nothing is recorded, so what can be known is removed.
fn delete_half_made(dir: &StateDir, force: bool) -> Result<(), LifecycleError> {
    if let Ok(container) = Container::load(dir.libcontainer()) {
        let identity = container.pid().and_then(|pid| ProcessIdentity::of(pid.as_raw()));
        if let Some(identity) = identity {
            if !force {
                return Err(LifecycleError::StillRunning);
            }
            identity.signal(SignalNumber::KILL).map_err(LifecycleError::Signal)?;
            wait_until_gone(&identity)?;
        }
    }
    monitor::stop(dir);
    if let Ok(spec) = Bundle::reload(&dir.config())
        && let Some(linux) = spec.linux()
        && let Ok(path) = crate::bundle::cgroup_path(linux, dir.id(), false)
    {
        crate::cgroup::remove_by_path(&path);
    }
    Ok(dir.remove()?)
}

fn kill_and_wait(dir: &StateDir, record: &Record) -> Result<(), LifecycleError> {
    ending::ask(dir, "delete");
    record.init.signal(SignalNumber::KILL).map_err(LifecycleError::Signal)?;
    if record.cgroup.is_frozen() {
        record.cgroup.thaw()?;
    }
    wait_until_gone(&record.init)
}

fn wait_until_gone(init: &ProcessIdentity) -> Result<(), LifecycleError> {
    let Some(fd) = init.pidfd() else { return Ok(()) };
    let mut fds = [PollFd::new(&fd, PollFlags::IN)];
    // A signal to this process ends the wait early; what counts is whether the init is gone.
    let _ = poll(&mut fds, Some(&GONE_WITHIN));
    if init.is_alive() { Err(LifecycleError::StillRunning) } else { Ok(()) }
}

/// Freezes every process of the container.
pub fn pause(dir: &StateDir) -> Result<(), LifecycleError> {
    let record = dir.load()?;
    match record.status() {
        Status::Running | Status::Created => Ok(record.cgroup.freeze()?),
        status @ (Status::Paused | Status::Stopped) => Err(LifecycleError::NotPausable(status)),
    }
}

/// Thaws the container.
pub fn resume(dir: &StateDir) -> Result<(), LifecycleError> {
    let record = dir.load()?;
    if record.status() != Status::Paused {
        return Err(LifecycleError::NotPaused);
    }
    Ok(record.cgroup.thaw()?)
}

/// Prints the container's processes: their pids as JSON, or the lines of `ps` that are about them.
pub fn ps(
    dir: &StateDir,
    json: bool,
    args: &[String],
    out: &mut impl Write,
) -> Result<(), LifecycleError> {
    let record = dir.load()?;
    let pids = record.cgroup.processes();
    if json {
        return print_json(out, &pids, false);
    }
    let default = ["-ef".to_owned()];
    let args = if args.is_empty() { &default[..] } else { args };
    let output =
        std::process::Command::new("ps").args(args).output().map_err(LifecycleError::Ps)?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(LifecycleError::PsFailed(text));
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let mut lines = text.lines();
    let header = lines.next().unwrap_or_default();
    let column = header
        .split_whitespace()
        .position(|title| title == "PID")
        .ok_or_else(|| LifecycleError::PsFailed("couldn't find PID field in ps output".into()))?;
    let of_container = |line: &&str| {
        line.split_whitespace()
            .nth(column)
            .and_then(|pid| pid.parse().ok())
            .is_some_and(|pid: i32| pids.contains(&pid))
    };
    for line in std::iter::once(header).chain(lines.filter(of_container)) {
        writeln!(out, "{line}").map_err(LifecycleError::Output)?;
    }
    Ok(())
}

fn print_json(
    out: &mut impl Write,
    value: &impl Serialize,
    pretty: bool,
) -> Result<(), LifecycleError> {
    let text =
        if pretty { serde_json::to_string_pretty(value) } else { serde_json::to_string(value) }
            .map_err(|error| LifecycleError::Output(error.into()))?;
    writeln!(out, "{text}").map_err(LifecycleError::Output)
}

/// The folder of all containers: `--root`, or ours.
pub fn root(given: Option<PathBuf>) -> PathBuf {
    let root = given.unwrap_or_else(|| state_dir::DEFAULT_ROOT.into());
    std::path::absolute(&root).unwrap_or(root)
}
