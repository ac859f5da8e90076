//! Rotations of the host's weights in f64 by the device's library. Without one the host multiplies.

use faer::{MatMut, MatRef};
use rayon::prelude::*;

use super::Cuda;
use super::device::{Buffer, Element, Gemm};
use crate::backend::{Side, cpu};
use crate::error::Result;

/// Outputs of weights whose inputs are turned at once: a table of a vocabulary does not fit beside what else is there.
pub(super) const OUTPUTS: usize = 1 << 15;

impl Cuda {
    /// See [`crate::backend::Backend::turn`].
    pub(super) fn turn_weights(&self, mut weights: MatMut<'_, f64>, rotation: MatRef<'_, f64>, side: Side) -> Result<()> {
        if weights.row_stride() != 1 || rotation.row_stride() != 1 {
            cpu::turn::turn(weights, rotation, side);
            return Ok(());
        }
        let turn = self.upload_columns(rotation)?;
        let tile = if side == Side::Inputs { OUTPUTS } else { weights.nrows().max(1) };
        for start in (0..weights.nrows()).step_by(tile) {
            let count = tile.min(weights.nrows() - start);
            self.turn_some(weights.as_mut().subrows_mut(start, count), rotation, &turn, side)?;
        }
        Ok(())
    }

    fn turn_some(&self, mut weights: MatMut<'_, f64>, rotation: MatRef<'_, f64>, turn: &Buffer, side: Side) -> Result<()> {
        let (rows, cols, width) = (weights.nrows(), weights.ncols(), rotation.nrows());
        let (from, out) = (self.upload_columns(weights.as_ref())?, self.buffer::<f64>(rows * cols)?);
        // Columns one after another are the rows of the transposed matrix: (W Q)ᵀ = Qᵀ Wᵀ, (Qᵀ W)ᵀ = Wᵀ Q.
        let (from, turn) = ((from.address(), rows), (turn.address(), width));
        let (a, b) = if side == Side::Inputs { (turn, from) } else { (from, turn) };
        let gemm = Gemm {
            element: Element::F64,
            m: cols,
            n: rows,
            k: width,
            a,
            b,
            c: (out.address(), rows),
            alpha: 1.0,
            beta: 0.0,
            a_transposed: false,
            b_transposed: side == Side::Inputs,
        };
        // SAFETY: the buffers were allocated for these shapes.
        if unsafe { self.device().gemm(&gemm)? } {
            return download_columns(&out, weights);
        }
        cpu::turn::turn(weights.as_mut(), rotation, side);
        Ok(())
    }

    /// A matrix whose columns are contiguous, column after column.
    fn upload_columns(&self, matrix: MatRef<'_, f64>) -> Result<Buffer> {
        let (rows, cols) = (matrix.nrows(), matrix.ncols());
        let buffer = self.buffer::<f64>(rows * cols)?;
        if matrix.col_stride() == rows.cast_signed() {
            // SAFETY: neither within a column nor between columns is there a gap.
            buffer.upload(unsafe { std::slice::from_raw_parts(matrix.as_ptr(), rows * cols) })?;
            return Ok(buffer);
        }
        // Gathered first: small copies, each waited for, take longer.
        let mut gathered = vec![0.0; rows * cols];
        gathered.par_chunks_exact_mut(rows).enumerate().for_each(|(index, to)| {
            to.iter_mut().zip(matrix.col(index).iter()).for_each(|(to, from)| *to = *from);
        });
        buffer.upload(&gathered)?;
        Ok(buffer)
    }
}

/// The reverse.
fn download_columns(buffer: &Buffer, mut matrix: MatMut<'_, f64>) -> Result<()> {
    let (rows, cols) = (matrix.nrows(), matrix.ncols());
    if matrix.col_stride() == rows.cast_signed() {
        // SAFETY: neither within a column nor between columns is there a gap.
        return buffer.download_at(0, unsafe { std::slice::from_raw_parts_mut(matrix.as_ptr_mut(), rows * cols) });
    }
    let gathered = buffer.download::<f64>(rows * cols)?;
    let columns: Vec<_> = matrix.as_mut().col_iter_mut().collect();
    columns.into_par_iter().zip(gathered.par_chunks_exact(rows)).for_each(|(to, from)| {
        to.iter_mut().zip(from).for_each(|(to, from)| *to = *from);
    });
    Ok(())
}
