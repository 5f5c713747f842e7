//! The driver over the machine's own libraries: libcuda, NVRTC and cuBLASLt, loaded at run time through `cudarc`.
//!
//! Nothing of CUDA is needed to build this, and its absence is an ordinary answer ([`Absence`]). The order of
//! [`RealDriver::open`] matters: bindings panic at the first call into a library that is not there, so each is looked for
//! before it is called.
//!
//! A context is current in a thread, so every call makes it so first.

mod cublaslt;
mod nvrtc;

use super::cubin::{self, CubinCache, Origin};
use super::driver::*;
use super::table::{self, Entry, Launch, Source, Value};
use cublaslt::CublasLt;
use cudarc::driver::sys::{self, CUresult};
use nvrtc::Nvrtc;
use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_int, c_void};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The oldest device whose instructions the kernels use: bf16 tensor cores and asynchronous copies.
const CAPABILITY_MIN: (u32, u32) = (8, 0);
/// Dynamic shared memory that a kernel may have without being allowed to.
const SHARED_BYTES_FREE: u32 = 48 << 10;
/// The first driver with the timing call of CUDA 13's interface.
const DRIVER_WITH_TIMING: u32 = 12_080;

/// A handle as the foreign side knows it.
fn handle<T>(number: u64) -> *mut T {
    std::ptr::with_exposed_provenance_mut(number as usize)
}

/// A foreign handle as a number.
fn number<T>(pointer: *mut T) -> u64 {
    pointer.expose_provenance() as u64
}

fn name_of(code: CUresult) -> String {
    let mut text = std::ptr::null();
    // SAFETY: the target is valid for the write of a pointer.
    let named = unsafe { sys::cuGetErrorName(code, &raw mut text) };
    if named != CUresult::CUDA_SUCCESS || text.is_null() {
        return format!("error {}", code as u32);
    }
    // SAFETY: the driver gave a static text that ends with a zero byte.
    unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
}

fn check(call: &'static str, code: CUresult) -> Result<(), DriverError> {
    if code == CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    Err(DriverError {
        call,
        severity: severity(code as u32),
        name: name_of(code),
        detail: String::new(),
    })
}

fn refused(call: &'static str, detail: String) -> DriverError {
    DriverError {
        call,
        severity: Severity::Refused,
        name: "refused".to_owned(),
        detail,
    }
}

/// A kernel, and how much dynamic shared memory it is allowed so far.
struct Function {
    /// As a number.
    handle: u64,
    allowed: AtomicU32,
}

/// The driver of one device.
pub struct RealDriver {
    device: sys::CUdevice,
    context: sys::CUcontext,
    facts: DeviceFacts,
    compiler: Nvrtc,
    architecture: String,
    cubins: CubinCache,
    modules: Mutex<BTreeMap<&'static str, sys::CUmodule>>,
    origins: Mutex<Vec<(&'static str, Origin)>>,
    functions: Mutex<Vec<Arc<Function>>>,
    /// Taken first when the driver goes, while its context is there.
    products: Option<CublasLt>,
}

// SAFETY: the driver interface allows every handle in every thread whose current context it belongs to, and each call here
// makes the context current; what changes is locked.
unsafe impl Send for RealDriver {}
// SAFETY: as above.
unsafe impl Sync for RealDriver {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many CUDA devices this machine has.
///
/// # Errors
/// [`Absence`], if there is none.
pub fn device_count() -> Result<u32, Absence> {
    // SAFETY: it tries to open a library by its names; that runs the library's initialisers, as any use of it does.
    if !unsafe { sys::is_culib_present() } {
        let library = "libcuda.so.1";
        return Err(Absence::Library { library });
    }
    // SAFETY: it takes no pointer, and comes before all others.
    let started = check("cuInit", unsafe { sys::cuInit(0) });
    if matches!(&started, Err(error) if error.name == "CUDA_ERROR_NO_DEVICE") {
        return Err(Absence::NoDevice);
    }
    started?;
    let mut count: c_int = 0;
    // SAFETY: the target is valid for the write of an int.
    check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&raw mut count) })?;
    match u32::try_from(count) {
        Ok(0) | Err(_) => Err(Absence::NoDevice),
        Ok(count) => Ok(count),
    }
}

fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<u32, DriverError> {
    let mut value: c_int = 0;
    // SAFETY: the target is valid for the write of an int, and the driver gave the device.
    check("cuDeviceGetAttribute", unsafe {
        sys::cuDeviceGetAttribute(&raw mut value, which, device)
    })?;
    Ok(u32::try_from(value).unwrap_or(0))
}

/// What the driver itself knows of a device.
fn facts_of(device: sys::CUdevice) -> Result<DeviceFacts, DriverError> {
    use sys::CUdevice_attribute as Attribute;
    const NAME_BYTES: usize = 128;
    let mut name = [0_u8; NAME_BYTES];
    // SAFETY: the buffer has the length that is said.
    check("cuDeviceGetName", unsafe {
        sys::cuDeviceGetName(name.as_mut_ptr().cast(), NAME_BYTES as c_int, device)
    })?;
    let name = CStr::from_bytes_until_nul(&name).map_or_else(|_| "?".into(), CStr::to_string_lossy);
    let (mut memory_bytes, mut driver_version) = (0, 0);
    // SAFETY: the target is valid for the write.
    check("cuDeviceTotalMem", unsafe {
        sys::cuDeviceTotalMem_v2(&raw mut memory_bytes, device)
    })?;
    // SAFETY: as above.
    check("cuDriverGetVersion", unsafe {
        sys::cuDriverGetVersion(&raw mut driver_version)
    })?;
    Ok(DeviceFacts {
        name: name.into_owned(),
        bus_id: format!(
            "{:04x}:{:02x}:{:02x}",
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_PCI_DOMAIN_ID)?,
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_PCI_BUS_ID)?,
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_PCI_DEVICE_ID)?
        ),
        capability: (
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        multiprocessors: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
        memory_bytes,
        shared_bytes_max: attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize,
        numeric_libraries: Vec::new(),
        driver_version: u32::try_from(driver_version).unwrap_or(0),
    })
}

/// A device that can be used, with all that its driver needs, and nothing taken yet.
struct Found {
    device: sys::CUdevice,
    facts: DeviceFacts,
    compiler: Nvrtc,
    architecture: String,
}

fn find(ordinal: u32) -> Result<Found, Absence> {
    let count = device_count()?;
    if ordinal >= count {
        return Err(Absence::Ordinal { ordinal, count });
    }
    let mut device = 0;
    // SAFETY: the target is valid for the write.
    check("cuDeviceGet", unsafe {
        sys::cuDeviceGet(&raw mut device, ordinal as c_int)
    })?;
    let mut facts = facts_of(device)?;
    if facts.capability < CAPABILITY_MIN {
        let DeviceFacts { name, capability, .. } = facts;
        return Err(Absence::TooOld { name, capability });
    }
    let compiler = Nvrtc::open()?;
    driver_loads(facts.driver_version, compiler.major())?;
    let architecture = cubin::architecture(facts.capability, &compiler.architectures)
        .map_err(|cause| refused("nvrtcGetSupportedArchs", cause))?;
    facts.numeric_libraries = vec![
        ("cublaslt".to_owned(), cublaslt::version()?),
        ("nvrtc".to_owned(), cubin::Compiler::version(&compiler)),
        ("code".to_owned(), architecture.clone()),
        ("kernels".to_owned(), cubin::sources_digest()),
    ];
    Ok(Found {
        device,
        facts,
        compiler,
        architecture,
    })
}

/// What there is to know of the device of this number, from 0, if it can be used. Takes nothing of it: no context, no
/// memory.
///
/// # Errors
/// [`Absence`]: an ordinary answer, in one line.
pub fn probe(ordinal: u32) -> Result<DeviceFacts, Absence> {
    find(ordinal).map(|found| found.facts)
}

/// Compiles every kernel for the device of this number into `cubins`, so that processes that open it next find them.
/// Takes nothing of the device.
///
/// # Errors
/// [`Absence`]; where a source does not compile, with the compiler's log.
pub fn prepare(ordinal: u32, cubins: &CubinCache) -> Result<(), Absence> {
    let found = find(ordinal)?;
    for source in table::SOURCES {
        cubins.get(&found.compiler, source, &table::HEADERS, &found.architecture)?;
    }
    Ok(())
}

