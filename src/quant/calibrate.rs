//! What is measured on the sample: the second moment of the normalised residual stream, and by linear the largest
//! magnitudes and the Hessian of its input.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::Range;

use super::hessian::Summed;
use crate::backend::{Backend, Emit, Sequences};
use crate::checkpoint::{BlockSpec, Checkpoint};
use crate::error::{Error, Result};
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
    let mut sum = None;
    let mut stream = Stream::new(backend, checkpoint, batches)?;
    monitor.stage("calibrate", stream.blocks());
    for index in 0..stream.blocks() {
        for h in stream.boundary() {
            let x = backend.rms_norm(h, &ones, checkpoint.config.norm_eps, Emit::FLOAT)?;
            if backend.largest_magnitudes(&x)?.iter().any(|value| !value.is_finite()) {
                return Err(Error::run(format!("the residual stream in front of block {index} is not finite on the calibration text"))
                    .hint("the unquantized model overflows: check the checkpoint"));
            }
            backend.add_gram(&mut sum, &x)?;
        }
        stream.advance(index)?;
        monitor.step(index + 1, format!("block {index}"))?;
    }
    let tokens: usize = batches.iter().map(|(ids, _)| ids.len()).sum();
    let count = (tokens * stream.blocks()) as f64;
    let Some(sum) = sum else { return Ok(vec![0.0; hidden * hidden]) };
    Ok(backend.gram_values(&sum)?.iter().map(|value| value / count).collect())
}

/// Largest magnitude of each input of each linear of a block, by the linear's name, and of the convolution's under
/// [`CONVOLUTION`].
pub type Maxima = BTreeMap<String, Vec<f64>>;

/// Names the depthwise convolution among [`Maxima`].
pub const CONVOLUTION: &str = "conv1d";

/// Runs `block` over the batches and returns what it adds to each, with the largest magnitudes that its linears read.
/// Those of the convolution need a state-space block's `projection`: its `in_proj`, and where the channels of the
/// convolution are in what that gives.
pub fn maxima<B: Backend>(
    backend: &B,
    spec: &BlockSpec,
    block: &Block<B>,
    projection: Option<&(&B::Linear, Range<usize>)>,
    inputs: &[B::Tensor],
    sequences: &[Sequences],
) -> Result<(Vec<B::Tensor>, Maxima)> {
    let found: RefCell<Maxima> = RefCell::new(BTreeMap::new());
    let see = |name: &str, seen: &[f32]| {
        if seen.iter().any(|value| !value.is_finite()) {
            return Err(not_finite(spec, name));
        }
        let mut found = found.borrow_mut();
        let largest = found.entry(name.to_owned()).or_insert_with(|| vec![0.0; seen.len()]);
        largest.iter_mut().zip(seen).for_each(|(largest, x)| *largest = largest.max(f64::from(*x)));
        Ok(())
    };
    let tap = |name: &str, x: &B::Activation| {
        see(name, &backend.largest_magnitudes(x)?)?;
        if let (Some((in_proj, channels)), "in_proj") = (projection, name) {
            let projected = backend.emit(backend.linear(in_proj, x)?, Emit::FLOAT)?;
            see(CONVOLUTION, &backend.largest_magnitudes(&projected)?[channels.clone()])?;
        }
        Ok(())
    };
    let mixed = inputs.iter().zip(sequences).map(|(h, sequences)| block.mix(backend, h, sequences, None, Some(&tap)));
    let mixed = mixed.collect::<Result<_>>()?;
    Ok((mixed, found.into_inner()))
}

/// The Hessian of the input of each linear of `block` (float) over the batches, by the linear's name.
pub fn hessians<'a, B: Backend>(
    backend: &'a B,
    spec: &BlockSpec,
    block: &Block<B>,
    inputs: &[B::Tensor],
    sequences: &[Sequences],
    monitor: &Monitor,
) -> Result<BTreeMap<String, Summed<'a, B>>> {
    let sums: RefCell<BTreeMap<String, Option<B::Gram>>> = RefCell::new(BTreeMap::new());
    let tap = |name: &str, x: &B::Activation| backend.add_gram(sums.borrow_mut().entry(name.to_owned()).or_default(), x);
    for (h, sequences) in inputs.iter().zip(sequences) {
        monitor.check()?;
        block.mix(backend, h, sequences, None, Some(&tap))?;
    }
    let sums = sums.into_inner().into_iter().filter_map(|(name, sum)| Some((name, sum?)));
    let hessian = |(name, sum): (String, B::Gram)| {
        let hessian = Summed::new(backend, sum)?;
        if hessian.is_finite() { Ok((name, hessian)) } else { Err(not_finite(spec, &name)) }
    };
    sums.map(hessian).collect()
}

fn not_finite(spec: &BlockSpec, name: &str) -> Error {
    Error::run(format!("block {}: the input of `{name}` is not finite on the calibration text", spec.index))
        .hint("give the blocks in front of it a wider format; if none is quantized, check the checkpoint")
}
