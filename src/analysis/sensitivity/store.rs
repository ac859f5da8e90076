//! Measurements on disk: a folder by identity, a line a measurement, so that a run that was killed goes on where it
//! stopped and one on another checkpoint or text begins for itself.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Check, Identity, Request};
use crate::error::{Error, Result};
use crate::files;
use crate::format::Format;

const IDENTITY: &str = "identity.json";
const ROWS: &str = "rows.jsonl";

/// Where donors are kept.
pub fn donors_directory(store: &Path) -> PathBuf {
    store.join("donors")
}

fn measurements_directory(store: &Path) -> PathBuf {
    store.join("sensitivity")
}

/// A line.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "row", rename_all = "lowercase")]
enum Row {
    /// A unit's output error.
    Screen { unit: String, format: Format, output_error: f64 },
    /// A unit's loss end to end.
    Loss { unit: String, format: Format, kld: f64, stderr: f64 },
    /// What embedding and head lose.
    Ends { kld: f64, stderr: f64 },
    /// A plan, predicted and measured.
    Check(Box<Check>),
    /// All that was asked for with these formats is in the lines before.
    Done { formats: Vec<Format> },
    /// More was asked for with them since.
    Begun { formats: Vec<Format> },
}

/// The identity and the model's name, for those who look for measurements of the same model.
#[derive(Debug, Serialize, Deserialize)]
struct Named {
    model: String,
    identity: Identity,
}

/// What has been measured under one identity.
#[derive(Default)]
pub(super) struct Rows {
    pub screened: HashMap<(String, Format), f64>,
    /// Mean and standard error.
    pub losses: HashMap<(String, Format), (f64, f64)>,
    pub ends: Option<(f64, f64)>,
    pub checks: Vec<Check>,
    /// Formats whose measurement came to its end.
    pub done: BTreeSet<Format>,
}

impl Rows {
    /// Reads the lines in `directory`. One that was cut off by a kill is left out, and measured again.
    pub fn read(directory: &Path) -> Result<Self> {
        let path = directory.join(ROWS);
        let text = fs::read(&path).map_err(|error| Error::io("reading", &path, &error))?;
        let mut rows = Self::default();
        text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).for_each(|row| rows.keep(row));
        Ok(rows)
    }

    fn keep(&mut self, row: Row) {
        match row {
            Row::Done { formats } => self.done.extend(formats),
            Row::Begun { formats } => self.done.retain(|format| !formats.contains(format)),
            Row::Screen { unit, format, output_error } => drop(self.screened.insert((unit, format), output_error)),
            Row::Loss { unit, format, kld, stderr } => drop(self.losses.insert((unit, format), (kld, stderr))),
            Row::Ends { kld, stderr } => self.ends = Some((kld, stderr)),
            Row::Check(check) => {
                self.checks.retain(|known| known.plan != check.plan);
                self.checks.push(*check);
            }
        }
    }
}

/// Measurements being made.
pub(super) struct Store {
    pub rows: Rows,
    file: File,
    path: PathBuf,
    /// Held as long as the store is open.
    _lock: File,
}

impl Store {
    /// Opens (or begins) the measurements of `identity`; `fresh` forgets what is there.
    pub fn open(request: &Request<'_>, identity: &Identity, fresh: bool) -> Result<Self> {
        let directory = measurements_directory(&request.store).join(&identity.key()?[..16]);
        let lock = crate::quant::lock(&directory, "wait for it: what it measures is what you asked for")?;
        let named = Named { model: request.checkpoint.name.clone(), identity: identity.clone() };
        let text = serde_json::to_vec_pretty(&named).map_err(|error| Error::run(format!("an identity cannot be written: {error}")))?;
        files::write_atomically(&directory.join(IDENTITY), &text)?;
        let path = directory.join(ROWS);
        let mut file = OpenOptions::new().create(true).append(true).open(&path).map_err(|error| Error::io("opening", &path, &error))?;
        if fresh {
            file.set_len(0).map_err(|error| Error::io("emptying", &path, &error))?;
        }
        // A line that was cut off by a kill is ended here, so that the next one stands alone; empty lines mean nothing.
        file.write_all(b"\n").map_err(|error| Error::io("writing", &path, &error))?;
        Ok(Self { rows: Rows::read(&directory)?, file, path, _lock: lock })
    }

