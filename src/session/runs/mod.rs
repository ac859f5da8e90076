//! Runs: a folder for every long job, from which it is followed, cancelled and resumed by any other strata.
//!
//! ```text
//! runs/20261125-145021-7f3a/
//!   session.toml   what is replayed          status.json    how far it is, replaced as a whole
//!   run.json       how, and for what title   log            a line an event, with time and level
//!   lock           the process that runs it  results.jsonl  variants made and models evaluated so far
//!   output         what a run without a terminal printed    cancel   appears to ask the run to stop
//!   seen           somebody has looked at how it ended
//! ```
//!
//! A run is a session being replayed: [`Run::create`] writes it down, a [`RunWriter`] keeps the rest up to date while
//! it goes, and [`Run::list`] tells every other process.

mod writer;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

pub use writer::{Ending, Notice, RunWriter};

use super::lock::{Holding, Lock};
use super::replay::ReplayOptions;
use super::store::utc;
use super::{Session, paths};
use crate::engine::Snapshot;
use crate::error::{Error, Result};
use crate::eval::score::Sample;
use crate::eval::{Evaluated, ModelResult};
use crate::files::{append_line, write_atomically};

/// Schema of `run.json` and `status.json`.
pub const RUN_SCHEMA: &str = "strata.run/1";

/// Schema of a line of `results.jsonl`.
const LINE_SCHEMA: &str = "strata.run-result/1";

/// How long a process that takes a run over waits for the one that had it.
pub const TAKE_OVER: Duration = Duration::from_secs(30);
/// How long the lock of a run that nobody should hold is waited for: somebody may be looking at it.
const LOOKED_AT: Duration = Duration::from_millis(500);

/// What a run does, beside its session.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Request {
    pub schema: String,
    pub title: String,
    /// The session's file, where it has one.
    pub session_file: Option<PathBuf>,
    pub options: ReplayOptions,
}

impl Request {
    /// What a replay of `session` does.
    pub fn new(title: impl Into<String>, session_file: Option<PathBuf>, options: ReplayOptions) -> Self {
        Self { schema: RUN_SCHEMA.into(), title: title.into(), session_file, options }
    }
}

/// Runs that are over and are kept, the newest.
pub const KEPT: usize = 50;

/// For how long a run that was handed over may belong to no process: one ends before the other begins.
const HAND_OVER: Duration = Duration::from_secs(10);

/// How a run stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    Waiting,
    Running,
    Paused,
    Done,
    Failed,
    Cancelled,
    /// Its process ended before it did.
    Interrupted,
}

impl State {
    /// Whether nothing happens to the run any more.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled | Self::Interrupted)
    }

    /// Whether the run can be taken up again.
    pub fn can_resume(self) -> bool {
        matches!(self, Self::Failed | Self::Cancelled | Self::Interrupted)
    }

    /// As it is written.
    pub fn name(self) -> &'static str {
        match self {
            Self::Waiting => "waiting",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Interrupted => "interrupted",
        }
    }
}

/// `status.json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub schema: String,
    pub id: String,
    pub title: String,
    pub model: String,
    pub state: State,
    /// Jobs of the run that have begun, and their number.
    pub job: usize,
    pub jobs: usize,
    /// The job at hand.
    pub progress: Snapshot,
    pub resident_bytes: u64,
    /// UTC.
    pub began: String,
    pub updated: String,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// A line of `results.jsonl`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Line {
    schema: String,
    entry: Entry,
}

/// What a line says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Entry {
    Made {
        variant: String,
        path: PathBuf,
    },
    /// The evaluation has begun: rows scored from here on are kept when it is resumed.
    Evaluating,
    Measured {
        result: Box<ModelResult>,
        samples: Vec<Sample>,
    },
}

/// What a run has made so far.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Made {
    pub variants: BTreeMap<String, PathBuf>,
    pub evaluation_begun: bool,
    /// In the order of their evaluation, the latest of each name.
    pub results: Vec<Evaluated>,
}

/// The folder of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    folder: PathBuf,
}

impl Run {
    /// Writes a run down in `root` (see [`paths::runs_directory`]); it waits until a [`RunWriter`] starts it.
    pub fn create(root: &Path, session: &Session, request: &Request) -> Result<Self> {
        let folder = Self::new_folder(root)?;
        let run = Self { folder };
        session.save(&run.file("session.toml"))?;
        write_atomically(&run.file("run.json"), json(request)?.as_bytes())?;
        let jobs = session.variants.len() + usize::from(!request.options.skip_evaluation);
        let now = now();
        run.write_status(&Status {
            schema: RUN_SCHEMA.into(),
            id: run.id(),
            title: request.title.clone(),
            model: session.model.name(),
            state: State::Waiting,
            job: 0,
            jobs: if request.options.variant.is_some() { 1 + usize::from(!request.options.skip_evaluation) } else { jobs },
            progress: Snapshot::default(),
            resident_bytes: 0,
            began: now.clone(),
            updated: now,
            message: None,
            hint: None,
        })?;
        Self::prune(root, KEPT);
        Ok(run)
    }

