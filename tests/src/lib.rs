//! The harness of the system tests, of `script/demo` and of `script/bench`: docker engines that share nothing, an object
//! store between them, containers that run the workloads of `tests/workloads`, and guards that leave nothing behind.
//!
//! Invariants: every wait has a bound and says what it waited for; every process, mount, control group, bridge and folder
//! belongs to a value that removes it when dropped, also while a panic unwinds; what a run that was killed left behind is
//! removed by the next one ([`node::sweep`]).
//!
//! It knows the product by its command line only, and has no part of it as a dependency.

pub mod bundle;
pub mod container;
pub mod image;
pub mod node;
pub mod object_store;
pub mod process;
pub mod product;
pub mod random;
pub mod terminal;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};

/// The repository's root.
pub fn repository() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("tests/ is a folder of the repository")
        .to_path_buf()
}

/// Where images, peers and the folders of running engines are, as in `script/prelude.bash`.
pub fn cache() -> PathBuf {
    std::env::var_os("SAMARA_CACHE")
        .map_or_else(|| PathBuf::from("/var/cache/samara"), PathBuf::from)
}

/// Asks `holds` until it answers, at most `bound`. An error of `holds` ends the wait at once.
pub fn until<T>(
    what: &str,
    bound: Duration,
    mut holds: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let begin = Instant::now();
    loop {
        if let Some(value) = holds().with_context(|| format!("while waiting for {what}"))? {
            return Ok(value);
        }
        if begin.elapsed() > bound {
            bail!("no {what} within {bound:?}");
        }
        // Short against everything that is waited for, long against what asking costs.
        std::thread::sleep(Duration::from_millis(5));
    }
}
