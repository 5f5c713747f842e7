//! The CUDA device.
//!
//! ```text
//! Device ── CudaDevice<D> ── bounds, launches (table), scratch, plan cache, graphs, snapshots    plain Rust, tested anywhere
//!                │
//!             Driver ─┬─ RealDriver       libcuda, NVRTC, cuBLASLt, loaded at run time           feature `cuda`
//!                     ├─ EmulatedDriver   the kernels on the host, thread by thread                 feature `emulator`
//!                     └─ RecordingDriver  writes calls down, fails where it is told to           for tests
//! ```
//! Beside it, [`nccl`] moves device memory between processes, over a seam of the same kind.
//!
//! Kernels are CUDA C++ in `kernels/cuda/`; [`table`] says what each takes and how it is launched. Working precision is
//! bf16, full is f32.
//!
//! - **DET-1, DET-2** An operation's result is a function of its operands' values and of the device's type: launch shapes
//!   follow from shapes alone, each shape of matrix product has one pinned algorithm, and addresses decide nothing.
//! - **DET-4** [`crate::Device::device_type`] names the product, its multiprocessors, the libraries that decide numbers, and
//!   the kernels' sources.
//! - After an error that outlives its call ([`driver::Severity::Sticky`]) the device refuses further work.

pub mod bf16;
mod context;
#[cfg(feature = "cuda")]
pub mod cubin;
mod device;
pub mod driver;
#[cfg(feature = "emulator")]
pub mod emulated;
mod event;
pub mod gemm;
pub mod graph;
mod memory;
pub mod nccl;
pub mod peak;
mod profile;
#[cfg(feature = "cuda")]
pub mod real;
pub mod recording;
pub mod resources;
pub mod shapes;
pub mod snapshot;
mod stream;
pub mod table;

pub use device::{CudaDevice, LOGITS_ELEMENTS};
pub use memory::{CudaBuffer, CudaTokens, DeviceSpan};
pub use profile::Spent;
pub use stream::{CudaStream, STAGING_BYTES};
