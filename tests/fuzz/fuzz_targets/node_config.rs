//! The node's configuration.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use samara_store::config::NodeConfig;

fuzz_target!(|text: &str| {
    let _ = NodeConfig::parse(text, Path::new("/etc/samara/config.toml"));
});
