//! How the workbench answers while the machine is busy, through a pseudo-terminal at 120x40: `cargo bench --bench
//! responsiveness`. A job of the engine runs on every processor, and two more threads keep two processors busy.
//!
//! Prints the time from a key to the frame that shows it, the bytes of a frame while nobody types, and what the
//! workbench uses of a processor when nothing happens. With `-- --check` it fails where one of them is over its bound.
#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::panic, reason = "a measurement")]

use std::io::{Read, Write};
use std::num::NonZeroU16;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use portable_pty::{CommandBuilder, PtySize, native_pty_system};

const COLUMNS: u16 = 120;
const ROWS: u16 = 40;
const KEYS: usize = 34 * TYPED.len();
/// How long bytes and idle time are counted.
const WATCH: Duration = Duration::from_secs(15);
/// Milliseconds from a key to its frame, at the 99th percentile.
const KEY_BOUND: f64 = 50.0;
/// Bytes of a frame while a job runs, on average.
const FRAME_BOUND: f64 = 4096.0;
/// Share of a processor when nothing happens.
const IDLE_BOUND: f64 = 0.005;
const FRAME_END: &[u8] = b"\x1b[?2026l";

struct Workbench {
    process: u32,
    input: Box<dyn Write + Send>,
    output: Receiver<(Instant, Vec<u8>)>,
    screen: vt100::Parser,
    /// Since the counters were last set to zero.
    bytes: usize,
    frames: usize,
}

impl Workbench {
    fn types(&mut self, keys: &str) {
        self.input.write_all(keys.as_bytes()).unwrap();
        self.input.flush().unwrap();
    }

    /// Takes in what comes until `until`; returns when the last of it came.
    fn take_in(&mut self, until: Instant) -> Option<Instant> {
        let (at, bytes) = self.output.recv_timeout(until.saturating_duration_since(Instant::now())).ok()?;
        self.bytes += bytes.len();
        self.frames += bytes.windows(FRAME_END.len()).filter(|window| *window == FRAME_END).count();
        self.screen.process(&bytes);
        Some(at)
    }

    fn sees(&mut self, what: &str) {
        let end = Instant::now() + Duration::from_secs(120);
        while !self.screen.screen().contents().contains(what) {
            assert!(self.take_in(end).is_some(), "never seen: {what}\n{}", self.screen.screen().contents());
        }
    }

    /// The number of the block under the cursor, as the title of the Block pane has it.
    fn cursor(&self) -> String {
        let text = self.screen.screen().contents();
        let at = text.find("4 Block ").map_or("", |at| &text[at + "4 Block ".len()..]);
        at.split(' ').next().unwrap_or("").to_owned()
    }

    /// The line of what was last said.
    fn status(&self) -> String {
        self.screen.screen().rows(0, COLUMNS).nth(ROWS as usize - 2).unwrap_or_default()
    }

    /// Seconds of processor time so far.
    fn processor_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.process)).unwrap();
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        // User and system time, in the kernel's ticks of a hundredth of a second.
        (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
    }
}

fn start(home: &std::path::Path) -> Workbench {
    let session = home.join("load.toml");
    let text = "schema = \"strata.session/1\"\n[model]\nid = \"demo\"\n[calibration]\nsequences = 256\nlength = 256\n\
        [[variant]]\nname = \"load\"\nrecipe = \"phase2\"\n";
    std::fs::write(&session, text).unwrap();
    // The tour of the first start would lie over what is waited for.
    std::fs::create_dir_all(home.join("data/strata")).unwrap();
    std::fs::write(home.join("data/strata/welcomed"), "").unwrap();
    let size = PtySize { rows: ROWS, cols: COLUMNS, pixel_width: 0, pixel_height: 0 };
    let pty = native_pty_system().openpty(size).unwrap();
    let mut command = CommandBuilder::new(env!("CARGO_BIN_EXE_strata"));
    command.arg(session);
    command.env("TERM", "xterm-256color");
    command.env("XDG_DATA_HOME", home.join("data"));
    command.env("XDG_STATE_HOME", home.join("state"));
    let child = pty.slave.spawn_command(command).unwrap();
    let (mut reader, input) = (pty.master.try_clone_reader().unwrap(), pty.master.take_writer().unwrap());
    let (sender, output) = channel();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65536];
        while let Ok(count) = reader.read(&mut buffer) {
            if count == 0 || sender.send((Instant::now(), buffer[..count].to_vec())).is_err() {
                break;
            }
        }
    });
    // The terminal lives as long as the measurement.
    std::mem::forget(pty.master);
    let cells = |count| NonZeroU16::new(count).unwrap();
    let screen = vt100::Parser::new(cells(ROWS), cells(COLUMNS), 0);
    Workbench { process: child.process_id().unwrap(), input, output, screen, bytes: 0, frames: 0 }
}

