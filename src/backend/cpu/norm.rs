//! Norms, gates, relu² and logits statistics on the CPU, row by row.

use multiversion::multiversion;
use rayon::prelude::*;

use super::math;
use crate::backend::Divergence;

/// Rows that one task takes, so that small tensors stay on one thread.
const ROWS_PER_TASK: usize = 16;

/// Values that one task of an elementwise operation takes.
const CHUNK: usize = 1 << 15;

/// `x / rms(x) · weight` by row of `weight.len()`, over each `group` of its values.
pub fn rms(x: &[f32], weight: &[f32], group: usize, eps: f32) -> Vec<f32> {
    let width = weight.len();
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(width).with_min_len(ROWS_PER_TASK).zip(x.par_chunks(width)).for_each(|(out, x)| rms_row(x, weight, group, eps, out));
    out
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn rms_row(x: &[f32], weight: &[f32], group: usize, eps: f32, out: &mut [f32]) {
    for ((out, x), weight) in out.chunks_exact_mut(group).zip(x.chunks_exact(group)).zip(weight.chunks_exact(group)) {
        let scale = 1.0 / (math::sum(x, |x| x * x) / group as f32 + eps).sqrt();
        for ((out, x), weight) in out.iter_mut().zip(x).zip(weight) {
            *out = x * scale * weight;
        }
    }
}

/// `y·silu(z)` in place, by row of `width`; z is the first columns of rows of `stride` values.
pub fn gate(y: &mut [f32], width: usize, z: &[f32], stride: usize) {
    y.par_chunks_mut(width).with_min_len(ROWS_PER_TASK).zip(z.par_chunks(stride)).for_each(|(y, z)| gate_row(y, z));
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn gate_row(y: &mut [f32], z: &[f32]) {
    for (y, z) in y.iter_mut().zip(z) {
        *y *= math::silu(*z);
    }
}

/// `relu(x)²`.
pub fn relu2(x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; x.len()];
    out.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(out, x)| relu2_chunk(x, out));
    out
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn relu2_chunk(x: &[f32], out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(x) {
        let positive = x.max(0.0);
        *out = positive * positive;
    }
}

/// `a + b`.
pub fn add(a: &[f32], b: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; a.len()];
    out.par_chunks_mut(CHUNK).zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK))).for_each(|(out, (a, b))| {
        for (out, (a, b)) in out.iter_mut().zip(a.iter().zip(b)) {
            *out = a + b;
        }
    });
    out
}

/// Index of the first largest value.
pub fn argmax(row: &[f32]) -> usize {
    row.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, x)| if *x > best.1 { (i, *x) } else { best }).0
}

/// Maximum and log of the sum of exponentials of a row of logits, so that `log p = logit − max − log_sum`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn log_sum(row: &[f32]) -> (f32, f64) {
    let max = row.iter().fold(f32::NEG_INFINITY, |max, x| max.max(*x));
    let total: f64 = row.chunks(256).map(|chunk| f64::from(math::sum(chunk, |x| math::exp(x - max)))).sum();
    (max, total.ln())
}

/// For each (row, token): its log-probability and whether it is the most probable.
pub fn log_probabilities(logits: &[f32], width: usize, targets: &[(usize, u32)]) -> Vec<(f64, bool)> {
    let of = |(row, token): &(usize, u32)| {
        let row = &logits[row * width..(row + 1) * width];
        let (max, log_sum) = log_sum(row);
        let token = *token as usize;
        (f64::from(row[token] - max) - log_sum, argmax(row) == token)
    };
    targets.par_iter().with_min_len(ROWS_PER_TASK).map(of).collect()
}

/// Divergence of each row of `logits` from the same row of `reference`.
pub fn divergence(reference: &[f32], logits: &[f32], width: usize) -> Vec<Divergence> {
    reference
        .par_chunks(width)
        .with_min_len(ROWS_PER_TASK)
        .zip(logits.par_chunks(width))
        .map(|(p, q)| {
            let ((p_max, p_sum), (q_max, q_sum)) = (log_sum(p), log_sum(q));
            let kl: f64 = p
                .iter()
                .zip(q)
                .map(|(p, q)| {
                    let log_p = f64::from(p - p_max) - p_sum;
                    let log_q = f64::from(q - q_max) - q_sum;
                    log_p.exp() * (log_p - log_q)
                })
                .sum();
            // Rounding may leave a distribution at a distance of −1e-17 from itself.
            Divergence { kl: kl.max(0.0), same_top: argmax(p) == argmax(q) }
        })
        .collect()
}

/// `1 − Σ p²` over the probabilities that a row of logits gives.
pub fn undecidedness(logits: &[f32]) -> f64 {
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, x| max.max(*x));
    let (mut sum, mut squares) = (0.0, 0.0);
    for logit in logits {
        let p = libm::exp(f64::from(logit - max));
        sum += p;
        squares += p * p;
    }
    (1.0 - squares / (sum * sum)).max(0.0)
}
