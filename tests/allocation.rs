//! Sensitivities end to end: measured, interrupted and resumed, invalidated; plans put together from donors.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

use std::cell::Cell;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use strata::analysis::allocate::{Activations, AllocateRequest, Budget, allocate, checks_of};
use strata::analysis::sensitivity::{
    self, Granularity, Identity, Loss, Request, Sensitivities, SensitivitySpec, UnitLosses, donors_directory,
};
use strata::analysis::study::{ALLOCATED, StudyRequest, study};
use strata::analysis::{Footprint, Gpu, Prediction};
use strata::backend::cpu::Cpu;
use strata::checkpoint::{self, Checkpoint, Config, DEMO_HELDOUT, Layout, StorageLayout};
use strata::error::ErrorKind;
use strata::eval::{EvaluateRequest, ModelToEvaluate, evaluate, text};
use strata::format::{Format, Plan, SsmActivations};
use strata::monitor::{CancelToken, Monitor, Report};
use strata::quant::{Donors, QuantizeRequest, Recipe, SampleSpec, quantize};
use strata::session::Session;

/// A measurement that takes seconds.
fn spec(recipe: &str) -> SensitivitySpec {
    let recipe = Recipe::find(recipe).unwrap();
    let ends = recipe.plan(&checkpoint::open("demo").unwrap().layout, &[]).unwrap();
    let sample = SampleSpec { sequences: 2, length: 64, ..SampleSpec::default() };
    SensitivitySpec {
        by: Granularity::Linear,
        formats: vec![Format::W8A8, Format::W4A8, Format::W2A8],
        windows: 2,
        positions: 32,
        exact: 0.5,
        ..SensitivitySpec::new(recipe.steps(), &ends, sample)
    }
}

/// A monitor that cancels when a stage begins.
fn measure_until_stage(stage: &'static str) -> Monitor<'static> {
    let cancel = CancelToken::default();
    let token = cancel.clone();
    let begins = move |report: &Report| matches!(report, Report::Stage { name, .. } if name == stage);
    Monitor::new(
        move |report| {
            if begins(&report) {
                token.cancel();
            }
        },
        cancel,
    )
}

/// A monitor that cancels after so many losses and counts them.
fn measure_until(losses: usize, seen: &Mutex<usize>) -> Monitor<'_> {
    let cancel = CancelToken::default();
    let token = cancel.clone();
    Monitor::new(
        move |report| {
            if let Report::Measured { .. } = report {
                let mut seen = seen.lock().unwrap();
                *seen += 1;
                if *seen == losses {
                    token.cancel();
                }
            }
        },
        cancel,
    )
}

fn rows_file(store: &Path) -> std::path::PathBuf {
    let folder = std::fs::read_dir(store.join("sensitivity")).unwrap().next().unwrap().unwrap().path();
    folder.join("rows.jsonl")
}

