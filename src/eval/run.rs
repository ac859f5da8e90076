//! One evaluation of several models: rows, tokens and the reference pass are shared between them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use super::dataset::DataSource;
use super::decode::{self, DecodeDivergence, DecodeReference};
use super::divergence::{self, Compared, TextReader, TextReading};
use super::encoded::Encoded;
use super::journal::Journal;
use super::reference::{FOLDER_BYTES, References};
use super::result::{BlockError, Evidence, Memory, ModelResult, ReferenceModel};
use super::score::{self, BATCH_TOKENS, Sample, TaskScore};
use super::speed::{self, Speed, SpeedPoint, SpeedRequest};
use super::statistics::Perplexity;
use super::tasks::{Rows, Task};
use super::{hardware, memory, text};
use crate::backend::Backend;
use crate::checkpoint::{self, Checkpoint, DEMO_HELDOUT, TOOL};
use crate::error::{Error, Result};
use crate::format::{CacheFormat, SsmActivations};
use crate::model::Reader;
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
    /// Where the rows come from.
    pub data: DataSource,
    /// First rows of each task only.
    pub limit: Option<usize>,
    /// Text for perplexity and divergence; `None` takes the demo's held-out text.
    pub text: Option<PathBuf>,
    /// Windows of that text, 0 for none.
    pub windows: usize,
    pub window_tokens: usize,
    /// Tokens of that text that variants with rounded caches decode one by one, 0 for none.
    pub decode_tokens: usize,
    pub speed: Option<SpeedRequest>,
    /// Leave out rows that cannot be used, and count them, instead of stopping at the first.
    pub skip_bad_rows: bool,
    /// Folder where finished batches are noted until the whole evaluation has ended; `None` notes nothing.
    pub journal: Option<PathBuf>,
    /// Forget what the journal has.
    pub fresh: bool,
    /// Folder where the reference's log-probabilities are kept; `None` keeps them for this evaluation only.
    pub references: Option<PathBuf>,
    /// Bytes that this folder may hold.
    pub reference_bytes: u64,
    /// Bytes of memory to take, beyond which a model is read block by block; `None` for what is free.
    pub host_memory: Option<u64>,
}

impl Default for EvaluateRequest {
    fn default() -> Self {
        Self {
            reference: None,
            models: Vec::new(),
            tasks: Task::ALL.to_vec(),
            data: DataSource::Automatic,
            limit: None,
            text: None,
            windows: 24,
            window_tokens: 256,
            decode_tokens: decode::DEFAULT_TOKENS,
            speed: None,
            skip_bad_rows: false,
            journal: None,
            fresh: false,
            references: None,
            reference_bytes: FOLDER_BYTES,
            host_memory: None,
        }
    }
}

