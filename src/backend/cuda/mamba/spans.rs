//! Slices of rows by *spans*, the channels that share a run-time scale: their rounding, widening and rotation.

use super::{Parameters, gate_arguments};
use crate::backend::cuda::device::{Arguments, Buffer};
use crate::backend::cuda::{Cuda, CudaTensor};
use crate::backend::{MambaShape, StateRotation};
use crate::error::Result;

/// Spans that a block takes.
pub(super) const SPANS: usize = 4;

/// A row: `heads` spans of `head_dim` channels, `groups` of `state`, then one of `rest` where that is not 0. Blocks are those of a
/// Hadamard transform, 1 for none.
#[derive(Clone, Copy)]
pub(super) struct Spans {
    heads: usize,
    head_dim: usize,
    head_block: usize,
    groups: usize,
    state: usize,
    state_block: usize,
    rest: usize,
}

impl Spans {
    /// z | x | B | C | dt.
    pub fn projection(shape: &MambaShape) -> Self {
        Self { heads: 2 * shape.heads, rest: shape.heads, ..Self::conv(shape) }
    }

    /// x | B | C.
    pub fn conv(shape: &MambaShape) -> Self {
        let (heads, groups) = (shape.heads, 2 * shape.groups);
        Self { heads, head_dim: shape.head_dim, head_block: 1, groups, state: shape.state, state_block: 1, rest: 0 }
    }

    /// z, x or y.
    pub fn heads(shape: &MambaShape) -> Self {
        Self { groups: 0, ..Self::conv(shape) }
    }

    pub fn rotated(self, rotation: Option<StateRotation>) -> Self {
        rotation.map_or(self, |rotation| Self { head_block: rotation.head, state_block: rotation.state, ..self })
    }

    pub fn count(&self) -> usize {
        self.heads + self.groups + usize::from(self.rest > 0)
    }

    pub fn width(&self) -> usize {
        self.heads * self.head_dim + self.groups * self.state + self.rest
    }

    /// heads, head_dim, head_block, groups, state, state_block.
    pub fn arguments(&self, arguments: Arguments) -> Arguments {
        let heads = arguments.with(self.heads).with(self.head_dim).with(self.head_block);
        heads.with(self.groups).with(self.state).with(self.state_block)
    }
}

impl Cuda {
    /// The codes of `x` `[rows, width]`, rotated first: with `fixed` scales a channel, or with scales of their own, `[rows, spans]`.
    pub(super) fn round_spans(
        &self,
        spans: Spans,
        rows: usize,
        x: &Buffer,
        codes: &Buffer,
        fixed: Option<&Buffer>,
        scales: Option<&Buffer>,
    ) -> Result<()> {
        let fault = self.fault()?;
        let arguments = spans.arguments(Arguments::default().with(x)).with(spans.rest).with(None::<&Buffer>);
        let arguments = gate_arguments(arguments, None).with(codes).with(fixed).with(scales).with(&*fault);
        self.launch("spans", [rows, spans.count().div_ceil(SPANS), 1], 128, 0, arguments)
    }

    /// Rotates `x` in place and applies its gate, where there is a rotation.
    pub(super) fn rotate_spans(&self, spans: Spans, x: &CudaTensor, parameters: &Parameters, gate: Option<&CudaTensor>) -> Result<()> {
        if parameters.rotation.is_none() {
            return Ok(());
        }
        let spans = spans.rotated(parameters.rotation);
        let arguments = spans.arguments(Arguments::default().with(x.buffer())).with(spans.rest).with(x.buffer());
        let arguments = gate_arguments(arguments, gate);
        let arguments = arguments.with(None::<&Buffer>).with(None::<&Buffer>).with(None::<&Buffer>).with(None::<&Buffer>);
        self.launch("spans", [x.rows, spans.count().div_ceil(SPANS), 1], 128, 0, arguments)
    }

    /// The floats `[rows, width]` that codes with a distance between their rows stand for; scales the same, or `fixed`.
    pub(super) fn widen_spans(
        &self,
        spans: Spans,
        rows: usize,
        codes: (&Buffer, usize),
        scales: Option<(&Buffer, usize)>,
        fixed: Option<&Buffer>,
        out: &Buffer,
    ) -> Result<()> {
        let arguments = Arguments::default().with(codes.0).with(codes.1);
        let arguments = arguments.with(scales.map(|(scales, _)| scales)).with(scales.map_or(0, |(_, stride)| stride)).with(fixed);
        let arguments = arguments.with(spans.heads).with(spans.head_dim).with(spans.groups).with(spans.state).with(out);
        self.launch("widen_spans", [rows, spans.count().div_ceil(SPANS), 1], 128, 0, arguments)
    }
}
