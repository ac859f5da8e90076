//! Moving the cursor of the focused pane.

use super::super::message::Effect;
use super::super::state::{Pane, State};
use super::super::view;

pub fn down(state: &mut State) -> Vec<Effect> {
    step(state, 1)
}

pub fn up(state: &mut State) -> Vec<Effect> {
    step(state, -1)
}

pub fn page_down(state: &mut State) -> Vec<Effect> {
    let page = view::page(state);
    step(state, page)
}

pub fn page_up(state: &mut State) -> Vec<Effect> {
    let page = view::page(state);
    step(state, -page)
}

pub fn first(state: &mut State) -> Vec<Effect> {
    step(state, isize::MIN / 2)
}

pub fn last(state: &mut State) -> Vec<Effect> {
    step(state, isize::MAX / 2)
}

fn step(state: &mut State, by: isize) -> Vec<Effect> {
    let moved = |at: usize, count: usize| (at as isize).saturating_add(by).clamp(0, count.max(1) as isize - 1) as usize;
    match state.focus {
        Pane::Layers | Pane::Block => {
            let visible = state.visible_blocks();
            let at = visible.iter().position(|index| *index == state.layers.cursor).unwrap_or(0);
            if let Some(index) = visible.get(moved(at, visible.len())) {
                state.layers.cursor = *index;
            }
            super::select::extend(state);
        }
        Pane::Plan => {
            let index = moved(state.document.current(), state.document.drafts.len());
            state.document.select(index);
        }
        Pane::Run => {
            // Single steps go through the runs, pages through the log.
            if by.abs() == 1 && state.queue.runs.len() > 1 {
                state.queue.cursor = moved(state.queue.cursor, state.queue.runs.len());
            } else {
                let lines = state.queue.log.len() as isize;
                state.queue.scroll = (state.queue.scroll as isize).saturating_sub(by).clamp(0, lines.max(1) - 1) as usize;
            }
        }
        Pane::Results => state.results.cursor = moved(state.results.cursor, state.document.drafts.len() + 1),
    }
    Vec::new()
}
