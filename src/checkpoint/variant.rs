//! Quantized variants on disk: `strata.toml`, the tensors of a quantized linear, and `quantization_config`.

use std::collections::BTreeMap;
use std::path::Path;

use half::bf16;
use rayon::prelude::*;
use safetensors::Dtype;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::layout::{Layout, LinearSpec};
use crate::error::{Error, Result};
use crate::format::{Activations, BlockKind, CacheFormats, Format, Plan, QuantizedMatrix, Scheme, Transform, WeightPart, packing};

/// The manifest of a variant, beside its weights.
pub const STRATA_FILE: &str = "strata.toml";
/// Schema of [`STRATA_FILE`].
pub const VARIANT_SCHEMA: &str = "strata.variant/1";
/// What made a variant. The revision counts changes of what the quantizer writes, so that variants of an older
/// one are not taken for today's.
pub const TOOL: &str = concat!("strata ", env!("CARGO_PKG_VERSION"), " quantizer 7");

/// Who can read a variant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StorageLayout {
    /// compressed-tensors: one scheme a module.
    Portable,
    /// strata alone.
    Native,
}

/// What `strata.toml` holds. Nothing in it depends on time, host, path or thread count.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VariantManifest {
    pub schema: String,
    pub layout: StorageLayout,
    pub provenance: Provenance,
    pub plan: Plan,
    #[serde(default)]
    pub activations: Activations,
    #[serde(default)]
    pub cache: CacheFormats,
    pub sample: SampleRecord,
    /// SHA-256 of each weight file.
    pub files: BTreeMap<String, String>,
    #[serde(rename = "block")]
    pub blocks: Vec<BlockRecord>,
}

/// What a variant was made from and by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Provenance {
    pub tool: String,
    /// SHA-256 of the source checkpoint.
    pub source: String,
    pub recipe: String,
    /// How weights were rounded.
    pub method: String,
    /// What was done to the weights before, in order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub transforms: Vec<Transform>,
    /// SHA-256 of the token ids that the sample (and calibration, where the method has one) ran on.
    pub sample: String,
    pub seed: u64,
    /// Name of the donors that the quantized weights were taken from; without it they were rounded block after block.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub donors: Option<String>,
}

/// The sample that was run through the variant at validation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SampleRecord {
    pub sequences: usize,
    pub tokens: usize,
    /// KL divergence from the unquantized model in nats a token: mean and 99th percentile.
    pub kld_mean: f64,
    pub kld_p99: f64,
    /// Share of positions where both models' most probable token is the same.
    pub top1: f64,
    /// SHA-256 of the logits' bytes.
    pub logits: String,
    /// SHA-256 of the residual stream in front of the first block and behind each.
    pub boundaries: Vec<String>,
}

/// One quantized block.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlockRecord {
    pub index: usize,
    pub kind: BlockKind,
    pub format: Format,
    /// Relative error of the block's output on the sample: ‖quantized − float‖ / ‖float‖, same input.
    pub error: f64,
    /// Bytes its linears store, scales included.
    pub bytes: u64,
    /// What differs from the format asked for, with the reason.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub notes: Vec<String>,
}

impl VariantManifest {
    /// Reads a manifest.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io("reading", path, &error))?;
        let manifest: Self = toml::from_str(&text)
            .map_err(|error| Error::input(format!("{} is not a variant's manifest: {}", path.display(), error.message())))?;
        if manifest.schema != VARIANT_SCHEMA {
            return Err(Error::input(format!(
                "{} has schema `{}`, and this strata reads `{VARIANT_SCHEMA}`",
                path.display(),
                manifest.schema
            ))
            .hint("use the version of strata that wrote it, or quantize again"));
        }
        Ok(manifest)
    }
}

/// Values that one task converts at least.
const CONVERTED: usize = 1 << 16;

/// A tensor to be written: stored name, type, shape, bytes.
pub type OwnedTensor = (String, Dtype, Vec<usize>, Vec<u8>);

/// The tensors that store the quantized parts of a linear; `stem` is the stored name without suffix. One part is
/// stored under the linear's own name, several under the names of `slices`, which must be as many.
/// A linear that is float as a whole is left out: its tensor is the source's. Float slices take `float_bytes` an element.
pub fn linear_tensors(stem: &str, linear: &LinearSpec, weights: &[WeightPart], float_bytes: usize) -> Vec<OwnedTensor> {
    let whole = weights.len() == 1;
    let mut tensors = Vec::new();
    for (part, slice) in weights.iter().zip(&linear.slices) {
        let stem = if whole { stem.to_owned() } else { format!("{stem}.{}", slice.name) };
        match part {
            WeightPart::Quantized(matrix) => matrix_tensors(&stem, matrix, &mut tensors),
            WeightPart::Float(_) if whole => {}
            WeightPart::Float(values) => {
                let (dtype, bytes) = float_tensor(values, float_bytes);
                tensors.push((format!("{stem}.weight"), dtype, vec![slice.rows, linear.cols], bytes));
            }
        }
    }
    tensors
}

