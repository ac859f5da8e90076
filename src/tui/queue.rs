//! [`Queue`]: the runs that were asked for, in order, and what the running one reports.
//!
//! A [`Run`] quantizes variants and then evaluates them together; its parts are [`Step`]s. The engine gets one job at a
//! time, so that what waits can be dropped and moved, and an evaluation can name the variants that the steps before it
//! made. [`Queue::next`] says what to submit; [`Queue::take_in`] follows the engine's events; [`Queue::bookkeeping`]
//! says what is to be written down about the runs.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::measurements::{Measurements, Origin};
use super::message::Effect;
use crate::checkpoint::StorageLayout;
use crate::engine::{AllocateJob, Event, Job, JobId, ObserveJob, PlaygroundJob, Progress, QuantizeJob, SensitivityJob};
use crate::error::{ErrorKind, Result};
use crate::eval::ModelToEvaluate;
use crate::monitor::Report;
use crate::quant::{AllocateSpec, Override};
use crate::session::runs::Ending;
use crate::session::{Session, VariantSpec};

/// Log lines kept.
const LOG_LINES: usize = 500;

/// A variant as it was when its run was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    /// As a session file has it.
    pub spec: VariantSpec,
    /// The recipe's own name.
    pub recipe: String,
    pub origin: Origin,
}

/// What a run is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Measure what the parts of the model lose under the targets' steps.
    Measure,
    Quantize,
    /// Quantize, then evaluate.
    Evaluate,
    /// Something to look at. It makes nothing and is not worth a folder on disk.
    Look,
}

/// What a step does.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    /// Measure what the parts of the model lose.
    Measure(Box<SensitivityJob>),
    /// Quantize the run's target of this number.
    Quantize(usize),
    /// Evaluate the base and the targets.
    Evaluate,
    /// Observe the inputs of the model's linears.
    Observe,
    Playground(PlaygroundJob),
}

/// How far a step is.
#[derive(Debug, Clone, PartialEq)]
pub enum Status {
    Waiting,
    /// Without an id until the engine has answered.
    Running(Option<JobId>),
    Done,
    Failed {
        message: String,
        hint: Option<String>,
    },
    Cancelled,
    /// Not done because a step before it gave nothing to work on.
    Skipped,
}

/// A part of a run.
#[derive(Debug, Clone, PartialEq)]
pub struct Step {
    pub title: String,
    pub work: Work,
    pub status: Status,
    /// The same variant was on disk already.
    pub reused: bool,
    pub began: Duration,
    pub ended: Duration,
}

impl Step {
    fn new(title: String, work: Work) -> Self {
        Self { title, work, status: Status::Waiting, reused: false, began: Duration::ZERO, ended: Duration::ZERO }
    }
}

/// Whether a run's folder was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Folder {
    Wanted,
    Asked,
    Closed,
}

/// A run with its steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Stays the same while others come, move and go.
    pub key: u64,
    pub title: String,
    pub purpose: Purpose,
    /// What is replayed: the session as it was, with the targets as its variants.
    pub session: Session,
    pub targets: Vec<Target>,
    pub steps: Vec<Step>,
    /// Its name among all runs on disk, once it is there.
    pub id: Option<String>,
    folder: Folder,
}

impl Run {
    /// The step that says how the run stands: the running one, else the first that waits, else the first that did not
    /// end well, else the last.
    pub fn status(&self) -> &Status {
        let first = |test: fn(&Status) -> bool| self.steps.iter().map(|step| &step.status).find(|status| test(status));
        first(|status| matches!(status, Status::Running(_)))
            .or_else(|| first(|status| *status == Status::Waiting))
            .or_else(|| first(|status| matches!(status, Status::Failed { .. })))
            .or_else(|| first(|status| *status == Status::Cancelled))
            .or_else(|| first(|status| *status == Status::Done))
            .unwrap_or(&Status::Skipped)
    }

    /// Whether nothing of it runs or waits.
    pub fn is_over(&self) -> bool {
        !matches!(self.status(), Status::Running(_) | Status::Waiting)
    }

    /// Whether another process can go on with it.
    pub fn can_be_handed_over(&self) -> bool {
        self.purpose != Purpose::Look
    }

