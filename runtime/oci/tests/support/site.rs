//! A sandbox with a node configuration and one capsule address: what containers there do, and what they leave behind.

#![allow(dead_code, reason = "each test program uses a part")]

use std::cell::OnceCell;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use samara_capsule::digest::Digest;
use samara_capsule::log::LogState;
use samara_store::config::StoreConfig;
use samara_store::{CapsuleReader, Location, Store};
use serde_json::{Value, json};

use crate::sandbox::{SAMARA, Sandbox, poll, spec, text};

/// Counts in a file for ever, without other processes.
pub(crate) const BUSY_COUNTER: &str =
    "n=0; while :; do n=$((n + 1)); echo $n > /tmp/new; echo $n > /tmp/count; done";

/// Counts in a file, for ever.
pub(crate) const COUNTER: &str = "n=0; while :; do n=$((n + 1)); echo $n > /tmp/new; \
                       busybox mv /tmp/new /tmp/count; busybox usleep 20000; done";

pub(crate) struct Site {
    pub(crate) sandbox: Sandbox,
    address: String,
    /// Where the blobs of the address lie.
    folder: PathBuf,
    disk: OnceCell<Disk>,
}

impl Drop for Site {
    fn drop(&mut self) {
        // They may have their state there.
        self.sandbox.remove_containers();
        self.disk.take();
    }
}

impl Site {
    /// A site whose address is a folder of the sandbox.
    pub(crate) fn new() -> Site {
        Site::with_address_in("address")
    }

    pub(crate) fn with_address_in(name: &str) -> Site {
        let sandbox = Sandbox::new();
        let folder = sandbox.path().join(name);
        let address = format!("file://{}", folder.display());
        let site = Site { address, folder, sandbox, disk: OnceCell::new() };
        let prefix = site.path("").display().to_string();
        site.configure(&format!("[store]\nallowed_prefixes = [\"file://{prefix}\"]\n"));
        site
    }

    /// A site whose address is in a store that `configuration` reaches, and that keeps it in `folder` of the sandbox.
    pub(crate) fn with_store(
        address: &str,
        folder: &str,
        configuration: impl FnOnce(&Path) -> String,
    ) -> Site {
        let sandbox = Sandbox::new();
        let folder = sandbox.path().join(folder);
        let disk = OnceCell::new();
        let site = Site { address: address.to_owned(), folder, sandbox, disk };
        site.configure(&configuration(&site.path("")));
        site
    }

    /// Mounts a small file system in the sandbox, the only one.
    pub(crate) fn mount(&self, name: &str, mib: u32) -> &Disk {
        self.disk.get_or_init(|| Disk::mount(&self.path(name), mib))
    }

    /// Replaces the node's configuration. As a node of its own, it waits for no captures of other tests.
    pub(crate) fn configure(&self, text: &str) {
        let path = self.path("node.toml");
        let mut text = text.to_owned();
        if !text.contains("[capture]") {
            let folder = self.path("turns").display().to_string();
            text.push_str(&format!("\n[capture]\nfolder = \"{folder}\"\n"));
        }
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        match name {
            "" => self.sandbox.path().to_owned(),
            name => self.sandbox.path().join(name),
        }
    }

    pub(crate) fn address(&self) -> String {
        self.address.clone()
    }

