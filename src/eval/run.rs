//! One evaluation of several models: rows, tokens and the reference pass are shared between them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::journal::Journal;
use super::result::{Evidence, Memory, ModelResult};
use super::score::{self, Sample};
use super::speed::{self, SpeedRequest};
use super::statistics::{DivergenceSummary, Perplexity};
use super::tasks::{Rows, Task};
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
    /// Leave out rows that cannot be used, and count them, instead of stopping at the first.
    pub skip_bad_rows: bool,
    /// Folder where finished batches are noted until the whole evaluation has ended; `None` notes nothing.
    pub journal: Option<PathBuf>,
    /// Forget what the journal has.
    pub fresh: bool,
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
            skip_bad_rows: false,
            journal: None,
            fresh: false,
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
    let questions = load_questions(request, monitor)?;
    let heldout = match &request.text {
        _ if request.windows == 0 => None,
        Some(path) => Some(text::read(path)?),
        None => Some(DEMO_HELDOUT.to_owned()),
    };
    announce(request, &questions, monitor);
    let mut reference: Option<Reference<B>> = None;
    let mut journals = Vec::new();
    let mut kept_journal = None;
    for (index, model) in request.reference.iter().chain(&request.models).enumerate() {
        monitor.check()?;
        monitor.stage("load", 1);
        let checkpoint = checkpoint::open_watched(&model.path, monitor)?;
        let loaded = Hybrid::load(backend(), &checkpoint)?.stopped_by(monitor.cancel_token());
        monitor.step(1, format!("{} loaded", model.name))?;
        let sha256 = checkpoint.sha256()?;
        let mut journal = None;
        if let Some(directory) = &request.journal {
            // Without a journal an evaluation cannot be resumed, which is no reason not to evaluate.
            match Journal::open(directory, &sha256, &loaded.backend.name(), request.fresh) {
                Ok(opened) => journal = Some(opened),
                Err(error) => monitor.warn(format!("{error}: this evaluation could not be resumed")),
            }
        }
        let is_reference = index == 0 && request.reference.is_some();
        let path = journal.as_ref().map(|journal| journal.path().to_owned());
        if is_reference {
            // It stays: every other evaluation of the reference's variants would score the same rows again.
            kept_journal = path;
        } else {
            journals.extend(path.filter(|path| Some(path) != kept_journal.as_ref()));
        }
        let evaluated = Evaluation {
            request,
            checkpoint: &checkpoint,
            model: &loaded,
            name: &model.name,
            sha256,
            questions: &questions,
            text: heldout.as_deref(),
        };
        let (evaluated, kept) = evaluated.run(if is_reference { None } else { reference.as_ref() }, is_reference, journal, monitor)?;
        reference = reference.or(kept);
        each(evaluated);
    }
    for path in journals {
        // A journal that stays behind costs disk space only.
        drop(std::fs::remove_file(path));
    }
    Ok(())
}

/// What the unquantized model said about the text windows.
struct Reference<B: Backend> {
    tokenizer: Option<Vec<u8>>,
    logits: Vec<B::Tensor>,
    scores: Vec<Vec<f64>>,
}

struct Evaluation<'a, B: Backend> {
    request: &'a EvaluateRequest,
    checkpoint: &'a Checkpoint,
    model: &'a Hybrid<B>,
    name: &'a str,
    sha256: String,
    questions: &'a [(Task, Rows)],
    text: Option<&'a str>,
}

