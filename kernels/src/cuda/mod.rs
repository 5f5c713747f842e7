//! The CUDA half of the kernels: the table of entries ([`table`]) over the sources in `kernels/cuda/`.

pub mod table;
