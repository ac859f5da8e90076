//! What goes into [`update`](super::update::update) and what comes out of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crossterm::event::{KeyEvent, MouseEvent};

use super::document::Document;
use super::known::Known;
use super::losses::{Key, Solved};
use super::queue::Purpose;
use super::state::Compared;
use crate::analysis::Inventory;
use crate::analysis::allocate::AllocateRequest;
use crate::analysis::sensitivity::{Sensitivities, SensitivitySpec};
use crate::checkpoint::Layout;
use crate::engine::inspect::Look;
use crate::engine::{Event, GpuReading, Job, JobId};
use crate::error::Result;
use crate::eval::score::Sample;
use crate::monitor::CancelToken;
use crate::session::Session;
use crate::session::recovery::Lost;
use crate::session::runs::{Ending, Status};

/// Something happened.
#[derive(Debug)]
pub enum Msg {
    Key(KeyEvent),
    Mouse(MouseEvent),
    Paste(String),
    Resize(u16, u16),
    /// Time since the start, and resident memory of the process.
    Tick {
        clock: Duration,
        resident_bytes: u64,
    },
    /// Another second has passed while something on the screen depends on the time.
    Second,
    /// The terminal is gone; runs go on.
    TerminalLost,
    Engine(Event),
    /// The engine's answer to [`Effect::Submit`].
    Submitted(Result<JobId>),
    /// The answer to [`Effect::Save`].
    Saved {
        path: PathBuf,
        session: Box<Session>,
        outcome: SaveOutcome,
    },
    /// The answer to [`Effect::Open`].
    Opened {
        path: PathBuf,
        document: Result<Box<Document>>,
    },
    /// A part of the answer to [`Effect::Look`]; nothing more comes after `None`.
    Looked {
        model: String,
        block: usize,
        look: Result<Option<Look>>,
    },
    /// The answer to [`Effect::Compare`].
    Compared(Result<Box<Compared>>),
    /// The answer to [`Effect::Copy`]: where the text is.
    Copied(Result<&'static str>),
    /// The answer to [`Effect::Write`].
    Written {
        path: PathBuf,
        outcome: Result<()>,
    },
    /// The answer to [`Effect::Inspect`].
    Inspected {
        model: String,
        inventory: Result<Box<Inventory>>,
    },
    /// The answer to [`Effect::Recall`].
    Recalled {
        model: String,
        known: Box<Known>,
    },
    /// The answer to [`Effect::RecallLosses`].
    LossesRecalled {
        model: String,
        key: Key,
        found: Result<Option<Box<Sensitivities>>>,
    },
    /// The answer to [`Effect::Solve`].
    Solved(Box<Solved>),
    /// The answer to [`Effect::Restore`].
    Restored {
        lost: Box<Lost>,
        document: Result<Box<Document>>,
    },
    /// The answer to [`Effect::AskWhatIsRecent`].
    Recent(Vec<PathBuf>),
    /// The answer to [`Effect::OpenRun`]: the run's name on disk.
    RunOpened {
        key: u64,
        id: Option<String>,
    },
    /// Another process asks for a run of this one to be cancelled.
    CancelAsked(u64),
    /// The answer to [`Effect::LookAtRuns`]: all runs, and the end of the log of the one that is followed.
    Runs {
        list: Vec<Status>,
        log: Vec<String>,
    },
    /// The answer to [`Effect::LookAtGpus`].
    Gpus(Vec<GpuReading>),
    HandOverFailed(crate::error::Error),
    /// Something beside what the user is doing went wrong.
    Trouble(crate::error::Error),
}

/// How saving went.
#[derive(Debug)]
pub enum SaveOutcome {
    Done,
    /// Another file is there, and overwriting it was not asked for.
    Exists,
    Failed(crate::error::Error),
}

/// Two evaluations.
#[derive(Debug, Clone)]
pub struct ToCompare {
    pub names: [String; 2],
    pub samples: [Arc<Vec<Sample>>; 2],
    /// Where the tasks' rows are, when not compiled in.
    pub data: Option<PathBuf>,
}

/// Plans of every budget are to be found.
#[derive(Debug)]
pub struct ToSolve {
    pub losses: Arc<Sensitivities>,
    pub layout: Arc<Layout>,
    pub request: AllocateRequest,
}

/// Something is to be done outside the state.
#[derive(Debug)]
pub enum Effect {
    Submit(Box<Job>),
    Cancel(JobId),
    Save {
        path: PathBuf,
        session: Box<Session>,
        overwrite: bool,
    },
    /// Read a session and open its model.
    Open(PathBuf),
    /// Read the session's weights for what the inventory says of them.
    Inspect,
    /// Read what earlier runs measured of the session's model.
    Recall,
    /// Read what was measured of the losses of the model's parts.
    RecallLosses {
        model: String,
        key: Key,
        spec: Box<SensitivitySpec>,
    },
    /// Find the plans of every budget.
    Solve(Box<ToSolve>),
    /// Open what was lost, as a change of its file.
    Restore(Box<Lost>),
    Discard(Box<Lost>),
    AskWhatIsRecent,
    /// Make all jobs stand still, or go on.
    Pause(bool),
    /// Give a run its folder on disk.
    OpenRun {
        key: u64,
        title: String,
        session: Box<Session>,
        purpose: Purpose,
    },
    /// Write down how a run ended.
    EndRun {
        key: u64,
        ending: Ending,
    },
    /// Let another process go on with every run that is not over, and leave.
    HandOver,
    /// Read the runs of all processes.
    LookAtRuns {
        follow: Option<String>,
    },
    CancelRun(String),
    ResumeRun(String),
    RemoveRun(String),
    LookAtGpus,
    /// Look at the weights of a block, until it is cancelled.
    Look {
        model: String,
        block: usize,
        cancel: CancelToken,
    },
    /// Compare two evaluations row by row.
    Compare(Box<ToCompare>),
    /// Put a text into the clipboard.
    Copy(String),
    /// Write a text into a file that is not there yet.
    Write {
        path: PathBuf,
        text: String,
    },
    /// Take clicks and the wheel, or leave them to the terminal.
    Mouse(bool),
    Suspend,
    Redraw,
    Quit,
}
