//! [`PackedMatrix`]: weights laid out for the kernels, as int8 or as int4, which holds 3- and 2-bit codes too.

use half::bf16;
use multiversion::multiversion;
use rayon::prelude::*;

use super::PANEL;
use crate::format::{QuantizedMatrix, Scheme};

/// Added to int8 codes in storage.
pub(super) const INT8_BIAS: i32 = 128;

/// Added to int4 codes in storage.
pub(super) const INT4_BIAS: i32 = 8;

/// One vector of codes, on a cache line of its own. int8: byte `4·row + i` is input `4k + i` of the panel's row,
/// for block k. int4: the low half of byte `4·row + i` is input `8k + i`, the high half is input `8k + 4 + i`.
#[derive(Debug, Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct Block(pub [u8; 64]);

/// Scales in panels; rows that only fill up the last panel have scale 0.
pub(super) enum Scales {
    /// int8: one a row, `[panels, 16]`.
    Rows(Vec<f32>),
    /// int4: one for each `group` inputs of a row, as the bits of a bf16, `[panels, groups, 16]`.
    Groups { group: usize, bits: Vec<[u16; PANEL]> },
}

/// A [`QuantizedMatrix`] in panels of 16 rows.
pub struct PackedMatrix {
    rows: usize,
    cols: usize,
    /// `[panels, blocks_in_panel]`.
    blocks: Vec<Block>,
    blocks_in_panel: usize,
    pub(super) scales: Scales,
}

impl PackedMatrix {
    /// Packs a quantized matrix; groups divide the width.
    pub fn new(matrix: &QuantizedMatrix) -> Self {
        let &QuantizedMatrix { rows, cols, .. } = matrix;
        assert_eq!(matrix.codes.len(), rows * cols, "codes are not [rows, cols]");
        let panels = rows.div_ceil(PANEL);
        let int4 = matches!(matrix.scheme, Scheme::Grouped { .. });
        let inputs_in_block = if int4 { 8 } else { 4 };
        let blocks_in_panel = cols.div_ceil(inputs_in_block);
        let empty = if int4 { (INT4_BIAS * 0x11) as u8 } else { INT8_BIAS as u8 };
        let mut blocks = vec![Block([empty; 64]); panels * blocks_in_panel];
        if cols > 0 {
            let pack = |(panel, blocks): (usize, &mut [Block])| {
                let rows = matrix.codes[panel * PANEL * cols..].chunks_exact(cols).take(PANEL);
                for (lane, row) in rows.enumerate() {
                    for (block, codes) in blocks.iter_mut().zip(row.chunks(inputs_in_block)) {
                        let (first, second) = codes.split_at(codes.len().min(4));
                        let bytes = &mut block.0[4 * lane..4 * lane + 4];
                        for (i, code) in first.iter().enumerate() {
                            let code = i32::from(*code);
                            bytes[i] = if int4 { (code + INT4_BIAS) as u8 | bytes[i] & 0xf0 } else { (code + INT8_BIAS) as u8 };
                        }
                        for (i, code) in second.iter().enumerate() {
                            bytes[i] = bytes[i] & 0x0f | ((i32::from(*code) + INT4_BIAS) as u8) << 4;
                        }
                    }
                }
            };
            blocks.par_chunks_mut(blocks_in_panel).enumerate().for_each(pack);
        }
        Self { rows, cols, blocks, blocks_in_panel, scales: pack_scales(matrix, panels) }
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes that codes and scales take in memory.
    pub fn bytes(&self) -> u64 {
        let scales = match &self.scales {
            Scales::Rows(scales) => size_of_val(scales.as_slice()),
            Scales::Groups { bits, .. } => size_of_val(bits.as_slice()),
        };
        (size_of_val(self.blocks.as_slice()) + scales) as u64
    }

    /// Writes the float weights (code · scale) of rows `first..first + n` to `out` `[n, cols]`.
    pub fn dequantize_into(&self, first: usize, out: &mut [f32]) {
        if out.is_empty() {
            return;
        }
        assert!(out.len().is_multiple_of(self.cols), "the output is not whole rows");
        assert!(first + out.len() / self.cols <= self.rows, "rows out of range");
        let dequantize = |(i, out): (usize, &mut [f32])| {
            let (panel, lane) = ((first + i) / PANEL, (first + i) % PANEL);
            let blocks = self.panel(panel);
            match &self.scales {
                Scales::Rows(scales) => dequantize_int8(blocks, lane, scales[first + i], out),
                Scales::Groups { group, bits } => {
                    let groups = self.cols / group;
                    dequantize_int4(blocks, lane, *group, &bits[panel * groups..(panel + 1) * groups], out);
                }
            }
        };
        // A few panels a task: their cache lines serve 16 rows each.
        out.par_chunks_mut(self.cols).enumerate().with_min_len(4 * PANEL).for_each(dequantize);
    }

    /// Products of the rows from panel `first` on with f32 activations `x` `[tokens, cols]`, into `out` `[rows, tokens]`:
    /// codes become floats in registers, and a scale is multiplied once for all products that share it.
    pub fn few_floats(&self, first: usize, x: &[f32], out: &mut [f32]) {
        let tokens = x.len() / self.cols;
        for (panel, out) in out.chunks_mut(PANEL * tokens).enumerate() {
            let (panel, blocks) = (first + panel, self.panel(first + panel));
            for (token, x) in x.chunks_exact(self.cols).enumerate() {
                let sums = match &self.scales {
                    Scales::Rows(scales) => float_int8(blocks, &scales[panel * PANEL..(panel + 1) * PANEL], x),
                    Scales::Groups { group, bits } => {
                        let groups = self.cols / group;
                        float_int4(blocks, *group, &bits[panel * groups..(panel + 1) * groups], x)
                    }
                };
                for (out, sum) in out.chunks_exact_mut(tokens).zip(sums) {
                    out[token] = sum;
                }
            }
        }
    }

    pub(super) fn panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    /// The blocks of a panel.
    pub(super) fn panel(&self, panel: usize) -> &[Block] {
        &self.blocks[panel * self.blocks_in_panel..(panel + 1) * self.blocks_in_panel]
    }
}

/// Scales `[rows, groups]` put into panels.
fn pack_scales(matrix: &QuantizedMatrix, panels: usize) -> Scales {
    let Scheme::Grouped { group, .. } = matrix.scheme else {
        let mut scales = matrix.scales.clone();
        assert_eq!(scales.len(), matrix.rows, "int8 has one scale a row");
        scales.resize(panels * PANEL, 0.0);
        return Scales::Rows(scales);
    };
    assert!(group.is_multiple_of(32) && matrix.cols.is_multiple_of(group), "groups of {group} do not divide {} inputs", matrix.cols);
    let groups = matrix.cols / group;
    assert_eq!(matrix.scales.len(), matrix.rows * groups, "there is one scale a group");
    let mut bits = vec![[0; PANEL]; panels * groups];
    for (i, scale) in matrix.scales.iter().enumerate() {
        let (row, index) = (i / groups, i % groups);
        let rounded = bf16::from_f32(*scale);
        debug_assert_eq!(rounded.to_f32(), *scale, "group scales are bf16 values");
        bits[row / PANEL * groups + index][row % PANEL] = rounded.to_bits();
    }
    Scales::Groups { group, bits }
}

/// The sums of 16 rows in int8, with a scale each.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn float_int8(blocks: &[Block], scales: &[f32], x: &[f32]) -> [f32; PANEL] {
    let mut sums = [0.0; PANEL];
    let (whole, rest) = x.as_chunks::<4>();
    for (block, x) in blocks.iter().zip(whole) {
        add_quads(&mut sums, block, x, 0, 0xff, INT8_BIAS);
    }
    if !rest.is_empty() {
        let mut x = [0.0; 4];
        x[..rest.len()].copy_from_slice(rest);
        add_quads(&mut sums, &blocks[whole.len()], &x, 0, 0xff, INT8_BIAS);
    }
    for (sum, scale) in sums.iter_mut().zip(scales) {
        *sum *= scale;
    }
    sums
}

