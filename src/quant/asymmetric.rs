//! The asymmetric correction (GPTAQ, Li et al., 2025): a linear of the quantized model reads `x`, where the float model
//! would read `x̃`, and shall give what the float model gives.
//!
//! GPTQ alone looks for `Ŵ` near W on x. Here the aim is `W x̃`:
//!
//! `Σ |W x̃ − Ŵ x|² = Σ |(W' − Ŵ) x|² + rest`,  `W' = W + W (Σ (x̃ − x) xᵀ) H⁻¹`,  `H = Σ x xᵀ`
//!
//! so that rounding W' under the same Hessian is the whole method: GPTAQ's update by columns is this target, taken to the
//! columns not yet rounded. The Hessian is damped as in GPTQ, and only a part of the way to W' is gone: what the sample
//! says of `x̃ − x` is as much noise as rule, and the whole way loses on other text.

use std::cell::RefCell;
use std::collections::BTreeMap;

use faer::linalg::solvers::{Llt, Solve};
use faer::{Mat, MatRef, Side};

use super::gptq::DAMPING;
use super::hessian::Hessian;
use super::weights::{Columns, FloatLinear};
use crate::backend::{Backend, Emit, Sequences};
use crate::checkpoint::BlockSpec;
use crate::error::Result;
use crate::format::LinearWeights;
use crate::model::{Block, Boundary};
use crate::monitor::Monitor;

/// Share of the way to W'; GPTAQ's own code takes the same.
const STRENGTH: f64 = 0.25;

/// `Σ (x̃ − x) xᵀ` `[cols, cols]`: what the float model's activations have over the quantized model's, seen from one linear.
pub struct Shift(Mat<f64>);

impl Default for Shift {
    fn default() -> Self {
        Self(Mat::new())
    }
}

impl Shift {
    /// Adds tokens: `float` and `quantized` `[tokens, cols]` are what is read.
    pub fn add(&mut self, float: &[f32], quantized: &[f32], cols: usize) {
        let tokens = quantized.len() / cols;
        let x = Mat::from_fn(tokens, cols, |t, c| f64::from(quantized[t * cols + c]));
        let difference = Mat::from_fn(tokens, cols, |t, c| f64::from(float[t * cols + c]) - x[(t, c)]);
        let product = difference.transpose() * &x;
        if self.0.nrows() == 0 { self.0 = product } else { self.0 += product }
    }

    /// The weights to round in place of `float`; `None` where the damped `hessian` is not positive definite.
    pub fn corrected(&self, float: &FloatLinear, hessian: &dyn Hessian) -> Result<Option<FloatLinear>> {
        let (cols, hessian) = (float.weights.cols(), hessian.values()?);
        let damping = DAMPING * (0..cols).map(|c| hessian[c * cols + c]).sum::<f64>() / cols as f64;
        let damped = Mat::from_fn(cols, cols, |i, j| hessian[i * cols + j] + if i == j { damping } else { 0.0 });
        let Ok(factor) = Llt::new(damped.as_ref(), Side::Lower) else { return Ok(None) };
        let lacking = STRENGTH * float.weights.as_ref() * &self.0;
        let correction = factor.solve(lacking.transpose());
        let weights = Columns::from(&(float.weights.as_ref() + correction.transpose()));
        Ok(Some(FloatLinear { weights, bias: float.bias.clone(), changed: true }))
    }
}

/// The float stream `[tokens, hidden]` in the basis that `rotation` Q turns the residual stream into: `h Q`.
pub fn turned<B: Backend>(backend: &B, h: &B::Tensor, rotation: Option<MatRef<'_, f64>>) -> Result<B::Tensor> {
    let Some(rotation) = rotation else { return Ok(h.clone()) };
    let hidden = rotation.nrows();
    let transposed = (0..hidden).flat_map(|r| (0..hidden).map(move |c| rotation[(c, r)] as f32)).collect();
    let turn = backend.prepare(LinearWeights::float(transposed, hidden))?;
    backend.linear(&turn, &backend.emit(h.clone(), Emit::FLOAT)?)
}

