//! Rotations of weights in f64.

use faer::{Mat, MatMut, MatRef};
use rayon::prelude::*;

use crate::backend::Side;

/// Rows of a product that one task takes, and multiplications from which a product is divided at all.
const ROWS: usize = 256;
const DIVIDED: usize = 1 << 28;

/// `W ← W Q` or `W ← Qᵀ W`; large ones row block by row block on all threads.
pub fn turn(mut weights: MatMut<'_, f64>, rotation: MatRef<'_, f64>, side: Side) {
    let (a, b) = match side {
        Side::Inputs => (weights.as_ref(), rotation),
        Side::Outputs => (rotation.transpose(), weights.as_ref()),
    };
    let rows = a.nrows();
    let tile = if rows * a.ncols() * b.ncols() < DIVIDED { rows.max(1) } else { ROWS };
    let starts: Vec<usize> = (0..rows).step_by(tile).collect();
    let blocks: Vec<Mat<f64>> = starts.par_iter().map(|start| a.subrows(*start, tile.min(rows - start)) * b).collect();
    for (start, block) in starts.into_iter().zip(&blocks) {
        weights.as_mut().subrows_mut(start, block.nrows()).copy_from(block);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is divided among threads has the bits of what is not: whether a product is large must not show.
    #[test]
    fn dividing_a_product_changes_nothing() {
        let value = |i: usize, j: usize| ((i * 7919 + j * 104_729) % 2003) as f64 / 1001.5 - 1.0;
        let (weights, rotation) = (Mat::from_fn(2100, 2052, value), Mat::from_fn(2052, 2052, |i, j| value(j + 5, i)));
        let mut turned = weights.clone();
        turn(turned.as_mut(), rotation.as_ref(), Side::Inputs);
        assert!(weights.nrows() * 2052 * 2052 >= DIVIDED);
        assert_eq!(turned, &weights * &rotation);
    }
}
