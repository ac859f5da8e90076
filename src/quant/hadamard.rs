//! Orthonormal Hadamard matrices of any size that is a product of 12, 20, 28 and powers of two.

use faer::Mat;

/// Primes q with a Paley construction of order 12, 20 (q + 1, q ≡ 3 mod 4) and 28 (2(q + 1), q ≡ 1 mod 4).
const PALEY: [(usize, usize); 3] = [(28, 13), (20, 19), (12, 11)];

/// The orthonormal Hadamard matrix of order `n`, or `None` where 12, 20, 28 and 2^k do not make `n`.
pub fn orthonormal(n: usize) -> Option<Mat<f64>> {
    let factors = factors(n)?;
    let sign = factors.iter().fold(vec![vec![1.0]], |matrix, order| kronecker(&matrix, &base(*order)));
    let scale = 1.0 / (n as f64).sqrt();
    Some(Mat::from_fn(n, n, |i, j| scale * sign[i][j]))
}

/// The rotation used for a width of `n`: the full Hadamard matrix where there is one, otherwise block-diagonal of the
/// largest power of two that divides `n`. Says which in words.
pub fn for_width(n: usize) -> (Mat<f64>, String) {
    if let Some(matrix) = orthonormal(n) {
        return (matrix, format!("Hadamard of order {n}"));
    }
    let block = 1 << n.trailing_zeros();
    let sign = sylvester(block);
    let scale = 1.0 / (block as f64).sqrt();
    let entry = |i: usize, j: usize| if i / block == j / block { scale * sign[i % block][j % block] } else { 0.0 };
    (Mat::from_fn(n, n, entry), format!("{} blocks of the Hadamard matrix of order {block}", n / block))
}

/// Orders of 12, 20, 28 and one power of two whose product is `n`.
fn factors(n: usize) -> Option<Vec<usize>> {
    if n.is_power_of_two() {
        return Some(vec![n]);
    }
    PALEY.iter().find_map(|(order, _)| {
        let mut rest = if n.is_multiple_of(*order) { factors(n / order)? } else { return None };
        rest.insert(0, *order);
        Some(rest)
    })
}

fn base(order: usize) -> Vec<Vec<f64>> {
    match PALEY.iter().find(|(paley, _)| *paley == order) {
        Some((_, q)) if q % 4 == 3 => paley_one(*q),
        Some((_, q)) => paley_two(*q),
        None => sylvester(order),
    }
}

fn sylvester(order: usize) -> Vec<Vec<f64>> {
    let entry = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
    (0..order).map(|i| (0..order).map(|j| entry(i, j)).collect()).collect()
}

/// χ(a): 0 for 0, 1 for a square modulo the prime q, −1 otherwise.
fn quadratic_character(a: usize, q: usize) -> f64 {
    match a % q {
        0 => 0.0,
        a if (1..q).any(|x| x * x % q == a) => 1.0,
        _ => -1.0,
    }
}

/// Paley I, order q + 1: I + S with S the bordered, skew Jacobsthal matrix.
fn paley_one(q: usize) -> Vec<Vec<f64>> {
    let skew = |i: usize, j: usize| match (i, j) {
        (0, 0) => 0.0,
        (0, _) => 1.0,
        (_, 0) => -1.0,
        _ => quadratic_character(i + q - j, q),
    };
    (0..=q).map(|i| (0..=q).map(|j| skew(i, j) + f64::from(u8::from(i == j))).collect()).collect()
}

/// Paley II, order 2(q + 1): the bordered, symmetric Jacobsthal matrix with ±1 replaced by ±[[1, 1], [1, −1]] and the
/// zeros of its diagonal by [[1, −1], [−1, −1]].
fn paley_two(q: usize) -> Vec<Vec<f64>> {
    let symmetric = |i: usize, j: usize| match (i, j) {
        (0, 0) => 0.0,
        (0, _) | (_, 0) => 1.0,
        _ => quadratic_character(i + q - j, q),
    };
    let entry = |i: usize, j: usize| {
        let value = symmetric(i / 2, j / 2);
        match (value == 0.0, i % 2, j % 2) {
            (true, 0, 0) => 1.0,
            (true, _, _) => -1.0,
            (false, 1, 1) => -value,
            (false, _, _) => value,
        }
    };
    (0..2 * (q + 1)).map(|i| (0..2 * (q + 1)).map(|j| entry(i, j)).collect()).collect()
}

fn kronecker(a: &[Vec<f64>], b: &[Vec<f64>]) -> Vec<Vec<f64>> {
    let (m, n) = (a.len(), b.len());
    (0..m * n).map(|i| (0..m * n).map(|j| a[i / n][j / n] * b[i % n][j % n]).collect()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn largest_departure(matrix: &Mat<f64>) -> f64 {
        let product = matrix.transpose() * matrix;
        let n = matrix.nrows();
        (0..n)
            .flat_map(|i| (0..n).map(move |j| (i, j)))
            .map(|(i, j)| (product[(i, j)] - f64::from(u8::from(i == j))).abs())
            .fold(0.0, f64::max)
    }

    #[test]
    fn matrices_are_orthogonal_at_every_size_of_head_and_residual() {
        for n in [1, 2, 12, 20, 28, 16, 24, 64, 80, 96, 128, 160, 256, 560, 1120] {
            assert!(largest_departure(&orthonormal(n).unwrap()) < 1e-12, "{n}");
        }
        // Residual and MLP widths of published models: checked by their factors, whose Kronecker product is orthogonal too.
        for n in [2688, 3136, 4096, 4480, 12544, 15680, 21504] {
            let factors = factors(n).unwrap();
            assert_eq!(factors.iter().product::<usize>(), n);
            for order in factors.into_iter().filter(|order| *order < 512) {
                let base = base(order);
                let scale = (order as f64).sqrt().recip();
                assert!(largest_departure(&Mat::from_fn(order, order, |i, j| scale * base[i][j])) < 1e-12, "{order} of {n}");
            }
        }
    }

    #[test]
    fn other_widths_take_blocks() {
        let (matrix, how) = for_width(16 * 11);
        assert!(how.contains("11 blocks of the Hadamard matrix of order 16"), "{how}");
        assert!(largest_departure(&matrix) < 1e-12);
    }
}
