//! Convolution, one step of the recurrence, and the chunked scan, against the recurrence in f64.

use half::f16;

use super::internals::hadamard;
use super::{Check, Extent, FLOAT, HALVES, Lab, STORED, difference, mismatches, wide, worse};
use crate::backend::cpu::stored::{round_each, round_span};
use crate::backend::cuda::device::{Arguments, Buffer};
use crate::backend::cuda::scan;
use crate::backend::{MambaShape, StateRotation};
use crate::error::Result;

/// Tokens of a chunk at most.
const CHUNK: usize = 64;

fn shape(heads: usize, head_dim: usize, groups: usize, state: usize) -> MambaShape {
    MambaShape { heads, head_dim, groups, state, kernel: 4, dt_min: 0.0, dt_max: f32::INFINITY }
}

/// Sizes of mixers.
pub(super) fn shapes(extent: Extent) -> Vec<MambaShape> {
    // The demo's and golden's heads; the published models' with their number of heads in a group but fewer groups.
    let mut shapes = vec![shape(8, 64, 2, 64), shape(8, 24, 2, 16), shape(16, 64, 1, 128), shape(12, 80, 1, 128)];
    if extent == Extent::Published {
        shapes.extend([shape(128, 64, 8, 128), shape(128, 80, 8, 128), shape(96, 80, 8, 128), shape(64, 64, 8, 128)]);
    }
    shapes
}

pub fn checks(extent: Extent, arch: u32) -> Vec<Check> {
    let mut sequences = vec![vec![1], vec![5, 2], vec![64], vec![130, 1, 65]];
    if extent == Extent::Published {
        sequences.push(vec![2048, 777]);
    }
    let mut all = Vec::new();
    for shape in shapes(extent) {
        let text = format!("{}x{} heads, {} groups, state {}", shape.heads, shape.head_dim, shape.groups, shape.state);
        let large = shape.heads * shape.head_dim * shape.state > 1 << 16;
        for lengths in &sequences {
            // Emulation is slow: the longest sequences only with the smallest shapes.
            if extent == Extent::Small && large && lengths.iter().sum::<usize>() > 70 {
                continue;
            }
            let lengths = lengths.clone();
            let name = format!("{text}, tokens {lengths:?}");
            let copy = lengths.clone();
            all.push(Check::new("conv", name.clone(), FLOAT, move |lab| conv(lab, &shape, &copy)));
            for form in [Form::Float, Form::PerToken, Form::Static] {
                let kernels = if form == Form::Float { ["ssd_output", "ssd_scan"] } else { ["ssd_output_i8", "ssd_scan_i8"] };
                // Emulation has every architecture's kernels.
                let whole = arch == 0 || scan::serves(arch, &shape);
                for (kernel, whole) in kernels.into_iter().zip([false, true]).take(1 + usize::from(whole)) {
                    let lengths = lengths.clone();
                    all.push(Check::new(kernel, format!("{name}, {form:?}"), HALVES, move |lab| scan(lab, &shape, &lengths, form, whole)));
                }
            }
        }
        all.push(Check::new("conv_step", text.clone(), FLOAT, move |lab| conv_step(lab, &shape)));
        for form in [Form::Float, Form::PerToken, Form::Static] {
            // Heads of codes are one block's: of many warps, or of few that go over it again and again.
            let ways = [(4, false), (4, true), (shape.head_dim.div_ceil(4), true)];
            for (warps, rotated) in ways.into_iter().take(if form == Form::Float { 1 } else { 3 }) {
                let text = format!("{text}, {form:?}{}, {warps} warps", if rotated { ", rotated" } else { "" });
                let step = Step { shape, form, rotated, warps };
                all.push(Check::new(step.kernel("f32"), text.clone(), FLOAT, move |lab| step_f32(lab, &step)));
                all.push(Check::new(step.kernel("f16"), text.clone(), FLOAT, move |lab| step_f16(lab, &step)));
                all.push(Check::new(step.kernel("i8"), text, STORED, move |lab| step_i8(lab, &step)));
            }
        }
    }
    all.push(Check::new("state_to_i8", "3x16", 0.0, |lab| convert(lab, 3, 16)));
    all.push(Check::new("state_to_i8", "5x256", 0.0, |lab| convert(lab, 5, 256)));
    all
}

pub(super) fn silu(x: f64) -> f64 {
    x / (1.0 + (-x).exp())
}

