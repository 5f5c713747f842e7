//! The kernels' sources, compiled for this host by its C++ compiler, and called.

use crate::cuda::table::{HEADERS, Kind, Launch, SOURCES, Value};
use libloading::Library;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

/// What the compiler is called with, besides paths. Contraction is off here as it is for a GPU.
const FLAGS: [&str; 8] = [
    "-std=c++20",
    "-O2",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-DTARAZED_EMULATOR",
];
/// And besides for sources as they are for Hopper.
const HOPPER_FLAG: &str = "-DTARAZED_GROUP_PRODUCTS";
/// More flags from the environment, separated by blanks, e.g. `-fsanitize=address`.
const MORE_FLAGS: &str = "TARAZED_EMULATOR_FLAGS";
/// The compiler's name where `CXX` says no other.
const COMPILER: &str = "g++";
/// Held while the compiler runs.
static COMPILING: Mutex<()> = Mutex::new(());
/// Bytes of an error's text, at most.
const ERROR_BYTES: usize = 1024;

/// An emulator that is not to be had: set `CXX` to a C++20 compiler, or leave the feature `emulator` off.
#[derive(Debug, thiserror::Error)]
pub enum EmulatorError {
    /// The compiler did not run.
    #[error("{compiler} could not be run: {cause}; install a C++20 compiler or set CXX to one")]
    NoCompiler {
        /// What was run.
        compiler: String,
        /// Why not.
        cause: std::io::Error,
    },
    /// It refused the sources.
    #[error("{compiler} refused the emulator's sources:\n{log}")]
    Refused {
        /// What was run.
        compiler: String,
        /// What it said.
        log: String,
    },
    /// A file could not be written.
    #[error("{}: {cause}", .path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
    /// What was compiled could not be loaded.
    #[error("{}: {cause}", .path.display())]
    Load {
        /// Which file.
        path: PathBuf,
        /// Why not.
        cause: libloading::Error,
    },
}

type LaunchFunction = unsafe extern "C" fn(
    name: *const c_char,
    grid: *const u32,
    block: *const u32,
    shared_bytes: u32,
    arguments: *mut *mut c_void,
    order: u64,
    error: *mut c_char,
    error_bytes: u64,
) -> c_int;

/// The emulator as it was loaded; it stays so.
pub(super) struct Emulator {
    launch: LaunchFunction,
    bank_conflicts: unsafe extern "C" fn() -> u64,
    /// What it was compiled by.
    pub compiler: String,
    _library: Library,
}

/// Folder of the sources.
fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda")
}

impl Emulator {
    /// Compiles into `folder` where the same sources were not compiled before, as they are for Hopper or for the others, and
    /// loads.
    pub fn load(folder: &Path, hopper: bool) -> Result<Self, EmulatorError> {
        let compiler = std::env::var("CXX").unwrap_or_else(|_| COMPILER.to_owned());
        let mut flags = more_flags();
        flags.extend(hopper.then(|| HOPPER_FLAG.to_owned()));
        let path = folder.join(format!("emulator-{:016x}.so", digest(&compiler, &flags)?));
        {
            // Threads of one process wait for each other's compilation instead of making it again.
            let _one = COMPILING.lock().unwrap_or_else(PoisonError::into_inner);
            if !path.exists() {
                compile(&compiler, &flags, &path)?;
            }
        }
        let failed = |cause| EmulatorError::Load {
            path: path.clone(),
            cause,
        };
        // SAFETY: the library is compiled from this crate's sources, which run no initialiser that does more than set up
        // their own statics; its two symbols have the types that `emulator.cpp` declares.
        let (library, launch, bank_conflicts) = unsafe {
            let library = Library::new(&path).map_err(failed)?;
            let launch = *library
                .get::<LaunchFunction>(b"tarazed_emulator_launch\0")
                .map_err(failed)?;
            let bank_conflicts = *library
                .get::<unsafe extern "C" fn() -> u64>(b"tarazed_emulator_bank_conflicts\0")
                .map_err(failed)?;
            (library, launch, bank_conflicts)
        };
        Ok(Self {
            launch,
            bank_conflicts,
            compiler,
            _library: library,
        })
    }

    /// Rows of matrices that met a bank twice since this was last asked, by any thread of this process.
    pub fn bank_conflicts(&self) -> u64 {
        // SAFETY: the function takes nothing and guards its state by a lock.
        unsafe { (self.bank_conflicts)() }
    }

