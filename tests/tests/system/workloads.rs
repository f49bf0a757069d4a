//! The workloads themselves, and the harness, under runc.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Result, ensure};
use libtest_mimic::Trial;
use samara_tests::container::Launch;
use samara_tests::image::Image;
use samara_tests::node::{Engine, Node, NodeOptions, processes_of};

use crate::{Fixture, trial};

/// A workload of the test image.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Workload {
    pub(crate) command: &'static [&'static str],
    /// Smaller than usual, where it runs undisturbed: environment of the container.
    pub(crate) smaller: &'static [&'static str],
    /// What `--break` takes.
    pub(crate) breaks: &'static [&'static str],
    /// Ends when it is told to; one that does not ends by itself.
    pub(crate) endless: bool,
    /// A shell command in the container that succeeds in the middle of the work, for one that ends by itself.
    pub(crate) middle: Option<&'static str>,
}

const fn workload(command: &'static [&'static str], breaks: &'static [&'static str]) -> Workload {
    Workload { command, smaller: &[], breaks, endless: true, middle: None }
}

pub(crate) const COUNTER: Workload =
    workload(&["counter_everywhere"], &["memory", "log", "place", "mapping", "sqlite", "rename"]);
pub(crate) const THREADS: Workload =
    workload(&["threads", "--late-ms", "3000"], &["registers", "vectors", "mask", "token"]);
pub(crate) const EINTR: Workload = workload(
    &["eintr"],
    &[
        "epoll_wait",
        "epoll_pwait2",
        "poll",
        "ppoll",
        "select",
        "pselect",
        "nanosleep",
        "nanosleep-remainder",
        "clock_nanosleep",
        "clock_nanosleep-until",
        "clock_nanosleep-boottime",
        "futex",
        "futex-until",
        "sigtimedwait",
        "recv",
        "io_getevents",
        "semtimedop",
        "read-pipe",
        "read-eventfd",
        "write-pipe",
        "msgrcv",
        "semop",
        "accept",
        "futex-woken",
        "sigwaitinfo",
        "wait4",
        "flock",
    ],
);
pub(crate) const SPAWN: Workload = workload(&["spawn"], &["status"]);
pub(crate) const PIPES: Workload = workload(
    &["pipes"],
    &[
        "queue",
        "wide",
        "capacity",
        "ended",
        "packets",
        "fifo",
        "eventfd",
        "stream",
        "stream back",
        "datagram",
        "seqpacket",
        "offset",
        "deleted",
        "full",
        "flow",
    ],
);
pub(crate) const SIGNALS: Workload =
    workload(&["signals"], &["itimer", "pending", "posix-timers", "altstack", "action"]);
pub(crate) const SESSIONS: Workload =
    workload(&["sessions", "--late-ms", "3000"], &["group", "stopped", "zombie", "member"]);
pub(crate) const CLOCK: Workload = workload(&["clock"], &["backwards"]);
pub(crate) const OPENMP: Workload =
    Workload { smaller: &["MEBIBYTES=256"], ..workload(&["openmp"], &["heap"]) };
pub(crate) const ATTRIBUTES: Workload =
    workload(&["attributes"], &["umask", "limits", "directory", "niceness", "ids", "seccomp"]);
pub(crate) const PIPELINE: Workload = workload(&["pipeline.sh"], &["answer", "trap", "here"]);
pub(crate) const COMPILE: Workload =
    Workload { smaller: &["FILES=12"], ..workload(&["compile.sh"], &["number"]) };
pub(crate) const SORT: Workload = Workload {
    endless: false,
    middle: Some("ls /var/tmp/sort/ | grep -q '^sort......$'"),
    smaller: &["MEBIBYTES=256", "BUFFER=32M"],
    ..workload(&["sort.sh"], &["order", "lost"])
};

pub(crate) const POLLS: Workload =
    workload(&["polls", "--late-ms", "2000"], &["moved", "timer", "far"]);

/// Not among those that are moved.
pub(crate) const REFUSED: Workload = workload(&["refused"], &["sharer"]);

pub(crate) const ALL: &[Workload] = &[
    COUNTER, THREADS, EINTR, SPAWN, PIPES, SIGNALS, SESSIONS, CLOCK, OPENMP, ATTRIBUTES, PIPELINE,
    COMPILE, SORT, POLLS,
];

impl Workload {
    pub(crate) fn name(&self) -> &'static str {
        self.command[0].trim_end_matches(".sh")
    }

    pub(crate) fn launch(&self, suffix: &str) -> Launch {
        Launch::new(&format!("{}{suffix}", self.name()), self.command)
    }

    pub(crate) fn launch_smaller(&self, suffix: &str) -> Launch {
        self.smaller.iter().fold(self.launch(suffix), |launch, size| launch.options(&["-e", size]))
    }
}

/// It must end well when nobody disturbs it.
fn passes(workload: Workload, fixture: &Fixture) -> Result<()> {
    let node = fixture.plain()?;
    let container = workload.launch_smaller("").start(&node)?;
    let nonce = container.wait_ready()?;
    if workload.endless {
        container.finish()?;
    }
    container.wait_ok(&nonce, Duration::from_secs(180))?;
    Ok(())
}

