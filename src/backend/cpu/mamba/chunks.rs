//! The selective scan chunk by chunk (the state-space dual form of Mamba-2, Dao & Gu 2024, section 6), with the
//! products of C and B in integers.
//!
//! Inside a chunk, with `e_i` the sum of `dt·A` up to token i:
//! `y_i = exp(e_i)·S C_i + Σ_{j ≤ i} exp(e_i − e_j)·(C_i·B_j)·dt_j·x_j + D·x_i`, and behind it
//! `S ← exp(e_end)·S + Σ_j exp(e_end − e_j)·dt_j·x_j ⊗ B_j`. `C_i·B_j` is a sum of int8 products in int32; the decays,
//! x and the state are floats. A chunk of one token is a decoding step.

use multiversion::multiversion;

use super::projection::{Slice, SliceRows, Spans};
use super::{Head, LANES, Parameters};
use crate::backend::cpu::{math, operations};
use crate::backend::{MambaShape, SSM_CHUNK as CHUNK};

/// Channels whose sums a loop keeps in registers.
const TILE_LANES: usize = 16;

/// Rows of a tile: tokens that are read out together, or places of the state that move on together.
const TILE_ROWS: usize = 4;

/// What the heads read: x | B | C of every token, and the products of B and C inside each chunk.
pub struct Inputs {
    /// Floats `[tokens, x|B|C]` that the codes stand for.
    values: Vec<f32>,
    /// `C_i·B_j` of each state group, `[tokens, chunk]`: j counts from the beginning of i's chunk, up to i.
    products: Vec<Vec<f32>>,
}

