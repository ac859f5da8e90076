//! What was measured: a table with the unquantized model first, A against B, the rows that flipped, size against loss.

mod compare;
mod flips;
mod pareto;

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::dim;
use crate::error::{Error, Result};
use crate::eval::result::{RESULTS_SCHEMA, ResultSet};
use crate::eval::{ModelResult, Task};
use crate::session::{figures, report};
use crate::tui::document::Draft;
use crate::tui::queue::Purpose;
use crate::tui::state::{Pane, ResultsTab, Side, State};
use crate::tui::theme::Role;

/// A column of figures.
pub struct Column {
    pub title: &'static str,
    width: usize,
    /// Where there is not room for all, columns of the highest number go first.
    rank: u8,
    figure: Figure,
}

#[derive(Clone, Copy, PartialEq)]
enum Figure {
    Bytes,
    Ratio,
    Bits,
    Task(Task),
    Mean,
    Kld,
    KldP99,
    Top1,
    Perplexity,
    Prefill,
    Decode,
}

const fn column(title: &'static str, width: usize, rank: u8, figure: Figure) -> Column {
    Column { title, width, rank, figure }
}

/// Every column, as in the table of `strata replay`.
pub const COLUMNS: [Column; 15] = [
    column("linears", 8, 0, Figure::Bytes),
    column("ratio", 6, 4, Figure::Ratio),
    column("bits", 6, 3, Figure::Bits),
    column("arcE", 6, 2, Figure::Task(Task::ArcEasy)),
    column("arcC", 6, 2, Figure::Task(Task::ArcChallenge)),
    column("piqa", 6, 2, Figure::Task(Task::Piqa)),
    column("wino", 6, 2, Figure::Task(Task::Winogrande)),
    column("hella", 6, 2, Figure::Task(Task::Hellaswag)),
    column("mean", 6, 1, Figure::Mean),
    column("KLD", 8, 0, Figure::Kld),
    column("KLD p99", 8, 8, Figure::KldP99),
    column("top1", 6, 5, Figure::Top1),
    column("ppl", 7, 6, Figure::Perplexity),
    column("prefill", 8, 7, Figure::Prefill),
    column("decode", 7, 7, Figure::Decode),
];

/// Width of the column of names.
const NAME: usize = 14;

impl Column {
    /// The figure of a result; higher sorts later.
    fn value(&self, result: &ModelResult, base_bytes: u64) -> Option<f64> {
        match self.figure {
            Figure::Bytes => Some(result.weight_bytes as f64),
            Figure::Ratio => Some(result.weight_bytes as f64 / base_bytes as f64),
            Figure::Bits => Some(result.bits_per_weight),
            Figure::Task(task) => result.tasks.get(task.name()).map(|score| 100.0 * score.headline(task)),
            Figure::Mean => {
                let scores: Vec<f64> =
                    Task::ALL.iter().filter_map(|task| Some(100.0 * result.tasks.get(task.name())?.headline(*task))).collect();
                (!scores.is_empty()).then(|| crate::eval::statistics::mean(&scores))
            }
            Figure::Kld => result.kld.map(|kld| kld.mean),
            Figure::KldP99 => result.kld.map(|kld| kld.p99),
            Figure::Top1 => result.kld.map(|kld| 100.0 * kld.top1),
            Figure::Perplexity => result.perplexity,
            Figure::Prefill => result.speed.map(|speed| speed.prefill_tokens_per_s),
            Figure::Decode => result.speed.map(|speed| speed.decode_tokens_per_s),
        }
    }

    fn text(&self, value: f64) -> String {
        match self.figure {
            Figure::Bytes => report::bytes(value as u64),
            Figure::Ratio | Figure::Perplexity => format!("{value:.3}"),
            Figure::Bits | Figure::Mean => format!("{value:.2}"),
            Figure::Task(_) => format!("{value:.1}"),
            Figure::Kld | Figure::KldP99 => format!("{value:.1e}"),
            Figure::Top1 => format!("{value:.1}%"),
            Figure::Prefill | Figure::Decode => format!("{value:.0}"),
        }
    }