/// It must say what differs, for each thing that can be spoiled.
fn notices(workload: Workload, fixture: &Fixture) -> Result<()> {
    let node = fixture.plain()?;
    // A few at a time: each keeps threads busy.
    for some in workload.breaks.chunks(5) {
        let mut started = Vec::new();
        for &what in some {
            let mut launch = workload.launch_smaller(&format!("-{}", what.replace(' ', "-")));
            // Less to do where there is as much to see, and only the call that is spoiled.
            launch = launch.options(&["-e", "MEBIBYTES=64", "-e", "FILES=3"]);
            launch.command.extend(["--break".to_owned(), what.to_owned()]);
            if workload.command == EINTR.command {
                launch.command.extend(["--only".to_owned(), what.to_owned()]);
            }
            started.push((what, launch.start(&node)?));
        }
        for (what, container) in &started {
            let status = container.wait_exit(Duration::from_secs(120))?;
            let logs = container.logs()?;
            ensure!(
                status == 1 && logs.contains("differs: ") && !logs.contains("OK "),
                "{} --break {what}: status {status}, said:\n{logs}",
                workload.name()
            );
        }
    }
    Ok(())
}

/// Signal(7) says which calls fail after a stop: so a plain SIGSTOP and SIGCONT must be seen, without any help by `--break`.
fn a_plain_stop_is_noticed(fixture: &Fixture) -> Result<()> {
    let node = fixture.plain()?;
    let container = EINTR.launch("-stopped").start(&node)?;
    container.wait_ready()?;
    for signal in ["STOP", "CONT"] {
        node.docker(["kill", "-s", signal, &container.id]).output()?;
        let pid = node.docker(["inspect", "--format", "{{.State.Pid}}", &container.id]).output()?;
        samara_tests::until(&format!("effect of SIG{signal}"), Duration::from_secs(10), || {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            Ok((status.contains("State:\tT") == (signal == "STOP")).then_some(()))
        })?;
    }
    container.wait_exit(Duration::from_secs(30))?;
    let logs = container.logs()?;
    ensure!(logs.contains("failed with EINTR"), "it said:\n{logs}");
    Ok(())
}

/// What the demo's "other engine" means: the same image under the same id, and nothing else in common.
fn engines_share_nothing(engine: Engine) -> Result<()> {
    let nodes = [
        Node::start("one", NodeOptions { engine: Engine::Installed, product: None })?,
        Node::start("two", NodeOptions { engine, product: None })?,
    ];
    let ids = [nodes[0].load(Image::TestBase)?, nodes[1].load(Image::TestBase)?];
    // The containerd image store, on by default in newer engines, names images by another digest of the same content.
    ensure!(engine == Engine::Newer || ids[0] == ids[1], "image ids differ: {ids:?}");
    let container = CLOCK.launch("").start(&nodes[0])?;
    container.wait_ready()?;
    ensure!(
        nodes[1].docker(["ps", "-aq"]).output()?.is_empty(),
        "a container of one engine is seen by the other"
    );
    let other = CLOCK.launch("").start(&nodes[1])?;
    other.wait_ready()?;
    let folders: Vec<_> = nodes.iter().map(|node| node.folder().to_path_buf()).collect();
    // Both still run their container: what follows must end and remove everything.
    std::mem::forget(container);
    std::mem::forget(other);
    for node in nodes {
        node.wipe()?;
    }
    for folder in folders {
        ensure!(
            !folder.exists() && processes_of(&folder).is_empty(),
            "{} is left",
            folder.display()
        );
        let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
        ensure!(
            !mounts.contains(&*folder.to_string_lossy()),
            "mounts below {} are left",
            folder.display()
        );
    }
    Ok(())
}

/// A panic in a test may leave nothing running.
fn a_panic_leaves_nothing() -> Result<()> {
    let folder = Arc::new(std::sync::Mutex::new(None));
    let kept = Arc::clone(&folder);
    let outcome = std::thread::spawn(move || {
        let node = Node::start("panic", NodeOptions { engine: Engine::Installed, product: None })
            .expect("an engine");
        *kept.lock().expect("nobody else holds it") = Some(node.folder().to_path_buf());
        panic!("on purpose");
    })
    .join();
    ensure!(outcome.is_err(), "no panic");
    let folder = folder.lock().expect("nobody else holds it").clone();
    ensure!(folder.as_ref().is_some_and(|folder| !folder.exists()), "{folder:?} is left");
    Ok(())
}

pub(crate) fn trials(fixture: &Arc<Fixture>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for &workload in ALL.iter().chain([&REFUSED]) {
        trials.push(trial(
            fixture,
            &format!("workload/{}/passes", workload.name()),
            move |fixture| passes(workload, fixture),
        ));
        trials.push(trial(
            fixture,
            &format!("workload/{}/notices", workload.name()),
            move |fixture| notices(workload, fixture),
        ));
    }
    trials.push(trial(fixture, "workload/eintr/notices_a_plain_stop", a_plain_stop_is_noticed));
    trials.push(trial(fixture, "node/share_nothing", |_| engines_share_nothing(Engine::Installed)));
    trials.push(trial(fixture, "node/share_nothing_with_newer", |_| {
        engines_share_nothing(Engine::Newer)
    }));
    trials.push(trial(fixture, "node/panic_leaves_nothing", |_| a_panic_leaves_nothing()));
    trials
}
