//! The result store: every evaluation on this machine, one JSON line a model, never rewritten.
//!
//! Several processes may append at once (see [`append_line`]). Start with [`Store`].

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::paths;
use crate::error::{Error, Result};
use crate::eval::ModelResult;
use crate::files::append_line;

/// Schema of [`Record`].
pub const RECORD_SCHEMA: &str = "strata.record/1";

/// One evaluated model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Record {
    pub schema: String,
    /// UTC, as in `2026-03-01T12:00:00Z`.
    pub time: String,
    /// What evaluated: `strata`, or the program whose results were imported.
    pub source: String,
    /// The session that was replayed.
    pub session: Option<String>,
    pub result: ModelResult,
}

impl Record {
    /// A result of this program, now.
    pub fn now(session: Option<String>, result: ModelResult) -> Self {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Self { schema: RECORD_SCHEMA.into(), time: utc(seconds), source: "strata".into(), session, result }
    }
}

/// What a store holds.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Records {
    /// Oldest first.
    pub records: Vec<Record>,
    /// Lines that are damaged or of a newer schema.
    pub unreadable: usize,
}

/// An append-only file of records.
#[derive(Debug, Clone)]
pub struct Store {
    path: PathBuf,
}

impl Store {
    /// The user's, `results.jsonl` in the data directory.
    pub fn user() -> Self {
        Self::at(paths::data_directory().join("results.jsonl"))
    }

    /// The one at `path`, which need not exist.
    pub fn at(path: PathBuf) -> Self {
        Self { path }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds a record.
    pub fn append(&self, record: &Record) -> Result<()> {
        let line = serde_json::to_string(record).map_err(|error| Error::run(format!("a result cannot be written: {error}")))?;
        append_line(&self.path, &line)
    }

    /// Every record that can be read.
    pub fn read(&self) -> Result<Records> {
        let bytes = match fs::read(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Records::default()),
            bytes => bytes.map_err(|error| Error::io("reading", &self.path, &error))?,
        };
        let mut records = Records::default();
        for line in bytes.split(|byte| *byte == b'\n').filter(|line| !line.trim_ascii().is_empty()) {
            match serde_json::from_slice::<Record>(line) {
                Ok(record) if record.schema == RECORD_SCHEMA => records.records.push(record),
                _ => records.unreadable += 1,
            }
        }
        Ok(records)
    }
}

/// Seconds since 1970 as a UTC time (days to dates as in Howard Hinnant's `civil_from_days`).
pub fn utc(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    // Months count from March, so that the leap day is the last of a year.
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, next) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = era * 400 + year_of_era + next;
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::session::import;

    fn record(index: usize) -> Record {
        let text = r#"{"model_name": "m", "results": {"piqa": {"acc,none": 0.5}}}"#;
        let mut record = import::harness(text.as_bytes(), "results.json").unwrap();
        record.result.variant = format!("v{index}");
        record
    }

    /// `date -u -d @N`.
    #[test]
    fn times_are_dates() {
        for (seconds, expected) in
            [(0, "1970-01-01T00:00:00Z"), (951_827_696, "2000-02-29T12:34:56Z"), (1_798_761_599, "2026-12-31T23:59:59Z")]
        {
            assert_eq!(utc(seconds), expected);
        }
    }

    #[test]
    fn several_writers_lose_nothing_and_damage_costs_one_line() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::at(folder.path().join("new").join("results.jsonl"));
        assert_eq!(store.read().unwrap(), Records::default());
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let store = store.clone();
                scope.spawn(move || (0..25).for_each(|i| store.append(&record(100 * writer + i)).unwrap()));
            }
        });
        let mut text = fs::read_to_string(store.path()).unwrap();
        text.push_str("{\"schema\": \"strata.record/2\"}\n{\"torn\n");
        fs::write(store.path(), text).unwrap();
        // The next line stands alone behind what a killed writer left.
        fs::write(store.path(), format!("{}{{\"half", fs::read_to_string(store.path()).unwrap())).unwrap();
        store.append(&record(999)).unwrap();
        let records = store.read().unwrap();
        assert_eq!((records.records.len(), records.unreadable), (101, 3));
        let mut names: Vec<String> = records.records.into_iter().map(|record| record.result.variant).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), 101);
    }
}
