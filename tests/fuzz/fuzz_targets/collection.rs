//! The list of a collection.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let _ = samara_capsule::collection::CollectionList::decode(bytes);
});
