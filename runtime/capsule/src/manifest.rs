//! The manifest: an OCI image manifest (image-spec 1.1) whose layers are the blobs of one capsule.
//!
//! Any tool that copies OCI artifacts copies capsules. The order of layers is: records, page-map segments in ascending
//! order of space and page, packs in ascending order of their digest, parts of streams in order.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::str::FromStr;

use oci_spec::image::{
    Descriptor, DescriptorBuilder, Digest as OciDigest, ImageManifest, ImageManifestBuilder,
    MediaType,
};
use serde::{Deserialize, Serialize};

use crate::config::CONFIG_BYTES_MAX;
use crate::digest::Digest;
use crate::pagemap::SPACES_MAX;
use crate::stream::{STREAMS_MAX, check_name};
use crate::transfer::{SpaceId, StreamName};
use crate::{BLOB_BYTES_MAX, FORMAT_VERSION};

/// A manifest takes at most this many bytes: about 100,000 blobs, which is more than 4 TiB of memory.
/// Registries refuse manifests of more than 4 MiB.
pub const MANIFEST_BYTES_MAX: usize = 32 << 20;

pub const ARTIFACT_TYPE: &str = "application/vnd.samara.capsule.v1";
pub const MANIFEST_MEDIA_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG_MEDIA_TYPE: &str = "application/vnd.samara.capsule.config.v1+json";
const RECORDS_MEDIA_TYPE: &str = "application/vnd.samara.capsule.records.v1.cbor+zstd";
const MAP_MEDIA_TYPE: &str = "application/vnd.samara.capsule.pagemap.v1";
const PACK_MEDIA_TYPE: &str = "application/vnd.samara.capsule.pack.v1";
const STREAM_MEDIA_TYPE: &str = "application/vnd.samara.capsule.stream.v1+zstd";

const SPACE_ANNOTATION: &str = "dev.samara.space";
const STREAM_ANNOTATION: &str = "dev.samara.stream";
const PART_ANNOTATION: &str = "dev.samara.part";
const EPOCH_ANNOTATION: &str = "dev.samara.epoch";
const CREATED_ANNOTATION: &str = "org.opencontainers.image.created";

/// A blob by name and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlobRef {
    pub digest: Digest,
    pub bytes: u64,
}

impl BlobRef {
    /// The reference to a blob with this content.
    pub fn to(content: &[u8]) -> BlobRef {
        BlobRef { digest: Digest::of(content), bytes: content.len() as u64 }
    }
}

/// What a capsule consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    pub created: String,
    pub epoch: u64,
    pub config: BlobRef,
    pub records: BlobRef,
    /// Page-map segments by space, in ascending order of pages.
    pub maps: BTreeMap<SpaceId, Vec<BlobRef>>,
    /// Packs in ascending order of their digest.
    pub packs: Vec<BlobRef>,
    /// Parts of each stream, in order.
    pub streams: BTreeMap<StreamName, Vec<BlobRef>>,
}

/// What a blob of a capsule is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum BlobKind {
    Config,
    Records,
    PageMap,
    Pack,
    Stream,
}

impl std::fmt::Display for BlobKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            BlobKind::Config => "config",
            BlobKind::Records => "records",
            BlobKind::PageMap => "page map",
            BlobKind::Pack => "pack",
            BlobKind::Stream => "stream",
        })
    }
}

/// Why bytes are no manifest of a capsule, or why one can't be made.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    #[error("the manifest takes {bytes} bytes, of at most {MANIFEST_BYTES_MAX}")]
    TooLarge { bytes: usize },
    #[error("the manifest is no OCI image manifest")]
    Malformed(#[source] serde_json::Error),
    #[error(
        "the manifest is not that of a capsule: its artifact type is {found:?}, not {ARTIFACT_TYPE}"
    )]
    ArtifactType { found: String },
    #[error(
        "the manifest's config has the media type {found}, this samara reads format version {FORMAT_VERSION}"
    )]
    ConfigType { found: String },
    #[error("the manifest names a blob of an unknown kind, {found}; use a newer samara")]
    LayerType { found: String },
    #[error("the manifest names a blob by {found:?}, which is no sha256 digest")]
    Digest { found: String },
    #[error("the manifest names a {kind} of {bytes} bytes, which is too large")]
    BlobSize { kind: BlobKind, bytes: u64 },
    #[error("the manifest lacks the annotation {name}, or it has no valid value")]
    Annotation { name: &'static str },
    #[error("the manifest has {found} records, not one")]
    Records { found: usize },
    #[error("the parts of stream {name} are out of order")]
    StreamOrder { name: String },
    #[error("the manifest names more than {STREAMS_MAX} streams")]
    Streams,
}

