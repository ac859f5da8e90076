//! Model files: `config.json`, safetensors shards, the embedded demo, the hub, and quantized variants.
//! Start with [`Checkpoint::open`] (a directory) or [`open`] (anything a user may name).

mod config;
mod demo;
pub mod hub;
mod layout;
mod shards;
mod variant;

use std::path::{Path, PathBuf};

use rayon::prelude::*;

pub use config::{AttentionConfig, Config, MambaConfig, MlpConfig, MoeConfig, parse_config_json};
pub use demo::{CALIBRATION as DEMO_CALIBRATION, DEMO, HELDOUT as DEMO_HELDOUT, TASKS as DEMO_TASKS};
pub use layout::{BlockSpec, Layout, LinearSpec, SliceSpec, TensorSpec};
pub use safetensors::Dtype;
pub use shards::{INDEX_FILE, RawTensor, SINGLE_FILE, Shards, hexadecimal, sha256_hex};
pub use variant::{
    BlockRecord, Provenance, STRATA_FILE, SampleRecord, StorageLayout, TOOL, VARIANT_SCHEMA, VariantManifest, float_tensor, linear_tensors,
    quantization_config,
};

use crate::error::{Error, Result};
use crate::format::{BlockKind, LinearWeights, QuantizedMatrix, ScaleKind, Scheme, SsmActivations, WeightPart, packing};
use crate::monitor::Monitor;

/// Files beside the weights that a variant carries along when they are there.
const COMPANION_FILES: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"];

/// Values that one task looks through for those that are not finite.
const CHECKED: usize = 1 << 16;

/// An opened model: its configuration, the layout that follows from it, and its tensors where they lie.
pub struct Checkpoint {
    /// What the user called it: `demo`, or the directory.
    pub name: String,
    pub config: Config,
    pub layout: Layout,
    /// What `strata.toml` says, when this is a quantized variant.
    pub variant: Option<VariantManifest>,
    directory: Option<PathBuf>,
    shards: Shards,
    /// In front of stored names of everything but the head: `backbone.` or `model.`.
    prefix: &'static str,
}

/// Opens what a user named: `demo`, a directory, or a hub id (`owner/name`, or `owner/name@revision`), which is
/// downloaded first unless the cache has it.
pub fn open(model: &str) -> Result<Checkpoint> {
    open_watched(model, &Monitor::silent())
}

/// [`open`], with a download's progress reported to `monitor`.
pub fn open_watched(model: &str, monitor: &Monitor) -> Result<Checkpoint> {
    let path = Path::new(model);
    if model == DEMO {
        return demo::open();
    }
    let (id, revision) = model.split_once('@').map_or((model, None), |(id, revision)| (id, Some(revision)));
    if !path.exists() && hub::looks_like_id(id) {
        let mut checkpoint = Checkpoint::open(&hub::fetch(id, revision, monitor)?)?;
        model.clone_into(&mut checkpoint.name);
        return Ok(checkpoint);
    }
    Checkpoint::open(path)
}

impl Checkpoint {
    /// Opens the checkpoint or variant in `directory`, checking every tensor's presence and shape.
    pub fn open(directory: &Path) -> Result<Self> {
        if !directory.is_dir() {
            let what = if directory.exists() { "is not a directory" } else { "does not exist" };
            return Err(Error::input(format!("{} {what}", directory.display()))
                .hint("give the directory of a checkpoint, or `demo` for the embedded model"));
        }
        let config_path = directory.join("config.json");
        if !config_path.exists() {
            return Err(Error::input(format!("{} has no config.json", directory.display()))
                .hint("give the directory of a checkpoint, or `demo` for the embedded model"));
        }
        let config = Config::read(&config_path)?;
        let manifest = directory.join(STRATA_FILE);
        let variant = if manifest.exists() { Some(VariantManifest::read(&manifest)?) } else { None };
        let shards = Shards::open(directory)?;
        let mut checkpoint = Self::assemble(directory.display().to_string(), config, shards, variant)?;
        checkpoint.directory = Some(directory.to_owned());
        Ok(checkpoint)
    }