/// A mixer's parameters and inputs, in values that do not explode.
struct Mixer {
    projected: Vec<f32>,
    weight: Vec<f32>,
    bias: Vec<f32>,
    a: Vec<f32>,
    d: Vec<f32>,
    dt_bias: Vec<f32>,
}

impl Mixer {
    fn new(lab: &Lab, shape: &MambaShape, tokens: usize) -> Self {
        Self {
            projected: lab.normal(40, tokens * shape.projected()),
            weight: lab.normal(41, shape.conv_channels() * shape.kernel),
            bias: lab.normal(42, shape.conv_channels()),
            a: lab.normal(43, shape.heads).into_iter().map(|x| -x.abs() - 0.01).collect(),
            d: lab.normal(44, shape.heads),
            dt_bias: lab.normal(45, shape.heads).into_iter().map(|x| x - 2.0).collect(),
        }
    }
}

/// Begin, end, slot in, slot out of each sequence: odd ones start from a slot, all end in their own.
pub(super) fn table(lengths: &[usize]) -> Vec<[i32; 4]> {
    let mut begin = 0;
    let row = |(index, length): (usize, &usize)| {
        let start = begin;
        begin += *length as i32;
        [start, begin, if index % 2 == 1 { index as i32 } else { -1 }, index as i32]
    };
    lengths.iter().enumerate().map(row).collect()
}

/// Convolved x | B | C of one sequence and the window behind it, in f64.
fn convolved(shape: &MambaShape, mixer: &Mixer, rows: &[f32], window: &[f32]) -> (Vec<f64>, Vec<f32>) {
    let (channels, width, inner) = (shape.conv_channels(), shape.projected(), shape.inner());
    let mut inputs: Vec<f32> = window.to_vec();
    for row in rows.chunks_exact(width) {
        inputs.extend(&row[inner..inner + channels]);
    }
    let tokens = rows.len() / width;
    let mut out = Vec::with_capacity(tokens * channels);
    for t in 0..tokens {
        for c in 0..channels {
            let taps = (0..shape.kernel).map(|k| f64::from(mixer.weight[c * shape.kernel + k]) * f64::from(inputs[(t + k) * channels + c]));
            out.push(silu(f64::from(mixer.bias[c]) + taps.sum::<f64>()));
        }
    }
    (out, inputs[tokens * channels..].to_vec())
}

fn conv(lab: &Lab, shape: &MambaShape, lengths: &[usize]) -> Result<f64> {
    let (channels, width, tokens) = (shape.conv_channels(), shape.projected(), lengths.iter().sum());
    let (mixer, table) = (Mixer::new(lab, shape, tokens), table(lengths));
    let size = (shape.kernel - 1) * channels;
    let windows = lab.normal(46, lengths.len() * size);
    let (input, weight, bias) = (lab.put(&mixer.projected)?, lab.put(&mixer.weight)?, lab.put(&mixer.bias)?);
    let (sequences, held, out) = (lab.put(table.as_flattened())?, lab.put(&windows)?, lab.poisoned::<f32>(tokens * channels)?);
    let longest = lengths.iter().max().copied().unwrap_or(0);
    let begin = |weights: bool| {
        let arguments = Arguments::default().with(&input).with(width).with(shape.inner());
        let arguments = if weights { arguments.with(&weight).with(&bias) } else { arguments };
        arguments.with(channels).with(shape.kernel).with(&sequences).with(&held)
    };
    lab.launch("conv", [channels.div_ceil(128), longest.div_ceil(16), lengths.len()], 128, 0, begin(true).with(&out))?;
    lab.launch("conv_window", [channels.div_ceil(128), lengths.len(), 1], 128, 0, begin(false))?;
    let (mut expected, mut expected_windows) = (Vec::new(), Vec::new());
    for row in &table {
        let own = &mixer.projected[row[0] as usize * width..row[1] as usize * width];
        let zeros = vec![0.0; size];
        let window = if row[2] < 0 { zeros.as_slice() } else { &windows[row[2] as usize * size..(row[2] as usize + 1) * size] };
        let (values, window) = convolved(shape, &mixer, own, window);
        expected.extend(values);
        expected_windows.extend(window);
    }
    let windows = mismatches(&held.download::<f32>(expected_windows.len())?, &expected_windows);
    Ok(worse(difference(&out.download::<f32>(expected.len())?, &expected), windows))
}

