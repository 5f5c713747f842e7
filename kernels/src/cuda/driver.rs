//! What the CUDA driver, NVRTC and cuBLASLt do for the device, and nothing more.
//!
//! [`Driver`] is the seam of the CUDA device: above it stands all that can be tested without a GPU (bounds, launch shapes,
//! scratch memory, plan cache, errors), below it foreign calls. It has three implementations: `real` over the
//! libraries of the machine, [`super::recording`] for tests, and an emulator of the kernels.
//!
//! Every call may fail, and says how in a [`DriverError`]. Calls that hand the device an address are `unsafe`: the device
//! reads and writes there later, when no borrow checker looks.

use super::table::{Element, Entry, Launch, Value};
pub use crate::device::MemoryState;
use std::fmt;
use std::ptr::NonNull;

/// An address in device memory.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Address(pub u64);

impl Address {
    /// The address `bytes` further on.
    #[must_use]
    pub const fn further(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }

    /// Whether it is a multiple of `bytes`.
    #[must_use]
    pub const fn is_aligned(self, bytes: u64) -> bool {
        self.0.is_multiple_of(bytes)
    }
}

macro_rules! handles {
    ($($(#[$doc:meta])* $name:ident),*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        pub struct $name(pub u64);
    )*};
}

handles! {
    /// A queue of device work; what stands in one queue runs in order.
    StreamId,
    /// A point in a queue.
    EventId,
    /// A kernel that is loaded.
    KernelId,
    /// A recorded sequence of device work, ready to be launched.
    GraphId,
    /// A matrix product whose algorithm is chosen.
    PlanId
}

/// What is known of a device before anything runs on it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DeviceFacts {
    /// Its product name.
    pub name: String,
    /// Where it sits on its host (PCI domain, bus and device), e.g. `0000:1b:00`: what two processes compare to learn whether
    /// they share it. It decides no number.
    pub bus_id: String,
    /// Compute capability, e.g. (9, 0).
    pub capability: (u32, u32),
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Memory in all, bytes.
    pub memory_bytes: usize,
    /// Shared memory that one block may have at most, bytes.
    pub shared_bytes_max: usize,
    /// Versions of what decides numbers, as text: compiler and matrix library (DET-4).
    pub numeric_libraries: Vec<(String, String)>,
    /// Version of the driver, e.g. 13000; it loads finished machine code and decides no number.
    pub driver_version: u32,
}

impl DeviceFacts {
    /// What DET-4 compares: devices of one type give the same bits. Names the product, its multiprocessors, which
    /// algorithms are chosen by, and the libraries that decide numbers.
    #[must_use]
    pub fn device_type(&self) -> String {
        let libraries: String = self
            .numeric_libraries
            .iter()
            .map(|(name, version)| format!(", {name} {version}"))
            .collect();
        let (major, minor) = self.capability;
        format!(
            "cuda-bf16: {}, sm_{major}{minor}, {} multiprocessors{libraries}",
            self.name, self.multiprocessors
        )
    }
}

/// What a failed call means for the next one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Severity {
    /// The memory is not there; other calls go on.
    OutOfMemory,
    /// This call was refused; other calls go on.
    Refused,
    /// The device's context is lost: every later call fails, too.
    Sticky,
}

/// A call that failed.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{call} gave {name}{}", Detail(.detail))]
pub struct DriverError {
    /// The foreign function, e.g. `cuLaunchKernel`.
    pub call: &'static str,
    /// What it means for later calls.
    pub severity: Severity,
    /// The library's name of the error, e.g. `CUDA_ERROR_ILLEGAL_ADDRESS`.
    pub name: String,
    /// More, where there is more: a compiler's log, bytes that were wanted.
    pub detail: String,
}

struct Detail<'a>(&'a str);

impl fmt::Display for Detail<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            Ok(())
        } else {
            write!(f, ": {}", self.0)
        }
    }
}

/// What an error of the CUDA driver means for later calls, by its code (`CUresult`, CUDA 13.0).
///
/// Only errors known to leave the context whole count as refusals; any other ends the work, as one that nobody knows may
/// have come from a kernel that wrote half of its output.
#[must_use]
pub const fn severity(code: u32) -> Severity {
    match code {
        // CUDA_ERROR_OUT_OF_MEMORY
        2 => Severity::OutOfMemory,
        // Invalid value, device, image, handle; not found; not ready; too much asked of a launch; not permitted, not
        // supported; and all that a capture refuses.
        1
        | 34
        | 36
        | 100..=103
        | 200
        | 209
        | 215..=218
        | 221..=225
        | 300..=303
        | 400..=402
        | 500
        | 600
        | 701
        | 720
        | 800
        | 801
        | 803
        | 804
        | 900..=908
        | 910
        | 912..=915 => Severity::Refused,
        _ => Severity::Sticky,
    }
}

