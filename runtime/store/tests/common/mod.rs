//! What the store's tests share: checkpoints, and an object store that fails on demand.
#![allow(dead_code, unused_imports, clippy::unwrap_used)]

mod checkpoints;

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

pub use checkpoints::*;

/// What goes wrong at the chosen operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The request never arrives.
    Before,
    /// The request is carried out, the answer is lost.
    After,
    /// The request is carried out, then repeated by the client, which sees its own object: "already exists".
    AfterAsConflict,
    /// The request is answered "already exists", although nothing is there: a write under way, as S3's 409 says.
    ConflictBefore,
    /// No space: this and every later write fails, reads and deletions do not.
    Full,
    /// If it is a read, a bit of what is read is turned around on its way.
    Garbles,
}

/// Hands everything on, except that one operation fails (and all after it, if the process died), or that every operation
/// first lets other tasks run.
pub struct Faulty {
    inner: Arc<dyn ObjectStore>,
    pub operations: Arc<AtomicU64>,
    pub carried: Arc<Carried>,
    fail_at: u64,
    fault: Fault,
    dies: bool,
    schedule: u64,
}

/// Requests with bytes: where in memory these lay, and how many were on their way at once.
#[derive(Debug, Default)]
pub struct Carried {
    pieces: Mutex<Vec<Range<usize>>>,
    now: AtomicU64,
    most: AtomicU64,
}

impl Carried {
    /// All pieces, so far.
    pub fn pieces(&self) -> Vec<Range<usize>> {
        self.pieces.lock().unwrap().clone()
    }

    /// The most requests that there were at once.
    pub fn most(&self) -> u64 {
        self.most.load(Ordering::SeqCst)
    }

    fn end(&self) {
        self.now.fetch_sub(1, Ordering::SeqCst);
    }

    fn begin(&self, payload: &PutPayload) {
        let now = self.now.fetch_add(1, Ordering::SeqCst) + 1;
        self.most.fetch_max(now, Ordering::SeqCst);
        let pieces = payload.iter().map(|piece| {
            let bytes = piece.as_ptr_range();
            bytes.start.addr()..bytes.end.addr()
        });
        self.pieces.lock().unwrap().extend(pieces);
    }
}

impl Faulty {
    pub fn new(inner: Arc<dyn ObjectStore>, fail_at: u64, fault: Fault, dies: bool) -> Arc<Self> {
        Arc::new(Self {
            inner,
            operations: Arc::default(),
            carried: Arc::default(),
            fail_at,
            fault,
            dies,
            schedule: 0,
        })
    }

    /// Never fails; yields to others before each operation, a number of times that follows from `schedule`.
    pub fn interleaved(inner: Arc<dyn ObjectStore>, schedule: u64) -> Arc<Self> {
        let (fail_at, fault) = (u64::MAX, Fault::Before);
        Arc::new(Self {
            inner,
            operations: Arc::default(),
            carried: Arc::default(),
            fail_at,
            fault,
            dies: false,
            schedule,
        })
    }

    fn begin(&self) -> Option<Fault> {
        let now = self.operations.fetch_add(1, Ordering::SeqCst);
        if self.fault == Fault::Full {
            (now >= self.fail_at).then_some(self.fault)
        } else if now == self.fail_at {
            Some(self.fault)
        } else {
            (self.dies && now > self.fail_at).then_some(Fault::Before)
        }
    }

    async fn turn(&self) -> Option<Fault> {
        let fault = self.begin();
        if self.schedule != 0 {
            let now = self.operations.load(Ordering::SeqCst);
            let turns = blake3::hash(&(self.schedule ^ now.rotate_left(32)).to_le_bytes()).as_bytes()[0] % 4;
            for _ in 0..turns {
                tokio::task::yield_now().await;
            }
        }
        fault
    }
}

async fn garbled(found: GetResult) -> Result<GetResult> {
    let (meta, range, attributes) = (found.meta.clone(), found.range.clone(), found.attributes.clone());
    let extensions = found.extensions.clone();
    let mut bytes = found.bytes().await?.to_vec();
    let middle = bytes.len() / 2;
    if let Some(byte) = bytes.get_mut(middle) {
        *byte ^= 0x08;
    }
    Ok(GetResult {
        payload: GetResultPayload::Stream(futures::stream::once(async { Ok(bytes.into()) }).boxed()),
        meta,
        range,
        attributes,
        extensions,
    })
}

