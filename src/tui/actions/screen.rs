//! Panes, zoom, theme, help.

use super::super::message::Effect;
use super::super::panes;
use super::super::popups::{Choose, Help, Pager, Palette, Popup, Tour};
use super::super::queue::{Level, LogLine};
use super::super::state::{Pane, State};
use super::super::theme::{self, Role, Theme};
use super::super::view::duration;

fn focus(state: &mut State, pane: Pane) -> Vec<Effect> {
    state.focus = pane;
    Vec::new()
}

pub fn layers(state: &mut State) -> Vec<Effect> {
    focus(state, Pane::Layers)
}

pub fn plan(state: &mut State) -> Vec<Effect> {
    focus(state, Pane::Plan)
}

pub fn run(state: &mut State) -> Vec<Effect> {
    focus(state, Pane::Run)
}

pub fn block(state: &mut State) -> Vec<Effect> {
    focus(state, Pane::Block)
}

pub fn look(state: &mut State) -> Vec<Effect> {
    focus(state, Pane::Block)
}

pub fn results(state: &mut State) -> Vec<Effect> {
    focus(state, Pane::Results)
}

/// Takes clicks and the wheel, or leaves them to the terminal, to select text with.
pub fn mouse(state: &mut State) -> Vec<Effect> {
    state.mouse = !state.mouse;
    state.say(if state.mouse { "the mouse clicks and scrolls here" } else { "the mouse is the terminal's: select text with it" });
    vec![Effect::Mouse(state.mouse)]
}

/// Puts what the pane is about into the clipboard.
pub fn copy(state: &mut State) -> Vec<Effect> {
    match panes::copied(state) {
        Ok(text) => vec![Effect::Copy(text)],
        Err(error) => {
            state.complain(&error);
            Vec::new()
        }
    }
}

pub fn tour(state: &mut State) -> Vec<Effect> {
    state.popups.push(Popup::Tour(Tour));
    Vec::new()
}

pub fn next_pane(state: &mut State) -> Vec<Effect> {
    let next = (state.focus as usize + 1) % Pane::ALL.len();
    focus(state, Pane::ALL[next])
}

pub fn previous_pane(state: &mut State) -> Vec<Effect> {
    let previous = (state.focus as usize + Pane::ALL.len() - 1) % Pane::ALL.len();
    focus(state, Pane::ALL[previous])
}

pub fn zoom(state: &mut State) -> Vec<Effect> {
    state.zoom = !state.zoom;
    Vec::new()
}

pub fn redraw(_: &mut State) -> Vec<Effect> {
    vec![Effect::Redraw]
}

pub fn suspend(_: &mut State) -> Vec<Effect> {
    vec![Effect::Suspend]
}

pub fn palette(state: &mut State) -> Vec<Effect> {
    state.popups.push(Popup::Palette(Palette::default()));
    Vec::new()
}

pub fn messages(state: &mut State) -> Vec<Effect> {
    let line = |line: &LogLine| {
        let role = match line.level {
            Level::Info => Role::Text,
            Level::Warning => Role::Warning,
            Level::Error => Role::Bad,
        };
        (role, format!("{:>8}  {}", duration(line.clock), line.text))
    };
    let lines = state.messages.iter().map(line).collect();
    state.popups.push(Pager::popup("Messages, with the time since the start", lines, true));
    Vec::new()
}

pub fn help(state: &mut State) -> Vec<Effect> {
    state.popups.push(Popup::Help(Help::default()));
    Vec::new()
}

pub fn theme(state: &mut State) -> Vec<Effect> {
    let names = || theme::BUILT_IN.iter().map(|(name, _)| *name);
    let automatic = ("automatic".to_owned(), "by the terminal's background, at the next start".to_owned());
    let items = names().map(|name| (name.to_owned(), String::new())).chain([automatic]).collect();
    let selected = names().position(|name| name == state.theme.name).unwrap_or(0);
    state.popups.push(Choose::popup("Theme", items, selected, |state, index| {
        let name = theme::BUILT_IN.get(index).map(|(name, _)| *name);
        state.chosen_theme = name.map(str::to_owned);
        match name.map(|name| Theme::find(Some(name), false)) {
            Some(Ok(theme)) => state.theme = theme,
            Some(Err(error)) => state.complain(&error),
            None => {}
        }
        Vec::new()
    }));
    Vec::new()
}
