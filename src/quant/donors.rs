//! Donors: every linear quantized once at each width, from which any plan is put together without quantizing again.
//!
//! A donor's Hessian is that of the float model's activations, and so are the magnitudes that it is smoothed by, so that it
//! depends on no plan. GPTQ rounds every row of a linear for itself: slices of one linear can come from donors of different
//! widths. Donors lie in a folder named by the
//! hash of source, transforms, rounding, sample and tool, one file a block and width, each with its own hash in the folder's index.
//! Start with [`Donors::open`].

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};

use half::bf16;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::calibrate::{self, Maxima};
use super::hessian::{Hessian, Summed};
use super::method::{QuantizedLinear, Rounding, quantize_linear};
use super::observe::{self, Wanted};
use super::publish::{self, TensorOut};
use super::recipe::Steps;
use super::sample::Sample;
use super::transform::Transforms;
use super::weights::{BlockWeights, FloatBlock, FloatLinear};
use crate::backend::{Backend, Emit, Sequences, SsmInternals, SsmScales};
use crate::checkpoint::{BlockSpec, Checkpoint, Dtype, LinearSpec, TOOL, sha256_hex};
use crate::error::{Error, Result};
use crate::files;
use crate::format::{BlockKind, Format, LinearWeights, QuantizedMatrix, Scheme, SsmActivations, Transform, WeightPart, packing};
use crate::model::{Block, BlockSource, Boundary, Stream};
use crate::monitor::Monitor;

const INDEX: &str = "donors.json";

/// Tensors of a file of static scales: [`SsmScales`].
const SCALES: [&str; 4] = ["z", "conv_in", "conv_out", "dt"];
const MOMENT: &str = "second-moment.bin";

/// What the folder's index holds.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Index {
    files: BTreeMap<String, DonorFile>,
}

impl Index {
    /// That of a folder; an empty one where there is none yet.
    fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(INDEX);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| damaged(&path, &error)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Self::default()),
            Err(error) => Err(Error::io("reading", &path, &error)),
        }
    }
}

/// One block at one width.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct DonorFile {
    sha256: String,
    /// What differs from the format asked for, by linear.
    notes: BTreeMap<String, Vec<String>>,
}

/// The donors of one checkpoint, list of steps and sample.
pub struct Donors {
    directory: PathBuf,
    key: String,
    steps: Steps,
    float_bytes: usize,
    index: Index,
    transforms: Transforms,
}

/// Where a linear is: in a block, or the head.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    Block(usize),
    Head,
}

impl Place {
    fn file(self, format: Format) -> String {
        match self {
            Self::Block(index) => format!("block-{index:05}.{format}.safetensors"),
            Self::Head => format!("head.{format}.safetensors"),
        }
    }
}

/// The file of static scales of the inside of block `spec`.
fn scales_file(spec: &BlockSpec) -> String {
    format!("block-{:05}.scales.safetensors", spec.index)
}

/// The file of the largest magnitudes that block `spec` is smoothed by.
fn maxima_file(spec: &BlockSpec) -> String {
    format!("block-{:05}.maxima.safetensors", spec.index)
}

/// The format of the same weights with 16-bit activations: what a donor is named by.
pub fn weights_of(format: Format) -> Format {
    let same = |candidate: &Format| candidate.weight_bits() == format.weight_bits() && !candidate.quantizes_activations();
    Format::ALL.into_iter().find(same).map_or(format, |wide| wide.with_group(format.largest_group()))
}

impl Donors {
    /// Hash of everything that decides the donors' bytes. How linears read activations is not among it.
    pub fn key(source: &str, steps: &Steps, sample: &Sample) -> String {
        let identity = json!({
            "tool": TOOL,
            "source": source,
            "transforms": steps.transforms,
            "method": steps.method,
            "internals": steps.internals(),
            "sample": sample.sha256(),
        });
        sha256_hex(identity.to_string().as_bytes())
    }

