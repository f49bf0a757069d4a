//! One frame, declared to have any number of bytes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use samara_capsule::frame::{Codec, FrameDecoder};

fuzz_target!(|input: (bool, u32, &[u8])| {
    let (compressed, raw_bytes, stored) = input;
    let codec = if compressed { Codec::Zstd } else { Codec::Raw };
    let mut raw = Vec::new();
    let mut decoder = FrameDecoder::new().expect("memory for a context");
    if decoder.decode(codec, stored, raw_bytes as usize, &mut raw).is_ok() {
        assert_eq!(raw.len(), raw_bytes as usize);
    }
});
