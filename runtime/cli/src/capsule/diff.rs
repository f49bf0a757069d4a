//! `samara capsule diff`: what differs between two capsules of an address.
//!
//! Pages are compared by where they are stored, records field by field, and the files of the root by reading both layers.
//! As for `inspect`, the records may be those of any version: what owns a space is known by where its number stands.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read};

use ciborium::Value;
use samara_capsule::cbor::decode_record;
use samara_capsule::digest::Digest;
use samara_capsule::transfer::{PAGE_BYTES, Source as _, SpaceId, StreamName};
use samara_store::diff::{PageChanges, compare_pages};
use samara_store::{CapsuleReader, Store};
use serde::Serialize;
use sha2::Digest as _;

use super::CapsuleError;
use super::inspect::{json, printable};
use crate::output::{Output, size, table};

/// The stream with the changes to the container's root.
const ROOT_STREAM: &str = "root";

/// Differences of a kind that the text shows.
const SHOWN_MAX: usize = 40;

/// Differences of records that are looked for.
const RECORDS_MAX: usize = 100_000;

/// Files of a layer that are compared.
const FILES_MAX: usize = 2_000_000;

/// What tells one element of a list from the others, wherever it stands in the list.
const IDENTITIES: [&str; 6] = ["pid", "tid", "fd", "start", "id", "path"];

#[derive(Serialize)]
struct Differences<'a> {
    url: &'a str,
    from: Digest,
    to: Digest,
    memory: Vec<Memory>,
    records: Vec<RecordChange>,
    files: Vec<FileChange>,
    streams: Vec<StreamChange>,
}

