//! From a float linear to quantized parts, slice by slice.

use std::ops::Range;

use half::bf16;

use super::gptq;
use super::recipe::Method;
use super::weights::FloatLinear;
use crate::checkpoint::{LinearSpec, SliceSpec};
use crate::format::{Format, LinearWeights, Scheme, Transform, WeightPart, round_to_nearest};

/// A linear as it will be stored.
pub struct QuantizedLinear {
    /// One part, or one for each slice where slices are stored differently. Float linears have a float part.
    pub parts: Vec<WeightPart>,
    /// Whether float weights are no longer the checkpoint's.
    pub changed: bool,
    pub int8_activations: bool,
    pub hadamard: Option<usize>,
    pub bias: Option<Vec<f32>>,
    /// What differs from the format asked for.
    pub notes: Vec<String>,
}

impl QuantizedLinear {
    /// The values, where the linear stays in float.
    pub fn float(&self) -> Option<&[f32]> {
        match self.parts.as_slice() {
            [WeightPart::Float(values)] => Some(values),
            _ => None,
        }
    }

    /// The weights as a backend takes them.
    pub fn weights(&self, cols: usize) -> LinearWeights {
        let mut weights = LinearWeights {
            cols,
            parts: Vec::new(),
            bias: self.bias.clone(),
            int8_activations: self.int8_activations,
            input_scale: None,
            hadamard: self.hadamard,
        };
        for part in &self.parts {
            weights.push(part.clone());
        }
        weights
    }
}

/// What a linear is quantized by.
pub struct Rounding<'a> {
    pub method: Method,
    pub format: Format,
    pub transforms: &'a [Transform],
    /// Bytes of an element of the checkpoint, which weights that stay in float keep.
    pub float_bytes: usize,
}

/// Quantizes the weights `float` of `linear`; `hessian` `[cols, cols]` is that of its input, for GPTQ.
pub fn quantize_linear(float: &FloatLinear, linear: &LinearSpec, rounding: &Rounding<'_>, hessian: Option<&[f64]>) -> QuantizedLinear {
    let mut values = float.values();
    let schemes = linear.schemes(rounding.format);
    let mut notes = Vec::new();
    let narrowed = schemes.iter().zip(&linear.slices).any(|(scheme, slice)| *scheme == Scheme::Int8 && slice.min_bits <= 4);
    if rounding.format.weight_bits() == 4 && narrowed {
        notes.push(format!("{}: no group of 128, 64 or 32 divides {} inputs, so weights are int8 per channel", linear.name, linear.cols));
    }
    if float.changed && rounding.float_bytes == 2 && schemes.contains(&Scheme::Float) {
        for value in &mut values {
            *value = bf16::from_f32(*value).to_f32();
        }
    }
    let mut quantize = |rows: Range<usize>, scheme| {
        let count = rows.len();
        let values = &values[rows.start * linear.cols..rows.end * linear.cols];
        WeightPart::Quantized(match (rounding.method, hessian) {
            (Method::Rtn, _) => round_to_nearest(values, count, linear.cols, scheme),
            (Method::Gptq, Some(hessian)) => {
                let (matrix, damping) = gptq::quantize(values, count, linear.cols, scheme, hessian);
                match damping.used {
                    None => notes.push(format!("{}: its Hessian is singular, so weights were rounded to nearest", linear.name)),
                    Some(damping) if damping > gptq::DAMPING => {
                        notes.push(format!("{}: GPTQ's damping was raised to {damping}", linear.name));
                    }
                    Some(_) => {}
                }
                matrix
            }
            (Method::Clip | Method::Gptq, _) => gptq::round_clipped(values, count, linear.cols, scheme),
        })
    };
    let parts = match schemes.as_slice() {
        schemes if schemes.iter().all(|scheme| *scheme == Scheme::Float) => vec![WeightPart::Float(values)],
        [first, rest @ ..] if rest.iter().all(|scheme| scheme == first) => vec![quantize(0..linear.rows, *first)],
        schemes => {
            let mut start = 0;
            let part = |(slice, scheme): (&SliceSpec, &Scheme)| {
                let rows = start..start + slice.rows;
                start = rows.end;
                quantize(rows, *scheme)
            };
            linear.slices.iter().zip(schemes).map(part).collect()
        }
    };
    QuantizedLinear {
        parts,
        changed: float.changed,
        int8_activations: rounding.format.quantizes_activations(),
        hadamard: linear.hadamard(rounding.transforms),
        bias: float.bias.as_ref().map(|bias| bias.iter().map(|value| *value as f32).collect()),
        notes,
    }
}
