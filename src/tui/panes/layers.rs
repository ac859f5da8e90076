//! The list of blocks, under a strip that shows the whole stack at once.

use std::collections::BTreeMap;

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{dim, percent, scheme_name, short};
use crate::format::{BlockKind, Format};
use crate::session::report;
use crate::tui::popups::window;
use crate::tui::state::{Inspection, State, Strip};
use crate::tui::text::cut;
use crate::tui::theme::Role;
use crate::tui::tree::{self, Column, Row};
use crate::tui::view::bar_letter;

/// Lines that the strip may take, at most.
const STRIP_LINES: usize = 6;

/// How the pane's lines are shared out.
struct Parts {
    strip: usize,
    /// The rows of the tree that are on screen.
    rows: std::ops::Range<usize>,
    room: usize,
}

fn parts(state: &State, area: Rect, rows: &[Row]) -> Parts {
    let pairs = state.document.kinds.len().div_ceil(strip_width(area));
    let strip = (2 * pairs).min(if area.height >= 18 { STRIP_LINES } else { 2 });
    let room = (area.height as usize).saturating_sub(strip + 1 + total_lines(state));
    let cursor = tree::cursor(state);
    let at = rows.iter().position(|row| *row == cursor).unwrap_or(0);
    Parts { strip, rows: window(at, rows.len(), room), room }
}

/// The row of the tree in line `line` of the pane; the block that the strip shows at `column` of it.
pub fn at(state: &State, area: Rect, column: u16, line: u16) -> Option<Row> {
    let rows = tree::rows(state);
    let parts = parts(state, area, &rows);
    let line = line as usize;
    if line < parts.strip {
        let width = strip_width(area);
        let pairs = window(state.layers.cursor / width, state.document.kinds.len().div_ceil(width), parts.strip / 2);
        let block = (pairs.start + line / 2) * width + (column as usize).checked_sub(1)?;
        return (block < state.document.kinds.len()).then_some(Row::Block(block));
    }
    let index = parts.rows.start + line.checked_sub(parts.strip + 1)?;
    parts.rows.contains(&index).then(|| rows[index])
}

pub fn draw(frame: &mut Frame, area: Rect, state: &State) {
    let width = area.width as usize;
    let rows = tree::rows(state);
    let parts = parts(state, area, &rows);
    let mut lines = strip(state, strip_width(area), parts.strip);
    let columns = Columns::new(state, width);
    lines.push(columns.head(state));
    let worst = worst_error(state);
    let blank = parts.room - parts.rows.len();
    lines.extend(rows[parts.rows].iter().map(|row| columns.row(state, *row, worst)));
    if rows.is_empty() {
        lines.push(Line::styled("  no block meets the filter; esc clears it", state.theme.style(Role::Dim)));
    }
    lines.extend(vec![Line::default(); blank.saturating_sub(usize::from(rows.is_empty()))]);
    lines.extend(totals(state, width));
    for (line, y) in lines.into_iter().zip(area.y..area.bottom()) {
        frame.render_widget(line, Rect { y, height: 1, ..area });
    }
}

fn strip_width(area: Rect) -> usize {
    (area.width as usize).saturating_sub(2).max(1)
}

/// Pairs of lines, kinds above and bits of the weights (or what was chosen to be seen) below, a letter a block. A stack that needs more lines than
/// there are shows the part around the cursor.
pub fn strip(state: &State, width: usize, most: usize) -> Vec<Line<'static>> {
    let (kinds, plan) = (&state.document.kinds, state.plan());
    let worst = worst_error(state);
    let pairs: Vec<usize> = (0..kinds.len().div_ceil(width)).collect();
    let around = window(state.layers.cursor / width, pairs.len(), most / 2);
    let mut lines = Vec::new();
    for pair in around {
        let (mut above, mut below) = (vec![Span::raw(" ")], vec![Span::raw(" ")]);
        for (index, kind) in kinds.iter().enumerate().skip(pair * width).take(width) {
            let marked = |role: Role| {
                let style = state.theme.style(role);
                if index == state.layers.cursor {
                    style.patch(state.theme.style(Role::Cursor))
                } else if state.layers.selected.contains(&index) {
                    style.patch(state.theme.style(Role::Selected)).underlined()
                } else {
                    style
                }
            };
            above.push(Span::styled(kind.letter().to_string(), marked(Role::of_kind(*kind))));
            let (text, role) = match state.layers.strip {
                Strip::Bits => (bits(plan.blocks[index]).to_owned(), Role::of_format(plan.blocks[index])),
                Strip::Loss => height(loss_share(state, index)),
                Strip::Error => height(state.error(index).map(|(error, _)| if worst > 0.0 { error / worst } else { 0.0 })),
            };
            below.push(Span::styled(text, marked(role)));
        }
        lines.extend([Line::from(above), Line::from(below)]);
    }
    lines
}

