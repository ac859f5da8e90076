//! What arithmetic a forward pass really does, counted by the kernels, against what the plan says. A test file of its own:
//! the counters are the process's.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

use strata::analysis::arithmetic;
use strata::backend::Sequences;
use strata::backend::cpu::Cpu;
use strata::backend::cpu::operations::{self, Products};
use strata::checkpoint::{Checkpoint, StorageLayout, open};
use strata::format::{Activations, Format, Plan, ScaleKind, SsmActivations};
use strata::model::Hybrid;
use strata::monitor::Monitor;
use strata::quant::{Method, QuantizeRequest, Sample, SampleSpec, Steps, quantize};

/// Products of one text through the variant in `directory`.
fn counted(directory: &std::path::Path, ids: &[u32]) -> Products {
    let model = Hybrid::load(Cpu, &Checkpoint::open(directory).unwrap()).unwrap();
    let before = operations::products();
    model.logits(ids, &Sequences::new(vec![ids.len()]), None).unwrap();
    let after = operations::products();
    Products { int8: after.int8 - before.int8, float: after.float - before.float }
}

#[test]
fn the_kernels_compute_what_the_plan_says() {
    let folder = tempfile::tempdir().unwrap();
    // 150 tokens are two whole chunks of the scan and a part of one.
    let ids: Vec<u32> = (0..150).map(|i| (i * 37 + 5) % 320).collect();
    for model in ["tests/golden/dense", "tests/golden/moe-latent"] {
        let checkpoint = open(model).unwrap();
        let formats = [Format::W16A16, Format::W8A16, Format::W8A8, Format::W4A8];
        let kinds = [SsmActivations::Float, SsmActivations::Int8PerToken, SsmActivations::Int8Static];
        let mut shares = Vec::new();
        for (index, (format, ssm)) in formats.into_iter().flat_map(|format| kinds.map(|ssm| (format, ssm))).enumerate() {
            let linears = if index % 2 == 0 { ScaleKind::PerToken } else { ScaleKind::Static };
            let activations = Activations { linears, ssm };
            let plan = Plan { blocks: vec![format; checkpoint.layout.blocks.len()], head: format, ..Plan::unquantized(0) };
            let output = folder.path().join(format!("{index}-{}", model.len()));
            let spec = SampleSpec { sequences: 2, length: 80, ..SampleSpec::default() };
            let request = QuantizeRequest {
                checkpoint: &checkpoint,
                recipe: "test".into(),
                steps: Steps { activations, ..Steps::new(Vec::new(), Method::Rtn) },
                plan: plan.clone(),
                sample: Sample::load(&checkpoint, &spec).unwrap(),
                storage: StorageLayout::Native,
                output: output.clone(),
                host_memory: u64::MAX,
                donors: None,
                force: false,
            };
            quantize(&Cpu, &request, &Monitor::silent()).unwrap();
            let planned = arithmetic::products(&checkpoint, &plan, activations, ids.len());
            let found = counted(&output, &ids);
            assert_eq!((found.int8, found.float), (planned.int8, planned.float), "{model} {format} {ssm:?}");
            shares.push(found.int8 as f64 / (found.int8 + found.float) as f64);
        }
        assert_eq!(shares[0], 0.0, "nothing in 16 bits is int8");
        assert!(shares[7] > shares[6] && shares[6] > 0.5, "int8 internals add int8 products to those of linears: {shares:?}");
    }
}
