//! GPTQ (Frantar et al., 2023): rounding column by column, each column's error made up for in those not yet rounded.
//!
//! Scales are found first, group by group, by the clipping that loses least under diag(H). Inside a group the columns
//! are taken in descending order of diag(H), so no index is needed when the model runs. Behind it, codes are improved one
//! at a time by coordinate descent on the same quadratic (QuantEase, Behdin et al., 2023), which GPTQ's single pass from
//! left to right leaves room for.

use faer::linalg::solvers::Llt;
use faer::{Mat, Side};
use rayon::prelude::*;

use super::clip::{code_range, search_scale};
use crate::format::{QuantizedMatrix, Scheme};

/// Damping as a share of the Hessian's mean diagonal: the first try, and how far it is raised.
pub const DAMPING: f64 = 0.05;
const DAMPING_LIMIT: f64 = 10.0;
/// Rows that one task takes: a fixed tile, so that results do not depend on the number of threads.
const ROWS: usize = 32;
/// Times that all codes of a row are gone through again.
pub const SWEEPS: usize = 4;

/// What became of a Hessian.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Damping {
    /// The damping that made it positive definite; `None`: none did, and the weights were rounded to nearest.
    pub used: Option<f64>,
}

/// The dampings that are tried, each as a share of the Hessian's mean diagonal and as what is added; none where that is no use.
pub fn dampings(diagonal: &[f64]) -> Vec<(f64, f64)> {
    let mean = diagonal.iter().sum::<f64>() / diagonal.len() as f64;
    if !mean.is_finite() || mean <= 0.0 {
        return Vec::new();
    }
    let shares = std::iter::successors(Some(DAMPING), |damping| Some(2.0 * damping)).take_while(|damping| *damping <= DAMPING_LIMIT);
    shares.map(|share| (share, share * mean)).collect()
}

/// Quantizes `weights` `[rows, cols]` under `scheme` with the Hessian `hessian` `[cols, cols]` of its input.
pub fn quantize(weights: &[f32], rows: usize, cols: usize, scheme: Scheme, hessian: &[f64]) -> (QuantizedMatrix, Damping) {
    let diagonal: Vec<f64> = (0..cols).map(|c| hessian[c * cols + c]).collect();
    let order = column_order(&diagonal, scheme.group(cols));
    let (factor, damping) = match inverse_factor(hessian, &diagonal, &order) {
        Some((factor, damping)) => (Some(factor), Some(damping)),
        None => (None, None),
    };
    let damped: Vec<f32> = damping.map_or_else(Vec::new, |damping| {
        let added = damping * diagonal.iter().sum::<f64>() / cols as f64;
        let entry = |(i, h): (usize, &f64)| (h + if i / cols == i % cols { added } else { 0.0 }) as f32;
        hessian.iter().enumerate().map(entry).collect()
    });
    let matrix = by_tiles(weights, rows, cols, scheme, |tile, codes, scales| {
        quantize_tile(tile, cols, scheme, &diagonal, &order, factor.as_deref(), codes, scales);
        let groups = cols / scheme.group(cols);
        let rows = tile.chunks_exact(cols).zip(codes.chunks_exact_mut(cols)).zip(scales.chunks_exact(groups));
        if damping.is_some() {
            rows.for_each(|((row, codes), scales)| descend(row, codes, scales, scheme, &damped));
        }
    });
    (matrix, Damping { used: damping })
}

/// The codes and scales that `quantize` writes for a few rows at a time.
fn by_tiles(
    weights: &[f32],
    rows: usize,
    cols: usize,
    scheme: Scheme,
    quantize: impl Fn(&[f32], &mut [i8], &mut [f32]) + Sync,
) -> QuantizedMatrix {
    let groups = cols / scheme.group(cols);
    let (mut codes, mut scales) = (vec![0; rows * cols], vec![0.0; rows * groups]);
    let tiles = codes.par_chunks_mut(ROWS * cols).zip(scales.par_chunks_mut(ROWS * groups)).zip(weights.par_chunks(ROWS * cols));
    tiles.for_each(|((codes, scales), tile)| quantize(tile, codes, scales));
    QuantizedMatrix { scheme, rows, cols, codes, scales }
}

/// Round-to-nearest with the scale that loses least, all inputs counting alike.
pub fn round_clipped(weights: &[f32], rows: usize, cols: usize, scheme: Scheme) -> QuantizedMatrix {
    let (diagonal, order): (Vec<f64>, Vec<usize>) = (vec![1.0; cols], (0..cols).collect());
    by_tiles(weights, rows, cols, scheme, |tile, codes, scales| quantize_tile(tile, cols, scheme, &diagonal, &order, None, codes, scales))
}