/// One letter for the bits of the weights: 8, 4, 3, 2, or f for float.
fn bits(format: Format) -> &'static str {
    match format.weight_bits() {
        16 => "f",
        8 => "8",
        4 => "4",
        3 => "3",
        _ => "2",
    }
}

/// A bar as high as a share of the worst, in the colour of how bad that is; `·` where it is not known.
fn height(share: Option<f64>) -> (String, Role) {
    let Some(share) = share else { return ("·".into(), Role::Dim) };
    let role = match share {
        share if share > 2.0 / 3.0 => Role::Bad,
        share if share > 1.0 / 3.0 => Role::Warning,
        _ => Role::Good,
    };
    (bar_letter(share).to_string(), role)
}

/// Where a block's predicted loss lies between the least and the most of all, on a logarithmic scale; 0 where nothing is lost.
fn loss_share(state: &State, index: usize) -> Option<f64> {
    let loss = state.losses.block(index)?;
    let [low, high] = state.losses.range().unwrap_or([loss, loss]);
    if loss <= 0.0 {
        return Some(0.0);
    }
    // The least of all has the lowest bar there is.
    let share = if high > low { (loss / low).ln() / (high / low).ln() } else { 1.0 };
    Some(LOWEST + (1.0 - LOWEST) * share)
}

/// Share of the lowest bar that is seen.
const LOWEST: f64 = 1.0 / 8.0;

/// The largest error on screen, which fills an error bar.
fn worst_error(state: &State) -> f64 {
    let errors = (0..state.document.kinds.len()).filter_map(|index| state.error(index)).map(|(error, _)| error);
    errors.fold(0.0, f64::max)
}

/// Which columns there is room for.
struct Columns {
    /// What the weights say.
    weights: bool,
    /// What each block is predicted to lose, in place of the rule of thumb.
    losses: bool,
}

impl Columns {
    fn new(state: &State, width: usize) -> Self {
        Self { weights: width >= 72, losses: state.losses.are_shown() }
    }