/// What a person does about a lost context, by the name of the error.
#[must_use]
pub fn remedy(name: &str) -> &'static str {
    match name {
        "CUDA_ERROR_ECC_UNCORRECTABLE" | "CUDA_ERROR_CONTAINED" => {
            "its memory has an error that cannot be corrected: look at `nvidia-smi -q -d ECC,PAGE_RETIREMENT`, reset or replace the GPU"
        }
        "CUDA_ERROR_NVLINK_UNCORRECTABLE" => {
            "a link to another GPU is broken: look at `nvidia-smi nvlink -e`, replace the host"
        }
        "CUDA_ERROR_ILLEGAL_ADDRESS"
        | "CUDA_ERROR_MISALIGNED_ADDRESS"
        | "CUDA_ERROR_INVALID_ADDRESS_SPACE"
        | "CUDA_ERROR_INVALID_PC"
        | "CUDA_ERROR_ILLEGAL_INSTRUCTION"
        | "CUDA_ERROR_HARDWARE_STACK_ERROR"
        | "CUDA_ERROR_ASSERT"
        | "CUDA_ERROR_LAUNCH_FAILED" => {
            "a kernel went wrong: if `dmesg` shows an Xid of the hardware, replace the GPU; else run `tarazed gpu-check` and report it"
        }
        "CUDA_ERROR_LAUNCH_TIMEOUT" => {
            "a kernel took longer than the display's watchdog allows: train on a GPU without a display"
        }
        "CUDA_ERROR_DEVICE_UNAVAILABLE" | "CUDA_ERROR_SYSTEM_NOT_READY" => {
            "the GPU is not to be had: look at `nvidia-smi` for its compute mode and at its fabric manager"
        }
        _ => "look at `dmesg` for an Xid and at `nvidia-smi -q`",
    }
}

/// Why no CUDA device is used: an ordinary answer. Its text is one line.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Absence {
    /// A library is not on this machine.
    #[error("no CUDA device: {library} is not there")]
    Library {
        /// Its file name.
        library: &'static str,
    },
    /// There is a driver, and it has no device.
    #[error("no CUDA device: the driver finds none")]
    NoDevice,
    /// There are fewer devices than the number asked for.
    #[error("no CUDA device {ordinal}: the driver finds {count}")]
    Ordinal {
        /// The number asked for, from 0.
        ordinal: u32,
        /// How many there are.
        count: u32,
    },
    /// The device is older than the kernels need.
    #[error("no CUDA device that can be used: {name} has compute capability {}.{}, and 8.0 is needed", .capability.0, .capability.1)]
    TooOld {
        /// Its product name.
        name: String,
        /// What it has.
        capability: (u32, u32),
    },
    /// The driver cannot load what the compiler makes.
    #[error(
        "no CUDA device that can be used: the driver is too old: it is CUDA {}.{}, and libnvrtc is of CUDA {compiler_major}",
        .driver.0,
        .driver.1
    )]
    DriverTooOld {
        /// The driver's version, major and minor.
        driver: (u32, u32),
        /// The compiler's.
        compiler_major: u32,
    },
    /// It is there, and does not answer, or a source does not compile. The text is the first line; a compiler's log is in the
    /// error's detail.
    #[error("no CUDA device that can be used: {}", first_line(.0))]
    Failed(#[from] DriverError),
}

