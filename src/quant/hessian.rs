//! Hessians of what linears read, where they were summed: a device that rounds by them keeps them. Start with [`Hessian`].

use std::borrow::Cow;

use super::gptq::{self, Damping};
use crate::backend::{Backend, Gptq, GptqCodes};
use crate::error::Result;
use crate::format::{QuantizedMatrix, Scheme};

/// `Σ x xᵀ` `[cols, cols]` of a linear's inputs x.
pub trait Hessian {
    /// The values on the host.
    fn values(&self) -> Result<Cow<'_, [f64]>>;
    /// GPTQ of `weights` `[rows, cols]` under `scheme`.
    fn round(&self, weights: &[f32], rows: usize, cols: usize, scheme: Scheme) -> Result<(QuantizedMatrix, Damping)>;
}

/// A Hessian on a backend.
pub struct Summed<'a, B: Backend> {
    backend: &'a B,
    sum: B::Gram,
    diagonal: Vec<f64>,
}

impl<'a, B: Backend> Summed<'a, B> {
    pub fn new(backend: &'a B, sum: B::Gram) -> Result<Self> {
        let diagonal = backend.gram_diagonal(&sum)?;
        Ok(Self { backend, sum, diagonal })
    }

    /// Whether all its values are.
    pub fn is_finite(&self) -> bool {
        self.diagonal.iter().all(|value| value.is_finite())
    }
}

impl<B: Backend> Hessian for Summed<'_, B> {
    fn values(&self) -> Result<Cow<'_, [f64]>> {
        self.backend.gram_values(&self.sum)
    }

    fn round(&self, weights: &[f32], rows: usize, cols: usize, scheme: Scheme) -> Result<(QuantizedMatrix, Damping)> {
        let (order, shares) = (gptq::column_order(&self.diagonal, scheme.group(cols)), gptq::dampings(&self.diagonal));
        let damping: Vec<f64> = shares.iter().map(|(_, added)| *added).collect();
        let task = Gptq {
            weights,
            rows,
            cols,
            scheme,
            hessian: &self.sum,
            diagonal: &self.diagonal,
            order: &order,
            damping: &damping,
            sweeps: gptq::SWEEPS,
        };
        Ok(match self.backend.gptq(&task)? {
            Some(GptqCodes { codes, scales, damping }) => {
                (QuantizedMatrix { scheme, rows, cols, codes, scales }, Damping { used: damping.map(|index| shares[index].0) })
            }
            None => gptq::quantize(weights, rows, cols, scheme, &self.values()?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Emit;
    use crate::backend::cpu::Cpu;
    use crate::backend::cuda::Cuda;
    use crate::backend::cuda::emulated;

    /// GPTQ with its factorization, its dampings and coordinate descent on the device, against the CPU's.
    #[test]
    fn a_device_gives_the_cpus_codes() {
        if std::process::Command::new(emulated::compiler()).arg("--version").output().is_err() {
            return;
        }
        let cuda = Cuda::emulated().unwrap();
        let (rows, cols) = (37, 192);
        let value = |i: usize| ((i * 7919 + 13) % 2003) as f32 / 1001.5 - 1.0;
        let weights: Vec<f32> = (0..rows * cols).map(value).collect();
        let inputs: Vec<f32> = (0..600 * cols).map(|i| value(i * 31 + i / cols) + 0.6 * value(i / cols * 17)).collect();
        let on_cpu = Cpu.emit(Cpu.upload(inputs.clone(), cols).unwrap(), Emit::FLOAT).unwrap();
        let on_cuda = cuda.emit(cuda.upload(inputs, cols).unwrap(), Emit::FLOAT).unwrap();
        let (hessian, found) = (Cpu.gram(&on_cpu).unwrap(), cuda.gram(&on_cuda).unwrap());
        let largest = hessian.iter().fold(0.0_f64, |max, h| max.max(h.abs()));
        assert!(hessian.iter().zip(&found).all(|(a, b)| (a - b).abs() < 1e-5 * largest));
        // One that needs more damping, and one that none helps.
        let mut raised = hessian.clone();
        (0..cols).for_each(|c| raised[c * cols + (c + 1) % cols] -= 0.2 * largest);
        (0..cols).for_each(|c| raised[(c + 1) % cols * cols + c] -= 0.2 * largest);
        let zero = vec![0.0; cols * cols];
        for scheme in [Scheme::Int8, Scheme::Grouped { bits: 4, group: 64 }, Scheme::Grouped { bits: 3, group: 32 }] {
            for (hessian, ratio) in [(&hessian, Some(true)), (&raised, Some(false)), (&zero, None)] {
                let summed = Summed::new(&cuda, cuda.gram_of(hessian).unwrap()).unwrap();
                assert_eq!(*summed.values().unwrap(), **hessian);
                let (expected, damping) = gptq::quantize(&weights, rows, cols, scheme, hessian);
                let (found, used) = summed.round(&weights, rows, cols, scheme).unwrap();
                assert_eq!(used, damping);
                assert_eq!(ratio, damping.used.map(|damping| damping == gptq::DAMPING), "{scheme:?}");
                let differ = expected.codes.iter().zip(&found.codes).filter(|(a, b)| a != b).count();
                let scales = expected.scales.iter().zip(&found.scales).filter(|(a, b)| a != b).count();
                // The factor is computed in another order in f64, and then rounded to f32.
                assert!(
                    differ <= rows * cols / 500 && scales <= expected.scales.len() / 50,
                    "{scheme:?}: {differ} codes, {scales} scales differ"
                );
            }
        }
    }

    #[test]
    fn a_sum_is_finite_where_its_diagonal_is() {
        let summed = |x: Vec<f32>| {
            Summed::new(&Cpu, {
                let mut sum = None;
                Cpu.add_gram(&mut sum, &Cpu.emit(Cpu.upload(x, 3).unwrap(), Emit::FLOAT).unwrap()).unwrap();
                sum.unwrap()
            })
            .unwrap()
        };
        assert!(summed(vec![1.0, -2.0, 3.0, 0.0, 1e18, 1.0]).is_finite());
        assert!(!summed(vec![1.0, f32::NAN, 3.0, 0.0, 1.0, 1.0]).is_finite());
        assert!(!summed(vec![1.0, 2.0, 3.0, 0.0, 1.0, f32::INFINITY]).is_finite());
    }
}
