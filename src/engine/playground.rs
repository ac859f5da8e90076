//! One prompt, two models: each goes on by its most probable tokens, and the second also says what it makes of the
//! first one's text.

use super::{Event, JobId};
use crate::backend::{Backend, Sequences};
use crate::checkpoint::{self, Checkpoint};
use crate::error::{Error, Result};
use crate::eval::text;
use crate::model::{Cache, Hybrid};
use crate::monitor::Monitor;

/// Candidates that are kept a token.
pub const CANDIDATES: usize = 5;

/// Continue a prompt with two models of one vocabulary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlaygroundJob {
    /// What [`checkpoint::open`] takes.
    pub models: [String; 2],
    pub prompt: String,
    pub max_tokens: usize,
}

/// A token that a model said, and what it might have said.
#[derive(Debug, Clone, PartialEq)]
pub struct Spoken {
    pub token: u32,
    /// What it adds to the text; empty while a character is incomplete.
    pub piece: String,
    /// The most probable tokens with their probabilities, best first.
    pub candidates: Vec<(String, f64)>,
}

/// One step of both models.
#[derive(Debug, Clone, PartialEq)]
pub struct PlaygroundStep {
    /// What each said; nothing once it has ended its text.
    pub spoken: [Option<Spoken>; 2],
    /// KL(first ‖ second) in nats of the next token, both behind the first one's text.
    pub divergence: Option<f64>,
}

/// A model that is saying something.
struct Speaker<'a, B: Backend> {
    model: &'a Hybrid<B>,
    cache: Cache<B>,
    /// Natural logarithms of the next token's probabilities.
    next: Vec<f64>,
    tokens: Vec<u32>,
    /// Bytes of the decoded tokens that were handed out.
    sent: usize,
}

impl<'a, B: Backend> Speaker<'a, B> {
    fn new(model: &'a Hybrid<B>, prompt: &[u32]) -> Result<Self> {
        let mut speaker = Self { model, cache: model.cache(1), next: Vec::new(), tokens: Vec::new(), sent: 0 };
        speaker.read(prompt)?;
        Ok(speaker)
    }

    fn read(&mut self, tokens: &[u32]) -> Result<()> {
        let logits = self.model.last_logits(tokens, &Sequences::new(vec![tokens.len()]), Some(&mut self.cache))?;
        self.next = log_softmax(&self.model.backend.download(&logits)?);
        Ok(())
    }

    /// Says the most probable token and reads it.
    fn speak(&mut self, tokenizer: &tokenizers::Tokenizer, stop: Option<u32>) -> Result<Option<Spoken>> {
        let mut order: Vec<usize> = (0..self.next.len()).collect();
        let most = CANDIDATES.min(order.len());
        let by_probability = |a: &usize, b: &usize| self.next[*b].total_cmp(&self.next[*a]).then(a.cmp(b));
        if most < order.len() {
            order.select_nth_unstable_by(most, by_probability);
            order.truncate(most);
        }
        order.sort_by(by_probability);
        let Some(token) = order.first().map(|token| *token as u32).filter(|token| Some(*token) != stop) else { return Ok(None) };
        let name = |token: &usize| tokenizer.id_to_token(*token as u32).unwrap_or_else(|| format!("#{token}"));
        let candidates = order.iter().map(|token| (readable(&name(token)), self.next[*token].exp())).collect();
        self.tokens.push(token);
        let text = tokenizer.decode(&self.tokens, true).map_err(|error| Error::run(format!("a token cannot be decoded: {error}")))?;
        let whole = !text.ends_with(char::REPLACEMENT_CHARACTER);
        let piece = if whole { text.get(self.sent..).unwrap_or_default().to_owned() } else { String::new() };
        if whole {
            self.sent = text.len();
        }
        self.read(&[token])?;
        Ok(Some(Spoken { token, piece, candidates }))
    }
}

/// A token's name with the marks of spaces and line ends that vocabularies use written out.
fn readable(name: &str) -> String {
    name.replace(['Ġ', '▁'], " ").replace(['Ċ', '\n'], "⏎")
}

