//! The CUDA device over a driver that writes every call down: launches, memory, errors.

#![allow(clippy::unwrap_used, reason = "a test's own helpers")]

mod cuda_rig;

use Precision::{Full, Working};
use cuda_rig::{Rig, everything};
use tarazed_domain::BlockIndex;
use tarazed_kernels::cuda::driver::{GEMM_ALIGNMENT_BYTES, GEMM_WORKSPACE_BYTES, Severity};
use tarazed_kernels::cuda::recording::{Call, RecordingDriver};
use tarazed_kernels::cuda::table::{self, Launch, Value};
use tarazed_kernels::cuda::{CudaBuffer, CudaDevice, STAGING_BYTES};
use tarazed_kernels::{
    AdamwStep, Attention, BlockHash, Blocks, CrossEntropy, Device, DeviceError, Embedding, Gemm, Norm, OptimizerState,
    Precision, Rope, View, ViewMut,
};

fn launches(calls: &[Call]) -> Vec<Launch> {
    let launch = |call: &Call| match call {
        Call::Launch(_, launch, _) => Some(*launch),
        _ => None,
    };
    calls.iter().filter_map(launch).collect()
}

fn values(calls: &[Call]) -> Vec<Vec<Value>> {
    let values = |call: &Call| match call {
        Call::Launch(_, _, values) => Some(values.clone()),
        _ => None,
    };
    calls.iter().filter_map(values).collect()
}

/// What a kernel gets where `buffer` begins, `offset` elements on.
fn pointer(rig: &Rig, buffer: &CudaBuffer<RecordingDriver>, offset: usize) -> Value {
    Value::Pointer(rig.address(buffer).0 + (offset * buffer.element().bytes()) as u64)
}

#[test]
fn every_kernel_is_ready_before_the_first_operation() {
    let rig = Rig::new();
    let loaded: Vec<&str> = rig
        .recorder
        .asked()
        .into_iter()
        .filter(|&call| call == "load")
        .collect();
    assert_eq!(loaded.len(), table::ENTRIES.len());
}

#[test]
fn norms_are_launched_as_the_table_says() {
    let mut rig = Rig::new();
    let call = Norm {
        rows: 10,
        width: 24,
        eps: 1e-5,
    };
    let (x, branch, weight) = (
        rig.buffer(250, Working),
        rig.buffer(240, Working),
        rig.buffer(30, Working),
    );
    let (mut sum, mut y) = (rig.buffer(240, Working), rig.buffer(240, Working));
    let mut inverse = rig.buffer(10, Full);
    let _ = rig.recorder.take();
    let (device, stream) = (&rig.device, &mut rig.stream);
    let join = Some((View::from(&branch), ViewMut::from(&mut sum)));
    let (from, to) = (View::at(&x, 3), ViewMut::from(&mut y));
    device
        .rms_norm(
            stream,
            &call,
            from,
            join,
            View::at(&weight, 1),
            to,
            (&mut inverse).into(),
        )
        .unwrap();
    let from = View::at(&x, 3);
    device
        .rms_norm(
            stream,
            &call,
            from,
            None,
            View::at(&weight, 1),
            (&mut y).into(),
            (&mut inverse).into(),
        )
        .unwrap();
    let calls = rig.recorder.take();
    assert_eq!(launches(&calls), [table::rms_norm(&call).unwrap(); 2]);
    let [with, without] = values(&calls).try_into().unwrap();
    assert_eq!(
        with,
        [
            pointer(&rig, &x, 3),
            pointer(&rig, &branch, 0),
            pointer(&rig, &sum, 0),
            pointer(&rig, &weight, 1),
            pointer(&rig, &y, 0),
            pointer(&rig, &inverse, 0),
            Value::U32(24),
            Value::F32(1e-5),
        ]
    );
    assert_eq!(without[1..3], [Value::Pointer(0), Value::Pointer(0)]);

    let (mut dx, mut dw) = (rig.buffer(240, Working), rig.buffer(24, Full));
    let _ = rig.recorder.take();
    let kept = (View::at(&x, 3), View::from(&inverse), View::at(&weight, 1));
    rig.device
        .rms_norm_backward(
            &mut rig.stream,
            &call,
            kept.0,
            kept.1,
            kept.2,
            View::from(&y),
            (&mut dx).into(),
            (&mut dw).into(),
        )
        .unwrap();
    let calls = rig.recorder.take();
    let expected = [
        table::rms_norm_backward(&call).unwrap(),
        table::rms_norm_weight_gradient(&call).unwrap(),
    ];
    assert_eq!(launches(&calls), expected);
    let [first, second] = values(&calls).try_into().unwrap();
    let (partials, rows_each) = table::norm_partials(call.rows);
    assert_eq!(first[5], second[0], "one launch leaves its partials for the other");
    assert_eq!(first[6..], [10, rows_each as u32, 24].map(Value::U32));
    assert_eq!(
        second[1..],
        [pointer(&rig, &dw, 0), Value::U32(partials as u32), Value::U32(24)]
    );
}

