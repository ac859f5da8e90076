//! Speed of this machine: single operations beside what memory and arithmetic allow, and whole models of published shapes
//! with random weights, no checkpoint needed. Start with [`model::measure`] and [`operations::measure`].

pub mod model;
pub mod operations;
pub mod quantize;
mod random;
mod shapes;

pub use random::{assemble, plan_format};
pub use shapes::{PUBLISHED, Shape};
