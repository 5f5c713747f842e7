//! `tarazed gpu-check`: whether this machine's GPU computes what it must, the same each time, and how fast.

use crate::exit::{Exit, Failure};
use std::path::PathBuf;

/// Options of `tarazed gpu-check`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Number of the device, from 0.
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: u32,
    /// Seeds of the conformance suite's inputs.
    #[arg(long, value_name = "N", value_delimiter = ',', default_values_t = [1, 2, 3])]
    seeds: Vec<u64>,
    /// Folder of the report, `DEVICE-build-ID.json`; the ID is the beginning of this program's BLAKE3 hash.
    #[arg(long, value_name = "DIR", default_value = "docs/gpu")]
    out: PathBuf,
    /// Leave out the whole runs of several rank processes.
    #[arg(long)]
    skip_processes: bool,
    /// Time training steps of these configs besides, e.g. configs/gpu-124m.toml.
    #[arg(long, value_name = "CONFIG", value_delimiter = ',')]
    bench: Vec<PathBuf>,
    /// A Python with PyTorch, which times the same steps in turn with this program.
    #[arg(long, value_name = "PROGRAM", requires = "bench")]
    python: Option<PathBuf>,
    /// What that Python runs.
    #[arg(long, value_name = "FILE", default_value = "tests/bench/pytorch_gpu_step.py")]
    bench_script: PathBuf,
    /// Micro-batches of a timed step.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=1024))]
    bench_micro_batches: u32,
    /// Timed steps of each side; three before them do not count.
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    bench_rounds: u32,
}

/// Runs the command.
///
/// # Errors
/// Refused, in one line, where there is no device that can be used; halted where a check fails. The report is written all
/// the same.
#[cfg(feature = "cuda")]
pub fn run(args: &Args) -> Result<Exit, Failure> {
    checks::run(args)
}

/// Without the feature there is no device.
///
/// # Errors
/// Refused.
#[cfg(not(feature = "cuda"))]
pub fn run(_: &Args) -> Result<Exit, Failure> {
    Err(Failure::refused(
        "gpu-check",
        "no CUDA device: this program was built without the feature `cuda`",
        "build it with that feature",
    ))
}

#[cfg(feature = "cuda")]
mod checks {
    use super::Args;
    use crate::exit::{Exit, Failure};
    use crate::gpu_check::{
        CheckFailed, Extent, Found, PARTS, VISIBLE_VARIABLE, bench, conclude, describe, determinism, keep, plans,
        processes, timing, visible_alone,
    };
    use crate::output::print;
    use serde_json::{Value, json};
    use std::fs::File;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use tarazed_domain::config::Config;
    use tarazed_kernels::cuda::CudaDevice;
    use tarazed_kernels::cuda::cubin::CubinCache;
    use tarazed_kernels::cuda::nccl::{Nccl, RealNccl, version_text};
    use tarazed_kernels::cuda::real::RealDriver;

    pub fn run(args: &Args) -> Result<Exit, Failure> {
        let folder = CubinCache::default_folder(|name| std::env::var_os(name).map(Into::into));
        let driver = RealDriver::open(args.device, CubinCache::new(folder)).map_err(|absence| {
            Failure::refused(
                "gpu-check",
                absence,
                "run it where a CUDA device and its libraries are visible",
            )
        })?;
        let device = CudaDevice::new(driver)
            .map_err(|error| Failure::halted("gpu-check", error, "see the compiler's or the driver's message"))?;
        let extent = Extent {
            seeds: args.seeds.clone(),
            determinism: determinism::Sizes::standard(),
            timing: timing::Sizes::standard(),
        };
        // Before anything that takes long: a report that cannot say what it is of is of no use.
        let build = build(Path::new(THIS_PROGRAM))?;
        let bench = bench_sizes(args)?;
        let mut report = identity(&device, &build);
        let path = args.out.join(file_name(&device.facts().name, &build));
        let failures = run_all(args, &device, &extent, &bench, (&mut report, &path))?;
        if failures.is_empty() {
            print(&format!("every check passed; see {}\n", path.display()))?;
            return Ok(Exit::Done);
        }
        let texts: Vec<String> = failures.iter().map(ToString::to_string).collect();
        Err(Failure::halted(
            "gpu-check",
            texts.join("; "),
            format!(
                "do not train on this device with what failed; the report is {}",
                path.display()
            ),
        ))
    }

    /// What the report is of.
    fn identity(device: &CudaDevice<RealDriver>, build: &str) -> Value {
        let origins = device.driver().origins();
        let cubins = origins.iter().map(|(source, origin)| format!("{source}: {origin:?}"));
        json!({
            "device": describe(device),
            "build_blake3": build,
            "commit_of_the_working_directory": commit(),
            "version": env!("CARGO_PKG_VERSION"),
            "cubins": cubins.collect::<Vec<_>>(),
        })
    }

