//! A list to choose one from.

use std::rc::Rc;

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{Popup, Reply, show, window};
use crate::tui::message::Effect;
use crate::tui::state::State;
use crate::tui::theme::Role;

/// What happens with the index of what was chosen.
type Pick = Rc<dyn Fn(&mut State, usize) -> Vec<Effect>>;

/// The list: what each choice is called and what is said of it.
pub struct Choose {
    title: String,
    items: Vec<(String, String)>,
    selected: usize,
    pick: Pick,
}

impl Choose {
    /// A list to be pushed; `pick` gets the index of what is chosen.
    pub fn popup(
        title: &str,
        items: Vec<(String, String)>,
        selected: usize,
        pick: impl Fn(&mut State, usize) -> Vec<Effect> + 'static,
    ) -> Popup {
        Popup::Choose(Self { title: title.into(), items, selected, pick: Rc::new(pick) })
    }

    pub(super) fn key(&mut self, key: &str) -> Reply {
        let number = key.parse::<usize>().ok().filter(|number| (1..=self.items.len()).contains(number));
        match key {
            "esc" | "q" | "ctrl-c" => return Reply::Close,
            "j" | "down" | "tab" => self.selected = (self.selected + 1) % self.items.len(),
            "k" | "up" | "shift-tab" => self.selected = (self.selected + self.items.len() - 1) % self.items.len(),
            _ => {}
        }
        let chosen = number.map(|number| number - 1).or_else(|| matches!(key, "enter" | "space").then_some(self.selected));
        let Some(index) = chosen else { return Reply::Stay };
        let pick = self.pick.clone();
        Reply::Act(Box::new(move |state| pick(state, index)))
    }

    pub(super) fn draw(&self, frame: &mut Frame, area: Rect, state: &State) {
        let names = self.items.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
        let details = self.items.iter().map(|(_, detail)| detail.chars().count()).max().unwrap_or(0);
        let rows = window(self.selected, self.items.len(), area.height.saturating_sub(4).max(1) as usize);
        let mut lines: Vec<Line> = rows
            .map(|index| {
                let (name, detail) = &self.items[index];
                let role = if index == self.selected { Role::Cursor } else { Role::Text };
                Line::from(vec![
                    Span::styled(format!(" {} ", index + 1), state.theme.style(Role::Key)),
                    Span::styled(format!(" {name:<names$}  {detail:<details$} "), state.theme.style(role)),
                ])
            })
            .collect();
        lines.push(Line::styled(" enter choose  esc leave", state.theme.style(Role::Dim)));
        let width = (names + details + 9).max(self.title.chars().count() + 4).max(28);
        show(frame, area, state, &self.title, width as u16, lines);
    }
}
