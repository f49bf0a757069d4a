//! One segment of a page map.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = samara_capsule::pagemap::Segment::decode(bytes);
});
