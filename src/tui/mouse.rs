//! Clicks and the wheel: a click goes to the pane and takes the row under it, the wheel moves the cursor.

use crossterm::event::{MouseButton, MouseEvent, MouseEventKind};
use ratatui::layout::{Position, Rect};

use super::message::Effect;
use super::state::{Pane, ResultsTab, State};
use super::tree::Row;
use super::{actions, panes, popups, view};

/// Rows that a notch of the wheel moves.
const NOTCH: usize = 3;

/// Takes a mouse event in.
pub fn handle(state: &mut State, event: MouseEvent) -> Vec<Effect> {
    let step: fn(&mut State) -> Vec<Effect> = match event.kind {
        MouseEventKind::Down(MouseButton::Left) => return click(state, Position::new(event.column, event.row)),
        MouseEventKind::ScrollDown => actions::navigate::down,
        MouseEventKind::ScrollUp => actions::navigate::up,
        _ => return Vec::new(),
    };
    if !state.popups.is_empty() {
        let key = if event.kind == MouseEventKind::ScrollDown { "down" } else { "up" };
        return popups::press(state, key);
    }
    if let Some((pane, _)) = pane_at(state, Position::new(event.column, event.row)) {
        state.focus = pane;
        (0..NOTCH).for_each(|_| drop(step(state)));
    }
    Vec::new()
}

/// The pane at a position, and its inner area.
fn pane_at(state: &State, at: Position) -> Option<(Pane, Rect)> {
    let regions = view::regions(state.size, state.focus, state.zoom)?;
    let (pane, area) = regions.panes.into_iter().find(|(_, area)| area.contains(at))?;
    Some((pane, view::inner(area)))
}

fn click(state: &mut State, at: Position) -> Vec<Effect> {
    if !state.popups.is_empty() {
        return Vec::new();
    }
    if let Some(pane) = view::tab_at(state, at) {
        state.focus = pane;
        return Vec::new();
    }
    let Some((pane, area)) = pane_at(state, at) else { return Vec::new() };
    state.focus = pane;
    if !area.contains(at) {
        return Vec::new();
    }
    let (column, line) = (at.x - area.x, at.y - area.y);
    match pane {
        Pane::Layers => match panes::layers::at(state, area, column, line) {
            Some(Row::Block(block)) if state.layers.cursor == block && state.layers.inside.is_none() => {
                return actions::select::toggle_here(state);
            }
            Some(row) => actions::navigate::go_to(state, row),
            None => {}
        },
        Pane::Plan => {
            if let Some(index) = panes::plan::variant_at(state, area, line) {
                state.document.select(index);
            }
        }
        Pane::Results if state.results.tab == ResultsTab::Table => {
            if let Some(row) = panes::results::row_at(state, area, line) {
                state.results.cursor = row;
            }
        }
        Pane::Run | Pane::Block | Pane::Results | Pane::Playground => {}
    }
    Vec::new()
}
