//! Batches that wait between two blocks: in memory, in the host's where a device has no room for them, or in a scratch file when
//! they are too many for either.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use crate::backend::Backend;
use crate::error::{Error, Result};

/// Where batches may wait.
#[derive(Debug, Clone, Copy)]
pub struct WaitingRoom<'a> {
    /// Bytes that one boundary may take in memory, that of the device where it has its own.
    pub held: u64,
    /// Bytes that one which takes more may take in the host's memory, of a device that has its own.
    pub on_host: u64,
    /// Folder for the scratch file of one that takes still more.
    pub scratch: &'a Path,
    /// Whether a device with memory of its own has room for two blocks, so that the next is read while one is at work.
    pub ahead: bool,
}

/// The residual stream of every batch at one boundary, `[tokens, hidden]` each.
pub struct Boundary<B: Backend> {
    batches: Batches<B>,
}

enum Batches<B: Backend> {
    Held(Vec<Option<B::Tensor>>),
    /// Values of each, of so many features.
    OnHost(Vec<Option<Vec<f32>>>, usize),
    Spilled(Scratch),
}

/// A file that a batch always has the same place in.
struct Scratch {
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
        Self { batches: Batches::Held((0..batches).map(|_| None).collect()) }
    }

    /// For batches of so many `tokens` each, of `hidden` values a token, where `room` allows.
    pub fn within(room: WaitingRoom<'_>, tokens: &[usize], hidden: usize) -> Result<Self> {
        let bytes = 4 * (tokens.iter().sum::<usize>() * hidden) as u64;
        if bytes <= room.held {
            return Ok(Self::held(tokens.len()));
        }
        if bytes <= room.on_host {
            return Ok(Self { batches: Batches::OnHost(vec![None; tokens.len()], hidden) });
        }
        let file = tempfile::tempfile_in(room.scratch).map_err(|error| Error::io("making a scratch file in", room.scratch, &error))?;
        Ok(Self::spilled(file, room.scratch, tokens, hidden))
    }

    fn spilled(file: File, folder: &Path, tokens: &[usize], hidden: usize) -> Self {
        let before = tokens.iter().scan(0, |sum, tokens| {
            *sum += tokens;
            Some(*sum - tokens)
        });
        let scratch = Scratch { file, folder: folder.to_owned(), before: before.collect(), tokens: tokens.to_vec(), hidden };
        Self { batches: Batches::Spilled(scratch) }
    }

    /// Whether the batches wait in a file.
    pub fn is_spilled(&self) -> bool {
        matches!(self.batches, Batches::Spilled(_))
    }

    /// Where the batches wait, in words.
    pub fn place(&self) -> &'static str {
        match self.batches {
            Batches::Held(_) => "device",
            Batches::OnHost(..) => "host",
            Batches::Spilled(_) => "scratch",
        }
    }

    /// Number of batches.
    pub fn len(&self) -> usize {
        match &self.batches {
            Batches::Held(batches) => batches.len(),
            Batches::OnHost(batches, _) => batches.len(),
            Batches::Spilled(scratch) => scratch.tokens.len(),
        }
    }

    /// Whether there are no batches.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Puts batch `index` away.
    pub fn put(&mut self, backend: &B, index: usize, h: B::Tensor) -> Result<()> {
        match &mut self.batches {
            Batches::Held(batches) => batches[index] = Some(h),
            Batches::OnHost(batches, _) => batches[index] = Some(backend.download(&h)?),
            Batches::Spilled(scratch) => scratch.write(index, &backend.download(&h)?)?,
        }
        Ok(())
    }

    /// Batch `index`, which stays.
    pub fn get(&self, backend: &B, index: usize) -> Result<B::Tensor> {
        match &self.batches {
            Batches::Held(batches) => batches[index].clone().ok_or_else(|| gone(index)),
            Batches::OnHost(batches, hidden) => backend.upload(batches[index].clone().ok_or_else(|| gone(index))?, *hidden),
            Batches::Spilled(scratch) => backend.upload(scratch.read(index)?, scratch.hidden),
        }
    }

    /// Takes batch `index` out.
    pub fn take(&mut self, backend: &B, index: usize) -> Result<B::Tensor> {
        match &mut self.batches {
            Batches::Held(batches) => batches[index].take().ok_or_else(|| gone(index)),
            Batches::OnHost(batches, hidden) => backend.upload(batches[index].take().ok_or_else(|| gone(index))?, *hidden),
            Batches::Spilled(scratch) => backend.upload(scratch.read(index)?, scratch.hidden),
        }
    }

    /// Every batch in turn; they stay.
    pub fn iter<'b>(&'b self, backend: &'b B) -> impl Iterator<Item = Result<B::Tensor>> + 'b {
        (0..self.len()).map(|index| self.get(backend, index))
    }

    /// All batches, in memory.
    pub fn all(&self, backend: &B) -> Result<Vec<B::Tensor>> {
        self.iter(backend).collect()
    }
}

