//! Results as a table of text.

use super::import;
use super::store::Record;
use crate::analysis::allocate::{Allocation, FrontPoint};
use crate::analysis::sensitivity::{Check, Loss, Sensitivities};
use crate::analysis::study::{self, StudyRow};
use crate::eval::memory::CacheBytes;
use crate::eval::paired::{Comparison, McNemarTest};
use crate::eval::result::Evidence;
use crate::eval::score::TaskScore;
use crate::eval::statistics::DivergenceSummary;
use crate::eval::{ModelResult, Task};

/// Rows of columns, the first row being the heads; numbers are right-aligned. Reads the same on screen and in a file.
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column heads.
    pub fn new(heads: &[&str]) -> Self {
        Self { rows: vec![heads.iter().map(|head| (*head).to_owned()).collect()] }
    }

    /// Adds a row.
    pub fn push(&mut self, row: Vec<String>) {
        self.rows.push(row);
    }

    /// Lines with columns two spaces apart; the first column is left-aligned, the others right.
    pub fn lines(&self) -> Vec<String> {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let line = |row: &Vec<String>| {
            let cells = row.iter().zip(&widths).enumerate();
            let cells =
                cells.map(|(column, (cell, width))| if column == 0 { format!("{cell:<width$}") } else { format!("{cell:>width$}") });
            cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
        };
        self.rows.iter().map(line).collect()
    }

    /// Rows of cells, the column heads first.
    pub fn rows(&self) -> &[Vec<String>] {
        &self.rows
    }

    /// A table in Markdown.
    pub fn markdown(&self) -> String {
        let line = |row: &Vec<String>| {
            let cells: Vec<String> = row.iter().map(|cell| cell.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let mut lines: Vec<String> = self.rows.iter().map(line).collect();
        let columns = self.rows.first().map_or(0, Vec::len);
        lines.insert(1.min(lines.len()), format!("|---|{}\n", "--:|".repeat(columns.saturating_sub(1))));
        lines.concat()
    }

    /// Comma-separated values.
    pub fn csv(&self) -> String {
        let cell = |cell: &String| {
            if cell.contains([',', '"', '\n']) { format!("\"{}\"", cell.replace('"', "\"\"")) } else { cell.clone() }
        };
        self.rows.iter().map(|row| row.iter().map(cell).collect::<Vec<_>>().join(",") + "\n").collect()
    }
}

/// The comparison table: a row a model, the first one in full and the others with their differences in points.
pub fn comparison(results: &[ModelResult]) -> Table {
    let tasks = tasks_of(&results.iter().collect::<Vec<_>>());
    let mut heads = vec!["variant", "linears", "ratio", "bits"];
    heads.extend(tasks.iter().map(|task| task.name()));
    heads.extend(["mean", "KLD", "KLD p99", "top1", "ppl", "prefill t/s", "decode t/s"]);
    let mut table = Table::new(&heads);
    let base = results.first();
    for result in results {
        let mut row = vec![result.variant.clone(), bytes(result.weight_bytes)];
        row.push(base.map_or_else(String::new, |base| format!("{:.3}", result.weight_bytes as f64 / base.weight_bytes as f64)));
        row.push(format!("{:.2}", result.bits_per_weight));
        row.extend(scores(&tasks, result));
        let none = || "-".to_owned();
        row.push(result.kld.map_or_else(none, |kld| format!("{:.2e}", kld.mean)));
        row.push(result.kld.map_or_else(none, |kld| format!("{:.2e}", kld.p99)));
        row.push(result.kld.map_or_else(none, |kld| format!("{:.1}%", 100.0 * kld.top1)));
        row.push(result.perplexity.map_or_else(none, |perplexity| format!("{perplexity:.4}")));
        row.push(result.speed.map_or_else(none, |speed| format!("{:.0}", speed.prefill_tokens_per_s)));
        row.push(result.speed.map_or_else(none, |speed| format!("{:.0}", speed.decode_tokens_per_s)));
        table.push(row);
    }
    table
}

/// The five tasks as far as a result has them.
fn tasks_of(results: &[&ModelResult]) -> Vec<Task> {
    let measured = |task: &Task| results.iter().any(|result| result.tasks.contains_key(task.name()));
    Task::ALL.into_iter().filter(measured).collect()
}

/// The headline accuracy of each task in percent with its standard error, and their mean.
fn scores(tasks: &[Task], result: &ModelResult) -> Vec<String> {
    let score = |task: &Task| Some((*task, result.tasks.get(task.name())?));
    let cell = |(task, score): (Task, &TaskScore)| {
        let stderr = score.headline_stderr(task).map_or_else(String::new, |stderr| format!(" ±{:.1}", 100.0 * stderr));
        format!("{:.1}{stderr}", 100.0 * score.headline(task))
    };
    let mut cells: Vec<String> = tasks.iter().map(|task| score(task).map_or_else(|| "-".into(), cell)).collect();
    let present: Vec<f64> = tasks.iter().filter_map(score).map(|(task, score)| 100.0 * score.headline(task)).collect();
    cells.push(if present.is_empty() { "-".into() } else { format!("{:.2}", crate::eval::statistics::mean(&present)) });
    cells
}

/// Bytes of a model, and what they are of where that is not the linears of its blocks; `None` where neither is known.
pub fn size(result: &ModelResult) -> Option<(u64, &'static str)> {
    let known = [(result.weight_bytes, ""), (result.file_bytes, " (file)")];
    known.into_iter().find(|(bytes, _)| *bytes > 0)
}

/// What the result store holds: a row a record. Figures that were not measured, or not imported, are dashes. llama.cpp's
/// divergence is over the second halves of windows, and has a column of its own.
pub fn records(records: &[Record]) -> Table {
    let tasks = tasks_of(&records.iter().map(|record| &record.result).collect::<Vec<_>>());
    let mut heads = vec!["time", "source", "session", "model", "variant", "linears", "bits"];
    heads.extend(tasks.iter().map(|task| task.name()));
    heads.extend(["mean", "KLD", "KLD (llama.cpp)", "top1", "KLD decoding", "ppl (gptq)", "ppl (llama.cpp)"]);
    heads.extend(["prefill t/s", "decode t/s", "backend"]);
    let mut table = Table::new(&heads);
    for Record { time, source, session, result, .. } in records {
        let measured = |known: bool, text: String| if known { text } else { "-".to_owned() };
        let mut row = vec![time.clone(), source.clone(), session.clone().unwrap_or_else(|| "-".into())];
        row.extend([result.model.clone(), result.variant.clone()]);
        row.push(size(result).map_or_else(|| "-".into(), |(size, of)| format!("{}{of}", bytes(size))));
        row.push(measured(result.bits_per_weight > 0.0, format!("{:.2}", result.bits_per_weight)));
        row.extend(scores(&tasks, result));
        let mean = |own: bool| result.kld.filter(|_| own).map_or_else(|| "-".into(), |kld| format!("{:.2e}", kld.mean));
        row.extend([mean(source != import::LLAMA), mean(source == import::LLAMA)]);
        row.push(result.kld.map_or_else(|| "-".into(), |kld| format!("{:.1}%", 100.0 * kld.top1)));
        row.push(result.kld_decode.as_ref().map_or_else(|| "-".into(), |found| format!("{:.2e}", found.summary.mean)));
        row.push(result.perplexity.map_or_else(|| "-".into(), |perplexity| format!("{perplexity:.4}")));
        row.push(result.perplexities.map_or_else(|| "-".into(), |perplexities| format!("{:.4}", perplexities.llama_cpp)));
        row.push(result.speed.map_or_else(|| "-".into(), |speed| format!("{:.0}", speed.prefill_tokens_per_s)));
        row.push(result.speed.map_or_else(|| "-".into(), |speed| format!("{:.0}", speed.decode_tokens_per_s)));
        row.push(result.provenance.backend.clone());
        table.push(row);
    }
    table
}

/// How far each variant's next-token distributions are from the base's, in full; first the base's own noise floor.
pub fn divergence(results: &[ModelResult]) -> Table {
    let heads = ["variant", "KLD mean", "median", "p90", "p95", "p99", "p99.9", "max", "top1", "RMS dp", "ppl (gptq)", "ppl (llama.cpp)"];
    let mut table = Table::new(&heads);
    let floors = results.iter().filter_map(|result| Some((format!("{}, rounded", result.variant), result.noise_floor.as_ref()?.kld)));
    for (variant, kld) in floors {
        let mut row = vec![variant];
        row.extend(summary(Some(&kld)));
        row.extend(["-".into(), "-".into()]);
        table.push(row);
    }
    for result in results {
        let perplexity = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |perplexity| format!("{perplexity:.4}"));
        let mut row = vec![result.variant.clone()];
        row.extend(summary(result.kld.as_ref()));
        row.push(perplexity(result.perplexities.and_then(|perplexities| perplexities.gptq)));
        row.push(perplexity(result.perplexities.map(|perplexities| perplexities.llama_cpp)));
        table.push(row);
    }
    table
}

