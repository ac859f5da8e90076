//! `strata quantize`.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;
use strata::checkpoint::{self, StorageLayout, VariantManifest};
use strata::engine::{AllocateJob, Event, Job, QuantizeJob};
use strata::error::{Error, Result};
use strata::format::Plan;
use strata::monitor::{DeviceMemory, Report};
use strata::quant::overlap::EvaluationFiles;
use strata::quant::{Override, Recipe, SampleSpec};
use strata::session::replay::finish;
use strata::session::{SESSION_SCHEMA, Session, VariantSpec, paths, report};

use super::progress::Follow;
use super::{Common, output};

#[derive(Args)]
pub struct Quantize {
    /// A checkpoint's directory, a hub id, or `demo`.
    model: String,
    /// phase1, phase2, phase3, a recipe file, or a session file with one variant.
    #[arg(long, short)]
    recipe: String,
    /// Where the variant goes; without it, the user's data folder under its hash.
    #[arg(long, short)]
    output: Option<PathBuf>,
    /// Replace an output that exists, or make a variant again that is there already.
    #[arg(long)]
    force: bool,
    /// Change the plan: `kind:ssm=w8a8`, `block:3-7=w4a8`, `head=w16a16`. May be given several times.
    #[arg(long = "override", value_name = "MATCH=FORMAT")]
    overrides: Vec<String>,
    /// Store what compressed-tensors can express, so that other engines load it; says what was given up.
    #[arg(long)]
    portable: bool,
    /// Text that the variant is calibrated and validated on (`.jsonl`: the `text` of each line); the demo's calibration
    /// text unless given.
    #[arg(long, value_name = "FILE")]
    calibration: Option<String>,
    /// Sequences of the sample.
    #[arg(long)]
    sequences: Option<usize>,
    /// Tokens of each sequence.
    #[arg(long)]
    length: Option<usize>,
    /// Calibrate even on text that is evaluated on.
    #[arg(long)]
    allow_overlap: bool,
}

impl Quantize {
    pub fn run(&self, common: &Common) -> Result<()> {
        let (variant, mut sample, evaluation) = self.variant()?;
        let checkpoint = checkpoint::open(&self.model)?;
        let (recipe, plan) = variant.plan(&checkpoint.layout)?;
        if let Some(file) = &self.calibration {
            sample.source.clone_from(file);
        }
        sample.sequences = self.sequences.unwrap_or(sample.sequences);
        sample.length = self.length.unwrap_or(sample.length);
        sample.allow_overlap |= self.allow_overlap;
        sample.seed = common.seed.unwrap_or(sample.seed);
        let layout = checkpoint.layout.clone();
        drop(checkpoint);
        let job = QuantizeJob {
            model: self.model.clone(),
            name: variant.name,
            steps: recipe.steps(),
            allocate: AllocateJob::new(&recipe, &variant.overrides, paths::data_directory()),
            recipe: recipe.name,
            plan: plan.clone(),
            sample,
            evaluation,
            storage: if self.portable { StorageLayout::Portable } else { StorageLayout::Native },
            output: self.output.clone(),
            store: paths::variants_directory(),
            force: self.force,
            host_memory: common.host_memory,
            donors: None,
        };
        let made = run_job(job, common)?;
        let base = layout.linear_bytes(&Plan::unquantized(layout.blocks.len()));
        print(&made, base, common)
    }

    /// The variant asked for, and the sample and evaluation files that its session names.
    fn variant(&self) -> Result<(VariantSpec, SampleSpec, EvaluationFiles)> {
        let path = Path::new(&self.recipe);
        let is_session = path.is_file() && std::fs::read_to_string(path).is_ok_and(|text| text.contains(SESSION_SCHEMA));
        let (mut variant, sample, evaluation) = if is_session {
            let session = Session::read(path)?;
            match session.variants.as_slice() {
                [variant] => (variant.clone(), session.calibration.clone(), session.evaluate.files()),
                variants => {
                    return Err(Error::input(format!("{} has {} variants, and `quantize` makes one", path.display(), variants.len()))
                        .hint("run it with `strata replay`, whose --variant picks one"));
                }
            }
        } else {
            let name = Recipe::find(&self.recipe)?.name;
            (VariantSpec::new(name, self.recipe.clone()), SampleSpec::default(), EvaluationFiles::default())
        };
        for rule in &self.overrides {
            variant.overrides.push(parse_override(rule)?);
        }
        Ok((variant, sample, evaluation))
    }
}

/// A variant that was made.
pub struct Made {
    pub path: PathBuf,
    pub manifest: Box<VariantManifest>,
    /// Of a device that has its own.
    pub device_memory: Option<DeviceMemory>,
}

/// Makes the variant with progress on stderr.
pub fn run_job(job: QuantizeJob, common: &Common) -> Result<Made> {
    let (engine, mut events) = common.engine()?;
    engine.submit(Job::Quantize(Box::new(job)))?;
    let mut follow = Follow::new();
    let (mut done, mut device_memory) = (None, None);
    finish(&mut events, &mut |event| {
        follow.event(event);
        match event {
            Event::Report { report: Report::DeviceMemory(memory), .. } => device_memory = Some(*memory),
            Event::Quantized { path, manifest, .. } => done = Some((path.clone(), manifest.clone())),
            _ => {}
        }
    })?;
    let made = done.map(|(path, manifest)| Made { path, manifest, device_memory });
    made.ok_or_else(|| Error::run("quantization ended without a variant"))
}

/// `kind:ssm=w8a8` as an override.
pub fn parse_override(rule: &str) -> Result<Override> {
    let (selector, format) =
        rule.split_once('=').ok_or_else(|| Error::input(format!("override `{rule}` has no `=`")).hint("write kind:ssm=w8a8"))?;
    let wrong =
        |what: String| Error::input(format!("override `{rule}`: {what}")).hint("an override reads like kind:ssm=w8a8 or block:3-7=w4a8");
    Ok(Override { selector: selector.parse().map_err(wrong)?, format: format.parse().map_err(wrong)? })
}

fn print(made: &Made, base_bytes: u64, common: &Common) -> Result<()> {
    let Made { path, manifest, device_memory } = made;
    let bytes: u64 = manifest.blocks.iter().map(|block| block.bytes).sum();
    let ratio = bytes as f64 / base_bytes as f64;
    if common.json {
        return output::json(&json!({
            "schema": "strata.quantize/1",
            "output": path,
            "weight_bytes": bytes,
            "base_weight_bytes": base_bytes,
            "ratio": ratio,
            "device_memory": device_memory,
            "manifest": manifest,
        }));
    }
    output::line(&path.display().to_string())?;
    output::line(&format!(
        "{} blocks, linears {} ({ratio:.3} of 16-bit), sample KLD {:.2e} (p99 {:.2e}), top-1 {:.1}%, {:?} layout",
        manifest.blocks.len(),
        report::bytes(bytes),
        manifest.sample.kld_mean,
        manifest.sample.kld_p99,
        100.0 * manifest.sample.top1,
        manifest.layout
    ))
}
