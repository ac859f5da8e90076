//! The Mamba-2 scan on the CPU: causal convolution with SiLU, then the selective recurrence, head by head.
//!
//! With float internals the recurrence goes token by token ([`recurrence`]); with int8 internals it goes chunk by chunk,
//! so that C·B is an integer product ([`chunks`]). [`projection`] holds `in_proj`'s output, [`cache`] what is kept
//! between calls.

mod cache;
mod chunks;
mod convolution;
mod projection;
mod recurrence;
#[cfg(test)]
mod tests;

use rayon::prelude::*;

pub use cache::SsmCache;
pub use projection::Projection;

use self::cache::SequenceState;
use self::chunks::{HeadState, Inputs};
use self::convolution::Convolution;
use self::projection::{Borrowed, Rows, Slice, SlicedRows, Spans};
use super::{hadamard, norm};
use crate::backend::{MambaParameters, MambaShape, SSM_CHUNK, Sequences, SsmInternals, SsmScales, StateRotation};
use crate::format::CacheFormats;

/// Channels of a head whose states lie together, so that a state and the read-outs of these channels stay in registers.
const LANES: usize = 32;

/// Products of a sequence above which its heads are divided among threads.
const PARALLEL_PRODUCTS: usize = 1 << 21;

/// Small parameters of a mixer, laid out for the loops below.
pub struct Parameters {
    convolution: Convolution,
    a: Vec<f32>,
    d: Vec<f32>,
    dt_bias: Vec<f32>,
    internals: Internals,
    rotation: Option<StateRotation>,
}

/// How the slices are rounded.
enum Internals {
    Float,
    PerToken,
    Static(SsmScales),
}

impl Parameters {
    pub fn new(parameters: MambaParameters) -> Self {
        let convolution = Convolution::new(&parameters);
        let MambaParameters { a, d, dt_bias, internals, rotation, .. } = parameters;
        let internals = match internals {
            SsmInternals::Float => Internals::Float,
            SsmInternals::Int8PerToken => Internals::PerToken,
            SsmInternals::Int8Static(scales) => Internals::Static(scales),
        };
        Self { convolution, a, d, dt_bias, internals, rotation }
    }
}

/// Floats of one head's state.
fn head_state(shape: &MambaShape) -> usize {
    shape.head_dim.next_multiple_of(LANES) * shape.state
}

/// What a head reads of its mixer's parameters.
#[derive(Clone, Copy)]
struct Head {
    index: usize,
    /// Of B and C.
    group: usize,
    a: f32,
    d: f32,
    dt_bias: f32,
}

impl Head {
    fn new(parameters: &Parameters, shape: &MambaShape, index: usize) -> Self {
        let group = index / (shape.heads / shape.groups);
        Self { index, group, a: parameters.a[index], d: parameters.d[index], dt_bias: parameters.dt_bias[index] }
    }

    /// Time step and decay of a token whose raw dt is `raw`.
    fn step(&self, raw: f32, shape: &MambaShape) -> (f32, f32) {
        let dt = super::math::softplus(raw + self.dt_bias).clamp(shape.dt_min, shape.dt_max);
        (dt, dt * self.a)
    }
}

/// See [`crate::backend::Backend::mamba_scan`]. Returns `y·silu(z)` `[tokens, inner]`.
pub fn scan(
    projection: &Borrowed<'_>,
    parameters: &Parameters,
    shape: &MambaShape,
    sequences: &Sequences,
    cache: Option<&mut SsmCache>,
) -> Vec<f32> {
    let inner = shape.inner();
    let mut y = vec![0.0; sequences.tokens() * inner];
    let mut rest = y.as_mut_slice();
    let mut work = Vec::with_capacity(sequences.count());
    for range in sequences.ranges() {
        let (own, after) = rest.split_at_mut(range.len() * inner);
        rest = after;
        work.push((projection.tokens(range, shape), own));
    }
    match cache {
        Some(cache) => {
            let formats = cache.formats;
            let work = work.into_par_iter().zip(&mut cache.sequences);
            work.for_each(|((rows, y), state)| scan_sequence(&rows, y, parameters, shape, state, formats));
        }
        None => scan_tree(work, parameters, shape, sequences),
    }
    if let Some(rotation) = parameters.rotation {
        hadamard::transform_rows(&mut y, inner, rotation.head);
    }
    let (z, stride) = projection.gate(parameters, shape);
    norm::gate(&mut y, inner, &z, stride);
    y
}

