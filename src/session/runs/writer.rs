//! [`RunWriter`]: keeps a run's folder up to date from a thread of its own, so that whoever runs the job never waits
//! for the disk.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::{Entry, Request, Run, State, Status, now};
use crate::engine::{Event, Progress};
use crate::error::{Error, ErrorKind, Result};
use crate::eval::{Evaluated, memory};
use crate::monitor::Report;
use crate::session::lock::Lock;
use crate::session::store::{Record, Store};

/// Least time between two writes of the status.
const WRITE: Duration = Duration::from_millis(250);
/// How often the folder is looked at for a request to cancel.
const LOOK: Duration = Duration::from_millis(400);

/// What the folder has to say to whoever runs the job.
#[derive(Debug)]
pub enum Notice {
    /// Somebody asked for the run to be cancelled.
    Cancel,
    /// Something could not be written. It is said once.
    Trouble(Error),
}

/// How a run ends for this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Ending {
    Done,
    Failed {
        message: String,
        hint: Option<String>,
    },
    Cancelled,
    /// Another process goes on with it. The lock stays with this one until it ends.
    HandedOver,
}

impl Ending {
    /// What a replay that ended this way has come to.
    pub fn of<T>(outcome: &Result<T>) -> Self {
        match outcome {
            Ok(_) => Self::Done,
            Err(error) if error.kind == ErrorKind::Cancelled => Self::Cancelled,
            Err(error) => Self::Failed { message: error.message.clone(), hint: error.hint.clone() },
        }
    }
}

enum Note {
    Started(String),
    Report(Report),
    Made { variant: String, path: PathBuf },
    Measured(Box<Evaluated>),
    Ending(Ending),
}

/// Writes down what happens to a run.
pub struct RunWriter {
    id: String,
    notes: Sender<Note>,
    thread: JoinHandle<()>,
}

impl RunWriter {
    /// Takes `run`, whose lock was taken, over. Results go to `store`, too.
    pub fn start(run: Run, lock: Lock, store: Store, notify: impl Fn(Notice) + Send + 'static) -> Result<Self> {
        let (notes, queue) = channel();
        let request = run.request()?;
        let mut status = run.status()?;
        (status.state, status.message, status.hint) = (State::Waiting, None, None);
        status.job = run.made().variants.len();
        let id = run.id();
        // Asked of a process before this one, and what became of it.
        drop(std::fs::remove_file(run.file("cancel")));
        drop(std::fs::remove_file(run.file("seen")));
        let path = run.file("log");
        let log = OpenOptions::new().create(true).append(true).open(&path).map_err(|error| Error::io("opening", &path, &error))?;
        let worker = Worker {
            run,
            request,
            status,
            store,
            log,
            lock,
            notify: Box::new(notify),
            progress: Progress::default(),
            start: Instant::now(),
            troubled: false,
        };
        let thread = std::thread::Builder::new()
            .name("strata-run".into())
            .spawn(move || worker.run(&queue))
            .map_err(|error| Error::run(format!("the thread that writes the run down cannot be started: {error}")))?;
        Ok(Self { id, notes, thread })
    }

    /// The run's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Follows an event of one of the run's jobs.
    pub fn event(&self, event: &Event) {
        let note = match event {
            Event::Started { title, .. } => Note::Started(title.clone()),
            Event::Report { report, .. } => Note::Report(report.clone()),
            Event::Quantized { name, path, .. } => Note::Made { variant: name.clone(), path: path.clone() },
            Event::Evaluated { evaluated, .. } => Note::Measured(evaluated.clone()),
            Event::Text { .. }
            | Event::Sensitivities { .. }
            | Event::Study { .. }
            | Event::Observed { .. }
            | Event::Spoken { .. }
            | Event::Finished { .. } => return,
        };
        // The writer ends before its time only by a panic, which was reported.
        drop(self.notes.send(note));
    }

    /// Writes down how it ended, and waits until that is on disk.
    pub fn end(self, ending: Ending) {
        drop(self.notes.send(Note::Ending(ending)));
        drop(self.thread.join());
    }
}

struct Worker {
    run: Run,
    request: Request,
    status: Status,
    store: Store,
    log: File,
    lock: Lock,
    notify: Box<dyn Fn(Notice) + Send>,
    progress: Progress,
    start: Instant,
    troubled: bool,
}

