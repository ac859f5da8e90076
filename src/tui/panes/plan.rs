//! The plan being edited: what it predicts, in place or beside another variant's, and the session's variants.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use super::{dim, front, predicted};
use crate::analysis::Prediction;
use crate::format::Plan;
use crate::session::report;
use crate::tui::losses::Known;
use crate::tui::popups::window;
use crate::tui::state::{Pane, State};
use crate::tui::text::cut;
use crate::tui::theme::Role;
use crate::tui::view::bar;

/// Width of the labels on the left.
const LABEL: usize = 13;

/// Lines above the list of variants.
fn above(state: &State, width: usize, height: usize) -> Vec<Line<'static>> {
    let mut lines = match state.beside() {
        Some(other) => comparison(state, other, width),
        None => predictions(state, width),
    };
    lines.extend(edits(state, width, if height > 20 { 5 } else { 1 }));
    if height.saturating_sub(lines.len() + 1) > state.document.drafts.len() {
        lines.push(Line::default());
    }
    lines.push(Line::styled(
        format!("   {:<18} {:<10} {:>9} {:>7} {:>6}", "variant", "recipe", "linears", "ratio", "bits"),
        state.theme.style(Role::Dim),
    ));
    lines
}

/// The variant whose row is in line `line` of the pane.
pub fn variant_at(state: &State, area: Rect, line: u16) -> Option<usize> {
    if state.allocating.is_some() {
        return None;
    }
    let (height, above) = (area.height as usize, above(state, area.width as usize, area.height as usize).len());
    let rows = window(state.document.current(), state.document.drafts.len(), height.saturating_sub(above));
    let index = rows.start + (line as usize).checked_sub(above)?;
    rows.contains(&index).then_some(index)
}

pub fn draw(frame: &mut Frame, area: Rect, state: &State) {
    if let Some(allocating) = &state.allocating {
        front::draw(frame, area, state, allocating);
        return;
    }
    let mut lines = above(state, area.width as usize, area.height as usize);
    let room = (area.height as usize).saturating_sub(lines.len());
    for index in window(state.document.current(), state.document.drafts.len(), room) {
        lines.push(variant(state, index));
    }
    for (line, y) in lines.into_iter().zip(area.y..area.bottom()) {
        frame.render_widget(line, Rect { y, height: 1, ..area });
    }
}

pub fn label(state: &State, text: &str) -> Span<'static> {
    dim(state, format!(" {text:<width$}", width = LABEL - 1))
}

/// What follows from the plan, all of it predicted.
fn predictions(state: &State, width: usize) -> Vec<Line<'static>> {
    let (footprint, plan) = (&state.document.footprint, state.plan());
    let float = Plan::unquantized(plan.blocks.len());
    let (linears, linears_float) = (footprint.linear_bytes(plan), footprint.linear_bytes(&float));
    let (total, total_float) = (footprint.total_bytes(plan), footprint.total_bytes(&float));
    let style = |role| state.theme.style(role);
    let share = |part: u64, whole: u64| predicted(state, format!("{:.1}%", 100.0 * part as f64 / whole as f64));
    let mut size = vec![
        label(state, "linears"),
        predicted(state, report::bytes(linears)),
        dim(state, format!(" of {}  ", report::bytes(linears_float))),
        share(linears, linears_float),
        Span::raw("  "),
    ];
    let room = width.saturating_sub(Line::from(size.clone()).width() + 1).min(24);
    size.extend(bar(linears as f64 / linears_float as f64, room, style(Role::Progress), style(Role::Border)));
    let model = vec![
        label(state, "whole model"),
        predicted(state, report::bytes(total)),
        dim(state, format!(" of {}  ", report::bytes(total_float))),
        share(total, total_float),
        dim(state, "  embedding "),
        Span::styled(plan.embedding.to_string(), style(Role::of_format(plan.embedding))),
        dim(state, " head "),
        Span::styled(plan.head.to_string(), style(Role::of_format(plan.head))),
    ];
    let bits = vec![
        label(state, "bits"),
        predicted(state, format!("{:.2}", footprint.bits_per_weight(plan))),
        dim(state, " a weight, scales included"),
    ];
    let prediction = state.predict(plan);
    let mut lines = vec![Line::from(size), Line::from(bits), Line::from(model), loss(state, width)];
    lines.extend(cost(state, &prediction));
    lines.push(Line::from(vec![
        label(state, "transitions"),
        Span::raw(prediction.transitions.to_string()),
        dim(state, if prediction.transitions == 1 { " edge changes activation bits " } else { " edges change activation bits " }),
        match prediction.transitions {
            0 => Span::raw(""),
            _ => predicted(state, format!("{:.2} µs", 1e6 * prediction.transition_seconds)),
        },
        dim(state, if prediction.transitions == 0 { "" } else { " a 1k tokens" }),
    ]));
    lines
}

