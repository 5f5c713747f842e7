//! One check per kernel.

use super::{Bench, ConformanceError, Tensor, largest, reference};
use crate::device::*;
use crate::hash::{BlockHash, block_hash};
use Precision::{Full, Working};
use tarazed_domain::BlockIndex;

type Checked = Result<(), ConformanceError>;

/// Shapes on, below and above every tile and block size in use, and thin ones.
const GEMM_SHAPES: [(usize, usize, usize); 10] = [
    (1, 1, 1),
    (1, 70, 33),
    (8, 32, 256),
    (9, 33, 257),
    (7, 31, 255),
    (16, 512, 16),
    (65, 513, 40),
    (130, 96, 520),
    (1030, 17, 20),
    (64, 64, 1025),
];

pub(super) fn gemm<D: Device>(bench: &mut Bench<'_, D>) -> Checked {
    for (m, n, k) in GEMM_SHAPES {
        for variant in 0..8 {
            let (a_transposed, b_transposed) = (variant & 1 != 0, variant & 2 != 0);
            let accumulate = variant & 4 != 0;
            let call = Gemm {
                a_transposed,
                b_transposed,
                a_stride: if a_transposed { m } else { k } + variant % 3,
                b_stride: if b_transposed { k } else { n } + variant % 2,
                c_stride: n,
                accumulate,
                alpha: if variant % 3 == 0 { 1.0 } else { -0.75 },
                ..Gemm::forward(m, n, k)
            };
            gemm_call(bench, &call, Full)?;
            if !accumulate {
                gemm_call(bench, &call, Working)?;
            }
        }
    }
    Ok(())
}

fn gemm_call<D: Device>(bench: &mut Bench<'_, D>, call: &Gemm, result: Precision) -> Checked {
    let shape = format!("{call:?}, result {result:?}");
    let rows = |transposed: bool, stored: usize| if transposed { call.k } else { stored };
    let (a, a_held) = bench.random(rows(call.a_transposed, call.m) * call.a_stride, Working)?;
    let b_rows = if call.b_transposed { call.n } else { call.k };
    let (b, b_held) = bench.random(b_rows * call.b_stride, Working)?;
    let (mut c, c_held) = if call.accumulate {
        bench.random(call.m * call.n, result)?
    } else {
        (bench.poisoned(call.m * call.n, result)?, Vec::new())
    };
    bench
        .device
        .gemm(&mut bench.stream, call, a.view(), b.view(), c.view_mut())?;
    let (expected, size) = reference::gemm(call, &a_held, &b_held, &c_held);
    let factor = (4.0 + (call.k as f64).sqrt()) * c.unit;
    bench.compare(("gemm", &shape), &c, &expected, |index| factor * size[index])
}

pub(super) fn rms_norm<D: Device>(bench: &mut Bench<'_, D>) -> Checked {
    // Rows for several steps and several runs of the gradient's kernel, and widths for one chunk of a thread, two, and many.
    for (rows, width) in [
        (1, 1),
        (3, 16),
        (5, 33),
        (17, 256),
        (40, 1000),
        (1100, 8),
        (6, 2056),
        (2, 8200),
    ] {
        for with_branch in [false, true] {
            let call = Norm { rows, width, eps: 1e-5 };
            norm_call(bench, &call, with_branch)?;
        }
    }
    Ok(())
}