    /// The address as the folder that it is, or that its store keeps: whatever becomes of the way there.
    pub(crate) fn store(&self) -> Store {
        let location = Location::folder(&self.folder).unwrap();
        Store::open(&location, &StoreConfig::default(), false).unwrap()
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(crate) fn state(&self) -> LogState {
        self.store().head().unwrap().state
    }

    /// Digest of the newest capsule, which is whole.
    #[track_caller]
    pub(crate) fn newest(&self) -> Option<Digest> {
        if !self.folder.exists() {
            return None;
        }
        let store = self.store();
        let latest = store.head().unwrap().state.latest?;
        assert_whole(&store, latest.digest);
        Some(latest.digest)
    }

    /// A specification with the address in its environment, running a script.
    pub(crate) fn spec(&self, script: &str) -> Value {
        let mut spec = spec(&self.sandbox, &["sh", "-c", script]);
        let address = format!("SAMARA_CAPSULE={}", self.address);
        spec["process"]["env"].as_array_mut().unwrap().push(json!(address));
        spec
    }

    pub(crate) fn command(&self, args: &[&str]) -> Command {
        let mut command = self.sandbox.command(SAMARA, args);
        // Files, since a container that is detached keeps them.
        let log = std::fs::File::create(self.path("stderr")).unwrap();
        command
            .current_dir(self.path(""))
            .env("SAMARA_CONFIG", "node.toml")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        command
    }

    /// What the last call said.
    pub(crate) fn stderr(&self) -> String {
        text(&std::fs::read(self.path("stderr")).unwrap())
    }

    /// Calls the runtime, which must end: no store and no disk may make it hang.
    #[track_caller]
    pub(crate) fn call(&self, args: &[&str]) -> Output {
        const SECONDS_MAX: u64 = 60;
        let mut child = self.command(args).spawn().unwrap();
        let deadline = Instant::now() + Duration::from_secs(SECONDS_MAX);
        let status = loop {
            if let Some(status) = child.try_wait().unwrap() {
                break status;
            }
            if Instant::now() > deadline {
                child.kill().unwrap();
                panic!("{args:?} did not end within {SECONDS_MAX} s: {}", self.stderr());
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let stderr = std::fs::read(self.path("stderr")).unwrap();
        Output { status, stdout: Vec::new(), stderr }
    }

    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) {
        let output = self.call(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
    }

    /// Calls `run`, detached.
    pub(crate) fn run(&self, spec: &Value) -> (String, Output) {
        let id = self.sandbox.new_id(SAMARA);
        let bundle = self.sandbox.bundle(&id, spec);
        let output = self.call(&["run", "-d", "-b", bundle.to_str().unwrap(), &id]);
        (id, output)
    }

    #[track_caller]
    pub(crate) fn start(&self, spec: &Value) -> String {
        let (id, output) = self.run(spec);
        assert!(output.status.success(), "{}", text(&output.stderr));
        id
    }

    #[track_caller]
    pub(crate) fn wait_until_stopped(&self, id: &str) {
        self.sandbox.wait_for_status(SAMARA, id, "stopped");
    }

    pub(crate) fn init(&self, id: &str) -> Pid {
        let state = self.sandbox.state(SAMARA, id);
        Pid::from_raw(i32::try_from(state["pid"].as_i64().unwrap()).unwrap()).unwrap()
    }

    /// How far a program that counts in `/tmp/count` is.
    pub(crate) fn count(&self) -> u64 {
        // Empty for the moment between opening and writing.
        let text = std::fs::read_to_string(self.sandbox.rootfs().join("tmp/count"));
        text.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0)
    }

    #[track_caller]
    pub(crate) fn counts_on(&self, what: &str) {
        let before = (0..100).map(|_| self.count()).max().unwrap();
        poll(what, || self.count() > before);
    }

    /// The container is as if nothing had happened: it counts, and nobody holds it.
    #[track_caller]
    pub(crate) fn runs_undisturbed(&self, id: &str, at: &str) {
        let state = self.sandbox.state(SAMARA, id);
        assert_eq!(state["status"], "running", "{at}");
        self.counts_on(at);
        let pid = state["pid"].as_i64().unwrap();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("TracerPid:\t0"), "{at}: it is still traced");
    }

    /// Our processes that know this sandbox: their pid, name, and state.
    pub(crate) fn ours(&self) -> Vec<(i32, String, char)> {
        let folder = self.path("").display().to_string();
        processes()
            .filter_map(|pid| {
                let words = std::fs::read(format!("/proc/{pid}/cmdline")).ok()?;
                let ours = text(&words).contains(&folder) || {
                    let environment = std::fs::read(format!("/proc/{pid}/environ")).ok()?;
                    text(&environment).contains(&folder)
                };
                let parent = parent(pid)?;
                let child_of_ours = std::fs::read(format!("/proc/{parent}/cmdline"))
                    .is_ok_and(|words| text(&words).contains(&folder));
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
                let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
                let state = rest.trim_start().chars().next()?;
                ((ours || child_of_ours) && name.starts_with("samara")).then(|| {
                    let role = text(&words).replace('\0', " ");
                    (pid, format!("{name} {role}"), state)
                })
            })
            .collect()
    }

    /// Waits until one of our processes stands at an edge between phases.
    #[track_caller]
    pub(crate) fn wait_at(&self, edge: &str, caller: &mut Child) -> i32 {
        for _ in 0..2000 {
            if let Some((pid, _, _)) = self.ours().into_iter().find(|(_, _, state)| *state == 'T') {
                return pid;
            }
            if let Some(status) = caller.try_wait().unwrap() {
                panic!("{edge} was never reached: {status}, {}", self.stderr());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        panic!("{edge} was not reached in time");
    }

    /// Nothing is there of a container that was deleted or never came to be: no process of ours or in its namespaces, no mount, no
    /// cgroup, no file.
    #[track_caller]
    pub(crate) fn nothing_is_left_of(&self, id: &str, at: &str) {
        let mut left = self.left_of(id);
        // A monitor learns of the end in its own time.
        for _ in 0..1000 {
            if left.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
            left = self.left_of(id);
        }
        panic!("{at}: {left:?} is left");
    }

    fn left_of(&self, id: &str) -> Vec<String> {
        let mut left: Vec<String> =
            self.ours().into_iter().map(|(pid, name, _)| format!("{pid} {name}")).collect();
        left.extend(self.inside().into_iter().map(|pid| format!("process {pid} in a container")));
        let state_root = self.sandbox.state_root(SAMARA);
        let state_root = state_root.canonicalize().unwrap_or(state_root);
        let rootfs = self.sandbox.rootfs();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        let below = |point: &&str| {
            let point = Path::new(point);
            point.starts_with(&rootfs) || point.starts_with(&state_root) && point != state_root
        };
        left.extend(points.filter(below).map(|point| format!("the mount {point}")));
        let groups = Command::new("find")
            .args(["/sys/fs/cgroup", "-maxdepth", "4", "-name", id])
            .output()
            .unwrap();
        left.extend(text(&groups.stdout).lines().map(|group| format!("the cgroup {group}")));
        // Where notes of ends wait to be told; what is in there is left behind.
        let notes = state_root.join("@ends");
        let files = entries(&state_root).into_iter().filter(|path| *path != notes);
        left.extend(files.chain(entries(&notes)).map(|path| path.display().to_string()));
        left
    }

    /// Processes in mount namespaces of containers of this sandbox.
    fn inside(&self) -> Vec<i32> {
        let own = std::fs::read_link("/proc/self/ns/mnt").unwrap();
        let rootfs = self.sandbox.rootfs().display().to_string();
        processes()
            .filter(|pid| {
                let namespace = std::fs::read_link(format!("/proc/{pid}/ns/mnt"));
                namespace.is_ok_and(|namespace| namespace != own)
                    && std::fs::read_to_string(format!("/proc/{pid}/mountinfo"))
                        .is_ok_and(|mounts| mounts.contains(&rootfs))
            })
            .collect()
    }
}

/// Capsules, blob by blob.
impl Site {
    /// Saves a container that counts, ends it, and answers its specification.
    pub(crate) fn save_counter(&self) -> Value {
        let spec = self.spec(COUNTER);
        let id = self.start(&spec);
        poll("it counts", || self.count() > 0);
        self.ok(&["checkpoint", "--capsule", &self.address(), &id]);
        self.ok(&["delete", &id]);
        spec
    }

    /// Stores `content` as a blob, and answers its descriptor's new fields.
    pub(crate) fn blob(&self, content: &[u8]) -> (String, usize) {
        let digest = Digest::of(content);
        std::fs::write(self.folder.join("blobs/sha256").join(digest.hex()), content).unwrap();
        (digest.to_string(), content.len())
    }

    pub(crate) fn read_blob(&self, digest: &Value) -> Value {
        let hex = digest.as_str().unwrap().strip_prefix("sha256:").unwrap();
        let path = self.folder.join("blobs/sha256").join(hex);
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    /// Puts a capsule with another config in the place of the newest one.
    pub(crate) fn forge(&self, change: impl FnOnce(&mut Value)) {
        let latest = self.state().latest.unwrap();
        let slot = self.folder.join("log").join(format!("{:020}.json", latest.slot));
        let mut event: Value = serde_json::from_slice(&std::fs::read(&slot).unwrap()).unwrap();
        let mut manifest = self.read_blob(&json!(latest.digest.to_string()));
        let mut config = self.read_blob(&manifest["config"]["digest"]);
        change(&mut config);
        let (digest, bytes) = self.blob(config.to_string().as_bytes());
        manifest["config"]["digest"] = json!(digest);
        manifest["config"]["size"] = json!(bytes);
        let (digest, bytes) = self.blob(manifest.to_string().as_bytes());
        for place in ["/event/capsule/manifest", "/state/latest"] {
            let capsule = event.pointer_mut(place).unwrap();
            capsule["digest"] = json!(digest);
            capsule["bytes"] = json!(bytes);
        }
        std::fs::write(&slot, event.to_string()).unwrap();
        // Later slots repeat the state.
        for later in latest.slot + 1.. {
            let path = self.folder.join("log").join(format!("{later:020}.json"));
            if std::fs::remove_file(path).is_err() {
                break;
            }
        }
    }

    /// A start is refused with status 176 and these words, and nothing was made or changed.
    #[track_caller]
    pub(crate) fn refused(&self, spec: &Value, words: &str) {
        let mark = self.sandbox.rootfs().join("tmp/mark");
        std::fs::write(&mark, "").unwrap();
        let before = self.state();
        let (id, output) = self.run(spec);
        let said = text(&output.stderr);
        assert_eq!(output.status.code(), Some(176), "{said}");
        assert!(said.lines().count() == 1 && said.contains(words), "{words}: {said}");
        assert!(!self.sandbox.state_root(SAMARA).join(&id).exists());
        assert!(monitors(&id).is_empty());
        assert!(mark.exists(), "the root was changed");
        assert_eq!(self.state(), before, "whoever runs there would be ended");
    }
}

/// Monitors of the container, with their arguments.
pub(crate) fn monitors(id: &str) -> Vec<(Pid, Vec<String>)> {
    let processes = procfs::process::all_processes().unwrap().flatten();
    let lines = processes.filter_map(|process| {
        let line = process.cmdline().ok()?;
        let pid = Pid::from_raw(process.pid)?;
        let ours = line.first()?.ends_with("samara-monitor") && line.get(1)?.ends_with(id);
        ours.then_some((pid, line))
    });
    lines.collect()
}

/// All blobs of the capsule are there, and are what they were.
#[track_caller]
pub(crate) fn assert_whole(store: &Store, capsule: Digest) {
    let report = CapsuleReader::open_digest(store, capsule).unwrap().verify(&|_, _| ());
    assert!(report.faults.is_empty(), "{:?}", report.faults);
}

fn processes() -> impl Iterator<Item = i32> {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn entries(folder: &Path) -> Vec<PathBuf> {
    match std::fs::read_dir(folder) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(_) => Vec::new(),
    }
}

pub(crate) fn parent(pid: i32) -> Option<i32> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("PPid:"))?.trim().parse().ok()
}

pub(crate) fn signal(pid: i32, signal: Signal) {
    // Gone already is as good.
    let _ = kill_process(Pid::from_raw(pid).unwrap(), signal);
}

/// A small file system of its own, with as much room left as a test wants. Unmounted when dropped.
pub(crate) struct Disk {
    point: PathBuf,
}

impl Disk {
    /// Mounts one at `point`, which is made.
    pub(crate) fn mount(point: &Path, mib: u32) -> Disk {
        std::fs::create_dir(point).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={mib}m,mode=700"), "samara-test"])
            .arg(point)
            .status();
        assert!(mounted.unwrap().success());
        Disk { point: point.to_owned() }
    }

    fn ballast(&self) -> PathBuf {
        self.point.join("ballast")
    }

    /// Fills it up to this.
    pub(crate) fn leave(&self, kib: u64) {
        self.clear();
        let mut ballast = std::fs::File::create(self.ballast()).unwrap();
        let room = rustix::fs::statvfs(&self.point).unwrap();
        let bytes = (room.f_bavail * room.f_frsize).saturating_sub(kib << 10);
        ballast.write_all(&vec![0; usize::try_from(bytes).unwrap()]).unwrap();
    }

    /// Makes room again.
    pub(crate) fn clear(&self) {
        let _ = std::fs::remove_file(self.ballast());
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.point).status();
    }
}