#[test]
fn attention_is_launched_as_the_table_says() {
    let mut rig = Rig::new();
    for head_dim in [16, 64, 128] {
        let call = Attention {
            sequences: 2,
            context: 150,
            heads: 4,
            kv_heads: 2,
            head_dim,
        };
        let qkv = rig.buffer(call.rows() * call.qkv_width(), Working);
        let mut out = rig.buffer(call.rows() * call.out_width(), Working);
        let mut sums = rig.buffer(call.rows() * call.heads, Full);
        let mut gradient = rig.buffer(call.rows() * call.qkv_width(), Working);
        let _ = rig.recorder.take();
        let (device, stream) = (&rig.device, &mut rig.stream);
        device
            .attention(stream, &call, (&qkv).into(), (&mut out).into(), (&mut sums).into())
            .unwrap();
        let kept = (View::from(&out), View::from(&sums));
        device
            .attention_backward(
                stream,
                &call,
                (&qkv).into(),
                kept.0,
                kept.1,
                (&out).into(),
                (&mut gradient).into(),
            )
            .unwrap();
        let calls = rig.recorder.take();
        let expected = [
            table::attention(&call).unwrap(),
            table::attention_delta(&call).unwrap(),
            table::attention_keys(&call).unwrap(),
            table::attention_queries(&call).unwrap(),
            table::attention_group_sums(&call).unwrap(),
        ];
        assert_eq!(launches(&calls), expected);
        let values = values(&calls);
        let shape = [150, 4, 2, head_dim as u32].map(Value::U32);
        assert_eq!(values[0][3..7], shape);
        assert_eq!(values[0][7], Value::F32(call.scale()));
        assert_eq!(values[1][2], values[2][3], "both gradients read the dot products");
        assert_eq!(values[2][4], values[4][0], "what the heads of a group leave is added");
        let gradient = pointer(&rig, &gradient, 0);
        assert_eq!(
            [&values[3][4], &values[4][1]],
            [&gradient; 2],
            "sums and queries write parts of one tensor"
        );
    }
}

#[test]
fn long_heads_are_refused_by_name() {
    let mut rig = Rig::new();
    let call = Attention {
        sequences: 1,
        context: 1,
        heads: 1,
        kv_heads: 1,
        head_dim: 256,
    };
    let (qkv, mut out, mut sums) = (rig.buffer(768, Working), rig.buffer(256, Working), rig.buffer(1, Full));
    let refused = rig
        .device
        .attention(
            &mut rig.stream,
            &call,
            (&qkv).into(),
            (&mut out).into(),
            (&mut sums).into(),
        )
        .unwrap_err();
    assert!(refused.to_string().contains("heads of 256 elements"), "{refused}");
}

