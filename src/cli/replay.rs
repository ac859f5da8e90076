//! `strata replay`, and what `strata` does without a terminal.

use std::path::{Path, PathBuf};

use clap::Args;
use strata::error::Result;
use strata::eval::ResultSet;
use strata::session::{self, ReplayOptions, Session};

use super::progress::Follow;
use super::results::Recorder;
use super::{Common, output};

#[derive(Args)]
pub struct Replay {
    /// A session file.
    session: PathBuf,
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
}

impl Replay {
    pub fn run(&self, common: &Common) -> Result<()> {
        let session = Session::read(&self.session)?;
        let options = ReplayOptions {
            variant: self.variant.clone(),
            fresh: self.fresh,
            output: self.output.clone(),
            skip_evaluation: self.no_eval,
            host_memory: common.host_memory,
        };
        headless(&session, Some(&self.session), options, common)
    }
}

/// Replays `session`, read from `path` unless it is compiled in, with progress on stderr and its table on stdout.
pub fn headless(session: &Session, path: Option<&Path>, options: ReplayOptions, common: &Common) -> Result<()> {
    let mut session = session.clone();
    session.calibration.seed = common.seed.unwrap_or(session.calibration.seed);
    let (engine, mut events) = common.engine()?;
    let mut follow = Follow::new();
    let replay = session::Replay { session: &session, options };
    let recorder = Recorder::new(Some(path.map_or_else(|| "demo".to_owned(), |path| path.display().to_string())));
    let results = replay.run(&engine, &mut events, &mut |event| {
        follow.event(event);
        recorder.event(event);
    })?;
    if results.is_empty() { Ok(()) } else { output::results(&ResultSet::new(results), false, common) }
}
