//! The command line of `samara-runtime`, which is runc's: parsed once, here, into what each verb
//! needs.
//!
//! Every flag of runc 1.1 to 1.3 is accepted. A flag whose demand we do not carry out is refused
//! by the verb, not here; a flag that is meaningless for us (`--criu`) is taken and dropped.

use std::path::PathBuf;

use crate::capsule_verbs::{self, CheckpointArgs, RestoreArgs};
use crate::container_id::{ContainerId, IdError};
use crate::flags::{self, Flag, FlagError, Order, Parsed, switch, value};

#[derive(Debug, thiserror::Error)]
pub enum UsageError {
    #[error(transparent)]
    Flag(#[from] FlagError),
    #[error("no command given; see samara-runtime --help")]
    NoVerb,
    #[error("no such command: {0:?}; see samara-runtime --help")]
    UnknownVerb(String),
    #[error("samara-runtime {verb}: the container's id is missing")]
    NoId { verb: &'static str },
    #[error("samara-runtime {verb}: unexpected argument {argument:?}")]
    TooMany { verb: &'static str, argument: String },
    #[error("samara-runtime {verb}: {message}")]
    Invalid { verb: &'static str, message: String },
    #[error(transparent)]
    Id(#[from] IdError),
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Flags before the verb.
#[derive(Debug, Default)]
pub struct Global {
    pub root: Option<PathBuf>,
    pub log: Option<PathBuf>,
    pub log_format: LogFormat,
    pub debug: bool,
    pub systemd_cgroup: bool,
    pub rootless: Option<bool>,
}

#[derive(Debug)]
pub struct CommandLine {
    pub global: Global,
    pub verb: Verb,
}

#[derive(Debug)]
pub enum Verb {
    Create(CreateArgs),
    Run(RunArgs),
    Start {
        id: ContainerId,
    },
    State {
        id: ContainerId,
    },
    Kill {
        id: ContainerId,
        signal: String,
        all: bool,
    },
    Delete {
        id: ContainerId,
        force: bool,
    },
    Exec(Box<ExecArgs>),
    Ps {
        id: ContainerId,
        json: bool,
        ps_args: Vec<String>,
    },
    Pause {
        id: ContainerId,
    },
    Resume {
        id: ContainerId,
    },
    Update(Box<UpdateArgs>),
    Checkpoint(Box<CheckpointArgs>),
    Restore(Box<RestoreArgs>),
    /// Carries one capture out; how the monitor calls this program.
    CaptureWorker,
    /// Tells a store how a container ended; how the monitor calls this program.
    TellEnd {
        note: PathBuf,
    },
    Events {
        id: ContainerId,
        stats: bool,
        interval_seconds: u64,
    },
    List {
        json: bool,
        quiet: bool,
    },
    Features,
    Spec {
        bundle: PathBuf,
        rootless: bool,
    },
    /// Runs an OCI hook with the state that its author expects; how `create` calls itself.
    HookRelay {
        relay: PathBuf,
        kind: String,
        index: usize,
    },
    Help,
    Version,
}

#[derive(Debug)]
pub struct CreateArgs {
    pub id: ContainerId,
    pub bundle: PathBuf,
    pub console_socket: Option<PathBuf>,
    pub pid_file: Option<PathBuf>,
    pub no_pivot: bool,
    pub no_new_keyring: bool,
    pub preserve_fds: u32,
}

#[derive(Debug)]
pub struct RunArgs {
    pub create: CreateArgs,
    pub detach: bool,
    pub keep: bool,
    pub no_subreaper: bool,
}

#[derive(Debug)]
pub struct ExecArgs {
    pub id: ContainerId,
    pub console_socket: Option<PathBuf>,
    pub pid_file: Option<PathBuf>,
    pub detach: bool,
    pub ignore_paused: bool,
    pub preserve_fds: u32,
    pub cgroup: Option<String>,
    pub process: ExecProcess,
}

/// Where the process of an `exec` is described.
#[derive(Debug)]
pub enum ExecProcess {
    File(PathBuf),
    Flags(ExecFlags),
}

/// A process described by flags; what they leave open is as in the container's own process.
#[derive(Debug, Default)]
pub struct ExecFlags {
    pub args: Vec<String>,
    pub cwd: Option<PathBuf>,
    pub env: Vec<String>,
    pub tty: bool,
    /// Numbers: runc resolves no names either.
    pub user: Option<(u32, Option<u32>)>,
    pub additional_gids: Vec<u32>,
    pub process_label: Option<String>,
    pub apparmor: Option<String>,
    pub no_new_privs: bool,
    pub caps: Vec<String>,
}

#[derive(Debug)]
pub struct UpdateArgs {
    pub id: ContainerId,
    /// `-` is standard input. With a file the other flags do not count, as in runc.
    pub resources: Option<PathBuf>,
    pub flags: UpdateFlags,
}

#[derive(Debug, Default, PartialEq, Eq)]
pub struct UpdateFlags {
    pub blkio_weight: Option<u16>,
    pub cpu_period: Option<u64>,
    pub cpu_quota: Option<i64>,
    pub cpu_burst: Option<u64>,
    pub cpu_share: Option<u64>,
    pub cpu_rt_period: Option<u64>,
    pub cpu_rt_runtime: Option<i64>,
    pub cpu_idle: Option<i64>,
    pub cpuset_cpus: Option<String>,
    pub cpuset_mems: Option<String>,
    pub memory_bytes: Option<i64>,
    pub memory_reservation_bytes: Option<i64>,
    pub memory_swap_bytes: Option<i64>,
    pub pids_limit: Option<i64>,
    pub l3_cache_schema: Option<String>,
    pub mem_bw_schema: Option<String>,
}

/// What `--help` prints.
pub const HELP: &str = "\
samara-runtime: an OCI runtime whose containers can be saved and brought back

usage: samara-runtime [--root DIR] [--log FILE] [--log-format text|json] [--debug]
                      [--systemd-cgroup] COMMAND [FLAG...] [ARGUMENT...]

  create -b BUNDLE ID         make a container; its program waits for start
  start ID                    let the program run
  run [-d] -b BUNDLE ID       create, start, wait, delete
  exec [-t] [-d] ID COMMAND   run another process in a container
  state ID                    the container as JSON
  list [-q] [-f json]         all containers
  ps [-f json] ID             the processes of a container
  events [--stats] ID         what a container uses
  kill [--all] ID [SIGNAL]    signal the container's first process, or all
  pause ID, resume ID         stop and go on
  update [-r FILE|-] ID       change limits
  checkpoint --capsule URL [--leave-running] ID
                              save a container; with --image-path DIR to a folder
  restore --capsule URL -b BUNDLE [-d] ID
                              bring a container back
  delete [--force] ID         remove a container
  spec [-b DIR]               write a config.json to begin with
  features                    what this runtime can do, as JSON

Flags are those of runc, with one dash or two.
";

const GLOBAL: &[Flag] = &[
    switch(&["debug"]),
    value(&["log"]),
    value(&["log-format"]),
    value(&["root"]),
    value(&["criu"]),
    switch(&["systemd-cgroup"]),
    value(&["rootless"]),
    switch(&["help", "h"]),
    switch(&["version", "v"]),
];

const CREATE: &[Flag] = &[
    value(&["bundle", "b"]),
    value(&["console-socket"]),
    value(&["pid-file"]),
    switch(&["no-pivot"]),
    switch(&["no-new-keyring"]),
    value(&["preserve-fds"]),
    value(&["pidfd-socket"]),
];

const RUN: &[Flag] = &[
    value(&["bundle", "b"]),
    value(&["console-socket"]),
    value(&["pid-file"]),
    switch(&["no-pivot"]),
    switch(&["no-new-keyring"]),
    value(&["preserve-fds"]),
    value(&["pidfd-socket"]),
    switch(&["detach", "d"]),
    switch(&["keep"]),
    switch(&["no-subreaper"]),
];

const EXEC: &[Flag] = &[
    value(&["console-socket"]),
    value(&["pidfd-socket"]),
    value(&["cwd"]),
    value(&["env", "e"]),
    switch(&["tty", "t"]),
    value(&["user", "u"]),
    value(&["additional-gids", "g"]),
    value(&["process", "p"]),
    switch(&["detach", "d"]),
    value(&["pid-file"]),
    value(&["process-label"]),
    value(&["apparmor"]),
    switch(&["no-new-privs"]),
    value(&["cap", "c"]),
    value(&["preserve-fds"]),
    value(&["cgroup"]),
    switch(&["ignore-paused"]),
    // Hidden in runc, passed by old engines, without effect.
    switch(&["no-subreaper"]),
];

const UPDATE: &[Flag] = &[
    value(&["resources", "r"]),
    value(&["blkio-weight"]),
    value(&["cpu-period"]),
    value(&["cpu-quota"]),
    value(&["cpu-burst"]),
    value(&["cpu-share"]),
    value(&["cpu-rt-period"]),
    value(&["cpu-rt-runtime"]),
    value(&["cpu-idle"]),
    value(&["cpuset-cpus"]),
    value(&["cpuset-mems"]),
    value(&["kernel-memory"]),
    value(&["kernel-memory-tcp"]),
    value(&["memory"]),
    value(&["memory-reservation"]),
    value(&["memory-swap"]),
    value(&["pids-limit"]),
    value(&["l3-cache-schema"]),
    value(&["mem-bw-schema"]),
];

/// Parses what stands behind the program's name.
pub fn parse(args: &[String]) -> Result<CommandLine, UsageError> {
    let parsed = flags::parse(GLOBAL, Order::FlagsFirst, args)?;
    let global = Global {
        root: parsed.last("root").map(PathBuf::from),
        log: parsed.last("log").filter(|path| !path.is_empty()).map(PathBuf::from),
        log_format: match parsed.last("log-format") {
            None | Some("text") => LogFormat::Text,
            Some("json") => LogFormat::Json,
            Some(other) => {
                return Err(UsageError::Invalid {
                    verb: "--log-format",
                    message: format!("unknown format {other:?}: text and json exist"),
                });
            }
        },
        debug: parsed.on("debug"),
        systemd_cgroup: parsed.on("systemd-cgroup"),
        rootless: match parsed.last("rootless") {
            None | Some("auto") => None,
            Some("true") => Some(true),
            Some("false") => Some(false),
            Some(other) => {
                return Err(UsageError::Invalid {
                    verb: "--rootless",
                    message: format!("{other:?} is none of auto, true, false"),
                });
            }
        },
    };
    let verb = if parsed.on("help") {
        Verb::Help
    } else if parsed.on("version") {
        Verb::Version
    } else {
        let (verb, rest) = parsed.positional.split_first().ok_or(UsageError::NoVerb)?;
        parse_verb(verb, rest)?
    };
    Ok(CommandLine { global, verb })
}

fn parse_verb(verb: &str, args: &[String]) -> Result<Verb, UsageError> {
    // runc has `help` and `--help` after every verb.
    if matches!(verb, "help" | "h") || (verb != "exec" && args.iter().any(|a| a == "--help")) {
        return Ok(Verb::Help);
    }
    match verb {
        "checkpoint" => Ok(Verb::Checkpoint(Box::new(capsule_verbs::parse_checkpoint(args)?))),
        "restore" => Ok(Verb::Restore(Box::new(capsule_verbs::parse_restore(args)?))),
        crate::protocol::WORKER_VERB => Ok(Verb::CaptureWorker),
        crate::ending::TELL_VERB => match args {
            [note] => Ok(Verb::TellEnd { note: note.into() }),
            _ => Err(UsageError::UnknownVerb(verb.to_owned())),
        },
        "create" => {
            let parsed = flags::parse(CREATE, Order::Mixed, args)?;
            Ok(Verb::Create(create_args("create", &parsed)?))
        }
        "run" => {
            let parsed = flags::parse(RUN, Order::Mixed, args)?;
            Ok(Verb::Run(RunArgs {
                create: create_args("run", &parsed)?,
                detach: parsed.on("detach"),
                keep: parsed.on("keep"),
                no_subreaper: parsed.on("no-subreaper"),
            }))
        }
        "start" => only_id("start", args).map(|id| Verb::Start { id }),
        "state" => only_id("state", args).map(|id| Verb::State { id }),
        "pause" => only_id("pause", args).map(|id| Verb::Pause { id }),
        "resume" => only_id("resume", args).map(|id| Verb::Resume { id }),
        "kill" => {
            let parsed = flags::parse(&[switch(&["all", "a"])], Order::Mixed, args)?;
            let id = id_of("kill", &parsed)?;
            let signal = parsed.positional.get(1).cloned().unwrap_or_else(|| "SIGTERM".to_owned());
            at_most(2, "kill", &parsed)?;
            Ok(Verb::Kill { id, signal, all: parsed.on("all") })
        }
        "delete" => {
            let parsed = flags::parse(&[switch(&["force", "f"])], Order::Mixed, args)?;
            at_most(1, "delete", &parsed)?;
            Ok(Verb::Delete { id: id_of("delete", &parsed)?, force: parsed.on("force") })
        }
        "exec" => exec_args(args).map(|args| Verb::Exec(Box::new(args))),
        "ps" => {
            let parsed = flags::parse(&[value(&["format", "f"])], Order::FlagsFirst, args)?;
            let json = json_format("ps", &parsed)?;
            let id = id_of("ps", &parsed)?;
            let ps_args = parsed.positional.into_iter().skip(1).collect();
            Ok(Verb::Ps { id, json, ps_args })
        }
        "update" => update_args(args).map(|args| Verb::Update(Box::new(args))),
        "events" => {
            let parsed =
                flags::parse(&[value(&["interval"]), switch(&["stats"])], Order::Mixed, args)?;
            at_most(1, "events", &parsed)?;
            Ok(Verb::Events {
                id: id_of("events", &parsed)?,
                stats: parsed.on("stats"),
                interval_seconds: interval_seconds(parsed.last("interval"))?,
            })
        }
        "list" => {
            let parsed = flags::parse(
                &[value(&["format", "f"]), switch(&["quiet", "q"])],
                Order::Mixed,
                args,
            )?;
            at_most(0, "list", &parsed)?;
            Ok(Verb::List { json: json_format("list", &parsed)?, quiet: parsed.on("quiet") })
        }
        "features" => {
            at_most(0, "features", &flags::parse(&[], Order::Mixed, args)?)?;
            Ok(Verb::Features)
        }
        "spec" => {
            let parsed = flags::parse(
                &[value(&["bundle", "b"]), switch(&["rootless"])],
                Order::Mixed,
                args,
            )?;
            at_most(0, "spec", &parsed)?;
            let bundle = PathBuf::from(parsed.last("bundle").unwrap_or("."));
            Ok(Verb::Spec { bundle, rootless: parsed.on("rootless") })
        }
        crate::hooks::RELAY_VERB => match args {
            [relay, kind, index] => Ok(Verb::HookRelay {
                relay: relay.into(),
                kind: kind.clone(),
                index: index.parse().map_err(|_| UsageError::UnknownVerb(verb.to_owned()))?,
            }),
            _ => Err(UsageError::UnknownVerb(verb.to_owned())),
        },
        other => Err(UsageError::UnknownVerb(other.to_owned())),
    }
}

fn create_args(verb: &'static str, parsed: &Parsed) -> Result<CreateArgs, UsageError> {
    at_most(1, verb, parsed)?;
    if parsed.last("pidfd-socket").is_some_and(|path| !path.is_empty()) {
        return Err(UsageError::Invalid {
            verb,
            message: "--pidfd-socket is not supported".into(),
        });
    }
    Ok(CreateArgs {
        id: id_of(verb, parsed)?,
        bundle: PathBuf::from(parsed.last("bundle").filter(|b| !b.is_empty()).unwrap_or(".")),
        console_socket: path(parsed, "console-socket"),
        pid_file: path(parsed, "pid-file"),
        no_pivot: parsed.on("no-pivot"),
        no_new_keyring: parsed.on("no-new-keyring"),
        preserve_fds: parsed.number("preserve-fds")?.unwrap_or(0),
    })
}

fn exec_args(args: &[String]) -> Result<ExecArgs, UsageError> {
    let verb = "exec";
    let parsed = flags::parse(EXEC, Order::FlagsFirst, args)?;
    let id = id_of(verb, &parsed)?;
    if parsed.last("pidfd-socket").is_some_and(|path| !path.is_empty()) {
        return Err(UsageError::Invalid {
            verb,
            message: "--pidfd-socket is not supported".into(),
        });
    }
    let process = match path(&parsed, "process") {
        Some(file) => ExecProcess::File(file),
        None => {
            let command: Vec<String> = parsed.positional.iter().skip(1).cloned().collect();
            if command.is_empty() {
                let message = "process args cannot be empty".to_owned();
                return Err(UsageError::Invalid { verb, message });
            }
            ExecProcess::Flags(ExecFlags {
                args: command,
                cwd: path(&parsed, "cwd"),
                env: parsed.all("env"),
                tty: parsed.on("tty"),
                user: parsed.last("user").map(user).transpose()?,
                additional_gids: parsed
                    .all("additional-gids")
                    .iter()
                    .map(|gid| {
                        gid.parse().map_err(|_| FlagError::BadValue {
                            name: "additional-gids",
                            value: gid.clone(),
                            expected: "a group number",
                        })
                    })
                    .collect::<Result<_, _>>()?,
                process_label: parsed.last("process-label").map(str::to_owned),
                apparmor: parsed.last("apparmor").map(str::to_owned),
                no_new_privs: parsed.on("no-new-privs"),
                caps: parsed.all("cap"),
            })
        }
    };
    Ok(ExecArgs {
        id,
        console_socket: path(&parsed, "console-socket"),
        pid_file: path(&parsed, "pid-file"),
        detach: parsed.on("detach"),
        ignore_paused: parsed.on("ignore-paused"),
        preserve_fds: parsed.number("preserve-fds")?.unwrap_or(0),
        cgroup: parsed.last("cgroup").map(str::to_owned),
        process,
    })
}

fn update_args(args: &[String]) -> Result<UpdateArgs, UsageError> {
    let parsed = flags::parse(UPDATE, Order::Mixed, args)?;
    at_most(1, "update", &parsed)?;
    let text = |name| parsed.last(name).filter(|text| !text.is_empty()).map(str::to_owned);
    Ok(UpdateArgs {
        id: id_of("update", &parsed)?,
        resources: path(&parsed, "resources"),
        flags: UpdateFlags {
            blkio_weight: parsed.number("blkio-weight")?,
            cpu_period: parsed.number("cpu-period")?,
            cpu_quota: parsed.number("cpu-quota")?,
            cpu_burst: parsed.number("cpu-burst")?,
            cpu_share: parsed.number("cpu-share")?,
            cpu_rt_period: parsed.number("cpu-rt-period")?,
            cpu_rt_runtime: parsed.number("cpu-rt-runtime")?,
            cpu_idle: parsed.number("cpu-idle")?,
            cpuset_cpus: text("cpuset-cpus"),
            cpuset_mems: text("cpuset-mems"),
            memory_bytes: bytes(&parsed, "memory")?,
            memory_reservation_bytes: bytes(&parsed, "memory-reservation")?,
            memory_swap_bytes: bytes(&parsed, "memory-swap")?,
            pids_limit: parsed.number("pids-limit")?,
            l3_cache_schema: text("l3-cache-schema"),
            mem_bw_schema: text("mem-bw-schema"),
        },
    })
}

/// A size as docker's units package reads it: a number with an optional b, k, m, g, t; -1 is none.
fn bytes(parsed: &Parsed, name: &'static str) -> Result<Option<i64>, FlagError> {
    let Some(text) = parsed.last(name).map(str::trim).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let bad =
        || FlagError::BadValue { name, value: text.to_owned(), expected: "a size such as 512m" };
    if text == "-1" {
        return Ok(Some(-1));
    }
    let lower = text.to_ascii_lowercase();
    let trimmed = lower.trim_end_matches("ib").trim_end_matches('b');
    let (digits, shift) = match trimmed.chars().last() {
        Some('k') => (trimmed.trim_end_matches('k'), 10),
        Some('m') => (trimmed.trim_end_matches('m'), 20),
        Some('g') => (trimmed.trim_end_matches('g'), 30),
        Some('t') => (trimmed.trim_end_matches('t'), 40),
        _ => (trimmed, 0),
    };
    let count: i64 = digits.trim().parse().map_err(|_| bad())?;
    count.checked_mul(1_i64 << shift).filter(|&bytes| bytes >= 0).map(Some).ok_or_else(bad)
}

/// `UID` or `UID:GID`.
fn user(text: &str) -> Result<(u32, Option<u32>), FlagError> {
    let bad = || FlagError::BadValue {
        name: "user",
        value: text.to_owned(),
        expected: "uid or uid:gid in numbers",
    };
    let (uid, gid) = match text.split_once(':') {
        Some((uid, gid)) => (uid, Some(gid)),
        None => (text, None),
    };
    let gid = gid.map(|gid| gid.parse().map_err(|_| bad())).transpose()?;
    Ok((uid.parse().map_err(|_| bad())?, gid))
}

/// Go's duration, as far as whole seconds go: `5s`, `1m`, `2h`; at least one second.
fn interval_seconds(text: Option<&str>) -> Result<u64, FlagError> {
    let Some(text) = text else { return Ok(5) };
    let bad = || FlagError::BadValue {
        name: "interval",
        value: text.to_owned(),
        expected: "a duration such as 5s",
    };
    let (number, unit) =
        text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let number: u64 = number.parse().map_err(|_| bad())?;
    let seconds = match unit {
        "s" => Some(number),
        "m" => number.checked_mul(60),
        "h" => number.checked_mul(3600),
        _ => None,
    };
    seconds.filter(|&seconds| seconds > 0).ok_or_else(bad)
}

fn json_format(verb: &'static str, parsed: &Parsed) -> Result<bool, UsageError> {
    match parsed.last("format") {
        None | Some("table" | "") => Ok(false),
        Some("json") => Ok(true),
        Some(other) => Err(UsageError::Invalid {
            verb,
            message: format!("invalid format option {other:?}: table and json exist"),
        }),
    }
}

fn only_id(verb: &'static str, args: &[String]) -> Result<ContainerId, UsageError> {
    let parsed = flags::parse(&[], Order::Mixed, args)?;
    at_most(1, verb, &parsed)?;
    id_of(verb, &parsed)
}

pub(crate) fn id_of(verb: &'static str, parsed: &Parsed) -> Result<ContainerId, UsageError> {
    let id = parsed.positional.first().ok_or(UsageError::NoId { verb })?;
    Ok(ContainerId::parse(id)?)
}

pub(crate) fn at_most(count: usize, verb: &'static str, parsed: &Parsed) -> Result<(), UsageError> {
    match parsed.positional.get(count) {
        None => Ok(()),
        Some(argument) => Err(UsageError::TooMany { verb, argument: argument.clone() }),
    }
}

pub(crate) fn path(parsed: &Parsed, name: &str) -> Option<PathBuf> {
    parsed.last(name).filter(|path| !path.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verb(line: &str) -> Result<Verb, UsageError> {
        let args: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&args).map(|line| line.verb)
    }

    #[test]
    fn dockers_create() {
        let Verb::Create(create) = verb(
            "--root /run/r --log /b/log.json --log-format json create --bundle /b \
             --pid-file /b/init.pid --console-socket /tmp/pty.sock abc",
        )
        .unwrap() else {
            panic!()
        };
        assert_eq!(create.id.as_str(), "abc");
        assert_eq!(create.bundle, PathBuf::from("/b"));
        assert_eq!(create.console_socket, Some("/tmp/pty.sock".into()));
    }

    #[test]
    fn exec_keeps_the_commands_flags() {
        let Verb::Exec(exec) = verb("exec -t -u 1:2 -e A=1 -c CAP_KILL abc ls -l --all").unwrap()
        else {
            panic!()
        };
        let ExecProcess::Flags(flags) = exec.process else { panic!() };
        assert_eq!(flags.args, ["ls", "-l", "--all"]);
        assert_eq!(flags.user, Some((1, Some(2))));
        assert!(flags.tty);
    }

    #[test]
    fn sizes_have_units() {
        let Verb::Update(update) = verb("update --memory 512m --memory-swap=-1 abc").unwrap()
        else {
            panic!()
        };
        assert_eq!(update.flags.memory_bytes, Some(512 << 20));
        assert_eq!(update.flags.memory_swap_bytes, Some(-1));
        assert!(verb("update --memory much abc").is_err());
        assert!(verb("update --memory 99999999999t abc").is_err());
    }

    #[test]
    fn mistakes_are_refused() {
        for line in ["", "frobnicate", "create", "start a b", "state ../x", "--log-format x list"] {
            assert!(verb(line).is_err(), "{line}");
        }
    }
}
