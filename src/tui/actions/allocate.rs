//! The front of plans, its budget, and why a block has the bits that it has.

use std::sync::Arc;

use super::super::allocating::{self, Allocating, Awaited, Then};
use super::super::losses::Known;
use super::super::message::Effect;
use super::super::popups::{Choice, Choose, Confirm, Pager, Prompt};
use super::super::queue::Purpose;
use super::super::state::{Pane, State, Strip};
use super::super::theme::Role;
use super::jobs;
use crate::analysis::allocate::{Activations, Exchange};
use crate::analysis::sensitivity::unit_format;
use crate::error::Result;
use crate::format::Format;
use crate::session::report;

pub fn is_open(state: &State) -> std::result::Result<(), &'static str> {
    if state.allocating.is_some() { Ok(()) } else { Err("{allocate} opens the front of plans, whose budget moves") }
}

/// Opens the front, or says what has to be measured first.
pub fn open(state: &mut State) -> Vec<Effect> {
    match state.losses.known(state.document.draft()) {
        Some(Known::Measured(_)) => {}
        Some(Known::Asked) | None => {
            state.say("what was measured is still being read");
            return Vec::new();
        }
        Some(Known::Nothing(why)) => {
            let why = why.as_ref().map(|error| format!("{}.", error.message));
            return offer_to_measure(state, why);
        }
    }
    state.focus = Pane::Plan;
    open_with(state, Activations::Int8);
    Vec::new()
}

fn open_with(state: &mut State, activations: Activations) {
    match Allocating::new(state, activations) {
        Ok(None) => wait(state, Then::Open(activations)),
        Ok(Some(allocating)) => {
            let pins = match allocating.pins() {
                0 => String::new(),
                1 => "; one part keeps its format".into(),
                count => format!("; {count} parts keep their formats"),
            };
            let keys = "{budget-less} {budget-more} move the budget, {take-plan} takes the plan, {leave-plan} leaves";
            state.say(format!("{} plans: {keys}{pins}", allocating.points.len()));
            state.allocating = Some(Box::new(allocating));
        }
        Err(error) => state.complain(&error),
    }
}

/// Lets something wait for the plans of every budget.
fn wait(state: &mut State, then: Then) {
    state.awaited = Some(Awaited { draft: state.document.draft().clone(), then });
    state.say("finding the plans of every budget …");
}

/// Goes on with what waited for the plans of every budget.
pub fn go_on(state: &mut State) {
    let Some(awaited) = state.awaited.take() else { return };
    state.message = None;
    match awaited.then {
        Then::Open(activations) => open_with(state, activations),
        Then::Explain => explain(state),
    }
}

fn offer_to_measure(state: &mut State, why: Option<String>) -> Vec<Effect> {
    if state.read_only {
        state.say("what each part loses is not measured yet, and a read-only workbench measures nothing");
        return Vec::new();
    }
    if state.queue.measures(&state.document.draft().name) {
        state.say("what each part loses is being measured: {allocate} works when that is done");
        return Vec::new();
    }
    let mut lines: Vec<String> = why.into_iter().collect();
    lines.push("A plan is found from what each part of the model loses, which is not measured yet for this recipe.".into());
    lines.push("Measuring takes a while; it can be paused and stopped, and what is measured is kept.".into());
    let choices = vec![Choice::new('m', "measure it now", measure)];
    state.popups.push(Confirm::popup("Measure first?".into(), lines, choices));
    Vec::new()
}

/// Measures what the parts of the model lose under the steps of the variant being edited.
pub fn measure(state: &mut State) -> Vec<Effect> {
    let draft = state.document.draft().clone();
    jobs::queue(state, &[draft], Purpose::Measure)
}

fn moved(state: &mut State, outcome: Result<()>) -> Vec<Effect> {
    if let Err(error) = outcome {
        state.complain(&error);
    }
    Vec::new()
}

pub fn less(state: &mut State) -> Vec<Effect> {
    let outcome = allocating::step(state, false);
    moved(state, outcome)
}

pub fn more(state: &mut State) -> Vec<Effect> {
    let outcome = allocating::step(state, true);
    moved(state, outcome)
}

/// Asks for a budget.
pub fn budget(state: &mut State) -> Vec<Effect> {
    let bits = state.allocating.as_ref().map_or(0.0, |allocating| allocating.found.bits_per_weight);
    let prompt = Prompt::new("Budget: bits a weight, 6 GiB, 2e-5 nats, or a GPU", &format!("{bits:.2}"), |state, text| {
        let outcome = allocating::set_budget(state, text);
        moved(state, outcome)
    });
    state.popups.push(prompt.popup());
    Vec::new()
}

/// Chooses which formats the plans may use.
pub fn formats(state: &mut State) -> Vec<Effect> {
    if state.document.draft().is_allocated() {
        state.say("the recipe of this variant says which formats its plan may use");
        return Vec::new();
    }
    let kinds = [Activations::Int8, Activations::Float, Activations::Any];
    let current = state.allocating.as_ref().and_then(|open| kinds.iter().position(|kind| *kind == open.activations()));
    let items =
        [("int8", "weights of any width, as in the phases"), ("float", "weights only"), ("any", "both, which at equal bytes means float")];
    let items = items.map(|(name, what)| (name.to_owned(), what.to_owned())).to_vec();
    state.popups.push(Choose::popup("Activations of the plans", items, current.unwrap_or(0), move |state, index| {
        open_with(state, kinds[index]);
        Vec::new()
    }));
    Vec::new()
}