fn conv_step(lab: &Lab, shape: &MambaShape) -> Result<f64> {
    let (channels, width, count) = (shape.conv_channels(), shape.projected(), 3);
    let mixer = Mixer::new(lab, shape, count);
    let size = (shape.kernel - 1) * channels;
    let windows = lab.normal(47, count * size);
    let (input, weight, bias) = (lab.put(&mixer.projected)?, lab.put(&mixer.weight)?, lab.put(&mixer.bias)?);
    let (held, out) = (lab.put(&windows)?, lab.poisoned::<f32>(count * channels)?);
    let arguments =
        Arguments::default().with(&input).with(width).with(shape.inner()).with(&weight).with(&bias).with(channels).with(shape.kernel);
    lab.launch("conv_step", [channels.div_ceil(128), count, 1], 128, 0, arguments.with(&held).with(&out))?;
    let (mut expected, mut expected_windows) = (Vec::new(), Vec::new());
    for (row, window) in mixer.projected.chunks_exact(width).zip(windows.chunks_exact(size)) {
        let (values, window) = convolved(shape, &mixer, row, window);
        expected.extend(values);
        expected_windows.extend(window);
    }
    let windows = mismatches(&held.download::<f32>(expected_windows.len())?, &expected_windows);
    Ok(worse(difference(&out.download::<f32>(expected.len())?, &expected), windows))
}

/// One token of the recurrence in f64, `projected` its row z | x | B | C | dt, `xbc` its convolved row; moves `state` on and returns
/// y·silu(z), y turned in blocks of `head_block` channels before.
fn recur(shape: &MambaShape, mixer: &Mixer, projected: &[f32], xbc: &[f32], state: &mut [f64], head_block: usize) -> Vec<f64> {
    let (inner, n) = (shape.inner(), shape.state);
    let raw = &projected[shape.projected() - shape.heads..];
    let mut y = Vec::with_capacity(inner);
    for head in 0..shape.heads {
        let group = head / (shape.heads / shape.groups);
        let dt = (f64::from(raw[head]) + f64::from(mixer.dt_bias[head])).exp().ln_1p();
        let dt = dt.clamp(f64::from(shape.dt_min), f64::from(shape.dt_max));
        let decay = (dt * f64::from(mixer.a[head])).exp();
        for p in 0..shape.head_dim {
            let x = f64::from(xbc[head * shape.head_dim + p]);
            let own = &mut state[(head * shape.head_dim + p) * n..][..n];
            let mut sum = 0.0;
            for (i, s) in own.iter_mut().enumerate() {
                *s = *s * decay + dt * x * f64::from(xbc[inner + group * n + i]);
                sum += *s * f64::from(xbc[inner + (shape.groups + group) * n + i]);
            }
            y.push(sum + f64::from(mixer.d[head]) * x);
        }
    }
    hadamard(&mut y, head_block);
    y.iter().zip(projected).map(|(y, z)| y * silu(f64::from(*z))).collect()
}

/// In which form a mixer's slices are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Float,
    PerToken,
    Static,
}

/// What steps and scans read: x | B | C, and z and dt among the slices of `in_proj`.
struct Inputs {
    /// x | B | C as floats, whatever they are kept as; the mixer's slices are replaced by theirs.
    xbc: Vec<f32>,
    convolved: Arguments,
    /// The slices and the distance between their rows.
    projected: Arguments,
    /// Of codes: scales of dt.
    dt_scales: Arguments,
    /// z as floats and the distance between its rows.
    gate: Arguments,
    a: Buffer,
    d: Buffer,
    dt_bias: Buffer,
    /// Keeps what the arguments point to.
    _buffers: Vec<Buffer>,
}

