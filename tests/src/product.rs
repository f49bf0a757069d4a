//! Where the product's binaries are.

use std::path::PathBuf;

use anyhow::{Result, bail};

/// The folder with `samara-runtime`, `samara-monitor` and `samara`: `$SAMARA_BIN`, else where `script/setup build` puts them.
///
/// # Errors
/// When one of them isn't there.
pub fn binaries() -> Result<PathBuf> {
    let folder = match (std::env::var_os("SAMARA_BIN"), std::env::var_os("CARGO_TARGET_DIR")) {
        (Some(folder), _) => PathBuf::from(folder),
        (None, Some(target)) => PathBuf::from(target).join("release"),
        (None, None) => crate::repository().join("target/release"),
    };
    for name in NAMES {
        if !folder.join(name).is_file() {
            bail!("no {name} in {}: run `script/setup build`, or set SAMARA_BIN", folder.display());
        }
    }
    Ok(folder)
}

/// Every program of ours that runs on a node.
pub const NAMES: [&str; 3] = ["samara-runtime", "samara-monitor", "samara"];
