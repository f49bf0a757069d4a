//! How a container's root is mounted, and the views of it that capture and application need.
//!
//! Kernel overlayfs is taken apart into its layers. Every other file system that a root can lie on is one plain
//! directory without a base image, which is right for fuse-overlayfs, btrfs and the like too: they show a merged view,
//! and only make the layer larger than it had to be.
//!
//! What is absent: unprivileged mounts of another user namespace, and changing any mount that is there.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, UnmountFlags};

use super::metadata::{Object, xattr};
use super::tree::{Kind, Tree, TreePath, names, open_subdir, stat_name};
use super::{Attempt, HostError};

/// What engines make in a root on their own, in a layer of each container: docker's `-init` layer has all of it, podman
/// and containerd have none. It does not count as base image, and therefore always travels.
pub(super) const ENGINE_PATHS: [&str; 13] = [
    "",
    ".dockerenv",
    "dev",
    "dev/console",
    "dev/pts",
    "dev/shm",
    "etc",
    "etc/hostname",
    "etc/hosts",
    "etc/mtab",
    "etc/resolv.conf",
    "proc",
    "sys",
];

/// More layers than the kernel takes (`OVL_MAX_STACK` is 500).
const LAYERS_MAX: usize = 512;

/// Kinds of file systems that hold ordinary files, and show them as they are.
const PLAIN_KINDS: [&str; 19] = [
    "aufs",
    "bcachefs",
    "btrfs",
    "ceph",
    "erofs",
    "ext2",
    "ext3",
    "ext4",
    "f2fs",
    "fuse.fuse-overlayfs",
    "nfs",
    "nfs4",
    "overlay",
    "ramfs",
    "squashfs",
    "tmpfs",
    "virtiofs",
    "xfs",
    "zfs",
];

/// A container's root as it is mounted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RootChanges {
    /// Where the merged root is seen on the host.
    pub(super) root: PathBuf,
    /// None for a plain directory.
    pub(super) overlay: Option<Overlay>,
}

/// The parts of a kernel overlay mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlay {
    /// Uppermost first.
    pub lowers: Vec<Lower>,
    /// None for a mount that can't be written to.
    pub upper: Option<PathBuf>,
    /// Attributes of overlayfs are `user.overlay.` instead of `trusted.overlay.`.
    pub userxattr: bool,
    /// Names of one file stay names of one file when the first of them is copied up.
    pub index: bool,
    /// Directories of lower layers can be renamed.
    pub redirects: bool,
    /// Options of the mount that decide how lower layers are read.
    pub(super) reading_options: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lower {
    pub path: PathBuf,
    /// Its names are not seen; it only holds content of metacopies.
    pub data_only: bool,
}

/// Why a root was not understood. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum LocateError {
    #[error(transparent)]
    Host(#[from] HostError),
    #[error("the mount of {} is not in the mount table that was given", root.display())]
    NoMount { root: PathBuf },
    #[error("a line of the mount table is malformed: {line}")]
    MountTable { line: String },
    #[error("{} lies on a file system of kind {kind}, which cannot be saved", root.display())]
    Kind { root: PathBuf, kind: String },
    #[error("layer {} of the overlay on {} is not found", layer.display(), root.display())]
    Layer { root: PathBuf, layer: PathBuf },
    #[error("layer {} of the overlay on {} can stand for two directories", layer.display(), root.display())]
    Ambiguous { root: PathBuf, layer: PathBuf },
    #[error("the overlay on {} has more than 512 layers", root.display())]
    TooManyLayers { root: PathBuf },
}