    /// Opens the donors in the folder for them under `store`, which is made if it is not there. A rotation of the residual
    /// stream takes a pass of the float model over the sample the first time.
    pub fn open<B: Backend>(
        backend: &B,
        checkpoint: &Checkpoint,
        steps: &Steps,
        sample: &Sample,
        store: &Path,
        monitor: &Monitor,
    ) -> Result<Self> {
        super::divide_nothing();
        let key = Self::key(&checkpoint.sha256()?, steps, sample);
        let directory = store.join(&key[..16]);
        fs::create_dir_all(&directory).map_err(|error| Error::io("creating", &directory, &error))?;
        let index = Index::read(&directory)?;
        let moment = if steps.transforms.contains(&Transform::RotateResidual) {
            Some(second_moment(backend, checkpoint, sample, &directory.join(MOMENT), monitor)?)
        } else {
            None
        };
        let transforms = Transforms::new(backend, &steps.transforms, moment.as_deref(), checkpoint.config.hidden_size)?;
        Ok(Self { directory, key, steps: steps.clone(), float_bytes: checkpoint.layout.float_bytes, index, transforms })
    }

    /// Takes the folder for this process, which is about to make donors: two that write one index would lose each other's.
    /// What another one has made meanwhile is there from now on.
    pub fn lock(&mut self) -> Result<fs::File> {
        let lock = publish::lock(&self.directory, "wait for it: the donors that it makes serve here, too")?;
        self.index = Index::read(&self.directory)?;
        Ok(lock)
    }

    /// The hash that names the donors.
    pub fn name(&self) -> &str {
        &self.key
    }

    /// The transforms that the donors' weights have been through.
    pub fn transforms(&self) -> &Transforms {
        &self.transforms
    }

    /// Whether the linears at `place` are there in the weights of `format`. Float weights need no donor.
    pub fn has(&self, place: Place, format: Format) -> bool {
        format.weight_bits() == 16 || self.index.files.contains_key(&place.file(weights_of(format)))
    }

    /// Whether block `spec` has all that plans of `formats` need of it.
    pub fn has_block(&self, spec: &BlockSpec, formats: &[Format]) -> bool {
        let scales = self.keeps_scales(spec).then(|| scales_file(spec));
        let maxima = self.smooths().then(|| maxima_file(spec));
        formats.iter().all(|format| self.has(Place::Block(spec.index), *format))
            && scales.into_iter().chain(maxima).all(|file| self.index.files.contains_key(&file))
    }

    /// Whether blocks are smoothed.
    fn smooths(&self) -> bool {
        self.steps.transforms.iter().any(|transform| transform.smooths())
    }

    /// The largest magnitudes in the float model that block `spec` is smoothed by; none where nothing smooths.
    pub(super) fn maxima(&self, spec: &BlockSpec) -> Result<Maxima> {
        if self.smooths() { self.read(&maxima_file(spec))?.all_floats() } else { Ok(Maxima::new()) }
    }

    /// Whether static scales are kept for the inside of block `spec`.
    fn keeps_scales(&self, spec: &BlockSpec) -> bool {
        spec.kind == BlockKind::Ssm && self.steps.activations.ssm == SsmActivations::Int8Static
    }

    /// The inside of block `spec` where it reads int8.
    pub(super) fn internals(&self, spec: &BlockSpec) -> Result<SsmInternals> {
        Ok(match self.steps.activations.ssm {
            _ if spec.kind != BlockKind::Ssm => SsmInternals::Float,
            SsmActivations::Float => SsmInternals::Float,
            SsmActivations::Int8PerToken => SsmInternals::Int8PerToken,
            SsmActivations::Int8Static => {
                let file = self.read(&scales_file(spec))?;
                let [z, conv_in, conv_out, dt] = SCALES.map(|name| file.floats(name));
                SsmInternals::Int8Static(SsmScales { z: z?, conv_in: conv_in?, conv_out: conv_out?, dt: dt? })
            }
        })
    }

