//! The peer: CRIU 4.2 of Debian sid, its images packed by `tar | zstd -T2` and PUT to the same store; back by GET, unpacking
//! and `criu restore`. It dumps the bare program, without a runtime around it: its best case. It has no increments where the
//! kernel does not track soft-dirty pages (CONFIG_MEM_SOFT_DIRTY), so that each dump is a full one.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use samara_tests::node::MARK;
use samara_tests::object_store::ObjectStore;
use samara_tests::process::{Call, end};
use samara_tests::until;

use crate::program::{REPORT, Report};
use crate::runtime::bytes_in;
use crate::subject::{Engine, Root, Running, Subject, call_in};

/// Where CRIU cannot restore with the usual limit: it asks for a table of `fs.nr_open` descriptors.
const NR_OPEN: &str = "/proc/sys/fs/nr_open";
const NR_OPEN_FOR_RESTORE: &str = "20000";

/// What runs for the peer, by name.
pub(crate) const PROGRAMS: &[&str] = &["criu", "zstd", "tar", "curl"];

/// The name of the packed images in the store.
const OBJECT: &str = "peer/images";

/// The limit as CRIU wants it; as it was when dropped.
#[derive(Debug)]
struct NrOpen {
    before: String,
}

impl NrOpen {
    fn lower() -> Result<NrOpen> {
        let before = std::fs::read_to_string(NR_OPEN)?;
        std::fs::write(NR_OPEN, NR_OPEN_FOR_RESTORE).context("lowering fs.nr_open for CRIU")?;
        Ok(NrOpen { before })
    }
}

impl Drop for NrOpen {
    fn drop(&mut self) {
        let _ = std::fs::write(NR_OPEN, self.before.trim());
    }
}

/// A mount namespace with the peers' root, held by a process.
#[derive(Debug)]
struct Namespace {
    holder: Child,
}

impl Namespace {
    /// `folder` marks what runs in it, so that another run finds it when this one was killed.
    fn start(folder: &Path) -> Result<Namespace> {
        let repository = samara_tests::repository();
        Call::new(repository.join("script/peer-root"))
            .within(Duration::from_secs(1800))
            .output()?;
        let holder = Command::new(repository.join("script/peer-run"))
            .args(["sleep", "infinity"])
            .env(MARK, folder)
            .stdin(Stdio::null())
            .spawn()?;
        let namespace = Namespace { holder };
        // Until it is there, /proc below it would be another.
        until("peers' root", Duration::from_secs(30), || {
            let there = namespace.call(&["test", "-d", "/mnt/host"]).run()?;
            Ok(there.status.success().then_some(()))
        })?;
        Ok(namespace)
    }

    /// What leads a command there.
    fn enter(&self) -> Vec<String> {
        ["nsenter", "--mount", "--target", &self.holder.id().to_string(), "--"]
            .map(str::to_owned)
            .to_vec()
    }

    fn call(&self, words: &[&str]) -> Call {
        call_in(&self.enter(), words)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        end(&mut self.holder, Duration::from_secs(5));
    }
}

/// CRIU in its namespace.
#[derive(Debug)]
pub(crate) struct Peer<'a> {
    namespace: Namespace,
    store: &'a ObjectStore,
    folder: PathBuf,
    images: PathBuf,
}

impl<'a> Peer<'a> {
    /// Images go to a folder below `images`, which decides what they cost: on a disk it waits for them once the kernel has
    /// too many pages to write back, in a tmpfs it never waits.
    ///
    /// # Errors
    /// When the peers' root cannot be made.
    pub(crate) fn start(folder: &Path, images: &Path, store: &'a ObjectStore) -> Result<Peer<'a>> {
        Ok(Peer {
            namespace: Namespace::start(folder)?,
            store,
            folder: folder.to_path_buf(),
            images: images.join("peer-images"),
        })
    }

    /// CRIU's version.
    pub(crate) fn version(&self) -> Result<String> {
        let said = self.namespace.call(&["criu", "--version"]).output()?;
        Ok(said.lines().next().unwrap_or_default().replace("Version: ", ""))
    }
}

impl Engine for Peer<'_> {
    fn name(&self) -> &'static str {
        "CRIU"
    }

    fn has_increments(&self) -> bool {
        false
    }

    fn start<'a>(&'a self, subject: &Subject, _round: &str) -> Result<Box<dyn Running + 'a>> {
        let root = Root::mount(self.folder.join("peer"), &subject.root, &self.namespace.enter())?;
        let merged = root.merged().to_string_lossy().into_owned();
        let pid_file = root.folder().join("pid").to_string_lossy().into_owned();
        // Without what it would inherit from whoever called us: a file of another mount namespace cannot be dumped.
        let start = "merged=$1 pid=$2; shift 2
            mount -t tmpfs control \"$merged/control\"; mount -t proc proc \"$merged/proc\"; mount --bind /dev \"$merged/dev\"
            for fd in /proc/self/fd/*; do n=${fd##*/}; ((n > 2)) && eval \"exec $n>&-\"; done
            setsid env -i PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin chroot \"$merged\" \"$@\" </dev/null >/dev/null 2>&1 &
            echo $! >\"$pid\"";
        let words = ["bash", "-c", start, "start", &merged, &pid_file].into_iter();
        let words: Vec<&str> = words.chain(subject.command.iter().map(String::as_str)).collect();
        root.call(&words).output()?;
        let pid = Pid::from_raw(std::fs::read_to_string(&pid_file)?.trim().parse()?);
        let path = format!("/proc/{}/root{merged}{REPORT}", self.namespace.holder.id());
        let mut bare = Bare { peer: self, pid, report: None, packed: None.into(), root };
        bare.report = Some(Report::wait(PathBuf::from(path), &pid.to_string())?);
        Ok(Box::new(bare))
    }
}

