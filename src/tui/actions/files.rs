//! The session's file, and leaving.

use std::path::PathBuf;

use super::super::changes;
use super::super::message::Effect;
use super::super::popups::{Choice, Choose, Confirm, Pager, Prompt};
use super::super::state::State;
use super::super::theme::Role;
use crate::session::recovery::Lost;

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
    if state.queue.is_busy() { Err("a job runs on this session: cancel it first ({cancel})") } else { Ok(()) }
}

/// Goes on with `then` once the changes of the session that is open are saved or given up.
fn after_changes(state: &mut State, then: fn(&mut State) -> Vec<Effect>) -> Vec<Effect> {
    if state.document.unsaved() {
        let choices = vec![Choice::new('s', "save first", save), Choice::new('d', "discard them", then)];
        state.popups.push(Confirm::popup("Open another session?".into(), vec!["Changes of this one are not saved.".into()], choices));
        return Vec::new();
    }
    then(state)
}

pub fn open(state: &mut State) -> Vec<Effect> {
    after_changes(state, ask_what_to_open)
}

fn ask_what_to_open(state: &mut State) -> Vec<Effect> {
    let prompt = Prompt::new("Open the session file", "", |state, path| {
        if path.trim().is_empty() {
            return Vec::new();
        }
        open_file(state, PathBuf::from(path.trim()))
    });
    state.popups.push(prompt.popup());
    Vec::new()
}

fn open_file(state: &mut State, path: PathBuf) -> Vec<Effect> {
    state.say(format!("opening {}", path.display()));
    vec![Effect::Open(path)]
}

pub fn recent(state: &mut State) -> Vec<Effect> {
    after_changes(state, |_| vec![Effect::AskWhatIsRecent])
}

/// Offers the session files that were opened or saved last.
pub fn choose_recent(state: &mut State, files: Vec<PathBuf>) {
    if files.is_empty() {
        state.say("no session file was opened or saved yet; {open} opens one by its path");
        return;
    }
    let name = |path: &PathBuf| path.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
    let folder = |path: &PathBuf| path.parent().map_or_else(String::new, |folder| folder.display().to_string());
    let items = files.iter().map(|path| (name(path), folder(path))).collect();
    state.popups.push(Choose::popup("Open a recent session", items, 0, move |state, index| open_file(state, files[index].clone())));
}

pub fn changes(state: &mut State) -> Vec<Effect> {
    let lines = match changes::since_saved(&state.document) {
        Ok(lines) => lines,
        Err(error) => {
            state.complain(&error);
            return Vec::new();
        }
    };
    let title = state
        .path
        .as_ref()
        .map_or_else(|| "Changes since the start".to_owned(), |path| format!("Changes since {} was saved", path.display()));
    let lines = if lines.is_empty() { vec![(Role::Dim, "none".to_owned())] } else { lines };
    state.popups.push(Pager::popup(title, lines, false));
    Vec::new()
}

/// Offers a session that a workbench had not saved when it was killed.
pub fn offer_lost(state: &mut State, lost: Lost) {
    let path = lost.path.as_ref().map_or_else(|| "a session that had no file yet".to_owned(), |path| path.display().to_string());
    let lines =
        vec![format!("A workbench ended before it could save its changes to {path}."), "They are kept until you decide.".to_owned()];
    let again = lost.clone();
    let choices = vec![
        Choice::new('r', "restore them", move |_| vec![Effect::Restore(Box::new(lost.clone()))]),
        Choice::new('d', "discard them", move |_| vec![Effect::Discard(Box::new(again.clone()))]),
    ];
    state.popups.push(Confirm::popup("Changes that were not saved".into(), lines, choices));
}

pub fn quit(state: &mut State) -> Vec<Effect> {
    let (unsaved, running) = (state.document.unsaved() && !state.read_only, state.queue.is_busy());
    let mut lines = Vec::new();
    if running {
        let title = state.queue.running().map_or_else(|| "A run that waits".to_owned(), |step| step.title.clone());
        lines.push(format!("{title} is not finished. Finished blocks and rows are kept in any case."));
        lines.push(
            "Left running, it goes on without a screen from its last finished block; strata shows it when it is opened again.".into(),
        );
    }
    if unsaved {
        let kept = if running { " Left running, they are offered at the next start." } else { "" };
        lines.push(format!("The session has changes that are not saved.{kept}"));
    }
    if lines.is_empty() {
        return vec![Effect::Quit];
    }
    let mut choices = Vec::new();
    if state.queue.runs.iter().any(|run| !run.is_over() && run.can_be_handed_over()) {
        choices.push(Choice::new('l', "leave it running", leave_running));
    }
    if unsaved && state.path.is_some() && !running {
        choices.push(Choice::new('s', "save and quit", |state| {
            let mut effects = save(state);
            effects.push(Effect::Quit);
            effects
        }));
    } else if unsaved {
        choices.push(Choice::new('s', "save", save));
    }
    let label = match (running, unsaved) {
        (true, _) => "cancel it and quit",
        (false, true) => "quit without saving",
        (false, false) => "quit",
    };
    choices.push(Choice::new('y', label, cancel_and_quit));
    state.popups.push(Confirm::popup("Quit?".into(), lines, choices));
    Vec::new()
}

fn cancel_and_quit(state: &mut State) -> Vec<Effect> {
    let keys: Vec<u64> = state.queue.runs.iter().map(|run| run.key).collect();
    let mut effects: Vec<Effect> = keys.into_iter().filter_map(|key| state.queue.cancel(key)).map(Effect::Cancel).collect();
    effects.extend(state.queue.abandon());
    effects.push(Effect::Quit);
    effects
}

/// Stops the job at hand; when it has stopped, another process goes on and this one ends.
fn leave_running(state: &mut State) -> Vec<Effect> {
    state.queue.held = true;
    match state.queue.running().map(|step| step.status.clone()) {
        Some(super::super::queue::Status::Running(Some(id))) => {
            state.leaving = Some(state.clock);
            state.say("stopping at the last finished block, to go on without a screen");
            vec![Effect::Cancel(id)]
        }
        _ => vec![Effect::HandOver],
    }
}