/// The state of a head, `[head_dim / 32 (rounded up), state, 32]`.
pub enum HeadState<'a> {
    /// Moves on to behind the last token.
    Carried(&'a mut [f32]),
    /// Is read only: the tokens are one chunk, and nothing goes on behind them.
    Last(&'a [f32]),
}

impl Inputs {
    /// From the codes of x | B | C behind the convolution.
    pub fn new(inputs: &Slice, parameters: &Parameters, shape: &MambaShape) -> Self {
        let fixed = parameters.scales(|s| &s.conv_out);
        let values = inputs.values(&Spans::conv(shape), fixed);
        let inputs = inputs.all();
        let tokens = inputs.codes.len() / inputs.width;
        let scales = |index: usize| -> Vec<f32> {
            let scale =
                |t| fixed.map_or_else(|| inputs.span_scale(t, shape.heads + index), |scales| scales[shape.inner() + index * shape.state]);
            (0..tokens).map(scale).collect()
        };
        let codes = |index: usize| &inputs.codes[shape.inner() + index * shape.state..];
        let products = |group: usize| {
            let (b, c) = (group, shape.groups + group);
            let mut products = vec![0.0; tokens * CHUNK];
            multiply_codes(codes(b), &scales(b), codes(c), &scales(c), inputs.width, shape.state, &mut products);
            products
        };
        let pairs: usize = (0..tokens).map(|t| t % CHUNK + 1).sum();
        operations::count_int8(shape.groups * pairs * shape.state);
        Self { values, products: (0..shape.groups).map(products).collect() }
    }
}

/// One head over all tokens; row t of its y begins at `out[t · stride]`. `dt` are the codes of all heads.
#[allow(clippy::too_many_arguments, reason = "one head's share of everything the scan reads and writes")]
pub fn scan_head(
    inputs: &Inputs,
    dt: &SliceRows<'_>,
    parameters: &Parameters,
    head: Head,
    shape: &MambaShape,
    mut state: HeadState<'_>,
    out: &mut [f32],
    stride: usize,
) {
    let channels = shape.conv_channels();
    let tokens = inputs.values.len() / channels;
    let dt_scale = parameters.scales(|s| &s.dt).map(|scales| scales[head.index]);
    let x = head.index * shape.head_dim;
    let b = shape.inner() + head.group * shape.state;
    let c = b + shape.groups * shape.state;
    let mut chunk = Chunk { width: shape.head_dim.next_multiple_of(LANES), state: shape.state, ..Chunk::default() };
    for start in (0..tokens).step_by(CHUNK) {
        let end = tokens.min(start + CHUNK);
        chunk.clear();
        for t in start..end {
            let raw = f32::from(dt.row(t)[head.index]) * dt_scale.unwrap_or_else(|| dt.span_scale(t, 0));
            let (step, exponent) = head.step(raw, shape);
            chunk.x.extend_from_slice(&inputs.values[t * channels + x..][..shape.head_dim]);
            chunk.x.resize(chunk.x.len().next_multiple_of(LANES), 0.0);
            chunk.dt.push(step);
            chunk.exponent.push(chunk.exponent.last().unwrap_or(&0.0) + f64::from(exponent));
        }
        let rows = &inputs.values[start * channels..end * channels];
        let before = match &state {
            HeadState::Carried(state) => &**state,
            HeadState::Last(state) => state,
        };
        chunk.read(before, &rows[c..], channels, &inputs.products[head.group][start * CHUNK..end * CHUNK]);
        let out = out[start * stride..].chunks_mut(stride);
        for ((out, y), x) in out.zip(chunk.y.chunks_exact(chunk.width)).zip(chunk.x.chunks_exact(chunk.width)) {
            for ((out, y), x) in out[..shape.head_dim].iter_mut().zip(y).zip(x) {
                *out = y + head.d * x;
            }
        }
        match &mut state {
            HeadState::Carried(state) => chunk.carry(state, &rows[b..], channels),
            HeadState::Last(_) => debug_assert_eq!(end, tokens),
        }
    }
}

/// What one head reads in a chunk, and what comes of it.
#[derive(Default)]
struct Chunk {
    /// head_dim rounded up to 32.
    width: usize,
    /// Places of the state for each channel.
    state: usize,
    /// `[tokens, width]`.
    x: Vec<f32>,
    dt: Vec<f32>,
    /// e: sums of dt·A, in f64 so that differences of large ones are exact enough.
    exponent: Vec<f64>,
    /// Outputs but for D·x, `[tokens, width]`.
    y: Vec<f32>,
}

impl Chunk {
    fn clear(&mut self) {
        self.x.clear();
        self.dt.clear();
        self.exponent.clear();
        self.y.clear();
    }

    /// Computes the outputs. Row t of C begins at `c[t · stride]`; `products` are `[tokens, chunk]`.
    fn read(&mut self, state: &[f32], c: &[f32], stride: usize, products: &[f32]) {
        let decays: Vec<f32> = self.exponent.iter().map(|e| math::exp(*e as f32)).collect();
        self.y.resize(self.x.len(), 0.0);
        read_out(state, self.state, c, stride, &decays, &mut self.y);
        let mut weights = [0.0; CHUNK];
        for (i, (y, products)) in self.y.chunks_exact_mut(self.width).zip(products.chunks_exact(CHUNK)).enumerate() {
            let weights = &mut weights[..=i];
            weights.copy_from_slice(&products[..=i]);
            weigh(weights, self.exponent[i], &self.exponent, &self.dt);
            add_rows(y, &self.x, weights);
        }
    }

    /// Moves the state on. Row t of B begins at `b[t · stride]`. What it leaves in x is of no further use.
    fn carry(&mut self, state: &mut [f32], b: &[f32], stride: usize) {
        let last = self.dt.len() - 1;
        let mut weights = vec![1.0; self.dt.len()];
        weigh(&mut weights, self.exponent[last], &self.exponent, &self.dt);
        for (x, weight) in self.x.chunks_exact_mut(self.width).zip(&weights) {
            for x in x {
                *x *= weight;
            }
        }
        add_outer(state, self.state, math::exp(self.exponent[last] as f32), &self.x, self.width, b, stride);
    }
}

/// `C_i·B_j` of codes, j from the beginning of i's chunk up to i; row t begins at `t · stride`.
#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2"))]
fn multiply_codes(b: &[i8], b_scales: &[f32], c: &[i8], c_scales: &[f32], stride: usize, state: usize, products: &mut [f32]) {
    for (i, row) in products.chunks_exact_mut(CHUNK).enumerate() {
        let start = i - i % CHUNK;
        let c_row = &c[i * stride..][..state];
        for (j, product) in (start..=i).zip(row) {
            let sum: i32 = c_row.iter().zip(&b[j * stride..][..state]).map(|(c, b)| i32::from(*c) * i32::from(*b)).sum();
            *product = sum as f32 * (c_scales[i] * b_scales[j]);
        }
    }
}

/// Multiplies weight j by what token j is worth now: `exp(now − e_j)·dt_j`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn weigh(weights: &mut [f32], now: f64, exponents: &[f64], dt: &[f32]) {
    for ((weight, exponent), dt) in weights.iter_mut().zip(exponents).zip(dt) {
        *weight = *weight * math::exp((now - exponent) as f32) * dt;
    }
}

