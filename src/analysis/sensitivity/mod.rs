//! How much a model loses when one part of it is quantized: measured once, kept on disk, and the ground on which
//! [`crate::analysis::allocate`] finds plans. Start with [`measure`].
//!
//! *Unit*: linears that take a format together (a block, or one linear; q, k and v; the experts of a layer).
//! *Loss*: the mean divergence (KL, nats a token) of the model with only that unit quantized from the unquantized one. An
//! `in_proj` that reads int8 brings the recipe's SSM internals with it.

mod measure;
mod need;
mod store;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

pub use measure::{load, measure, recall};
pub use store::donors_directory;

use crate::checkpoint::{BlockSpec, Checkpoint, Layout, TOOL, sha256_hex};
use crate::error::{Error, Result};
use crate::format::{Activations, BlockKind, Format, Plan, Transform};
use crate::quant::{Internals, Sample, SampleSpec, Steps};

/// Schema of the table.
pub const SENSITIVITY_SCHEMA: &str = "strata.sensitivity/1";

/// What a unit is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Granularity {
    /// All linears of a block.
    Block,
    /// One linear; q, k and v, and the experts of a layer, together.
    Linear,
}

impl FromStr for Granularity {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "block" => Ok(Self::Block),
            "linear" => Ok(Self::Linear),
            _ => Err(Error::input(format!("units are measured by `block` or by `linear`, not by `{text}`"))),
        }
    }
}

/// What to measure, before the model is open.
#[derive(Debug, Clone, PartialEq)]
pub struct SensitivitySpec {
    pub steps: Steps,
    pub embedding: Format,
    pub head: Format,
    pub by: Granularity,
    /// Candidate formats of a unit.
    pub formats: Vec<Format>,
    /// Text that rotations and GPTQ learn from; other windows of it are measured on.
    pub sample: SampleSpec,
    /// Windows to measure on, and scored tokens of each.
    pub windows: usize,
    pub positions: usize,
    /// Share of the (unit, format) pairs that is measured end to end; the others are estimated from their output error.
    pub exact: f64,
}

/// Formats that are measured unless others are asked for.
pub const CANDIDATES: [Format; 8] =
    [Format::W8A16, Format::W4A16, Format::W3A16, Format::W2A16, Format::W8A8, Format::W4A8, Format::W3A8, Format::W2A8];

/// Windows that are measured on unless others are asked for: their spread over fewer says little of their mean.
const WINDOWS: [usize; 2] = [8, 32];

/// Tokens of these windows in all, if the least number of them has no more: every candidate's residual stream takes so many.
const TOKENS: usize = 1 << 14;

/// Scored tokens of these windows in all. The logits of each wait in memory: 4.3 GB with a vocabulary of 131072.
const SCORED: usize = 1 << 13;

impl SensitivitySpec {
    /// What is measured for these steps and formats of embedding and head (of `ends`) unless something else is asked for: as
    /// many windows as [`TOKENS`] hold, and [`SCORED`] tokens of them.
    pub fn new(steps: Steps, ends: &Plan, sample: SampleSpec) -> Self {
        let (embedding, head) = (ends.embedding, ends.head);
        let windows = (TOKENS / sample.length.max(1)).clamp(WINDOWS[0], WINDOWS[1]);
        Self {
            steps,
            embedding,
            head,
            by: Granularity::Linear,
            formats: CANDIDATES.to_vec(),
            sample,
            windows,
            positions: SCORED / windows,
            exact: 0.75,
        }
    }
}

/// Everything that decides what is measured. Measurements of another identity are never taken for these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Identity {
    pub schema: String,
    pub tool: String,
    /// SHA-256 of the checkpoint.
    pub source: String,
    pub method: String,
    pub transforms: Vec<Transform>,
    #[serde(default)]
    pub internals: Internals,
    pub embedding: Format,
    pub head: Format,
    pub by: Granularity,
    /// SHA-256 of the token ids that rotations and GPTQ learned from, and of those measured on.
    pub calibration: String,
    pub measured: String,
    /// Scored tokens of each window.
    pub positions: usize,
}

impl Identity {
    /// Its hash.
    pub fn key(&self) -> Result<String> {
        let text = serde_json::to_string(self).map_err(|error| Error::run(format!("an identity cannot be written: {error}")))?;
        Ok(sha256_hex(text.as_bytes()))
    }
}

