//! What can be said of a model before it is quantized: its layers by kind, their bytes in every format, how well
//! each format suits them, and a plan to begin with. Start with [`Inventory`].

pub mod arithmetic;
mod inventory;
pub mod outliers;

pub use inventory::{BlockRow, FormatFit, Inventory, Sensitivity, Totals};
