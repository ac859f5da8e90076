//! Recovery files: what a workbench had not saved when it was killed.
//!
//! Every workbench has a folder below `recovery/` with a lock; a folder with a session whose lock nobody holds was left
//! behind by one that did not end by itself. Start with [`Recovery::begin`] and [`lost`].

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Session;
use super::lock::{Holding, Lock};
use crate::error::{Error, Result};

const SESSION: &str = "session.toml";
/// Holds the path of the session's file.
const ORIGIN: &str = "origin";
const LOCK: &str = "lock";

/// The recovery folder of this process.
pub struct Recovery {
    folder: PathBuf,
    lock: Option<Lock>,
}

impl Recovery {
    /// A folder of this process's own in `root`.
    pub fn begin(root: &Path) -> Result<Self> {
        let folder = (0..1000)
            .map(|number| root.join(format!("{}-{number}", std::process::id())))
            .find(|folder| !folder.exists())
            .unwrap_or_else(|| root.join("0"));
        fs::create_dir_all(&folder).map_err(|error| Error::io("creating", &folder, &error))?;
        let lock = Lock::take(&folder.join(LOCK), Duration::ZERO)?;
        Ok(Self { folder, lock: Some(lock) })
    }

    /// Keeps `session`, whose file is `path`, until it is saved.
    pub fn keep(&self, session: &Session, path: Option<&Path>) -> Result<()> {
        let (file, temporary) = (self.folder.join(SESSION), self.folder.join("session.tmp"));
        let failed = |error: &std::io::Error| Error::io("writing", &file, error);
        let text = session.to_toml(None)?;
        // Without `sync`, which may take longer than a frame: this guards against the end of a process, not of power.
        fs::write(&temporary, text).and_then(|()| fs::rename(&temporary, &file)).map_err(|error| failed(&error))?;
        match path.map(std::path::absolute) {
            Some(Ok(path)) => fs::write(self.folder.join(ORIGIN), path.as_os_str().as_encoded_bytes()).map_err(|error| failed(&error)),
            _ => remove(&self.folder.join(ORIGIN)),
        }
    }

    /// Nothing is unsaved any more.
    pub fn forget(&self) -> Result<()> {
        remove(&self.folder.join(SESSION))
    }
}

impl Drop for Recovery {
    fn drop(&mut self) {
        // The lock first, so that a session that is kept is found by the next start.
        self.lock = None;
        if !self.folder.join(SESSION).exists() {
            // A folder that stays holds nothing, and is taken away by the next look for lost sessions.
            drop(fs::remove_dir_all(&self.folder));
        }
    }
}

/// A session that was not saved.
#[derive(Debug, Clone)]
pub struct Lost {
    folder: PathBuf,
    pub session: Session,
    /// The file that it belongs to.
    pub path: Option<PathBuf>,
}

impl Lost {
    /// Forgets it.
    pub fn discard(&self) -> Result<()> {
        fs::remove_dir_all(&self.folder).map_err(|error| Error::io("removing", &self.folder, &error))
    }
}

/// Sessions in `root` that were left behind, the latest first.
pub fn lost(root: &Path) -> Vec<Lost> {
    let folders = fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut found: Vec<(std::time::SystemTime, Lost)> = Vec::new();
    for folder in folders.filter(|folder| !matches!(Lock::look(&folder.join(LOCK)), Holding::Held(_))) {
        let file = folder.join(SESSION);
        match (Session::read(&file), fs::metadata(&file).and_then(|data| data.modified())) {
            (Ok(session), Ok(time)) => {
                let path = fs::read_to_string(folder.join(ORIGIN)).ok().map(PathBuf::from);
                found.push((time, Lost { folder, session, path }));
            }
            // Nothing was unsaved there.
            (Err(_), _) if !file.exists() => drop(fs::remove_dir_all(&folder)),
            _ => {}
        }
    }
    found.sort_by_key(|(time, _)| std::cmp::Reverse(*time));
    found.into_iter().map(|(_, lost)| lost).collect()
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(Error::io("removing", path, &error)),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_dead_process_had_unsaved_is_lost() {
        let root = tempfile::tempdir().unwrap();
        let (session, path) = (Session::demo().unwrap(), Path::new("/somewhere/fit.toml"));
        let recovery = Recovery::begin(root.path()).unwrap();
        recovery.keep(&session, Some(path)).unwrap();
        assert!(lost(root.path()).is_empty(), "its process lives");
        // As after a kill: the lock is gone, the folder is not.
        drop(recovery);
        let found = lost(root.path());
        assert_eq!((found.len(), &found[0].session, found[0].path.as_deref()), (1, &session, Some(path)));
        found[0].discard().unwrap();

        let recovery = Recovery::begin(root.path()).unwrap();
        recovery.keep(&session, None).unwrap();
        recovery.forget().unwrap();
        drop(recovery);
        assert!(lost(root.path()).is_empty() && fs::read_dir(root.path()).unwrap().next().is_none());
    }
}