/// The divergence that the plan on the screen is predicted to have, or what has to be measured first.
pub fn loss(state: &State, width: usize) -> Line<'static> {
    let (draft, room) = (state.document.draft(), width.saturating_sub(LABEL));
    let said = |text: &str| Line::from(vec![label(state, "KLD"), dim(state, cut(&state.keymap.fill(text), room))]);
    if let (Some(Err(error)), None) = (state.losses.found(), &state.allocating) {
        return Line::from(vec![label(state, "KLD"), Span::styled(cut(&error.message, room), state.theme.style(Role::Bad))]);
    }
    match state.losses.known(draft) {
        None | Some(Known::Asked) => return said("looking for what was measured …"),
        Some(Known::Nothing(None)) => return said("not predicted yet: {measure} measures what each part loses"),
        Some(Known::Nothing(Some(error))) => {
            let why = error.message.rsplit_once(": ").map_or(error.message.as_str(), |(_, why)| why);
            let why = why.strip_prefix("they were measured ").map_or_else(|| why.to_owned(), |rest| format!("so far {rest}"));
            return said(&format!("{{measure}} measures it; {why}"));
        }
        Some(Known::Measured(_)) => {}
    }
    let Some(found) = state.losses.predict(&state.document.layout, draft, state.plan()) else {
        let block = state.losses.unmeasured().map_or_else(String::new, |block| format!(" of block {block}"));
        return said(&format!("a format{block} was not measured"));
    };
    let mut spans = vec![label(state, "KLD"), predicted(state, format!("{:.2e}", found.kld)), dim(state, " nats a token")];
    let range = found.interval.map_or_else(String::new, |[low, high]| format!("{low:.1e} to {high:.1e}"));
    let note = match found.other_ends {
        Some([embedding, head]) => format!("  {range}; ends {embedding}, {head}"),
        None if range.is_empty() => String::new(),
        None => format!("  {range} by {} checked plans", found.checks),
    };
    let room = width.saturating_sub(Line::from(spans.clone()).width());
    spans.push(dim(state, cut(&note, room)));
    Line::from(spans)
}

/// Fit, context and time on the chosen GPU.
pub fn cost(state: &State, prediction: &Prediction) -> [Line<'static>; 2] {
    let gpu = label(state, prediction.gpu);
    let fit = match (prediction.fits, prediction.context_tokens) {
        (false, _) => vec![gpu, Span::styled("~does not fit", state.theme.style(Role::Bad)), dim(state, "   t chooses another GPU")],
        (true, None) => vec![gpu, predicted(state, "fits"), dim(state, ", no cache grows with the context")],
        (true, Some(tokens)) => {
            let most = state.document.config.max_positions as u64;
            let more = if tokens > most { format!(" of context (made for {})", report::count(most)) } else { " of context".into() };
            vec![
                gpu,
                predicted(state, "fits"),
                dim(state, " with "),
                predicted(state, format!("{} tokens", report::count(tokens))),
                dim(state, more),
            ]
        }
    };
    let time = vec![
        label(state, ""),
        predicted(state, milliseconds(prediction.decode_seconds)),
        dim(state, " a token   prefill "),
        predicted(state, rate(prediction.prefill_tokens_per_s)),
    ];
    [Line::from(fit), Line::from(time)]
}