impl Inputs {
    fn new(lab: &Lab, shape: &MambaShape, mixer: &mut Mixer, stream: u64, form: Form) -> Result<Self> {
        let tokens = mixer.projected.len() / shape.projected();
        let mut xbc = lab.normal(stream, tokens * shape.conv_channels());
        let (a, d, dt_bias) = (lab.put(&mixer.a)?, lab.put(&mixer.d)?, lab.put(&mixer.dt_bias)?);
        let (inputs, slices, scales, mut buffers) = if form == Form::Float {
            let buffers = vec![lab.put(&xbc)?, lab.put(&mixer.projected)?];
            let inputs = Arguments::default().with(&buffers[0]);
            (inputs, Arguments::default().with(&buffers[1]), Arguments::default(), buffers)
        } else {
            let fixed = form == Form::Static;
            let behind = Rounded::new(&xbc, &conv_spans(shape), fixed);
            let spans = projection_spans(shape);
            let in_front = Rounded::new(&mixer.projected, &spans, fixed);
            (xbc, mixer.projected) = (behind.floats(), in_front.floats());
            let buffers = vec![lab.put(&behind.codes)?, lab.put(&behind.scales)?, lab.put(&in_front.codes)?, lab.put(&in_front.scales)?];
            let none = None::<&Buffer>;
            let given = |index: usize| Some(&buffers[index]);
            let inputs =
                Arguments::default().with(&buffers[0]).with(if fixed { none } else { given(1) }).with(if fixed { given(1) } else { none });
            let at = |index: usize| buffers[3].address() + 4 * index as u64;
            let dt = if fixed { (0, at(shape.projected() - shape.heads)) } else { (at(spans.len() - 1), 0) };
            let scales = Arguments::default().with(dt.0).with(spans.len()).with(dt.1);
            (inputs, Arguments::default().with(&buffers[2]), scales, buffers)
        };
        let projected = slices.with(shape.projected());
        let z = lab.put(&mixer.projected)?;
        let gate = Arguments::default().with(&z).with(shape.projected());
        buffers.push(z);
        Ok(Self { xbc, convolved: inputs, projected, dt_scales: scales, gate, a, d, dt_bias, _buffers: buffers })
    }
}

/// Widths of the spans of x | B | C, and of z | x | B | C | dt.
pub(super) fn conv_spans(shape: &MambaShape) -> Vec<usize> {
    let mut spans = vec![shape.head_dim; shape.heads];
    spans.resize(shape.heads + 2 * shape.groups, shape.state);
    spans
}

pub(super) fn projection_spans(shape: &MambaShape) -> Vec<usize> {
    let mut spans = vec![shape.head_dim; shape.heads];
    spans.extend(conv_spans(shape));
    spans.push(shape.heads);
    spans
}

/// Codes of rows of spans.
pub(super) struct Rounded {
    pub codes: Vec<i8>,
    /// `[rows, spans]`, or `[width]` where they are fixed.
    pub scales: Vec<f32>,
    spans: Vec<usize>,
    fixed: bool,
}

impl Rounded {
    pub fn new(values: &[f32], spans: &[usize], fixed: bool) -> Self {
        let width = spans.iter().sum();
        let mut codes = vec![0; values.len()];
        let mut scales = Vec::new();
        if fixed {
            // Of B and C, which are among the later spans, all channels of a group have one.
            let scale = |i: usize, c: usize| 0.01 + 0.004 * (i % 5) as f32 + if 2 * i < spans.len() { 0.001 * (c % 3) as f32 } else { 0.0 };
            scales.extend(spans.iter().enumerate().flat_map(|(i, span)| (0..*span).map(move |c| scale(i, c))));
        }
        for (values, codes) in values.chunks_exact(width).zip(codes.chunks_exact_mut(width)) {
            if fixed {
                round_each(values, &scales, codes);
                continue;
            }
            let mut start = 0;
            for span in spans {
                scales.push(round_span(&values[start..start + span], &mut codes[start..start + span]));
                start += span;
            }
        }
        Self { codes, scales, spans: spans.to_vec(), fixed }
    }

    /// Other codes and scales of the same spans.
    pub fn with(&self, codes: Vec<i8>, scales: Vec<f32>) -> Self {
        Self { codes, scales, spans: self.spans.clone(), fixed: self.fixed }
    }

    pub fn floats(&self) -> Vec<f32> {
        let width: usize = self.spans.iter().sum();
        let of_channel: Vec<usize> = self.spans.iter().enumerate().flat_map(|(i, span)| std::iter::repeat_n(i, *span)).collect();
        let scale = |i: usize| {
            let (row, c) = (i / width, i % width);
            if self.fixed { self.scales[c] } else { self.scales[row * self.spans.len() + of_channel[c]] }
        };
        self.codes.iter().enumerate().map(|(i, code)| f32::from(*code) * scale(i)).collect()
    }
}

/// A step of mixers, whose heads are `rotated` or not.
#[derive(Clone, Copy)]
struct Step {
    shape: MambaShape,
    form: Form,
    rotated: bool,
    /// Of a block.
    warps: usize,
}

