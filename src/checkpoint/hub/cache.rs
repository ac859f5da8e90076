//! Where a repository's files lie on disk, and bringing them there. Start with [`Placement`].

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};

use super::transfer::{ATTEMPTS, CHUNK, Remote, Source, Trouble, bytes};
use super::{Hub, is_commit, is_file_name};
use crate::error::{Error, Result};
use crate::monitor::Monitor;

/// A file of the repository: its size, and where to get it unless the snapshot has it.
pub struct Entry {
    pub file: String,
    pub size: u64,
    pub remote: Option<Remote>,
}

/// The cache's folder of one repository, and the hub to fill it from.
pub struct Placement<'a> {
    pub source: Source<'a>,
    pub monitor: &'a Monitor<'a>,
    pub cache: Cache,
    pub repo: Repo,
}

impl<'a> Placement<'a> {
    /// For the repository `id` (`owner/name`) at `revision` (branch, tag or commit; default `main`).
    pub fn new(hub: &'a Hub, kind: RepoType, id: &'a str, revision: Option<&'a str>, monitor: &'a Monitor<'a>) -> Result<Self> {
        let revision = revision.unwrap_or("main");
        let cache = Cache::new(hub.home.join("hub"));
        let source = Source::new(hub, kind, id, revision, cache.token(), monitor)?;
        Ok(Self { source, monitor, repo: Repo::with_revision(id.into(), kind, revision.into()), cache })
    }

    /// `owner/name (revision)` for messages.
    pub fn name(&self) -> String {
        self.source.name()
    }

    /// The commit that the revision is in the cache.
    pub fn known_commit(&self) -> Option<String> {
        let revision = self.source.revision;
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let reference = self.cache.path().join(self.repo.folder_name()).join("refs").join(revision);
        fs::read_to_string(reference).ok().map(|commit| commit.trim().to_owned()).filter(|commit| is_file_name(commit))
    }

    /// What to say when the network is forbidden and `file` is not there.
    pub fn not_cached(&self, file: &str) -> Error {
        let (name, cache) = (self.name(), self.cache.path().display());
        Error::input(format!("{file} of {name} is not in the cache {cache} and HF_HUB_OFFLINE forbids the network"))
            .hint("unset HF_HUB_OFFLINE to download it, set HF_HOME to the cache that has it, or name a local directory")
    }

    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.cache.repo(self.repo.clone()).pointer_path(commit)
    }

    /// The marker that says that `commit` has no such file.
    pub fn absent_marker(&self, commit: &str, file: &str) -> PathBuf {
        self.cache.path().join(self.repo.folder_name()).join(".no_exist").join(commit).join(file)
    }

    /// Remembers that `commit` has no `file`. Losing the marker costs a request, so failing is no error.
    pub fn mark_absent(&self, commit: &str, file: &str) {
        let marker = self.absent_marker(commit, file);
        if let Some(dir) = marker.parent() {
            let _ = fs::create_dir_all(dir).and_then(|()| fs::write(&marker, b""));
        }
    }

    /// Makes the revision mean `commit` in the cache.
    pub fn write_ref(&self, commit: &str) -> Result<()> {
        if self.source.revision == commit {
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

    /// Brings `entries` of `commit` into the snapshot and makes the revision mean it. `known`: an older commit is usable.
    pub fn bring(&self, commit: &str, entries: &[Entry], known: bool) -> Result<PathBuf> {
        let total: u64 = entries.iter().map(|entry| entry.size).sum();
        self.monitor.stage("download", entries.len());
        self.monitor.log(format!("{}: {} files, {}, into {}", self.name(), entries.len(), bytes(total), self.snapshot(commit).display()));
        for (done, entry) in entries.iter().enumerate() {
            self.monitor.check()?;
            let size = bytes(entry.size);
            self.place(commit, entry, &|have| self.monitor.step(done, format!("{}: {} of {size}", entry.file, bytes(have))))?;
            // A first download shows in the cache from its first file on. One that brings a newer commit does so when it
            // is whole: until then the older one stays usable offline.
            if done == 0 && !known {
                self.write_ref(commit)?;
            }
            self.monitor.step(done + 1, format!("{}: {size}", entry.file))?;
        }
        self.write_ref(commit)?;
        Ok(self.snapshot(commit))
    }

    /// A file as the snapshot has it, else as the hub describes it; `None` when the hub has no such file.
    pub fn entry(&self, revision: &str, file: &str) -> Result<Option<Entry>> {
        if is_commit(revision)
            && let Ok(metadata) = fs::metadata(self.snapshot(revision).join(file))
        {
            return Ok(Some(Entry { file: file.into(), size: metadata.len(), remote: None }));
        }
        let remote = self.source.head(revision, file)?;
        Ok(remote.map(|remote| Entry { file: file.into(), size: remote.size, remote: Some(remote) }))
    }

    /// Brings `entry` into the snapshot, unless it is there. `report` gets the bytes so far and may cancel.
    pub fn place(&self, commit: &str, entry: &Entry, report: &dyn Fn(u64) -> Result<()>) -> Result<()> {
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
            self.source.sleep(Duration::from_millis(200))?;
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
                let cause = match self.source.receive(commit, file, remote, &mut out, &mut have, report) {
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
                self.source.sleep(self.source.hub.retry_wait * 2_u32.pow(failures - 1))?;
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
}
