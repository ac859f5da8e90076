//! How a long job reports what it does and learns that it should stop.
//!
//! Jobs take a [`Monitor`] and never print. The engine turns reports into its channels; tests pass
//! [`Monitor::silent`].

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::format::Format;

/// What a job was predicted to take of the memory of a device that has its own, and the most that it took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct DeviceMemory {
    pub predicted_bytes: u64,
    pub peak_bytes: u64,
    /// Where the sample's residual streams waited: `device`, `host` or `scratch`.
    pub streams: &'static str,
}

impl fmt::Display for DeviceMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let (found, predicted) = (mb(self.peak_bytes), mb(self.predicted_bytes));
        write!(f, "the device held at most {found:.1} MB, {predicted:.1} MB were predicted; the sample's streams: {}", self.streams)
    }
}

/// One report of a running job. Counters are absolute, so a lost report costs nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// The stages that the job will go through, in order, and the work of each in a unit of the job's own. Stages that
    /// are not named here (a download) count nothing.
    Plan(Vec<(String, f64)>),
    /// A stage began: its name and how many steps it has (blocks, batches, files).
    Stage { name: String, total: usize },
    /// `done` steps of the current stage are finished; `note` says what the last one was.
    Step { done: usize, note: String },
    /// `done` steps of the current stage were there already: nothing can be learned from them about speed.
    Found { done: usize },
    /// A block was quantized: relative output error and the bytes its linears now take.
    Block { index: usize, error: f64, bytes: u64 },
    /// A unit's loss was measured: the model's divergence, in nats a token, with only this unit of block `index` quantized.
    Measured { index: usize, unit: String, format: Format, kld: f64 },
    /// Mean divergence from the reference over the text windows so far, in nats a token.
    Divergence { windows: usize, mean: f64 },
    /// The job is done with a device that has memory of its own.
    DeviceMemory(DeviceMemory),
    /// The job stands still, or goes on again.
    Paused(bool),
    /// A line for the log.
    Log(String),
    /// A line for the log that the user should not miss.
    Warning(String),
}

/// Cancels the jobs that hold a clone of it.
#[derive(Debug, Clone, Default)]
pub struct CancelToken(Arc<AtomicBool>);

impl CancelToken {
    /// Asks the job to stop at the next block or batch.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Whether [`CancelToken::cancel`] was called.
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// An error when the job was cancelled.
    pub fn check(&self) -> Result<()> {
        if self.is_cancelled() { Err(Error::cancelled()) } else { Ok(()) }
    }
}

/// How often a job that is paused looks whether it was cancelled.
const PAUSE_CHECK: Duration = Duration::from_millis(50);

/// Makes the jobs that hold a clone of it wait at their next step.
#[derive(Debug, Clone, Default)]
pub struct PauseToken(Arc<(Mutex<bool>, Condvar)>);

impl PauseToken {
    /// Pauses, or lets go on.
    pub fn set(&self, paused: bool) {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) = paused;
        self.0.1.notify_all();
    }

    fn is_paused(&self) -> bool {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until nothing pauses any more, or the job is cancelled.
    fn wait(&self, cancel: &CancelToken) {
        let mut paused = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        while *paused && !cancel.is_cancelled() {
            paused = self.0.1.wait_timeout(paused, PAUSE_CHECK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// Where a job reports to, and whether it should go on.
pub struct Monitor<'a> {
    sink: Box<dyn Fn(Report) + Send + Sync + 'a>,
    cancel: CancelToken,
    pause: PauseToken,
}

impl<'a> Monitor<'a> {
    /// A monitor that hands every report to `sink`.
    pub fn new(sink: impl Fn(Report) + Send + Sync + 'a, cancel: CancelToken) -> Self {
        Self { sink: Box::new(sink), cancel, pause: PauseToken::default() }
    }

    /// The same monitor, whose job waits at its next step while `pause` says so.
    #[must_use]
    pub fn pausable(self, pause: PauseToken) -> Self {
        Self { pause, ..self }
    }

    /// Hands on what a job inside this one reports.
    pub fn forward(&self, report: Report) {
        (self.sink)(report);
    }

    /// A monitor that drops reports and never cancels.
    pub fn silent() -> Self {
        Self::new(|_| {}, CancelToken::default())
    }

    /// Says ahead which stages come, and the work of each.
    pub fn plan(&self, stages: impl IntoIterator<Item = (impl Into<String>, f64)>) {
        (self.sink)(Report::Plan(stages.into_iter().map(|(name, work)| (name.into(), work)).collect()));
    }

    /// Begins a stage of `total` steps.
    pub fn stage(&self, name: &str, total: usize) {
        (self.sink)(Report::Stage { name: name.into(), total });
    }

    /// Reports a finished step; an error when the job was cancelled.
    pub fn step(&self, done: usize, note: impl Into<String>) -> Result<()> {
        (self.sink)(Report::Step { done, note: note.into() });
        self.check()
    }

    /// Reports steps that were finished by an earlier run.
    pub fn found(&self, done: usize) {
        (self.sink)(Report::Found { done });
    }

    /// Reports the divergence over the text so far.
    pub fn divergence(&self, windows: usize, mean: f64) {
        (self.sink)(Report::Divergence { windows, mean });
    }

    /// Reports a quantized block.
    pub fn block(&self, index: usize, error: f64, bytes: u64) {
        (self.sink)(Report::Block { index, error, bytes });
    }

    /// Reports a measured loss.
    pub fn measured(&self, index: usize, unit: &str, format: Format, kld: f64) {
        (self.sink)(Report::Measured { index, unit: unit.into(), format, kld });
    }

    /// Reports what the job took of a device's memory.
    pub fn device_memory(&self, memory: DeviceMemory) {
        (self.sink)(Report::DeviceMemory(memory));
    }

    /// Writes a log line.
    pub fn log(&self, line: impl Into<String>) {
        (self.sink)(Report::Log(line.into()));
    }

    /// Writes a log line of warning level.
    pub fn warn(&self, line: impl Into<String>) {
        (self.sink)(Report::Warning(line.into()));
    }

    /// Waits while the job is paused; an error when it was cancelled.
    pub fn check(&self) -> Result<()> {
        if self.pause.is_paused() && !self.cancel.is_cancelled() {
            (self.sink)(Report::Paused(true));
            self.pause.wait(&self.cancel);
            (self.sink)(Report::Paused(false));
        }
        self.cancel.check()
    }

    /// What cancels the job, for what should stop in the middle of a step.
    pub fn cancel_token(&self) -> CancelToken {
        self.cancel.clone()
    }
}
