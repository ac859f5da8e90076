//! Safetensors files as one name → bytes map: single or sharded, in files of which one tensor at a time is mapped, or
//! compiled in.

use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};

use half::{bf16, f16};
use memmap2::{Mmap, MmapOptions};
use rayon::prelude::*;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use serde::Deserialize;
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// File that names the shard of every tensor.
pub const INDEX_FILE: &str = "model.safetensors.index.json";
/// File that holds every tensor when there is no index.
pub const SINGLE_FILE: &str = "model.safetensors";

/// Longest header that is read, as in the safetensors library.
const MAX_HEADER: u64 = 100_000_000;

/// Bytes that are hashed at a time.
const HASHED: usize = 1 << 20;

/// Values that one task takes from their stored form.
const TAKEN: usize = 1 << 16;

enum Source {
    File { path: PathBuf, file: File, bytes: u64 },
    Embedded(&'static [u8]),
}

struct Shard {
    name: String,
    source: Source,
}

/// A tensor where it lies in its shard.
#[derive(Clone, Copy)]
pub struct RawTensor<'a> {
    pub dtype: Dtype,
    pub shape: &'a [usize],
    source: &'a Source,
    start: usize,
    end: usize,
}

/// The bytes of a tensor: compiled in, or mapped for as long as this lives.
pub enum TensorBytes<'a> {
    Mapped(Mmap),
    Embedded(&'a [u8]),
}

impl Deref for TensorBytes<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Mapped(map) => map,
            Self::Embedded(bytes) => bytes,
        }
    }
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
        shards.add(SINGLE_FILE.into(), Source::open(&single)?).map_err(|error| error.context(single.display()))?;
        Ok(shards)
    }

    /// The single embedded file `bytes`.
    pub fn embedded(bytes: &'static [u8]) -> Result<Self> {
        let mut shards = Self { shards: Vec::new(), entries: BTreeMap::new() };
        shards.add(SINGLE_FILE.into(), Source::Embedded(bytes))?;
        Ok(shards)
    }

    fn open_index(directory: &Path, index: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(index).map_err(|error| Error::io("reading", index, &error))?;
        let parsed: Index =
            serde_json::from_str(&text).map_err(|error| Error::input(format!("{} is not a shard index: {error}", index.display())))?;
        let mut files: Vec<&String> = parsed.weight_map.values().collect();
        files.sort();
        files.dedup();
        for file in &files {
            let unsafe_path = Path::new(file).components().any(|part| !matches!(part, Component::Normal(_))) || file.contains('\\');
            if unsafe_path || file.is_empty() {
                return Err(Error::input(format!("{} names the shard `{file}`, which is not a plain file name", index.display()))
                    .hint("shards lie beside their index; a path that leaves the directory is refused"));
            }
            if !directory.join(file).exists() {
                return Err(Error::input(format!("{} names the shard `{file}`, which is not there", index.display()))
                    .hint("the download may be incomplete: fetch the checkpoint again"));
            }
        }
        let shards = Self::open_files(directory, files)?;
        if let Some((tensor, file)) = parsed.weight_map.iter().find(|(tensor, _)| !shards.entries.contains_key(*tensor)) {
            return Err(Error::input(format!("{} places tensor `{tensor}` in `{file}`, which lacks it", index.display())));
        }
        Ok(shards)
    }

    /// Opens these shards of `directory`, in this order.
    pub fn open_files<'n>(directory: &Path, files: impl IntoIterator<Item = &'n String>) -> Result<Self> {
        let mut shards = Self { shards: Vec::new(), entries: BTreeMap::new() };
        for file in files {
            let path = directory.join(file);
            shards.add(file.clone(), Source::open(&path)?).map_err(|error| error.context(path.display()))?;
        }
        Ok(shards)
    }

    fn add(&mut self, name: String, source: Source) -> Result<()> {
        let damaged = |what: String| Error::input(what).hint("the file may be truncated or damaged: copy or download it again");
        let unreadable = |error: &dyn std::fmt::Display| damaged(format!("not a readable safetensors file: {error}"));
        let mut length = [0; 8];
        source.read_at(0, &mut length).map_err(|error| unreadable(&error))?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER.min(source.len().saturating_sub(8)) {
            return Err(unreadable(&format!("its header has {length} bytes, and the file {}", source.len())));
        }
        let mut header = vec![0; length as usize];
        source.read_at(8, &mut header).map_err(|error| unreadable(&error))?;
        let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| unreadable(&error))?;
        let data = 8 + header.len();
        let shard = self.shards.len();
        let mut tensors: Vec<_> = metadata.tensors().into_iter().collect();
        tensors.sort_by_key(|(_, info)| info.data_offsets);
        let mut end = data;
        for (tensor, info) in tensors {
            let (start, stop) = (data + info.data_offsets.0, data + info.data_offsets.1);
            let values = info.shape.iter().try_fold(1, |product: usize, size| product.checked_mul(*size));
            let bits = values.and_then(|values| values.checked_mul(info.dtype.bitsize()));
            if start != end || stop < start || bits != (stop - start).checked_mul(8) {
                return Err(damaged(format!(
                    "tensor `{tensor}` lies at bytes {start} to {stop}, which its neighbours and shape contradict"
                )));
            }
            end = stop;
            if end as u64 > source.len() {
                return Err(damaged(format!("tensor `{tensor}` ends at byte {end}, and the file has {}", source.len())));
            }
            let entry = Entry { shard, dtype: info.dtype, shape: info.shape.clone(), start, end };
            self.entries.insert(tensor, entry);
        }
        if end as u64 != source.len() {
            return Err(damaged(format!("the tensors end at byte {end}, and the file has {}", source.len())));
        }
        self.shards.push(Shard { name, source });
        Ok(())
    }

    /// The tensor with this stored name.
    pub fn get(&self, name: &str) -> Option<RawTensor<'_>> {
        let Entry { shard, dtype, shape, start, end } = self.entries.get(name)?;
        Some(RawTensor { dtype: *dtype, shape, source: &self.shards[*shard].source, start: *start, end: *end })
    }

    /// Stored names in order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The shard that each tensor lies in, by the tensor's stored name.
    pub fn weight_map(&self) -> BTreeMap<&str, &str> {
        self.entries.iter().map(|(tensor, entry)| (tensor.as_str(), self.shards[entry.shard].name.as_str())).collect()
    }

    /// Bytes of all tensors.
    pub fn tensor_bytes(&self) -> usize {
        self.entries.values().map(|entry| entry.end - entry.start).sum()
    }

    /// File names of the shards with the SHA-256 of each, in hexadecimal.
    pub fn hashes(&self) -> Result<Vec<(String, String)>> {
        self.shards.par_iter().map(|shard| Ok((shard.name.clone(), shard.source.sha256()?))).collect()
    }

    /// Bytes of all shards.
    pub fn total_bytes(&self) -> u64 {
        self.shards.iter().map(|shard| shard.source.len()).sum()
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

impl Source {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| Error::io("opening", path, &error))?;
        let bytes = file.metadata().map_err(|error| Error::io("reading", path, &error))?.len();
        Ok(Self::File { path: path.to_owned(), file, bytes })
    }

    fn len(&self) -> u64 {
        match self {
            Self::File { bytes, .. } => *bytes,
            Self::Embedded(bytes) => bytes.len() as u64,
        }
    }

    fn read_at(&self, offset: usize, into: &mut [u8]) -> std::io::Result<()> {
        match self {
            Self::File { file, .. } => file.read_exact_at(into, offset as u64),
            Self::Embedded(bytes) => match bytes.get(offset..offset + into.len()) {
                Some(bytes) => {
                    into.copy_from_slice(bytes);
                    Ok(())
                }
                None => Err(std::io::ErrorKind::UnexpectedEof.into()),
            },
        }
    }

    /// Maps no more than the bytes asked for, so that a checkpoint may be larger than the address space that is allowed.
    #[allow(unsafe_code, reason = "memory-mapping a file")]
    fn bytes(&self, start: usize, end: usize) -> Result<TensorBytes<'_>> {
        match self {
            Self::Embedded(bytes) => Ok(TensorBytes::Embedded(&bytes[start..end])),
            // Nothing cannot be mapped.
            Self::File { .. } if start == end => Ok(TensorBytes::Embedded(&[])),
            Self::File { path, file, .. } => {
                // SAFETY: the map is read-only and private to this process. Another process that truncates the file while
                // it is mapped would fault; checkpoints are written once and replaced by rename, never in place.
                let map = unsafe { MmapOptions::new().offset(start as u64).len(end - start).map(file) };
                map.map(TensorBytes::Mapped).map_err(|error| Error::io("mapping", path, &error))
            }
        }
    }

    fn sha256(&self) -> Result<String> {
        let Self::File { path, bytes, .. } = self else { return self.bytes(0, self.len() as usize).map(|bytes| sha256_hex(&bytes)) };
        let mut hash = Sha256::new();
        let mut chunk = vec![0; HASHED];
        for start in (0..*bytes as usize).step_by(HASHED) {
            let part = &mut chunk[..HASHED.min(*bytes as usize - start)];
            self.read_at(start, part).map_err(|error| Error::io("reading", path, &error))?;
            hash.update(part);
        }
        Ok(hexadecimal(&hash.finalize()))
    }
}

