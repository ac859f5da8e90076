//! One evaluation of several models: rows, tokens and the reference pass are shared between them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use super::result::{Evidence, Memory, ModelResult};
use super::score::{self, Sample};
use super::speed::{self, SpeedRequest};
use super::tasks::{Question, Task};
use super::{memory, statistics, text};
use crate::backend::{Backend, Sequences};
use crate::checkpoint::{self, Checkpoint, DEMO_HELDOUT, TOOL};
use crate::error::{Error, Result};
use crate::model::Hybrid;
use crate::monitor::Monitor;

/// A model or variant and what to call it in the results.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelToEvaluate {
    /// `base` or the variant's name.
    pub name: String,
    /// What [`checkpoint::open`] takes.
    pub path: String,
}

/// What to measure.
#[derive(Debug, Clone, PartialEq)]
pub struct EvaluateRequest {
    /// Divergence is measured from this one; it is evaluated first. `None`: no divergence.
    pub reference: Option<ModelToEvaluate>,
    pub models: Vec<ModelToEvaluate>,
    pub tasks: Vec<Task>,
    /// Directory with a JSON-lines file a task; `None` takes the rows compiled in.
    pub data: Option<PathBuf>,
    /// First rows of each task only.
    pub limit: Option<usize>,
    /// Text for perplexity and divergence; `None` takes the demo's held-out text.
    pub text: Option<PathBuf>,
    /// Windows of that text, 0 for none.
    pub windows: usize,
    pub window_tokens: usize,
    pub speed: Option<SpeedRequest>,
}

impl Default for EvaluateRequest {
    fn default() -> Self {
        Self {
            reference: None,
            models: Vec::new(),
            tasks: Task::ALL.to_vec(),
            data: None,
            limit: None,
            text: None,
            windows: 24,
            window_tokens: 256,
            speed: None,
        }
    }
}

/// Result of one model with its scored rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluated {
    pub result: ModelResult,
    pub samples: Vec<Sample>,
}

/// Evaluates the reference and every model in turn, handing each result to `each` as it comes.
pub fn evaluate<B: Backend>(
    backend: impl Fn() -> B,
    request: &EvaluateRequest,
    monitor: &Monitor,
    mut each: impl FnMut(Evaluated),
) -> Result<()> {
    let questions = load_questions(request)?;
    let heldout = match &request.text {
        _ if request.windows == 0 => None,
        Some(path) => Some(text::read(path)?),
        None => Some(DEMO_HELDOUT.to_owned()),
    };
    let mut reference: Option<Reference<B>> = None;
    for (index, model) in request.reference.iter().chain(&request.models).enumerate() {
        monitor.check()?;
        monitor.stage("load", 1);
        let checkpoint = checkpoint::open_watched(&model.path, monitor)?;
        let loaded = Hybrid::load(backend(), &checkpoint)?;
        monitor.step(1, format!("{} loaded", model.name))?;
        let is_reference = index == 0 && request.reference.is_some();
        let evaluated = Evaluation {
            request,
            checkpoint: &checkpoint,
            model: &loaded,
            name: &model.name,
            questions: &questions,
            text: heldout.as_deref(),
        };
        let (evaluated, logits) = evaluated.run(if is_reference { None } else { reference.as_ref() }, is_reference, monitor)?;
        if let Some(logits) = logits {
            reference = Some(Reference { tokenizer: checkpoint.companion("tokenizer.json")?, logits });
        }
        each(evaluated);
    }
    Ok(())
}

/// What the unquantized model said about the text windows.
struct Reference<B: Backend> {
    tokenizer: Option<Vec<u8>>,
    logits: Vec<B::Tensor>,
}

struct Evaluation<'a, B: Backend> {
    request: &'a EvaluateRequest,
    checkpoint: &'a Checkpoint,
    model: &'a Hybrid<B>,
    name: &'a str,
    questions: &'a [(Task, Vec<Question>)],
    text: Option<&'a str>,
}

