//! load → analyze → quantize → validate → save, one block at a time.
//!
//! Two residual streams of the sample move from block to block: the float model's, and the quantized model's. After
//! each block its shard, both streams and what was measured are in the work folder; a run that ends early goes on
//! from there. The finished files are opened again and must give the same streams and logits before they appear.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::json;

use super::boundary::{self, FloatHash};
use super::calibrate;
use super::donors::{Donors, PartlyQuantized, Place};
use super::method::{QuantizedLinear, Rounding, quantize_linear};
use super::need::MemoryNeed;
use super::observe::{self, StaticScales, Wanted};
use super::publish::{self, TensorOut};
use super::recipe::{Method, Steps};
use super::sample::Sample;
use super::transform::Transforms;
use super::weights::{BlockWeights, FloatBlock};
use crate::backend::{Backend, Divergence, Emit, Sequences, SsmInternals, SsmScales};
use crate::checkpoint::{
    BlockRecord, BlockSpec, Checkpoint, Dtype, INDEX_FILE, LinearSpec, Provenance, STRATA_FILE, SampleRecord, StorageLayout, TOOL,
    VARIANT_SCHEMA, VariantManifest, float_tensor, linear_tensors, quantization_config, sha256_hex,
};
use crate::error::{Error, ErrorKind, Result};
use crate::eval::statistics;
use crate::files;
use crate::format::{BlockKind, Format, Plan, ScaleKind, Scheme, SsmActivations, Transform};
use crate::model::{Block, Stream};
use crate::monitor::Monitor;

/// What to quantize, how, and to where.
pub struct QuantizeRequest<'a> {
    pub checkpoint: &'a Checkpoint,
    /// Name of the recipe, for provenance.
    pub recipe: String,
    pub steps: Steps,
    pub plan: Plan,
    pub sample: Sample,
    pub storage: StorageLayout,
    pub output: PathBuf,
    /// Replace an output that exists.
    pub force: bool,
    /// Take quantized weights from these instead of rounding again; of the same checkpoint, steps and sample.
    pub donors: Option<&'a Donors>,
}

/// What is known after some blocks: the part of a manifest that a resumed run needs.
#[derive(Serialize, Deserialize)]
struct State {
    key: String,
    records: Vec<BlockRecord>,
    /// Hash of the quantized stream in front of the first block and behind each finished one.
    boundaries: Vec<String>,
}

/// The float and the quantized residual stream of each sample sequence.
struct Streams<B: Backend> {
    reference: Vec<B::Tensor>,
    quantized: Vec<B::Tensor>,
    sequences: Vec<Sequences>,
}

/// What the sample's logits say: they are compared a few rows at a time and not kept.
struct Judgement {
    rows: Vec<Divergence>,
    /// Hash of the quantized model's.
    hash: String,
}

/// Hash of everything that decides the bytes of a variant.
pub fn request_key(source: &str, request: &QuantizeRequest<'_>) -> String {
    let plan = json!({
        "tool": TOOL,
        "source": source,
        "recipe": request.recipe,
        "steps": request.steps,
        "plan": request.plan,
        "sample": request.sample.sha256(),
        "seed": request.sample.seed,
        "storage": request.storage,
        "donors": request.donors.map(Donors::name),
    });
    sha256_hex(plan.to_string().as_bytes())
}

/// Makes a variant. Killed at any moment, it leaves either no variant or a whole one at the output, and the same
/// request run again goes on after the last finished block.
pub fn quantize<B: Backend>(backend: &B, request: &QuantizeRequest<'_>, monitor: &Monitor) -> Result<VariantManifest> {
    if request.output.exists() && !request.force {
        return Err(publish::exists(&request.output));
    }
    if request.checkpoint.variant.is_some() {
        return Err(Error::input(format!("{} is quantized already", request.checkpoint.name)).hint("give the original checkpoint"));
    }
    let work = publish::work_directory(&request.output);
    let lock = publish::lock(&work)?;
    let manifest = Pipeline::new(backend, request, &work, monitor)?.run()?;
    drop(lock);
    publish::remove(&work)?;
    Ok(manifest)
}

