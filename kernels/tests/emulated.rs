//! The CUDA device on the emulator: the conformance suite over the kernels' own sources, in several orders of blocks and threads.
#![cfg(feature = "emulator")]

use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use tarazed_kernels::conformance;
use tarazed_kernels::cuda::CudaDevice;
use tarazed_kernels::cuda::emulated::EmulatedDriver;

/// Of bf16, the device's working precision.
const BF16_UNIT_ROUNDOFF: f64 = 1.0 / (1_u64 << 8) as f64;

fn device() -> CudaDevice<EmulatedDriver> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let driver = EmulatedDriver::new(folder).unwrap_or_else(|error| panic!("{error}"));
    CudaDevice::new(driver).unwrap_or_else(|error| panic!("{error}"))
}

#[test]
fn the_cuda_device_conforms_in_every_order() {
    let device = device();
    // One seed that is new each time; a failure prints it.
    let fresh = std::hash::RandomState::new().build_hasher().finish();
    for (order, seed) in [(0, 1), (1, 1), (2, fresh), (fresh, fresh)] {
        device.driver().set_order(order);
        match conformance::run(&device, BF16_UNIT_ROUNDOFF, seed) {
            Ok(measured) => {
                for kernel in measured {
                    println!("order {order:20} {:40} {:.3} of its bound", kernel.kernel, kernel.share);
                }
            }
            Err(error) => panic!("order {order}: {error}"),
        }
    }
}
