//! Real containers, by hand on a bundle. Wherever runc's behaviour is ours to match, the same
//! container runs under both and what it sees must be equal.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "support/sandbox.rs"]
mod sandbox;

use std::os::fd::AsRawFd;

use sandbox::{RUNC, SAMARA, Sandbox, poll, spec, text};
use serde_json::{Value, json};

/// Runs the same container under both runtimes: same output, same status.
#[track_caller]
fn same(sandbox: &Sandbox, spec: &Value) -> (String, i32) {
    let seen = [SAMARA, RUNC].map(|runtime| {
        let output = sandbox.run(runtime, spec);
        (text(&output.stdout), output.status.code().unwrap(), text(&output.stderr))
    });
    let [(ours, our_status, our_errors), (theirs, their_status, their_errors)] = seen;
    assert_eq!(ours, theirs, "ours: {our_errors}\nrunc: {their_errors}");
    assert_eq!(our_status, their_status, "ours: {our_errors}\nrunc: {their_errors}");
    (ours, our_status)
}

const STATUS: &str = "grep -E '^(Uid|Gid|Groups|Cap|Seccomp|NoNewPrivs|SigBlk)' /proc/self/status";

#[test]
fn programs_see_the_same_confinement() {
    let sandbox = Sandbox::new();
    let filter = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["chmod"], "action": "SCMP_ACT_ERRNO"}],
    });
    let (all, _) = same(&sandbox, &spec(&sandbox, &["sh", "-c", STATUS]));
    assert!(all.contains("NoNewPrivs:\t1"), "{all}");

    let mut user = spec(&sandbox, &["sh", "-c", STATUS]);
    user["process"]["user"] = json!({"uid": 5, "gid": 6, "additionalGids": [7, 8]});
    user["process"]["noNewPrivileges"] = json!(false);
    user["linux"]["seccomp"] = filter.clone();
    let (all, _) = same(&sandbox, &user);
    assert!(all.contains("Seccomp_filters:\t1") && all.contains("Groups:\t7 8"), "{all}");

    let mut capable = spec(&sandbox, &["sh", "-c", STATUS]);
    let caps = json!(["CAP_KILL"]);
    for set in ["bounding", "effective", "permitted", "inheritable", "ambient"] {
        capable["process"]["capabilities"][set] = caps.clone();
    }
    capable["process"]["user"] = json!({"uid": 5, "gid": 5});
    capable["linux"]["seccomp"] = filter;
    let (all, _) = same(&sandbox, &capable);
    assert!(all.contains("CapAmb:\t0000000000000020"), "{all}");
}

/// Rust ignores SIGPIPE, and a shell pipeline that inherits that does not end.
#[test]
fn programs_begin_with_default_signals() {
    let sandbox = Sandbox::new();
    let output =
        sandbox.run(SAMARA, &spec(&sandbox, &["grep", "-E", "Sig(Ign|Blk)", "/proc/self/status"]));
    assert_eq!(text(&output.stdout), "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n");
}

#[test]
fn programs_see_the_same_surroundings() {
    let sandbox = Sandbox::new();
    let shared = sandbox.path().join("volume");
    std::fs::create_dir(&shared).unwrap();
    let script = "mount | grep -v -e ' on / ' -e '^proc on /proc/' | sort; hostname 2>/dev/null; \
                  ls /dev; env; pwd; ls -ld /tmp /data | cut -c1-10; \
                  cut -d' ' -f5,7 /proc/self/mountinfo | grep -v '^/sys/fs' | sort";
    let mut spec = spec(&sandbox, &["sh", "-c", script]);
    spec["process"]["cwd"] = json!("/made/for/me");
    spec["linux"]["cgroupsPath"] = json!("/samara-test-surroundings");
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
    mounts.push(json!({"destination": "/data", "type": "bind", "source": shared,
        "options": ["rbind", "rprivate", "ro", "nodev"]}));
    let (all, _) = same(&sandbox, &spec);
    assert!(all.contains("/made/for/me") && all.contains("HOME=/root"), "{all}");
}

