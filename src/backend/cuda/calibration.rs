//! Calibration and GPTQ on the device: sums of outer products, which stay there as Hessians; the factor of the inverse Hessian,
//! rounding column by column and coordinate descent behind it. The same codes as the CPU's to the bit from the same Hessian's
//! factor.

use super::device::{Arguments, Buffer, Element, Gemm};
use super::{Cuda, CudaActivation, CudaTensor};
use crate::backend::{Gptq, GptqCodes};
use crate::error::{Error, Result};
use crate::format::Scheme;

/// Columns that GPTQ takes at a time.
pub(super) const BLOCK: usize = 128;
/// Side of a block of the factorization.
pub(super) const SIDE: usize = 64;
/// Features and tokens from which sums of outer products go through matrix products of halves.
pub(super) const WIDE: usize = 256;
pub(super) const MANY: usize = 64;

/// `Σ x xᵀ` `[features, features]` in f64.
pub struct Gram {
    features: usize,
    sum: Buffer,
}

impl Gram {
    pub(super) fn values(&self) -> Result<Vec<f64>> {
        self.sum.download(self.features * self.features)
    }

    #[cfg(test)]
    pub(super) fn of(cuda: &Cuda, values: &[f64]) -> Result<Self> {
        Ok(Self { features: values.len().isqrt(), sum: cuda.upload_values(values)? })
    }
}

impl Cuda {
    /// See [`crate::backend::Backend::add_gram`].
    pub(super) fn add_to_gram(&self, gram: &mut Option<Gram>, x: &CudaActivation) -> Result<()> {
        let x = self.float(x)?;
        if gram.is_none() {
            let sum = self.buffer::<f64>(x.cols * x.cols)?;
            sum.zero()?;
            *gram = Some(Gram { features: x.cols, sum });
        }
        let Some(gram) = gram.as_ref().filter(|gram| gram.features == x.cols) else {
            return Err(Error::run("a sum of outer products was given inputs of another width"));
        };
        if x.cols >= WIDE && x.rows >= MANY && self.add_halves(gram, x)? {
            return Ok(());
        }
        let tiles = x.cols.div_ceil(64);
        let arguments = Arguments::default().with(x.buffer()).with(x.rows).with(x.cols).with(&gram.sum);
        self.launch("gram", [tiles, tiles, 1], 256, 0, arguments)
    }

    /// By cuBLAS on the tensor cores: x = high + low in bf16, `xᵀx = hᵀh + hᵀl + (hᵀl)ᵀ` but for lᵀl, 2^-16 of it. `false` without
    /// cuBLAS.
    fn add_halves(&self, gram: &Gram, x: &CudaTensor) -> Result<bool> {
        let (tokens, n) = (x.rows, x.cols);
        let (high, low) = self.split(x.buffer(), tokens * n)?;
        let (own, cross) = (self.buffer::<f32>(n * n)?, self.buffer::<f32>(n * n)?);
        for (right, out) in [(&high, &own), (&low, &cross)] {
            let gemm = Gemm {
                element: Element::Bf16,
                m: n,
                n,
                k: tokens,
                a: (high.address(), n),
                b: (right.address(), n),
                c: (out.address(), n),
                alpha: 1.0,
                beta: 0.0,
                a_transposed: true,
                b_transposed: true,
            };
            // SAFETY: the buffers were allocated for these shapes.
            if !unsafe { self.device().gemm(&gemm)? } {
                return Ok(false);
            }
        }
        let arguments = Arguments::default().with(&own).with(&cross).with(n).with(&gram.sum);
        self.launch("gram_add", [n.div_ceil(32), n.div_ceil(32), 1], 256, 0, arguments)?;
        Ok(true)
    }

    /// See [`crate::backend::Backend::gram_diagonal`].
    pub(super) fn diagonal(&self, gram: &Gram) -> Result<Vec<f64>> {
        let n = gram.features;
        let out = self.buffer::<f64>(n)?;
        self.launch("gram_diagonal", [n.div_ceil(256), 1, 1], 256, 0, Arguments::default().with(&gram.sum).with(n).with(&out))?;
        out.download(n)
    }

    pub(super) fn magnitudes(&self, x: &CudaTensor) -> Result<Vec<f32>> {
        let out = self.buffer::<f32>(x.cols)?;
        out.zero()?;
        let arguments = Arguments::default().with(x.buffer()).with(x.rows).with(x.cols).with(&out);
        self.launch("abs_max", [x.cols.div_ceil(128), 1, 1], 128, 0, arguments)?;
        out.download(x.cols)
    }

