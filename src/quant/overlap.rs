//! Calibration text is never evaluation text: what a model is tuned on says nothing about it.
//!
//! A calibration file with the content of an evaluation file is refused, and so is a sample that shares runs of 13 tokens
//! with one (the length that GPT-3's authors took for contamination). The demo's own calibration text is let through: it
//! is drawn apart from the demo's evaluation text by one generator of short sentences, whose phrases recur by design.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::Sample;
use crate::checkpoint::{Checkpoint, DEMO_CALIBRATION, DEMO_HELDOUT, DEMO_TASKS};
use crate::error::{Error, Result};
use crate::eval::text;

/// Tokens of a run that two texts must not share.
const RUN: usize = 13;

/// What a variant will be evaluated on, as far as it is known when it is made. The rows and the held-out text compiled
/// in always count.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct EvaluationFiles {
    /// Text for perplexity and divergence.
    pub text: Option<PathBuf>,
    /// Folder with a JSON-lines file a task.
    pub data: Option<PathBuf>,
}

impl EvaluationFiles {
    /// Name and content of each.
    fn contents(&self) -> Result<Vec<(String, String)>> {
        let mut files = vec![("the demo's held-out text".to_owned(), DEMO_HELDOUT.to_owned())];
        files.extend(DEMO_TASKS.iter().map(|(task, rows)| (format!("the demo's {task}"), (*rows).to_owned())));
        let mut add = |path: &Path| -> Result<()> {
            files.push((path.display().to_string(), text::read(path)?));
            Ok(())
        };
        self.text.iter().try_for_each(|path| add(path))?;
        if let Some(folder) = &self.data {
            let entries = std::fs::read_dir(folder).map_err(|error| Error::io("reading", folder, &error))?;
            let mut paths: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).collect();
            paths.sort();
            paths.iter().filter(|path| path.extension().is_some_and(|end| end == "jsonl")).try_for_each(|path| add(path))?;
        }
        Ok(files)
    }
}

/// An error when `sample`, cut from the text `content`, is evaluation text; the runs that it shares are counted.
pub fn check(checkpoint: &Checkpoint, content: &str, sample: &Sample, evaluation: &EvaluationFiles) -> Result<()> {
    if content == DEMO_CALIBRATION {
        return Ok(());
    }
    let hint = "give another calibration text; --allow-overlap calibrates on it all the same";
    let files = evaluation.contents()?;
    if let Some((name, _)) = files.iter().find(|(_, other)| other == content) {
        return Err(Error::input(format!("the calibration text is {name}, which is evaluated on")).hint(hint));
    }
    let tokenizer = checkpoint.tokenizer()?;
    let learnt: HashSet<&[u32]> = sample.sequences.iter().flat_map(|ids| ids.windows(RUN)).collect();
    for (name, content) in &files {
        let mut shared = 0;
        for piece in pieces(content) {
            shared += text::encode(&tokenizer, &piece, false)?.windows(RUN).filter(|run| learnt.contains(run)).count();
        }
        if shared > 0 {
            return Err(Error::input(format!(
                "the calibration text shares {shared} runs of {RUN} tokens with {name}, which is evaluated on"
            ))
            .hint(hint));
        }
    }
    Ok(())
}

/// The texts in a file: the strings of its JSON lines, or its documents.
fn pieces(content: &str) -> Vec<String> {
    let rows: Option<Vec<Value>> =
        content.lines().filter(|line| !line.trim().is_empty()).map(|line| serde_json::from_str(line).ok()).collect();
    let mut texts = Vec::new();
    match rows {
        Some(rows) => rows.iter().for_each(|row| strings(row, &mut texts)),
        None => texts.extend(content.split("\n\n").map(str::to_owned)),
    }
    texts
}

fn strings(value: &Value, into: &mut Vec<String>) {
    match value {
        Value::String(text) => into.push(text.clone()),
        Value::Array(values) => values.iter().for_each(|value| strings(value, into)),
        Value::Object(fields) => fields.values().for_each(|value| strings(value, into)),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::open;
    use crate::quant::SampleSpec;

    fn checked(content: &str, evaluation: &EvaluationFiles) -> Result<()> {
        let demo = open("demo").unwrap();
        let folder = tempfile::TempDir::new().unwrap();
        let path = folder.path().join("calibration.txt");
        std::fs::write(&path, content).unwrap();
        let spec = SampleSpec { source: path.display().to_string(), sequences: 2, length: 64, ..SampleSpec::default() };
        check(&demo, content, &Sample::load(&demo, &spec).unwrap(), evaluation)
    }

    #[test]
    fn evaluation_text_is_refused_whole_and_in_part() {
        let none = EvaluationFiles::default();
        assert!(checked(DEMO_HELDOUT, &none).unwrap_err().message.contains("is the demo's held-out text"));
        let part: String = DEMO_HELDOUT.chars().skip(1000).take(4000).collect();
        let error = checked(&part, &none).unwrap_err();
        assert!(error.message.contains("runs of 13 tokens with the demo's held-out text"), "{error}");
        assert!(checked(DEMO_CALIBRATION, &none).is_ok());
    }

    #[test]
    fn files_of_a_session_count_too() {
        let folder = tempfile::TempDir::new().unwrap();
        let words: Vec<String> = (0..400).map(|i| format!("w{}", i * 7919 % 1000)).collect();
        let own = words.join(" ");
        std::fs::write(folder.path().join("piqa.jsonl"), format!("{{\"goal\": \"{own}\"}}")).unwrap();
        assert!(checked(&own, &EvaluationFiles::default()).is_ok());
        let error = checked(&own, &EvaluationFiles { data: Some(folder.path().to_owned()), text: None }).unwrap_err();
        assert!(error.message.contains("piqa.jsonl"), "{error}");
    }
}
