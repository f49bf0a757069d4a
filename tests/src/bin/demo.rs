//! `script/demo`: a pipeline of real programs is saved in the middle, three times, its engine is deleted each time, and an
//! engine that shares nothing with it but the object store goes on. Ends with what was to be shown, each as `holds` or not.
//!
//! The job aligns simulated reads to the E. coli and lambda phage genomes with `bwa mem -t 2`, piped into `samtools sort -@ 2`
//! with temporary files, for about a minute on two cores. The moments are drawn over the job's CPU time, which a pause does not
//! move. One of the three times, drawn too, the machine goes without notice: the job runs on after its capsule and is killed.

#![expect(clippy::print_stdout, reason = "telling what happens is what this program is for")]

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use samara_tests::container::{Container, Launch};
use samara_tests::image::Image;
use samara_tests::node::{Engine, Node, NodeOptions};
use samara_tests::object_store::ObjectStore;
use samara_tests::random::Random;

const SAVES: usize = 3;

/// More CPU time than the uninterrupted run's, by this factor, means that something was done twice. The same work takes up
/// to a quarter more of it while others use the machine's caches, so what was measured under other conditions is measured again.
const CPU_FACTOR_MAX: f64 = 1.1;

/// Many times what the job takes on the machine that its size was chosen on: others may be busy there.
const JOB_TIME_MAX: Duration = Duration::from_secs(900);

/// The nonce is drawn when the program starts, and handed to bwa, which writes it into each record: one that was written
/// by another start would be seen. It is left out of the digest, which must be the same for every run.
const JOB: &str = r#"
set -euo pipefail
nonce=$(od -An -N8 -tx8 /dev/urandom | tr -d ' ')
echo "nonce $nonce"
mkdir -p /work && cd /work
bwa mem -t 2 -R "@RG\tID:$nonce\tSM:demo" /data/genomes.fa /data/1.fq.gz /data/2.fq.gz 2>bwa.log |
  samtools sort -@ 2 -m 64M -T /work/part -o sorted.bam - 2>sort.log
echo "done $nonce batches=$(grep -c Processed bwa.log) records=$(samtools view -c sorted.bam) marked=$(samtools view -c -r "$nonce" sorted.bam) digest=$(samtools view -x RG sorted.bam | sha256sum | cut -c1-64)"
"#;

struct Options {
    seed: Option<u64>,
    /// Without the product: the job runs to its end on both engines, under runc. Shows the demo's own plumbing.
    uninterrupted: bool,
}

/// What the job's last line says.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    nonce: String,
    /// How often bwa noted that it had aligned a batch of reads: a batch that was done twice would be noted twice.
    batches: String,
    records: String,
    marked: String,
    digest: String,
}

struct Narrator {
    begin: Instant,
}

impl Narrator {
    fn say(&self, text: &str) {
        println!("{:7.1} s  {text}", self.begin.elapsed().as_secs_f64());
    }
}

fn job(name: &str) -> Launch {
    Launch::new(name, &["bash", "-c", JOB]).image(Image::Demo)
}

fn result_of(container: &Container<'_>, nonce: Option<&str>) -> Result<Outcome> {
    // Said once, at the start of the first life.
    let nonce = match nonce {
        Some(nonce) => nonce.to_owned(),
        None => container
            .wait_for_line("nonce ", Duration::from_secs(60))?
            .trim_start_matches("nonce ")
            .to_owned(),
    };
    // One call that waits: looking again and again would take the job's processor.
    let status = container.wait_exit(JOB_TIME_MAX)?;
    let logs = container.logs()?;
    let line = logs
        .lines()
        .find(|line| line.starts_with("done "))
        .filter(|_| status == 0)
        .with_context(|| format!("the job ended with status {status} and had said:\n{logs}"))?;
    let mut words = line.split(' ').skip(1);
    let said = words.next().unwrap_or_default().to_owned();
    let mut field = |name: &str| -> Result<String> {
        let word = words.next().with_context(|| format!("no {name} in '{line}'"))?;
        Ok(word.strip_prefix(name).with_context(|| format!("no {name} in '{line}'"))?.to_owned())
    };
    if said != nonce {
        bail!("the output has nonce {said}, the program drew {nonce} when it started");
    }
    Ok(Outcome {
        nonce: said,
        batches: field("batches=")?,
        records: field("records=")?,
        marked: field("marked=")?,
        digest: field("digest=")?,
    })
}