/// Whole sequences by their distance from a root, those of one distance in parallel. Only states that a later
/// sequence goes on from are kept.
fn scan_tree(work: Vec<(Rows<'_>, &mut [f32])>, parameters: &Parameters, shape: &MambaShape, sequences: &Sequences) {
    let formats = CacheFormats::default();
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
    let empty = SequenceState::empty(parameters, shape, formats);
    let mut states: Vec<Option<SequenceState>> = vec![None; depth.len()];
    for level in levels {
        let run = |(index, (rows, y)): (usize, (Rows<'_>, &mut [f32]))| {
            let before = sequences.parent(index).and_then(|parent| states[parent].as_ref()).unwrap_or(&empty);
            match rows {
                Rows::Int8(rows) if !continued[index] && y.len() <= SSM_CHUNK * shape.inner() => {
                    scan_last(&rows, y, parameters, shape, before);
                    None
                }
                rows => {
                    let mut state = before.clone();
                    scan_sequence(&rows, y, parameters, shape, &mut state, formats);
                    continued[index].then_some((index, state))
                }
            }
        };
        let ended: Vec<(usize, SequenceState)> = level.into_par_iter().filter_map(run).collect();
        for (index, state) in ended {
            states[index] = Some(state);
        }
    }
}

/// One sequence. Heads are independent, so they run in parallel when there is enough to do.
fn scan_sequence(
    rows: &Rows<'_>,
    y: &mut [f32],
    parameters: &Parameters,
    shape: &MambaShape,
    sequence: &mut SequenceState,
    formats: CacheFormats,
) {
    let tokens = y.len() / shape.inner();
    let mut state = sequence.take_state(shape);
    match rows {
        Rows::Float(projected) => {
            let (mut xbc, window) = parameters.convolution.float(projected, shape, &sequence.window(shape));
            sequence.keep_window(&window, shape, formats.conv);
            rotate(&mut xbc, parameters.rotation, shape);
            let states = state.chunks_exact_mut(head_state(shape)).collect();
            each_head(tokens, y, shape, states, |head, state: &mut [f32], out, stride| {
                recurrence::scan_head(projected, &xbc, Head::new(parameters, shape, head), shape, state, out, stride);
            });
        }
        Rows::Int8(rows) => {
            let states = state.chunks_exact_mut(head_state(shape)).map(HeadState::Carried).collect();
            let window = scan_chunks(rows, y, parameters, shape, sequence.codes(), states);
            sequence.keep_codes(window);
        }
    }
    sequence.keep_state(state, shape, formats.state);
}

/// A sequence of at most one chunk that nothing goes on from: the state before it is read where it is, and there is none
/// behind it.
fn scan_last(rows: &SlicedRows<'_>, y: &mut [f32], parameters: &Parameters, shape: &MambaShape, before: &SequenceState) {
    let state = before.state(shape);
    let states = state.chunks_exact(head_state(shape)).map(HeadState::Last).collect();
    scan_chunks(rows, y, parameters, shape, before.codes(), states);
}

/// The scan with int8 internals; `window` holds codes and scales in front of the convolution. Returns the next window.
fn scan_chunks(
    rows: &SlicedRows<'_>,
    y: &mut [f32],
    parameters: &Parameters,
    shape: &MambaShape,
    window: (&[i8], &[f32]),
    states: Vec<HeadState<'_>>,
) -> (Vec<i8>, Vec<f32>) {
    let (mut xbc, next) = parameters.convolution.int8(&rows.conv, shape, window);
    rotate(&mut xbc, parameters.rotation, shape);
    let codes = Slice::round(&xbc, shape.conv_channels(), &Spans::conv(shape), parameters.scales(|s| &s.conv_out));
    let inputs = Inputs::new(&codes, parameters, shape);
    each_head(y.len() / shape.inner(), y, shape, states, |head, state, out, stride| {
        chunks::scan_head(&inputs, &rows.dt, parameters, Head::new(parameters, shape, head), shape, state, out, stride);
    });
    next
}

impl Parameters {
    /// The static scales that `of` names, where scales are static.
    fn scales(&self, of: impl Fn(&SsmScales) -> &Vec<f32>) -> Option<&[f32]> {
        match &self.internals {
            Internals::Static(scales) => Some(of(scales)),
            Internals::Float | Internals::PerToken => None,
        }
    }

    fn int8_internals(&self) -> bool {
        !matches!(self.internals, Internals::Float)
    }
}

/// Runs `scan` for every head: (head, state, output, distance between the rows of the output).
fn each_head<S: Send>(tokens: usize, y: &mut [f32], shape: &MambaShape, states: Vec<S>, scan: impl Fn(usize, S, &mut [f32], usize) + Sync) {
    if tokens * shape.heads * head_state(shape) < PARALLEL_PRODUCTS {
        for (head, state) in states.into_iter().enumerate() {
            scan(head, state, &mut y[head * shape.head_dim..], shape.inner());
        }
        return;
    }
    let run = |(head, state)| {
        let mut out = vec![0.0; tokens * shape.head_dim];
        scan(head, state, &mut out, shape.head_dim);
        out
    };
    let heads: Vec<Vec<f32>> = states.into_par_iter().enumerate().map(run).collect();
    for (t, row) in y.chunks_exact_mut(shape.inner()).enumerate() {
        for (out, head) in row.chunks_exact_mut(shape.head_dim).zip(&heads) {
            out.copy_from_slice(&head[t * shape.head_dim..(t + 1) * shape.head_dim]);
        }
    }
}

/// Applies V to every head of x, U to every group of B and C; `xbc` is `[tokens, conv_channels]`.
fn rotate(xbc: &mut [f32], rotation: Option<StateRotation>, shape: &MambaShape) {
    let Some(rotation) = rotation else { return };
    let (inner, channels) = (shape.inner(), shape.conv_channels());
    xbc.par_chunks_exact_mut(channels).with_min_len(16).for_each(|row| {
        let (x, bc) = row.split_at_mut(inner);
        hadamard::transform_blocks(x, rotation.head);
        hadamard::transform_blocks(bc, rotation.state);
    });
}
