//! Mixtures of experts on the CUDA backend, emulated: all experts at once against one after another, on both backends, and
//! decoding steps that are recorded. Skipped, with a printed reason, where there is no C++ compiler.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

mod common;

use std::path::Path;

use strata::backend::cpu::Cpu;
use strata::backend::cuda::Cuda;
use strata::backend::{Assignment, Backend, RouterShape, Sequences};
use strata::checkpoint::Checkpoint;
use strata::format::{LinearWeights, Scheme, WeightPart, round_to_nearest};
use strata::model::{Block, Hybrid};

/// Largest difference, as a share of the largest value, of floats that are added in another order.
const FLOAT_TOLERANCE: f32 = 2e-5;
/// The same where matrix products round activations, and int4 weights, to bf16.
const BF16_TOLERANCE: f32 = 1e-2;
/// Largest difference of a logit of a model with int8 activations: what rounds to another code differs by a step.
const INT8_TOLERANCE: f32 = 0.2;

fn emulated() -> Option<Cuda> {
    if std::process::Command::new(strata::backend::cuda::emulated::compiler()).arg("--version").output().is_err() {
        eprintln!("skipped: there is no C++ compiler");
        return None;
    }
    Some(Cuda::emulated().unwrap())
}

/// Values of about ±1 without a pattern.
fn values(count: usize, seed: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 2_654_435_761 + seed * 40_503) % 2003) as f32 / 1001.5 - 1.0).collect()
}

/// How the linears of experts are stored.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Format {
    scheme: Scheme,
    int8_activations: bool,
    bf16: bool,
}

const FORMATS: [Format; 9] = {
    const fn of(scheme: Scheme, int8_activations: bool) -> Format {
        Format { scheme, int8_activations, bf16: false }
    }
    [
        of(Scheme::Float, false),
        Format { scheme: Scheme::Float, int8_activations: false, bf16: true },
        of(Scheme::Int8, true),
        of(Scheme::Int8, false),
        of(Scheme::Grouped { bits: 4, group: 32 }, true),
        of(Scheme::Grouped { bits: 4, group: 32 }, false),
        of(Scheme::Grouped { bits: 4, group: 64 }, true),
        of(Scheme::Grouped { bits: 3, group: 32 }, true),
        of(Scheme::Grouped { bits: 2, group: 32 }, false),
    ]
};

fn linear(format: Format, rows: usize, cols: usize, seed: usize, more: impl FnOnce(&mut LinearWeights)) -> LinearWeights {
    let mut weights = values(rows * cols, seed);
    if format.bf16 {
        for value in &mut weights {
            *value = half::bf16::from_f32(*value).to_f32();
        }
    }
    let part = match format.scheme {
        Scheme::Float => WeightPart::Float(weights),
        scheme => WeightPart::Quantized(round_to_nearest(&weights, rows, cols, scheme)),
    };
    let mut linear =
        LinearWeights { parts: vec![part], int8_activations: format.int8_activations, ..LinearWeights::float(Vec::new(), cols) };
    more(&mut linear);
    linear
}

/// Experts, what their tokens are, and which experts these choose.
struct Mixture {
    shape: RouterShape,
    /// up and down of each expert.
    experts: Vec<[LinearWeights; 2]>,
    /// `[tokens, hidden]`.
    x: Vec<f32>,
    /// `[tokens, experts]`.
    raw: Vec<f32>,
    correction: Vec<f32>,
}

/// `hidden`, `intermediate`, experts, chosen, tokens.
type Sizes = (usize, usize, usize, usize, usize);

impl Mixture {
    fn new((hidden, inner, experts, chosen, tokens): Sizes, formats: [Format; 2], hadamard: Option<usize>, biases: bool) -> Self {
        let bias = |rows: usize, seed: usize| biases.then(|| values(rows, seed));
        let expert = |e: usize| {
            let up = linear(formats[0], inner, hidden, 10 + e, |linear| linear.bias = bias(inner, 300 + e));
            let down = linear(formats[1], hidden, inner, 100 + e, |linear| {
                linear.bias = bias(hidden, 400 + e);
                linear.hadamard = hadamard;
            });
            [up, down]
        };
        Self {
            shape: RouterShape { experts, experts_per_token: chosen, groups: 1, top_groups: 1, normalize: true, scaling: 2.5 },
            experts: (0..experts).map(expert).collect(),
            x: values(tokens * hidden, 1),
            raw: values(tokens * experts, 2),
            correction: vec![0.0; experts],
        }
    }

    fn upload<B: Backend>(&self, backend: &B, linears: &[[B::Linear; 2]]) -> (B::Activation, B::Tensor, B::Vector) {
        let x = backend.upload(self.x.clone(), self.experts[0][0].cols).unwrap();
        let raw = backend.upload(self.raw.clone(), self.shape.experts).unwrap();
        let correction = backend.prepare_vector(self.correction.clone()).unwrap();
        (backend.emit(x, backend.reads(&linears[0][0])).unwrap(), raw, correction)
    }

