//! Checkpoints on the Hugging Face hub: from an id such as `nvidia/Nemotron-H-8B-Base-8K` to a local directory.
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

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Agent, Body};

use crate::error::{Error, ErrorKind, Result};
use crate::monitor::Monitor;

const CONFIG: &str = "config.json";
const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Files that a checkpoint may lack.
const OPTIONAL: [&str; 4] = ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json"];

/// Requests for one thing before giving up; a transfer that got further starts counting again.
const ATTEMPTS: u32 = 5;
/// Redirects followed for one request.
const HOPS: usize = 10;
/// Connecting to a machine that does not answer ends after this time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(8);
/// A connection on which nothing arrives for this time counts as lost.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);
/// How often waiting loops look at the monitor.
const POLL: Duration = Duration::from_millis(50);
/// Time between two progress notes inside a file.
const NOTE_EVERY: Duration = Duration::from_millis(250);
/// Bytes read at a time, from the network and from disk.
const CHUNK: usize = 1 << 17;

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

/// Which files are asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Want {
    Config,
    Checkpoint,
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
        Fetch::new(self, id, revision, monitor)?.run(Want::Checkpoint)
    }

    /// [`fetch_config`] with these settings.
    pub fn fetch_config(&self, id: &str, revision: Option<&str>, monitor: &Monitor) -> Result<PathBuf> {
        Fetch::new(self, id, revision, monitor)?.run(Want::Config)
    }
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

/// What the hub says about a file.
struct Remote {
    commit: String,
    etag: String,
    size: u64,
}

/// A file of the checkpoint: its size, and where to get it unless the snapshot has it.
struct Entry {
    file: String,
    size: u64,
    remote: Option<Remote>,
}

/// Why one request did not do its work.
enum Trouble {
    /// Asking again would not help.
    Fatal(Error),
    /// No connection could be made.
    Unreachable(String),
    /// The connection broke, stalled, or the server was busy.
    Passing(String),
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Fatal(error)
    }
}

impl From<ureq::Error> for Trouble {
    fn from(error: ureq::Error) -> Self {
        use io::ErrorKind as Io;
        use ureq::{Error as Http, Timeout};
        let text = error.to_string();
        match error {
            Http::Io(e)
                if matches!(e.kind(), Io::ConnectionReset | Io::ConnectionAborted | Io::UnexpectedEof | Io::BrokenPipe | Io::TimedOut) =>
            {
                Self::Passing(text)
            }
            Http::Timeout(Timeout::Connect | Timeout::Resolve) => Self::Unreachable(text),
            Http::Timeout(_) | Http::Protocol(_) | Http::BodyStalled => Self::Passing(text),
            _ => Self::Unreachable(text),
        }
    }
}

/// One call of [`Hub::fetch`].
struct Fetch<'a> {
    hub: &'a Hub,
    endpoint: &'a str,
    id: &'a str,
    revision: &'a str,
    cache: Cache,
    repo: Repo,
    token: Option<String>,
    agent: Agent,
    monitor: &'a Monitor<'a>,
}

