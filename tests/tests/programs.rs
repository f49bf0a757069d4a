//! Real programs that live through moves under load (`script/programs`): interpreters, virtual machines, databases, MPI.
//!
//! `move/…`: a program runs undisturbed under runc, and once more under the product, where it is saved at moments drawn over
//! its CPU time, and goes on on the other of two engines that share nothing but an object store. At one of the moves, drawn
//! too, the machine goes without notice: the program works on after its capsule, and is killed. It must give the result of the
//! undisturbed run, with the nonce that it drew when it started, each step once and in order, for the CPU time of the
//! undisturbed run and a tenth, and what ran after the capsule.
//! `stay/…`: it is saved while it runs on, at drawn moments, and must not notice.
//!
//! Sizes: `SAMARA_TEST_MOVES` (20), `SAMARA_TEST_CAPTURES` (5), `SAMARA_TEST_WORK` (100, percent of each program's work).
//! `SAMARA_TEST_SEED` repeats drawn moments.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use samara_tests::container::{Container, Launch};
use samara_tests::image::Image;
use samara_tests::node::{Engine, Node, NodeOptions};
use samara_tests::object_store::ObjectStore;
use samara_tests::random::Random;
use samara_tests::until;

/// Many times what a program takes on the machine that its size was chosen on: others may be busy there.
const JOB_TIME_MAX: Duration = Duration::from_secs(1800);

/// After a save the engine must see the end of the container soon: nothing is left to do in it.
const END_TIME_MAX: Duration = Duration::from_secs(60);

/// The exit status of a container that was saved and ended (143 as if by SIGTERM).
const SAVED: i32 = 143;

/// The exit status of a container that `docker kill` ended.
const KILLED: i32 = 137;

/// More CPU time than the undisturbed run's, by this factor, means that something was done twice.
const CPU_FACTOR_MAX: f64 = 1.1;

/// A program of `tests/programs`: says `nonce …`, `ready`, `step 1` and so on, and `OK`, its nonce and its result in the end.
#[derive(Clone, Copy, Debug)]
struct Program {
    name: &'static str,
    image: Image,
    command: &'static [&'static str],
    /// Talks to the [`Server`], whose port is its last argument, and says in the end how often it was cut off.
    fetches: bool,
}

const fn program(name: &'static str, image: Image, command: &'static [&'static str]) -> Program {
    Program { name, image, command, fetches: false }
}

const ALL: &[Program] = &[
    program("numeric", Image::Programs, &["numeric.py"]),
    program("sqlite", Image::Programs, &["sqlite.py"]),
    program("perl", Image::Programs, &["pipes.pl"]),
    program("R", Image::Programs, &["parallel.R"]),
    program(
        "java",
        Image::Programs,
        &["java", "-XX:+UseG1GC", "-Xmx512m", "-cp", "/opt/samara", "Collected"],
    ),
    program("node", Image::Programs, &["workers.js"]),
    program("go", Image::Programs, &["goroutines"]),
    program("asyncio", Image::Programs, &["loops.py"]),
    Program { fetches: true, ..program("http", Image::Programs, &["fetch.py"]) },
    program("star", Image::Services, &["star.sh"]),
    program("ffmpeg", Image::Services, &["video.sh"]),
    program("postgres", Image::Services, &["postgres.sh"]),
    program("redis", Image::Services, &["redis.py"]),
    program("mpi", Image::Services, &["ring.sh"]),
];

/// What tests share. Made by the first test that asks for it.
#[derive(Debug)]
struct Fixture {
    pair: Mutex<Option<Pair>>,
    seed: u64,
}

/// Two engines with the product and nothing in common but the store. Nodes are dropped first: a container may still be writing.
#[derive(Debug)]
struct Pair {
    nodes: [Node; 2],
    store: ObjectStore,
    server: Server,
    loaded: Vec<Image>,
}

impl Pair {
    fn start() -> Result<Pair> {
        let store = ObjectStore::start()?;
        let start = |name| {
            Node::start(name, NodeOptions { engine: Engine::Installed, product: Some(&store) })
        };
        let nodes = [start("left")?, start("right")?];
        Ok(Pair { nodes, store, server: Server::start()?, loaded: Vec::new() })
    }

    fn load(&mut self, image: Image) -> Result<()> {
        if !self.loaded.contains(&image) {
            for node in &self.nodes {
                node.load(image)?;
            }
            self.loaded.push(image);
        }
        Ok(())
    }

    fn launch(&self, program: Program, kind: &str) -> Result<Launch> {
        let mut launch = Launch::new(&format!("{}-{kind}", program.name), program.command)
            .image(program.image)
            .options(&["-e", &format!("WORK={}", size("SAMARA_TEST_WORK", 100)?)]);
        if program.fetches {
            launch.command.push(self.server.port.to_string());
        }
        Ok(launch)
    }

    /// CPU time of all containers of both engines so far.
    fn cpu_time(&self) -> Result<Duration> {
        // An engine on which nothing has run yet has no control group for it.
        Ok(self.nodes.iter().map(|node| node.cpu_time().unwrap_or_default()).sum())
    }
}

/// An HTTP server outside of all containers, with connections that are kept: answers each path with a hundred times itself.
#[derive(Debug)]
struct Server {
    port: u16,
}

impl Server {
    fn start() -> Result<Server> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        let port = listener.local_addr()?.port();
        // It ends with this process, and so does what it serves.
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    // A container that is gone says nothing about it.
                    let _ = serve(&stream);
                });
            }
        });
        Ok(Server { port })
    }
}

