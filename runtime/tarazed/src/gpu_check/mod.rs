//! Whether a GPU computes what it must, the same each time, and how fast: what `tarazed gpu-check` finds out.
//!
//! Checks are generic over the device, so that they run, and fail where they must, without a GPU, too. Nothing is said of a
//! check that did not pass: the report holds what did, and lists the failures. Each check runs whatever became of those before
//! it, so that one call tells all. What each of its keys means: docs/FORMATS.md.

pub mod bench;
pub mod determinism;
pub mod processes;
pub mod timing;

use serde_json::{Value, json};
use tarazed_kernels::cuda::CudaDevice;
use tarazed_kernels::cuda::driver::Driver;
use tarazed_kernels::{Device, conformance};

/// Unit roundoff of bf16, the working precision of CUDA devices.
const BF16_UNIT_ROUNDOFF: f64 = 1.0 / (1_u64 << 8) as f64;

/// Environment variable that says which devices a process sees, in order, as numbers or names.
pub const VISIBLE_VARIABLE: &str = "CUDA_VISIBLE_DEVICES";

/// What the variable must be for a process to see one device alone: the one of number `ordinal` among those that this process
/// sees.
#[must_use]
pub fn visible_alone(seen: Option<&str>, ordinal: u32) -> String {
    let named = seen.and_then(|seen| seen.split(',').nth(ordinal as usize));
    named.map_or_else(|| ordinal.to_string(), |name| name.trim().to_owned())
}

/// A check that failed.
#[derive(Debug, thiserror::Error)]
#[error("{check}: {cause}")]
pub struct CheckFailed {
    /// Which.
    pub check: &'static str,
    /// Why.
    pub cause: String,
}

impl CheckFailed {
    /// For errors of what a check is made of.
    pub(crate) fn because<E: std::fmt::Display>(check: &'static str) -> impl Fn(E) -> Self {
        move |error| Self {
            check,
            cause: error.to_string(),
        }
    }
}

/// What to check with.
#[derive(Clone, Debug)]
pub struct Extent {
    /// Seeds of the conformance suite's inputs.
    pub seeds: Vec<u64>,
    /// The model whose passes are compared bit for bit.
    pub determinism: determinism::Sizes,
    /// What is timed.
    pub timing: timing::Sizes,
}

/// The checks of a device itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// Each kernel against its oracle.
    Conformance,
    /// The same bits again.
    Determinism,
    /// How long things take.
    Timings,
}

/// In their order.
pub const PARTS: [Part; 3] = [Part::Conformance, Part::Determinism, Part::Timings];

impl Part {
    /// Its key in the report.
    #[must_use]
    pub const fn key(self) -> &'static str {
        match self {
            Self::Conformance => "conformance",
            Self::Determinism => "determinism",
            Self::Timings => "timings",
        }
    }

    /// What it finds, and what it does not pass.
    pub fn run<D: Driver>(self, device: &CudaDevice<D>, extent: &Extent) -> Found {
        match self {
            Self::Conformance => conform(device, &extent.seeds),
            Self::Determinism => determinism::check(device, &extent.determinism).into(),
            Self::Timings => timing::measure(device, &extent.timing).into(),
        }
    }
}

/// Which device it is.
pub fn describe<D: Driver>(device: &CudaDevice<D>) -> Value {
    let facts = device.facts();
    json!({
        "type": device.device_type(), "name": facts.name,
        "compute_capability": format!("{}.{}", facts.capability.0, facts.capability.1),
        "multiprocessors": facts.multiprocessors, "memory_bytes": facts.memory_bytes,
        "driver_version": facts.driver_version,
    })
}

/// What a check found, and what failed: where it has several parts, some may pass.
#[derive(Debug, Default)]
pub struct Found {
    /// For the report.
    pub value: Option<Value>,
    /// What did not pass.
    pub failures: Vec<CheckFailed>,
}

impl From<Result<Value, CheckFailed>> for Found {
    fn from(found: Result<Value, CheckFailed>) -> Self {
        match found {
            Ok(value) => Self {
                value: Some(value),
                failures: Vec::new(),
            },
            Err(failure) => Self {
                value: None,
                failures: vec![failure],
            },
        }
    }
}

/// Puts what a check found into the report, and its failures to the others.
pub fn keep(report: &mut Value, failures: &mut Vec<CheckFailed>, key: &str, found: Found) {
    if let Some(value) = found.value {
        report[key] = value;
    }
    failures.extend(found.failures);
}

