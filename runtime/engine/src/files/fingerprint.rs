//! The identity of a base image: the same on every engine and host that unpacked the same image, another one for another
//! image.
//!
//! What counts is what unpacking an image determines: names, types, modes, owners, sizes, link targets, device numbers,
//! and the seconds of modification times of files with content. What does not: directory times, times of empty files and
//! of links, sub-second times, extended attributes, and the paths that engines make themselves. It is not a proof of
//! content: files that differ in bytes, but neither in size nor in time, look the same.

use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::fs::{AtFlags, CWD, StatxFlags};
use sha2::{Digest, Sha256};

use super::root::{ENGINE_PATHS, Lower, Overlay, RootChanges, is_engine_layer};
use super::tree::{Kind, Tree, TreePath, names, stat_name};
use super::{Attempt, HostError};

/// Goes into each digest, and into the names of cached ones: to be changed with anything that is hashed.
const VERSION: &[u8] = b"samara base 1\n";

/// Identifies a base image. Shown and parsed as `sha256:HEX`, or `none` where there is no base image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Fingerprint {
    None,
    Sha256([u8; 32]),
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fingerprint::None => f.write_str("none"),
            Fingerprint::Sha256(digest) => {
                f.write_str("sha256:")?;
                digest.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }
    }
}

/// The text is not a fingerprint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a fingerprint is `none` or `sha256:` and 64 hexadecimal digits")]
pub struct NotAFingerprint;

impl FromStr for Fingerprint {
    type Err = NotAFingerprint;

    fn from_str(text: &str) -> Result<Fingerprint, NotAFingerprint> {
        if text == "none" {
            return Ok(Fingerprint::None);
        }
        let hex = text.strip_prefix("sha256:").ok_or(NotAFingerprint)?.as_bytes();
        if hex.len() != 64 {
            return Err(NotAFingerprint);
        }
        let mut digest = [0; 32];
        for (byte, pair) in digest.iter_mut().zip(hex.chunks_exact(2)) {
            for &digit in pair {
                let value = match digit {
                    b'0'..=b'9' => digit - b'0',
                    b'a'..=b'f' => digit - b'a' + 10,
                    _ => return Err(NotAFingerprint),
                };
                *byte = *byte << 4 | value;
            }
        }
        Ok(Fingerprint::Sha256(digest))
    }
}

/// Why a base image could not be identified. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum FingerprintError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("{} in the base image cannot be identified: {why}", path.display())]
    Unsupported { path: PathBuf, why: &'static str },
}

/// Identifies the base image that a root was made from.
///
/// The result is kept in `cache`, a folder that is made if it is not there. It is found again as long as the layers are
/// the same folders with the same times of change; engines never change a layer once it is unpacked. A cache that can't
/// be read or written costs time and nothing else.
pub fn base_fingerprint(root: &RootChanges, cache: &Path) -> Result<Fingerprint, FingerprintError> {
    let Some(overlay) = &root.overlay else { return Ok(Fingerprint::None) };
    // Engines' own layers are new with each container; without them, containers of one image share a cached result.
    let mut lowers = Vec::with_capacity(overlay.lowers.len());
    for lower in &overlay.lowers {
        if lower.data_only || !is_engine_layer(&lower.path)? {
            lowers.push(lower.clone());
        }
    }
    let key = cache.join(cache_name(overlay, &lowers)?);
    if let Some(known) = fs::read_to_string(&key).ok().and_then(|text| text.trim_end().parse().ok())
    {
        return Ok(known);
    }
    let fingerprint = Fingerprint::Sha256(digest(&overlay.base_view(&lowers)?.tree)?);
    // Losing the result is no reason to fail.
    let _ = keep(cache, &key, &fingerprint);
    Ok(fingerprint)
}

fn cache_name(overlay: &Overlay, lowers: &[Lower]) -> Result<String, HostError> {
    let mut hash = Sha256::new();
    hash.update(VERSION);
    hash.update([u8::from(overlay.userxattr)]);
    for option in &overlay.reading_options {
        field(&mut hash, option.as_bytes());
    }
    for Lower { path, data_only } in lowers {
        field(&mut hash, path.as_os_str().as_bytes());
        let x = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::BASIC_STATS)
            .attempt("look up", path)?;
        for number in [
            u64::from(x.stx_dev_major),
            u64::from(x.stx_dev_minor),
            x.stx_ino,
            u64::from(*data_only),
        ] {
            hash.update(number.to_le_bytes());
        }
        for time in [x.stx_mtime, x.stx_ctime] {
            hash.update(time.tv_sec.to_le_bytes());
            hash.update(time.tv_nsec.to_le_bytes());
        }
    }
    Ok(Fingerprint::Sha256(hash.finalize().into()).to_string().replace(':', "-"))
}

/// A reader sees the whole result or none, whatever ends the writer.
fn keep(cache: &Path, key: &Path, fingerprint: &Fingerprint) -> io::Result<()> {
    fs::create_dir_all(cache)?;
    let mut file = tempfile::NamedTempFile::new_in(cache)?;
    writeln!(file, "{fingerprint}")?;
    file.persist(key)?;
    Ok(())
}

fn field(hash: &mut Sha256, bytes: &[u8]) {
    hash.update((bytes.len() as u64).to_le_bytes());
    hash.update(bytes);
}

fn digest(view: &Tree) -> Result<[u8; 32], FingerprintError> {
    let mut hash = Sha256::new();
    hash.update(VERSION);
    let mut pending = vec![TreePath::root()];
    while let Some(path) = pending.pop() {
        let dir = view.dir(&path).attempt("open the base image's", &path)?;
        let mut directories = Vec::new();
        for name in names(&dir).attempt("list the base image's", &path)? {
            let child = path.child(&name).map_err(|why| FingerprintError::Unsupported {
                path: path.absolute().join(&name),
                why,
            })?;
            let Some(stat) = stat_name(&dir, &name).attempt("look up in the base image", &child)?
            else {
                continue;
            };
            if !ENGINE_PATHS.iter().any(|p| p.as_bytes() == child.as_bytes()) {
                let (kind, seconds, size): (u8, _, _) = match stat.kind {
                    Kind::File if stat.size > 0 => (b'f', stat.modified.seconds, stat.size),
                    Kind::File => (b'f', 0, 0),
                    Kind::Directory => (b'd', 0, 0),
                    Kind::Symlink => (b'l', 0, 0),
                    Kind::Fifo => (b'p', 0, 0),
                    Kind::Socket => (b's', 0, 0),
                    Kind::CharDevice => (b'c', 0, 0),
                    Kind::BlockDevice => (b'b', 0, 0),
                };
                field(&mut hash, child.as_bytes());
                hash.update([kind]);
                let (major, minor) = match stat.kind {
                    Kind::CharDevice | Kind::BlockDevice => stat.device,
                    Kind::File | Kind::Directory | Kind::Symlink | Kind::Fifo | Kind::Socket => {
                        (0, 0)
                    }
                };
                for number in [stat.mode, stat.uid, stat.gid, major, minor] {
                    hash.update(number.to_le_bytes());
                }
                hash.update(size.to_le_bytes());
                hash.update(seconds.to_le_bytes());
                if stat.kind == Kind::Symlink {
                    let target = rustix::fs::readlinkat(&dir, &name, Vec::new())
                        .attempt("read the link", &child)?;
                    field(&mut hash, target.to_bytes());
                }
            }
            if stat.kind == Kind::Directory {
                directories.push(child);
            }
        }
        pending.extend(directories.into_iter().rev());
    }
    Ok(hash.finalize().into())
}
