//! [`Queue`]: the jobs that were asked for, in order, and what the running one reports.
//!
//! The engine gets one job at a time, so that what waits can be dropped and an evaluation can name the variants that
//! the jobs before it made. [`Queue::next`] says what to submit; [`Queue::take_in`] follows the engine's events.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::measurements::Measurements;
use crate::checkpoint::StorageLayout;
use crate::engine::{AllocateJob, Event, Job, JobId, ObserveJob, PlaygroundJob, QuantizeJob};
use crate::error::{ErrorKind, Result};
use crate::eval::ModelToEvaluate;
use crate::format::Plan;
use crate::monitor::Report;
use crate::quant::Steps;
use crate::session::Session;

/// Log lines kept.
const LOG_LINES: usize = 500;

/// A variant as it was when its job was asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct Target {
    pub name: String,
    pub recipe: String,
    pub steps: Steps,
    pub plan: Plan,
    /// How to find the plan that is made, where the recipe leaves it to measurement.
    pub allocate: Option<AllocateJob>,
}

/// What a queued job does.
#[derive(Debug, Clone, PartialEq)]
pub enum Work {
    Quantize(Target),
    Evaluate(Vec<Target>),
    /// Observe the inputs of the model's linears.
    Observe,
    Playground(PlaygroundJob),
}

/// How far a queued job is.
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
    /// Not done because a job before it gave nothing to work on.
    Skipped,
}

/// A job with its state.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    pub title: String,
    pub work: Work,
    pub status: Status,
    /// The same variant was on disk already.
    pub reused: bool,
    pub began: Duration,
    pub ended: Duration,
}

/// How loud a log line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Level {
    Info,
    Warning,
    Error,
}

/// What the running job is at.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stage {
    pub name: String,
    pub done: usize,
    pub total: usize,
    pub note: String,
    pub began: Duration,
}

/// The queue, the running stage and the log.
#[derive(Debug, Default)]
pub struct Queue {
    /// The folder that variants are made in.
    pub store: PathBuf,
    pub items: Vec<Item>,
    pub stage: Stage,
    /// Errors of the blocks of the variant that is, or was last, quantized.
    pub errors: Vec<f64>,
    /// The models of the evaluation that runs, and how many of them are evaluated.
    pub models: Vec<String>,
    pub evaluated: usize,
    pub log: VecDeque<(Level, String)>,
    /// Log lines scrolled back.
    pub scroll: usize,
}

impl Queue {
    /// Adds jobs: quantize each target, then evaluate them together.
    pub fn push(&mut self, targets: Vec<Target>) {
        let names = targets.iter().map(|target| target.name.as_str()).collect::<Vec<_>>().join(", ");
        let item = |title, work| Item { title, work, status: Status::Waiting, reused: false, began: Duration::ZERO, ended: Duration::ZERO };
        for target in &targets {
            self.items.push(item(format!("quantize {}", target.name), Work::Quantize(target.clone())));
        }
        self.items.push(item(format!("evaluate base, {names}"), Work::Evaluate(targets)));
    }

    /// Adds one job.
    pub fn push_work(&mut self, title: &str, work: Work) {
        let (began, ended) = (Duration::ZERO, Duration::ZERO);
        self.items.push(Item { title: title.into(), work, status: Status::Waiting, reused: false, began, ended });
    }

    /// The job that runs.
    pub fn running(&self) -> Option<&Item> {
        self.items.iter().find(|item| matches!(item.status, Status::Running(_)))
    }

    fn running_mut(&mut self) -> Option<&mut Item> {
        self.items.iter_mut().find(|item| matches!(item.status, Status::Running(_)))
    }

    /// Jobs that wait.
    pub fn waiting(&self) -> usize {
        self.items.iter().filter(|item| item.status == Status::Waiting).count()
    }

    /// Starts the next job when none runs: what the engine shall do.
    pub fn next(&mut self, session: &Session, measurements: &Measurements, clock: Duration) -> Option<Job> {
        while self.running().is_none() {
            let item = self.items.iter_mut().find(|item| item.status == Status::Waiting)?;
            match job(&item.work, session, measurements, &self.store) {
                Ok(Some(job)) => {
                    item.status = Status::Running(None);
                    item.began = clock;
                    if matches!(item.work, Work::Quantize(_)) {
                        self.errors.clear();
                    }
                    self.models = if let Job::Evaluate(request) = &job {
                        request.reference.iter().chain(&request.models).map(|model| model.name.clone()).collect()
                    } else {
                        Vec::new()
                    };
                    self.evaluated = 0;
                    self.stage = Stage { name: "starting".into(), began: clock, ..Stage::default() };
                    return Some(job);
                }
                Ok(None) => item.status = Status::Skipped,
                Err(error) => {
                    let message = error.message.clone();
                    item.status = Status::Failed { message: error.message, hint: error.hint };
                    self.line(Level::Error, message);
                }
            }
        }
        None
    }

    /// The engine's answer to a submitted job.
    pub fn submitted(&mut self, answer: Result<JobId>) {
        let Some(item) = self.running_mut() else { return };
        match answer {
            Ok(id) => item.status = Status::Running(Some(id)),
            Err(error) => {
                item.status = Status::Failed { message: error.message.clone(), hint: error.hint };
                self.line(Level::Error, error.message);
            }
        }
    }

