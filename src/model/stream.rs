//! The model one block at a time: batches wait at a block boundary while the block is loaded, so that memory holds
//! one block and one boundary, whatever the size of the checkpoint.

use super::block::{Block, Tap};
use super::boundary::{Boundary, WaitingRoom};
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
    boundary: Boundary<B>,
}

impl<'a, B: Backend> Stream<'a, B> {
    /// Embeds `batches` of (token ids, sequences), which wait in memory.
    pub fn new(backend: &'a B, checkpoint: &'a Checkpoint, batches: &[(Vec<u32>, Sequences)]) -> Result<Self> {
        Self::embed(backend, checkpoint, batches, Boundary::held(batches.len()))
    }

    /// The same for batches that wait where `room` allows.
    pub fn within(backend: &'a B, checkpoint: &'a Checkpoint, batches: &[(Vec<u32>, Sequences)], room: WaitingRoom<'_>) -> Result<Self> {
        let tokens: Vec<usize> = batches.iter().map(|(ids, _)| ids.len()).collect();
        Self::embed(backend, checkpoint, batches, Boundary::within(room, &tokens, checkpoint.config.hidden_size)?)
    }

    fn embed(backend: &'a B, checkpoint: &'a Checkpoint, batches: &[(Vec<u32>, Sequences)], mut boundary: Boundary<B>) -> Result<Self> {
        let ends = Ends::load(backend, checkpoint)?;
        for (index, (ids, _)) in batches.iter().enumerate() {
            boundary.put(backend, index, ends.embed(backend, ids)?)?;
        }
        Ok(Self { backend, checkpoint, ends, sequences: batches.iter().map(|(_, sequences)| sequences.clone()).collect(), boundary })
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.checkpoint.layout.blocks.len()
    }

    /// Tokens of all batches.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Sequences::tokens).sum()
    }

    /// Runs block `index` over every batch.
    pub fn advance(&mut self, index: usize) -> Result<()> {
        let block = Block::load(self.backend, self.checkpoint, index)?;
        for (batch, sequences) in self.sequences.iter().enumerate() {
            let h = block.forward(self.backend, self.boundary.take(self.backend, batch)?, sequences, None)?;
            self.boundary.put(self.backend, batch, h)?;
        }
        Ok(())
    }

    /// Runs block `index` over every batch; `tap` sees the input of each of its linears.
    pub fn advance_observed(&mut self, index: usize, tap: &Tap<'_, B>) -> Result<()> {
        let block = Block::load(self.backend, self.checkpoint, index)?;
        for (batch, sequences) in self.sequences.iter().enumerate() {
            let h = self.boundary.take(self.backend, batch)?;
            let mixed = block.mix(self.backend, &h, sequences, None, Some(tap))?;
            self.boundary.put(self.backend, batch, self.backend.add(h, &mixed)?)?;
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
    pub fn boundary(&self) -> &Boundary<B> {
        &self.boundary
    }

    /// The same, when nothing else is wanted of the stream any more.
    pub fn into_boundary(self) -> Boundary<B> {
        self.boundary
    }

    /// The residual stream after the final norm of each batch.
    pub fn normalized(&self) -> Result<Vec<Vec<f32>>> {
        self.boundary.iter(self.backend).map(|h| self.ends.normalize(self.backend, &h?)).collect()
    }

    /// Logits of the rows `tokens` of batch `batch`.
    pub fn logits_at(&self, batch: usize, tokens: &[usize]) -> Result<B::Tensor> {
        self.ends.logits_at(self.backend, &self.boundary.get(self.backend, batch)?, tokens)
    }

    /// Logits of batch `batch`, `[tokens, vocabulary]`.
    pub fn logits(&self, batch: usize) -> Result<B::Tensor> {
        self.ends.logits(self.backend, &self.boundary.get(self.backend, batch)?)
    }
}
