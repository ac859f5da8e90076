//! Comparison of two models on the same rows: which rows changed, whether that is more than chance (McNemar's test),
//! and how far the difference may reach (bootstrap). Start with [`compare`].

use std::collections::BTreeMap;
use std::f64::consts::FRAC_1_SQRT_2;

use serde::{Deserialize, Serialize};

use super::score::Sample;
use super::statistics;
use super::tasks::Task;

/// Changed rows below which McNemar's test is the exact binomial one: from here on the chi-squared distribution is close.
const EXACT_BELOW: usize = 25;

/// How the p-value was computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum McNemarTest {
    /// Two-sided binomial test of the changed rows against one half.
    Exact,
    /// (|b − c| − 1)² / (b + c) against chi-squared with one degree of freedom.
    ChiSquaredContinuity,
}

/// One model against another on the rows of a task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Paired {
    /// `acc` or `acc_norm`; `acc/acc_norm` for rows of several tasks.
    pub metric: String,
    pub rows: usize,
    pub right_to_wrong: usize,
    pub wrong_to_right: usize,
    /// Accuracy of the variant less that of the base, 0…1.
    pub difference: f64,
    /// Percentile bootstrap over rows, 95 %.
    pub interval: [f64; 2],
    pub p_value: f64,
    pub test: McNemarTest,
}

/// One variant against the base, by task and over all rows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    pub base: String,
    pub variant: String,
    pub tasks: BTreeMap<String, Paired>,
    /// All rows of all tasks together.
    pub all: Option<Paired>,
    pub flips: Vec<Flip>,
}

/// A row that one model has right and the other wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flip {
    pub task: String,
    pub index: usize,
    /// The right choice, and the choices of the two models.
    pub gold: usize,
    pub base: usize,
    pub variant: usize,
}

/// Compares the samples of two models; rows that only one of them has are left out.
pub fn compare(base: (&str, &[Sample]), variant: (&str, &[Sample])) -> Comparison {
    let known: BTreeMap<(&str, usize), &Sample> = base.1.iter().map(|sample| ((sample.task.as_str(), sample.index), sample)).collect();
    let mut outcomes: BTreeMap<String, (bool, Vec<(bool, bool)>)> = BTreeMap::new();
    let mut flips = Vec::new();
    for own in variant.1 {
        let Some(other) = known.get(&(own.task.as_str(), own.index)) else { continue };
        let normalized = own.task.parse::<Task>().is_ok_and(Task::quotes_acc_norm);
        let (before, after) = (other.is_right(normalized), own.is_right(normalized));
        outcomes.entry(own.task.clone()).or_insert((normalized, Vec::new())).1.push((before, after));
        if before != after {
            let (base, variant) = (other.choice(normalized), own.choice(normalized));
            flips.push(Flip { task: own.task.clone(), index: own.index, gold: own.gold, base, variant });
        }
    }
    let everything: Vec<(bool, bool)> = outcomes.values().flat_map(|(_, rows)| rows).copied().collect();
    let tasks: BTreeMap<String, Paired> = outcomes
        .into_iter()
        .map(|(task, (normalized, rows))| (task, Paired::of(if normalized { "acc_norm" } else { "acc" }, &rows)))
        .collect();
    Comparison {
        base: base.0.to_owned(),
        variant: variant.0.to_owned(),
        all: (tasks.len() > 1).then(|| Paired::of("acc/acc_norm", &everything)),
        tasks,
        flips,
    }
}

impl Paired {
    /// Statistics of rows of (base is right, variant is right).
    pub fn of(metric: &str, rows: &[(bool, bool)]) -> Self {
        let right_to_wrong = rows.iter().filter(|(before, after)| *before && !after).count();
        let wrong_to_right = rows.iter().filter(|(before, after)| !before && *after).count();
        let (p_value, test) = mcnemar(right_to_wrong, wrong_to_right);
        let differences: Vec<f64> = rows.iter().map(|(before, after)| f64::from(i8::from(*after) - i8::from(*before))).collect();
        Self {
            metric: metric.into(),
            rows: rows.len(),
            right_to_wrong,
            wrong_to_right,
            difference: (wrong_to_right as f64 - right_to_wrong as f64) / rows.len().max(1) as f64,
            interval: statistics::bootstrap(&differences),
            p_value,
            test,
        }
    }
}

