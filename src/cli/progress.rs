//! Progress of jobs on stderr: bars on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use strata::engine::Event;
use strata::error::Result;
use strata::monitor::{CancelToken, Monitor, Report};

/// Follows the events of a run.
pub struct Follow {
    bar: Option<ProgressBar>,
    title: String,
    stage: Option<(String, usize, Instant)>,
}

impl Follow {
    /// Bars when stderr is a terminal.
    pub fn new() -> Self {
        let bar = std::io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:24} {pos}/{len} {elapsed} (left {eta}) {wide_msg}") {
                bar.set_style(style);
            }
            bar
        });
        Self { bar, title: String::new(), stage: None }
    }

    /// Takes one event in.
    pub fn event(&mut self, event: &Event) {
        match event {
            Event::Started { title, .. } => self.title.clone_from(title),
            Event::Report { report, .. } => self.report(report),
            Event::Quantized { name, path, manifest, reused, .. } => {
                let how = if *reused { "found" } else { "made" };
                self.say(&format!("{name}: {how} in {}, sample KLD {:.2e}", path.display(), manifest.sample.kld_mean));
            }
            Event::Finished { .. } => self.end(),
            Event::Evaluated { .. }
            | Event::Text { .. }
            | Event::Sensitivities { .. }
            | Event::Study { .. }
            | Event::Observed { .. }
            | Event::Spoken { .. } => {}
        }
    }

    /// Follows work that no engine does.
    pub fn watch<T>(title: &str, work: impl FnOnce(&Monitor) -> Result<T>) -> Result<T> {
        let follow = Mutex::new(Self { title: title.to_owned(), ..Self::new() });
        let sink = |report| follow.lock().unwrap_or_else(PoisonError::into_inner).report(&report);
        let outcome = work(&Monitor::new(sink, CancelToken::default()));
        follow.lock().unwrap_or_else(PoisonError::into_inner).end();
        outcome
    }

    fn end(&mut self) {
        self.end_stage();
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn report(&mut self, report: &Report) {
        match report {
            Report::Stage { name, total } => {
                self.end_stage();
                self.stage = Some((name.clone(), *total, Instant::now()));
                if let Some(bar) = &self.bar {
                    bar.reset();
                    bar.set_length(*total as u64);
                    bar.set_prefix(format!("{}: {name:<13}", self.title));
                    bar.set_message("");
                }
            }
            Report::Step { done, note } => {
                if let Some(bar) = &self.bar {
                    bar.set_position(*done as u64);
                    bar.set_message(note.clone());
                }
            }
            Report::Log(line) => self.say(line),
            Report::DeviceMemory(memory) => self.say(&memory.to_string()),
            Report::Warning(line) => self.say(&format!("warning: {line}")),
            Report::Found { done } => {
                if let Some(bar) = &self.bar {
                    bar.set_position(*done as u64);
                    bar.reset_eta();
                }
            }
            Report::Plan(_) | Report::Block { .. } | Report::Measured { .. } | Report::Divergence { .. } | Report::Paused(_) => {}
        }
    }

    /// Without a bar, a stage is one line when it is over.
    fn end_stage(&mut self) {
        if let Some((name, total, began)) = self.stage.take()
            && self.bar.is_none()
        {
            eprintln!("{}: {name}, {total} steps in {:.1} s", self.title, began.elapsed().as_secs_f64());
        }
    }

    fn say(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.println(line),
            None => eprintln!("{line}"),
        }
    }
}
