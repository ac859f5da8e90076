//! load → analyze → quantize → validate → save, one block at a time.
//!
//! Two residual streams of the sample move from block to block: the float model's, and the quantized model's. After
//! each block its shard is in the work folder and, as often as that is cheap, both streams and what was measured; a run that ends
//! early goes on from there. The finished files are opened again and must give the same streams and logits before they appear.

mod block;
mod ends;
mod laps;
mod variant;

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use serde_json::json;

use self::laps::Laps;
use super::boundary::{self, FloatHash};
use super::calibrate;
use super::device_need::{DeviceNeed, Room, Shapes};
use super::donors::Donors;
use super::method::{QuantizedLinear, Rounding, quantize_linear};
use super::need::MemoryNeed;
use super::publish;
use super::recipe::{Method, Steps};
use super::sample::Sample;
use super::transform::Transforms;
use crate::backend::{Backend, Divergence, Sequences};
use crate::checkpoint::{BlockRecord, BlockSpec, Checkpoint, Layout, SampleRecord, StorageLayout, TOOL, VariantManifest, sha256_hex};
use crate::error::{Error, ErrorKind, Result};
use crate::eval::statistics;
use crate::files;
use crate::format::{Format, Plan, Scheme, Transform};
use crate::model::{Block, Boundary, Stream, WaitingRoom};
use crate::monitor::{DeviceMemory, Monitor};

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
    /// Bytes of memory that may be taken: streams of the sample that do not fit wait in a file in the work folder.
    pub host_memory: u64,
    /// Take quantized weights from these instead of rounding again; of the same checkpoint, steps and sample.
    pub donors: Option<&'a Donors>,
}

/// What is known after some blocks: the part of a manifest that a resumed run needs.
#[derive(Serialize, Deserialize)]
struct State {
    key: String,
    /// What computed the hashes: another device computes others.
    device: String,
    records: Vec<BlockRecord>,
    /// Hash of the quantized stream in front of the first block and behind each finished one.
    boundaries: Vec<String>,
}

/// The float and the quantized residual stream of each sample sequence.
struct Streams<B: Backend> {
    reference: Boundary<B>,
    quantized: Boundary<B>,
    /// The float stream behind the block that is at work.
    behind: Boundary<B>,
    sequences: Vec<Sequences>,
    /// The next block as the checkpoint stores it, where it was read ahead.
    next: Option<Block<B>>,
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
/// request run again goes on after the last block whose streams were kept.
pub fn quantize<B: Backend>(backend: &B, request: &QuantizeRequest<'_>, monitor: &Monitor) -> Result<VariantManifest> {
    if request.output.exists() && !request.force {
        return Err(publish::exists(&request.output));
    }
    if request.checkpoint.variant.is_some() {
        return Err(Error::input(format!("{} is quantized already", request.checkpoint.name)).hint("give the original checkpoint"));
    }
    super::divide_nothing();
    let work = publish::work_directory(&request.output);
    let lock = publish::lock(&work, "wait for it, or choose another output with -o")?;
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
    room: WaitingRoom<'a>,
    /// Bytes of the memory of a device that has its own, as predicted.
    predicted: Option<u64>,
    /// When the streams were kept last.
    kept: Option<Kept>,
    /// The embedding as it will be stored, where that is in codes: it is needed at the beginning and at the end.
    rounded_embedding: OnceCell<QuantizedLinear>,
}

/// The streams behind `blocks` blocks are in the work folder.
#[derive(Clone, Copy)]
struct Kept {
    blocks: usize,
    ended: Instant,
    took: Duration,
}

/// How many times longer than keeping the streams takes work goes on before they are kept again.
const SAVING_SHARE: u32 = 20;
/// Keeping the streams this fast is done behind every block.
const CHEAP_SAVING: Duration = Duration::from_secs(1);

impl<'a, B: Backend> Pipeline<'a, B> {
    fn new(backend: &'a B, request: &'a QuantizeRequest<'a>, work: &'a Path, monitor: &'a Monitor<'a>) -> Result<Self> {
        announce(request, monitor);
        monitor.stage("load", 1);
        let source = request.checkpoint.sha256()?;
        monitor.step(1, "source hashed")?;
        let key = request_key(&source, request);
        let files = work.join("variant");
        let state = read_state(work).filter(|state| state.key == key && state.device == backend.name());
        let state = match state {
            Some(state) => {
                monitor.log(format!("going on after {} finished blocks", state.records.len()));
                state
            }
            None => {
                publish::remove(&files)?;
                State { key, device: backend.name(), records: Vec::new(), boundaries: Vec::new() }
            }
        };
        fs::create_dir_all(&files).map_err(|error| Error::io("creating", &files, &error))?;
        let mut layout = request.checkpoint.layout.clone();
        if request.storage == StorageLayout::Portable {
            layout.merge_slices();
        }
        backend.reset_peak()?;
        let (room, predicted) = waiting_room(backend, request, &layout, work, monitor)?;
        let transforms = match request.donors {
            Some(donors) => donors.transforms().clone(),
            None => {
                let mut laps = Laps::start();
                let second_moment = if request.steps.transforms.contains(&Transform::RotateResidual) {
                    Some(kept_second_moment(backend, request, room, &state.key, monitor)?)
                } else {
                    None
                };
                laps.end("second moment");
                let hidden = request.checkpoint.config.hidden_size;
                let transforms = Transforms::new(backend, &request.steps.transforms, second_moment.as_deref(), hidden)?;
                laps.end("rotation");
                monitor.log(laps.line("residual stream"));
                transforms
            }
        };
        let blocks = layout.blocks;
        Ok(Self {
            backend,
            request,
            blocks,
            monitor,
            files,
            work,
            source,
            state,
            transforms,
            room,
            predicted,
            kept: None,
            rounded_embedding: OnceCell::new(),
        })
    }