    /// Whether it has begun and is not over.
    pub fn is_running(&self) -> bool {
        matches!(self.status(), Status::Running(_))
    }

    /// Whether something of it is yet to be written down.
    fn is_on_record(&self) -> bool {
        self.purpose == Purpose::Look || self.folder == Folder::Closed
    }

    fn ending(&self) -> Ending {
        match self.status() {
            Status::Failed { message, hint } => Ending::Failed { message: message.clone(), hint: hint.clone() },
            Status::Cancelled => Ending::Cancelled,
            _ => Ending::Done,
        }
    }
}

/// How loud a log line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Level {
    #[default]
    Info,
    Warning,
    Error,
}

/// A line of the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogLine {
    pub clock: Duration,
    pub level: Level,
    pub text: String,
}

/// The runs, the progress of the job at hand, and the log.
#[derive(Debug, Default)]
pub struct Queue {
    /// The folder that variants are made in.
    pub store: PathBuf,
    /// The folder that donors and losses are kept in.
    pub data: PathBuf,
    /// The folder where evaluations note what they have scored.
    pub journal: Option<PathBuf>,
    /// The folder where what the base says of a text is kept.
    pub references: Option<PathBuf>,
    /// Memory that a job may take.
    pub host_memory: Option<u64>,
    pub runs: Vec<Run>,
    /// Place of the run that keys are about.
    pub cursor: usize,
    /// The running job's, or the last one's.
    pub progress: Progress,
    /// The models of the evaluation that runs.
    pub models: Vec<String>,
    /// The user wants everything to stand still.
    pub paused: bool,
    /// Nothing new is started: another process will go on with what is here.
    pub held: bool,
    pub log: VecDeque<LogLine>,
    /// Lines below this are not shown.
    pub least: Level,
    /// Log lines scrolled back.
    pub scroll: usize,
    next_key: u64,
}

impl Queue {
    /// Adds a run about `targets`.
    pub fn push(&mut self, session: Session, targets: Vec<Target>, purpose: Purpose) {
        let names = targets.iter().map(|target| target.spec.name.as_str()).collect::<Vec<_>>().join(", ");
        let steps = if purpose == Purpose::Measure {
            let title = |target: &Target| format!("measure what the parts lose by {}", target.recipe);
            let measure = |target: &Target| Step::new(title(target), Work::Measure(Box::new(self.sensitivity_job(&session, target))));
            targets.iter().map(measure).collect()
        } else {
            let quantize = |(index, target): (usize, &Target)| Step::new(format!("quantize {}", target.spec.name), Work::Quantize(index));
            let evaluate = (purpose == Purpose::Evaluate).then(|| Step::new(format!("evaluate base, {names}"), Work::Evaluate));
            targets.iter().enumerate().map(quantize).chain(evaluate).collect()
        };
        let title = if purpose == Purpose::Measure { format!("losses by {names}") } else { names };
        let session = Session { variants: targets.iter().map(|target| target.spec.clone()).collect(), ..session };
        self.add(title, purpose, session, targets, steps);
        self.cursor = self.runs.len() - 1;
    }

    /// Adds one job that shows something.
    pub fn push_work(&mut self, session: &Session, title: &str, work: Work) {
        self.add(title.into(), Purpose::Look, session.clone(), Vec::new(), vec![Step::new(title.into(), work)]);
    }

    fn add(&mut self, title: String, purpose: Purpose, session: Session, targets: Vec<Target>, steps: Vec<Step>) {
        self.next_key += 1;
        self.runs.push(Run { key: self.next_key, title, purpose, session, targets, steps, id: None, folder: Folder::Wanted });
    }

    /// What is to be measured for a target: the same that a replay of the run measures.
    fn sensitivity_job(&self, session: &Session, target: &Target) -> SensitivityJob {
        let Origin { steps, plan, allocate } = &target.origin;
        let allocate = allocate_job(allocate.as_ref(), &self.data);
        let (model, sample) = (session.model.name(), session.calibration.clone());
        SensitivityJob::new(model, steps.clone(), plan, sample, allocate.as_ref(), self.data.clone())
    }

