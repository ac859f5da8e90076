//! Safetensors files as one name → bytes map: single or sharded, memory-mapped or compiled in.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use half::{bf16, f16};
use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// File that names the shard of every tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// File that holds every tensor when there is no index.
pub const SINGLE_FILE: &str = "model.safetensors";

enum Bytes {
    Mapped(Mmap),
    Embedded(&'static [u8]),
}

impl Bytes {
    fn get(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
        }
    }
}

struct Shard {
    name: String,
    bytes: Bytes,
}

/// A tensor where it lies in its shard.
#[derive(Debug, Clone, Copy)]
pub struct RawTensor<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    pub bytes: &'a [u8],
}

struct Entry {
    shard: usize,
    dtype: Dtype,
    shape: Vec<usize>,
    start: usize,
    end: usize,
}

/// Every tensor of a checkpoint by its stored name.
pub struct Shards {
    shards: Vec<Shard>,
    entries: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// Opens the shards of `directory`.
    pub fn open(directory: &Path) -> Result<Self> {
        let index = directory.join(INDEX_FILE);
        if index.exists() {
            return Self::open_index(directory, &index);
        }
        let single = directory.join(SINGLE_FILE);
        if !single.exists() {
            return Err(Error::input(format!("{} has neither {SINGLE_FILE} nor {INDEX_FILE}", directory.display()))
                .hint("give the directory of a checkpoint in safetensors format"));
        }
        let mut shards = Self { shards: Vec::new(), entries: BTreeMap::new() };
        shards.add(SINGLE_FILE.into(), map(&single)?).map_err(|error| error.context(single.display()))?;
        Ok(shards)
    }

    /// The single embedded file `bytes`.
    pub fn embedded(bytes: &'static [u8]) -> Result<Self> {
        let mut shards = Self { shards: Vec::new(), entries: BTreeMap::new() };
        shards.add(SINGLE_FILE.into(), Bytes::Embedded(bytes))?;
        Ok(shards)
    }

    fn open_index(directory: &Path, index: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(index).map_err(|error| Error::io("reading", index, &error))?;
        let parsed: Index =
            serde_json::from_str(&text).map_err(|error| Error::input(format!("{} is not a shard index: {error}", index.display())))?;
        let mut files: Vec<&String> = parsed.weight_map.values().collect();
        files.sort();
        files.dedup();
        let mut shards = Self { shards: Vec::new(), entries: BTreeMap::new() };
        for file in files {
            let unsafe_path = Path::new(file).components().any(|part| !matches!(part, Component::Normal(_))) || file.contains('\\');
            if unsafe_path || file.is_empty() {
                return Err(Error::input(format!("{} names the shard `{file}`, which is not a plain file name", index.display()))
                    .hint("shards lie beside their index; a path that leaves the directory is refused"));
            }
            let path = directory.join(file);
            if !path.exists() {
                return Err(Error::input(format!("{} names the shard `{file}`, which is not there", index.display()))
                    .hint("the download may be incomplete: fetch the checkpoint again"));
            }
            shards.add(file.clone(), map(&path)?).map_err(|error| error.context(path.display()))?;
        }
        if let Some((tensor, file)) = parsed.weight_map.iter().find(|(tensor, _)| !shards.entries.contains_key(*tensor)) {
            return Err(Error::input(format!("{} places tensor `{tensor}` in `{file}`, which lacks it", index.display())));
        }
        Ok(shards)
    }

    fn add(&mut self, name: String, bytes: Bytes) -> Result<()> {
        let all = bytes.get();
        let damaged = |what: String| Error::input(what).hint("the file may be truncated or damaged: copy or download it again");
        let (header, metadata) =
            SafeTensors::read_metadata(all).map_err(|error| damaged(format!("not a readable safetensors file: {error}")))?;
        let data = header + 8;
        let shard = self.shards.len();
        for (tensor, info) in metadata.tensors() {
            let (start, end) = (data + info.data_offsets.0, data + info.data_offsets.1);
            if end > all.len() {
                return Err(damaged(format!("tensor `{tensor}` ends at byte {end}, and the file has {}", all.len())));
            }
            let entry = Entry { shard, dtype: info.dtype, shape: info.shape.clone(), start, end };
            self.entries.insert(tensor, entry);
        }
        self.shards.push(Shard { name, bytes });
        Ok(())
    }

    /// The tensor with this stored name.
    pub fn get(&self, name: &str) -> Option<RawTensor<'_>> {
        let entry = self.entries.get(name)?;
        let bytes = &self.shards[entry.shard].bytes.get()[entry.start..entry.end];
        Some(RawTensor { dtype: entry.dtype, shape: &entry.shape, bytes })
    }

    /// Stored names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// File names of the shards with the SHA-256 of each, in hexadecimal.
    pub fn hashes(&self) -> Vec<(String, String)> {
        self.shards.iter().map(|shard| (shard.name.clone(), sha256_hex(shard.bytes.get()))).collect()
    }

    /// Bytes of all shards.
    pub fn total_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.bytes.get().len() as u64).sum()
    }
}

/// SHA-256 in lower-case hexadecimal.
pub fn sha256_hex(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

/// Bytes in lower-case hexadecimal.
pub fn hexadecimal(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[allow(unsafe_code, reason = "memory-mapping a file")]
fn map(path: &Path) -> Result<Bytes> {
    let file = std::fs::File::open(path).map_err(|error| Error::io("opening", path, &error))?;
    // SAFETY: the map is read-only and private to this process. Another process that truncates the file while it
    // is mapped would fault; checkpoints are written once and replaced by rename, never in place.
    let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io("mapping", path, &error))?;
    Ok(Bytes::Mapped(map))
}

impl RawTensor<'_> {
    /// The values in f32 (from f32, f16 or bf16), or `None` for another type.
    pub fn to_f32(self) -> Option<Vec<f32>> {
        Some(match self.dtype {
            Dtype::F32 => self.bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Dtype::BF16 => self.bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
            Dtype::F16 => self.bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
            _ => return None,
        })
    }
}