/// Mean, median, 90, 95, 99 and 99.9 %, largest, share of the same most probable token, RMS Δp.
fn summary(kld: Option<&DivergenceSummary>) -> Vec<String> {
    let Some(kld) = kld else { return vec!["-".to_owned(); 9] };
    let known = |nats: f64| if kld.has_percentiles() { format!("{nats:.2e}") } else { "-".to_owned() };
    let of_all = |nats: f64| format!("{nats:.2e}");
    let nats = [of_all(kld.mean), known(kld.median), known(kld.p90), known(kld.p95), of_all(kld.p99), known(kld.p999), known(kld.max)];
    let rms = kld.rms_probability.map_or_else(|| "-".to_owned(), |rms| format!("{:.2}%", 100.0 * rms));
    nats.into_iter().chain([format!("{:.2}%", 100.0 * kld.top1), rms]).collect()
}

/// Divergence of variants with rounded caches that read one token a step, beside what they lose on whole windows; no rows
/// where there is none.
pub fn decoding(results: &[ModelResult]) -> Table {
    let stretches = results.iter().filter_map(|result| result.kld_decode.as_ref()).map(|found| &found.positions).max_by_key(|p| p.len());
    let heads = ["variant", "KLD whole", "KLD decoding", "median", "p90", "p95", "p99", "p99.9", "max", "top1", "RMS dp"];
    let mut heads = heads.map(str::to_owned).to_vec();
    heads.extend(stretches.into_iter().flatten().map(|stretch| format!("to {}", stretch.to)));
    let mut table = Table::new(&heads.iter().map(String::as_str).collect::<Vec<_>>());
    for result in results {
        let Some(found) = &result.kld_decode else { continue };
        let whole = result.kld.map_or_else(|| "-".to_owned(), |kld| format!("{:.2e}", kld.mean));
        let mut row = vec![result.variant.clone(), whole];
        row.extend(summary(Some(&found.summary)));
        row.extend(found.positions.iter().map(|stretch| format!("{:.2e}", stretch.mean)));
        table.push(row);
    }
    table
}

