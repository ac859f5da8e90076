//! Sessions: one TOML file that names model, calibration, variants and evaluation; its headless replay; the folders of
//! runs; the store of results, and their table and page.

pub mod figures;
mod file;
pub mod html;
pub mod import;
pub mod lock;
pub mod paths;
mod plot;
pub mod recovery;
pub mod remembered;
pub mod replay;
pub mod report;
pub mod runs;
pub mod store;

pub use file::{EvaluateSpec, ModelSpec, SESSION_SCHEMA, Session, UiSpec, VariantSpec};
pub use replay::{Replay, ReplayOptions};