impl Step {
    fn kernel(&self, state: &str) -> &'static str {
        match (self.form, state) {
            (Form::Float, "f32") => "ssm_step_f32",
            (Form::Float, "f16") => "ssm_step_f16",
            (Form::Float, _) => "ssm_step_i8",
            (_, "f32") => "ssm_step_codes_f32",
            (_, "f16") => "ssm_step_codes_f16",
            (_, _) => "ssm_step_codes_i8",
        }
    }

    fn head_block(&self) -> usize {
        if self.rotated { StateRotation::of(&self.shape).head } else { 1 }
    }

    /// Runs one from `state` (as stored in `format`) and returns y.
    fn run(&self, lab: &Lab, format: &str, inputs: &Inputs, state: &Buffer, scales: Option<&Buffer>) -> Result<Vec<f32>> {
        let shape = &self.shape;
        let count = inputs.xbc.len() / shape.conv_channels();
        let y = lab.poisoned::<f32>(count * shape.inner())?;
        let arguments = inputs.convolved.clone().then(&inputs.gate).with(shape.projected() - shape.heads);
        let arguments = arguments.with(&inputs.a).with(&inputs.d).with(&inputs.dt_bias).with(shape.dt_min).with(shape.dt_max);
        let arguments = arguments.with(shape.heads).with(shape.head_dim).with(shape.groups).with(shape.state);
        let arguments = arguments.with(state).with(scales).then(&inputs.gate).with(&y);
        let (parts, arguments) = match self.form {
            Form::Float => (shape.head_dim.div_ceil(4 * self.warps), arguments),
            Form::PerToken | Form::Static => (1, arguments.with(self.head_block())),
        };
        lab.launch(self.kernel(format), [shape.heads, parts, count], 32 * self.warps, 0, arguments)?;
        y.download(count * shape.inner())
    }

    /// What the recurrence makes of the same state.
    fn expected(&self, mixer: &Mixer, xbc: &[f32], state: &mut [f64]) -> Vec<f64> {
        let shape = &self.shape;
        let states = state.chunks_exact_mut(shape.inner() * shape.state);
        let rows = mixer.projected.chunks_exact(shape.projected()).zip(xbc.chunks_exact(shape.conv_channels())).zip(states);
        rows.flat_map(|((projected, xbc), state)| recur(shape, mixer, projected, xbc, state, self.head_block())).collect()
    }
}

const STEPS: usize = 2;

fn step_f32(lab: &Lab, step: &Step) -> Result<f64> {
    let shape = &step.shape;
    let mut mixer = Mixer::new(lab, shape, STEPS);
    let inputs = Inputs::new(lab, shape, &mut mixer, 48, step.form)?;
    let before = lab.normal(49, STEPS * shape.inner() * shape.state);
    let state = lab.put(&before)?;
    let y = step.run(lab, "f32", &inputs, &state, None)?;
    let mut expected = wide(&before);
    let expected_y = step.expected(&mixer, &inputs.xbc, &mut expected);
    Ok(worse(difference(&y, &expected_y), difference(&state.download::<f32>(before.len())?, &expected)))
}

fn step_f16(lab: &Lab, step: &Step) -> Result<f64> {
    let shape = &step.shape;
    let mut mixer = Mixer::new(lab, shape, STEPS);
    let inputs = Inputs::new(lab, shape, &mut mixer, 50, step.form)?;
    let before: Vec<u16> = lab.normal(51, STEPS * shape.inner() * shape.state).iter().map(|x| f16::from_f32(*x).to_bits()).collect();
    let state = lab.put(&before)?;
    let y = step.run(lab, "f16", &inputs, &state, None)?;
    let mut expected: Vec<f64> = before.iter().map(|bits| f16::from_bits(*bits).to_f64()).collect();
    let expected_y = step.expected(&mixer, &inputs.xbc, &mut expected);
    // Within half a unit in the last place of f16, and a little for f32's own rounding.
    let found = state.download::<u16>(before.len())?;
    let near = |found: &u16, expected: &f64| (f16::from_bits(*found).to_f64() - expected).abs() <= expected.abs() * 5.0e-4 + 1e-6;
    let wrong = found.iter().zip(&expected).filter(|(found, expected)| !near(found, expected)).count();
    Ok(worse(difference(&y, &expected_y), wrong as f64))
}

