//! Checkpoints over an object store (floor 2): a folder by default, S3-compatible storage by URL.
//!
//! A checkpoint is a set of checkpoint shards (`shards/`, safetensors, one per optimizer shard), a manifest
//! (`manifests/`, [`Manifest`]) and a commit record in a hash-chained sequence (`commits/`, [`CommitRecord`]), created
//! last and only if its place is free. Rank processes write and read shards by [`RankStore`], which can do nothing
//! else; the controller claims the store, commits, restores and collects.
//!
//! - **CKPT-1** A checkpoint exists if and only if its commit record stands (see `chain.rs` for what that means).
//! - **CKPT-2** An ambiguous outcome of a conditional write is resolved by reading back.
//! - **CKPT-3** [`CheckpointStore::claim`] writes a fence; a controller fenced by a later one can neither commit nor delete.
//! - **CKPT-4** Hashes are checked before any byte is interpreted; a bad object means the next older valid checkpoint,
//!   said loudly; every walk goes to strictly older records, so it ends.
//! - **CKPT-5** [`CheckpointStore::gc`] never deletes a commit record, or an object of a pinned or retained commit.
//! - **CKPT-6** Objects name blocks, never ranks: any world size restores any checkpoint, shard by shard.
//! - A store that ignores conditional writes is detected by [`CheckpointStore::self_test`] and refused.
//!
//! What this crate does not do: decide when to checkpoint, snapshot device memory, interpret the decision ledger or the
//! trace. It reads the wall clock for nonces only; no result depends on it (DET-1). Incomplete multipart uploads of
//! processes that died cannot be listed through the object-store interface: give the bucket a lifecycle rule that aborts
//! them after some days (never one that expires objects: it would eat the chain).

mod answer;
mod chain;
#[cfg(feature = "s3")]
mod clock;
mod commit;
mod digest;
mod download;
mod error;
mod gc;
mod keys;
pub mod limits;
mod location;
mod manifest;
#[cfg(feature = "s3")]
mod profile;
mod rank;
mod record;
mod restore;
mod self_test;
mod shard_file;
mod store;
mod upload;
mod writer;

pub use commit::{Committed, Fence};
pub use digest::Digest;
pub use download::{ShardState, ShardStateMut, WeightsPart};
pub use error::StoreError;
pub use gc::{GcReport, Retention};
pub use location::folder_of;
pub use manifest::{BinaryId, CommitRef, Lineage, MANIFEST_SCHEMA, Manifest, ObjectRecord, ShardRecord, TraceHead};
pub use rank::RankStore;
pub use record::{CommitRecord, RECORD_SCHEMA, RecordKind};
pub use restore::{CheckpointState, CheckpointSummary, Depth, Restorable, Select, Verdict, VerifyReport};
pub use shard_file::{BYTES_PER_ELEMENT, ShardGeometry, TENSORS};
#[doc(hidden)]
pub use shard_file::{check_header, encode_header};
pub use store::CheckpointStore;
pub use upload::ShardPayload;
pub use writer::{WriterId, WriterNonce};