/// cgroup v1's default: what the cgroup tree shows, that it is read-only, and which devices may be
/// used. A container that could write there would give itself every device.
#[test]
fn cgroups_are_the_same_and_read_only() {
    let sandbox = Sandbox::new();
    let script = "cat /proc/self/cgroup | sort; mount | grep cgroup | sort; \
                  cat /sys/fs/cgroup/devices/devices.list | sort; \
                  echo a > /sys/fs/cgroup/devices/devices.allow; echo $?";
    let mut spec = spec(&sandbox, &["sh", "-c", script]);
    spec["linux"]["cgroupsPath"] = json!(format!("/samara-test-{}", std::process::id()));
    let (all, _) = same(&sandbox, &spec);
    assert!(all.contains("(ro,nosuid,nodev,noexec") && all.ends_with("1\n"), "{all}");
}

#[test]
fn limits_are_set_alike() {
    let sandbox = Sandbox::new();
    let script = "cd /sys/fs/cgroup; cat memory/memory.limit_in_bytes memory/memory.memsw.limit_in_bytes \
                  memory/memory.soft_limit_in_bytes cpu/cpu.shares cpu/cpu.cfs_quota_us pids/pids.max \
                  cpuset/cpuset.cpus; head -1 memory/memory.oom_control; ulimit -n; ulimit -c";
    let mut spec = spec(&sandbox, &["sh", "-c", script]);
    spec["linux"]["cgroupsPath"] = json!(format!("/samara-test-limits-{}", std::process::id()));
    spec["linux"]["resources"]["memory"] = json!({"limit": 67_108_864, "swap": 134_217_728,
        "reservation": 33_554_432, "disableOOMKiller": true});
    spec["linux"]["resources"]["cpu"] =
        json!({"shares": 512, "quota": 50_000, "period": 100_000, "cpus": "0"});
    spec["linux"]["resources"]["pids"] = json!({"limit": 64});
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200},
        {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}]);
    let (all, _) = same(&sandbox, &spec);
    assert!(all.contains("67108864\n134217728\n33554432\n512\n50000\n64\n0\n"), "{all}");
}

#[test]
fn ends_are_told_alike() {
    let sandbox = Sandbox::new();
    for (args, status) in
        [(&["true"][..], 0), (&["sh", "-c", "exit 7"], 7), (&["sh", "-c", "kill -9 $$; exit 3"], 3)]
    {
        let (_, seen) = same(&sandbox, &spec(&sandbox, args));
        assert_eq!(seen, status, "{args:?}");
    }
}

/// Engines take exit statuses 126 and 127 from these words.
#[test]
fn programs_that_cannot_run_are_named() {
    let sandbox = Sandbox::new();
    std::fs::write(sandbox.rootfs().join("etc/plain"), "x").unwrap();
    for (program, words) in [
        ("nosuch", "exec: \"nosuch\": executable file not found in $PATH"),
        ("/no/such", "exec: \"/no/such\": stat /no/such: no such file or directory"),
        ("/etc/plain", "exec: \"/etc/plain\": permission denied"),
    ] {
        let log = sandbox.path().join("log.json");
        for runtime in [SAMARA, RUNC] {
            let _ = std::fs::remove_file(&log);
            let id = sandbox.new_id(runtime);
            let bundle = sandbox.bundle(&id, &spec(&sandbox, &[program]));
            let output = sandbox.call(
                runtime,
                &[
                    "--log",
                    log.to_str().unwrap(),
                    "--log-format",
                    "json",
                    "create",
                    "--bundle",
                    bundle.to_str().unwrap(),
                    &id,
                ],
            );
            assert!(!output.status.success());
            let last = std::fs::read_to_string(&log).unwrap().lines().last().unwrap().to_owned();
            let last: Value = serde_json::from_str(&last).unwrap();
            assert_eq!(last["level"], "error");
            assert!(last["msg"].as_str().unwrap().contains(words), "{runtime}: {last}");
            assert!(last["time"].as_str().is_some());
            // Nothing is left: the name is free again.
            assert!(!sandbox.state_root(runtime).join(&id).exists(), "{runtime}");
        }
    }
}