#[derive(Serialize)]
struct Memory {
    owner: String,
    changed_pages: u64,
    added_pages: u64,
    removed_pages: u64,
    unchanged_pages: u64,
    /// Of changed and added pages.
    bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Change {
    Added,
    Changed,
    Removed,
}

impl Change {
    fn sign(self) -> char {
        match self {
            Change::Added => '+',
            Change::Changed => '~',
            Change::Removed => '-',
        }
    }
}

#[derive(Serialize)]
struct RecordChange {
    change: Change,
    path: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<serde_json::Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    to: Option<serde_json::Value>,
}

#[derive(Serialize)]
struct FileChange {
    change: Change,
    path: String,
    /// What the newer one has there, or had.
    kind: &'static str,
    bytes: u64,
    /// Of a changed file: whether its content differs, or only what is told of it.
    content: bool,
}

#[derive(Serialize)]
struct StreamChange {
    name: String,
    from_bytes: u64,
    to_bytes: u64,
    same: bool,
}

/// Prints what differs between the capsule `from` and the capsule `to`.
pub(super) fn run(
    url: &str,
    store: &Store,
    from: Option<Digest>,
    to: Option<Digest>,
    output: &mut Output,
) -> Result<(), CapsuleError> {
    let known: Vec<Digest> = store
        .capsules()
        .map_err(samara_store::history::HistoryError::from)?
        .iter()
        .map(|one| one.capsule.digest)
        .collect();
    let too_few = || CapsuleError::NothingToCompare { url: url.to_owned(), found: known.len() };
    let position = |digest: Digest| {
        let found = known.iter().position(|one| *one == digest);
        found.ok_or_else(|| CapsuleError::NoSuchCapsule { url: url.to_owned(), digest })
    };
    let to = match to {
        Some(digest) => position(digest)?,
        None => known.len().checked_sub(1).ok_or_else(too_few)?,
    };
    let from = match from {
        Some(digest) => position(digest)?,
        None => to.checked_sub(1).ok_or_else(too_few)?,
    };
    let open = |index: usize| -> Result<CapsuleReader, CapsuleError> {
        let digest = *known.get(index).ok_or_else(too_few)?;
        Ok(CapsuleReader::open_digest(store, digest)?)
    };
    let (from, to) = (open(from)?, open(to)?);
    let records = |reader: &CapsuleReader| -> Result<Value, CapsuleError> {
        decode_record(&reader.records()?).map_err(CapsuleError::Records)
    };
    let (old, new) = (records(&from)?, records(&to)?);
    let mut changes = Vec::new();
    compare_values("", &old, &new, &mut changes);
    let differences = Differences {
        url,
        from: from.digest(),
        to: to.digest(),
        memory: memory(&from, &old, &to, &new)?,
        records: changes,
        files: files(&from, &to)?,
        streams: streams(&from, &to),
    };
    output.result(&differences, text);
    Ok(())
}

fn memory(
    from: &CapsuleReader,
    old: &Value,
    to: &CapsuleReader,
    new: &Value,
) -> Result<Vec<Memory>, CapsuleError> {
    let (from_owners, to_owners) = (owners(from, old), owners(to, new));
    let all: BTreeSet<&String> = from_owners.keys().chain(to_owners.keys()).collect();
    let mut memory = Vec::new();
    for owner in all {
        let side = |reader, owners: &BTreeMap<String, SpaceId>| {
            owners.get(owner).map(|space| (reader, *space))
        };
        let PageChanges { unchanged, changed, added, removed } =
            compare_pages(side(from, &from_owners), side(to, &to_owners))?;
        memory.push(Memory {
            owner: owner.clone(),
            changed_pages: changed,
            added_pages: added,
            removed_pages: removed,
            unchanged_pages: unchanged,
            bytes: (changed + added) * PAGE_BYTES as u64,
        });
    }
    Ok(memory)
}

/// The spaces of a capsule by who has them, as the records tell; their numbers may differ from capsule to capsule.
fn owners(reader: &CapsuleReader, records: &Value) -> BTreeMap<String, SpaceId> {
    let mut named = BTreeMap::new();
    name_spaces(records, "", None, &mut named);
    let mut owners = BTreeMap::new();
    for space in reader.spaces() {
        let name = named.get(&space.0).cloned().unwrap_or_else(|| space.to_string());
        // A name that two would have tells nothing.
        let name = if owners.contains_key(&name) { format!("{name}, {space}") } else { name };
        owners.insert(name, space);
    }
    owners
}

fn name_spaces(
    value: &Value,
    path: &str,
    process: Option<&str>,
    named: &mut BTreeMap<u32, String>,
) {
    match value {
        Value::Map(fields) => {
            let own = process_name(value);
            let process = own.as_deref().or(process);
            for (key, value) in fields {
                let key = key.as_text().unwrap_or_default();
                match value.as_integer().and_then(|number| u32::try_from(number).ok()) {
                    Some(space) if key == "space" => {
                        let name = process.map_or_else(|| path.to_owned(), str::to_owned);
                        named.entry(space).or_insert(name);
                    }
                    _ => name_spaces(value, &join(path, key), process, named),
                }
            }
        }
        Value::Array(items) => {
            for (label, item) in labels(items).iter().zip(items) {
                name_spaces(item, &format!("{path}[{label}]"), process, named);
            }
        }
        _ => {}
    }
}

/// `process 7 (bash)` for the record of a process.
fn process_name(value: &Value) -> Option<String> {
    let pid = i128::from(field(value, "pid")?.as_integer()?);
    Some(match field(value, "name").and_then(Value::as_bytes) {
        Some(name) => format!("process {pid} ({})", printable(&String::from_utf8_lossy(name))),
        None => format!("process {pid}"),
    })
}

fn field<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    let found = value.as_map()?.iter().find(|(key, _)| key.as_text() == Some(name));
    found.map(|(_, value)| value)
}

fn join(path: &str, name: &str) -> String {
    match path {
        "" => name.to_owned(),
        path => format!("{path}.{name}"),
    }
}

/// What each element of a list is called: by what identifies it, if that tells all of them apart, else by its number.
fn labels(items: &[Value]) -> Vec<String> {
    for name in IDENTITIES {
        let label = |item| field(item, name).map(|value| format!("{name} {}", plain(value)));
        let labels: Option<Vec<String>> = items.iter().map(label).collect();
        let labels = labels.unwrap_or_default();
        if !labels.is_empty() && labels.iter().collect::<BTreeSet<_>>().len() == items.len() {
            return labels;
        }
    }
    (0..items.len()).map(|index| index.to_string()).collect()
}

fn plain(value: &Value) -> String {
    match json(value) {
        serde_json::Value::String(text) => printable(&text),
        other => printable(&other.to_string()),
    }
}

/// The parts of a value that has any, with their paths.
fn parts<'a>(path: &str, value: &'a Value) -> Option<Vec<(String, &'a Value)>> {
    match value {
        Value::Map(fields) => {
            Some(fields.iter().map(|(key, value)| (join(path, &plain(key)), value)).collect())
        }
        Value::Array(items) => {
            let paths = labels(items).into_iter().map(|label| format!("{path}[{label}]"));
            Some(paths.zip(items).collect())
        }
        _ => None,
    }
}

