//! Floor 2: the data plane between the ranks' device threads.
//!
//! Tensors move between ranks through one trait, [`Collective`]: grouped send/receive and all-gather, nothing else.
//! There is **no arithmetic here** (DET-2): sums follow the lane tree and belong to the kernels; the fabric moves bytes.
//!
//! Four meshes implement the trait and pass one conformance suite:
//! - [`SocketMesh`] over Unix-domain sockets, between the processes of one host;
//! - [`SocketMesh`] over TCP, between hosts;
//! - [`nccl::NcclMesh`] beside sockets, for the memory of CUDA devices ([`DevicePlane`]); see [`nccl`];
//! - [`LocalMesh`] between threads of one process, for tests and the simulator.
//!
//! Invariants:
//! - **SUP-2** Every frame and every handshake carries the generation. Stale ones are refused and counted
//!   ([`RefusalCounters`]), and never disturb the mesh of the current generation.
//! - **SUP-4** Calls block, so exactly one device thread per rank makes them, and an [`AbortHandle`] makes any blocked or
//!   later call return within milliseconds, from any thread, for good.
//! - Every frame is checked before a byte of it is believed: header checksum first, then generation, ranks, sequence, tag
//!   and length against what the receiver waits for, then the payload's checksum. Memory is bounded by what the receiver
//!   asked for: payloads land in the caller's own slices.
//! - An error names the peer to blame. After an error a mesh stays failed: the way on is a new generation.
//!
//! What this crate does not do: it starts no thread, but one that gives a communicator of NCCL back, which may hang; it knows
//! no actor and no async runtime, never reconnects within a generation, and neither encrypts nor authenticates payloads (the
//! handshake authenticates the peers; the network in between is trusted). What NCCL carries has no checksum either.

mod abort;
mod collective;
mod connect;
mod counters;
mod device;
mod error;
mod frame;
#[doc(hidden)]
pub mod fuzzing;
mod handshake;
mod judge;
mod link;
mod listener;
mod local;
mod mesh;
pub mod nccl;

pub use abort::AbortHandle;
pub use collective::{Collective, Receive, Send, Tag, TagKind};
pub use connect::connect_mesh;
pub use counters::{ProgressCounter, ProgressSample, Refusal, RefusalCounters};
pub use device::{DevicePlane, DeviceReceive, DeviceSend};
pub use error::{CommunicatorFault, Corruption, FabricError, Remedy};
pub use frame::payload_checksum;
pub use frame::{FRAME_BYTES_SENT_MAX, FrameHeader, FrameKind, HEADER_BYTES};
pub use judge::{Identity, Judge, OpenPayload};
pub use listener::{Listener, Transport};
pub use local::{LocalMesh, local_mesh};
pub use mesh::SocketMesh;
