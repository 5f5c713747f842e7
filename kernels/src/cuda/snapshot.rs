//! Snapshots (DESIGN.md section 7): optimizer state copied to pinned host memory on a stream of its own, while the next
//! forward and backward run.
//!
//! Two events order it. The copy waits, on the device, for the work that the compute stream held when the snapshot was
//! begun: the update. The next update waits, on the device, for the copy ([`Snapshot::precedes`]). The host waits for
//! neither, until it wants the bytes.

use super::context::Context;
use super::device::CudaDevice;
use super::driver::Driver;
use super::event::Event;
use super::memory::{Allocation, CudaBuffer, Pinned};
use super::stream::{CudaStream, Queue};
use super::table::Element;
use crate::device::{DeviceError, View};
use std::sync::Arc;

const OPERATION: &str = "snapshot";

/// A copy stream, and pinned memory of snapshots that are over: pinning anew is expected to cost more than copying (not
/// measured).
pub struct Snapshots<D: Driver> {
    queue: Queue<D>,
    context: Arc<Context<D>>,
    spare: Vec<Pinned<D>>,
}

/// One tensor's place in a snapshot.
struct Part {
    element: Element,
    len: usize,
    /// Where its bytes begin.
    start: usize,
}

/// State on its way to the host, or there.
pub struct Snapshot<D: Driver> {
    context: Arc<Context<D>>,
    done: Event<D>,
    parts: Vec<Part>,
    host: Option<Pinned<D>>,
    is_done: bool,
    /// Keeps what is copied.
    _sources: Vec<Arc<Allocation<D>>>,
}

/// Alignment of each tensor in the snapshot: a cache line.
const PART_ALIGNMENT_BYTES: usize = 64;

impl<D: Driver> Snapshots<D> {
    /// A copy stream.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub fn new(device: &CudaDevice<D>) -> Result<Self, DeviceError> {
        Ok(Self {
            queue: Queue::new(device.context())?,
            context: Arc::clone(device.context()),
            spare: Vec::new(),
        })
    }

    /// Begins to copy tensors (views with their lengths), as they are when all that `after` was asked for is done.
    ///
    /// # Panics
    /// If a view does not fit its buffer, or in a capture.
    ///
    /// # Errors
    /// [`DeviceError::OutOfPinnedMemory`], [`DeviceError::Failed`].
    pub fn begin(
        &mut self,
        after: &mut CudaStream<D>,
        tensors: &[(View<'_, CudaBuffer<D>>, usize)],
    ) -> Result<Snapshot<D>, DeviceError> {
        assert!(!after.is_capturing(), "a snapshot is not part of a graph");
        let mut parts = Vec::with_capacity(tensors.len());
        let mut end = 0_usize;
        for (view, len) in tensors {
            let start = end.next_multiple_of(PART_ALIGNMENT_BYTES);
            let element = view.buffer.element;
            end = start + len * element.bytes();
            parts.push(Part {
                element,
                len: *len,
                start,
            });
        }
        let host = match self.spare.iter().position(|spare| spare.len() >= end) {
            Some(index) => self.spare.swap_remove(index),
            None => Pinned::new(&self.context, end)?,
        };
        let updated = Event::new(&self.context)?;
        updated.record(OPERATION, after.id())?;
        updated.hold(OPERATION, self.queue.id())?;
        // From here on a drop waits for the copies asked for.
        let mut snapshot = Snapshot {
            context: Arc::clone(&self.context),
            done: Event::new(&self.context)?,
            parts,
            host: Some(host),
            is_done: false,
            _sources: tensors
                .iter()
                .map(|(view, _)| Arc::clone(&view.buffer.memory))
                .collect(),
        };
        let asked = snapshot.copy(&self.queue, after, tensors);
        // The event stands behind whatever was asked for, also where something failed.
        let marked = snapshot.done.record(OPERATION, self.queue.id());
        asked.and(marked)?;
        Ok(snapshot)
    }

    /// Takes a snapshot's memory back for the next one.
    ///
    /// # Errors
    /// [`DeviceError::Failed`], also for the copy itself.
    pub fn recycle(&mut self, mut snapshot: Snapshot<D>) -> Result<(), DeviceError> {
        snapshot.wait()?;
        self.spare.extend(snapshot.host.take());
        Ok(())
    }
}

impl<D: Driver> Snapshot<D> {
    fn copy(
        &mut self,
        queue: &Queue<D>,
        after: &mut CudaStream<D>,
        tensors: &[(View<'_, CudaBuffer<D>>, usize)],
    ) -> Result<(), DeviceError> {
        let Some(host) = &self.host else {
            unreachable!("a snapshot begins with its memory")
        };
        for (part, (view, len)) in self.parts.iter().zip(tensors) {
            let from = view.within(after, *len);
            let bytes = len * part.element.bytes();
            if bytes == 0 {
                continue;
            }
            // SAFETY: every part lies within the pinned memory, which nobody looks at or gives back before the event
            // behind this copy is done; the view was checked to lie within its buffer, which this snapshot holds.
            self.context.ask(OPERATION, |driver| unsafe {
                driver.copy_to_host(queue.id(), host.pointer().add(part.start), from, bytes)
            })?;
        }
        Ok(())
    }

    /// What the stream is asked for from now on waits, on the device, until the copy is done: asked before an update, it
    /// lets the update change what was copied.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub fn precedes(&self, stream: &CudaStream<D>) -> Result<(), DeviceError> {
        self.done.hold(OPERATION, stream.id())
    }

    /// Waits, on the host, until the copy is done.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub fn wait(&mut self) -> Result<(), DeviceError> {
        if !self.is_done {
            self.done.synchronize(OPERATION)?;
            self.is_done = true;
        }
        Ok(())
    }

    /// The elements of a tensor of full precision, by its place in the call; waits for the copy.
    ///
    /// # Panics
    /// If there is no such tensor, or it is of working precision.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub fn full(&mut self, index: usize) -> Result<&[f32], DeviceError> {
        self.wait()?;
        let part = &self.parts[index];
        assert_eq!(part.element, Element::F32, "tensor {index} of the snapshot");
        let Some(host) = &self.host else {
            unreachable!("memory is taken only with the snapshot itself")
        };
        // SAFETY: the copy is done, so nothing writes there; parts are aligned, lie within the memory, and any bits are an
        // f32.
        let elements = unsafe {
            let bytes = &host.as_slice()[part.start..part.start + part.len * size_of::<f32>()];
            std::slice::from_raw_parts(bytes.as_ptr().cast::<f32>(), part.len)
        };
        Ok(elements)
    }
}

impl<D: Driver> Drop for Snapshot<D> {
    fn drop(&mut self) {
        if !self.is_done {
            // The memory goes next. Where even this fails the device is lost, and copies nothing any more.
            let _ = self.context.driver().synchronize_event(self.done.id());
        }
    }
}
