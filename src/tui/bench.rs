//! A workbench in memory, for the benchmarks: no terminal, no engine, no weights.

use std::path::PathBuf;

use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::document::Document;
use super::keys;
use super::losses::Solved;
use super::message::{Effect, Msg, ToSolve};
use super::state::State;
use super::theme::Theme;
use super::update::update;
use super::view;
use crate::analysis::sensitivity::{
    CANDIDATES, Check, Granularity, Identity, Loss, SENSITIVITY_SCHEMA, Sensitivities, Unit, UnitLosses, units,
};
use crate::checkpoint::Config;
use crate::engine::{Event, JobId};
use crate::format::Format;
use crate::session::Session;

/// The workbench and the screen that it is drawn on.
pub struct Workbench {
    state: State,
    terminal: Terminal<TestBackend>,
    asked: Option<Box<ToSolve>>,
}

/// Plans of every budget.
pub struct FoundPlans(Box<Solved>);

impl Workbench {
    /// On a stack of 118 blocks of a 56B model.
    ///
    /// # Panics
    /// When the shape, which is fixed, cannot be opened.
    #[allow(clippy::unwrap_used, reason = "nothing here depends on input")]
    pub fn deep(size: (u16, u16)) -> Self {
        let pattern = format!("{}{}", "M-M-M-M-M*-".repeat(10), "M-M-M-M-");
        let config = format!(
            r#"{{"model_type": "nemotron_h", "hidden_size": 8192, "vocab_size": 131072, "intermediate_size": 32768,
            "hybrid_override_pattern": "{pattern}", "mamba_num_heads": 256, "mamba_head_dim": 64, "n_groups": 8,
            "ssm_state_size": 256, "num_attention_heads": 64, "num_key_value_heads": 8, "attention_head_dim": 128}}"#
        );
        let document = Document::of_config(Session::demo().unwrap(), Config::parse(&config).unwrap()).unwrap();
        let state = State::new(document, None, Theme::find(Some("dark"), false).unwrap(), false, size);
        Self { state, terminal: Terminal::new(TestBackend::new(size.0, size.1)).unwrap(), asked: None }
    }

    /// The same, with losses measured for every part.
    pub fn measured(size: (u16, u16)) -> Self {
        let mut workbench = Self::deep(size);
        let sensitivities = Box::new(losses(&workbench.state.document));
        drop(update(&mut workbench.state, Msg::Engine(Event::Sensitivities { id: JobId(0), sensitivities })));
        workbench
    }

    /// Types a key.
    pub fn press(&mut self, key: &str) {
        if let Some(event) = keys::event(key) {
            for effect in update(&mut self.state, Msg::Key(event)) {
                if let Effect::Solve(asked) = effect {
                    self.asked = Some(asked);
                }
            }
        }
    }

    /// Finds the plans that the last key asked for, which the loop does in the background.
    pub fn solve(&mut self) -> Option<FoundPlans> {
        Some(FoundPlans(Box::new(Solved::new(*self.asked.take()?))))
    }

    /// Takes in what was found.
    pub fn take_in(&mut self, found: Option<FoundPlans>) {
        if let Some(FoundPlans(solved)) = found {
            drop(update(&mut self.state, Msg::Solved(solved)));
        }
    }

    /// Draws a frame.
    #[allow(clippy::unwrap_used, reason = "a screen in memory cannot fail")]
    pub fn draw(&mut self) {
        self.terminal.draw(|frame| view::draw(frame, &self.state)).unwrap();
    }
}

/// Losses for the variant being edited, as if they had been measured: they fall fourfold with each bit and rise towards the
/// last block; int8 activations add a little.
pub(super) fn losses(document: &Document) -> Sensitivities {
    let (layout, draft) = (&document.layout, document.draft());
    let steps = draft.recipe.steps();
    let identity = Identity {
        schema: SENSITIVITY_SCHEMA.into(),
        tool: String::new(),
        source: String::new(),
        method: steps.method.name().into(),
        internals: steps.internals(),
        transforms: steps.transforms,
        embedding: draft.plan.embedding,
        head: draft.plan.head,
        by: Granularity::Linear,
        calibration: String::new(),
        measured: String::new(),
        positions: 256,
    };
    let loss = |unit: &Unit, format: Format| {
        let sensitivity = 1.5_f64.powi(unit.block as i32) * unit.linears.len() as f64;
        let kld =
            sensitivity * (2e-4 * 0.25_f64.powf(f64::from(format.weight_bits())) + if format.quantizes_activations() { 1e-8 } else { 0.0 });
        Loss { format, bytes: unit.bytes(layout, format), output_error: kld, kld, stderr: kld / 10.0, measured: format.weight_bits() < 8 }
    };
    let units = units(layout, Granularity::Linear).into_iter().map(|unit| UnitLosses {
        kind: layout.blocks[unit.block].kind,
        weights: unit.weights(layout),
        unquantized_bytes: unit.bytes(layout, Format::W16A16),
        losses: CANDIDATES.map(|format| loss(&unit, format)).to_vec(),
        block: unit.block,
        name: unit.name,
        linears: unit.linears,
    });
    let check = |ratio: f64| Check { plan: draft.plan.clone(), predicted: 1e-5, measured: ratio * 1e-5, stderr: 1e-7 };
    Sensitivities {
        schema: SENSITIVITY_SCHEMA.into(),
        model: "demo".into(),
        identity,
        tokens: 8192,
        complete: true,
        units: units.collect(),
        ends_kld: 1e-6,
        checks: vec![check(0.98), check(1.03)],
        donors: PathBuf::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_benchmarks_model_has_118_blocks_and_56_billion_parameters() {
        let workbench = Workbench::deep((80, 24));
        assert_eq!(workbench.state.document.kinds.len(), 118);
        let parameters = workbench.state.document.layout.parameters();
        assert!((50_000_000_000..62_000_000_000).contains(&parameters), "{parameters}");
    }
}
