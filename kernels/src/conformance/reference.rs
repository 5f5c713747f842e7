//! Every kernel in f64, as plainly as it can be written: the oracle.

use crate::device::{AdamwStep, Attention, Gemm};

/// `C = alpha · op(A) · op(B)` added to `c`, and for each element the sum of the absolute terms.
pub fn gemm(call: &Gemm, a: &[f64], b: &[f64], c: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (mut out, mut size) = (Vec::new(), Vec::new());
    for row in 0..call.m {
        for column in 0..call.n {
            let (mut sum, mut terms) = (0.0, 0.0);
            for k in 0..call.k {
                let x = a[if call.a_transposed {
                    k * call.a_stride + row
                } else {
                    row * call.a_stride + k
                }];
                let y = b[if call.b_transposed {
                    column * call.b_stride + k
                } else {
                    k * call.b_stride + column
                }];
                sum += x * y;
                terms += (x * y).abs();
            }
            let before = if call.accumulate {
                c[row * call.c_stride + column]
            } else {
                0.0
            };
            out.push(before + f64::from(call.alpha) * sum);
            size.push(before.abs() + (f64::from(call.alpha) * terms).abs());
        }
    }
    (out, size)
}

/// Norm and inverse RMS of rows.
pub fn rms_norm(width: usize, eps: f64, x: &[f64], weight: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (mut y, mut inverse_rms) = (Vec::new(), Vec::new());
    for row in x.chunks_exact(width) {
        let inverse = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / width as f64 + eps).sqrt();
        y.extend(row.iter().zip(weight).map(|(x, w)| x * inverse * w));
        inverse_rms.push(inverse);
    }
    (y, inverse_rms)
}

/// Gradients of the norm into input and weight.
pub fn rms_norm_backward(width: usize, eps: f64, x: &[f64], weight: &[f64], dy: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (mut dx, mut dw) = (Vec::new(), vec![0.0; width]);
    for (row, dy) in x.chunks_exact(width).zip(dy.chunks_exact(width)) {
        let inverse = 1.0 / (row.iter().map(|x| x * x).sum::<f64>() / width as f64 + eps).sqrt();
        let dot: f64 = (0..width).map(|i| dy[i] * weight[i] * row[i]).sum();
        for i in 0..width {
            dx.push(inverse * (dy[i] * weight[i] - row[i] * inverse * inverse * dot / width as f64));
            dw[i] += dy[i] * row[i] * inverse;
        }
    }
    (dx, dw)
}

/// Rotates the first `heads` heads of each row of `stride` elements.
pub fn rope(context: usize, heads: usize, head_dim: usize, stride: usize, table: &[f64], sign: f64, x: &mut [f64]) {
    let half = head_dim / 2;
    for (row, values) in x.chunks_exact_mut(stride).enumerate() {
        let table = &table[row % context * head_dim..];
        for head in 0..heads {
            for i in 0..half {
                let (a, b) = (values[head * head_dim + i], values[head * head_dim + half + i]);
                let (cosine, sine) = (table[i], sign * table[half + i]);
                values[head * head_dim + i] = a * cosine - b * sine;
                values[head * head_dim + half + i] = b * cosine + a * sine;
            }
        }
    }
}

/// One head's rows of `qkv`.
fn head<'a>(call: &Attention, qkv: &'a [f64], sequence: usize, at: usize) -> Vec<&'a [f64]> {
    let width = call.qkv_width();
    (0..call.context)
        .map(|token| {
            let start = (sequence * call.context + token) * width + at * call.head_dim;
            &qkv[start..start + call.head_dim]
        })
        .collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Weights of one query over the keys that it may see, and the log-sum-exp of its scores.
fn weights(call: &Attention, query: &[f64], keys: &[&[f64]]) -> (Vec<f64>, f64) {
    let scale = 1.0 / (call.head_dim as f64).sqrt();
    let scores: Vec<f64> = keys.iter().map(|key| scale * dot(query, key)).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let log_sum_exp = largest + scores.iter().map(|s| (s - largest).exp()).sum::<f64>().ln();
    (scores.iter().map(|s| (s - log_sum_exp).exp()).collect(), log_sum_exp)
}

