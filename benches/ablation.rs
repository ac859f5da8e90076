//! The ablation of docs/methods.md: one step added a row, on the demo and its twins, as Markdown.
//!
//! `cargo run --release --example ablation -- --models demo,outlier,skewed --formats w8a8,w4a8,w3a8`
//!
//! Block linears are quantized; embedding and head stay in 16 bits unless `--ends` gives them formats. Divergence and
//! perplexity are over held-out text that nothing is chosen on, against the unquantized model of the same weights.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a bench for developers"
)]

#[path = "../tests/common/twins.rs"]
mod twins;

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Parser;
use strata::backend::cpu::Cpu;
use strata::checkpoint::{self, Checkpoint, Layout, StorageLayout};
use strata::eval::{EvaluateRequest, Evaluated, ModelToEvaluate, Task, evaluate};
use strata::format::{Format, Plan, SsmActivations, Transform};
use strata::monitor::Monitor;
use strata::quant::{Method, QuantizeRequest, Recipe, Sample, SampleSpec, Steps, quantize};

#[derive(Parser)]
struct Arguments {
    /// demo, outlier, skewed, or a checkpoint's directory.
    #[arg(long, value_delimiter = ',', default_value = "demo,outlier")]
    models: Vec<String>,
    #[arg(long, value_delimiter = ',', default_value = "w8a8,w4a8,w3a8")]
    formats: Vec<String>,
    /// Instead of the ablation, these recipes as they ship, step by step.
    #[arg(long, value_delimiter = ',')]
    recipes: Vec<String>,
    /// Divergence and perplexity over this text instead of the demo's held-out text.
    #[arg(long)]
    text: Option<PathBuf>,
    /// Windows of 256 tokens of that text.
    #[arg(long, default_value_t = 24)]
    windows: usize,
    /// Rows whose names contain one of these; all without it.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// Formats of embedding and head, `w8a16,w8a8`.
    #[arg(long, value_delimiter = ',', num_args = 1)]
    ends: Vec<String>,
    /// Sequences of 256 tokens of calibration text.
    #[arg(long, default_value_t = 64)]
    sequences: usize,
    /// Where twins and variants are kept; a temporary folder without it.
    #[arg(long)]
    keep: Option<PathBuf>,
    /// Divergence and perplexity only.
    #[arg(long)]
    no_tasks: bool,
}

/// A variant to make: its row's name, how, and the formats.
struct Row {
    name: String,
    steps: Steps,
    plan: Plan,
}

/// The ablation at one format: transforms added to those before, then ways of rounding; block linears only.
fn ablation(layout: &Layout, format: &str, arguments: &Arguments) -> Vec<Row> {
    use Transform::{
        FoldNorms, HadamardResidual, RotateOut, RotateQk, RotateRelu2, RotateResidual, RotateVo, SmoothOut, SmoothRelu2, SmoothVo,
    };
    let added = [FoldNorms, RotateResidual, SmoothVo, RotateVo, RotateQk, SmoothOut, RotateOut, SmoothRelu2, RotateRelu2];
    let mut rows = vec![("rtn".to_owned(), Vec::new(), Method::Rtn)];
    let mut all = Vec::new();
    for transform in added {
        all.push(transform);
        rows.push((format!("+ {transform}"), all.clone(), Method::Rtn));
    }
    for method in [Method::Clip, Method::Gptq, Method::Gptaq] {
        rows.push((format!("+ {}", method.name()), all.clone(), method));
    }
    let without: Vec<Transform> = all.iter().copied().filter(|transform| *transform != RotateResidual).collect();
    let plain = [FoldNorms, HadamardResidual].into_iter().chain(without[1..].iter().copied()).collect();
    rows.push(("all but rotate-residual".into(), without, Method::Rtn));
    rows.push(("all, hadamard-residual instead".into(), plain, Method::Rtn));
    rows.push(("alone: clip".into(), Vec::new(), Method::Clip));
    rows.push(("alone: gptq".into(), Vec::new(), Method::Gptq));
    rows.push(("alone: fold-norms, gptq".into(), vec![FoldNorms], Method::Gptq));
    rows.push(("alone: fold-norms, hadamard-residual".into(), vec![FoldNorms, HadamardResidual], Method::Rtn));
    let mut plan = Plan { blocks: vec![format.parse().unwrap(); layout.blocks.len()], ..Plan::unquantized(0) };
    if let [embedding, head] = arguments.ends.as_slice() {
        (plan.embedding, plan.head) = (embedding.parse().unwrap(), head.parse().unwrap());
    }
    let row = |(name, transforms, method)| Row { name, steps: Steps::new(transforms, method), plan: plan.clone() };
    rows.into_iter().map(row).collect()
}

