//! A program changes its memory in every way there is, at random, while capsule after capsule is made of it: each holds what the
//! processes had at its instant, page by page, and no call of the program fails because somebody keeps track of its writes.
//!
//! `SAMARA_TEST_INCREMENTS` says how many capsules (60), `SAMARA_TEST_SEED` where to begin (drawn). When one is wrong, the kinds of changes
//! are reduced to those that it takes.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, HashMap};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant, SystemTime};

use samara_capsule::config::{Provenance, Requirements};
use samara_capsule::digest::Digest;
use samara_capsule::record::{Alive, Backing, Container, ProcessState};
use samara_capsule::transfer::{PAGE_BYTES, Source, SpaceId};
use samara_engine::capture::{CaptureError, CaptureRequest, Captured, capture};
use samara_engine::snapshot::SnapshotRequest;
use samara_engine::tracking::Tracking;
use samara_kernel::pagemap::Pagemap;
use samara_store::config::StoreConfig;
use samara_store::writer::CapsuleFacts;
use samara_store::{CapsuleReader, CapsuleWriter, Lease, Location, Store};

const PAGE: u64 = PAGE_BYTES as u64;

/// Every kind of change that the program knows.
const ALL: u64 = (1 << 22) - 1;
/// Capsules of one run of the program.
const CAPSULES: usize = 20;

/// The program as init of its own pid namespace. It ends with this value.
struct Program {
    unshare: Child,
    init: i32,
    said: PathBuf,
}

