//! Files of a container, on real overlay mounts. Needs root.
//!
//! What would be lost if these failed: a restored container would see other files than the saved one.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "this is all tests, with functions between them"
)]

use std::collections::{BTreeMap, HashMap};
use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File};
use std::io::{Cursor, Write};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use fastrand::Rng;
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, UTIME_OMIT, XattrFlags};
use rustix::mount::{MountFlags, UnmountFlags};
use samara_engine::files::{
    ApplyError, ApplyReport, CaptureError, DeviceNode, DeviceNodes, Fingerprint, GivenNodes,
    LayerReport, LeasedFiles, LocateError, RootChanges, apply_root, apply_tree, base_fingerprint,
    capture_root, capture_tree,
};
use sha2::{Digest, Sha256};

/// A folder with mounts in it, all gone when the test ends, however it ends.
struct Scratch {
    folder: tempfile::TempDir,
    mounts: Vec<PathBuf>,
}

impl Scratch {
    fn new() -> Scratch {
        assert!(rustix::process::geteuid().is_root(), "these tests mount: run them as root");
        Scratch { folder: tempfile::tempdir().unwrap(), mounts: Vec::new() }
    }

    fn dir(&self, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    fn mount(&mut self, kind: &str, at: &Path, options: &str) {
        let options = CString::new(options).unwrap();
        // A layer that was just unmounted stays in use while a mount namespace that was copied meanwhile, by somebody
        // else's container, lives on for a moment.
        for tries in 0.. {
            match rustix::mount::mount(
                kind,
                at,
                kind,
                MountFlags::empty(),
                Some(options.as_c_str()),
            ) {
                Ok(()) => break,
                Err(rustix::io::Errno::BUSY) if tries < 500 => {
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                Err(e) => panic!("mount {kind} {options:?}: {e}"),
            }
        }
        self.mounts.push(at.to_owned());
    }

    /// An overlay, with upper and work folders named after it. Lowers uppermost first.
    fn overlay(&mut self, name: &str, lowers: &[PathBuf], options: &str) -> PathBuf {
        let merged = self.dir(&format!("{name}/merged"));
        let (upper, work) = (self.dir(&format!("{name}/upper")), self.dir(&format!("{name}/work")));
        let lowers: Vec<_> = lowers.iter().map(|l| l.to_str().unwrap()).collect();
        let all = format!(
            "lowerdir={},upperdir={},workdir={}{options}",
            lowers.join(":"),
            upper.display(),
            work.display()
        );
        self.mount("overlay", &merged, &all);
        merged
    }

    fn unmount(&mut self, at: &Path) {
        rustix::mount::unmount(at, UnmountFlags::empty()).unwrap();
        self.mounts.retain(|m| m != at);
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        for at in self.mounts.iter().rev() {
            let _ = rustix::mount::unmount(at, UnmountFlags::DETACH);
        }
    }
}

fn locate(root: &Path) -> RootChanges {
    RootChanges::locate(root, &fs::read("/proc/self/mountinfo").unwrap()).unwrap()
}

fn capture(root: &Path) -> (Vec<u8>, LayerReport) {
    let mut layer = Vec::new();
    let report = capture_root(&locate(root), &LeasedFiles::default(), &mut layer)
        .unwrap_or_else(|e| panic!("{}", chain(&e)));
    assert_eq!(report.stream_bytes, layer.len() as u64);
    (layer, report)
}

fn apply(root: &Path, layer: &[u8]) -> ApplyReport {
    apply_root(&locate(root), &DeviceNodes::Any, &mut Cursor::new(layer))
        .unwrap_or_else(|e| panic!("{}", chain(&e)))
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text += &format!(": {error}");
        source = error.source();
    }
    text
}

fn open(dir: &Path) -> OwnedFd {
    File::open(dir).unwrap().into()
}

// What a tree is, seen without any of the code under test.

#[derive(Clone, PartialEq, Eq)]
struct Node {
    mode: u32,
    owner: (u32, u32),
    size: u64,
    modified: (i64, i64),
    device: u64,
    content: Vec<u8>,
    xattrs: BTreeMap<OsString, Vec<u8>>,
    /// The first of all names of this object, for objects that are not directories.
    first_name: PathBuf,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let content =
            String::from_utf8_lossy(&self.content[..self.content.len().min(48)]).into_owned();
        write!(
            f,
            "{:o} {:?} {} bytes, {:?}, device {:x}, {content:?}, {:?}, first {:?}",
            self.mode,
            self.owner,
            self.size,
            self.modified,
            self.device,
            self.xattrs,
            self.first_name
        )
    }
}

type Listing = BTreeMap<PathBuf, Node>;

fn xattrs(path: &Path) -> BTreeMap<OsString, Vec<u8>> {
    let mut list = vec![0; 65536];
    let used = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let mut found = BTreeMap::new();
    for name in list[..used].split(|&b| b == 0).filter(|n| !n.is_empty()) {
        let mut value = vec![0; 65536];
        let used = rustix::fs::lgetxattr(path, name, &mut value[..]).unwrap();
        value.truncate(used);
        found.insert(OsStr::from_bytes(name).to_owned(), value);
    }
    found
}

fn listing(root: &Path) -> Listing {
    let mut nodes = Listing::new();
    let mut firsts: HashMap<(u64, u64), PathBuf> = HashMap::new();
    let mut pending = vec![PathBuf::new()];
    while let Some(path) = pending.pop() {
        let full = root.join(&path);
        let m = fs::symlink_metadata(&full).unwrap();
        let kind = m.file_type();
        let content = if kind.is_symlink() {
            fs::read_link(&full).unwrap().into_os_string().into_vec()
        } else if kind.is_file() {
            digest(&full, m.len())
        } else {
            Vec::new()
        };
        if kind.is_dir() {
            let mut names: Vec<_> =
                fs::read_dir(&full).unwrap().map(|e| e.unwrap().file_name()).collect();
            names.sort();
            pending.extend(names.iter().rev().map(|n| path.join(n)));
        }
        let first_name = if kind.is_dir() {
            PathBuf::new()
        } else {
            firsts.entry((m.dev(), m.ino())).or_insert_with(|| path.clone()).clone()
        };
        let device = if kind.is_char_device() || kind.is_block_device() { m.rdev() } else { 0 };
        let node = Node {
            mode: m.mode(),
            owner: (m.uid(), m.gid()),
            size: if kind.is_dir() { 0 } else { m.len() },
            modified: (m.mtime(), m.mtime_nsec()),
            device,
            content,
            xattrs: xattrs(&full),
            first_name,
        };
        nodes.insert(path, node);
    }
    // The walk is depth first, the names of a file are compared as sorted.
    let mut groups: HashMap<PathBuf, PathBuf> = HashMap::new();
    for (path, node) in &nodes {
        groups.entry(node.first_name.clone()).or_insert_with(|| path.clone());
    }
    for node in nodes.values_mut().filter(|n| n.mode & 0o170000 != 0o040000) {
        node.first_name = groups[&node.first_name].clone();
    }
    nodes
}

/// Digest of the content; of the ends only for files that are too large to read in a test.
fn digest(path: &Path, size: u64) -> Vec<u8> {
    const LARGE: u64 = 64 << 20;
    let file = File::open(path).unwrap();
    let mut hash = Sha256::new();
    if size <= LARGE {
        hash.update(fs::read(path).unwrap());
    } else {
        let mut buffer = vec![0; 1 << 20];
        for at in [0, size / 2, size - (1 << 20)] {
            file.read_exact_at(&mut buffer, at).unwrap();
            hash.update(&buffer);
        }
    }
    hash.finalize().to_vec()
}

