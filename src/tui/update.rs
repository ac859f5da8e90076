//! [`update`]: the one place where the state changes.

use super::background::Answer;
use super::message::{Effect, Msg, SaveOutcome};
use super::queue::{Level, Status};
use super::state::{Inspection, Layers, Looks, ResultsView, State};
use super::theme::Theme;
use super::{actions, keys, measurements, mouse, popups};
use crate::analysis::Inventory;
use crate::engine::Event;
use crate::error::Error;

/// Takes a message in; returns what is to be done outside.
pub fn update(state: &mut State, msg: Msg) -> Vec<Effect> {
    let mut effects = Vec::new();
    match msg {
        Msg::Key(event) => match state.background.keys(event, state.clock) {
            Answer::Keys(keys) => effects.extend(keys.into_iter().flat_map(|event| key(state, event))),
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
        }
        Msg::Engine(event) => engine(state, event),
        Msg::Submitted(answer) => state.queue.submitted(answer),
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
                let (old, new) = (state.document.settings(), document.settings());
                if (&old.model, &old.calibration, &old.evaluate) != (&new.model, &new.calibration, &new.evaluate) {
                    state.measurements = measurements::Measurements::default();
                }
                state.layers = Layers::default();
                state.results = ResultsView::default();
                state.looks = Looks::default();
                state.document = *document;
                *state.inventory = Inventory::of_layout(&state.document.settings().model.id, &state.document.layout);
                state.inspection = Inspection::Reading;
                state.say(format!("opened {}", path.display()));
                state.path = Some(path);
                state.apply_ui();
                effects.push(Effect::Inspect);
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
    if let Some(job) = state.queue.next(state.document.settings(), &state.measurements, state.clock) {
        effects.push(Effect::Submit(Box::new(job)));
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
    state.say(format!("{name} does nothing here; ? lists the keys"));
    Vec::new()
}

fn engine(state: &mut State, event: Event) {
    match event {
        Event::Observed { inputs, .. } => {
            state.looks.inputs.insert(inputs.block, *inputs);
            return;
        }
        Event::Spoken { step, .. } => return actions::playground::spoken(state, *step),
        _ => {}
    }
    let finished = matches!(event, Event::Finished { .. });
    let title = state.queue.running().map(|item| item.title.clone()).unwrap_or_default();
    state.queue.take_in(event, &mut state.measurements, state.clock);
    if finished && let Some(item) = state.queue.items.iter().rfind(|item| item.title == title) {
        match &item.status {
            Status::Failed { message, hint } => {
                let error = Error { kind: crate::error::ErrorKind::Run, message: format!("{title}: {message}"), hint: hint.clone() };
                state.complain(&error);
            }
            Status::Done if state.queue.waiting() > 0 => {}
            Status::Cancelled => state.say(format!("{title}: cancelled")),
            _ => state.message = Some(super::state::Message { level: Level::Info, text: format!("{title}: done") }),
        }
    }
}
