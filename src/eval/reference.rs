//! What the unquantized model says about a text, kept on disk so that one pass of it serves many variants.
//!
//! A file holds the logits of every window, losslessly compressed (the bytes of f32 values sorted by significance, then
//! zstd), so that figures are the same to the bit whether they were computed now or found. Its name is the hash of a
//! [`Reading`] and the tool. It appears by rename, every window carries a hash, and
//! [`References`] keeps the folder below a size by removing those used longest ago.

use std::fs::{self, File};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};

use super::statistics::NoiseFloor;
use crate::checkpoint::{TOOL, sha256_hex};
use crate::error::{Error, Result};
use crate::monitor::Monitor;

/// Schema of a file's head.
const SCHEMA: &str = "strata.reference/2";

/// Bytes that a folder of references may hold unless something else is asked for.
pub const FOLDER_BYTES: u64 = 8 << 30;

/// Fast, and close to what higher levels reach on floats.
const ZSTD_LEVEL: i32 = 1;

/// A folder of references.
pub struct References {
    folder: PathBuf,
    most: u64,
}

/// What a reference is of.
pub struct Reading<'a> {
    /// How the windows are read: `windows`, or `decode` for positions of a single one.
    pub how: &'a str,
    /// Hash of the model's weights.
    pub model: &'a str,
    pub backend: &'a str,
    pub windows: &'a [Vec<u32>],
}

/// Logits of one model on one text, in a file.
pub struct Reference {
    path: PathBuf,
    file: File,
    index: Index,
}

/// The last line of a file: where its windows are.
#[derive(Serialize, Deserialize)]
struct Index {
    schema: String,
    /// Columns of the logits.
    vocabulary: usize,
    windows: Vec<Window>,
    beside: Option<Beside>,
}

/// What was found beside the logits of whole windows.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Beside {
    /// What the reference is from itself in its own lower precision.
    pub noise: NoiseFloor,
    /// Perplexity as in llama.cpp, whose windows are others.
    pub llama_cpp: f64,
}

#[derive(Serialize, Deserialize)]
struct Window {
    start: u64,
    bytes: usize,
    /// Of the compressed bytes.
    sha256: String,
    values: usize,
}

/// A reference that is being written; it disappears unless [`Writer::finish`] is called.
pub struct Writer {
    file: BufWriter<tempfile::NamedTempFile>,
    index: Index,
    end: u64,
    path: PathBuf,
    most: u64,
}

impl References {
    /// The references in `folder`, of at most `most` bytes together.
    pub fn new(folder: PathBuf, most: u64) -> Self {
        Self { folder, most }
    }

    fn path(&self, Reading { how, model, backend, windows }: &Reading) -> PathBuf {
        let mut key = format!("{SCHEMA}\n{how}\n{model}\n{backend}\n{TOOL}\n").into_bytes();
        for window in *windows {
            key.extend((window.len() as u64).to_le_bytes());
            key.extend(window.iter().flat_map(|token| token.to_le_bytes()));
        }
        self.folder.join(format!("{}.ref", &sha256_hex(&key)[..32]))
    }

    /// The reference of `reading`, whose model is called `name`, when it is there and undamaged.
    pub fn find_or_warn(&self, reading: &Reading, name: &str, monitor: &Monitor) -> Option<Reference> {
        match self.find(reading) {
            Ok(Some(found)) => {
                monitor.log(format!("text: what {name} says was found in {}", found.path.display()));
                Some(found)
            }
            Ok(None) => None,
            Err(error) => {
                monitor.warn(format!("{error}: it is computed again"));
                None
            }
        }
    }

    /// The reference of `reading`, when it is there. One that is damaged is an error with its path.
    fn find(&self, reading: &Reading) -> Result<Option<Reference>> {
        let path = self.path(reading);
        if !path.exists() {
            return Ok(None);
        }
        let mut reference = Reference::open(path)?;
        for index in 0..reference.index.windows.len() {
            reference.compressed(index)?;
        }
        // What was used last goes last; a date that cannot be set costs a better choice only.
        drop(reference.file.set_modified(SystemTime::now()));
        Ok(Some(reference))
    }

    /// Begins the file for what [`References::find_or_warn`] looks for.
    pub fn write(&self, reading: &Reading, vocabulary: usize) -> Result<Writer> {
        let path = self.path(reading);
        fs::create_dir_all(&self.folder).map_err(|error| Error::io("creating", &self.folder, &error))?;
        let file = tempfile::NamedTempFile::new_in(&self.folder).map_err(|error| Error::io("making a file in", &self.folder, &error))?;
        let index = Index { schema: SCHEMA.into(), vocabulary, windows: Vec::new(), beside: None };
        Ok(Writer { file: BufWriter::new(file), index, end: 0, path, most: self.most })
    }
}

