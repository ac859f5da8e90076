//! Plots of results in SVG. Colours come from the page's style (`series-0` … `series-5`).

use std::fmt::Write;

use super::html::escape;
use super::report;
use crate::eval::result::Evidence;
use crate::eval::speed::Speed;
use crate::eval::{ModelResult, Task};

/// Classes of colours in the page's style.
const SERIES: usize = 6;

/// Half of a 95 % interval in standard errors.
const HALF_WIDTH: f64 = 1.96;

/// Height of a row of the legend, which has four names.
const LEGEND_ROW: f64 = 18.0;

/// A plot under construction, with a linear horizontal axis.
struct Plot {
    height: f64,
    body: String,
}

impl Plot {
    const WIDTH: f64 = 760.0;
    const LEFT: f64 = 130.0;
    const RIGHT: f64 = 45.0;

    fn new(height: f64) -> Self {
        Self { height, body: String::new() }
    }

    /// Where a share (0…1) of the horizontal axis lies.
    fn x(share: f64) -> f64 {
        Self::LEFT + share * (Self::WIDTH - Self::LEFT - Self::RIGHT)
    }

    fn text(&mut self, x: f64, y: f64, anchor: &str, text: &str) {
        let _ = writeln!(self.body, "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\">{}</text>", escape(text));
    }

    fn line(&mut self, class: &str, from: (f64, f64), to: (f64, f64)) {
        let ((x1, y1), (x2, y2)) = (from, to);
        let _ = writeln!(self.body, "<line class=\"{class}\" x1=\"{x1:.1}\" y1=\"{y1:.1}\" x2=\"{x2:.1}\" y2=\"{y2:.1}\"/>");
    }

    /// A dot that tells its figure when pointed at.
    fn dot(&mut self, series: usize, x: f64, y: f64, title: &str) {
        let (class, title) = (series % SERIES, escape(title));
        let _ = writeln!(self.body, "<circle class=\"series-{class}\" cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"4\"><title>{title}</title></circle>");
    }

    fn bar(&mut self, series: usize, (x, y): (f64, f64), (width, height): (f64, f64), title: &str) {
        let (class, title) = (series % SERIES, escape(title));
        let _ = writeln!(
            self.body,
            "<rect class=\"series-{class}\" x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\"><title>{title}</title></rect>"
        );
    }

    /// Names of the models beside their colours, in rows from `top` on.
    fn legend<'r>(&mut self, names: impl Iterator<Item = (usize, &'r str)>, top: f64) {
        for (place, (series, name)) in names.enumerate() {
            let (x, y) = (Self::LEFT + (place % 4) as f64 * 155.0, top + (place / 4) as f64 * LEGEND_ROW);
            self.dot(series, x, y - 4.0, name);
            self.text(x + 9.0, y, "start", name);
        }
    }

    fn finish(self, label: &str) -> String {
        let (width, height, body, label) = (Self::WIDTH, self.height, self.body, escape(label));
        format!("<svg viewBox=\"0 0 {width} {height:.0}\" role=\"img\" aria-label=\"{label}\">\n{body}</svg>\n")
    }
}

