//! The block under the cursor: its linears in the plan, what its weights and inputs look like, what rounding loses.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{dim, percent, predicted, scheme_name, short};
use crate::checkpoint::{BlockSpec, TensorSpec};
use crate::engine::inspect::LinearLook;
use crate::format::{Format, Plan};
use crate::quant::Method;
use crate::session::report;
use crate::tui::queue::Work;
use crate::tui::state::{Inspection, State};
use crate::tui::text::cut;
use crate::tui::theme::Role;
use crate::tui::tree::{self, Module};
use crate::tui::view::bar_letter;

/// Width of names and labels.
const LABEL: usize = 16;

/// An input channel is an outlier when its largest value is so many times the median channel's.
const OUTLIER: f32 = 8.0;

pub fn draw(frame: &mut Frame, area: Rect, state: &State) {
    let Some(block) = state.document.layout.blocks.get(state.layers.cursor) else { return };
    let (width, room) = (area.width as usize, area.height as usize);
    let mut lines = facts(state, block);
    let modules = tree::modules(block);
    // Few linears: everything about one together; experts by the dozen: only the shared picture of the first.
    for module in &modules {
        lines.extend(module_lines(state, block, module, width));
    }
    lines.extend(formats(state, block));
    lines.extend(roundings(state, block));
    lines.extend(floats(state, block, width));
    let scroll = state.looks.scroll.min(lines.len().saturating_sub(room));
    let more = lines.len().saturating_sub(scroll + room);
    let mut shown: Vec<Line> = lines.into_iter().skip(scroll).take(room).collect();
    if more > 0
        && let Some(last) = shown.last_mut()
    {
        let keys = state.keymap.fill("{page-down}, or {zoom}");
        *last = Line::from(dim(state, format!(" … {} more lines: {keys}", more + 1)));
    }
    for (line, y) in shown.into_iter().zip(area.y..area.bottom()) {
        frame.render_widget(line, Rect { y, height: 1, ..area });
    }
}

/// Kind, size, format, and what a rule of thumb and the largest weight say.
fn facts(state: &State, block: &BlockSpec) -> Vec<Line<'static>> {
    let style = |role| state.theme.style(role);
    let format = state.plan().blocks[block.index];
    let row = &state.inventory.blocks[block.index];
    let mut facts = vec![
        Span::styled(format!(" {} {}", block.kind.letter(), short(block.kind)), style(Role::of_kind(block.kind))),
        Span::raw(format!("  {}  ", report::count(row.parameters))),
        Span::styled(format.to_string(), style(Role::of_format(format))),
        dim(state, if state.losses.are_shown() { "  ΔKLD " } else { "  risk " }),
        match state.losses.block(block.index) {
            Some(loss) => predicted(state, format!("{loss:.1e}")),
            None if state.losses.are_shown() => dim(state, "–"),
            None => predicted(state, row.sensitivity.name()),
        },
        dim(state, "  suggested "),
        Span::styled(row.suggested.to_string(), style(Role::of_format(row.suggested))),
    ];
    if row.outlier_ratio.is_none() && state.inspection == Inspection::Reading {
        facts.push(dim(state, "  reading the weights …"));
    }
    vec![Line::from(facts)]
}

