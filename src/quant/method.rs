//! From a float linear to quantized parts, slice by slice.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use super::gptq;
use super::hessian::Hessian;
use super::recipe::Method;
use super::weights::FloatLinear;
use crate::checkpoint::{LinearSpec, SliceSpec};
use crate::error::Result;
use crate::format::{Format, LinearWeights, Scheme, Transform, WeightPart, round_to_nearest};

/// Values that one task rounds at least.
const ROUNDED: usize = 1 << 16;

/// A linear as it will be stored.
pub struct QuantizedLinear {
    /// One part, or one for each slice where slices are stored differently. Float linears have a float part.
    pub parts: Vec<WeightPart>,
    /// Whether float weights are no longer the checkpoint's.
    pub changed: bool,
    pub int8_activations: bool,
    /// Static scale of the int8 activations, to be set once it is known.
    pub input_scale: Option<f32>,
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
            input_scale: self.input_scale,
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
    /// The linear's format; slices may be stored in others.
    pub format: Format,
    /// How each slice is stored.
    pub schemes: Vec<Scheme>,
    pub transforms: &'a [Transform],
    /// Bytes of an element of the checkpoint, which weights that stay in float keep.
    pub float_bytes: usize,
}

/// Quantizes the weights `float` of `linear`; `hessian` is that of its input, for GPTQ.
pub fn quantize_linear(
    float: &FloatLinear,
    linear: &LinearSpec,
    rounding: &Rounding<'_>,
    hessian: Option<&dyn Hessian>,
) -> Result<QuantizedLinear> {
    let mut values = float.values();
    let schemes = &rounding.schemes;
    let mut notes: Vec<String> = group_note(linear, rounding).into_iter().collect();
    // Whole linears that nothing changed are the source's own bytes; everything else in 16 bits becomes bf16.
    let own = !float.changed && schemes.iter().all(|scheme| *scheme == Scheme::Float);
    if !own && rounding.float_bytes == 2 && schemes.contains(&Scheme::Float) {
        values.par_iter_mut().with_min_len(ROUNDED).for_each(|value| *value = bf16::from_f32(*value).to_f32());
    }
    let mut quantize = |rows: Range<usize>, scheme| {
        let count = rows.len();
        let values = &values[rows.start * linear.cols..rows.end * linear.cols];
        if scheme == Scheme::Float {
            return Ok(WeightPart::Float(values.to_vec()));
        }
        Ok(WeightPart::Quantized(match (rounding.method, hessian) {
            (Method::Rtn, _) => round_to_nearest(values, count, linear.cols, scheme),
            (Method::Gptq | Method::Gptaq, Some(hessian)) => {
                let (matrix, damping) = hessian.round(values, count, linear.cols, scheme)?;
                match damping.used {
                    None => notes.push(format!("{}: its Hessian is singular, so weights were rounded to nearest", linear.name)),
                    Some(damping) if damping > gptq::DAMPING => {
                        notes.push(format!("{}: GPTQ's damping was raised to {damping}", linear.name));
                    }
                    Some(_) => {}
                }
                matrix
            }
            (Method::Clip | Method::Gptq | Method::Gptaq, _) => gptq::round_clipped(values, count, linear.cols, scheme),
        }))
    };
    let parts = match schemes.as_slice() {
        schemes if schemes.iter().all(|scheme| *scheme == Scheme::Float) => vec![WeightPart::Float(values)],
        [first, rest @ ..] if rest.iter().all(|scheme| scheme == first) => vec![quantize(0..linear.rows, *first)?],
        schemes => {
            let mut start = 0;
            let part = |(slice, scheme): (&SliceSpec, &Scheme)| {
                let rows = start..start + slice.rows;
                start = rows.end;
                quantize(rows, *scheme)
            };
            linear.slices.iter().zip(schemes).map(part).collect::<Result<_>>()?
        }
    };
    Ok(QuantizedLinear {
        parts,
        changed: float.changed,
        int8_activations: rounding.format.quantizes_activations(),
        input_scale: None,
        hadamard: linear.hadamard(rounding.transforms),
        bias: float.bias.as_ref().map(|bias| bias.iter().map(|value| *value as f32).collect()),
        notes,
    })
}

/// What to say where the format's group does not divide the width.
fn group_note(linear: &LinearSpec, rounding: &Rounding<'_>) -> Option<String> {
    let asked = rounding.format.largest_group();
    if rounding.format.weight_bits() >= 8 || linear.cols.is_multiple_of(asked) {
        return None;
    }
    let instead = match Scheme::for_width(rounding.format, 2, linear.cols) {
        Scheme::Grouped { group, .. } => format!("groups of {group}, since {asked} does not divide {} inputs", linear.cols),
        _ => format!("weights are int8 per channel, since no group of 128, 64 or 32 divides {} inputs", linear.cols),
    };
    Some(format!("{}: {instead}", linear.name))
}
