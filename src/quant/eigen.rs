//! Eigenvectors of symmetric matrices on all threads.

use faer::diag::Diag;
use faer::dyn_stack::{MemBuffer, MemStack};
use faer::linalg::evd::{ComputeEigenvectors, self_adjoint_evd, self_adjoint_evd_scratch};
use faer::{Mat, MatRef, Par, Spec};

use crate::error::{Error, Result};

/// Parts that large matrices are divided into. Some sums are taken part by part: this number decides their last bits, and how many
/// threads there are does not.
const PARTS: usize = 16;
/// Width from which matrices are divided.
const DIVIDED: usize = 1024;

/// The eigenvectors of a symmetric matrix, whose lower triangle is read, as columns in ascending order of the eigenvalues.
pub fn eigenvectors(matrix: MatRef<'_, f64>) -> Result<Mat<f64>> {
    let n = matrix.nrows();
    let par = if n < DIVIDED { Par::Seq } else { Par::rayon(PARTS) };
    let (mut vectors, mut values) = (Mat::zeros(n, n), Diag::zeros(n));
    let mut scratch = MemBuffer::new(self_adjoint_evd_scratch::<f64>(n, ComputeEigenvectors::Yes, par, Spec::default()));
    let stack = MemStack::new(&mut scratch);
    self_adjoint_evd(matrix, values.as_mut(), Some(vectors.as_mut()), par, stack, Spec::default())
        .map_err(|error| Error::run(format!("the eigenvectors of a matrix of {n} rows cannot be found: {error:?}")))?;
    Ok(vectors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(n: usize) -> Mat<f64> {
        let mut state = 1_u64;
        let mut next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 40) as f64 / f64::from(1 << 24) - 0.5
        };
        let half = Mat::from_fn(n, n, |_, _| next());
        &half + half.transpose()
    }

    #[test]
    fn vectors_are_orthonormal_and_diagonalize() {
        for n in [60, DIVIDED + 70] {
            let (matrix, vectors) = (matrix(n), eigenvectors(matrix(n).as_ref()).unwrap());
            let diagonal = vectors.transpose() * (&matrix * &vectors);
            let (unit, rest) = (vectors.transpose() * &vectors, |i, j| if i == j { 0.0 } else { diagonal[(i, j)] });
            assert!((unit - Mat::<f64>::identity(n, n)).norm_max() < 1e-11);
            assert!(Mat::<f64>::from_fn(n, n, rest).norm_max() < 1e-10);
            assert!((1..n).all(|i| diagonal[(i - 1, i - 1)] <= diagonal[(i, i)] + 1e-10));
        }
    }

    #[test]
    fn threads_do_not_matter() {
        let matrix = matrix(DIVIDED + 70);
        let with = |threads| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
            pool.install(|| eigenvectors(matrix.as_ref()).unwrap())
        };
        let alone = with(1);
        assert!([2, 3, 2 * PARTS].into_iter().all(|threads| with(threads) == alone));
    }
}