/// A device's context, given back when dropped before a driver takes it over.
struct Retained(sys::CUdevice);

impl Drop for Retained {
    fn drop(&mut self) {
        // SAFETY: it was retained, and is released once.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.0) };
    }
}

impl RealDriver {
    /// Opens the device of this number, from 0. Cubins are kept in `cubins`.
    ///
    /// # Errors
    /// [`Absence`]: an ordinary answer, in one line.
    pub fn open(ordinal: u32, cubins: CubinCache) -> Result<Self, Absence> {
        let Found {
            device,
            facts,
            compiler,
            architecture,
        } = find(ordinal)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the target is valid for the write, and the driver gave the device.
        check("cuDevicePrimaryCtxRetain", unsafe {
            sys::cuDevicePrimaryCtxRetain(&raw mut context, device)
        })?;
        let retained = Retained(device);
        // SAFETY: the context is retained.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(context) })?;
        let products = CublasLt::open()?;
        std::mem::forget(retained);
        Ok(Self {
            device,
            context,
            facts,
            compiler,
            architecture,
            cubins,
            modules: Mutex::default(),
            origins: Mutex::default(),
            functions: Mutex::default(),
            products: Some(products),
        })
    }

    /// How each source's code was come by.
    #[must_use]
    pub fn origins(&self) -> Vec<(&'static str, Origin)> {
        lock(&self.origins).clone()
    }

    /// Makes the context current in this thread.
    fn enter(&self) -> Result<(), DriverError> {
        // SAFETY: the context is retained for as long as the driver lives.
        check("cuCtxSetCurrent", unsafe { sys::cuCtxSetCurrent(self.context) })
    }

    /// A source's module, compiled and loaded at its first use.
    fn module(&self, source: &'static Source) -> Result<sys::CUmodule, DriverError> {
        let mut modules = lock(&self.modules);
        if let Some(&module) = modules.get(source.file) {
            return Ok(module);
        }
        let (code, origin) = self
            .cubins
            .get(&self.compiler, source, &table::HEADERS, &self.architecture)?;
        let mut module = std::ptr::null_mut();
        // SAFETY: the code came from the compiler, or from a file whose hash fits; the driver copies it.
        check("cuModuleLoadData", unsafe {
            sys::cuModuleLoadData(&raw mut module, code.as_ptr().cast())
        })?;
        modules.insert(source.file, module);
        lock(&self.origins).push((source.file, origin));
        Ok(module)
    }

    /// Lets a kernel have more dynamic shared memory than is free to all.
    fn allow(function: &Function, bytes: u32) -> Result<(), DriverError> {
        let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        if bytes <= function.allowed.load(Ordering::Acquire) {
            return Ok(());
        }
        // SAFETY: the function is loaded.
        check("cuFuncSetAttribute", unsafe {
            sys::cuFuncSetAttribute(handle(function.handle), attribute, bytes as c_int)
        })
        .map_err(|error| DriverError {
            detail: format!("{bytes} bytes of shared memory"),
            ..error
        })?;
        function.allowed.fetch_max(bytes, Ordering::AcqRel);
        Ok(())
    }
}

impl Drop for RealDriver {
    fn drop(&mut self) {
        let entered = self.enter();
        self.products = None;
        if entered.is_ok() {
            for module in lock(&self.modules).values() {
                // SAFETY: it was loaded, no stream is left that could launch from it, and it is unloaded once.
                let _ = unsafe { sys::cuModuleUnload(*module) };
            }
        }
        drop(Retained(self.device));
    }
}

impl Driver for RealDriver {
    fn facts(&self) -> &DeviceFacts {
        &self.facts
    }

    fn make_current(&self) -> Result<(), DriverError> {
        self.enter()
    }

    fn memory(&self) -> Result<MemoryState, DriverError> {
        self.enter()?;
        let (mut free_bytes, mut total_bytes) = (0, 0);
        // SAFETY: both are valid for the write.
        check("cuMemGetInfo", unsafe {
            sys::cuMemGetInfo_v2(&raw mut free_bytes, &raw mut total_bytes)
        })?;
        Ok(MemoryState {
            free_bytes,
            total_bytes,
        })
    }

