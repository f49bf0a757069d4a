//! Where the folders of containers are, whatever engine gave them to samara-runtime as `--root`.
//!
//! Three sources, united: monitors that run, whose command line names the folder; the shims of containerd, whose bundle says
//! which root they pass on; and roots that engines use by default. The last two find containers whose monitor was killed.
//!
//! Processes are believed only if they are root's and in our own mount namespace: a process in a container may call itself
//! what it likes, and its paths are not ours. A folder counts only if root alone can have made and filled it.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use samara_oci::container_id::ContainerId;
use samara_oci::state_dir::{DEFAULT_ROOT, StateDir};
use serde::Deserialize;

/// Roots that runtimes have where an engine names none, and those of containerd's and docker's namespaces, `*` for each folder.
const USUAL_ROOTS: [&str; 5] =
    [DEFAULT_ROOT, "/run/runc", "/run/crun", "/run/containerd/runc/*", "/run/docker/*/*"];

/// Our monitors have two short arguments.
const COMMAND_LINE_BYTES_MAX: u64 = 16 << 10;
/// containerd's options for a runtime have a dozen fields.
const OPTIONS_BYTES_MAX: u64 = 1 << 20;

/// Folders that may hold a container's state, each once. Whether one does is for [`StateDir::load`] to say.
///
/// # Errors
/// When /proc or our own mount namespace cannot be read; what ends meanwhile is left out.
pub(super) fn state_dirs(more_roots: &[PathBuf]) -> io::Result<Vec<StateDir>> {
    let mut roots: BTreeSet<PathBuf> = more_roots.iter().cloned().collect();
    roots.extend(USUAL_ROOTS.iter().flat_map(|pattern| expand(Path::new(pattern))));
    let mut folders = BTreeSet::new();
    let ours = fs::read_link("/proc/self/ns/mnt")?;
    for entry in fs::read_dir("/proc")?.flatten() {
        let process = entry.path();
        let Some(place) = place_of(&process, &ours) else { continue };
        match place {
            Place::Container(folder) => {
                // Its neighbours may have lost their monitor.
                roots.extend(folder.parent().map(Path::to_owned));
                folders.insert(folder);
            }
            Place::Root(root) => {
                roots.insert(root);
            }
        }
    }
    let below = |root: &PathBuf| fs::read_dir(root).into_iter().flatten().flatten();
    folders.extend(roots.iter().flat_map(below).map(|entry| entry.path()));
    // /var/run is /run: one container, two names.
    let folders: BTreeSet<PathBuf> =
        folders.iter().filter_map(|folder| fs::canonicalize(folder).ok()).collect();
    Ok(folders.iter().filter(|folder| is_roots(folder)).filter_map(|f| state_dir(f)).collect())
}

/// What a process tells.
#[derive(Debug, PartialEq)]
enum Place {
    Container(PathBuf),
    Root(PathBuf),
}

fn place_of(process: &Path, mount_namespace: &Path) -> Option<Place> {
    let name = fs::read(process.join("comm")).ok()?;
    // Cut by the kernel after 15 bytes.
    let (monitor, shim) = (name == b"samara-monitor\n", name == b"containerd-shim\n");
    if !monitor && !shim {
        return None;
    }
    let trusted = fs::metadata(process).ok()?.uid() == 0
        && fs::read_link(process.join("ns/mnt")).ok()? == mount_namespace;
    if !trusted {
        return None;
    }
    if monitor {
        let line = read_bounded(&process.join("cmdline"), COMMAND_LINE_BYTES_MAX)?;
        let folder = line.split(|byte| *byte == 0).nth(1)?;
        let folder = Path::new(std::ffi::OsStr::from_bytes(folder));
        return folder.is_absolute().then(|| Place::Container(folder.to_owned()));
    }
    // A shim of containerd lives in its bundle, <…>/<namespace>/<id>.
    shims_root(&fs::read_link(process.join("cwd")).ok()?).map(Place::Root)
}

/// The `--root` that containerd's shim for runc-like runtimes passes on: its option, and the namespace.
fn shims_root(bundle: &Path) -> Option<PathBuf> {
    #[derive(Deserialize)]
    struct Options {
        root: String,
    }
    let text = read_bounded(&bundle.join("options.json"), OPTIONS_BYTES_MAX)?;
    let options: Options = serde_json::from_slice(&text).ok()?;
    let root = Path::new(&options.root);
    root.is_absolute().then_some(root)?;
    Some(root.join(bundle.parent()?.file_name()?))
}

/// Existing folders that a path with `*` for whole names means.
fn expand(pattern: &Path) -> Vec<PathBuf> {
    let mut paths = vec![PathBuf::new()];
    for part in pattern.components() {
        paths = match part.as_os_str() == "*" {
            false => paths.into_iter().map(|path| path.join(part)).collect(),
            true => paths
                .iter()
                .flat_map(|path| fs::read_dir(path).into_iter().flatten().flatten())
                .map(|entry| entry.path())
                .collect(),
        };
    }
    paths.retain(|path| path.is_dir());
    paths
}

/// Whether nobody but root can have put something there.
fn is_roots(folder: &Path) -> bool {
    fs::symlink_metadata(folder)
        .is_ok_and(|meta| meta.is_dir() && meta.uid() == 0 && meta.mode() & 0o022 == 0)
}

fn state_dir(folder: &Path) -> Option<StateDir> {
    let id = ContainerId::parse(folder.file_name()?.to_str()?).ok()?;
    Some(StateDir::new(folder.parent()?, &id))
}

/// A whole file; none if it cannot be read or is longer.
pub(super) fn read_bounded(path: &Path, bytes_max: u64) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(bytes_max + 1).read_to_end(&mut bytes).ok()?;
    (bytes.len() as u64 <= bytes_max).then_some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The daemons of one machine have roots of their own; where they pass them on is the only place that tells.
    #[test]
    fn a_shims_bundle_names_the_root() {
        let folder = tempfile::tempdir().unwrap();
        let bundle = folder.path().join("io.containerd.runtime.v2.task/moby/abc");
        fs::create_dir_all(&bundle).unwrap();
        assert_eq!(shims_root(&bundle), None);
        let options =
            r#"{"binary_name": "samara-runtime", "root": "/run/docker-2/runtime-samara"}"#;
        fs::write(bundle.join("options.json"), options).unwrap();
        assert_eq!(shims_root(&bundle), Some("/run/docker-2/runtime-samara/moby".into()));
    }

    #[test]
    fn roots_of_every_namespace_are_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["runtime-samara/moby", "runtime-runc/moby", "other"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        let mut found = expand(&folder.path().join("*/*"));
        found.sort();
        let expected = ["runtime-runc/moby", "runtime-samara/moby"].map(|n| folder.path().join(n));
        assert_eq!(found, expected);
    }

    /// Whoever could put a record there could have root save any process to any place.
    #[test]
    fn folders_that_others_can_fill_do_not_count() {
        use std::os::unix::fs::PermissionsExt as _;
        let folder = tempfile::tempdir().unwrap();
        let own = fs::metadata(folder.path()).unwrap().uid() == 0;
        assert_eq!(is_roots(folder.path()), own);
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(!is_roots(folder.path()));
        // A process that is not ours to believe: this one is no monitor.
        assert_eq!(place_of(Path::new("/proc/self"), Path::new("mnt:[0]")), None);
    }
}
