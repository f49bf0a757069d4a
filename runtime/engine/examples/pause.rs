//! How long a container stands still, by phase, beside the copying of its memory.
//!
//! `cargo build --workspace --example pause`, then as root `pause [--runs N] [--no-forks] [CASE…]`: each case is a program as the init of a pid
//! namespace, captured again and again with a sink that keeps nothing. Printed are medians in microseconds. What counts is the
//! build with optimisation, on a machine that does nothing else; counts of system calls (`strace -f -c pause --runs 1 small`) do
//! not depend on that.

#![expect(clippy::print_stdout, reason = "figures are what this program is for")]

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use samara_capsule::transfer::{
    BaseId, PageBatch, PageRun, SegmentId, Sink, SpaceId, StoredSegment, StreamName,
};
use samara_engine::capture::{CaptureRequest, Captured, capture};
use samara_engine::names::GivenNames;
use samara_engine::snapshot::SnapshotRequest;
use samara_engine::tracking::Tracking;

/// The program is this one, which has some forty mappings.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    threads: usize,
    descriptors: usize,
    mebibytes: usize,
    /// Of the pages, which are written every millisecond, a few each time, as in a second.
    dirty_percent: usize,
}

const PLAIN: Case = Case { name: "", threads: 1, descriptors: 12, mebibytes: 0, dirty_percent: 0 };

const CASES: [Case; 7] = [
    Case { name: "small", ..PLAIN },
    Case { name: "threads-8", threads: 8, ..PLAIN },
    Case { name: "threads-64", threads: 64, ..PLAIN },
    Case { name: "threads-256", threads: 256, ..PLAIN },
    Case { name: "descriptors-50", descriptors: 50, ..PLAIN },
    Case { name: "memory-1g-1", mebibytes: 1024, dirty_percent: 1, ..PLAIN },
    Case { name: "memory-1g-50", mebibytes: 1024, dirty_percent: 50, ..PLAIN },
];

/// Takes everything and keeps nothing.
struct Nothing(Vec<u8>);