    /// The difference from the base with its meaning: better, worse, or within the noise.
    fn difference(&self, result: &ModelResult, base: &ModelResult) -> Option<(String, Role)> {
        let (value, base_value) = (self.value(result, base.weight_bytes)?, self.value(base, base.weight_bytes)?);
        let difference = value - base_value;
        let signed = |text: String| if difference < 0.0 { text.replacen('-', "−", 1) } else { format!("+{text}") };
        match self.figure {
            Figure::Bytes | Figure::Prefill | Figure::Decode => {
                let percent = signed(format!("{:.0}%", 100.0 * difference / base_value));
                let better = (difference < 0.0) == (self.figure == Figure::Bytes);
                Some((percent, if better { Role::Good } else { Role::Bad }))
            }
            Figure::Task(task) => {
                let noise = 100.0 * result.tasks.get(task.name())?.headline_stderr(task).unwrap_or(0.0);
                Some((signed(format!("{difference:.1}")), judge(difference, noise)))
            }
            Figure::Mean => Some((signed(format!("{difference:.2}")), Role::Dim)),
            Figure::Perplexity => Some((signed(format!("{difference:.3}")), Role::Dim)),
            Figure::Ratio | Figure::Bits | Figure::Kld | Figure::KldP99 | Figure::Top1 => None,
        }
    }
}

/// A difference of accuracies: within one standard error it says nothing.
fn judge(difference: f64, noise: f64) -> Role {
    match difference {
        difference if difference.abs() <= noise => Role::Dim,
        difference if difference > 0.0 => Role::Good,
        _ => Role::Bad,
    }
}

fn result<'a>(state: &'a State, draft: &Draft) -> Option<&'a ModelResult> {
    state.measurements.of(draft)?.result.as_ref()
}

/// The variants in the order of the table.
pub fn order(state: &State) -> Vec<usize> {
    let drafts = &state.document.drafts;
    let mut order: Vec<usize> = (0..drafts.len()).collect();
    let sort = state.results.sort.as_ref().and_then(|sort| COLUMNS.iter().find(|column| column.title == sort));
    if let Some(column) = sort {
        // Variants without the figure come last, whichever way round.
        let key = |index: &usize| {
            let draft = &drafts[*index];
            match (column.figure, result(state, draft)) {
                (Figure::Bytes | Figure::Ratio | Figure::Bits, None) => {
                    Some(state.document.footprint.linear_bytes(state.plan_of(draft)) as f64)
                }
                (Figure::Bytes | Figure::Ratio | Figure::Bits, Some(result)) => Some(result.weight_bytes as f64),
                (_, result) => result.and_then(|result| column.value(result, 1)),
            }
        };
        order.sort_by(|a, b| match (key(a), key(b)) {
            (Some(a), Some(b)) if state.results.descending => b.total_cmp(&a),
            (Some(a), Some(b)) => a.total_cmp(&b),
            (a, b) => b.is_some().cmp(&a.is_some()),
        });
    } else if state.results.descending {
        order.reverse();
    }
    order
}

/// The variants that the filter lets through, in the order of the table.
pub fn shown(state: &State) -> Vec<usize> {
    let words: Vec<String> = state.results.filter.to_lowercase().split_whitespace().map(str::to_owned).collect();
    let meets = |index: &usize| {
        let draft = &state.document.drafts[*index];
        let mut formats: Vec<String> = state.plan_of(draft).blocks.iter().map(ToString::to_string).collect();
        formats.dedup();
        let text = format!("{} {} {}", draft.name, draft.recipe_name, formats.join(" ")).to_lowercase();
        words.iter().all(|word| text.contains(word))
    };
    order(state).into_iter().filter(meets).collect()
}

/// What is said behind the title, unless it is how the table is sorted.
pub fn caption(state: &State) -> Option<String> {
    match state.results.tab {
        ResultsTab::Table if state.results.filter.is_empty() => None,
        ResultsTab::Table => Some(format!("with {} ", state.results.filter)),
        ResultsTab::Compare => Some("A against B ".into()),
        ResultsTab::Flips => Some("rows that flipped ".into()),
        ResultsTab::Plot => Some("size and loss ".into()),
    }
}

