//! What the workbench is for, on one screen, when it is opened for the first time. Any key goes on and means what it
//! always means.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{Reply, show};
use crate::session::paths;
use crate::tui::state::State;
use crate::tui::theme::Role;

/// The tour; it has no state.
pub struct Tour;

/// A step: keys and what they do.
const STEPS: [(&str, &str); 8] = [
    ("{down} {up}", "move over the blocks; the two lines on top are the whole model"),
    ("{format-w4a8} {format-w8a8} {format-w16a16}", "give a block 4, 8 or 16 bits: figures marked ~ follow at once"),
    ("{select-kind} {select-range} {select}", "select a kind, a range, a block; {filter} finds, {open-block} opens a block"),
    ("{pane-plan}", "the plan: {new-variant} makes a variant, {preset} takes a preset's formats"),
    ("{run}", "quantizes and evaluates the variant; go on browsing meanwhile"),
    ("{pane-results}", "the results: {side-a} and {side-b} pick two variants, {compare} compares, {plot} plots"),
    ("{save}", "saves the session; `strata replay FILE` gives it again"),
    ("{help} {palette}", "all keys; every command by name"),
];

impl Tour {
    /// Whether nobody has seen it yet on this machine; from now on somebody has.
    pub fn is_first_run() -> bool {
        let marker = paths::data_directory().join("welcomed");
        // Where no marker can be left, the tour would come up every time: better never.
        !marker.exists() && std::fs::create_dir_all(paths::data_directory()).and_then(|()| std::fs::write(&marker, "")).is_ok()
    }

    pub(super) fn key(key: &str) -> Reply {
        if matches!(key, "esc" | "enter" | "space") { Reply::Close } else { Reply::Pass }
    }

    pub(super) fn draw(frame: &mut Frame, area: Rect, state: &State) {
        let style = |role| state.theme.style(role);
        let mut lines = vec![Line::default()];
        for (keys, what) in STEPS {
            let keys = state.keymap.fill(keys);
            lines.push(Line::from(vec![Span::styled(format!(" {keys:>10}  "), style(Role::Key)), Span::raw(state.keymap.fill(what))]));
        }
        lines.push(Line::default());
        let kinds =
            [(Role::KindSsm, "M SSM"), (Role::KindMlp, "- MLP"), (Role::KindAttention, "* attention"), (Role::KindMoe, "E experts")];
        let mut legend = vec![Span::raw("     blocks  ")];
        legend.extend(kinds.into_iter().map(|(role, name)| Span::styled(format!("{name}   "), style(role))));
        lines.push(Line::from(legend));
        lines.push(Line::from(vec![
            Span::raw("    figures  "),
            Span::styled("~predicted", style(Role::Predicted)),
            Span::raw("   measured   "),
            Span::styled("▸changed", style(Role::Changed)),
        ]));
        lines.push(Line::default());
        lines.push(Line::styled(" esc begins, and so does any key; :tour shows this again", style(Role::Dim)));
        show(frame, area, state, "strata", 80, lines);
    }
}