    /// The transformed weights of block `spec`.
    pub fn block<'a, B: Backend>(&'a self, backend: &B, checkpoint: &'a Checkpoint, spec: &'a BlockSpec) -> Result<DonorBlock<'a>> {
        let weights = self.transforms.block(backend, checkpoint, spec, &self.maxima(spec)?)?;
        Ok(DonorBlock { donors: self, checkpoint, spec, weights })
    }

    /// Makes the donors of block `spec` that are missing among those for `formats`, and the static scales of its inside.
    /// `stream` is the sample's residual stream in front of the block in the checkpoint's basis, `inputs` in the transforms'.
    pub fn make_block<B: Backend>(
        &mut self,
        backend: &B,
        checkpoint: &Checkpoint,
        spec: &BlockSpec,
        formats: &[Format],
        (stream, inputs): (&Boundary<B>, &Boundary<B>),
        sequences: &[Sequences],
        monitor: &Monitor,
    ) -> Result<()> {
        if self.has_block(spec, formats) {
            return Ok(());
        }
        let place = Place::Block(spec.index);
        let missing: Vec<Format> = formats.iter().copied().filter(|format| !self.has(place, *format)).collect();
        if self.smooths() && !self.index.files.contains_key(&maxima_file(spec)) {
            let transforms = &self.steps.transforms;
            let block = Block::load(backend, checkpoint, spec.index)?;
            let maxima = calibrate::float_pass(backend, checkpoint, (spec, &block), transforms, (stream, sequences), |_, _| Ok(()))?;
            let vector = |(name, values): (String, Vec<f64>)| {
                publish::float_vector(name, &values.into_iter().map(|value| value as f32).collect::<Vec<_>>())
            };
            self.keep(maxima_file(spec), &maxima.into_iter().map(vector).collect::<Vec<_>>(), BTreeMap::new())?;
        }
        let weights = self.transforms.block(backend, checkpoint, spec, &self.maxima(spec)?)?;
        let source = FloatBlock { checkpoint, weights: &weights, transforms: &self.steps.transforms };
        let block = Block::assemble(backend, &checkpoint.config, spec, &source)?;
        if self.keeps_scales(spec) {
            let wanted = Wanted { linears: false, internals: true };
            let (observers, config) = (&self.steps.observers, &checkpoint.config);
            let scales = observe::static_scales(backend, config, spec, (&block, &source), (inputs, sequences), observers, wanted)?;
            if let Some(SsmScales { z, conv_in, conv_out, dt }) = scales.internals {
                let values = [z, conv_in, conv_out, dt];
                let tensors: Vec<TensorOut> =
                    SCALES.iter().zip(&values).map(|(name, values)| publish::float_vector((*name).to_owned(), values)).collect();
                self.keep(scales_file(spec), &tensors, BTreeMap::new())?;
            }
        }
        let hessians = if self.steps.method.uses_hessians() && !missing.is_empty() {
            calibrate::hessians(backend, spec, &block, inputs, sequences, monitor)?
        } else {
            BTreeMap::new()
        };
        for format in missing {
            monitor.check()?;
            if !self.has(place, format) {
                let hessian = |name: &str| hessians.get(name).map(|hessian| hessian as &dyn Hessian);
                self.make(place, &spec.linears, format, |name| weights.linear(name), hessian)?;
            }
        }
        Ok(())
    }

    /// Makes the head's donor for `format` if it is missing. `inputs` is the sample's residual stream behind the last
    /// block, in the transforms' basis.
    pub fn make_head<B: Backend>(&mut self, backend: &B, checkpoint: &Checkpoint, format: Format, inputs: &Boundary<B>) -> Result<()> {
        if self.has(Place::Head, format) {
            return Ok(());
        }
        let head = self.transforms.head(backend, checkpoint)?;
        let norm = backend.prepare_vector(self.transforms.final_norm(checkpoint)?)?;
        let mut sum = None;
        for h in inputs.iter(backend) {
            let x = backend.rms_norm(&h?, &norm, checkpoint.config.norm_eps, Emit::FLOAT)?;
            backend.add_gram(&mut sum, &x)?;
        }
        let hessian = sum.filter(|_| self.steps.method.uses_hessians()).map(|sum| Summed::new(backend, sum)).transpose()?;
        let hessian = hessian.as_ref().map(|hessian| hessian as &dyn Hessian);
        let head_spec = std::slice::from_ref(&checkpoint.layout.head);
        self.make(Place::Head, head_spec, format, |_| Ok(&head), |_| hessian)
    }

    /// The head `spec` in `format`; `float` gives its transformed weights.
    pub(super) fn head_linear(&self, float: &FloatLinear, spec: &LinearSpec, format: Format) -> Result<QuantizedLinear> {
        let assembled = self.assemble(Place::Head, [spec], |_, _| format, |_| Ok(float))?;
        assembled.into_values().next().ok_or_else(|| Error::run("the head was not put together"))
    }

    /// The head in `format` on the device.
    pub fn head<B: Backend>(&self, backend: &B, checkpoint: &Checkpoint, format: Format) -> Result<B::Linear> {
        let spec = &checkpoint.layout.head;
        backend.prepare(self.head_linear(&self.transforms.head(backend, checkpoint)?, spec, format)?.weights(spec.cols))
    }

    /// Logits of `head` for rows of the residual stream behind the last block, in the transforms' basis.
    pub fn logits<B: Backend>(&self, backend: &B, checkpoint: &Checkpoint, head: &B::Linear, h: &B::Tensor) -> Result<B::Tensor> {
        let norm = backend.prepare_vector(self.transforms.final_norm(checkpoint)?)?;
        backend.linear(head, &backend.rms_norm(h, &norm, checkpoint.config.norm_eps, backend.reads(head))?)
    }

    /// Quantizes `linears` in the weights of `format` and keeps them. `float` and `hessian` give a linear's transformed
    /// weights and the Hessian of its input by name.
    fn make<'a>(
        &mut self,
        place: Place,
        linears: &[LinearSpec],
        format: Format,
        float: impl Fn(&str) -> Result<&'a FloatLinear>,
        hessian: impl Fn(&str) -> Option<&'a dyn Hessian>,
    ) -> Result<()> {
        let format = weights_of(format);
        let mut tensors: Vec<TensorOut> = Vec::new();
        let mut notes = BTreeMap::new();
        for linear in linears {
            let rounding = self.rounding(format, linear.schemes(format));
            let quantized = quantize_linear(float(&linear.name)?, linear, &rounding, hessian(&linear.name))?;
            for (part, weights) in quantized.parts.iter().enumerate() {
                if let WeightPart::Quantized(matrix) = weights {
                    push_matrix(&format!("{}/{part}", linear.name), matrix, &mut tensors);
                }
            }
            if !quantized.notes.is_empty() {
                notes.insert(linear.name.clone(), quantized.notes);
            }
        }
        self.keep(place.file(format), &tensors, notes)
    }

    /// Writes a file and notes it in the index.
    fn keep(&mut self, name: String, tensors: &[TensorOut], notes: BTreeMap<String, Vec<String>>) -> Result<()> {
        let path = self.directory.join(&name);
        publish::write_tensors(&path, tensors)?;
        let bytes = fs::read(&path).map_err(|error| Error::io("reading", &path, &error))?;
        self.index.files.insert(name, DonorFile { sha256: sha256_hex(&bytes), notes });
        let index = serde_json::to_vec(&self.index).map_err(|error| Error::run(format!("the donors' index cannot be written: {error}")))?;
        files::write_atomically(&self.directory.join(INDEX), &index)
    }

    fn rounding(&self, format: Format, schemes: Vec<Scheme>) -> Rounding<'_> {
        let transforms = self.steps.transforms.as_slice();
        Rounding { method: self.steps.method, format, schemes, transforms, float_bytes: self.float_bytes }
    }

    /// The embedding in `format` on the device, rounded without a Hessian.
    pub fn embedding<B: Backend>(&self, backend: &B, checkpoint: &Checkpoint, format: Format) -> Result<B::Embedding> {
        let (table, spec) = (self.transforms.embedding(backend, checkpoint)?, &checkpoint.layout.embedding);
        let mut table = quantize_linear(&table, spec, &self.rounding(format, spec.schemes(format)), None)?.weights(spec.cols);
        table.int8_activations = false;
        backend.prepare_embedding(table)
    }

    /// The linears at `place` under formats that `formats` gives for (linear, slice), ready for a backend. `float` gives
    /// their transformed weights. A missing donor is an error.
    pub(super) fn assemble<'l, 'w>(
        &self,
        place: Place,
        linears: impl IntoIterator<Item = &'l LinearSpec>,
        formats: impl Fn(&LinearSpec, &str) -> Format,
        float: impl Fn(&str) -> Result<&'w FloatLinear>,
    ) -> Result<BTreeMap<&'l str, QuantizedLinear>> {
        let mut read: BTreeMap<String, File> = BTreeMap::new();
        let mut assembled = BTreeMap::new();
        for linear in linears {
            let own = float(&linear.name)?;
            let slices: Vec<Format> = linear.slices.iter().map(|slice| formats(linear, slice.name)).collect();
            let schemes: Vec<Scheme> =
                linear.slices.iter().zip(&slices).map(|(slice, format)| Scheme::for_width(*format, slice.min_bits, linear.cols)).collect();
            // Everything but the codes; float slices too.
            let format = formats(linear, "");
            let floats = vec![Scheme::Float; schemes.len()];
            let mut quantized = quantize_linear(own, linear, &self.rounding(format, floats), None)?;
            if schemes.iter().any(|scheme| *scheme != Scheme::Float) {
                let mut parts = Vec::with_capacity(slices.len());
                let mut start = 0;
                for ((slice, format), scheme) in linear.slices.iter().zip(&slices).zip(&schemes) {
                    let rows = start..start + slice.rows;
                    start = rows.end;
                    if *scheme == Scheme::Float {
                        parts.push(WeightPart::Float(self.stored_floats(&own.values()[rows.start * linear.cols..rows.end * linear.cols])));
                        continue;
                    }
                    let file = match read.entry(place.file(weights_of(*format))) {
                        Entry::Occupied(entry) => entry.into_mut(),
                        Entry::Vacant(entry) => {
                            let file = self.read(entry.key())?;
                            entry.insert(file)
                        }
                    };
                    parts.push(WeightPart::Quantized(file.rows(linear, weights_of(*format), rows)?));
                    quantized.notes.extend(file.notes.get(&linear.name).into_iter().flatten().cloned());
                }
                quantized.notes.sort();
                quantized.notes.dedup();
                quantized.parts = if schemes.iter().all(|scheme| *scheme == schemes[0]) { vec![join(parts)] } else { parts };
            }
            assembled.insert(linear.name.as_str(), quantized);
        }
        Ok(assembled)
    }

    /// Float rows of a linear whose other slices are quantized, as the pipeline stores them.
    fn stored_floats(&self, values: &[f32]) -> Vec<f32> {
        let round = |value: &f32| if self.float_bytes == 2 { bf16::from_f32(*value).to_f32() } else { *value };
        values.iter().map(round).collect()
    }

    fn read(&self, name: &str) -> Result<File> {
        let path = self.directory.join(name);
        let entry = self.index.files.get(name).ok_or_else(|| {
            Error::input(format!("there is no donor {name} in {}", self.directory.display()))
                .hint("run `strata sensitivity` with this format among its --formats")
        })?;
        let bytes = fs::read(&path).map_err(|error| Error::io("reading", &path, &error))?;
        if sha256_hex(&bytes) != entry.sha256 {
            return Err(Error::run(format!("{} is not the file that was made", path.display()))
                .hint("it was changed or damaged since: remove its folder and run `strata sensitivity` again"));
        }
        Ok(File { path, bytes, notes: entry.notes.clone() })
    }
}

