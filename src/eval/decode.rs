//! Divergence in decoding: a text read one token a step from a variant's caches, against the unquantized model's logits.
//!
//! Rounded caches do not show when a whole text is computed in one call; here their rounding adds up as in generation.
//! The text is given (teacher forcing), so that every step compares the same context. Start with [`DecodeReference::read`]
//! and [`DecodeReference::compare`].

use serde::{Deserialize, Serialize};

use super::statistics;
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
    /// Positions that `mean`, `p99` and `top1` are over: the first ones of the text.
    pub tokens: usize,
    pub mean: f64,
    pub p99: f64,
    /// Share of positions with the same most probable token.
    pub top1: f64,
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

/// What the unquantized model says about a text.
pub struct DecodeReference<B: Backend> {
    ids: Vec<u32>,
    /// For each piece of the text: the positions in it that are compared, and their logits.
    pieces: Vec<(Vec<usize>, B::Tensor)>,
}

/// Whether a position is compared.
fn compared(position: usize) -> bool {
    position < DENSE_TOKENS || position.is_multiple_of(STRIDE)
}

impl<B: Backend> DecodeReference<B> {
    /// Reads `ids` piece by piece, in full precision.
    pub fn read(model: &Hybrid<B>, ids: &[u32], monitor: &Monitor) -> Result<Self> {
        let mut cache = model.cache(1);
        let mut pieces = Vec::new();
        monitor.stage("decode", ids.len());
        for (index, piece) in ids.chunks(PIECE).enumerate() {
            let start = index * PIECE;
            let h = model.forward(piece, &Sequences::new(vec![piece.len()]), Some(&mut cache))?;
            let positions: Vec<usize> = (start..start + piece.len()).filter(|position| compared(*position)).collect();
            let rows: Vec<usize> = positions.iter().map(|position| position - start).collect();
            pieces.push((positions, model.logits_at(&h, &rows)?));
            monitor.step(start + piece.len(), "reference")?;
        }
        Ok(Self { ids: ids.to_vec(), pieces })
    }

    /// Decodes the text with `model` and compares.
    pub fn compare(&self, model: &Hybrid<B>, monitor: &Monitor) -> Result<DecodeDivergence> {
        let backend = &model.backend;
        let mut cache = model.cache(1);
        let mut found: Vec<(usize, Divergence)> = Vec::new();
        monitor.stage("decode", self.ids.len());
        for (index, (positions, reference)) in self.pieces.iter().enumerate() {
            let start = index * PIECE;
            for position in start..self.ids.len().min(start + PIECE) {
                let h = model.forward(&self.ids[position..=position], &Sequences::steps(1), Some(&mut cache))?;
                if let Ok(row) = positions.binary_search(&position) {
                    let row = backend.gather_rows(reference, &[row])?;
                    let divergence = backend.divergence(&row, &model.logits_at(&h, &[0])?)?;
                    found.extend(divergence.into_iter().map(|divergence| (position, divergence)));
                }
                if (position + 1).is_multiple_of(REPORT) || position + 1 == self.ids.len() {
                    monitor.step(position + 1, format!("token {}", position + 1))?;
                }
            }
        }
        Ok(summarize(&found, self.ids.len()))
    }
}

fn summarize(found: &[(usize, Divergence)], tokens: usize) -> DecodeDivergence {
    let dense: Vec<Divergence> = found.iter().filter(|(position, _)| *position < DENSE_TOKENS).map(|(_, divergence)| *divergence).collect();
    let summary = statistics::summarize_divergence(&dense);
    // Each stretch is as long as all before it.
    let edges = std::iter::successors(Some(64), |edge| Some(2 * edge)).take_while(|edge| *edge < tokens);
    let edges: Vec<usize> = std::iter::once(0).chain(edges).chain([tokens]).collect();
    let mean = |(from, to): (usize, usize)| {
        let inside: Vec<f64> = found.iter().filter(|(position, _)| (from..to).contains(position)).map(|(_, found)| found.kl).collect();
        PositionDivergence { from, to, mean: inside.iter().sum::<f64>() / inside.len() as f64 }
    };
    DecodeDivergence {
        tokens: dense.len(),
        mean: summary.mean,
        p99: summary.p99,
        top1: summary.top1,
        positions: edges.windows(2).map(|edge| mean((edge[0], edge[1]))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_over_the_first_tokens_and_stretches_over_all() {
        let found: Vec<(usize, Divergence)> = (0..4096)
            .filter(|position| compared(*position))
            .map(|position| (position, Divergence { kl: if position < DENSE_TOKENS { 1.0 } else { 3.0 }, same_top: true }))
            .collect();
        let summary = summarize(&found, 4096);
        assert_eq!((summary.tokens, summary.mean, summary.top1), (DENSE_TOKENS, 1.0, 1.0));
        let last = summary.positions.last().unwrap();
        assert_eq!((last.from, last.to, last.mean), (2048, 4096, 3.0));
        assert_eq!(summary.positions[0], PositionDivergence { from: 0, to: 64, mean: 1.0 });
    }
}
