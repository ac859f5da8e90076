//! What is measured on the sample: the second moment of the normalised residual stream, and the Hessian of each linear.

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::backend::{Backend, Emit, Sequences};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::model::{Block, Stream};
use crate::monitor::Monitor;

/// Second moment `[hidden, hidden]` of `h / rms(h)` in front of the blocks, averaged over them: a pass of the float
/// model over the sample.
pub fn second_moment<B: Backend>(
    backend: &B,
    checkpoint: &Checkpoint,
    batches: &[(Vec<u32>, Sequences)],
    monitor: &Monitor,
) -> Result<Vec<f64>> {
    let hidden = checkpoint.config.hidden_size;
    let ones = backend.prepare_vector(vec![1.0; hidden])?;
    let mut sum = vec![0.0; hidden * hidden];
    let mut stream = Stream::new(backend, checkpoint, batches)?;
    monitor.stage("calibrate", stream.blocks());
    for index in 0..stream.blocks() {
        for h in stream.boundary() {
            let x = backend.rms_norm(h, &ones, checkpoint.config.norm_eps, Emit::FLOAT)?;
            add(&mut sum, &backend.gram(&x)?);
        }
        stream.advance(index)?;
        monitor.step(index + 1, format!("block {index}"))?;
    }
    let tokens: usize = batches.iter().map(|(ids, _)| ids.len()).sum();
    let count = (tokens * stream.blocks()) as f64;
    Ok(sum.into_iter().map(|value| value / count).collect())
}

/// `Σ x xᵀ` of the input of each linear of `block` (float) over the batches, by the linear's name.
pub fn hessians<B: Backend>(
    backend: &B,
    block: &Block<B>,
    inputs: &[B::Tensor],
    sequences: &[Sequences],
    monitor: &Monitor,
) -> Result<BTreeMap<String, Vec<f64>>> {
    let sums: RefCell<BTreeMap<String, Vec<f64>>> = RefCell::new(BTreeMap::new());
    let tap = |name: &str, x: &B::Activation| {
        let gram = backend.gram(x)?;
        sums.borrow_mut().entry(name.to_owned()).and_modify(|sum| add(sum, &gram)).or_insert(gram);
        Ok(())
    };
    for (h, sequences) in inputs.iter().zip(sequences) {
        monitor.check()?;
        block.mix(backend, h, sequences, None, Some(&tap))?;
    }
    Ok(sums.into_inner())
}

/// Adds `values` to `sum`, element by element.
pub fn add(sum: &mut [f64], values: &[f64]) {
    for (sum, value) in sum.iter_mut().zip(values) {
        *sum += value;
    }
}
