//! Exact integer matrix products: int8 activations times int8, int4, int3 or int2 weights. Start with [`matmul`].
//!
//! *Panel*: 16 rows (outputs) of a weight matrix, interleaved so that a vector register holds 4 consecutive
//! inputs of each of them. *Tile*: the outputs of a few panels and a few tokens, computed together in
//! registers. *Bias*: what is added to a weight code so that it is stored unsigned (128 for int8, 8 for
//! int4), because the byte products of x86 take one unsigned operand; the sums of the activation codes,
//! known beforehand, take it back out. Codes of 3 and 2 bits lie within those of 4 and are laid out as such: what is
//! packed more tightly on disk runs through the int4 kernel.
//!
//! Every instruction set gives the same bits, whatever the number of threads:
//! * int8: `y = acc · (s_x · s_w)`, `acc` the exact dot product as f32, `s_x` the token's scale, `s_w` the row's;
//! * int4: `y = (Σ_g acc_g · s_w[g]) · s_x`, groups added in ascending order, multiply and add rounded apart.
//!
//! Sums stay within i32 for up to 2³¹ / (127 · 128) = 132 104 inputs.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod packed;
mod portable;
mod rows;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::OnceLock;

use rayon::prelude::*;

use super::operations;

pub use packed::PackedMatrix;
pub use rows::QuantizedRows;

/// Outputs (rows of the weight matrix) in a panel.
pub(super) const PANEL: usize = 16;

/// Token × panel pairs that a tile holds at most.
const TILE: usize = 16;

/// Tokens that a task goes through for each of its panels: 256 rows of activations stay in the caches that cores
/// share while the panels of a wide matrix pass by.
const TASK_TOKENS: usize = 256;

/// Products below which starting another task costs more than it gains (some 10 µs of one core).
const TASK_PRODUCTS: usize = 1 << 19;

/// The instruction sets that have a kernel, chosen at run time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    Avx512Vnni,
    Avx2,
    Portable,
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Avx512Vnni => "avx512-vnni",
            Self::Avx2 => "avx2",
            Self::Portable => "portable",
        })
    }
}

impl Isa {
    const ALL: [Self; 3] = [Self::Avx512Vnni, Self::Avx2, Self::Portable];

    /// The fastest that this machine has.
    pub fn best() -> Self {
        static BEST: OnceLock<Isa> = OnceLock::new();
        *BEST.get_or_init(|| Self::ALL.into_iter().find(|isa| isa.is_available()).unwrap_or(Self::Portable))
    }

    /// All that this machine has, fastest first.
    pub fn available() -> Vec<Self> {
        Self::ALL.into_iter().filter(|isa| isa.is_available()).collect()
    }

    fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        match self {
            Self::Avx512Vnni => {
                return is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vnni");
            }
            Self::Avx2 => return is_x86_feature_detected!("avx2"),
            Self::Portable => {}
        }
        self == Self::Portable
    }

    /// Tokens and panels of a tile when `tokens` tokens are multiplied. One token takes several panels, to have
    /// enough independent sums in flight; more tokens share each weight that is loaded.
    fn tile_shape(self, tokens: usize) -> (usize, usize) {
        match (self, tokens) {
            (Self::Avx512Vnni, 1) => (1, 4),
            (Self::Avx512Vnni, _) => (8, 2),
            (Self::Avx2, _) => (2, 1),
            (Self::Portable, _) => (TILE, 1),
        }
    }
}

/// The outputs that a kernel computes in one go: `panels` from `panel`, for `tokens` from `token`.
#[derive(Debug, Clone, Copy)]
struct Window {
    panel: usize,
    panels: usize,
    token: usize,
    tokens: usize,
}

/// Results of a window: element `t · panels + p` has the 16 outputs of panel `p` for token `t`.
type Tile = [[f32; PANEL]; TILE];

/// `out[t·stride + offset + r] = Σ_c x[t, c] · w[r, c]` for every token `t` and row `r`, on the fastest instruction
/// set. Uses the current rayon pool; small products stay on the calling thread.
pub fn matmul(weights: &PackedMatrix, x: &QuantizedRows, out: &mut [f32], stride: usize, offset: usize) {
    matmul_with(Isa::best(), weights, x, out, stride, offset);
}

