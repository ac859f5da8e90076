//! Every kernel against a reference on the CPU, on any [`Device`](super::device::Device): the emulated one in tests, the GPU in
//! `strata bench --verify`. Integer kernels are compared exactly with the CPU backend's, float kernels with f64. Start with
//! [`checks`].

mod attention;
mod calibration;
mod fronts;
mod internals;
mod linears;
mod mamba;
mod moe;
mod rows;

use std::sync::Arc;

use super::device::{Arguments, Buffer, Grid, Memory, Plain};
use super::stream;
use crate::error::Result;

/// Exact results: not one element may differ.
pub const EXACT: f64 = 0.0;
/// Sums in f32 in an order of their own, and the machine's `exp`: a few units in the last place of the largest result.
pub const FLOAT: f64 = 2e-5;
/// Products whose operands are split into two bf16: 2^-17 of each term, and what a sum of such terms amounts to.
pub const HALVES: f64 = 5e-5;
/// Weights rounded to bf16 on their way to the tensor cores (int4 × 16 bits in prefill).
pub const BF16_WEIGHTS: f64 = 4e-3;
/// Results that are stored in f16, bf16 or int8 may fall on the other side of a rounding.
pub const STORED: f64 = 1e-2;

/// Runs a check; returns its error.
type Run = Box<dyn Fn(&Lab) -> Result<f64> + Send + Sync>;

/// One kernel on one shape.
pub struct Check {
    pub kernel: &'static str,
    pub shape: String,
    /// Largest error that passes, as a share of the largest reference value.
    pub tolerance: f64,
    run: Run,
}

impl Check {
    fn new(
        kernel: &'static str,
        shape: impl Into<String>,
        tolerance: f64,
        run: impl Fn(&Lab) -> Result<f64> + Send + Sync + 'static,
    ) -> Self {
        Self { kernel, shape: shape.into(), tolerance, run: Box::new(run) }
    }

    /// The error that the kernel makes on `memory`'s device, on inputs that follow from `seed`; NaN where a result is one, or was
    /// not written.
    pub fn error(&self, memory: &Arc<Memory>, seed: u64) -> Result<f64> {
        (self.run)(&Lab { memory: Arc::clone(memory), seed })
    }

    /// Whether that error passes.
    pub fn passes(&self, error: f64) -> bool {
        error <= self.tolerance
    }
}

/// How large the shapes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// Small ones with every kind of remainder: for emulation.
    Small,
    /// Those and the published models' own.
    Published,
}

/// Every check of a device of this architecture (90 for sm_90; 0: emulated).
pub fn checks(extent: Extent, arch: u32) -> Vec<Check> {
    let kernels: [fn(Extent) -> Vec<Check>; 5] = [rows::checks, internals::checks, attention::checks, moe::checks, calibration::checks];
    let others = kernels.into_iter().flat_map(|checks| checks(extent));
    // Emulation has every architecture's kernels.
    let fronts = if arch == 0 || stream::serves(arch) { fronts::checks(extent, arch) } else { Vec::new() };
    linears::checks(extent, arch).into_iter().chain(fronts).chain(mamba::checks(extent, arch)).chain(others).collect()
}

/// Where a check runs.
struct Lab {
    memory: Arc<Memory>,
    seed: u64,
}

impl Lab {
    /// Values of about a normal distribution, never the same for two `stream`s.
    fn normal(&self, stream: u64, count: usize) -> Vec<f32> {
        let mut state = (self.seed << 8 | stream).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
        let mut uniform = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u64 << 24) as f32 - 0.5
        };
        (0..count).map(|_| (uniform() + uniform() + uniform()) * 2.0).collect()
    }

    fn put<T: Plain>(&self, values: &[T]) -> Result<Buffer> {
        let buffer = self.memory.allocate(size_of_val(values).max(1))?;
        buffer.upload(values)?;
        Ok(buffer)
    }

    /// Memory for `count` values that reads as NaN, or −1, until it is written.
    fn poisoned<T: Plain>(&self, count: usize) -> Result<Buffer> {
        self.put(&vec![0xff_u8; count * size_of::<T>()])
    }

    fn launch(&self, kernel: &str, blocks: [usize; 3], threads: usize, shared: usize, arguments: Arguments) -> Result<()> {
        let grid = Grid { blocks: blocks.map(|n| n as u32), threads: [threads as u32, 1, 1], shared: shared as u32 };
        // SAFETY: each check passes what `kernels/README.md` says of its kernel, with buffers of the sizes it says.
        unsafe { arguments.launch(&*self.memory.device, kernel, grid) }
    }
}

/// Largest difference as a share of the largest reference value; NaN where a result is NaN or the lengths differ.
fn difference(found: &[f32], reference: &[f64]) -> f64 {
    if found.len() != reference.len() {
        return f64::NAN;
    }
    let largest = reference.iter().fold(1e-30_f64, |max, x| max.max(x.abs()));
    let differences = found.iter().zip(reference).map(|(found, reference)| (f64::from(*found) - reference).abs());
    // `max` would drop a NaN.
    differences.fold(0.0_f64, |max, x| if x > max || x.is_nan() { x } else { max }) / largest
}

/// How many elements differ.
fn mismatches<T: PartialEq>(found: &[T], reference: &[T]) -> f64 {
    if found.len() != reference.len() {
        return f64::NAN;
    }
    found.iter().zip(reference).filter(|(a, b)| a != b).count() as f64
}

/// The worse of two errors, NaN being the worst.
fn worse(a: f64, b: f64) -> f64 {
    if a.is_nan() || a > b { a } else { b }
}

/// Inputs or codes of a row as they lie in memory: a multiple of 64.
fn padded(cols: usize) -> usize {
    cols.next_multiple_of(64)
}

/// Rows of `cols` values with zeros behind, `[rows, padded(cols)]`.
fn pad<T: Copy + Default>(values: &[T], cols: usize) -> Vec<T> {
    let mut out = Vec::with_capacity(values.len() / cols * padded(cols));
    for row in values.chunks_exact(cols) {
        out.extend_from_slice(row);
        out.resize(out.len() + padded(cols) - cols, T::default());
    }
    out
}

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().map(|x| f64::from(*x)).collect()
}