/// What figures were measured on, in a line.
pub fn evidence(evidence: &Evidence) -> String {
    let Evidence { tool, backend, processor, threads, cores, memory_bytes, libraries, text, .. } = evidence;
    let libraries: Vec<String> = libraries.iter().map(|(name, version)| format!("{name} {version}")).collect();
    let memory = bytes(*memory_bytes);
    format!(
        "{backend} on {processor}, {threads} threads of {cores} processors, {memory} of memory; {tool}; {}; text: {text}",
        libraries.join(", ")
    )
}

/// Times at every prompt length and batch size.
pub fn speed(results: &[ModelResult]) -> Table {
    let heads = [
        "variant",
        "prompt",
        "sequences",
        "first token ms",
        "spread",
        "per token ms",
        "spread",
        "prefill t/s",
        "decode t/s",
        "SSM+conv",
        "KV",
    ];
    let mut table = Table::new(&heads);
    for result in results {
        for point in &result.speed_points {
            table.push(vec![
                result.variant.clone(),
                point.prompt_tokens.to_string(),
                point.sequences.to_string(),
                format!("{:.1}", 1e3 * point.first_token_s),
                format!("{:.0}%", 100.0 * point.first_token_spread),
                format!("{:.3}", 1e3 * point.token_s),
                format!("{:.0}%", 100.0 * point.token_spread),
                format!("{:.0}", point.prefill_tokens_per_s()),
                format!("{:.0}", point.decode_tokens_per_s()),
                bytes(point.state_bytes),
                bytes(point.kv_bytes),
            ]);
        }
    }
    table
}