    pub(super) fn difference(&self, a: &CudaTensor, b: &CudaTensor) -> Result<(f64, f64)> {
        let out = self.buffer::<f64>(2 * a.rows)?;
        let arguments = Arguments::default().with(a.buffer()).with(b.buffer()).with(a.cols).with(&out);
        self.launch("squared_difference", [a.rows, 1, 1], 256, 0, arguments)?;
        let rows = out.download::<f64>(2 * a.rows)?;
        Ok(rows.as_chunks::<2>().0.iter().fold((0.0, 0.0), |sum, row| (sum.0 + row[0], sum.1 + row[1])))
    }

    /// See [`crate::backend::Backend::digest`].
    pub(super) fn digest_of(&self, x: &CudaTensor) -> Result<[u8; 32]> {
        let (out, fault) = (self.buffer::<u64>(4)?, self.buffer::<i32>(1)?);
        out.zero()?;
        fault.zero()?;
        let count = x.rows * x.cols;
        let arguments = Arguments::default().with(x.buffer()).with(count as u64).with(&out).with(&fault);
        self.launch("digest", [count.div_ceil(8192).min(8 * self.device().multiprocessors()), 1, 1], 256, 0, arguments)?;
        self.check_fault()?;
        if fault.download::<i32>(1)? != [0] {
            return Err(Error::run("values are not finite"));
        }
        let mut digest = [0; 32];
        digest.copy_from_slice(&out.download::<u8>(32)?);
        Ok(digest)
    }

    /// See [`crate::backend::Backend::gptq`].
    pub(super) fn round_gptq(&self, task: &Gptq<'_, Gram>) -> Result<GptqCodes> {
        let (rows, cols, hessian) = (task.rows, task.cols, &task.hessian.sum);
        if task.hessian.features != cols {
            return Err(Error::run(format!("weights of {cols} inputs were given a Hessian of {}", task.hessian.features)));
        }
        let order = self.upload_values(&task.order.iter().map(|c| *c as i32).collect::<Vec<_>>())?;
        let weights = self.upload_values(task.weights)?;
        let (factor, damping) = self.first_factor(hessian, &order, task)?;
        let importance = self.upload_values(&task.order.iter().map(|c| task.diagonal[*c]).collect::<Vec<_>>())?;
        let work = self.buffer::<f32>(rows * cols)?;
        let arguments = Arguments::default().with(&weights).with(&order).with(cols).with(&work);
        self.launch("gptq_permute", [rows, cols.div_ceil(256), 1], 256, 0, arguments)?;
        let (low, high) = (f32::from(task.scheme.min_code()), f32::from(task.scheme.max_code()));
        // 0: one scale a row, f32.
        let group = if task.scheme == Scheme::Int8 { 0 } else { task.scheme.group(cols) };
        let groups = cols.checked_div(group).unwrap_or(1);
        let (codes, scales) = (self.buffer::<i8>(rows * cols)?, self.buffer::<f32>(rows * groups)?);
        let errors = self.buffer::<f32>(rows * BLOCK)?;
        if group == 0 {
            let arguments = Arguments::default().with(&work).with(&importance).with(rows).with(cols).with(low).with(high).with(&scales);
            self.launch("gptq_row_scales", [rows.div_ceil(4), 1, 1], 128, 0, arguments)?;
        }
        for first in (0..cols).step_by(BLOCK) {
            let width = BLOCK.min(cols - first);
            let arguments = Arguments::default().with(&work).with(factor.as_ref()).with(&importance).with(&order);
            let arguments = arguments.with(rows).with(cols).with(first).with(width).with(group).with(low).with(high);
            self.launch("gptq_block", [rows.div_ceil(4), 1, 1], 128, 0, arguments.with(&scales).with(&codes).with(&errors))?;
            if let Some(factor) = &factor {
                self.update(&work, factor, &errors, (rows, cols), (first, width), first + width)?;
            }
        }
        drop((factor, work));
        if let Some(index) = damping {
            self.descend(
                hessian,
                task.damping[index],
                task.sweeps,
                &weights,
                (&codes, &scales),
                (rows, cols, group),
                (low, high),
                &errors,
            )?;
        }
        Ok(GptqCodes { codes: codes.download(rows * cols)?, scales: scales.download(rows * groups)?, damping })
    }

    /// `w[:, from…] −= errors · factor[first…, from…]`.
    fn update(
        &self,
        w: &Buffer,
        factor: &Buffer,
        errors: &Buffer,
        (rows, cols): (usize, usize),
        (first, width): (usize, usize),
        from: usize,
    ) -> Result<()> {
        let arguments = Arguments::default().with(w).with(factor).with(errors).with(rows).with(cols).with(first).with(width).with(from);
        self.launch("gptq_update", [(cols - from).div_ceil(64), rows.div_ceil(64), 1], 256, 0, arguments)
    }

