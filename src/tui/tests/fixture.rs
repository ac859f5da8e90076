//! A state on the demo with made-up results and a job half done: nothing in it depends on time or machine.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;

use crate::checkpoint::{BlockRecord, Config, Provenance, SampleRecord, StorageLayout, VARIANT_SCHEMA, VariantManifest};
use crate::engine::inspect::{LinearLook, RoundingError};
use crate::engine::{BlockInputs, Event, GpuReading, JobId, Spoken};
use crate::eval::ModelResult;
use crate::eval::result::{Evidence, Memory};
use crate::eval::run::Evaluated;
use crate::eval::score::{Sample, TaskScore};
use crate::eval::speed::Speed;
use crate::eval::statistics::DivergenceSummary;
use crate::format::Format;
use crate::monitor::Report;
use crate::quant::Method;
use crate::session::{Session, runs};
use crate::tui::bench::losses;
use crate::tui::document::Document;
use crate::tui::effects;
use crate::tui::keys;
use crate::tui::losses::Solved;
use crate::tui::measurements::Origin;
use crate::tui::message::{Effect, Msg};
use crate::tui::state::{BlockLook, State};
use crate::tui::theme::Theme;
use crate::tui::update::update;
use crate::tui::view;

/// The demo's session, nothing measured.
pub fn fresh(size: (u16, u16)) -> State {
    let document = Document::open(Session::demo().unwrap()).unwrap();
    State::new(document, None, Theme::find(Some("ansi16"), false).unwrap(), false, size)
}

/// A session over a made-up stack of blocks; there are no weights.
pub fn synthetic(pattern: &str, size: (u16, u16)) -> State {
    let config = format!(
        r#"{{"model_type": "nemotron_h", "hidden_size": 4096, "vocab_size": 131072, "intermediate_size": 21504,
        "hybrid_override_pattern": "{pattern}", "mamba_num_heads": 128, "mamba_head_dim": 64, "n_groups": 8,
        "ssm_state_size": 128, "num_attention_heads": 32, "num_key_value_heads": 8, "attention_head_dim": 128,
        "n_routed_experts": 128, "num_experts_per_tok": 6, "moe_intermediate_size": 1856, "n_group": 1, "topk_group": 1,
        "moe_shared_expert_intermediate_size": 3712, "n_shared_experts": 1}}"#
    );
    let document = Document::of_config(Session::demo().unwrap(), Config::parse(&config).unwrap()).unwrap();
    State::new(document, None, Theme::find(Some("ansi16"), false).unwrap(), false, size)
}

/// Phases 1 and 2 measured, a third variant with edits, its job half done.
pub fn busy(size: (u16, u16)) -> State {
    let mut state = fresh(size);
    (state.resident_bytes, state.host_bytes) = (43_500_000, Some(64_000_000_000));
    state.measurements.base_evaluated(evaluated("base", 10_600_000, 16.0, 0.0));
    for (index, bytes, bits, loss) in [(0, 5_380_000, 8.09, 0.002), (1, 2_750_000, 4.13, 0.024)] {
        let draft = state.document.drafts[index].clone();
        let manifest = manifest(&state, index, 0.002 + loss);
        state.measurements.quantized(&Origin::of(&draft), PathBuf::from("variant"), &manifest);
        state.measurements.evaluated(&Origin::of(&draft), evaluated(&draft.name, bytes, bits, loss));
    }
    press(&mut state, &["2", "n", "3", "1", "g", "j", "j", "space", "space", "6", "R", "1"]);
    let id = JobId(1);
    update(&mut state, Msg::Submitted(Ok(id)));
    update(&mut state, Msg::Engine(Event::Started { id, title: "quantize phase3".into() }));
    update(&mut state, Msg::Gpus(vec![gpu()]));
    tick(&mut state, 2);
    let mut report = |report| drop(update(&mut state, Msg::Engine(Event::Report { id, report })));
    report(Report::Plan(vec![("calibrate".into(), 4.0), ("quantize".into(), 12.0), ("validate".into(), 2.0)]));
    report(Report::Stage { name: "quantize".into(), total: 12 });
    report(Report::Log("going on after 2 finished blocks".into()));
    report(Report::Warning("block 3: down_proj takes int8".into()));
    for index in 0..5 {
        tick(&mut state, 4 * (index as u64 + 1));
        let mut report = |report| drop(update(&mut state, Msg::Engine(Event::Report { id, report })));
        let error = 0.01 + 0.007 * index as f64;
        report(Report::Block { index, error, bytes: 1000 });
        report(Report::Step { done: index + 1, note: format!("block {index} ssm w4a8 error {error:.2e}") });
    }
    state
}

