//! What the loop does outside the state: jobs, files, folders of runs, other processes.

use std::collections::HashMap;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tokio::sync::mpsc::UnboundedSender;

use super::document::Document;
use super::known::Known;
use super::losses::Solved;
use super::message::{Effect, Msg, SaveOutcome, ToCompare};
use super::queue::Purpose;
use super::state::{Compared, State};
use crate::analysis::{Inventory, sensitivity};
use crate::checkpoint;
use crate::engine::inspect::inspect as inspect_block;
use crate::engine::{Engine, Event, GpuMonitor};
use crate::error::{Error, Result};
use crate::eval::{Task, paired};
use crate::session::paths::Places;
use crate::session::recovery::{Lost, Recovery};
use crate::session::remembered::Remembered;
use crate::session::runs::{Ending, Notice, Request, Run, RunWriter};
use crate::session::{ReplayOptions, Session};

/// Lines of a followed run's log that are read.
const TAIL: usize = 200;

/// What came of an effect.
pub enum Performed {
    Nothing,
    Answered(Box<Msg>),
    /// The loop ends, with something to be said on the ordinary screen.
    Quit(Option<String>),
}

/// The world outside the state.
pub struct Outside {
    places: Places,
    /// Options of this process that one which goes on with a run shall have.
    arguments: Vec<String>,
    /// Of the runs that are not over, by their keys.
    writers: HashMap<u64, RunWriter>,
    /// Nothing in a read-only workbench, or where no folder can be made.
    recovery: Option<Recovery>,
    /// What the recovery folder holds.
    kept: Option<Session>,
    gpus: Option<std::sync::mpsc::Sender<()>>,
    read_only: bool,
}

impl Outside {
    /// The user's folders; `arguments` are for processes that go on with a run.
    pub fn new(places: Places, arguments: Vec<String>, read_only: bool) -> Self {
        let recovery = if read_only { None } else { Recovery::begin(&places.recovery()).ok() };
        Self { places, arguments, writers: HashMap::new(), recovery, kept: None, gpus: None, read_only }
    }

    /// Where a run without a terminal prints.
    pub fn output_of(&self, id: &str) -> PathBuf {
        self.places.runs().join(id).join("output")
    }

    /// Tells the running run's folder what happened.
    pub fn note(&self, event: &Event, state: &State) {
        if let Some(writer) = state.queue.running_run().and_then(|run| self.writers.get(&run.key)) {
            writer.event(event);
        }
    }

    /// Whether the recovery folder holds something else than it should.
    pub fn recovery_is_behind(&self, state: &State) -> bool {
        let unsaved = state.document.unsaved();
        self.recovery.is_some() && if unsaved { self.kept.as_ref() != Some(&state.document.session()) } else { self.kept.is_some() }
    }

    /// Puts what is not saved into the recovery folder.
    pub fn keep_for_recovery(&mut self, state: &State) -> Result<()> {
        let Some(recovery) = self.recovery.as_ref().filter(|_| self.recovery_is_behind(state)) else { return Ok(()) };
        if state.document.unsaved() {
            let session = state.document.session();
            recovery.keep(&session, state.path.as_deref())?;
            self.kept = Some(session);
        } else {
            recovery.forget()?;
            self.kept = None;
        }
        Ok(())
    }

