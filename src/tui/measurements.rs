//! [`Measurements`]: what was measured, found again by the plan that it was measured of.
//!
//! A result belongs to a plan and a rounding method, not to a variant's name: renaming, copying and undoing a variant
//! keep its figures, and an edit that comes back to a measured plan shows them at once.

use std::path::PathBuf;
use std::sync::Arc;

use super::document::Draft;
use crate::checkpoint::VariantManifest;
use crate::eval::ModelResult;
use crate::eval::run::Evaluated;
use crate::eval::score::Sample;
use crate::format::{Format, Plan};
use crate::quant::Steps;

/// A variant that was quantized, and evaluated when there is a result.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurement {
    pub steps: Steps,
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
    /// The measurement of this plan.
    pub fn find(&self, steps: &Steps, plan: &Plan) -> Option<&Measurement> {
        self.rows.iter().find(|row| row.steps == *steps && row.plan == *plan)
    }

    /// The measurement of a draft. The plan of one whose formats are left to measurement is a budget, and has none.
    pub fn of(&self, draft: &Draft) -> Option<&Measurement> {
        if draft.recipe.allocate.is_some() { None } else { self.find(&draft.recipe.steps(), &draft.plan) }
    }

    /// Takes a variant on disk in. An earlier result of the same plan stays: the weights are the same.
    pub fn quantized(&mut self, steps: &Steps, plan: Plan, path: PathBuf, manifest: &VariantManifest) {
        let (result, samples) = self.find(steps, &plan).map(|row| (row.result.clone(), row.samples.clone())).unwrap_or_default();
        self.rows.retain(|row| row.steps != *steps || row.plan != plan);
        let mut errors = vec![0.0; plan.blocks.len()];
        for block in &manifest.blocks {
            if let Some(error) = errors.get_mut(block.index) {
                *error = block.error;
            }
        }
        self.rows.push(Measurement { steps: steps.clone(), plan, path, errors, result, samples });
    }

    /// Takes an evaluation in.
    pub fn evaluated(&mut self, steps: &Steps, plan: &Plan, evaluated: Evaluated) {
        if let Some(row) = self.rows.iter_mut().find(|row| row.steps == *steps && row.plan == *plan) {
            row.result = Some(evaluated.result);
            row.samples = Arc::new(evaluated.samples);
        }
    }

    /// Takes an evaluation of the unquantized model in.
    pub fn base_evaluated(&mut self, evaluated: Evaluated) {
        self.base = Some(evaluated.result);
        self.base_samples = Arc::new(evaluated.samples);
    }

    /// The error of a block under `plan`: measured (`true`), or taken from the latest plan in which the block had the
    /// same format among other neighbours (`false`).
    pub fn error(&self, steps: &Steps, plan: &Plan, block: usize) -> Option<(f64, bool)> {
        if let Some(row) = self.find(steps, plan) {
            return Some((*row.errors.get(block)?, true));
        }
        self.error_at(steps, block, *plan.blocks.get(block)?).map(|error| (error, false))
    }

    /// The error of a block in the latest plan that gave it this format.
    pub fn error_at(&self, steps: &Steps, block: usize, format: Format) -> Option<f64> {
        let row = self.rows.iter().rfind(|row| row.steps == *steps && row.plan.blocks.get(block) == Some(&format))?;
        row.errors.get(block).copied()
    }
}
