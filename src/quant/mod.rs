//! Quantization: recipes, the sample text, weight methods, and the pipeline that makes a variant on disk.
//! Start with [`quantize`].

mod asymmetric;
mod boundary;
mod calibrate;
mod clip;
mod cluster;
mod device_need;
pub mod donors;
mod eigen;
pub mod gptq;
pub mod hadamard;
mod hessian;
mod method;
mod need;
mod observe;
pub mod overlap;
mod pipeline;
mod publish;
mod recipe;
mod sample;
mod smooth;
mod transform;
mod weights;

pub use device_need::{DeviceNeed, Room, Shapes};
pub use donors::Donors;
pub use gptq::round_clipped;
pub use need::MemoryNeed;
pub use observe::Observers;
pub use pipeline::{QuantizeRequest, quantize, request_key};
pub(crate) use publish::write_views;
pub use publish::{lock, work_directory};
pub use recipe::{AllocateSpec, Formats, Internals, Method, Override, RECIPE_SCHEMA, Recipe, Steps};
pub use sample::{Sample, SampleSpec};

/// Has faer divide nothing among threads but what it is told to: results must not depend on how many there are.
fn divide_nothing() {
    faer::set_global_parallelism(faer::Par::Seq);
}
