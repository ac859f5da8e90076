//! Quantizing a model of a published shape with random weights: the pipeline itself, on a checkpoint made for it, with the time
//! that each stage and each kind of block takes.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use half::bf16;
use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Value, json};

use super::random::{OfBlock, RandomWeights};
use super::{PUBLISHED, Shape};
use crate::backend::Backend;
use crate::checkpoint::{Checkpoint, Config, Dtype, Layout, LinearSpec, StorageLayout};
use crate::error::{Error, Result};
use crate::format::{Format, WeightPart};
use crate::model::BlockSource;
use crate::monitor::{CancelToken, DeviceMemory, Monitor, Report};
use crate::quant::{QuantizeRequest, Recipe, Sample, SampleSpec, TensorOut, quantize, write_tensors};

/// What to quantize.
#[derive(Debug, Clone)]
pub struct QuantizeSpeedRequest {
    /// A published shape's name.
    pub shape: String,
    pub recipe: String,
    /// Only so many of the first blocks.
    pub blocks: Option<usize>,
    pub sequences: usize,
    /// Tokens of a sequence.
    pub length: usize,
}

/// How long it took.
#[derive(Debug, Clone, Serialize)]
pub struct QuantizeSpeed {
    pub shape: String,
    pub recipe: String,
    /// Blocks quantized, and blocks of the shape.
    pub blocks: usize,
    pub of_blocks: usize,
    pub sequences: usize,
    pub length: usize,
    /// Seconds of each stage, in order; making the checkpoint is none.
    pub stages: Vec<(String, f64)>,
    /// Mean seconds that choosing the codes of a block took, by its kind, and how many such blocks the shape has.
    pub kinds: BTreeMap<String, (f64, usize)>,
    pub seconds: f64,
    /// Of a device that has its own.
    pub device_memory: Option<DeviceMemory>,
}

/// Makes the checkpoint in a temporary folder and quantizes it.
pub fn measure<B: Backend>(backend: &B, request: &QuantizeSpeedRequest, monitor: &Monitor) -> Result<QuantizeSpeed> {
    let whole = Shape::find(&request.shape)?;
    let folder = tempfile::tempdir().map_err(|error| Error::run(format!("there is no room for a temporary checkpoint: {error}")))?;
    let model = folder.path().join("model");
    let config = shortened(&request.shape, request.blocks)?;
    write_checkpoint(&config, &model, monitor)?;
    let checkpoint = Checkpoint::open(&model)?;
    let recipe = Recipe::find(&request.recipe)?;
    let sample = SampleSpec { sequences: request.sequences, length: request.length, ..SampleSpec::default() };
    let quantizing = QuantizeRequest {
        checkpoint: &checkpoint,
        recipe: recipe.name.clone(),
        steps: recipe.steps(),
        plan: recipe.plan(&checkpoint.layout, &[])?,
        sample: Sample::load(&checkpoint, &sample)?,
        storage: StorageLayout::Native,
        output: folder.path().join("variant"),
        force: false,
        host_memory: u64::MAX,
        donors: None,
    };
    let times = Mutex::new(Times::default());
    let follow = |report: Report| {
        times.lock().unwrap_or_else(PoisonError::into_inner).see(&report);
        monitor.forward(report);
    };
    let start = Instant::now();
    quantize(backend, &quantizing, &Monitor::new(follow, CancelToken::default()))?;
    let seconds = start.elapsed().as_secs_f64();
    let times = times.into_inner().unwrap_or_else(PoisonError::into_inner).ended();
    let mut kinds: BTreeMap<String, (f64, usize)> = BTreeMap::new();
    for kind in checkpoint.layout.kinds() {
        let own = checkpoint.layout.blocks.iter().filter(|block| block.kind == kind).filter_map(|block| times.blocks.get(block.index));
        let (sum, count) = own.fold((0.0, 0), |(sum, count), seconds| (sum + seconds, count + 1));
        let of_shape = whole.layout.blocks.iter().filter(|block| block.kind == kind).count();
        kinds.insert(kind.to_string(), (sum / f64::from(count.max(1)), of_shape));
    }
    Ok(QuantizeSpeed {
        shape: request.shape.clone(),
        recipe: recipe.name,
        blocks: checkpoint.layout.blocks.len(),
        of_blocks: whole.layout.blocks.len(),
        sequences: request.sequences,
        length: request.length,
        stages: times.stages,
        kinds,
        seconds,
        device_memory: times.device_memory,
    })
}

/// Stages and blocks as they are reported.
#[derive(Default)]
struct Times {
    stages: Vec<(String, f64)>,
    blocks: Vec<f64>,
    stage: Option<(String, Instant)>,
    block: Option<Instant>,
    device_memory: Option<DeviceMemory>,
}

impl Times {
    fn see(&mut self, report: &Report) {
        match report {
            Report::Stage { name, .. } => {
                self.close();
                self.stage = Some((name.clone(), Instant::now()));
                self.block = Some(Instant::now());
            }
            Report::Block { .. } => {
                let seconds = self.block.replace(Instant::now()).map_or(0.0, |since| since.elapsed().as_secs_f64());
                self.blocks.push(seconds);
            }
            Report::DeviceMemory(memory) => self.device_memory = Some(*memory),
            _ => {}
        }
    }

