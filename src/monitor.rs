//! How a long job reports what it does and learns that it should stop.
//!
//! Jobs take a [`Monitor`] and never print. The engine turns reports into its channels; tests pass
//! [`Monitor::silent`].

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::error::{Error, Result};
use crate::format::Format;

/// One report of a running job. Counters are absolute, so a lost report costs nothing.
#[derive(Debug, Clone, PartialEq)]
pub enum Report {
    /// A stage began: its name and how many steps it has (blocks, batches, files).
    Stage { name: String, total: usize },
    /// `done` steps of the current stage are finished; `note` says what the last one was.
    Step { done: usize, note: String },
    /// A block was quantized: relative output error and the bytes its linears now take.
    Block { index: usize, error: f64, bytes: u64 },
    /// A unit's loss was measured: the model's divergence, in nats a token, with only this unit of block `index` quantized.
    Measured { index: usize, unit: String, format: Format, kld: f64 },
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
}

/// Where a job reports to, and whether it should go on.
pub struct Monitor<'a> {
    sink: Box<dyn Fn(Report) + Send + Sync + 'a>,
    cancel: CancelToken,
}

impl<'a> Monitor<'a> {
    /// A monitor that hands every report to `sink`.
    pub fn new(sink: impl Fn(Report) + Send + Sync + 'a, cancel: CancelToken) -> Self {
        Self { sink: Box::new(sink), cancel }
    }

    /// A monitor that drops reports and never cancels.
    pub fn silent() -> Self {
        Self::new(|_| {}, CancelToken::default())
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

    /// Reports a quantized block.
    pub fn block(&self, index: usize, error: f64, bytes: u64) {
        (self.sink)(Report::Block { index, error, bytes });
    }

    /// Reports a measured loss.
    pub fn measured(&self, index: usize, unit: &str, format: Format, kld: f64) {
        (self.sink)(Report::Measured { index, unit: unit.into(), format, kld });
    }

    /// Writes a log line.
    pub fn log(&self, line: impl Into<String>) {
        (self.sink)(Report::Log(line.into()));
    }

    /// Writes a log line of warning level.
    pub fn warn(&self, line: impl Into<String>) {
        (self.sink)(Report::Warning(line.into()));
    }

    /// An error when the job was cancelled.
    pub fn check(&self) -> Result<()> {
        if self.cancel.is_cancelled() { Err(Error::cancelled()) } else { Ok(()) }
    }
}
