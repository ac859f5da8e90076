//! Looking at the weights of the block under the cursor, while the Block pane is on the screen.

use super::super::message::Effect;
use super::super::queue::Work;
use super::super::state::{BlockLook, Pane, State};
use super::super::view;
use crate::engine::inspect::Look;
use crate::error::{ErrorKind, Result};
use crate::monitor::CancelToken;

/// Asks for what the pane does not know yet; stops looking at the block that the cursor has left.
pub fn wanted(state: &mut State) -> Option<Effect> {
    let block = state.layers.cursor;
    if state.looks.current.as_ref().is_some_and(|(current, _)| *current == block) || !view::shows(state, Pane::Block) {
        return None;
    }
    state.looks.scroll = 0;
    if let Some((left, cancel)) = state.looks.current.take() {
        cancel.cancel();
        if state.looks.blocks.get(&left).is_some_and(|look| !look.done) {
            state.looks.blocks.remove(&left);
        }
    }
    let cancel = CancelToken::default();
    state.looks.current = Some((block, cancel.clone()));
    if state.looks.blocks.get(&block).is_some_and(|look| look.done) {
        return None;
    }
    state.looks.blocks.insert(block, BlockLook::default());
    Some(Effect::Look { model: state.document.settings().model.name(), block, cancel })
}

/// Takes in what was found, unless the cursor has moved on.
pub fn looked(state: &mut State, block: usize, look: Result<Option<Look>>) {
    if state.looks.current.as_ref().is_none_or(|(current, _)| *current != block) {
        return;
    }
    let known = state.looks.blocks.entry(block).or_default();
    match look {
        Ok(Some(Look::Linear(linear))) => known.linears.push(linear),
        Ok(Some(Look::Rounding(rounding))) => known.roundings.push(rounding),
        Ok(None) => known.done = true,
        Err(error) if error.kind == ErrorKind::Cancelled => {}
        Err(error) => {
            known.done = true;
            known.failure = Some(error.message);
        }
    }
}

/// Observes the inputs of all linears over the calibration sample.
pub fn observe(state: &mut State) -> Vec<Effect> {
    state.queue.push_work(state.document.settings(), "observe the inputs of all blocks", Work::Observe);
    state.say("the float model runs over the calibration sample; inputs appear here block by block");
    Vec::new()
}