    fn head(&self, state: &State) -> Line<'static> {
        // Width, and the place of the title in it: to the right, or so far from the left.
        let mut cells = vec![
            (Column::Number, 7, None),
            (Column::Kind, 7, Some(2)),
            (Column::Parameters, 9, None),
            (Column::Bytes, 9, None),
            (Column::Format, 9, Some(3)),
            (Column::Error, 9, None),
        ];
        if self.losses {
            cells.push((Column::Loss, 8, None));
        }
        if self.weights {
            cells.push((Column::Outliers, 11, None));
        }
        if self.weights && !self.losses {
            cells.push((Column::Risk, 9, Some(3)));
        }
        let cell = |(column, width, indent): (Column, usize, Option<usize>)| {
            let sorted = state.layers.sort == Some(column);
            let arrow = match (sorted, state.layers.descending) {
                (false, _) => "",
                (true, false) => "↑",
                (true, true) => "↓",
            };
            let title = format!("{}{arrow}", column.title());
            let text = match indent {
                Some(indent) => format!("{:<width$}", format!("{:indent$}{title}", "")),
                None => format!("{title:>width$}"),
            };
            Span::styled(text, state.theme.style(if sorted { Role::Strong } else { Role::Dim }))
        };
        Line::from(cells.into_iter().map(cell).collect::<Vec<_>>())
    }

    fn row(&self, state: &State, row: Row, worst: f64) -> Line<'static> {
        let line = match row {
            Row::Kind(kind) => kind_row(state, kind),
            Row::Block(block) => self.block_row(state, block, worst),
            Row::Module(block, module) => Self::module_row(state, block, module, None),
            Row::Slice(block, module, slice) => Self::module_row(state, block, module, Some(slice)),
        };
        if row == tree::cursor(state) { line.style(state.theme.style(Role::Cursor)) } else { line }
    }

    fn block_row(&self, state: &State, index: usize, worst: f64) -> Line<'static> {
        let block = &state.document.layout.blocks[index];
        let plan = state.plan();
        let format = plan.blocks[index];
        let style = |role| state.theme.style(role);
        let selected = state.layers.selected.contains(&index);
        let mut spans = vec![
            Span::styled(if index == state.layers.cursor { " ▶" } else { "  " }, style(Role::Strong)),
            Span::styled(if selected { "● " } else { "  " }, style(Role::Selected)),
            Span::raw(format!("{index:>3}  ")),
            Span::styled(format!("{} {}", block.kind.letter(), short(block.kind)), style(Role::of_kind(block.kind))),
        ];
        spans.push(Span::raw(format!("{:>9}", report::count(state.inventory.blocks[index].parameters))));
        spans.push(Span::raw(format!(" {:>8} ", report::bytes(tree::bytes(state, plan, index)))));
        let changed = changed(state, index);
        spans.push(Span::styled(if changed { " ▸" } else { "  " }, style(Role::Changed)));
        spans.push(Span::styled(format!("{format:<6}"), style(Role::of_format(format))));
        let mixed = plan.linears.keys().any(|name| name.starts_with(&block.prefix));
        spans.push(Span::styled(if mixed { "+" } else { " " }, style(Role::Changed)));
        spans.extend(match state.error(index) {
            Some((error, exact)) => {
                let role = if exact { Role::Text } else { Role::Predicted };
                let text = format!("{}{}", if exact { "" } else { "~" }, percent(error));
                [Span::styled(format!("{} ", bar_letter(error / worst)), style(role)), Span::styled(format!("{text:>6}"), style(role))]
            }
            None => [Span::raw("  "), dim(state, format!("{:>6}", "–"))],
        });
        if self.losses {
            let loss = state.losses.block(index);
            let text = loss.map_or_else(|| "–".to_owned(), |loss| if loss > 0.0 { format!("~{loss:.1e}") } else { "0".into() });
            spans.push(Span::styled(format!("{text:>8}"), style(Role::Predicted)));
        }
        if self.weights {
            let row = &state.inventory.blocks[index];
            let ratio = match (row.outlier_ratio, state.inspection) {
                (Some(ratio), _) => format!("{ratio:.1}"),
                (None, Inspection::Reading) => "…".into(),
                (None, _) => "–".into(),
            };
            spans.push(Span::raw(format!("   {ratio:>8}   ")));
            if !self.losses {
                spans.push(Span::styled(format!("~{}", row.sensitivity.name()), style(Role::Predicted)));
            }
        }
        Line::from(spans)
    }

    /// A module of an open block, or one of its slices.
    fn module_row(state: &State, block: usize, place: usize, slice: Option<usize>) -> Line<'static> {
        let spec = &state.document.layout.blocks[block];
        let modules = tree::modules(spec);
        let module = &modules[place];
        let linear = module.linears[0];
        let plan = state.plan();
        let float_bytes = state.document.layout.float_bytes;
        let last = place + 1 == modules.len();
        let (label, rows, weights, bytes, format, same, scheme) = if let Some(slice) = slice {
            let spec = &linear.slices[slice];
            let scheme = linear.planned_schemes(plan, block)[slice];
            let branch = if slice + 1 == linear.slices.len() { "└" } else { "├" };
            let label = format!("{} {branch} {}", if last { " " } else { "│" }, spec.name);
            let weights = (spec.rows * linear.cols) as u64;
            let bytes = scheme.stored_bytes(spec.rows, linear.cols, float_bytes);
            (label, spec.rows, weights, bytes, plan.slice(block, &linear.stem, spec.name), true, scheme)
        } else {
            let (format, same) = module.format(plan, block);
            let label = format!("{} {}", if last { "└" } else { "├" }, module_label(&module.name));
            let scheme = linear.planned_schemes(plan, block)[0];
            (label, linear.rows, module.weights(), module.bytes(plan, block, float_bytes), format, same, scheme)
        };
        let style = |role| state.theme.style(role);
        let mut spans = vec![
            Span::raw("      "),
            dim(state, format!("{:<11}", cut(&label, 11))),
            Span::raw(format!("{:>6}", report::count(weights).replace(' ', ""))),
        ];
        let changed = format != plan.blocks[block];
        let shown = if same { format.to_string() } else { "mixed".to_owned() };
        spans.push(Span::raw(format!(" {:>8} ", report::bytes(bytes))));
        spans.push(Span::styled(if changed { " ▸" } else { "  " }, style(Role::Changed)));
        spans.push(Span::styled(format!("{shown:<7}"), style(Role::of_format(format))));
        let count = if module.linears.len() > 1 && slice.is_none() { format!(" ×{}", module.linears.len()) } else { String::new() };
        spans.push(dim(state, format!(" {rows}×{}{count}  {}", linear.cols, scheme_name(scheme))));
        Line::from(spans)
    }
}

