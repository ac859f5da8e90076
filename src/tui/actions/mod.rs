//! What the commands do to the state, by subject.

pub mod allocate;
pub mod files;
pub mod formats;
pub mod jobs;
pub mod looks;
pub mod navigate;
pub mod plan;
pub mod playground;
pub mod results;
pub mod screen;
pub mod select;
pub mod variants;
