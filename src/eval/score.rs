//! Log-likelihoods of continuations, and the accuracies that follow from them.

use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use super::journal::Journal;
use super::prefix::{self, PrefixTree};
use super::statistics;
use super::tasks::{Question, Task};
use super::text;
use crate::backend::Backend;
use crate::error::Result;
use crate::model::{Batch, HEAD_VALUES, Outputs, Reader, Rounding};
use crate::monitor::Monitor;

/// Tokens of a batch, at most (one longer sequence makes a batch of its own).
pub const BATCH_TOKENS: usize = 4096;

/// A continuation to be scored: the model reads `input`, and its last outputs predict `continuation`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Request {
    input: Vec<u32>,
    continuation: Vec<u32>,
}

impl Request {
    /// Tokens of the continuation that are predicted from `input`: all, unless it fills the model by itself.
    fn scored(&self) -> usize {
        self.continuation.len().min(self.input.len())
    }
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
    /// Standard error of the accuracy (of acc_norm where the task has it).
    pub stderr: f64,
    pub rows: usize,
    /// Continuations whose context was cut from the left to fit the model.
    pub truncated: usize,
    /// Rows that could not be used and were left out.
    #[serde(default)]
    pub skipped: usize,
}

impl TaskScore {
    /// The accuracy that is usually quoted: acc_norm for ARC challenge and HellaSwag, acc for the others.
    pub fn headline(&self, task: Task) -> f64 {
        self.acc_norm.filter(|_| task.quotes_acc_norm()).unwrap_or(self.acc)
    }
}

/// Scores `questions` of `task` with the model of `reader`; `max_tokens` is the longest sequence that the model takes. Batches that
/// `journal` has are not computed again, and those computed are added to it.
pub fn score_task<B: Backend>(
    reader: &Reader<B>,
    tokenizer: &Tokenizer,
    task: Task,
    questions: &[Question],
    max_tokens: usize,
    journal: Option<&mut Journal>,
    monitor: &Monitor,
) -> Result<(TaskScore, Vec<Sample>)> {
    let mut truncated = 0;
    let mut requests = Vec::new();
    for (context, continuation) in questions.iter().flat_map(|question| &question.requests) {
        let (request, cut) = encode_pair(tokenizer, context, continuation, max_tokens)?;
        truncated += usize::from(cut);
        requests.push(request);
    }
    let scores = loglikelihoods(reader, &requests, task, journal, monitor)?;
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
        skipped: 0,
    };
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

/// Sum of the log-probabilities of each request's continuation. Equal requests are computed once, and what their inputs
/// begin with is computed once a batch. Batches are fixed from all requests, in the order of their tokens.
fn loglikelihoods<B: Backend>(
    reader: &Reader<B>,
    requests: &[Request],
    task: Task,
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
    let known: Vec<Option<Vec<f64>>> = (0..batches.len()).map(known).collect();
    let missing = batches.iter().zip(&known).filter(|(_, known)| known.is_none());
    let trees: Vec<PrefixTree> = missing.map(|(batch, _)| PrefixTree::new(&inputs(batch))).collect();
    let read: Vec<Batch> = trees.iter().map(|tree| Batch { ids: &tree.ids, sequences: &tree.sequences }).collect();
    let mut pass = reader.pass(&read, Rounding::None, task.name(), monitor)?;

    let mut scores = Vec::with_capacity(unique.len());
    let (mut kept, mut computed) = (0, 0);
    monitor.stage(task.name(), unique.len());
    for ((batch, key), known) in batches.into_iter().zip(keys).zip(known) {
        if let Some(known) = known {
            kept += known.len();
            scores.extend(known);
            monitor.found(scores.len());
        } else {
            let new = score_batch(reader.backend(), &pass.outputs(computed)?, &trees[computed], batch)?;
            computed += 1;
            if let Some(journal) = &mut journal {
                journal.put(key, &new)?;
            }
            scores.extend(new);
        }
        monitor.step(scores.len(), format!("{} continuations", scores.len()))?;
    }
    if kept > 0 {
        monitor.log(format!("{task}: {kept} of {} continuations were scored by an earlier evaluation", unique.len()));
    }
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
