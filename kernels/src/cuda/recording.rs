//! A driver that computes nothing: it writes down every call, keeps real bytes for memory and copies, and fails where it is
//! told to.
//!
//! It is stricter than a GPU. A copy or an argument outside of live memory, a handle that was given back, work asked for
//! after a sticky error that does not report it again: each panics with what was wrong. What is left when a device and all
//! its buffers are gone, [`RecordingDriver::left`] names.

use super::driver::*;
use super::table::{Entry, Launch, Value};
use std::alloc::{Layout, alloc_zeroed, dealloc};
use std::collections::{BTreeMap, BTreeSet};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Alignment of device and pinned memory.
const ALIGNMENT_BYTES: usize = 256;
/// Between two allocations, so that one that is overrun does not reach the next.
const GAP_BYTES: u64 = 1 << 20;
/// How much of fresh memory is poisoned.
const POISONED_BYTES: usize = 1 << 20;
/// The first address.
const BASE: u64 = 0x7000_0000_0000;

/// One call, as it was asked for.
#[derive(Clone, PartialEq, Debug)]
pub enum Call {
    /// A kernel made ready.
    Load(&'static str),
    /// [`Driver::make_current`]
    MakeCurrent,
    /// [`Driver::memory`]
    Memory,
    /// [`Driver::create_stream`]
    CreateStream(StreamId),
    /// [`Driver::destroy_stream`]
    DestroyStream(StreamId),
    /// [`Driver::synchronize`]
    Synchronize(StreamId),
    /// [`Driver::is_idle`]
    IsIdle(StreamId),
    /// [`Driver::create_event`]
    CreateEvent(EventId),
    /// [`Driver::destroy_event`]
    DestroyEvent(EventId),
    /// [`Driver::record`]
    Record(EventId, StreamId),
    /// [`Driver::wait`]
    Wait(StreamId, EventId),
    /// [`Driver::synchronize_event`]
    SynchronizeEvent(EventId),
    /// [`Driver::elapsed_ms`]
    Elapsed(EventId, EventId),
    /// Bytes of device memory, and where.
    Alloc(usize, Address),
    /// [`Driver::free`]
    Free(Address),
    /// Bytes of pinned memory.
    AllocPinned(usize),
    /// [`Driver::free_pinned`]
    FreePinned,
    /// Target and bytes.
    CopyToDevice(StreamId, Address, usize),
    /// Source and bytes.
    CopyToHost(StreamId, Address, usize),
    /// Target, source, bytes.
    CopyOnDevice(StreamId, Address, Address, usize),
    /// Target, value, bytes.
    SetBytes(StreamId, Address, u8, usize),
    /// [`Driver::launch`]
    Launch(StreamId, Launch, Vec<Value>),
    /// [`Driver::plan_gemm`]
    Plan(GemmKey),
    /// A product of the shape planned: factor, A, B, C, workspace.
    Gemm(StreamId, GemmKey, f32, [Address; 3], Address),
    /// [`Driver::begin_capture`]
    BeginCapture(StreamId),
    /// [`Driver::end_capture`]
    EndCapture(StreamId, GraphId),
    /// What the graph holds follows, as if it were asked for one by one.
    LaunchGraph(GraphId, StreamId),
    /// [`Driver::destroy_graph`]
    DestroyGraph(GraphId),
}

impl Call {
    /// Whether it is device work that stands in a queue and that a capture records.
    #[must_use]
    pub const fn is_work(&self) -> bool {
        matches!(
            self,
            Self::CopyOnDevice(..) | Self::SetBytes(..) | Self::Launch(..) | Self::Gemm(..)
        )
    }
}

#[derive(Default)]
struct State {
    calls: Vec<Call>,
    /// Number of the call that fails, from 0, and how.
    fails: Option<(usize, Severity)>,
    /// Every call by name, failed ones too.
    asked: Vec<&'static str>,
    lost: Option<DriverError>,
    handles: u64,
    next_address: u64,
    memory: BTreeMap<u64, Vec<u8>>,
    pinned: BTreeMap<usize, usize>,
    streams: BTreeSet<StreamId>,
    /// Streams with work of others' that is not done, and the ranges that it uses.
    busy: BTreeMap<StreamId, Vec<(Address, usize)>>,
    events: BTreeSet<EventId>,
    graphs: BTreeMap<GraphId, Vec<Call>>,
    capturing: BTreeMap<StreamId, Vec<Call>>,
    kernels: BTreeMap<KernelId, &'static str>,
    plans: BTreeMap<PlanId, GemmKey>,
}

/// The driver; clones share one record, so a test keeps one and gives one away.
#[derive(Clone)]
pub struct RecordingDriver {
    facts: Arc<DeviceFacts>,
    state: Arc<Mutex<State>>,
}

impl Default for RecordingDriver {
    fn default() -> Self {
        Self::new()
    }
}

impl RecordingDriver {
    /// A driver that has been asked nothing.
    #[must_use]
    pub fn new() -> Self {
        let facts = DeviceFacts {
            name: "recorder".to_owned(),
            bus_id: "recorder".to_owned(),
            capability: (9, 0),
            multiprocessors: 1,
            memory_bytes: usize::MAX,
            shared_bytes_max: 0,
            numeric_libraries: vec![("recording".to_owned(), "1".to_owned())],
            driver_version: 0,
        };
        Self {
            facts: Arc::new(facts),
            state: Arc::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the call of this number, counted from 0 and from the driver's first call on, fail.
    pub fn fail(&self, number: usize, severity: Severity) {
        self.lock().fails = Some((number, severity));
    }

    /// The names of all calls so far, in order; failed ones too.
    #[must_use]
    pub fn asked(&self) -> Vec<&'static str> {
        self.lock().asked.clone()
    }

    /// Takes the calls since the last time.
    #[must_use]
    pub fn take(&self) -> Vec<Call> {
        std::mem::take(&mut self.lock().calls)
    }

    /// Overwrites device memory, as a kernel would.
    ///
    /// # Panics
    /// If it is not allocated.
    pub fn poke(&self, to: Address, bytes: &[u8]) {
        self.lock().range(to, bytes.len()).copy_from_slice(bytes);
    }

    /// Bytes of device memory.
    ///
    /// # Panics
    /// If they are not allocated.
    #[must_use]
    pub fn peek(&self, from: Address, bytes: usize) -> Vec<u8> {
        self.lock().range(from, bytes).to_vec()
    }

    /// Work that this driver was not asked for stands in a queue and uses these ranges, until [`RecordingDriver::settle`].
    /// Until then none of them may be freed, nobody may wait for the queue, and it may not be given back: a real driver would
    /// wait, perhaps for ever.
    ///
    /// # Panics
    /// If the queue is not there or a range is not allocated.
    pub fn occupy(&self, stream: StreamId, ranges: &[(Address, usize)]) {
        let mut state = self.lock();
        assert!(state.streams.contains(&stream), "{stream:?} is not there");
        for &(at, bytes) in ranges {
            let _ = state.range(at, bytes);
        }
        state.busy.entry(stream).or_default().extend_from_slice(ranges);
    }

    /// What a queue was occupied by is done.
    pub fn settle(&self, stream: StreamId) {
        self.lock().busy.remove(&stream);
    }

    /// Everything that was not given back, in words; empty where all was.
    #[must_use]
    pub fn left(&self) -> Vec<String> {
        let state = self.lock();
        let mut left = Vec::new();
        left.extend(
            state
                .memory
                .values()
                .map(|memory| format!("{} bytes of device memory", memory.len())),
        );
        left.extend(
            state
                .pinned
                .values()
                .map(|bytes| format!("{bytes} bytes of pinned memory")),
        );
        left.extend(state.streams.iter().map(|stream| format!("{stream:?}")));
        left.extend(state.events.iter().map(|event| format!("{event:?}")));
        left.extend(state.graphs.keys().map(|graph| format!("{graph:?}")));
        left.extend(state.capturing.keys().map(|stream| format!("a capture on {stream:?}")));
        left
    }
}

impl State {
    /// Counts a call, and fails it where it is to fail. After a sticky error every call repeats it.
    fn enter(&mut self, call: &'static str) -> Result<(), DriverError> {
        let number = self.asked.len();
        self.asked.push(call);
        if let Some(lost) = &self.lost {
            return Err(lost.clone());
        }
        match self.fails {
            Some((at, severity)) if at == number => {
                let error = failure(call, severity);
                if severity == Severity::Sticky {
                    self.lost = Some(error.clone());
                }
                Err(error)
            }
            _ => Ok(()),
        }
    }