    fn rounding(&self, format: Format, schemes: Vec<Scheme>) -> Rounding<'_> {
        let float_bytes = self.request.checkpoint.layout.float_bytes;
        let (method, transforms) = (self.request.steps.method, self.request.steps.transforms.as_slice());
        Rounding { method, format, schemes, transforms, float_bytes }
    }

    /// Hands the embedding as it will be stored to `use_it`: rounded without a Hessian, for its inputs are token ids.
    fn with_embedding<R>(&self, use_it: impl FnOnce(&QuantizedLinear) -> Result<R>) -> Result<R> {
        if let Some(rounded) = self.rounded_embedding.get() {
            return use_it(rounded);
        }
        let table = self.transforms.embedding(self.backend, self.request.checkpoint)?;
        let (linear, format) = (&self.request.checkpoint.layout.embedding, self.request.plan.embedding);
        let rounded = quantize_linear(&table, linear, &self.rounding(format, linear.schemes(format)), None)?;
        drop(table);
        // In float it would take as much memory as a block.
        if rounded.float().is_some() { use_it(&rounded) } else { use_it(self.rounded_embedding.get_or_init(|| rounded)) }
    }

    fn run(mut self) -> Result<VariantManifest> {
        let streams = self.quantize_blocks()?;
        let sample = self.sample_record(self.write_ends(&streams)?);
        let place = streams.quantized.place();
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
        if let (Some(predicted_bytes), Some(peak_bytes)) = (self.predicted, self.backend.peak_bytes()) {
            self.monitor.device_memory(DeviceMemory { predicted_bytes, peak_bytes, streams: place });
        }
        self.monitor.stage("save", 1);
        publish::publish(&self.files, &self.request.output, self.request.force)?;
        self.monitor.step(1, self.request.output.display().to_string())?;
        Ok(manifest)
    }

    fn quantize_blocks(&mut self) -> Result<Streams<B>> {
        let blocks = self.blocks.len();
        self.monitor.stage("quantize", blocks);
        let batches = self.request.sample.batches();
        let hidden = self.request.checkpoint.config.hidden_size;
        let tokens: Vec<usize> = batches.iter().map(|(ids, _)| ids.len()).collect();
        let empty = || Boundary::within(self.room, &tokens, hidden);
        let sequences = batches.iter().map(|(_, sequences)| sequences.clone()).collect();
        let mut streams = Streams { reference: empty()?, quantized: empty()?, behind: empty()?, sequences, next: None };
        if streams.reference.is_spilled() {
            self.monitor.log(format!("the sample's streams wait in scratch files in {}", self.work.display()));
        }
        if self.state.boundaries.is_empty() {
            let mut laps = Laps::start();
            streams.reference = Stream::within(self.backend, self.request.checkpoint, &batches, self.room)?.into_boundary();
            laps.end("float rows");
            let mut table = self.with_embedding(|rounded| Ok(rounded.weights(hidden)))?;
            laps.end("rounding");
            table.int8_activations = false;
            let table = self.backend.prepare_embedding(table)?;
            for (index, (ids, _)) in batches.iter().enumerate() {
                streams.quantized.put(self.backend, index, self.backend.embed(&table, ids)?)?;
            }
            laps.end("quantized rows");
            self.state.boundaries.push(self.boundary_hash(&streams.quantized, "the embedding")?);
            laps.end("hash");
            self.monitor.log(laps.line("embedding"));
        } else {
            self.load_streams(&mut streams, &tokens)?;
        }
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
            let mut laps = Laps::start();
            self.state.boundaries.push(self.boundary_hash(&streams.quantized, &format!("block {index}"))?);
            laps.end("hash");
            self.save_progress(&streams)?;
            laps.end("kept");
            self.monitor.log(laps.line(&format!("behind block {index}")));
            self.monitor.step(index + 1, note)?;
        }
        Ok(streams)
    }

    /// SHA-256 over the values of every batch; an error when one is not finite.
    fn boundary_hash(&self, boundary: &Boundary<B>, after: &str) -> Result<String> {
        let mut hash = FloatHash::default();
        for tensor in boundary.iter(self.backend) {
            hash.add_tensor(self.backend, &tensor?, after)?;
        }
        Ok(hash.finish())
    }

    /// Keeps both streams and the records, so that a killed run goes on from here. Where that takes more than a second, not
    /// before twenty times as long has passed: it costs a twentieth at most.
    fn save_progress(&mut self, streams: &Streams<B>) -> Result<()> {
        let done = self.state.records.len();
        let costly = |kept: &Kept| kept.took > CHEAP_SAVING && kept.ended.elapsed() < SAVING_SHARE * kept.took;
        if self.kept.as_ref().is_some_and(costly) && done < self.blocks.len() {
            return Ok(());
        }
        let start = Instant::now();
        let tensors = streams.reference.iter(self.backend).chain(streams.quantized.iter(self.backend));
        boundary::write(self.backend, &boundary_file(self.work, done), tensors)?;
        files::write_atomically(&self.work.join("state.json"), json!(self.state).to_string().as_bytes())?;
        // The boundary before is no longer needed once the state names the new one.
        let before = boundary_file(self.work, self.kept.map_or(done - 1, |kept| kept.blocks));
        self.kept = Some(Kept { blocks: done, ended: Instant::now(), took: start.elapsed() });
        match fs::remove_file(&before) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("removing", &before, &error)),
            _ => Ok(()),
        }
    }

    /// Reads the streams that a run before kept, of batches of so many `tokens`.
    fn load_streams(&self, streams: &mut Streams<B>, tokens: &[usize]) -> Result<()> {
        let path = boundary_file(self.work, self.state.records.len());
        let hidden = self.request.checkpoint.config.hidden_size;
        boundary::read(self.backend, &path, tokens, hidden, [&mut streams.reference, &mut streams.quantized])?;
        if self.boundary_hash(&streams.quantized, "the last finished block").ok() != self.state.boundaries.last().cloned() {
            return Err(Error::run(format!("{} is damaged: its hash is not the recorded one", path.display()))
                .hint("remove the work folder and run again"));
        }
        Ok(())
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
}

