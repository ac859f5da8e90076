//! Launches of `kernels/stream.cu`: linears for few tokens whose weights the copy engine brings, and which compute what stands in front of
//! them themselves where there is one token.

use super::device::{Arguments, Buffer};
use super::tensor::Front;

/// Bytes of a stage: 16 rows of 2048 bytes, 64 apart, and of the scales of int4 weights, for which int8 weights leave room, too.
const STAGE: usize = FLOAT_STAGE + 16 * 80;
const FLOAT_STAGE: usize = 16 * (2048 + 64);
/// Tokens and outputs of a tile.
const TOKENS: usize = 8;
const OUTPUTS: usize = 16;
/// Bytes in front of what a front leaves.
const SCRATCH: usize = 1024;
/// Fewer stages than this cannot keep memory busy.
const LEAST_STAGES: usize = 3;
/// The longest row of a norm, and what its groups are multiples of.
const NORM_INPUTS: usize = 9216;
const SEGMENT: usize = 128;

/// Whether GPUs of this architecture (90 for sm_90) have the copy engine, and shared memory for its rings. Consumer GPUs have 99 KiB: two
/// stages.
pub fn serves(arch: u32) -> bool {
    (90..120).contains(&arch)
}

/// Which of the kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kernel {
    Bf16,
    Int8,
    /// With a part in int8, or without.
    Int4,
}

impl Kernel {
    pub fn name(self) -> &'static str {
        match self {
            Self::Bf16 => "stream_bf16",
            Self::Int8 => "stream_w8a8",
            Self::Int4 => "stream_w4a8",
        }
    }

    /// Of a block: four warps ask for copies, sixteen multiply bf16, eight multiply codes and four add up.
    pub fn threads(self) -> usize {
        if self == Self::Bf16 { 640 } else { 512 }
    }
}

/// A launch of one of the kernels.
#[derive(Debug, Clone, Copy)]
pub struct Launch {
    /// Stages of the ring, the kernels' parameter.
    pub stages: usize,
    /// Bytes.
    pub shared: usize,
}

impl Launch {
    /// On a GPU of this architecture; `front`: inputs of what the front computes. `None` where there is no room for enough stages.
    pub fn of(kernel: Kernel, front: Option<usize>, arch: u32) -> Option<Self> {
        let (stage, entries, width) = match kernel {
            Kernel::Bf16 => (FLOAT_STAGE, 0, 4),
            // Two slots of products of each output: of 8 warps, or of 32 groups.
            Kernel::Int8 => (STAGE, 8, 1),
            Kernel::Int4 => (STAGE, 32, 1),
        };
        let front = front.map_or(0, |cols| SCRATCH + width * cols.next_multiple_of(256));
        let others = 2 * entries * TOKENS * OUTPUTS * 4 + front;
        // Two barriers for each stage.
        let stages = super::shared_limit(arch).saturating_sub(others) / (stage + 16);
        (stages >= LEAST_STAGES).then_some(Self { stages, shared: stages * (stage + 16) + others })
    }

    /// Blocks for so many tiles of 16 outputs: one on each multiprocessor, for every 8 tokens.
    pub fn blocks(tiles: usize, tokens: usize, multiprocessors: usize) -> [usize; 3] {
        [tiles.min(multiprocessors), tokens.div_ceil(TOKENS), 1]
    }
}

/// Whether the kernels can compute this themselves.
pub(super) fn serves_front(front: &Front, hadamard: Option<usize>) -> bool {
    let cols = front.row.cols;
    let norm = front.norm.as_ref().is_none_or(|norm| cols <= NORM_INPUTS && cols % SEGMENT == 0 && norm.group % SEGMENT == 0);
    front.row.rows == 1 && cols % 4 == 0 && hadamard.is_none() && norm
}

/// The kernels' parameters for what stands in front; `None`: nothing.
pub(super) fn front_arguments(arguments: Arguments, front: Option<&Front>, scale: Option<&Buffer>) -> Arguments {
    let norm = front.and_then(|front| front.norm.as_ref());
    arguments
        .with(front.map(|front| front.row.buffer()))
        .with(front.and_then(|front| front.gate.as_ref()).map(super::CudaTensor::buffer))
        .with(norm.map(|norm| &*norm.weight))
        .with(norm.map_or(0.0, |norm| norm.eps))
        .with(norm.map_or(0, |norm| norm.group))
        .with(usize::from(front.is_some_and(|front| front.square)))
        .with(scale)
}