/// Columns in the order in which they are rounded: group after group, inside a group by descending diag(H).
pub fn column_order(diagonal: &[f64], group: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..diagonal.len()).collect();
    for group in order.chunks_mut(group) {
        group.sort_by(|a, b| diagonal[*b].total_cmp(&diagonal[*a]));
    }
    order
}

/// The upper Cholesky factor U of the damped Hessian's inverse, `H⁻¹ = Uᵀ U`, columns in `order`; row j divided by
/// its diagonal element, which stays on the diagonal. Damping is raised until the Hessian is positive definite.
fn inverse_factor(hessian: &[f64], diagonal: &[f64], order: &[usize]) -> Option<(Vec<f32>, f64)> {
    let n = order.len();
    for (damping, added) in dampings(diagonal) {
        let damped = Mat::from_fn(n, n, |i, j| hessian[order[i] * n + order[j]] + if i == j { added } else { 0.0 });
        if let Some(factor) = factor_of_inverse(&damped) {
            return Some((factor, damping));
        }
    }
    None
}

fn factor_of_inverse(damped: &Mat<f64>) -> Option<Vec<f32>> {
    let n = damped.nrows();
    // H⁻¹ = Uᵀ U is the Cholesky factorization of the inverse; U is its transposed lower factor.
    let inverse = Llt::new(damped.as_ref(), Side::Lower).ok()?;
    let inverse = faer::linalg::solvers::DenseSolveCore::inverse(&inverse);
    let lower = Llt::new(inverse.as_ref(), Side::Lower).ok()?;
    let lower = lower.L();
    let mut factor = vec![0.0; n * n];
    for row in 0..n {
        let pivot = lower[(row, row)];
        for column in row..n {
            let value = if column == row { pivot } else { lower[(column, row)] / pivot };
            factor[row * n + column] = value as f32;
        }
    }
    factor.iter().all(|value| value.is_finite()).then_some(factor)
}

/// Codes and scales of a few rows.
fn quantize_tile(
    tile: &[f32],
    cols: usize,
    scheme: Scheme,
    diagonal: &[f64],
    order: &[usize],
    factor: Option<&[f32]>,
    codes: &mut [i8],
    scales: &mut [f32],
) {
    let rows = tile.len() / cols;
    let group = scheme.group(cols);
    let groups = cols / group;
    // Columns in rounding order.
    let mut work: Vec<f32> = tile.chunks_exact(cols).flat_map(|row| order.iter().map(|c| row[*c])).collect();
    let weights: Vec<f64> = order.iter().map(|c| diagonal[*c]).collect();
    let (low, high) = code_range(scheme);
    for j in 0..cols {
        for row in 0..rows {
            let values = &mut work[row * cols..(row + 1) * cols];
            if j % group == 0 {
                scales[row * groups + j / group] = search_scale(&values[j..j + group], &weights[j..j + group], scheme);
            }
            let scale = scales[row * groups + j / group];
            let code = if scale > 0.0 { (values[j] / scale).round_ties_even().clamp(low, high) } else { 0.0 };
            codes[row * cols + order[j]] = code as i8;
            if let Some(factor) = factor {
                let error = values[j] - code * scale;
                let later = &factor[j * cols + j + 1..(j + 1) * cols];
                for (value, share) in values[j + 1..].iter_mut().zip(later) {
                    *value -= error * share;
                }
            }
        }
    }
}

