//! What reading a model takes of the host's memory, before anything is loaded.

use crate::backend::Backend;
use crate::backend::cpu::EXPANDED;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::format::BlockKind;

/// Logits that are computed at a time, at most: 128 MiB.
pub const HEAD_VALUES: usize = 1 << 25;

/// Bytes of memory, estimated from shapes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryNeed {
    /// Embedding, final norm and head.
    pub ends: u64,
    /// All blocks, and the largest of them.
    pub blocks: u64,
    pub largest_block: u64,
    /// Activations and logits of the largest batch, and weights that are expanded to multiply them.
    pub batch: u64,
    /// The largest matrix in f32: how it comes from the checkpoint, whatever is kept of it.
    pub loading: u64,
}

impl MemoryNeed {
    /// For reading `checkpoint` in batches of up to `batch_tokens` tokens.
    pub fn of(checkpoint: &Checkpoint, batch_tokens: usize) -> Result<Self> {
        let layout = &checkpoint.layout;
        let blocks = layout.blocks.iter().map(|block| checkpoint.loaded_bytes(&block.linears)).collect::<Result<Vec<_>>>()?;
        let ends = checkpoint.loaded_bytes([&layout.embedding, &layout.head])?;
        let hidden = checkpoint.config.hidden_size;
        let linears = || layout.blocks.iter().flat_map(|block| &block.linears);
        let widest = linears().map(|linear| linear.rows.max(linear.cols)).max();
        // What each token's experts put out, behind either linear.
        let moe = &checkpoint.config.moe;
        let mixture = if layout.blocks.iter().any(|block| block.kind == BlockKind::Moe) {
            moe.experts_per_token * (2 * moe.intermediate + moe.latent.unwrap_or(hidden))
        } else {
            0
        };
        // A block holds its input, a norm of it, and about three tensors of its widest linear.
        let activations = 4 * batch_tokens * (2 * hidden + 3 * widest.unwrap_or(hidden) + mixture);
        let logits = 4 * (batch_tokens * layout.head.rows).min(HEAD_VALUES);
        let largest = linears().chain([&layout.embedding, &layout.head]).map(|linear| linear.rows * linear.cols).max().unwrap_or(0);
        Ok(Self {
            ends,
            blocks: blocks.iter().sum(),
            largest_block: blocks.iter().copied().max().unwrap_or(0),
            batch: (activations + logits + 4 * largest.min(EXPANDED)) as u64,
            loading: 4 * largest as u64,
        })
    }

    /// With every block loaded.
    pub fn resident(&self) -> u64 {
        self.ends + self.blocks + self.batch.max(self.loading)
    }

    /// An error when the model does not fit whole into what is free on the device of `backend`.
    pub fn check<B: Backend>(&self, backend: &B, name: &str) -> Result<()> {
        let whole = self.ends + self.blocks + self.batch;
        let Some(free) = backend.free_bytes()?.filter(|free| whole > *free) else { return Ok(()) };
        let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / (1_u64 << 30) as f64);
        let share = free.saturating_sub(self.batch) as f64 / (self.ends + self.blocks) as f64;
        Err(Error::input(format!("{name} takes about {} on {}, where {} are free", gib(whole), backend.name(), gib(free))).hint(format!(
            "a variant of at most {:.0} % of its bytes would fit; `eval` streams what does not, or take --device cpu",
            100.0 * share
        )))
    }

    /// With one block loaded at a time, batches between blocks not counted.
    pub fn streamed(&self) -> u64 {
        self.ends + self.largest_block + self.batch.max(self.loading)
    }

    /// The need against what there is, in words.
    pub fn statement(&self, host_memory: u64) -> String {
        let mb = |bytes: u64| format!("{:.0} MB", bytes as f64 / 1e6);
        let (resident, streamed, limit) = (mb(self.resident()), mb(self.streamed()), mb(host_memory));
        if self.resident() <= host_memory {
            format!("about {resident} of memory, {limit} may be taken")
        } else {
            format!("about {resident} of memory whole, {streamed} and what waits between blocks block by block; {limit} may be taken")
        }
    }
}