    fn handle(&mut self) -> u64 {
        self.handles += 1;
        self.handles
    }

    /// The bytes of a range of device memory.
    fn range(&mut self, at: Address, bytes: usize) -> &mut [u8] {
        let found = self.memory.range_mut(..=at.0).next_back();
        let Some((base, memory)) = found else {
            panic!("{at:?} is below all memory")
        };
        let start = (at.0 - base) as usize;
        assert!(
            start + bytes <= memory.len(),
            "{bytes} bytes at {start} in an allocation of {}, or in none",
            memory.len()
        );
        &mut memory[start..start + bytes]
    }

    /// Work of a queue: recorded in a capture, else written down and done.
    fn work(&mut self, stream: StreamId, call: Call) {
        assert!(self.streams.contains(&stream), "{stream:?} is not there");
        if let Some(captured) = self.capturing.get_mut(&stream) {
            captured.push(call);
        } else {
            self.perform(call);
        }
    }

    fn perform(&mut self, call: Call) {
        match &call {
            Call::CopyOnDevice(_, to, from, bytes) => {
                assert!(
                    to.0 + *bytes as u64 <= from.0 || from.0 + *bytes as u64 <= to.0,
                    "a copy onto itself: {call:?}"
                );
                let copied = self.range(*from, *bytes).to_vec();
                self.range(*to, *bytes).copy_from_slice(&copied);
            }
            Call::SetBytes(_, to, value, bytes) => self.range(*to, *bytes).fill(*value),
            Call::Launch(_, _, values) => {
                for value in values {
                    if let Value::Pointer(at @ 1..) = value {
                        let _ = self.range(Address(*at), 0);
                    }
                }
            }
            Call::Gemm(_, _, _, operands, workspace) => {
                for operand in operands {
                    assert!(operand.is_aligned(GEMM_ALIGNMENT_BYTES), "{call:?}");
                    let _ = self.range(*operand, 0);
                }
                let _ = self.range(*workspace, GEMM_WORKSPACE_BYTES);
            }
            _ => {}
        }
        self.calls.push(call);
    }

