//! The selective scan chunk by chunk (the state-space dual form of Mamba-2, Dao & Gu 2024, section 6), with the
//! products of C and B in integers.
//!
//! Inside a chunk, with `e_i` the sum of `dt·A` up to token i:
//! `y_i = exp(e_i)·S C_i + Σ_{j ≤ i} exp(e_i − e_j)·(C_i·B_j)·dt_j·x_j + D·x_i`, and behind it
//! `S ← exp(e_end)·S + Σ_j exp(e_end − e_j)·dt_j·x_j ⊗ B_j`. `C_i·B_j` is a sum of int8 products in int32; the decays,
//! x and the state are floats. A chunk of one token is a decoding step.

use multiversion::multiversion;

use super::projection::{Slice, SliceRows};
use super::{Head, LANES, Parameters};
use crate::backend::cpu::{math, operations};
use crate::backend::{MambaShape, SSM_CHUNK as CHUNK};

/// B and C of every state group, and their products inside each chunk: what the heads of a group share.
pub struct Groups {
    groups: Vec<Group>,
}

struct Group {
    /// Floats `[tokens, state]` that the codes stand for.
    b: Vec<f32>,
    c: Vec<f32>,
    /// `C_i·B_j`, `[tokens, chunk]`: j counts from the beginning of i's chunk, up to i.
    products: Vec<f32>,
}

impl Groups {
    /// From the codes of x | B | C behind the convolution.
    pub fn new(inputs: &Slice, parameters: &Parameters, shape: &MambaShape) -> Self {
        let inputs = inputs.all();
        let tokens = inputs.codes.len() / inputs.width;
        let fixed = parameters.scales(|s| &s.conv_out);
        let matrix = |index: usize| {
            let channels = shape.inner() + index * shape.state..shape.inner() + (index + 1) * shape.state;
            let codes: Vec<i8> = (0..tokens).flat_map(|t| &inputs.row(t)[channels.clone()]).copied().collect();
            let scale = |t| fixed.map_or_else(|| inputs.span_scale(t, shape.heads + index), |scales| scales[channels.start]);
            let scales: Vec<f32> = (0..tokens).map(scale).collect();
            (codes, scales)
        };
        let group = |group| {
            let ((b, b_scales), (c, c_scales)) = (matrix(group), matrix(shape.groups + group));
            let n = shape.state;
            let mut products = vec![0.0; tokens * CHUNK];
            let mut count = 0;
            for (i, row) in products.chunks_exact_mut(CHUNK).enumerate() {
                let start = i - i % CHUNK;
                for (j, product) in (start..=i).zip(row) {
                    let sum = dot(&c[i * n..(i + 1) * n], &b[j * n..(j + 1) * n]);
                    *product = sum as f32 * (c_scales[i] * b_scales[j]);
                }
                count += i + 1 - start;
            }
            operations::count_int8(count * n);
            let floats = |codes: &[i8], scales: &[f32]| -> Vec<f32> {
                let rows = codes.chunks_exact(n).zip(scales);
                rows.flat_map(|(codes, scale)| codes.iter().map(move |code| f32::from(*code) * scale)).collect()
            };
            Group { b: floats(&b, &b_scales), c: floats(&c, &c_scales), products }
        };
        Self { groups: (0..shape.groups).map(group).collect() }
    }
}

/// One head over all tokens; row t of its y begins at `out[t · stride]`. `inputs` are the codes of x | B | C behind the
/// convolution, `dt` those of all heads.
#[allow(clippy::too_many_arguments, reason = "one head's share of everything the scan reads and writes")]
pub fn scan_head(
    inputs: &Slice,
    groups: &Groups,
    dt: &SliceRows<'_>,
    parameters: &Parameters,
    head: Head,
    shape: &MambaShape,
    state: &mut [f32],
    out: &mut [f32],
    stride: usize,
) {
    let inputs = inputs.all();
    let tokens = inputs.codes.len() / inputs.width;
    let group = &groups.groups[head.group];
    let fixed = parameters.scales(|s| &s.conv_out);
    let dt_scale = parameters.scales(|s| &s.dt).map(|scales| scales[head.index]);
    let channels = head.index * shape.head_dim..(head.index + 1) * shape.head_dim;
    let mut chunk = Chunk { x: Vec::new(), dt: Vec::new(), exponent: Vec::new() };
    for start in (0..tokens).step_by(CHUNK) {
        let end = tokens.min(start + CHUNK);
        chunk.clear();
        for t in start..end {
            let raw = f32::from(dt.row(t)[head.index]) * dt_scale.unwrap_or_else(|| dt.span_scale(t, 0));
            let (step, exponent) = head.step(raw, shape);
            let x = &inputs.row(t)[channels.clone()];
            match fixed {
                Some(scales) => chunk.x.extend(x.iter().zip(&scales[channels.clone()]).map(|(code, scale)| f32::from(*code) * scale)),
                None => {
                    let scale = inputs.span_scale(t, head.index);
                    chunk.x.extend(x.iter().map(|code| f32::from(*code) * scale));
                }
            }
            chunk.x.resize(chunk.x.len().next_multiple_of(LANES), 0.0);
            chunk.dt.push(step);
            chunk.exponent.push(chunk.exponent.last().unwrap_or(&0.0) + f64::from(exponent));
        }
        let rows = out[start * stride..].chunks_mut(stride).map(|row| &mut row[..shape.head_dim]);
        let n = shape.state;
        let (b, c) = (&group.b[start * n..end * n], &group.c[start * n..end * n]);
        chunk.run(b, c, &group.products[start * CHUNK..end * CHUNK], state, head.d, rows);
    }
}

