//! The block under the cursor: its linears, and what each format would make of it.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{dim, percent, short};
use crate::checkpoint::LinearSpec;
use crate::format::Scheme;
use crate::session::report;
use crate::tui::state::{Inspection, State};
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
    let row = &state.inventory.blocks[block.index];
    let mut facts = vec![dim(state, " risk "), Span::styled(format!("~{}", row.sensitivity.name()), style(Role::Predicted))];
    match (row.outlier_ratio, state.inspection) {
        (Some(ratio), _) => facts.extend([dim(state, "   largest weight / rms "), Span::raw(format!("{ratio:.1}"))]),
        (None, Inspection::Reading) => facts.push(dim(state, "   reading the weights …")),
        _ => {}
    }
    facts.extend([dim(state, "   suggested "), Span::styled(row.suggested.to_string(), style(Role::of_format(row.suggested)))]);
    lines.push(Line::from(facts));

    // Fewer than 4 bits are for exploration: shown where the block has them.
    let shown = row.suitability.iter().filter(|fit| fit.format.weight_bits() >= 4 || fit.format == format);
    let formats = shown.map(|fit| (fit.format, fit.bytes, fit.fallbacks.is_empty()));
    let whole = block.linear_bytes(crate::format::Format::W16A16, float_bytes);
    let steps = state.document.draft().recipe.steps();
    for pair in std::iter::once((crate::format::Format::W16A16, whole, true)).chain(formats).collect::<Vec<_>>().chunks(2) {
        let mut spans = Vec::new();
        for (other, bytes, fits) in pair {
            let mark = if *other == format { " ▶ " } else { "   " };
            let error = state.measurements.error_at(&steps, block.index, *other).map(percent).unwrap_or_default();
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
    for group in alike(&block.linears) {
        lines.push(linear_line(state, &group, format, float_bytes));
        if group[0].slices.len() > 1 {
            lines.push(Line::from(dim(state, format!("   {}", slices(group[0], format)))));
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

/// Linears by name, those of the experts together.
fn alike(linears: &[LinearSpec]) -> Vec<Vec<&LinearSpec>> {
    let mut groups: Vec<(String, Vec<&LinearSpec>)> = Vec::new();
    for linear in linears {
        let name = pattern(&linear.name);
        match groups.iter_mut().find(|(other, _)| *other == name) {
            Some((_, group)) => group.push(linear),
            None => groups.push((name, vec![linear])),
        }
    }
    groups.into_iter().map(|(_, group)| group).collect()
}

/// `experts.*.up_proj` for `experts.3.up_proj`.
fn pattern(name: &str) -> String {
    let part = |part: &str| if part.parse::<usize>().is_ok() { "*".to_owned() } else { part.to_owned() };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

fn linear_line(state: &State, group: &[&LinearSpec], format: crate::format::Format, float_bytes: usize) -> Line<'static> {
    let linear = group[0];
    let count = if group.len() > 1 { format!("  {} of them", group.len()) } else { String::new() };
    let sum = |of: &dyn Fn(&LinearSpec) -> u64| group.iter().map(|linear| of(linear)).sum::<u64>();
    Line::from(vec![
        Span::raw(format!(" {:<24}", pattern(&linear.name))),
        dim(state, format!("{:>6}×{:<6}", linear.rows, linear.cols)),
        Span::raw(format!("{:>8}", report::count(sum(&LinearSpec::weights)))),
        Span::raw(format!("{:>10}  ", report::bytes(sum(&|linear| linear.stored_bytes(format, float_bytes))))),
        dim(state, format!("{}{count}", scheme_name(linear.schemes(format)[0]))),
    ])
}

/// The slices with their rows, those of one scheme together: `z 512, x 512: int4/128; dt 8: int8`.
fn slices(linear: &LinearSpec, format: crate::format::Format) -> String {
    let slices: Vec<_> = linear.slices.iter().zip(linear.schemes(format)).collect();
    let part = |slices: &[(&crate::checkpoint::SliceSpec, Scheme)]| {
        let names: Vec<String> = slices.iter().map(|(slice, _)| format!("{} {}", slice.name, slice.rows)).collect();
        format!("{}: {}", names.join(", "), scheme_name(slices[0].1))
    };
    slices.chunk_by(|(_, a), (_, b)| a == b).map(part).collect::<Vec<_>>().join("; ")
}

fn scheme_name(scheme: Scheme) -> String {
    match scheme {
        Scheme::Float => "float".into(),
        Scheme::Int8 => "int8".into(),
        Scheme::Grouped { bits, group } => format!("int{bits}/{group}"),
    }
}
