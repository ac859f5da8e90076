//! Linears: matrix-vector and matrix products in every pair of formats, and the experts' grouped ones.

use half::bf16;
use rayon::prelude::*;

use super::{BF16_WEIGHTS, Check, EXACT, Extent, FLOAT, Lab, difference, mismatches, pad};
use crate::backend::cpu::int_matmul::{self, PackedMatrix, QuantizedRows};
use crate::backend::cuda::device::{Arguments, Buffer};
use crate::backend::cuda::stream::{self, Launch};
use crate::backend::cuda::wgmma::{self, Operands};
use crate::error::{Error, Result};
use crate::format::{QuantizedMatrix, Scheme, round_to_nearest};

/// Bytes of shared memory of the matrix products, as `kernels/README.md` says.
const GEMM_SHARED: usize = 65536;
const GEMM_W4A8_SHARED: usize = 73728;

/// Tokens of a tile of the matrix-vector kernels.
const FEW_TILE: usize = 8;

/// A linear's weights and what it reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Weights {
    F32,
    Bf16,
    Int8,
    Int4(usize),
}

impl Weights {
    /// The suffix of a kernel's name for int8 or 16-bit activations.
    fn suffix(self, int8: bool) -> &'static str {
        match (self, int8) {
            (Self::F32, _) => "f32",
            (Self::Bf16, _) => "bf16",
            (Self::Int8, true) => "w8a8",
            (Self::Int8, false) => "w8a16",
            (Self::Int4(_), true) => "w4a8",
            (Self::Int4(_), false) => "w4a16",
        }
    }
}

fn few_kernel(suffix: &str) -> &'static str {
    match suffix {
        "f32" => "few_f32",
        "bf16" => "few_bf16",
        "w8a8" => "few_w8a8",
        "w8a16" => "few_w8a16",
        "w4a8" => "few_w4a8",
        _ => "few_w4a16",
    }
}

/// The kernels that the copy engine feeds, in place of one that it does not.
fn stream_kernels(few: &str, tokens: usize) -> Vec<&'static str> {
    let (one, several) = match few {
        "few_w8a8" => ("one_w8a8", "stream_w8a8"),
        "few_w4a8" | "few_w4w8a8" => ("one_w4a8", "stream_w4a8"),
        _ => return Vec::new(),
    };
    if tokens == 1 { vec![one, several] } else { vec![several] }
}

fn gemm_kernel(suffix: &str) -> &'static str {
    match suffix {
        "f32" => "gemm_f32",
        "bf16" => "gemm_bf16",
        "w8a8" => "gemm_w8a8",
        "w8a16" => "gemm_w8a16",
        "w4a8" => "gemm_w4a8",
        _ => "gemm_w4a16",
    }
}

/// What a matrix product of so many inputs may differ by. Tensor cores cut off what they add, where other sums round it, so that errors of
/// long sums do not cancel (2.3e-5 of 15680 inputs on an H200).
fn gemm_tolerance(weights: Weights, int8: bool, cols: usize) -> f64 {
    match (weights, int8) {
        (_, true) => EXACT,
        (Weights::Int4(_), false) => BF16_WEIGHTS,
        _ => FLOAT * (cols as f64 / 8192.0).max(1.0),
    }
}

