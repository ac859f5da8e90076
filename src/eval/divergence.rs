//! What a model says about the windows of a text, and how far that is from what the unquantized model said.
//! Both read whole windows; what a quantized cache costs shows in decoding only and is not in these figures.

use super::reference::{Beside, Reading, Reference, References};
use super::statistics::{self, DivergenceSummary, NoiseFloor};
use crate::backend::{Backend, Divergence, Sequences};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::model::{Batch, Reader, Rounding};
use crate::monitor::Monitor;

/// What a noise floor's figures say was rounded.
const BF16_STREAM: &str = "residual stream and logits to bf16";

/// Windows of a text and a model to read them.
pub struct TextReader<'a, B: Backend> {
    pub reader: &'a Reader<'a, B>,
    pub checkpoint: &'a Checkpoint,
    /// What the model is called.
    pub name: &'a str,
    /// Hash of its weights.
    pub sha256: &'a str,
    pub windows: &'a [Vec<u32>],
    /// The same text as `llama-perplexity` reads it.
    pub chunks: &'a [Vec<u32>],
}

/// What a model says about the text's windows.
#[derive(Default)]
pub struct TextReading {
    /// Log-probability of every token but the first, by window.
    pub scores: Vec<Vec<f64>>,
    /// Perplexity as in llama.cpp.
    pub llama_cpp: Option<f64>,
    /// From the reference.
    pub divergence: Option<DivergenceSummary>,
    /// Of the reference from itself.
    pub noise_floor: Option<NoiseFloor>,
}

/// The unquantized model's reading, which variants are compared with.
pub struct Compared {
    reference: Reference,
    scores: Vec<Vec<f64>>,
}

