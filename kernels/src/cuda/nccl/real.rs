//! NCCL itself, loaded at run time. Nothing of it is needed to build, and its absence is an ordinary answer.
//!
//! The interface is C and small, so it is declared here: bindings that exist look for a library of another file name, and
//! panic where a function is missing. `tarazed gpu-check` runs it where the library is there.

use super::*;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null;

/// As Python wheels and distributions ship it; the name without a number comes with development files alone.
const LIBRARY: &str = "libnccl.so.2";
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
/// `ncclUint8`.
const BYTE: c_int = 1;
/// By which NCCL knows its own configuration (`nccl.h`, `NCCL_CONFIG_INITIALIZER`).
const CONFIG_MAGIC: c_uint = 0xcafe_beef;
/// A field that is left to NCCL.
const UNDEFINED: c_int = c_int::MIN;

type Comm = *mut c_void;

#[repr(C)]
#[derive(Clone, Copy)]
struct RawUniqueId([c_char; UNIQUE_ID_BYTES]);

/// `ncclConfig_t` of 2.28. Its beginning is that of every version from 2.18 on; an older library reads as much as it knows, a
/// newer one takes what is beyond from its own defaults.
#[repr(C)]
struct RawConfig {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    ctas_min: c_int,
    ctas_max: c_int,
    net_name: *const c_char,
    split_share: c_int,
    traffic_class: c_int,
    comm_name: *const c_char,
    collnet_enable: c_int,
    cta_policy: c_int,
    shrink_share: c_int,
    nvls_ctas: c_int,
    channels_per_net_peer: c_int,
    nvlink_centric_sched: c_int,
}

impl RawConfig {
    fn non_blocking(version: u32) -> Self {
        Self {
            size: size_of::<Self>(),
            magic: CONFIG_MAGIC,
            version,
            blocking: 0,
            cga_cluster_size: UNDEFINED,
            ctas_min: UNDEFINED,
            ctas_max: UNDEFINED,
            net_name: null(),
            split_share: UNDEFINED,
            traffic_class: UNDEFINED,
            comm_name: null(),
            collnet_enable: UNDEFINED,
            cta_policy: UNDEFINED,
            shrink_share: UNDEFINED,
            nvls_ctas: UNDEFINED,
            channels_per_net_peer: UNDEFINED,
            nvlink_centric_sched: UNDEFINED,
        }
    }
}

macro_rules! functions {
    ($($field:ident: $symbol:literal($($argument:ty),*) -> $result:ty;)*) => {
        /// The functions that are called, each by its own name.
        struct Functions { $($field: unsafe extern "C" fn($($argument),*) -> $result,)* }

        impl Functions {
            /// # Safety
            /// The library is NCCL, and outlives what is made of it.
            unsafe fn of(library: &Library) -> Result<Self, NcclAbsence> {
                Ok(Self { $(
                    // SAFETY: the type is that of the function of this name in `nccl.h`; the rest is the caller's promise.
                    $field: *unsafe { library.get(concat!($symbol, "\0").as_bytes()) }
                        .map_err(|_| NcclAbsence::Symbol { symbol: $symbol })?,
                )* })
            }
        }
    };
}