/// A limit above the hard one, on a host where this program may not raise it.
#[test]
fn limits_that_cannot_be_raised_are_refused_alike() {
    let sandbox = Sandbox::new();
    let current = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum;
    let may_raise = rustix::thread::capabilities(None)
        .unwrap()
        .effective
        .contains(rustix::thread::CapabilitySet::SYS_RESOURCE);
    let mut spec = spec(&sandbox, &["true"]);
    let above = current.unwrap_or(1 << 20) + 1;
    spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 10, "hard": above}]);
    let [ours, theirs] = [SAMARA, RUNC].map(|runtime| sandbox.run(runtime, &spec));
    assert_eq!(ours.status.success(), theirs.status.success());
    assert_eq!(ours.status.success(), may_raise);
    if !may_raise {
        for output in [ours, theirs] {
            assert!(text(&output.stderr).contains("error setting rlimit type 7"));
        }
    }
}

#[test]
fn a_demand_that_is_not_carried_out_is_refused() {
    let sandbox = Sandbox::new();
    let mut labelled = spec(&sandbox, &["true"]);
    labelled["process"]["selinuxLabel"] = json!("system_u:system_r:container_t:s0");
    let output = sandbox.run(SAMARA, &labelled);
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("process.selinuxLabel"), "{}", text(&output.stderr));
}

#[test]
fn a_life_in_verbs() {
    for runtime in [SAMARA, RUNC] {
        let sandbox = Sandbox::new();
        let script = "trap 'exit 3' TERM; while :; do sleep 0.1; done";
        let id = sandbox.create(runtime, &spec(&sandbox, &["sh", "-c", script]));
        let state = sandbox.state(runtime, &id);
        assert_eq!(state["status"], "created");
        assert_eq!(state["id"], id.as_str());
        let again = sandbox.bundle(&id, &spec(&sandbox, &["true"]));
        let again = sandbox.call(runtime, &["create", "--bundle", again.to_str().unwrap(), &id]);
        assert!(text(&again.stderr).contains("already exists"), "{}", text(&again.stderr));

        sandbox.ok(runtime, &["start", &id]);
        let state = sandbox.state(runtime, &id);
        assert_eq!(state["status"], "running");
        let pids: Vec<i64> =
            serde_json::from_str(&sandbox.ok(runtime, &["ps", "--format", "json", &id])).unwrap();
        assert!(pids.contains(&state["pid"].as_i64().unwrap()));
        assert!(sandbox.ok(runtime, &["list", "-q"]).contains(&id));
        poll("the program runs", || sandbox.ok(runtime, &["ps", &id]).contains("trap"));
        let stats: Value =
            serde_json::from_str(&sandbox.ok(runtime, &["events", "--stats", &id])).unwrap();
        assert_eq!(stats["type"], "stats");
        assert!(stats["data"]["pids"]["current"].as_u64().unwrap() >= 1);
        assert!(stats["data"]["memory"]["usage"]["usage"].as_u64().unwrap() > 0);

        sandbox.ok(runtime, &["pause", &id]);
        assert_eq!(sandbox.state(runtime, &id)["status"], "paused");
        let refused = sandbox.call(runtime, &["exec", &id, "true"]);
        assert!(text(&refused.stderr).contains("paused"), "{}", text(&refused.stderr));
        sandbox.ok(runtime, &["resume", &id]);
        assert_eq!(sandbox.state(runtime, &id)["status"], "running");

        assert!(!sandbox.call(runtime, &["delete", &id]).status.success());
        sandbox.ok(runtime, &["kill", &id, "TERM"]);
        sandbox.wait_for_status(runtime, &id, "stopped");
        assert_eq!(sandbox.state(runtime, &id)["pid"], 0);
        let late = sandbox.call(runtime, &["kill", &id, "TERM"]);
        assert!(text(&late.stderr).contains("container not running"), "{}", text(&late.stderr));
        sandbox.ok(runtime, &["delete", &id]);
        let gone = sandbox.call(runtime, &["state", &id]);
        assert!(text(&gone.stderr).contains("does not exist"), "{}", text(&gone.stderr));
        sandbox.ok(runtime, &["delete", "--force", &id]);
    }
}