fn serve(mut stream: &TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(JOB_TIME_MAX))?;
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    while let Some(request) = lines.next() {
        let request = request?;
        let path = request.split(' ').nth(1).context("a request without a path")?;
        for header in lines.by_ref() {
            if header?.is_empty() {
                break;
            }
        }
        let body = path.repeat(100);
        write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    }
    Ok(())
}

/// What an undisturbed run gave and took.
#[derive(Debug)]
struct Reference {
    result: String,
    steps: u32,
    cpu: Duration,
}

/// A life's lines, up to now.
#[derive(Debug, Default)]
struct Said {
    steps: Vec<u32>,
    ok: Option<String>,
    resets: Option<u32>,
}

fn said_by(logs: &str) -> Result<Said> {
    let mut said = Said::default();
    for line in logs.lines() {
        if let Some(number) = line.strip_prefix("step ") {
            said.steps.push(number.parse().with_context(|| format!("in '{line}'"))?);
        } else if let Some(rest) = line.strip_prefix("OK ") {
            said.ok = Some(rest.to_owned());
        } else if let Some(number) = line.strip_prefix("resets ") {
            said.resets = Some(number.parse()?);
        } else if line.starts_with("differs") {
            bail!("it said:\n{logs}");
        }
    }
    Ok(said)
}

fn nonce_of(container: &Container<'_>) -> Result<String> {
    let line = container.wait_for_line("nonce ", Duration::from_secs(120))?;
    Ok(line.trim_start_matches("nonce ").to_owned())
}

/// Each step once and in order: a life goes on after the step that was the last before its capsule.
fn check_steps(all: &[u32], upto: u32) -> Result<()> {
    for (number, &step) in (1..).zip(all) {
        ensure!(step == number, "step {step} in the place of step {number}");
    }
    ensure!(u32::try_from(all.len())? == upto, "{} steps of {upto}", all.len());
    Ok(())
}

fn reference(pair: &Pair, program: Program) -> Result<Reference> {
    let before = pair.cpu_time()?;
    let container = pair.launch(program, "reference")?.start(&pair.nodes[0])?;
    let nonce = nonce_of(&container)?;
    let result = container.wait_ok(&nonce, JOB_TIME_MAX)?;
    let cpu = pair.cpu_time()? - before;
    let said = said_by(&container.logs()?)?;
    let steps = said.steps.len().try_into()?;
    check_steps(&said.steps, steps)?;
    container.remove()?;
    Ok(Reference { result, steps, cpu })
}

/// Waits until the program has used this much CPU time since `before`, and answers whether it still runs then.
fn wait_for_cpu(
    pair: &Pair,
    container: &Container<'_>,
    before: Duration,
    due: Duration,
) -> Result<bool> {
    let init = match container.init() {
        Ok(init) => init,
        Err(_) if !container.runs()? => return Ok(false),
        Err(error) => return Err(error),
    };
    until(&format!("{due:?} of CPU time of {}", container.name), JOB_TIME_MAX, || {
        if !init.exists() {
            return Ok(Some(false));
        }
        // Every look costs a little, and the moment is drawn anyway.
        std::thread::sleep(Duration::from_millis(15));
        Ok((pair.cpu_time()?.saturating_sub(before) >= due).then_some(true))
    })
}

