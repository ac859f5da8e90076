//! Divergence in decoding: a text read one token a step from a variant's caches, against the unquantized model's logits.
//!
//! Rounded caches do not show when a whole text is computed in one call; here their rounding adds up as in generation.
//! The text is given (teacher forcing), so that every step compares the same context. Start with [`DecodeReference::of`]
//! and [`DecodeReference::compare`].

use serde::{Deserialize, Serialize};

use super::divergence::TextReader;
use super::reference::{Reading, Reference, References};
use super::statistics::{self, DivergenceSummary};
use crate::backend::{Backend, Divergence, SSM_CHUNK, Sequences};
use crate::error::Result;
use crate::model::Hybrid;
use crate::monitor::Monitor;

/// Tokens that are decoded unless something else is asked for.
pub const DEFAULT_TOKENS: usize = 8192;

/// Positions of which every one is compared: the head figures are over these.
pub const DENSE_TOKENS: usize = 2048;
/// Beyond them one position in so many is compared, to see how the error grows with the position.
const STRIDE: usize = 16;
/// Tokens that the reference reads at a time.
const PIECE: usize = 4 * SSM_CHUNK;
/// Steps between two reports.
const REPORT: usize = 256;

/// Divergence of a variant that decodes from the unquantized model, in nats.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecodeDivergence {
    /// Over the first positions of the text.
    #[serde(flatten)]
    pub summary: DivergenceSummary,
    /// Mean divergence by position, as far as the text was read.
    pub positions: Vec<PositionDivergence>,
}

/// Mean divergence of the positions from `from` up to `to` (not included).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct PositionDivergence {
    pub from: usize,
    pub to: usize,
    pub mean: f64,
}

/// What the unquantized model says about the positions of a text that are compared, kept with the other references: a piece
/// of the text where those have a window.
pub struct DecodeReference {
    logits: Reference,
}

/// A position that both models have spoken of.
#[derive(Clone, Copy)]
struct Found {
    position: usize,
    divergence: Divergence,
    /// Log-probabilities that the reference and the variant give to the token that follows, where one does.
    scores: Option<(f64, f64)>,
}

/// The positions of piece `index`, which has `tokens` tokens, that are compared.
fn compared(index: usize, tokens: usize) -> Vec<usize> {
    let start = index * PIECE;
    (start..start + tokens).filter(|position| *position < DENSE_TOKENS || position.is_multiple_of(STRIDE)).collect()
}

impl DecodeReference {
    /// What the model of `text` says about `ids`: from `references`, or read now and kept there. `None` where it would have to
    /// be read and is not resident.
    pub fn of<B: Backend>(text: &TextReader<B>, ids: &[u32], references: &References, monitor: &Monitor) -> Result<Option<Self>> {
        let backend = text.reader.backend();
        let (backend_name, windows) = (backend.name(), [ids.to_vec()]);
        let reading = Reading { how: "decode", model: text.sha256, backend: &backend_name, windows: &windows };
        if let Some(logits) = references.find_or_warn(&reading, text.name, monitor) {
            return Ok(Some(Self { logits }));
        }
        let Some(model) = text.reader.resident() else { return Ok(None) };
        let mut writer = references.write(&reading, text.checkpoint.config.vocab_size)?;
        let mut cache = model.cache(1);
        monitor.stage("decode", ids.len());
        for (index, piece) in ids.chunks(PIECE).enumerate() {
            let start = index * PIECE;
            let h = model.forward(piece, &Sequences::new(vec![piece.len()]), Some(&mut cache))?;
            let rows: Vec<usize> = compared(index, piece.len()).iter().map(|position| position - start).collect();
            writer.push(&if rows.is_empty() { Vec::new() } else { backend.download(&model.logits_at(&h, &rows)?)? })?;
            monitor.step(start + piece.len(), "reference")?;
        }
        Ok(Some(Self { logits: writer.finish(None, monitor)? }))
    }