fn step_i8(lab: &Lab, step: &Step) -> Result<f64> {
    let shape = &step.shape;
    let mut mixer = Mixer::new(lab, shape, STEPS);
    let inputs = Inputs::new(lab, shape, &mut mixer, 52, step.form)?;
    let rows = STEPS * shape.inner();
    let codes: Vec<i8> = lab.normal(53, rows * shape.state).iter().map(|x| (x * 60.0).clamp(-127.0, 127.0) as i8).collect();
    let scales: Vec<f32> = lab.normal(54, rows).iter().map(|x| x.abs() * 0.02).collect();
    let (state, held) = (lab.put(&codes)?, lab.put(&scales)?);
    let y = step.run(lab, "i8", &inputs, &state, Some(&held))?;
    let mut expected: Vec<f64> = codes
        .chunks_exact(shape.state)
        .zip(&scales)
        .flat_map(|(row, scale)| row.iter().map(move |code| f64::from(*code) * f64::from(*scale)))
        .collect();
    let expected_y = step.expected(&mixer, &inputs.xbc, &mut expected);
    // Codes are within half a step, and the largest of a row is 127.
    let (found, scales) = (state.download::<i8>(codes.len())?, held.download::<f32>(rows)?);
    let mut wrong = 0;
    for ((codes, scale), expected) in found.chunks_exact(shape.state).zip(&scales).zip(expected.chunks_exact(shape.state)) {
        let scale = f64::from(*scale);
        wrong += codes.iter().zip(expected).filter(|(code, x)| (f64::from(**code) * scale - **x).abs() > 0.5002 * scale).count();
        wrong += usize::from(codes.iter().all(|code| code.unsigned_abs() < 127));
    }
    Ok(worse(difference(&y, &expected_y), wrong as f64))
}

/// The chunked scan of some sequences, from and to states; `whole`: with the state in registers.
fn scan(lab: &Lab, shape: &MambaShape, lengths: &[usize], form: Form, whole: bool) -> Result<f64> {
    let (tokens, size) = (lengths.iter().sum::<usize>(), shape.inner() * shape.state);
    let (mut mixer, table) = (Mixer::new(lab, shape, tokens), table(lengths));
    let inputs = Inputs::new(lab, shape, &mut mixer, 55, form)?;
    let xbc = &inputs.xbc;
    let kernel = |name: &str| if form == Form::Float { name.to_owned() } else { format!("{name}_i8") };
    let cache = lab.normal(56, lengths.len() * size);
    let (mut chunks, mut sequence_chunks) = (Vec::new(), Vec::new());
    for row in &table {
        let first = chunks.len() as i32;
        let begins = (row[0]..row[1]).step_by(CHUNK);
        chunks.extend(begins.map(|begin| [begin, row[1].min(begin + CHUNK as i32)]));
        sequence_chunks.push([first, chunks.len() as i32, row[2], row[3]]);
    }
    let (places, own, held) = (lab.put(chunks.as_flattened())?, lab.put(sequence_chunks.as_flattened())?, lab.put(&cache)?);
    let (dt, decay) = (lab.poisoned::<f32>(tokens * shape.heads)?, lab.poisoned::<f32>(tokens * shape.heads)?);
    let (states, y) = (lab.poisoned::<f32>(chunks.len() * size)?, lab.poisoned::<f32>(tokens * shape.inner())?);
    let offset = shape.projected() - shape.heads;
    let arguments = inputs.projected.clone().with(offset).then(&inputs.dt_scales).with(&inputs.a);
    let arguments = arguments.with(&inputs.dt_bias).with(shape.dt_min).with(shape.dt_max).with(shape.heads).with(&places);
    lab.launch(&kernel("ssd_decay"), [shape.heads.div_ceil(32), chunks.len(), 1], 128, 0, arguments.with(&dt).with(&decay))?;
    let sizes = |arguments: Arguments| arguments.with(shape.heads).with(shape.head_dim).with(shape.groups).with(shape.state);
    if whole {
        let shared = lab.poisoned::<u8>(chunks.len() * shape.groups * scan::SHARED_CHUNK)?;
        let arguments = sizes(inputs.convolved.clone().with(&places)).with(&shared);
        let blocks = [shape.groups, chunks.len(), 1];
        lab.launch(&kernel("ssd_share"), blocks, scan::THREADS, scan::SHARE_MEMORY, arguments)?;
        let arguments = inputs.convolved.clone().with(&dt).with(&decay).with(&shared).with(&inputs.d).with(&places).with(&own);
        let blocks = [shape.heads * shape.head_dim.div_ceil(scan::CHANNELS), lengths.len(), 1];
        lab.launch(
            &kernel("ssd_scan"),
            blocks,
            scan::THREADS,
            scan::SCAN_MEMORY,
            sizes(arguments).with(&held).then(&inputs.gate).with(&y),
        )?;
    } else {
        let arguments = sizes(inputs.convolved.clone().with(&dt).with(&decay).with(&places));
        lab.launch(&kernel("ssd_state"), [shape.heads, chunks.len(), 1], 128, 49408, arguments.with(&states))?;
        let arguments = Arguments::default().with(&states).with(&decay).with(&places).with(&own).with(shape.heads).with(shape.head_dim);
        let blocks = [(shape.head_dim * shape.state).div_ceil(256), shape.heads, lengths.len()];
        lab.launch("ssd_pass", blocks, 256, 0, arguments.with(shape.state).with(&held))?;
        let arguments = inputs.convolved.clone().with(&dt).with(&decay).with(&states).with(&inputs.d).with(&places);
        lab.launch(&kernel("ssd_output"), [shape.heads, chunks.len(), 1], 256, 81920, sizes(arguments).then(&inputs.gate).with(&y))?;
    }

    let (mut expected_y, mut expected_states) = (Vec::new(), Vec::new());
    for row in &table {
        let mut state = if row[2] < 0 { vec![0.0; size] } else { wide(&cache[row[2] as usize * size..(row[2] as usize + 1) * size]) };
        for t in row[0] as usize..row[1] as usize {
            let projected = &mixer.projected[t * shape.projected()..(t + 1) * shape.projected()];
            let xbc = &xbc[t * shape.conv_channels()..(t + 1) * shape.conv_channels()];
            expected_y.extend(recur(shape, &mixer, projected, xbc, &mut state, 1));
        }
        expected_states.extend(state);
    }
    let states = difference(&held.download::<f32>(expected_states.len())?, &expected_states);
    Ok(worse(difference(&y.download::<f32>(expected_y.len())?, &expected_y), states))
}