impl<B: Backend> From<Vec<B::Tensor>> for Boundary<B> {
    fn from(batches: Vec<B::Tensor>) -> Self {
        Self { batches: Batches::Held(batches.into_iter().map(Some).collect()) }
    }
}

fn gone(index: usize) -> Error {
    Error::run(format!("batch {index} is not at the boundary"))
}

impl Scratch {
    fn seek(&self, index: usize) -> std::io::Result<u64> {
        (&self.file).seek(SeekFrom::Start(4 * (self.before[index] * self.hidden) as u64))
    }

    fn write(&self, index: usize, values: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        let written = self.seek(index).and_then(|_| (&self.file).write_all(&bytes));
        written.map_err(|error| Error::io("writing the scratch file in", &self.folder, &error))
    }

    fn read(&self, index: usize) -> Result<Vec<f32>> {
        let mut bytes = vec![0; 4 * self.tokens[index] * self.hidden];
        let read = self.seek(index).and_then(|_| (&self.file).read_exact(&mut bytes));
        read.map_err(|error| Error::io("reading the scratch file in", &self.folder, &error))?;
        Ok(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;

    #[test]
    fn batches_come_back_from_wherever_they_waited_as_they_were() {
        let folder = tempfile::tempdir().unwrap();
        let tokens = [2, 1, 3];
        let enough = 6 * 4 * 4;
        for (held, on_host, place) in [(enough, 0, "device"), (enough - 1, enough, "host"), (enough - 1, enough - 1, "scratch")] {
            let room = WaitingRoom { held, on_host, scratch: folder.path(), ahead: false };
            let mut boundary: Boundary<Cpu> = Boundary::within(room, &tokens, 4).unwrap();
            assert_eq!((boundary.place(), boundary.is_spilled()), (place, place == "scratch"));
            let batch = |index: usize| (0..tokens[index] * 4).map(|i| (100 * index + i) as f32).collect::<Vec<_>>();
            for index in [2, 0, 1] {
                boundary.put(&Cpu, index, Cpu.upload(batch(index), 4).unwrap()).unwrap();
            }
            for (index, h) in boundary.iter(&Cpu).enumerate() {
                assert_eq!(Cpu.download(&h.unwrap()).unwrap(), batch(index));
            }
            assert_eq!(Cpu.download(&boundary.take(&Cpu, 1).unwrap()).unwrap(), batch(1));
        }
    }

    #[test]
    fn a_batch_that_was_taken_is_gone_from_memory() {
        let mut boundary: Boundary<Cpu> = vec![Cpu.upload(vec![1.0; 4], 4).unwrap()].into();
        boundary.get(&Cpu, 0).unwrap();
        boundary.take(&Cpu, 0).unwrap();
        assert!(boundary.get(&Cpu, 0).is_err());
    }

    #[test]
    fn a_folder_that_cannot_be_written_and_a_full_disk_are_said() {
        let nowhere = WaitingRoom { held: 0, on_host: 0, scratch: Path::new("/no/such/folder"), ahead: false };
        let Err(error) = Boundary::<Cpu>::within(nowhere, &[1], 4) else { panic!("a file was made in no folder") };
        assert!(error.message.contains("scratch file in /no/such/folder"), "{error}");
        assert!(error.hint.is_some());
        let full = File::options().read(true).write(true).open("/dev/full").unwrap();
        let mut boundary: Boundary<Cpu> = Boundary::spilled(full, Path::new("/scratch"), &[1], 4);
        let error = boundary.put(&Cpu, 0, Cpu.upload(vec![1.0; 4], 4).unwrap()).unwrap_err();
        assert!(error.message.contains("writing the scratch file in /scratch"), "{error}");
        assert!(error.hint.unwrap().contains("free some disk space"));
    }
}