impl RootChanges {
    /// Finds out how the container root at `rootfs` is mounted.
    ///
    /// `mountinfo` is the content of `/proc/PID/mountinfo` of a process in whose mount namespace `rootfs` was looked up;
    /// for a root by its host path that is the caller itself. An overlay's layers are looked up by their host paths.
    pub fn locate(rootfs: &Path, mountinfo: &[u8]) -> Result<RootChanges, LocateError> {
        let root = fs::canonicalize(rootfs).attempt("find", rootfs)?;
        let stat = rustix::fs::statx(
            CWD,
            &root,
            AtFlags::SYMLINK_NOFOLLOW,
            StatxFlags::MNT_ID | StatxFlags::TYPE,
        )
        .attempt("look up", &root)?;
        if rustix::fs::FileType::from_raw_mode(stat.stx_mode.into())
            != rustix::fs::FileType::Directory
        {
            return Err(HostError {
                action: "use as a root",
                path: root,
                source: Errno::NOTDIR.into(),
            }
            .into());
        }
        for line in mountinfo.split(|&b| b == b'\n').filter(|l| !l.is_empty()) {
            let malformed =
                || LocateError::MountTable { line: String::from_utf8_lossy(line).into_owned() };
            let mount = Mount::parse(line).ok_or_else(malformed)?;
            if mount.id != stat.stx_mnt_id {
                continue;
            }
            // A part of an overlay, such as a root within a container of another engine, has no layers of its own.
            let whole = mount.root == b"/" && root.as_os_str().as_bytes() == mount.point;
            if mount.kind == b"overlay" && whole {
                let overlay = Overlay::parse(&root, &mount.options)?;
                return Ok(RootChanges { root, overlay: Some(overlay) });
            }
            if !PLAIN_KINDS.iter().any(|k| k.as_bytes() == mount.kind) {
                let kind = String::from_utf8_lossy(&mount.kind).into_owned();
                return Err(LocateError::Kind { root, kind });
            }
            return Ok(RootChanges { root, overlay: None });
        }
        Err(LocateError::NoMount { root })
    }

    /// The overlay's parts; none where the root is a plain directory.
    pub fn overlay(&self) -> Option<&Overlay> {
        self.overlay.as_ref()
    }

    /// The root as the container sees it, without what is mounted below it.
    pub(super) fn merged(&self) -> Result<Tree, HostError> {
        Tree::beneath_mounts(&self.root).attempt("open", &self.root)
    }
}

/// One line of a mount table.
struct Mount {
    id: u64,
    root: Vec<u8>,
    point: Vec<u8>,
    kind: Vec<u8>,
    options: Vec<u8>,
}

impl Mount {
    /// `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [TAG…] - KIND SOURCE SUPER-OPTIONS`, see proc_pid_mountinfo(5).
    fn parse(line: &[u8]) -> Option<Mount> {
        let mut fields = line.split(|&b| b == b' ');
        let id = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
        let mut fields = fields.skip(2);
        let (root, point) = (decode_octal(fields.next()?), decode_octal(fields.next()?));
        let mut fields = fields.skip_while(|f| *f != b"-").skip(1);
        let kind = decode_octal(fields.next()?);
        // Commas within a value are octal, so that the options must be cut before they are decoded.
        let options = fields.nth(1)?.to_vec();
        Some(Mount { id, root, point, kind, options })
    }
}

/// Undoes the kernel's `\ooo`.
fn decode_octal(bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(bytes.len());
    let mut rest = bytes;
    while let Some((&b, tail)) = rest.split_first() {
        rest = tail;
        match tail {
            [a @ b'0'..=b'3', b2 @ b'0'..=b'7', c @ b'0'..=b'7', more @ ..] if b == b'\\' => {
                plain.push((a - b'0') << 6 | (b2 - b'0') << 3 | (c - b'0'));
                rest = more;
            }
            _ => plain.push(b),
        }
    }
    plain
}

/// Undoes overlayfs's own escapes: a backslash before any byte stands for that byte.
fn unescape(bytes: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(bytes.len());
    let mut bytes = bytes.iter();
    while let Some(&b) = bytes.next() {
        plain.push(if b == b'\\' { *bytes.next().unwrap_or(&b) } else { b });
    }
    plain
}

/// Cuts the classic `lowerdir` value: layers are separated by `:`, those with data only are set off by `::`.
fn split_lowers(value: &[u8]) -> Vec<(Vec<u8>, bool)> {
    let mut lowers = Vec::new();
    let (mut start, mut at, mut data_only) = (0, 0, false);
    while at <= value.len() {
        match value.get(at) {
            Some(b'\\') => at += 1,
            Some(b':') | None => {
                if start < at {
                    lowers.push((value[start..at.min(value.len())].to_vec(), data_only));
                } else {
                    data_only = true;
                }
                start = at + 1;
            }
            Some(_) => {}
        }
        at += 1;
    }
    lowers
}

