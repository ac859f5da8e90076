//! Logits and residual streams for given token ids, written as safetensors.

use std::path::Path;

use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;

use super::Stream;
use crate::backend::{Backend, Sequences};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::monitor::Monitor;

/// Rows of token ids, all of one length: `{"input_ids": [[…]]}`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct TraceInput {
    pub input_ids: Vec<Vec<u32>>,
}

impl TraceInput {
    /// Reads and checks a file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io("reading", path, &error))?;
        let input: Self = serde_json::from_str(&text).map_err(|error| {
            Error::input(format!("{} holds no token ids: {error}", path.display())).hint("write {\"input_ids\": [[1, 2, 3]]}")
        })?;
        let length = input.input_ids.first().map_or(0, Vec::len);
        if length == 0 || input.input_ids.iter().any(|row| row.len() != length) {
            return Err(Error::input(format!("{}: the rows of input_ids must have one length, and at least one token", path.display())));
        }
        Ok(input)
    }
}

/// Runs `input` through the model, block by block, and writes `logits` `[B, T, V]` and `hidden.0 … hidden.L`
/// `[B, T, hidden]` in f32: `hidden.0` is the embedding, `hidden.i` the residual stream behind block i, the last one
/// after the final norm.
pub fn trace<B: Backend>(backend: &B, checkpoint: &Checkpoint, input: &TraceInput, output: &Path, monitor: &Monitor) -> Result<()> {
    let (rows, tokens) = (input.input_ids.len(), input.input_ids[0].len());
    let batch = (input.input_ids.concat(), Sequences::new(vec![tokens; rows]));
    let mut stream = Stream::new(backend, checkpoint, std::slice::from_ref(&batch))?;
    let blocks = stream.blocks();
    let mut tensors: Vec<(String, usize, Vec<u8>)> = Vec::new();
    let bytes = |values: Vec<f32>| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    monitor.stage("trace", blocks);
    for index in 0..blocks {
        tensors.push((
            format!("hidden.{index}"),
            checkpoint.config.hidden_size,
            bytes(backend.download(&stream.boundary().get(backend, 0)?)?),
        ));
        stream.advance(index)?;
        monitor.step(index + 1, format!("block {index}"))?;
    }
    let last = stream.normalized()?.swap_remove(0);
    tensors.push((format!("hidden.{blocks}"), checkpoint.config.hidden_size, bytes(last)));
    tensors.push(("logits".into(), checkpoint.config.vocab_size, bytes(backend.download(&stream.logits(0)?)?)));
    let views = tensors
        .iter()
        .map(|(name, width, bytes)| Ok((name, TensorView::new(Dtype::F32, vec![rows, tokens, *width], bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .and_then(|views| safetensors::serialize(views, None))
        .map_err(|error| Error::run(format!("{} cannot be laid out: {error}", output.display())))?;
    crate::files::write_atomically(output, &views)
}