/// A GPU that works.
fn gpu() -> GpuReading {
    GpuReading {
        name: "NVIDIA H100 PCIe".into(),
        used_bytes: 22_400_000_000,
        total_bytes: 85_000_000_000,
        utilization: 97,
        temperature: Some(61),
        power: Some(312_000),
    }
}

/// The status of a run on disk, with the progress of the job at hand.
pub fn run_status(state: &State, number: usize, run_state: runs::State) -> runs::Status {
    runs::Status {
        schema: runs::RUN_SCHEMA.into(),
        id: format!("20260101-04200{number}-0"),
        title: format!("phase{number}"),
        model: "demo".into(),
        state: run_state,
        job: 1,
        jobs: 2,
        progress: state.queue.progress.snapshot(state.clock),
        resident_bytes: 43_500_000,
        began: "2026-01-01T04:20:01Z".into(),
        updated: "2026-01-01T04:20:21Z".into(),
        message: None,
        hint: None,
    }
}

/// The same when the variant is quantized and is being evaluated.
pub fn evaluating(mut state: State) -> State {
    let id = JobId(1);
    let (path, manifest) = (PathBuf::from("variant"), Box::new(manifest(&state, 2, 0.02)));
    let quantized = Event::Quantized { id, name: "phase3".into(), path, manifest, reused: false };
    let (id, title) = (JobId(2), "evaluate base, phase3".to_owned());
    for event in [quantized, Event::Finished { id: JobId(1), outcome: Ok(()) }] {
        update(&mut state, Msg::Engine(event));
    }
    update(&mut state, Msg::Submitted(Ok(id)));
    update(&mut state, Msg::Gpus(vec![gpu()]));
    let mut events = vec![Event::Started { id, title }];
    let mut report = |report| events.push(Event::Report { id, report });
    report(Report::Plan(vec![("rows".into(), 3.0), ("windows".into(), 24.0)]));
    report(Report::Stage { name: "windows".into(), total: 24 });
    for windows in 1..=15 {
        report(Report::Divergence { windows, mean: 4e-3 / (windows as f64).sqrt() });
    }
    report(Report::Step { done: 15, note: "window 15".into() });
    for event in events {
        update(&mut state, Msg::Engine(event));
    }
    // The toast of the finished job goes.
    tick(&mut state, 40);
    state
}

pub fn tick(state: &mut State, seconds: u64) {
    update(state, Msg::Tick { clock: Duration::from_secs(seconds), resident_bytes: 43_500_000 });
}

/// Types keys; returns every effect they had. Fronts are solved as the loop has them solved, before the next key.
pub fn press(state: &mut State, script: &[&str]) -> Vec<Effect> {
    script.iter().flat_map(|key| solve(state, Msg::Key(keys::event(key).unwrap()))).collect()
}

/// Takes a message in, and the fronts that are to be solved for it.
fn solve(state: &mut State, msg: Msg) -> Vec<Effect> {
    let mut others = Vec::new();
    for effect in update(state, msg) {
        match effect {
            Effect::Solve(asked) => others.extend(solve(state, Msg::Solved(Box::new(Solved::new(*asked))))),
            effect => others.push(effect),
        }
    }
    others
}

/// Types a text, letter by letter.
pub fn type_text(state: &mut State, text: &str) {
    for letter in text.chars() {
        press(state, &[if letter == ' ' { "space".to_owned() } else { letter.to_string() }.as_str()]);
    }
}

