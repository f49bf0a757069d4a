//! Single pieces of kernel state (`tests/state`), one container each, without an engine.
//!
//! `plain/…`: under runc the case passes, and notices when its state is spoiled. Without this, a case that passes after a
//! restore would show nothing.
//! `stays/…`: saved twice, and runs on.
//! `moves/…`: saved, ended and restored in another container, twice.
//! `random/…`: random state, drawn from a seed (`SAMARA_TEST_SEED`, `SAMARA_TEST_RANDOM` draws of `SAMARA_TEST_STEPS` steps):
//! after a move all that can be observed is the same, or the save refused it. A failure is made smaller before it is told.
//! `refused/…`: cases that can't be saved: the save names why, and the container runs on.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use libtest_mimic::{Arguments, Failed, Trial};
use samara_tests::bundle::{Options, Running, Site};
use samara_tests::process::Call;

const PRODUCT: &str = "samara-runtime";

#[derive(Clone, Debug)]
struct Case {
    name: String,
    options: Options,
    /// What a save says when it refuses; empty where it is saved.
    refused: String,
}

fn build(root: &Path) -> Result<()> {
    let sources = samara_tests::repository().join("tests/state");
    let out = root.join("bin");
    Call::new("make")
        .args(["-s", "-C"])
        .args([&sources])
        .args([format!("OUT={}", out.display())])
        .output()
        .context("compiling tests/state")?;
    Ok(())
}

/// The cases, as a program that was just built lists them.
fn list() -> Result<Vec<Case>> {
    let folder = tempfile::tempdir()?;
    std::fs::create_dir(folder.path().join("bin"))?;
    build(folder.path())?;
    let output = Command::new(folder.path().join("bin/state")).arg("list").output()?;
    let text = String::from_utf8(output.stdout)?;
    text.lines()
        .map(|line| {
            let mut fields = line.split('\t');
            let mut field = || fields.next().context("a line of `state list` lacks a field");
            let (name, flags, refused) = (field()?, field()?, field()?);
            Ok(Case {
                name: name.to_owned(),
                options: Options {
                    privileged: flags.contains('p'),
                    terminal: flags.contains('t'),
                    env: Vec::new(),
                },
                refused: refused.to_owned(),
            })
        })
        .collect()
}

fn start<'a>(
    case: &Case,
    site: &'a Site,
    runtime: &str,
    suffix: &str,
    more: &[&str],
    capsule: Option<&str>,
) -> Result<Running<'a>> {
    let id = format!("{}-{suffix}", case.name);
    let args = [&["/bin/state", "run", &case.name], more].concat();
    let running = site.start(runtime, &id, &args, &case.options, capsule)?;
    if capsule.is_none() {
        running.wait_for("ready")?;
    }
    Ok(running)
}

fn finish(running: &Running<'_>) -> Result<String> {
    running.touch("finish")?;
    running.wait_stopped()?;
    running.output()
}

fn passes(running: &Running<'_>) -> Result<()> {
    let text = finish(running)?;
    ensure!(text.lines().any(|line| line.trim_end() == "OK"), "it said: {text}");
    Ok(())
}

fn plain(case: &Case, site: &Site) -> Result<()> {
    passes(&start(case, site, "runc", "plain", &[], None)?)?;
    let text = finish(&start(case, site, "runc", "spoiled", &["--spoil"], None)?)?;
    ensure!(
        text.contains("differs: ") && !text.lines().any(|line| line.trim_end() == "OK"),
        "spoiled, it said: {text}"
    );
    Ok(())
}

fn stays(case: &Case, site: &Site) -> Result<()> {
    let running = start(case, site, PRODUCT, "stays", &[], None)?;
    for _ in 0..2 {
        let url = site.url(&format!("stays/{}", case.name));
        running.call(&["checkpoint", "--leave-running", "--capsule", &url])?.successful()?;
    }
    passes(&running)
}

fn moves(case: &Case, site: &Site) -> Result<()> {
    let url = site.url(&format!("moves/{}", case.name));
    let mut running = start(case, site, PRODUCT, "moves-0", &[], None)?;
    for number in 1..=2 {
        running.call(&["checkpoint", "--capsule", &url])?.successful()?;
        running.wait_stopped()?;
        drop(running);
        running = start(case, site, PRODUCT, &format!("moves-{number}"), &[], Some(&url))
            .with_context(|| format!("restore {number}"))?;
    }
    passes(&running)
}