#[test]
fn rows_and_tokens_are_launched_as_the_table_says() {
    let mut rig = Rig::new();
    let (mut a, mut b) = (rig.buffer(400, Working), rig.buffer(400, Working));
    let (table_of_angles, mut full) = (rig.buffer(64, Full), rig.buffer(400, Full));
    let mut tokens = rig.device.alloc_tokens(20).unwrap();
    let (device, stream) = (&rig.device, &mut rig.stream);
    device.upload_tokens(stream, &[1; 20], &mut tokens).unwrap();
    let _ = rig.recorder.take();

    let rope = Rope {
        rows: 4,
        context: 4,
        heads: 2,
        head_dim: 16,
        stride: 40,
    };
    device
        .rope(stream, &rope, (&table_of_angles).into(), true, ViewMut::at(&mut a, 7))
        .unwrap();
    device.swiglu(stream, 5, 40, (&a).into(), (&mut b).into()).unwrap();
    device
        .swiglu_backward(stream, 5, 40, (&mut a).into(), (&mut b).into())
        .unwrap();
    let embedding = Embedding {
        tokens: 20,
        vocabulary: 30,
        width: 10,
    };
    device
        .embed(stream, &embedding, (&a).into(), &tokens, (&mut b).into())
        .unwrap();
    device
        .embed_backward(stream, &embedding, &tokens, (&b).into(), (&mut full).into())
        .unwrap();
    let entropy = CrossEntropy {
        rows: 4,
        vocabulary: 90,
        target_offset: 3,
        gradient_scale: None,
    };
    device
        .cross_entropy(stream, &entropy, &tokens, (&mut a).into(), (&mut full).into())
        .unwrap();
    device
        .add(stream, ViewMut::at(&mut full, 2), View::at(&table_of_angles, 1), 50)
        .unwrap();
    device
        .fold(stream, (&mut full).into(), (&table_of_angles).into(), 64)
        .unwrap();
    device.add(stream, (&mut a).into(), (&b).into(), 9).unwrap();
    device.add(stream, (&mut full).into(), (&b).into(), 9).unwrap();
    device.copy(stream, (&full).into(), (&mut a).into(), 8).unwrap();
    device.copy(stream, (&a).into(), (&mut full).into(), 8).unwrap();
    let calls = rig.recorder.take();
    let long = |entry, len| table::elementwise(entry, len).unwrap();
    let expected = [
        table::rope(&rope).unwrap(),
        table::swiglu(&table::SWIGLU, 5, 40).unwrap(),
        table::swiglu(&table::SWIGLU_BACKWARD, 5, 40).unwrap(),
        table::embed(20, 10).unwrap(),
        table::embed_sort(20).unwrap(),
        table::embed_order(20).unwrap(),
        table::embed_backward(20, 10).unwrap(),
        table::cross_entropy(&entropy).unwrap(),
        long(&table::ADD_F32, 50),
        long(&table::ADD_F32, 64),
        long(&table::ADD_BF16, 9),
        long(&table::ADD_F32_BF16, 9),
        long(&table::CONVERT_F32_BF16, 8),
        long(&table::CONVERT_BF16_F32, 8),
    ];
    assert_eq!(launches(&calls), expected);
    let values = values(&calls);
    assert_eq!(values[0][0], pointer(&rig, &a, 7));
    assert_eq!(values[0][2..6], [4, 2, 16, 40].map(Value::U32));
    assert_eq!(values[0][6], Value::F32(-1.0), "the gradient rotates back");
    assert_eq!(values[3][3..], [30, 10].map(Value::U32));
    assert_eq!(values[4][1], values[5][0], "what one launch sorts, the next one merges");
    assert_eq!(values[5][1], values[6][0], "and the last one follows");
    assert_eq!(values[6][3..], [20, 30, 10].map(Value::U32));
    let (Value::Pointer(first), Value::Pointer(targets)) = (values[3][1], values[7][1]) else {
        panic!("ids are pointers")
    };
    assert_eq!(targets - first, 3 * 4, "targets begin at their offset");
    assert_eq!(
        values[7][3..],
        [Value::U32(90), Value::U32(0), Value::U32(0), Value::F32(0.0)]
    );
    assert_eq!(
        values[8],
        [
            pointer(&rig, &full, 2),
            pointer(&rig, &table_of_angles, 1),
            Value::U64(50)
        ]
    );
}

