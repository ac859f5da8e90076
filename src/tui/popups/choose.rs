//! A list to choose one from.

use std::rc::Rc;

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{Popup, Reply, show, window};
use crate::tui::message::Effect;
use crate::tui::state::State;
use crate::tui::text::{cut, wrap};
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
        let longest = |texts: &mut dyn Iterator<Item = &String>| texts.map(|text| text.chars().count()).max().unwrap_or(0);
        let names = longest(&mut self.items.iter().map(|(name, _)| name));
        let wanted = longest(&mut self.items.iter().map(|(_, detail)| detail));
        let numbers = self.items.len().to_string().len();
        let room = (area.width as usize).saturating_sub(names + numbers + 8);
        let details = wanted.min(room);
        // What is cut in its row is said in full below.
        let chosen = self.items.get(self.selected).map_or("", |(_, detail)| detail.as_str());
        let below = if wanted > room { wrap(chosen, (area.width as usize).saturating_sub(6)) } else { Vec::new() };
        let lines_below = if wanted > room { below.len().max(2) } else { 0 };
        let height = (area.height as usize).saturating_sub(4 + lines_below).max(1);
        let mut lines: Vec<Line> = window(self.selected, self.items.len(), height)
            .map(|index| {
                let (name, detail) = &self.items[index];
                let role = if index == self.selected { Role::Cursor } else { Role::Text };
                Line::from(vec![
                    Span::styled(format!(" {:>numbers$} ", index + 1), state.theme.style(Role::Key)),
                    Span::styled(format!(" {name:<names$}  {:<details$} ", cut(detail, details)), state.theme.style(role)),
                ])
            })
            .collect();
        lines.extend((0..lines_below).map(|line| {
            let text = below.get(line).map_or("", String::as_str);
            Line::styled(format!("  {text}"), state.theme.style(Role::Dim))
        }));
        lines.push(Line::styled(" enter choose  esc leave", state.theme.style(Role::Dim)));
        let width = (names + details + numbers + 8).max(self.title.chars().count() + 4).max(28);
        show(frame, area, state, &self.title, width as u16, lines);
    }
}
