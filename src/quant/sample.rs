//! The sample: token sequences that are run through the model while it is quantized and again at validation.

use rand::rngs::SmallRng;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::backend::Sequences;
use crate::checkpoint::{Checkpoint, DEMO_CALIBRATION, sha256_hex};
use crate::error::{Error, Result};
use crate::eval::text;

/// Where the sample comes from and how much of it is taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SampleSpec {
    /// `embedded` (the demo's calibration text) or the path of a text file.
    pub source: String,
    pub sequences: usize,
    /// Tokens of a sequence.
    pub length: usize,
    pub seed: u64,
}

impl Default for SampleSpec {
    fn default() -> Self {
        Self { source: "embedded".into(), sequences: 32, length: 256, seed: 0 }
    }
}

/// Token sequences of equal length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    pub sequences: Vec<Vec<u32>>,
    pub seed: u64,
}

impl Sample {
    /// Cuts the text that `spec` names into windows and takes some of them, chosen by the seed. A model without a
    /// tokenizer cannot read text: its sample is random token ids from the same seed.
    pub fn load(checkpoint: &Checkpoint, spec: &SampleSpec) -> Result<Self> {
        if spec.sequences == 0 || spec.length < 2 {
            return Err(Error::input(format!("a calibration sample of {} sequences of {} tokens is empty", spec.sequences, spec.length))
                .hint("take at least one sequence of at least 2 tokens"));
        }
        let mut rng = SmallRng::seed_from_u64(spec.seed);
        let embedded = spec.source == "embedded";
        if embedded && checkpoint.companion("tokenizer.json")?.is_none() {
            let vocabulary = checkpoint.config.vocab_size as u32;
            let sequence = |rng: &mut SmallRng| (0..spec.length).map(|_| rng.random_range(0..vocabulary)).collect();
            return Ok(Self { sequences: (0..spec.sequences).map(|_| sequence(&mut rng)).collect(), seed: spec.seed });
        }
        let text = if embedded { DEMO_CALIBRATION.to_owned() } else { text::read(std::path::Path::new(&spec.source))? };
        let tokens = text::tokenize(&checkpoint.tokenizer()?, &text)?;
        let mut windows: Vec<&[u32]> = tokens.chunks_exact(spec.length).collect();
        if windows.len() < spec.sequences {
            return Err(Error::input(format!(
                "the calibration text has {} tokens, too short for {} sequences of {}",
                tokens.len(),
                spec.sequences,
                spec.length
            ))
            .hint("give a longer text, or fewer or shorter sequences"));
        }
        windows.shuffle(&mut rng);
        Ok(Self { sequences: windows[..spec.sequences].iter().map(|window| window.to_vec()).collect(), seed: spec.seed })
    }

    /// The first `count` sequences, and the others.
    pub fn split(mut self, count: usize) -> (Self, Self) {
        let others = self.sequences.split_off(count.min(self.sequences.len()));
        let seed = self.seed;
        (self, Self { sequences: others, seed })
    }

    /// Tokens in all.
    pub fn tokens(&self) -> usize {
        self.sequences.iter().map(Vec::len).sum()
    }

    /// SHA-256 of the token ids.
    pub fn sha256(&self) -> String {
        let bytes: Vec<u8> = self.sequences.iter().flatten().flat_map(|id| id.to_le_bytes()).collect();
        sha256_hex(&bytes)
    }

    /// One batch a sequence: the batches depend on nothing but the sample.
    pub fn batches(&self) -> Vec<(Vec<u32>, Sequences)> {
        self.sequences.iter().map(|ids| (ids.clone(), Sequences::new(vec![ids.len()]))).collect()
    }
}