impl Reference {
    fn open(path: PathBuf) -> Result<Self> {
        let mut file = File::open(&path).map_err(|error| Error::io("opening", &path, &error))?;
        let index = Self::index(&mut file).ok().flatten().filter(|index| index.schema == SCHEMA);
        let index = index.ok_or_else(|| damaged(&path, "it has no index"))?;
        Ok(Self { path, file, index })
    }

    /// The last line, whose length stands behind it.
    fn index(file: &mut File) -> std::io::Result<Option<Index>> {
        let end = file.seek(SeekFrom::End(-8))?;
        let mut length = [0; 8];
        file.read_exact(&mut length)?;
        let Some(start) = end.checked_sub(u64::from_le_bytes(length)) else { return Ok(None) };
        file.seek(SeekFrom::Start(start))?;
        let mut text = vec![0; (end - start) as usize];
        file.read_exact(&mut text)?;
        Ok(serde_json::from_slice(&text).ok())
    }

    /// Columns of the logits.
    pub fn vocabulary(&self) -> usize {
        self.index.vocabulary
    }

    /// What was found beside the logits.
    pub fn beside(&self) -> Option<&Beside> {
        self.index.beside.as_ref()
    }

    fn compressed(&mut self, index: usize) -> Result<Vec<u8>> {
        let window = &self.index.windows[index];
        let mut bytes = vec![0; window.bytes];
        let read = self.file.seek(SeekFrom::Start(window.start)).and_then(|_| self.file.read_exact(&mut bytes));
        read.map_err(|error| Error::io("reading", &self.path, &error))?;
        if sha256_hex(&bytes) == window.sha256 { Ok(bytes) } else { Err(damaged(&self.path, &format!("window {index} has another hash"))) }
    }

    /// Logits `[tokens, vocabulary]` of window `index`.
    pub fn logits(&mut self, index: usize) -> Result<Vec<f32>> {
        let (compressed, values) = (self.compressed(index)?, self.index.windows[index].values);
        let planes = zstd::bulk::decompress(&compressed, 4 * values).map_err(|error| damaged(&self.path, &error.to_string()))?;
        if planes.len() != 4 * values {
            return Err(damaged(&self.path, "a window is too short"));
        }
        Ok((0..values).map(|i| f32::from_le_bytes(std::array::from_fn(|plane| planes[plane * values + i]))).collect())
    }
}

impl Writer {
    /// Adds the logits of the next window.
    pub fn push(&mut self, logits: &[f32]) -> Result<()> {
        let planes: Vec<u8> = (0..4).flat_map(|plane| logits.iter().map(move |value| value.to_le_bytes()[plane])).collect();
        let compressed = zstd::bulk::compress(&planes, ZSTD_LEVEL).map_err(|error| Error::io("compressing for", &self.path, &error))?;
        self.file.write_all(&compressed).map_err(|error| Error::io("writing", &self.path, &error))?;
        let sha256 = sha256_hex(&compressed);
        self.index.windows.push(Window { start: self.end, bytes: compressed.len(), sha256, values: logits.len() });
        self.end += compressed.len() as u64;
        Ok(())
    }

    /// Ends the file, lets it appear and makes room for it in its folder. Warns when the folder is too small for it, since every
    /// later evaluation computes it again then.
    pub fn finish(mut self, beside: Option<Beside>, monitor: &Monitor) -> Result<Reference> {
        self.index.beside = beside;
        let fail = |error: &std::io::Error| Error::io("writing", &self.path, error);
        let index = serde_json::to_vec(&self.index).map_err(|error| Error::run(format!("an index cannot be written: {error}")))?;
        self.file.write_all(&index).and_then(|()| self.file.write_all(&(index.len() as u64).to_le_bytes())).map_err(|e| fail(&e))?;
        let file = self.file.into_inner().map_err(|error| fail(error.error()))?;
        file.as_file().sync_all().map_err(|error| fail(&error))?;
        // The name may go at once where the folder is too small for it: the open file stays readable.
        let file = file.persist(&self.path).map_err(|error| fail(&error.error))?;
        let bytes = file.metadata().map_or(0, |metadata| metadata.len());
        make_room(&self.path, self.most);
        if bytes > self.most {
            monitor.warn(format!(
                "what the reference says takes {bytes} bytes, and {} may be kept: it serves this evaluation only (--reference-cache raises that)",
                self.most
            ));
        }
        Ok(Reference { path: self.path, file, index: self.index })
    }
}

/// Removes the references of the folder of `newest` that were used longest ago, until what is left is within `most`
/// bytes. What cannot be removed stays.
fn make_room(newest: &Path, most: u64) {
    let entries = newest.parent().and_then(|folder| fs::read_dir(folder).ok()).into_iter().flatten().flatten();
    let mut files: Vec<(bool, SystemTime, u64, PathBuf)> = entries
        .filter(|entry| entry.path().extension().is_some_and(|extension| extension == "ref"))
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            Some((entry.path() != newest, metadata.modified().ok()?, metadata.len(), entry.path()))
        })
        .collect();
    // The newest first, then those used last.
    files.sort_by(|a, b| a.0.cmp(&b.0).then(b.1.cmp(&a.1)));
    let mut total = 0;
    for (_, _, bytes, path) in files {
        // One that is too large goes alone: others stay as far as there is room.
        if total + bytes > most {
            drop(fs::remove_file(path));
        } else {
            total += bytes;
        }
    }
}