    /// The factor under the first of `damping` that makes the Hessian positive definite, and which one that is.
    fn first_factor(&self, hessian: &Buffer, order: &Buffer, task: &Gptq<'_, Gram>) -> Result<(Option<Buffer>, Option<usize>)> {
        for (index, damping) in task.damping.iter().enumerate() {
            if let Some(factor) = self.factor(hessian, order, task.cols, *damping)? {
                return Ok((Some(factor), Some(index)));
            }
        }
        Ok((None, None))
    }

    /// The upper factor of the inverse of the Hessian with `damping` on its diagonal; `None` where it is not positive definite.
    fn factor(&self, hessian: &Buffer, order: &Buffer, size: usize, damping: f64) -> Result<Option<Buffer>> {
        let n = size.next_multiple_of(SIDE);
        let (damping, failed) = (self.upload_values(&[damping])?, self.upload_values(&[0_i32])?);
        let (a, inverses) = (self.buffer::<f64>(n * n)?, self.buffer::<f64>(n * SIDE)?);
        let arguments = Arguments::default().with(hessian).with(order).with(&damping).with(size).with(n).with(&a);
        self.launch("cholesky_load", [n.div_ceil(256), n, 1], 256, 0, arguments)?;
        for k in 0..n / SIDE {
            let behind = n / SIDE - k - 1;
            let step = || Arguments::default().with(&a).with(n).with(k);
            self.launch("cholesky_diagonal", [1, 1, 1], 256, 0, step().with(&inverses).with(&failed))?;
            self.launch("cholesky_panel", [behind, 1, 1], 256, 0, step().with(&inverses))?;
            self.launch("cholesky_update", [behind, behind, 1], 256, 0, step())?;
        }
        if failed.download::<i32>(1)? != [0] {
            return Ok(None);
        }
        let x = self.buffer::<f64>(n * n)?;
        for k in 0..n / SIDE {
            let arguments = Arguments::default().with(&a).with(&inverses).with(n).with(k).with(&x);
            self.launch("triangular_inverse", [k + 1, 1, 1], 256, 0, arguments)?;
        }
        drop(a);
        let factor = self.buffer::<f32>(size * size)?;
        let arguments = Arguments::default().with(&x).with(size).with(n).with(&factor);
        self.launch("cholesky_factor", [size.div_ceil(256), size, 1], 256, 0, arguments)?;
        Ok(Some(factor))
    }

    /// Coordinate descent over all codes, up to `sweeps` times. `errors` is scratch, `[rows, 128]`.
    #[allow(clippy::too_many_arguments, reason = "what the kernels read and write")]
    fn descend(
        &self,
        hessian: &Buffer,
        damping: f64,
        sweeps: usize,
        weights: &Buffer,
        (codes, scales): (&Buffer, &Buffer),
        (rows, cols, group): (usize, usize, usize),
        (low, high): (f32, f32),
        errors: &Buffer,
    ) -> Result<()> {
        let (damped, slope) = (self.buffer::<f32>(cols * cols)?, self.buffer::<f32>(rows * cols)?);
        let (damping, changed) = (self.upload_values(&[damping])?, self.buffer::<i32>(1)?);
        let arguments = Arguments::default().with(hessian).with(&damping).with(cols).with(&damped);
        self.launch("gptq_damped", [cols.div_ceil(256), cols, 1], 256, 0, arguments)?;
        slope.zero()?;
        let blocks = || (0..cols).step_by(BLOCK).map(|first| (first, BLOCK.min(cols - first)));
        for (first, width) in blocks() {
            let arguments = Arguments::default().with(weights).with(codes).with(scales).with(rows).with(cols);
            let arguments = arguments.with(first).with(width).with(group).with(errors);
            self.launch("gptq_residual", [rows.div_ceil(4), 1, 1], 128, 0, arguments)?;
            self.update(&slope, &damped, errors, (rows, cols), (first, width), 0)?;
        }
        for _ in 0..sweeps {
            changed.zero()?;
            for (first, width) in blocks() {
                let arguments = Arguments::default().with(&slope).with(&damped).with(rows).with(cols).with(first).with(width);
                let arguments = arguments.with(group).with(low).with(high).with(scales).with(codes).with(errors).with(&changed);
                self.launch("gptq_descend", [rows.div_ceil(4), 1, 1], 128, 0, arguments)?;
                self.update(&slope, &damped, errors, (rows, cols), (first, width), 0)?;
            }
            if changed.download::<i32>(1)? == [0] {
                break;
            }
        }
        Ok(())
    }
}