    /// A real driver waits here for work that may never end.
    fn idle(&self, stream: StreamId, what: &str) {
        assert!(!self.busy.contains_key(&stream), "{stream:?} is {what} with work in it");
    }

    /// A wait or a change of memory: a real driver ends a capture by it.
    fn outside_capture(&self, stream: StreamId, what: &str) {
        assert!(!self.capturing.contains_key(&stream), "{what} in a capture");
    }
}

impl Driver for RecordingDriver {
    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn make_current(&self) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.enter("make_current")?;
        state.calls.push(Call::MakeCurrent);
        Ok(())
    }

    fn memory(&self) -> Result<MemoryState, DriverError> {
        let mut state = self.lock();
        state.enter("memory")?;
        state.calls.push(Call::Memory);
        Ok(MemoryState {
            free_bytes: 0,
            total_bytes: self.facts.memory_bytes,
        })
    }

    fn create_stream(&self) -> Result<StreamId, DriverError> {
        let mut state = self.lock();
        state.enter("create_stream")?;
        let stream = StreamId(state.handle());
        state.streams.insert(stream);
        state.calls.push(Call::CreateStream(stream));
        Ok(stream)
    }

    fn destroy_stream(&self, stream: StreamId) -> Result<(), DriverError> {
        let mut state = self.lock();
        assert!(state.streams.remove(&stream), "{stream:?} is given back twice");
        state.idle(stream, "given back");
        state.capturing.remove(&stream);
        state.enter("destroy_stream")?;
        state.calls.push(Call::DestroyStream(stream));
        Ok(())
    }

