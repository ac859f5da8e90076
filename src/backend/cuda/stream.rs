//! Launches of `kernels/stream.cu`: integer linears for few tokens whose weights the copy engine brings.

/// Threads of a block: eight warps that multiply, four that add up, four that ask for copies.
pub const THREADS: usize = 512;

/// Bytes of a stage: 16 rows of 2048 bytes, 64 apart, and of their scales.
const STAGE: usize = 16 * (2048 + 64 + 80);
/// Tokens and outputs of a tile.
const TOKENS: usize = 8;
const OUTPUTS: usize = 16;

/// Whether GPUs of this architecture (90 for sm_90) have the copy engine.
pub fn serves(arch: u32) -> bool {
    arch >= 90
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
    /// For int4 or int8 weights on a GPU of this architecture.
    pub fn of(int4: bool, arch: u32) -> Self {
        // Two slots of products of each output: of 32 groups, or of 8 warps.
        let products = 2 * (if int4 { 32 } else { 8 }) * TOKENS * OUTPUTS * 4;
        // Two barriers for each stage.
        let stages = (super::shared_limit(arch) - products) / (STAGE + 16);
        Self { stages, shared: stages * (STAGE + 16) + products }
    }

    /// Blocks for so many tiles of 16 outputs: one on each multiprocessor, for every 8 tokens.
    pub fn blocks(tiles: usize, tokens: usize, multiprocessors: usize) -> [usize; 3] {
        [tiles.min(multiprocessors), tokens.div_ceil(TOKENS), 1]
    }
}