/// Memory: measured for weights, process and device, predicted for the caches of one sequence.
pub fn memory(results: &[ModelResult]) -> Table {
    let contexts: Vec<u64> =
        results.iter().map(|result| &result.caches).max_by_key(|caches| caches.len()).into_iter().flatten().map(|c| c.context).collect();
    let name = |context: &u64| if *context < 1 << 20 { format!("{}K", context >> 10) } else { format!("{}M", context >> 20) };
    let mut heads: Vec<String> =
        ["variant", "on disk", "weights", "peak of process", "SSM state", "conv state"].map(str::to_owned).to_vec();
    let on_device = results.iter().any(|result| result.memory.device_peak_bytes.is_some());
    if on_device {
        heads.insert(4, "peak of device".into());
    }
    heads.extend(contexts.iter().map(|context| format!("KV at {}", name(context))));
    let mut table = Table::new(&heads.iter().map(String::as_str).collect::<Vec<_>>());
    for result in results {
        let cache = |of: fn(&CacheBytes) -> u64| result.caches.first().map_or_else(|| "-".to_owned(), |cache| bytes(of(cache)));
        let mut row = vec![
            result.variant.clone(),
            bytes(result.file_bytes),
            bytes(result.memory.resident_weight_bytes),
            bytes(result.memory.peak_bytes),
            cache(|cache| cache.state),
            cache(|cache| cache.conv),
        ];
        if on_device {
            row.insert(4, result.memory.device_peak_bytes.map_or_else(|| "-".to_owned(), bytes));
        }
        let kv =
            |context: &u64| result.caches.iter().find(|cache| cache.context == *context).map_or_else(|| "-".to_owned(), |c| bytes(c.kv));
        row.extend(contexts.iter().map(kv));
        table.push(row);
    }
    table
}

/// The paired statistics of each comparison: a row a task, and one over all rows.
pub fn paired(comparisons: &[Comparison]) -> Table {
    let mut table = Table::new(&["variant", "task", "rows", "metric", "lost", "gained", "difference", "95 % interval", "p", "McNemar"]);
    for comparison in comparisons {
        let all = comparison.all.as_ref().map(|all| ("all", all));
        for (task, paired) in comparison.tasks.iter().map(|(task, paired)| (task.as_str(), paired)).chain(all) {
            table.push(vec![
                format!("{} - {}", comparison.variant, comparison.base),
                task.to_owned(),
                paired.rows.to_string(),
                paired.metric.clone(),
                paired.right_to_wrong.to_string(),
                paired.wrong_to_right.to_string(),
                format!("{:+.2}", 100.0 * paired.difference),
                format!("{:+.2} {:+.2}", 100.0 * paired.interval[0], 100.0 * paired.interval[1]),
                if paired.p_value < 0.001 { format!("{:.1e}", paired.p_value) } else { format!("{:.3}", paired.p_value) },
                match paired.test {
                    McNemarTest::Exact => "exact".to_owned(),
                    McNemarTest::ChiSquaredContinuity => "chi2 cc".to_owned(),
                },
            ]);
        }
    }
    table
}

/// The rows that changed, one a line.
pub fn flips(comparisons: &[Comparison]) -> Table {
    let mut table = Table::new(&["variant", "task", "row", "change", "right choice", "base chose", "variant chose"]);
    for comparison in comparisons {
        for flip in &comparison.flips {
            table.push(vec![
                comparison.variant.clone(),
                flip.task.clone(),
                flip.index.to_string(),
                if flip.base == flip.gold { "lost" } else { "gained" }.to_owned(),
                flip.gold.to_string(),
                flip.base.to_string(),
                flip.variant.to_string(),
            ]);
        }
    }
    table
}