pub fn checks(extent: Extent, arch: u32) -> Vec<Check> {
    let mut all = Vec::new();
    let formats = |cols: usize| {
        let int4 = [128, 64, 32].into_iter().filter(move |group| cols.is_multiple_of(*group)).map(Weights::Int4);
        [(Weights::F32, false), (Weights::Bf16, false), (Weights::Int8, true), (Weights::Int8, false)]
            .into_iter()
            .chain(int4.flat_map(|weights| [(weights, true), (weights, false)]))
    };
    // The last two go round the rings of `stream.cu`, by tiles and by pieces of one.
    let mut few = vec![(1, 16, 64), (1, 37, 320), (3, 50, 192), (8, 33, 1152), (11, 20, 100), (2, 17, 37), (1, 19, 4480), (5, 18, 4224)];
    few.extend([(2, 450, 192), (1, 18, 26880)]);
    let mut many = vec![(17, 40, 64), (130, 150, 192), (128, 128, 320), (33, 129, 100), (65, 30, 1152)];
    if extent == Extent::Published {
        few.extend([
            (1, 21504, 4096),
            (8, 4096, 21504),
            (1, 18560, 4096),
            (2, 131_072, 4096),
            (1, 4480, 15680),
            (4, 3136, 12544),
            (1, 10304, 2688),
        ]);
        many.extend([(1024, 4096, 4096), (300, 1856, 2688), (129, 4480, 15680)]);
    }
    // Emulation has every architecture's kernels.
    let streams = arch == 0 || stream::serves(arch);
    for (tokens, rows, cols) in few {
        for (weights, int8) in formats(cols) {
            let few = few_kernel(weights.suffix(int8));
            for kernel in [few].into_iter().chain(stream_kernels(few, tokens).into_iter().filter(|_| streams)) {
                let (shape, tolerance) = (format!("{tokens}x{rows}x{cols} {weights:?}"), if int8 { EXACT } else { FLOAT });
                all.push(Check::new(kernel, shape, tolerance, move |lab| linear(lab, kernel, weights, int8, tokens, rows, cols)));
            }
        }
    }
    for (tokens, rows, cols) in many {
        for (weights, int8) in formats(cols) {
            let kernel = gemm_kernel(weights.suffix(int8));
            let shape = format!("{tokens}x{rows}x{cols} {weights:?}");
            all.push(Check::new(kernel, shape, gemm_tolerance(weights, int8, cols), move |lab| {
                linear(lab, kernel, weights, int8, tokens, rows, cols)
            }));
        }
    }
    for (rows, cols) in [(35, 128), (130, 160), (17, 37)] {
        for (weights, int8) in formats(cols) {
            let suffix = weights.suffix(int8);
            let few = (few_kernel(suffix), FEW_TILE, if int8 { EXACT } else { FLOAT });
            let many = (gemm_kernel(suffix), if weights == Weights::F32 { 64 } else { 128 }, gemm_tolerance(weights, int8, cols));
            for (kernel, height, tolerance) in [few, many] {
                let shape = format!("experts {rows}x{cols} {weights:?}");
                all.push(Check::new(kernel, shape, tolerance, move |lab| experts(lab, kernel, height, weights, int8, rows, cols)));
            }
        }
    }
    for group in [128, 64, 32] {
        // The first has blocks with tiles of both parts where there are few multiprocessors, the last everywhere.
        let published = (extent == Extent::Published).then_some((1, 18432, 128, 4096));
        for (tokens, rows, others, cols) in [(1, 150, 37, 384), (3, 32, 20, 128), (8, 70, 16, 1152)].into_iter().chain(published) {
            let shape = format!("{tokens}x({rows}+{others})x{cols} group {group}");
            for kernel in ["few_w4w8a8"].into_iter().chain(stream_kernels("few_w4w8a8", tokens).into_iter().filter(|_| streams)) {
                all.push(Check::new(kernel, shape.clone(), EXACT, move |lab| two_parts(lab, kernel, group, tokens, rows, others, cols)));
            }
        }
    }
    if [0, wgmma::ARCH].contains(&arch) {
        hopper(extent, &mut all);
    }
    for (weights, int8) in [(Weights::Int8, true), (Weights::Int4(128), true)] {
        let few = few_kernel(weights.suffix(int8));
        for (kernel, tokens) in [(few, 9), (gemm_kernel(weights.suffix(int8)), 9)].into_iter().chain(
            [1, 9]
                .into_iter()
                .filter(|_| streams)
                .flat_map(|tokens| stream_kernels(few, tokens).into_iter().map(move |kernel| (kernel, tokens))),
        ) {
            all.push(Check::new(kernel, format!("extreme codes, {tokens} tokens"), EXACT, move |lab| {
                extremes(lab, kernel, weights, tokens)
            }));
        }
    }
    all
}

/// The warpgroup products of Hopper: tiles that are whole, that end early, and last rounds taken in pieces.
fn hopper(extent: Extent, all: &mut Vec<Check>) {
    let mut shapes = vec![(17, 40, 64), (64, 150, 192), (65, 64, 1152), (130, 150, 192), (300, 129, 320), (257, 30, 1152)];
    if extent == Extent::Published {
        shapes.extend([(1024, 4096, 4096), (64, 4096, 4096), (600, 1856, 2688), (129, 4480, 15680), (300, 21504, 4096)]);
    }
    for (tokens, rows, cols) in shapes {
        let int4 = [128, 64, 32].into_iter().filter(|group| cols % group == 0).map(Weights::Int4);
        for weights in int4.chain([Weights::Int8]) {
            let kernel = wgmma::Launch::of(weights != Weights::Int8, tokens).kernel;
            let shape = format!("{tokens}x{rows}x{cols} {weights:?}");
            all.push(Check::new(kernel, shape, EXACT, move |lab| linear(lab, kernel, weights, true, tokens, rows, cols)));
        }
    }
    for (weights, tokens) in [(Weights::Int8, 9), (Weights::Int8, 200), (Weights::Int4(128), 9), (Weights::Int4(128), 200)] {
        let kernel = wgmma::Launch::of(weights != Weights::Int8, tokens).kernel;
        all.push(Check::new(kernel, format!("extreme codes, {tokens} tokens"), EXACT, move |lab| extremes(lab, kernel, weights, tokens)));
    }
}