impl<B: Backend> Evaluation<'_, B> {
    fn run(
        &self,
        reference: Option<&Reference<B>>,
        keep_logits: bool,
        mut journal: Option<Journal>,
        monitor: &Monitor,
    ) -> Result<(Evaluated, Option<Reference<B>>)> {
        let (checkpoint, request) = (self.checkpoint, self.request);
        let tokenizer = checkpoint.tokenizer()?;
        let mut tasks = BTreeMap::new();
        let mut samples = Vec::new();
        for (task, rows) in self.questions {
            let max_tokens = checkpoint.config.max_positions;
            let (mut score, scored) =
                score::score_task(self.model, &tokenizer, *task, &rows.questions, max_tokens, journal.as_mut(), monitor)?;
            score.skipped = rows.skipped;
            if score.truncated > 0 {
                monitor.warn(format!("{task}: {} contexts were cut from the left to {max_tokens} tokens", score.truncated));
            }
            tasks.insert(task.name().to_owned(), score);
            samples.extend(scored);
        }

        let windows = match self.text {
            Some(text) => text::windows(&text::tokenize(&tokenizer, text)?, request.windows, request.window_tokens)?,
            None => Vec::new(),
        };
        let read = self.read_text(&windows, reference, keep_logits, monitor)?;
        let speed = match request.speed {
            Some(speed) => {
                let text = windows.first().map_or(&[1][..], Vec::as_slice);
                Some(speed::measure(self.model, text, speed, monitor)?)
            }
            None => None,
        };

        let perplexities = Perplexity::of(&read.scores);
        let weight_bytes = checkpoint.linear_bytes()?;
        let result = ModelResult {
            model: checkpoint.name.clone(),
            variant: self.name.to_owned(),
            recipe: checkpoint.variant.as_ref().map(|variant| variant.provenance.recipe.clone()),
            weight_bytes,
            bits_per_weight: 8.0 * weight_bytes as f64 / checkpoint.layout.linear_weights() as f64,
            file_bytes: checkpoint.file_bytes(),
            tasks,
            kld: read.divergence,
            perplexity: perplexities.map(|perplexity| perplexity.gptq),
            perplexities,
            speed,
            memory: Memory { peak_bytes: memory::peak_bytes().unwrap_or(0), resident_weight_bytes: self.model.resident_bytes() },
            provenance: Evidence {
                tool: TOOL.into(),
                sha256: self.sha256.clone(),
                backend: self.model.backend.name(),
                threads: rayon::current_num_threads(),
                processor: processor(),
                text: text_description(request, windows.len()),
                limit: request.limit,
            },
        };
        let kept = if keep_logits {
            Some(Reference { tokenizer: checkpoint.companion("tokenizer.json")?, logits: read.logits, scores: read.scores })
        } else {
            None
        };
        Ok((Evaluated { result, samples }, kept))
    }

    /// Runs the model over the text's windows, beside what the reference said about them.
    fn read_text(
        &self,
        windows: &[Vec<u32>],
        reference: Option<&Reference<B>>,
        keep_logits: bool,
        monitor: &Monitor,
    ) -> Result<TextReading<B>> {
        let mut read = TextReading { scores: Vec::new(), divergence: None, logits: Vec::new() };
        if windows.is_empty() {
            return Ok(read);
        }
        if let Some(reference) = reference
            && reference.tokenizer != self.checkpoint.companion("tokenizer.json")?
        {
            return Err(Error::input(format!("{} has another tokenizer than the model it is compared with", self.name))
                .hint("divergence is defined between models of one vocabulary: compare variants of the same model"));
        }
        let backend = &self.model.backend;
        let mut divergence = Vec::new();
        monitor.stage("text", windows.len());
        for (index, window) in windows.iter().enumerate() {
            let logits = self.model.logits(window, &Sequences::new(vec![window.len()]), None)?;
            let targets: Vec<(usize, u32)> = window[1..].iter().copied().enumerate().collect();
            read.scores.push(backend.log_probabilities(&logits, &targets)?.into_iter().map(|(score, _)| score).collect());
            if let Some(reference) = reference {
                divergence.extend(backend.divergence(&reference.logits[index], &logits)?);
                let mean = divergence.iter().map(|token| token.kl).sum::<f64>() / divergence.len() as f64;
                monitor.divergence(index + 1, mean);
            }
            if keep_logits {
                read.logits.push(logits);
            }
            monitor.step(index + 1, format!("window {}", index + 1))?;
        }
        if let Some(reference) = reference {
            let rms_probability = Some(statistics::rms_probability(&reference.scores.concat(), &read.scores.concat()));
            read.divergence = Some(DivergenceSummary { rms_probability, ..statistics::summarize_divergence(&divergence) });
        }
        Ok(read)
    }
}

/// What a model says about the text's windows.
struct TextReading<B: Backend> {
    /// Log-probability of every token but the first, by window.
    scores: Vec<Vec<f64>>,
    /// From the reference.
    divergence: Option<DivergenceSummary>,
    /// By window, where later models are compared with this one.
    logits: Vec<B::Tensor>,
}

fn load_questions(request: &EvaluateRequest, monitor: &Monitor) -> Result<Vec<(Task, Rows)>> {
    let load = |task: &Task| {
        let mut rows = match &request.data {
            Some(directory) => task.from_directory(directory, request.skip_bad_rows)?,
            None => task.embedded()?,
        };
        if rows.skipped > 0 {
            monitor.warn(format!("{task}: {} bad rows were left out", rows.skipped));
        }
        rows.questions.truncate(request.limit.unwrap_or(usize::MAX));
        Ok((*task, rows))
    };
    request.tasks.iter().map(load).collect()
}

/// Tokens that are decoded one by one cost about this many times what they cost in a prompt.
const DECODING: f64 = 12.0;
/// Characters of a token, about.
const TOKEN: f64 = 4.0;
/// Share of a model's evaluation that loading it takes, about.
const LOADING: f64 = 0.03;

/// Tells the monitor which stages come, and their work in characters that the model reads.
fn announce(request: &EvaluateRequest, questions: &[(Task, Rows)], monitor: &Monitor) {
    let mut stages = Vec::new();
    for (task, rows) in questions {
        let work: usize = rows
            .questions
            .iter()
            .map(|question| {
                // A context that choices share is read once.
                let contexts: BTreeSet<&str> = question.requests.iter().map(|(context, _)| context.as_str()).collect();
                let continuations = question.requests.iter().map(|(_, continuation)| continuation.len());
                contexts.into_iter().map(str::len).chain(continuations).sum::<usize>()
            })
            .sum();
        stages.push((task.name().to_owned(), work as f64));
    }
    if request.windows > 0 {
        stages.push(("text".to_owned(), TOKEN * (request.windows * request.window_tokens) as f64));
    }
    if let Some(speed) = request.speed {
        let round = speed.prompt_tokens as f64 + DECODING * speed.decode_tokens as f64;
        stages.push(("speed".to_owned(), TOKEN * round * (speed.repetitions + 1) as f64));
    }
    let load = LOADING * stages.iter().map(|(_, work)| work).sum::<f64>();
    stages.insert(0, ("load".to_owned(), load));
    let models = request.reference.iter().chain(&request.models).count();
    monitor.plan(std::iter::repeat_n(stages, models).flatten());
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
