//! The kernel in plain loops, for any machine.

use half::bf16;

use super::packed::{Block, INT4_BIAS, INT8_BIAS, Scales};
use super::{PANEL, PackedMatrix, QuantizedRows, Tile, Window};

pub(super) fn run(weights: &PackedMatrix, x: &QuantizedRows, window: Window, tile: &mut Tile) {
    for t in 0..window.tokens {
        let token = window.token + t;
        let (codes, x_scale) = (x.padded_row(token), x.scales[token]);
        for p in 0..window.panels {
            let panel = window.panel + p;
            let (blocks, out) = (weights.panel(panel), &mut tile[t * window.panels + p]);
            match &weights.scales {
                Scales::Rows(scales) => {
                    let mut acc = [0; PANEL];
                    for (block, codes) in blocks.iter().zip(codes.chunks_exact(4)) {
                        add_products(&mut acc, codes, |i| i32::from(block.0[i]) - INT8_BIAS);
                    }
                    for ((out, acc), scale) in out.iter_mut().zip(acc).zip(&scales[panel * PANEL..]) {
                        *out = acc as f32 * (x_scale * scale);
                    }
                }
                Scales::Groups { group, bits } => {
                    *out = [0.0; PANEL];
                    let bits = &bits[panel * (weights.cols() / group)..];
                    for ((blocks, codes), bits) in blocks.chunks_exact(group / 8).zip(codes.chunks_exact(*group)).zip(bits) {
                        for ((out, acc), bits) in out.iter_mut().zip(group_products(blocks, codes)).zip(bits) {
                            *out += acc as f32 * bf16::from_bits(*bits).to_f32();
                        }
                    }
                    out.iter_mut().for_each(|out| *out *= x_scale);
                }
            }
        }
    }
}

/// Dot products of one group of int4 codes.
fn group_products(blocks: &[Block], codes: &[i8]) -> [i32; PANEL] {
    let mut acc = [0; PANEL];
    for (block, codes) in blocks.iter().zip(codes.chunks_exact(8)) {
        add_products(&mut acc, &codes[..4], |i| i32::from(block.0[i] & 0x0f) - INT4_BIAS);
        add_products(&mut acc, &codes[4..], |i| i32::from(block.0[i] >> 4) - INT4_BIAS);
    }
    acc
}

/// Adds the products of 4 inputs to each of 16 sums; `weight(4·row + i)` is the code of input i.
#[inline]
fn add_products(acc: &mut [i32; PANEL], codes: &[i8], weight: impl Fn(usize) -> i32) {
    for (row, acc) in acc.iter_mut().enumerate() {
        *acc += codes.iter().enumerate().map(|(i, code)| weight(4 * row + i) * i32::from(*code)).sum::<i32>();
    }
}
