//! A block's float weights in memory, to be transformed and then quantized.

use std::collections::BTreeMap;

use faer::{Mat, MatMut, MatRef};
use rayon::prelude::*;

use crate::backend::{Backend, Side, SsmInternals};
use crate::checkpoint::{BlockSpec, Checkpoint, LinearSpec};
use crate::error::{Error, Result};
use crate::format::{LinearWeights, Transform};
use crate::model::BlockSource;

/// Side of the tiles that are turned from one order into the other: what lies a power of two apart would drive itself out of the
/// cache.
const TILE: usize = 64;
/// Rows whose lengths one task sums up.
const ROWS: usize = 512;

/// The transpose of `from` `[rows, cols]`.
fn transpose<A: Copy + Sync, B: Copy + Default + Send>(from: &[A], rows: usize, cols: usize, convert: impl Fn(A) -> B + Sync) -> Vec<B> {
    let mut to = vec![B::default(); rows * cols];
    to.par_chunks_mut((TILE * rows).max(1)).enumerate().for_each(|(index, to)| {
        let (first, count) = (index * TILE, to.len() / rows);
        let mut tile = [B::default(); TILE * TILE];
        for start in (0..rows).step_by(TILE) {
            let height = TILE.min(rows - start);
            for (r, row) in from[start * cols..].chunks_exact(cols).take(height).enumerate() {
                for (c, value) in row[first..first + count].iter().enumerate() {
                    tile[c * TILE + r] = convert(*value);
                }
            }
            for (column, tile) in to.chunks_exact_mut(rows).zip(tile.chunks_exact(TILE)) {
                column[start..start + height].copy_from_slice(&tile[..height]);
            }
        }
    });
    to
}

/// A matrix `[rows, cols]`, column after column without gaps. Unlike [`Mat`] it is made by all threads: most of the time goes into
/// memory that is touched for the first time.
#[derive(Debug, Clone, PartialEq)]
pub struct Columns {
    values: Vec<f64>,
    rows: usize,
    cols: usize,
}

impl Columns {
    /// Of `values` `[rows, cols]`, row after row.
    fn of_rows(values: &[f32], rows: usize, cols: usize) -> Self {
        Self { values: transpose(values, rows, cols, f64::from), rows, cols }
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    pub fn as_ref(&self) -> MatRef<'_, f64> {
        MatRef::from_column_major_slice(&self.values, self.rows, self.cols)
    }

    fn as_mut(&mut self) -> MatMut<'_, f64> {
        MatMut::from_column_major_slice_mut(&mut self.values, self.rows, self.cols)
    }

    /// One column after another.
    pub fn par_columns(&self) -> impl IndexedParallelIterator<Item = &[f64]> {
        self.values.par_chunks_exact(self.rows.max(1))
    }

    fn par_columns_mut(&mut self) -> impl IndexedParallelIterator<Item = &mut [f64]> {
        self.values.par_chunks_exact_mut(self.rows.max(1))
    }

    /// Euclidean length of each row.
    pub fn row_norms(&self) -> Vec<f64> {
        let mut norms = vec![0.0; self.rows];
        // Some rows of every column at a time, so that what lies side by side is read together; each sum goes from left to right.
        norms.par_chunks_mut(ROWS).enumerate().for_each(|(index, norms)| {
            let first = index * ROWS;
            for column in self.values.chunks_exact(self.rows) {
                let weights = &column[first..first + norms.len()];
                norms.iter_mut().zip(weights).for_each(|(sum, weight)| *sum += weight * weight);
            }
            for sum in norms {
                *sum = sum.sqrt();
            }
        });
        norms
    }
}

impl From<&Mat<f64>> for Columns {
    fn from(matrix: &Mat<f64>) -> Self {
        let values = matrix.col_iter().flat_map(|column| column.iter().copied()).collect();
        Self { values, rows: matrix.nrows(), cols: matrix.ncols() }
    }
}

/// The weights `[rows, cols]` of a linear, with its bias.
#[derive(Debug, Clone)]
pub struct FloatLinear {
    pub weights: Columns,
    pub bias: Option<Vec<f64>>,
    /// Whether a transform changed the weights.
    pub changed: bool,
}

impl FloatLinear {
    /// Reads the linear whose tensors begin with `stem`.
    pub fn read(checkpoint: &Checkpoint, stem: &str, rows: usize, cols: usize, bias: bool) -> Result<Self> {
        let values = checkpoint.read(&format!("{stem}.weight"))?;
        let bias = if bias { Some(checkpoint.read(&format!("{stem}.bias"))?.into_iter().map(f64::from).collect()) } else { None };
        Ok(Self { weights: Columns::of_rows(&values, rows, cols), bias, changed: false })
    }

    /// The weights in f32, row after row.
    pub fn values(&self) -> Vec<f32> {
        transpose(&self.weights.values, self.weights.cols, self.weights.rows, |value| value as f32)
    }

    /// `W diag(scale)`: what a linear becomes when the weight of the norm in front of it is folded in.
    pub fn scale_inputs(&mut self, scale: &[f64]) {
        self.weights.par_columns_mut().zip(scale).for_each(|(column, scale)| {
            for weight in column {
                *weight *= scale;
            }
        });
        self.changed = true;
    }

    /// `diag(scale) W`, `diag(scale) b`: writes scaled outputs.
    pub fn scale_outputs(&mut self, scale: &[f64]) {
        self.weights.par_columns_mut().for_each(|column| {
            column.iter_mut().zip(scale).for_each(|(weight, scale)| *weight *= scale);
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
        let rows = self.weights.rows;
        self.weights.values.chunks_mut((block * rows).max(1)).try_for_each(|part| {
            let width = part.len() / rows;
            backend.turn(MatMut::from_column_major_slice_mut(part, rows, width), matrix.as_ref(), Side::Inputs)
        })
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_and_rows_come_from_one_another() {
        for (rows, cols) in [(1, 1), (70, 33), (33, 70), (1030, 3), (0, 4)] {
            let value = |r: usize, c: usize| ((r * 7919 + c * 104_729) % 2003) as f32 / 1001.5 - 1.0;
            let values: Vec<f32> = (0..rows * cols).map(|i| value(i / cols, i % cols)).collect();
            let linear = FloatLinear { weights: Columns::of_rows(&values, rows, cols), bias: None, changed: false };
            assert_eq!(linear.weights.as_ref(), Mat::from_fn(rows, cols, |r, c| f64::from(value(r, c))));
            assert_eq!(linear.values(), values);
            let norm = |row: &[f32]| row.iter().map(|w| f64::from(*w) * f64::from(*w)).sum::<f64>().sqrt();
            assert_eq!(linear.weights.row_norms(), values.chunks_exact(cols).map(norm).collect::<Vec<f64>>());
        }
    }
}
