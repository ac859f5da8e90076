//! From a float linear to quantized parts, slice by slice.

use crate::checkpoint::{Checkpoint, LinearSpec};
use crate::error::Result;
use crate::format::{Format, LinearWeights, Scheme, WeightPart, round_to_nearest};

/// A linear as it will be stored.
pub struct QuantizedLinear {
    /// One part, or one for each slice where slices are stored differently. Float linears have a float part.
    pub parts: Vec<WeightPart>,
    pub int8_activations: bool,
    pub bias: Option<Vec<f32>>,
    /// What differs from the format asked for.
    pub notes: Vec<String>,
}

impl QuantizedLinear {
    /// Whether the checkpoint's own tensor is kept.
    pub fn is_float(&self) -> bool {
        matches!(self.parts.as_slice(), [WeightPart::Float(_)])
    }

    /// The weights as a backend takes them.
    pub fn weights(&self, cols: usize) -> LinearWeights {
        let mut weights = LinearWeights { cols, parts: Vec::new(), bias: self.bias.clone(), int8_activations: self.int8_activations };
        for part in &self.parts {
            weights.push(part.clone());
        }
        weights
    }
}

/// Quantizes `linear` of `checkpoint` by round-to-nearest under `format`.
pub fn quantize_linear(checkpoint: &Checkpoint, linear: &LinearSpec, format: Format) -> Result<QuantizedLinear> {
    let values = checkpoint.read(&format!("{}.weight", linear.stem))?;
    let bias = if linear.bias { Some(checkpoint.read(&format!("{}.bias", linear.stem))?) } else { None };
    let schemes = linear.schemes(format);
    let mut notes = Vec::new();
    if format.weight_bits() == 4 && schemes.iter().zip(&linear.slices).any(|(scheme, slice)| *scheme == Scheme::Int8 && slice.min_bits <= 4)
    {
        notes.push(format!("{}: no group of 128, 64 or 32 divides {} inputs, so weights are int8 per channel", linear.name, linear.cols));
    }
    let quantize = |rows: std::ops::Range<usize>, scheme| {
        let count = rows.len();
        let values = &values[rows.start * linear.cols..rows.end * linear.cols];
        WeightPart::Quantized(round_to_nearest(values, count, linear.cols, scheme))
    };
    let parts = match schemes.as_slice() {
        schemes if schemes.iter().all(|scheme| *scheme == Scheme::Float) => vec![WeightPart::Float(values)],
        [first, rest @ ..] if rest.iter().all(|scheme| scheme == first) => vec![quantize(0..linear.rows, *first)],
        schemes => {
            let mut start = 0;
            let part = |(slice, scheme): (&crate::checkpoint::SliceSpec, &Scheme)| {
                let rows = start..start + slice.rows;
                start = rows.end;
                quantize(rows, *scheme)
            };
            linear.slices.iter().zip(schemes).map(part).collect()
        }
    };
    Ok(QuantizedLinear { parts, int8_activations: format.quantizes_activations(), bias, notes })
}
