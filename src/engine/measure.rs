//! The jobs that measure what parts of a model lose, and what allocation gains.

use std::path::PathBuf;

use super::{Event, JobId};
use crate::analysis::Gpu;
use crate::analysis::allocate::{self, Activations, AllocateRequest, Budget};
use crate::analysis::sensitivity::{self, SensitivitySpec};
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
        let pins = overrides.iter().filter(|rule| !matches!(rule.selector, Selector::Embedding | Selector::Head)).cloned().collect();
        recipe.allocate.clone().map(|spec| Self { spec, pins, store })
    }
}

/// Tokens that have to fit beside the weights unless the recipe says how many.
const CONTEXT: usize = 8192;

/// The plan of least predicted loss within the budget of `allocate`, measured first where it is not yet; `start` gives
/// the bytes where there is no other budget, and the formats of embedding and head.
pub(super) fn find_plan<B: Backend>(
    backend: &B,
    checkpoint: &Checkpoint,
    (steps, start, sample): (&Steps, &Plan, &SampleSpec),
    allocate: &AllocateJob,
    monitor: &Monitor,
) -> Result<Plan> {
    let formats = allocate.spec.formats.iter().chain(allocate.pins.iter().map(|pin| &pin.format)).copied().collect();
    let spec = SensitivitySpec { formats, ..SensitivitySpec::new(steps.clone(), start, sample.clone()) };
    let request = sensitivity::Request::new(checkpoint, &spec, allocate.store.clone())?;
    let losses = sensitivity::measure(backend, &request, false, monitor)?;
    let budget = match (&allocate.spec.bits, &allocate.spec.gpu) {
        (Some(bits), _) => Budget::Bits(*bits),
        (None, Some(name)) => Budget::fitting(&checkpoint.config, &Gpu::find(name)?, allocate.spec.context.unwrap_or(CONTEXT))?,
        (None, None) => Budget::LinearBytes(checkpoint.layout.linear_bytes(start)),
    };
    let found = allocate::allocate(
        &losses,
        &checkpoint.layout,
        &AllocateRequest {
            formats: Some(allocate.spec.formats.clone()),
            activations: Activations::Any,
            pins: allocate.pins.clone(),
            ..AllocateRequest::new(request.ends_plan(), budget)
        },
    )?;
    monitor.log(format!("plan found: {:.3} bits a weight, predicted KLD {:.2e}", found.bits_per_weight, found.corrected_kld));
    Ok(found.plan)
}

/// Measure what each part of a model loses.
#[derive(Debug, Clone)]
pub struct SensitivityJob {
    pub model: String,
    pub spec: SensitivitySpec,
    /// Folder that donors and measurements are kept in.
    pub store: PathBuf,
    /// Forget what was measured before.
    pub fresh: bool,
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
