//! Means with standard errors, percentiles, and summaries of divergence.

use serde::{Deserialize, Serialize};

use crate::backend::Divergence;

/// Resamples of a bootstrap interval.
const RESAMPLES: usize = 10_000;

/// Share of the resampled means that the interval holds.
const CONFIDENCE: f64 = 0.95;

/// Seed of the resampling: the same values give the same interval.
const SEED: u64 = 0x5354_5241_5441;

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

/// Percentile bootstrap interval (95 %) of the mean of `values`: values are drawn with replacement. The same values give the
/// same interval.
pub fn bootstrap(values: &[f64]) -> [f64; 2] {
    let count = values.len();
    if count == 0 {
        return [0.0, 0.0];
    }
    let mut state = SEED;
    let mut draw = |_| values[((u128::from(split_mix(&mut state)) * count as u128) >> 64) as usize];
    let mut means: Vec<f64> = (0..RESAMPLES).map(|_| (0..count).map(&mut draw).sum::<f64>() / count as f64).collect();
    means.sort_unstable_by(f64::total_cmp);
    let tail = f64::midpoint(1.0, -CONFIDENCE);
    [quantile(&means, tail), quantile(&means, 1.0 - tail)]
}

/// Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014.
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// KL divergence over many tokens, in nats a token. What earlier versions did not keep is 0 when it is read.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DivergenceSummary {
    pub mean: f64,
    #[serde(default)]
    pub median: f64,
    #[serde(default)]
    pub p90: f64,
    #[serde(default)]
    pub p95: f64,
    pub p99: f64,
    #[serde(default)]
    pub p999: f64,
    #[serde(default)]
    pub max: f64,
    /// Share of tokens where both models' most probable next token is the same.
    pub top1: f64,
    /// Root of the mean square of the difference in probability that the models give to the token that follows.
    #[serde(default)]
    pub rms_probability: Option<f64>,
    pub tokens: usize,
}

impl DivergenceSummary {
    /// Whether it has the percentiles that earlier versions did not keep of decoding.
    pub fn has_percentiles(&self) -> bool {
        self.max > 0.0 || self.mean == 0.0
    }
}

/// How far a model is from itself when it computes less precisely: divergences near this say nothing about a variant.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NoiseFloor {
    /// What was rounded.
    pub rounding: String,
    pub kld: DivergenceSummary,
}

/// Summarizes the divergence of many rows.
pub fn summarize_divergence(rows: &[Divergence]) -> DivergenceSummary {
    let mut sorted: Vec<f64> = rows.iter().map(|row| row.kl).collect();
    sorted.sort_by(f64::total_cmp);
    DivergenceSummary {
        mean: mean(&sorted),
        median: quantile(&sorted, 0.5),
        p90: quantile(&sorted, 0.9),
        p95: quantile(&sorted, 0.95),
        p99: quantile(&sorted, 0.99),
        p999: quantile(&sorted, 0.999),
        max: sorted.last().copied().unwrap_or(0.0),
        top1: mean(&rows.iter().map(|row| f64::from(u8::from(row.same_top))).collect::<Vec<_>>()),
        rms_probability: None,
        tokens: rows.len(),
    }
}

/// Root of the mean squared difference between the probabilities whose logarithms are given.
pub fn rms_probability(reference: &[f64], other: &[f64]) -> f64 {
    mean(&reference.iter().zip(other).map(|(a, b)| (a.exp() - b.exp()).powi(2)).collect::<Vec<_>>()).sqrt()
}

/// Perplexity of one text in both usual conventions, over as many windows of as many tokens, which follow each other without
/// overlap.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Perplexity {
    /// As in the GPTQ papers: every token of a window but the first is scored. `null` where another program measured.
    pub gptq: Option<f64>,
    /// As in llama.cpp: the text is one stream of tokens, every window begins with the beginning of sequence in place of its
    /// first token, and the tokens of its second half are scored, so that each has half a window in front.
    pub llama_cpp: f64,
    /// Windows, and the tokens of each.
    pub windows: usize,
    pub window_tokens: usize,
}

/// Perplexity of tokens whose log-probabilities are given.
pub fn perplexity(scores: &[f64]) -> f64 {
    (-mean(scores)).exp()
}

impl Perplexity {
    /// From the log-probability of every token but the first of each window, and llama.cpp's figure.
    pub fn of(windows: &[Vec<f64>], llama_cpp: f64) -> Option<Self> {
        let window_tokens = windows.first()?.len() + 1;
        Some(Self { gptq: Some(perplexity(&windows.concat())), llama_cpp, windows: windows.len(), window_tokens })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scipy 1.17.1 and NumPy 2.4.6: `stats.sem([1, 0, 0, 1, 1, 1, 0])`, `np.percentile([0.1, 0.4, 0.5, 2, 9], 99)`,
    /// `np.median([9, 0.1, 0.5, 0.4])`.
    #[test]
    fn agree_with_scipy_and_numpy() {
        let values = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0];
        assert!((standard_error(&values) - 0.202_030_508_910_442_1).abs() < 1e-12);
        let sorted = [0.1, 0.4, 0.5, 2.0, 9.0];
        assert!((quantile(&sorted, 0.99) - 8.72).abs() < 1e-12);
        assert!((median(&[9.0, 0.1, 0.5, 0.4]) - 0.45).abs() < 1e-12);
    }

    #[test]
    fn perplexity_and_differences_of_probabilities_by_hand() {
        let windows = [vec![-1.0, -2.0, -3.0, -4.0], vec![-5.0, -6.0, -7.0, -8.0]];
        let found = Perplexity::of(&windows, 2.5).unwrap();
        assert!((found.gptq.unwrap().ln() - 4.5).abs() < 1e-12, "{found:?}");
        assert_eq!((found.windows, found.window_tokens, found.llama_cpp), (2, 5, 2.5));
        // ((0.5 − 0.25)² + (0.5 − 0.5)²) / 2, its root.
        let rms = rms_probability(&[0.5_f64.ln(), 0.5_f64.ln()], &[0.25_f64.ln(), 0.5_f64.ln()]);
        assert!((rms - 0.03125_f64.sqrt()).abs() < 1e-12);
    }

    /// numpy.percentile(numpy.arange(1001), [50, 90, 95, 99, 99.9]).
    #[test]
    fn divergence_percentiles_are_those_of_numpy() {
        let rows: Vec<Divergence> = (0..=1000).rev().map(|i| Divergence { kl: f64::from(i), same_top: i % 4 != 0 }).collect();
        let found = summarize_divergence(&rows);
        let percentiles = [found.median, found.p90, found.p95, found.p99, found.p999, found.max];
        for (found, expected) in percentiles.iter().zip([500.0, 900.0, 950.0, 990.0, 999.0, 1000.0]) {
            assert!((found - expected).abs() < 1e-9, "{found} {expected}");
        }
        assert!((found.top1 - 750.0 / 1001.0).abs() < 1e-12);
    }
}
