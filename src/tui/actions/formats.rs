//! Formats of blocks, embedding and head; undo and redo.

use super::super::message::Effect;
use super::super::popups::Choose;
use super::super::state::{Pane, State};
use super::super::tree;
use crate::checkpoint::LinearSpec;
use crate::format::{Format, Plan, Selector};
use crate::quant::{Formats, Recipe};
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

pub fn w3a16(state: &mut State) -> Vec<Effect> {
    set_blocks(state, Format::W3A16)
}

pub fn w3a8(state: &mut State) -> Vec<Effect> {
    set_blocks(state, Format::W3A8)
}

pub fn w2a16(state: &mut State) -> Vec<Effect> {
    set_blocks(state, Format::W2A16)
}

pub fn w2a8(state: &mut State) -> Vec<Effect> {
    set_blocks(state, Format::W2A8)
}

/// The formats that one steps through; those below 4 bits are in the palette.
const STEPS: [Format; 5] = [Format::W16A16, Format::W8A16, Format::W8A8, Format::W4A16, Format::W4A8];

/// Gives the blocks the format after that of the block under the cursor.
pub fn narrower(state: &mut State) -> Vec<Effect> {
    cycle(state, 1)
}

pub fn wider(state: &mut State) -> Vec<Effect> {
    cycle(state, STEPS.len() - 1)
}

fn cycle(state: &mut State, by: usize) -> Vec<Effect> {
    let current = state.plan().blocks[state.layers.cursor];
    let at = STEPS.iter().position(|format| *format == current).unwrap_or(STEPS.len() - 1);
    set_blocks(state, STEPS[(at + by) % STEPS.len()])
}

/// Copies the formats of the selection, or that of the block under the cursor.
pub fn copy(state: &mut State) -> Vec<Effect> {
    let blocks = state.plan().blocks.clone();
    state.plan.clipboard = if state.layers.selected.is_empty() {
        vec![blocks[state.layers.cursor]]
    } else {
        state.layers.selected.iter().map(|index| blocks[*index]).collect()
    };
    state.say(match state.plan.clipboard.as_slice() {
        [format] => format!("{format} copied; {{paste-format}} gives it to other blocks"),
        formats => format!("{} formats copied; {{paste-format}} gives them to the blocks from the cursor on", formats.len()),
    });
    Vec::new()
}

pub fn can_paste(state: &State) -> Result<(), &'static str> {
    if state.plan.clipboard.is_empty() { Err("nothing is copied: {copy-format} copies the format of a block") } else { Ok(()) }
}

/// Gives one copied format to the selection or the block under the cursor, several to the blocks from the cursor on.
pub fn paste(state: &mut State) -> Vec<Effect> {
    if let [format] = state.plan.clipboard[..] {
        return set_blocks(state, format);
    }
    let mut plan = state.document.draft().plan.clone();
    let targets = plan.blocks.iter_mut().skip(state.layers.cursor);
    for (block, format) in targets.zip(&state.plan.clipboard) {
        *block = *format;
    }
    let last = (state.layers.cursor + state.plan.clipboard.len()).min(plan.blocks.len()) - 1;
    set_plan(state, plan, &format!("formats pasted to blocks {}-{last}", state.layers.cursor));
    Vec::new()
}

fn set_blocks(state: &mut State, format: Format) -> Vec<Effect> {
    let what = match state.layers.selected.len() {
        0 | 1 => format!("block {}", state.layers.selected.first().unwrap_or(&state.layers.cursor)),
        count => format!("{count} blocks"),
    };
    if state.layers.selected.is_empty() && state.focus == Pane::Layers && state.layers.inside.is_some() {
        set_linears(state, format);
        return Vec::new();
    }
    let targets = state.targets();
    set(state, &targets, format, &what);
    Vec::new()
}

/// Gives a format to the module or slice under the cursor.
fn set_linears(state: &mut State, format: Format) {
    let Some((module, slice)) = state.layers.inside else { return };
    let block = state.layers.cursor;
    let modules = tree::modules(&state.document.layout.blocks[block]);
    let Some(module) = modules.get(module) else { return };
    let name = |linear: &&LinearSpec| match slice.and_then(|slice| linear.slices.get(slice)) {
        Some(slice) => format!("{}.{}", linear.stem, slice.name),
        None => linear.stem.clone(),
    };
    let names: Vec<String> = module.linears.iter().map(name).collect();
    let what = match slice.and_then(|slice| module.linears[0].slices.get(slice)) {
        Some(slice) => format!("block {block} {}.{}", module.name, slice.name),
        None => format!("block {block} {}", module.name),
    };
    match state.document.set_linears(block, &names, format, format!("{what} to {format}")) {
        Ok(true) => state.say(format!("{what}: {format}")),
        Ok(false) => state.say(format!("{what}: {format} already")),
        Err(error) => state.complain(&error),
    }
}

