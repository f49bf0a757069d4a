//! One frame, declared to have any number of bytes; one of differences over a base of any length.
#![no_main]

use libfuzzer_sys::fuzz_target;
use samara_capsule::digest::FrameDigest;
use samara_capsule::frame::{BaseFrame, Codec, FrameDecoder};

fuzz_target!(|input: (u8, u32, &[u8], u16, bool)| {
    let (kind, raw_bytes, stored, base_bytes, is_named) = input;
    let raw_bytes = raw_bytes as usize;
    let mut raw = Vec::new();
    let mut decoder = FrameDecoder::new().expect("memory for a context");
    let decoded = match kind % 3 {
        0 => decoder.decode(Codec::Raw, stored, raw_bytes, &mut raw),
        1 => decoder.decode(Codec::Zstd, stored, raw_bytes, &mut raw),
        _ => {
            // With the digest that it names, so that what follows it is reached.
            let named = stored.first_chunk().filter(|_| is_named);
            let digest = named.map_or_else(|| FrameDigest::of(b""), |b| FrameDigest::from_bytes(*b));
            let base = vec![7; usize::from(base_bytes) * 16];
            let base = BaseFrame { digest, raw: &base };
            decoder.decode_delta(stored, raw_bytes, base, &mut raw)
        }
    };
    if decoded.is_ok() {
        assert_eq!(raw.len(), raw_bytes);
    }
});
