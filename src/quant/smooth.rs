//! Smoothing: a scale for each channel that evens out what a linear reads, undone in that linear's columns. It moves into
//! the weights in front of the activation, so that the model computes nothing more.
//!
//! The scale is SmoothQuant's at one half, `t = act^−½ · column^½`: `act` is the largest magnitude of the channel on the
//! calibration text, `column` that of the linear's column. Behind it, activation and column have the same magnitude.
//!
//! A channel that is almost silent in calibration would get a huge scale, and a token that wakes it later would be lost
//! (two such tokens were most of a mean KLD). So `act` has a floor: relative to what the weights in front can make of the
//! channel, no channel counts as less than a quarter of the layer's median. Being relative, the floor does not see how
//! a checkpoint happens to divide a scale between the two matrices.

use rayon::prelude::*;

use super::calibrate::{CONVOLUTION, Maxima};
use super::weights::{BlockWeights, FloatLinear};
use crate::checkpoint::{BlockSpec, Checkpoint};
use crate::error::Result;

/// Share of the median that a channel counts for at least.
const FLOOR: f64 = 0.25;

/// The largest magnitude `act` of each channel, none below its floor; `reach` is what the weights in front can make of it,
/// up to a common factor.
fn floored(act: &[f64], reach: &[f64]) -> Vec<f64> {
    let mut shares: Vec<f64> = act.iter().zip(reach).filter(|(_, reach)| **reach > 0.0).map(|(act, reach)| act / reach).collect();
    shares.sort_by(f64::total_cmp);
    let floor = FLOOR * shares.get(shares.len() / 2).copied().unwrap_or(0.0);
    act.iter().zip(reach).map(|(act, reach)| act.max(floor * reach)).collect()
}

/// Scale of each channel; `act` and `column` are its largest magnitudes. A channel that is always zero, or that nothing
/// reads, is left alone.
fn scales(act: &[f64], column: &[f64], reach: &[f64]) -> Vec<f64> {
    let scale = |(act, column): (f64, &f64)| if act > 0.0 && *column > 0.0 { (column / act).sqrt() } else { 1.0 };
    floored(act, reach).into_iter().zip(column).map(scale).collect()
}

/// Largest magnitude of each column.
fn column_maxima(linear: &FloatLinear) -> Vec<f64> {
    linear.weights.par_columns().map(|column| column.iter().fold(0.0_f64, |max, w| max.max(w.abs()))).collect()
}

fn inverse(scales: &[f64]) -> Vec<f64> {
    scales.iter().map(|scale| scale.recip()).collect()
}

/// smooth-relu2: `up_proj`'s rows by s, `down_proj`'s columns by 1/s², for relu²(s·x) = s²·relu²(x). Experts that the
/// calibration text never reached are left alone.
pub fn relu2(weights: &mut BlockWeights, spec: &BlockSpec, maxima: &Maxima) -> Result<()> {
    for down in spec.linears.iter().filter(|linear| linear.name.ends_with("down_proj")) {
        let Some(act) = maxima.get(&down.name) else { continue };
        let up = down.name.replace("down_proj", "up_proj");
        let reach: Vec<f64> = weights.linear(&up)?.weights.row_norms().into_iter().map(|norm| norm * norm).collect();
        let squares = scales(act, &column_maxima(weights.linear(&down.name)?), &reach);
        let roots: Vec<f64> = squares.iter().map(|square| square.sqrt()).collect();
        weights.linear_mut(&up)?.scale_outputs(&roots);
        weights.linear_mut(&down.name)?.scale_inputs(&inverse(&squares));
    }
    Ok(())
}

/// smooth-vo: `v_proj`'s rows by t and `o_proj`'s columns by 1/t, t shared by the query heads of a key/value head.
pub fn values(weights: &mut BlockWeights, checkpoint: &Checkpoint, maxima: &Maxima) -> Result<()> {
    let Some(act) = maxima.get("o_proj") else { return Ok(()) };
    let shape = &checkpoint.config.attention;
    let (width, queries) = (shape.head_dim, shape.heads / shape.kv_heads);
    // Channel of the value head that input `i` of o_proj is made of.
    let channel = |i: usize| i / width / queries * width + i % width;
    let shared = |inputs: &[f64]| {
        let mut largest = vec![0.0_f64; shape.kv_heads * width];
        for (i, value) in inputs.iter().enumerate() {
            largest[channel(i)] = largest[channel(i)].max(*value);
        }
        largest
    };
    let column = shared(&column_maxima(weights.linear("o_proj")?));
    let scale = scales(&shared(act), &column, &weights.linear("v_proj")?.weights.row_norms());
    weights.linear_mut("v_proj")?.scale_outputs(&scale);
    let across: Vec<f64> = (0..act.len()).map(|i| scale[channel(i)].recip()).collect();
    weights.linear_mut("o_proj")?.scale_inputs(&across);
    Ok(())
}

