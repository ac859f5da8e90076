//! The screen: header, panes, status line, hint line; and which panes there is room for.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Margin, Position, Rect};
use ratatui::style::Style;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, BorderType, Clear, Paragraph};

use super::queue::Level;
use super::state::{Pane, State};
use super::text::{cut, wrap};
use super::theme::Role;
use super::{ascii, commands, panes, popups};

/// The smallest screen that anything is drawn on.
pub const SMALLEST: (u16, u16) = (60, 15);
/// From this size on, all panes are shown side by side.
const WIDE: (u16, u16) = (110, 32);

/// Where everything goes.
pub struct Regions {
    pub header: Rect,
    pub panes: Vec<(Pane, Rect)>,
    pub status: Rect,
    pub hints: Rect,
}

/// The regions of a screen; nothing when it is too small.
pub fn regions(size: (u16, u16), focus: Pane, zoom: bool) -> Option<Regions> {
    let (width, height) = size;
    if width < SMALLEST.0 || height < SMALLEST.1 {
        return None;
    }
    let body = Rect::new(0, 1, width, height - 3);
    // Two texts side by side need the whole width.
    let panes = if zoom || focus == Pane::Playground || width < WIDE.0 || height < WIDE.1 {
        vec![(focus, body)]
    } else {
        let left = (width / 2).min(84);
        let plan = (body.height * 2 / 5).clamp(13, 18);
        let (block, results) = (8 + ((height - WIDE.1) / 2).min(8), (body.height / 3).clamp(9, 16));
        let right = Rect { x: left, width: width - left, ..body };
        vec![
            (Pane::Layers, Rect { width: left, height: body.height - plan, ..body }),
            (Pane::Plan, Rect { y: body.bottom() - plan, width: left, height: plan, ..body }),
            (Pane::Block, Rect { height: block, ..right }),
            (Pane::Run, Rect { y: right.y + block, height: right.height - block - results, ..right }),
            (Pane::Results, Rect { y: right.bottom() - results, height: results, ..right }),
        ]
    };
    let line = |y| Rect { y, height: 1, x: 0, width };
    Some(Regions { header: line(0), panes, status: line(height - 2), hints: line(height - 1) })
}

/// Rows that a page of the focused pane has.
pub fn page(state: &State) -> isize {
    let regions = regions(state.size, state.focus, state.zoom);
    let area = regions.and_then(|regions| regions.panes.into_iter().find(|(pane, _)| *pane == state.focus));
    area.map_or(10, |(_, area)| area.height.saturating_sub(8).max(1)) as isize
}

/// Draws the whole screen.
pub fn draw(frame: &mut Frame, state: &State) {
    let area = frame.area();
    frame.buffer_mut().set_style(area, state.theme.style(Role::Text));
    if let Some(regions) = regions((area.width, area.height), state.focus, state.zoom) {
        draw_header(frame, regions.header, state, regions.panes.len() > 1);
        for (pane, area) in regions.panes {
            let inner = frame_pane(frame, area, state, pane);
            match pane {
                Pane::Layers => panes::layers::draw(frame, inner, state),
                Pane::Plan => panes::plan::draw(frame, inner, state),
                Pane::Run => panes::run::draw(frame, inner, state),
                Pane::Block => panes::block::draw(frame, inner, state),
                Pane::Results => panes::results::draw(frame, inner, state),
                Pane::Playground => panes::playground::draw(frame, inner, state),
            }
        }
        draw_status(frame, regions.status, state);
        draw_hints(frame, regions.hints, state);
        popups::draw(frame, area, state);
        draw_toasts(frame, area, state);
    } else {
        let text = format!("strata needs {}x{}; this is {}x{}", SMALLEST.0, SMALLEST.1, area.width, area.height);
        frame.render_widget(Line::styled(text, state.theme.style(Role::Strong)), area);
    }
    if state.ascii {
        ascii::flatten(frame.buffer_mut());
    }
}

/// The inside of a pane's frame.
pub fn inner(area: Rect) -> Rect {
    area.inner(Margin::new(1, 1))
}

/// Whether a pane is on the screen.
pub fn shows(state: &State, pane: Pane) -> bool {
    regions(state.size, state.focus, state.zoom).is_some_and(|regions| regions.panes.iter().any(|(shown, _)| *shown == pane))
}

