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
    /// Whether there is room for the next block, too.
    ahead: bool,
    /// A block that was read ahead, and its index.
    next: Option<(usize, Block<B>)>,
}

impl<'a, B: Backend> Stream<'a, B> {
    /// Embeds `batches` of (token ids, sequences), which wait in memory.
    pub fn new(backend: &'a B, checkpoint: &'a Checkpoint, batches: &[(Vec<u32>, Sequences)]) -> Result<Self> {
        Self::embed(backend, checkpoint, batches, Boundary::held(batches.len()), false)
    }

    /// The same for batches that wait where `room` allows.
    pub fn within(backend: &'a B, checkpoint: &'a Checkpoint, batches: &[(Vec<u32>, Sequences)], room: WaitingRoom<'_>) -> Result<Self> {
        let tokens: Vec<usize> = batches.iter().map(|(ids, _)| ids.len()).collect();
        Self::embed(backend, checkpoint, batches, Boundary::within(room, &tokens, checkpoint.config.hidden_size)?, room.ahead)
    }

    fn embed(
        backend: &'a B,
        checkpoint: &'a Checkpoint,
        batches: &[(Vec<u32>, Sequences)],
        mut boundary: Boundary<B>,
        ahead: bool,
    ) -> Result<Self> {
        let ends = Ends::load(backend, checkpoint)?;
        for (index, (ids, _)) in batches.iter().enumerate() {
            boundary.put(backend, index, ends.embed(backend, ids)?)?;
        }
        let sequences = batches.iter().map(|(_, sequences)| sequences.clone()).collect();
        Ok(Self { backend, checkpoint, ends, sequences, boundary, ahead, next: None })
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
        self.pass(index, |backend, block, h, sequences| block.forward(backend, h, sequences, None))
    }

    /// Runs block `index` over every batch; `tap` sees the input of each of its linears.
    pub fn advance_observed(&mut self, index: usize, tap: &Tap<'_, B>) -> Result<()> {
        self.pass(index, |backend, block, h, sequences| {
            let mixed = block.mix(backend, &h, sequences, None, Some(tap))?;
            backend.add(h, &mixed)
        })
    }

    /// Takes every batch through block `index`; the next block is read meanwhile where there is room for it.
    fn pass(&mut self, index: usize, mut through: impl FnMut(&B, &Block<B>, B::Tensor, &Sequences) -> Result<B::Tensor>) -> Result<()> {
        let (backend, checkpoint) = (self.backend, self.checkpoint);
        let block = match self.next.take() {
            Some((read, block)) if read == index => block,
            _ => Block::load(backend, checkpoint, index)?,
        };
        let next = self.ahead.then_some(index + 1).filter(|next| *next < self.blocks());
        let (sequences, boundary) = (&self.sequences, &mut self.boundary);
        let mut batches = || {
            for (batch, sequences) in sequences.iter().enumerate() {
                let h = through(backend, &block, boundary.take(backend, batch)?, sequences)?;
                boundary.put(backend, batch, h)?;
            }
            Ok(())
        };
        match next {
            Some(next) => {
                let block = backend.beside(|backend| Block::load(backend, checkpoint, next), batches)?;
                self.next = Some((next, block));
                Ok(())
            }
            None => batches(),
        }
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
