//! The data plane of ranks on CUDA devices: NCCL for device memory, sockets for all else.
//!
//! ```text
//! connect_mesh ─▶ SocketMesh ─▶ offers of all ranks ─▶ agree ─┬─▶ SocketMesh, as it is
//!                                                             └─▶ unique id ─▶ communicator ─▶ NcclMesh
//! ```
//!
//! - The ranks of a generation decide together, by [`agreement::agree`] over the offers of all: a pure function of the same
//!   list on each. None decides alone, since one that waits in NCCL for another that went on without it would wait for ever.
//! - A communicator belongs to one generation. Its id is made by the generation's first rank and travels over that generation's
//!   sockets, whose handshake has proved generation, roster and the run's token: nobody else can be a member.
//! - NCCL checks neither tag nor length, and says nothing of a peer that is late or dead. So each exchange is announced
//!   over the sockets first, by both sides, and they are watched while NCCL works.
//! - What is lost against sockets: NCCL carries no checksum of the payload.

pub mod agreement;
mod mesh;
mod rounds;

pub use mesh::{DeviceMeans, Limits, NcclMesh, connect_device_mesh};
