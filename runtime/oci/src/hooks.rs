//! OCI hooks.
//!
//! libcontainer runs `prestart`, `createRuntime` and `createContainer`, since they belong between
//! its own steps, but the state that it gives them names the folder of the specification that we
//! made for it, not the engine's bundle. So it runs this program instead (`Relay`), which corrects
//! the state and becomes the hook. The other three kinds are run by us, with the engine's bundle.

use std::io::{Read, Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use libcontainer::container::{ContainerStatus, State};
use oci_spec::runtime::{Hook, Hooks};
use serde::{Deserialize, Serialize};

use crate::state_dir::Record;

/// The hidden verb by which libcontainer starts us as a hook.
pub(crate) const RELAY_VERB: &str = "hook-relay";

/// A container's state is a few hundred bytes; annotations make it longer, never this long.
const STATE_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum HookError {
    #[error("cannot keep the hooks in {path}")]
    Keep { path: PathBuf, source: std::io::Error },
    #[error("cannot read the hooks in {path}")]
    Reread { path: PathBuf, source: std::io::Error },
    #[error("the container's state for the hook is unusable")]
    State(#[source] std::io::Error),
    #[error("there is no {kind} hook #{index}")]
    NoSuchHook { kind: String, index: usize },
    #[error("cannot run the hook {path}")]
    Run { path: PathBuf, source: std::io::Error },
    #[error("error running {kind} hooks")]
    Failed { kind: &'static str, source: libcontainer::hooks::HookError },
}

/// What the relay finds on disk.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    bundle: PathBuf,
    hooks: Hooks,
}

/// Where `create` keeps what the relay needs.
#[derive(Debug)]
pub struct Relay {
    file: PathBuf,
}

impl Relay {
    /// Keeps the hooks of `bundle` in `file`, if it has any.
    pub fn keep(file: PathBuf, bundle: &Path, hooks: Option<&Hooks>) -> Result<Self, HookError> {
        if let Some(hooks) = hooks {
            let kept = Kept { bundle: bundle.to_owned(), hooks: hooks.clone() };
            let text = serde_json::to_vec(&kept)
                .map_err(|e| HookError::Keep { path: file.clone(), source: e.into() })?;
            std::fs::write(&file, text)
                .map_err(|source| HookError::Keep { path: file.clone(), source })?;
        }
        Ok(Self { file })
    }

    /// The hooks that libcontainer shall run, each replaced by a call of this program.
    pub(crate) fn wrap(&self, hooks: Option<&Hooks>) -> Option<Hooks> {
        let hooks = hooks?;
        let mut wrapped = Hooks::default();
        wrapped.set_prestart(self.wrap_kind("prestart", hooks.prestart().as_deref()));
        wrapped
            .set_create_runtime(self.wrap_kind("createRuntime", hooks.create_runtime().as_deref()));
        wrapped.set_create_container(
            self.wrap_kind("createContainer", hooks.create_container().as_deref()),
        );
        // Without one of these libcontainer need not synchronise with the container's init.
        (wrapped != Hooks::default()).then_some(wrapped)
    }

    fn wrap_kind(&self, kind: &str, hooks: Option<&[Hook]>) -> Option<Vec<Hook>> {
        let hooks = hooks.filter(|hooks| !hooks.is_empty())?;
        let wrap = |(index, hook): (usize, &Hook)| {
            let mut relay = Hook::default();
            relay.set_path("/proc/self/exe".into());
            relay.set_args(Some(vec![
                "samara-runtime".to_owned(),
                RELAY_VERB.to_owned(),
                self.file.to_string_lossy().into_owned(),
                kind.to_owned(),
                index.to_string(),
            ]));
            relay.set_timeout(hook.timeout());
            relay
        };
        Some(hooks.iter().enumerate().map(wrap).collect())
    }
}

/// Becomes hook `index` of `kind`: corrects the state on standard input and executes the hook.
/// Returns only on failure.
pub fn relay(file: &Path, kind: &str, index: usize) -> Result<std::convert::Infallible, HookError> {
    let reread = |source| HookError::Reread { path: file.to_owned(), source };
    let text = std::fs::read(file).map_err(reread)?;
    let kept: Kept = serde_json::from_slice(&text).map_err(|e| reread(e.into()))?;
    let hooks = match kind {
        "prestart" => kept.hooks.prestart(),
        "createRuntime" => kept.hooks.create_runtime(),
        _ => kept.hooks.create_container(),
    };
    let hook = hooks
        .as_ref()
        .and_then(|hooks| hooks.get(index))
        .ok_or(HookError::NoSuchHook { kind: kind.to_owned(), index })?;
    let state = corrected_state(&kept.bundle).map_err(HookError::State)?;
    let args = hook.args().clone().unwrap_or_default();
    let mut command = Command::new(hook.path());
    if let Some((name, rest)) = args.split_first() {
        command.arg0(name).args(rest);
    }
    command.env_clear();
    for variable in hook.env().iter().flatten() {
        let (name, value) = variable.split_once('=').unwrap_or((variable, ""));
        command.env(name, value);
    }
    // runc's working directory is the bundle, and hooks rely on it.
    if kept.bundle.is_dir() {
        command.current_dir(&kept.bundle);
    }
    let source = command.stdin(state).exec();
    Err(HookError::Run { path: hook.path().clone(), source })
}

fn corrected_state(bundle: &Path) -> std::io::Result<std::fs::File> {
    let mut text = Vec::new();
    std::io::stdin().take(STATE_BYTES_MAX).read_to_end(&mut text)?;
    let mut state: serde_json::Value = serde_json::from_slice(&text)?;
    if let Some(fields) = state.as_object_mut() {
        fields.insert("bundle".to_owned(), bundle.to_string_lossy().into());
    }
    let fd = rustix::fs::memfd_create("state", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(&serde_json::to_vec(&state)?)?;
    file.rewind()?;
    Ok(file)
}

/// Kinds that we run ourselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    StartContainer,
    Poststart,
    Poststop,
}

/// Runs the hooks of `kind`, in order, until one fails.
pub fn run(
    kind: Kind,
    hooks: Option<&Hooks>,
    record: &HookState,
    default_env: Option<&std::collections::HashMap<String, String>>,
) -> Result<(), HookError> {
    let Some(hooks) = hooks else { return Ok(()) };
    let (name, list, status) = match kind {
        Kind::StartContainer => {
            ("startContainer", hooks.start_container(), ContainerStatus::Created)
        }
        Kind::Poststart => ("poststart", hooks.poststart(), ContainerStatus::Running),
        Kind::Poststop => ("poststop", hooks.poststop(), ContainerStatus::Stopped),
    };
    if list.as_ref().is_none_or(Vec::is_empty) {
        return Ok(());
    }
    let mut state = State::new(&record.id, status, record.pid, record.bundle.clone());
    state.annotations = Some(record.annotations.clone().into_iter().collect());
    libcontainer::hooks::run_hooks(list.as_ref(), Some(&state), None, None, default_env)
        .map_err(|source| HookError::Failed { kind: name, source })
}

/// What a hook is told of its container.
#[derive(Clone, Debug)]
pub struct HookState {
    pub id: String,
    pub pid: Option<i32>,
    pub bundle: PathBuf,
    pub annotations: std::collections::BTreeMap<String, String>,
}

impl HookState {
    pub fn of(record: &Record, alive: bool) -> Self {
        Self {
            id: record.id.clone(),
            pid: alive.then_some(record.init.pid),
            bundle: record.bundle.clone(),
            annotations: record.annotations.clone(),
        }
    }
}
