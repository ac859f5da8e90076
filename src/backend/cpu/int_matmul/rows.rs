//! [`QuantizedRows`]: activations as int8 codes with one scale a token.

use multiversion::multiversion;
use rayon::prelude::*;

/// Rows of codes are padded to a multiple of this.
const ALIGNMENT: usize = 64;

/// Codes that share an entry of `sums`: the smallest group of int4 weights.
const SUM_LENGTH: usize = 32;

/// Values below which quantizing on several threads costs more than it gains.
const PARALLEL_VALUES: usize = 1 << 17;

/// int8 activations, one scale a token: `x[t, c] ≈ row(t)[c] · scales[t]`, codes −127…127.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedRows {
    pub tokens: usize,
    pub cols: usize,
    pub scales: Vec<f32>,
    /// Length of a row of `codes`, which ends in zeros: a multiple of 64.
    padded: usize,
    codes: Vec<i8>,
    /// Sums of 32 codes, `[tokens, padded / 32]`.
    sums: Vec<i32>,
    /// Sums of all codes of a token.
    totals: Vec<i32>,
}

impl QuantizedRows {
    /// Quantizes `x` `[tokens, cols]`, code = round-half-even(x / scale) within ±127, with the scale `fixed`, or with
    /// absmax / 127 of each token. A row of zeros has scale 0 and codes 0; a row with a NaN has a NaN for its scale, and
    /// so for its products.
    pub fn round(x: &[f32], tokens: usize, cols: usize, fixed: Option<f32>) -> Self {
        assert_eq!(x.len(), tokens * cols, "activations are not [tokens, cols]");
        let padded = cols.next_multiple_of(ALIGNMENT).max(ALIGNMENT);
        let mut codes = vec![0; tokens * padded];
        let mut scales = vec![0.0; tokens];
        let quantize = |(t, (codes, scale)): (usize, (&mut [i8], &mut f32))| {
            *scale = quantize_row(&x[t * cols..(t + 1) * cols], &mut codes[..cols], fixed);
        };
        if x.len() < PARALLEL_VALUES {
            codes.chunks_exact_mut(padded).zip(&mut scales).enumerate().for_each(quantize);
        } else {
            codes.par_chunks_exact_mut(padded).zip(&mut scales).enumerate().for_each(quantize);
        }
        Self::from_codes(tokens, cols, padded, codes, scales)
    }

    /// [`Self::round`] with a scale for each token.
    pub fn per_token(x: &[f32], tokens: usize, cols: usize) -> Self {
        Self::round(x, tokens, cols, None)
    }

    /// Rows with given codes; `codes` is `[tokens, padded]`.
    fn from_codes(tokens: usize, cols: usize, padded: usize, codes: Vec<i8>, scales: Vec<f32>) -> Self {
        let sums = sum_codes(&codes);
        let totals = sums.chunks_exact(padded / SUM_LENGTH).map(|sums| sums.iter().sum()).collect();
        Self { tokens, cols, scales, padded, codes, sums, totals }
    }

    /// The codes of a token, `[cols]`.
    pub fn row(&self, token: usize) -> &[i8] {
        &self.padded_row(token)[..self.cols]
    }

    /// The given tokens, in that order.
    #[must_use]
    pub fn select(&self, tokens: &[usize]) -> Self {
        let sums_in_row = self.padded / SUM_LENGTH;
        Self {
            tokens: tokens.len(),
            cols: self.cols,
            scales: tokens.iter().map(|t| self.scales[*t]).collect(),
            padded: self.padded,
            codes: tokens.iter().flat_map(|t| self.padded_row(*t)).copied().collect(),
            sums: tokens.iter().flat_map(|t| &self.sums[t * sums_in_row..(t + 1) * sums_in_row]).copied().collect(),
            totals: tokens.iter().map(|t| self.totals[*t]).collect(),
        }
    }

    /// The codes of a token with the zeros behind them.
    pub(super) fn padded_row(&self, token: usize) -> &[i8] {
        &self.codes[token * self.padded..(token + 1) * self.padded]
    }

    /// Sum of a token's codes.
    pub(super) fn total(&self, token: usize) -> i32 {
        self.totals[token]
    }

    /// Sum of a token's codes in one group of inputs; `group` is a multiple of 32.
    pub(super) fn group_sum(&self, token: usize, index: usize, group: usize) -> i32 {
        let sums_in_group = group / SUM_LENGTH;
        let start = token * (self.padded / SUM_LENGTH) + index * sums_in_group;
        self.sums[start..start + sums_in_group].iter().sum()
    }

    /// Whether the public fields still describe the codes.
    pub(super) fn is_consistent(&self) -> bool {
        self.codes.len() == self.tokens * self.padded && self.cols <= self.padded && self.scales.len() == self.tokens
    }
}

/// Quantizes one row and returns its scale.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn quantize_row(x: &[f32], codes: &mut [i8], fixed: Option<f32>) -> f32 {
    // Magnitudes compare like their bits, NaN above all; integers, unlike floats, may be compared in any order,
    // which lets the compiler use vectors.
    let absmax = f32::from_bits(x.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0));
    let scale = fixed.map_or(absmax / 127.0, |fixed| if absmax.is_nan() { absmax } else { fixed });
    // Adding 1.5 · 2²³ rounds to an integer, halves to even, and leaves it in the lowest bits: vector code on every
    // machine, unlike a conversion, which has to look for NaN.
    let to_code = |x: f32| ((x / scale).clamp(-127.0, 127.0) + 12_582_912.0).to_bits() as i8;
    if scale > 0.0 {
        for (code, x) in codes.iter_mut().zip(x) {
            *code = to_code(*x);
        }
    }
    scale
}

/// Sums of 32 codes each.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn sum_codes(codes: &[i8]) -> Vec<i32> {
    codes.chunks_exact(SUM_LENGTH).map(|codes| codes.iter().map(|code| i32::from(*code)).sum()).collect()
}
