//! One thread's queue, with its scratch memory and its way to and from the host.
//!
//! Host data passes through one pinned staging buffer, piece by piece. An upload returns once the last piece is on its
//! way; the next use of the staging buffer waits for it. A download waits for the stream. So no copy ever runs from or to
//! memory that somebody else may touch.
//!
//! While a capture is under way (`graph`) nothing may wait or allocate: such calls are refused.

use super::context::Context;
use super::driver::{Address, Driver, GEMM_WORKSPACE_BYTES, GemmKey, GemmPlan, GraphId, StreamId};
use super::event::Event;
use super::memory::{Allocation, Pinned};
use super::profile::{Profile, Spent};
use super::table::{Launch, Value};
use crate::device::DeviceError;
use std::sync::Arc;

/// Bytes of the staging buffer: long enough that a copy's fixed cost should not show (expected, not measured).
pub const STAGING_BYTES: usize = 4 << 20;

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
    /// Gradients that query heads made for keys and values that they share.
    HeadGradients,
    /// What the host asked for: sums, hashes.
    Results,
}

const SCRATCH_KINDS: usize = 6;

/// What may still read or write the staging buffer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum InFlight {
    Nothing,
    /// Copies to the device, up to the event.
    Upload,
    /// A copy whose end is not marked: only an idle stream is behind it.
    Unmarked,
}

/// A graph, and the memory that its work uses.
type Captured<D> = (GraphId, Vec<Arc<Allocation<D>>>);

/// A queue, given back when dropped.
pub(super) struct Queue<D: Driver> {
    context: Arc<Context<D>>,
    id: StreamId,
}

impl<D: Driver> Queue<D> {
    pub fn new(context: &Arc<Context<D>>) -> Result<Self, DeviceError> {
        let id = context.ask("stream", Driver::create_stream)?;
        Ok(Self {
            context: Arc::clone(context),
            id,
        })
    }

    pub const fn id(&self) -> StreamId {
        self.id
    }
}

impl<D: Driver> Drop for Queue<D> {
    fn drop(&mut self) {
        // What stands in it is done first. A failure is that of earlier work: there is nobody left to tell, and the next
        // operation on any other stream finds it, too.
        let _ = self.context.driver().destroy_stream(self.id);
    }
}

/// One thread's queue of operations and its scratch memory.
pub struct CudaStream<D: Driver> {
    /// Dropped first, which waits for all copies and kernels that use what follows.
    queue: Queue<D>,
    context: Arc<Context<D>>,
    /// Recorded behind the last copy from the staging buffer.
    staged: Event<D>,
    staging: Pinned<D>,
    in_flight: InFlight,
    /// Made for the first matrix product: a stream that only copies has none.
    workspace: Option<Arc<Allocation<D>>>,
    scratch: [Option<Arc<Allocation<D>>>; SCRATCH_KINDS],
    /// What the work recorded so far uses; none while nothing is recorded.
    captured: Option<Vec<Arc<Allocation<D>>>>,
    /// None while nobody wants to know where the time goes.
    profile: Option<Profile<D>>,
}

impl<D: Driver> CudaStream<D> {
    /// A queue with its staging buffer.
    ///
    /// # Errors
    /// [`DeviceError::OutOfPinnedMemory`], [`DeviceError::Failed`].
    pub(super) fn new(context: &Arc<Context<D>>) -> Result<Self, DeviceError> {
        Ok(Self {
            queue: Queue::new(context)?,
            context: Arc::clone(context),
            staged: Event::new(context)?,
            staging: Pinned::new(context, STAGING_BYTES)?,
            in_flight: InFlight::Nothing,
            workspace: None,
            scratch: std::array::from_fn(|_| None),
            captured: None,
            profile: None,
        })
    }

    /// From now on, each operation's time is taken.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]; [`DeviceError::Unsupported`] in a capture.
    pub fn begin_profile(&mut self) -> Result<(), DeviceError> {
        self.refuse_in_capture("profile")?;
        self.profile = Some(Profile::new(&self.context, self.id())?);
        Ok(())
    }

