//! The front of plans with the budget on it: what the plan under it costs and loses, and why the block under the cursor has
//! the bits that it has.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::canvas::{Canvas, Line as Stroke};

use super::plan::{cost, label, loss};
use super::{axes, dim, layers, predicted};
use crate::analysis::allocate::{Exchange, UnitChoice};
use crate::session::report;
use crate::tui::allocating::Allocating;
use crate::tui::state::{Pane, State};
use crate::tui::theme::Role;
use crate::tui::view;

/// Lines that the plot needs: some to be read, two of its axis.
const PLOT: usize = 6;

/// Parts of a block that are explained, at most; `w` has all.
const PARTS: usize = 3;

pub fn draw(frame: &mut Frame, area: Rect, state: &State, allocating: &Allocating) {
    let (width, height) = (area.width as usize, area.height as usize);
    let mut lines = vec![budget(state, allocating), loss(state, width)];
    lines.extend(cost(state, &state.predict(&allocating.found.plan)));
    if !view::shows(state, Pane::Layers) && height >= lines.len() + 2 + PLOT {
        lines.extend(layers::strip(state, width.saturating_sub(2).max(1), 2));
    }
    let why = why(state, allocating);
    if height >= lines.len() + why.len() + PLOT {
        lines.extend(why);
    }
    let used = lines.len() as u16;
    for (line, y) in lines.into_iter().zip(area.y..area.bottom()) {
        frame.render_widget(line, Rect { y, height: 1, ..area });
    }
    let rest = Rect { y: area.y + used, height: area.height.saturating_sub(used), ..area };
    if rest.height as usize >= PLOT - 1 && rest.width > 20 {
        plot(frame, rest, state, allocating);
    }
}

/// What the plan takes.
fn budget(state: &State, allocating: &Allocating) -> Line<'static> {
    let found = &allocating.found;
    let pins = match allocating.pins() {
        0 => String::new(),
        count => format!("  {count} pinned"),
    };
    let gap = if found.gap > 0.0 { format!("  gap {:.2}%", 100.0 * found.gap) } else { String::new() };
    Line::from(vec![
        label(state, "budget"),
        predicted(state, format!("{:.2}", found.bits_per_weight)),
        dim(state, " bits  linears "),
        predicted(state, report::bytes(found.linear_bytes)),
        dim(state, "  model "),
        predicted(state, report::bytes(found.total_bytes)),
        dim(state, format!("{gap}{pins}")),
    ])
}

/// The parts of the block under the cursor with the exchanges that were not made.
fn why(state: &State, allocating: &Allocating) -> Vec<Line<'static>> {
    let block = state.layers.cursor;
    let price = format!("  a MB saves {:.1e} nats at this budget", allocating.found.price);
    let mut lines = vec![Line::from(vec![label(state, &format!("block {block}")), dim(state, price.trim_start().to_owned())])];
    let units: Vec<&UnitChoice> = allocating.found.units.iter().filter(|unit| unit.block == block).collect();
    for unit in units.iter().take(PARTS) {
        let name = unit.unit.split_once('.').map_or("all", |(_, name)| name).trim_start_matches("experts.").to_owned();
        let exchange = |mark: &str, to: Option<&Exchange>| match to {
            Some(to) => match to.price() {
                Some(price) => format!("  {mark} {} {price:.1e}/MB", to.format),
                None => format!("  {mark} {} same bytes", to.format),
            },
            None => String::new(),
        };
        let role = Role::of_format(unit.format);
        lines.push(Line::from(vec![
            label(state, &format!("  {name}")),
            Span::styled(format!("{:<6}", unit.format), state.theme.style(role)),
            predicted(state, format!("{:.1e}", unit.kld)),
            dim(state, exchange("↓", unit.cheaper.as_ref())),
            dim(state, exchange("↑", unit.dearer.as_ref())),
            dim(state, if unit.pinned { "  pinned" } else { "" }),
        ]));
    }
    lines
}

/// Predicted loss, on a logarithmic scale, over bits a weight: every plan worth having, the one under the budget, and the
/// variant as it is.
fn plot(frame: &mut Frame, area: Rect, state: &State, allocating: &Allocating) {
    let points = &allocating.points;
    let (Some(first), Some(last), Some(here)) = (points.first(), points.last(), allocating.point()) else { return };
    let place = |bits: f64, kld: f64| (bits, kld.max(f64::MIN_POSITIVE).log10());
    let draft = state.document.draft();
    let own = state.plan_of(draft);
    let own = state
        .losses
        .predict(&state.document.layout, draft, own)
        .map(|found| place(state.document.footprint.bits_per_weight(own), found.kld));
    let of = |point: &crate::analysis::allocate::FrontPoint| place(point.bits_per_weight, point.corrected_kld);
    let ends = [of(first), of(last)];
    let xs = [ends[0].0, ends[1].0.max(ends[0].0 + 0.1)];
    let (low, high) = own.into_iter().chain(ends).fold((f64::MAX, f64::MIN), |(low, high), (_, y)| (low.min(y), high.max(y)));
    let ys = [low - 0.1, high + 0.1];
    let plot = Rect { x: area.x + 8, width: area.width - 9, height: area.height - 2, ..area };
    // More points than dots say nothing more.
    let each = (points.len() / (4 * plot.width as usize).max(1)).max(1);
    let line: Vec<(f64, f64)> = points.iter().step_by(each).chain([last]).map(of).collect();
    let color = |role| state.theme.style(role).fg.unwrap_or_default();
    let canvas =
        Canvas::default().marker(if state.ascii { Marker::Dot } else { Marker::Braille }).x_bounds(xs).y_bounds(ys).paint(|context| {
            let (x, y) = of(here);
            context.draw(&Stroke { x1: x, y1: ys[0], x2: x, y2: ys[1], color: color(Role::Border) });
            context.layer();
            for pair in line.windows(2) {
                context.draw(&Stroke { x1: pair[0].0, y1: pair[0].1, x2: pair[1].0, y2: pair[1].1, color: color(Role::Progress) });
            }
            context.layer();
            if let Some((x, y)) = own {
                context.print(x.clamp(xs[0], xs[1]), y, Line::styled("○", state.theme.style(Role::Warning)));
            }
            context.print(x, y, Line::styled("●", state.theme.style(Role::Key)));
        });
    frame.render_widget(canvas, plot);
    let kld = |y: f64| format!("{:.0e}", 10_f64.powf(y));
    axes(
        frame,
        plot,
        state,
        [&kld(ys[1]), &kld(ys[0])],
        [&format!("{:.2} bits", xs[0]), &format!("● here  ○ {}  {:.2} bits", draft.name, xs[1])],
    );
}