impl Overlay {
    fn parse(root: &Path, options: &[u8]) -> Result<Overlay, LocateError> {
        let mut lowers: Vec<(Vec<u8>, bool, bool)> = Vec::new();
        let mut upper = None;
        let mut userxattr = false;
        let mut index = None;
        let mut reading_options = Vec::new();
        for option in options.split(|&b| b == b',') {
            let (key, value) = match option.iter().position(|&b| b == b'=') {
                Some(at) => (&option[..at], decode_octal(&option[at + 1..])),
                None => (option, Vec::new()),
            };
            match key {
                // Values of the newer options were never escaped by whoever mounted.
                b"lowerdir+" => lowers.push((value, false, true)),
                b"datadir+" => lowers.push((value, true, true)),
                b"lowerdir" => lowers.extend(
                    split_lowers(&value).into_iter().map(|(path, data)| (path, data, false)),
                ),
                b"upperdir" => upper = Some(value),
                b"userxattr" => userxattr = true,
                b"index" => index = Some(value == b"on"),
                b"nfs_export" if value == b"on" => index = Some(true),
                b"redirect_dir" | b"metacopy" => {
                    let value = String::from_utf8_lossy(&value).into_owned();
                    reading_options.push(format!("{}={value}", String::from_utf8_lossy(key)));
                }
                _ => {}
            }
        }
        if lowers.len() > LAYERS_MAX {
            return Err(LocateError::TooManyLayers { root: root.to_owned() });
        }
        // The kernel shows the options that differ from the module's defaults.
        let by_default = |parameter: &str| {
            fs::read_to_string(format!("/sys/module/overlay/parameters/{parameter}"))
                .is_ok_and(|v| v.trim() == "Y")
        };
        let index = index.unwrap_or_else(|| by_default("index"));
        let redirects =
            match reading_options.iter().find_map(|o: &String| o.strip_prefix("redirect_dir=")) {
                Some(value) => value == "on",
                None => by_default("redirect_dir"),
            };
        let candidates = |value: &[u8], verbatim: bool| {
            let literal = PathBuf::from(OsString::from_vec(value.to_vec()));
            let plain = PathBuf::from(OsString::from_vec(unescape(value)));
            if verbatim || literal == plain { vec![literal] } else { vec![plain, literal] }
        };
        let lowers: Vec<_> = lowers
            .iter()
            .map(|(v, data_only, verbatim)| (candidates(v, *verbatim), *data_only))
            .collect();
        let upper = upper.map(|value| candidates(&value, false));
        let base = base_folder(root, &lowers, upper.as_deref())?;
        let found = |candidates: &[PathBuf]| resolve(root, &base, candidates);
        let lowers = lowers
            .iter()
            .map(|(paths, data_only)| Ok(Lower { path: found(paths)?, data_only: *data_only }))
            .collect::<Result<_, LocateError>>()?;
        let upper = upper.as_deref().map(found).transpose()?;
        Ok(Overlay { lowers, upper, userxattr, index, redirects, reading_options })
    }

    /// The layers below the container's own, merged: what the root was before anything in it changed.
    ///
    /// `lowers` are this overlay's or a part of them. The mount is private to the view and goes with it.
    pub(super) fn base_view(&self, lowers: &[Lower]) -> Result<BaseView, HostError> {
        let folder = tempfile::tempdir().attempt("make a folder in", std::env::temp_dir())?;
        let mut layers = Vec::with_capacity(lowers.len() + 1);
        for Lower { path, data_only } in lowers.iter().filter(|l| !l.data_only) {
            layers.push((path_handle(path).attempt("open", path)?, *data_only));
        }
        if layers.len() < 2 {
            // The kernel wants two layers where there is no upper one.
            let path = folder.path().join("empty");
            rustix::fs::mkdirat(CWD, &path, Mode::RWXU).attempt("make", &path)?;
            layers.push((path_handle(&path).attempt("open", &path)?, false));
        }
        for Lower { path, data_only } in lowers.iter().filter(|l| l.data_only) {
            layers.push((path_handle(path).attempt("open", path)?, *data_only));
        }
        let view = match self.mount_by_parts(&layers) {
            // Before Linux 6.7 there is no `lowerdir+`.
            Err(Errno::INVAL | Errno::NOSYS) => self.mount_at_once(&layers, folder.path()),
            other => other,
        };
        let base_of = lowers.first().map_or(Path::new("/"), |l| &l.path);
        let view = view.attempt("mount the base image of", base_of)?;
        Ok(BaseView {
            tree: Tree::at(view).attempt("look up the base image of", base_of)?,
            _folder: folder,
        })
    }

