//! Compiles every kernel for the architectures in use and compares what each takes with the limits in `kernels/cuda/limits.toml`.
//!
//! ```text
//! cargo run -p tarazed-kernels --example compile_report [-- [--nvrtc libnvrtc.so.13] [ARCHITECTURE…]]
//! ```
//!
//! It needs NVIDIA's run-time compiler (NVRTC 13), and no GPU. Prints one line for each kernel and architecture. Ends with 0 where
//! all keep their limits and no matrix product waits for another without need, with 1 where not, with 2 where there is no compiler.

use libloading::{Library, Symbol};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{CString, c_char, c_int, c_void};
use std::process::ExitCode;
use std::time::Instant;
use tarazed_kernels::cuda::resources::{self, Resources};
use tarazed_kernels::cuda::table::{ENTRIES, HEADERS, OPTIONS, SOURCES, Source};

/// Names under which the compiler is installed.
const LIBRARIES: [&str; 2] = ["libnvrtc.so.13", "libnvrtc.so"];
/// A100, H100 and H200, B200.
const ARCHITECTURES: [&str; 3] = ["sm_80", "sm_90a", "sm_100"];

/// `limits.toml`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Limits {
    kernel: BTreeMap<String, Limit>,
}

/// What a kernel may take on any architecture.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Limit {
    registers: u32,
    #[serde(default)]
    shared_bytes: u32,
    /// Spills that are accepted, by architecture.
    #[serde(default)]
    spills: BTreeMap<String, Spills>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spills {
    store_bytes: u32,
    load_bytes: u32,
    reason: String,
}

/// The compiler.
struct Nvrtc(Library);

type Program = *mut c_void;
type Status = c_int;

impl Nvrtc {
    fn open(path: Option<&str>) -> Result<Self, String> {
        let mut tried = Vec::new();
        for name in path
            .iter()
            .copied()
            .chain(LIBRARIES.into_iter().filter(|_| path.is_none()))
        {
            // SAFETY: the compiler's initialisers run as in any program that uses it.
            match unsafe { Library::new(name) } {
                Ok(library) => return Ok(Self(library)),
                Err(error) => tried.push(error.to_string()),
            }
        }
        Err(format!("no NVRTC: {}; give its path with --nvrtc", tried.join("; ")))
    }

    /// A function of the library.
    ///
    /// # Safety
    /// `F` is its type, as `nvrtc.h` declares it.
    unsafe fn get<F>(&self, name: &str) -> Result<Symbol<'_, F>, String> {
        // SAFETY: the caller's promise.
        unsafe { self.0.get(name.as_bytes()) }.map_err(|error| error.to_string())
    }

    /// The compiler's log for one source; an error where it does not compile.
    fn compile(&self, source: &Source, architecture: &str) -> Result<String, String> {
        let text = |text: &str| CString::new(text).map_err(|error| error.to_string());
        let (code, file) = (text(source.text)?, text(source.file)?);
        let texts = HEADERS
            .iter()
            .map(|header| text(header.text))
            .collect::<Result<Vec<_>, _>>()?;
        let names = HEADERS
            .iter()
            .map(|header| text(header.file))
            .collect::<Result<Vec<_>, _>>()?;
        let own = [
            format!("--gpu-architecture={architecture}"),
            "--ptxas-options=-v".to_owned(),
        ];
        let options = OPTIONS.iter().copied().chain(own.iter().map(String::as_str));
        let options = options.map(text).collect::<Result<Vec<_>, _>>()?;
        let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (texts, names, options) = (pointers(&texts), pointers(&names), (pointers(&options), options));
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: the types are those of `nvrtc.h`; all texts end with a zero and outlive the program, and the lists have the
        // lengths that are said.
        let (status, log) = unsafe {
            let create = self.get::<CreateProgram>("nvrtcCreateProgram")?;
            let made = create(
                &raw mut program,
                code.as_ptr(),
                file.as_ptr(),
                texts.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            );
            if made != 0 {
                return Err(format!("nvrtcCreateProgram gave {made}"));
            }
            let compile = self.get::<CompileProgram>("nvrtcCompileProgram")?;
            let status = compile(program, options.0.len() as c_int, options.0.as_ptr());
            let log = self.log(program)?;
            self.get::<unsafe extern "C" fn(*mut Program) -> Status>("nvrtcDestroyProgram")?(&raw mut program);
            (status, log)
        };
        if status == 0 {
            Ok(log)
        } else {
            Err(format!("{} for {architecture}:\n{log}", source.file))
        }
    }

    /// # Safety
    /// The program is live.
    unsafe fn log(&self, program: Program) -> Result<String, String> {
        let mut size = 0_usize;
        // SAFETY: the types are those of `nvrtc.h`, and the buffer has the size that the library asks for.
        unsafe {
            let status = self.get::<unsafe extern "C" fn(Program, *mut usize) -> Status>("nvrtcGetProgramLogSize")?(
                program,
                &raw mut size,
            );
            let mut bytes = vec![0_u8; size];
            let get = self.get::<unsafe extern "C" fn(Program, *mut c_char) -> Status>("nvrtcGetProgramLog")?;
            if status != 0 || get(program, bytes.as_mut_ptr().cast()) != 0 {
                return Err("the compiler's log could not be read".to_owned());
            }
            Ok(String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned())
        }
    }
}

