//! How far the largest weight of a matrix stands out: what makes round-to-nearest lose.

use crate::checkpoint::{BlockSpec, Checkpoint};
use crate::error::Result;

/// Ratio of the largest magnitude to the root mean square, over a block's linears: the worst of them. A normal
/// distribution of a million weights has about 5.
pub fn outlier_ratio(checkpoint: &Checkpoint, block: &BlockSpec) -> Result<f64> {
    let mut worst = 0.0_f64;
    for linear in &block.linears {
        worst = worst.max(ratio(&checkpoint.read(&format!("{}.weight", linear.stem))?));
    }
    Ok(worst)
}

fn ratio(values: &[f32]) -> f64 {
    let (max, squares) = values.iter().fold((0.0_f32, 0.0_f64), |(max, sum), w| (max.max(w.abs()), sum + f64::from(*w).powi(2)));
    let rms = (squares / values.len() as f64).sqrt();
    if rms > 0.0 { f64::from(max) / rms } else { 0.0 }
}

#[cfg(test)]
mod tests {
    #[test]
    fn one_large_weight_stands_out() {
        let mut values = vec![1.0_f32; 100];
        assert!((super::ratio(&values) - 1.0).abs() < 1e-9);
        values[7] = 100.0;
        assert!(super::ratio(&values) > 9.0);
    }
}
