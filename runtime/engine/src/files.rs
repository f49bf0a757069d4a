//! The files of a container: what was changed in its root and what its tmpfs mounts hold, as OCI layer streams,
//! and the exact application of such a stream.
//!
//! A layer is an uncompressed tar archive in PAX form with OCI whiteouts. It is written to any [`std::io::Write`], or in segments to a
//! [`samara_capsule::transfer::Sink`], which may have some of them already ([`KnownFiles`]); it is read from any [`std::io::Read`].
//! Compressing and checking it is the business of whoever stores it.
//!
//! Invariants:
//! - All content and metadata are read through the merged view. The upper directory of an overlay only tells *which*
//!   names changed, so that redirects, metacopies, every form of whiteout and files of the lower that were never copied
//!   up come out as the container sees them, and no attribute of overlayfs gets into a layer.
//! - All writing goes through the merged view too, one file system only, and never follows a symbolic link.
//! - After [`apply_root`] the root equals the captured one: names, types, modes, owners, content, link groups, extended
//!   attributes, modification times to the nanosecond, device numbers and holes, whatever the target held before.
//! - What is told in segments is, byte for byte, what is told as a whole at the same instant, whatever was stored before it.
//! - Memory is bounded by the largest single directory, the number of files that have several names, the number of
//!   holes in one file, and what is known of segments (some 300 bytes for each 4 MiB), not by the size of the tree.
//!
//! What is absent: access, change and birth times; inode flags (immutable, append-only: reported); project quotas;
//! SELinux labels and EVM signatures, which belong to a host and not to a container; files without a name.
//! The processes that could change the tree must be stopped, but for what is stored ahead; nothing here stops them, and a tree that
//! changes all the same yields an error or, at worst, a mix of both states, never a malformed stream.

mod changes;
mod content;
mod fingerprint;
mod known;
mod layer;
pub(crate) mod leased;
mod metadata;
pub(crate) mod moment;
mod revert;
mod root;
mod tree;

pub use changes::{apply_root, apply_tree, capture_root, capture_tree, store_root, store_tree};
pub use fingerprint::{Fingerprint, FingerprintError, base_fingerprint};
pub use known::{FileNotes, KnownFiles, Segments};
pub use leased::LeasedFiles;
pub use moment::{LeftAlone, MappedFiles, Moment};
pub use root::{LocateError, Lower, Overlay, RootChanges};

use std::io;
use std::path::{Path, PathBuf};

/// A call to the host's file system that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action} {}", path.display())]
pub struct HostError {
    pub action: &'static str,
    pub path: PathBuf,
    #[source]
    pub source: io::Error,
}

/// Why a capture ended. Nothing in the captured tree was changed; the stream is incomplete and must be dropped.
#[derive(Debug, thiserror::Error)]
pub enum CaptureError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("cannot write the layer")]
    Write(#[source] io::Error),
    #[error("{} changed while it was captured: {what}", path.display())]
    Changed { path: PathBuf, what: &'static str },
    #[error("{} cannot be saved: {why}", path.display())]
    Unsupported { path: PathBuf, why: &'static str },
}

/// Why an application ended. The target holds a part of the layer and must not be used.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("cannot read the layer")]
    Read(#[source] io::Error),
    #[error("corrupt layer at {}: {why}", path.display())]
    Corrupt { path: PathBuf, why: &'static str },
    #[error("the layer holds changes to a base image, and {} has no base image", root.display())]
    NeedsBase { root: PathBuf },
    #[error(
        "the capsule holds the device node {} ({major}:{minor}), which the container could not have made: give it CAP_MKNOD, or the device",
        path.display()
    )]
    Device { path: PathBuf, major: u32, minor: u32 },
}

/// Which device nodes an archive may bring.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceNodes {
    Any,
    /// These, and what lies at the same place already.
    Known(Vec<DeviceNode>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceNode {
    pub block: bool,
    pub major: u32,
    pub minor: u32,
}

/// Device nodes that whoever makes a container puts into a tree, by absolute path in the tree: they belong to that container, so
/// captures do not tell them, and applications leave them alone.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GivenNodes(pub Vec<(PathBuf, DeviceNode)>);

impl GivenNodes {
    fn contains(&self, path: &Path, node: DeviceNode) -> bool {
        self.0.iter().any(|(given, device)| given == path && *device == node)
    }

    /// Whether some lie below a directory.
    fn reach_below(&self, directory: &Path) -> bool {
        self.0.iter().any(|(given, _)| given != directory && given.starts_with(directory))
    }
}

/// A unix socket's name in the file system. The layer carries it, and applying makes the node again; whether somebody
/// listens behind it is for others to see to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketNode {
    /// Absolute, as seen from within the tree.
    pub path: PathBuf,
    /// Permission bits.
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
}

/// What a capture put into its stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LayerReport {
    /// Entries of the layer, whiteouts included.
    pub entries: u64,
    pub whiteouts: u64,
    /// Bytes of file content that were read, holes not counted.
    pub content_bytes: u64,
    /// Bytes of the whole stream.
    pub stream_bytes: u64,
    pub sockets: Vec<SocketNode>,
    /// Names that something is mounted on where the mount could not be looked beneath. They are not in the layer.
    pub covered: Vec<PathBuf>,
    /// Objects with the immutable or append-only flag, which the layer does not keep.
    pub flagged: Vec<PathBuf>,
}

/// What an application did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ApplyReport {
    /// Entries of the layer, whiteouts included.
    pub entries: u64,
    /// Bytes of file content, holes not counted.
    pub content_bytes: u64,
    /// Names removed because neither layer nor base has them.
    pub removed: u64,
    /// Objects brought back from the base image.
    pub reverted: u64,
    pub sockets: Vec<SocketNode>,
    /// Names that were left alone because something is mounted on them.
    pub mounted: Vec<PathBuf>,
}

/// Attaches what was attempted on what to a failed call.
trait Attempt<T> {
    fn attempt(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, HostError>;
}

impl<T, E: Into<io::Error>> Attempt<T> for Result<T, E> {
    fn attempt(self, action: &'static str, path: impl Into<PathBuf>) -> Result<T, HostError> {
        self.map_err(|source| HostError { action, path: path.into(), source: source.into() })
    }
}