    fn synchronize(&self, stream: StreamId) -> Result<(), DriverError> {
        let mut state = self.lock();
        assert!(state.streams.contains(&stream), "{stream:?} is not there");
        state.outside_capture(stream, "a wait");
        state.idle(stream, "waited for");
        state.enter("synchronize")?;
        state.calls.push(Call::Synchronize(stream));
        Ok(())
    }

    fn is_idle(&self, stream: StreamId) -> Result<bool, DriverError> {
        let mut state = self.lock();
        assert!(state.streams.contains(&stream), "{stream:?} is not there");
        state.outside_capture(stream, "a question");
        state.enter("is_idle")?;
        state.calls.push(Call::IsIdle(stream));
        Ok(!state.busy.contains_key(&stream))
    }

    fn create_event(&self) -> Result<EventId, DriverError> {
        let mut state = self.lock();
        state.enter("create_event")?;
        let event = EventId(state.handle());
        state.events.insert(event);
        state.calls.push(Call::CreateEvent(event));
        Ok(event)
    }

    fn destroy_event(&self, event: EventId) -> Result<(), DriverError> {
        let mut state = self.lock();
        assert!(state.events.remove(&event), "{event:?} is given back twice");
        state.enter("destroy_event")?;
        state.calls.push(Call::DestroyEvent(event));
        Ok(())
    }

    fn record(&self, event: EventId, stream: StreamId) -> Result<(), DriverError> {
        let mut state = self.lock();
        assert!(state.events.contains(&event) && state.streams.contains(&stream));
        state.outside_capture(stream, "an event");
        state.enter("record")?;
        state.calls.push(Call::Record(event, stream));
        Ok(())
    }

    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DriverError> {
        let mut state = self.lock();
        assert!(state.events.contains(&event) && state.streams.contains(&stream));
        state.outside_capture(stream, "an event");
        state.enter("wait")?;
        state.calls.push(Call::Wait(stream, event));
        Ok(())
    }

    fn synchronize_event(&self, event: EventId) -> Result<(), DriverError> {
        let mut state = self.lock();
        assert!(state.events.contains(&event), "{event:?} is not there");
        state.enter("synchronize_event")?;
        state.calls.push(Call::SynchronizeEvent(event));
        Ok(())
    }

    fn elapsed_ms(&self, start: EventId, end: EventId) -> Result<f32, DriverError> {
        let mut state = self.lock();
        assert!(state.events.contains(&start) && state.events.contains(&end));
        state.enter("elapsed_ms")?;
        state.calls.push(Call::Elapsed(start, end));
        Ok(0.0)
    }

    fn alloc(&self, bytes: usize) -> Result<Address, DriverError> {
        let mut state = self.lock();
        assert!(bytes > 0, "no driver allocates nothing");
        state.enter("alloc")?;
        // Zeroed by the system, which touches no page; what a caller sees first is a quiet NaN in either precision.
        let mut memory = vec![0; bytes];
        memory[..bytes.min(POISONED_BYTES)].fill(0xFF);
        let address = Address(BASE + state.next_address);
        state.next_address += (bytes as u64).next_multiple_of(ALIGNMENT_BYTES as u64) + GAP_BYTES;
        state.memory.insert(address.0, memory);
        state.calls.push(Call::Alloc(bytes, address));
        Ok(address)
    }

