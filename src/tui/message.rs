//! What goes into [`update`](super::update::update) and what comes out of it.

use std::path::PathBuf;
use std::time::Duration;

use crossterm::event::KeyEvent;

use super::document::Document;
use super::known::Known;
use crate::analysis::Inventory;
use crate::engine::{Event, GpuReading, Job, JobId};
use crate::error::Result;
use crate::session::Session;
use crate::session::recovery::Lost;
use crate::session::runs::{Ending, Status};

/// Something happened.
#[derive(Debug)]
pub enum Msg {
    Key(KeyEvent),
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
        evaluate: bool,
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
    Suspend,
    Redraw,
    Quit,
}
