//! Mixture-of-experts routing on the CPU.

use crate::backend::{Assignment, RouterShape};

/// See [`crate::backend::Backend::route`].
pub fn assign(raw: &[f32], correction: &[f32], shape: &RouterShape) -> Vec<Assignment> {
    let mut assigned = vec![Assignment::default(); shape.experts];
    for (token, raw) in raw.chunks_exact(shape.experts).enumerate() {
        for (expert, weight) in route(raw, correction, shape) {
            assigned[expert].tokens.push(token);
            assigned[expert].weights.push(weight);
        }
    }
    assigned
}

/// The experts of one token with their weights.
fn route(raw: &[f32], correction: &[f32], shape: &RouterShape) -> Vec<(usize, f32)> {
    let scores: Vec<f32> = raw.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect();
    let mut choice: Vec<f32> = scores.iter().zip(correction).map(|(score, correction)| score + correction).collect();
    let size = shape.experts / shape.groups;
    if shape.top_groups < shape.groups {
        let group_scores: Vec<f32> =
            choice.chunks_exact(size).map(|group| largest(group, 2).into_iter().map(|expert| group[expert]).sum()).collect();
        let kept = largest(&group_scores, shape.top_groups);
        for (group, choice) in choice.chunks_exact_mut(size).enumerate() {
            if !kept.contains(&group) {
                choice.fill(f32::NEG_INFINITY);
            }
        }
    }
    let chosen = largest(&choice, shape.experts_per_token);
    let total: f32 = if shape.normalize { chosen.iter().map(|expert| scores[*expert]).sum::<f32>() + 1e-20 } else { 1.0 };
    chosen.into_iter().map(|expert| (expert, scores[expert] / total * shape.scaling)).collect()
}

/// Indices of the `count` largest values, the first of equals first.
fn largest(values: &[f32], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|a, b| values[*b].total_cmp(&values[*a]));
    order.truncate(count);
    order
}
