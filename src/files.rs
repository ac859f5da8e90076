//! Files that are either absent (or old) or whole, and files that only grow, line by line.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use crate::error::{Error, Result};

/// Writes `bytes` to `path` so that the file is either absent (or old) or whole.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    replace(path, |file| file.write_all(bytes).map_err(|error| Error::io("writing", path, &error)))
}

/// The same for what `write` writes.
pub fn replace(path: &Path, write: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let temporary = path.with_extension("tmp");
    let failed = |error: std::io::Error| Error::io("writing", path, &error);
    let mut file = File::create(&temporary).map_err(failed)?;
    write(&mut file)?;
    file.sync_all().and_then(|()| fs::rename(&temporary, path)).map_err(failed)
}

/// Adds `line` to the file at `path`, which need not exist, in one write: to a file that is opened for appending and locked
/// for it, so that several processes may do so at once.
pub fn append_line(path: &Path, line: &str) -> Result<()> {
    let write = || -> std::io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut file = OpenOptions::new().create(true).read(true).append(true).open(path)?;
        // A file system without locks leaves the one write, which others do not come between either.
        drop(file.lock());
        // A writer that was killed may have left half a line, which must not swallow this one.
        let mut last = [b'\n'];
        if file.seek(SeekFrom::End(-1)).is_ok() {
            file.read_exact(&mut last)?;
        }
        let begin = if last == [b'\n'] { "" } else { "\n" };
        file.write_all(format!("{begin}{line}\n").as_bytes())?;
        file.sync_data()
    };
    write().map_err(|error| Error::io("appending to", path, &error))
}
