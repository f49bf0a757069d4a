//! The node's configuration: `/etc/samara/config.toml`.
//!
//! ```toml
//! [store]
//! allowed_prefixes = ["s3://capsules/jobs"]   # where containers may point at
//! timeout_seconds = 60                        # a call to a store ends within this time
//!
//! [store.packs]                               # copies of what is uploaded, for storing differences
//! folder = "/var/cache/samara/packs"
//! mebibytes_max = 2048
//!
//! [store.s3]                                  # for every s3:// address
//! region = "eu-central-1"
//! access_key_id = "..."
//! secret_access_key = "..."
//!
//! [[store.prefix]]                            # for addresses under one prefix, instead of the above
//! url = "s3://lab"
//! endpoint = "http://10.0.0.5:8333"
//! allow_http = true
//! access_key_id = "..."
//! secret_access_key = "..."
//!
//! [capture]                                   # what the captures of all containers take together
//! buffers_mebibytes = 1024
//! cores = 4
//! ```
//!
//! The file holds credentials: one that others than its owner can read or write is refused. Credentials never come from
//! a container, nor from the environment. Keys that are not known are refused: a typing error must not turn into a
//! setting that silently isn't there.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::location::{Location, Scheme};

/// Where the configuration is, unless said otherwise.
pub const CONFIG_PATH: &str = "/etc/samara/config.toml";

/// Where packs are kept, unless said otherwise.
const PACKS_FOLDER: &str = "/var/cache/samara/packs";

/// Of containers that use 8 GiB together, as heaps are compressed four times or better.
const PACKS_MEBIBYTES_MAX_DEFAULT: u64 = 2048;

/// A configuration takes at most this many bytes.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// A call to a store ends within this time if the configuration doesn't say otherwise: long enough for a pack of 8 MiB
/// at 2 Mbit/s, short enough for somebody who waits.
pub const TIMEOUT_DEFAULT: Duration = Duration::from_secs(60);
/// About what the fork of a process with a GiB in small pages takes.
pub const PAUSE_BUDGET_MS_DEFAULT: u64 = 10;

/// The whole file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NodeConfig {
    #[serde(default)]
    pub store: StoreConfig,
    #[serde(default)]
    pub pause: PauseConfig,
    #[serde(default)]
    pub capture: CaptureConfig,
}

/// `[pause]`: how short captures are to keep containers standing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PauseConfig {
    /// How long copying of memory may take, as expected, before a fork is made in its place.
    pub budget_ms: Option<u64>,
    #[serde(default)]
    pub fork: ForkPolicy,
}

/// Whether a fork of a process may be the snapshot of its memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ForkPolicy {
    /// Where copying is expected to take longer than the budget, and than the fork.
    #[default]
    Auto,
    Never,
    /// Wherever there is memory for it.
    Always,
}

impl PauseConfig {
    #[must_use]
    pub fn budget(&self) -> Duration {
        Duration::from_millis(self.budget_ms.unwrap_or(PAUSE_BUDGET_MS_DEFAULT))
    }
}

/// `[capture]`: what the captures of all containers of the node take together. What is not set follows from the machine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptureConfig {
    /// For what waits to be compressed and uploaded.
    pub buffers_mebibytes: Option<u64>,
    /// That compress.
    pub cores: Option<u64>,
    /// None: as fast as it goes.
    pub upload_mebibytes_per_second: Option<u64>,
    /// Where captures find out about one another.
    pub folder: Option<PathBuf>,
}

/// Two captures, one at an interval and one that somebody asks for, have less than half of what they need below this.
const BUFFERS_MEBIBYTES_MIN: u64 = 64;