#[test]
fn optimizer_launches_sum_into_zeroed_scratch_and_compare_hashes() {
    let mut rig = Rig::new();
    let (blocks, count) = (
        Blocks {
            first: BlockIndex(7),
            block_elements: 48,
        },
        3,
    );
    let [gradient, mut master, mut first, mut second] = std::array::from_fn(|_| rig.buffer(150, Full));
    let mut working = rig.buffer(144, Working);
    let step = AdamwStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        gradient_scale: 0.5,
        step: 1,
    };
    // The recorder computes nothing, so all sums stay zero, which is the default hash.
    let mut hashes = vec![BlockHash::default(); count];
    hashes[1].0[0] = 1;
    let _ = rig.recorder.take();
    let state = OptimizerState {
        master: ViewMut::at(&mut master, 6),
        first_moment: (&mut first).into(),
        second_moment: (&mut second).into(),
    };
    let copy = Some(ViewMut::from(&mut working));
    let changed = rig
        .device
        .adamw(
            &mut rig.stream,
            &step,
            blocks,
            (&gradient).into(),
            state,
            copy,
            &mut hashes,
        )
        .unwrap();
    assert_eq!((changed, hashes), (1, vec![BlockHash::default(); count]));
    let calls = rig.recorder.take();
    assert_eq!(launches(&calls), [table::optimizer(&table::ADAMW, count, 48).unwrap()]);
    let arguments = values(&calls).remove(0);
    assert_eq!(arguments[1], pointer(&rig, &master, 6));
    assert_eq!(arguments[6..8], [Value::U32(7), Value::U64(48)]);
    assert_eq!(arguments[8..12], [0.9_f32, 0.1, 0.95, 0.05].map(Value::F32));
    let Value::Pointer(sums) = arguments[5] else {
        panic!("sums are a pointer")
    };
    let zeroed = calls
        .iter()
        .position(|call| matches!(call, Call::SetBytes(_, at, 0, 96) if at.0 == sums));
    let launched = calls.iter().position(|call| matches!(call, Call::Launch(..)));
    assert!(zeroed.is_some() && zeroed < launched, "{calls:?}");

    let mut hashes = vec![BlockHash([9; 16]); count];
    let state = [View::at(&master, 6), View::from(&first), View::from(&second)];
    rig.device
        .block_hashes(&mut rig.stream, blocks, state[0], state[1], state[2], &mut hashes)
        .unwrap();
    assert_eq!(hashes, vec![BlockHash::default(); count]);
    let mut sums = vec![f64::NAN; 3];
    rig.device
        .square_sums(&mut rig.stream, (&gradient).into(), 50, &mut sums)
        .unwrap();
    let calls = rig.recorder.take();
    let expected = [
        table::optimizer(&table::BLOCK_HASHES, count, 48).unwrap(),
        table::square_sums(3).unwrap(),
    ];
    assert_eq!(launches(&calls), expected);
}

#[test]
fn a_product_is_planned_once_for_each_shape() {
    let mut rig = Rig::new();
    let (a, b) = (rig.buffer(600, Working), rig.buffer(600, Working));
    let (mut c, mut d) = (rig.buffer(600, Working), rig.buffer(600, Full));
    let _ = rig.recorder.take();
    for _ in 0..3 {
        let (device, stream) = (&rig.device, &mut rig.stream);
        for offset in [0, 8, 16] {
            let call = Gemm::forward(8, 16, 24);
            let from = (View::at(&a, offset), View::at(&b, offset));
            device.gemm(stream, &call, from.0, from.1, (&mut c).into()).unwrap();
        }
        let call = Gemm::weight_gradient(8, 16, 24);
        device
            .gemm(stream, &call, (&a).into(), (&b).into(), (&mut d).into())
            .unwrap();
    }
    let calls = rig.recorder.take();
    let plans: Vec<_> = calls
        .iter()
        .filter_map(|call| match call {
            Call::Plan(key) => Some(*key),
            _ => None,
        })
        .collect();
    assert_eq!(plans.len(), 2, "{plans:?}");
    let products = calls.iter().filter(|call| matches!(call, Call::Gemm(..))).count();
    assert_eq!((products, rig.device.plans().len()), (12, 2));
    assert!(
        !calls.iter().any(|call| matches!(call, Call::CopyOnDevice(..))),
        "aligned operands stay where they are"
    );
}