/// Codes and scales by rounding to nearest.
pub fn quantized(values: &[f32], rows: usize, cols: usize, scheme: Scheme) -> QuantizedMatrix {
    round_to_nearest(values, rows, cols, scheme)
}

/// int4 codes as the kernels read them, `[rows, padded(cols) / 2]`.
pub fn pack_int4(codes: &[i8], cols: usize) -> Vec<u8> {
    let nibble = |code: i8| code.cast_unsigned() & 0x0f;
    pad(codes, cols)
        .chunks_exact(32)
        .flat_map(|chunk| (0..16).map(|i| nibble(chunk[i]) | nibble(chunk[16 + i]) << 4).collect::<Vec<_>>())
        .collect()
}

/// Weights on the device with the parameters that a kernel takes for them, and the values that they stand for.
pub(super) struct Prepared {
    buffers: Vec<Buffer>,
    group: Option<usize>,
    values: Vec<f32>,
    matrix: Option<QuantizedMatrix>,
}

impl Prepared {
    pub(super) fn new(lab: &Lab, weights: Weights, values: Vec<f32>, rows: usize, cols: usize) -> Result<Self> {
        let scheme = match weights {
            Weights::F32 => return Ok(Self { buffers: vec![lab.put(&values)?], group: None, values, matrix: None }),
            Weights::Bf16 => {
                let bits: Vec<u16> = values.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
                let values = bits.iter().map(|bits| bf16::from_bits(*bits).to_f32()).collect();
                return Ok(Self { buffers: vec![lab.put(&pad(&bits, cols))?], group: None, values, matrix: None });
            }
            Weights::Int8 => Scheme::Int8,
            Weights::Int4(group) => Scheme::Grouped { bits: 4, group },
        };
        Self::of(lab, quantized(&values, rows, cols, scheme))
    }

    fn of(lab: &Lab, matrix: QuantizedMatrix) -> Result<Self> {
        let (buffers, group) = match matrix.scheme {
            Scheme::Grouped { group, .. } => {
                let scales: Vec<u16> = matrix.scales.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
                (vec![lab.put(&pack_int4(&matrix.codes, matrix.cols))?, lab.put(&scales)?], Some(group))
            }
            _ => (vec![lab.put(&pad(&matrix.codes, matrix.cols))?, lab.put(&matrix.scales)?], None),
        };
        Ok(Self { buffers, group, values: matrix.dequantize(), matrix: Some(matrix) })
    }

    pub(super) fn arguments(&self) -> Arguments {
        let arguments = self.buffers.iter().fold(Arguments::default(), Arguments::with);
        match self.group {
            Some(group) => arguments.with(group),
            None => arguments,
        }
    }
}

/// x on the device as a kernel reads it, and the values that the kernel thereby sees.
struct Input {
    buffers: Vec<Buffer>,
    stride: Option<usize>,
    values: Vec<f32>,
    codes: Option<QuantizedRows>,
}

impl Input {
    fn new(lab: &Lab, kernel: &str, int8: bool, x: Vec<f32>, cols: usize) -> Result<Self> {
        let tokens = x.len() / cols;
        if int8 {
            let codes = QuantizedRows::per_token(&x, tokens, cols);
            let padded: Vec<i8> = (0..tokens).flat_map(|t| pad(codes.row(t), cols)).collect();
            let buffers = vec![lab.put(&padded)?, lab.put(&codes.scales)?];
            return Ok(Self { buffers, stride: None, values: x, codes: Some(codes) });
        }
        if kernel.starts_with("gemm") && kernel != "gemm_f32" {
            let bits: Vec<u16> = x.iter().map(|x| bf16::from_f32(*x).to_bits()).collect();
            let values = bits.iter().map(|bits| bf16::from_bits(*bits).to_f32()).collect();
            return Ok(Self { buffers: vec![lab.put(&pad(&bits, cols))?], stride: None, values, codes: None });
        }
        // Rows further apart than they are long.
        let stride = cols + 4;
        let apart: Vec<f32> = x.chunks_exact(cols).flat_map(|row| row.iter().copied().chain([f32::NAN; 4])).collect();
        Ok(Self { buffers: vec![lab.put(&apart)?], stride: Some(stride), values: x, codes: None })
    }

