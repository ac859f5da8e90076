//! Kernels that go row by row: embeddings, norms, relu², emitting, copies, logits.

use half::bf16;

use super::internals::hadamard as turn;
use super::linears::{pack_int4, quantized};
use super::{Check, EXACT, Extent, FLOAT, Lab, difference, mismatches, pad, padded, wide, worse};
use crate::backend::cpu::int_matmul::QuantizedRows;
use crate::backend::cuda::device::{Arguments, Buffer};
use crate::error::Result;
use crate::format::Scheme;

/// Threads of the kernels that emit.
const EMIT_THREADS: usize = 1024;

/// Bytes of shared memory that they take.
fn emit_shared(cols: usize) -> usize {
    4 * (cols + cols.div_ceil(32))
}

pub fn checks(extent: Extent) -> Vec<Check> {
    let mut all = Vec::new();
    for (vocabulary, cols) in [(11, 96), (7, 100), (5, 320)] {
        for kind in ["embed_f32", "embed_bf16", "embed_int8", "embed_int4"] {
            if kind != "embed_int4" || cols % 32 == 0 {
                all.push(Check::new(kind, format!("{vocabulary}x{cols}"), EXACT, move |lab| embed(lab, kind, vocabulary, cols)));
            }
        }
    }
    let mut shapes = vec![(1, 64, 0), (3, 37, 0), (2, 96, 32), (5, 160, 16), (1, 4096, 128), (2, 2688, 128)];
    if extent == Extent::Published {
        shapes.extend([(1, 21504, 1024), (9, 15680, 64), (17, 12544, 256), (1024, 4480, 128), (3, 1856, 64)]);
    }
    for (tokens, cols, hadamard) in shapes {
        let shape = format!("{tokens}x{cols}, hadamard {hadamard}");
        all.push(Check::new("emit", shape.clone(), EXACT, move |lab| emit(lab, "emit", tokens, cols, hadamard, |x| x)));
        all.push(Check::new("relu2", shape.clone(), EXACT, move |lab| {
            emit(lab, "relu2", tokens, cols, hadamard, |x| x.max(0.0) * x.max(0.0))
        }));
        all.push(Check::new("rms_norm", shape, FLOAT, move |lab| rms_norm(lab, tokens, 1, cols, hadamard)));
    }
    for kernel in ["emit", "emit_rows"] {
        all.push(Check::new(kernel, "rows of zeros and of NaN", EXACT, move |lab| extreme_rows(lab, kernel)));
        all.push(Check::new(kernel, "static scale", EXACT, move |lab| static_scale(lab, kernel)));
    }
    for (tokens, groups, group, hadamard) in [(1, 2, 96, 0), (3, 8, 64, 64), (2, 8, 1024, 1024), (5, 1, 40, 8)] {
        let shape = format!("{tokens}x{groups}x{group}, hadamard {hadamard}");
        all.push(Check::new("rms_norm", shape, FLOAT, move |lab| rms_norm(lab, tokens, groups, group, hadamard)));
    }
    let mut rows = vec![(3, 36, 0), (2, 96, 32), (5, 160, 2), (1, 4096, 128), (2, 2688, 64), (2, 3072, 1024), (1, 8192, 512)];
    if extent == Extent::Published {
        rows.extend([(1024, 21504, 1024), (100, 21504, 0), (17, 15680, 64), (1024, 4480, 128)]);
    }
    for (tokens, cols, hadamard) in rows {
        let shape = format!("{tokens}x{cols}, hadamard {hadamard}");
        let ways = [(0, false), (0, true), (cols, false), (1024, false), (384, false)];
        for (group, square) in ways.into_iter().filter(|(group, _)| *group == 0 || cols % group == 0 && group % 128 == 0) {
            let tolerance = if group == 0 { EXACT } else { FLOAT };
            let name = format!("{shape}, norm of {group}, relu2 {square}");
            all.push(Check::new("emit_rows", name, tolerance, move |lab| emit_rows(lab, [tokens, cols], hadamard, group, square)));
        }
    }
    for (parts, width, hadamard) in [(3, 64, 2), (5, 448, 64), (3, 1280, 128), (4, 1280, 256), (2, 2048, 512), (21, 1024, 1024)] {
        let shape = format!("{parts}x{width}, hadamard {hadamard}");
        all.push(Check::new("turn_row", shape.clone(), EXACT, move |lab| turn_row(lab, [parts, width], hadamard, false)));
        all.push(Check::new("turn_row", format!("norm of {shape}"), FLOAT, move |lab| turn_row(lab, [parts, width], hadamard, true)));
    }
    for count in [1, 1023, 5000] {
        all.push(Check::new("add", count.to_string(), EXACT, move |lab| add(lab, count)));
    }
    for (tokens, cols) in [(3, 37), (2, 192)] {
        all.push(Check::new("to_bf16", format!("{tokens}x{cols}"), EXACT, move |lab| to_bf16(lab, tokens, cols)));
        all.push(Check::new("gather_rows", format!("{tokens}x{cols}"), EXACT, move |lab| gather(lab, tokens, cols)));
        all.push(Check::new("gather_codes", format!("{tokens}x{cols}"), EXACT, move |lab| gather_codes(lab, tokens, cols)));
        all.push(Check::new("scatter_add", format!("{tokens}x{cols}"), EXACT, move |lab| scatter_add(lab, tokens, cols)));
    }
    for (rows, cols) in [(3, 320), (2, 5000), (1, 131_072)] {
        let shape = format!("{rows}x{cols}");
        for parts in [1, 3, 64] {
            let shape = format!("{shape} in {parts}");
            all.push(Check::new("argmax", shape, EXACT, move |lab| argmax(lab, rows, cols, parts)));
        }
        all.push(Check::new("log_probability", shape.clone(), FLOAT, move |lab| log_probability(lab, rows, cols)));
        all.push(Check::new("divergence", shape, FLOAT, move |lab| divergence(lab, rows, cols)));
    }
    all
}

