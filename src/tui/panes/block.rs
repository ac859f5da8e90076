//! The block under the cursor: its linears, and what each format would make of it.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{dim, percent, short};
use crate::analysis::Inventory;
use crate::checkpoint::LinearSpec;
use crate::format::Scheme;
use crate::session::report;
use crate::tui::state::{Background, State};
use crate::tui::theme::Role;

pub fn draw(frame: &mut Frame, area: Rect, state: &State) {
    let Some(block) = state.document.layout.blocks.get(state.layers.cursor) else { return };
    let format = state.document.draft().plan.blocks[block.index];
    let style = |role| state.theme.style(role);
    let float_bytes = state.document.layout.float_bytes;
    let mut lines = vec![Line::from(vec![
        Span::styled(format!(" {} {}", block.kind.letter(), short(block.kind)), style(Role::of_kind(block.kind))),
        Span::raw(format!("  {} parameters  ", report::count(block.parameters()))),
        Span::styled(format.to_string(), style(Role::of_format(format))),
        dim(state, "  4, 8, 6 change it"),
    ])];
    let layout_inventory;
    let inventory = match &state.inventory {
        Background::Ready(inventory) => inventory.as_ref(),
        _ => {
            layout_inventory = Inventory::of_layout("", &state.document.layout);
            &layout_inventory
        }
    };
    let row = &inventory.blocks[block.index];
    let mut facts = vec![dim(state, " risk "), Span::styled(format!("~{}", row.sensitivity.name()), style(Role::Predicted))];
    match (row.outlier_ratio, &state.inventory) {
        (Some(ratio), _) => facts.extend([dim(state, "   largest weight / rms "), Span::raw(format!("{ratio:.1}"))]),
        (None, Background::Waiting) => facts.push(dim(state, "   reading the weights …")),
        _ => {}
    }
    facts.extend([dim(state, "   suggested "), Span::styled(row.suggested.to_string(), style(Role::of_format(row.suggested)))]);
    lines.push(Line::from(facts));

    let formats = row.suitability.iter().map(|fit| (fit.format, fit.bytes, fit.fallbacks.is_empty()));
    let whole = block.linear_bytes(crate::format::Format::W16A16, float_bytes);
    let method = state.document.draft().recipe.method;
    for pair in std::iter::once((crate::format::Format::W16A16, whole, true)).chain(formats).collect::<Vec<_>>().chunks(2) {
        let mut spans = Vec::new();
        for (other, bytes, fits) in pair {
            let mark = if *other == format { " ▶ " } else { "   " };
            let error = state.measurements.error_at(method, block.index, *other).map(percent).unwrap_or_default();
            let note = if *fits { "" } else { " part int8" };
            spans.extend([
                Span::styled(mark, style(Role::Strong)),
                Span::styled(format!("{other:<6}"), style(Role::of_format(*other))),
                Span::raw(format!(" {:>8} ", report::bytes(*bytes))),
                dim(state, format!("{:<16}", format!("{error}{note}"))),
            ]);
        }
        lines.push(Line::from(spans));
    }
    for linear in &block.linears {
        lines.push(linear_line(state, linear, format, float_bytes));
        if linear.slices.len() > 1 {
            let slices = linear.slices.iter().zip(linear.schemes(format));
            let text = slices.map(|(slice, scheme)| format!("{} {} {}", slice.name, slice.rows, scheme_name(scheme)));
            lines.push(Line::from(dim(state, format!("   {}", text.collect::<Vec<_>>().join(" · ")))));
        }
    }
    let room = area.height as usize;
    if lines.len() > room && room > 0 {
        let left = lines.len() - room + 1;
        lines.truncate(room - 1);
        lines.push(Line::from(dim(state, format!("   … {left} more lines: z shows them"))));
    }
    for (line, y) in lines.into_iter().zip(area.y..area.bottom()) {
        frame.render_widget(line, Rect { y, height: 1, ..area });
    }
}

fn linear_line(state: &State, linear: &LinearSpec, format: crate::format::Format, float_bytes: usize) -> Line<'static> {
    let scheme = linear.schemes(format)[0];
    Line::from(vec![
        Span::raw(format!(" {:<20}", linear.name)),
        dim(state, format!("{:>6}×{:<6}", linear.rows, linear.cols)),
        Span::raw(format!("{:>8}", report::count(linear.weights()))),
        Span::raw(format!("{:>10}  ", report::bytes(linear.stored_bytes(format, float_bytes)))),
        dim(state, scheme_name(scheme)),
    ])
}

fn scheme_name(scheme: Scheme) -> String {
    match scheme {
        Scheme::Float => "float".into(),
        Scheme::Int8 => "int8".into(),
        Scheme::Int4 { group } => format!("int4/{group}"),
    }
}