/// f32 to int8 and to f16, and back.
fn convert(lab: &Lab, rows: usize, size: usize) -> Result<f64> {
    let values = lab.normal(57, rows * size);
    let (from, codes, scales) = (lab.put(&values)?, lab.poisoned::<i8>(rows * size)?, lab.poisoned::<f32>(rows)?);
    let (halves, back) = (lab.poisoned::<u16>(rows * size)?, lab.poisoned::<f32>(rows * size)?);
    lab.launch("state_to_i8", [rows, 1, 1], 64, 0, Arguments::default().with(&from).with(size).with(&codes).with(&scales))?;
    let expected = crate::backend::cpu::int_matmul::QuantizedRows::per_token(&values, rows, size);
    let expected_codes: Vec<i8> = (0..rows).flat_map(|row| expected.row(row).to_vec()).collect();
    let mut wrong =
        mismatches(&codes.download::<i8>(rows * size)?, &expected_codes) + mismatches(&scales.download::<f32>(rows)?, &expected.scales);
    lab.launch("state_from_i8", [rows, 1, 1], 64, 0, Arguments::default().with(&codes).with(&scales).with(size).with(&back))?;
    let floats: Vec<f32> = expected_codes.iter().enumerate().map(|(i, code)| f32::from(*code) * expected.scales[i / size]).collect();
    wrong += mismatches(&back.download::<f32>(rows * size)?, &floats);
    lab.launch("state_to_f16", [rows, 1, 1], 64, 0, Arguments::default().with(&from).with(size).with(&halves).with(None::<&Buffer>))?;
    let rounded: Vec<f16> = values.iter().map(|x| f16::from_f32(*x)).collect();
    wrong += mismatches(&halves.download::<u16>(rows * size)?, &rounded.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
    lab.launch("state_from_f16", [rows, 1, 1], 64, 0, Arguments::default().with(&halves).with(None::<&Buffer>).with(size).with(&back))?;
    wrong += mismatches(&back.download::<f32>(rows * size)?, &rounded.iter().map(|x| x.to_f32()).collect::<Vec<_>>());
    Ok(wrong)
}
