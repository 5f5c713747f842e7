//! The handle, and the few operations on objects that all the rest is made of: each bounded in time, each error sorted.

use crate::chain::CachedLink;
use crate::error::{Redactor, StoreError};
use crate::keys;
use crate::limits::{OPERATION_TIMEOUT_MS, PART_BYTES, SMALL_REQUESTS_IN_FLIGHT_MAX, UPLOADS_IN_FLIGHT_MAX};
use crate::location::{self, IfAbsent, Place};
use crate::writer::WriterId;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use object_store::path::Path;
use object_store::{ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, PutPayload};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::future::Future;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// A store of checkpoints. Cheap to clone; all clones are one writer.
#[derive(Clone)]
pub struct CheckpointStore {
    inner: Arc<Inner>,
}

struct Inner {
    objects: Arc<dyn ObjectStore>,
    root: Path,
    writer: WriterId,
    redactor: Redactor,
    folder: Option<PathBuf>,
    uploads: AtomicU64,
    stored_bytes: AtomicU64,
    /// One for each part that may be on its way.
    upload_permits: Arc<Semaphore>,
    /// Bytes of a part, and of an object that goes up whole.
    part_bytes: u64,
    /// Records read before; they never change, so each is read once as long as its listing looks the same.
    records: Mutex<HashMap<u64, CachedLink>>,
    /// Places where a create of ours failed and may have left its record all the same: in a folder, not on the disk yet.
    doubtful: Mutex<BTreeSet<u64>>,
}

/// An operation's answer, if it comes within [`OPERATION_TIMEOUT_MS`].
pub(crate) async fn in_time<T>(operation: impl Future<Output = Result<T, object_store::Error>>) -> Result<T, Failure> {
    match tokio::time::timeout(Duration::from_millis(OPERATION_TIMEOUT_MS), operation).await {
        Ok(result) => result.map_err(Failure::Store),
        Err(_) => Err(Failure::TimedOut),
    }
}

/// Why an operation on an object failed.
pub(crate) enum Failure {
    Store(object_store::Error),
    TimedOut,
}

impl fmt::Debug for CheckpointStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CheckpointStore")
            .field("location", &self.location())
            .field("writer", &self.writer())
            .finish_non_exhaustive()
    }
}

impl CheckpointStore {
    /// Opens the store at a folder (made if absent) or URL: `file://`, and with the features of the same names `s3://`,
    /// `gs://`, `az://`. Credentials, region and endpoint come from the environment. Does not talk to a remote store
    /// yet: [`Self::self_test`] does.
    ///
    /// # Errors
    /// [`StoreError::Reconfigure`] if the location cannot be a store.
    pub async fn open(location: &str, writer: WriterId) -> Result<Self, StoreError> {
        Ok(Self::at(location::open(location, IfAbsent::Create).await?, writer))
    }

    /// Opens a store that must be there, for commands that only read.
    ///
    /// # Errors
    /// [`StoreError::NotFound`] if the folder is not there; else as [`Self::open`].
    pub async fn open_existing(location: &str, writer: WriterId) -> Result<Self, StoreError> {
        Ok(Self::at(location::open(location, IfAbsent::Refuse).await?, writer))
    }

    /// Uses any object store, under a prefix: for tests and for stores this crate does not know.
    #[must_use]
    pub fn with_object_store(objects: Arc<dyn ObjectStore>, prefix: &str, writer: WriterId) -> Self {
        let place = Place {
            redactor: Redactor::new(&format!("{objects}/{prefix}")),
            objects,
            root: Path::from(prefix),
            folder: None,
        };
        Self::at(place, writer)
    }

    /// With parts of that size, and objects up to it whole: for tests, whose objects are small, and stores that ask for other parts.
    /// A handle that has clones stays as it is.
    #[must_use]
    pub fn in_parts_of(mut self, bytes: u64) -> Self {
        if let Some(inner) = Arc::get_mut(&mut self.inner) {
            inner.part_bytes = bytes.max(1);
        }
        self
    }