struct Pipeline<'a, B: Backend> {
    backend: &'a B,
    request: &'a QuantizeRequest<'a>,
    /// The source's layout, with modules of one scheme when the variant is portable.
    blocks: Vec<BlockSpec>,
    monitor: &'a Monitor<'a>,
    /// Where finished shards wait; becomes the variant.
    files: PathBuf,
    work: &'a Path,
    source: String,
    state: State,
    transforms: Transforms,
}

impl<'a, B: Backend> Pipeline<'a, B> {
    fn new(backend: &'a B, request: &'a QuantizeRequest<'a>, work: &'a Path, monitor: &'a Monitor<'a>) -> Result<Self> {
        announce(request, monitor);
        monitor.stage("load", 1);
        let source = request.checkpoint.sha256()?;
        monitor.step(1, "source hashed")?;
        let key = request_key(&source, request);
        let files = work.join("variant");
        let state = read_state(work).filter(|state| state.key == key);
        let state = match state {
            Some(state) => {
                monitor.log(format!("going on after {} finished blocks", state.records.len()));
                state
            }
            None => {
                publish::remove(&files)?;
                State { key, records: Vec::new(), boundaries: Vec::new() }
            }
        };
        fs::create_dir_all(&files).map_err(|error| Error::io("creating", &files, &error))?;
        let (layout, hidden) = (&request.checkpoint.layout, request.checkpoint.config.hidden_size);
        let need = MemoryNeed::of(layout, hidden, request.sample.tokens(), request.steps.method == Method::Gptq);
        monitor.log(need.statement());
        let mut layout = request.checkpoint.layout.clone();
        if request.storage == StorageLayout::Portable {
            layout.merge_slices();
        }
        let transforms = match request.donors {
            Some(donors) => donors.transforms().clone(),
            None => {
                let second_moment = if request.steps.transforms.contains(&Transform::RotateResidual) {
                    Some(kept_second_moment(backend, request, work, &state.key, monitor)?)
                } else {
                    None
                };
                Transforms::new(&request.steps.transforms, second_moment.as_deref(), request.checkpoint.config.hidden_size)?
            }
        };
        Ok(Self { backend, request, blocks: layout.blocks, monitor, files, work, source, state, transforms })
    }