impl Program {
    fn start(program: &Path, seed: u64, operations: u64, folder: &Path) -> Program {
        let said = folder.join("said");
        let unshare = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "unshare"])
            .args(["--pid", "--fork", "--mount-proc", "--kill-child", "--"])
            .arg(program)
            .args([seed.to_string(), operations.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(&said).unwrap())
            .spawn()
            .unwrap();
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let init = std::fs::read_to_string(&children).unwrap().trim().parse().ok();
            let resident = |pid: i32| {
                let statm = std::fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
                statm.split(' ').nth(1)?.parse::<u64>().ok()
            };
            match init {
                // All of what it begins with.
                Some(init) if resident(init).is_some_and(|pages| pages > 2048) => {
                    return Program { unshare, init, said };
                }
                _ => assert!(Instant::now() < deadline, "the program does not begin"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Its processes, by the numbers that they have in their namespace.
    fn processes(&self) -> HashMap<i32, i32> {
        let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = namespace(self.init);
        let pids = std::fs::read_dir("/proc").unwrap().flatten();
        let pids = pids.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        pids.filter(|pid| namespace(*pid) == own)
            .filter_map(|pid| {
                let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
                let numbers = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
                Some((numbers.split_whitespace().last()?.parse().ok()?, pid))
            })
            .collect()
    }

    fn complaint(&self) -> Option<String> {
        let said = std::fs::read_to_string(&self.said).unwrap();
        (!said.is_empty()).then_some(said)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// A page of private memory.
struct Page {
    number: u64,
    place: String,
    content: Vec<u8>,
    absent: Absent,
}

/// What it means that a capsule does not have a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Absent {
    Zeros,
    OfFile,
    Wrong,
}

/// All that a process had at the instant of a capture, as far as a capsule has to hold it.
struct Process {
    pages: Vec<Page>,
    /// The same of shared memory, whose pages count from its beginning.
    shared: Vec<(usize, u64, Vec<u8>)>,
    /// Where the kernel writes to whenever a thread goes back to its program.
    restless: Vec<u64>,
    space: u32,
}

impl Process {
    /// The content of a page but for what the kernel writes all the time: on which processor a thread runs (struct rseq of linux/rseq.h).
    fn at_rest(&self, number: u64, content: &[u8]) -> Vec<u8> {
        const RSEQ_BYTES: u64 = 32;
        let mut content = content.to_vec();
        for address in &self.restless {
            let from = address.saturating_sub(number * PAGE).min(PAGE);
            let to = (address + RSEQ_BYTES).saturating_sub(number * PAGE).min(PAGE);
            content[from as usize..to as usize].fill(0);
        }
        content
    }
}

/// Reads the memory of the processes, which stand.
fn look(program: &Program, container: &Container) -> Result<Vec<(i32, Process)>, String> {
    let pids = program.processes();
    let mut found = Vec::new();
    for record in &container.processes {
        let ProcessState::Alive(alive) = &record.state else { continue };
        if alive.sharing.memory.is_none() {
            let pid = *pids.get(&record.pid).ok_or(format!("process {} is gone", record.pid))?;
            found.push((record.pid, look_at(pid, alive)));
        }
    }
    Ok(found)
}

fn look_at(pid: i32, alive: &Alive) -> Process {
    let memory = std::fs::File::open(format!("/proc/{pid}/mem")).unwrap();
    let pagemap = Pagemap::open(pid).unwrap();
    let live = |page: u64| {
        let mut bytes = vec![0; PAGE_BYTES];
        memory.read_exact_at(&mut bytes, page * PAGE).map(|()| bytes).unwrap()
    };
    let rseq = alive.threads.iter().filter_map(|thread| thread.rseq.as_ref());
    let restless = rseq.map(|rseq| rseq.address).collect();
    let mut process =
        Process { pages: Vec::new(), shared: Vec::new(), restless, space: alive.space };
    for mapping in &alive.mappings {
        let exact = match &mapping.backing {
            Backing::Anonymous { .. } => false,
            Backing::PrivateFile { .. }
            | Backing::PrivateUnlinked { .. }
            | Backing::PrivateMemory { .. } => true,
            Backing::Shared { memory, offset, .. } => {
                for run in pagemap.populated(mapping.start, mapping.end).unwrap() {
                    for page in run.start / PAGE..run.end / PAGE {
                        let of_object = page - mapping.start / PAGE + offset / PAGE;
                        process.shared.push((*memory as usize, of_object, live(page)));
                    }
                }
                continue;
            }
            _ => continue,
        };
        for run in pagemap.populated(mapping.start, mapping.end).unwrap() {
            for page in (run.start / PAGE..run.end / PAGE).filter(|_| !run.guard) {
                let place = format!("page {:#x} of {:?}", page * PAGE, mapping.backing);
                let absent = match (exact, run.file) {
                    (false, _) => Absent::Zeros,
                    (true, true) => Absent::OfFile,
                    (true, false) => Absent::Wrong,
                };
                process.pages.push(Page { number: page, place, content: live(page), absent });
            }
        }
    }
    process
}

/// Compares what a capsule holds with what the processes had.
fn compare(
    processes: &[(i32, Process)],
    container: &Container,
    reader: &CapsuleReader,
) -> Result<(), String> {
    for (pid, process) in processes {
        compare_memory(process, container, reader)
            .map_err(|error| format!("process {pid}: {error}"))?;
    }
    Ok(())
}

fn compare_memory(
    process: &Process,
    container: &Container,
    reader: &CapsuleReader,
) -> Result<(), String> {
    let zeros = vec![0; PAGE_BYTES];
    let mut objects = HashMap::new();
    for (memory, page, there) in &process.shared {
        let object = objects.entry(*memory).or_insert_with(|| {
            pages_of(reader, container.shared_memory.get(*memory).unwrap().space)
        });
        if object.get(page).unwrap_or(&zeros) != there {
            return Err(format!("page {page} of shared memory differs"));
        }
    }
    let mut stored = pages_of(reader, process.space);
    for Page { number, place, content, absent } in &process.pages {
        let found = match (stored.remove(number), absent) {
            (Some(found), _) => found,
            (None, Absent::Zeros) => zeros.clone(),
            (None, Absent::OfFile) => continue,
            (None, Absent::Wrong) => return Err(format!("{place} is missing")),
        };
        let (found, there) = (process.at_rest(*number, &found), process.at_rest(*number, content));
        if found != there {
            return Err(format!("{place} differs: {}", difference(&found, &there)));
        }
    }
    match stored.into_iter().find(|(_, content)| *content != zeros) {
        Some((page, _)) => Err(format!("page {:#x} is nobody's any more", page * PAGE)),
        None => Ok(()),
    }
}

fn pages_of(reader: &CapsuleReader, space: u32) -> BTreeMap<u64, Vec<u8>> {
    let pages = Mutex::new(BTreeMap::new());
    reader
        .transfer(&[SpaceId(space)], &|_, runs, bytes| {
            let mut contents = bytes.chunks_exact(PAGE_BYTES);
            let mut pages = pages.lock().unwrap();
            for page in runs.iter().flat_map(|run| run.first..run.first + run.count) {
                pages.insert(page, contents.next().unwrap().to_vec());
            }
            Ok(())
        })
        .unwrap();
    pages.into_inner().unwrap()
}

/// What a capsule has of a page in place of what is there.
fn difference(found: &[u8], there: &[u8]) -> String {
    let mut other = found.iter().zip(there).enumerate().filter(|(_, (a, b))| a != b);
    let zeros = |page: &[u8]| if page.iter().all(|byte| *byte == 0) { " (zeros)" } else { "" };
    let first = other.next();
    format!(
        "{} bytes from {first:?}; stored{}, live{}",
        1 + other.count(),
        zeros(found),
        zeros(there)
    )
}

/// Makes one capsule after the other.
struct Saving<'a> {
    program: &'a Program,
    store: Store,
    lease: Lease,
    last: Option<Digest>,
    tracking: Tracking,
    found: Found,
}

impl Saving<'_> {
    /// `ahead`: memory is copied while the program runs; `forks`: what was written is read from forks when it runs on; `commits`: the
    /// capsule gets into the store.
    fn save(&mut self, ahead: bool, forks: bool, commits: bool) -> Result<(), String> {
        // As it comes from the process that keeps it.
        let (notes, trackers) = std::mem::take(&mut self.tracking).into_parts(usize::MAX);
        self.tracking = Tracking::from_parts(notes, trackers);
        self.tracking.begin(self.last.is_some(), true);
        let mut writer = match self.last {
            Some(last) => {
                CapsuleWriter::after(CapsuleReader::open_digest(&self.store, last).unwrap())
            }
            None => CapsuleWriter::new(&self.store),
        }
        .unwrap();
        let said = |error: &dyn std::error::Error| {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(error) = source {
                text.push_str(&format!(": {error}"));
                source = error.source();
            }
            text
        };
        let init = self.program.init;
        if ahead {
            self.tracking.copy_ahead(init, &mut writer).map_err(|error| said(&error))?;
        }
        let always =
            SnapshotRequest { budget: Duration::ZERO, always: true, spare_bytes: u64::MAX };
        let snapshot = forks.then_some(always);
        let request = CaptureRequest { init, snapshot, ..CaptureRequest::default() };
        let captured = match capture(&request, &mut self.tracking, &mut || Ok(()), &mut writer) {
            Ok(captured) => captured,
            Err(error @ CaptureError::Freeze(_)) => return Err(said(&error)),
            Err(error) => return Err(format!("{error:?}")),
        };
        let Captured { container, frozen, report, rest, .. } = captured;
        self.found.unchanged += report.unchanged_pages;
        self.found.forked += report.forked_pages;
        let there = look(self.program, &container)?;
        frozen.thaw().map_err(|error| said(&error))?;
        self.tracking.went_on();
        rest.drain(&mut self.tracking, &mut writer).map_err(|error| said(&error))?;
        if commits {
            let facts = CapsuleFacts {
                created: SystemTime::now(),
                parent: self.last,
                provenance: Provenance::default(),
                requirements: Requirements::default(),
                report: None,
            };
            let committed = writer.commit(&mut self.lease, b"", facts).map_err(|e| said(&e))?;
            self.found.differences += committed.new_frames.delta.pages;
            self.tracking.committed();
            self.last = Some(committed.capsule.digest);
            let reader = CapsuleReader::open(&self.store, &committed.capsule).unwrap();
            compare(&there, &container, &reader)?;
        }
        Ok(())
    }
}

/// Pages of capsules.
#[derive(Clone, Copy, Default)]
struct Found {
    /// That did not have to be copied.
    unchanged: u64,
    /// Of which what has changed was stored.
    differences: u64,
    /// That were read from forks.
    forked: u64,
}

/// One run of the program, and capsules of it.
fn run(program: &Path, seed: u64, operations: u64, capsules: usize) -> Result<Found, String> {
    let folder = tempfile::tempdir().unwrap();
    let program = Program::start(program, seed, operations, folder.path());
    let location = Location::parse(&format!("file://{}/capsules", folder.path().display()));
    let store = Store::open(&location.unwrap(), &StoreConfig::default(), true).unwrap();
    let lease = store.take_epoch(&BTreeMap::new()).unwrap().lease;
    let tracking = Tracking::default();
    let mut saving =
        Saving { program: &program, store, lease, last: None, tracking, found: Found::default() };
    for number in 0..capsules {
        let pause = (seed.wrapping_mul(31).wrapping_add(number as u64 * 7919)) % 8000;
        std::thread::sleep(Duration::from_micros(pause));
        let (ahead, forks, commits) = (number % 4 != 3, number % 3 == 1, number % 7 != 5);
        let result = saving.save(ahead, forks, commits);
        result.map_err(|error| {
            let said = program.complaint().unwrap_or_default();
            format!("seed {seed}, capsule {number}: {error} {said}")
        })?;
        if let Some(complaint) = program.complaint() {
            return Err(format!("seed {seed}: a call failed: {complaint}"));
        }
    }
    Ok(saving.found)
}

/// Without this, a page that was written would come back as it was before, or one that is gone would come back.
#[test]
fn every_increment_holds_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let program = folder.path().join("mutate");
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/increments/mutate.c");
    let compiled = Command::new("gcc")
        .args(["-O1", "-static", "-pthread", "-o"])
        .args([&program, &source])
        .status()
        .unwrap();
    assert!(compiled.success());
    let number = |name: &str| std::env::var(name).ok().map(|text| text.parse::<u64>().unwrap());
    let capsules = number("SAMARA_TEST_INCREMENTS").unwrap_or(60);
    let drawn = u64::from(SystemTime::UNIX_EPOCH.elapsed().unwrap().subsec_nanos() % 1_000_000);
    let first = number("SAMARA_TEST_SEED").unwrap_or(drawn);
    let mut all = Found::default();
    for seed in first..first + capsules.div_ceil(CAPSULES as u64) {
        match run(&program, seed, ALL, CAPSULES) {
            Ok(found) => {
                all.unchanged += found.unchanged;
                all.differences += found.differences;
                all.forked += found.forked;
            }
            Err(error) => {
                eprintln!("{error}; looking for the operations that it takes");
                let operations = (0..22).fold(ALL, |operations, operation| {
                    let fewer = operations & !(1 << operation);
                    let fails = (0..3).any(|_| run(&program, seed, fewer, CAPSULES * 2).is_err());
                    if fails { fewer } else { operations }
                });
                panic!("{error}; it takes the operations {operations:#x}");
            }
        }
    }
    assert!(all.unchanged > 0, "nothing was tracked");
    assert!(all.forked > 0, "no fork was made");
    assert!(all.differences > 0, "every page that was written was stored as a whole");
}
