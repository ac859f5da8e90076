//! The variant's files: tensors, manifest, and the check that they read back the same.

use std::borrow::Cow;

use serde_json::json;

use super::Pipeline;
use super::ends::logit_pieces;
use crate::backend::Backend;
use crate::checkpoint::{
    Checkpoint, INDEX_FILE, LinearSpec, Provenance, STRATA_FILE, SampleRecord, Shards, TOOL, VARIANT_SCHEMA, VariantManifest, float_tensor,
    linear_tensors, quantization_config,
};
use crate::error::{Error, Result};
use crate::files;
use crate::model::Stream;
use crate::quant::boundary::FloatHash;
use crate::quant::method::QuantizedLinear;
use crate::quant::publish::{TensorOut, float_vector};

impl<B: Backend> Pipeline<'_, B> {
    pub(super) fn shard_name(&self, shard: usize) -> String {
        format!("model-{:05}-of-{:05}.safetensors", shard + 1, self.blocks.len() + 1)
    }

    pub(super) fn stored(&self, canonical: &str) -> String {
        self.request.checkpoint.stored_name(canonical)
    }

    /// Appends what stores `linear`: its quantized tensors, or the source's own.
    pub(super) fn push_linear<'t>(
        &'t self,
        linear: &LinearSpec,
        quantized: &QuantizedLinear,
        tensors: &mut Vec<TensorOut<'t>>,
    ) -> Result<()> {
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
    pub(super) fn copy(&self, canonical: &str) -> Result<TensorOut<'_>> {
        let (name, tensor) = self.request.checkpoint.raw(canonical)?;
        Ok((name, tensor.dtype, tensor.shape.to_vec(), Cow::Owned(tensor.bytes()?.to_vec())))
    }

    /// Writes everything but the shards: index, config.json, companions and strata.toml.
    pub(super) fn write_manifest(&self, sample: SampleRecord) -> Result<VariantManifest> {
        let (request, checkpoint) = (self.request, self.request.checkpoint);
        let names: Vec<String> = (0..=self.blocks.len()).map(|shard| self.shard_name(shard)).collect();
        let shards = Shards::open_files(&self.files, &names)?;
        let index = json!({ "metadata": { "total_size": shards.tensor_bytes() }, "weight_map": shards.weight_map() });
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
            files: shards.hashes()?.into_iter().collect(),
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
    pub(super) fn validate(&self, manifest: &VariantManifest) -> Result<()> {
        let variant = Checkpoint::open(&self.files)?;
        let blocks = self.blocks.len();
        self.monitor.stage("validate", blocks + 1);
        let mut stream = Stream::within(self.backend, &variant, &self.request.sample.batches(), self.room)?;
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
                hash.add_tensor(self.backend, &stream.logits_at(batch, &tokens)?, "the head")?;
            }
        }
        if hash.finish() != manifest.sample.logits {
            return Err(differs("the head"));
        }
        self.monitor.step(blocks + 1, "logits read back the same")
    }
}

fn pretty(value: &serde_json::Value) -> Vec<u8> {
    format!("{value:#}\n").into_bytes()
}
