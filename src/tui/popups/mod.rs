//! What lies over the panes: a stack of popups, the front one taking every key. A popup is one file: its state, what
//! keys do to it, and how it is drawn.

mod choose;
mod confirm;
mod help;
mod input;
mod pager;
mod palette;
mod prompt;
mod runs;
mod tour;

use crossterm::event::KeyEvent;
use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::Line;
use ratatui::widgets::{Block, BorderType, Clear, Paragraph};

pub use choose::Choose;
pub use confirm::{Choice, Confirm};
pub use help::Help;
pub use pager::Pager;
pub use palette::Palette;
pub use prompt::Prompt;
pub use runs::Runs;
pub use tour::Tour;

use super::keys;
use super::message::{Effect, Msg};
use super::state::State;
use super::theme::Role;
use super::update::update;

/// What a popup does when it is answered.
pub type Action = Box<dyn Fn(&mut State) -> Vec<Effect>>;

/// An open popup.
pub enum Popup {
    Help(Help),
    Palette(Palette),
    Prompt(Prompt),
    Confirm(Confirm),
    Choose(Choose),
    Pager(Pager),
    Runs(Runs),
    Tour(Tour),
}

/// What a key did to a popup.
pub enum Reply {
    Stay,
    Close,
    /// Close, and let the key mean what it means without the popup.
    Pass,
    /// Close, then do this.
    Act(Action),
}

/// Gives a key to the front popup.
pub fn key(state: &mut State, event: KeyEvent) -> Vec<Effect> {
    keys::name(event).map_or_else(Vec::new, |name| press(state, &name))
}

/// Gives a key, by its name, to the front popup.
pub fn press(state: &mut State, name: &str) -> Vec<Effect> {
    let Some(mut popup) = state.popups.pop() else { return Vec::new() };
    let reply = match &mut popup {
        Popup::Help(help) => help.key(name, state),
        Popup::Palette(palette) => palette.key(name),
        Popup::Prompt(prompt) => prompt.key(name, state),
        Popup::Confirm(confirm) => confirm.key(name),
        Popup::Choose(choose) => choose.key(name),
        Popup::Pager(pager) => pager.key(name),
        Popup::Runs(runs) => runs.key(name, state),
        Popup::Tour(_) => Tour::key(name),
    };
    match reply {
        Reply::Stay => {
            state.popups.push(popup);
            Vec::new()
        }
        Reply::Close => Vec::new(),
        Reply::Pass => keys::event(name).map_or_else(Vec::new, |event| update(state, Msg::Key(event))),
        Reply::Act(action) => action(state),
    }
}

/// Gives pasted text to the front popup.
pub fn paste(state: &mut State, text: &str) {
    for letter in text.chars().filter(|letter| !letter.is_control()) {
        key(state, KeyEvent::from(crossterm::event::KeyCode::Char(letter)));
    }
}

/// Draws the popups, the front one last.
pub fn draw(frame: &mut Frame, area: Rect, state: &State) {
    for popup in &state.popups {
        match popup {
            Popup::Help(help) => help.draw(frame, area, state),
            Popup::Palette(palette) => palette.draw(frame, area, state),
            Popup::Prompt(prompt) => prompt.draw(frame, area, state),
            Popup::Confirm(confirm) => confirm.draw(frame, area, state),
            Popup::Choose(choose) => choose.draw(frame, area, state),
            Popup::Pager(pager) => pager.draw(frame, area, state),
            Popup::Runs(runs) => runs.draw(frame, area, state),
            Popup::Tour(_) => Tour::draw(frame, area, state),
        }
    }
}

/// A box in the middle of `area` with `lines` in it; cut to what fits.
fn show(frame: &mut Frame, area: Rect, state: &State, title: &str, width: u16, lines: Vec<Line>) {
    let width = width.max(20).min(area.width);
    let height = (lines.len() as u16 + 2).min(area.height);
    let place = Rect { x: area.x + (area.width - width) / 2, y: area.y + (area.height - height) / 3, width, height };
    frame.render_widget(Clear, place);
    let block = Block::bordered()
        .border_type(BorderType::Rounded)
        .border_style(state.theme.style(Role::BorderFocus))
        .title_style(state.theme.style(Role::Title))
        .title(format!(" {title} "));
    frame.render_widget(Paragraph::new(lines).block(block), place);
}

/// The rows of a list around its cursor that fit into `height`: first and one past the last.
pub fn window(cursor: usize, count: usize, height: usize) -> std::ops::Range<usize> {
    let first = cursor.saturating_sub(height / 2).min(count.saturating_sub(height));
    first..(first + height).min(count)
}
