//! A workbench in memory, for the benchmarks: no terminal, no engine, no weights.

use ratatui::Terminal;
use ratatui::backend::TestBackend;

use super::document::Document;
use super::keys;
use super::message::Msg;
use super::state::State;
use super::theme::Theme;
use super::update::update;
use super::view;
use crate::checkpoint::Config;
use crate::session::Session;

/// The workbench and the screen that it is drawn on.
pub struct Workbench {
    state: State,
    terminal: Terminal<TestBackend>,
}

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
        Self { state, terminal: Terminal::new(TestBackend::new(size.0, size.1)).unwrap() }
    }

    /// Types a key.
    pub fn press(&mut self, key: &str) {
        if let Some(event) = keys::event(key) {
            drop(update(&mut self.state, Msg::Key(event)));
        }
    }

    /// Draws a frame.
    #[allow(clippy::unwrap_used, reason = "a screen in memory cannot fail")]
    pub fn draw(&mut self) {
        self.terminal.draw(|frame| view::draw(frame, &self.state)).unwrap();
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