/// A measurement about to be made or looked up: the request with the model at hand.
#[derive(Clone)]
pub struct Request<'a> {
    pub checkpoint: &'a Checkpoint,
    pub steps: Steps,
    pub embedding: Format,
    pub head: Format,
    pub by: Granularity,
    pub formats: Vec<Format>,
    /// Of the sample: what rotations and GPTQ learn from.
    pub calibration: Sample,
    /// Windows of the same text that calibration does not see.
    pub measured: Sample,
    pub positions: usize,
    pub exact: f64,
    /// Folder that donors and measurements are kept in.
    pub store: PathBuf,
}

impl<'a> Request<'a> {
    /// Loads the sample of `spec`.
    pub fn new(checkpoint: &'a Checkpoint, spec: &SensitivitySpec, store: PathBuf) -> Result<Self> {
        if checkpoint.variant.is_some() {
            return Err(Error::input(format!("{} is quantized already", checkpoint.name)).hint("give the original checkpoint"));
        }
        // What stays as it is in the checkpoint loses nothing, and needs no measurement.
        let mut formats: Vec<Format> = spec.formats.iter().copied().filter(|format| *format != Format::W16A16).collect();
        formats.sort_unstable_by(|a, b| b.cmp(a));
        formats.dedup();
        if formats.is_empty() || !(0.0..=1.0).contains(&spec.exact) || spec.windows == 0 || spec.positions == 0 {
            return Err(Error::input("a measurement needs formats, windows, scored tokens and a share of exact pairs between 0 and 1"));
        }
        let all = Sample::load(checkpoint, &SampleSpec { sequences: spec.sample.sequences + spec.windows, ..spec.sample.clone() })?;
        let (calibration, measured) = all.split(spec.sample.sequences);
        Ok(Self {
            checkpoint,
            // Linears find the scales of their inputs at run time.
            steps: Steps {
                activations: Activations { ssm: spec.steps.activations.ssm, ..Activations::default() },
                observers: spec.steps.observers,
                ..Steps::new(spec.steps.transforms.clone(), spec.steps.method)
            },
            embedding: spec.embedding,
            head: spec.head,
            by: spec.by,
            formats,
            positions: spec.positions.min(spec.sample.length),
            calibration,
            measured,
            exact: spec.exact,
            store,
        })
    }

    /// What the measurements depend on.
    pub fn identity(&self) -> Result<Identity> {
        Ok(Identity {
            schema: SENSITIVITY_SCHEMA.into(),
            tool: TOOL.into(),
            source: self.checkpoint.sha256()?,
            method: self.steps.method.name().into(),
            transforms: self.steps.transforms.clone(),
            internals: self.steps.internals(),
            embedding: self.embedding,
            head: self.head,
            by: self.by,
            calibration: self.calibration.sha256(),
            measured: self.measured.sha256(),
            positions: self.positions,
        })
    }

    /// Tokens that losses are means over.
    fn scored_tokens(&self) -> usize {
        self.measured.sequences.iter().map(|ids| ids.len().min(self.positions)).sum()
    }

    /// The model with nothing but embedding and head quantized.
    pub fn ends_plan(&self) -> Plan {
        Plan { embedding: self.embedding, head: self.head, ..Plan::unquantized(self.checkpoint.layout.blocks.len()) }
    }
}

/// Linears that take a format together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unit {
    /// `3.in_proj`, `4.qkv_proj`, `1.experts.up_proj`, or `3` for a whole block.
    pub name: String,
    pub block: usize,
    /// Names inside the block's mixer.
    pub linears: Vec<String>,
}

impl Unit {
    /// Bytes that its linears store under `format`.
    pub fn bytes(&self, layout: &Layout, format: Format) -> u64 {
        self.specs(layout).map(|linear| linear.stored_bytes(format, layout.float_bytes)).sum()
    }

    /// Weights of its linears.
    pub fn weights(&self, layout: &Layout) -> u64 {
        self.specs(layout).map(crate::checkpoint::LinearSpec::weights).sum()
    }

    /// Its linears in the layout.
    pub fn specs<'a>(&'a self, layout: &'a Layout) -> impl Iterator<Item = &'a crate::checkpoint::LinearSpec> {
        layout.blocks[self.block].linears.iter().filter(|linear| self.linears.contains(&linear.name))
    }
}

/// The units of a model, in order.
pub fn units(layout: &Layout, by: Granularity) -> Vec<Unit> {
    layout.blocks.iter().flat_map(|block| block_units(block, by)).collect()
}

