//! `samara capsule`: capsules in object storage, without any engine.

mod diff;
mod inspect;
mod keeping;

use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Subcommand;
use samara_capsule::digest::Digest;
use samara_store::collect::{CollectError, Retention};
use samara_store::config::ConfigError;
use samara_store::history::HistoryError;
use samara_store::layout::{self, LayoutError};
use samara_store::list::ListError;
use samara_store::location::LocationError;
use samara_store::reader::ReadError;
use samara_store::remove::RemoveError;
use samara_store::store::StoreError;
use samara_store::{CapsuleReader, Location, NodeConfig, Store};
use serde::Serialize;

use crate::output::{Output, chain, size, table};

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// List the capsules at and under a prefix
    Ls {
        /// Such as s3://bucket/jobs or file:///var/lib/capsules
        #[arg(value_name = "URL-PREFIX")]
        prefix: String,
    },
    /// Show what a capsule needs and holds, down to its records
    Inspect {
        url: String,
        /// The capsule with this manifest instead of the newest
        #[arg(long, value_name = "sha256:…")]
        digest: Option<Digest>,
    },
    /// Read every blob of a capsule again, and check digests and contents
    Verify {
        url: String,
        /// The capsule with this manifest instead of the newest
        #[arg(long, value_name = "sha256:…")]
        digest: Option<Digest>,
    },
    /// Remove everything at a capsule's address
    Rm { url: String },
    /// List all capsules that an address still has, newest last
    History { url: String },
    /// Show what differs between two capsules of an address
    Diff {
        url: String,
        /// The older one; by default the one before the newest
        #[arg(long, value_name = "sha256:…")]
        from: Option<Digest>,
        /// The newer one; by default the newest
        #[arg(long, value_name = "sha256:…")]
        to: Option<Digest>,
    },
    /// Show which capsule of an address holds how many bytes
    Du { url: String },
    /// Remove old capsules of an address, and blobs that none of them needs
    ///
    /// A capsule is kept if --keep-last or --keep-within says so; without both all are. The newest one from which a
    /// start would go on is always kept.
    Gc {
        url: String,
        /// Keep so many of the newest
        #[arg(long, value_name = "N", value_parser = Retention::parse_last)]
        keep_last: Option<NonZeroU32>,
        /// Keep those that were committed within this time, such as 90m, 12h or 7d
        #[arg(long, value_name = "AGE", value_parser = Retention::parse_age)]
        keep_within: Option<Duration>,
        /// Only show what would be removed
        #[arg(long)]
        dry_run: bool,
    },
    /// Write a capsule as an OCI image layout, for skopeo and the like
    Export {
        url: String,
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        /// The capsule with this manifest instead of the newest
        #[arg(long, value_name = "sha256:…")]
        digest: Option<Digest>,
    },
    /// Commit the capsule of an OCI image layout as the newest one at an address
    Import {
        #[arg(value_name = "DIR")]
        folder: PathBuf,
        url: String,
    },
}

