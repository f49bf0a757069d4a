//! Rates of what a capture spends its time on, one thread: codecs by level and frame size, and digests.
//!
//! `cargo run --release -p samara-capsule --example codec -- FILE...`
//!
//! Each FILE is memory as it is, such as the part of a core dump. Without one, pages of small objects are made up.
//! Rates are per second of processor time, so that what else runs on the machine distorts them little.

use std::error::Error;
use std::io::Write as _;
use std::time::Duration;

use samara_capsule::digest::{Digest, FrameDigest};
use samara_capsule::transfer::PAGE_BYTES;

/// Processor time of this thread so far.
fn cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("the kernel has schedstat");
    let nanoseconds = text.split_whitespace().next().and_then(|first| first.parse().ok());
    Duration::from_nanos(nanoseconds.expect("schedstat begins with a number"))
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut out = std::io::stdout().lock();
    let mut inputs = Vec::new();
    for path in std::env::args().skip(1) {
        inputs.push((path.clone(), std::fs::read(&path)?));
    }
    if inputs.is_empty() {
        inputs.push(("small objects".to_owned(), small_objects(64 << 20)));
        inputs.push(("noise".to_owned(), noise(64 << 20)));
    }
    for (name, input) in &inputs {
        writeln!(out, "{name}: {} MB", input.len() / 1_000_000)?;
        let rate = |start: Duration| input.len() as f64 / 1e6 / (cpu() - start).as_secs_f64();
        let start = cpu();
        let digest = Digest::of(input);
        writeln!(out, "  sha256            {:5.0} MB/s ({digest})", rate(start))?;
        let start = cpu();
        let digests = input.chunks(256 << 10).map(|piece| FrameDigest::of(piece).as_bytes()[0]);
        let check = digests.fold(0, |sum, byte| sum ^ byte);
        writeln!(out, "  blake3, 256 KiB   {:5.0} MB/s ({check:02x})", rate(start))?;
        let start = cpu();
        let zeros = input.chunks_exact(PAGE_BYTES).filter(|page| *page == [0; PAGE_BYTES]).count();
        writeln!(out, "  zero pages        {:5.0} MB/s ({zeros} found)", rate(start))?;
        for level in [-3, -1, 1, 2, 3] {
            for frame_bytes in [128 << 10, 256 << 10, 1 << 20, 2 << 20] {
                codec(&mut out, input, level, frame_bytes)?;
            }
        }
    }
    Ok(())
}

fn codec(out: &mut impl std::io::Write, input: &[u8], level: i32, frame_bytes: usize) -> Result<(), Box<dyn Error>> {
    let mut compressor = zstd::bulk::Compressor::new(level)?;
    let mut decompressor = zstd::bulk::Decompressor::new()?;
    let mut frames = Vec::new();
    let start = cpu();
    for frame in input.chunks(frame_bytes) {
        let mut stored = Vec::with_capacity(zstd::zstd_safe::compress_bound(frame.len()));
        compressor.compress_to_buffer(frame, &mut stored)?;
        stored.shrink_to_fit();
        frames.push(stored);
    }
    let compress = (cpu() - start).as_secs_f64();
    let stored: usize = frames.iter().map(Vec::len).sum();
    let mut raw = Vec::with_capacity(frame_bytes);
    let start = cpu();
    for frame in &frames {
        raw.clear();
        decompressor.decompress_to_buffer(frame, &mut raw)?;
    }
    let decompress = (cpu() - start).as_secs_f64();
    let megabytes = input.len() as f64 / 1e6;
    writeln!(
        out,
        "  zstd {level:2}, {:4} KiB  {:5.0} MB/s, back {:5.0} MB/s, {:.2}:1",
        frame_bytes >> 10,
        megabytes / compress,
        megabytes / decompress,
        input.len() as f64 / stored as f64
    )?;
    Ok(())
}

fn random() -> impl FnMut() -> u64 {
    let mut state = 1u64;
    move || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        state >> 33
    }
}

fn small_objects(bytes: usize) -> Vec<u8> {
    let mut next = random();
    let mut memory = Vec::with_capacity(bytes + 64);
    while memory.len() < bytes {
        let kind = next() % 64;
        memory.extend_from_slice(&(0x5555_0000_0000 + kind * 4096).to_le_bytes());
        memory.extend_from_slice(&kind.to_le_bytes());
        memory.extend_from_slice(&next().to_le_bytes());
        memory.extend_from_slice(&(0x7fff_0000_0000 + (next() & 0xffff) * 16).to_le_bytes());
        memory.extend_from_slice(&[0; 16]);
    }
    memory.truncate(bytes);
    memory
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut next = random();
    (0..bytes / 4).flat_map(|_| next().to_le_bytes().into_iter().take(4)).collect()
}
