//! A whole model, end to end: time to the first token, time of each next one, memory.

use std::time::Instant;

use serde::Serialize;

use super::Shape;
use super::random;
use crate::backend::{Backend, Sequences};
use crate::error::Result;
use crate::eval::statistics::median;
use crate::format::{BlockKind, CacheFormat, CacheFormats, Format};
use crate::model::Hybrid;
use crate::monitor::Monitor;
use crate::quant::Recipe;

/// Times each measurement is repeated; medians are reported.
const REPETITIONS: usize = 5;
/// Decoding steps of a measurement, behind some that record and warm up.
const STEPS: usize = 32;
const WARM_STEPS: usize = 4;
/// Tokens of each sequence before decoding is timed.
const CONTEXT: usize = 64;

/// What to measure.
#[derive(Debug, Clone)]
pub struct ModelRequest {
    pub formats: Vec<Format>,
    /// Whose online transforms and internals of Mamba-2 the models have, those in 16 bits excepted; formats, head and caches are as here.
    pub recipe: Option<Recipe>,
    pub prompts: Vec<usize>,
    pub batches: Vec<usize>,
    pub state: CacheFormat,
}

/// A model of random weights in one format, measured.
#[derive(Debug, Clone, Serialize)]
pub struct ModelSpeed {
    pub shape: String,
    pub format: String,
    /// See [`ModelRequest::recipe`].
    pub recipe: Option<String>,
    /// Weights on the device, with embedding and head.
    pub weight_bytes: u64,
    /// Most device memory in use; `None` where it is the process's.
    pub peak_bytes: Option<u64>,
    pub prefill: Vec<Prefill>,
    pub decode: Vec<Decode>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Prefill {
    pub tokens: usize,
    /// Median time to the logits of the last token.
    pub ms: f64,
    pub tokens_per_s: f64,
}

#[derive(Debug, Clone, Serialize)]
pub struct Decode {
    pub batch: usize,
    /// Median time of a step, the choice of the tokens included.
    pub ms: f64,
    pub tokens_per_s: f64,
    /// What a step must read and write: the weights, and each sequence's state.
    pub bytes: u64,
    /// Those bytes at the measured copy bandwidth.
    pub bound_ms: f64,
    /// `bound_ms / ms`.
    pub of_bound: f64,
}

/// Bytes a second that a large copy on the device reads and writes.
pub fn copy_bandwidth<B: Backend>(backend: &B) -> Result<f64> {
    const BYTES: usize = 1 << 30;
    Ok(2.0 * BYTES as f64 / backend.copy_seconds(BYTES)?)
}

/// Measures `shape` in each format.
pub fn measure<B: Backend + Clone>(
    backend: &B,
    shape: &Shape,
    request: &ModelRequest,
    bandwidth: f64,
    monitor: &Monitor,
    mut each: impl FnMut(&ModelSpeed),
) -> Result<Vec<ModelSpeed>> {
    let caches = CacheFormats { state: request.state, ..CacheFormats::default() };
    let mut measured = Vec::new();
    for format in &request.formats {
        backend.reset_peak()?;
        let recipe = request.recipe.as_ref().filter(|_| *format != Format::W16A16);
        monitor.stage(&format!("generate {format}"), shape.layout.blocks.len());
        let model = random::assemble(backend.clone(), shape, *format, recipe, caches, &mut |index| monitor.step(index + 1, ""))?;
        let mut speed = ModelSpeed {
            shape: shape.name.clone(),
            format: format.to_string(),
            recipe: recipe.map(|recipe| recipe.name.clone()),
            weight_bytes: model.resident_bytes(),
            peak_bytes: None,
            prefill: Vec::new(),
            decode: Vec::new(),
        };
        monitor.stage(&format!("measure {format}"), request.prompts.len() + request.batches.len());
        for tokens in &request.prompts {
            speed.prefill.push(prefill(&model, *tokens)?);
            monitor.step(speed.prefill.len(), format!("{tokens} tokens"))?;
        }
        for batch in &request.batches {
            speed.decode.push(decode(&model, shape, *batch, request.state, bandwidth)?);
            monitor.step(speed.prefill.len() + speed.decode.len(), format!("batch {batch}"))?;
        }
        speed.peak_bytes = backend.peak_bytes();
        each(&speed);
        measured.push(speed);
    }
    Ok(measured)
}

/// Token ids without a pattern.
fn ids(count: usize, vocabulary: usize) -> Vec<u32> {
    (0..count).map(|i| (i * 7919 + 13) as u32 % vocabulary as u32).collect()
}

fn prefill<B: Backend>(model: &Hybrid<B>, tokens: usize) -> Result<Prefill> {
    let ids = ids(tokens, model.vocabulary());
    let mut seconds = Vec::new();
    for round in 0..=REPETITIONS {
        let mut cache = model.cache(1);
        let start = Instant::now();
        let logits = model.last_logits(&ids, &Sequences::new(vec![tokens]), Some(&mut cache))?;
        model.backend.argmax(&logits)?;
        if round > 0 {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let median = median(&seconds);
    Ok(Prefill { tokens, ms: 1e3 * median, tokens_per_s: tokens as f64 / median })
}

fn decode<B: Backend>(model: &Hybrid<B>, shape: &Shape, batch: usize, state: CacheFormat, bandwidth: f64) -> Result<Decode> {
    let mut cache = model.cache(batch);
    let prompt = ids(batch * CONTEXT, model.vocabulary());
    let logits = model.last_logits(&prompt, &Sequences::new(vec![CONTEXT; batch]), Some(&mut cache))?;
    let mut next = model.backend.argmax(&logits)?;
    let mut seconds = Vec::new();
    for step in 0..WARM_STEPS + STEPS {
        let start = Instant::now();
        let logits = model.step(&next, &mut cache)?;
        next = model.backend.argmax(&logits)?;
        if step >= WARM_STEPS {
            seconds.push(start.elapsed().as_secs_f64());
        }
    }
    let median = median(&seconds);
    let bytes = model.read_bytes(batch) + batch as u64 * state_bytes(shape, state);
    let bound = bytes as f64 / bandwidth;
    Ok(Decode { batch, ms: 1e3 * median, tokens_per_s: batch as f64 / median, bytes, bound_ms: 1e3 * bound, of_bound: bound / median })
}

/// Bytes that a step reads and writes of one sequence's SSM states, and reads of its keys and values.
fn state_bytes(shape: &Shape, state: CacheFormat) -> u64 {
    let (mamba, attention) = (&shape.config.mamba, &shape.config.attention);
    let values = (mamba.heads * mamba.head_dim * mamba.state) as u64;
    let keys = 2 * 4 * CONTEXT * attention.kv_heads * attention.head_dim;
    let blocks = |kind| shape.layout.blocks.iter().filter(|block| block.kind == kind).count() as u64;
    blocks(BlockKind::Ssm) * 2 * state.bytes(values, mamba.state as u64) + blocks(BlockKind::Attention) * keys as u64
}
