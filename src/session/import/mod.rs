//! Results that other programs measured, as records of the result store. Start with [`read`].

mod harness;
mod llama;
mod samples;

use std::path::Path;
use std::time::UNIX_EPOCH;

pub use harness::record as harness;
pub use llama::SOURCE as LLAMA;

use super::store::Record;
use crate::error::{Error, Result};

/// What the records of lm-evaluation-harness say made them.
const HARNESS: &str = "lm-evaluation-harness";

/// The record of a file that another program wrote: `results_*.json` or `samples_*.jsonl` of lm-evaluation-harness, or
/// the output of `llama-perplexity`.
pub fn read(path: &Path) -> Result<Record> {
    let bytes = std::fs::read(path).map_err(|error| Error::io("reading", path, &error))?;
    let modified = std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok();
    let seconds = modified.and_then(|time| time.duration_since(UNIX_EPOCH).ok()).map_or(0, |since| since.as_secs());
    let text = String::from_utf8_lossy(&bytes);
    if llama::is_output(&text) {
        return llama::record(&text, &path.display().to_string(), seconds);
    }
    if path.extension().is_some_and(|extension| extension == "jsonl") {
        return samples::record(&text, path, seconds);
    }
    harness(&bytes, &path.display().to_string())
}