/// The pane whose tab in the header is at a position.
pub fn tab_at(state: &State, at: Position) -> Option<Pane> {
    let regions = regions(state.size, state.focus, state.zoom)?;
    if at.y != regions.header.y || regions.panes.len() > 1 {
        return None;
    }
    let mut end = PROGRAM.len() as u16;
    Pane::ALL.into_iter().find(|pane| {
        end += tab(*pane).chars().count() as u16;
        at.x < end && at.x >= PROGRAM.len() as u16
    })
}

/// What the header begins with.
const PROGRAM: &str = " strata ";

/// A pane's tab, where there is room for one pane.
fn tab(pane: Pane) -> String {
    let title = if pane == Pane::Playground { "Play" } else { pane.title() };
    format!(" {} {title} ", pane.number())
}

fn frame_pane(frame: &mut Frame, area: Rect, state: &State, pane: Pane) -> Rect {
    let focused = pane == state.focus;
    let border = if focused { Role::BorderFocus } else { Role::Border };
    let title = if focused { Role::Title } else { Role::Dim };
    let name = Line::from(vec![
        Span::styled(format!(" {} ", pane.number()), state.theme.style(Role::Key)),
        Span::styled(format!("{} ", pane.title()), state.theme.style(title)),
        Span::styled(panes::caption(state, pane), state.theme.style(Role::Dim)),
    ]);
    let block = Block::bordered().border_type(BorderType::Rounded).border_style(state.theme.style(border)).title(name);
    let inner = block.inner(area);
    frame.render_widget(block, area);
    inner
}

/// The name of the program, the model, the variant, the session; where there is one pane, the others as tabs.
fn draw_header(frame: &mut Frame, area: Rect, state: &State, side_by_side: bool) {
    let style = |role| state.theme.style(role);
    let draft = state.document.draft();
    let mut spans = vec![Span::styled(PROGRAM, style(Role::Title))];
    if side_by_side {
        let path = state.path.as_ref().map_or_else(|| "not saved yet".to_owned(), |path| path.display().to_string());
        let unsaved = if state.document.unsaved() { " *" } else { "" };
        let edits = match draft.overrides.len() {
            0 => String::new(),
            1 => " + 1 override".into(),
            count => format!(" + {count} overrides"),
        };
        for (label, value) in [
            ("model ", state.document.settings().model.id.clone()),
            ("variant ", format!("{} (recipe {}{edits})", draft.name, draft.recipe_name)),
            ("session ", format!("{path}{unsaved}")),
        ] {
            spans.extend([Span::styled(format!("  {label}"), style(Role::Dim)), Span::raw(value)]);
        }
    } else {
        for pane in Pane::ALL {
            let role = if pane == state.focus { Role::Cursor } else { Role::Text };
            spans.push(Span::styled(tab(pane), style(role)));
        }
        let unsaved = if state.document.unsaved() { "*" } else { "" };
        let read_only = if state.read_only { " read-only" } else { "" };
        spans.push(Span::styled(format!(" {read_only} {}{unsaved}", draft.name), style(Role::Dim)));
    }
    if side_by_side && state.read_only {
        spans.push(Span::styled("  read-only", style(Role::Dim)));
    }
    let memory = format!("{}{} resident ", gpu_summary(state), crate::session::report::bytes(state.resident_bytes));
    let line = Line::from(spans);
    let room = area.width as usize > line.width() + memory.chars().count() + 1;
    frame.render_widget(line, area);
    if room && state.resident_bytes > 0 {
        frame.render_widget(Line::styled(memory, style(Role::Dim)).right_aligned(), area);
    }
}

/// The first GPU in a few words, when there is one.
fn gpu_summary(state: &State) -> String {
    state.gpus.first().map_or_else(String::new, |gpu| {
        let temperature = gpu.temperature.map_or_else(String::new, |degrees| format!(" {degrees}°C"));
        let name = gpu.name.trim_start_matches("NVIDIA ").split_whitespace().next().unwrap_or("GPU").to_owned();
        let bytes = crate::session::report::bytes;
        format!("{name}{temperature} {}% {} of {}  ", gpu.utilization, bytes(gpu.used_bytes), bytes(gpu.total_bytes))
    })
}

