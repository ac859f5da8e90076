//! [`update`]: the one place where the state changes.

use std::path::PathBuf;
use std::time::Duration;

use super::background::Answer;
use super::document::Document;
use super::known::Known;
use super::losses::Losses;
use super::message::{Effect, Msg, SaveOutcome};
use super::popups::Popup;
use super::queue::{Level, Status};
use super::state::{Inspection, Layers, Looks, ResultsView, State};
use super::theme::Theme;
use super::{actions, keys, measurements, mouse, popups, queue};
use crate::analysis::Inventory;
use crate::engine::Event;

/// Takes a message in; returns what is to be done outside.
pub fn update(state: &mut State, msg: Msg) -> Vec<Effect> {
    let mut effects = Vec::new();
    match msg {
        Msg::Key(event) => match state.background.keys(event, state.clock) {
            Answer::Keys(keys) => effects.extend(keys.into_iter().flat_map(|event| key(state, event))),
            // Who chose meanwhile is not asked again.
            Answer::Light(_) if state.chosen_theme.is_some() => {}
            Answer::Light(light) => match Theme::find(Some(if light { "light" } else { "dark" }), false) {
                Ok(theme) => state.theme = theme,
                Err(error) => state.complain(&error),
            },
            Answer::Nothing => {}
        },
        Msg::Mouse(event) => effects = mouse::handle(state, event),
        Msg::Paste(text) => popups::paste(state, &text),
        Msg::Resize(width, height) => state.size = (width, height),
        Msg::Tick { clock, resident_bytes } => {
            state.clock = clock;
            state.resident_bytes = resident_bytes;
            state.toasts.retain(|toast| toast.until > clock);
        }
        Msg::Second => effects = second(state),
        Msg::TerminalLost => {
            // Nobody can let a paused job go on any more.
            state.popups.clear();
            state.queue.paused = false;
            effects.push(Effect::Pause(false));
        }
        Msg::Engine(event) => effects = engine(state, event),
        Msg::Submitted(answer) => state.queue.submitted(answer, state.clock),
        Msg::RunOpened { key, id } => state.queue.named(key, id),
        Msg::CancelAsked(key) => {
            state.toast(Level::Warning, "another process asked to cancel the run");
            effects.extend(state.queue.cancel(key).map(Effect::Cancel));
        }
        Msg::Runs { list, log } => state.runs = (list, log),
        Msg::Gpus(readings) => state.gpus = readings,
        Msg::Recalled { model, known } => {
            if model == state.document.settings().model.name() {
                greet(state, &known);
                known.recall(&mut state.measurements);
            }
        }
        Msg::LossesRecalled { model, key, found } => {
            if model == state.document.settings().model.name() {
                state.losses.recalled(&key, found);
            }
        }
        Msg::Solved(solved) => {
            state.losses.solved(*solved);
            actions::allocate::go_on(state);
        }
        Msg::Recent(files) => actions::files::choose_recent(state, files),
        Msg::Trouble(error) => {
            let hint = error.hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
            state.toast(Level::Error, format!("{}{hint}", error.message));
        }
        Msg::HandOverFailed(error) => {
            state.leaving = None;
            state.queue.take_back();
            state.complain(&error);
        }
        Msg::Restored { lost, document } => match document {
            Ok(document) => {
                replace_document(state, *document, lost.path.clone(), &mut effects);
                effects.push(Effect::Discard(lost));
                state.say("restored what was not saved; {save} saves it");
            }
            Err(error) => state.complain(&error.context("not restored")),
        },
        Msg::Saved { path, session, outcome } => match outcome {
            SaveOutcome::Done => {
                state.document.mark_saved(&session);
                state.say(format!("saved {}", path.display()));
                state.path = Some(path);
            }
            SaveOutcome::Exists => actions::files::ask_to_overwrite(state, path),
            SaveOutcome::Failed(error) => state.complain(&error.context("not saved")),
        },
        Msg::Opened { path, document } => match document {
            Ok(document) => {
                let said = format!("opened {}", path.display());
                replace_document(state, *document, Some(path), &mut effects);
                state.say(said);
            }
            Err(error) => state.complain(&error),
        },
        Msg::Looked { model, block, look } => {
            if model == state.document.settings().model.name() {
                actions::looks::looked(state, block, look);
            }
        }
        Msg::Compared(compared) => {
            state.results.comparing = None;
            match compared {
                Ok(compared) => state.results.compared = Some(*compared),
                Err(error) => state.complain(&error.context("not compared")),
            }
        }
        Msg::Copied(Ok(place)) => state.say(format!("copied to {place}")),
        Msg::Copied(Err(error)) => state.complain(&error),
        Msg::Written { path, outcome } => match outcome {
            Ok(()) => state.say(format!("wrote {}", path.display())),
            Err(error) => state.complain(&error),
        },
        Msg::Inspected { model, inventory } => {
            if model == state.document.settings().model.name() {
                match inventory {
                    Ok(inventory) => {
                        state.inventory = inventory;
                        state.inspection = Inspection::Done;
                    }
                    Err(error) => {
                        state.complain(&error);
                        state.inspection = Inspection::Failed;
                    }
                }
            }
        }
    }
    state.follow();
    effects.extend(state.losses.wanted(&state.document));
    // A run has its folder before its first job begins.
    effects.extend(state.queue.bookkeeping());
    if let Some(job) = state.queue.next(&state.measurements, state.clock) {
        effects.push(Effect::Submit(Box::new(job)));
    }
    if state.queue.running().is_none() {
        // Nobody reads them any more.
        state.gpus.clear();
    }
    effects.extend(actions::looks::wanted(state));
    effects.extend(actions::results::to_compare(state));
    effects
}