    /// A folder that no other run has, named by the time.
    fn new_folder(root: &Path) -> Result<PathBuf> {
        fs::create_dir_all(root).map_err(|error| Error::io("creating", root, &error))?;
        let time: String = now().chars().filter(char::is_ascii_digit).collect();
        let (day, clock) = time.split_at(8);
        for number in 0.. {
            let folder = root.join(format!("{day}-{clock}-{:x}{number}", std::process::id() & 0xfff));
            match fs::create_dir(&folder) {
                Ok(()) => return Ok(folder),
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Error::io("creating", &folder, &error)),
            }
        }
        Err(Error::run(format!("no name is left for a run in {}", root.display())))
    }

    /// The run in `root` whose id is `name` or, alone among all, begins with it; `last` is the newest.
    pub fn find(root: &Path, name: &str) -> Result<Self> {
        let ids = ids(root);
        let begins: Vec<&String> = ids.iter().filter(|id| id.starts_with(name)).collect();
        let found = match (name, &begins[..]) {
            ("last", _) => ids.last(),
            (_, [id]) => Some(*id),
            _ => ids.iter().find(|id| *id == name),
        };
        let Some(id) = found else {
            let what = if begins.len() > 1 { "several runs begin with" } else { "there is no run" };
            return Err(Error::input(format!("{what} `{name}`")).hint("`strata runs` lists them; `last` is the newest"));
        };
        Ok(Self { folder: root.join(id) })
    }

    /// Every run of `root`, the newest first. Folders that cannot be read are left out.
    pub fn list(root: &Path) -> Vec<Status> {
        let runs = ids(root).into_iter().rev().map(|id| Self { folder: root.join(id) });
        runs.filter_map(|run| run.status().ok()).collect()
    }

    /// Its name among all runs.
    pub fn id(&self) -> String {
        self.folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The path of one of its files.
    pub fn file(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// The session that is replayed.
    pub fn session(&self) -> Result<Session> {
        Session::read(&self.file("session.toml"))
    }

    /// How it is replayed.
    pub fn request(&self) -> Result<Request> {
        read_json(&self.file("run.json"))
    }

    /// Whether its process left it to another one moments ago, which may not have begun yet.
    pub fn is_handed_over(&self) -> bool {
        let path = self.file("status.json");
        let fresh = fs::metadata(&path).and_then(|data| data.modified()).is_ok_and(|at| at.elapsed().is_ok_and(|age| age < HAND_OVER));
        fresh && read_json::<Status>(&path).is_ok_and(|status| status.state == State::Waiting)
    }

    /// How it stands: what its process last wrote, or that this process is gone.
    pub fn status(&self) -> Result<Status> {
        let mut status: Status = read_json(&self.file("status.json"))?;
        if !status.state.is_over() {
            match Lock::look(&self.file("lock")) {
                Holding::Held(_) => {}
                Holding::Free => status.state = State::Interrupted,
                Holding::Stale(owner) => {
                    status.state = State::Interrupted;
                    let why = if owner.is_of_another_boot() { "the machine was started anew" } else { "it was killed" };
                    status.message = Some(format!("process {} is gone: {why}", owner.pid));
                }
            }
        }
        Ok(status)
    }

    fn write_status(&self, status: &Status) -> Result<()> {
        // Without `sync`: after a loss of power a run is interrupted, whatever its status said.
        let (path, temporary) = (self.file("status.json"), self.file("status.tmp"));
        let text = json(status)?;
        fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &path)).map_err(|error| Error::io("writing", &path, &error))
    }

    /// Takes the run for this process, which waits up to `patience` for the one that has it.
    pub fn lock(&self, patience: Duration) -> Result<Lock> {
        Lock::take(&self.file("lock"), patience.max(LOOKED_AT))
    }

    /// Asks the process that runs it to stop.
    pub fn request_cancel(&self) -> Result<()> {
        let path = self.file("cancel");
        fs::write(&path, "").map_err(|error| Error::io("writing", &path, &error))
    }

    /// The last `lines` lines of its log.
    pub fn log_tail(&self, lines: usize) -> Vec<String> {
        let text = fs::read_to_string(self.file("log")).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].iter().map(|line| (*line).to_owned()).collect()
    }

    /// Notes what it has made, or that its evaluation begins.
    fn keep(&self, entry: Entry) -> Result<()> {
        let line = serde_json::to_string(&Line { schema: LINE_SCHEMA.into(), entry });
        append_line(&self.file("results.jsonl"), &line.map_err(|error| Error::run(format!("a result cannot be written: {error}")))?)
    }

    /// What it has made so far.
    pub fn made(&self) -> Made {
        let bytes = fs::read(self.file("results.jsonl")).unwrap_or_default();
        let mut made = Made::default();
        // A line that was cut off by a kill says nothing.
        let entry = |line: &[u8]| match serde_json::from_slice::<Line>(line) {
            Ok(line) => (line.schema == LINE_SCHEMA).then_some(line.entry),
            // As runs were written before lines had a schema.
            Err(_) => serde_json::from_slice(line).ok(),
        };
        for entry in bytes.split(|byte| *byte == b'\n').filter_map(entry) {
            match entry {
                Entry::Made { variant, path } => drop(made.variants.insert(variant, path)),
                Entry::Evaluating => made.evaluation_begun = true,
                Entry::Measured { result, samples } => {
                    made.results.retain(|other| other.result.variant != result.variant);
                    made.results.push(Evaluated { result: *result, samples });
                }
            }
        }
        made.variants.retain(|_, path| path.exists());
        made
    }

    /// Takes note that somebody has looked at how it ended.
    pub fn mark_seen(&self) {
        // Without the note the folder is kept longer than needed.
        drop(fs::write(self.file("seen"), ""));
    }

    /// Whether it went wrong and nobody has looked at it since.
    fn is_unread_failure(&self, state: State) -> bool {
        matches!(state, State::Failed | State::Interrupted) && !self.file("seen").exists()
    }

    /// Removes the oldest runs of `root` that are over, so that `keep` of them stay. One that failed or was interrupted stays
    /// until somebody has looked at it. Returns the names of those that are gone.
    pub fn prune(root: &Path, keep: usize) -> Vec<String> {
        let over = Self::list(root).into_iter().filter(|status| status.state.is_over());
        let old = over.skip(keep).map(|status| (Self { folder: root.join(&status.id) }, status));
        let removable = old.filter(|(run, status)| !run.is_unread_failure(status.state) && !run.is_handed_over());
        // What another process holds or removes meanwhile is not this one's to remove.
        removable.filter(|(run, _)| run.remove().is_ok()).map(|(_, status)| status.id).collect()
    }

    /// Removes the folder of a run that is over; variants and results stay.
    pub fn remove(&self) -> Result<()> {
        let _lock = self.lock(Duration::ZERO)?;
        fs::remove_dir_all(&self.folder).map_err(|error| Error::io("removing", &self.folder, &error))
    }
}