fn block_units(block: &BlockSpec, by: Granularity) -> Vec<Unit> {
    let names = || block.linears.iter().map(|linear| linear.name.clone());
    if by == Granularity::Block {
        return vec![Unit { name: block.index.to_string(), block: block.index, linears: names().collect() }];
    }
    let mut units: Vec<Unit> = Vec::new();
    for name in names() {
        let label = match (block.kind, name.split('.').collect::<Vec<_>>().as_slice()) {
            (BlockKind::Attention, ["q_proj" | "k_proj" | "v_proj"]) => "qkv_proj".to_owned(),
            (BlockKind::Moe, ["experts", _, rest]) => format!("experts.{rest}"),
            _ => name.clone(),
        };
        let label = format!("{}.{label}", block.index);
        match units.iter_mut().find(|unit| unit.name == label) {
            Some(unit) => unit.linears.push(name),
            None => units.push(Unit { name: label, block: block.index, linears: vec![name] }),
        }
    }
    units
}

/// What a unit loses in a format.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Loss {
    pub format: Format,
    /// Stored bytes of the unit's linears.
    pub bytes: u64,
    /// ‖quantized − float‖² / ‖float‖² of the block's output with only this unit quantized.
    pub output_error: f64,
    /// Mean divergence of the model in nats a token, and its standard error over windows.
    pub kld: f64,
    pub stderr: f64,
    /// Measured end to end; otherwise estimated from the output error and the nearest measured format.
    pub measured: bool,
}

/// A unit with what it loses in each format, widest first.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct UnitLosses {
    pub name: String,
    pub block: usize,
    pub kind: BlockKind,
    pub linears: Vec<String>,
    pub weights: u64,
    /// Bytes of its linears as they are in the checkpoint.
    pub unquantized_bytes: u64,
    pub losses: Vec<Loss>,
}

impl UnitLosses {
    fn new(unit: Unit, layout: &Layout, losses: Vec<Loss>) -> Self {
        let (weights, unquantized_bytes) = (unit.weights(layout), unit.bytes(layout, Format::W16A16));
        let Unit { name, block, linears } = unit;
        Self { name, block, kind: layout.blocks[block].kind, linears, weights, unquantized_bytes, losses }
    }

    /// The loss in `format`: none at all where it stays as it is in the checkpoint.
    pub fn loss(&self, format: Format) -> Option<Loss> {
        if format == Format::W16A16 {
            return Some(Loss { format, bytes: self.unquantized_bytes, output_error: 0.0, kld: 0.0, stderr: 0.0, measured: true });
        }
        self.losses.iter().find(|loss| loss.format == format).copied()
    }

    /// What int8 activations alone lose, int8 SSM internals among them: W8A8 less W8A16, whose weights are the same. `None` where either is missing.
    pub fn activation_kld(&self) -> Option<f64> {
        Some((self.loss(Format::W8A8)?.kld - self.loss(Format::W8A16)?.kld).max(0.0))
    }
}

/// The units of a model before anything is measured: their bytes in `formats`, and no losses.
pub fn unmeasured_units(layout: &Layout, by: Granularity, formats: &[Format]) -> Vec<UnitLosses> {
    let losses = |unit: &Unit| {
        let loss = |format: &Format| {
            let (format, bytes) = (*format, unit.bytes(layout, *format));
            Loss { format, bytes, output_error: 0.0, kld: 0.0, stderr: 0.0, measured: false }
        };
        formats.iter().map(loss).collect()
    };
    units(layout, by).into_iter().map(|unit| UnitLosses { losses: losses(&unit), ..UnitLosses::new(unit, layout, Vec::new()) }).collect()
}

/// Formats of which every unit knows the loss, widest first.
pub fn common_formats(units: &[UnitLosses]) -> Vec<Format> {
    let Some((first, rest)) = units.split_first() else { return Vec::new() };
    let known = |format: &Format| rest.iter().all(|unit| unit.loss(*format).is_some());
    first.losses.iter().map(|loss| loss.format).filter(known).collect()
}

/// A plan put together from the donors and measured: how far predictions can be trusted.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Check {
    pub plan: Plan,
    /// Sum of its units' losses and of the ends'.
    pub predicted: f64,
    /// On the tokens that the losses were measured on.
    pub measured: f64,
    pub stderr: f64,
}

impl Check {
    /// Measured over predicted: 1 where losses add up.
    pub fn ratio(&self) -> f64 {
        self.measured / self.predicted
    }
}

/// The sensitivities of a model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sensitivities {
    pub schema: String,
    pub model: String,
    pub identity: Identity,
    /// Tokens that losses were measured on.
    pub tokens: usize,
    /// Whether the measurement of all formats came to its end: one that was stopped has more estimates than were asked for, and
    /// fewer checks.
    pub complete: bool,
    pub units: Vec<UnitLosses>,
    /// What embedding and head lose together in the recipe's formats.
    pub ends_kld: f64,
    pub checks: Vec<Check>,
    /// Folder of the donors.
    pub donors: PathBuf,
}

