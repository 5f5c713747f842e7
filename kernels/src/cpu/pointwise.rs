//! Row-wise and element-wise kernels: norm, rotation, SwiGLU, embedding, cross-entropy, additions.
//!
//! All are bound by memory: each reads its inputs once where it can. Sums over a row run in sixteen lanes, then fold.

use super::exponential::{exp, sigmoid};
use super::lanes::{LANES, Lanes, multiversion};
use crate::device::{CrossEntropy, Norm, Rope};

/// Whole vectors of a row, and what is left. A macro, so that no closure stands between kernel and intrinsics.
macro_rules! for_lanes {
    ($len:expr, |$range:ident, $whole:ident| $body:block) => {{
        let len: usize = $len;
        let vectors = len / LANES * LANES;
        let mut at = 0;
        while at < vectors {
            let $range = at..at + LANES;
            let $whole = true;
            $body
            at += LANES;
        }
        if at < len {
            let $range = at..len;
            let $whole = false;
            $body
        }
    }};
}
pub(super) use for_lanes;

/// Sixteen values, or the rest of a row.
#[inline(always)]
pub(super) fn get<V: Lanes>(from: &[f32], range: &std::ops::Range<usize>, whole: bool) -> V {
    let from = &from[range.start..range.end];
    if whole {
        // SAFETY: a whole range is sixteen values long.
        unsafe { V::load_at(from.as_ptr()) }
    } else {
        V::load_part(from)
    }
}

/// The way back.
#[inline(always)]
pub(super) fn set<V: Lanes>(value: V, to: &mut [f32], range: &std::ops::Range<usize>, whole: bool) {
    let to = &mut to[range.start..range.end];
    if whole {
        // SAFETY: a whole range is sixteen values long.
        unsafe { value.store_at(to.as_mut_ptr()) };
    } else {
        value.store_part(to);
    }
}

#[inline(always)]
fn add_on<V: Lanes>(x: &mut [f32], y: &[f32]) {
    assert_eq!(x.len(), y.len());
    for_lanes!(x.len(), |range, whole| {
        let sum = get::<V>(x, &range, whole).add(get(y, &range, whole));
        set(sum, x, &range, whole);
    });
}
multiversion!(pub(super) fn add(x: &mut [f32], y: &[f32]) = add_on);

/// `x + branch`, its norm, and the inverse RMS of one row.
#[inline(always)]
fn norm_row<V: Lanes>(x: &[f32], branch: Option<(&[f32], &mut [f32])>, weight: &[f32], y: &mut [f32], eps: f32) -> f32 {
    let width = x.len();
    let mut squares = V::splat(0.0);
    let input: &[f32] = match branch {
        None => {
            for_lanes!(width, |range, whole| {
                let value = get::<V>(x, &range, whole);
                squares = value.fma(value, squares);
            });
            x
        }
        Some((branch, sum)) => {
            for_lanes!(width, |range, whole| {
                let value = get::<V>(x, &range, whole).add(get(branch, &range, whole));
                set(value, sum, &range, whole);
                squares = value.fma(value, squares);
            });
            sum
        }
    };
    let inverse = 1.0 / (squares.sum() / width as f32 + eps).sqrt();
    let scale = V::splat(inverse);
    for_lanes!(width, |range, whole| {
        let value = get::<V>(input, &range, whole)
            .mul(scale)
            .mul(get(weight, &range, whole));
        set(value, y, &range, whole);
    });
    inverse
}

#[inline(always)]
fn rms_norm_on<V: Lanes>(
    call: &Norm,
    x: &[f32],
    branch: Option<(&[f32], &mut [f32])>,
    weight: &[f32],
    y: &mut [f32],
    inverse_rms: &mut [f32],
) {
    let width = call.width;
    let weight = &weight[..width];
    let mut branch = branch;
    for row in 0..call.rows {
        let range = row * width..(row + 1) * width;
        let branch = branch
            .as_mut()
            .map(|(branch, sum)| (&branch[range.clone()], &mut sum[range.clone()]));
        inverse_rms[row] = norm_row::<V>(&x[range.clone()], branch, weight, &mut y[range], call.eps);
    }
}
multiversion!(
    /// See `Device::rms_norm`.
    pub(super) fn rms_norm(
        call: &Norm,
        x: &[f32],
        branch: Option<(&[f32], &mut [f32])>,
        weight: &[f32],
        y: &mut [f32],
        inverse_rms: &mut [f32],
    ) = rms_norm_on
);