    pub(crate) fn part_bytes(&self) -> u64 {
        self.inner.part_bytes
    }

    pub(crate) fn at(place: Place, writer: WriterId) -> Self {
        Self {
            inner: Arc::new(Inner {
                objects: place.objects,
                root: place.root,
                writer,
                redactor: place.redactor,
                folder: place.folder,
                uploads: AtomicU64::new(0),
                stored_bytes: AtomicU64::new(0),
                upload_permits: Arc::new(Semaphore::new(UPLOADS_IN_FLIGHT_MAX)),
                part_bytes: PART_BYTES,
                records: Mutex::default(),
                doubtful: Mutex::default(),
            }),
        }
    }

    /// Folder or URL, without credentials.
    #[must_use]
    pub fn location(&self) -> &str {
        &self.inner.redactor.location
    }

    /// The identity under which this handle writes.
    #[must_use]
    pub fn writer(&self) -> WriterId {
        self.inner.writer
    }

    pub(crate) fn folder(&self) -> Option<&PathBuf> {
        self.inner.folder.as_ref()
    }

    pub(crate) fn objects(&self) -> &Arc<dyn ObjectStore> {
        &self.inner.objects
    }

    pub(crate) fn path(&self, key: &str) -> Path {
        keys::full(&self.inner.root, key)
    }

    /// A number that no other upload of this process has.
    pub(crate) fn next_upload(&self) -> u64 {
        self.inner.uploads.fetch_add(1, Ordering::Relaxed)
    }