impl<'a> Fetch<'a> {
    fn new(hub: &'a Hub, id: &'a str, revision: Option<&'a str>, monitor: &'a Monitor<'a>) -> Result<Self> {
        if !is_id(id) {
            return Err(Error::input(format!("{id:?} is not a hub id")).hint("write owner/name, or the path of a local directory"));
        }
        let revision = revision.unwrap_or("main");
        if !is_inner_path(revision) {
            return Err(Error::input(format!("{revision:?} is not a revision")).hint("name a branch, a tag or a commit of the model"));
        }
        let endpoint = hub.endpoint.trim_end_matches('/');
        let host = endpoint.strip_prefix("http://").or_else(|| endpoint.strip_prefix("https://")).unwrap_or_default();
        if host.is_empty() {
            return Err(Error::input(format!("the hub address {endpoint:?} is not an http or https address"))
                .hint("set HF_ENDPOINT to one such as https://huggingface.co, or unset it"));
        }
        let mut agent = Agent::config_builder()
            .user_agent(concat!("strata/", env!("CARGO_PKG_VERSION")))
            // A compressed body would have other byte positions than the file.
            .accept_encoding("identity")
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .timeout_resolve(Some(CONNECT_TIMEOUT))
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(STALL_TIMEOUT))
            .timeout_per_read(Some(STALL_TIMEOUT));
        // A proxy could not reach a hub that runs on this machine.
        if ["127.", "localhost", "[::1]"].iter().any(|local| host.starts_with(local)) {
            agent = agent.proxy(None);
        }
        let cache = Cache::new(hub.home.join("hub"));
        Ok(Self {
            hub,
            endpoint,
            id,
            revision,
            repo: Repo::with_revision(id.into(), RepoType::Model, revision.into()),
            token: hub.token.clone().or_else(|| cache.token()),
            cache,
            agent: agent.build().into(),
            monitor,
        })
    }

    fn run(&self, want: Want) -> Result<PathBuf> {
        self.monitor.check()?;
        // A cache that cannot be read as a checkpoint (a damaged index) is asked for anew, if that is possible.
        let cached = match self.cached(want) {
            Err(error) if self.hub.offline => return Err(error),
            found => found.unwrap_or(Cached { snapshot: None, missing: Some(CONFIG.into()), unknown: Vec::new() }),
        };
        match (cached.snapshot, cached.missing) {
            (Some((dir, commit)), None) => {
                if cached.unknown.is_empty() || self.hub.offline {
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
            (_, missing) if self.hub.offline => {
                let (file, name, cache) = (missing.as_deref().unwrap_or(CONFIG), self.name(), self.cache.path().display());
                Err(Error::input(format!("{file} of {name} is not in the cache {cache} and HF_HUB_OFFLINE forbids the network"))
                    .hint("unset HF_HUB_OFFLINE to download it, set HF_HOME to the cache that has it, or name a local directory"))
            }
            _ => self.download(want, self.revision),
        }
    }

    /// `owner/name (revision)` for messages.
    fn name(&self) -> String {
        format!("{} (revision {})", self.id, self.revision)
    }

    // The cache.

    fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.repo(self.repo.clone()).pointer_path(commit)
    }

    /// The marker that says that `commit` has no such file.
    fn absent_marker(&self, commit: &str, file: &str) -> PathBuf {
        self.cache.path().join(self.repo.folder_name()).join(".no_exist").join(commit).join(file)
    }

    fn cached(&self, want: Want) -> Result<Cached> {
        let by_commit = || Some(self.snapshot(self.revision).join(CONFIG)).filter(|path| is_commit(self.revision) && path.exists());
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

    /// Remembers that `commit` has no `file`. Losing the marker costs a request, so failing is no error.
    fn mark_absent(&self, commit: &str, file: &str) {
        let marker = self.absent_marker(commit, file);
        if let Some(dir) = marker.parent() {
            let _ = fs::create_dir_all(dir).and_then(|()| fs::write(&marker, b""));
        }
    }

    /// Makes the revision mean `commit` in the cache.
    fn write_ref(&self, commit: &str) -> Result<()> {
        if self.revision == commit {
            return Ok(());
        }
        self.cache.repo(self.repo.clone()).create_ref(commit).map_err(|e| Error::io("writing a ref in", self.cache.path(), &e))
    }

    /// Links `file` of the snapshot to `blob`.
    fn link(&self, commit: &str, file: &str, blob: &Path) -> Result<()> {
        let pointer = self.snapshot(commit).join(file);
        let fail = |e: &io::Error| Error::io("linking", &pointer, e);
        if let Some(dir) = pointer.parent() {
            fs::create_dir_all(dir).map_err(|e| fail(&e))?;
        }
        // A link to a blob that was deleted is in the way.
        if !pointer.exists() && pointer.is_symlink() {
            fs::remove_file(&pointer).map_err(|e| fail(&e))?;
        }
        #[cfg(unix)]
        {
            let up = "../".repeat(2 + file.matches('/').count());
            let name = blob.file_name().unwrap_or_default();
            let linked = std::os::unix::fs::symlink(Path::new(&up).join("blobs").join(name), &pointer);
            if linked.is_ok() || pointer.exists() {
                return Ok(());
            }
        }
        // File systems without symbolic links: the snapshot holds the file itself, as hf-hub and Python do it.
        fs::rename(blob, &pointer).map_err(|e| fail(&e))
    }

    // What to get.

    /// Brings what `want` names, at `revision`, into the cache; returns the snapshot directory.
    fn download(&self, want: Want, revision: &str) -> Result<PathBuf> {
        // All further requests name the commit of the first answer: a branch may move while shards are on their way.
        let config = self.entry(revision, CONFIG)?.ok_or_else(|| self.not_found(CONFIG))?;
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
                    entries.push(self.entry(&commit, &shard)?.ok_or_else(|| self.not_found(&shard))?);
                }
            }
        }

        let total: u64 = entries.iter().map(|entry| entry.size).sum();
        self.monitor.stage("download", entries.len());
        self.monitor.log(format!("{}: {} files, {}, into {}", self.name(), entries.len(), bytes(total), self.snapshot(&commit).display()));
        let known = self.cache.repo(self.repo.clone()).get(CONFIG).is_some();
        for (done, entry) in entries.iter().enumerate() {
            self.monitor.check()?;
            let size = bytes(entry.size);
            self.place(&commit, entry, &|have| self.monitor.step(done, format!("{}: {} of {size}", entry.file, bytes(have))))?;
            // A first download shows in the cache from its first file on. One that brings a newer commit does so when it
            // is whole: until then the older one stays usable offline.
            if done == 0 && !known {
                self.write_ref(&commit)?;
            }
            self.monitor.step(done + 1, format!("{}: {size}", entry.file))?;
        }
        self.write_ref(&commit)?;
        Ok(self.snapshot(&commit))
    }

    /// A file as the snapshot has it, else as the hub describes it; `None` when the hub has no such file.
    fn entry(&self, revision: &str, file: &str) -> Result<Option<Entry>> {
        if is_commit(revision)
            && let Ok(metadata) = fs::metadata(self.snapshot(revision).join(file))
        {
            return Ok(Some(Entry { file: file.into(), size: metadata.len(), remote: None }));
        }
        let remote = self.head(revision, file)?;
        Ok(remote.map(|remote| Entry { file: file.into(), size: remote.size, remote: Some(remote) }))
    }

    /// Brings `entry` into the snapshot, unless it is there. `report` gets the bytes so far and may cancel.
    fn place(&self, commit: &str, entry: &Entry, report: &dyn Fn(u64) -> Result<()>) -> Result<()> {
        let Some(remote) = &entry.remote else { return Ok(()) };
        if self.snapshot(commit).join(&entry.file).exists() {
            return Ok(());
        }
        let blob = self.cache.repo(self.repo.clone()).blob_path(&remote.etag);
        // A blob of another size than its etag's is what a crash of the machine left.
        let whole = || fs::metadata(&blob).is_ok_and(|metadata| metadata.len() == remote.size);
        if !whole() {
            if let Some(dir) = blob.parent() {
                fs::create_dir_all(dir).map_err(|e| Error::io("creating", dir, &e))?;
            }
            let _guard = self.lock(&blob.with_extension("lock"), &entry.file)?;
            // Another process may have finished it while this one waited.
            if !whole() {
                let part = blob.with_extension("part");
                self.transfer(commit, &entry.file, remote, &part, report)?;
                fs::rename(&part, &blob).map_err(|e| Error::io("renaming", &part, &e))?;
            }
        }
        self.link(commit, &entry.file, &blob)
    }

    /// Waits until no other process downloads the blob. The lock ends with the returned file.
    fn lock(&self, path: &Path, file: &str) -> Result<File> {
        let lock = OpenOptions::new().create(true).write(true).truncate(false).open(path).map_err(|e| Error::io("opening", path, &e))?;
        let mut told = false;
        while let Err(TryLockError::WouldBlock) = lock.try_lock() {
            if !told {
                self.monitor.log(format!("waiting for another process that downloads {file}"));
                told = true;
            }
            self.sleep(Duration::from_millis(200))?;
        }
        // Any other error is a file system without locks, where one process at a time is up to the user.
        Ok(lock)
    }

    /// Fills `part` until it holds the whole file and, where the etag is a SHA-256, the right one.
    fn transfer(&self, commit: &str, file: &str, remote: &Remote, part: &Path, report: &dyn Fn(u64) -> Result<()>) -> Result<()> {
        let fail = |e: &io::Error| Error::io("writing", part, e);
        let mut out = OpenOptions::new()
            .create(true)
            .read(true)
            .write(true)
            .truncate(false)
            .open(part)
            .map_err(|e| Error::io("opening", part, &e))?;
        let mut have = out.metadata().map_err(|e| fail(&e))?.len();
        if have > remote.size {
            out.set_len(0).map_err(|e| fail(&e))?;
            have = 0;
        }
        let (mut furthest, mut failures, mut again) = (have, 0, false);
        loop {
            while have < remote.size {
                let cause = match self.receive(commit, file, remote, &mut out, &mut have, report) {
                    Ok(()) => continue,
                    Err(Trouble::Fatal(error)) => return Err(error),
                    Err(Trouble::Unreachable(cause) | Trouble::Passing(cause)) => cause,
                };
                failures = if have > furthest { 1 } else { failures + 1 };
                furthest = furthest.max(have);
                if failures >= ATTEMPTS {
                    let (have, size) = (bytes(have), bytes(remote.size));
                    return Err(Error::run(format!("the download of {file} of {} stopped at {have} of {size}: {cause}", self.name()))
                        .hint("run the same command again: it resumes where it stopped"));
                }
                self.monitor.log(format!("{file}: {cause}; trying again from {}", bytes(have)));
                self.sleep(self.hub.retry_wait * 2_u32.pow(failures - 1))?;
            }
            if self.matches(&mut out, remote).map_err(|e| Error::io("reading", part, &e))?? {
                return out.sync_all().map_err(|e| fail(&e));
            }
            out.set_len(0).map_err(|e| fail(&e))?;
            have = 0;
            if again {
                return Err(Error::run(format!("{file} of {} arrived with another SHA-256 than the hub states, twice", self.name()))
                    .hint("check the proxy or mirror between this machine and the hub, then run the same command again"));
            }
            // What an earlier run left may be wrong; a fresh copy is the answer to that.
            self.monitor.warn(format!("{file} does not have the SHA-256 that the hub states; downloading it from the start"));
            (again, furthest, failures) = (true, 0, 0);
        }
    }

    /// Whether the file has the SHA-256 that its etag states; etags of small files are git hashes, which say nothing here.
    fn matches(&self, file: &mut File, remote: &Remote) -> io::Result<Result<bool>> {
        if remote.etag.len() != 64 || !remote.etag.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Ok(Ok(true));
        }
        file.seek(SeekFrom::Start(0))?;
        let mut hash = Sha256::new();
        let mut buffer = vec![0; CHUNK];
        loop {
            if let Err(cancelled) = self.monitor.check() {
                return Ok(Err(cancelled));
            }
            match file.read(&mut buffer)? {
                0 => break,
                n => hash.update(&buffer[..n]),
            }
        }
        let digest = hash.finalize();
        let digit = |half: u8| char::from_digit(u32::from(half), 16).unwrap_or_default();
        let hex: String = digest.iter().flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]).collect();
        Ok(Ok(hex.eq_ignore_ascii_case(&remote.etag)))
    }

    // The network.

    fn url(&self, revision: &str, file: &str) -> String {
        format!("{}/{}/resolve/{}/{}", self.endpoint, self.id, encode(revision, ""), encode(file, "/"))
    }

    /// One request, without following redirects. `from`: the first byte wanted.
    fn ask(&self, head: bool, url: &str, from: u64) -> Result<Response<Body>, ureq::Error> {
        let mut request = if head { self.agent.head(url) } else { self.agent.get(url) };
        if from > 0 {
            request = request.header("range", format!("bytes={from}-"));
        }
        // Storage hosts that the hub redirects to have signed addresses; the token is none of their business.
        if let Some(token) = &self.token
            && origin(url) == origin(self.endpoint)
        {
            request = request.header("authorization", format!("Bearer {token}"));
        }
        request.call()
    }

    /// What the hub knows of `file`; `None` when it has no such file.
    fn head(&self, revision: &str, file: &str) -> Result<Option<Remote>> {
        let mut failures = 0;
        loop {
            self.monitor.check()?;
            let (cause, last) = match self.try_head(revision, file) {
                Ok(found) => return Ok(found),
                Err(Trouble::Fatal(error)) => return Err(error),
                Err(Trouble::Unreachable(cause)) => (cause, true),
                Err(Trouble::Passing(cause)) => (cause, failures + 1 >= ATTEMPTS),
            };
            if last {
                return Err(Error::input(format!("{} cannot be reached for {file} of {}: {cause}", self.endpoint, self.name())).hint(
                    "check the network, set HF_ENDPOINT to a mirror, name a local directory, or set HF_HUB_OFFLINE=1 to use only the cache",
                ));
            }
            self.sleep(self.hub.retry_wait * 2_u32.pow(failures))?;
            failures += 1;
        }
    }

    fn try_head(&self, revision: &str, file: &str) -> Result<Option<Remote>, Trouble> {
        let mut url = self.url(revision, file);
        let (mut commit, mut etag, mut size) = (None, None, None);
        // The hub describes the file before it redirects to where the content is; a moved model redirects before that.
        for _ in 0..HOPS {
            let response = self.ask(true, &url, 0)?;
            let headers = response.headers();
            commit = commit.or_else(|| text(headers, "x-repo-commit"));
            etag = etag.or_else(|| text(headers, "x-linked-etag"));
            size = size.or_else(|| text(headers, "x-linked-size"));
            match redirect(&response, &url) {
                Some(next) if commit.is_none() || etag.is_none() || size.is_none() => {
                    url = next;
                    continue;
                }
                Some(_) => {}
                None if response.status() == StatusCode::NOT_FOUND => return Ok(None),
                None if !response.status().is_success() => return Err(self.refusal(&response, file)),
                None => {
                    etag = etag.or_else(|| text(headers, "etag"));
                    size = size.or_else(|| text(headers, "content-length"));
                }
            }
            break;
        }
        let etag = etag.map(|etag| etag.trim_start_matches("W/").trim_matches('"').to_owned());
        let lacks = |what: &str| {
            Error::input(format!("the answer of {} for {file} of {} lacks a usable {what}", self.endpoint, self.name()))
                .hint("HF_ENDPOINT must be the address of a Hugging Face hub or of a full mirror of one")
        };
        Ok(Some(Remote {
            commit: commit.filter(|commit| is_file_name(commit)).ok_or_else(|| lacks("X-Repo-Commit header"))?,
            etag: etag.filter(|etag| is_file_name(etag)).ok_or_else(|| lacks("ETag header"))?,
            size: size.and_then(|size| size.parse().ok()).ok_or_else(|| lacks("size"))?,
        }))
    }

    /// Appends what the hub sends from byte `have` on; `have` follows what is on disk.
    fn receive(
        &self,
        commit: &str,
        file: &str,
        remote: &Remote,
        out: &mut File,
        have: &mut u64,
        report: &dyn Fn(u64) -> Result<()>,
    ) -> Result<(), Trouble> {
        let fail = |e: &io::Error| Trouble::Fatal(Error::io("writing the download of", Path::new(file), e));
        self.monitor.check()?;
        let mut url = self.url(commit, file);
        let mut response = self.ask(false, &url, *have)?;
        for _ in 0..HOPS {
            let Some(next) = redirect(&response, &url) else { break };
            url = next;
            response = self.ask(false, &url, *have)?;
        }
        match response.status() {
            StatusCode::PARTIAL_CONTENT => {
                let range = text(response.headers(), "content-range").unwrap_or_default();
                if !range.starts_with(&format!("bytes {have}-")) {
                    return Err(Trouble::Passing(format!("asked for bytes from {have} on, the server sent {range:?}")));
                }
            }
            // A server that does not know ranges sends everything, one that refuses this range must send everything.
            StatusCode::OK => *have = 0,
            StatusCode::RANGE_NOT_SATISFIABLE => {
                *have = 0;
                out.set_len(0).map_err(|e| fail(&e))?;
                return Err(Trouble::Passing("the server cannot continue where the download stopped".into()));
            }
            StatusCode::NOT_FOUND => return Err(self.not_found(file).into()),
            _ => return Err(self.refusal(&response, file)),
        }
        out.set_len(*have).and_then(|()| out.seek(SeekFrom::Start(*have))).map_err(|e| fail(&e))?;

        let chunks = pump(response.into_body());
        let mut noted = Instant::now();
        while *have < remote.size {
            let chunk = match chunks.recv_timeout(POLL) {
                Ok(chunk) => chunk.map_err(|e| Trouble::Passing(format!("the connection broke: {e}")))?,
                Err(RecvTimeoutError::Timeout) => {
                    self.monitor.check()?;
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => return Err(Trouble::Passing("the connection was closed too early".into())),
            };
            if *have + chunk.len() as u64 > remote.size {
                return Err(Trouble::Passing(format!("the server sent more than the {} bytes it announced", remote.size)));
            }
            out.write_all(&chunk).map_err(|e| fail(&e))?;
            *have += chunk.len() as u64;
            if noted.elapsed() >= NOTE_EVERY {
                noted = Instant::now();
                report(*have)?;
            }
            self.monitor.check()?;
        }
        Ok(())
    }

    /// Sleeps in short pieces, so that cancelling does not wait.
    fn sleep(&self, time: Duration) -> Result<()> {
        let end = Instant::now() + time;
        loop {
            self.monitor.check()?;
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(POLL));
        }
    }

    fn not_found(&self, file: &str) -> Error {
        Error::input(format!("{file} of {} was not found at {} (404)", self.name(), self.endpoint))
            .hint("check the spelling of the id and of the revision")
    }

    /// What an answer that is neither success, redirect nor 404 means.
    fn refusal(&self, response: &Response<Body>, file: &str) -> Trouble {
        let status = response.status();
        if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
            let page = format!("{}/{}", self.endpoint, self.id);
            let token = if self.token.is_some() { "a token of that account" } else { "a token (none was found)" };
            return Trouble::Fatal(
                Error::input(format!("{} refused {file} of {} ({})", self.endpoint, self.name(), status.as_u16())).hint(format!(
                    "for a gated or private model accept the licence on {page} and set HF_TOKEN to {token}; \
                     a model that does not exist is answered alike, so check the spelling too"
                )),
            );
        }
        if status.is_server_error() || matches!(status, StatusCode::TOO_MANY_REQUESTS | StatusCode::REQUEST_TIMEOUT) {
            return Trouble::Passing(format!("the server answered {status}"));
        }
        Trouble::Fatal(
            Error::input(format!("{} answered {status} for {file} of {}", self.endpoint, self.name()))
                .hint("check the id, the revision and HF_ENDPOINT"),
        )
    }
}

