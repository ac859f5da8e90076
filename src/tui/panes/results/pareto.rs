//! Size against loss: a point a measured variant, and the line of those that no other beats in both.

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::canvas::{Canvas, Line as Stroke};

use super::{COLUMNS, Figure, dim, result};
use crate::session::report;
use crate::tui::panes::axes;
use crate::tui::state::{Ordinate, State};
use crate::tui::theme::Role;

/// A measured model.
struct Point {
    letter: char,
    name: String,
    bytes: f64,
    /// What is plotted: log₁₀ of the divergence, or the mean accuracy in percent.
    y: f64,
}

fn points(state: &State) -> Vec<Point> {
    let mean = COLUMNS.iter().find(|column| column.figure == Figure::Mean);
    let drafts = state.document.drafts.iter().map(|draft| (draft.name.clone(), result(state, draft)));
    let models = std::iter::once(("base".to_owned(), state.measurements.base.as_ref())).chain(drafts);
    models
        .enumerate()
        .filter_map(|(index, (name, result))| {
            let result = result?;
            let y = match state.results.ordinate {
                Ordinate::Kld => result.kld.filter(|kld| kld.mean > 0.0)?.mean.log10(),
                Ordinate::Accuracy => mean?.value(result, 1)?,
            };
            Some(Point { letter: char::from(b'A' + (index % 26) as u8), name, bytes: result.weight_bytes as f64, y })
        })
        .collect()
}

/// The points that no other beats in both, from small to large.
fn front<'a>(points: &'a [Point], ordinate: Ordinate) -> Vec<&'a Point> {
    let loss = |point: &Point| if ordinate == Ordinate::Kld { point.y } else { -point.y };
    let beaten = |point: &&Point| {
        !points.iter().any(|other| {
            (other.bytes < point.bytes && loss(other) <= loss(point)) || (other.bytes <= point.bytes && loss(other) < loss(point))
        })
    };
    let mut front: Vec<&'a Point> = points.iter().filter(beaten).collect();
    front.sort_by(|a, b| a.bytes.total_cmp(&b.bytes));
    front
}

pub fn draw(frame: &mut Frame, area: Rect, state: &State) {
    let points = points(state);
    let title = match state.results.ordinate {
        Ordinate::Kld => " KLD (logarithmic) over bytes of the linears",
        Ordinate::Accuracy => " mean accuracy in percent over bytes of the linears",
    };
    frame.render_widget(Line::from(vec![dim(state, title), dim(state, "   y changes it")]), Rect { height: 1, ..area });
    if points.is_empty() || area.height < 6 {
        let line = Rect { y: area.y + 1, height: 1.min(area.height.saturating_sub(1)), ..area };
        frame.render_widget(Line::from(dim(state, state.keymap.fill(" nothing is measured yet: {run-all} runs all variants"))), line);
        return;
    }
    let ordinate = state.results.ordinate;
    let label = |y: f64| if ordinate == Ordinate::Kld { format!("{:.0e}", 10f64.powf(y)) } else { format!("{y:.1}") };
    let range = |values: Vec<f64>, least: f64| {
        let (low, high) = values.iter().fold((f64::MAX, f64::MIN), |(low, high), value| (low.min(*value), high.max(*value)));
        let margin = ((high - low) * 0.12).max(least);
        [low - margin, high + margin]
    };
    let xs = range(points.iter().map(|point| point.bytes).collect(), points[0].bytes * 0.05);
    let ys = range(points.iter().map(|point| point.y).collect(), if ordinate == Ordinate::Kld { 0.3 } else { 0.5 });

    let legend = points.len() as u16;
    let names = points.iter().map(|point| point.name.chars().count()).max().unwrap_or(0) as u16 + 4;
    let beside = area.width > names + 40;
    let below = if beside { 0 } else { legend.min(area.height / 3) };
    let plot = Rect {
        x: area.x + 8,
        y: area.y + 1,
        width: area.width.saturating_sub(9 + if beside { names } else { 0 }),
        height: area.height - 3 - below,
    };
    let best = front(&points, ordinate);
    let (line_color, style) = (state.theme.style(Role::Progress).fg.unwrap_or_default(), |role| state.theme.style(role));
    let on_front = |point: &Point| best.iter().any(|other| other.letter == point.letter);
    let canvas =
        Canvas::default().marker(if state.ascii { Marker::Dot } else { Marker::Braille }).x_bounds(xs).y_bounds(ys).paint(|context| {
            for pair in best.windows(2) {
                context.draw(&Stroke { x1: pair[0].bytes, y1: pair[0].y, x2: pair[1].bytes, y2: pair[1].y, color: line_color });
            }
            context.layer();
            for point in &points {
                let role = if on_front(point) { Role::Good } else { Role::Warning };
                context.print(point.bytes, point.y, Line::styled(point.letter.to_string(), style(role)));
            }
        });
    frame.render_widget(canvas, plot);
    let ends = xs.map(|bytes| report::bytes(bytes.max(0.0) as u64));
    axes(frame, plot, state, [&label(ys[1]), &label(ys[0])], [&ends[0], &ends[1]]);

    let rows = points.iter().map(|point| {
        Line::from(vec![
            Span::styled(format!(" {} ", point.letter), style(if on_front(point) { Role::Good } else { Role::Warning })),
            Span::raw(point.name.clone()),
        ])
    });
    let place = if beside {
        Rect { x: plot.right() + 1, y: plot.y, width: names, height: plot.height }
    } else {
        Rect { y: area.bottom() - below, height: below, ..area }
    };
    for (row, y) in rows.zip(place.y..place.bottom()) {
        frame.render_widget(row, Rect { y, height: 1, ..place });
    }
}
