//! [`Progress`]: the latest state of the running job, for watching.

use std::time::{Duration, Instant};

use super::JobId;
use crate::eval::memory;
use crate::monitor::Report;

/// The running job's stage and how far it is. The default is "nothing runs".
#[derive(Debug, Clone, Default)]
pub struct Progress {
    pub job: Option<JobId>,
    pub title: String,
    pub stage: String,
    pub done: usize,
    pub total: usize,
    pub note: String,
    /// When the job and its current stage began.
    pub began: Option<(Instant, Instant)>,
    /// Resident memory of the process at the last report.
    pub resident_bytes: u64,
}

impl Progress {
    pub(super) fn begin(id: JobId, title: String) -> Self {
        let now = Instant::now();
        Self { job: Some(id), title, began: Some((now, now)), ..Self::default() }
    }

    /// Takes a report in.
    pub(super) fn update(&mut self, report: &Report) {
        match report {
            Report::Stage { name, total } => {
                self.stage.clone_from(name);
                self.total = *total;
                self.done = 0;
                self.note.clear();
                if let Some((_, stage)) = &mut self.began {
                    *stage = Instant::now();
                }
            }
            Report::Step { done, note } => {
                self.done = *done;
                self.note.clone_from(note);
                self.resident_bytes = memory::resident_bytes().unwrap_or(0);
            }
            Report::Block { .. } | Report::Measured { .. } | Report::Log(_) | Report::Warning(_) => {}
        }
    }

    /// Time that the stage will take yet, from its mean rate so far.
    pub fn remaining(&self) -> Option<Duration> {
        let (_, began) = self.began?;
        if self.done == 0 || self.total < self.done {
            return None;
        }
        Some(began.elapsed().mul_f64((self.total - self.done) as f64 / self.done as f64))
    }
}
