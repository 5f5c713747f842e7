//! Stores that are not fit for checkpoints are found out by the self-test and refused with the reason.
#![allow(clippy::unwrap_used)]

mod common;

use async_trait::async_trait;
use common::writer;
use futures::StreamExt;
use futures::stream::BoxStream;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, ListResult, MultipartUpload, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode,
    PutMultipartOptions, PutOptions, PutPayload, PutResult, Result,
};
use std::fmt;
use std::sync::Arc;
use tarazed_store::{CheckpointStore, StoreError};

#[derive(Clone, Copy, PartialEq, Debug)]
enum Flaw {
    None,
    IgnoresConditions,
    ChecksThenWrites,
    NoConditions,
    ListsLate,
    KeepsDeleted,
    RefusesAccess,
    /// What was just written is not there yet.
    ReadsLate,
}

#[derive(Debug)]
struct Flawed {
    inner: InMemory,
    flaw: Flaw,
}

impl fmt::Display for Flawed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.flaw)
    }
}

#[async_trait]
impl ObjectStore for Flawed {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        match (self.flaw, &opts.mode) {
            (Flaw::RefusesAccess, _) => Err(object_store::Error::PermissionDenied {
                path: location.to_string(),
                source: "403 AccessDenied".into(),
            }),
            (Flaw::NoConditions, PutMode::Create) => Err(object_store::Error::NotImplemented {
                operation: "create".into(),
                implementer: "flawed".into(),
            }),
            (Flaw::IgnoresConditions, _) => self.inner.put(location, payload).await,
            (Flaw::ChecksThenWrites, PutMode::Create) => {
                if self.inner.head(location).await.is_ok() {
                    return self.inner.put_opts(location, payload, opts).await;
                }
                tokio::task::yield_now().await;
                self.inner.put(location, payload).await
            }
            _ => self.inner.put_opts(location, payload, opts).await,
        }
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        self.inner.put_multipart_opts(location, opts).await
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        match self.flaw {
            Flaw::ReadsLate => Err(object_store::Error::NotFound {
                path: location.to_string(),
                source: "not yet".into(),
            }),
            _ => self.inner.get_opts(location, options).await,
        }
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        if self.flaw == Flaw::KeepsDeleted {
            locations
        } else {
            self.inner.delete_stream(locations)
        }
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        if self.flaw == Flaw::ListsLate {
            futures::stream::empty().boxed()
        } else {
            self.inner.list(prefix)
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[tokio::test]
async fn an_unfit_store_is_refused_with_the_reason() {
    let expected = [
        (Flaw::None, None),
        (Flaw::IgnoresConditions, Some("ignores conditional writes")),
        (Flaw::ChecksThenWrites, Some("concurrent creates of one object won")),
        (Flaw::NoConditions, Some("does not offer conditional writes")),
        (Flaw::ListsLate, Some("lists 0 of 4 objects")),
        (Flaw::ReadsLate, Some("an object just written cannot be read")),
        (Flaw::KeepsDeleted, Some("still listed")),
        (Flaw::RefusesAccess, Some("403 AccessDenied")),
    ];
    for (flaw, reason) in expected {
        let objects = Arc::new(Flawed {
            inner: InMemory::new(),
            flaw,
        });
        let outcome = CheckpointStore::with_object_store(objects, "run", writer(1))
            .self_test()
            .await;
        match reason {
            None => outcome.unwrap(),
            Some(reason) => {
                let error = outcome.unwrap_err();
                assert!(matches!(error, StoreError::Reconfigure { .. }), "{flaw:?}: {error}");
                assert!(error.to_string().contains(reason), "{flaw:?}: {error}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_folder_is_fit_also_when_several_processes_test_it_at_once() {
    let folder = tempfile::tempdir().unwrap();
    let mut tests = tokio::task::JoinSet::new();
    for number in 0..8 {
        let location = folder.path().join("new/store").to_str().unwrap().to_string();
        tests.spawn(async move {
            CheckpointStore::open(&location, writer(number))
                .await?
                .self_test()
                .await
        });
    }
    for outcome in tests.join_all().await {
        outcome.unwrap();
    }
}
