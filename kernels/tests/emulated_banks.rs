//! Shared memory of the attention kernels: no load of a fragment meets a bank twice. In a process of its own, whose count it is.
#![cfg(feature = "emulator")]
#![allow(clippy::unwrap_used)]

use std::path::Path;
use tarazed_kernels::cuda::CudaDevice;
use tarazed_kernels::cuda::driver::Driver;
use tarazed_kernels::cuda::emulated::EmulatedDriver;
use tarazed_kernels::cuda::table::{Access, Argument, Element, Entry, Kind, Launch, POINTWISE, Value};
use tarazed_kernels::{Attention, Device, Precision, View, ViewMut};

static ARGUMENTS: [Argument; 1] = [Argument {
    name: "out",
    kind: Kind::Pointer {
        element: Element::F32,
        access: Access::Write,
        optional: false,
    },
    meaning: "[threads]",
}];

static BANKS: Entry = Entry {
    name: "fault_banks",
    source: &POINTWISE,
    arguments: &ARGUMENTS,
};

#[test]
fn fragments_are_loaded_without_a_bank_conflict() {
    let driver =
        || EmulatedDriver::new(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap_or_else(|error| panic!("{error}"));
    let device = CudaDevice::new(driver()).unwrap();
    let mut stream = device.stream().unwrap();
    device.driver().take_bank_conflicts();
    for head_dim in [32, 44, 64, 128] {
        let call = Attention {
            sequences: 1,
            context: 140,
            heads: 2,
            kv_heads: 1,
            head_dim,
        };
        let buffer = |len: usize, precision| device.alloc(len, precision).unwrap();
        let qkv = buffer(call.rows() * call.qkv_width(), Precision::Working);
        let dy = buffer(call.rows() * call.out_width(), Precision::Working);
        let mut out = buffer(call.rows() * call.out_width(), Precision::Working);
        let mut sums = buffer(call.rows() * call.heads, Precision::Full);
        let mut gradient = buffer(call.rows() * call.qkv_width(), Precision::Working);
        let (q, s) = (View::from(&qkv), &mut stream);
        device
            .attention(s, &call, q, ViewMut::from(&mut out), ViewMut::from(&mut sums))
            .unwrap();
        let (kept, to) = ((View::from(&out), View::from(&sums)), ViewMut::from(&mut gradient));
        device
            .attention_backward(s, &call, q, kept.0, kept.1, View::from(&dy), to)
            .unwrap();
        assert_eq!(device.driver().take_bank_conflicts(), 0, "heads of {head_dim}");
    }

    // The count can be other than zero: eight rows in one bank, four times, are 28 too many.
    let driver = driver();
    let (stream, out) = (driver.create_stream().unwrap(), driver.alloc(128).unwrap());
    let launch = Launch {
        entry: &BANKS,
        grid: [1, 1, 1],
        block: [32, 1, 1],
        shared_bytes: 1024,
    };
    let kernel = driver.load(&BANKS).unwrap();
    // SAFETY: the kernel writes one f32 for each of its 32 threads.
    unsafe { driver.launch(stream, kernel, &launch, &[Value::Pointer(out.0)]) }.unwrap();
    assert_eq!(driver.take_bank_conflicts(), 28);
}
