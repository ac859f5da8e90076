//! The jobs that the engine runs.

use std::path::PathBuf;

use super::{AllocateJob, Event, JobId, ObserveJob, PlaygroundJob, SensitivityJob, StudyJob, measure, observe, playground};
use crate::analysis::sensitivity::donors_directory;
use crate::backend::Backend;
use crate::checkpoint::{self, Checkpoint, StorageLayout};
use crate::error::{Error, Result};
use crate::eval::{EvaluateRequest, evaluate, memory, text};
use crate::format::{Activations, BlockKind, CacheFormats, Format, Plan};
use crate::model::Hybrid;
use crate::model::generate::{self, SamplingSpec};
use crate::model::trace::{self, TraceInput};
use crate::monitor::{CancelToken, Monitor, PauseToken, Report};
use crate::quant::overlap::{self, EvaluationFiles};
use crate::quant::{self, Donors, QuantizeRequest, Sample, SampleSpec, Steps};

/// Work for the engine.
#[derive(Debug, Clone)]
pub enum Job {
    Quantize(Box<QuantizeJob>),
    /// Evaluates the reference and the models in turn; one `Evaluated` event each.
    Evaluate(Box<EvaluateRequest>),
    /// Continue a prompt; a `Text` event for each piece.
    Generate(Box<GenerateJob>),
    /// Write logits and residual streams.
    Trace(Box<TraceJob>),
    /// Measure what each part of a model loses; a `Sensitivities` event at the end.
    Sensitivity(Box<SensitivityJob>),
    /// Compare allocated plans with others; a `Study` event at the end.
    Study(Box<StudyJob>),
    /// Observe the inputs of every linear; an `Observed` event a block.
    Observe(Box<ObserveJob>),
    /// Continue a prompt with two models; a `Spoken` event a token.
    Playground(Box<PlaygroundJob>),
}

/// Continue a prompt.
#[derive(Debug, Clone)]
pub struct GenerateJob {
    pub model: String,
    pub prompt: String,
    pub max_tokens: usize,
    pub sampling: SamplingSpec,
}

/// Write logits and residual streams for the token ids in `input`.
#[derive(Debug, Clone)]
pub struct TraceJob {
    pub model: String,
    pub input: PathBuf,
    pub output: PathBuf,
}

/// Quantize one variant.
#[derive(Debug, Clone)]
pub struct QuantizeJob {
    /// What [`checkpoint::open`] takes.
    pub model: String,
    /// The variant's name, for events.
    pub name: String,
    pub recipe: String,
    pub steps: Steps,
    pub plan: Plan,
    pub sample: SampleSpec,
    /// What the variant will be evaluated on: its calibration text must be other text.
    pub evaluation: EvaluationFiles,
    pub storage: StorageLayout,
    /// Where the variant goes. `None`: under `store`, by the hash of everything that decides its bytes; a variant
    /// found there is verified and reused unless `force` is set.
    pub output: Option<PathBuf>,
    /// The folder of variants without an output of their own.
    pub store: PathBuf,
    /// Replace what is there.
    pub force: bool,
    /// Folder of donors to take the quantized weights from, made by a sensitivity job with the same steps and sample.
    pub donors: Option<PathBuf>,
    /// Bytes of memory that may be taken; `None` for what is free.
    pub host_memory: Option<u64>,
    /// Find the plan by measurement first; `plan` then gives the bytes, and the formats of embedding and head.
    pub allocate: Option<AllocateJob>,
}

impl Job {
    /// What the job is called on screen.
    pub fn title(&self) -> String {
        match self {
            Self::Quantize(job) => format!("quantize {}", job.name),
            Self::Evaluate(request) => {
                let names: Vec<&str> = request.reference.iter().chain(&request.models).map(|model| model.name.as_str()).collect();
                format!("evaluate {}", names.join(", "))
            }
            Self::Generate(job) => format!("generate with {}", job.model),
            Self::Trace(job) => format!("trace {}", job.model),
            Self::Observe(job) => format!("observe {}", job.model),
            Self::Playground(_) => "playground".into(),
            Self::Sensitivity(job) => format!("measure {}", job.model),
            Self::Study(job) => format!("study {}", job.model),
        }
    }
}

/// Runs a job on the current computing pool.
pub(super) fn run<B: Backend + Clone>(
    backend: &B,
    id: JobId,
    job: Job,
    cancel: &CancelToken,
    pause: &PauseToken,
    send: &(impl Fn(Event) + Sync),
) -> Result<()> {
    let monitor = Monitor::new(|report: Report| send(Event::Report { id, report }), cancel.clone()).pausable(pause.clone());
    monitor.check()?;
    match job {
        Job::Quantize(job) => quantize(backend, id, *job, &monitor, send),
        Job::Evaluate(request) => {
            evaluate(|| backend.clone(), &request, &monitor, |evaluated| send(Event::Evaluated { id, evaluated: Box::new(evaluated) }))
        }
        Job::Generate(job) => generate(backend, id, &job, &monitor, send),
        Job::Observe(job) => observe::observe(id, backend, &job, &monitor, send),
        Job::Playground(job) => playground::play(id, || backend.clone(), &job, &monitor, send),
        Job::Sensitivity(job) => measure::sensitivity(id, backend, &job, &monitor, send),
        Job::Study(job) => measure::study(id, backend, &job, &monitor, send),
        Job::Trace(job) => {
            trace::trace(backend, &checkpoint::open_watched(&job.model, &monitor)?, &TraceInput::read(&job.input)?, &job.output, &monitor)
        }
    }
}

