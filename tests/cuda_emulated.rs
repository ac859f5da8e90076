//! The CUDA backend without a GPU: whole models through the kernels' own sources, built for the processor, against the
//! CPU backend. Skipped, with a printed reason, where there is no C++ compiler.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

mod common;

use std::path::Path;
use std::sync::Arc;

use common::largest_difference;
use faer::{Mat, MatMut};
use half::bf16;
use rayon::prelude::*;
use strata::backend::cpu::Cpu;
use strata::backend::cuda::emulated::Emulated;
use strata::backend::cuda::libraries::Libraries;
use strata::backend::cuda::nvrtc::Nvrtc;
use strata::backend::cuda::{Cuda, sources};
use strata::backend::{
    AttentionShape, Backend, Emit, MambaParameters, MambaShape, Sequences, Side, SsmInternals, SsmScales, StateRotation,
};
use strata::checkpoint::{self, Checkpoint};
use strata::eval::{EvaluateRequest, ModelToEvaluate, evaluate};
use strata::format::{CacheFormat, CacheFormats, LinearWeights};
use strata::model::{Batch, Block, Hybrid, MemoryNeed, Reader, Rounding};
use strata::monitor::Monitor;

/// Largest difference of a logit where both backends multiply floats in f32: sums are taken in other orders.
const FLOAT_TOLERANCE: f32 = 2e-4;

/// The same where prompts' activations are rounded to bf16 in front of matrix products.
const BF16_TOLERANCE: f32 = 0.1;
/// The same where activations are int8: a float that differs in its last bit may round to another code.
const INT8_TOLERANCE: f32 = 0.2;
/// The same for longer texts that go on from caches: the CPU's own logits of a text computed at once and token by token differ
/// by up to 0.22 on these variants, their largest being 10 to 19.
const CACHED_TOLERANCE: f32 = 0.5;
/// Root mean square of the difference of one mixer's outputs, as a share of their own: a few codes of thousands differ by one.
const MIXER_TOLERANCE: f64 = 1e-3;

/// The emulated device, or why there is none.
fn emulated() -> Option<Cuda> {
    if std::process::Command::new(strata::backend::cuda::emulated::compiler()).arg("--version").output().is_err() {
        eprintln!("skipped: there is no C++ compiler");
        return None;
    }
    Some(Cuda::emulated().unwrap())
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
    for recipe in ["rtn-w8a8", "rtn-w4a8"] {
        let variant = variant(&demo, recipe, &folder.path().join(recipe));
        let (expected, found) = logits(&cuda, &variant, &ids, &sequences);
        let difference = largest_difference(&expected, &found);
        assert!(difference < INT8_TOLERANCE, "{recipe}: logits differ by {difference}");
    }
}

