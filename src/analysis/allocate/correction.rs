//! What plans that were put together and measured say about the sum of losses.

use serde::Serialize;

use super::Activations;
use crate::analysis::sensitivity::{Check, Sensitivities};

/// Checked plans with these activation bits: how far losses of int8 activations add up says nothing of other plans.
pub fn checks_of(losses: &Sensitivities, activations: Activations) -> impl Iterator<Item = &Check> {
    losses.checks.iter().filter(move |check| activations == Activations::Any || Activations::of_plan(&check.plan) == activations)
}

/// Maps the sum of losses to the divergence that such plans were measured to have: `measured = scale · predictedᵖ`, fitted
/// to the checks by least squares of logarithms. It is monotone, so it moves no plan, only what plans are said to lose.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Correction {
    pub scale: f64,
    pub power: f64,
}

/// A mean deviation (of logarithms) of measured from predicted below this needs no correction.
const TOLERATED: f64 = 0.05;

impl Correction {
    /// From plans with these activation bits; `None` where predictions hold or fewer than three were checked.
    pub fn learn(losses: &Sensitivities, activations: Activations) -> Option<Self> {
        let points: Vec<(f64, f64)> = checks_of(losses, activations)
            .filter(|check| check.predicted > 0.0 && check.measured > 0.0)
            .map(|check| (check.predicted.ln(), check.measured.ln()))
            .collect();
        let n = points.len() as f64;
        let off = points.iter().map(|(x, y)| (y - x).abs()).sum::<f64>() / n.max(1.0);
        if points.len() < 3 || off < TOLERATED {
            return None;
        }
        let (mean_x, mean_y) = (points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n);
        let variance: f64 = points.iter().map(|(x, _)| (x - mean_x).powi(2)).sum();
        let covariance: f64 = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y)).sum();
        let power = if variance > 0.0 && covariance > 0.0 { covariance / variance } else { 1.0 };
        Some(Self { scale: (mean_y - power * mean_x).exp(), power })
    }

    /// The least and the most that checked plans with these activation bits lost, as multiples of what they were expected to
    /// (with `correction`, where one was learned).
    pub fn spread(losses: &Sensitivities, activations: Activations, correction: Option<Self>) -> Option<[f64; 2]> {
        let expected = |predicted| correction.map_or(predicted, |correction: Self| correction.apply(predicted));
        let ratios =
            checks_of(losses, activations).map(|check| check.measured / expected(check.predicted)).filter(|ratio| ratio.is_finite());
        ratios.fold(None, |range: Option<[f64; 2]>, ratio| {
            let [low, high] = range.unwrap_or([ratio, ratio]);
            Some([low.min(ratio), high.max(ratio)])
        })
    }

    /// What a plan with this sum of losses is expected to lose.
    pub fn apply(self, predicted: f64) -> f64 {
        self.scale * predicted.powf(self.power)
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{layout, losses, request};
    use super::super::{Budget, allocate};
    use super::*;
    use crate::format::{Format, Plan};

    #[test]
    fn a_correction_is_learned_only_where_predictions_are_off() {
        let layout = layout();
        let mut losses = losses(&layout);
        let plan = |format| Plan { blocks: vec![format; 12], ..Plan::unquantized(12) };
        let check = |predicted: f64, measured| Check { plan: plan(Format::W4A8), predicted, measured, stderr: 0.0 };
        losses.checks = [1e-5, 1e-4, 1e-3].map(|predicted| check(predicted, predicted * 1.02)).to_vec();
        assert_eq!(Correction::learn(&losses, Activations::Int8), None);
        losses.checks = [1e-5_f64, 1e-4, 1e-3].map(|predicted| check(predicted, 3.0 * predicted.powf(1.1))).to_vec();
        let learned = Correction::learn(&losses, Activations::Int8).unwrap();
        assert!((learned.scale - 3.0).abs() < 1e-9 && (learned.power - 1.1).abs() < 1e-12, "{learned:?}");
        // The ceiling is on the corrected prediction.
        let found = allocate(&losses, &layout, &request(&layout, Budget::Kld(2e-4))).unwrap();
        assert!(found.corrected_kld <= 2e-4 && found.corrected_kld > 1e-4, "{}", found.corrected_kld);
        // What was learned of plans with int8 activations says nothing of others.
        assert_eq!(Correction::learn(&losses, Activations::Float), None);
        losses.checks.extend([1e-5, 1e-4, 1e-3].map(|predicted| Check { plan: plan(Format::W4A16), ..check(predicted, 2.0 * predicted) }));
        assert!((Correction::learn(&losses, Activations::Float).unwrap().scale - 2.0).abs() < 1e-9);
        assert_eq!(Correction::learn(&losses, Activations::Int8), Some(learned));
        assert_eq!(checks_of(&losses, Activations::Any).count(), 6);
        losses.checks.truncate(2);
        assert_eq!(Correction::learn(&losses, Activations::Int8), None);
    }
}
