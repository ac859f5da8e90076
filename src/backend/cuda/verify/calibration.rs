//! Statistics of activations, rotations of weights by the device's library, and GPTQ: the factor of the inverse Hessian, rounding
//! block by block.

use std::sync::Arc;

use faer::Mat;
use half::bf16;

use super::{Check, EXACT, Extent, FLOAT, HALVES, Lab, difference, mismatches, wide};
use crate::backend::cuda::Cuda;
use crate::backend::cuda::device::{Arguments, Buffer};
use crate::backend::{Backend, Side, cpu};
use crate::error::Result;

/// Sums in f64 in an order of their own.
const DOUBLE: f64 = 1e-13;

pub fn checks(extent: Extent) -> Vec<Check> {
    let mut shapes = vec![(1, 16), (5, 70), (300, 129)];
    let mut turned = vec![(37, 52), (64, 16)];
    if extent == Extent::Published {
        shapes.push((1000, 4096));
        turned.push((1500, 1024));
    }
    let mut all = Vec::new();
    for (tokens, cols) in shapes {
        let shape = format!("{tokens}x{cols}");
        all.push(Check::new("gram", shape.clone(), FLOAT, move |lab| gram(lab, tokens, cols)));
        // Its reference is three products on the host: the small shapes do.
        if cols <= 512 {
            all.push(Check::new("gram_add", shape.clone(), HALVES, move |lab| gram_of_halves(lab, tokens, cols)));
        }
        all.push(Check::new("squared_difference", shape.clone(), FLOAT, move |lab| squared_difference(lab, tokens, cols)));
        all.push(Check::new("undecidedness", shape.clone(), FLOAT, move |lab| undecidedness(lab, tokens, cols)));
        all.push(Check::new("gram_diagonal", shape.clone(), EXACT, move |lab| gram_diagonal(lab, cols)));
        all.push(Check::new("abs_max", shape.clone(), EXACT, move |lab| abs_max(lab, tokens, cols)));
        all.push(Check::new("histogram", shape, EXACT, move |lab| histogram(lab, tokens * cols)));
    }
    for (rows, cols) in turned {
        for side in [Side::Inputs, Side::Outputs] {
            all.push(Check::new("dgemm", format!("{rows}x{cols} {side:?}"), DOUBLE, move |lab| turn(lab, rows, cols, side)));
        }
    }
    let sizes = if extent == Extent::Published { vec![40, 64, 150, 1000] } else { vec![40, 64, 150] };
    for size in sizes {
        all.push(Check::new("cholesky_diagonal", size.to_string(), FLOAT, move |lab| cholesky(lab, size)));
    }
    all.push(Check::new("cholesky_diagonal", "not positive definite", EXACT, not_positive));
    for (rows, cols, group) in [(5, 256, 128), (3, 320, 64), (6, 160, 32), (66, 192, 0), (2, 100, 0)] {
        let name = format!("{rows}x{cols}, group {group}");
        all.push(Check::new("gptq_block", name.clone(), EXACT, move |lab| gptq(lab, rows, cols, group, true)));
        all.push(Check::new("gptq_descend", name.clone(), EXACT, move |lab| descend(lab, rows, cols, group)));
        all.push(Check::new("gptq_block", name + ", rounding only", EXACT, move |lab| gptq(lab, rows, cols, group, false)));
    }
    // A head has more rows than a grid has blocks in its second dimension.
    all.push(Check::new("gptq_block", "65540x8 int8, rounding only", EXACT, |lab| gptq(lab, 65540, 8, 0, false)));
    all
}

fn gram(lab: &Lab, tokens: usize, cols: usize) -> Result<f64> {
    let (x, before) = (lab.normal(80, tokens * cols), lab.normal(81, cols * cols));
    let mut expected = wide(&before);
    let (input, out) = (lab.put(&x)?, lab.put(&expected)?);
    let tiles = cols.div_ceil(64);
    lab.launch("gram", [tiles, tiles, 1], 256, 0, Arguments::default().with(&input).with(tokens).with(cols).with(&out))?;
    for x in x.chunks_exact(cols) {
        for (row, a) in expected.chunks_exact_mut(cols).zip(x) {
            row.iter_mut().zip(x).for_each(|(sum, b)| *sum += f64::from(*a) * f64::from(*b));
        }
    }
    let found: Vec<f32> = out.download::<f64>(cols * cols)?.into_iter().map(|x| x as f32).collect();
    Ok(difference(&found, &expected))
}

