//! `in_proj`'s output as floats or as int8 slices, and the rounding of slices.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::Tensor;
use rayon::prelude::*;

use super::Parameters;
use crate::backend::MambaShape;
use crate::backend::cpu::stored::{expand_each, expand_span, round_each, round_span};
use crate::backend::cpu::{math, with_values};
use crate::error::{Error, Result};

/// Tokens that one task takes.
const ROWS_PER_TASK: usize = 16;

/// Slices z | x | B | C | dt of some tokens.
pub enum Projection {
    /// `[tokens, projected]`.
    Float(Tensor),
    Int8(Slices),
}

pub struct Slices {
    z: Slice,
    /// x | B | C in front of the convolution.
    conv: Slice,
    dt: Slice,
}

impl Projection {
    /// `in_proj`'s output `[tokens, z|x|B|C|dt]` in the form that the mixer reads.
    pub fn new(projected: Tensor, parameters: &Parameters, shape: &MambaShape) -> Result<Self> {
        if !parameters.int8_internals() {
            return Ok(Self::Float(projected));
        }
        let slices = with_values(&projected, |projected| {
            // Codes cannot say that something is not a number, so it has to be said here.
            math::all_finite(projected).then(|| Slices::round(projected, parameters, shape))
        })?;
        Ok(Self::Int8(slices.ok_or_else(|| Error::run("the output of in_proj is not finite"))?))
    }

    /// Runs `f` on the projection with its floats, if it has any, at hand.
    pub fn with<R>(&self, f: impl FnOnce(&Borrowed<'_>) -> R) -> Result<R> {
        match self {
            Self::Float(projected) => with_values(projected, |projected| f(&Borrowed::Float(projected))),
            Self::Int8(slices) => Ok(f(&Borrowed::Int8(slices))),
        }
    }
}

impl Slices {
    pub(super) fn round(projected: &[f32], parameters: &Parameters, shape: &MambaShape) -> Self {
        let (inner, channels, width) = (shape.inner(), shape.conv_channels(), shape.projected());
        let round =
            |columns: Range<usize>, spans: &Spans, scales: Option<&[f32]>| Slice::round_columns(projected, width, columns, spans, scales);
        Self {
            z: round(0..inner, &Spans::heads(shape), parameters.scales(|s| &s.z)),
            conv: round(inner..inner + channels, &Spans::conv(shape), parameters.scales(|s| &s.conv_in)),
            dt: round(inner + channels..width, &Spans(vec![shape.heads]), parameters.scales(|s| &s.dt)),
        }
    }
}

/// A projection whose floats, if it has any, are at hand.
pub enum Borrowed<'a> {
    Float(&'a [f32]),
    Int8(&'a Slices),
}

impl<'a> Borrowed<'a> {
    /// Rows that begin with z, and their width.
    pub fn gate(&self, parameters: &Parameters, shape: &MambaShape) -> (Cow<'a, [f32]>, usize) {
        match self {
            Self::Float(values) => (Cow::Borrowed(*values), shape.projected()),
            Self::Int8(slices) => (slices.z.values(&Spans::heads(shape), parameters.scales(|s| &s.z)).into(), shape.inner()),
        }
    }

    /// The rows of the tokens of a sequence.
    pub fn tokens(&self, range: Range<usize>, shape: &MambaShape) -> Rows<'a> {
        match self {
            Self::Float(values) => Rows::Float(&values[range.start * shape.projected()..range.end * shape.projected()]),
            Self::Int8(slices) => Rows::Int8(SlicedRows { conv: slices.conv.tokens(range.clone()), dt: slices.dt.tokens(range) }),
        }
    }
}

/// What the scan reads of one sequence.
pub enum Rows<'a> {
    /// `[tokens, z|x|B|C|dt]`.
    Float(&'a [f32]),
    Int8(SlicedRows<'a>),
}

pub struct SlicedRows<'a> {
    /// x | B | C in front of the convolution.
    pub conv: SliceRows<'a>,
    pub dt: SliceRows<'a>,
}

/// Widths of consecutive channels that share a scale when scales are found at run time.
pub struct Spans(pub Vec<usize>);

impl Spans {
    /// A head each.
    pub fn heads(shape: &MambaShape) -> Self {
        Self(vec![shape.head_dim; shape.heads])
    }

