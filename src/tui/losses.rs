//! [`Losses`]: what the parts of the model lose, as far as it was measured, and what follows from it for the plan on the
//! screen: its predicted divergence, and the plan of a variant whose formats are found by measurement.

use std::sync::Arc;

use super::document::{Document, Draft};
use super::measurements::Origin;
use super::message::{Effect, ToSolve};
use crate::analysis::allocate::{Activations, AllocateRequest, Correction, Solution, checks_of};
use crate::analysis::knapsack::Front;
use crate::analysis::sensitivity::{Sensitivities, SensitivitySpec};
use crate::checkpoint::Layout;
use crate::error::{Error, Result};
use crate::format::{Format, Plan, Transform};
use crate::quant::Internals;

/// What losses depend on, beside model and sample.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    transforms: Vec<Transform>,
    /// Name of the rounding method.
    method: String,
    /// What is int8 inside SSM blocks.
    internals: Internals,
    embedding: Format,
    head: Format,
}

impl Key {
    /// Of the losses that `draft` is predicted from.
    pub fn of(draft: &Draft) -> Self {
        let steps = draft.recipe.steps();
        let (method, embedding, head) = (steps.method.name().into(), draft.plan.embedding, draft.plan.head);
        Self { internals: steps.internals(), transforms: steps.transforms, method, embedding, head }
    }

    fn of_measured(losses: &Sensitivities) -> Self {
        let identity = &losses.identity;
        let (transforms, method, internals) = (identity.transforms.clone(), identity.method.clone(), identity.internals);
        Self { transforms, method, internals, embedding: identity.embedding, head: identity.head }
    }
}

/// What is known under a key.
#[derive(Debug)]
pub enum Known {
    /// It is being read.
    Asked,
    /// With why, where something was measured that does not fit.
    Nothing(Option<Error>),
    Measured(Arc<Sensitivities>),
}

/// A plan's losses.
#[derive(Debug, Clone)]
pub struct Predicted {
    /// Mean divergence in nats a token: the sum of losses, with what was learned from plans that were measured.
    pub kld: f64,
    /// Where it lies, by how far plans that were measured were off.
    pub interval: Option<[f64; 2]>,
    /// Plans with the same activation bits that were measured.
    pub checks: usize,
    /// The formats of embedding and head that it holds for, where the plan has others.
    pub other_ends: Option<[Format; 2]>,
}

/// The front of a request, which answers it with any other budget too.
#[derive(Debug)]
pub struct Solved {
    pub losses: Arc<Sensitivities>,
    pub request: AllocateRequest,
    /// Or what of the request cannot be.
    pub front: Result<Arc<Front>>,
}

impl Solved {
    /// Solves for every budget, which takes longer than a frame may.
    pub fn new(asked: ToSolve) -> Self {
        let ToSolve { losses, layout, request } = asked;
        let front = Solution::new(&losses, &layout, &request).map(|solution| solution.shared_front());
        Self { losses, request, front }
    }

    fn answers(&self, losses: &Arc<Sensitivities>, request: &AllocateRequest) -> bool {
        Arc::ptr_eq(&self.losses, losses) && self.request == AllocateRequest { budget: self.request.budget, ..request.clone() }
    }
}

/// The plan that was found for a draft.
#[derive(Debug)]
struct Found {
    /// The draft's, which stays the same while it is edited.
    draft: u32,
    losses: Arc<Sensitivities>,
    origin: Origin,
    plan: Result<Plan>,
}

/// The losses of the plan on the screen.
#[derive(Debug)]
struct Shown {
    losses: Arc<Sensitivities>,
    plan: Plan,
    blocks: Vec<Option<f64>>,
}

/// What is known of the losses of the model's parts.
#[derive(Default)]
pub struct Losses {
    known: Vec<(Key, Known)>,
    solved: Option<Solved>,
    /// What was asked for last and is not solved.
    asked: Option<ToSolve>,
    /// Something is being solved.
    solving: bool,
    found: Option<Found>,
    shown: Option<Shown>,
}

