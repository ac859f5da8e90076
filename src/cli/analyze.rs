//! `strata analyze`.

use std::path::Path;
use std::sync::Arc;

use clap::Args;
use serde::Serialize;
use serde_json::json;
use strata::analysis::{Footprint, Gpu, Inventory, Prediction, predict};
use strata::checkpoint::{self, Checkpoint, Config, Layout, hub};
use strata::error::{Error, Result};
use strata::format::Plan;
use strata::monitor::Monitor;
use strata::quant::Recipe;
use strata::session::report::{self, Table};

use super::{Common, output};

#[derive(Args)]
pub struct Analyze {
    /// A checkpoint's directory, a hub id, `demo`, or a config.json alone.
    model: String,
    /// List every stored tensor instead: name, shape, type, kind, bytes, the linear it belongs to.
    #[arg(long)]
    tensors: bool,
    /// Read the configuration only: no weights are downloaded or read.
    #[arg(long, conflicts_with = "tensors")]
    config_only: bool,
    /// Print comma-separated values.
    #[arg(long, conflicts_with = "json")]
    csv: bool,
    /// Predict time per token, prefill and the longest context on this GPU, such as "RTX 4090"; may be repeated.
    #[arg(long = "gpu", value_name = "NAME", conflicts_with = "tensors")]
    gpus: Vec<String>,
}

/// What a plan would cost on the GPUs that were asked for.
#[derive(Serialize)]
struct PlanPredictions {
    /// `base`, a recipe's name, or `suggested`.
    plan: String,
    bits_per_weight: f64,
    predictions: Vec<Prediction>,
}

#[derive(Serialize)]
struct TensorRow {
    name: String,
    shape: Vec<usize>,
    #[serde(rename = "type")]
    dtype: String,
    /// Kind of the block it is in, or `embedding`, `head`, `final norm`, `other`.
    kind: String,
    bytes: usize,
    /// The linear whose weights, scales or bias it holds.
    linear: Option<String>,
}

impl Analyze {
    pub fn run(&self, common: &Common) -> Result<()> {
        if self.tensors {
            return self.print_tensors(common);
        }
        let gpus = self.gpus.iter().map(|name| Gpu::find(name)).collect::<Result<Vec<_>>>()?;
        let (inventory, config) = self.inventory()?;
        let predictions = predictions(&config, &inventory, &gpus)?;
        if common.json {
            let mut document =
                serde_json::to_value(&inventory).map_err(|error| Error::run(format!("the inventory cannot be written: {error}")))?;
            document["schema"] = json!("strata.analyze/1");
            if !gpus.is_empty() {
                document["gpus"] = json!(gpus);
                document["predictions"] = json!(predictions);
            }
            return output::json(&document);
        }
        let blocks = block_table(&inventory);
        let predicted = (!gpus.is_empty()).then(|| prediction_table(&predictions));
        if self.csv {
            return output::line(predicted.as_ref().unwrap_or(&blocks).csv().trim_end());
        }
        for line in blocks.lines() {
            output::line(&line)?;
        }
        output::line("")?;
        for line in totals_table(&inventory).lines() {
            output::line(&line)?;
        }
        output::line("")?;
        output::line(&format!(
            "suggested plan: {} ({:.3} of the checkpoint), embedding {}, head {}, {} changes of activation precision",
            report::bytes(inventory.suggested_bytes),
            inventory.suggested_bytes as f64 / inventory.total_bytes as f64,
            inventory.suggested_plan.embedding,
            inventory.suggested_plan.head,
            inventory.suggested_transitions,
        ))?;
        output::line("outliers: largest |w| over root mean square; sensitivity: a rule of thumb by kind and place, not a measurement")?;
        if let Some(table) = predicted {
            output::line("")?;
            table.lines().iter().try_for_each(|line| output::line(line))?;
            output::line(&assumptions())?;
        }
        Ok(())
    }

