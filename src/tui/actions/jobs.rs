//! Running and cancelling.

use super::super::document::Draft;
use super::super::message::Effect;
use super::super::popups::{Choice, Confirm};
use super::super::queue::Target;
use super::super::state::{Pane, State};
use crate::engine::AllocateJob;
use crate::session::paths;

fn target(draft: &Draft) -> Target {
    Target {
        name: draft.name.clone(),
        recipe: draft.recipe.name.clone(),
        steps: draft.recipe.steps(),
        plan: draft.plan.clone(),
        allocate: AllocateJob::new(&draft.recipe, &draft.overrides, paths::data_directory()),
    }
}

fn queue(state: &mut State, targets: Vec<Target>) -> Vec<Effect> {
    state.queue.push(targets);
    state.focus = Pane::Run;
    Vec::new()
}

pub fn run(state: &mut State) -> Vec<Effect> {
    let target = target(state.document.draft());
    queue(state, vec![target])
}

pub fn run_all(state: &mut State) -> Vec<Effect> {
    let targets = state.document.drafts.iter().map(target).collect();
    queue(state, targets)
}

pub fn is_busy(state: &State) -> Result<(), &'static str> {
    if state.queue.running().is_some() { Ok(()) } else { Err("no job runs") }
}

pub fn cancel(state: &mut State) -> Vec<Effect> {
    let Some(running) = state.queue.running() else { return Vec::new() };
    let title = format!("Cancel {}?", running.title);
    let mut lines = vec!["It stops at the next block or batch. Finished blocks are kept.".to_owned()];
    if state.queue.waiting() > 0 {
        lines.push(format!("The {} waiting behind it are dropped too.", jobs(state.queue.waiting())));
    }
    let stop = Choice::new('y', "cancel it", |state| state.queue.cancel().map(Effect::Cancel).into_iter().collect());
    state.popups.push(Confirm::popup(title, lines, vec![stop]));
    Vec::new()
}

fn jobs(count: usize) -> String {
    if count == 1 { "job".into() } else { format!("{count} jobs") }
}

pub fn clear(state: &mut State) -> Vec<Effect> {
    state.queue.clear_finished();
    Vec::new()
}
