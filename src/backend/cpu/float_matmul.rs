//! Products of f32 activations with weights in any form: floats, or codes of formats that leave activations in 16 bits.
//!
//! Many tokens go through candle's matrix product, on weights expanded to f32 where they are kept in fewer bits. Up to
//! [`FEW`] tokens are bound by reading the weights: they are read once, as they are kept, and become floats in
//! registers. There a row's products are added in the order of [`math::dot`], by one thread each: the same bits on every
//! instruction set and for any number of threads.

use candle_core::Tensor;
use half::bf16;
use multiversion::multiversion;
use rayon::prelude::*;

use super::int_matmul::{PANEL, PackedMatrix};
use super::math::{self, Value};
use super::{operations, tensor, with_values};
use crate::error::Result;

/// Tokens up to which weights are multiplied as they are read.
const FEW: usize = 8;

/// Products below which another task costs more than it gains (some 10 µs of one core).
const TASK_PRODUCTS: usize = 1 << 17;

/// Weights that are expanded to f32 at a time, at most: 64 MiB.
pub const EXPANDED: usize = 1 << 24;

/// Weights that a task expands or looks at.
const RUN: usize = 1 << 16;

/// A float matrix `[rows, cols]`, in 16 bits where that is exact.
pub struct FloatMatrix {
    rows: usize,
    cols: usize,
    values: Values,
}

enum Values {
    F32(Tensor),
    Bf16(Vec<bf16>),
}

impl FloatMatrix {
    /// Keeps `values` `[rows, cols]` as bf16 when every one of them is a bf16, as in most checkpoints.
    pub fn new(values: Vec<f32>, cols: usize) -> Result<Self> {
        let rows = values.len() / cols;
        let exact = values.par_chunks(RUN).all(|values| values.iter().all(|value| value.to_bits().trailing_zeros() >= 16));
        let values =
            if exact { Values::Bf16(values.into_par_iter().map(bf16::from_f32).collect()) } else { Values::F32(tensor(values, cols)?) };
        Ok(Self { rows, cols, values })
    }

    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        let width = match self.values {
            Values::F32(_) => 4,
            Values::Bf16(_) => 2,
        };
        (width * self.rows * self.cols) as u64
    }

    /// `x` `[tokens, cols]` times the transposed matrix: `[tokens, rows]`.
    pub fn product(&self, x: &Tensor) -> Result<Tensor> {
        let tokens = x.dims()[0];
        operations::count_float(tokens * self.rows * self.cols);
        let few = tokens <= FEW;
        match &self.values {
            Values::F32(weights) if few => with_values(weights, |weights| with_values(x, |x| self.few(weights, x, few_f32)))??,
            Values::Bf16(weights) if few => with_values(x, |x| self.few(weights, x, few_bf16))?,
            Values::F32(weights) => Ok(x.matmul(&weights.t()?)?),
            Values::Bf16(weights) => by_pieces(self.rows, self.cols, x, |first, values| {
                let weights = &weights[first * self.cols..first * self.cols + values.len()];
                values.par_chunks_mut(RUN).zip(weights.par_chunks(RUN)).for_each(|(values, weights)| expand(weights, values));
            }),
        }
    }

    /// Appends row `row` to `out`.
    pub fn append_row(&self, row: usize, out: &mut Vec<f32>) -> Result<()> {
        let range = row * self.cols..(row + 1) * self.cols;
        match &self.values {
            Values::F32(values) => with_values(values, |values| out.extend_from_slice(&values[range])),
            Values::Bf16(values) => {
                out.extend(values[range].iter().map(|value| value.float()));
                Ok(())
            }
        }
    }

    fn few<W: Sync>(&self, weights: &[W], x: &[f32], kernel: fn(&[W], &[f32], usize, &mut [f32])) -> Result<Tensor> {
        by_rows(self.rows, self.cols, 1, x, |first, out| {
            let rows = out.len() / (x.len() / self.cols);
            kernel(&weights[first * self.cols..(first + rows) * self.cols], x, self.cols, out);
        })
    }
}

/// `x` `[tokens, cols]` times the transposed matrix whose codes are `weights`: `[tokens, rows]`.
pub fn packed_product(weights: &PackedMatrix, x: &Tensor) -> Result<Tensor> {
    let (tokens, rows, cols) = (x.dims()[0], weights.rows(), weights.cols());
    operations::count_float(tokens * rows * cols);
    if tokens > FEW {
        return by_pieces(rows, cols, x, |first, values| weights.dequantize_into(first, values));
    }
    with_values(x, |x| by_rows(rows, cols, PANEL, x, |first, out| weights.few_floats(first / PANEL, x, out)))?
}

