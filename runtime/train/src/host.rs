//! Device memory that the host can address, which is what a data plane of sockets needs.

use tarazed_kernels::{CpuBuffer, CpuDevice, Device};

/// A device whose buffers are host memory.
///
/// A GPU's data plane sends device memory itself and does not go through this.
pub trait HostVisible: Device {
    /// The elements of a buffer.
    fn elements(buffer: &Self::Buffer) -> &[f32];
    /// The elements of a buffer, to write.
    fn elements_mut(buffer: &mut Self::Buffer) -> &mut [f32];

    /// The bytes of a range of elements.
    fn bytes(buffer: &Self::Buffer, range: std::ops::Range<usize>) -> &[u8] {
        bytemuck::cast_slice(&Self::elements(buffer)[range])
    }
}

impl HostVisible for CpuDevice {
    fn elements(buffer: &CpuBuffer) -> &[f32] {
        buffer
    }

    fn elements_mut(buffer: &mut CpuBuffer) -> &mut [f32] {
        buffer
    }
}
