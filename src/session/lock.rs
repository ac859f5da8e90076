//! [`Lock`]: a file that names the process which works on a folder. The system frees it when that process ends,
//! however it ends; what is left in it then tells that it did not end by itself.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How often a lock that is held is tried again.
const RETRY: Duration = Duration::from_millis(20);

/// Who took a lock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Owner {
    pub pid: u32,
    /// Names the time between two starts of the machine; empty where the system does not tell.
    pub boot_id: String,
}

impl Owner {
    fn this_process() -> Self {
        let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        Self { pid: std::process::id(), boot_id: boot_id.trim().to_owned() }
    }

    /// Whether the machine was started anew since.
    pub fn is_of_another_boot(&self) -> bool {
        self.boot_id != Self::this_process().boot_id
    }
}

/// What a lock file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holding {
    /// Nobody took it, or whoever did gave it back.
    Free,
    Held(Owner),
    /// Its owner ended without giving it back.
    Stale(Owner),
}

/// A lock that this process holds. Dropping it gives it back.
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// Takes the lock at `path`, waiting up to `patience` for another process to give it back.
    pub fn take(path: &Path, patience: Duration) -> Result<Self> {
        let failed = |error: &std::io::Error| Error::io("locking", path, error);
        let mut options = OpenOptions::new();
        let mut file = options.read(true).write(true).create(true).truncate(false).open(path).map_err(|error| failed(&error))?;
        let start = Instant::now();
        loop {
            match file.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) if start.elapsed() < patience => std::thread::sleep(RETRY),
                Err(TryLockError::WouldBlock) => {
                    let owner = read(&mut file).map_or_else(String::new, |owner| format!(" (process {})", owner.pid));
                    return Err(Error::input(format!("another strata{owner} holds {}", path.display())).hint("wait until it has ended"));
                }
                Err(TryLockError::Error(error)) => return Err(failed(&error)),
            }
        }
        let text =
            serde_json::to_string(&Owner::this_process()).map_err(|error| Error::run(format!("a lock cannot be written: {error}")))?;
        file.set_len(0).and_then(|()| file.rewind()).and_then(|()| file.write_all(text.as_bytes())).map_err(|error| failed(&error))?;
        Ok(Self { file })
    }

    /// Whether somebody holds the lock at `path`.
    pub fn look(path: &Path) -> Holding {
        let Ok(mut file) = File::open(path) else { return Holding::Free };
        let owner = read(&mut file);
        match (file.try_lock_shared(), owner) {
            // Taken, and its name not written yet.
            (Err(TryLockError::WouldBlock), None) => Holding::Held(Owner { pid: 0, boot_id: String::new() }),
            (Err(TryLockError::WouldBlock), Some(owner)) => Holding::Held(owner),
            (_, Some(owner)) => Holding::Stale(owner),
            (_, None) => Holding::Free,
        }
    }
}

fn read(file: &mut File) -> Option<Owner> {
    let mut text = String::new();
    file.seek(SeekFrom::Start(0)).ok()?;
    file.read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

impl Drop for Lock {
    fn drop(&mut self) {
        // An owner's name that stays makes the lock look stale, which is harmless: it can be taken.
        drop(self.file.set_len(0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_held_by_one_and_free_when_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        assert_eq!(Lock::look(&path), Holding::Free);
        let lock = Lock::take(&path, Duration::ZERO).unwrap();
        assert_eq!(Lock::look(&path), Holding::Held(Owner::this_process()));
        let error = Lock::take(&path, Duration::from_millis(40)).unwrap_err();
        assert!(error.message.contains(&format!("process {}", std::process::id())), "{error}");
        drop(lock);
        assert_eq!(Lock::look(&path), Holding::Free);
    }

    #[test]
    fn an_owner_that_is_gone_left_a_stale_lock_that_can_be_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        // The pid is that of a living process: only the system's lock counts.
        let gone = Owner { pid: std::process::id(), boot_id: "another boot".into() };
        std::fs::write(&path, serde_json::to_string(&gone).unwrap()).unwrap();
        assert_eq!(Lock::look(&path), Holding::Stale(gone.clone()));
        assert!(gone.is_of_another_boot() && !Owner::this_process().is_of_another_boot());
        let _lock = Lock::take(&path, Duration::ZERO).unwrap();
        assert!(matches!(Lock::look(&path), Holding::Held(_)));
    }
}
