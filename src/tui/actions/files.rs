//! The session's file, and leaving.

use std::path::PathBuf;

use super::super::message::Effect;
use super::super::popups::{Choice, Confirm, Prompt};
use super::super::state::State;

/// Where a session without a file is saved unless the user says otherwise.
const DEFAULT_PATH: &str = "session.toml";

fn save_to(state: &mut State, path: PathBuf, overwrite: bool) -> Vec<Effect> {
    state.document.set_ui(state.ui());
    vec![Effect::Save { path, session: Box::new(state.document.session()), overwrite }]
}

pub fn save(state: &mut State) -> Vec<Effect> {
    match state.path.clone() {
        Some(path) => save_to(state, path, true),
        None => save_as(state),
    }
}

pub fn save_as(state: &mut State) -> Vec<Effect> {
    let path = state.path.as_ref().map_or_else(|| DEFAULT_PATH.to_owned(), |path| path.display().to_string());
    let prompt = Prompt::new("Save the session to", &path, |state, path| {
        if path.trim().is_empty() {
            state.say("not saved: no path was given");
            return Vec::new();
        }
        let path = PathBuf::from(path.trim());
        let own = state.path.as_ref() == Some(&path);
        save_to(state, path, own)
    });
    state.popups.push(prompt.popup());
    Vec::new()
}

/// Asks before `path`, which is another file, is replaced.
pub fn ask_to_overwrite(state: &mut State, path: PathBuf) {
    let title = format!("Replace {}?", path.display());
    let lines = vec!["A file of this name is there already. Its comments stay where they still fit.".to_owned()];
    let replace = move |state: &mut State| save_to(state, path.clone(), true);
    state.popups.push(Confirm::popup(title, lines, vec![Choice::new('y', "replace it", replace)]));
}

pub fn can_open(state: &State) -> Result<(), &'static str> {
    if state.queue.running().is_some() { Err("a job runs on this session: cancel it first (x)") } else { Ok(()) }
}

pub fn open(state: &mut State) -> Vec<Effect> {
    if state.document.unsaved() {
        let choices = vec![Choice::new('s', "save first", save), Choice::new('d', "discard them", ask_what_to_open)];
        state.popups.push(Confirm::popup("Open another session?".into(), vec!["Changes of this one are not saved.".into()], choices));
        return Vec::new();
    }
    ask_what_to_open(state)
}

fn ask_what_to_open(state: &mut State) -> Vec<Effect> {
    let prompt = Prompt::new("Open the session file", "", |state, path| {
        if path.trim().is_empty() {
            return Vec::new();
        }
        state.say(format!("opening {}", path.trim()));
        vec![Effect::Open(PathBuf::from(path.trim()))]
    });
    state.popups.push(prompt.popup());
    Vec::new()
}

pub fn quit(state: &mut State) -> Vec<Effect> {
    let (unsaved, running) = (state.document.unsaved(), state.queue.running());
    let mut lines = Vec::new();
    if let Some(running) = running {
        lines.push(format!("{} is running; leaving cancels it. Finished blocks are kept.", running.title));
    }
    if unsaved {
        lines.push("The session has changes that are not saved.".into());
    }
    if lines.is_empty() {
        return vec![Effect::Quit];
    }
    let mut choices = Vec::new();
    if unsaved && state.path.is_some() {
        choices.push(Choice::new('s', "save and quit", |state| {
            let mut effects = save(state);
            effects.push(Effect::Quit);
            effects
        }));
    } else if unsaved {
        choices.push(Choice::new('s', "save", save));
    }
    choices.push(Choice::new('y', if unsaved { "quit without saving" } else { "quit" }, |_| vec![Effect::Quit]));
    state.popups.push(Confirm::popup("Quit?".into(), lines, choices));
    Vec::new()
}