/// DET-1, DET-2: one shape is one plan, wherever its operands lie; those that are not aligned pass through scratch that is.
#[test]
fn alignment_does_not_choose_an_algorithm() {
    let mut rig = Rig::new();
    let (a, b, mut c) = (
        rig.buffer(600, Working),
        rig.buffer(600, Working),
        rig.buffer(600, Full),
    );
    for (a_at, b_at, c_at) in [(0, 0, 0), (1, 0, 0), (0, 3, 0), (0, 0, 1), (5, 5, 5)] {
        for accumulate in [false, true] {
            let _ = rig.recorder.take();
            let call = Gemm {
                accumulate,
                ..Gemm::forward(8, 16, 24)
            };
            let to = ViewMut::at(&mut c, c_at);
            let (device, stream) = (&rig.device, &mut rig.stream);
            device
                .gemm(stream, &call, View::at(&a, a_at), View::at(&b, b_at), to)
                .unwrap();
            let calls = rig.recorder.take();
            let moved = calls
                .iter()
                .filter(|call| matches!(call, Call::CopyOnDevice(..)))
                .count();
            let expected = usize::from(a_at != 0) + usize::from(b_at != 0);
            // C comes along only where it is read; it always goes back.
            let back = usize::from(c_at != 0) * (1 + usize::from(accumulate));
            assert_eq!(moved, expected + back, "{a_at} {b_at} {c_at} {accumulate}: {calls:?}");
            let operands = calls.iter().find_map(|call| match call {
                Call::Gemm(_, _, _, operands, _) => Some(*operands),
                _ => None,
            });
            assert!(operands.unwrap().iter().all(|at| at.is_aligned(GEMM_ALIGNMENT_BYTES)));
        }
    }
    assert_eq!(rig.device.plans().len(), 2, "one for each way to write C");
}

#[test]
fn sums_without_terms_are_zero() {
    let mut rig = Rig::new();
    let (a, mut c) = (rig.buffer(4, Working), rig.filled(&[7.0; 12]));
    let call = Gemm {
        c_stride: 4,
        ..Gemm::forward(3, 2, 0)
    };
    rig.device
        .gemm(&mut rig.stream, &call, (&a).into(), (&a).into(), (&mut c).into())
        .unwrap();
    let rest = [0.0, 0.0, 7.0, 7.0];
    assert_eq!(rig.values(&c, 12), [rest, rest, rest].concat());
}

#[test]
fn inputs_of_a_precision_without_a_kernel_are_refused_by_name() {
    let mut rig = Rig::new();
    let (full, mut working) = (rig.buffer(16, Full), rig.buffer(16, Working));
    let (device, stream) = (&rig.device, &mut rig.stream);
    let refused = device
        .add(stream, (&mut working).into(), (&full).into(), 4)
        .unwrap_err();
    assert!(
        matches!(refused, DeviceError::Unsupported { operation: "add", .. }),
        "{refused}"
    );
    let refused = device
        .swiglu(stream, 1, 4, (&full).into(), (&mut working).into())
        .unwrap_err();
    assert!(refused.to_string().contains("gate_up is F32"), "{refused}");
    let call = Gemm::forward(2, 2, 2);
    let refused = device
        .gemm(
            stream,
            &call,
            (&full).into(),
            (&working).into(),
            (&mut rig_buffer(&rig.device)).into(),
        )
        .unwrap_err();
    assert!(refused.to_string().contains("two precisions"), "{refused}");
}

fn rig_buffer(device: &CudaDevice<RecordingDriver>) -> CudaBuffer<RecordingDriver> {
    device.alloc(16, Full).unwrap()
}

