//! The command line: one file a subcommand. Only this folder prints. Start with [`run`].

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "the command line is what prints")]

mod allocate;
mod analyze;
mod bench;
mod compare;
mod doctor;
mod eval;
mod generate;
mod output;
mod progress;
mod quantize;
mod replay;
mod results;
mod runs;
mod sensitivity;
mod trace;

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use strata::backend::DeviceChoice;
use strata::checkpoint::{self, DEMO};
use strata::engine::{Engine, EngineOptions, Event};
use strata::error::{Error, ErrorKind, Result};
use strata::session::Session;
use strata::tui::{self, WorkbenchOptions};
use tokio::sync::mpsc::UnboundedReceiver;

/// Quantizes hybrid language models (Mamba-2, attention, MLP, MoE) and measures what it costs.
///
/// Without a subcommand: the workbench, on MODEL or the embedded demo. Without a terminal, `strata` replays the demo
/// session and prints the comparison table.
#[derive(Parser)]
#[command(name = "strata", version, args_conflicts_with_subcommands = true, arg_required_else_help = false)]
pub struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    workbench: Workbench,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct Workbench {
    /// A checkpoint's directory, a hub id, a session file, or `demo`.
    model: Option<String>,
    /// Draw with ASCII characters only.
    #[arg(long)]
    ascii: bool,
    /// Theme by name (ansi16, dark, light, high-contrast, mono) or file.
    #[arg(long)]
    theme: Option<String>,
    /// Look only: no session, no file and no job is changed.
    #[arg(long)]
    read_only: bool,
}

/// Options that every command takes.
#[derive(Args, Clone)]
pub struct Common {
    /// Print one JSON document on stdout.
    #[arg(long, global = true)]
    json: bool,
    /// Where to compute: `cpu`, `cuda:0` (or another GPU), or `emulated` (the GPU's kernels on the processor, to prove them).
    #[arg(long, global = true, default_value = "cpu")]
    device: String,
    /// Seed of the calibration sample and of sampling.
    #[arg(long, global = true)]
    seed: Option<u64>,
    /// Computing threads; one for each processor unless given.
    #[arg(long, global = true)]
    threads: Option<usize>,
    /// Memory that a job may take, as in `6GiB`: a larger model is evaluated block by block, and activations that do not fit wait in a file.
    /// What is free unless given.
    #[arg(long, global = true, value_name = "SIZE", value_parser = strata::size::parse)]
    host_memory: Option<u64>,
}

#[derive(Subcommand)]
enum Command {
    /// Layers by kind, parameters, bytes, suitability for each format, suggested plan.
    Analyze(analyze::Analyze),
    /// Make a quantized variant.
    Quantize(quantize::Quantize),
    /// Evaluate models or variants.
    Eval(eval::Eval),
    /// Compare variants with the model that they were made from.
    Compare(compare::Compare),
    /// Measure what each part of a model loses in each format; goes on where it stopped.
    Sensitivity(sensitivity::Sensitivity),
    /// The plan that loses least within a budget, from measured sensitivities.
    Allocate(Box<allocate::Allocate>),
    /// Run a session file headless.
    Replay(replay::Replay),
    /// List, follow, cancel and remove runs: every replay and every job of the workbench is one.
    Runs(runs::Runs),
    /// List, filter, import and export what was measured.
    Results(results::Results),
    /// Continue a prompt.
    Generate(generate::Generate),
    /// Logits and residual streams for given token ids, as safetensors.
    Trace(trace::Trace),
    /// Speed of kernels and of models with random weights on this machine; --verify proves the kernels.
    Bench(bench::Bench),
    /// What this machine has: processor features, memory, folders, terminal.
    Doctor(doctor::Doctor),
}

/// Runs what the arguments ask for.
pub fn run(arguments: Arguments) -> Result<()> {
    let common = arguments.common;
    common.device()?.check()?;
    if common.threads == Some(0) {
        return Err(Error::input("--threads 0 computes nothing").hint("leave --threads out to use every processor"));
    }
    match arguments.command {
        None => workbench(&arguments.workbench, &common),
        Some(Command::Analyze(command)) => command.run(&common),
        Some(Command::Quantize(command)) => command.run(&common),
        Some(Command::Eval(command)) => command.run(&common),
        Some(Command::Compare(command)) => command.run(&common),
        Some(Command::Sensitivity(command)) => command.run(&common),
        Some(Command::Allocate(command)) => command.run(&common),
        Some(Command::Replay(command)) => command.run(&common),
        Some(Command::Runs(command)) => command.run(&common),
        Some(Command::Results(command)) => command.run(&common),
        Some(Command::Generate(command)) => command.run(&common),
        Some(Command::Trace(command)) => command.run(&common),
        Some(Command::Bench(command)) => command.run(&common),
        Some(Command::Doctor(command)) => command.run(&common),
    }
}

/// Prints an error and its hint; returns the exit code: 2 for wrong usage or input, 1 for a run that failed.
pub fn fail(error: &Error) -> ExitCode {
    eprintln!("error: {error}");
    if let Some(hint) = &error.hint {
        eprintln!("hint: {hint}");
    }
    match error.kind {
        ErrorKind::Input => ExitCode::from(2),
        ErrorKind::Run | ErrorKind::Cancelled => ExitCode::from(1),
    }
}

/// The workbench on a terminal; the demo session, headless, without one.
fn workbench(options: &Workbench, common: &Common) -> Result<()> {
    let model = options.model.as_deref().unwrap_or(DEMO);
    let file = Path::new(model).extension().is_some_and(|extension| extension == "toml").then(|| PathBuf::from(model));
    let session = match &file {
        Some(path) => Session::read(path)?,
        None if model == DEMO => Session::demo()?,
        None => Session::new(model),
    };
    let interactive = std::io::stdout().is_terminal() && std::io::stdin().is_terminal() && !common.json;
    if interactive {
        // A download shows how far it is before the workbench takes the screen.
        progress::Follow::watch("opening", |monitor| checkpoint::open_watched(&session.model.name(), monitor))?;
        let farewell = tui::run(WorkbenchOptions {
            session,
            session_path: file,
            threads: common.threads,
            device: common.device()?,
            ascii: options.ascii,
            theme: options.theme.clone(),
            host_memory: common.host_memory,
            read_only: options.read_only,
        })?;
        return farewell.map_or(Ok(()), |line| output::line(&line));
    }
    if session.variants.is_empty() {
        return Err(Error::input("the workbench needs a terminal, and there is none")
            .hint("`strata analyze`, `strata quantize` and `strata replay` work without one"));
    }
    replay::headless(
        &session,
        file.as_deref(),
        strata::session::ReplayOptions { host_memory: common.host_memory, ..Default::default() },
        common,
    )
}

impl Common {
    fn device(&self) -> Result<DeviceChoice> {
        self.device.parse()
    }

    /// Starts the engine for a headless command.
    fn engine(&self) -> Result<(Engine, UnboundedReceiver<Event>)> {
        Engine::start(&EngineOptions { threads: self.threads, device: self.device()? })
    }
}
