//! The CUDA backend without a GPU: whole models through the kernels' own sources, built for the processor, against the
//! CPU backend. Skipped, with a printed reason, where there is no C++ compiler.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

mod common;

use std::path::Path;

use rayon::prelude::*;
use strata::backend::cpu::Cpu;
use strata::backend::cuda::libraries::Libraries;
use strata::backend::cuda::nvrtc::Nvrtc;
use strata::backend::cuda::{Cuda, sources};
use strata::backend::{Backend, Sequences};
use strata::checkpoint::{self, Checkpoint};
use strata::model::Hybrid;

/// Largest difference of a logit where both backends multiply floats in f32: sums are taken in other orders.
const FLOAT_TOLERANCE: f32 = 2e-4;

/// The same where prompts' activations are rounded to bf16 in front of matrix products.
const BF16_TOLERANCE: f32 = 0.1;
/// The same where activations are int8: a float that differs in its last bit may round to another code.
const INT8_TOLERANCE: f32 = 0.2;

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

#[test]
fn the_demo_in_every_format_gives_the_cpus_logits() {
    let Some(cuda) = emulated() else { return };
    let ids: Vec<u32> = (0..23).map(|i| 3 + 11 * i).collect();
    let sequences = Sequences::new(vec![5, 18]);
    let demo = checkpoint::open(checkpoint::DEMO).unwrap();
    let (expected, found) = logits(&cuda, &demo, &ids, &sequences);
    let difference = largest_difference(&expected, &found);
    assert!(difference < BF16_TOLERANCE, "bf16: logits differ by {difference}");
    let folder = tempfile::tempdir().unwrap();
    for (recipe, tolerance) in [("rtn-w8a8", INT8_TOLERANCE), ("rtn-w4a8", INT8_TOLERANCE)] {
        let variant = variant(&demo, recipe, &folder.path().join(recipe));
        let (expected, found) = logits(&cuda, &variant, &ids, &sequences);
        let difference = largest_difference(&expected, &found);
        assert!(difference < tolerance, "{recipe}: logits differ by {difference}");
    }
}

/// The demo quantized on the CPU, with a sample just large enough to be one.
fn variant(demo: &Checkpoint, recipe: &str, output: &Path) -> Checkpoint {
    let run = common::strata(output.parent().unwrap())
        .args(["quantize", &demo.name, "--recipe", recipe, "--sequences", "1", "--length", "16", "-o"])
        .arg(output)
        .output()
        .unwrap();
    common::succeeded(&run);
    Checkpoint::open(output).unwrap()
}

#[test]
fn decoding_with_caches_and_recorded_steps_gives_the_cpus_logits() {
    let Some(cuda) = emulated() else { return };
    for name in ["tests/golden/dense", "tests/golden/moe-latent"] {
        let checkpoint = Checkpoint::open(Path::new(name)).unwrap();
        let (on_cpu, on_cuda) = (Hybrid::load(Cpu, &checkpoint).unwrap(), Hybrid::load(cuda.clone(), &checkpoint).unwrap());
        let (mut cpu_cache, mut cuda_cache) = (on_cpu.cache(2), on_cuda.cache(2));
        let prompt: Vec<u32> = (0..20).map(|i| (5 * i + 2) % checkpoint.config.vocab_size as u32).collect();
        let sequences = Sequences::new(vec![9, 11]);
        on_cpu.last_logits(&prompt, &sequences, Some(&mut cpu_cache)).unwrap();
        on_cuda.last_logits(&prompt, &sequences, Some(&mut cuda_cache)).unwrap();
        for step in 0..5 {
            let ids = [3 + step, 40 - 2 * step];
            let expected = Cpu.download(&on_cpu.step(&ids, &mut cpu_cache).unwrap()).unwrap();
            let found = cuda.download(&on_cuda.step(&ids, &mut cuda_cache).unwrap()).unwrap();
            let difference = largest_difference(&expected, &found);
            assert!(difference < FLOAT_TOLERANCE, "{name} step {step}: logits differ by {difference}");
        }
    }
}

#[test]
fn trees_of_sequences_give_the_cpus_logits() {
    let Some(cuda) = emulated() else { return };
    let checkpoint = Checkpoint::open(Path::new("tests/golden/dense")).unwrap();
    let ids: Vec<u32> = (0..30).map(|i| (7 * i + 1) % checkpoint.config.vocab_size as u32).collect();
    let sequences = Sequences::tree(vec![9, 6, 5, 4, 6], vec![None, Some(0), Some(0), Some(1), None]);
    let (expected, found) = logits(&cuda, &checkpoint, &ids, &sequences);
    let difference = largest_difference(&expected, &found);
    assert!(difference < FLOAT_TOLERANCE, "logits differ by {difference}");
}

#[test]
fn logits_are_measured_as_on_the_cpu() {
    let Some(cuda) = emulated() else { return };
    let values = |seed: u32| (0..3 * 501_u32).map(|i| f32::from(((i * 7919 + seed) % 1013) as u16) / 60.0).collect::<Vec<f32>>();
    let (a, b) = (values(1), values(400));
    let targets = [(0, 3), (2, 500), (1, 77), (0, 3)];
    let on = |backend: &Cpu| {
        let (a, b) = (backend.upload(a.clone(), 501).unwrap(), backend.upload(b.clone(), 501).unwrap());
        (backend.log_probabilities(&a, &targets).unwrap(), backend.divergence(&a, &b).unwrap(), backend.argmax(&a).unwrap())
    };
    let (probabilities, divergences, tops) = on(&Cpu);
    let (a, b) = (cuda.upload(a.clone(), 501).unwrap(), cuda.upload(b.clone(), 501).unwrap());
    assert_eq!(cuda.argmax(&a).unwrap(), tops);
    for (found, expected) in cuda.log_probabilities(&a, &targets).unwrap().iter().zip(&probabilities) {
        assert!((found.0 - expected.0).abs() < 1e-5 && found.1 == expected.1, "{found:?} {expected:?}");
    }
    for (found, expected) in cuda.divergence(&a, &b).unwrap().iter().zip(&divergences) {
        assert!((found.kl - expected.kl).abs() < 1e-5 && found.same_top == expected.same_top, "{found:?} {expected:?}");
    }
}

/// Every kernel compiles for every architecture that is supported, where an NVRTC is installed.
#[test]
fn kernels_compile_for_every_architecture() {
    let Ok(found) = &Libraries::get().nvrtc else {
        eprintln!("skipped: there is no NVRTC (pip install nvidia-cuda-nvrtc==13.0.*)");
        return;
    };
    let nvrtc = Nvrtc::open(&found.path).unwrap();
    let cache = strata::backend::cuda::nvrtc::cache_directory();
    for arch in [80, 86, 89, 90, 120] {
        sources::KERNELS.par_iter().for_each(|source| {
            let cubin = nvrtc.compile_cached(source, arch, &cache).unwrap();
            assert!(cubin.starts_with(b"\x7fELF"), "{} for sm_{arch} is no cubin", source.name);
        });
    }
}
