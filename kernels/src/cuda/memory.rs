//! Memory of the device and of its host side: owned, given back once, never while work may still use it.

use super::context::Context;
use super::driver::{Address, Driver, Severity};
use super::table::Element;
use crate::device::DeviceError;
use std::any::Any;
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;
use std::sync::Arc;

/// A run of device memory. Dropping it waits for all work of the device, so it cannot pull memory from under a kernel;
/// therefore buffers are allocated once and kept, as every caller of [`crate::Device`] does.
pub struct Allocation<D: Driver> {
    context: Arc<Context<D>>,
    address: Address,
    bytes: usize,
}

impl<D: Driver> Allocation<D> {
    /// Memory of unknown contents.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] with the size, [`DeviceError::Failed`].
    pub(super) fn new(context: &Arc<Context<D>>, bytes: usize) -> Result<Self, DeviceError> {
        context.check("alloc")?;
        // Nothing cannot be allocated; one byte makes an empty buffer like any other.
        let address = context
            .driver()
            .alloc(bytes.max(1))
            .map_err(|error| match error.severity {
                Severity::OutOfMemory => DeviceError::OutOfMemory {
                    needed_bytes: bytes,
                    // What there is helps whoever reads it; that it cannot be had is no error of its own.
                    memory: context.driver().memory().ok(),
                },
                Severity::Refused | Severity::Sticky => context.judge("alloc", &error),
            })?;
        Ok(Self {
            context: Arc::clone(context),
            address,
            bytes,
        })
    }

    /// Zeroed memory; on return it may be used on any stream.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`] with the size, [`DeviceError::Failed`].
    pub(super) fn zeroed(context: &Arc<Context<D>>, bytes: usize) -> Result<Self, DeviceError> {
        let memory = Self::new(context, bytes)?;
        let home = context.home();
        if bytes > 0 {
            // SAFETY: the range was just allocated, and cannot be freed before the queue is synchronised below or, on an
            // error, by the waiting free.
            context.ask("alloc", |driver| unsafe {
                driver.set_bytes(home, memory.address, 0, bytes)
            })?;
            context.ask("alloc", |driver| driver.synchronize(home))?;
        }
        Ok(memory)
    }

    /// Where it begins; aligned to 256 bytes.
    pub(super) const fn address(&self) -> Address {
        self.address
    }

    /// Its length.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl<D: Driver> Drop for Allocation<D> {
    fn drop(&mut self) {
        // SAFETY: the address came from this driver's `alloc` and is given back here alone. A failure is that of earlier
        // work, which its own stream tells; the memory then goes with the process.
        let _ = unsafe { self.context.driver().free(self.address) };
    }
}

/// Flat memory of one precision on the device.
pub struct CudaBuffer<D: Driver> {
    pub(super) memory: Arc<Allocation<D>>,
    pub(super) len: usize,
    pub(super) element: Element,
}

impl<D: Driver> CudaBuffer<D> {
    /// How its elements are stored.
    #[must_use]
    pub const fn element(&self) -> Element {
        self.element
    }

    /// Where it begins: for data planes that send device memory themselves, and for tests.
    #[must_use]
    pub fn address(&self) -> Address {
        self.memory.address()
    }
}

/// A range of device memory, of any driver's, that stays allocated as long as this or a clone of it lives: what is handed to a
/// data plane, whose work goes on after a call has returned.
#[derive(Clone)]
pub struct DeviceSpan {
    address: Address,
    bytes: usize,
    _memory: Arc<dyn Any + Send + Sync>,
}

impl DeviceSpan {
    /// Where it begins.
    #[must_use]
    pub const fn address(&self) -> Address {
        self.address
    }

    /// Its length in bytes.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.bytes
    }
}

impl fmt::Debug for DeviceSpan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "DeviceSpan({} bytes at {:#x})", self.bytes, self.address.0)
    }
}

impl<D: Driver> CudaBuffer<D> {
    /// Elements of it as bytes, as they are stored. Whoever writes there must be alone: the borrow ends with this call.
    ///
    /// # Panics
    /// If the range does not lie within the buffer.
    #[must_use]
    pub fn span(&self, range: Range<usize>) -> DeviceSpan {
        assert!(
            range.start <= range.end && range.end <= self.len,
            "elements {range:?} in a buffer of {}",
            self.len
        );
        let width = self.element.bytes();
        DeviceSpan {
            address: self.memory.address().further(range.start * width),
            bytes: range.len() * width,
            _memory: Arc::clone(&self.memory) as Arc<dyn Any + Send + Sync>,
        }
    }
}

impl<D: Driver> fmt::Debug for CudaBuffer<D> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CudaBuffer({} elements, {:?})", self.len, self.element)
    }
}

/// Token ids on the device.
pub struct CudaTokens<D: Driver> {
    pub(super) memory: Arc<Allocation<D>>,
    pub(super) len: usize,
}

/// Host memory that the device copies from and to.
pub struct Pinned<D: Driver> {
    context: Arc<Context<D>>,
    pointer: NonNull<u8>,
    bytes: usize,
}

// SAFETY: it owns its memory, and shared access only reads.
unsafe impl<D: Driver> Send for Pinned<D> {}
// SAFETY: as above.
unsafe impl<D: Driver> Sync for Pinned<D> {}

impl<D: Driver> Pinned<D> {
    /// Zeroed host memory.
    ///
    /// # Errors
    /// [`DeviceError::OutOfPinnedMemory`] with the size, [`DeviceError::Failed`].
    pub(super) fn new(context: &Arc<Context<D>>, bytes: usize) -> Result<Self, DeviceError> {
        context.check("pinned memory")?;
        let pointer = context
            .driver()
            .alloc_pinned(bytes.max(1))
            .map_err(|error| match error.severity {
                Severity::OutOfMemory => DeviceError::OutOfPinnedMemory { needed_bytes: bytes },
                Severity::Refused | Severity::Sticky => context.judge("pinned memory", &error),
            })?;
        Ok(Self {
            context: Arc::clone(context),
            pointer,
            bytes,
        })
    }

    /// Its length.
    pub(super) const fn len(&self) -> usize {
        self.bytes
    }

    /// For copies, which the owner orders.
    pub(super) const fn pointer(&self) -> *mut u8 {
        self.pointer.as_ptr()
    }

    /// Its bytes.
    ///
    /// # Safety
    /// No copy writes them before the slice is let go of.
    pub(super) const unsafe fn as_slice(&self) -> &[u8] {
        // SAFETY: the memory is ours and initialised for `bytes`; the caller has waited for every copy into it.
        unsafe { std::slice::from_raw_parts(self.pointer.as_ptr(), self.bytes) }
    }

    /// Its bytes, to write.
    ///
    /// # Safety
    /// No copy reads or writes them before the slice is let go of.
    pub(super) const unsafe fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed exclusively; the caller has waited for every copy from it.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.as_ptr(), self.bytes) }
    }
}

impl<D: Driver> Drop for Pinned<D> {
    fn drop(&mut self) {
        // SAFETY: the pointer came from this driver's `alloc_pinned` and is given back here alone; owners synchronise the
        // stream of every copy before they let go of it. A failure is that of earlier work.
        let _ = unsafe { self.context.driver().free_pinned(self.pointer) };
    }
}