    /// Runs a kernel to its end, blocks and threads in that order (0 forward, 1 backward, any other the seed of a random
    /// one).
    ///
    /// # Safety
    /// The values fit the entry's arguments, and their pointers are readable and writable as far as the kernel goes.
    pub unsafe fn launch(&self, launch: &Launch, values: &[Value], order: u64) -> Result<(), String> {
        let name = CString::new(launch.entry.name).map_err(|cause| cause.to_string())?;
        let mut held: Vec<[u8; 8]> = values.iter().map(|value| bytes(*value)).collect();
        let mut pointers: Vec<*mut c_void> = held.iter_mut().map(|value| value.as_mut_ptr().cast()).collect();
        let mut error = [0 as c_char; ERROR_BYTES];
        // SAFETY: names and arrays live through the call and have the lengths that it expects; the rest is the caller's
        // promise.
        let failed = unsafe {
            (self.launch)(
                name.as_ptr(),
                launch.grid.as_ptr(),
                launch.block.as_ptr(),
                launch.shared_bytes,
                pointers.as_mut_ptr(),
                order,
                error.as_mut_ptr(),
                ERROR_BYTES as u64,
            )
        };
        if failed == 0 {
            return Ok(());
        }
        // SAFETY: the emulator wrote a text that ends with a zero.
        Err(unsafe { CStr::from_ptr(error.as_ptr()) }.to_string_lossy().into_owned())
    }
}

/// A value as the kernel finds it, from its lowest address on.
fn bytes(value: Value) -> [u8; 8] {
    let mut held = [0; 8];
    match value {
        Value::Pointer(at) | Value::U64(at) => held = at.to_ne_bytes(),
        Value::U32(number) => held[..4].copy_from_slice(&number.to_ne_bytes()),
        Value::F32(number) => held[..4].copy_from_slice(&number.to_ne_bytes()),
    }
    held
}

fn more_flags() -> Vec<String> {
    let flags = std::env::var(MORE_FLAGS).unwrap_or_default();
    flags.split_whitespace().map(str::to_owned).collect()
}

/// Names what is compiled: all sources, flags, compiler.
fn digest(compiler: &str, more: &[String]) -> Result<u64, EmulatorError> {
    let mut hasher = DefaultHasher::new();
    (compiler, FLAGS, more).hash(&mut hasher);
    for source in SOURCES.iter().copied().chain(&HEADERS) {
        source.text.hash(&mut hasher);
    }
    for file in [
        "emulator.cpp",
        "engine.hpp",
        "group.hpp",
        "device.hpp",
        "fibre.hpp",
        "faults.cu",
    ] {
        let path = sources().join("emulator").join(file);
        let text = std::fs::read(&path).map_err(|cause| EmulatorError::File { path, cause })?;
        text.hash(&mut hasher);
    }
    Ok(hasher.finish())
}

/// Compiles beside `path`, then renames: several processes may do so at once.
fn compile(compiler: &str, more: &[String], path: &Path) -> Result<(), EmulatorError> {
    let file = |cause| EmulatorError::File {
        path: path.to_owned(),
        cause,
    };
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(file)?;
    }
    let own = path.with_extension(format!("{}.so", std::process::id()));
    let output = Command::new(compiler)
        .args(FLAGS)
        .args(more)
        .arg("-I")
        .arg(sources())
        .arg(sources().join("emulator/emulator.cpp"))
        .arg("-o")
        .arg(&own)
        .output()
        .map_err(|cause| EmulatorError::NoCompiler {
            compiler: compiler.to_owned(),
            cause,
        })?;
    if !output.status.success() {
        return Err(EmulatorError::Refused {
            compiler: compiler.to_owned(),
            log: String::from_utf8_lossy(&output.stderr).into_owned(),
        });
    }
    std::fs::rename(&own, path).map_err(file)
}

/// Whether the values are those that the entry takes.
pub(super) fn check(launch: &Launch, values: &[Value]) -> Result<(), String> {
    let arguments = launch.entry.arguments;
    if arguments.len() != values.len() {
        return Err(format!("{} values for {} arguments", values.len(), arguments.len()));
    }
    for (argument, value) in arguments.iter().zip(values) {
        if !value.fits(argument.kind) {
            return Err(format!("{value:?} for {} of {:?}", argument.name, argument.kind));
        }
        if let (Kind::U32, Value::U32(0)) = (argument.kind, value)
            && argument.name != "first_block"
            && argument.name != "with_gradient"
            && argument.name != "kept_chunks"
        {
            return Err(format!("{} is 0", argument.name));
        }
    }
    Ok(())
}