/// What is typed, over and over: the cursor moves, and the format of the block that it comes to changes, there and back, so
/// that nothing is left to save.
const TYPED: [&str; 6] = ["j", ">", "k", "j", "<", "k"];

/// Milliseconds from each key to the frame that shows what it did.
fn key_to_frame(workbench: &mut Workbench) -> Vec<f64> {
    let mut times = Vec::new();
    for key in TYPED.into_iter().cycle().take(KEYS) {
        let before = workbench.cursor();
        // The status line says what an edit did; a move empties it.
        let edited = format!(" block {before}: w");
        let sent = Instant::now();
        workbench.types(key);
        let shown = loop {
            let at = workbench.take_in(sent + Duration::from_secs(10)).unwrap_or_else(|| panic!("a key is not answered"));
            let moves = key == "j" || key == "k";
            let answered = if moves { workbench.cursor() != before } else { workbench.status().starts_with(&edited) };
            if answered {
                break at;
            }
        };
        times.push(1000.0 * (shown - sent).as_secs_f64());
        let pause = Instant::now() + Duration::from_millis(60);
        while workbench.take_in(pause).is_some() {}
    }
    times.sort_by(f64::total_cmp);
    times
}

fn main() {
    let home = tempfile::tempdir().unwrap();
    let mut workbench = start(home.path());
    workbench.sees("|w|");
    let busy = Arc::new(AtomicBool::new(true));
    for _ in 0..2 {
        let busy = Arc::clone(&busy);
        std::thread::spawn(move || {
            while busy.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
    }
    workbench.types("R1");
    workbench.sees("load: started");

    let times = key_to_frame(&mut workbench);
    let at = |share: f64| times[((times.len() - 1) as f64 * share).round() as usize];
    println!(
        "key to frame, engine and two more threads busy: median {:.1} ms, 99th percentile {:.1} ms, most {:.1} ms",
        at(0.5),
        at(0.99),
        at(1.0)
    );

    (workbench.bytes, workbench.frames) = (0, 0);
    let end = Instant::now() + WATCH;
    while workbench.take_in(end).is_some() {}
    let mean = workbench.bytes as f64 / workbench.frames.max(1) as f64;
    println!("while the job runs: {} frames in {} s, {mean:.0} bytes a frame", workbench.frames, WATCH.as_secs());

    workbench.types("xy");
    workbench.sees("cancelled");
    busy.store(false, Ordering::Relaxed);
    let settled = Instant::now() + Duration::from_secs(8);
    while workbench.take_in(settled).is_some() {}
    let before = workbench.processor_seconds();
    let end = Instant::now() + WATCH;
    while workbench.take_in(end).is_some() {}
    let share = (workbench.processor_seconds() - before) / WATCH.as_secs_f64();
    println!("idle: {:.2} % of a processor", 100.0 * share);
    workbench.types("q");
    std::thread::sleep(Duration::from_millis(500));
    let over = at(0.99) > KEY_BOUND || mean > FRAME_BOUND || share > IDLE_BOUND;
    if over && std::env::args().any(|argument| argument == "--check") {
        println!("over the bounds: {KEY_BOUND} ms a key, {FRAME_BOUND} bytes a frame, {} % idle", 100.0 * IDLE_BOUND);
        std::process::exit(1);
    }
}
