//! Where a container's capsule is: from an annotation, or from its environment; in both cases where the node's configuration allows.

use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;
use samara_store::config::{ConfigError, NodeConfig};
use samara_store::location::{Location, LocationError};

/// The annotation that gives a container its address.
pub const ANNOTATION: &str = "dev.samara.capsule";
/// The annotation that says what a start does with a capsule that is there.
pub const RESTORE_ANNOTATION: &str = "dev.samara.restore";
/// The variable of a container's environment that gives it its address.
pub const VARIABLE: &str = "SAMARA_CAPSULE";
/// The variable of the runtime's own environment that names another configuration file.
pub const CONFIG_VARIABLE: &str = "SAMARA_CONFIG";

#[derive(Debug, thiserror::Error)]
pub enum AddressError {
    #[error("{source_of} is not an address of a capsule")]
    Malformed { source_of: &'static str, source: LocationError },
    #[error("{source_of} names {address}, which the node's configuration ({}) does not allow: add a prefix of it to store.allowed_prefixes", config.display())]
    NotAllowed { source_of: &'static str, address: String, config: PathBuf },
    #[error("{RESTORE_ANNOTATION} is `{0}`; auto, require and never are possible")]
    Restore(String),
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// What a start does with a capsule at its address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RestorePolicy {
    /// Continues from a capsule if there is one.
    Auto,
    /// Fails if there is none.
    Require,
    /// Begins anew.
    Never,
}

/// The node's configuration, and where it was read.
#[derive(Debug)]
pub struct Node {
    pub config: NodeConfig,
    pub path: PathBuf,
}

impl Node {
    /// Reads the node's configuration.
    pub fn load() -> Result<Node, ConfigError> {
        match std::env::var_os(CONFIG_VARIABLE) {
            Some(path) => Node::load_from(Path::new(&path)),
            None => Ok(Node {
                config: NodeConfig::load()?,
                path: samara_store::config::CONFIG_PATH.into(),
            }),
        }
    }

    /// Reads a configuration that must exist.
    pub fn load_from(path: &Path) -> Result<Node, ConfigError> {
        Ok(Node { config: NodeConfig::load_from(path)?, path: path.to_owned() })
    }
}

/// A container's address, and what a start does with it.
#[derive(Debug)]
pub struct Address {
    pub location: Location,
    pub policy: RestorePolicy,
}

/// The address that a specification asks for; `None` for a container without one.
pub fn of(spec: &Spec) -> Result<Option<(Address, Node)>, AddressError> {
    let annotation =
        |name: &str| spec.annotations().as_ref().and_then(|all| all.get(name)).cloned();
    let policy = match annotation(RESTORE_ANNOTATION).as_deref() {
        None | Some("auto") => RestorePolicy::Auto,
        Some("require") => RestorePolicy::Require,
        Some("never") => RestorePolicy::Never,
        Some(other) => return Err(AddressError::Restore(other.to_owned())),
    };
    let process = spec.process().as_ref();
    let variable =
        process.and_then(|process| process.env().as_ref()).into_iter().flatten().rev().find_map(
            |variable| {
                let (name, value) = variable.split_once('=')?;
                (name == VARIABLE && !value.is_empty()).then_some(value)
            },
        );
    let annotated = annotation(ANNOTATION).map(|text| (ANNOTATION, text));
    let Some((source_of, text)) =
        annotated.or_else(|| variable.map(|text| (VARIABLE, text.to_owned())))
    else {
        return Ok(None);
    };
    let location =
        Location::parse(&text).map_err(|source| AddressError::Malformed { source_of, source })?;
    let node = Node::load()?;
    // Who starts a container need not be who runs the node: Kubernetes lets its users set annotations.
    if !node.config.store.allows(&location) {
        let address = location.to_string();
        return Err(AddressError::NotAllowed { source_of, address, config: node.path });
    }
    Ok(Some((Address { location, policy }, node)))
}