    /// Carries an effect out.
    pub fn perform(&mut self, effect: Effect, state: &State, engine: &Engine, background: &UnboundedSender<Msg>) -> Performed {
        match effect {
            Effect::Quit => return Performed::Quit(self.leave(state)),
            Effect::Submit(job) => return answer(Msg::Submitted(engine.submit(*job))),
            Effect::Cancel(id) => engine.cancel(id),
            Effect::Pause(paused) => engine.pause(paused),
            Effect::OpenRun { key, title, session, purpose } => {
                let options = ReplayOptions {
                    skip_evaluation: purpose != Purpose::Evaluate,
                    measure: purpose == Purpose::Measure,
                    host_memory: state.queue.host_memory,
                    ..ReplayOptions::default()
                };
                let id = self.open_run(key, &session, &Request::new(title, state.path.clone(), options), background);
                return answer(Msg::RunOpened { key, id });
            }
            Effect::EndRun { key, ending } => {
                if let Some(writer) = self.writers.remove(&key) {
                    writer.end(ending);
                }
            }
            Effect::HandOver => {
                return match self.hand_over(state) {
                    Ok(farewell) => Performed::Quit(Some(farewell)),
                    Err(error) => answer(Msg::HandOverFailed(error)),
                };
            }
            Effect::Save { path, session, overwrite } => {
                let outcome = if !overwrite && path.exists() {
                    SaveOutcome::Exists
                } else {
                    session.save(&path).map_or_else(SaveOutcome::Failed, |()| SaveOutcome::Done)
                };
                if matches!(outcome, SaveOutcome::Done) {
                    self.remember(|remembered| remembered.used(&path));
                }
                return answer(Msg::Saved { path, session, outcome });
            }
            Effect::Open(path) => {
                self.remember(|remembered| {
                    state.remember(remembered);
                    remembered.used(&path);
                });
                let remembered = self.places.remembered();
                in_background(background, move || {
                    let open = |session| {
                        let mut document = Document::open(session)?;
                        document.select_named(Remembered::read(&remembered).edited(Some(&path), &document.settings().model.id));
                        Ok(Box::new(document))
                    };
                    let document = Session::read(&path).and_then(open);
                    Msg::Opened { path, document }
                });
            }
            Effect::Restore(lost) => in_background(background, move || {
                let document = restore(&lost);
                Msg::Restored { lost, document }
            }),
            Effect::Discard(lost) => {
                // What was restored is in this process's own folder before the other one goes.
                if let Err(error) = self.keep_for_recovery(state).and_then(|()| lost.discard()) {
                    return answer(Msg::Trouble(error));
                }
            }
            Effect::AskWhatIsRecent => {
                let recent = Remembered::read(&self.places.remembered()).recent;
                return answer(Msg::Recent(recent.into_iter().filter(|path| path.exists()).collect()));
            }
            Effect::Inspect => {
                let settings = state.document.settings().model.clone();
                in_background(background, move || {
                    let inventory = inspect(&settings.name(), settings.sha256.as_deref()).map(Box::new);
                    Msg::Inspected { model: settings.name(), inventory }
                });
            }
            Effect::Look { model, block, cancel } => {
                let sender = background.clone();
                tokio::task::spawn_blocking(move || {
                    let send = |look| drop(sender.send(Msg::Looked { model: model.clone(), block, look }));
                    let outcome = inspect_block(&model, block, &cancel, |look| send(Ok(Some(look))));
                    send(outcome.map(|()| None));
                });
            }
            Effect::Compare(request) => in_background(background, move || Msg::Compared(compare(*request).map(Box::new))),
            Effect::Write { path, text } => {
                let write = || std::fs::File::create_new(&path)?.write_all(text.as_bytes());
                let outcome = write().map_err(|error| match error.kind() {
                    std::io::ErrorKind::AlreadyExists => {
                        Error::input(format!("{} is there already", path.display())).hint("give another name")
                    }
                    _ => Error::io("writing", &path, &error),
                });
                return answer(Msg::Written { path, outcome });
            }
            Effect::Recall => {
                let (runs, session, layout) = (self.places.runs(), state.document.settings().clone(), state.document.layout.clone());
                in_background(background, move || {
                    let known = Box::new(Known::read(&runs, &session, &layout));
                    Msg::Recalled { model: session.model.name(), known }
                });
            }
            Effect::RecallLosses { model, key, spec } => {
                let store = self.places.data.clone();
                in_background(background, move || {
                    let found = checkpoint::open(&model).and_then(|checkpoint| sensitivity::recall(&checkpoint, &spec, store));
                    Msg::LossesRecalled { model, key, found: found.map(|found| found.map(Box::new)) }
                });
            }
            Effect::Solve(asked) => in_background(background, move || Msg::Solved(Box::new(Solved::new(*asked)))),
            Effect::LookAtRuns { follow } => {
                let (runs, read_only) = (self.places.runs(), self.read_only);
                in_background(background, move || {
                    let list = Run::list(&runs);
                    let followed = follow.and_then(|id| Run::find(&runs, &id).ok());
                    let over = |run: &Run| list.iter().any(|status| status.id == run.id() && status.state.is_over());
                    if let Some(run) = followed.as_ref().filter(|run| !read_only && over(run)) {
                        run.mark_seen();
                    }
                    let log = followed.map(|run| run.log_tail(TAIL)).unwrap_or_default();
                    Msg::Runs { list, log }
                });
            }
            Effect::CancelRun(id) => return self.about_run(&id, Run::request_cancel),
            Effect::RemoveRun(id) => return self.about_run(&id, Run::remove),
            Effect::ResumeRun(id) => return self.about_run(&id, |run| self.go_on_headless(std::slice::from_ref(run))),
            Effect::LookAtGpus => self.look_at_gpus(background),
            // The loop's own.
            Effect::Suspend | Effect::Redraw | Effect::Copy(_) | Effect::Mouse(_) => {}
        }
        Performed::Nothing
    }