    fn add(&mut self, row: Row) -> Result<()> {
        let mut line = serde_json::to_vec(&row).map_err(|error| Error::run(format!("a measurement cannot be written: {error}")))?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|error| Error::io("writing", &self.path, &error))?;
        self.rows.keep(row);
        Ok(())
    }

    pub fn add_screened(&mut self, unit: &str, format: Format, output_error: f64) -> Result<()> {
        self.add(Row::Screen { unit: unit.into(), format, output_error })
    }

    pub fn add_loss(&mut self, unit: &str, format: Format, (kld, stderr): (f64, f64)) -> Result<()> {
        self.add(Row::Loss { unit: unit.into(), format, kld, stderr })
    }

    pub fn add_ends(&mut self, (kld, stderr): (f64, f64)) -> Result<()> {
        self.add(Row::Ends { kld, stderr })
    }

    pub fn add_check(&mut self, check: Check) -> Result<()> {
        self.add(Row::Check(Box::new(check)))
    }

    /// Says that more is to be measured with `formats`, if it was said that nothing is.
    pub fn begin(&mut self, formats: &[Format]) -> Result<()> {
        let ended = formats.iter().any(|format| self.rows.done.contains(format));
        if ended { self.add(Row::Begun { formats: formats.to_vec() }) } else { Ok(()) }
    }

    /// Says that nothing is left to be measured with `formats`.
    pub fn end(&mut self, formats: &[Format]) -> Result<()> {
        let known = formats.iter().all(|format| self.rows.done.contains(format));
        if known { Ok(()) } else { self.add(Row::Done { formats: formats.to_vec() }) }
    }
}

/// The folder with the measurements of `identity`, or an error that says what was measured instead.
pub(super) fn folder(store: &Path, identity: &Identity, model: &str) -> Result<PathBuf> {
    let directory = measurements_directory(store).join(&identity.key()?[..16]);
    if directory.join(ROWS).exists() {
        return Ok(directory);
    }
    let message = changes(store, identity, model).unwrap_or_else(|| format!("{model} has no measured sensitivities"));
    Err(Error::input(message).hint("measure them with `strata sensitivity`, with the same model, recipe and calibration"))
}

/// Why what was measured of the model does not serve for `identity`; `None` where nothing else was measured of it.
pub(super) fn changes(store: &Path, identity: &Identity, model: &str) -> Option<String> {
    let others = others(&measurements_directory(store));
    let related = others.iter().filter(|other| other.identity.source == identity.source || other.model == model);
    let mut reasons: Vec<&str> = related.filter_map(|other| difference(&other.identity, identity)).collect();
    reasons.sort_unstable();
    reasons.dedup();
    let found = format!("the sensitivities of {model} that there are do not hold here: {}", reasons.join("; "));
    (!reasons.is_empty()).then_some(found)
}

/// Whether anything was measured of a model of this name.
pub(super) fn knows(store: &Path, model: &str) -> bool {
    others(&measurements_directory(store)).iter().any(|other| other.model == model)
}

/// Formats of embedding and head that measurements were made with which differ from `identity` in nothing else.
pub(super) fn other_ends(store: &Path, identity: &Identity) -> Vec<(Format, Format)> {
    let ends = |other: Named| {
        let Identity { embedding, head, .. } = other.identity;
        let same = Identity { embedding: identity.embedding, head: identity.head, ..other.identity } == *identity;
        (same && (embedding, head) != (identity.embedding, identity.head)).then_some((embedding, head))
    };
    others(&measurements_directory(store)).into_iter().filter_map(ends).collect()
}

/// Every readable identity.
fn others(directory: &Path) -> Vec<Named> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| serde_json::from_slice(&fs::read(entry.path().join(IDENTITY)).ok()?).ok()).collect()
}

/// The first thing in which measurements differ from what is asked for.
fn difference(known: &Identity, asked: &Identity) -> Option<&'static str> {
    let same_model = known.source == asked.source;
    [
        (same_model, "the checkpoint has changed since they were measured"),
        (known.tool == asked.tool, "another version of strata measured them, whose quantizer stores other bytes"),
        (
            known.method == asked.method && known.transforms == asked.transforms,
            "they were measured for a recipe of other transforms or rounding",
        ),
        (known.internals == asked.internals, "they were measured for a recipe of other SSM internals"),
        (known.calibration == asked.calibration, "they were measured with another calibration text, sample or seed"),
        (known.measured == asked.measured && known.positions == asked.positions, "they were measured on other tokens"),
        (known.embedding == asked.embedding && known.head == asked.head, "they were measured with other formats of embedding and head"),
        (known.by == asked.by, "they were measured for other units (--by)"),
    ]
    .into_iter()
    .find(|(same, _)| !same)
    .map(|(_, what)| what)
}
