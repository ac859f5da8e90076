//! [`State`]: everything the screen shows. Panes draw from it; only [`update`](super::update::update) changes it.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use super::allocating::{Allocating, Awaited};
use super::background::Query;
use super::document::{Document, Draft};
use super::filter::Filter;
use super::keymap::Keymap;
use super::losses::Losses;
use super::measurements::{Measurements, Origin};
use super::popups::Popup;
use super::queue::{Level, LogLine, Queue};
use super::theme::Theme;
use super::tree::Column;
use crate::analysis::{Gpu, Inventory, Prediction};
use crate::engine::inspect::{LinearLook, RoundingError};
use crate::engine::{BlockInputs, GpuReading, Spoken};
use crate::error::Error;
use crate::eval::ModelResult;
use crate::eval::paired::Comparison;
use crate::eval::score::Sample;
use crate::eval::tasks::Question;
use crate::format::{Format, Plan, Selector};
use crate::monitor::CancelToken;
use crate::session::UiSpec;
use crate::session::remembered::Remembered;
use crate::session::runs::Status;

/// The panes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pane {
    Layers,
    Plan,
    Run,
    Block,
    Results,
    Playground,
}

impl Pane {
    /// In the order of their numbers.
    pub const ALL: [Self; 6] = [Self::Layers, Self::Plan, Self::Run, Self::Block, Self::Results, Self::Playground];

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
            Self::Playground => "Playground",
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

/// How long a toast stays.
const TOAST: Duration = Duration::from_secs(6);
/// Toasts on the screen, at most.
const TOASTS: usize = 4;
/// Messages kept to look back on.
const MESSAGES: usize = 500;

/// A message of something that happened by itself, in a corner for a while.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Toast {
    pub message: Message,
    /// On the workbench's clock.
    pub until: Duration,
}

/// The list of blocks: cursor, selection, filter.
#[derive(Debug, Default)]
pub struct Layers {
    /// Index of the block under the cursor.
    pub cursor: usize,
    /// Module, and slice of it, when the cursor is inside an open block.
    pub inside: Option<(usize, Option<usize>)>,
    /// Blocks whose modules are listed.
    pub open: BTreeSet<usize>,
    /// Without a column the blocks stand as in the model.
    pub sort: Option<Column>,
    /// Largest first.
    pub descending: bool,
    /// Blocks of a kind together.
    pub grouped: bool,
    pub selected: BTreeSet<usize>,
    /// Where a range selection began.
    pub anchor: Option<usize>,
    pub filter: Filter,
    pub strip: Strip,
}

/// What the lower line of the strip shows of each block.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Strip {
    /// Bits of the weights.
    #[default]
    Bits,
    /// What it is predicted to lose.
    Loss,
    /// Its measured output error.
    Error,
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

/// What is known of the weights of a block.
#[derive(Debug, Default)]
pub struct BlockLook {
    pub linears: Vec<LinearLook>,
    pub roundings: Vec<RoundingError>,
    /// Everything is there.
    pub done: bool,
    /// Why there is no more.
    pub failure: Option<String>,
}

/// What the Block pane shows beside the plan.
#[derive(Debug, Default)]
pub struct Looks {
    pub blocks: BTreeMap<usize, BlockLook>,
    /// The block being looked at, and what stops that.
    pub current: Option<(usize, CancelToken)>,
    /// Largest inputs of the linears over the sample, by block.
    pub inputs: BTreeMap<usize, BlockInputs>,
    /// Lines scrolled away.
    pub scroll: usize,
}

/// One of the two models that are compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    A,
    B,
}

/// A side as far as it is measured.
pub struct SideView<'a> {
    /// `base` or the variant's name.
    pub name: String,
    /// What [`crate::checkpoint::open`] takes; nothing while the variant is not quantized.
    pub path: Option<String>,
    pub result: Option<&'a ModelResult>,
    pub samples: Option<&'a Arc<Vec<Sample>>>,
    /// Errors of the blocks; the base has none.
    pub errors: Option<&'a [f64]>,
}

/// A against B, row by row.
#[derive(Debug)]
pub struct Compared {
    /// The rows that were compared.
    pub samples: [Arc<Vec<Sample>>; 2],
    pub comparison: Comparison,
    /// The questions that changed sides, by task and index.
    pub questions: BTreeMap<(String, usize), Question>,
}