    /// The run whose job runs.
    pub fn running_run(&self) -> Option<&Run> {
        self.runs.iter().find(|run| run.is_running())
    }

    /// The step that runs.
    pub fn running(&self) -> Option<&Step> {
        self.running_run()?.steps.iter().find(|step| matches!(step.status, Status::Running(_)))
    }

    /// The variant that is being quantized.
    pub fn quantizing(&self) -> Option<&Target> {
        let (run, step) = self.running_run().zip(self.running())?;
        if let Work::Quantize(index) = &step.work { run.targets.get(*index) } else { None }
    }

    fn running_mut(&mut self) -> Option<&mut Step> {
        self.runs.iter_mut().flat_map(|run| &mut run.steps).find(|step| matches!(step.status, Status::Running(_)))
    }

    /// Steps that wait.
    pub fn waiting(&self) -> usize {
        self.runs.iter().flat_map(|run| &run.steps).filter(|step| step.status == Status::Waiting).count()
    }

    /// Whether something runs or waits.
    pub fn is_busy(&self) -> bool {
        self.runs.iter().any(|run| !run.is_over())
    }

    /// Whether what the parts lose under the steps of a variant is being measured, or will be.
    pub fn measures(&self, variant: &str) -> bool {
        let own = |run: &&Run| run.purpose == Purpose::Measure && run.targets.iter().any(|target| target.spec.name == variant);
        self.runs.iter().filter(own).any(|run| !run.is_over())
    }

    /// The run under the cursor.
    pub fn selected(&self) -> Option<&Run> {
        self.runs.get(self.cursor)
    }

    /// Starts the next job when none runs: what the engine shall do.
    pub fn next(&mut self, measurements: &Measurements, clock: Duration) -> Option<Job> {
        if self.paused || self.held {
            return None;
        }
        while self.running().is_none() {
            // A run that has begun comes before others that were moved in front of it.
            let begun = |run: &Run| !run.is_over() && run.steps.iter().any(|step| step.status != Status::Waiting);
            let at = self.runs.iter().position(begun).or_else(|| self.runs.iter().position(|run| !run.is_over()))?;
            let run = &mut self.runs[at];
            let index = run.steps.iter().position(|step| step.status == Status::Waiting)?;
            let mut job = job(run, &run.steps[index].work, measurements, &self.store, &self.data);
            match &mut job {
                Ok(Some(Job::Evaluate(request))) => {
                    (request.journal, request.references) = (self.journal.clone(), self.references.clone());
                    request.host_memory = self.host_memory;
                }
                Ok(Some(Job::Quantize(job))) => job.host_memory = self.host_memory,
                _ => {}
            }
            let step = &mut run.steps[index];
            match job {
                Ok(Some(job)) => {
                    step.status = Status::Running(None);
                    step.began = clock;
                    self.models = if let Job::Evaluate(request) = &job {
                        request.reference.iter().chain(&request.models).map(|model| model.name.clone()).collect()
                    } else {
                        Vec::new()
                    };
                    let errors = std::mem::take(&mut self.progress.errors);
                    self.progress = Progress::begin(step.title.clone(), clock);
                    if matches!(job, Job::Evaluate(_)) {
                        self.progress.errors = errors;
                    }
                    return Some(job);
                }
                Ok(None) => step.status = Status::Skipped,
                Err(error) => {
                    let message = error.message.clone();
                    step.status = Status::Failed { message: error.message, hint: error.hint };
                    self.line(clock, Level::Error, message);
                }
            }
        }
        None
    }

    /// The engine's answer to a submitted job.
    pub fn submitted(&mut self, answer: Result<JobId>, clock: Duration) {
        let Some(step) = self.running_mut() else { return };
        match answer {
            Ok(id) => step.status = Status::Running(Some(id)),
            Err(error) => {
                step.status = Status::Failed { message: error.message.clone(), hint: error.hint };
                self.line(clock, Level::Error, error.message);
            }
        }
    }

