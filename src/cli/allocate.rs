//! `strata allocate`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde_json::json;
use strata::analysis::allocate::{Activations, AllocateRequest, Allocation, Budget, CONTEXT, Cost, Solution};
use strata::analysis::predict::{ANSWER_TOKENS, PROMPT_TOKENS};
use strata::analysis::sensitivity::{Request, Sensitivities, SensitivitySpec, donors_directory, load};
use strata::analysis::{AnswerTime, Footprint, Gpu};
use strata::checkpoint::{self, Checkpoint, Config, StorageLayout};
use strata::engine::{Event, Job, QuantizeJob, StudyJob};
use strata::error::{Error, Result};
use strata::format::{Format, Selector};
use strata::quant::overlap::EvaluationFiles;
use strata::quant::{Override, Recipe};
use strata::session::replay::finish;
use strata::session::{Session, VariantSpec, paths, report};
use strata::size;

use super::progress::Follow;
use super::quantize::{self, parse_override};
use super::sensitivity::{Measured, parse_format};
use super::{Common, output};

#[derive(Args)]
pub struct Allocate {
    /// A checkpoint's directory, a hub id, or `demo`, whose sensitivities were measured.
    model: String,
    #[command(flatten)]
    budget: BudgetOptions,
    /// Tokens that have to fit beside the weights; 8192 unless given.
    #[arg(long, value_name = "TOKENS", requires = "gpu")]
    context: Option<usize>,
    #[command(flatten)]
    measured: Measured,
    /// Formats that the plan may use, separated by commas; all that were measured unless given.
    #[arg(long, value_name = "F,F", value_delimiter = ',', value_parser = parse_format)]
    formats: Option<Vec<Format>>,
    /// Activation bits that the plan may use: 8, 16 or any. 8 unless given; any where the cost is latency.
    #[arg(long, value_name = "BITS")]
    activations: Option<String>,
    /// What plans are short of: `bytes`, or `latency`, the predicted time of a token on `--gpu`, its share of reading the
    /// prompt included.
    #[arg(long, value_enum, default_value_t = CostName::Bytes)]
    cost: CostName,
    /// Keep a part at a format: `kind:attention=w8a8`, `block:3=w4a8`, `name:*.out_proj=w8a8`. May be given several times.
    #[arg(long = "pin", value_name = "MATCH=FORMAT")]
    pins: Vec<String>,
    /// All linears of a block take one format.
    #[arg(long)]
    whole_blocks: bool,
    /// Say of every unit what the formats beside its own would change.
    #[arg(long)]
    explain: bool,
    /// Write the plan as a session that `quantize` and `replay` take.
    #[arg(long, value_name = "FILE")]
    session: Option<PathBuf>,
    /// Put the variant together from the donors, in this folder.
    #[arg(long, short)]
    output: Option<PathBuf>,
    /// Replace an output that exists.
    #[arg(long)]
    force: bool,
    /// Compare allocated plans with uniform, filled, error-only and random ones on held-out text; takes minutes.
    #[arg(long, conflicts_with_all = ["output", "session", "explain"])]
    study: bool,
    /// Text of the study; the demo's held-out text unless given.
    #[arg(long, value_name = "FILE", requires = "study")]
    text: Option<PathBuf>,
    /// Windows of that text.
    #[arg(long, requires = "study", default_value_t = 64)]
    text_windows: usize,
    /// Random plans a budget in the study.
    #[arg(long, requires = "study", default_value_t = 20)]
    random: usize,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CostName {
    Bytes,
    Latency,
}

#[derive(Args)]
struct BudgetOptions {
    /// Stored bits a weight of the blocks' linears, scales included.
    #[arg(long, conflicts_with_all = ["size", "linears", "kld", "latency"])]
    bits: Option<f64>,
    /// Bytes of the whole model: 6GiB, 900MB, 4000000.
    #[arg(long, value_name = "BYTES", value_parser = size::parse, conflicts_with_all = ["linears", "kld", "latency"])]
    size: Option<u64>,
    /// Bytes of the blocks' linears.
    #[arg(long, value_name = "BYTES", value_parser = size::parse, conflicts_with_all = ["kld", "latency"])]
    linears: Option<u64>,
    /// The cheapest plan that is predicted to lose at most so many nats a token.
    #[arg(long, value_name = "NATS", conflicts_with = "latency")]
    kld: Option<f64>,
    /// What fits on a GPU beside states and caches: `RTX 4090`, `H100`. With `--cost latency`: where it is to be fast.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["bits", "size", "linears"])]
    gpu: Option<String>,
    /// Milliseconds of a token, predicted, where the cost is latency.
    #[arg(long, value_name = "MS", requires = "gpu")]
    latency: Option<f64>,
}

impl BudgetOptions {
    /// The budget for a model of this configuration, with `context` tokens in its caches where it has to fit on `gpu`.
    fn budget(&self, config: &Config, gpu: Option<&Gpu>, context: usize, timed: bool) -> Result<Option<Budget>> {
        Ok(match (self.bits, self.size, self.linears, self.kld, gpu) {
            (Some(bits), ..) => Some(Budget::Bits(bits)),
            (_, Some(size), ..) => Some(Budget::ModelBytes(size)),
            (_, _, Some(size), ..) => Some(Budget::LinearBytes(size)),
            (_, _, _, Some(kld), _) => Some(Budget::Kld(kld)),
            (_, _, _, _, Some(gpu)) if !timed => Some(Budget::fitting(config, gpu, context)?),
            _ => self.latency.map(|ms| Budget::Seconds(1e-3 * ms)),
        })
    }
}

impl Allocate {
    pub fn run(&self, common: &Common) -> Result<()> {
        if self.context.is_some() && self.budget.gpu.is_none() {
            return Err(Error::input("--context says what has to fit on a GPU, and no --gpu is given").hint("add `--gpu H100`"));
        }
        let timed = self.timed()?;
        let gpu = self.budget.gpu.as_deref().map(Gpu::find).transpose()?;
        let activations = match &self.activations {
            Some(bits) => bits.parse::<Activations>()?,
            None if timed => Activations::Any,
            None => Activations::Int8,
        };
        let checkpoint = checkpoint::open(&self.model)?;
        let spec = self.measured.spec(&checkpoint.layout, common)?;
        if self.study {
            return self.study(spec, common);
        }
        let budget = self.budget.budget(&checkpoint.config, gpu.as_ref(), self.context.unwrap_or(CONTEXT), timed)?;
        let measurement = Request::new(&checkpoint, &spec, paths::data_directory())?;
        let losses = load(&measurement)?;
        if !losses.complete {
            eprintln!(
                "warning: the measurement was stopped before its end: more losses than asked for are estimated, and what plans lose is \
                 not checked; `strata sensitivity` with the same options goes on with it"
            );
        }
        let request = AllocateRequest {
            formats: self.formats.clone(),
            activations,
            pins: self.pins.iter().map(|pin| parse_override(pin)).collect::<Result<_>>()?,
            whole_blocks: self.whole_blocks,
            cost: match &gpu {
                Some(gpu) if timed => {
                    let footprint = Footprint::new(&checkpoint.config, Arc::new(checkpoint.layout.clone()));
                    Cost::Time(AnswerTime::new(&checkpoint.config, &footprint, &measurement.ends_plan(), gpu))
                }
                _ => Cost::Bytes,
            },
            ..AllocateRequest::new(measurement.ends_plan(), Budget::Share(1.0))
        };
        let solution = Solution::new(&losses, &checkpoint.layout, &request)?;
        let Some(budget) = budget else {
            if self.output.is_some() || self.session.is_some() || self.explain {
                let hint = if timed { "give --latency or --kld" } else { "give --bits, --size, --linears, --kld or --gpu" };
                return Err(Error::input("a plan needs a budget").hint(hint));
            }
            return front(&solution, &losses, common);
        };
        let allocation = solution.at(solution.find(budget)?);
        if let Some(path) = &self.session {
            self.write_session(path, &spec, &checkpoint, &allocation)?;
        }
        let variant = match &self.output {
            Some(output) => Some(self.assemble(output, &spec, &measurement, &allocation, common)?),
            None => None,
        };
        if common.json {
            return output::json(&json!({
                "schema": "strata.allocation/1",
                "model": losses.model,
                "allocation": allocation,
                "front": solution.front(),
                "correction": solution.correction(),
                "checks": losses.checks,
                "output": variant,
            }));
        }
        self.print(&allocation, &solution)
    }

