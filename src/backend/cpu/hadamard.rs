//! Fast Walsh-Hadamard transform of blocks of features.

use multiversion::multiversion;
use rayon::prelude::*;

/// Values whose sums and differences stay in registers.
const LANES: usize = 16;

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
    let (tiles, rest) = block.as_chunks_mut::<LANES>();
    let mut half = LANES;
    if rest.is_empty() {
        for tile in tiles {
            butterflies::<1>(tile);
            butterflies::<2>(tile);
            butterflies::<4>(tile);
            butterflies::<8>(tile);
        }
    } else {
        half = 1;
    }
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

/// Sums and differences of values `HALF` apart, in registers.
#[inline(always)]
fn butterflies<const HALF: usize>(tile: &mut [f32; LANES]) {
    let other: [f32; LANES] = std::array::from_fn(|i| tile[i ^ HALF]);
    for i in 0..LANES {
        tile[i] = if i & HALF == 0 { tile[i] + other[i] } else { other[i] - tile[i] };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_width_agrees_with_the_plain_butterflies_to_the_bit() {
        for log in 0..10 {
            let mut row: Vec<f32> = (0..1 << log).map(|i| (i as f32 * 0.37).sin()).collect();
            let mut expected = row.clone();
            for stage in 0..log {
                for i in (0..row.len()).filter(|i| i >> stage & 1 == 0) {
                    let (a, b) = (expected[i], expected[i | 1 << stage]);
                    (expected[i], expected[i | 1 << stage]) = (a + b, a - b);
                }
            }
            let scale = 1.0 / (row.len() as f32).sqrt();
            transform_blocks(&mut row, 1 << log);
            assert_eq!(row, expected.iter().map(|x| x * scale).collect::<Vec<_>>());
        }
    }

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