    unsafe fn free(&self, address: Address) -> Result<(), DriverError> {
        let mut state = self.lock();
        let Some(memory) = state.memory.remove(&address.0) else {
            panic!("{address:?} is given back twice")
        };
        let freed = address.0..address.0 + memory.len() as u64;
        let mut used = state.busy.values().flatten();
        assert!(
            !used.any(|(at, _)| freed.contains(&at.0)),
            "{address:?} is given back while work uses it"
        );
        state.enter("free")?;
        state.calls.push(Call::Free(address));
        Ok(())
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<NonNull<u8>, DriverError> {
        let mut state = self.lock();
        state.enter("alloc_pinned")?;
        let refused = || failure("alloc_pinned", Severity::OutOfMemory);
        assert!(bytes > 0, "no driver allocates nothing");
        let layout = Layout::from_size_align(bytes, ALIGNMENT_BYTES).map_err(|_| refused())?;
        // SAFETY: the layout's size is not zero.
        let pointer = NonNull::new(unsafe { alloc_zeroed(layout) }).ok_or_else(refused)?;
        state.pinned.insert(pointer.as_ptr().addr(), bytes);
        state.calls.push(Call::AllocPinned(bytes));
        Ok(pointer)
    }

    unsafe fn free_pinned(&self, pointer: NonNull<u8>) -> Result<(), DriverError> {
        let mut state = self.lock();
        let Some(bytes) = state.pinned.remove(&pointer.as_ptr().addr()) else {
            panic!("pinned memory is given back twice")
        };
        if let Ok(layout) = Layout::from_size_align(bytes, ALIGNMENT_BYTES) {
            // SAFETY: the memory came from `alloc_zeroed` with this layout, and was in the list, so it was not freed yet.
            unsafe { dealloc(pointer.as_ptr(), layout) }
        }
        state.enter("free_pinned")?;
        state.calls.push(Call::FreePinned);
        Ok(())
    }

    unsafe fn copy_to_device(
        &self,
        stream: StreamId,
        to: Address,
        from: *const u8,
        bytes: usize,
    ) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.outside_capture(stream, "host data");
        state.enter("copy_to_device")?;
        assert!(state.streams.contains(&stream), "{stream:?} is not there");
        assert_pinned(&state, from.addr(), bytes);
        // SAFETY: the range lies in pinned memory that is live, and the caller does not write it meanwhile.
        let source = unsafe { std::slice::from_raw_parts(from, bytes) };
        state.range(to, bytes).copy_from_slice(source);
        state.calls.push(Call::CopyToDevice(stream, to, bytes));
        Ok(())
    }

    unsafe fn copy_to_host(
        &self,
        stream: StreamId,
        to: *mut u8,
        from: Address,
        bytes: usize,
    ) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.outside_capture(stream, "host data");
        state.enter("copy_to_host")?;
        assert!(state.streams.contains(&stream), "{stream:?} is not there");
        assert_pinned(&state, to.addr(), bytes);
        let source = state.range(from, bytes);
        // SAFETY: the range lies in pinned memory that is live and that the caller does not touch meanwhile; it is apart
        // from the recorder's own.
        unsafe { std::ptr::copy_nonoverlapping(source.as_ptr(), to, bytes) };
        state.calls.push(Call::CopyToHost(stream, from, bytes));
        Ok(())
    }

