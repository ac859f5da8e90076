//! The files that make a checkpoint, found in the cache or brought there.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::cache::Placement;
use super::{is_commit, is_file_name, is_inner_path};
use crate::error::{Error, ErrorKind, Result};

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Files that a checkpoint may lack.
const OPTIONAL: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"];

/// Which files are asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Want {
    Config,
    Checkpoint,
}

/// What the cache holds of a revision.
struct Cached {
    /// Snapshot directory and its commit, when `config.json` is there.
    snapshot: Option<(PathBuf, String)>,
    /// The first file that a checkpoint needs and the cache lacks.
    missing: Option<String>,
    /// Optional files that are neither there nor known to be absent from the commit.
    unknown: Vec<&'static str>,
}

impl Placement<'_> {
    /// The snapshot directory with what `want` names.
    pub fn checkpoint(&self, want: Want) -> Result<PathBuf> {
        self.monitor.check()?;
        // A cache that cannot be read as a checkpoint (a damaged index) is asked for anew, if that is possible.
        let cached = match self.cached(want) {
            Err(error) if self.source.hub.offline => return Err(error),
            found => found.unwrap_or(Cached { snapshot: None, missing: Some(CONFIG.into()), unknown: Vec::new() }),
        };
        match (cached.snapshot, cached.missing) {
            (Some((dir, commit)), None) => {
                if cached.unknown.is_empty() || self.source.hub.offline {
                    return Ok(dir);
                }
                // The weights are here, so stay with their commit and only look for what else it has.
                match self.download(want, &commit) {
                    Err(error) if error.kind != ErrorKind::Cancelled => {
                        let lacking = cached.unknown.join(", ");
                        self.monitor.warn(format!("{error}; using {} as it is, without {lacking}", dir.display()));
                        Ok(dir)
                    }
                    done => done,
                }
            }
            (_, missing) if self.source.hub.offline => Err(self.not_cached(missing.as_deref().unwrap_or(CONFIG))),
            _ => self.download(want, self.source.revision),
        }
    }

    fn cached(&self, want: Want) -> Result<Cached> {
        let by_commit =
            || Some(self.snapshot(self.source.revision).join(CONFIG)).filter(|path| is_commit(self.source.revision) && path.exists());
        let config = by_commit().or_else(|| self.cache.repo(self.repo.clone()).get(CONFIG));
        let snapshot = config.as_deref().and_then(Path::parent).and_then(|dir| {
            let commit = dir.file_name()?.to_str().filter(|name| is_file_name(name))?;
            Some((dir.to_path_buf(), commit.to_owned()))
        });
        let Some((dir, commit)) = snapshot else {
            return Ok(Cached { snapshot: None, missing: Some(CONFIG.into()), unknown: Vec::new() });
        };
        let mut missing = None;
        let mut unknown = Vec::new();
        if want == Want::Checkpoint {
            if !dir.join(SINGLE).exists() {
                let index = dir.join(INDEX);
                let needed = if index.exists() { shards(&index)? } else { BTreeSet::from([SINGLE.to_owned()]) };
                missing = needed.into_iter().find(|file| !dir.join(file).exists());
            }
            unknown.extend(OPTIONAL.into_iter().filter(|file| !dir.join(file).exists() && !self.absent_marker(&commit, file).exists()));
        }
        Ok(Cached { snapshot: Some((dir, commit)), missing, unknown })
    }

    /// Brings what `want` names, at `revision`, into the cache; returns the snapshot directory.
    fn download(&self, want: Want, revision: &str) -> Result<PathBuf> {
        // All further requests name the commit of the first answer: a branch may move while shards are on their way.
        let config = self.entry(revision, CONFIG)?.ok_or_else(|| self.source.not_found(CONFIG))?;
        let commit = config.remote.as_ref().map_or_else(|| revision.to_owned(), |remote| remote.commit.clone());
        let mut entries = vec![config];
        if want == Want::Checkpoint {
            for file in OPTIONAL {
                match self.entry(&commit, file)? {
                    Some(entry) => entries.push(entry),
                    None => self.mark_absent(&commit, file),
                }
            }
            if let Some(entry) = self.entry(&commit, SINGLE)? {
                entries.push(entry);
            } else {
                let index = self.entry(&commit, INDEX)?.ok_or_else(|| {
                    Error::input(format!("{} has neither {SINGLE} nor {INDEX}", self.name()))
                        .hint("only safetensors checkpoints can be read; look for a converted copy of the model")
                })?;
                self.place(&commit, &index, &|_| self.monitor.check())?;
                entries.push(index);
                for shard in shards(&self.snapshot(&commit).join(INDEX))? {
                    entries.push(self.entry(&commit, &shard)?.ok_or_else(|| self.source.not_found(&shard))?);
                }
            }
        }

        let known = self.cache.repo(self.repo.clone()).get(CONFIG).is_some();
        self.bring(&commit, &entries, known)
    }
}

/// The shard files that an index names, each checked to stay inside the snapshot.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let text = fs::read(index).map_err(|e| Error::io("reading", index, &e))?;
    let Index { weight_map } = serde_json::from_slice(&text).map_err(|e| {
        Error::input(format!("{} is not a safetensors index: {e}", index.display())).hint("the model's files are damaged at their source")
    })?;
    let files: BTreeSet<String> = weight_map.into_values().collect();
    if let Some(bad) = files.iter().find(|file| !is_inner_path(file) || !file.ends_with(".safetensors")) {
        return Err(Error::input(format!("{} names the shard {bad:?}, which is not a safetensors file inside the model", index.display()))
            .hint("do not use this model: its index points outside of its own files"));
    }
    if files.is_empty() {
        return Err(Error::input(format!("{} names no shards", index.display())));
    }
    Ok(files)
}
