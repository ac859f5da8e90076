//! The Mamba-2 scan on the CPU: causal convolution with SiLU, then the selective recurrence, head by head.

use multiversion::multiversion;
use rayon::prelude::*;

use super::math;
use crate::backend::{MambaParameters, MambaShape, Sequences};

/// Channels of a head whose states lie together, so that a state and the read-outs of these channels stay in registers.
const LANES: usize = 32;

/// Products of a sequence above which its heads are divided among threads.
const PARALLEL_PRODUCTS: usize = 1 << 21;

/// Float parameters of a mixer, laid out for the loops below.
pub struct Parameters {
    /// `[kernel, conv_channels]`: a tap of the convolution is one contiguous row.
    taps: Vec<f32>,
    conv_bias: Vec<f32>,
    a: Vec<f32>,
    d: Vec<f32>,
    dt_bias: Vec<f32>,
}

impl Parameters {
    pub fn new(parameters: MambaParameters) -> Self {
        let MambaParameters { conv_weight, conv_bias, a, d, dt_bias } = parameters;
        let channels = conv_bias.len();
        let kernel = conv_weight.len() / channels;
        let taps = (0..kernel).flat_map(|k| (0..channels).map(move |c| c * kernel + k)).map(|at| conv_weight[at]).collect();
        Self { taps, conv_bias, a, d, dt_bias }
    }
}

/// Convolution window and SSM state of some sequences.
pub struct SsmCache {
    sequences: Vec<SequenceState>,
}

#[derive(Clone)]
struct SequenceState {
    /// The last `kernel − 1` inputs of the convolution, oldest first: `[kernel − 1, conv_channels]`.
    window: Vec<f32>,
    /// S of each head, `[head_dim / 32 (rounded up), state, 32]`; lanes beyond head_dim stay 0.
    state: Vec<f32>,
}

/// Floats of one head's state.
fn head_state(shape: &MambaShape) -> usize {
    shape.head_dim.next_multiple_of(LANES) * shape.state
}

