//! The whole model with its blocks resident: prefill, decoding, hidden states.

use super::block::{Block, BlockCache};
use super::need::MemoryNeed;
use crate::backend::{Backend, Emit, Sequences};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::format::{CacheFormats, LinearWeights};
use crate::monitor::CancelToken;

/// What stands before and behind the blocks: embedding, final norm and head.
pub struct Ends<B: Backend> {
    embedding: B::Embedding,
    final_norm: B::Vector,
    eps: f32,
    head: B::Linear,
}

impl<B: Backend> Ends<B> {
    /// Loads embedding, final norm and head of `checkpoint`.
    pub fn load(backend: &B, checkpoint: &Checkpoint) -> Result<Self> {
        let norm = checkpoint.read("norm_f.weight")?;
        Self::new(backend, checkpoint.embedding()?, norm, checkpoint.config.norm_eps, checkpoint.head()?)
    }

    /// Ends with these weights: embedding table `[vocabulary, hidden]`, final norm, head.
    pub fn new(backend: &B, table: LinearWeights, final_norm: Vec<f32>, eps: f32, head: LinearWeights) -> Result<Self> {
        let (embedding, final_norm) = (backend.prepare_embedding(table)?, backend.prepare_vector(final_norm)?);
        Ok(Self { embedding, final_norm, eps, head: backend.prepare(head)? })
    }

    /// The residual stream in front of the first block, `[tokens, hidden]`.
    pub fn embed(&self, backend: &B, ids: &[u32]) -> Result<B::Tensor> {
        backend.embed(&self.embedding, ids)
    }

    /// The residual stream after the final norm, `[tokens, hidden]`.
    pub fn normalize(&self, backend: &B, h: &B::Tensor) -> Result<Vec<f32>> {
        let rows = backend.rms_norm(h, &self.final_norm, self.eps, Emit::FLOAT)?;
        backend.floats(&rows)
    }

    /// Logits `[tokens, vocabulary]` of the residual stream behind the last block.
    pub fn logits(&self, backend: &B, h: &B::Tensor) -> Result<B::Tensor> {
        let x = backend.rms_norm(h, &self.final_norm, self.eps, backend.reads(&self.head))?;
        backend.linear(&self.head, &x)
    }

    /// Logits of the rows `tokens` only.
    pub fn logits_at(&self, backend: &B, h: &B::Tensor, tokens: &[usize]) -> Result<B::Tensor> {
        self.logits(backend, &backend.gather_rows(h, tokens)?)
    }

    /// Bytes on the device.
    pub fn resident_bytes(&self, backend: &B) -> u64 {
        backend.embedding_bytes(&self.embedding) + backend.resident_bytes(&self.head)
    }
}

/// What the blocks of a model remember of the tokens they have seen.
pub struct Cache<B: Backend> {
    blocks: Vec<BlockCache<B>>,
    sequences: usize,
    /// The last decoding step, where the device can do it again.
    step: Option<B::Recording>,
    /// Whether a step was done: the first compiles and allocates what later ones reuse.
    warm: bool,
}

/// A model whose blocks are all on the device.
pub struct Hybrid<B: Backend> {
    pub backend: B,
    ends: Ends<B>,
    blocks: Vec<Block<B>>,
    vocabulary: usize,
    caches: CacheFormats,
    cancel: CancelToken,
}

impl<B: Backend> Hybrid<B> {
    /// A model of these parts.
    pub fn new(backend: B, ends: Ends<B>, blocks: Vec<Block<B>>, vocabulary: usize, caches: CacheFormats) -> Self {
        Self { backend, ends, blocks, vocabulary, caches, cancel: CancelToken::default() }
    }

    /// Loads every block of `checkpoint`; an error when they cannot all be on the device.
    pub fn load(backend: B, checkpoint: &Checkpoint) -> Result<Self> {
        MemoryNeed::of(checkpoint, 1)?.check(&backend, &checkpoint.name)?;
        let ends = Ends::load(&backend, checkpoint)?;
        let blocks = (0..checkpoint.layout.blocks.len()).map(|index| Block::load(&backend, checkpoint, index)).collect::<Result<_>>()?;
        let caches = checkpoint.variant.as_ref().map(|variant| variant.cache).unwrap_or_default();
        Ok(Self { ends, blocks, vocabulary: checkpoint.config.vocab_size, caches, backend, cancel: CancelToken::default() })
    }

    /// The same model, whose passes end between two blocks, with an error, once `cancel` says so.
    #[must_use]
    pub fn stopped_by(self, cancel: CancelToken) -> Self {
        Self { cancel, ..self }
    }

    /// Tokens that the model knows.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// How the model keeps its caches.
    pub fn cache_formats(&self) -> CacheFormats {
        self.caches
    }