/// A linear: shape and bytes, its slices, the histogram of its weights, the largest of its inputs.
fn module_lines(state: &State, block: &BlockSpec, module: &Module, width: usize) -> Vec<Line<'static>> {
    let style = |role| state.theme.style(role);
    let plan = state.plan();
    let linear = module.linears[0];
    let (format, same) = module.format(plan, block.index);
    let count = if module.linears.len() > 1 { format!(" ×{}", module.linears.len()) } else { String::new() };
    let schemes = linear.planned_schemes(plan, block.index);
    let mut lines = vec![Line::from(vec![
        Span::styled(format!(" {:<LABEL$}", cut(&module.name.replace("experts.*.", "expert "), LABEL)), style(Role::Strong)),
        dim(state, format!("{:>6}×{:<6}", linear.rows, linear.cols)),
        Span::raw(format!("{:>8} ", report::bytes(module.bytes(plan, block.index, state.document.layout.float_bytes)))),
        Span::styled(if same { format.to_string() } else { "mixed".into() }, style(Role::of_format(format))),
        dim(state, format!(" {}{count}", scheme_name(schemes[0]))),
    ])];
    if linear.slices.len() > 1 {
        let slice = |(slice, scheme): (&crate::checkpoint::SliceSpec, &crate::format::Scheme)| {
            let bytes = scheme.stored_bytes(slice.rows, linear.cols, state.document.layout.float_bytes);
            let own = if *scheme == schemes[0] { String::new() } else { format!(" {}", scheme_name(*scheme)) };
            format!("{} {} {}{own}", slice.name, slice.rows, report::bytes(bytes).replace(' ', ""))
        };
        let slices: Vec<String> = linear.slices.iter().zip(&schemes).map(slice).collect();
        lines.push(Line::from(dim(state, cut(&format!("   {}", slices.join(", ")), width))));
    }
    let looks = state.looks.blocks.get(&block.index);
    if let Some(look) = looks.and_then(|looks| looks.linears.iter().find(|look| look.name == linear.name)) {
        lines.push(weights(state, look));
    } else if looks.is_some_and(|looks| !looks.done) {
        lines.push(Line::from(dim(state, "   weights …")));
    }
    let inputs = state.looks.inputs.get(&block.index);
    if let Some((_, maxima)) = inputs.and_then(|inputs| inputs.maxima.iter().find(|(name, _)| *name == linear.name)) {
        lines.push(input_line(state, maxima, width));
    }
    lines
}

/// The weights by value: a bar a bin, as high as the root of its share, so that the tails are seen.
fn weights(state: &State, look: &LinearLook) -> Line<'static> {
    let most = look.histogram.iter().copied().max().unwrap_or(1).max(1) as f64;
    let bars: String = look.histogram.iter().map(|count| bar_letter((*count as f64 / most).sqrt())).collect();
    let ratio = if look.rms > 0.0 { f64::from(look.max) / look.rms } else { 0.0 };
    Line::from(vec![
        dim(state, "   w "),
        Span::styled(bars, state.theme.style(Role::Progress)),
        dim(state, format!(" |w| {:.3}  max/rms {ratio:.1}", look.max)),
    ])
}

/// The largest input of each channel, channels side by side folded into the room there is; outliers marked.
fn input_line(state: &State, maxima: &[f32], width: usize) -> Line<'static> {
    let mut sorted = maxima.to_vec();
    sorted.sort_unstable_by(f32::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    let largest = sorted.last().copied().unwrap_or(0.0).max(f32::MIN_POSITIVE);
    let outlier = |value: f32| median > 0.0 && value > OUTLIER * median;
    let outliers = maxima.iter().filter(|value| outlier(**value)).count();
    let cells = width.saturating_sub(32).clamp(8, 41);
    let mut spans = vec![dim(state, "   x ")];
    for channels in maxima.chunks(maxima.len().div_ceil(cells).max(1)) {
        let max = channels.iter().copied().fold(0.0, f32::max);
        let role = if outlier(max) { Role::Bad } else { Role::Progress };
        spans.push(Span::styled(bar_letter(f64::from(max / largest)).to_string(), state.theme.style(role)));
    }
    spans.push(dim(state, format!(" |x| {largest:.3}  ")));
    spans.push(match outliers {
        0 => dim(state, "no outliers"),
        1 => Span::styled("1 outlier", state.theme.style(Role::Bad)),
        count => Span::styled(format!("{count} outliers"), state.theme.style(Role::Bad)),
    });
    Line::from(spans)
}