    fn prepared<B: Backend>(&self, backend: &B) -> Vec<[B::Linear; 2]> {
        self.experts.iter().map(|linears| linears.clone().map(|linear| backend.prepare(linear).unwrap())).collect()
    }

    /// Expert after expert, as a backend without kernels for mixtures goes.
    fn one_after_another<B: Backend>(&self, backend: &B) -> Vec<f32> {
        let linears = self.prepared(backend);
        let (x, raw, correction) = self.upload(backend, &linears);
        let width = self.experts[0][1].rows();
        let mut sum = backend.upload(vec![0.0; self.x.len() / self.experts[0][0].cols * width], width).unwrap();
        for ([up, down], Assignment { tokens, weights }) in linears.iter().zip(backend.route(&raw, &correction, &self.shape).unwrap()) {
            if tokens.is_empty() {
                continue;
            }
            let wide = backend.linear(up, &backend.gather(&x, &tokens).unwrap()).unwrap();
            let out = backend.linear(down, &backend.relu2(&wide, backend.reads(down)).unwrap()).unwrap();
            sum = backend.scatter_add(sum, &out, &tokens, &weights).unwrap();
        }
        backend.download(&sum).unwrap()
    }

    /// All experts at once; `None` where they are not alike.
    fn at_once(&self, cuda: &Cuda) -> Option<Vec<f32>> {
        let linears = self.prepared(cuda);
        let (x, raw, correction) = self.upload(cuda, &linears);
        let experts: Vec<_> = linears.iter().map(|[up, down]| [up, down]).collect();
        let experts = cuda.prepare_experts(&experts).unwrap()?;
        let out = cuda.mixture(&experts, &x, &raw, &correction, &self.shape).unwrap();
        Some(cuda.download(&out).unwrap())
    }

    /// Checks the sum on the device against the sum expert by expert there, to the bit where `exact`, and on the CPU, to the bit where
    /// linears are products of integers; and else within `tolerance`.
    fn check(&self, cuda: &Cuda, exact: bool, tolerance: f32, what: &str) {
        let found = self.at_once(cuda).unwrap();
        let integers = self.experts.iter().flatten().all(|linear| linear.int8_activations);
        // The weights of several experts go through each machine's own `exp`.
        let exact_on_the_cpu = integers && self.shape.experts_per_token == 1;
        let references =
            [(self.one_after_another(cuda), exact, "on the device"), (self.one_after_another(&Cpu), exact_on_the_cpu, "on the CPU")];
        for (expected, exact, place) in references {
            if exact {
                assert_eq!(found, expected, "{what}, {place}");
            }
            let largest = expected.iter().fold(0.0_f32, |max, x| max.max(x.abs()));
            let difference = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0_f32, f32::max);
            assert!(difference <= tolerance * largest && largest > 0.0, "{what}, {place}: {difference} of {largest}");
        }
    }
}

/// Matrix-vector kernels: one token, and few; odd widths; sums of floats too are the same to the bit.
#[test]
fn few_tokens_of_every_format_give_the_same_as_expert_by_expert() {
    let Some(cuda) = emulated() else { return };
    for format in FORMATS {
        let int4 = !matches!(format.scheme, Scheme::Float | Scheme::Int8);
        for (hidden, inner, experts, chosen, tokens) in [(64, 96, 6, 2, 1), (64, 160, 5, 1, 3), (192, 64, 9, 4, 11), (37, 50, 4, 2, 7)] {
            // Widths that no group divides are not stored in groups.
            if int4 && (hidden % 64 != 0 || inner % 32 != 0) || format.scheme == (Scheme::Grouped { bits: 4, group: 64 }) && inner % 64 != 0
            {
                continue;
            }
            let hadamard = (inner % 32 == 0).then_some(32);
            let mixture = Mixture::new((hidden, inner, experts, chosen, tokens), [format; 2], hadamard, tokens > 1);
            let what = format!("{format:?}, {tokens} tokens, {chosen} of {experts} experts, {hidden}, {inner}");
            mixture.check(&cuda, true, FLOAT_TOLERANCE, &what);
        }
    }
}

/// Matrix products of the same experts, whose tiles the tokens of an expert fill in part, once and more than once; and a linear of
/// few outputs behind one of many, which goes in other tiles.
#[test]
fn many_tokens_of_every_format_give_the_same_as_expert_by_expert() {
    let Some(cuda) = emulated() else { return };
    for format in FORMATS {
        let float = !format.int8_activations;
        let tolerance = if format.scheme == Scheme::Float && !format.bf16 || !float { FLOAT_TOLERANCE } else { BF16_TOLERANCE };
        for (hidden, inner, experts, chosen, tokens) in [(512, 512, 3, 2, 70), (64, 576, 2, 1, 40), (64, 512, 2, 2, 130)] {
            let mixture = Mixture::new((hidden, inner, experts, chosen, tokens), [format; 2], None, true);
            mixture.check(&cuda, !float, tolerance, &format!("{format:?}, {hidden}, {inner}"));
        }
    }
}

