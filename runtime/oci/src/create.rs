//! `create`: a container whose first process waits for `start`.
//!
//! The same function makes the container that a restore fills (`Init::Blank`).

use std::ffi::CString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use oci_spec::runtime::{LinuxNamespaceType, Process};
use samara_engine::phase::{self, Phase};
use samara_kernel::netdevice;
use samara_kernel::setns::{Namespace, inside};
use samara_store::{Kept, Location};

use crate::address::{self, Address, Node, RestorePolicy};
use crate::bundle::{self, Bundle, BundleError};
use crate::capture::{Held, save_at_intervals};
use crate::cause::Cause;
use crate::cgroup::{Cgroup, CgroupError, Elsewhere};
use crate::confine::{ConfineError, Confinement};
use crate::container_id::ContainerId;
use crate::device_filter::{self, DeviceFilterError};
use crate::ending;
use crate::hooks::{HookError, HookState, Relay};
use crate::init::{BlankInit, FirstProcess, ProgramInit};
use crate::monitor::{self, MonitorError};
use crate::mounts::Unfinished;
use crate::periodic::Schedule;
use crate::process::ProcessIdentity;
use crate::report::Log;
use crate::restore::{Incoming, RestoreError, Start};
use crate::state_dir::{FileIdentity, Record, StateDir, StateError, record_version};

