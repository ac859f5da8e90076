//! Launches of `kernels/stream_one.cu` and `kernels/stream.cu`: linears for few tokens whose weights the copy engine brings. Those of one token
//! compute what stands in front of them themselves.

use super::device::{Arguments, Buffer};
use super::tensor::Front;

/// Bytes of a stage: 16 rows of 2048 bytes, 64 apart, and of the scales of int4 weights; and of its two barriers.
const STAGE: usize = 16 * (2048 + 64 + 80) + 16;
/// Tokens and outputs of a tile.
const TOKENS: usize = 8;
const OUTPUTS: usize = 16;
/// Bytes that a front takes beside what it leaves.
const SCRATCH: usize = 1024;
/// Bytes that a ring leaves to the small launch behind it, which waits beside it where there is room.
const BESIDE: usize = 10 << 10;
/// Fewer stages than this cannot keep memory busy.
const LEAST_STAGES: usize = 3;
/// The longest rows of a norm and of what is none, and what a norm's groups are multiples of.
const NORM_INPUTS: usize = 10240;
const PLAIN_INPUTS: usize = 22528;
const SEGMENT: usize = 128;

/// Whether GPUs of this architecture (90 for sm_90) have the copy engine, and shared memory for its rings. Consumer GPUs have 99 KiB: two
/// stages.
pub fn serves(arch: u32) -> bool {
    (90..120).contains(&arch)
}

/// What the weights are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Weights {
    Bf16,
    Int8,
    /// With a part in int8, or without.
    Int4,
}

/// A launch of one of the kernels.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    pub kernel: &'static str,
    pub threads: usize,
    /// Stages of the ring, the kernels' parameter.
    pub stages: usize,
    /// Bytes.
    pub shared: usize,
}

impl Launch {
    /// For one token of so many inputs, whose front is computed as well.
    pub fn of_one(weights: Weights, cols: usize, arch: u32) -> Option<Self> {
        // int4 weights have with each stage a window of products of each row.
        let (kernel, handed, row) = match weights {
            Weights::Bf16 => ("one_bf16", 0, 4 * cols.next_multiple_of(256)),
            Weights::Int8 => ("one_w8a8", 0, cols.next_multiple_of(4096)),
            Weights::Int4 => ("one_w4a8", OUTPUTS * (32 + 4) * 4, cols.next_multiple_of(4096)),
        };
        Self::with_ring(kernel, 640, STAGE + handed, SCRATCH + row, arch)
    }

    /// For int8 activations of several tokens.
    pub fn of_several(weights: Weights, arch: u32) -> Option<Self> {
        // Two slots of products of each output: of 8 warps, or of 32 groups.
        let (kernel, entries) = match weights {
            Weights::Bf16 => return None,
            Weights::Int8 => ("stream_w8a8", 8),
            Weights::Int4 => ("stream_w4a8", 32),
        };
        Self::with_ring(kernel, 512, STAGE, 2 * entries * TOKENS * OUTPUTS * 4, arch)
    }

    /// With as many stages, of so many bytes, as there is room for beside `others`; `None`: too few.
    fn with_ring(kernel: &'static str, threads: usize, stage: usize, others: usize, arch: u32) -> Option<Self> {
        let stages = super::shared_limit(arch).saturating_sub(others + BESIDE) / stage;
        (stages >= LEAST_STAGES).then_some(Self { kernel, threads, stages, shared: stages * stage + others })
    }

    /// Blocks for so many tiles of 16 outputs: one on each multiprocessor, for every 8 tokens.
    pub fn blocks(tiles: usize, tokens: usize, multiprocessors: usize) -> [usize; 3] {
        [tiles.min(multiprocessors), tokens.div_ceil(TOKENS), 1]
    }
}

/// Whether the kernels for one token can compute this themselves.
pub(super) fn serves_front(front: &Front) -> bool {
    let cols = front.row.cols;
    let fits = match &front.norm {
        Some(norm) => cols <= NORM_INPUTS && cols.is_multiple_of(SEGMENT) && norm.group.is_multiple_of(SEGMENT),
        None => cols <= PLAIN_INPUTS,
    };
    front.row.rows == 1 && cols.is_multiple_of(4) && fits
}

/// The kernels' parameters for what stands in front; `None`: nothing.
pub(super) fn front_arguments(arguments: Arguments, front: Option<&Front>, scale: Option<&Buffer>) -> Arguments {
    let norm = front.and_then(|front| front.norm.as_ref());
    arguments
        .with(front.map(|front| front.row.buffer()))
        .with(norm.map(|norm| &*norm.weight))
        .with(norm.map_or(0.0, |norm| norm.eps))
        .with(norm.map_or(0, |norm| norm.group))
        .with(usize::from(front.is_some_and(|front| front.square)))
        .with(scale)
}
