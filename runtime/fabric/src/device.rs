//! Device memory on the data plane: what a mesh offers beside [`crate::Collective`] where it can move it without the host.

use crate::{FabricError, Tag};
use tarazed_domain::Rank;
use tarazed_kernels::cuda::DeviceSpan;

/// One outgoing message that lies in device memory.
#[derive(Clone, Debug)]
pub struct DeviceSend {
    /// To which rank; not the own one.
    pub to: Rank,
    /// What it is.
    pub tag: Tag,
    /// The payload; may be empty. No stream writes it before the exchange returns.
    pub span: DeviceSpan,
}

/// One expected message that is to lie in device memory.
#[derive(Clone, Debug)]
pub struct DeviceReceive {
    /// From which rank; not the own one.
    pub from: Rank,
    /// What it must be.
    pub tag: Tag,
    /// Where the payload goes; its length is the expected length. No stream uses it before the exchange returns. Holds
    /// unspecified bytes after an error.
    pub span: DeviceSpan,
}

/// Moves device memory between ranks.
///
/// Stricter than [`crate::Collective::exchange`]: what two ranks have for each other in one exchange is the whole of what they
/// have for each other there, so both wait for each other, and nobody is ahead.
pub trait DevicePlane {
    /// Grouped send and receive: returns when all sends and receives are complete. Streams need not wait for anything then.
    ///
    /// # Errors
    /// As [`crate::Collective::exchange`]; `Communicator`.
    ///
    /// # Panics
    /// If a rank is the own one or outside the world: that is the caller's mistake.
    fn exchange_memory(&mut self, sends: &[DeviceSend], receives: &[DeviceReceive]) -> Result<(), FabricError>;
}
