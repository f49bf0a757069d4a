//! Tests that call the library where it forks: in a process with one thread, started from a folder
//! in which our programs lie side by side. So this file has a `main` of its own.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/worker.rs"]
mod worker;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use samara_oci::command_line::Global;
use samara_oci::container_id::ContainerId;
use samara_oci::create::{ClockOffset, CreateRequest, Created, Init, TimeOffsets, create};
use samara_oci::lifecycle;
use samara_oci::monitor::Client;
use samara_oci::process::ProcessIdentity;
use samara_oci::protocol::Failure;
use samara_oci::report::Log;
use samara_oci::state_dir::{StateDir, Status};
use samara_store::Kept;
use sandbox::{SAMARA, Sandbox, poll, spec};
use serde_json::json;

const TESTS: &[(&str, fn())] = &[
    ("a_blank_init_waits_in_the_containers_place", a_blank_init_waits_in_the_containers_place),
    ("a_failed_create_leaves_nothing", a_failed_create_leaves_nothing),
    ("captures_report_and_end", captures_report_and_end),
    ("one_capture_at_a_time", one_capture_at_a_time),
    ("a_worker_hears_that_its_caller_is_gone", a_worker_hears_that_its_caller_is_gone),
    ("a_killed_monitor_is_replaced", a_killed_monitor_is_replaced),
    ("a_capture_outlives_the_container", a_capture_outlives_the_container),
    ("nonsense_is_answered", nonsense_is_answered),
];

const TESTER: &str = "tester";

/// The monitor runs the program of this name beside it as the worker.
const WORKER: &str = "samara-runtime";

fn main() {
    let program = std::env::current_exe().unwrap();
    match program.file_name().unwrap().to_str() {
        Some(TESTER) => return run_tests(),
        Some(WORKER) => return worker::run(),
        _ => {}
    }
    let folder = tempfile::Builder::new().prefix("samara-programs-").tempdir().unwrap();
    let place = |from: &Path, name: &str| {
        std::fs::copy(from, folder.path().join(name)).unwrap();
    };
    let built = Path::new(SAMARA).parent().unwrap();
    place(&program, TESTER);
    place(&built.join("samara-monitor"), "samara-monitor");
    place(&program, WORKER);
    let status =
        Command::new(folder.path().join(TESTER)).args(std::env::args().skip(1)).status().unwrap();
    drop(folder);
    std::process::exit(status.code().unwrap_or(1));
}

/// As libtest tells it, so that whoever counts tests counts these.
#[expect(clippy::print_stdout, reason = "this is the test runner's report")]
fn run_tests() {
    let wanted: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let is_wanted = |name: &str| wanted.is_empty() || wanted.iter().any(|w| name.contains(w));
    let tests: Vec<_> = TESTS.iter().filter(|(name, _)| is_wanted(name)).collect();
    println!("\nrunning {} tests", tests.len());
    let mut failed = 0;
    for (name, test) in &tests {
        let outcome = std::panic::catch_unwind(test);
        println!("test {name} ... {}", if outcome.is_ok() { "ok" } else { "FAILED" });
        failed += usize::from(outcome.is_err());
    }
    let passed = tests.len() - failed;
    let word = if failed == 0 { "ok" } else { "FAILED" };
    println!(
        "\ntest result: {word}. {passed} passed; {failed} failed; 0 ignored; 0 measured; 0 filtered out\n"
    );
    std::process::exit(i32::from(failed > 0));
}

/// A container made by a call of the library, removed when dropped.
struct Made {
    created: Created,
    _child: Reaper,
}

/// The init is this process' child.
struct Reaper(i32);

impl Drop for Made {
    fn drop(&mut self) {
        let log = Log::new(&Global::default());
        let _ = lifecycle::kill(&self.created.dir, "KILL", false);
        let _ = rustix::process::waitpid(
            rustix::process::Pid::from_raw(self._child.0),
            rustix::process::WaitOptions::empty(),
        );
        let _ = lifecycle::delete(&self.created.dir, true, &log);
    }
}