/// A block whose weights have been through the transforms, to be quantized in part or whole.
pub struct DonorBlock<'a> {
    donors: &'a Donors,
    checkpoint: &'a Checkpoint,
    spec: &'a BlockSpec,
    weights: BlockWeights,
}

impl DonorBlock<'_> {
    /// The block on the device with every linear to which `formats` gives a format for (linear, slice) quantized, and the
    /// inside of a state-space block too where its `in_proj` reads int8.
    pub fn prepare<B: Backend>(&self, backend: &B, formats: impl Fn(&LinearSpec, &str) -> Option<Format>) -> Result<Block<B>> {
        let quantized: Vec<&LinearSpec> = self.spec.linears.iter().filter(|linear| formats(linear, "").is_some()).collect();
        let format = |linear: &LinearSpec, slice: &str| formats(linear, slice).unwrap_or(Format::W16A16);
        let linears = self.donors.assemble(Place::Block(self.spec.index), quantized, format, |name| self.weights.linear(name))?;
        let float = FloatBlock { checkpoint: self.checkpoint, weights: &self.weights, transforms: &self.donors.steps.transforms };
        let reads_int8 = linears.get("in_proj").is_some_and(|in_proj| in_proj.int8_activations);
        let internals = if reads_int8 { self.donors.internals(self.spec)? } else { SsmInternals::Float };
        Block::assemble(backend, &self.checkpoint.config, self.spec, &PartlyQuantized { float, linears: &linears, internals })
    }
}