fn milliseconds(seconds: f64) -> String {
    format!("{:.2} ms", 1000.0 * seconds)
}

fn rate(tokens_per_s: f64) -> String {
    format!("{} tokens/s", report::count(tokens_per_s as u64))
}

/// The plan, another variant's, and how they differ.
fn comparison(state: &State, other: usize, width: usize) -> Vec<Line<'static>> {
    let document = &state.document;
    let (own, other) = (document.draft(), &document.drafts[other]);
    let drafts = [own, other];
    let plans = drafts.map(|draft| state.plan_of(draft));
    let column = (width.saturating_sub(LABEL + 2) / 3).clamp(8, 16);
    let mut head = vec![label(state, "")];
    for name in [own.name.as_str(), other.name.as_str(), "difference"] {
        head.push(dim(state, format!("{:>column$} ", cut(name, column))));
    }
    let mut lines = vec![Line::from(head)];
    let mut row = |name: &str, values: [Option<f64>; 2], text: &dyn Fn(f64) -> String, relative: bool, less_is_better: bool| {
        let mut spans = vec![label(state, name)];
        for value in values {
            let text = value.map_or_else(|| "–".to_owned(), |value| format!("~{}", text(value)));
            spans.push(Span::styled(format!("{text:>column$} "), state.theme.style(Role::Predicted)));
        }
        if let [Some(own), Some(other)] = values {
            let difference = other - own;
            let magnitude = if relative { format!("{:.1}%", 100.0 * difference.abs() / own) } else { text(difference.abs()) };
            let sign = if difference < 0.0 { "−" } else { "+" };
            let role = match difference {
                0.0 => Role::Dim,
                difference if (difference < 0.0) == less_is_better => Role::Good,
                _ => Role::Bad,
            };
            let shown = if difference == 0.0 { "same".to_owned() } else { format!("~{sign}{magnitude}") };
            spans.push(Span::styled(format!("{shown:>column$}"), state.theme.style(role)));
        }
        lines.push(Line::from(spans));
    };
    let footprint = &document.footprint;
    let both = |of: &dyn Fn(&Plan) -> Option<f64>| plans.map(of);
    row("linears", both(&|plan| Some(footprint.linear_bytes(plan) as f64)), &|bytes| report::bytes(bytes as u64), true, true);
    row("bits", both(&|plan| Some(footprint.bits_per_weight(plan))), &|bits| format!("{bits:.2}"), false, true);
    row("whole model", both(&|plan| Some(footprint.total_bytes(plan) as f64)), &|bytes| report::bytes(bytes as u64), true, true);
    let kld = drafts.map(|draft| state.losses.predict(&document.layout, draft, state.plan_of(draft)).map(|predicted| predicted.kld));
    row("KLD", kld, &|nats| format!("{nats:.1e}"), true, true);
    let predictions = plans.map(|plan| state.predict(plan));
    let cost = |of: &dyn Fn(&Prediction) -> Option<f64>| [of(&predictions[0]), of(&predictions[1])];
    row(predictions[0].gpu, cost(&|cost| Some(cost.decode_seconds)), &milliseconds, true, true);
    row("  prefill/s", cost(&|cost| Some(cost.prefill_tokens_per_s)), &|rate| report::count(rate as u64), true, false);
    row("  context", cost(&|cost| cost.context_tokens.map(|tokens| tokens as f64)), &|tokens| report::count(tokens as u64), true, false);
    row("transitions", cost(&|cost| Some(cost.transitions as f64)), &|count| format!("{count:.0}"), false, true);
    let differing: Vec<usize> = (0..plans[0].blocks.len()).filter(|index| plans[0].blocks[*index] != plans[1].blocks[*index]).collect();
    let blocks = match differing.len() {
        0 => "no block differs".to_owned(),
        count => format!("{count}: {}", differing.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")),
    };
    lines.push(Line::from(vec![label(state, "blocks"), Span::raw(cut(&blocks, width.saturating_sub(LABEL)))]));
    lines
}

