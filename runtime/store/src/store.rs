//! One place in an object store, with calls that end.
//!
//! Every call has the same bound in time, retries included, and every object that is read has a bound in size. Errors
//! say what was attempted on what, and what the reader can do about it.

use std::fmt;
use std::io::Read as _;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _};
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path as ObjectPath;
use object_store::{
    BackoffConfig, ClientOptions, GetResultPayload, ObjectMeta, ObjectStore, ObjectStoreExt as _,
    PutMode, PutOptions, PutPayload, RetryConfig,
};
use samara_capsule::digest::Digest;
use samara_capsule::manifest::BlobRef;
use tokio::runtime::{Handle, Runtime};

use crate::config::{PacksSettings, Settings, StoreConfig};
use crate::local_packs::LocalPacks;
use crate::location::Location;
use crate::pace::{Share, THREADS_MAX};

/// A connection that takes longer than this is not made. Half of a slow handshake across a continent.
const CONNECT_SECONDS_MAX: u64 = 10;

/// A call is tried this often at most. The bound in time comes first as a rule.
const RETRIES_MAX: usize = 6;

/// Threads for calls to the local file system and for hashing what is uploaded.
const BLOCKING_THREADS_MAX: usize = 8;

/// Objects that one listing returns at most.
pub const LISTING_MAX: usize = 1_000_000;

/// A place in a store. Clones share connections.
#[derive(Clone)]
pub struct Store {
    inner: Arc<Inner>,
    /// What ends the threads with the last of those that have it. None where they run themselves.
    threads: Option<Arc<Threads>>,
}

#[derive(Clone)]
struct Inner {
    runtime: Handle,
    objects: Arc<dyn ObjectStore>,
    prefix: ObjectPath,
    location: Location,
    timeout: Duration,
    threads: usize,
    share: Share,
    packs: PacksSettings,
}

/// The runtime is always there; it is taken out when dropped. Its threads have ended then, which a caller that forks needs, but for
/// those that wait for a call that hangs.
struct Threads(Option<Runtime>);

impl Drop for Threads {
    fn drop(&mut self) {
        /// Threads without a call end in less than a millisecond. One that writes a file removes it where nobody wants it any
        /// more, which takes longer on a busy machine.
        const END_MAX: Duration = Duration::from_secs(5);
        let Some(runtime) = self.0.take() else { return };
        // One of its own threads, which finished what nobody waited for, can't wait for itself.
        match Handle::try_current() {
            Ok(_) => runtime.shutdown_background(),
            Err(_) => runtime.shutdown_timeout(END_MAX),
        }
    }
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({})", self.inner.location)
    }
}

/// An object of a listing.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    pub(crate) name: String,
    pub(crate) bytes: u64,
    /// When it was written, by the store's clock.
    pub(crate) modified: SystemTime,
}

/// Why a call to a store failed.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("can't set up {location}; check [store] in the node's configuration")]
    Settings { location: Location, source: Cause },
    #[error("can't use the folder {location}")]
    Folder { location: Location, source: std::io::Error },
    #[error("can't start the threads that talk to the store")]
    Threads { source: std::io::Error },
    #[error(
        "can't {action} {object}: the store did not answer within {seconds} s; check its address and the network, or raise timeout_seconds in the node's configuration"
    )]
    Stalled { action: &'static str, object: String, seconds: u64 },
    #[error(
        "can't {action} {object}: the store can't be reached; check its address (endpoint in the node's configuration) and the network"
    )]
    Unreachable { action: &'static str, object: String, source: Cause },
    #[error("{object} is not there")]
    NotFound { object: String },
    #[error("can't {action} {object}: there is no such bucket; create it, or check the address")]
    NoBucket { action: &'static str, object: String },
    #[error(
        "can't {action} {object}: the store refuses the credentials; check the keys for this address in the node's configuration"
    )]
    Denied { action: &'static str, object: String, source: Cause },
    #[error("{object} exists already")]
    Exists { object: String },
    #[error("{object} has {bytes} bytes, of at most {bytes_max}")]
    TooLarge { object: String, bytes: u64, bytes_max: u64 },
    #[error("{object} is damaged: its content has the digest {found}")]
    Damaged { object: String, found: Digest },
    #[error("{object} is damaged: it has {found} bytes instead of {expected}")]
    Length { object: String, found: u64, expected: u64 },
    #[error("{location} holds more than {LISTING_MAX} objects")]
    Crowded { location: Location },
    #[error("can't {action} {object}")]
    Failed { action: &'static str, object: String, source: Cause },
    #[error("there is no randomness to be had from the system")]
    Random,
}

/// What a store or the network said, in one line.
///
/// The errors of `object_store` repeat their causes in their own text, and S3's answers are XML.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub struct Cause {
    text: String,
}