/// Where the sample's streams wait: on a device with memory of its own as far as that holds them, in the host's as far as what may be
/// taken allows, otherwise in the `work` folder, which is where the variant's bytes go, too. Says what the job needs, and gives what
/// it is predicted to take of the device's memory.
fn waiting_room<'a, B: Backend>(
    backend: &B,
    request: &QuantizeRequest<'_>,
    layout: &Layout,
    work: &'a Path,
    monitor: &Monitor,
) -> Result<(WaitingRoom<'a>, Option<u64>)> {
    let (config, method) = (&request.checkpoint.config, request.steps.method);
    let free = backend.free_bytes()?;
    let hessians = method.uses_hessians() && request.donors.is_none();
    // A device keeps its sums; the asymmetric correction's are the host's.
    let on_host = hessians && (free.is_none() || method == Method::Gptaq);
    let need = MemoryNeed::of(layout, config.hidden_size, request.sample.tokens(), on_host);
    monitor.log(need.statement());
    let host = need.held(request.host_memory)?;
    let Some(free) = free else { return Ok((WaitingRoom { held: host, on_host: 0, scratch: work, ahead: false }, None)) };
    let lengths: Vec<usize> = request.sample.sequences.iter().map(Vec::len).collect();
    let (bf16, steps, plan) = (request.checkpoint.is_bf16(), &request.steps, &request.plan);
    let device = DeviceNeed::of(&Shapes { layout, config, bf16, steps, plan, hessians, lengths: &lengths });
    monitor.log(device.statement());
    let Room { streams, ahead, bytes } = device.within(free, &backend.name())?;
    if !streams {
        monitor.log("the sample's streams wait beside the device, which has no room for them");
    }
    let held = if streams { u64::MAX } else { 0 };
    Ok((WaitingRoom { held, on_host: host, scratch: work, ahead }, Some(bytes)))
}

/// The second moment of the stream in front of the blocks: measured once, and kept in the work folder for a run that
/// goes on.
fn kept_second_moment<B: Backend>(
    backend: &B,
    request: &QuantizeRequest<'_>,
    room: WaitingRoom<'_>,
    key: &str,
    monitor: &Monitor,
) -> Result<Vec<f64>> {
    let path = room.scratch.join(format!("second-moment-{}.f64", &key[..16]));
    let hidden = request.checkpoint.config.hidden_size;
    if let Ok(bytes) = fs::read(&path)
        && bytes.len() == 8 * hidden * hidden
    {
        monitor.log("the calibration pass of an earlier run is used again");
        return Ok(bytes.as_chunks::<8>().0.iter().map(|bytes| f64::from_le_bytes(*bytes)).collect());
    }
    let stream = Stream::within(backend, request.checkpoint, &request.sample.batches(), room)?;
    let moment = calibrate::second_moment(backend, request.checkpoint, stream, monitor)?;
    files::write_atomically(&path, &moment.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
    Ok(moment)
}

/// Tells the monitor which stages come. The unit of work is a pass over the sample through one block; choosing a
/// block's codes takes several.
fn announce(request: &QuantizeRequest<'_>, monitor: &Monitor) {
    let blocks = request.checkpoint.layout.blocks.len() as f64;
    let choosing = if request.steps.method.uses_hessians() { 12.0 } else { 5.0 };
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
