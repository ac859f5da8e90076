//! What the weights of one block look like, and what each way of rounding loses on them: [`inspect`].
//!
//! No job of the queue: the workbench asks for the block under its cursor on a thread of its own, beside whatever the
//! engine runs, and cancels when the cursor moves on.

use crate::checkpoint::{self, LinearSpec};
use crate::error::{Error, Result};
use crate::format::{Format, QuantizedMatrix, Scheme, round_to_nearest};
use crate::monitor::CancelToken;
use crate::quant::{Method, round_clipped};

/// Bars of a histogram; the middle one holds the weights around zero.
pub const BINS: usize = 41;

/// Values that are rounded between two looks at the token: a few milliseconds' work.
const CHUNK: usize = 1 << 18;

/// The weights of a linear.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearLook {
    pub name: String,
    /// Largest magnitude.
    pub max: f32,
    /// Root of the mean square.
    pub rms: f64,
    /// Weights by value, from −max to max.
    pub histogram: Vec<u64>,
}

/// What a rounding method loses at a width of weights: ‖W − Ŵ‖ / ‖W‖ over the block's linears.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RoundingError {
    pub method: Method,
    pub format: Format,
    pub error: f64,
}

/// A part of what is to be known of a block, as it becomes known.
#[derive(Debug, Clone, PartialEq)]
pub enum Look {
    Linear(LinearLook),
    Rounding(RoundingError),
}

/// Formats that differ in how weights are stored; activations do not matter here.
const WIDTHS: [Format; 4] = [Format::W8A16, Format::W4A16, Format::W3A16, Format::W2A16];

/// Reads the weights of block `index` of `model` and hands what is found to `each`, the quick parts first.
pub fn inspect(model: &str, index: usize, cancel: &CancelToken, mut each: impl FnMut(Look)) -> Result<()> {
    let check = || if cancel.is_cancelled() { Err(Error::cancelled()) } else { Ok(()) };
    check()?;
    let checkpoint = checkpoint::open(model)?;
    if checkpoint.variant.is_some() {
        return Err(Error::input(format!("{model} is quantized already")).hint("open the checkpoint that it was made from"));
    }
    let block = checkpoint.layout.blocks.get(index).ok_or_else(|| Error::input(format!("{model} has no block {index}")))?;
    for linear in &block.linears {
        check()?;
        let weights = checkpoint.read(&format!("{}.weight", linear.stem))?;
        each(Look::Linear(look(&linear.name, &weights)));
    }
    // Linear by linear inside, so that one at a time is in memory.
    for format in WIDTHS {
        for (method, round) in
            [(Method::Rtn, round_to_nearest as fn(&[f32], usize, usize, Scheme) -> QuantizedMatrix), (Method::Clip, round_clipped)]
        {
            let (mut lost, mut whole) = (0.0, 0.0);
            for linear in &block.linears {
                let weights = checkpoint.read(&format!("{}.weight", linear.stem))?;
                let (difference, square) = rounding(linear, &weights, format, round, &check)?;
                lost += difference;
                whole += square;
            }
            let error = if whole > 0.0 { (lost / whole).sqrt() } else { 0.0 };
            each(Look::Rounding(RoundingError { method, format, error }));
        }
    }
    Ok(())
}

fn look(name: &str, weights: &[f32]) -> LinearLook {
    let (max, squares) = weights.iter().fold((0.0_f32, 0.0_f64), |(max, sum), w| (max.max(w.abs()), sum + f64::from(*w).powi(2)));
    let mut histogram = vec![0; BINS];
    for weight in weights {
        let place = if max > 0.0 { f32::midpoint(weight / max, 1.0) } else { 0.5 };
        histogram[((place * BINS as f32) as usize).min(BINS - 1)] += 1;
    }
    LinearLook { name: name.to_owned(), max, rms: (squares / weights.len().max(1) as f64).sqrt(), histogram }
}

/// Σ(w − ŵ)² and Σw² over a linear's slices, a few rows at a time.
fn rounding(
    linear: &LinearSpec,
    weights: &[f32],
    format: Format,
    round: fn(&[f32], usize, usize, Scheme) -> QuantizedMatrix,
    check: &impl Fn() -> Result<()>,
) -> Result<(f64, f64)> {
    let (mut lost, mut whole) = (0.0, 0.0);
    let mut start = 0;
    for (slice, scheme) in linear.slices.iter().zip(linear.schemes(format)) {
        let values = &weights[start * linear.cols..(start + slice.rows) * linear.cols];
        start += slice.rows;
        for rows in values.chunks((CHUNK / linear.cols).max(1) * linear.cols) {
            check()?;
            let rounded = round(rows, rows.len() / linear.cols, linear.cols, scheme).dequantize();
            for (weight, rounded) in rows.iter().zip(rounded) {
                lost += f64::from(weight - rounded).powi(2);
                whole += f64::from(*weight).powi(2);
            }
        }
    }
    Ok((lost, whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_linear_is_seen_and_narrower_weights_lose_more() {
        let mut looks = Vec::new();
        inspect("demo", 0, &CancelToken::default(), |look| looks.push(look)).unwrap();
        let linears: Vec<&LinearLook> =
            looks.iter().filter_map(|look| if let Look::Linear(look) = look { Some(look) } else { None }).collect();
        assert_eq!(linears.iter().map(|look| look.name.as_str()).collect::<Vec<_>>(), ["in_proj", "out_proj"]);
        assert_eq!(linears[0].histogram.iter().sum::<u64>(), 1288 * 256);
        assert!(linears[0].histogram[BINS / 2] > linears[0].histogram[0], "most weights are near zero");
        let error = |method, format| {
            let found = looks.iter().find_map(|look| match look {
                Look::Rounding(error) if error.method == method && error.format == format => Some(error.error),
                _ => None,
            });
            found.unwrap()
        };
        for method in [Method::Rtn, Method::Clip] {
            let errors = WIDTHS.map(|format| error(method, format));
            assert!(errors.windows(2).all(|pair| pair[0] < pair[1]), "{errors:?}");
        }
        assert!(error(Method::Clip, Format::W4A16) < error(Method::Rtn, Format::W4A16), "clipping is chosen where it loses less");
        assert!((0.002..0.02).contains(&error(Method::Rtn, Format::W8A16)), "half a step of 127 levels");
    }

    #[test]
    fn a_cancelled_look_stops() {
        let cancel = CancelToken::default();
        let mut seen = 0;
        let stop = inspect("demo", 1, &cancel, |_| {
            seen += 1;
            cancel.cancel();
        });
        assert_eq!((stop.unwrap_err().kind, seen), (crate::error::ErrorKind::Cancelled, 1));
    }
}
