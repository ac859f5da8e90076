//! What quantizing takes of the host's memory, before it starts.

use crate::checkpoint::{BlockSpec, Layout, LinearSpec};
use crate::error::{Error, Result};

/// Residual streams that wait at a time: the float and the quantized one in front of a block, and the float one behind it.
const STREAMS: u64 = 3;

/// Bytes of a weight while it is quantized: in f64, three times in f32, and its code.
const WEIGHT: u64 = 8 + 3 * 4 + 2;

/// Bytes of memory, estimated from shapes. One block is in memory at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Residual streams of the sample, [`STREAMS`] of them.
    pub streams: u64,
    /// The largest block: in f64 for the transforms, three times in f32 (checkpoint's, transformed, quantized) and as codes.
    pub block: u64,
    /// The same of embedding or head, the larger of the two; no block is there meanwhile.
    pub ends: u64,
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
            streams: STREAMS * 4 * (tokens * hidden) as u64,
            block: WEIGHT * layout.blocks.iter().map(weights).max().unwrap_or(0),
            ends: WEIGHT * layout.embedding.weights().max(layout.head.weights()),
            statistics: if hessians { layout.blocks.iter().map(moments).max().unwrap_or(0) } else { 0 },
        }
    }

    /// Bytes that one of the sample's streams may take of `limit` bytes of memory; an error where the largest block does not
    /// fit into them.
    pub fn held(&self, limit: u64) -> Result<u64> {
        limit.checked_sub(self.weights()).map(|left| left / STREAMS).ok_or_else(|| {
            let (block, statistics, ends, limit) = (mb(self.block), mb(self.statistics), mb(self.ends), mb(limit));
            let needs = format!("{block} for the largest block and {statistics} for its statistics, or {ends} for embedding or head");
            Error::input(format!("quantizing takes about {needs}, and {limit} of memory may be taken"))
                .hint("raise --host-memory, or take a recipe without GPTQ")
        })
    }

    /// What is taken beside the streams.
    fn weights(&self) -> u64 {
        (self.block + self.statistics).max(self.ends)
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.streams + self.weights()
    }

    /// In words.
    pub fn statement(&self) -> String {
        let total = mb(self.total());
        let (streams, block, statistics, ends) = (mb(self.streams), mb(self.block), mb(self.statistics), mb(self.ends));
        let weights = format!("{block} for the largest block and {statistics} for its statistics, or {ends} for embedding or head");
        format!("needs about {total} of memory: {streams} for the sample, {weights}")
    }
}

fn mb(bytes: u64) -> String {
    format!("{:.0} MB", bytes as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn streams_share_what_a_block_leaves() {
        let need = MemoryNeed { streams: 300, block: 50, ends: 70, statistics: 50 };
        assert_eq!(need.held(400).unwrap(), 100);
        assert_eq!(need.held(100).unwrap(), 0);
        assert!(need.held(99).unwrap_err().hint.unwrap().contains("--host-memory"));
    }
}