impl Losses {
    /// What is known for a draft; nothing until it was asked for.
    pub fn known(&self, draft: &Draft) -> Option<&Known> {
        let key = Key::of(draft);
        self.known.iter().find(|(other, _)| *other == key).map(|(_, known)| known)
    }

    /// The losses that a draft is predicted from.
    pub fn of(&self, draft: &Draft) -> Option<&Arc<Sensitivities>> {
        if let Some(Known::Measured(losses)) = self.known(draft) { Some(losses) } else { None }
    }

    /// Asks for what is known of drafts that were not asked for yet, and for the front that is needed: one at a time, so that
    /// of many that follow each other, as edits do, only the last is solved.
    pub fn wanted(&mut self, document: &Document) -> Vec<Effect> {
        let mut effects = Vec::new();
        for draft in &document.drafts {
            let key = Key::of(draft);
            if !self.known.iter().any(|(other, _)| *other == key) {
                self.known.push((key.clone(), Known::Asked));
                let sample = document.settings().calibration.clone();
                let spec = Box::new(SensitivitySpec::new(draft.recipe.steps(), &draft.plan, sample));
                effects.push(Effect::RecallLosses { model: document.settings().model.name(), key, spec });
            }
        }
        if !self.solving
            && let Some(asked) = self.asked.take()
        {
            self.solving = true;
            effects.push(Effect::Solve(Box::new(asked)));
        }
        effects
    }

    /// Takes in what was read.
    pub fn recalled(&mut self, key: &Key, found: Result<Option<Box<Sensitivities>>>) {
        let Some((_, known)) = self.known.iter_mut().find(|(other, known)| other == key && matches!(known, Known::Asked)) else { return };
        *known = match found {
            Ok(Some(losses)) => Known::Measured(Arc::new(*losses)),
            Ok(None) => Known::Nothing(None),
            Err(error) => Known::Nothing(Some(error)),
        };
    }

    /// Takes in what was measured just now. What was not known may be so now, and is asked for again.
    pub fn measured(&mut self, losses: Sensitivities) {
        let key = Key::of_measured(&losses);
        self.known.retain(|(other, known)| *other != key && matches!(known, Known::Measured(_)));
        self.known.push((key, Known::Measured(Arc::new(losses))));
    }

    /// Takes in a front.
    pub fn solved(&mut self, solved: Solved) {
        self.asked = self.asked.take().filter(|asked| !solved.answers(&asked.losses, &asked.request));
        (self.solving, self.solved) = (false, Some(solved));
    }

    /// Follows the document: finds the plan of a draft whose formats are left to measurement, unless it was found before.
    /// While it is being solved the plan that the draft had before stays.
    pub fn find(&mut self, document: &Document) {
        let draft = document.draft();
        let Some(losses) = self.of(draft).filter(|_| draft.is_allocated()).cloned() else {
            self.found = None;
            return;
        };
        let origin = Origin::of(draft);
        if self.found.as_ref().is_some_and(|found| found.origin == origin && Arc::ptr_eq(&found.losses, &losses)) {
            return;
        }
        match self.allocated(document, &losses, &origin).transpose() {
            Some(plan) => self.found = Some(Found { draft: draft.id, losses, origin, plan }),
            None => self.found = self.found.take().filter(|found| found.draft == draft.id),
        }
    }

    /// The plan that measurement gives; nothing while it is being solved.
    fn allocated(&mut self, document: &Document, losses: &Arc<Sensitivities>, origin: &Origin) -> Result<Option<Plan>> {
        let Some((spec, pins)) = &origin.allocate else { return Ok(Some(origin.plan.clone())) };
        let request = AllocateRequest::of_recipe(spec, pins, &document.config, &document.layout, &origin.plan)?;
        let Some(solution) = self.solution(losses, &document.layout, &request)? else { return Ok(None) };
        Ok(Some(solution.at(solution.find(request.budget)?).plan))
    }