/// A recipe of W8A8 with more after it.
fn recipe(folder: &Path, name: &str, more: &str) -> String {
    let formats = "ssm = \"w8a8\"\nmlp = \"w8a8\"\nattention = \"w8a8\"\nmoe = \"w8a8\"\nembedding = \"w8a16\"\nhead = \"w8a8\"";
    let text = format!("schema = \"strata.recipe/1\"\nname = \"{name}\"\nmethod = \"rtn\"\n{more}\n[formats]\n{formats}\n");
    let path = folder.join(format!("{name}.toml"));
    std::fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The phases as shipped (int8 inside the SSM blocks, rotated states), int8 with scales found at run time, and rounded caches of
/// every format: a prompt, a second one behind it, then steps, of which the last are recorded.
#[test]
fn shipped_phases_and_rounded_caches_give_the_cpus_logits() {
    let Some(cuda) = emulated() else { return };
    let demo = checkpoint::open(checkpoint::DEMO).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let own = |name: &str, more: &str| recipe(folder.path(), name, more);
    let recipes = [
        "phase1".to_owned(),
        "phase2".to_owned(),
        "phase3".to_owned(),
        own(
            "per-token",
            "transforms = [\"rotate-state\"]\nactivations = { ssm = \"int8-per-token\" }\ncache = { state = \"int8\", kv = \"f16\" }",
        ),
        own("halves", "transforms = [\"rotate-state\"]\ncache = { state = \"f16\", conv = \"f16\", kv = \"f16\" }"),
        own("codes", "cache = { state = \"int8\", conv = \"int8\", kv = \"int8\" }"),
    ];
    for (index, recipe) in recipes.iter().enumerate() {
        let variant = variant(&demo, recipe, &folder.path().join(format!("variant-{index}")));
        common::compare_from_caches(&cuda, &variant, &[vec![67, 3], vec![1, 5]], CACHED_TOLERANCE, recipe);
    }
}

/// Steps of a single sequence on a data-centre GPU: linears compute the norms and squares in front of them themselves.
#[test]
fn fronts_inside_linears_give_the_cpus_logits() {
    if emulated().is_none() {
        return;
    }
    let cuda = Cuda::on(Arc::new(Emulated::new().unwrap().with_arch(90)));
    let demo = checkpoint::open(checkpoint::DEMO).unwrap();
    // Of longer prompts bf16 products round the activations.
    let prompts = [vec![3], vec![1]];
    common::compare_from_caches(&cuda, &demo, &prompts, FLOAT_TOLERANCE, "bf16");
    let folder = tempfile::tempdir().unwrap();
    for recipe in ["rtn-w8a8", "rtn-w4a8", "phase2"] {
        let variant = variant(&demo, recipe, &folder.path().join(recipe));
        common::compare_from_caches(&cuda, &variant, &prompts, INT8_TOLERANCE, recipe);
    }
}

/// Sizes that the kernels do not serve are refused, and not computed wrong.
#[test]
fn mixers_beyond_the_kernels_are_refused() {
    let Some(cuda) = emulated() else { return };
    let refusal = |state: usize, kernel: usize| -> String {
        let shape = MambaShape { heads: 2, head_dim: 4, groups: 1, state, kernel, dt_min: 0.0, dt_max: f32::INFINITY };
        let of_heads = || vec![1.0; shape.heads];
        let parameters = MambaParameters {
            conv_weight: vec![0.0; shape.conv_channels() * kernel],
            conv_bias: vec![0.0; shape.conv_channels()],
            a: of_heads(),
            d: of_heads(),
            dt_bias: of_heads(),
            internals: SsmInternals::Float,
            rotation: None,
        };
        let project = || {
            let parameters = cuda.prepare_mamba(parameters)?;
            let in_proj = cuda.prepare(LinearWeights::float(vec![0.0; shape.projected() * 64], 64))?;
            let x = cuda.emit(cuda.upload(vec![0.0; 64], 64)?, Emit::FLOAT)?;
            cuda.project(&in_proj, &x, &parameters, &shape).map(drop)
        };
        project().err().map_or_else(String::new, |error| error.to_string())
    };
    assert!(refusal(6, 4).contains("multiple of 4") && refusal(260, 4).contains("up to 256"));
    assert!(refusal(8, 9).contains("up to 8 taps"));
    assert_eq!(refusal(8, 4), "");
}

/// One mixer on both backends, from the same projections: every form of the internals with every cache, rotated and not, over a
/// prompt, another one and steps.
#[test]
fn mixers_of_every_form_give_the_cpus_outputs() {
    let Some(cuda) = emulated() else { return };
    let shape = MambaShape { heads: 8, head_dim: 24, groups: 2, state: 32, kernel: 4, dt_min: 0.0, dt_max: f32::INFINITY };
    let (inner, channels) = (shape.inner(), shape.conv_channels());
    let random = |count: usize, seed: usize| -> Vec<f32> {
        let hash = |i: usize| (i * 2_654_435_761 + seed * 40_503) % 1009;
        (0..count).map(|i| hash(i) as f32 / 504.5 - 1.0).collect()
    };
    // B and C have a scale a group.
    let behind = (0..channels).map(|c| 0.004 + 0.002 * if c < inner { c % 5 } else { (c - inner) / shape.state } as f32).collect();
    let fixed = SsmScales {
        z: vec![0.01; inner],
        conv_in: (0..channels).map(|c| 0.008 + 0.001 * (c % 7) as f32).collect(),
        conv_out: behind,
        dt: (0..shape.heads).map(|head| 0.01 + 0.001 * head as f32).collect(),
    };
    let formats = [CacheFormat::F32, CacheFormat::F16, CacheFormat::Int8];
    let internals = [SsmInternals::Float, SsmInternals::Int8PerToken, SsmInternals::Int8Static(fixed)];
    for (internals, rotation, format) in internals.iter().flat_map(|internals| {
        let both = [None, Some(StateRotation::of(&shape))];
        both.into_iter().flat_map(move |rotation| formats.map(|format| (internals, rotation, format)))
    }) {
        let parameters = MambaParameters {
            conv_weight: random(channels * shape.kernel, 1),
            conv_bias: random(channels, 2),
            a: random(shape.heads, 3).iter().map(|a| -(a.abs() + 0.2)).collect(),
            d: random(shape.heads, 4),
            dt_bias: random(shape.heads, 5),
            internals: internals.clone(),
            rotation,
        };
        let caches = CacheFormats { state: format, conv: format, kv: format };
        let calls = [vec![70, 3], vec![2, 65], vec![1, 1], vec![1, 1]];
        let (on_cpu, on_cuda) = (mix(&Cpu, &parameters, &shape, caches, &calls), mix(&cuda, &parameters, &shape, caches, &calls));
        let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
        let difference = square(&mut on_cpu.iter().zip(&on_cuda).map(|(a, b)| f64::from(a - b)));
        let share = (difference / square(&mut on_cpu.iter().map(|x| f64::from(*x)))).sqrt();
        assert!(share < MIXER_TOLERANCE, "{internals:?}, {rotation:?}, {format:?}: {share}");
    }
}

/// Gated and normalised outputs of calls with these lengths of two sequences, all from one cache; the last steps are a call each.
fn mix<B: Backend>(backend: &B, parameters: &MambaParameters, shape: &MambaShape, formats: CacheFormats, calls: &[Vec<usize>]) -> Vec<f32> {
    let width = shape.projected();
    let identity: Vec<f32> = (0..width * width).map(|i| f32::from(u8::from(i % (width + 1) == 0))).collect();
    let in_proj = backend.prepare(LinearWeights::float(identity, width)).unwrap();
    let weight = backend.prepare_vector((0..shape.inner()).map(|c| 1.0 + 0.01 * (c % 9) as f32).collect()).unwrap();
    let parameters = backend.prepare_mamba(parameters.clone()).unwrap();
    let mut cache = backend.ssm_cache(&parameters, shape, 2, formats);
    let mut all = Vec::new();
    for (call, lengths) in calls.iter().enumerate() {
        let tokens: usize = lengths.iter().sum();
        let value = |i: usize| bf16::from_f32(((i * 7919 + call * 104_729) % 2003) as f32 / 1001.5 - 1.0).to_f32();
        let x = backend.upload((0..tokens * width).map(value).collect(), width).unwrap();
        let x = backend.emit(x, Emit::FLOAT).unwrap();
        let projection = backend.project(&in_proj, &x, &parameters, shape).unwrap();
        let y = backend.mamba_scan(&projection, &parameters, shape, &Sequences::new(lengths.clone()), Some(&mut cache)).unwrap();
        let out = backend.group_norm(&y, &weight, shape.inner() / shape.groups, 1e-5, Emit::FLOAT).unwrap();
        all.extend(backend.floats(&out).unwrap());
    }
    all
}

/// int8 hides what is not a number; the error says so where results come to the host.
#[test]
fn values_that_are_not_finite_inside_a_block_of_codes_are_an_error() {
    let Some(cuda) = emulated() else { return };
    let shape = MambaShape { heads: 2, head_dim: 8, groups: 1, state: 8, kernel: 4, dt_min: 0.0, dt_max: f32::INFINITY };
    let parameters = MambaParameters {
        conv_weight: vec![0.1; shape.conv_channels() * shape.kernel],
        conv_bias: vec![0.0; shape.conv_channels()],
        a: vec![-1.0; 2],
        d: vec![1.0; 2],
        dt_bias: vec![0.0; 2],
        internals: SsmInternals::Int8PerToken,
        rotation: None,
    };
    let parameters = cuda.prepare_mamba(parameters).unwrap();
    let identity: Vec<f32> = (0..shape.projected().pow(2)).map(|i| f32::from(u8::from(i % (shape.projected() + 1) == 0))).collect();
    let in_proj = cuda.prepare(LinearWeights::float(identity, shape.projected())).unwrap();
    let run = |value: f32| {
        let mut x = vec![0.5; shape.projected()];
        x[20] = value;
        let x = cuda.emit(cuda.upload(x, shape.projected()).unwrap(), Emit::FLOAT).unwrap();
        let projection = cuda.project(&in_proj, &x, &parameters, &shape).unwrap();
        let y = cuda.mamba_scan(&projection, &parameters, &shape, &Sequences::new(vec![1]), None).unwrap();
        cuda.download(&y)
    };
    assert!(run(f32::INFINITY).unwrap_err().message.contains("not finite"));
    assert!(run(0.25).unwrap().iter().all(|value| value.is_finite()));
}

/// An evaluation says how much of the device's memory it took: the weights at least.
#[test]
fn an_evaluation_records_the_memory_of_the_device() {
    let Some(cuda) = emulated() else { return };
    let request = EvaluateRequest {
        models: vec![ModelToEvaluate { name: "base".into(), path: checkpoint::DEMO.into() }],
        tasks: Vec::new(),
        windows: 1,
        window_tokens: 16,
        ..EvaluateRequest::default()
    };
    let mut found = None;
    evaluate(|| cuda.clone(), &request, &Monitor::silent(), |evaluated| found = Some(evaluated.result)).unwrap();
    let memory = found.unwrap().memory;
    assert!(memory.device_peak_bytes.unwrap() >= memory.resident_weight_bytes && memory.resident_weight_bytes > 0, "{memory:?}");
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
        let mut last = None;
        for step in 0..5 {
            let ids = [3 + step, 40 - 2 * step];
            let expected = Cpu.download(&on_cpu.step(&ids, &mut cpu_cache).unwrap()).unwrap();
            let logits = on_cuda.step(&ids, &mut cuda_cache).unwrap();
            // Before anything waits for the step, whose launches leave the choice.
            let chosen = cuda.argmax(&logits).unwrap();
            let found = cuda.download(&logits).unwrap();
            let difference = largest_difference(&expected, &found);
            assert!(difference < FLOAT_TOLERANCE, "{name} step {step}: logits differ by {difference}");
            let best = |logits: Vec<f32>| Cpu.argmax(&Cpu.upload(logits, on_cpu.vocabulary()).unwrap()).unwrap();
            assert_eq!(chosen, best(found), "{name} step {step}");
            last = Some((logits, chosen));
        }
        // The logits outlive the recording that left their choice.
        drop(cuda_cache);
        let (logits, chosen) = last.unwrap();
        assert_eq!(cuda.argmax(&logits).unwrap(), chosen, "{name}");
    }
}

