//! A [`Driver`] that runs the kernels on the host: the very sources that a GPU runs, compiled by the host's C++ compiler over
//! an emulation of CUDA's threads (`kernels/cuda/emulator/`).
//!
//! It proves what a kernel computes, and that neither the order of blocks nor that of threads decides a bit; it says nothing
//! of speed. Work is done when it is asked for, so streams are always at their end. Matrix products are the CPU device's,
//! over operands widened to f32.
//!
//! It is stricter than a GPU: arguments are checked against the table, every pointer must point into live memory, and memory
//! is poisoned when it is allocated.

mod library;

use super::bf16;
use super::driver::*;
use super::table::{Element, Entry, Kind, Launch, Value};
use crate::cpu::{CpuBuffer, CpuDevice};
use crate::device::{Device, DeviceError, Gemm, Precision, View, ViewMut};
use library::Emulator;
use std::alloc::{Layout, alloc, dealloc};
use std::collections::BTreeMap;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

pub use library::EmulatorError;

/// Alignment of device and pinned memory.
const ALIGNMENT_BYTES: usize = 256;
/// What fresh device memory holds: a NaN in both precisions.
const POISON: u8 = 0xFF;
/// Shared memory of a block on the architecture that is emulated (H100): CUDA programming guide, "compute capability 9.0".
const SHARED_BYTES_MAX: usize = 227 << 10;

/// One piece of work, as a capture keeps it.
#[derive(Clone)]
enum Work {
    Copy {
        to: u64,
        from: u64,
        bytes: usize,
    },
    Set {
        to: u64,
        value: u8,
        bytes: usize,
    },
    Launch(Launch, Vec<Value>),
    Gemm {
        key: GemmKey,
        alpha: f32,
        operands: [Address; 3],
    },
}

#[derive(Default)]
struct State {
    /// Bytes of each allocation, by address; device memory and pinned memory.
    memory: BTreeMap<u64, usize>,
    kernels: Vec<&'static Entry>,
    plans: Vec<GemmKey>,
    events: BTreeMap<u64, Instant>,
    /// Streams that record instead of doing, and what they recorded.
    captures: BTreeMap<u64, Vec<Work>>,
    graphs: BTreeMap<u64, Vec<Work>>,
    /// Handles given out.
    handles: u64,
}

/// The emulator as a driver.
pub struct EmulatedDriver {
    emulator: Emulator,
    facts: DeviceFacts,
    state: Mutex<State>,
    order: AtomicU64,
}

fn refused(call: &'static str, detail: String) -> DriverError {
    DriverError {
        call,
        severity: Severity::Refused,
        name: "CUDA_ERROR_INVALID_VALUE".to_owned(),
        detail,
    }
}

fn out_of_memory(call: &'static str, bytes: usize) -> DriverError {
    DriverError {
        call,
        severity: Severity::OutOfMemory,
        name: "CUDA_ERROR_OUT_OF_MEMORY".to_owned(),
        detail: format!("{bytes} bytes"),
    }
}

fn layout(bytes: usize) -> Option<Layout> {
    Layout::from_size_align(bytes.max(1), ALIGNMENT_BYTES).ok()
}

impl State {
    fn handle(&mut self) -> u64 {
        self.handles += 1;
        self.handles
    }

    /// Whether `bytes` from `at` on lie in one allocation.
    fn holds(&self, at: u64, bytes: usize) -> bool {
        self.memory
            .range(..=at)
            .next_back()
            .is_some_and(|(&start, &held)| at - start + bytes as u64 <= held as u64)
    }

    fn allocate(&mut self, call: &'static str, bytes: usize, value: u8) -> Result<NonNull<u8>, DriverError> {
        let layout = layout(bytes).ok_or_else(|| out_of_memory(call, bytes))?;
        // SAFETY: the layout has at least one byte.
        let pointer = NonNull::new(unsafe { alloc(layout) }).ok_or_else(|| out_of_memory(call, bytes))?;
        // SAFETY: so many bytes were just allocated.
        unsafe { pointer.write_bytes(value, layout.size()) };
        self.memory.insert(pointer.as_ptr() as u64, bytes);
        Ok(pointer)
    }

