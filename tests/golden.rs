//! The model against reference logits, residual streams and greedy continuations (`tests/golden`, and the other
//! folders of `../shared/golden` where that is there).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

use std::path::{Path, PathBuf};

use safetensors::SafeTensors;
use strata::backend::cpu::Cpu;
use strata::backend::{Backend, Sequences};
use strata::checkpoint::Checkpoint;
use strata::model::{Hybrid, Stream};
use strata::monitor::Monitor;

/// Largest difference of a logit from the float32 reference.
const LOGIT_TOLERANCE: f32 = 1e-4;
/// Largest difference of a residual stream, whose values grow with depth.
const HIDDEN_TOLERANCE: f32 = 1e-3;

struct Golden {
    directory: PathBuf,
    reference: Vec<u8>,
}

impl Golden {
    fn all() -> Vec<Self> {
        let mut folders = vec![PathBuf::from("tests/golden/dense"), PathBuf::from("tests/golden/moe-latent")];
        for name in ["moe", "wide-state"] {
            let folder = Path::new("../shared/golden").join(name);
            if folder.exists() {
                folders.push(folder);
            } else {
                eprintln!("skipped: {} is not there", folder.display());
            }
        }
        let open = |directory: PathBuf| Self { reference: std::fs::read(directory.join("reference.safetensors")).unwrap(), directory };
        folders.into_iter().map(open).collect()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let file = SafeTensors::deserialize(&self.reference).unwrap();
        file.tensor(name).unwrap().data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    }

    /// Rows of token ids.
    fn ids(&self, name: &str) -> Vec<Vec<u32>> {
        let file = SafeTensors::deserialize(&self.reference).unwrap();
        let tensor = file.tensor(name).unwrap();
        let ids: Vec<u32> = tensor.data().as_chunks::<8>().0.iter().map(|b| u32::try_from(i64::from_le_bytes(*b)).unwrap()).collect();
        ids.chunks(tensor.shape()[1]).map(<[u32]>::to_vec).collect()
    }

    fn checkpoint(&self) -> Checkpoint {
        Checkpoint::open(&self.directory).unwrap()
    }
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn logits_and_residual_streams_equal_the_reference() {
    for golden in Golden::all() {
        let checkpoint = golden.checkpoint();
        let rows = golden.ids("input_ids");
        let batch = (rows.concat(), Sequences::new(rows.iter().map(Vec::len).collect()));
        let mut stream = Stream::new(&Cpu, &checkpoint, std::slice::from_ref(&batch)).unwrap();
        let blocks = stream.blocks();
        for index in 0..blocks {
            let found = Cpu.download(&stream.boundary().get(&Cpu, 0).unwrap()).unwrap();
            let difference = largest_difference(&found, &golden.floats(&format!("hidden.{index}")));
            assert!(difference < HIDDEN_TOLERANCE, "{} hidden.{index} differs by {difference}", golden.directory.display());
            stream.advance(index).unwrap();
        }
        let difference = largest_difference(&stream.normalized().unwrap()[0], &golden.floats(&format!("hidden.{blocks}")));
        assert!(difference < HIDDEN_TOLERANCE, "{} final hidden differs by {difference}", golden.directory.display());
        let streamed = Cpu.download(&stream.logits(0).unwrap()).unwrap();
        let difference = largest_difference(&streamed, &golden.floats("logits"));
        assert!(difference < LOGIT_TOLERANCE, "{} logits differ by {difference}", golden.directory.display());
        let model = Hybrid::load(Cpu, &checkpoint).unwrap();
        let resident = Cpu.download(&model.logits(&batch.0, &batch.1, None).unwrap()).unwrap();
        assert_eq!(streamed, resident, "streaming and resident blocks compute the same");
    }
}

#[test]
fn token_by_token_decoding_equals_prefill() {
    for golden in Golden::all() {
        let model = Hybrid::load(Cpu, &golden.checkpoint()).unwrap();
        let rows = golden.ids("input_ids");
        let (tokens, vocabulary) = (rows[0].len(), model.vocabulary());
        let expected = golden.floats("logits");
        let mut cache = model.cache(rows.len());
        // A prompt of some tokens at once, then one token a step: both ways of feeding the caches.
        let prompt = 7;
        for step in std::iter::once(0..prompt).chain((prompt..tokens).map(|t| t..t + 1)) {
            let ids: Vec<u32> = rows.iter().flat_map(|row| &row[step.clone()]).copied().collect();
            let sequences = Sequences::new(vec![step.len(); rows.len()]);
            let logits = Cpu.download(&model.last_logits(&ids, &sequences, Some(&mut cache)).unwrap()).unwrap();
            for (row, logits) in logits.chunks(vocabulary).enumerate() {
                let at = (row * tokens + step.end - 1) * vocabulary;
                let difference = largest_difference(logits, &expected[at..at + vocabulary]);
                assert!(difference < LOGIT_TOLERANCE, "{} token {} differs by {difference}", golden.directory.display(), step.end);
            }
        }
    }
}

#[test]
fn greedy_continuations_equal_the_reference() {
    for golden in Golden::all() {
        let model = Hybrid::load(Cpu, &golden.checkpoint()).unwrap();
        let prompts = golden.ids("input_ids");
        let expected = golden.ids("greedy");
        let mut cache = model.cache(prompts.len());
        let mut sequences = Sequences::new(prompts.iter().map(Vec::len).collect());
        let mut ids = prompts.concat();
        for step in 0..expected[0].len() {
            let logits = Cpu.download(&model.last_logits(&ids, &sequences, Some(&mut cache)).unwrap()).unwrap();
            ids = logits
                .chunks(model.vocabulary())
                .map(|row| (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap() as u32)
                .collect();
            let right: Vec<u32> = expected.iter().map(|row| row[step]).collect();
            assert_eq!(ids, right, "{} step {step}", golden.directory.display());
            sequences = Sequences::steps(prompts.len());
        }
    }
}

#[test]
fn the_demo_streams_as_it_runs_resident() {
    let checkpoint = strata::checkpoint::open("demo").unwrap();
    let ids: Vec<u32> = (3..60).collect();
    let sequences = Sequences::new(vec![20, 37]);
    let mut stream = Stream::new(&Cpu, &checkpoint, &[(ids.clone(), sequences.clone())]).unwrap();
    stream.run(&Monitor::silent(), "trace").unwrap();
    let model = Hybrid::load(Cpu, &checkpoint).unwrap();
    let resident = model.logits(&ids, &sequences, None).unwrap();
    assert_eq!(Cpu.download(&stream.logits(0).unwrap()).unwrap(), Cpu.download(&resident).unwrap());
}