fn assert_same(wanted: &Listing, found: &Listing, what: &str) {
    let mut differences = Vec::new();
    for (path, node) in wanted {
        match found.get(path) {
            None => differences.push(format!("- {path:?} {node:?}")),
            Some(other) if other != node => {
                differences.push(format!("! {path:?}\n    {node:?}\n    {other:?}"))
            }
            Some(_) => {}
        }
    }
    for (path, node) in found {
        if !wanted.contains_key(path) {
            differences.push(format!("+ {path:?} {node:?}"));
        }
    }
    assert!(
        differences.is_empty(),
        "{what}: {} differences\n{}",
        differences.len(),
        differences.join("\n")
    );
}

fn allocated(root: &Path, path: &Path) -> u64 {
    fs::symlink_metadata(root.join(path)).unwrap().blocks() * 512
}

// Random trees.

fn set_time(path: &Path, seconds: i64, nanoseconds: i64) {
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds, tv_nsec: nanoseconds },
    };
    rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW).unwrap();
}

fn set_xattr(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, XattrFlags::empty())
        .unwrap_or_else(|e| panic!("{name} on {path:?}: {e}"));
}

/// user::rw-, user:1000:r--, group::r--, mask::r--, other::---
fn acl() -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (1_u16, 6_u16, u32::MAX),
        (2, 4, 1000),
        (4, 4, u32::MAX),
        (16, 4, u32::MAX),
        (32, 0, u32::MAX),
    ] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// cap_net_raw, permitted and effective.