    /// Where the time went since [`CudaStream::begin_profile`], most first. Waits for the stream.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub fn end_profile(&mut self) -> Result<Vec<Spent>, DeviceError> {
        self.profile.take().map_or_else(|| Ok(Vec::new()), Profile::finish)
    }

    /// Names the operation asked for last, where its time is taken.
    fn mark(&mut self, what: impl FnOnce() -> String) -> Result<(), DeviceError> {
        self.profile.as_mut().map_or(Ok(()), |profile| profile.mark(what()))
    }

    /// Shared with the device.
    pub(super) const fn context(&self) -> &Arc<Context<D>> {
        &self.context
    }

    /// The queue.
    pub(super) const fn id(&self) -> StreamId {
        self.queue.id()
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
    /// The memory that the arguments point to is allocated, for all that the kernel reads and writes, until the stream is
    /// done with it.
    ///
    /// # Panics
    /// If the arguments are not those that the table lists.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub(super) unsafe fn launch(
        &mut self,
        operation: &'static str,
        launch: &Launch,
        arguments: &[Value],
    ) -> Result<(), DeviceError> {
        let declared = launch.entry.arguments;
        assert_eq!(arguments.len(), declared.len(), "arguments of {}", launch.entry.name);
        for (value, argument) in arguments.iter().zip(declared) {
            assert!(
                value.fits(argument.kind),
                "{value:?} as {argument:?} of {}",
                launch.entry.name
            );
        }
        if launch.is_empty() {
            return self.context.check(operation);
        }
        let kernel = self.context.kernel(launch.entry);
        // SAFETY: the kernel is the entry's, and the arguments are its own, as was just checked; the memory is the caller's
        // promise.
        self.context.ask(operation, |driver| unsafe {
            driver.launch(self.id(), kernel, launch, arguments)
        })?;
        self.mark(|| launch.entry.name.to_owned())
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
        key: &GemmKey,
        alpha: f32,
        operands: [Address; 3],
    ) -> Result<(), DeviceError> {
        assert!(
            plan.workspace_bytes <= GEMM_WORKSPACE_BYTES,
            "a plan keeps to the workspace that streams have"
        );
        let workspace = self.workspace()?;
        // SAFETY: the caller's promise; the workspace is as long as any plan needs, and one stream's products run one
        // after another.
        self.context.ask("gemm", |driver| unsafe {
            driver.gemm(self.id(), plan, alpha, operands, workspace)
        })?;
        self.mark(|| {
            let transposed = |yes: bool| if yes { "'" } else { "" };
            let accumulate = if key.accumulate { ", added" } else { "" };
            let of = [transposed(key.a_transposed), transposed(key.b_transposed)];
            format!(
                "product {} x {} x {} (A{}, B{}{accumulate})",
                key.m, key.n, key.k, of[0], of[1]
            )
        })
    }

    fn workspace(&mut self) -> Result<Address, DeviceError> {
        let workspace = match &self.workspace {
            Some(workspace) => Arc::clone(workspace),
            None => {
                self.refuse_in_capture("gemm")?;
                let made = Arc::new(Allocation::new(&self.context, GEMM_WORKSPACE_BYTES)?);
                self.workspace = Some(Arc::clone(&made));
                made
            }
        };
        self.uses(&workspace);
        Ok(workspace.address())
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
        let set = |driver: &D| {
            // SAFETY: the caller's promise.
            unsafe { driver.set_bytes(self.id(), to, 0, bytes) }
        };
        self.context.ask("zero", set)?;
        self.mark(|| "zero".to_owned())
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
            driver.copy_on_device(self.id(), to, from, bytes)
        })?;
        self.mark(|| "copy".to_owned())
    }

    /// Waits until no copy uses the staging buffer.
    fn free_staging(&mut self, operation: &'static str) -> Result<(), DeviceError> {
        match self.in_flight {
            InFlight::Nothing => {}
            InFlight::Upload => self.staged.synchronize(operation)?,
            InFlight::Unmarked => self.context.ask(operation, |driver| driver.synchronize(self.id()))?,
        }
        self.in_flight = InFlight::Nothing;
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
            // SAFETY: no copy uses the buffer.
            fill(start, unsafe { &mut self.staging.as_mut_slice()[..piece] });
            let from = self.staging.pointer();
            self.in_flight = InFlight::Unmarked;
            // SAFETY: the staging buffer is pinned and is not touched before the event recorded below is done; the
            // target is the caller's promise.
            self.context.ask(OPERATION, |driver| unsafe {
                driver.copy_to_device(self.id(), to.further(start), from, piece)
            })?;
            self.mark(|| "copy to the device".to_owned())?;
            self.staged.record(OPERATION, self.id())?;
            self.in_flight = InFlight::Upload;
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
            self.in_flight = InFlight::Unmarked;
            // SAFETY: the stream's order puts this copy behind any other that uses the buffer, and nobody looks before the
            // stream is idle. The source is the caller's promise.
            self.context.ask(operation, |driver| unsafe {
                driver.copy_to_host(self.id(), to, from.further(start), piece)
            })?;
            self.mark(|| "copy to the host".to_owned())?;
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
        self.context.ask(operation, |driver| driver.synchronize(self.id()))?;
        self.in_flight = InFlight::Nothing;
        Ok(())
    }

    /// From now on, what the stream is asked for is recorded.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]; [`DeviceError::Unsupported`] in a capture.
    pub(super) fn begin_capture(&mut self) -> Result<(), DeviceError> {
        self.refuse_in_capture("graph")?;
        if self.profile.is_some() {
            return Err(DeviceError::Unsupported {
                operation: "graph",
                cause: "the times of what is recorded cannot be taken; end the profile first".to_owned(),
            });
        }
        self.context.ask("graph", |driver| driver.begin_capture(self.id()))?;
        self.captured = Some(Vec::new());
        Ok(())
    }

    /// Ends a capture. Whatever comes of it, the stream works as before.
    ///
    /// # Errors
    /// [`DeviceError::Failed`].
    pub(super) fn end_capture(&mut self) -> Result<Captured<D>, DeviceError> {
        let used = self.captured.take().unwrap_or_default();
        // Also where the device is lost: the driver's own state is to be tidy.
        let graph = self.context.driver().end_capture(self.id());
        let graph = graph.map_err(|error| self.context.judge("graph", &error))?;
        Ok((graph, used))
    }

    /// Whether a capture is under way.
    pub(super) const fn is_capturing(&self) -> bool {
        self.captured.is_some()
    }
}