#[inline(always)]
fn rms_norm_backward_on<V: Lanes>(
    call: &Norm,
    x: &[f32],
    inverse_rms: &[f32],
    weight: &[f32],
    y_gradient: &[f32],
    x_gradient: &mut [f32],
    weight_sums: &mut [f32],
) {
    let width = call.width;
    let weight = &weight[..width];
    let weight_sums = &mut weight_sums[..width];
    weight_sums.fill(0.0);
    for row in 0..call.rows {
        let start = row * width;
        let x = &x[start..start + width];
        let dy = &y_gradient[start..start + width];
        let dx = &mut x_gradient[start..start + width];
        let inverse = V::splat(inverse_rms[row]);
        let mut dot = V::splat(0.0);
        for_lanes!(width, |range, whole| {
            let normal = get::<V>(x, &range, whole).mul(inverse);
            let dy = get::<V>(dy, &range, whole);
            dot = dy.mul(get(weight, &range, whole)).fma(normal, dot);
            let sum = dy.fma(normal, get(weight_sums, &range, whole));
            set(sum, weight_sums, &range, whole);
        });
        let mean = V::splat(dot.sum() / width as f32);
        for_lanes!(width, |range, whole| {
            let normal = get::<V>(x, &range, whole).mul(inverse);
            let direct = get::<V>(dy, &range, whole).mul(get(weight, &range, whole));
            let change = normal.fnma(mean, direct);
            set(change.fma(inverse, get(dx, &range, whole)), dx, &range, whole);
        });
    }
}
multiversion!(
    /// See `Device::rms_norm_backward`; `weight_sums` is scratch and holds this call's weight gradient alone.
    pub(super) fn rms_norm_backward(
        call: &Norm,
        x: &[f32],
        inverse_rms: &[f32],
        weight: &[f32],
        y_gradient: &[f32],
        x_gradient: &mut [f32],
        weight_sums: &mut [f32],
    ) = rms_norm_backward_on
);

#[inline(always)]
fn rope_on<V: Lanes>(call: &Rope, table: &[f32], inverse: bool, x: &mut [f32]) {
    let half = call.head_dim / 2;
    let sign = V::splat(if inverse { -1.0 } else { 1.0 });
    for row in 0..call.rows {
        let at = row % call.context * call.head_dim;
        let (cosines, sines) = table[at..at + call.head_dim].split_at(half);
        for head in 0..call.heads {
            let start = row * call.stride + head * call.head_dim;
            let (low, high) = x[start..start + call.head_dim].split_at_mut(half);
            for_lanes!(half, |range, whole| {
                let (cosine, sine) = (
                    get::<V>(cosines, &range, whole),
                    get::<V>(sines, &range, whole).mul(sign),
                );
                let (a, b) = (get::<V>(low, &range, whole), get::<V>(high, &range, whole));
                set(b.fnma(sine, a.mul(cosine)), low, &range, whole);
                set(a.fma(sine, b.mul(cosine)), high, &range, whole);
            });
        }
    }
}
multiversion!(pub(super) fn rope(call: &Rope, table: &[f32], inverse: bool, x: &mut [f32]) = rope_on);

#[inline(always)]
fn swiglu_on<V: Lanes>(rows: usize, width: usize, gate_up: &[f32], out: &mut [f32]) {
    for row in 0..rows {
        let (gate, up) = gate_up[2 * row * width..2 * (row + 1) * width].split_at(width);
        let out = &mut out[row * width..(row + 1) * width];
        for_lanes!(width, |range, whole| {
            let gate = get::<V>(gate, &range, whole);
            let value = gate.mul(sigmoid(gate)).mul(get(up, &range, whole));
            set(value, out, &range, whole);
        });
    }
}
multiversion!(pub(super) fn swiglu(rows: usize, width: usize, gate_up: &[f32], out: &mut [f32]) = swiglu_on);

