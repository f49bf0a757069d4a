//! Which engine a container belongs to, and the name that its user gave it there.
//!
//! Read from the engine's own files, which are found by what `create` was given: the bundle, the root and the mounts. A name that
//! cannot be found is none, and the container goes by its ID.

use std::path::{Path, PathBuf};

use samara_oci::bundle::Bundle;
use samara_oci::state_dir::{Record, StateDir};
use serde::{Deserialize, Serialize};

use super::discovery::read_bounded;

/// docker's longest files on a container have some 10 KiB.
const DOCKER_BYTES_MAX: u64 = 16 << 20;
/// podman keeps all containers in one file, about 1 KiB each.
const PODMAN_BYTES_MAX: u64 = 64 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Engine {
    Docker,
    Podman,
    Containerd,
    Crio,
    /// Started by hand, or by an engine that is not known here.
    None,
}

impl Engine {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Engine::Docker => "docker",
            Engine::Podman => "podman",
            Engine::Containerd => "containerd",
            Engine::Crio => "crio",
            Engine::None => "-",
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Identity {
    pub(super) engine: Engine,
    pub(super) name: Option<String>,
}

impl Identity {
    pub(super) fn of(dir: &StateDir, record: &Record) -> Identity {
        let note = |key: &str| record.annotations.get(key).cloned();
        let (id, bundle) = (&record.id, &record.bundle);
        if let Some(name) = docker_name(id, &docker_paths(dir, record)) {
            return Identity { engine: Engine::Docker, name: Some(name) };
        }
        // containers/storage: <driver>-containers/<id>/userdata, of podman and of CRI-O.
        if bundle.ends_with(Path::new(id).join("userdata")) {
            return match note("io.kubernetes.container.name") {
                Some(name) => Identity { engine: Engine::Crio, name: Some(name) },
                None => Identity { engine: Engine::Podman, name: podman_name(id, bundle) },
            };
        }
        // containerd: io.containerd.runtime.v2.task/<namespace>/<id>.
        let namespaces = bundle.ancestors().nth(2).and_then(Path::file_name);
        if namespaces.is_some_and(|name| name == "io.containerd.runtime.v2.task") {
            let moby = bundle.ancestors().nth(1).is_some_and(|folder| folder.ends_with("moby"));
            let engine = if moby { Engine::Docker } else { Engine::Containerd };
            return Identity { engine, name: note("io.kubernetes.cri.container-name") };
        }
        Identity { engine: Engine::None, name: None }
    }
}

/// What docker gives a container from its data folder: the root, and the files that it mounts into each one.
fn docker_paths(dir: &StateDir, record: &Record) -> Vec<PathBuf> {
    let mut paths = vec![record.rootfs.clone()];
    let Ok(spec) = Bundle::reload(&dir.config()) else { return paths };
    for mount in spec.mounts().iter().flatten() {
        let from_docker = ["/etc/resolv.conf", "/etc/hostname", "/etc/hosts"];
        if from_docker.iter().any(|path| mount.destination() == Path::new(path)) {
            paths.extend(mount.source().clone());
        }
    }
    paths
}

/// The name in `<data folder>/containers/<id>/config.v2.json`, for a data folder above one of `paths`. Never in or under them:
/// what is there is the container's own.
fn docker_name(id: &str, paths: &[PathBuf]) -> Option<String> {
    #[derive(Deserialize)]
    struct Config {
        #[serde(rename = "Name")]
        name: String,
    }
    let config = paths
        .iter()
        .flat_map(|path| path.ancestors().skip(1))
        .map(|folder| folder.join("containers").join(id).join("config.v2.json"))
        .find_map(|path| read_bounded(&path, DOCKER_BYTES_MAX))?;
    let config: Config = serde_json::from_slice(&config).ok()?;
    let name = config.name.trim_start_matches('/');
    (!name.is_empty()).then(|| name.to_owned())
}

/// The first name in the list of containers beside the folder of the one with `bundle`.
fn podman_name(id: &str, bundle: &Path) -> Option<String> {
    #[derive(Deserialize)]
    struct Container {
        id: String,
        #[serde(default)]
        names: Option<Vec<String>>,
    }
    let folder = bundle.ancestors().nth(2)?;
    // The second one is where containers stand that do not outlive a reboot (transient store).
    ["containers.json", "volatile-containers.json"].iter().find_map(|file| {
        let text = read_bounded(&folder.join(file), PODMAN_BYTES_MAX)?;
        let containers: Vec<Container> = serde_json::from_slice(&text).ok()?;
        let own = containers.into_iter().find(|container| container.id == id)?;
        own.names?.into_iter().next()
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::tests::container;
    use super::*;

    fn write(path: &Path, text: &str) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    fn identity(root: &Path, id: &str, bundle: &Path) -> (Engine, Option<String>) {
        let Identity { engine, name } = container(root, id, bundle, true).identity;
        (engine, name)
    }

    #[test]
    fn dockers_names_stand_in_its_data_folder() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        let bundle = root.join("exec/io.containerd.runtime.v2.task/moby");
        // Found above the container's root.
        write(&root.join("data/containers/abc/config.v2.json"), r#"{"ID": "abc", "Name": "/web"}"#);
        let expected = (Engine::Docker, Some("web".to_owned()));
        assert_eq!(identity(root, "abc", &bundle.join("abc")), expected);
        // Found above a file that docker mounts; those of another container, whose network is shared, lead there too.
        write(&root.join("other/containers/def/config.v2.json"), r#"{"Name": "/db"}"#);
        let spec = serde_json::json!({"ociVersion": "1.0.2", "mounts": [
            {"destination": "/etc/hosts", "source": root.join("other/containers/abc/hosts")},
        ]});
        let found = container(root, "def", &bundle.join("def"), true);
        assert_eq!(found.identity, Identity { engine: Engine::Docker, name: None });
        fs::write(found.dir.config(), spec.to_string()).unwrap();
        assert_eq!(Identity::of(&found.dir, &found.record).name.as_deref(), Some("db"));
    }

    /// What a container writes in its own root must not give it another one's name.
    #[test]
    fn a_container_cannot_name_itself() {
        let folder = tempfile::tempdir().unwrap();
        let inside = folder.path().join("data/overlay2/x/merged/containers/abc/config.v2.json");
        write(&inside, r#"{"Name": "/web"}"#);
        assert_eq!(identity(folder.path(), "abc", Path::new("/b")), (Engine::None, None));
    }

    #[test]
    fn podmans_names_stand_in_one_list() {
        let folder = tempfile::tempdir().unwrap();
        let storage = folder.path().join("overlay-containers");
        let list = r#"[{"id": "abc", "names": ["web"]}, {"id": "def"}]"#;
        write(&storage.join("containers.json"), list);
        write(&storage.join("volatile-containers.json"), r#"[{"id": "ghi", "names": ["db"]}]"#);
        for (id, name) in [("abc", Some("web")), ("def", None), ("ghi", Some("db"))] {
            let bundle = storage.join(id).join("userdata");
            let expected = (Engine::Podman, name.map(str::to_owned));
            assert_eq!(identity(folder.path(), id, &bundle), expected, "{id}");
        }
    }

    #[test]
    fn other_containers_go_by_their_id() {
        let folder = tempfile::tempdir().unwrap();
        let task = Path::new("/run/containerd/io.containerd.runtime.v2.task/k8s.io/abc");
        assert_eq!(identity(folder.path(), "abc", task), (Engine::Containerd, None));
        assert_eq!(identity(folder.path(), "def", Path::new("/x/def")), (Engine::None, None));
    }
}