fn generate<B: Backend + Clone>(backend: &B, id: JobId, job: &GenerateJob, monitor: &Monitor, send: &impl Fn(Event)) -> Result<()> {
    let checkpoint = checkpoint::open_watched(&job.model, monitor)?;
    let tokenizer = checkpoint.tokenizer()?;
    let model = Hybrid::load(backend.clone(), &checkpoint)?;
    let prompt = text::encode(&tokenizer, &job.prompt, true)?;
    let stop: Vec<u32> = checkpoint.config.eos_token.into_iter().collect();
    // Pieces are decoded as a growing whole, since a character may take several tokens.
    let mut tokens = Vec::new();
    let mut sent = 0;
    generate::generate(&model, &prompt, job.max_tokens, &stop, job.sampling, monitor, |token| {
        tokens.push(token);
        let text = tokenizer.decode(&tokens, true).map_err(|error| Error::run(format!("a token cannot be decoded: {error}")))?;
        if !text.ends_with(char::REPLACEMENT_CHARACTER) {
            send(Event::Text { id, piece: text[sent..].to_owned(), tokens: tokens.len() });
            sent = text.len();
        }
        Ok(())
    })?;
    Ok(())
}

/// Refuses what compressed-tensors cannot hold and no wider format can stand in for.
fn check_portable(plan: &Plan) -> Result<()> {
    if let Some(slice) = plan.linears.keys().find(|name| name.contains(".in_proj.")) {
        return Err(Error::input(format!("`{slice}` has a format of its own, and a portable variant has one a module"))
            .hint("give the whole in_proj the wider format, or leave --portable out"));
    }
    Ok(())
}

fn quantize<B: Backend>(backend: &B, id: JobId, job: QuantizeJob, monitor: &Monitor, send: &impl Fn(Event)) -> Result<()> {
    let checkpoint = checkpoint::open_watched(&job.model, monitor)?;
    let mut plan = job.plan;
    if job.storage == StorageLayout::Portable && plan.embedding != Format::W16A16 {
        monitor.warn("portable: the embedding stays in the checkpoint's precision");
        plan.embedding = Format::W16A16;
    }
    if job.storage == StorageLayout::Portable
        && plan.blocks.iter().zip(checkpoint.layout.kinds()).any(|(format, kind)| kind == BlockKind::Ssm && format.weight_bits() < 8)
    {
        monitor.warn("portable: in_proj of SSM blocks takes 8 bits as a whole, since its dt rows need them");
    }
    if job.storage == StorageLayout::Portable {
        check_portable(&plan)?;
    }
    let mut steps = job.steps;
    if job.storage == StorageLayout::Portable && steps.transforms.iter().any(|transform| transform.is_online()) {
        monitor.warn("portable: online rotations are left out, since other engines do not compute them");
        steps.transforms.retain(|transform| !transform.is_online());
    }
    if job.storage == StorageLayout::Portable && (steps.activations != Activations::default() || steps.cache.is_quantized()) {
        monitor.warn("portable: activations get scales at run time, and SSM internals and caches stay in float");
        (steps.activations, steps.cache) = (Activations::default(), CacheFormats::default());
    }
    let mut folder = job.donors;
    if let Some(allocate) = &job.allocate {
        let (found, losses) = measure::find_plan(backend, &checkpoint, (&steps, &plan, &job.sample), allocate, monitor)?;
        plan = found;
        send(Event::Sensitivities { id, sensitivities: Box::new(losses) });
        folder = Some(donors_directory(&allocate.store));
    }
    let sample = Sample::load(&checkpoint, &job.sample)?;
    if !job.sample.allow_overlap && job.sample.source != "embedded" {
        overlap::check(&checkpoint, &job.sample.text()?, &sample, &job.evaluation)?;
    }
    let donors = match &folder {
        Some(_) if job.storage == StorageLayout::Portable => {
            return Err(Error::input("a portable variant cannot be put together from donors, whose slices have widths of their own")
                .hint("leave --portable out, or quantize the plan's session with `strata quantize --portable`"));
        }
        Some(folder) => Some(Donors::open(backend, &checkpoint, &steps, &sample, folder, monitor)?),
        None => None,
    };
    let mut request = QuantizeRequest {
        checkpoint: &checkpoint,
        recipe: job.recipe,
        steps,
        plan,
        sample,
        storage: job.storage,
        output: PathBuf::new(),
        force: job.force,
        host_memory: job.host_memory.or_else(memory::available_bytes).unwrap_or(u64::MAX),
        donors: donors.as_ref(),
    };
    request.output = match job.output {
        Some(output) => output,
        None => {
            let output = job.store.join(&quant::request_key(&checkpoint.sha256()?, &request)[..16]);
            if output.exists() && !job.force {
                let variant = Checkpoint::open(&output)?;
                variant.verify_files()?;
                if let Some(manifest) = variant.variant {
                    monitor.log(format!("{} is there already, verified and reused", output.display()));
                    for block in &manifest.blocks {
                        monitor.block(block.index, block.error, block.bytes);
                    }
                    send(Event::Quantized { id, name: job.name, path: output, manifest: Box::new(manifest), reused: true });
                    return Ok(());
                }
            }
            output
        }
    };
    let manifest = quant::quantize(backend, &request, monitor)?;
    send(Event::Quantized { id, name: job.name, path: request.output.clone(), manifest: Box::new(manifest), reused: false });
    Ok(())
}