#[inline(always)]
fn swiglu_backward_on<V: Lanes>(rows: usize, width: usize, gate_up: &mut [f32], out_gradient: &mut [f32]) {
    let one = V::splat(1.0);
    for row in 0..rows {
        let (gate, up) = gate_up[2 * row * width..2 * (row + 1) * width].split_at_mut(width);
        let out = &mut out_gradient[row * width..(row + 1) * width];
        for_lanes!(width, |range, whole| {
            let g = get::<V>(gate, &range, whole);
            let u = get::<V>(up, &range, whole);
            let dy = get::<V>(out, &range, whole);
            let s = sigmoid(g);
            let silu = g.mul(s);
            // silu' = s · (1 + g · (1 - s))
            let slope = s.mul(g.fma(one.sub(s), one));
            set(dy.mul(u).mul(slope), gate, &range, whole);
            set(dy.mul(silu), up, &range, whole);
            set(silu.mul(u), out, &range, whole);
        });
    }
}
multiversion!(
    /// See `Device::swiglu_backward`.
    pub(super) fn swiglu_backward(rows: usize, width: usize, gate_up: &mut [f32], out_gradient: &mut [f32]) =
        swiglu_backward_on
);

/// Largest logit, and the sum of `e^(logit - largest)`, left in place of the logits where `keep` is set.
#[inline(always)]
fn softmax_row<V: Lanes>(row: &mut [f32], keep: bool) -> (f32, f32) {
    let mut largest = V::splat(f32::NEG_INFINITY);
    let vectors = row.len() / LANES * LANES;
    for_lanes!(vectors, |range, whole| {
        largest = largest.max(get(row, &range, whole));
    });
    let mut top = largest.largest();
    for &value in &row[vectors..] {
        top = if top > value { top } else { value };
    }
    let shift = V::splat(top);
    let mut sums = V::splat(0.0);
    for_lanes!(vectors, |range, whole| {
        let value = exp(get::<V>(row, &range, whole).sub(shift));
        sums = sums.add(value);
        if keep {
            set(value, row, &range, whole);
        }
    });
    let mut sum = sums.sum();
    if vectors < row.len() {
        let mut values = [0.0; LANES];
        let rest = &mut row[vectors..];
        exp(V::load_part(rest).sub(shift)).store(&mut values);
        for (value, to) in values.into_iter().zip(rest) {
            sum += value;
            if keep {
                *to = value;
            }
        }
    }
    (top, sum)
}

#[inline(always)]
fn cross_entropy_on<V: Lanes>(call: &CrossEntropy, targets: &[u32], logits: &mut [f32], losses: &mut [f32]) {
    let rows = logits[..call.rows * call.vocabulary].chunks_exact_mut(call.vocabulary);
    for ((row, &target), loss) in rows.zip(&targets[..call.rows]).zip(&mut losses[..call.rows]) {
        let wanted = row[target as usize];
        let (largest, sum) = softmax_row::<V>(row, call.gradient_scale.is_some());
        *loss = (libm::log(f64::from(sum)) + f64::from(largest) - f64::from(wanted)) as f32;
        if let Some(scale) = call.gradient_scale {
            let factor = V::splat(scale / sum);
            for_lanes!(row.len(), |range, whole| {
                set(get::<V>(row, &range, whole).mul(factor), row, &range, whole);
            });
            row[target as usize] -= scale;
        }
    }
}
multiversion!(
    /// See `Device::cross_entropy`.
    pub(super) fn cross_entropy(call: &CrossEntropy, targets: &[u32], logits: &mut [f32], losses: &mut [f32]) =
        cross_entropy_on
);

/// Row `tokens[i]` of the table into row `i`.
pub(super) fn embed(width: usize, table: &[f32], tokens: &[u32], out: &mut [f32]) {
    for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(width)) {
        let row = token as usize * width;
        out.copy_from_slice(&table[row..row + width]);
    }
}

#[inline(always)]
fn embed_backward_on<V: Lanes>(width: usize, tokens: &[u32], out_gradient: &[f32], table_gradient: &mut [f32]) {
    for (&token, gradient) in tokens.iter().zip(out_gradient.chunks_exact(width)) {
        let row = token as usize * width;
        add_on::<V>(&mut table_gradient[row..row + width], gradient);
    }
}
multiversion!(
    /// Adds row `i` to row `tokens[i]` of the table's gradient, in order.
    pub(super) fn embed_backward(width: usize, tokens: &[u32], out_gradient: &[f32], table_gradient: &mut [f32]) =
        embed_backward_on
);