/// A rotation of weights: the library's matrix product where there is one.
fn turn(lab: &Lab, rows: usize, cols: usize, side: Side) -> Result<f64> {
    let order = if side == Side::Inputs { cols } else { rows };
    let (weights, rotation) = (wide(&lab.normal(82, rows * cols)), wide(&lab.normal(83, order * order)));
    let weights = Mat::from_fn(rows, cols, |i, j| weights[i * cols + j]);
    let rotation = Mat::from_fn(order, order, |i, j| rotation[i * order + j]);
    let (mut expected, mut found) = (weights.clone(), weights);
    cpu::turn::turn(expected.as_mut(), rotation.as_ref(), side);
    Cuda::on(Arc::clone(&lab.memory.device)).turn(found.as_mut(), rotation.as_ref(), side)?;
    Ok((&found - &expected).norm_max() / expected.norm_max())
}

fn gram_diagonal(lab: &Lab, n: usize) -> Result<f64> {
    let sum = wide(&lab.normal(84, n * n));
    let (input, out) = (lab.put(&sum)?, lab.poisoned::<f64>(n)?);
    lab.launch("gram_diagonal", [n.div_ceil(256), 1, 1], 256, 0, Arguments::default().with(&input).with(n).with(&out))?;
    Ok(mismatches(&out.download::<f64>(n)?, &sum.into_iter().step_by(n + 1).collect::<Vec<_>>()))
}

/// The same by halves, whose products are made here.
fn gram_of_halves(lab: &Lab, tokens: usize, cols: usize) -> Result<f64> {
    let (x, before) = (lab.normal(80, tokens * cols), lab.normal(81, cols * cols));
    let (input, sum) = (lab.put(&x)?, lab.put(&wide(&before))?);
    let (high, low) = (lab.poisoned::<u16>(tokens * cols)?, lab.poisoned::<u16>(tokens * cols)?);
    let arguments = Arguments::default().with(&input).with((tokens * cols) as u64).with(&high).with(&low);
    lab.launch("split_halves", [2, 1, 1], 256, 0, arguments)?;
    let floats = |buffer: &Buffer| -> Result<Vec<f64>> {
        Ok(buffer.download::<u16>(tokens * cols)?.into_iter().map(|bits| bf16::from_bits(bits).to_f64()).collect())
    };
    let (high, low) = (floats(&high)?, floats(&low)?);
    let product = |right: &[f64]| -> Vec<f32> {
        let mut out = vec![0.0; cols * cols];
        for (a, b) in high.chunks_exact(cols).zip(right.chunks_exact(cols)) {
            for (row, a) in out.chunks_exact_mut(cols).zip(a) {
                row.iter_mut().zip(b).for_each(|(sum, b)| *sum += a * b);
            }
        }
        out.into_iter().map(|x: f64| x as f32).collect()
    };
    let (own, cross) = (lab.put(&product(&high))?, lab.put(&product(&low))?);
    let tiles = cols.div_ceil(32);
    lab.launch("gram_add", [tiles, tiles, 1], 256, 0, Arguments::default().with(&own).with(&cross).with(cols).with(&sum))?;
    let mut expected = wide(&before);
    for x in x.chunks_exact(cols) {
        for (row, a) in expected.chunks_exact_mut(cols).zip(x) {
            row.iter_mut().zip(x).for_each(|(sum, b)| *sum += f64::from(*a) * f64::from(*b));
        }
    }
    let found: Vec<f32> = sum.download::<f64>(cols * cols)?.into_iter().map(|x| x as f32).collect();
    Ok(difference(&found, &expected))
}