impl<'a> RawTensor<'a> {
    /// Number of bytes.
    pub fn byte_count(self) -> usize {
        self.end - self.start
    }

    /// The bytes, mapped from the file for as long as the result lives.
    pub fn bytes(self) -> Result<TensorBytes<'a>> {
        self.source.bytes(self.start, self.end)
    }

    /// The values in f32 (from f32, f16 or bf16), or `None` for another type.
    pub fn to_f32(self) -> Result<Option<Vec<f32>>> {
        let bytes = self.bytes()?;
        Ok(Some(match self.dtype {
            Dtype::F32 => values_of(&bytes, f32::from_le_bytes),
            Dtype::BF16 => values_of(&bytes, |b| bf16::from_le_bytes(b).to_f32()),
            Dtype::F16 => values_of(&bytes, |b| f16::from_le_bytes(b).to_f32()),
            _ => return Ok(None),
        }))
    }
}

/// The values that `bytes` store in N bytes each, taken on all threads: those of a large tensor are fetched from disk, or from a
/// map for the first time, and written to memory that is not there yet, each of which takes longer than a copy.
pub fn values_of<const N: usize, T: Copy + Default + Send + Sync>(bytes: &[u8], value: impl Fn([u8; N]) -> T + Sync) -> Vec<T> {
    let stored = bytes.as_chunks::<N>().0;
    let mut values = vec![T::default(); stored.len()];
    values.par_chunks_mut(TAKEN).zip(stored.par_chunks(TAKEN)).for_each(|(values, stored)| {
        values.iter_mut().zip(stored).for_each(|(to, from)| *to = value(*from));
    });
    values
}