    /// Drops what waits of the run `key`; returns the id of its job that runs, which the engine is to cancel.
    pub fn cancel(&mut self, key: u64) -> Option<JobId> {
        let run = self.runs.iter_mut().find(|run| run.key == key)?;
        let mut running = None;
        for step in &mut run.steps {
            match step.status {
                Status::Waiting => step.status = Status::Cancelled,
                Status::Running(id) => running = id,
                _ => {}
            }
        }
        running
    }

    /// Puts the run under the cursor, which is over, at the end again: what it has finished is found on disk.
    pub fn retry(&mut self) {
        if self.selected().is_some_and(Run::is_over) {
            let run = self.runs.remove(self.cursor);
            let steps = run.steps.into_iter().map(|step| Step::new(step.title, step.work)).collect();
            self.add(run.title, run.purpose, run.session, run.targets, steps);
            self.cursor = self.runs.len() - 1;
        }
    }

    /// Moves the run under the cursor one place; what has begun keeps its place at the front.
    pub fn shift(&mut self, down: bool) {
        let other = if down { self.cursor + 1 } else { self.cursor.wrapping_sub(1) };
        if other < self.runs.len() {
            self.runs.swap(self.cursor, other);
            self.cursor = other;
        }
    }

    /// Forgets the runs that are over.
    pub fn clear_finished(&mut self) {
        self.runs.retain(|run| !run.is_over() || !run.is_on_record());
        self.cursor = self.cursor.min(self.runs.len().saturating_sub(1));
    }

    /// The name that a run got on disk.
    pub fn named(&mut self, key: u64, id: Option<String>) {
        if let Some(run) = self.runs.iter_mut().find(|run| run.key == key) {
            run.id = id;
        }
    }

    /// What is to be written down since this was asked last: runs that are new, and runs that are over.
    pub fn bookkeeping(&mut self) -> Vec<Effect> {
        let mut effects = Vec::new();
        for run in &mut self.runs {
            if run.is_on_record() {
                continue;
            }
            if run.folder == Folder::Wanted && !run.is_over() {
                run.folder = Folder::Asked;
                let (title, session) = (run.title.clone(), Box::new(run.session.clone()));
                effects.push(Effect::OpenRun { key: run.key, title, session, purpose: run.purpose });
            }
            if run.is_over() {
                run.folder = Folder::Closed;
                effects.push(Effect::EndRun { key: run.key, ending: run.ending() });
            }
        }
        effects
    }

    /// Gives up everything that is not over, at once: the process is about to end.
    pub fn abandon(&mut self) -> Vec<Effect> {
        for step in self.runs.iter_mut().flat_map(|run| &mut run.steps) {
            if matches!(step.status, Status::Waiting | Status::Running(_)) {
                step.status = Status::Cancelled;
            }
        }
        self.bookkeeping()
    }

    /// Takes the runs back that could not be handed over: they get folders anew.
    pub fn take_back(&mut self) {
        self.held = false;
        for run in self.runs.iter_mut().filter(|run| !run.is_over() && run.can_be_handed_over()) {
            (run.folder, run.id) = (Folder::Wanted, None);
        }
    }

    /// Follows an event of the engine; results go to `measurements`.
    pub fn take_in(&mut self, event: Event, measurements: &mut Measurements, clock: Duration) {
        // The errors of the variant stay while it is evaluated.
        let evaluates = matches!(event, Event::Started { .. }) && !self.models.is_empty();
        let errors = if evaluates { std::mem::take(&mut self.progress.errors) } else { Vec::new() };
        self.progress.event(&event, clock);
        if evaluates {
            self.progress.errors = errors;
        }
        match event {
            Event::Started { title, .. } => self.line(clock, Level::Info, format!("{title}: started")),
            Event::Report { report, .. } => match report {
                Report::Log(line) => self.line(clock, Level::Info, line),
                Report::DeviceMemory(memory) => self.line(clock, Level::Info, memory.to_string()),
                Report::Warning(line) => self.line(clock, Level::Warning, line),
                Report::Paused(paused) => self.line(clock, Level::Info, if paused { "paused" } else { "going on" }.into()),
                _ => {}
            },
            // The workbench submits no job that generates text or studies; what is observed, said and lost is none of the
            // queue's.
            Event::Text { .. } | Event::Sensitivities { .. } | Event::Study { .. } | Event::Observed { .. } | Event::Spoken { .. } => {}
            Event::Quantized { path, manifest, reused, .. } => {
                let Some(target) = self.quantizing() else { return };
                measurements.quantized(&target.origin, path, &manifest);
                if let Some(step) = self.running_mut() {
                    step.reused = reused;
                }
            }
            Event::Evaluated { evaluated, .. } => {
                let Some(run) = self.running_run() else { return };
                match run.targets.iter().find(|target| target.spec.name == evaluated.result.variant) {
                    Some(target) => measurements.evaluated(&target.origin, *evaluated),
                    None => measurements.base_evaluated(*evaluated),
                }
            }
            Event::Finished { outcome, .. } => self.finished(outcome, clock),
        }
    }