    fn assemble(name: String, config: Config, shards: Shards, variant: Option<VariantManifest>) -> Result<Self> {
        let layout = Layout::new(&config);
        let prefix = if shards.names().any(|name| name.starts_with("backbone.")) { "backbone." } else { "model." };
        let checkpoint = Self { name, config, layout, variant, directory: None, shards, prefix };
        checkpoint.check_tensors()?;
        Ok(checkpoint)
    }

    fn check_tensors(&self) -> Result<()> {
        if let Some(variant) = &self.variant
            && variant.plan.blocks.len() != self.layout.blocks.len()
        {
            return Err(Error::input(format!(
                "{}: {STRATA_FILE} plans {} blocks, and config.json has {}",
                self.name,
                variant.plan.blocks.len(),
                self.layout.blocks.len()
            )));
        }
        let blocks = &self.layout.blocks;
        for spec in blocks.iter().flat_map(|block| &block.others).chain([&self.layout.final_norm]) {
            self.expect(&spec.name, &spec.shape)?;
        }
        let head = (!self.layout.tied).then_some(&self.layout.head);
        for linear in blocks.iter().flat_map(|block| &block.linears).chain([&self.layout.embedding]).chain(head) {
            if self.variant.is_none() {
                self.expect(&format!("{}.weight", linear.stem), &[linear.rows, linear.cols])?;
            } else {
                self.parts(linear).map(drop)?;
            }
        }
        self.check_internal_scales()
    }

    /// Static scales inside state-space blocks are there where the variant has them.
    fn check_internal_scales(&self) -> Result<()> {
        let Some(variant) = &self.variant else { return Ok(()) };
        if variant.activations.ssm != SsmActivations::Int8Static {
            return Ok(());
        }
        let int8 = |block: &&BlockSpec| block.kind == BlockKind::Ssm && variant.plan.blocks[block.index].quantizes_activations();
        for spec in self.layout.blocks.iter().filter(int8).flat_map(BlockSpec::internal_scales) {
            self.expect(&spec.name, &spec.shape)?;
        }
        Ok(())
    }

    /// Stored name of a canonical one.
    pub fn stored_name(&self, canonical: &str) -> String {
        if canonical.starts_with("lm_head") { canonical.to_owned() } else { format!("{}{canonical}", self.prefix) }
    }