fn squared_difference(lab: &Lab, rows: usize, cols: usize) -> Result<f64> {
    let (a, b) = (lab.normal(90, rows * cols), lab.normal(91, rows * cols));
    let (left, right, out) = (lab.put(&a)?, lab.put(&b)?, lab.poisoned::<f64>(2 * rows)?);
    let arguments = Arguments::default().with(&left).with(&right).with(cols).with(&out);
    lab.launch("squared_difference", [rows, 1, 1], 256, 0, arguments)?;
    let row = |(a, b): (&[f32], &[f32])| {
        let difference = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>();
        [difference, a.iter().map(|a| f64::from(*a).powi(2)).sum()]
    };
    let expected: Vec<f64> = a.chunks_exact(cols).zip(b.chunks_exact(cols)).flat_map(row).collect();
    let found: Vec<f32> = out.download::<f64>(2 * rows)?.into_iter().map(|x| x as f32).collect();
    Ok(difference(&found, &expected))
}

fn undecidedness(lab: &Lab, rows: usize, cols: usize) -> Result<f64> {
    let logits: Vec<f32> = lab.normal(92, rows * cols).iter().map(|x| 3.0 * x).collect();
    let (input, out) = (lab.put(&logits)?, lab.poisoned::<f64>(rows)?);
    lab.launch("undecidedness", [rows, 1, 1], 256, 0, Arguments::default().with(&input).with(cols).with(&out))?;
    let expected: Vec<f64> = logits.chunks_exact(cols).map(crate::backend::cpu::norm::undecidedness).collect();
    let found: Vec<f32> = out.download::<f64>(rows)?.into_iter().map(|x| x as f32).collect();
    Ok(difference(&found, &expected))
}

/// Coordinate descent to its end, exactly, from codes that are off by up to two.
fn descend(lab: &Lab, rows: usize, cols: usize, group: usize) -> Result<f64> {
    const SWEEPS: usize = 3;
    let (low, high) = if group > 0 { (-8.0_f32, 7.0_f32) } else { (-127.0, 127.0) };
    let (w, h, damping) = (lab.normal(93, rows * cols), hessian(lab, cols), 2.5);
    let groups = cols.checked_div(group).unwrap_or(1);
    let scales: Vec<f32> = (0..rows * groups).map(|i| if i == 1 { 0.0 } else { 3.0 / high * (1.0 + 0.1 * (i % 4) as f32) }).collect();
    let scale = |row: usize, c: usize| scales[row * groups + c.checked_div(group).unwrap_or(0)];
    let nearest = |i: usize| if scale(i / cols, i % cols) > 0.0 { w[i] / scale(i / cols, i % cols) + (i % 5) as f32 - 2.0 } else { 0.0 };
    let before: Vec<i8> = (0..rows * cols).map(|i| nearest(i).round_ties_even().clamp(low, high) as i8).collect();
    let (matrix, added, weights, own) = (lab.put(&h)?, lab.put(&[damping])?, lab.put(&w)?, lab.put(&scales)?);
    let (damped, codes, slope) = (lab.poisoned::<f32>(cols * cols)?, lab.put(&before)?, lab.put(&vec![0.0_f32; rows * cols])?);
    let (steps, changed) = (lab.poisoned::<f32>(rows * 128)?, lab.put(&[0])?);
    let arguments = Arguments::default().with(&matrix).with(&added).with(cols).with(&damped);
    lab.launch("gptq_damped", [cols.div_ceil(256), cols, 1], 256, 0, arguments)?;
    let update = |first: usize, width: usize| {
        let arguments = Arguments::default().with(&slope).with(&damped).with(&steps).with(rows).with(cols);
        let arguments = arguments.with(first).with(width).with(0_usize);
        lab.launch("gptq_update", [cols.div_ceil(64), rows.div_ceil(64), 1], 256, 0, arguments)
    };
    for sweep in 0..=SWEEPS {
        for first in (0..cols).step_by(128) {
            let width = 128.min(cols - first);
            if sweep == 0 {
                let arguments = Arguments::default().with(&weights).with(&codes).with(&own).with(rows).with(cols);
                let arguments = arguments.with(first).with(width).with(group).with(&steps);
                lab.launch("gptq_residual", [rows.div_ceil(4), 1, 1], 128, 0, arguments)?;
            } else {
                let arguments = Arguments::default().with(&slope).with(&damped).with(rows).with(cols).with(first).with(width);
                let arguments = arguments.with(group).with(low).with(high).with(&own).with(&codes).with(&steps).with(&changed);
                lab.launch("gptq_descend", [rows.div_ceil(4), 1, 1], 128, 0, arguments)?;
            }
            update(first, width)?;
        }
    }
    let h: Vec<f32> = h.iter().enumerate().map(|(i, h)| (h + if i / cols == i % cols { damping } else { 0.0 }) as f32).collect();
    let mut expected = before.clone();
    for (row, codes) in expected.chunks_exact_mut(cols).enumerate() {
        let mut slope = vec![0.0_f32; cols];
        let mut add = |c: usize, step: f32| slope.iter_mut().zip(&h[c * cols..]).for_each(|(slope, h)| *slope += step * h);
        for c in 0..cols {
            add(c, w[row * cols + c] - f32::from(codes[c]) * scale(row, c));
        }
        for c in (0..SWEEPS).flat_map(|_| 0..cols) {
            let scale = scale(row, c);
            if scale <= 0.0 {
                continue;
            }
            let best = (f32::from(codes[c]) + slope[c] / (scale * h[c * (cols + 1)])).round_ties_even().clamp(low, high);
            let step = (best - f32::from(codes[c])) * scale;
            codes[c] = best as i8;
            slope.iter_mut().zip(&h[c * cols..]).for_each(|(slope, h)| *slope -= step * h);
        }
    }
    let moved = f64::from(u8::from(expected == before));
    Ok(moved + mismatches(&codes.download::<i8>(rows * cols)?, &expected) + mismatches(&changed.download::<i32>(1)?, &[1]))
}

