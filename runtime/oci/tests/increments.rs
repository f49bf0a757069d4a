//! A program changes its memory in every way there is, at random, while capsule after capsule is made of it: each holds what the
//! processes had at its instant, page by page, and no call of the program fails because somebody keeps track of its writes.
//!
//! `SAMARA_TEST_INCREMENTS` says how many capsules (60), `SAMARA_TEST_SEED` where to begin (drawn). When one is wrong, the kinds of changes
//! are reduced to those that it takes.
//!
//! What the program has freed lazily (`MADV_FREE`) the kernel may take away at any moment, also between the capture's look and the test's.
//! So which pages those are, and what they hold, is noted when the program has just been stopped: such a page may be zeros, on either side,
//! and nothing but zeros or what it was. In some capsules the kernel is made to take them.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::collections::{BTreeMap, HashMap};
use std::io::{self, BufRead as _, BufReader};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use samara_capsule::config::{Provenance, Requirements};
use samara_capsule::digest::Digest;
use samara_capsule::record::{Alive, Backing, Container, ProcessState};
use samara_capsule::transfer::{
    BaseId, PAGE_BYTES, PageBatch, PageRun, SegmentId, Sink, Source, SpaceId, StoredSegment,
    StreamName,
};
use samara_engine::capture::{CaptureError, CaptureRequest, Captured, capture};
use samara_engine::phase::{self, Phase};
use samara_engine::snapshot::SnapshotRequest;
use samara_engine::tracking::{PreCopy, Tracking};
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
    fn start(program: &Path, words: &[String], folder: &Path) -> Program {
        let said = folder.join("said");
        let unshare = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--", "unshare"])
            .args(["--pid", "--fork", "--mount-proc", "--kill-child", "--"])
            .arg(program)
            .args(words)
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

/// The processes of a namespace, by the numbers that they have in it.
fn processes_of(init: i32) -> HashMap<i32, i32> {
    let namespace = |pid: i32| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
    let own = namespace(init);
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

/// What the program that is being saved has freed lazily, from its stop on.
#[derive(Default)]
struct Freed {
    /// The init that it is of, and whether the kernel is to take the pages away, and where.
    of: Option<(i32, Option<Phase>)>,
    dropping: PathBuf,
    /// By process and page.
    contents: BTreeMap<(i32, u64), Vec<u8>>,
    /// How many the kernel had taken away when they were compared.
    dropped: u64,
    /// For how long each thread had run when all had been copied, in nanoseconds.
    ran: BTreeMap<String, u64>,
}

static FREED: Mutex<Option<Freed>> = Mutex::new(None);

fn freed() -> MutexGuard<'static, Option<Freed>> {
    FREED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Tests of one program at a time. `stall` is the program that drops pages.
fn alone(stall: &Path) -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    static WATCHING: Once = Once::new();
    let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    *freed() = Some(Freed { dropping: stall.to_owned(), ..Freed::default() });
    WATCHING.call_once(|| phase::watch(stands));
    alone
}

const ESRCH: i32 = 3;

/// Notes what was freed lazily, of a program that stands.
fn stands(reached: Phase) {
    let mut freed = freed();
    let Some(freed) = freed.as_mut() else { return };
    let Some((init, dropping)) = freed.of else { return };
    let processes = processes_of(init);
    let run = |pid: i32, word: &str| {
        let status = Command::new(&freed.dropping).args([&pid.to_string(), word]).status();
        assert!(status.unwrap().success());
    };
    if reached == Phase::Stopped {
        run(init, "settle");
        freed.contents.clear();
        for pid in processes.values() {
            let pages = match lazily_freed(*pid) {
                // Has ended, and nobody has waited for it.
                Err(error) if error.raw_os_error() == Some(ESRCH) => continue,
                pages => pages.unwrap(),
            };
            freed.contents.extend(pages.into_iter().map(|(page, bytes)| ((*pid, page), bytes)));
        }
    }
    if reached == Phase::Copied {
        freed.ran = run_times(processes.values().copied());
    }
    if Some(reached) == dropping {
        for pid in processes.values() {
            run(*pid, "lazy");
        }
    }
}

/// For how long each thread has run, in nanoseconds (Documentation/scheduler/sched-stats.rst).
fn run_times(pids: impl Iterator<Item = i32>) -> BTreeMap<String, u64> {
    let mut times = BTreeMap::new();
    for pid in pids {
        for thread in std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten()
        {
            let statistics = std::fs::read_to_string(thread.path().join("schedstat"));
            let time = statistics.ok().and_then(|text| text.split(' ').next()?.parse().ok());
            times.extend(time.map(|time| (thread.path().display().to_string(), time)));
        }
    }
    times
}

/// Pages that the kernel may take away at any moment, with their content (admin-guide/mm/pagemap.rst).
fn lazily_freed(pid: i32) -> std::io::Result<Vec<(u64, Vec<u8>)>> {
    const PRESENT: u64 = 1 << 63;
    const FRAME: u64 = (1 << 55) - 1;
    const ANONYMOUS: u64 = 1 << 12;
    const SWAP_BACKED: u64 = 1 << 14;
    let smaps = std::fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let entries = std::fs::File::open(format!("/proc/{pid}/pagemap"))?;
    let flags = std::fs::File::open("/proc/kpageflags")?;
    let memory = std::fs::File::open(format!("/proc/{pid}/mem"))?;
    let word = |file: &std::fs::File, index: u64| {
        let mut word = [0; 8];
        file.read_exact_at(&mut word, index * 8).map(|()| u64::from_le_bytes(word))
    };
    let mut pages = Vec::new();
    let mut range = 0..0;
    for line in smaps.lines() {
        let first = line.split(' ').next().unwrap();
        if let Some((start, end)) = first.split_once('-') {
            let page = |text| u64::from_str_radix(text, 16).unwrap() / PAGE;
            range = page(start)..page(end);
        }
        if first != "LazyFree:" || line.trim_start_matches("LazyFree:").trim() == "0 kB" {
            continue;
        }
        for page in range.clone() {
            let entry = word(&entries, page)?;
            if entry & PRESENT == 0 {
                continue;
            }
            if word(&flags, entry & FRAME)? & (ANONYMOUS | SWAP_BACKED) == ANONYMOUS {
                let mut bytes = vec![0; PAGE_BYTES];
                memory.read_exact_at(&mut bytes, page * PAGE)?;
                pages.push((page, bytes));
            }
        }
    }
    Ok(pages)
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
    pid: i32,
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
    let pids = processes_of(program.init);
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
        Process { pid, pages: Vec::new(), shared: Vec::new(), restless, space: alive.space };
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

/// Tells what was passed of a page: of which space, its number, how it is stored, how it was.
type Told<'a> = dyn Fn(u32, u64, &[u8], &[u8]) -> String + 'a;

/// Compares what a capsule holds with what the processes had.
fn compare(
    processes: &[(i32, Process)],
    container: &Container,
    reader: &CapsuleReader,
    told: &Told<'_>,
) -> Result<(), String> {
    for (pid, process) in processes {
        compare_memory(process, container, reader, told)
            .map_err(|error| format!("process {pid}: {error}"))?;
    }
    Ok(())
}

fn compare_memory(
    process: &Process,
    container: &Container,
    reader: &CapsuleReader,
    told: &Told<'_>,
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
    let mut freed = freed();
    let freed = freed.as_mut().unwrap();
    // Whether it is right that a page is stored like this and was like that.
    let mut was_dropped = |page: u64, found: &[u8], there: &[u8]| {
        let content = freed.contents.get(&(process.pid, page));
        let one_of = |page: &[u8]| page == zeros || content.is_some_and(|content| content == page);
        let right = content.is_some() && one_of(found) && one_of(there);
        freed.dropped += u64::from(right);
        right
    };
    let mut stored = pages_of(reader, process.space);
    for Page { number, place, content, absent } in &process.pages {
        let found = match (stored.remove(number), absent) {
            (Some(found), _) => found,
            (None, Absent::Zeros) => zeros.clone(),
            (None, Absent::OfFile) => continue,
            (None, Absent::Wrong) => return Err(format!("{place} is missing")),
        };
        let (found, there) = (process.at_rest(*number, &found), process.at_rest(*number, content));
        if found != there && !was_dropped(*number, &found, &there) {
            let told = told(process.space, *number, &found, &there);
            return Err(format!("{place} differs: {}; {told}", difference(&found, &there)));
        }
    }
    let mut others = stored.into_iter().filter(|(_, content)| *content != zeros);
    match others.find(|(page, content)| !was_dropped(*page, content, &zeros)) {
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

/// A writer, and what it was passed: so that a page that comes back wrong tells who is to blame.
struct Recording {
    writer: CapsuleWriter,
    /// By space and page: the content, or of which base it is to be what that has.
    passed: HashMap<(SpaceId, u64), Passed>,
    /// By base and page, the last one.
    drafts: HashMap<(BaseId, u64), Digest>,
}

#[derive(Clone, Copy)]
enum Passed {
    Content(Digest),
    Unchanged(BaseId),
}

impl Recording {
    fn note(&mut self, batch: &PageBatch) {
        let mut contents = batch.bytes.chunks_exact(PAGE_BYTES);
        for page in batch.runs.iter().flat_map(|run| run.first..run.first + run.count) {
            let content = Passed::Content(Digest::of(contents.next().unwrap()));
            self.passed.extend(batch.spaces.iter().map(|space| ((*space, page), content)));
        }
    }

    /// What was passed of a page that is stored like this, and was like that.
    fn told(
        passed: &HashMap<(SpaceId, u64), Passed>,
        drafts: &HashMap<(BaseId, u64), Digest>,
        space: u32,
        page: u64,
        found: &[u8],
        there: &[u8],
    ) -> String {
        let which = |digest: Digest| match digest {
            digest if digest == Digest::of(there) => "what was there",
            digest if digest == Digest::of(found) => "what is stored",
            _ => "something else",
        };
        match passed.get(&(SpaceId(space), page)) {
            None => "nothing was passed".to_owned(),
            Some(Passed::Content(digest)) => format!("passed: {}", which(*digest)),
            Some(Passed::Unchanged(base)) => match drafts.get(&(*base, page)) {
                None => "unchanged, and no draft of it".to_owned(),
                Some(digest) => format!("unchanged, drafted: {}", which(*digest)),
            },
        }
    }
}

impl Sink for Recording {
    fn buffer(&mut self) -> Vec<u8> {
        self.writer.buffer()
    }

    fn pages(&mut self, batch: PageBatch) -> io::Result<()> {
        self.note(&batch);
        self.writer.pages(batch)
    }

    fn exact_pages(&mut self, batch: PageBatch) -> io::Result<()> {
        self.note(&batch);
        self.writer.exact_pages(batch)
    }

    fn base(&mut self, parent: Option<SpaceId>) -> io::Result<BaseId> {
        Sink::base(&mut self.writer, parent)
    }

    fn earlier(&mut self, space: SpaceId, base: BaseId) {
        self.writer.earlier(space, base);
    }

    fn draft(
        &mut self,
        base: BaseId,
        exact: bool,
        runs: Vec<PageRun>,
        bytes: Vec<u8>,
    ) -> io::Result<()> {
        let mut contents = bytes.chunks_exact(PAGE_BYTES);
        for page in runs.iter().flat_map(|run| run.first..run.first + run.count) {
            self.drafts.insert((base, page), Digest::of(contents.next().unwrap()));
        }
        self.writer.draft(base, exact, runs, bytes)
    }

    fn unchanged(
        &mut self,
        spaces: &Arc<[SpaceId]>,
        base: BaseId,
        run: PageRun,
        exact: bool,
    ) -> io::Result<()> {
        for page in run.first..run.first + run.count {
            let unchanged = Passed::Unchanged(base);
            self.passed.extend(spaces.iter().map(|space| ((*space, page), unchanged)));
        }
        self.writer.unchanged(spaces, base, run, exact)
    }

    fn room(&self) -> u64 {
        self.writer.room()
    }

    fn settle(&mut self) -> io::Result<()> {
        self.writer.settle()
    }

    fn append(&mut self, stream: &StreamName, bytes: &[u8]) -> io::Result<()> {
        self.writer.append(stream, bytes)
    }

    fn segment(&mut self, parts: Vec<Vec<u8>>) -> io::Result<SegmentId> {
        self.writer.segment(parts)
    }

    fn stored_segment(&mut self, stored: &StoredSegment) -> io::Result<Option<SegmentId>> {
        self.writer.stored_segment(stored)
    }

    fn place(&mut self, stream: &StreamName, segment: SegmentId) -> io::Result<()> {
        self.writer.place(stream, segment)
    }
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
    fn begin<'a>(program: &'a Program, folder: &Path) -> Saving<'a> {
        let location = Location::parse(&format!("file://{}/capsules", folder.display()));
        let store = Store::open(&location.unwrap(), &StoreConfig::default(), true).unwrap();
        let lease = store.take_epoch(&BTreeMap::new()).unwrap().lease;
        let (tracking, found) = (Tracking::default(), Found::default());
        Saving { program, store, lease, last: None, tracking, found }
    }

    /// `ahead`: memory is copied while the program runs, and then comes `between`; `forks`: what was written is read from forks when it runs
    /// on; `commits`: the capsule gets into the store.
    fn save(
        &mut self,
        ahead: bool,
        forks: bool,
        commits: bool,
        between: impl FnOnce(&PreCopy),
    ) -> Result<(), String> {
        // As it comes from the process that keeps it.
        let (notes, trackers) = std::mem::take(&mut self.tracking).into_parts(usize::MAX);
        self.tracking = Tracking::from_parts(notes, trackers);
        self.tracking.begin(self.last.is_some(), true);
        let writer = match self.last {
            Some(last) => {
                CapsuleWriter::after(CapsuleReader::open_digest(&self.store, last).unwrap())
            }
            None => CapsuleWriter::new(&self.store),
        }
        .unwrap();
        let (passed, drafts) = (HashMap::new(), HashMap::new());
        let mut writer = Recording { writer, passed, drafts };
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
            let done = self.tracking.copy_ahead(init, &mut writer);
            between(&done.map_err(|error| said(&error))?);
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
        // Where nothing depends on its running, it stands until all is compared: it is faster than this test.
        let mut frozen = Some(frozen);
        if let Some(frozen) = frozen.take_if(|_| report.forks > 0) {
            frozen.thaw().map_err(|error| said(&error))?;
            self.tracking.went_on();
        }
        rest.drain(&mut self.tracking, &mut writer).map_err(|error| said(&error))?;
        if commits {
            let facts = CapsuleFacts {
                created: SystemTime::now(),
                parent: self.last,
                provenance: Provenance::default(),
                requirements: Requirements::default(),
                report: None,
            };
            let Recording { writer, passed, drafts } = writer;
            let committed = writer.commit(&mut self.lease, b"", facts).map_err(|e| said(&e))?;
            self.found.differences += committed.new_frames.delta.pages;
            self.tracking.committed();
            self.last = Some(committed.capsule.digest);
            let reader = CapsuleReader::open(&self.store, &committed.capsule).unwrap();
            let told = |space: u32, page: u64, found: &[u8], there: &[u8]| {
                Recording::told(&passed, &drafts, space, page, found, there)
            };
            compare(&there, &container, &reader, &told)?;
        }
        if frozen.is_some() {
            let now = run_times(processes_of(self.program.init).into_values());
            let freed = freed();
            let before = &freed.as_ref().unwrap().ran;
            let mut ran = now.iter().filter(|(thread, time)| before.get(*thread) != Some(time));
            if let Some((thread, time)) = ran.next().filter(|_| !before.is_empty()) {
                return Err(format!("{thread} ran while it stood: {time} ns, {before:?}"));
            }
        }
        match frozen {
            Some(frozen) => frozen.thaw().map_err(|error| said(&error)),
            None => Ok(()),
        }
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
    let words = [seed.to_string(), operations.to_string()];
    let program = Program::start(program, &words, folder.path());
    let mut saving = Saving::begin(&program, folder.path());
    for number in 0..capsules {
        let pause = (seed.wrapping_mul(31).wrapping_add(number as u64 * 7919)) % 8000;
        std::thread::sleep(Duration::from_micros(pause));
        let (ahead, forks, commits) = (number % 4 != 3, number % 3 == 1, number % 7 != 5);
        let dropping = [None, Some(Phase::Copied), None, Some(Phase::Stopped), None];
        if let Some(freed) = freed().as_mut() {
            freed.of = Some((program.init, dropping[number % dropping.len()]));
        }
        let result = saving.save(ahead, forks, commits, |_| {});
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

/// One of the programs beside this file.
fn compile(name: &str, folder: &Path) -> PathBuf {
    let program = folder.join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/increments/{name}.c"));
    let compiled = Command::new("gcc")
        .args(["-O1", "-static", "-pthread", "-o"])
        .args([&program, &source])
        .status()
        .unwrap();
    assert!(compiled.success());
    program
}

/// A call from outside that stands in the midst of writing to the program.
struct StalledWrite {
    child: Child,
    go_on: Option<ChildStdin>,
    said: BufReader<ChildStdout>,
}

impl StalledWrite {
    fn begin(stall: &Path, init: i32) -> StalledWrite {
        let mut child = Command::new(stall)
            .arg(init.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (go_on, said) = (child.stdin.take(), child.stdout.take().unwrap());
        let mut writing = StalledWrite { child, go_on, said: BufReader::new(said) };
        writing.expect("stalled\n");
        writing
    }

    fn expect(&mut self, word: &str) {
        let mut line = String::new();
        self.said.read_line(&mut line).unwrap();
        assert_eq!(line, word);
    }

    fn complete(&mut self) {
        self.go_on = None;
        self.expect("written\n");
    }
}

impl Drop for StalledWrite {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Without this, what somebody writes who took hold of a page before it was copied ahead would be missing from the capsule.
#[test]
fn a_write_that_has_begun_before_a_round_is_not_lost() {
    let folder = tempfile::tempdir().unwrap();
    let stall = compile("stall", folder.path());
    let _alone = alone(&stall);
    let program = Program::start(&stall, &[], folder.path());
    let mut saving = Saving::begin(&program, folder.path());
    saving.save(true, false, true, |_| {}).unwrap();
    let mut writing = StalledWrite::begin(&stall, program.init);
    saving.save(true, false, true, |_| writing.complete()).unwrap();
    // And not from the one after that, either.
    saving.save(true, false, true, |_| {}).unwrap();
    assert!(saving.found.unchanged > 0, "nothing was tracked");
}

/// Without this, it would be missing from the next one.
#[test]
fn a_write_that_lasts_for_longer_than_a_capsule_is_in_the_next() {
    let folder = tempfile::tempdir().unwrap();
    let stall = compile("stall", folder.path());
    let _alone = alone(&stall);
    for ahead in [true, false] {
        let program = Program::start(&stall, &[], folder.path());
        let store = tempfile::tempdir().unwrap();
        let mut saving = Saving::begin(&program, store.path());
        saving.save(true, false, true, |_| {}).unwrap();
        let mut writing = StalledWrite::begin(&stall, program.init);
        saving.save(true, false, true, |_| {}).unwrap();
        writing.complete();
        saving.save(ahead, false, true, |_| {}).unwrap();
    }
}

/// Without this, a page that was written would come back as it was before, or one that is gone would come back.
#[test]
fn every_increment_holds_what_was_there() {
    let folder = tempfile::tempdir().unwrap();
    let program = compile("mutate", folder.path());
    let _alone = alone(&compile("stall", folder.path()));
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
    let dropped = freed().as_ref().map_or(0, |freed| freed.dropped);
    eprintln!("{dropped} pages were taken away by the kernel in between");
    assert!(all.unchanged > 0, "nothing was tracked");
    assert!(all.forked > 0, "no fork was made");
    assert!(all.differences > 0, "every page that was written was stored as a whole");
}
