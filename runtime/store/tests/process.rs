//! What only a process of its own can show: the peak of memory, and what a kill leaves behind.
//!
//! There is no harness: this program runs itself as the process that is measured or killed.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test fails by panicking, and tells what it measured"
)]

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::SystemTime;

use samara_capsule::config::{Provenance, Requirements};
use samara_capsule::transfer::{
    PAGE_BYTES, PageBatch, PageRun, Sink as _, Source as _, SpaceId, StreamName,
};
use samara_store::config::StoreConfig;
use samara_store::writer::CapsuleFacts;
use samara_store::{CapsuleReader, CapsuleWriter, Location, Store};

/// What the process may use at any moment, whatever the size of the capsule.
const PEAK_MIB_MAX: u64 = 256;

/// Pages and stream of the large capsule: 2 GiB and a quarter.
const BATCHES: u64 = 2048;
const STREAM_MIB: usize = 256;

/// Moments at which a writer is killed: after so many batches were passed to it.
const KILL_AFTER_BATCHES: [u64; 5] = [0, 1, 17, 40, 90];

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["write", folder, threads] => write(&open(folder, threads)),
        ["read", folder, threads] => read(&open(folder, threads)),
        ["write-forever", folder] => write_forever(&open(folder, "2")),
        // Names and options of test runners; there is nothing to choose from.
        _ => {
            memory_stays_bounded();
            a_killed_writer_leaves_nothing_visible();
            println!("process: 2 passed, 0 failed");
        }
    }
}

fn child(args: &[&str]) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(args);
    command
}

fn memory_stays_bounded() {
    // Two threads, as on a small machine, and the most that are ever used.
    for threads in ["2", "16"] {
        let folder = tempfile::tempdir().unwrap();
        for step in ["write", "read"] {
            let output = child(&[step, folder.path().to_str().unwrap(), threads]).output().unwrap();
            assert!(output.status.success(), "{step}: {}", String::from_utf8_lossy(&output.stderr));
            let peak: u64 = String::from_utf8(output.stdout).unwrap().trim().parse().unwrap();
            println!("{step} with {threads} threads: peak {peak} MiB");
            assert!(peak < PEAK_MIB_MAX, "{step} with {threads} threads took {peak} MiB");
        }
    }
}

fn a_killed_writer_leaves_nothing_visible() {
    for batches in KILL_AFTER_BATCHES {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        let mut writer = child(&["write-forever", path]).stdout(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(writer.stdout.take().unwrap()).lines();
        // The writer tells of each batch when it has passed it on.
        let wanted = batches.to_string();
        assert!(lines.any(|line| line.unwrap() == wanted), "the writer ended by itself");
        writer.kill().unwrap();
        writer.wait().unwrap();

        let store = open(path, "2");
        assert_eq!(store.slots().unwrap(), [0], "only the start is in the log");
        assert!(CapsuleReader::open_latest(&store).is_err());
        // What is left hinders nobody.
        let mut lease = store.take_epoch(&BTreeMap::new()).unwrap().lease;
        assert_eq!(lease.epoch, 2);
        let mut writer = CapsuleWriter::new(&store).unwrap();
        writer.pages(batch(0)).unwrap();
        writer.commit(&mut lease, &[0xf6], facts()).unwrap();
        let report = CapsuleReader::open_latest(&store).unwrap().verify(&|_, _| ());
        assert!(report.faults.is_empty(), "{:?}", report.faults);
        store.remove(&|_, _| ()).unwrap();
        let left = std::fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(left, 0, "removal leaves nothing, not even what the kill left");
    }
}

fn open(folder: &str, threads: &str) -> Store {
    let mut config =
        StoreConfig { threads: Some(threads.parse().unwrap()), ..StoreConfig::default() };
    config.file.sync = false;
    Store::open(&Location::folder(Path::new(folder)).unwrap(), &config, true).unwrap()
}

fn facts() -> CapsuleFacts {
    CapsuleFacts {
        created: SystemTime::now(),
        parent: None,
        provenance: Provenance::default(),
        requirements: Requirements::default(),
        report: None,
    }
}

/// A mebibyte of pages, every second page of an address space, so that each is a run of its own. A quarter of each page
/// can't be compressed.
fn batch(number: u64) -> PageBatch {
    let mut bytes = Vec::with_capacity(256 * PAGE_BYTES);
    fill(&mut bytes, number);
    let runs =
        (0..256).map(|page| PageRun { first: (number * 256 + page) * 2, count: 1 }).collect();
    PageBatch { spaces: [SpaceId(0)].into(), runs, bytes }
}

fn fill(bytes: &mut Vec<u8>, seed: u64) {
    let mut state = seed;
    let mut noise = [0; PAGE_BYTES / 4];
    for _ in 0..256 {
        for word in noise.as_chunks_mut::<8>().0 {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            *word = (state ^ state >> 32).to_le_bytes();
        }
        bytes.extend_from_slice(&noise);
        bytes.resize(bytes.len() + PAGE_BYTES * 3 / 4, 3);
    }
}

fn write(store: &Store) {
    let mut lease = store.take_epoch(&BTreeMap::new()).unwrap().lease;
    let mut writer = CapsuleWriter::new(store).unwrap();
    for number in 0..BATCHES {
        let PageBatch { spaces, runs, bytes } = batch(number);
        let mut buffer = writer.buffer();
        buffer.extend_from_slice(&bytes);
        writer.pages(PageBatch { spaces, runs, bytes: buffer }).unwrap();
    }
    let mut piece = Vec::new();
    for number in 0..STREAM_MIB {
        piece.clear();
        fill(&mut piece, 1 << 40 | number as u64);
        writer.append(&StreamName("root".into()), &piece).unwrap();
    }
    writer.commit(&mut lease, &[0xf6], facts()).unwrap();
    println!("{}", peak_mib());
}

fn read(store: &Store) {
    let mut reader = CapsuleReader::open_latest(store).unwrap();
    reader.check().unwrap();
    let pages = AtomicU64::new(0);
    let place = |_, runs: &[PageRun], _: &[u8]| {
        pages.fetch_add(runs.iter().map(|run| run.count).sum(), Relaxed);
        Ok(())
    };
    reader.transfer(&reader.spaces(), &place).unwrap();
    assert_eq!(pages.into_inner(), BATCHES * 256);
    let mut stream = reader.stream(&StreamName("root".into())).unwrap().unwrap();
    let bytes = std::io::copy(&mut stream, &mut std::io::sink()).unwrap();
    assert_eq!(bytes, (STREAM_MIB << 20) as u64);
    println!("{}", peak_mib());
}

fn write_forever(store: &Store) {
    store.take_epoch(&BTreeMap::new()).unwrap();
    let mut writer = CapsuleWriter::new(store).unwrap();
    for number in 0.. {
        println!("{number}");
        std::io::stdout().flush().unwrap();
        writer.pages(batch(number)).unwrap();
    }
}

/// `VmHWM` of `/proc/PID/status` (proc_pid_status(5)): the peak of resident memory.
fn peak_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() / 1024
}
