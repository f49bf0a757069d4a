//! Capsules as OCI image layouts: plain folders that registry tools copy.
//!
//! A capsule keeps its digests: the manifest of a layout is, byte for byte, the one at the capsule's address.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use samara_capsule::config::CapsuleConfig;
use samara_capsule::digest::Digest;
use samara_capsule::log::CapsuleRef;
use samara_capsule::manifest::{
    ARTIFACT_TYPE, BlobRef, MANIFEST_BYTES_MAX, MANIFEST_MEDIA_TYPE, Manifest, ManifestError,
};
use serde_json::{Value, json};

use crate::log::LogError;
use crate::reader::{CapsuleReader, ReadError};
use crate::store::{Store, StoreError, blob_path};

/// Blobs in memory at a time.
const BLOBS_MAX: usize = 4;

/// An index takes at most this many bytes.
const INDEX_BYTES_MAX: usize = 4 << 20;

/// The tag of a capsule in a layout that we write.
const TAG: &str = "capsule";

/// Why a capsule could not be exported or imported.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Log(#[from] LogError),
    #[error(transparent)]
    Read(#[from] ReadError),
    #[error("{} is not empty; export to a new folder", path.display())]
    NotEmpty { path: PathBuf },
    #[error("can't write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("can't read {}", path.display())]
    File { path: PathBuf, source: io::Error },
    #[error("{} is no OCI image layout", path.display())]
    NoLayout { path: PathBuf },
    #[error("{} holds {found} capsules; it must hold exactly one", path.display())]
    Capsules { path: PathBuf, found: usize },
    #[error("{} is damaged: its content has the digest {found}", path.display())]
    Damaged { path: PathBuf, found: Digest },
    #[error("{} has {found} bytes, of at most {bytes_max}", path.display())]
    TooLarge { path: PathBuf, found: u64, bytes_max: u64 },
    #[error("the manifest of {} is not that of a capsule which can be read", path.display())]
    Manifest { path: PathBuf, source: ManifestError },
    #[error("the config of {} can't be read", path.display())]
    Config { path: PathBuf, source: samara_capsule::config::ConfigError },
    #[error(
        "{address} can't take the capsule now: a collection there is removing {blob}, which it needs; import it later, or to another address"
    )]
    Condemned { address: String, blob: Digest },
    #[error("a thread ended unexpectedly")]
    Panicked,
}

/// What was copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copied {
    pub manifest: Digest,
    pub blobs: u64,
    pub bytes: u64,
}

/// Writes a capsule as an OCI image layout into a folder that is new or empty.
///
/// `index.json` comes last: without it the folder is no layout. After an error remains are left in the folder.
pub fn export(
    reader: &CapsuleReader,
    folder: &Path,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Copied, LayoutError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| LayoutError::Write { path, source }
    };
    let blobs_folder = folder.join("blobs/sha256");
    if fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(LayoutError::NotEmpty { path: folder.to_owned() });
    }
    {
        use std::os::unix::fs::DirBuilderExt as _;
        // A capsule holds a process's secrets.
        let mut builder = fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(&blobs_folder).map_err(failed(&blobs_folder))?;
    }
    let store = reader.store();
    let digest = reader.digest();
    let manifest = store.block_on(store.get(&blob_path(&digest), MANIFEST_BYTES_MAX))?;
    let manifest_blob = BlobRef { digest, bytes: manifest.len() as u64 };
    let blobs: HashSet<BlobRef> =
        reader.manifest().blobs().map(|(_, blob)| blob).chain([manifest_blob]).collect();
    let total = blobs.iter().map(|blob| blob.bytes).sum();
    let mut copied = Copied { manifest: digest, blobs: 0, bytes: 0 };
    store.block_on(async {
        let fetches = futures::stream::iter(&blobs).map(|&blob| async move {
            Ok::<_, LayoutError>((blob, store.get_blob_unchecked(blob, Vec::new()).await?))
        });
        let mut fetches = fetches.buffered(BLOBS_MAX);
        while let Some((blob, content)) = fetches.try_next().await? {
            store.check_blob(blob, &content)?;
            let path = blobs_folder.join(blob.digest.hex());
            fs::write(&path, &content).map_err(failed(&path))?;
            copied.blobs += 1;
            copied.bytes += blob.bytes;
            progress(copied.bytes, total);
        }
        Ok::<_, LayoutError>(())
    })?;
    let write = |name: &str, content: Value| {
        let path = folder.join(name);
        fs::write(&path, content.to_string()).map_err(failed(&path))
    };
    write("oci-layout", json!({"imageLayoutVersion": "1.0.0"}))?;
    write(
        "index.json",
        json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": MANIFEST_MEDIA_TYPE,
                "artifactType": ARTIFACT_TYPE,
                "digest": digest.to_string(),
                "size": manifest_blob.bytes,
                "annotations": {"org.opencontainers.image.ref.name": TAG},
            }],
        }),
    )?;
    Ok(copied)
}

