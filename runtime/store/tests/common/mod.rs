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
    /// The request never arrives, and no answer ever comes.
    Silent,
    /// The request is carried out, and no answer ever comes.
    SilentAfter,
}

/// Counts operations and says what goes wrong with each; one for a store and the uploads begun there.
#[derive(Clone, Debug)]
struct Plan {
    operations: Arc<AtomicU64>,
    struck: Arc<Mutex<Option<&'static str>>>,
    fail_at: u64,
    fault: Fault,
    dies: bool,
}

impl Plan {
    fn new(fail_at: u64, fault: Fault, dies: bool) -> Self {
        Self {
            operations: Arc::default(),
            struck: Arc::default(),
            fail_at,
            fault,
            dies,
        }
    }

    fn begin(&self, operation: &'static str) -> Option<Fault> {
        let now = self.operations.fetch_add(1, Ordering::SeqCst);
        if now == self.fail_at {
            *self.struck.lock().unwrap() = Some(operation);
        }
        let ever_after = match self.fault {
            Fault::Full => Some(Fault::Full),
            Fault::Silent => self.dies.then_some(Fault::Silent),
            _ => self.dies.then_some(Fault::Before),
        };
        match now.cmp(&self.fail_at) {
            std::cmp::Ordering::Less => None,
            std::cmp::Ordering::Equal => Some(self.fault),
            std::cmp::Ordering::Greater => ever_after,
        }
    }
}

/// Hands everything on, except that one operation fails (and all after it, if the process died), or that every operation
/// first lets other tasks run.
pub struct Faulty {
    inner: Arc<dyn ObjectStore>,
    pub operations: Arc<AtomicU64>,
    pub carried: Arc<Carried>,
    plan: Plan,
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
        Self::planned(inner, Plan::new(fail_at, fault, dies), 0)
    }

    /// Never fails; yields to others before each operation, a number of times that follows from `schedule`.
    pub fn interleaved(inner: Arc<dyn ObjectStore>, schedule: u64) -> Arc<Self> {
        Self::planned(inner, Plan::new(u64::MAX, Fault::Before, false), schedule)
    }

    fn planned(inner: Arc<dyn ObjectStore>, plan: Plan, schedule: u64) -> Arc<Self> {
        Arc::new(Self {
            inner,
            operations: plan.operations.clone(),
            carried: Arc::default(),
            plan,
            schedule,
        })
    }

    /// The operation that went wrong, once one has.
    pub fn struck(&self) -> Option<&'static str> {
        *self.plan.struck.lock().unwrap()
    }

    async fn turn(&self, operation: &'static str) -> Option<Fault> {
        let fault = self.plan.begin(operation);
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

async fn silence<T>() -> Result<T> {
    std::future::pending().await
}

async fn outcome<T>(fault: Option<Fault>, conditional: bool, result: Result<T>) -> Result<T> {
    match fault {
        None | Some(Fault::Garbles) => result,
        Some(Fault::SilentAfter) => silence().await,
        Some(Fault::AfterAsConflict) if conditional => Err(conflict()),
        Some(_) => Err(lost()),
    }
}

const fn stops(fault: Option<Fault>) -> bool {
    matches!(fault, Some(Fault::Before | Fault::ConflictBefore | Fault::Silent))
}

/// Whether a request gets through; if not, what its sender sees.
async fn arrives(fault: Option<Fault>) -> Result<()> {
    match fault {
        Some(Fault::Silent) => silence().await,
        _ if stops(fault) => Err(lost()),
        _ => Ok(()),
    }
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
        let fault = self.turn("write").await;
        match fault {
            Some(Fault::ConflictBefore) if conditional => return Err(conflict()),
            Some(Fault::Full) => return Err(full()),
            _ => {}
        }
        arrives(fault).await?;
        self.carried.begin(&payload);
        // Others of the same process would begin theirs meanwhile.
        tokio::task::yield_now().await;
        let written = self.inner.put_opts(location, payload, opts).await;
        self.carried.end();
        outcome(fault, conditional, written).await
    }

    async fn put_multipart_opts(&self, location: &Path, opts: PutMultipartOptions) -> Result<Box<dyn MultipartUpload>> {
        let fault = self.turn("begin upload").await;
        if fault == Some(Fault::Full) {
            return Err(full());
        }
        arrives(fault).await?;
        let begun = self.inner.put_multipart_opts(location, opts).await;
        Ok(Box::new(FaultyUpload {
            inner: outcome(fault, false, begun).await?,
            carried: self.carried.clone(),
            plan: self.plan.clone(),
        }))
    }

    async fn get_opts(&self, location: &Path, options: GetOptions) -> Result<GetResult> {
        match self.turn("read").await {
            None | Some(Fault::Full) => self.inner.get_opts(location, options).await,
            Some(Fault::Garbles) => garbled(self.inner.get_opts(location, options).await?).await,
            Some(Fault::Silent | Fault::SilentAfter) => silence().await,
            Some(_) => Err(lost()),
        }
    }

    fn delete_stream(&self, locations: BoxStream<'static, Result<Path>>) -> BoxStream<'static, Result<Path>> {
        let fault = self
            .plan
            .begin("delete")
            .filter(|fault| !matches!(fault, Fault::Full | Fault::Garbles));
        if stops(fault) {
            return futures::stream::once(async move { arrives(fault).await.and(Err(lost())) }).boxed();
        }
        let deleted = self.inner.delete_stream(locations);
        deleted.then(move |result| outcome(fault, false, result)).boxed()
    }

    fn list(&self, prefix: Option<&Path>) -> BoxStream<'static, Result<ObjectMeta>> {
        match self.plan.begin("list") {
            None | Some(Fault::Full | Fault::Garbles) => self.inner.list(prefix),
            Some(Fault::Silent | Fault::SilentAfter) => futures::stream::pending().boxed(),
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
    carried: Arc<Carried>,
    plan: Plan,
}

#[async_trait]
impl MultipartUpload for FaultyUpload {
    fn put_part(&mut self, data: PutPayload) -> UploadPart {
        let fault = self.plan.begin("upload part");
        if fault == Some(Fault::Full) {
            return async { Err(full()) }.boxed();
        }
        if stops(fault) {
            return arrives(fault).boxed();
        }
        let carried = self.carried.clone();
        carried.begin(&data);
        let part = self.inner.put_part(data);
        async move {
            tokio::task::yield_now().await;
            let part = part.await;
            carried.end();
            outcome(fault, false, part).await
        }
        .boxed()
    }

    async fn complete(&mut self) -> Result<PutResult> {
        let fault = self.plan.begin("complete upload");
        if fault == Some(Fault::Full) {
            return Err(full());
        }
        arrives(fault).await?;
        let completed = self.inner.complete().await;
        outcome(fault, false, completed).await
    }

    async fn abort(&mut self) -> Result<()> {
        let fault = self
            .plan
            .begin("abort upload")
            .filter(|fault| !matches!(fault, Fault::Full | Fault::Garbles));
        arrives(fault).await?;
        let aborted = self.inner.abort().await;
        outcome(fault, false, aborted).await
    }
}
