//! What the store's tests share: small checkpoints whose every value is known, and an object store that fails on demand.
#![allow(dead_code, clippy::unwrap_used)]

use async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use object_store::path::Path;
use object_store::{
    CopyOptions, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta, ObjectStore,
    PutMode, PutMultipartOptions, PutOptions, PutPayload, PutResult, Result, UploadPart,
};
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tarazed_domain::{Generation, OptimizerShardIndex, StepsCompleted};
use tarazed_store::{
    BinaryId, CheckpointStore, Committed, Digest, Fence, Lineage, Manifest, ShardGeometry, ShardRecord, ShardSlices,
    StoreError, TraceHead, WriterId, WriterNonce,
};

pub const BLOCK_ELEMENTS: u64 = 4;
pub const BLOCKS: [u32; 3] = [2, 2, 1];

pub fn writer(number: u8) -> WriterId {
    WriterId {
        nonce: WriterNonce([number; 16]),
        generation: Generation(1),
    }
}

/// Shards of 2, 2 and 1 blocks.
pub fn geometries() -> Vec<ShardGeometry> {
    let mut first_block = 0;
    (0..)
        .zip(BLOCKS)
        .map(|(index, block_count)| {
            let shard = OptimizerShardIndex(index);
            let geometry = ShardGeometry {
                shard,
                first_block,
                block_count,
                block_elements: BLOCK_ELEMENTS,
            };
            first_block += block_count;
            geometry
        })
        .collect()
}

/// The values of one tensor of a shard at a step: all different.
pub fn values(step: u64, geometry: &ShardGeometry, tensor: u32) -> Vec<f32> {
    let value = |i: u64| (step * 10_000 + u64::from(tensor) * 1000 + geometry.first_element() + i) as f32 / 16.0;
    (0..geometry.elements()).map(value).collect()
}

pub async fn put_one(
    store: &CheckpointStore,
    step: u64,
    generation: Generation,
    geometry: &ShardGeometry,
) -> std::result::Result<ShardRecord, StoreError> {
    let tensors: Vec<Vec<f32>> = (0..3).map(|tensor| values(step, geometry, tensor)).collect();
    let state = ShardSlices {
        master: &tensors[0],
        exp_avg: &tensors[1],
        exp_avg_sq: &tensors[2],
    };
    store.put_shard(StepsCompleted(step), generation, geometry, state).await
}

pub fn manifest(store: &CheckpointStore, step: u64, generation: Generation, shards: Vec<ShardRecord>) -> Manifest {
    Manifest {
        run: Digest::of(b"config"),
        step: StepsCompleted(step),
        generation,
        writer: store.writer(),
        block_elements: BLOCK_ELEMENTS,
        block_count: shards.iter().map(|shard| shard.block_count).sum(),
        shard_count: shards.len() as u32,
        layout: Digest::of(b"layout"),
        data: Digest::of(b"data"),
        shards,
        decisions: step.to_le_bytes().repeat(20),
        trace_head: TraceHead {
            step: StepsCompleted(step),
            length_bytes: step * 100,
            blake3: Digest::of(&step.to_le_bytes()),
            last_line: format!("{{\"step\":{step}}}"),
        },
        binary: BinaryId {
            version: "0.1.0".into(),
            build: "test".into(),
            libraries: vec![],
        },
        device_type: "cpu".into(),
        lineage: Lineage::default(),
        created_unix_ms: step,
    }
}

pub async fn upload(store: &CheckpointStore, step: u64, generation: Generation) -> Manifest {
    let mut shards = Vec::new();
    for geometry in geometries() {
        shards.push(put_one(store, step, generation, &geometry).await.unwrap());
    }
    manifest(store, step, generation, shards)
}

pub async fn checkpoint(store: &CheckpointStore, fence: &Fence, step: u64) -> Committed {
    let manifest = upload(store, step, fence.generation).await;
    store.commit(fence, &manifest).await.unwrap()
}

/// Restores as a controller does: the newest valid one, older ones as long as its shards turn out bad. Every value is
/// checked: whatever happened to the objects, a wrong state never comes out.
pub async fn restore(store: &CheckpointStore) -> std::result::Result<Option<u64>, StoreError> {
    let mut below = None;
    'older: loop {
        let Some(found) = store.newest_valid(below).await? else {
            return Ok(None);
        };
        let step = found.manifest.step;
        assert!(below.is_none_or(|below| step < below), "a restore only ever goes back");
        assert_eq!(found.manifest.decisions, step.0.to_le_bytes().repeat(20));
        assert_eq!(found.manifest.trace_head.last_line, format!("{{\"step\":{step}}}"));
        for geometry in geometries() {
            match store.get_shard(&found.manifest, geometry.shard).await {
                Ok(state) => {
                    let read = [&state.master, &state.exp_avg, &state.exp_avg_sq];
                    for (tensor, read) in (0..).zip(read) {
                        assert_eq!(read, &values(step.0, &geometry, tensor), "step {step}, {geometry:?}");
                    }
                }
                Err(error) if error.is_bad_object() => {
                    below = Some(step);
                    continue 'older;
                }
                Err(error) => return Err(error),
            }
        }
        return Ok(Some(step.0));
    }
}

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
    fail_at: u64,
    fault: Fault,
    dies: bool,
    schedule: u64,
}

impl Faulty {
    pub fn new(inner: Arc<dyn ObjectStore>, fail_at: u64, fault: Fault, dies: bool) -> Arc<Self> {
        Arc::new(Self {
            inner,
            operations: Arc::default(),
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
        outcome(fault, conditional, self.inner.put_opts(location, payload, opts).await)
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
        let part = self.inner.put_part(data);
        async move { outcome(fault, false, part.await) }.boxed()
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
