//! Captures real programs and restores them in another pid namespace, without any container engine.
//!
//! Each test starts a program as init of a new pid and mount namespace, captures and kills it, and restores it into the init of
//! another one. Needs root.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use samara_capsule::record::{Bytes, ProcessState};
use samara_capsule::transfer::{
    BaseId, PAGE_BYTES, PageBatch, PageRun, Place, SegmentId, Sink, Source, SpaceId, StoredRun,
    StoredSegment, StreamName,
};
use samara_engine::capture::{CaptureRequest, Captured, capture};
use samara_engine::restore::{RestoreError, RestoreRequest, restore};
use samara_engine::tracking::Tracking;
use samara_engine::{Confinement, SeccompPolicy};

/// A capsule in memory.
#[derive(Default)]
struct Memory {
    contents: Vec<Vec<u8>>,
    /// For each page which of the contents it has.
    pages: BTreeMap<(SpaceId, u64), usize>,
}

impl Memory {
    fn keep(&mut self, batch: &PageBatch, exact: bool) {
        let mut contents = batch.bytes.chunks_exact(PAGE_BYTES);
        for page in batch.runs.iter().flat_map(|run| run.first..run.first + run.count) {
            let content = contents.next().expect("as many pages as the runs say");
            if exact || content.iter().any(|byte| *byte != 0) {
                for space in batch.spaces.iter() {
                    self.pages.insert((*space, page), self.contents.len());
                }
                self.contents.push(content.to_vec());
            }
        }
    }

    fn of_space(&self, space: SpaceId) -> impl Iterator<Item = StoredRun> {
        let pages = self.pages.range((space, 0)..=(space, u64::MAX));
        pages.map(|((_, page), place)| StoredRun {
            run: PageRun { first: *page, count: 1 },
            place: *place as u64,
        })
    }
}

impl Sink for Memory {
    fn buffer(&mut self) -> Vec<u8> {
        Vec::new()
    }

    fn pages(&mut self, batch: PageBatch) -> io::Result<()> {
        self.keep(&batch, false);
        Ok(())
    }

    fn exact_pages(&mut self, batch: PageBatch) -> io::Result<()> {
        self.keep(&batch, true);
        Ok(())
    }

    fn base(&mut self, _: Option<SpaceId>) -> io::Result<BaseId> {
        unreachable!("nothing is tracked here")
    }

    fn draft(&mut self, _: BaseId, _: bool, _: Vec<PageRun>, _: Vec<u8>) -> io::Result<()> {
        unreachable!("nothing is tracked here")
    }

    fn unchanged(&mut self, _: &Arc<[SpaceId]>, _: BaseId, _: PageRun, _: bool) -> io::Result<()> {
        unreachable!("nothing is tracked here")
    }

    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn append(&mut self, _: &StreamName, _: &[u8]) -> io::Result<()> {
        unreachable!("the engine writes pages only")
    }

    fn segment(&mut self, _: Vec<Vec<u8>>) -> io::Result<SegmentId> {
        unreachable!("the engine writes pages only")
    }

    fn stored_segment(&mut self, _: &StoredSegment) -> io::Result<Option<SegmentId>> {
        unreachable!("the engine writes pages only")
    }

    fn place(&mut self, _: &StreamName, _: SegmentId) -> io::Result<()> {
        unreachable!("the engine writes pages only")
    }
}

impl Source for Memory {
    fn runs(&self, space: SpaceId) -> io::Result<Vec<PageRun>> {
        Ok(self.of_space(space).map(|stored| stored.run).collect())
    }

    fn stored(&self, spaces: &[SpaceId]) -> io::Result<Vec<Vec<StoredRun>>> {
        Ok(spaces.iter().map(|space| self.of_space(*space).collect()).collect())
    }

    fn transfer_some(&self, wanted: &[(SpaceId, &[PageRun])], place: &Place<'_>) -> io::Result<()> {
        for (space, runs) in wanted {
            for run in *runs {
                let end = run.first.saturating_add(run.count);
                for ((space, page), content) in self.pages.range((*space, run.first)..(*space, end))
                {
                    let run = PageRun { first: *page, count: 1 };
                    place(*space, &[run], &self.contents[*content])?;
                }
            }
        }
        Ok(())
    }

    fn stream(&self, _: &StreamName) -> io::Result<Option<Box<dyn io::Read + Send + '_>>> {
        Ok(None)
    }
}

/// A program that is init of its own pid namespace.
#[derive(Debug)]
struct Namespace {
    unshare: Child,
    init: i32,
}