    /// x | B | C: a head each, then a state group each.
    pub fn conv(shape: &MambaShape) -> Self {
        let mut spans = Self::heads(shape);
        spans.0.resize(shape.heads + 2 * shape.groups, shape.state);
        spans
    }
}

/// int8 codes `[tokens, width]` of a slice.
pub struct Slice {
    width: usize,
    codes: Vec<i8>,
    /// `[tokens, spans]`; empty where scales are static.
    scales: Vec<f32>,
    spans: usize,
}

/// Rows of a [`Slice`].
#[derive(Clone, Copy)]
pub struct SliceRows<'a> {
    pub width: usize,
    pub codes: &'a [i8],
    pub scales: &'a [f32],
    pub spans: usize,
}

impl Slice {
    /// Rounds `values` `[tokens, width]`: with static scales `[width]`, or with absmax / 127 of each token and span.
    pub fn round(values: &[f32], width: usize, spans: &Spans, scales: Option<&[f32]>) -> Self {
        Self::round_columns(values, width, 0..width, spans, scales)
    }

    /// [`Self::round`] of some columns of `values` `[tokens, stride]`.
    fn round_columns(values: &[f32], stride: usize, columns: Range<usize>, spans: &Spans, scales: Option<&[f32]>) -> Self {
        let (width, tokens) = (columns.len(), values.len() / stride);
        let mut codes = vec![0; tokens * width];
        let rows = values.par_chunks_exact(stride).map(|row| &row[columns.clone()]);
        let rows = rows.zip(codes.par_chunks_exact_mut(width)).with_min_len(ROWS_PER_TASK);
        match scales {
            Some(scales) => {
                rows.for_each(|(values, codes)| round_each(values, scales, codes));
                Self { width, codes, scales: Vec::new(), spans: 0 }
            }
            None => {
                let spans = &spans.0;
                let mut found = vec![0.0; tokens * spans.len()];
                rows.zip(found.par_chunks_exact_mut(spans.len())).for_each(|((values, codes), scales)| {
                    let mut start = 0;
                    for (span, scale) in spans.iter().zip(scales) {
                        *scale = round_span(&values[start..start + span], &mut codes[start..start + span]);
                        start += span;
                    }
                });
                Self { width, codes, scales: found, spans: spans.len() }
            }
        }
    }

    /// The floats that the codes stand for, under the scales that they were rounded with.
    pub fn values(&self, spans: &Spans, scales: Option<&[f32]>) -> Vec<f32> {
        let mut values = vec![0.0; self.codes.len()];
        let rows = values.par_chunks_exact_mut(self.width).zip(self.codes.par_chunks_exact(self.width)).with_min_len(ROWS_PER_TASK);
        match scales {
            Some(scales) => rows.for_each(|(values, codes)| expand_each(codes, scales, values)),
            None => rows.zip(self.scales.par_chunks_exact(self.spans)).for_each(|((values, codes), scales)| {
                let mut start = 0;
                for (span, scale) in spans.0.iter().zip(scales) {
                    expand_span(&codes[start..start + span], *scale, &mut values[start..start + span]);
                    start += span;
                }
            }),
        }
        values
    }

    /// Codes and scales.
    pub fn into_parts(self) -> (Vec<i8>, Vec<f32>) {
        (self.codes, self.scales)
    }

    pub fn all(&self) -> SliceRows<'_> {
        SliceRows { width: self.width, codes: &self.codes, scales: &self.scales, spans: self.spans }
    }

    fn tokens(&self, range: Range<usize>) -> SliceRows<'_> {
        SliceRows {
            width: self.width,
            codes: &self.codes[range.start * self.width..range.end * self.width],
            scales: &self.scales[range.start * self.spans..range.end * self.spans],
            spans: self.spans,
        }
    }
}

impl SliceRows<'_> {
    /// The codes of a token.
    pub fn row(&self, token: usize) -> &[i8] {
        &self.codes[token * self.width..(token + 1) * self.width]
    }

    /// The run-time scale of a token's span.
    pub fn span_scale(&self, token: usize, span: usize) -> f32 {
        self.scales[token * self.spans + span]
    }
}
