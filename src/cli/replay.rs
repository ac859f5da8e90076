//! `strata replay`, and what `strata` does without a terminal.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use strata::error::{Error, Result};
use strata::eval::{Evaluated, ResultSet};
use strata::monitor::CancelToken;
use strata::session::runs::{self, Ending, Made, Notice, Request, Run, RunWriter};
use strata::session::store::Store;
use strata::session::{self, ReplayOptions, Session, paths};

use super::progress::Follow;
use super::{Common, output};

#[derive(Args)]
pub struct Replay {
    /// A session file.
    #[arg(required_unless_present = "resume")]
    session: Option<PathBuf>,
    /// Go on with a run that was interrupted, cancelled or failed; several one after another. See `strata runs`.
    #[arg(long, value_name = "RUN", num_args = 1.., conflicts_with_all = ["session", "variant", "fresh", "output", "no_eval", "reference_cache"])]
    resume: Vec<String>,
    /// Lead a session of one's own, which a terminal's end does not reach.
    #[arg(long, hide = true)]
    own_session: bool,
    /// Only this variant.
    #[arg(long, value_name = "NAME")]
    variant: Option<String>,
    /// Make variants again that are there already, and score all rows again.
    #[arg(long)]
    fresh: bool,
    /// Folder for the variants, each under its name; without it, the user's data folder.
    #[arg(long, short)]
    output: Option<PathBuf>,
    /// Quantize only.
    #[arg(long)]
    no_eval: bool,
    /// Write a page with tables and plots that needs no network.
    #[arg(long, value_name = "FILE", conflicts_with = "no_eval")]
    html: Option<PathBuf>,
    /// Size that the folder of what reference models said may have, 8GiB unless given; those used longest ago are removed.
    #[arg(long, value_name = "SIZE", value_parser = strata::size::parse)]
    reference_cache: Option<u64>,
}

impl Replay {
    pub fn run(&self, common: &Common) -> Result<()> {
        if self.own_session {
            rustix::process::setsid().map_err(|error| Error::run(format!("a session of its own is refused: {error}")))?;
        }
        if self.html.is_some() && self.resume.len() > 1 {
            return Err(Error::input("one page cannot be of several runs").hint("resume them one by one"));
        }
        for name in &self.resume {
            let results = resume(&runs::find(name)?, common)?;
            self.print(results, common)?;
        }
        let Some(path) = &self.session else { return Ok(()) };
        let session = Session::read(path)?;
        let output = match &self.output {
            // A run is resumed from wherever the user is then.
            Some(output) => Some(std::path::absolute(output).map_err(|error| Error::io("finding", output, &error))?),
            None => None,
        };
        let options = ReplayOptions {
            variant: self.variant.clone(),
            fresh: self.fresh,
            output,
            skip_evaluation: self.no_eval,
            host_memory: common.host_memory,
            reference_bytes: self.reference_cache,
            ..ReplayOptions::default()
        };
        self.print(run(&session, Some(path), options, common)?, common)
    }

    fn print(&self, results: Vec<Evaluated>, common: &Common) -> Result<()> {
        print(results, self.html.as_deref(), common)
    }
}

/// Replays `session`, read from `path` unless it is compiled in, with progress on stderr and its table on stdout.
pub fn headless(session: &Session, path: Option<&Path>, options: ReplayOptions, common: &Common) -> Result<()> {
    print(run(session, path, options, common)?, None, common)
}

fn run(session: &Session, path: Option<&Path>, options: ReplayOptions, common: &Common) -> Result<Vec<Evaluated>> {
    let mut session = session.clone();
    session.calibration.seed = common.seed.unwrap_or(session.calibration.seed);
    let title = path.and_then(Path::file_stem).map_or_else(|| "demo".into(), |stem| stem.to_string_lossy().into_owned());
    let request = Request::new(format!("replay {title}"), path.map(Path::to_owned), options.clone());
    let run = match Run::create(&paths::runs_directory(), &session, &request) {
        Ok(run) => Some(run),
        Err(error) => {
            eprintln!("warning: {error}: this run can be neither followed nor resumed");
            None
        }
    };
    replay(&session, options, run, Made::default(), Duration::ZERO, common)
}

/// Goes on with `run` where its last process stopped.
fn resume(run: &Run, common: &Common) -> Result<Vec<Evaluated>> {
    let (session, request, made) = (run.session()?, run.request()?, run.made());
    let mut options = request.options;
    if made.evaluation_begun {
        options.fresh = false;
    }
    replay(&session, options, Some(run.clone()), made, runs::TAKE_OVER, common)
}

fn replay(
    session: &Session,
    options: ReplayOptions,
    run: Option<Run>,
    made: Made,
    patience: Duration,
    common: &Common,
) -> Result<Vec<Evaluated>> {
    let (engine, mut events) = common.engine()?;
    let cancel = CancelToken::default();
    let writer = match run {
        Some(run) => {
            let lock = run.lock(patience)?;
            let (cancel, cancel_jobs) = (cancel.clone(), engine.canceller());
            let notify = move |notice| match notice {
                Notice::Cancel => {
                    cancel.cancel();
                    cancel_jobs();
                }
                Notice::Trouble(error) => eprintln!("warning: {error}: the run goes on, and less of it is kept"),
            };
            Some(RunWriter::start(run, lock, Store::user(), notify)?)
        }
        None => None,
    };
    let mut follow = Follow::new();
    let replay = session::Replay { session, options, made: made.variants, cancel };
    let outcome = replay.run(&engine, &mut events, &mut |event| {
        follow.event(event);
        if let Some(writer) = &writer {
            writer.event(event);
        }
    });
    if let Some(writer) = writer {
        writer.end(Ending::of(&outcome));
    }
    outcome
}

/// Prints `results`, of which there are none where nothing was evaluated, and writes their page to `html`.
fn print(results: Vec<Evaluated>, html: Option<&Path>, common: &Common) -> Result<()> {
    if results.is_empty() {
        return Ok(());
    }
    let set = ResultSet::new(results);
    if let Some(path) = html {
        strata::files::write_atomically(path, output::page(&set).as_bytes())?;
    }
    output::results(&set, false, common)
}
