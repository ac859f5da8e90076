//! The list of blocks as a tree: kinds (when grouped) → blocks → modules → slices, in the order that was asked for.

use crate::checkpoint::{BlockSpec, LinearSpec};
use crate::format::{BlockKind, Format, Plan};

use super::state::State;

/// A line of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Row {
    Kind(BlockKind),
    Block(usize),
    /// Block, place among its [`modules`].
    Module(usize, usize),
    /// Block, module, place among the module's slices.
    Slice(usize, usize, usize),
}

impl Row {
    /// The block that the row belongs to.
    pub fn block(self) -> Option<usize> {
        match self {
            Self::Kind(_) => None,
            Self::Block(block) | Self::Module(block, _) | Self::Slice(block, ..) => Some(block),
        }
    }
}

/// A column that the list can be sorted by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Column {
    Number,
    Kind,
    Parameters,
    Bytes,
    Format,
    Error,
    Loss,
    Outliers,
    Risk,
}

impl Column {
    /// In the order of the list.
    pub const ALL: [Self; 9] =
        [Self::Number, Self::Kind, Self::Parameters, Self::Bytes, Self::Format, Self::Error, Self::Loss, Self::Outliers, Self::Risk];

    /// The head of the column, which is also its name in a session file.
    pub fn title(self) -> &'static str {
        match self {
            Self::Number => "#",
            Self::Kind => "kind",
            Self::Parameters => "params",
            Self::Bytes => "bytes",
            Self::Format => "format",
            Self::Error => "error",
            Self::Loss => "ΔKLD",
            Self::Outliers => "max/rms",
            Self::Risk => "risk",
        }
    }

    /// What a block is sorted by.
    fn key(self, state: &State, block: usize) -> f64 {
        let plan = state.plan();
        let row = &state.inventory.blocks[block];
        match self {
            Self::Number => block as f64,
            Self::Kind => f64::from(state.document.kinds[block] as u8),
            Self::Parameters => row.parameters as f64,
            Self::Bytes => bytes(state, plan, block) as f64,
            Self::Format => Format::ALL.iter().position(|format| *format == plan.blocks[block]).unwrap_or(Format::ALL.len()) as f64,
            Self::Error => state.error(block).map_or(-1.0, |(error, _)| error),
            Self::Loss => state.losses.block(block).unwrap_or(-1.0),
            Self::Outliers => row.outlier_ratio.unwrap_or(-1.0),
            Self::Risk => f64::from(row.sensitivity as u8),
        }
    }
}

/// Bytes of a block under `plan`, with what stays in float.
pub fn bytes(state: &State, plan: &Plan, block: usize) -> u64 {
    state.document.footprint.linears(plan, block).stored + state.document.footprint.float(block)
}

/// Linears of a block that are alike: one, or the same one of every expert.
#[derive(Debug)]
pub struct Module<'a> {
    /// `in_proj`; `experts.*.up_proj`.
    pub name: String,
    pub linears: Vec<&'a LinearSpec>,
}

impl Module<'_> {
    /// Their formats under `plan`: the first one's, and whether all have it.
    pub fn format(&self, plan: &Plan, block: usize) -> (Format, bool) {
        let first = plan.linear(block, &self.linears[0].stem);
        (first, self.linears.iter().all(|linear| plan.linear(block, &linear.stem) == first))
    }

    /// Bytes that they store under `plan`.
    pub fn bytes(&self, plan: &Plan, block: usize, float_bytes: usize) -> u64 {
        self.linears.iter().map(|linear| linear.bytes_in(&linear.planned_schemes(plan, block), float_bytes)).sum()
    }

    /// Weights of all of them.
    pub fn weights(&self) -> u64 {
        self.linears.iter().map(|linear| linear.weights()).sum()
    }
}

/// The linears of a block, those of the experts together.
pub fn modules(block: &BlockSpec) -> Vec<Module<'_>> {
    let mut modules: Vec<Module> = Vec::new();
    for linear in &block.linears {
        let part = |part: &str| if part.parse::<usize>().is_ok() { "*".to_owned() } else { part.to_owned() };
        let name = linear.name.split('.').map(part).collect::<Vec<_>>().join(".");
        match modules.iter_mut().find(|module| module.name == name) {
            Some(module) => module.linears.push(linear),
            None => modules.push(Module { name, linears: vec![linear] }),
        }
    }
    modules
}

/// Every line of the list, from top to bottom.
pub fn rows(state: &State) -> Vec<Row> {
    let mut rows = Vec::new();
    let mut last = None;
    for block in ordered_blocks(state) {
        let kind = state.document.kinds[block];
        if state.layers.grouped && last != Some(kind) {
            rows.push(Row::Kind(kind));
            last = Some(kind);
        }
        rows.push(Row::Block(block));
        if state.layers.open.contains(&block) {
            for (place, module) in modules(&state.document.layout.blocks[block]).iter().enumerate() {
                rows.push(Row::Module(block, place));
                let slices = module.linears[0].slices.len();
                rows.extend((0..if slices > 1 { slices } else { 0 }).map(|slice| Row::Slice(block, place, slice)));
            }
        }
    }
    rows
}

/// The blocks that the filter lets through, sorted and grouped.
fn ordered_blocks(state: &State) -> Vec<usize> {
    let mut blocks = state.visible_blocks();
    if let Some(column) = state.layers.sort {
        let mut keyed: Vec<(f64, usize)> = blocks.into_iter().map(|block| (column.key(state, block), block)).collect();
        keyed.sort_by(|a, b| if state.layers.descending { b.0.total_cmp(&a.0) } else { a.0.total_cmp(&b.0) });
        blocks = keyed.into_iter().map(|(_, block)| block).collect();
    }
    if state.layers.grouped {
        blocks.sort_by_key(|block| state.document.kinds[*block]);
    }
    blocks
}

/// The row under the cursor.
pub fn cursor(state: &State) -> Row {
    let block = state.layers.cursor;
    match state.layers.inside {
        None => Row::Block(block),
        Some((module, None)) => Row::Module(block, module),
        Some((module, Some(slice))) => Row::Slice(block, module, slice),
    }
}