/// Natural logarithms of softmax(logits), summed in f64.
fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    logits.iter().map(|logit| f64::from(logit - max) - sum.ln()).collect()
}

/// KL(p ‖ q) in nats, from logarithms.
fn divergence(p: &[f64], q: &[f64]) -> f64 {
    p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>().max(0.0)
}

/// Runs the job: one [`Event::Spoken`] a step.
pub(super) fn play<B: Backend>(
    id: JobId,
    backend: impl Fn() -> B,
    job: &PlaygroundJob,
    monitor: &Monitor,
    send: &impl Fn(Event),
) -> Result<()> {
    let open = |model: &String| checkpoint::open_watched(model, monitor);
    let checkpoints: [Checkpoint; 2] = [open(&job.models[0])?, open(&job.models[1])?];
    if checkpoints[0].companion("tokenizer.json")? != checkpoints[1].companion("tokenizer.json")? {
        return Err(Error::input("the two models have different tokenizers").hint("compare variants of the same model"));
    }
    let tokenizer = checkpoints[0].tokenizer()?;
    let prompt = text::encode(&tokenizer, &job.prompt, true)?;
    if prompt.is_empty() {
        return Err(Error::input("the prompt has no tokens").hint("type some text"));
    }
    monitor.stage("load", 2);
    let first = Hybrid::load(backend(), &checkpoints[0])?;
    monitor.step(1, "A loaded")?;
    let second = Hybrid::load(backend(), &checkpoints[1])?;
    monitor.step(2, "B loaded")?;
    let stop = checkpoints[0].config.eos_token;
    let mut speakers = [Speaker::new(&first, &prompt)?, Speaker::new(&second, &prompt)?];
    let mut listener = Speaker::new(&second, &prompt)?;
    monitor.stage("speak", job.max_tokens);
    let mut over = [false; 2];
    for step in 0..job.max_tokens {
        let apart = (!over[0]).then(|| divergence(&speakers[0].next, &listener.next));
        let mut spoken = [None, None];
        for side in 0..2 {
            if !over[side] {
                spoken[side] = speakers[side].speak(&tokenizer, stop)?;
                over[side] = spoken[side].is_none();
            }
        }
        if let Some(said) = &spoken[0] {
            listener.read(&[said.token])?;
        }
        if over == [true; 2] {
            break;
        }
        send(Event::Spoken { id, step: Box::new(PlaygroundStep { divergence: apart.filter(|_| spoken[0].is_some()), spoken }) });
        monitor.step(step + 1, "")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use std::cell::RefCell;

    #[test]
    fn a_model_beside_itself_says_the_same_and_does_not_diverge() {
        let steps: RefCell<Vec<PlaygroundStep>> = RefCell::default();
        let job = PlaygroundJob { models: ["demo".into(), "demo".into()], prompt: "The ".into(), max_tokens: 6 };
        let send = |event| {
            if let Event::Spoken { step, .. } = event {
                steps.borrow_mut().push(*step);
            }
        };
        play(JobId(1), || Cpu, &job, &Monitor::silent(), &send).unwrap();
        let steps = steps.into_inner();
        assert!(!steps.is_empty() && steps.len() <= 6);
        for step in &steps {
            assert_eq!(step.spoken[0], step.spoken[1]);
            assert_eq!(step.divergence, Some(0.0));
            let candidates = &step.spoken[0].as_ref().unwrap().candidates;
            assert_eq!(candidates.len(), CANDIDATES);
            assert!(
                candidates.windows(2).all(|pair| pair[0].1 >= pair[1].1) && candidates.iter().map(|(_, p)| p).sum::<f64>() <= 1.0 + 1e-9
            );
        }
    }

    #[test]
    fn divergence_is_that_of_the_formula() {
        let [p, q] = [[0.5_f64, 0.25, 0.25], [0.25, 0.25, 0.5]].map(|p| p.map(f64::ln));
        let expected = 0.5 * 2.0_f64.ln() + 0.25 * 0.5_f64.ln();
        assert!((divergence(&p, &q) - expected).abs() < 1e-12);
    }
}
