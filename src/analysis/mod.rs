//! What can be said of a model before it is quantized: its layers by kind, their bytes in every format, how well
//! each format suits them, a plan to begin with ([`Inventory`]); and what a plan would cost on a GPU ([`Prediction`]).

pub mod arithmetic;
mod footprint;
mod gpu;
mod inventory;
pub mod outliers;
pub mod predict;

pub use footprint::{BlockBytes, Footprint};
pub use gpu::Gpu;
pub use inventory::{BlockRow, FormatFit, Inventory, Sensitivity, Totals};
pub use predict::Prediction;