/// Sets formats and says what that does to the size.
fn set(state: &mut State, targets: &[Selector], format: Format, what: &str) {
    let before = (state.document.footprint.total_bytes(&state.document.draft().plan), loss(state));
    match state.document.set_format(targets, format, format!("{what} to {format}")) {
        Ok(true) if state.document.draft().is_allocated() => state.say(format!("{what}: pinned to {format}; the others are found anew")),
        Ok(true) => {
            let after = (state.document.footprint.total_bytes(&state.document.draft().plan), loss(state));
            let (sign, bytes) = if after.0 < before.0 { ("−", before.0 - after.0) } else { ("+", after.0 - before.0) };
            let nats = before.1.zip(after.1).map_or_else(String::new, |(before, after)| {
                let sign = if after < before { "−" } else { "+" };
                format!(", KLD ~{sign}{:.1e}", (after - before).abs())
            });
            state.say(format!("{what}: {format}, {sign}{}{nats}", report::bytes(bytes)));
        }
        Ok(false) => state.say(format!("{what}: {format} already")),
        Err(error) => state.complain(&error),
    }
}

/// Nats a token that the variant is predicted to lose.
fn loss(state: &State) -> Option<f64> {
    let draft = state.document.draft();
    state.losses.predict(&state.document.layout, draft, &draft.plan).map(|predicted| predicted.kld)
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
    match state.document.reset("back to the recipe") {
        Ok(true) => state.say(format!("{}: back to the recipe", state.document.draft().name)),
        Ok(false) => state.say(format!("{} is as its recipe says", state.document.draft().name)),
        Err(error) => state.complain(&error),
    }
    Vec::new()
}

/// Ready-made formats: the three phases, what the inventory suggests, and every recipe's.
pub fn preset(state: &mut State) -> Vec<Effect> {
    let recipes = match Recipe::built_in() {
        Ok(recipes) => recipes,
        Err(error) => {
            state.complain(&error);
            return Vec::new();
        }
    };
    let mut presets: Vec<(String, String, Plan)> = Vec::new();
    // The formats of a recipe that leaves them to measurement are a budget, not a plan.
    for recipe in recipes.into_iter().filter(|recipe| recipe.allocate.is_none()) {
        match recipe.plan(&state.document.layout, &[]) {
            Ok(plan) => presets.push((recipe.name, formats_of(&recipe.formats), plan)),
            Err(error) => state.complain(&error),
        }
    }
    let suggested = state.inventory.suggested_plan.clone();
    presets.push(("suggested".into(), "SSM w4a8, but w8a8 in front of attention; the rest w8a8".into(), suggested));
    presets.push(("unquantized".into(), "everything as in the checkpoint".into(), Plan::unquantized(state.document.kinds.len())));
    let items = presets.iter().map(|(name, what, _)| (name.clone(), what.clone())).collect();
    state.popups.push(Choose::popup("Formats of a preset (the recipe's method stays)", items, 0, move |state, index| {
        let (name, _, plan) = &presets[index];
        set_plan(state, plan.clone(), &format!("formats of {name}"));
        Vec::new()
    }));
    Vec::new()
}

fn formats_of(formats: &Formats) -> String {
    let Formats { ssm, mlp, attention, moe, .. } = formats;
    if [mlp, attention, moe].iter().all(|format| *format == ssm) {
        return format!("{ssm} everywhere");
    }
    format!("SSM {ssm}, MLP {mlp}, attention {attention}, experts {moe}")
}

fn set_plan(state: &mut State, plan: Plan, label: &str) {
    match state.document.set_plan(plan, label) {
        Ok(true) => state.say(format!("{}: {label}", state.document.draft().name)),
        Ok(false) => state.say(format!("{}: {label}, which it has already", state.document.draft().name)),
        Err(error) => state.complain(&error),
    }
}

pub fn can_undo(state: &State) -> Result<(), &'static str> {
    if state.document.history().0.is_empty() { Err("there is nothing to undo") } else { Ok(()) }
}

pub fn can_redo(state: &State) -> Result<(), &'static str> {
    if state.document.history().1.is_empty() { Err("there is nothing to redo") } else { Ok(()) }
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

/// Every edit, to go back or forward to.
pub fn history(state: &mut State) -> Vec<Effect> {
    let (done, undone) = state.document.history();
    let present = done.len();
    let edits = done.iter().chain(&undone).enumerate();
    let note = |index: usize| if index < present { String::new() } else { "undone".to_owned() };
    let items: Vec<(String, String)> = std::iter::once(("as opened".to_owned(), String::new()))
        .chain(edits.map(|(index, label)| ((*label).to_owned(), note(index))))
        .collect();
    state.popups.push(Choose::popup("History: go to the state after", items, present, |state, target| {
        while state.document.history().0.len() > target && state.document.undo().is_some() {}
        while state.document.history().0.len() < target && state.document.redo().is_some() {}
        Vec::new()
    }));
    Vec::new()
}
