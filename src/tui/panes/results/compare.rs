//! A against B: by task with intervals and flips, what else was measured, the errors of the blocks.

use ratatui::text::{Line, Span};

use super::{COLUMNS, Figure, dim};
use crate::eval::paired::Paired;
use crate::eval::{ModelResult, Task};
use crate::session::report::Table;
use crate::tui::panes::{percent, short};
use crate::tui::state::{Side, State};
use crate::tui::text::cut;
use crate::tui::theme::Role;
use crate::tui::view::bar_letter;

/// Below this height the space between tasks and figures goes.
const TIGHT: usize = 19;

/// Width of the column of names.
const NAME: usize = 10;

/// Width of a block's difference.
const DIFFERENCE: usize = 17;

/// Lines of blocks that differ, at most.
const MOST_APART: usize = 4;

/// The lines of the view; there is room for `height`.
pub fn lines(state: &State, width: usize, height: usize) -> Vec<Line<'static>> {
    let style = |role| state.theme.style(role);
    let (a, b) = (state.side(Side::A), state.side(Side::B));
    let mut lines = vec![Line::from(vec![
        Span::styled(" A ", style(Role::Key)),
        Span::styled(cut(&a.name, 24), style(Role::Strong)),
        Span::styled("   B ", style(Role::Key)),
        Span::styled(cut(&b.name, 24), style(Role::Strong)),
        dim(state, state.keymap.fill("   {side-a} and {side-b} take the row of the table")),
    ])];
    let (Some(first), Some(second)) = (a.result, b.result) else {
        let missing = if a.result.is_none() { &a.name } else { &b.name };
        let missing = format!(" {missing} is not measured yet: {{run}} runs the variant being edited");
        lines.push(Line::from(dim(state, state.keymap.fill(&missing))));
        return lines;
    };
    lines.push(Line::from(dim(state, head(width))));
    let compared = state.compared();
    for task in Task::ALL {
        let score = |result: &ModelResult| result.tasks.get(task.name()).map(|score| 100.0 * score.headline(task));
        let (Some(a), Some(b)) = (score(first), score(second)) else { continue };
        let paired = compared.and_then(|compared| compared.comparison.tasks.get(task.name()));
        lines.push(task_line(state, task.name(), Some((a, b)), paired, width));
    }
    match compared {
        Some(compared) => {
            if let Some(all) = &compared.comparison.all {
                lines.push(task_line(state, "all rows", None, Some(all), width));
            }
        }
        None => lines.push(Line::from(dim(state, " intervals: comparing row by row …"))),
    }
    if height > TIGHT {
        lines.push(Line::default());
    }
    for column in COLUMNS.iter().filter(|column| !matches!(column.figure, Figure::Task(_) | Figure::Ratio)) {
        let values = (column.value(first, first.weight_bytes), column.value(second, first.weight_bytes));
        let (None, None) = values else {
            let text = |value: Option<f64>| value.map_or_else(|| "–".to_owned(), |value| column.text(value));
            let (difference, role) = column.difference(second, first).unwrap_or((String::new(), Role::Dim));
            lines.push(Line::from(vec![
                dim(state, format!(" {:<NAME$}", column.title)),
                Span::raw(format!("{:>9}{:>9}", text(values.0), text(values.1))),
                Span::styled(format!("{difference:>8}"), style(role)),
            ]));
            continue;
        };
    }
    let errors = [("A", a.errors), ("B", b.errors)].into_iter().filter_map(|(name, errors)| errors.map(|errors| (name, errors)));
    let errors: Vec<(&str, &[f64])> = errors.collect();
    let worst = errors.iter().flat_map(|(_, errors)| errors.iter()).copied().fold(0.0, f64::max);
    // Where one line has to go, it is A's.
    let spare = (lines.len() + errors.len() + 1).saturating_sub(height).min(errors.len());
    for (name, errors) in errors.into_iter().skip(spare) {
        let bars: String = errors.iter().take(width.saturating_sub(NAME + 16)).map(|error| bar_letter(error / worst.max(1e-12))).collect();
        let own = errors.iter().copied().fold(0.0, f64::max);
        lines.push(Line::from(vec![
            dim(state, format!(" {:<NAME$}", format!("{name} error"))),
            Span::styled(bars, style(Role::Progress)),
            dim(state, format!("  worst {}", percent(own))),
        ]));
    }
    let room = height.saturating_sub(lines.len()).clamp(1, MOST_APART);
    lines.extend(most_apart(state, width, room));
    lines
}

/// Errors of each block of two models that are measured: A's, B's. The unquantized model makes none.
fn errors(state: &State) -> Vec<(usize, f64, f64)> {
    let (a, b) = (state.side(Side::A), state.side(Side::B));
    if a.result.is_none() || b.result.is_none() || (a.errors.is_none() && b.errors.is_none()) {
        return Vec::new();
    }
    let of = |errors: Option<&[f64]>, block: usize| errors.and_then(|errors| errors.get(block)).copied().unwrap_or(0.0);
    (0..state.document.kinds.len()).map(|block| (block, of(a.errors, block), of(b.errors, block))).collect()
}

