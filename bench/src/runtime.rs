//! An OCI runtime on a bundle by hand: runc, or the product.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use samara_tests::object_store::ObjectStore;
use samara_tests::process::Call;
use samara_tests::{product, until};

use crate::program::Report;
use crate::{Full, memory_of};

/// A runtime's program, its state folder and, for ours, its configuration.
#[derive(Debug)]
pub(crate) struct Runtime {
    program: PathBuf,
    root: PathBuf,
    config: PathBuf,
}

impl Runtime {
    pub(crate) fn runc(folder: &Path) -> Runtime {
        Runtime {
            program: PathBuf::from("runc"),
            root: folder.join("runc-state"),
            config: PathBuf::new(),
        }
    }

    /// # Errors
    /// When it was not built.
    pub(crate) fn ours(folder: &Path, store: &ObjectStore) -> Result<Runtime> {
        let config = folder.join("config.toml");
        std::fs::write(&config, store.node_config())?;
        std::fs::set_permissions(&config, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(Runtime {
            program: product::binaries()?.join("samara-runtime"),
            root: folder.join("samara-state"),
            config,
        })
    }

    fn call<A: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = A>) -> Call {
        Call::new(&self.program)
            .args([OsStr::new("--root"), self.root.as_os_str()])
            .args(words)
            .env("SAMARA_CONFIG", &self.config)
            .within(Duration::from_secs(600))
    }

    /// How long a container that does nothing takes from call to end.
    ///
    /// # Errors
    /// When it cannot be run.
    pub(crate) fn start(&self, folder: &Path) -> Result<Duration> {
        let bundle = bundle(folder, &["/nothing"])?;
        let begin = Instant::now();
        self.call(["run".as_ref(), "-b".as_ref(), bundle.as_os_str(), "bench-start".as_ref()])
            .output()?;
        Ok(begin.elapsed())
    }

    /// Checkpoint with the program running on; end it; restore; check.
    ///
    /// # Errors
    /// When a step fails.
    pub(crate) fn full(
        &self,
        folder: &Path,
        mebibytes: u64,
        store: &ObjectStore,
        number: usize,
        with_memory: bool,
    ) -> Result<Full> {
        let bundle = bundle(folder, &["/memory", &mebibytes.to_string(), "7", "/report"])?;
        let _ = std::fs::remove_file(bundle.join("rootfs/report"));
        // A name and an address of its own for each run: none may find the blobs of another.
        let id = format!("bench-full-{number}");
        let path = format!("bench/full-{mebibytes}-{number}");
        self.call(["run".as_ref(), "-d".as_ref(), "-b".as_ref(), bundle.as_os_str(), id.as_ref()])
            .output()?;
        let outcome = self.full_of(&id, &bundle, store, &path, with_memory);
        let _ = self.call(["delete", "--force", &id]).run();
        outcome
    }

    fn full_of(
        &self,
        id: &str,
        bundle: &Path,
        store: &ObjectStore,
        path: &str,
        with_memory: bool,
    ) -> Result<Full> {
        let url = store.url(path);
        let report = Report::wait(&bundle.join("rootfs/report"))?;
        report.wait_running()?;
        report.forget_gap()?;
        let sampler = with_memory.then(|| memory_of(&[]));
        let begin = Instant::now();
        self.call(["checkpoint", "--capsule", &url, "--leave-running", id]).output()?;
        let total = begin.elapsed();
        let peak = sampler.map(crate::Sampler::stop);
        report.wait_running()?;
        let pause_ms = report.gap_ms()?;
        let bytes = store.bytes_under(path)?;

        self.call(["delete", "--force", id]).output()?;
        until("end of the container", Duration::from_secs(60), || {
            Ok((!self.call(["state", id]).run()?.status.success()).then_some(()))
        })?;
        let sampler = with_memory.then(|| memory_of(&[]));
        let begin = Instant::now();
        let words = ["restore", "--capsule", &url, "-d", "-b"].map(OsStr::new);
        self.call(words.into_iter().chain([bundle.as_os_str(), id.as_ref()]))
            .output()
            .context("restoring")?;
        report.check(false)?;
        let restore = begin.elapsed();
        let peak = peak.max(sampler.map(crate::Sampler::stop));
        report.check(true)?;
        Ok(Full { total, bytes, restore, pause_ms, peak })
    }
}

/// A bundle with runc's own default specification, and these words as its command.
fn bundle(folder: &Path, command: &[&str]) -> Result<PathBuf> {
    let bundle = folder.join("bundle");
    let root = bundle.join("rootfs");
    std::fs::create_dir_all(&root)?;
    for program in ["memory", "nothing"] {
        if !root.join(program).exists() {
            std::fs::copy(folder.join(program), root.join(program))?;
        }
    }
    let path = bundle.join("config.json");
    let _ = std::fs::remove_file(&path);
    Call::new("runc").args(["spec".as_ref(), "-b".as_ref(), bundle.as_os_str()]).output()?;
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = command.into();
    spec["root"]["readonly"] = false.into();
    std::fs::write(&path, spec.to_string())?;
    Ok(bundle)
}
