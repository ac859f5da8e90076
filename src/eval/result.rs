//! What an evaluation found, in the shape of `strata.results/1`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::decode::DecodeDivergence;
use super::memory::CacheBytes;
use super::paired::{self, Comparison};
use super::run::Evaluated;
use super::score::TaskScore;
use super::speed::{Speed, SpeedPoint};
use super::statistics::{DivergenceSummary, NoiseFloor, Perplexity};
use crate::checkpoint::BlockRecord;
use crate::format::{BlockKind, Format};

/// Schema of [`ResultSet`].
pub const RESULTS_SCHEMA: &str = "strata.results/1";

/// Results of several models, the unquantized one first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ResultSet {
    pub schema: String,
    pub results: Vec<ModelResult>,
    /// Every later model against the first, row by row.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub comparisons: Vec<Comparison>,
}

impl ResultSet {
    /// Results of `evaluated` models, each later one compared with the first.
    pub fn new(evaluated: Vec<Evaluated>) -> Self {
        let named = |evaluated: &'_ Evaluated| evaluated.result.variant.clone();
        let comparisons = evaluated.split_first().map(|(base, others)| {
            let against = |other: &Evaluated| paired::compare((&named(base), &base.samples), (&named(other), &other.samples));
            others.iter().map(against).filter(|comparison| !comparison.tasks.is_empty()).collect()
        });
        Self {
            schema: RESULTS_SCHEMA.into(),
            results: evaluated.into_iter().map(|evaluated| evaluated.result).collect(),
            comparisons: comparisons.unwrap_or_default(),
        }
    }
}

/// Results of one model.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct ModelResult {
    pub model: String,
    /// `base` for the unquantized model.
    pub variant: String,
    pub recipe: Option<String>,
    /// What the linears of the blocks store, scales included.
    pub weight_bytes: u64,
    /// Stored bits per weight of the blocks' linears.
    pub bits_per_weight: f64,
    /// Weight files on disk.
    pub file_bytes: u64,
    pub tasks: BTreeMap<String, TaskScore>,
    /// Divergence from the unquantized model, both reading whole windows; `null` for itself.
    pub kld: Option<DivergenceSummary>,
    /// Divergence when reading one token a step from the caches, of variants that round these.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kld_decode: Option<DecodeDivergence>,
    /// Of the unquantized model, where others are compared with it: its divergence from itself at a lower precision.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub noise_floor: Option<NoiseFloor>,
    /// Of the same windows as the divergence, every token of a window but its first: `perplexities.gptq`.
    pub perplexity: Option<f64>,
    /// The same in both usual conventions.
    #[serde(default)]
    pub perplexities: Option<Perplexity>,
    /// Relative error of each block's output on the calibration sample, as the variant recorded it; empty for the
    /// unquantized model.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub blocks: Vec<BlockError>,
    pub speed: Option<Speed>,
    /// Times at every prompt length and batch size that was measured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub speed_points: Vec<SpeedPoint>,
    /// Bytes of the caches of one sequence at several context lengths, predicted from the model's shapes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub caches: Vec<CacheBytes>,
    pub memory: Memory,
    pub provenance: Evidence,
}

/// What a block of a variant lost when it was quantized.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct BlockError {
    pub index: usize,
    pub kind: BlockKind,
    pub format: Format,
    /// ‖quantized − float‖ / ‖float‖ of its output, same input.
    pub error: f64,
}

impl BlockError {
    /// From what the variant's manifest has of the block.
    pub fn of(record: &BlockRecord) -> Self {
        Self { index: record.index, kind: record.kind, format: record.format, error: record.error }
    }
}

/// Memory, measured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    /// Highest resident set of the process.
    pub peak_bytes: u64,
    /// Whether that was watched from the loading of this model on; otherwise what was evaluated before in the same process is in it.
    #[serde(default)]
    pub peak_of_model: bool,
    /// Weights as the backend holds them.
    pub resident_weight_bytes: u64,
    /// Most memory of the device in buffers while the model was there; `null` on the CPU, where it is the process's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device_peak_bytes: Option<u64>,
}

/// Where the figures come from.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Evidence {
    pub tool: String,
    /// SHA-256 of the evaluated weights and configuration.
    pub sha256: String,
    pub backend: String,
    pub threads: usize,
    pub processor: String,
    /// Processors that the process may run on, and memory of the machine.
    #[serde(default)]
    pub cores: usize,
    #[serde(default)]
    pub memory_bytes: u64,
    /// Versions of the libraries that compute.
    #[serde(default)]
    pub libraries: BTreeMap<String, String>,
    /// What the text windows of divergence and perplexity were: count × tokens, and from where.
    pub text: String,
    pub limit: Option<usize>,
    /// The model that divergence is measured from, on the reference itself too.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reference: Option<ReferenceModel>,
}

/// A model that others are compared with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReferenceModel {
    pub model: String,
    pub sha256: String,
}
