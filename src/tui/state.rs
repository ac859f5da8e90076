//! [`State`]: everything the screen shows. Panes draw from it; only [`update`](super::update::update) changes it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use super::document::Document;
use super::filter::Filter;
use super::measurements::Measurements;
use super::popups::Popup;
use super::queue::{Level, Queue};
use super::theme::Theme;
use crate::analysis::{Gpu, Inventory, Prediction};
use crate::error::Error;
use crate::format::{Format, Plan, Selector};
use crate::session::UiSpec;

/// The panes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pane {
    Layers,
    Plan,
    Run,
    Block,
    Results,
}

impl Pane {
    /// In the order of their numbers.
    pub const ALL: [Self; 5] = [Self::Layers, Self::Plan, Self::Run, Self::Block, Self::Results];

    /// The number that switches to it.
    pub fn number(self) -> usize {
        self as usize + 1
    }

    /// The title, which is also the name in a session file (in lower case).
    pub fn title(self) -> &'static str {
        match self {
            Self::Layers => "Layers",
            Self::Plan => "Plan",
            Self::Run => "Run",
            Self::Block => "Block",
            Self::Results => "Results",
        }
    }
}

/// Whether the weights were read for what the inventory says of them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Inspection {
    Reading,
    Done,
    Failed,
}

/// A sentence for the status line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    pub level: Level,
    pub text: String,
}

/// The list of blocks: cursor, selection, filter.
#[derive(Debug, Default)]
pub struct Layers {
    /// Index of the block under the cursor.
    pub cursor: usize,
    pub selected: BTreeSet<usize>,
    /// Where a range selection began.
    pub anchor: Option<usize>,
    pub filter: Filter,
}

/// How the plan is shown, and what is copied from it.
#[derive(Debug)]
pub struct PlanView {
    /// The GPU that predictions are made for.
    pub gpu: Gpu,
    /// Name of the variant whose plan stands beside the current one.
    pub beside: Option<String>,
    /// Formats of the blocks that were copied, in their order.
    pub clipboard: Vec<Format>,
}

impl Default for PlanView {
    fn default() -> Self {
        Self { gpu: Gpu::ALL[0], beside: None, clipboard: Vec::new() }
    }
}

/// How the results are shown.
#[derive(Debug, Default)]
pub struct ResultsView {
    /// Title of the column that variants are sorted by; without one they stand as in the session.
    pub sort: Option<String>,
    /// Largest first.
    pub descending: bool,
    /// Without the lines of differences from the base.
    pub hide_differences: bool,
    /// Columns scrolled away on the left.
    pub first_column: usize,
    pub cursor: usize,
}

/// The state of the workbench.
pub struct State {
    pub document: Document,
    /// The session's file, when it has one.
    pub path: Option<PathBuf>,
    pub layers: Layers,
    pub plan: PlanView,
    pub queue: Queue,
    pub measurements: Measurements,
    pub results: ResultsView,
    /// The layout's part is known at once, what the weights say when they were read.
    pub inventory: Box<Inventory>,
    pub inspection: Inspection,
    pub focus: Pane,
    /// The focused pane fills the screen.
    pub zoom: bool,
    /// Open popups, the front one last.
    pub popups: Vec<Popup>,
    pub message: Option<Message>,
    pub theme: Theme,
    pub ascii: bool,
    pub size: (u16, u16),
    /// Since the start.
    pub clock: Duration,
    pub resident_bytes: u64,
}

impl State {
    /// The state at the start, on an opened session.
    pub fn new(document: Document, path: Option<PathBuf>, theme: Theme, ascii: bool, size: (u16, u16)) -> Self {
        let inventory = Box::new(Inventory::of_layout(&document.settings().model.id, &document.layout));
        let mut state = Self {
            document,
            path,
            layers: Layers::default(),
            plan: PlanView::default(),
            queue: Queue::default(),
            measurements: Measurements::default(),
            results: ResultsView::default(),
            inventory,
            inspection: Inspection::Reading,
            focus: Pane::Layers,
            zoom: false,
            popups: Vec::new(),
            message: None,
            theme,
            ascii,
            size,
            clock: Duration::ZERO,
            resident_bytes: 0,
        };
        state.apply_ui();
        state
    }

    /// Puts the screen as the session's `[ui]` says.
    pub fn apply_ui(&mut self) {
        let ui = self.document.settings().ui.clone();
        if let Some(pane) = ui.pane.and_then(|name| Pane::ALL.into_iter().find(|pane| pane.title().eq_ignore_ascii_case(&name))) {
            self.focus = pane;
        }
        if let Some(sort) = ui.sort {
            self.results.descending = sort.starts_with('-');
            self.results.sort = Some(sort.trim_start_matches('-').to_owned());
        }
        if let Some(gpu) = ui.gpu.and_then(|name| Gpu::find(&name).ok()) {
            self.plan.gpu = gpu;
        }
    }

    /// The screen as `[ui]` would say it.
    pub fn ui(&self) -> UiSpec {
        let sign = if self.results.descending { "-" } else { "" };
        UiSpec {
            pane: Some(self.focus.title().to_lowercase()),
            sort: self.results.sort.as_ref().map(|sort| format!("{sign}{sort}")),
            gpu: Some(self.plan.gpu.name.to_owned()),
        }
    }

    /// Says `text` in the status line.
    pub fn say(&mut self, text: impl Into<String>) {
        self.message = Some(Message { level: Level::Info, text: text.into() });
    }

    /// Says what went wrong in the status line.
    pub fn complain(&mut self, error: &Error) {
        let hint = error.hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default();
        self.message = Some(Message { level: Level::Error, text: format!("{}{hint}", error.message) });
    }

    /// The blocks that the filter lets through.
    pub fn visible_blocks(&self) -> Vec<usize> {
        let plan = &self.document.draft().plan;
        let meets = |index: &usize| self.layers.filter.meets(*index, self.document.kinds[*index], plan.blocks[*index]);
        (0..self.document.kinds.len()).filter(meets).collect()
    }

    /// What `plan` would cost on the chosen GPU.
    pub fn predict(&self, plan: &Plan) -> Prediction {
        Prediction::new(&self.document.config, &self.document.footprint, plan, &self.plan.gpu)
    }

    /// Place of the variant whose plan stands beside the current one.
    pub fn beside(&self) -> Option<usize> {
        let name = self.plan.beside.as_ref()?;
        self.document.drafts.iter().position(|draft| draft.name == *name).filter(|index| *index != self.document.current())
    }

    /// What an edit means: the selection, or the block under the cursor; as ranges.
    pub fn targets(&self) -> Vec<Selector> {
        if self.layers.selected.is_empty() {
            return vec![Selector::Blocks(self.layers.cursor, self.layers.cursor)];
        }
        let mut ranges: Vec<(usize, usize)> = Vec::new();
        for index in &self.layers.selected {
            match ranges.last_mut() {
                Some((_, last)) if *last + 1 == *index => *last = *index,
                _ => ranges.push((*index, *index)),
            }
        }
        ranges.into_iter().map(|(first, last)| Selector::Blocks(first, last)).collect()
    }
}
