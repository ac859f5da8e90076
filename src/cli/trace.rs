//! `strata trace`.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;
use strata::engine::{Job, TraceJob};
use strata::error::Result;
use strata::session::replay::finish;

use super::progress::Follow;
use super::{Common, output};

#[derive(Args)]
pub struct Trace {
    /// A checkpoint's directory, a variant, a hub id, or `demo`.
    model: String,
    /// JSON file with token ids: {"input_ids": [[1, 2, 3]]}.
    #[arg(long, value_name = "FILE")]
    ids: PathBuf,
    /// Safetensors file to write: `logits` and `hidden.0` to `hidden.L`, f32.
    #[arg(long, short, value_name = "FILE")]
    output: PathBuf,
}

impl Trace {
    pub fn run(&self, common: &Common) -> Result<()> {
        let (engine, mut events) = common.engine()?;
        engine.submit(Job::Trace(Box::new(TraceJob {
            model: self.model.clone(),
            input: self.ids.clone(),
            output: self.output.clone(),
        })))?;
        let mut follow = Follow::new();
        finish(&mut events, &mut |event| follow.event(event))?;
        if common.json {
            return output::json(&json!({ "schema": "strata.trace/1", "model": self.model, "output": self.output }));
        }
        output::line(&self.output.display().to_string())
    }
}
