//! How large capsules of real heaps are, beside the bytes of CRIU's images, which are not compressed.
//!
//! - `size-full-cpython`, `size-full-jvm`, `size-full-node`: the first capsule of a program of `tests/programs` that holds a
//!   few hundred MiB of records as programs of its kind have them: strings, numbers, lists, maps.
//! - `size-increment`: what the next capsule of CPython adds, after it has updated entries of its dictionary at random for a
//!   second of its processor time.
//!
//! The programs' data and what they update follow from a seed.

use anyhow::Result;

use crate::figure::{Figure, Goal, number};
use crate::samples::Samples;
use crate::subject::Subject;
use crate::{Bench, Group};

const ROUNDS: usize = 5;

/// A heap, and the goals for its first capsule and, where it is asked for, for the next one.
struct Heap {
    full: &'static str,
    times_less: f64,
    increment: Option<(&'static str, f64)>,
    /// How many records it holds.
    records: u64,
    command: &'static [&'static str],
}

/// 3.5 times is what zstd -1 gives for such heaps; 12 times is that, where the pages that a program has not written and
/// those parts of pages that stayed as they were cost nothing.
const HEAPS: [Heap; 3] = [
    Heap {
        full: "size-full-cpython",
        times_less: 3.5,
        increment: Some(("size-increment", 12.0)),
        records: 256_000,
        command: &["/usr/bin/env", "PYTHONHASHSEED=0", "/usr/bin/python3", "/opt/samara/heap.py"],
    },
    Heap {
        full: "size-full-jvm",
        times_less: 3.5,
        increment: None,
        records: 256_000,
        command: &["/usr/bin/java", "-Xms384m", "-Xmx384m", "-cp", "/opt/samara", "Heap"],
    },
    Heap {
        full: "size-full-node",
        times_less: 3.5,
        increment: None,
        records: 256_000,
        command: &["/usr/bin/node", "--max-old-space-size=1024", "/opt/samara/heap.js"],
    },
];

/// In bytes.
#[derive(Clone, Copy, Debug)]
struct Size {
    full: u64,
    /// What a second one added; the peer's is another full one. `None` where it was not asked for.
    increment: Option<u64>,
}

pub(crate) fn groups() -> Vec<Group> {
    let increment = |heap: &Heap| heap.increment.map(|(name, _)| name);
    HEAPS.iter().map(|heap| [heap.full].into_iter().chain(increment(heap)).collect()).collect()
}

pub(crate) fn measure(bench: &Bench, names: &[&str]) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for heap in &HEAPS {
        let increment = heap.increment.filter(|(name, _)| names.contains(name));
        if names.contains(&heap.full) || increment.is_some() {
            figures.extend(one(bench, heap, increment)?);
        }
    }
    figures.retain(|figure| names.contains(&figure.name.as_str()));
    Ok(figures)
}

fn one(bench: &Bench, heap: &Heap, increment: Option<(&str, f64)>) -> Result<Vec<Figure>> {
    let peer = bench.peer_in_memory()?;
    eprintln!("bench: {}: the peer is CRIU {}", heap.full, peer.version()?);
    let ours = bench.ours()?;
    let records = bench.mebibytes(heap.records).to_string();
    let words: Vec<&str> = heap.command.iter().copied().chain([records.as_str()]).collect();
    let subject = Subject::of_image(&bench.folder, &words)?;
    let samples = Samples::take(
        heap.full,
        bench.rounds(ROUNDS),
        ours.as_ref(),
        &peer,
        |engine, round, _, is_last| {
            let mut running = engine.start(&subject, round)?;
            running.report().wait_running()?;
            running.save()?;
            let full = running.bytes()?;
            let mut size = Size { full, increment: None };
            if increment.is_some() {
                running.report().update()?;
                running.save()?;
                let kept = if engine.has_increments() { full } else { 0 };
                size.increment = Some(running.bytes()? - kept);
            }
            if is_last {
                let written = running.report().written()?;
                running.bring_back_and_check(written)?;
            }
            Ok(vec![size])
        },
    )?;
    let figure = |name: &str, times, part: fn(&Size) -> Option<u64>| {
        let part = |size: &Size| part(size).map(|bytes| number(bytes) / 1e6);
        samples.figure(name, "MB", Goal::TimesLess(times), part)
    };
    let full = figure(heap.full, heap.times_less, |size| Some(size.full));
    let more = increment.map(|(name, times)| figure(name, times, |size| size.increment));
    Ok([full].into_iter().chain(more).collect())
}
