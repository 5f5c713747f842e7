//! Finished machine code (cubin), compiled once for each kind of device and kept on disk.
//!
//! The name of a file is the BLAKE3 of everything that its contents follow from: source, headers, options, compiler and
//! architecture. A file holds the BLAKE3 of its code in front of it, which is checked before the code is used; one that is
//! torn, rotten or of another format is compiled again and replaced. Files appear whole, by a rename. A folder that cannot
//! be written costs time, not the run.

use super::driver::DriverError;
use super::table::{self, Source};
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// The first bytes of a file; the digit is the format's version.
const MAGIC: &[u8; 8] = b"TZCUBIN1";
const HASH_BYTES: usize = 32;

/// What compiles CUDA sources.
pub trait Compiler {
    /// Its name and version: part of what code follows from.
    fn version(&self) -> String;

    /// Compiles a source to a cubin.
    ///
    /// # Errors
    /// With the compiler's log.
    fn compile(&self, source: &Source, headers: &[Source], options: &[String]) -> Result<Vec<u8>, DriverError>;
}

/// How a cubin was come by.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Origin {
    /// From the folder.
    Kept,
    /// Compiled, as there was none.
    Compiled,
    /// Compiled, as the one that was there could not be used, and why.
    Replaced(String),
}

/// A folder of cubins.
#[derive(Clone, Debug)]
pub struct CubinCache {
    folder: Option<PathBuf>,
}

/// Options of a compilation for an architecture, e.g. `sm_90a`.
#[must_use]
pub fn options(architecture: &str) -> Vec<String> {
    let options = table::OPTIONS.iter().map(|&option| option.to_owned());
    options.chain([format!("--gpu-architecture={architecture}")]).collect()
}

/// The architecture to compile for: the device's own, or an older one of its generation that the compiler knows, whose
/// code it runs, too. `known` are those of the compiler, e.g. 90 for `sm_90`.
///
/// Hopper gets `sm_90a`, which alone has its warp-group instructions.
///
/// # Errors
/// One line that says what to do.
pub fn architecture((major, minor): (u32, u32), known: &[u32]) -> Result<String, String> {
    let own = 10 * major + minor;
    let best = known
        .iter()
        .copied()
        .filter(|&arch| arch / 10 == major && arch <= own)
        .max();
    match best {
        Some(90) => Ok("sm_90a".to_owned()),
        Some(arch) => Ok(format!("sm_{arch}")),
        None => Err(format!(
            "the CUDA compiler on this machine does not know sm_{own}: install libnvrtc of a newer CUDA version"
        )),
    }
}

impl CubinCache {
    /// A cache in this folder, which is made where it is not there; without a folder everything is compiled.
    #[must_use]
    pub const fn new(folder: Option<PathBuf>) -> Self {
        Self { folder }
    }

    /// Where cubins are kept unless somebody says otherwise: `TARAZED_CUBIN_DIR`, else `tarazed/cubin` in the user's cache
    /// folder (`XDG_CACHE_HOME`, else `.cache` in `HOME`).
    #[must_use]
    pub fn default_folder(variable: impl Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
        let set = |name: &str| variable(name).filter(|path| path.is_absolute());
        set("TARAZED_CUBIN_DIR").or_else(|| {
            let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")));
            cache.map(|cache| cache.join("tarazed").join("cubin"))
        })
    }

    /// The code of a source for an architecture.
    ///
    /// # Errors
    /// The compiler's, with its log.
    pub fn get(
        &self,
        compiler: &impl Compiler,
        source: &Source,
        headers: &[Source],
        architecture: &str,
    ) -> Result<(Vec<u8>, Origin), DriverError> {
        let options = options(architecture);
        let compile = || compiler.compile(source, headers, &options);
        let Some(folder) = &self.folder else {
            return Ok((compile()?, Origin::Compiled));
        };
        let name = key(source, headers, &options, &compiler.version());
        let path = folder.join(format!("{}.cubin", name.to_hex()));
        let origin = match read(&path) {
            Ok(code) => return Ok((code, Origin::Kept)),
            Err(Unusable::NotThere) => Origin::Compiled,
            Err(Unusable::Because(why)) => Origin::Replaced(why),
        };
        let code = compile()?;
        // Kept if it can be: the code is good without it.
        let _ = write(folder, &path, &code);
        Ok((code, origin))
    }
}

/// Everything that code follows from, each part behind its length, so that no two lists read alike.
fn key(source: &Source, headers: &[Source], options: &[String], compiler: &str) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new_derive_key("tarazed 2026 cubin");
    let mut part = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    part(compiler);
    part(&options.len().to_string());
    options.iter().for_each(|option| part(option));
    for source in std::iter::once(source).chain(headers) {
        part(source.file);
        part(source.text);
    }
    hasher.finalize()
}

