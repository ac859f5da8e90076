//! What rounds, rotates and convolves the slices of a mixer with int8 internals. Rounding and rotation agree with the CPU
//! backend to the bit; the convolution's sums are integers, and its codes lie within half a step of f64's result.

use super::mamba::{Rounded, conv_spans, projection_spans, shapes, silu, table};
use super::{Check, EXACT, Extent, FLOAT, Lab, difference, mismatches, worse};
use crate::backend::cpu::hadamard::transform_blocks;
use crate::backend::cuda::device::{Arguments, Buffer};
use crate::backend::cuda::mamba::fixed;
use crate::backend::{MambaShape, StateRotation};
use crate::error::Result;

/// A code's distance from the value that it stands for, in steps: a half, and the difference between two ways to compute SiLU.
const HALF_STEP: f64 = 0.501;

pub fn checks(extent: Extent) -> Vec<Check> {
    let mut all = Vec::new();
    for shape in shapes(extent) {
        let text = format!("{}x{} heads, {} groups, state {}", shape.heads, shape.head_dim, shape.groups, shape.state);
        let fours = fixed::serves(&shape, Some(StateRotation::of(&shape)));
        for fixed in [false, true] {
            let name = format!("{text}, {}", if fixed { "static" } else { "per token" });
            all.push(Check::new("spans", name.clone(), EXACT, move |lab| round(lab, &shape, fixed, false)));
            all.push(Check::new("widen_spans", name.clone(), EXACT, move |lab| widen(lab, &shape, fixed)));
            for lengths in [vec![1], vec![2, 11, 3]] {
                let name = format!("{name}, tokens {lengths:?}");
                for by_fours in [false, true].into_iter().take(1 + usize::from(fixed && fours)) {
                    let (kernel, lengths) = (if by_fours { "fixed_conv" } else { "conv_i8" }, lengths.clone());
                    let way = Way { fixed, steps: false, by_fours };
                    all.push(Check::new(kernel, name.clone(), HALF_STEP, move |lab| convolve(lab, &shape, &lengths, way)));
                }
            }
            let way = Way { fixed, steps: true, by_fours: false };
            all.push(Check::new("conv_i8_step", name, HALF_STEP, move |lab| convolve(lab, &shape, &[1, 1, 1], way)));
        }
        if fours {
            let way = Way { fixed: true, steps: true, by_fours: true };
            all.push(Check::new("fixed_conv_step", text.clone(), HALF_STEP, move |lab| convolve(lab, &shape, &[1, 1, 1], way)));
            all.push(Check::new("fixed_round", text.clone(), EXACT, move |lab| round(lab, &shape, true, true)));
            all.push(Check::new("fixed_turn", text.clone(), FLOAT, move |lab| turn(lab, &shape)));
        }
        all.push(Check::new("spans", format!("{text}, rotated"), EXACT, move |lab| rotate(lab, &shape)));
        all.push(Check::new("spans", format!("{text}, rotated and gated"), FLOAT, move |lab| rotate_gated(lab, &shape)));
    }
    all
}

/// Heads, groups and their widths; blocks of the rotation or 1.
fn layout(arguments: Arguments, shape: &MambaShape, heads: usize, groups: usize, rotation: Option<StateRotation>) -> Arguments {
    let (head, state) = rotation.map_or((1, 1), |rotation| (rotation.head, rotation.state));
    arguments.with(heads).with(shape.head_dim).with(head).with(groups).with(shape.state).with(state)
}

/// How internals are computed: under static scales or run-time ones, as steps or as sequences, by spans or by fours.
#[derive(Clone, Copy)]
struct Way {
    fixed: bool,
    steps: bool,
    by_fours: bool,
}

/// The slices of some tokens, one of which is zeros.
fn round(lab: &Lab, shape: &MambaShape, fixed: bool, by_fours: bool) -> Result<f64> {
    let (tokens, width, spans) = (9, shape.projected(), projection_spans(shape));
    let mut values = lab.normal(80, tokens * width);
    values[width..2 * width].fill(0.0);
    let expected = Rounded::new(&values, &spans, fixed);
    let (input, codes, fault) = (lab.put(&values)?, lab.poisoned::<i8>(tokens * width)?, lab.put(&[0])?);
    let scales = if fixed { lab.put(&expected.scales)? } else { lab.poisoned::<f32>(tokens * spans.len())? };
    let (given, found) = if fixed { (Some(&scales), None) } else { (None, Some(&scales)) };
    let launch = |fault: &Buffer| {
        if by_fours {
            let arguments = Arguments::default().with(&input).with(tokens).with(width).with(given).with(&codes).with(fault);
            return lab.launch("fixed_round", [width.div_ceil(512), tokens.div_ceil(8), 1], 128, 0, arguments);
        }
        let arguments = layout(Arguments::default().with(&input), shape, 2 * shape.heads, 2 * shape.groups, None).with(shape.heads);
        let arguments =
            arguments.with(None::<&Buffer>).with(None::<&Buffer>).with(0_usize).with(&codes).with(given).with(found).with(fault);
        lab.launch("spans", [tokens, spans.len().div_ceil(4), 1], 128, 0, arguments)
    };
    launch(&fault)?;
    let mut wrong = mismatches(&codes.download::<i8>(tokens * width)?, &expected.codes) + mismatches(&fault.download::<i32>(1)?, &[0]);
    if !fixed {
        wrong += mismatches(&scales.download::<f32>(expected.scales.len())?, &expected.scales);
    }
    // What is not a number is told apart.
    values[width - 1] = f32::NAN;
    input.upload(&values)?;
    launch(&fault)?;
    Ok(wrong + mismatches(&fault.download::<i32>(1)?, &[1]))
}

