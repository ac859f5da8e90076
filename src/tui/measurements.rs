//! [`Measurements`]: what was measured, found again by what made it.
//!
//! A result belongs to an [`Origin`], not to a variant's name: renaming, copying and undoing a variant keep its figures,
//! and an edit that comes back to a measured plan shows them at once.

use std::path::PathBuf;
use std::sync::Arc;

use super::document::Draft;
use crate::checkpoint::VariantManifest;
use crate::engine::AllocateJob;
use crate::eval::ModelResult;
use crate::eval::run::Evaluated;
use crate::eval::score::Sample;
use crate::format::{Format, Plan};
use crate::quant::{AllocateSpec, Override, Recipe, Steps};

/// What makes a variant what it is.
#[derive(Debug, Clone, PartialEq)]
pub struct Origin {
    pub steps: Steps,
    /// The plan; where it is found by measurement, its budget and the formats of embedding and head.
    pub plan: Plan,
    /// What the plan is found from: budget and formats, and the pins.
    pub allocate: Option<(AllocateSpec, Vec<Override>)>,
}

impl Origin {
    /// Of a variant of `recipe` whose `overrides` give `plan`.
    pub fn new(recipe: &Recipe, plan: &Plan, overrides: &[Override]) -> Self {
        let allocate = recipe.allocate.clone().map(|spec| (spec, AllocateJob::pins(overrides)));
        Self { steps: recipe.steps(), plan: plan.clone(), allocate }
    }

    /// Of a variant as it is edited.
    pub fn of(draft: &Draft) -> Self {
        Self::new(&draft.recipe, &draft.plan, &draft.overrides)
    }

    fn is_of(&self, draft: &Draft) -> bool {
        self.plan == draft.plan && *self == Self::of(draft)
    }
}

/// A variant that was quantized, and evaluated when there is a result.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurement {
    pub origin: Origin,
    /// The plan that it has: the origin's, or what was found.
    pub plan: Plan,
    pub path: PathBuf,
    /// Relative output error of each block.
    pub errors: Vec<f64>,
    pub result: Option<ModelResult>,
    /// The scored rows of the evaluation.
    pub samples: Arc<Vec<Sample>>,
}

/// Everything measured since the session was opened.
#[derive(Debug, Default, PartialEq)]
pub struct Measurements {
    pub base: Option<ModelResult>,
    pub base_samples: Arc<Vec<Sample>>,
    /// The latest last.
    rows: Vec<Measurement>,
}

impl Measurements {
    /// The measurement of what `origin` makes.
    pub fn find(&self, origin: &Origin) -> Option<&Measurement> {
        self.rows.iter().find(|row| row.origin == *origin)
    }

    /// The measurement of a draft.
    pub fn of(&self, draft: &Draft) -> Option<&Measurement> {
        self.rows.iter().find(|row| row.origin.is_of(draft))
    }

    /// Takes a variant on disk in. An earlier result of the same plan stays: the weights are the same.
    pub fn quantized(&mut self, origin: &Origin, path: PathBuf, manifest: &VariantManifest) {
        let plan = manifest.plan.clone();
        let known = self.find(origin).filter(|row| row.plan == plan);
        let (result, samples) = known.map(|row| (row.result.clone(), row.samples.clone())).unwrap_or_default();
        self.rows.retain(|row| row.origin != *origin);
        let mut errors = vec![0.0; plan.blocks.len()];
        for block in &manifest.blocks {
            if let Some(error) = errors.get_mut(block.index) {
                *error = block.error;
            }
        }
        self.rows.push(Measurement { origin: origin.clone(), plan, path, errors, result, samples });
    }

    /// Takes an evaluation in.
    pub fn evaluated(&mut self, origin: &Origin, evaluated: Evaluated) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.origin == *origin) {
            row.result = Some(evaluated.result);
            row.samples = Arc::new(evaluated.samples);
        }
    }

    /// Takes an evaluation of the unquantized model in.
    pub fn base_evaluated(&mut self, evaluated: Evaluated) {
        self.base = Some(evaluated.result);
        self.base_samples = Arc::new(evaluated.samples);
    }

    /// The error of a block under `plan`, which `draft` has or may get: measured (`true`), or taken from the latest plan in
    /// which the block had the same format among other neighbours (`false`).
    pub fn error(&self, draft: &Draft, plan: &Plan, block: usize) -> Option<(f64, bool)> {
        if let Some(row) = self.of(draft).filter(|row| row.plan == *plan) {
            return Some((*row.errors.get(block)?, true));
        }
        self.error_at(&draft.recipe.steps(), block, *plan.blocks.get(block)?).map(|error| (error, false))
    }

    /// The error of a block in the latest plan that gave it this format.
    pub fn error_at(&self, steps: &Steps, block: usize, format: Format) -> Option<f64> {
        let row = self.rows.iter().rfind(|row| row.origin.steps == *steps && row.plan.blocks.get(block) == Some(&format))?;
        row.errors.get(block).copied()
    }
}
