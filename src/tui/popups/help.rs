//! The help: every command with its keys, narrowed by what is typed.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::input::Input;
use super::{Reply, show};
use crate::tui::command_table::TABLE;
use crate::tui::commands::Command;
use crate::tui::state::State;
use crate::tui::text::wrap;
use crate::tui::theme::Role;

/// What was typed, and how far the list is scrolled.
#[derive(Default)]
pub struct Help {
    query: Input,
    scroll: usize,
}

impl Help {
    fn matches(&self, state: &State) -> Vec<&'static Command> {
        let words: Vec<String> = self.query.text().to_lowercase().split_whitespace().map(str::to_owned).collect();
        let meets = |command: &&Command| {
            let text = format!("{} {} {} {}", command.id, command.title, command.help, state.keymap.keys(command).join(" ")).to_lowercase();
            words.iter().all(|word| text.contains(word))
        };
        TABLE.iter().filter(meets).collect()
    }

    pub(super) fn key(&mut self, key: &str, state: &State) -> Reply {
        let count = self.matches(state).len();
        match key {
            "esc" | "ctrl-c" | "?" | "enter" => return Reply::Close,
            "down" => self.scroll = (self.scroll + 1).min(count.saturating_sub(1)),
            "up" => self.scroll = self.scroll.saturating_sub(1),
            "pgdn" => self.scroll = (self.scroll + 10).min(count.saturating_sub(1)),
            "pgup" => self.scroll = self.scroll.saturating_sub(10),
            key => {
                if self.query.key(key) {
                    self.scroll = 0;
                }
            }
        }
        Reply::Stay
    }

    pub(super) fn draw(&self, frame: &mut Frame, area: Rect, state: &State) {
        let width = area.width.min(116);
        let height = area.height.saturating_sub(3) as usize;
        let mut head = vec![Span::styled(" search: ", state.theme.style(Role::Key))];
        head.extend(self.query.spans(width as usize / 3));
        head.push(Span::styled("   up/down, pgup/pgdn scroll   esc leaves", state.theme.style(Role::Dim)));
        let mut lines = vec![Line::from(head), Line::default()];
        let matches = self.matches(state);
        for command in matches.iter().skip(self.scroll.min(matches.len().saturating_sub(1))) {
            let keys = match state.keymap.keys(command) {
                [] => ":".to_owned(),
                keys => keys.join(" "),
            };
            let place = if command.panes.is_empty() || width < 100 { String::new() } else { format!(" [{}]", command.place()) };
            let text = format!("{}{place}", command.help);
            for (index, part) in wrap(&text, (width as usize).saturating_sub(40).max(30)).into_iter().enumerate() {
                let (keys, title) = if index == 0 { (keys.as_str(), command.title) } else { ("", "") };
                lines.push(Line::from(vec![
                    Span::styled(format!(" {keys:<10} "), state.theme.style(Role::Key)),
                    Span::styled(format!("{title:<24} "), state.theme.style(Role::Strong)),
                    Span::raw(part),
                ]));
            }
        }
        if matches.is_empty() {
            lines.push(Line::styled("  nothing matches", state.theme.style(Role::Dim)));
        }
        lines.truncate(height.saturating_sub(1));
        show(frame, area, state, "Help", width, lines);
    }
}