/// The sums of 16 rows in int4, with a scale for each group of a row, as the bits of a bf16.
#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn float_int4(blocks: &[Block], group: usize, bits: &[[u16; PANEL]], x: &[f32]) -> [f32; PANEL] {
    let mut sums = [0.0; PANEL];
    for ((blocks, x), bits) in blocks.chunks_exact(group / 8).zip(x.chunks_exact(group)).zip(bits) {
        let mut sums_in_group = [0.0; PANEL];
        for (block, x) in blocks.iter().zip(x.as_chunks::<8>().0) {
            let [a, b, c, d, e, f, g, h] = *x;
            add_quads(&mut sums_in_group, block, &[a, b, c, d], 0, 0x0f, INT4_BIAS);
            add_quads(&mut sums_in_group, block, &[e, f, g, h], 4, 0x0f, INT4_BIAS);
        }
        for ((sum, sum_in_group), bits) in sums.iter_mut().zip(sums_in_group).zip(bits) {
            *sum += sum_in_group * f32::from_bits(u32::from(*bits) << 16);
        }
    }
    sums
}

/// Adds to each row's sum the products of four inputs; a row's codes are bytes of `block`, `shift` bits up, under `mask`.
#[inline(always)]
fn add_quads(sums: &mut [f32; PANEL], block: &Block, x: &[f32; 4], shift: u32, mask: u32, bias: i32) {
    let quads = block.0.as_chunks::<4>().0;
    for (sum, quad) in sums.iter_mut().zip(quads) {
        let quad = u32::from_le_bytes(*quad) >> shift;
        let code = |i: u32| ((quad >> (8 * i) & mask) as i32 - bias) as f32;
        *sum += (code(0) * x[0] + code(1) * x[1]) + (code(2) * x[2] + code(3) * x[3]);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn dequantize_int8(blocks: &[Block], lane: usize, scale: f32, out: &mut [f32]) {
    let (whole, rest) = out.as_chunks_mut::<4>();
    let mut quads = blocks.iter().map(|block| block.0.as_chunks::<4>().0[lane].map(|byte| (i32::from(byte) - INT8_BIAS) as f32 * scale));
    for (out, quad) in whole.iter_mut().zip(&mut quads) {
        *out = quad;
    }
    if let Some(quad) = quads.next() {
        rest.copy_from_slice(&quad[..rest.len()]);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn dequantize_int4(blocks: &[Block], lane: usize, group: usize, bits: &[[u16; PANEL]], out: &mut [f32]) {
    for ((blocks, out), bits) in blocks.chunks_exact(group / 8).zip(out.chunks_exact_mut(group)).zip(bits) {
        let scale = bf16::from_bits(bits[lane]).to_f32();
        for (block, out) in blocks.iter().zip(out.chunks_exact_mut(8)) {
            let bytes = &block.0[4 * lane..4 * lane + 4];
            for (i, byte) in bytes.iter().enumerate() {
                out[i] = (i32::from(byte & 0x0f) - INT4_BIAS) as f32 * scale;
                out[4 + i] = (i32::from(byte >> 4) - INT4_BIAS) as f32 * scale;
            }
        }
    }
}