/// The screen as cells.
pub fn render(state: &State, (width, height): (u16, u16)) -> Buffer {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
    terminal.draw(|frame| view::draw(frame, state)).unwrap();
    terminal.backend().buffer().clone()
}

/// The screen as lines of text.
pub fn text(buffer: &Buffer) -> String {
    let line = |cells: &[ratatui::buffer::Cell]| cells.iter().map(ratatui::buffer::Cell::symbol).collect::<String>();
    buffer.content.chunks(buffer.area.width as usize).map(|cells| line(cells).trim_end().to_owned() + "\n").collect()
}

/// A manifest whose block errors grow with the block's number.
pub fn manifest(state: &State, variant: usize, error: f64) -> VariantManifest {
    let draft = &state.document.drafts[variant];
    let block = |(index, format): (usize, &crate::format::Format)| BlockRecord {
        index,
        kind: state.document.kinds[index],
        format: *format,
        error: error * (1.0 + index as f64 / 4.0),
        bytes: 1000,
        notes: Vec::new(),
    };
    VariantManifest {
        schema: VARIANT_SCHEMA.into(),
        layout: StorageLayout::Native,
        provenance: Provenance {
            tool: "strata".into(),
            source: String::new(),
            recipe: draft.recipe.name.clone(),
            method: "rtn".into(),
            transforms: Vec::new(),
            sample: String::new(),
            seed: 0,
            donors: None,
        },
        plan: draft.plan.clone(),
        activations: crate::format::Activations::default(),
        cache: crate::format::CacheFormats::default(),
        sample: SampleRecord {
            sequences: 1,
            tokens: 1,
            kld_mean: 0.0,
            kld_p99: 0.0,
            top1: 1.0,
            logits: String::new(),
            boundaries: Vec::new(),
        },
        files: BTreeMap::new(),
        blocks: draft.plan.blocks.iter().enumerate().map(block).collect(),
    }
}

/// A result with its rows, every eleventh of which is wrong where something is lost, and every thirteenth right.
pub fn evaluated(variant: &str, weight_bytes: u64, bits_per_weight: f64, loss: f64) -> Evaluated {
    let sample = |(task, index): (&str, usize)| {
        let right = if loss > 0.0 && index % 11 == 3 { false } else { index % 3 != 0 || (loss > 0.0 && index % 13 == 0) };
        Sample {
            task: task.into(),
            index,
            loglikelihoods: if right { vec![-1.0, -2.5] } else { vec![-2.0, -1.75] },
            lengths: vec![10, 10],
            gold: 0,
            acc: f64::from(u8::from(right)),
            acc_norm: Some(f64::from(u8::from(right))),
        }
    };
    let tasks = ["arc_easy", "piqa", "winogrande"].into_iter().flat_map(|task| (0..40).map(move |index| (task, index)));
    Evaluated { result: result(variant, weight_bytes, bits_per_weight, loss), samples: tasks.map(sample).collect() }
}

/// A result that loses `loss` of every accuracy.
pub fn result(variant: &str, weight_bytes: u64, bits_per_weight: f64, loss: f64) -> ModelResult {
    let score = |acc: f64| TaskScore {
        acc: acc - loss,
        acc_norm: Some(acc - loss),
        acc_stderr: Some(0.01),
        acc_norm_stderr: Some(0.01),
        stderr: 0.01,
        rows: 400,
        truncated: 0,
        skipped: 0,
    };
    let tasks = [("arc_easy", 0.532), ("arc_challenge", 0.524), ("piqa", 1.0), ("winogrande", 0.99), ("hellaswag", 0.98)];
    let kld = DivergenceSummary {
        mean: loss / 10.0,
        median: loss / 20.0,
        p90: loss / 5.0,
        p95: loss / 3.0,
        p99: loss,
        p999: 2.0 * loss,
        max: 0.5,
        top1: 1.0 - loss,
        rms_probability: Some(loss),
        tokens: 6144,
    };
    ModelResult {
        model: "demo".into(),
        variant: variant.into(),
        weight_bytes,
        bits_per_weight,
        file_bytes: weight_bytes,
        tasks: tasks.into_iter().map(|(task, acc)| (task.to_owned(), score(acc))).collect(),
        kld: (loss > 0.0).then_some(kld),
        perplexity: Some(1.69 + loss),
        speed: Some(Speed {
            prefill_tokens_per_s: 4000.0 + 1e6 * loss,
            decode_tokens_per_s: 300.0 + 1e5 * loss,
            prefill_spread: 0.01,
            decode_spread: 0.01,
            prompt_tokens: 512,
            decode_tokens: 64,
            repetitions: 3,
        }),
        memory: Memory { peak_bytes: 50_000_000, resident_weight_bytes: 12_000_000, ..Memory::default() },
        provenance: Evidence { tool: "strata".into(), backend: "cpu".into(), threads: 2, ..Evidence::default() },
        ..ModelResult::default()
    }
}

