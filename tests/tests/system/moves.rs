//! The product: containers that are saved, moved, and disturbed.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use samara_tests::container::{Container, Launch};
use samara_tests::image::Image;
use samara_tests::node::{Engine, Node, NodeOptions};
use samara_tests::random::Random;
use samara_tests::until;

use crate::workloads::{ALL, CLOCK, COUNTER, EINTR, PIPELINE, REFUSED, SPAWN, Workload};
use crate::{Fixture, size, trial};

/// A save of the largest workload here, on two busy cores.
const SAVE_TIME_MAX: Duration = Duration::from_secs(300);

/// After a save the engine must see the end of the container soon: nothing is left to do in it.
const END_TIME_MAX: Duration = Duration::from_secs(60);

/// The exit status of a container that was saved and ended (143 as if by SIGTERM, never 137).
const SAVED: i32 = 143;

/// Saves a container so that it ends, and removes it from its engine.
fn save_and_remove(container: &Container<'_>, url: &str) -> Result<()> {
    let saved = container.save(url, &["--stop"])?.successful();
    saved.with_context(|| format!("{} says: {:?}", container.name, container.logs()))?;
    let status = container.wait_exit(END_TIME_MAX)?;
    ensure!(status == SAVED, "{} ended with status {status} after its save", container.name);
    container.remove()
}

/// As any other runtime: nothing is saved, and the workload notices no difference.
fn runs(workload: Workload, fixture: &Fixture) -> Result<()> {
    let pair = fixture.pair()?;
    let node = &pair.nodes[0];
    let container = workload.launch_smaller("-runs").product().start(node)?;
    let nonce = container.wait_ready()?;
    let monitors =
        || node.product_processes().iter().filter(|(_, name)| *name == "samara-monitor").count();
    ensure!(monitors() == 1, "there are {} monitors for one container", monitors());
    if workload.endless {
        container.finish()?;
    }
    container.wait_ok(&nonce, Duration::from_secs(180))?;
    until("end of the monitor", Duration::from_secs(10), || Ok((monitors() == 0).then_some(())))
}

/// The newer engine too, whose calls differ (docker 28 asks for `features` first).
fn runs_on_newer_engine(fixture: &Fixture) -> Result<()> {
    let pair = fixture.pair()?;
    let newer =
        Node::start("newer", NodeOptions { engine: Engine::Newer, product: Some(&pair.store) })?;
    newer.load(Image::TestBase)?;
    let container = PIPELINE.launch("-newer-runs").product().start(&newer)?;
    let nonce = container.wait_ready()?;
    container.finish()?;
    container.wait_ok(&nonce, END_TIME_MAX)?;
    Ok(())
}

/// Waits until a workload that ends by itself is in the middle of its work.
fn wait_middle(container: &Container<'_>, condition: &str) -> Result<()> {
    until(&format!("success of '{condition}' in {}", container.name), SAVE_TIME_MAX, || {
        ensure!(container.runs()?, "it ended before: {}", container.logs()?);
        let asked = container.node.docker(["exec", &container.id, "sh", "-c", condition]).run()?;
        Ok(asked.status.success().then_some(()))
    })
}

/// From engine to engine, as often as asked; in the end the workload must find everything as it was.
fn moves(workload: Workload, fixture: &Fixture) -> Result<()> {
    let pair = fixture.pair()?;
    let url = pair.store.url(&format!("moves/{}", workload.name()));
    let launch = workload.launch("-moved").capsule(url.clone());
    let mut container = launch.start(&pair.nodes[0])?;
    let nonce = container.wait_ready()?;
    if let Some(condition) = workload.middle {
        wait_middle(&container, condition)?;
    }
    // One that ends by itself may not get far enough for more than one move.
    let times = if workload.endless { size("SAMARA_TEST_MOVES", 2)? } else { 1 };
    for number in 1..=times {
        save_and_remove(&container, &url)?;
        container = launch.start(&pair.nodes[usize::from(number % 2 == 1)])?;
    }
    if workload.endless {
        container.finish()?;
    }
    container.wait_ok(&nonce, Duration::from_secs(300))?;
    Ok(())
}

/// Numbers of the container's first process that grow when something of ours stays behind in it.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    seccomp_filters: String,
    descriptors: usize,
    mappings: usize,
}

fn left_in(node: &Node, container: &Container<'_>) -> Result<Left> {
    let pid = node.docker(["inspect", "--format", "{{.State.Pid}}", &container.id]).output()?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let filters = status
        .lines()
        .find_map(|line| line.strip_prefix("Seccomp_filters:"))
        .unwrap_or("none")
        .trim()
        .to_owned();
    Ok(Left {
        seccomp_filters: filters,
        descriptors: std::fs::read_dir(format!("/proc/{pid}/fd"))?.count(),
        mappings: std::fs::read_to_string(format!("/proc/{pid}/maps"))?.lines().count(),
    })
}

