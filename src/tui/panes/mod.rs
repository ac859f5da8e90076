//! The panes: each draws itself from the state into its inner area.

pub mod block;
pub mod layers;
pub mod plan;
pub mod playground;
pub mod results;
pub mod run;

use ratatui::text::Span;

use super::queue::Work;
use super::state::{Pane, State};
use super::theme::Role;
use crate::error::{Error, Result};
use crate::format::{BlockKind, Scheme};

/// Three letters for a kind of block.
pub fn short(kind: BlockKind) -> &'static str {
    match kind {
        BlockKind::Ssm => "SSM",
        BlockKind::Mlp => "MLP",
        BlockKind::Attention => "ATT",
        BlockKind::Moe => "MoE",
    }
}

/// What is said behind a pane's title.
pub fn caption(state: &State, pane: Pane) -> String {
    match pane {
        Pane::Layers => {
            let (blocks, shown) = (state.document.kinds.len(), state.visible_blocks().len());
            match state.layers.filter.text.as_str() {
                "" => format!("{blocks} blocks "),
                text => format!("{shown} of {blocks} blocks: {text} "),
            }
        }
        Pane::Plan => format!("{} ", state.document.draft().name),
        Pane::Run => match (state.queue.running(), state.queue.waiting()) {
            _ if state.queue.paused => "paused ".into(),
            (None, _) => "nothing runs ".into(),
            (Some(running), 0) => format!("{} ", running.title),
            (Some(running), waiting) => format!("{}, {waiting} waiting ", running.title),
        },
        Pane::Block => format!("{} ", state.layers.cursor),
        Pane::Playground => match state.queue.running() {
            Some(item) if matches!(item.work, Work::Playground(_)) => "speaking ".into(),
            _ => String::new(),
        },
        Pane::Results => results::caption(state).unwrap_or_else(|| {
            state.results.sort.as_ref().map_or_else(String::new, |sort| {
                format!("by {sort}, {} first ", if state.results.descending { "largest" } else { "smallest" })
            })
        }),
    }
}

/// What is copied from the focused pane.
pub fn copied(state: &State) -> Result<String> {
    match state.focus {
        Pane::Results => results::export(state, "md"),
        Pane::Playground => Ok(playground::copied(state)),
        Pane::Run => Ok(state.queue.log.iter().map(|line| line.text.as_str()).collect::<Vec<_>>().join("\n")),
        Pane::Layers | Pane::Plan | Pane::Block => {
            let variants = vec![state.document.session().variants.swap_remove(state.document.current())];
            toml::to_string(&std::collections::BTreeMap::from([("variant", variants)]))
                .map_err(|error| Error::run(format!("the variant cannot be written: {error}")))
        }
    }
}

/// How a slice is stored, in a word.
fn scheme_name(scheme: Scheme) -> String {
    match scheme {
        Scheme::Float => "float".into(),
        Scheme::Int8 => "int8".into(),
        Scheme::Grouped { bits, group } => format!("int{bits}/{group}"),
    }
}

/// A relative error in percent with two significant digits.
pub fn percent(error: f64) -> String {
    match 100.0 * error {
        percent if percent < 0.0005 => "0%".into(),
        percent if percent < 0.1 => format!("{percent:.3}%"),
        percent if percent < 1.0 => format!("{percent:.2}%"),
        percent if percent < 10.0 => format!("{percent:.1}%"),
        percent => format!("{percent:.0}%"),
    }
}

/// A figure that follows from the plan, not from a measurement.
fn predicted(state: &State, text: impl std::fmt::Display) -> Span<'static> {
    Span::styled(format!("~{text}"), state.theme.style(Role::Predicted))
}

fn dim(state: &State, text: impl Into<String>) -> Span<'static> {
    Span::styled(text.into(), state.theme.style(Role::Dim))
}