impl<B: Backend> Evaluation<'_, B> {
    fn run(&self, reference: Option<&Reference<B>>, keep_logits: bool, monitor: &Monitor) -> Result<(Evaluated, Option<Vec<B::Tensor>>)> {
        let (checkpoint, request) = (self.checkpoint, self.request);
        let tokenizer = checkpoint.tokenizer()?;
        let mut tasks = BTreeMap::new();
        let mut samples = Vec::new();
        for (task, questions) in self.questions {
            let max_tokens = checkpoint.config.max_positions;
            let (score, rows) = score::score_task(self.model, &tokenizer, *task, questions, max_tokens, monitor)?;
            if score.truncated > 0 {
                monitor.warn(format!("{task}: {} contexts were cut from the left to {max_tokens} tokens", score.truncated));
            }
            tasks.insert(task.name().to_owned(), score);
            samples.extend(rows);
        }

        let mut windows = Vec::new();
        let (mut divergence, mut losses, mut kept) = (Vec::new(), Vec::new(), Vec::new());
        if let Some(text) = self.text {
            windows = text::windows(&text::tokenize(&tokenizer, text)?, request.windows, request.window_tokens)?;
            if let Some(reference) = reference
                && reference.tokenizer != checkpoint.companion("tokenizer.json")?
            {
                return Err(Error::input(format!("{} has another tokenizer than the model it is compared with", self.name))
                    .hint("divergence is defined between models of one vocabulary: compare variants of the same model"));
            }
            monitor.stage("text", windows.len());
            for (index, window) in windows.iter().enumerate() {
                let logits = self.model.logits(window, &Sequences::new(vec![window.len()]), None)?;
                let targets: Vec<(usize, u32)> = window[1..].iter().copied().enumerate().collect();
                losses.extend(self.model.backend.log_probabilities(&logits, &targets)?.into_iter().map(|(score, _)| -score));
                if let Some(reference) = reference {
                    divergence.extend(self.model.backend.divergence(&reference.logits[index], &logits)?);
                }
                if keep_logits {
                    kept.push(logits);
                }
                monitor.step(index + 1, format!("window {}", index + 1))?;
            }
        }
        let speed = match request.speed {
            Some(speed) => {
                let text = windows.first().map_or(&[1][..], Vec::as_slice);
                Some(speed::measure(self.model, text, speed, monitor)?)
            }
            None => None,
        };

        let weight_bytes = checkpoint.linear_bytes()?;
        let result = ModelResult {
            model: checkpoint.name.clone(),
            variant: self.name.to_owned(),
            recipe: checkpoint.variant.as_ref().map(|variant| variant.provenance.recipe.clone()),
            weight_bytes,
            bits_per_weight: 8.0 * weight_bytes as f64 / checkpoint.layout.linear_weights() as f64,
            file_bytes: checkpoint.file_bytes(),
            tasks,
            kld: (!divergence.is_empty()).then(|| statistics::summarize_divergence(&divergence)),
            perplexity: (!losses.is_empty()).then(|| statistics::mean(&losses).exp()),
            speed,
            memory: Memory { peak_bytes: memory::peak_bytes().unwrap_or(0), resident_weight_bytes: self.model.resident_bytes() },
            provenance: Evidence {
                tool: TOOL.into(),
                sha256: checkpoint.sha256()?,
                backend: self.model.backend.name(),
                threads: rayon::current_num_threads(),
                processor: processor(),
                text: text_description(request, windows.len()),
                limit: request.limit,
            },
        };
        Ok((Evaluated { result, samples }, keep_logits.then_some(kept)))
    }
}

fn load_questions(request: &EvaluateRequest) -> Result<Vec<(Task, Vec<Question>)>> {
    let load = |task: &Task| {
        let mut questions = match &request.data {
            Some(directory) => task.from_directory(directory)?,
            None => task.embedded()?,
        };
        questions.truncate(request.limit.unwrap_or(usize::MAX));
        Ok((*task, questions))
    };
    request.tasks.iter().map(load).collect()
}

fn text_description(request: &EvaluateRequest, windows: usize) -> String {
    let source = request.text.as_ref().map_or_else(|| "demo held-out text".to_owned(), |path| path.display().to_string());
    format!("{windows} x {} tokens of {source}", request.window_tokens)
}

/// The processor's name as the system gives it.
fn processor() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split_once(':').map(|(_, name)| name.trim().to_owned()));
    name.unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}