fn compare_values(path: &str, old: &Value, new: &Value, changes: &mut Vec<RecordChange>) {
    if old == new || changes.len() >= RECORDS_MAX {
        return;
    }
    let (Some(old_parts), Some(new_parts)) = (parts(path, old), parts(path, new)) else {
        changes.push(RecordChange {
            change: Change::Changed,
            path: path.to_owned(),
            from: Some(json(old)),
            to: Some(json(new)),
        });
        return;
    };
    let newer: BTreeMap<&str, &Value> =
        new_parts.iter().map(|(path, value)| (path.as_str(), *value)).collect();
    let older: BTreeSet<&str> = old_parts.iter().map(|(path, _)| path.as_str()).collect();
    for (path, old) in &old_parts {
        match newer.get(path.as_str()) {
            Some(new) => compare_values(path, old, new, changes),
            None => changes.push(RecordChange {
                change: Change::Removed,
                path: path.clone(),
                from: Some(json(old)),
                to: None,
            }),
        }
    }
    for (path, new) in new_parts.iter().filter(|(path, _)| !older.contains(path.as_str())) {
        changes.push(RecordChange {
            change: Change::Added,
            path: path.clone(),
            from: None,
            to: Some(json(new)),
        });
    }
    changes.truncate(RECORDS_MAX);
}

/// A file as its layer tells of it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct FileState {
    kind: &'static str,
    bytes: u64,
    content: [u8; 32],
    /// Mode, owner, times, attributes and the like.
    metadata: [u8; 32],
}

fn files(from: &CapsuleReader, to: &CapsuleReader) -> Result<Vec<FileChange>, CapsuleError> {
    let name = StreamName(ROOT_STREAM.to_owned());
    let parts = |reader: &CapsuleReader| reader.manifest().streams.get(&name).cloned();
    if parts(from) == parts(to) {
        return Ok(Vec::new());
    }
    let read = |reader: &CapsuleReader| -> Result<BTreeMap<String, FileState>, CapsuleError> {
        let failed = |source| CapsuleError::Files { digest: reader.digest(), source };
        match reader.stream(&name).map_err(failed)? {
            Some(stream) => read_layer(stream).map_err(failed),
            None => Ok(BTreeMap::new()),
        }
    };
    Ok(compare_files(&read(from)?, &read(to)?))
}

fn compare_files(
    old: &BTreeMap<String, FileState>,
    new: &BTreeMap<String, FileState>,
) -> Vec<FileChange> {
    let all: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let change = |path: &String| {
        let (change, state, content) = match (old.get(path), new.get(path)) {
            (Some(old), Some(new)) if old == new => return None,
            (Some(old), Some(new)) => {
                (Change::Changed, new, (old.kind, old.content) != (new.kind, new.content))
            }
            (None, Some(new)) => (Change::Added, new, true),
            (Some(old), None) => (Change::Removed, old, true),
            (None, None) => return None,
        };
        let (kind, bytes) = (state.kind, state.bytes);
        Some(FileChange { change, path: path.clone(), kind, bytes, content })
    };
    all.into_iter().filter_map(change).collect()
}

