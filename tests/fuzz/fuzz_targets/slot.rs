//! One slot of the log of an address.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = samara_capsule::log::Slot::decode(bytes);
});