#[test]
fn steps_of_many_heads_a_key_value_head_see_every_key_and_are_not_recorded() {
    let Some(cuda) = emulated() else { return };
    let shape = |ratio: usize| AttentionShape { heads: 2 * ratio, kv_heads: 2, head_dim: 32 };
    assert!(cuda.records_attention(&shape(16)) && !cuda.records_attention(&shape(17)));
    for shape in [shape(16), shape(17)] {
        let rows = |seed: usize, cols: usize| (0..cols).map(|i| ((i * 31 + seed * 17) % 23) as f32 / 23.0 - 0.5).collect::<Vec<f32>>();
        let step = |seed: usize| [shape.heads, shape.kv_heads, shape.kv_heads].map(|heads| (rows(seed + heads, heads * 32), heads * 32));
        let formats = CacheFormats::default();
        let (mut on_cpu, mut on_cuda) = (Cpu.kv_cache(&shape, 1, formats), cuda.kv_cache(&shape, 1, formats));
        for seed in 0..4 {
            let sequences = Sequences::steps(1);
            let [q, k, v] = step(seed).map(|(values, cols)| Cpu.upload(values, cols).unwrap());
            let expected = Cpu.attention(&q, &k, &v, &shape, &sequences, Some(&mut on_cpu)).unwrap();
            let [q, k, v] = step(seed).map(|(values, cols)| cuda.upload(values, cols).unwrap());
            let found = cuda.attention(&q, &k, &v, &shape, &sequences, Some(&mut on_cuda)).unwrap();
            let difference = largest_difference(&Cpu.download(&expected).unwrap(), &cuda.download(&found).unwrap());
            assert!(difference < FLOAT_TOLERANCE, "{} heads, step {seed}: {difference}", shape.heads);
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

/// Rotations of weights by the device's products, of both sides, of whole matrices and of some columns of one.
#[test]
fn weights_turn_as_on_the_cpu() {
    let Some(cuda) = emulated() else { return };
    let value = |i: usize, j: usize| ((i * 7919 + j * 104_729) % 2003) as f64 / 1001.5 - 1.0;
    let weights = Mat::from_fn(37, 52, value);
    for (side, first, width) in [(Side::Inputs, 0, 52), (Side::Outputs, 0, 52), (Side::Inputs, 16, 20), (Side::Outputs, 7, 3)] {
        let order = if side == Side::Inputs { width } else { 37 };
        let rotation = Mat::from_fn(order, order, |i, j| value(j + 3, i));
        let turned = |backend: &dyn Fn(MatMut<'_, f64>)| {
            let mut turned = weights.clone();
            backend(turned.as_mut().subcols_mut(first, width));
            turned
        };
        let expected = turned(&|part| Cpu.turn(part, rotation.as_ref(), side).unwrap());
        let found = turned(&|part| cuda.turn(part, rotation.as_ref(), side).unwrap());
        assert!((&found - &expected).norm_max() < 1e-13 && (&found - &weights).norm_max() > 0.1, "{side:?} {first} {width}");
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
    // That a file is empty for an architecture is no failure.
    let scan = sources::KERNELS.iter().find(|source| source.name == "scan.cu").unwrap();
    assert!(nvrtc.resources(scan, 80).unwrap().is_empty() && !nvrtc.resources(scan, 90).unwrap().is_empty());
}

/// Buffers of the device by what was written into them before and is to be seen when copies ahead end.
#[test]
fn copies_ahead_write_what_was_free_before_and_are_seen_when_they_end() {
    let Some(cuda) = emulated() else { return };
    let memory = cuda.memory();
    let buffer = |value: u8| {
        let buffer = memory.allocate(1000).unwrap();
        buffer.upload(&[value; 1000]).unwrap();
        buffer
    };
    let (before, during) = (buffer(1), buffer(2));
    let (free, late) = (before.address(), during.address());
    drop(before);
    assert!(memory.begin_ahead().unwrap());
    assert!(!memory.begin_ahead().unwrap(), "they are under way");
    drop(during);
    let ahead = [memory.allocate_ahead(1000).unwrap(), memory.allocate_ahead(1000).unwrap()];
    assert_eq!(ahead[0].address(), free);
    assert_ne!(ahead[1].address(), late, "launches may still use it");
    for buffer in &ahead {
        buffer.upload_ahead(&[3_u8; 1000]).unwrap();
    }
    assert_eq!(ahead[0].download::<u8>(1).unwrap(), [1], "not yet");
    let [ahead, dropped] = ahead;
    let written = dropped.address();
    drop(dropped);
    assert_eq!(memory.allocate(1000).unwrap().address(), late, "what is being written serves nobody");
    let _taken = memory.allocate(1000).unwrap();
    memory.end_ahead().unwrap();
    assert_eq!(ahead.download::<u8>(1000).unwrap(), [3; 1000]);
    assert_eq!(memory.allocate(1000).unwrap().address(), written);
}

/// What is made beside something else is ready behind it, and the error of either is told.
#[test]
fn what_is_loaded_beside_a_pass_is_what_is_loaded_alone() {
    let Some(cuda) = emulated() else { return };
    let dense = Checkpoint::open(Path::new("tests/golden/dense")).unwrap();
    let h =
        cuda.upload((0..5 * dense.config.hidden_size).map(|i| (i % 13) as f32 / 6.0 - 1.0).collect(), dense.config.hidden_size).unwrap();
    let sequences = Sequences::new(vec![5]);
    let run = |block: &Block<Cuda>| cuda.download(&block.forward(&cuda, h.clone(), &sequences, None).unwrap()).unwrap();
    for index in 1..dense.layout.blocks.len() {
        let first = Block::load(&cuda, &dense, index - 1).unwrap();
        let mut meanwhile = Vec::new();
        let beside = cuda.beside(
            |cuda| Block::load(cuda, &dense, index),
            || {
                meanwhile = run(&first);
                Ok(())
            },
        );
        let alone = Block::load(&cuda, &dense, index).unwrap();
        assert_eq!(run(&beside.unwrap()), run(&alone), "block {index}");
        assert_eq!(meanwhile, run(&first), "block {}", index - 1);
    }
    let failed = || strata::error::Error::run("no");
    assert_eq!(cuda.beside(|_| Err::<(), _>(failed()), || Ok(())).unwrap_err().message, "no");
    assert_eq!(cuda.beside(|_| Ok(()), || Err(failed())).unwrap_err().message, "no");
}

/// A model that is read block by block, with the next block read ahead and without, says what a resident one does.
#[test]
fn a_streamed_model_reads_as_a_resident_one() {
    let Some(cuda) = emulated() else { return };
    let dense = Checkpoint::open(Path::new("tests/golden/dense")).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let ids: Vec<u32> = (0..12).map(|i| (7 * i + 3) % dense.config.vocab_size as u32).collect();
    let sequences = Sequences::new(vec![5, 7]);
    let need = MemoryNeed::of(&dense, ids.len()).unwrap();
    let read = |memory: u64| {
        let reader = Reader::load(cuda.clone(), &dense, memory, folder.path(), ids.len(), &Monitor::silent()).unwrap();
        let batches = [Batch { ids: &ids, sequences: &sequences }; 2];
        let mut pass = reader.pass(&batches, Rounding::None, "read", &Monitor::silent()).unwrap();
        let logits = [0, 1].map(|batch| cuda.download(&pass.outputs(batch).unwrap().logits().unwrap()).unwrap());
        (reader.resident().is_some(), logits)
    };
    let (resident, expected) = read(u64::MAX);
    assert!(resident && need.resident() - 1 - need.streamed() >= need.largest_block, "the next block is not read ahead");
    for memory in [need.streamed(), need.resident() - 1] {
        assert_eq!(read(memory), (false, expected.clone()), "{memory}");
    }
}
