//! Addresses of capsules, as users and images write them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use samara_store::Location;

fuzz_target!(|text: &str| {
    if let Ok(location) = Location::parse(text) {
        let again = Location::parse(&location.to_string()).expect("what was printed can be read");
        assert_eq!(again, location);
    }
});