/// `y_t = decays[t] · S c_t`; row t of C begins at `c[t · stride]`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn read_out(state: &[f32], places: usize, c: &[f32], stride: usize, decays: &[f32], y: &mut [f32]) {
    let width = y.len() / decays.len();
    let whole = decays.len() - decays.len() % TILE_ROWS;
    for (tile, state) in state.as_chunks::<LANES>().0.chunks_exact(places).enumerate() {
        for lane in (0..LANES).step_by(TILE_LANES) {
            let at = tile * LANES + lane;
            for t in (0..whole).step_by(TILE_ROWS) {
                read_tokens::<TILE_ROWS>(state, lane, &c[t * stride..], stride, &decays[t..], &mut y[t * width + at..], width);
            }
            for t in whole..decays.len() {
                read_tokens::<1>(state, lane, &c[t * stride..], stride, &decays[t..], &mut y[t * width + at..], width);
            }
        }
    }
}

/// 16 channels, from `lane`, of the outputs of `T` tokens.
#[inline(always)]
fn read_tokens<const T: usize>(state: &[[f32; LANES]], lane: usize, c: &[f32], stride: usize, decays: &[f32], y: &mut [f32], width: usize) {
    let c: [&[f32]; T] = std::array::from_fn(|t| &c[t * stride..][..state.len()]);
    let mut sums = [[0.0; TILE_LANES]; T];
    for (place, state) in state.iter().enumerate() {
        let state = &state[lane..lane + TILE_LANES];
        for t in 0..T {
            for l in 0..TILE_LANES {
                sums[t][l] += state[l] * c[t][place];
            }
        }
    }
    for t in 0..T {
        for (y, sum) in y[t * width..][..TILE_LANES].iter_mut().zip(sums[t]) {
            *y = decays[t] * sum;
        }
    }
}

/// `y += Σ_j weights[j] · x[j]`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn add_rows(y: &mut [f32], x: &[f32], weights: &[f32]) {
    let width = y.len();
    for (tile, y) in y.as_chunks_mut::<LANES>().0.iter_mut().enumerate() {
        let mut sums = *y;
        for (row, weight) in x.chunks_exact(width).zip(weights) {
            let x = &row[tile * LANES..][..LANES];
            for l in 0..LANES {
                sums[l] += weight * x[l];
            }
        }
        *y = sums;
    }
}

/// `S ← decay·S + Σ_j x_j ⊗ b_j`, x being `[tokens, width]`; row t of B begins at `b[t · stride]`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn add_outer(state: &mut [f32], places: usize, decay: f32, x: &[f32], width: usize, b: &[f32], stride: usize) {
    let whole = places - places % TILE_ROWS;
    for (tile, state) in state.as_chunks_mut::<LANES>().0.chunks_exact_mut(places).enumerate() {
        for lane in (0..LANES).step_by(TILE_LANES) {
            let x = &x[tile * LANES + lane..];
            for place in (0..whole).step_by(TILE_ROWS) {
                add_places::<TILE_ROWS>(&mut state[place..], lane, decay, x, width, &b[place..], stride);
            }
            for place in whole..places {
                add_places::<1>(&mut state[place..], lane, decay, x, width, &b[place..], stride);
            }
        }
    }
}

/// 16 channels, from `lane`, of the first `P` places.
#[inline(always)]
fn add_places<const P: usize>(state: &mut [[f32; LANES]], lane: usize, decay: f32, x: &[f32], width: usize, b: &[f32], stride: usize) {
    let mut sums = [[0.0; TILE_LANES]; P];
    for p in 0..P {
        for l in 0..TILE_LANES {
            sums[p][l] = state[p][lane + l] * decay;
        }
    }
    for (x, b) in x.chunks(width).zip(b.chunks(stride)) {
        let (x, b) = (&x[..TILE_LANES], &b[..P]);
        for p in 0..P {
            for l in 0..TILE_LANES {
                sums[p][l] += x[l] * b[p];
            }
        }
    }
    for p in 0..P {
        state[p][lane..lane + TILE_LANES].copy_from_slice(&sums[p]);
    }
}