    fn about_run(&self, id: &str, action: impl Fn(&Run) -> Result<()>) -> Performed {
        match Run::find(&self.places.runs(), id).and_then(|run| action(&run)) {
            Ok(()) => Performed::Nothing,
            Err(error) => answer(Msg::Trouble(error)),
        }
    }

    /// The folder of a new run. Without one the run can be neither followed nor resumed, but goes on.
    fn open_run(&mut self, key: u64, session: &Session, request: &Request, background: &UnboundedSender<Msg>) -> Option<String> {
        let sender = background.clone();
        let notify = move |notice| {
            let message = match notice {
                Notice::Cancel => Msg::CancelAsked(key),
                Notice::Trouble(error) => Msg::Trouble(error.context("the run goes on, and less of it is kept")),
            };
            // The loop may have ended meanwhile.
            drop(sender.send(message));
        };
        let start = || {
            let run = Run::create(&self.places.runs(), session, request)?;
            let lock = run.lock(std::time::Duration::ZERO)?;
            RunWriter::start(run, lock, self.places.results(), notify)
        };
        match start() {
            Ok(writer) => {
                let id = writer.id().to_owned();
                self.writers.insert(key, writer);
                Some(id)
            }
            Err(error) => {
                drop(background.send(Msg::Trouble(error.context("this run can be neither followed nor resumed"))));
                None
            }
        }
    }

    /// Ends every run that is not over for this process and starts another that goes on with them.
    fn hand_over(&mut self, state: &State) -> Result<String> {
        let open: Vec<u64> = state.queue.runs.iter().filter(|run| !run.is_over() && run.can_be_handed_over()).map(|run| run.key).collect();
        let mut runs = Vec::new();
        for key in open {
            let Some(writer) = self.writers.remove(&key) else {
                return Err(Error::run("a run has no folder that another process could go on from").hint("stay until it has ended"));
            };
            runs.push(Run::find(&self.places.runs(), writer.id())?);
            writer.end(Ending::HandedOver);
        }
        self.go_on_headless(&runs)?;
        // What is not saved stays in the recovery folder, and is offered at the next start.
        self.remember(|remembered| state.remember(remembered));
        let ids: Vec<String> = runs.iter().map(Run::id).collect();
        Ok(format!(
            "{} goes on without a screen; `strata runs follow {}` shows it",
            ids.join(", "),
            ids.first().map_or("last", String::as_str)
        ))
    }

    fn go_on_headless(&self, runs: &[Run]) -> Result<()> {
        let failed = |error: &std::io::Error| Error::run(format!("a process that goes on with the run cannot be started: {error}"));
        let Some(first) = runs.first() else { return Ok(()) };
        let output = first.file("output");
        let file = std::fs::OpenOptions::new().create(true).append(true).open(&output);
        let file = file.map_err(|error| Error::io("opening", &output, &error))?;
        let program = std::env::current_exe().map_err(|error| failed(&error))?;
        let mut command = Command::new(program);
        command.arg("replay").args(&self.arguments).args(["--own-session", "--resume"]).args(runs.iter().map(Run::id));
        command.stdin(Stdio::null()).stdout(file.try_clone().map_err(|error| failed(&error))?).stderr(file);
        command.spawn().map(drop).map_err(|error| failed(&error))
    }

