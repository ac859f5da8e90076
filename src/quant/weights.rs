//! A block's float weights in memory, to be transformed and then quantized.

use std::collections::BTreeMap;

use faer::{Mat, MatMut, MatRef};
use rayon::prelude::*;

use crate::backend::{Backend, Side, SsmInternals};
use crate::checkpoint::{BlockSpec, Checkpoint, LinearSpec};
use crate::error::{Error, Result};
use crate::format::{LinearWeights, Transform};
use crate::model::BlockSource;

/// Columns, or rows, that one task turns from one order into the other.
const COLUMNS: usize = 32;
/// The columns of a matrix, so many at a time, to be changed at once.
fn divide_columns<T>(mut matrix: MatMut<'_, T>, width: usize) -> Vec<MatMut<'_, T>> {
    let mut parts = Vec::with_capacity(matrix.ncols().div_ceil(width));
    while matrix.ncols() > 0 {
        let count = width.min(matrix.ncols());
        let (first, rest) = matrix.split_at_col_mut(count);
        parts.push(first);
        matrix = rest;
    }
    parts
}

/// The weights `[rows, cols]` of a linear, with its bias.
#[derive(Debug, Clone)]
pub struct FloatLinear {
    pub weights: Mat<f64>,
    pub bias: Option<Vec<f64>>,
    /// Whether a transform changed the weights.
    pub changed: bool,
}

impl FloatLinear {
    /// Reads the linear whose tensors begin with `stem`.
    pub fn read(checkpoint: &Checkpoint, stem: &str, rows: usize, cols: usize, bias: bool) -> Result<Self> {
        let values = checkpoint.read(&format!("{stem}.weight"))?;
        let bias = if bias { Some(checkpoint.read(&format!("{stem}.bias"))?.into_iter().map(f64::from).collect()) } else { None };
        let mut weights = Mat::zeros(rows, cols);
        // A few columns at a time: whole lines of a row are read, and each column is written in order.
        divide_columns(weights.as_mut(), COLUMNS).into_par_iter().enumerate().for_each(|(index, mut columns)| {
            let first = index * COLUMNS;
            for (r, row) in values.chunks_exact(cols).enumerate() {
                for c in 0..columns.ncols() {
                    columns[(r, c)] = f64::from(row[first + c]);
                }
            }
        });
        Ok(Self { weights, bias, changed: false })
    }

    /// The weights in f32, row after row.
    pub fn values(&self) -> Vec<f32> {
        let (rows, cols) = (self.weights.nrows(), self.weights.ncols());
        let mut values = vec![0.0; rows * cols];
        if values.is_empty() {
            return values;
        }
        values.par_chunks_mut(COLUMNS * cols).enumerate().for_each(|(index, tile)| {
            let tile_rows = self.weights.subrows(index * COLUMNS, tile.len() / cols);
            for (c, column) in tile_rows.col_iter().enumerate() {
                for (r, value) in column.iter().enumerate() {
                    tile[r * cols + c] = *value as f32;
                }
            }
        });
        values
    }

    /// `W diag(scale)`: what a linear becomes when the weight of the norm in front of it is folded in.
    pub fn scale_inputs(&mut self, scale: &[f64]) {
        divide_columns(self.weights.as_mut(), 1).into_par_iter().zip(scale).for_each(|(column, scale)| {
            column.col_mut(0).iter_mut().for_each(|weight| *weight *= scale);
        });
        self.changed = true;
    }

    /// `diag(scale) W`, `diag(scale) b`: writes scaled outputs.
    pub fn scale_outputs(&mut self, scale: &[f64]) {
        divide_columns(self.weights.as_mut(), 1).into_par_iter().for_each(|column| {
            column.col_mut(0).iter_mut().zip(scale).for_each(|(weight, scale)| *weight *= scale);
        });
        for (bias, scale) in self.bias.iter_mut().flatten().zip(scale) {
            *bias *= scale;
        }
        self.changed = true;
    }

    /// `W Q`: reads a rotated input.
    pub fn rotate_inputs<B: Backend>(&mut self, backend: &B, rotation: MatRef<'_, f64>) -> Result<()> {
        self.changed = true;
        backend.turn(self.weights.as_mut(), rotation, Side::Inputs)
    }

    /// `Qᵀ W`, `Qᵀ b`: writes a rotated output.
    pub fn rotate_outputs<B: Backend>(&mut self, backend: &B, rotation: MatRef<'_, f64>) -> Result<()> {
        if let Some(bias) = &mut self.bias {
            let rotated = rotation.transpose() * Mat::from_fn(bias.len(), 1, |r, _| bias[r]);
            *bias = (0..bias.len()).map(|r| rotated[(r, 0)]).collect();
        }
        self.changed = true;
        backend.turn(self.weights.as_mut(), rotation, Side::Outputs)
    }

    /// `W H` with H block-diagonal of the orthonormal Hadamard matrix of order `block`.
    pub fn transform_inputs<B: Backend>(&mut self, backend: &B, block: usize) -> Result<()> {
        let (sign, scale) =
            (|i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 }, (block as f64).sqrt().recip());
        let matrix = Mat::from_fn(block, block, |i, j| scale * sign(i, j));
        self.changed = true;
        // One after another: a product is computed on all threads, or on the device.
        divide_columns(self.weights.as_mut(), block).into_iter().try_for_each(|part| backend.turn(part, matrix.as_ref(), Side::Inputs))
    }
}

