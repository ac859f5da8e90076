//! The causal depthwise convolution with SiLU, in float and in integers.

use multiversion::multiversion;

use super::projection::{SliceRows, Spans};
use crate::backend::cpu::{math, operations};
use crate::backend::{MambaParameters, MambaShape, SsmInternals};

/// Weights of the convolution; a tap is one contiguous row.
pub struct Convolution {
    /// `[kernel, channels]`.
    taps: Vec<f32>,
    /// The same as int8, empty with float internals.
    tap_codes: Vec<i8>,
    /// `[channels]`: what an int8 sum is multiplied by, the weight's scale times the static scale of the input if there
    /// is one. Empty with float internals.
    scales: Vec<f32>,
    bias: Vec<f32>,
}

impl Convolution {
    pub fn new(parameters: &MambaParameters) -> Self {
        let channels = parameters.conv_bias.len();
        let kernel = parameters.conv_weight.len() / channels;
        let order = || (0..kernel).flat_map(|k| (0..channels).map(move |c| c * kernel + k));
        let (mut tap_codes, mut scales) = (Vec::new(), Vec::new());
        if parameters.internals != SsmInternals::Float {
            let quantized = parameters.conv_codes();
            tap_codes = order().map(|at| quantized.codes[at]).collect();
            scales = quantized.scales;
            if let SsmInternals::Int8Static(fixed) = &parameters.internals {
                scales.iter_mut().zip(&fixed.conv_in).for_each(|(weight, input)| *weight *= input);
            }
        }
        Self { taps: order().map(|at| parameters.conv_weight[at]).collect(), tap_codes, scales, bias: parameters.conv_bias.clone() }
    }

    /// `silu(bias + Σ_k weight[c, k] · input[t − kernel + 1 + k, c])` over x | B | C of `projected`; `window` holds the
    /// `kernel − 1` inputs before. Returns `[tokens, conv_channels]` and the next window.
    pub fn float(&self, projected: &[f32], shape: &MambaShape, window: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let (channels, width, kernel) = (shape.conv_channels(), shape.projected(), shape.kernel);
        let tokens = projected.len() / width;
        let inputs: Vec<&[f32]> = window
            .chunks_exact(channels)
            .chain((0..tokens).map(|t| &projected[t * width + shape.inner()..t * width + shape.inner() + channels]))
            .collect();
        operations::count_float(tokens * channels * kernel);
        let mut out = Vec::with_capacity(tokens * channels);
        for t in 0..tokens {
            out.extend_from_slice(&self.bias);
            convolve_row(&mut out[t * channels..], &self.taps, &inputs[t..t + kernel]);
        }
        (out, inputs[tokens..].concat())
    }

    /// The same of int8 inputs; `window` holds codes and run-time scales.
    pub fn int8(&self, rows: &SliceRows<'_>, shape: &MambaShape, window: (&[i8], &[f32])) -> (Vec<f32>, (Vec<i8>, Vec<f32>)) {
        let (channels, kernel) = (shape.conv_channels(), shape.kernel);
        let tokens = rows.codes.len() / channels;
        let codes: Vec<&[i8]> = window.0.chunks_exact(channels).chain(rows.codes.chunks_exact(channels)).collect();
        let scales = [window.1, rows.scales].concat();
        operations::count_int8(tokens * channels * kernel);
        let mut out = vec![0.0; tokens * channels];
        let mut sums = vec![0; channels];
        for (t, out) in out.chunks_exact_mut(channels).enumerate() {
            let codes = &codes[t..t + kernel];
            if rows.spans == 0 {
                sum_taps(&mut sums, &self.tap_codes, codes);
                finish_sums(out, &sums, &self.scales, &self.bias);
            } else {
                let scales = scales[t * rows.spans..].chunks_exact(rows.spans);
                for ((tap, codes), scales) in self.tap_codes.chunks_exact(channels).zip(codes).zip(scales) {
                    add_tap(out, tap, codes, scales, &Spans::conv(shape));
                }
                finish_row(out, &self.scales, &self.bias);
            }
        }
        (out, (codes[tokens..].concat(), scales[tokens * rows.spans..].to_vec()))
    }
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

/// `Σ_k tap[k, c] · input[k, c]` in int32.
#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2"))]
fn sum_taps(sums: &mut [i32], taps: &[i8], inputs: &[&[i8]]) {
    sums.fill(0);
    for (tap, input) in taps.chunks_exact(sums.len()).zip(inputs) {
        for ((sum, weight), x) in sums.iter_mut().zip(tap).zip(*input) {
            *sum += i32::from(*weight) * i32::from(*x);
        }
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn finish_sums(out: &mut [f32], sums: &[i32], scales: &[f32], bias: &[f32]) {
    for (((out, sum), scale), bias) in out.iter_mut().zip(sums).zip(scales).zip(bias) {
        *out = math::silu(*sum as f32 * scale + bias);
    }
}

#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn finish_row(out: &mut [f32], scales: &[f32], bias: &[f32]) {
    for ((out, scale), bias) in out.iter_mut().zip(scales).zip(bias) {
        *out = math::silu(*out * scale + bias);
    }
}

/// Adds one tap, its input having a scale for each of `spans`.
#[multiversion(targets("x86_64+avx512f+avx512bw", "x86_64+avx2"))]
fn add_tap(out: &mut [f32], tap: &[i8], input: &[i8], scales: &[f32], spans: &Spans) {
    let mut start = 0;
    for (span, scale) in spans.0.iter().zip(scales) {
        let (tap, input) = (&tap[start..start + span], &input[start..start + span]);
        for ((out, weight), x) in out[start..].iter_mut().zip(tap).zip(input) {
            *out += (i32::from(*weight) * i32::from(*x)) as f32 * scale;
        }
        start += span;
    }
}
