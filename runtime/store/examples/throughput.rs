//! Writes a capsule of synthetic pages and reads it back, and prints rates and the peak of memory.
//!
//! `cargo run --release -p samara-store --example throughput -- FOLDER GIB [THREADS [MEMORY]]`
//!
//! The pages are those of the file MEMORY, of which 64 MiB are used; without it, they are made up and compress 2.5 to one.
//! Each batch differs in a few bytes of every page, so that no pack is stored twice. With `NO_SYNC` in the environment,
//! nothing waits for the disk.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::Write as _;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Instant, SystemTime};

use samara_capsule::cbor::encode_record;
use samara_capsule::config::{Provenance, Requirements};
use samara_capsule::transfer::{
    BATCH_BYTES_MAX, PAGE_BYTES, PageBatch, PageRun, Sink as _, Source as _, SpaceId,
};
use samara_store::config::StoreConfig;
use samara_store::writer::CapsuleFacts;
use samara_store::{CapsuleReader, CapsuleWriter, Location, Store};

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let folder = args.next().ok_or("FOLDER is missing")?;
    let gib: f64 = args.next().ok_or("GIB is missing")?.parse()?;
    let threads = args.next().map(|threads| threads.parse()).transpose()?;
    let sync = std::env::var_os("NO_SYNC").is_none();
    let mut config = StoreConfig { threads, ..StoreConfig::default() };
    config.file.sync = sync;
    let store = Store::open(&Location::folder(Path::new(&folder))?, &config, true)?;
    let template = match args.next() {
        Some(path) => std::fs::read(path)?,
        None => template(),
    };
    let template_batches = (template.len() / BATCH_BYTES_MAX).min(64);

    let cpu_before = cpu()?;
    let start = Instant::now();
    let mut lease = store.take_epoch(&BTreeMap::new())?.lease;
    let mut writer = CapsuleWriter::new(&store)?;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a count of batches is small"
    )]
    let batches = (gib * 1024.0) as u64;
    let pages = (BATCH_BYTES_MAX / PAGE_BYTES) as u64;
    for number in 0..batches {
        let mut bytes = writer.buffer();
        let at = (usize::try_from(number)? % template_batches) * BATCH_BYTES_MAX;
        bytes.extend_from_slice(
            template.get(at..at + BATCH_BYTES_MAX).ok_or("the template is too short")?,
        );
        for page in bytes.chunks_exact_mut(PAGE_BYTES) {
            page[..8].copy_from_slice(&number.to_le_bytes());
        }
        let runs = vec![PageRun { first: number * pages, count: pages }];
        writer.pages(PageBatch { spaces: [SpaceId(0)].into(), runs, bytes })?;
    }
    let facts = CapsuleFacts {
        created: SystemTime::now(),
        parent: None,
        provenance: Provenance::default(),
        requirements: Requirements::default(),
        report: None,
    };
    let committed = writer.commit(&mut lease, &encode_record("none")?, facts)?;
    let wrote = start.elapsed().as_secs_f64();

    let mut out = std::io::stdout().lock();
    let gigabytes = |bytes: u64| bytes as f64 / 1e9;
    let raw = gigabytes(committed.raw_bytes);
    let ratio = raw / gigabytes(committed.stored_bytes);
    let cpu_wrote = cpu()? - cpu_before;
    let rate = raw / wrote;
    let (spent, peak_mib) = (cpu_wrote / raw, peak()?);
    writeln!(
        out,
        "write: {raw:.2} GB in {wrote:.2} s, {rate:.2} GB/s, {ratio:.2}:1, {spent:.2} cpu s/GB, peak {peak_mib} MiB"
    )?;

    let cpu_before = cpu()?;
    let start = Instant::now();
    let mut reader = CapsuleReader::open_latest(&store)?;
    reader.check()?;
    let (checked, spent) = (start.elapsed().as_secs_f64(), (cpu()? - cpu_before) / raw);
    writeln!(
        out,
        "check: {raw:.2} GB in {checked:.2} s, {spent:.2} cpu s/GB, peak {} MiB",
        peak()?
    )?;

    let cpu_before = cpu()?;
    let start = Instant::now();
    let placed = AtomicU64::new(0);
    reader.transfer(&[SpaceId(0)], &|_, _, bytes| {
        placed.fetch_add(bytes.len() as u64, Relaxed);
        Ok(())
    })?;
    let read = start.elapsed().as_secs_f64();
    let raw = gigabytes(placed.into_inner());
    let rate = raw / read;
    let (spent, peak_mib) = ((cpu()? - cpu_before) / raw, peak()?);
    writeln!(
        out,
        "read: {raw:.2} GB in {read:.2} s, {rate:.2} GB/s, {spent:.2} cpu s/GB, peak {peak_mib} MiB"
    )?;
    Ok(())
}

/// 64 MiB of small objects: pointers, small numbers and values of which a third can't be compressed.
fn template() -> Vec<u8> {
    let mut state = 1u64;
    let mut next = move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    };
    let mut bytes = Vec::with_capacity(64 * BATCH_BYTES_MAX);
    while bytes.len() < 64 * BATCH_BYTES_MAX {
        let kind = next() % 64;
        bytes.extend_from_slice(&(0x5555_0000_0000 + kind * 4096).to_le_bytes());
        bytes.extend_from_slice(&kind.to_le_bytes());
        bytes.extend_from_slice(&next().to_le_bytes());
        bytes.extend_from_slice(&((next() << 32 | next()) & 0x00ff_ffff_ffff_ffff).to_le_bytes());
        bytes.extend_from_slice(&(0x7fff_0000_0000 + (next() & 0xffff) * 16).to_le_bytes());
        bytes.extend_from_slice(&[0; 8]);
    }
    bytes
}

/// Processor time of this process so far, in seconds. The kernel counts hundredths (`USER_HZ`).
fn cpu() -> Result<f64, Box<dyn Error>> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(") ").ok_or("no end of the name")?;
    let times =
        fields.split(' ').skip(11).take(2).map(str::parse::<f64>).collect::<Result<Vec<_>, _>>()?;
    Ok(times.iter().sum::<f64>() / 100.0)
}

/// Peak of this process's resident memory, in MiB.
fn peak() -> Result<u64, Box<dyn Error>> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).ok_or("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? / 1024)
}