/// A block's weights.
pub struct BlockWeights {
    /// By name in the mixer. A router is here too, as `gate`.
    pub linears: BTreeMap<String, FloatLinear>,
    /// Float tensors that a transform changed, by canonical name.
    pub tensors: BTreeMap<String, Vec<f64>>,
}

impl BlockWeights {
    /// Reads every linear of a block.
    pub fn read(checkpoint: &Checkpoint, spec: &BlockSpec) -> Result<Self> {
        let mut linears = BTreeMap::new();
        for linear in &spec.linears {
            linears.insert(linear.name.clone(), FloatLinear::read(checkpoint, &linear.stem, linear.rows, linear.cols, linear.bias)?);
        }
        Ok(Self { linears, tensors: BTreeMap::new() })
    }

    /// The linear with this name.
    pub fn linear(&self, name: &str) -> Result<&FloatLinear> {
        self.linears.get(name).ok_or_else(|| Error::run(format!("a block has no linear `{name}`")))
    }

    /// The linear with this name, to be changed.
    pub fn linear_mut(&mut self, name: &str) -> Result<&mut FloatLinear> {
        self.linears.get_mut(name).ok_or_else(|| Error::run(format!("a block has no linear `{name}`")))
    }
}

/// A block of transformed weights in float.
pub struct FloatBlock<'a> {
    pub checkpoint: &'a Checkpoint,
    pub weights: &'a BlockWeights,
    pub transforms: &'a [Transform],
}

impl BlockSource for FloatBlock<'_> {
    fn tensor(&self, name: &str) -> Result<Vec<f32>> {
        match self.weights.tensors.get(name) {
            Some(values) => Ok(values.iter().map(|value| *value as f32).collect()),
            None => self.checkpoint.read(name),
        }
    }

    fn linear(&self, linear: &LinearSpec) -> Result<LinearWeights> {
        let float = self.weights.linear(&linear.name)?;
        let mut weights = LinearWeights::float(float.values(), linear.cols);
        weights.bias = float.bias.as_ref().map(|bias| bias.iter().map(|value| *value as f32).collect());
        weights.hadamard = linear.hadamard(self.transforms);
        Ok(weights)
    }

    fn internals(&self, _: &BlockSpec) -> Result<SsmInternals> {
        Ok(SsmInternals::Float)
    }

    fn rotates_state(&self) -> bool {
        self.transforms.contains(&Transform::RotateState)
    }
}