#[test]
fn experts_that_nobody_or_everybody_chooses() {
    let Some(cuda) = emulated() else { return };
    let int8 = FORMATS[2];
    for (tokens, inner) in [(1, 64), (20, 64), (140, 512)] {
        // The correction decides: experts 1 and 4 of six, by all.
        let mut mixture = Mixture::new((64, inner, 6, 2, tokens), [int8; 2], None, false);
        mixture.correction = vec![0.0, 9.0, 0.0, 0.0, 9.0, 0.0];
        mixture.check(&cuda, true, FLOAT_TOLERANCE, &format!("two experts have all of {tokens} tokens"));
        // All equal: the first are chosen.
        mixture.correction.fill(0.0);
        mixture.raw.fill(0.5);
        mixture.check(&cuda, true, FLOAT_TOLERANCE, &format!("{tokens} tokens alike"));
    }
}

/// Up and down in formats of their own are computed at once; experts that differ from each other are not.
#[test]
fn formats_may_differ_between_linears_and_not_between_experts() {
    let Some(cuda) = emulated() else { return };
    let [float, int8, int4] = [FORMATS[0], FORMATS[2], FORMATS[4]];
    for formats in [[float, int8], [int8, int4], [int4, float]] {
        let mixture = Mixture::new((64, 96, 5, 2, 9), formats, None, false);
        mixture.check(&cuda, true, FLOAT_TOLERANCE, &format!("{formats:?}"));
    }
    let alike = || Mixture::new((64, 96, 5, 2, 9), [int8; 2], None, false);
    assert!(alike().at_once(&cuda).is_some());
    let mut other = alike();
    other.experts[3][0] = linear(int4, 96, 64, 7, |_| ());
    assert!(other.at_once(&cuda).is_none(), "an expert of another format");
    let mut other = alike();
    other.experts[3][1].input_scale = Some(0.25);
    assert!(other.at_once(&cuda).is_none(), "an expert with a static scale of its own");
}

/// A golden checkpoint with experts, quantized; `overrides` as on the command line.
fn quantized(folder: &Path, recipe: &str, overrides: &[&str]) -> Checkpoint {
    let output = folder.join(format!("{recipe}-{}", overrides.len()));
    let run = common::strata(folder)
        .args(["quantize", "tests/golden/moe-latent", "--recipe", recipe, "--sequences", "2", "--length", "32", "-o"])
        .arg(&output)
        .args(overrides.iter().flat_map(|rule| ["--override", rule]))
        .output()
        .unwrap();
    common::succeeded(&run);
    Checkpoint::open(&output).unwrap()
}

fn recordable(cuda: &Cuda, checkpoint: &Checkpoint) -> Vec<bool> {
    (0..checkpoint.layout.blocks.len()).map(|index| Block::load(cuda, checkpoint, index).unwrap().is_recordable(cuda)).collect()
}

/// Whole models with experts, quantized: prompts and steps as on the CPU, steps recorded; the same where experts differ, which
/// then are computed one after another, unrecorded.
#[test]
fn quantized_models_with_experts_give_the_cpus_logits() {
    let Some(cuda) = emulated() else { return };
    let folder = tempfile::tempdir().unwrap();
    let cases: [(&str, &[&str]); 4] =
        [("rtn-w8a8", &[]), ("rtn-w4a8", &[]), ("phase3", &[]), ("rtn-w8a8", &["name:*.experts.2.up_proj=w4a16"])];
    for (recipe, overrides) in cases {
        let variant = quantized(folder.path(), recipe, overrides);
        assert_eq!(recordable(&cuda, &variant), [true, overrides.is_empty(), true, overrides.is_empty()], "{recipe} {overrides:?}");
        common::compare_from_caches(&cuda, &variant, &[vec![9, 11]], INT8_TOLERANCE, &format!("{recipe} {overrides:?}"));
    }
}

/// Steps through experts are recorded, and a recorded step gives the logits of one that is not, to the bit, whichever experts its
/// tokens choose.
#[test]
fn recorded_steps_through_experts_are_those_that_are_not_recorded() {
    let Some(cuda) = emulated() else { return };
    for name in ["tests/golden/moe-latent", "../shared/golden/moe"] {
        if !Path::new(name).exists() {
            eprintln!("skipped: {name} is not there");
            continue;
        }
        let checkpoint = Checkpoint::open(Path::new(name)).unwrap();
        assert!(recordable(&cuda, &checkpoint).into_iter().all(|recordable| recordable));
        let model = Hybrid::load(cuda.clone(), &checkpoint).unwrap();
        for sequences in [1, 3] {
            let (mut recorded, mut plain) = (model.cache(sequences), model.cache(sequences));
            for step in 0..6_u32 {
                let ids: Vec<u32> = (0..sequences as u32).map(|i| (41 * step + 97 * i + 5) % 320).collect();
                let found = cuda.download(&model.step(&ids, &mut recorded).unwrap()).unwrap();
                let expected = model.last_logits(&ids, &Sequences::steps(sequences), Some(&mut plain)).unwrap();
                assert_eq!(found, cuda.download(&expected).unwrap(), "{name}, {sequences} sequences, step {step}");
            }
        }
    }
}