/// Bytes and output error of the block in every format, two a line.
fn formats(state: &State, block: &BlockSpec) -> Vec<Line<'static>> {
    let style = |role| state.theme.style(role);
    let current = state.plan().blocks[block.index];
    let steps = state.document.draft().recipe.steps();
    // Fewer than 4 bits are for exploration: shown where the block has them.
    let shown: Vec<Format> = Format::ALL.into_iter().filter(|format| format.weight_bits() >= 4 || *format == current).collect();
    let mut plan = Plan::unquantized(state.document.kinds.len());
    let mut cell = |format: Format| {
        plan.blocks[block.index] = format;
        let bytes = state.document.footprint.linears(&plan, block.index).stored;
        let row = &state.inventory.blocks[block.index];
        let fits = row.suitability.iter().find(|fit| fit.format == format).is_none_or(|fit| fit.fallbacks.is_empty());
        let error = state.measurements.error_at(&steps, block.index, format).map(percent).unwrap_or_default();
        let note = if fits { "" } else { " part int8" };
        [
            Span::styled(if format == current { " ▶ " } else { "   " }, style(Role::Strong)),
            Span::styled(format!("{format:<6}"), style(Role::of_format(format))),
            Span::raw(format!(" {:>8} ", report::bytes(bytes))),
            dim(state, format!("{:<8}", format!("{error}{note}"))),
        ]
    };
    shown.chunks(2).map(|pair| Line::from(pair.iter().flat_map(|format| cell(*format)).collect::<Vec<_>>())).collect()
}

/// The tensors that no format touches: shape and bytes, two a line where there is room.
fn floats(state: &State, block: &BlockSpec, width: usize) -> Vec<Line<'static>> {
    let float_bytes = state.document.layout.float_bytes as u64;
    let bytes = |tensor: &TensorSpec| tensor.elements() * float_bytes;
    let total: u64 = block.others.iter().map(bytes).sum();
    let cell = |tensor: &TensorSpec| {
        let name = tensor.name.trim_start_matches(&block.prefix).trim_end_matches(".weight");
        // The block and its mixer both have a norm.
        let name = name.strip_prefix("mixer.").filter(|name| *name != "norm").unwrap_or(name);
        let shape = tensor.shape.iter().map(ToString::to_string).collect::<Vec<_>>().join("×");
        [
            Span::raw(format!("   {:<14}", cut(name, 14))),
            dim(state, format!("{shape:>11}")),
            Span::raw(format!("{:>9}", report::bytes(bytes(tensor)))),
        ]
    };
    let mut lines = vec![Line::from(dim(state, format!(" float in every format  {}", report::bytes(total))))];
    let row = |tensors: &[TensorSpec]| Line::from(tensors.iter().flat_map(cell).collect::<Vec<_>>());
    lines.extend(block.others.chunks(if width >= 74 { 2 } else { 1 }).map(row));
    lines
}

/// What each way of rounding loses on the weights themselves.
fn roundings(state: &State, block: &BlockSpec) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    if let Some(look) = state.looks.blocks.get(&block.index) {
        for method in [Method::Rtn, Method::Clip] {
            let errors: Vec<_> = look.roundings.iter().filter(|rounding| rounding.method == method).collect();
            if errors.is_empty() {
                continue;
            }
            let mut spans = vec![dim(state, format!(" {:<14}", format!("{} loses", method.name())))];
            for rounding in errors {
                spans.push(Span::styled(
                    format!("w{} ", rounding.format.weight_bits()),
                    state.theme.style(Role::of_format(rounding.format)),
                ));
                spans.push(Span::raw(format!("{:<7}", percent(rounding.error))));
            }
            lines.push(Line::from(spans));
        }
        if let Some(failure) = &look.failure {
            lines.push(Line::styled(format!(" {failure}"), state.theme.style(Role::Bad)));
        } else if !look.done {
            lines.push(Line::from(dim(state, " rounding …")));
        }
    }
    let observing = state.queue.running().is_some_and(|item| item.work == Work::Observe);
    if !state.looks.inputs.contains_key(&block.index) {
        lines.push(Line::from(dim(
            state,
            state.keymap.fill(if observing {
                " inputs: being observed …"
            } else {
                " inputs: {observe} observes them over the calibration sample"
            }),
        )));
    }
    lines
}
