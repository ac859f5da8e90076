//! Lines of text to scroll through.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::Line;

use super::{Popup, Reply, show};
use crate::tui::state::State;
use crate::tui::text::wrap;
use crate::tui::theme::Role;

/// Rows that a page key moves by.
const PAGE: usize = 10;

/// The lines, each in a role, and how far they are scrolled.
pub struct Pager {
    title: String,
    lines: Vec<(Role, String)>,
    /// Lines hidden at the top; as far as the last line may be asked for.
    first: usize,
}

impl Pager {
    /// Lines to be pushed, shown from their end when `from_end` is set.
    pub fn popup(title: impl Into<String>, lines: Vec<(Role, String)>, from_end: bool) -> Popup {
        let first = if from_end { lines.len() } else { 0 };
        Popup::Pager(Self { title: title.into(), lines, first })
    }

    pub(super) fn key(&mut self, key: &str) -> Reply {
        let last = self.lines.len().saturating_sub(1);
        match key {
            "esc" | "q" | "ctrl-c" | "enter" => return Reply::Close,
            "j" | "down" => self.first += 1,
            "k" | "up" => self.first = self.first.min(last).saturating_sub(1),
            "pgdn" | "ctrl-d" | "space" => self.first += PAGE,
            "pgup" | "ctrl-u" => self.first = self.first.min(last).saturating_sub(PAGE),
            "g" | "home" => self.first = 0,
            "G" | "end" => self.first = last,
            _ => {}
        }
        self.first = self.first.min(last);
        Reply::Stay
    }

    pub(super) fn draw(&self, frame: &mut Frame, area: Rect, state: &State) {
        let width = area.width.saturating_sub(4).min(110);
        let height = area.height.saturating_sub(4).max(3) as usize;
        let wrapped: Vec<(Role, String)> = self
            .lines
            .iter()
            .flat_map(|(role, line)| {
                // A line that fits keeps its indentation.
                let fits = line.chars().count() <= width as usize - 4;
                let parts = if fits { vec![line.clone()] } else { wrap(line, width as usize - 4) };
                parts.into_iter().map(|part| (*role, part))
            })
            .collect();
        let room = height.saturating_sub(2);
        let first = self.first.min(wrapped.len().saturating_sub(room));
        let mut lines: Vec<Line> = wrapped[first..(first + room).min(wrapped.len())]
            .iter()
            .map(|(role, line)| Line::styled(format!(" {line}"), state.theme.style(*role)))
            .collect();
        lines.push(Line::styled(" j k pgdn pgup scroll  esc leave", state.theme.style(Role::Dim)));
        show(frame, area, state, &self.title, width, lines);
    }
}
