//! What an evaluation has scored so far, so that one that was cancelled or killed goes on where it stopped.
//!
//! One file for each model, backend and version of strata; a line for each batch, found again by the hash of its
//! tokens. Rows, tokenizer and limit need no key of their own: they decide the batches.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checkpoint::{TOOL, sha256_hex};
use crate::error::{Error, Result};

/// The scores of batches, on disk.
pub struct Journal {
    path: PathBuf,
    file: File,
    known: HashMap<String, Vec<f64>>,
}

#[derive(Serialize, Deserialize)]
struct Line {
    batch: String,
    scores: Vec<f64>,
}

impl Journal {
    /// The journal in `directory` of the model with hash `model` on `backend`; `fresh` begins it anew.
    pub fn open(directory: &Path, model: &str, backend: &str, fresh: bool) -> Result<Self> {
        let key = sha256_hex(format!("{model}\n{backend}\n{TOOL}").as_bytes());
        let path = directory.join(format!("{}.jsonl", &key[..16]));
        let failed = |error: &std::io::Error| Error::io("opening the journal", &path, error);
        fs::create_dir_all(directory).map_err(|error| failed(&error))?;
        let text = if fresh { Vec::new() } else { fs::read(&path).unwrap_or_default() };
        let mut file = OpenOptions::new().create(true).append(true).open(&path).map_err(|error| failed(&error))?;
        if fresh {
            file.set_len(0).map_err(|error| failed(&error))?;
        } else if text.last().is_some_and(|last| *last != b'\n') {
            // The last line was cut off when the evaluation was killed: end it, so that the next one stands alone.
            file.write_all(b"\n").map_err(|error| failed(&error))?;
        }
        let lines = text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice::<Line>(line).ok());
        let known = lines.map(|line| (line.batch, line.scores)).collect();
        Ok(Self { path, file, known })
    }

    /// The key of a batch of (input, continuation).
    pub fn key<'a>(batch: impl Iterator<Item = (&'a [u32], &'a [u32])>) -> String {
        let mut bytes = Vec::new();
        for tokens in batch.flat_map(|(input, continuation)| [input, continuation]) {
            bytes.extend((tokens.len() as u32).to_le_bytes());
            bytes.extend(tokens.iter().flat_map(|token| token.to_le_bytes()));
        }
        sha256_hex(&bytes)
    }

    /// The scores of a batch that was finished before.
    pub fn get(&self, key: &str, count: usize) -> Option<&[f64]> {
        self.known.get(key).map(Vec::as_slice).filter(|scores| scores.len() == count)
    }

    /// Adds the scores of a batch, in one write.
    pub fn put(&mut self, key: &str, scores: &[f64]) -> Result<()> {
        let line = serde_json::to_string(&Line { batch: key.to_owned(), scores: scores.to_vec() });
        let mut line = line.map_err(|error| Error::run(format!("scores cannot be written: {error}")))?;
        line.push('\n');
        self.file.write_all(line.as_bytes()).map_err(|error| Error::io("writing the journal", &self.path, &error))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finished_batches_are_found_again_and_a_torn_line_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let open = |model: &str, fresh| Journal::open(folder.path(), model, "cpu", fresh).unwrap();
        let key = Journal::key([(&[1, 2][..], &[3][..])].into_iter());
        assert_ne!(key, Journal::key([(&[1][..], &[2, 3][..])].into_iter()));
        let mut journal = open("a", false);
        journal.put(&key, &[-1.5, -0.25]).unwrap();
        journal.file.write_all(b"{\"batch\": \"torn").unwrap();
        let mut journal = open("a", false);
        assert_eq!(journal.get(&key, 2), Some(&[-1.5, -0.25][..]));
        assert_eq!((journal.get(&key, 3), journal.get("torn", 2)), (None, None));
        journal.put("next", &[0.5]).unwrap();
        assert_eq!(open("a", false).get("next", 1), Some(&[0.5][..]));
        assert_eq!(open("b", false).get(&key, 2), None);
        assert_eq!(open("a", true).get(&key, 2), None);
    }
}