fn first_line(error: &DriverError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Whether a driver loads machine code of a compiler: within one major version any does, and a newer driver does.
///
/// `driver_version` is the driver interface's number, e.g. 13000 for 13.0.
///
/// # Errors
/// [`Absence::DriverTooOld`]. Without this, the first kernel would fail to load with an error that does not say why.
pub const fn driver_loads(driver_version: u32, compiler_major: u32) -> Result<(), Absence> {
    let driver = (driver_version / 1000, driver_version % 1000 / 10);
    if driver.0 < compiler_major {
        return Err(Absence::DriverTooOld { driver, compiler_major });
    }
    Ok(())
}

/// `C = alpha · op(A) · op(B)` or `C += …`, row-major; see [`crate::Gemm`]. All that an algorithm is chosen by: the
/// operands' addresses are multiples of [`GEMM_ALIGNMENT_BYTES`], so where they lie decides nothing (DET-1, DET-2).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct GemmKey {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Length of each sum.
    pub k: usize,
    /// A is stored `[k, m]`.
    pub a_transposed: bool,
    /// B is stored `[n, k]`.
    pub b_transposed: bool,
    /// Elements between A's stored rows.
    pub a_stride: usize,
    /// Elements between B's stored rows.
    pub b_stride: usize,
    /// Elements between C's rows.
    pub c_stride: usize,
    /// Add to C instead of overwriting it.
    pub accumulate: bool,
    /// Of A and B.
    pub input: Element,
    /// Of C. Sums are f32 whatever it is.
    pub output: Element,
}

/// Alignment of every operand of a matrix product.
pub const GEMM_ALIGNMENT_BYTES: u64 = 16;
/// Workspace of a matrix product at most, and what a stream keeps for it once it has had one: what NVIDIA's cuBLAS manual advises for Hopper.
pub const GEMM_WORKSPACE_BYTES: usize = 32 << 20;

/// A matrix product whose algorithm is chosen, once and for all.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GemmPlan {
    /// The driver's own number of it.
    pub id: PlanId,
    /// Attributes of the algorithm, as text: what a report compares between machines (DET-4).
    pub algorithm: String,
    /// Workspace that it needs, at most [`GEMM_WORKSPACE_BYTES`].
    pub workspace_bytes: usize,
}

