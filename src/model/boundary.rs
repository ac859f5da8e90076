//! Batches that wait between two blocks: in memory, or in a scratch file when they are too many.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::backend::Backend;
use crate::error::{Error, Result};

/// The residual stream of every batch at one boundary, `[tokens, hidden]` each.
pub enum Boundary<B: Backend> {
    Held(Vec<Option<B::Tensor>>),
    Spilled(Scratch),
}

/// A file that a batch always has the same place in.
pub struct Scratch {
    file: File,
    /// For messages; the file itself has no name any more.
    folder: PathBuf,
    /// Tokens of each batch, and how many stand before it.
    tokens: Vec<usize>,
    before: Vec<usize>,
    hidden: usize,
}

impl<B: Backend> Boundary<B> {
    /// In memory, for `batches` batches.
    pub fn held(batches: usize) -> Self {
        Self::Held((0..batches).map(|_| None).collect())
    }

    /// In `file`, which lies in `folder`, for batches of so many `tokens`.
    pub fn spilled(file: File, folder: &Path, tokens: &[usize]) -> Self {
        let before = tokens.iter().scan(0, |sum, tokens| {
            *sum += tokens;
            Some(*sum - tokens)
        });
        Self::Spilled(Scratch { file, folder: folder.to_owned(), before: before.collect(), tokens: tokens.to_vec(), hidden: 0 })
    }

    /// Puts batch `index` away.
    pub fn put(&mut self, backend: &B, index: usize, h: B::Tensor) -> Result<()> {
        match self {
            Self::Held(batches) => batches[index] = Some(h),
            Self::Spilled(scratch) => {
                scratch.hidden = backend.features(&h);
                scratch.write(index, &backend.download(&h)?)?;
            }
        }
        Ok(())
    }

    /// Takes batch `index` out.
    pub fn take(&mut self, backend: &B, index: usize) -> Result<B::Tensor> {
        match self {
            Self::Held(batches) => batches[index].take().ok_or_else(|| Error::run(format!("batch {index} was taken twice"))),
            Self::Spilled(scratch) => backend.upload(scratch.read(index)?, scratch.hidden),
        }
    }
}

impl Scratch {
    fn seek(&mut self, index: usize) -> std::io::Result<u64> {
        self.file.seek(SeekFrom::Start(4 * (self.before[index] * self.hidden) as u64))
    }

    fn write(&mut self, index: usize, values: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let written = self.seek(index).and_then(|_| self.file.write_all(&bytes));
        written.map_err(|error| Error::io("writing the scratch file in", &self.folder, &error))
    }

    fn read(&mut self, index: usize) -> Result<Vec<f32>> {
        let mut bytes = vec![0; 4 * self.tokens[index] * self.hidden];
        let read = self.seek(index).and_then(|_| self.file.read_exact(&mut bytes));
        read.map_err(|error| Error::io("reading the scratch file in", &self.folder, &error))?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;

    #[test]
    fn batches_come_back_from_the_file_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let file = tempfile::tempfile_in(folder.path()).unwrap();
        let mut boundary: Boundary<Cpu> = Boundary::spilled(file, folder.path(), &[2, 1, 3]);
        let batch = |index: usize, tokens: usize| (0..tokens * 4).map(|i| (100 * index + i) as f32).collect::<Vec<_>>();
        for (index, tokens) in [(2, 3), (0, 2), (1, 1)] {
            boundary.put(&Cpu, index, Cpu.upload(batch(index, tokens), 4).unwrap()).unwrap();
        }
        for (index, tokens) in [(0, 2), (1, 1), (2, 3)] {
            let h = boundary.take(&Cpu, index).unwrap();
            assert_eq!(Cpu.download(&h).unwrap(), batch(index, tokens));
        }
    }
}