    fn finished(&mut self, outcome: Result<()>, clock: Duration) {
        let held = self.held && self.running_run().is_some_and(Run::can_be_handed_over);
        let Some(step) = self.running_mut() else { return };
        step.ended = clock;
        let title = step.title.clone();
        let (level, line) = match outcome {
            Ok(()) => {
                step.status = Status::Done;
                (Level::Info, format!("{title}: done"))
            }
            Err(error) if error.kind == ErrorKind::Cancelled && held => {
                step.status = Status::Waiting;
                (Level::Info, format!("{title}: stopped, to go on in another process"))
            }
            Err(error) if error.kind == ErrorKind::Cancelled => {
                step.status = Status::Cancelled;
                (Level::Warning, format!("{title}: cancelled"))
            }
            Err(error) => {
                let line = format!("{title}: {}", error.message);
                step.status = Status::Failed { message: error.message, hint: error.hint };
                (Level::Error, line)
            }
        };
        self.line(clock, level, line);
    }

    fn line(&mut self, clock: Duration, level: Level, text: String) {
        self.log.push_back(LogLine { clock, level, text });
        if self.log.len() > LOG_LINES {
            self.log.pop_front();
        }
        if self.scroll > 0 {
            // What the reader looks at stays where it is.
            self.scroll = (self.scroll + 1).min(self.log.len());
        }
    }
}

fn allocate_job(allocate: Option<&(AllocateSpec, Vec<Override>)>, store: &Path) -> Option<AllocateJob> {
    allocate.map(|(spec, pins)| AllocateJob { spec: spec.clone(), pins: pins.clone(), store: store.to_owned() })
}

/// The engine's job; nothing when there is nothing to evaluate.
fn job(run: &Run, work: &Work, measurements: &Measurements, store: &Path, data: &Path) -> Result<Option<Job>> {
    let session = &run.session;
    match work {
        Work::Measure(job) => Ok(Some(Job::Sensitivity(job.clone()))),
        Work::Quantize(index) => {
            let target = &run.targets[*index];
            Ok(Some(Job::Quantize(Box::new(QuantizeJob {
                model: session.model.name(),
                name: target.spec.name.clone(),
                recipe: target.recipe.clone(),
                steps: target.origin.steps.clone(),
                plan: target.origin.plan.clone(),
                sample: session.calibration.clone(),
                evaluation: session.evaluate.files(),
                storage: StorageLayout::Native,
                output: None,
                store: store.to_owned(),
                force: false,
                host_memory: None,
                donors: None,
                allocate: allocate_job(target.origin.allocate.as_ref(), data),
            }))))
        }
        Work::Evaluate => {
            let model = |target: &Target| {
                let measured = measurements.find(&target.origin)?;
                Some(ModelToEvaluate { name: target.spec.name.clone(), path: measured.path.display().to_string() })
            };
            let mut request = session.evaluate.request()?;
            request.reference = Some(ModelToEvaluate { name: "base".into(), path: session.model.name() });
            request.models = run.targets.iter().filter_map(model).collect();
            Ok((!request.models.is_empty()).then(|| Job::Evaluate(Box::new(request))))
        }
        Work::Observe => Ok(Some(Job::Observe(Box::new(ObserveJob { model: session.model.name(), sample: session.calibration.clone() })))),
        Work::Playground(job) => Ok(Some(Job::Playground(Box::new(job.clone())))),
    }
}