/// The user's runs, see [`Run::list`].
pub fn list() -> Vec<Status> {
    Run::list(&paths::runs_directory())
}

/// The user's run of this name, see [`Run::find`].
pub fn find(name: &str) -> Result<Run> {
    Run::find(&paths::runs_directory(), name)
}

/// Names of the runs, the oldest first.
fn ids(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let mut ids: Vec<String> = entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    ids.sort();
    ids
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string_pretty(value).map_err(|error| Error::run(format!("a run cannot be written down: {error}")))
}

fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<T> {
    let text = fs::read(path).map_err(|error| Error::io("reading", path, &error))?;
    serde_json::from_slice(&text).map_err(|error| Error::run(format!("{} is damaged or of another version: {error}", path.display())))
}

fn now() -> String {
    utc(SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A kill tears the line that is being written; what the process that goes on writes stands alone behind it.
    #[test]
    fn a_torn_line_swallows_none_of_those_that_follow() {
        use std::io::Write;
        let root = tempfile::tempdir().unwrap();
        let request = Request::new("a run", None, ReplayOptions::default());
        let run = Run::create(root.path(), &Session::demo().unwrap(), &request).unwrap();
        let made = |variant: &str| Entry::Made { variant: variant.into(), path: root.path().into() };
        run.keep(made("a")).unwrap();
        let path = run.file("results.jsonl");
        // In the middle of a character, too.
        fs::OpenOptions::new().append(true).open(&path).unwrap().write_all(b"{\"schema\": \"strata.run-result/1\", \"\xc3").unwrap();
        run.keep(made("b")).unwrap();
        run.keep(Entry::Evaluating).unwrap();
        let newer = serde_json::to_string(&Line { schema: "strata.run-result/2".into(), entry: made("c") }).unwrap();
        append_line(&path, &newer).unwrap();
        let found = run.made();
        assert_eq!((found.variants.into_keys().collect::<Vec<_>>(), found.evaluation_begun), (vec!["a".into(), "b".into()], true));
    }

    #[test]
    fn the_newest_are_kept_and_so_is_a_failure_that_nobody_has_seen() {
        let root = tempfile::tempdir().unwrap();
        let request = Request::new("a run", None, ReplayOptions::default());
        let runs: Vec<Run> = (0..6).map(|_| Run::create(root.path(), &Session::demo().unwrap(), &request).unwrap()).collect();
        let end = |run: &Run, state: State| {
            let status = Status { state, ..read_json(&run.file("status.json")).unwrap() };
            run.write_status(&status).unwrap();
        };
        let states = [State::Done, State::Failed, State::Failed, State::Cancelled, State::Done, State::Done];
        runs.iter().zip(states).for_each(|(run, state)| end(run, state));
        runs[2].mark_seen();
        let gone = Run::prune(root.path(), 2);
        assert_eq!(gone, [runs[3].id(), runs[2].id(), runs[0].id()]);
        let left: Vec<String> = Run::list(root.path()).into_iter().map(|status| status.id).collect();
        assert_eq!(left, [runs[5].id(), runs[4].id(), runs[1].id()]);
        assert!(Run::prune(root.path(), 2).is_empty());
        // One that its process holds is not over.
        end(&runs[4], State::Running);
        let _lock = runs[4].lock(Duration::ZERO).unwrap();
        assert!(Run::prune(root.path(), 1).is_empty());
    }
}
