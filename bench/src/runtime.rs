//! An OCI runtime on a bundle by hand: runc, or the product.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result};
use samara_tests::object_store::ObjectStore;
use samara_tests::process::Call;
use samara_tests::{product, until};

use crate::program::{REPORT, Report};
use crate::subject::{Engine, Root, Running, Subject, plain_root};

/// Where capsules go.
#[derive(Debug)]
pub(crate) enum Place<'a> {
    Server(&'a ObjectStore),
    /// A folder of a disk.
    Folder(PathBuf),
}

impl Place<'_> {
    fn url(&self, path: &str) -> String {
        match self {
            Place::Server(store) => store.url(path),
            Place::Folder(folder) => format!("file://{}/{path}", folder.display()),
        }
    }

    fn node_config(&self) -> String {
        match self {
            Place::Server(store) => store.node_config(),
            Place::Folder(_) => format!("[store]\nallowed_prefixes = [\"{}\"]\n", self.url("")),
        }
    }
}

/// A runtime's program, its state folder and, for ours, its configuration and store.
#[derive(Debug)]
pub(crate) struct Runtime<'a> {
    program: PathBuf,
    folder: PathBuf,
    state: PathBuf,
    config: PathBuf,
    place: Option<Place<'a>>,
}

impl<'a> Runtime<'a> {
    pub(crate) fn runc(folder: &Path) -> Runtime<'a> {
        Runtime {
            program: PathBuf::from("runc"),
            folder: folder.to_path_buf(),
            state: folder.join("runc-state"),
            config: PathBuf::new(),
            place: None,
        }
    }

    /// # Errors
    /// When it was not built.
    pub(crate) fn ours(folder: &Path, place: Place<'a>) -> Result<Runtime<'a>> {
        let config = folder.join("config.toml");
        let turns = format!("\n[capture]\nfolder = \"{}\"\n", folder.join("captures").display());
        std::fs::write(&config, place.node_config() + &turns)?;
        std::fs::set_permissions(&config, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
        Ok(Runtime {
            program: product::binaries()?.join("samara-runtime"),
            folder: folder.to_path_buf(),
            state: folder.join("samara-state"),
            config,
            place: Some(place),
        })
    }

    /// Removes the containers of a run that was killed and had this folder, as far as it can: their processes do not name it.
    pub(crate) fn remove_all(folder: &Path) {
        let Ok(binaries) = product::binaries() else { return };
        let left = Runtime {
            program: binaries.join("samara-runtime"),
            folder: folder.to_path_buf(),
            state: folder.join("samara-state"),
            config: folder.join("config.toml"),
            place: None,
        };
        for entry in std::fs::read_dir(&left.state).into_iter().flatten().flatten() {
            let id = entry.file_name();
            let _ = left.call(["delete".as_ref(), "--force".as_ref(), id.as_os_str()]).run();
        }
    }

    /// The folder that is named in the command line of all that it leaves running.
    pub(crate) fn state(&self) -> &Path {
        &self.state
    }

    fn call<A: AsRef<OsStr>>(&self, words: impl IntoIterator<Item = A>) -> Call {
        Call::new(&self.program)
            .args([OsStr::new("--root"), self.state.as_os_str()])
            .args(words)
            .env("SAMARA_CONFIG", &self.config)
            .within(Duration::from_secs(600))
    }

    /// How long a container that does nothing takes from call to end.
    ///
    /// # Errors
    /// When it cannot be run.
    pub(crate) fn run_nothing(&self) -> Result<Duration> {
        let bundle = self.folder.join("bundle");
        let root = bundle.join("rootfs");
        std::fs::create_dir_all(&root)?;
        if !root.join("nothing").exists() {
            std::fs::copy(plain_root(&self.folder).join("nothing"), root.join("nothing"))?;
        }
        specify(&bundle, &root, &["/nothing".to_owned()])?;
        let begin = Instant::now();
        self.call(["run".as_ref(), "-b".as_ref(), bundle.as_os_str(), "bench-start".as_ref()])
            .output()?;
        Ok(begin.elapsed())
    }
}

impl Engine for Runtime<'_> {
    fn name(&self) -> &'static str {
        "samara-runtime"
    }

    fn has_increments(&self) -> bool {
        true
    }

    fn start<'a>(&'a self, subject: &Subject, round: &str) -> Result<Box<dyn Running + 'a>> {
        Ok(Box::new(self.start_one(subject, round)?))
    }
}

impl Runtime<'_> {
    /// As [`Engine::start`].
    ///
    /// # Errors
    /// As there.
    pub(crate) fn start_one(&self, subject: &Subject, round: &str) -> Result<Container<'_>> {
        let id = format!("bench-{round}");
        let root = Root::mount(self.folder.join("ours"), &subject.root, &[])?;
        specify(root.folder(), &root.merged(), &subject.command)?;
        let mut container = Container {
            runtime: self,
            place: self.place.as_ref().context("runc saves nothing here")?,
            path: format!("bench/{round}"),
            id,
            report: None,
            root,
        };
        container.begin(&["run"])?;
        Ok(container)
    }
}

/// A container of ours.
#[derive(Debug)]
pub(crate) struct Container<'a> {
    runtime: &'a Runtime<'a>,
    place: &'a Place<'a>,
    /// Of its capsules, in the store.
    path: String,
    id: String,
    /// `None` before it has begun.
    report: Option<Report>,
    root: Root,
}

