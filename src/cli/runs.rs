//! `strata runs`.

use std::time::Duration;

use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;
use strata::error::{Error, Result};
use strata::session::paths;
use strata::session::report::Table;
use strata::session::runs::{self, Run, State, Status};

use super::{Common, output};

/// How often a run is looked at while it is followed.
const LOOK: Duration = Duration::from_millis(300);

#[derive(Args)]
pub struct Runs {
    #[command(subcommand)]
    action: Option<Action>,
}

/// A run is named by its id, the beginning of its id, or `last`.
#[derive(Subcommand)]
enum Action {
    /// All runs, the newest first (as without a subcommand).
    List,
    /// Print the log of a run as it grows, until the run ends.
    Follow { run: String },
    /// Ask the process that runs it to stop; finished blocks and rows are kept.
    Cancel { run: String },
    /// Forget a run that is over. Its variants and results stay.
    Remove { run: String },
    /// Forget the oldest runs that are over; one that failed stays until it was listed or followed. New runs do it by
    /// themselves.
    Prune {
        /// Runs that are over and stay.
        #[arg(long, default_value_t = runs::KEPT)]
        keep: usize,
    },
}

impl Runs {
    pub fn run(&self, common: &Common) -> Result<()> {
        match &self.action {
            None | Some(Action::List) => list(common),
            Some(Action::Follow { run }) => follow(&runs::find(run)?, common),
            Some(Action::Cancel { run }) => cancel(&runs::find(run)?),
            Some(Action::Remove { run }) => runs::find(run)?.remove(),
            Some(Action::Prune { keep }) => {
                let gone = Run::prune(&paths::runs_directory(), *keep);
                output::line(&format!("{} removed", if gone.len() == 1 { "1 run".into() } else { format!("{} runs", gone.len()) }))
            }
        }
    }
}

fn list(common: &Common) -> Result<()> {
    let runs = runs::list();
    if common.json {
        return output::json(&json!({ "schema": "strata.runs/1", "runs": runs }));
    }
    if runs.is_empty() {
        return output::line("no runs yet");
    }
    let mut table = Table::new(&["run", "state", "what", "model", "job", "done", "left", "began", ""]);
    for status in &runs {
        table.push(row(status));
    }
    output::table(&table)?;
    // The table says how each ended.
    for status in runs.iter().filter(|status| status.state.is_over()) {
        runs::find(&status.id)?.mark_seen();
    }
    if runs.iter().any(|status| status.state.can_resume()) {
        output::line("")?;
        output::line("strata replay --resume RUN goes on with one that is interrupted, cancelled or failed")?;
    }
    Ok(())
}

fn row(status: &Status) -> Vec<String> {
    let progress = &status.progress;
    let live = !status.state.is_over();
    let share = progress.share.filter(|_| live).map_or_else(String::new, |share| format!("{:.0}%", 100.0 * share));
    let left = progress.remaining_seconds.filter(|_| live).map_or_else(String::new, |seconds| format!("{seconds} s"));
    let job = if status.job == 0 { String::new() } else { format!("{} of {}", status.job, status.jobs) };
    let message = status.message.clone().unwrap_or_default();
    vec![
        status.id.clone(),
        status.state.name().into(),
        status.title.clone(),
        status.model.clone(),
        job,
        share,
        left,
        status.began.clone(),
        message,
    ]
}

fn cancel(run: &Run) -> Result<()> {
    let status = run.status()?;
    if status.state.is_over() {
        return Err(Error::input(format!("{} is {} already", status.id, status.state.name())));
    }
    run.request_cancel()?;
    output::line(&format!("{}: asked to stop at its next step", status.id))
}

/// Prints the log from its start; with `--json`, only the last status.
fn follow(run: &Run, common: &Common) -> Result<()> {
    let bar = ProgressBar::with_draw_target(Some(1000), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template("{prefix} {bar:24} {percent}% {wide_msg}") {
        bar.set_style(style);
    }
    let mut printed = 0;
    let status = loop {
        // Before the log, so that nothing that was written before the end is missed.
        let status = run.status()?;
        let log = std::fs::read_to_string(run.file("log")).unwrap_or_default();
        let whole = log.rfind('\n').map_or(0, |end| end + 1);
        if !common.json {
            log[printed.min(whole)..whole].lines().try_for_each(|line| bar.suspend(|| output::line(line)))?;
        }
        printed = whole;
        if status.state.is_over() && !(status.state == State::Interrupted && run.is_handed_over()) {
            run.mark_seen();
            break status;
        }
        let progress = &status.progress;
        bar.set_prefix(format!("{}: {}", progress.title, progress.stage));
        bar.set_position((1000.0 * progress.share.unwrap_or(0.0)) as u64);
        bar.set_message(progress.remaining_seconds.map_or_else(String::new, |seconds| format!("{seconds} s left")));
        std::thread::sleep(LOOK);
    };
    bar.finish_and_clear();
    if common.json {
        output::json(&status)?;
    }
    match status.state {
        State::Done => Ok(()),
        State::Cancelled => Err(Error::cancelled()),
        _ => {
            let message = status.message.unwrap_or_else(|| status.state.name().into());
            let hint = status.hint.unwrap_or_else(|| format!("strata replay --resume {} goes on with it", status.id));
            Err(Error::run(message).hint(hint))
        }
    }
}
