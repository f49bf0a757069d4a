//! `samara capsule inspect`: what a capsule needs and holds.
//!
//! Records are shown as the CBOR tells them, without knowing what they mean, so that this works for every capsule that
//! can be read at all.

use ciborium::Value;
use samara_capsule::cbor::decode_record;
use samara_capsule::config::{CapsuleConfig, PhaseReport, Report, StoreReport};
use samara_capsule::digest::Digest;
use samara_capsule::manifest::BlobKind;
use samara_store::CapsuleReader;
use samara_store::compact::Survey;
use samara_store::frames::{FrameCount, FrameCounts};
use serde::Serialize;

use super::CapsuleError;
use crate::output::{Output, duration, size, table};

/// Byte strings are shown up to this length, and told by their length beyond.
const SHOWN_BYTES_MAX: usize = 64;

#[derive(Serialize)]
struct Inspected<'a> {
    url: &'a str,
    digest: Digest,
    stored_bytes: u64,
    config: &'a CapsuleConfig,
    blobs: Vec<Blobs>,
    frames: FrameCounts,
    spaces: Vec<u32>,
    records: serde_json::Value,
}

/// The blobs of one kind.
#[derive(Serialize)]
struct Blobs {
    kind: String,
    count: usize,
    bytes: u64,
}

/// Prints all of a capsule but its pages and streams.
pub(super) fn run(
    url: &str,
    reader: &CapsuleReader,
    output: &mut Output,
) -> Result<(), CapsuleError> {
    let records: Value = decode_record(&reader.records()?).map_err(CapsuleError::Records)?;
    let kinds =
        [BlobKind::Config, BlobKind::Records, BlobKind::PageMap, BlobKind::Pack, BlobKind::Stream];
    let blobs = kinds.map(|kind| {
        let of_kind = reader
            .manifest()
            .blobs()
            .filter(|(found, _)| *found == kind)
            .map(|(_, blob)| blob.bytes);
        let sizes: Vec<u64> = of_kind.collect();
        Blobs { kind: kind.to_string(), count: sizes.len(), bytes: sizes.iter().sum() }
    });
    let inspected = Inspected {
        url,
        digest: reader.digest(),
        stored_bytes: reader.manifest().stored_bytes(),
        config: reader.config(),
        blobs: blobs.into(),
        frames: Survey::of(reader)?.frame_counts(),
        spaces: reader.spaces().iter().map(|space| space.0).collect(),
        records: json(&records),
    };
    output.result(&inspected, text);
    Ok(())
}

fn text(inspected: &Inspected<'_>) -> String {
    let Inspected { url, digest, config, .. } = inspected;
    let statistics = &config.statistics;
    let list = |names: &std::collections::BTreeSet<String>| {
        names.iter().cloned().collect::<Vec<_>>().join(" ")
    };
    let mut lines = vec![
        ("capsule", (*url).to_owned()),
        ("manifest", digest.to_string()),
        ("created", config.created.clone()),
        ("epoch", format!("{}, generation {}", config.epoch, config.generation)),
        ("producer", config.provenance.producer.clone()),
        ("architecture", config.requirements.architecture.clone()),
        ("cpu features", list(&config.requirements.cpu_features)),
        ("kernel features", list(&config.requirements.kernel_features)),
        (
            "pages",
            format!(
                "{}, and {} of zeros that are not stored",
                statistics.pages, statistics.zero_pages
            ),
        ),
        (
            "size",
            format!("{} raw, {} stored", size(statistics.raw_bytes), size(inspected.stored_bytes)),
        ),
    ];
    if let Some(parent) = config.parent {
        lines.push(("parent", parent.to_string()));
    }
    if let Some(image) = &config.requirements.base_image {
        lines.push(("base image", image.clone()));
    }
    lines.extend(
        config
            .requirements
            .other
            .iter()
            .map(|(name, value)| ("requires", format!("{name} {value}"))),
    );
    lines.extend(
        config
            .provenance
            .workload
            .iter()
            .map(|(name, value)| ("workload", format!("{name} {value}"))),
    );
    lines.extend(
        statistics
            .streams
            .iter()
            .map(|(name, bytes)| ("stream", format!("{name} {}", size(*bytes)))),
    );

    let mut text = String::new();
    for (name, value) in lines.iter().filter(|(_, value)| !value.is_empty()) {
        text += &format!("{name:<16} {}\n", printable(value));
    }
    let rows: Vec<_> = inspected
        .blobs
        .iter()
        .map(|blobs| vec![blobs.kind.clone(), blobs.count.to_string(), size(blobs.bytes)])
        .collect();
    let FrameCounts { raw, zstd, delta } = inspected.frames;
    let frames: Vec<_> = [("raw", raw), ("zstd", zstd), ("differences", delta)]
        .iter()
        .filter(|(_, count)| count.frames > 0)
        .map(|(name, count)| {
            let FrameCount { frames, pages, stored_bytes } = count;
            vec![(*name).to_owned(), frames.to_string(), pages.to_string(), size(*stored_bytes)]
        })
        .collect();
    text += &format!("\n{}\n", table(&["BLOBS", "COUNT ", "STORED "], &rows));
    if !frames.is_empty() {
        text += &format!("{}\n", table(&["FRAMES", "COUNT ", "PAGES ", "STORED "], &frames));
    }
    if let Some(report) = &config.report {
        text += &format!("{}\n", course(report));
    }
    text += "records\n";
    outline(&inspected.records, 1, &mut text);
    text
}