    /// Gives an allocation back.
    ///
    /// # Safety
    /// Nobody uses it any more.
    unsafe fn release(&mut self, call: &'static str, at: u64) -> Result<(), DriverError> {
        let layout = self.memory.remove(&at).and_then(layout);
        let layout = layout.ok_or_else(|| refused(call, format!("{at:#x} was not allocated")))?;
        // SAFETY: it was allocated with this layout, and is not in the list any more.
        unsafe { dealloc(at as *mut u8, layout) };
        Ok(())
    }
}

impl Drop for State {
    fn drop(&mut self) {
        while let Some((&at, _)) = self.memory.first_key_value() {
            // SAFETY: the driver is gone, and with it everybody who could use its memory.
            let released = unsafe { self.release("drop", at) };
            debug_assert!(released.is_ok());
        }
    }
}

impl EmulatedDriver {
    /// Compiles the emulator into `folder`, where it is kept, and loads it.
    ///
    /// # Errors
    /// [`EmulatorError`] where there is no C++20 compiler.
    pub fn new(folder: &Path) -> Result<Self, EmulatorError> {
        Self::load(folder, false)
    }

    /// The same with the sources as they are for Hopper, which has matrix products of groups of warps.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn hopper(folder: &Path) -> Result<Self, EmulatorError> {
        Self::load(folder, true)
    }

    fn load(folder: &Path, hopper: bool) -> Result<Self, EmulatorError> {
        let emulator = Emulator::load(folder, hopper)?;
        let parallelism = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let facts = DeviceFacts {
            name: "emulator".to_owned(),
            bus_id: "emulator".to_owned(),
            capability: (9, 0),
            multiprocessors: parallelism as u32,
            memory_bytes: usize::MAX,
            shared_bytes_max: SHARED_BYTES_MAX,
            numeric_libraries: vec![("compiler".to_owned(), emulator.compiler.clone())],
            driver_version: 0,
        };
        Ok(Self {
            emulator,
            facts,
            state: Mutex::default(),
            order: AtomicU64::new(0),
        })
    }

    /// The order in which blocks and warps run from now on: 0 forward, 1 backward, any other the seed of a random one. Even seeds
    /// mix the threads of all warps; in all other orders each warp runs as far as it gets before the next begins.
    pub fn set_order(&self, order: u64) {
        self.order.store(order, Ordering::Relaxed);
    }

    /// Rows of 16 bytes that tensor core loads (`ldmatrix`) found in a bank that another row of the same phase had taken, since
    /// this was last asked. Counted for the whole process: every driver has the same emulator.
    pub fn take_bank_conflicts(&self) -> u64 {
        self.emulator.bank_conflicts()
    }

    /// Bytes of device memory.
    ///
    /// # Panics
    /// If they are not allocated.
    #[must_use]
    pub fn peek(&self, from: Address, bytes: usize) -> Vec<u8> {
        let state = self.state();
        assert!(
            state.holds(from.0, bytes),
            "{bytes} bytes at {from:?} are not allocated"
        );
        // SAFETY: the range is allocated, and stays so while the state is locked.
        unsafe { std::slice::from_raw_parts(from.0 as *const u8, bytes) }.to_vec()
    }

    /// Overwrites device memory, as a kernel would.
    ///
    /// # Panics
    /// If it is not allocated.
    pub fn poke(&self, to: Address, bytes: &[u8]) {
        let state = self.state();
        assert!(
            state.holds(to.0, bytes.len()),
            "{} bytes at {to:?} are not allocated",
            bytes.len()
        );
        // SAFETY: the range is allocated, and stays so while the state is locked; `bytes` is the caller's own memory.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.0 as *mut u8, bytes.len()) };
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does it, or keeps it where the stream is being captured.
    ///
    /// # Safety
    /// What the work reads and writes is allocated.
    unsafe fn ask(&self, call: &'static str, stream: StreamId, work: Work) -> Result<(), DriverError> {
        if let Some(capture) = self.state().captures.get_mut(&stream.0) {
            capture.push(work);
            return Ok(());
        }
        // SAFETY: the caller's promise.
        unsafe { self.perform(call, &work) }
    }

    /// # Safety
    /// What the work reads and writes is allocated, as far as it goes beyond what is checked here.
    unsafe fn perform(&self, call: &'static str, work: &Work) -> Result<(), DriverError> {
        let live = |at: u64, bytes: usize| {
            if self.state().holds(at, bytes) {
                return Ok(());
            }
            Err(refused(call, format!("{bytes} bytes at {at:#x} are not allocated")))
        };
        match work {
            Work::Copy { to, from, bytes } => {
                live(*to, *bytes)?;
                live(*from, *bytes)?;
                // SAFETY: both ranges are allocated, as was just checked, and the caller says that they do not overlap.
                unsafe { std::ptr::copy_nonoverlapping(*from as *const u8, *to as *mut u8, *bytes) };
                Ok(())
            }
            Work::Set { to, value, bytes } => {
                live(*to, *bytes)?;
                // SAFETY: the range is allocated, as was just checked.
                unsafe { std::ptr::write_bytes(*to as *mut u8, *value, *bytes) };
                Ok(())
            }
            Work::Launch(launch, values) => {
                library::check(launch, values).map_err(|cause| refused(call, cause))?;
                for (argument, value) in launch.entry.arguments.iter().zip(values) {
                    if let (Kind::Pointer { element, .. }, Value::Pointer(at)) = (argument.kind, *value)
                        && at != 0
                    {
                        live(at, element.bytes())?;
                    }
                }
                let order = self.order.load(Ordering::Relaxed);
                // SAFETY: the values fit the entry's arguments, as was just checked; how far the kernel goes is the
                // caller's promise.
                unsafe { self.emulator.launch(launch, values, order) }.map_err(|cause| DriverError {
                    call,
                    severity: Severity::Sticky,
                    name: "CUDA_ERROR_LAUNCH_FAILED".to_owned(),
                    detail: cause,
                })
            }
            Work::Gemm { key, alpha, operands } => {
                let [a, b, c] = operand_spans(key);
                for (operand, (len, element)) in operands.iter().zip([(a, key.input), (b, key.input), (c, key.output)])
                {
                    live(operand.0, len * element.bytes())?;
                }
                // SAFETY: the operands are allocated, as was just checked, and C is nobody else's.
                unsafe { product(key, *alpha, *operands, [a, b, c]) }
            }
        }
    }
}

