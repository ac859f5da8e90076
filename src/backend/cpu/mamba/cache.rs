//! What a mixer keeps between calls: the convolution's window and the SSM state, in their formats.

use std::borrow::Cow;

use super::projection::{Slice, Spans};
use super::{LANES, Parameters, head_state};
use crate::backend::MambaShape;
use crate::backend::cpu::stored::{Stored, round_span, to_f16};
use crate::format::{CacheFormat, CacheFormats};

/// Convolution window and SSM state of some sequences.
pub struct SsmCache {
    pub(super) formats: CacheFormats,
    pub(super) sequences: Vec<SequenceState>,
}

impl SsmCache {
    pub fn new(parameters: &Parameters, shape: &MambaShape, sequences: usize, formats: CacheFormats) -> Self {
        Self { formats, sequences: vec![SequenceState::empty(parameters, shape, formats); sequences] }
    }

    /// Bytes that are kept.
    pub fn bytes(&self) -> u64 {
        self.sequences.iter().map(|sequence| sequence.window.bytes() + sequence.state.bytes()).sum()
    }
}

#[derive(Clone)]
pub(super) struct SequenceState {
    /// The last `kernel − 1` inputs of the convolution, oldest first: `[kernel − 1, conv_channels]`. int8 has scales
    /// `[kernel − 1, spans]`, or none where they are static; int8 internals keep no other form.
    window: Stored,
    /// S of each head, `[head_dim / 32 (rounded up), state, 32]`; lanes beyond head_dim stay 0. int8 has a scale a
    /// channel, `[heads, head_dim rounded up to 32]`.
    state: Stored,
}

impl SequenceState {
    pub fn empty(parameters: &Parameters, shape: &MambaShape, formats: CacheFormats) -> Self {
        let mut sequence = Self { window: Stored::F32(Vec::new()), state: Stored::F32(Vec::new()) };
        let window = vec![0.0; (shape.kernel - 1) * shape.conv_channels()];
        if parameters.int8_internals() {
            let zeros = Slice::round(&window, shape.conv_channels(), &Spans::conv(shape), parameters.scales(|s| &s.conv_in));
            sequence.keep_codes(zeros.into_parts());
        } else {
            sequence.keep_window(&window, shape, formats.conv);
        }
        sequence.keep_state(vec![0.0; shape.heads * head_state(shape)], shape, formats.state);
        sequence
    }

    /// The window's codes and scales, with int8 internals.
    pub fn codes(&self) -> (&[i8], &[f32]) {
        match &self.window {
            Stored::Int8 { codes, scales } => (codes, scales),
            Stored::F32(_) | Stored::F16(_) => (&[], &[]),
        }
    }

    pub fn keep_codes(&mut self, (codes, scales): (Vec<i8>, Vec<f32>)) {
        self.window = Stored::Int8 { codes, scales };
    }

    /// The window in float, with float internals.
    pub fn window(&self, shape: &MambaShape) -> Vec<f32> {
        match &self.window {
            Stored::F32(values) => values.clone(),
            Stored::F16(values) => values.iter().map(|value| value.to_f32()).collect(),
            Stored::Int8 { codes, scales } => {
                let spans = Spans::conv(shape);
                let runs = (1..shape.kernel).flat_map(|_| &spans.0);
                let scales = runs.zip(scales).flat_map(|(span, scale)| std::iter::repeat_n(*scale, *span));
                codes.iter().zip(scales).map(|(code, scale)| f32::from(*code) * scale).collect()
            }
        }
    }

    pub fn keep_window(&mut self, window: &[f32], shape: &MambaShape, format: CacheFormat) {
        self.window = match format {
            CacheFormat::F32 => Stored::F32(window.to_vec()),
            CacheFormat::F16 => Stored::F16(to_f16(window).collect()),
            CacheFormat::Int8 => {
                let (codes, scales) = Slice::round(window, shape.conv_channels(), &Spans::conv(shape), None).into_parts();
                Stored::Int8 { codes, scales }
            }
        };
    }

    /// The state in float.
    pub fn state(&self, shape: &MambaShape) -> Cow<'_, [f32]> {
        match &self.state {
            Stored::F32(values) => Cow::Borrowed(values),
            Stored::F16(values) => values.iter().map(|value| value.to_f32()).collect(),
            Stored::Int8 { codes, scales } => {
                let tiles = codes.chunks_exact(LANES * shape.state).zip(scales.chunks_exact(LANES));
                tiles.flat_map(|(codes, scales)| codes.iter().zip(scales.iter().cycle()).map(|(c, s)| f32::from(*c) * s)).collect()
            }
        }
    }

    /// [`Self::state`], to be given back by [`Self::keep_state`].
    pub fn take_state(&mut self, shape: &MambaShape) -> Vec<f32> {
        match &mut self.state {
            Stored::F32(values) => std::mem::take(values),
            Stored::F16(_) | Stored::Int8 { .. } => self.state(shape).into_owned(),
        }
    }

    pub fn keep_state(&mut self, state: Vec<f32>, shape: &MambaShape, format: CacheFormat) {
        self.state = match format {
            CacheFormat::F32 => Stored::F32(state),
            CacheFormat::F16 => Stored::F16(to_f16(&state).collect()),
            CacheFormat::Int8 => round_state(&state, shape.state),
        };
    }
}

/// Codes of tiles `[state, 32]` with a scale for each of the 32 channels.
fn round_state(state: &[f32], n: usize) -> Stored {
    let mut codes = vec![0; state.len()];
    let mut scales = Vec::with_capacity(state.len() / n);
    let (mut channel, mut rounded) = (vec![0.0; n], vec![0; n]);
    for (values, codes) in state.chunks_exact(LANES * n).zip(codes.chunks_exact_mut(LANES * n)) {
        for lane in 0..LANES {
            channel.iter_mut().zip(values[lane..].iter().step_by(LANES)).for_each(|(to, from)| *to = *from);
            scales.push(round_span(&channel, &mut rounded));
            codes[lane..].iter_mut().step_by(LANES).zip(&rounded).for_each(|(to, from)| *to = *from);
        }
    }
    Stored::Int8 { codes, scales }
}