/// An engine with nothing on it but the image.
fn fresh_engine(narrator: &Narrator, name: &str, store: Option<&ObjectStore>) -> Result<Node> {
    let begin = Instant::now();
    let node = Node::start(name, NodeOptions { engine: Engine::Installed, product: store })?;
    let id = node.load(Image::Demo)?;
    narrator.say(&format!(
        "engine {name} is up, with image {} ({:.1} s)",
        &id[..19.min(id.len())],
        begin.elapsed().as_secs_f64()
    ));
    Ok(node)
}

/// The job from start to end under runc: what it must give, and what it costs.
fn reference(narrator: &Narrator, name: &str) -> Result<(Outcome, Duration)> {
    let node = fresh_engine(narrator, name, None)?;
    let begin = Instant::now();
    let container = job("reference").start(&node)?;
    let result = result_of(&container, None)?;
    let cpu = node.cpu_time()?;
    narrator.say(&format!(
        "undisturbed run on {name}: {:.1} s, {:.1} CPU s, {} records, digest {}…",
        begin.elapsed().as_secs_f64(),
        cpu.as_secs_f64(),
        result.records,
        &result.digest[..16]
    ));
    drop(container);
    node.wipe()?;
    narrator.say(&format!("engine {name} and all it held is deleted"));
    Ok((result, cpu))
}

struct Check {
    what: String,
    holds: bool,
}

fn uninterrupted(narrator: &Narrator) -> Result<Vec<Check>> {
    let (first, first_cpu) = reference(narrator, "one")?;
    let (second, second_cpu) = reference(narrator, "two")?;
    Ok(vec![
        Check {
            what: format!("digests of both engines are the same: {}", first.digest),
            holds: first.digest == second.digest,
        },
        Check {
            what: format!("nonces differ: {} and {}", first.nonce, second.nonce),
            holds: first.nonce != second.nonce,
        },
        Check {
            what: format!("all {} records carry the nonce", first.records),
            holds: first.records == first.marked && second.records == second.marked,
        },
        Check {
            what: format!(
                "CPU time repeats within {CPU_FACTOR_MAX}: {:.1} s and {:.1} s",
                first_cpu.as_secs_f64(),
                second_cpu.as_secs_f64()
            ),
            holds: second_cpu <= first_cpu.mul_f64(CPU_FACTOR_MAX)
                && first_cpu <= second_cpu.mul_f64(CPU_FACTOR_MAX),
        },
    ])
}