    fn arguments(&self, arguments: Arguments) -> Arguments {
        let arguments = self.buffers.iter().fold(arguments, Arguments::with);
        match self.stride {
            Some(stride) => arguments.with(stride),
            None => arguments,
        }
    }
}

/// The exact integer product of the CPU backend, or the product in f64, `[tokens, rows]`.
pub(super) enum Product {
    Exact(Vec<f32>),
    Float(Vec<f64>),
}

fn product(weights: &Prepared, x: &Input, tokens: usize, rows: usize, cols: usize) -> Product {
    product_of(weights, &x.values, x.codes.as_ref(), tokens, rows, cols)
}

/// The same of given values, or their codes.
pub(super) fn product_of(
    weights: &Prepared,
    values: &[f32],
    codes: Option<&QuantizedRows>,
    tokens: usize,
    rows: usize,
    cols: usize,
) -> Product {
    match (&weights.matrix, codes) {
        (Some(matrix), Some(codes)) => {
            let mut out = vec![0.0; tokens * rows];
            int_matmul::matmul(&PackedMatrix::new(matrix), codes, &mut out, rows, 0);
            Product::Exact(out)
        }
        _ => {
            let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum::<f64>();
            // One after the other the largest head alone would take most of a minute.
            let element = |i: usize| dot(&values[i / rows * cols..][..cols], &weights.values[i % rows * cols..][..cols]);
            Product::Float((0..tokens * rows).into_par_iter().map(element).collect())
        }
    }
}

fn linear(lab: &Lab, kernel: &str, weights: Weights, int8: bool, tokens: usize, rows: usize, cols: usize) -> Result<f64> {
    let weights = Prepared::new(lab, weights, lab.normal(20, rows * cols), rows, cols)?;
    let x = Input::new(lab, kernel, int8, lab.normal(21, tokens * cols), cols)?;
    run(lab, kernel, &weights, &x, tokens, rows, cols)
}

/// The largest codes there are, all of one sign, against a sum that is as large as it gets.
fn extremes(lab: &Lab, kernel: &str, weights: Weights, tokens: usize) -> Result<f64> {
    let (rows, cols) = (20, 4096);
    let (scheme, code) = match weights {
        Weights::Int4(group) => (Scheme::Grouped { bits: 4, group }, -8),
        _ => (Scheme::Int8, -127),
    };
    let scales = vec![0.007_812_5; rows * (cols / scheme.group(cols))];
    let weights = Prepared::of(lab, QuantizedMatrix { scheme, rows, cols, codes: vec![code; rows * cols], scales })?;
    let x = Input::new(lab, kernel, true, vec![3.0; tokens * cols], cols)?;
    run(lab, kernel, &weights, &x, tokens, rows, cols)
}

