//! A model that reads whole texts: with its blocks resident, or block by block when it is larger than the memory it may
//! take. Both run the same operations on the same batches, so that results do not depend on which it was.
//! Start with [`Reader::load`].

use std::path::Path;

use half::bf16;

use super::block::Block;
use super::boundary::{Boundary, WaitingRoom};
use super::hybrid::{Ends, Hybrid};
use super::need::MemoryNeed;
use crate::backend::{Backend, Sequences};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::monitor::Monitor;

/// Token ids of some sequences that are read at once.
#[derive(Debug, Clone, Copy)]
pub struct Batch<'a> {
    pub ids: &'a [u32],
    pub sequences: &'a Sequences,
}

/// How the residual stream goes from block to block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// In f32.
    None,
    /// Rounded to bf16 behind the embedding and every block, and so are the logits: some of what an engine that computes
    /// in bf16 does.
    Bf16,
}

impl Rounding {
    fn apply<B: Backend>(self, backend: &B, h: B::Tensor) -> Result<B::Tensor> {
        if self == Self::None {
            return Ok(h);
        }
        let mut values = backend.download(&h)?;
        for value in &mut values {
            *value = bf16::from_f32(*value).to_f32();
        }
        backend.upload(values, backend.features(&h))
    }
}

/// A model that reads texts.
pub struct Reader<'a, B: Backend> {
    weights: Weights<'a, B>,
}

enum Weights<'a, B: Backend> {
    Resident(Hybrid<B>),
    Streamed(Streamed<'a, B>),
}

struct Streamed<'a, B: Backend> {
    backend: B,
    checkpoint: &'a Checkpoint,
    ends: Ends<B>,
    /// Of batches between two blocks.
    room: WaitingRoom<'a>,
}

impl<'a, B: Backend> Reader<'a, B> {
    /// Loads `checkpoint` as far as `host_memory` bytes, and what is free on a device with memory of its own, allow, and says which it was: whole, or its ends with the blocks
    /// to come one by one. `scratch` is the folder for what else does not fit. `batch_tokens` is the largest batch to come.
    pub fn load(
        backend: B,
        checkpoint: &'a Checkpoint,
        host_memory: u64,
        scratch: &'a Path,
        batch_tokens: usize,
        monitor: &Monitor,
    ) -> Result<Self> {
        let need = MemoryNeed::of(checkpoint, batch_tokens)?;
        let (host, free) = (host_memory, backend.free_bytes()?);
        let host_memory = free.map_or(host, |free| free.min(host));
        monitor.log(format!("{}: {}", checkpoint.name, need.statement(host_memory)));
        if need.resident() <= host_memory {
            let model = Hybrid::load(backend, checkpoint)?.stopped_by(monitor.cancel_token());
            if let Some(free) = model.backend.free_bytes()? {
                let mb = |bytes: u64| bytes as f64 / 1e6;
                let (found, predicted) = (mb(model.resident_bytes()), mb(need.ends + need.blocks));
                monitor.log(format!(
                    "the weights take {found:.0} MB on the device, {predicted:.0} were predicted; {:.0} MB are left",
                    mb(free)
                ));
            }
            return Ok(Self { weights: Weights::Resident(model) });
        }
        let held = host_memory.checked_sub(need.streamed()).ok_or_else(|| {
            Error::input(format!("{} cannot be read: {}", checkpoint.name, need.statement(host_memory)))
                .hint("raise --host-memory where it is the limit, or read fewer tokens at a time")
        })?;
        let ends = Ends::load(&backend, checkpoint)?;
        // Beside what is read of a block on its way to the device.
        let on_host = free.map_or(0, |_| host.saturating_sub(need.streamed()));
        let ahead = free.is_some() && held >= need.largest_block;
        let held = if ahead { held - need.largest_block } else { held };
        let room = WaitingRoom { held, on_host, scratch, ahead };
        Ok(Self { weights: Weights::Streamed(Streamed { backend, checkpoint, ends, room }) })
    }

    /// What computes.
    pub fn backend(&self) -> &B {
        match &self.weights {
            Weights::Resident(model) => &model.backend,
            Weights::Streamed(streamed) => &streamed.backend,
        }
    }

    /// The whole model, when it is resident: what decoding needs.
    pub fn resident(&self) -> Option<&Hybrid<B>> {
        match &self.weights {
            Weights::Resident(model) => Some(model),
            Weights::Streamed(_) => None,
        }
    }

    /// Bytes of weights that are held.
    pub fn resident_bytes(&self) -> u64 {
        match &self.weights {
            Weights::Resident(model) => model.resident_bytes(),
            Weights::Streamed(streamed) => streamed.ends.resident_bytes(&streamed.backend),
        }
    }