impl Manifest {
    /// Every blob of the capsule with what it is for. A blob that is needed twice is listed twice.
    pub fn blobs(&self) -> impl Iterator<Item = (BlobKind, BlobRef)> + '_ {
        let maps = self.maps.values().flatten().map(|&blob| (BlobKind::PageMap, blob));
        let packs = self.packs.iter().map(|&blob| (BlobKind::Pack, blob));
        let streams = self.streams.values().flatten().map(|&blob| (BlobKind::Stream, blob));
        [(BlobKind::Config, self.config), (BlobKind::Records, self.records)]
            .into_iter()
            .chain(maps)
            .chain(packs)
            .chain(streams)
    }

    /// Bytes of all blobs, each counted once.
    pub fn stored_bytes(&self) -> u64 {
        self.blobs()
            .map(|(_, blob)| blob)
            .collect::<HashSet<_>>()
            .iter()
            .map(|blob| blob.bytes)
            .sum()
    }

    /// The manifest's bytes. Equal manifests are equal bytes.
    pub fn encode(&self) -> Result<Vec<u8>, ManifestError> {
        let mut layers = vec![descriptor(RECORDS_MEDIA_TYPE, self.records, [])];
        for (space, segments) in &self.maps {
            let space = space.0.to_string();
            let segment =
                |&blob| descriptor(MAP_MEDIA_TYPE, blob, [(SPACE_ANNOTATION, space.clone())]);
            layers.extend(segments.iter().map(segment));
        }
        layers.extend(self.packs.iter().map(|&blob| descriptor(PACK_MEDIA_TYPE, blob, [])));
        for (name, parts) in &self.streams {
            layers.extend(parts.iter().enumerate().map(|(part, &blob)| {
                let annotations =
                    [(STREAM_ANNOTATION, name.0.clone()), (PART_ANNOTATION, part.to_string())];
                descriptor(STREAM_MEDIA_TYPE, blob, annotations)
            }));
        }
        let annotations = [
            (CREATED_ANNOTATION.to_owned(), self.created.clone()),
            (EPOCH_ANNOTATION.to_owned(), self.epoch.to_string()),
        ];
        let manifest = ImageManifestBuilder::default()
            .schema_version(2u32)
            .media_type(MediaType::ImageManifest)
            .artifact_type(MediaType::Other(ARTIFACT_TYPE.to_owned()))
            .config(descriptor(CONFIG_MEDIA_TYPE, self.config, []))
            .layers(layers)
            .annotations(HashMap::from(annotations))
            .build()
            .expect("all required parts of the manifest are set");
        // By way of a `Value`, whose maps are sorted.
        let value = serde_json::to_value(&manifest).map_err(ManifestError::Malformed)?;
        let bytes = serde_json::to_vec(&value).map_err(ManifestError::Malformed)?;
        match bytes.len() {
            0..=MANIFEST_BYTES_MAX => Ok(bytes),
            bytes => Err(ManifestError::TooLarge { bytes }),
        }
    }

    /// Reads a manifest. Every blob that it names is of a known kind and within the bounds of that kind.
    pub fn decode(bytes: &[u8]) -> Result<Manifest, ManifestError> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(ManifestError::TooLarge { bytes: bytes.len() });
        }
        let manifest: ImageManifest =
            serde_json::from_slice(bytes).map_err(ManifestError::Malformed)?;
        match manifest.artifact_type() {
            Some(found) if found.as_ref() == ARTIFACT_TYPE => {}
            found => {
                let found = found.as_ref().map(MediaType::to_string).unwrap_or_default();
                return Err(ManifestError::ArtifactType { found });
            }
        }
        if manifest.config().media_type().as_ref() != CONFIG_MEDIA_TYPE {
            return Err(ManifestError::ConfigType {
                found: manifest.config().media_type().to_string(),
            });
        }
        let annotations = manifest.annotations().as_ref();
        let annotation = |name| annotations.and_then(|all| all.get(name));
        let epoch = annotation(EPOCH_ANNOTATION).and_then(|epoch| number(epoch));
        let mut result = Manifest {
            created: annotation(CREATED_ANNOTATION)
                .ok_or(ManifestError::Annotation { name: CREATED_ANNOTATION })?
                .clone(),
            epoch: epoch.ok_or(ManifestError::Annotation { name: EPOCH_ANNOTATION })?,
            config: blob(manifest.config(), BlobKind::Config, CONFIG_BYTES_MAX)?,
            records: BlobRef { digest: Digest::of(b""), bytes: 0 },
            maps: BTreeMap::new(),
            packs: Vec::new(),
            streams: BTreeMap::new(),
        };
        let mut records = Vec::new();
        for layer in manifest.layers() {
            let read = |kind| blob(layer, kind, BLOB_BYTES_MAX);
            match layer.media_type().as_ref() {
                RECORDS_MEDIA_TYPE => records.push(read(BlobKind::Records)?),
                PACK_MEDIA_TYPE => result.packs.push(read(BlobKind::Pack)?),
                MAP_MEDIA_TYPE => {
                    let space = layer_annotation(layer, SPACE_ANNOTATION)?;
                    let space = number(space).filter(|&space| space < u64::from(SPACES_MAX));
                    let space = space.and_then(|space| u32::try_from(space).ok());
                    let space =
                        space.ok_or(ManifestError::Annotation { name: SPACE_ANNOTATION })?;
                    result.maps.entry(SpaceId(space)).or_default().push(read(BlobKind::PageMap)?);
                }
                STREAM_MEDIA_TYPE => {
                    let name = StreamName(layer_annotation(layer, STREAM_ANNOTATION)?.clone());
                    check_name(&name)
                        .map_err(|_| ManifestError::Annotation { name: STREAM_ANNOTATION })?;
                    let part = number(layer_annotation(layer, PART_ANNOTATION)?);
                    let parts = result.streams.entry(name.clone()).or_default();
                    if part != Some(parts.len() as u64) {
                        return Err(ManifestError::StreamOrder { name: name.0 });
                    }
                    parts.push(read(BlobKind::Stream)?);
                    if result.streams.len() > STREAMS_MAX {
                        return Err(ManifestError::Streams);
                    }
                }
                found => return Err(ManifestError::LayerType { found: found.to_owned() }),
            }
        }
        match records.as_slice() {
            [one] => result.records = *one,
            _ => return Err(ManifestError::Records { found: records.len() }),
        }
        Ok(result)
    }
}

