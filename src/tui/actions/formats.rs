//! Formats of blocks, embedding and head; undo and redo.

use super::super::message::Effect;
use super::super::popups::Choose;
use super::super::state::State;
use crate::format::{Format, Selector};
use crate::session::report;

pub fn w4a8(state: &mut State) -> Vec<Effect> {
    set_blocks(state, Format::W4A8)
}

pub fn w8a8(state: &mut State) -> Vec<Effect> {
    set_blocks(state, Format::W8A8)
}

pub fn w16a16(state: &mut State) -> Vec<Effect> {
    set_blocks(state, Format::W16A16)
}

pub fn w8a16(state: &mut State) -> Vec<Effect> {
    set_blocks(state, Format::W8A16)
}

pub fn w4a16(state: &mut State) -> Vec<Effect> {
    set_blocks(state, Format::W4A16)
}

fn set_blocks(state: &mut State, format: Format) -> Vec<Effect> {
    let what = match state.layers.selected.len() {
        0 | 1 => format!("block {}", state.layers.selected.first().unwrap_or(&state.layers.cursor)),
        count => format!("{count} blocks"),
    };
    let targets = state.targets();
    set(state, &targets, format, &what);
    Vec::new()
}

/// Sets formats and says what that does to the size.
fn set(state: &mut State, targets: &[Selector], format: Format, what: &str) {
    let before = state.document.layout.total_bytes(&state.document.draft().plan);
    match state.document.set_format(targets, format, format!("{what} to {format}")) {
        Ok(true) => {
            let after = state.document.layout.total_bytes(&state.document.draft().plan);
            let (sign, difference) = if after < before { ("−", before - after) } else { ("+", after - before) };
            state.say(format!("{what}: {format}, {sign}{}", report::bytes(difference)));
        }
        Ok(false) => state.say(format!("{what}: {format} already")),
        Err(error) => state.complain(&error),
    }
}

fn choose(state: &mut State, title: &str, formats: &[Format], current: Format, pick: fn(&mut State, usize) -> Vec<Effect>) -> Vec<Effect> {
    let items = formats.iter().map(|format| (format.to_string(), String::new())).collect();
    let selected = formats.iter().position(|format| *format == current).unwrap_or(0);
    state.popups.push(Choose::popup(title, items, selected, pick));
    Vec::new()
}

/// An embedding reads token ids: there are no activations to quantize.
const EMBEDDING_FORMATS: [Format; 3] = [Format::W16A16, Format::W8A16, Format::W4A16];

pub fn embedding(state: &mut State) -> Vec<Effect> {
    let current = state.document.draft().plan.embedding;
    choose(state, "Format of the embedding", &EMBEDDING_FORMATS, current, |state, index| {
        set(state, &[Selector::Embedding], EMBEDDING_FORMATS[index], "embedding");
        Vec::new()
    })
}

pub fn head(state: &mut State) -> Vec<Effect> {
    let current = state.document.draft().plan.head;
    choose(state, "Format of the head", &Format::ALL, current, |state, index| {
        set(state, &[Selector::Head], Format::ALL[index], "head");
        Vec::new()
    })
}

pub fn suggested(state: &mut State) -> Vec<Effect> {
    let plan = state.inventory.suggested_plan.clone();
    set_plan(state, plan, "suggested formats");
    Vec::new()
}

pub fn reset(state: &mut State) -> Vec<Effect> {
    match state.document.recipe_plan() {
        Ok(plan) => set_plan(state, plan, "back to the recipe"),
        Err(error) => state.complain(&error),
    }
    Vec::new()
}

fn set_plan(state: &mut State, plan: crate::format::Plan, label: &str) {
    match state.document.set_plan(plan, label) {
        Ok(true) => state.say(format!("{}: {label}", state.document.draft().name)),
        Ok(false) => state.say(format!("{}: {label}, which it has already", state.document.draft().name)),
        Err(error) => state.complain(&error),
    }
}

pub fn can_undo(state: &State) -> Result<(), &'static str> {
    if state.document.history().1 > 0 { Ok(()) } else { Err("there is nothing to undo") }
}

pub fn can_redo(state: &State) -> Result<(), &'static str> {
    if state.document.history().3 > 0 { Ok(()) } else { Err("there is nothing to redo") }
}

pub fn undo(state: &mut State) -> Vec<Effect> {
    if let Some(label) = state.document.undo() {
        state.say(format!("undone: {label}"));
    }
    Vec::new()
}

pub fn redo(state: &mut State) -> Vec<Effect> {
    if let Some(label) = state.document.redo() {
        state.say(format!("done again: {label}"));
    }
    Vec::new()
}