    fn create_stream(&self) -> Result<StreamId, DriverError> {
        self.enter()?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: the target is valid for the write.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&raw mut stream, flags) })?;
        Ok(StreamId(number(stream)))
    }

    fn destroy_stream(&self, stream: StreamId) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: the stream came from `create_stream`.
        let done = check("cuStreamSynchronize", unsafe {
            sys::cuStreamSynchronize(handle(stream.0))
        });
        // SAFETY: as above; it is given back once.
        check("cuStreamDestroy", unsafe { sys::cuStreamDestroy_v2(handle(stream.0)) })?;
        done
    }

    fn synchronize(&self, stream: StreamId) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: the stream came from `create_stream`.
        check("cuStreamSynchronize", unsafe {
            sys::cuStreamSynchronize(handle(stream.0))
        })
    }

    fn is_idle(&self, stream: StreamId) -> Result<bool, DriverError> {
        self.enter()?;
        // SAFETY: the stream came from `create_stream`.
        match unsafe { sys::cuStreamQuery(handle(stream.0)) } {
            CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => check("cuStreamQuery", code).map(|()| true),
        }
    }

    fn create_event(&self) -> Result<EventId, DriverError> {
        self.enter()?;
        let mut event = std::ptr::null_mut();
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT as u32;
        // SAFETY: the target is valid for the write.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&raw mut event, flags) })?;
        Ok(EventId(number(event)))
    }

    fn destroy_event(&self, event: EventId) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: the event came from `create_event`, and is given back once.
        check("cuEventDestroy", unsafe { sys::cuEventDestroy_v2(handle(event.0)) })
    }

    fn record(&self, event: EventId, stream: StreamId) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: both are live.
        check("cuEventRecord", unsafe {
            sys::cuEventRecord(handle(event.0), handle(stream.0))
        })
    }

    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: both are live; there are no flags.
        check("cuStreamWaitEvent", unsafe {
            sys::cuStreamWaitEvent(handle(stream.0), handle(event.0), 0)
        })
    }

    fn synchronize_event(&self, event: EventId) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: the event is live.
        check("cuEventSynchronize", unsafe {
            sys::cuEventSynchronize(handle(event.0))
        })
    }

    fn elapsed_ms(&self, start: EventId, end: EventId) -> Result<f32, DriverError> {
        self.enter()?;
        if self.facts.driver_version < DRIVER_WITH_TIMING {
            let version = self.facts.driver_version;
            return Err(refused(
                "cuEventElapsedTime",
                format!("driver {version} is older than {DRIVER_WITH_TIMING}: update it to measure"),
            ));
        }
        let mut milliseconds = 0.0;
        // SAFETY: the target is valid for the write, and both events are live.
        check("cuEventElapsedTime", unsafe {
            sys::cuEventElapsedTime_v2(&raw mut milliseconds, handle(start.0), handle(end.0))
        })?;
        Ok(milliseconds)
    }

    fn alloc(&self, bytes: usize) -> Result<Address, DriverError> {
        self.enter()?;
        let mut address = 0;
        // SAFETY: the target is valid for the write.
        let code = unsafe { sys::cuMemAlloc_v2(&raw mut address, bytes) };
        check("cuMemAlloc", code).map_err(|error| DriverError {
            detail: format!("{bytes} bytes"),
            ..error
        })?;
        Ok(Address(address))
    }

    unsafe fn free(&self, address: Address) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: a context is current.
        let done = check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() });
        // SAFETY: the address came from `alloc`, is given back once, and all work is done.
        check("cuMemFree", unsafe { sys::cuMemFree_v2(address.0) })?;
        done
    }

    fn alloc_pinned(&self, bytes: usize) -> Result<NonNull<u8>, DriverError> {
        self.enter()?;
        let mut pointer: *mut c_void = std::ptr::null_mut();
        // SAFETY: the target is valid for the write; there are no flags.
        let code = unsafe { sys::cuMemHostAlloc(&raw mut pointer, bytes, 0) };
        check("cuMemHostAlloc", code).map_err(|error| DriverError {
            detail: format!("{bytes} bytes of pinned memory"),
            ..error
        })?;
        let Some(pointer) = NonNull::new(pointer.cast::<u8>()) else {
            return Err(refused("cuMemHostAlloc", "a null pointer".to_owned()));
        };
        // SAFETY: the memory was just allocated with that length, and nobody else has it.
        unsafe { pointer.write_bytes(0, bytes) };
        Ok(pointer)
    }

    unsafe fn free_pinned(&self, pointer: NonNull<u8>) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: the pointer came from `alloc_pinned`, is given back once, and no copy uses it.
        check("cuMemFreeHost", unsafe { sys::cuMemFreeHost(pointer.as_ptr().cast()) })
    }

    unsafe fn copy_to_device(
        &self,
        stream: StreamId,
        to: Address,
        from: *const u8,
        bytes: usize,
    ) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: the caller's promise.
        check("cuMemcpyHtoDAsync", unsafe {
            sys::cuMemcpyHtoDAsync_v2(to.0, from.cast(), bytes, handle(stream.0))
        })
    }

    unsafe fn copy_to_host(
        &self,
        stream: StreamId,
        to: *mut u8,
        from: Address,
        bytes: usize,
    ) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: the caller's promise.
        check("cuMemcpyDtoHAsync", unsafe {
            sys::cuMemcpyDtoHAsync_v2(to.cast(), from.0, bytes, handle(stream.0))
        })
    }

    unsafe fn copy_on_device(
        &self,
        stream: StreamId,
        to: Address,
        from: Address,
        bytes: usize,
    ) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: the caller's promise.
        check("cuMemcpyDtoDAsync", unsafe {
            sys::cuMemcpyDtoDAsync_v2(to.0, from.0, bytes, handle(stream.0))
        })
    }

    unsafe fn set_bytes(&self, stream: StreamId, to: Address, value: u8, bytes: usize) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: the caller's promise.
        check("cuMemsetD8Async", unsafe {
            sys::cuMemsetD8Async(to.0, value, bytes, handle(stream.0))
        })
    }

    fn load(&self, entry: &'static Entry) -> Result<KernelId, DriverError> {
        self.enter()?;
        let module = self.module(entry.source)?;
        let name = CString::new(entry.name).map_err(|e| refused("cuModuleGetFunction", e.to_string()))?;
        let mut function = std::ptr::null_mut();
        // SAFETY: the target is valid for the write, the module is loaded, and the name ends with a zero byte.
        let code = unsafe { sys::cuModuleGetFunction(&raw mut function, module, name.as_ptr()) };
        check("cuModuleGetFunction", code).map_err(|error| DriverError {
            detail: format!("{} in {}", entry.name, entry.source.file),
            ..error
        })?;
        let mut functions = lock(&self.functions);
        functions.push(Arc::new(Function {
            handle: number(function),
            allowed: AtomicU32::new(SHARED_BYTES_FREE),
        }));
        Ok(KernelId(functions.len() as u64 - 1))
    }

    unsafe fn launch(
        &self,
        stream: StreamId,
        kernel: KernelId,
        launch: &Launch,
        arguments: &[Value],
    ) -> Result<(), DriverError> {
        self.enter()?;
        let found = usize::try_from(kernel.0)
            .ok()
            .and_then(|id| lock(&self.functions).get(id).cloned());
        let Some(function) = found else {
            return Err(refused("cuLaunchKernel", format!("{kernel:?} of another driver")));
        };
        Self::allow(&function, launch.shared_bytes)?;
        // Each value in eight bytes of its own, at whose start the kernel's parameter is read in its own size.
        let values: Vec<[u8; 8]> = arguments.iter().map(|value| encode(*value)).collect();
        let mut parameters: Vec<*mut c_void> = values.iter().map(|value| value.as_ptr().cast_mut().cast()).collect();
        let ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]) = (launch.grid, launch.block);
        // SAFETY: the function is loaded; the parameters are as the kernel declares them, by the caller's promise, and are
        // read before the call returns.
        let code = unsafe {
            sys::cuLaunchKernel(
                handle(function.handle),
                grid_x,
                grid_y,
                grid_z,
                block_x,
                block_y,
                block_z,
                launch.shared_bytes,
                handle(stream.0),
                parameters.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check("cuLaunchKernel", code).map_err(|error| DriverError {
            detail: format!(
                "{} over {:?} blocks of {:?}",
                launch.entry.name, launch.grid, launch.block
            ),
            ..error
        })
    }

    fn plan_gemm(&self, key: &GemmKey) -> Result<GemmPlan, DriverError> {
        self.enter()?;
        self.products()?.plan(key)
    }

    unsafe fn gemm(
        &self,
        stream: StreamId,
        plan: &GemmPlan,
        alpha: f32,
        operands: [Address; 3],
        workspace: Address,
    ) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: the caller's promise.
        unsafe { self.products()?.run(stream, plan, alpha, operands, workspace) }
    }

    fn begin_capture(&self, stream: StreamId) -> Result<(), DriverError> {
        self.enter()?;
        // Other threads may go on to allocate and wait meanwhile.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is live.
        check("cuStreamBeginCapture", unsafe {
            sys::cuStreamBeginCapture_v2(handle(stream.0), mode)
        })
    }

    fn end_capture(&self, stream: StreamId) -> Result<GraphId, DriverError> {
        self.enter()?;
        let (mut graph, mut ready) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: the stream is live, and the target valid for the write.
        check("cuStreamEndCapture", unsafe {
            sys::cuStreamEndCapture(handle(stream.0), &raw mut graph)
        })?;
        // SAFETY: the graph was just made, and the target is valid for the write; there are no flags.
        let made = check("cuGraphInstantiate", unsafe {
            sys::cuGraphInstantiateWithFlags(&raw mut ready, graph, 0)
        });
        // SAFETY: what was made of it does not need it.
        let given_back = check("cuGraphDestroy", unsafe { sys::cuGraphDestroy(graph) });
        made?;
        given_back?;
        Ok(GraphId(number(ready)))
    }

    unsafe fn launch_graph(&self, graph: GraphId, stream: StreamId) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: both are live; the memory is the caller's promise.
        check("cuGraphLaunch", unsafe {
            sys::cuGraphLaunch(handle(graph.0), handle(stream.0))
        })
    }

    fn destroy_graph(&self, graph: GraphId) -> Result<(), DriverError> {
        self.enter()?;
        // SAFETY: it came from `end_capture`, and is given back once; the driver lets launches under way end.
        check("cuGraphExecDestroy", unsafe {
            sys::cuGraphExecDestroy(handle(graph.0))
        })
    }
}

