//! The hybrid architecture, written once over [`Backend`]. Start with [`Hybrid`] (all blocks resident), [`Stream`] (one
//! block at a time from disk) or [`Reader`] (whichever of the two the memory allows, for whole texts).

mod block;
mod boundary;
pub mod generate;
mod hybrid;
mod moe;
mod need;
mod reader;
mod stream;
pub mod trace;

pub use block::{Block, BlockCache, BlockSource, PIECE, Tap, attention_shape, internals, mamba_shape};
pub use boundary::{Boundary, WaitingRoom};
pub use hybrid::{Cache, Ends, Hybrid};
pub use moe::router_shape;
pub use need::{HEAD_VALUES, MemoryNeed};
pub use reader::{Batch, Outputs, Pass, Reader, Rounding};
pub use stream::Stream;
