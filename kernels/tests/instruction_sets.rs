//! DET-1: the same values give the same bits on every instruction set, at every address, in every neighbourhood.

#![allow(clippy::unwrap_used)]

use proptest::prelude::*;
use tarazed_domain::BlockIndex;
use tarazed_kernels::conformance::Random;
use tarazed_kernels::{
    AdamwStep, Attention, BlockHash, Blocks, CpuBuffer, CpuDevice, CrossEntropy, Device, Gemm, Norm, OptimizerState,
    View, ViewMut,
};

fn numbers(random: &mut Random, len: usize) -> Vec<f32> {
    random.numbers(len).into_iter().map(|x| x as f32).collect()
}

/// A buffer that holds `values` from `offset` on.
fn buffer(values: &[f32], offset: usize) -> CpuBuffer {
    let mut buffer = CpuBuffer::zeroed(offset + values.len()).unwrap();
    buffer[offset..].copy_from_slice(values);
    buffer
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|x| x.to_bits()).collect()
}

/// Bits of one product on one device, with operands at the given offsets.
fn product(device: &CpuDevice, call: &Gemm, [a, b, c]: [&[f32]; 3], offsets: [usize; 3]) -> Vec<u32> {
    let mut stream = device.stream().unwrap();
    let (a, b) = (buffer(a, offsets[0]), buffer(b, offsets[1]));
    let mut c = buffer(c, offsets[2]);
    let views = (View::at(&a, offsets[0]), View::at(&b, offsets[1]));
    let to = ViewMut::at(&mut c, offsets[2]);
    device.gemm(&mut stream, call, views.0, views.1, to).unwrap();
    bits(&c[offsets[2]..])
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// DET-1: neither instruction set nor address shows in a product.
    #[test]
    fn products_agree(
        (m, n, k) in (1_usize..70, 1_usize..90, 1_usize..600),
        (a_transposed, b_transposed, accumulate) in any::<(bool, bool, bool)>(),
        offsets in [0_usize..16, 0..16, 0..16],
        seed in any::<u64>(),
    ) {
        let mut random = Random::new(seed);
        let call = Gemm {
            a_transposed,
            b_transposed,
            a_stride: if a_transposed { m } else { k },
            b_stride: if b_transposed { k } else { n },
            accumulate,
            ..Gemm::forward(m, n, k)
        };
        let operands = [numbers(&mut random, m * k), numbers(&mut random, n * k), numbers(&mut random, m * n)];
        let operands = [&operands[0][..], &operands[1], &operands[2]];
        let devices = CpuDevice::all_instruction_sets();
        let expected = product(&devices[0], &call, operands, [0; 3]);
        for device in &devices {
            prop_assert_eq!(&product(device, &call, operands, offsets), &expected, "{}", device.instruction_set());
        }
    }

    /// DET-1: a row of a product does not depend on the other rows, nor a column on the other columns.
    #[test]
    fn rows_and_columns_stand_alone((m, n, k) in (1_usize..40, 1_usize..70, 1_usize..400), seed in any::<u64>()) {
        let mut random = Random::new(seed);
        let device = CpuDevice::new();
        let (a, b) = (numbers(&mut random, m * k), numbers(&mut random, n * k));
        let whole = product(&device, &Gemm::forward(m, n, k), [&a, &b, &vec![0.0; m * n]], [0; 3]);
        let (row, column) = (random.below(m), random.below(n));
        let (a, b) = (&a[row * k..(row + 1) * k], &b[column * k..(column + 1) * k]);
        let alone = product(&device, &Gemm::forward(1, 1, k), [a, b, &[0.0]], [0; 3]);
        prop_assert_eq!(alone[0], whole[row * n + column]);
    }
}

/// A product is, for each 512 terms in order, a chain of fused multiply-adds from zero: the contract that decides bits.
#[test]
fn a_product_follows_its_stated_order() {
    let (m, n, k) = (5, 37, 1300);
    let mut random = Random::new(3);
    let (a, b) = (numbers(&mut random, m * k), numbers(&mut random, n * k));
    let got = product(
        &CpuDevice::new(),
        &Gemm::forward(m, n, k),
        [&a, &b, &vec![0.0; m * n]],
        [0; 3],
    );
    for row in 0..m {
        for column in 0..n {
            let mut sum = 0.0_f32;
            for block in (0..k).step_by(512) {
                let terms = block..k.min(block + 512);
                let chain = terms.fold(0.0_f32, |chain, i| a[row * k + i].mul_add(b[column * k + i], chain));
                sum += chain;
            }
            assert_eq!(got[row * n + column], sum.to_bits());
        }
    }
}

