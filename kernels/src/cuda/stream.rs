//! One thread's queue, with its scratch memory and its way to and from the host.
//!
//! Host data passes through one pinned staging buffer, piece by piece. An upload returns once the last piece is on its
//! way; the next use of the staging buffer waits for it. A download waits for the stream. So no copy ever runs from or to
//! memory that somebody else may touch.
//!
//! While a capture is under way (`graph`) nothing may wait or allocate: such calls are refused.

use super::context::Context;
use super::driver::{Address, Argument, Driver, EventId, GEMM_WORKSPACE_BYTES, GemmPlan, KernelKey, LaunchShape, StreamId};
use super::memory::{Allocation, Pinned};
use crate::device::DeviceError;
use std::sync::Arc;

/// Bytes of the staging buffer: long enough that a copy's fixed cost does not show.
pub(super) const STAGING_BYTES: usize = 4 << 20;

/// What a run of scratch memory is for; one operation never needs two runs of one kind.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Scratch {
    /// A matrix product's A, aligned.
    GemmA,
    /// Its B.
    GemmB,
    /// Its C.
    GemmC,
    /// Partial sums between two launches.
    Partials,
    /// What the host asked for: sums, hashes.
    Results,
}

const SCRATCH_KINDS: usize = 5;

/// One thread's queue of operations and its scratch memory.
pub struct CudaStream<D: Driver> {
    context: Arc<Context<D>>,
    id: StreamId,
    /// The last copy from the staging buffer, where one may be under way.
    staged: EventId,
    is_staged: bool,
    staging: Pinned<D>,
    workspace: Arc<Allocation<D>>,
    scratch: [Option<Arc<Allocation<D>>>; SCRATCH_KINDS],
    /// What the work recorded so far uses; none while nothing is recorded.
    captured: Option<Vec<Arc<Allocation<D>>>>,
}

/// What gives stream and event back, also where the rest of a stream cannot be made.
struct Queue<'a, D: Driver> {
    context: &'a Context<D>,
    stream: Option<StreamId>,
    event: Option<EventId>,
}

impl<D: Driver> Drop for Queue<'_, D> {
    fn drop(&mut self) {
        let driver = self.context.driver();
        // The error that led here is the one that counts.
        if let Some(event) = self.event.take() {
            let _ = driver.destroy_event(event);
        }
        if let Some(stream) = self.stream.take() {
            let _ = driver.destroy_stream(stream);
        }
    }
}

impl<D: Driver> CudaStream<D> {
    /// A queue with its staging buffer and workspace.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], [`DeviceError::Failed`].
    pub(super) fn new(context: &Arc<Context<D>>) -> Result<Self, DeviceError> {
        let mut queue = Queue {
            context,
            stream: None,
            event: None,
        };
        let id = context.ask("stream", Driver::create_stream)?;
        queue.stream = Some(id);
        let staged = context.ask("stream", Driver::create_event)?;
        queue.event = Some(staged);
        let staging = Pinned::new(context, STAGING_BYTES)?;
        let workspace = Arc::new(Allocation::new(context, GEMM_WORKSPACE_BYTES)?);
        (queue.stream, queue.event) = (None, None);
        Ok(Self {
            context: Arc::clone(context),
            id,
            staged,
            is_staged: false,
            staging,
            workspace,
            scratch: std::array::from_fn(|_| None),
            captured: None,
        })
    }

    /// Shared with the device.
    pub(super) const fn context(&self) -> &Arc<Context<D>> {
        &self.context
    }

    /// The queue.
    pub(super) const fn id(&self) -> StreamId {
        self.id
    }

    /// The work asked for next uses this memory: a recorded graph keeps it alive.
    pub(super) fn uses(&mut self, memory: &Arc<Allocation<D>>) {
        if let Some(captured) = &mut self.captured
            && !captured.iter().any(|held| Arc::ptr_eq(held, memory))
        {
            captured.push(Arc::clone(memory));
        }
    }

