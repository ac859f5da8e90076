//! Launches of `kernels/wgmma.cu`: integer linears for many tokens on Hopper.

use super::device::{Arguments, Buffer, Device};
use crate::error::Result;

/// Architecture that has these instructions: sm_90a alone.
pub const ARCH: u32 = 90;

/// Tokens up to which the kernels with tiles of 64 tokens are faster: then the weights' bytes are what counts.
const NARROW: usize = 128;

/// Inputs of a stage.
const DEPTH: usize = 128;

/// Stages of packed int4 weights on their way: two of each of three warps.
const UNPACKING: usize = 6;

/// A kernel and its launch.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    pub kernel: &'static str,
    pub threads: usize,
    /// Bytes.
    pub shared: usize,
    rows: usize,
    tokens: usize,
    /// Blocks that a multiprocessor holds.
    resident: usize,
}

impl Launch {
    /// The kernel for int4 or int8 weights and this many tokens.
    pub fn of(int4: bool, tokens: usize) -> Self {
        let launch = |kernel, consumers: usize, tokens: usize, stages: usize| {
            let rows = 64 * consumers;
            let packed = if int4 { UNPACKING * DEPTH / 2 * rows } else { 0 };
            // 1024 to align the first stage, two barriers a stage.
            let shared = 1024 + stages * (DEPTH * (rows + tokens) + 16) + packed;
            Self { kernel, threads: 128 * (consumers + 1), shared, rows, tokens, resident: 3 - consumers }
        };
        match (int4, tokens <= NARROW) {
            (false, false) => launch("wgmma_w8a8", 2, 256, 4),
            (false, true) => launch("wgmma_w8a8_64", 1, 64, 6),
            (true, false) => launch("wgmma_w4a8", 2, 128, 5),
            (true, true) => launch("wgmma_w4a8_64", 1, 64, 5),
        }
    }

    /// Blocks for a linear of `rows` outputs: as many as the device holds, each of which takes tile after tile.
    pub fn blocks(&self, tokens: usize, rows: usize, multiprocessors: usize) -> usize {
        let pieces = tokens.div_ceil(self.tokens.min(64)) * rows.div_ceil(self.rows);
        pieces.min(self.resident * multiprocessors)
    }
}

/// What a kernel multiplies.
#[derive(Clone, Copy)]
pub struct Operands<'a> {
    pub weights: &'a Buffer,
    pub scales: &'a Buffer,
    /// Of int4 weights.
    pub group: Option<usize>,
    pub codes: &'a Buffer,
    pub codes_scales: &'a Buffer,
    pub tokens: usize,
    pub rows: usize,
    pub cols: usize,
}

impl Operands<'_> {
    /// The kernel's arguments but for the last, which say where results go.
    pub fn arguments(&self, device: &dyn Device) -> Result<Arguments> {
        let Self { weights, group, codes, tokens, rows, cols, .. } = *self;
        let width = super::padded(cols);
        let arguments = match group {
            Some(group) => Arguments::default().with(weights).with(self.scales).with(group),
            None => Arguments::default().with_map(&device.tensor_map(weights.address(), rows, width)?).with(self.scales),
        };
        let arguments = arguments.with_map(&device.tensor_map(codes.address(), tokens, width)?).with(self.codes_scales);
        Ok(arguments.with(tokens).with(rows).with(cols))
    }
}
