//! Log-likelihoods of continuations, and the accuracies that follow from them.

use serde::{Deserialize, Serialize};

use super::encoded::{Request, TaskRequests};
use super::journal::Journal;
use super::prefix::{self, PrefixTree};
use super::statistics;
use super::tasks::{Question, Task};
use crate::backend::Backend;
use crate::error::Result;
use crate::model::{Batch, HEAD_VALUES, Outputs, Reader, Rounding};
use crate::monitor::Monitor;

/// Tokens of a batch, at most (one longer sequence makes a batch of its own).
pub const BATCH_TOKENS: usize = 4096;

/// Batches that go through a model which is read block by block at once. They are noted together behind its last block, so
/// that is what a kill costs; fewer would read the blocks more often.
const STREAMED_BATCHES: usize = 32;

/// One scored row, as `--samples` writes it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Sample {
    pub task: String,
    pub index: usize,
    pub loglikelihoods: Vec<f64>,
    /// Characters of each choice.
    pub lengths: Vec<usize>,
    pub gold: usize,
    pub acc: f64,
    /// `null` where the task has none.
    pub acc_norm: Option<f64>,
}

impl Sample {
    /// The choice that the model prefers, by log-likelihood or by log-likelihood over characters.
    pub fn choice(&self, normalized: bool) -> usize {
        if normalized { argmax(&normalize(&self.loglikelihoods, &self.lengths)) } else { argmax(&self.loglikelihoods) }
    }

    /// Whether the row counts as right by that measure.
    pub fn is_right(&self, normalized: bool) -> bool {
        self.acc_norm.filter(|_| normalized).unwrap_or(self.acc) > 0.5
    }
}

/// Log-likelihoods divided by the characters of the choices.
fn normalize(loglikelihoods: &[f64], lengths: &[usize]) -> Vec<f64> {
    loglikelihoods.iter().zip(lengths).map(|(score, length)| score / *length as f64).collect()
}

/// Accuracy over the rows of a task.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    pub acc: f64,
    pub acc_norm: Option<f64>,
    /// Standard error of `acc`; `null` where another program gave none.
    #[serde(default)]
    pub acc_stderr: Option<f64>,
    #[serde(default)]
    pub acc_norm_stderr: Option<f64>,
    /// Standard error of the accuracy that is quoted; in results without the two above, of acc_norm where the task has it.
    pub stderr: f64,
    pub rows: usize,
    /// Continuations whose context was cut from the left to fit the model.
    pub truncated: usize,
    /// Rows that could not be used and were left out.
    #[serde(default)]
    pub skipped: usize,
}

impl TaskScore {
    /// The score of a task of this name from the outcomes (0 or 1) of its rows.
    pub fn of(name: &str, acc: &[f64], acc_norm: Option<&[f64]>) -> Self {
        let acc_stderr = statistics::standard_error(acc);
        let acc_norm_stderr = acc_norm.map(statistics::standard_error);
        Self {
            acc: statistics::mean(acc),
            acc_norm: acc_norm.map(statistics::mean),
            acc_stderr: Some(acc_stderr),
            acc_norm_stderr,
            stderr: acc_norm_stderr.filter(|_| name.parse().is_ok_and(Task::quotes_acc_norm)).unwrap_or(acc_stderr),
            rows: acc.len(),
            truncated: 0,
            skipped: 0,
        }
    }

    /// The accuracy that is usually quoted: acc_norm for ARC challenge and HellaSwag, acc for the others.
    pub fn headline(&self, task: Task) -> f64 {
        self.quoted_acc_norm(task).unwrap_or(self.acc)
    }

    /// Standard error of [`TaskScore::headline`]; `None` where it is not known.
    pub fn headline_stderr(&self, task: Task) -> Option<f64> {
        let share = self.headline(task);
        let kept = if self.quoted_acc_norm(task).is_some() { self.acc_norm_stderr } else { self.acc_stderr };
        // Results kept by an earlier version have none of both; the error of a share of rows follows from the two.
        kept.or_else(|| (self.rows > 1).then(|| (share * (1.0 - share) / (self.rows as f64 - 1.0)).sqrt()))
    }

