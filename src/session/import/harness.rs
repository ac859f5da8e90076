//! A `results_*.json` of lm-evaluation-harness, as a record.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use super::super::store::{RECORD_SCHEMA, Record, utc};
use super::HARNESS;
use crate::error::{Error, Result};
use crate::eval::ModelResult;
use crate::eval::result::Evidence;
use crate::eval::score::TaskScore;
use crate::eval::tasks::Task;

/// What is read of `results_*.json`.
#[derive(Deserialize)]
struct HarnessFile {
    results: BTreeMap<String, BTreeMap<String, Value>>,
    #[serde(default)]
    model_name: Option<String>,
    #[serde(default, rename = "n-samples")]
    samples: BTreeMap<String, HarnessRows>,
    #[serde(default)]
    config: BTreeMap<String, Value>,
    /// Seconds since 1970.
    #[serde(default)]
    date: f64,
}

#[derive(Deserialize)]
struct HarnessRows {
    effective: usize,
}

/// The record of a result file of lm-evaluation-harness. Tasks without an accuracy are left out.
pub fn record(bytes: &[u8], origin: &str) -> Result<Record> {
    let file: HarnessFile = serde_json::from_slice(bytes).map_err(|error| {
        Error::input(format!("{origin} is not a result file of lm-evaluation-harness: {error}"))
            .hint("give the results_*.json or samples_*.jsonl that `lm_eval` writes, or the output of llama-perplexity")
    })?;
    let mut tasks = BTreeMap::new();
    for (name, metrics) in &file.results {
        let metric = |metric: &str| metrics.get(&format!("{metric},none")).and_then(Value::as_f64);
        let Some(acc) = metric("acc") else { continue };
        let (acc_stderr, acc_norm_stderr) = (metric("acc_stderr"), metric("acc_norm_stderr"));
        let quoted = acc_norm_stderr.filter(|_| name.parse().is_ok_and(Task::quotes_acc_norm)).or(acc_stderr);
        let score = TaskScore {
            acc,
            acc_norm: metric("acc_norm"),
            acc_stderr,
            acc_norm_stderr,
            stderr: quoted.unwrap_or(0.0),
            rows: file.samples.get(name).map_or(0, |rows| rows.effective),
            truncated: 0,
            skipped: 0,
        };
        tasks.insert(name.clone(), score);
    }
    if tasks.is_empty() {
        return Err(Error::input(format!("{origin} has no task with an accuracy")));
    }
    let text = |key: &str| file.config.get(key).map(|value| value.as_str().map_or_else(|| value.to_string(), str::to_owned));
    let model = file.model_name.clone().or_else(|| text("model_args")).unwrap_or_else(|| origin.to_owned());
    let variant = model.trim_end_matches('/').rsplit('/').next().unwrap_or(&model).to_owned();
    let result = ModelResult {
        model,
        variant,
        tasks,
        provenance: Evidence {
            tool: HARNESS.into(),
            backend: text("device").unwrap_or_default(),
            limit: file.config.get("limit").and_then(Value::as_f64).map(|limit| limit as usize),
            ..Evidence::default()
        },
        ..ModelResult::default()
    };
    Ok(Record { schema: RECORD_SCHEMA.into(), time: utc(file.date as u64), source: HARNESS.into(), session: None, result })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shape that lm-evaluation-harness 0.4 writes.
    const FILE: &str = r#"{
        "results": {
            "arc_easy": {"alias": "arc_easy", "acc,none": 0.53, "acc_stderr,none": 0.02, "acc_norm,none": 0.5, "acc_norm_stderr,none": 0.03},
            "wikitext": {"alias": "wikitext", "word_perplexity,none": 12.5, "word_perplexity_stderr,none": "N/A"},
            "winogrande": {"alias": "winogrande", "acc,none": 0.75, "acc_stderr,none": 0.01}
        },
        "n-samples": {"arc_easy": {"original": 2376, "effective": 100}},
        "config": {"model": "hf", "model_args": "pretrained=org/model", "device": "cuda:0", "limit": 100.0},
        "model_name": "org/model", "date": 951827696.25, "git_hash": null
    }"#;

    #[test]
    fn a_result_file_of_the_harness_becomes_a_record() {
        let record = record(FILE.as_bytes(), "results.json").unwrap();
        assert_eq!((record.time.as_str(), record.source.as_str()), ("2000-02-29T12:34:56Z", "lm-evaluation-harness"));
        assert_eq!((record.result.model.as_str(), record.result.variant.as_str()), ("org/model", "model"));
        assert_eq!(record.result.tasks.keys().collect::<Vec<_>>(), ["arc_easy", "winogrande"]);
        let arc = record.result.tasks["arc_easy"];
        assert_eq!((arc.acc, arc.acc_norm, arc.rows), (0.53, Some(0.5), 100));
        assert_eq!((arc.acc_stderr, arc.acc_norm_stderr, arc.stderr), (Some(0.02), Some(0.03), 0.02), "arc_easy quotes acc");
        let winogrande = record.result.tasks["winogrande"];
        assert_eq!((winogrande.acc_norm_stderr, winogrande.headline_stderr(Task::Winogrande)), (None, Some(0.01)));
        assert_eq!(record.result.provenance.limit, Some(100));
    }

    #[test]
    fn other_files_are_refused() {
        assert!(record(b"{}", "x.json").unwrap_err().message.contains("x.json is not a result file"));
        assert!(record(br#"{"results": {"wikitext": {}}}"#, "x.json").unwrap_err().message.contains("no task"));
    }
}
