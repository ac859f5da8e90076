//! What goes to stdout: one JSON document, or tables of text.

use serde::Serialize;
use strata::error::{Error, Result};
use strata::eval::run::Evaluated;
use strata::eval::{ModelResult, ResultSet};
use strata::session::report;

use super::Common;

/// Prints a JSON document.
pub fn json(document: &impl Serialize) -> Result<()> {
    let text =
        serde_json::to_string_pretty(document).map_err(|error| Error::run(format!("the result cannot be written as JSON: {error}")))?;
    line(&text)
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

/// Prints evaluated models in the form asked for.
pub fn results(evaluated: Vec<Evaluated>, common: &Common) -> Result<()> {
    let results: Vec<ModelResult> = evaluated.into_iter().map(|evaluated| evaluated.result).collect();
    if common.json {
        return json(&ResultSet::new(results));
    }
    for row in report::comparison(&results).lines() {
        line(&row)?;
    }
    if let Some(result) = results.first() {
        let evidence = &result.provenance;
        line("")?;
        line("accuracy in percent: acc_norm for arc_challenge and hellaswag, acc for the others; KLD in nats a token from the first row")?;
        line(&format!("{} on {} ({} threads); text: {}", evidence.backend, evidence.processor, evidence.threads, evidence.text))?;
    }
    Ok(())
}
