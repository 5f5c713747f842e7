//! Floor 1: the `Device` trait, its CPU and CUDA implementations, and the conformance suite that any implementation runs.
//!
//! A [`Device`] is a set of fallible operations on flat device buffers. Tensors are views (an offset into a buffer), so
//! all weights lie in one buffer and all gradients in another, laid out by `tarazed_domain::ParameterLayout`.
//!
//! Invariants
//! - **DET-1** an operation's result is a function of its operands' values alone: not of their addresses, of the thread
//!   that runs it, or of what ran before. On the CPU it does not depend on the instruction set either: AVX-512, AVX2 with
//!   FMA and the portable path give the same bits (`tests/instruction_sets.rs`).
//! - **DET-2** no operation sums with atomics or splits a sum by thread count. One CPU call runs on one thread, by design:
//!   parallelism is over lanes.
//! - **STEP-4** the AdamW pass makes the 128-bit hash of each block it writes ([`hash`]).
//!
//! This crate knows no model, does no I/O beyond device memory and the folder of compiled kernels, and starts no thread.

pub mod conformance;
pub mod cpu;
pub mod cuda;
pub mod device;
pub mod hash;

pub use cpu::{CpuBuffer, CpuDevice, CpuStream};
pub use device::{
    AdamwStep, Attention, Blocks, CrossEntropy, Device, DeviceError, Embedding, Gemm, HeadLoss, Norm, OptimizerState,
    Precision, Rope, View, ViewMut, head_rows, head_rows_most,
};
pub use hash::BlockHash;