fn capability() -> Vec<u8> {
    [0x0200_0001_u32, 1 << 13, 0, 0, 0].iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn random_name(rng: &mut Rng) -> OsString {
    let id = rng.u32(..5000);
    match rng.u32(..40) {
        0 => OsString::from_vec(
            format!("raw\n\u{e9}{id}").into_bytes().into_iter().chain([0xff, 0xfe]).collect(),
        ),
        1 => OsString::from("n".repeat(251) + &format!("{:04}", id % 10000)),
        2 => OsString::from(format!(".wh.n{id}")),
        3 => OsString::from(format!("sp ace\\{id}")),
        _ => OsString::from(format!("n{id}")),
    }
}

/// All paths of a tree, the root not counted.
fn paths(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut pending = vec![root.to_owned()];
    while let Some(dir) = pending.pop() {
        for entry in fs::read_dir(dir).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                pending.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

fn is_dir(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.is_dir())
}

fn is_file(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|m| m.is_file())
}

fn remove(path: &Path) {
    match fs::symlink_metadata(path) {
        Ok(m) if m.is_dir() => fs::remove_dir_all(path).unwrap(),
        Ok(_) => fs::remove_file(path).unwrap(),
        Err(_) => {}
    }
}

fn fill(path: &Path, rng: &mut Rng) {
    let mut bytes = vec![0; [0, 1, 100, 5000, 70_000][rng.usize(..5)]];
    rng.fill(&mut bytes);
    fs::write(path, bytes).unwrap();
}

fn random_metadata(path: &Path, rng: &mut Rng) {
    let m = fs::symlink_metadata(path).unwrap();
    let ids = [0, 1, 1000, 65534, 2_097_151, 2_097_152, 4_000_000_000];
    let (uid, gid) = (ids[rng.usize(..7)], ids[rng.usize(..7)]);
    std::os::unix::fs::lchown(path, Some(uid), Some(gid)).unwrap();
    if !m.is_symlink() {
        let mode = [0o644, 0o600, 0o755, 0o4755, 0o2755, 0o1777, 0o000, 0o6711][rng.usize(..8)];
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    if m.is_file() || m.is_dir() {
        match rng.u32(..6) {
            0 => set_xattr(path, "user.k", b"v\n\0x"),
            1 => set_xattr(path, "user.a=b%c", b""),
            2 => set_xattr(path, "system.posix_acl_access", &acl()),
            3 if m.is_dir() => set_xattr(path, "system.posix_acl_default", &acl()),
            3 => set_xattr(path, "security.capability", &capability()),
            _ => {}
        }
    }
    if rng.u32(..4) == 0 {
        set_xattr(path, "trusted.thing", b"1");
    }
    let times =
        [0, -1, -100_000_000_000 / 1000, 1, 1_700_000_000, 8_589_934_592 - 1, 8_589_934_593];
    set_time(path, times[rng.usize(..7)], [0, 1, 500_000_000, 999_999_999][rng.usize(..4)]);
}

/// One more object, of any type.
fn create(dir: &Path, all: &[PathBuf], rng: &mut Rng) {
    let path = dir.join(random_name(rng));
    if fs::symlink_metadata(&path).is_ok() {
        return;
    }
    match rng.u32(..20) {
        0..=6 => fill(&path, rng),
        7..=10 => fs::create_dir(&path).unwrap(),
        11 => symlink("../some/where", &path).unwrap(),
        12 => symlink("x".repeat(1 + rng.usize(..4000)), &path).unwrap(),
        13 => rustix::fs::mkfifoat(CWD, &path, Mode::RUSR).unwrap(),
        14 => {
            let device = rustix::fs::makedev(rng.u32(1..4000), rng.u32(..1_000_000));
            let kind = if rng.bool() { FileType::CharacterDevice } else { FileType::BlockDevice };
            rustix::fs::mknodat(CWD, &path, kind, Mode::RUSR, device).unwrap();
        }
        15 => {
            rustix::fs::mknodat(CWD, &path, FileType::Socket, Mode::RUSR, 0).unwrap();
            return;
        }
        16 | 17 => {
            let others: Vec<_> =
                all.iter().filter(|p| fs::symlink_metadata(p).is_ok_and(|m| !m.is_dir())).collect();
            let Some(other) = rng.choice(&others) else { return };
            if fs::symlink_metadata(other).unwrap().file_type().is_socket() {
                return;
            }
            // Refused where an overlay would have to note too long a path.
            let _ = fs::hard_link(other, &path);
            return;
        }
        _ => {
            let file = File::create(&path).unwrap();
            file.set_len(rng.u64(1..3_000_000)).unwrap();
            for _ in 0..rng.u32(..4) {
                file.write_all_at(b"island", rng.u64(..2_900_000)).unwrap();
            }
        }
    }
    if rng.bool() {
        random_metadata(&path, rng);
    }
}

fn grow(root: &Path, count: usize, rng: &mut Rng) {
    for _ in 0..count {
        let all = paths(root);
        let mut dirs: Vec<_> = all.iter().filter(|p| is_dir(p)).cloned().collect();
        dirs.push(root.to_owned());
        let dir = rng.choice(&dirs).unwrap().clone();
        if dir.as_os_str().len() < 3000 {
            create(&dir, &all, rng);
        }
    }
}

/// Changes as programs make them. Renames of directories fail where the overlay has no redirects, as they do for
/// programs.
fn change(root: &Path, count: usize, rng: &mut Rng) {
    for _ in 0..count {
        let all = paths(root);
        let Some(path) = rng.choice(&all).cloned() else { return };
        let elsewhere = rng.choice(&all).unwrap().parent().unwrap().join(random_name(rng));
        if elsewhere.as_os_str().len() > 3500 {
            continue;
        }
        match rng.u32(..16) {
            0 | 1 => remove(&path),
            2 => {
                remove(&path);
                fs::create_dir(&path).unwrap();
                grow(&path, 3, rng);
            }
            3 => {
                remove(&path);
                fill(&path, rng);
            }
            4 | 5 => random_metadata(&path, rng),
            6 | 7 if is_file(&path) => fill(&path, rng),
            8 if is_file(&path) => {
                let file = File::options().append(true).open(&path).unwrap();
                (&file).write_all(b"more").unwrap();
            }
            9 if is_file(&path) => {
                let file = File::options().write(true).open(&path).unwrap();
                file.set_len(rng.u64(..200_000)).unwrap();
            }
            10..=12 => {
                let _ = fs::rename(&path, &elsewhere);
            }
            13 if is_dir(&path) => {
                for name in ["user.k", "system.posix_acl_default", "trusted.thing"] {
                    let _ = rustix::fs::lremovexattr(&path, name);
                }
            }
            _ => grow(root, 1, rng),
        }
    }
}

/// `SAMARA_TEST_SEED` repeats one tree, `SAMARA_TEST_ROUNDS` multiplies their number for a longer search.
fn seeds(count: u64) -> Vec<u64> {
    let times = std::env::var("SAMARA_TEST_ROUNDS")
        .map_or(1, |n| n.parse().expect("SAMARA_TEST_ROUNDS is a number"));
    match std::env::var("SAMARA_TEST_SEED") {
        Ok(seed) => vec![seed.parse().expect("SAMARA_TEST_SEED is a number")],
        Err(_) => (0..count * times).map(|_| fastrand::u64(..)).collect(),
    }
}

/// Three layers, the upper two made by changing what is below, as image builds do.
fn image(scratch: &mut Scratch, options: &str, rng: &mut Rng) -> Vec<PathBuf> {
    let bottom = scratch.dir("image/0");
    for dir in ["etc", "usr", "usr/bin", "dev"] {
        fs::create_dir(bottom.join(dir)).unwrap();
    }
    grow(&bottom, 60, rng);
    let mut lowers = vec![bottom];
    for layer in 1..3 {
        let name = format!("image/{layer}");
        let merged = scratch.overlay(&name, &lowers, options);
        change(&merged, 12, rng);
        grow(&merged, 12, rng);
        scratch.unmount(&merged);
        lowers.insert(0, scratch.folder.path().join(name).join("upper"));
    }
    lowers
}

/// Capture on an overlay; application on a fresh one, and on the same one after more changes.
fn round_trip(options: &str, target_options: &str, rounds: u64) {
    round_trip_on("", options, target_options, rounds);
}

/// With `uppers`, the containers' own layers are on another file system of that kind.
fn round_trip_on(uppers: &str, options: &str, target_options: &str, rounds: u64) {
    for seed in seeds(rounds) {
        println!("SAMARA_TEST_SEED={seed} options {options:?} target {target_options:?}");
        let rng = &mut Rng::with_seed(seed);
        let mut scratch = Scratch::new();
        let lowers = image(&mut scratch, options, rng);
        if !uppers.is_empty() {
            for name in ["saved", "fresh", "other", "fresh-2"] {
                let at = scratch.dir(name);
                scratch.mount(uppers, &at, "");
            }
        }
        let merged = scratch.overlay("saved", &lowers, options);
        change(&merged, 40, rng);
        grow(&merged, 30, rng);
        let wanted = listing(&merged);
        let (layer, report) = capture(&merged);
        assert_same(&wanted, &listing(&merged), "a capture changes nothing");
        assert_eq!(report.covered, Vec::<PathBuf>::new());
        assert_no_overlay_marks(&layer);

        let fresh = scratch.overlay("fresh", &lowers, target_options);
        apply(&fresh, &layer);
        assert_same(&wanted, &listing(&fresh), "on a fresh root");
        assert_holes_kept(&merged, &fresh, &wanted);

        change(&merged, 40, rng);
        grow(&merged, 30, rng);
        apply(&merged, &layer);
        assert_same(&wanted, &listing(&merged), "on the old root, changed since");

        let other = scratch.overlay("other", &lowers, target_options);
        change(&other, 60, rng);
        apply(&other, &layer);
        assert_same(&wanted, &listing(&other), "on another container's root");

        let (again, _) = capture(&fresh);
        let fresh_2 = scratch.overlay("fresh-2", &lowers, target_options);
        apply(&fresh_2, &again);
        assert_same(&wanted, &listing(&fresh_2), "of a second generation");
    }
}

fn assert_holes_kept(from: &Path, to: &Path, wanted: &Listing) {
    for (path, node) in
        wanted.iter().filter(|(_, n)| n.mode & 0o170000 == 0o100000 && n.size > 1 << 20)
    {
        let (before, after) = (allocated(from, path), allocated(to, path));
        assert!(
            after <= before + (64 << 10),
            "{path:?} of {} bytes took {before}, takes {after}",
            node.size
        );
    }
}

fn assert_no_overlay_marks(layer: &[u8]) {
    let mark = b"trusted.overlay.";
    assert!(
        !layer.windows(mark.len()).any(|w| w == mark),
        "an attribute of overlayfs is in the layer"
    );
}

#[test]
fn overlay_round_trip() {
    round_trip("", "", 6);
}

#[test]
fn overlay_round_trip_with_redirects() {
    round_trip(",redirect_dir=on", ",redirect_dir=on", 6);
    round_trip(",redirect_dir=on", "", 3);
}

#[test]
fn overlay_round_trip_with_metacopies() {
    round_trip(",redirect_dir=on,metacopy=on", ",redirect_dir=on,metacopy=on", 6);
}

#[test]
fn overlay_round_trip_with_index() {
    round_trip(",index=on", ",index=on", 4);
}

#[test]
fn overlay_round_trip_with_user_attributes() {
    round_trip(",userxattr", ",userxattr", 3);
}

#[test]
fn overlay_round_trip_over_two_file_systems() {
    round_trip_on("tmpfs", "", "", 4);
    round_trip_on("tmpfs", ",redirect_dir=on,xino=on", "", 2);
}

#[test]
fn a_metacopy_is_content_in_the_layer() {
    let mut scratch = Scratch::new();
    let lower = scratch.dir("lower");
    fs::write(lower.join("f"), "content of the lower").unwrap();
    let merged = scratch.overlay("c", std::slice::from_ref(&lower), ",redirect_dir=on,metacopy=on");
    fs::set_permissions(merged.join("f"), fs::Permissions::from_mode(0o600)).unwrap();
    let upper = scratch.folder.path().join("c/upper");
    assert!(
        xattrs(&upper.join("f")).contains_key(OsStr::new("trusted.overlay.metacopy")),
        "the test makes a metacopy"
    );
    let (layer, _) = capture(&merged);
    let plain = scratch.dir("untarred");
    untar(&layer, &plain);
    assert_eq!(fs::read_to_string(plain.join("f")).unwrap(), "content of the lower");
}

#[test]
fn a_renamed_directory_is_whole_in_the_layer() {
    let mut scratch = Scratch::new();
    let lower = scratch.dir("lower");
    fs::create_dir_all(lower.join("a/deep")).unwrap();
    fs::write(lower.join("a/deep/f"), "x").unwrap();
    let merged = scratch.overlay("c", std::slice::from_ref(&lower), ",redirect_dir=on");
    fs::rename(merged.join("a"), merged.join("b")).unwrap();
    let upper = scratch.folder.path().join("c/upper");
    assert!(
        xattrs(&upper.join("b")).contains_key(OsStr::new("trusted.overlay.redirect")),
        "the test makes a redirect"
    );
    let wanted = listing(&merged);
    let (layer, _) = capture(&merged);
    let fresh = scratch.overlay("fresh", std::slice::from_ref(&lower), "");
    apply(&fresh, &layer);
    assert_same(&wanted, &listing(&fresh), "after a rename");
    // And back: the renamed directory is undone.
    let untouched = scratch.overlay("untouched", &[lower], "");
    apply(&merged, &capture(&untouched).0);
    assert_same(&listing(&untouched), &listing(&merged), "a rename undone");
}

#[test]
fn names_of_one_lower_file_follow_each_other_with_an_index() {
    let mut scratch = Scratch::new();
    let lower = scratch.dir("lower");
    fs::create_dir(lower.join("d")).unwrap();
    fs::write(lower.join("a"), "old").unwrap();
    fs::hard_link(lower.join("a"), lower.join("d/b")).unwrap();
    let merged = scratch.overlay("c", std::slice::from_ref(&lower), ",index=on");
    fs::write(merged.join("a"), "new").unwrap();
    assert_eq!(fs::read_to_string(merged.join("d/b")).unwrap(), "new", "the index is at work");
    assert!(!scratch.folder.path().join("c/upper/d/b").exists(), "and not in the upper directory");
    let wanted = listing(&merged);
    let (layer, _) = capture(&merged);
    let fresh = scratch.overlay("fresh", &[lower], "");
    apply(&fresh, &layer);
    assert_same(&wanted, &listing(&fresh), "with an index");
}

#[test]
fn names_of_one_lower_file_come_back_as_names_of_one_file() {
    let mut scratch = Scratch::new();
    let lower = scratch.dir("lower");
    fs::create_dir(lower.join("d")).unwrap();
    fs::write(lower.join("a"), "old").unwrap();
    fs::hard_link(lower.join("a"), lower.join("d/b")).unwrap();
    fs::hard_link(lower.join("a"), lower.join("c")).unwrap();
    let merged = scratch.overlay("c", &[lower], "");
    let wanted = listing(&merged);
    let (layer, _) = capture(&merged);
    fs::write(merged.join("a"), "new").unwrap();
    fs::remove_file(merged.join("c")).unwrap();
    apply(&merged, &layer);
    assert_same(&wanted, &listing(&merged), "after one name was changed");
}

#[test]
fn plain_round_trip() {
    for seed in seeds(6) {
        println!("SAMARA_TEST_SEED={seed}");
        let rng = &mut Rng::with_seed(seed);
        let mut scratch = Scratch::new();
        let root = scratch.dir("root");
        grow(&root, 120, rng);
        // A whiteout of an overlay that a container made within its own root is content like any other.
        rustix::fs::mknodat(CWD, root.join("inner"), FileType::CharacterDevice, Mode::RUSR, 0)
            .unwrap();
        let wanted = listing(&root);
        let (layer, _) = capture(&root);

        let empty = scratch.dir("empty");
        apply(&empty, &layer);
        assert_same(&wanted, &listing(&empty), "in an empty folder");
        assert_holes_kept(&root, &empty, &wanted);

        change(&root, 80, rng);
        apply(&root, &layer);
        assert_same(&wanted, &listing(&root), "in the same folder, changed since");

        fs::remove_file(root.join("inner")).unwrap();
        let wanted = listing(&root);
        let (layer, _) = capture(&root);
        let lowers = image(&mut scratch, "", rng);
        let overlay = scratch.overlay("target", &lowers, "");
        change(&overlay, 20, rng);
        apply(&overlay, &layer);
        assert_same(&wanted, &listing(&overlay), "a whole tree on an overlay");
    }
}

#[test]
fn tmpfs_round_trip() {
    for seed in seeds(4) {
        println!("SAMARA_TEST_SEED={seed}");
        let rng = &mut Rng::with_seed(seed);
        let mut scratch = Scratch::new();
        let (from, to) = (scratch.dir("from"), scratch.dir("to"));
        scratch.mount("tmpfs", &from, "mode=1777,uid=12");
        scratch.mount("tmpfs", &to, "");
        grow(&from, 100, rng);
        set_time(&from, 1_234_567_890, 123_456_789);
        let wanted = listing(&from);
        let mut layer = Vec::new();
        capture_tree(open(&from), &GivenNodes::default(), &LeasedFiles::default(), &mut layer)
            .unwrap();
        grow(&to, 50, rng);
        apply_tree(open(&to), &DeviceNodes::Any, &GivenNodes::default(), &mut &layer[..]).unwrap();
        assert_same(&wanted, &listing(&to), "on a tmpfs");
        assert_holes_kept(&from, &to, &wanted);
    }
}

#[test]
fn what_is_mounted_below_a_tree_is_neither_told_nor_touched() {
    let mut scratch = Scratch::new();
    let (from, to) = (scratch.dir("from"), scratch.dir("to"));
    for tree in [&from, &to] {
        scratch.mount("tmpfs", tree, "");
        for dir in ["shm", "keep", "over"] {
            fs::create_dir(tree.join(dir)).unwrap();
        }
    }
    scratch.mount("tmpfs", &from.join("shm"), "");
    fs::write(from.join("shm/secret"), "not mine").unwrap();
    fs::write(from.join("over/f"), "saved").unwrap();
    scratch.mount("tmpfs", &to.join("shm"), "");
    scratch.mount("tmpfs", &to.join("over"), "");
    fs::write(to.join("shm/theirs"), "x").unwrap();
    let mut layer = Vec::new();
    let report =
        capture_tree(open(&from), &GivenNodes::default(), &LeasedFiles::default(), &mut layer)
            .unwrap();
    let covered_or_bare = report.covered == [PathBuf::from("/shm")];
    assert!(covered_or_bare, "{:?}", report.covered);
    assert!(!layer.windows(8).any(|w| w == b"not mine"));
    let report =
        apply_tree(open(&to), &DeviceNodes::Any, &GivenNodes::default(), &mut &layer[..]).unwrap();
    assert_eq!(fs::read_to_string(to.join("shm/theirs")).unwrap(), "x");
    assert_eq!(
        fs::read_dir(to.join("over")).unwrap().count(),
        0,
        "nothing goes into what is mounted there"
    );
    let mut mounted = report.mounted;
    mounted.sort();
    assert_eq!(mounted, [PathBuf::from("/over"), PathBuf::from("/shm")]);

    // The root of a container is seen without its mounts.
    let root = scratch.dir("root");
    fs::create_dir(root.join("mnt")).unwrap();
    fs::write(root.join("mnt/below"), "saved").unwrap();
    scratch.mount("tmpfs", &root.join("mnt"), "");
    fs::write(root.join("mnt/above"), "not saved").unwrap();
    let (layer, report) = capture(&root);
    assert_eq!(report.covered, Vec::<PathBuf>::new());
    let copy = scratch.dir("copy");
    apply(&copy, &layer);
    assert_eq!(fs::read_to_string(copy.join("mnt/below")).unwrap(), "saved");
    assert!(!copy.join("mnt/above").exists());
}

#[test]
fn huge_sparse_files_are_cheap() {
    let mut scratch = Scratch::new();
    let lower = scratch.dir("lower");
    let merged = scratch.overlay("c", std::slice::from_ref(&lower), "");
    let file = File::create(merged.join("huge")).unwrap();
    file.set_len(3 << 40).unwrap();
    file.write_all_at(b"start", 0).unwrap();
    file.write_all_at(b"middle", (1 << 40) + 12_345).unwrap();
    file.write_all_at(b"far", (9 << 30) + 1).unwrap();
    File::create(merged.join("hole")).unwrap().set_len(20 << 30).unwrap();
    let wanted = listing(&merged);
    let (layer, _) = capture(&merged);
    assert!(layer.len() < 1 << 20, "{} bytes for three islands", layer.len());
    let fresh = scratch.overlay("fresh", &[lower], "");
    apply(&fresh, &layer);
    assert_same(&wanted, &listing(&fresh), "huge");
    assert!(allocated(&fresh, Path::new("huge")) <= 128 << 10);
    let mut far = [0; 3];
    File::open(fresh.join("huge")).unwrap().read_exact_at(&mut far, (9 << 30) + 1).unwrap();
    assert_eq!(&far, b"far");
    // Independent readers.
    let names = Command::new("tar").args(["-tvf", "-"]).stdin(spill(&layer)).output().unwrap();
    let text = String::from_utf8_lossy(&names.stdout);
    assert!(names.status.success() && text.contains("3298534883328"), "{text} {:?}", names.stderr);
}

fn spill(layer: &[u8]) -> File {
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(layer).unwrap();
    std::io::Seek::rewind(&mut file).unwrap();
    file
}

/// Unpacks by Python's tarfile, everything it knows of.
fn untar(layer: &[u8], to: &Path) {
    let script = "import sys, tarfile\n\
        t = tarfile.open(fileobj=sys.stdin.buffer, mode='r|', errorlevel=2)\n\
        t.extractall(sys.argv[1], numeric_owner=True, **({'filter': 'fully_trusted'} if hasattr(tarfile, 'data_filter') else {}))\n";
    let output =
        Command::new("python3").args(["-c", script]).arg(to).stdin(spill(layer)).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// What an independent program does not know: attributes, sockets, and parts of times.
fn comparable(listing: &Listing, subset_of_names: bool) -> Listing {
    let mut kept = Listing::new();
    for (path, node) in listing {
        let literal = path
            .iter()
            .any(|c| c.as_bytes().starts_with(b".wh.") || c.as_bytes().starts_with(b".samara"));
        if node.mode & 0o170000 == 0o140000 || literal && subset_of_names {
            continue;
        }
        let mut node = node.clone();
        node.xattrs.clear();
        node.modified = (0, 0);
        node.first_name = PathBuf::new();
        kept.insert(path.clone(), node);
    }
    kept
}

#[test]
fn other_programs_read_our_layers() {
    for seed in seeds(4) {
        println!("SAMARA_TEST_SEED={seed}");
        let rng = &mut Rng::with_seed(seed);
        let scratch = Scratch::new();
        let root = scratch.dir("root");
        grow(&root, 150, rng);
        let deep = root.join("d".repeat(200)).join("e".repeat(200));
        fs::create_dir_all(&deep).unwrap();
        File::create(deep.join("sparse")).unwrap().set_len(1 << 20).unwrap();
        fs::write(deep.join("f"), "deep").unwrap();
        fs::hard_link(deep.join("f"), root.join("link-to-deep")).unwrap();
        // Python's tarfile follows further names of a symbolic link when it sets owners.
        for path in paths(&root) {
            let m = fs::symlink_metadata(&path).unwrap();
            if m.is_symlink() && m.nlink() > 1 {
                fs::remove_file(path).unwrap();
            }
        }
        let (layer, _) = capture(&root);
        // A whole tree begins with an opaque mark, which a program that knows no layers takes for a file.
        let strip = |mut listing: Listing| {
            listing.remove(Path::new(".wh..wh..opq"));
            listing
        };
        let wanted = comparable(&listing(&root), true);

        let by_python = scratch.dir("by-python");
        untar(&layer, &by_python);
        assert_same(&wanted, &comparable(&strip(listing(&by_python)), true), "unpacked by tarfile");

        let by_tar = scratch.dir("by-tar");
        let output = Command::new("tar")
            .args([
                "--numeric-owner",
                "--same-permissions",
                "--xattrs",
                "--xattrs-include=*",
                "-xf",
                "-",
                "-C",
            ])
            .arg(&by_tar)
            .stdin(spill(&layer))
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_same(&wanted, &comparable(&strip(listing(&by_tar)), true), "unpacked by GNU tar");
    }
}

#[test]
fn sockets_travel_as_nodes_and_are_reported() {
    let scratch = Scratch::new();
    let (from, to) = (scratch.dir("from"), scratch.dir("to"));
    fs::create_dir(from.join("run")).unwrap();
    let _listener = UnixListener::bind(from.join("run/app.sock")).unwrap();
    fs::set_permissions(from.join("run/app.sock"), fs::Permissions::from_mode(0o660)).unwrap();
    let (layer, report) = capture(&from);
    assert_eq!(report.sockets.len(), 1);
    assert_eq!(
        (report.sockets[0].path.as_path(), report.sockets[0].mode),
        (Path::new("/run/app.sock"), 0o660)
    );
    let report = apply(&to, &layer);
    assert_eq!(report.sockets.len(), 1);
    assert_same(&listing(&from), &listing(&to), "with a socket");
}

#[test]
fn inode_flags_are_reported() {
    let scratch = Scratch::new();
    let root = scratch.dir("root");
    let file = root.join("log");
    fs::write(&file, "x").unwrap();
    let handle = File::open(&file).unwrap();
    let flags = rustix::fs::ioctl_getflags(&handle).unwrap();
    rustix::fs::ioctl_setflags(&handle, flags | rustix::fs::IFlags::APPEND).unwrap();
    let result = capture_root(&locate(&root), &LeasedFiles::default(), &mut Vec::new());
    rustix::fs::ioctl_setflags(&handle, flags).unwrap();
    assert_eq!(result.unwrap().flagged, [PathBuf::from("/log")]);
}

#[test]
fn names_that_look_like_whiteouts_are_names() {
    let scratch = Scratch::new();
    let (from, to) = (scratch.dir("from"), scratch.dir("to"));
    fs::create_dir_all(from.join(".wh.dir/.wh..wh..opq")).unwrap();
    fs::write(from.join(".wh.dir/x"), "1").unwrap();
    fs::write(from.join(".wh.victim"), "2").unwrap();
    fs::hard_link(from.join(".wh.victim"), from.join(".wh.dir/.wh.other")).unwrap();
    fs::write(from.join("victim"), "3").unwrap();
    let (layer, _) = capture(&from);
    apply(&to, &layer);
    assert_same(&listing(&from), &listing(&to), "with `.wh.` names");
}

/// Calls `on_content` when bytes of a file's content come by.
struct Watching<'a> {
    on_content: &'a dyn Fn(),
    seen: bool,
}

impl Write for Watching<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if !self.seen && bytes.len() > 100_000 {
            self.seen = true;
            (self.on_content)();
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn a_file_that_changes_its_size_ends_the_capture() {
    let scratch = Scratch::new();
    let root = scratch.dir("root");
    for size in [0, 1 << 20, 20 << 20] {
        fs::write(root.join("f"), vec![1; 9 << 20]).unwrap();
        let resize =
            || File::options().write(true).open(root.join("f")).unwrap().set_len(size).unwrap();
        let mut out = Watching { on_content: &resize, seen: false };
        let result = capture_root(&locate(&root), &LeasedFiles::default(), &mut out);
        assert!(
            matches!(&result, Err(CaptureError::Changed { path, .. }) if path == Path::new("/f")),
            "{size}: {result:?}"
        );
    }
}

#[test]
fn a_writer_that_fails_ends_the_capture() {
    let scratch = Scratch::new();
    let root = scratch.dir("root");
    fs::write(root.join("f"), vec![1; 100_000]).unwrap();
    for room in [0, 511, 512, 2000, 50_000] {
        let mut space = vec![0; room];
        let mut out = &mut space[..];
        let result = capture_root(&locate(&root), &LeasedFiles::default(), &mut out);
        assert!(matches!(result, Err(CaptureError::Write(_))), "{room}: {result:?}");
    }
}

/// Says how long something took, from whose end the disk has caught up with what was written before.
fn timed<T>(what: &str, amount: f64, unit: &str, run: impl FnOnce() -> T) -> T {
    rustix::fs::sync();
    let start = std::time::Instant::now();
    let result = run();
    let seconds = start.elapsed().as_secs_f64();
    println!("{what}: {seconds:.2} s, {:.0} {unit}/s", amount / seconds);
    result
}

/// Not tests of anything: `cargo test --release --test files -- --ignored --nocapture --test-threads 1 measure`
#[test]
#[ignore = "prints figures; takes gigabytes"]
fn measure_large_files() {
    let mut scratch = Scratch::new();
    let lower = scratch.dir("lower");
    let large = scratch.overlay("large", std::slice::from_ref(&lower), "");
    let mut block = vec![0; 64 << 20];
    Rng::with_seed(1).fill(&mut block);
    for i in 0..8 {
        let mut file = File::create(large.join(format!("f{i}"))).unwrap();
        for _ in 0..4 {
            file.write_all(&block).unwrap();
        }
    }
    let spool = scratch.folder.path().join("layer.tar");
    timed("capture 2 GiB in 8 files", 2048.0, "MiB", || {
        capture_root(&locate(&large), &LeasedFiles::default(), &mut std::io::sink()).unwrap()
    });
    capture_root(&locate(&large), &LeasedFiles::default(), &mut File::create(&spool).unwrap())
        .unwrap();
    let to = scratch.overlay("large-to", &[lower], "");
    timed("apply 2 GiB in 8 files", 2048.0, "MiB", || {
        apply_root(&locate(&to), &DeviceNodes::Any, &mut File::open(&spool).unwrap()).unwrap()
    });
    let copy = scratch.dir("copy");
    timed("the same by cp", 2048.0, "MiB", || {
        assert!(Command::new("cp").arg("-a").arg(&large).arg(&copy).status().unwrap().success());
    });
}

#[test]
#[ignore = "prints figures; takes gigabytes"]
fn measure_small_files() {
    let mut scratch = Scratch::new();
    let lower = scratch.dir("lower");
    let small = scratch.overlay("small", std::slice::from_ref(&lower), "");
    let content = vec![7; 4000];
    for i in 0..100_000 {
        let dir = small.join(format!("d{}", i / 100));
        if i % 100 == 0 {
            fs::create_dir(&dir).unwrap();
        }
        fs::write(dir.join(format!("f{i}")), &content[..i % 4000]).unwrap();
    }
    let mut layer = Vec::new();
    timed("capture 100,000 small files", 100.0, "thousand", || {
        capture_root(&locate(&small), &LeasedFiles::default(), &mut layer).unwrap()
    });
    let to = scratch.overlay("small-to", std::slice::from_ref(&lower), "");
    timed("apply 100,000 small files", 100.0, "thousand", || apply(&to, &layer));
    timed("apply 100,000 small files over themselves", 100.0, "thousand", || apply(&to, &layer));
    let bare = scratch.overlay("bare", &[lower], "");
    let (nothing, _) = capture(&bare);
    timed("remove 100,000 small files", 100.0, "thousand", || apply(&to, &nothing));
    apply(&to, &layer);
    timed("the same by rm", 100.0, "thousand", || {
        let script = format!("rm -rf {}/d*", to.display());
        assert!(Command::new("sh").args(["-c", &script]).status().unwrap().success());
    });

    let image = scratch.folder.path().join("small/upper");
    let cache = scratch.folder.path().join("cache");
    let merged = scratch.overlay("on-image", &[image], "");
    for what in ["fingerprint of 100,000 files", "the same from the cache"] {
        timed(what, 100.0, "thousand", || base_fingerprint(&locate(&merged), &cache).unwrap());
    }
    timed("capture of nothing over 100,000 files", 0.0, "", || capture(&merged));
}

// Archives of somebody who wants out.

struct Hostile(tar::Builder<Vec<u8>>);

impl Hostile {
    /// Begins as every whole tree does.
    fn new() -> Hostile {
        let mut hostile = Hostile(tar::Builder::new(Vec::new()));
        hostile.add("./", tar::EntryType::Directory, "", b"");
        hostile.add(".wh..wh..opq", tar::EntryType::Regular, "", b"");
        hostile
    }

    fn add(&mut self, path: &str, kind: tar::EntryType, link: &str, content: &[u8]) {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(kind);
        header.set_mode(0o755);
        header.set_size(content.len() as u64);
        header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
        header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.append(&header, content).unwrap();
    }

    fn with(mut self, entries: &[(&str, tar::EntryType, &str)]) -> Vec<u8> {
        for (path, kind, link) in entries {
            self.add(
                path,
                *kind,
                link,
                if *kind == tar::EntryType::Regular { b"evil" } else { b"" },
            );
        }
        self.0.into_inner().unwrap()
    }
}

#[test]
fn hostile_archives_stay_under_the_root() {
    use tar::EntryType::{Directory, Link, Regular, Symlink};
    let cases: &[&[(&str, tar::EntryType, &str)]] = &[
        &[("../escaped", Regular, "")],
        &[("/escaped", Regular, "")],
        &[("a/../../escaped", Regular, "")],
        &[("d/", Directory, ""), ("d/../../escaped", Regular, "")],
        &[("..", Symlink, "/")],
        &[("link", Symlink, "../outside"), ("link/escaped", Regular, "")],
        &[("link", Symlink, "../outside"), ("link/", Directory, ""), ("link/escaped", Regular, "")],
        &[("d/", Directory, ""), ("e/", Directory, ""), ("d/late", Regular, "")],
        &[("hard", Link, "../outside/victim")],
        &[("hard", Link, "/outside/victim")],
        &[("s", Symlink, "../outside"), ("hard", Link, "s/victim")],
        &[("hard", Link, "nothing")],
        &[("d/", Directory, ""), ("hard", Link, "d")],
        &[("f", Regular, ""), ("f", Regular, "")],
        &[("f", Regular, ""), (".wh.f", Regular, "")],
        &[(".wh...", Regular, "")],
        &[(".wh.", Regular, "")],
        &[(".wh..wh.plnk", Regular, "")],
        &[("f", Regular, ""), (".wh..wh..opq", Regular, "")],
        &[("./", Directory, "")],
        &[("x", tar::EntryType::GNULongName, "")],
        &[("x", tar::EntryType::GNUSparse, "")],
        &[("x", tar::EntryType::new(b'?'), "")],
        &[("s", Symlink, "")],
    ];
    for case in cases {
        let scratch = Scratch::new();
        let (root, outside) = (scratch.dir("root"), scratch.dir("outside"));
        fs::write(outside.join("victim"), "untouched").unwrap();
        let before = listing(&outside);
        let result =
            apply_root(&locate(&root), &DeviceNodes::Any, &mut &Hostile::new().with(case)[..]);
        match (result, case) {
            // A symbolic link that a directory replaces is no way out, only odd.
            (Err(ApplyError::Corrupt { .. }), _) => {}
            (other, _) => panic!("{case:?} gave {other:?}"),
        }
        assert_same(&before, &listing(&outside), "outside");
        assert!(!scratch.folder.path().join("escaped").exists() && !Path::new("/escaped").exists());
    }
}

/// A volume shows device nodes to others than the container, and its device rules are not theirs.
#[test]
fn device_nodes_that_nobody_allowed_are_refused() {
    let scratch = Scratch::new();
    let (from, to) = (scratch.dir("from"), scratch.dir("to"));
    let node = |root: &Path| {
        let (mode, device) = (Mode::RUSR, rustix::fs::makedev(1, 3));
        rustix::fs::mknodat(
            rustix::fs::CWD,
            root.join("node"),
            FileType::CharacterDevice,
            mode,
            device,
        )
        .unwrap();
    };
    node(&from);
    let (layer, _) = capture(&from);
    let apply = |devices: &DeviceNodes| apply_root(&locate(&to), devices, &mut &layer[..]);
    let none = DeviceNodes::Known(Vec::new());
    let refused = apply(&none).unwrap_err();
    assert!(matches!(refused, ApplyError::Device { major: 1, minor: 3, .. }), "{refused}");
    assert!(!to.join("node").exists());
    let block = DeviceNode { block: true, major: 1, minor: 3 };
    assert!(apply(&DeviceNodes::Known(vec![block])).is_err());
    apply(&DeviceNodes::Known(vec![DeviceNode { block: false, ..block }])).unwrap();
    // It is there already, so nobody gains it.
    apply(&none).unwrap();
    assert_same(&listing(&from), &listing(&to), "the node");
}

#[test]
fn links_in_the_target_lead_nowhere() {
    let scratch = Scratch::new();
    let (from, root, outside) = (scratch.dir("from"), scratch.dir("root"), scratch.dir("outside"));
    fs::create_dir(from.join("d")).unwrap();
    fs::write(from.join("d/f"), "saved").unwrap();
    fs::write(from.join("g"), "saved").unwrap();
    let (layer, _) = capture(&from);
    fs::write(outside.join("f"), "untouched").unwrap();
    symlink(&outside, root.join("d")).unwrap();
    symlink(outside.join("f"), root.join("g")).unwrap();
    symlink(&outside, root.join("gone")).unwrap();
    let before = listing(&outside);
    apply(&root, &layer);
    assert_same(&listing(&from), &listing(&root), "over links");
    assert_same(&before, &listing(&outside), "outside");
}

#[test]
fn a_damaged_stream_is_refused_wherever_it_is_damaged() {
    let scratch = Scratch::new();
    let root = scratch.dir("root");
    let rng = &mut Rng::with_seed(7);
    grow(&root, 25, rng);
    let (layer, _) = capture(&root);
    let target = scratch.dir("target");
    let located = locate(&target);
    let ends: Vec<usize> =
        (0..layer.len()).step_by(512).chain((0..50).map(|_| rng.usize(..layer.len()))).collect();
    for end in ends {
        let result = apply_root(&located, &DeviceNodes::Any, &mut &layer[..end]);
        assert!(matches!(result, Err(ApplyError::Corrupt { .. })), "cut at {end}: {result:?}");
    }
    // Whatever is changed, nothing panics and nothing hangs.
    for _ in 0..400 {
        let mut bytes = layer.clone();
        for _ in 0..rng.usize(1..4) {
            let at = rng.usize(..bytes.len());
            bytes[at] = rng.u8(..);
        }
        let _ = apply_root(&located, &DeviceNodes::Any, &mut &bytes[..]);
    }
    apply(&target, &layer);
    assert_same(&listing(&root), &listing(&target), "after all that");
}

#[test]
fn changes_need_their_base_image() {
    let mut scratch = Scratch::new();
    let lower = scratch.dir("lower");
    let merged = scratch.overlay("c", &[lower], "");
    fs::write(merged.join("f"), "x").unwrap();
    let (layer, _) = capture(&merged);
    let plain = scratch.dir("plain");
    fs::write(plain.join("kept"), "x").unwrap();
    let before = listing(&plain);
    let result = apply_root(&locate(&plain), &DeviceNodes::Any, &mut &layer[..]);
    assert!(matches!(result, Err(ApplyError::NeedsBase { .. })), "{result:?}");
    assert_eq!(before.keys().collect::<Vec<_>>(), listing(&plain).keys().collect::<Vec<_>>());
}

#[test]
fn paths_too_long_for_one_call_are_refused_by_name() {
    let scratch = Scratch::new();
    let root = scratch.dir("root");
    let mut dir = open(&root);
    for _ in 0..25 {
        let name = "d".repeat(200);
        rustix::fs::mkdirat(&dir, name.as_str(), Mode::RWXU).unwrap();
        let flags = rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
        dir = rustix::fs::openat(&dir, name.as_str(), flags, Mode::empty()).unwrap();
    }
    let result = capture_root(&locate(&root), &LeasedFiles::default(), &mut Vec::new());
    assert!(matches!(result, Err(CaptureError::Unsupported { .. })), "{result:?}");
}

#[test]
fn deep_trees_take_few_descriptors() {
    let scratch = Scratch::new();
    let (from, to) = (scratch.dir("from"), scratch.dir("to"));
    let mut dir = from.clone();
    for i in 0..1500 {
        dir.push("d");
        fs::create_dir(&dir).unwrap();
        if i % 100 == 0 {
            fs::write(dir.join("a"), "x").unwrap();
            fs::write(dir.join("z"), "x").unwrap();
        }
    }
    let (layer, _) = capture(&from);
    apply(&to, &layer);
    assert_same(&listing(&from), &listing(&to), "1500 levels");
    apply(&to, &capture(&scratch.dir("empty")).0);
    assert_eq!(fs::read_dir(&to).unwrap().count(), 0);
}

// Where layers lie.

#[test]
fn layers_are_found_whatever_their_names() {
    let mut scratch = Scratch::new();
    let folder = scratch.folder.path().to_owned();
    let odd = scratch.dir("a:b,c d=e\\f");
    fs::write(odd.join("f"), "odd").unwrap();
    let plain = scratch.dir("plain");
    let (upper, work, merged) = (scratch.dir("u,x:y"), scratch.dir("w,x:y"), scratch.dir("m m"));
    let escaped = |path: &Path| {
        path.to_str().unwrap().replace('\\', "\\\\").replace(':', "\\:").replace(',', "\\,")
    };
    let comma = |path: &Path| path.to_str().unwrap().replace(',', "\\,");
    let options = format!(
        "lowerdir={}:{},upperdir={},workdir={}",
        escaped(&odd),
        plain.display(),
        comma(&upper),
        comma(&work)
    );
    scratch.mount("overlay", &merged, &options);
    let located = locate(&merged);
    let overlay = located.overlay().unwrap();
    assert_eq!(
        overlay.lowers.iter().map(|l| l.path.clone()).collect::<Vec<_>>(),
        [odd.clone(), plain.clone()]
    );
    assert_eq!(overlay.upper.as_ref(), Some(&upper));
    let Fingerprint::Sha256(_) = base_fingerprint(&located, &folder.join("cache")).unwrap() else {
        panic!("no base")
    };
    scratch.unmount(&merged);

    // As docker and containerd do: short links, relative to the folder that the mounting process is in.
    let home = scratch.dir("overlay2");
    for (id, link) in [("one", "AAAA"), ("two", "BBBB")] {
        fs::create_dir_all(home.join(id).join("diff")).unwrap();
        fs::create_dir_all(home.join("l")).unwrap();
        symlink(format!("../{id}/diff"), home.join("l").join(link)).unwrap();
    }
    for dir in ["c/diff", "c/work", "c/merged"] {
        fs::create_dir_all(home.join(dir)).unwrap();
    }
    let status = Command::new("mount")
        .args([
            "-i",
            "-t",
            "overlay",
            "overlay",
            "-o",
            "lowerdir=l/AAAA:l/BBBB,upperdir=c/diff,workdir=c/work",
            "c/merged",
        ])
        .env("LIBMOUNT_FORCE_MOUNT2", "always")
        .current_dir(&home)
        .status()
        .unwrap();
    assert!(status.success());
    let merged = home.join("c/merged");
    scratch.mounts.push(merged.clone());
    let overlay = locate(&merged).overlay().unwrap().clone();
    assert_eq!(
        overlay.lowers.iter().map(|l| l.path.clone()).collect::<Vec<_>>(),
        [home.join("one/diff"), home.join("two/diff")]
    );
    assert_eq!(overlay.upper, Some(home.join("c/diff")));
}

#[test]
fn a_folder_within_an_overlay_is_a_plain_tree() {
    let mut scratch = Scratch::new();
    let lower = scratch.dir("lower");
    fs::create_dir_all(lower.join("var/inner")).unwrap();
    fs::write(lower.join("var/inner/f"), "x").unwrap();
    let merged = scratch.overlay("c", &[lower], "");
    assert!(locate(&merged.join("var/inner")).overlay().is_none());
    let (layer, _) = capture(&merged.join("var/inner"));
    let copy = scratch.dir("copy");
    apply(&copy, &layer);
    assert_same(&listing(&merged.join("var/inner")), &listing(&copy), "inner root");
}

#[test]
fn roots_that_hold_no_ordinary_files_are_refused() {
    let table = fs::read("/proc/self/mountinfo").unwrap();
    let result = RootChanges::locate(Path::new("/proc"), &table);
    assert!(matches!(&result, Err(LocateError::Kind { kind, .. }) if kind == "proc"), "{result:?}");
    let scratch = Scratch::new();
    let result = RootChanges::locate(&scratch.dir("d"), b"1 2 0:1 / / rw - ext4 none rw\n");
    assert!(matches!(result, Err(LocateError::NoMount { .. })), "{result:?}");
    let result = RootChanges::locate(&scratch.dir("d"), b"what\n");
    assert!(matches!(result, Err(LocateError::MountTable { .. })), "{result:?}");
}

// Which base image it is.

/// A base image as an engine unpacks it: the same files, other sub-second and directory times.
fn unpack(image: &Path, to: &Path) {
    let status = Command::new("cp").arg("-a").arg(image).arg(to).status().unwrap();
    assert!(status.success());
    for path in paths(to).iter().rev() {
        let m = fs::symlink_metadata(path).unwrap();
        if m.is_dir() {
            set_time(path, 99, 0);
        } else if !m.is_symlink() {
            set_time(path, m.mtime(), 0);
        }
    }
}

#[test]
fn a_base_image_is_the_same_on_every_engine() {
    let rng = &mut Rng::with_seed(3);
    let mut scratch = Scratch::new();
    let folder = scratch.folder.path().to_owned();
    let cache = folder.join("cache");
    let image = scratch.dir("image");
    for dir in ["etc", "usr", "usr/bin"] {
        fs::create_dir(image.join(dir)).unwrap();
    }
    grow(&image, 80, rng);
    fs::write(image.join("usr/bin/tool"), "12345").unwrap();

    let one = folder.join("engine-1");
    unpack(&image, &one);
    let podman = scratch.overlay("podman", std::slice::from_ref(&one), "");
    let first = base_fingerprint(&locate(&podman), &cache).unwrap();
    assert_eq!(first.to_string().parse(), Ok(first));

    // Another engine: one more layer with what it makes itself, and a used container.
    let two = folder.join("engine-2");
    unpack(&image, &two);
    let init = scratch.dir("init");
    for dir in ["dev/pts", "dev/shm", "etc", "proc", "sys"] {
        fs::create_dir_all(init.join(dir)).unwrap();
    }
    for file in [".dockerenv", "etc/hosts", "etc/hostname", "etc/resolv.conf", "dev/console"] {
        fs::write(init.join(file), "").unwrap();
    }
    symlink("/proc/mounts", init.join("etc/mtab")).unwrap();
    let docker = scratch.overlay("docker", &[init.clone(), two.clone()], "");
    change(&docker, 20, rng);
    assert_eq!(base_fingerprint(&locate(&docker), &cache).unwrap(), first);

    // The next container of the image: a new layer of the engine's, the same result from the cache.
    let entries = || fs::read_dir(&cache).unwrap().count();
    let before = entries();
    let init_2 = folder.join("init-2");
    unpack(&init, &init_2);
    let docker_2 = scratch.overlay("docker-2", &[init_2, two.clone()], "");
    assert_eq!(base_fingerprint(&locate(&docker_2), &cache).unwrap(), first);
    assert_eq!(entries(), before, "containers of one image share a result");

    // And what one engine's container has, another's can be given, the engine's own files included.
    let wanted = listing(&docker);
    let (layer, _) = capture(&docker);
    apply(&podman, &layer);
    assert_same(&wanted, &listing(&podman), "from engine to engine");

    // Other images are told apart.
    let mut seen = vec![first];
    let edits: [&dyn Fn(&Path); 5] = [
        &|root| fs::write(root.join("usr/bin/tool"), "123456").unwrap(),
        &|root| set_time(&root.join("usr/bin/tool"), 5, 0),
        &|root| {
            fs::set_permissions(root.join("usr/bin/tool"), fs::Permissions::from_mode(0o4711))
                .unwrap()
        },
        &|root| fs::write(root.join("usr/bin/tool2"), "").unwrap(),
        &|root| fs::remove_file(root.join("usr/bin/tool")).unwrap(),
    ];
    for (i, edit) in edits.iter().enumerate() {
        let other = folder.join(format!("other-{i}"));
        unpack(&image, &other);
        edit(&other);
        let merged = scratch.overlay(&format!("c{i}"), &[other], "");
        let fingerprint = base_fingerprint(&locate(&merged), &cache).unwrap();
        assert!(!seen.contains(&fingerprint), "edit {i}");
        seen.push(fingerprint);
    }
    assert_eq!(base_fingerprint(&locate(&image), &cache).unwrap(), Fingerprint::None);
}
