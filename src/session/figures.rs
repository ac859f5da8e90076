//! Results as numbers for other programs: a row a model, no units and nothing rounded, columns named after the fields of the
//! JSON; what was not measured is empty. Start with [`records`] or [`results`].

use std::collections::BTreeSet;

use super::report::Table;
use super::store::Record;
use crate::eval::ModelResult;
use crate::eval::score::TaskScore;
use crate::eval::statistics::DivergenceSummary;

/// Heads and cells of a row.
type Row = Vec<(String, String)>;

/// What the result store holds.
pub fn records(records: &[Record]) -> Table {
    let tasks = tasks(records.iter().map(|record| &record.result));
    let about = |record: &Record| {
        let session = record.session.clone().unwrap_or_default();
        [("time", record.time.clone()), ("source", record.source.clone()), ("session", session)].map(|(head, cell)| (head.to_owned(), cell))
    };
    table(records.iter().map(|record| about(record).into_iter().chain(figures(&record.result, &tasks)).collect()))
}

/// Models of one evaluation.
pub fn results(results: &[ModelResult]) -> Table {
    let tasks = tasks(results.iter());
    table(results.iter().map(|result| figures(result, &tasks)))
}

fn table(rows: impl Iterator<Item = Row>) -> Table {
    let rows: Vec<Row> = rows.collect();
    let heads: Vec<&str> = rows.first().into_iter().flatten().map(|(head, _)| head.as_str()).collect();
    let mut table = Table::new(&heads);
    for row in &rows {
        table.push(row.iter().map(|(_, cell)| cell.clone()).collect());
    }
    table
}

/// Names of the tasks that any result has.
fn tasks<'r>(results: impl Iterator<Item = &'r ModelResult>) -> BTreeSet<String> {
    results.flat_map(|result| result.tasks.keys().cloned()).collect()
}

fn figures(result: &ModelResult, tasks: &BTreeSet<String>) -> Row {
    let mut row = Row::new();
    let mut add = |head: &str, cell: Option<String>| row.push((head.to_owned(), cell.unwrap_or_default()));
    // Importing leaves what a file does not tell at 0.
    let count = |count: u64| (count > 0).then(|| count.to_string());
    add("model", Some(result.model.clone()));
    add("variant", Some(result.variant.clone()));
    add("recipe", result.recipe.clone());
    add("weight_bytes", count(result.weight_bytes));
    add("file_bytes", count(result.file_bytes));
    add("bits_per_weight", (result.bits_per_weight > 0.0).then(|| result.bits_per_weight.to_string()));
    for task in tasks {
        let score = result.tasks.get(task);
        let of = |figure: fn(&TaskScore) -> Option<f64>| score.and_then(figure).map(|figure| figure.to_string());
        add(&format!("{task}.acc"), of(|score| Some(score.acc)));
        add(&format!("{task}.acc_stderr"), of(|score| score.acc_stderr));
        add(&format!("{task}.acc_norm"), of(|score| score.acc_norm));
        add(&format!("{task}.acc_norm_stderr"), of(|score| score.acc_norm_stderr));
        add(&format!("{task}.rows"), score.and_then(|score| count(score.rows as u64)));
    }
    for (name, summary) in [("kld", result.kld.as_ref()), ("kld_decode", result.kld_decode.as_ref().map(|found| &found.summary))] {
        let of = |figure: fn(&DivergenceSummary) -> f64| summary.map(|summary| figure(summary).to_string());
        add(&format!("{name}.mean"), of(|kld| kld.mean));
        let whole = summary.filter(|kld| kld.has_percentiles());
        add(&format!("{name}.median"), whole.map(|kld| kld.median.to_string()));
        add(&format!("{name}.p99"), of(|kld| kld.p99));
        add(&format!("{name}.max"), whole.map(|kld| kld.max.to_string()));
        add(&format!("{name}.top1"), of(|kld| kld.top1));
        add(&format!("{name}.rms_probability"), summary.and_then(|kld| kld.rms_probability).map(|rms| rms.to_string()));
        add(&format!("{name}.tokens"), summary.map(|kld| kld.tokens.to_string()));
    }
    add("perplexities.gptq", result.perplexities.and_then(|found| found.gptq).or(result.perplexity).map(|found| found.to_string()));
    add("perplexities.llama_cpp", result.perplexities.map(|found| found.llama_cpp.to_string()));
    add("speed.prefill_tokens_per_s", result.speed.map(|speed| speed.prefill_tokens_per_s.to_string()));
    add("speed.decode_tokens_per_s", result.speed.map(|speed| speed.decode_tokens_per_s.to_string()));
    add("memory.resident_weight_bytes", count(result.memory.resident_weight_bytes));
    add("memory.peak_bytes", count(result.memory.peak_bytes));
    add("memory.device_peak_bytes", result.memory.device_peak_bytes.map(|bytes| bytes.to_string()));
    add("provenance.tool", Some(result.provenance.tool.clone()));
    add("provenance.backend", Some(result.provenance.backend.clone()));
    add("provenance.processor", Some(result.provenance.processor.clone()));
    add("provenance.threads", count(result.provenance.threads as u64));
    add("provenance.text", Some(result.provenance.text.clone()));
    row
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::import;

    #[test]
    fn cells_are_numbers_and_columns_are_those_of_all_rows() {
        let file = r#"{"model_name": "org/m", "results": {"piqa": {"acc,none": 0.625, "acc_stderr,none": 0.0125}}}"#;
        let record = import::harness(file.as_bytes(), "r.json").unwrap();
        let mut other = record.clone();
        (other.result.weight_bytes, other.result.bits_per_weight) = (12_268_112, 8.1);
        other.result.tasks.insert("mmlu".into(), TaskScore::of("mmlu", &[1.0, 0.0], None));
        let csv = records(&[record, other]).csv();
        let cells: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
        let column = |head: &str| {
            let at = cells[0].iter().position(|cell| *cell == head).unwrap();
            [cells[1][at], cells[2][at]]
        };
        assert_eq!(column("weight_bytes"), ["", "12268112"]);
        assert_eq!((column("piqa.acc"), column("piqa.acc_stderr")), (["0.625"; 2], ["0.0125"; 2]));
        assert_eq!((column("mmlu.acc_stderr"), column("mmlu.rows")), (["", "0.5"], ["", "2"]));
        assert_eq!((column("bits_per_weight"), column("kld.mean")), (["", "8.1"], ["", ""]));
        assert!(cells.iter().all(|row| row.len() == cells[0].len()));
    }
}