/// What else decides numbers: how shapes are launched and sums cut, which of a library's offers are taken, how many logits are made
/// at a time.
const HOST_HALF: [&str; 3] = [
    include_str!("table/launches.rs"),
    include_str!("real/cublaslt.rs"),
    include_str!("device.rs"),
];

/// BLAKE3 over all sources, headers and options, and the host's code that decides numbers with them: what the kernels of this build
/// are, for [`crate::Device::device_type`].
#[must_use]
pub fn sources_digest() -> String {
    let mut hasher = blake3::Hasher::new_derive_key("tarazed 2026 CUDA sources");
    let headers = table::HEADERS.iter();
    for source in table::SOURCES.into_iter().chain(headers) {
        for text in [source.file, source.text] {
            hasher.update(&(text.len() as u64).to_le_bytes());
            hasher.update(text.as_bytes());
        }
    }
    for text in HOST_HALF {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    }
    for option in table::OPTIONS {
        hasher.update(option.as_bytes());
        hasher.update(&[0]);
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

enum Unusable {
    NotThere,
    Because(String),
}

/// A file's code, if its hash says that it is whole.
fn read(path: &Path) -> Result<Vec<u8>, Unusable> {
    let bytes = fs::read(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Unusable::NotThere,
        _ => Unusable::Because(error.to_string()),
    })?;
    let because = |why: &str| Unusable::Because(format!("{}: {why}", path.display()));
    let body = bytes
        .strip_prefix(MAGIC)
        .ok_or_else(|| because("it does not begin as a file of this version does"))?;
    let (hash, code) = body
        .split_at_checked(HASH_BYTES)
        .ok_or_else(|| because("it ends within its hash"))?;
    if blake3::hash(code).as_bytes() != hash {
        return Err(because("its hash does not fit its code"));
    }
    Ok(code.to_vec())
}

fn write(folder: &Path, path: &Path, code: &[u8]) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    fs::create_dir_all(folder)?;
    // Ranks of one machine start together: each writes a file of its own, and the last rename stays.
    let own = format!(".{}.{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
    let temporary = folder.join(own);
    let written = fs::File::create_new(&temporary).and_then(|mut file| {
        file.write_all(MAGIC)?;
        file.write_all(blake3::hash(code).as_bytes())?;
        file.write_all(code)
    });
    let placed = written.and_then(|()| fs::rename(&temporary, path));
    if placed.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    placed
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::driver::Severity;
    use std::cell::Cell;

    /// Its code is what it was asked for.
    struct Echo {
        version: &'static str,
        compiled: Cell<usize>,
    }

    impl Echo {
        fn new(version: &'static str) -> Self {
            let compiled = Cell::new(0);
            Self { version, compiled }
        }
    }

    impl Compiler for Echo {
        fn version(&self) -> String {
            self.version.to_owned()
        }

        fn compile(&self, source: &Source, _: &[Source], options: &[String]) -> Result<Vec<u8>, DriverError> {
            self.compiled.set(self.compiled.get() + 1);
            if source.text == "bad" {
                return Err(DriverError {
                    call: "nvrtcCompileProgram",
                    severity: Severity::Refused,
                    name: "NVRTC_ERROR_COMPILATION".to_owned(),
                    detail: "line 1: bad".to_owned(),
                });
            }
            Ok(format!("{} {} {options:?}", self.version, source.text).into_bytes())
        }
    }

    const SOURCE: Source = Source {
        file: "a.cu",
        text: "good",
    };
    const HEADERS: [Source; 1] = [Source {
        file: "a.cuh",
        text: "x",
    }];

    fn folder() -> (tempfile::TempDir, CubinCache) {
        let folder = tempfile::tempdir().unwrap();
        let cache = CubinCache::new(Some(folder.path().join("deep").join("er")));
        (folder, cache)
    }

    fn files(cache: &CubinCache) -> Vec<PathBuf> {
        let folder = cache.folder.as_ref().unwrap();
        fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .collect()
    }

    #[test]
    fn the_second_time_nothing_is_compiled() {
        let (_folder, cache) = folder();
        let compiler = Echo::new("1");
        let (first, origin) = cache.get(&compiler, &SOURCE, &HEADERS, "sm_80").unwrap();
        assert_eq!(origin, Origin::Compiled);
        let (second, origin) = cache.get(&compiler, &SOURCE, &HEADERS, "sm_80").unwrap();
        assert_eq!((origin, compiler.compiled.get()), (Origin::Kept, 1));
        assert_eq!(first, second);
        assert_eq!(files(&cache).len(), 1, "no file is left over");
    }

    #[test]
    fn whatever_code_follows_from_has_a_file_of_its_own() {
        let (_folder, cache) = folder();
        let compiler = Echo::new("1");
        let get = |compiler: &Echo, source: &Source, headers: &[Source], architecture: &str| {
            cache.get(compiler, source, headers, architecture).unwrap().1
        };
        assert_eq!(get(&compiler, &SOURCE, &HEADERS, "sm_80"), Origin::Compiled);
        assert_eq!(get(&compiler, &SOURCE, &HEADERS, "sm_90a"), Origin::Compiled);
        assert_eq!(get(&Echo::new("2"), &SOURCE, &HEADERS, "sm_80"), Origin::Compiled);
        let other = [Source {
            file: "a.cuh",
            text: "y",
        }];
        assert_eq!(get(&compiler, &SOURCE, &other, "sm_80"), Origin::Compiled);
        let other = Source {
            file: "a.cu",
            text: "better",
        };
        assert_eq!(get(&compiler, &other, &HEADERS, "sm_80"), Origin::Compiled);
        assert_eq!(files(&cache).len(), 5);
        assert_eq!(get(&compiler, &SOURCE, &HEADERS, "sm_80"), Origin::Kept);
    }

    #[test]
    fn a_damaged_file_is_not_used_but_replaced() {
        let (_folder, cache) = folder();
        let compiler = Echo::new("1");
        let get = || cache.get(&compiler, &SOURCE, &HEADERS, "sm_80").unwrap();
        let (good, _) = get();
        let path = files(&cache)[0].clone();
        let whole = fs::read(&path).unwrap();
        let mut damages: Vec<Vec<u8>> = (0..whole.len()).map(|end| whole[..end].to_vec()).collect();
        for bit in 0..8 * whole.len() {
            let mut flipped = whole.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            damages.push(flipped);
        }
        for damaged in damages {
            fs::write(&path, &damaged).unwrap();
            let (code, origin) = get();
            assert_eq!(code, good);
            assert!(matches!(origin, Origin::Replaced(_)), "{origin:?}");
            assert_eq!(get().1, Origin::Kept);
        }
    }

    #[test]
    fn a_source_that_does_not_compile_leaves_nothing_and_says_why() {
        let (_folder, cache) = folder();
        let bad = Source {
            file: "b.cu",
            text: "bad",
        };
        let error = cache.get(&Echo::new("1"), &bad, &[], "sm_80").unwrap_err();
        assert!(error.to_string().contains("line 1: bad"), "{error}");
        assert!(!cache.folder.as_ref().unwrap().exists());
    }

    #[test]
    fn a_folder_that_cannot_be_written_costs_only_time() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        fs::write(&file, "in the way").unwrap();
        let compiler = Echo::new("1");
        for folder in [Some(file), None] {
            let cache = CubinCache::new(folder);
            for _ in 0..2 {
                let (code, origin) = cache.get(&compiler, &SOURCE, &HEADERS, "sm_80").unwrap();
                assert!(!code.is_empty() && origin != Origin::Kept, "{origin:?}");
            }
        }
    }

    #[test]
    fn the_architecture_is_the_newest_that_device_and_compiler_share() {
        let known = [75, 80, 86, 90, 100, 103, 120];
        assert_eq!(architecture((9, 0), &known).unwrap(), "sm_90a");
        assert_eq!(architecture((8, 0), &known).unwrap(), "sm_80");
        assert_eq!(architecture((8, 9), &known).unwrap(), "sm_86");
        assert_eq!(architecture((10, 3), &known).unwrap(), "sm_103");
        assert!(architecture((11, 0), &known).unwrap_err().contains("sm_110"));
        assert!(architecture((9, 0), &[80]).is_err());
    }

    #[test]
    fn the_folder_follows_the_usual_variables() {
        let set = |pairs: &'static [(&str, &str)]| {
            CubinCache::default_folder(|name| {
                let found = pairs.iter().find(|(key, _)| *key == name);
                found.map(|(_, value)| PathBuf::from(value))
            })
        };
        assert_eq!(set(&[]), None);
        assert_eq!(set(&[("HOME", "/h")]), Some("/h/.cache/tarazed/cubin".into()));
        assert_eq!(
            set(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]),
            Some("/c/tarazed/cubin".into())
        );
        assert_eq!(
            set(&[("XDG_CACHE_HOME", "relative"), ("HOME", "/h")]),
            Some("/h/.cache/tarazed/cubin".into())
        );
        assert_eq!(set(&[("TARAZED_CUBIN_DIR", "/t"), ("HOME", "/h")]), Some("/t".into()));
    }
}