/// `experts.*.up_proj` in the room that there is.
fn module_label(name: &str) -> String {
    name.replace("experts.*.", "exp ")
        .replace("shared_exp ", "shared ")
        .replace("shared_experts.", "shared ")
        .replace("_latent_proj", "_latent")
}

/// Whether a block differs: under a budget from the variant's plan, otherwise from the session's file, and where formats are
/// found by measurement, by being pinned.
fn changed(state: &State, index: usize) -> bool {
    let draft = state.document.draft();
    if state.allocating.is_some() {
        return state.plan_of(draft).blocks[index] != state.plan().blocks[index];
    }
    if draft.is_allocated() {
        let kind = state.document.kinds[index];
        return draft.overrides.iter().any(|rule| rule.selector.meets(index, kind));
    }
    state.document.saved_format(index) != Some(draft.plan.blocks[index])
}

fn kind_row(state: &State, kind: BlockKind) -> Line<'static> {
    let name = match kind {
        BlockKind::Ssm => "state-space blocks",
        BlockKind::Mlp => "MLP blocks",
        BlockKind::Attention => "attention blocks",
        BlockKind::Moe => "blocks of experts",
    };
    let count = state.visible_blocks().into_iter().filter(|block| state.document.kinds[*block] == kind).count();
    Line::from(vec![
        Span::styled(format!("  {} ", kind.letter()), state.theme.style(Role::of_kind(kind))),
        Span::styled(format!("{count} {name}"), state.theme.style(Role::Strong)),
    ])
}

/// Lines of [`totals`].
fn total_lines(state: &State) -> usize {
    let kinds = BlockKind::ALL.into_iter().filter(|kind| state.document.kinds.contains(kind)).count();
    1 + (kinds + 2).div_ceil(2)
}

/// Sums by kind: blocks, parameters, bytes under the plan.
fn totals(state: &State, width: usize) -> Vec<Line<'static>> {
    let (layout, plan) = (&state.document.layout, state.plan());
    let mut kinds: BTreeMap<BlockKind, (usize, u64, u64)> = BTreeMap::new();
    for row in &state.inventory.blocks {
        let (count, parameters, total) = kinds.entry(row.kind).or_default();
        *count += 1;
        *parameters += row.parameters;
        *total += tree::bytes(state, plan, row.index);
    }
    // Two kinds a line; where that leaves no room, without parameters.
    let figures = |weights: u64, bytes: u64| {
        let parameters = if width >= 72 { format!("{:>9}", report::count(weights)) } else { String::new() };
        let bytes = if weights == 0 { "tied".to_owned() } else { report::bytes(bytes) };
        Span::raw(format!("{parameters}{bytes:>10}  "))
    };
    let mut cells: Vec<Vec<Span>> = Vec::new();
    for (kind, (count, parameters, bytes)) in kinds {
        cells.push(vec![
            Span::styled(format!("  {} {}", kind.letter(), short(kind)), state.theme.style(Role::of_kind(kind))),
            Span::raw(format!(" × {count:<4}")),
            figures(parameters, bytes),
        ]);
    }
    let embedding = layout.embedding.stored_bytes(plan.embedding, layout.float_bytes);
    let head = if layout.tied { 0 } else { layout.head.weights() };
    let head_bytes = layout.head.stored_bytes(plan.head, layout.float_bytes);
    for (name, weights, bytes) in [("embedding", layout.embedding.weights(), embedding), ("head", head, head_bytes)] {
        cells.push(vec![dim(state, format!("  {name:<12}")), figures(weights, bytes)]);
    }
    let mut lines = vec![Line::styled("─".repeat(width), state.theme.style(Role::Border))];
    lines.extend(cells.chunks(2).map(|cells| Line::from(cells.concat())));
    lines
}