#[test]
fn interrupted_and_resumed_it_measures_the_same_and_nothing_twice() {
    let demo = checkpoint::open("demo").unwrap();
    let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let spec = spec("rtn-w8a8");
    let request = |store: &Path| Request::new(&demo, &spec, store.to_owned()).unwrap();
    let pool = |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();

    let all = Mutex::new(0);
    let expected = pool(2).install(|| sensitivity::measure(&Cpu, &request(whole.path()), false, &measure_until(usize::MAX, &all)).unwrap());
    let all = *all.lock().unwrap();
    assert_eq!(all, 36, "half of 24 units in 3 formats");

    let first = Mutex::new(0);
    let error = pool(1).install(|| sensitivity::measure(&Cpu, &request(parts.path()), false, &measure_until(20, &first)).unwrap_err());
    assert_eq!(error.kind, ErrorKind::Cancelled);
    assert!(sensitivity::load(&request(parts.path())).unwrap_err().message.contains("not measured to the end"));
    // A kill in the middle of a write leaves half a line.
    let rows = rows_file(parts.path());
    let text = std::fs::read(&rows).unwrap();
    std::fs::write(&rows, &text[..text.len() - 20]).unwrap();

    let second = Mutex::new(0);
    let resumed =
        pool(1).install(|| sensitivity::measure(&Cpu, &request(parts.path()), false, &measure_until(usize::MAX, &second)).unwrap());
    assert_eq!(*second.lock().unwrap(), all - 20 + 1, "the line that was cut off is measured again, the others are not");
    assert_eq!((&resumed.units, &resumed.checks, resumed.ends_kld), (&expected.units, &expected.checks, expected.ends_kld));
    assert_eq!(sensitivity::load(&request(parts.path())).unwrap().units, expected.units);

    // Narrower weights lose more, in every unit, and the sum of losses is near what plans lose.
    for unit in &expected.units {
        let kld = |format| unit.loss(format).unwrap().kld;
        assert!(kld(Format::W2A8) > kld(Format::W4A8) && kld(Format::W4A8) > kld(Format::W8A8), "{}", unit.name);
    }
    // Small losses add up; round-to-nearest at two bits everywhere is no small change.
    assert!(!expected.checks.is_empty());
    let check = &expected.checks[0];
    assert!((0.5..2.0).contains(&check.ratio()), "{} predicted, {} measured", check.predicted, check.measured);
}

/// What plans lose is checked for the activations that there are: where only 16-bit ones were measured, checks were asked for
/// with int8 ones, and the measurement failed at its very end.
#[test]
fn plans_are_checked_with_the_activations_that_were_measured() {
    let demo = checkpoint::open("demo").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let measured = |formats: &[Format]| {
        let spec = SensitivitySpec { by: Granularity::Block, formats: formats.to_vec(), exact: 0.0, ..spec("rtn-w8a8") };
        let request = Request::new(&demo, &spec, folder.path().to_owned()).unwrap();
        sensitivity::measure(&Cpu, &request, false, &Monitor::silent()).unwrap()
    };
    let of = |losses: &Sensitivities, activations| checks_of(losses, activations).count();
    let float = measured(&[Format::W8A16, Format::W4A16]);
    assert!(of(&float, Activations::Float) >= 3 && of(&float, Activations::Int8) == 0);
    let both = measured(&[Format::W8A16, Format::W4A16, Format::W8A8, Format::W4A8]);
    assert_eq!(of(&both, Activations::Float), of(&float, Activations::Float));
    assert!(of(&both, Activations::Int8) >= 3);
}

/// With its losses measured and its plans unchecked, a measurement that was stopped passed as complete.
#[test]
fn a_measurement_that_was_stopped_says_so_until_it_is_finished() {
    let demo = checkpoint::open("demo").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let narrow = SensitivitySpec { by: Granularity::Block, formats: vec![Format::W8A8, Format::W4A8], exact: 0.0, ..spec("rtn-w8a8") };
    let wide = SensitivitySpec { formats: vec![Format::W8A8, Format::W4A8, Format::W2A8], ..narrow.clone() };
    let measure = |spec: &SensitivitySpec, monitor: &Monitor<'_>| {
        let request = Request::new(&demo, spec, folder.path().to_owned()).unwrap();
        let ended = sensitivity::measure(&Cpu, &request, false, monitor).is_ok();
        let found = sensitivity::load(&request).unwrap();
        (ended, found.complete, found.checks.is_empty())
    };
    assert_eq!(measure(&narrow, &measure_until_stage("check")), (false, false, true));
    assert_eq!(measure(&narrow, &Monitor::silent()), (true, true, false));
    let lines = std::fs::read_to_string(rows_file(folder.path())).unwrap().lines().filter(|line| !line.is_empty()).count();
    assert_eq!(measure(&narrow, &Monitor::silent()), (true, true, false));
    let again = std::fs::read_to_string(rows_file(folder.path())).unwrap().lines().filter(|line| !line.is_empty()).count();
    assert_eq!(again, lines, "nothing is left to be said");
    // More of what was measured, and a further format, are measurements of their own.
    let exact = SensitivitySpec { exact: 1.0, ..narrow.clone() };
    assert_eq!(measure(&exact, &measure_until_stage("measure")), (false, false, false));
    assert_eq!(measure(&exact, &Monitor::silent()), (true, true, false));
    assert_eq!(measure(&wide, &measure_until_stage("check")), (false, false, false));
    assert_eq!(measure(&wide, &Monitor::silent()), (true, true, false));
}