impl CaptureConfig {
    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let ranges = [
            ("buffers_mebibytes", self.buffers_mebibytes, BUFFERS_MEBIBYTES_MIN, 1 << 20),
            ("cores", self.cores, 1, 8192),
            ("upload_mebibytes_per_second", self.upload_mebibytes_per_second, 1, 1 << 20),
        ];
        for (key, value, min, max) in ranges {
            if value.is_some_and(|value| !(min..=max).contains(&value)) {
                return Err(ConfigError::Range { path: path.to_owned(), key, min, max });
            }
        }
        match &self.folder {
            Some(folder) if !folder.is_absolute() => {
                Err(ConfigError::Relative { path: path.to_owned(), table: "capture" })
            }
            _ => Ok(()),
        }
    }
}

/// `[store]`: how stores are reached.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// Prefixes under which the address must lie that a container's environment names. None allows nothing.
    #[serde(default)]
    pub allowed_prefixes: Vec<String>,
    /// A call to a store ends within this time, with an error if need be.
    pub timeout_seconds: Option<u64>,
    /// Threads that compress and decompress; by default one a core.
    pub threads: Option<usize>,
    #[serde(default)]
    pub packs: PacksSettings,
    #[serde(default)]
    pub file: FileSettings,
    #[serde(default)]
    pub s3: S3Settings,
    #[serde(default)]
    pub gs: GsSettings,
    #[serde(default)]
    pub az: AzSettings,
    /// Settings of addresses under one prefix, which replace those of the scheme. The longest prefix counts.
    #[serde(default)]
    pub prefix: Vec<PrefixSettings>,
}

/// `[store.packs]`: packs that were uploaded are kept on this node, so that of pages which change only the differences need be
/// stored. Addresses that are folders of a local file system need none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PacksSettings {
    pub folder: Option<PathBuf>,
    /// 0 keeps nothing.
    pub mebibytes_max: Option<u64>,
}

impl PacksSettings {
    /// Where they are.
    pub fn folder(&self) -> &Path {
        self.folder.as_deref().unwrap_or(Path::new(PACKS_FOLDER))
    }

    /// How much they take at most.
    pub fn bytes_max(&self) -> u64 {
        self.mebibytes_max.unwrap_or(PACKS_MEBIBYTES_MAX_DEFAULT) << 20
    }
}

/// `[store.file]`
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileSettings {
    /// Whether files are on the disk before a capsule counts as committed. Without, a power failure may cost capsules.
    #[serde(default = "yes")]
    pub sync: bool,
}

fn yes() -> bool {
    true
}

impl Default for FileSettings {
    fn default() -> FileSettings {
        FileSettings { sync: true }
    }
}

/// `[store.s3]`. Without keys, the credentials of the instance or pod are used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct S3Settings {
    pub endpoint: Option<String>,
    pub region: Option<String>,
    pub access_key_id: Option<String>,
    pub secret_access_key: Option<Secret>,
    pub session_token: Option<Secret>,
    #[serde(default)]
    pub allow_http: bool,
    /// The bucket as part of the host's name instead of the path.
    #[serde(default)]
    pub virtual_hosted: bool,
}

/// `[store.gs]`. Without a service account, the credentials of the instance are used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GsSettings {
    pub endpoint: Option<String>,
    pub service_account_path: Option<PathBuf>,
    #[serde(default)]
    pub allow_http: bool,
}

/// `[store.az]`. Without an access key, the identity of the instance is used.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AzSettings {
    pub endpoint: Option<String>,
    pub account: Option<String>,
    pub access_key: Option<Secret>,
    #[serde(default)]
    pub allow_http: bool,
}

/// `[[store.prefix]]`: the settings of the scheme that `url` has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PrefixSettings {
    pub url: String,
    pub endpoint: Option<String>,
    pub region: Option<String>,
    pub access_key_id: Option<String>,
    pub secret_access_key: Option<Secret>,
    pub session_token: Option<Secret>,
    pub service_account_path: Option<PathBuf>,
    pub account: Option<String>,
    pub access_key: Option<Secret>,
    pub sync: Option<bool>,
    #[serde(default)]
    pub allow_http: bool,
    #[serde(default)]
    pub virtual_hosted: bool,
}