/// The report's last words: whether all passed, once all have run, and what did not.
pub fn conclude(report: &mut Value, failures: &[CheckFailed], finished: bool) {
    report["finished"] = json!(finished);
    report["passed"] = json!(finished && failures.is_empty());
    if !failures.is_empty() {
        report["failures"] = json!(failures.iter().map(ToString::to_string).collect::<Vec<_>>());
    }
}

fn conform<D: Driver>(device: &CudaDevice<D>, seeds: &[u64]) -> Found {
    let (mut suites, mut failures) = (Vec::new(), Vec::new());
    for &seed in seeds {
        let measured = match conformance::run(device, BF16_UNIT_ROUNDOFF, seed) {
            Ok(measured) => measured,
            Err(error) => {
                failures.push(CheckFailed::because("conformance")(error));
                continue;
            }
        };
        let kernels: Vec<Value> = measured
            .iter()
            .map(|kernel| json!({"kernel": kernel.kernel, "share_of_bound": kernel.share, "relative_error": kernel.relative}))
            .collect();
        suites.push(json!({"seed": seed, "kernels": kernels}));
    }
    let value = (!suites.is_empty()).then(|| json!(suites));
    Found { value, failures }
}

/// The matrix products planned so far.
pub fn plans<D: Driver>(device: &CudaDevice<D>) -> Value {
    let plans: Vec<Value> = device
        .plans()
        .iter()
        .map(|(key, plan)| {
            json!({
                "shape": format!("{key:?}"), "algorithm": plan.algorithm, "workspace_bytes": plan.workspace_bytes,
            })
        })
        .collect();
    json!(plans)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tarazed_kernels::cuda::driver::Severity;
    use tarazed_kernels::cuda::recording::RecordingDriver;

    fn extent() -> Extent {
        Extent {
            seeds: vec![1],
            determinism: determinism::Sizes::small(),
            timing: timing::Sizes::small(),
        }
    }

    fn check(device: &CudaDevice<RecordingDriver>) -> (Value, Vec<CheckFailed>) {
        let (mut report, mut failures) = (json!({}), Vec::new());
        for part in PARTS {
            keep(&mut report, &mut failures, part.key(), part.run(device, &extent()));
        }
        (report, failures)
    }

    #[test]
    fn another_process_sees_the_device_that_is_checked() {
        assert_eq!(visible_alone(None, 2), "2");
        assert_eq!(visible_alone(Some("5, 3"), 1), "3");
        assert_eq!(visible_alone(Some("GPU-0a1b"), 0), "GPU-0a1b");
    }

    /// A device that computes nothing fails where something is compared; each of its kernels is named, and what could be found
    /// out all the same stands in the report.
    #[test]
    fn a_device_that_computes_nothing_does_not_pass() {
        let device = CudaDevice::new(RecordingDriver::new()).expect("a device");
        let (mut report, failures) = check(&device);
        assert_eq!(failures[0].check, "conformance");
        for kernel in ["gemm", "norm", "attention", "swiglu", "adamw"] {
            assert!(failures[0].cause.contains(kernel), "{}", failures[0]);
        }
        assert!(
            report["conformance"].is_null() && report["timings"].is_array(),
            "{report}"
        );
        conclude(&mut report, &failures, true);
        assert_eq!(report["passed"], json!(false));
        assert_eq!(report["failures"].as_array().map(Vec::len), Some(failures.len()));
        assert_eq!(describe(&device)["name"], json!("recorder"));
    }

    /// A report that was cut short does not say that all passed.
    #[test]
    fn only_a_finished_report_passes() {
        let mut report = json!({});
        conclude(&mut report, &[], false);
        assert_eq!((&report["finished"], &report["passed"]), (&json!(false), &json!(false)));
        conclude(&mut report, &[], true);
        assert_eq!((&report["finished"], &report["passed"]), (&json!(true), &json!(true)));
    }

    #[test]
    fn a_device_that_fails_is_told_with_its_cause() {
        let recorder = RecordingDriver::new();
        let device = CudaDevice::new(recorder.clone()).expect("a device");
        // In the midst of the first check, before its result is looked at.
        recorder.fail(recorder.asked().len() + 3, Severity::Sticky);
        let (report, failures) = check(&device);
        assert!(
            failures
                .iter()
                .all(|failure| failure.cause.contains("CUDA_ERROR_ILLEGAL_ADDRESS"))
        );
        assert_eq!(failures.len(), 3, "a lost device passes nothing more: {report}");
    }
}
