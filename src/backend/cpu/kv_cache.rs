//! Keys and values between calls.

use std::borrow::Cow;

use super::stored::{Stored, round_span, to_f16};
use crate::format::CacheFormat;

/// Keys and values of some sequences, `[tokens, kv_heads·head_dim]` each; int8 has a scale for each token and head.
pub struct KvCache {
    head_dim: usize,
    sequences: Vec<(Stored, Stored)>,
}

impl KvCache {
    pub fn new(head_dim: usize, sequences: usize, format: CacheFormat) -> Self {
        Self { head_dim, sequences: vec![(Stored::empty(format), Stored::empty(format)); sequences] }
    }

    /// Appends keys and values of further tokens of a sequence.
    pub fn extend(&mut self, sequence: usize, new_keys: &[f32], new_values: &[f32]) {
        let (keys, values) = &mut self.sequences[sequence];
        extend(keys, new_keys, self.head_dim);
        extend(values, new_values, self.head_dim);
    }

    /// Keys and values of a sequence, in float.
    pub fn sequence(&self, sequence: usize) -> (Cow<'_, [f32]>, Cow<'_, [f32]>) {
        let (keys, values) = &self.sequences[sequence];
        (floats(keys, self.head_dim), floats(values, self.head_dim))
    }

    /// Bytes that are kept.
    pub fn bytes(&self) -> u64 {
        self.sequences.iter().map(|(keys, values)| keys.bytes() + values.bytes()).sum()
    }
}

fn extend(stored: &mut Stored, new: &[f32], head_dim: usize) {
    match stored {
        Stored::F32(values) => values.extend_from_slice(new),
        Stored::F16(values) => values.extend(to_f16(new)),
        Stored::Int8 { codes, scales } => {
            let start = codes.len();
            codes.resize(start + new.len(), 0);
            let heads = new.chunks_exact(head_dim).zip(codes[start..].chunks_exact_mut(head_dim));
            scales.extend(heads.map(|(values, codes)| round_span(values, codes)));
        }
    }
}

fn floats(stored: &Stored, head_dim: usize) -> Cow<'_, [f32]> {
    match stored {
        Stored::F32(values) => Cow::Borrowed(values),
        Stored::F16(values) => Cow::Owned(values.iter().map(|value| value.to_f32()).collect()),
        Stored::Int8 { codes, scales } => {
            let heads = codes.chunks_exact(head_dim).zip(scales);
            Cow::Owned(heads.flat_map(|(codes, scale)| codes.iter().map(move |code| f32::from(*code) * scale)).collect())
        }
    }
}
