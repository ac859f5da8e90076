//! One prompt, two models: their texts side by side, the candidates under the cursor, the divergence of each token.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::Style;
use ratatui::text::{Line, Span};

use super::dim;
use crate::engine::Spoken;
use crate::tui::state::{Side, State};
use crate::tui::text::cut;
use crate::tui::theme::Role;
use crate::tui::view::bar_letter;

/// Lines of the candidates, with their head.
const CANDIDATES: u16 = 6;

pub fn draw(frame: &mut Frame, area: Rect, state: &State) {
    let playground = &state.playground;
    let style = |role| state.theme.style(role);
    let line = |y: u16| Rect { y: area.y + y, height: 1, ..area };
    let prompt = if playground.prompt.is_empty() {
        Line::from(dim(state, state.keymap.fill(" {prompt} gives a prompt to A and B")))
    } else {
        let text = cut(&playground.prompt.replace('\n', " "), area.width as usize - 10);
        Line::from(vec![dim(state, " prompt "), Span::styled(text, style(Role::Strong))])
    };
    frame.render_widget(prompt, line(0));
    let half = area.width / 2;
    let texts = area.height.saturating_sub(CANDIDATES + 4);
    let parting = playground.parting();
    for side in [Side::A, Side::B] {
        let x = area.x + if side == Side::A { 0 } else { half };
        let column = |y: u16, height: u16| Rect { x, y: area.y + y, width: half.saturating_sub(1), height };
        // Before anything is said, the models that would speak.
        let name = if playground.prompt.is_empty() { state.side(side).name } else { playground.names[side as usize].clone() };
        let count = playground.spoken[side as usize].len();
        let said = if count > 0 { format!("  {count} tokens") } else { String::new() };
        let head = vec![Span::styled(format!(" {side:?} "), style(Role::Key)), Span::styled(name, style(Role::Title)), dim(state, said)];
        frame.render_widget(Line::from(head), column(1, 1));
        let lines = text(state, side, parting, half.saturating_sub(3) as usize);
        // The line with the cursor stays on screen.
        let at = lines.iter().position(|(_, cursor)| *cursor).unwrap_or(0);
        let first = at.saturating_sub(texts.saturating_sub(1) as usize);
        for ((spans, _), y) in lines.into_iter().skip(first).zip(2..2 + texts) {
            let mut spans = spans;
            spans.insert(0, Span::raw(" "));
            frame.render_widget(Line::from(spans), column(y, 1));
        }
        for (row, y) in candidates(state, side, half as usize).into_iter().zip(area.height - CANDIDATES..area.height) {
            frame.render_widget(row, column(y, 1));
        }
    }
    let below = area.height - CANDIDATES - 2;
    frame.render_widget(Line::styled("─".repeat(area.width as usize), style(Role::Border)), line(below));
    frame.render_widget(strip(state, area.width as usize), line(below + 1));
}

/// A side's text as lines of spans, a token a span; and whether the cursor is in the line.
fn text(state: &State, side: Side, parting: Option<usize>, width: usize) -> Vec<(Vec<Span<'static>>, bool)> {
    let mut lines: Vec<(Vec<Span<'static>>, bool)> = vec![(Vec::new(), false)];
    let mut used = 0;
    for (index, spoken) in state.playground.spoken[side as usize].iter().enumerate() {
        let other = state.playground.spoken[1 - side as usize].get(index);
        let style = token_style(state, index, spoken, other, parting);
        let under = index == state.playground.cursor;
        let mut rest = spoken.piece.as_str();
        loop {
            let (part, more) = rest.split_once('\n').map_or((rest, None), |(part, more)| (part, Some(more)));
            let letters = part.chars().count();
            if used + letters > width && used > 0 {
                lines.push((Vec::new(), false));
                used = 0;
            }
            if let Some(line) = lines.last_mut() {
                let shown = if part.is_empty() && under { "⏎" } else { part };
                line.0.push(Span::styled(shown.to_owned(), style));
                line.1 |= under;
            }
            used += letters;
            let Some(more) = more else { break };
            lines.push((Vec::new(), false));
            used = 0;
            rest = more;
        }
    }
    lines
}

/// Plain while the texts agree; from where they part, tokens that differ stand out.
fn token_style(state: &State, index: usize, spoken: &Spoken, other: Option<&Spoken>, parting: Option<usize>) -> Style {
    let style = |role| state.theme.style(role);
    let role = match parting {
        Some(parting) if index == parting => Role::Bad,
        Some(parting) if index > parting && other.is_none_or(|other| other.token != spoken.token) => Role::Warning,
        _ => Role::Text,
    };
    if index == state.playground.cursor { style(role).patch(style(Role::Cursor)) } else { style(role) }
}

/// What a side might have said at the cursor, with bars of probability.
fn candidates(state: &State, side: Side, width: usize) -> Vec<Line<'static>> {
    let Some(spoken) = state.playground.spoken[side as usize].get(state.playground.cursor) else {
        return vec![Line::from(dim(state, ""))];
    };
    let mut lines = vec![Line::from(dim(state, format!(" token {}", state.playground.cursor)))];
    let bar = width.saturating_sub(34).min(24);
    for (place, (name, probability)) in spoken.candidates.iter().enumerate() {
        let role = if place == 0 { Role::Strong } else { Role::Text };
        let cells = (probability * bar as f64).round() as usize;
        lines.push(Line::from(vec![
            Span::styled(format!("  {:<16}", cut(&name.replace(' ', "·"), 16)), state.theme.style(role)),
            Span::raw(format!("{:>6.2}% ", 100.0 * probability)),
            Span::styled("█".repeat(cells), state.theme.style(Role::Progress)),
        ]));
    }
    lines
}

/// KL(A ‖ B) of each token of A's text, the last ones where there is no room for all; the scale is logarithmic.
fn strip(state: &State, width: usize) -> Line<'static> {
    let playground = &state.playground;
    let label = " KLD ";
    let room = width.saturating_sub(label.len() + 34);
    let Some(largest) = playground.divergence.iter().copied().reduce(f64::max) else {
        return Line::from(dim(state, " KLD of each token of A, as B sees it, appears here"));
    };
    let first = playground.divergence.len().saturating_sub(room);
    let mut spans = vec![dim(state, label)];
    for (index, divergence) in playground.divergence.iter().enumerate().skip(first) {
        // From a millionth of a nat to one.
        let share = (divergence.max(1e-6).log10() + 6.0) / 6.0;
        let role = if *divergence > 0.1 {
            Role::Bad
        } else if *divergence > 0.01 {
            Role::Warning
        } else {
            Role::Progress
        };
        let style = state.theme.style(role);
        let style = if index == playground.cursor { style.patch(state.theme.style(Role::Cursor)) } else { style };
        spans.push(Span::styled(bar_letter(share.max(0.05)).to_string(), style));
    }
    let here = playground.divergence.get(playground.cursor).map_or_else(String::new, |here| format!("  here {here:.1e}"));
    spans.push(dim(state, format!("{here}  largest {largest:.1e} nats")));
    Line::from(spans)
}

/// What is copied: the prompt and both texts.
pub fn copied(state: &State) -> String {
    let text = |side: usize| state.playground.spoken[side].iter().map(|spoken| spoken.piece.as_str()).collect::<String>();
    let [a, b] = &state.playground.names;
    format!("{}\n\n{a}:\n{}\n\n{b}:\n{}\n", state.playground.prompt, text(0), text(1))
}