    /// The tensor with this canonical name.
    fn find(&self, canonical: &str) -> Option<RawTensor<'_>> {
        self.shards.get(&self.stored_name(canonical))
    }

    fn expect(&self, canonical: &str, shape: &[usize]) -> Result<RawTensor<'_>> {
        let stored = self.stored_name(canonical);
        let tensor = self.shards.get(&stored).ok_or_else(|| {
            Error::input(format!("{}: tensor `{stored}` is missing", self.name))
                .hint("config.json and the weights may be of different models")
        })?;
        if tensor.shape != shape {
            return Err(Error::input(format!("{}: tensor `{stored}` has shape {:?}, expected {shape:?}", self.name, tensor.shape))
                .hint("config.json and the weights may be of different models"));
        }
        Ok(tensor)
    }

    /// The values of a float tensor by canonical name, in f32. Errors on NaN and infinity, naming the tensor.
    pub fn read(&self, canonical: &str) -> Result<Vec<f32>> {
        let stored = self.stored_name(canonical);
        let tensor = self.find(canonical).ok_or_else(|| Error::input(format!("{}: tensor `{stored}` is missing", self.name)))?;
        let values = tensor.to_f32()?.ok_or_else(|| {
            Error::input(format!("{}: tensor `{stored}` has type {:?}, expected F32, F16 or BF16", self.name, tensor.dtype))
                .hint("strata quantizes float checkpoints: give the original one")
        })?;
        let finite = |values: &[f32]| values.iter().fold(true, |finite, value| finite & value.is_finite());
        let found = if values.par_chunks(CHECKED).all(finite) { None } else { values.iter().position(|value| !value.is_finite()) };
        match found {
            Some(index) => Err(Error::input(format!("{}: tensor `{stored}` holds {} at element {index}", self.name, values[index]))
                .hint("the checkpoint is damaged: copy or download it again")),
            None => Ok(values),
        }
    }

    /// A tensor exactly as stored, with its stored name.
    pub fn raw(&self, canonical: &str) -> Result<(String, RawTensor<'_>)> {
        let stored = self.stored_name(canonical);
        match self.shards.get(&stored) {
            Some(tensor) => Ok((stored, tensor)),
            None => Err(Error::input(format!("{}: tensor `{stored}` is missing", self.name))),
        }
    }

    /// Every stored tensor: name and data.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, RawTensor<'_>)> {
        self.shards.names().filter_map(|name| Some((name, self.shards.get(name)?)))
    }

    /// The weights of `linear`, float or quantized as stored; int8 activations as the variant's plan says for `block`
    /// (a block's index, or `None` for the head).
    pub fn linear(&self, linear: &LinearSpec, block: Option<usize>) -> Result<LinearWeights> {
        let format = self.variant.as_ref().map(|variant| block.map_or(variant.plan.head, |index| variant.plan.linear(index, &linear.stem)));
        self.weights(linear, format.is_some_and(crate::format::Format::quantizes_activations))
    }

    /// The weights of `linear`, which reads int8 activations or does not.
    fn weights(&self, linear: &LinearSpec, int8_activations: bool) -> Result<LinearWeights> {
        let fixed = int8_activations && self.variant.as_ref().is_some_and(|variant| variant.activations.linears == ScaleKind::Static);
        let mut weights = LinearWeights {
            cols: linear.cols,
            parts: Vec::new(),
            bias: if linear.bias { Some(self.read(&format!("{}.bias", linear.stem))?) } else { None },
            int8_activations,
            input_scale: if fixed { self.read(&format!("{}.input_scale", linear.stem))?.first().copied() } else { None },
            hadamard: self.variant.as_ref().and_then(|variant| linear.hadamard(&variant.provenance.transforms)),
        };
        for part in self.parts(linear)? {
            weights.push(part.read(self)?);
        }
        Ok(weights)
    }

    /// The embedding table `[vocabulary, hidden]`.
    pub fn embedding(&self) -> Result<LinearWeights> {
        self.weights(&self.layout.embedding, false)
    }

    /// The head's weights; the embedding's when they are tied and the head has none of its own.
    pub fn head(&self) -> Result<LinearWeights> {
        if self.layout.tied && self.stored_parts("lm_head", self.layout.head.rows, self.layout.head.cols).is_none() {
            return self.embedding();
        }
        self.linear(&self.layout.head, None)
    }

    /// How `linear` is stored: whole, or slice by slice.
    fn parts(&self, linear: &LinearSpec) -> Result<Vec<StoredPart>> {
        if let Some(part) = self.stored_parts(&linear.stem, linear.rows, linear.cols) {
            return Ok(vec![part?]);
        }
        linear
            .slices
            .iter()
            .map(|slice| {
                let stem = format!("{}.{}", linear.stem, slice.name);
                self.stored_parts(&stem, slice.rows, linear.cols).unwrap_or_else(|| {
                    Err(Error::input(format!("{}: no weights of `{}` are stored", self.name, self.stored_name(&linear.stem)))
                        .hint("the variant is incomplete: quantize it again"))
                })
            })
            .collect()
    }

    fn stored_parts(&self, stem: &str, rows: usize, cols: usize) -> Option<Result<StoredPart>> {
        let part = |scheme| StoredPart { stem: stem.to_owned(), scheme, rows, cols };
        let packed = format!("{stem}.weight_packed");
        if let Some(tensor) = self.find(&packed) {
            // Groups divide the width by 32, so that rows end with a word and the width in words tells the bits.
            let bits = tensor.shape.last().map_or(0, |words| 32 * words / cols).clamp(2, 4) as u8;
            return Some(self.expect(&packed, &[rows, packing::words_in_row(cols, bits)]).and_then(|_| {
                let scale = self.find(&format!("{stem}.weight_scale")).map(|tensor| tensor.shape.to_vec()).unwrap_or_default();
                match (scale.as_slice(), cols) {
                    ([scale_rows, groups], cols) if *scale_rows == rows && *groups > 0 && cols.is_multiple_of(*groups) => {
                        Ok(part(Scheme::Grouped { bits, group: cols / groups }))
                    }
                    _ => Err(Error::input(format!("{}: `{stem}.weight_scale` has shape {scale:?}, expected [{rows}, groups]", self.name))),
                }
            }));
        }
        let name = format!("{stem}.weight");
        let tensor = self.find(&name)?;
        Some(self.expect(&name, &[rows, cols]).and_then(|_| {
            if tensor.dtype == Dtype::I8 {
                self.expect(&format!("{stem}.weight_scale"), &[rows, 1])?;
                Ok(part(Scheme::Int8))
            } else {
                Ok(part(Scheme::Float))
            }
        }))
    }

    /// The contents of a file beside the weights, when it is there.
    pub fn companion(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some(directory) = &self.directory else {
            return Ok(demo::COMPANIONS.iter().find(|(file, _)| *file == name).map(|(_, text)| text.as_bytes().to_vec()));
        };
        let path = directory.join(name);
        if !path.exists() {
            return Ok(None);
        }
        std::fs::read(&path).map(Some).map_err(|error| Error::io("reading", &path, &error))
    }

    /// The files beside the weights that a variant carries along: name and contents.
    pub fn companions(&self) -> Result<Vec<(&'static str, Vec<u8>)>> {
        let mut files = Vec::new();
        for name in COMPANION_FILES {
            if let Some(bytes) = self.companion(name)? {
                files.push((name, bytes));
            }
        }
        Ok(files)
    }

    /// The text of `config.json`.
    pub fn config_text(&self) -> Result<String> {
        let Some(directory) = &self.directory else { return Ok(demo::CONFIG.to_owned()) };
        let path = directory.join("config.json");
        std::fs::read_to_string(&path).map_err(|error| Error::io("reading", &path, &error))
    }

    /// The tokenizer, or an error that says that it is missing.
    pub fn tokenizer(&self) -> Result<tokenizers::Tokenizer> {
        let bytes = self.companion("tokenizer.json")?.ok_or_else(|| {
            Error::input(format!("{} has no tokenizer.json", self.name))
                .hint("text needs a tokenizer: copy the model's tokenizer.json beside its weights")
        })?;
        let tokenizer = tokenizers::Tokenizer::from_bytes(bytes)
            .map_err(|error| Error::input(format!("{}: tokenizer.json is not usable: {error}", self.name)))?;
        let vocabulary = tokenizer.get_vocab_size(true);
        if vocabulary > self.config.vocab_size {
            return Err(Error::input(format!(
                "{}: the tokenizer has {vocabulary} tokens, and the model's vocabulary {}",
                self.name, self.config.vocab_size
            ))
            .hint("tokenizer.json and the weights may be of different models"));
        }
        Ok(tokenizer)
    }

    /// Whether the tokenizer is the demo's, so that the rows compiled in are in its vocabulary.
    pub fn has_demo_tokenizer(&self) -> Result<bool> {
        let own = self.companion("tokenizer.json")?;
        Ok(own.as_deref() == demo::COMPANIONS.iter().find(|(file, _)| *file == "tokenizer.json").map(|(_, text)| text.as_bytes()))
    }

    /// SHA-256 over config.json and every shard: the identity of the weights, whatever they are called.
    pub fn sha256(&self) -> Result<String> {
        let mut listing = format!("config.json {}\n", sha256_hex(self.config_text()?.as_bytes()));
        for (name, hash) in self.shards.hashes()? {
            listing.extend([name.as_str(), " ", hash.as_str(), "\n"]);
        }
        Ok(sha256_hex(listing.as_bytes()))
    }

    /// Checks the shards against the hashes that the variant's manifest records.
    pub fn verify_files(&self) -> Result<()> {
        let Some(variant) = &self.variant else { return Ok(()) };
        for (name, hash) in self.shards.hashes()? {
            if variant.files.get(&name) != Some(&hash) {
                return Err(Error::run(format!("{}: {name} is not the file that was validated when the variant was made", self.name))
                    .hint("the file was changed or damaged since: quantize again (`--fresh` in a replay)"));
            }
        }
        Ok(())
    }

    /// Bytes of the weight files.
    pub fn file_bytes(&self) -> u64 {
        self.shards.total_bytes()
    }

    /// Whether the weights of every linear, embedding and head are in bf16.
    pub fn is_bf16(&self) -> bool {
        let layout = &self.layout;
        let ends = std::iter::once(&layout.embedding).chain((!layout.tied).then_some(&layout.head));
        let mut linears = layout.blocks.iter().flat_map(|block| &block.linears).chain(ends);
        linears.all(|linear| self.find(&format!("{}.weight", linear.stem)).is_some_and(|tensor| tensor.dtype == Dtype::BF16))
    }

    /// Bytes that `linears` take in memory once loaded: bf16 stays in 16 bits, f16 becomes f32.
    pub fn loaded_bytes<'s>(&self, linears: impl IntoIterator<Item = &'s LinearSpec>) -> Result<u64> {
        let mut total = 0;
        for linear in linears {
            // A tied head has no weights of its own.
            let tied = self.layout.tied && linear.stem == self.layout.head.stem;
            if tied && self.stored_parts(&linear.stem, linear.rows, linear.cols).is_none() {
                total += self.loaded_bytes([&self.layout.embedding])?;
                continue;
            }
            for part in self.parts(linear)? {
                let bf16 = self.find(&format!("{}.weight", part.stem)).is_some_and(|tensor| tensor.dtype == Dtype::BF16);
                total += part.scheme.stored_bytes(part.rows, part.cols, if bf16 { 2 } else { 4 });
            }
        }
        Ok(total)
    }

    /// Bytes that the linears of the blocks store, scales included: what `weight_bytes` reports.
    pub fn linear_bytes(&self) -> Result<u64> {
        let mut total = 0;
        for linear in self.layout.blocks.iter().flat_map(|block| &block.linears) {
            for part in self.parts(linear)? {
                total += part.scheme.stored_bytes(part.rows, part.cols, self.layout.float_bytes);
            }
        }
        Ok(total)
    }
}

/// Where and how consecutive rows of a linear are stored.
struct StoredPart {
    /// Canonical name without `.weight`, `.weight_packed` or `.weight_scale`.
    stem: String,
    scheme: Scheme,
    rows: usize,
    cols: usize,
}

impl StoredPart {
    fn read(&self, checkpoint: &Checkpoint) -> Result<WeightPart> {
        let tensor = |suffix: &str| checkpoint.raw(&format!("{}.{suffix}", self.stem)).map(|(_, tensor)| tensor);
        let scales = || checkpoint.read(&format!("{}.weight_scale", self.stem));
        let (rows, cols, scheme) = (self.rows, self.cols, self.scheme);
        let codes = match scheme {
            Scheme::Float => return Ok(WeightPart::Float(checkpoint.read(&format!("{}.weight", self.stem))?)),
            Scheme::Int8 => shards::values_of(&tensor("weight")?.bytes()?, i8::from_le_bytes),
            Scheme::Grouped { bits, .. } => {
                packing::unpack(&shards::values_of(&tensor("weight_packed")?.bytes()?, u32::from_le_bytes), cols, bits)
            }
        };
        Ok(WeightPart::Quantized(QuantizedMatrix { scheme, rows, cols, codes, scales: scales()? }))
    }
}
