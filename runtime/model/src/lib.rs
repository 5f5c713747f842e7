//! Aquila2 forward and backward, written once over [`tarazed_kernels::Device`] (floor 2).
//!
//! Aquila2 (arXiv 2408.07410) is a decoder: RMSNorm before attention and MLP, grouped-query attention with rotary
//! positions (rotate-half layout), SwiGLU, no biases, embedding and head untied. Tensor names, shapes and order of
//! arithmetic are those of Hugging Face's Llama, so an export is the identity.
//!
//! Invariants
//! - **DET-1** the results of [`Model::forward_backward`] are a function of weights, tokens, loss scale and what the
//!   gradient buffer held, alone; initial weights are a function of (seed, tensor, element), whatever range is made.
//! - **SUP-4** a running pass returns soon after its abort flag is set: it looks at each layer.
//!
//! This crate knows no rank, no lane and no data; it reads no file and starts no thread.

pub mod flops;
mod initial;
mod layout;
mod model;
mod weights;
mod workspace;

pub use initial::initialise;
pub use layout::parameter_layout;
pub use model::{Model, ModelError};
pub use workspace::{Workspace, logits_rows};