/// Everything but the product, on odd sizes: bits of all outputs, one after another.
fn everything(device: &CpuDevice, seed: u64) -> Vec<Vec<u32>> {
    let mut random = Random::new(seed);
    let mut stream = device.stream().unwrap();
    let mut results = Vec::new();
    let mut fresh = |len: usize| buffer(&numbers(&mut random, len), 0);

    let call = Norm {
        rows: 7,
        width: 93,
        eps: 1e-5,
    };
    let len = call.rows * call.width;
    let (x, branch, weight, dy) = (fresh(len), fresh(len), fresh(call.width), fresh(len));
    let (mut sum, mut y, mut inverse_rms) = (fresh(len), fresh(len), fresh(call.rows));
    let join = Some((View::from(&branch), ViewMut::from(&mut sum)));
    let to = (ViewMut::from(&mut y), ViewMut::from(&mut inverse_rms));
    device
        .rms_norm(
            &mut stream,
            &call,
            View::from(&x),
            join,
            View::from(&weight),
            to.0,
            to.1,
        )
        .unwrap();
    let (mut dx, mut dw) = (fresh(len), fresh(call.width));
    let from = (
        View::from(&sum),
        View::from(&inverse_rms),
        View::from(&weight),
        View::from(&dy),
    );
    let to = (ViewMut::from(&mut dx), ViewMut::from(&mut dw));
    device
        .rms_norm_backward(&mut stream, &call, from.0, from.1, from.2, from.3, to.0, to.1)
        .unwrap();
    results.extend([bits(&sum), bits(&y), bits(&inverse_rms), bits(&dx), bits(&dw)]);

    let call = Attention {
        sequences: 2,
        context: 171,
        heads: 4,
        kv_heads: 2,
        head_dim: 24,
    };
    let qkv = fresh(call.rows() * call.qkv_width());
    let (mut out, mut sums) = (fresh(call.rows() * call.out_width()), fresh(call.rows() * call.heads));
    let to = (ViewMut::from(&mut out), ViewMut::from(&mut sums));
    device
        .attention(&mut stream, &call, View::from(&qkv), to.0, to.1)
        .unwrap();
    let dy = fresh(call.rows() * call.out_width());
    let mut gradient = fresh(call.rows() * call.qkv_width());
    let from = (View::from(&qkv), View::from(&out), View::from(&sums), View::from(&dy));
    device
        .attention_backward(
            &mut stream,
            &call,
            from.0,
            from.1,
            from.2,
            from.3,
            ViewMut::from(&mut gradient),
        )
        .unwrap();
    results.extend([bits(&out), bits(&sums), bits(&gradient)]);

    let (rows, width) = (5, 77);
    let (mut gate_up, mut out) = (fresh(2 * rows * width), fresh(rows * width));
    device
        .swiglu(&mut stream, rows, width, View::from(&gate_up), ViewMut::from(&mut out))
        .unwrap();
    let mut dy = fresh(rows * width);
    let to = (ViewMut::from(&mut gate_up), ViewMut::from(&mut dy));
    device.swiglu_backward(&mut stream, rows, width, to.0, to.1).unwrap();
    results.extend([bits(&out), bits(&gate_up), bits(&dy)]);

    let call = CrossEntropy {
        rows: 4,
        vocabulary: 333,
        target_offset: 0,
        gradient_scale: Some(0.3),
    };
    let (mut logits, mut losses) = (fresh(4 * 333), fresh(4));
    let to = (ViewMut::from(&mut logits), ViewMut::from(&mut losses));
    device
        .cross_entropy(&mut stream, &call, &vec![0, 332, 17, 40], to.0, to.1)
        .unwrap();
    results.extend([bits(&logits), bits(&losses)]);
    results.push(update(device, &mut fresh));
    results
}

/// Bits of an AdamW update, its hashes and the square sums.
fn update(device: &CpuDevice, fresh: &mut impl FnMut(usize) -> CpuBuffer) -> Vec<u32> {
    let mut stream = device.stream().unwrap();
    let len = 3 * 101;
    let (gradient, mut master, mut first, mut second) = (fresh(len), fresh(len), fresh(len), fresh(len));
    second.iter_mut().for_each(|v| *v *= *v);
    let step = AdamwStep {
        learning_rate: 1e-3,
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        weight_decay: 0.1,
        gradient_scale: 0.7,
        step: 3,
    };
    let blocks = Blocks {
        first: BlockIndex(4),
        block_elements: 101,
    };
    let mut hashes = [BlockHash::default(); 3];
    let state = OptimizerState {
        master: ViewMut::from(&mut master),
        first_moment: ViewMut::from(&mut first),
        second_moment: ViewMut::from(&mut second),
    };
    device
        .adamw(
            &mut stream,
            &step,
            blocks,
            View::from(&gradient),
            state,
            None,
            &mut hashes,
        )
        .unwrap();
    let mut sums = [0.0; 3];
    device
        .square_sums(&mut stream, View::from(&gradient), 101, &mut sums)
        .unwrap();
    let mut result = [bits(&master), bits(&first), bits(&second)].concat();
    for sum in sums {
        result.extend([sum.to_bits() as u32, (sum.to_bits() >> 32) as u32]);
    }
    for hash in hashes {
        result.extend(hash.0.map(u32::from));
    }
    result
}

/// DET-1: every other kernel agrees as well.
#[test]
fn all_kernels_agree() {
    let devices = CpuDevice::all_instruction_sets();
    for seed in 0..5 {
        let expected = everything(&devices[0], seed);
        for device in &devices[1..] {
            for (index, (got, expected)) in everything(device, seed).iter().zip(&expected).enumerate() {
                assert_eq!(got, expected, "output {index} on {}", device.instruction_set());
            }
        }
    }
}
