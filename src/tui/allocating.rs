//! [`Allocating`]: the front of plans with a budget that is moved over it. The plan under it is on the screen in place of
//! the variant's until it is taken or left.

use std::sync::Arc;

use super::document::Draft;
use super::state::State;
use crate::analysis::Gpu;
use crate::analysis::allocate::{Activations, AllocateRequest, Allocation, Budget, CONTEXT, FrontPoint, Place, Solution};
use crate::analysis::knapsack::Front;
use crate::analysis::sensitivity::Sensitivities;
use crate::checkpoint::Layout;
use crate::engine::AllocateJob;
use crate::error::{Error, Result};
use crate::format::{Plan, Selector};
use crate::quant::Override;
use crate::size;

/// Steps from one end of the front to the other.
const STEPS: u64 = 100;

/// What is done once the plans of every budget are found, unless the variant is edited meanwhile.
pub struct Awaited {
    pub draft: Draft,
    pub then: Then,
}

/// See [`Awaited`].
#[derive(Debug, Clone, Copy)]
pub enum Then {
    Open(Activations),
    Explain,
}

/// The front, and the plan that is looked at.
pub struct Allocating {
    /// The variant as it was: an edit ends this.
    draft: Draft,
    losses: Arc<Sensitivities>,
    request: AllocateRequest,
    front: Arc<Front>,
    pub points: Vec<FrontPoint>,
    pub at: usize,
    pub found: Allocation,
}

impl Allocating {
    /// The front for the variant being edited, at its own bytes; nothing while it is being solved. Selected blocks keep their
    /// formats, and so does what the overrides of a recipe with `[allocate]` pin.
    pub fn new(state: &mut State, activations: Activations) -> Result<Option<Self>> {
        let draft = state.document.draft().clone();
        let Some(losses) = state.losses.of(&draft).cloned() else { return Err(not_measured()) };
        let layout = Arc::clone(&state.document.layout);
        let mut request = request(state, &draft, activations)?;
        let formats = state.plan().blocks.clone();
        let pin = |block: &usize| Override { selector: Selector::Blocks(*block, *block), format: formats[*block] };
        request.pins.extend(state.layers.selected.iter().map(pin));
        let Some(solution) = state.losses.solution(&losses, &layout, &request)? else { return Ok(None) };
        // A plan below everything that is possible begins at the least.
        let place = solution.find(request.budget).or_else(|_| solution.find(Budget::Share(0.0)))?;
        let (front, points, found) = (solution.shared_front(), solution.front(), solution.at(place));
        Ok(Some(Self { draft, losses, request, front, points, at: place.index, found }))
    }

    /// Every plan of the front.
    pub fn solution<'a>(&'a self, layout: &'a Layout) -> Result<Solution<'a>> {
        Solution::with_front(&self.losses, layout, &self.request, Arc::clone(&self.front))
    }

    /// Which activations the plans may use.
    pub fn activations(&self) -> Activations {
        self.request.activations
    }

    /// Whether the variant is still what the front was made for.
    pub fn holds(&self, draft: &Draft) -> bool {
        self.draft == *draft
    }

    /// Blocks and linears that keep their formats.
    pub fn pins(&self) -> usize {
        self.request.pins.len()
    }

    /// The point of the front under the budget.
    pub fn point(&self) -> Option<&FrontPoint> {
        self.points.get(self.at)
    }

    /// The place a step to the right or left: a hundredth of the bytes between the ends, and at least one plan.
    fn beside(&self, more: bool) -> usize {
        let (Some(first), Some(last), Some(here)) = (self.points.first(), self.points.last(), self.point()) else { return self.at };
        let step = (last.linear_bytes - first.linear_bytes) / STEPS;
        let within = |bytes: u64| self.points.partition_point(|point| point.linear_bytes <= bytes).saturating_sub(1);
        if more {
            within(here.linear_bytes + step).max(self.at + 1).min(self.points.len() - 1)
        } else {
            within(here.linear_bytes.saturating_sub(step)).min(self.at.saturating_sub(1))
        }
    }