/// Elements of each operand, from its first to behind its last.
fn operand_spans(key: &GemmKey) -> [usize; 3] {
    let span = |rows: usize, columns: usize, stride: usize| {
        if rows * columns == 0 {
            0
        } else {
            (rows - 1) * stride + columns
        }
    };
    let (a_rows, a_columns) = if key.a_transposed {
        (key.k, key.m)
    } else {
        (key.m, key.k)
    };
    let (b_rows, b_columns) = if key.b_transposed {
        (key.n, key.k)
    } else {
        (key.k, key.n)
    };
    [
        span(a_rows, a_columns, key.a_stride),
        span(b_rows, b_columns, key.b_stride),
        span(key.m, key.n, key.c_stride),
    ]
}

/// Reads `len` elements as f32.
///
/// # Safety
/// They are allocated and aligned.
unsafe fn widen(at: Address, len: usize, element: Element) -> Result<Vec<f32>, DriverError> {
    // SAFETY: the caller's promise, for both types.
    unsafe {
        match element {
            Element::Bf16 => {
                let values = std::slice::from_raw_parts(at.0 as *const u16, len);
                Ok(values.iter().map(|&bits| bf16::widen(bits)).collect())
            }
            Element::F32 => Ok(std::slice::from_raw_parts(at.0 as *const f32, len).to_vec()),
            other => Err(refused("gemm", format!("a product of {other:?}"))),
        }
    }
}

/// The CPU device's product.
///
/// # Safety
/// Operands are allocated for as many elements as `spans` says, aligned, and C is nobody else's.
unsafe fn product(key: &GemmKey, alpha: f32, [a, b, c]: [Address; 3], spans: [usize; 3]) -> Result<(), DriverError> {
    // SAFETY: the caller's promise.
    let operands = unsafe {
        [
            widen(a, spans[0], key.input)?,
            widen(b, spans[1], key.input)?,
            widen(c, spans[2], key.output)?,
        ]
    };
    let result = cpu_product(key, alpha, &operands).map_err(|error| refused("gemm", error.to_string()))?;
    for row in 0..key.m {
        for column in 0..key.n {
            let at = row * key.c_stride + column;
            // SAFETY: the element lies within C, which is allocated, aligned and nobody else's.
            unsafe {
                match key.output {
                    Element::Bf16 => (c.0 as *mut u16).add(at).write(bf16::round(result[at])),
                    _ => (c.0 as *mut f32).add(at).write(result[at]),
                }
            }
        }
    }
    Ok(())
}