impl Namespace {
    /// Starts `command` with its standard streams on null, null and the log.
    fn start(command: &[&str], log: &Path, offsets: &[String]) -> Namespace {
        let output = fs::OpenOptions::new().create(true).append(true).open(log).expect("log");
        let mut unshare = Command::new("unshare");
        unshare
            .args(["--pid", "--fork", "--mount-proc", "--kill-child"])
            .args(offsets)
            .arg("--")
            .args(command)
            .stdin(Stdio::null())
            .stdout(output.try_clone().expect("dup"))
            .stderr(output)
            .process_group(0);
        let unshare = unshare.spawn().expect("unshare of util-linux is installed");
        let children = format!("/proc/{0}/task/{0}/children", unshare.id());
        let init = wait_for("init", || {
            let init = fs::read_to_string(&children)
                .ok()?
                .split_whitespace()
                .next()?
                .parse::<i32>()
                .ok()?;
            // Until its exec the child is a copy of unshare.
            let name = fs::read_link(format!("/proc/{init}/exe")).ok()?;
            (!name.ends_with("unshare")).then_some(init)
        });
        Namespace { unshare, init }
    }

    fn exit_code(&mut self) -> Option<i32> {
        self.unshare.wait().expect("wait").code()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Some(found) = condition() {
            return found;
        }
        assert!(Instant::now() < deadline, "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// In the middle of its exec a program has neither the old memory nor its own.
fn wait_for_sleep(init: i32) {
    wait_for("a sleep", || {
        let call = fs::read_to_string(format!("/proc/{init}/syscall")).ok()?;
        let number = call.split(' ').next()?.parse().ok()?;
        [libc::SYS_pause, libc::SYS_clock_nanosleep].contains(&number).then_some(())
    });
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let folder =
            std::env::temp_dir().join(format!("samara-roundtrip-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).expect("folder");
        Folder(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Tracees belong to the thread that seized them, so each test does its captures in its own thread; but a wait for any tracee
/// sees those of the whole process.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn snapshot(init: i32) -> (Memory, Captured) {
    let mut memory = Memory::default();
    let request = CaptureRequest { init, ..CaptureRequest::default() };
    let captured = capture(&request, &mut Tracking::default(), &mut || Ok(()), &mut memory)
        .unwrap_or_else(|error| panic!("{}", chain(&error)));
    (memory, captured)
}

fn bring_back(
    memory: &Memory,
    captured: &samara_capsule::record::Container,
    log: &Path,
) -> Result<Namespace, RestoreError> {
    let blank = Namespace::start(&["sleep", "infinity"], log, &[]);
    wait_for_sleep(blank.init);
    let confinement = Confinement {
        bounding: u64::MAX,
        no_new_privileges: false,
        seccomp: SeccompPolicy::default(),
        app_armor_profile: String::new(),
    };
    let request = RestoreRequest { init: blank.init, container: captured, confinement };
    let report = restore(&request, memory, &mut || ())?;
    assert_eq!(report.processes, captured.processes.len());
    Ok(blank)
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// Runs a program, moves it `moves` times when `ready` says so, and returns its exit code and log.
fn moved(
    name: &str,
    command: &[&str],
    moves: usize,
    ready: impl Fn(&str, usize) -> bool,
) -> (Option<i32>, String) {
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = Folder::new(name);
    let log = folder.0.join("log");
    let text =
        |log: &Path| String::from_utf8_lossy(&fs::read(log).unwrap_or_default()).into_owned();
    let mut namespace = Namespace::start(command, &log, &[]);
    for number in 0..moves {
        wait_for("progress", || ready(&text(&log), number).then_some(()));
        let (memory, captured) = snapshot(namespace.init);
        let Captured { container, frozen, .. } = captured;
        frozen.end(143).expect("end");
        assert_eq!(namespace.exit_code(), Some(143));
        drop(namespace);
        namespace = bring_back(&memory, &container, &log)
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
    }
    let code = namespace.exit_code();
    drop(guard);
    let text = text(&log);
    (code, text)
}

/// The least that a capsule has to do: without it nothing else matters.
#[test]
fn a_sleep_wakes_in_another_namespace() {
    let (code, log) = moved("sleep", &["sleep", "1"], 1, |_, _| true);
    assert_eq!((code, log.as_str()), (Some(0), ""));
}

/// Loops, children, pipes and positions of a shell: a lost or repeated line would show.
#[test]
fn a_shell_goes_on_counting() {
    let script = "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo $i | cat; sleep 0.01; done; exit 7";
    let lines = |log: &str| log.lines().count();
    let (code, log) =
        moved("shell", &["bash", "-c", script], 3, |log, number| lines(log) > 10 * (number + 1));
    let expected: String = (1..=60).map(|number| format!("{number}\n")).collect();
    assert_eq!((code, log), (Some(7), expected));
}

/// Threads, their locals, locks and timeouts.
#[test]
fn python_threads_finish_their_sums() {
    let program = r#"
import threading, time, sys
results = {}
lock = threading.Lock()
local = threading.local()
def work(number):
    local.value = number
    total = 0.0
    for step in range(150):
        total += (step * number) ** 0.5
        time.sleep(0.01)
        with lock:
            results[number] = total
        assert local.value == number
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
[thread.start() for thread in threads]
print("ready", flush=True)
began = time.monotonic()
[thread.join() for thread in threads]
expected = {n: sum(((s * n) ** 0.5 for s in range(150)), 0.0) for n in range(8)}
assert all(abs(results[n] - expected[n]) < 1e-6 for n in range(8)), results
print("done", flush=True)
"#;
    let (code, log) =
        moved("python", &["python3", "-c", program], 2, |log, _| log.contains("ready"));
    assert_eq!((code, log.as_str()), (Some(0), "ready\ndone\n"));
}

/// A program that a security module has confined must not come back with fewer bounds.
#[test]
fn a_thread_whose_label_would_differ_is_refused() {
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = Folder::new("label");
    let log = folder.0.join("log");
    let namespace = Namespace::start(&["sleep", "infinity"], &log, &[]);
    wait_for_sleep(namespace.init);
    let (memory, captured) = snapshot(namespace.init);
    let Captured { mut container, frozen, .. } = captured;
    frozen.end(143).expect("end");
    let ProcessState::Alive(alive) = &mut container.processes[0].state else { panic!("no init") };
    let had = alive.threads[0].attributes.label.replace(Bytes::from(b"other (enforce)".to_vec()));
    let error = bring_back(&memory, &container, &log).expect_err("another label");
    let text = chain(&error);
    assert!(text.contains("process 1 (sleep) had the security label other (enforce)"), "{text}");
    let ProcessState::Alive(alive) = &mut container.processes[0].state else { panic!("no init") };
    alive.threads[0].attributes.label = had;
    bring_back(&memory, &container, &log).unwrap_or_else(|error| panic!("{}", chain(&error)));
    drop(guard);
}

/// What anonymous memory a process and those below it need together, in KiB.
fn together(pid: i32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).expect("smaps_rollup");
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss_Anon:")).expect("Pss_Anon");
    let own: u64 = line.trim_end_matches("kB").trim().parse().expect("a number");
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    let children = children.expect("children");
    let children = children.split_whitespace().map(|pid| pid.parse().expect("a pid"));
    own + children.map(together).sum::<u64>()
}

/// Workers of R, Python, PostgreSQL, Redis: stored and brought back apart, they take many times the memory.
#[test]
fn what_a_fork_left_in_common_is_stored_once_and_shared_again() {
    let program = r#"
import hashlib, mmap, os, time
size = 16 << 20
data = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
data[:] = os.urandom(size)
def work(number):
    if number == 1:
        data[5 << 20:6 << 20] = os.urandom(1 << 20)
    if number == 2 and os.fork() == 0:
        data[0:100] = os.urandom(100)
        number = 7
    before = hashlib.sha256(data).digest()
    os.write(1, b"ready\n")
    for step in range(100000):
        time.sleep(0.02)
        if os.path.exists(os.environ["END"]):
            break
    os.write(1, b"same\n" if hashlib.sha256(data).digest() == before else b"differs\n")
children = []
for number in range(4):
    child = os.fork()
    if child == 0:
        work(number)
        os._exit(0)
    children.append(child)
work(9)
for child in children:
    os.waitpid(child, 0)
while True:
    try:
        os.wait()
    except ChildProcessError:
        break
"#;
    const PROCESSES: usize = 6;
    const MIB: u64 = 1 << 20;
    let guard = ONE_AT_A_TIME.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let folder = Folder::new("fork");
    let (log, end) = (folder.0.join("log"), folder.0.join("end"));
    let count = |word: &str| {
        let text = fs::read_to_string(&log).unwrap_or_default();
        text.lines().filter(|line| *line == word).count()
    };
    let variable = format!("END={}", end.display());
    let command = ["env", variable.as_str(), "python3", "-c", program];
    let mut namespace = Namespace::start(&command, &log, &[]);
    wait_for("all to be ready", || (count("ready") == PROCESSES).then_some(()));
    let needed = together(namespace.init);
    for _ in 0..2 {
        let (memory, captured) = snapshot(namespace.init);
        let stored = (memory.contents.len() * PAGE_BYTES) as u64;
        assert!(stored > 17 * MIB && stored < 40 * MIB, "{stored} bytes are stored");
        assert!(memory.pages.len() * PAGE_BYTES > PROCESSES * (16 << 20));
        let Captured { container, frozen, .. } = captured;
        frozen.end(143).expect("end");
        assert_eq!(namespace.exit_code(), Some(143));
        drop(namespace);
        namespace = bring_back(&memory, &container, &log)
            .unwrap_or_else(|error| panic!("{}", chain(&error)));
        let now = together(namespace.init);
        assert!(now <= needed + needed / 10, "{needed} KiB were needed, and now {now}");
    }
    fs::write(&end, "").expect("a file");
    assert_eq!(namespace.exit_code(), Some(0));
    assert_eq!((count("same"), count("differs")), (PROCESSES, 0));
    drop(guard);
}
