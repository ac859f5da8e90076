//! How many products the kernels of this process have computed, by kind of arithmetic: what a test holds against the
//! plan.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

static INT8: AtomicU64 = AtomicU64::new(0);
static FLOAT: AtomicU64 = AtomicU64::new(0);

/// Products of linears, convolutions, attention, and of C and B inside a chunk. The scan's products with decays, norms
/// and activation functions are not counted: they are floats always.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Products {
    /// int8 × int8, added in int32.
    pub int8: u64,
    /// f32 × f32.
    pub float: u64,
}

/// Counts since the process began.
pub fn products() -> Products {
    Products { int8: INT8.load(Relaxed), float: FLOAT.load(Relaxed) }
}

pub(super) fn count_int8(products: usize) {
    INT8.fetch_add(products as u64, Relaxed);
}

pub(super) fn count_float(products: usize) {
    FLOAT.fetch_add(products as u64, Relaxed);
}