functions! {
    get_version: "ncclGetVersion"(*mut c_int) -> c_int;
    get_unique_id: "ncclGetUniqueId"(*mut RawUniqueId) -> c_int;
    init: "ncclCommInitRankConfig"(*mut Comm, c_int, RawUniqueId, c_int, *mut RawConfig) -> c_int;
    async_error: "ncclCommGetAsyncError"(Comm, *mut c_int) -> c_int;
    last_error: "ncclGetLastError"(Comm) -> *const c_char;
    group_start: "ncclGroupStart"() -> c_int;
    group_end: "ncclGroupEnd"() -> c_int;
    send: "ncclSend"(*const c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    receive: "ncclRecv"(*mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    finalize: "ncclCommFinalize"(Comm) -> c_int;
    destroy: "ncclCommDestroy"(Comm) -> c_int;
    abort: "ncclCommAbort"(Comm) -> c_int;
}

/// The library of this machine.
pub struct RealNccl {
    functions: Functions,
    version: u32,
    /// Outlives the functions, which are dropped first.
    _library: Library,
}

fn pointer<T>(number: u64) -> *mut T {
    std::ptr::with_exposed_provenance_mut(number as usize)
}

impl RealNccl {
    /// Looks for the library and loads it.
    ///
    /// # Errors
    /// [`NcclAbsence`]: an ordinary answer, in one line.
    pub fn open() -> Result<Self, NcclAbsence> {
        // SAFETY: opening runs the library's initialisers, as any use of it does.
        let library = unsafe { Library::new(LIBRARY) }.map_err(|_| NcclAbsence::Library)?;
        // SAFETY: it has NCCL's name, and is kept with the functions.
        let functions = unsafe { Functions::of(&library) }?;
        let mut found = Self {
            functions,
            version: 0,
            _library: library,
        };
        let mut version: c_int = 0;
        // SAFETY: the target is valid for the write of an int.
        let code = unsafe { (found.functions.get_version)(&raw mut version) };
        found.check("ncclGetVersion", code)?;
        found.version = u32::try_from(version).unwrap_or(0);
        if found.version < VERSION_MIN {
            let version = found.version;
            return Err(NcclAbsence::TooOld { version });
        }
        Ok(found)
    }

    fn error(&self, call: &'static str, code: c_int) -> NcclError {
        let (fault, name) = fault(code.unsigned_abs());
        // SAFETY: it takes no communicator, and gives null or a text of its own that ends with a zero byte and stays until
        // this thread's next call.
        let detail = unsafe {
            let text = (self.functions.last_error)(std::ptr::null_mut());
            if text.is_null() {
                String::new()
            } else {
                let text = CStr::from_ptr(text).to_string_lossy();
                text.lines().next().unwrap_or_default().to_owned()
            }
        };
        NcclError {
            call,
            fault,
            name,
            detail,
        }
    }

    /// A call that is under way has not failed.
    fn check(&self, call: &'static str, code: c_int) -> Result<(), NcclError> {
        match code {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.error(call, code)),
        }
    }
}

impl Nccl for RealNccl {
    fn version(&self) -> u32 {
        self.version
    }

    fn unique_id(&self) -> Result<UniqueId, NcclError> {
        let mut id = RawUniqueId([0; UNIQUE_ID_BYTES]);
        // SAFETY: the target is valid for the write.
        self.check("ncclGetUniqueId", unsafe {
            (self.functions.get_unique_id)(&raw mut id)
        })?;
        Ok(UniqueId(id.0.map(|byte| byte as u8)))
    }

    fn init(&self, id: &UniqueId, ranks: u32, rank: u32, made: &mut Option<CommunicatorId>) -> Result<(), NcclError> {
        let mut config = RawConfig::non_blocking(self.version);
        let mut communicator: Comm = std::ptr::null_mut();
        let id = RawUniqueId(id.0.map(|byte| byte as c_char));
        let (ranks, rank) = (
            c_int::try_from(ranks).unwrap_or(c_int::MAX),
            c_int::try_from(rank).unwrap_or(c_int::MAX),
        );
        // SAFETY: both targets are valid, and the configuration is read before the call returns.
        let code = unsafe { (self.functions.init)(&raw mut communicator, ranks, id, rank, &raw mut config) };
        if !communicator.is_null() {
            *made = Some(CommunicatorId(communicator.expose_provenance() as u64));
        }
        self.check("ncclCommInitRankConfig", code)?;
        if made.is_none() {
            // What there is not cannot be asked how far it is.
            return Err(self.error("ncclCommInitRankConfig", c_int::MAX));
        }
        Ok(())
    }

    fn state(&self, communicator: CommunicatorId) -> Result<State, NcclError> {
        const CALL: &str = "ncclCommGetAsyncError";
        let mut state: c_int = SUCCESS;
        // SAFETY: the communicator came from `init` and is not given back; the target is valid for the write of an int.
        let code = unsafe { (self.functions.async_error)(pointer(communicator.0), &raw mut state) };
        self.check(CALL, code)?;
        match state {
            SUCCESS => Ok(State::Ready),
            IN_PROGRESS => Ok(State::Busy),
            failed => Err(self.error(CALL, failed)),
        }
    }

    fn group_start(&self) -> Result<(), NcclError> {
        // SAFETY: it takes nothing.
        self.check("ncclGroupStart", unsafe { (self.functions.group_start)() })
    }

    fn group_end(&self) -> Result<(), NcclError> {
        // SAFETY: it takes nothing.
        self.check("ncclGroupEnd", unsafe { (self.functions.group_end)() })
    }

    unsafe fn send(
        &self,
        communicator: CommunicatorId,
        to: u32,
        from: Address,
        bytes: usize,
        stream: StreamId,
    ) -> Result<(), NcclError> {
        let to = c_int::try_from(to).unwrap_or(c_int::MAX);
        // SAFETY: the communicator came from `init` and is not given back, the stream is live; the memory is the caller's
        // promise.
        self.check("ncclSend", unsafe {
            let send = self.functions.send;
            send(
                pointer(from.0),
                bytes,
                BYTE,
                to,
                pointer(communicator.0),
                pointer(stream.0),
            )
        })
    }

    unsafe fn receive(
        &self,
        communicator: CommunicatorId,
        from: u32,
        to: Address,
        bytes: usize,
        stream: StreamId,
    ) -> Result<(), NcclError> {
        let from = c_int::try_from(from).unwrap_or(c_int::MAX);
        // SAFETY: as in `send`.
        self.check("ncclRecv", unsafe {
            let receive = self.functions.receive;
            receive(
                pointer(to.0),
                bytes,
                BYTE,
                from,
                pointer(communicator.0),
                pointer(stream.0),
            )
        })
    }

    fn finalize(&self, communicator: CommunicatorId) -> Result<(), NcclError> {
        // SAFETY: it came from `init` and is not given back.
        self.check("ncclCommFinalize", unsafe {
            (self.functions.finalize)(pointer(communicator.0))
        })
    }

    fn destroy(&self, communicator: CommunicatorId) -> Result<(), NcclError> {
        // SAFETY: it came from `init`, and is given back once: its owner forgets it.
        self.check("ncclCommDestroy", unsafe {
            (self.functions.destroy)(pointer(communicator.0))
        })
    }

    fn abort(&self, communicator: CommunicatorId) -> Result<(), NcclError> {
        // SAFETY: as in `destroy`; nobody is inside another call for it, as its owner calls this.
        self.check("ncclCommAbort", unsafe {
            (self.functions.abort)(pointer(communicator.0))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    /// With NCCL or without, looking for it neither panics nor takes anything away.
    #[test]
    fn looking_for_the_library_is_safe_anywhere() {
        match RealNccl::open() {
            Ok(found) => assert!(found.version() >= VERSION_MIN),
            Err(absence) => {
                let line = absence.to_string();
                assert!(line.starts_with("libnccl.so.2") && !line.contains('\n'), "{line}");
            }
        }
    }

    /// Offsets of `ncclConfig_t` on 64-bit Linux, from `nccl.h` of 2.28: the compiler may not lay it out otherwise.
    #[test]
    fn the_configuration_is_laid_out_as_the_library_reads_it() {
        assert_eq!(
            [
                offset_of!(RawConfig, magic),
                offset_of!(RawConfig, blocking),
                offset_of!(RawConfig, ctas_max),
                offset_of!(RawConfig, net_name),
                offset_of!(RawConfig, split_share),
                offset_of!(RawConfig, traffic_class),
                offset_of!(RawConfig, comm_name),
                offset_of!(RawConfig, collnet_enable),
                offset_of!(RawConfig, nvlink_centric_sched),
                size_of::<RawConfig>(),
            ],
            [8, 16, 28, 32, 40, 44, 48, 56, 76, 80]
        );
        let config = RawConfig::non_blocking(22_809);
        assert_eq!((config.size, config.blocking, config.version), (80, 0, 22_809));
        assert_eq!([config.ctas_min, config.nvls_ctas], [i32::MIN; 2]);
    }
}
