//! The embedded demo checkpoint: model, tokenizer, calibration and held-out text, and the rows of five tasks.

use super::Checkpoint;
use super::config::Config;
use super::shards::Shards;
use crate::error::Result;

/// The id under which commands know the embedded model.
pub const DEMO: &str = "demo";

pub(super) const CONFIG: &str = include_str!("../../models/demo/config.json");
static WEIGHTS: &[u8] = include_bytes!("../../models/demo/model.safetensors");

/// Companion files that a variant carries along, with their contents.
pub(super) const COMPANIONS: [(&str, &str); 3] = [
    ("tokenizer.json", include_str!("../../models/demo/tokenizer.json")),
    ("tokenizer_config.json", include_str!("../../models/demo/tokenizer_config.json")),
    ("generation_config.json", include_str!("../../models/demo/generation_config.json")),
];

/// Text to calibrate on: documents separated by blank lines.
pub const CALIBRATION: &str = include_str!("../../models/demo/calibration.txt");
/// Text never calibrated on, for perplexity and divergence.
pub const HELDOUT: &str = include_str!("../../models/demo/heldout.txt");

/// Rows of the five tasks, in JSON lines with the hub's field names: (task, rows).
pub const TASKS: [(&str, &str); 5] = [
    ("arc_easy", include_str!("../../models/demo/tasks/arc_easy.jsonl")),
    ("arc_challenge", include_str!("../../models/demo/tasks/arc_challenge.jsonl")),
    ("piqa", include_str!("../../models/demo/tasks/piqa.jsonl")),
    ("winogrande", include_str!("../../models/demo/tasks/winogrande.jsonl")),
    ("hellaswag", include_str!("../../models/demo/tasks/hellaswag.jsonl")),
];

/// Opens the embedded checkpoint.
pub fn open() -> Result<Checkpoint> {
    Checkpoint::assemble(DEMO.into(), Config::parse(CONFIG)?, Shards::embedded(WEIGHTS)?, None)
}