/// Two measurements of other windows or units share their donors, whose index only one may write at a time.
#[test]
fn donors_are_made_by_one_process_at_a_time() {
    let demo = checkpoint::open("demo").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let spec = SensitivitySpec { by: Granularity::Block, formats: vec![Format::W8A8], ..spec("rtn-w8a8") };
    let request = Request::new(&demo, &spec, folder.path().to_owned()).unwrap();
    let donors = donors_directory(folder.path());
    let open = || Donors::open(&Cpu, &demo, &request.steps, &request.calibration, &donors, &Monitor::silent()).unwrap();
    let held = open().lock().unwrap();
    let error = sensitivity::measure(&Cpu, &request, false, &Monitor::silent()).unwrap_err();
    assert!(error.message.contains("another strata is writing to"), "{}", error.message);
    drop(held);
    sensitivity::measure(&Cpu, &request, false, &Monitor::silent()).unwrap();
    // What is there already is read by as many as like to.
    let held = open().lock().unwrap();
    sensitivity::measure(&Cpu, &request, false, &Monitor::silent()).unwrap();
    drop(held);
}

#[test]
fn a_changed_checkpoint_or_calibration_invalidates_what_was_measured() {
    let folder = tempfile::tempdir().unwrap();
    let (model, store) = (folder.path().join("model"), folder.path().join("store"));
    std::fs::create_dir(&model).unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(Path::new("models/demo").join(file), model.join(file)).unwrap();
    }
    let spec = SensitivitySpec { by: Granularity::Block, formats: vec![Format::W4A8, Format::W2A8], exact: 0.0, ..spec("rtn-w8a8") };
    let load = |spec: &SensitivitySpec| {
        let checkpoint = Checkpoint::open(&model).unwrap();
        let request = Request::new(&checkpoint, spec, store.clone()).unwrap();
        sensitivity::load(&request).map(|found| found.units.len())
    };
    assert!(load(&spec).unwrap_err().message.contains("has no measured sensitivities"));
    {
        let checkpoint = Checkpoint::open(&model).unwrap();
        let request = Request::new(&checkpoint, &spec, store.clone()).unwrap();
        let found = sensitivity::measure(&Cpu, &request, false, &Monitor::silent()).unwrap();
        assert!(found.units.iter().all(|unit| !unit.loss(Format::W4A8).unwrap().measured && unit.loss(Format::W2A8).unwrap().measured));
    }
    assert_eq!(load(&spec).unwrap(), 12);
    let other = |change: &dyn Fn(&mut SensitivitySpec)| {
        let mut spec = spec.clone();
        change(&mut spec);
        load(&spec).unwrap_err().message
    };
    assert!(other(&|spec| spec.sample.seed = 1).contains("another calibration"));
    assert!(other(&|spec| spec.windows = 1).contains("on other tokens"));
    assert!(other(&|spec| spec.by = Granularity::Linear).contains("other units"));
    assert!(other(&|spec| spec.steps = Recipe::find("phase2").unwrap().steps()).contains("other transforms or rounding"));
    assert!(other(&|spec| spec.steps.activations.ssm = SsmActivations::Int8Static).contains("other SSM internals"));
    assert!(other(&|spec| spec.steps.activations.ssm = SsmActivations::Int8PerToken).contains("other SSM internals"));

    let weights = model.join("model.safetensors");
    let mut bytes = std::fs::read(&weights).unwrap();
    let last = bytes.len() - 2;
    bytes[last] ^= 1;
    std::fs::write(&weights, bytes).unwrap();
    let error = load(&spec).unwrap_err();
    assert!(
        error.message.contains("the checkpoint has changed") && error.hint.unwrap().contains("strata sensitivity"),
        "{}",
        error.message
    );
}

