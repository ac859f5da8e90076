//! Number formats: what a weight matrix looks like once quantized, how its codes are packed, and which
//! format each block of a model gets. Depends on no other module; start with [`Format`] and [`Plan`].
//!
//! *Format*: weights × activations of a block, written `w8a8`. *Scheme*: how one slice of one matrix is
//! stored (per channel, or in groups along the input). *Code*: the small integer; *scale*: what it is
//! multiplied by. *Plan*: a format for every block, the embedding and the head.

mod activation;
mod matrix;
pub mod packing;
mod plan;
mod scheme;
mod transform;

pub use activation::{Activations, CacheFormat, CacheFormats, ScaleKind, SsmActivations};
pub use matrix::{LinearWeights, QuantizedMatrix, WeightPart, round_to_nearest};
pub use plan::{BlockKind, NamePattern, Plan, Selector};
pub use scheme::{Format, GROUP_SIZES, Scheme};
pub use transform::Transform;