/// A paused container of cgroup v1 cannot be killed unless it is thawed.
#[test]
fn a_paused_container_can_be_killed_and_deleted() {
    for runtime in [SAMARA, RUNC] {
        let sandbox = Sandbox::new();
        let id = sandbox.start(runtime, &spec(&sandbox, &["sleep", "1000"]));
        sandbox.ok(runtime, &["pause", &id]);
        sandbox.ok(runtime, &["kill", &id, "KILL"]);
        sandbox.wait_for_status(runtime, &id, "stopped");
        let id = sandbox.start(runtime, &spec(&sandbox, &["sleep", "1000"]));
        sandbox.ok(runtime, &["pause", &id]);
        sandbox.ok(runtime, &["delete", "--force", &id]);
        assert!(!sandbox.call(runtime, &["state", &id]).status.success());
    }
}

#[test]
fn exec_is_confined_as_the_container_is() {
    let sandbox = Sandbox::new();
    let mut spec = spec(&sandbox, &["sleep", "1000"]);
    spec["linux"]["cgroupsPath"] = json!(format!("/samara-test-exec-{}", std::process::id()));
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
    });
    let script =
        format!("{STATUS}; mkdir /x; id; env; pwd; cat /proc/self/cgroup | sort; tty; exit 9");
    let seen = [SAMARA, RUNC].map(|runtime| {
        let id = sandbox.start(runtime, &spec);
        let output = sandbox.call(
            runtime,
            &[
                "exec",
                "-u",
                "5:6",
                "-g",
                "9",
                "-e",
                "C=3",
                "-c",
                "CAP_CHOWN",
                "--cwd",
                "/tmp",
                &id,
                "sh",
                "-c",
                &script,
            ],
        );
        sandbox.ok(runtime, &["delete", "--force", &id]);
        (text(&output.stdout), output.status.code())
    });
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0].1, Some(9));
    assert!(seen[0].0.contains("Seccomp:\t2"), "{}", seen[0].0);
}

#[test]
fn exec_says_what_it_cannot_run() {
    let sandbox = Sandbox::new();
    for runtime in [SAMARA, RUNC] {
        let id = sandbox.start(runtime, &spec(&sandbox, &["sleep", "1000"]));
        let output = sandbox.call(runtime, &["exec", &id, "nosuch"]);
        assert!(!output.status.success());
        let words = "executable file not found in $PATH";
        assert!(text(&output.stderr).contains(words), "{}", text(&output.stderr));
    }
}

/// A terminal of our own for `run` and `exec -t` without an engine.
#[test]
fn a_terminal_by_hand() {
    let sandbox = Sandbox::new();
    let mut with_terminal =
        spec(&sandbox, &["sh", "-c", "tty; ls -l /dev/console | cut -c1; stty size"]);
    with_terminal["process"]["terminal"] = json!(true);
    with_terminal["process"]["consoleSize"] = json!({"height": 30, "width": 100});
    let output = sandbox.run(SAMARA, &with_terminal);
    assert_eq!(text(&output.stdout), "/dev/pts/0\r\nc\r\n30 100\r\n", "{}", text(&output.stderr));
    let id = sandbox.start(SAMARA, &spec(&sandbox, &["sleep", "1000"]));
    let output = sandbox.call(SAMARA, &["exec", "-t", &id, "sh", "-c", "tty; exit 4"]);
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("/dev/pts/0\r\n", Some(4)));
}

