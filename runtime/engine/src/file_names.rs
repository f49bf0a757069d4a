//! Where in the container a file is that is no longer at the path by which it was opened.
//!
//! A file that lost the name it was opened by may have others, or somebody watches it who never opened it. The kernel knows
//! such a file by device and inode only, so its file system is searched, those names first that are the nearest to its root.
//!
//! What this module does not do: files without any name.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use samara_kernel::{Pid, mount_namespace};

use crate::root::Root;

/// Device and inode.
pub(crate) type Identity = (u64, u64);

/// Names that are looked at in one search. The container stands still meanwhile: a million takes some seconds.
const NAMES_MAX: usize = 4 << 20;

/// One name for each of the wanted files that has any, as a path below the container's root.
///
/// # Errors
/// Of reading what is mounted. A directory that can't be read is passed over.
pub(crate) fn find(
    root: &Root,
    init: Pid,
    wanted: &BTreeSet<Identity>,
) -> io::Result<BTreeMap<Identity, Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut looked_at = 0;
    for mount in mounts(init)? {
        let Ok(directory) = root.open(&mount, libc::O_PATH | libc::O_NOFOLLOW) else { continue };
        let base = PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()));
        let Ok(top) = fs::metadata(&base) else { continue };
        let device = top.dev();
        let is_missing = |found: &BTreeMap<Identity, Vec<u8>>| {
            wanted.iter().any(|identity| identity.0 == device && !found.contains_key(identity))
        };
        if !is_missing(&found) {
            continue;
        }
        let mut note = |identity: Identity, below: &Path| {
            if wanted.contains(&identity) {
                let path = Path::new(std::ffi::OsStr::from_bytes(&mount)).join(below);
                found.entry(identity).or_insert_with(|| path.as_os_str().as_bytes().to_vec());
            }
            is_missing(&found)
        };
        if !note((device, top.ino()), Path::new("")) {
            continue;
        }
        let mut waiting = VecDeque::from([PathBuf::new()]);
        'search: while let Some(below) = waiting.pop_front() {
            let Ok(entries) = fs::read_dir(base.join(&below)) else { continue };
            for entry in entries.flatten() {
                looked_at += 1;
                if looked_at > NAMES_MAX {
                    return Ok(found);
                }
                let Ok(metadata) = entry.metadata() else { continue };
                let below = below.join(entry.file_name());
                if !note((metadata.dev(), metadata.ino()), &below) {
                    break 'search;
                }
                // What another file system is mounted on leads there.
                if metadata.is_dir() && metadata.dev() == device {
                    waiting.push_back(below);
                }
            }
        }
    }
    Ok(found)
}

/// The places where something is mounted in the container, its root first.
fn mounts(init: Pid) -> io::Result<Vec<Vec<u8>>> {
    let text = mount_namespace::mountinfo(init)?;
    let places = text.split(|&byte| byte == b'\n').filter_map(|line| {
        // ID, parent, device, root in the file system, place.
        let place = line.split(|&byte| byte == b' ').nth(4)?;
        Some(unescape(place))
    });
    Ok(places.collect())
}

/// Undoes the escaping of blanks, line ends and backslashes as octal numbers (fs/proc_namespace.c, mangle).
fn unescape(text: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let number = (first == b'\\')
            .then(|| tail.get(..3))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        out.push(number.unwrap_or(first));
        rest = if number.is_some() { tail.get(3..).unwrap_or_default() } else { tail };
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A mount whose place is misread is not searched, and its files are refused.
    #[test]
    fn places_are_read_as_the_kernel_writes_them() {
        assert_eq!(unescape(br"/a\040b\134c\012"), b"/a b\\c\n");
        assert_eq!(unescape(br"/a\b"), br"/a\b");
    }
}