/// Improves the codes of one row: each in turn becomes the one that loses least under `hessian` `[cols, cols]` while the
/// others stay, until none changes.
fn descend(row: &[f32], codes: &mut [i8], scales: &[f32], scheme: Scheme, hessian: &[f32]) {
    let (cols, group) = (row.len(), scheme.group(row.len()));
    let (low, high) = code_range(scheme);
    let column = |c: usize| &hessian[c * cols..(c + 1) * cols];
    // H (w − ŵ): half the gradient of the loss, its sign turned.
    let mut slope = vec![0.0_f32; cols];
    for c in 0..cols {
        let error = row[c] - f32::from(codes[c]) * scales[c / group];
        for (slope, h) in slope.iter_mut().zip(column(c)) {
            *slope += error * h;
        }
    }
    for _ in 0..SWEEPS {
        let mut changed = false;
        for c in 0..cols {
            let (scale, curvature) = (scales[c / group], column(c)[c]);
            if scale <= 0.0 {
                continue;
            }
            let best = (f32::from(codes[c]) + slope[c] / (scale * curvature)).round_ties_even().clamp(low, high) as i8;
            if best != codes[c] {
                let step = (f32::from(best) - f32::from(codes[c])) * scale;
                codes[c] = best;
                changed = true;
                for (slope, h) in slope.iter_mut().zip(column(c)) {
                    *slope -= step * h;
                }
            }
        }
        if !changed {
            break;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::round_to_nearest;

    fn random(count: usize, mut seed: u64) -> Vec<f32> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 40) as f32 / (1 << 24) as f32 - 0.5
        };
        (0..count).map(|_| next() + next() + next()).collect()
    }

    /// A Hessian of correlated inputs.
    fn hessian(cols: usize) -> Vec<f64> {
        let basis = random(cols * cols, 5);
        let mut h = vec![0.0; cols * cols];
        for t in 0..4 * cols {
            let mix = random(cols, 77 + t as u64);
            let x: Vec<f64> = (0..cols).map(|c| f64::from(mix[c] + 0.8 * mix[0] * basis[c] * 4.0)).collect();
            for i in 0..cols {
                for j in 0..cols {
                    h[i * cols + j] += x[i] * x[j];
                }
            }
        }
        h
    }

    fn loss(weights: &[f32], quantized: &QuantizedMatrix, h: &[f64]) -> f64 {
        let cols = quantized.cols;
        let error: Vec<f64> = weights.iter().zip(quantized.dequantize()).map(|(w, q)| f64::from(w - q)).collect();
        let row =
            |e: &[f64]| (0..cols).flat_map(|i| (0..cols).map(move |j| (i, j))).map(|(i, j)| e[i] * h[i * cols + j] * e[j]).sum::<f64>();
        error.chunks_exact(cols).map(row).sum()
    }

    #[test]
    fn output_error_is_far_below_round_to_nearest() {
        let (rows, cols) = (40, 64);
        let (weights, h) = (random(rows * cols, 1), hessian(cols));
        for scheme in [Scheme::Grouped { bits: 4, group: 32 }, Scheme::Int8] {
            let (found, damping) = quantize(&weights, rows, cols, scheme, &h);
            assert_eq!(damping.used, Some(DAMPING));
            let ratio = loss(&weights, &found, &h) / loss(&weights, &round_to_nearest(&weights, rows, cols, scheme), &h);
            assert!(ratio < 0.7, "{scheme:?} {ratio}");
        }
    }

    #[test]
    fn coordinate_descent_never_loses_and_finds_more() {
        let (rows, cols, scheme) = (40, 64, Scheme::Grouped { bits: 2, group: 32 });
        let (weights, h) = (random(rows * cols, 1), hessian(cols));
        let diagonal: Vec<f64> = (0..cols).map(|c| h[c * cols + c]).collect();
        let order = column_order(&diagonal, 32);
        let (factor, _) = inverse_factor(&h, &diagonal, &order).unwrap();
        let single = by_tiles(&weights, rows, cols, scheme, |tile, codes, scales| {
            quantize_tile(tile, cols, scheme, &diagonal, &order, Some(&factor), codes, scales);
        });
        let found = quantize(&weights, rows, cols, scheme, &h).0;
        let mean = diagonal.iter().sum::<f64>() / cols as f64;
        let damped: Vec<f64> = h.iter().enumerate().map(|(i, h)| h + if i % (cols + 1) == 0 { DAMPING * mean } else { 0.0 }).collect();
        let ratio = loss(&weights, &found, &damped) / loss(&weights, &single, &damped);
        assert!(ratio < 0.97, "{ratio}");
    }

    #[test]
    fn a_hessian_of_zeros_falls_back_to_rounding() {
        let weights = random(4 * 32, 3);
        let (found, damping) = quantize(&weights, 4, 32, Scheme::Grouped { bits: 4, group: 32 }, &[0.0; 32 * 32]);
        assert_eq!(damping.used, None);
        assert!(weights.iter().zip(found.dequantize()).all(|(w, q)| (w - q).abs() < 0.2));
    }

    #[test]
    fn threads_do_not_matter() {
        let (weights, h) = (random(100 * 64, 9), hessian(64));
        let run = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| quantize(&weights, 100, 64, Scheme::Grouped { bits: 4, group: 64 }, &h).0)
        };
        assert_eq!(run(1), run(2));
    }
}
