//! Model files: configuration, layout, weights.

mod config;
pub mod hub;
mod layout;

pub use config::{AttentionConfig, Config, MambaConfig, MlpConfig, MoeConfig};
pub use layout::{BlockSpec, Layout, LinearSpec, SliceSpec, TensorSpec};
