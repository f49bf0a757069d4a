//! What is saved, and by whom: the same program over the same root, under Samara in a container, and bare for CRIU.
//!
//! Both sides have the root as an overlay on the same disk, and the program's report in a tmpfs at `/control`: a mapped file on
//! a disk makes its writer wait while it is written back, which the clock thread would take for a pause.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use samara_tests::image::Image;
use samara_tests::process::Call;

use crate::program::{REPORT, Report};

/// A program, and the root that it finds itself in.
#[derive(Clone, Debug)]
pub(crate) struct Subject {
    /// The lower layer.
    pub(crate) root: PathBuf,
    pub(crate) command: Vec<String>,
}

impl Subject {
    /// The program of `tests/workloads/memory.c`, which [`crate::program::compile`] has put there.
    pub(crate) fn memory(folder: &Path, mebibytes: u64) -> Subject {
        Subject::busy(folder, mebibytes, 0, false)
    }

    /// The same with threads that wait, and with files.
    pub(crate) fn busy(folder: &Path, mebibytes: u64, threads: u64, files: bool) -> Subject {
        let (mebibytes, threads) = (mebibytes.to_string(), threads.to_string());
        let words = ["/memory", &mebibytes, "7", REPORT, &threads, "/data"];
        let count = if files { 6 } else { 5 };
        Subject {
            root: plain_root(folder),
            command: words.into_iter().take(count).map(str::to_owned).collect(),
        }
    }

    /// A program of the image with interpreters and virtual machines.
    ///
    /// # Errors
    /// When the image cannot be made or unpacked.
    pub(crate) fn of_image(folder: &Path, words: &[&str]) -> Result<Subject> {
        let root = folder.join("programs");
        if !root.join(".complete").exists() {
            std::fs::create_dir_all(&root)?;
            eprintln!("bench: unpacking the image with the programs");
            let unpack = "tar -xOf \"$1\" layer.tar | tar -C \"$2\" --numeric-owner -xf -";
            script(&[], unpack, &[&Image::Programs.archive()?, &root])?;
            for name in MOUNT_POINTS {
                std::fs::create_dir_all(root.join(name))?;
            }
            std::fs::write(root.join(".complete"), "")?;
        }
        let command = words.iter().map(|word| (*word).to_owned()).chain([REPORT.to_owned()]);
        Ok(Subject { root, command: command.collect() })
    }
}

/// The root with nothing but programs that need no other files.
pub(crate) fn plain_root(folder: &Path) -> PathBuf {
    folder.join("plain")
}

/// What both sides mount over or write to.
pub(crate) const MOUNT_POINTS: [&str; 6] = ["proc", "sys", "dev", "tmp", "control", "data"];

/// Somebody who saves programs.
pub(crate) trait Engine {
    fn name(&self) -> &'static str;

    /// Whether what is saved after the first time is what has changed.
    fn has_increments(&self) -> bool;

    /// Starts the program, and waits until its memory is filled. `round` tells this start from others: none may find what
    /// another has saved.
    ///
    /// # Errors
    /// When it does not start, or not in time.
    fn start<'a>(&'a self, subject: &Subject, round: &str) -> Result<Box<dyn Running + 'a>>;
}

/// A program that runs. Dropping it ends it and removes its root.
pub(crate) trait Running {
    fn report(&self) -> &Report;

    /// Saves it, and lets it run on. What is saved with Samara is durable then.
    ///
    /// # Errors
    /// When it cannot be saved: with what the engine said.
    fn save(&self) -> Result<()>;

    /// Brings what was saved to the store, where `save` has not.
    ///
    /// # Errors
    /// When the store does not take it.
    fn make_durable(&self) -> Result<()>;

    /// Bytes that all saving up to now has left: in the store, or in the images and what they were packed to.
    ///
    /// # Errors
    /// When they cannot be counted.
    fn bytes(&self) -> Result<u64>;

    /// Ends it.
    ///
    /// # Errors
    /// When it does not end in time.
    fn end(&mut self) -> Result<()>;

    /// Brings it back, after its end, from what was saved last: from the store, where it was made durable.
    ///
    /// # Errors
    /// When it does not run again.
    fn restore(&mut self) -> Result<()>;
}

impl dyn Running + '_ {
    /// Brings it back and lets it look at all of its memory and files: a figure of a broken capsule would be worth nothing.
    /// `written` pages it had written when it was last saved, or more.
    ///
    /// # Errors
    /// When it is not as it was.
    pub(crate) fn bring_back_and_check(&mut self, written: u64) -> Result<()> {
        self.end()?;
        self.restore().context("bringing it back")?;
        self.report().check_since(written)
    }
}

/// An overlay over a root, mounted where `enter` leads to. Unmounted and removed when dropped.
#[derive(Debug)]
pub(crate) struct Root {
    folder: PathBuf,
    enter: Vec<String>,
}

impl Root {
    /// # Errors
    /// When it cannot be mounted.
    pub(crate) fn mount(folder: PathBuf, lower: &Path, enter: &[String]) -> Result<Root> {
        for part in ["merged", "upper", "work"] {
            std::fs::create_dir_all(folder.join(part))?;
        }
        let root = Root { folder, enter: enter.to_vec() };
        let layers = format!(
            "lowerdir={},upperdir={},workdir={}",
            lower.display(),
            root.upper().display(),
            root.folder.join("work").display()
        );
        let merged = root.merged().to_string_lossy().into_owned();
        root.call(&["mount", "-t", "overlay", "-o", &layers, "overlay", &merged]).output()?;
        Ok(root)
    }

    pub(crate) fn call(&self, words: &[&str]) -> Call {
        call_in(&self.enter, words)
    }

    pub(crate) fn script(&self, text: &str, arguments: &[&Path]) -> Result<()> {
        script(&self.enter, text, arguments)
    }

    pub(crate) fn merged(&self) -> PathBuf {
        self.folder.join("merged")
    }

    pub(crate) fn upper(&self) -> PathBuf {
        self.folder.join("upper")
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        let merged = self.merged().to_string_lossy().into_owned();
        // What is mounted below goes as well. Lazily: a process that was just killed may still hold it.
        if let Err(error) = self.call(&["umount", "--recursive", "--lazy", &merged]).output() {
            eprintln!("bench: {} stays mounted: {error:#}", merged);
            return;
        }
        if let Err(error) = std::fs::remove_dir_all(&self.folder) {
            eprintln!("bench: {} stays: {error}", self.folder.display());
        }
    }
}

/// A command behind the words that lead to a namespace, if any.
pub(crate) fn call_in(enter: &[String], words: &[&str]) -> Call {
    let mut all = enter.iter().map(String::as_str).chain(words.iter().copied());
    Call::new(all.next().unwrap_or_default()).args(all).within(Duration::from_secs(600))
}

/// Runs a script of bash there with these arguments.
///
/// # Errors
/// When one of its commands fails.
pub(crate) fn script(enter: &[String], script: &str, arguments: &[&Path]) -> Result<()> {
    let script = format!("set -euo pipefail; {script}");
    let arguments = arguments.iter().map(|path| path.as_os_str());
    call_in(enter, &["bash", "-c", &script, "script"]).args(arguments).output()?;
    Ok(())
}