/// smooth-out: the gated norm's weight by t, `out_proj`'s columns by 1/t. `before` is that weight in the checkpoint, under
/// which the maxima were taken, `now` what it has become.
pub fn out(weights: &mut BlockWeights, maxima: &Maxima, before: &[f64], now: &mut [f64]) -> Result<()> {
    let Some(act) = maxima.get("out_proj") else { return Ok(()) };
    let at_unit = |(act, before): (&f64, &f64)| if *before == 0.0 { 0.0 } else { act / before.abs() };
    let act: Vec<f64> = act.iter().zip(before).map(at_unit).zip(&*now).map(|(act, now)| act * now.abs()).collect();
    let reach: Vec<f64> = now.iter().map(|weight| weight.abs()).collect();
    let scale = scales(&act, &column_maxima(weights.linear("out_proj")?), &reach);
    for (weight, scale) in now.iter_mut().zip(&scale) {
        *weight *= scale;
    }
    weights.linear_mut("out_proj")?.scale_inputs(&inverse(&scale));
    Ok(())
}

/// smooth-conv: `in_proj`'s rows of x, B and C by s, the convolution's weights by 1/s. Each channel has weights, and scales of
/// weights, of its own on both sides, so that the whole difference can move: `s = 1 / act`.
pub fn convolution(weights: &mut BlockWeights, checkpoint: &Checkpoint, spec: &BlockSpec, maxima: &Maxima) -> Result<()> {
    let Some(act) = maxima.get(CONVOLUTION) else { return Ok(()) };
    let name = format!("{}mixer.conv1d.weight", spec.prefix);
    let (inner, kernel) = (checkpoint.config.mamba.inner(), checkpoint.config.mamba.conv_kernel);
    let reach = weights.linear("in_proj")?.weights.row_norms();
    let scale: Vec<f64> =
        floored(act, &reach[inner..inner + act.len()]).into_iter().map(|act| if act > 0.0 { act.recip() } else { 1.0 }).collect();
    let mut rows = vec![1.0; reach.len()];
    rows[inner..inner + act.len()].copy_from_slice(&scale);
    weights.linear_mut("in_proj")?.scale_outputs(&rows);
    let taps = checkpoint.read(&name)?.into_iter().enumerate().map(|(i, tap)| f64::from(tap) / scale[i / kernel]);
    weights.tensors.insert(name, taps.collect());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn activation_and_column_come_out_alike_and_silent_channels_keep_to_the_floor() {
        let (act, column) = ([8.0, 1.0, 2.0, 1e-9, 0.0], [2.0, 4.0, 2.0, 1.0, 1.0]);
        let found = scales(&act, &column, &[1.0; 5]);
        for i in 0..3 {
            assert!((act[i] * found[i] - column[i] / found[i]).abs() < 1e-12, "{i}");
        }
        // The median is 1, so that the silent ones count for a quarter.
        assert_eq!(found[3], 2.0);
        assert_eq!(found[4], 2.0);
    }

    #[test]
    fn a_scale_divided_otherwise_between_the_matrices_comes_out_the_same() {
        let (act, column, reach) = ([8.0, 1.0, 1e-6], [2.0, 4.0, 1.0], [1.0, 2.0, 3.0]);
        let expected = scales(&act, &column, &reach);
        let shift = [1.0, 64.0, 16.0];
        let times = |values: &[f64; 3], by: fn(f64, f64) -> f64| -> Vec<f64> { values.iter().zip(shift).map(|(v, s)| by(*v, s)).collect() };
        let moved = scales(&times(&act, |v, s| v * s), &times(&column, |v, s| v / s), &times(&reach, |v, s| v * s));
        for i in 0..3 {
            assert!((moved[i] * shift[i] - expected[i]).abs() < 1e-12);
        }
    }
}