fn cpu_product(key: &GemmKey, alpha: f32, operands: &[Vec<f32>; 3]) -> Result<Vec<f32>, DeviceError> {
    let device = CpuDevice::new();
    let mut stream = device.stream()?;
    let mut put = |values: &[f32]| -> Result<CpuBuffer, DeviceError> {
        let mut buffer = device.alloc(values.len(), Precision::Full)?;
        device.upload(&mut stream, values, ViewMut::from(&mut buffer))?;
        Ok(buffer)
    };
    let [a, b, mut c] = [put(&operands[0])?, put(&operands[1])?, put(&operands[2])?];
    let call = Gemm {
        m: key.m,
        n: key.n,
        k: key.k,
        a_transposed: key.a_transposed,
        b_transposed: key.b_transposed,
        a_stride: key.a_stride,
        b_stride: key.b_stride,
        c_stride: key.c_stride,
        alpha,
        accumulate: key.accumulate,
    };
    device.gemm(
        &mut stream,
        &call,
        View::from(&a),
        View::from(&b),
        ViewMut::from(&mut c),
    )?;
    let mut result = vec![0.0; operands[2].len()];
    device.download(&mut stream, View::from(&c), &mut result)?;
    Ok(result)
}

impl Driver for EmulatedDriver {
    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn make_current(&self) -> Result<(), DriverError> {
        Ok(())
    }

    fn memory(&self) -> Result<MemoryState, DriverError> {
        let used = self.state().memory.values().sum::<usize>();
        Ok(MemoryState {
            free_bytes: self.facts.memory_bytes - used,
            total_bytes: self.facts.memory_bytes,
        })
    }

    fn create_stream(&self) -> Result<StreamId, DriverError> {
        Ok(StreamId(self.state().handle()))
    }

    fn destroy_stream(&self, stream: StreamId) -> Result<(), DriverError> {
        self.state().captures.remove(&stream.0);
        Ok(())
    }

    fn synchronize(&self, _: StreamId) -> Result<(), DriverError> {
        Ok(())
    }

    fn is_idle(&self, _: StreamId) -> Result<bool, DriverError> {
        Ok(true)
    }

    fn create_event(&self) -> Result<EventId, DriverError> {
        Ok(EventId(self.state().handle()))
    }

    fn destroy_event(&self, event: EventId) -> Result<(), DriverError> {
        self.state().events.remove(&event.0);
        Ok(())
    }

    fn record(&self, event: EventId, _: StreamId) -> Result<(), DriverError> {
        self.state().events.insert(event.0, Instant::now());
        Ok(())
    }

    fn wait(&self, _: StreamId, _: EventId) -> Result<(), DriverError> {
        Ok(())
    }

    fn synchronize_event(&self, _: EventId) -> Result<(), DriverError> {
        Ok(())
    }

    fn elapsed_ms(&self, start: EventId, end: EventId) -> Result<f32, DriverError> {
        let state = self.state();
        let at = |event: EventId| {
            let recorded = state.events.get(&event.0).copied();
            recorded.ok_or_else(|| refused("elapsed_ms", format!("{event:?} was not recorded")))
        };
        Ok(at(end)?.duration_since(at(start)?).as_secs_f32() * 1e3)
    }

    fn alloc(&self, bytes: usize) -> Result<Address, DriverError> {
        let pointer = self.state().allocate("alloc", bytes, POISON)?;
        Ok(Address(pointer.as_ptr() as u64))
    }

