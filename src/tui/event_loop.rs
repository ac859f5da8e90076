//! The loop: waits for keys, the engine, background work and signals; updates the state; carries effects out; draws.
//!
//! Its input stream and its screen are parameters, so that tests type keys through it.

use std::future::poll_fn;
use std::io;
use std::task::Poll;
use std::time::{Duration, Instant};

use crossterm::event::{Event as Input, KeyEventKind};
use futures_util::{Stream, StreamExt};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::time::sleep_until;

use super::effects::{Outside, Performed};
use super::message::{Effect, Msg};
use super::state::State;
use super::terminal::Screen;
use super::update::update;
use crate::engine::{Engine, Event};
use crate::error::{Error, Result};
use crate::eval::memory;

/// Least time between two frames that only jobs ask for; keys are answered at once.
const FRAME: Duration = Duration::from_millis(33);
/// How often the clock moves while something on the screen depends on it.
const TICK: Duration = Duration::from_secs(1);
/// How long after an edit it is in the recovery file.
const AUTOSAVE: Duration = Duration::from_secs(1);

/// What a signal asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// Leave without asking: SIGTERM, SIGINT from outside.
    Terminate,
    /// The terminal is gone: SIGHUP.
    Hangup,
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
    pub outside: Outside,
}

impl<S: Screen> EventLoop<'_, S> {
    /// Runs until the user leaves, a signal says so, or the input ends and no run is left. Returns the state and the
    /// screen as they were, and what is to be said on the ordinary screen.
    pub async fn run(mut self, input: impl Stream<Item = io::Result<Input>> + Unpin) -> Result<(State, S, Option<String>)> {
        let mut input = Some(input.fuse());
        let start = Instant::now();
        let (background, mut answers) = unbounded_channel();
        let mut last_frame: Option<Instant> = None;
        let mut last_tick = start;
        let mut autosave: Option<Instant> = None;
        let effects = self.tick(start);
        self.perform(effects, &background)?;
        // Before the first frame, so that nothing jumps; the answers come when they come.
        self.perform(vec![Effect::Inspect, Effect::Recall], &background)?;
        let (mut dirty, mut urgent) = (true, true);
        loop {
            if dirty && (urgent || last_frame.is_none_or(|frame| frame.elapsed() >= FRAME)) {
                if input.is_some() {
                    self.screen.check()?;
                    if self.screen.draw(&self.state).is_err() {
                        input = None;
                        self.lose_terminal(&background)?;
                    }
                }
                last_frame = Some(Instant::now());
                (dirty, urgent) = (false, false);
            }
            if input.is_none() && !self.state.queue.is_busy() {
                return Ok(self.end(None));
            }
            let next_frame = (dirty && input.is_some()).then(|| last_frame.map_or_else(Instant::now, |frame| frame + FRAME));
            let next_tick = self.state.wants_ticks().then_some(last_tick + TICK);
            let wake = next_frame.into_iter().chain(next_tick).chain(autosave).min();
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
                    // A shell that ends lets what it started go on, which is stopped by nothing: there is no terminal.
                    Some(Signal::Continue) => {
                        if input.is_some() && self.screen.resume().is_err() {
                            input = None;
                            self.lose_terminal(&background)?;
                        }
                        (dirty, urgent) = (true, true);
                    }
                    Some(Signal::Hangup) => {
                        if input.take().is_some() {
                            self.lose_terminal(&background)?;
                        }
                    }
                    Some(Signal::Terminate) | None => return Ok(self.end(None)),
                },
                event = next(&mut input) => match event.map(translate) {
                    Some(Ok(message)) => {
                        messages.extend(message);
                        // A held key or a paste is taken in whole before a frame is drawn.
                        while let Some(event) = ready(&mut input).await {
                            // An error is met again by the next read.
                            messages.extend(translate(event).unwrap_or_default());
                        }
                        urgent = true;
                    }
                    // The terminal's end comes as a signal, as an error, or as the end of its input: whichever is first.
                    Some(Err(_)) | None => {
                        input = None;
                        self.lose_terminal(&background)?;
                    }
                },
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
            let second = next_tick.is_some_and(|at| at <= Instant::now());
            if second {
                last_tick = Instant::now();
                messages.push(Msg::Second);
            }
            if !messages.is_empty() {
                let effects = self.tick(start);
                self.perform(effects, &background)?;
                dirty = true;
            }
            for message in messages {
                if let Msg::Engine(event) = &message {
                    self.outside.note(event, &self.state);
                }
                let effects = update(&mut self.state, message);
                if let Performed::Quit(farewell) = self.perform(effects, &background)? {
                    return Ok(self.end(farewell));
                }
            }
            if autosave.is_some_and(|at| at <= Instant::now()) {
                autosave = None;
                self.autosave();
            } else if autosave.is_none() && self.outside.recovery_is_behind(&self.state) {
                autosave = Some(Instant::now() + AUTOSAVE);
            }
        }
    }

    /// The terminal is gone. What runs goes on; without anything to do the loop ends.
    fn lose_terminal(&mut self, background: &UnboundedSender<Msg>) -> Result<()> {
        let effects = update(&mut self.state, Msg::TerminalLost);
        self.perform(effects, background)?;
        let run = self.state.queue.runs.iter().find(|run| !run.is_over()).and_then(|run| run.id.as_deref());
        self.screen.lose(run.map(|id| self.outside.output_of(id)).as_deref())
    }

    fn autosave(&mut self) {
        if let Err(error) = self.outside.keep_for_recovery(&self.state) {
            self.state.complain(&error.context("the session cannot be kept for recovery"));
        }
    }

    fn end(mut self, farewell: Option<String>) -> (State, S, Option<String>) {
        self.autosave();
        (self.state, self.screen, farewell)
    }

    /// Tells the state what time it is.
    fn tick(&mut self, start: Instant) -> Vec<Effect> {
        let resident_bytes = memory::resident_bytes().unwrap_or(0);
        update(&mut self.state, Msg::Tick { clock: start.elapsed(), resident_bytes })
    }

    /// Carries effects out, in order; what an effect answers may have effects again.
    fn perform(&mut self, effects: Vec<Effect>, background: &UnboundedSender<Msg>) -> Result<Performed> {
        let mut effects = std::collections::VecDeque::from(effects);
        while let Some(effect) = effects.pop_front() {
            let answer = match effect {
                Effect::Copy(text) => Msg::Copied(self.screen.copy(&text)),
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
                effect => match self.outside.perform(effect, &self.state, self.engine, background) {
                    Performed::Answered(answer) => *answer,
                    Performed::Nothing => continue,
                    Performed::Quit(farewell) => return Ok(Performed::Quit(farewell)),
                },
            };
            if matches!(&answer, Msg::Saved { outcome, .. } if !matches!(outcome, super::message::SaveOutcome::Done)) {
                // Whatever was to follow (leaving) shall not follow a failed save.
                effects.clear();
            }
            effects.extend(update(&mut self.state, answer));
        }
        Ok(Performed::Nothing)
    }
}

/// The next input; never, once the terminal is gone.
async fn next<I>(input: &mut Option<impl Stream<Item = I> + Unpin>) -> Option<I> {
    match input {
        Some(input) => input.next().await,
        None => std::future::pending().await,
    }
}

/// The next input if it is there already. It is asked for with the loop's own waker: the terminal's stream keeps the
/// waker that it was last asked with, and would never wake the loop again if that were another.
async fn ready<I>(input: &mut Option<impl Stream<Item = I> + Unpin>) -> Option<I> {
    let input = input.as_mut()?;
    poll_fn(|context| match input.poll_next_unpin(context) {
        Poll::Ready(event) => Poll::Ready(event),
        Poll::Pending => Poll::Ready(None),
    })
    .await
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