fn norm_call<D: Device>(bench: &mut Bench<'_, D>, call: &Norm, with_branch: bool) -> Checked {
    let shape = format!("{call:?}, branch {with_branch}");
    let (rows, width) = (call.rows, call.width);
    let len = rows * width;
    let (x, mut input) = bench.random(len, Working)?;
    let (weight, weight_held) = bench.random(width, Working)?;
    let mut y = bench.poisoned(len, Working)?;
    let mut inverse_rms = bench.poisoned(rows, Full)?;
    let (branch, branch_held) = bench.random(len, Working)?;
    let mut sum = bench.poisoned(len, Working)?;
    let join = with_branch.then(|| (branch.view(), sum.view_mut()));
    let to = (y.view_mut(), inverse_rms.view_mut());
    bench
        .device
        .rms_norm(&mut bench.stream, call, x.view(), join, weight.view(), to.0, to.1)?;
    let normalised = if with_branch {
        for (x, branch) in input.iter_mut().zip(&branch_held) {
            *x += branch;
        }
        bench.compare_scaled(("residual sum", &shape), &sum, &input, 1.0)?;
        input = bench.get("residual sum", &shape, &sum)?;
        sum
    } else {
        x
    };
    let eps = f64::from(call.eps);
    let (expected, inverse) = reference::rms_norm(width, eps, &input, &weight_held);
    bench.compare_scaled(("norm", &shape), &y, &expected, 8.0)?;
    bench.compare_scaled(("inverse rms", &shape), &inverse_rms, &inverse, 8.0)?;

    let (dy, dy_held) = bench.random(len, Working)?;
    let (mut dx, dx_before) = bench.random(len, Working)?;
    let (mut dw, dw_before) = bench.random(width, Full)?;
    bench.device.rms_norm_backward(
        &mut bench.stream,
        call,
        normalised.view(),
        inverse_rms.view(),
        weight.view(),
        dy.view(),
        dx.view_mut(),
        dw.view_mut(),
    )?;
    let (into_x, into_w) = reference::rms_norm_backward(width, eps, &input, &weight_held, &dy_held);
    let add = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a + b).collect::<Vec<f64>>();
    // With one element a row the parts of the gradient nearly cancel: the bound follows the parts.
    let parts = largest(&dy_held) * largest(&weight_held) * largest(&inverse);
    let allowed = |expected: &[f64], unit: f64, factor: f64| factor * unit * largest(expected).max(parts);
    let (into_x, into_w) = (add(&into_x, &dx_before), add(&into_w, &dw_before));
    let bound = allowed(&into_x, bench.unit, 16.0 + (rows as f64).sqrt());
    bench.compare(("norm gradient", &shape), &dx, &into_x, |_| bound)?;
    let bound = allowed(&into_w, dw.unit, 16.0 + (rows as f64).sqrt());
    bench.compare(("norm weight gradient", &shape), &dw, &into_w, |_| bound)
}

pub(super) fn rope<D: Device>(bench: &mut Bench<'_, D>) -> Checked {
    for (rows, context, heads, head_dim, extra) in
        [(1, 1, 1, 2, 0), (6, 3, 3, 32, 7), (10, 5, 2, 36, 36), (8, 8, 5, 128, 3)]
    {
        for inverse in [false, true] {
            let call = Rope {
                rows,
                context,
                heads,
                head_dim,
                stride: heads * head_dim + extra,
            };
            let shape = format!("{call:?}, inverse {inverse}");
            let angles = bench.random.numbers(context * head_dim / 2);
            let table: Vec<f64> = angles
                .chunks_exact(head_dim / 2)
                .flat_map(|row| row.iter().map(|x| x.cos()).chain(row.iter().map(|x| x.sin())))
                .collect();
            let (table, table_held) = bench.put(&table, Full)?;
            let (mut x, mut expected) = bench.random(rows * call.stride, Working)?;
            bench
                .device
                .rope(&mut bench.stream, &call, table.view(), inverse, x.view_mut())?;
            let sign = if inverse { -1.0 } else { 1.0 };
            reference::rope(context, heads, head_dim, call.stride, &table_held, sign, &mut expected);
            bench.compare_scaled(("rope", &shape), &x, &expected, 4.0)?;
        }
    }
    Ok(())
}

/// Sequences, context, heads, key heads, head size.
const ATTENTION_SHAPES: [(usize, usize, usize, usize, usize); 11] = [
    (1, 1, 1, 1, 2),
    (2, 5, 2, 1, 16),
    (2, 32, 4, 2, 32),
    (1, 33, 3, 3, 40),
    (2, 100, 6, 2, 32),
    (1, 129, 2, 1, 64),
    (1, 128, 2, 2, 128),
    (1, 300, 4, 1, 48),
    (1, 517, 1, 1, 32),
    (2, 150, 6, 2, 64),
    (1, 200, 4, 2, 128),
];

