//! The images of `script/images`, by name.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};

use crate::process::Call;

/// An image that was made on this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Image {
    /// Shell, compiler, SQLite and the workloads.
    TestBase,
    /// bwa, samtools, genomes and reads.
    Demo,
    /// Python, Perl, R, Node, Java, SQLite, and the programs of `tests/programs`.
    Programs,
    /// PostgreSQL, Redis, Open MPI, STAR, ffmpeg, and the same programs.
    Services,
}

impl Image {
    /// What engines call it.
    pub fn tag(self) -> &'static str {
        match self {
            Image::TestBase => "samara-test-base",
            Image::Demo => "samara-demo",
            Image::Programs => "samara-programs",
            Image::Services => "samara-services",
        }
    }

    /// The archive that `docker load` takes. Made when it isn't there.
    ///
    /// # Errors
    /// When it cannot be made: `script/images` says why.
    pub fn archive(self) -> Result<PathBuf> {
        let name = self.tag().trim_start_matches("samara-");
        // Making one takes a minute or two here; a slow mirror may take much longer.
        let made = Call::new(crate::repository().join("script/images"))
            .args([name])
            .within(Duration::from_secs(1800));
        Ok(PathBuf::from(made.output().context("making a test image")?))
    }
}