fn refused(case: &Case, site: &Site) -> Result<()> {
    let running = start(case, site, PRODUCT, "refused", &[], None)?;
    let url = site.url(&format!("refused/{}", case.name));
    for flags in [&["--leave-running"][..], &[]] {
        let args = [&["checkpoint", "--capsule", &url], flags].concat();
        let ended = running.call(&args)?;
        ensure!(
            !ended.status.success() && ended.stderr.contains(&case.refused),
            "{}: it said: {}",
            ended.status,
            ended.stderr
        );
    }
    passes(&running)
}

/// What came of a random state that was to be moved.
#[derive(Debug)]
enum Outcome {
    Exact,
    Refused,
    Wrong(String),
}

/// One draw: its seed, how many steps, and which of them are left out.
#[derive(Clone, Debug)]
struct Draw {
    seed: u64,
    steps: u32,
    skipped: Vec<u32>,
}

impl Draw {
    fn start<'a>(&self, site: &'a Site, id: &str, capsule: Option<&str>) -> Result<Running<'a>> {
        let skipped: Vec<String> = self.skipped.iter().map(u32::to_string).collect();
        let (seed, steps) = (self.seed.to_string(), self.steps.to_string());
        let args = ["/bin/state", "random", &seed, &steps, &skipped.join(",")];
        // The kernel writes into registered areas whenever it likes, and this program compares its memory.
        let env = vec!["GLIBC_TUNABLES=glibc.pthread.rseq=0".to_owned()];
        let options = Options { env, ..Options::default() };
        let running = site.start(PRODUCT, id, &args, &options, capsule)?;
        if capsule.is_none() {
            running.wait_for("ready")?;
        }
        Ok(running)
    }

    /// Whether the program itself agrees with what it sees when nothing happens to it.
    fn is_sound(&self, site: &Site) -> Result<()> {
        agrees(&self.start(site, &format!("random-{}-sound", self.seed), None)?)
    }

    fn moved(&self, site: &Site) -> Result<Outcome> {
        let url = site.url(&format!("random/{}", self.seed));
        let running = self.start(site, &format!("random-{}-0", self.seed), None)?;
        let saved = running.call(&["checkpoint", "--capsule", &url])?;
        if !saved.status.success() {
            let named = saved.stderr.contains("state that Samara can't save");
            // Refused before anything was touched: it must not have noticed.
            return Ok(match (named, agrees(&running)) {
                (true, Ok(())) => Outcome::Refused,
                (true, Err(error)) => Outcome::Wrong(format!("refused, and then {error:#}")),
                (false, _) => Outcome::Wrong(saved.stderr),
            });
        }
        running.wait_stopped()?;
        drop(running);
        let id = format!("random-{}-1", self.seed);
        Ok(match self.start(site, &id, Some(&url)).and_then(|running| agrees(&running)) {
            Ok(()) => Outcome::Exact,
            Err(error) => Outcome::Wrong(format!("{error:#}")),
        })
    }

    fn is_wrong(&self, site: &Site) -> bool {
        self.is_sound(site).is_ok() && matches!(self.moved(site), Ok(Outcome::Wrong(_)))
    }

    /// Leaves out steps, half of them at first, as long as it stays wrong.
    fn shrunk(mut self, site: &Site) -> Draw {
        let mut size = self.steps / 2;
        while size > 0 {
            let mut first = 0;
            while first < self.steps {
                let end = self.steps.min(first + size);
                let mut smaller = self.clone();
                smaller.skipped.extend((first..end).filter(|step| !self.skipped.contains(step)));
                if smaller.skipped.len() > self.skipped.len() && smaller.is_wrong(site) {
                    self = smaller;
                }
                first = end;
            }
            size /= 2;
        }
        self
    }
}

/// Lets a random state end, and wants it to find everything as it was.
fn agrees(running: &Running<'_>) -> Result<()> {
    running.touch("finish")?;
    // Nobody waits for a process that has found a difference.
    samara_tests::until("end", std::time::Duration::from_secs(60), || {
        let text = running.output()?;
        ensure!(!text.contains("differs: "), "{text}");
        Ok(running.stopped()?.then_some(()))
    })?;
    let text = running.output()?;
    ensure!(text.lines().any(|line| line == "OK"), "it ended without a word: {text}");
    Ok(())
}

/// How many random states came back exactly, and how many were refused.
#[derive(Debug, Default)]
struct Tally {
    exact: AtomicU64,
    refused: AtomicU64,
}

