//! The binary in a pseudo-terminal: it starts, follows a resize, and leaves the terminal whole.

#![allow(clippy::unwrap_used, reason = "a test's helpers fail like the test")]

mod common;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use portable_pty::{Child, CommandBuilder, MasterPty, PtySize, native_pty_system};
use strata::eval::ResultSet;
use strata::session::runs::Run;
use tempfile::TempDir;

/// The program with a terminal emulator around it.
struct Session {
    child: Box<dyn Child + Send + Sync>,
    master: Box<dyn MasterPty + Send>,
    input: Box<dyn Write + Send>,
    output: Receiver<Vec<u8>>,
    reader: JoinHandle<()>,
    /// Makes the reader let go of the terminal after what it reads next.
    closing: Arc<AtomicBool>,
    screen: vt100::Parser,
    raw: Vec<u8>,
    /// The user's folders, where no test looks at them.
    _home: Option<TempDir>,
}

fn cells(count: u16) -> NonZeroU16 {
    NonZeroU16::new(count).unwrap()
}

fn emulator(columns: u16, rows: u16) -> vt100::Parser {
    vt100::Parser::new(cells(rows), cells(columns), 0)
}

impl Session {
    fn start(columns: u16, rows: u16) -> Self {
        let home = TempDir::new().unwrap();
        let session = Self::open(home.path(), columns, rows, &[]);
        Self { _home: Some(home), ..session }
    }

    /// The workbench of a user whose folders are in `home`.
    fn open(home: &Path, columns: u16, rows: u16, arguments: &[&str]) -> Self {
        let mut command = CommandBuilder::new(env!("CARGO_BIN_EXE_strata"));
        command.args(arguments);
        command.env("XDG_DATA_HOME", home.join("data"));
        command.env("XDG_STATE_HOME", home.join("state"));
        Self::spawn(columns, rows, command)
    }