    /// Whether time is the cost.
    fn timed(&self) -> Result<bool> {
        let timed = self.cost == CostName::Latency;
        match (timed, self.budget.latency, &self.budget.gpu) {
            (false, Some(_), _) => Err(Error::input("--latency is a budget of time, and the cost is bytes").hint("add `--cost latency`")),
            (false, None, Some(_)) if self.budget.kld.is_some() => {
                Err(Error::input("--kld and --gpu are two budgets").hint("leave one out, or add `--cost latency`"))
            }
            (true, _, None) => Err(Error::input("latency is predicted for a GPU, and none is given").hint("add `--gpu H100`")),
            _ => Ok(timed),
        }
    }

    fn print(&self, allocation: &Allocation, solution: &Solution<'_>) -> Result<()> {
        output::table(&report::allocation(allocation, self.explain))?;
        output::line("")?;
        let correction = match solution.correction() {
            Some(_) => format!(", {:.2e} as plans like it were measured", allocation.corrected_kld),
            None => String::new(),
        };
        output::line(&format!(
            "{:.3} bits a weight, linears {}, model {}; predicted KLD {:.2e}{correction}",
            allocation.bits_per_weight,
            report::bytes(allocation.linear_bytes),
            report::bytes(allocation.total_bytes),
            allocation.predicted_kld,
        ))?;
        let which = match (self.budget.kld, allocation.seconds) {
            (None, _) => "within the budget",
            (Some(_), None) => "of these bytes",
            (Some(_), Some(_)) => "as fast",
        };
        output::line(&match allocation.gap {
            0.0 => format!("no plan {which} is predicted to lose less"),
            gap => format!("the best plan {which} may be predicted to lose up to {:.2}% less", 100.0 * gap),
        })?;
        let Some(seconds) = allocation.seconds else {
            return output::line(&format!("a further megabyte would save {:.1e} nats", allocation.price));
        };
        output::line(&format!("a further microsecond a token would save {:.1e} nats", allocation.price))?;
        output::line(&format!(
            "~ {:.4} ms a token of an answer of {ANSWER_TOKENS} to a prompt of {PROMPT_TOKENS}: predicted from bytes and operations, not measured",
            1e3 * seconds
        ))
    }

