//! Programs run with a bound on their time, and looking after processes that are not our children.
//!
//! Output goes to unlinked files, not to pipes: whoever inherits a pipe and lives on (a monitor, say) would keep its reader.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::Pid;

use crate::terminal::Session;

/// Ample for one call of an engine on a loaded machine; longer ones name their own bound.
const CALL_TIME_MAX: Duration = Duration::from_secs(120);

/// A program to run.
#[derive(Debug)]
pub struct Call {
    command: Command,
    bound: Duration,
    input: Vec<u8>,
}

/// How a call ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
    shown: String,
}

impl Call {
    pub fn new(program: impl AsRef<OsStr>) -> Call {
        Call { command: Command::new(program), bound: CALL_TIME_MAX, input: Vec::new() }
    }

    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = A>) -> Call {
        self.command.args(args);
        self
    }

    #[must_use]
    pub fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Call {
        self.command.env(name, value);
        self
    }

    /// Ends the program, and fails the call, after this time.
    #[must_use]
    pub fn within(mut self, bound: Duration) -> Call {
        self.bound = bound;
        self
    }

    #[must_use]
    pub fn input(mut self, bytes: impl Into<Vec<u8>>) -> Call {
        self.input = bytes.into();
        self
    }

    /// Starts it in a terminal of this size, as if a person had.
    ///
    /// # Errors
    /// When there is no terminal to be had, or it can't be started.
    pub fn in_terminal(self, rows: u16, columns: u16) -> Result<Session> {
        Session::start(&self.command, rows, columns)
    }

    fn shown(&self) -> String {
        let mut words = vec![self.command.get_program().to_string_lossy().into_owned()];
        words.extend(self.command.get_args().map(|word| word.to_string_lossy().into_owned()));
        words.join(" ")
    }

    /// Runs it to its end, whatever its status.
    ///
    /// # Errors
    /// When it cannot be started, or is not done in time; it and its process group are then killed.
    pub fn run(mut self) -> Result<Ended> {
        let shown = self.shown();
        let files = || -> std::io::Result<(File, File)> {
            let mine = tempfile::tempfile()?;
            Ok((mine.try_clone()?, mine))
        };
        let (out, mut out_mine) = files().context("a file for output")?;
        let (err, mut err_mine) = files().context("a file for output")?;
        let mut input = tempfile::tempfile().context("a file for input")?;
        input.write_all(&self.input)?;
        input.seek(SeekFrom::Start(0))?;
        let begin = Instant::now();
        let mut child = self
            .command
            .stdin(if self.input.is_empty() { Stdio::null() } else { Stdio::from(input) })
            .stdout(out)
            .stderr(err)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {shown}"))?;
        let status = wait_for(&mut child, self.bound)?;
        let took = begin.elapsed();
        let text = |file: &mut File| -> Result<String> {
            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(0))?;
            file.read_to_end(&mut bytes)?;
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let (stdout, stderr) = (text(&mut out_mine)?, text(&mut err_mine)?);
        match status {
            Some(status) => Ok(Ended { status, stdout, stderr, took, shown }),
            None => {
                let _ = killpg(pid_of(&child), Signal::SIGKILL);
                child.wait().context("waiting for a killed child")?;
                bail!(
                    "{shown}: not done within {:?}; said: {}",
                    self.bound,
                    last_lines(&format!("{stdout}{stderr}"))
                )
            }
        }
    }

    /// Runs it, and wants success. Answers what it printed, without the final newline.
    ///
    /// # Errors
    /// As [`Call::run`], and when it exits with another status than 0: the error ends with the last lines it said.
    pub fn output(self) -> Result<String> {
        let ended = self.run()?;
        ended.successful()?;
        Ok(ended.stdout.trim_end().to_owned())
    }
}

impl Ended {
    /// # Errors
    /// When the exit status was another than 0.
    pub fn successful(&self) -> Result<()> {
        if !self.status.success() {
            bail!(
                "{}: {}: {}",
                self.shown,
                self.status,
                last_lines(&format!("{}{}", self.stdout, self.stderr))
            );
        }
        Ok(())
    }
}

fn last_lines(text: &str) -> String {
    let lines: Vec<&str> = text.trim_end().lines().collect();
    lines[lines.len().saturating_sub(12)..].join("\n  ")
}

pub fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).expect("process ids fit pid_t"))
}

