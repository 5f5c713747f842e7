//! Speed of the CPU matrix product on the shapes of a small model: the best of many short runs, so that other load on the
//! machine shows little.
//!
//! `cargo run --release -p tarazed-kernels --example gemm_bench`

use std::error::Error;
use std::time::Instant;
use tarazed_kernels::{CpuDevice, Device, Gemm, Precision, View, ViewMut};

fn main() -> Result<(), Box<dyn Error>> {
    let shapes = [
        ("qkv forward", Gemm::forward(512, 512, 256)),
        ("out forward", Gemm::forward(512, 256, 256)),
        ("gate-up forward", Gemm::forward(512, 1376, 256)),
        ("down forward", Gemm::forward(512, 256, 688)),
        ("head forward", Gemm::forward(256, 4096, 256)),
        ("gate-up input", Gemm::input_gradient(512, 256, 1376)),
        ("down input", Gemm::input_gradient(512, 688, 256)),
        ("head input", Gemm::input_gradient(256, 256, 4096)),
        ("qkv weight", Gemm::weight_gradient(512, 256, 512)),
        ("gate-up weight", Gemm::weight_gradient(1376, 256, 512)),
        ("down weight", Gemm::weight_gradient(256, 688, 512)),
        ("head weight", Gemm::weight_gradient(4096, 256, 256)),
        ("few tokens", Gemm::forward(128, 512, 256)),
        ("square", Gemm::forward(1024, 1024, 1024)),
    ];
    for device in CpuDevice::all_instruction_sets().iter().take(2) {
        let mut stream = device.stream()?;
        for (name, call) in &shapes {
            let (m, n, k) = (call.m, call.n, call.k);
            let mut a = device.alloc(m * k, Precision::Working)?;
            let mut b = device.alloc(n * k, Precision::Working)?;
            let mut c = device.alloc(m * n, Precision::Working)?;
            for (index, value) in a.iter_mut().chain(b.iter_mut()).enumerate() {
                *value = ((index * 7919) % 1000) as f32 / 500.0 - 1.0;
            }
            let operations = 2.0 * (m * n * k) as f64;
            let repeats = (1e8 / operations) as usize + 1;
            let mut best = f64::MAX;
            for _ in 0..100 {
                let start = Instant::now();
                for _ in 0..repeats {
                    device.gemm(&mut stream, call, View::from(&a), View::from(&b), ViewMut::from(&mut c))?;
                }
                best = best.min(start.elapsed().as_secs_f64() / repeats as f64);
            }
            println!(
                "{:10} {name:16} {m:5} x {n:5} x {k:5}  {:6.1} GFLOP/s",
                device.instruction_set(),
                operations / best / 1e9
            );
        }
    }
    Ok(())
}