pub(super) fn attention<D: Device>(bench: &mut Bench<'_, D>) -> Checked {
    for (sequences, context, heads, kv_heads, head_dim) in ATTENTION_SHAPES {
        let call = Attention {
            sequences,
            context,
            heads,
            kv_heads,
            head_dim,
        };
        let shape = format!("{call:?}");
        let (qkv, qkv_held) = bench.random(call.rows() * call.qkv_width(), Working)?;
        let mut out = bench.poisoned(call.rows() * call.out_width(), Working)?;
        let mut log_sum_exp = bench.poisoned(call.rows() * heads, Full)?;
        let to = (out.view_mut(), log_sum_exp.view_mut());
        bench
            .device
            .attention(&mut bench.stream, &call, qkv.view(), to.0, to.1)?;
        let (expected, sums) = reference::attention(&call, &qkv_held);
        bench.compare_scaled(("attention", &shape), &out, &expected, 16.0)?;
        // It is the logarithm of a sum of about one: where that is near one, its own size says nothing of its error.
        let allowed = 8.0 * log_sum_exp.unit * largest(&sums).max(1.0);
        bench.compare(("log-sum-exp", &shape), &log_sum_exp, &sums, |_| allowed)?;

        let (dy, dy_held) = bench.random(call.rows() * call.out_width(), Working)?;
        let mut gradient = bench.poisoned(call.rows() * call.qkv_width(), Working)?;
        let kept = (out.view(), log_sum_exp.view());
        let to = gradient.view_mut();
        bench
            .device
            .attention_backward(&mut bench.stream, &call, qkv.view(), kept.0, kept.1, dy.view(), to)?;
        let expected = reference::attention_backward(&call, &qkv_held, &dy_held);
        bench.compare_scaled(("attention gradient", &shape), &gradient, &expected, 16.0)?;
    }
    Ok(())
}

pub(super) fn swiglu<D: Device>(bench: &mut Bench<'_, D>) -> Checked {
    for (rows, width) in [(1, 1), (3, 16), (7, 43), (20, 688)] {
        let shape = format!("{rows} x {width}");
        let wide: Vec<f64> = bench.random.numbers(2 * rows * width).iter().map(|x| 4.0 * x).collect();
        let (mut gate_up, held) = bench.put(&wide, Working)?;
        let mut out = bench.poisoned(rows * width, Working)?;
        bench
            .device
            .swiglu(&mut bench.stream, rows, width, gate_up.view(), out.view_mut())?;
        let expected = reference::swiglu(width, &held);
        bench.compare_scaled(("swiglu", &shape), &out, &expected, 16.0)?;

        let (mut dy, dy_held) = bench.random(rows * width, Working)?;
        bench
            .device
            .swiglu_backward(&mut bench.stream, rows, width, gate_up.view_mut(), dy.view_mut())?;
        bench.compare_scaled(("swiglu, made again", &shape), &dy, &expected, 16.0)?;
        let expected = reference::swiglu_backward(width, &held, &dy_held);
        bench.compare_scaled(("swiglu gradient", &shape), &gate_up, &expected, 16.0)?;
    }
    Ok(())
}

pub(super) fn embedding<D: Device>(bench: &mut Bench<'_, D>) -> Checked {
    // More ids than a device may sort at a time, all of them one and few of them alike.
    for (count, vocabulary, width) in [(1, 1, 1), (40, 7, 19), (100, 300, 64), (1100, 1, 9), (2100, 900, 8)] {
        let call = Embedding {
            tokens: count,
            vocabulary,
            width,
        };
        let shape = format!("{call:?}");
        let ids: Vec<u32> = (0..count).map(|_| bench.random.below(vocabulary) as u32).collect();
        let tokens = bench.tokens(&ids)?;
        let (table, table_held) = bench.random(vocabulary * width, Working)?;
        let mut out = bench.poisoned(count * width, Working)?;
        bench
            .device
            .embed(&mut bench.stream, &call, table.view(), &tokens, out.view_mut())?;
        let expected: Vec<f64> = ids
            .iter()
            .flat_map(|&id| table_held[id as usize * width..(id as usize + 1) * width].to_vec())
            .collect();
        bench.compare(("embedding", &shape), &out, &expected, |_| 0.0)?;

        let (dy, dy_held) = bench.random(count * width, Working)?;
        let (mut gradient, mut expected) = bench.random(vocabulary * width, Full)?;
        bench
            .device
            .embed_backward(&mut bench.stream, &call, &tokens, dy.view(), gradient.view_mut())?;
        for (id, row) in ids.iter().zip(dy_held.chunks_exact(width)) {
            for (to, value) in expected[*id as usize * width..].iter_mut().zip(row) {
                *to += value;
            }
        }
        bench.compare_scaled(("embedding gradient", &shape), &gradient, &expected, count as f64)?;
    }
    Ok(())
}

