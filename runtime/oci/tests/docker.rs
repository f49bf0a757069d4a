//! docker with `samara-runtime` as a container's runtime, beside runc: a dockerd of our own, with
//! its own data, sockets and bridge, that is stopped and removed at the end.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/sandbox.rs"]
mod sandbox;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use sandbox::{SAMARA, Sandbox, poll, text};

const BRIDGE: &str = "samaratest0";

/// dockerd and everything that it has made.
struct Docker {
    daemon: Child,
    socket: PathBuf,
    sandbox: Sandbox,
}

impl Docker {
    fn start() -> Self {
        let sandbox = Sandbox::new();
        let path = |name: &str| sandbox.path().join(name);
        let config = serde_json::json!({"runtimes": {"samara": {"path": SAMARA}}});
        std::fs::write(path("daemon.json"), config.to_string()).unwrap();
        let address = Docker::address_in(&sandbox);
        let node = format!("[store]\nallowed_prefixes = [\"{address}\"]\n");
        std::fs::write(path("node.toml"), node).unwrap();
        std::fs::set_permissions(path("node.toml"), std::fs::Permissions::from_mode(0o600))
            .unwrap();
        ip(&["link", "add", BRIDGE, "type", "bridge"]);
        ip(&["address", "add", "172.31.99.1/24", "dev", BRIDGE]);
        ip(&["link", "set", BRIDGE, "up"]);
        let log = std::fs::File::create(path("dockerd.log")).unwrap();
        let socket = path("docker.sock");
        let daemon = Command::new("dockerd")
            .arg("--config-file")
            .arg(path("daemon.json"))
            .arg("--data-root")
            .arg(path("data"))
            .arg("--exec-root")
            .arg(path("exec"))
            .arg("--pidfile")
            .arg(path("dockerd.pid"))
            .arg("--host")
            .arg(format!("unix://{}", socket.display()))
            .args(["--bridge", BRIDGE, "--iptables=false", "--ip-masq=false"])
            .env("SAMARA_CONFIG", path("node.toml"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("docker.io is not installed");
        let docker = Self { daemon, socket, sandbox };
        poll("dockerd answers", || docker.call(&["version"]).status.success());
        let tar = docker.sandbox.path().join("image.tar");
        let made = Command::new("tar")
            .arg("-C")
            .arg(docker.sandbox.rootfs())
            .arg("-cf")
            .arg(&tar)
            .arg(".")
            .status()
            .unwrap();
        assert!(made.success());
        docker.ok(&["import", tar.to_str().unwrap(), "box"]);
        docker
    }

    fn address_in(sandbox: &Sandbox) -> String {
        format!("file://{}", sandbox.path().join("address").display())
    }

    fn command(&self, args: &[&str]) -> Command {
        // Debian's client, of the daemon's own version, if another one comes first in PATH.
        let client = ["/usr/bin/docker"].into_iter().find(|path| Path::new(path).exists());
        let mut command = Command::new(client.unwrap_or("docker"));
        command
            .arg("--host")
            .arg(format!("unix://{}", self.socket.display()))
            .args(args)
            .stdin(Stdio::null());
        command
    }

    fn call(&self, args: &[&str]) -> Output {
        self.command(args).output().unwrap()
    }

    #[track_caller]
    fn ok(&self, args: &[&str]) -> String {
        let output = self.call(args);
        assert!(output.status.success(), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs the same container under both runtimes: same output, same status.
    #[track_caller]
    fn same(&self, flags: &[&str], command: &[&str]) -> (String, i32) {
        let seen = ["samara", "runc"].map(|runtime| {
            let args = [&["run", "--rm", "--runtime", runtime], flags, &["box"], command].concat();
            let output = self.call(&args);
            (text(&output.stdout), output.status.code().unwrap(), text(&output.stderr))
        });
        let [(ours, our_status, our_errors), (theirs, their_status, their_errors)] = seen;
        assert_eq!(ours, theirs, "{flags:?} {command:?}: {our_errors}\nrunc: {their_errors}");
        assert_eq!(our_status, their_status, "{flags:?} {command:?}: {our_errors}");
        (ours, our_status)
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        let containers = text(&self.call(&["ps", "-aq"]).stdout);
        for id in containers.split_whitespace() {
            let _ = self.call(&["rm", "-f", id]);
        }
        if let Some(pid) =
            i32::try_from(self.daemon.id()).ok().and_then(rustix::process::Pid::from_raw)
        {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.daemon.wait();
        // dockerd leaves this mount behind, and the folder could not be removed with it.
        let namespace = self.sandbox.path().join("exec/netns/default");
        let _ = rustix::mount::unmount(namespace, rustix::mount::UnmountFlags::DETACH);
        ip(&["link", "delete", BRIDGE]);
    }
}

fn ip(args: &[&str]) {
    // The bridge of an earlier run that was killed may still be there, or gone already.
    let _ = Command::new("ip").args(args).stderr(Stdio::null()).status();
}

/// One test, since it has one daemon; each line is a promise of the command line.
#[test]
fn docker_does_with_us_what_it_does_with_runc() {
    let docker = Docker::start();
    let (hi, _) = docker.same(&[], &["echo", "hi"]);
    assert_eq!(hi, "hi\n");
    for (command, status) in [
        (&["sh", "-c", "exit 7"][..], 7),
        (&["nosuch"], 127),
        (&["/no/such"], 127),
        (&["/etc"], 126),
    ] {
        assert_eq!(docker.same(&[], command).1, status, "{command:?}");
    }
    let confinement = &["grep", "-E", "Uid|Groups|Cap|Seccomp|NoNew", "/proc/self/status"][..];
    let (all, _) = docker.same(&[], confinement);
    assert!(all.contains("Seccomp:\t2"), "{all}");
    docker.same(&["--user", "5:6"], confinement);
    docker.same(&["--cap-drop", "ALL", "--cap-add", "CHOWN"], confinement);
    docker.same(&["--security-opt", "no-new-privileges"], confinement);
    docker.same(&["--security-opt", "seccomp=unconfined"], confinement);
    docker.same(&["--user", "5"], &["sh", "-c", "id; echo x > /dev/stdout; echo $HOME"]);
    let limits = "cat /sys/fs/cgroup/memory/memory.limit_in_bytes \
                  /sys/fs/cgroup/cpu/cpu.cfs_quota_us /sys/fs/cgroup/pids/pids.max";
    let (all, _) = docker
        .same(&["--memory", "64m", "--cpus", "0.5", "--pids-limit", "50"], &["sh", "-c", limits]);
    assert_eq!(all, "67108864\n50000\n50\n");
    let files = "touch /x 2>/dev/null; echo $?; touch /tmp/x; echo $?; ls -ld /tmp | cut -c1-10; \
                 cat /v/mark; touch /v/x 2>/dev/null; echo $?; \
                 grep ' /v ' /proc/self/mountinfo | cut -d' ' -f7";
    let volume = docker.sandbox.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("mark"), "mark\n").unwrap();
    let volume = format!("{}:/v:ro", volume.display());
    docker.same(&["--read-only", "--tmpfs", "/tmp", "-v", &volume], &["sh", "-c", files]);
    docker.same(&["--init"], &["sh", "-c", "cat /proc/1/comm"]);
    docker.same(&["-t"], &["sh", "-c", "tty; ls -l /dev/console | cut -c1-10"]);
    for network in ["none", "host", "bridge"] {
        let (all, _) =
            docker.same(&["--network", network], &["sh", "-c", "ls /sys/class/net | sort"]);
        assert!(all.contains("lo"), "{network}: {all}");
    }
    docker.same(&["--ulimit", "nofile=100:200"], &["sh", "-c", "ulimit -n"]);
    docker.same(&["--pid", "host"], &["sh", "-c", "test $$ -gt 2 && echo host"]);

    standard_input(&docker);
    a_life(&docker);
    restarts_and_health(&docker);
    an_address(&docker);
}

fn standard_input(docker: &Docker) {
    use std::io::Write;
    let mut child = docker
        .command(&["run", "--rm", "-i", "--runtime", "samara", "box", "cat"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(b"through\n").unwrap();
    // With the pipe at its end `docker run` ends, and nobody of ours holds it open.
    assert_eq!(text(&child.wait_with_output().unwrap().stdout), "through\n");
}

fn a_life(docker: &Docker) {
    let script = "trap 'echo term; exit 3' TERM; echo up; while :; do sleep 0.1; done";
    docker.ok(&["run", "-d", "--name", "life", "--runtime", "samara", "box", "sh", "-c", script]);
    let inspect = |field: &str| docker.ok(&["inspect", "-f", field, "life"]);
    poll("the container speaks", || docker.ok(&["logs", "life"]) == "up\n");
    let seen = docker.call(&[
        "exec",
        "-u",
        "5",
        "-e",
        "A=b",
        "-w",
        "/tmp",
        "life",
        "sh",
        "-c",
        "id -u; echo $A; pwd; grep Seccomp: /proc/self/status; exit 9",
    ]);
    assert_eq!(text(&seen.stdout), "5\nb\n/tmp\nSeccomp:\t2\n");
    assert_eq!(seen.status.code(), Some(9));
    assert!(docker.ok(&["exec", "-t", "life", "tty"]).starts_with("/dev/pts/"));
    assert_eq!(docker.call(&["exec", "life", "nosuch"]).status.code(), Some(126));
    docker.ok(&["pause", "life"]);
    assert_eq!(inspect("{{.State.Status}}"), "paused\n");
    docker.ok(&["unpause", "life"]);
    assert!(docker.ok(&["stats", "--no-stream", "--format", "{{.PIDs}}", "life"]).trim() != "0");
    assert!(docker.ok(&["top", "life"]).contains("trap"));
    docker.ok(&[
        "update",
        "--memory",
        "100m",
        "--memory-swap",
        "200m",
        "--cpu-shares",
        "512",
        "life",
    ]);
    let limits = docker.ok(&[
        "exec",
        "life",
        "cat",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes",
        "/sys/fs/cgroup/cpu/cpu.shares",
    ]);
    assert_eq!(limits, "104857600\n512\n");
    docker.ok(&["stop", "life"]);
    assert_eq!(inspect("{{.State.Status}} {{.State.ExitCode}}"), "exited 3\n");
    assert_eq!(docker.ok(&["logs", "life"]), "up\nterm\n");
    docker.ok(&["start", "life"]);
    docker.ok(&["kill", "life"]);
    assert_eq!(inspect("{{.State.Status}} {{.State.ExitCode}}"), "exited 137\n");
    docker.ok(&["rm", "life"]);
}

fn restarts_and_health(docker: &Docker) {
    docker.ok(&[
        "run",
        "-d",
        "--name",
        "again",
        "--restart",
        "on-failure:2",
        "--runtime",
        "samara",
        "box",
        "sh",
        "-c",
        "exit 4",
    ]);
    poll("two restarts", || {
        let seen = docker.ok(&["inspect", "-f", "{{.State.Status}} {{.RestartCount}}", "again"]);
        seen == "exited 2\n"
    });
    docker.ok(&[
        "run",
        "-d",
        "--name",
        "well",
        "--health-cmd",
        "true",
        "--health-interval",
        "1s",
        "--runtime",
        "samara",
        "box",
        "sleep",
        "1000",
    ]);
    poll("the health check", || {
        docker.ok(&["inspect", "-f", "{{.State.Health.Status}}", "well"]) == "healthy\n"
    });
    docker.ok(&["rm", "-f", "well"]);
}

/// When `docker run` returns, the address knows how the job ended: a retry right after it must not go on from an old capsule.
fn an_address(docker: &Docker) {
    let address = Docker::address_in(&docker.sandbox);
    let variable = format!("SAMARA_CAPSULE={address}");
    let generation = || {
        let location = samara_store::Location::parse(&address).unwrap();
        let config = samara_store::config::StoreConfig::default();
        let store = samara_store::Store::open(&location, &config, false).unwrap();
        store.head().unwrap().state.generation
    };
    let run = |command: &str| {
        let args = ["run", "--rm", "--runtime", "samara", "-e", &variable, "box", "sh", "-c"];
        docker.call(&[&args[..], &[command]].concat()).status.code().unwrap()
    };
    assert_eq!((run("exit 3"), generation()), (3, 0));
    for runs in 1..=3 {
        assert_eq!((run("true"), generation()), (0, runs));
    }
    let script = "trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done";
    let args =
        ["run", "-d", "--name", "asked", "--runtime", "samara", "-e", &variable, "box", "sh"];
    docker.ok(&[&args[..], &["-c", script]].concat());
    poll("the container speaks", || docker.ok(&["logs", "asked"]) == "up\n");
    no_zombies(docker.ok(&["inspect", "-f", "{{.Id}}", "asked"]).trim());
    docker.ok(&["stop", "asked"]);
    docker.ok(&["rm", "asked"]);
    assert_eq!(generation(), 3, "it was stopped, and has not finished");
}

/// A monitor is the child of a call that ends, so docker's shim inherits it; dead ones must not stay with that.
fn no_zombies(container: &str) {
    let monitors = || -> Vec<i32> {
        let processes = procfs::process::all_processes().unwrap().flatten();
        let ours = processes.filter(|process| {
            process.cmdline().is_ok_and(|line| {
                line.first().is_some_and(|program| program.ends_with("samara-monitor"))
                    && line.get(1).is_some_and(|folder| folder.ends_with(container))
            })
        });
        ours.map(|process| process.pid).collect()
    };
    poll("monitor and standby", || monitors().len() == 2);
    let before = monitors();
    for pid in &before {
        let pid = rustix::process::Pid::from_raw(*pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    }
    // A zombie has no command line, but a folder in /proc.
    poll("nothing is left of them", || {
        before.iter().all(|pid| !Path::new(&format!("/proc/{pid}")).exists())
    });
}
