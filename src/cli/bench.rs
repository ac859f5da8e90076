//! `strata bench`.

use clap::Args;
use serde_json::{Value, json};
use strata::backend::cpu::Cpu;
use strata::backend::cuda::libraries::Libraries;
use strata::backend::cuda::nvrtc::{KernelResources, Nvrtc};
use strata::backend::cuda::verify::{self, Extent};
use strata::backend::cuda::{Cuda, sources};
use strata::backend::{Backend, DeviceChoice};
use strata::bench::model::{self, ModelRequest, ModelSpeed};
use strata::bench::operations::{self, OperationSpeed};
use strata::bench::quantize::{self, QuantizeSpeed, QuantizeSpeedRequest};
use strata::bench::{PUBLISHED, Shape};
use strata::error::{Error, Result};
use strata::format::{CacheFormat, Format};
use strata::monitor::{CancelToken, Monitor, Report};
use strata::quant::Recipe;
use strata::session::report;
use tokio::signal::unix::{SignalKind, signal};

use super::{Common, output};

#[derive(Args)]
pub struct Bench {
    /// Run every kernel against a reference on the processor, on the GPU found (or emulated), and say pass or fail.
    #[arg(long)]
    verify: bool,
    /// With --verify: small shapes only, as for emulation.
    #[arg(long, requires = "verify")]
    small: bool,
    /// With --verify: only every N-th check from the I-th on, so that parts 1/N to N/N are all of them.
    #[arg(long, requires = "verify", value_name = "I/N", value_parser = part, default_value = "1/1")]
    part: (usize, usize),
    /// With --verify: only kernels whose names begin so.
    #[arg(long, requires = "verify", value_name = "NAME")]
    kernel: Option<String>,
    /// Registers, spills and shared memory of every kernel, by architecture.
    #[arg(long)]
    kernels_report: bool,
    /// Time whole models of this shape with random weights: a published name, or a config.json.
    #[arg(long, value_name = "SHAPE")]
    shape: Option<String>,
    /// Quantize a model of the shape with random weights (nemotron-h-8b unless --shape names another) and time the stages.
    #[arg(long)]
    quantize: bool,
    /// With --quantize: the recipe, phase2 if none is named. With --shape alone: give the random models, but for w16a16, the online
    /// transforms and the internals of Mamba-2 that models of this recipe have; formats, head and caches stay as they are.
    #[arg(long, conflicts_with_all = ["verify", "kernels_report"])]
    recipe: Option<String>,
    /// With --quantize: only so many of the shape's first blocks.
    #[arg(long, requires = "quantize")]
    blocks: Option<usize>,
    /// With --quantize: sequences of the sample, of 2048 tokens unless --length says otherwise.
    #[arg(long, default_value_t = 128, requires = "quantize")]
    sequences: usize,
    /// With --quantize: tokens of a sequence.
    #[arg(long, default_value_t = 2048, requires = "quantize")]
    length: usize,
    /// Formats of those models.
    #[arg(long, value_delimiter = ',', default_value = "w16a16,w8a8,w4a8")]
    formats: Vec<String>,
    /// Prompt lengths for the time to the first token.
    #[arg(long, value_delimiter = ',', default_value = "1024,8192")]
    prompts: Vec<usize>,
    /// Sequences that decode at once.
    #[arg(long, value_delimiter = ',', default_value = "1,8,64")]
    batches: Vec<usize>,
    /// How SSM states are kept: f32, f16 or int8.
    #[arg(long, default_value = "f16")]
    state: String,
    /// Tokens that single operations are timed for.
    #[arg(long, value_delimiter = ',', default_value = "1,8,1024")]
    tokens: Vec<usize>,
}

impl Bench {
    pub fn run(&self, common: &Common) -> Result<()> {
        if self.verify {
            return self.verify(common);
        }
        if self.kernels_report {
            return kernels_report(common);
        }
        let threads = rayon::ThreadPoolBuilder::new().num_threads(common.threads.unwrap_or(0)).build();
        let pool = threads.map_err(|error| Error::run(format!("the computing threads cannot be started: {error}")))?;
        pool.install(|| match common.device()? {
            DeviceChoice::Cpu => self.measure(&Cpu, common),
            DeviceChoice::Cuda(index) => self.measure(&Cuda::new(index)?, common),
            DeviceChoice::Emulated => self.measure(&Cuda::emulated()?, common),
        })
    }

