//! Running, pausing, cancelling, and what becomes of runs.

use super::super::document::Draft;
use super::super::measurements::Origin;
use super::super::message::Effect;
use super::super::popups::{Choice, Confirm, Popup, Runs};
use super::super::queue::{Level, Purpose, Run, Target};
use super::super::state::{Pane, State};

fn target(draft: &Draft) -> Target {
    Target { spec: draft.spec(), recipe: draft.recipe.name.clone(), origin: Origin::of(draft) }
}

/// Queues a run about `drafts` and goes to the Run pane.
pub fn queue(state: &mut State, drafts: &[Draft], purpose: Purpose) -> Vec<Effect> {
    let session = state.document.session();
    state.queue.push(session, drafts.iter().map(target).collect(), purpose);
    state.focus = Pane::Run;
    Vec::new()
}

pub fn run(state: &mut State) -> Vec<Effect> {
    let draft = state.document.draft().clone();
    queue(state, &[draft], Purpose::Evaluate)
}

pub fn run_all(state: &mut State) -> Vec<Effect> {
    let drafts = state.document.drafts.clone();
    queue(state, &drafts, Purpose::Evaluate)
}

pub fn quantize(state: &mut State) -> Vec<Effect> {
    let draft = state.document.draft().clone();
    queue(state, &[draft], Purpose::Quantize)
}

pub fn is_busy(state: &State) -> Result<(), &'static str> {
    if state.queue.is_busy() { Ok(()) } else { Err("no job runs") }
}

/// What `x` is about: in the Run pane the run under the cursor, elsewhere the one that runs.
fn cancelled_run(state: &State) -> Option<&Run> {
    let selected = state.queue.selected().filter(|run| state.focus == Pane::Run && !run.is_over());
    selected.or_else(|| state.queue.running_run()).or_else(|| state.queue.runs.iter().find(|run| !run.is_over()))
}

pub fn can_cancel(state: &State) -> Result<(), &'static str> {
    is_busy(state)
}

pub fn cancel(state: &mut State) -> Vec<Effect> {
    let Some(run) = cancelled_run(state) else { return Vec::new() };
    let (key, title) = (run.key, format!("Cancel {}?", run.title));
    let line = if run.is_running() { "It stops within a step. Finished blocks, losses and rows are kept." } else { "It has not begun." };
    let mut choices = vec![Choice::new('y', "cancel it", move |state| state.queue.cancel(key).map(Effect::Cancel).into_iter().collect())];
    if state.queue.runs.iter().filter(|run| !run.is_over()).count() > 1 {
        choices.push(Choice::new('a', "cancel all", |state| {
            let keys: Vec<u64> = state.queue.runs.iter().map(|run| run.key).collect();
            keys.into_iter().filter_map(|key| state.queue.cancel(key)).map(Effect::Cancel).collect()
        }));
    }
    state.popups.push(Confirm::popup(title, vec![line.to_owned()], choices));
    Vec::new()
}

pub fn pause(state: &mut State) -> Vec<Effect> {
    state.queue.paused = !state.queue.paused;
    state.say(if state.queue.paused { "pausing at the next step; {pause} goes on" } else { "going on" });
    vec![Effect::Pause(state.queue.paused)]
}

pub fn can_retry(state: &State) -> Result<(), &'static str> {
    match state.queue.selected() {
        None => Err("there is no run to try again"),
        Some(run) if !run.is_over() => Err("this run is not over"),
        Some(_) => Ok(()),
    }
}

pub fn retry(state: &mut State) -> Vec<Effect> {
    state.queue.retry();
    Vec::new()
}

pub fn can_move(state: &State) -> Result<(), &'static str> {
    if state.queue.runs.len() > 1 { Ok(()) } else { Err("there is no other run to change places with") }
}

pub fn move_down(state: &mut State) -> Vec<Effect> {
    state.queue.shift(true);
    Vec::new()
}

pub fn move_up(state: &mut State) -> Vec<Effect> {
    state.queue.shift(false);
    Vec::new()
}

pub fn clear(state: &mut State) -> Vec<Effect> {
    state.queue.clear_finished();
    Vec::new()
}

pub fn log_level(state: &mut State) -> Vec<Effect> {
    state.queue.least = match state.queue.least {
        Level::Info => Level::Warning,
        Level::Warning => Level::Error,
        Level::Error => Level::Info,
    };
    state.queue.scroll = 0;
    Vec::new()
}

pub fn runs(state: &mut State) -> Vec<Effect> {
    state.popups.push(Popup::Runs(Runs::default()));
    vec![Effect::LookAtRuns { follow: None }]
}
