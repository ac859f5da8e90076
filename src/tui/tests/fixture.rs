//! A state on the demo with made-up results and a job half done: nothing in it depends on time or machine.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;

use crate::checkpoint::{BlockRecord, Config, Provenance, SampleRecord, StorageLayout, VARIANT_SCHEMA, VariantManifest};
use crate::engine::{Event, JobId};
use crate::eval::ModelResult;
use crate::eval::result::{Evidence, Memory};
use crate::eval::score::TaskScore;
use crate::eval::speed::Speed;
use crate::eval::statistics::DivergenceSummary;
use crate::monitor::Report;
use crate::session::Session;
use crate::tui::document::Document;
use crate::tui::keys;
use crate::tui::message::{Effect, Msg};
use crate::tui::state::State;
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
    state.resident_bytes = 43_500_000;
    state.measurements.base = Some(result("base", 10_600_000, 16.0, 0.0));
    for (index, bytes, bits, loss) in [(0, 5_380_000, 8.09, 0.002), (1, 2_750_000, 4.13, 0.024)] {
        let draft = state.document.drafts[index].clone();
        let manifest = manifest(&state, index, 0.002 + loss);
        state.measurements.quantized(&draft.recipe.steps(), draft.plan.clone(), PathBuf::from("variant"), &manifest);
        state.measurements.evaluated(&draft.recipe.steps(), &draft.plan, result(&draft.name, bytes, bits, loss));
    }
    press(&mut state, &["2", "n", "3", "1", "g", "j", "j", "space", "space", "6", "R", "1"]);
    let id = JobId(1);
    update(&mut state, Msg::Submitted(Ok(id)));
    update(&mut state, Msg::Engine(Event::Started { id, title: "quantize phase3".into() }));
    tick(&mut state, 2);
    report(&mut state, Report::Stage { name: "quantize".into(), total: 12 });
    tick(&mut state, 20);
    for index in 0..5 {
        report(&mut state, Report::Block { index, error: 0.01 + 0.007 * index as f64, bytes: 1000 });
    }
    report(&mut state, Report::Log("going on after 2 finished blocks".into()));
    report(&mut state, Report::Warning("block 3: down_proj takes int8".into()));
    report(&mut state, Report::Step { done: 5, note: "block 4 ssm w4a8 error 3.80e-2".into() });
    state
}

fn report(state: &mut State, report: Report) {
    update(state, Msg::Engine(Event::Report { id: JobId(1), report }));
}

pub fn tick(state: &mut State, seconds: u64) {
    update(state, Msg::Tick { clock: Duration::from_secs(seconds), resident_bytes: 43_500_000 });
}

/// Types keys; returns every effect they had.
pub fn press(state: &mut State, script: &[&str]) -> Vec<Effect> {
    script.iter().flat_map(|key| update(state, Msg::Key(keys::event(key)))).collect()
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

/// A result that loses `loss` of every accuracy.
pub fn result(variant: &str, weight_bytes: u64, bits_per_weight: f64, loss: f64) -> ModelResult {
    let score = |acc: f64| TaskScore { acc: acc - loss, acc_norm: Some(acc - loss), stderr: 0.01, rows: 400, truncated: 0, skipped: 0 };
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
        memory: Memory { peak_bytes: 50_000_000, resident_weight_bytes: 12_000_000 },
        provenance: Evidence { tool: "strata".into(), backend: "cpu".into(), threads: 2, ..Evidence::default() },
        ..ModelResult::default()
    }
}