/// Why a verb failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CapsuleError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Location(#[from] LocationError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    List(#[from] ListError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("the records of the capsule can't be shown")]
    Records(#[source] samara_capsule::cbor::DecodeError),
    #[error(transparent)]
    Remove(#[from] RemoveError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    History(#[from] HistoryError),
    #[error(transparent)]
    Collect(#[from] CollectError),
    #[error("{url} has {found} capsules; a comparison takes two, or --from and --to")]
    NothingToCompare { url: String, found: usize },
    #[error("{url} has no capsule {digest}; samara capsule history lists them")]
    NoSuchCapsule { url: String, digest: Digest },
    #[error("the root's files in {digest} can't be read")]
    Files { digest: Digest, source: std::io::Error },
    #[error("the capsule at {url} can't be restored: {faults} of its parts are damaged")]
    Faulty { url: String, faults: usize },
}

/// Runs one verb. On error nothing was printed, except by `verify`, which prints the faults that it found.
pub(crate) fn run(
    verb: Verb,
    config: Option<&Path>,
    output: &mut Output,
) -> Result<(), CapsuleError> {
    let config = match config {
        Some(path) => NodeConfig::load_from(path)?,
        None => NodeConfig::load()?,
    };
    let open = |url: &str, create: bool| -> Result<Store, CapsuleError> {
        Ok(Store::open(&Location::parse(url)?, &config.store, create)?)
    };
    let read = |url: &str, digest: Option<Digest>| -> Result<CapsuleReader, CapsuleError> {
        let store = open(url, false)?;
        Ok(match digest {
            Some(digest) => CapsuleReader::open_digest(&store, digest)?,
            None => CapsuleReader::open_latest(&store)?,
        })
    };
    match verb {
        Verb::Ls { prefix } => list(&open(&prefix, false)?, output),
        Verb::Inspect { url, digest } => inspect::run(&url, &read(&url, digest)?, output),
        Verb::Verify { url, digest } => verify(&url, &read(&url, digest)?, output),
        Verb::Rm { url } => remove(&url, &open(&url, false)?, output),
        Verb::History { url } => keeping::history(&open(&url, false)?, output),
        Verb::Diff { url, from, to } => diff::run(&url, &open(&url, false)?, from, to, output),
        Verb::Du { url } => keeping::usage(&url, &open(&url, false)?, output),
        Verb::Gc { url, keep_last, keep_within, dry_run } => {
            let retention = Retention { keep_last, keep_within };
            keeping::collect(&url, &open(&url, false)?, &retention, dry_run, output)
        }
        Verb::Export { url, folder, digest } => export(&url, &read(&url, digest)?, &folder, output),
        Verb::Import { folder, url } => import(&folder, &url, &open(&url, true)?, output),
    }
}

fn list(store: &Store, output: &mut Output) -> Result<(), CapsuleError> {
    #[derive(Serialize)]
    struct Row {
        url: String,
        state: &'static str,
        epoch: u64,
        generation: u64,
        failed_resumes: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        capsule: Option<RowCapsule>,
        #[serde(skip_serializing_if = "Option::is_none")]
        error: Option<String>,
    }
    #[derive(Serialize)]
    struct RowCapsule {
        digest: Digest,
        created: String,
        stored_bytes: u64,
        raw_bytes: u64,
        architecture: String,
    }
    let rows: Vec<Row> = store
        .addresses()?
        .into_iter()
        .map(|address| {
            let latest = address.state.latest;
            let (state, capsule, error) = match address.capsule {
                None => ("empty", None, None),
                Some(Err(error)) => ("damaged", None, Some(chain(&error))),
                Some(Ok(summary)) => {
                    let capsule = latest.map(|latest| RowCapsule {
                        digest: latest.digest,
                        created: summary.config.created,
                        stored_bytes: summary.stored_bytes,
                        raw_bytes: summary.config.statistics.raw_bytes,
                        architecture: summary.config.requirements.architecture,
                    });
                    ("capsule", capsule, None)
                }
            };
            Row {
                url: address.location.to_string(),
                state,
                epoch: address.state.epoch,
                generation: address.state.generation,
                failed_resumes: address.state.failed_resumes,
                capsule,
                error,
            }
        })
        .collect();
    output.result(&rows, |rows| {
        let cells = |row: &Row| {
            let capsule = row.capsule.as_ref();
            let cell = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
            vec![
                row.url.clone(),
                row.state.to_owned(),
                cell(capsule.map(|capsule| capsule.created.clone())),
                cell(capsule.map(|capsule| size(capsule.raw_bytes))),
                cell(capsule.map(|capsule| size(capsule.stored_bytes))),
                row.epoch.to_string(),
            ]
        };
        let rows: Vec<_> = rows.iter().map(cells).collect();
        table(&["URL", "STATE", "CREATED", "RAW ", "STORED ", "EPOCH "], &rows)
    });
    Ok(())
}

fn verify(url: &str, reader: &CapsuleReader, output: &mut Output) -> Result<(), CapsuleError> {
    #[derive(Serialize)]
    struct Verified {
        url: String,
        digest: Digest,
        whole: bool,
        blobs: u64,
        bytes: u64,
        pages: u64,
        faults: Vec<String>,
    }
    let report = reader.verify(&output.progress("verifying", true));
    let faults: Vec<String> = report.faults.iter().map(|fault| chain(fault)).collect();
    let verified = Verified {
        url: url.to_owned(),
        digest: reader.digest(),
        whole: faults.is_empty(),
        blobs: report.blobs,
        bytes: report.bytes,
        pages: report.pages,
        faults,
    };
    output.result(&verified, |verified| {
        let mut text: String = verified.faults.iter().map(|fault| format!("{fault}\n")).collect();
        if verified.whole {
            let (blobs, bytes, pages) = (verified.blobs, size(verified.bytes), verified.pages);
            text += &format!(
                "{url} is whole: {blobs} blobs, {bytes}, {pages} pages, {}\n",
                verified.digest
            );
        }
        text
    });
    match verified.faults.len() {
        0 => Ok(()),
        faults => Err(CapsuleError::Faulty { url: url.to_owned(), faults }),
    }
}

fn remove(url: &str, store: &Store, output: &mut Output) -> Result<(), CapsuleError> {
    #[derive(Serialize)]
    struct Gone {
        url: String,
        objects: u64,
        bytes: u64,
    }
    let removed = store.remove(&output.progress("removing", false))?;
    let gone = Gone { url: url.to_owned(), objects: removed.objects, bytes: removed.bytes };
    output.result(&gone, |gone| {
        format!("removed {url}: {} objects, {}\n", gone.objects, size(gone.bytes))
    });
    Ok(())
}

#[derive(Serialize)]
struct Copied {
    url: String,
    folder: PathBuf,
    digest: Digest,
    blobs: u64,
    bytes: u64,
}

fn export(
    url: &str,
    reader: &CapsuleReader,
    folder: &Path,
    output: &mut Output,
) -> Result<(), CapsuleError> {
    let layout::Copied { manifest, blobs, bytes } =
        layout::export(reader, folder, &output.progress("exporting", true))?;
    let copied =
        Copied { url: url.to_owned(), folder: folder.to_owned(), digest: manifest, blobs, bytes };
    output.result(&copied, |copied| {
        let folder = folder.display();
        format!("exported {url} to {folder}: {blobs} blobs, {}, {}\n", size(bytes), copied.digest)
    });
    Ok(())
}

fn import(
    folder: &Path,
    url: &str,
    store: &Store,
    output: &mut Output,
) -> Result<(), CapsuleError> {
    let (_, layout::Copied { manifest, blobs, bytes }) =
        layout::import(folder, store, &output.progress("importing", true))?;
    let copied =
        Copied { url: url.to_owned(), folder: folder.to_owned(), digest: manifest, blobs, bytes };
    output.result(&copied, |copied| {
        let folder = folder.display();
        format!("imported {folder} to {url}: {blobs} blobs, {}, {}\n", size(bytes), copied.digest)
    });
    Ok(())
}