/// The shift of each linear of `block` (transformed, in float), by its name: `float` and `quantized` are the two streams in
/// front of it; `rotation` turns the float one into the basis of the quantized one. Routed experts have none, for the two
/// streams send them other tokens.
pub fn shifts<B: Backend>(
    backend: &B,
    spec: &BlockSpec,
    block: &Block<B>,
    (float, quantized): (&Boundary<B>, &Boundary<B>),
    rotation: Option<MatRef<'_, f64>>,
    sequences: &[Sequences],
    monitor: &Monitor,
) -> Result<BTreeMap<String, Shift>> {
    let mut shifts: BTreeMap<String, Shift> = BTreeMap::new();
    for ((float, quantized), sequences) in float.iter(backend).zip(quantized.iter(backend)).zip(sequences) {
        monitor.check()?;
        let read = |h: &B::Tensor| -> Result<BTreeMap<String, Vec<f32>>> {
            let inputs: RefCell<BTreeMap<String, Vec<f32>>> = RefCell::new(BTreeMap::new());
            let tap = |name: &str, x: &B::Activation| {
                if !name.starts_with("experts.") {
                    inputs.borrow_mut().entry(name.to_owned()).or_default().extend(backend.floats(x)?);
                }
                Ok(())
            };
            block.mix(backend, h, sequences, None, Some(&tap))?;
            Ok(inputs.into_inner())
        };
        let (float, quantized) = (read(&turned(backend, &float?, rotation)?)?, read(&quantized?)?);
        for (name, x) in &quantized {
            let cols = spec.linear(name).map_or(1, |linear| linear.cols);
            shifts.entry(name.clone()).or_default().add(&float[name], x, cols);
        }
    }
    Ok(shifts)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::format::Scheme;
    use crate::quant::gptq;
    use crate::quant::hessian::Summed;

    fn random(rows: usize, cols: usize, mut seed: u64) -> Mat<f64> {
        let mut next = || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            f64::from((seed >> 40) as u32) / f64::from(1 << 24) - 0.5
        };
        Mat::from_fn(rows, cols, |_, _| next() + next() + next())
    }

    fn rows(matrix: &Mat<f64>) -> Vec<f32> {
        (0..matrix.nrows()).flat_map(|r| (0..matrix.ncols()).map(move |c| (r, c))).map(|at| matrix[at] as f32).collect()
    }

    #[test]
    fn the_corrected_weights_come_closer_to_what_the_float_model_gives() {
        let (tokens, cols, outputs) = (512, 32, 16);
        let float = random(tokens, cols, 1);
        let quantized = &float * (Mat::<f64>::identity(cols, cols) + 0.03 * random(cols, cols, 2)) + 0.01 * random(tokens, cols, 3);
        let weights = random(outputs, cols, 5);
        let target = &float * weights.transpose();
        let mut shift = Shift::default();
        for half in [0..tokens / 2 * cols, tokens / 2 * cols..tokens * cols] {
            shift.add(&rows(&float)[half.clone()], &rows(&quantized)[half], cols);
        }
        let gram = quantized.transpose() * &quantized;
        let hessian: Vec<f64> = (0..cols * cols).map(|i| gram[(i / cols, i % cols)]).collect();
        let summed = Summed::new(&Cpu, hessian.clone()).unwrap();
        let linear = FloatLinear { weights: Columns::from(&weights), bias: None, changed: false };
        let corrected = shift.corrected(&linear, &summed).unwrap().unwrap();
        let loss = |weights: MatRef<'_, f64>| {
            let found = gptq::quantize(&rows(&weights.to_owned()), outputs, cols, Scheme::Int8, &hessian).0.dequantize();
            let found = Mat::from_fn(outputs, cols, |r, c| f64::from(found[r * cols + c]));
            (&quantized * found.transpose() - &target).squared_norm_l2()
        };
        let ratio = loss(corrected.weights.as_ref()) / loss(weights.as_ref());
        assert!(ratio < 0.7, "{ratio}");
    }

    #[test]
    fn streams_that_are_alike_correct_nothing() {
        let (x, weights) = (random(64, 8, 1), random(4, 8, 2));
        let mut shift = Shift::default();
        shift.add(&rows(&x), &rows(&x), 8);
        let hessian: Vec<f64> = (0..64).map(|i| f64::from(u8::from(i % 9 == 0))).collect();
        let linear = FloatLinear { weights: Columns::from(&weights), bias: None, changed: false };
        let summed = Summed::new(&Cpu, hessian).unwrap();
        assert_eq!(shift.corrected(&linear, &summed).unwrap().unwrap().weights, linear.weights);
    }
}
