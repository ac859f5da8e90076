//! The layer inventory: a row a block, totals by kind, and a suggested plan.

use std::collections::BTreeMap;

use serde::Serialize;

use super::outliers;
use crate::checkpoint::{BlockSpec, Checkpoint, Layout, LinearSpec};
use crate::error::Result;
use crate::format::{BlockKind, Format, Plan, Scheme};

/// How much a block is expected to lose when quantized, before anything is measured: a rule of thumb, not a result.
/// Attention is rare in hybrids and carries all exact recall; the SSM block in front of it feeds it; both stay wide in
/// NVIDIA's hand-made recipes. Other SSM blocks lose more than MLPs, whose errors do not accumulate in a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sensitivity {
    Low,
    Medium,
    High,
}

impl Sensitivity {
    /// The word used in tables.
    pub fn name(self) -> &'static str {
        match self {
            Self::Low => "low",
            Self::Medium => "medium",
            Self::High => "high",
        }
    }
}

/// How a format suits a block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FormatFit {
    pub format: Format,
    pub bytes: u64,
    /// Input groups that the block's linears take below 8 bits; empty for other formats.
    pub groups: Vec<usize>,
    /// Linears whose width no group divides: they take int8 instead.
    pub fallbacks: Vec<String>,
}

/// One block.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct BlockRow {
    pub index: usize,
    pub kind: BlockKind,
    pub parameters: u64,
    /// Bytes in the checkpoint's precision.
    pub bytes: u64,
    /// Share of the model's parameters.
    pub share: f64,
    /// Largest |w| over root mean square, worst linear; `null` when only the configuration is known.
    pub outlier_ratio: Option<f64>,
    /// A rule of thumb, not a measurement.
    pub sensitivity: Sensitivity,
    pub suitability: Vec<FormatFit>,
    pub suggested: Format,
}

/// A kind of block, the embedding or the head, in sum.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Totals {
    pub kind: String,
    pub count: usize,
    pub parameters: u64,
    pub bytes: u64,
    pub share: f64,
}

/// The layers of a model.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Inventory {
    pub model: String,
    pub total_parameters: u64,
    pub total_bytes: u64,
    pub blocks: Vec<BlockRow>,
    pub totals: Vec<Totals>,
    /// Phase 3, with the SSM block in front of each attention block kept at 8 bits.
    pub suggested_plan: Plan,
    pub suggested_bytes: u64,
    /// Neighbouring blocks that read activations of different bits under the suggested plan.
    pub suggested_transitions: usize,
}

impl Inventory {
    /// From a configuration alone.
    pub fn of_layout(model: &str, layout: &Layout) -> Self {
        Self::build(model, layout, vec![None; layout.blocks.len()])
    }

    /// With what the weights say; reads every linear once, block by block.
    pub fn of_checkpoint(checkpoint: &Checkpoint) -> Result<Self> {
        let outliers = if checkpoint.variant.is_some() {
            vec![None; checkpoint.layout.blocks.len()]
        } else {
            let ratio = |block| outliers::outlier_ratio(checkpoint, block).map(Some);
            checkpoint.layout.blocks.iter().map(ratio).collect::<Result<_>>()?
        };
        Ok(Self::build(&checkpoint.name, &checkpoint.layout, outliers))
    }

