//! The capsule's config: what it takes to restore it, where it comes from, and how large it is.
//!
//! It is JSON, and the first thing a reader sees: all that decides whether this host can restore the capsule stands here.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::FORMAT_VERSION;
use crate::digest::Digest;

/// A config takes at most this many bytes. A list of all CPU features of a host is about 4 KiB.
pub const CONFIG_BYTES_MAX: usize = 1 << 20;

/// The config of a capsule.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CapsuleConfig {
    /// Version of the format, see [`FORMAT_VERSION`].
    pub format: u32,
    /// Instant of the capture, as RFC 3339 in UTC.
    pub created: String,
    /// The epoch in which the capsule was made.
    pub epoch: u64,
    /// The generation in which the capsule was made.
    pub generation: u64,
    /// Manifest of the capsule that this one was made on top of. For information: every capsule is complete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Digest>,
    pub provenance: Provenance,
    pub requirements: Requirements,
    pub statistics: Statistics,
    /// How the capsule came about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<Report>,
}

/// Where the capsule comes from. It names no host, so that equal content has an equal description.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    /// Program and version that wrote the capsule.
    pub producer: String,
    /// What was captured, such as `image`, `name`, `args`: for people and for lists.
    #[serde(default)]
    pub workload: BTreeMap<String, String>,
}

/// What a host must have to restore the capsule.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Requirements {
    /// As `uname -m` tells it.
    pub architecture: String,
    /// CPU features as `/proc/cpuinfo` names them.
    #[serde(default)]
    pub cpu_features: BTreeSet<String>,
    /// Kernel features by the names that the probe of the engine gives them.
    #[serde(default)]
    pub kernel_features: BTreeSet<String>,
    /// Digest of the vdso, where code in the capsule refers into it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vdso: Option<Digest>,
    /// Fingerprint of the image that the container's root stands on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_image: Option<String>,
    /// Further requirements by name. A host that does not know a name can't fulfil it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub other: BTreeMap<String, String>,
}

/// How large the capsule is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Statistics {
    /// Pages in the page maps.
    pub pages: u64,
    /// Pages that were passed to the writer and left out because they are all zeros.
    pub zero_pages: u64,
    /// Bytes of all streams before compression, by name.
    #[serde(default)]
    pub streams: BTreeMap<String, u64>,
    /// Bytes of the records before compression.
    pub records_bytes: u64,
    /// Bytes of pages, streams and records before compression. Pages that several spaces have in common count once.
    pub raw_bytes: u64,
    /// Bytes of all blobs but config and manifest.
    pub stored_bytes: u64,
}

/// How a capsule came about: for people and their tools. No restore looks at it, and a later version may tell more.
///
/// Times are in microseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Report {
    /// For its turn among the captures of the node, before the first phase.
    pub waited_us: u64,
    /// In order, one after another, from the call to the last upload but config, manifest and slot.
    pub phases: Vec<PhaseReport>,
    /// How long the container stood at a time: before memory was copied, so that all of it is tracked; and for the capsule, where it went
    /// on after that.
    pub covering_us: Option<u64>,
    pub pause_us: Option<u64>,
    pub memory: MemoryReport,
    /// New frames of pages, by codec.
    pub frames: BTreeMap<String, FrameReport>,
    pub store: StoreReport,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PhaseReport {
    pub name: String,
    /// Since the call.
    pub start_us: u64,
    pub duration_us: u64,
    /// Passed to the writer, before compression.
    pub raw_bytes: u64,
    /// Arrived in the store meanwhile.
    pub uploaded_bytes: u64,
}

/// What became of pages.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct MemoryReport {
    /// Copied while the container ran, in each round.
    pub rounds: Vec<u64>,
    /// Why there was no other round.
    pub ended: String,
    /// Copied while it stood.
    pub copied: u64,
    /// Left in forks of its processes, and read when it ran again.
    pub forked: u64,
    pub forks: u64,
    /// Why they were made, or not.
    pub way: String,
    /// Named as they were stored before: in the capsule before, or in a round.
    pub unchanged: u64,
    /// Passed to the writer, and nothing but zeros.
    pub zero: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct FrameReport {
    pub frames: u64,
    pub pages: u64,
    pub stored_bytes: u64,
}

