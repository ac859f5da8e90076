//! The files of a variant: shards in a work folder, and the rename that makes the whole appear at once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use safetensors::tensor::TensorView;

use crate::checkpoint::Dtype;
use crate::error::{Error, Result};
use crate::files::write_atomically;

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
        .map(|(name, dtype, shape, bytes)| Ok((name.as_str(), TensorView::new(*dtype, shape.clone(), bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>()
        .map_err(|error| Error::run(format!("{} cannot be laid out: {error}", path.display())))?;
    let metadata = Some(std::iter::once(("format".to_owned(), "pt".to_owned())).collect());
    let bytes =
        safetensors::serialize(views, metadata).map_err(|error| Error::run(format!("{} cannot be laid out: {error}", path.display())))?;
    write_atomically(path, &bytes)
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