/// Hooks must see the engine's bundle and the init's pid, in the order of the specification.
#[test]
fn hooks_run_alike() {
    let sandbox = Sandbox::new();
    let log = sandbox.path().join("hooks.log");
    let hook = |kind: &str| {
        let script = format!(
            "state=$(cat); echo {kind} $(echo \"$state\" | grep -o '\"bundle\": *\"[^\"]*\"' | \
             grep -o '[^/]*\"$') $(echo \"$state\" | grep -c '\"pid\"') $PWD $X >> {}",
            log.display()
        );
        json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["X=1", "PATH=/usr/bin:/bin"]}])
    };
    let seen = [SAMARA, RUNC].map(|runtime| {
        let _ = std::fs::remove_file(&log);
        let mut spec = spec(&sandbox, &["true"]);
        spec["hooks"] = json!({
            "prestart": hook("prestart"),
            "createRuntime": hook("createRuntime"),
            "poststart": hook("poststart"),
            "poststop": hook("poststop"),
        });
        let id = sandbox.new_id(runtime);
        let bundle = sandbox.bundle("hooked", &spec);
        let output = sandbox
            .command(runtime, &["run", "--bundle", bundle.to_str().unwrap(), &id])
            .current_dir(&bundle)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", text(&output.stderr));
        let lines = std::fs::read_to_string(&log).unwrap();
        lines
            .lines()
            .map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" "))
            .collect::<Vec<_>>()
    });
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0].len(), 4);
    assert!(seen[0][0].starts_with("prestart hooked"), "{seen:?}");
}

#[test]
fn limits_can_be_changed_later() {
    let sandbox = Sandbox::new();
    let seen = [SAMARA, RUNC].map(|runtime| {
        let mut spec = spec(&sandbox, &["sleep", "1000"]);
        let path = format!("/samara-test-update-{}", std::process::id());
        spec["linux"]["cgroupsPath"] = json!(path);
        let id = sandbox.start(runtime, &spec);
        sandbox.ok(
            runtime,
            &[
                "update",
                "--memory",
                "64m",
                "--memory-swap",
                "128m",
                "--cpu-share",
                "300",
                "--cpu-quota",
                "20000",
                "--pids-limit",
                "33",
                &id,
            ],
        );
        let read = |file: &str| {
            let (controller, _) = file.split_once('.').unwrap();
            std::fs::read_to_string(format!("/sys/fs/cgroup/{controller}{path}/{file}")).unwrap()
        };
        let values = [
            "memory.limit_in_bytes",
            "memory.memsw.limit_in_bytes",
            "cpu.shares",
            "cpu.cfs_quota_us",
            "pids.max",
        ]
        .map(read);
        sandbox.ok(runtime, &["delete", "--force", &id]);
        values
    });
    assert_eq!(seen[0], seen[1]);
    assert_eq!(seen[0][4], "33\n");
}