/// The entries of a layer by their paths. A path that comes twice is what it is the last time.
fn read_layer(layer: impl Read) -> io::Result<BTreeMap<String, FileState>> {
    let mut files = BTreeMap::new();
    let mut archive = tar::Archive::new(layer);
    for entry in archive.entries()? {
        let mut entry = entry?;
        let mut path = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
        let mut metadata = sha2::Sha256::new();
        let mut removed = None;
        let mut directory = None;
        let mut true_bytes = None;
        for extension in entry.pax_extensions()?.into_iter().flatten() {
            let extension = extension?;
            let value = || String::from_utf8_lossy(extension.value_bytes()).into_owned();
            match extension.key_bytes() {
                // Where these stand, the archive's own field is another.
                b"GNU.sparse.name" | b"SAMARA.path" => path = value(),
                b"SAMARA.directory" => directory = Some(value()),
                b"SAMARA.whiteout" => removed = Some(value()),
                b"GNU.sparse.realsize" => true_bytes = value().parse().ok(),
                _ => {}
            }
            for part in [extension.key_bytes(), extension.value_bytes()] {
                metadata.update((part.len() as u64).to_le_bytes());
                metadata.update(part);
            }
        }
        let header = entry.header();
        // As they stand there: what they mean doesn't matter for whether they differ.
        let plain = header.as_old();
        for field in [&plain.mode[..], &plain.uid, &plain.gid, &plain.mtime] {
            metadata.update(field);
        }
        if let Some(ustar) = header.as_ustar() {
            metadata.update(ustar.dev_major);
            metadata.update(ustar.dev_minor);
        }
        let kind = header.entry_type();
        let mut content = sha2::Sha256::new();
        content.update(entry.link_name_bytes().unwrap_or_default());
        let bytes = io::copy(&mut entry, &mut HashWriter(&mut content))?;
        let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
        let whiteout = removed.or_else(|| name.strip_prefix(".wh.").map(str::to_owned));
        let (path, kind) = match whiteout {
            Some(name) => {
                let parent = directory.as_deref().unwrap_or(parent);
                (format!("{parent}/{name}").trim_start_matches('/').to_owned(), "removed")
            }
            None => (directory.unwrap_or(path), kind_of(kind)),
        };
        let state = FileState {
            kind,
            bytes: true_bytes.unwrap_or(bytes),
            content: content.finalize().into(),
            metadata: metadata.finalize().into(),
        };
        files.insert(path, state);
        if files.len() > FILES_MAX {
            return Err(io::Error::other(format!("it has more than {FILES_MAX} entries")));
        }
    }
    Ok(files)
}

struct HashWriter<'a>(&'a mut sha2::Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn kind_of(kind: tar::EntryType) -> &'static str {
    match kind {
        kind if kind.is_dir() => "directory",
        kind if kind.is_symlink() => "symbolic link",
        kind if kind.is_hard_link() => "further name",
        kind if kind.is_fifo() => "fifo",
        kind if kind.is_character_special() => "character device",
        kind if kind.is_block_special() => "block device",
        _ => "file",
    }
}

fn streams(from: &CapsuleReader, to: &CapsuleReader) -> Vec<StreamChange> {
    let (old, new) = (&from.manifest().streams, &to.manifest().streams);
    let names: BTreeSet<&StreamName> = old.keys().chain(new.keys()).collect();
    let bytes = |reader: &CapsuleReader, name: &StreamName| {
        reader.config().statistics.streams.get(&name.0).copied().unwrap_or_default()
    };
    let change = |name: &StreamName| StreamChange {
        from_bytes: bytes(from, name),
        to_bytes: bytes(to, name),
        same: old.get(name) == new.get(name),
        name: name.0.clone(),
    };
    names.into_iter().map(change).collect()
}

