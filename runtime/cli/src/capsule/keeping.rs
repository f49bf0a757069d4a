//! `samara capsule history`, `du` and `gc`: what an address has, who holds its bytes, and what of it goes.

use std::time::SystemTime;

use samara_capsule::collection::Catalogued;
use samara_capsule::config::Report;
use samara_capsule::digest::Digest;
use samara_store::Store;
use samara_store::collect::{CollectOptions, Retention};
use samara_store::history::Told;
use serde::Serialize;

use super::CapsuleError;
use crate::output::{Output, chain, duration, size, table};

/// Digits of a digest that tables show: enough to tell an address's capsules apart.
const DIGEST_DIGITS: usize = 12;

/// A capsule of an address's history.
#[derive(Serialize)]
struct Row {
    digest: Digest,
    /// Whether a start would go on from it.
    latest: bool,
    slot: u64,
    committed: String,
    #[serde(flatten)]
    capsule: Option<RowCapsule>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

#[derive(Serialize)]
struct RowCapsule {
    created: String,
    epoch: u64,
    generation: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    parent: Option<Digest>,
    raw_bytes: u64,
    stored_bytes: u64,
    new_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    report: Option<Report>,
}

/// A column of the history: its heading, and what stands in it. More of them can be added here.
type Column = (&'static str, fn(&Row) -> String);

const HISTORY: [Column; 11] = [
    ("COMMITTED", |row| row.committed.clone()),
    ("EPOCH ", |row| of_capsule(row, |capsule| capsule.epoch.to_string())),
    ("GEN ", |row| of_capsule(row, |capsule| capsule.generation.to_string())),
    ("RAW ", |row| of_capsule(row, |capsule| size(capsule.raw_bytes))),
    ("STORED ", |row| of_capsule(row, |capsule| size(capsule.stored_bytes))),
    ("NEW ", |row| of_capsule(row, |capsule| size(capsule.new_bytes))),
    ("PAUSE ", |row| of_report(row, |report| report.pause_us)),
    ("TOOK ", |row| {
        of_report(row, |report| report.phases.last().map(|last| last.start_us + last.duration_us))
    }),
    ("PARENT", |row| {
        of_capsule(row, |capsule| capsule.parent.map_or_else(none, |parent| short(&parent)))
    }),
    ("CAPSULE", |row| short(&row.digest)),
    ("STATE", |row| {
        match (&row.error, row.latest) {
            (Some(_), _) => "damaged",
            (None, true) => "newest",
            (None, false) => "kept",
        }
        .to_owned()
    }),
];

fn of_capsule(row: &Row, cell: impl FnOnce(&RowCapsule) -> String) -> String {
    row.capsule.as_ref().map_or_else(none, cell)
}

/// A time that a capsule's report tells, if it does.
fn of_report(row: &Row, time_us: impl FnOnce(&Report) -> Option<u64>) -> String {
    let report = row.capsule.as_ref().and_then(|capsule| capsule.report.as_ref());
    report.and_then(time_us).map_or_else(none, duration)
}

fn none() -> String {
    "-".to_owned()
}

pub(super) fn short(digest: &Digest) -> String {
    digest.hex().chars().take(DIGEST_DIGITS).collect()
}

/// Prints all capsules that an address has, newest last.
pub(super) fn history(store: &Store, output: &mut Output) -> Result<(), CapsuleError> {
    let row = |told: Told| {
        let Catalogued { capsule, committed } = told.catalogued;
        let error = told.capsule.as_ref().err().map(|error| chain(error));
        let told_capsule = told.capsule.ok().map(|told| RowCapsule {
            created: told.config.created,
            epoch: told.config.epoch,
            generation: told.config.generation,
            parent: told.config.parent,
            raw_bytes: told.config.statistics.raw_bytes,
            stored_bytes: told.stored_bytes,
            new_bytes: told.new_bytes,
            report: told.config.report,
        });
        Row {
            digest: capsule.digest,
            latest: told.is_latest,
            slot: capsule.slot,
            committed,
            capsule: told_capsule,
            error,
        }
    };
    let rows: Vec<Row> = store.history()?.into_iter().map(row).collect();
    output.result(&rows, |rows| {
        let cells = |row| HISTORY.iter().map(|(_, cell)| cell(row)).collect();
        table(&HISTORY.map(|(heading, _)| heading), &rows.iter().map(cells).collect::<Vec<_>>())
    });
    Ok(())
}

/// Prints who holds which bytes of an address.
pub(super) fn usage(url: &str, store: &Store, output: &mut Output) -> Result<(), CapsuleError> {
    #[derive(Serialize)]
    struct Used<'a> {
        url: &'a str,
        capsules: Vec<UsedCapsule>,
        unreferenced_blobs: u64,
        unreferenced_bytes: u64,
        list_bytes: u64,
        total_bytes: u64,
    }
    #[derive(Serialize)]
    struct UsedCapsule {
        digest: Digest,
        committed: String,
        alone_bytes: u64,
        shared_bytes: u64,
        total_bytes: u64,
    }
    let usage = store.usage()?;
    let capsules = usage.capsules.into_iter().map(|one| UsedCapsule {
        digest: one.catalogued.capsule.digest,
        committed: one.catalogued.committed,
        alone_bytes: one.alone_bytes,
        shared_bytes: one.shared_bytes,
        total_bytes: one.alone_bytes + one.shared_bytes,
    });
    let used = Used {
        url,
        capsules: capsules.collect(),
        unreferenced_blobs: usage.unreferenced_blobs,
        unreferenced_bytes: usage.unreferenced_bytes,
        list_bytes: usage.list_bytes,
        total_bytes: usage.total_bytes,
    };
    output.result(&used, |used| {
        let row = |one: &UsedCapsule| {
            vec![
                short(&one.digest),
                one.committed.clone(),
                size(one.alone_bytes),
                size(one.shared_bytes),
                size(one.total_bytes),
            ]
        };
        let rows: Vec<_> = used.capsules.iter().map(row).collect();
        let (total, idle) = (size(used.total_bytes), size(used.unreferenced_bytes));
        let blobs = used.unreferenced_blobs;
        table(&["CAPSULE", "COMMITTED", "ALONE ", "SHARED ", "TOTAL "], &rows)
            + &format!(
                "{url} holds {total}, of which {idle} in {blobs} blobs belong to no capsule\n"
            )
    });
    Ok(())
}

/// Removes what `retention` does not keep, and prints what that was.
pub(super) fn collect(
    url: &str,
    store: &Store,
    retention: &Retention,
    dry_run: bool,
    output: &mut Output,
) -> Result<(), CapsuleError> {
    #[derive(Serialize)]
    struct Gone<'a> {
        url: &'a str,
        dry_run: bool,
        dropped: Vec<GoneCapsule>,
        kept: Vec<GoneCapsule>,
        blobs: u64,
        bytes: u64,
        young_blobs: u64,
        young_bytes: u64,
    }
    #[derive(Serialize)]
    struct GoneCapsule {
        digest: Digest,
        committed: String,
    }
    let options = CollectOptions { dry_run, ..CollectOptions::default() };
    let progress = output.progress("removing", false);
    let collected = store.collect(retention, SystemTime::now(), &options, &progress)?;
    let capsules = |capsules: Vec<Catalogued>| -> Vec<GoneCapsule> {
        let one =
            |one: Catalogued| GoneCapsule { digest: one.capsule.digest, committed: one.committed };
        capsules.into_iter().map(one).collect()
    };
    let gone = Gone {
        url,
        dry_run,
        dropped: capsules(collected.dropped),
        kept: capsules(collected.kept),
        blobs: collected.blobs,
        bytes: collected.bytes,
        young_blobs: collected.young_blobs,
        young_bytes: collected.young_bytes,
    };
    output.result(&gone, |gone| {
        let row = |one: &GoneCapsule| vec![short(&one.digest), one.committed.clone()];
        let rows: Vec<_> = gone.dropped.iter().map(row).collect();
        let mut text = match rows.is_empty() {
            true => String::new(),
            false => table(&["CAPSULE", "COMMITTED"], &rows),
        };
        let (capsules, blobs, kept) = (gone.dropped.len(), gone.blobs, gone.kept.len());
        let (bytes, verb) = (size(gone.bytes), if dry_run { "would remove" } else { "removed" });
        text += &format!(
            "{verb} {capsules} capsules of {url}: {blobs} blobs, {bytes}; {kept} capsules are kept\n"
        );
        if gone.young_blobs > 0 {
            let (blobs, bytes) = (gone.young_blobs, size(gone.young_bytes));
            text += &format!("{blobs} blobs, {bytes}, belong to no capsule and are too young to go\n");
        }
        text
    });
    Ok(())
}