pub(super) fn cross_entropy<D: Device>(bench: &mut Bench<'_, D>) -> Checked {
    // The last rows are longer than what a device may keep of one, one of them of whole runs of eight.
    for (rows, vocabulary) in [(1, 1), (3, 16), (5, 77), (9, 1000), (2, 41_008), (1, 50_257)] {
        for gradient_scale in [None, Some(0.125), Some(3.0)] {
            let call = CrossEntropy {
                rows,
                vocabulary,
                target_offset: 2,
                gradient_scale,
            };
            let shape = format!("{call:?}");
            let ids: Vec<u32> = (0..rows + 2).map(|_| bench.random.below(vocabulary) as u32).collect();
            let targets = bench.tokens(&ids)?;
            let wide: Vec<f64> = bench
                .random
                .numbers(rows * vocabulary)
                .iter()
                .map(|x| 8.0 * x)
                .collect();
            let (mut logits, held) = bench.put(&wide, Working)?;
            let mut losses = bench.poisoned(rows, Full)?;
            let to = (logits.view_mut(), losses.view_mut());
            bench
                .device
                .cross_entropy(&mut bench.stream, &call, &targets, to.0, to.1)?;
            let scale = f64::from(gradient_scale.unwrap_or(1.0));
            let (expected, gradient) = reference::cross_entropy(vocabulary, scale, &ids[2..], &held);
            let size = largest(&held).max(1.0);
            let (of_loss, of_gradient) = (4.0 * losses.unit * size, 8.0 * scale * logits.unit * size);
            bench.compare(("loss", &shape), &losses, &expected, |_| of_loss)?;
            if gradient_scale.is_some() {
                bench.compare(("loss gradient", &shape), &logits, &gradient, |_| of_gradient)?;
            } else {
                bench.compare(("logits, left alone", &shape), &logits, &held, |_| 0.0)?;
            }
        }
    }
    Ok(())
}

