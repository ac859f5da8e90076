//! Moving the cursor of the focused pane.

use super::super::message::Effect;
use super::super::state::{Pane, ResultsTab, State};
use super::super::tree::{self, Row};
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

/// Puts the cursor of the list of blocks on a row.
pub fn go_to(state: &mut State, row: Row) {
    match row {
        Row::Kind(_) => {}
        Row::Block(block) => (state.layers.cursor, state.layers.inside) = (block, None),
        Row::Module(block, module) => (state.layers.cursor, state.layers.inside) = (block, Some((module, None))),
        Row::Slice(block, module, slice) => (state.layers.cursor, state.layers.inside) = (block, Some((module, Some(slice)))),
    }
}

/// Lines that the Block pane never has more of.
const BLOCK_LINES: isize = 100;

fn step(state: &mut State, by: isize) -> Vec<Effect> {
    let moved = |at: usize, count: usize| (at as isize).saturating_add(by).clamp(0, count.max(1) as isize - 1) as usize;
    match state.focus {
        Pane::Layers => {
            let rows: Vec<Row> = tree::rows(state).into_iter().filter(|row| row.block().is_some()).collect();
            let cursor = tree::cursor(state);
            let at = rows.iter().position(|row| *row == cursor).unwrap_or(0);
            if let Some(row) = rows.get(moved(at, rows.len())) {
                go_to(state, *row);
            }
            super::select::extend(state);
        }
        // While a budget is moved, the cursor goes over the blocks, whose bits are explained.
        Pane::Plan if state.allocating.is_some() => {
            let block = moved(state.layers.cursor, state.document.kinds.len());
            go_to(state, Row::Block(block));
        }
        Pane::Block => {
            if by.abs() > 1 {
                state.looks.scroll = (state.looks.scroll as isize).saturating_add(by).clamp(0, BLOCK_LINES) as usize;
                return Vec::new();
            }
            let visible = state.visible_blocks();
            let at = visible.iter().position(|index| *index == state.layers.cursor).unwrap_or(0);
            if let Some(index) = visible.get(moved(at, visible.len())) {
                go_to(state, Row::Block(*index));
            }
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
        Pane::Results if state.results.tab == ResultsTab::Flips => {
            let flips = state.compared().map_or(0, |compared| compared.comparison.flips.len());
            state.results.flip = moved(state.results.flip, flips);
        }
        Pane::Results => state.results.cursor = moved(state.results.cursor, super::super::panes::results::shown(state).len() + 1),
        Pane::Playground => super::playground::step(state, by),
    }
    Vec::new()
}

/// Opens the block under the cursor: its modules and slices are listed.
pub fn open(state: &mut State) -> Vec<Effect> {
    state.layers.open.insert(state.layers.cursor);
    Vec::new()
}

/// Closes the block under the cursor.
pub fn close(state: &mut State) -> Vec<Effect> {
    state.layers.open.remove(&state.layers.cursor);
    state.layers.inside = None;
    Vec::new()
}
