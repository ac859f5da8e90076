//! strata against lm-evaluation-harness 0.4.13, row by row on the embedded demo model: every log-likelihood within
//! [`TOLERANCE`], every `acc` and `acc_norm` exactly. A sample of the harness's figures on the demo's rows is in
//! `tests/data/harness.json`, those on rows written to be awkward are in `tests/data/odd.jsonl`; the whole of them is read from
//! `../shared/golden/lm-eval` where that is there.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

use std::path::{Path, PathBuf};

use serde::Deserialize;
use strata::backend::cpu::Cpu;
use strata::eval::score::Sample;
use strata::eval::{DataSource, EvaluateRequest, ModelToEvaluate, Task, evaluate};
use strata::monitor::Monitor;

/// Largest difference of a log-likelihood. Both sides compute in float32 from the same bf16 weights, in another order.
const TOLERANCE: f64 = 2e-3;

/// A row as the harness scored it.
#[derive(Debug, Deserialize)]
struct Expected {
    task: String,
    index: usize,
    loglikelihoods: Vec<f64>,
    /// The right choice; for winogrande the harness has the continuation here.
    gold: serde_json::Value,
    acc: f64,
    acc_norm: Option<f64>,
}

/// A path beside the crate, or `None` with the reason printed.
fn shared(path: &str) -> Option<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared").join(path);
    if !path.exists() {
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(path)
}

fn read(path: &Path) -> Vec<Expected> {
    std::fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The demo model's rows for the tasks of `expected`.
fn score(expected: &[Expected], data: DataSource, limit: Option<usize>) -> Vec<Sample> {
    let request = EvaluateRequest {
        models: vec![ModelToEvaluate { name: "base".into(), path: "demo".into() }],
        tasks: Task::ALL.into_iter().filter(|task| expected.iter().any(|row| row.task == task.name())).collect(),
        data,
        limit,
        windows: 0,
        ..EvaluateRequest::default()
    };
    let mut samples = Vec::new();
    evaluate(|| Cpu, &request, &Monitor::silent(), |evaluated| samples = evaluated.samples).unwrap();
    samples
}

fn compare(expected: &[Expected], samples: &[Sample]) {
    let mut largest = 0.0_f64;
    for row in expected {
        let own = samples.iter().find(|own| own.task == row.task && own.index == row.index);
        let own = own.unwrap_or_else(|| panic!("{} row {} was not scored", row.task, row.index));
        assert_eq!(own.loglikelihoods.len(), row.loglikelihoods.len(), "choices of {} row {}", row.task, row.index);
        for (choice, (own, harness)) in own.loglikelihoods.iter().zip(&row.loglikelihoods).enumerate() {
            let difference = (own - harness).abs();
            assert!(difference <= TOLERANCE, "{} row {} choice {choice}: {own}, the harness has {harness}", row.task, row.index);
            largest = largest.max(difference);
        }
        if let Some(gold) = row.gold.as_u64() {
            assert_eq!(own.gold as u64, gold, "right choice of {} row {}", row.task, row.index);
        }
        assert_eq!((own.acc, own.acc_norm), (row.acc, row.acc_norm), "acc, acc_norm of {} row {}", row.task, row.index);
    }
    eprintln!("{} rows, largest difference {largest:.1e}", expected.len());
}

#[test]
fn every_twentieth_demo_row_is_that_of_the_harness() {
    let expected: Vec<Expected> = serde_json::from_str(include_str!("data/harness.json")).unwrap();
    compare(&expected, &score(&expected, DataSource::Embedded, None));
}

#[test]
fn all_demo_rows_are_those_of_the_harness() {
    let Some(path) = shared("golden/lm-eval/demo.jsonl") else { return };
    let expected = read(&path);
    let samples = score(&expected, DataSource::Embedded, None);
    assert_eq!(samples.len(), expected.len());
    compare(&expected, &samples);
}

/// Numeric keys, three and five choices, brackets, `[title]`, double, leading and trailing spaces, empty strings, capitals,
/// newlines, accents.
#[test]
fn awkward_rows_are_those_of_the_harness() {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    let expected = read(&data.join("odd.jsonl"));
    let samples = score(&expected, DataSource::Directory(data.join("odd")), None);
    assert_eq!((expected.len(), samples.len()), (20, 20));
    compare(&expected, &samples);
}

#[test]
fn public_rows_are_those_of_the_harness() {
    let (Some(path), Some(data)) = (shared("golden/lm-eval/public.jsonl"), shared("data")) else { return };
    let expected = read(&path);
    compare(&expected, &score(&expected, DataSource::Directory(data), Some(40)));
}