    fn rounding(&self, format: Format, schemes: Vec<Scheme>) -> Rounding<'_> {
        let float_bytes = self.request.checkpoint.layout.float_bytes;
        Rounding { method: self.request.steps.method, format, schemes, transforms: &self.request.steps.transforms, float_bytes }
    }

    /// The embedding as it will be stored: rounded without a Hessian, for its inputs are token ids.
    fn embedding(&self) -> Result<QuantizedLinear> {
        let table = self.transforms.embedding(self.request.checkpoint)?;
        let (linear, format) = (&self.request.checkpoint.layout.embedding, self.request.plan.embedding);
        Ok(quantize_linear(&table, linear, &self.rounding(format, linear.schemes(format)), None))
    }

    fn run(mut self) -> Result<VariantManifest> {
        let streams = self.quantize_blocks()?;
        let sample = self.sample_record(self.write_ends(&streams)?);
        drop(streams);
        let manifest = self.write_manifest(sample)?;
        if let Err(error) = self.validate(&manifest) {
            if error.kind == ErrorKind::Cancelled {
                return Err(error);
            }
            let aside = publish::failed_directory(&self.request.output);
            publish::remove(&aside)?;
            files::write_atomically(&self.files.join("FAILED.txt"), error.message.as_bytes())?;
            fs::rename(&self.files, &aside).map_err(|error| Error::io("renaming", &self.files, &error))?;
            publish::remove(self.work)?;
            return Err(Error::run(format!("the variant failed its validation and was put aside in {}: {error}", aside.display()))
                .hint("FAILED.txt there holds the reason; quantizing again starts afresh"));
        }
        self.monitor.stage("save", 1);
        publish::publish(&self.files, &self.request.output, self.request.force)?;
        self.monitor.step(1, self.request.output.display().to_string())?;
        Ok(manifest)
    }

    fn shard_name(&self, shard: usize) -> String {
        format!("model-{:05}-of-{:05}.safetensors", shard + 1, self.blocks.len() + 1)
    }

    fn stored(&self, canonical: &str) -> String {
        self.request.checkpoint.stored_name(canonical)
    }

    fn quantize_blocks(&mut self) -> Result<Streams<B>> {
        let blocks = self.blocks.len();
        self.monitor.stage("quantize", blocks);
        let batches = self.request.sample.batches();
        let sequences = batches.iter().map(|(_, sequences)| sequences.clone()).collect();
        let mut streams = if self.state.boundaries.is_empty() {
            let reference = Stream::new(self.backend, self.request.checkpoint, &batches)?.boundary().to_vec();
            let mut table = self.embedding()?.weights(self.request.checkpoint.config.hidden_size);
            table.int8_activations = false;
            let table = self.backend.prepare_embedding(table)?;
            let quantized = batches.iter().map(|(ids, _)| self.backend.embed(&table, ids)).collect::<Result<_>>()?;
            let streams = Streams { reference, quantized, sequences };
            self.state.boundaries.push(self.boundary_hash(&streams.quantized, "the embedding")?);
            streams
        } else {
            self.load_streams(sequences)?
        };
        for record in &self.state.records {
            self.monitor.block(record.index, record.error, record.bytes);
        }
        self.monitor.found(self.state.records.len());
        for index in self.state.records.len()..blocks {
            let record = self.quantize_block(index, &mut streams)?;
            self.monitor.block(index, record.error, record.bytes);
            for note in &record.notes {
                self.monitor.warn(format!("block {index}: {note}"));
            }
            let note = format!("block {index} {} {} error {:.2e}", record.kind, record.format, record.error);
            self.state.records.push(record);
            self.state.boundaries.push(self.boundary_hash(&streams.quantized, &format!("block {index}"))?);
            self.save_progress(&streams)?;
            self.monitor.step(index + 1, note)?;
        }
        Ok(streams)
    }

    fn quantize_block(&self, index: usize, streams: &mut Streams<B>) -> Result<BlockRecord> {
        let (spec, checkpoint, plan) = (&self.blocks[index], self.request.checkpoint, &self.request.plan);
        let weights = self.transforms.block(checkpoint, spec)?;
        let source = FloatBlock { checkpoint, weights: &weights, transforms: &self.request.steps.transforms };
        let transformed = Block::assemble(self.backend, &checkpoint.config, spec, &source)?;
        let mut linears = match self.request.donors {
            Some(donors) => {
                let format = |linear: &LinearSpec, slice: &str| plan.slice(index, &linear.stem, slice);
                donors.assemble(Place::Block(index), &spec.linears, format, |name| weights.linear(name))?
            }
            None => self.round_block(spec, &weights, &transformed, streams)?,
        };
        let scales = self.static_scales(spec, &transformed, &source, streams)?;
        for quantized in linears.iter_mut().filter(|(_, quantized)| quantized.int8_activations) {
            quantized.1.input_scale = scales.linears.get(*quantized.0).copied();
        }
        let mut tensors: Vec<TensorOut> = Vec::new();
        for other in &spec.others {
            match weights.tensors.get(&other.name) {
                Some(values) => {
                    let bytes = values.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect();
                    tensors.push((self.stored(&other.name), Dtype::F32, other.shape.clone(), Cow::Owned(bytes)));
                }
                None => tensors.push(self.copy(&other.name)?),
            }
        }
        for linear in &spec.linears {
            self.push_linear(linear, &linears[linear.name.as_str()], &mut tensors)?;
        }
        let kept = scales.internals.as_ref().map(|scales| internal_tensors(spec, scales)).unwrap_or_default();
        tensors.extend(kept.iter().map(|(name, values)| float_vector(self.stored(name), values)));
        publish::write_tensors(&self.files.join(self.shard_name(index)), &tensors)?;
        drop(tensors);

        let float_block = Block::load(self.backend, checkpoint, index)?;
        let activations = self.request.steps.activations.ssm;
        let internals = match scales.internals {
            Some(scales) => SsmInternals::Int8Static(scales),
            None if activations == SsmActivations::Int8PerToken && plan.blocks[index].quantizes_activations() => SsmInternals::Int8PerToken,
            None => SsmInternals::Float,
        };
        let quantized_block =
            Block::assemble(self.backend, &checkpoint.config, spec, &PartlyQuantized { float: source, linears: &linears, internals })?;
        let (mut difference, mut norm) = (0.0, 0.0);
        for ((reference, quantized), sequences) in streams.reference.iter_mut().zip(&mut streams.quantized).zip(&streams.sequences) {
            self.monitor.check()?;
            let exact = transformed.mix(self.backend, quantized, sequences, None, None)?;
            let rounded = quantized_block.mix(self.backend, quantized, sequences, None, None)?;
            for (exact, rounded) in self.backend.download(&exact)?.iter().zip(self.backend.download(&rounded)?) {
                difference += f64::from(exact - rounded).powi(2);
                norm += f64::from(*exact).powi(2);
            }
            *reference = float_block.forward(self.backend, reference.clone(), sequences, None)?;
            *quantized = self.backend.add(quantized.clone(), &rounded)?;
        }
        Ok(BlockRecord {
            index,
            kind: spec.kind,
            format: plan.blocks[index],
            error: if norm > 0.0 { (difference / norm).sqrt() } else { 0.0 },
            bytes: spec.planned_bytes(plan, checkpoint.layout.float_bytes),
            notes: gather_notes(&linears),
        })
    }

    /// The static scales that the plan needs of a block, from what its transformed form reads on the quantized stream.
    fn static_scales(
        &self,
        spec: &BlockSpec,
        transformed: &Block<B>,
        source: &FloatBlock<'_>,
        streams: &Streams<B>,
    ) -> Result<StaticScales> {
        let (steps, plan, config) = (&self.request.steps, &self.request.plan, &self.request.checkpoint.config);
        let int8 = |linear: &LinearSpec| plan.linear(spec.index, &linear.stem).quantizes_activations();
        let wanted = Wanted {
            linears: steps.activations.linears == ScaleKind::Static && spec.linears.iter().any(int8),
            internals: spec.kind == BlockKind::Ssm
                && steps.activations.ssm == SsmActivations::Int8Static
                && plan.blocks[spec.index].quantizes_activations(),
        };
        let sample = (streams.quantized.as_slice(), streams.sequences.as_slice());
        observe::static_scales(self.backend, config, spec, (transformed, source), sample, &steps.observers, wanted)
    }

    /// Rounds the linears of a block, with the Hessians of what the quantized blocks before it hand on.
    fn round_block<'s>(
        &self,
        spec: &'s BlockSpec,
        weights: &BlockWeights,
        transformed: &Block<B>,
        streams: &Streams<B>,
    ) -> Result<BTreeMap<&'s str, QuantizedLinear>> {
        let (plan, index) = (&self.request.plan, spec.index);
        let quantized = |linear: &LinearSpec| linear.planned_schemes(plan, index).iter().any(|scheme| *scheme != Scheme::Float);
        let hessians = if self.request.steps.method == Method::Gptq && spec.linears.iter().any(quantized) {
            calibrate::hessians(self.backend, transformed, &streams.quantized, &streams.sequences, self.monitor)?
        } else {
            BTreeMap::new()
        };
        let mut linears = BTreeMap::new();
        for linear in &spec.linears {
            self.monitor.check()?;
            let hessian = hessians.get(&linear.name).map(Vec::as_slice);
            let rounding = self.rounding(plan.linear(index, &linear.stem), linear.planned_schemes(plan, index));
            linears.insert(linear.name.as_str(), quantize_linear(weights.linear(&linear.name)?, linear, &rounding, hessian));
        }
        Ok(linears)
    }

    /// Appends what stores `linear`: its quantized tensors, or the source's own.
    fn push_linear<'t>(&'t self, linear: &LinearSpec, quantized: &QuantizedLinear, tensors: &mut Vec<TensorOut<'t>>) -> Result<()> {
        match quantized.float() {
            Some(values) if quantized.changed => {
                let (dtype, bytes) = float_tensor(values, self.request.checkpoint.layout.float_bytes);
                let name = self.stored(&format!("{}.weight", linear.stem));
                tensors.push((name, dtype, vec![linear.rows, linear.cols], Cow::Owned(bytes)));
            }
            Some(_) => tensors.push(self.copy(&format!("{}.weight", linear.stem))?),
            None => {}
        }
        let owned = linear_tensors(&self.stored(&linear.stem), linear, &quantized.parts, self.request.checkpoint.layout.float_bytes);
        tensors.extend(owned.into_iter().map(|(name, dtype, shape, bytes)| (name, dtype, shape, Cow::Owned(bytes))));
        if let Some(scale) = quantized.input_scale {
            tensors.push(float_vector(self.stored(&format!("{}.input_scale", linear.stem)), &[scale]));
        }
        Ok(())
    }

    /// A tensor of the source as it is.
    fn copy(&self, canonical: &str) -> Result<TensorOut<'_>> {
        let (name, tensor) = self.request.checkpoint.raw(canonical)?;
        Ok((name, tensor.dtype, tensor.shape.to_vec(), Cow::Owned(tensor.bytes()?.to_vec())))
    }

    /// SHA-256 over the values of every batch; an error when one is not finite.
    fn boundary_hash(&self, boundary: &[B::Tensor], after: &str) -> Result<String> {
        let mut hash = FloatHash::default();
        for tensor in boundary {
            hash.add(&self.backend.download(tensor)?, after)?;
        }
        Ok(hash.finish())
    }

    /// Keeps both streams and the records, so that a killed run goes on from here.
    fn save_progress(&self, streams: &Streams<B>) -> Result<()> {
        let done = self.state.records.len();
        boundary::write(self.backend, &boundary_file(self.work, done), streams.reference.iter().chain(&streams.quantized))?;
        files::write_atomically(&self.work.join("state.json"), json!(self.state).to_string().as_bytes())?;
        // The boundary before is no longer needed once the state names the new one.
        match fs::remove_file(boundary_file(self.work, done - 1)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::io("removing", &boundary_file(self.work, done - 1), &error))
            }
            _ => Ok(()),
        }
    }

    fn load_streams(&self, sequences: Vec<Sequences>) -> Result<Streams<B>> {
        let path = boundary_file(self.work, self.state.records.len());
        let tokens = || sequences.iter().map(Sequences::tokens);
        let hidden = self.request.checkpoint.config.hidden_size;
        let mut reference = boundary::read(self.backend, &path, tokens().chain(tokens()), hidden)?;
        let quantized = reference.split_off(sequences.len());
        let streams = Streams { reference, quantized, sequences };
        if self.boundary_hash(&streams.quantized, "the last finished block").ok() != self.state.boundaries.last().cloned() {
            return Err(Error::run(format!("{} is damaged: its hash is not the recorded one", path.display()))
                .hint("remove the work folder and run again"));
        }
        Ok(streams)
    }

    /// Writes embedding, final norm, head and whatever the layout does not know (MTP layers) into the last shard, and
    /// compares the sample's float and quantized logits.
    fn write_ends(&self, streams: &Streams<B>) -> Result<Judgement> {
        let (checkpoint, plan, layout) = (self.request.checkpoint, &self.request.plan, &self.request.checkpoint.layout);
        let norm = self.transforms.final_norm(checkpoint)?;
        let mut tensors: Vec<TensorOut> = Vec::new();
        if self.request.steps.transforms.contains(&Transform::FoldNorms) {
            let bytes = norm.iter().flat_map(|value| value.to_le_bytes()).collect();
            tensors.push((self.stored(&layout.final_norm.name), Dtype::F32, layout.final_norm.shape.clone(), Cow::Owned(bytes)));
        } else {
            tensors.push(self.copy(&layout.final_norm.name)?);
        }
        self.push_linear(&layout.embedding, &self.embedding()?, &mut tensors)?;
        let float_head = self.transforms.head(checkpoint)?;
        let mut head = match self.request.donors {
            Some(donors) => donors.head_linear(&float_head, &layout.head, plan.head)?,
            None => {
                let rounding = self.rounding(plan.head, layout.head.schemes(plan.head));
                quantize_linear(&float_head, &layout.head, &rounding, self.head_hessian(&norm, streams)?.as_deref())
            }
        };
        head.input_scale = self.head_scale(&norm, streams)?;
        // A tied head is stored apart as soon as it or the embedding is changed.
        if !layout.tied {
            self.push_linear(&layout.head, &head, &mut tensors)?;
        } else if self.unties() {
            self.monitor.warn("embedding and head were tied; each is now stored for itself");
            if head.float().is_some() && !head.changed {
                let (_, dtype, shape, bytes) = self.copy("embeddings.weight")?;
                tensors.push(("lm_head.weight".into(), dtype, shape, bytes));
            } else {
                self.push_linear(&layout.head, &head, &mut tensors)?;
            }
        }
        for (name, tensor) in checkpoint.tensors() {
            if name.starts_with("mtp.") {
                tensors.push((name.to_owned(), tensor.dtype, tensor.shape.to_vec(), Cow::Owned(tensor.bytes()?.to_vec())));
            }
        }
        publish::write_tensors(&self.files.join(self.shard_name(self.blocks.len())), &tensors)?;

        let original_norm = checkpoint.read(&layout.final_norm.name)?;
        let (reference, quantized) = (self.backend.prepare(checkpoint.head()?)?, self.backend.prepare(head.weights(layout.head.cols))?);
        let (original_norm, norm) = (self.backend.prepare_vector(original_norm)?, self.backend.prepare_vector(norm)?);
        let logits = |head, norm, h: &B::Tensor, tokens: &[usize]| {
            let rows = self.backend.gather_rows(h, tokens)?;
            let x = self.backend.rms_norm(&rows, norm, checkpoint.config.norm_eps, self.backend.reads(head))?;
            self.backend.linear(head, &x)
        };
        let (mut rows, mut hash) = (Vec::new(), FloatHash::default());
        for ((exact, rounded), sequences) in streams.reference.iter().zip(&streams.quantized).zip(&streams.sequences) {
            for tokens in logit_pieces(sequences.tokens(), layout.head.rows) {
                let exact = logits(&reference, &original_norm, exact, &tokens)?;
                let rounded = logits(&quantized, &norm, rounded, &tokens)?;
                hash.add(&self.backend.download(&rounded)?, "the head")?;
                rows.extend(self.backend.divergence(&exact, &rounded)?);
            }
        }
        Ok(Judgement { rows, hash: hash.finish() })
    }

    /// Whether a tied model's embedding and head are no longer the same.
    fn unties(&self) -> bool {
        let plan = &self.request.plan;
        plan.head != Format::W16A16 || plan.embedding != Format::W16A16 || self.request.steps.transforms.contains(&Transform::FoldNorms)
    }

    /// The static scale of the head's input, where it has one.
    fn head_scale(&self, norm: &[f32], streams: &Streams<B>) -> Result<Option<f32>> {
        let steps = &self.request.steps;
        if steps.activations.linears != ScaleKind::Static || !self.request.plan.head.quantizes_activations() {
            return Ok(None);
        }
        let eps = self.request.checkpoint.config.norm_eps;
        let norm = self.backend.prepare_vector(norm.to_vec())?;
        let normalize = |h| self.backend.rms_norm(h, &norm, eps, Emit::FLOAT);
        let inputs = streams.quantized.iter().map(normalize).collect::<Result<Vec<_>>>()?;
        observe::head_scale(self.backend, &inputs, &steps.observers).map(Some)
    }

    /// The Hessian of the head's input, where the method uses one.
    fn head_hessian(&self, norm: &[f32], streams: &Streams<B>) -> Result<Option<Vec<f64>>> {
        if self.request.steps.method != Method::Gptq || self.request.plan.head.weight_bits() == 16 {
            return Ok(None);
        }
        let mut sum = vec![0.0; norm.len() * norm.len()];
        let norm = self.backend.prepare_vector(norm.to_vec())?;
        for h in &streams.quantized {
            let x = self.backend.rms_norm(h, &norm, self.request.checkpoint.config.norm_eps, Emit::FLOAT)?;
            for (sum, value) in sum.iter_mut().zip(self.backend.gram(&x)?) {
                *sum += value;
            }
        }
        Ok(Some(sum))
    }

    fn sample_record(&self, logits: Judgement) -> SampleRecord {
        let summary = statistics::summarize_divergence(&logits.rows);
        SampleRecord {
            sequences: self.request.sample.sequences.len(),
            tokens: self.request.sample.tokens(),
            kld_mean: summary.mean,
            kld_p99: summary.p99,
            top1: summary.top1,
            logits: logits.hash,
            boundaries: self.state.boundaries.clone(),
        }
    }

    /// Writes everything but the shards: index, config.json, companions and strata.toml.
    fn write_manifest(&self, sample: SampleRecord) -> Result<VariantManifest> {
        let (request, checkpoint) = (self.request, self.request.checkpoint);
        let mut weight_map = BTreeMap::new();
        let mut files = BTreeMap::new();
        let mut total = 0;
        for shard in 0..=self.blocks.len() {
            let name = self.shard_name(shard);
            let path = self.files.join(&name);
            let bytes = fs::read(&path).map_err(|error| Error::io("reading", &path, &error))?;
            let tensors = safetensors::SafeTensors::deserialize(&bytes)
                .map_err(|error| Error::run(format!("{} cannot be read back: {error}", path.display())))?;
            for (tensor, view) in tensors.iter() {
                weight_map.insert(tensor.to_owned(), name.clone());
                total += view.data().len();
            }
            files.insert(name, sha256_hex(&bytes));
        }
        let index = json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
        self.write(INDEX_FILE, &pretty(&index))?;

        let mut config: serde_json::Value = crate::checkpoint::parse_config_json(&checkpoint.config_text()?)?;
        let mut layout = checkpoint.layout.clone();
        layout.blocks.clone_from(&self.blocks);
        config["quantization_config"] = quantization_config(request.storage, &layout, &request.plan, |name| self.stored(name));
        if checkpoint.layout.tied && self.unties() {
            config["tie_word_embeddings"] = json!(false);
        }
        self.write("config.json", &pretty(&config))?;
        for (name, bytes) in checkpoint.companions()? {
            self.write(name, &bytes)?;
        }
        let manifest = VariantManifest {
            schema: VARIANT_SCHEMA.into(),
            layout: request.storage,
            provenance: Provenance {
                tool: TOOL.into(),
                source: self.source.clone(),
                recipe: request.recipe.clone(),
                method: request.steps.method.name().into(),
                transforms: request.steps.transforms.clone(),
                sample: request.sample.sha256(),
                seed: request.sample.seed,
                donors: request.donors.map(|donors| donors.name().to_owned()),
            },
            plan: request.plan.clone(),
            activations: request.steps.activations,
            cache: request.steps.cache,
            sample,
            files,
            blocks: self.state.records.clone(),
        };
        let text = toml::to_string(&manifest).map_err(|error| Error::run(format!("{STRATA_FILE} cannot be written: {error}")))?;
        self.write(STRATA_FILE, text.as_bytes())?;
        Ok(manifest)
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        files::write_atomically(&self.files.join(name), bytes)
    }

    /// Opens the finished files and streams the sample through them: every boundary and the logits must be the ones
    /// seen while quantizing.
    fn validate(&self, manifest: &VariantManifest) -> Result<()> {
        let variant = Checkpoint::open(&self.files)?;
        let blocks = self.blocks.len();
        self.monitor.stage("validate", blocks + 1);
        let mut stream = Stream::new(self.backend, &variant, &self.request.sample.batches())?;
        let differs = |what: &str| Error::run(format!("read back from disk, {what} differs from what was measured"));
        let recorded = &manifest.sample.boundaries;
        if self.boundary_hash(stream.boundary(), "the embedding")? != recorded[0] {
            return Err(differs("the embedding"));
        }
        for index in 0..blocks {
            stream.advance(index)?;
            if self.boundary_hash(stream.boundary(), &format!("block {index}"))? != recorded[index + 1] {
                return Err(differs(&format!("block {index}")));
            }
            self.monitor.step(index + 1, format!("block {index} reads back the same"))?;
        }
        let mut hash = FloatHash::default();
        for (batch, sequence) in self.request.sample.sequences.iter().enumerate() {
            for tokens in logit_pieces(sequence.len(), self.request.checkpoint.layout.head.rows) {
                hash.add(&self.backend.download(&stream.logits_at(batch, &tokens)?)?, "the head")?;
            }
        }
        if hash.finish() != manifest.sample.logits {
            return Err(differs("the head"));
        }
        self.monitor.step(blocks + 1, "logits read back the same")
    }
}