/// Output and log-sum-exp.
pub fn attention(call: &Attention, qkv: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let mut out = vec![0.0; call.rows() * call.out_width()];
    let mut log_sum_exp = Vec::new();
    for sequence in 0..call.sequences {
        for index in 0..call.heads {
            let kv_head = index / (call.heads / call.kv_heads);
            let queries = head(call, qkv, sequence, index);
            let keys = head(call, qkv, sequence, call.heads + kv_head);
            let values = head(call, qkv, sequence, call.heads + call.kv_heads + kv_head);
            for (token, query) in queries.iter().enumerate() {
                let (weights, sum) = weights(call, query, &keys[..=token]);
                log_sum_exp.push(sum);
                let at = (sequence * call.context + token) * call.out_width() + index * call.head_dim;
                for (weight, value) in weights.iter().zip(&values) {
                    for (out, value) in out[at..at + call.head_dim].iter_mut().zip(*value) {
                        *out += weight * value;
                    }
                }
            }
        }
    }
    (out, log_sum_exp)
}

/// Gradient into `qkv`.
pub fn attention_backward(call: &Attention, qkv: &[f64], out_gradient: &[f64]) -> Vec<f64> {
    let (width, depth) = (call.qkv_width(), call.head_dim);
    let scale = 1.0 / (depth as f64).sqrt();
    let mut gradient = vec![0.0; qkv.len()];
    for sequence in 0..call.sequences {
        for index in 0..call.heads {
            let kv_head = index / (call.heads / call.kv_heads);
            let (key_at, value_at) = (call.heads + kv_head, call.heads + call.kv_heads + kv_head);
            let queries = head(call, qkv, sequence, index);
            let keys = head(call, qkv, sequence, key_at);
            let values = head(call, qkv, sequence, value_at);
            for (token, query) in queries.iter().enumerate() {
                let row = sequence * call.context + token;
                let dy = &out_gradient[row * call.out_width() + index * depth..][..depth];
                let (weights, _) = weights(call, query, &keys[..=token]);
                let slopes: Vec<f64> = values[..=token].iter().map(|value| dot(dy, value)).collect();
                let delta = dot(&weights, &slopes);
                for other in 0..=token {
                    let other_row = sequence * call.context + other;
                    let slope = weights[other] * (slopes[other] - delta) * scale;
                    for i in 0..depth {
                        gradient[row * width + index * depth + i] += slope * keys[other][i];
                        gradient[other_row * width + key_at * depth + i] += slope * query[i];
                        gradient[other_row * width + value_at * depth + i] += weights[other] * dy[i];
                    }
                }
            }
        }
    }
    gradient
}

fn sigmoid(x: f64) -> f64 {
    1.0 / (1.0 + (-x).exp())
}

/// `silu(gate) · up` of rows `[gate | up]`.
pub fn swiglu(width: usize, gate_up: &[f64]) -> Vec<f64> {
    gate_up
        .chunks_exact(2 * width)
        .flat_map(|row| (0..width).map(|i| row[i] * sigmoid(row[i]) * row[width + i]))
        .collect()
}

/// Gradient into `gate_up`.
pub fn swiglu_backward(width: usize, gate_up: &[f64], dy: &[f64]) -> Vec<f64> {
    let mut gradient = Vec::new();
    for (row, dy) in gate_up.chunks_exact(2 * width).zip(dy.chunks_exact(width)) {
        gradient.extend((0..width).map(|i| {
            let s = sigmoid(row[i]);
            dy[i] * row[width + i] * s * (1.0 + row[i] * (1.0 - s))
        }));
        gradient.extend((0..width).map(|i| dy[i] * row[i] * sigmoid(row[i])));
    }
    gradient
}

