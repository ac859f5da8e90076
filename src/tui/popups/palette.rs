//! The command palette: type letters of a command's name.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::input::Input;
use super::{Reply, show, window};
use crate::tui::commands::{self, Match};
use crate::tui::state::State;
use crate::tui::text::cut;
use crate::tui::theme::Role;

/// What was typed, and which of the matches is chosen.
#[derive(Default)]
pub struct Palette {
    query: Input,
    selected: usize,
}

impl Palette {
    fn matches(&self) -> Vec<Match> {
        commands::search(&self.query.text())
    }

    pub(super) fn key(&mut self, key: &str) -> Reply {
        let count = self.matches().len().max(1);
        match key {
            "esc" | "ctrl-c" => return Reply::Close,
            "down" | "tab" | "ctrl-n" => self.selected = (self.selected + 1) % count,
            "up" | "shift-tab" | "ctrl-p" => self.selected = (self.selected + count - 1) % count,
            "enter" => {
                let chosen = self.matches().get(self.selected).map(|found| found.command);
                return chosen.map_or(Reply::Close, |command| Reply::Act(Box::new(move |state| command.invoke(state))));
            }
            key => {
                if self.query.key(key) {
                    self.selected = 0;
                }
            }
        }
        Reply::Stay
    }

    pub(super) fn draw(&self, frame: &mut Frame, area: Rect, state: &State) {
        let width = area.width.saturating_sub(4).min(90);
        let height = area.height.saturating_sub(4).min(18) as usize;
        let matches = self.matches();
        let mut prompt = vec![Span::styled(" : ", state.theme.style(Role::Key))];
        prompt.extend(self.query.spans(width as usize - 6));
        let mut lines = vec![Line::from(prompt)];
        for index in window(self.selected, matches.len(), height.saturating_sub(1)) {
            let Match { command, letters } = &matches[index];
            let role = match (index == self.selected, command.possible(state)) {
                (true, _) => Role::Cursor,
                (false, Ok(())) => Role::Text,
                (false, Err(_)) => Role::Dim,
            };
            let keys = state.keymap.keys(command).first().map_or("", String::as_str);
            let help_width = (width as usize).saturating_sub(36);
            let help = match command.possible(state) {
                Ok(()) => command.help,
                Err(reason) => reason,
            };
            let mut spans =
                vec![Span::styled(format!(" {keys:>6} "), state.theme.style(Role::Key)), Span::styled(" ", state.theme.style(role))];
            for (place, letter) in format!("{:<21}", command.id).chars().enumerate() {
                let style = state.theme.style(role);
                let hit = letters.contains(&(place as u32));
                spans.push(Span::styled(letter.to_string(), if hit { style.patch(state.theme.style(Role::Key)) } else { style }));
            }
            spans.push(Span::styled(format!(" {} ", cut(help, help_width)), state.theme.style(role)));
            lines.push(Line::from(spans));
        }
        if matches.is_empty() {
            lines.push(Line::styled("  no command has these letters", state.theme.style(Role::Dim)));
        }
        show(frame, area, state, "Commands", width, lines);
    }
}