fn moved(narrator: &Narrator, seed: u64) -> Result<Vec<Check>> {
    let mut random = Random::new(seed);
    let mut moments: Vec<f64> = (0..SAVES).map(|_| 0.03 + 0.92 * random.fraction()).collect();
    moments.sort_by(f64::total_cmp);
    let killed = usize::try_from(random.draw() % 3).expect("below 3");
    let overrun = Duration::from_secs_f64(0.5 + 3.0 * random.fraction());

    let (expected, expected_cpu) = reference(narrator, "one")?;
    let store = ObjectStore::start()?;
    let url = store.url("jobs/42");
    narrator
        .say(&format!("an object store stands at {}; the job's address is {url}", store.endpoint));

    let mut nonce = String::new();
    let mut cpu = Duration::ZERO;
    let mut lost = Duration::ZERO;
    for (number, moment) in moments.iter().enumerate() {
        let name = ["one", "two"][number % 2];
        let node = fresh_engine(narrator, name, Some(&store))?;
        let container = start_life(narrator, &node, &url, number)?;
        if number == 0 {
            nonce = container
                .wait_for_line("nonce ", Duration::from_secs(60))?
                .trim_start_matches("nonce ")
                .to_owned();
            narrator.say(&format!("the program drew nonce {nonce}"));
        }
        let due = expected_cpu.mul_f64(*moment);
        let init = container.init()?;
        samara_tests::until(
            &format!("{:.1} CPU s of the job", due.as_secs_f64()),
            JOB_TIME_MAX,
            || {
                if !init.exists() {
                    bail!("the job ended: {}", container.logs()?);
                }
                Ok((cpu - lost + node.cpu_time()? >= due).then_some(()))
            },
        )?;
        let before_save = node.cpu_time()?;
        let stop = number != killed;
        let ended = container.save(&url, if stop { &["--stop"] } else { &[] })?;
        ended.successful()?;
        let summary = format!("{}{}", ended.stdout, ended.stderr);
        narrator.say(&format!(
            "saved at {:.0} % of the job{} in {:.2} s: {}",
            moment * 100.0,
            if stop { ", and stopped," } else { "" },
            ended.took.as_secs_f64(),
            summary.trim_end().lines().last().unwrap_or_default().trim()
        ));
        if stop {
            samara_tests::until("end of the saved container", Duration::from_secs(60), || {
                Ok((!container.runs()?).then_some(()))
            })?;
        } else {
            // Not a wait for something: the job does work here that will be lost.
            let until_cpu = node.cpu_time()? + overrun;
            samara_tests::until("work after the capsule", JOB_TIME_MAX, || {
                Ok((node.cpu_time()? >= until_cpu || !init.exists()).then_some(()))
            })?;
            node.docker(["kill", &container.id]).run()?;
            samara_tests::until("end of the killed container", Duration::from_secs(60), || {
                Ok((!container.runs()?).then_some(()))
            })?;
            lost += node.cpu_time()?.saturating_sub(before_save);
            narrator.say(&format!(
                "killed without notice, {:.1} CPU s after the capsule",
                lost.as_secs_f64()
            ));
        }
        cpu += node.cpu_time()?;
        drop(container);
        node.wipe()?;
        narrator.say(&format!(
            "engine {name} and all it held is deleted; {:.1} CPU s were used so far",
            cpu.as_secs_f64()
        ));
    }

    let name = ["one", "two"][SAVES % 2];
    let node = fresh_engine(narrator, name, Some(&store))?;
    let container = start_life(narrator, &node, &url, SAVES)?;
    let result = result_of(&container, Some(&nonce))?;
    cpu += node.cpu_time()?;
    narrator.say(&format!("the job is done on {name}"));
    drop(container);
    node.wipe()?;

    let allowed = |expected: Duration| expected.mul_f64(CPU_FACTOR_MAX) + lost;
    let expected_cpu = if cpu <= allowed(expected_cpu) {
        expected_cpu
    } else {
        narrator.say(
            "more CPU time was used than in the undisturbed run; whether the machine became slower meanwhile shows another one",
        );
        reference(narrator, "one")?.1
    };
    Ok(vec![
        Check {
            what: format!("the output is that of the undisturbed run: {}", result.digest),
            holds: result.digest == expected.digest,
        },
        Check {
            what: format!(
                "bwa noted {} batches of reads, as in the undisturbed run",
                result.batches
            ),
            holds: result.batches == expected.batches,
        },
        Check {
            what: format!(
                "the nonce drawn at the first start stands in all {} records: {nonce}",
                result.records
            ),
            holds: result.nonce == nonce
                && result.marked == result.records
                && result.records == expected.records,
        },
        Check {
            what: format!(
                "CPU time of all lives, {:.1} s, is at most {CPU_FACTOR_MAX} x {:.1} s + {:.1} s after a capsule",
                cpu.as_secs_f64(),
                expected_cpu.as_secs_f64(),
                lost.as_secs_f64()
            ),
            holds: cpu <= allowed(expected_cpu),
        },
    ])
}

fn start_life<'a>(
    narrator: &Narrator,
    node: &'a Node,
    url: &str,
    number: usize,
) -> Result<Container<'a>> {
    let begin = Instant::now();
    let container = job("job").capsule(url.to_owned()).start(node)?;
    let how = if number == 0 { "started" } else { "restored" };
    narrator.say(&format!(
        "{how} on {} in {:.2} s (docker run)",
        node.name(),
        begin.elapsed().as_secs_f64()
    ));
    Ok(container)
}

fn parse() -> Result<Options> {
    let mut options = Options { seed: None, uninterrupted: false };
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--seed" => {
                options.seed = Some(
                    words
                        .next()
                        .context("--seed wants a number")?
                        .parse()
                        .context("--seed wants a number")?,
                )
            }
            "--uninterrupted" => options.uninterrupted = true,
            other => bail!("unknown argument {other}; usage: demo [--seed N] [--uninterrupted]"),
        }
    }
    Ok(options)
}

fn run() -> Result<bool> {
    let options = parse()?;
    let narrator = Narrator { begin: Instant::now() };
    let checks = if options.uninterrupted {
        uninterrupted(&narrator)?
    } else {
        let seed = options.seed.map_or_else(Random::fresh_seed, Ok)?;
        narrator.say(&format!("seed {seed} (again: script/demo --seed {seed})"));
        moved(&narrator, seed)?
    };
    println!();
    for check in &checks {
        println!("{}  {}", if check.holds { "holds " } else { "FAILED" }, check.what);
    }
    Ok(checks.iter().all(|check| check.holds))
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
