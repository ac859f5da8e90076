//! The session's variants: switch, new, duplicate, rename, delete.

use super::super::message::Effect;
use super::super::popups::{Choice, Choose, Confirm, Prompt};
use super::super::state::State;
use crate::quant::Recipe;

pub fn has_others(state: &State) -> Result<(), &'static str> {
    if state.document.drafts.len() > 1 {
        Ok(())
    } else {
        Err("there is only this variant: press {new-variant} in the Plan pane for a new one")
    }
}

fn switch(state: &mut State, by: usize) -> Vec<Effect> {
    let count = state.document.drafts.len();
    state.document.select((state.document.current() + by) % count);
    state.say(format!("variant {}", state.document.draft().name));
    Vec::new()
}

pub fn next(state: &mut State) -> Vec<Effect> {
    switch(state, 1)
}

pub fn previous(state: &mut State) -> Vec<Effect> {
    let count = state.document.drafts.len();
    switch(state, count - 1)
}

pub fn new(state: &mut State) -> Vec<Effect> {
    match Recipe::built_in() {
        Ok(recipes) => {
            let items = recipes.into_iter().map(|recipe| (recipe.name, recipe.description)).collect();
            state.popups.push(Choose::popup("New variant from a recipe", items, 0, |state, index| {
                let added = Recipe::built_in().and_then(|recipes| match recipes.get(index) {
                    Some(recipe) => state.document.add(&recipe.name),
                    None => Ok(()),
                });
                report(state, added, "new variant");
                Vec::new()
            }));
        }
        Err(error) => state.complain(&error),
    }
    Vec::new()
}

pub fn duplicate(state: &mut State) -> Vec<Effect> {
    state.document.duplicate();
    report(state, Ok(()), "new variant");
    Vec::new()
}

pub fn rename(state: &mut State) -> Vec<Effect> {
    let name = state.document.draft().name.clone();
    let prompt = Prompt::new(format!("Rename {name}"), &name, |state, name| {
        let renamed = state.document.rename(name);
        report(state, renamed, "renamed:");
        Vec::new()
    });
    state.popups.push(prompt.popup());
    Vec::new()
}

pub fn delete(state: &mut State) -> Vec<Effect> {
    let name = state.document.draft().name.clone();
    let choices = vec![Choice::new('y', "delete", |state| {
        let name = state.document.draft().name.clone();
        match state.document.remove() {
            Ok(()) => state.say(format!("{name} deleted; {{undo}} brings it back")),
            Err(error) => state.complain(&error),
        }
        Vec::new()
    })];
    state.popups.push(Confirm::popup(
        format!("Delete variant {name}?"),
        vec!["It leaves the session. What was quantized stays on disk.".into()],
        choices,
    ));
    Vec::new()
}

fn report(state: &mut State, outcome: crate::error::Result<()>, what: &str) {
    match outcome {
        Ok(()) => state.say(format!("{what} {}", state.document.draft().name)),
        Err(error) => state.complain(&error),
    }
}
