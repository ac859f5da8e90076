//! The kernels' sources, compiled into this program.

/// A file of `kernels/`.
pub struct Source {
    pub name: &'static str,
    pub text: &'static str,
}

macro_rules! source {
    ($name:literal) => {
        Source { name: $name, text: include_str!(concat!("../../../kernels/", $name)) }
    };
}

/// What the kernels include.
pub const HEADERS: &[Source] = &[
    source!("device.cuh"),
    source!("experts.cuh"),
    source!("few.cuh"),
    source!("front.cuh"),
    source!("gate.cuh"),
    source!("halves.cuh"),
    source!("ring.cuh"),
    source!("rotate.cuh"),
    source!("rows.cuh"),
    source!("ssd.cuh"),
    source!("ticket.cuh"),
];

/// A translation unit each.
pub const KERNELS: &[Source] = &[
    source!("attention.cu"),
    source!("calibrate.cu"),
    source!("cholesky.cu"),
    source!("conv.cu"),
    source!("embedding.cu"),
    source!("fixed.cu"),
    source!("gemm.cu"),
    source!("gptq.cu"),
    source!("internals.cu"),
    source!("linear_few.cu"),
    source!("logits.cu"),
    source!("moe.cu"),
    source!("norm.cu"),
    source!("scan.cu"),
    source!("ssd.cu"),
    source!("ssm.cu"),
    source!("stream.cu"),
    source!("stream_one.cu"),
    source!("tensor.cu"),
    source!("wgmma.cu"),
];

/// What runs them on the processor: a header in front of each, and the scheduler.
pub const EMULATION_HEADER: Source = source!("host.h");
pub const EMULATION: Source = source!("host.cpp");
