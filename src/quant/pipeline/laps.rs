//! What the steps of the work take, for the log.

use std::time::Instant;

/// Seconds that the steps of a part of the work take.
pub(super) struct Laps {
    since: Instant,
    ended: Vec<(&'static str, f64)>,
}

impl Laps {
    pub(super) fn start() -> Self {
        Self { since: Instant::now(), ended: Vec::new() }
    }

    pub(super) fn end(&mut self, name: &'static str) {
        self.ended.push((name, self.since.elapsed().as_secs_f64()));
        self.since = Instant::now();
    }

    /// What of, and its steps in order.
    pub(super) fn line(&self, of: &str) -> String {
        let steps: Vec<String> = self.ended.iter().map(|(name, seconds)| format!("{name} {seconds:.2} s")).collect();
        format!("{of}: {}", steps.join(", "))
    }
}