    /// Takes note of how the screen looked; nothing is unsaved any more that the user wants to keep.
    fn leave(&mut self, state: &State) -> Option<String> {
        self.remember(|remembered| state.remember(remembered));
        if let Some(recovery) = self.recovery.take() {
            // What stays behind is offered at the next start, which is not wrong either.
            drop(recovery.forget());
        }
        None
    }

    /// Changes the state file. One that cannot be written costs only comfort.
    fn remember(&self, change: impl FnOnce(&mut Remembered)) {
        if !self.read_only {
            let path = self.places.remembered();
            let mut remembered = Remembered::read(&path);
            change(&mut remembered);
            drop(remembered.write(&path));
        }
    }

    /// Reads the GPUs on a thread of their own, since the library takes its time to load; it ends where there is none.
    fn look_at_gpus(&mut self, background: &UnboundedSender<Msg>) {
        let sender = background.clone();
        let asked = self.gpus.get_or_insert_with(|| {
            let (asked, requests) = std::sync::mpsc::channel();
            let read = move || {
                let Some(monitor) = GpuMonitor::find() else { return };
                while requests.recv().is_ok() && sender.send(Msg::Gpus(monitor.read())).is_ok() {}
            };
            // Without the thread there are no readings.
            drop(std::thread::Builder::new().name("strata-gpus".into()).spawn(read));
            asked
        });
        let _ = asked.send(());
    }
}

fn answer(message: Msg) -> Performed {
    Performed::Answered(Box::new(message))
}

fn in_background(background: &UnboundedSender<Msg>, work: impl FnOnce() -> Msg + Send + 'static) {
    let sender = background.clone();
    // The loop may have ended when the answer comes.
    tokio::task::spawn_blocking(move || drop(sender.send(work())));
}

/// A lost session, as a change of what its file holds.
fn restore(lost: &Lost) -> Result<Box<Document>> {
    let mut document = Document::open(lost.session.clone())?;
    let saved = match &lost.path {
        Some(path) => Session::read(path)?,
        None if lost.session.is_demo() => Session::demo()?,
        None => Session::new(&lost.session.model.id),
    };
    document.mark_saved(&saved);
    Ok(Box::new(document))
}

/// What the weights say, and whether they are those that the session was made for.
fn inspect(model: &str, sha256: Option<&str>) -> Result<Inventory> {
    let checkpoint = checkpoint::open(model)?;
    if let Some(expected) = sha256 {
        let found = checkpoint.sha256()?;
        if expected != found {
            return Err(Error::input(format!("{} has the hash {found}, and the session was made for {expected}", checkpoint.name))
                .hint("give the checkpoint that the session names, or remove `sha256` from its [model]"));
        }
    }
    Inventory::of_checkpoint(&checkpoint)
}

/// Compares two evaluations; the questions that changed sides come along to be read.
pub fn compare(request: ToCompare) -> Result<Compared> {
    let [a, b] = &request.samples;
    let comparison = paired::compare((&request.names[0], a), (&request.names[1], b));
    let mut questions = std::collections::BTreeMap::new();
    for task in Task::ALL {
        let flips: Vec<usize> = comparison.flips.iter().filter(|flip| flip.task == task.name()).map(|flip| flip.index).collect();
        if flips.is_empty() {
            continue;
        }
        let rows = match &request.data {
            Some(directory) => task.from_directory(directory, true)?,
            None => task.embedded()?,
        };
        let known = flips.into_iter().filter_map(|index| Some(((task.name().to_owned(), index), rows.questions.get(index)?.clone())));
        questions.extend(known);
    }
    Ok(Compared { samples: request.samples, comparison, questions })
}
