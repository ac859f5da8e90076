//! What quantizing takes of the host's memory, before it starts.

use crate::checkpoint::{BlockSpec, Layout, LinearSpec};

/// Bytes of memory, estimated from shapes. One block is in memory at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// The float and the quantized residual stream of the sample at one boundary, and a copy of one while a block runs.
    pub streams: u64,
    /// The largest block: in f64 for the transforms, three times in f32 (checkpoint's, transformed, quantized) and as codes.
    pub block: u64,
    /// Hessians of the linears of the block with the largest, in f64, and the factorization of one.
    pub statistics: u64,
}

impl MemoryNeed {
    /// For a sample of `tokens` tokens in all; `hessians`: whether rounding needs them.
    pub fn of(layout: &Layout, hidden: usize, tokens: usize, hessians: bool) -> Self {
        let weights = |block: &BlockSpec| block.linears.iter().map(LinearSpec::weights).sum::<u64>();
        let square = |cols: usize| (cols * cols) as u64;
        let moments = |block: &BlockSpec| {
            let largest = block.linears.iter().map(|linear| square(linear.cols)).max().unwrap_or(0);
            8 * block.linears.iter().map(|linear| square(linear.cols)).sum::<u64>() + 28 * largest
        };
        Self {
            streams: 3 * 4 * (tokens * hidden) as u64,
            block: (8 + 3 * 4 + 2) * layout.blocks.iter().map(weights).max().unwrap_or(0),
            statistics: if hessians { layout.blocks.iter().map(moments).max().unwrap_or(0) } else { 0 },
        }
    }

    /// In words.
    pub fn statement(&self) -> String {
        let mb = |bytes: u64| format!("{:.0} MB", bytes as f64 / 1e6);
        let total = mb(self.streams + self.block + self.statistics);
        let (streams, block, statistics) = (mb(self.streams), mb(self.block), mb(self.statistics));
        format!("needs about {total} of memory: {streams} for the sample, {block} for the largest block, {statistics} for its statistics")
    }
}