impl Sink for Nothing {
    fn buffer(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.0)
    }

    fn pages(&mut self, batch: PageBatch) -> io::Result<()> {
        self.0 = batch.bytes;
        self.0.clear();
        Ok(())
    }

    fn exact_pages(&mut self, batch: PageBatch) -> io::Result<()> {
        self.pages(batch)
    }

    fn base(&mut self, _: Option<SpaceId>) -> io::Result<BaseId> {
        Ok(BaseId(0))
    }

    fn draft(&mut self, _: BaseId, _: bool, _: Vec<PageRun>, bytes: Vec<u8>) -> io::Result<()> {
        self.0 = bytes;
        self.0.clear();
        Ok(())
    }

    fn unchanged(&mut self, _: &Arc<[SpaceId]>, _: BaseId, _: PageRun, _: bool) -> io::Result<()> {
        Ok(())
    }

    fn settle(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn append(&mut self, _: &StreamName, _: &[u8]) -> io::Result<()> {
        Ok(())
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

/// A program that is init of its own namespaces.
struct Namespace {
    unshare: Child,
    init: i32,
}

impl Namespace {
    fn start(case: &str) -> Namespace {
        let own = std::env::current_exe().expect("this program has a path");
        let mut unshare = Command::new("unshare");
        unshare
            .args(["--pid", "--ipc", "--net", "--uts", "--fork", "--mount-proc", "--kill-child"])
            .arg(own)
            .args(["--program", case])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .process_group(0);
        let unshare = unshare.spawn().expect("unshare of util-linux is installed");
        let mut namespace = Namespace { unshare, init: 0 };
        let children = format!("/proc/{0}/task/{0}/children", namespace.unshare.id());
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let init = fs::read_to_string(&children).ok();
            let init = init.and_then(|text| text.split_whitespace().next()?.parse::<i32>().ok());
            // The program's name says that it has made everything.
            if let Some(init) = init
                && fs::read_to_string(format!("/proc/{init}/comm")).is_ok_and(|it| it == "ready\n")
            {
                std::thread::sleep(Duration::from_millis(20));
                namespace.init = init;
                return namespace;
            }
            assert!(Instant::now() < deadline, "the program does not become ready");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        let _ = self.unshare.kill();
        let _ = self.unshare.wait();
    }
}

/// What is captured.
fn program(case: &str) {
    let Case { threads, descriptors, mebibytes, dirty_percent, .. } =
        CASES.into_iter().find(|known| known.name == case).expect("a case");
    const PAGE: usize = 4096;
    let mut memory = vec![1u8; mebibytes << 20];
    for _ in 1..threads {
        let thread = std::thread::Builder::new().stack_size(64 << 10);
        thread
            .spawn(|| {
                loop {
                    std::thread::park();
                }
            })
            .expect("a thread");
    }
    let file = || fs::File::open("/proc/self/exe").expect("a file");
    let open: Vec<fs::File> = (3..descriptors).map(|_| file()).collect();
    fs::write("/proc/self/comm", "ready").expect("a name");
    let (mut next, pages) = (0, memory.len() / PAGE);
    loop {
        match pages {
            0 => std::thread::park(),
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
        for _ in 0..pages * dirty_percent / 100_000 {
            // Neighbours are not written together.
            next = (next + 7919) % pages;
            memory[next * PAGE] = memory[next * PAGE].wrapping_add(1);
        }
        std::hint::black_box((&open, &memory));
    }
}

/// One line of figures.
fn measure(case: &str, runs: usize, forks: bool) {
    let namespace = Namespace::start(case);
    let names = GivenNames::default();
    let budget = Duration::from_millis(10);
    let snapshot = SnapshotRequest { budget, always: false, spare_bytes: u64::MAX };
    let snapshot = Some(snapshot).filter(|_| forks);
    let request =
        CaptureRequest { init: namespace.init, names, snapshot, ..CaptureRequest::default() };
    let mut sink = Nothing(Vec::with_capacity(8 << 20));
    let mut rows: Vec<[u128; 7]> = Vec::new();
    let mut tracking = Tracking::default();
    let is_tracked = CASES.iter().any(|known| known.name == case && known.mebibytes > 0);
    for number in 0..runs {
        if is_tracked {
            tracking.begin(number > 0, true);
            tracking.copy_ahead(namespace.init, &mut sink).expect("copied memory");
        }
        let begun = Instant::now();
        let captured = capture(&request, &mut tracking, &mut || Ok(()), &mut sink);
        let captured = captured.unwrap_or_else(|error| panic!("{error}: {error:?}"));
        let all = begun.elapsed();
        let Captured { report, frozen, rest, .. } = captured;
        let begun = Instant::now();
        frozen.thaw().expect("a thaw");
        let thaw = begun.elapsed();
        tracking.went_on();
        rest.drain(&mut tracking, &mut sink).expect("the rest");
        if is_tracked {
            tracking.committed();
        }
        let rest_time =
            all.saturating_sub(report.prepare + report.freeze + report.collect + report.copy);
        let pause = all.saturating_sub(report.prepare) + thaw;
        let copy = report.copy.saturating_sub(report.fork);
        let row = [report.freeze, report.collect, copy, report.fork, rest_time, thaw, pause];
        rows.push(row.map(|time| time.as_micros()));
        // So that the program is asleep again, or has written something.
        std::thread::sleep(Duration::from_millis(if is_tracked { 1000 } else { 2 }));
    }
    let median = |column: usize| {
        let mut times: Vec<u128> = rows.iter().map(|row| row[column]).collect();
        times.sort_unstable();
        times[times.len() / 2]
    };
    let [freeze, collect, copy, fork, rest, thaw, all] = std::array::from_fn(median);
    println!(
        "{case:16} freeze={freeze:6} collect={collect:6} copy={copy:6} fork={fork:6} rest={rest:6} thaw={thaw:6} pause={all:6} pause-copy={}",
        all.saturating_sub(copy)
    );
}

fn main() {
    let (mut runs, mut forks) = (101, true);
    let mut cases = Vec::new();
    let mut words = std::env::args().skip(1);
    while let Some(word) = words.next() {
        match word.as_str() {
            "--program" => return program(&words.next().expect("a case")),
            "--runs" => runs = words.next().and_then(|it| it.parse().ok()).expect("a number"),
            "--no-forks" => forks = false,
            _ => cases.push(word),
        }
    }
    for Case { name, .. } in CASES {
        if cases.is_empty() || cases.iter().any(|wanted| wanted == name) {
            measure(name, runs, forks);
        }
    }
}