    /// Decodes `ids`, the same text, with `model` and compares.
    pub fn compare<B: Backend>(&mut self, model: &Hybrid<B>, ids: &[u32], monitor: &Monitor) -> Result<DecodeDivergence> {
        let backend = &model.backend;
        let mut cache = model.cache(1);
        let mut found = Vec::new();
        monitor.stage("decode", ids.len());
        for (index, piece) in ids.chunks(PIECE).enumerate() {
            let positions = compared(index, piece.len());
            let reference = match positions.len() {
                0 => None,
                _ => Some(backend.upload(self.logits.logits(index)?, self.logits.vocabulary())?),
            };
            for position in index * PIECE..index * PIECE + piece.len() {
                let h = model.forward(&ids[position..=position], &Sequences::steps(1), Some(&mut cache))?;
                if let (Some(reference), Ok(row)) = (&reference, positions.binary_search(&position)) {
                    let (expected, own) = (backend.gather_rows(reference, &[row])?, model.logits_at(&h, &[0])?);
                    let scores = match ids.get(position + 1) {
                        Some(next) => {
                            let score = |logits| backend.log_probabilities(logits, &[(0, *next)]).map(|scores| scores[0].0);
                            Some((score(&expected)?, score(&own)?))
                        }
                        None => None,
                    };
                    let divergence = backend.divergence(&expected, &own)?;
                    found.extend(divergence.into_iter().map(|divergence| Found { position, divergence, scores }));
                }
                if (position + 1).is_multiple_of(REPORT) || position + 1 == ids.len() {
                    monitor.step(position + 1, format!("token {}", position + 1))?;
                }
            }
        }
        Ok(summarize(&found, ids.len()))
    }
}

fn summarize(found: &[Found], tokens: usize) -> DecodeDivergence {
    let dense: Vec<Found> = found.iter().filter(|found| found.position < DENSE_TOKENS).copied().collect();
    let rows: Vec<Divergence> = dense.iter().map(|found| found.divergence).collect();
    let (reference, own): (Vec<f64>, Vec<f64>) = dense.iter().filter_map(|found| found.scores).unzip();
    let rms_probability = Some(statistics::rms_probability(&reference, &own));
    // Each stretch is as long as all before it.
    let edges = std::iter::successors(Some(64), |edge| Some(2 * edge)).take_while(|edge| *edge < tokens);
    let edges: Vec<usize> = std::iter::once(0).chain(edges).chain([tokens]).collect();
    let mean = |(from, to): (usize, usize)| {
        let inside = found.iter().filter(|found| (from..to).contains(&found.position)).map(|found| found.divergence.kl);
        PositionDivergence { from, to, mean: statistics::mean(&inside.collect::<Vec<_>>()) }
    };
    DecodeDivergence {
        summary: DivergenceSummary { rms_probability, ..statistics::summarize_divergence(&rows) },
        positions: edges.windows(2).map(|edge| mean((edge[0], edge[1]))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_over_the_first_tokens_and_stretches_over_all() {
        let position = |position| Found {
            position,
            divergence: Divergence { kl: if position < DENSE_TOKENS { position as f64 } else { 3.0 }, same_top: true },
            scores: (position + 1 < 4096).then(|| (0.5_f64.ln(), if position < DENSE_TOKENS { 0.25_f64.ln() } else { 0.0 })),
        };
        let found: Vec<Found> = (0..4096 / PIECE).flat_map(|index| compared(index, PIECE)).map(position).collect();
        let DecodeDivergence { summary, positions } = summarize(&found, 4096);
        assert_eq!((summary.tokens, summary.mean, summary.median, summary.max), (DENSE_TOKENS, 1023.5, 1023.5, 2047.0));
        assert!((summary.rms_probability.unwrap() - 0.25).abs() < 1e-12 && summary.top1 == 1.0);
        assert_eq!(positions[0], PositionDivergence { from: 0, to: 64, mean: 31.5 });
        assert_eq!(*positions.last().unwrap(), PositionDivergence { from: 2048, to: 4096, mean: 3.0 });
    }

    /// What results of an earlier version have is still read, and what they lack is zero.
    #[test]
    fn figures_kept_by_an_earlier_version_are_read() {
        let text = r#"{"tokens": 2048, "mean": 0.5, "p99": 2.0, "top1": 0.75, "positions": [{"from": 0, "to": 64, "mean": 0.5}]}"#;
        let found: DecodeDivergence = serde_json::from_str(text).unwrap();
        assert_eq!((found.summary.mean, found.summary.tokens, found.summary.rms_probability), (0.5, 2048, None));
        let again: DecodeDivergence = serde_json::from_str(&serde_json::to_string(&found).unwrap()).unwrap();
        assert_eq!(again, found);
    }
}
