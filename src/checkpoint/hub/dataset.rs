//! The files of one split of a dataset, found in the cache or brought there.
//!
//! Datasets name their files as they like; what is understood here is what the hub's own tools write: the split's name as
//! a word of the path (`winogrande_xl/validation-00000-of-00001.parquet`, `data/test.jsonl`), the configuration as a
//! folder or at the file's beginning. A dataset without such files has them on the branch that the hub converts
//! everything to (`refs/convert/parquet`).

use std::fs;
use std::path::{Path, PathBuf};

use hf_hub::RepoType;

use super::Hub;
use super::cache::Placement;
use crate::error::{Error, Result};
use crate::monitor::Monitor;

/// Where the hub keeps a Parquet form of every dataset.
const CONVERTED: &str = "refs/convert/parquet";

/// Kinds of files with rows, the preferred one first.
const EXTENSIONS: [&str; 4] = ["parquet", "jsonl", "ndjson", "json"];

/// One split of a dataset on the hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DatasetSplit {
    /// `owner/name`.
    pub id: &'static str,
    /// The configuration, where the dataset has several.
    pub config: Option<&'static str>,
    /// `test` or `validation`.
    pub split: &'static str,
}

/// The files of a split, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetFiles {
    pub files: Vec<PathBuf>,
    /// The commit that they are of.
    pub commit: String,
}

impl Hub {
    /// The files of `split` from the cache, or downloaded into it. What is whole in the cache is used without asking.
    pub fn fetch_dataset(&self, split: &DatasetSplit, monitor: &Monitor) -> Result<DatasetFiles> {
        monitor.check()?;
        let revisions = [None, Some(CONVERTED)];
        let places = revisions.map(|revision| Placement::new(self, RepoType::Dataset, split.id, revision, monitor));
        for place in &places {
            let place = place.as_ref().map_err(|error| Error::input(error.message.clone()))?;
            if let Some(found) = split.cached(place) {
                return Ok(found);
            }
        }
        for place in places {
            let place = place?;
            if self.offline {
                return Err(place.not_cached(&split.to_string()));
            }
            if let Some(found) = split.download(&place)? {
                return Ok(found);
            }
        }
        Err(Error::input(format!("{split} was not found at {}", self.endpoint))
            .hint("check HF_ENDPOINT, or give the rows as JSON lines with --data DIR"))
    }
}

impl DatasetSplit {
    /// Words of a path that mean this split.
    fn words(&self) -> &'static [&'static str] {
        if self.split == "test" { &["test", "testing"] } else { &["validation", "valid", "val", "dev"] }
    }

    /// Those of `files` that hold the split, of one kind and in order; empty when there are none.
    fn choose(&self, files: &[String]) -> Vec<String> {
        let of_config = |file: &str| {
            self.config.is_none_or(|config| {
                let name = file.rsplit('/').next().unwrap_or(file);
                let begins = name.strip_prefix(config).is_some_and(|rest| rest.starts_with(['-', '_', '.']));
                begins || file.split('/').rev().skip(1).any(|folder| folder == config)
            })
        };
        let of_split = |file: &str| {
            let lower = file.to_ascii_lowercase();
            let mut words = lower.split(|c: char| !c.is_ascii_alphanumeric());
            words.any(|word| self.words().contains(&word))
        };
        let mut found = Vec::new();
        for extension in EXTENSIONS {
            let kind = |file: &str| Path::new(file).extension().is_some_and(|own| own == extension);
            found = files.iter().filter(|file| kind(file) && of_config(file) && of_split(file)).cloned().collect();
            if !found.is_empty() {
                break;
            }
        }
        found.sort();
        found
    }

    fn cached(&self, place: &Placement) -> Option<DatasetFiles> {
        let commit = place.known_commit()?;
        let folder = place.snapshot(&commit);
        let mut files = Vec::new();
        list(&folder, "", &mut files);
        let chosen = self.choose(&files);
        let files = chosen.iter().map(|file| folder.join(file)).collect();
        (!chosen.is_empty() && whole(&chosen)).then_some(DatasetFiles { files, commit })
    }

    /// Brings the files into the cache; `None` when this revision has none of the split.
    fn download(&self, place: &Placement) -> Result<Option<DatasetFiles>> {
        // Splits fetched one after another are of one commit, also when the branch has moved in between.
        let known = place.known_commit().map_or(Ok(None), |commit| place.source.listing(&commit))?;
        let Some(listing) = known.map_or_else(|| place.source.listing(place.source.revision), |known| Ok(Some(known)))? else {
            return Ok(None);
        };
        let chosen = self.choose(&listing.files());
        if chosen.is_empty() {
            return Ok(None);
        }
        let commit = listing.commit;
        let entry = |file: &String| place.entry(&commit, file)?.ok_or_else(|| place.source.not_found(file));
        let entries = chosen.iter().map(entry).collect::<Result<Vec<_>>>()?;
        let folder = place.bring(&commit, &entries, true)?;
        Ok(Some(DatasetFiles { files: chosen.iter().map(|file| folder.join(file)).collect(), commit }))
    }
}

impl std::fmt::Display for DatasetSplit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let config = self.config.map_or_else(String::new, |config| format!(" {config}"));
        write!(f, "{}{config}, split {}", self.id, self.split)
    }
}

/// Paths of the files below `folder`, with `/` between their parts. What cannot be listed is not there.
fn list(folder: &Path, prefix: &str, found: &mut Vec<String>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let path = entry.path();
        if path.is_dir() {
            list(&path, &format!("{name}/"), found);
        } else if path.exists() {
            found.push(name);
        }
    }
}

/// Whether every part of a file in parts (`…-00001-of-00003.parquet`) is there.
fn whole(files: &[String]) -> bool {
    let parts = |file: &String| file.rsplit_once("-of-")?.1.split('.').next()?.parse::<usize>().ok();
    files.iter().filter_map(parts).all(|count| count == files.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_a_split_are_told_by_their_paths() {
        let split = |config, split| DatasetSplit { id: "o/d", config, split };
        let files = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
        let arc = files(&[
            "ARC-Challenge/test-00000-of-00001.parquet",
            "ARC-Easy/test-00001-of-00002.parquet",
            "ARC-Easy/test-00000-of-00002.parquet",
            "ARC-Easy/train-00000-of-00001.parquet",
            "README.md",
        ]);
        let chosen = split(Some("ARC-Easy"), "test").choose(&arc);
        assert_eq!(chosen, ["ARC-Easy/test-00000-of-00002.parquet", "ARC-Easy/test-00001-of-00002.parquet"]);
        assert!(whole(&chosen) && !whole(&chosen[..1]));
        for (config, names) in [
            (None, ["data/validation-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]),
            (None, ["piqa/valid.jsonl", "piqa/train.jsonl"]),
            (Some("winogrande_xl"), ["winogrande_xl/validation/0000.parquet", "winogrande_xs/validation/0000.parquet"]),
            (Some("winogrande_xl"), ["winogrande_xl-dev.jsonl", "winogrande_xl-train.jsonl"]),
        ] {
            assert_eq!(split(config, "validation").choose(&files(&names)), names[..1], "{names:?}");
        }
        assert!(split(None, "validation").choose(&files(&["evaluation/readme.md", "invalid.jsonl"])).is_empty());
    }
}
