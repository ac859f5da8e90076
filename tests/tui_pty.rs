//! The binary in a pseudo-terminal: it starts, follows a resize, and leaves the terminal whole.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail like the test")]

use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use portable_pty::{Child, CommandBuilder, MasterPty, PtySize, native_pty_system};

/// The program with a terminal emulator around it.
struct Session {
    child: Box<dyn Child + Send + Sync>,
    master: Box<dyn MasterPty + Send>,
    input: Box<dyn Write + Send>,
    output: Receiver<Vec<u8>>,
    screen: vt100::Parser,
    raw: Vec<u8>,
}

fn cells(count: u16) -> NonZeroU16 {
    NonZeroU16::new(count).unwrap()
}

fn emulator(columns: u16, rows: u16) -> vt100::Parser {
    vt100::Parser::new(cells(rows), cells(columns), 0)
}

impl Session {
    fn start(columns: u16, rows: u16) -> Self {
        Self::spawn(columns, rows, CommandBuilder::new(env!("CARGO_BIN_EXE_strata")))
    }

    fn spawn(columns: u16, rows: u16, mut command: CommandBuilder) -> Self {
        let size = PtySize { rows, cols: columns, pixel_width: 0, pixel_height: 0 };
        let pty = native_pty_system().openpty(size).unwrap();
        command.env("TERM", "xterm-256color");
        command.env_remove("NO_COLOR");
        for folder in ["XDG_DATA_HOME", "XDG_CONFIG_HOME"] {
            command.env(folder, env!("CARGO_TARGET_TMPDIR"));
        }
        let child = pty.slave.spawn_command(command).unwrap();
        let mut reader = pty.master.try_clone_reader().unwrap();
        let (sender, output) = channel();
        std::thread::spawn(move || {
            let mut buffer = [0; 8192];
            while let Ok(count) = reader.read(&mut buffer) {
                if count == 0 || sender.send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        let input = pty.master.take_writer().unwrap();
        Self { child, master: pty.master, input, output, screen: emulator(columns, rows), raw: Vec::new() }
    }

    fn resize(&mut self, columns: u16, rows: u16) {
        self.master.resize(PtySize { rows, cols: columns, pixel_width: 0, pixel_height: 0 }).unwrap();
        self.screen.screen_mut().set_size(cells(rows), cells(columns));
    }

    fn text(&self) -> String {
        self.screen.screen().contents()
    }

    fn take_in(&mut self) {
        while let Ok(bytes) = self.output.recv_timeout(Duration::from_millis(20)) {
            self.screen.process(&bytes);
            self.raw.extend(bytes);
        }
    }

    fn sees(&mut self, what: &str) {
        let start = Instant::now();
        while !self.text().contains(what) {
            assert!(start.elapsed() < Duration::from_secs(10), "never seen: {what}\n{}", self.text());
            self.take_in();
        }
    }

    fn types(&mut self, keys: &str) {
        self.input.write_all(keys.as_bytes()).unwrap();
        self.input.flush().unwrap();
    }

    /// Waits for the end; the terminal must then be as it was.
    fn ends(mut self) -> u32 {
        let start = Instant::now();
        let status = loop {
            self.take_in();
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < Duration::from_secs(10), "it does not end:\n{}", self.text());
        };
        self.take_in();
        let screen = self.screen.screen();
        assert!(!screen.alternate_screen() && !screen.hide_cursor() && !screen.bracketed_paste());
        status.exit_code()
    }
}

#[test]
fn starts_resizes_and_quits_with_the_terminal_restored() {
    let mut session = Session::start(80, 24);
    session.sees("1 Layers");
    session.sees("? help");
    assert!(session.screen.screen().alternate_screen() && session.screen.screen().hide_cursor());
    let frames = session.raw.windows(8).filter(|bytes| bytes == b"\x1b[?2026h").count();
    assert!(frames > 0, "frames are in synchronized updates");

    session.resize(160, 48);
    session.sees("5 Results");
    session.sees("whole model");
    session.resize(40, 10);
    session.sees("strata needs 60x15");
    session.types("q");
    assert_eq!(session.ends(), 0);
}

#[test]
fn ctrl_c_asks_when_something_is_not_saved() {
    let mut session = Session::start(80, 24);
    session.sees("1 Layers");
    session.types("4");
    session.sees("block 0: w4a8");
    session.types("\x03");
    session.sees("quit without saving");
    session.types("y");
    assert_eq!(session.ends(), 0);
}

#[test]
fn a_terminated_workbench_restores_the_terminal() {
    let mut session = Session::start(80, 24);
    session.sees("1 Layers");
    let id = session.child.process_id().unwrap().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &id]).status().unwrap().success());
    session.ends();
}

#[test]
fn suspending_gives_the_shell_its_terminal_and_fg_comes_back() {
    let mut session = Session::start(80, 24);
    session.sees("1 Layers");
    let id = session.child.process_id().unwrap().to_string();
    // Stopped and continued from outside: the screen is drawn again.
    let kill = |signal: &str| assert!(std::process::Command::new("kill").args([signal, &id]).status().unwrap().success());
    kill("-STOP");
    session.take_in();
    session.screen = emulator(80, 24);
    kill("-CONT");
    session.sees("1 Layers");
    session.types("q");
    assert_eq!(session.ends(), 0);
}

/// Takes the terminal as the workbench does, and panics.
#[test]
#[ignore = "run by the test below, in a terminal of its own"]
fn panicking_program() {
    strata::tui::terminal::restore_on_panic();
    let _screen = strata::tui::terminal::TerminalScreen::take().unwrap();
    panic!("on purpose");
}

#[test]
fn a_panic_gives_the_terminal_back_and_is_read_there() {
    let mut command = CommandBuilder::new(std::env::current_exe().unwrap());
    command.args(["--ignored", "--exact", "panicking_program", "--nocapture"]);
    let mut session = Session::spawn(80, 24, command);
    session.child.wait().unwrap();
    session.take_in();
    let raw = String::from_utf8_lossy(&session.raw).into_owned();
    let at = |what: &str| raw.find(what).unwrap_or_else(|| panic!("{what:?} is missing: {raw:?}"));
    assert!(at("\u{1b}[?1049h") < at("\u{1b}[?1049l"), "the alternate screen is left");
    assert!(at("\u{1b}[?1049l") < at("on purpose"), "the message comes after, where it can be read");
    assert!(!session.screen.screen().hide_cursor() && !session.screen.screen().bracketed_paste());
}
