//! The manifest, which binds a capsule's blobs.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = samara_capsule::manifest::Manifest::decode(bytes);
});