/// Takes the plan.
pub fn apply(state: &mut State) -> Vec<Effect> {
    match allocating::apply(state) {
        Ok(Some(label)) => state.say(format!("{}: {label}; {{undo}} takes it back", state.document.draft().name)),
        Ok(None) => state.say("the variant has this plan already"),
        Err(error) => state.complain(&error),
    }
    Vec::new()
}

/// Leaves the variant as it is.
pub fn leave(state: &mut State) -> Vec<Effect> {
    (state.allocating, state.awaited) = (None, None);
    Vec::new()
}

/// What the lower line of the strip shows.
pub fn strip(state: &mut State) -> Vec<Effect> {
    state.layers.strip = match state.layers.strip {
        Strip::Bits if state.losses.are_shown() => Strip::Loss,
        Strip::Bits | Strip::Loss => Strip::Error,
        Strip::Error => Strip::Bits,
    };
    state.say(match state.layers.strip {
        Strip::Bits => "strip: bits of the weights",
        Strip::Loss => "strip: what each block is predicted to lose, on a logarithmic scale",
        Strip::Error => "strip: measured output error of each block",
    });
    Vec::new()
}

/// Why the block under the cursor has the bits that it has on the screen.
pub fn why(state: &mut State) -> Vec<Effect> {
    explain(state);
    Vec::new()
}

fn explain(state: &mut State) {
    match reasons(state) {
        Ok(None) => wait(state, Then::Explain),
        Ok(Some(lines)) => {
            let block = state.layers.cursor;
            let kind = state.document.kinds[block];
            state.popups.push(Pager::popup(format!("Block {block} ({kind}): why these bits"), lines, false));
        }
        Err(error) => state.complain(&error),
    }
}

/// The lines; nothing while the plans beside this one are being found.
fn reasons(state: &mut State) -> Result<Option<Vec<(Role, String)>>> {
    let (block, plan) = (state.layers.cursor, state.plan().clone());
    let (layout, draft) = (Arc::clone(&state.document.layout), state.document.draft().clone());
    let Some(losses) = state.losses.of(&draft).cloned() else { return Err(allocating::not_measured()) };
    // Beside a format stand those with the same activations.
    let float = plan.blocks[block].weight_bits() < 16 && !plan.blocks[block].quantizes_activations();
    let solution = match &state.allocating {
        Some(open) => Some(open.solution(&layout)?),
        None => {
            let request = allocating::request(state, &draft, if float { Activations::Float } else { Activations::Int8 })?;
            state.losses.solution(&losses, &layout, &request)?
        }
    };
    let Some(solution) = solution else { return Ok(None) };
    let choices = solution.choices(&plan);
    let price = solution.price(layout.linear_bytes(&plan));
    let bits = layout.bits_per_weight(&plan);
    let mut lines = vec![(Role::Dim, format!("at {bits:.2} bits a weight, a MB more saves {price:.1e} nats where it saves most"))];
    for unit in losses.units.iter().filter(|unit| unit.block == block) {
        let tied = if unit.linears.len() > 1 { format!("  {} linears, tied", unit.linears.len()) } else { String::new() };
        let name = unit.name.split_once('.').map_or("all linears", |(_, name)| name);
        let Some(choice) = choices.iter().find(|choice| choice.unit == unit.name) else {
            let what = match unit_format(&plan, &layout, unit) {
                Some(Format::W16A16) => "stays as in the checkpoint and loses nothing",
                Some(_) => "has a format that was not measured, or that plans may not use",
                None => "has several formats",
            };
            lines.extend([(Role::Strong, format!("{name}{tied}")), (Role::Text, format!("  {what}"))]);
            continue;
        };
        let pinned = if choice.pinned { "  pinned" } else { "" };
        let kld = format!("{}{:.1e} nats", if choice.measured { "" } else { "~" }, choice.kld);
        lines.push((Role::Strong, format!("{name}  {}  {}  loses {kld}{tied}{pinned}", choice.format, report::bytes(choice.bytes))));
        if let Some(to) = &choice.cheaper {
            let verdict = |own| if own > price { "dearer than elsewhere" } else { "the MB is worth more elsewhere" };
            lines.push((Role::Text, exchange(to, ["↓", "saves", "loses"], verdict)));
        }
        if let Some(to) = &choice.dearer {
            let verdict = |own| if own < price { "less than elsewhere" } else { "more than elsewhere" };
            lines.push((Role::Text, exchange(to, ["↑", "takes", "wins"], verdict)));
        }
    }
    Ok(Some(lines))
}

/// An exchange in words, `verdict` of its price among them.
fn exchange(to: &Exchange, [direction, bytes, nats]: [&str; 3], verdict: impl Fn(f64) -> &'static str) -> String {
    let (format, size, kld) = (to.format, report::bytes(to.bytes.unsigned_abs()), to.kld.abs());
    match to.price() {
        Some(price) => format!("  {direction} {format} {bytes} {size}, {nats} {kld:.1e}, {price:.1e} a MB: {}", verdict(price)),
        None => format!("  {direction} {format} same bytes, {kld:.1e} {} loss", if to.kld < 0.0 { "less" } else { "more" }),
    }
}
