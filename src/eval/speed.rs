//! Speed of prefill and decoding: warm-up, repetitions, median and spread.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::statistics;
use crate::backend::{Backend, Sequences};
use crate::error::Result;
use crate::model::Hybrid;
use crate::monitor::Monitor;

/// What to time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpeedRequest {
    pub prompt_tokens: usize,
    pub decode_tokens: usize,
    pub repetitions: usize,
}

/// Medians over the repetitions; spreads are (largest − smallest) / median.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Speed {
    pub prefill_tokens_per_s: f64,
    pub decode_tokens_per_s: f64,
    pub prefill_spread: f64,
    pub decode_spread: f64,
    pub prompt_tokens: usize,
    pub decode_tokens: usize,
    pub repetitions: usize,
}

/// Times `model` on one sequence made of `text` repeated: a prompt, then token after token.
pub fn measure<B: Backend>(model: &Hybrid<B>, text: &[u32], request: SpeedRequest, monitor: &Monitor) -> Result<Speed> {
    let prompt: Vec<u32> = text.iter().copied().cycle().take(request.prompt_tokens).collect();
    let next: Vec<u32> = text.iter().copied().cycle().skip(request.prompt_tokens).take(request.decode_tokens).collect();
    let (mut prefill, mut decode) = (Vec::new(), Vec::new());
    monitor.stage("speed", request.repetitions + 1);
    // The first round warms caches and clocks up and is not counted.
    for round in 0..=request.repetitions {
        let mut cache = model.cache(1);
        let start = Instant::now();
        let logits = model.last_logits(&prompt, &Sequences::new(vec![prompt.len()]), Some(&mut cache))?;
        model.backend.download(&logits)?;
        let after_prompt = Instant::now();
        for token in &next {
            let logits = model.step(&[*token], &mut cache)?;
            model.backend.download(&logits)?;
        }
        if round > 0 {
            prefill.push(prompt.len() as f64 / (after_prompt - start).as_secs_f64());
            decode.push(next.len() as f64 / after_prompt.elapsed().as_secs_f64());
        }
        monitor.step(round + 1, format!("round {round}"))?;
    }
    Ok(Speed {
        prefill_tokens_per_s: statistics::median(&prefill),
        decode_tokens_per_s: statistics::median(&decode),
        prefill_spread: spread(&prefill),
        decode_spread: spread(&decode),
        prompt_tokens: request.prompt_tokens,
        decode_tokens: request.decode_tokens,
        repetitions: request.repetitions,
    })
}

fn spread(values: &[f64]) -> f64 {
    let (low, high) = values.iter().fold((f64::INFINITY, 0.0_f64), |(low, high), value| (low.min(*value), high.max(*value)));
    let median = statistics::median(values);
    if median > 0.0 { (high - low) / median } else { 0.0 }
}