/// What the Results pane shows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ResultsTab {
    #[default]
    Table,
    /// A against B.
    Compare,
    /// The rows that changed sides.
    Flips,
    /// Size against loss.
    Plot,
}

/// What the plot has upwards.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Ordinate {
    #[default]
    Kld,
    Accuracy,
}

/// How the results are shown.
#[derive(Debug, Default)]
pub struct ResultsView {
    pub tab: ResultsTab,
    /// Names of A and B; without them the base and the variant being edited.
    pub sides: [Option<String>; 2],
    pub ordinate: Ordinate,
    /// Shows the variants whose name, recipe or formats have these words.
    pub filter: String,
    pub compared: Option<Compared>,
    /// Rows that are being compared.
    pub comparing: Option<[Arc<Vec<Sample>>; 2]>,
    /// The flipped row under the cursor.
    pub flip: usize,
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

/// One prompt, two models.
#[derive(Debug, Default)]
pub struct Playground {
    pub prompt: String,
    /// Names of the models that spoke.
    pub names: [String; 2],
    pub spoken: [Vec<Spoken>; 2],
    /// KL(A ‖ B) in nats of each token of A's text.
    pub divergence: Vec<f64>,
    /// The token looked at.
    pub cursor: usize,
}

impl Playground {
    /// Where the texts part, if they do.
    pub fn parting(&self) -> Option<usize> {
        let [a, b] = &self.spoken;
        let differs = a.iter().zip(b).position(|(a, b)| a.token != b.token);
        differs.or_else(|| (a.len() != b.len()).then_some(a.len().min(b.len())))
    }
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
    pub losses: Losses,
    /// The front, while a budget is moved over it.
    pub allocating: Option<Box<Allocating>>,
    /// What waits for the plans of every budget to be found.
    pub awaited: Option<Awaited>,
    pub results: ResultsView,
    pub looks: Looks,
    pub playground: Playground,
    pub keymap: Keymap,
    pub background: Query,
    /// Whether clicks and the wheel come here; otherwise they are the terminal's, to select text with.
    pub mouse: bool,
    /// The layout's part is known at once, what the weights say when they were read.
    pub inventory: Box<Inventory>,
    pub inspection: Inspection,
    pub focus: Pane,
    /// The focused pane fills the screen.
    pub zoom: bool,
    /// Open popups, the front one last.
    pub popups: Vec<Popup>,
    pub message: Option<Message>,
    pub toasts: Vec<Toast>,
    /// Everything that was said, to look back on.
    pub messages: VecDeque<LogLine>,
    /// Runs of all processes as they were last looked at, and the end of the log of the one that is followed.
    pub runs: (Vec<Status>, Vec<String>),
    pub gpus: Vec<GpuReading>,
    /// Nothing may be changed: no session, no file, no job.
    pub read_only: bool,
    /// Since when the workbench waits for the job at hand to stop, to hand it over and leave.
    pub leaving: Option<Duration>,
    pub theme: Theme,
    /// The theme that the user chose while running, now or in an earlier start; without one, the terminal decides.
    pub chosen_theme: Option<String>,
    pub ascii: bool,
    pub size: (u16, u16),
    /// Since the start.
    pub clock: Duration,
    pub resident_bytes: u64,
    /// Memory of the machine.
    pub host_bytes: Option<u64>,
}

impl Strip {
    const ALL: [Self; 3] = [Self::Bits, Self::Loss, Self::Error];

