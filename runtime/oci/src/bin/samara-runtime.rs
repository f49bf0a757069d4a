//! An OCI runtime with runc's command line.

use std::error::Error;
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use samara_oci::address::CONFIG_VARIABLE;
use samara_oci::command_line::{self, CommandLine, Global, RunArgs, Verb};
use samara_oci::create::{self, CreateRequest, Init};
use samara_oci::report::Log;
use samara_oci::run::Resume;
use samara_oci::state_dir::StateDir;
use samara_oci::{
    capture, ending, events, exec, fail_point, features, hooks, lifecycle, output, report, run,
    sealed, spec_template, update,
};
use samara_store::Kept;

fn main() -> ExitCode {
    let args: Result<Vec<String>, _> =
        std::env::args_os().skip(1).map(std::ffi::OsString::into_string).collect();
    let Ok(args) = args else {
        Log::new(&Global::default()).failure("an argument is not UTF-8");
        return ExitCode::FAILURE;
    };
    let line = match command_line::parse(&args) {
        Ok(line) => line,
        Err(error) => {
            Log::new(&Global::default()).failure(&report::chain(&error));
            return ExitCode::FAILURE;
        }
    };
    let log = Log::new(&line.global);
    if !matches!(line.verb, Verb::Checkpoint(_)) {
        fail_point::arm(fail_point::wanted());
    }
    match act(line, &log) {
        Ok(status) => ExitCode::from(status),
        Err(Failure { error, status }) => {
            log.failure(&report::chain(&*error));
            ExitCode::from(status)
        }
    }
}

/// Of a call that failed.
const FAILED_STATUS: u8 = 1;
/// Of a call that found a capsule which the container does not continue from: who tries again elsewhere, or not at all, goes by
/// it (docs/lifecycle.md).
const REFUSED_STATUS: u8 = 176;

struct Failure {
    error: Box<dyn Error>,
    status: u8,
}

impl Failure {
    fn new(error: impl Error + 'static, refused: bool) -> Failure {
        let status = if refused { REFUSED_STATUS } else { FAILED_STATUS };
        Failure { error: Box::new(error), status }
    }
}

impl<E: Error + 'static> From<E> for Failure {
    fn from(error: E) -> Failure {
        Failure::new(error, false)
    }
}

fn act(line: CommandLine, log: &Log) -> Result<u8, Failure> {
    let CommandLine { global, verb } = line;
    let root = lifecycle::root(global.root.clone());
    let dir = |id| StateDir::new(&root, id);
    match verb {
        Verb::Create(args) => {
            sealed::ensure()?;
            create::create(&CreateRequest {
                root: &root,
                id: args.id,
                bundle: &args.bundle,
                console_socket: args.console_socket.as_deref(),
                pid_file: args.pid_file.as_deref(),
                no_pivot: args.no_pivot,
                no_new_keyring: args.no_new_keyring,
                preserve_fds: args.preserve_fds,
                systemd_cgroup: global.systemd_cgroup,
                init: Init::Program,
                capsule: None,
                detached: true,
                log,
                debug: global.debug,
            })
            .map_err(|error| {
                let refused = error.is_refused();
                Failure::new(error, refused)
            })?;
        }
        Verb::Run(args) => {
            sealed::ensure()?;
            return run_container(&root, &args, &global, None, log);
        }
        Verb::Exec(args) => {
            sealed::ensure()?;
            return Ok(exec::exec(&dir(&args.id), &args, log, global.debug)?);
        }
        Verb::Checkpoint(args) => {
            let terminal = std::io::stderr().is_terminal();
            let config = std::env::var_os(CONFIG_VARIABLE).map(PathBuf::from);
            let summary = capture::checkpoint(&dir(&args.id), &args, config, |phase| {
                if terminal {
                    output::transient(phase);
                }
            });
            // Before a message of failure, too.
            if terminal {
                output::transient("");
            }
            let summary = summary?;
            if !summary.unprotected.is_empty() {
                // An engine keeps the log, and nobody reads its call's standard output.
                log.note(&summary.unprotected());
            }
            output::with_stdout(|out| writeln!(out, "{}", summary.line()))?;
        }
        Verb::Restore(args) => {
            sealed::ensure()?;
            let location = capture::target(&args.image)?;
            // Whoever calls with runc's flags, an engine, expects runc's silence.
            let said = args.image.capsule.is_some();
            let resume = Resume { location: &location, said };
            return run_container(&root, &args.as_run(), &global, Some(resume), log);
        }
        Verb::CaptureWorker => capture::worker()?,
        Verb::TellEnd { note } => ending::teller(&note)?,
        Verb::Start { id } => {
            lifecycle::start(&dir(&id), Kept::default()).map_err(|error| {
                let refused = error.is_refused();
                Failure::new(error, refused)
            })?;
        }
        Verb::State { id } => output::with_stdout(|out| lifecycle::state(&dir(&id), out))?,
        Verb::Kill { id, signal, all } => lifecycle::kill(&dir(&id), &signal, all)?,
        Verb::Delete { id, force } => lifecycle::delete(&dir(&id), force, log)?,
        Verb::Pause { id } => lifecycle::pause(&dir(&id))?,
        Verb::Resume { id } => lifecycle::resume(&dir(&id))?,
        Verb::Ps { id, json, ps_args } => {
            output::with_stdout(|out| lifecycle::ps(&dir(&id), json, &ps_args, out))?;
        }
        Verb::List { json, quiet } => {
            output::with_stdout(|out| lifecycle::list(&root, json, quiet, out))?;
        }
        Verb::HookRelay { relay, kind, index } => match hooks::relay(&relay, &kind, index)? {},
        Verb::Update(args) => update::update(&dir(&args.id), &args)?,
        Verb::Events { id, stats, interval_seconds } => {
            output::with_stdout(|out| events::events(&dir(&id), stats, interval_seconds, out))?;
        }
        Verb::Features => output::with_stdout(|out| writeln!(out, "{}", features::features()))?,
        Verb::Spec { bundle, rootless } => spec_template::write(&bundle, rootless)?,
        Verb::Help => output::with_stdout(|out| out.write_all(command_line::HELP.as_bytes()))?,
        Verb::Version => output::with_stdout(|out| {
            writeln!(
                out,
                "samara-runtime version {}\nspec: {}",
                env!("CARGO_PKG_VERSION"),
                lifecycle::OCI_VERSION
            )
        })?,
    }
    Ok(0)
}

fn run_container(
    root: &Path,
    args: &RunArgs,
    global: &Global,
    capsule: Option<Resume<'_>>,
    log: &Log,
) -> Result<u8, Failure> {
    run::run(root, args, global.systemd_cgroup, capsule, log, global.debug).map_err(|error| {
        let refused = error.is_refused();
        Failure::new(error, refused)
    })
}
