//! Means with standard errors, percentiles, and summaries of divergence.

use serde::{Deserialize, Serialize};

use crate::backend::Divergence;

/// Mean of `values`; 0 when there are none.
pub fn mean(values: &[f64]) -> f64 {
    if values.is_empty() { 0.0 } else { values.iter().sum::<f64>() / values.len() as f64 }
}

/// Standard error of the mean: sample standard deviation (n − 1) over √n, as lm-evaluation-harness reports it.
pub fn standard_error(values: &[f64]) -> f64 {
    let n = values.len() as f64;
    if n < 2.0 {
        return 0.0;
    }
    let mean = mean(values);
    (values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0) / n).sqrt()
}

/// The `share` quantile (0…1) of `sorted`, linear between neighbours as in NumPy; 0 when it is empty.
pub fn quantile(sorted: &[f64], share: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else { return 0.0 };
    let position = share * last as f64;
    let below = position.floor() as usize;
    let above = position.ceil() as usize;
    sorted[below] + (sorted[above] - sorted[below]) * (position - below as f64)
}

/// Median of `values`; 0 when there are none.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    quantile(&sorted, 0.5)
}

/// KL divergence over many tokens, in nats a token.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DivergenceSummary {
    pub mean: f64,
    pub median: f64,
    pub p99: f64,
    pub max: f64,
    /// Share of tokens where both models' most probable next token is the same.
    pub top1: f64,
    pub tokens: usize,
}

/// Summarizes the divergence of many rows.
pub fn summarize_divergence(rows: &[Divergence]) -> DivergenceSummary {
    let mut sorted: Vec<f64> = rows.iter().map(|row| row.kl).collect();
    sorted.sort_by(f64::total_cmp);
    DivergenceSummary {
        mean: mean(&sorted),
        median: quantile(&sorted, 0.5),
        p99: quantile(&sorted, 0.99),
        max: sorted.last().copied().unwrap_or(0.0),
        top1: mean(&rows.iter().map(|row| f64::from(u8::from(row.same_top))).collect::<Vec<_>>()),
        tokens: rows.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Values of scipy.stats.sem and numpy.percentile on the same input.
    #[test]
    fn agree_with_scipy_and_numpy() {
        let values = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0];
        assert!((standard_error(&values) - 0.202_030_508_910_442_1).abs() < 1e-12);
        let sorted = [0.1, 0.4, 0.5, 2.0, 9.0];
        assert!((quantile(&sorted, 0.99) - 8.72).abs() < 1e-12);
        assert!((median(&[9.0, 0.1, 0.5, 0.4]) - 0.45).abs() < 1e-12);
    }
}