    /// The plan that measurement gives the variant being edited, or why it gives none; nothing where none is to be found.
    pub fn found(&self) -> Option<&Result<Plan>> {
        self.found.as_ref().map(|found| &found.plan)
    }

    /// Follows the plan on the screen: `plan`, or else what was found for the draft, or else the draft's own.
    pub fn show(&mut self, layout: &Layout, draft: &Draft, plan: Option<&Plan>) {
        let Some(losses) = self.of(draft).cloned() else {
            self.shown = None;
            return;
        };
        let found = self.found.as_ref().and_then(|found| found.plan.as_ref().ok());
        let plan = plan.or(found).unwrap_or(&draft.plan);
        if !self.shown.as_ref().is_some_and(|shown| shown.plan == *plan && Arc::ptr_eq(&shown.losses, &losses)) {
            let blocks = losses.blocks(plan, layout);
            self.shown = Some(Shown { losses, plan: plan.clone(), blocks });
        }
    }

    /// Whether losses are known for the plan on the screen.
    pub fn are_shown(&self) -> bool {
        self.shown.is_some()
    }

    /// What a block is predicted to lose under the plan on the screen, in nats a token.
    pub fn block(&self, index: usize) -> Option<f64> {
        self.shown.as_ref()?.blocks.get(index).copied().flatten()
    }

    /// The least and the most that a block loses under the plan on the screen, of those that lose something.
    pub fn range(&self) -> Option<[f64; 2]> {
        let losses = self.shown.iter().flat_map(|shown| &shown.blocks).copied().flatten().filter(|loss| *loss > 0.0);
        losses.fold(None, |range: Option<[f64; 2]>, loss| {
            let [low, high] = range.unwrap_or([loss, loss]);
            Some([low.min(loss), high.max(loss)])
        })
    }

    /// The first block whose loss under the plan on the screen is not known.
    pub fn unmeasured(&self) -> Option<usize> {
        self.shown.as_ref()?.blocks.iter().position(Option::is_none)
    }

    /// What `plan` of `draft` is predicted to lose; `None` where losses or one of its formats were not measured.
    pub fn predict(&self, layout: &Layout, draft: &Draft, plan: &Plan) -> Option<Predicted> {
        let losses = self.of(draft)?;
        let shown = self.shown.as_ref().filter(|shown| shown.plan == *plan && Arc::ptr_eq(&shown.losses, losses));
        let sum = match shown {
            Some(shown) => shown.blocks.iter().try_fold(losses.ends_kld, |sum, block| Some(sum + (*block)?))?,
            None => losses.predict(plan, layout)?,
        };
        let activations = Activations::of_plan(plan);
        let correction = Correction::learn(losses, activations);
        let kld = correction.map_or(sum, |correction| correction.apply(sum));
        let ends = [losses.identity.embedding, losses.identity.head];
        Some(Predicted {
            kld,
            interval: Correction::spread(losses, activations, correction).map(|spread| spread.map(|ratio| kld * ratio)),
            checks: checks_of(losses, activations).count(),
            other_ends: (ends != [plan.embedding, plan.head]).then_some(ends),
        })
    }

    /// Every plan that `request` allows; what differs in the budget only is solved once. Nothing while it is being solved, which
    /// [`Self::wanted`] asks for.
    pub fn solution<'a>(
        &mut self,
        losses: &'a Arc<Sensitivities>,
        layout: &'a Arc<Layout>,
        request: &AllocateRequest,
    ) -> Result<Option<Solution<'a>>> {
        if let Some(solved) = self.solved.as_ref().filter(|solved| solved.answers(losses, request)) {
            return Solution::with_front(losses, layout, request, Arc::clone(solved.front.as_ref().map_err(Clone::clone)?)).map(Some);
        }
        self.asked = Some(ToSolve { losses: Arc::clone(losses), layout: Arc::clone(layout), request: request.clone() });
        Ok(None)
    }
}