/// The blocks whose errors differ most, in `room` lines.
fn most_apart(state: &State, width: usize, room: usize) -> Vec<Line<'static>> {
    let mut errors = errors(state);
    errors.retain(|(_, a, b)| a != b);
    errors.sort_by(|(_, a, b), (_, c, d)| (d - c).abs().total_cmp(&(b - a).abs()));
    let columns = (width.saturating_sub(NAME + 1) / DIFFERENCE).max(1);
    let cell = |(block, a, b): &(usize, f64, f64)| {
        let kind = state.document.kinds[*block];
        let (sign, role) = if b < a { ("−", Role::Good) } else { ("+", Role::Bad) };
        let difference = format!("{sign}{}", percent((b - a).abs()));
        [
            Span::styled(format!("{block:>4} {} ", short(kind)), state.theme.style(Role::of_kind(kind))),
            Span::styled(format!("{difference:<8}"), state.theme.style(role)),
        ]
    };
    let rows = errors.chunks(columns).take(room).enumerate();
    let label = |row: usize| dim(state, format!(" {:<NAME$}", if row == 0 { "B−A most" } else { "" }));
    rows.map(|(row, blocks)| std::iter::once(label(row)).chain(blocks.iter().flat_map(cell)).collect()).collect()
}

fn head(width: usize) -> String {
    let interval = if width >= 56 { format!("{:>17}", "95% interval") } else { String::new() };
    let p = if width >= 72 { format!("{:>8}", "p") } else { String::new() };
    format!(" {:<NAME$}{:>9}{:>9}{:>8}{interval}{:>11}{p}", "", "A", "B", "B−A", "flips")
}

fn signed(points: f64, digits: usize) -> String {
    let sign = if points < 0.0 { "−" } else { "+" };
    format!("{sign}{:.digits$}", points.abs())
}

fn task_line(state: &State, name: &str, scores: Option<(f64, f64)>, paired: Option<&Paired>, width: usize) -> Line<'static> {
    let score = |score: f64| format!("{score:>9.1}");
    let (a, b) = scores.map_or_else(|| (format!("{:9}", ""), format!("{:9}", "")), |(a, b)| (score(a), score(b)));
    let difference = paired.map(|paired| 100.0 * paired.difference).or_else(|| scores.map(|(a, b)| b - a)).unwrap_or_default();
    // An interval that holds zero says nothing.
    let role = match paired {
        Some(paired) if paired.interval[0] > 0.0 => Role::Good,
        Some(paired) if paired.interval[1] < 0.0 => Role::Bad,
        _ => Role::Dim,
    };
    let mut spans = vec![
        dim(state, format!(" {:<NAME$}", cut(name, NAME))),
        Span::raw(format!("{a}{b}")),
        Span::styled(format!("{:>8}", signed(difference, 1)), state.theme.style(role)),
    ];
    if let Some(paired) = paired {
        if width >= 56 {
            let [low, high] = paired.interval.map(|end| signed(100.0 * end, 1));
            spans.push(Span::raw(format!("{:>17}", format!("{low} … {high}"))));
        }
        spans.push(Span::styled(format!("{:>6}✗", paired.right_to_wrong), state.theme.style(Role::Bad)));
        spans.push(Span::styled(format!("{:>3}✓", paired.wrong_to_right), state.theme.style(Role::Good)));
        if width >= 72 {
            spans.push(dim(state, format!("{:>8.3}", paired.p_value)));
        }
    }
    Line::from(spans)
}

/// The comparison as a table, to export: the tasks, then the errors of the blocks.
pub fn table(state: &State) -> Table {
    let mut table = Table::new(&["task", "metric", "rows", "difference", "low", "high", "right to wrong", "wrong to right", "p"]);
    if let Some(compared) = state.compared() {
        let all = compared.comparison.all.iter().map(|paired| ("all", paired));
        for (task, paired) in compared.comparison.tasks.iter().map(|(task, paired)| (task.as_str(), paired)).chain(all) {
            table.push(vec![
                task.to_owned(),
                paired.metric.clone(),
                paired.rows.to_string(),
                format!("{:.4}", paired.difference),
                format!("{:.4}", paired.interval[0]),
                format!("{:.4}", paired.interval[1]),
                paired.right_to_wrong.to_string(),
                paired.wrong_to_right.to_string(),
                format!("{:.4}", paired.p_value),
            ]);
        }
    }
    for (block, a, b) in errors(state) {
        let mut row = vec![format!("block {block}"), "error".to_owned(), String::new(), format!("{:.6}", b - a)];
        row.resize(9, String::new());
        table.push(row);
    }
    table
}
