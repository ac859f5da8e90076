//! A question that is answered with a line of text, at the bottom of the screen.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::Line;
use ratatui::widgets::{Block, BorderType, Clear, Paragraph};

use super::input::Input;
use super::{Popup, Reply};
use crate::tui::message::Effect;
use crate::tui::state::State;
use crate::tui::theme::Role;

/// What happens with the text.
type WithText = std::rc::Rc<dyn Fn(&mut State, &str) -> Vec<Effect>>;

/// The question and the line being typed.
pub struct Prompt {
    title: String,
    input: Input,
    /// What was there before, which `esc` brings back.
    original: String,
    accept: WithText,
    live: Option<fn(&mut State, &str)>,
}

impl Prompt {
    /// A question with `text` as the answer so far; `accept` gets what is entered.
    pub fn new(title: impl Into<String>, text: &str, accept: impl Fn(&mut State, &str) -> Vec<Effect> + 'static) -> Self {
        Self { title: title.into(), input: Input::new(text), original: text.into(), accept: std::rc::Rc::new(accept), live: None }
    }

    /// Calls `change` at every key, and with the original text when the prompt is left by `esc`.
    pub fn live(self, change: fn(&mut State, &str)) -> Self {
        Self { live: Some(change), ..self }
    }

    /// To be pushed.
    pub fn popup(self) -> Popup {
        Popup::Prompt(self)
    }

    pub(super) fn key(&mut self, key: &str, state: &mut State) -> Reply {
        match key {
            "esc" | "ctrl-c" => {
                if let Some(live) = self.live {
                    live(state, &self.original);
                }
                Reply::Close
            }
            "enter" => {
                let (accept, text) = (self.accept.clone(), self.input.text());
                Reply::Act(Box::new(move |state| accept(state, &text)))
            }
            key => {
                self.input.key(key);
                if let Some(live) = self.live {
                    live(state, &self.input.text());
                }
                Reply::Stay
            }
        }
    }

    pub(super) fn draw(&self, frame: &mut Frame, area: Rect, state: &State) {
        let place = Rect { y: area.bottom().saturating_sub(4), height: 3.min(area.height), ..area };
        frame.render_widget(Clear, place);
        let block = Block::bordered()
            .border_type(BorderType::Rounded)
            .border_style(state.theme.style(Role::BorderFocus))
            .title_style(state.theme.style(Role::Title))
            .title(format!(" {} ", self.title))
            .title_bottom(Line::styled(" enter accept  esc leave ", state.theme.style(Role::Dim)).right_aligned());
        let width = place.width.saturating_sub(4) as usize;
        let mut spans = vec![" ".into()];
        spans.extend(self.input.spans(width));
        frame.render_widget(Paragraph::new(Line::from(spans)).block(block), place);
    }
}
