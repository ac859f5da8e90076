//! The kernel for AVX2. Codes are widened to 16 bits and multiplied with `vpmaddwd`, which is exact; the byte
//! product of this instruction set saturates.

#![allow(clippy::needless_range_loop, reason = "indices name the place in a tile, and several arrays share them")]

use std::arch::x86_64::{
    __m128i, __m256, __m256i, _mm_loadu_si128, _mm_set1_epi32, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_castsi256_ps,
    _mm256_cvtepi8_epi16, _mm256_cvtepi32_ps, _mm256_cvtepu8_epi16, _mm256_cvtepu16_epi32, _mm256_hadd_epi32, _mm256_loadu_ps,
    _mm256_madd_epi16, _mm256_mul_ps, _mm256_permute4x64_epi64, _mm256_set1_epi16, _mm256_set1_epi32, _mm256_set1_ps, _mm256_setzero_ps,
    _mm256_setzero_si256, _mm256_slli_epi32, _mm256_srli_epi16, _mm256_storeu_ps,
};

use super::packed::{Block, INT4_BIAS, INT8_BIAS, Scales};
use super::{PANEL, PackedMatrix, QuantizedRows, Tile, Window};

/// Sums of the 16 rows of a panel: vector q has rows 4q…4q+3, two partial sums each.
type Partial = [__m256i; 4];

#[target_feature(enable = "avx2")]
pub(super) fn run(weights: &PackedMatrix, x: &QuantizedRows, window: Window, tile: &mut Tile) {
    // `Isa::tile_shape`: one panel for up to 2 tokens.
    debug_assert_eq!(window.panels, 1);
    match (&weights.scales, window.tokens) {
        (Scales::Rows(scales), 2) => int8::<2>(weights, scales, x, window, tile),
        (Scales::Rows(scales), _) => int8::<1>(weights, scales, x, window, tile),
        (Scales::Groups { group, bits }, 2) => int4::<2>(weights, *group, bits, x, window, tile),
        (Scales::Groups { group, bits }, _) => int4::<1>(weights, *group, bits, x, window, tile),
    }
}

#[target_feature(enable = "avx2")]
fn int8<const T: usize>(weights: &PackedMatrix, scales: &[f32], x: &QuantizedRows, window: Window, tile: &mut Tile) {
    let rows = operands::<T>(x, window);
    let mut acc = [[_mm256_setzero_si256(); 4]; T];
    for (k, block) in weights.panel(window.panel).iter().enumerate() {
        let mut codes = [_mm256_setzero_si256(); T];
        for t in 0..T {
            codes[t] = broadcast(rows[t], 4 * k);
        }
        for q in 0..4 {
            let weights = _mm256_cvtepu8_epi16(load(block, q));
            for t in 0..T {
                acc[t][q] = _mm256_add_epi32(acc[t][q], _mm256_madd_epi16(weights, codes[t]));
            }
        }
    }
    let scales = &scales[window.panel * PANEL..][..PANEL];
    for t in 0..T {
        let token = window.token + t;
        let products = finish(acc[t], -INT8_BIAS * x.total(token));
        for (h, products) in products.into_iter().enumerate() {
            // SAFETY: the slice has 16 scales, and h is 0 or 1.
            let scales = unsafe { _mm256_loadu_ps(scales.as_ptr().add(8 * h)) };
            let scale = _mm256_mul_ps(_mm256_set1_ps(x.scales[token]), scales);
            store(&mut tile[t], h, _mm256_mul_ps(products, scale));
        }
    }
}