    fn measure<B: Backend + Clone>(&self, backend: &B, common: &Common) -> Result<()> {
        let cancel = CancelToken::default();
        let monitor = Monitor::new(progress, cancel.clone());
        if self.quantize {
            cancel_on_signals(cancel)?;
            let request = QuantizeSpeedRequest {
                shape: self.shape.clone().unwrap_or_else(|| PUBLISHED[0].0.into()),
                recipe: self.recipe.clone().unwrap_or_else(|| "phase2".into()),
                blocks: self.blocks,
                sequences: self.sequences,
                length: self.length,
            };
            let speed = quantize::measure(backend, &request, &monitor)?;
            if common.json {
                return output::json(&json!({ "schema": "strata.bench/1", "device": backend.name(), "quantize": speed }));
            }
            return print_quantize(&speed, &backend.name());
        }
        if self.recipe.is_some() && self.shape.is_none() {
            return Err(Error::input("--recipe is of whole models").hint("give --shape, to time random models, or --quantize"));
        }
        let bandwidth = model::copy_bandwidth(backend)?;
        let (mut timed, mut models) = (Vec::new(), Vec::new());
        match &self.shape {
            Some(name) => {
                let request = ModelRequest {
                    formats: self.formats.iter().map(|format| format.parse().map_err(Error::input)).collect::<Result<_>>()?,
                    recipe: self.recipe.as_deref().map(Recipe::find).transpose()?,
                    prompts: self.prompts.clone(),
                    batches: self.batches.clone(),
                    state: state(&self.state)?,
                };
                models = model::measure(backend, &Shape::find(name)?, &request, bandwidth, &monitor, |_| {})?;
            }
            None => timed = operations::measure(backend, &Shape::find(PUBLISHED[0].0)?, &self.tokens, bandwidth, &monitor)?,
        }
        if common.json {
            return output::json(&json!({
                "schema": "strata.bench/1",
                "device": backend.name(),
                "copy_bytes_per_s": bandwidth,
                "operations": timed,
                "models": models,
            }));
        }
        output::line(&format!("{}, copies {:.0} GB/s", backend.name(), bandwidth / 1e9))?;
        print_operations(&timed)?;
        print_models(&models)
    }

    fn verify(&self, common: &Common) -> Result<()> {
        let (cuda, extent) = match common.device()? {
            DeviceChoice::Cuda(index) => (Cuda::new(index)?, if self.small { Extent::Small } else { Extent::Published }),
            DeviceChoice::Cpu | DeviceChoice::Emulated => (Cuda::emulated()?, Extent::Small),
        };
        let (mut results, mut failed) = (Vec::new(), 0);
        let (first, count) = self.part;
        let kernel = self.kernel.as_deref().unwrap_or_default();
        let checks = verify::checks(extent, cuda.device().arch()).into_iter().filter(|check| check.kernel.starts_with(kernel));
        for check in checks.skip(first - 1).step_by(count) {
            let outcome = check.error(cuda.memory(), 1);
            let passes = outcome.as_ref().is_ok_and(|error| check.passes(*error));
            failed += usize::from(!passes);
            let verdict = if passes { "pass" } else { "FAIL" };
            let detail = outcome.map_or_else(|error| error.to_string(), |error| format!("{error:.1e}"));
            if !common.json {
                output::line(&format!("{verdict} {:<22} {:<44} {detail} of {:.0e}", check.kernel, check.shape, check.tolerance))?;
            }
            results.push(json!({
                "kernel": check.kernel, "shape": check.shape, "passes": passes, "error": detail, "tolerance": check.tolerance
            }));
        }
        let count = results.len();
        if count == 0 {
            return Err(
                Error::input(format!("no check of a kernel `{kernel}…` is in part {first}")).hint("leave --kernel and --part out for all")
            );
        }
        if common.json {
            output::json(&json!({ "schema": "strata.verify/1", "device": cuda.name(), "checks": results }))?;
        } else {
            output::line(&format!("{} of {count} checks passed on {}", count - failed, cuda.name()))?;
        }
        if failed == 0 { Ok(()) } else { Err(Error::run(format!("{failed} of {count} kernel checks failed on {}", cuda.name()))) }
    }
}

/// `I/N` with I from 1 to N.
fn part(text: &str) -> std::result::Result<(usize, usize), String> {
    let numbers = text.split_once('/').and_then(|(index, count)| Some((index.parse().ok()?, count.parse().ok()?)));
    numbers
        .filter(|(index, count)| (1..=*count).contains(index))
        .ok_or_else(|| format!("`{text}` is no part: give 1/4 for the first of four"))
}

fn state(text: &str) -> Result<CacheFormat> {
    match text {
        "f32" => Ok(CacheFormat::F32),
        "f16" => Ok(CacheFormat::F16),
        "int8" => Ok(CacheFormat::Int8),
        _ => Err(Error::input(format!("unknown state format `{text}`")).hint("the formats are f32, f16 and int8")),
    }
}

fn progress(report: Report) {
    match report {
        Report::Stage { name, total } => eprintln!("{name} ({total})"),
        Report::Warning(text) => eprintln!("warning: {text}"),
        Report::Log(text) => eprintln!("{text}"),
        _ => {}
    }
}

fn print_operations(timed: &[OperationSpeed]) -> Result<()> {
    if timed.is_empty() {
        return Ok(());
    }
    output::line(&format!("{:<34} {:>7} {:>10} {:>9} {:>8} {:>7}", "operation", "tokens", "us", "GB/s", "Top/s", "of copy"))?;
    for speed in timed {
        output::line(&format!(
            "{:<34} {:>7} {:>10.1} {:>9.0} {:>8.1} {:>6.0}%",
            speed.operation,
            speed.tokens,
            speed.us,
            speed.gb_per_s,
            speed.tera_per_s,
            100.0 * speed.of_bandwidth
        ))?;
    }
    Ok(())
}

