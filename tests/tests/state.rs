//! Single pieces of kernel state (`tests/state`), one container each, without an engine.
//!
//! `plain/…`: under runc the case passes, and notices when its state is spoiled. Without this, a case that passes after a
//! restore would show nothing.
//! `stays/…`: saved twice, and runs on.
//! `moves/…`: saved, ended and restored in another container, twice.
//! `refused/…`: cases that can't be saved: the save names why, and the container runs on.

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use anyhow::{Context as _, Result, ensure};
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
                options: Options { privileged: flags.contains('p'), terminal: flags.contains('t') },
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

fn trial(
    name: String,
    site: &Arc<Site>,
    case: &Case,
    run: fn(&Case, &Site) -> Result<()>,
) -> Trial {
    let (site, case) = (Arc::clone(site), case.clone());
    Trial::test(name, move || run(&case, &site).map_err(|error| Failed::from(format!("{error:#}"))))
}

fn main() -> std::process::ExitCode {
    let mut arguments = Arguments::from_args();
    // Containers wait more than they work.
    arguments.test_threads.get_or_insert(3);
    let prepared = list().and_then(|cases| Ok((cases, Arc::new(Site::new(build)?))));
    let (cases, site) = match prepared {
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
    let conclusion = libtest_mimic::run(&arguments, trials);
    drop(site);
    conclusion.exit_code()
}