/// A text that is not shown.
#[derive(Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub struct Secret(pub String);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("(secret)")
    }
}

/// Settings for one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settings {
    File(FileSettings),
    S3(S3Settings),
    Gs(GsSettings),
    Az(AzSettings),
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("can't read the configuration {}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "{} is where credentials belong, and others than its owner have access to it (mode {mode:04o}); run: chmod 600 {}",
        path.display(),
        path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    #[error("{} belongs to user {owner}; run: chown root {}", path.display(), path.display())]
    Owner { path: PathBuf, owner: u32 },
    #[error("{} is larger than {CONFIG_BYTES_MAX} bytes", path.display())]
    TooLarge { path: PathBuf },
    // Without the text of the line, which the parser would quote: it may hold a key.
    #[error("{}, line {line}: {message}", path.display())]
    Malformed { path: PathBuf, line: usize, message: String },
    #[error("{} names the prefix {text:?}", path.display())]
    Prefix { path: PathBuf, text: String, source: crate::location::LocationError },
    #[error("{}: {key} of the prefix {prefix} has no meaning for {scheme}:// addresses", path.display())]
    Meaningless { path: PathBuf, prefix: String, key: &'static str, scheme: &'static str },
    #[error("{}: {key} must be between {min} and {max}", path.display())]
    Range { path: PathBuf, key: &'static str, min: u64, max: u64 },
    #[error("{}: mebibytes_max of [store.packs] must be at most {}", path.display(), 1u64 << 20)]
    TooMuch { path: PathBuf },
    #[error("{}: folder of [{table}] must be an absolute path", path.display())]
    Relative { path: PathBuf, table: &'static str },
}

impl NodeConfig {
    /// Reads [`CONFIG_PATH`], or gives the defaults if there is no such file.
    pub fn load() -> Result<NodeConfig, ConfigError> {
        match NodeConfig::load_from(Path::new(CONFIG_PATH)) {
            Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                Ok(NodeConfig::default())
            }
            result => result,
        }
    }

    /// Reads a configuration that must exist.
    pub fn load_from(path: &Path) -> Result<NodeConfig, ConfigError> {
        let text = read_protected(path)?;
        NodeConfig::parse(&text, path)
    }

    /// Parses a configuration; `path` is for messages.
    pub fn parse(text: &str, path: &Path) -> Result<NodeConfig, ConfigError> {
        let config: NodeConfig = toml::from_str(text).map_err(|error: toml::de::Error| {
            let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
            let line = 1 + before.matches('\n').count();
            ConfigError::Malformed {
                path: path.to_owned(),
                line,
                message: error.message().to_owned(),
            }
        })?;
        config.store.check(path)?;
        config.capture.check(path)?;
        Ok(config)
    }
}

/// Reads a file that only its owner, who is root or this process's user, can read or write.
pub fn read_protected(path: &Path) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(failed)?;
    // What is checked is what is read: the open file, not its name.
    let metadata = file.metadata().map_err(failed)?;
    let mode = metadata.mode() & 0o7777;
    if mode & 0o077 != 0 {
        return Err(ConfigError::Exposed { path: path.to_owned(), mode });
    }
    let owner = metadata.uid();
    let ours = std::fs::metadata("/proc/self").map_err(failed)?.uid();
    if owner != 0 && owner != ours {
        return Err(ConfigError::Owner { path: path.to_owned(), owner });
    }
    let mut text = String::new();
    file.by_ref().take(CONFIG_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
    match text.len() as u64 <= CONFIG_BYTES_MAX {
        true => Ok(text),
        false => Err(ConfigError::TooLarge { path: path.to_owned() }),
    }
}

impl StoreConfig {
    fn check(&self, path: &Path) -> Result<(), ConfigError> {
        let parse = |text: &String| {
            let failed =
                |source| ConfigError::Prefix { path: path.to_owned(), text: text.clone(), source };
            Location::parse(text).map_err(failed)
        };
        self.allowed_prefixes.iter().try_for_each(|prefix| parse(prefix).map(drop))?;
        for prefix in &self.prefix {
            let scheme = parse(&prefix.url)?.scheme();
            if let Some(key) = prefix.meaningless(scheme) {
                let (prefix, scheme) = (prefix.url.clone(), scheme.name());
                return Err(ConfigError::Meaningless {
                    path: path.to_owned(),
                    prefix,
                    key,
                    scheme,
                });
            }
        }
        let range = |key, max| ConfigError::Range { path: path.to_owned(), key, min: 1, max };
        if self.timeout_seconds.is_some_and(|seconds| !(1..=3600).contains(&seconds)) {
            return Err(range("timeout_seconds", 3600));
        }
        if self.packs.mebibytes_max.is_some_and(|mebibytes| mebibytes > 1 << 20) {
            return Err(ConfigError::TooMuch { path: path.to_owned() });
        }
        if self.packs.folder.as_ref().is_some_and(|folder| !folder.is_absolute()) {
            return Err(ConfigError::Relative { path: path.to_owned(), table: "store.packs" });
        }
        if self.threads.is_some_and(|threads| !(1..=64).contains(&threads)) {
            return Err(range("threads", 64));
        }
        Ok(())
    }

    /// Whether a container may name this address.
    pub fn allows(&self, location: &Location) -> bool {
        let prefixes =
            self.allowed_prefixes.iter().filter_map(|prefix| Location::parse(prefix).ok());
        prefixes.into_iter().any(|prefix| location.is_under(&prefix))
    }

    /// A call to a store ends within this time.
    pub fn timeout(&self) -> Duration {
        self.timeout_seconds.map_or(TIMEOUT_DEFAULT, Duration::from_secs)
    }

    /// The settings that apply to an address.
    pub fn settings(&self, location: &Location) -> Settings {
        let parsed = self
            .prefix
            .iter()
            .filter_map(|prefix| Some((Location::parse(&prefix.url).ok()?, prefix)));
        let matching = parsed.filter(|(prefix, _)| location.is_under(prefix));
        let longest = matching.max_by_key(|(prefix, _)| prefix.depth());
        match (location.scheme(), longest) {
            (Scheme::File, None) => Settings::File(self.file.clone()),
            (Scheme::S3, None) => Settings::S3(self.s3.clone()),
            (Scheme::Gs, None) => Settings::Gs(self.gs.clone()),
            (Scheme::Az, None) => Settings::Az(self.az.clone()),
            (Scheme::File, Some((_, p))) => {
                Settings::File(FileSettings { sync: p.sync.unwrap_or(true) })
            }
            (Scheme::S3, Some((_, p))) => Settings::S3(S3Settings {
                endpoint: p.endpoint.clone(),
                region: p.region.clone(),
                access_key_id: p.access_key_id.clone(),
                secret_access_key: p.secret_access_key.clone(),
                session_token: p.session_token.clone(),
                allow_http: p.allow_http,
                virtual_hosted: p.virtual_hosted,
            }),
            (Scheme::Gs, Some((_, p))) => Settings::Gs(GsSettings {
                endpoint: p.endpoint.clone(),
                service_account_path: p.service_account_path.clone(),
                allow_http: p.allow_http,
            }),
            (Scheme::Az, Some((_, p))) => Settings::Az(AzSettings {
                endpoint: p.endpoint.clone(),
                account: p.account.clone(),
                access_key: p.access_key.clone(),
                allow_http: p.allow_http,
            }),
        }
    }
}

impl PrefixSettings {
    /// A key that is set although addresses of this scheme don't have it.
    fn meaningless(&self, scheme: Scheme) -> Option<&'static str> {
        use Scheme::{Az, File, Gs, S3};
        let keys: [(&'static str, bool, &[Scheme]); 11] = [
            ("endpoint", self.endpoint.is_some(), &[S3, Gs, Az]),
            ("region", self.region.is_some(), &[S3]),
            ("access_key_id", self.access_key_id.is_some(), &[S3]),
            ("secret_access_key", self.secret_access_key.is_some(), &[S3]),
            ("session_token", self.session_token.is_some(), &[S3]),
            ("service_account_path", self.service_account_path.is_some(), &[Gs]),
            ("account", self.account.is_some(), &[Az]),
            ("access_key", self.access_key.is_some(), &[Az]),
            ("sync", self.sync.is_some(), &[File]),
            ("allow_http", self.allow_http, &[S3, Gs, Az]),
            ("virtual_hosted", self.virtual_hosted, &[S3]),
        ];
        keys.into_iter()
            .find(|(_, set, schemes)| *set && !schemes.contains(&scheme))
            .map(|(key, _, _)| key)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn parse(text: &str) -> Result<NodeConfig, ConfigError> {
        NodeConfig::parse(text, Path::new("config.toml"))
    }

    fn location(text: &str) -> Location {
        Location::parse(text).unwrap()
    }

    #[test]
    fn the_longest_prefix_counts() {
        let config = parse(
            r#"
            [store.s3]
            region = "scheme"
            [[store.prefix]]
            url = "s3://b/x"
            region = "short"
            [[store.prefix]]
            url = "s3://b/x/y"
            region = "long"
            "#,
        )
        .unwrap();
        for (place, region) in
            [("s3://b", "scheme"), ("s3://b/x/z", "short"), ("s3://b/x/y/1", "long")]
        {
            let Settings::S3(settings) = config.store.settings(&location(place)) else { panic!() };
            assert_eq!(settings.region.as_deref(), Some(region));
        }
    }

    #[test]
    fn nothing_is_allowed_unless_listed() {
        assert!(!parse("").unwrap().store.allows(&location("s3://b/x")));
        let config = parse("[store]\nallowed_prefixes = [\"s3://b/jobs\"]").unwrap();
        assert!(config.store.allows(&location("s3://b/jobs/1")));
        assert!(!config.store.allows(&location("s3://b/jobs1")));
    }

    #[test]
    fn mistakes_are_refused() {
        for text in [
            "[store]\nallowed_prefix = []",
            "[stores]",
            "[store]\nallowed_prefixes = [\"jobs\"]",
            "[store]\ntimeout_seconds = 0",
            "[store]\nthreads = 0",
            "[store.packs]\nmebibytes_max = 1048577",
            "[store.packs]\nfolder = \"packs\"",
            "[store.packs]\nbytes_max = 1",
            "[capture]\ncores = 0",
            "[capture]\nbuffers_mebibytes = 63",
            "[capture]\nupload_mebibytes_per_second = 0",
            "[capture]\nfolder = \"slots\"",
            "[capture]\nslots = 1",
            "[[store.prefix]]\nurl = \"gs://b\"\nregion = \"x\"",
            "[[store.prefix]]\nregion = \"x\"",
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mode = |mode| {
            std::fs::set_permissions(file.path(), std::fs::Permissions::from_mode(mode)).unwrap()
        };
        mode(0o640);
        assert!(matches!(
            NodeConfig::load_from(file.path()),
            Err(ConfigError::Exposed { mode: 0o640, .. })
        ));
        mode(0o600);
        assert_eq!(NodeConfig::load_from(file.path()).unwrap(), NodeConfig::default());
    }

    #[test]
    fn secrets_are_not_shown() {
        let config = parse("[store.s3]\nsecret_access_key = \"hush\"").unwrap();
        assert!(!format!("{config:?}").contains("hush"));
        let refused = parse("[store.s3]\nsecret_access_key = \"hush\" x").unwrap_err();
        assert!(!format!("{refused} {refused:?}").contains("hush"));
        assert!(refused.to_string().contains("line 2"));
    }
}
