//! [`Progress`]: how far a job is, from the reports it makes. The screen, the command line and the status file of a
//! run follow the same events through it.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::Event;
use crate::monitor::Report;

/// Time that must have been measured before a time left is given.
const LEAST_TIME: Duration = Duration::from_millis(1500);
/// Steps that must have been measured before a time left is given.
const LEAST_STEPS: usize = 3;
/// Share of the job over which the pace is averaged once more than that is done.
const HORIZON: f64 = 0.25;
/// Weight of the newest step in the rate of the stage.
const SMOOTHING: f64 = 0.2;

/// A job as it reports itself. Times are since any one moment.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Progress {
    pub title: String,
    pub stage: String,
    pub done: usize,
    pub total: usize,
    pub note: String,
    pub paused: bool,
    /// Relative output error of each block quantized so far.
    pub errors: Vec<f64>,
    /// The largest loss measured so far in each block, in nats a token.
    pub losses: Vec<f64>,
    /// Mean divergence from the reference after each text window, of the model that is evaluated.
    pub divergence: Vec<f64>,
    /// Models of this evaluation that are finished.
    pub evaluated: usize,
    /// Stages with their work, and which of them the job is at.
    plan: Vec<(String, f64)>,
    at: usize,
    /// Work of the stages before this one.
    before: f64,
    pace: Pace,
    /// Seconds that a step of this stage takes.
    step_seconds: Option<f64>,
}

/// Seconds for a unit of work, learned from the steps that were computed.
#[derive(Debug, Clone, Default, PartialEq)]
struct Pace {
    /// When the last step ended, or the job went on after a pause.
    since: Duration,
    seconds_per_work: f64,
    work: f64,
    time: Duration,
    steps: usize,
}

impl Pace {
    fn learn(&mut self, work: f64, now: Duration, whole: f64) {
        let took = now.saturating_sub(self.since);
        self.since = now;
        self.steps += 1;
        self.time += took;
        if work <= 0.0 {
            return;
        }
        // The plain mean at first; later steps count more once a good part of the job is done.
        self.work += work;
        let weight = work / self.work.min(HORIZON * whole).max(work);
        self.seconds_per_work += weight * (took.as_secs_f64() / work - self.seconds_per_work);
    }
}

impl Progress {
    /// A job that begins now.
    pub fn begin(title: String, now: Duration) -> Self {
        Self { title, stage: "starting".into(), pace: Pace { since: now, ..Pace::default() }, ..Self::default() }
    }

    /// Follows an event of the job.
    pub fn event(&mut self, event: &Event, now: Duration) {
        match event {
            Event::Started { title, .. } => *self = Self::begin(title.clone(), now),
            Event::Report { report, .. } => self.report(report, now),
            Event::Evaluated { .. } => self.evaluated += 1,
            Event::Quantized { .. }
            | Event::Text { .. }
            | Event::Sensitivities { .. }
            | Event::Study { .. }
            | Event::Observed { .. }
            | Event::Spoken { .. }
            | Event::Finished { .. } => {}
        }
    }

    /// Takes a report in.
    pub fn report(&mut self, report: &Report, now: Duration) {
        match report {
            Report::Plan(stages) => self.plan.clone_from(stages),
            Report::Stage { name, total } => self.enter(name, *total, now),
            Report::Step { done, note } => {
                let steps = done.saturating_sub(self.done);
                let took = now.saturating_sub(self.pace.since).as_secs_f64();
                if steps > 0 {
                    let each = took / steps as f64;
                    self.step_seconds = Some(self.step_seconds.map_or(each, |before| before + SMOOTHING * (each - before)));
                    self.pace.learn(self.stage_work() * steps as f64 / self.total.max(1) as f64, now, self.whole());
                }
                self.done = *done;
                self.note.clone_from(note);
            }
            Report::Found { done } => {
                self.done = *done;
                self.pace.since = now;
            }
            Report::Block { index, error, .. } => {
                if self.errors.len() <= *index {
                    self.errors.resize(index + 1, 0.0);
                }
                self.errors[*index] = *error;
            }
            Report::Divergence { windows, mean } => {
                self.divergence.truncate(windows.saturating_sub(1));
                self.divergence.push(*mean);
            }
            Report::Paused(paused) => {
                self.paused = *paused;
                self.pace.since = now;
            }
            Report::Measured { index, kld, .. } => {
                if self.losses.len() <= *index {
                    self.losses.resize(index + 1, 0.0);
                }
                self.losses[*index] = self.losses[*index].max(*kld);
            }
            Report::Log(_) | Report::Warning(_) | Report::DeviceMemory(_) => {}
        }
    }