/// Losses and gradient of softmax cross-entropy.
pub fn cross_entropy(vocabulary: usize, scale: f64, targets: &[u32], logits: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (mut losses, mut gradient) = (Vec::new(), Vec::new());
    for (row, &target) in logits.chunks_exact(vocabulary).zip(targets) {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = row.iter().map(|x| (x - largest).exp()).sum();
        losses.push(sum.ln() + largest - row[target as usize]);
        gradient.extend(row.iter().enumerate().map(|(i, x)| {
            let hit = if i == target as usize { 1.0 } else { 0.0 };
            scale * ((x - largest).exp() / sum - hit)
        }));
    }
    (losses, gradient)
}

/// One element's update: (weight, first moment, second moment).
pub fn adamw(step: &AdamwStep, gradient: f64, (p, m, v): (f64, f64, f64)) -> (f64, f64, f64) {
    let g = gradient * f64::from(step.gradient_scale);
    let m = step.beta1 * m + (1.0 - step.beta1) * g;
    let v = step.beta2 * v + (1.0 - step.beta2) * g * g;
    let p = p - step.learning_rate * step.weight_decay * p;
    let m_hat = m / (1.0 - step.beta1.powf(step.step as f64));
    let v_hat = v / (1.0 - step.beta2.powf(step.step as f64));
    (p - step.learning_rate * m_hat / (v_hat.sqrt() + step.eps), m, v)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conformance::Random;

    /// Compares a gradient with central differences of `f`, which is linear in the output through `dy`.
    fn check(name: &str, x: &[f64], dy: &[f64], gradient: &[f64], f: impl Fn(&[f64]) -> Vec<f64>) {
        let value = |x: &[f64]| dot(&f(x), dy);
        let step = 1e-5;
        let largest = gradient.iter().fold(0.0_f64, |largest, g| largest.max(g.abs()));
        for index in 0..x.len() {
            let mut moved = x.to_vec();
            moved[index] += step;
            let above = value(&moved);
            moved[index] -= 2.0 * step;
            let slope = (above - value(&moved)) / (2.0 * step);
            let error = (slope - gradient[index]).abs();
            assert!(
                error <= 1e-8 * largest.max(1.0),
                "{name}[{index}]: {slope} is not {}",
                gradient[index]
            );
        }
    }

    #[test]
    fn the_oracle_s_gradients_are_slopes() {
        let mut random = Random::new(7);
        let (width, eps) = (6, 1e-5);
        let (x, w, dy) = (
            random.numbers(3 * width),
            random.numbers(width),
            random.numbers(3 * width),
        );
        let (dx, dw) = rms_norm_backward(width, eps, &x, &w, &dy);
        check("norm input", &x, &dy, &dx, |x| rms_norm(width, eps, x, &w).0);
        check("norm weight", &w, &dy, &dw, |w| rms_norm(width, eps, &x, w).0);

        let gate_up = random.numbers(4 * width);
        let dy = random.numbers(2 * width);
        check("swiglu", &gate_up, &dy, &swiglu_backward(width, &gate_up, &dy), |x| {
            swiglu(width, x)
        });

        let logits = random.numbers(3 * width);
        let targets = [1, 5, 0];
        let (_, gradient) = cross_entropy(width, 2.5, &targets, &logits);
        check("cross-entropy", &logits, &[2.5; 3], &gradient, |x| {
            cross_entropy(width, 1.0, &targets, x).0
        });

        let call = Attention {
            sequences: 2,
            context: 5,
            heads: 4,
            kv_heads: 2,
            head_dim: 3,
        };
        let qkv = random.numbers(call.rows() * call.qkv_width());
        let dy = random.numbers(call.rows() * call.out_width());
        check("attention", &qkv, &dy, &attention_backward(&call, &qkv, &dy), |x| {
            attention(&call, x).0
        });

        let x = random.numbers(2 * 14);
        let table = random.numbers(2 * 4);
        let dy = random.numbers(2 * 14);
        let turned = |x: &[f64], sign: f64| {
            let mut x = x.to_vec();
            rope(2, 3, 4, 14, &table, sign, &mut x);
            x
        };
        // The inverse rotation is the gradient where cosine and sine are of one angle; for any table it is the transpose.
        check("rope", &x, &dy, &turned(&dy, -1.0), |x| turned(x, 1.0));
    }
}
