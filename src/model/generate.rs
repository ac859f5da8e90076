//! Text generation: a prompt, then a token a step from the caches.

use candle_core::{Device, Tensor};
use candle_transformers::generation::{LogitsProcessor, Sampling};

use super::Hybrid;
use crate::backend::{Backend, Sequences};
use crate::error::{Error, Result};
use crate::monitor::Monitor;

/// How the next token is picked.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SamplingSpec {
    /// 0 picks the most probable token.
    pub temperature: f64,
    /// Keep the most probable tokens up to this share of the probability.
    pub top_p: Option<f64>,
    pub seed: u64,
}

/// Continues `prompt` by up to `max_tokens` tokens, or to a token of `stop`; each is handed to `each` as it comes.
/// Returns them all.
pub fn generate<B: Backend>(
    model: &Hybrid<B>,
    prompt: &[u32],
    max_tokens: usize,
    stop: &[u32],
    sampling: SamplingSpec,
    monitor: &Monitor,
    mut each: impl FnMut(u32) -> Result<()>,
) -> Result<Vec<u32>> {
    if prompt.is_empty() {
        return Err(Error::input("the prompt has no tokens").hint("give some text with --prompt"));
    }
    let temperature = sampling.temperature;
    let strategy = match sampling.top_p {
        Some(p) => Sampling::TopP { p, temperature },
        None => Sampling::All { temperature },
    };
    let mut sampler = (temperature > 0.0).then(|| LogitsProcessor::from_sampling(sampling.seed, strategy));
    let mut cache = model.cache(1);
    let mut tokens = Vec::new();
    monitor.stage("generate", max_tokens);
    while tokens.len() < max_tokens {
        let logits = match tokens.last() {
            Some(token) => model.step(&[*token], &mut cache)?,
            None => model.last_logits(prompt, &Sequences::new(vec![prompt.len()]), Some(&mut cache))?,
        };
        let token = match &mut sampler {
            // Found where the logits are.
            None => model.backend.argmax(&logits)?[0],
            Some(sampler) => {
                let logits = model.backend.download(&logits)?;
                sampler.sample(&Tensor::from_vec(logits, model.vocabulary(), &Device::Cpu)?)?
            }
        };
        if stop.contains(&token) {
            break;
        }
        tokens.push(token);
        each(token)?;
        monitor.step(tokens.len(), "")?;
    }
    Ok(tokens)
}
