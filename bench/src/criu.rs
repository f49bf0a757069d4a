//! The peer: CRIU 4.2 of Debian sid, its images packed by `tar | zstd -T2` and PUT to the same store; back by GET, unpacking
//! and `criu restore`. It dumps the bare program, without a runtime around it: its best case.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use samara_tests::object_store::ObjectStore;
use samara_tests::process::{Call, end};
use samara_tests::until;

use crate::program::Report;
use crate::{Full, memory_of};

/// Where CRIU cannot restore with the usual limit: it asks for a table of `fs.nr_open` descriptors.
const NR_OPEN: &str = "/proc/sys/fs/nr_open";
const NR_OPEN_FOR_RESTORE: &str = "20000";

/// What runs for the peer, by name.
const PROGRAMS: &[&str] = &["criu", "zstd", "tar", "curl"];

/// A mount namespace with the peers' root, held by a process.
#[derive(Debug)]
pub(crate) struct Peer {
    holder: Child,
    nr_open_before: String,
}

impl Peer {
    /// # Errors
    /// When the peers' root cannot be made.
    pub(crate) fn start() -> Result<Peer> {
        let repository = samara_tests::repository();
        Call::new(repository.join("script/peer-root"))
            .within(Duration::from_secs(1800))
            .output()?;
        let nr_open_before = std::fs::read_to_string(NR_OPEN)?;
        let holder = Command::new(repository.join("script/peer-run"))
            .args(["sleep", "infinity"])
            .stdin(Stdio::null())
            .spawn()?;
        let peer = Peer { holder, nr_open_before };
        // Until its namespace is there, /proc below it would be another.
        until("peers' root", Duration::from_secs(30), || {
            Ok(peer.call(&["test", "-d", "/mnt/host"]).run()?.status.success().then_some(()))
        })?;
        std::fs::write(NR_OPEN, NR_OPEN_FOR_RESTORE).context("lowering fs.nr_open for CRIU")?;
        Ok(peer)
    }

    /// A command inside.
    fn call(&self, words: &[&str]) -> Call {
        Call::new("nsenter")
            .args(["--mount", "--target", &self.holder.id().to_string(), "--"])
            .args(words)
            .within(Duration::from_secs(600))
    }

    /// CRIU's version.
    pub(crate) fn version(&self) -> Result<String> {
        Ok(self
            .call(&["criu", "--version"])
            .output()?
            .lines()
            .next()
            .unwrap_or_default()
            .replace("Version: ", ""))
    }

    /// Starts the program there, in a session of its own.
    fn program(&self, folder: &Path, mebibytes: u64) -> Result<(Pid, Report)> {
        let text = |path: PathBuf| path.to_string_lossy().into_owned();
        let report = folder.join("peer-report");
        let _ = std::fs::remove_file(&report);
        let pid_file = text(folder.join("peer-pid"));
        // Without what it would inherit from whoever called us: a file of another mount namespace cannot be dumped.
        let start = "for fd in /proc/self/fd/*; do n=${fd##*/}; ((n > 2)) && eval \"exec $n>&-\"; done; setsid \"$1\" \"$2\" 7 \"$3\" </dev/null >/dev/null 2>&1 & echo $! >\"$4\"";
        self.call(&[
            "bash",
            "-c",
            start,
            "start",
            &text(folder.join("memory")),
            &mebibytes.to_string(),
            &text(report.clone()),
            &pid_file,
        ])
        .output()?;
        let pid = Pid::from_raw(std::fs::read_to_string(&pid_file)?.trim().parse()?);
        let report = Report::wait(&report).inspect_err(|_| {
            let _ = kill(pid, Signal::SIGKILL);
        })?;
        Ok((pid, report))
    }

    /// Dump, pack and PUT with the program running on; end it; GET, unpack and restore; check.
    ///
    /// # Errors
    /// When a step fails.
    pub(crate) fn full(
        &self,
        folder: &Path,
        mebibytes: u64,
        store: &ObjectStore,
        with_memory: bool,
    ) -> Result<Full> {
        let (pid, report) = self.program(folder, mebibytes)?;
        let outcome = self.full_of(pid, &report, folder, store, with_memory);
        let _ = kill(pid, Signal::SIGKILL);
        let _ = gone(pid);
        outcome
    }

    fn full_of(
        &self,
        pid: Pid,
        report: &Report,
        folder: &Path,
        store: &ObjectStore,
        with_memory: bool,
    ) -> Result<Full> {
        let images = folder.join("peer-images");
        let packed = folder.join("peer.tar.zst");
        let fetched = folder.join("peer-fetched.tar.zst");
        let fresh = || -> Result<()> {
            let _ = std::fs::remove_dir_all(&images);
            Ok(std::fs::create_dir_all(&images)?)
        };
        fresh()?;
        let at = images.to_string_lossy().into_owned();
        report.wait_running()?;
        report.forget_gap()?;
        // Of the way there alone: on the way back CRIU becomes the program, and the program's memory its own.
        let sampler = with_memory.then(|| memory_of(PROGRAMS));
        let begin = Instant::now();
        self.call(&[
            "criu",
            "dump",
            "-t",
            &pid.to_string(),
            "-D",
            &at,
            "--leave-running",
            "-o",
            "dump.log",
        ])
        .output()
        .with_context(|| errors(&images.join("dump.log")))?;
        let dumped = begin.elapsed();
        self.call(&[
            "bash",
            "-c",
            "set -o pipefail; tar -C \"$1\" -cf - . | zstd -q -f -T2 -o \"$2\"",
            "pack",
            &at,
            &packed.to_string_lossy(),
        ])
        .output()?;
        store.put(&packed, "peer/full")?;
        let total = begin.elapsed();
        let peak = sampler.map(crate::Sampler::stop);
        report.wait_running()?;
        let pause_ms = report.gap_ms()?;
        let bytes = std::fs::metadata(&packed)?.len();

        kill(pid, Signal::SIGKILL)?;
        gone(pid)?;
        fresh()?;
        let begin = Instant::now();
        store.get("peer/full", &fetched)?;
        self.call(&[
            "bash",
            "-c",
            "set -o pipefail; zstd -q -d -c \"$2\" | tar -C \"$1\" -xf -",
            "unpack",
            &at,
            &fetched.to_string_lossy(),
        ])
        .output()?;
        self.call(&["criu", "restore", "-d", "-D", &at, "-o", "restore.log"])
            .output()
            .with_context(|| errors(&images.join("restore.log")))?;
        report.check(false)?;
        let restore = begin.elapsed();
        report.check(true)?;
        for file in [&packed, &fetched] {
            std::fs::remove_file(file)?;
        }
        std::fs::remove_dir_all(&images)?;
        if dumped > total {
            bail!("a part took longer than the whole");
        }
        Ok(Full { total, bytes, restore, pause_ms, peak })
    }
}

/// What CRIU's log calls an error.
fn errors(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    text.lines().filter(|line| line.contains("Error")).take(5).collect::<Vec<_>>().join("\n")
}

/// Waits until nobody has this process id: CRIU restores under it.
fn gone(pid: Pid) -> Result<()> {
    until("free process id", Duration::from_secs(60), || {
        Ok((!Path::new(&format!("/proc/{pid}")).exists()).then_some(()))
    })
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = std::fs::write(NR_OPEN, self.nr_open_before.trim());
        end(&mut self.holder, Duration::from_secs(5));
    }
}
