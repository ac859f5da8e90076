//! Every transform leaves the float function unchanged: a variant that is transformed and not quantized gives the
//! original's logits, for dense and MoE blocks, with biases, tied heads, and in decoding.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

mod common;

use std::path::{Path, PathBuf};

use common::Parts;
use safetensors::Dtype;
use strata::backend::cpu::Cpu;
use strata::backend::{Backend, Sequences};
use strata::checkpoint::{Checkpoint, StorageLayout};
use strata::format::{Plan, Transform};
use strata::model::Hybrid;
use strata::monitor::Monitor;
use strata::quant::{Method, QuantizeRequest, Sample, SampleSpec, Steps, quantize};
use tempfile::TempDir;

/// Largest change of a logit by a transform in f32.
const TOLERANCE: f32 = 1e-4;

fn logits(checkpoint: &Checkpoint, ids: &[u32]) -> Vec<f32> {
    let model = Hybrid::load(Cpu, checkpoint).unwrap();
    Cpu.download(&model.logits(ids, &Sequences::new(vec![ids.len()]), None).unwrap()).unwrap()
}

/// The same token by token from the caches.
fn decoded(checkpoint: &Checkpoint, ids: &[u32]) -> Vec<f32> {
    let model = Hybrid::load(Cpu, checkpoint).unwrap();
    let mut cache = model.cache(1);
    let step = |id: &u32| Cpu.download(&model.logits(&[*id], &Sequences::steps(1), Some(&mut cache)).unwrap()).unwrap();
    ids.iter().flat_map(step).collect()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn check(source: &Path, folder: &Path) {
    let checkpoint = Checkpoint::open(source).unwrap();
    let ids: Vec<u32> = (0..48).map(|i| (i * 37 + 5) % 320).collect();
    let expected = logits(&checkpoint, &ids);
    let with_norms =
        |transform: &Transform| if transform.turns_residual() { vec![Transform::FoldNorms, *transform] } else { vec![*transform] };
    let mut lists: Vec<Vec<Transform>> = Transform::ALL.iter().map(with_norms).collect();
    lists.push(Transform::ALL.into_iter().filter(|transform| *transform != Transform::HadamardResidual).collect());
    for (index, transforms) in lists.into_iter().enumerate() {
        let output = folder.join(format!("{index}"));
        let spec = SampleSpec { sequences: 2, length: 64, ..SampleSpec::default() };
        let request = QuantizeRequest {
            checkpoint: &checkpoint,
            recipe: "test".into(),
            steps: Steps::new(transforms.clone(), Method::Rtn),
            plan: Plan::unquantized(checkpoint.layout.blocks.len()),
            sample: Sample::load(&checkpoint, &spec).unwrap(),
            storage: StorageLayout::Native,
            output: output.clone(),
            force: false,
            host_memory: u64::MAX,
            donors: None,
        };
        quantize(&Cpu, &request, &Monitor::silent()).unwrap();
        let variant = Checkpoint::open(&output).unwrap();
        for (how, found) in [("prefill", logits(&variant, &ids)), ("decoding", decoded(&variant, &ids))] {
            let difference = largest_difference(&found, &expected);
            assert!(difference < TOLERANCE, "{} {transforms:?} {how}: {difference}", source.display());
        }
        std::fs::remove_dir_all(&output).unwrap();
    }
}

#[test]
fn golden_checkpoints_keep_their_logits() {
    let mut sources = vec![PathBuf::from("tests/golden/dense"), PathBuf::from("tests/golden/moe-latent")];
    for name in ["moe", "wide-state"] {
        let source = Path::new("../shared/golden").join(name);
        if source.exists() {
            sources.push(source);
        } else {
            eprintln!("skipped: {} is not there", source.display());
        }
    }
    for source in sources {
        check(&source, TempDir::new().unwrap().path());
    }
}

#[test]
fn biases_and_tied_heads_are_transformed_too() {
    for golden in ["tests/golden/dense", "tests/golden/moe-latent"] {
        let folder = TempDir::new().unwrap();
        let mut parts = Parts::of(golden);
        for flag in ["use_bias", "mlp_bias", "attention_bias", "tie_word_embeddings"] {
            parts.config = parts.config.replace(&format!("\"{flag}\": false"), &format!("\"{flag}\": true"));
        }
        parts.tensors.remove("lm_head.weight");
        let weights: Vec<(String, usize)> = parts
            .tensors
            .iter()
            .filter(|(name, _)| name.ends_with("_proj.weight"))
            .map(|(name, tensor)| (name.replace(".weight", ".bias"), tensor.1[0]))
            .collect();
        for (name, rows) in weights {
            let values = (0..rows).flat_map(|r| (0.1 * ((r * 7 + name.len()) as f32).sin()).to_le_bytes()).collect();
            parts.tensors.insert(name, (Dtype::F32, vec![rows], values));
        }
        let source = folder.path().join("source");
        parts.write(&source);
        check(&source, folder.path());
    }
}