fn key(state: &mut State, event: crossterm::event::KeyEvent) -> Vec<Effect> {
    if !state.popups.is_empty() {
        return popups::key(state, event);
    }
    let Some(name) = keys::name(event) else { return Vec::new() };
    state.message = None;
    if let Some(command) = state.keymap.command(&name, state.focus) {
        return command.invoke(state);
    }
    state.say(format!("{name} does nothing here; {{help}} lists the keys"));
    Vec::new()
}

/// How long leaving waits for the job at hand to stop. What it writes survives being killed at any moment.
const PATIENCE: Duration = Duration::from_secs(5);

/// What is looked at once a second.
fn second(state: &mut State) -> Vec<Effect> {
    let mut effects = Vec::new();
    if state.leaving.is_some_and(|since| state.clock.saturating_sub(since) >= PATIENCE) {
        state.leaving = None;
        effects.push(Effect::HandOver);
    }
    if let Some(Popup::Runs(runs)) = state.popups.iter().rfind(|popup| matches!(popup, Popup::Runs(_))) {
        effects.push(Effect::LookAtRuns { follow: runs.followed() });
    }
    if state.queue.running().is_some() {
        effects.push(Effect::LookAtGpus);
    }
    effects
}

fn engine(state: &mut State, event: Event) -> Vec<Effect> {
    match event {
        Event::Observed { inputs, .. } => {
            state.looks.inputs.insert(inputs.block, *inputs);
            return Vec::new();
        }
        Event::Sensitivities { sensitivities, .. } => {
            state.losses.measured(*sensitivities);
            return Vec::new();
        }
        Event::Spoken { step, .. } => {
            actions::playground::spoken(state, *step);
            return Vec::new();
        }
        _ => {}
    }
    let finished = matches!(event, Event::Finished { .. });
    let at = state.queue.running_run().map(|run| run.key);
    let title = state.queue.running().map(|step| step.title.clone()).unwrap_or_default();
    state.queue.take_in(event, &mut state.measurements, state.clock);
    if !finished {
        return Vec::new();
    }
    if state.leaving.take().is_some() {
        return vec![Effect::HandOver];
    }
    let run = state.queue.runs.iter().find(|run| Some(run.key) == at);
    let step = run.and_then(|run| run.steps.iter().rfind(|step| step.title == title));
    match step.map(|step| step.status.clone()) {
        Some(Status::Failed { message, hint }) => {
            let hint = hint.map(|hint| format!(" ({hint})")).unwrap_or_default();
            state.toast(Level::Error, format!("{title}: {message}{hint}"));
        }
        Some(Status::Cancelled) => state.toast(Level::Warning, format!("{title}: cancelled")),
        _ if run.is_some_and(queue::Run::is_over) => state.toast(Level::Info, format!("{title}: done")),
        _ => {}
    }
    Vec::new()
}

/// Says which runs of other processes there are to look at.
fn greet(state: &mut State, known: &Known) {
    let count = |count: usize| if count == 1 { "1 run".to_owned() } else { format!("{count} runs") };
    let own = state.queue.runs.iter().filter(|run| !run.is_over()).count();
    if known.going_on > own {
        state.toast(Level::Info, format!("{} without a screen; :runs shows it", count(known.going_on - own)));
    }
    if known.interrupted > 0 {
        state.toast(Level::Warning, format!("{} interrupted; :runs can go on with it", count(known.interrupted)));
    }
}

fn replace_document(state: &mut State, document: Document, path: Option<PathBuf>, effects: &mut Vec<Effect>) {
    let (old, new) = (state.document.settings(), document.settings());
    if (&old.model, &old.calibration, &old.evaluate) != (&new.model, &new.calibration, &new.evaluate) {
        state.measurements = measurements::Measurements::default();
    }
    if (&old.model, &old.calibration) != (&new.model, &new.calibration) {
        state.losses = Losses::default();
    }
    state.allocating = None;
    // How the list is shown stays, unless the session says otherwise.
    let Layers { sort, descending, grouped, strip, .. } = std::mem::take(&mut state.layers);
    state.layers = Layers { sort, descending, grouped, strip, ..Layers::default() };
    state.results = ResultsView::default();
    state.looks = Looks::default();
    state.document = document;
    *state.inventory = Inventory::of_layout(&state.document.settings().model.id, &state.document.layout);
    state.inspection = Inspection::Reading;
    state.path = path;
    state.apply_ui();
    effects.extend([Effect::Inspect, Effect::Recall]);
}