/// What each unit loses, with the half of its interval (95 %): a row a unit, a column a format.
pub fn sensitivities(found: &Sensitivities) -> Table {
    let formats = found.formats();
    let mut heads = vec!["unit".to_owned(), "kind".into(), "weights".into()];
    heads.extend(formats.iter().map(ToString::to_string));
    heads.push("a8".into());
    let mut table = Table::new(&heads.iter().map(String::as_str).collect::<Vec<_>>());
    for unit in &found.units {
        let mut row = vec![unit.name.clone(), unit.kind.to_string(), count(unit.weights)];
        let loss = |loss: Loss| format!("{}{:.1e} ±{:.0e}", if loss.measured { "" } else { "~" }, loss.kld, 1.96 * loss.stderr);
        row.extend(formats.iter().map(|format| unit.loss(*format).map_or_else(String::new, loss)));
        row.push(unit.activation_kld().map_or_else(|| "-".into(), |kld| format!("{kld:.1e}")));
        table.push(row);
    }
    table
}

/// Plans that were put together and measured.
pub fn checks(checks: &[Check]) -> Table {
    let mut table = Table::new(&["plan", "predicted", "measured", "±", "ratio"]);
    for check in checks {
        let mut formats: Vec<String> = check.plan.blocks.iter().map(ToString::to_string).collect();
        formats.sort_unstable();
        formats.dedup();
        let row = [format!("{:.2e}", check.predicted), format!("{:.2e}", check.measured), format!("{:.0e}", 1.96 * check.stderr)];
        let mut row = [vec![formats.join(" ")], row.to_vec()].concat();
        row.push(format!("{:.2}", check.ratio()));
        table.push(row);
    }
    table
}

/// A plan unit by unit, `~` where a loss is estimated, with the exchanges beside it when `explain` is set.
pub fn allocation(allocation: &Allocation, explain: bool) -> Table {
    let mut heads = vec!["unit", "format", "bytes", "KLD"];
    if explain {
        let price = if allocation.seconds.is_some() { "nats/us" } else { "nats/MB" };
        heads.extend(["cheaper", "saves", "loses", price, "dearer", "takes", "gains", price]);
    }
    let mut table = Table::new(&heads);
    for unit in &allocation.units {
        let estimated = if unit.measured { "" } else { "~" };
        let mut row = vec![unit.unit.clone(), unit.format.to_string(), bytes(unit.bytes), format!("{estimated}{:.1e}", unit.kld)];
        for (exchange, sign) in [(&unit.cheaper, 1.0), (&unit.dearer, -1.0)].into_iter().filter(|_| explain) {
            row.extend(match exchange {
                Some(to) => {
                    let cost = to.seconds.map_or_else(|| bytes(to.bytes.unsigned_abs()), |s| format!("{:.3} us", 1e6 * s.abs()));
                    let price = to.price().map_or_else(|| "same cost".into(), |price| format!("{price:.1e}"));
                    [to.format.to_string(), cost, format!("{:.1e}", sign * to.kld), price]
                }
                None => [if unit.pinned { "pinned" } else { "-" }.into(), "-".into(), "-".into(), "-".into()],
            });
        }
        table.push(row);
    }
    table
}

/// Rows of a front that a table shows.
const FRONT_ROWS: usize = 16;

/// A front in a few rows, evenly spaced in bytes, or in time where that is the cost.
pub fn front(front: &[FrontPoint]) -> Table {
    let timed = front.iter().any(|point| point.seconds.is_some());
    let mut heads = vec!["bits", "linears", "predicted KLD", "corrected KLD"];
    if timed {
        heads.insert(0, "us/token");
    }
    let mut table = Table::new(&heads);
    let cost = |point: &FrontPoint| point.seconds.unwrap_or(point.linear_bytes as f64);
    let (Some(first), Some(last)) = (front.first(), front.last()) else { return table };
    let mut shown = None;
    for step in 0..FRONT_ROWS {
        let budget = cost(first) + (cost(last) - cost(first)) * step as f64 / (FRONT_ROWS as f64 - 1.0);
        let Some(index) = front.partition_point(|point| cost(point) <= budget).checked_sub(1) else { continue };
        if shown.replace(index) != Some(index) {
            let point = &front[index];
            let kld = [point.predicted_kld, point.corrected_kld].map(|kld| format!("{kld:.2e}"));
            let mut row = [vec![format!("{:.3}", point.bits_per_weight), bytes(point.linear_bytes)], kld.to_vec()].concat();
            if let Some(seconds) = point.seconds {
                row.insert(0, format!("{:.3}", 1e6 * seconds));
            }
            table.push(row);
        }
    }
    table
}