    fn mount_by_parts(&self, layers: &[(OwnedFd, bool)]) -> Result<OwnedFd, Errno> {
        use rustix::mount::{
            fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
        };
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (layer, data_only) in layers {
            fsconfig_set_string(
                context.as_fd(),
                if *data_only { "datadir+" } else { "lowerdir+" },
                handle_path(layer),
            )?;
        }
        if self.userxattr {
            fsconfig_set_flag(context.as_fd(), "userxattr")?;
        }
        for option in &self.reading_options {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            fsconfig_set_string(context.as_fd(), key, reading_value(key, value))?;
        }
        fsconfig_create(context.as_fd())?;
        let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOATIME;
        fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes)
    }

    /// Mounts on a folder for a moment. A page holds the paths of 240 layers.
    fn mount_at_once(&self, layers: &[(OwnedFd, bool)], folder: &Path) -> Result<OwnedFd, Errno> {
        let mut options = String::from("lowerdir=");
        for (i, (layer, data_only)) in layers.iter().enumerate() {
            options.push_str(if i == 0 {
                ""
            } else if *data_only {
                "::"
            } else {
                ":"
            });
            options.push_str(&handle_path(layer));
        }
        if self.userxattr {
            options.push_str(",userxattr");
        }
        for option in &self.reading_options {
            let (key, value) = option.split_once('=').unwrap_or((option, ""));
            options.push_str(&format!(",{key}={}", reading_value(key, value)));
        }
        let data = std::ffi::CString::new(options).map_err(|_| Errno::INVAL)?;
        let spot = folder.join("view");
        rustix::fs::mkdirat(CWD, &spot, Mode::RWXU)?;
        rustix::mount::mount(
            "overlay",
            &spot,
            "overlay",
            MountFlags::RDONLY | MountFlags::NOATIME,
            Some(data.as_c_str()),
        )?;
        let view = path_handle(&spot);
        rustix::mount::unmount(&spot, UnmountFlags::DETACH)?;
        view
    }

    /// What an upper directory says of itself.
    pub(super) fn marks(&self, upper_dir: impl AsFd) -> Result<Marks, Errno> {
        let object = Object::Open(upper_dir.as_fd());
        Ok(Marks {
            opaque: xattr(object, &self.attribute("opaque"))?.is_some_and(|v| v == b"y"),
            redirect: xattr(object, &self.attribute("redirect"))?.is_some(),
        })
    }

    pub(super) fn attribute(&self, name: &str) -> Vec<u8> {
        format!("{}.overlay.{name}", if self.userxattr { "user" } else { "trusted" }).into_bytes()
    }

    /// Names that may not be in the upper directory and show a file of it all the same. By directory.
    ///
    /// With an index, all names of a lower file follow the one that was copied up, also when that one is removed
    /// later. Copying gives a new time of change, which nobody can set back.
    pub(super) fn indexed_names(
        &self,
        merged: &Tree,
        view: &Tree,
    ) -> Result<NamesByDirectory, HostError> {
        let mut found = NamesByDirectory::new();
        if !self.index {
            return Ok(found);
        }
        each_name(view, &mut |dir, name, path, kind| {
            if kind == Kind::Directory {
                return Ok(());
            }
            let Some(base) = stat_name(dir, name)?.filter(|s| s.links > 1) else { return Ok(()) };
            if merged.stat(path)?.is_some_and(|shown| shown.changed != base.changed) {
                add_with_parents(&mut found, path);
            }
            Ok(())
        })?;
        Ok(found)
    }
}