/// int8 SSM internals come with an `in_proj` that reads int8: they are in its loss, and in no other one.
#[test]
fn losses_contain_the_internals_that_the_recipe_ships() {
    let demo = checkpoint::open("demo").unwrap();
    let folder = tempfile::tempdir().unwrap();
    let measured = |ssm| {
        let mut spec = SensitivitySpec { formats: vec![Format::W8A16, Format::W8A8], exact: 1.0, ..spec("rtn-w8a8") };
        spec.steps.activations.ssm = ssm;
        let request = Request::new(&demo, &spec, folder.path().to_owned()).unwrap();
        sensitivity::measure(&Cpu, &request, false, &Monitor::silent()).unwrap()
    };
    let [float, per_token, fixed] = [SsmActivations::Float, SsmActivations::Int8PerToken, SsmActivations::Int8Static].map(measured);
    for (unit, expected) in fixed.units.iter().zip(&float.units) {
        let differs = unit.name.ends_with("in_proj");
        assert_eq!(unit.loss(Format::W8A16), expected.loss(Format::W8A16), "{}", unit.name);
        assert_eq!(unit.loss(Format::W8A8) != expected.loss(Format::W8A8), differs, "{}", unit.name);
        assert!(!differs || unit.loss(Format::W8A8).unwrap().kld > expected.loss(Format::W8A8).unwrap().kld, "{}", unit.name);
    }
    assert_ne!(per_token.units, fixed.units);
}

/// What a study measures in memory is what the variant that is put together on disk loses, to the bit of each logit.
#[test]
fn a_plan_from_donors_loses_on_disk_what_it_loses_in_memory_and_less_than_others() {
    let demo = checkpoint::open("demo").unwrap();
    let folder = tempfile::tempdir().unwrap();
    // Static scales of the SSM's inside need more text than the other tests take, or what they cut off is all that counts.
    let sample = SampleSpec { sequences: 16, length: 128, ..SampleSpec::default() };
    let spec = SensitivitySpec { sample, ..spec("phase3") };
    let request = Request::new(&demo, &spec, folder.path().to_owned()).unwrap();
    let losses = sensitivity::measure(&Cpu, &request, false, &Monitor::silent()).unwrap();
    let tokens = text::tokenize(&demo.tokenizer().unwrap(), DEMO_HELDOUT).unwrap();
    let rows = study(
        &Cpu,
        &StudyRequest {
            measurement: &request,
            losses: &losses,
            formats: spec.formats.clone(),
            bits: vec![3.5],
            random: 3,
            windows: text::windows(&tokens, 4, 128).unwrap(),
            seed: 0,
        },
        &Monitor::silent(),
    )
    .unwrap();
    let budget: Vec<_> = rows.iter().filter(|row| row.budget == "3.5 bits").collect();
    assert_eq!(budget[0].name, ALLOCATED);
    assert_eq!(budget.len(), 1 + 3 + 3);
    let in_16_bits: Vec<_> = rows.iter().filter(|row| row.name == "hand rule in 16 bits").collect();
    assert!(in_16_bits.len() == 1 && in_16_bits[0].excess > 0.0 && in_16_bits[0].bits_per_weight > 6.0, "{in_16_bits:?}");
    assert!(budget[1..].iter().all(|row| row.kld > budget[0].kld && row.bits_per_weight <= 3.5), "{budget:#?}");

    let bytes = (3.5 * demo.layout.linear_weights() as f64 / 8.0) as u64;
    let allocation = allocate(&losses, &demo.layout, &AllocateRequest::new(request.ends_plan(), Budget::LinearBytes(bytes))).unwrap();
    assert_eq!(allocation.linear_bytes, budget[0].linear_bytes);
    let donors =
        Donors::open(&Cpu, &demo, &request.steps, &request.calibration, &donors_directory(folder.path()), &Monitor::silent()).unwrap();
    let output = folder.path().join("allocated");
    let quantization = QuantizeRequest {
        checkpoint: &demo,
        recipe: "phase3".into(),
        steps: request.steps.clone(),
        plan: allocation.plan.clone(),
        sample: request.calibration.clone(),
        storage: StorageLayout::Native,
        output: output.clone(),
        force: false,
        host_memory: u64::MAX,
        donors: Some(&donors),
    };
    let manifest = quantize(&Cpu, &quantization, &Monitor::silent()).unwrap();
    assert_eq!(manifest.provenance.donors.as_deref(), Some(donors.name()));
    let variant = Checkpoint::open(&output).unwrap();
    assert_eq!(variant.linear_bytes().unwrap(), allocation.linear_bytes);

    let model = |name: &str, path: &str| ModelToEvaluate { name: name.into(), path: path.into() };
    let evaluation = EvaluateRequest {
        reference: Some(model("base", "demo")),
        models: vec![model("allocated", output.to_str().unwrap())],
        tasks: Vec::new(),
        windows: 4,
        window_tokens: 128,
        ..EvaluateRequest::default()
    };
    let kld = Cell::new(None);
    evaluate(|| Cpu, &evaluation, &Monitor::silent(), |evaluated| kld.set(evaluated.result.kld.map(|kld| kld.mean))).unwrap();
    let on_disk = kld.get().unwrap();
    assert!((on_disk / budget[0].kld - 1.0).abs() < 1e-9, "{on_disk} on disk, {} in memory", budget[0].kld);
}