    /// Bits a weight that give just this plan, as short as they can be written.
    pub fn bits(&self, solution: &Solution<'_>) -> f64 {
        let exact = self.found.bits_per_weight;
        let rounded = |digits: i32| (exact * 10_f64.powi(digits)).ceil() / 10_f64.powi(digits);
        let same = |bits: &f64| solution.find(Budget::Bits(*bits)).is_ok_and(|place| place.index == self.at);
        (2..12).map(rounded).find(same).unwrap_or(exact)
    }
}

/// What plans for `draft` may be: what its recipe's `[allocate]` and overrides say, or all formats with these activations.
/// The budget is the draft's own.
pub fn request(state: &State, draft: &Draft, activations: Activations) -> Result<AllocateRequest> {
    let (config, layout) = (&state.document.config, &state.document.layout);
    if let Some(spec) = &draft.recipe.allocate {
        return AllocateRequest::of_recipe(spec, &AllocateJob::pins(&draft.overrides), config, layout, &draft.plan);
    }
    let ends = Plan { embedding: draft.plan.embedding, head: draft.plan.head, ..Plan::unquantized(layout.blocks.len()) };
    Ok(AllocateRequest { activations, ..AllocateRequest::new(ends, Budget::LinearBytes(layout.linear_bytes(&draft.plan))) })
}

/// There is nothing to find plans from.
pub fn not_measured() -> Error {
    Error::input("what the parts of the model lose is not measured yet").hint("{measure} measures it")
}

/// Asks the front of the open view.
fn with_solution<T>(state: &State, ask: impl FnOnce(&Allocating, &Solution<'_>) -> Result<T>) -> Result<T> {
    let Some(allocating) = &state.allocating else { return Err(Error::input("no front is open")) };
    ask(allocating, &allocating.solution(&state.document.layout)?)
}

/// Puts the budget to the place of the front that `find` gives.
fn go_to(state: &mut State, find: impl FnOnce(&Solution<'_>) -> Result<Place>) -> Result<()> {
    let (place, found) = with_solution(state, |_, solution| find(solution).map(|place| (place, solution.at(place))))?;
    if let Some(allocating) = &mut state.allocating {
        (allocating.at, allocating.found) = (place.index, found);
    }
    Ok(())
}

/// Moves the budget a step.
pub fn step(state: &mut State, more: bool) -> Result<()> {
    let Some(at) = state.allocating.as_ref().map(|allocating| allocating.beside(more)) else { return Ok(()) };
    go_to(state, |solution| Ok(solution.place(at)))
}

/// Moves the budget to what was typed: bits a weight, bytes of the whole model, nats a token, or a GPU to fit on.
pub fn set_budget(state: &mut State, text: &str) -> Result<()> {
    let text = text.trim();
    let number = |text: &str| text.trim().parse::<f64>().ok().filter(|number| number.is_finite());
    let budget = if let Some(bits) = number(text.trim_end_matches("bits")) {
        Budget::Bits(bits)
    } else if let Some(nats) = text.strip_suffix("nats").and_then(number) {
        Budget::Kld(nats)
    } else if let Ok(gpu) = Gpu::find(text) {
        Budget::fitting(&state.document.config, &gpu, CONTEXT)?
    } else {
        Budget::ModelBytes(size::parse(text).map_err(|_| {
            Error::input(format!("`{text}` is no budget"))
                .hint("4.5 (bits a weight), 6 GiB (the whole model), 2e-5 nats, or a GPU such as RTX 4090")
        })?)
    };
    go_to(state, |solution| solution.find(budget))
}

/// Takes the plan under the budget as an edit of the variant; returns what was done, nothing if it is that plan already.
pub fn apply(state: &mut State) -> Result<Option<String>> {
    let bits = with_solution(state, |allocating, solution| Ok(allocating.bits(solution)))?;
    let Some(allocating) = state.allocating.take() else { return Ok(None) };
    let label = format!("allocated {:.2} bits", allocating.found.bits_per_weight);
    let changed = if allocating.draft.is_allocated() {
        state.document.set_bits(bits, &label)?
    } else {
        state.document.set_plan(allocating.found.plan.clone(), &label)?
    };
    Ok(changed.then_some(label))
}
