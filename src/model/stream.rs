//! The model one block at a time: batches wait at a block boundary while the block is loaded, so that memory holds
//! one block and one boundary, whatever the size of the checkpoint.

use super::block::{Block, Tap};
use super::hybrid::Ends;
use crate::backend::{Backend, Sequences};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::monitor::Monitor;

/// Batches of token sequences at a block boundary of `checkpoint`.
pub struct Stream<'a, B: Backend> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
    ends: Ends<B>,
    sequences: Vec<Sequences>,
    boundary: Vec<B::Tensor>,
}

impl<'a, B: Backend> Stream<'a, B> {
    /// Embeds `batches` of (token ids, sequences).
    pub fn new(backend: &'a B, checkpoint: &'a Checkpoint, batches: &[(Vec<u32>, Sequences)]) -> Result<Self> {
        let ends = Ends::load(backend, checkpoint)?;
        let boundary = batches.iter().map(|(ids, _)| ends.embed(backend, ids)).collect::<Result<_>>()?;
        Ok(Self { backend, checkpoint, ends, sequences: batches.iter().map(|(_, sequences)| sequences.clone()).collect(), boundary })
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.checkpoint.layout.blocks.len()
    }

    /// Runs block `index` over every batch.
    pub fn advance(&mut self, index: usize) -> Result<()> {
        let block = Block::load(self.backend, self.checkpoint, index)?;
        for (h, sequences) in self.boundary.iter_mut().zip(&self.sequences) {
            *h = block.forward(self.backend, h.clone(), sequences, None)?;
        }
        Ok(())
    }

    /// Runs block `index` over every batch; `tap` sees the input of each of its linears.
    pub fn advance_observed(&mut self, index: usize, tap: &Tap<'_, B>) -> Result<()> {
        let block = Block::load(self.backend, self.checkpoint, index)?;
        for (h, sequences) in self.boundary.iter_mut().zip(&self.sequences) {
            let mixed = block.mix(self.backend, h, sequences, None, Some(tap))?;
            *h = self.backend.add(h.clone(), &mixed)?;
        }
        Ok(())
    }

    /// Runs every block, reporting each.
    pub fn run(&mut self, monitor: &Monitor, stage: &str) -> Result<()> {
        monitor.stage(stage, self.blocks());
        for index in 0..self.blocks() {
            self.advance(index)?;
            monitor.step(index + 1, format!("block {index}"))?;
        }
        Ok(())
    }

    /// The residual stream of each batch at the boundary reached, `[tokens, hidden]`.
    pub fn boundary(&self) -> &[B::Tensor] {
        &self.boundary
    }

    /// The residual stream after the final norm of each batch.
    pub fn normalized(&self) -> Result<Vec<Vec<f32>>> {
        self.boundary.iter().map(|h| self.ends.normalize(self.backend, h)).collect()
    }

    /// Logits of the rows `tokens` of batch `batch`.
    pub fn logits_at(&self, batch: usize, tokens: &[usize]) -> Result<B::Tensor> {
        self.ends.logits_at(self.backend, &self.boundary[batch], tokens)
    }

    /// Logits of batch `batch`, `[tokens, vocabulary]`.
    pub fn logits(&self, batch: usize) -> Result<B::Tensor> {
        self.ends.logits(self.backend, &self.boundary[batch])
    }
}
