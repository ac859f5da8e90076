//! Quantized matrices as canonical codes and scales, and round-to-nearest quantization of a row.

use half::bf16;
use multiversion::multiversion;
use rayon::prelude::*;

use super::Scheme;

/// A `[rows, cols]` matrix of codes with scales: `w[r, c] = codes[r·cols + c] · scales[r·(cols/group) + c/group]`.
/// Scales hold values that the stored type (f32 for int8, bf16 for groups) represents exactly.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedMatrix {
    pub scheme: Scheme,
    pub rows: usize,
    pub cols: usize,
    pub codes: Vec<i8>,
    pub scales: Vec<f32>,
}

impl QuantizedMatrix {
    /// Inputs that share a scale.
    pub fn group(&self) -> usize {
        self.scheme.group(self.cols)
    }

    /// Bytes stored on disk, scales included.
    pub fn stored_bytes(&self) -> u64 {
        self.scheme.stored_bytes(self.rows, self.cols, 0)
    }

    /// The float matrix that the codes stand for, `[rows, cols]`.
    pub fn dequantize(&self) -> Vec<f32> {
        let group = self.group();
        self.codes
            .chunks_exact(group)
            .zip(&self.scales)
            .flat_map(|(codes, scale)| codes.iter().map(move |code| f32::from(*code) * scale))
            .collect()
    }

    /// Puts the rows of `other` (same scheme and width) below the rows of `self`.
    pub fn append_rows(&mut self, other: &Self) {
        debug_assert_eq!((self.scheme, self.cols), (other.scheme, other.cols));
        self.rows += other.rows;
        self.codes.extend_from_slice(&other.codes);
        self.scales.extend_from_slice(&other.scales);
    }
}

/// Round-to-nearest quantization of `weights` `[rows, cols]` under `scheme` (not [`Scheme::Float`]):
/// scale = absmax / max code, rounded to its stored type before the codes are chosen;
/// code = round-half-even(w / scale), kept within the scheme's range.
pub fn round_to_nearest(weights: &[f32], rows: usize, cols: usize, scheme: Scheme) -> QuantizedMatrix {
    debug_assert_eq!(weights.len(), rows * cols);
    let group = scheme.group(cols);
    let (mut codes, mut scales) = (vec![0; weights.len()], vec![0.0; weights.len() / group]);
    let tiles = codes.par_chunks_mut(GROUPS * group).zip(scales.par_chunks_mut(GROUPS)).zip(weights.par_chunks(GROUPS * group));
    tiles.for_each(|((codes, scales), weights)| {
        for ((codes, scale), weights) in codes.chunks_exact_mut(group).zip(scales).zip(weights.chunks_exact(group)) {
            *scale = round_group(weights, scheme, codes);
        }
    });
    QuantizedMatrix { scheme, rows, cols, codes, scales }
}

/// Groups that one task rounds.
const GROUPS: usize = 256;

/// The codes of one group; returns its scale.
#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2"))]
fn round_group(weights: &[f32], scheme: Scheme, codes: &mut [i8]) -> f32 {
    let (min_code, max_code) = (f32::from(scheme.min_code()), f32::from(scheme.max_code()));
    let exact = weights.iter().fold(0.0_f32, |max, w| max.max(w.abs())) / max_code;
    let scale = if matches!(scheme, Scheme::Int8) { exact } else { bf16::from_f32(exact).to_f32() };
    // A scale of zero (an all-zero or denormal group) leaves every code at zero.
    if scale > 0.0 {
        for (code, w) in codes.iter_mut().zip(weights) {
            *code = (w / scale).round_ties_even().clamp(min_code, max_code) as i8;
        }
    }
    scale
}

/// The weights of one linear as a backend takes them: parts stacked along the output.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearWeights {
    pub cols: usize,
    pub parts: Vec<WeightPart>,
    /// One value an output, if the linear has a bias.
    pub bias: Option<Vec<f32>>,
    /// Whether the linear reads int8 activations. Float parts then still read floats.
    pub int8_activations: bool,
    /// Static scale of the int8 activations: code = round-half-even(x / scale) within ±127. `None`: one a token.
    pub input_scale: Option<f32>,
    /// The linear reads its input after an orthonormal Hadamard transform of each block of so many features (a power
    /// of two): its weights carry the inverse.
    pub hadamard: Option<usize>,
}

/// Consecutive output rows that are stored in one way.
#[derive(Debug, Clone, PartialEq)]
pub enum WeightPart {
    /// `[rows, cols]`.
    Float(Vec<f32>),
    Quantized(QuantizedMatrix),
}

impl WeightPart {
    /// Output rows of a part `cols` inputs wide.
    pub fn rows(&self, cols: usize) -> usize {
        match self {
            Self::Float(values) => values.len() / cols,
            Self::Quantized(matrix) => matrix.rows,
        }
    }
}

impl LinearWeights {
    /// A float linear without bias: `values` is `[rows, cols]`.
    pub fn float(values: Vec<f32>, cols: usize) -> Self {
        Self { cols, parts: vec![WeightPart::Float(values)], bias: None, int8_activations: false, input_scale: None, hadamard: None }
    }

    /// Outputs.
    pub fn rows(&self) -> usize {
        self.parts.iter().map(|part| part.rows(self.cols)).sum()
    }

    /// Adds a part below the others, merging it with the last where both are stored alike.
    pub fn push(&mut self, part: WeightPart) {
        match (self.parts.last_mut(), &part) {
            (Some(WeightPart::Float(above)), WeightPart::Float(below)) => above.extend_from_slice(below),
            (Some(WeightPart::Quantized(above)), WeightPart::Quantized(below)) if above.scheme == below.scheme => above.append_rows(below),
            _ => self.parts.push(part),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn error_is_within_half_a_step(weights in prop::collection::vec(-3.0_f32..3.0, 256), bits in prop::sample::select(vec![8, 4, 3, 2])) {
            let scheme = if bits == 8 { Scheme::Int8 } else { Scheme::Grouped { bits, group: 64 } };
            let matrix = round_to_nearest(&weights, 2, 128, scheme);
            let group = matrix.group();
            for (i, (w, q)) in weights.iter().zip(matrix.dequantize()).enumerate() {
                let step = matrix.scales[i / group];
                // bf16 rounding of the scale may clip the extreme by up to 2^-8 of itself: half a step at 7 levels.
                prop_assert!((w - q).abs() <= 0.5 * step * 1.001 + w.abs() * 2f32.powi(-8), "{w} became {q}, step {step}");
            }
        }
    }

    #[test]
    fn zero_rows_stay_zero() {
        let matrix = round_to_nearest(&[0.0; 64], 2, 32, Scheme::Grouped { bits: 4, group: 32 });
        assert!(matrix.dequantize().iter().all(|w| *w == 0.0));
    }

    #[test]
    fn halves_round_to_even() {
        let matrix = round_to_nearest(&[127.0, 0.5, 1.5, 2.5], 1, 4, Scheme::Int8);
        assert_eq!(matrix.codes, [127, 0, 2, 2]);
    }
}
