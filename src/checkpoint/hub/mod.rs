//! The Hugging Face hub: from an id such as `nvidia/Nemotron-H-8B-Base-8K` to a local directory, from a dataset and a
//! split to local files.
//!
//! Start with [`fetch`]; [`fetch_config`] brings `config.json` alone and [`looks_like_id`] tells an id from a path.
//! [`Hub`] holds what they read from the environment (`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN`, `HF_HUB_OFFLINE`).
//!
//! The cache is the one that Python's `huggingface_hub` and Rust's `hf-hub` share, so a model that one of them has
//! downloaded is found here. In `$HF_HOME/hub/models--owner--name`:
//! * a *blob* `blobs/<etag>` is a file's content; `<etag>.part` is one that is not whole yet, `<etag>.lock` guards it;
//! * a *snapshot* `snapshots/<commit>/` has a link to a blob for every file: this directory is the checkpoint;
//! * a *ref* `refs/<revision>` says which commit a branch or tag is;
//! * `.no_exist/<commit>/<file>` remembers that the commit has no such file.
//!
//! Paths and tokens come from `hf-hub`, the transfer does not. `hf-hub` 0.5 asks for the rest of a `.part` file, but
//! appends whatever comes back (an answer of 200 holds the whole file again), retries from byte 0 onto a part that has
//! bytes when a resumed request fails before its first byte, never compares the length or the hash of the result,
//! cannot get past a part that is already whole (416), and has no way to stop inside a file.

mod cache;
mod dataset;
mod model;
mod transfer;

use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::RepoType;

use self::cache::Placement;
pub use self::dataset::{DatasetFiles, DatasetSplit};
use self::model::Want;
use crate::error::{Error, Result};
use crate::monitor::Monitor;

/// Downloads (or finds in the cache) a checkpoint and returns its snapshot directory.
///
/// That is `config.json`, the safetensors shards (`model.safetensors`, or those that `model.safetensors.index.json`
/// names) and, where the model has them, `tokenizer.json`, `tokenizer_config.json`, `generation_config.json` and
/// `special_tokens_map.json` of `id` (`owner/name`) at `revision` (branch, tag or commit; default `main`).
/// A snapshot that is whole in the cache is used without asking the network.
pub fn fetch(id: &str, revision: Option<&str>, monitor: &Monitor) -> Result<PathBuf> {
    Hub::from_env()?.fetch(id, revision, monitor)
}

/// Like [`fetch`] for `config.json` alone; returns the snapshot directory, which may hold nothing else.
pub fn fetch_config(id: &str, revision: Option<&str>, monitor: &Monitor) -> Result<PathBuf> {
    Hub::from_env()?.fetch_config(id, revision, monitor)
}

/// Whether `text` looks like a hub id: `owner/name`, each of `[A-Za-z0-9._-]` without `.` or `-` at its ends
/// (so `./model` and `../model` are paths), and nothing on disk has that path.
pub fn looks_like_id(text: &str) -> bool {
    is_id(text) && !Path::new(text).exists()
}

fn is_id(text: &str) -> bool {
    let part = |part: &str| is_file_name(part) && !part.starts_with(['.', '-']) && !part.ends_with(['.', '-']);
    text.split_once('/').is_some_and(|(owner, name)| part(owner) && part(name))
}

/// Whether `text` is safe as one component of a path in the cache.
fn is_file_name(text: &str) -> bool {
    !text.is_empty() && !text.starts_with('.') && text.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b))
}

/// Whether `text` is a relative path that stays below the directory it is joined to, on every system.
fn is_inner_path(text: &str) -> bool {
    let bad = |c: char| c.is_control() || c == '\\' || c == ':';
    !text.contains(bad) && text.split('/').all(|part| !matches!(part, "" | "." | ".."))
}

/// Whether `text` is a full commit hash.
fn is_commit(text: &str) -> bool {
    text.len() == 40 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// Where the hub is, where its cache is, and how to ask.
#[derive(Clone)]
pub struct Hub {
    /// Address of the hub, `https://huggingface.co` or a mirror's.
    pub endpoint: String,
    /// The folder that holds `hub/` (the cache) and `token`.
    pub home: PathBuf,
    /// Access token; without one the file `token` in `home` is read.
    pub token: Option<String>,
    /// Never touch the network.
    pub offline: bool,
    /// Wait before the second attempt at a request; every further wait is twice as long.
    pub retry_wait: Duration,
}

impl Hub {
    /// Reads `HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE`. The only place that does.
    pub fn from_env() -> Result<Self> {
        let read = |name: &str| std::env::var(name).ok().map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let home = match read("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => std::env::home_dir()
                .ok_or_else(|| Error::input("no home directory is known for the download cache").hint("set HF_HOME to a folder"))?
                .join(".cache/huggingface"),
        };
        let offline = read("HF_HUB_OFFLINE").is_some_and(|v| matches!(v.to_ascii_lowercase().as_str(), "1" | "on" | "yes" | "true"));
        Ok(Self {
            endpoint: read("HF_ENDPOINT").unwrap_or_else(|| "https://huggingface.co".into()),
            home,
            token: read("HF_TOKEN"),
            offline,
            retry_wait: Duration::from_millis(500),
        })
    }

    /// [`fetch`] with these settings.
    pub fn fetch(&self, id: &str, revision: Option<&str>, monitor: &Monitor) -> Result<PathBuf> {
        Placement::new(self, RepoType::Model, id, revision, monitor)?.checkpoint(Want::Checkpoint)
    }

    /// [`fetch_config`] with these settings.
    pub fn fetch_config(&self, id: &str, revision: Option<&str>, monitor: &Monitor) -> Result<PathBuf> {
        Placement::new(self, RepoType::Model, id, revision, monitor)?.checkpoint(Want::Config)
    }
}
