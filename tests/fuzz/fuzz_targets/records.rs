//! The records of a container: what a restore is built from. Whatever decodes is looked at as a restore does before it begins.
#![no_main]

use libfuzzer_sys::fuzz_target;
use samara_oci::saved::Saved;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(saved) = samara_capsule::cbor::decode_record::<Saved>(bytes) {
        let _ = samara_engine::host::check_records(&saved.container);
        let again = samara_capsule::cbor::encode_record(&saved).expect("what was decoded can be encoded");
        let twice: Saved = samara_capsule::cbor::decode_record(&again).expect("what was encoded can be decoded");
        let written = samara_capsule::cbor::encode_record(&twice).expect("what was decoded can be encoded");
        assert_eq!(again, written, "records change when they are written again");
    }
});
