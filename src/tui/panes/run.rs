//! The jobs: the queue, the running stage, the errors of the blocks as they come, the log.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{dim, percent};
use crate::session::report;
use crate::tui::popups::window;
use crate::tui::queue::{Item, Level, Status};
use crate::tui::state::State;
use crate::tui::text::{cut, wrap};
use crate::tui::theme::Role;
use crate::tui::view::{bar, bar_letter, duration};

/// Rows of the queue, at most.
const QUEUE_ROWS: usize = 6;

pub fn draw(frame: &mut Frame, area: Rect, state: &State) {
    let width = area.width as usize;
    let mut lines = Vec::new();
    let items = &state.queue.items;
    if items.is_empty() {
        lines.push(Line::from(dim(state, " R quantizes and evaluates the variant being edited,")));
        lines.push(Line::from(dim(state, " A all variants of the session.")));
    }
    let active = items.iter().position(|item| matches!(item.status, Status::Running(_) | Status::Waiting)).unwrap_or(items.len());
    let most = (area.height as usize / 3).clamp(2, QUEUE_ROWS);
    for index in window(active.min(items.len().saturating_sub(1)), items.len(), most) {
        lines.push(item_line(state, &items[index], width));
        if let Status::Failed { hint: Some(hint), .. } = &items[index].status {
            for (index, part) in wrap(hint, width.saturating_sub(12)).into_iter().enumerate() {
                let label = if index == 0 { "     hint: " } else { "           " };
                lines.push(Line::from(vec![Span::styled(label, state.theme.style(Role::Key)), Span::raw(part)]));
            }
        }
    }
    if state.queue.running().is_some() {
        lines.extend(stage_lines(state, width));
    }
    if !state.queue.errors.is_empty() {
        lines.extend(error_lines(state, width));
    }
    let room = (area.height as usize).saturating_sub(lines.len());
    lines.extend(log_lines(state, room, width));
    for (line, y) in lines.into_iter().zip(area.y..area.bottom()) {
        frame.render_widget(line, Rect { y, height: 1, ..area });
    }
}

fn item_line(state: &State, item: &Item, width: usize) -> Line<'static> {
    let (mark, role, note) = match &item.status {
        Status::Waiting => ("·", Role::Dim, "waits".to_owned()),
        Status::Running(_) => ("▶", Role::Progress, format!("{} so far", duration(state.clock.saturating_sub(item.began)))),
        Status::Done if item.reused => ("✓", Role::Good, "found on disk, verified".into()),
        Status::Done => ("✓", Role::Good, format!("took {}", duration(item.ended.saturating_sub(item.began)))),
        Status::Failed { message, .. } => ("✗", Role::Bad, message.clone()),
        Status::Cancelled => ("✗", Role::Warning, "cancelled".into()),
        Status::Skipped => ("·", Role::Warning, "skipped: nothing to evaluate".into()),
    };
    let note_width = width.saturating_sub(item.title.chars().count() + 6);
    let note = cut(&note, note_width);
    Line::from(vec![
        Span::styled(format!(" {mark} "), state.theme.style(role)),
        Span::raw(format!("{}  ", item.title)),
        Span::styled(note, state.theme.style(if role == Role::Bad { Role::Bad } else { Role::Dim })),
    ])
}

/// The stage with its bar, and what it did last.
fn stage_lines(state: &State, width: usize) -> Vec<Line<'static>> {
    let stage = &state.queue.stage;
    let share = if stage.total == 0 { 0.0 } else { stage.done as f64 / stage.total as f64 };
    let left = state.queue.remaining(state.clock).map_or_else(String::new, |left| format!("  {} left", duration(left)));
    let count = format!(" {}/{}{left}", stage.done, stage.total);
    let room = width.saturating_sub(16 + count.chars().count()).clamp(4, 30);
    let mut spans = vec![Span::raw(format!(" {:<13} ", stage.name))];
    spans.extend(bar(share, room, state.theme.style(Role::Progress), state.theme.style(Role::Border)));
    spans.push(Span::raw(count));
    let memory = format!("   memory {}", report::bytes(state.resident_bytes));
    let queue = &state.queue;
    let model = queue
        .models
        .get(queue.evaluated)
        .map_or_else(String::new, |model| format!("model {} of {}, {model}: ", queue.evaluated + 1, queue.models.len()));
    let note = cut(&format!("{model}{}", stage.note), width.saturating_sub(memory.len() + 3));
    vec![Line::from(spans), Line::from(vec![dim(state, format!("   {note}")), dim(state, memory)])]
}

/// A bar a block, as high as its error.
fn error_lines(state: &State, width: usize) -> Vec<Line<'static>> {
    let errors = &state.queue.errors;
    let worst = errors.iter().copied().fold(0.0, f64::max);
    let label = " error a block ";
    let shown = window(errors.len(), errors.len(), width.saturating_sub(label.len() + 14));
    let bars: String = errors[shown].iter().map(|error| bar_letter(if worst > 0.0 { error / worst } else { 0.0 })).collect();
    vec![Line::from(vec![
        dim(state, label),
        Span::styled(bars, state.theme.style(Role::Progress)),
        dim(state, format!("  worst {}", percent(worst))),
    ])]
}

fn log_lines(state: &State, room: usize, width: usize) -> Vec<Line<'static>> {
    let log = &state.queue.log;
    if log.is_empty() || room < 2 {
        return Vec::new();
    }
    let title = if state.queue.scroll > 0 { format!(" log, {} lines back ", state.queue.scroll) } else { " log ".into() };
    let rule = "─".repeat(width.saturating_sub(title.len() + 1));
    let mut lines = vec![Line::styled(format!("─{title}{rule}"), state.theme.style(Role::Border))];
    let end = log.len() - state.queue.scroll.min(log.len() - 1);
    let start = end.saturating_sub(room - 1);
    let mut tail = Vec::new();
    for (level, text) in log.range(start..end) {
        let (mark, role) = match level {
            Level::Info => ("  ", Role::Dim),
            Level::Warning => ("! ", Role::Warning),
            Level::Error => ("✗ ", Role::Bad),
        };
        for (index, part) in wrap(text, width.saturating_sub(4)).into_iter().enumerate() {
            let mark = if index == 0 { mark } else { "    " };
            tail.push(Line::styled(format!(" {mark}{part}"), state.theme.style(role)));
        }
    }
    lines.extend(tail.split_off(tail.len().saturating_sub(room - 1)));
    lines
}