/// The view as text for a file: `csv`, `md` or `json`.
pub fn export(state: &State, form: &str) -> Result<String> {
    let results = || -> Vec<ModelResult> {
        let variants = shown(state).into_iter().filter_map(|index| result(state, &state.document.drafts[index]).cloned());
        state.measurements.base.iter().cloned().chain(variants).collect()
    };
    let table = match state.results.tab {
        ResultsTab::Compare => compare::table(state),
        ResultsTab::Flips => flips::table(state),
        ResultsTab::Table | ResultsTab::Plot if form == "csv" => figures::results(&results()),
        ResultsTab::Table | ResultsTab::Plot => report::comparison(&results()),
    };
    match form {
        "csv" => Ok(table.csv()),
        "md" => Ok(table.markdown()),
        "json" => {
            let set = ResultSet {
                schema: RESULTS_SCHEMA.into(),
                results: results(),
                comparisons: state.compared().map(|compared| compared.comparison.clone()).into_iter().collect(),
            };
            serde_json::to_string_pretty(&set).map_err(|error| Error::run(format!("the results cannot be written: {error}")))
        }
        _ => Err(Error::input("the name ends in none of .csv, .md and .json").hint("the ending says in which form to write")),
    }
}

/// The row in line `line` of the table: 0 for the base.
pub fn row_at(state: &State, area: Rect, line: u16) -> Option<usize> {
    let columns = fitting(state, area.width as usize);
    let heights: Vec<usize> = rows(state, &columns).iter().map(Vec::len).collect();
    let first = first_row(&heights, state.results.cursor.min(heights.len() - 1), area);
    let mut end = 1;
    (first..heights.len()).find(|row| {
        end += heights[*row];
        line > 0 && (line as usize) < end
    })
}

fn rows(state: &State, columns: &[&'static Column]) -> Vec<Vec<Line<'static>>> {
    let mut rows: Vec<Vec<Line>> = vec![base_rows(state, columns)];
    rows.extend(shown(state).into_iter().map(|index| variant_rows(state, index, columns)));
    rows
}

/// Rows above go until the one under the cursor is on screen.
fn first_row(heights: &[usize], cursor: usize, area: Rect) -> usize {
    let room = area.height.saturating_sub(1) as usize;
    let mut first = 0;
    while first < cursor && heights[first..=cursor].iter().sum::<usize>() > room {
        first += 1;
    }
    first
}

pub fn draw(frame: &mut Frame, area: Rect, state: &State) {
    let (width, height) = (area.width as usize, area.height as usize);
    let lines = match state.results.tab {
        ResultsTab::Table => table_lines(state, area),
        ResultsTab::Compare => compare::lines(state, width, height),
        ResultsTab::Flips => flips::lines(state, width, height),
        ResultsTab::Plot => return pareto::draw(frame, area, state),
    };
    for (line, y) in lines.into_iter().zip(area.y..area.bottom()) {
        frame.render_widget(line, Rect { y, height: 1, ..area });
    }
}

fn table_lines(state: &State, area: Rect) -> Vec<Line<'static>> {
    let columns = fitting(state, area.width as usize);
    let style = |role| state.theme.style(role);
    let mut head = vec![Span::styled(format!("    {:<NAME$}", "variant"), style(Role::Dim))];
    for column in &columns {
        let sorted = state.results.sort.as_deref() == Some(column.title);
        let width = column.width;
        head.push(Span::styled(format!(" {:>width$}", column.title), style(if sorted { Role::Strong } else { Role::Dim })));
    }
    let mut rows = rows(state, &columns);
    let cursor = state.results.cursor.min(rows.len() - 1);
    if state.focus == Pane::Results
        && let Some(line) = rows[cursor].first_mut()
    {
        *line = std::mem::take(line).style(style(Role::Cursor));
    }
    let heights: Vec<usize> = rows.iter().map(Vec::len).collect();
    let first = first_row(&heights, cursor, area);
    let mut lines = vec![Line::from(head)];
    lines.extend(rows.into_iter().skip(first).flatten());
    if state.measurements.base.is_none() && lines.len() + 3 <= area.height as usize {
        let evaluates = state.queue.runs.iter().any(|run| !run.is_over() && run.purpose == Purpose::Evaluate);
        let first = if evaluates {
            "    a run is under way: rows fill when it evaluates"
        } else {
            "    nothing is measured yet: {run-all} runs all variants"
        };
        lines.extend([
            Line::default(),
            Line::from(dim(state, state.keymap.fill(first))),
            Line::from(dim(state, "    ~ marks what follows from the plan")),
        ]);
    }
    lines
}

/// The columns that there is room for, in the table's order.
fn fitting(state: &State, width: usize) -> Vec<&'static Column> {
    let mut columns: Vec<&Column> = COLUMNS.iter().skip(state.results.first_column).collect();
    let needed = |columns: &[&Column]| NAME + 4 + columns.iter().map(|column| column.width + 1).sum::<usize>();
    while needed(&columns) > width && columns.len() > 1 {
        let sorted = state.results.sort.as_deref();
        let spare = columns.iter().enumerate().filter(|(_, column)| sorted != Some(column.title));
        // Of equal ranks the last goes first.
        let Some((index, _)) = spare.max_by_key(|(_, column)| if state.results.first_column > 0 { 0 } else { column.rank }) else { break };
        columns.remove(index);
    }
    columns
}

