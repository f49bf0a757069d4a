//! `run`: create, start, and, unless detached, wait and delete.

use crate::command_line::RunArgs;
use crate::create::{self, CreateError, CreateRequest, Init};
use crate::ending;
use crate::foreground::{self, Console, ForegroundError};
use crate::lifecycle::{self, LifecycleError};
use crate::output;
use crate::report::Log;
use crate::signal_name::SignalNumber;
use std::io::{self, IsTerminal as _, Write as _};
use std::path::Path;
use std::time::Instant;

use samara_store::Location;

impl RunError {
    /// Whether a capsule is there that the container does not continue from.
    pub fn is_refused(&self) -> bool {
        match self {
            RunError::Create(error) => error.is_refused(),
            RunError::Lifecycle(error) => error.is_refused(),
            RunError::Foreground(_) | RunError::Bundle(_) => false,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum RunError {
    #[error(transparent)]
    Create(#[from] CreateError),
    #[error(transparent)]
    Foreground(#[from] ForegroundError),
    #[error(transparent)]
    Lifecycle(#[from] LifecycleError),
    #[error(transparent)]
    Bundle(#[from] crate::bundle::BundleError),
}

/// Where a container continues from.
#[derive(Clone, Copy, Debug)]
pub struct Resume<'a> {
    pub location: &'a Location,
    /// Whether standard error is told of it: on a terminal what is being done, and how it went.
    pub said: bool,
}

/// Runs a container, or with `capsule` one that continues from there. Returns its program's status, or 0 at once with `detach`.
///
/// A container whose `start` fails is deleted.
pub fn run(
    root: &Path,
    args: &RunArgs,
    systemd_cgroup: bool,
    capsule: Option<Resume<'_>>,
    log: &Log,
    debug: bool,
) -> Result<u8, RunError> {
    let begun = Instant::now();
    let shown = capsule.is_some_and(|capsule| capsule.said) && io::stderr().is_terminal();
    let show = |text: &str| {
        if shown {
            output::transient(text);
        }
    };
    let create = &args.create;
    let terminal = crate::bundle::Bundle::load(&create.bundle)?.process()?.terminal() == Some(true);
    let console = match (&create.console_socket, terminal, args.detach) {
        (None, true, false) => Some(Console::listen()?),
        _ => None,
    };
    let signals = if args.detach { None } else { Some(foreground::Signals::block()?) };
    if !args.detach && !args.no_subreaper {
        // Orphans of the container's init then end here instead of with a stranger; without the
        // setting they only end elsewhere.
        let _ = rustix::process::set_child_subreaper(Some(rustix::process::getpid()));
    }
    show("looking at the capsule, and bringing back files");
    let created = create::create(&CreateRequest {
        root,
        id: create.id.clone(),
        bundle: &create.bundle,
        console_socket: console.as_ref().map(Console::path).or(create.console_socket.as_deref()),
        pid_file: create.pid_file.as_deref(),
        no_pivot: create.no_pivot,
        no_new_keyring: create.no_new_keyring,
        preserve_fds: create.preserve_fds,
        systemd_cgroup,
        init: Init::Program,
        capsule: capsule.map(|capsule| capsule.location),
        detached: args.detach,
        log,
        debug,
    });
    if created.is_err() {
        // The message comes on an empty line.
        show("");
    }
    let mut created = created?;
    show("bringing back processes and memory");
    let started = lifecycle::start(&created.dir, std::mem::take(&mut created.kept));
    show("");
    created.elsewhere = None;
    if let (Some(capsule), Ok(Some(restored))) = (capsule.filter(|c| c.said), &started) {
        let line = restored.line(&capsule.location.to_string(), begun.elapsed());
        // Who does not listen has not asked.
        let _ = writeln!(io::stderr(), "{line}");
    }
    if let Err(error) = started {
        ending::ask(&created.dir, "a start that failed");
        let _ = created.record.init.signal(SignalNumber::KILL);
        foreground::reap_killed(created.record.init.pid);
        // This process may still be in the container's.
        crate::cgroup::leave_all();
        // The first failure is the one to report.
        let _ = lifecycle::delete(&created.dir, true, log);
        return Err(error.into());
    }
    let Some(signals) = signals else { return Ok(0) };
    let told = |signal| ending::ask_by_signal(&created.dir, signal);
    let status = foreground::attend(created.record.init.pid, signals, console, &told)?;
    if !args.keep {
        lifecycle::delete(&created.dir, true, log)?;
    }
    Ok(status)
}