    unsafe fn free(&self, address: Address) -> Result<(), DriverError> {
        // SAFETY: the caller's promise; all work is done when it is asked for.
        unsafe { self.state().release("free", address.0) }
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<NonNull<u8>, DriverError> {
        self.state().allocate("alloc_pinned", bytes, 0)
    }

    unsafe fn free_pinned(&self, pointer: NonNull<u8>) -> Result<(), DriverError> {
        // SAFETY: the caller's promise.
        unsafe { self.state().release("free_pinned", pointer.as_ptr() as u64) }
    }

    unsafe fn copy_to_device(
        &self,
        stream: StreamId,
        to: Address,
        from: *const u8,
        bytes: usize,
    ) -> Result<(), DriverError> {
        let (to, from) = (to.0, from as u64);
        // SAFETY: the caller's promise.
        unsafe { self.ask("copy_to_device", stream, Work::Copy { to, from, bytes }) }
    }

    unsafe fn copy_to_host(
        &self,
        stream: StreamId,
        to: *mut u8,
        from: Address,
        bytes: usize,
    ) -> Result<(), DriverError> {
        let (to, from) = (to as u64, from.0);
        // SAFETY: the caller's promise.
        unsafe { self.ask("copy_to_host", stream, Work::Copy { to, from, bytes }) }
    }

    unsafe fn copy_on_device(
        &self,
        stream: StreamId,
        to: Address,
        from: Address,
        bytes: usize,
    ) -> Result<(), DriverError> {
        let (to, from) = (to.0, from.0);
        // SAFETY: the caller's promise.
        unsafe { self.ask("copy_on_device", stream, Work::Copy { to, from, bytes }) }
    }

    unsafe fn set_bytes(&self, stream: StreamId, to: Address, value: u8, bytes: usize) -> Result<(), DriverError> {
        let to = to.0;
        // SAFETY: the caller's promise.
        unsafe { self.ask("set_bytes", stream, Work::Set { to, value, bytes }) }
    }

    fn load(&self, entry: &'static Entry) -> Result<KernelId, DriverError> {
        let mut state = self.state();
        state.kernels.push(entry);
        Ok(KernelId(state.kernels.len() as u64 - 1))
    }

    unsafe fn launch(
        &self,
        stream: StreamId,
        kernel: KernelId,
        launch: &Launch,
        arguments: &[Value],
    ) -> Result<(), DriverError> {
        if self.state().kernels.get(kernel.0 as usize) != Some(&launch.entry) {
            return Err(refused("launch", format!("{kernel:?} is not {}", launch.entry.name)));
        }
        // SAFETY: the caller's promise.
        unsafe { self.ask("launch", stream, Work::Launch(*launch, arguments.to_vec())) }
    }

    fn plan_gemm(&self, key: &GemmKey) -> Result<GemmPlan, DriverError> {
        let mut state = self.state();
        state.plans.push(*key);
        Ok(GemmPlan {
            id: PlanId(state.plans.len() as u64 - 1),
            algorithm: "the CPU device's".to_owned(),
            workspace_bytes: 0,
        })
    }

    unsafe fn gemm(
        &self,
        stream: StreamId,
        plan: &GemmPlan,
        alpha: f32,
        operands: [Address; 3],
        _: Address,
    ) -> Result<(), DriverError> {
        let key = self.state().plans.get(plan.id.0 as usize).copied();
        let key = key.ok_or_else(|| refused("gemm", format!("{:?} is not known", plan.id)))?;
        let work = Work::Gemm { key, alpha, operands };
        // SAFETY: the caller's promise.
        unsafe { self.ask("gemm", stream, work) }
    }

    fn begin_capture(&self, stream: StreamId) -> Result<(), DriverError> {
        self.state().captures.insert(stream.0, Vec::new());
        Ok(())
    }

    fn end_capture(&self, stream: StreamId) -> Result<GraphId, DriverError> {
        let mut state = self.state();
        let recorded = state.captures.remove(&stream.0);
        let recorded = recorded.ok_or_else(|| refused("end_capture", format!("{stream:?} is not being captured")))?;
        let graph = state.handle();
        state.graphs.insert(graph, recorded);
        Ok(GraphId(graph))
    }

    unsafe fn launch_graph(&self, graph: GraphId, _: StreamId) -> Result<(), DriverError> {
        let work = self.state().graphs.get(&graph.0).cloned();
        let work = work.ok_or_else(|| refused("launch_graph", format!("{graph:?} is not known")))?;
        for work in &work {
            // SAFETY: the caller's promise.
            unsafe { self.perform("launch_graph", work)? };
        }
        Ok(())
    }

    fn destroy_graph(&self, graph: GraphId) -> Result<(), DriverError> {
        self.state().graphs.remove(&graph.0);
        Ok(())
    }
}