impl Worker {
    fn run(mut self, notes: &Receiver<Note>) {
        let (mut changed, mut written, mut looked) = (true, None::<Instant>, Instant::now());
        loop {
            let due = written.map_or(Duration::ZERO, |at| WRITE.saturating_sub(at.elapsed()));
            let wait = if changed { due.min(LOOK) } else { LOOK };
            match notes.recv_timeout(wait) {
                Ok(Note::Ending(ending)) => return self.end(&ending),
                Ok(note) => {
                    self.take_in(note);
                    changed = true;
                }
                Err(RecvTimeoutError::Timeout) => {}
                // Whoever ran it is gone without an ending: the run counts as interrupted.
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if changed && written.is_none_or(|at| at.elapsed() >= WRITE) {
                self.write();
                (changed, written) = (false, Some(Instant::now()));
            }
            if looked.elapsed() >= LOOK {
                looked = Instant::now();
                let path = self.run.file("cancel");
                if path.exists() {
                    drop(std::fs::remove_file(path));
                    self.line("warning", "asked to cancel");
                    (self.notify)(Notice::Cancel);
                }
            }
        }
    }

    fn take_in(&mut self, note: Note) {
        let now = self.start.elapsed();
        match note {
            Note::Started(title) => {
                self.line("info", &format!("{title}: started"));
                self.progress = Progress::begin(title, now);
                self.status.state = State::Running;
                self.status.job += 1;
                if self.status.job == self.status.jobs && !self.request.options.skip_evaluation {
                    self.keep(Entry::Evaluating);
                }
            }
            Note::Report(report) => {
                match &report {
                    Report::Stage { name, total } => self.line("info", &format!("{}: {name}, {total} steps", self.progress.title)),
                    Report::Log(line) => self.line("info", line),
                    Report::DeviceMemory(memory) => self.line("info", &memory.to_string()),
                    Report::Warning(line) => self.line("warning", line),
                    Report::Paused(paused) => self.line("info", if *paused { "paused" } else { "going on" }),
                    Report::Block { index, error, .. } => self.line("info", &format!("block {index}: error {error:.2e}")),
                    Report::Measured { unit, format, kld, .. } => self.line("info", &format!("{unit} {format}: KLD {kld:.2e}")),
                    Report::Plan(_) | Report::Step { .. } | Report::Found { .. } | Report::Divergence { .. } => {}
                }
                self.progress.report(&report, now);
                self.status.state = if self.progress.paused { State::Paused } else { State::Running };
            }
            Note::Made { variant, path } => {
                self.line("info", &format!("{variant} is in {}", path.display()));
                self.keep(Entry::Made { variant, path });
            }
            Note::Measured(evaluated) => {
                let Evaluated { result, samples } = *evaluated;
                self.line("info", &format!("{}: evaluated", result.variant));
                let session = self.request.session_file.as_ref().map(|path| path.display().to_string());
                let record = Record::now(session, result.clone());
                let kept = self.store.append(&record);
                self.trouble(kept);
                self.keep(Entry::Measured { result: Box::new(result), samples });
            }
            // Taken out of the queue before.
            Note::Ending(_) => {}
        }
    }

    fn end(mut self, ending: &Ending) {
        let (state, level, line) = match ending {
            Ending::Done => (State::Done, "info", "done".to_owned()),
            Ending::Cancelled => (State::Cancelled, "warning", "cancelled".to_owned()),
            Ending::HandedOver => (State::Waiting, "info", "going on without a screen".to_owned()),
            Ending::Failed { message, hint } => {
                (self.status.message, self.status.hint) = (Some(message.clone()), hint.clone());
                (State::Failed, "error", message.clone())
            }
        };
        self.status.state = state;
        self.line(level, &line);
        self.write();
        if *ending == Ending::HandedOver {
            // The next process shall not begin before this one has ended, engine and all.
            std::mem::forget(self.lock);
        }
    }

    fn write(&mut self) {
        self.status.progress = self.progress.snapshot(self.start.elapsed());
        self.status.resident_bytes = memory::resident_bytes().unwrap_or(0);
        self.status.updated = now();
        let written = self.run.write_status(&self.status);
        self.trouble(written);
    }

    fn line(&mut self, level: &str, text: &str) {
        let line = format!("{} {level:<7} {text}\n", now());
        let written = self.log.write_all(line.as_bytes()).map_err(|error| Error::io("writing", &self.run.file("log"), &error));
        self.trouble(written);
    }

    fn keep(&mut self, entry: Entry) {
        let kept = self.run.keep(entry);
        self.trouble(kept);
    }

    /// Says the first thing that could not be written; the job itself goes on.
    fn trouble(&mut self, outcome: Result<()>) {
        if let Err(error) = outcome
            && !std::mem::replace(&mut self.troubled, true)
        {
            (self.notify)(Notice::Trouble(error));
        }
    }
}
