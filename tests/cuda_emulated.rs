//! The CUDA backend without a GPU: whole models through the kernels' own sources, built for the processor, against the
//! CPU backend. Skipped, with a printed reason, where there is no C++ compiler.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

use std::path::Path;

use strata::backend::cpu::Cpu;
use strata::backend::cuda::Cuda;
use strata::backend::{Backend, Sequences};
use strata::checkpoint::Checkpoint;
use strata::model::Hybrid;

/// Largest difference of a logit where both backends multiply floats in f32: sums are taken in other orders.
const FLOAT_TOLERANCE: f32 = 2e-4;

/// The emulated device, or why there is none.
fn emulated() -> Option<Cuda> {
    if std::process::Command::new(strata::backend::cuda::emulated::compiler()).arg("--version").output().is_err() {
        eprintln!("skipped: there is no C++ compiler");
        return None;
    }
    Some(Cuda::emulated().unwrap())
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().chain(b).all(|value| value.is_finite()));
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Logits of `sequences` on both backends.
fn logits(cuda: &Cuda, checkpoint: &Checkpoint, ids: &[u32], sequences: &Sequences) -> (Vec<f32>, Vec<f32>) {
    let (on_cpu, on_cuda) = (Hybrid::load(Cpu, checkpoint).unwrap(), Hybrid::load(cuda.clone(), checkpoint).unwrap());
    let expected = Cpu.download(&on_cpu.logits(ids, sequences, None).unwrap()).unwrap();
    (expected, cuda.download(&on_cuda.logits(ids, sequences, None).unwrap()).unwrap())
}

#[test]
fn golden_checkpoints_of_every_kind_give_the_cpus_logits() {
    let Some(cuda) = emulated() else { return };
    for name in ["tests/golden/dense", "tests/golden/moe-latent", "../shared/golden/moe", "../shared/golden/wide-state"] {
        if !Path::new(name).exists() {
            eprintln!("skipped: {name} is not there");
            continue;
        }
        let checkpoint = Checkpoint::open(Path::new(name)).unwrap();
        let ids: Vec<u32> = (0..40).map(|i| (7 * i + 3) % checkpoint.config.vocab_size as u32).collect();
        let (expected, found) = logits(&cuda, &checkpoint, &ids, &Sequences::new(vec![13, 27]));
        let difference = largest_difference(&expected, &found);
        assert!(difference < FLOAT_TOLERANCE, "{name}: logits differ by {difference}");
    }
}