/// Commits the one capsule of an OCI image layout at the address of `store`, under a new epoch.
///
/// On success it is the newest capsule there. On error nothing is visible.
pub fn import(
    folder: &Path,
    store: &Store,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<(CapsuleRef, Copied), LayoutError> {
    let digest = find_capsule(folder)?;
    let path = folder.join(blob_path(&digest));
    let content = read_file(&path, MANIFEST_BYTES_MAX as u64)?;
    let found = Digest::of(&content);
    if found != digest {
        return Err(LayoutError::Damaged { path, found });
    }
    let manifest = Manifest::decode(&content)
        .map_err(|source| LayoutError::Manifest { path: folder.to_owned(), source })?;
    let config = read_blob(folder, manifest.config)?;
    CapsuleConfig::decode(&config)
        .map_err(|source| LayoutError::Config { path: folder.to_owned(), source })?;

    let started =
        store.take_epoch(&BTreeMap::from([("purpose".to_owned(), "import".to_owned())]))?;
    let mut lease = started.lease;
    // Read anew: what is condemned until here must not be stored, what is condemned later is found by the commit.
    let (head, condemned) = store.block_on(store.read_condemned())?;
    let names: HashSet<Digest> =
        manifest.blobs().map(|(_, blob)| blob.digest).chain([digest]).collect();
    if let Some(&blob) = names.intersection(&condemned).next() {
        return Err(LayoutError::Condemned { address: store.location().to_string(), blob });
    }
    let blobs: HashSet<BlobRef> = manifest.blobs().map(|(_, blob)| blob).collect();
    let total = blobs.iter().map(|blob| blob.bytes).sum();
    let mut copied = Copied { manifest: digest, blobs: 1, bytes: 0 };
    store.block_on(async {
        let uploads = futures::stream::iter(blobs).map(|blob| async move {
            let folder = folder.to_owned();
            let content = tokio::task::spawn_blocking(move || read_blob(&folder, blob)).await;
            let content = content.map_err(|_| LayoutError::Panicked)??;
            store.put(&blob_path(&blob.digest), Bytes::from(content)).await?;
            Ok::<_, LayoutError>(blob.bytes)
        });
        let mut uploads = uploads.buffered(BLOBS_MAX);
        while let Some(bytes) = uploads.try_next().await? {
            copied.blobs += 1;
            copied.bytes += bytes;
            progress(copied.bytes, total);
        }
        Ok::<_, LayoutError>(())
    })?;
    let bytes = content.len() as u64;
    store.block_on(store.put(&blob_path(&digest), Bytes::from(content)))?;
    let capsule = store.commit(&mut lease, BlobRef { digest, bytes }, &head, &names)?;
    copied.bytes += bytes;
    Ok((capsule, copied))
}

/// Digest of the manifest of the only capsule in a layout.
fn find_capsule(folder: &Path) -> Result<Digest, LayoutError> {
    let no_layout = || LayoutError::NoLayout { path: folder.to_owned() };
    let path = folder.join("index.json");
    if !path.exists() {
        return Err(no_layout());
    }
    let index = read_file(&path, INDEX_BYTES_MAX as u64)?;
    let index: Value = serde_json::from_slice(&index).map_err(|_| no_layout())?;
    let entries = index.get("manifests").and_then(Value::as_array).ok_or_else(no_layout)?;
    // Tools that copy a layout drop the artifact type; then the manifest itself tells.
    let mut capsules = HashSet::new();
    for entry in entries {
        let kind = entry.get("artifactType").and_then(Value::as_str);
        let digest = entry.get("digest").and_then(Value::as_str).ok_or_else(no_layout)?;
        let digest: Digest = digest.parse().map_err(|_| no_layout())?;
        let is_capsule = match kind {
            Some(kind) => kind == ARTIFACT_TYPE,
            None => {
                let content =
                    read_file(&folder.join(blob_path(&digest)), MANIFEST_BYTES_MAX as u64)?;
                Manifest::decode(&content).is_ok()
            }
        };
        if is_capsule {
            capsules.insert(digest);
        }
    }
    match capsules.iter().next() {
        Some(&digest) if capsules.len() == 1 => Ok(digest),
        _ => Err(LayoutError::Capsules { path: folder.to_owned(), found: capsules.len() }),
    }
}

fn read_blob(folder: &Path, blob: BlobRef) -> Result<Vec<u8>, LayoutError> {
    let path = folder.join(blob_path(&blob.digest));
    let content = read_file(&path, blob.bytes)?;
    let found = Digest::of(&content);
    match found == blob.digest && content.len() as u64 == blob.bytes {
        true => Ok(content),
        false => Err(LayoutError::Damaged { path, found }),
    }
}

fn read_file(path: &Path, bytes_max: u64) -> Result<Vec<u8>, LayoutError> {
    let failed = |source| LayoutError::File { path: path.to_owned(), source };
    let mut content = Vec::new();
    fs::File::open(path)
        .map_err(failed)?
        .take(bytes_max + 1)
        .read_to_end(&mut content)
        .map_err(failed)?;
    match content.len() as u64 <= bytes_max {
        true => Ok(content),
        false => {
            let found = content.len() as u64;
            Err(LayoutError::TooLarge { path: path.to_owned(), found, bytes_max })
        }
    }
}