/// However often a container moves, nothing of ours may pile up in it.
fn nothing_piles_up(fixture: &Fixture) -> Result<()> {
    let pair = fixture.pair()?;
    let url = pair.store.url("moves/piles");
    let launch = CLOCK.launch("-piles").capsule(url.clone());
    let mut container = launch.start(&pair.nodes[0])?;
    let nonce = container.wait_ready()?;
    let before = left_in(&pair.nodes[0], &container)?;
    for number in 1..=size("SAMARA_TEST_LONG_MOVES", 5)? {
        save_and_remove(&container, &url)?;
        let node = &pair.nodes[usize::from(number % 2 == 1)];
        container = launch.start(node)?;
        let now = left_in(node, &container)?;
        ensure!(now == before, "after move {number} there are {now:?}, at first {before:?}");
    }
    container.finish()?;
    container.wait_ok(&nonce, END_TIME_MAX)?;
    Ok(())
}

/// Between engines of different years, both ways.
fn moves_to_newer_engine(fixture: &Fixture) -> Result<()> {
    let pair = fixture.pair()?;
    let newer =
        Node::start("newer", NodeOptions { engine: Engine::Newer, product: Some(&pair.store) })?;
    newer.load(Image::TestBase)?;
    let url = pair.store.url("moves/newer");
    let launch = PIPELINE.launch("-newer").capsule(url.clone());
    let mut container = launch.start(&pair.nodes[0])?;
    let nonce = container.wait_ready()?;
    for node in [&newer, &pair.nodes[1]] {
        save_and_remove(&container, &url)?;
        container = launch.start(node)?;
    }
    container.finish()?;
    container.wait_ok(&nonce, END_TIME_MAX)?;
    Ok(())
}

/// docker's own experimental commands, of a running container and of a paused one.
fn docker_checkpoint(fixture: &Fixture, paused: bool) -> Result<()> {
    let pair = fixture.pair()?;
    let node = &pair.nodes[0];
    let name = if paused { "-checkpoint-paused" } else { "-checkpoint-running" };
    let container = COUNTER.launch(name).product().start(node)?;
    let nonce = container.wait_ready()?;
    if paused {
        node.docker(["pause", &container.id]).output()?;
    }
    node.docker(["checkpoint", "create", &container.id, "first"]).within(SAVE_TIME_MAX).output()?;
    until("end of the checkpointed container", END_TIME_MAX, || {
        Ok((!container.runs()?).then_some(()))
    })?;
    node.docker(["start", "--checkpoint", "first", &container.id])
        .within(SAVE_TIME_MAX)
        .output()?;
    container.finish()?;
    container.wait_ok(&nonce, END_TIME_MAX)?;
    Ok(())
}

/// Captures of a container that stays, one after the other: the program inside may notice nothing.
fn captures(launch: &Launch, fixture: &Fixture, healthy: bool) -> Result<()> {
    let pair = fixture.pair()?;
    let node = &pair.nodes[0];
    let url = pair.store.url(&format!("captures/{}", launch.name));
    let container = launch.clone().capsule(url.clone()).start(node)?;
    let nonce = container.wait_ready()?;
    for number in 1..=size("SAMARA_TEST_CAPTURES", 20)? {
        let saved = container.save(&url, &[])?.successful();
        saved.with_context(|| format!("capture {number}; it said: {:?}", container.logs()))?;
        ensure!(container.runs()?, "after capture {number} it had ended: {}", container.logs()?);
        // The program must get to run between two captures, however slow the machine is.
        std::thread::sleep(Duration::from_millis(50));
        ensure!(
            node.frozen().is_empty(),
            "after capture {number} there is frozen: {:?}",
            node.frozen()
        );
    }
    if healthy {
        let health = node
            .docker([
                "inspect",
                "--format",
                "{{.State.Health.Status}} {{.State.Health.FailingStreak}}",
                &container.id,
            ])
            .output()?;
        ensure!(health == "healthy 0", "its health is {health}");
    }
    container.finish()?;
    container.wait_ok(&nonce, END_TIME_MAX)?;
    Ok(())
}

