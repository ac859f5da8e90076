//! What quantizing takes of the host's memory, before it starts.

use crate::checkpoint::{BlockSpec, Layout, LinearSpec};
use crate::error::{Error, Result};

/// Residual streams that wait at a time: the float and the quantized one in front of a block, and the float one behind it.
const STREAMS: u64 = 3;

/// Bytes of memory, estimated from shapes. One block is in memory at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Residual streams of the sample, [`STREAMS`] of them.
    pub streams: u64,
    /// The largest block, or embedding or head where these are larger: in f64 for the transforms, three times in f32 (checkpoint's, transformed,
    /// quantized) and as codes.
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
            streams: STREAMS * 4 * (tokens * hidden) as u64,
            block: (8 + 3 * 4 + 2)
                * layout.blocks.iter().map(weights).chain([layout.embedding.weights(), layout.head.weights()]).max().unwrap_or(0),
            statistics: if hessians { layout.blocks.iter().map(moments).max().unwrap_or(0) } else { 0 },
        }
    }

    /// Bytes that one of the sample's streams may take of `limit` bytes of memory; an error where the largest block does not
    /// fit into them.
    pub fn held(&self, limit: u64) -> Result<u64> {
        limit.checked_sub(self.block + self.statistics).map(|left| left / STREAMS).ok_or_else(|| {
            Error::input(format!(
                "quantizing takes about {} for the largest block, embedding or head and {} for statistics, and {} of memory may be taken",
                mb(self.block),
                mb(self.statistics),
                mb(limit)
            ))
            .hint("raise --host-memory, or take a recipe without GPTQ")
        })
    }

    /// All of it.
    pub fn total(&self) -> u64 {
        self.streams + self.block + self.statistics
    }

    /// In words.
    pub fn statement(&self) -> String {
        let total = mb(self.total());
        let (streams, block, statistics) = (mb(self.streams), mb(self.block), mb(self.statistics));
        format!(
            "needs about {total} of memory: {streams} for the sample, {block} for the largest block, embedding or head, {statistics} for statistics"
        )
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
        let need = MemoryNeed { streams: 300, block: 50, statistics: 50 };
        assert_eq!(need.held(400).unwrap(), 100);
        assert_eq!(need.held(100).unwrap(), 0);
        assert!(need.held(99).unwrap_err().hint.unwrap().contains("--host-memory"));
    }
}