/// A transformed block of which some linears are quantized.
pub(super) struct PartlyQuantized<'a> {
    pub float: FloatBlock<'a>,
    pub linears: &'a BTreeMap<&'a str, QuantizedLinear>,
    pub internals: SsmInternals,
}

impl BlockSource for PartlyQuantized<'_> {
    fn tensor(&self, name: &str) -> Result<Vec<f32>> {
        self.float.tensor(name)
    }

    fn linear(&self, linear: &LinearSpec) -> Result<LinearWeights> {
        match self.linears.get(linear.name.as_str()) {
            Some(quantized) => Ok(quantized.weights(linear.cols)),
            None => self.float.linear(linear),
        }
    }

    fn internals(&self, _: &BlockSpec) -> Result<SsmInternals> {
        Ok(self.internals.clone())
    }

    fn rotates_state(&self) -> bool {
        self.float.rotates_state()
    }
}

/// A donor file in memory.
struct File {
    path: PathBuf,
    bytes: Vec<u8>,
    notes: BTreeMap<String, Vec<String>>,
}

impl File {
    /// The floats of tensor `name`.
    fn floats(&self, name: &str) -> Result<Vec<f32>> {
        let tensors = SafeTensors::deserialize(&self.bytes).map_err(|error| damaged(&self.path, &error))?;
        let tensor = tensors.tensor(name).map_err(|error| damaged(&self.path, &error))?;
        Ok(tensor.data().as_chunks::<4>().0.iter().map(|value| f32::from_le_bytes(*value)).collect())
    }