/// Runs the kernel into the middle of wider rows, with a bias, onto a residual that is the output itself.
fn run(lab: &Lab, kernel: &str, weights: &Prepared, x: &Input, tokens: usize, rows: usize, cols: usize) -> Result<f64> {
    let (few, streams) = (kernel.starts_with("few"), kernel.starts_with("stream") || kernel.starts_with("one"));
    let (offset, stride) = (3, rows + 8);
    let (bias, residual) = (lab.normal(22, rows), lab.normal(23, tokens * stride));
    let (bias_buffer, out) = (lab.put(&bias)?, lab.put(&residual)?);
    let none = None::<&Buffer>;
    let device = &*lab.memory.device;
    let place = out.address() + 4 * offset as u64;
    let tail = |arguments: Arguments| arguments.with(&bias_buffer).with(place).with(place).with(stride);
    let arguments = tail(x.arguments(weights.arguments()).with(tokens).with(rows).with(cols).with(none).with(none).with(none));
    let (tile, shared) = match kernel {
        "gemm_f32" => (64, 0),
        "gemm_w4a8" => (128, GEMM_W4A8_SHARED),
        _ => (128, GEMM_SHARED),
    };
    if kernel.starts_with("wgmma") {
        let launch = wgmma::Launch::of(weights.group.is_some(), tokens);
        let ([own, scales], [codes, codes_scales]) = (&*weights.buffers, &*x.buffers) else { return Ok(f64::NAN) };
        let operands = Operands { weights: own, scales, group: weights.group, codes, codes_scales, tokens, rows, cols };
        let blocks = launch.blocks(tokens, rows, device.multiprocessors());
        lab.launch(kernel, [blocks, 1, 1], launch.threads, launch.shared, tail(operands.arguments(device)?))?;
    } else if streams {
        let weights = match weights.group {
            Some(_) => weights.arguments().with(rows).with(none).with(none).with(0_usize),
            None => weights.arguments().with(rows),
        };
        stream_codes(lab, kernel, weights, x, rows.div_ceil(16), tokens, cols, tail)?;
    } else if few {
        lab.launch(kernel, [rows.div_ceil(16), tokens.div_ceil(8), 1], 256, 0, arguments)?;
    } else {
        lab.launch(kernel, [tokens.div_ceil(tile), rows.div_ceil(tile), 1], 256, shared, arguments)?;
    }
    let found = out.download::<f32>(tokens * stride)?;
    Ok(match product(weights, x, tokens, rows, cols) {
        Product::Exact(product) => {
            let mut expected = residual;
            for (row, product) in expected.chunks_exact_mut(stride).zip(product.chunks_exact(rows)) {
                row[offset..].iter_mut().zip(product).zip(&bias).for_each(|((out, product), bias)| *out += product + bias);
            }
            mismatches(&found, &expected)
        }
        Product::Float(product) => {
            let mut expected: Vec<f64> = residual.iter().map(|x| f64::from(*x)).collect();
            for (row, product) in expected.chunks_exact_mut(stride).zip(product.chunks_exact(rows)) {
                row[offset..].iter_mut().zip(product).zip(&bias).for_each(|((out, product), bias)| *out += product + f64::from(*bias));
            }
            difference(&found, &expected)
        }
    })
}

/// Launches a kernel that the copy engine feeds on codes; `weights`: its first parameters.
fn stream_codes(
    lab: &Lab,
    kernel: &str,
    weights: Arguments,
    x: &Input,
    tiles: usize,
    tokens: usize,
    cols: usize,
    tail: impl Fn(Arguments) -> Arguments,
) -> Result<()> {
    let device = &*lab.memory.device;
    let kind = if kernel.ends_with("w4a8") { stream::Weights::Int4 } else { stream::Weights::Int8 };
    let (one, several) = (Launch::of_one(kind, cols, device.arch()), Launch::of_several(kind, device.arch()));
    let launch = [one, several].into_iter().flatten().find(|launch| launch.kernel == kernel);
    let launch = launch.ok_or_else(|| Error::run(format!("{kernel} has no room for a ring")))?;
    let arguments = if kernel.starts_with("one") {
        stream::front_arguments(x.arguments(weights.with(cols).with(launch.stages)), None, None)
    } else {
        x.arguments(weights).with(tokens).with(cols).with(launch.stages)
    };
    let blocks = Launch::blocks(tiles, tokens, device.multiprocessors());
    lab.launch(launch.kernel, blocks, launch.threads, launch.shared, tail(arguments))
}

/// A linear of an int4 and an int8 part, into the middle of wider rows, with a bias, onto the output itself.
fn two_parts(lab: &Lab, kernel: &str, group: usize, tokens: usize, rows: usize, others: usize, cols: usize) -> Result<f64> {
    let first = Prepared::new(lab, Weights::Int4(group), lab.normal(26, rows * cols), rows, cols)?;
    let second = Prepared::new(lab, Weights::Int8, lab.normal(27, others * cols), others, cols)?;
    let x = Input::new(lab, kernel, true, lab.normal(28, tokens * cols), cols)?;
    let (offset, stride) = (3, rows + others + 8);
    let (bias, residual) = (lab.normal(22, rows + others), lab.normal(23, tokens * stride));
    let (bias_buffer, out) = (lab.put(&bias)?, lab.put(&residual)?);
    let arguments = second.buffers.iter().fold(first.arguments().with(rows), Arguments::with).with(others);
    let place = out.address() + 4 * offset as u64;
    let tail = |arguments: Arguments| arguments.with(&bias_buffer).with(place).with(place).with(stride);
    let tiles = rows.div_ceil(16) + others.div_ceil(16);
    if kernel == "few_w4w8a8" {
        lab.launch(kernel, [tiles, tokens.div_ceil(FEW_TILE), 1], 256, 0, tail(x.arguments(arguments).with(tokens).with(cols)))?;
    } else {
        stream_codes(lab, kernel, arguments, &x, tiles, tokens, cols, tail)?;
    }
    let mut expected = residual;
    for (part, start, count) in [(&first, 0, rows), (&second, rows, others)] {
        let Product::Exact(product) = product(part, &x, tokens, count, cols) else { return Ok(f64::NAN) };
        for (row, product) in expected.chunks_exact_mut(stride).zip(product.chunks_exact(count)) {
            row[offset + start..].iter_mut().zip(product).zip(&bias[start..]).for_each(|((out, product), bias)| *out += product + bias);
        }
    }
    Ok(mismatches(&out.download::<f32>(tokens * stride)?, &expected))
}

