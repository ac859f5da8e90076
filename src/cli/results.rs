//! `strata results`.

use std::cell::Cell;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use serde_json::json;
use strata::engine::Event;
use strata::error::Result;
use strata::eval::ModelResult;
use strata::session::store::{Record, Store};
use strata::session::{figures, html, import, report};

use super::{Common, output};

#[derive(Args)]
pub struct Results {
    /// Only models whose name holds this.
    #[arg(long, value_name = "TEXT")]
    model: Option<String>,
    /// Only variants whose name holds this.
    #[arg(long, value_name = "TEXT")]
    variant: Option<String>,
    /// How to print them: csv has numbers alone, for other programs.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
    /// Write a page with tables and plots that needs no network.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Only records of sessions whose name holds this.
    #[arg(long, value_name = "TEXT")]
    session: Option<String>,
    /// Only records of this source: strata, lm-evaluation-harness or llama-perplexity.
    #[arg(long, value_name = "NAME")]
    source: Option<String>,
    /// Only records from this time on (UTC), such as 2026-03-01 or 2026-03-01T12:00:00Z.
    #[arg(long, value_name = "TIME")]
    since: Option<String>,
    /// Only the last records of those.
    #[arg(long, value_name = "COUNT")]
    last: Option<usize>,
    /// First take in a file of another program: results_*.json or samples_*.jsonl of lm-evaluation-harness, or what
    /// llama-perplexity printed. May be given several times.
    #[arg(long, value_name = "FILE")]
    import: Vec<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Csv,
    Markdown,
    Json,
}

impl Results {
    pub fn run(&self, common: &Common) -> Result<()> {
        let store = Store::user();
        let mut held = store.read()?;
        for path in &self.import {
            let record = import::read(path)?;
            if held.records.contains(&record) {
                eprintln!("{}: is there already", path.display());
                continue;
            }
            store.append(&record)?;
            held.records.push(record);
        }
        if held.unreadable > 0 {
            eprintln!("warning: {} lines of {} are damaged or newer than this program", held.unreadable, store.path().display());
        }
        let holds = |name: &str, part: &Option<String>| part.as_ref().is_none_or(|part| name.contains(part.as_str()));
        let mut records: Vec<Record> = held
            .records
            .into_iter()
            .filter(|record| holds(&record.result.model, &self.model) && holds(&record.result.variant, &self.variant))
            .filter(|record| holds(record.session.as_deref().unwrap_or(""), &self.session))
            .filter(|record| self.source.as_ref().is_none_or(|source| record.source == *source))
            // Times in this form sort as text.
            .filter(|record| self.since.as_ref().is_none_or(|since| record.time >= *since))
            .collect();
        records.drain(..records.len().saturating_sub(self.last.unwrap_or(usize::MAX)));
        if let Some(path) = &self.html {
            let results: Vec<ModelResult> = records.iter().map(|record| record.result.clone()).collect();
            let page = html::page("strata results", &[("Results", report::records(&records))], &results);
            strata::files::write_atomically(path, page.as_bytes())?;
        }
        let table = report::records(&records);
        match if common.json { Format::Json } else { self.format } {
            Format::Json => output::json(&json!({ "schema": "strata.records/1", "records": records })),
            Format::Csv => output::text(&figures::records(&records).csv()),
            Format::Markdown => output::text(&table.markdown()),
            Format::Table if records.is_empty() => output::line(&format!("no results in {}", store.path().display())),
            Format::Table => output::table(&table),
        }
    }
}

/// Puts what a command evaluates into the user's store as it comes.
pub struct Recorder {
    session: Option<String>,
    failed: Cell<bool>,
}

impl Recorder {
    /// For results of `session`, or of the command line.
    pub fn new(session: Option<String>) -> Self {
        Self { session, failed: Cell::new(false) }
    }

    /// Takes one event in. A store that cannot be written to is reported once and does not stop the evaluation.
    pub fn event(&self, event: &Event) {
        let Event::Evaluated { evaluated, .. } = event else { return };
        let record = Record::now(self.session.clone(), evaluated.result.clone());
        if let Err(error) = Store::user().append(&record)
            && !self.failed.replace(true)
        {
            eprintln!("warning: {error}: the results are not kept");
        }
    }
}