/// Float weights that are no longer a tensor of the source: bf16 where it has 2 bytes an element, else f32.
pub fn float_tensor(values: &[f32], float_bytes: usize) -> (Dtype, Vec<u8>) {
    if float_bytes == 2 {
        let halves: Vec<u16> = values.par_iter().with_min_len(CONVERTED).map(|value| bf16::from_f32(*value).to_bits()).collect();
        (Dtype::BF16, bytemuck::cast_slice(&halves).to_vec())
    } else {
        (Dtype::F32, bytemuck::cast_slice(values).to_vec())
    }
}

fn matrix_tensors(stem: &str, matrix: &QuantizedMatrix, tensors: &mut Vec<OwnedTensor>) {
    let (rows, cols) = (matrix.rows, matrix.cols);
    match matrix.scheme {
        Scheme::Float => {}
        Scheme::Int8 => {
            let codes = bytemuck::cast_slice(&matrix.codes).to_vec();
            let scales = bytemuck::cast_slice(&matrix.scales).to_vec();
            tensors.push((format!("{stem}.weight"), Dtype::I8, vec![rows, cols], codes));
            tensors.push((format!("{stem}.weight_scale"), Dtype::F32, vec![rows, 1], scales));
        }
        Scheme::Grouped { bits, group } => {
            let words = bytemuck::cast_slice(&packing::pack(&matrix.codes, cols, bits)).to_vec();
            let (_, scales) = float_tensor(&matrix.scales, 2);
            let shape: Vec<u8> = [rows as i64, cols as i64].iter().flat_map(|n| n.to_le_bytes()).collect();
            tensors.push((format!("{stem}.weight_packed"), Dtype::I32, vec![rows, packing::words_in_row(cols, bits)], words));
            tensors.push((format!("{stem}.weight_scale"), Dtype::BF16, vec![rows, cols / group], scales));
            tensors.push((format!("{stem}.weight_shape"), Dtype::I64, vec![2], shape));
        }
    }
}

/// `quantization_config` of config.json. A portable variant gets one compressed-tensors group for each scheme in
/// use, with the modules listed by name; a native one names strata, so that other servers refuse it.
pub fn quantization_config(storage: StorageLayout, layout: &Layout, plan: &Plan, stored_name: impl Fn(&str) -> String) -> Value {
    if storage == StorageLayout::Native {
        return json!({ "quant_method": "strata", "format": VARIANT_SCHEMA });
    }
    let mut groups: BTreeMap<(String, bool), (Value, Vec<String>)> = BTreeMap::new();
    let mut ignore = Vec::new();
    let blocks = layout.blocks.iter().flat_map(|block| {
        block.linears.iter().map(|linear| (linear, linear.planned_schemes(plan, block.index)[0], plan.linear(block.index, &linear.stem)))
    });
    for (linear, scheme, format) in blocks.chain([(&layout.head, layout.head.schemes(plan.head)[0], plan.head)]) {
        let target = stored_name(&linear.stem);
        let weights = match scheme {
            Scheme::Float => {
                ignore.push(target);
                continue;
            }
            Scheme::Int8 => json!({ "num_bits": 8, "type": "int", "symmetric": true, "strategy": "channel", "dynamic": false }),
            Scheme::Grouped { bits, group } => {
                json!({ "num_bits": bits, "type": "int", "symmetric": true, "strategy": "group", "group_size": group, "dynamic": false })
            }
        };
        let activations = format.quantizes_activations();
        let pack = matches!(scheme, Scheme::Grouped { .. });
        let config = json!({
            "weights": weights,
            "input_activations": activations
                .then(|| json!({ "num_bits": 8, "type": "int", "symmetric": true, "strategy": "token", "dynamic": true })),
            "format": if pack { "pack-quantized" } else { "int-quantized" },
        });
        groups.entry((config.to_string(), pack)).or_insert((config, Vec::new())).1.push(target);
    }
    let formats: Vec<bool> = groups.keys().map(|(_, pack)| *pack).collect();
    let format = match (formats.contains(&true), formats.contains(&false)) {
        (true, true) => "mixed-precision",
        (true, false) => "pack-quantized",
        _ => "int-quantized",
    };
    let groups: serde_json::Map<String, Value> = groups
        .into_values()
        .enumerate()
        .map(|(index, (mut config, targets))| {
            config["targets"] = json!(targets);
            (format!("group_{index}"), config)
        })
        .collect();
    json!({ "quant_method": "compressed-tensors", "format": format, "quantization_status": "compressed", "config_groups": groups, "ignore": ignore })
}