/// Moments in the middle of the work, in order, as fractions of it.
fn moments(random: &mut Random, count: u32) -> Vec<f64> {
    let mut moments: Vec<f64> = (0..count).map(|_| 0.02 + 0.93 * random.fraction()).collect();
    moments.sort_by(f64::total_cmp);
    moments
}

fn moves(program: Program, pair: &Pair, random: &mut Random) -> Result<()> {
    let expected = reference(pair, program)?;
    let count = size("SAMARA_TEST_MOVES", 20)?;
    let killed = u32::try_from(random.draw() % u64::from(count))? + 1;
    let overrun = expected.cpu.mul_f64(0.02 + 0.05 * random.fraction());

    let url = pair.store.url(&format!("programs/{}", program.name));
    let launch = pair.launch(program, "moved")?.capsule(url.clone());
    let before = pair.cpu_time()?;
    let mut lost = Duration::ZERO;
    let mut made = 0;
    let mut steps = Vec::new();
    let mut container = launch.start(&pair.nodes[0])?;
    let nonce = nonce_of(&container)?;
    container.wait_for_line("ready", JOB_TIME_MAX)?;
    for moment in moments(random, count) {
        let due = expected.cpu.mul_f64(moment) + lost;
        if !wait_for_cpu(pair, &container, before, due)? {
            break;
        }
        made += 1;
        let at = || format!("move {made}, at {:.0} % of the work", moment * 100.0);
        if made == killed {
            let said = said_by(&container.logs()?)?.steps.len();
            let ended = container.save(&url, &[])?;
            // It may have been in its last steps.
            if !ended.status.success() && !container.runs()? {
                break;
            }
            ended.successful().with_context(at)?;
            let saved = pair.cpu_time()?;
            wait_for_cpu(pair, &container, saved, overrun)?;
            container.node.docker(["kill", &container.id]).run()?;
            if container.wait_exit(END_TIME_MAX)? != KILLED {
                // It was done before: its address is free for another start, and there is nothing to go on with.
                break;
            }
            lost += pair.cpu_time()? - saved;
            // Up to which of these the capsule holds is known when the next life goes on from there.
            let all = said_by(&container.logs()?)?.steps;
            steps.extend_from_slice(&all[..said]);
            let later = &all[said..];
            container.remove()?;
            container = launch.start(&pair.nodes[usize::from(made % 2 == 1)]).with_context(at)?;
            let first = first_step(&container)?;
            steps.extend(later.iter().take_while(|&&step| first.is_none_or(|first| step < first)));
            continue;
        }
        let ended = container.save(&url, &["--stop"])?;
        if !ended.status.success() && !container.runs()? {
            break;
        }
        ended.successful().with_context(at)?;
        let status = container.wait_exit(END_TIME_MAX)?;
        let logs = container.logs()?;
        ensure!(status == SAVED, "{}: it ended with status {status}, and said:\n{logs}", at());
        steps.extend(said_by(&logs).with_context(at)?.steps);
        container.remove()?;
        container = launch.start(&pair.nodes[usize::from(made % 2 == 1)]).with_context(at)?;
    }
    let at = || format!("after {made} moves");
    let result = container.wait_ok(&nonce, JOB_TIME_MAX).with_context(at)?;
    let said = said_by(&container.logs()?)?;
    let cpu = pair.cpu_time()? - before;
    steps.extend(said.steps);
    container.remove()?;

    ensure!(result == expected.result, "its result is {result}, undisturbed {}", expected.result);
    check_steps(&steps, expected.steps)?;
    // The work may take a little less than in the undisturbed run, and the last moments then lie behind its end.
    ensure!(made * 2 >= count, "only {made} of {count} moves were made before it ended");
    if program.fetches {
        ensure!(said.resets == Some(made), "{made} moves cut it off {:?} times", said.resets);
    }
    let allowed = |reference: Duration| reference.mul_f64(CPU_FACTOR_MAX) + lost;
    let mut compared = expected.cpu;
    if cpu > allowed(compared) {
        // The same work takes up to a quarter more while others use the machine's caches.
        compared = compared.max(reference(pair, program)?.cpu);
    }
    eprintln!(
        "{}: {made} moves, {:.1} CPU s, undisturbed {:.1}, lost {:.1}",
        program.name,
        cpu.as_secs_f64(),
        compared.as_secs_f64(),
        lost.as_secs_f64()
    );
    ensure!(
        cpu <= allowed(compared),
        "{cpu:?} of CPU time are more than {CPU_FACTOR_MAX} x {compared:?} + {lost:?} after a capsule"
    );
    Ok(())
}