/// What was last said; while nothing is said, what runs.
fn draw_status(frame: &mut Frame, area: Rect, state: &State) {
    let mut line = match (&state.message, state.queue.running()) {
        (Some(message), _) => {
            let role = match message.level {
                Level::Info => Role::Text,
                Level::Warning => Role::Warning,
                Level::Error => Role::Bad,
            };
            Line::styled(format!(" {}", message.text), state.theme.style(role))
        }
        (None, Some(running)) => {
            let job = &state.queue.progress;
            let mut text = format!(" ▶ {} · {} {} of {}", running.title, job.stage, job.done, job.total);
            if let Some(left) = job.remaining(state.clock).filter(|_| !job.paused) {
                text = format!("{text} · {} left", duration(left));
            }
            Line::styled(text, state.theme.style(Role::Progress))
        }
        (None, None) if !state.layers.selected.is_empty() => {
            Line::styled(format!(" {} blocks selected", state.layers.selected.len()), state.theme.style(Role::Selected))
        }
        (None, None) => Line::default(),
    };
    if line.width() > area.width as usize {
        line = Line::styled(cut(&line.to_string(), area.width as usize), line.style);
    }
    frame.render_widget(line, area);
}

/// What happened by itself, in the lower right corner, the latest at the bottom.
fn draw_toasts(frame: &mut Frame, area: Rect, state: &State) {
    let mut bottom = area.bottom().saturating_sub(3);
    for toast in state.toasts.iter().rev() {
        let role = match toast.message.level {
            Level::Info => Role::Good,
            Level::Warning => Role::Warning,
            Level::Error => Role::Bad,
        };
        let lines = wrap(&toast.message.text, (area.width as usize).saturating_sub(8).min(56));
        let width = lines.iter().map(|line| line.chars().count()).max().unwrap_or(0) as u16 + 4;
        let height = lines.len() as u16 + 2;
        if bottom < area.y + 2 + height {
            break;
        }
        bottom -= height;
        let place = Rect { x: area.right().saturating_sub(width + 2), y: bottom, width, height };
        frame.render_widget(Clear, place);
        let block = Block::bordered().border_type(BorderType::Rounded).border_style(state.theme.style(role));
        let text: Vec<Line> = lines.into_iter().map(|line| Line::raw(format!(" {line}"))).collect();
        frame.render_widget(Paragraph::new(text).block(block).style(state.theme.style(Role::Text)), place);
    }
}

/// The keys of the focused pane; those that do not fit are left out from the end, except the ways to help.
fn draw_hints(frame: &mut Frame, area: Rect, state: &State) {
    let span = |(key, hint): (String, &str)| {
        [Span::styled(format!(" {key} "), state.theme.style(Role::Key)), Span::styled(hint.to_owned(), state.theme.style(Role::Dim))]
    };
    let width = |(key, hint): &(String, &str)| key.chars().count() + hint.chars().count() + 2;
    let (always, others): (Vec<_>, Vec<_>) = commands::hinted(state).into_iter().partition(|(_, hint)| ALWAYS.contains(hint));
    let mut room = (area.width as usize).saturating_sub(always.iter().map(width).sum());
    let mut spans = Vec::new();
    for hint in others {
        let needed = width(&hint);
        if needed <= room {
            room -= needed;
            spans.extend(span(hint));
        }
    }
    spans.extend(always.into_iter().flat_map(span));
    frame.render_widget(Line::from(spans), area);
}

/// Hints that stay whatever the width.
const ALWAYS: [&str; 3] = ["command", "help", "quit"];

/// A duration as `7 s`, `4:12` or `1:02:30`.
pub fn duration(duration: Duration) -> String {
    let seconds = duration.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{}:{:02}", seconds / 60, seconds % 60),
        _ => format!("{}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60),
    }
}

/// One of nine heights of a bar, for a share between 0 and 1.
pub fn bar_letter(share: f64) -> char {
    const BARS: [char; 9] = [' ', '▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
    BARS[((share.clamp(0.0, 1.0) * 8.0).ceil() as usize).min(8)]
}

/// A horizontal bar of `width` cells, `share` of it filled.
pub fn bar(share: f64, width: usize, filled: Style, empty: Style) -> [Span<'static>; 2] {
    let cells = ((share.clamp(0.0, 1.0) * width as f64).round() as usize).min(width);
    [Span::styled("█".repeat(cells), filled), Span::styled("░".repeat(width - cells), empty)]
}
