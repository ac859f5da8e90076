//! What operations take of a device's memory, from shapes: buffers as [`super::device::Memory`] hands them out, those of an
//! operation that are there at once added up. For predictions; the operations themselves ask nobody.

use super::calibration::{BLOCK, MANY, SIDE, WIDE};
use super::device::rounded;
use super::linear::{FEW, NARROW};
use super::padded;
use super::scan;
use super::turn::OUTPUTS;
use crate::backend::{AttentionShape, MambaShape, RouterShape, SSM_CHUNK, Side};
use crate::format::Scheme;

/// How weights lie on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    F32,
    /// What bf16 holds exactly.
    Bf16,
    Quantized(Scheme),
}

/// A buffer of `bytes` bytes.
pub fn buffer(bytes: usize) -> u64 {
    rounded(bytes) as u64
}

/// `[rows, cols]` in f32.
pub fn tensor(rows: usize, cols: usize) -> u64 {
    buffer(4 * rows * cols)
}

/// Weights `[rows, cols]`.
pub fn weights(kept: Kept, rows: usize, cols: usize) -> u64 {
    match kept {
        Kept::F32 | Kept::Quantized(Scheme::Float) => tensor(rows, cols),
        Kept::Bf16 => buffer(2 * rows * padded(cols)),
        Kept::Quantized(Scheme::Int8) => buffer(rows * padded(cols)) + tensor(rows, 1),
        // Fewer bits than four take the room of four.
        Kept::Quantized(Scheme::Grouped { group, .. }) => buffer(rows * padded(cols) / 2) + buffer(2 * rows * (cols / group)),
    }
}

/// What a linear `[rows, cols]` reads, in f32 and bf16, and puts out for `tokens` tokens.
pub fn activations(rows: usize, cols: usize, tokens: usize) -> u64 {
    tensor(tokens, cols) + buffer(2 * tokens * padded(cols)) + tensor(tokens, rows)
}

/// The halves of both operands of a product of f32 weights, and what is then added to a residual.
pub fn product(kept: Kept, rows: usize, cols: usize, tokens: usize) -> u64 {
    let halves = match kept {
        Kept::F32 if rows >= NARROW && tokens > FEW => 2 * buffer(2 * rows * cols) + 2 * buffer(2 * tokens * cols),
        Kept::F32 | Kept::Bf16 | Kept::Quantized(_) => 0,
    };
    halves + tensor(tokens, rows)
}

/// `Σ x xᵀ` of `features` features.
pub fn gram(features: usize) -> u64 {
    buffer(8 * features * features)
}

/// What adding `tokens` tokens to it takes besides.
pub fn add_gram(features: usize, tokens: usize) -> u64 {
    if features >= WIDE && tokens >= MANY { 2 * buffer(2 * tokens * features) + 2 * tensor(features, features) } else { 0 }
}

/// GPTQ of weights `[rows, cols]` in groups of `group` columns, beside the Hessian: the factorization, rounding, coordinate descent.
pub fn gptq(rows: usize, cols: usize, group: usize) -> u64 {
    let (n, groups) = (cols.next_multiple_of(SIDE), cols.div_ceil(group.max(1)));
    let held = tensor(rows, cols) + tensor(cols, 1) + buffer(8 * cols);
    let (factor, square, inverses) = (tensor(cols, cols), buffer(8 * n * n), buffer(8 * n * SIDE));
    let factorization = inverses + square + square.max(factor);
    let codes = buffer(rows * cols) + tensor(rows, groups) + tensor(rows, BLOCK);
    let rounding = factor + tensor(rows, cols) + codes;
    held + factorization.max(rounding)
}

/// Turning weights `[rows, cols]` by a rotation.
pub fn turn(rows: usize, cols: usize, side: Side) -> u64 {
    let (width, tile) = match side {
        Side::Inputs => (cols, rows.min(OUTPUTS)),
        Side::Outputs => (rows, rows),
    };
    buffer(8 * width * width) + 2 * buffer(8 * tile * cols)
}

/// The scan of a mixer, `in_proj`'s output and what gates the scan's not counted: x | B | C, dt, states at the beginning of each chunk and
/// of a cache, y, the gate of int8 internals.
pub fn scan(shape: &MambaShape, tokens: usize) -> u64 {
    let state = shape.inner() * shape.state;
    let cache = tensor(shape.kernel, shape.conv_channels()) + tensor(1, state);
    let codes = buffer(tokens * shape.projected()) + tensor(tokens, shape.projected().div_ceil(shape.head_dim.min(shape.state)));
    let rows = tensor(tokens, shape.conv_channels()) + 2 * tensor(tokens, shape.heads) + 2 * tensor(tokens, shape.inner());
    let chunks = tokens.div_ceil(SSM_CHUNK);
    // Hopper's scan keeps states in registers, and instead what the heads of a group share.
    let shared = if scan::serves(90, shape) { buffer(chunks * shape.groups * scan::SHARED_CHUNK) } else { 0 };
    cache + codes + rows + tensor(chunks, state).max(shared)
}

/// Attention of `tokens` tokens; a cache of a text of `longest` tokens, which doubles when it is full, where that is more.
pub fn attention(shape: &AttentionShape, tokens: usize, longest: usize) -> u64 {
    let cache = if longest > tokens { 3 * tensor(longest.next_power_of_two(), shape.kv_heads * shape.head_dim) } else { 0 };
    tensor(tokens, shape.heads * shape.head_dim) + cache
}

/// Experts `[inner, width]` and back for `tokens` tokens, at once or, each with all tokens at worst, one after another.
pub fn mixture(shape: &RouterShape, kept: Kept, inner: usize, width: usize, tokens: usize) -> u64 {
    let pairs = tokens * shape.experts_per_token;
    let choice = 5 * tensor(pairs + shape.experts * 16, 1) + 2 * tensor(tokens, shape.experts);
    let at_once = 3 * tensor(pairs, inner) + tensor(pairs, width);
    let both = activations(inner, width, tokens) + activations(width, inner, tokens);
    let alone = both + product(kept, inner, width, tokens).max(product(kept, width, inner, tokens));
    choice + 2 * tensor(tokens, width) + at_once.max(alone)
}
