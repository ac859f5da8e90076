//! `strata sensitivity`.

use clap::Args;
use strata::analysis::sensitivity::{Granularity, Sensitivities, SensitivitySpec};
use strata::checkpoint::{self, Layout};
use strata::engine::{Event, Job, SensitivityJob};
use strata::error::{Error, Result};
use strata::format::Format;
use strata::quant::{Recipe, SampleSpec};
use strata::session::replay::finish;
use strata::session::{paths, report};

use super::progress::Follow;
use super::{Common, output};

#[derive(Args)]
pub struct Sensitivity {
    /// A checkpoint's directory, a hub id, or `demo`.
    model: String,
    #[command(flatten)]
    measured: Measured,
    /// Candidate formats, separated by commas; formats that are measured already stay.
    #[arg(long, value_name = "F,F", value_delimiter = ',', value_parser = parse_format)]
    formats: Option<Vec<Format>>,
    /// Share of the (unit, format) pairs that is measured end to end, the largest losses first; the others are estimated.
    #[arg(long, value_name = "SHARE")]
    exact: Option<f64>,
    /// Forget what was measured before.
    #[arg(long)]
    fresh: bool,
}

/// What measurements depend on: the same options find them again.
#[derive(Args, Clone)]
pub struct Measured {
    /// Recipe whose transforms, rounding and formats of embedding and head are used.
    #[arg(long, short, default_value = "phase3")]
    recipe: String,
    /// What takes a format together: `linear` (q, k and v, and the experts of a layer, together) or `block`.
    #[arg(long, default_value = "linear")]
    by: String,
    /// Text that rotations and GPTQ learn from, and whose other windows are measured on.
    #[arg(long, value_name = "FILE")]
    calibration: Option<String>,
    /// Sequences that rotations and GPTQ learn from.
    #[arg(long)]
    sequences: Option<usize>,
    /// Tokens of each sequence.
    #[arg(long)]
    length: Option<usize>,
    /// Further sequences of the text, on which losses are measured; 32 unless given, fewer of more than 512 tokens.
    #[arg(long)]
    windows: Option<usize>,
    /// Tokens of each that are scored, evenly spaced; 8192 in all unless given.
    #[arg(long)]
    positions: Option<usize>,
}

impl Measured {
    /// The recipe as it was named.
    pub fn recipe(&self) -> &str {
        &self.recipe
    }

    /// What to measure or to look up.
    pub fn spec(&self, layout: &Layout, common: &Common) -> Result<SensitivitySpec> {
        let mut sample = SampleSpec::default();
        if let Some(file) = &self.calibration {
            sample.source.clone_from(file);
        }
        sample.sequences = self.sequences.unwrap_or(sample.sequences);
        sample.length = self.length.unwrap_or(sample.length);
        sample.seed = common.seed.unwrap_or(sample.seed);
        let recipe = Recipe::find(&self.recipe)?;
        let mut spec = SensitivitySpec::new(recipe.steps(), &recipe.plan(layout, &[])?, sample);
        spec.by = self.by.parse::<Granularity>()?;
        spec.windows = self.windows.unwrap_or(spec.windows);
        spec.positions = self.positions.unwrap_or(spec.positions);
        Ok(spec)
    }
}

/// A format, for clap.
pub fn parse_format(text: &str) -> std::result::Result<Format, String> {
    text.parse()
}

impl Sensitivity {
    pub fn run(&self, common: &Common) -> Result<()> {
        let mut spec = self.measured.spec(&checkpoint::open(&self.model)?.layout, common)?;
        if let Some(formats) = &self.formats {
            spec.formats.clone_from(formats);
        }
        spec.exact = self.exact.unwrap_or(spec.exact);
        let job = SensitivityJob { model: self.model.clone(), spec, store: paths::data_directory(), fresh: self.fresh };
        let (engine, mut events) = common.engine()?;
        engine.submit(Job::Sensitivity(Box::new(job)))?;
        let mut follow = Follow::new();
        let mut found = None;
        finish(&mut events, &mut |event| {
            follow.event(event);
            if let Event::Sensitivities { sensitivities, .. } = event {
                found = Some(sensitivities.clone());
            }
        })?;
        let found = found.ok_or_else(|| Error::run("the measurement ended without a result"))?;
        if common.json { output::json(&*found) } else { print(&found) }
    }
}

/// A row a unit, a column a format; then how far losses add up.
fn print(found: &Sensitivities) -> Result<()> {
    output::table(&report::sensitivities(found))?;
    output::line("")?;
    output::line(&format!(
        "mean KLD in nats a token over {} tokens with only this unit quantized, ± 95 % over windows; ~ estimated from the output error; a8: what int8 activations add",
        found.tokens
    ))?;
    output::line(&format!("embedding {} and head {} lose {:.2e}", found.identity.embedding, found.identity.head, found.ends_kld))?;
    output::line("")?;
    output::table(&report::checks(&found.checks))?;
    output::line("")?;
    output::line("plans put together from the donors: measured over predicted is 1 where losses add up")
}
