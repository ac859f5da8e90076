//! The workbench.
use crate::error::{Error, Result};
use crate::session::Session;
use std::path::PathBuf;
pub mod terminal {
    pub fn restore() {}
}
pub struct WorkbenchOptions {
    pub session: Session,
    pub session_path: Option<PathBuf>,
    pub threads: Option<usize>,
    pub ascii: bool,
    pub theme: Option<String>,
}
pub fn run(_: WorkbenchOptions) -> Result<()> {
    Err(Error::run("not yet"))
}