/// With block 2's weights looked at and its inputs observed.
pub fn looked(mut state: State) -> State {
    let block = state.layers.cursor;
    let spec = state.document.layout.blocks[block].clone();
    let histogram =
        |index: usize| (0..41_i32).map(|bin| 10_000 / (1 + u64::from((bin - 20 - index as i32).unsigned_abs()).pow(2))).collect();
    let linears = spec.linears.iter().enumerate();
    let linears =
        linears.map(|(index, linear)| LinearLook { name: linear.name.clone(), max: 0.41, rms: 0.07, histogram: histogram(index) });
    let rounding = |(method, format, error)| RoundingError { method, format, error };
    let roundings = [
        (Method::Rtn, Format::W8A16, 0.0067),
        (Method::Clip, Format::W8A16, 0.0066),
        (Method::Rtn, Format::W4A16, 0.112),
        (Method::Clip, Format::W4A16, 0.101),
    ];
    let look = BlockLook { linears: linears.collect(), roundings: roundings.map(rounding).to_vec(), done: true, failure: None };
    state.looks.blocks.insert(block, look);
    let channel = |channel: usize| if channel % 97 == 5 { 24.0 } else { 1.0 + (channel % 7) as f32 / 10.0 };
    let maxima = spec.linears.iter().map(|linear| (linear.name.clone(), (0..linear.cols).map(channel).collect())).collect();
    state.looks.inputs.insert(block, BlockInputs { block, maxima });
    state
}

/// With two texts that part at the fifth word.
pub fn spoken(mut state: State) -> State {
    state.playground.prompt = "Where does the river go".into();
    state.playground.names = ["base".into(), "phase2".into()];
    let texts = [
        ["The", " river", " runs", " down", " to", " the", " sea", "."],
        ["The", " river", " runs", " down", " into", " the", " lake", "."],
    ];
    for side in 0..2 {
        for (index, piece) in texts[side].iter().enumerate() {
            let other = texts[1 - side][index];
            let candidates = [(*piece, 0.61), (other, 0.21), (" a", 0.05), (" by", 0.02), (" and", 0.01)];
            let candidates = candidates.map(|(name, probability)| (name.to_owned(), probability)).to_vec();
            let token = if piece == &other { index } else { 100 * (side + 1) + index } as u32;
            state.playground.spoken[side].push(Spoken { token, piece: (*piece).to_owned(), candidates });
        }
    }
    state.playground.divergence = vec![1e-6, 2e-5, 1e-4, 3e-3, 0.2, 0.04, 0.6, 1e-3];
    state
}

/// With losses measured for the variant being edited.
pub fn with_losses(mut state: State) -> State {
    let sensitivities = Box::new(losses(&state.document));
    solve(&mut state, Msg::Engine(Event::Sensitivities { id: JobId(0), sensitivities }));
    state
}

/// Compares what the effects ask to compare, as the loop does.
pub fn answer(state: &mut State, effects: &[Effect]) {
    for effect in effects {
        if let Effect::Compare(request) = effect {
            let compared = effects::compare((**request).clone()).unwrap();
            update(state, Msg::Compared(Ok(Box::new(compared))));
        }
    }
}