/// How the store has answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct StoreReport {
    pub uploads: u64,
    /// Of all uploads together, which may have been under way at the same time, and of the longest.
    pub waited_us: u64,
    pub longest_us: u64,
}

/// Why bytes are no config.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("the capsule's config takes {bytes} bytes, of at most {CONFIG_BYTES_MAX}")]
    TooLarge { bytes: usize },
    #[error(
        "the capsule has format version {found}, this samara reads up to {FORMAT_VERSION}; use a newer one"
    )]
    Version { found: u64 },
    #[error("the capsule's config is malformed")]
    Malformed(#[source] serde_json::Error),
}

impl CapsuleConfig {
    /// The bytes of the config's blob.
    pub fn encode(&self) -> Result<Vec<u8>, ConfigError> {
        let bytes = serde_json::to_vec(self).map_err(ConfigError::Malformed)?;
        match bytes.len() {
            0..=CONFIG_BYTES_MAX => Ok(bytes),
            bytes => Err(ConfigError::TooLarge { bytes }),
        }
    }

    /// Reads a config. One of a newer format is refused by its version, whatever else has changed in it.
    pub fn decode(bytes: &[u8]) -> Result<CapsuleConfig, ConfigError> {
        #[derive(Deserialize)]
        struct Version {
            format: u64,
        }
        if bytes.len() > CONFIG_BYTES_MAX {
            return Err(ConfigError::TooLarge { bytes: bytes.len() });
        }
        let Version { format } = serde_json::from_slice(bytes).map_err(ConfigError::Malformed)?;
        if format != u64::from(FORMAT_VERSION) {
            return Err(ConfigError::Version { found: format });
        }
        serde_json::from_slice(bytes).map_err(ConfigError::Malformed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> CapsuleConfig {
        CapsuleConfig {
            format: FORMAT_VERSION,
            created: "2026-01-02T03:04:05Z".into(),
            epoch: 3,
            generation: 1,
            parent: Some(Digest::of(b"parent")),
            provenance: Provenance { producer: "samara 0.1.0".into(), ..Provenance::default() },
            requirements: Requirements { architecture: "x86_64".into(), ..Requirements::default() },
            statistics: Statistics { pages: 17, ..Statistics::default() },
            report: Some(Report { pause_us: Some(1500), ..Report::default() }),
        }
    }

    #[test]
    fn a_config_comes_back() {
        assert_eq!(CapsuleConfig::decode(&sample().encode().unwrap()).unwrap(), sample());
    }

    /// A report tells more in a later version, and is none of the reasons why a capsule can't be read.
    #[test]
    fn a_report_that_tells_more_is_read() {
        let text = String::from_utf8(sample().encode().unwrap()).unwrap();
        let more = text.replacen("\"pause_us\"", "\"moon\":\"full\",\"pause_us\"", 1);
        assert_ne!(more, text);
        assert_eq!(CapsuleConfig::decode(more.as_bytes()).unwrap(), sample());
    }

    #[test]
    fn a_newer_format_is_named_even_if_nothing_else_is_understood() {
        let refused = CapsuleConfig::decode(br#"{"format": 2, "epochs": [1, 2]}"#).unwrap_err();
        assert!(matches!(refused, ConfigError::Version { found: 2 }));
    }

    #[test]
    fn an_unknown_field_is_refused() {
        let text = String::from_utf8(sample().encode().unwrap()).unwrap();
        let text = text.replacen("\"created\"", "\"hostname\":\"h\",\"created\"", 1);
        let refused = CapsuleConfig::decode(text.as_bytes()).unwrap_err();
        assert!(
            matches!(&refused, ConfigError::Malformed(error) if error.to_string().contains("hostname"))
        );
    }

    proptest! {
        #[test]
        fn mutated_configs_never_panic(at: usize, value: u8) {
            let mut bytes = sample().encode().unwrap();
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = CapsuleConfig::decode(&bytes);
        }
    }
}
