//! The plan being edited: the session's variants, and what the plan predicts.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{dim, predicted};
use crate::format::Plan;
use crate::session::report;
use crate::tui::popups::window;
use crate::tui::state::{Pane, State};
use crate::tui::text::cut;
use crate::tui::theme::Role;
use crate::tui::view::bar;

pub fn draw(frame: &mut Frame, area: Rect, state: &State) {
    let mut lines = predictions(state, area.width as usize);
    let room = (area.height as usize).saturating_sub(lines.len() + 1);
    let drafts = &state.document.drafts;
    lines.push(Line::styled(
        format!("   {:<18} {:<10} {:>9} {:>7} {:>6}", "variant", "recipe", "linears", "ratio", "bits"),
        state.theme.style(Role::Dim),
    ));
    for index in window(state.document.current(), drafts.len(), room) {
        lines.push(variant(state, index));
    }
    for (line, y) in lines.into_iter().zip(area.y..area.bottom()) {
        frame.render_widget(line, Rect { y, height: 1, ..area });
    }
}

/// What follows from the plan, all of it predicted.
fn predictions(state: &State, width: usize) -> Vec<Line<'static>> {
    let (layout, draft) = (&state.document.layout, state.document.draft());
    let plan = &draft.plan;
    let float = Plan::unquantized(plan.blocks.len());
    let (linears, linears_float) = (layout.linear_bytes(plan), layout.linear_bytes(&float));
    let (total, total_float) = (layout.total_bytes(plan), layout.total_bytes(&float));
    let share = linears as f64 / linears_float as f64;
    let label = |text: &str| dim(state, format!(" {text:<12}"));
    let style = |role| state.theme.style(role);
    let mut size = vec![
        label("linears"),
        predicted(state, report::bytes(linears)),
        dim(state, format!(" of {}  ", report::bytes(linears_float))),
        predicted(state, format!("{:.1}%", 100.0 * share)),
        Span::raw("  "),
    ];
    let room = width.saturating_sub(Line::from(size.clone()).width() + 1).min(24);
    size.extend(bar(share, room, style(Role::Progress), style(Role::Border)));
    let mut lines = vec![
        Line::from(size),
        Line::from(vec![
            label("bits"),
            predicted(state, format!("{:.2}", layout.bits_per_weight(plan))),
            dim(state, " bits a weight, scales included"),
        ]),
        Line::from(vec![
            label("whole model"),
            predicted(state, report::bytes(total)),
            dim(state, format!(" of {}  ", report::bytes(total_float))),
            predicted(state, format!("{:.1}%", 100.0 * total as f64 / total_float as f64)),
        ]),
        Line::from(vec![
            label("embedding"),
            Span::styled(plan.embedding.to_string(), style(Role::of_format(plan.embedding))),
            dim(state, "   head "),
            Span::styled(plan.head.to_string(), style(Role::of_format(plan.head))),
        ]),
    ];
    let transitions = plan.activation_transitions();
    lines.push(Line::from(vec![
        label("transitions"),
        Span::raw(transitions.to_string()),
        dim(
            state,
            match transitions {
                0 => ": all blocks read the same activation bits",
                1 => " place where activation bits change",
                _ => " places where activation bits change",
            },
        ),
    ]));
    let overrides = match draft.overrides.as_slice() {
        [] => "none: the recipe as it is".to_owned(),
        rules => rules.iter().map(|rule| format!("{} {}", rule.selector, rule.format)).collect::<Vec<_>>().join(", "),
    };
    lines.push(Line::from(vec![label("overrides"), Span::raw(cut(&overrides, width.saturating_sub(14)))]));
    let (undo, undo_count, redo, redo_count) = state.document.history();
    let mut history = vec![label("history")];
    match undo {
        Some(undo) => history.push(Span::raw(cut(&format!("{undo}  (u undoes; {undo_count} in all)"), width.saturating_sub(14)))),
        None => history.push(dim(state, "nothing to undo")),
    }
    if let Some(redo) = redo {
        history.push(dim(state, format!("  undone: {redo}  (U; {redo_count})")));
    }
    lines.push(Line::from(history));
    lines.push(Line::default());
    lines
}

/// A row of the list of variants; measured figures plain, predicted ones marked.
fn variant(state: &State, index: usize) -> Line<'static> {
    let draft = &state.document.drafts[index];
    let layout = &state.document.layout;
    let current = index == state.document.current();
    let result = state.measurements.find(&draft.recipe.steps(), &draft.plan).and_then(|row| row.result.as_ref());
    let float = layout.linear_bytes(&Plan::unquantized(draft.plan.blocks.len())) as f64;
    let figure = |text: String, measured: bool, width: usize| {
        if measured {
            Span::raw(format!(" {text:>width$}"))
        } else {
            Span::styled(format!(" {:>width$}", format!("~{text}")), state.theme.style(Role::Predicted))
        }
    };
    let measured = result.is_some();
    let bytes = result.map_or_else(|| layout.linear_bytes(&draft.plan), |result| result.weight_bytes);
    let bits = result.map_or_else(|| layout.bits_per_weight(&draft.plan), |result| result.bits_per_weight);
    let changed = if state.document.changed(index) { "▸" } else { " " };
    let line = Line::from(vec![
        Span::styled(if current { " ▶" } else { "  " }, state.theme.style(Role::Strong)),
        Span::styled(changed, state.theme.style(Role::Changed)),
        Span::raw(format!("{:<18} {:<10}", cut(&draft.name, 18), cut(&draft.recipe_name, 10))),
        figure(report::bytes(bytes), measured, 9),
        figure(format!("{:.3}", bytes as f64 / float), measured, 7),
        figure(format!("{bits:.2}"), measured, 6),
        dim(state, if measured { "  measured" } else { "" }),
    ]);
    if current && state.focus == Pane::Plan { line.style(state.theme.style(Role::Cursor)) } else { line }
}