    /// # Errors
    /// [`DeviceError::Unsupported`] while a capture is under way.
    fn refuse_in_capture(&self, operation: &'static str) -> Result<(), DeviceError> {
        if self.captured.is_none() {
            return Ok(());
        }
        Err(DeviceError::Unsupported {
            operation,
            cause: "a graph records work that neither waits nor allocates; run the same work once before it is recorded, and keep host data outside".to_owned(),
        })
    }

    /// Scratch memory of at least `bytes`, of unknown contents. It stays where it is until a larger one is asked for.
    ///
    /// # Errors
    /// [`DeviceError::OutOfMemory`], [`DeviceError::Failed`]; [`DeviceError::Unsupported`] if it would have to grow in a
    /// capture.
    pub(super) fn scratch(&mut self, kind: Scratch, bytes: usize) -> Result<Address, DeviceError> {
        let slot = kind as usize;
        if !matches!(&self.scratch[slot], Some(held) if held.bytes() >= bytes) {
            self.refuse_in_capture("scratch memory")?;
            // The smaller one goes first: both together may not fit.
            self.scratch[slot] = None;
            self.scratch[slot] = Some(Arc::new(Allocation::new(&self.context, bytes)?));
        }
        let Some(held) = self.scratch[slot].clone() else {
            unreachable!("the scratch was just made")
        };
        self.uses(&held);
        Ok(held.address())
    }