/// [`matmul`] on one instruction set; one that the machine lacks is replaced by [`Isa::Portable`].
pub fn matmul_with(isa: Isa, weights: &PackedMatrix, x: &QuantizedRows, out: &mut [f32], stride: usize, offset: usize) {
    let isa = if isa.is_available() { isa } else { Isa::Portable };
    let (rows, tokens) = (weights.rows(), x.tokens);
    if rows == 0 || tokens == 0 {
        return;
    }
    // The kernels and the writes below rely on these.
    assert_eq!(weights.cols(), x.cols, "weights and activations differ in width");
    assert!(x.is_consistent(), "the activations' public fields disagree with their codes");
    assert!(offset + rows <= stride || tokens == 1, "the rows of the output overlap");
    assert!((tokens - 1) * stride + offset + rows <= out.len(), "the output is too short");

    operations::count_int8(rows * weights.cols() * tokens);
    let (tile_tokens, tile_panels) = isa.tile_shape(tokens);
    let panel_groups = weights.panels().div_ceil(tile_panels);
    let tasks = panel_groups * tokens.div_ceil(TASK_TOKENS);
    let products = tile_panels * PANEL * weights.cols() * tokens.min(TASK_TOKENS);
    let tasks_in_a_job = TASK_PRODUCTS.div_ceil(products.max(1));
    let out = Output { start: out.as_mut_ptr(), stride, offset };

    // Tasks next to each other share activations, so that threads running at the same time do too.
    let task = |index: usize| {
        let (block, group) = (index / panel_groups, index % panel_groups);
        let panel = group * tile_panels;
        let panels = tile_panels.min(weights.panels() - panel);
        let block = block * TASK_TOKENS..tokens.min((block + 1) * TASK_TOKENS);
        let mut tile: Tile = [[0.0; PANEL]; TILE];
        for token in block.clone().step_by(tile_tokens) {
            let window = Window { panel, panels, token, tokens: tile_tokens.min(block.end - token) };
            run(isa, weights, x, window, &mut tile);
            // SAFETY: the assertions above put every output of the window inside the slice; tasks have windows
            // of their own, so that no two write to the same place, and the slice is borrowed mutably until
            // all have finished.
            unsafe { out.write(&tile, window, window_rows(weights, window)) };
        }
    };
    if tasks <= tasks_in_a_job || rayon::current_num_threads() == 1 {
        (0..tasks).for_each(task);
    } else {
        (0..tasks).into_par_iter().with_min_len(tasks_in_a_job).for_each(task);
    }
}

/// Rows of the weight matrix that a window covers; its last panel may hold fewer than 16.
fn window_rows(weights: &PackedMatrix, window: Window) -> Range<usize> {
    window.panel * PANEL..weights.rows().min((window.panel + window.panels) * PANEL)
}

/// Computes one window. `isa` is available, and the window lies within `weights` and `x`.
fn run(isa: Isa, weights: &PackedMatrix, x: &QuantizedRows, window: Window, tile: &mut Tile) {
    #[cfg(target_arch = "x86_64")]
    match isa {
        // SAFETY: `matmul_with` goes on only with an instruction set that the machine has.
        Isa::Avx512Vnni => return unsafe { avx512::run(weights, x, window, tile) },
        // SAFETY: as above.
        Isa::Avx2 => return unsafe { avx2::run(weights, x, window, tile) },
        Isa::Portable => {}
    }
    debug_assert_eq!(isa, Isa::Portable);
    portable::run(weights, x, window, tile);
}

/// The slice that receives the product, shared by tasks that write to separate places.
struct Output {
    start: *mut f32,
    stride: usize,
    offset: usize,
}

// SAFETY: the pointer is only written through by `write`, whose callers keep to places of their own.
unsafe impl Sync for Output {}

impl Output {
    /// Copies the outputs `rows` of a window to their places.
    ///
    /// # Safety
    /// `rows` of every token of the window lie inside the slice, and nothing else reads or writes them now.
    unsafe fn write(&self, tile: &Tile, window: Window, rows: Range<usize>) {
        for (t, panels) in tile.chunks_exact(window.panels).take(window.tokens).enumerate() {
            for (row, values) in rows.clone().step_by(PANEL).zip(panels) {
                let place = (window.token + t) * self.stride + self.offset + row;
                // SAFETY: the caller's promise; a full panel is written in one go, the last one as far as it goes.
                unsafe {
                    let place = self.start.add(place);
                    if rows.end - row >= PANEL {
                        place.cast::<[f32; PANEL]>().write_unaligned(*values);
                    } else {
                        place.copy_from_nonoverlapping(values.as_ptr(), rows.end - row);
                    }
                }
            }
        }
    }
}
