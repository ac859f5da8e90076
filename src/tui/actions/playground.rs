//! One prompt, two models.

use super::super::message::Effect;
use super::super::popups::Prompt;
use super::super::queue::Work;
use super::super::state::{Pane, Playground, Side, State};
use crate::engine::{PlaygroundJob, PlaygroundStep};

/// Tokens that each model says.
const TOKENS: usize = 96;

pub fn pane(state: &mut State) -> Vec<Effect> {
    state.focus = Pane::Playground;
    Vec::new()
}

/// Asks for the prompt, then lets both models go on.
pub fn prompt(state: &mut State) -> Vec<Effect> {
    let [a, b] = [Side::A, Side::B].map(|side| state.side(side));
    let title = format!("Prompt for {} and {}", a.name, b.name);
    let missing = [a, b].into_iter().find(|side| side.path.is_none()).map(|side| side.name);
    if let Some(missing) = missing {
        state.say(format!(
            "{missing} is not quantized yet: {{run}} does that; {{side-a}} and {{side-b}} in the results choose other models"
        ));
        return Vec::new();
    }
    let prompt = Prompt::new(title, &state.playground.prompt, |state, text| {
        speak(state, text);
        Vec::new()
    });
    state.popups.push(prompt.popup());
    Vec::new()
}

fn speak(state: &mut State, text: &str) {
    let sides = [Side::A, Side::B].map(|side| {
        let side = state.side(side);
        (side.name, side.path)
    });
    let [(a, Some(first)), (b, Some(second))] = sides else { return };
    if text.trim().is_empty() {
        return;
    }
    state.playground = Playground { prompt: text.to_owned(), names: [a, b], ..Playground::default() };
    let job = PlaygroundJob { models: [first, second], prompt: text.to_owned(), max_tokens: TOKENS };
    state.queue.push_work(state.document.settings(), "playground", Work::Playground(job));
}

/// Takes a step of both models in; the cursor stays at the end unless it was moved.
pub fn spoken(state: &mut State, step: PlaygroundStep) {
    let playground = &mut state.playground;
    let at_end = playground.cursor + 1 >= playground.spoken[0].len();
    for (side, spoken) in step.spoken.into_iter().enumerate() {
        playground.spoken[side].extend(spoken);
    }
    playground.divergence.extend(step.divergence);
    if at_end {
        playground.cursor = longest(playground).saturating_sub(1);
    }
}

fn longest(playground: &Playground) -> usize {
    playground.spoken.iter().map(Vec::len).max().unwrap_or(0)
}

/// Moves the cursor over the tokens.
pub fn step(state: &mut State, by: isize) {
    let last = longest(&state.playground).max(1) as isize - 1;
    state.playground.cursor = (state.playground.cursor as isize).saturating_add(by).clamp(0, last) as usize;
}

pub fn left(state: &mut State) -> Vec<Effect> {
    step(state, -1);
    Vec::new()
}

pub fn right(state: &mut State) -> Vec<Effect> {
    step(state, 1);
    Vec::new()
}

/// Goes to where the texts part.
pub fn parting(state: &mut State) -> Vec<Effect> {
    match state.playground.parting() {
        Some(place) => state.playground.cursor = place,
        None => state.say("the texts do not part"),
    }
    Vec::new()
}