/// Losses as models have them, without a model: they fall fourfold a bit, and int8 activations add a little.
fn synthetic(layout: &Layout, request: &Identity) -> Sensitivities {
    let unit = |unit: sensitivity::Unit| {
        let loss = |format: &Format| Loss {
            format: *format,
            bytes: unit.bytes(layout, *format),
            output_error: 1.0,
            kld: 1e-3 / (1.0 + unit.block as f64) * 0.25_f64.powi(format.weight_bits().into()),
            stderr: 0.0,
            measured: true,
        };
        UnitLosses {
            block: unit.block,
            kind: layout.blocks[unit.block].kind,
            linears: unit.linears.clone(),
            weights: unit.weights(layout),
            unquantized_bytes: unit.bytes(layout, Format::W16A16),
            losses: [Format::W8A8, Format::W4A8, Format::W3A8, Format::W2A8].iter().map(loss).collect(),
            name: unit.name,
        }
    };
    Sensitivities {
        schema: request.schema.clone(),
        model: "synthetic".into(),
        identity: request.clone(),
        tokens: 1,
        complete: true,
        units: sensitivity::units(layout, Granularity::Linear).into_iter().map(unit).collect(),
        ends_kld: 0.0,
        checks: Vec::new(),
        donors: "donors".into(),
    }
}

