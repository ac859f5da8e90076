//! `strata generate`.

use std::io::Write;

use clap::Args;
use serde_json::json;
use strata::engine::{Event, GenerateJob, Job};
use strata::error::Result;
use strata::model::generate::SamplingSpec;
use strata::session::replay::finish;

use super::{Common, output};

#[derive(Args)]
pub struct Generate {
    /// A checkpoint's directory, a variant, a hub id, or `demo`.
    model: String,
    /// Text to continue.
    #[arg(long)]
    prompt: String,
    /// Tokens at most.
    #[arg(long, default_value_t = 64)]
    max_tokens: usize,
    /// 0 picks the most probable token.
    #[arg(long, default_value_t = 0.0)]
    temperature: f64,
    /// Keep the most probable tokens up to this share of the probability.
    #[arg(long)]
    top_p: Option<f64>,
}

impl Generate {
    pub fn run(&self, common: &Common) -> Result<()> {
        let (engine, mut events) = common.engine()?;
        engine.submit(Job::Generate(Box::new(GenerateJob {
            model: self.model.clone(),
            prompt: self.prompt.clone(),
            max_tokens: self.max_tokens,
            sampling: SamplingSpec { temperature: self.temperature, top_p: self.top_p, seed: common.seed.unwrap_or(0) },
        })))?;
        let mut text = String::new();
        let mut count = 0;
        finish(&mut events, &mut |event| {
            if let Event::Text { piece, tokens, .. } = event {
                text.push_str(piece);
                count = *tokens;
                if !common.json {
                    print!("{piece}");
                    // A reader that went away is noticed by the next `line`.
                    let _ = std::io::stdout().flush();
                }
            }
        })?;
        if common.json {
            return output::json(&json!({
                "schema": "strata.generate/1", "model": self.model, "prompt": self.prompt, "text": text, "tokens": count
            }));
        }
        output::line("")
    }
}