fn abs_max(lab: &Lab, tokens: usize, cols: usize) -> Result<f64> {
    let (x, before) = (lab.normal(82, tokens * cols), lab.normal(83, cols).iter().map(|x| x.abs()).collect::<Vec<_>>());
    let (input, out) = (lab.put(&x)?, lab.put(&before)?);
    lab.launch("abs_max", [cols.div_ceil(128), 1, 1], 128, 0, Arguments::default().with(&input).with(tokens).with(cols).with(&out))?;
    let mut expected = before;
    for x in x.chunks_exact(cols) {
        expected.iter_mut().zip(x).for_each(|(max, x)| *max = max.max(x.abs()));
    }
    Ok(mismatches(&out.download::<f32>(cols)?, &expected))
}

fn histogram(lab: &Lab, count: usize) -> Result<f64> {
    let (x, bins, limit) = (lab.normal(84, count), 37, 1.5_f32);
    let (input, out) = (lab.put(&x)?, lab.put(&vec![1_u32; bins])?);
    lab.launch("histogram", [3, 1, 1], 256, 0, Arguments::default().with(&input).with(count).with(limit).with(bins).with(&out))?;
    let mut expected = vec![1_u32; bins];
    for x in x {
        let bin = ((x.abs() / limit).min(1.0) * bins as f32) as usize;
        expected[bin.min(bins - 1)] += 1;
    }
    Ok(mismatches(&out.download::<u32>(bins)?, &expected))
}

/// A positive definite matrix of correlated inputs.
fn hessian(lab: &Lab, size: usize) -> Vec<f64> {
    let mut h = vec![0.0; size * size];
    for x in lab.normal(85, 2 * size * size).chunks_exact(size) {
        for (row, a) in h.chunks_exact_mut(size).zip(x) {
            row.iter_mut().zip(x).for_each(|(sum, b)| *sum += f64::from(a + 0.5 * x[0]) * f64::from(b + 0.5 * x[0]));
        }
    }
    h
}

