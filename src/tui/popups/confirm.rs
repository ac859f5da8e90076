//! A question with a few answers, each on a key; `esc` and `n` leave everything as it is.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{Action, Popup, Reply, show};
use crate::tui::message::Effect;
use crate::tui::state::State;
use crate::tui::text::wrap;
use crate::tui::theme::Role;

/// An answer.
pub struct Choice {
    key: char,
    label: &'static str,
    action: Option<Action>,
}

impl Choice {
    /// An answer on `key`.
    pub fn new(key: char, label: &'static str, action: impl Fn(&mut State) -> Vec<Effect> + 'static) -> Self {
        Self { key, label, action: Some(Box::new(action)) }
    }
}

/// The question.
pub struct Confirm {
    title: String,
    lines: Vec<String>,
    choices: Vec<Choice>,
}

impl Confirm {
    /// A question to be pushed.
    pub fn popup(title: String, lines: Vec<String>, choices: Vec<Choice>) -> Popup {
        Popup::Confirm(Self { title, lines, choices })
    }

    pub(super) fn key(&mut self, key: &str) -> Reply {
        if matches!(key, "esc" | "n" | "ctrl-c") {
            return Reply::Close;
        }
        let chosen = self.choices.iter_mut().find(|choice| key.len() == 1 && key.starts_with(choice.key));
        chosen.and_then(|choice| choice.action.take()).map_or(Reply::Stay, Reply::Act)
    }

    pub(super) fn draw(&self, frame: &mut Frame, area: Rect, state: &State) {
        let key = |key: String| Span::styled(key, state.theme.style(Role::Key));
        let mut answers = vec![Span::raw(" ")];
        for choice in &self.choices {
            answers.extend([key(choice.key.to_string()), Span::raw(format!(" {}   ", choice.label))]);
        }
        answers.extend([key("esc".into()), Span::raw(" stay ")]);
        let answers = Line::from(answers);
        let inner = area.width.saturating_sub(6).max(20) as usize;
        let longest = self.lines.iter().map(|line| line.chars().count()).chain([answers.width(), self.title.len() + 2]).max().unwrap_or(0);
        let width = longest.min(inner);
        let mut lines = vec![Line::default()];
        lines.extend(self.lines.iter().flat_map(|line| wrap(line, width)).map(|line| Line::raw(format!(" {line}"))));
        lines.extend([Line::default(), answers]);
        show(frame, area, state, &self.title, width as u16 + 4, lines);
    }
}
