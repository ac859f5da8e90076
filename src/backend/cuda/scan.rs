//! Launches of `kernels/scan.cu`: the scan over a sequence with its state in registers.

use crate::backend::MambaShape;

/// Threads of a block.
pub const THREADS: usize = 256;

/// Channels of a block.
pub const CHANNELS: usize = 64;

/// States that a block holds.
const STATES: usize = 128;

/// Bytes of what the heads of a group share of a chunk of 64 tokens: C and B in halves, and their products.
pub const SHARED_CHUNK: usize = 2 * (64 * STATES * 4) + 64 * 64 * 4;

/// Bytes of shared memory of `ssd_share`: that, and B by tokens.
pub const SHARE_MEMORY: usize = SHARED_CHUNK + 64 * STATES * 4;

/// Bytes of shared memory of `ssd_scan`: that of two chunks; the state and x, plain and weighted, in halves; three values of each token;
/// two barriers.
pub const SCAN_MEMORY: usize = 2 * SHARED_CHUNK + CHANNELS * STATES * 4 + 2 * CHANNELS * 64 * 4 + 3 * 64 * 4 + 16;

/// Whether these kernels serve models of this shape on GPUs of this architecture (90 for sm_90). They read channels in pairs.
pub fn serves(arch: u32, shape: &MambaShape) -> bool {
    let even = [shape.head_dim, shape.conv_channels(), shape.projected()].into_iter().all(|count| count.is_multiple_of(2));
    super::stream::serves(arch) && super::shared_limit(arch) >= SCAN_MEMORY && shape.state <= STATES && even
}