fn random(site: &Site, tally: &Tally, seed: u64, steps: u32) -> Result<()> {
    let draw = Draw { seed, steps, skipped: Vec::new() };
    draw.is_sound(site).with_context(|| format!("seed {seed}, without being moved"))?;
    match draw.moved(site)? {
        Outcome::Exact => {
            tally.exact.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        Outcome::Refused => {
            tally.refused.fetch_add(1, Ordering::Relaxed);
            Ok(())
        }
        Outcome::Wrong(first) => {
            // At once: making it smaller takes a while.
            eprintln!("random/{seed} was wrong: {first}");
            let smallest = draw.shrunk(site);
            let kept: Vec<u32> =
                (0..steps).filter(|step| !smallest.skipped.contains(step)).collect();
            let again = smallest.moved(site);
            bail!("seed {seed}: {first}; smallest: steps {kept:?} of {steps}: {again:?}");
        }
    }
}

/// A number from the environment.
fn size(name: &str, default: u64) -> Result<u64> {
    std::env::var(name).map_or(Ok(default), |text| Ok(text.parse()?))
}

/// A case that fails is tried once more, and both are told: many wait by the clock for a process to get into its call, which two
/// thousand containers on two cores make a matter of luck. Who fails twice has failed.
fn trial(
    name: String,
    site: &Arc<Site>,
    case: &Case,
    run: fn(&Case, &Site) -> Result<()>,
) -> Trial {
    let (site, case) = (Arc::clone(site), case.clone());
    Trial::test(name.clone(), move || {
        let again = |first: anyhow::Error| {
            eprintln!("{name} failed once: {first:#}");
            run(&case, &site)
        };
        run(&case, &site).or_else(again).map_err(|error| Failed::from(format!("{error:#}")))
    })
}

/// Huge pages for the cases that need some, as long as it lives.
struct HugePages;

impl HugePages {
    const PATH: &str = "/proc/sys/vm/nr_hugepages";
    /// The most that cases that run at once need.
    const PAGES: i64 = 48;

    fn add(pages: i64) -> Result<()> {
        let now: i64 = std::fs::read_to_string(HugePages::PATH)?.trim().parse()?;
        let wanted = now.saturating_add(pages).max(0);
        Ok(std::fs::write(HugePages::PATH, wanted.to_string())?)
    }

    fn make() -> Result<HugePages> {
        HugePages::add(HugePages::PAGES).context("making huge pages")?;
        Ok(HugePages)
    }
}

impl Drop for HugePages {
    fn drop(&mut self) {
        let _ = HugePages::add(-HugePages::PAGES);
    }
}

fn main() -> std::process::ExitCode {
    let mut arguments = Arguments::from_args();
    // Containers wait more than they work.
    arguments.test_threads.get_or_insert(3);
    let prepared =
        list().and_then(|cases| Ok((cases, Arc::new(Site::new(build)?), HugePages::make()?)));
    let (cases, site, huge_pages) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => {
            eprintln!("{error:#}");
            return std::process::ExitCode::FAILURE;
        }
    };
    let mut trials = Vec::new();
    for case in &cases {
        trials.push(trial(format!("plain/{}", case.name), &site, case, plain));
        if case.refused.is_empty() {
            trials.push(trial(format!("stays/{}", case.name), &site, case, stays));
            trials.push(trial(format!("moves/{}", case.name), &site, case, moves));
        } else {
            trials.push(trial(format!("refused/{}", case.name), &site, case, refused));
        }
    }
    let draws = || -> Result<(u64, u64, u32)> {
        let first = size("SAMARA_TEST_SEED", 1)?;
        let steps = u32::try_from(size("SAMARA_TEST_STEPS", 60)?)?;
        Ok((first, size("SAMARA_TEST_RANDOM", 20)?, steps))
    };
    let (first, count, steps) = match draws() {
        Ok(draws) => draws,
        Err(error) => {
            eprintln!("{error:#}");
            return std::process::ExitCode::FAILURE;
        }
    };
    let tally = Arc::new(Tally::default());
    for seed in first..first.saturating_add(count) {
        let (site, tally) = (Arc::clone(&site), Arc::clone(&tally));
        trials.push(Trial::test(format!("random/{seed}"), move || {
            random(&site, &tally, seed, steps).map_err(|error| Failed::from(format!("{error:#}")))
        }));
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    let (exact, refused) =
        (tally.exact.load(Ordering::Relaxed), tally.refused.load(Ordering::Relaxed));
    if exact + refused > 0 {
        eprintln!("random states: {exact} came back exactly, {refused} were refused");
    }
    drop(site);
    drop(huge_pages);
    conclusion.exit_code()
}