/// Moves in the middle of waits that captures, or others (`stops`), have interrupted before: the kernel hides then what a thread waits in.
fn moves_after(launch: &Launch, fixture: &Fixture, stops: bool) -> Result<()> {
    let pair = fixture.pair()?;
    let url = pair.store.url(&format!("moves-after/{}", launch.name));
    let launch = launch.clone().capsule(url.clone());
    let mut container = launch.start(&pair.nodes[0])?;
    let nonce = container.wait_ready()?;
    // Two of three seconds all threads are in a wait of two.
    for number in 1..=size("SAMARA_TEST_MOVES", 5)? {
        if stops {
            for signal in ["STOP", "CONT"] {
                container.node.docker(["kill", "-s", signal, &container.id]).output()?;
            }
        } else {
            for _ in 0..3 {
                container.save(&url, &[])?.successful()?;
            }
        }
        save_and_remove(&container, &url)?;
        container = launch.start(&pair.nodes[usize::from(number % 2 == 1)])?;
    }
    container.finish()?;
    container.wait_ok(&nonce, END_TIME_MAX)?;
    Ok(())
}

/// Kills every process of ours at moments drawn over a capture: the container must go on, and what is in the store be whole.
fn kills(fixture: &Fixture) -> Result<()> {
    let pair = fixture.pair()?;
    let node = &pair.nodes[0];
    let url = pair.store.url("harm/kills");
    let launch = COUNTER.launch("-killed").capsule(url.clone());
    let container = launch.start(node)?;
    let nonce = container.wait_ready()?;
    let begin = Instant::now();
    container.save(&url, &[])?.successful()?;
    let undisturbed = begin.elapsed();

    let seed = match std::env::var("SAMARA_TEST_SEED") {
        Ok(text) => text.parse()?,
        Err(_) => Random::fresh_seed()?,
    };
    let mut random = Random::new(seed);
    for number in 1..=size("SAMARA_TEST_KILLS", 10)? {
        let after = undisturbed.mul_f64(1.2 * random.fraction());
        let at = || format!("kill {number}, {after:?} into a capture (SAMARA_TEST_SEED={seed})");
        std::thread::scope(|scope| -> Result<()> {
            let saving = scope.spawn(|| container.save(&url, &[]));
            // The moment is what is tested here, not a condition.
            std::thread::sleep(after);
            for (pid, _) in node.product_processes() {
                let _ = kill(pid, Signal::SIGKILL);
            }
            // It may have failed, and it may have been done before.
            let _ = saving.join();
            Ok(())
        })?;
        // Bound: a watcher that thaws has nothing else to do.
        until("thawed container", Duration::from_secs(10), || {
            Ok(node.frozen().is_empty().then_some(()))
        })
        .with_context(at)?;
        ensure!(container.runs()?, "{}: the container ended: {}", at(), container.logs()?);
        let cpu = node.cpu_time()?;
        until("work of the container", Duration::from_secs(10), || {
            Ok((node.cpu_time()? > cpu + Duration::from_millis(20)).then_some(()))
        })
        .with_context(at)?;
        // The next call starts a monitor anew, and what is there must be whole.
        node.samara(["capsule", "verify", &url])?.output().with_context(at)?;
    }
    save_and_remove(&container, &url)?;
    let container = launch.start(&pair.nodes[1])?;
    container.finish()?;
    container.wait_ok(&nonce, END_TIME_MAX)?;
    Ok(())
}

/// A refusal names what is wrong, in one line, and ends with a status.
fn refused(ended: &samara_tests::process::Ended, naming: &str) -> Result<()> {
    let lines: Vec<&str> = ended.stderr.lines().filter(|line| !line.trim().is_empty()).collect();
    match (ended.status.success(), lines.as_slice()) {
        (false, [line]) if line.contains(naming) => Ok(()),
        (status, _) => bail!(
            "wanted one line that names {naming}; success is {status}, and it said:\n{}",
            ended.stderr
        ),
    }
}

fn refusals(fixture: &Fixture) -> Result<()> {
    let pair = fixture.pair()?;
    let node = &pair.nodes[0];
    let url = pair.store.url("refusals/clock");
    let launch = CLOCK.launch("-refusals").capsule(url.clone());
    let container = launch.start(node)?;
    let nonce = container.wait_ready()?;

    refused(
        &node.samara(["save", "no-such-container", "--to", &url])?.run()?,
        "no-such-container",
    )?;
    refused(
        &node.samara(["save", &container.name, "--to", "nowhere://bucket/x"])?.run()?,
        "nowhere",
    )?;
    refused(
        &node.samara(["capsule", "inspect", &pair.store.url("nothing/here")])?.run()?,
        "nothing/here",
    )?;
    let outside = node.samara(["save", &container.name, "--to", "s3://another-bucket/x"])?.run()?;
    ensure!(!outside.status.success(), "a save into a bucket that does not exist succeeded");

    // A key that the store does not know.
    let wrong = node.folder().join("wrong.toml");
    let config = pair.store.node_config().replace(&pair.store.secret_access_key, "not-the-secret");
    std::fs::write(&wrong, config)?;
    std::os::unix::fs::chown(&wrong, Some(0), Some(0))?;
    std::fs::set_permissions(&wrong, std::os::unix::fs::PermissionsExt::from_mode(0o600))?;
    let denied = node.samara_with(&wrong, ["capsule", "inspect", &url])?.run()?;
    ensure!(!denied.status.success(), "wrong credentials were accepted");
    ensure!(
        !denied.stderr.contains("not-the-secret"),
        "the secret is in the message: {}",
        denied.stderr
    );

    // Another command at the same address is not the same job.
    save_and_remove(&container, &url)?;
    let other = Launch::new("other-command", &["sleep", "60"]).capsule(url);
    let error = match other.start(&pair.nodes[1]) {
        Ok(_) => bail!("a container with another command was started at a capsule's address"),
        Err(error) => format!("{error:#}"),
    };
    ensure!(error.contains("arguments") || error.contains("command"), "docker said: {error}");
    let container = launch.start(&pair.nodes[1])?;
    container.finish()?;
    container.wait_ok(&nonce, END_TIME_MAX)?;
    Ok(())
}