/// The first step that a life says. A life that ends without saying one has none.
fn first_step(container: &Container<'_>) -> Result<Option<u32>> {
    let mut first = None;
    until("first step of a life", JOB_TIME_MAX, || {
        let runs = container.runs()?;
        first = said_by(&container.logs()?)?.steps.first().copied();
        Ok((first.is_some() || !runs).then_some(()))
    })?;
    Ok(first)
}

fn stays(program: Program, pair: &Pair, random: &mut Random) -> Result<()> {
    let expected = reference(pair, program)?;
    let count = size("SAMARA_TEST_CAPTURES", 5)?;
    let url = pair.store.url(&format!("programs/{}-stays", program.name));
    let before = pair.cpu_time()?;
    let container = pair.launch(program, "stays")?.capsule(url.clone()).start(&pair.nodes[0])?;
    let nonce = nonce_of(&container)?;
    container.wait_for_line("ready", JOB_TIME_MAX)?;
    let mut made = 0;
    for moment in moments(random, count) {
        if !wait_for_cpu(pair, &container, before, expected.cpu.mul_f64(moment))? {
            break;
        }
        let ended = container.save(&url, &[])?;
        if !ended.status.success() && !container.runs()? {
            break;
        }
        ended.successful().with_context(|| format!("at {:.0} % of the work", moment * 100.0))?;
        made += 1;
    }
    let result = container.wait_ok(&nonce, JOB_TIME_MAX)?;
    let said = said_by(&container.logs()?)?;
    container.remove()?;
    ensure!(result == expected.result, "its result is {result}, undisturbed {}", expected.result);
    check_steps(&said.steps, expected.steps)?;
    ensure!(made * 2 >= count, "only {made} of {count} captures were made before it ended");
    if program.fetches {
        ensure!(said.resets == Some(0), "captures cut it off {:?} times", said.resets);
    }
    Ok(())
}

fn size(name: &str, default: u32) -> Result<u32> {
    match std::env::var(name) {
        Ok(text) => Ok(text.parse()?),
        Err(_) => Ok(default),
    }
}

fn trial(
    fixture: &Arc<Fixture>,
    program: Program,
    name: &str,
    run: fn(Program, &Pair, &mut Random) -> Result<()>,
) -> Trial {
    let fixture = Arc::clone(fixture);
    Trial::test(format!("{name}/{}", program.name), move || {
        let seed = fixture.seed;
        let tried = || -> Result<()> {
            let mut slot = fixture.pair.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            if slot.is_none() {
                *slot = Some(Pair::start()?);
            }
            let pair = slot.as_mut().expect("made above");
            pair.load(program.image)?;
            run(program, pair, &mut Random::new(seed))
        };
        tried().map_err(|error| {
            // At once: the others take hours.
            eprintln!("{error:#} (SAMARA_TEST_SEED={seed})");
            Failed::from(format!("{error}"))
        })
    })
}

fn main() -> Result<std::process::ExitCode> {
    // Any number of names, where the test library takes one.
    let (options, names): (Vec<String>, Vec<String>) =
        std::env::args().skip(1).partition(|word| word.starts_with('-'));
    let mut arguments = Arguments::from_iter(std::iter::once("programs".to_owned()).chain(options));
    // CPU time is measured, and two engines are for one container at a time.
    arguments.test_threads = Some(1);
    let seed = match std::env::var("SAMARA_TEST_SEED") {
        Ok(text) => text.parse()?,
        Err(_) => Random::fresh_seed()?,
    };
    eprintln!("moments are drawn with SAMARA_TEST_SEED={seed}");
    let fixture = Arc::new(Fixture { pair: Mutex::new(None), seed });
    let mut trials = Vec::new();
    for &program in ALL {
        trials.push(trial(&fixture, program, "move", moves));
        trials.push(trial(&fixture, program, "stay", stays));
    }
    trials.retain(|trial| names.is_empty() || names.iter().any(|name| trial.name().contains(name)));
    let conclusion = libtest_mimic::run(&arguments, trials);
    // Before the process ends without running destructors.
    drop(fixture);
    Ok(conclusion.exit_code())
}