fn widen(lab: &Lab, shape: &MambaShape, fixed: bool) -> Result<f64> {
    let (tokens, width, spans) = (3, shape.projected(), projection_spans(shape));
    let rounded = Rounded::new(&lab.normal(81, tokens * width), &spans, fixed);
    let z: Vec<f32> = rounded.floats().chunks_exact(width).flat_map(|row| row[..shape.inner()].to_vec()).collect();
    let (codes, scales, out) = (lab.put(&rounded.codes)?, lab.put(&rounded.scales)?, lab.poisoned::<f32>(z.len())?);
    let (found, given) = if fixed { (None, Some(&scales)) } else { (Some(&scales), None) };
    let arguments = Arguments::default().with(&codes).with(width).with(found).with(spans.len()).with(given);
    let arguments = arguments.with(shape.heads).with(shape.head_dim).with(0_usize).with(shape.state).with(&out);
    lab.launch("widen_spans", [tokens, shape.heads.div_ceil(4), 1], 128, 0, arguments)?;
    Ok(mismatches(&out.download::<f32>(z.len())?, &z))
}

fn rotate(lab: &Lab, shape: &MambaShape) -> Result<f64> {
    let (tokens, width, rotation) = (2, shape.conv_channels(), StateRotation::of(shape));
    let mut values = lab.normal(82, tokens * width);
    let (x, none) = (lab.put(&values)?, None::<&Buffer>);
    let arguments = layout(Arguments::default().with(&x), shape, shape.heads, 2 * shape.groups, Some(rotation)).with(0_usize);
    let arguments = arguments.with(&x).with(none).with(0_usize).with(none).with(none).with(none).with(none);
    lab.launch("spans", [tokens, conv_spans(shape).len().div_ceil(4), 1], 128, 0, arguments)?;
    for row in values.chunks_exact_mut(width) {
        let (x, bc) = row.split_at_mut(shape.inner());
        transform_blocks(x, rotation.head);
        transform_blocks(bc, rotation.state);
    }
    Ok(mismatches(&x.download::<f32>(values.len())?, &values))
}

/// y turned back, times its gate.
fn rotate_gated(lab: &Lab, shape: &MambaShape) -> Result<f64> {
    let (tokens, inner, stride, rotation) = (2, shape.inner(), shape.projected(), StateRotation::of(shape));
    let (mut values, gates) = (lab.normal(88, tokens * inner), lab.normal(89, tokens * stride));
    let (y, gate, none) = (lab.put(&values)?, lab.put(&gates)?, None::<&Buffer>);
    let arguments = layout(Arguments::default().with(&y), shape, shape.heads, 0, Some(rotation)).with(0_usize);
    let arguments = arguments.with(&y).with(&gate).with(stride).with(none).with(none).with(none).with(none);
    lab.launch("spans", [tokens, shape.heads.div_ceil(4), 1], 128, 0, arguments)?;
    transform_blocks(&mut values, rotation.head);
    let gates = gates.chunks_exact(stride).flat_map(|row| &row[..inner]);
    let expected: Vec<f64> = values.iter().zip(gates).map(|(y, z)| f64::from(*y) * silu(f64::from(*z))).collect();
    Ok(difference(&y.download::<f32>(expected.len())?, &expected))
}