/// Everything that stands in the way is named at once, in all processes, and nothing has happened to them.
fn refuses_state(fixture: &Fixture) -> Result<()> {
    let pair = fixture.pair()?;
    let launch = REFUSED.launch("-state").capsule(pair.store.url("refusals/state"));
    let container = launch.start(&pair.nodes[0])?;
    let nonce = container.wait_ready()?;
    for _ in 0..size("SAMARA_TEST_CAPTURES", 20)? {
        let ended = container.save(&pair.store.url("refusals/state"), &["--stop"])?;
        for named in ["process 1 ", "events that nobody has read", "a corked UDP socket"] {
            refused(&ended, named)?;
        }
    }
    container.finish()?;
    container.wait_ok(&nonce, END_TIME_MAX)?;

    // All processes of the machine are in its pid namespace. None of them may be stopped.
    let launch = CLOCK.launch("-shared").options(&["--pid", "host"]);
    let container = launch.capsule(pair.store.url("refusals/shared")).start(&pair.nodes[0])?;
    let nonce = container.wait_ready()?;
    let ended = container.save(&pair.store.url("refusals/shared"), &[])?;
    refused(&ended, "no pid namespace of its own")?;
    container.finish()?;
    container.wait_ok(&nonce, END_TIME_MAX)?;
    Ok(())
}

pub(crate) fn trials(fixture: &Arc<Fixture>) -> Vec<Trial> {
    let mut trials = Vec::new();
    for &workload in ALL {
        let name = format!("run/{}", workload.name());
        trials.push(trial(fixture, &name, move |fixture| runs(workload, fixture)));
        trials.push(trial(fixture, &format!("move/{}", workload.name()), move |fixture| {
            moves(workload, fixture)
        }));
    }
    trials.push(trial(fixture, "run/on_newer_engine", runs_on_newer_engine));
    trials.push(trial(fixture, "move/nothing_piles_up", nothing_piles_up));
    trials.push(trial(fixture, "move/newer_engine_and_back", moves_to_newer_engine));
    trials.push(trial(fixture, "move/docker_checkpoint_running", |fixture| {
        docker_checkpoint(fixture, false)
    }));
    trials.push(trial(fixture, "move/docker_checkpoint_paused", |fixture| {
        docker_checkpoint(fixture, true)
    }));
    trials.push(trial(fixture, "capture/spawn", |fixture| {
        captures(&SPAWN.launch("-captured"), fixture, false)
    }));
    trials.push(trial(fixture, "capture/eintr", |fixture| {
        captures(&EINTR.launch("-captured"), fixture, false)
    }));
    trials.push(trial(fixture, "move/eintr_after_captures", |fixture| {
        moves_after(&EINTR.launch("-left"), fixture, false)
    }));
    trials.push(trial(fixture, "move/eintr_after_stops", |fixture| {
        let mut launch = EINTR.launch("-paused");
        // The others fail with EINTR by any stop.
        let restarted = "poll,nanosleep,clock_nanosleep,clock_nanosleep-boottime,futex,futex-until";
        launch.command.extend(["--only", restarted].map(str::to_owned));
        moves_after(&launch, fixture, true)
    }));
    trials.push(trial(fixture, "capture/healthcheck", |fixture| {
        let launch = CLOCK.launch("-healthcheck").options(&[
            "--health-cmd",
            "true",
            "--health-interval",
            "1s",
            "--health-retries",
            "1",
        ]);
        captures(&launch, fixture, true)
    }));
    trials.push(trial(fixture, "harm/kills", kills));
    trials.push(trial(fixture, "refusal/all", refusals));
    trials.push(trial(fixture, "refusal/state", refuses_state));
    trials
}