/// The product with a matrix that `expand` writes out in f32, some rows from a given one on, at most [`EXPANDED`] values
/// at a time.
fn by_pieces(rows: usize, cols: usize, x: &Tensor, expand: impl Fn(usize, &mut [f32])) -> Result<Tensor> {
    let tokens = x.dims()[0];
    let piece = |first: usize, rows: usize| -> Result<Tensor> {
        let mut values = vec![0.0; rows * cols];
        expand(first, &mut values);
        Ok(x.matmul(&tensor(values, cols)?.t()?)?)
    };
    let in_piece = (EXPANDED / cols).max(1);
    if rows <= in_piece {
        return piece(0, rows);
    }
    let mut out = vec![0.0; tokens * rows];
    for first in (0..rows).step_by(in_piece) {
        let width = in_piece.min(rows - first);
        with_values(&piece(first, width)?, |values| {
            for (out, row) in out.chunks_exact_mut(rows).zip(values.chunks_exact(width)) {
                out[first..first + width].copy_from_slice(row);
            }
        })?;
    }
    tensor(out, rows)
}

/// Calls `compute` for runs of whole `step`s of rows, with the first row and the place of the run's products
/// `[rows, tokens]`, and lays these out as `[tokens, rows]`.
fn by_rows(rows: usize, cols: usize, step: usize, x: &[f32], compute: impl Fn(usize, &mut [f32]) + Sync) -> Result<Tensor> {
    let tokens = x.len() / cols;
    let task_rows = (TASK_PRODUCTS / (tokens * cols).max(1)).max(1).next_multiple_of(step);
    let mut out = vec![0.0; rows * tokens];
    let task = |(index, out): (usize, &mut [f32])| compute(index * task_rows, out);
    if rows <= task_rows {
        task((0, &mut out));
    } else {
        out.par_chunks_mut(task_rows * tokens).enumerate().for_each(task);
    }
    if tokens > 1 {
        out = (0..tokens).flat_map(|token| out[token..].iter().step_by(tokens)).copied().collect();
    }
    tensor(out, rows)
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn few_f32(weights: &[f32], x: &[f32], cols: usize, out: &mut [f32]) {
    few(weights, x, cols, out);
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn few_bf16(weights: &[bf16], x: &[f32], cols: usize, out: &mut [f32]) {
    few(weights, x, cols, out);
}

/// `out` `[rows, tokens]` from `weights` `[rows, cols]` and `x` `[tokens, cols]`.
#[inline(always)]
fn few<W: Value>(weights: &[W], x: &[f32], cols: usize, out: &mut [f32]) {
    for (row, out) in weights.chunks_exact(cols).zip(out.chunks_exact_mut(x.len() / cols)) {
        for (x, out) in x.chunks_exact(cols).zip(out) {
            *out = math::dot(row, x);
        }
    }
}

#[multiversion(targets("x86_64+avx512f+avx512bw+avx512dq+avx512vl", "x86_64+avx2"))]
fn expand(weights: &[bf16], values: &mut [f32]) {
    for (value, weight) in values.iter_mut().zip(weights) {
        *value = weight.float();
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::backend::cpu::with_values;
    use crate::format::{QuantizedMatrix, Scheme};

    /// Numbers in −1…1 that 8 significant bits hold when `short`.
    fn numbers(count: usize, seed: u32, short: bool) -> Vec<f32> {
        let number = |i: usize| {
            let bits = (i as u32).wrapping_add(seed).wrapping_mul(2_654_435_761);
            if short { f32::from((bits >> 24) as u8) / 128.0 - 1.0 } else { (bits >> 8) as f32 / 8_388_608.0 - 1.0 }
        };
        (0..count).map(number).collect()
    }

    /// Holds `product` `[tokens, rows]` against sums in f64, to 1e-6 of the sum of magnitudes.
    fn check(product: &Tensor, weights: &[f32], x: &[f32], cols: usize) {
        let (tokens, rows) = product.dims2().unwrap();
        assert_eq!((tokens * cols, rows * cols), (x.len(), weights.len()));
        with_values(product, |product| {
            for (t, x) in x.chunks_exact(cols).enumerate() {
                for (r, weights) in weights.chunks_exact(cols).enumerate() {
                    let products = || weights.iter().zip(x).map(|(w, x)| f64::from(*w) * f64::from(*x));
                    let difference = f64::from(product[t * rows + r]) - products().sum::<f64>();
                    let magnitude: f64 = products().map(f64::abs).sum();
                    assert!(difference.abs() <= 1e-6 * magnitude + 1e-12, "token {t}, row {r}: off by {difference:e}");
                }
            }
        })
        .unwrap();
    }

    #[rstest]
    fn floats_agree_with_float64(
        #[values(1, 3, 4, 37)] rows: usize,
        #[values(1, 16, 50, 256)] cols: usize,
        #[values(1, 2, FEW, FEW + 1)] tokens: usize,
        #[values(true, false)] short: bool,
    ) {
        let (weights, x) = (numbers(rows * cols, 1, short), numbers(tokens * cols, 7, false));
        let matrix = FloatMatrix::new(weights.clone(), cols).unwrap();
        assert_eq!(matrix.bytes(), ((if short { 2 } else { 4 }) * rows * cols) as u64);
        check(&matrix.product(&tensor(x.clone(), cols).unwrap()).unwrap(), &weights, &x, cols);
        let mut row = vec![0.5];
        matrix.append_row(rows - 1, &mut row).unwrap();
        assert_eq!((row[0], &row[1..]), (0.5, &weights[(rows - 1) * cols..]));
    }

    #[rstest]
    fn codes_agree_with_float64(
        #[values(1, 16, 37)] rows: usize,
        #[values((Scheme::Int8, 50), (Scheme::Int8, 7), (Scheme::Grouped { bits: 4, group: 32 }, 96), (Scheme::Grouped { bits: 4, group: 128 }, 256))]
        (scheme, cols): (Scheme, usize),
        #[values(1, 3, FEW + 1)] tokens: usize,
    ) {
        let (largest, groups) = match scheme {
            Scheme::Grouped { group, .. } => (7, cols / group),
            _ => (127, 1),
        };
        let codes: Vec<i8> = numbers(rows * cols, 3, false).iter().map(|x| (x * largest as f32) as i8).collect();
        let scales = numbers(rows * groups, 5, true);
        let scale = |i: usize| scales[i / cols * groups + i % cols / (cols / groups)];
        let weights: Vec<f32> = codes.iter().enumerate().map(|(i, code)| f32::from(*code) * scale(i)).collect();
        let packed = PackedMatrix::new(&QuantizedMatrix { scheme, rows, cols, codes, scales: scales.clone() });
        let x = numbers(tokens * cols, 11, false);
        check(&packed_product(&packed, &tensor(x.clone(), cols).unwrap()).unwrap(), &weights, &x, cols);
    }

    #[test]
    fn threads_and_neighbours_change_no_bit() {
        let (rows, cols) = (1100, 512);
        let matrix = FloatMatrix::new(numbers(rows * cols, 1, true), cols).unwrap();
        let x = numbers(3 * cols, 2, false);
        let product = |threads: usize, x: &[f32]| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            let product = pool.install(|| matrix.product(&tensor(x.to_vec(), cols).unwrap())).unwrap();
            with_values(&product, <[f32]>::to_vec).unwrap()
        };
        assert_eq!(product(1, &x), product(3, &x));
        assert_eq!(product(1, &x)[rows..2 * rows], product(2, &x[cols..2 * cols]));
    }

    #[test]
    fn pieces_of_a_large_matrix_are_put_side_by_side() {
        let (rows, cols) = (70, 1 << 19);
        let x = tensor(numbers(2 * cols, 2, false), cols).unwrap();
        let row = |r: usize| r as f32;
        let product = by_pieces(rows, cols, &x, |first, values| {
            values.chunks_exact_mut(cols).enumerate().for_each(|(r, values)| values.fill(row(first + r)));
        });
        let one = by_pieces(1, cols, &x, |_, values| values.fill(1.0)).unwrap();
        let values = |product: &Tensor| with_values(product, <[f32]>::to_vec).unwrap();
        let (product, one) = (values(&product.unwrap()), values(&one));
        for (t, product) in product.chunks_exact(rows).enumerate() {
            for (r, product) in product.iter().enumerate() {
                assert!((product - row(r) * one[t]).abs() <= 1e-3 * (1.0 + row(r) * one[t].abs()), "token {t}, row {r}");
            }
        }
    }
}
