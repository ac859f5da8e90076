//! The loop: waits for keys, the engine, background work and signals; updates the state; carries effects out; draws.
//!
//! Its input stream and its screen are parameters, so that tests type keys through it.

use std::future::poll_fn;
use std::io::{self, Write};
use std::task::Poll;
use std::time::{Duration, Instant};

use crossterm::event::{Event as Input, KeyEventKind};
use futures_util::{Stream, StreamExt};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::sleep_until;

use super::document::Document;
use super::message::{Effect, Msg, SaveOutcome, ToCompare};
use super::state::{Compared, State};
use super::terminal::Screen;
use super::update::update;
use crate::analysis::Inventory;
use crate::checkpoint;
use crate::engine::inspect::inspect as inspect_block;
use crate::engine::{Engine, Event};
use crate::error::{Error, Result};
use crate::eval::{Task, memory, paired};
use crate::session::Session;

/// Least time between two frames that only jobs ask for; keys are answered at once.
const FRAME: Duration = Duration::from_millis(33);
/// How often the clock moves while a job runs.
const TICK: Duration = Duration::from_secs(1);

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Leave without asking: SIGTERM, SIGHUP, SIGINT from outside.
    Terminate,
    /// The process was stopped and goes on.
    Continue,
}

/// The running workbench.
pub struct EventLoop<'a, S: Screen> {
    pub state: State,
    pub screen: S,
    pub engine: &'a Engine,
    pub events: UnboundedReceiver<Event>,
    pub signals: UnboundedReceiver<Signal>,
}