/// A recipe as it ships, step by step: the linears of the blocks, then the inside of the SSM, then embedding and head.
fn recipe(layout: &Layout, name: &str) -> Vec<Row> {
    let recipe = Recipe::find(name).unwrap();
    let (shipped, steps) = (recipe.plan(layout, &[]).unwrap(), recipe.steps());
    let blocks = Plan { embedding: Format::W16A16, head: Format::W16A16, ..shipped.clone() };
    let mut outside = steps.clone();
    outside.activations.ssm = SsmActivations::Float;
    let row = |what: &str, steps: &Steps, plan: Plan| Row { name: format!("{name}: {what}"), steps: steps.clone(), plan };
    vec![
        row("block linears", &outside, blocks.clone()),
        row("+ inside the SSM", &steps, blocks),
        row("+ embedding and head", &steps, shipped),
    ]
}

fn main() {
    let arguments = Arguments::parse();
    for model in &arguments.models {
        let temporary = tempfile::TempDir::new().unwrap();
        let folder = arguments.keep.as_ref().map_or_else(|| temporary.path().to_owned(), |kept| kept.join(model));
        let source = source(model, &folder);
        let checkpoint = checkpoint::open(&source).unwrap();
        let layout = &checkpoint.layout;
        let tables: Vec<(String, Vec<Row>)> = if arguments.recipes.is_empty() {
            arguments.formats.iter().map(|format| (format.clone(), ablation(layout, format, &arguments))).collect()
        } else {
            vec![("recipes".into(), arguments.recipes.iter().flat_map(|name| recipe(layout, name)).collect())]
        };
        for (table, rows) in tables {
            println!("\n{model}, {table}, {} sequences\n", arguments.sequences);
            println!("| step | linears | mean KLD | p99 | max | top-1 | perplexity | {} | s |", Task::ALL.map(Task::name).join(" | "));
            println!("|---|---|---|---|---|---|---|{}---|", "---|".repeat(Task::ALL.len()));
            let rows = rows
                .into_iter()
                .filter(|row| arguments.rows.is_empty() || arguments.rows.iter().any(|wanted| row.name.contains(wanted.as_str())));
            let made = rows.enumerate().map(|(index, row)| {
                let variant = folder.join(format!("{table}-{index}"));
                let seconds = make(&checkpoint, &variant, &row, &arguments);
                (row.name, variant, seconds)
            });
            measure(&source, &made.collect::<Vec<_>>(), &arguments);
        }
    }
}

/// Makes a variant; returns the seconds it took.
fn make(checkpoint: &Checkpoint, output: &Path, row: &Row, arguments: &Arguments) -> u64 {
    let began = Instant::now();
    let spec = SampleSpec { sequences: arguments.sequences, ..SampleSpec::default() };
    let request = QuantizeRequest {
        checkpoint,
        recipe: "ablation".into(),
        steps: row.steps.clone(),
        plan: row.plan.clone(),
        sample: Sample::load(checkpoint, &spec).unwrap(),
        storage: StorageLayout::Native,
        output: output.to_owned(),
        force: true,
        host_memory: u64::MAX,
        donors: None,
    };
    quantize(&Cpu, &request, &Monitor::silent()).unwrap();
    began.elapsed().as_secs()
}

/// What [`checkpoint::open`] takes for a model; twins are written into `folder`.
fn source(model: &str, folder: &Path) -> String {
    let directory: PathBuf = folder.join(model);
    match model {
        "outlier" => twins::outlier(&directory),
        "skewed" => twins::skewed(&directory),
        _ => return model.to_owned(),
    }
    directory.display().to_string()
}

/// Evaluates variants (name, directory, seconds) beside the model they were made from and prints a row for each.
fn measure(source: &str, variants: &[(String, PathBuf, u64)], arguments: &Arguments) {
    let model = |name: &str, path: String| ModelToEvaluate { name: name.into(), path };
    let request = EvaluateRequest {
        reference: Some(model("base", source.to_owned())),
        models: variants.iter().map(|(name, path, _)| model(name, path.display().to_string())).collect(),
        tasks: if arguments.no_tasks { Vec::new() } else { Task::ALL.to_vec() },
        text: arguments.text.clone(),
        windows: arguments.windows,
        decode_tokens: 0,
        ..EvaluateRequest::default()
    };
    let seconds = |name: &str| variants.iter().find(|(variant, ..)| variant == name).map(|(_, _, seconds)| seconds.to_string());
    let print = |evaluated: Evaluated| {
        let result = &evaluated.result;
        let accuracy = |task: Task| result.tasks.get(task.name()).map_or_else(|| "–".into(), |score| format!("{:.1}", 100.0 * score.acc));
        let divergence = result.kld.as_ref().map_or_else(
            || "– | – | – | –".into(),
            |kld| format!("{:.2e} | {:.2e} | {:.2e} | {:.2} %", kld.mean, kld.p99, kld.max, 100.0 * kld.top1),
        );
        println!(
            "| {} | {:.3} | {divergence} | {:.4} | {} | {} |",
            result.variant,
            result.bits_per_weight / 16.0,
            result.perplexity.unwrap(),
            Task::ALL.map(accuracy).join(" | "),
            seconds(&result.variant).unwrap_or_else(|| "–".into()),
        );
    };
    evaluate(|| Cpu, &request, &Monitor::silent(), print).unwrap();
}
