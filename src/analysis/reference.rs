//! What the unquantized model says about some token sequences, and how far other residual streams and plans are from it.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use crate::backend::{Backend, Sequences};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::eval::statistics;
use crate::format::{Format, Plan};
use crate::model::{Block, Ends, Stream};
use crate::monitor::Monitor;
use crate::quant::Donors;

/// Values of the residual streams that wait at a boundary together: 512 MiB.
const HELD_VALUES: usize = 1 << 27;

/// Residual streams of `values` values each that are held at a time.
pub fn held_streams(values: usize) -> usize {
    (HELD_VALUES / values.max(1)).max(1)
}

/// Token sequences with the unquantized model's logits at some positions of each.
pub struct Reference<'a, B: Backend> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
    ends: Ends<B>,
    ids: Vec<Vec<u32>>,
    sequences: Vec<Sequences>,
    /// Scored rows of each sequence.
    positions: Vec<Vec<usize>>,
    /// `[positions, vocabulary]` of each sequence.
    logits: Vec<B::Tensor>,
}

impl<'a, B: Backend> Reference<'a, B> {
    /// Runs the model over `ids`, and keeps the logits of `positions` tokens of each sequence, evenly spaced.
    pub fn new(backend: &'a B, checkpoint: &'a Checkpoint, ids: &[Vec<u32>], positions: usize, monitor: &Monitor) -> Result<Self> {
        let spaced = |length: usize| {
            let count = positions.clamp(1, length);
            (0..count).map(|i| (2 * i + 1) * length / (2 * count)).collect::<Vec<_>>()
        };
        let mut reference = Self {
            backend,
            checkpoint,
            ends: Ends::load(backend, checkpoint)?,
            ids: ids.to_vec(),
            sequences: ids.iter().map(|ids| Sequences::new(vec![ids.len()])).collect(),
            positions: ids.iter().map(|ids| spaced(ids.len())).collect(),
            logits: Vec::new(),
        };
        let mut stream = reference.stream()?;
        stream.run(monitor, "reference")?;
        let logits = |(h, rows): (Result<B::Tensor>, &Vec<usize>)| reference.ends.logits_at(backend, &h?, rows);
        reference.logits = stream.boundary().iter(backend).zip(&reference.positions).map(logits).collect::<Result<_>>()?;
        Ok(reference)
    }

    /// The sequences in front of the unquantized model's first block.
    pub fn stream(&self) -> Result<Stream<'a, B>> {
        let batches: Vec<(Vec<u32>, Sequences)> = self.ids.iter().cloned().zip(self.sequences.iter().cloned()).collect();
        Stream::new(self.backend, self.checkpoint, &batches)
    }

    /// Token ids of each sequence.
    pub fn ids(&self) -> &[Vec<u32>] {
        &self.ids
    }

    /// The range of each sequence's tokens, for a block.
    pub fn sequences(&self) -> &[Sequences] {
        &self.sequences
    }

    /// Residual streams of all sequences that are held at a time.
    pub fn held_streams(&self) -> usize {
        held_streams(self.ids.iter().map(Vec::len).sum::<usize>() * self.checkpoint.config.hidden_size)
    }

    /// Runs the unquantized blocks from `first` on over residual streams that differ from the model's own, each a tensor a
    /// sequence.
    pub fn run_from(&self, first: usize, streams: &mut [Vec<B::Tensor>], monitor: &Monitor) -> Result<()> {
        for index in first..self.checkpoint.layout.blocks.len() {
            let block = Block::load(self.backend, self.checkpoint, index)?;
            for stream in &mut *streams {
                *stream = self.advance(&block, std::mem::take(stream))?;
                monitor.check()?;
            }
        }
        Ok(())
    }

    /// The unquantized head's logits of rows of a stream behind the last block.
    pub fn logits(&self, h: &B::Tensor, rows: &[usize]) -> Result<B::Tensor> {
        self.ends.logits_at(self.backend, h, rows)
    }

    /// Mean divergence of every sequence's scored tokens, in nats, for the logits that `logits` computes from rows of a
    /// stream behind the last block.
    pub fn divergence(&self, stream: &[B::Tensor], logits: impl Fn(&B::Tensor, &[usize]) -> Result<B::Tensor>) -> Result<Vec<f64>> {
        let of_sequence = |((h, rows), reference): ((&B::Tensor, &Vec<usize>), &B::Tensor)| {
            let rows = self.backend.divergence(reference, &logits(h, rows)?)?;
            // Rounding can put the divergence of equal rows a little below zero.
            Ok(statistics::mean(&rows.iter().map(|row| row.kl.max(0.0)).collect::<Vec<_>>()))
        };
        stream.iter().zip(&self.positions).zip(&self.logits).map(of_sequence).collect()
    }

    /// Runs a block over a stream.
    pub fn advance(&self, block: &Block<B>, stream: Vec<B::Tensor>) -> Result<Vec<B::Tensor>> {
        stream.into_iter().zip(&self.sequences).map(|(h, sequences)| block.forward(self.backend, h, sequences, None)).collect()
    }

    /// Divergence of models put together from `donors` after `plans`, by plan and sequence. Several models go through the
    /// blocks side by side, so that a block's weights are transformed once for all of them.
    pub fn divergence_of_plans(&self, donors: &Donors, plans: &[Plan], monitor: &Monitor, stage: &str) -> Result<Vec<Vec<f64>>> {
        let (backend, checkpoint) = (self.backend, self.checkpoint);
        let blocks = checkpoint.layout.blocks.len();
        let groups = plans.chunks(self.held_streams());
        monitor.stage(stage, groups.len() * blocks);
        let mut divergence = Vec::with_capacity(plans.len());
        let mut done = 0;
        for plans in groups {
            let embed = |plan: &Plan| {
                let table = donors.embedding(backend, checkpoint, plan.embedding)?;
                self.ids.iter().map(|ids| backend.embed(&table, ids)).collect::<Result<Vec<_>>>()
            };
            let mut streams = plans.iter().map(embed).collect::<Result<Vec<_>>>()?;
            for spec in &checkpoint.layout.blocks {
                let weights = donors.block(backend, checkpoint, spec)?;
                for (plan, stream) in plans.iter().zip(&mut streams) {
                    let block = weights.prepare(backend, |linear, slice| Some(plan.slice(spec.index, &linear.stem, slice)))?;
                    *stream = self.advance(&block, std::mem::take(stream))?;
                    monitor.check()?;
                }
                done += 1;
                monitor.step(done, format!("block {}, {} plans side by side", spec.index, plans.len()))?;
            }
            let mut heads: BTreeMap<Format, B::Linear> = BTreeMap::new();
            for (plan, stream) in plans.iter().zip(&streams) {
                let head = match heads.entry(plan.head) {
                    Entry::Occupied(entry) => entry.into_mut(),
                    Entry::Vacant(entry) => entry.insert(donors.head(backend, checkpoint, plan.head)?),
                };
                let logits = |h: &B::Tensor, rows: &[usize]| donors.logits(backend, checkpoint, head, &backend.gather_rows(h, rows)?);
                divergence.push(self.divergence(stream, logits)?);
            }
        }
        Ok(divergence)
    }
}