#[test]
fn fresh_memory_is_zero_and_data_comes_back_rounded_once() {
    let mut rig = Rig::new();
    // More than two pieces of staging, and a last one that is short.
    let len = (2 << 20) + 12_345;
    for precision in [Working, Full] {
        let mut buffer = rig.buffer(len, precision);
        assert!(rig.values(&buffer, len).iter().all(|&x| x == 0.0));
        let numbers: Vec<f32> = (0..len as u32 - 3).map(|i| (i as f32).sin_less() * 3.0).collect();
        let (device, stream) = (&rig.device, &mut rig.stream);
        device.upload(stream, &numbers, ViewMut::at(&mut buffer, 2)).unwrap();
        let back = rig.values(&buffer, len);
        for (index, (&sent, &got)) in numbers.iter().zip(&back[2..]).enumerate() {
            let expected = match precision {
                Full => sent,
                Working => tarazed_kernels::cuda::bf16::widen(tarazed_kernels::cuda::bf16::round(sent)),
            };
            assert_eq!(got.to_bits(), expected.to_bits(), "{precision:?} {index}");
        }
        assert_eq!((back[0], back[1], back[len - 1]), (0.0, 0.0, 0.0));
    }
}

/// Numbers with all bits in use.
trait SinLess {
    fn sin_less(self) -> f32;
}
impl SinLess for f32 {
    fn sin_less(self) -> f32 {
        let x = (self * 0.618_034).fract();
        x - x * x / 3.0
    }
}

#[test]
fn views_beyond_their_buffers_panic() {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    let mut rig = Rig::new();
    let (a, mut b) = (rig.buffer(10, Working), rig.buffer(10, Working));
    let tokens = rig.device.alloc_tokens(4).unwrap();
    let mut fails = |what: &str, work: &mut dyn FnMut(&mut Rig) -> Result<(), DeviceError>| {
        let outcome = catch_unwind(AssertUnwindSafe(|| work(&mut rig)));
        assert!(outcome.is_err(), "{what} was let through: {outcome:?}");
    };
    fails("copy", &mut |rig| {
        rig.device.copy(&mut rig.stream, View::at(&a, 1), (&mut b).into(), 10)
    });
    fails("zero", &mut |rig| {
        rig.device.zero(&mut rig.stream, ViewMut::at(&mut b, usize::MAX), 2)
    });
    fails("upload", &mut |rig| {
        rig.device.upload(&mut rig.stream, &[0.0; 11], (&mut b).into())
    });
    fails("download", &mut |rig| {
        rig.device.download(&mut rig.stream, (&a).into(), &mut [0.0; 11])
    });
    fails("gemm", &mut |rig| {
        let call = Gemm::forward(2, 2, 6);
        rig.device
            .gemm(&mut rig.stream, &call, (&a).into(), (&a).into(), (&mut b).into())
    });
    fails("embed", &mut |rig| {
        let call = Embedding {
            tokens: 5,
            vocabulary: 5,
            width: 2,
        };
        rig.device
            .embed(&mut rig.stream, &call, (&a).into(), &tokens, (&mut b).into())
    });
}

#[test]
fn memory_that_is_not_there_is_named_with_its_size() {
    let mut rig = Rig::new();
    let (a, mut c) = (rig.buffer(64, Working), rig.buffer(64, Full));
    let fail = |rig: &Rig, calls_from_now| {
        let now = rig.recorder.asked().len();
        rig.recorder.fail(now + calls_from_now, Severity::OutOfMemory);
    };
    let needed = |refused: Option<DeviceError>| match refused {
        Some(DeviceError::OutOfMemory { needed_bytes, .. }) => needed_bytes,
        other => panic!("{other:?}"),
    };
    fail(&rig, 0);
    assert_eq!(needed(rig.device.alloc(1000, Full).err()), 4000);
    // How much there is, is told beside it.
    fail(&rig, 0);
    let text = rig.device.alloc(1000, Full).err().unwrap().to_string();
    let expected = format!(
        "4000 bytes more were needed, and 0 of the device's {} were free;",
        usize::MAX
    );
    assert!(text.contains(&expected), "{text}");
    // A stream and its event come before the memory that is copied through.
    fail(&rig, 2);
    let refused = rig.device.stream().err();
    let Some(DeviceError::OutOfPinnedMemory { needed_bytes }) = refused else {
        panic!("the host's memory, not the device's: {refused:?}")
    };
    assert_eq!(needed_bytes, STAGING_BYTES);
    // The first product is planned before its workspace is made.
    fail(&rig, 1);
    let call = Gemm::forward(8, 8, 8);
    let (device, stream) = (&rig.device, &mut rig.stream);
    let refused = device.gemm(stream, &call, (&a).into(), (&a).into(), (&mut c).into());
    assert_eq!(needed(refused.err()), GEMM_WORKSPACE_BYTES);
    // The device goes on.
    device
        .gemm(stream, &call, (&a).into(), (&a).into(), (&mut c).into())
        .unwrap();
    assert_eq!(rig.values(&c, 64), [0.0; 64]);
}