    fn close(&mut self) {
        if let Some((name, since)) = self.stage.take() {
            self.stages.push((name, since.elapsed().as_secs_f64()));
        }
    }

    fn ended(mut self) -> Self {
        self.close();
        self
    }
}

/// The `config.json` of a published shape with its first `blocks` blocks.
fn shortened(shape: &str, blocks: Option<usize>) -> Result<Value> {
    let text = PUBLISHED.iter().find(|(name, _)| *name == shape).map(|(_, text)| *text);
    let text = text.ok_or_else(|| Error::input("quantizing is timed for published shapes only").hint("give --shape nemotron-h-8b"))?;
    let mut config: Value = serde_json::from_str(text).map_err(|error| Error::run(format!("the shape {shape} is not read: {error}")))?;
    let Some(blocks) = blocks else { return Ok(config) };
    if blocks == 0 {
        return Err(Error::input("--blocks takes at least one block"));
    }
    // Configurations list their blocks in one of two ways, or in both.
    if let Some(pattern) = config["hybrid_override_pattern"].as_str() {
        config["hybrid_override_pattern"] = pattern.chars().take(blocks).collect::<String>().into();
    }
    if let Some(kinds) = config.get_mut("layers_block_type").and_then(Value::as_array_mut) {
        kinds.truncate(blocks);
    }
    if let Some(count) = config["num_hidden_layers"].as_u64() {
        config["num_hidden_layers"] = json!(count.min(blocks as u64));
    }
    Ok(config)
}

/// A checkpoint in bf16, a shard a block.
fn write_checkpoint(config: &Value, folder: &Path, monitor: &Monitor) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| Error::io("creating", folder, &error))?;
    let parsed = Config::parse(&config.to_string())?;
    let layout = Layout::new(&parsed);
    let random = RandomWeights::new(Format::W16A16);
    let mut weight_map = BTreeMap::new();
    let mut write = |name: String, tensors: Vec<TensorOut<'_>>| {
        weight_map.extend(tensors.iter().map(|tensor| (tensor.0.clone(), name.clone())));
        write_tensors(&folder.join(&name), &tensors)
    };
    monitor.stage("random weights", layout.blocks.len());
    for spec in &layout.blocks {
        let source = OfBlock { random: &random, spec };
        let mut tensors = Vec::new();
        for other in &spec.others {
            let bytes = source.tensor(&other.name)?.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
            tensors.push((format!("backbone.{}", other.name), Dtype::F32, other.shape.clone(), bytes.into()));
        }
        for linear in &spec.linears {
            tensors.push(matrix(&format!("backbone.{}", linear.stem), linear, &random));
        }
        write(format!("block-{:03}.safetensors", spec.index), tensors)?;
        monitor.step(spec.index + 1, "")?;
    }
    let norm = vec![1.0_f32; parsed.hidden_size].iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let norm = (format!("backbone.{}", layout.final_norm.name), Dtype::F32, layout.final_norm.shape.clone(), norm.into());
    let mut ends = vec![norm, matrix(&format!("backbone.{}", layout.embedding.stem), &layout.embedding, &random)];
    if !layout.tied {
        ends.push(matrix(&layout.head.stem, &layout.head, &random));
    }
    write("ends.safetensors".into(), ends)?;
    for (name, text) in
        [("model.safetensors.index.json", json!({ "weight_map": weight_map }).to_string()), ("config.json", config.to_string())]
    {
        crate::files::write_atomically(&folder.join(name), text.as_bytes())?;
    }
    Ok(())
}

fn matrix(stem: &str, linear: &LinearSpec, random: &RandomWeights) -> TensorOut<'static> {
    let weights = random.weights(linear, &linear.schemes(Format::W16A16), Format::W16A16);
    let float = weights.parts.iter().filter_map(|part| match part {
        WeightPart::Float(values) => Some(values),
        WeightPart::Quantized(_) => None,
    });
    let bytes: Vec<u8> = float
        .flat_map(|values| values.par_iter().flat_map_iter(|value| bf16::from_f32(*value).to_le_bytes()).collect::<Vec<u8>>())
        .collect();
    (format!("{stem}.weight"), Dtype::BF16, vec![linear.rows, linear.cols], bytes.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `--blocks` was ignored where a configuration lists its blocks by name.
    #[test]
    fn every_published_shape_is_cut_to_its_first_blocks() {
        for (name, text) in PUBLISHED {
            let whole = Config::parse(text).unwrap();
            for count in [1, 6, 1000] {
                let cut = Config::parse(&shortened(name, Some(count)).unwrap().to_string()).unwrap();
                assert_eq!(cut.blocks, whole.blocks[..count.min(whole.blocks.len())], "{name}");
            }
            assert_eq!(Config::parse(&shortened(name, None).unwrap().to_string()).unwrap().blocks, whole.blocks, "{name}");
        }
    }
}