type CreateProgram = unsafe extern "C" fn(
    *mut Program,
    *const c_char,
    *const c_char,
    c_int,
    *const *const c_char,
    *const *const c_char,
) -> Status;
type CompileProgram = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> Status;

/// What is beyond a limit, in words.
fn violations(architecture: &str, taken: &Resources, limits: &Limits) -> Vec<String> {
    let Some(limit) = limits.kernel.get(&taken.kernel) else {
        return vec!["has no limits".to_owned()];
    };
    let spills = limit.spills.get(architecture);
    let accepted = spills.map_or((0, 0), |spills| (spills.store_bytes, spills.load_bytes));
    let mut found = Vec::new();
    for (what, taken, limit) in [
        ("registers", taken.registers, limit.registers),
        ("bytes of shared memory", taken.shared_bytes, limit.shared_bytes),
        ("bytes spilled", taken.spill_store_bytes, accepted.0),
        ("bytes read back", taken.spill_load_bytes, accepted.1),
    ] {
        if taken > limit {
            found.push(format!("{taken} {what}, where {limit} are allowed"));
        }
    }
    if spills.is_some_and(|spills| spills.reason.trim().is_empty()) {
        found.push("spills are allowed without a reason".to_owned());
    }
    found
}

fn report(nvrtc: &Nvrtc, architectures: &[String], limits: &Limits) -> Result<usize, String> {
    let mut wrong = 0;
    for architecture in architectures {
        let mut seen = BTreeSet::new();
        for source in SOURCES {
            let started = Instant::now();
            let log = nvrtc.compile(source, architecture)?;
            println!(
                "{architecture} {} in {:.1} s",
                source.file,
                started.elapsed().as_secs_f64()
            );
            // The assembler says so where it cannot leave a group's products under way: they are right then, and slow.
            for line in log.lines().filter(|line| line.contains("are serialized")) {
                println!("  WRONG: {}", line.trim());
                wrong += 1;
            }
            for taken in resources::parse(&log)? {
                println!(
                    "  {:26} {:3} registers {:5} B shared, {} B spilled, {} B read back",
                    taken.kernel, taken.registers, taken.shared_bytes, taken.spill_store_bytes, taken.spill_load_bytes
                );
                for violation in violations(architecture, &taken, limits) {
                    println!("  {:26} WRONG: {violation}", taken.kernel);
                    wrong += 1;
                }
                seen.insert(taken.kernel);
            }
        }
        let expected: BTreeSet<String> = ENTRIES.iter().map(|entry| entry.name.to_owned()).collect();
        let limited: BTreeSet<String> = limits.kernel.keys().cloned().collect();
        for (what, other) in [("the table", &expected), ("limits.toml", &limited)] {
            for name in seen.symmetric_difference(other) {
                println!("WRONG: {name} is in only one of {what} and the compiled sources");
                wrong += 1;
            }
        }
    }
    Ok(wrong)
}

fn main() -> ExitCode {
    let mut architectures: Vec<String> = Vec::new();
    let (mut path, mut arguments) = (None, std::env::args().skip(1));
    while let Some(argument) = arguments.next() {
        if argument == "--nvrtc" {
            path = arguments.next();
        } else {
            architectures.push(argument);
        }
    }
    if architectures.is_empty() {
        architectures = ARCHITECTURES.map(str::to_owned).to_vec();
    }
    let nvrtc = match Nvrtc::open(path.as_deref()) {
        Ok(nvrtc) => nvrtc,
        Err(absence) => {
            eprintln!("{absence}");
            return ExitCode::from(2);
        }
    };
    let limits: Result<Limits, _> = toml::from_str(include_str!("../cuda/limits.toml"));
    let limits = limits.map_err(|error| error.to_string());
    match limits.and_then(|limits| report(&nvrtc, &architectures, &limits)) {
        Ok(0) => {
            println!("every kernel keeps its limits");
            ExitCode::SUCCESS
        }
        Ok(wrong) => {
            println!("{wrong} limits are not kept");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