    /// An empty cache for `sequences` sequences, in the formats that the variant was made for.
    pub fn cache(&self, sequences: usize) -> Cache<B> {
        let blocks = self.blocks.iter().map(|block| block.cache(&self.backend, sequences, self.caches)).collect();
        Cache { blocks, sequences, step: None, warm: false }
    }

    /// Bytes that `cache` takes now: (SSM states and convolution windows, keys and values).
    pub fn cache_bytes(&self, cache: &Cache<B>) -> (u64, u64) {
        let bytes = |block: &BlockCache<B>| match block {
            BlockCache::Ssm(cache) => (self.backend.ssm_cache_bytes(cache), 0),
            BlockCache::KeyValue(cache) => (0, self.backend.kv_cache_bytes(cache)),
            BlockCache::None => (0, 0),
        };
        cache.blocks.iter().map(bytes).fold((0, 0), |sum, bytes| (sum.0 + bytes.0, sum.1 + bytes.1))
    }

    /// The residual stream behind the last block for tokens `ids` of `sequences`, going on from `cache` if given.
    pub fn forward(&self, ids: &[u32], sequences: &Sequences, cache: Option<&mut Cache<B>>) -> Result<B::Tensor> {
        if ids.len() != sequences.tokens() {
            return Err(Error::run(format!("{} token ids were given for sequences of {} tokens", ids.len(), sequences.tokens())));
        }
        let mut h = self.ends.embed(&self.backend, ids)?;
        let mut caches = cache.map(|cache| cache.blocks.iter_mut());
        for block in &self.blocks {
            self.cancel.check()?;
            h = block.forward(&self.backend, h, sequences, caches.as_mut().and_then(Iterator::next))?;
        }
        Ok(h)
    }

    /// [`Hybrid::forward`] without a cache, the residual stream being handed through `between` behind the embedding and
    /// every block.
    pub fn forward_through(
        &self,
        ids: &[u32],
        sequences: &Sequences,
        between: impl Fn(B::Tensor) -> Result<B::Tensor>,
    ) -> Result<B::Tensor> {
        let mut h = between(self.ends.embed(&self.backend, ids)?)?;
        for block in &self.blocks {
            self.cancel.check()?;
            h = between(block.forward(&self.backend, h, sequences, None)?)?;
        }
        Ok(h)
    }

    /// Embedding, final norm and head.
    pub(super) fn ends(&self) -> &Ends<B> {
        &self.ends
    }

    /// Logits `[tokens, vocabulary]`.
    pub fn logits(&self, ids: &[u32], sequences: &Sequences, cache: Option<&mut Cache<B>>) -> Result<B::Tensor> {
        let h = self.forward(ids, sequences, cache)?;
        self.ends.logits(&self.backend, &h)
    }

    /// Logits of the last token of each sequence, `[sequences, vocabulary]`.
    pub fn last_logits(&self, ids: &[u32], sequences: &Sequences, cache: Option<&mut Cache<B>>) -> Result<B::Tensor> {
        let h = self.forward(ids, sequences, cache)?;
        let last: Vec<usize> = sequences.ranges().map(|range| range.end - 1).collect();
        self.ends.logits_at(&self.backend, &h, &last)
    }

    /// A decoding step: `ids` has a token for each sequence of `cache`. Logits `[sequences, vocabulary]`, which hold until
    /// the next step.
    pub fn step(&self, ids: &[u32], cache: &mut Cache<B>) -> Result<B::Tensor> {
        if let Some(mut step) = cache.step.take() {
            if let Some(logits) = self.backend.replay(&mut step, ids)? {
                cache.step = Some(step);
                return Ok(logits);
            }
            cache.warm = false;
        }
        let sequences = Sequences::steps(cache.sequences);
        if cache.warm
            && self.blocks.iter().all(|block| block.is_recordable(&self.backend))
            && let Some((step, logits)) = self.backend.record(&mut || self.last_logits(ids, &sequences, Some(&mut *cache)))?
        {
            cache.step = Some(step);
            return Ok(logits);
        }
        cache.warm = true;
        self.last_logits(ids, &sequences, Some(cache))
    }

    /// Logits of the rows `tokens` of `forward`'s result.
    pub fn logits_at(&self, h: &B::Tensor, tokens: &[usize]) -> Result<B::Tensor> {
        self.ends.logits_at(&self.backend, h, tokens)
    }

    /// Bytes of weights that a decoding step of so many sequences reads: blocks and head; of a mixture as many experts as the
    /// tokens may choose.
    pub fn read_bytes(&self, sequences: usize) -> u64 {
        let blocks: u64 = self.blocks.iter().map(|block| block.read_bytes(&self.backend, sequences)).sum();
        self.ends.resident_bytes(&self.backend) - self.backend.embedding_bytes(&self.ends.embedding) + blocks
    }

    /// Bytes of weights on the device.
    pub fn resident_bytes(&self) -> u64 {
        self.ends.resident_bytes(&self.backend) + self.blocks.iter().map(|block| block.resident_bytes(&self.backend)).sum::<u64>()
    }
}