impl RealDriver {
    fn products(&self) -> Result<&CublasLt, DriverError> {
        let gone = || refused("cublasLtMatmul", "the driver is going".to_owned());
        self.products.as_ref().ok_or_else(gone)
    }
}

/// A parameter's bytes, from the first on; the kernel reads as many as its type has.
fn encode(value: Value) -> [u8; 8] {
    let mut bytes = [0; 8];
    match value {
        Value::Pointer(address) => bytes = address.to_ne_bytes(),
        Value::U64(number) => bytes = number.to_ne_bytes(),
        Value::U32(number) => bytes[..4].copy_from_slice(&number.to_ne_bytes()),
        Value::F32(number) => bytes[..4].copy_from_slice(&number.to_ne_bytes()),
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_stand_at_the_start_of_their_bytes() {
        assert_eq!(encode(Value::F32(1.5))[..4], 1.5_f32.to_ne_bytes());
        assert_eq!(encode(Value::U32(7))[..4], 7_u32.to_ne_bytes());
        assert_eq!(encode(Value::Pointer(1 << 40)), (1_u64 << 40).to_ne_bytes());
    }

    /// Whether there is a device or not, looking for it neither panics nor takes anything away.
    #[test]
    fn looking_for_a_device_is_safe_anywhere() {
        match RealDriver::open(0, CubinCache::new(None)) {
            Ok(driver) => assert!(driver.facts().capability >= CAPABILITY_MIN),
            Err(absence) => {
                let line = absence.to_string();
                assert!(line.starts_with("no CUDA device") && !line.contains('\n'), "{line}");
            }
        }
    }
}