    /// Launches a kernel that uses memory already named by [`CudaStream::uses`].
    ///
    /// # Safety
    /// The arguments are the kernel's own, and the memory they point to is allocated for what the kernel touches until the
    /// stream is done with it.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub(super) unsafe fn launch(
        &mut self,
        operation: &'static str,
        kernel: &KernelKey,
        shape: &LaunchShape,
        arguments: &[Argument],
    ) -> Result<(), DeviceError> {
        if shape.grid.contains(&0) {
            return Ok(()); // nothing to do, which the driver would take for a mistake
        }
        let loaded = self.context.kernel(kernel, shape.shared_bytes)?;
        // SAFETY: the caller's promise.
        self.context.ask(operation, |driver| unsafe {
            driver.launch(self.id, loaded, shape, arguments)
        })
    }

    /// A planned matrix product.
    ///
    /// # Safety
    /// As [`Driver::gemm`] says of plan and operands; the workspace is this stream's.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub(super) unsafe fn product(
        &mut self,
        plan: &GemmPlan,
        alpha: f32,
        operands: [Address; 3],
    ) -> Result<(), DeviceError> {
        assert!(plan.workspace_bytes <= self.workspace.bytes(), "a plan keeps to the workspace that streams have");
        let workspace = Arc::clone(&self.workspace);
        self.uses(&workspace);
        // SAFETY: the caller's promise; the workspace is as long as any plan needs, and one stream's products run one
        // after another.
        self.context.ask("gemm", |driver| unsafe {
            driver.gemm(self.id, plan, alpha, operands, workspace.address())
        })
    }

    /// Sets bytes to zero.
    ///
    /// # Safety
    /// The range is allocated until the stream is done with it.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub(super) unsafe fn zero(&mut self, to: Address, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        self.context.ask("zero", |driver| unsafe { driver.set_bytes(self.id, to, 0, bytes) })
    }

    /// Copies bytes on the device.
    ///
    /// # Safety
    /// Both ranges are allocated until the stream is done with them, and do not overlap.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub(super) unsafe fn copy(&mut self, to: Address, from: Address, bytes: usize) -> Result<(), DeviceError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the caller's promise.
        self.context.ask("copy", |driver| unsafe {
            driver.copy_on_device(self.id, to, from, bytes)
        })
    }

    /// Waits until the staging buffer is no copy's source any more.
    fn free_staging(&mut self, operation: &'static str) -> Result<(), DeviceError> {
        if self.is_staged {
            self.context
                .ask(operation, |driver| driver.synchronize_event(self.staged))?;
            self.is_staged = false;
        }
        Ok(())
    }

    /// Sends `bytes` to the device; `fill` is asked for one piece after another, told where the piece begins.
    ///
    /// # Safety
    /// The range from `to` on is allocated until the stream is done with it.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]; [`DeviceError::Unsupported`] in a capture.
    pub(super) unsafe fn send(
        &mut self,
        to: Address,
        bytes: usize,
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> Result<(), DeviceError> {
        const OPERATION: &str = "upload";
        self.refuse_in_capture(OPERATION)?;
        for start in (0..bytes).step_by(STAGING_BYTES) {
            let piece = STAGING_BYTES.min(bytes - start);
            self.free_staging(OPERATION)?;
            // SAFETY: the last copy from the buffer is done, and copies into it are waited for where they are made.
            fill(start, unsafe { &mut self.staging.as_mut_slice()[..piece] });
            let from = self.staging.pointer();
            // Set first: if the copy is under way and recording its end fails, dropping the stream still waits for it.
            self.is_staged = true;
            // SAFETY: the staging buffer is pinned and is not touched before the event recorded below is done; the
            // target is the caller's promise.
            self.context.ask(OPERATION, |driver| unsafe {
                driver.copy_to_device(self.id, to.further(start), from, piece)
            })?;
            self.context
                .ask(OPERATION, |driver| driver.record(self.staged, self.id))?;
        }
        Ok(())
    }

    /// Fetches `bytes` from the device, and waits for them; `take` is given one piece after another, told where the piece
    /// begins.
    ///
    /// # Safety
    /// The range from `from` on is allocated.
    ///
    /// # Errors
    /// [`DeviceError::Failed`], also for earlier work; [`DeviceError::Unsupported`] in a capture.
    pub(super) unsafe fn fetch(
        &mut self,
        operation: &'static str,
        from: Address,
        bytes: usize,
        mut take: impl FnMut(usize, &[u8]),
    ) -> Result<(), DeviceError> {
        self.refuse_in_capture(operation)?;
        for start in (0..bytes).step_by(STAGING_BYTES) {
            let piece = STAGING_BYTES.min(bytes - start);
            let to = self.staging.pointer();
            // SAFETY: the stream's order puts this copy behind any from the buffer, and it is waited for below before
            // anybody looks; on an error nobody looks. The source is the caller's promise.
            self.context.ask(operation, |driver| unsafe {
                driver.copy_to_host(self.id, to, from.further(start), piece)
            })?;
            self.synchronize(operation)?;
            // SAFETY: the stream is idle.
            take(start, unsafe { &self.staging.as_slice()[..piece] });
        }
        Ok(())
    }

    /// Waits until all that was asked of the stream is done.
    ///
    /// # Errors
    /// [`DeviceError::Failed`], also for earlier work; [`DeviceError::Unsupported`] in a capture.
    pub(super) fn synchronize(&mut self, operation: &'static str) -> Result<(), DeviceError> {
        self.refuse_in_capture(operation)?;
        self.context.ask(operation, |driver| driver.synchronize(self.id))?;
        self.is_staged = false;
        Ok(())
    }

    /// Begins to record what the stream is asked for.
    pub(super) fn begin_capture(&mut self) -> Result<(), DeviceError> {
        self.refuse_in_capture("graph")?;
        self.context.ask("graph", |driver| driver.begin_capture(self.id))?;
        self.captured = Some(Vec::new());
        Ok(())
    }

    /// What was recorded uses this memory. Ends the state in which calls are refused, whatever the driver says next.
    pub(super) fn take_captured(&mut self) -> Vec<Arc<Allocation<D>>> {
        self.captured.take().unwrap_or_default()
    }
}

impl<D: Driver> Drop for CudaStream<D> {
    fn drop(&mut self) {
        let driver = self.context.driver();
        // Buffers outlive the work that uses them: each waits for the device when it is dropped, and so does this. A
        // failure is that of earlier work; there is nobody to tell, and the next operation elsewhere finds it, too.
        let _ = driver.synchronize(self.id);
        let _ = driver.destroy_event(self.staged);
        let _ = driver.destroy_stream(self.id);
    }
}