impl SequenceState {
    fn empty(shape: &MambaShape) -> Self {
        Self { window: vec![0.0; (shape.kernel - 1) * shape.conv_channels()], state: vec![0.0; shape.heads * head_state(shape)] }
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
    parameters: &Parameters,
    shape: &MambaShape,
    sequences: &Sequences,
    cache: Option<&mut SsmCache>,
) -> Vec<f32> {
    let (inner, width) = (shape.inner(), shape.projected());
    let mut y = vec![0.0; sequences.tokens() * inner];
    let mut rest = y.as_mut_slice();
    let mut work = Vec::with_capacity(sequences.count());
    for range in sequences.ranges() {
        let (own, after) = rest.split_at_mut(range.len() * inner);
        rest = after;
        work.push((&projected[range.start * width..range.end * width], own));
    }
    match cache {
        Some(cache) => {
            let work = work.into_par_iter().zip(&mut cache.sequences);
            work.for_each(|((projected, y), state)| scan_sequence(projected, y, parameters, shape, state));
        }
        None => scan_tree(work, parameters, shape, sequences),
    }
    y
}

/// Whole sequences by their distance from a root, those of one distance in parallel. Only states that a later
/// sequence goes on from are kept.
fn scan_tree(work: Vec<(&[f32], &mut [f32])>, parameters: &Parameters, shape: &MambaShape, sequences: &Sequences) {
    let mut depth: Vec<usize> = Vec::with_capacity(work.len());
    let mut continued = vec![false; work.len()];
    for index in 0..work.len() {
        depth.push(sequences.parent(index).map_or(0, |parent| depth[parent] + 1));
        if let Some(parent) = sequences.parent(index) {
            continued[parent] = true;
        }
    }
    let mut levels = Vec::new();
    for (index, work) in work.into_iter().enumerate() {
        levels.resize_with(levels.len().max(depth[index] + 1), Vec::new);
        levels[depth[index]].push((index, work));
    }
    let mut states: Vec<Option<SequenceState>> = vec![None; depth.len()];
    for level in levels {
        let run = |(index, (projected, y)): (usize, (&[f32], &mut [f32]))| {
            let parent = sequences.parent(index).and_then(|parent| states[parent].as_ref());
            let mut state = parent.map_or_else(|| SequenceState::empty(shape), SequenceState::clone);
            scan_sequence(projected, y, parameters, shape, &mut state);
            continued[index].then_some((index, state))
        };
        let ended: Vec<(usize, SequenceState)> = level.into_par_iter().filter_map(run).collect();
        for (index, state) in ended {
            states[index] = Some(state);
        }
    }
}

/// One sequence. Heads are independent, so they run in parallel when there is enough to do.
fn scan_sequence(projected: &[f32], y: &mut [f32], parameters: &Parameters, shape: &MambaShape, sequence: &mut SequenceState) {
    let tokens = projected.len() / shape.projected();
    let xbc = convolve(projected, parameters, shape, &mut sequence.window);
    let head_state = head_state(shape);
    if tokens * sequence.state.len() < PARALLEL_PRODUCTS {
        for (head, state) in sequence.state.chunks_exact_mut(head_state).enumerate() {
            scan_head(projected, &xbc, parameters, shape, head, state, &mut y[head * shape.head_dim..], shape.inner());
        }
        return;
    }
    let heads: Vec<Vec<f32>> = sequence
        .state
        .par_chunks_exact_mut(head_state)
        .enumerate()
        .map(|(head, state)| {
            let mut out = vec![0.0; tokens * shape.head_dim];
            scan_head(projected, &xbc, parameters, shape, head, state, &mut out, shape.head_dim);
            out
        })
        .collect();
    for (t, row) in y.chunks_exact_mut(shape.inner()).enumerate() {
        for (out, head) in row.chunks_exact_mut(shape.head_dim).zip(&heads) {
            out.copy_from_slice(&head[t * shape.head_dim..(t + 1) * shape.head_dim]);
        }
    }
}

/// `silu(bias + Σ_k weight[c, k] · input[t − kernel + 1 + k, c])` over x | B | C; the window of earlier inputs is
/// read and then moved on. Returns `[tokens, conv_channels]`.
fn convolve(projected: &[f32], parameters: &Parameters, shape: &MambaShape, window: &mut Vec<f32>) -> Vec<f32> {
    let (channels, width, kernel) = (shape.conv_channels(), shape.projected(), shape.kernel);
    let tokens = projected.len() / width;
    let inputs: Vec<&[f32]> = window
        .chunks_exact(channels)
        .chain((0..tokens).map(|t| &projected[t * width + shape.inner()..t * width + shape.inner() + channels]))
        .collect();
    let mut out = Vec::with_capacity(tokens * channels);
    for t in 0..tokens {
        out.extend_from_slice(&parameters.conv_bias);
        convolve_row(&mut out[t * channels..], &parameters.taps, &inputs[t..t + kernel]);
    }
    let kept = inputs[tokens..].concat();
    *window = kept;
    out
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn convolve_row(row: &mut [f32], taps: &[f32], inputs: &[&[f32]]) {
    for (tap, input) in taps.chunks_exact(row.len()).zip(inputs) {
        for ((out, weight), x) in row.iter_mut().zip(tap).zip(*input) {
            *out += weight * x;
        }
    }
    for x in row {
        *x = math::silu(*x);
    }
}

/// `S_t = exp(dt·A)·S_{t−1} + dt·x_t ⊗ B_t`, `y_t = S_t C_t + D·x_t` for one head; row t of its y begins at
/// `out[t · stride]`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn scan_head(
    projected: &[f32],
    xbc: &[f32],
    parameters: &Parameters,
    shape: &MambaShape,
    head: usize,
    state: &mut [f32],
    out: &mut [f32],
    stride: usize,
) {
    let (width, channels, inner) = (shape.projected(), shape.conv_channels(), shape.inner());
    let n = shape.state;
    let group = head / (shape.heads / shape.groups);
    let (a, d, dt_bias) = (parameters.a[head], parameters.d[head], parameters.dt_bias[head]);
    for (t, row) in xbc.chunks_exact(channels).enumerate() {
        let raw = projected[t * width + inner + channels + head];
        let dt = math::softplus(raw + dt_bias).clamp(shape.dt_min, shape.dt_max);
        let decay = (dt * a).exp();
        let x = &row[head * shape.head_dim..(head + 1) * shape.head_dim];
        let b = &row[inner + group * n..inner + (group + 1) * n];
        let c = &row[inner + (shape.groups + group) * n..inner + (shape.groups + group + 1) * n];
        let y = &mut out[t * stride..t * stride + shape.head_dim];
        for ((y, x), state) in y.chunks_mut(LANES).zip(x.chunks(LANES)).zip(state.chunks_exact_mut(LANES * n)) {
            let mut input = [0.0; LANES];
            for (input, x) in input.iter_mut().zip(x) {
                *input = dt * x;
            }
            let sum = step(state.as_chunks_mut::<LANES>().0, &input, b, c, decay);
            for ((y, sum), x) in y.iter_mut().zip(sum).zip(x) {
                *y = sum + d * x;
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