/// Every name of some objects, with the directories that lead there. By directory.
pub(super) fn all_names(
    tree: &Tree,
    identities: &BTreeSet<(u32, u32, u64)>,
) -> Result<NamesByDirectory, HostError> {
    let mut found = NamesByDirectory::new();
    if !identities.is_empty() {
        each_name(tree, &mut |dir, name, path, kind| {
            if kind != Kind::Directory
                && stat_name(dir, name)?.is_some_and(|s| identities.contains(&s.identity))
            {
                add_with_parents(&mut found, path);
            }
            Ok(())
        })?;
    }
    Ok(found)
}

/// What a root was before anything in it changed.
#[derive(Debug)]
pub(super) struct BaseView {
    pub(super) tree: Tree,
    /// Holds an empty layer, which must last as long as the view: a removed one makes every listing look empty.
    _folder: tempfile::TempDir,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Marks {
    pub(super) opaque: bool,
    /// The directory was renamed: below it, the lower layers are seen from another path.
    pub(super) redirect: bool,
}

pub(super) type NamesByDirectory = BTreeMap<TreePath, BTreeSet<OsString>>;

/// Adds a path and the directories that lead to it.
pub(super) fn add_with_parents(names: &mut NamesByDirectory, path: &TreePath) {
    let mut path = path.clone();
    while let Some((parent, name)) = path.split() {
        names.entry(parent.clone()).or_default().insert(name.to_owned());
        path = parent;
    }
}

type Visit<'a> = dyn FnMut(&OwnedFd, &OsStr, &TreePath, Kind) -> Result<(), Errno> + 'a;

/// Calls `visit` with every name of a tree.
pub(super) fn each_name(tree: &Tree, visit: &mut Visit<'_>) -> Result<(), HostError> {
    let mut pending = vec![TreePath::root()];
    while let Some(path) = pending.pop() {
        let dir = tree.dir(&path).attempt("open", &path)?;
        for name in names(&dir).attempt("list", &path)? {
            let child = path.child(&name).map_err(|_| Errno::NAMETOOLONG).attempt("walk", &path)?;
            let Some(stat) = stat_name(&dir, &name).attempt("look up", &child)? else { continue };
            visit(&dir, &name, &child, stat.kind).attempt("read", &child)?;
            if stat.kind == Kind::Directory && stat.mount == tree.mount {
                pending.push(child);
            }
        }
    }
    Ok(())
}

/// A layer that holds nothing but what the engine made, such as docker's `-init` layer.
pub(super) fn is_engine_layer(layer: &Path) -> Result<bool, HostError> {
    let tree = Tree::beneath_mounts(layer).attempt("open", layer)?;
    let mut pending = vec![TreePath::root()];
    while let Some(path) = pending.pop() {
        let dir = tree.dir(&path).attempt("open", layer)?;
        for name in names(&dir).attempt("list", layer)? {
            let Ok(child) = path.child(&name) else { return Ok(false) };
            let known = ENGINE_PATHS.iter().any(|p| p.as_bytes() == child.as_bytes());
            let stat = stat_name(&dir, &name).attempt("look up", layer)?;
            let Some(stat) =
                stat.filter(|s| known && !(s.kind == Kind::CharDevice && s.device == (0, 0)))
            else {
                return Ok(false);
            };
            if stat.kind == Kind::Directory {
                let subdir = open_subdir(&dir, &name).attempt("open", layer)?;
                for mark in ["trusted.overlay.opaque", "user.overlay.opaque"] {
                    if xattr(Object::Open(subdir.as_fd()), mark.as_bytes())
                        .attempt("read", layer)?
                        .is_some()
                    {
                        return Ok(false);
                    }
                }
                pending.push(child);
            }
        }
    }
    Ok(true)
}

fn path_handle(path: &Path) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// Stands for a layer in mount options: short, and free of the characters that need escapes.
fn handle_path(layer: &OwnedFd) -> String {
    format!("/proc/self/fd/{}", layer.as_raw_fd())
}

/// Nothing is renamed in a view, and `on` is not allowed without an upper layer on every kernel; following is the same.
fn reading_value<'a>(key: &str, value: &'a str) -> &'a str {
    if key == "redirect_dir" && value == "on" { "follow" } else { value }
}

