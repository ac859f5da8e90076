//! A `samples_*.jsonl` of lm-evaluation-harness, as a record: the accuracies of its rows.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::super::store::{RECORD_SCHEMA, Record, utc};
use super::HARNESS;
use crate::error::{Error, Result};
use crate::eval::ModelResult;
use crate::eval::result::Evidence;
use crate::eval::score::TaskScore;

/// What is read of a line.
#[derive(Deserialize)]
struct Row {
    doc_id: u64,
    acc: f64,
    #[serde(default)]
    acc_norm: Option<f64>,
}

/// The record of `lines`, the content of `path`: named `samples_TASK_TIME.jsonl` in a folder named after the model.
/// `seconds` since 1970 is when it was written.
pub fn record(lines: &str, path: &Path, seconds: u64) -> Result<Record> {
    let origin = path.display();
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    let task = stem.strip_prefix("samples_").map(|rest| rest.rsplit_once('_').map_or(rest, |(task, _)| task));
    let task = task.ok_or_else(|| {
        Error::input(format!("{origin} is not named samples_TASK_TIME.jsonl, so that its task is not known"))
            .hint("keep the name that `lm_eval --log_samples` gave it")
    })?;
    let mut rows = BTreeMap::new();
    for (number, line) in lines.lines().enumerate().filter(|(_, line)| !line.trim().is_empty()) {
        let row: Row = serde_json::from_str(line).map_err(|error| {
            Error::input(format!("{origin}, line {}: {error}", number + 1)).hint("give a file that `lm_eval --log_samples` wrote")
        })?;
        // A row appears once for each filter of its task.
        rows.insert(row.doc_id, row);
    }
    if rows.is_empty() {
        return Err(Error::input(format!("{origin} has no rows")));
    }
    let acc: Vec<f64> = rows.values().map(|row| row.acc).collect();
    let acc_norm: Option<Vec<f64>> = rows.values().map(|row| row.acc_norm).collect();
    let model = path.parent().and_then(Path::file_name).map_or_else(|| stem.clone(), |name| name.to_string_lossy()).replace("__", "/");
    let result = ModelResult {
        variant: model.rsplit('/').next().unwrap_or(&model).to_owned(),
        model,
        tasks: BTreeMap::from([(task.to_owned(), TaskScore::of(task, &acc, acc_norm.as_deref()))]),
        provenance: Evidence { tool: HARNESS.into(), ..Evidence::default() },
        ..ModelResult::default()
    };
    Ok(Record { schema: RECORD_SCHEMA.into(), time: utc(seconds), source: HARNESS.into(), session: None, result })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_samples_file_are_counted_once() {
        let path = Path::new("out/nvidia__Nemotron-H-8B/samples_arc_easy_2026-01-02T03-04-05.678.jsonl");
        let line =
            |id, acc, norm| format!("{{\"doc_id\": {id}, \"doc\": {{}}, \"target\": \"1\", \"acc\": {acc}, \"acc_norm\": {norm}}}\n");
        let lines = [line(0, 1.0, 0.0), line(1, 0.0, 0.0), line(2, 1.0, 1.0), line(2, 1.0, 1.0), line(3, 0.0, 0.0)].concat();
        let record = record(&lines, path, 0).unwrap();
        assert_eq!((record.result.model.as_str(), record.result.variant.as_str()), ("nvidia/Nemotron-H-8B", "Nemotron-H-8B"));
        let score = record.result.tasks["arc_easy"];
        assert_eq!((score.acc, score.acc_norm, score.rows), (0.5, Some(0.25), 4));
        // scipy.stats.sem([1, 0, 1, 0]) and scipy.stats.sem([0, 0, 1, 0]); arc_easy quotes acc.
        let error = 0.288_675_134_594_812_9;
        assert!((score.acc_stderr.unwrap() - error).abs() < 1e-12 && (score.acc_norm_stderr.unwrap() - 0.25).abs() < 1e-12);
        assert_eq!(Some(score.stderr), score.acc_stderr);
    }

    #[test]
    fn other_names_and_rows_are_refused() {
        let refused = |lines: &str, path: &str| record(lines, Path::new(path), 0).unwrap_err().message;
        assert!(refused("", "rows.jsonl").contains("samples_TASK_TIME"));
        assert!(refused("{\"doc_id\": 1}", "samples_piqa_1.jsonl").contains("line 1: missing field `acc`"));
        assert!(refused("", "samples_piqa_1.jsonl").contains("has no rows"));
    }
}