/// A cause is shortened to this many characters.
const CAUSE_CHARS_MAX: usize = 400;

impl Cause {
    fn of(whole: &object_store::Error) -> Cause {
        let mut innermost: &dyn std::error::Error = whole;
        while let Some(source) = innermost.source() {
            innermost = source;
        }
        let text = innermost.to_string();
        let element = |name: &str| {
            let (_, rest) = text.split_once(&format!("<{name}>"))?;
            rest.split_once(&format!("</{name}>")).map(|(value, _)| value.to_owned())
        };
        let text = match (element("Code"), element("Message")) {
            (Some(code), Some(message)) => format!("{code}: {message}"),
            _ => text.split_whitespace().collect::<Vec<_>>().join(" "),
        };
        Cause { text: text.chars().take(CAUSE_CHARS_MAX).collect() }
    }
}

impl Store {
    /// Prepares access to a place. Nothing is fetched or written, except that the folder of a `file://` address is made
    /// (for its owner only) if `create` is set; without it, a missing folder is an error.
    pub fn open(
        location: &Location,
        config: &StoreConfig,
        create: bool,
    ) -> Result<Store, StoreError> {
        Store::open_through(location, config, create, |objects| objects)
    }

    /// As [`Store::open`], by way of what `wrap` makes of the store's client: for tests, which make calls fail and wait.
    #[doc(hidden)]
    pub fn open_through(
        location: &Location,
        config: &StoreConfig,
        create: bool,
        wrap: impl FnOnce(Arc<dyn ObjectStore>) -> Arc<dyn ObjectStore>,
    ) -> Result<Store, StoreError> {
        let timeout = config.timeout();
        let settings = config.settings(location);
        let objects = wrap(connect(location, &settings, timeout, create)?);
        let prefix = match location.as_folder() {
            Some(_) => ObjectPath::default(),
            None => ObjectPath::from(location.path()),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .max_blocking_threads(BLOCKING_THREADS_MAX)
            .thread_name("samara-store")
            .enable_all()
            .build()
            .map_err(|source| StoreError::Threads { source })?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = config.threads.unwrap_or(cores).clamp(1, THREADS_MAX);
        let share = Share { threads, ..Share::WHOLE };
        let location = location.clone();
        let handle = runtime.handle().clone();
        let packs = config.packs.clone();
        let inner =
            Inner { runtime: handle, objects, prefix, location, timeout, threads, share, packs };
        Ok(Store { inner: Arc::new(inner), threads: Some(Arc::new(Threads(Some(runtime)))) })
    }

    /// A place under this one, which shares its connections. `parts` come from a listing of this place.
    pub(crate) fn at(&self, parts: &[String]) -> Store {
        let prefix =
            parts.iter().fold(self.inner.prefix.clone(), |parent, part| parent.join(part.as_str()));
        let inner = Inner {
            runtime: self.inner.runtime.clone(),
            objects: self.inner.objects.clone(),
            prefix,
            location: self.inner.location.join(parts.iter().cloned()),
            timeout: self.inner.timeout,
            threads: self.inner.threads,
            share: self.inner.share,
            packs: self.inner.packs.clone(),
        };
        Store { inner: Arc::new(inner), threads: self.threads.clone() }
    }

    /// The same place for writers that begin with this much of the node.
    #[must_use]
    pub fn with_share(&self, share: Share) -> Store {
        let inner = Inner { share, ..(*self.inner).clone() };
        Store { inner: Arc::new(inner), threads: self.threads.clone() }
    }

    /// The place for a task on the store's own threads. They end with the callers' clones, and their tasks with them; a task that
    /// outlived those could not wait for the threads, of which it runs on one.
    pub(crate) fn for_task(&self) -> Store {
        Store { inner: self.inner.clone(), threads: None }
    }

    /// The place.
    pub fn location(&self) -> &Location {
        &self.inner.location
    }

    /// Packs of this place that lie on this node.
    pub(crate) fn local_packs(&self) -> LocalPacks {
        LocalPacks::of(&self.inner.location, &self.inner.packs)
    }

    /// Threads that compress or decompress.
    pub(crate) fn threads(&self) -> usize {
        self.inner.threads
    }

    /// What a writer begins with.
    pub(crate) fn share(&self) -> Share {
        self.inner.share
    }

    pub(crate) fn handle(&self) -> &Handle {
        &self.inner.runtime
    }

    /// Runs a future to its end. Only for threads that are not the runtime's own.
    pub(crate) fn block_on<F: Future>(&self, future: F) -> F::Output {
        self.handle().block_on(future)
    }

    pub(crate) fn describe(&self, path: &str) -> String {
        match path {
            "" => self.inner.location.to_string(),
            path => format!("{}/{path}", self.inner.location),
        }
    }

    fn path(&self, path: &str) -> ObjectPath {
        let parts = path.split('/').filter(|part| !part.is_empty());
        parts.fold(self.inner.prefix.clone(), |parent, part| parent.join(part))
    }

    async fn bounded<T>(
        &self,
        action: &'static str,
        path: &str,
        call: impl Future<Output = object_store::Result<T>>,
    ) -> Result<T, StoreError> {
        let object = || self.describe(path);
        match tokio::time::timeout(self.inner.timeout, call).await {
            Ok(Ok(value)) => Ok(value),
            Ok(Err(source)) => Err(sort(action, object(), source, self.inner.timeout)),
            Err(_) => Err(StoreError::Stalled {
                action,
                object: object(),
                seconds: self.inner.timeout.as_secs(),
            }),
        }
    }

    /// Writes an object whose name is derived from its content.
    pub(crate) async fn put(&self, path: &str, content: Bytes) -> Result<(), StoreError> {
        let target = self.path(path);
        self.bounded(
            "write",
            path,
            self.inner.objects.put(&target, PutPayload::from_bytes(content)),
        )
        .await?;
        Ok(())
    }

    /// Writes an object unless there is one of that name: [`StoreError::Exists`].
    ///
    /// After any other error it may or may not have been written.
    pub(crate) async fn create(&self, path: &str, content: Bytes) -> Result<(), StoreError> {
        let target = self.path(path);
        let options = PutOptions::from(PutMode::Create);
        let call = self.inner.objects.put_opts(&target, PutPayload::from_bytes(content), options);
        self.bounded("write", path, call).await?;
        Ok(())
    }

    /// Reads an object of at most `bytes_max` bytes.
    pub(crate) async fn get(&self, path: &str, bytes_max: usize) -> Result<Vec<u8>, StoreError> {
        self.get_into(path, bytes_max, Vec::new()).await
    }

    /// Like [`Store::get`], into the memory of `content`, which must be empty.
    async fn get_into(
        &self,
        path: &str,
        bytes_max: usize,
        mut content: Vec<u8>,
    ) -> Result<Vec<u8>, StoreError> {
        let source = self.path(path);
        let too_large = |bytes| StoreError::TooLarge {
            object: self.describe(path),
            bytes,
            bytes_max: bytes_max as u64,
        };
        let call = async {
            let result = self.inner.objects.get(&source).await?;
            let announced = result.meta.size;
            if announced > bytes_max as u64 {
                return Ok(Err(announced));
            }
            content.reserve_exact(usize::try_from(announced).unwrap_or(0));
            match result.payload {
                GetResultPayload::File(file, _) => {
                    let read = tokio::task::spawn_blocking(move || {
                        std::io::Read::take(file, bytes_max as u64 + 1)
                            .read_to_end(&mut content)
                            .map(|_| content)
                    });
                    let failed = |source: Box<dyn std::error::Error + Send + Sync>| {
                        object_store::Error::Generic { store: "LocalFileSystem", source }
                    };
                    content =
                        read.await.map_err(|e| failed(e.into()))?.map_err(|e| failed(e.into()))?;
                }
                GetResultPayload::Stream(mut stream) => {
                    // The announced size is only a claim.
                    while let Some(piece) = stream.try_next().await? {
                        if piece.len() > bytes_max - content.len() {
                            return Ok(Err((content.len() + piece.len()) as u64));
                        }
                        content.extend_from_slice(&piece);
                    }
                }
            }
            match content.len() <= bytes_max {
                true => Ok(Ok(content)),
                false => Ok(Err(content.len() as u64)),
            }
        };
        self.bounded("read", path, call).await?.map_err(too_large)
    }

    /// Reads parts of an object, each no longer than what the caller has memory for. A part that lies outside of the object
    /// comes back shorter than asked for, or is an error.
    pub(crate) async fn get_parts(
        &self,
        path: &str,
        parts: &[Range<u64>],
    ) -> Result<Vec<Bytes>, StoreError> {
        let source = self.path(path);
        self.bounded("read", path, self.inner.objects.get_ranges(&source, parts)).await
    }

    /// Whether there is an object of that name.
    pub(crate) async fn exists(&self, path: &str) -> Result<bool, StoreError> {
        let target = self.path(path);
        match self.bounded("look up", path, self.inner.objects.head(&target)).await {
            Ok(_) => Ok(true),
            Err(StoreError::NotFound { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Removes an object. One that is not there counts as removed.
    pub(crate) async fn delete(&self, path: &str) -> Result<(), StoreError> {
        let target = self.path(path);
        match self.bounded("remove", path, self.inner.objects.delete(&target)).await {
            Ok(()) | Err(StoreError::NotFound { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Names and sizes of all objects under `path`, at most [`LISTING_MAX`], in no promised order. Names count from `path`.
    pub(crate) async fn list(&self, path: &str) -> Result<Vec<(String, u64)>, StoreError> {
        let listed = self.list_dated(path).await?;
        Ok(listed.into_iter().map(|object| (object.name, object.bytes)).collect())
    }

    /// As [`Store::list`], with when they were written.
    pub(crate) async fn list_dated(&self, path: &str) -> Result<Vec<Listed>, StoreError> {
        let folder = self.path(path);
        let mut stream = self.inner.objects.list(Some(&folder)).chunks(1000);
        let mut found = Vec::new();
        // The bound in time is for each thousand: a large folder is not a stalled one.
        loop {
            let page = self
                .bounded("list", path, async { stream.next().await.map(sorted_page).transpose() })
                .await?;
            let Some(page) = page else { return Ok(found) };
            for object in page {
                let name: Vec<_> =
                    object.location.prefix_match(&folder).into_iter().flatten().collect();
                let name: Vec<&str> = name.iter().map(AsRef::as_ref).collect();
                found.push(Listed {
                    name: name.join("/"),
                    bytes: object.size,
                    modified: object.last_modified.into(),
                });
            }
            if found.len() > LISTING_MAX {
                return Err(StoreError::Crowded { location: self.inner.location.clone() });
            }
        }
    }

    /// Names of the folders directly under `path`, and of the objects.
    pub(crate) async fn list_folder(
        &self,
        path: &str,
    ) -> Result<(Vec<String>, Vec<String>), StoreError> {
        let folder = self.path(path);
        let listing = self
            .bounded("list", path, self.inner.objects.list_with_delimiter(Some(&folder)))
            .await?;
        let last =
            |path: &ObjectPath| path.parts().next_back().map(|part| part.as_ref().to_owned());
        let folders = listing.common_prefixes.iter().filter_map(last).collect();
        let objects = listing.objects.iter().filter_map(|object| last(&object.location)).collect();
        Ok((folders, objects))
    }
}

fn sorted_page(
    page: Vec<object_store::Result<ObjectMeta>>,
) -> object_store::Result<Vec<ObjectMeta>> {
    page.into_iter().collect()
}

fn connect(
    location: &Location,
    settings: &Settings,
    timeout: Duration,
    create: bool,
) -> Result<Arc<dyn ObjectStore>, StoreError> {
    // One attempt may take half of the time, so that a lost connection is followed by another attempt.
    let attempt = timeout / 2;
    let connect = attempt.min(Duration::from_secs(CONNECT_SECONDS_MAX));
    let options = |allow_http| {
        ClientOptions::new()
            .with_timeout(attempt)
            .with_connect_timeout(connect)
            .with_allow_http(allow_http)
            .with_user_agent(
                concat!("samara/", env!("CARGO_PKG_VERSION"))
                    .parse()
                    .expect("a version is a valid header value"),
            )
    };
    let retry = || RetryConfig {
        backoff: BackoffConfig::default(),
        max_retries: RETRIES_MAX,
        retry_timeout: timeout,
    };
    let failed =
        |error| StoreError::Settings { location: location.clone(), source: Cause::of(&error) };
    Ok(match settings {
        Settings::File(settings) => {
            let folder = location.as_folder().expect("file settings belong to file addresses");
            let unusable = |source| StoreError::Folder { location: location.clone(), source };
            if create {
                use std::os::unix::fs::DirBuilderExt as _;
                std::fs::DirBuilder::new()
                    .recursive(true)
                    .mode(0o700)
                    .create(&folder)
                    .map_err(unusable)?;
            }
            match std::fs::metadata(&folder) {
                Ok(found) if found.is_dir() => {}
                Ok(_) => return Err(unusable(std::io::ErrorKind::NotADirectory.into())),
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                    return Err(StoreError::NotFound { object: location.to_string() });
                }
                Err(error) => return Err(unusable(error)),
            }
            let store = LocalFileSystem::new_with_prefix(folder).map_err(failed)?;
            Arc::new(store.with_fsync(settings.sync).with_automatic_cleanup(true))
        }
        Settings::S3(settings) => {
            let mut builder = AmazonS3Builder::new()
                .with_bucket_name(location.bucket())
                .with_client_options(options(settings.allow_http))
                .with_retry(retry())
                .with_virtual_hosted_style_request(settings.virtual_hosted)
                // TLS protects what is on the way; without it, the signature does. Hashing once more costs a core
                // about 0.6 s a GB.
                .with_unsigned_payload(!settings.allow_http);
            if let Some(endpoint) = &settings.endpoint {
                builder = builder.with_endpoint(endpoint);
            }
            builder = builder.with_region(settings.region.as_deref().unwrap_or("us-east-1"));
            if let Some(key) = &settings.access_key_id {
                builder = builder.with_access_key_id(key);
            }
            if let Some(secret) = &settings.secret_access_key {
                builder = builder.with_secret_access_key(&secret.0);
            }
            if let Some(token) = &settings.session_token {
                builder = builder.with_token(&token.0);
            }
            Arc::new(builder.build().map_err(failed)?)
        }
        Settings::Gs(settings) => {
            let mut builder = GoogleCloudStorageBuilder::new()
                .with_bucket_name(location.bucket())
                .with_client_options(options(settings.allow_http))
                .with_retry(retry());
            if let Some(path) = &settings.service_account_path {
                builder = builder.with_service_account_path(path.display().to_string());
            }
            if let Some(endpoint) = &settings.endpoint {
                builder = builder.with_base_url(endpoint);
            }
            Arc::new(builder.build().map_err(failed)?)
        }
        Settings::Az(settings) => {
            let mut builder = MicrosoftAzureBuilder::new()
                .with_container_name(location.bucket())
                .with_client_options(options(settings.allow_http))
                .with_retry(retry());
            if let Some(account) = &settings.account {
                builder = builder.with_account(account);
            }
            if let Some(key) = &settings.access_key {
                builder = builder.with_access_key(&key.0);
            }
            if let Some(endpoint) = &settings.endpoint {
                builder = builder.with_endpoint(endpoint.clone());
            }
            Arc::new(builder.build().map_err(failed)?)
        }
    })
}

/// Sorts an error by what its reader should do.
fn sort(
    action: &'static str,
    object: String,
    source: object_store::Error,
    timeout: Duration,
) -> StoreError {
    // The crate tells a missing bucket from a missing object, a time-out from other failures, and for lists even refused
    // credentials, only in its text.
    let text = format!("{source:?}");
    let says = |words: &[&str]| words.iter().any(|word| text.contains(word));
    let cause = Cause::of(&source);
    match source {
        _ if says(&["NoSuchBucket", "ContainerNotFound"]) => {
            StoreError::NoBucket { action, object }
        }
        object_store::Error::NotFound { .. } => StoreError::NotFound { object },
        object_store::Error::AlreadyExists { .. } | object_store::Error::Precondition { .. } => {
            StoreError::Exists { object }
        }
        object_store::Error::PermissionDenied { .. }
        | object_store::Error::Unauthenticated { .. } => {
            StoreError::Denied { action, object, source: cause }
        }
        _ if says(&["403 Forbidden", "401 Unauthorized", "status: 403", "status: 401"]) => {
            StoreError::Denied { action, object, source: cause }
        }
        _ if says(&["TimedOut", "kind: Timeout"]) => {
            StoreError::Stalled { action, object, seconds: timeout.as_secs() }
        }
        _ if says(&["kind: Connect"]) => StoreError::Unreachable { action, object, source: cause },
        _ => StoreError::Failed { action, object, source: cause },
    }
}

/// Path of the blob with this digest.
pub(crate) fn blob_path(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

impl Store {
    /// Reads a blob and checks length and digest.
    pub(crate) async fn get_blob(&self, blob: BlobRef) -> Result<Vec<u8>, StoreError> {
        let content = self.get_blob_unchecked(blob, Vec::new()).await?;
        self.check_blob(blob, &content)?;
        Ok(content)
    }

    /// Reads a blob into the memory of `buffer`, which must be empty. Its length is checked, its digest is not:
    /// [`Store::check_blob`] does that on any thread.
    pub(crate) async fn get_blob_unchecked(
        &self,
        blob: BlobRef,
        buffer: Vec<u8>,
    ) -> Result<Vec<u8>, StoreError> {
        let path = blob_path(&blob.digest);
        let expected =
            usize::try_from(blob.bytes).expect("the size of a blob was bounded when it was read");
        let content = match self.get_into(&path, expected, buffer).await {
            Err(StoreError::TooLarge { object, bytes, .. }) => {
                return Err(StoreError::Length { object, found: bytes, expected: blob.bytes });
            }
            result => result?,
        };
        match content.len() == expected {
            true => Ok(content),
            false => {
                let object = self.describe(&path);
                Err(StoreError::Length {
                    object,
                    found: content.len() as u64,
                    expected: blob.bytes,
                })
            }
        }
    }

    /// Checks the content of a blob against its digest.
    pub(crate) fn check_blob(&self, blob: BlobRef, content: &[u8]) -> Result<(), StoreError> {
        let found = Digest::of(content);
        match found == blob.digest {
            true => Ok(()),
            false => {
                Err(StoreError::Damaged { object: self.describe(&blob_path(&blob.digest)), found })
            }
        }
    }
}
