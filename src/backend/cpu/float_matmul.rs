//! Float matrix products of a few tokens, where packing the operands would cost more than the product: decoding steps.

use multiversion::multiversion;
use rayon::prelude::*;

use super::math;

/// Tokens up to which [`few_tokens`] is faster than a blocked product.
pub const FEW: usize = 4;

/// Products that a task computes at least, so that small matrices stay on one thread.
const TASK_PRODUCTS: usize = 1 << 17;

/// `x Wᵀ` for `x` `[tokens, cols]` and `weights` `[rows, cols]`: `[tokens, rows]`. A weight row is read once for all tokens.
pub fn few_tokens(weights: &[f32], x: &[f32], cols: usize) -> Vec<f32> {
    let (rows, tokens) = (weights.len() / cols, x.len() / cols);
    let mut by_row = vec![0.0; rows * tokens];
    let min_len = (TASK_PRODUCTS / (cols * tokens)).max(1);
    by_row
        .par_chunks_exact_mut(tokens)
        .zip(weights.par_chunks_exact(cols))
        .with_min_len(min_len)
        .for_each(|(out, weights)| products(weights, x, out));
    if tokens == 1 {
        return by_row;
    }
    (0..tokens).flat_map(|t| by_row.iter().skip(t).step_by(tokens)).copied().collect()
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn products(weights: &[f32], x: &[f32], out: &mut [f32]) {
    for (out, x) in out.iter_mut().zip(x.chunks_exact(weights.len())) {
        *out = math::dot(x, weights);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_float64() {
        let (rows, cols, tokens) = (37, 83, 3);
        let value = |i: usize| ((i * 7919) % 1009) as f32 / 500.0 - 1.0;
        let weights: Vec<f32> = (0..rows * cols).map(value).collect();
        let x: Vec<f32> = (0..tokens * cols).map(|i| value(i + 13)).collect();
        let found = few_tokens(&weights, &x, cols);
        for (i, found) in found.iter().enumerate() {
            let (x, w) = (&x[i / rows * cols..][..cols], &weights[i % rows * cols..][..cols]);
            let expected: f64 = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
            assert!((f64::from(*found) - expected).abs() < 1e-4, "{i}");
        }
    }
}