    fn build(model: &str, layout: &Layout, outliers: Vec<Option<f64>>) -> Self {
        let total_parameters = layout.parameters();
        let float_bytes = layout.float_bytes as u64;
        let share = |parameters: u64| parameters as f64 / total_parameters as f64;
        let suggested_plan = suggest(layout);
        let blocks: Vec<BlockRow> = layout
            .blocks
            .iter()
            .zip(outliers)
            .map(|(block, outlier_ratio)| BlockRow {
                index: block.index,
                kind: block.kind,
                parameters: block.parameters(),
                bytes: block.parameters() * float_bytes,
                share: share(block.parameters()),
                outlier_ratio,
                sensitivity: sensitivity(layout, block.index),
                suitability: Format::ALL.into_iter().skip(1).map(|format| fit(block, format, layout.float_bytes)).collect(),
                suggested: suggested_plan.blocks[block.index],
            })
            .collect();
        let mut by_kind: BTreeMap<BlockKind, (usize, u64)> = BTreeMap::new();
        for row in &blocks {
            let (count, parameters) = by_kind.entry(row.kind).or_default();
            *count += 1;
            *parameters += row.parameters;
        }
        let total = |kind: &str, count, parameters| Totals {
            kind: kind.into(),
            count,
            parameters,
            bytes: parameters * float_bytes,
            share: share(parameters),
        };
        let mut totals: Vec<Totals> =
            by_kind.into_iter().map(|(kind, (count, parameters))| total(kind.name(), count, parameters)).collect();
        totals.push(total("embedding", 1, layout.embedding.weights()));
        totals.push(total("head", 1, if layout.tied { 0 } else { layout.head.weights() }));
        totals.push(total("final norm", 1, layout.final_norm.elements()));
        Self {
            model: model.into(),
            total_parameters,
            total_bytes: total_parameters * float_bytes,
            blocks,
            totals,
            suggested_bytes: layout.total_bytes(&suggested_plan),
            suggested_transitions: suggested_plan.activation_transitions(),
            suggested_plan,
        }
    }
}

fn sensitivity(layout: &Layout, index: usize) -> Sensitivity {
    let feeds_attention = layout.blocks.get(index + 1).is_some_and(|next| next.kind == BlockKind::Attention);
    match layout.blocks[index].kind {
        BlockKind::Attention => Sensitivity::High,
        BlockKind::Ssm if feeds_attention => Sensitivity::High,
        BlockKind::Ssm => Sensitivity::Medium,
        BlockKind::Mlp | BlockKind::Moe => Sensitivity::Low,
    }
}

fn suggest(layout: &Layout) -> Plan {
    let format = |block: &BlockSpec| match block.kind {
        BlockKind::Ssm if sensitivity(layout, block.index) < Sensitivity::High => Format::W4A8,
        _ => Format::W8A8,
    };
    Plan { embedding: Format::W8A16, head: Format::W8A8, blocks: layout.blocks.iter().map(format).collect(), ..Plan::unquantized(0) }
}

fn fit(block: &BlockSpec, format: Format, float_bytes: usize) -> FormatFit {
    let falls_back = |linear: &&LinearSpec| format.weight_bits() < 8 && Scheme::for_width(format, 2, linear.cols) == Scheme::Int8;
    let mut groups: Vec<usize> = block
        .linears
        .iter()
        .flat_map(|linear| linear.schemes(format))
        .filter_map(|scheme| match scheme {
            Scheme::Grouped { group, .. } => Some(group),
            _ => None,
        })
        .collect();
    groups.sort_unstable();
    groups.dedup();
    FormatFit {
        format,
        bytes: block.linear_bytes(format, float_bytes),
        groups,
        fallbacks: block.linears.iter().filter(falls_back).map(|linear| linear.name.clone()).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn demo_inventory_adds_up() {
        let inventory = Inventory::of_checkpoint(&crate::checkpoint::open("demo").unwrap()).unwrap();
        assert_eq!(inventory.totals.iter().map(|total| total.parameters).sum::<u64>(), inventory.total_parameters);
        assert!((inventory.totals.iter().map(|total| total.share).sum::<f64>() - 1.0).abs() < 1e-12);
        // Blocks 4 and 9 are the SSM blocks in front of attention.
        assert_eq!(inventory.blocks[4].suggested, Format::W8A8);
        assert_eq!(inventory.blocks[0].suggested, Format::W4A8);
        assert!(inventory.blocks.iter().all(|block| block.outlier_ratio.unwrap() > 2.0));
    }
}