fn lost() -> object_store::Error {
    object_store::Error::Generic {
        store: "faulty",
        source: "connection reset".into(),
    }
}

fn full() -> object_store::Error {
    let source = std::io::Error::from_raw_os_error(28).into();
    object_store::Error::Generic {
        store: "faulty",
        source,
    }
}

fn conflict() -> object_store::Error {
    object_store::Error::AlreadyExists {
        path: String::new(),
        source: "409 conflict".into(),
    }
}

fn outcome<T>(fault: Option<Fault>, conditional: bool, result: Result<T>) -> Result<T> {
    match fault {
        None | Some(Fault::Garbles) => result,
        Some(Fault::AfterAsConflict) if conditional => Err(conflict()),
        Some(_) => Err(lost()),
    }
}

const fn stops(fault: Option<Fault>) -> bool {
    matches!(fault, Some(Fault::Before | Fault::ConflictBefore))
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "faulty {}", self.inner)
    }
}

impl fmt::Debug for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, location: &Path, payload: PutPayload, opts: PutOptions) -> Result<PutResult> {
        let conditional = opts.mode == PutMode::Create;
        let fault = self.turn().await;
        match fault {
            Some(Fault::ConflictBefore) if conditional => return Err(conflict()),
            Some(Fault::Full) => return Err(full()),
            _ => {}
        }
        if stops(fault) {
            return Err(lost());
        }
        self.carried.begin(&payload);
        // Others of the same process would begin theirs meanwhile.
        tokio::task::yield_now().await;
        let put = self.inner.put_opts(location, payload, opts).await;
        self.carried.end();
        outcome(fault, conditional, put)
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let fault = self.turn().await;
        if stops(fault) {
            return Err(lost());
        }
        let inner = outcome(fault, false, self.inner.put_multipart_opts(location, opts).await)?;
        let (operations, fail_at, fault) = (self.operations.clone(), self.fail_at, self.fault);
        Ok(Box::new(FaultyUpload {
            inner,
            operations,
            carried: self.carried.clone(),
            fail_at,
            fault,
        }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        match self.turn().await {
            None | Some(Fault::Full) => self.inner.get_opts(location, options).await,
            Some(Fault::Garbles) => garbled(self.inner.get_opts(location, options).await?).await,
            Some(_) => Err(lost()),
        }
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let fault = self
            .begin()
            .filter(|fault| !matches!(fault, Fault::Full | Fault::Garbles));
        if stops(fault) {
            return futures::stream::once(async { Err(lost()) }).boxed();
        }
        let deleted = self.inner.delete_stream(locations);
        deleted.map(move |result| outcome(fault, false, result)).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.begin() {
            None | Some(Fault::Full | Fault::Garbles) => self.inner.list(prefix),
            Some(_) => futures::stream::once(async { Err(lost()) }).boxed(),
        }
    }

    async fn list_with_delimiter(&self, prefix: Option<&Path>) -> Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Path, to: &Path, options: CopyOptions) -> Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

#[derive(Debug)]
struct FaultyUpload {
    inner: Box<dyn MultipartUpload>,
    operations: Arc<AtomicU64>,
    carried: Arc<Carried>,
    fail_at: u64,
    fault: Fault,
}

impl FaultyUpload {
    fn now(&self) -> Option<Fault> {
        (self.operations.fetch_add(1, Ordering::SeqCst) == self.fail_at).then_some(self.fault)
    }
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let fault = self.now();
        if stops(fault) {
            return async { Err(lost()) }.boxed();
        }
        let carried = self.carried.clone();
        carried.begin(&data);
        let part = self.inner.put_part(data);
        async move {
            tokio::task::yield_now().await;
            let part = part.await;
            carried.end();
            outcome(fault, false, part)
        }
        .boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let fault = self.now();
        if stops(fault) {
            return Err(lost());
        }
        outcome(fault, false, self.inner.complete().await)
    }

    async fn abort(&mut self) -> Result<()> {
        self.inner.abort().await
    }
}
