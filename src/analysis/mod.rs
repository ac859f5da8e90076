//! What can be said of a model before it is quantized: its layers by kind, their bytes in every format, how well
//! each format suits them, and a plan to begin with ([`Inventory`]); how much each part really loses, measured
//! ([`sensitivity`]); and the plan that loses least within a budget ([`allocate`]).

pub mod allocate;
mod inventory;
pub mod knapsack;
pub mod outliers;
mod reference;
pub mod sensitivity;
pub mod study;

pub use inventory::{BlockRow, FormatFit, Inventory, Sensitivity, Totals};
