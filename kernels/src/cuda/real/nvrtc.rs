//! NVRTC: CUDA sources to machine code, in this process.

use crate::cuda::cubin::Compiler;
use crate::cuda::driver::{Absence, DriverError, Severity};
use crate::cuda::table::Source;
use cudarc::nvrtc::sys;
use std::ffi::{CString, c_char, c_int};

/// What is kept of a compiler's log: its beginning names the first error.
const LOG_BYTES_MAX: usize = 8 << 10;

/// The compiler.
pub(super) struct Nvrtc {
    version: (c_int, c_int),
    /// Architectures that it knows, e.g. 90.
    pub architectures: Vec<u32>,
}

fn check(call: &'static str, status: sys::nvrtcResult) -> Result<(), DriverError> {
    if status == sys::nvrtcResult::NVRTC_SUCCESS {
        return Ok(());
    }
    Err(DriverError {
        call,
        // A compiler that fails does nothing to the device.
        severity: Severity::Refused,
        name: format!("{status:?}"),
        detail: String::new(),
    })
}

fn text(what: &str, text: &str) -> Result<CString, DriverError> {
    CString::new(text).map_err(|_| DriverError {
        call: "nvrtcCreateProgram",
        severity: Severity::Refused,
        name: "NVRTC_ERROR_INVALID_INPUT".to_owned(),
        detail: format!("{what} holds a zero byte"),
    })
}

/// A program, given back when dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was made by `nvrtcCreateProgram` and is destroyed here alone.
        let _ = unsafe { sys::nvrtcDestroyProgram(&raw mut self.0) };
    }
}

impl Nvrtc {
    /// Finds the compiler.
    pub fn open() -> Result<Self, Absence> {
        // SAFETY: it tries to open a library by its names; that runs the library's initialisers, as any use of it does.
        if !unsafe { sys::is_culib_present() } {
            let library = "libnvrtc.so";
            return Err(Absence::Library { library });
        }
        let (mut major, mut minor, mut count) = (0, 0, 0);
        // SAFETY: both are valid for the write of an int.
        check("nvrtcVersion", unsafe {
            sys::nvrtcVersion(&raw mut major, &raw mut minor)
        })?;
        // SAFETY: as above.
        check("nvrtcGetNumSupportedArchs", unsafe {
            sys::nvrtcGetNumSupportedArchs(&raw mut count)
        })?;
        let mut known: Vec<c_int> = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: the array has as many elements as the library said it writes.
        check("nvrtcGetSupportedArchs", unsafe {
            sys::nvrtcGetSupportedArchs(known.as_mut_ptr())
        })?;
        let architectures = known.into_iter().filter_map(|arch| u32::try_from(arch).ok()).collect();
        Ok(Self {
            version: (major, minor),
            architectures,
        })
    }

    /// Of its version.
    pub fn major(&self) -> u32 {
        u32::try_from(self.version.0).unwrap_or(0)
    }

    fn log(program: &Program) -> String {
        let mut size = 0;
        // SAFETY: the program is live, and `size` valid for the write.
        if check("log", unsafe { sys::nvrtcGetProgramLogSize(program.0, &raw mut size) }).is_err() {
            return String::new();
        }
        let mut bytes = vec![0_u8; size];
        // SAFETY: the buffer has the size that the library asked for.
        let got = unsafe { sys::nvrtcGetProgramLog(program.0, bytes.as_mut_ptr().cast::<c_char>()) };
        if check("log", got).is_err() {
            return String::new();
        }
        bytes.truncate(LOG_BYTES_MAX);
        let text = String::from_utf8_lossy(&bytes);
        text.trim_end_matches('\0').trim().to_owned()
    }
}

impl Compiler for Nvrtc {
    fn version(&self) -> String {
        format!("{}.{}", self.version.0, self.version.1)
    }

    fn compile(&self, source: &Source, headers: &[Source], options: &[String]) -> Result<Vec<u8>, DriverError> {
        let (code, name) = (text(source.file, source.text)?, text("a name", source.file)?);
        let list = |texts: Vec<&str>| -> Result<Vec<CString>, DriverError> {
            texts.into_iter().map(|part| text("a header or option", part)).collect()
        };
        let header_texts = list(headers.iter().map(|header| header.text).collect())?;
        let header_names = list(headers.iter().map(|header| header.file).collect())?;
        let options = list(options.iter().map(String::as_str).collect())?;
        let pointers = |texts: &[CString]| -> Vec<*const c_char> { texts.iter().map(|text| text.as_ptr()).collect() };
        let (texts, names) = (pointers(&header_texts), pointers(&header_names));
        let mut program = std::ptr::null_mut();
        // SAFETY: all texts end with a zero byte and outlive the program; both lists have as many entries as is said.
        check("nvrtcCreateProgram", unsafe {
            sys::nvrtcCreateProgram(
                &raw mut program,
                code.as_ptr(),
                name.as_ptr(),
                texts.len() as c_int,
                texts.as_ptr(),
                names.as_ptr(),
            )
        })?;
        let program = Program(program);
        let options = (pointers(&options), options);
        // SAFETY: the program is live; the options end with zero bytes and live until the call returns.
        let compiled = unsafe { sys::nvrtcCompileProgram(program.0, options.0.len() as c_int, options.0.as_ptr()) };
        check("nvrtcCompileProgram", compiled).map_err(|error| DriverError {
            detail: format!("{}: {}", source.file, Self::log(&program)),
            ..error
        })?;
        let mut size = 0;
        // SAFETY: the program is compiled, and `size` valid for the write.
        check("nvrtcGetCUBINSize", unsafe {
            sys::nvrtcGetCUBINSize(program.0, &raw mut size)
        })?;
        let mut cubin = vec![0_u8; size];
        // SAFETY: the buffer has the size that the library asked for.
        check("nvrtcGetCUBIN", unsafe {
            sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast::<c_char>())
        })?;
        Ok(cubin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::cubin::{architecture, options};
    use crate::cuda::table;

    /// The compiler, where this machine has one; its absence is one line. Where the environment says that it is there
    /// (`TARAZED_NVRTC_REQUIRED`), absence is a failure.
    fn compiler() -> Option<Nvrtc> {
        match Nvrtc::open() {
            Ok(compiler) => Some(compiler),
            Err(absence) => {
                assert!(std::env::var_os("TARAZED_NVRTC_REQUIRED").is_none(), "{absence}");
                assert_eq!(absence.to_string(), "no CUDA device: libnvrtc.so is not there");
                None
            }
        }
    }

    #[test]
    fn a_source_compiles_to_machine_code_where_there_is_a_compiler() {
        let Some(compiler) = compiler() else { return };
        for capability in [(8, 0), (9, 0)] {
            let options = options(&architecture(capability, &compiler.architectures).unwrap());
            let cubin = compiler.compile(&table::POINTWISE, &table::HEADERS, &options).unwrap();
            assert_eq!(cubin[..4], *b"\x7fELF", "{options:?}");
        }
    }

    #[test]
    fn a_mistake_is_told_with_its_line() {
        let Some(compiler) = compiler() else { return };
        let source = Source {
            file: "wrong.cu",
            text: "extern \"C\" __global__ void wrong() {\n  undeclared = 1;\n}\n",
        };
        let error = compiler.compile(&source, &[], &options("sm_80")).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("wrong.cu(2)") && text.contains("undeclared"), "{text}");
        assert_eq!(error.severity, Severity::Refused);
    }
}