/// Reads a body on a thread of its own, so that the receiving side can be cancelled while the network stalls.
/// The thread ends with the body, with the first error (at the latest after [`STALL_TIMEOUT`]), or when nobody listens.
fn pump(body: Body) -> Receiver<io::Result<Vec<u8>>> {
    let (send, receive) = mpsc::sync_channel(4);
    thread::spawn(move || {
        let mut body = body.into_reader();
        loop {
            let mut chunk = vec![0; CHUNK];
            let (chunk, last) = match body.read(&mut chunk) {
                Ok(0) => return,
                Ok(n) => {
                    chunk.truncate(n);
                    (Ok(chunk), false)
                }
                Err(error) => (Err(error), true),
            };
            if send.send(chunk).is_err() || last {
                return;
            }
        }
    });
    receive
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

/// A header's value, when it is text.
fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    headers.get(name)?.to_str().ok().map(str::to_owned)
}

/// Where a redirect leads, as a whole address.
fn redirect(response: &Response<Body>, url: &str) -> Option<String> {
    if !response.status().is_redirection() {
        return None;
    }
    let location = text(response.headers(), "location")?;
    Some(if location.contains("://") {
        location
    } else if location.starts_with("//") {
        let scheme = url.split_once("//").map_or("https:", |(scheme, _)| scheme);
        format!("{scheme}{location}")
    } else if location.starts_with('/') {
        format!("{}{location}", origin(url))
    } else {
        let folder = url.split(['?', '#']).next().and_then(|path| path.rsplit_once('/')).map_or(url, |(folder, _)| folder);
        format!("{folder}/{location}")
    })
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> &str {
    let start = url.find("://").map_or(0, |at| at + 3);
    let end = url[start..].find(['/', '?', '#']).map_or(url.len(), |at| start + at);
    &url[..end]
}

/// Percent-encodes what an address cannot hold; characters of `keep` stay.
fn encode(text: &str, keep: &str) -> String {
    use std::fmt::Write as _;
    text.bytes().fold(String::with_capacity(text.len()), |mut out, byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) || keep.as_bytes().contains(&byte) {
            out.push(char::from(byte));
        } else {
            // Writing to a String cannot fail.
            let _ = write!(out, "%{byte:02X}");
        }
        out
    })
}

/// A size for people, in decimal units as the hub's pages show it.
fn bytes(count: u64) -> String {
    match count as f64 {
        n if n >= 1e9 => format!("{:.2} GB", n / 1e9),
        n if n >= 1e6 => format!("{:.1} MB", n / 1e6),
        n if n >= 1e3 => format!("{:.1} kB", n / 1e3),
        n => format!("{n} B"),
    }
}