/// A program without a container.
#[derive(Debug)]
struct Bare<'a> {
    peer: &'a Peer<'a>,
    pid: Pid,
    /// `None` before it has begun.
    report: Option<Report>,
    /// How many bytes were put to the store, where they were.
    packed: std::cell::Cell<Option<u64>>,
    root: Root,
}

impl Bare<'_> {
    /// What is in the folder of images, made empty.
    fn fresh_images(&self) -> Result<String> {
        let images = &self.peer.images;
        let _ = std::fs::remove_dir_all(images);
        std::fs::create_dir_all(images)?;
        Ok(images.to_string_lossy().into_owned())
    }

    fn criu(&self, verb: &str, words: &[&str]) -> Result<()> {
        let images = self.peer.images.to_string_lossy().into_owned();
        let log = format!("{verb}.log");
        let all = [&["criu", verb, "-D", &images, "-o", &log], words].concat();
        let said = self.root.call(&all).output();
        said.with_context(|| errors(&self.peer.images.join(&log)))?;
        Ok(())
    }

    fn packed_file(&self) -> PathBuf {
        self.root.folder().join("packed.tar.zst")
    }

    /// The changed files, which CRIU itself does not save: those in /data, for programs that have any there.
    fn files(&self) -> PathBuf {
        self.peer.images.join("files.tar")
    }

    fn has_files(&self) -> bool {
        self.root.upper().join("data").exists()
    }
}

impl Running for Bare<'_> {
    fn report(&self) -> &Report {
        self.report.as_ref().expect("`start` hands out programs that have begun")
    }

    /// Files are packed as those who use runc and CRIU do it: the upper directory, while nobody can change it.
    fn save(&self) -> Result<()> {
        self.fresh_images()?;
        self.packed.set(None);
        let pid = self.pid.to_string();
        let mut words = vec!["-t", &pid, "--leave-running"];
        let hook = self.root.folder().join("while-stopped");
        let hook_text = hook.to_string_lossy().into_owned();
        if self.has_files() {
            let text = format!(
                "#!/bin/sh\n[ \"$CRTOOLS_SCRIPT_ACTION\" != post-dump ] || exec tar -C '{}' -cf '{}' .\n",
                self.root.upper().display(),
                self.files().display()
            );
            std::fs::write(&hook, text)?;
            std::fs::set_permissions(&hook, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
            words.extend(["--action-script", &hook_text]);
        }
        self.criu("dump", &words)
    }

    fn make_durable(&self) -> Result<()> {
        let packed = self.packed_file();
        let pack = "tar -C \"$1\" -cf - . | zstd -q -f -T2 -o \"$2\"";
        self.root.script(pack, &[&self.peer.images, &packed])?;
        self.peer.store.put(&packed, OBJECT)?;
        self.packed.set(Some(std::fs::metadata(&packed)?.len()));
        Ok(std::fs::remove_file(&packed)?)
    }

    fn bytes(&self) -> Result<u64> {
        if let Some(packed) = self.packed.get() {
            return Ok(packed);
        }
        // Its log is for people.
        let log = std::fs::metadata(self.peer.images.join("dump.log"))?.len();
        Ok(bytes_in(&self.peer.images)? - log)
    }

    fn end(&mut self) -> Result<()> {
        kill(self.pid, Signal::SIGKILL)?;
        gone(self.pid)
    }

    fn restore(&mut self) -> Result<()> {
        if self.packed.get().is_some() {
            self.fresh_images()?;
            let packed = self.packed_file();
            self.peer.store.get(OBJECT, &packed)?;
            let unpack = "zstd -q -d -c \"$2\" | tar -C \"$1\" -xf -";
            self.root.script(unpack, &[&self.peer.images, &packed])?;
            std::fs::remove_file(&packed)?;
        }
        if self.files().exists() {
            let unpack = "rm -rf \"$2/data\"; tar -C \"$2\" -xf \"$1\"";
            self.root.script(unpack, &[&self.files(), &self.root.merged()])?;
        }
        let _limit = NrOpen::lower()?;
        self.criu("restore", &["-d"])
    }
}

impl Drop for Bare<'_> {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = gone(self.pid);
        let _ = std::fs::remove_dir_all(&self.peer.images);
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