pub(super) fn head_loss<D: Device>(bench: &mut Bench<'_, D>) -> Checked {
    let (rows, width) = (50, 24);
    for (vocabulary, chunk_rows) in [(210, 7), (210, 50), (210, 64), (208, 24)] {
        let call = HeadLoss {
            rows,
            width,
            vocabulary,
            chunk_rows,
            gradient_scale: 0.5,
        };
        let shape = format!("{call:?}");
        let ids: Vec<u32> = (0..rows).map(|_| bench.random.below(vocabulary) as u32).collect();
        let targets = bench.tokens(&ids)?;
        let (hidden, hidden_held) = bench.random(rows * width, Working)?;
        let (head, head_held) = bench.random(vocabulary * width, Working)?;
        let mut logits = bench.device.alloc(chunk_rows.min(rows) * vocabulary, Working)?;
        let mut losses = bench.poisoned(rows, Full)?;
        let mut into_hidden = bench.poisoned(rows * width, Working)?;
        let (mut into_head, before) = bench.random(vocabulary * width, Full)?;
        let gradients = Some((into_hidden.view_mut(), into_head.view_mut()));
        bench.device.head_loss(
            &mut bench.stream,
            &call,
            &targets,
            hidden.view(),
            head.view(),
            &mut logits,
            losses.view_mut(),
            gradients,
        )?;
        let forward = Gemm::forward(rows, vocabulary, width);
        let (expected, _) = reference::gemm(&forward, &hidden_held, &head_held, &[]);
        let (expected, slopes) = reference::cross_entropy(vocabulary, 0.5, &ids, &expected);
        let backward = Gemm::input_gradient(rows, width, vocabulary);
        let (hidden_expected, _) = reference::gemm(&backward, &slopes, &head_held, &[]);
        let weight = Gemm::weight_gradient(vocabulary, width, rows);
        let (head_expected, _) = reference::gemm(&weight, &slopes, &hidden_held, &before);
        // Logits of this size carry an error of about sqrt(width) units, which the exponential passes on, whatever the result's precision.
        losses.unit = bench.unit;
        into_head.unit = bench.unit;
        bench.compare_scaled(("head loss", &shape), &losses, &expected, 16.0)?;
        bench.compare_scaled(("head input gradient", &shape), &into_hidden, &hidden_expected, 32.0)?;
        bench.compare_scaled(("head weight gradient", &shape), &into_head, &head_expected, 32.0)?;

        let mut again = bench.poisoned(rows, Full)?;
        bench.device.head_loss(
            &mut bench.stream,
            &call,
            &targets,
            hidden.view(),
            head.view(),
            &mut logits,
            again.view_mut(),
            None,
        )?;
        let losses = bench.get("head loss", &shape, &losses)?;
        bench.compare(
            ("head loss without gradient, same bits", &shape),
            &again,
            &losses,
            |_| 0.0,
        )?;
    }
    Ok(())
}

pub(super) fn additions<D: Device>(bench: &mut Bench<'_, D>) -> Checked {
    for len in [1, 16, 45, 1000] {
        let shape = format!("{len}");
        let (mut x, x_held) = bench.random(len, Full)?;
        let (y, y_held) = bench.random(len, Full)?;
        bench.device.fold(&mut bench.stream, x.view_mut(), y.view(), len)?;
        // One f32 addition has one right answer.
        let sum: Vec<f64> = x_held
            .iter()
            .zip(&y_held)
            .map(|(x, y)| f64::from(*x as f32 + *y as f32))
            .collect();
        bench.compare(("fold", &shape), &x, &sum, |_| 0.0)?;
        let mut copied = bench.poisoned(len, Full)?;
        bench.device.copy(&mut bench.stream, y.view(), copied.view_mut(), len)?;
        bench.compare(("copy", &shape), &copied, &y_held, |_| 0.0)?;
        bench.device.zero(&mut bench.stream, copied.view_mut(), len)?;
        bench.compare(("zero", &shape), &copied, &vec![0.0; len], |_| 0.0)?;
    }
    Ok(())
}

pub(super) fn square_sums<D: Device>(bench: &mut Bench<'_, D>) -> Checked {
    for (block_elements, blocks) in [(1, 3), (50, 4), (4096, 2)] {
        let (x, held) = bench.random(block_elements * blocks, Full)?;
        let mut sums = vec![f64::NAN; blocks];
        bench
            .device
            .square_sums(&mut bench.stream, x.view(), block_elements, &mut sums)?;
        for (index, (block, got)) in held.chunks_exact(block_elements).zip(&sums).enumerate() {
            let expected: f64 = block.iter().map(|x| x * x).sum();
            let allowed = expected * 2.0_f64.powi(-40);
            if got.is_nan() || (got - expected).abs() > allowed {
                return Err(ConformanceError::Wrong {
                    kernel: "square sums".to_owned(),
                    shape: format!("{blocks} blocks of {block_elements}"),
                    seed: bench.seed,
                    index,
                    got: *got,
                    expected,
                    allowed,
                });
            }
        }
    }
    Ok(())
}

pub(super) fn adamw<D: Device>(bench: &mut Bench<'_, D>) -> Checked {
    for (block_elements, count, number) in [(1, 2, 1), (77, 3, 2), (1024, 2, 1000)] {
        let step = AdamwStep {
            learning_rate: 3e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: if number == 2 { 0.0 } else { 0.1 },
            gradient_scale: 0.37,
            step: number,
        };
        let blocks = Blocks {
            first: BlockIndex(11),
            block_elements,
        };
        adamw_call(bench, &step, blocks, count)?;
    }
    Ok(())
}