impl EvaluateRequest {
    /// An error when there is nothing to measure in what is asked for, or it is asked for twice.
    pub fn check(&self) -> Result<()> {
        if self.limit == Some(0) {
            return Err(Error::input("a limit of 0 rows leaves nothing to score").hint("give 1 or more, or no tasks"));
        }
        if let Some((_, task)) = self.tasks.iter().enumerate().find(|(index, task)| self.tasks[..*index].contains(task)) {
            return Err(Error::input(format!("task `{task}` is named twice")).hint("name every task once"));
        }
        if self.windows > 0 && self.window_tokens < 3 {
            return Err(Error::input("half of a window of fewer than 3 tokens predicts nothing")
                .hint("give windows of 3 tokens or more, or 0 windows"));
        }
        if self.speed.iter().flat_map(|speed| &speed.grid).any(|(prompt, sequences)| prompt.min(sequences) == &0) {
            return Err(Error::input("speed cannot be measured on 0 tokens or sequences").hint("give counts of 1 or more"));
        }
        Ok(())
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
    request.check()?;
    let named = request.reference.iter().chain(&request.models);
    let models: Vec<(&ModelToEvaluate, Checkpoint)> =
        named.map(|model| Ok((model, checkpoint::open_watched(&model.path, monitor)?))).collect::<Result<_>>()?;
    let Some(((_, first), others)) = models.split_first() else { return Ok(()) };
    if request.reference.is_some() && request.windows > 0 {
        others.iter().try_for_each(|(model, checkpoint)| divergence::check_vocabulary(first, checkpoint, &model.name))?;
    }
    let demo = first.has_demo_tokenizer()?;
    let questions = load_questions(request, demo, monitor)?;
    let heldout = match &request.text {
        _ if request.windows == 0 => None,
        Some(path) => Some(text::read(path)?),
        None => Some(DEMO_HELDOUT.to_owned()),
    };
    let temporary = tempfile::tempdir().map_err(|error| Error::io("making a folder in", &std::env::temp_dir(), &error))?;
    let references = References::new(request.references.clone().unwrap_or_else(|| temporary.path().to_owned()), request.reference_bytes);
    announce(request, &questions, monitor);
    let decodes = request.decode_tokens > 0
        && heldout.is_some()
        && request.reference.is_some()
        && others.iter().any(|(_, checkpoint)| rounds_caches(checkpoint));
    let mut encoded: Option<Encoded> = None;
    let mut decode_reference: Option<DecodeReference> = None;
    let mut compared: Option<Compared> = None;
    let mut reference = None;
    let mut journals = Vec::new();
    let mut kept_journal = None;
    for (index, (model, checkpoint)) in models.iter().enumerate() {
        monitor.check()?;
        let read = match encoded.take() {
            Some(same) if same.serves(checkpoint)? => same,
            _ => Encoded::of(checkpoint, request, &questions, heldout.as_deref())?,
        };
        let read = &*encoded.insert(read);
        monitor.stage("load", 1);
        let host_memory = request.host_memory.or_else(memory::available_bytes).unwrap_or(u64::MAX);
        let batch_tokens = if heldout.is_some() { BATCH_TOKENS.max(request.window_tokens) } else { BATCH_TOKENS };
        let backend = backend();
        backend.reset_peak()?;
        let peak_of_model = memory::reset_peak();
        let reader = Reader::load(backend, checkpoint, host_memory, temporary.path(), batch_tokens, monitor)?;
        monitor.step(1, format!("{} loaded", model.name))?;
        let sha256 = checkpoint.sha256()?;
        let mut journal = None;
        if let Some(directory) = &request.journal {
            // Without a journal an evaluation cannot be resumed, which is no reason not to evaluate.
            match Journal::open(directory, &sha256, &reader.backend().name(), request.fresh) {
                Ok(opened) => journal = Some(opened),
                Err(error) => monitor.warn(format!("{error}: this evaluation could not be resumed")),
            }
        }
        let is_reference = index == 0 && request.reference.is_some();
        if is_reference {
            reference = Some(ReferenceModel { model: checkpoint.name.clone(), sha256: sha256.clone() });
        }
        let path = journal.as_ref().map(|journal| journal.path().to_owned());
        if is_reference {
            // It stays: every other evaluation of the reference's variants would score the same rows again.
            kept_journal = path;
        } else {
            journals.extend(path.filter(|path| Some(path) != kept_journal.as_ref()));
        }
        let evaluation = Evaluation {
            request,
            checkpoint,
            reader: &reader,
            name: &model.name,
            sha256,
            questions: &questions,
            read,
            peak_of_model,
            reference: reference.as_ref(),
        };
        let (tasks, samples) = evaluation.score(journal, monitor)?;
        let text = TextReader {
            reader: &reader,
            checkpoint,
            name: &model.name,
            sha256: &evaluation.sha256,
            windows: &read.windows,
            chunks: &read.chunks,
        };
        let reading = if is_reference {
            let (reading, kept) = text.read_as_reference(&references, monitor)?;
            compared = kept;
            reading
        } else {
            text.read(compared.as_mut(), monitor)?
        };
        let decoding = if is_reference {
            if decodes {
                decode_reference = DecodeReference::of(&text, &read.decoded, &references, monitor)?;
            }
            None
        } else {
            evaluation.decode(decode_reference.as_mut(), monitor)?
        };
        let speed = evaluation.speed(monitor)?;
        let result = ModelResult { kld_decode: decoding, ..evaluation.result(tasks, reading, speed)? };
        each(Evaluated { result, samples });
    }
    for path in journals {
        // A journal that stays behind costs disk space only.
        drop(std::fs::remove_file(path));
    }
    Ok(())
}

struct Evaluation<'a, B: Backend> {
    request: &'a EvaluateRequest,
    checkpoint: &'a Checkpoint,
    reader: &'a Reader<'a, B>,
    name: &'a str,
    sha256: String,
    questions: &'a [(Task, Rows)],
    read: &'a Encoded,
    /// Whether the process's peak is watched from this model on.
    peak_of_model: bool,
    /// What divergence is measured from.
    reference: Option<&'a ReferenceModel>,
}