/// The headline accuracy of every task and model with its 95 % interval; `None` without tasks.
pub fn accuracy(results: &[ModelResult]) -> Option<String> {
    const STEP: f64 = 14.0;
    const GAP: f64 = 16.0;
    let measured = |task: &Task| results.iter().any(|result| result.tasks.contains_key(task.name()));
    let tasks: Vec<Task> = Task::ALL.into_iter().filter(measured).collect();
    if tasks.is_empty() {
        return None;
    }
    let group = results.len() as f64 * STEP + GAP;
    let bottom = 20.0 + tasks.len() as f64 * group;
    let mut plot = Plot::new(bottom + 26.0 + LEGEND_ROW * results.len().div_ceil(4) as f64);
    for percent in (0..=100).step_by(20) {
        let x = Plot::x(f64::from(percent) / 100.0);
        plot.line("grid", (x, 14.0), (x, bottom));
        plot.text(x, bottom + 14.0, "middle", &format!("{percent} %"));
    }
    for (index, task) in tasks.iter().enumerate() {
        let top = 20.0 + index as f64 * group;
        plot.text(Plot::LEFT - 10.0, top + (group - GAP) / 2.0 + 4.0, "end", task.name());
        for (series, result) in results.iter().enumerate() {
            let Some(score) = result.tasks.get(task.name()) else { continue };
            let (value, y) = (score.headline(*task), top + series as f64 * STEP + STEP / 2.0);
            let mut title = format!("{}: {:.1} %", result.variant, 100.0 * value);
            // Imported results may not tell their error.
            if let Some(half) = score.headline_stderr(*task).map(|stderr| HALF_WIDTH * stderr) {
                let (low, high) = ((value - half).max(0.0), (value + half).min(1.0));
                plot.line(&format!("series-{}", series % SERIES), (Plot::x(low), y), (Plot::x(high), y));
                let _ = write!(title, " ({:.1} to {:.1})", 100.0 * low, 100.0 * high);
            }
            plot.dot(series, Plot::x(value), y, &title);
        }
    }
    plot.legend(results.iter().map(|result| result.variant.as_str()).enumerate(), bottom + 34.0);
    Some(plot.finish("accuracy of each model on each task with 95 % intervals"))
}

/// Plots of size against divergence under their titles: one for the models that were compared with one reference on one text,
/// since others are not comparable. Groups without a model that has both figures have none.
pub fn sizes(results: &[ModelResult]) -> Vec<(String, String)> {
    let mut groups: Vec<(String, Vec<(usize, &ModelResult)>)> = Vec::new();
    for (series, result) in results.iter().enumerate() {
        let evidence = &result.provenance;
        let reference = evidence.reference.as_ref().map_or_else(String::new, |found| format!("{} {}", found.model, &found.sha256));
        let key = format!("{reference}\n{}", evidence.text);
        match groups.iter_mut().find(|(other, _)| *other == key) {
            Some((_, group)) => group.push((series, result)),
            None => groups.push((key, vec![(series, result)])),
        }
    }
    let mut plots: Vec<(String, String)> = Vec::new();
    for (_, group) in groups {
        let Evidence { reference, text, .. } = &group[0].1.provenance;
        let from = reference.as_ref().map_or_else(String::new, |reference| format!(" from {}", reference.model));
        let on = if text.is_empty() { String::new() } else { format!(" on {text}") };
        plots.extend(size(&group).map(|plot| (format!("Size against divergence{from}{on}"), plot)));
    }
    plots
}

