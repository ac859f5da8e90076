//! Elementwise float mathematics in a form that the compiler turns into vector code, compiled for several
//! instruction sets and chosen at run time. Plain multiplications and additions in a fixed order: every
//! instruction set gives the same bits.

use half::bf16;
use multiversion::multiversion;
use rayon::prelude::*;

/// Lanes of the partial sums in [`dot`] and [`sum`].
const LANES: usize = 16;

/// `e^x` for finite x, relative error under 2e-7: Cephes' range reduction and polynomial, without branches.
/// Results under 1e-38 become about 1e-38; over 3e38 they stay at about 3e38.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 · 2^23: adding it rounds to an integer.
    let x = x.clamp(-87.0, 88.0);
    let n = (x * std::f32::consts::LOG2_E + ROUND) - ROUND;
    let r = x - n * 0.693_359_4 + n * 2.121_944_4e-4;
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 0.5;
    let y = p * r * r + r + 1.0;
    y * f32::from_bits(((n as i32 + 127) << 23) as u32)
}

/// `x · sigmoid(x)`.
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

/// `ln(1 + e^x)`, exact for large x.
pub fn softplus(x: f32) -> f32 {
    if x > 20.0 { x } else { x.exp().ln_1p() }
}

/// What is an f32, however it is kept.
pub trait Value: Copy {
    fn float(self) -> f32;
}

impl Value for f32 {
    #[inline(always)]
    fn float(self) -> f32 {
        self
    }
}

impl Value for bf16 {
    #[inline(always)]
    fn float(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
}

/// Inner product, in 16 partial sums that are added pairwise.
#[inline(always)]
pub fn dot<A: Value>(a: &[A], b: &[f32]) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (a_chunks, a_rest) = a.as_chunks::<LANES>();
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    for (a, b) in a_chunks.iter().zip(b_chunks) {
        for lane in 0..LANES {
            lanes[lane] += a[lane].float() * b[lane];
        }
    }
    for (lane, (a, b)) in a_rest.iter().zip(b_rest).enumerate() {
        lanes[lane] += a.float() * b;
    }
    fold(&mut lanes)
}

/// Sum of `f(x)`, in the order of [`dot`].
#[inline(always)]
pub fn sum(values: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0_f32; LANES];
    let (chunks, rest) = values.as_chunks::<LANES>();
    for chunk in chunks {
        for lane in 0..LANES {
            lanes[lane] += f(chunk[lane]);
        }
    }
    for (lane, value) in rest.iter().enumerate() {
        lanes[lane] += f(*value);
    }
    fold(&mut lanes)
}

/// Whether no value is infinite or not a number.
pub fn all_finite(values: &[f32]) -> bool {
    values.par_chunks(1 << 15).all(|chunk| largest_bits(chunk) < f32::INFINITY.to_bits())
}

/// The largest magnitude, as bits: they compare like magnitudes, infinity and NaN above all.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn largest_bits(values: &[f32]) -> u32 {
    values.iter().map(|x| x.to_bits() & 0x7fff_ffff).max().unwrap_or(0)
}

/// The sum of partial sums, added pairwise. Not inlined: as part of the loop in front it makes the compiler choose vectors
/// of four, the width at which it ends.
#[inline(never)]
fn fold(lanes: &mut [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_agrees_with_float64() {
        for i in -8600..8700 {
            let x = i as f32 / 100.0;
            let expected = f64::from(x).exp();
            assert!((f64::from(exp(x)) - expected).abs() <= 2e-7 * expected, "exp({x})");
        }
    }

    #[test]
    fn silu_and_softplus_agree_with_float64() {
        for i in -4000..4000 {
            let x = i as f32 / 50.0;
            let wide = f64::from(x);
            assert!((f64::from(silu(x)) - wide / (1.0 + (-wide).exp())).abs() < 1e-6 * (1.0 + wide.abs()));
            let expected = if wide > 30.0 { wide } else { wide.exp().ln_1p() };
            assert!((f64::from(softplus(x)) - expected).abs() <= 3e-7 * expected.max(1e-6));
        }
    }

    #[test]
    fn every_value_that_is_not_finite_is_found() {
        let mut values = vec![f32::MAX; 100_000];
        assert!(all_finite(&values) && all_finite(&[]));
        for (at, value) in [(0, f32::NAN), (40_000, -f32::NAN), (70_001, f32::INFINITY), (99_999, f32::NEG_INFINITY)] {
            values[at] = value;
            assert!(!all_finite(&values), "{value} at {at}");
            values[at] = f32::MIN;
        }
    }

    #[test]
    fn dot_and_sum_take_every_element() {
        let a: Vec<f32> = (0..37).map(|i| i as f32).collect();
        assert_eq!(dot(&a, &a), (0..37).map(|i| (i * i) as f32).sum::<f32>());
        assert_eq!(sum(&a, |x| 2.0 * x), 2.0 * 666.0);
    }
}
