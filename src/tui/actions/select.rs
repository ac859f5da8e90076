//! Selecting blocks and filtering the list.

use super::super::filter::Filter;
use super::super::message::Effect;
use super::super::popups::Prompt;
use super::super::state::State;
use super::super::tree::Column;

pub fn toggle(state: &mut State) -> Vec<Effect> {
    toggle_here(state);
    super::navigate::down(state)
}

/// Selects the block under the cursor, or lets it go.
pub fn toggle_here(state: &mut State) -> Vec<Effect> {
    let cursor = state.layers.cursor;
    state.layers.anchor = None;
    if !state.layers.selected.remove(&cursor) {
        state.layers.selected.insert(cursor);
    }
    Vec::new()
}

pub fn range(state: &mut State) -> Vec<Effect> {
    let cursor = state.layers.cursor;
    if state.layers.anchor.take().is_none() {
        state.layers.anchor = Some(cursor);
        state.layers.selected.insert(cursor);
        state.say("range: move, then {format-w4a8}, {format-w8a8} or {format-w16a16}; {select-range} ends it");
    }
    Vec::new()
}

/// Selects what lies between the start of the range and the cursor, among the listed blocks.
pub fn extend(state: &mut State) {
    let Some(anchor) = state.layers.anchor else { return };
    let cursor = state.layers.cursor;
    let range = anchor.min(cursor)..=anchor.max(cursor);
    state.layers.selected = state.visible_blocks().into_iter().filter(|index| range.contains(index)).collect();
}

pub fn kind(state: &mut State) -> Vec<Effect> {
    let Some(kind) = state.document.kinds.get(state.layers.cursor).copied() else { return Vec::new() };
    state.layers.anchor = None;
    state.layers.selected = state.visible_blocks().into_iter().filter(|index| state.document.kinds[*index] == kind).collect();
    state.say(format!("{} {kind} blocks selected", state.layers.selected.len()));
    Vec::new()
}

pub fn all(state: &mut State) -> Vec<Effect> {
    state.layers.anchor = None;
    state.layers.selected = state.visible_blocks().into_iter().collect();
    Vec::new()
}

pub fn clear(state: &mut State) -> Vec<Effect> {
    state.layers.anchor = None;
    if state.layers.selected.is_empty() {
        state.layers.filter.text.clear();
    }
    state.layers.selected.clear();
    Vec::new()
}

/// Adds the blocks that meet a filter to the selection.
pub fn pattern(state: &mut State) -> Vec<Effect> {
    let prompt = Prompt::new("Select blocks by kind, format, number or name", "", |state, text| {
        if !text.trim().is_empty() {
            let met = Filter { text: text.to_owned() }.visible(&state.document.layout, &state.document.draft().plan);
            state.say(format!("{} blocks selected", met.len()));
            state.layers.anchor = None;
            state.layers.selected.extend(met);
        }
        Vec::new()
    });
    state.popups.push(prompt.popup());
    Vec::new()
}

/// Sorts the list by the next column, and after the last one as in the model.
pub fn sort(state: &mut State) -> Vec<Effect> {
    let at = state.layers.sort.and_then(|sort| Column::ALL.iter().position(|column| *column == sort));
    state.layers.sort = Column::ALL.get(at.map_or(1, |at| at + 1)).copied();
    state.say(match state.layers.sort {
        Some(column) => format!("sorted by {}; O turns the order around", column.title()),
        None => "in the order of the model".into(),
    });
    Vec::new()
}

pub fn reverse(state: &mut State) -> Vec<Effect> {
    state.layers.descending = !state.layers.descending;
    state.layers.sort = state.layers.sort.or(Some(Column::Number));
    Vec::new()
}

/// Lists blocks of a kind together, or as in the model.
pub fn group(state: &mut State) -> Vec<Effect> {
    state.layers.grouped = !state.layers.grouped;
    Vec::new()
}

pub fn filter(state: &mut State) -> Vec<Effect> {
    let text = state.layers.filter.text.clone();
    let prompt = Prompt::new("Find blocks by kind, format, number or module", &text, |state, text| {
        apply_filter(state, text);
        Vec::new()
    });
    state.popups.push(prompt.live(apply_filter).popup());
    Vec::new()
}

fn apply_filter(state: &mut State, text: &str) {
    text.clone_into(&mut state.layers.filter.text);
    let visible = state.visible_blocks();
    if !visible.contains(&state.layers.cursor)
        && let Some(first) = visible.first()
    {
        (state.layers.cursor, state.layers.inside) = (*first, None);
    }
}
