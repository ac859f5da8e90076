//! The kernel in plain loops, for any machine: rows are unpacked, and each is then a dot product that compilers
//! turn into vector code.

use half::bf16;

use super::packed::{INT4_BIAS, INT8_BIAS, Scales};
use super::{PANEL, PackedMatrix, QuantizedRows, Tile, Window};

pub(super) fn run(weights: &PackedMatrix, x: &QuantizedRows, window: Window, tile: &mut Tile) {
    let mut row = Vec::new();
    for p in 0..window.panels {
        let panel = window.panel + p;
        for lane in 0..PANEL {
            unpack(weights, panel, lane, &mut row);
            for t in 0..window.tokens {
                let token = window.token + t;
                let (codes, x_scale) = (&x.padded_row(token)[..row.len()], x.scales[token]);
                tile[t * window.panels + p][lane] = match &weights.scales {
                    Scales::Rows(scales) => dot(&row, codes) as f32 * (x_scale * scales[panel * PANEL + lane]),
                    Scales::Groups { group, bits } => {
                        let bits = &bits[panel * (weights.cols() / group)..];
                        let groups = row.chunks_exact(*group).zip(codes.chunks_exact(*group)).zip(bits);
                        let add = |sum, ((row, codes), bits): ((&[i8], &[i8]), &[u16; PANEL])| {
                            sum + dot(row, codes) as f32 * bf16::from_bits(bits[lane]).to_f32()
                        };
                        groups.fold(0.0, add) * x_scale
                    }
                };
            }
        }
    }
}

/// The codes of row `lane` of a panel, in order.
fn unpack(weights: &PackedMatrix, panel: usize, lane: usize, row: &mut Vec<i8>) {
    let blocks = weights.panel(panel);
    let quads = blocks.iter().map(|block| block.0.as_chunks::<4>().0[lane]);
    match weights.scales {
        Scales::Rows(_) => {
            row.resize(4 * blocks.len(), 0);
            for (codes, quad) in row.as_chunks_mut::<4>().0.iter_mut().zip(quads) {
                *codes = quad.map(|byte| byte.wrapping_sub(INT8_BIAS as u8) as i8);
            }
        }
        Scales::Groups { .. } => {
            row.resize(8 * blocks.len(), 0);
            for (codes, quad) in row.as_chunks_mut::<4>().0.chunks_exact_mut(2).zip(quads) {
                codes[0] = quad.map(|byte| (byte & 0x0f) as i8 - INT4_BIAS as i8);
                codes[1] = quad.map(|byte| (byte >> 4) as i8 - INT4_BIAS as i8);
            }
        }
    }
}

fn dot(row: &[i8], codes: &[i8]) -> i32 {
    row.iter().zip(codes).map(|(w, x)| i32::from(*w) * i32::from(*x)).sum()
}