/// How the capsule came about, phase by phase.
fn course(report: &Report) -> String {
    let bytes = |bytes: u64| if bytes == 0 { "-".to_owned() } else { size(bytes) };
    let row = |phase: &PhaseReport| {
        vec![
            printable(&phase.name).to_string(),
            duration(phase.start_us),
            duration(phase.duration_us),
            bytes(phase.raw_bytes),
            bytes(phase.uploaded_bytes),
        ]
    };
    let rows: Vec<_> = report.phases.iter().map(row).collect();
    let mut text = table(&["PHASE", "START ", "TOOK ", "RAW ", "UPLOADED "], &rows);
    let mut line = |name: &str, value: String| text += &format!("\n{name:<16} {value}");
    if report.waited_us > 0 {
        line("waited before", duration(report.waited_us));
    }
    if let Some(pause_us) = report.pause_us {
        line("pause", duration(pause_us));
    }
    if let Some(covering_us) = report.covering_us {
        line("pause to cover", duration(covering_us));
    }
    let memory = &report.memory;
    let rounds: Vec<String> = memory.rounds.iter().map(u64::to_string).collect();
    if !rounds.is_empty() {
        let ended = printable(&memory.ended);
        line("pages ahead", format!("{} (then: {ended})", rounds.join(", ")));
    }
    let (copied, unchanged) = (memory.copied, memory.unchanged);
    line("pages in pause", format!("{copied} copied, {unchanged} unchanged"));
    if memory.forks > 0 {
        let (pages, forks) = (memory.forked, memory.forks);
        line("pages after it", format!("{pages} from {forks} forks"));
    }
    if !memory.way.is_empty() {
        line("why so", printable(&memory.way));
    }
    let StoreReport { uploads, waited_us, longest_us } = report.store;
    if let Some(mean_us) = waited_us.checked_div(uploads) {
        let (mean, longest) = (duration(mean_us), duration(longest_us));
        line("uploads", format!("{uploads}, {mean} on average, {longest} at most"));
    }
    text + "\n"
}

/// Nested values as an indented outline.
fn outline(value: &serde_json::Value, depth: usize, text: &mut String) {
    let indent = "  ".repeat(depth);
    let mut item = |name: &str, value: &serde_json::Value| match value {
        serde_json::Value::Object(fields) if !fields.is_empty() => {
            *text += &format!("{indent}{name}\n");
            outline(value, depth + 1, text);
        }
        serde_json::Value::Array(items)
            if items.iter().any(|item| item.is_object() || item.is_array()) =>
        {
            *text += &format!("{indent}{name}\n");
            outline(value, depth + 1, text);
        }
        value => *text += &format!("{indent}{name} {}\n", printable(&value.to_string())),
    };
    match value {
        serde_json::Value::Object(fields) => {
            fields.iter().for_each(|(name, value)| item(&printable(name), value))
        }
        serde_json::Value::Array(items) => items.iter().for_each(|value| item("-", value)),
        value => item("-", value),
    }
}

/// Text from a capsule without what could command the terminal.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { char::REPLACEMENT_CHARACTER } else { c }).collect()
}

/// CBOR as the JSON that comes closest.
pub(super) fn json(value: &Value) -> serde_json::Value {
    match value {
        Value::Null => serde_json::Value::Null,
        Value::Bool(value) => (*value).into(),
        Value::Integer(value) => match i128::from(*value) {
            value if i64::try_from(value).is_ok() || u64::try_from(value).is_ok() => {
                serde_json::Number::from_i128(value)
                    .map_or_else(|| value.to_string().into(), Into::into)
            }
            value => value.to_string().into(),
        },
        Value::Float(value) => (*value).into(),
        Value::Text(value) => value.as_str().into(),
        Value::Bytes(bytes) if bytes.len() > SHOWN_BYTES_MAX => {
            format!("({} bytes)", bytes.len()).into()
        }
        Value::Bytes(bytes) => {
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("0x{hex}").into()
        }
        Value::Array(items) => items.iter().map(json).collect(),
        Value::Map(fields) => {
            let name = |name: &Value| match json(name) {
                serde_json::Value::String(name) => name,
                name => name.to_string(),
            };
            fields.iter().map(|(key, value)| (name(key), json(value))).collect()
        }
        Value::Tag(tag, value) => serde_json::json!({ "tag": tag, "value": json(value) }),
        other => format!("{other:?}").into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_value_can_be_shown() {
        let map = vec![
            (Value::from(1), Value::from("a")),
            (Value::from("b"), Value::Bytes(vec![0, 255])),
        ];
        let value = Value::Array(vec![
            Value::Map(map),
            Value::from(u64::MAX),
            Value::from(i64::MIN),
            Value::from(1.5),
            Value::Null,
            Value::from(true),
            Value::Bytes(vec![0; 65]),
            Value::Tag(7, Box::new(Value::from(-1))),
        ]);
        let expected = r#"[{"1":"a","b":"0x00ff"},18446744073709551615,-9223372036854775808,1.5,null,true,"(65 bytes)",{"tag":7,"value":-1}]"#;
        assert_eq!(json(&value).to_string(), expected);
    }

    #[test]
    fn text_of_a_capsule_cannot_command_the_terminal() {
        assert_eq!(printable("a\u{1b}[2Jb\n"), "a\u{fffd}[2Jb\u{fffd}");
    }
}