/// What the linears of a block have to say, those of one linear after another under the first one's name.
fn gather_notes(linears: &BTreeMap<&str, QuantizedLinear>) -> Vec<String> {
    let mut gathered: Vec<(&str, &str, usize)> = Vec::new();
    for note in linears.values().flat_map(|quantized| &quantized.notes) {
        let (name, what) = note.split_once(": ").unwrap_or(("", note));
        match gathered.iter_mut().find(|(_, known, _)| *known == what) {
            Some((_, _, count)) => *count += 1,
            None => gathered.push((name, what, 0)),
        }
    }
    let line = |(name, what, more)| if more == 0 { format!("{name}: {what}") } else { format!("{name} and {more} more: {what}") };
    gathered.into_iter().map(line).collect()
}

/// The tensors that keep the scales of a mixer's internals: canonical name, values.
fn internal_tensors(spec: &BlockSpec, scales: &SsmScales) -> Vec<(String, Vec<f32>)> {
    let values = [&scales.z, &scales.conv_in, &scales.conv_out, &scales.dt];
    spec.internal_scales().into_iter().zip(values).map(|(tensor, values)| (tensor.name, values.clone())).collect()
}

fn float_vector(name: String, values: &[f32]) -> TensorOut<'static> {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    (name, Dtype::F32, vec![values.len()], Cow::Owned(bytes))
}