fn text(differences: &Differences<'_>) -> String {
    let mut text = format!("from {}\nto   {}\n\n", differences.from, differences.to);
    let row = |memory: &Memory| {
        vec![
            printable(&memory.owner),
            memory.changed_pages.to_string(),
            memory.added_pages.to_string(),
            memory.removed_pages.to_string(),
            memory.unchanged_pages.to_string(),
            size(memory.bytes),
        ]
    };
    let rows: Vec<_> = differences.memory.iter().map(row).collect();
    text += &table(&["PAGES OF", "CHANGED ", "ADDED ", "REMOVED ", "SAME ", "BYTES "], &rows);
    let row = |stream: &StreamChange| {
        let same = if stream.same { "same" } else { "stored anew" };
        vec![stream.name.clone(), size(stream.from_bytes), size(stream.to_bytes), same.to_owned()]
    };
    let rows: Vec<_> = differences.streams.iter().map(row).collect();
    if !rows.is_empty() {
        text += &format!("\n{}", table(&["STREAM", "FROM ", "TO ", "CONTENT"], &rows));
    }
    let mut list = |heading: &str, lines: Vec<String>| {
        let more = lines.len().saturating_sub(SHOWN_MAX);
        text += &format!("\n{heading}: {} differences\n", lines.len());
        for line in lines.into_iter().take(SHOWN_MAX) {
            text += &format!("  {}\n", printable(&line));
        }
        if more > 0 {
            text += &format!("  and {more} more, which --json shows\n");
        }
    };
    let records = differences.records.iter().map(|change| {
        let shown = |value: &Option<serde_json::Value>| {
            let text = value.as_ref().map(serde_json::Value::to_string).unwrap_or_default();
            text.chars().take(60).collect::<String>()
        };
        let (from, to) = (shown(&change.from), shown(&change.to));
        let values = match change.change {
            Change::Added => to,
            Change::Removed => from,
            Change::Changed => format!("{from} -> {to}"),
        };
        format!("{} {} {values}", change.change.sign(), change.path)
    });
    list("records", records.collect());
    let files = differences.files.iter().map(|file| {
        let what = match (file.change, file.content) {
            (Change::Changed, false) => ", only what is told of it",
            _ => "",
        };
        let (sign, path, kind) = (file.change.sign(), &file.path, file.kind);
        format!("{sign} {path} ({kind}, {}{what})", size(file.bytes))
    });
    list("files of the root", files.collect());
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(fields: &[(&str, Value)]) -> Value {
        let field = |(name, value): &(&str, Value)| (Value::from(*name), value.clone());
        Value::Map(fields.iter().map(field).collect())
    }

    fn process(pid: i32, space: u32, cwd: &str) -> Value {
        let alive = map(&[("space", space.into()), ("cwd", cwd.into())]);
        let state = map(&[("Alive", alive)]);
        map(&[("pid", pid.into()), ("name", Value::Bytes(b"sh".into())), ("state", state)])
    }

    /// A process that was started before the others would make all of them differ.
    #[test]
    fn elements_are_compared_with_their_like() {
        let old =
            map(&[("processes", Value::Array(vec![process(1, 0, "/"), process(7, 1, "/a")]))]);
        let new = map(&[(
            "processes",
            Value::Array(vec![process(3, 0, "/"), process(1, 2, "/"), process(7, 1, "/b")]),
        )]);
        let mut changes = Vec::new();
        compare_values("", &old, &new, &mut changes);
        let told: Vec<_> = changes
            .iter()
            .map(|change| format!("{} {}", change.change.sign(), change.path))
            .collect();
        assert_eq!(
            told,
            [
                "~ processes[pid 1].state.Alive.space",
                "~ processes[pid 7].state.Alive.cwd",
                "+ processes[pid 3]"
            ]
        );
    }

    /// Pages of one process would be told as those of another.
    #[test]
    fn spaces_are_named_by_who_has_them() {
        let records = map(&[
            ("processes", Value::Array(vec![process(1, 4, "/"), process(7, 2, "/a")])),
            ("shared_memory", Value::Array(vec![map(&[("space", 9.into())])])),
        ]);
        let mut named = BTreeMap::new();
        name_spaces(&records, "", None, &mut named);
        let named: Vec<_> = named.into_iter().collect();
        let expected = [(2, "process 7 (sh)"), (4, "process 1 (sh)"), (9, "shared_memory[0]")];
        assert_eq!(named, expected.map(|(space, name)| (space, name.to_owned())));
    }

    fn layer(files: &[(&str, &[u8], u32)]) -> BTreeMap<String, FileState> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, content, mode) in files {
            let mut header = tar::Header::new_ustar();
            header.set_size(content.len() as u64);
            header.set_mode(*mode);
            builder.append_data(&mut header, path, *content).unwrap();
        }
        read_layer(builder.into_inner().unwrap().as_slice()).unwrap()
    }

    /// A file whose content has changed would be told as the same, or as one of which only the mode has.
    #[test]
    fn files_are_compared_by_what_is_in_them() {
        let old =
            layer(&[("a", b"1", 0o644), ("b", b"1", 0o644), ("c", b"1", 0o644), ("d", b"", 0)]);
        let new = layer(&[
            ("a", b"1", 0o644),
            ("b", b"2", 0o644),
            ("c", b"1", 0o600),
            ("x/.wh.y", b"", 0),
        ]);
        let told: Vec<_> = compare_files(&old, &new)
            .iter()
            .map(|file| (file.change.sign(), file.path.clone(), file.kind, file.content))
            .collect();
        let expected = [
            ('~', "b", "file", true),
            ('~', "c", "file", false),
            ('-', "d", "file", true),
            ('+', "x/y", "removed", true),
        ];
        assert_eq!(
            told,
            expected.map(|(sign, path, kind, content)| (sign, path.to_owned(), kind, content))
        );
    }
}