impl Sensitivities {
    /// Formats of which every unit knows the loss, widest first.
    pub fn formats(&self) -> Vec<Format> {
        common_formats(&self.units)
    }

    /// Divergence that `plan` is predicted to have: the sum of what its units and the ends lose. `None` where a unit's
    /// linears differ in format, or have one that was not measured.
    pub fn predict(&self, plan: &Plan, layout: &Layout) -> Option<f64> {
        self.blocks(plan, layout).into_iter().try_fold(self.ends_kld, |sum, block| Some(sum + block?))
    }

    /// What each block is predicted to lose under `plan`: the sum over its units. `None` as in [`Sensitivities::predict`].
    pub fn blocks(&self, plan: &Plan, layout: &Layout) -> Vec<Option<f64>> {
        let mut blocks = vec![Some(0.0); layout.blocks.len()];
        for unit in &self.units {
            let kld = unit_format(plan, layout, unit).and_then(|format| unit.loss(format)).map(|loss| loss.kld);
            blocks[unit.block] = blocks[unit.block].zip(kld).map(|(sum, kld)| sum + kld);
        }
        blocks
    }

    /// Losses by name of the unit.
    pub fn by_name(&self) -> BTreeMap<&str, &UnitLosses> {
        self.units.iter().map(|unit| (unit.name.as_str(), unit)).collect()
    }
}

/// The one format that `plan` gives to all linears (and slices) of a unit.
pub fn unit_format(plan: &Plan, layout: &Layout, unit: &UnitLosses) -> Option<Format> {
    let block = &layout.blocks[unit.block];
    // Names sort by block: the first one that could be of this block tells whether any is.
    let named = plan.linears.range(block.prefix.clone()..).next().is_some_and(|(name, _)| name.starts_with(&block.prefix));
    if !named {
        return plan.blocks.get(unit.block).copied();
    }
    let mut formats = unit.linears.iter().filter_map(|name| block.linear(name)).flat_map(|linear| {
        let slices = linear.slices.iter().map(|slice| plan.slice(unit.block, &linear.stem, slice.name));
        std::iter::once(plan.linear(unit.block, &linear.stem)).chain(slices)
    });
    let first = formats.next()?;
    formats.all(|format| format == first).then_some(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn q_k_and_v_and_the_experts_of_a_layer_are_one_unit_each() {
        let layout = crate::checkpoint::open("tests/golden/moe-latent").unwrap().layout;
        let units = units(&layout, Granularity::Linear);
        let of_kind = |kind: BlockKind| {
            let block = layout.blocks.iter().find(|block| block.kind == kind).unwrap();
            let own = units.iter().filter(|unit| unit.block == block.index);
            let short = |unit: &Unit| unit.name.split_once('.').unwrap().1.to_owned();
            (block, own.map(|unit| (short(unit), unit.linears.len())).collect::<Vec<_>>())
        };
        let (_, attention) = of_kind(BlockKind::Attention);
        assert_eq!(attention, [("qkv_proj".to_owned(), 3), ("o_proj".to_owned(), 1)]);
        let (block, moe) = of_kind(BlockKind::Moe);
        let experts = block.linears.iter().filter(|linear| linear.name.starts_with("experts.")).count() / 2;
        assert!(experts > 1);
        for unit in ["experts.up_proj", "experts.down_proj"] {
            assert!(moe.contains(&(unit.to_owned(), experts)), "{moe:?}");
        }
        assert!(moe.iter().any(|(name, linears)| name.starts_with("shared_experts.") && *linears == 1), "{moe:?}");
        // No linear is in two units, and none in no unit.
        let linears: usize = layout.blocks.iter().map(|block| block.linears.len()).sum();
        assert_eq!(units.iter().map(|unit| unit.linears.len()).sum::<usize>(), linears);
        assert_eq!(super::units(&layout, Granularity::Block).len(), layout.blocks.len());
    }

    #[test]
    fn long_windows_are_fewer_and_scored_in_part() {
        let ends = Plan::unquantized(1);
        let spec = |length| {
            let sample = SampleSpec { length, ..SampleSpec::default() };
            let spec = SensitivitySpec::new(Steps::new(Vec::new(), crate::quant::Method::Rtn), &ends, sample);
            (spec.windows, spec.positions)
        };
        assert_eq!([256, 2048, 8192].map(spec), [(32, 256), (8, 1024), (8, 1024)]);
    }
}
