//! The selective recurrence in float, token by token.

use multiversion::multiversion;

use super::{Head, LANES};
use crate::backend::MambaShape;

/// `S_t = exp(dt·A)·S_{t−1} + dt·x_t ⊗ B_t`, `y_t = S_t C_t + D·x_t` for one head; row t of its y begins at
/// `out[t · stride]`. `projected` is `[tokens, z|x|B|C|dt]`, `xbc` its middle behind convolution and SiLU.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
pub fn scan_head(projected: &[f32], xbc: &[f32], head: Head, shape: &MambaShape, state: &mut [f32], out: &mut [f32], stride: usize) {
    let (width, channels, inner) = (shape.projected(), shape.conv_channels(), shape.inner());
    let n = shape.state;
    for (t, row) in xbc.chunks_exact(channels).enumerate() {
        let (dt, exponent) = head.step(projected[t * width + inner + channels + head.index], shape);
        let decay = exponent.exp();
        let x = &row[head.index * shape.head_dim..(head.index + 1) * shape.head_dim];
        let b = &row[inner + head.group * n..inner + (head.group + 1) * n];
        let c = &row[inner + (shape.groups + head.group) * n..inner + (shape.groups + head.group + 1) * n];
        let y = &mut out[t * stride..t * stride + shape.head_dim];
        for ((y, x), state) in y.chunks_mut(LANES).zip(x.chunks(LANES)).zip(state.chunks_exact_mut(LANES * n)) {
            let mut input = [0.0; LANES];
            for (input, x) in input.iter_mut().zip(x) {
                *input = dt * x;
            }
            let sum = step(state.as_chunks_mut::<LANES>().0, &input, b, c, decay);
            for ((y, sum), x) in y.iter_mut().zip(sum).zip(x) {
                *y = sum + head.d * x;
            }
        }
    }
}

/// Moves the states of 32 channels on by one token and reads them out: `s = decay·s + input·b`, `Σ s·c`.
#[inline(always)]
fn step(state: &mut [[f32; LANES]], input: &[f32; LANES], b: &[f32], c: &[f32], decay: f32) -> [f32; LANES] {
    let mut sum = [0.0; LANES];
    for ((s, b), c) in state.iter_mut().zip(b).zip(c) {
        for lane in 0..LANES {
            s[lane] = s[lane] * decay + input[lane] * b;
            sum[lane] += s[lane] * c;
        }
    }
    sum
}