fn damaged(path: &Path, what: &str) -> Error {
    Error::run(format!("{} is damaged: {what}", path.display())).hint("delete the file; it is computed again")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading<'a>(model: &'a str, windows: &'a [Vec<u32>]) -> Reading<'a> {
        Reading { how: "windows", model, backend: "cpu", windows }
    }

    fn written(references: &References, model: &str, windows: &[Vec<u32>]) -> Reference {
        written_with(references, model, windows, &Monitor::silent())
    }

    fn written_with(references: &References, model: &str, windows: &[Vec<u32>], monitor: &Monitor) -> Reference {
        let mut writer = references.write(&reading(model, windows), 4).unwrap();
        for (index, window) in windows.iter().enumerate() {
            writer.push(&logits(index, window.len())).unwrap();
        }
        writer.finish(None, monitor).unwrap()
    }

    fn logits(index: usize, tokens: usize) -> Vec<f32> {
        (0..tokens * 4).map(|i| (i as f32 - 3.3 * index as f32).sin() * 1e-3_f32.powi(i as i32 % 5)).collect()
    }

    #[test]
    fn logits_come_back_to_the_bit_for_the_same_model_text_and_backend_only() {
        let folder = tempfile::tempdir().unwrap();
        let references = References::new(folder.path().join("new"), FOLDER_BYTES);
        let windows = [vec![1, 2, 3], vec![4, 5, 6, 7]];
        assert!(references.find(&reading("m", &windows)).unwrap().is_none());
        drop(written(&references, "m", &windows));
        let mut found = references.find(&reading("m", &windows)).unwrap().unwrap();
        assert_eq!((found.index.windows.len(), found.vocabulary()), (2, 4));
        for (index, window) in windows.iter().enumerate() {
            assert_eq!(found.logits(index).unwrap(), logits(index, window.len()));
        }
        for other in [
            reading("n", &windows),
            Reading { backend: "cuda", ..reading("m", &windows) },
            Reading { how: "decode", ..reading("m", &windows) },
            reading("m", &windows[..1]),
            reading("m", &[vec![1, 2, 3, 4], vec![5, 6, 7]]),
        ] {
            assert!(references.find(&other).unwrap().is_none());
        }
    }

    #[test]
    fn damage_is_noticed_and_an_unfinished_file_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let references = References::new(folder.path().into(), FOLDER_BYTES);
        let windows = [vec![1, 2, 3, 4, 5]];
        drop(references.write(&reading("m", &windows), 4).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        let path = written(&references, "m", &windows).path.clone();
        let whole = fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[20] ^= 1;
        for bytes in [&flipped[..], &whole[..whole.len() - 3], b"short"] {
            fs::write(&path, bytes).unwrap();
            assert!(references.find(&reading("m", &windows)).err().unwrap().message.contains("is damaged"));
        }
    }

    #[test]
    fn the_folder_stays_within_its_bounds() {
        let folder = tempfile::tempdir().unwrap();
        let windows = [vec![0; 64]];
        let size = fs::metadata(written(&References::new(folder.path().into(), FOLDER_BYTES), "a", &windows).path).unwrap().len();
        let references = References::new(folder.path().into(), size * 5 / 2);
        let age = |model: &str, seconds| {
            let file = references.find(&reading(model, &windows)).unwrap().unwrap().file;
            file.set_modified(SystemTime::now() - std::time::Duration::from_secs(seconds)).unwrap();
        };
        written(&references, "b", &windows);
        age("a", 10);
        age("b", 100);
        written(&references, "c", &windows);
        let found = ["a", "b", "c"].map(|model| references.find(&reading(model, &windows)).unwrap().is_some());
        assert_eq!(found, [true, false, true], "b was used longest ago");
        // One that is larger than the folder may be serves this evaluation and is not kept.
        let log = std::sync::Mutex::new(String::new());
        let listen = |report| {
            if let crate::monitor::Report::Warning(line) = report {
                log.lock().unwrap().push_str(&line);
            }
        };
        let monitor = Monitor::new(listen, crate::monitor::CancelToken::default());
        let (wide, most) = ([vec![0; 64 * 8]], size * 3 / 2);
        let mut large = written_with(&References::new(folder.path().into(), most), "d", &wide, &monitor);
        assert_eq!(large.logits(0).unwrap(), logits(0, 64 * 8));
        assert!(!large.path.exists());
        let kept = ["a", "c"].map(|model| references.find(&reading(model, &windows)).unwrap().is_some());
        assert_eq!(kept.iter().filter(|kept| **kept).count(), 1, "there is room for one of the others");
        drop(monitor);
        assert!(log.into_inner().unwrap().contains(&format!("and {most} may be kept")));
    }
}
