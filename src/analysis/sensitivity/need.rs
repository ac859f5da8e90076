//! What a measurement takes of memory, said before it starts.

use super::{Request, units};
use crate::analysis::reference;
use crate::checkpoint::BlockSpec;
use crate::error::Result;
use crate::quant::{MemoryNeed, Sample};

/// Residual streams beside those of the candidates: the unquantized one, in both bases, and what a block adds to it.
const STREAMS: usize = 3;

/// The need in words, estimated from shapes: donors are made first, and losses are measured when that is over.
pub(super) fn statement(request: &Request<'_>) -> Result<String> {
    let (checkpoint, layout) = (request.checkpoint, &request.checkpoint.layout);
    let hidden = checkpoint.config.hidden_size;
    let tokens = |sample: &Sample| sample.sequences.iter().map(Vec::len).sum::<usize>();
    let donors = MemoryNeed::of(layout, hidden, tokens(&request.calibration), request.steps.method.uses_hessians());
    let stream = tokens(&request.measured) * hidden;
    let units = units(layout, request.by);
    let candidates = |block: &BlockSpec| units.iter().filter(|unit| unit.block == block.index).count() * request.formats.len();
    let beside = layout.blocks.iter().map(candidates).max().unwrap_or(0).min(reference::held_streams(stream));
    let streams = 4 * ((beside + STREAMS) * stream) as u64;
    let logits = 4 * (request.scored_tokens() * checkpoint.config.vocab_size) as u64;
    let ends = checkpoint.loaded_bytes([&layout.embedding, &layout.head])?;
    let mb = |bytes: u64| format!("{:.0} MB", bytes as f64 / 1e6);
    Ok(format!(
        "needs about {} of memory for donors, then {}: {} for logits, {} for residual streams, {} for embedding and head, {} for a block",
        mb(donors.total()),
        mb(logits + streams + ends + donors.block),
        mb(logits),
        mb(streams),
        mb(ends),
        mb(donors.block)
    ))
}