/// Plans of a study: of the random ones the best, the others all.
pub fn study(rows: &[StudyRow]) -> Table {
    let mut table = Table::new(&["budget", "plan", "bits", "predicted", "corrected", "KLD", "interval", "excess", "interval"]);
    let interval = |[low, high]: [f64; 2]| format!("{low:.2e} to {high:.2e}");
    let is_random = |row: &StudyRow| row.name.starts_with("random");
    for row in rows {
        let rivals = || rows.iter().filter(|other| other.budget == row.budget && is_random(other));
        let best = rivals().map(|other| other.kld).fold(f64::INFINITY, f64::min);
        if is_random(row) && row.kld > best {
            continue;
        }
        let name = if is_random(row) { format!("best of {} random", rivals().count()) } else { row.name.clone() };
        let own = row.name == study::ALLOCATED;
        table.push(vec![
            row.budget.clone(),
            name,
            format!("{:.3}", row.bits_per_weight),
            format!("{:.2e}", row.predicted_kld),
            format!("{:.2e}", row.corrected_kld),
            format!("{:.3e}", row.kld),
            interval(row.interval),
            if own { "-".into() } else { format!("{:.2e}", row.excess) },
            if own { "-".into() } else { interval(row.excess_interval) },
        ]);
    }
    table
}

/// Bytes in decimal units with three significant digits.
pub fn bytes(count: u64) -> String {
    let units = ["B", "kB", "MB", "GB", "TB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < units.len() {
        value /= 1000.0;
        unit += 1;
    }
    match value {
        _ if unit == 0 => format!("{count} B"),
        value if value < 10.0 => format!("{value:.2} {}", units[unit]),
        value if value < 100.0 => format!("{value:.1} {}", units[unit]),
        value => format!("{value:.0} {}", units[unit]),
    }
}

/// A count with a unit of thousands: `8.10 B` for parameters.
pub fn count(number: u64) -> String {
    match number {
        0..1000 => number.to_string(),
        1000..1_000_000 => format!("{:.1} K", number as f64 / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} M", number as f64 / 1e6),
        _ => format!("{:.2} B", number as f64 / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short_and_csv_is_quoted() {
        assert_eq!([bytes(999), bytes(12_268_112), bytes(16_200_000_000)], ["999 B", "12.3 MB", "16.2 GB"]);
        assert_eq!(count(8_100_852_736), "8.10 B");
        let mut table = Table::new(&["a", "b"]);
        table.push(vec!["x,y".into(), "1".into()]);
        assert_eq!(table.csv(), "a,b\n\"x,y\",1\n");
        assert_eq!(table.lines(), ["a    b", "x,y  1"]);
        table.push(vec!["p|q".into(), "2".into()]);
        assert_eq!(table.markdown(), "| a | b |\n|---|--:|\n| x,y | 1 |\n| p\\|q | 2 |\n");
    }

    #[test]
    fn memory_of_a_device_is_shown_where_there_is_one() {
        use crate::eval::result::Memory;
        let result = |device| ModelResult { memory: Memory { device_peak_bytes: device, ..Memory::default() }, ..ModelResult::default() };
        let lines = |results: &[ModelResult]| memory(results).lines().join("\n");
        assert!(!lines(&[result(None)]).contains("device"));
        let both = lines(&[result(Some(3_400_000_000)), result(None)]);
        assert!(both.contains("peak of device") && both.contains("3.40 GB"), "{both}");
    }
}
