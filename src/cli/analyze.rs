//! `strata analyze`.

use std::path::Path;

use clap::Args;
use serde::Serialize;
use serde_json::json;
use strata::analysis::Inventory;
use strata::checkpoint::{self, Checkpoint, Config, Layout, hub};
use strata::error::{Error, Result};
use strata::monitor::Monitor;
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
        let inventory = self.inventory()?;
        if common.json {
            let mut document =
                serde_json::to_value(&inventory).map_err(|error| Error::run(format!("the inventory cannot be written: {error}")))?;
            document["schema"] = json!("strata.analyze/1");
            return output::json(&document);
        }
        let blocks = block_table(&inventory);
        if self.csv {
            return output::line(blocks.csv().trim_end());
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
        output::line("outliers: largest |w| over root mean square; sensitivity: a rule of thumb by kind and place, not a measurement")
    }

    fn inventory(&self) -> Result<Inventory> {
        let of_config = |path: &Path| Ok(Inventory::of_layout(&self.model, &Layout::new(&Config::read(path)?)));
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
        if self.config_only { Ok(Inventory::of_layout(&self.model, &checkpoint.layout)) } else { Inventory::of_checkpoint(&checkpoint) }
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
