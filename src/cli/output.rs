//! What goes to stdout: one JSON document, or tables of text.

use serde::Serialize;
use strata::error::{Error, Result};
use strata::eval::ResultSet;
use strata::session::{html, report};

use super::Common;

/// Prints a JSON document.
pub fn json(document: &impl Serialize) -> Result<()> {
    let text =
        serde_json::to_string_pretty(document).map_err(|error| Error::run(format!("the result cannot be written as JSON: {error}")))?;
    line(&text)
}

/// Prints text that ends with its own line break.
pub fn text(text: &str) -> Result<()> {
    line(text.trim_end_matches('\n'))
}

/// Prints lines; a reader that closed the pipe early is not an error.
pub fn line(text: &str) -> Result<()> {
    use std::io::Write;
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(Error::run(format!("writing to stdout failed: {error}"))),
        Ok(()) => Ok(()),
    }
}

/// Prints evaluated models in the form asked for; `flips` lists the rows that changed, too.
pub fn results(set: &ResultSet, flips: bool, common: &Common) -> Result<()> {
    if common.json {
        return json(set);
    }
    table(&report::comparison(&set.results))?;
    if let Some(result) = set.results.first() {
        let evidence = &result.provenance;
        line("")?;
        line("accuracy in percent ± standard error: acc_norm for arc_challenge and hellaswag, acc for the others")?;
        line("KLD in nats a token from the first row")?;
        line(&report::evidence(evidence))?;
    }
    if set.results.iter().any(|result| result.perplexities.is_some()) {
        line("")?;
        table(&report::divergence(&set.results))?;
        line("")?;
        line("ppl (gptq): every token of a window but its first; ppl (llama.cpp): the second half of each window, of its own windows")?;
        line("RMS dp: root mean square difference of the probability of the token that follows")?;
        if let Some(floor) = set.results.iter().find_map(|result| result.noise_floor.as_ref()) {
            line(&format!("rounded: from itself with {}; divergences near or below it say nothing about a variant", floor.rounding))?;
        }
    }
    if set.results.iter().any(|result| result.kld_decode.is_some()) {
        line("")?;
        table(&report::decoding(&set.results))?;
        line("")?;
        line("decoding: the text read one token a step from the variant's rounded caches, and the mean up to each position")?;
    }
    if set.results.iter().any(|result| result.speed_points.len() > 1) {
        line("")?;
        table(&report::speed(&set.results))?;
        line("")?;
        line(
            "per token: one decoding step of all sequences; SSM+conv, KV: bytes of one sequence's caches behind its last token, measured",
        )?;
    }
    line("")?;
    table(&report::memory(&set.results))?;
    line("")?;
    let alone = set.results.iter().all(|result| result.memory.peak_of_model);
    let peak = if alone { "while the model was there" } else { "with what was evaluated before" };
    line(&format!("weights: as the backend holds them; peak: of the process, {peak}; SSM, conv and KV: predicted, a sequence"))?;
    if !set.comparisons.is_empty() {
        line("")?;
        table(&report::paired(&set.comparisons))?;
        line("")?;
        line("lost: right to wrong; gained: wrong to right; difference in points with a bootstrap interval over paired rows")?;
        line("p: McNemar's test, exact binomial below 25 changed rows, chi-squared with continuity correction from there on")?;
    }
    if flips {
        line("")?;
        table(&report::flips(&set.comparisons))?;
    }
    Ok(())
}

/// The page of evaluated models: what [`results`] prints, with plots.
pub fn page(set: &ResultSet) -> String {
    let tables = [
        ("Models", report::comparison(&set.results)),
        ("Text: divergence and perplexity", report::divergence(&set.results)),
        ("Decoding from rounded caches", report::decoding(&set.results)),
        ("Speed", report::speed(&set.results)),
        ("Memory", report::memory(&set.results)),
        ("Row by row against the base", report::paired(&set.comparisons)),
        ("Rows that changed", report::flips(&set.comparisons)),
    ];
    let model = set.results.first().map_or("", |result| result.model.as_str());
    html::page(&format!("strata: {model}"), &tables, &set.results)
}

/// Prints a table.
pub fn table(table: &report::Table) -> Result<()> {
    table.lines().iter().try_for_each(|row| line(row))
}
