//! The kernel in plain loops, for any machine.

use half::bf16;

use super::packed::{Block, INT4_BIAS, INT8_BIAS, Scales};
use super::{PANEL, PackedMatrix, QuantizedRows, Tile, Window};

/// Sums of 4 rows, one for each of 4 inputs: the shape that compilers turn into vectors.
type Partial = [i32; 16];

pub(super) fn run(weights: &PackedMatrix, x: &QuantizedRows, window: Window, tile: &mut Tile) {
    for t in 0..window.tokens {
        let token = window.token + t;
        let (codes, x_scale) = (x.padded_row(token), x.scales[token]);
        for p in 0..window.panels {
            let panel = window.panel + p;
            let (blocks, out) = (weights.panel(panel), &mut tile[t * window.panels + p]);
            match &weights.scales {
                Scales::Rows(scales) => {
                    let products = int8_products(blocks, codes);
                    for ((out, acc), scale) in out.iter_mut().zip(products).zip(&scales[panel * PANEL..]) {
                        *out = acc as f32 * (x_scale * scale);
                    }
                }
                Scales::Groups { group, bits } => {
                    *out = [0.0; PANEL];
                    let bits = &bits[panel * (weights.cols() / group)..];
                    for ((blocks, codes), bits) in blocks.chunks_exact(group / 8).zip(codes.chunks_exact(*group)).zip(bits) {
                        for ((out, acc), bits) in out.iter_mut().zip(int4_products(blocks, codes)).zip(bits) {
                            *out += acc as f32 * bf16::from_bits(*bits).to_f32();
                        }
                    }
                    for out in out {
                        *out *= x_scale;
                    }
                }
            }
        }
    }
}

fn int8_products(blocks: &[Block], codes: &[i8]) -> [i32; PANEL] {
    let mut acc = [0; PANEL];
    for (q, acc) in acc.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut partial = [0; 16];
        for (block, codes) in blocks.iter().zip(codes.as_chunks::<4>().0) {
            let bytes = &block.0.as_chunks::<16>().0[q];
            add_products(&mut partial, &bytes.map(|byte| i16::from(byte) - INT8_BIAS as i16), *codes);
        }
        *acc = finish(&partial);
    }
    acc
}

/// Dot products of one group.
fn int4_products(blocks: &[Block], codes: &[i8]) -> [i32; PANEL] {
    let mut acc = [0; PANEL];
    for (q, acc) in acc.as_chunks_mut::<4>().0.iter_mut().enumerate() {
        let mut partial = [0; 16];
        for (block, codes) in blocks.iter().zip(codes.as_chunks::<8>().0) {
            let bytes = &block.0.as_chunks::<16>().0[q];
            let [a, b, c, d, e, f, g, h] = *codes;
            add_products(&mut partial, &bytes.map(|byte| i16::from(byte & 0x0f) - INT4_BIAS as i16), [a, b, c, d]);
            add_products(&mut partial, &bytes.map(|byte| i16::from(byte >> 4) - INT4_BIAS as i16), [e, f, g, h]);
        }
        *acc = finish(&partial);
    }
    acc
}

/// Adds the products of 4 rows × 4 inputs; each fits 16 bits (at most 127²).
#[inline]
fn add_products(partial: &mut Partial, weights: &[i16; 16], codes: [i8; 4]) {
    for i in 0..16 {
        partial[i] += i32::from(weights[i] * i16::from(codes[i % 4]));
    }
}

fn finish(partial: &Partial) -> [i32; 4] {
    let mut rows = [0; 4];
    for (row, inputs) in rows.iter_mut().zip(partial.as_chunks::<4>().0) {
        *row = inputs.iter().sum();
    }
    rows
}
