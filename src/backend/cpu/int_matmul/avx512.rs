//! The kernel for AVX-512 with VNNI: `vpdpbusd` adds 4 products of unsigned and signed bytes to each of 16 sums.

#![allow(clippy::needless_range_loop, reason = "indices name the place in a tile, and several arrays share them")]

use std::arch::x86_64::{
    __m512, __m512i, _mm256_loadu_si256, _mm512_add_ps, _mm512_and_si512, _mm512_castsi512_ps, _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32,
    _mm512_dpbusd_epi32, _mm512_load_si512, _mm512_loadu_ps, _mm512_mul_ps, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setzero_ps, _mm512_setzero_si512, _mm512_slli_epi32, _mm512_srli_epi16, _mm512_storeu_ps,
};

use super::packed::{Block, INT4_BIAS, INT8_BIAS, Scales};
use super::{PANEL, PackedMatrix, QuantizedRows, Tile, Window};

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
pub(super) fn run(weights: &PackedMatrix, x: &QuantizedRows, window: Window, tile: &mut Tile) {
    // `Isa::tile_shape`: 4 panels for one token, else 2 for up to 8 tokens; fewer at the edges.
    match (window.tokens, window.panels) {
        (1, 4) => shaped::<1, 4>(weights, x, window, tile),
        (1, 3) => shaped::<1, 3>(weights, x, window, tile),
        (1, 2) => shaped::<1, 2>(weights, x, window, tile),
        (2, 2) => shaped::<2, 2>(weights, x, window, tile),
        (3, 2) => shaped::<3, 2>(weights, x, window, tile),
        (4, 2) => shaped::<4, 2>(weights, x, window, tile),
        (5, 2) => shaped::<5, 2>(weights, x, window, tile),
        (6, 2) => shaped::<6, 2>(weights, x, window, tile),
        (7, 2) => shaped::<7, 2>(weights, x, window, tile),
        (8, 2) => shaped::<8, 2>(weights, x, window, tile),
        (8, 1) => shaped::<8, 1>(weights, x, window, tile),
        (tokens, panels) => {
            debug_assert_eq!(panels, 1);
            for t in 0..tokens {
                let mut one = [[0.0; PANEL]; super::TILE];
                shaped::<1, 1>(weights, x, Window { token: window.token + t, tokens: 1, ..window }, &mut one);
                tile[t] = one[0];
            }
        }
    }
}

/// Computes `T` tokens × `P` panels.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn shaped<const T: usize, const P: usize>(weights: &PackedMatrix, x: &QuantizedRows, window: Window, tile: &mut Tile) {
    debug_assert_eq!((window.tokens, window.panels), (T, P));
    match &weights.scales {
        Scales::Rows(scales) => int8::<T, P>(weights, scales, x, window, tile),
        Scales::Groups { group, bits } => int4::<T, P>(weights, *group, bits, x, window, tile),
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn int8<const T: usize, const P: usize>(weights: &PackedMatrix, scales: &[f32], x: &QuantizedRows, window: Window, tile: &mut Tile) {
    let (panels, rows) = operands::<T, P>(weights, x, window);
    let mut acc = [[_mm512_setzero_si512(); P]; T];
    for t in 0..T {
        acc[t] = [_mm512_set1_epi32(-INT8_BIAS * x.total(window.token + t)); P];
    }
    for k in 0..weights.cols().div_ceil(4) {
        let mut codes = [_mm512_setzero_si512(); P];
        for p in 0..P {
            // SAFETY: a panel has a block for each 4 inputs.
            codes[p] = unsafe { load(panels[p], k) };
        }
        for t in 0..T {
            // SAFETY: a row of activations is padded to whole fours.
            let x = unsafe { broadcast(rows[t], 4 * k) };
            for p in 0..P {
                acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], codes[p], x);
            }
        }
    }
    for p in 0..P {
        let scales = &scales[(window.panel + p) * PANEL..][..PANEL];
        // SAFETY: the slice has 16 scales.
        let scales = unsafe { _mm512_loadu_ps(scales.as_ptr()) };
        for t in 0..T {
            let scale = _mm512_mul_ps(_mm512_set1_ps(x.scales[window.token + t]), scales);
            store(&mut tile[t * P + p], _mm512_mul_ps(_mm512_cvtepi32_ps(acc[t][p]), scale));
        }
    }
}

