//! What a run would run on, and reading `64xH200-141GB`.

use serde::Serialize;
use std::str::FromStr;
use tarazed_domain::limits::RANKS_MAX;

/// Bytes of one GB, as vendors count them.
pub const GB: u64 = 1_000_000_000;

/// Dense bf16 rates and memory bandwidth of known GPUs, from NVIDIA's data sheets (SXM versions):
/// name, TFLOP/s, GB/s.
const KNOWN_GPUS: [(&str, u64, u64); 7] = [
    ("A100", 312, 2_039),
    ("A800", 312, 2_039),
    ("H100", 989, 3_350),
    ("H800", 989, 3_350),
    ("H200", 989, 4_800),
    ("B200", 2_250, 8_000),
    ("L40S", 362, 864),
];
/// Words in a product's name that make it another GPU than its data sheet's SXM version: slower memory and clocks, or a slice
/// of one.
const OTHER_FORMS: [&str; 3] = ["PCIE", "NVL", "MIG"];
/// GPU memory that is accepted, in GB: a typing error is more likely than a GPU outside.
const GPU_MEMORY_GB: std::ops::RangeInclusive<u64> = 1..=1_024;

/// Hardware of a plan.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Hardware {
    /// One machine whose processors compute, in f32.
    Cpu {
        /// Processor cores.
        cores: u32,
        /// Memory that all rank processes share, in bytes.
        memory_bytes: u64,
    },
    /// GPUs, one rank each, in bf16 with f32 sums.
    Gpu {
        /// Number of GPUs.
        count: u32,
        /// Name, e.g. `H200`.
        name: String,
        /// Memory of one GPU, in bytes.
        memory_bytes: u64,
        /// Dense bf16 rate of one GPU, in TFLOP/s.
        peak_tflops: u64,
        /// Memory bandwidth of one GPU, in GB/s.
        bandwidth_gb_per_s: u64,
    },
}

impl Hardware {
    /// So many GPUs that their driver calls by this name, e.g. `NVIDIA H100 80GB HBM3`; none where their rates are not known.
    #[must_use]
    pub fn of_product(count: u32, product: &str, memory_bytes: u64) -> Option<Self> {
        let product = product.to_ascii_uppercase();
        let words: Vec<&str> = product.split(|c: char| !c.is_ascii_alphanumeric()).collect();
        if OTHER_FORMS.iter().any(|form| words.contains(form)) {
            return None;
        }
        let known = KNOWN_GPUS.iter().find(|(name, _, _)| words.contains(name));
        known.map(|&(name, peak_tflops, bandwidth_gb_per_s)| Self::Gpu {
            count,
            name: name.to_owned(),
            memory_bytes,
            peak_tflops,
            bandwidth_gb_per_s,
        })
    }
}

/// A hardware description that cannot be read.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseHardwareError {
    /// Not `COUNTxNAME-MEMORYGB`.
    #[error("'{0}' is not COUNTxNAME-MEMORYGB; write for example 64xH200-141GB")]
    Form(String),
    /// The count is no number, zero or too large.
    #[error("'{0}' is not a number of GPUs from 1 to {RANKS_MAX}; write for example 64xH200-141GB")]
    Count(String),
    /// An unknown GPU.
    #[error("'{name}' is not a known GPU; known are {known}")]
    Name {
        /// The name given.
        name: String,
        /// Those known.
        known: String,
    },
    /// The memory is no number of GB.
    #[error("'{0}' is not a memory size from {min} to {max} GB; write for example 64xH200-141GB", min = GPU_MEMORY_GB.start(), max = GPU_MEMORY_GB.end())]
    Memory(String),
}

impl FromStr for Hardware {
    type Err = ParseHardwareError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || ParseHardwareError::Form(text.to_owned());
        let (count, device) = text.split_once(['x', 'X']).ok_or_else(form)?;
        let (name, memory) = device.rsplit_once('-').ok_or_else(form)?;
        let count = count
            .trim()
            .parse::<u32>()
            .ok()
            .filter(|count| (1..=RANKS_MAX).contains(count))
            .ok_or_else(|| ParseHardwareError::Count(count.to_owned()))?;
        let &(name, peak_tflops, bandwidth_gb_per_s) = KNOWN_GPUS
            .iter()
            .find(|(known, _, _)| known.eq_ignore_ascii_case(name.trim()))
            .ok_or_else(|| ParseHardwareError::Name {
                name: name.to_owned(),
                known: KNOWN_GPUS.map(|(known, _, _)| known).join(", "),
            })?;
        let upper = memory.trim().to_ascii_uppercase();
        let memory_gb = upper
            .strip_suffix("GB")
            .and_then(|number| number.trim().parse::<u64>().ok())
            .filter(|gb| GPU_MEMORY_GB.contains(gb))
            .ok_or_else(|| ParseHardwareError::Memory(memory.to_owned()))?;
        Ok(Self::Gpu {
            count,
            name: name.to_owned(),
            memory_bytes: memory_gb * GB,
            peak_tflops,
            bandwidth_gb_per_s,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cluster_is_read() {
        let read: Hardware = "64xH200-141GB".parse().expect("good");
        assert_eq!(
            read,
            Hardware::Gpu {
                count: 64,
                name: "H200".to_owned(),
                memory_bytes: 141 * GB,
                peak_tflops: 989,
                bandwidth_gb_per_s: 4_800,
            }
        );
        assert_eq!(
            "8Xa100-80gb".parse::<Hardware>().expect("good"),
            "8xA100-80GB".parse().expect("good")
        );
    }

    #[test]
    fn a_drivers_name_is_understood_where_the_rates_are_known() {
        for (product, text) in [
            ("NVIDIA H100 80GB HBM3", "2xH100-80GB"),
            ("NVIDIA H200", "2xH200-80GB"),
            ("NVIDIA A100-SXM4-80GB", "2xA100-80GB"),
        ] {
            assert_eq!(
                Hardware::of_product(2, product, 80 * GB),
                text.parse::<Hardware>().ok(),
                "{product}"
            );
        }
        for product in [
            "NVIDIA H100 PCIe",
            "NVIDIA H200 NVL",
            "NVIDIA A100-PCIE-40GB",
            "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
            "NVIDIA GH200 480GB",
            "",
        ] {
            assert_eq!(Hardware::of_product(1, product, 80 * GB), None, "{product}");
        }
    }

    #[test]
    fn each_mistake_is_named() {
        let error = |text: &str| text.parse::<Hardware>().expect_err(text);
        assert!(matches!(error("64 H200"), ParseHardwareError::Form(_)));
        assert!(matches!(error("64xH200"), ParseHardwareError::Form(_)));
        assert!(matches!(error(""), ParseHardwareError::Form(_)));
        assert!(matches!(error("0xH200-141GB"), ParseHardwareError::Count(_)));
        assert!(matches!(error("-1xH200-141GB"), ParseHardwareError::Count(_)));
        assert!(matches!(error("99999999xH200-141GB"), ParseHardwareError::Count(_)));
        assert!(matches!(error("8xTPU-95GB"), ParseHardwareError::Name { .. }));
        assert!(error("8xTPU-95GB").to_string().contains("known are A100"));
        for memory in ["141", "GB", "0GB", "99999GB", "18446744073709551615GB"] {
            assert!(
                matches!(error(&format!("8xH200-{memory}")), ParseHardwareError::Memory(_)),
                "{memory}"
            );
        }
    }
}
