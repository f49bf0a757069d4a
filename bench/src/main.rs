//! `script/bench [--json] [--peer-only] [--small] [FIGURE…]`: one line a figure, `NAME ours=… peer=… ratio=… goal=… holds|short`,
//! and exit status 1 when one falls short. Ours and the peer run in alternation on warmed memory; what is printed are medians.
//! Which figures there are, and what each means: [`FAMILIES`] and the modules there.
//!
//! `--small` tries all that is done for a figure with a sixteenth of the memory, in one round: what it prints means nothing.

#![expect(clippy::print_stdout, reason = "figures are what this program is for")]

mod criu;
mod durable;
mod figure;
mod full;
mod memory;
mod node;
mod pause;
mod program;
mod runtime;
mod samples;
mod size;
mod slowdown;
mod start;
mod subject;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Result, bail};
use samara_tests::node::{is_abandoned, sweep_in};
use samara_tests::object_store::ObjectStore;

use crate::criu::Peer;
use crate::figure::Figure;
use crate::runtime::{Place, Runtime};

/// The names of figures that are measured together.
pub(crate) type Group = Vec<&'static str>;

/// Groups of figures of one kind, and what measures a group. It is called with those names in it that were asked for.
type Family = (fn() -> Vec<Group>, fn(&Bench, &[&str]) -> Result<Vec<Figure>>);

/// In the order in which they run.
const FAMILIES: [Family; 8] = [
    (start::groups, start::measure),
    (full::groups, full::measure),
    (pause::groups, pause::measure),
    (memory::groups, memory::measure),
    (size::groups, size::measure),
    (durable::groups, durable::measure),
    (slowdown::groups, slowdown::measure),
    (node::groups, node::measure),
];

/// What a group is measured with.
#[derive(Debug)]
pub(crate) struct Bench {
    peer_only: bool,
    small: bool,
    /// On the disk that everything else of ours is on, and the same for both sides.
    pub(crate) folder: PathBuf,
    /// In memory.
    pub(crate) memory: PathBuf,
    pub(crate) store: ObjectStore,
}

impl Bench {
    /// A size for this run, in MiB.
    pub(crate) fn mebibytes(&self, size: u64) -> u64 {
        if self.small { (size / 16).max(1) } else { size }
    }

    /// How often something is done in this run.
    pub(crate) fn rounds(&self, rounds: usize) -> usize {
        if self.small { 1 } else { rounds }
    }

    /// Whether the product is not to be measured.
    pub(crate) fn is_peer_only(&self) -> bool {
        self.peer_only
    }

    /// `None` where only the peer is measured.
    pub(crate) fn ours(&self) -> Result<Option<Runtime<'_>>> {
        self.ours_at(Place::Server(&self.store))
    }

    /// The same with capsules in a folder.
    pub(crate) fn ours_in_folder(&self) -> Result<Option<Runtime<'_>>> {
        self.ours_at(Place::Folder(self.folder.join("capsules")))
    }

    fn ours_at<'a>(&self, place: Place<'a>) -> Result<Option<Runtime<'a>>> {
        if self.peer_only { Ok(None) } else { Runtime::ours(&self.folder, place).map(Some) }
    }

    /// CRIU, and its images on the disk.
    pub(crate) fn peer(&self) -> Result<Peer<'_>> {
        Peer::start(&self.folder, &self.folder, &self.store)
    }

    /// CRIU, and its images in memory, so that no disk is a part of the figure.
    pub(crate) fn peer_in_memory(&self) -> Result<Peer<'_>> {
        Peer::start(&self.folder, &self.memory, &self.store)
    }

    /// Memory for what is saved, for the peer's images and for the store's page cache is made this guest's own.
    pub(crate) fn warm(&self, name: &str, peer: &Peer<'_>, mebibytes: u64) -> Result<()> {
        eprintln!("bench: {name}: warming memory; the peer is CRIU {}", peer.version()?);
        program::warm(&self.folder, mebibytes * 2 + 512)
    }
}

#[derive(Debug)]
struct Options {
    json: bool,
    peer_only: bool,
    small: bool,
    figures: Vec<String>,
}

fn parse() -> Result<Options> {
    let known: Vec<&str> = FAMILIES.iter().flat_map(|(groups, _)| groups()).flatten().collect();
    let mut options = Options { json: false, peer_only: false, small: false, figures: Vec::new() };
    for word in std::env::args().skip(1) {
        match word.as_str() {
            "--json" => options.json = true,
            "--peer-only" => options.peer_only = true,
            "--small" => options.small = true,
            name if known.contains(&name) => options.figures.push(word),
            other => bail!(
                "no figure {other}; usage: bench [--json] [--peer-only] [--small] [{}]",
                known.join(" ")
            ),
        }
    }
    Ok(options)
}

/// A folder of this run below `runs`, once what killed runs have left is gone.
fn folder(runs: &Path) -> Result<tempfile::TempDir> {
    std::fs::create_dir_all(runs)?;
    for entry in std::fs::read_dir(runs)?.flatten().filter(|entry| is_abandoned(&entry.path())) {
        Runtime::remove_all(&entry.path());
    }
    sweep_in(runs)?;
    let prefix = format!("run-{}-", std::process::id());
    Ok(tempfile::Builder::new().prefix(&prefix).rand_bytes(4).tempdir_in(runs)?)
}

fn run() -> Result<bool> {
    let options = parse()?;
    let on_disk = folder(&samara_tests::cache().join("bench"))?;
    let in_memory = folder(Path::new("/dev/shm/samara-bench"))?;
    program::compile(on_disk.path())?;
    let mut all_hold = true;
    for (groups, measure) in FAMILIES {
        for group in groups() {
            let asked = |name: &&str| {
                options.figures.is_empty() || options.figures.iter().any(|asked| asked == name)
            };
            let wanted: Vec<&str> = group.into_iter().filter(asked).collect();
            if wanted.is_empty() {
                continue;
            }
            let bench = Bench {
                peer_only: options.peer_only,
                small: options.small,
                folder: on_disk.path().to_path_buf(),
                memory: in_memory.path().to_path_buf(),
                // A new one for each group: what was deleted takes room in a store until it is compacted.
                store: ObjectStore::start()?,
            };
            // A figure that can't be had must not cost the hours that the others take.
            let figures = measure(&bench, &wanted).unwrap_or_else(|error| {
                eprintln!("bench: {}: {error:#}", wanted.join(" "));
                all_hold = false;
                Vec::new()
            });
            for figure in figures {
                println!("{}", if options.json { figure.json() } else { figure.line() });
                all_hold &= figure.holds() != Some(false);
            }
        }
    }
    Ok(all_hold)
}

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}
