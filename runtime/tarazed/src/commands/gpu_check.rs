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
    /// Folder of the report, `DEVICE-COMMIT.json`.
    #[arg(long, value_name = "DIR", default_value = "docs/gpu")]
    out: PathBuf,
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
    use crate::gpu_check::{Extent, check, determinism, timing};
    use crate::output::print;
    use serde_json::json;
    use std::path::{Path, PathBuf};
    use std::process::Command;
    use tarazed_kernels::cuda::CudaDevice;
    use tarazed_kernels::cuda::cubin::CubinCache;
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
        let (mut report, failed) = check(&device, &extent);
        let commit = commit();
        report["commit"] = json!(commit);
        report["version"] = json!(env!("CARGO_PKG_VERSION"));
        let origins = device.driver().origins();
        let cubins = origins.iter().map(|(source, origin)| format!("{source}: {origin:?}"));
        report["cubins"] = json!(cubins.collect::<Vec<_>>());
        let path = args.out.join(file_name(&device.facts().name, &commit));
        write(&path, &format!("{report:#}\n"))?;
        match failed {
            None => {
                print(&format!("every check passed; see {}\n", path.display()))?;
                Ok(Exit::Done)
            }
            Some(failure) => Err(Failure::halted(
                "gpu-check",
                failure,
                format!("do not train on this device; the report is {}", path.display()),
            )),
        }
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

    /// Letters, digits and dashes alone.
    fn file_name(device: &str, commit: &str) -> String {
        let plain = |text: &str| -> String {
            let dashed = text.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
            dashed.trim_matches('-').to_lowercase()
        };
        format!("{}-{}.json", plain(device), plain(commit))
    }

    /// The commit of the working directory, and whether it was changed since.
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
        fn a_report_is_named_after_device_and_commit() {
            assert_eq!(
                file_name("NVIDIA H100 80GB HBM3", "1a2b3c-changed"),
                "nvidia-h100-80gb-hbm3-1a2b3c-changed.json"
            );
        }
    }
}