/// Bytes of the linears against the mean divergence on a logarithmic axis, with the Pareto front; `None` without a model that
/// has both. Results have the numbers of their colours.
fn size(results: &[(usize, &ModelResult)]) -> Option<String> {
    const TOP: f64 = 20.0;
    const BOTTOM: f64 = 260.0;
    let known = |(series, result): &(usize, &ModelResult)| {
        let kld = result.kld.map(|kld| kld.mean).filter(|kld| *kld > 0.0)?;
        let (bytes, of) = report::size(result)?;
        Some((*series, format!("{}{of}", result.variant), bytes as f64, kld.log10()))
    };
    let mut points: Vec<(usize, String, f64, f64)> = results.iter().filter_map(known).collect();
    points.sort_by(|a, b| a.2.total_cmp(&b.2).then(a.3.total_cmp(&b.3)));
    let largest = 1.1 * points.last()?.2;
    // What the unquantized model is from itself when it rounds: below, differences are noise.
    let floors = results.iter().filter_map(|(_, result)| result.noise_floor.as_ref()).map(|floor| floor.kld.mean);
    let floor = floors.filter(|kld| *kld > 0.0).map(f64::log10).next();
    let heights = || points.iter().map(|point| point.3).chain(floor);
    let (low, high) = (heights().fold(f64::INFINITY, f64::min), heights().fold(f64::NEG_INFINITY, f64::max));
    let (low, high) = (low.floor(), (high.floor() + 1.0).max(low.floor() + 1.0));
    let place = |bytes: f64, log: f64| (Plot::x(bytes / largest), BOTTOM - (log - low) / (high - low) * (BOTTOM - TOP));
    let mut plot = Plot::new(BOTTOM + 44.0);
    for decade in low as i32..=high as i32 {
        let (x, y) = place(0.0, f64::from(decade));
        plot.line("grid", (x, y), (Plot::x(1.0), y));
        plot.text(x - 8.0, y + 4.0, "end", &format!("1e{decade}"));
    }
    for share in 0..=4 {
        let bytes = largest * f64::from(share) / 4.0;
        plot.text(Plot::x(f64::from(share) / 4.0), BOTTOM + 16.0, "middle", &report::bytes(bytes as u64));
    }
    plot.text(
        Plot::x(0.5),
        BOTTOM + 36.0,
        "middle",
        "bytes of the linears; upwards: mean KLD in nats a token; line: nothing is both smaller and closer",
    );
    if let Some(floor) = floor {
        let (_, y) = place(0.0, floor);
        plot.line("floor", (Plot::x(0.0), y), (Plot::x(1.0), y));
        plot.text(Plot::x(0.0) + 6.0, y - 5.0, "start", "noise floor of the reference");
    }
    // From the smallest on, a point is on the front when it is closer than everything smaller.
    let mut front: Option<(f64, f64)> = None;
    let mut closest = f64::INFINITY;
    for (_, _, bytes, log) in &points {
        if *log < closest {
            let here = place(*bytes, *log);
            if let Some(before) = front {
                plot.line("front", before, here);
            }
            (front, closest) = (Some(here), *log);
        }
    }
    for (series, name, bytes, log) in &points {
        let (x, y) = place(*bytes, *log);
        plot.dot(*series, x, y, &format!("{name}: {}, KLD {:.2e}", report::bytes(*bytes as u64), 10.0_f64.powf(*log)));
        // Away from the front, which falls from the left to the right.
        let (x, y, anchor) = if x > Plot::x(0.8) { (x - 8.0, y + 14.0, "end") } else { (x + 8.0, y - 6.0, "start") };
        plot.text(x, y, anchor, name);
    }
    Some(plot.finish("bytes of the linears against mean divergence"))
}

/// The error of every block of every variant on a logarithmic axis; `None` without variants.
pub fn block_errors(results: &[ModelResult]) -> Option<String> {
    const TOP: f64 = 20.0;
    const BOTTOM: f64 = 240.0;
    let variants: Vec<(usize, &ModelResult)> = results.iter().enumerate().filter(|(_, result)| !result.blocks.is_empty()).collect();
    let logs = variants.iter().flat_map(|(_, result)| &result.blocks).filter(|block| block.error > 0.0).map(|block| block.error.log10());
    let (low, high) = logs.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), log| (low.min(log), high.max(log)));
    let blocks = &variants.iter().map(|(_, result)| &result.blocks).max_by_key(|blocks| blocks.len())?;
    if low > high {
        return None;
    }
    let (low, high) = (low.floor(), (high.floor() + 1.0).max(low.floor() + 1.0));
    let step = 1.0 / blocks.len().max(1) as f64;
    let place = |index: usize, log: f64| (Plot::x((index as f64 + 0.5) * step), BOTTOM - (log - low) / (high - low) * (BOTTOM - TOP));
    let mut plot = Plot::new(BOTTOM + 56.0 + LEGEND_ROW * variants.len().div_ceil(4) as f64);
    for decade in low as i32..=high as i32 {
        let (_, y) = place(0, f64::from(decade));
        plot.line("grid", (Plot::x(0.0), y), (Plot::x(1.0), y));
        plot.text(Plot::x(0.0) - 8.0, y + 4.0, "end", &format!("1e{decade}"));
    }
    // As many labels as fit beside each other.
    for block in blocks.iter().step_by(blocks.len().div_ceil(32).max(1)) {
        let (x, _) = place(block.index, low);
        plot.text(x, BOTTOM + 16.0, "middle", &block.index.to_string());
    }
    plot.text(Plot::x(0.5), BOTTOM + 36.0, "middle", "block; upwards: relative error of its output on the calibration sample");
    for (series, result) in &variants {
        let mut before: Option<(f64, f64)> = None;
        for block in result.blocks.iter().filter(|block| block.error > 0.0) {
            let here = place(block.index, block.error.log10());
            if let Some(before) = before {
                plot.line(&format!("series-{} thin", series % SERIES), before, here);
            }
            let title = format!("{}: block {} ({}, {}), {:.2e}", result.variant, block.index, block.kind.name(), block.format, block.error);
            plot.dot(*series, here.0, here.1, &title);
            before = Some(here);
        }
    }
    plot.legend(variants.iter().map(|(series, result)| (*series, result.variant.as_str())), BOTTOM + 62.0);
    Some(plot.finish("relative error of each block of each variant"))
}