/// A capture, as its capsule tells.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Captured {
    /// Of the address's log.
    pub(crate) slot: u64,
    /// Of pages and files that the capture passed on, before they were compressed.
    pub(crate) raw_bytes: u64,
    /// Without the time for which it waited for others.
    pub(crate) took: Duration,
}

impl Container<'_> {
    /// Saves it, and again at this interval.
    ///
    /// # Errors
    /// When it cannot be saved.
    pub(crate) fn save_every(&self, interval: &str) -> Result<()> {
        let url = self.place.url(&self.path);
        let words = ["checkpoint", "--capsule", &url, "--leave-running", "--every", interval];
        self.runtime.call(words.into_iter().chain([self.id.as_str()])).output()?;
        Ok(())
    }

    /// Its captures, the oldest first.
    ///
    /// # Errors
    /// When the store does not tell.
    pub(crate) fn captured(&self) -> Result<Vec<Captured>> {
        let said = Call::new(product::binaries()?.join("samara"))
            .args(["--json", "capsule", "history", &self.place.url(&self.path)])
            .env("SAMARA_CONFIG", &self.runtime.config)
            .output()?;
        let rows: Vec<serde_json::Value> = serde_json::from_str(&said)?;
        let captured = rows.iter().map(|row| {
            let phases = row["report"]["phases"].as_array().context("a capsule without report")?;
            let sum = |name: &str| phases.iter().filter_map(|phase| phase[name].as_u64()).sum();
            Ok(Captured {
                slot: row["slot"].as_u64().context("a capsule without slot")?,
                raw_bytes: sum("raw_bytes"),
                took: Duration::from_micros(sum("duration_us")),
            })
        });
        captured.collect()
    }

    /// The slots of its address's log and when each was written. `folder` is where capsules go.
    ///
    /// # Errors
    /// When they cannot be listed.
    pub(crate) fn slots(&self, folder: &Path) -> Result<Vec<(u64, SystemTime)>> {
        let mut slots = Vec::new();
        for entry in std::fs::read_dir(folder.join(&self.path).join("log"))? {
            let entry = entry?;
            let name = entry.file_name();
            let number = name.to_str().and_then(|name| name.strip_suffix(".json")?.parse().ok());
            slots.extend(number.zip(entry.metadata()?.modified().ok()));
        }
        Ok(slots)
    }

    /// Calls `run` or `restore`, and waits for the report.
    fn begin(&mut self, verb: &[&str]) -> Result<()> {
        let pid_file = self.root.folder().join("pid");
        let words = verb.iter().map(OsStr::new);
        let rest = ["-d".as_ref(), "--pid-file".as_ref(), pid_file.as_os_str(), "-b".as_ref()];
        self.runtime
            .call(words.chain(rest).chain([self.root.folder().as_os_str(), self.id.as_ref()]))
            .output()?;
        let pid = std::fs::read_to_string(&pid_file)?;
        let path = format!("/proc/{}/root{REPORT}", pid.trim());
        self.report = Some(Report::wait(PathBuf::from(path), pid.trim())?);
        Ok(())
    }
}

impl Running for Container<'_> {
    fn report(&self) -> &Report {
        self.report.as_ref().expect("`start` hands out containers that have begun")
    }

    fn save(&self) -> Result<()> {
        let url = self.place.url(&self.path);
        self.runtime
            .call(["checkpoint", "--capsule", &url, "--leave-running", &self.id])
            .output()?;
        Ok(())
    }

    fn make_durable(&self) -> Result<()> {
        Ok(())
    }

    fn bytes(&self) -> Result<u64> {
        match self.place {
            Place::Server(store) => store.bytes_under(&self.path),
            Place::Folder(folder) => bytes_in(&folder.join(&self.path)),
        }
    }

    fn end(&mut self) -> Result<()> {
        self.runtime.call(["delete", "--force", &self.id]).output()?;
        until("end of the container", Duration::from_secs(60), || {
            Ok((!self.runtime.call(["state", &self.id]).run()?.status.success()).then_some(()))
        })
    }

    fn restore(&mut self) -> Result<()> {
        let url = self.place.url(&self.path);
        self.begin(&["restore", "--capsule", &url])
    }
}

impl Drop for Container<'_> {
    fn drop(&mut self) {
        let _ = self.runtime.call(["delete", "--force", &self.id]).run();
    }
}

/// Bytes of all files below a folder.
pub(crate) fn bytes_in(folder: &Path) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(folder)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        sum += if metadata.is_dir() { bytes_in(&entry.path())? } else { metadata.len() };
    }
    Ok(sum)
}

/// runc's own default specification, with this root and command, and a tmpfs for the report.
fn specify(bundle: &Path, root: &Path, command: &[String]) -> Result<()> {
    let path = bundle.join("config.json");
    let _ = std::fs::remove_file(&path);
    Call::new("runc").args(["spec".as_ref(), "-b".as_ref(), bundle.as_os_str()]).output()?;
    let mut spec: serde_json::Value = serde_json::from_slice(&std::fs::read(&path)?)?;
    spec["process"]["terminal"] = false.into();
    spec["process"]["args"] = command.into();
    spec["root"]["readonly"] = false.into();
    spec["root"]["path"] = root.to_string_lossy().into();
    // Where it is saved at intervals, all of its capsules are looked at afterwards.
    spec["annotations"] = serde_json::json!({"dev.samara.retention": "last=1000"});
    if root.join("control").exists() {
        let control =
            serde_json::json!({"destination": "/control", "type": "tmpfs", "source": "control"});
        spec["mounts"].as_array_mut().context("a specification without mounts")?.push(control);
    }
    Ok(std::fs::write(&path, spec.to_string())?)
}
