//! The conformance suite on the CPU, on every instruction set of this machine.

use std::hash::{BuildHasher, Hasher};
use tarazed_kernels::{CpuDevice, conformance};

const F32_UNIT_ROUNDOFF: f64 = 1.0 / (1_u64 << 24) as f64;

/// A seed whose one log-sum-exp of a single key is nearly zero: its error is not measured by its size.
const LOG_SUM_NEAR_ZERO: u64 = 7_569_223_810_146_476_638;

#[test]
fn every_instruction_set_conforms() {
    // One seed that is new each time; a failure prints it.
    let fresh = std::hash::RandomState::new().build_hasher().finish();
    for device in CpuDevice::all_instruction_sets() {
        // Portable code emulates each fused multiply-add where the target has none, and takes its time.
        let seeds: &[u64] = if device.instruction_set() == "portable" {
            &[fresh]
        } else {
            &[1, 2, LOG_SUM_NEAR_ZERO, fresh]
        };
        for &seed in seeds {
            match conformance::run(&device, F32_UNIT_ROUNDOFF, seed) {
                Ok(measured) => {
                    for kernel in measured {
                        println!(
                            "{:9} {:40} {:.3} of its bound",
                            device.instruction_set(),
                            kernel.kernel,
                            kernel.share
                        );
                    }
                }
                Err(error) => panic!("{}: {error}", device.instruction_set()),
            }
        }
    }
}
