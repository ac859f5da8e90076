//! What is measured on the sample: the second moment of the normalised residual stream, and by linear the largest
//! magnitudes and the Hessian of its input.

use std::cell::RefCell;
use std::collections::BTreeMap;

use super::hessian::Summed;
use crate::backend::{Backend, Emit, Sequences};
use crate::checkpoint::{BlockSpec, Checkpoint};
use crate::error::{Error, Result};
use crate::format::Transform;
use crate::model::{Block, Boundary, Stream, Tap};
use crate::monitor::Monitor;

/// Second moment `[hidden, hidden]` of `h / rms(h)` in front of the blocks, averaged over them: a pass of the float
/// model over the sample, which is embedded in `stream`.
pub fn second_moment<B: Backend>(backend: &B, checkpoint: &Checkpoint, mut stream: Stream<'_, B>, monitor: &Monitor) -> Result<Vec<f64>> {
    let hidden = checkpoint.config.hidden_size;
    let ones = backend.prepare_vector(vec![1.0; hidden])?;
    let mut sum = None;
    monitor.stage("calibrate", stream.blocks());
    for index in 0..stream.blocks() {
        for h in stream.boundary().iter(backend) {
            let x = backend.rms_norm(&h?, &ones, checkpoint.config.norm_eps, Emit::FLOAT)?;
            backend.add_gram(&mut sum, &x)?;
        }
        // Asked for once a block: the device is waited for.
        if let Some(sum) = &sum
            && backend.gram_diagonal(sum)?.iter().any(|value| !value.is_finite())
        {
            return Err(Error::run(format!("the residual stream in front of block {index} is not finite on the calibration text"))
                .hint("the unquantized model overflows: check the checkpoint"));
        }
        stream.advance(index)?;
        monitor.step(index + 1, format!("block {index}"))?;
    }
    let count = (stream.tokens() * stream.blocks()) as f64;
    let Some(sum) = sum else { return Ok(vec![0.0; hidden * hidden]) };
    Ok(backend.gram_values(&sum)?.iter().map(|value| value / count).collect())
}

/// Largest magnitude of each input of each linear of a block, by the linear's name, and of the convolution's under
/// [`CONVOLUTION`].
pub type Maxima = BTreeMap<String, Vec<f64>>;

/// Names the depthwise convolution among [`Maxima`].
pub const CONVOLUTION: &str = "conv1d";

/// Runs `block`, `spec` as `checkpoint` stores it, over the batches at `inputs`, hands each batch behind it to `behind` with
/// its index, and returns the largest magnitudes that the smoothing among `transforms` needs; none where nothing smooths.
pub fn float_pass<B: Backend>(
    backend: &B,
    checkpoint: &Checkpoint,
    (spec, block): (&BlockSpec, &Block<B>),
    transforms: &[Transform],
    (inputs, sequences): (&Boundary<B>, &[Sequences]),
    mut behind: impl FnMut(usize, B::Tensor) -> Result<()>,
) -> Result<Maxima> {
    // The convolution is no linear: what it reads is computed once more from what `in_proj` reads.
    let in_proj = match spec.linear("in_proj") {
        Some(linear) if transforms.contains(&Transform::SmoothConv) => Some(backend.prepare(checkpoint.linear(linear, None)?)?),
        _ => None,
    };
    let (inner, channels) = (checkpoint.config.mamba.inner(), checkpoint.config.mamba.conv_channels());
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
    let watch = |name: &str, x: &B::Activation| {
        see(name, &backend.largest_magnitudes(x)?)?;
        if let (Some(in_proj), "in_proj") = (&in_proj, name) {
            let projected = backend.emit(backend.linear(in_proj, x)?, Emit::FLOAT)?;
            see(CONVOLUTION, &backend.largest_magnitudes(&projected)?[inner..inner + channels])?;
        }
        Ok(())
    };
    let watch: &Tap<'_, B> = &watch;
    let tap = transforms.iter().any(|transform| transform.smooths()).then_some(watch);
    for (index, (h, sequences)) in inputs.iter(backend).zip(sequences).enumerate() {
        let h = h?;
        let mixed = block.mix(backend, &h, sequences, None, tap)?;
        behind(index, backend.add(h, &mixed)?)?;
    }
    Ok(found.into_inner())
}

/// The Hessian of the input of each linear of `block` (float) over the batches, by the linear's name.
pub fn hessians<'a, B: Backend>(
    backend: &'a B,
    spec: &BlockSpec,
    block: &Block<B>,
    inputs: &Boundary<B>,
    sequences: &[Sequences],
    monitor: &Monitor,
) -> Result<BTreeMap<String, Summed<'a, B>>> {
    let sums: RefCell<BTreeMap<String, Option<B::Gram>>> = RefCell::new(BTreeMap::new());
    let tap = |name: &str, x: &B::Activation| backend.add_gram(sums.borrow_mut().entry(name.to_owned()).or_default(), x);
    for (h, sequences) in inputs.iter(backend).zip(sequences) {
        monitor.check()?;
        block.mix(backend, &h?, sequences, None, Some(&tap))?;
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