    unsafe fn copy_on_device(
        &self,
        stream: StreamId,
        to: Address,
        from: Address,
        bytes: usize,
    ) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.enter("copy_on_device")?;
        state.work(stream, Call::CopyOnDevice(stream, to, from, bytes));
        Ok(())
    }

    unsafe fn set_bytes(&self, stream: StreamId, to: Address, value: u8, bytes: usize) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.enter("set_bytes")?;
        state.work(stream, Call::SetBytes(stream, to, value, bytes));
        Ok(())
    }

    fn load(&self, entry: &'static Entry) -> Result<KernelId, DriverError> {
        let mut state = self.lock();
        state.enter("load")?;
        let kernel = KernelId(state.handle());
        state.kernels.insert(kernel, entry.name);
        state.calls.push(Call::Load(entry.name));
        Ok(kernel)
    }

    unsafe fn launch(
        &self,
        stream: StreamId,
        kernel: KernelId,
        launch: &Launch,
        arguments: &[Value],
    ) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.enter("launch")?;
        assert_eq!(state.kernels.get(&kernel), Some(&launch.entry.name), "another kernel");
        assert!(!launch.is_empty(), "a driver refuses an empty grid");
        state.work(stream, Call::Launch(stream, *launch, arguments.to_vec()));
        Ok(())
    }

    fn plan_gemm(&self, key: &GemmKey) -> Result<GemmPlan, DriverError> {
        let mut state = self.lock();
        state.enter("plan_gemm")?;
        let id = PlanId(state.handle());
        state.plans.insert(id, *key);
        state.calls.push(Call::Plan(*key));
        Ok(GemmPlan {
            id,
            algorithm: "none".to_owned(),
            workspace_bytes: GEMM_WORKSPACE_BYTES,
        })
    }

    unsafe fn gemm(
        &self,
        stream: StreamId,
        plan: &GemmPlan,
        alpha: f32,
        operands: [Address; 3],
        workspace: Address,
    ) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.enter("gemm")?;
        let Some(&key) = state.plans.get(&plan.id) else {
            panic!("{plan:?} is another driver's")
        };
        state.work(stream, Call::Gemm(stream, key, alpha, operands, workspace));
        Ok(())
    }

    fn begin_capture(&self, stream: StreamId) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.enter("begin_capture")?;
        state.outside_capture(stream, "a capture");
        state.capturing.insert(stream, Vec::new());
        state.calls.push(Call::BeginCapture(stream));
        Ok(())
    }

    fn end_capture(&self, stream: StreamId) -> Result<GraphId, DriverError> {
        let mut state = self.lock();
        let Some(captured) = state.capturing.remove(&stream) else {
            panic!("no capture on {stream:?}")
        };
        state.enter("end_capture")?;
        let graph = GraphId(state.handle());
        state.graphs.insert(graph, captured);
        state.calls.push(Call::EndCapture(stream, graph));
        Ok(graph)
    }

    unsafe fn launch_graph(&self, graph: GraphId, stream: StreamId) -> Result<(), DriverError> {
        let mut state = self.lock();
        state.enter("launch_graph")?;
        let Some(captured) = state.graphs.get(&graph).cloned() else {
            panic!("{graph:?} is not there")
        };
        state.calls.push(Call::LaunchGraph(graph, stream));
        for call in captured {
            state.perform(call);
        }
        Ok(())
    }

    fn destroy_graph(&self, graph: GraphId) -> Result<(), DriverError> {
        let mut state = self.lock();
        assert!(state.graphs.remove(&graph).is_some(), "{graph:?} is given back twice");
        state.enter("destroy_graph")?;
        state.calls.push(Call::DestroyGraph(graph));
        Ok(())
    }
}

/// An error of that severity, as a driver would word it.
fn failure(call: &'static str, severity: Severity) -> DriverError {
    let name = match severity {
        Severity::OutOfMemory => "CUDA_ERROR_OUT_OF_MEMORY",
        Severity::Refused => "CUDA_ERROR_INVALID_VALUE",
        Severity::Sticky => "CUDA_ERROR_ILLEGAL_ADDRESS",
    };
    DriverError {
        call,
        severity,
        name: name.to_owned(),
        detail: String::new(),
    }
}

fn assert_pinned(state: &State, address: usize, bytes: usize) {
    let found = state.pinned.range(..=address).next_back();
    assert!(
        found.is_some_and(|(base, len)| address + bytes <= base + len),
        "{bytes} bytes of host memory that is not pinned"
    );
}