#[target_feature(enable = "avx2")]
fn int4<const T: usize>(weights: &PackedMatrix, group: usize, bits: &[[u16; PANEL]], x: &QuantizedRows, window: Window, tile: &mut Tile) {
    let rows = operands::<T>(x, window);
    let groups = weights.cols() / group;
    let nibble = _mm256_set1_epi16(0x0f);
    let mut sums = [[_mm256_setzero_ps(); 2]; T];
    for (g, blocks) in weights.panel(window.panel).chunks_exact(group / 8).enumerate() {
        let mut acc = [[_mm256_setzero_si256(); 4]; T];
        for (k, block) in blocks.iter().enumerate() {
            let mut codes = [[_mm256_setzero_si256(); 2]; T];
            for t in 0..T {
                let at = g * group + 8 * k;
                codes[t] = [broadcast(rows[t], at), broadcast(rows[t], at + 4)];
            }
            for q in 0..4 {
                let both = _mm256_cvtepu8_epi16(load(block, q));
                let (low, high) = (_mm256_and_si256(both, nibble), _mm256_srli_epi16::<4>(both));
                for t in 0..T {
                    let products = _mm256_add_epi32(_mm256_madd_epi16(low, codes[t][0]), _mm256_madd_epi16(high, codes[t][1]));
                    acc[t][q] = _mm256_add_epi32(acc[t][q], products);
                }
            }
        }
        let bits = &bits[window.panel * groups + g];
        for t in 0..T {
            let products = finish(acc[t], -INT4_BIAS * x.group_sum(window.token + t, g, group));
            for h in 0..2 {
                sums[t][h] = _mm256_add_ps(sums[t][h], _mm256_mul_ps(products[h], widen(bits, h)));
            }
        }
    }
    for t in 0..T {
        let scale = _mm256_set1_ps(x.scales[window.token + t]);
        for h in 0..2 {
            store(&mut tile[t], h, _mm256_mul_ps(sums[t][h], scale));
        }
    }
}

/// The rows of activations of a window.
fn operands<const T: usize>(x: &QuantizedRows, window: Window) -> [&[i8]; T] {
    std::array::from_fn(|t| x.padded_row(window.token + t))
}

/// Adds up the partial sums and `correction`; rows 0…7 and 8…15 as floats.
#[inline]
#[target_feature(enable = "avx2")]
fn finish(acc: Partial, correction: i32) -> [__m256; 2] {
    let correction = _mm256_set1_epi32(correction);
    // Within each half `hadd` gives rows 0 1 4 5 | 2 3 6 7; the permutation puts them in order.
    let low = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(acc[0], acc[1]));
    let high = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_hadd_epi32(acc[2], acc[3]));
    [_mm256_cvtepi32_ps(_mm256_add_epi32(low, correction)), _mm256_cvtepi32_ps(_mm256_add_epi32(high, correction))]
}

/// Quarter q of a block: 4 bytes of each of 4 rows.
#[inline]
#[target_feature(enable = "avx2")]
fn load(block: &Block, q: usize) -> __m128i {
    debug_assert!(q < 4);
    // SAFETY: a block has 64 bytes, and q is less than 4.
    unsafe { _mm_loadu_si128(block.0.as_ptr().add(16 * q).cast()) }
}

/// Four codes, widened and repeated.
#[inline]
#[target_feature(enable = "avx2")]
fn broadcast(row: &[i8], at: usize) -> __m256i {
    debug_assert!(at + 4 <= row.len());
    // SAFETY: blocks cover no more inputs than the padded row has, so that `at + 4` codes are there.
    let codes = unsafe { row.as_ptr().add(at).cast::<i32>().read_unaligned() };
    _mm256_cvtepi8_epi16(_mm_set1_epi32(codes))
}

/// bf16 to f32 (the bits are the upper half), for rows 8h…8h+7.
#[inline]
#[target_feature(enable = "avx2")]
fn widen(bits: &[u16; PANEL], h: usize) -> __m256 {
    debug_assert!(h < 2);
    // SAFETY: the array has 16 values, and h is 0 or 1.
    let bits = unsafe { _mm_loadu_si128(bits.as_ptr().add(8 * h).cast()) };
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(bits)))
}

/// Writes rows 8h…8h+7.
#[inline]
#[target_feature(enable = "avx2")]
fn store(out: &mut [f32; PANEL], h: usize, values: __m256) {
    debug_assert!(h < 2);
    // SAFETY: the array has room for 16 values, and h is 0 or 1.
    unsafe { _mm256_storeu_ps(out.as_mut_ptr().add(8 * h), values) };
}