    /// Every check, one after another. The report is written after each, so that one that is cut short is not lost.
    fn run_all(
        args: &Args,
        device: &CudaDevice<RealDriver>,
        extent: &Extent,
        bench: &bench::Sizes,
        (report, path): (&mut Value, &Path),
    ) -> Result<Vec<CheckFailed>, Failure> {
        let mut failures = Vec::new();
        let save = |report: &mut Value, failures: &[CheckFailed], finished: bool| {
            report["matrix_product_plans"] = plans(device);
            conclude(report, failures, finished);
            write(path, &format!("{report:#}\n"))
        };
        for part in PARTS {
            keep(report, &mut failures, part.key(), part.run(device, extent));
            save(report, &failures, false)?;
        }
        if !args.skip_processes {
            keep(report, &mut failures, "processes", whole_runs(args));
            save(report, &failures, false)?;
        }
        for config in &args.bench {
            match bench::measure(device, bench, config) {
                Ok(found) => append(report, "bench", found),
                Err(failure) => failures.push(failure),
            }
            save(report, &failures, false)?;
        }
        save(report, &failures, true)?;
        Ok(failures)
    }

    fn append(report: &mut Value, key: &str, found: Value) {
        match report[key].as_array_mut() {
            Some(list) => list.push(found),
            None => report[key] = json!([found]),
        }
    }

    fn whole_runs(args: &Args) -> Found {
        let folder = std::env::temp_dir().join(format!("tarazed-gpu-check-{}", std::process::id()));
        let sizes = processes::Sizes {
            visible: Some(visible(args)),
            ..processes::Sizes::standard(nccl())
        };
        let found = processes::check(Path::new(THIS_PROGRAM), &folder, &sizes);
        if found.failures.is_empty() {
            // Kept where it fails: it says why. What stays of it otherwise is the system's to clean.
            let _ = std::fs::remove_dir_all(&folder);
        }
        found
    }

    /// What to time; configs and script are looked at before anything that takes long.
    fn bench_sizes(args: &Args) -> Result<bench::Sizes, Failure> {
        for config in &args.bench {
            Config::load(config, &[])?;
        }
        let peer = args.python.clone().map(|python| (python, args.bench_script.clone()));
        if let Some((_, script)) = peer.as_ref().filter(|(_, script)| !script.is_file()) {
            return Err(Failure::refused(
                "--bench-script",
                format!("{} is no file", script.display()),
                "name the script",
            ));
        }
        Ok(bench::Sizes {
            micro_batches: args.bench_micro_batches as usize,
            rounds: args.bench_rounds as usize,
            peer,
            visible: Some(visible(args)),
        })
    }

    fn visible(args: &Args) -> String {
        let seen = std::env::var(VISIBLE_VARIABLE).ok();
        visible_alone(seen.as_deref(), args.device)
    }

    /// Version of the NCCL that ranks would load, or why they could not.
    fn nccl() -> Result<String, String> {
        let library = RealNccl::open().map_err(|absence| absence.to_string())?;
        Ok(version_text(library.version()))
    }

    fn write(path: &Path, text: &str) -> Result<(), Failure> {
        let folder = path.parent().map_or_else(PathBuf::new, Path::to_path_buf);
        std::fs::create_dir_all(folder)
            .and_then(|()| std::fs::write(path, text))
            .map_err(|e| {
                Failure::io(
                    path.display(),
                    &e,
                    "cannot be written",
                    "name another folder with --out",
                )
            })
    }

    /// The program that runs, also where its file was replaced or removed since it started.
    const THIS_PROGRAM: &str = "/proc/self/exe";
    /// Hexadecimal digits of the build in a file's name: enough to tell builds apart; the report has all.
    const BUILD_DIGITS: usize = 12;

    /// The BLAKE3 hash of a program's file, in hexadecimal digits.
    fn build(program: &Path) -> Result<String, Failure> {
        let mut hasher = blake3::Hasher::new();
        File::open(program)
            .and_then(|file| hasher.update_reader(file).map(drop))
            .map_err(|e| Failure::io(program.display(), &e, "cannot be read", "run it where /proc is mounted"))?;
        Ok(hasher.finalize().to_hex().to_string())
    }

    /// Letters, digits and dashes alone.
    fn file_name(device: &str, build: &str) -> String {
        let dashed = device.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        let device = dashed.trim_matches('-').to_lowercase();
        format!("{device}-build-{}.json", build.get(..BUILD_DIGITS).unwrap_or(build))
    }

    /// The commit of the working directory, and whether it was changed since. It need not be what this program was built
    /// from: the build's hash says which program it is.
    fn commit() -> String {
        let git = |arguments: &[&str]| {
            let output = Command::new("git").args(arguments).output().ok()?;
            let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
            output.status.success().then_some(text)
        };
        let Some(hash) = git(&["rev-parse", "--short", "HEAD"]) else {
            return "unknown".to_owned();
        };
        match git(&["status", "--porcelain"]) {
            Some(changes) if changes.is_empty() => hash,
            _ => format!("{hash}-changed"),
        }
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_report_is_named_after_device_and_build() {
            let build = build(Path::new(THIS_PROGRAM)).expect("a program");
            assert_eq!(build.len(), 64);
            assert_eq!(
                file_name("NVIDIA H100 80GB HBM3", &build),
                format!("nvidia-h100-80gb-hbm3-build-{}.json", &build[..12])
            );
        }

        /// Whatever folder it is started in, another program has another build.
        #[test]
        fn a_build_is_the_hash_of_the_program() {
            let folder = tempfile::tempdir().expect("a folder");
            let program = folder.path().join("program");
            std::fs::write(&program, "one").expect("written");
            assert_eq!(build(&program).expect("read"), blake3::hash(b"one").to_hex().as_str());
            std::fs::remove_file(&program).expect("removed");
            assert!(build(&program).is_err());
        }
    }
}
