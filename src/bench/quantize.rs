//! Quantizing a model of a published shape with random weights: the pipeline itself, on a checkpoint made for it, with the time
//! that each stage and each kind of block takes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use rayon::prelude::*;
use safetensors::View;
use serde::Serialize;
use serde_json::{Value, json};

use super::random::{OfBlock, RandomWeights};
use super::{PUBLISHED, Shape};
use crate::backend::Backend;
use crate::checkpoint::{Checkpoint, Config, Dtype, Layout, LinearSpec, StorageLayout, TensorSpec};
use crate::error::{Error, Result};
use crate::format::Format;
use crate::model::BlockSource;
use crate::monitor::{CancelToken, DeviceMemory, Monitor, Report};
use crate::quant::{QuantizeRequest, Recipe, Sample, SampleSpec, quantize, write_views};

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

/// A checkpoint in bf16, a shard a block, each written by a thread of its own. Nothing waits for the disk: the files are gone when
/// the measurement ends.
fn write_checkpoint(config: &Value, folder: &Path, monitor: &Monitor) -> Result<()> {
    fs::create_dir_all(folder).map_err(|error| Error::io("creating", folder, &error))?;
    let parsed = Config::parse(&config.to_string())?;
    let layout = Layout::new(&parsed);
    let random = RandomWeights::new(Format::W16A16);
    let norm = Random::vector(&layout.final_norm, &vec![1.0; parsed.hidden_size]);
    let mut ends = vec![norm, Random::matrix(&layout.embedding, &random)];
    if !layout.tied {
        let (_, head) = Random::matrix(&layout.head, &random);
        ends.push((format!("{}.weight", layout.head.stem), head));
    }
    // The largest first.
    let mut files = vec![("ends.safetensors".to_owned(), ends)];
    for spec in &layout.blocks {
        let source = OfBlock { random: &random, spec, recipe: None };
        let vectors = spec.others.iter().map(|other| Ok(Random::vector(other, &source.tensor(&other.name)?)));
        let matrices = spec.linears.iter().map(|linear| Ok(Random::matrix(linear, &random)));
        files.push((format!("block-{:03}.safetensors", spec.index), vectors.chain(matrices).collect::<Result<_>>()?));
    }
    let names = files.iter().flat_map(|(file, tensors)| tensors.iter().map(move |(tensor, _)| (tensor.clone(), file.clone())));
    let weight_map: BTreeMap<String, String> = names.collect();
    monitor.stage("random weights", files.len());
    let done = Mutex::new(0);
    // One by one, so that the largest begins first.
    files.into_par_iter().with_max_len(1).try_for_each(|(name, tensors)| {
        monitor.check()?;
        let path = folder.join(name);
        let mut file = File::create(&path).map_err(|error| Error::io("creating", &path, &error))?;
        write_views(&mut file, &path, tensors)?;
        let mut done = done.lock().unwrap_or_else(PoisonError::into_inner);
        *done += 1;
        monitor.step(*done, "")
    })?;
    for (name, text) in
        [("model.safetensors.index.json", json!({ "weight_map": weight_map }).to_string()), ("config.json", config.to_string())]
    {
        crate::files::write_atomically(&folder.join(name), text.as_bytes())?;
    }
    Ok(())
}

/// A tensor of the checkpoint.
enum Random<'a> {
    /// In f32: shape and bytes.
    Vector(&'a [usize], Vec<u8>),
    /// In bf16, made when it is written.
    Matrix { linear: &'a LinearSpec, shape: [usize; 2], random: &'a RandomWeights },
}

impl<'a> Random<'a> {
    /// With the name that it is stored by.
    fn vector(spec: &'a TensorSpec, values: &[f32]) -> (String, Self) {
        (format!("backbone.{}", spec.name), Self::Vector(&spec.shape, bytemuck::cast_slice(values).to_vec()))
    }

    fn matrix(linear: &'a LinearSpec, random: &'a RandomWeights) -> (String, Self) {
        (format!("backbone.{}.weight", linear.stem), Self::Matrix { linear, shape: [linear.rows, linear.cols], random })
    }
}

impl View for Random<'_> {
    fn dtype(&self) -> Dtype {
        match self {
            Self::Vector(..) => Dtype::F32,
            Self::Matrix { .. } => Dtype::BF16,
        }
    }

    fn shape(&self) -> &[usize] {
        match self {
            Self::Vector(shape, _) => shape,
            Self::Matrix { shape, .. } => shape,
        }
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match self {
            Self::Vector(_, bytes) => bytes.into(),
            Self::Matrix { linear, random, .. } => random.stored(linear).into(),
        }
    }

    fn data_len(&self) -> usize {
        match self {
            Self::Vector(_, bytes) => bytes.len(),
            Self::Matrix { shape: [rows, cols], .. } => 2 * rows * cols,
        }
    }
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