    /// The floats of every tensor, by name.
    fn all_floats(&self) -> Result<BTreeMap<String, Vec<f64>>> {
        let tensors = SafeTensors::deserialize(&self.bytes).map_err(|error| damaged(&self.path, &error))?;
        tensors.names().into_iter().map(|name| Ok((name.to_owned(), self.floats(name)?.into_iter().map(f64::from).collect()))).collect()
    }

    /// Rows `rows` of `linear` in the weights of `format`; they lie within one stored part.
    fn rows(&self, linear: &LinearSpec, format: Format, rows: Range<usize>) -> Result<QuantizedMatrix> {
        let tensors = SafeTensors::deserialize(&self.bytes).map_err(|error| damaged(&self.path, &error))?;
        let schemes = linear.schemes(format);
        let whole = schemes.iter().all(|scheme| *scheme == schemes[0]);
        let (mut part, mut start) = (0, 0);
        while !whole && start < rows.start {
            start += linear.slices[part].rows;
            part += 1;
        }
        let (scheme, cols) = (schemes[part], linear.cols);
        let tensor = |what: &str| tensors.tensor(&format!("{}/{part}/{what}", linear.name)).map_err(|error| damaged(&self.path, &error));
        let (first, count) = (rows.start - start, rows.len());
        let row = |view: &safetensors::tensor::TensorView<'_>| view.data().len() / view.shape()[0];
        let codes = tensor("codes")?;
        let width = row(&codes);
        let bytes = &codes.data()[first * width..(first + count) * width];
        let codes = match scheme {
            Scheme::Grouped { bits, .. } => {
                let words: Vec<u32> = bytes.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
                packing::unpack(&words, cols, bits)
            }
            Scheme::Int8 | Scheme::Float => bytes.iter().map(|byte| byte.cast_signed()).collect(),
        };
        let scales = tensor("scales")?;
        let width = row(&scales);
        let scales = &scales.data()[first * width..(first + count) * width];
        let scales = scales.as_chunks::<4>().0.iter().map(|scale| f32::from_le_bytes(*scale)).collect();
        Ok(QuantizedMatrix { scheme, rows: count, cols, codes, scales })
    }
}

