//! The Mamba-2 scan on the CPU: causal convolution with SiLU, then the selective recurrence, head by head.

use multiversion::multiversion;
use rayon::prelude::*;

use super::math;
use crate::backend::{MambaParameters, MambaShape, Sequences};

/// Convolution window and SSM state of some sequences.
pub struct SsmCache {
    sequences: Vec<SequenceState>,
}

#[derive(Clone)]
struct SequenceState {
    /// The last `kernel − 1` inputs of the convolution, oldest first: `[kernel − 1, conv_channels]`.
    window: Vec<f32>,
    /// S: `[heads, head_dim, state]`.
    state: Vec<f32>,
}

impl SequenceState {
    fn empty(shape: &MambaShape) -> Self {
        Self { window: vec![0.0; (shape.kernel - 1) * shape.conv_channels()], state: vec![0.0; shape.heads * shape.head_dim * shape.state] }
    }
}

impl SsmCache {
    pub fn new(shape: &MambaShape, sequences: usize) -> Self {
        Self { sequences: vec![SequenceState::empty(shape); sequences] }
    }
}

/// See [`crate::backend::Backend::mamba_scan`]. `projected` is `[tokens, z|x|B|C|dt]`; returns y `[tokens, inner]`.
pub fn scan(
    projected: &[f32],
    parameters: &MambaParameters,
    shape: &MambaShape,
    sequences: &Sequences,
    cache: Option<&mut SsmCache>,
) -> Vec<f32> {
    let (inner, width) = (shape.inner(), shape.projected());
    let mut y = vec![0.0; sequences.tokens() * inner];
    let mut fresh;
    let states = match cache {
        Some(cache) => &mut cache.sequences,
        None => {
            fresh = vec![SequenceState::empty(shape); sequences.count()];
            &mut fresh
        }
    };
    let mut rest = y.as_mut_slice();
    let mut work = Vec::with_capacity(sequences.count());
    for (range, state) in sequences.ranges().zip(states) {
        let (own, after) = rest.split_at_mut(range.len() * inner);
        rest = after;
        work.push((&projected[range.start * width..range.end * width], own, state));
    }
    work.into_par_iter().for_each(|(projected, y, state)| scan_sequence(projected, y, parameters, shape, state));
    y
}

/// One sequence. Heads are independent, so they run in parallel when there is enough to do.
fn scan_sequence(projected: &[f32], y: &mut [f32], parameters: &MambaParameters, shape: &MambaShape, sequence: &mut SequenceState) {
    let width = shape.projected();
    let tokens = projected.len() / width;
    let xbc = convolve(projected, parameters, shape, &mut sequence.window);
    let head_state = shape.head_dim * shape.state;
    let head = |(head, state): (usize, &mut [f32])| {
        let mut out = vec![0.0; tokens * shape.head_dim];
        scan_head(projected, &xbc, parameters, shape, head, state, &mut out);
        out
    };
    let heads: Vec<Vec<f32>> = if tokens * head_state > 1 << 16 {
        sequence.state.par_chunks_mut(head_state).enumerate().map(head).collect()
    } else {
        sequence.state.chunks_mut(head_state).enumerate().map(head).collect()
    };
    for (t, row) in y.chunks_exact_mut(shape.inner()).enumerate() {
        for (out, head) in row.chunks_exact_mut(shape.head_dim).zip(&heads) {
            out.copy_from_slice(&head[t * shape.head_dim..(t + 1) * shape.head_dim]);
        }
    }
}

/// `silu(bias + Σ_k weight[c, k] · input[t − kernel + 1 + k, c])` over x | B | C; the window of earlier inputs is
/// read and then moved on. Returns `[tokens, conv_channels]`.
fn convolve(projected: &[f32], parameters: &MambaParameters, shape: &MambaShape, window: &mut Vec<f32>) -> Vec<f32> {
    let (channels, width, kernel) = (shape.conv_channels(), shape.projected(), shape.kernel);
    let tokens = projected.len() / width;
    let inputs: Vec<&[f32]> = window
        .chunks_exact(channels)
        .chain((0..tokens).map(|t| &projected[t * width + shape.inner()..t * width + shape.inner() + channels]))
        .collect();
    // Transposed weights, so that a tap is one contiguous row.
    let taps: Vec<Vec<f32>> = (0..kernel).map(|k| (0..channels).map(|c| parameters.conv_weight[c * kernel + k]).collect()).collect();
    let mut out = vec![0.0; tokens * channels];
    for (t, row) in out.chunks_exact_mut(channels).enumerate() {
        row.copy_from_slice(&parameters.conv_bias);
        for (tap, input) in taps.iter().zip(&inputs[t..t + kernel]) {
            accumulate(row, tap, input);
        }
        silu_in_place(row);
    }
    let kept = inputs[tokens..].concat();
    *window = kept;
    out
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn accumulate(row: &mut [f32], tap: &[f32], input: &[f32]) {
    for ((out, weight), x) in row.iter_mut().zip(tap).zip(input) {
        *out += weight * x;
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn silu_in_place(row: &mut [f32]) {
    for x in row {
        *x = math::silu(*x);
    }
}

/// `S_t = exp(dt·A)·S_{t−1} + dt·x_t ⊗ B_t`, `y_t = S_t C_t + D·x_t` for one head; `state` is `[head_dim, state]`,
/// `out` `[tokens, head_dim]`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn scan_head(
    projected: &[f32],
    xbc: &[f32],
    parameters: &MambaParameters,
    shape: &MambaShape,
    head: usize,
    state: &mut [f32],
    out: &mut [f32],
) {
    let (width, channels, inner) = (shape.projected(), shape.conv_channels(), shape.inner());
    let n = shape.state;
    let group = head / (shape.heads / shape.groups);
    let (a, d, dt_bias) = (parameters.a[head], parameters.d[head], parameters.dt_bias[head]);
    for (t, y) in out.chunks_exact_mut(shape.head_dim).enumerate() {
        let raw = projected[t * width + inner + channels + head];
        let dt = math::softplus(raw + dt_bias).clamp(shape.dt_min, shape.dt_max);
        let decay = (dt * a).exp();
        let row = &xbc[t * channels..(t + 1) * channels];
        let x = &row[head * shape.head_dim..(head + 1) * shape.head_dim];
        let b = &row[inner + group * n..inner + (group + 1) * n];
        let c = &row[inner + (shape.groups + group) * n..inner + (shape.groups + group + 1) * n];
        for ((y, x), s) in y.iter_mut().zip(x).zip(state.chunks_exact_mut(n)) {
            let input = dt * x;
            for (s, b) in s.iter_mut().zip(b) {
                *s = *s * decay + input * b;
            }
            *y = math::dot(s, c) + d * x;
        }
    }
}