    /// As it is kept from one start to the next.
    fn name(self) -> &'static str {
        match self {
            Self::Bits => "bits",
            Self::Loss => "loss",
            Self::Error => "error",
        }
    }
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
            losses: Losses::default(),
            allocating: None,
            awaited: None,
            results: ResultsView::default(),
            looks: Looks::default(),
            playground: Playground::default(),
            keymap: Keymap::default(),
            background: Query::default(),
            mouse: true,
            inventory,
            inspection: Inspection::Reading,
            focus: Pane::Layers,
            zoom: false,
            popups: Vec::new(),
            message: None,
            toasts: Vec::new(),
            messages: VecDeque::new(),
            runs: (Vec::new(), Vec::new()),
            gpus: Vec::new(),
            read_only: false,
            leaving: None,
            theme,
            chosen_theme: None,
            ascii,
            size,
            clock: Duration::ZERO,
            resident_bytes: 0,
            host_bytes: None,
        };
        state.apply_ui();
        state
    }

    /// Puts the screen as the session's `[ui]` says, where there is one.
    pub fn apply_ui(&mut self) {
        let ui = self.document.settings().ui.clone();
        if ui != UiSpec::default() {
            self.put(&ui);
        }
    }

    fn put(&mut self, ui: &UiSpec) {
        let pane = |name: &String| Pane::ALL.into_iter().find(|pane| pane.title().eq_ignore_ascii_case(name));
        if let Some(pane) = ui.pane.as_ref().and_then(pane) {
            self.focus = pane;
        }
        if let Some(sort) = &ui.sort {
            self.results.descending = sort.starts_with('-');
            self.results.sort = Some(sort.trim_start_matches('-').to_owned());
        }
        if let Some(sort) = &ui.layers_sort {
            self.layers.descending = sort.starts_with('-');
            self.layers.sort = Column::ALL.into_iter().find(|column| column.title() == sort.trim_start_matches('-'));
        }
        self.layers.grouped = ui.layers_grouped;
        if let Some(gpu) = ui.gpu.as_ref().and_then(|name| Gpu::find(name).ok()) {
            self.plan.gpu = gpu;
        }
    }

    /// The screen as `[ui]` would say it.
    pub fn ui(&self) -> UiSpec {
        let sign = if self.results.descending { "-" } else { "" };
        UiSpec {
            pane: Some(self.focus.title().to_lowercase()),
            sort: self.results.sort.as_ref().map(|sort| format!("{sign}{sort}")),
            layers_sort: self.layers.sort.map(|column| format!("{}{}", if self.layers.descending { "-" } else { "" }, column.title())),
            layers_grouped: self.layers.grouped,
            gpu: Some(self.plan.gpu.name.to_owned()),
        }
    }

    /// Puts the screen as it was when the workbench was left last.
    pub fn recollect(&mut self, remembered: &Remembered) {
        self.put(&remembered.ui);
        self.zoom = remembered.zoom;
        self.results.hide_differences = remembered.hide_differences;
        self.mouse = !remembered.mouse_off;
        let strip = |name: &String| Strip::ALL.into_iter().find(|strip| strip.name() == name);
        self.layers.strip = remembered.strip.as_ref().and_then(strip).unwrap_or_default();
        self.chosen_theme.clone_from(&remembered.theme);
        self.apply_ui();
        let model = self.document.settings().model.id.clone();
        self.document.select_named(remembered.edited(self.path.as_deref(), &model));
    }

    /// Takes note of how the screen is.
    pub fn remember(&self, remembered: &mut Remembered) {
        remembered.ui = self.ui();
        (remembered.zoom, remembered.hide_differences) = (self.zoom, self.results.hide_differences);
        (remembered.mouse_off, remembered.strip) = (!self.mouse, Some(self.layers.strip.name().to_owned()));
        remembered.theme.clone_from(&self.chosen_theme);
        remembered.edits(self.path.as_deref(), &self.document.settings().model.id, &self.document.draft().name);
    }

    /// Whether something on the screen depends on the time.
    pub fn wants_ticks(&self) -> bool {
        let follows = self.popups.iter().any(|popup| matches!(popup, Popup::Runs(_)));
        self.queue.running().is_some() || !self.toasts.is_empty() || self.leaving.is_some() || follows
    }

    /// Says `text` in the status line, with the keys of the commands that it names (`{undo}`).
    pub fn say(&mut self, text: impl AsRef<str>) {
        let text = self.keymap.fill(text.as_ref());
        self.tell(Message { level: Level::Info, text });
    }

    /// Says in a corner what happened by itself.
    pub fn toast(&mut self, level: Level, text: impl Into<String>) {
        let message = Message { level, text: text.into() };
        self.log_message(&message);
        self.toasts.retain(|toast| toast.message != message);
        self.toasts.push(Toast { message, until: self.clock + TOAST });
        let surplus = self.toasts.len().saturating_sub(TOASTS);
        self.toasts.drain(..surplus);
    }

    fn tell(&mut self, message: Message) {
        self.log_message(&message);
        self.message = Some(message);
    }

    fn log_message(&mut self, message: &Message) {
        self.messages.push_back(LogLine { clock: self.clock, level: message.level, text: message.text.clone() });
        if self.messages.len() > MESSAGES {
            self.messages.pop_front();
        }
    }

    /// Says what went wrong in the status line.
    pub fn complain(&mut self, error: &Error) {
        let hint = error.hint.as_ref().map(|hint| format!(" ({})", self.keymap.fill(hint))).unwrap_or_default();
        self.tell(Message { level: Level::Error, text: format!("{}{hint}", error.message) });
    }

    /// The plan on the screen: the one under the budget, or else that of the variant being edited.
    pub fn plan(&self) -> &Plan {
        self.allocating.as_ref().map_or_else(|| self.plan_of(self.document.draft()), |allocating| &allocating.found.plan)
    }

    /// The plan of a variant. Where the formats are found by measurement, it is the one that was made, or else, for the
    /// variant being edited, the one that would be; before anything is measured, the budget.
    pub fn plan_of<'a>(&'a self, draft: &'a Draft) -> &'a Plan {
        if !draft.is_allocated() {
            return &draft.plan;
        }
        let made = self.measurements.of(draft).map(|row| &row.plan);
        let found = || self.losses.found().filter(|_| std::ptr::eq(draft, self.document.draft())).and_then(|found| found.as_ref().ok());
        made.or_else(found).unwrap_or(&draft.plan)
    }

    /// Follows the document and the measurements: what is found from them is found anew where they changed.
    pub fn follow(&mut self) {
        let draft = self.document.draft();
        if self.allocating.as_ref().is_some_and(|allocating| !allocating.holds(draft)) {
            self.allocating = None;
        }
        if self.awaited.as_ref().is_some_and(|awaited| awaited.draft != *draft) {
            self.awaited = None;
        }
        self.losses.find(&self.document);
        let made = || self.measurements.of(draft).filter(|_| draft.is_allocated()).map(|row| &row.plan);
        let plan = self.allocating.as_ref().map(|allocating| &allocating.found.plan).or_else(made);
        self.losses.show(&self.document.layout, draft, plan);
    }

    /// The blocks that the filter lets through.
    pub fn visible_blocks(&self) -> Vec<usize> {
        self.layers.filter.visible(&self.document.layout, self.plan())
    }

    /// One of the models that are compared.
    pub fn side(&self, side: Side) -> SideView<'_> {
        let name = self.results.sides[side as usize].as_deref();
        let draft = match (side, name) {
            (Side::A, None) | (_, Some("base")) => None,
            (Side::B, None) => Some(self.document.draft()),
            (_, Some(name)) => self.document.drafts.iter().find(|draft| draft.name == name).or(Some(self.document.draft())),
        };
        let Some(draft) = draft else {
            let measured = self.measurements.base.as_ref();
            return SideView {
                name: "base".into(),
                path: Some(self.document.settings().model.name()),
                result: measured,
                samples: measured.map(|_| &self.measurements.base_samples),
                errors: None,
            };
        };
        let row = self.measurements.of(draft);
        SideView {
            name: draft.name.clone(),
            path: row.map(|row| row.path.display().to_string()),
            result: row.and_then(|row| row.result.as_ref()),
            samples: row.filter(|row| row.result.is_some()).map(|row| &row.samples),
            errors: row.map(|row| row.errors.as_slice()),
        }
    }

    /// The comparison of A and B, once it is there.
    pub fn compared(&self) -> Option<&Compared> {
        let compared = self.results.compared.as_ref()?;
        let [a, b] = [self.side(Side::A).samples?, self.side(Side::B).samples?];
        (Arc::ptr_eq(a, &compared.samples[0]) && Arc::ptr_eq(b, &compared.samples[1])).then_some(compared)
    }

    /// The error of a block under the plan: from the job that quantizes just this plan, or from what was measured before;
    /// `false` when it was measured in another plan.
    pub fn error(&self, block: usize) -> Option<(f64, bool)> {
        let draft = self.document.draft();
        if let Some(target) = self.queue.quantizing()
            && self.allocating.is_none()
            && target.origin == Origin::of(draft)
            && let Some(error) = self.queue.progress.errors.get(block)
        {
            return Some((*error, true));
        }
        self.measurements.error(draft, self.plan(), block)
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