fn name(text: &str) -> String {
    let cut: String = text.chars().take(NAME).collect();
    format!("{cut:<NAME$}")
}

/// Whether a row is the variant being edited, and whether it is A or B.
fn marks(state: &State, name: &str, current: bool) -> Vec<Span<'static>> {
    let side = [Side::A, Side::B].into_iter().find(|side| state.side(*side).name == name);
    let letter = side.map_or_else(|| " ".to_owned(), |side| format!("{side:?}"));
    vec![
        Span::styled(if current { " ▶" } else { "  " }, state.theme.style(Role::Strong)),
        Span::styled(format!("{letter} "), state.theme.style(Role::Key)),
    ]
}

fn base_rows(state: &State, columns: &[&'static Column]) -> Vec<Line<'static>> {
    let mut spans = marks(state, "base", false);
    spans.push(Span::styled(name("base"), state.theme.style(Role::Strong)));
    if let Some(base) = &state.measurements.base {
        spans.extend(columns.iter().map(|column| measured(state, column, base, base.weight_bytes)));
    } else {
        let plan = crate::format::Plan::unquantized(state.document.layout.blocks.len());
        spans.extend(columns.iter().map(|column| prediction(state, column, &plan)));
    }
    vec![Line::from(spans)]
}

fn variant_rows(state: &State, index: usize, columns: &[&'static Column]) -> Vec<Line<'static>> {
    let draft = &state.document.drafts[index];
    let mut spans = marks(state, &draft.name, index == state.document.current());
    spans.push(Span::raw(name(&draft.name)));
    let (Some(result), Some(base)) = (result(state, draft), &state.measurements.base) else {
        spans.extend(columns.iter().map(|column| prediction(state, column, state.plan_of(draft))));
        return vec![Line::from(spans)];
    };
    spans.extend(columns.iter().map(|column| measured(state, column, result, base.weight_bytes)));
    let mut rows = vec![Line::from(spans)];
    if !state.results.hide_differences {
        let mut spans = vec![dim(state, format!("    {}", name("  against base")))];
        spans.extend(columns.iter().map(|column| {
            let width = column.width;
            let (text, role) = column.difference(result, base).unwrap_or((String::new(), Role::Dim));
            Span::styled(format!(" {text:>width$}"), state.theme.style(role))
        }));
        rows.push(Line::from(spans));
    }
    rows
}

fn measured(state: &State, column: &Column, result: &ModelResult, base_bytes: u64) -> Span<'static> {
    let width = column.width;
    match column.value(result, base_bytes) {
        Some(value) => Span::raw(format!(" {:>width$}", column.text(value))),
        None => dim(state, format!(" {:>width$}", "–")),
    }
}

/// What the plan says before anything is measured: sizes.
fn prediction(state: &State, column: &Column, plan: &crate::format::Plan) -> Span<'static> {
    let (footprint, width) = (&state.document.footprint, column.width);
    let float = footprint.linear_bytes(&crate::format::Plan::unquantized(plan.blocks.len())) as f64;
    let bytes = footprint.linear_bytes(plan) as f64;
    let value = match column.figure {
        Figure::Bytes => Some(bytes),
        Figure::Ratio => Some(bytes / float),
        Figure::Bits => Some(footprint.bits_per_weight(plan)),
        _ => None,
    };
    match value {
        Some(value) => {
            let text = column.text(value);
            Span::styled(format!(" {:>width$}", format!("~{text}")), state.theme.style(Role::Predicted))
        }
        None => dim(state, format!(" {:>width$}", "·")),
    }
}
