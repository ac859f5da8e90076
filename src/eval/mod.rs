//! Measurement: the five tasks, perplexity, divergence from the unquantized model, speed and memory.
//! Start with [`run::evaluate`].

pub mod memory;
mod prefix;
pub mod result;
pub mod run;
pub mod score;
pub mod speed;
pub mod statistics;
pub mod tasks;
pub mod text;

pub use result::{ModelResult, RESULTS_SCHEMA, ResultSet};
pub use run::{EvaluateRequest, ModelToEvaluate, evaluate};
pub use tasks::Task;
