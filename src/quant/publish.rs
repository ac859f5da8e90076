//! The files of a variant: shards in a work folder, and the rename that makes the whole appear at once.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use safetensors::SafeTensorError;
use safetensors::tensor::{Metadata, TensorInfo, TensorView, View};

use crate::checkpoint::Dtype;
use crate::error::{Error, Result};
use crate::files;

/// A tensor to write: stored name, type, shape and bytes.
pub type TensorOut<'a> = (String, Dtype, Vec<usize>, std::borrow::Cow<'a, [u8]>);

/// Folder beside `output` in which a variant is made before it appears.
pub fn work_directory(output: &Path) -> PathBuf {
    sibling(output, ".", ".strata-work")
}

/// Folder beside `output` that keeps a variant which failed its validation.
pub fn failed_directory(output: &Path) -> PathBuf {
    sibling(output, "", ".failed")
}

fn sibling(output: &Path, before: &str, after: &str) -> PathBuf {
    let name = output.file_name().map_or_else(|| "variant".into(), |name| name.to_string_lossy().into_owned());
    output.with_file_name(format!("{before}{name}{after}"))
}

/// Takes the work folder for this process; another process that has it is an error, with this hint. The lock ends with the
/// process.
pub fn lock(work: &Path, hint: &str) -> Result<File> {
    fs::create_dir_all(work).map_err(|error| Error::io("creating", work, &error))?;
    let path = work.join("lock");
    let file = File::create(&path).map_err(|error| Error::io("creating", &path, &error))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(_) => Err(Error::input(format!("another strata is writing to {}", work.display())).hint(hint)),
    }
}

/// A vector of f32 to write.
pub fn float_vector(name: String, values: &[f32]) -> TensorOut<'static> {
    let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    (name, Dtype::F32, vec![values.len()], std::borrow::Cow::Owned(bytes))
}

/// Writes a safetensors file atomically.
pub fn write_tensors(path: &Path, tensors: &[TensorOut<'_>]) -> Result<()> {
    let views = tensors
        .iter()
        .map(|(name, dtype, shape, bytes)| Ok((name.clone(), TensorView::new(*dtype, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, SafeTensorError>>();
    let views = views.map_err(|error| not_laid_out(path, &error))?;
    files::replace(path, |file| write_views(file, path, views))
}

/// Writes a safetensors file of these tensors to `file`, at `path`, to the byte as the library does: but their bytes are asked for one
/// after another, and go to the file from where they are.
pub fn write_views(file: &mut File, path: &Path, mut tensors: Vec<(String, impl View)>) -> Result<()> {
    tensors.sort_by(|(name, tensor), (other, next)| next.dtype().cmp(&tensor.dtype()).then(name.cmp(other)));
    let mut end = 0;
    let info = |(name, tensor): &(String, _)| {
        let start = end;
        end += View::data_len(tensor);
        (name.clone(), TensorInfo { dtype: View::dtype(tensor), shape: View::shape(tensor).to_vec(), data_offsets: (start, end) })
    };
    let infos = tensors.iter().map(info).collect();
    let format = std::iter::once(("format".to_owned(), "pt".to_owned())).collect();
    let metadata = Metadata::new(Some(format), infos);
    let header = metadata.and_then(|metadata| Ok(serde_json::to_vec(&metadata)?));
    let mut header = header.map_err(|error| not_laid_out(path, &error))?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let failed = |error: std::io::Error| Error::io("writing", path, &error);
    file.write_all(&(header.len() as u64).to_le_bytes()).and_then(|()| file.write_all(&header)).map_err(failed)?;
    tensors.iter().try_for_each(|(name, tensor)| {
        let bytes = tensor.data();
        if bytes.len() != View::data_len(tensor) {
            return Err(Error::run(format!("tensor `{name}` has {} bytes, not {}", bytes.len(), View::data_len(tensor))));
        }
        file.write_all(&bytes).map_err(failed)
    })
}

fn not_laid_out(path: &Path, error: &SafeTensorError) -> Error {
    Error::run(format!("{} cannot be laid out: {error}", path.display()))
}

/// Moves the finished folder `from` to `output`; an `output` that exists is replaced when `force` is set.
pub fn publish(from: &Path, output: &Path, force: bool) -> Result<()> {
    let rename = |from: &Path, to: &Path| fs::rename(from, to).map_err(|error| Error::io("renaming", from, &error));
    if !output.exists() {
        return rename(from, output);
    }
    if !force {
        return Err(exists(output));
    }
    let old = sibling(output, ".", ".replaced");
    remove(&old)?;
    rename(output, &old)?;
    rename(from, output)?;
    remove(&old)
}

/// The error for an output that is in the way.
pub fn exists(output: &Path) -> Error {
    Error::input(format!("{} exists already", output.display())).hint("choose another output with -o, or replace it with --force")
}

/// Removes a folder if it is there.
pub fn remove(path: &Path) -> Result<()> {
    if path.exists() { fs::remove_dir_all(path).map_err(|error| Error::io("removing", path, &error)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_those_of_the_library() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tensors.safetensors");
        let tensor = |name: &str, dtype, shape: &[usize], bytes: usize| -> TensorOut<'static> {
            (name.into(), dtype, shape.to_vec(), (0..bytes).map(|i| i as u8).collect::<Vec<u8>>().into())
        };
        let tensors = [
            tensor("b.weight", Dtype::BF16, &[3, 5], 30),
            tensor("a.weight_packed", Dtype::I32, &[2, 2], 16),
            tensor("a.weight", Dtype::I8, &[3, 1], 3),
            tensor("a.bias", Dtype::F32, &[0], 0),
            tensor("c.weight", Dtype::BF16, &[1], 2),
            tensor("a.weight_shape", Dtype::I64, &[2], 16),
        ];
        write_tensors(&path, &tensors).unwrap();
        let views = tensors.iter().map(|(name, dtype, shape, bytes)| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()));
        let format = Some(std::iter::once(("format".to_owned(), "pt".to_owned())).collect());
        assert_eq!(fs::read(&path).unwrap(), safetensors::serialize(views, format).unwrap());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        assert!(write_tensors(&path.join("below"), &tensors).is_err());
    }
}
