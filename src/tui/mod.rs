//! The workbench: a terminal interface over the engine. Start with [`run`].
//!
//! [`state`] holds everything the screen shows; [`update`] is the one function that changes it, from [`message`]s to
//! effects; [`view`] and the [`panes`] draw it; [`event_loop`] waits, updates, carries effects out and draws. Every
//! command is a row of [`command_table`], from which keys, hints, help and palette come. The session being edited is a
//! [`document`]; the jobs are a [`queue`] of runs; what was measured is found by plan in [`measurements`], and what the
//! model's parts lose in [`losses`], from which [`allocating`] finds plans.

mod actions;
mod allocating;
mod ascii;
mod background;
pub mod bench;
mod changes;
mod clipboard;
mod command_table;
mod commands;
mod document;
mod effects;
mod event_loop;
mod filter;
mod keymap;
mod keys;
mod known;
mod losses;
mod measurements;
mod message;
mod mouse;
mod overrides;
mod panes;
mod popups;
mod queue;
mod state;
pub mod terminal;
#[cfg(test)]
mod tests;
mod text;
mod theme;
mod tree;
mod update;
mod view;

use std::path::PathBuf;
use std::time::Duration;

use crossterm::event::EventStream;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};

use crate::backend::DeviceChoice;
use crate::engine::{Engine, EngineOptions};
use crate::error::{Error, Result};
use crate::eval::memory;
use crate::session::paths::{self, Places};
use crate::session::remembered::Remembered;
use crate::session::{Session, recovery};
use document::Document;
use effects::Outside;
use event_loop::{EventLoop, Signal};
use state::State;
use terminal::{Screen, TerminalScreen};
use theme::Theme;

/// What the workbench opens with.
#[derive(Debug, Clone)]
pub struct WorkbenchOptions {
    pub session: Session,
    /// The session's file; without one, saving asks for a path.
    pub session_path: Option<PathBuf>,
    /// Threads of the computing pool; `None` takes one for each processor.
    pub threads: Option<usize>,
    pub device: DeviceChoice,
    /// Draw with ASCII only.
    pub ascii: bool,
    /// A built-in theme's name or a theme file.
    pub theme: Option<String>,
    /// Memory that a model may take.
    pub host_memory: Option<u64>,
    /// Change no session, no file and no job.
    pub read_only: bool,
}

/// How long leaving waits for the worker to stop.
const PATIENCE: Duration = Duration::from_millis(300);

/// Opens the workbench on the terminal and returns when the user leaves it, with what is to be said then. The terminal
/// is restored whatever happens.
pub fn run(options: WorkbenchOptions) -> Result<Option<String>> {
    // What can be wrong with the input is said on the ordinary screen, before the other one is taken.
    let places = Places::user();
    let remembered = Remembered::read(&places.remembered());
    let (theme, ask) = theme(&options, &remembered)?;
    let keymap = keymap::Keymap::of_user()?;
    let document = Document::open(options.session)?;
    let (engine, events) = Engine::start(&EngineOptions { threads: options.threads, device: options.device })?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .map_err(|error| Error::run(format!("the event loop cannot be started: {error}")))?;
    terminal::restore_on_panic();
    let outcome: Result<Option<String>> = runtime.block_on(async {
        let signals = signals()?;
        let mut screen = TerminalScreen::take()?;
        let mut state = State::new(document, options.session_path, theme, options.ascii, screen.size()?);
        state.keymap = keymap;
        if ask {
            screen.ask_background()?;
            state.background.ask(std::time::Duration::ZERO);
        }
        if !options.read_only && popups::Tour::is_first_run() {
            state.popups.push(popups::Popup::Tour(popups::Tour));
        }
        state.queue.store = places.variants();
        state.queue.data = places.data.clone();
        state.queue.journal = Some(places.evaluations());
        state.queue.references = Some(paths::references_directory());
        state.queue.host_memory = options.host_memory;
        state.host_bytes = memory::total_bytes();
        state.read_only = options.read_only;
        state.recollect(&remembered);
        screen.set_mouse(state.mouse)?;
        state.say(
            "{format-w4a8}, {format-w8a8} or {format-w16a16} changes the format of a block; {run} runs the variant; {help} lists the keys",
        );
        // Looking for lost sessions takes away folders that hold nothing.
        if !options.read_only
            && let Some(lost) = recovery::lost(&places.recovery()).into_iter().next()
        {
            actions::files::offer_lost(&mut state, lost);
        }
        let mut arguments = vec![format!("--device={}", options.device)];
        arguments.extend(options.threads.map(|threads| format!("--threads={threads}")));
        let outside = Outside::new(places, arguments, options.read_only);
        let (_, _, farewell) = EventLoop { state, screen, engine: &engine, events, signals, outside }.run(EventStream::new()).await?;
        Ok(farewell)
    });
    terminal::restore();
    // Reading the weights for the inventory may go on: nobody waits for it.
    runtime.shutdown_background();
    engine.shutdown(PATIENCE);
    outcome
}

/// The theme of the first frame, and whether the terminal's background may change it: the one that was asked for, or else
/// none with `NO_COLOR`, or else the one that was chosen while running.
fn theme(options: &WorkbenchOptions, remembered: &Remembered) -> Result<(Theme, bool)> {
    let no_color = Theme::no_color();
    let chosen = remembered.theme.as_deref().filter(|_| options.theme.is_none() && !no_color);
    // A file that has gone since costs the choice.
    if let Some(theme) = chosen.and_then(|name| Theme::find(Some(name), false).ok()) {
        return Ok((theme, false));
    }
    Ok((Theme::find(options.theme.as_deref(), no_color)?, options.theme.is_none() && !no_color))
}

/// Signals as a channel of what they ask for.
fn signals() -> Result<UnboundedReceiver<Signal>> {
    let (sender, receiver) = unbounded_channel();
    for (kind, meaning) in [
        (SignalKind::terminate(), Signal::Terminate),
        (SignalKind::hangup(), Signal::Hangup),
        (SignalKind::interrupt(), Signal::Terminate),
        (SignalKind::from_raw(libc::SIGCONT), Signal::Continue),
    ] {
        let mut stream = signal(kind).map_err(|error| Error::run(format!("signals cannot be listened to: {error}")))?;
        let sender = sender.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                if sender.send(meaning).is_err() {
                    break;
                }
            }
        });
    }
    Ok(receiver)
}