    fn quoted_acc_norm(&self, task: Task) -> Option<f64> {
        self.acc_norm.filter(|_| task.quotes_acc_norm())
    }
}

/// Scores `questions` of `task`, which are `encoded`, with the model of `reader`. Batches that `journal` has are not computed
/// again, and those computed are added to it.
pub fn score_task<B: Backend>(
    reader: &Reader<B>,
    task: Task,
    questions: &[Question],
    encoded: &TaskRequests,
    journal: Option<&mut Journal>,
    monitor: &Monitor,
) -> Result<(TaskScore, Vec<Sample>)> {
    let pass_batches = if reader.resident().is_some() { usize::MAX } else { STREAMED_BATCHES };
    let scores = loglikelihoods(reader, &encoded.requests, task, pass_batches, journal, monitor)?;
    let mut scores = scores.iter();
    let samples: Vec<Sample> = questions
        .iter()
        .enumerate()
        .map(|(index, question)| {
            let loglikelihoods: Vec<f64> = scores.by_ref().take(question.requests.len()).copied().collect();
            sample(task, index, question, loglikelihoods)
        })
        .collect();
    let acc: Vec<f64> = samples.iter().map(|sample| sample.acc).collect();
    let acc_norm: Option<Vec<f64>> = samples.iter().map(|sample| sample.acc_norm).collect();
    let score = TaskScore { truncated: encoded.truncated, ..TaskScore::of(task.name(), &acc, acc_norm.as_deref()) };
    Ok((score, samples))
}

fn sample(task: Task, index: usize, question: &Question, loglikelihoods: Vec<f64>) -> Sample {
    let right = |scores: &[f64]| f64::from(u8::from(argmax(scores) == question.gold));
    let normalized = normalize(&loglikelihoods, &question.lengths);
    Sample {
        task: task.name().into(),
        index,
        acc: right(&loglikelihoods),
        acc_norm: task.has_acc_norm().then(|| right(&normalized)),
        loglikelihoods,
        lengths: question.lengths.clone(),
        gold: question.gold,
    }
}

/// The first of the largest, as in NumPy (where NaN would win; a log-likelihood of 0 over length 0 is the only one).
fn argmax(scores: &[f64]) -> usize {
    if let Some(nan) = scores.iter().position(|score| score.is_nan()) {
        return nan;
    }
    scores.iter().enumerate().fold((0, f64::NEG_INFINITY), |best, (i, score)| if *score > best.1 { (i, *score) } else { best }).0
}

/// Sum of the log-probabilities of each request's continuation. Equal requests are computed once, and what their inputs
/// begin with is computed once a batch. Batches are fixed from all requests, in the order of their tokens; `pass_batches` of
/// them go through the model together.
fn loglikelihoods<B: Backend>(
    reader: &Reader<B>,
    requests: &[Request],
    task: Task,
    pass_batches: usize,
    mut journal: Option<&mut Journal>,
    monitor: &Monitor,
) -> Result<Vec<f64>> {
    let mut unique: Vec<&Request> = requests.iter().collect();
    unique.sort_unstable();
    unique.dedup();
    let batches: Vec<&[&Request]> = batches(&unique).collect();
    let key = |batch: &&[&Request]| Journal::key(batch.iter().map(|request| (request.input.as_slice(), request.continuation.as_slice())));
    let keys: Vec<String> = batches.iter().map(key).collect();
    let known = |index: usize| journal.as_ref().and_then(|journal| journal.get(&keys[index], batches[index].len())).map(<[f64]>::to_vec);
    let mut scores: Vec<Option<Vec<f64>>> = (0..batches.len()).map(known).collect();
    let kept: usize = scores.iter().flatten().map(Vec::len).sum();
    if kept > 0 {
        monitor.log(format!("{task}: {kept} of {} continuations were scored by an earlier evaluation", unique.len()));
    }

    let missing: Vec<usize> = (0..batches.len()).filter(|index| scores[*index].is_none()).collect();
    let (mut done, mut tokens) = (kept, 0);
    monitor.stage(task.name(), unique.len());
    monitor.found(done);
    for piece in missing.chunks(pass_batches) {
        let trees: Vec<PrefixTree> = piece.iter().map(|index| PrefixTree::new(&inputs(batches[*index]))).collect();
        tokens += trees.iter().map(|tree| tree.ids.len()).sum::<usize>();
        let read: Vec<Batch> = trees.iter().map(|tree| Batch { ids: &tree.ids, sequences: &tree.sequences }).collect();
        let mut pass = reader.pass(&read, Rounding::None, task.name(), monitor)?;
        if reader.resident().is_none() {
            // The pass through the blocks was a stage of its own.
            monitor.stage(task.name(), unique.len());
            monitor.found(done);
        }
        for (at, index) in piece.iter().enumerate() {
            let new = score_batch(reader.backend(), &pass.outputs(at)?, &trees[at], batches[*index])?;
            if let Some(journal) = &mut journal {
                journal.put(&keys[*index], &new)?;
            }
            done += new.len();
            scores[*index] = Some(new);
            monitor.step(done, format!("{done} continuations"))?;
        }
    }
    let alone: usize = missing.iter().flat_map(|index| batches[*index]).map(|request| request.input.len()).sum();
    monitor.log(format!("{task}: {tokens} tokens read, which are {alone} when every continuation is read on its own"));
    let scores: Vec<f64> = scores.into_iter().flatten().flatten().collect();
    Ok(requests.iter().map(|request| unique.binary_search(&request).map_or(f64::NAN, |at| scores[at])).collect())
}