impl<B: Backend> Evaluation<'_, B> {
    /// Scores the rows of every task.
    fn score(&self, mut journal: Option<Journal>, monitor: &Monitor) -> Result<(BTreeMap<String, TaskScore>, Vec<Sample>)> {
        let (mut tasks, mut samples) = (BTreeMap::new(), Vec::new());
        for ((task, rows), encoded) in self.questions.iter().zip(&self.read.tasks) {
            let (mut score, scored) = score::score_task(self.reader, *task, &rows.questions, encoded, journal.as_mut(), monitor)?;
            score.skipped = rows.skipped;
            if score.truncated > 0 {
                let max_tokens = self.checkpoint.config.max_positions;
                monitor.warn(format!("{task}: {} contexts were cut from the left to {max_tokens} tokens", score.truncated));
            }
            tasks.insert(task.name().to_owned(), score);
            samples.extend(scored);
        }
        Ok((tasks, samples))
    }

    /// Divergence in decoding of a variant with rounded caches.
    fn decode(&self, reference: Option<&mut DecodeReference>, monitor: &Monitor) -> Result<Option<DecodeDivergence>> {
        if !rounds_caches(self.checkpoint) || self.read.decoded.is_empty() {
            return Ok(None);
        }
        match (reference, self.reader.resident()) {
            (Some(reference), Some(model)) => reference.compare(model, &self.read.decoded, monitor).map(Some),
            (None, _) if self.request.reference.is_none() => Ok(None),
            _ => {
                monitor.warn("divergence in decoding is not measured: a model is read block by block, and decoding needs all of it");
                Ok(None)
            }
        }
    }

    /// The usual prompt's speed, and every point's.
    fn speed(&self, monitor: &Monitor) -> Result<(Option<Speed>, Vec<SpeedPoint>)> {
        let Some(request) = &self.request.speed else { return Ok((None, Vec::new())) };
        let Some(model) = self.reader.resident() else {
            monitor.warn("speed is not measured: the model is read block by block, and decoding needs all of it");
            return Ok((None, Vec::new()));
        };
        let (speed, points) = speed::measure(model, self.read.windows.first().map_or(&[1][..], Vec::as_slice), request, monitor)?;
        Ok((Some(speed), points))
    }

    fn result(
        &self,
        tasks: BTreeMap<String, TaskScore>,
        reading: TextReading,
        (speed, speed_points): (Option<Speed>, Vec<SpeedPoint>),
    ) -> Result<ModelResult> {
        let checkpoint = self.checkpoint;
        let mut formats = checkpoint.variant.as_ref().map(|variant| variant.cache).unwrap_or_default();
        if checkpoint.variant.as_ref().is_some_and(|variant| variant.activations.ssm != SsmActivations::Float) {
            // Such mixers keep the codes that they compute with.
            formats.conv = CacheFormat::Int8;
        }
        let perplexities = reading.llama_cpp.and_then(|llama_cpp| Perplexity::of(&reading.scores, llama_cpp));
        let weight_bytes = checkpoint.linear_bytes()?;
        Ok(ModelResult {
            model: checkpoint.name.clone(),
            variant: self.name.to_owned(),
            recipe: checkpoint.variant.as_ref().map(|variant| variant.provenance.recipe.clone()),
            weight_bytes,
            bits_per_weight: 8.0 * weight_bytes as f64 / checkpoint.layout.linear_weights() as f64,
            file_bytes: checkpoint.file_bytes(),
            tasks,
            kld: reading.divergence,
            kld_decode: None,
            noise_floor: reading.noise_floor,
            perplexity: perplexities.and_then(|perplexity| perplexity.gptq),
            perplexities,
            blocks: checkpoint.variant.as_ref().map_or_else(Vec::new, |variant| variant.blocks.iter().map(BlockError::of).collect()),
            speed,
            speed_points,
            caches: memory::CONTEXTS
                .map(|context| memory::predict_caches(&checkpoint.config, &checkpoint.layout, formats, context))
                .to_vec(),
            memory: Memory {
                peak_bytes: memory::peak_bytes().unwrap_or(0),
                peak_of_model: self.peak_of_model,
                resident_weight_bytes: self.reader.resident_bytes(),
                device_peak_bytes: self.reader.backend().peak_bytes(),
            },
            provenance: Evidence {
                tool: TOOL.into(),
                sha256: self.sha256.clone(),
                backend: self.reader.backend().name(),
                threads: rayon::current_num_threads(),
                processor: hardware::processor(),
                cores: hardware::cores(),
                memory_bytes: memory::total_bytes().unwrap_or(0),
                libraries: hardware::libraries().into_iter().chain(self.reader.backend().libraries()).collect(),
                text: text_description(self.request, self.read.windows.len()),
                limit: self.request.limit,
                reference: self.reference.cloned(),
            },
        })
    }
}

/// The rows of every task; `demo` says whether the first model reads the rows compiled in.
fn load_questions(request: &EvaluateRequest, demo: bool, monitor: &Monitor) -> Result<Vec<(Task, Rows)>> {
    let load = |task: &Task| {
        let mut rows = request.data.rows(*task, demo, request.skip_bad_rows, monitor)?;
        if rows.skipped > 0 {
            monitor.warn(format!("{task}: {} bad rows were left out", rows.skipped));
        }
        rows.questions.truncate(request.limit.unwrap_or(usize::MAX));
        Ok((*task, rows))
    };
    request.tasks.iter().map(load).collect()
}

/// Whether a variant keeps a cache in less than f32.
fn rounds_caches(checkpoint: &Checkpoint) -> bool {
    checkpoint.variant.as_ref().is_some_and(|variant| variant.cache.is_quantized())
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
        let work = TOKEN * (request.windows * request.window_tokens) as f64;
        stages.extend([("text".to_owned(), work), ("perplexity".to_owned(), work)]);
    }
    if let Some(speed) = &request.speed {
        let points = speed.grid.iter().copied().chain([(speed.prompt_tokens, 1)]);
        let round: f64 = points.map(|(prompt, sequences)| sequences as f64 * (prompt as f64 + DECODING * speed.decode_tokens as f64)).sum();
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
