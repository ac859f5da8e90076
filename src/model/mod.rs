//! The hybrid architecture, written once over [`Backend`]. Start with [`Hybrid`] (all blocks resident) or
//! [`Stream`] (one block at a time from the mapped checkpoint).

mod block;
pub mod generate;
mod hybrid;
mod moe;
mod stream;
pub mod trace;

pub use block::{Block, BlockCache, BlockSource, Tap, internals, mamba_shape};
pub use hybrid::{Cache, Ends, Hybrid};
pub use stream::Stream;
