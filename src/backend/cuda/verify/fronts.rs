//! Linears of one token that compute what stands in front of them: norms, relu², a row as it is.

use std::sync::Arc;

use super::linears::{Prepared, Product, Weights, product_of};
use super::{Check, EXACT, Extent, FLOAT, Lab, STORED, difference, mismatches};
use crate::backend::cpu::int_matmul::QuantizedRows;
use crate::backend::cuda::device::{Arguments, Buffer};
use crate::backend::cuda::stream::{self, Launch};
use crate::backend::cuda::tensor::{CudaTensor, Front, Norm};
use crate::error::Result;

const EPS: f32 = 1e-2;

/// What stands in front.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Plain,
    /// Values so small that absmax / 127 is no normal number.
    Tiny,
    Relu2,
    /// A norm over so many features at a time.
    Norm(usize),
}

pub fn checks(extent: Extent, arch: u32) -> Vec<Check> {
    let mut all = Vec::new();
    let mut shapes = vec![
        (Kind::Plain, 19, 320, None),
        (Kind::Plain, 5, 128, Some(0.013)),
        (Kind::Tiny, 20, 64, None),
        (Kind::Relu2, 18, 4992, None),
        (Kind::Relu2, 70, 64, None),
        (Kind::Relu2, 7, 8960, Some(0.02)),
        (Kind::Norm(384), 37, 384, None),
        (Kind::Norm(9216), 17, 9216, None),
        (Kind::Norm(2688), 40, 2688, Some(0.02)),
        (Kind::Norm(256), 33, 1024, None),
        (Kind::Norm(384), 21, 3456, None),
        (Kind::Norm(1024), 20, 8192, None),
    ];
    if extent == Extent::Published {
        shapes.extend([
            (Kind::Norm(4096), 18560, 4096, None),
            (Kind::Norm(1024), 4096, 8192, None),
            (Kind::Relu2, 4096, 21504, None),
            (Kind::Norm(2688), 10304, 2688, None),
        ]);
    }
    for (kind, rows, cols, scale) in shapes {
        let int4 = [128, 64, 32].into_iter().find(|group| cols % group == 0).map(Weights::Int4);
        for weights in [Weights::Bf16, Weights::Int8].into_iter().chain(int4) {
            let kind_of_weights = match weights {
                Weights::Int4(_) => stream::Weights::Int4,
                Weights::Int8 => stream::Weights::Int8,
                Weights::F32 | Weights::Bf16 => stream::Weights::Bf16,
            };
            let Some(launch) = Launch::of_one(kind_of_weights, cols, arch) else { continue };
            // Weights that bring tiny rows back to sight are too large for sums of groups.
            if weights == Weights::Bf16 && scale.is_some() || kind == Kind::Tiny && weights != Weights::Int8 {
                continue;
            }
            let tolerance = match (weights, kind) {
                (Weights::Bf16, _) => FLOAT,
                (_, Kind::Plain | Kind::Tiny | Kind::Relu2) => EXACT,
                // A norm whose sums are taken in another order puts some codes on the other side of a rounding.
                (_, Kind::Norm(_)) => STORED,
            };
            let shape = format!("{kind:?} in front of {rows}x{cols} {weights:?}, scale {scale:?}");
            all.push(Check::new(launch.kernel, shape, tolerance, move |lab| front(lab, launch, weights, kind, rows, cols, scale)));
        }
    }
    all
}

fn front(lab: &Lab, launch: Launch, kind_of_weights: Weights, kind: Kind, rows: usize, cols: usize, scale: Option<f32>) -> Result<f64> {
    let (row, weight) = (lab.normal(60, cols), lab.normal(62, cols));
    let tensor = |values: &[f32]| Ok::<_, crate::error::Error>(CudaTensor::new(lab.put(values)?, 1, cols));
    let (row, reach) = match kind {
        Kind::Tiny => (row.iter().map(|x| x * 2.0_f32.powi(-143)).collect(), 1e37),
        _ => (row, 1.0),
    };
    let mut front = Front::plain(tensor(&row)?);
    let values = match kind {
        Kind::Plain | Kind::Tiny => row,
        Kind::Relu2 => {
            front.square = true;
            row.iter().map(|x| x.max(0.0) * x.max(0.0)).collect()
        }
        Kind::Norm(group) => {
            front.norm = Some(Norm { weight: Arc::new(lab.put(&weight)?), eps: EPS, group });
            let mut values: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
            for values in values.chunks_exact_mut(group) {
                let factor = 1.0 / (values.iter().map(|x| x * x).sum::<f64>() / group as f64 + f64::from(EPS)).sqrt();
                for x in values {
                    *x *= factor;
                }
            }
            values.iter().zip(&weight).map(|(x, weight)| (x * f64::from(*weight)) as f32).collect()
        }
    };
    let weights = lab.normal(20, rows * cols).into_iter().map(|w| w * reach).collect();
    let weights = Prepared::new(lab, kind_of_weights, weights, rows, cols)?;
    let (fixed, bias, residual) = (lab.put(&[scale.unwrap_or_default()])?, lab.normal(22, rows), lab.normal(23, rows));
    let (bias_buffer, out) = (lab.put(&bias)?, lab.put(&residual)?);
    let none = None::<&Buffer>;
    let ring = |arguments: Arguments| arguments.with(cols).with(launch.stages);
    let arguments = match kind_of_weights {
        Weights::F32 | Weights::Bf16 => ring(weights.arguments().with(rows)),
        Weights::Int8 => ring(weights.arguments().with(rows)).with(none).with(none),
        Weights::Int4(_) => ring(weights.arguments().with(rows).with(none).with(none).with(0_usize)).with(none).with(none),
    };
    let arguments = stream::front_arguments(arguments, Some(&front), scale.map(|_| &fixed));
    let arguments = arguments.with(&bias_buffer).with(&out).with(&out).with(rows);
    let blocks = Launch::blocks(rows.div_ceil(16), 1, lab.memory.device.multiprocessors());
    lab.launch(launch.kernel, blocks, launch.threads, launch.shared, arguments)?;
    let found = out.download::<f32>(rows)?;
    let codes = (kind_of_weights != Weights::Bf16).then(|| QuantizedRows::round(&values, 1, cols, scale));
    let others = residual.iter().zip(&bias);
    Ok(match product_of(&weights, &values, codes.as_ref(), 1, rows, cols) {
        Product::Exact(product) => {
            let expected: Vec<f32> = others.zip(&product).map(|((residual, bias), product)| residual + (product + bias)).collect();
            let same = kind_is_exact(kind).then(|| mismatches(&found, &expected));
            same.unwrap_or_else(|| difference(&found, &expected.iter().map(|x| f64::from(*x)).collect::<Vec<_>>()))
        }
        Product::Float(product) => {
            let expected: Vec<f64> =
                others.zip(&product).map(|((residual, bias), product)| f64::from(*residual) + product + f64::from(*bias)).collect();
            difference(&found, &expected)
        }
    })
}

/// Whether the machine leaves no choice of how its values are rounded.
fn kind_is_exact(kind: Kind) -> bool {
    matches!(kind, Kind::Plain | Kind::Tiny | Kind::Relu2)
}