    fn spawn(columns: u16, rows: u16, mut command: CommandBuilder) -> Self {
        let size = PtySize { rows, cols: columns, pixel_width: 0, pixel_height: 0 };
        let pty = native_pty_system().openpty(size).unwrap();
        command.env("TERM", "xterm-256color");
        command.env_remove("NO_COLOR");
        command.env("XDG_CONFIG_HOME", env!("CARGO_TARGET_TMPDIR"));
        let child = pty.slave.spawn_command(command).unwrap();
        let mut reader = pty.master.try_clone_reader().unwrap();
        let (sender, output) = channel();
        let closing = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&closing);
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 8192];
            while let Ok(count) = reader.read(&mut buffer) {
                if count == 0 || sender.send(buffer[..count].to_vec()).is_err() || stop.load(Ordering::SeqCst) {
                    break;
                }
            }
        });
        let input = pty.master.take_writer().unwrap();
        Self { child, master: pty.master, input, output, reader, closing, screen: emulator(columns, rows), raw: Vec::new(), _home: None }
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

    fn misses(&mut self, what: &str) {
        let start = Instant::now();
        while self.text().contains(what) {
            self.take_in();
            assert!(start.elapsed() < Duration::from_secs(30), "still seen: {what}\n{}", self.text());
        }
    }

    fn sees(&mut self, what: &str) {
        let start = Instant::now();
        while !self.text().contains(what) {
            assert!(start.elapsed() < Duration::from_secs(60), "never seen: {what}\n{}", self.text());
            self.take_in();
        }
    }

    fn types(&mut self, keys: &str) {
        self.input.write_all(keys.as_bytes()).unwrap();
        self.input.flush().unwrap();
    }

    fn kill(&self, signal: &str) {
        let id = self.child.process_id().unwrap().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// Closes the terminal under the program, which must be drawing now and then; returns the program.
    fn close(self) -> Box<dyn Child + Send + Sync> {
        self.closing.store(true, Ordering::SeqCst);
        self.reader.join().unwrap();
        drop((self.master, self.input, self.output));
        self.child
    }

    /// Waits for the end; the terminal must then be as it was.
    fn ends(mut self) -> u32 {
        let start = Instant::now();
        let status = loop {
            self.take_in();
            if let Some(status) = self.child.try_wait().unwrap() {
                break status;
            }
            assert!(start.elapsed() < Duration::from_secs(30), "it does not end:\n{}", self.text());
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
    session.kill("-TERM");
    assert_eq!(session.ends(), 0);
}

#[test]
fn a_run_whose_workbench_is_terminated_can_go_on() {
    let home = TempDir::new().unwrap();
    let path = common::short_session(home.path());
    let mut session = Session::open(home.path(), 120, 40, &[path.to_str().unwrap()]);
    session.sees("1 Layers");
    session.types("R");
    session.sees("quantize      ");
    session.kill("-TERM");
    assert_eq!(session.ends(), 0);
    let (_, runs) = headless(home.path(), &["runs"]);
    assert!(runs.contains("interrupted"), "{runs}");
    let (success, output) = headless(home.path(), &["replay", "--resume", "last"]);
    assert!(success && output.contains("small"), "{output}");
}

#[test]
fn suspending_gives_the_shell_its_terminal_and_fg_comes_back() {
    let home = TempDir::new().unwrap();
    // A shell with job control, as one types into.
    let mut command = CommandBuilder::new("sh");
    command.arg("-i");
    command.env_remove("ENV");
    command.env("XDG_DATA_HOME", home.path().join("data"));
    command.env("XDG_STATE_HOME", home.path().join("state"));
    let mut shell = Session::spawn(80, 24, command);
    shell.types(&format!("{}\n", env!("CARGO_BIN_EXE_strata")));
    shell.sees("1 Layers");
    for _ in 0..2 {
        shell.types("\x1a");
        shell.sees("Stopped");
        let screen = shell.screen.screen();
        assert!(!screen.alternate_screen() && !screen.hide_cursor(), "{}", shell.text());
        shell.types("fg\n");
        shell.sees("1 Layers");
        let screen = shell.screen.screen();
        assert!(screen.alternate_screen() && screen.hide_cursor());
    }
    // It takes keys as before.
    shell.types("j4");
    shell.sees("block 1: w4a8");
    shell.types("q");
    shell.sees("quit without saving");
    shell.types("y");
    shell.misses("1 Layers");
    shell.types("exit\n");
    shell.ends();
}

#[test]
fn a_workbench_that_was_stopped_from_outside_draws_its_screen_again() {
    let mut session = Session::start(80, 24);
    session.sees("1 Layers");
    session.kill("-STOP");
    session.take_in();
    session.screen = emulator(80, 24);
    session.kill("-CONT");
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

/// `strata` without a screen, for the same user.
fn headless_command(home: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strata"));
    command.args(arguments).env("XDG_DATA_HOME", home.join("data")).env("XDG_STATE_HOME", home.join("state"));
    command
}

/// What it prints, and whether it ends well.
fn headless(home: &Path, arguments: &[&str]) -> (bool, String) {
    let output = headless_command(home, arguments).output().unwrap();
    (output.status.success(), String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
}

#[test]
fn a_run_outlives_its_terminal_and_a_later_workbench_shows_it() {
    let home = TempDir::new().unwrap();
    let path = common::short_session(home.path());
    let path = path.to_str().unwrap();
    // Started by a shell, as most are: its end makes the system send SIGHUP and SIGCONT, and the terminal is gone.
    let mut command = CommandBuilder::new("sh");
    command.args(["-c", "\"$0\" \"$1\"; true", env!("CARGO_BIN_EXE_strata"), path]);
    command.env("XDG_DATA_HOME", home.path().join("data"));
    command.env("XDG_STATE_HOME", home.path().join("state"));
    let mut workbench = Session::spawn(120, 40, command);
    workbench.sees("1 Layers");
    workbench.types("R");
    workbench.sees("quantize      ");
    workbench.close().wait().unwrap();

    // A second workbench finds the run while it goes on, and follows it.
    let mut second = Session::open(home.path(), 120, 40, &[path]);
    second.sees("1 run without a screen");
    second.types("3v");
    second.sees("▶ running");
    second.types("\r");
    second.sees("quantize small: started");
    second.sees("evaluate base, small: started");
    second.types("\x1b");
    second.sees("▶ done");
    let (_, log) = headless(home.path(), &["runs", "follow", "last"]);
    assert_eq!(log.matches("quantize small: started").count(), 1, "one process did it all: {log}");
    second.types("qq");
    second.ends();

    // A third, opened on the same session, has the results at once.
    let mut third = Session::open(home.path(), 120, 40, &[path]);
    third.sees("against base");
    third.types("q");
    third.ends();
}

#[test]
fn a_run_that_is_left_goes_on_without_a_screen() {
    let home = TempDir::new().unwrap();
    let path = common::short_session(home.path());
    let mut workbench = Session::open(home.path(), 120, 40, &[path.to_str().unwrap()]);
    workbench.sees("1 Layers");
    workbench.types("R");
    // Not the screen's "block 1", which calibration shows as well.
    let log = || {
        let mut runs = std::fs::read_dir(home.path().join("data/strata/runs")).ok()?;
        runs.find_map(|run| std::fs::read_to_string(run.ok()?.path().join("log")).ok())
    };
    let start = Instant::now();
    while !log().is_some_and(|log| log.contains("block 1: error")) {
        workbench.take_in();
        assert!(start.elapsed() < Duration::from_secs(60), "no block is finished: {}", workbench.text());
    }
    workbench.types("q");
    workbench.sees("leave it running");
    workbench.types("l");
    let start = Instant::now();
    while workbench.child.try_wait().unwrap().is_none() {
        workbench.take_in();
        assert!(start.elapsed() < Duration::from_secs(30), "it does not leave: {}", workbench.text());
    }
    workbench.take_in();
    assert!(workbench.text().contains("goes on without a screen"), "{}", workbench.text());
    drop(workbench);
    let (success, log) = headless(home.path(), &["runs", "follow", "last"]);
    assert!(success, "{log}");
    for line in ["going on without a screen", "going on after", "small: evaluated", "done"] {
        assert!(log.contains(line), "{line} is missing: {log}");
    }
    assert_eq!(log.matches("quantize small: started").count(), 2, "by each of the two processes: {log}");
}

#[test]
fn changes_survive_a_kill_and_the_next_start_offers_them() {
    let home = TempDir::new().unwrap();
    let mut workbench = Session::open(home.path(), 80, 24, &[]);
    workbench.sees("1 Layers");
    workbench.types("4");
    workbench.sees("block 0: w4a8");
    let kept = || {
        std::fs::read_dir(home.path().join("state/strata/recovery"))
            .unwrap()
            .any(|folder| folder.unwrap().path().join("session.toml").exists())
    };
    let start = Instant::now();
    while !kept() {
        assert!(start.elapsed() < Duration::from_secs(10), "the change is not kept");
        workbench.take_in();
    }
    workbench.kill("-KILL");
    workbench.child.wait().unwrap();

    let mut next = Session::open(home.path(), 80, 24, &[]);
    next.sees("Changes that were not saved");
    next.types("r");
    next.sees("restored what was not saved");
    next.types("C");
    next.sees("block 0 (ssm)");
    // Apart, or they are alt-q.
    next.types("\x1b");
    next.misses("Changes since the start");
    next.types("q");
    next.sees("quit without saving");
    next.types("y");
    assert_eq!(next.ends(), 0);
    assert!(!kept(), "what was given up is not offered again");
}

#[test]
fn a_read_only_workbench_changes_nothing() {
    let home = TempDir::new().unwrap();
    let mut workbench = Session::open(home.path(), 80, 24, &["--read-only"]);
    workbench.sees("read-only");
    for keys in ["4", "R", "\x13"] {
        workbench.types(keys);
        workbench.sees("read-only: nothing can be changed");
        workbench.types("j");
        workbench.take_in();
    }
    workbench.types("q");
    assert_eq!(workbench.ends(), 0);
    assert!(!home.path().join("state").exists() && !home.path().join("data").exists());
}

/// Every file and folder below `folder`, with the bytes.
fn tree(folder: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(tree(&path));
            found.insert(path, None);
        } else {
            let bytes = std::fs::read(&path).unwrap();
            found.insert(path, Some(bytes));
        }
    }
    found
}

#[test]
fn a_read_only_workbench_leaves_what_it_looks_at_as_it_is() {
    let home = TempDir::new().unwrap();
    let path = quick_session(home.path());
    let (success, output) = headless(home.path(), &["replay", path.to_str().unwrap()]);
    assert!(success, "{output}");
    // Of a workbench that had nothing unsaved when it was killed.
    std::fs::create_dir_all(home.path().join("state/strata/recovery/1-0")).unwrap();
    let before = tree(home.path());

    let mut workbench = Session::open(home.path(), 120, 40, &["--read-only", path.to_str().unwrap()]);
    workbench.sees("against base");
    workbench.types("3v");
    workbench.sees("▶ done");
    workbench.types("\r");
    workbench.sees("small: evaluated");
    // The list is read again after a second.
    workbench.types("xrD");
    workbench.take_in();
    workbench.types("\x1b");
    workbench.sees("▶ done");
    workbench.types("qq");
    assert_eq!(workbench.ends(), 0);
    let after = tree(home.path());
    assert_eq!(before.keys().collect::<Vec<_>>(), after.keys().collect::<Vec<_>>());
    assert!(before == after, "a file was changed");
}

/// The session of [`common::short_session`] with as small a sample as there is.
fn quick_session(home: &Path) -> PathBuf {
    let path = common::short_session(home);
    let text = std::fs::read_to_string(&path).unwrap().replace("sequences = 10\nlength = 256", "sequences = 1\nlength = 16");
    std::fs::write(&path, text).unwrap();
    path
}

#[test]
fn what_keys_have_saved_is_replayed_to_the_same_bytes_and_figures() {
    let home = TempDir::new().unwrap();
    let path = quick_session(home.path());
    let mut workbench = Session::open(home.path(), 120, 40, &[path.to_str().unwrap()]);
    workbench.sees("1 Layers");
    // All SSM blocks to w8a8; block 3 to w16a16, and back.
    workbench.types("s8");
    workbench.sees("kind:ssm w8a8");
    workbench.types("\x1b");
    workbench.misses("●");
    workbench.types("jjj6u");
    workbench.sees("undone: block 3 to w16a16");
    workbench.types("R");
    workbench.sees("✓ evaluate base, small");
    workbench.types("5c");
    workbench.sees("95% interval");
    workbench.misses("comparing row by row");
    workbench.types("\x13");
    workbench.sees("saved ");
    workbench.types("q");
    assert_eq!(workbench.ends(), 0);
    let saved = std::fs::read_to_string(&path).unwrap();
    assert!(saved.contains("kind:ssm") && !saved.contains("block:3"), "{saved}");

    // Elsewhere, where nothing is known.
    let (elsewhere, variants) = (TempDir::new().unwrap(), TempDir::new().unwrap());
    let arguments = ["replay", path.to_str().unwrap(), "--json", "--output", variants.path().to_str().unwrap()];
    let output = headless_command(elsewhere.path(), &arguments).output().unwrap();
    let replayed: ResultSet = serde_json::from_str(&common::succeeded(&output)).unwrap();
    let made = Run::find(&home.path().join("data/strata/runs"), "last").unwrap().made();
    let weights = |folder: &Path| {
        let mut files = common::files(folder);
        files.retain(|name, _| name.extension().is_some_and(|extension| extension == "safetensors"));
        files
    };
    let (typed, again) = (weights(&made.variants["small"]), weights(&variants.path().join("small")));
    assert!(typed.len() > 1 && typed == again, "the bytes differ");
    assert_eq!((made.results.len(), replayed.results.len()), (2, 2));
    for (typed, again) in made.results.iter().map(|evaluated| &evaluated.result).zip(&replayed.results) {
        assert_eq!((&typed.variant, typed.weight_bytes), (&again.variant, again.weight_bytes));
        assert_eq!((&typed.tasks, &typed.kld, typed.perplexity), (&again.tasks, &again.kld, again.perplexity));
    }
}