/// The order of `cholesky_load` and what follows; returns the factor and whether a pivot failed.
fn factor(lab: &Lab, hessian: &[f64], order: &[i32], damping: f64) -> Result<(Vec<f32>, bool)> {
    let size = order.len();
    let n = size.next_multiple_of(64);
    let (input, columns, added) = (lab.put(hessian)?, lab.put(order)?, lab.put(&[damping])?);
    let (a, x) = (lab.poisoned::<f64>(n * n)?, lab.poisoned::<f64>(n * n)?);
    let (inverses, failed, out) = (lab.poisoned::<f64>(n * 64)?, lab.put(&[0_i32])?, lab.poisoned::<f32>(size * size)?);
    let arguments = Arguments::default().with(&input).with(&columns).with(&added).with(size).with(n).with(&a);
    lab.launch("cholesky_load", [n.div_ceil(256), n, 1], 256, 0, arguments)?;
    for k in 0..n / 64 {
        let behind = n / 64 - k - 1;
        let step = || Arguments::default().with(&a).with(n).with(k);
        lab.launch("cholesky_diagonal", [1, 1, 1], 256, 0, step().with(&inverses).with(&failed))?;
        lab.launch("cholesky_panel", [behind, 1, 1], 256, 0, step().with(&inverses))?;
        lab.launch("cholesky_update", [behind, behind, 1], 256, 0, step())?;
    }
    for k in 0..n / 64 {
        let arguments = Arguments::default().with(&a).with(&inverses).with(n).with(k).with(&x);
        lab.launch("triangular_inverse", [k + 1, 1, 1], 256, 0, arguments)?;
    }
    let arguments = Arguments::default().with(&x).with(size).with(n).with(&out);
    lab.launch("cholesky_factor", [size.div_ceil(256), size, 1], 256, 0, arguments)?;
    Ok((out.download(size * size)?, failed.download::<i32>(1)?[0] != 0))
}

/// `Uᵀ U (H + damping)` is the identity.
fn cholesky(lab: &Lab, size: usize) -> Result<f64> {
    let (h, damping) = (hessian(lab, size), 3.0);
    let order: Vec<i32> = (0..size).map(|i| ((i * 7 + 3) % size) as i32).collect();
    // 7 divides no size that is checked, so that this is a permutation.
    let (found, failed) = factor(lab, &h, &order, damping)?;
    if failed {
        return Ok(f64::NAN);
    }
    let u: Vec<f64> = (0..size * size)
        .map(|i| f64::from(found[i]) * if i / size == i % size { 1.0 } else { f64::from(found[i / size * (size + 1)]) })
        .collect();
    let permuted = |i: usize, j: usize| h[order[i] as usize * size + order[j] as usize] + if i == j { damping } else { 0.0 };
    // U H, then Uᵀ of that.
    let mut product = vec![0.0; size * size];
    for (u, out) in u.chunks_exact(size).zip(product.chunks_exact_mut(size)) {
        for (k, u) in u.iter().enumerate() {
            out.iter_mut().enumerate().for_each(|(j, out)| *out += u * permuted(k, j));
        }
    }
    let mut identity = vec![0.0; size * size];
    for (u, product) in u.chunks_exact(size).zip(product.chunks_exact(size)) {
        for (u, out) in u.iter().zip(identity.chunks_exact_mut(size)) {
            out.iter_mut().zip(product).for_each(|(out, product)| *out += u * product);
        }
    }
    let expected: Vec<f64> = (0..size * size).map(|i| if i / size == i % size { 1.0 } else { 0.0 }).collect();
    Ok(difference(&identity.iter().map(|x| *x as f32).collect::<Vec<_>>(), &expected))
}

fn not_positive(lab: &Lab) -> Result<f64> {
    let size = 70;
    let mut h = hessian(lab, size);
    h[66 * size + 66] = -1.0;
    let order: Vec<i32> = (0..size as i32).collect();
    let (_, failed) = factor(lab, &h, &order, 0.0)?;
    Ok(f64::from(u8::from(!failed)))
}

/// The scale that loses least, as `quant::gptq` searches it.
fn search_scale(values: &[f32], importance: &[f64], low: f32, high: f32, grouped: bool) -> f32 {
    let absmax = values.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
    let stored = |scale: f32| if grouped { bf16::from_f32(scale).to_f32() } else { scale };
    let mut best = (stored(absmax / high), f64::INFINITY);
    let divisors: &[f32] = if grouped { &[high, -low] } else { &[high] };
    for divisor in divisors {
        for step in 0..26 {
            let scale = stored(absmax * (1.0 - 0.5 * step as f32 / 25.0) / divisor);
            let error = |value: f32| f64::from(value - (value / scale).round_ties_even().clamp(low, high) * scale);
            let loss: f64 =
                values.iter().zip(importance).map(|(value, importance)| (importance + f64::MIN_POSITIVE) * error(*value).powi(2)).sum();
            if scale > 0.0 && loss < best.1 {
                best = (scale, loss);
            }
        }
    }
    best.0
}

