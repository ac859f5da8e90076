//! Fast Walsh-Hadamard transform of blocks of features.

use multiversion::multiversion;
use rayon::prelude::*;

/// Transforms each block of `block` features (a power of two) of each row of `cols` by the orthonormal Hadamard matrix
/// in Sylvester's order, which is its own inverse.
pub fn transform_rows(values: &mut [f32], cols: usize, block: usize) {
    debug_assert!(block.is_power_of_two() && cols.is_multiple_of(block));
    values.par_chunks_mut(cols).with_min_len(16).for_each(|row| transform_blocks(row, block));
}

/// Transforms each block of `block` values.
pub fn transform_blocks(values: &mut [f32], block: usize) {
    values.chunks_exact_mut(block).for_each(transform);
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn transform(block: &mut [f32]) {
    let mut half = 1;
    while half < block.len() {
        for pair in block.chunks_exact_mut(2 * half) {
            let (low, high) = pair.split_at_mut(half);
            for (a, b) in low.iter_mut().zip(high) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
    let scale = 1.0 / (block.len() as f32).sqrt();
    for value in block {
        *value *= scale;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twice_is_the_identity_and_the_matrix_is_sylvesters() {
        let mut row: Vec<f32> = (0..256).map(|i| (i as f32 * 0.37).sin()).collect();
        let before = row.clone();
        transform_rows(&mut row, 256, 128);
        transform_rows(&mut row, 256, 128);
        assert!(row.iter().zip(&before).all(|(a, b)| (a - b).abs() < 1e-6));
        let mut unit = vec![0.0, 1.0, 0.0, 0.0];
        transform_rows(&mut unit, 4, 4);
        assert_eq!(unit, [0.5, -0.5, 0.5, -0.5]);
    }
}
