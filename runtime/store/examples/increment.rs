//! What the second capsule of a program stores and costs, with its pages stored whole and as differences, and what reading it back
//! costs. Prints one line for each way, and for all changed pages, a quarter and a sixteenth of them.
//!
//! `cargo run --release -p samara-store --example increment -- FOLDER BEFORE AFTER`
//!
//! BEFORE and AFTER are the same ranges of memory of one process at two instants. FOLDER is for the capsules; nothing of an earlier
//! run may lie there.

use std::collections::BTreeMap;
use std::error::Error;
use std::io::Write as _;
use std::path::Path;
use std::time::SystemTime;

use samara_capsule::cbor::encode_record;
use samara_capsule::config::{Provenance, Requirements};
use samara_capsule::transfer::{
    BATCH_BYTES_MAX, PAGE_BYTES, PageBatch, PageRun, Sink, Source as _, SpaceId,
};
use samara_store::config::StoreConfig;
use samara_store::writer::CapsuleFacts;
use samara_store::{CapsuleReader, CapsuleWriter, Location, Store};

const SPACE: SpaceId = SpaceId(0);

/// The same is done so often: the kernel counts processor time in hundredths of a second.
const ROUNDS: u32 = 5;

type Page<'a> = (u64, &'a [u8]);

fn main() -> Result<(), Box<dyn Error>> {
    let mut args = std::env::args().skip(1);
    let (Some(folder), Some(before), Some(after)) = (args.next(), args.next(), args.next()) else {
        return Err("usage: increment FOLDER BEFORE AFTER".into());
    };
    let (before, after) = (std::fs::read(before)?, std::fs::read(after)?);
    fn pages(memory: &[u8]) -> impl Iterator<Item = Page<'_>> {
        (0u64..).zip(memory.chunks_exact(PAGE_BYTES))
    }
    let changed: Vec<Page<'_>> = pages(&after)
        .zip(before.chunks_exact(PAGE_BYTES))
        .filter(|((_, after), before)| after != before)
        .map(|(page, _)| page)
        .collect();
    let mut out = std::io::stdout().lock();
    for (name, part) in [("all", 1), ("a quarter", 4), ("a sixteenth", 16)] {
        let some: Vec<Page<'_>> = changed.iter().copied().step_by(part).collect();
        for as_differences in [false, true] {
            let mut sum = Sum::default();
            for round in 0..ROUNDS {
                let address = format!("{folder}/{part}-{as_differences}-{round}");
                let location = Location::folder(Path::new(&address))?;
                let mut config = StoreConfig::default();
                config.file.sync = false;
                let store = Store::open(&location, &config, true)?;
                let all: Vec<Page<'_>> = pages(&before).collect();
                sum.add(&store, &all, &some, as_differences)?;
                std::fs::remove_dir_all(&address)?;
            }
            let Sum { bytes, written, read } = sum;
            let gigabytes = (some.len() * PAGE_BYTES) as f64 / 1e9;
            let rounds = f64::from(ROUNDS);
            writeln!(
                out,
                "{name:12} {:6} pages {}: {:6.2} MB, {:5.0} bytes a page, written in {:.2} cpu s/GB of them; all of the capsule read in {:.3} cpu s",
                some.len(),
                if as_differences { "as differences" } else { "whole         " },
                bytes as f64 / 1e6,
                bytes as f64 / some.len() as f64,
                written / rounds / gigabytes,
                read / rounds,
            )?;
        }
    }
    Ok(())
}

#[derive(Default)]
struct Sum {
    bytes: u64,
    written: f64,
    read: f64,
}

impl Sum {
    fn add(
        &mut self,
        store: &Store,
        all: &[Page<'_>],
        changed: &[Page<'_>],
        as_differences: bool,
    ) -> Result<(), Box<dyn Error>> {
        let mut lease = store.take_epoch(&BTreeMap::new())?.lease;
        let mut writer = CapsuleWriter::new(store)?;
        pass(&mut writer, all)?;
        writer.commit(&mut lease, &encode_record("none")?, facts())?;

        let parent = CapsuleReader::open_latest(store)?;
        let mut writer = CapsuleWriter::after(parent)?;
        let base = Sink::base(&mut writer, Some(SPACE))?;
        if as_differences {
            writer.earlier(SPACE, base);
        }
        let mut next = 0;
        for (number, _) in changed.iter().copied().chain([(all.len() as u64, &[][..])]) {
            if number > next {
                let run = PageRun { first: next, count: number - next };
                writer.unchanged(&[SPACE].into(), base, run, false)?;
            }
            next = number + 1;
        }
        let start = cpu()?;
        pass(&mut writer, changed)?;
        let committed = writer.commit(&mut lease, &encode_record("none")?, facts())?;
        self.written += cpu()? - start;
        self.bytes = committed.uploaded_bytes;

        let reader = CapsuleReader::open_latest(store)?;
        let start = cpu()?;
        reader.transfer(&[SPACE], &|_, _, _| Ok(()))?;
        self.read += cpu()? - start;
        Ok(())
    }
}

fn pass(writer: &mut CapsuleWriter, pages: &[Page<'_>]) -> Result<(), Box<dyn Error>> {
    for batch in pages.chunks(BATCH_BYTES_MAX / PAGE_BYTES) {
        let mut bytes = writer.buffer();
        batch.iter().for_each(|(_, page)| bytes.extend_from_slice(page));
        let runs = batch.iter().map(|(first, _)| PageRun { first: *first, count: 1 }).collect();
        writer.pages(PageBatch { spaces: [SPACE].into(), runs, bytes })?;
    }
    Ok(())
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

/// Processor time of this process so far, in seconds. The kernel counts hundredths (`USER_HZ`).
fn cpu() -> Result<f64, Box<dyn Error>> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = stat.rsplit_once(") ").ok_or("no end of the name")?;
    let times =
        fields.split(' ').skip(11).take(2).map(str::parse::<f64>).collect::<Result<Vec<_>, _>>()?;
    Ok(times.iter().sum::<f64>() / 100.0)
}