fn embed(lab: &Lab, kernel: &str, vocabulary: usize, cols: usize) -> Result<f64> {
    let table = lab.normal(1, vocabulary * cols);
    let ids = [vocabulary as i32 - 1, 0, 2, 2];
    let begin = Arguments::default();
    let (arguments, values, _kept) = match kernel {
        "embed_f32" => {
            let buffer = lab.put(&table)?;
            (begin.with(&buffer), table, vec![buffer])
        }
        "embed_bf16" => {
            let rounded: Vec<u16> = table.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
            let buffer = lab.put(&pad(&rounded, cols))?;
            (begin.with(&buffer), table.iter().map(|x| bf16::from_f32(*x).to_f32()).collect(), vec![buffer])
        }
        _ => {
            let int4 = kernel == "embed_int4";
            let scheme = if int4 { Scheme::Grouped { bits: 4, group: 32 } } else { Scheme::Int8 };
            let matrix = quantized(&table, vocabulary, cols, scheme);
            if int4 {
                let scales: Vec<u16> = matrix.scales.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
                let (codes, scales) = (lab.put(&pack_int4(&matrix.codes, cols))?, lab.put(&scales)?);
                (begin.with(&codes).with(&scales).with(32_usize), matrix.dequantize(), vec![codes, scales])
            } else {
                let (codes, scales) = (lab.put(&pad(&matrix.codes, cols))?, lab.put(&matrix.scales)?);
                (begin.with(&codes).with(&scales), matrix.dequantize(), vec![codes, scales])
            }
        }
    };
    let (places, out) = (lab.put(&ids)?, lab.poisoned::<f32>(ids.len() * cols)?);
    lab.launch(kernel, [ids.len(), 1, 1], 256, 0, arguments.with(&places).with(cols).with(&out))?;
    let expected: Vec<f32> = ids.iter().flat_map(|id| &values[*id as usize * cols..(*id as usize + 1) * cols]).copied().collect();
    Ok(mismatches(&out.download::<f32>(ids.len() * cols)?, &expected))
}

/// What an emitting kernel puts out.
struct Emitted {
    float: Buffer,
    codes: Buffer,
    scales: Buffer,
}

impl Emitted {
    fn new(lab: &Lab, tokens: usize, cols: usize) -> Result<Self> {
        Ok(Self {
            float: lab.poisoned::<f32>(tokens * cols)?,
            codes: lab.poisoned::<i8>(tokens * padded(cols))?,
            scales: lab.poisoned::<f32>(tokens)?,
        })
    }

    fn arguments(&self, arguments: Arguments, static_scale: Option<&Buffer>, hadamard: usize) -> Arguments {
        arguments.with(&self.float).with(&self.codes).with(&self.scales).with(static_scale).with(hadamard)
    }

