//! What a run keeps of the sample between blocks: a hash to compare, and the streams in a file to resume from.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::mpsc;
use std::thread;

use sha2::{Digest, Sha256};

use crate::backend::Backend;
use crate::checkpoint::hexadecimal;
use crate::error::{Error, Result};
use crate::files;
use crate::model::Boundary;

/// SHA-256 over the values of tensors, one after another.
#[derive(Default)]
pub struct FloatHash {
    sha: Sha256,
}

impl FloatHash {
    /// Adds a tensor of the device: its values, or what the device makes of them.
    pub fn add_tensor<B: Backend>(&mut self, backend: &B, tensor: &B::Tensor, after: &str) -> Result<()> {
        let refused = |error: Error| {
            error.context(format!("the residual stream behind {after} cannot be kept")).hint("give this block a wider format")
        };
        match backend.digest(tensor).map_err(refused)? {
            Some(digest) => {
                self.sha.update(digest);
                Ok(())
            }
            None => self.add(&backend.download(tensor)?, after),
        }
    }

    /// Adds values; an error when one is not finite, which names what stands in front: `block 3`.
    pub fn add(&mut self, values: &[f32], after: &str) -> Result<()> {
        if values.iter().any(|value| !value.is_finite()) {
            return Err(Error::run(format!("the residual stream behind {after} is not finite")).hint("give this block a wider format"));
        }
        self.sha.update(bytemuck::cast_slice::<f32, u8>(values));
        Ok(())
    }

    /// In hexadecimal.
    pub fn finish(self) -> String {
        hexadecimal(&self.sha.finalize())
    }
}

/// Writes tensors one after another, f32 in little-endian, so that the file is absent (or old) or whole.
pub fn write<B: Backend>(backend: &B, path: &Path, tensors: impl Iterator<Item = Result<B::Tensor>>) -> Result<()> {
    files::replace(path, |file| {
        // One tensor is written while the next comes from the device.
        thread::scope(|scope| {
            let (sender, receiver) = mpsc::sync_channel::<Vec<f32>>(0);
            let writer = scope.spawn(move || receiver.into_iter().try_for_each(|values| file.write_all(bytemuck::cast_slice(&values))));
            for tensor in tensors {
                // Whoever writes no longer takes any where that failed, and says why below.
                if sender.send(backend.download(&tensor?)?).is_err() {
                    break;
                }
            }
            drop(sender);
            let written = writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            written.map_err(|error| Error::io("writing", path, &error))
        })
    })
}

/// Reads what [`write`] wrote into boundaries, one after another: in each a tensor `[tokens, cols]` for each of `tokens`.
pub fn read<B: Backend>(backend: &B, path: &Path, tokens: &[usize], cols: usize, into: [&mut Boundary<B>; 2]) -> Result<()> {
    let failed =
        |error: std::io::Error| Error::run(format!("{} is damaged: {error}", path.display())).hint("remove the work folder and run again");
    let mut file = File::open(path).map_err(|error| Error::io("reading", path, &error))?;
    for boundary in into {
        for (index, tokens) in tokens.iter().enumerate() {
            let mut values = vec![0.0_f32; tokens * cols];
            file.read_exact(bytemuck::cast_slice_mut(&mut values)).map_err(failed)?;
            boundary.put(backend, index, backend.upload(values, cols)?)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::checkpoint::sha256_hex;

    #[test]
    fn streams_come_back_and_a_short_file_is_said_to_be_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("boundary.f32");
        let stream = |from: usize| -> Boundary<Cpu> {
            let tensors = [(from..from + 12).map(|i| i as f32).collect(), vec![-1.5 * from as f32; 4]];
            tensors.map(|values| Cpu.upload(values, 4).unwrap()).to_vec().into()
        };
        let (first, second) = (stream(1), stream(100));
        write(&Cpu, &path, first.iter(&Cpu).chain(second.iter(&Cpu))).unwrap();
        let mut back = [Boundary::held(2), Boundary::held(2)];
        read(&Cpu, &path, &[3, 1], 4, back.each_mut()).unwrap();
        for (back, stream) in back.iter().zip([first, second]) {
            for (back, tensor) in back.iter(&Cpu).zip(stream.iter(&Cpu)) {
                assert_eq!(Cpu.download(&back.unwrap()).unwrap(), Cpu.download(&tensor.unwrap()).unwrap());
            }
        }
        assert!(read(&Cpu, &path, &[3, 2], 4, back.each_mut()).unwrap_err().message.contains("damaged"));
    }

    #[test]
    fn a_hash_is_that_of_the_bytes_and_refuses_what_is_not_finite() {
        let mut hash = FloatHash::default();
        hash.add(&[1.0], "a").unwrap();
        hash.add(&[-2.0], "a").unwrap();
        assert_eq!(hash.finish(), sha256_hex(&[0, 0, 128, 63, 0, 0, 0, 192]));
        assert!(FloatHash::default().add(&[f32::NAN], "block 7").unwrap_err().message.contains("block 7"));
    }
}