fn push_matrix(name: &str, matrix: &QuantizedMatrix, tensors: &mut Vec<TensorOut<'_>>) {
    let (dtype, width, codes) = match matrix.scheme {
        Scheme::Grouped { bits, .. } => {
            let words = packing::pack(&matrix.codes, matrix.cols, bits);
            (Dtype::I32, packing::words_in_row(matrix.cols, bits), words.iter().flat_map(|word| word.to_le_bytes()).collect())
        }
        Scheme::Int8 | Scheme::Float => (Dtype::I8, matrix.cols, matrix.codes.iter().map(|code| code.cast_unsigned()).collect()),
    };
    let codes: Vec<u8> = codes;
    tensors.push((format!("{name}/codes"), dtype, vec![matrix.rows, width], Cow::Owned(codes)));
    let scales = matrix.scales.iter().flat_map(|scale| scale.to_le_bytes()).collect();
    tensors.push((format!("{name}/scales"), Dtype::F32, vec![matrix.rows, matrix.cols / matrix.group()], Cow::Owned(scales)));
}

/// Parts of one scheme as one.
fn join(parts: Vec<WeightPart>) -> WeightPart {
    let mut parts = parts.into_iter();
    let first = parts.next().unwrap_or(WeightPart::Float(Vec::new()));
    parts.fold(first, |mut whole, part| {
        match (&mut whole, part) {
            (WeightPart::Quantized(whole), WeightPart::Quantized(part)) => whole.append_rows(&part),
            (WeightPart::Float(whole), WeightPart::Float(part)) => whole.extend(part),
            _ => {}
        }
        whole
    })
}

/// The second moment of the normalised residual stream over the sample, kept in `path`.
fn second_moment<B: Backend>(backend: &B, checkpoint: &Checkpoint, sample: &Sample, path: &Path, monitor: &Monitor) -> Result<Vec<f64>> {
    let hidden = checkpoint.config.hidden_size;
    if let Ok(bytes) = fs::read(path)
        && bytes.len() == 8 * hidden * hidden
    {
        return Ok(bytes.as_chunks::<8>().0.iter().map(|value| f64::from_le_bytes(*value)).collect());
    }
    let stream = Stream::new(backend, checkpoint, &sample.batches())?;
    let moment = calibrate::second_moment(backend, checkpoint, stream, monitor)?;
    files::write_atomically(path, &moment.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())?;
    Ok(moment)
}

fn damaged(path: &Path, error: &dyn std::fmt::Display) -> Error {
    Error::run(format!("{} is damaged: {error}", path.display())).hint("remove its folder and run `strata sensitivity` again")
}
