//! What quantizing takes of the host's memory, before it starts.

use crate::backend::Backend;
use crate::checkpoint::{BlockSpec, Layout, LinearSpec};
use crate::error::{Error, Result};

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

    /// An error when a device with memory of its own has less free.
    pub fn check<B: Backend>(&self, backend: &B) -> Result<()> {
        let total = self.streams + self.block + self.statistics;
        let Some(free) = backend.free_bytes()?.filter(|free| total > *free) else { return Ok(()) };
        let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64);
        let share = free.saturating_sub(self.block + self.statistics) as f64 / self.streams as f64;
        let hint =
            if share > 0.0 { format!("{:.0} % of the sample would fit", 100.0 * share) } else { "not even the largest block fits".into() };
        Err(Error::input(format!("quantizing takes about {} on {}, where {} are free", gib(total), backend.name(), gib(free)))
            .hint(format!("{hint}; take fewer or shorter sequences, or --device cpu")))
    }

    /// In words.
    pub fn statement(&self) -> String {
        let mb = |bytes: u64| format!("{:.0} MB", bytes as f64 / 1e6);
        let total = mb(self.streams + self.block + self.statistics);
        let (streams, block, statistics) = (mb(self.streams), mb(self.block), mb(self.statistics));
        format!("needs about {total} of memory: {streams} for the sample, {block} for the largest block, {statistics} for its statistics")
    }
}