/// McNemar's test (Psychometrika 12, 1947) of `b` rows that changed one way and `c` that changed the other.
pub fn mcnemar(b: usize, c: usize) -> (f64, McNemarTest) {
    let changed = b + c;
    if changed < EXACT_BELOW {
        // Twice the smaller tail of the binomial distribution of `changed` fair coins.
        let mut term = 0.5_f64.powi(changed as i32);
        let mut tail = term;
        for k in 0..b.min(c) {
            term *= (changed - k) as f64 / (k + 1) as f64;
            tail += term;
        }
        return ((2.0 * tail).min(1.0), McNemarTest::Exact);
    }
    let distance = (b.abs_diff(c) as f64 - 1.0).max(0.0);
    let statistic = distance * distance / changed as f64;
    (libm::erfc(statistic.sqrt() * FRAC_1_SQRT_2), McNemarTest::ChiSquaredContinuity)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// scipy 1.17.1: `stats.binomtest(b, b + c).pvalue`, and from 25 changed rows on
    /// `stats.chi2.sf((abs(b - c) - 1)**2 / (b + c), 1)`; statsmodels 0.15.0's `mcnemar` gives the same.
    #[test]
    fn mcnemar_agrees_with_scipy() {
        use McNemarTest::{ChiSquaredContinuity, Exact};
        for (b, c, p, test) in [
            (3, 9, 0.145_996_093_75, Exact),
            (0, 4, 0.125, Exact),
            (12, 12, 1.0, Exact),
            (14, 10, 0.541_256_189_346_313_5, Exact),
            (15, 11, 0.556_298_461_274_734_8, ChiSquaredContinuity),
            (30, 11, 0.004_936_818_556_325_073, ChiSquaredContinuity),
            (120, 90, 0.045_371_905_065_838_63, ChiSquaredContinuity),
            (0, 0, 1.0, Exact),
        ] {
            let (found, how) = mcnemar(b, c);
            assert!((found - p).abs() < 1e-12 && how == test, "{b}, {c}: {found} {how:?}");
        }
    }

    /// scipy 1.17.1 on the same 400 differences: `bootstrap((d,), np.mean, n_resamples=10000, method='percentile',
    /// confidence_level=0.95, random_state=s)` gives (−0.115, −0.055) for s = 0 and 1, (−0.1175, −0.055) for 2.
    #[test]
    fn bootstrap_agrees_with_scipy() {
        let rows: Vec<(bool, bool)> = (0..400).map(|i| ((i * 7) % 10 < 7, (i * 7) % 10 < 6 || i % 23 == 0)).collect();
        let paired = Paired::of("acc", &rows);
        assert_eq!((paired.right_to_wrong, paired.wrong_to_right), (38, 4));
        assert!((paired.difference + 0.085).abs() < 1e-12);
        // Another stream of random numbers moves an end by one row at most.
        assert!((paired.interval[0] + 0.115).abs() <= 0.0025 + 1e-12, "{:?}", paired.interval);
        assert!((paired.interval[1] + 0.055).abs() <= 0.0025 + 1e-12, "{:?}", paired.interval);
        assert_eq!(Paired::of("acc", &rows).interval, paired.interval);
    }

    #[test]
    fn rows_are_paired_by_task_and_index() {
        let sample = |task: &str, index, scores: [f64; 2], acc| Sample {
            task: task.into(),
            index,
            loglikelihoods: scores.to_vec(),
            lengths: vec![1, 10],
            gold: 0,
            acc,
            acc_norm: None,
        };
        let base = [sample("piqa", 0, [-1.0, -2.0], 1.0), sample("piqa", 2, [-1.0, -2.0], 1.0), sample("winogrande", 0, [-1.0, -2.0], 1.0)];
        let variant = [sample("piqa", 2, [-3.0, -2.0], 0.0), sample("winogrande", 0, [-1.0, -2.0], 1.0)];
        let comparison = compare(("base", &base), ("phase2", &variant));
        assert_eq!(comparison.flips, [Flip { task: "piqa".into(), index: 2, gold: 0, base: 0, variant: 1 }]);
        assert_eq!((comparison.tasks["piqa"].rows, comparison.tasks["piqa"].right_to_wrong), (1, 1));
        assert_eq!(comparison.all.unwrap().rows, 2);
    }
}
