//! The jobs that measure what parts of a model lose, and what allocation gains.

use std::path::PathBuf;

use super::{Event, JobId};
use crate::analysis::sensitivity::{self, SensitivitySpec};
use crate::analysis::study::{self, StudyRequest};
use crate::backend::Backend;
use crate::checkpoint::{self, DEMO_HELDOUT};
use crate::error::Result;
use crate::eval::text;
use crate::format::Format;
use crate::monitor::Monitor;

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