    /// Bytes of checkpoint shards stored so far, those of parts whose upload is not complete included.
    pub(crate) fn stored_bytes(&self) -> u64 {
        self.inner.stored_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn count_stored(&self, bytes: u64) {
        self.inner.stored_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Waits until one more part may go. First come, first served, whichever upload it is of; a part that is on its way ends
    /// with its request. The semaphore is never closed, so there is one.
    pub(crate) async fn upload_permit(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.inner.upload_permits).acquire_owned().await.ok()
    }

    pub(crate) fn cached(&self, sequence: u64) -> Option<CachedLink> {
        let records = self.inner.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.get(&sequence).cloned()
    }

    /// Places of the chain that were read or written here.
    pub(crate) fn known_places(&self) -> Vec<u64> {
        let records = self.inner.records.lock().unwrap_or_else(PoisonError::into_inner);
        let mut places: Vec<u64> = records.keys().copied().collect();
        places.sort_unstable();
        places
    }

    pub(crate) fn cache(&self, sequence: u64, link: CachedLink) {
        let mut records = self.inner.records.lock().unwrap_or_else(PoisonError::into_inner);
        records.insert(sequence, link);
    }

    pub(crate) fn doubtful(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.inner.doubtful.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn sort(&self, operation: &'static str, key: &str, failure: Failure) -> StoreError {
        match failure {
            Failure::Store(error) => self.inner.redactor.sort(operation, key, &error),
            Failure::TimedOut => StoreError::Retry {
                operation,
                key: key.to_string(),
                cause: format!("no answer from {} within {OPERATION_TIMEOUT_MS} ms", self.location()),
            },
        }
    }

    pub(crate) async fn bounded<T>(
        &self,
        operation: impl Future<Output = Result<T, object_store::Error>>,
    ) -> Result<T, Failure> {
        in_time(operation).await
    }

    /// A small object's bytes; one larger than `bytes_max` is corrupt, and not read.
    pub(crate) async fn get_small(&self, key: &str, bytes_max: u64) -> Result<Bytes, StoreError> {
        let path = self.path(key);
        let read = self.bounded(async {
            let found = self.inner.objects.get(&path).await?;
            let size = found.meta.size;
            if size > bytes_max {
                return Ok(Err(size));
            }
            found.bytes().await.map(Ok)
        });
        match read.await.map_err(|failure| self.sort("read", key, failure))? {
            Ok(bytes) => Ok(bytes),
            Err(size) => Err(StoreError::corrupt(
                key,
                format!("{size} bytes, more than such an object can have"),
            )),
        }
    }

    pub(crate) async fn put_raw(&self, key: &str, payload: PutPayload, mode: PutMode) -> Result<(), Failure> {
        let path = self.path(key);
        let options = PutOptions::from(mode);
        let put = self.inner.objects.put_opts(&path, payload, options);
        self.bounded(put).await.map(|_| ())
    }

    /// In a folder: puts an object, and the names that lead to it, on the disk. A remote store has nothing of the kind: what
    /// reads back there is durable.
    pub(crate) async fn sync(&self, key: &str) -> Result<(), StoreError> {
        let Some(folder) = self.folder().cloned() else {
            return Ok(());
        };
        let path = folder.join(key);
        let synced = self.bounded(async {
            let synced = tokio::task::spawn_blocking(move || sync_up_to(&folder, &path)).await?;
            synced.map_err(|source| object_store::Error::Generic {
                store: "folder",
                source: source.into(),
            })
        });
        synced.await.map_err(|failure| self.sort("make durable", key, failure))
    }

    /// Writes an object whose key only this process or this content can have: writing it twice is harmless.
    pub(crate) async fn put(&self, key: &str, payload: PutPayload) -> Result<(), StoreError> {
        let put = self.put_raw(key, payload, PutMode::Overwrite).await;
        put.map_err(|failure| self.sort("write", key, failure))
    }

    /// Length of an object; nothing if there is none.
    pub(crate) async fn length_of(&self, key: &str) -> Result<Option<u64>, StoreError> {
        self.meta_of(key).await.map(|meta| meta.map(|meta| meta.size))
    }

    /// What a listing would say of an object; nothing if there is none.
    pub(crate) async fn meta_of(&self, key: &str) -> Result<Option<ObjectMeta>, StoreError> {
        let path = self.path(key);
        let head = self.bounded(self.inner.objects.head(&path)).await;
        match head.map_err(|failure| self.sort("look up", key, failure)) {
            Ok(meta) => Ok(Some(meta)),
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All objects under a folder of the store, with their keys.
    pub(crate) async fn list_objects(&self, folder: &str) -> Result<Vec<(String, ObjectMeta)>, StoreError> {
        let path = self.path(folder);
        let metas: Vec<ObjectMeta> = self
            .bounded(self.inner.objects.list(Some(&path)).try_collect())
            .await
            .map_err(|failure| self.sort("list", folder, failure))?;
        let mut objects: Vec<_> = metas
            .into_iter()
            .filter_map(|meta| Some((keys::relative(&self.inner.root, &meta.location)?, meta)))
            .collect();
        // Not every store lists in order.
        objects.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(objects)
    }

    /// Deletes objects; one that is gone already counts as deleted.
    pub(crate) async fn delete_all(&self, doomed: &[String]) -> Result<(), StoreError> {
        let gone = |result: Result<(), StoreError>| match result {
            Err(StoreError::NotFound { .. }) => Ok(()),
            other => other,
        };
        futures::stream::iter(doomed.to_vec())
            .map(|key| async move {
                let path = self.path(&key);
                let deleted = self.bounded(self.inner.objects.delete(&path)).await;
                gone(deleted.map_err(|failure| self.sort("delete", &key, failure)))
            })
            .buffer_unordered(SMALL_REQUESTS_IN_FLIGHT_MAX)
            .try_collect()
            .await
    }
}

/// Syncs a file and each folder above it, `folder` last.
fn sync_up_to(folder: &std::path::Path, path: &std::path::Path) -> std::io::Result<()> {
    let mut names = path.ancestors().take_while(|name| name.starts_with(folder));
    names.try_for_each(|name| std::fs::File::open(name)?.sync_all())
}