    /// What the model's layers are, and the configuration that says so.
    fn inventory(&self) -> Result<(Inventory, Config)> {
        let of_config = |path: &Path| {
            let config = Config::read(path)?;
            Ok((Inventory::of_layout(&self.model, &Layout::new(&config)), config))
        };
        let path = Path::new(&self.model);
        if path.is_file() {
            return of_config(path);
        }
        let has_weights = path.join(checkpoint::SINGLE_FILE).exists() || path.join(checkpoint::INDEX_FILE).exists();
        let config = path.join("config.json");
        if config.exists() && (self.config_only || !has_weights) {
            return of_config(&config);
        }
        let (id, revision) = self.model.split_once('@').map_or((self.model.as_str(), None), |(id, revision)| (id, Some(revision)));
        if self.config_only && hub::looks_like_id(id) && !path.exists() {
            return of_config(&hub::fetch_config(id, revision, &Monitor::silent())?.join("config.json"));
        }
        let checkpoint = checkpoint::open(&self.model)?;
        let inventory =
            if self.config_only { Inventory::of_layout(&self.model, &checkpoint.layout) } else { Inventory::of_checkpoint(&checkpoint)? };
        Ok((inventory, checkpoint.config))
    }

    fn print_tensors(&self, common: &Common) -> Result<()> {
        let rows = tensor_rows(&checkpoint::open(&self.model)?);
        if common.json {
            return output::json(&json!({ "schema": "strata.tensors/1", "model": self.model, "tensors": rows }));
        }
        let mut table = Table::new(&["tensor", "shape", "type", "kind", "bytes", "linear"]);
        for row in rows {
            let shape = row.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join("x");
            table.push(vec![row.name, shape, row.dtype, row.kind, row.bytes.to_string(), row.linear.unwrap_or_else(|| "-".into())]);
        }
        if self.csv {
            return output::line(table.csv().trim_end());
        }
        table.lines().iter().try_for_each(|line| output::line(line))
    }
}

/// The unquantized model, the three phases and the suggested plan on each GPU.
fn predictions(config: &Config, inventory: &Inventory, gpus: &[Gpu]) -> Result<Vec<PlanPredictions>> {
    let layout = Arc::new(Layout::new(config));
    let footprint = Footprint::new(config, Arc::clone(&layout));
    let mut plans = vec![("base".to_owned(), Plan::unquantized(layout.blocks.len()))];
    for name in ["phase1", "phase2", "phase3"] {
        plans.push((name.to_owned(), Recipe::find(name)?.plan(&layout, &[])?));
    }
    plans.push(("suggested".to_owned(), inventory.suggested_plan.clone()));
    let predict = |(name, plan): (String, Plan)| PlanPredictions {
        plan: name,
        bits_per_weight: footprint.bits_per_weight(&plan),
        predictions: gpus.iter().map(|gpu| Prediction::new(config, &footprint, &plan, gpu)).collect(),
    };
    Ok(plans.into_iter().map(predict).collect())
}

fn prediction_table(plans: &[PlanPredictions]) -> Table {
    let mut table =
        Table::new(&["plan", "GPU", "bytes", "bits", "ms/token", "prefill t/s", "context", "transitions", "their ms/1k tokens"]);
    for plan in plans {
        for prediction in &plan.predictions {
            let context = match (prediction.fits, prediction.context_tokens) {
                (false, _) => "does not fit".to_owned(),
                (true, None) => "any".to_owned(),
                (true, Some(tokens)) => format!("~{}", report::count(tokens)),
            };
            table.push(vec![
                plan.plan.clone(),
                prediction.gpu.to_owned(),
                report::bytes(prediction.weight_bytes),
                format!("{:.2}", plan.bits_per_weight),
                format!("~{:.2}", 1000.0 * prediction.decode_seconds),
                format!("~{:.0}", prediction.prefill_tokens_per_s),
                context,
                prediction.transitions.to_string(),
                format!("~{:.3}", 1000.0 * prediction.transition_seconds),
            ]);
        }
    }
    table
}

