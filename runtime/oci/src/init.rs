//! What the container's first process does instead of libcontainer's default: become the user's
//! program (`Program`), or wait to be made into a restored one (`Blank`).
//!
//! All of this runs in a process that libcontainer has forked: in the container's namespaces,
//! cgroups and root, as root with every capability of this program. `validate` runs in `create`
//! and its errors are the user's; `exec` runs after `start`.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::CString;
use std::io::{self, BufRead, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use oci_spec::runtime::{Process, Spec};
use rustix::fs::{Access, AtFlags};
use rustix::io::Errno;
use rustix::process::Uid;
use rustix::termios::Winsize;

use crate::cause::Cause;
use crate::confine::{ConfineError, Confinement};
use crate::hooks::{self, HookState};
use crate::mounts::{MountError, Unfinished};
use crate::report::chain;

#[derive(Debug, thiserror::Error)]
pub enum InitError {
    #[error(transparent)]
    Confine(#[from] ConfineError),
    #[error(transparent)]
    Mounts(#[from] MountError),
    #[error(transparent)]
    Hook(#[from] hooks::HookError),
    #[error("process.args is empty")]
    NoArgs,
    #[error("process.{0} holds a NUL byte")]
    Nul(&'static str),
    // The wording of the next four is Go's: engines derive the exit status 127 or 126 from it.
    #[error("exec: \"{0}\": executable file not found in $PATH")]
    NotInPath(String),
    #[error("exec: \"{0}\": stat {0}: no such file or directory")]
    NoFile(String),
    #[error("exec: \"{0}\": permission denied")]
    NotExecutable(String),
    #[error("exec {path}: {errno}")]
    Exec { path: String, errno: &'static str },
    #[error("chdir to cwd (\"{cwd}\") set in config.json failed: {source}")]
    Chdir { cwd: String, source: io::Error },
    #[error(
        "current working directory is outside of container mount namespace root -- \
         possible container breakout detected"
    )]
    Breakout,
    #[error("cannot {attempt}")]
    Call { attempt: &'static str, source: io::Error },
}

/// Becomes the program of the specification.
#[derive(Clone, Debug)]
pub struct ProgramInit(Rc<Program>);

#[derive(Debug)]
struct Program {
    process: Process,
    confinement: Confinement,
    /// The session keyring's name; none to stay in the caller's.
    keyring: Option<CString>,
    /// The mounts that are to be finished; none in a process that joins.
    own_mounts: Option<Unfinished>,
    start_hooks: Option<(oci_spec::runtime::Hooks, HookState)>,
    user_namespace: Option<OwnedFd>,
    cause: Cause,
    prepared: RefCell<Option<Prepared>>,
}

/// What `validate` found out for `exec`.
#[derive(Debug)]
struct Prepared {
    path: CString,
    args: Vec<CString>,
    env: Vec<CString>,
}

/// What distinguishes the first process of a container from one that joins.
#[derive(Debug)]
pub struct FirstProcess {
    pub mounts: Unfinished,
    pub start_hooks: Option<(oci_spec::runtime::Hooks, HookState)>,
}

impl ProgramInit {
    pub fn new(
        process: Process,
        confinement: Confinement,
        keyring: Option<CString>,
        first: Option<FirstProcess>,
        user_namespace: Option<OwnedFd>,
        cause: Cause,
    ) -> Self {
        let (own_mounts, start_hooks) = match first {
            Some(first) => (Some(first.mounts), first.start_hooks),
            None => (None, None),
        };
        Self(Rc::new(Program {
            process,
            confinement,
            keyring,
            own_mounts,
            start_hooks,
            user_namespace,
            cause,
            prepared: RefCell::new(None),
        }))
    }
}

impl Program {
    fn validate(&self) -> Result<(), InitError> {
        if let Some(namespace) = &self.user_namespace {
            enter_user_namespace(namespace.as_fd())?;
        }
        if let Some(name) = &self.keyring {
            match samara_kernel::keyctl::join_session_keyring(name) {
                Ok(()) => {}
                // A kernel without keyrings, and a user without quota: runc goes on as well.
                Err(e)
                    if matches!(
                        e.raw_os_error(),
                        Some(libc_errno::ENOSYS | libc_errno::EDQUOT)
                    ) => {}
                Err(source) => {
                    return Err(InitError::Call { attempt: "join a session keyring", source });
                }
            }
        }
        if let Some(mounts) = &self.own_mounts {
            mounts.finish()?;
        }
        self.confinement.check()?;
        let uid = self.confinement.uid();
        give_stdio_to(uid)?;
        set_console_size(&self.process)?;
        let cwd = self.process.cwd();
        if self.own_mounts.is_some() && !cwd.exists() {
            // As runc: a missing working directory is made.
            std::fs::create_dir_all(cwd).map_err(|source| self.chdir_error(source))?;
        }
        let args = self.process.args().as_deref().filter(|args| !args.is_empty());
        let args = args.ok_or(InitError::NoArgs)?;
        let env = self.environment(uid)?;
        let search = env
            .iter()
            .rev()
            .find_map(|variable| variable.strip_prefix("PATH="))
            .unwrap_or_default();
        let name = args.first().ok_or(InitError::NoArgs)?;
        // Root may enter where the user may not, and the other way round (root without
        // CAP_DAC_OVERRIDE), so either may.
        let by_root = std::env::set_current_dir(cwd);
        let path = self.confinement.as_user(|| {
            if by_root.is_err() {
                std::env::set_current_dir(cwd).map_err(|source| self.chdir_error(source))?;
            }
            verify_working_directory()?;
            look_up(name, search)
        })??;
        let strings = |what, list: &[String]| {
            list.iter()
                .map(|text| CString::new(text.as_str()).map_err(|_| InitError::Nul(what)))
                .collect::<Result<Vec<_>, _>>()
        };
        let path = path.into_os_string().into_encoded_bytes();
        *self.prepared.borrow_mut() = Some(Prepared {
            path: CString::new(path).map_err(|_| InitError::Nul("args"))?,
            args: strings("args", args)?,
            env: strings("env", &env)?,
        });
        Ok(())
    }

    fn exec(&self) -> Result<std::convert::Infallible, InitError> {
        let prepared = self.prepared.borrow_mut().take().ok_or(InitError::NoArgs)?;
        samara_kernel::signal::reset_for_exec()
            .map_err(|source| InitError::Call { attempt: "reset the signals", source })?;
        let mut hook_failure = None;
        self.confinement.apply(|| {
            if let Some((hooks, state)) = &self.start_hooks {
                let env = self.hook_environment(&prepared);
                hook_failure =
                    hooks::run(hooks::Kind::StartContainer, Some(hooks), state, Some(&env)).err();
            }
            Ok(())
        })?;
        if let Some(failure) = hook_failure {
            return Err(failure.into());
        }
        let errno = match nix::unistd::execve(&prepared.path, &prepared.args, &prepared.env) {
            Ok(never) => match never {},
            Err(errno) => errno,
        };
        let path = prepared.path.to_string_lossy().into_owned();
        Err(InitError::Exec { path, errno: go_errno(errno) })
    }

    fn hook_environment(&self, prepared: &Prepared) -> HashMap<String, String> {
        prepared
            .env
            .iter()
            .filter_map(|variable| variable.to_str().ok()?.split_once('='))
            .map(|(name, value)| (name.to_owned(), value.to_owned()))
            .collect()
    }

    /// The specification's environment in its order; of a name given twice the last counts, and
    /// HOME comes from /etc/passwd where it is missing or empty.
    fn environment(&self, uid: Uid) -> Result<Vec<String>, InitError> {
        let given = self.process.env().clone().unwrap_or_default();
        let name = |variable: &str| variable.split('=').next().unwrap_or_default().to_owned();
        let mut seen = std::collections::HashSet::new();
        let mut env: Vec<String> =
            given.into_iter().rev().filter(|variable| seen.insert(name(variable))).collect();
        env.reverse();
        // podman sets an empty one.
        env.retain(|variable| variable != "HOME=");
        if !env.iter().any(|variable| variable.starts_with("HOME=")) {
            env.push(format!("HOME={}", home_of(uid)));
        }
        // What systemd's socket activation passes on.
        if let Ok(count) = std::env::var("LISTEN_FDS") {
            env.push(format!("LISTEN_FDS={count}"));
            env.push("LISTEN_PID=1".to_owned());
        }
        Ok(env)
    }

    fn chdir_error(&self, source: io::Error) -> InitError {
        InitError::Chdir { cwd: self.process.cwd().display().to_string(), source }
    }
}

impl Executor for ProgramInit {
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        self.0.validate().map_err(|error| {
            let text = chain(&error);
            self.0.cause.tell(&text);
            ExecutorValidationError::ArgValidationError(text)
        })
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // execve is handed its own.
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        let error = match self.0.exec() {
            Ok(never) => match never {},
            Err(error) => error,
        };
        let text = chain(&error);
        self.0.cause.tell(&text);
        if self.0.own_mounts.is_some() {
            // After `start` nobody listens but the container's own standard error; runc's words
            // and status.
            let _ = rustix::io::write(rustix::stdio::stderr(), format!("{text}\n").as_bytes());
            std::process::exit(EXEC_FAILED_STATUS);
        }
        Err(ExecutorError::Other(text))
    }
}

/// What runc 1.1 ends with when the program cannot be executed after `start`.
const EXEC_FAILED_STATUS: i32 = 255;

/// Waits, as the container's first process, for the engine that restores a program into it.
#[derive(Clone, Debug)]
pub struct BlankInit {
    process: Process,
    mounts: Rc<Unfinished>,
    /// The writing end of a pipe: written to when the process waits.
    ready: Rc<OwnedFd>,
    cause: Cause,
}

impl BlankInit {
    /// `ready` is the writing end of a pipe.
    pub fn new(process: Process, mounts: Unfinished, ready: OwnedFd, cause: Cause) -> Self {
        Self { process, mounts: Rc::new(mounts), ready: Rc::new(ready), cause }
    }
}

impl Executor for BlankInit {
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        let finish = || -> Result<(), InitError> {
            self.mounts.finish()?;
            set_console_size(&self.process)
        };
        finish().map_err(|error| {
            let text = chain(&error);
            self.cause.tell(&text);
            ExecutorValidationError::ArgValidationError(text)
        })
    }

    fn setup_envs(&self, _: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        let other = |attempt: &str, e: &dyn std::error::Error| {
            ExecutorError::Other(format!("cannot {attempt}: {e}"))
        };
        // While SIGPIPE is still ignored: who made the container need not have waited for this.
        match rustix::io::write(&*self.ready, b"r") {
            Ok(_) | Err(Errno::PIPE) => {}
            Err(errno) => return Err(other("report readiness", &errno)),
        }
        samara_kernel::signal::reset_for_exec().map_err(|e| other("reset the signals", &e))?;
        // The engine attaches as a program's debugger would.
        rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::Dumpable)
            .map_err(|e| other("become traceable", &e))?;
        samara_kernel::close_range::close_from(3).map_err(|e| other("close descriptors", &e))?;
        loop {
            nix::unistd::pause();
        }
    }
}

fn enter_user_namespace(namespace: BorrowedFd<'_>) -> Result<(), InitError> {
    let call = |attempt| move |e: Errno| InitError::Call { attempt, source: e.into() };
    rustix::thread::move_into_link_name_space(
        namespace,
        Some(rustix::thread::LinkNameSpaceType::User),
    )
    .map_err(call("join the user namespace"))?;
    rustix::thread::set_thread_res_gid(
        rustix::process::Gid::ROOT,
        rustix::process::Gid::ROOT,
        rustix::process::Gid::ROOT,
    )
    .map_err(call("become root in the user namespace"))?;
    rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)
        .map_err(call("become root in the user namespace"))
}

/// Gives the terminal the size that the specification wants.
fn set_console_size(process: &Process) -> Result<(), InitError> {
    let Some(size) = process.console_size() else { return Ok(()) };
    let short = |value: u64| u16::try_from(value).unwrap_or(u16::MAX);
    if process.terminal() == Some(true) && (size.height(), size.width()) != (0, 0) {
        let winsize = Winsize {
            ws_row: short(size.height()),
            ws_col: short(size.width()),
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(rustix::stdio::stdin(), winsize).map_err(|errno| {
            InitError::Call { attempt: "set the terminal's size", source: errno.into() }
        })?;
    }
    Ok(())
}

/// A program that does not run as root must be able to open /dev/stdout again.
fn give_stdio_to(uid: Uid) -> Result<(), InitError> {
    let null = rustix::fs::stat("/dev/null").map(|stat| stat.st_rdev).ok();
    for fd in [rustix::stdio::stdin(), rustix::stdio::stdout(), rustix::stdio::stderr()] {
        let Ok(stat) = rustix::fs::fstat(fd) else { continue };
        let is_null = null.is_some_and(|null| {
            rustix::fs::FileType::from_raw_mode(stat.st_mode).is_char_device()
                && stat.st_rdev == null
        });
        if stat.st_uid == uid.as_raw() || is_null {
            continue;
        }
        match rustix::fs::fchown(fd, Some(uid), None) {
            // A user that the namespace does not map, a socket's other owner, a read-only file:
            // runc leaves them as they are.
            Ok(()) | Err(Errno::INVAL | Errno::PERM | Errno::ROFS) => {}
            Err(errno) => {
                return Err(InitError::Call {
                    attempt: "give standard input and output to the user",
                    source: errno.into(),
                });
            }
        }
    }
    Ok(())
}

/// A descriptor of a host directory that leaked in could be the working directory.
fn verify_working_directory() -> Result<(), InitError> {
    match rustix::process::getcwd(Vec::new()) {
        Ok(path) if path.to_bytes().starts_with(b"/") => Ok(()),
        Ok(_) | Err(Errno::NOENT) => Err(InitError::Breakout),
        Err(errno) => {
            Err(InitError::Call { attempt: "read the working directory", source: errno.into() })
        }
    }
}

/// Finds the program as Go's `exec.LookPath` does.
fn look_up(name: &str, search: &str) -> Result<PathBuf, InitError> {
    if name.contains('/') {
        return match executable(Path::new(name)) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(Errno::NOENT | Errno::NOTDIR) => Err(InitError::NoFile(name.to_owned())),
            Err(_) => Err(InitError::NotExecutable(name.to_owned())),
        };
    }
    for folder in search.split(':') {
        // An empty entry is the working directory, which Go no longer trusts; nor do we.
        if folder.is_empty() {
            continue;
        }
        let path = Path::new(folder).join(name);
        if executable(&path).is_ok() {
            return Ok(path);
        }
    }
    Err(InitError::NotInPath(name.to_owned()))
}

fn executable(path: &Path) -> Result<(), Errno> {
    let stat = rustix::fs::stat(path)?;
    if rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir() {
        return Err(Errno::ACCESS);
    }
    rustix::fs::accessat(rustix::fs::CWD, path, Access::EXEC_OK, AtFlags::EACCESS)
}

/// An image's /etc/passwd is the image's: read up to here.
const PASSWD_BYTES_MAX: u64 = 4 << 20;

fn home_of(uid: Uid) -> String {
    let home = || {
        let file = std::fs::File::open("/etc/passwd").ok()?;
        io::BufReader::new(file.take(PASSWD_BYTES_MAX)).lines().map_while(Result::ok).find_map(
            |line| {
                let mut fields = line.split(':').skip(2);
                (fields.next()?.parse() == Ok(uid.as_raw()))
                    .then(|| fields.nth(2).map(str::to_owned))
                    .flatten()
            },
        )
    };
    home().filter(|home| !home.is_empty()).unwrap_or_else(|| "/".to_owned())
}

/// Go's words for what `execve` answers.
fn go_errno(errno: nix::errno::Errno) -> &'static str {
    use nix::errno::Errno;
    match errno {
        Errno::ENOEXEC => "exec format error",
        Errno::ENOENT => "no such file or directory",
        Errno::EACCES => "permission denied",
        other => other.desc(),
    }
}

/// Numbers that rustix and the standard library have no common name for.
mod libc_errno {
    pub(super) const ENOSYS: i32 = 38;
    pub(super) const EDQUOT: i32 = 122;
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Engines read exit statuses 126 and 127 off these words.
    #[test]
    fn missing_programs_are_told_as_go_tells_them() {
        let text = |name| look_up(name, "/usr/bin:/bin").unwrap_err().to_string();
        assert_eq!(text("nosuch"), "exec: \"nosuch\": executable file not found in $PATH");
        assert_eq!(
            text("/no/such"),
            "exec: \"/no/such\": stat /no/such: no such file or directory"
        );
        assert_eq!(text("/etc"), "exec: \"/etc\": permission denied");
        assert_eq!(look_up("sh", "/nowhere:/bin").unwrap(), PathBuf::from("/bin/sh"));
    }

    #[test]
    fn home_comes_from_passwd() {
        assert_eq!(home_of(Uid::ROOT), "/root");
        assert_eq!(home_of(Uid::from_raw(4_000_000)), "/");
    }
}
