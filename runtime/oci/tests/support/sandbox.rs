//! Tiny bundles for real containers, made of the host's static busybox, and their removal.

#![allow(dead_code, reason = "each test program uses a part")]

use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

pub(crate) const SAMARA: &str = env!("CARGO_BIN_EXE_samara-runtime");
/// The peer that behaviour is compared with.
pub(crate) const RUNC: &str = "runc";

const APPLETS: &[&str] = &[
    "sh", "cat", "ls", "id", "ps", "sleep", "mount", "env", "echo", "grep", "stat", "touch", "tty",
    "stty", "kill", "pwd", "sort", "true", "cut", "mkdir", "head",
];

/// A folder with a root file system, and every container that was made in it.
pub(crate) struct Sandbox {
    dir: tempfile::TempDir,
    containers: RefCell<Vec<(String, String)>>,
}

impl Sandbox {
    pub(crate) fn new() -> Self {
        assert!(rustix::process::geteuid().is_root(), "these tests make containers: run as root");
        let dir = tempfile::Builder::new().prefix("samara-test-").tempdir().unwrap();
        let root = dir.path().join("rootfs");
        for folder in ["bin", "proc", "sys", "dev", "tmp", "etc", "root"] {
            std::fs::create_dir_all(root.join(folder)).unwrap();
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find(|p| Path::new(p).exists());
        let busybox = busybox.expect("busybox-static is not installed");
        std::fs::copy(busybox, root.join("bin/busybox")).unwrap();
        for applet in APPLETS {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        std::fs::write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nu:x:5:5::/tmp:/bin/sh\n",
        )
        .unwrap();
        Self { dir, containers: RefCell::new(Vec::new()) }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        self.dir.path().join("rootfs")
    }

    /// Where `runtime` keeps its containers.
    pub(crate) fn state_root(&self, runtime: &str) -> PathBuf {
        self.dir.path().join(if runtime == RUNC { "runc-state" } else { "samara-state" })
    }

    /// Makes a bundle that runs `args`.
    pub(crate) fn bundle(&self, name: &str, spec: &Value) -> PathBuf {
        let bundle = self.dir.path().join(name);
        std::fs::create_dir_all(&bundle).unwrap();
        std::fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        bundle
    }

    /// `runtime` with the flags that point it here.
    pub(crate) fn command(&self, runtime: &str, args: &[&str]) -> Command {
        let mut command = Command::new(runtime);
        command.arg("--root").arg(self.state_root(runtime)).args(args).stdin(Stdio::null());
        command
    }

    pub(crate) fn call(&self, runtime: &str, args: &[&str]) -> Output {
        self.command(runtime, args).output().unwrap()
    }

    /// Calls `runtime` and expects it to succeed.
    #[track_caller]
    pub(crate) fn ok(&self, runtime: &str, args: &[&str]) -> String {
        let output = self.call(runtime, args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs `spec` to its end.
    pub(crate) fn run(&self, runtime: &str, spec: &Value) -> Output {
        let id = self.new_id(runtime);
        let bundle = self.bundle(&id, spec);
        self.call(runtime, &["run", "--bundle", bundle.to_str().unwrap(), &id])
    }

    /// Makes a container, detached from this process' output.
    #[track_caller]
    pub(crate) fn create(&self, runtime: &str, spec: &Value) -> String {
        let id = self.new_id(runtime);
        let bundle = self.bundle(&id, spec);
        let log = self.dir.path().join(format!("{id}.stderr"));
        let file = std::fs::File::create(&log).unwrap();
        let status = self
            .command(runtime, &["create", "--bundle", bundle.to_str().unwrap(), &id])
            .stdout(Stdio::null())
            .stderr(file)
            .status()
            .unwrap();
        assert!(status.success(), "{}", std::fs::read_to_string(&log).unwrap());
        id
    }

    #[track_caller]
    pub(crate) fn start(&self, runtime: &str, spec: &Value) -> String {
        let id = self.create(runtime, spec);
        self.ok(runtime, &["start", &id]);
        id
    }

    pub(crate) fn state(&self, runtime: &str, id: &str) -> Value {
        serde_json::from_str(&self.ok(runtime, &["state", id])).unwrap()
    }

    /// Polls until the container has this status.
    #[track_caller]
    pub(crate) fn wait_for_status(&self, runtime: &str, id: &str, status: &str) {
        poll(status, || self.state(runtime, id)["status"] == status);
    }

    /// A name that no other container of this process has, removed when the sandbox is dropped.
    pub(crate) fn new_id(&self, runtime: &str) -> String {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let id = format!("samara-test-{}-{number}", std::process::id());
        self.containers.borrow_mut().push((runtime.to_owned(), id.clone()));
        id
    }
}

impl Sandbox {
    /// Ends and removes all containers.
    pub(crate) fn remove_containers(&self) {
        for (runtime, id) in self.containers.take() {
            let _ = self.call(&runtime, &["delete", "--force", &id]);
        }
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        self.remove_containers();
    }
}

/// Waits until `done`, bounded: a container that is not there after 20 s never will be.
#[track_caller]
pub(crate) fn poll(what: &str, mut done: impl FnMut() -> bool) {
    for _ in 0..2000 {
        if done() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("not reached: {what}");
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// A specification like the one that `runc spec` writes, running `args`.
pub(crate) fn spec(sandbox: &Sandbox, args: &[&str]) -> Value {
    let caps = json!(["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]);
    json!({
        "ociVersion": "1.0.2",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": args,
            "env": ["PATH=/usr/bin:/bin", "B=2", "A=1"],
            "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "noNewPrivileges": true,
        },
        "root": {"path": sandbox.rootfs(), "readonly": false},
        "hostname": "box",
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]},
        ],
        "linux": {
            "resources": {"devices": [{"allow": false, "access": "rwm"}]},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "mount"},
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/sys"],
        },
    })
}