fn adamw_call<D: Device>(bench: &mut Bench<'_, D>, step: &AdamwStep, blocks: Blocks, count: usize) -> Checked {
    let shape = format!("{blocks:?}, {step:?}");
    let len = count * blocks.block_elements;
    let (gradient, g) = bench.random(len, Full)?;
    let (mut master, p) = bench.random(len, Full)?;
    let (mut first, m) = bench.random(len, Full)?;
    let squares: Vec<f64> = bench.random.numbers(len).iter().map(|x| x * x).collect();
    let (mut second, v) = bench.put(&squares, Full)?;
    let mut working = bench.poisoned(len, Working)?;
    let mut hashes = vec![BlockHash::default(); count];
    bench.device.block_hashes(
        &mut bench.stream,
        blocks,
        master.view(),
        first.view(),
        second.view(),
        &mut hashes,
    )?;
    // One block is not as its hash says, and only that one is counted.
    hashes[count / 2].0[3] ^= 4;
    let state = OptimizerState {
        master: master.view_mut(),
        first_moment: first.view_mut(),
        second_moment: second.view_mut(),
    };
    let copy = Some(working.view_mut());
    let changed = bench.device.adamw(
        &mut bench.stream,
        step,
        blocks,
        gradient.view(),
        state,
        copy,
        &mut hashes,
    )?;
    if changed != 1 {
        let fault = format!("one block was not as its hash said, and {changed} were counted");
        return Err(bench.fault("adamw", &shape, fault));
    }
    let updated: Vec<(f64, f64, f64)> = (0..len)
        .map(|i| reference::adamw(step, g[i], (p[i], m[i], v[i])))
        .collect();
    let part = |of: fn(&(f64, f64, f64)) -> f64| updated.iter().map(of).collect::<Vec<f64>>();
    bench.compare_scaled(("adamw first moment", &shape), &first, &part(|x| x.1), 8.0)?;
    bench.compare_scaled(("adamw second moment", &shape), &second, &part(|x| x.2), 8.0)?;
    bench.compare_scaled(("adamw weight", &shape), &master, &part(|x| x.0), 8.0)?;
    let held = bench.get("adamw", &shape, &master)?;
    // The working copy is the master weight, rounded once.
    let unit = if bench.unit > 2.0_f64.powi(-24) {
        bench.unit
    } else {
        0.0
    };
    bench.compare(("adamw working copy", &shape), &working, &held, |i| {
        unit * held[i].abs()
    })?;
    check_hashes(bench, &shape, blocks, (&master, &first, &second), &hashes)
}

/// Hashes made in the update and made alone both follow the definition (STEP-4).
fn check_hashes<D: Device>(
    bench: &mut Bench<'_, D>,
    shape: &str,
    blocks: Blocks,
    (master, first, second): (&Tensor<D>, &Tensor<D>, &Tensor<D>),
    hashes: &[BlockHash],
) -> Checked {
    let mut alone = vec![BlockHash::default(); hashes.len()];
    let (p, m, v) = (master.view(), first.view(), second.view());
    bench
        .device
        .block_hashes(&mut bench.stream, blocks, p, m, v, &mut alone)?;
    let mut arrays = Vec::new();
    for tensor in [master, first, second] {
        let values = bench.get("block hash", shape, tensor)?;
        arrays.push(values.iter().map(|&x| x as f32).collect::<Vec<f32>>());
    }
    for index in 0..hashes.len() {
        let range = index * blocks.block_elements..(index + 1) * blocks.block_elements;
        let [p, m, v] = [0, 1, 2].map(|array: usize| &arrays[array][range.clone()]);
        let expected = block_hash(blocks.number(index), [p, m, v]);
        if hashes[index] != expected || alone[index] != expected {
            let fault = format!(
                "block {index}: hash {} in the update, {} alone, {expected} by definition",
                hashes[index], alone[index]
            );
            return Err(bench.fault("block hash", shape, fault));
        }
    }
    Ok(())
}