/// The folder that relative layers are relative to. Engines change to the folder that holds their layers before they
/// mount, so that more of them fit into the options; it leads to the mount point, to the upper directory, or both.
fn base_folder(
    root: &Path,
    lowers: &[(Vec<PathBuf>, bool)],
    upper: Option<&[PathBuf]>,
) -> Result<PathBuf, LocateError> {
    let all = || lowers.iter().map(|(paths, _)| &paths[..]).chain(upper);
    if all().flatten().all(|p| p.is_absolute()) {
        return Ok(PathBuf::from("/"));
    }
    let absolute_upper = upper.into_iter().flatten().find(|p| p.is_absolute());
    let starts = absolute_upper.into_iter().map(PathBuf::as_path).chain([root]);
    let mut folders = starts.flat_map(Path::ancestors);
    let folder =
        folders.find(|folder| all().all(|paths| paths.iter().any(|p| folder.join(p).is_dir())));
    match folder {
        Some(folder) => Ok(folder.to_owned()),
        None => {
            let first = all().flatten().find(|p| !p.is_absolute()).cloned().unwrap_or_default();
            Err(LocateError::Layer { root: root.to_owned(), layer: first })
        }
    }
}

fn resolve(root: &Path, base: &Path, candidates: &[PathBuf]) -> Result<PathBuf, LocateError> {
    let mut found: Vec<_> =
        candidates.iter().filter_map(|p| fs::canonicalize(base.join(p)).ok()).collect();
    found.retain(|p| p.is_dir());
    found.dedup();
    let named = || candidates.first().cloned().unwrap_or_default();
    match (found.pop(), found.pop()) {
        (Some(path), None) => Ok(path),
        (None, _) => Err(LocateError::Layer { root: root.to_owned(), layer: named() }),
        (Some(_), Some(_)) => Err(LocateError::Ambiguous { root: root.to_owned(), layer: named() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lower_lists_are_cut_where_the_kernel_cuts_them() {
        let cut = |value: &str| {
            split_lowers(value.as_bytes())
                .into_iter()
                .map(|(path, data)| (String::from_utf8(unescape(&path)).unwrap(), data))
                .collect::<Vec<_>>()
        };
        let plain =
            |names: &[&str]| names.iter().map(|n| (n.to_string(), false)).collect::<Vec<_>>();
        assert_eq!(cut("/a:/b"), plain(&["/a", "/b"]));
        assert_eq!(cut(r"/a\:b\,c\\d:/e"), plain(&[r"/a:b,c\d", "/e"]));
        assert_eq!(
            cut("/a:/b::/c::/d"),
            [plain(&["/a", "/b"]), vec![("/c".into(), true), ("/d".into(), true)]].concat()
        );
    }

    #[test]
    fn octal_is_undone_once() {
        assert_eq!(decode_octal(br"a\040b\134054c\012"), b"a b\\054c\n");
        assert_eq!(decode_octal(br"\9\04"), br"\9\04");
    }

    /// The way for older kernels must show what the newer way shows, and leave no mount behind.
    #[test]
    fn both_ways_to_mount_a_base_image_show_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let mut layers = Vec::new();
        for (layer, file) in [("one", "a"), ("two", "b")] {
            let path = folder.path().join(layer);
            fs::create_dir(&path).unwrap();
            fs::write(path.join(file), layer).unwrap();
            layers.push((path_handle(&path).unwrap(), false));
        }
        let overlay = Overlay {
            lowers: Vec::new(),
            upper: None,
            userxattr: false,
            index: false,
            redirects: false,
            reading_options: vec!["redirect_dir=on".into(), "metacopy=on".into()],
        };
        let spot = folder.path().join("spot");
        fs::create_dir(&spot).unwrap();
        for view in [overlay.mount_by_parts(&layers), overlay.mount_at_once(&layers, &spot)] {
            let tree = Tree::at(view.unwrap()).unwrap();
            assert_eq!(names(tree.dir(&TreePath::root()).unwrap()).unwrap(), ["a", "b"]);
        }
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(folder.path().to_str().unwrap()));
    }
}
