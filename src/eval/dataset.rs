//! Rows of the tasks' public datasets: which dataset of the hub, and its files as JSON lines.

use std::fs::File;
use std::path::{Path, PathBuf};

use parquet::file::reader::{FileReader, SerializedFileReader};

use super::tasks::{Rows, Task};
use crate::checkpoint::hub::{DatasetSplit, Hub};
use crate::error::{Error, Result};
use crate::monitor::Monitor;

/// Where the rows of the tasks come from.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum DataSource {
    /// The rows compiled in for the demo and its variants, the hub for other models.
    #[default]
    Automatic,
    /// The rows compiled in.
    Embedded,
    /// The public datasets.
    Hub,
    /// A folder with a JSON-lines file a task.
    Directory(PathBuf),
}

impl DataSource {
    /// What a user names: `embedded`, `hub`, or a folder (`./hub` for one of such a name).
    pub fn named(text: &Path) -> Self {
        match text.to_str() {
            Some("embedded") => Self::Embedded,
            Some("hub") => Self::Hub,
            _ => Self::Directory(text.to_owned()),
        }
    }

    /// The rows of `task`; `demo` says whether [`DataSource::Automatic`] means the rows compiled in.
    pub fn rows(&self, task: Task, demo: bool, skip_bad_rows: bool, monitor: &Monitor) -> Result<Rows> {
        match self {
            Self::Directory(directory) => task.from_directory(directory, skip_bad_rows),
            Self::Automatic if demo => task.embedded(),
            Self::Embedded => task.embedded(),
            Self::Automatic | Self::Hub => from_hub(&Hub::from_env()?, task, skip_bad_rows, monitor),
        }
    }
}

/// The dataset that lm-evaluation-harness scores `task` on.
pub fn split(task: Task) -> DatasetSplit {
    let (id, config, split) = match task {
        Task::ArcEasy => ("allenai/ai2_arc", Some("ARC-Easy"), "test"),
        Task::ArcChallenge => ("allenai/ai2_arc", Some("ARC-Challenge"), "test"),
        Task::Piqa => ("baber/piqa", None, "validation"),
        Task::Winogrande => ("allenai/winogrande", Some("winogrande_xl"), "validation"),
        Task::Hellaswag => ("Rowan/hellaswag", None, "validation"),
    };
    DatasetSplit { id, config, split }
}

/// The rows of `task` from its dataset on `hub`, or from the cache.
pub fn from_hub(hub: &Hub, task: Task, skip_bad_rows: bool, monitor: &Monitor) -> Result<Rows> {
    let split = split(task);
    let found = hub.fetch_dataset(&split, monitor)?;
    monitor.log(format!("{task}: {split} at commit {}", found.commit));
    let mut rows = Rows::default();
    for file in &found.files {
        // Parquet has no lines, so that its rows are counted.
        let (lines, unit) = if file.extension().is_some_and(|extension| extension == "parquet") {
            (parquet_lines(file)?, "row")
        } else {
            (std::fs::read(file).map_err(|error| Error::io("reading", file, &error))?, "line")
        };
        rows.add(task, &lines, &format!("{split}: {}, {unit}", file.display()), skip_bad_rows)?;
    }
    rows.some(&split.to_string())
}

/// The rows of a Parquet file as JSON lines.
fn parquet_lines(file: &Path) -> Result<Vec<u8>> {
    let damaged = |error: parquet::errors::ParquetError| {
        Error::input(format!("{} cannot be read as Parquet: {error}", file.display()))
            .hint("delete the file so that it is downloaded again, or give the rows as JSON lines with --data DIR")
    };
    let open = File::open(file).map_err(|error| Error::io("opening", file, &error))?;
    let reader = SerializedFileReader::new(open).map_err(damaged)?;
    let mut lines = Vec::new();
    for row in reader.get_row_iter(None).map_err(damaged)? {
        lines.extend(row.map_err(damaged)?.to_json_value().to_string().into_bytes());
        lines.push(b'\n');
    }
    Ok(lines)
}