fn descriptor<const N: usize>(
    media_type: &str,
    blob: BlobRef,
    annotations: [(&str, String); N],
) -> Descriptor {
    let digest =
        OciDigest::from_str(&blob.digest.to_string()).expect("our notation of digests is OCI's");
    let mut builder = DescriptorBuilder::default()
        .media_type(MediaType::Other(media_type.to_owned()))
        .digest(digest)
        .size(blob.bytes);
    if N > 0 {
        let annotations = annotations.map(|(name, value)| (name.to_owned(), value));
        builder = builder.annotations(HashMap::from(annotations));
    }
    builder.build().expect("all required parts of the descriptor are set")
}

fn blob(
    descriptor: &Descriptor,
    kind: BlobKind,
    bytes_max: usize,
) -> Result<BlobRef, ManifestError> {
    let found = descriptor.digest().as_ref();
    let digest = found.parse().map_err(|_| ManifestError::Digest { found: found.to_owned() })?;
    let bytes = descriptor.size();
    match bytes <= bytes_max as u64 {
        true => Ok(BlobRef { digest, bytes }),
        false => Err(ManifestError::BlobSize { kind, bytes }),
    }
}

fn layer_annotation<'a>(
    layer: &'a Descriptor,
    name: &'static str,
) -> Result<&'a String, ManifestError> {
    let value = layer.annotations().as_ref().and_then(|all| all.get(name));
    value.ok_or(ManifestError::Annotation { name })
}

/// A number in the only notation that this format has for it.
fn number(text: &str) -> Option<u64> {
    text.parse::<u64>().ok().filter(|number| number.to_string() == text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> Manifest {
        let blob = |text: &str| BlobRef::to(text.as_bytes());
        Manifest {
            created: "2026-01-02T03:04:05Z".into(),
            epoch: 7,
            config: blob("config"),
            records: blob("records"),
            maps: BTreeMap::from([
                (SpaceId(0), vec![blob("m0"), blob("m1")]),
                (SpaceId(12), vec![blob("m2")]),
            ]),
            packs: vec![blob("p0"), blob("p1")],
            streams: BTreeMap::from([(StreamName("root".into()), vec![blob("s0"), blob("s1")])]),
        }
    }

    #[test]
    fn a_manifest_comes_back_and_is_always_the_same_bytes() {
        let bytes = sample().encode().unwrap();
        assert_eq!(Manifest::decode(&bytes).unwrap(), sample());
        assert_eq!(sample().encode().unwrap(), bytes);
        assert_eq!(sample().blobs().count(), 9);
    }

    #[test]
    fn other_things_are_refused_by_name() {
        let text = String::from_utf8(sample().encode().unwrap()).unwrap();
        let check = |from: &str, to: &str, expected: &str| {
            assert!(text.contains(from), "{from} is not in {text}");
            let found =
                format!("{:?}", Manifest::decode(text.replace(from, to).as_bytes()).unwrap_err());
            assert!(found.contains(expected), "{found}");
        };
        check("samara.capsule.v1", "samara.capsule.v2", "ArtifactType");
        check("config.v1", "config.v2", "ConfigType");
        check("pack.v1", "pack.v2", "LayerType");
        check("records.v1", "pack.v1", "LayerType");
        check("\"dev.samara.part\":\"1\"", "\"dev.samara.part\":\"2\"", "StreamOrder");
        check("\"dev.samara.part\":\"1\"", "\"dev.samara.part\":\"+1\"", "StreamOrder");
        check("\"dev.samara.stream\":\"root\"", "\"dev.samara.stream\":\"../x\"", "Annotation");
        check("\"dev.samara.space\":\"12\"", "\"dev.samara.space\":\"99999999\"", "Annotation");
        check("\"dev.samara.epoch\":\"7\"", "\"dev.samara.epoch\":\"-7\"", "Annotation");
        check("\"size\":7", "\"size\":16777217", "BlobSize");
        check("sha256:", "sha512:", "");
    }

    proptest! {
        #[test]
        fn mutated_manifests_never_panic(at: usize, value: u8) {
            let mut bytes = sample().encode().unwrap();
            let at = at % bytes.len();
            bytes[at] = value;
            let _ = Manifest::decode(&bytes);
        }
    }
}
