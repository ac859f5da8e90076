//! strata: quantizes hybrid language models (Mamba-2, attention, MLP, mixture of experts) block by block,
//! in integer arithmetic that really runs, and measures what that costs.

#[cfg(target_endian = "big")]
compile_error!("files are little-endian, and streams are written to them as they lie in memory");

pub mod analysis;
pub mod backend;
pub mod bench;
pub mod checkpoint;
pub mod engine;
pub mod error;
pub mod eval;
pub mod files;
pub mod format;
pub mod model;
pub mod monitor;
pub mod quant;
pub mod session;
pub mod size;
pub mod tui;