impl CreateError {
    /// Whether a capsule is there that this container will not continue from.
    pub fn is_refused(&self) -> bool {
        matches!(self, CreateError::Restore(error) if error.is_refused())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Bundle(#[from] BundleError),
    #[error(transparent)]
    Confine(#[from] ConfineError),
    #[error(transparent)]
    Hook(#[from] HookError),
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error(transparent)]
    Monitor(#[from] MonitorError),
    #[error(transparent)]
    Devices(#[from] DeviceFilterError),
    #[error("cannot allocate tty if runc will detach without setting console socket")]
    ConsoleSocketMissing,
    #[error("cannot use console socket if runc will not detach or allocate tty")]
    ConsoleSocketUnused,
    /// The words come from where it happened; libcontainer's own error repeats them, wrapped in
    /// the way that they came, and so is no `source`.
    #[error("unable to start container process: {cause}")]
    Container { cause: String, error: Box<LibcontainerError> },
    #[error(transparent)]
    Restore(#[from] Box<RestoreError>),
    #[error("the container's init is in no cgroup of its own, so its devices cannot be restricted")]
    NoCgroup,
    #[error("the container's init is gone before it could be recorded")]
    InitGone,
    #[error("cannot {attempt}")]
    Io { attempt: &'static str, source: std::io::Error },
}

/// A clock's offset from the host's, as in `timens_offsets` (time_namespaces(7)).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockOffset {
    pub seconds: i64,
    pub nanoseconds: u32,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TimeOffsets {
    pub monotonic: ClockOffset,
    pub boottime: ClockOffset,
}

/// What the container's first process becomes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Init {
    /// The program of the specification.
    Program,
    /// A process of root, unconfined, in a time namespace with these offsets, that waits for ever:
    /// the engine makes it into the restored one and confines it.
    Blank { offsets: TimeOffsets },
}

/// Everything that `create` needs to know.
#[derive(Debug)]
pub struct CreateRequest<'a> {
    /// The folder of all containers.
    pub root: &'a Path,
    pub id: ContainerId,
    pub bundle: &'a Path,
    pub console_socket: Option<&'a Path>,
    pub pid_file: Option<&'a Path>,
    pub no_pivot: bool,
    pub no_new_keyring: bool,
    pub preserve_fds: u32,
    pub systemd_cgroup: bool,
    pub init: Init,
    /// Where to continue from; without it, the specification may name an address.
    pub capsule: Option<&'a Location>,
    /// Whether the calling process ends right after; it then need not go back to its own cgroups.
    pub detached: bool,
    pub log: &'a Log,
    pub debug: bool,
}

/// A container that was made.
#[derive(Debug)]
pub struct Created {
    pub dir: StateDir,
    pub record: Record,
    /// With `Init::Blank`: one byte arrives here when the init waits, after `start`.
    pub ready: Option<OwnedFd>,
    /// This process' own cgroups. Dropped, it goes back to them, which takes milliseconds; so a
    /// caller that stays drops it after `start`.
    pub elsewhere: Option<Elsewhere>,
    /// What was read of the capsule that it continues from.
    pub kept: Kept,
}

/// Makes a container.
///
/// On success its init waits for `start` in the namespaces, cgroups and root of the specification,
/// is a child of the calling process, and a monitor watches it. On failure nothing is left: no
/// process, no cgroup, no folder.
pub fn create(request: &CreateRequest<'_>) -> Result<Created, CreateError> {
    let bundle = Bundle::load(request.bundle)?;
    let process = bundle.process()?;
    check_console(request, process)?;
    let systemd = request.systemd_cgroup;
    if systemd && !crate::cgroup::is_unified() {
        return Err(CgroupError::SystemdOnV1.into());
    }
    let cgroup_path = bundle::cgroup_path(bundle.linux()?, &request.id, systemd)?;
    let confinement = Confinement::new(process, bundle.linux()?.seccomp().as_ref())?;
    let cause = Cause::new().map_err(|source| io("make a file in memory", source))?;
    cause
        .listen(request.log.clone(), request.debug)
        .map_err(|source| io("listen to libcontainer", source))?;

    let dir = StateDir::claim(request.root, &request.id)?;
    let mut undo = Undo::new(dir.clone(), cgroup_path.clone());
    // Before libcontainer forks: what reads a store has threads, and they have ended by then.
    let schedule = Schedule::of(&bundle.spec);
    let schedule = schedule.map_err(|error| Box::new(RestoreError::from(error)))?;
    let (held, incoming) = look_for_capsule(request, &bundle)?;
    let init = incoming
        .as_ref()
        .map_or(request.init, |incoming| Init::Blank { offsets: incoming.offsets });
    let monitor = monitor::spawn(&dir)?;
    std::fs::write(dir.config(), &bundle.config)
        .map_err(|source| io("keep the specification", source))?;
    let relay = Relay::keep(dir.hooks(), &bundle.path, bundle.spec.hooks().as_ref())?;
    write_inner_bundle(&dir, &bundle, &cgroup_path, &relay, &init)?;

    let (init_pid, ready, elsewhere) =
        build(request, &init, &dir, &bundle, confinement.clone(), &cgroup_path, &cause)?;
    undo.init = Some(init_pid);
    if makes_network(bundle.linux()?) {
        inside(init_pid, Namespace::Network, netdevice::bring_up_loopback)
            .map_err(|source| io("bring up the loopback", source))?;
    }
    let record = Record {
        version: record_version(),
        id: request.id.to_string(),
        bundle: bundle.path.clone(),
        rootfs: bundle.rootfs.clone(),
        created: chrono::Utc::now(),
        annotations: annotations(&bundle),
        init: ProcessIdentity::of(init_pid).ok_or(CreateError::InitGone)?,
        started: false,
        console: process.terminal().unwrap_or(false),
        stdio: [0, 1, 2].map(|fd| file_identity(init_pid, fd)),
        no_new_keyring: request.no_new_keyring,
        seccomp_filters: match &incoming {
            Some(incoming) => incoming.seccomp_filters,
            None if init == Init::Program => confinement.seccomp_filters(),
            None => 0,
        },
        config_digest: bundle.config_digest(),
        cgroup: Cgroup::of_process(init_pid, cgroup_path, systemd, request.id.as_str())?,
    };
    if let Some(resources) = bundle.linux()?.resources() {
        record.cgroup.apply_rest(resources)?;
    }
    restrict_devices(&record.cgroup, bundle.linux()?)?;
    dir.save(&record)?;
    match (&incoming, &held) {
        (Some(incoming), _) => {
            incoming.keep(&dir).map_err(Box::new)?;
            phase::reached(Phase::Created);
        }
        (None, Some(held)) => held.save(&dir).map_err(|source| io("keep the lease", source))?,
        (None, None) => {}
    }
    if let Some(held) = held.as_ref().filter(|held| held.carried) {
        save_at_intervals(&dir, held, &schedule)
            .map_err(|error| Box::new(RestoreError::from(Box::new(error))))?;
    }
    monitor.adopt(record.init)?;
    if let Some(pid_file) = request.pid_file {
        write_pid_file(pid_file, init_pid)?;
    }
    undo.keep();
    let kept = incoming.map(|incoming| incoming.kept()).unwrap_or_default();
    Ok(Created { dir, record, ready, elsewhere, kept })
}

/// The capsule that the container will continue from, if there is one; its root is made equal to the saved one.
fn look_for_capsule(
    request: &CreateRequest<'_>,
    bundle: &Bundle,
) -> Result<(Option<Held>, Option<Incoming>), CreateError> {
    let own = || address::of(&bundle.spec).map_err(|error| Box::new(RestoreError::from(error)));
    let start = match (request.init, request.capsule) {
        (Init::Blank { .. }, _) => return Ok((None, None)),
        (Init::Program, Some(location)) => Start {
            // An address that the container may not use is no reason to refuse what a command line asks for.
            by_hand: true,
            carried: own().is_ok_and(|own| own.is_some_and(|(own, _)| own.location == *location)),
            location: location.clone(),
            policy: RestorePolicy::Require,
            node: Node::load().map_err(|error| Box::new(RestoreError::from(error)))?,
        },
        (Init::Program, None) => match own()? {
            None => return Ok((None, None)),
            Some((Address { location, policy }, node)) => {
                Start { location, policy, node, carried: true, by_hand: false }
            }
        },
    };
    ending::tell_all(request.root, &start.location)
        .map_err(|error| Box::new(RestoreError::from(error)))?;
    let (held, incoming) = Incoming::open(&start, &request.id, bundle).map_err(Box::new)?;
    Ok((Some(held), incoming))
}

fn build(
    request: &CreateRequest<'_>,
    init: &Init,
    dir: &StateDir,
    bundle: &Bundle,
    confinement: Confinement,
    cgroup_path: &Path,
    cause: &Cause,
) -> Result<(i32, Option<OwnedFd>, Option<Elsewhere>), CreateError> {
    let builder = ContainerBuilder::new(request.id.to_string(), SyscallType::default());
    let console = request
        .console_socket
        .map(std::path::absolute)
        .transpose()
        .map_err(|source| io("find the console socket", source))?;
    let builder = builder
        .with_root_path(dir.path())
        .map_err(|error| failed(error, cause))?
        .with_console_socket(console)
        .with_preserved_fds(i32::try_from(request.preserve_fds).unwrap_or(i32::MAX));
    let (builder, ready) = match init {
        Init::Program => {
            (builder.with_executor(program(request, bundle, confinement, cause)?), None)
        }
        Init::Blank { .. } => {
            let (ours, theirs) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC)
                .map_err(|errno| io("make a pipe", errno.into()))?;
            let init = BlankInit::new(
                bundle.process()?.clone(),
                Unfinished::of(bundle),
                theirs,
                cause.clone(),
            );
            (builder.with_executor(init), Some(ours))
        }
    };
    crate::plain_dev::make_room(bundle)
        .map_err(|source| io("make room in the root's own /dev", source))?;
    let elsewhere = (!request.systemd_cgroup).then(|| Elsewhere::join(cgroup_path));
    let container = builder
        .as_init(dir.inner_bundle())
        .with_systemd(request.systemd_cgroup)
        .with_detach(true)
        .with_no_pivot(request.no_pivot)
        .build()
        .map_err(|error| failed(error, cause))?;
    let pid = container.pid().ok_or(CreateError::InitGone)?;
    let elsewhere = if request.detached {
        if let Some(elsewhere) = elsewhere {
            elsewhere.stay();
        }
        None
    } else {
        elsewhere
    };
    Ok((pid.as_raw(), ready, elsewhere))
}

fn program(
    request: &CreateRequest<'_>,
    bundle: &Bundle,
    confinement: Confinement,
    cause: &Cause,
) -> Result<ProgramInit, CreateError> {
    let start_hooks = bundle.spec.hooks().as_ref().map(|hooks| {
        let state = HookState {
            id: request.id.to_string(),
            // As the container numbers it.
            pid: Some(1),
            bundle: bundle.path.clone(),
            annotations: annotations(bundle),
        };
        (hooks.clone(), state)
    });
    let first = FirstProcess { mounts: Unfinished::of(bundle), start_hooks };
    let keyring = keyring_name(&request.id, request.no_new_keyring);
    let process = bundle.process()?.clone();
    Ok(ProgramInit::new(process, confinement, keyring, Some(first), None, cause.clone()))
}

/// runc's name for a container's session keyring.
pub(crate) fn keyring_name(id: &ContainerId, no_new_keyring: bool) -> Option<CString> {
    if no_new_keyring { None } else { CString::new(format!("_ses.{id}")).ok() }
}

fn annotations(bundle: &Bundle) -> std::collections::BTreeMap<String, String> {
    bundle.spec.annotations().clone().unwrap_or_default().into_iter().collect()
}

fn write_inner_bundle(
    dir: &StateDir,
    bundle: &Bundle,
    cgroup_path: &Path,
    relay: &Relay,
    init: &Init,
) -> Result<(), CreateError> {
    let spec = bundle.for_libcontainer(cgroup_path, relay, init)?;
    let folder = dir.inner_bundle();
    let text = serde_json::to_vec(&spec)
        .map_err(|e| io("write libcontainer's specification", e.into()))?;
    std::fs::create_dir(&folder)
        .and_then(|()| std::fs::write(folder.join("config.json"), text))
        .map_err(|source| io("write libcontainer's specification", source))
}

/// runc's two mistakes with terminals, found before anything is made.
fn check_console(request: &CreateRequest<'_>, process: &Process) -> Result<(), CreateError> {
    match (process.terminal().unwrap_or(false), request.console_socket) {
        (true, None) => Err(CreateError::ConsoleSocketMissing),
        (false, Some(_)) => Err(CreateError::ConsoleSocketUnused),
        (true, Some(_)) | (false, None) => Ok(()),
    }
}

/// What libcgroups leaves of `linux.resources.devices`: everything on v2, the host's console on v1.
fn restrict_devices(cgroup: &Cgroup, linux: &oci_spec::runtime::Linux) -> Result<(), CreateError> {
    let resources = linux.resources().as_ref();
    if !crate::cgroup::is_unified() {
        return Ok(cgroup.deny_host_console(resources)?);
    }
    let rules = resources.and_then(|resources| resources.devices().as_deref()).unwrap_or_default();
    let folder = cgroup.folder("devices").ok_or(CreateError::NoCgroup)?;
    Ok(device_filter::attach(folder, rules)?)
}

fn file_identity(pid: i32, fd: i32) -> Option<FileIdentity> {
    let stat = rustix::fs::stat(format!("/proc/{pid}/fd/{fd}")).ok()?;
    Some(FileIdentity { device: stat.st_dev, inode: stat.st_ino })
}

/// Written under another name first: who waits for the file must not read half a number.
pub(crate) fn write_pid_file(path: &Path, pid: i32) -> Result<(), CreateError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}"));
    std::fs::write(&temporary, pid.to_string())
        .and_then(|()| std::fs::rename(&temporary, path))
        .map_err(|source| {
            let _ = std::fs::remove_file(&temporary);
            io("write the pid file", source)
        })
}

/// What the host answered to libcontainer, which its own words may leave out: a full disk, for one.
fn host_failure(error: &LibcontainerError) -> Option<String> {
    let mut innermost: &dyn std::error::Error = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    let is_hosts = innermost.is::<std::io::Error>()
        || innermost.downcast_ref::<serde_json::Error>().is_some_and(serde_json::Error::is_io);
    is_hosts.then(|| innermost.to_string())
}

pub(crate) fn failed(error: LibcontainerError, cause: &Cause) -> CreateError {
    let cause = match cause.best() {
        None => crate::report::chain(&error),
        Some(words) => match host_failure(&error).filter(|failure| !words.contains(failure)) {
            None => words,
            Some(failure) => format!("{words}: {failure}"),
        },
    };
    CreateError::Container { cause, error: Box::new(error) }
}

fn io(attempt: &'static str, source: std::io::Error) -> CreateError {
    CreateError::Io { attempt, source }
}

/// Whether a namespace of this kind is shared with another container or the host.
pub(crate) fn shares_pid_namespace(linux: &oci_spec::runtime::Linux) -> bool {
    linux
        .namespaces()
        .iter()
        .flatten()
        .find(|namespace| namespace.typ() == LinuxNamespaceType::Pid)
        .is_none_or(|namespace| namespace.path().is_some())
}

/// Whether the container gets a network namespace that nobody else has prepared.
fn makes_network(linux: &oci_spec::runtime::Linux) -> bool {
    linux.namespaces().iter().flatten().any(|namespace| {
        namespace.typ() == LinuxNamespaceType::Network && namespace.path().is_none()
    })
}

/// Takes back what was made when `create` fails.
struct Undo {
    dir: StateDir,
    cgroup: PathBuf,
    init: Option<i32>,
    armed: bool,
}

impl Undo {
    fn new(dir: StateDir, cgroup: PathBuf) -> Self {
        Self { dir, cgroup, init: None, armed: true }
    }

    fn keep(mut self) {
        self.armed = false;
    }
}

impl Drop for Undo {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        ending::ask(&self.dir, "a create that failed");
        if let Some(pid) = self.init.and_then(rustix::process::Pid::from_raw) {
            // It is our child, so its pid is its own until we wait for it.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            let _ = rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty());
        }
        monitor::stop(&self.dir);
        // A detached caller's process is in the container's until it ends.
        crate::cgroup::leave_all();
        crate::cgroup::remove_by_path(&self.cgroup);
        // The first failure is the one to report.
        let _ = self.dir.remove();
    }
}