    /// Drops the jobs that wait; returns the id of the one that runs, which the engine is to cancel.
    pub fn cancel(&mut self) -> Option<JobId> {
        for item in &mut self.items {
            if item.status == Status::Waiting {
                item.status = Status::Cancelled;
            }
        }
        match self.running()?.status {
            Status::Running(id) => id,
            _ => None,
        }
    }

    /// Forgets the jobs that are over.
    pub fn clear_finished(&mut self) {
        self.items.retain(|item| matches!(item.status, Status::Waiting | Status::Running(_)));
    }

    /// Follows an event of the engine; results go to `measurements`.
    pub fn take_in(&mut self, event: Event, measurements: &mut Measurements, clock: Duration) {
        match event {
            Event::Started { title, .. } => self.line(Level::Info, format!("{title}: started")),
            Event::Report { report, .. } => self.report(report, clock),
            // The workbench submits no job that generates text; what is observed and said is none of the queue's.
            Event::Text { .. } | Event::Sensitivities { .. } | Event::Study { .. } | Event::Observed { .. } | Event::Spoken { .. } => {}
            Event::Quantized { path, manifest, reused, .. } => {
                let Some(Work::Quantize(target)) = self.running().map(|item| item.work.clone()) else { return };
                measurements.quantized(&target.steps, target.plan, path, &manifest);
                if let Some(item) = self.running_mut() {
                    item.reused = reused;
                }
            }
            Event::Evaluated { evaluated, .. } => {
                let Some(Work::Evaluate(targets)) = self.running().map(|item| item.work.clone()) else { return };
                self.evaluated += 1;
                match targets.iter().find(|target| target.name == evaluated.result.variant) {
                    Some(target) => measurements.evaluated(&target.steps, &target.plan, *evaluated),
                    None => measurements.base_evaluated(*evaluated),
                }
            }
            Event::Finished { outcome, .. } => {
                let Some(item) = self.running_mut() else { return };
                item.ended = clock;
                let title = item.title.clone();
                let (level, line) = match outcome {
                    Ok(()) => {
                        item.status = Status::Done;
                        (Level::Info, format!("{title}: done"))
                    }
                    Err(error) if error.kind == ErrorKind::Cancelled => {
                        item.status = Status::Cancelled;
                        (Level::Warning, format!("{title}: cancelled"))
                    }
                    Err(error) => {
                        let line = format!("{title}: {}", error.message);
                        item.status = Status::Failed { message: error.message, hint: error.hint };
                        (Level::Error, line)
                    }
                };
                self.stage = Stage::default();
                self.line(level, line);
            }
        }
    }

    fn report(&mut self, report: Report, clock: Duration) {
        match report {
            Report::Stage { name, total } => self.stage = Stage { name, total, began: clock, ..Stage::default() },
            Report::Step { done, note } => {
                self.stage.done = done;
                self.stage.note = note;
            }
            Report::Block { index, error, .. } => {
                if self.errors.len() <= index {
                    self.errors.resize(index + 1, 0.0);
                }
                self.errors[index] = error;
            }
            Report::Plan(_) | Report::Found { .. } | Report::Measured { .. } | Report::Divergence { .. } | Report::Paused(_) => {}
            Report::Log(line) => self.line(Level::Info, line),
            Report::Warning(line) => self.line(Level::Warning, line),
        }
    }

    fn line(&mut self, level: Level, line: String) {
        self.log.push_back((level, line));
        if self.log.len() > LOG_LINES {
            self.log.pop_front();
        }
        if self.scroll > 0 {
            // What the reader looks at stays where it is.
            self.scroll = (self.scroll + 1).min(self.log.len());
        }
    }

    /// Time the stage will take yet, from its mean rate so far.
    pub fn remaining(&self, clock: Duration) -> Option<Duration> {
        let stage = &self.stage;
        (stage.done > 0 && stage.done <= stage.total)
            .then(|| clock.saturating_sub(stage.began).mul_f64((stage.total - stage.done) as f64 / stage.done as f64))
    }
}

/// The engine's job; nothing when there is nothing to evaluate.
fn job(work: &Work, session: &Session, measurements: &Measurements, store: &Path) -> Result<Option<Job>> {
    match work {
        Work::Quantize(target) => Ok(Some(Job::Quantize(Box::new(QuantizeJob {
            model: session.model.name(),
            name: target.name.clone(),
            recipe: target.recipe.clone(),
            steps: target.steps.clone(),
            plan: target.plan.clone(),
            sample: session.calibration.clone(),
            storage: StorageLayout::Native,
            output: None,
            store: store.to_owned(),
            force: false,
            donors: None,
            allocate: target.allocate.clone(),
        })))),
        Work::Evaluate(targets) => {
            let model = |target: &Target| {
                let measured = measurements.find(&target.steps, &target.plan)?;
                Some(ModelToEvaluate { name: target.name.clone(), path: measured.path.display().to_string() })
            };
            let mut request = session.evaluate.request()?;
            request.reference = Some(ModelToEvaluate { name: "base".into(), path: session.model.name() });
            request.models = targets.iter().filter_map(model).collect();
            Ok((!request.models.is_empty()).then(|| Job::Evaluate(Box::new(request))))
        }
        Work::Observe => Ok(Some(Job::Observe(Box::new(ObserveJob { model: session.model.name(), sample: session.calibration.clone() })))),
        Work::Playground(job) => Ok(Some(Job::Playground(Box::new(job.clone())))),
    }
}