    /// A session with one variant: the recipe, and an override a block or linear.
    fn write_session(
        &self,
        path: &std::path::Path,
        spec: &SensitivitySpec,
        checkpoint: &Checkpoint,
        allocation: &Allocation,
    ) -> Result<()> {
        let mut session = Session::new(&self.model);
        session.model.sha256 = Some(checkpoint.sha256()?);
        session.calibration = spec.sample.clone();
        let plan = &allocation.plan;
        let mut overrides: Vec<Override> = Vec::new();
        for run in plan.blocks.chunk_by(|a, b| a == b) {
            let first = overrides.last().map_or(0, |rule| if let Selector::Blocks(_, last) = rule.selector { last + 1 } else { 0 });
            overrides.push(Override { selector: Selector::Blocks(first, first + run.len() - 1), format: run[0] });
        }
        for (stem, format) in &plan.linears {
            let selector = format!("name:{stem}").parse().map_err(Error::run)?;
            overrides.push(Override { selector, format: *format });
        }
        session.variants.push(VariantSpec { overrides, ..VariantSpec::new("allocated", self.measured.recipe()) });
        session.save(path)
    }

    fn assemble(
        &self,
        output: &std::path::Path,
        spec: &SensitivitySpec,
        measurement: &Request<'_>,
        allocation: &Allocation,
        common: &Common,
    ) -> Result<PathBuf> {
        let job = QuantizeJob {
            model: self.model.clone(),
            name: "allocated".into(),
            recipe: Recipe::find(self.measured.recipe())?.name,
            steps: measurement.steps.clone(),
            plan: allocation.plan.clone(),
            sample: spec.sample.clone(),
            storage: StorageLayout::Native,
            output: Some(output.to_owned()),
            store: paths::variants_directory(),
            force: self.force,
            host_memory: common.host_memory,
            donors: Some(donors_directory(&measurement.store)),
            allocate: None,
            evaluation: EvaluationFiles::default(),
        };
        let path = quantize::run_job(job, common)?.path;
        Ok(path)
    }

    fn study(&self, spec: SensitivitySpec, common: &Common) -> Result<()> {
        let bits = self.budget.bits.map_or_else(|| vec![3.0, 4.0, 5.0, 6.0], |bits| vec![bits]);
        let formats = self.formats.clone().unwrap_or_else(|| vec![Format::W8A8, Format::W4A8, Format::W3A8, Format::W2A8]);
        let job = StudyJob {
            model: self.model.clone(),
            window_tokens: spec.sample.length,
            spec,
            store: paths::data_directory(),
            formats,
            bits,
            random: self.random,
            text: self.text.clone(),
            windows: self.text_windows,
        };
        let (engine, mut events) = common.engine()?;
        engine.submit(Job::Study(Box::new(job)))?;
        let mut follow = Follow::new();
        let mut found = None;
        finish(&mut events, &mut |event| {
            follow.event(event);
            if let Event::Study { rows, .. } = event {
                found = Some(rows.clone());
            }
        })?;
        let rows = found.ok_or_else(|| Error::run("the study ended without a result"))?;
        if common.json {
            return output::json(&json!({ "schema": "strata.study/1", "rows": rows }));
        }
        output::table(&report::study(&rows))?;
        output::line("")?;
        output::line(
            "KLD in nats a token on the text, with bootstrap intervals over windows; excess: over the allocated plan of the same budget, paired",
        )
    }
}

/// The front, in a few rows.
fn front(solution: &Solution<'_>, losses: &Sensitivities, common: &Common) -> Result<()> {
    let front = solution.front();
    if common.json {
        return output::json(&json!({
            "schema": "strata.front/1",
            "model": losses.model,
            "front": front,
            "correction": solution.correction(),
            "checks": losses.checks,
        }));
    }
    output::table(&report::front(&front))?;
    output::line("")?;
    let timed = front.iter().any(|point| point.seconds.is_some());
    let budgets = if timed { "--latency or --kld" } else { "--bits, --size, --linears, --kld or --gpu" };
    output::line(&format!("{} plans in all; {budgets} picks one, --json lists them", front.len()))
}