/// What one head reads in a chunk.
struct Chunk {
    /// `[tokens, head_dim rounded up to 32]`.
    x: Vec<f32>,
    dt: Vec<f32>,
    /// e: sums of dt·A, in f64 so that differences of large ones are exact enough.
    exponent: Vec<f64>,
}

impl Chunk {
    fn clear(&mut self) {
        self.x.clear();
        self.dt.clear();
        self.exponent.clear();
    }

    /// Writes the chunk's outputs and moves the state on. B and C are `[tokens, state]`.
    fn run<'a>(&self, b: &[f32], c: &[f32], products: &[f32], state: &mut [f32], d: f32, rows: impl Iterator<Item = &'a mut [f32]>) {
        let tokens = self.dt.len();
        let (width, n) = (self.x.len() / tokens, b.len() / tokens);
        let mut weights = [0.0; CHUNK];
        let mut y = vec![0.0; width];
        for ((i, row), products) in rows.take(tokens).enumerate().zip(products.chunks_exact(CHUNK)) {
            let weights = &mut weights[..=i];
            for (j, (weight, product)) in weights.iter_mut().zip(products).enumerate() {
                *weight = product * self.decay(i, j) * self.dt[j];
            }
            read_out(state, &c[i * n..(i + 1) * n], math::exp(self.exponent[i] as f32), &mut y);
            add_rows(&mut y, &self.x, weights);
            for ((out, y), x) in row.iter_mut().zip(&y).zip(&self.x[i * width..]) {
                *out = y + d * x;
            }
        }
        let last = tokens - 1;
        let decay = math::exp(self.exponent[last] as f32);
        for value in state.iter_mut() {
            *value *= decay;
        }
        for j in 0..tokens {
            let weight = self.decay(last, j) * self.dt[j];
            add_outer(state, &self.x[j * width..(j + 1) * width], &b[j * n..(j + 1) * n], weight);
        }
    }

    /// `exp(e_i − e_j)`.
    fn decay(&self, i: usize, j: usize) -> f32 {
        if i == j { 1.0 } else { math::exp((self.exponent[i] - self.exponent[j]) as f32) }
    }
}

/// The inner product of codes.
#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2"))]
fn dot(a: &[i8], b: &[i8]) -> i32 {
    a.iter().zip(b).map(|(a, b)| i32::from(*a) * i32::from(*b)).sum()
}

/// `y = decay · S c`, S being `[width / 32, state, 32]`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn read_out(state: &[f32], c: &[f32], decay: f32, y: &mut [f32]) {
    for (y, state) in y.chunks_exact_mut(LANES).zip(state.chunks_exact(LANES * c.len())) {
        let mut sum = [0.0; LANES];
        for (s, c) in state.as_chunks::<LANES>().0.iter().zip(c) {
            for lane in 0..LANES {
                sum[lane] += s[lane] * c;
            }
        }
        for (y, sum) in y.iter_mut().zip(sum) {
            *y = decay * sum;
        }
    }
}

/// `y += Σ_j weights[j] · x[j]`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn add_rows(y: &mut [f32], x: &[f32], weights: &[f32]) {
    for (row, weight) in x.chunks_exact(y.len()).zip(weights) {
        for (y, x) in y.iter_mut().zip(row) {
            *y += weight * x;
        }
    }
}

/// `S += weight · x ⊗ b`.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn add_outer(state: &mut [f32], x: &[f32], b: &[f32], weight: f32) {
    for (x, state) in x.chunks_exact(LANES).zip(state.chunks_exact_mut(LANES * b.len())) {
        for (s, b) in state.as_chunks_mut::<LANES>().0.iter_mut().zip(b) {
            for (s, x) in s.iter_mut().zip(x) {
                *s += weight * x * b;
            }
        }
    }
}
