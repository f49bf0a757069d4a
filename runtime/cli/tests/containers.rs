//! `samara ps` and `samara save` on a real container, made by hand with samara-runtime. Needs root, and busybox-static.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking, and tells what it measured")]

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};

const SAMARA: &str = env!("CARGO_BIN_EXE_samara");

/// It stands beside the tool, as the monitor and the runtime do on a node.
fn runtime() -> PathBuf {
    let path = Path::new(SAMARA).with_file_name("samara-runtime");
    assert!(path.is_file(), "no {}: cargo build -p samara-oci", path.display());
    path
}

/// A bundle that counts once a moment in a file of its root, and the containers that were made of it.
struct Sandbox {
    dir: tempfile::TempDir,
    ids: Vec<String>,
}

impl Sandbox {
    fn new(ids: &[&str]) -> Sandbox {
        let dir = tempfile::Builder::new().prefix("samara-cli-test-").tempdir().unwrap();
        let root = dir.path().join("rootfs");
        for folder in ["bin", "proc", "dev", "tmp"] {
            std::fs::create_dir_all(root.join(folder)).unwrap();
        }
        let busybox = ["/bin/busybox", "/usr/bin/busybox"].iter().find(|p| Path::new(p).exists());
        std::fs::copy(busybox.expect("busybox-static is not installed"), root.join("bin/busybox"))
            .unwrap();
        let program = "n=0; while true; do n=$((n + 1)); echo $n > /tmp/new; \
                       /bin/busybox mv /tmp/new /tmp/count; /bin/busybox usleep 20000; done";
        let spec = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0}, "cwd": "/", "env": ["PATH=/bin"],
                "args": ["/bin/busybox", "sh", "-c", program],
            },
            "root": {"path": root, "readonly": false},
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
            ],
            "linux": {"namespaces":
                [{"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}]},
        });
        std::fs::write(dir.path().join("config.json"), spec.to_string()).unwrap();
        // A node's configuration: nothing of this machine's counts.
        let node = dir.path().join("node.toml");
        std::fs::write(&node, "").unwrap();
        std::fs::set_permissions(&node, std::fs::Permissions::from_mode(0o600)).unwrap();
        Sandbox { dir, ids: ids.iter().map(|id| (*id).to_owned()).collect() }
    }

    fn at(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn runtime(&self, args: &[&str]) -> Output {
        // Files, not pipes: a container that is detached keeps them.
        let log = std::fs::File::create(self.at("runtime.log")).unwrap();
        let status = Command::new(runtime())
            .args(["--root", &self.at("state")])
            .args(args)
            .env("SAMARA_CONFIG", self.at("node.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .status()
            .unwrap();
        Output {
            status,
            stdout: Vec::new(),
            stderr: std::fs::read(self.at("runtime.log")).unwrap(),
        }
    }

    #[track_caller]
    fn runtime_ok(&self, args: &[&str]) {
        let output = self.runtime(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn samara(&self, args: &[&str]) -> Output {
        Command::new(SAMARA).args(args).args(["--config", &self.at("node.toml")]).output().unwrap()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.samara(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn refused(&self, args: &[&str], naming: &str) {
        let output = self.samara(args);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
        assert!(text.lines().count() == 1 && text.contains(naming), "{args:?}: {text}");
    }

    fn row(&self, id: &str) -> Option<Value> {
        let rows: Value = serde_json::from_str(&self.ok(&["ps", "--json"])).unwrap();
        rows.as_array().unwrap().iter().find(|row| row["id"] == id).cloned()
    }

    fn count(&self) -> u64 {
        let text = std::fs::read_to_string(self.at("rootfs/tmp/count")).unwrap_or_default();
        text.trim().parse().unwrap_or(0)
    }

    #[track_caller]
    fn wait_count_above(&self, count: u64) {
        // Bounded: a program that has not counted on after 20 s never will.
        for _ in 0..2000 {
            if self.count() > count {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        panic!("the container does not count above {count}");
    }
}

impl Drop for Sandbox {
    fn drop(&mut self) {
        for id in &self.ids {
            let _ = self.runtime(&["delete", "--force", id]);
        }
    }
}

/// Users save by a name and get the work back, or a line that says what to do.
#[test]
fn a_container_is_found_saved_and_brought_back() {
    let first = format!("samara-cli-{}-first", std::process::id());
    let second = format!("samara-cli-{}-second", std::process::id());
    let sandbox = Sandbox::new(&[&first, &second]);
    let bundle = sandbox.dir.path().display().to_string();
    let url = format!("file://{}", sandbox.at("capsules/job"));
    sandbox.runtime_ok(&["run", "-d", "-b", &bundle, &first]);
    sandbox.wait_count_above(0);

    let row = sandbox.row(&first).expect("ps shows a container that runs");
    assert_eq!((&row["name"], &row["status"]), (&json!(first), &json!("running")), "{row}");
    assert!(row["processes"].as_u64().unwrap() >= 1 && row["pid"].as_i64().unwrap() > 1, "{row}");
    assert!(sandbox.ok(&["ps"]).contains(&first));

    let prefix = first.strip_suffix("irst").unwrap();
    sandbox.refused(&["save", prefix], "--to URL");
    sandbox.refused(&["save", "samara-cli-no-such", "--to", &url], "samara-cli-no-such");
    sandbox.refused(&["save", &first, "--to", "nowhere://x"], "nowhere");

    // It runs on, and what is saved again is newer.
    let line = sandbox.ok(&["save", prefix, "--to", &url]);
    assert!(line.starts_with(&format!("saved to {url}: paused ")), "{line}");
    sandbox.wait_count_above(sandbox.count());
    let saved: Value =
        serde_json::from_str(&sandbox.ok(&["save", &first, "--to", &url, "--stop", "--json"]))
            .unwrap();
    assert_eq!((&saved["stopped"], &saved["target"]), (&json!(true), &json!(url)), "{saved}");
    let list = sandbox.ok(&["capsule", "ls", &format!("file://{}", sandbox.at("capsules"))]);
    assert!(list.lines().any(|line| line.starts_with(&format!("{url}  capsule"))), "{list}");
    // The monitor ends with the container: only a look at its root finds it.
    let status = sandbox.ok(&["ps", "--json", "--root", &sandbox.at("state")]);
    assert!(status.contains("\"stopped\""), "{status}");
    sandbox.refused(&["save", &first, "--root", &sandbox.at("state"), "--to", &url], "stopped");

    let count = sandbox.count();
    sandbox.runtime_ok(&["delete", "--force", &first]);
    sandbox.runtime_ok(&["restore", "--capsule", &url, "-b", &bundle, "-d", &second]);
    sandbox.wait_count_above(count);

    // It has an address now.
    assert_eq!(sandbox.row(&second).unwrap()["capsule"], json!(url));
    let line = sandbox.ok(&["save", &second]);
    assert!(line.starts_with(&format!("saved to {url}: ")), "{line}");
}
