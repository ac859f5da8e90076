//! A pass of the float model over the sample that keeps the largest magnitude of every channel of every linear's input.

use std::cell::RefCell;

use super::{Event, JobId};
use crate::backend::Backend;
use crate::checkpoint;
use crate::error::Result;
use crate::model::Stream;
use crate::monitor::Monitor;
use crate::quant::{Sample, SampleSpec};

/// Observe the inputs of a model's linears.
#[derive(Debug, Clone, PartialEq)]
pub struct ObserveJob {
    pub model: String,
    pub sample: SampleSpec,
}

/// The inputs of a block's linears over a sample.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockInputs {
    pub block: usize,
    /// Name of the linear, and the largest magnitude of each channel of its input.
    pub maxima: Vec<(String, Vec<f32>)>,
}

/// Runs the job: one [`Event::Observed`] a block.
pub(super) fn observe<B: Backend>(id: JobId, backend: &B, job: &ObserveJob, monitor: &Monitor, send: &impl Fn(Event)) -> Result<()> {
    let checkpoint = checkpoint::open_watched(&job.model, monitor)?;
    let sample = Sample::load(&checkpoint, &job.sample)?;
    let mut stream = Stream::new(backend, &checkpoint, &sample.batches())?;
    monitor.stage("observe", stream.blocks());
    for block in 0..stream.blocks() {
        let maxima: RefCell<Vec<(String, Vec<f32>)>> = RefCell::default();
        stream.advance_observed(block, &|name: &str, input: &B::Activation| {
            let values = backend.floats(input)?;
            let mut maxima = maxima.borrow_mut();
            let place = maxima.iter().position(|(known, _)| known == name).unwrap_or_else(|| {
                maxima.push((name.to_owned(), Vec::new()));
                maxima.len() - 1
            });
            let channels = checkpoint.layout.blocks[block].linear(name).map_or(values.len(), |linear| linear.cols);
            let row = &mut maxima[place].1;
            row.resize(channels, 0.0);
            for token in values.chunks_exact(channels.max(1)) {
                for (max, value) in row.iter_mut().zip(token) {
                    *max = max.max(value.abs());
                }
            }
            Ok(())
        })?;
        send(Event::Observed { id, inputs: Box::new(BlockInputs { block, maxima: maxima.into_inner() }) });
        monitor.step(block + 1, format!("block {block}"))?;
    }
    Ok(())
}