/// What the variant changes in its recipe, and the latest edits.
fn edits(state: &State, width: usize, most: usize) -> Vec<Line<'static>> {
    let room = width.saturating_sub(LABEL);
    let draft = state.document.draft();
    let name = if draft.is_allocated() { "pins" } else { "overrides" };
    let overrides = match draft.overrides.as_slice() {
        [] if draft.is_allocated() => dim(state, "none: measurement finds all formats"),
        [] => dim(state, "none: the recipe as it is"),
        rules => {
            let rules: Vec<String> = rules.iter().map(|rule| format!("{} {}", rule.selector, rule.format)).collect();
            Span::raw(cut(&rules.join(", "), room))
        }
    };
    let mut lines = vec![Line::from(vec![label(state, name), overrides])];
    let (done, undone) = state.document.history();
    if done.is_empty() && undone.is_empty() {
        lines.push(Line::from(vec![label(state, "history"), dim(state, "no edits yet")]));
        return lines;
    }
    let (undo, redo) = (state.keymap.fill("{undo}"), state.keymap.fill("{redo}"));
    let future = undone.iter().take(most.saturating_sub(1)).rev();
    let mut rows: Vec<Span> = future.map(|label| dim(state, cut(&format!("  undone: {label}"), room))).collect();
    let past = most - rows.len();
    for (place, label) in done.iter().rev().take(past).enumerate() {
        let text = match place {
            0 if done.len() > past => format!("{label}  ({undo} undoes; {} in all)", done.len()),
            0 => format!("{label}  ({undo} undoes)"),
            _ => (*label).to_owned(),
        };
        rows.push(Span::raw(cut(&text, room)));
    }
    if done.is_empty() {
        rows.push(dim(state, format!("all undone ({redo} does them again; {} in all)", undone.len())));
    }
    for (place, row) in rows.into_iter().take(most).enumerate() {
        lines.push(Line::from(vec![label(state, if place == 0 { "history" } else { "" }), row]));
    }
    lines
}

/// A row of the list of variants; measured figures plain, predicted ones marked.
fn variant(state: &State, index: usize) -> Line<'static> {
    let draft = &state.document.drafts[index];
    let footprint = &state.document.footprint;
    let current = index == state.document.current();
    let result = state.measurements.of(draft).and_then(|row| row.result.as_ref());
    let float = footprint.linear_bytes(&Plan::unquantized(draft.plan.blocks.len())) as f64;
    let figure = |text: String, measured: bool, width: usize| {
        if measured {
            Span::raw(format!(" {text:>width$}"))
        } else {
            Span::styled(format!(" {:>width$}", format!("~{text}")), state.theme.style(Role::Predicted))
        }
    };
    let measured = result.is_some();
    let plan = state.plan_of(draft);
    let bytes = result.map_or_else(|| footprint.linear_bytes(plan), |result| result.weight_bytes);
    let bits = result.map_or_else(|| footprint.bits_per_weight(plan), |result| result.bits_per_weight);
    let changed = if state.document.changed(index) { "▸" } else { " " };
    let beside = state.plan.beside.as_ref() == Some(&draft.name) && !current;
    let line = Line::from(vec![
        Span::styled(if current { " ▶" } else { "  " }, state.theme.style(Role::Strong)),
        Span::styled(changed, state.theme.style(Role::Changed)),
        Span::raw(format!("{:<18} {:<10}", cut(&draft.name, 18), cut(&draft.recipe_name, 10))),
        figure(report::bytes(bytes), measured, 9),
        figure(format!("{:.3}", bytes as f64 / float), measured, 7),
        figure(format!("{bits:.2}"), measured, 6),
        dim(state, if measured { "  measured" } else { "" }),
        dim(state, if beside { "  beside" } else { "" }),
    ]);
    if current && state.focus == Pane::Plan { line.style(state.theme.style(Role::Cursor)) } else { line }
}