/// Each call of a run of everything fails once, in each way: the error says so, a lost device does no more work, and all
/// that was ever taken is given back.
#[test]
fn a_failure_at_any_call_is_told_and_leaves_nothing_behind() {
    let clean = RecordingDriver::new();
    everything(&clean).unwrap();
    let asked = clean.asked();
    assert_eq!(clean.left(), Vec::<String>::new());
    for severity in [Severity::OutOfMemory, Severity::Refused, Severity::Sticky] {
        for (number, &call) in asked.iter().enumerate() {
            let recorder = RecordingDriver::new();
            recorder.fail(number, severity);
            let outcome = everything(&recorder);
            let context = format!("call {number}, {call}, {severity:?}: {outcome:?}");
            assert_eq!(recorder.left(), Vec::<String>::new(), "{context}");
            let gives_back = call.starts_with("free") || call.starts_with("destroy");
            match outcome {
                Ok(()) => assert!(gives_back, "{context}"),
                Err(DeviceError::OutOfMemory { needed_bytes, .. }) => {
                    assert!(
                        severity == Severity::OutOfMemory && call == "alloc" && needed_bytes > 0,
                        "{context}"
                    );
                }
                Err(DeviceError::OutOfPinnedMemory { needed_bytes }) => {
                    assert!(
                        severity == Severity::OutOfMemory && call == "alloc_pinned" && needed_bytes > 0,
                        "{context}"
                    );
                }
                Err(DeviceError::Unsupported { .. }) => {
                    assert!(severity == Severity::Refused && call == "plan_gemm", "{context}");
                }
                Err(DeviceError::Failed { cause, .. }) => {
                    assert!(cause.contains(call), "{context}");
                    assert_eq!(
                        cause.contains("a kernel went wrong"),
                        severity == Severity::Sticky,
                        "{context}"
                    );
                }
            }
        }
    }
}

#[test]
fn a_lost_device_refuses_all_further_work_with_the_first_cause() {
    let mut rig = Rig::new();
    let mut buffer = rig.buffer(8, Full);
    rig.recorder.fail(rig.recorder.asked().len(), Severity::Sticky);
    let first = rig
        .device
        .zero(&mut rig.stream, (&mut buffer).into(), 8)
        .unwrap_err()
        .to_string();
    assert!(
        first.contains("CUDA_ERROR_ILLEGAL_ADDRESS") && first.contains("in zero"),
        "{first}"
    );
    let asked = rig.recorder.asked().len();
    let later = [
        rig.device.synchronize(&mut rig.stream).unwrap_err(),
        rig.device.alloc(1, Full).err().unwrap(),
        rig.device.stream().err().unwrap(),
        rig.device
            .download(&mut rig.stream, (&buffer).into(), &mut [0.0])
            .unwrap_err(),
    ];
    for error in later {
        let text = error.to_string();
        assert!(
            text.contains("the device was lost before: set_bytes gave CUDA_ERROR_ILLEGAL_ADDRESS"),
            "{text}"
        );
    }
    assert_eq!(rig.recorder.asked().len(), asked, "the driver was asked again");
    let recorder = rig.recorder.clone();
    drop((rig, buffer));
    assert_eq!(recorder.left(), Vec::<String>::new());
}

#[test]
fn the_device_type_names_what_decides_numbers() {
    let rig = Rig::new();
    assert_eq!(
        rig.device.device_type(),
        "cuda-bf16: recorder, sm_90, 1 multiprocessors, recording 1"
    );
}