/// The sessions for published models, as far as they go without their weights: every variant has a recipe and a plan for
/// the model's shapes, and what a GPU is to hold fits on it.
#[test]
fn sessions_for_published_models_have_plans() {
    let demo = checkpoint::open("demo").unwrap();
    let identity = Request::new(&demo, &spec("phase3"), "store".into()).unwrap().identity().unwrap();
    for (name, shape) in [("nemotron-h-8b", "nemotron-h-8b"), ("fit-24gb", "nemotron-3-nano-30b-a3b")] {
        let session = Session::read(&Path::new("sessions").join(name).with_extension("toml")).unwrap();
        let path = format!("../shared/configs/{shape}.json");
        let Ok(text) = std::fs::read_to_string(&path) else {
            eprintln!("skipped: {path} is not there");
            continue;
        };
        let config = Config::parse(&text).unwrap();
        let layout = Layout::new(&config);
        let footprint = Footprint::new(&config, Arc::new(layout.clone()));
        let losses = synthetic(&layout, &identity);
        for variant in &session.variants {
            let (recipe, start) = variant.plan(&layout).unwrap();
            let share = layout.total_bytes(&start) as f64 / layout.total_bytes(&Plan::unquantized(layout.blocks.len())) as f64;
            let most = match variant.name.as_str() {
                "phase1" => 0.505,
                "phase2" => 0.265,
                "phase3" | "phase3-allocated" => 0.425,
                "fit-24gb" => 0.3,
                other => panic!("{other} is not expected"),
            };
            assert!(share <= most, "{} takes {share} of 16 bits", variant.name);
            let measured = SensitivitySpec::new(recipe.steps(), &start, session.calibration.clone());
            let logits = 4 * measured.windows * measured.positions * config.vocab_size;
            assert!(logits < 4_300_000_000, "the logits of {} windows take {logits} bytes", measured.windows);
            let Some(allocate) = recipe.allocate else { continue };
            let budget = match &allocate.gpu {
                Some(gpu) => Budget::fitting(&config, &Gpu::find(gpu).unwrap(), allocate.context.unwrap()).unwrap(),
                None => Budget::LinearBytes(layout.linear_bytes(&start)),
            };
            let request = AllocateRequest { formats: Some(allocate.formats.clone()), ..AllocateRequest::new(start.clone(), budget) };
            let found = strata::analysis::allocate::allocate(&losses, &layout, &request).unwrap();
            match &allocate.gpu {
                Some(gpu) => {
                    let prediction = Prediction::new(&config, &footprint, &found.plan, &Gpu::find(gpu).unwrap());
                    assert!(prediction.context_tokens.unwrap() >= allocate.context.unwrap() as u64, "{prediction:?}");
                    assert!(found.bits_per_weight > 4.5, "the card is used: {}", found.bits_per_weight);
                }
                None => {
                    let (least, most) = (found.linear_bytes, layout.linear_bytes(&start));
                    assert!(least <= most && least as f64 > 0.99 * most as f64, "{least} of {most}");
                    assert!(found.predicted_kld <= losses.predict(&start, &layout).unwrap());
                }
            }
        }
    }
}

#[test]
fn the_command_line_says_what_is_missing() {
    let data = tempfile::tempdir().unwrap();
    let run = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_strata")).args(arguments).env("XDG_DATA_HOME", data.path()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    for (arguments, message) in [
        (&["allocate", "demo", "--bits", "4"][..], "has no measured sensitivities"),
        (&["allocate", "demo", "--size", "6 parsecs"], "is not a size"),
        (&["allocate", "demo", "--bits", "4", "--kld", "0.1"], "cannot be used with"),
        (&["allocate", "demo", "--gpu", "T4"], "no figures of a GPU"),
        (&["allocate", "demo", "--gpu", "H100", "--context", "999999999"], "caches of 999999999 tokens alone do not fit"),
        (&["allocate", "demo", "--bits", "4", "--context", "10"], "no --gpu is given"),
        (&["allocate", "demo", "--activations", "4", "--bits", "4"], "activations of `4` bits"),
        (&["allocate", "demo", "--cost", "euros"], "possible values: bytes, latency"),
        (&["allocate", "demo", "--cost", "latency", "--gpu", "T4"], "no figures of a GPU"),
        (&["allocate", "demo", "--cost", "latency"], "latency is predicted for a GPU"),
        (&["allocate", "demo", "--latency", "5", "--gpu", "H100"], "the cost is bytes"),
        (&["allocate", "demo", "--kld", "1e-4", "--gpu", "H100"], "two budgets"),
        (&["allocate", "demo", "--bits", "4", "--gpu", "H100"], "cannot be used with"),
        (&["sensitivity", "demo", "--formats", "w5a8"], "unknown format"),
        (&["sensitivity", "demo", "--by", "row"], "by `block` or by `linear`"),
        (&["sensitivity", "demo", "--exact", "2"], "share of exact pairs between 0 and 1"),
    ] {
        let (code, stderr) = run(arguments);
        assert_eq!(code, Some(2), "{arguments:?} {stderr}");
        assert!(stderr.contains(message), "{arguments:?} {stderr}");
    }
}