/// Divides sorted requests so that a batch computes about [`BATCH_TOKENS`] tokens, shared ones counted once.
fn batches<'a, 'r>(mut rest: &'a [&'r Request]) -> impl Iterator<Item = &'a [&'r Request]> {
    std::iter::from_fn(move || {
        let mut tokens = rest.first()?.input.len();
        let fits = rest.windows(2).take_while(|pair| {
            tokens += pair[1].input.len() - prefix::shared(&pair[0].input, &pair[1].input);
            tokens <= BATCH_TOKENS
        });
        let (batch, after) = rest.split_at(1 + fits.count());
        rest = after;
        Some(batch)
    })
}

/// The inputs of sorted requests, each once.
fn inputs<'r>(batch: &[&'r Request]) -> Vec<&'r [u32]> {
    let mut inputs: Vec<&[u32]> = batch.iter().map(|request| request.input.as_slice()).collect();
    inputs.dedup();
    inputs
}

/// Scores of the requests of a batch, whose inputs make `tree`.
fn score_batch<B: Backend>(backend: &B, outputs: &Outputs<B>, tree: &PrefixTree, batch: &[&Request]) -> Result<Vec<f64>> {
    let inputs = inputs(batch);
    // The token of the batch whose output predicts each token of each continuation.
    let mut targets = Vec::new();
    for request in batch {
        let text = inputs.partition_point(|input| *input < request.input.as_slice());
        let (length, scored) = (request.input.len(), request.scored());
        let continuation = &request.continuation[request.continuation.len() - scored..];
        targets.extend((length - scored..length).zip(continuation).map(|(position, token)| (tree.token(text, position), *token)));
    }
    // Only these go through the head, each once.
    let mut rows: Vec<usize> = targets.iter().map(|(row, _)| *row).collect();
    rows.sort_unstable();
    rows.dedup();
    let mut probabilities = vec![0.0; targets.len()];
    for rows in rows.chunks((HEAD_VALUES / outputs.vocabulary()).max(1)) {
        let logits = outputs.logits_at(rows)?;
        let here = targets.iter().enumerate().filter_map(|(i, (row, token))| Some((i, (rows.binary_search(row).ok()?, *token))));
        let (indices, here): (Vec<usize>, Vec<(usize, u32)>) = here.unzip();
        for (index, (probability, _)) in indices.into_iter().zip(backend.log_probabilities(&logits, &here)?) {
            probabilities[index] = probability;
        }
    }
    let mut probabilities = probabilities.into_iter();
    Ok(batch.iter().map(|request| probabilities.by_ref().take(request.scored()).sum()).collect())
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::super::encoded::Encoded;
    use super::super::run::EvaluateRequest;
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::error::ErrorKind;
    use crate::model::MemoryNeed;
    use crate::monitor::{CancelToken, Report};

    /// Every pass through the blocks of a streamed model leaves its batches in the journal.
    #[test]
    fn a_streamed_task_goes_on_behind_its_last_pass() {
        let (folder, demo) = (tempfile::tempdir().unwrap(), crate::checkpoint::open("demo").unwrap());
        let need = MemoryNeed::of(&demo, BATCH_TOKENS).unwrap();
        let reader = Reader::load(Cpu, &demo, need.streamed(), folder.path(), BATCH_TOKENS, &Monitor::silent()).unwrap();
        assert!(reader.resident().is_none());
        let questions = [Task::ArcEasy, Task::Hellaswag].map(|task| (task, task.embedded().unwrap()));
        let encoded = Encoded::of(&demo, &EvaluateRequest::default(), &questions, None).unwrap();
        let requests: Vec<Request> = encoded.tasks.into_iter().flat_map(|task| task.requests).collect();
        let score = |monitor: &Monitor| {
            let mut journal = Journal::open(folder.path(), "demo", "cpu", false).unwrap();
            loglikelihoods(&reader, &requests, Task::Hellaswag, 1, Some(&mut journal), monitor)
        };
        let (cancel, passes) = (CancelToken::default(), AtomicUsize::new(0));
        let token = cancel.clone();
        let stop_in_the_second_pass = |report| match report {
            Report::Stage { name, .. } if name == "hellaswag, streamed" && passes.fetch_add(1, Ordering::Relaxed) == 1 => token.cancel(),
            _ => {}
        };
        assert_eq!(score(&Monitor::new(stop_in_the_second_pass, cancel)).err().map(|error| error.kind), Some(ErrorKind::Cancelled));
        let taken_over = AtomicUsize::new(0);
        let listen = |report| {
            if matches!(report, Report::Log(line) if line.ends_with("were scored by an earlier evaluation")) {
                taken_over.fetch_add(1, Ordering::Relaxed);
            }
        };
        let scores = score(&Monitor::new(listen, CancelToken::default())).unwrap();
        assert!(scores.len() == requests.len() && scores.iter().all(|score| score.is_finite()));
        assert_eq!(taken_over.into_inner(), 1);
    }

    /// scipy 1.17.1: `stats.sem([1, 1, 1, 0])` and `stats.sem([1, 0, 1, 0])`.
    #[test]
    fn the_error_is_that_of_the_accuracy_which_is_quoted() {
        let (acc, acc_norm) = ([1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]);
        let (acc_error, norm_error) = (0.25, 0.288_675_134_594_812_9);
        for task in [Task::ArcEasy, Task::Piqa, Task::ArcChallenge, Task::Hellaswag] {
            let score = TaskScore::of(task.name(), &acc, Some(&acc_norm));
            let (share, error) = if task.quotes_acc_norm() { (0.5, norm_error) } else { (0.75, acc_error) };
            assert_eq!(score.headline(task), share);
            assert!((score.headline_stderr(task).unwrap() - error).abs() < 1e-12 && (score.stderr - error).abs() < 1e-12, "{task}");
        }
        let score = TaskScore::of("winogrande", &acc, None);
        assert_eq!((score.headline_stderr(Task::Winogrande), score.acc_norm_stderr), (Some(score.stderr), None));
    }

    /// Results kept by an earlier version have the error of acc_norm alone; that of acc follows from the share of its rows.
    #[test]
    fn results_without_both_errors_are_read() {
        let text = r#"{"acc": 0.75, "acc_norm": 0.5, "stderr": 0.2886751345948129, "rows": 4, "truncated": 0}"#;
        let score: TaskScore = serde_json::from_str(text).unwrap();
        assert!((score.headline_stderr(Task::ArcEasy).unwrap() - 0.25).abs() < 1e-12);
        assert!((score.headline_stderr(Task::Hellaswag).unwrap() - 0.288_675_134_594_812_9).abs() < 1e-12);
        let imported: TaskScore = serde_json::from_str(&text.replace("\"rows\": 4", "\"rows\": 0")).unwrap();
        assert_eq!(imported.headline_stderr(Task::ArcEasy), None);
    }
}