    fn enter(&mut self, name: &str, total: usize, now: Duration) {
        // A stage goes on after one inside it that was not announced: a pass through the blocks of a model that is streamed.
        let again = self.stage != name && self.plan.get(self.at).is_some_and(|(stage, _)| stage == name);
        let from = if self.stage == "starting" || again { self.at } else { self.at + 1 };
        if let Some(ahead) = self.plan.iter().skip(from).position(|(stage, _)| stage == name) {
            self.at = from + ahead;
            self.before = self.plan[..self.at].iter().map(|(_, work)| work).sum();
        }
        name.clone_into(&mut self.stage);
        (self.done, self.total) = (0, total);
        self.note.clear();
        self.step_seconds = None;
        self.pace.since = now;
    }

    fn whole(&self) -> f64 {
        self.plan.iter().map(|(_, work)| work).sum()
    }

    /// Work of the stage; none when it was not announced.
    fn stage_work(&self) -> f64 {
        self.plan.get(self.at).filter(|(name, _)| *name == self.stage).map_or(0.0, |(_, work)| *work)
    }

    /// Share of the whole job that is done; nothing when the job did not say what it consists of.
    pub fn share(&self) -> Option<f64> {
        let whole = self.whole();
        let here = self.stage_work() * self.done as f64 / self.total.max(1) as f64;
        (whole > 0.0).then(|| ((self.before + here) / whole).clamp(0.0, 1.0))
    }

    /// Time that the whole job will take yet; nothing until enough of it was seen.
    pub fn remaining(&self, now: Duration) -> Option<Duration> {
        if self.pace.steps < LEAST_STEPS || self.pace.time < LEAST_TIME || self.pace.work <= 0.0 {
            return None;
        }
        let left = (1.0 - self.share()?) * self.whole() * self.pace.seconds_per_work;
        let since = if self.paused { Duration::ZERO } else { now.saturating_sub(self.pace.since) };
        Duration::try_from_secs_f64(left).ok().map(|left| left.saturating_sub(since))
    }

    /// Seconds that a step of this stage takes, about.
    pub fn step_seconds(&self) -> Option<f64> {
        self.step_seconds
    }

    /// What can be said of the job now, to be shown or written down.
    pub fn snapshot(&self, now: Duration) -> Snapshot {
        Snapshot {
            title: self.title.clone(),
            stage: self.stage.clone(),
            done: self.done,
            total: self.total,
            note: self.note.clone(),
            paused: self.paused,
            share: self.share(),
            remaining_seconds: self.remaining(now).map(|left| left.as_secs()),
            step_seconds: self.step_seconds,
            errors: self.errors.clone(),
            losses: self.losses.clone(),
            divergence: self.divergence.clone(),
        }
    }
}

