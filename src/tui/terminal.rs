//! The terminal: taking it over, giving it back whatever happens, drawing a frame in one write.

use std::fs::OpenOptions;
use std::io::{BufWriter, Stdout, Write, stdout};
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, Ordering};

use crossterm::cursor::{Hide, Show};
use crossterm::event::{DisableBracketedPaste, EnableBracketedPaste};
use crossterm::style::Print;
use crossterm::terminal::{
    BeginSynchronizedUpdate, EndSynchronizedUpdate, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use crossterm::{execute, queue};
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::layout::Rect;
use rustix::process::{Signal, getpid, kill_process};
use rustix::stdio::{dup2_stderr, dup2_stdin, dup2_stdout};

use super::state::State;
use super::{background, clipboard, view};
use crate::error::{Error, Result};

/// Whether the terminal is ours.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Whether clicks and the wheel are ours.
static MOUSE: AtomicBool = AtomicBool::new(true);

/// Buttons and the wheel, in SGR coordinates; not every movement, which would flood a slow link.
const CLICKS_ON: &str = "\x1b[?1000h\x1b[?1006h";
const CLICKS_OFF: &str = "\x1b[?1006l\x1b[?1000l";

fn clicks() -> &'static str {
    if MOUSE.load(Ordering::SeqCst) { CLICKS_ON } else { CLICKS_OFF }
}

/// Gives the terminal back: cursor, screen, paste and input modes. Does nothing when it was given back already, so that
/// normal exit, signals and the panic hook may all call it.
pub fn restore() {
    if TAKEN.swap(false, Ordering::SeqCst) {
        // A terminal that is gone (a lost connection) cannot be restored, and nobody is left to be told.
        let _ = execute!(stdout(), EndSynchronizedUpdate, Print(CLICKS_OFF), DisableBracketedPaste, LeaveAlternateScreen, Show);
        let _ = disable_raw_mode();
    }
}

fn take() -> Result<()> {
    let failed = |error: std::io::Error| {
        Error::input(format!("the terminal cannot be used: {error}"))
            .hint("run a command such as `strata replay` instead: see strata --help")
    };
    TAKEN.store(true, Ordering::SeqCst);
    enable_raw_mode().map_err(failed)?;
    execute!(stdout(), EnterAlternateScreen, EnableBracketedPaste, Hide, Print(clicks())).map_err(failed)
}

/// Makes a panic, on whatever thread, give the terminal back before it is reported.
pub fn restore_on_panic() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let report = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            restore();
            report(info);
        }));
    });
}

/// What the loop draws on. Tests have one in memory.
pub trait Screen {
    /// Draws the state.
    fn draw(&mut self, state: &State) -> Result<()>;
    /// Forgets what is on the screen, so that the next frame is drawn whole.
    fn clear(&mut self) -> Result<()>;
    /// Gives the terminal back, stops the process, and takes the terminal again when it goes on.
    fn suspend(&mut self) -> Result<()>;
    /// Takes the terminal again after something else stopped and continued the process.
    fn resume(&mut self) -> Result<()>;
    /// Gives up a terminal that is gone: what is printed from here on goes to the file `output`, or nowhere.
    fn lose(&mut self, output: Option<&Path>) -> Result<()>;
    /// An error when something else gave the terminal back, as a panic does.
    fn check(&self) -> Result<()>;
    /// Takes clicks and the wheel, or leaves them to the terminal.
    fn set_mouse(&mut self, on: bool) -> Result<()>;
    /// Puts a text into the clipboard; says where it is.
    fn copy(&mut self, text: &str) -> Result<&'static str>;
    /// Columns and rows.
    fn size(&self) -> Result<(u16, u16)>;
}

/// The terminal that standard output is.
pub struct TerminalScreen {
    terminal: Terminal<CrosstermBackend<BufWriter<Stdout>>>,
}

fn failed(error: impl std::fmt::Display) -> Error {
    Error::run(format!("writing to the terminal failed: {error}"))
}

impl TerminalScreen {
    /// Takes the terminal over.
    pub fn take() -> Result<Self> {
        take()?;
        let backend = CrosstermBackend::new(BufWriter::with_capacity(64 * 1024, stdout()));
        Ok(Self { terminal: Terminal::new(backend).map_err(failed)? })
    }

    /// Asks for the background's colour; the answer comes among the keys.
    pub fn ask_background(&self) -> Result<()> {
        execute!(stdout(), Print(background::QUESTION)).map_err(failed)
    }
}

impl Drop for TerminalScreen {
    fn drop(&mut self) {
        restore();
    }
}

impl Screen for TerminalScreen {
    fn draw(&mut self, state: &State) -> Result<()> {
        queue!(self.terminal.backend_mut(), BeginSynchronizedUpdate).map_err(failed)?;
        self.terminal.draw(|frame| view::draw(frame, state)).map_err(failed)?;
        queue!(self.terminal.backend_mut(), EndSynchronizedUpdate).map_err(failed)?;
        Write::flush(self.terminal.backend_mut()).map_err(failed)
    }

    fn clear(&mut self) -> Result<()> {
        // `Terminal::clear` would ask the terminal where its cursor is and wait for the answer.
        let (width, height) = self.size()?;
        self.terminal.resize(Rect::new(0, 0, width, height)).map_err(failed)
    }

    fn suspend(&mut self) -> Result<()> {
        restore();
        // The default action of the signal stops the process here.
        kill_process(getpid(), Signal::TSTP).map_err(failed)?;
        self.resume()
    }

    fn resume(&mut self) -> Result<()> {
        if TAKEN.load(Ordering::SeqCst) {
            // Stopped from outside: the screen is ours still, but the shell may have changed the input modes.
            disable_raw_mode().and_then(|()| enable_raw_mode()).map_err(failed)?;
            execute!(stdout(), EnableBracketedPaste, Hide, Print(clicks())).map_err(failed)?;
        } else {
            take()?;
        }
        self.clear()
    }

    fn lose(&mut self, output: Option<&Path>) -> Result<()> {
        // Nothing is left to restore, and writing to it would fail.
        TAKEN.store(false, Ordering::SeqCst);
        let nowhere = Path::new("/dev/null");
        let output = output.unwrap_or(nowhere);
        let opening = |path: &Path, error: &std::io::Error| Error::io("opening", path, error);
        let input = OpenOptions::new().read(true).open(nowhere).map_err(|error| opening(nowhere, &error))?;
        let file = OpenOptions::new().append(true).create(output != nowhere).open(output).map_err(|error| opening(output, &error))?;
        dup2_stdin(&input).and_then(|()| dup2_stdout(&file)).and_then(|()| dup2_stderr(&file)).map_err(failed)
    }

    fn check(&self) -> Result<()> {
        if TAKEN.load(Ordering::SeqCst) {
            return Ok(());
        }
        Err(Error::run("a part of strata panicked; the message above says where"))
    }

    fn set_mouse(&mut self, on: bool) -> Result<()> {
        MOUSE.store(on, Ordering::SeqCst);
        execute!(stdout(), Print(clicks())).map_err(failed)
    }

    fn copy(&mut self, text: &str) -> Result<&'static str> {
        clipboard::copy(text)
    }

    fn size(&self) -> Result<(u16, u16)> {
        crossterm::terminal::size().map_err(failed)
    }
}
