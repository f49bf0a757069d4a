//! A capsule's configuration, its requirements and statistics.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = samara_capsule::config::CapsuleConfig::decode(bytes);
});
