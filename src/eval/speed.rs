//! Speed of prefill and decoding: warm-up, repetitions, median and spread.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::statistics;
use crate::backend::{Backend, Sequences};
use crate::error::Result;
use crate::model::Hybrid;
use crate::monitor::Monitor;

/// What to time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpeedRequest {
    pub prompt_tokens: usize,
    pub decode_tokens: usize,
    pub repetitions: usize,
    /// Further (tokens of a prompt, sequences at once).
    pub grid: Vec<(usize, usize)>,
}

impl Default for SpeedRequest {
    fn default() -> Self {
        Self { prompt_tokens: 512, decode_tokens: 64, repetitions: 3, grid: Vec::new() }
    }
}

impl SpeedRequest {
    /// The usual prompt alone, and every prompt of `prompts` tokens in batches of every size of `batches`. One of the two
    /// lists being empty stands for what the usual prompt has.
    pub fn with_grid(prompts: &[usize], batches: &[usize]) -> Self {
        let usual = Self::default();
        let or_usual = |list: &[usize], usual: usize| if list.is_empty() { vec![usual] } else { list.to_vec() };
        let (prompts, batches) = (or_usual(prompts, usual.prompt_tokens), or_usual(batches, 1));
        let mut grid: Vec<(usize, usize)> = prompts.iter().flat_map(|prompt| batches.iter().map(|batch| (*prompt, *batch))).collect();
        grid.retain(|point| *point != (usual.prompt_tokens, 1));
        Self { grid, ..usual }
    }
}

/// The usual prompt's figures: medians over the repetitions; spreads are (largest − smallest) / median.
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

/// Times of one prompt length and batch size.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SpeedPoint {
    /// Tokens of each prompt.
    pub prompt_tokens: usize,
    /// Sequences that are read, and then decoded, at once.
    pub sequences: usize,
    /// Seconds until the first token of all of them is there.
    pub first_token_s: f64,
    pub first_token_spread: f64,
    /// Seconds of a decoding step, which gives each sequence a token.
    pub token_s: f64,
    pub token_spread: f64,
    /// Bytes of the caches of one sequence behind the last token: SSM states and convolution windows, keys and values.
    #[serde(default)]
    pub state_bytes: u64,
    #[serde(default)]
    pub kv_bytes: u64,
}

impl SpeedPoint {
    /// Prompt tokens a second, over all sequences.
    pub fn prefill_tokens_per_s(&self) -> f64 {
        (self.prompt_tokens * self.sequences) as f64 / self.first_token_s
    }

    /// Decoded tokens a second, over all sequences.
    pub fn decode_tokens_per_s(&self) -> f64 {
        self.sequences as f64 / self.token_s
    }
}

/// Times `model` on sequences made of `text` repeated: prompts, then token after token. The usual prompt comes first
/// among the points, too.
pub fn measure<B: Backend>(model: &Hybrid<B>, text: &[u32], request: &SpeedRequest, monitor: &Monitor) -> Result<(Speed, Vec<SpeedPoint>)> {
    let grid = std::iter::once((request.prompt_tokens, 1)).chain(request.grid.iter().copied());
    let grid: Vec<(usize, usize)> = grid.collect();
    let rounds = request.repetitions + 1;
    monitor.stage("speed", grid.len() * rounds);
    let mut points = Vec::new();
    for (index, (prompt, sequences)) in grid.into_iter().enumerate() {
        let note = |round: usize| monitor.step(index * rounds + round, format!("{sequences} x {prompt} tokens, round {round}"));
        points.push(time(model, text, prompt, sequences, request, note)?);
    }
    let first = points[0];
    let speed = Speed {
        prefill_tokens_per_s: first.prefill_tokens_per_s(),
        decode_tokens_per_s: first.decode_tokens_per_s(),
        prefill_spread: first.first_token_spread,
        decode_spread: first.token_spread,
        prompt_tokens: request.prompt_tokens,
        decode_tokens: request.decode_tokens,
        repetitions: request.repetitions,
    };
    Ok((speed, points))
}

fn time<B: Backend>(
    model: &Hybrid<B>,
    text: &[u32],
    prompt_tokens: usize,
    sequences: usize,
    request: &SpeedRequest,
    note: impl Fn(usize) -> Result<()>,
) -> Result<SpeedPoint> {
    let prompt: Vec<u32> = text.iter().copied().cycle().take(prompt_tokens).collect();
    let next: Vec<u32> = text.iter().copied().cycle().skip(prompt_tokens).take(request.decode_tokens).collect();
    let prompts = prompt.repeat(sequences);
    let (mut first, mut token) = (Vec::new(), Vec::new());
    let mut cached = (0, 0);
    // The first round warms caches and clocks up and is not counted.
    for round in 0..=request.repetitions {
        let mut cache = model.cache(sequences);
        let start = Instant::now();
        let logits = model.last_logits(&prompts, &Sequences::new(vec![prompt_tokens; sequences]), Some(&mut cache))?;
        model.backend.download(&logits)?;
        let after_prompt = Instant::now();
        for token in &next {
            let logits = model.step(&vec![*token; sequences], &mut cache)?;
            model.backend.download(&logits)?;
        }
        if round > 0 {
            first.push((after_prompt - start).as_secs_f64());
            token.push(after_prompt.elapsed().as_secs_f64() / next.len() as f64);
        }
        cached = model.cache_bytes(&cache);
        note(round + 1)?;
    }
    Ok(SpeedPoint {
        prompt_tokens,
        sequences,
        first_token_s: statistics::median(&first),
        first_token_spread: spread(&first),
        token_s: statistics::median(&token),
        token_spread: spread(&token),
        state_bytes: cached.0 / sequences as u64,
        kv_bytes: cached.1 / sequences as u64,
    })
}

fn spread(values: &[f64]) -> f64 {
    let (low, high) = values.iter().fold((f64::INFINITY, 0.0_f64), |(low, high), value| (low.min(*value), high.max(*value)));
    let median = statistics::median(values);
    if median > 0.0 { (high - low) / median } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::checkpoint;
    use crate::eval::memory;
    use crate::format::CacheFormats;

    /// The prediction that is made for contexts too long to try.
    #[test]
    fn caches_take_the_bytes_that_are_predicted() {
        let checkpoint = checkpoint::open(checkpoint::DEMO).unwrap();
        let model = Hybrid::load(Cpu, &checkpoint).unwrap();
        let request = SpeedRequest { prompt_tokens: 20, decode_tokens: 4, repetitions: 1, grid: vec![(7, 3)] };
        let (_, points) = measure(&model, &[1, 5, 9], &request, &Monitor::silent()).unwrap();
        for (point, context) in points.iter().zip([24, 11]) {
            let predicted = memory::predict_caches(&checkpoint.config, &checkpoint.layout, CacheFormats::default(), context);
            assert_eq!((point.state_bytes, point.kv_bytes), (predicted.state + predicted.conv, predicted.kv));
            assert!(point.first_token_s > 0.0 && point.token_s > 0.0);
        }
    }

    #[test]
    fn the_grid_is_every_prompt_in_every_batch_without_the_usual_one() {
        assert_eq!(SpeedRequest::with_grid(&[], &[]).grid, []);
        assert_eq!(SpeedRequest::with_grid(&[128, 512], &[1, 4]).grid, [(128, 1), (128, 4), (512, 4)]);
        assert_eq!(SpeedRequest::with_grid(&[], &[8]).grid, [(512, 8)]);
        assert!((spread(&[2.0, 1.0, 3.0]) - 1.0).abs() < 1e-12);
    }
}
