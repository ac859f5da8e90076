//! The rows that A has right and B wrong, or the other way round; the one under the cursor in full.

use ratatui::text::{Line, Span};

use super::dim;
use crate::eval::paired::Flip;
use crate::session::report::Table;
use crate::tui::popups::window;
use crate::tui::state::{Side, State};
use crate::tui::text::{cut, wrap};
use crate::tui::theme::Role;

/// The lines of the view.
pub fn lines(state: &State, width: usize, height: usize) -> Vec<Line<'static>> {
    let style = |role| state.theme.style(role);
    let Some(compared) = state.compared() else {
        let (a, b) = (state.side(Side::A), state.side(Side::B));
        let measured = a.result.is_some() && b.result.is_some();
        let text = if measured { "comparing row by row …" } else { "both A and B have to be measured: {run} runs a variant" };
        return vec![Line::from(dim(state, state.keymap.fill(&format!(" {text}"))))];
    };
    let flips = &compared.comparison.flips;
    let (lost, won) = flips.iter().fold((0, 0), |(lost, won), flip| if flip.base == flip.gold { (lost + 1, won) } else { (lost, won + 1) });
    let mut lines = vec![Line::from(vec![
        Span::raw(format!(" {} → {}   ", compared.comparison.base, compared.comparison.variant)),
        Span::styled(format!("{lost} right to wrong"), style(Role::Bad)),
        Span::raw("   "),
        Span::styled(format!("{won} wrong to right"), style(Role::Good)),
    ])];
    if flips.is_empty() {
        lines.push(Line::from(dim(state, " no row changed sides")));
        return lines;
    }
    let cursor = state.results.flip.min(flips.len() - 1);
    let detail = detail(state, &flips[cursor], width);
    let room = height.saturating_sub(lines.len() + detail.len()).clamp(3, height.saturating_sub(2).max(3));
    for index in window(cursor, flips.len(), room) {
        let flip = &flips[index];
        let (mark, role) = if flip.base == flip.gold { ("✗", Role::Bad) } else { ("✓", Role::Good) };
        let line = Line::from(vec![
            Span::styled(if index == cursor { " ▶ " } else { "   " }, style(Role::Strong)),
            Span::styled(format!("{mark} "), style(role)),
            Span::raw(format!("{:<14}{:>6}  ", flip.task, flip.index)),
            dim(state, format!("right {}  A chose {}  B chose {}", letter(flip.gold), letter(flip.base), letter(flip.variant))),
        ]);
        lines.push(if index == cursor { line.style(style(Role::Cursor)) } else { line });
    }
    lines.extend(detail);
    lines
}

/// `a` for the first choice.
fn letter(choice: usize) -> char {
    char::from(b'a' + (choice % 26) as u8)
}

/// The question with its choices, whom each model chose and how likely it thought them.
fn detail(state: &State, flip: &Flip, width: usize) -> Vec<Line<'static>> {
    let Some(compared) = state.compared() else { return Vec::new() };
    let style = |role| state.theme.style(role);
    let mut lines = vec![Line::styled("─".repeat(width), style(Role::Border))];
    let Some(question) = compared.questions.get(&(flip.task.clone(), flip.index)) else {
        lines.push(Line::from(dim(state, " the row's text is not there")));
        return lines;
    };
    // Winogrande's choices are in the contexts, the others' in the continuations.
    let shared = question.requests.iter().all(|(context, _)| *context == question.requests[0].0);
    let common = if shared { &question.requests[0].0 } else { &question.requests[0].1 };
    let prompt = common.replace('\n', " ");
    lines.extend(wrap(prompt.trim(), width.saturating_sub(2)).into_iter().take(4).map(|line| Line::raw(format!(" {line}"))));
    let scores = [Side::A, Side::B].map(|side| {
        let samples = state.side(side).samples;
        samples.and_then(|samples| samples.iter().find(|sample| sample.task == flip.task && sample.index == flip.index))
    });
    for (choice, (context, continuation)) in question.requests.iter().enumerate() {
        let text = if shared { continuation } else { context };
        let by = |chosen: usize, name: &str| if chosen == choice { name.to_owned() } else { " ".to_owned() };
        let score = |index: usize| {
            scores[index].and_then(|sample| sample.loglikelihoods.get(choice)).map_or_else(String::new, |score| format!("{score:>8.2}"))
        };
        let right = choice == flip.gold;
        lines.push(Line::from(vec![
            Span::styled(if right { " ✓ " } else { "   " }, style(Role::Good)),
            Span::styled(format!("{} ", letter(choice)), style(Role::Key)),
            Span::styled(format!("{}{} ", by(flip.base, "A"), by(flip.variant, "B")), style(Role::Strong)),
            dim(state, format!("{}{}  ", score(0), score(1))),
            Span::styled(
                cut(&text.trim().replace('\n', " "), width.saturating_sub(27)),
                style(if right { Role::Good } else { Role::Text }),
            ),
        ]));
    }
    lines
}

/// The flips as a table, to export.
pub fn table(state: &State) -> Table {
    let mut table = Table::new(&["task", "index", "right", "A", "B"]);
    for flip in state.compared().iter().flat_map(|compared| &compared.comparison.flips) {
        let row = [flip.gold, flip.base, flip.variant].map(|choice| choice.to_string());
        table.push([vec![flip.task.clone(), flip.index.to_string()], row.to_vec()].concat());
    }
    table
}