fn make(sandbox: &Sandbox, spec: &serde_json::Value, init: Init) -> Made {
    let id = sandbox.new_id(SAMARA);
    let bundle = sandbox.bundle(&id, spec);
    let mut created = create(&CreateRequest {
        root: &sandbox.state_root(SAMARA),
        id: ContainerId::parse(&id).unwrap(),
        bundle: &bundle,
        console_socket: None,
        pid_file: None,
        no_pivot: false,
        no_new_keyring: false,
        preserve_fds: 0,
        systemd_cgroup: false,
        init,
        capsule: None,
        detached: false,
        log: &Log::new(&Global::default()),
        debug: false,
    })
    .unwrap();
    // This process stays, so it goes back to its own cgroups.
    created.elsewhere = None;
    let pid = created.record.init.pid;
    Made { created, _child: Reaper(pid) }
}

/// What a restore begins with: a process in all of the container's places, with nothing taken away,
/// under the container's clocks, and an `exec` that sees the same clocks.
fn a_blank_init_waits_in_the_containers_place() {
    let sandbox = Sandbox::new();
    let mut confined = spec(&sandbox, &["/no/such/program"]);
    let path = format!("/samara-test-blank-{}", std::process::id());
    confined["linux"]["cgroupsPath"] = json!(path);
    confined["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "cgroup"}));
    confined["process"]["user"] = json!({"uid": 5, "gid": 6});
    confined["linux"]["seccomp"] = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["chmod"], "action": "SCMP_ACT_ERRNO"}]});
    confined["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 10, "hard": 10}]);
    let offsets = TimeOffsets {
        monotonic: ClockOffset { seconds: 86_400, nanoseconds: 5 },
        boottime: ClockOffset { seconds: 172_800, nanoseconds: 0 },
    };
    let made = make(&sandbox, &confined, Init::Blank { offsets });
    let Made { created, .. } = &made;
    lifecycle::start(&created.dir, Kept::default()).unwrap();
    wait_ready(created.ready.as_ref().unwrap());
    assert_eq!(created.dir.load().unwrap().status(), Status::Running);
    assert_eq!(created.record.seccomp_filters, 0);

    let pid = created.record.init.pid;
    let proc = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    let status = proc("status");
    let field = |name: &str| {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().skip(1).collect::<Vec<_>>().join(" ")
    };
    assert_eq!(field("NSpid"), format!("{pid} 1"));
    assert_eq!(field("Uid"), "0 0 0 0");
    assert_eq!(field("Seccomp_filters"), "0");
    assert_eq!(field("NoNewPrivs"), "0");
    let own = std::fs::read_to_string("/proc/self/status").unwrap();
    let own = own.lines().find(|line| line.starts_with("CapEff")).unwrap();
    assert!(own.ends_with(&field("CapEff")), "every capability that the host has");
    for namespace in ["pid", "net", "ipc", "uts", "mnt", "cgroup", "time"] {
        let of =
            |process: &str| std::fs::read_link(format!("/proc/{process}/ns/{namespace}")).unwrap();
        assert_ne!(of(&pid.to_string()), of("self"), "{namespace}");
    }
    let clocks: Vec<Vec<String>> = proc("timens_offsets")
        .lines()
        .map(|line| line.split_whitespace().map(str::to_owned).collect())
        .collect();
    assert_eq!(clocks, [["monotonic", "86400", "5"], ["boottime", "172800", "0"]]);
    let devices = format!("/sys/fs/cgroup/devices{path}/cgroup.procs");
    assert!(std::fs::read_to_string(devices).unwrap().contains(&pid.to_string()));
    let root = std::fs::metadata(format!("/proc/{pid}/root/bin/busybox")).unwrap();
    assert!(root.is_file());
    let mut fds: Vec<String> = std::fs::read_dir(format!("/proc/{pid}/fd"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    fds.sort();
    assert_eq!(fds, ["0", "1", "2"], "the given ones and no other");
    let identity = rustix::fs::stat(format!("/proc/{pid}/fd/1")).unwrap();
    let recorded = created.record.stdio[1].unwrap();
    assert_eq!((identity.st_dev, identity.st_ino), (recorded.device, recorded.inode));

    // An exec is confined as the engine asked, and sees the container's clocks.
    let id = created.dir.id().to_string();
    let clock = |command: &mut Command| {
        let output = command.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        text
    };
    let inside = clock(&mut sandbox.command(
        SAMARA,
        &[
            "exec",
            "-u",
            "5:6",
            &id,
            "sh",
            "-c",
            "cat /proc/uptime; id -u; cat /proc/self/timens_offsets; \
          grep Seccomp_filters /proc/self/status",
        ],
    ));
    let mut lines = inside.lines();
    let seconds = |text: &str| text.split('.').next().unwrap().parse::<u64>().unwrap();
    let host = std::fs::read_to_string("/proc/uptime").unwrap();
    assert!(seconds(lines.next().unwrap()) >= seconds(&host) + 172_000);
    assert_eq!(lines.next(), Some("5"));
    assert!(inside.contains("172800"), "{inside}");
    assert!(inside.ends_with("Seccomp_filters:\t1\n"), "{inside}");
    drop(made);
    assert!(!Path::new(&format!("/sys/fs/cgroup/devices{path}")).exists());
}

fn wait_ready(pipe: &OwnedFd) {
    let mut byte = [0];
    assert_eq!(rustix::io::read(pipe, &mut byte).unwrap(), 1, "the init ended before it was ready");
}

fn a_failed_create_leaves_nothing() {
    let sandbox = Sandbox::new();
    let path = format!("/samara-test-failed-{}", std::process::id());
    let mut bad = spec(&sandbox, &["true"]);
    bad["linux"]["cgroupsPath"] = json!(path);
    bad["mounts"].as_array_mut().unwrap().push(
        json!({"destination": "/x", "type": "bind", "source": "/no/such/source", "options": ["bind"]}),
    );
    let id = sandbox.new_id(SAMARA);
    let bundle = sandbox.bundle(&id, &bad);
    let root = sandbox.state_root(SAMARA);
    let error = create(&CreateRequest {
        root: &root,
        id: ContainerId::parse(&id).unwrap(),
        bundle: &bundle,
        console_socket: None,
        pid_file: None,
        no_pivot: false,
        no_new_keyring: false,
        preserve_fds: 0,
        systemd_cgroup: false,
        init: Init::Program,
        capsule: None,
        detached: false,
        log: &Log::new(&Global::default()),
        debug: false,
    })
    .unwrap_err();
    assert!(error.to_string().contains("/no/such/source"), "{error}");
    assert!(!root.join(&id).exists());
    for hierarchy in ["devices", "memory", "systemd", "unified"] {
        let folder = PathBuf::from(format!("/sys/fs/cgroup/{hierarchy}{path}"));
        assert!(!folder.exists(), "{}", folder.display());
    }
}

/// A running container whose monitor has the test worker.
fn watched(sandbox: &Sandbox) -> Made {
    let made = make(sandbox, &spec(sandbox, &["sleep", "1000"]), Init::Program);
    lifecycle::start(&made.created.dir, Kept::default()).unwrap();
    made
}

fn captures_report_and_end() {
    let sandbox = Sandbox::new();
    let made = watched(&sandbox);
    let dir = &made.created.dir;
    let status = Client::connect(dir).unwrap().status().unwrap();
    assert_eq!(status.init, Some(made.created.record.init));
    assert!(!status.capturing);

    let mut steps = Vec::new();
    let result = Client::connect(dir)
        .unwrap()
        .checkpoint(json!({"do": "succeed"}), |progress| steps.push(progress["step"].clone()))
        .unwrap();
    assert_eq!(steps, [json!(1), json!(2), json!(3)]);
    assert_eq!(result["pid"], made.created.record.init.pid);
    assert_eq!(result["dir"], dir.path().to_str().unwrap());

    let error = capture(dir, "fail").unwrap_err().to_string();
    assert_eq!(error, "the store is full");
    let error = capture(dir, "die").unwrap_err().to_string();
    assert!(error.contains("SIGKILL (signal 9)"), "{error}");
    let error = capture(dir, "vanish").unwrap_err().to_string();
    assert!(error.contains("status 5"), "{error}");
    assert!(capture(dir, "succeed").is_ok(), "after failures the next one works");
}

fn capture(
    dir: &StateDir,
    what: &str,
) -> Result<serde_json::Value, samara_oci::monitor::MonitorError> {
    Client::connect(dir).unwrap().checkpoint(json!({ "do": what }), |_| {})
}

/// A capture that waits, in a process of its own, so that its caller can be killed.
struct Waiting {
    child: Child,
    mark: PathBuf,
}

impl Waiting {
    fn start(sandbox: &Sandbox, dir: &StateDir) -> Self {
        use samara_oci::protocol::{Message, Request, send, versioned};
        let mark = sandbox.path().join("mark");
        let request =
            Request::Checkpoint { args: json!({"do": "wait", "mark": mark.to_str().unwrap()}) };
        let mut message = Vec::new();
        send(&mut message, &versioned(Message::Request(request))).unwrap();
        let file = sandbox.path().join("request");
        std::fs::write(&file, message).unwrap();
        // A caller in another language: the protocol is all that it needs.
        let script = "import socket, sys, os\n\
                      os.chdir(sys.argv[1])\n\
                      s = socket.socket(socket.AF_UNIX); s.connect('monitor.sock')\n\
                      s.sendall(open(sys.argv[2], 'rb').read()); s.recv(1 << 16); s.recv(1 << 16)\n";
        let child = Command::new("python3")
            .args(["-c", script])
            .arg(dir.path())
            .arg(&file)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        poll("the capture is under way", || {
            Client::connect(dir).unwrap().status().unwrap().capturing
        });
        Self { child, mark }
    }

    fn hang_up(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn one_capture_at_a_time() {
    let sandbox = Sandbox::new();
    let made = watched(&sandbox);
    let dir = &made.created.dir;
    let mut waiting = Waiting::start(&sandbox, dir);
    let error = capture(dir, "succeed").unwrap_err();
    assert!(error.is_busy(), "{error}");
    assert_eq!(error.to_string(), Failure::Busy.to_string());
    waiting.hang_up();
    poll("the monitor is free again", || {
        !Client::connect(dir).unwrap().status().unwrap().capturing
    });
    assert!(capture(dir, "succeed").is_ok());
}

fn a_worker_hears_that_its_caller_is_gone() {
    let sandbox = Sandbox::new();
    let made = watched(&sandbox);
    let mut waiting = Waiting::start(&sandbox, &made.created.dir);
    assert!(!waiting.mark.exists());
    waiting.hang_up();
    poll("the worker gives up", || waiting.mark.exists());
}

fn a_killed_monitor_is_replaced() {
    let sandbox = Sandbox::new();
    let made = watched(&sandbox);
    let dir = &made.created.dir;
    let first = Client::connect(dir).unwrap().status().unwrap().pid;
    let pid = rustix::process::Pid::from_raw(i32::try_from(first).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::empty()).unwrap();
    assert!(made.created.record.init.is_alive());
    let status = Client::connect(dir).unwrap().status().unwrap();
    assert_ne!(status.pid, first);
    assert_eq!(status.init, Some(made.created.record.init));
    assert!(capture(dir, "succeed").is_ok());
    // An agent that stays must not collect zombies.
    let pid = rustix::process::Pid::from_raw(i32::try_from(status.pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    poll("it is waited for", || !Path::new(&format!("/proc/{}", status.pid)).exists());
}

/// A container that moves is killed before its capsule is complete.
fn a_capture_outlives_the_container() {
    let sandbox = Sandbox::new();
    let made = watched(&sandbox);
    let dir = &made.created.dir;
    let monitor = Client::connect(dir).unwrap().status().unwrap().pid;
    let monitor = ProcessIdentity::of(i32::try_from(monitor).unwrap()).unwrap();
    let mut waiting = Waiting::start(&sandbox, dir);
    lifecycle::kill(dir, "KILL", false).unwrap();
    poll("the container has ended", || dir.load().unwrap().status() == Status::Stopped);
    assert!(monitor.is_alive());
    waiting.hang_up();
    poll("the monitor ends", || !monitor.is_alive());
    assert!(waiting.mark.exists());
}

fn nonsense_is_answered() {
    use std::io::Write;
    let sandbox = Sandbox::new();
    let made = watched(&sandbox);
    let dir = &made.created.dir;
    for nonsense in
        [&b"\0\0\0\x05hello"[..], b"\xff\xff\xff\xff", b"\0\0\0\x14{\"version\":7,\"x\":[]}"]
    {
        let folder = std::fs::File::open(dir.path()).unwrap();
        use std::os::fd::AsRawFd;
        let path = format!("/proc/self/fd/{}/monitor.sock", folder.as_raw_fd());
        let mut stream = std::os::unix::net::UnixStream::connect(path).unwrap();
        // A monitor that stays silent must fail the test, not hold it.
        stream.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
        stream.write_all(nonsense).unwrap();
        let answer: serde_json::Value = samara_oci::protocol::receive(&mut stream).unwrap();
        assert_eq!(answer["answer"]["error"]["code"], "bad-request", "{answer}");
    }
    assert!(Client::connect(dir).unwrap().status().is_ok());
}
