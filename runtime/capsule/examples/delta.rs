//! What differences save, and what they cost: a program's memory at two instants, one thread.
//!
//! `cargo run --release -p samara-capsule --example delta -- BEFORE AFTER`
//!
//! BEFORE and AFTER are the same ranges of memory of one process, page by page at the same place. For 1, 2, 4 … changed pages
//! of a frame of 256 KiB: stored bytes and processor time a page, stored whole (in frames of 64 such pages) and as differences
//! (one frame for each base, which has to be decoded), and how fast a link must be for the time to be worth more than the bytes.

use std::error::Error;
use std::io::Write as _;
use std::time::Duration;

use samara_capsule::digest::FrameDigest;
use samara_capsule::frame::{BaseFrame, FrameDecoder, FrameEncoder, delta_overhead_bytes};
use samara_capsule::transfer::PAGE_BYTES;

const FRAME_PAGES: usize = 64;

/// Processor time of this thread so far.
fn cpu() -> Duration {
    let text =
        std::fs::read_to_string("/proc/thread-self/schedstat").expect("the kernel has schedstat");
    let nanoseconds = text.split_whitespace().next().and_then(|first| first.parse().ok());
    Duration::from_nanos(nanoseconds.expect("schedstat begins with a number"))
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut paths = std::env::args().skip(1);
    let (Some(before), Some(after)) = (paths.next(), paths.next()) else {
        return Err("usage: delta BEFORE AFTER".into());
    };
    let (before, after) = (std::fs::read(before)?, std::fs::read(after)?);
    let pages = before.chunks_exact(PAGE_BYTES).zip(after.chunks_exact(PAGE_BYTES));
    let pages: Vec<(&[u8], &[u8])> =
        pages.filter(|(before, _)| **before != [0; PAGE_BYTES]).collect();
    let changed = pages.iter().filter(|(before, after)| before != after).count();
    let mut out = std::io::stdout().lock();
    writeln!(out, "{} pages with content, of which {changed} have changed", pages.len())?;
    let frames: Vec<&[(&[u8], &[u8])]> = pages.chunks_exact(FRAME_PAGES).collect();
    for wanted in [1, 2, 4, 8, 16, 32, 64] {
        of_each_frame(&mut out, &frames, wanted)?;
    }
    Ok(())
}

/// As if of each frame at most `wanted` of the changed pages had changed.
fn of_each_frame(
    out: &mut impl std::io::Write,
    frames: &[&[(&[u8], &[u8])]],
    wanted: usize,
) -> Result<(), Box<dyn Error>> {
    let mut encoder = FrameEncoder::new()?;
    let mut decoder = FrameDecoder::new()?;
    let mut stored = Vec::new();
    let mut bases = Vec::new();
    let mut whole = Vec::new();
    for frame in frames {
        let raw: Vec<u8> = frame.iter().flat_map(|(before, _)| before.to_vec()).collect();
        let codec = encoder.encode(&raw, &mut stored)?;
        let changed = (0u8..).zip(frame.iter()).filter(|(_, (before, after))| before != after);
        let changed: Vec<(u8, &[u8])> = changed.map(|(slot, (_, after))| (slot, *after)).collect();
        // Evenly, from all over the frame.
        let step = changed.len().div_ceil(wanted).max(1);
        let some: Vec<(u8, &[u8])> = changed.into_iter().step_by(step).collect();
        whole.extend(some.iter().flat_map(|(_, page)| page.to_vec()));
        bases.push((codec, stored.clone(), some));
    }
    let count = whole.len() / PAGE_BYTES;
    if count == 0 {
        return Ok(());
    }
    let start = cpu();
    let mut whole_bytes = 0;
    for raw in whole.chunks(FRAME_PAGES * PAGE_BYTES) {
        encoder.encode(raw, &mut stored)?;
        whole_bytes += stored.len() + 56;
    }
    let whole_time = (cpu() - start).as_secs_f64();

    let mut base = Vec::new();
    let mut changes = Vec::new();
    let (mut delta_bytes, mut largest) = (0, 0);
    let start = cpu();
    for (codec, base_stored, some) in bases.iter().filter(|(_, _, some)| !some.is_empty()) {
        let digest = FrameDigest::of(base_stored);
        decoder.decode(*codec, base_stored, FRAME_PAGES * PAGE_BYTES, &mut base)?;
        let over = BaseFrame { digest, raw: &base };
        encoder.encode_delta(some.iter().copied(), over, &mut stored)?;
        delta_bytes += stored.len() + delta_overhead_bytes(0);
        largest = largest.max(some.len());
        changes.push((over.digest, stored.clone(), some.len()));
    }
    let delta_time = (cpu() - start).as_secs_f64();

    let start = cpu();
    let mut back = Vec::new();
    for (_, stored, pages) in &changes {
        decoder.decode_changes(stored, pages * PAGE_BYTES, &mut back)?;
    }
    let back_time = (cpu() - start).as_secs_f64();
    let a_page = |value: f64| value / count as f64;
    let saved = whole_bytes as f64 - delta_bytes as f64;
    let worth = match delta_time > whole_time {
        true => format!("below {:.0} MB/s", saved / 1e6 / (delta_time - whole_time)),
        false => "always".to_owned(),
    };
    writeln!(
        out,
        "{:5.1} a frame (at most {largest:2}): whole {:4.0} bytes, {:4.1} us; differences {:4.0} bytes, {:5.1} us, back {:.1} us; worth it {worth}",
        count as f64 / changes.len() as f64,
        a_page(whole_bytes as f64),
        a_page(whole_time * 1e6),
        a_page(delta_bytes as f64),
        a_page(delta_time * 1e6),
        a_page(back_time * 1e6),
    )?;
    Ok(())
}
