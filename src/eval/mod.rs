//! Measurement: the five tasks, perplexity, divergence from the unquantized model, speed and memory.
//! Start with [`run::evaluate`].

pub mod dataset;
pub mod decode;
mod divergence;
mod encoded;
pub mod hardware;
mod journal;
pub mod memory;
pub mod paired;
mod prefix;
mod reference;
pub mod result;
pub mod run;
pub mod score;
pub mod speed;
pub mod statistics;
pub mod tasks;
pub mod text;

pub use dataset::DataSource;
pub use paired::Comparison;
pub use result::{ModelResult, RESULTS_SCHEMA, ResultSet};
pub use run::{EvaluateRequest, Evaluated, ModelToEvaluate, evaluate};
pub use tasks::{Rows, Task};
