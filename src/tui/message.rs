//! What goes into [`update`](super::update::update) and what comes out of it.

use std::path::PathBuf;
use std::time::Duration;

use crossterm::event::KeyEvent;

use super::document::Document;
use crate::analysis::Inventory;
use crate::engine::{Event, Job, JobId};
use crate::error::Result;
use crate::session::Session;

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
    Suspend,
    Redraw,
    Quit,
}