    /// Reads `batches`: a streamed model now, reporting each block as a step of the stage `stage`; a resident one batch by
    /// batch as their outputs are asked for.
    pub fn pass<'p>(&'p self, batches: &'p [Batch<'p>], rounding: Rounding, stage: &str, monitor: &Monitor) -> Result<Pass<'p, B>> {
        let source = match &self.weights {
            Weights::Resident(model) => Source::Resident(model),
            Weights::Streamed(streamed) => Source::Streamed(streamed, streamed.run(batches, rounding, stage, monitor)?),
        };
        Ok(Pass { source, batches, rounding })
    }
}

impl<B: Backend> Streamed<'_, B> {
    fn run(&self, batches: &[Batch], rounding: Rounding, stage: &str, monitor: &Monitor) -> Result<Boundary<B>> {
        let (backend, blocks) = (&self.backend, self.checkpoint.layout.blocks.len());
        let tokens: Vec<usize> = batches.iter().map(|batch| batch.ids.len()).collect();
        let mut boundary = Boundary::within(self.room, &tokens, self.checkpoint.config.hidden_size)?;
        if boundary.is_spilled() {
            monitor.log(format!("{stage}: what waits between two blocks goes to a scratch file in {}", self.room.scratch.display()));
        }
        monitor.stage(&format!("{stage}, streamed"), blocks);
        for (index, batch) in batches.iter().enumerate() {
            boundary.put(backend, index, rounding.apply(backend, self.ends.embed(backend, batch.ids)?)?)?;
        }
        let load = |backend: &B, block| Block::load(backend, self.checkpoint, block);
        let mut read = None;
        for block in 0..blocks {
            let loaded = read.take().map_or_else(|| load(backend, block), Ok)?;
            let mut pass = || {
                for (index, batch) in batches.iter().enumerate() {
                    monitor.check()?;
                    let h = loaded.forward(backend, boundary.take(backend, index)?, batch.sequences, None)?;
                    boundary.put(backend, index, rounding.apply(backend, h)?)?;
                }
                Ok(())
            };
            if self.room.ahead && block + 1 < blocks {
                read = Some(backend.beside(|backend| load(backend, block + 1), pass)?);
            } else {
                pass()?;
            }
            monitor.step(block + 1, format!("block {block}"))?;
        }
        Ok(boundary)
    }
}

/// Batches that have been, or are being, read.
pub struct Pass<'p, B: Backend> {
    source: Source<'p, B>,
    batches: &'p [Batch<'p>],
    rounding: Rounding,
}

enum Source<'p, B: Backend> {
    Resident(&'p Hybrid<B>),
    Streamed(&'p Streamed<'p, B>, Boundary<B>),
}

impl<B: Backend> Pass<'_, B> {
    /// What the model says behind the tokens of batch `index`; asked for once.
    pub fn outputs(&mut self, index: usize) -> Result<Outputs<'_, B>> {
        let rounding = self.rounding;
        let (backend, ends, vocabulary, h) = match &mut self.source {
            Source::Resident(model) => {
                let Batch { ids, sequences } = self.batches[index];
                let h = model.forward_through(ids, sequences, |h| rounding.apply(&model.backend, h))?;
                (&model.backend, model.ends(), model.vocabulary(), h)
            }
            Source::Streamed(streamed, boundary) => {
                let h = boundary.take(&streamed.backend, index)?;
                (&streamed.backend, &streamed.ends, streamed.checkpoint.config.vocab_size, h)
            }
        };
        Ok(Outputs { backend, ends, h, rounding, vocabulary })
    }
}

/// The residual stream behind the last block for one batch.
pub struct Outputs<'p, B: Backend> {
    backend: &'p B,
    ends: &'p Ends<B>,
    h: B::Tensor,
    rounding: Rounding,
    vocabulary: usize,
}

impl<B: Backend> Outputs<'_, B> {
    /// Columns of the logits.
    pub fn vocabulary(&self) -> usize {
        self.vocabulary
    }

    /// Logits `[tokens, vocabulary]` of every token.
    pub fn logits(&self) -> Result<B::Tensor> {
        self.rounding.apply(self.backend, self.ends.logits(self.backend, &self.h)?)
    }

    /// Logits of the rows `tokens`.
    pub fn logits_at(&self, tokens: &[usize]) -> Result<B::Tensor> {
        self.rounding.apply(self.backend, self.ends.logits_at(self.backend, &self.h, tokens)?)
    }
}
