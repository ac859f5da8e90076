//! The list of blocks, under a strip that shows the whole stack at once.

use std::collections::BTreeMap;

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{dim, percent, short};
use crate::format::{BlockKind, Format};
use crate::session::report;
use crate::tui::popups::window;
use crate::tui::state::{Inspection, State};
use crate::tui::theme::Role;
use crate::tui::view::bar_letter;

/// Lines that the strip may take, at most.
const STRIP_LINES: usize = 6;

pub fn draw(frame: &mut Frame, area: Rect, state: &State) {
    let width = area.width as usize;
    let mut lines = strip(state, width.saturating_sub(2), if area.height >= 18 { STRIP_LINES } else { 2 });
    let columns = Columns::new(width);
    let totals = totals(state, width);
    lines.push(columns.head(state));
    let room = (area.height as usize).saturating_sub(lines.len() + totals.len());
    let visible = state.visible_blocks();
    let at = visible.iter().position(|index| *index == state.layers.cursor).unwrap_or(0);
    let worst = worst_error(state);
    let rows = window(at, visible.len(), room);
    let blank = room - rows.len();
    lines.extend(rows.map(|row| columns.row(state, visible[row], worst)));
    if visible.is_empty() {
        lines.push(Line::styled("  no block meets the filter; esc clears it", state.theme.style(Role::Dim)));
    }
    lines.extend(vec![Line::default(); blank.saturating_sub(usize::from(visible.is_empty()))]);
    lines.extend(totals);
    for (line, y) in lines.into_iter().zip(area.y..area.bottom()) {
        frame.render_widget(line, Rect { y, height: 1, ..area });
    }
}

/// Pairs of lines, kinds above and bits of the weights below, a letter a block. A stack that needs more lines than
/// there are shows the part around the cursor.
fn strip(state: &State, width: usize, most: usize) -> Vec<Line<'static>> {
    let (kinds, plan) = (&state.document.kinds, &state.document.draft().plan);
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
            let format = plan.blocks[index];
            below.push(Span::styled(bits(format), marked(Role::of_format(format))));
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

/// The largest error on screen, which fills an error bar.
fn worst_error(state: &State) -> f64 {
    let errors = (0..state.document.kinds.len()).filter_map(|index| error(state, index)).map(|(error, _)| error);
    errors.fold(0.0, f64::max)
}

/// The error of a block: from the job that quantizes just this plan, or from what was measured before.
fn error(state: &State, index: usize) -> Option<(f64, bool)> {
    use crate::tui::queue::Work;
    let draft = state.document.draft();
    if let Some(Work::Quantize(target)) = state.queue.running().map(|item| &item.work)
        && target.plan == draft.plan
        && let Some(error) = state.queue.errors.get(index)
    {
        return Some((*error, true));
    }
    state.measurements.error(&draft.recipe.steps(), &draft.plan, index)
}

/// Which columns there is room for.
struct Columns {
    parameters: bool,
    weights: bool,
}

impl Columns {
    fn new(width: usize) -> Self {
        Self { parameters: width >= 50, weights: width >= 72 }
    }

    fn head(&self, state: &State) -> Line<'static> {
        let parameters = if self.parameters { format!("{:>9}", "params") } else { String::new() };
        let weights = if self.weights { format!("  {:>8}   {:<6}", "max/rms", "risk") } else { String::new() };
        let text = format!("    {:>3}  {:<5}{parameters} {:>8}   {:<6} {:>9}{weights}", "#", "kind", "bytes", "format", "error");
        Line::styled(text, state.theme.style(Role::Dim))
    }

    fn row(&self, state: &State, index: usize, worst: f64) -> Line<'static> {
        let block = &state.document.layout.blocks[index];
        let format = state.document.draft().plan.blocks[index];
        let style = |role| state.theme.style(role);
        let under_cursor = index == state.layers.cursor;
        let selected = state.layers.selected.contains(&index);
        let mut spans = vec![
            Span::styled(if under_cursor { " ▶" } else { "  " }, style(Role::Strong)),
            Span::styled(if selected { "● " } else { "  " }, style(Role::Selected)),
            Span::raw(format!("{index:>3}  ")),
            Span::styled(format!("{} {}", block.kind.letter(), short(block.kind)), style(Role::of_kind(block.kind))),
        ];
        if self.parameters {
            spans.push(Span::raw(format!("{:>9}", report::count(block.parameters()))));
        }
        let float_bytes = state.document.layout.float_bytes;
        let bytes = block.linear_bytes(format, float_bytes) + block.float_parameters() * float_bytes as u64;
        spans.push(Span::raw(format!(" {:>8} ", report::bytes(bytes))));
        let changed = state.document.saved_format(index) != Some(format);
        spans.push(Span::styled(if changed { " ▸" } else { "  " }, style(Role::Changed)));
        spans.push(Span::styled(format!("{format:<6} "), style(Role::of_format(format))));
        spans.extend(match error(state, index) {
            Some((error, exact)) => {
                let role = if exact { Role::Text } else { Role::Predicted };
                let text = format!("{}{}", if exact { "" } else { "~" }, percent(error));
                [Span::styled(format!("{} ", bar_letter(error / worst)), style(role)), Span::styled(format!("{text:>7}"), style(role))]
            }
            None => [Span::raw("  "), dim(state, format!("{:>7}", "–"))],
        });
        if self.weights {
            let row = &state.inventory.blocks[index];
            let ratio = match (row.outlier_ratio, state.inspection) {
                (Some(ratio), _) => format!("{ratio:.1}"),
                (None, Inspection::Reading) => "…".into(),
                (None, _) => "–".into(),
            };
            spans.push(Span::raw(format!("  {ratio:>8}  ")));
            spans.push(Span::styled(format!("~{}", row.sensitivity.name()), style(Role::Predicted)));
        }
        let line = Line::from(spans);
        if under_cursor { line.style(style(Role::Cursor)) } else { line }
    }
}

/// Sums by kind: blocks, parameters, bytes under the plan.
fn totals(state: &State, width: usize) -> Vec<Line<'static>> {
    let (layout, plan) = (&state.document.layout, &state.document.draft().plan);
    let mut kinds: BTreeMap<BlockKind, (usize, u64, u64)> = BTreeMap::new();
    for (block, format) in layout.blocks.iter().zip(&plan.blocks) {
        let (count, parameters, bytes) = kinds.entry(block.kind).or_default();
        *count += 1;
        *parameters += block.parameters();
        *bytes += block.linear_bytes(*format, layout.float_bytes) + block.float_parameters() * layout.float_bytes as u64;
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
