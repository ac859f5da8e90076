//! Sessions: one TOML file that names model, calibration, variants and evaluation; its headless replay; the table.

mod file;
pub mod paths;
pub mod replay;
pub mod report;

pub use file::{EvaluateSpec, ModelSpec, SESSION_SCHEMA, Session, UiSpec, VariantSpec};
pub use replay::{Replay, ReplayOptions};