/// Whoever gets hold of the init's program while the container is made must not be able to write
/// to this host's file, not even as root of the host.
#[test]
fn the_runtimes_own_file_is_out_of_reach() {
    let sandbox = Sandbox::new();
    let before = std::fs::read(SAMARA).unwrap();
    let id = sandbox.create(SAMARA, &spec(&sandbox, &["sleep", "1000"]));
    let pid = sandbox.state(SAMARA, &id)["pid"].as_i64().unwrap();
    let held = rustix::fs::open(
        format!("/proc/{pid}/exe"),
        rustix::fs::OFlags::PATH,
        rustix::fs::Mode::empty(),
    )
    .unwrap();
    // Once the program runs, no process executes the file, and only its protection is left.
    sandbox.ok(SAMARA, &["start", &id]);
    poll("the program runs", || {
        std::fs::read(format!("/proc/{pid}/comm")).is_ok_and(|name| name == b"sleep\n")
    });
    let mut error = None;
    // Other tests execute the same file, which protects it for as long as they do.
    poll("nobody executes the file", || {
        let attack = std::fs::OpenOptions::new()
            .write(true)
            .open(format!("/proc/self/fd/{}", held.as_raw_fd()));
        error = attack.expect_err("the runtime's file can be written to").raw_os_error();
        error != Some(rustix::io::Errno::TXTBSY.raw_os_error())
    });
    let expected =
        [rustix::io::Errno::ROFS, rustix::io::Errno::PERM].map(|e| Some(e.raw_os_error()));
    assert!(expected.contains(&error), "{error:?}");
    assert_eq!(std::fs::read(SAMARA).unwrap(), before);
}

/// An image whose program is `#!/proc/self/exe` makes the runtime execute itself in the container.
#[test]
fn a_program_that_names_the_runtime_itself() {
    use std::os::unix::fs::PermissionsExt;
    let sandbox = Sandbox::new();
    let before = std::fs::read(SAMARA).unwrap();
    let script = sandbox.rootfs().join("bin/attack");
    std::fs::write(&script, "#!/proc/self/exe\n").unwrap();
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
    let output = sandbox.run(SAMARA, &spec(&sandbox, &["/bin/attack"]));
    assert!(!output.status.success());
    let id = sandbox.start(SAMARA, &spec(&sandbox, &["sleep", "1000"]));
    let output = sandbox.call(SAMARA, &["exec", &id, "/bin/attack"]);
    assert!(!output.status.success());
    assert_eq!(sandbox.state(SAMARA, &id)["status"], "running");
    assert_eq!(std::fs::read(SAMARA).unwrap(), before);
}