/// Codes and scales, exactly, against rounding column by column; `group` 0 is int8.
fn gptq(lab: &Lab, rows: usize, cols: usize, group: usize, compensate: bool) -> Result<f64> {
    let (low, high) = if group > 0 { (-8.0_f32, 7.0_f32) } else { (-127.0, 127.0) };
    let w = lab.normal(86, rows * cols);
    let share: Vec<f32> = lab.normal(87, cols * cols).iter().map(|x| 0.05 * x).collect();
    let importance: Vec<f64> = lab.normal(88, cols).iter().map(|x| f64::from(x * x) + 0.1).collect();
    let order: Vec<i32> = (0..cols).map(|j| (j ^ 1) as i32).collect();
    let (input, columns, weights) = (lab.put(&w)?, lab.put(&order)?, lab.put(&importance)?);
    let (work, shares) = (lab.poisoned::<f32>(rows * cols)?, lab.put(&share)?);
    let groups = cols.checked_div(group).unwrap_or(1);
    let (scales, codes, errors) = (lab.poisoned::<f32>(rows * groups)?, lab.poisoned::<i8>(rows * cols)?, lab.poisoned::<f32>(rows * 128)?);
    let arguments = Arguments::default().with(&input).with(&columns).with(cols).with(&work);
    lab.launch("gptq_permute", [rows, cols.div_ceil(256), 1], 256, 0, arguments)?;
    if group == 0 {
        let arguments = Arguments::default().with(&work).with(&weights).with(rows).with(cols).with(low).with(high).with(&scales);
        lab.launch("gptq_row_scales", [rows.div_ceil(4), 1, 1], 128, 0, arguments)?;
    }
    let factor: Option<&Buffer> = compensate.then_some(&shares);
    for first in (0..cols).step_by(128) {
        let width = 128.min(cols - first);
        let arguments =
            Arguments::default().with(&work).with(factor).with(&weights).with(&columns).with(rows).with(cols).with(first).with(width);
        let arguments = arguments.with(group).with(low).with(high).with(&scales).with(&codes).with(&errors);
        lab.launch("gptq_block", [rows.div_ceil(4), 1, 1], 128, 0, arguments)?;
        let behind = cols - first - width;
        if compensate {
            let arguments = Arguments::default()
                .with(&work)
                .with(&shares)
                .with(&errors)
                .with(rows)
                .with(cols)
                .with(first)
                .with(width)
                .with(first + width);
            lab.launch("gptq_update", [behind.div_ceil(64), rows.div_ceil(64), 1], 256, 0, arguments)?;
        }
    }
    let (mut expected_codes, mut expected_scales) = (vec![0_i8; rows * cols], Vec::new());
    for (row, w) in w.chunks_exact(cols).enumerate() {
        let mut values: Vec<f32> = order.iter().map(|c| w[*c as usize]).collect();
        let mut scale = 0.0;
        let step = if group > 0 { group } else { cols };
        for j in 0..cols {
            if j % step == 0 {
                scale = search_scale(&values[j..j + step], &importance[j..j + step], low, high, group > 0);
                expected_scales.push(scale);
            }
            let code = if scale > 0.0 { (values[j] / scale).round_ties_even().clamp(low, high) } else { 0.0 };
            expected_codes[row * cols + order[j] as usize] = code as i8;
            if compensate {
                let error = values[j] - code * scale;
                values[j + 1..].iter_mut().zip(&share[j * cols + j + 1..(j + 1) * cols]).for_each(|(value, share)| *value -= error * share);
            }
        }
    }
    Ok(mismatches(&codes.download::<i8>(rows * cols)?, &expected_codes)
        + mismatches(&scales.download::<f32>(rows * groups)?, &expected_scales))
}