/// y turned back, times the gate that codes stand for.
fn turn(lab: &Lab, shape: &MambaShape) -> Result<f64> {
    let (tokens, inner, stride, rotation) = (9, shape.inner(), shape.projected(), StateRotation::of(shape));
    let mut values = lab.normal(88, tokens * inner);
    let gates = Rounded::new(&lab.normal(89, tokens * stride), &projection_spans(shape), true);
    let (y, codes, scales) = (lab.put(&values)?, lab.put(&gates.codes)?, lab.put(&gates.scales)?);
    let arguments = Arguments::default().with(&y).with(tokens).with(inner).with(rotation.head).with(&codes).with(stride).with(&scales);
    lab.launch("fixed_turn", [inner.div_ceil(512), tokens.div_ceil(8), 1], 128, 0, arguments)?;
    transform_blocks(&mut values, rotation.head);
    let gates = gates.floats();
    let gates = gates.chunks_exact(stride).flat_map(|row| &row[..inner]);
    let expected: Vec<f64> = values.iter().zip(gates).map(|(y, z)| f64::from(*y) * silu(f64::from(*z))).collect();
    Ok(difference(&y.download::<f32>(expected.len())?, &expected))
}

/// The convolution of codes and the windows behind it: the largest distance of a code from its value, in steps.
fn convolve(lab: &Lab, shape: &MambaShape, lengths: &[usize], Way { fixed, steps, by_fours }: Way) -> Result<f64> {
    let (channels, kernel, inner) = (shape.conv_channels(), shape.kernel, shape.inner());
    let (tokens, width, spans, all) = (lengths.iter().sum::<usize>(), shape.projected(), conv_spans(shape), projection_spans(shape));
    let rotation = StateRotation::of(shape);
    let mut values = lab.normal(83, tokens * width);
    let projected = Rounded::new(&values, &all, fixed);
    let windows = Rounded::new(&lab.normal(84, lengths.len() * (kernel - 1) * channels), &spans, fixed);
    // A static scale is that of the inputs.
    let windows = if fixed { windows.with(windows.codes.clone(), projected.scales[inner..inner + channels].to_vec()) } else { windows };
    let codes: Vec<i8> = lab.normal(85, channels * kernel).iter().map(|x| (x * 90.0).clamp(-127.0, 127.0) as i8).collect();
    let (factors, bias): (Vec<f32>, Vec<f32>) =
        (lab.normal(86, channels).iter().map(|x| 0.01 + 0.01 * x.abs()).collect(), lab.normal(87, channels));
    // A static scale of the input is part of the factor; behind the convolution all spans have one of their own.
    let input_scale = |c: usize| if fixed { projected.scales[inner + c] } else { 1.0 };
    let tap_scales: Vec<f32> = factors.iter().enumerate().map(|(c, factor)| factor * input_scale(c)).collect();
    let behind = Rounded::new(&vec![0.0; channels], &spans, true).scales;
    let mut table = table(lengths);
    if steps {
        (0..).zip(&mut table).for_each(|(slot, row)| row[2] = slot);
    }
    // In f64, from the floats that codes stand for.
    let floats = projected.floats();
    let held = windows.floats();
    let (mut expected, mut expected_windows) = (Vec::new(), Vec::new());
    for row in &table {
        let size = (kernel - 1) * channels;
        let mut inputs = if row[2] < 0 { vec![0.0; size] } else { held[row[2] as usize * size..(row[2] as usize + 1) * size].to_vec() };
        for t in row[0] as usize..row[1] as usize {
            inputs.extend(&floats[t * width + inner..t * width + inner + channels]);
        }
        for t in 0..(row[1] - row[0]) as usize {
            let mut values: Vec<f64> = (0..channels)
                .map(|c| {
                    let tap =
                        |k: usize| f64::from(codes[c * kernel + k]) * f64::from(factors[c]) * f64::from(inputs[(t + k) * channels + c]);
                    silu((0..kernel).map(tap).sum::<f64>() + f64::from(bias[c]))
                })
                .collect();
            let (x, bc) = values.split_at_mut(inner);
            hadamard(x, rotation.head);
            hadamard(bc, rotation.state);
            expected.extend(values);
        }
        expected_windows.extend_from_slice(&inputs[inputs.len() - size..]);
    }
    let (input, input_scales) = (lab.put(&projected.codes)?, lab.put(&projected.scales)?);
    let (slots, slot_scales) = (lab.put(&windows.codes)?, lab.put(&windows.scales)?);
    let (taps, tap_scales, bias, own) = (lab.put(&codes)?, lab.put(&tap_scales)?, lab.put(&bias)?, lab.put(table.as_flattened())?);
    let (out, given, fault) = (lab.poisoned::<i8>(tokens * channels)?, lab.put(&behind)?, lab.put(&[0])?);
    let out_scales = lab.poisoned::<f32>(tokens * spans.len())?;
    let some = |buffer| if fixed { None } else { Some(buffer) };
    let behind_fixed = if fixed { Some(&given) } else { None };
    let (mut wrong, mut again) = (0.0, None);
    if steps {
        // It rounds what stands in front itself, and leaves what the codes of z and dt stand for.
        let (raw, widened) = (lab.put(&values)?, lab.poisoned::<f32>(tokens * (inner + shape.heads))?);
        let arguments = Arguments::default().with(&raw).with(if fixed { Some(&input_scales) } else { None });
        let arguments = arguments.with(&taps).with(&tap_scales).with(&bias);
        let (kernel, blocks, arguments) = if by_fours {
            let arguments = arguments.with(inner).with(channels).with(shape.heads).with(rotation.head).with(rotation.state);
            let arguments = arguments.with(&slots).with(behind_fixed).with(&widened).with(&out).with(&fault);
            ("fixed_conv_step", width.div_ceil(512), arguments)
        } else {
            let arguments = layout(arguments.with(kernel), shape, shape.heads, 2 * shape.groups, Some(rotation));
            let arguments = arguments.with(&slots).with(some(&slot_scales)).with(behind_fixed);
            ("conv_i8_step", all.len().div_ceil(4), arguments.with(&widened).with(&out).with(&out_scales).with(&fault))
        };
        let launch = move || lab.launch(kernel, [blocks, tokens, 1], 128, 0, arguments.clone());
        launch()?;
        let expected = floats.chunks_exact(width).flat_map(|row| row[..inner].iter().chain(&row[inner + channels..])).copied();
        wrong += mismatches(&widened.download::<f32>(tokens * (inner + shape.heads))?, &expected.collect::<Vec<_>>());
        wrong += mismatches(&fault.download::<i32>(1)?, &[0]);
        again = Some((raw, launch));
    } else {
        let begin = || {
            let arguments = Arguments::default().with(&input).with(width).with(inner).with(some(&input_scales));
            arguments.with(all.len()).with(shape.heads)
        };
        let longest = lengths.iter().max().copied().unwrap_or(0);
        let blocks = |count: usize| [count, longest.div_ceil(8), lengths.len()];
        if by_fours {
            let arguments = Arguments::default().with(&input).with(width).with(inner).with(&taps).with(&tap_scales).with(&bias);
            let arguments = arguments.with(channels).with(rotation.head).with(rotation.state).with(&own).with(&slots);
            let arguments = arguments.with(behind_fixed).with(&out).with(&fault);
            lab.launch("fixed_conv", blocks(channels.div_ceil(512)), 128, 0, arguments)?;
        } else {
            let arguments = begin().with(&taps).with(&tap_scales).with(&bias).with(kernel);
            let arguments = layout(arguments, shape, shape.heads, 2 * shape.groups, Some(rotation)).with(&own);
            let arguments = arguments.with(&slots).with(some(&slot_scales)).with(behind_fixed);
            lab.launch("conv_i8", blocks(spans.len().div_ceil(4)), 128, 0, arguments.with(&out).with(&out_scales).with(&fault))?;
        }
        let arguments = begin().with(kernel).with(shape.heads).with(shape.head_dim).with(2 * shape.groups).with(shape.state);
        let arguments = arguments.with(&own).with(&slots).with(some(&slot_scales));
        lab.launch("conv_window_i8", [spans.len().div_ceil(4), lengths.len(), 1], 128, 0, arguments)?;
    }
    let scales = if fixed { behind } else { out_scales.download::<f32>(tokens * spans.len())? };
    let of_channel: Vec<usize> = spans.iter().enumerate().flat_map(|(i, span)| std::iter::repeat_n(i, *span)).collect();
    let mut distance = wrong;
    for (i, (code, value)) in out.download::<i8>(tokens * channels)?.iter().zip(&expected).enumerate() {
        let (row, c) = (i / channels, i % channels);
        let scale = f64::from(if fixed { scales[c] } else { scales[row * spans.len() + of_channel[c]] });
        // Beyond the largest code there is nothing nearer.
        let value = value.clamp(-127.0 * scale, 127.0 * scale);
        distance = worse(distance, (f64::from(*code) - value / scale).abs());
    }
    let scales = if fixed { windows.scales.clone() } else { slot_scales.download::<f32>(windows.scales.len())? };
    let found = windows.with(slots.download::<i8>(windows.codes.len())?, scales).floats();
    if let Some((raw, launch)) = again {
        // What is not a number is told apart, in dt, too.
        values[width - 1] = f32::NAN;
        raw.upload(&values)?;
        launch()?;
        distance += mismatches(&fault.download::<i32>(1)?, &[1]);
    }
    Ok(worse(distance, mismatches(&found, &expected_windows)))
}

/// The transform of each `block` values in f64.
pub(super) fn hadamard(values: &mut [f64], block: usize) {
    for values in values.chunks_exact_mut(block) {
        let before = values.to_vec();
        for (i, value) in values.iter_mut().enumerate() {
            let sign = |j: usize| if (i & j).count_ones().is_multiple_of(2) { 1.0 } else { -1.0 };
            *value = before.iter().enumerate().map(|(j, x)| sign(j) * x).sum::<f64>() / (block as f64).sqrt();
        }
    }
}