/// Prompt and decoded tokens a second as bars; `None` where no speed was measured.
pub fn speed(results: &[ModelResult]) -> Option<String> {
    const STEP: f64 = 18.0;
    const GAP: f64 = 20.0;
    /// Share of the width that the longest bar takes, so that its figure stands beside it.
    const LONGEST: f64 = 0.82;
    /// Tokens a second and their spread.
    type Figure = fn(&Speed) -> (f64, f64);
    let measured: Vec<(usize, &ModelResult, Speed)> =
        results.iter().enumerate().filter_map(|(series, result)| Some((series, result, result.speed?))).collect();
    if measured.is_empty() {
        return None;
    }
    let figures: [(&str, Figure); 2] = [
        ("prompt", |speed| (speed.prefill_tokens_per_s, speed.prefill_spread)),
        ("decoding", |speed| (speed.decode_tokens_per_s, speed.decode_spread)),
    ];
    let group = measured.len() as f64 * STEP + GAP;
    let bottom = 10.0 + figures.len() as f64 * group;
    let mut plot = Plot::new(bottom + 10.0 + LEGEND_ROW * measured.len().div_ceil(4) as f64);
    for (index, (name, figure)) in figures.iter().enumerate() {
        let top = 10.0 + index as f64 * group;
        plot.text(Plot::LEFT - 10.0, top + (group - GAP) / 2.0 + 4.0, "end", name);
        let largest = measured.iter().map(|(_, _, speed)| figure(speed).0).fold(0.0, f64::max);
        for (row, (series, result, speed)) in measured.iter().enumerate() {
            let (rate, spread) = figure(speed);
            let (y, width) = (top + row as f64 * STEP, Plot::x(LONGEST * rate / largest) - Plot::x(0.0));
            let text = format!("{rate:.0} tokens/s (spread {:.0} %)", 100.0 * spread);
            plot.bar(*series, (Plot::x(0.0), y), (width, STEP - 4.0), &format!("{}: {text}", result.variant));
            plot.text(Plot::x(0.0) + width + 6.0, y + 11.0, "start", &format!("{rate:.0} t/s"));
        }
    }
    plot.legend(measured.iter().map(|(series, result, _)| (*series, result.variant.as_str())), bottom + 10.0);
    Some(plot.finish("prompt and decoded tokens a second of each model"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Divergence;
    use crate::eval::result::{BlockError, ReferenceModel};
    use crate::eval::statistics;
    use crate::format::{BlockKind, Format};
    use crate::session::import;

    const SPEED: Speed = Speed {
        prefill_tokens_per_s: 0.0,
        decode_tokens_per_s: 10.0,
        prefill_spread: 0.1,
        decode_spread: 0.2,
        prompt_tokens: 512,
        decode_tokens: 64,
        repetitions: 3,
    };

    fn one_size(results: &[ModelResult]) -> String {
        let [(title, plot)]: [(String, String); 1] = sizes(results).try_into().unwrap();
        assert_eq!(title, "Size against divergence");
        plot
    }

    #[test]
    fn models_of_another_reference_or_text_have_a_front_of_their_own() {
        let kld = Some(statistics::summarize_divergence(&[Divergence { kl: 1e-2, same_top: true }]));
        let of = |variant: &str, reference: &str, text: &str| {
            let reference = Some(ReferenceModel { model: reference.into(), sha256: format!("hash of {reference}") });
            let provenance = Evidence { reference, text: text.into(), ..Evidence::default() };
            ModelResult { variant: variant.into(), kld, weight_bytes: 1000, provenance, ..ModelResult::default() }
        };
        let mut imported = of("c", "big", "2 x 512 tokens");
        (imported.weight_bytes, imported.file_bytes, imported.provenance.reference) = (0, 4_540_000_000, None);
        let plots = sizes(&[of("a", "small", "text"), of("b", "big", "text"), of("d", "small", "text"), imported]);
        let titles: Vec<&str> = plots.iter().map(|(title, _)| title.strip_prefix("Size against divergence ").unwrap()).collect();
        assert_eq!(titles, ["from small on text", "from big on text", "on 2 x 512 tokens"]);
        let points: Vec<usize> = plots.iter().map(|(_, plot)| plot.matches("<circle").count()).collect();
        assert_eq!(points, [2, 1, 1]);
        assert!(plots[2].1.contains("c (file): 4.54 GB, KLD 1.00e-2"), "{}", plots[2].1);
    }

    #[test]
    fn plots_show_every_model_and_the_front() {
        assert_eq!((accuracy(&[]), sizes(&[])), (None, Vec::new()));
        let text = r#"{"model_name": "m", "results": {"piqa": {"acc,none": 0.75, "acc_stderr,none": 0.05}}}"#;
        let base = import::harness(text.as_bytes(), "r.json").unwrap().result;
        let variant = |name: &str, bytes, kl| {
            let kld = Some(statistics::summarize_divergence(&[Divergence { kl, same_top: true }]));
            ModelResult { variant: name.into(), weight_bytes: bytes, kld, ..base.clone() }
        };
        // `c` is larger and farther than `b`.
        let results = [base.clone(), variant("a", 500, 1e-2), variant("b", 1000, 1e-4), variant("c", 1500, 1e-3)];
        let accuracy = accuracy(&results).unwrap();
        assert_eq!(accuracy.matches("75.0 % (65.2 to 84.8)").count(), 4);
        let size = one_size(&results);
        assert_eq!((size.matches("<circle").count(), size.matches("class=\"front\"").count()), (3, 1));
        assert!(size.contains("a: 500 B, KLD 1.00e-2"));
        assert_eq!((block_errors(&results), speed(&results)), (None, None));
        let mut results = results;
        // The floor is on the page wherever it lies.
        let kld = statistics::summarize_divergence(&[Divergence { kl: 3e-7, same_top: true }]);
        results[0].noise_floor = Some(statistics::NoiseFloor { rounding: "bf16".into(), kld });
        let size = one_size(&results);
        assert!(size.contains("noise floor") && size.contains("1e-7"), "{size}");
        results[0].noise_floor = None;
        for (index, result) in results[1..].iter_mut().enumerate() {
            let block = |block, error| BlockError { index: block, kind: BlockKind::Mlp, format: Format::W4A8, error };
            result.blocks = vec![block(0, 1e-3), block(1, 0.0), block(2, 2e-2)];
            result.speed = Some(Speed { prefill_tokens_per_s: 100.0 * (index + 1) as f64, ..SPEED });
        }
        let errors = block_errors(&results).unwrap();
        assert_eq!(errors.matches("block 2 (mlp, w4a8), 2.00e-2").count(), 3);
        let speed = speed(&results).unwrap();
        assert_eq!((speed.matches("<rect").count(), speed.matches(">300 t/s<").count()), (6, 1));
    }
}
