//! Listings that are older than what is there: a store that shows them is refused by its self-test, and one that begins to later costs
//! time and no checkpoint.
#![allow(clippy::unwrap_used)]

mod common;

use async_trait::async_trait;
use common::{checkpoint, restore, upload, writer};
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt};
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, PutMultipartOptions,
    PutOptions, PutPayload, PutResult, Result,
};
use std::fmt;
use std::sync::Arc;
use tarazed_domain::Generation;
use tarazed_store::{CheckpointStore, Depth, Retention, Select, StoreError};

/// A store whose listings show what was there at one moment, for ever.
#[derive(Debug)]
struct Stale {
    inner: Arc<dyn ObjectStore>,
    listed: Vec<ObjectMeta>,
}

impl Stale {
    /// As it is now.
    async fn at_this_moment(inner: &Arc<dyn ObjectStore>) -> Arc<Self> {
        Arc::new(Self {
            inner: inner.clone(),
            listed: inner.list(None).try_collect().await.unwrap(),
        })
    }
}

impl fmt::Display for Stale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "stale {}", self.inner)
    }
}

#[async_trait]
impl ObjectStore for Stale {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        self.inner.put_opts(location, payload, opts).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        self.inner.get_opts(location, options).await
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        self.inner.delete_stream(locations)
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        let within = |meta: &&ObjectMeta| prefix.is_none_or(|prefix| meta.location.prefix_matches(prefix));
        let listed: Vec<_> = self.listed.iter().filter(within).cloned().map(Ok).collect();
        futures::stream::iter(listed).boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// CKPT-2, CKPT-3, CKPT-4: whoever claims by a listing that lacks the newest records finds their places taken, one after the other. From
/// then on he knows of them and of his own claim, whatever listings say: he restores what was acknowledged last, commits behind it and
/// collects nothing of it, and whoever was there before is fenced.
#[tokio::test]
async fn a_claim_sees_through_listings_that_are_old() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let first = CheckpointStore::with_object_store(objects.clone(), "", writer(1));
    let old = first.claim(Generation(0)).await.unwrap();
    checkpoint(&first, &old, 10).await;
    let stale = Stale::at_this_moment(&objects).await;
    for step in [20, 30] {
        checkpoint(&first, &old, step).await;
    }
    let pending = upload(&first, 40, old.generation).await;

    let second = CheckpointStore::with_object_store(stale, "", writer(2));
    let fence = second.claim(Generation(0)).await.unwrap();
    assert!(
        fence.sequence == old.sequence + 4 && fence.generation > old.generation,
        "{fence:?}"
    );
    assert_eq!(restore(&second).await.unwrap(), Some(30));
    let fenced = first.commit(&old, &pending).await;
    assert!(matches!(fenced, Err(StoreError::Fenced { .. })), "{fenced:?}");
    checkpoint(&second, &fence, 40).await;
    // Checkpoints whose shards no listing shows count for nothing, so more is kept than was asked for.
    let collected = second.gc(&fence, Retention::last(2)).await.unwrap();
    assert!(
        collected.retired.is_empty() && collected.deleted_objects == 0,
        "{collected:?}"
    );
    assert_eq!(restore(&second).await.unwrap(), Some(40));

    let clean = CheckpointStore::with_object_store(objects, "", writer(3));
    let report = clean.verify(Select::All, Depth::Full).await.unwrap();
    assert!(report.is_clean() && report.checkpoints.len() == 4, "{report:?}");
    assert_eq!(restore(&clean).await.unwrap(), Some(40));
}

/// A self-test refuses it before anything rests on it.
#[tokio::test]
async fn old_listings_are_refused_at_the_start() {
    let objects: Arc<dyn ObjectStore> = Arc::new(InMemory::new());
    let stale = Stale::at_this_moment(&objects).await;
    let tested = CheckpointStore::with_object_store(stale, "", writer(1))
        .self_test()
        .await;
    assert!(matches!(tested, Err(StoreError::Reconfigure { .. })), "{tested:?}");
}
