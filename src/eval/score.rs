//! Log-likelihoods of continuations, and the accuracies that follow from them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use super::statistics;
use super::tasks::{Question, Task};
use super::text;
use crate::backend::{Backend, Sequences};
use crate::error::Result;
use crate::model::Hybrid;
use crate::monitor::Monitor;

/// Tokens of a batch, at most (one longer sequence makes a batch of its own).
const BATCH_TOKENS: usize = 4096;

/// A continuation to be scored: the model reads `input`, and its last outputs predict `continuation`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Request {
    input: Vec<u32>,
    continuation: Vec<u32>,
}

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

/// Accuracy over the rows of a task.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct TaskScore {
    pub acc: f64,
    pub acc_norm: Option<f64>,
    /// Standard error of the accuracy (of acc_norm where the task has it).
    pub stderr: f64,
    pub rows: usize,
    /// Continuations whose context was cut from the left to fit the model.
    pub truncated: usize,
}

impl TaskScore {
    /// The accuracy that is usually quoted: acc_norm for ARC challenge and HellaSwag, acc for the others.
    pub fn headline(&self, task: Task) -> f64 {
        match task {
            Task::ArcChallenge | Task::Hellaswag => self.acc_norm.unwrap_or(self.acc),
            _ => self.acc,
        }
    }
}

/// Scores `questions` of `task` with `model`; `max_tokens` is the longest sequence that the model takes.
pub fn score_task<B: Backend>(
    model: &Hybrid<B>,
    tokenizer: &Tokenizer,
    task: Task,
    questions: &[Question],
    max_tokens: usize,
    monitor: &Monitor,
) -> Result<(TaskScore, Vec<Sample>)> {
    let mut truncated = 0;
    let mut requests = Vec::new();
    for (context, continuation) in questions.iter().flat_map(|question| &question.requests) {
        let (request, cut) = encode_pair(tokenizer, context, continuation, max_tokens)?;
        truncated += usize::from(cut);
        requests.push(request);
    }
    let scores = loglikelihoods(model, &requests, task, monitor)?;
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
    let score = TaskScore {
        acc: statistics::mean(&acc),
        acc_norm: acc_norm.as_deref().map(statistics::mean),
        stderr: statistics::standard_error(acc_norm.as_deref().unwrap_or(&acc)),
        rows: samples.len(),
        truncated,
    };
    Ok((score, samples))
}

fn sample(task: Task, index: usize, question: &Question, loglikelihoods: Vec<f64>) -> Sample {
    let right = |scores: &[f64]| f64::from(u8::from(argmax(scores) == question.gold));
    let normalized: Vec<f64> = loglikelihoods.iter().zip(&question.lengths).map(|(score, length)| score / *length as f64).collect();
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

/// The harness's `_encode_pair`: spaces at the end of the context move to the continuation, whose tokens are those of
/// the whole beyond the context's length. The context is cut from the left to fit; says whether it was.
fn encode_pair(tokenizer: &Tokenizer, context: &str, continuation: &str, max_tokens: usize) -> Result<(Request, bool)> {
    let (mut whole, start) = if context.is_empty() {
        // Without a context the harness puts the beginning-of-sequence token there, which the tokenizer adds itself.
        let plain = text::encode(tokenizer, continuation, false)?;
        let mut whole = text::encode(tokenizer, continuation, true)?;
        if whole.len() == plain.len() {
            whole.insert(0, 0);
        }
        let start = whole.len() - plain.len();
        (whole, start)
    } else {
        let trimmed = context.trim_end();
        let moved = &context[trimmed.len()..];
        let whole = text::encode(tokenizer, &format!("{trimmed}{moved}{continuation}"), true)?;
        let start = text::encode(tokenizer, trimmed, true)?.len();
        (whole, start)
    };
    let continuation = whole[start.min(whole.len())..].to_vec();
    whole.truncate(whole.len().saturating_sub(1));
    let cut = whole.len().saturating_sub(max_tokens);
    Ok((Request { input: whole.split_off(cut), continuation }, cut > 0))
}

/// Sum of the log-probabilities of each request's continuation. Equal requests are computed once. Batches are made
/// from all requests in order of length, so they do not depend on what is asked beside them or was done before.
fn loglikelihoods<B: Backend>(model: &Hybrid<B>, requests: &[Request], task: Task, monitor: &Monitor) -> Result<Vec<f64>> {
    let mut unique: Vec<&Request> = requests.iter().collect();
    unique.sort_by(|a, b| b.input.len().cmp(&a.input.len()).then_with(|| a.cmp(b)));
    unique.dedup();
    let mut known: BTreeMap<&Request, f64> = BTreeMap::new();
    monitor.stage(task.name(), unique.len());
    let mut rest = unique.as_slice();
    while !rest.is_empty() {
        let mut tokens = 0;
        let fits = rest
            .iter()
            .take_while(|request| {
                tokens += request.input.len();
                tokens <= BATCH_TOKENS
            })
            .count();
        let (batch, after) = rest.split_at(fits.max(1));
        rest = after;
        for (request, score) in batch.iter().zip(score_batch(model, batch)?) {
            known.insert(request, score);
        }
        monitor.step(known.len(), format!("{} continuations", known.len()))?;
    }
    Ok(requests.iter().map(|request| known.get(request).copied().unwrap_or(f64::NAN)).collect())
}

fn score_batch<B: Backend>(model: &Hybrid<B>, batch: &[&Request]) -> Result<Vec<f64>> {
    let ids: Vec<u32> = batch.iter().flat_map(|request| &request.input).copied().collect();
    let sequences = Sequences::new(batch.iter().map(|request| request.input.len()).collect());
    // Only the rows that predict a continuation's token go through the head.
    let mut rows = Vec::new();
    let mut targets = Vec::new();
    for (request, range) in batch.iter().zip(sequences.ranges()) {
        let scored = request.continuation.len().min(range.len());
        for (row, token) in (range.end - scored..range.end).zip(&request.continuation[request.continuation.len() - scored..]) {
            targets.push((rows.len(), *token));
            rows.push(row);
        }
    }
    let h = model.forward(&ids, &sequences, None)?;
    let logits = model.logits_at(&h, &rows)?;
    let mut scores = model.backend.log_probabilities(&logits, &targets)?.into_iter().map(|(score, _)| score);
    Ok(batch.iter().map(|request| scores.by_ref().take(request.continuation.len().min(request.input.len())).sum()).collect())
}