/// The second moment of the stream in front of the blocks: measured once, and kept in the work folder for a run that
/// goes on.
fn kept_second_moment<B: Backend>(
    backend: &B,
    request: &QuantizeRequest<'_>,
    work: &Path,
    key: &str,
    monitor: &Monitor,
) -> Result<Vec<f64>> {
    let path = work.join(format!("second-moment-{}.f64", &key[..16]));
    let hidden = request.checkpoint.config.hidden_size;
    if let Ok(bytes) = fs::read(&path)
        && bytes.len() == 8 * hidden * hidden
    {
        monitor.log("the calibration pass of an earlier run is used again");
        return Ok(bytes.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect());
    }
    let moment = calibrate::second_moment(backend, request.checkpoint, &request.sample.batches(), monitor)?;
    files::write_atomically(&path, &moment.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
    Ok(moment)
}

/// Tokens of a sequence in pieces whose logits, of `vocabulary` entries each, take at most 32 MiB.
fn logit_pieces(tokens: usize, vocabulary: usize) -> impl Iterator<Item = Vec<usize>> {
    let piece = ((1 << 23) / vocabulary).max(1);
    (0..tokens).step_by(piece).map(move |start| (start..tokens.min(start + piece)).collect())
}

/// Tells the monitor which stages come. The unit of work is a pass over the sample through one block; choosing a
/// block's codes takes several.
fn announce(request: &QuantizeRequest<'_>, monitor: &Monitor) {
    let blocks = request.checkpoint.layout.blocks.len() as f64;
    let choosing = if request.steps.method == Method::Gptq { 12.0 } else { 5.0 };
    let mut stages = vec![("load", 0.5), ("quantize", choosing * blocks), ("validate", blocks + 1.0), ("save", 0.1)];
    if request.steps.transforms.contains(&Transform::RotateResidual) {
        stages.insert(1, ("calibrate", 1.5 * blocks));
    }
    monitor.plan(stages);
}

fn boundary_file(work: &Path, blocks_done: usize) -> PathBuf {
    work.join(format!("boundary-{blocks_done:05}.f32"))
}

/// The state of an earlier run; a missing or unreadable one means starting afresh.
fn read_state(work: &Path) -> Option<State> {
    serde_json::from_slice(&fs::read(work.join("state.json")).ok()?).ok()
}

fn pretty(value: &serde_json::Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}