fn print_models(models: &[ModelSpeed]) -> Result<()> {
    for speed in models {
        let peak = speed.peak_bytes.map_or_else(String::new, |bytes| format!(", peak {}", report::bytes(bytes)));
        let like = speed.recipe.as_ref().map_or_else(String::new, |recipe| format!(" as of {recipe}"));
        output::line(&format!("{} {}{like}: weights {}{peak}", speed.shape, speed.format, report::bytes(speed.weight_bytes)))?;
        let base = models.iter().find(|other| other.format == Format::W16A16.to_string());
        for prefill in &speed.prefill {
            let ratio = base.and_then(|base| base.prefill.iter().find(|other| other.tokens == prefill.tokens));
            output::line(&format!(
                "  first token after {:>5}: {:>9.2} ms  {:>8.0} tokens/s  {}",
                prefill.tokens,
                prefill.ms,
                prefill.tokens_per_s,
                times(ratio.map(|base| base.ms / prefill.ms))
            ))?;
        }
        for decode in &speed.decode {
            let ratio = base.and_then(|base| base.decode.iter().find(|other| other.batch == decode.batch));
            output::line(&format!(
                "  step at batch {:>3}:       {:>9.3} ms  {:>8.0} tokens/s  {}  bound {:.3} ms ({:.0}%)",
                decode.batch,
                decode.ms,
                decode.tokens_per_s,
                times(ratio.map(|base| base.ms / decode.ms)),
                decode.bound_ms,
                100.0 * decode.of_bound
            ))?;
        }
    }
    Ok(())
}

/// What ends the process cancels instead, so that a temporary checkpoint of tens of gigabytes is removed; the second time it ends it.
fn cancel_on_signals(cancel: CancelToken) -> Result<()> {
    let failed = |error: std::io::Error| Error::run(format!("signals cannot be waited for: {error}"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(failed)?;
    let (mut interrupt, mut terminate) = {
        let _entered = runtime.enter();
        (signal(SignalKind::interrupt()).map_err(failed)?, signal(SignalKind::terminate()).map_err(failed)?)
    };
    let mut next = async move || {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            next().await;
            cancel.cancel();
            next().await;
        });
        std::process::exit(1);
    });
    Ok(())
}

fn print_quantize(speed: &QuantizeSpeed, device: &str) -> Result<()> {
    output::line(&format!(
        "{} {} on {device}: {} of {} blocks, {} x {} tokens, {:.1} s",
        speed.shape, speed.recipe, speed.blocks, speed.of_blocks, speed.sequences, speed.length, speed.seconds
    ))?;
    if let Some(memory) = &speed.device_memory {
        output::line(&format!("  {memory}"))?;
    }
    for (stage, seconds) in &speed.stages {
        output::line(&format!("  {stage:<12} {seconds:>8.1} s"))?;
    }
    for (kind, (seconds, count)) in &speed.kinds {
        output::line(&format!("  {kind:<12} {seconds:>8.1} s a block, {count} in the shape"))?;
    }
    Ok(())
}

fn times(ratio: Option<f64>) -> String {
    ratio.map_or_else(String::new, |ratio| format!("{ratio:.2}x of 16-bit"))
}

/// Architectures that the report is made for: Ampere, Ada, Hopper and consumer Blackwell.
const ARCHITECTURES: [u32; 5] = [80, 86, 89, 90, 120];

fn kernels_report(common: &Common) -> Result<()> {
    let found = Libraries::get().nvrtc.as_ref().map_err(|why| {
        Error::input(format!("NVRTC, which compiles the kernels, was not found ({why})"))
            .hint(strata::backend::cuda::libraries::HOW_TO_GET.to_owned())
    })?;
    let nvrtc = Nvrtc::open(&found.path)?;
    let mut rows: Vec<(u32, KernelResources)> = Vec::new();
    for arch in ARCHITECTURES {
        for source in sources::KERNELS {
            rows.extend(nvrtc.resources(source, arch)?.into_iter().map(|resources| (arch, resources)));
        }
    }
    if common.json {
        let rows: Vec<Value> = rows.iter().map(|(arch, kernel)| json!({ "arch": arch, "kernel": kernel })).collect();
        return output::json(&json!({ "schema": "strata.kernels/1", "kernels": rows }));
    }
    output::line(&format!("{:<24} {:>6} {:>9} {:>12} {:>13}", "kernel", "arch", "registers", "spill bytes", "shared bytes"))?;
    for (arch, kernel) in &rows {
        output::line(&format!(
            "{:<24} {:>6} {:>9} {:>12} {:>13}",
            kernel.name, arch, kernel.registers, kernel.spill_bytes, kernel.shared_bytes
        ))?;
    }
    Ok(())
}
