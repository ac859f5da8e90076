//! The jobs that measure what parts of a model lose, and what allocation gains.

use std::path::PathBuf;

use super::{Event, JobId};
use crate::analysis::allocate::{self, AllocateRequest};
use crate::analysis::sensitivity::{self, Sensitivities, SensitivitySpec};
use crate::analysis::study::{self, StudyRequest};
use crate::backend::Backend;
use crate::checkpoint::{self, Checkpoint, DEMO_HELDOUT};
use crate::error::Result;
use crate::eval::text;
use crate::format::{Format, Plan, Selector};
use crate::monitor::Monitor;
use crate::quant::{AllocateSpec, Override, Recipe, SampleSpec, Steps};

/// Find a plan by measurement, as a recipe's `[allocate]` asks.
#[derive(Debug, Clone, PartialEq)]
pub struct AllocateJob {
    pub spec: AllocateSpec,
    /// Overrides of blocks and linears: they keep their formats.
    pub pins: Vec<Override>,
    /// Folder that donors and measurements are kept in.
    pub store: PathBuf,
}

impl AllocateJob {
    /// What `recipe` leaves to measurement; `None` where it gives the formats itself.
    pub fn new(recipe: &Recipe, overrides: &[Override], store: PathBuf) -> Option<Self> {
        recipe.allocate.clone().map(|spec| Self { spec, pins: Self::pins(overrides), store })
    }

    /// The overrides that are pins: those of blocks and linears.
    pub fn pins(overrides: &[Override]) -> Vec<Override> {
        overrides.iter().filter(|rule| !matches!(rule.selector, Selector::Embedding | Selector::Head)).cloned().collect()
    }

    /// The formats whose losses it needs.
    pub fn formats(&self) -> Vec<Format> {
        self.spec.formats.iter().chain(self.pins.iter().map(|pin| &pin.format)).copied().collect()
    }
}

/// The plan of least predicted loss within the budget of `allocate`, and the losses that it was found by, measured first
/// where they are not yet; `start` gives the bytes where there is no other budget, and the formats of embedding and head.
pub(super) fn find_plan<B: Backend>(
    backend: &B,
    checkpoint: &Checkpoint,
    (steps, start, sample): (&Steps, &Plan, &SampleSpec),
    allocate: &AllocateJob,
    monitor: &Monitor,
) -> Result<(Plan, Sensitivities)> {
    let spec = SensitivitySpec { formats: allocate.formats(), ..SensitivitySpec::new(steps.clone(), start, sample.clone()) };
    let layout = &checkpoint.layout;
    let wanted = AllocateRequest::of_recipe(&allocate.spec, &allocate.pins, &checkpoint.config, layout, start)?;
    // What cannot be is known now, and not after hours of measuring.
    allocate::check(&sensitivity::unmeasured_units(layout, spec.by, &spec.formats), layout, &wanted)?;
    let request = sensitivity::Request::new(checkpoint, &spec, allocate.store.clone())?;
    let losses = sensitivity::measure(backend, &request, false, monitor)?;
    let found = allocate::allocate(&losses, layout, &wanted)?;
    monitor.log(format!("plan found: {:.3} bits a weight, predicted KLD {:.2e}", found.bits_per_weight, found.corrected_kld));
    Ok((found.plan, losses))
}

/// Measure what each part of a model loses.
#[derive(Debug, Clone, PartialEq)]
pub struct SensitivityJob {
    pub model: String,
    pub spec: SensitivitySpec,
    /// Folder that donors and measurements are kept in.
    pub store: PathBuf,
    /// Forget what was measured before.
    pub fresh: bool,
}

impl SensitivityJob {
    /// The losses that a plan made by `steps` is predicted from, in all candidate formats, or in those that `allocate` needs.
    pub fn new(model: String, steps: Steps, plan: &Plan, sample: SampleSpec, allocate: Option<&AllocateJob>, store: PathBuf) -> Self {
        let mut spec = SensitivitySpec::new(steps, plan, sample);
        if let Some(allocate) = allocate {
            spec.formats = allocate.formats();
        }
        Self { model, spec, store, fresh: false }
    }
}

/// Compare allocated plans with others on text that nothing was chosen on.
#[derive(Debug, Clone)]
pub struct StudyJob {
    pub model: String,
    /// What the sensitivities were measured with.
    pub spec: SensitivitySpec,
    pub store: PathBuf,
    pub formats: Vec<Format>,
    pub bits: Vec<f64>,
    /// Random plans a budget.
    pub random: usize,
    /// `None` takes the demo's held-out text.
    pub text: Option<PathBuf>,
    pub windows: usize,
    pub window_tokens: usize,
}

pub(super) fn sensitivity<B: Backend>(
    id: JobId,
    backend: &B,
    job: &SensitivityJob,
    monitor: &Monitor,
    send: &impl Fn(Event),
) -> Result<()> {
    let checkpoint = checkpoint::open_watched(&job.model, monitor)?;
    let request = sensitivity::Request::new(&checkpoint, &job.spec, job.store.clone())?;
    let sensitivities = Box::new(sensitivity::measure(backend, &request, job.fresh, monitor)?);
    send(Event::Sensitivities { id, sensitivities });
    Ok(())
}

pub(super) fn study<B: Backend>(id: JobId, backend: &B, job: &StudyJob, monitor: &Monitor, send: &impl Fn(Event)) -> Result<()> {
    let checkpoint = checkpoint::open_watched(&job.model, monitor)?;
    let request = sensitivity::Request::new(&checkpoint, &job.spec, job.store.clone())?;
    let losses = sensitivity::load(&request)?;
    let heldout = match &job.text {
        Some(path) => text::read(path)?,
        None => DEMO_HELDOUT.to_owned(),
    };
    let tokens = text::tokenize(&checkpoint.tokenizer()?, &heldout)?;
    let rows = study::study(
        backend,
        &StudyRequest {
            measurement: &request,
            losses: &losses,
            formats: job.formats.clone(),
            bits: job.bits.clone(),
            random: job.random,
            windows: text::windows(&tokens, job.windows, job.window_tokens)?,
            seed: job.spec.sample.seed,
        },
        monitor,
    )?;
    send(Event::Study { id, rows });
    Ok(())
}
