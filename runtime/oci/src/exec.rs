//! `exec`: another process in a container that runs.
//!
//! The process gets the container's namespaces and cgroups from libcontainer, and from our executor
//! what the container's own init has: its seccomp filter (libcontainer leaves it out), its user
//! namespace, its keyring, its limits as the process asks for them.

use std::io::{Read, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{Linux, LinuxNamespaceType, Process, Spec};

use crate::bundle::{self, Bundle, BundleError};
use crate::cause::Cause;
use crate::cgroup::Elsewhere;
use crate::command_line::{ExecArgs, ExecFlags, ExecProcess};
use crate::confine::{ConfineError, Confinement};
use crate::create::{CreateError, keyring_name, write_pid_file};
use crate::foreground::{self, Console, ForegroundError};
use crate::init::ProgramInit;
use crate::report::Log;
use crate::state_dir::{Record, StateDir, StateError, Status};

/// A process file is a part of a specification; the same bound.
const PROCESS_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Confine(#[from] ConfineError),
    #[error(transparent)]
    Foreground(#[from] ForegroundError),
    #[error("cannot exec in a stopped container")]
    Stopped,
    #[error("cannot exec in a container that has not been started")]
    NotStarted,
    #[error("cannot exec in a paused container (use --ignore-paused to override)")]
    Paused,
    #[error("cannot read the process file {path}")]
    ReadProcess { path: PathBuf, source: std::io::Error },
    #[error("{path} does not describe a process")]
    ParseProcess { path: PathBuf, source: serde_json::Error },
    #[error("the flags do not describe a process")]
    Flags(#[source] serde_json::Error),
    #[error("cannot allocate tty if runc will detach without setting console socket")]
    ConsoleSocketMissing,
    #[error("cannot use console socket if runc will not detach or allocate tty")]
    ConsoleSocketUnused,
    #[error("exec --cgroup is not supported on cgroup v1 with controller lists: {0}")]
    Cgroup(String),
    /// As for `create`, libcontainer's error repeats the words.
    #[error("exec failed: unable to start container process: {cause}")]
    Failed { cause: String, error: Box<LibcontainerError> },
    #[error("cannot write the pid file")]
    PidFile(#[source] Box<CreateError>),
    #[error("cannot {attempt}")]
    Io { attempt: &'static str, source: std::io::Error },
}

/// Runs a process in the container. Returns its exit status, or 0 at once with `detach`.
pub fn exec(dir: &StateDir, args: &ExecArgs, log: &Log, debug: bool) -> Result<u8, ExecError> {
    let record = dir.load()?;
    match record.status() {
        Status::Running => {}
        Status::Paused if args.ignore_paused => {}
        Status::Paused => return Err(ExecError::Paused),
        Status::Created => return Err(ExecError::NotStarted),
        Status::Stopped => return Err(ExecError::Stopped),
    }
    if args.cgroup.as_deref().is_some_and(|cgroup| cgroup.contains(':')) {
        return Err(ExecError::Cgroup(args.cgroup.clone().unwrap_or_default()));
    }
    let spec = Bundle::reload(&dir.config())?;
    let process = process_of(&args.process, &spec)?;
    bundle::refuse_unsupported_process(&process)?;
    let terminal = process.terminal().unwrap_or(false);
    match (terminal, &args.console_socket) {
        (true, None) if args.detach => return Err(ExecError::ConsoleSocketMissing),
        (false, Some(_)) => return Err(ExecError::ConsoleSocketUnused),
        _ => {}
    }
    let console = match (&args.console_socket, terminal) {
        (None, true) => Some(Console::listen()?),
        _ => None,
    };
    let cause = Cause::new().map_err(|source| io("make a file in memory", source))?;
    cause.listen(log.clone(), debug).map_err(|source| io("listen to libcontainer", source))?;
    // Before anything can end or be signalled, so that nothing is missed.
    let signals = if args.detach { None } else { Some(foreground::Signals::block()?) };
    let socket = console.as_ref().map(Console::path).or(args.console_socket.as_deref());
    let pid = build(dir, &record, args, &spec, &process, socket, &cause)?;
    if let Some(pid_file) = &args.pid_file {
        write_pid_file(pid_file, pid).map_err(|e| ExecError::PidFile(Box::new(e)))?;
    }
    match signals {
        None => Ok(0),
        Some(signals) => Ok(foreground::attend(pid, signals, console, &|_| {})?),
    }
}

fn build(
    dir: &StateDir,
    record: &Record,
    args: &ExecArgs,
    spec: &Spec,
    process: &Process,
    console_socket: Option<&Path>,
    cause: &Cause,
) -> Result<i32, ExecError> {
    let linux = spec.linux().as_ref().ok_or(BundleError::Missing { field: "linux" })?;
    let confinement = Confinement::new(process, linux.seccomp().as_ref())?;
    let keyring = keyring_name(dir.id(), record.no_new_keyring);
    let namespace = user_namespace(linux, record.init.pid)?;
    let init =
        ProgramInit::new(process.clone(), confinement, keyring, None, namespace, cause.clone());
    let file = process_file(&bundle::unconfined(process))?;
    let console = console_socket
        .map(std::path::absolute)
        .transpose()
        .map_err(|source| io("find the console socket", source))?;
    let elsewhere = (!record.cgroup.systemd).then(|| Elsewhere::join(&record.cgroup.path));
    let pid = ContainerBuilder::new(record.id.clone(), SyscallType::default())
        .with_root_path(dir.path())
        .map_err(|error| failed(error, cause))?
        .with_console_socket(console)
        .with_preserved_fds(i32::try_from(args.preserve_fds).unwrap_or(i32::MAX))
        .with_executor(init)
        .as_tenant()
        .with_process(Some(format!("/proc/self/fd/{}", file.as_raw_fd())))
        .with_detach(true)
        .with_ignore_paused(args.ignore_paused)
        .with_sub_cgroup(args.cgroup.clone())
        .build()
        .map(|pid| pid.as_raw())
        .map_err(|error| failed(error, cause))?;
    if let Some(elsewhere) = elsewhere.filter(|_| args.detach) {
        elsewhere.stay();
    }
    Ok(pid)
}

fn failed(error: LibcontainerError, cause: &Cause) -> ExecError {
    let cause = cause
        .best()
        .unwrap_or_else(|| crate::report::chain(&error).trim_end_matches('\0').to_owned());
    ExecError::Failed { cause, error: Box::new(error) }
}

/// libcontainer joins every namespace of the container but this one; the executor does.
fn user_namespace(linux: &Linux, init: i32) -> Result<Option<OwnedFd>, ExecError> {
    let has = linux
        .namespaces()
        .iter()
        .flatten()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::User);
    if !has {
        return Ok(None);
    }
    std::fs::File::open(format!("/proc/{init}/ns/user"))
        .map(|file| Some(file.into()))
        .map_err(|source| io("open the container's user namespace", source))
}

/// libcontainer reads the process from a file.
fn process_file(process: &Process) -> Result<std::fs::File, ExecError> {
    let io = |source: std::io::Error| io("hand the process to libcontainer", source);
    let fd = rustix::fs::memfd_create("process", rustix::fs::MemfdFlags::CLOEXEC)
        .map_err(|errno| io(errno.into()))?;
    let mut file = std::fs::File::from(fd);
    let text = serde_json::to_vec(process).map_err(|e| io(e.into()))?;
    file.write_all(&text).and_then(|()| file.rewind()).map_err(io)?;
    Ok(file)
}

fn process_of(source: &ExecProcess, spec: &Spec) -> Result<Process, ExecError> {
    let mut process = match source {
        ExecProcess::File(path) => read_process(path)?,
        ExecProcess::Flags(flags) => from_flags(flags, spec)?,
    };
    bundle::drop_empty_process_values(&mut process);
    Ok(process)
}

fn read_process(path: &Path) -> Result<Process, ExecError> {
    let read = |source| ExecError::ReadProcess { path: path.to_owned(), source };
    let mut text = Vec::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(PROCESS_BYTES_MAX).read_to_end(&mut text))
        .map_err(read)?;
    serde_json::from_slice(&text)
        .map_err(|source| ExecError::ParseProcess { path: path.to_owned(), source })
}

/// The container's own process, changed by `flags`, as runc does it.
fn from_flags(flags: &ExecFlags, spec: &Spec) -> Result<Process, ExecError> {
    let mut process = spec.process().clone().ok_or(BundleError::Missing { field: "process" })?;
    process.set_args(Some(flags.args.clone()));
    process.set_terminal(Some(flags.tty));
    process.set_console_size(None);
    if let Some(cwd) = &flags.cwd {
        process.set_cwd(cwd.clone());
    }
    if let Some(label) = &flags.process_label {
        process.set_selinux_label(Some(label.clone()));
    }
    if let Some(profile) = &flags.apparmor {
        process.set_apparmor_profile(Some(profile.clone()));
    }
    if flags.no_new_privs {
        process.set_no_new_privileges(Some(true));
    }
    let mut env = process.env().clone().unwrap_or_default();
    env.extend(flags.env.iter().cloned());
    process.set_env(Some(env));
    if let Some((uid, gid)) = flags.user {
        let user = process.user_mut();
        user.set_uid(uid);
        if let Some(gid) = gid {
            user.set_gid(gid);
        }
    }
    if !flags.additional_gids.is_empty() {
        let user = process.user_mut();
        let mut gids = user.additional_gids().clone().unwrap_or_default();
        gids.extend(&flags.additional_gids);
        user.set_additional_gids(Some(gids));
    }
    if !flags.caps.is_empty() {
        let mut caps = process.capabilities().clone().unwrap_or_default();
        let added: oci_spec::runtime::Capabilities =
            serde_json::from_value(serde_json::json!(flags.caps)).map_err(ExecError::Flags)?;
        let with = |set: &Option<oci_spec::runtime::Capabilities>| {
            Some(set.iter().flatten().chain(&added).copied().collect())
        };
        let (bounding, effective) = (with(caps.bounding()), with(caps.effective()));
        let permitted = with(caps.permitted());
        caps.set_bounding(bounding);
        caps.set_effective(effective);
        caps.set_permitted(permitted);
        process.set_capabilities(Some(caps));
    }
    Ok(process)
}

fn io(attempt: &'static str, source: std::io::Error) -> ExecError {
    ExecError::Io { attempt, source }
}