/// The child's status, or `None` when it still runs after `bound`.
pub fn wait_for(child: &mut Child, bound: Duration) -> Result<Option<ExitStatus>> {
    let begin = Instant::now();
    loop {
        if let Some(status) = child.try_wait().context("waiting for a child")? {
            return Ok(Some(status));
        }
        if begin.elapsed() > bound {
            return Ok(None);
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Ends a child: politely, and after `grace` not.
pub fn end(child: &mut Child, grace: Duration) {
    let _ = kill(pid_of(child), Signal::SIGTERM);
    if !matches!(wait_for(child, grace), Ok(Some(_))) {
        let _ = kill(pid_of(child), Signal::SIGKILL);
        let _ = child.wait();
    }
}

/// The processes whose environment has `NAME=VALUE`: how those of an engine are found that are nobody's children any more.
pub fn with_environment(name: &str, value: &Path) -> Vec<Pid> {
    let mut wanted = OsString::from(name);
    wanted.push("=");
    wanted.push(value);
    let wanted = wanted.as_encoded_bytes().to_vec();
    matching(|folder| {
        std::fs::read(folder.join("environ"))
            .is_ok_and(|all| all.split(|byte| *byte == 0).any(|one| one == wanted))
    })
}

/// The processes whose program lies below `folder`, or that are programs of ours and were told of it: for those that clear
/// their environment.
pub fn of_folder(folder: &Path) -> Vec<Pid> {
    let text = folder.as_os_str().as_encoded_bytes().to_vec();
    matching(|process| {
        let program = std::fs::read_link(process.join("exe")).unwrap_or_default();
        program.starts_with(folder)
            || (program_name(process).is_some()
                && std::fs::read(process.join("cmdline"))
                    .is_ok_and(|words| words.windows(text.len()).any(|part| part == text)))
    })
}

/// Which program of ours a folder of `/proc` shows, if any: by its file, or by the memfd that it runs from.
pub fn program_name(process: &Path) -> Option<&'static str> {
    let program = std::fs::read_link(process.join("exe")).ok()?;
    let name = program.file_name()?.to_string_lossy().into_owned();
    let name = name.trim_start_matches("memfd:").trim_end_matches(" (deleted)");
    crate::product::NAMES.into_iter().find(|ours| *ours == name)
}

/// The processes of which `holds` says so, given their folder in `/proc`. One that ends meanwhile has nothing to show, and is
/// not of interest.
fn matching(holds: impl Fn(&Path) -> bool) -> Vec<Pid> {
    let own = std::process::id();
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| {
            let pid = entry.file_name().to_str()?.parse::<u32>().ok()?;
            (pid != own && holds(&entry.path())).then_some(pid)
        })
        .filter_map(|pid| i32::try_from(pid).ok())
        .map(Pid::from_raw)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A test that hangs would take the whole run with it.
    #[test]
    fn a_call_that_hangs_is_ended() {
        let error =
            Call::new("sleep").args(["60"]).within(Duration::from_millis(100)).run().unwrap_err();
        assert!(error.to_string().contains("not done within"), "{error}");
    }

    /// A failure without the program's own words cannot be understood from a log.
    #[test]
    fn a_failure_says_what_the_program_said() {
        let error = Call::new("sh").args(["-c", "echo reason >&2; exit 3"]).output().unwrap_err();
        assert!(error.to_string().contains("reason") && error.to_string().contains('3'), "{error}");
    }

    /// A leaked monitor that holds our stdout must not hold the call.
    #[test]
    fn a_background_process_does_not_hold_the_call() {
        let ended = Call::new("sh").args(["-c", "sleep 3 & echo done"]).run().unwrap();
        assert_eq!(ended.stdout, "done\n");
        assert!(ended.took < Duration::from_secs(3));
    }

    /// Cleaning up finds what an engine started by this mark.
    #[test]
    fn processes_are_found_by_their_environment() {
        let mark = tempfile::tempdir().unwrap();
        let mut child =
            Command::new("sleep").arg("60").env("SAMARA_TEST_MARK", mark.path()).spawn().unwrap();
        let found = crate::until("marked process", Duration::from_secs(5), || {
            let found = with_environment("SAMARA_TEST_MARK", mark.path());
            Ok((!found.is_empty()).then_some(found))
        });
        let pid = pid_of(&child);
        end(&mut child, Duration::from_secs(5));
        assert_eq!(found.unwrap(), vec![pid]);
        assert!(with_environment("SAMARA_TEST_MARK", mark.path()).is_empty());
    }
}
