//! Values as caches keep them: floats, halves, or int8 codes with scales for runs of values.

use half::f16;
use multiversion::multiversion;

use crate::format::CacheFormat;

/// Values in a cache. What a scale of the int8 form covers is the owner's to say.
#[derive(Clone)]
pub enum Stored {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Int8 { codes: Vec<i8>, scales: Vec<f32> },
}

impl Stored {
    /// No values yet.
    pub fn empty(format: CacheFormat) -> Self {
        match format {
            CacheFormat::F32 => Self::F32(Vec::new()),
            CacheFormat::F16 => Self::F16(Vec::new()),
            CacheFormat::Int8 => Self::Int8 { codes: Vec::new(), scales: Vec::new() },
        }
    }

    /// Bytes that the values take, scales included.
    pub fn bytes(&self) -> u64 {
        let bytes = match self {
            Self::F32(values) => 4 * values.len(),
            Self::F16(values) => 2 * values.len(),
            Self::Int8 { codes, scales } => codes.len() + 4 * scales.len(),
        };
        bytes as u64
    }
}

/// Halves, values beyond the largest one kept there.
pub fn to_f16(values: &[f32]) -> impl Iterator<Item = f16> {
    let largest = f16::MAX.to_f32();
    values.iter().map(move |value| f16::from_f32(value.clamp(-largest, largest)))
}

/// Rounds values that share one scale, absmax / 127, and returns it.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn round_span(values: &[f32], codes: &mut [i8]) -> f32 {
    // Magnitudes compare like their bits, NaN above all.
    let absmax = f32::from_bits(values.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0));
    let scale = absmax / 127.0;
    if scale > 0.0 {
        for (code, value) in codes.iter_mut().zip(values) {
            *code = to_code(*value, scale);
        }
    } else {
        codes.fill(0);
    }
    scale
}

/// Rounds values that each have a scale of their own.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn round_each(values: &[f32], scales: &[f32], codes: &mut [i8]) {
    for ((code, value), scale) in codes.iter_mut().zip(values).zip(scales) {
        *code = if *scale > 0.0 { to_code(*value, *scale) } else { 0 };
    }
}

/// The floats of codes that share one scale.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn expand_span(codes: &[i8], scale: f32, values: &mut [f32]) {
    for (value, code) in values.iter_mut().zip(codes) {
        *value = f32::from(*code) * scale;
    }
}

/// The floats of codes that each have a scale of their own.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
pub fn expand_each(codes: &[i8], scales: &[f32], values: &mut [f32]) {
    for ((value, code), scale) in values.iter_mut().zip(codes).zip(scales) {
        *value = f32::from(*code) * scale;
    }
}

/// round-half-even(value / scale) within ±127: adding 1.5 · 2²³ rounds, and leaves the integer in the lowest bits.
#[inline(always)]
fn to_code(value: f32, scale: f32) -> i8 {
    ((value / scale).clamp(-127.0, 127.0) + 12_582_912.0).to_bits() as i8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_nearest_ones_and_extremes_are_kept() {
        let values: Vec<f32> = (-40..=40).map(|i| i as f32 * 0.37).collect();
        let mut codes = vec![0; values.len()];
        let scale = round_span(&values, &mut codes);
        for (value, code) in values.iter().zip(&codes) {
            assert_eq!(f32::from(*code), (value / scale).round_ties_even());
        }
        assert_eq!((codes[0], codes[80]), (-127, 127));
        round_each(&[1e9, -1e9, 0.5, 7.0], &[1.0, 1.0, 1.0, 0.0], &mut codes[..4]);
        assert_eq!(codes[..4], [127, -127, 0, 0]);
        assert_eq!(to_f16(&[1e6, f32::MIN]).map(f16::to_f32).collect::<Vec<_>>(), [65504.0, -65504.0]);
    }
}