/// Pairs of tokens and experts in tiles: of an expert with a few pairs, of none, and of one with more than fill a tile; an empty
/// one in front.
fn experts(lab: &Lab, kernel: &str, height: usize, weights: Weights, int8: bool, rows: usize, cols: usize) -> Result<f64> {
    let (tokens, counts) = (5, [5, 0, height + 3]);
    let pairs = counts.iter().sum();
    let x = Input::new(lab, kernel, int8, lab.normal(25, tokens * cols), cols)?;
    let own = |expert: u64| Prepared::new(lab, weights, lab.normal(80 + expert, rows * cols), rows, cols);
    let own = [own(0)?, own(1)?, own(2)?];
    let biases = [lab.normal(90, rows), lab.normal(91, rows), lab.normal(92, rows)];
    let bias_buffers = [lab.put(&biases[0])?, lab.put(&biases[1])?, lab.put(&biases[2])?];
    let table: Vec<u64> = own
        .iter()
        .zip(&bias_buffers)
        .flat_map(|(own, bias)| [own.buffers[0].address(), own.buffers.get(1).map_or(0, Buffer::address), bias.address()])
        .collect();
    let (mut tiles, mut expert_of) = (vec![1, 0, 0], Vec::new());
    for (expert, count) in counts.into_iter().enumerate() {
        for at in (0..count).step_by(height) {
            tiles.extend([expert as i32, (expert_of.len() + at) as i32, height.min(count - at) as i32]);
        }
        expert_of.resize(expert_of.len() + count, expert);
    }
    let x_rows: Vec<i32> = (0..pairs).map(|pair: usize| (pair * 3 % tokens) as i32).collect();
    let blocks = tiles.len() / 3;
    let (table, tiles, places) = (lab.put(&table)?, lab.put(&tiles)?, lab.put(&x_rows)?);
    let out = lab.poisoned::<f32>(pairs * rows)?;
    let arguments = x.arguments(own[0].arguments()).with(tokens).with(rows).with(cols).with(&table).with(&tiles).with(&places);
    let arguments = arguments.with(None::<&Buffer>).with(None::<&Buffer>).with(&out).with(rows);
    let (grid, shared) = match kernel {
        few if few.starts_with("few") => ([rows.div_ceil(16), blocks, 1], 0),
        "gemm_f32" => ([blocks, rows.div_ceil(64), 1], 0),
        "gemm_w4a8" => ([blocks, rows.div_ceil(128), 1], GEMM_W4A8_SHARED),
        _ => ([blocks, rows.div_ceil(128), 1], GEMM_SHARED),
    };
    lab.launch(kernel, grid, 256, shared, arguments)?;
    let found = out.download::<f32>(pairs * rows)?;
    // Every token through every expert, of which the chosen are taken.
    let products = own.iter().map(|own| product(own, &x, tokens, rows, cols)).collect::<Vec<_>>();
    let (mut exact, mut float) = (Vec::new(), Vec::new());
    for (expert, row) in expert_of.into_iter().zip(&x_rows) {
        let row = *row as usize * rows..(*row as usize + 1) * rows;
        match &products[expert] {
            Product::Exact(product) => exact.extend(product[row].iter().zip(&biases[expert]).map(|(x, bias)| x + bias)),
            Product::Float(product) => float.extend(product[row].iter().zip(&biases[expert]).map(|(x, bias)| x + f64::from(*bias))),
        }
    }
    Ok(if float.is_empty() { mismatches(&found, &exact) } else { difference(&found, &float) })
}
