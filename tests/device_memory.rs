//! What quantizing takes of a device's memory: predicted before, found after, and whether a 24 GiB card holds it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

mod common;

use std::path::Path;
use std::sync::{Arc, Mutex};

use strata::backend::cuda::Cuda;
use strata::backend::cuda::emulated::{self, Emulated};
use strata::bench::Shape;
use strata::checkpoint::{self, Checkpoint, StorageLayout};
use strata::monitor::{CancelToken, DeviceMemory, Monitor, Report};
use strata::quant::{DeviceNeed, QuantizeRequest, Recipe, Sample, SampleSpec, Shapes, quantize};

/// How far a prediction may be above what is found: it adds up what a block works with as if all of it were there at once.
const FACTOR: f64 = 1.6;

/// What a card of 24 GiB leaves besides the driver's own.
const CARD: u64 = 23 << 30;

/// Recipes as shipped; of those that measure first, their steps.
const RECIPES: [&str; 11] = [
    "phase1",
    "phase2",
    "phase3",
    "phase3-allocated",
    "fit-24gb",
    "rtn",
    "rtn-w8a8",
    "rtn-w4a8",
    "gptq-w4a16",
    "quamba2-like",
    "mambaquant-like",
];

fn request<'a>(checkpoint: &'a Checkpoint, recipe: &str, (sequences, length): (usize, usize), output: &Path) -> QuantizeRequest<'a> {
    let recipe = Recipe::find(recipe).unwrap();
    let spec = SampleSpec { sequences, length, ..SampleSpec::default() };
    QuantizeRequest {
        checkpoint,
        steps: recipe.steps(),
        plan: recipe.plan(&checkpoint.layout, &[]).unwrap(),
        sample: Sample::load(checkpoint, &spec).unwrap(),
        recipe: recipe.name,
        storage: StorageLayout::Native,
        output: output.to_owned(),
        force: false,
        host_memory: 1 << 40,
        donors: None,
    }
}

fn need(request: &QuantizeRequest<'_>) -> DeviceNeed {
    let checkpoint = request.checkpoint;
    DeviceNeed::of(&Shapes {
        layout: &checkpoint.layout,
        config: &checkpoint.config,
        bf16: checkpoint.is_bf16(),
        steps: &request.steps,
        plan: &request.plan,
        hessians: request.steps.method.uses_hessians(),
        lengths: &request.sample.sequences.iter().map(Vec::len).collect::<Vec<_>>(),
    })
}

fn device(total: u64) -> Cuda {
    Cuda::on(Arc::new(Emulated::new().unwrap().with_memory(total)))
}

/// Quantizes on an emulated device of `total` bytes: what the job says of its memory.
fn quantized(request: &QuantizeRequest<'_>, total: u64) -> DeviceMemory {
    let said = Mutex::new(None);
    let follow = |report: Report| {
        if let Report::DeviceMemory(memory) = report {
            *said.lock().unwrap() = Some(memory);
        }
    };
    quantize(&device(total), request, &Monitor::new(follow, CancelToken::default())).unwrap();
    said.into_inner().unwrap().unwrap()
}

/// Quantizes with the streams on the device, with them beside it, and on a device that is too small.
fn check(checkpoint: &Checkpoint, recipe: &str, sample: (usize, usize)) {
    if std::process::Command::new(emulated::compiler()).arg("--version").output().is_err() {
        eprintln!("skipped: there is no C++ compiler");
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let there = request(checkpoint, recipe, sample, &folder.path().join("device"));
    let need = need(&there);
    let found = quantized(&there, 1 << 40);
    assert_eq!((found.predicted_bytes, found.streams), (need.bytes(true, true), "device"));

    // A device with room for nothing else than a block: the streams wait with the host, the next block is not read ahead, and
    // nothing else changes.
    let apart = request(checkpoint, recipe, sample, &folder.path().join("host"));
    let beside = quantized(&apart, need.bytes(false, false));
    assert_eq!((beside.predicted_bytes, beside.streams), (need.bytes(false, false), "host"));
    assert!(common::files(&there.output) == common::files(&apart.output), "other bytes");
    for memory in [found, beside] {
        let ratio = memory.predicted_bytes as f64 / memory.peak_bytes as f64;
        eprintln!("{} {recipe}: {memory}, {ratio:.2} times as much", checkpoint.name);
        assert!((1.0..FACTOR).contains(&ratio), "{} {recipe}: {memory}", checkpoint.name);
    }

    // One that cannot hold a block is refused before anything is done.
    let refused = request(checkpoint, recipe, sample, &folder.path().join("refused"));
    let error = quantize(&device(need.bytes(false, false) - 1), &refused, &Monitor::silent()).unwrap_err();
    assert!(error.message.contains("are free") && error.hint.unwrap().contains("would do"), "{}", error.message);
    assert!(!refused.output.exists());
}

#[test]
fn the_memory_predicted_for_a_mixture_is_enough_and_not_far_above_what_is_found() {
    check(&Checkpoint::open(Path::new("tests/golden/moe-latent")).unwrap(), "phase3", (3, 24));
}

#[test]
fn the_memory_predicted_for_the_demo_is_enough_and_not_far_above_what_is_found() {
    check(&checkpoint::open(checkpoint::DEMO).unwrap(), "rtn-w8a8", (2, 20));
}

#[test]
#[ignore = "emulated kernels take many minutes for GPTQ of the demo"]
fn the_memory_predicted_for_gptq_of_the_demo_is_enough_and_not_far_above_what_is_found() {
    check(&checkpoint::open(checkpoint::DEMO).unwrap(), "gptq-w4a16", (2, 20));
}

/// The published shapes, by every recipe that is shipped, on 128 sequences of 2048 tokens.
#[test]
fn published_models_calibrate_on_a_card_of_24_gib() {
    for name in ["nemotron-3-nano-30b-a3b", "nemotron-h-8b", "nemotron-nano-9b-v2", "nemotron-3-nano-4b"] {
        let shape = Shape::find(name).unwrap();
        for recipe in RECIPES {
            let recipe = Recipe::find(recipe).unwrap();
            let (steps, plan) = (recipe.steps(), recipe.plan(&shape.layout, &[]).unwrap());
            let need = DeviceNeed::of(&Shapes {
                layout: &shape.layout,
                config: &shape.config,
                bf16: true,
                steps: &steps,
                plan: &plan,
                hessians: steps.method.uses_hessians(),
                lengths: &[2048; 128],
            });
            let gib = |bytes: u64| bytes as f64 / f64::from(1 << 30);
            let [there, apart, ahead] =
                [(true, false), (false, false), (false, true)].map(|(streams, ahead)| gib(need.bytes(streams, ahead)));
            eprintln!(
                "{name} {}: {there:.1} GiB, {apart:.1} with the sample in the host's memory, {ahead:.1} with blocks read ahead",
                recipe.name
            );
            // With the next block read ahead, too.
            let room = need.within(CARD, "a card").unwrap();
            assert!(room.ahead && room.bytes < CARD, "{name} {}: {room:?}", recipe.name);
        }
    }
}