/// What the predictions rest on.
fn assumptions() -> String {
    format!(
        "~ is predicted from bytes and operations, not measured: one sequence, {:.0}% of the memory's peak rate, {:.0}% of the tensor \
         cores', {:.0} µs a block; time per token behind {} tokens, prefill of {} tokens; {} of memory set aside",
        100.0 * predict::BANDWIDTH_EFFICIENCY,
        100.0 * predict::COMPUTE_EFFICIENCY,
        1e6 * predict::BLOCK_SECONDS,
        predict::DECODE_CONTEXT,
        predict::PROMPT_TOKENS,
        report::bytes(predict::RESERVED_BYTES),
    )
}

fn tensor_rows(checkpoint: &Checkpoint) -> Vec<TensorRow> {
    let layout = &checkpoint.layout;
    let row = |(name, tensor): (&str, checkpoint::RawTensor<'_>)| {
        let inside = |stem: &str| name.strip_prefix(&checkpoint.stored_name(stem)).is_some_and(|rest| rest.starts_with('.'));
        let block = layout.blocks.iter().find(|block| name.starts_with(&checkpoint.stored_name(&block.prefix)));
        let (kind, linear) = match block {
            Some(block) => (block.kind.name(), block.linears.iter().find(|linear| inside(&linear.stem)).map(|linear| linear.name.clone())),
            None if inside(&layout.embedding.stem) => ("embedding", Some(layout.embedding.name.clone())),
            None if inside(&layout.head.stem) => ("head", Some(layout.head.name.clone())),
            None if name == checkpoint.stored_name(&layout.final_norm.name) => ("final norm", None),
            None => ("other", None),
        };
        TensorRow {
            name: name.into(),
            shape: tensor.shape.to_vec(),
            dtype: format!("{:?}", tensor.dtype),
            kind: kind.into(),
            bytes: tensor.byte_count(),
            linear,
        }
    };
    checkpoint.tensors().map(row).collect()
}

fn block_table(inventory: &Inventory) -> Table {
    let mut table =
        Table::new(&["block", "kind", "parameters", "bytes", "share", "outliers", "sensitivity", "w8a8", "w4a8", "groups", "suggested"]);
    for row in &inventory.blocks {
        let fit = |name: &str| row.suitability.iter().find(|fit| fit.format.to_string() == name);
        let size = |name| fit(name).map_or_else(|| "-".into(), |fit| report::bytes(fit.bytes));
        let groups = fit("w4a8").map_or_else(String::new, |fit| {
            let mut groups: Vec<String> = fit.groups.iter().map(ToString::to_string).collect();
            if !fit.fallbacks.is_empty() {
                groups.push("int8".into());
            }
            groups.join("/")
        });
        table.push(vec![
            row.index.to_string(),
            row.kind.to_string(),
            report::count(row.parameters),
            report::bytes(row.bytes),
            format!("{:.2}%", 100.0 * row.share),
            row.outlier_ratio.map_or_else(|| "-".into(), |ratio| format!("{ratio:.1}")),
            row.sensitivity.name().into(),
            size("w8a8"),
            size("w4a8"),
            groups,
            row.suggested.to_string(),
        ]);
    }
    table
}

fn totals_table(inventory: &Inventory) -> Table {
    let mut table = Table::new(&["kind", "count", "parameters", "bytes", "share"]);
    let mut push = |kind: &str, count: String, parameters: u64, bytes: u64, share: f64| {
        table.push(vec![kind.into(), count, parameters.to_string(), report::bytes(bytes), format!("{:.2}%", 100.0 * share)]);
    };
    for total in &inventory.totals {
        push(&total.kind, total.count.to_string(), total.parameters, total.bytes, total.share);
    }
    push("all", String::new(), inventory.total_parameters, inventory.total_bytes, 1.0);
    table
}