/// A container with a user namespace: its own root is not the host's, in an exec neither.
#[test]
fn user_namespaces_hold_for_exec_too() {
    let sandbox = Sandbox::new();
    let mut spec = spec(&sandbox, &["sleep", "1000"]);
    spec["linux"]["namespaces"].as_array_mut().unwrap().push(json!({"type": "user"}));
    let mapping = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
    spec["linux"]["uidMappings"] = mapping.clone();
    spec["linux"]["gidMappings"] = mapping;
    spec["mounts"].as_array_mut().unwrap().retain(|mount| mount["type"] != "cgroup");
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(sandbox.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let seen = [SAMARA, RUNC].map(|runtime| {
        let id = sandbox.start(runtime, &spec);
        let script = format!("cat /proc/self/uid_map; id; {STATUS}");
        let output = sandbox.ok(runtime, &["exec", &id, "sh", "-c", &script]);
        sandbox.ok(runtime, &["delete", "--force", &id]);
        output
    });
    assert_eq!(seen[0], seen[1]);
    assert!(seen[0].contains("100000"), "{}", seen[0]);
}

/// The monitor belongs to nobody's terminal, cgroup or pipe, and ends with the container.
#[test]
fn the_monitor_lives_apart_and_ends_with_the_container() {
    let sandbox = Sandbox::new();
    let id = sandbox.start(SAMARA, &spec(&sandbox, &["sleep", "1000"]));
    let folder = sandbox.state_root(SAMARA).join(&id);
    let monitor = monitor_of(&folder).expect("the container has no monitor");
    let link = |name: &str| std::fs::read_link(format!("/proc/{monitor}/{name}")).unwrap();
    for fd in 0..3 {
        assert_eq!(link(&format!("fd/{fd}")).to_str(), Some("/dev/null"));
    }
    let descriptors = std::fs::read_dir(format!("/proc/{monitor}/fd")).unwrap().count();
    assert!(descriptors <= 5, "{descriptors} descriptors: 0 to 2, the socket, the init's pidfd");
    assert_eq!(link("cwd").to_str(), Some("/"));
    let stat = std::fs::read_to_string(format!("/proc/{monitor}/stat")).unwrap();
    let session: i32 =
        stat.rsplit(')').next().unwrap().split_whitespace().nth(3).unwrap().parse().unwrap();
    assert_eq!(session, monitor, "a session of its own");
    poll("the monitor is in no cgroup of others", || {
        let cgroups = std::fs::read_to_string(format!("/proc/{monitor}/cgroup")).unwrap();
        cgroups.lines().all(|line| line.ends_with(":/"))
    });
    let mode = rustix::fs::stat(folder.join("monitor.sock")).unwrap().st_mode & 0o777;
    assert_eq!(mode, 0o600);
    let mode = rustix::fs::stat(&folder).unwrap().st_mode & 0o777;
    assert_eq!(mode, 0o700);
    sandbox.ok(SAMARA, &["kill", &id, "KILL"]);
    poll("the monitor has ended", || monitor_of(&folder).is_none());
}

/// Killing the monitor must not hurt the container.
#[test]
fn a_container_outlives_its_monitor() {
    let sandbox = Sandbox::new();
    let id = sandbox.start(SAMARA, &spec(&sandbox, &["sleep", "1000"]));
    let folder = sandbox.state_root(SAMARA).join(&id);
    let monitor = rustix::process::Pid::from_raw(monitor_of(&folder).unwrap()).unwrap();
    rustix::process::kill_process(monitor, rustix::process::Signal::KILL).unwrap();
    poll("the monitor is gone", || monitor_of(&folder).is_none());
    assert_eq!(sandbox.state(SAMARA, &id)["status"], "running");
    assert_eq!(sandbox.ok(SAMARA, &["exec", &id, "echo", "here"]), "here\n");
    sandbox.ok(SAMARA, &["delete", "--force", &id]);
}

/// The monitor whose folder this is: its first argument.
fn monitor_of(folder: &std::path::Path) -> Option<i32> {
    std::fs::read_dir("/proc").unwrap().flatten().find_map(|entry| {
        let pid = entry.file_name().to_str()?.parse().ok()?;
        let line = std::fs::read(entry.path().join("cmdline")).ok()?;
        let mut args = line.split(|&byte| byte == 0);
        let is_monitor = args.next()?.ends_with(b"samara-monitor");
        (is_monitor && args.next()? == folder.as_os_str().as_encoded_bytes()).then_some(pid)
    })
}

/// Roots by hand often have no mount on /dev, and are used again, also by a container that comes back.
#[test]
fn a_root_with_a_dev_of_its_own_is_used_again() {
    let sandbox = Sandbox::new();
    let mut spec = spec(&sandbox, &["sh", "-c", "ls /dev; stat -c %a:%t:%T /dev/null /dev/fuse"]);
    spec["mounts"]
        .as_array_mut()
        .unwrap()
        .retain(|mount| !mount["destination"].as_str().unwrap().starts_with("/dev"));
    spec["linux"]["devices"] = json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229,
        "fileMode": 0o640}]);
    let run = || {
        let output = sandbox.run(SAMARA, &spec);
        assert!(output.status.success(), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    let first = run();
    assert!(first.contains("stdout") && first.ends_with("666:1:3\n640:a:e5\n"), "{first}");
    assert_eq!(first, run());
    assert_eq!(first, text(&sandbox.run(RUNC, &spec).stdout));

    let dev = sandbox.rootfs().join("dev");
    std::fs::remove_dir_all(&dev).unwrap();
    std::os::unix::fs::symlink(sandbox.path(), &dev).unwrap();
    let output = sandbox.run(SAMARA, &spec);
    assert!(!output.status.success() && text(&output.stderr).contains("/dev"), "out of the root");
    assert!(!sandbox.path().join("fd").is_symlink());
}
