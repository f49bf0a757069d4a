//! The seek table of a pack. Frames that it names lie inside of the pack, and each can be read without harm.
#![no_main]

use libfuzzer_sys::fuzz_target;
use samara_capsule::frame::{Codec, FrameDecoder};

fuzz_target!(|bytes: &[u8]| {
    let Ok(frames) = samara_capsule::pack::read_pack(bytes) else { return };
    let mut decoder = FrameDecoder::new().expect("memory for a context");
    let mut raw = Vec::new();
    for frame in frames {
        let start = frame.offset as usize;
        let stored = &bytes[start..start + frame.stored_bytes as usize];
        let raw_bytes = frame.raw_bytes as usize;
        match frame.codec {
            Codec::Raw | Codec::Zstd => drop(decoder.decode(frame.codec, stored, raw_bytes, &mut raw)),
            Codec::Delta => drop(decoder.decode_changes(stored, raw_bytes, &mut raw)),
        }
    }
});
