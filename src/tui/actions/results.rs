//! The table of results: order, columns, differences.

use super::super::message::Effect;
use super::super::panes::results::COLUMNS;
use super::super::state::State;

pub fn sort(state: &mut State) -> Vec<Effect> {
    let at = state.results.sort.as_ref().and_then(|sort| COLUMNS.iter().position(|column| column.title == sort));
    state.results.sort = COLUMNS.get(at.map_or(0, |at| at + 1)).map(|column| column.title.to_owned());
    state.say(match &state.results.sort {
        Some(column) => format!("sorted by {column}"),
        None => "in the order of the session".into(),
    });
    Vec::new()
}

pub fn reverse(state: &mut State) -> Vec<Effect> {
    state.results.descending = !state.results.descending;
    Vec::new()
}

pub fn differences(state: &mut State) -> Vec<Effect> {
    state.results.hide_differences = !state.results.hide_differences;
    Vec::new()
}

pub fn columns_right(state: &mut State) -> Vec<Effect> {
    state.results.first_column = (state.results.first_column + 1).min(COLUMNS.len() - 1);
    Vec::new()
}

pub fn columns_left(state: &mut State) -> Vec<Effect> {
    state.results.first_column = state.results.first_column.saturating_sub(1);
    Vec::new()
}

pub fn edit(state: &mut State) -> Vec<Effect> {
    let order = super::super::panes::results::order(state);
    if let Some(index) = state.results.cursor.checked_sub(1).and_then(|row| order.get(row)) {
        state.document.select(*index);
        state.focus = super::super::state::Pane::Plan;
    }
    Vec::new()
}