impl<B: Backend> TextReader<'_, B> {
    /// Reads the windows, and compares with `compared` where there is one.
    pub fn read(&self, compared: Option<&mut Compared>, monitor: &Monitor) -> Result<TextReading> {
        let mut reading = TextReading::default();
        if self.windows.is_empty() {
            return Ok(reading);
        }
        let backend = self.reader.backend();
        let sequences = sequences(self.windows);
        let batches = batches(self.windows, &sequences);
        let mut pass = self.reader.pass(&batches, Rounding::None, "text", monitor)?;
        let mut compared = compared;
        let mut rows = Vec::new();
        monitor.stage("text", self.windows.len());
        for index in 0..self.windows.len() {
            let logits = pass.outputs(index)?.logits()?;
            reading.scores.push(self.scores(index, &logits)?);
            if let Some(compared) = &mut compared {
                let reference = backend.upload(compared.reference.logits(index)?, compared.reference.vocabulary())?;
                rows.extend(backend.divergence(&reference, &logits)?);
                monitor.divergence(index + 1, rows.iter().map(|row| row.kl).sum::<f64>() / rows.len() as f64);
            }
            monitor.step(index + 1, format!("window {}", index + 1))?;
        }
        reading.divergence = compared.map(|compared| summarize(&rows, &compared.scores, &reading.scores));
        reading.llama_cpp = Some(self.llama_cpp(monitor)?);
        Ok(reading)
    }

    /// Reads the windows as the model that others are compared with: from `references`, or now and for later.
    pub fn read_as_reference(&self, references: &References, monitor: &Monitor) -> Result<(TextReading, Option<Compared>)> {
        if self.windows.is_empty() {
            return Ok((TextReading::default(), None));
        }
        let backend = self.reader.backend().name();
        let reading = Reading { how: "windows", model: self.sha256, backend: &backend, windows: &[self.windows, self.chunks].concat() };
        let mut reference = match references.find_or_warn(&reading, self.name, monitor) {
            Some(found) => found,
            None => self.write_reference(&reading, references, monitor)?,
        };
        let mut scores = Vec::new();
        for index in 0..self.windows.len() {
            monitor.check()?;
            let logits = self.reader.backend().upload(reference.logits(index)?, reference.vocabulary())?;
            scores.push(self.scores(index, &logits)?);
        }
        let (noise_floor, llama_cpp) = reference.beside().cloned().map(|beside| (beside.noise, beside.llama_cpp)).unzip();
        let reading = TextReading { scores: scores.clone(), llama_cpp, divergence: None, noise_floor };
        Ok((reading, Some(Compared { reference, scores })))
    }

    /// One pass as the model is and one rounded, window by window.
    fn write_reference(&self, reading: &Reading, references: &References, monitor: &Monitor) -> Result<Reference> {
        let backend = self.reader.backend();
        let sequences = sequences(self.windows);
        let batches = batches(self.windows, &sequences);
        let mut writer = references.write(reading, self.checkpoint.config.vocab_size)?;
        let mut exact = self.reader.pass(&batches, Rounding::None, "text", monitor)?;
        let mut rounded = self.reader.pass(&batches, Rounding::Bf16, "text in bf16", monitor)?;
        let (mut rows, mut exact_scores, mut rounded_scores) = (Vec::new(), Vec::new(), Vec::new());
        monitor.stage("text", self.windows.len());
        for index in 0..self.windows.len() {
            let logits = exact.outputs(index)?.logits()?;
            let other = rounded.outputs(index)?.logits()?;
            rows.extend(backend.divergence(&logits, &other)?);
            exact_scores.push(self.scores(index, &logits)?);
            rounded_scores.push(self.scores(index, &other)?);
            writer.push(&backend.download(&logits)?)?;
            monitor.step(index + 1, format!("window {}", index + 1))?;
        }
        let kld = summarize(&rows, &exact_scores, &rounded_scores);
        let noise = NoiseFloor { rounding: BF16_STREAM.into(), kld };
        writer.finish(Some(Beside { noise, llama_cpp: self.llama_cpp(monitor)? }), monitor)
    }

    /// Perplexity of the tokens n/2 + 1 … n − 1 of every chunk of n, in a pass of its own.
    fn llama_cpp(&self, monitor: &Monitor) -> Result<f64> {
        let backend = self.reader.backend();
        let sequences = sequences(self.chunks);
        let batches = batches(self.chunks, &sequences);
        let mut pass = self.reader.pass(&batches, Rounding::None, "perplexity", monitor)?;
        let mut scores = Vec::new();
        monitor.stage("perplexity", self.chunks.len());
        for (index, chunk) in self.chunks.iter().enumerate() {
            let half = chunk.len() / 2;
            let rows: Vec<usize> = (half..chunk.len() - 1).collect();
            let logits = pass.outputs(index)?.logits_at(&rows)?;
            let targets: Vec<(usize, u32)> = chunk[half + 1..].iter().copied().enumerate().collect();
            scores.extend(backend.log_probabilities(&logits, &targets)?.into_iter().map(|(score, _)| score));
            monitor.step(index + 1, format!("window {}", index + 1))?;
        }
        Ok(statistics::perplexity(&scores))
    }

    /// Log-probabilities of the tokens of window `index` but the first.
    fn scores(&self, index: usize, logits: &B::Tensor) -> Result<Vec<f64>> {
        let targets: Vec<(usize, u32)> = self.windows[index][1..].iter().copied().enumerate().collect();
        Ok(self.reader.backend().log_probabilities(logits, &targets)?.into_iter().map(|(score, _)| score).collect())
    }
}

fn sequences(windows: &[Vec<u32>]) -> Vec<Sequences> {
    windows.iter().map(|window| Sequences::new(vec![window.len()])).collect()
}

fn batches<'b>(windows: &'b [Vec<u32>], sequences: &'b [Sequences]) -> Vec<Batch<'b>> {
    windows.iter().zip(sequences).map(|(ids, sequences)| Batch { ids, sequences }).collect()
}

/// An error when divergence between `model`, called `name`, and `reference` means nothing: they do not speak of the same tokens.
pub fn check_vocabulary(reference: &Checkpoint, model: &Checkpoint, name: &str) -> Result<()> {
    let hint = "divergence is defined between models of one vocabulary: compare variants of the same model";
    if reference.companion("tokenizer.json")? != model.companion("tokenizer.json")? {
        return Err(Error::input(format!("{name} has another tokenizer than the model it is compared with")).hint(hint));
    }
    let (own, other) = (model.config.vocab_size, reference.config.vocab_size);
    if own != other {
        return Err(Error::input(format!("{name} has a vocabulary of {own}, and the model it is compared with one of {other}")).hint(hint));
    }
    Ok(())
}

fn summarize(rows: &[Divergence], reference: &[Vec<f64>], own: &[Vec<f64>]) -> DivergenceSummary {
    let rms_probability = Some(statistics::rms_probability(&reference.concat(), &own.concat()));
    DivergenceSummary { rms_probability, ..statistics::summarize_divergence(rows) }
}