/// The device as foreign libraries offer it. Shared between threads; each thread works with streams of its own.
pub trait Driver: Send + Sync + 'static {
    /// What is known of the device.
    fn facts(&self) -> &DeviceFacts;

    /// Makes the device the current one of the calling thread, for libraries that stand beside the driver and ask which it
    /// is; every other call here does so by itself.
    ///
    /// # Errors
    /// As every call: a [`DriverError`].
    fn make_current(&self) -> Result<(), DriverError>;

    /// Memory as it stands.
    ///
    /// # Errors
    /// A [`DriverError`].
    fn memory(&self) -> Result<MemoryState, DriverError>;

    /// A queue that waits for no other.
    ///
    /// # Errors
    /// A [`DriverError`].
    fn create_stream(&self) -> Result<StreamId, DriverError>;

    /// Gives a queue back. What stands in it is done first.
    ///
    /// # Errors
    /// A [`DriverError`].
    fn destroy_stream(&self, stream: StreamId) -> Result<(), DriverError>;

    /// Waits until all that stands in a queue is done. Tells of work that failed late.
    ///
    /// # Errors
    /// A [`DriverError`], also of earlier work.
    fn synchronize(&self, stream: StreamId) -> Result<(), DriverError>;

    /// Whether all that stands in a queue is done; does not wait. Tells of work that failed late.
    ///
    /// # Errors
    /// A [`DriverError`], also of earlier work.
    fn is_idle(&self, stream: StreamId) -> Result<bool, DriverError>;

    /// An event. It counts as done until it is recorded.
    ///
    /// # Errors
    /// A [`DriverError`].
    fn create_event(&self) -> Result<EventId, DriverError>;

    /// Gives an event back.
    ///
    /// # Errors
    /// A [`DriverError`].
    fn destroy_event(&self, event: EventId) -> Result<(), DriverError>;

    /// Puts an event into a queue: it is done when all before it is.
    ///
    /// # Errors
    /// A [`DriverError`].
    fn record(&self, event: EventId, stream: StreamId) -> Result<(), DriverError>;

    /// What is asked of a queue from now on waits for an event, on the device.
    ///
    /// # Errors
    /// A [`DriverError`].
    fn wait(&self, stream: StreamId, event: EventId) -> Result<(), DriverError>;

    /// Waits, on the host, until an event is done.
    ///
    /// # Errors
    /// A [`DriverError`], also of earlier work.
    fn synchronize_event(&self, event: EventId) -> Result<(), DriverError>;

    /// Milliseconds between two events that are done.
    ///
    /// # Errors
    /// A [`DriverError`].
    fn elapsed_ms(&self, start: EventId, end: EventId) -> Result<f32, DriverError>;

    /// Device memory, aligned to 256 bytes, of unknown contents.
    ///
    /// # Errors
    /// Severity [`Severity::OutOfMemory`] where it is not there.
    fn alloc(&self, bytes: usize) -> Result<Address, DriverError>;

    /// Waits until all work of the device is done, in every queue, and gives memory back.
    ///
    /// # Safety
    /// The address came from [`Driver::alloc`], is given back once, and no work asked for later uses it.
    ///
    /// # Errors
    /// A [`DriverError`], also of earlier work.
    unsafe fn free(&self, address: Address) -> Result<(), DriverError>;

    /// Host memory that the device copies from and to at full speed and beside other work; aligned to 64 bytes, zeroed.
    ///
    /// # Errors
    /// Severity [`Severity::OutOfMemory`] where it is not there.
    fn alloc_pinned(&self, bytes: usize) -> Result<NonNull<u8>, DriverError>;

    /// Gives it back.
    ///
    /// # Safety
    /// The pointer came from [`Driver::alloc_pinned`], is given back once, and no copy that uses it is under way.
    ///
    /// # Errors
    /// A [`DriverError`].
    unsafe fn free_pinned(&self, pointer: NonNull<u8>) -> Result<(), DriverError>;

    /// Copies to the device, in a queue's order.
    ///
    /// # Safety
    /// `from` is pinned and not written to, and `to` is allocated, each for `bytes`, until the copy is done.
    ///
    /// # Errors
    /// A [`DriverError`].
    unsafe fn copy_to_device(
        &self,
        stream: StreamId,
        to: Address,
        from: *const u8,
        bytes: usize,
    ) -> Result<(), DriverError>;

    /// Copies from the device, in a queue's order.
    ///
    /// # Safety
    /// `to` is pinned and not touched, and `from` is allocated, each for `bytes`, until the copy is done.
    ///
    /// # Errors
    /// A [`DriverError`].
    unsafe fn copy_to_host(
        &self,
        stream: StreamId,
        to: *mut u8,
        from: Address,
        bytes: usize,
    ) -> Result<(), DriverError>;

    /// Copies within the device, in a queue's order.
    ///
    /// # Safety
    /// Both ranges are allocated until the copy is done, and do not overlap.
    ///
    /// # Errors
    /// A [`DriverError`].
    unsafe fn copy_on_device(
        &self,
        stream: StreamId,
        to: Address,
        from: Address,
        bytes: usize,
    ) -> Result<(), DriverError>;

    /// Sets bytes, in a queue's order.
    ///
    /// # Safety
    /// The range is allocated until it is done.
    ///
    /// # Errors
    /// A [`DriverError`].
    unsafe fn set_bytes(&self, stream: StreamId, to: Address, value: u8, bytes: usize) -> Result<(), DriverError>;

    /// Makes a kernel ready to launch; compiles its source where it must.
    ///
    /// # Errors
    /// A [`DriverError`]; of a compiler, with its log.
    fn load(&self, entry: &'static Entry) -> Result<KernelId, DriverError>;

    /// Launches a kernel, in a queue's order, with as much dynamic shared memory as the launch says.
    ///
    /// # Safety
    /// `kernel` was loaded from `launch.entry`, whose arguments these are; the memory that they point to is allocated, for
    /// all that the kernel reads and writes, until it is done.
    ///
    /// # Errors
    /// A [`DriverError`].
    unsafe fn launch(
        &self,
        stream: StreamId,
        kernel: KernelId,
        launch: &Launch,
        arguments: &[Value],
    ) -> Result<(), DriverError>;

    /// Chooses the algorithm of a matrix product: a function of the key and of the device's type alone (DET-2).
    ///
    /// # Errors
    /// Severity [`Severity::Refused`] where there is no deterministic algorithm of that shape.
    fn plan_gemm(&self, key: &GemmKey) -> Result<GemmPlan, DriverError>;

    /// A matrix product, in a queue's order.
    ///
    /// # Safety
    /// The plan is this driver's; operands `[a, b, c]` are aligned to [`GEMM_ALIGNMENT_BYTES`] and allocated for the shape
    /// that was planned, `c` overlaps neither input, and `workspace` has the plan's bytes, until the product is done.
    ///
    /// # Errors
    /// A [`DriverError`].
    unsafe fn gemm(
        &self,
        stream: StreamId,
        plan: &GemmPlan,
        alpha: f32,
        operands: [Address; 3],
        workspace: Address,
    ) -> Result<(), DriverError>;

    /// From now on, until [`Driver::end_capture`], what this thread asks of a queue is recorded instead of done.
    ///
    /// # Errors
    /// A [`DriverError`].
    fn begin_capture(&self, stream: StreamId) -> Result<(), DriverError>;

    /// Ends a capture and makes what was recorded ready to launch.
    ///
    /// # Errors
    /// A [`DriverError`]; the capture is over all the same.
    fn end_capture(&self, stream: StreamId) -> Result<GraphId, DriverError>;

    /// Does what was recorded, in a queue's order.
    ///
    /// # Safety
    /// All memory that the recorded work uses is allocated until it is done.
    ///
    /// # Errors
    /// A [`DriverError`].
    unsafe fn launch_graph(&self, graph: GraphId, stream: StreamId) -> Result<(), DriverError>;

    /// Gives a graph back. Launches of it that are under way end as if it were there.
    ///
    /// # Errors
    /// A [`DriverError`].
    fn destroy_graph(&self, graph: GraphId) -> Result<(), DriverError>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_that_outlive_a_call_are_told_from_those_that_do_not() {
        assert_eq!(severity(2), Severity::OutOfMemory);
        for refused in [1, 200, 209, 400, 500, 600, 701, 801, 900, 906] {
            assert_eq!(severity(refused), Severity::Refused, "{refused}");
        }
        // Deinitialised, ECC, NVLink, contained, illegal address, time-out, destroyed context, assert, illegal
        // instruction, misaligned, failed, unknown, and a code that no version has yet.
        for sticky in [4, 214, 220, 226, 700, 702, 709, 710, 715, 716, 719, 999, 12345] {
            assert_eq!(severity(sticky), Severity::Sticky, "{sticky}");
        }
    }

    #[test]
    fn an_error_names_call_name_and_detail() {
        let mut error = DriverError {
            call: "cuMemAlloc",
            severity: Severity::OutOfMemory,
            name: "CUDA_ERROR_OUT_OF_MEMORY".to_owned(),
            detail: String::new(),
        };
        assert_eq!(error.to_string(), "cuMemAlloc gave CUDA_ERROR_OUT_OF_MEMORY");
        error.detail = "64 bytes".to_owned();
        assert_eq!(error.to_string(), "cuMemAlloc gave CUDA_ERROR_OUT_OF_MEMORY: 64 bytes");
    }

    #[test]
    fn absence_is_one_clear_line() {
        let library = "libcuda.so.1";
        let absence = Absence::Library { library };
        assert_eq!(absence.to_string(), "no CUDA device: libcuda.so.1 is not there");
        let name = "Tesla T4".to_owned();
        let absence = Absence::TooOld {
            name,
            capability: (7, 5),
        };
        assert!(absence.to_string().contains("7.5, and 8.0 is needed"), "{absence}");
    }

    /// A compiler's log has many lines; the first names the first mistake.
    #[test]
    fn absence_is_one_line_where_a_log_has_many() {
        let error = DriverError {
            call: "nvrtcCompileProgram",
            severity: Severity::Refused,
            name: "NVRTC_ERROR_COMPILATION".to_owned(),
            detail: "rows.cu: rows.cu(2): error: x is undefined\n  x = 1;\n  ^\n".to_owned(),
        };
        let absence = Absence::from(error.clone());
        let text = absence.to_string();
        assert!(text.ends_with("rows.cu(2): error: x is undefined"), "{text}");
        assert_eq!(absence, Absence::Failed(error), "the log is kept");
    }

    #[test]
    fn a_driver_older_than_the_compiler_is_told_so() {
        for (driver, compiler) in [(13_000, 13), (13_020, 13), (14_000, 13), (12_080, 12)] {
            assert_eq!(driver_loads(driver, compiler), Ok(()), "{driver} {compiler}");
        }
        let absence = driver_loads(12_080, 13).unwrap_err();
        let text = absence.to_string();
        assert!(
            text.contains("driver is too old: it is CUDA 12.8, and libnvrtc is of CUDA 13"),
            "{text}"
        );
        assert!(!text.contains('\n'), "{text}");
        assert!(driver_loads(0, 13).is_err(), "a driver that does not say its version");
    }
}