#[target_feature(enable = "avx512f,avx512bw,avx512vnni")]
fn int4<const T: usize, const P: usize>(
    weights: &PackedMatrix,
    group: usize,
    bits: &[[u16; PANEL]],
    x: &QuantizedRows,
    window: Window,
    tile: &mut Tile,
) {
    let (panels, rows) = operands::<T, P>(weights, x, window);
    let (groups, blocks) = (weights.cols() / group, group / 8);
    let nibble = _mm512_set1_epi8(0x0f);
    let mut sums = [[_mm512_setzero_ps(); P]; T];
    for g in 0..groups {
        let mut acc = [[_mm512_setzero_si512(); P]; T];
        for t in 0..T {
            acc[t] = [_mm512_set1_epi32(-INT4_BIAS * x.group_sum(window.token + t, g, group)); P];
        }
        for k in g * blocks..(g + 1) * blocks {
            let mut low = [_mm512_setzero_si512(); P];
            let mut high = [_mm512_setzero_si512(); P];
            for p in 0..P {
                // SAFETY: a panel has a block for each 8 inputs.
                let codes = unsafe { load(panels[p], k) };
                low[p] = _mm512_and_si512(codes, nibble);
                high[p] = _mm512_and_si512(_mm512_srli_epi16::<4>(codes), nibble);
            }
            for t in 0..T {
                // SAFETY: a row of activations has the inputs of every block.
                let (first, second) = unsafe { (broadcast(rows[t], 8 * k), broadcast(rows[t], 8 * k + 4)) };
                for p in 0..P {
                    acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], low[p], first);
                    acc[t][p] = _mm512_dpbusd_epi32(acc[t][p], high[p], second);
                }
            }
        }
        for p in 0..P {
            let scales = widen(&bits[(window.panel + p) * groups + g]);
            for t in 0..T {
                sums[t][p] = _mm512_add_ps(sums[t][p], _mm512_mul_ps(_mm512_cvtepi32_ps(acc[t][p]), scales));
            }
        }
    }
    for t in 0..T {
        let scale = _mm512_set1_ps(x.scales[window.token + t]);
        for p in 0..P {
            store(&mut tile[t * P + p], _mm512_mul_ps(sums[t][p], scale));
        }
    }
}

/// Where the panels and the rows of activations of a window begin.
fn operands<const T: usize, const P: usize>(
    weights: &PackedMatrix,
    x: &QuantizedRows,
    window: Window,
) -> ([*const Block; P], [*const i8; T]) {
    let panels = std::array::from_fn(|p| weights.panel(window.panel + p).as_ptr());
    let rows = std::array::from_fn(|t| x.padded_row(window.token + t).as_ptr());
    (panels, rows)
}

/// # Safety
/// The panel has a block k.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn load(panel: *const Block, k: usize) -> __m512i {
    // SAFETY: the caller's promise; blocks are aligned to 64 bytes.
    unsafe { _mm512_load_si512(panel.add(k).cast()) }
}

/// Four codes, repeated.
///
/// # Safety
/// The row has at least `at + 4` codes.
#[inline]
#[target_feature(enable = "avx512f")]
unsafe fn broadcast(row: *const i8, at: usize) -> __m512i {
    // SAFETY: the caller's promise.
    _mm512_set1_epi32(unsafe { row.add(at).cast::<i32>().read_unaligned() })
}

/// bf16 to f32: the bits are the upper half.
#[inline]
#[target_feature(enable = "avx512f")]
fn widen(bits: &[u16; PANEL]) -> __m512 {
    // SAFETY: the array has 16 values.
    let bits = unsafe { _mm256_loadu_si256(bits.as_ptr().cast()) };
    _mm512_castsi512_ps(_mm512_slli_epi32::<16>(_mm512_cvtepu16_epi32(bits)))
}

#[inline]
#[target_feature(enable = "avx512f")]
fn store(out: &mut [f32; PANEL], values: __m512) {
    // SAFETY: the array has room for 16 values.
    unsafe { _mm512_storeu_ps(out.as_mut_ptr(), values) };
}
