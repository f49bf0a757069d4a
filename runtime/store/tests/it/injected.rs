//! A store's client whose calls wait, fail, or fail to tell that they were carried out, as a test decides.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt as _, StreamExt as _};
use object_store::path::Path;
use object_store::{
    CopyOptions, Error, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt as _, PutMultipartOptions, PutOptions, PutPayload, PutResult,
    Result,
};

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// It is carried out after this time.
    After(Duration),
    /// It is not carried out, and fails.
    Lost,
    /// It is carried out, and its answer is lost.
    Unanswered,
    /// It fails now, and is carried out after this time all the same. For deletions.
    Late(Duration),
}

pub(crate) const NOW: Fate = Fate::After(Duration::ZERO);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Put,
    Create,
    Get,
    Delete,
    /// A deletion is about to be carried out, at once or late. What becomes of it has been decided.
    Deleting,
    List,
}

pub(crate) type Decide = Arc<dyn Fn(Call, &str) -> Fate + Send + Sync>;

#[derive(Clone)]
pub(crate) struct Injected {
    inner: Arc<dyn ObjectStore>,
    decide: Decide,
}

impl Injected {
    pub(crate) fn wrap(inner: Arc<dyn ObjectStore>, decide: Decide) -> Arc<dyn ObjectStore> {
        Arc::new(Injected { inner, decide })
    }

    async fn call<T>(
        &self,
        call: Call,
        path: &Path,
        work: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        meet((self.decide)(call, path.as_ref()), work).await
    }

    async fn delete(self, path: Path) -> Result<Path> {
        let fate = (self.decide)(Call::Delete, path.as_ref());
        if let Fate::Late(wait) = fate {
            tokio::spawn(async move {
                tokio::time::sleep(wait).await;
                let _ = self.carry_out(&path).await;
            });
            return Err(failed());
        }
        meet(fate, self.carry_out(&path)).await?;
        Ok(path)
    }

    async fn carry_out(&self, path: &Path) -> Result<()> {
        (self.decide)(Call::Deleting, path.as_ref());
        self.inner.delete(path).await
    }
}

async fn meet<T>(fate: Fate, work: impl Future<Output = Result<T>>) -> Result<T> {
    match fate {
        Fate::After(Duration::ZERO) => work.await,
        Fate::After(wait) => {
            tokio::time::sleep(wait).await;
            work.await
        }
        Fate::Lost | Fate::Late(_) => Err(failed()),
        Fate::Unanswered => work.await.and_then(|_| Err(failed())),
    }
}

fn failed() -> Error {
    Error::Generic { store: "injected", source: "the test wants it so".into() }
}

impl fmt::Debug for Injected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Injected({:?})", self.inner)
    }
}

impl fmt::Display for Injected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Injected({})", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Injected {
    async fn put_opts(
        &self,
        path: &Path,
        payload: PutPayload,
        options: PutOptions,
    ) -> Result<PutResult> {
        let call = match options.mode {
            object_store::PutMode::Create => Call::Create,
            _ => Call::Put,
        };
        self.call(call, path, self.inner.put_opts(path, payload, options)).await
    }

    async fn put_multipart_opts(
        &self,
        path: &Path,
        options: PutMultipartOptions,
    ) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(path, options).await
    }

    async fn get_opts(&self, path: &Path, options: GetOptions) -> Result<GetResult> {
        self.call(Call::Get, path, self.inner.get_opts(path, options)).await
    }

    fn delete_stream(
        &self,
        paths: BoxStream<'static, Result<Path>>,
    ) -> BoxStream<'static, Result<Path>> {
        let this = self.clone();
        paths
            .then(move |path| {
                let this = this.clone();
                async move { this.delete(path?).await }.boxed()
            })
            .boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let (this, prefix) = (self.clone(), prefix.cloned());
        let begun = async move {
            let root = Path::default();
            let nothing = async { Ok(()) };
            match this.call(Call::List, prefix.as_ref().unwrap_or(&root), nothing).await {
                Ok(()) => this.inner.list(prefix.as_ref()),
                Err(error) => futures::stream::once(async { Err(error) }).boxed(),
            }
        };
        begun.flatten_stream().boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}