impl<S: Screen> EventLoop<'_, S> {
    /// Runs until the user leaves, a signal says so, or the input ends. Returns the state and the screen as they were.
    pub async fn run(mut self, input: impl Stream<Item = io::Result<Input>> + Unpin) -> Result<(State, S)> {
        let mut input = input.fuse();
        let start = Instant::now();
        let (background, mut answers) = unbounded_channel();
        let mut last_frame: Option<Instant> = None;
        let mut last_tick = start;
        let effects = self.tick(start);
        self.perform(effects, &background)?;
        // Before the first frame, so that nothing jumps; the answer comes when it comes.
        self.perform(vec![Effect::Inspect], &background)?;
        let (mut dirty, mut urgent) = (true, true);
        loop {
            if dirty && (urgent || last_frame.is_none_or(|frame| frame.elapsed() >= FRAME)) {
                self.screen.draw(&self.state)?;
                last_frame = Some(Instant::now());
                (dirty, urgent) = (false, false);
            }
            let running = self.state.queue.running().is_some();
            let next_frame = dirty.then(|| last_frame.map_or_else(Instant::now, |frame| frame + FRAME));
            let next_tick = running.then_some(last_tick + TICK);
            let wake = next_frame.into_iter().chain(next_tick).min();
            let timer = async {
                match wake {
                    Some(at) => sleep_until(at.into()).await,
                    None => std::future::pending().await,
                }
            };
            let mut messages = Vec::new();
            tokio::select! {
                biased;
                signal = self.signals.recv() => match signal {
                    Some(Signal::Continue) => {
                        self.screen.resume()?;
                        (dirty, urgent) = (true, true);
                    }
                    Some(Signal::Terminate) | None => return Ok((self.state, self.screen)),
                },
                event = input.next() => {
                    let Some(event) = event else { return Ok((self.state, self.screen)) };
                    messages.extend(translate(event)?);
                    // A held key or a paste is taken in whole before a frame is drawn.
                    while let Some(event) = ready(&mut input).await {
                        messages.extend(translate(event)?);
                    }
                    urgent = true;
                }
                answer = answers.recv() => messages.extend(answer),
                event = self.events.recv() => {
                    let Some(event) = event else { return Err(Error::run("the engine has stopped")) };
                    messages.push(Msg::Engine(event));
                    while let Ok(event) = self.events.try_recv() {
                        messages.push(Msg::Engine(event));
                    }
                }
                () = timer => {}
            }
            if !messages.is_empty() || next_tick.is_some_and(|at| at <= Instant::now()) {
                last_tick = Instant::now();
                let effects = self.tick(start);
                self.perform(effects, &background)?;
                dirty = true;
            }
            for message in messages {
                let effects = update(&mut self.state, message);
                if self.perform(effects, &background)? {
                    return Ok((self.state, self.screen));
                }
            }
        }
    }

    /// Tells the state what time it is.
    fn tick(&mut self, start: Instant) -> Vec<Effect> {
        let resident_bytes = memory::resident_bytes().unwrap_or(0);
        update(&mut self.state, Msg::Tick { clock: start.elapsed(), resident_bytes })
    }

    /// Carries effects out, in order; returns whether the loop ends. What an effect answers may have effects again.
    fn perform(&mut self, effects: Vec<Effect>, background: &UnboundedSender<Msg>) -> Result<bool> {
        let mut effects = std::collections::VecDeque::from(effects);
        while let Some(effect) = effects.pop_front() {
            let answer = match effect {
                Effect::Quit => return Ok(true),
                Effect::Submit(job) => Msg::Submitted(self.engine.submit(*job)),
                Effect::Cancel(id) => {
                    self.engine.cancel(id);
                    continue;
                }
                Effect::Save { path, session, overwrite } => {
                    let outcome = if !overwrite && path.exists() {
                        SaveOutcome::Exists
                    } else {
                        session.save(&path).map_or_else(SaveOutcome::Failed, |()| SaveOutcome::Done)
                    };
                    if !matches!(outcome, SaveOutcome::Done) {
                        // Whatever was to follow (leaving) shall not follow a failed save.
                        effects.clear();
                    }
                    Msg::Saved { path, session, outcome }
                }
                Effect::Open(path) => {
                    let sender = background.clone();
                    tokio::task::spawn_blocking(move || {
                        let document = Session::read(&path).and_then(Document::open).map(Box::new);
                        // The loop may have ended meanwhile.
                        let _ = sender.send(Msg::Opened { path, document });
                    });
                    continue;
                }
                Effect::Inspect => {
                    let settings = self.state.document.settings().model.clone();
                    let sender = background.clone();
                    tokio::task::spawn_blocking(move || {
                        let inventory = inspect(&settings.name(), settings.sha256.as_deref()).map(Box::new);
                        let _ = sender.send(Msg::Inspected { model: settings.name(), inventory });
                    });
                    continue;
                }
                Effect::Look { model, block, cancel } => {
                    let sender = background.clone();
                    tokio::task::spawn_blocking(move || {
                        let send = |look| drop(sender.send(Msg::Looked { model: model.clone(), block, look }));
                        let outcome = inspect_block(&model, block, &cancel, |look| send(Ok(Some(look))));
                        send(outcome.map(|()| None));
                    });
                    continue;
                }
                Effect::Compare(request) => {
                    let sender = background.clone();
                    tokio::task::spawn_blocking(move || {
                        let _ = sender.send(Msg::Compared(compare(*request).map(Box::new)));
                    });
                    continue;
                }
                Effect::Copy(text) => Msg::Copied(self.screen.copy(&text)),
                Effect::Write { path, text } => {
                    let write = || std::fs::File::create_new(&path)?.write_all(text.as_bytes());
                    let outcome = write().map_err(|error| match error.kind() {
                        io::ErrorKind::AlreadyExists => {
                            Error::input(format!("{} is there already", path.display())).hint("give another name")
                        }
                        _ => Error::io("writing", &path, &error),
                    });
                    Msg::Written { path, outcome }
                }
                Effect::Mouse(on) => {
                    self.screen.set_mouse(on)?;
                    continue;
                }
                Effect::Suspend => {
                    self.screen.suspend()?;
                    let (width, height) = self.screen.size()?;
                    Msg::Resize(width, height)
                }
                Effect::Redraw => {
                    self.screen.clear()?;
                    continue;
                }
            };
            effects.extend(update(&mut self.state, answer));
        }
        Ok(false)
    }
}

/// The next input if it is there already. It is asked for with the loop's own waker: the terminal's stream keeps the
/// waker that it was last asked with, and would never wake the loop again if that were another.
async fn ready<I>(input: &mut (impl Stream<Item = I> + Unpin)) -> Option<I> {
    poll_fn(|context| match input.poll_next_unpin(context) {
        Poll::Ready(event) => Poll::Ready(event),
        Poll::Pending => Poll::Ready(None),
    })
    .await
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

fn translate(event: io::Result<Input>) -> Result<Option<Msg>> {
    Ok(match event.map_err(|error| Error::run(format!("reading from the terminal failed: {error}")))? {
        Input::Key(key) if key.kind != KeyEventKind::Release => Some(Msg::Key(key)),
        Input::Mouse(event) => Some(Msg::Mouse(event)),
        Input::Paste(text) => Some(Msg::Paste(text)),
        Input::Resize(width, height) => Some(Msg::Resize(width, height)),
        _ => None,
    })
}