    /// Codes, their padding and scales that are not those of the CPU backend for the floats put out.
    fn wrong_codes(&self, floats: &[f32], tokens: usize, cols: usize) -> Result<f64> {
        let expected = QuantizedRows::per_token(floats, tokens, cols);
        let codes: Vec<i8> = (0..tokens).flat_map(|t| pad(expected.row(t), cols)).collect();
        let scales: Vec<u32> = self.scales.download::<f32>(tokens)?.iter().map(|x| x.to_bits()).collect();
        let expected: Vec<u32> = expected.scales.iter().map(|x| x.to_bits()).collect();
        Ok(mismatches(&self.codes.download::<i8>(codes.len())?, &codes) + mismatches(&scales, &expected))
    }
}

/// Orthonormal Hadamard transform of blocks of a row, in the order of the CPU backend's sums.
fn transform(row: &mut [f32], block: usize) {
    for block in row.chunks_exact_mut(block.max(1)) {
        let mut half = 1;
        while half < block.len() {
            for pair in block.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        let scale = 1.0 / (block.len() as f32).sqrt();
        for x in block.iter_mut() {
            *x *= scale;
        }
    }
}

fn emit(lab: &Lab, kernel: &str, tokens: usize, cols: usize, hadamard: usize, f: impl Fn(f32) -> f32) -> Result<f64> {
    let x = lab.normal(2, tokens * cols);
    let (input, out) = (lab.put(&x)?, Emitted::new(lab, tokens, cols)?);
    let arguments = out.arguments(Arguments::default().with(&input).with(cols), None, hadamard);
    lab.launch(kernel, [tokens, 1, 1], EMIT_THREADS, emit_shared(cols), arguments)?;
    let mut expected: Vec<f32> = x.into_iter().map(f).collect();
    if hadamard > 0 {
        transform(&mut expected, hadamard);
    }
    Ok(mismatches(&out.float.download::<f32>(tokens * cols)?, &expected) + out.wrong_codes(&expected, tokens, cols)?)
}

/// Emits rows as they are.
fn emit_plain(lab: &Lab, kernel: &str, input: &Buffer, tokens: usize, cols: usize, out: &Emitted, fixed: Option<&Buffer>) -> Result<()> {
    let begin = Arguments::default().with(input);
    let (begin, threads, shared) = if kernel == "emit" {
        (begin, EMIT_THREADS, emit_shared(cols))
    } else {
        (begin.with(None::<&Buffer>).with(0.0).with(0_usize).with(0_usize), 32 * cols.div_ceil(1024), 0)
    };
    lab.launch(kernel, [tokens, 1, 1], threads, shared, out.arguments(begin.with(cols), fixed, 0))
}

fn extreme_rows(lab: &Lab, kernel: &str) -> Result<f64> {
    let cols = 72;
    let mut x = vec![0.0_f32; 3 * cols];
    x[cols + 69] = f32::NAN;
    x[2 * cols + 3] = -1e-39;
    let (input, out) = (lab.put(&x)?, Emitted::new(lab, 3, cols)?);
    emit_plain(lab, kernel, &input, 3, cols, &out, None)?;
    let scales = out.scales.download::<f32>(3)?;
    let codes = out.codes.download::<i8>(3 * padded(cols))?;
    let zeros = codes[..2 * padded(cols)].iter().all(|code| *code == 0);
    Ok(f64::from(u8::from(!(scales[0] == 0.0 && scales[1].is_nan() && scales[2] > 0.0 && zeros))))
}

fn static_scale(lab: &Lab, kernel: &str) -> Result<f64> {
    let (tokens, cols, scale) = (2, 72, 0.013_f32);
    let x = lab.normal(3, tokens * cols);
    let (input, out, fixed) = (lab.put(&x)?, Emitted::new(lab, tokens, cols)?, lab.put(&[scale])?);
    emit_plain(lab, kernel, &input, tokens, cols, &out, Some(&fixed))?;
    let codes: Vec<i8> = x.iter().map(|x| (x / scale).clamp(-127.0, 127.0).round_ties_even() as i8).collect();
    let found = out.codes.download::<i8>(tokens * padded(cols))?;
    Ok(mismatches(&found, &pad(&codes, cols)) + mismatches(&out.scales.download::<f32>(tokens)?, &[scale; 2]))
}

fn rms_norm(lab: &Lab, tokens: usize, groups: usize, group: usize, hadamard: usize) -> Result<f64> {
    let cols = groups * group;
    let (x, weight, eps) = (lab.normal(4, tokens * cols), lab.normal(5, cols), 1e-5_f32);
    let (input, weights, out) = (lab.put(&x)?, lab.put(&weight)?, Emitted::new(lab, tokens, cols)?);
    let arguments = Arguments::default().with(&input).with(&weights).with(eps).with(cols).with(group);
    lab.launch("rms_norm", [tokens, 1, 1], EMIT_THREADS, emit_shared(cols), out.arguments(arguments, None, hadamard))?;
    finish_norm(&out, normed(&x, &weight, group, eps), tokens, cols, hadamard)
}

/// Rows in registers, with a norm of groups, or with relu², or as they are.
fn emit_rows(lab: &Lab, [tokens, cols]: [usize; 2], hadamard: usize, group: usize, square: bool) -> Result<f64> {
    let (x, weight, eps) = (lab.normal(4, tokens * cols), lab.normal(5, cols), 1e-5_f32);
    let (input, weights, out) = (lab.put(&x)?, lab.put(&weight)?, Emitted::new(lab, tokens, cols)?);
    let arguments = Arguments::default().with(&input).with(if group > 0 { Some(&weights) } else { None }).with(eps);
    let arguments = arguments.with(group).with(usize::from(square)).with(cols);
    lab.launch("emit_rows", [tokens, 1, 1], 32 * cols.div_ceil(1024), 0, out.arguments(arguments, None, hadamard))?;
    if group > 0 {
        return finish_norm(&out, normed(&x, &weight, group, eps), tokens, cols, hadamard);
    }
    let mut expected: Vec<f32> = x.into_iter().map(|x| if square { x.max(0.0) * x.max(0.0) } else { x }).collect();
    if hadamard > 0 {
        transform(&mut expected, hadamard);
    }
    Ok(mismatches(&out.float.download::<f32>(tokens * cols)?, &expected) + out.wrong_codes(&expected, tokens, cols)?)
}

/// A row in parts, whose norm or relu² is turned.
fn turn_row(lab: &Lab, [parts, width]: [usize; 2], hadamard: usize, norm: bool) -> Result<f64> {
    let (x, weight, eps) = (lab.normal(4, parts * width), lab.normal(5, parts * width), 1e-2_f32);
    let (input, weights, out) = (lab.put(&x)?, lab.put(&weight)?, lab.poisoned::<f32>(parts * width)?);
    let arguments = Arguments::default().with(&input).with(if norm { Some(&weights) } else { None }).with(eps);
    let arguments = arguments.with(usize::from(!norm)).with(width).with(hadamard).with(&out);
    lab.launch("turn_row", [parts, 1, 1], 256, 0, arguments)?;
    let found = out.download::<f32>(parts * width)?;
    if norm {
        let mut expected = normed(&x, &weight, width, eps);
        turn(&mut expected, hadamard);
        return Ok(difference(&found, &expected));
    }
    let mut expected: Vec<f32> = x.iter().map(|x| x.max(0.0) * x.max(0.0)).collect();
    transform(&mut expected, hadamard);
    Ok(mismatches(&found, &expected))
}

/// Rows normed over each `group` values, `weight` of one row or of all.
fn normed(x: &[f32], weight: &[f32], group: usize, eps: f32) -> Vec<f64> {
    let mut normed = wide(x);
    for (values, weight) in normed.chunks_exact_mut(group).zip(weight.chunks_exact(group).cycle()) {
        let scale = 1.0 / (values.iter().map(|x| x * x).sum::<f64>() / group as f64 + f64::from(eps)).sqrt();
        values.iter_mut().zip(weight).for_each(|(x, weight)| *x *= scale * f64::from(*weight));
    }
    normed
}

/// Compares floats with the reference and codes with the floats.
fn finish_norm(out: &Emitted, mut expected: Vec<f64>, tokens: usize, cols: usize, hadamard: usize) -> Result<f64> {
    if hadamard > 0 {
        turn(&mut expected, hadamard);
    }
    let floats = out.float.download::<f32>(tokens * cols)?;
    Ok(worse(difference(&floats, &expected), out.wrong_codes(&floats, tokens, cols)?))
}

fn add(lab: &Lab, count: usize) -> Result<f64> {
    let (a, b) = (lab.normal(9, count), lab.normal(10, count));
    let (into, other) = (lab.put(&a)?, lab.put(&b)?);
    lab.launch("add", [count.div_ceil(1024), 1, 1], 256, 0, Arguments::default().with(&into).with(&other).with(count).with(&into))?;
    let expected: Vec<f32> = a.iter().zip(&b).map(|(a, b)| a + b).collect();
    Ok(mismatches(&into.download::<f32>(count)?, &expected))
}

fn to_bf16(lab: &Lab, tokens: usize, cols: usize) -> Result<f64> {
    let x = lab.normal(11, tokens * cols);
    let (input, out) = (lab.put(&x)?, lab.poisoned::<u16>(tokens * padded(cols))?);
    lab.launch("to_bf16", [tokens, 1, 1], 256, 0, Arguments::default().with(&input).with(cols).with(&out))?;
    let rounded: Vec<u16> = x.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
    Ok(mismatches(&out.download::<u16>(tokens * padded(cols))?, &pad(&rounded, cols)))
}

fn gather(lab: &Lab, tokens: usize, cols: usize) -> Result<f64> {
    let (x, rows) = (lab.normal(12, tokens * cols), [tokens as i32 - 1, 0, 1, 1]);
    let (input, places, out) = (lab.put(&x)?, lab.put(&rows)?, lab.poisoned::<f32>(4 * cols)?);
    lab.launch("gather_rows", [4, 1, 1], 256, 0, Arguments::default().with(&input).with(&places).with(cols).with(&out))?;
    let expected: Vec<f32> = rows.iter().flat_map(|row| &x[*row as usize * cols..(*row as usize + 1) * cols]).copied().collect();
    Ok(mismatches(&out.download::<f32>(4 * cols)?, &expected))
}

fn gather_codes(lab: &Lab, tokens: usize, cols: usize) -> Result<f64> {
    let x = QuantizedRows::per_token(&lab.normal(13, tokens * cols), tokens, cols);
    let rows = [tokens - 1, 0, 1];
    let codes: Vec<i8> = (0..tokens).flat_map(|t| pad(x.row(t), cols)).collect();
    let (input, scales, places) = (lab.put(&codes)?, lab.put(&x.scales)?, lab.put(&rows.map(|row| row as i32))?);
    let (out, out_scales) = (lab.poisoned::<i8>(3 * padded(cols))?, lab.poisoned::<f32>(3)?);
    let arguments = Arguments::default().with(&input).with(&scales).with(&places).with(cols).with(&out).with(&out_scales);
    lab.launch("gather_codes", [3, 1, 1], 256, 0, arguments)?;
    let expected = x.select(&rows);
    let codes: Vec<i8> = (0..3).flat_map(|t| pad(expected.row(t), cols)).collect();
    Ok(mismatches(&out.download::<i8>(codes.len())?, &codes) + mismatches(&out_scales.download::<f32>(3)?, &expected.scales))
}

fn scatter_add(lab: &Lab, tokens: usize, cols: usize) -> Result<f64> {
    let (into, x) = (lab.normal(14, tokens * cols), lab.normal(15, 4 * cols));
    let (rows, weights) = ([1_usize, 0, 1, tokens - 1], [0.5_f32, -2.0, 0.3, 1.7]);
    let (sum, input, places) = (lab.put(&into)?, lab.put(&x)?, lab.put(&rows.map(|row| row as i32))?);
    let shares = lab.put(&weights)?;
    let arguments = Arguments::default().with(&sum).with(&input).with(&places).with(&shares).with(4_usize).with(cols);
    lab.launch("scatter_add", [cols.div_ceil(256), 1, 1], 256, 0, arguments)?;
    let mut expected = into;
    for ((row, weight), x) in rows.iter().zip(weights).zip(x.chunks_exact(cols)) {
        expected[row * cols..(row + 1) * cols].iter_mut().zip(x).for_each(|(sum, x)| *sum += weight * x);
    }
    Ok(mismatches(&sum.download::<f32>(tokens * cols)?, &expected))
}

/// Logits with two equal maxima in the first row.
fn logits(lab: &Lab, stream: u64, rows: usize, cols: usize) -> Vec<f32> {
    let mut x: Vec<f32> = lab.normal(stream, rows * cols).into_iter().map(|x| 4.0 * x).collect();
    x[cols / 3] = 30.0;
    x[cols - 1] = 30.0;
    x
}

fn first_largest(row: &[f32]) -> usize {
    row.iter().enumerate().fold((0, f32::NEG_INFINITY), |best, (i, x)| if *x > best.1 { (i, *x) } else { best }).0
}

fn log_softmax(row: &[f32]) -> Vec<f64> {
    let max = f64::from(row[first_largest(row)]);
    let sum = row.iter().map(|x| (f64::from(*x) - max).exp()).sum::<f64>().ln();
    row.iter().map(|x| f64::from(*x) - max - sum).collect()
}

/// Rows divided among `parts` blocks; twice, and then with no number in the last row.
fn argmax(lab: &Lab, rows: usize, cols: usize, parts: usize) -> Result<f64> {
    let mut x = logits(lab, 16, rows, cols);
    let (tops, tickets, fault) = (lab.poisoned::<u64>(rows * parts)?, lab.put(&vec![0; rows])?, lab.put(&[7])?);
    let mut wrong = 0.0;
    for (round, fault) in [None, Some(&fault), None].into_iter().enumerate() {
        if round == 1 {
            x.rotate_right(1);
        } else if round == 2 {
            x[(rows - 1) * cols..].fill(f32::NAN);
        }
        let (input, out) = (lab.put(&x)?, lab.poisoned::<i32>(rows + 1)?);
        let arguments = Arguments::default().with(&input).with(cols).with(&tops).with(&tickets).with(fault).with(&out);
        lab.launch("argmax", [parts, rows, 1], 256, 0, arguments)?;
        let mut expected: Vec<i32> = x.chunks_exact(cols).map(|row| first_largest(row) as i32).collect();
        expected.push(if fault.is_some() { 7 } else { 0 });
        wrong += mismatches(&out.download::<i32>(rows + 1)?, &expected);
    }
    Ok(wrong)
}

fn log_probability(lab: &Lab, rows: usize, cols: usize) -> Result<f64> {
    let x = logits(lab, 17, rows, cols);
    let targets = [(rows - 1, 0), (0, cols / 3), (0, cols - 1), (rows - 1, cols - 2)];
    let row_of: Vec<i32> = targets.iter().map(|(row, _)| *row as i32).collect();
    let token_of: Vec<i32> = targets.iter().map(|(_, token)| *token as i32).collect();
    let (input, places, tokens) = (lab.put(&x)?, lab.put(&row_of)?, lab.put(&token_of)?);
    let (out, top) = (lab.poisoned::<f64>(4)?, lab.poisoned::<i32>(4)?);
    let arguments = Arguments::default().with(&input).with(cols).with(&places).with(&tokens).with(&out).with(&top);
    lab.launch("log_probability", [4, 1, 1], 256, 0, arguments)?;
    let row = |row: usize| &x[row * cols..(row + 1) * cols];
    let expected: Vec<f64> = targets.iter().map(|(r, token)| log_softmax(row(*r))[*token]).collect();
    let tops: Vec<i32> = targets.iter().map(|(r, token)| i32::from(first_largest(row(*r)) == *token)).collect();
    let found: Vec<f32> = out.download::<f64>(4)?.into_iter().map(|x| x as f32).collect();
    Ok(worse(difference(&found, &expected), mismatches(&top.download::<i32>(4)?, &tops)))
}

fn divergence(lab: &Lab, rows: usize, cols: usize) -> Result<f64> {
    let p = logits(lab, 18, rows, cols);
    let noise = lab.normal(19, rows * cols);
    let q: Vec<f32> = p.iter().zip(&noise).map(|(p, noise)| p + 0.3 * noise).collect();
    let (a, b, out, same) = (lab.put(&p)?, lab.put(&q)?, lab.poisoned::<f64>(rows)?, lab.poisoned::<i32>(rows)?);
    let arguments = Arguments::default().with(&a).with(&b).with(cols).with(&out).with(&same);
    lab.launch("divergence", [rows, 1, 1], 256, 0, arguments)?;
    let mut expected = Vec::new();
    let mut tops = Vec::new();
    for (p, q) in p.chunks_exact(cols).zip(q.chunks_exact(cols)) {
        expected.push(log_softmax(p).iter().zip(log_softmax(q)).map(|(p, q)| p.exp() * (p - q)).sum::<f64>());
        tops.push(i32::from(first_largest(p) == first_largest(q)));
    }
    let found: Vec<f32> = out.download::<f64>(rows)?.into_iter().map(|x| x as f32).collect();
    Ok(worse(difference(&found, &expected), mismatches(&same.download::<i32>(rows)?, &tops)))
}
