//! The panes: each draws itself from the state into its inner area.

pub mod block;
pub mod front;
pub mod layers;
pub mod plan;
pub mod playground;
pub mod results;
pub mod run;

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::queue::Work;
use super::state::{Pane, State, Strip};
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
            let strip = match state.layers.strip {
                Strip::Bits => "",
                Strip::Loss => "· strip: ΔKLD ",
                Strip::Error => "· strip: error ",
            };
            match state.layers.filter.text.as_str() {
                "" => format!("{blocks} blocks {strip}"),
                text => format!("{shown} of {blocks} blocks: {text} {strip}"),
            }
        }
        Pane::Plan => {
            let front = if state.allocating.is_some() { "· plans by budget " } else { "" };
            format!("{} {front}", state.document.draft().name)
        }
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

/// A chart's axes with the values at their ends; `plot` has eight columns to its left and two lines below it.
fn axes(frame: &mut Frame, plot: Rect, state: &State, [high, low]: [&str; 2], [left, right]: [&str; 2]) {
    let style = state.theme.style(Role::Border);
    for y in plot.y..plot.bottom() {
        frame.render_widget(Line::styled("│", style), Rect { x: plot.x - 1, y, width: 1, height: 1 });
    }
    let line = format!("╰{}", "─".repeat(plot.width as usize));
    frame.render_widget(Line::styled(line, style), Rect { x: plot.x - 1, y: plot.bottom(), width: plot.width + 1, height: 1 });
    for (text, y) in [(high, plot.y), (low, plot.bottom().saturating_sub(1))] {
        frame.render_widget(Line::from(dim(state, format!("{text:>6}"))), Rect { x: plot.x - 8, y, width: 7, height: 1 });
    }
    let gap = (plot.width as usize).saturating_sub(left.chars().count() + right.chars().count());
    let line = format!("{left}{}{right}", " ".repeat(gap));
    frame.render_widget(Line::from(dim(state, line)), Rect { x: plot.x, y: plot.bottom() + 1, width: plot.width, height: 1 });
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
