//! What can be said of a model before it is quantized: its layers by kind, their bytes in every format, how well
//! each format suits them, and a plan to begin with ([`Inventory`]); what a plan would cost on a GPU ([`Prediction`]);
//! how much each part really loses, measured ([`sensitivity`]); and the plan that loses least within a budget
//! ([`allocate`]).

pub mod allocate;
pub mod arithmetic;
mod footprint;
mod gpu;
mod inventory;
pub mod knapsack;
pub mod outliers;
pub mod predict;
mod reference;
pub mod sensitivity;
pub mod study;
pub mod transitions;

pub use footprint::{BlockBytes, Footprint};
pub use gpu::Gpu;
pub use inventory::{BlockRow, FormatFit, Inventory, Sensitivity, Totals};
pub use predict::{AnswerTime, Prediction};
pub use transitions::Transitions;
