//! The clipping of a group that loses least.

use half::bf16;
use multiversion::multiversion;

use crate::format::Scheme;

/// Clipping ratios that are tried, as shares of the absolute maximum.
const CLIP_STEPS: usize = 26;
/// Scales whose losses are computed side by side.
const LANES: usize = 8;

/// Smallest and largest code.
pub fn code_range(scheme: Scheme) -> (f32, f32) {
    (f32::from(scheme.min_code()), f32::from(scheme.max_code()))
}

/// The scale (rounded to its stored type) that loses least under the weights `importance`, over clipping ratios from
/// 0.5 to 1; below 8 bits also with the extreme mapped to the smallest code. The first of several that lose the same.
pub fn search_scale(values: &[f32], importance: &[f64], scheme: Scheme) -> f32 {
    let absmax = values.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
    let (low, high) = code_range(scheme);
    let stored = |scale: f32| if matches!(scheme, Scheme::Int8) { scale } else { bf16::from_f32(scale).to_f32() };
    let mut best = (stored(absmax / high), f64::INFINITY);
    let divisors: &[f32] = if high == -low { &[high] } else { &[high, -low] };
    for divisor in divisors {
        for first in (0..CLIP_STEPS).step_by(LANES) {
            let steps = first..CLIP_STEPS.min(first + LANES);
            let mut scales = [0.0; LANES];
            for (scale, step) in scales.iter_mut().zip(steps.clone()) {
                *scale = stored(absmax * (1.0 - 0.5 * step as f32 / (CLIP_STEPS - 1) as f32) / divisor);
            }
            for (scale, found) in scales.into_iter().zip(losses(values, importance, scales, low, high)).take(steps.len()) {
                if scale > 0.0 && found < best.1 {
                    best = (scale, found);
                }
            }
        }
    }
    best.0
}

/// What each scale loses: `Σ importance·(value − code·scale)²`, each sum taken in order, as for one scale alone.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn losses(values: &[f32], importance: &[f64], scales: [f32; LANES], low: f32, high: f32) -> [f64; LANES] {
    let mut sums = [0.0; LANES];
    for (value, importance) in values.iter().zip(importance) {
        let importance = importance + f64::MIN_POSITIVE;
        for (sum, scale) in sums.iter_mut().zip(scales) {
            let error = f64::from(value - (value / scale).round_ties_even().clamp(low, high) * scale);
            *sum += importance * (error * error);
        }
    }
    sums
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// One scale after the other.
    fn by_one(values: &[f32], importance: &[f64], scheme: Scheme) -> f32 {
        let absmax = values.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
        let (low, high) = code_range(scheme);
        let divisors = if high == -low { vec![high] } else { vec![high, -low] };
        let stored = |scale: f32| if matches!(scheme, Scheme::Int8) { scale } else { bf16::from_f32(scale).to_f32() };
        let mut best = (stored(absmax / high), f64::INFINITY);
        for (divisor, step) in divisors.into_iter().flat_map(|divisor| (0..CLIP_STEPS).map(move |step| (divisor, step))) {
            let scale = stored(absmax * (1.0 - 0.5 * step as f32 / (CLIP_STEPS - 1) as f32) / divisor);
            let error = |value: f32| f64::from(value - (value / scale).round_ties_even().clamp(low, high) * scale);
            let loss = values.iter().zip(importance).map(|(value, weight)| (weight + f64::MIN_POSITIVE) * error(*value).powi(2)).sum();
            if scale > 0.0 && loss < best.1 {
                best = (scale, loss);
            }
        }
        best.0
    }

    proptest! {
        #[test]
        fn scales_side_by_side_are_those_found_one_by_one(
            values in prop::collection::vec(-3.0_f32..3.0, 1..70), flat in any::<bool>(), bits in 2_u8..9, zeros in any::<bool>(),
        ) {
            let values: Vec<f32> = if zeros { vec![0.0; values.len()] } else { values };
            let importance: Vec<f64> = values.iter().map(|value| if flat { 1.0 } else { f64::from(value.abs()) }).collect();
            let scheme = if bits == 8 { Scheme::Int8 } else { Scheme::Grouped { bits: bits.min(4), group: values.len() } };
            prop_assert_eq!(search_scale(&values, &importance, scheme).to_bits(), by_one(&values, &importance, scheme).to_bits());
        }
    }
}