/// A job at one moment.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Snapshot {
    pub title: String,
    pub stage: String,
    pub done: usize,
    pub total: usize,
    pub note: String,
    pub paused: bool,
    pub share: Option<f64>,
    pub remaining_seconds: Option<u64>,
    pub step_seconds: Option<f64>,
    pub errors: Vec<f64>,
    pub losses: Vec<f64>,
    pub divergence: Vec<f64>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Format;

    fn at(seconds: f64) -> Duration {
        Duration::from_secs_f64(seconds)
    }

    fn stage(name: &str, total: usize) -> Report {
        Report::Stage { name: name.into(), total }
    }

    fn step(done: usize) -> Report {
        Report::Step { done, note: String::new() }
    }

    /// A job of two stages: ten steps of a second each, then ten of half a second each.
    fn two_stages() -> Progress {
        let mut progress = Progress::begin("job".into(), at(0.0));
        progress.report(&Report::Plan(vec![("a".into(), 20.0), ("b".into(), 10.0)]), at(0.0));
        progress.report(&stage("a", 10), at(0.0));
        progress
    }

    #[test]
    fn share_and_time_left_are_those_of_the_whole_job() {
        let mut progress = two_stages();
        assert_eq!((progress.share(), progress.remaining(at(0.0))), (Some(0.0), None));
        for done in 1..=5 {
            progress.report(&step(done), at(done as f64));
        }
        assert!((progress.share().unwrap() - 1.0 / 3.0).abs() < 1e-12);
        assert_eq!(progress.remaining(at(5.0)), Some(at(10.0)));
        assert_eq!(progress.remaining(at(5.5)), Some(at(9.5)), "it goes down between two steps");
        assert_eq!(progress.step_seconds(), Some(1.0));
    }

    #[test]
    fn what_was_there_already_and_a_pause_do_not_change_the_pace() {
        let mut progress = two_stages();
        progress.report(&Report::Found { done: 4 }, at(0.1));
        for done in 5..=7 {
            progress.report(&step(done), at(0.1 + f64::from(done as u32 - 4)));
        }
        progress.report(&Report::Paused(true), at(3.1));
        assert_eq!(progress.remaining(at(100.0)), Some(at(8.0)), "time stands still");
        progress.report(&Report::Paused(false), at(100.0));
        progress.report(&step(8), at(101.0));
        let left = progress.remaining(at(101.0)).unwrap().as_secs_f64();
        assert!((left - 7.0).abs() < 1e-6, "{left}");
    }

    #[test]
    fn a_pace_that_changes_is_followed_and_then_settles() {
        let mut progress = two_stages();
        let mut now = 0.0;
        for done in 1..=10 {
            now += if done <= 3 { 4.0 } else { 1.0 };
            progress.report(&step(done), at(now));
        }
        let left = progress.remaining(at(now)).unwrap().as_secs_f64();
        assert!((5.0..8.0).contains(&left), "ten steps of half a second are left, and {left} s are said");
    }

    #[test]
    fn a_stage_goes_on_after_one_that_was_not_announced() {
        let mut progress = Progress::begin("job".into(), at(0.0));
        let plan = ["load", "a", "load", "a"].map(|name| (name.to_owned(), 1.0));
        progress.report(&Report::Plan(plan.to_vec()), at(0.0));
        for name in ["load", "a", "a, streamed", "a", "a, streamed", "a"] {
            progress.report(&stage(name, 10), at(1.0));
        }
        progress.report(&step(5), at(2.0));
        assert_eq!(progress.share(), Some(0.375));
        for name in ["load", "a"] {
            progress.report(&stage(name, 10), at(3.0));
        }
        assert_eq!(progress.share(), Some(0.75));
    }

    #[test]
    fn the_largest_loss_of_each_block_is_kept() {
        let mut progress = two_stages();
        for (index, kld) in [(2, 1e-5), (0, 3e-6), (2, 4e-6)] {
            progress.report(&Report::Measured { index, unit: "2.in_proj".into(), format: Format::W4A8, kld }, at(1.0));
        }
        assert_eq!(progress.snapshot(at(1.0)).losses, [3e-6, 0.0, 1e-5]);
    }

    #[test]
    fn divergence_starts_again_with_each_model() {
        let mut progress = two_stages();
        for (windows, mean) in [(1, 0.5), (2, 0.4), (3, 0.3), (1, 0.9)] {
            progress.report(&Report::Divergence { windows, mean }, at(1.0));
        }
        assert_eq!(progress.divergence, [0.9]);
    }
}
