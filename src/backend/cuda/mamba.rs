//! The Mamba-2 mixer on the device: convolution, chunked scan for sequences, state update for a step; in floats, or with
//! int8 internals ([`crate::backend::SsmInternals`]).
//!
//! [`spans`] rounds and rotates slices, [`fixed`] does where scales are static, [`cache`] is what is kept between calls, [`tables`] what kernels know of a batch.

mod cache;
pub mod fixed;
mod spans;
mod tables;

pub use cache::SsmCache;
pub use tables::Tables;

use self::cache::{Slots, Windows};
use self::spans::{SPANS, Spans};
use super::device::{Arguments, Buffer};
use super::{Cuda, CudaTensor, scan};
use crate::backend::{MambaParameters, MambaShape, Sequences, SsmInternals, StateRotation};
use crate::error::{Error, Result};
use crate::format::{CacheFormat, CacheFormats};

/// Tokens that a block of the convolution goes through, of floats and of codes.
const CONV_TOKENS: usize = 16;
const CODE_TOKENS: usize = 8;
/// Channels of the convolution that a block takes.
const CONV_CHANNELS: usize = 128;
/// Channels of a span at most.
const SPAN_CHANNELS: usize = 256;
/// Taps of the convolution at most.
const TAPS: usize = 8;
/// Rows of the state that a warp of a step takes at a time, and the warps of a block: few, or where blocks have a multiprocessor each, up to
/// so many.
const WARP_ROWS: usize = 4;
const STEP_WARPS: usize = 4;
const STEP_WARPS_ALONE: usize = 20;

/// Parameters of a mixer on the device.
pub struct Parameters {
    conv_weight: Buffer,
    conv_bias: Buffer,
    a: Buffer,
    d: Buffer,
    dt_bias: Buffer,
    internals: Internals,
    rotation: Option<StateRotation>,
}

/// In which form z, x, B, C and dt pass through a mixer.
enum Internals {
    Float,
    Int8(Taps),
}

/// What int8 internals need.
struct Taps {
    /// The convolution's weights, `[channels, kernel]`.
    codes: Buffer,
    /// `[channels]`: what a sum is multiplied by, the input's static scale in it where there is one.
    scales: Buffer,
    /// Static scales: of z | x | B | C | dt, and of x | B | C behind the convolution.
    fixed: Option<(Buffer, Buffer)>,
}

/// `in_proj`'s output z | x | B | C | dt, `[tokens, projected]`. With int8 internals it is rounded by whoever reads it: a step by the kernel of its
/// convolution, whole sequences by [`Cuda::slices`].
pub struct Projection {
    projected: CudaTensor,
}

impl Projection {
    /// See [`crate::backend::Backend::project`].
    pub(super) fn new(projected: CudaTensor, parameters: &Parameters, shape: &MambaShape) -> Result<Self> {
        let int8 = matches!(parameters.internals, Internals::Int8(_));
        let wide = (int8 || parameters.rotation.is_some()) && shape.head_dim > SPAN_CHANNELS || int8 && shape.heads > SPAN_CHANNELS;
        if wide || shape.state > SPAN_CHANNELS || !shape.state.is_multiple_of(4) {
            return Err(Error::input(format!(
                "the GPU takes SSM states of a multiple of 4 up to {SPAN_CHANNELS}, and where they are rotated or int8 up to {SPAN_CHANNELS} heads of as \
                 many channels; this model has states of {} and {} heads of {}",
                shape.state, shape.heads, shape.head_dim
            ))
            .hint("run it with --device cpu"));
        }
        Ok(Self { projected })
    }
}

/// Codes `[tokens, projected]` with scales `[tokens, spans]`, or static ones.
struct Slices {
    tokens: usize,
    codes: Buffer,
    scales: Option<Buffer>,
}

/// x | B | C behind the convolution as codes.
struct Convolved {
    codes: Buffer,
    scales: Option<Buffer>,
}

impl Cuda {
    pub(super) fn mamba_parameters(&self, parameters: &MambaParameters) -> Result<Parameters> {
        let taps = parameters.conv_weight.len() / parameters.conv_bias.len();
        if taps > TAPS {
            return Err(Error::input(format!("convolutions on the GPU have up to {TAPS} taps; this model's has {taps}"))
                .hint("run it with --device cpu"));
        }
        Ok(Parameters {
            conv_weight: self.upload_values(&parameters.conv_weight)?,
            conv_bias: self.upload_values(&parameters.conv_bias)?,
            a: self.upload_values(&parameters.a)?,
            d: self.upload_values(&parameters.d)?,
            dt_bias: self.upload_values(&parameters.dt_bias)?,
            internals: self.internals(parameters)?,
            rotation: parameters.rotation,
        })
    }

    fn internals(&self, parameters: &MambaParameters) -> Result<Internals> {
        let fixed = match &parameters.internals {
            SsmInternals::Float => return Ok(Internals::Float),
            SsmInternals::Int8PerToken => None,
            SsmInternals::Int8Static(scales) => Some(scales),
        };
        // Made here, and not while a step is recorded.
        self.fault()?;
        let mut weights = parameters.conv_codes();
        if let Some(fixed) = fixed {
            weights.scales.iter_mut().zip(&fixed.conv_in).for_each(|(weight, input)| *weight *= input);
        }
        let fixed = match fixed {
            Some(scales) => {
                let in_front = [&scales.z, &scales.conv_in, &scales.dt].into_iter().flatten().copied().collect::<Vec<f32>>();
                Some((self.upload_values(&in_front)?, self.upload_values(&scales.conv_out)?))
            }
            None => None,
        };
        Ok(Internals::Int8(Taps { codes: self.upload_values(&weights.codes)?, scales: self.upload_values(&weights.scales)?, fixed }))
    }

    fn slices(&self, projected: &CudaTensor, taps: &Taps, parameters: &Parameters, shape: &MambaShape) -> Result<Slices> {
        let (tokens, spans) = (projected.rows, Spans::projection(shape));
        if let Some(fixed) = fixed::of(parameters, shape) {
            return Ok(Slices { tokens, codes: self.round_by_fours(&fixed, projected)?, scales: None });
        }
        let codes = self.buffer::<i8>(tokens * spans.width())?;
        let scales = if taps.fixed.is_none() { Some(self.buffer::<f32>(tokens * spans.count())?) } else { None };
        let fixed = taps.fixed.as_ref().map(|(in_front, _)| in_front);
        self.round_spans(spans, tokens, projected.buffer(), &codes, fixed, scales.as_ref())?;
        Ok(Slices { tokens, codes, scales })
    }

    /// z as its codes say.
    fn widened_gate(&self, slices: &Slices, parameters: &Parameters, shape: &MambaShape) -> Result<CudaTensor> {
        let z = self.tensor(slices.tokens, shape.inner())?;
        let scales = slices.scales.as_ref().map(|scales| (scales, Spans::projection(shape).count()));
        let codes = (&slices.codes, shape.projected());
        let fixed = parameters.fixed().map(|(in_front, _)| in_front);
        self.widen_spans(Spans::heads(shape), slices.tokens, codes, scales, fixed, z.buffer())?;
        Ok(z)
    }

    /// See [`crate::backend::Backend::mamba_scan`].
    pub(super) fn scan(
        &self,
        projection: &Projection,
        parameters: &Parameters,
        shape: &MambaShape,
        sequences: &Sequences,
        cache: Option<&mut SsmCache>,
    ) -> Result<CudaTensor> {
        match cache {
            None => {
                let tables = self.tables(sequences, false)?;
                let slots =
                    if tables.slots > 0 { Some(self.slots(tables.slots, shape, parameters, CacheFormats::default())?) } else { None };
                let slots = slots.as_ref().map(|Slots { windows, states }| (windows, &windows.values, &states.values));
                self.scan_sequences(projection, parameters, shape, &tables, slots)
            }
            Some(cache) if cache.sequences != sequences.count() => {
                Err(Error::run(format!("a cache of {} sequences was given {}", cache.sequences, sequences.count())))
            }
            Some(cache) => {
                let slots = cache.slots(self, parameters)?;
                if sequences.tokens() == sequences.count() {
                    return self.scan_step(projection, parameters, shape, slots);
                }
                let tables = self.tables(sequences, true)?;
                let scan = |windows: &Buffer| {
                    self.widened_states(&slots.states, |states| {
                        self.scan_sequences(projection, parameters, shape, &tables, Some((&slots.windows, windows, states)))
                    })
                };
                if slots.windows.format.is_some() { self.widened_windows(&slots.windows, scan) } else { scan(&slots.windows.values) }
            }
        }
    }

    /// One token a sequence.
    fn scan_step(&self, projection: &Projection, parameters: &Parameters, shape: &MambaShape, slots: &Slots) -> Result<CudaTensor> {
        let projected = &projection.projected;
        let (count, states) = (projected.rows, &slots.states);
        let y = self.tensor(count, shape.inner())?;
        let mixer = |inputs: Arguments, gate: &CudaTensor, dt: usize, own_gate: Option<&CudaTensor>| {
            let arguments = inputs.with(gate.buffer()).with(gate.cols).with(dt);
            let arguments =
                arguments.with(&parameters.a).with(&parameters.d).with(&parameters.dt_bias).with(shape.dt_min).with(shape.dt_max);
            let arguments = arguments.with(shape.heads).with(shape.head_dim).with(shape.groups).with(shape.state);
            gate_arguments(arguments.with(&states.values).with(states.scales.as_ref()), own_gate).with(y.buffer())
        };
        let of_state = |kernels: [&'static str; 3]| match states.format {
            CacheFormat::F32 => kernels[0],
            CacheFormat::F16 => kernels[1],
            CacheFormat::Int8 => kernels[2],
        };
        match &parameters.internals {
            Internals::Float => {
                let xbc = self.tensor(count, shape.conv_channels())?;
                self.widened_windows(&slots.windows, |windows| {
                    let arguments = conv_arguments(projected, parameters, shape).with(windows).with(xbc.buffer());
                    self.launch("conv_step", [shape.conv_channels().div_ceil(CONV_CHANNELS), count, 1], 128, 0, arguments)
                })?;
                self.rotate_spans(Spans::conv(shape), &xbc, parameters, None)?;
                // Heads are turned back, and only then multiplied by their gates.
                let own_gate = parameters.rotation.is_none().then_some(projected);
                let inputs = Arguments::default().with(xbc.buffer());
                let arguments = mixer(inputs, projected, shape.projected() - shape.heads, own_gate);
                let kernel = of_state(["ssm_step_f32", "ssm_step_f16", "ssm_step_i8"]);
                self.launch(kernel, [shape.heads, shape.head_dim.div_ceil(WARP_ROWS * STEP_WARPS), count], 32 * STEP_WARPS, 0, arguments)?;
                self.rotate_spans(Spans::heads(shape), &y, parameters, Some(projected))?;
            }
            Internals::Int8(taps) => {
                let (convolved, widened) = self.convolve_step(projected, taps, parameters, shape, &slots.windows)?;
                let head_block = parameters.rotation.map_or(1, |rotation| rotation.head);
                let arguments = mixer(convolved.arguments(parameters), &widened, shape.inner(), Some(&widened)).with(head_block);
                let alone = shape.heads * count <= self.device().multiprocessors();
                let warps = if alone { shape.head_dim.div_ceil(WARP_ROWS).min(STEP_WARPS_ALONE) } else { STEP_WARPS };
                let kernel = of_state(["ssm_step_codes_f32", "ssm_step_codes_f16", "ssm_step_codes_i8"]);
                self.launch(kernel, [shape.heads, 1, count], 32 * warps, 0, arguments)?;
            }
        }
        Ok(y)
    }

    /// A step of every slot in codes: x | B | C behind the convolution, and what the codes of z and dt stand for, `[slots, inner + heads]`.
    fn convolve_step(
        &self,
        projected: &CudaTensor,
        taps: &Taps,
        parameters: &Parameters,
        shape: &MambaShape,
        windows: &Windows,
    ) -> Result<(Convolved, CudaTensor)> {
        let (slots, behind) = (projected.rows, Spans::conv(shape));
        let widened = self.tensor(slots, shape.inner() + shape.heads)?;
        let convolved = self.convolved(slots, taps, shape)?;
        if let Some(fixed) = fixed::of(parameters, shape) {
            self.convolve_step_by_fours(&fixed, projected, taps, parameters, shape, windows, &widened, &convolved.codes)?;
            return Ok((convolved, widened));
        }
        let fixed = parameters.fixed();
        let arguments = Arguments::default().with(projected.buffer()).with(fixed.map(|(in_front, _)| in_front));
        let arguments = arguments.with(&taps.codes).with(&taps.scales).with(&parameters.conv_bias).with(shape.kernel);
        let arguments = behind.rotated(parameters.rotation).arguments(arguments).with(&windows.values).with(windows.scales.as_ref());
        let arguments = arguments.with(fixed.map(|(_, behind)| behind)).with(widened.buffer());
        let arguments = arguments.with(&convolved.codes).with(convolved.scales.as_ref()).with(&*self.fault()?);
        self.launch("conv_i8_step", [Spans::projection(shape).count().div_ceil(SPANS), slots, 1], 128, 0, arguments)?;
        Ok((convolved, widened))
    }

    /// Room for x | B | C of some tokens behind the convolution.
    fn convolved(&self, tokens: usize, taps: &Taps, shape: &MambaShape) -> Result<Convolved> {
        let spans = Spans::conv(shape);
        let codes = self.buffer::<i8>(tokens * spans.width())?;
        let scales = if taps.fixed.is_none() { Some(self.buffer::<f32>(tokens * spans.count())?) } else { None };
        Ok(Convolved { codes, scales })
    }

    /// x | B | C of the sequences of a batch, level after level.
    fn convolve(
        &self,
        projected: &CudaTensor,
        parameters: &Parameters,
        shape: &MambaShape,
        tables: &Tables,
        windows: Option<&Buffer>,
    ) -> Result<CudaTensor> {
        let (channels, kernel) = (shape.conv_channels(), shape.kernel);
        let xbc = self.tensor(projected.rows, channels)?;
        for level in &tables.levels {
            let arguments = conv_arguments(projected, parameters, shape).with(&level.sequences).with(windows).with(xbc.buffer());
            let blocks = [channels.div_ceil(CONV_CHANNELS), level.longest.div_ceil(CONV_TOKENS), level.count];
            self.launch("conv", blocks, 128, 0, arguments)?;
            if let Some(windows) = windows {
                let arguments = Arguments::default().with(projected.buffer()).with(projected.cols).with(shape.inner());
                let arguments = arguments.with(channels).with(kernel).with(&level.sequences).with(windows);
                self.launch("conv_window", [channels.div_ceil(CONV_CHANNELS), level.count, 1], 128, 0, arguments)?;
            }
        }
        self.rotate_spans(Spans::conv(shape), &xbc, parameters, None)?;
        Ok(xbc)
    }

    /// x | B | C of one sequence, which goes on from the cache's window.
    pub(super) fn convolve_cached(
        &self,
        projected: &CudaTensor,
        parameters: &Parameters,
        shape: &MambaShape,
        cache: &mut SsmCache,
    ) -> Result<CudaTensor> {
        let tables = self.tables(&Sequences::new(vec![projected.rows]), true)?;
        let slots = cache.slots(self, parameters)?;
        self.widened_windows(&slots.windows, |windows| self.convolve(projected, parameters, shape, &tables, Some(windows)))
    }

    /// The same of codes, rotated and rounded again.
    fn convolve_codes(
        &self,
        slices: &Slices,
        taps: &Taps,
        parameters: &Parameters,
        shape: &MambaShape,
        tables: &Tables,
        windows: Option<&Windows>,
    ) -> Result<Convolved> {
        let (spans, behind) = (Spans::projection(shape), Spans::conv(shape));
        let convolved = self.convolved(slices.tokens, taps, shape)?;
        let (values, window_scales) = (windows.map(|windows| &windows.values), windows.and_then(|windows| windows.scales.as_ref()));
        let inputs = || {
            let arguments = Arguments::default().with(&slices.codes).with(spans.width()).with(shape.inner());
            arguments.with(slices.scales.as_ref()).with(spans.count()).with(shape.heads)
        };
        let fault = self.fault()?;
        for level in &tables.levels {
            if let Some(fixed) = fixed::of(parameters, shape) {
                self.convolve_by_fours(&fixed, slices, taps, parameters, shape, level, values, &convolved.codes)?;
            } else {
                let arguments = inputs().with(&taps.codes).with(&taps.scales).with(&parameters.conv_bias).with(shape.kernel);
                let arguments = behind.rotated(parameters.rotation).arguments(arguments);
                let arguments = arguments.with(&level.sequences).with(values).with(window_scales);
                let arguments = arguments.with(parameters.fixed().map(|(_, behind)| behind)).with(&convolved.codes);
                let arguments = arguments.with(convolved.scales.as_ref()).with(&*fault);
                let blocks = [behind.count().div_ceil(SPANS), level.longest.div_ceil(CODE_TOKENS), level.count];
                self.launch("conv_i8", blocks, 128, 0, arguments)?;
            }
            if values.is_some() {
                let arguments = inputs().with(shape.kernel).with(shape.heads).with(shape.head_dim).with(2 * shape.groups).with(shape.state);
                let arguments = arguments.with(&level.sequences).with(values).with(window_scales);
                self.launch("conv_window_i8", [behind.count().div_ceil(SPANS), level.count, 1], 128, 0, arguments)?;
            }
        }
        Ok(convolved)
    }

    /// Whole sequences; slots give windows, and states in f32.
    fn scan_sequences(
        &self,
        projection: &Projection,
        parameters: &Parameters,
        shape: &MambaShape,
        tables: &Tables,
        slots: Option<(&Windows, &Buffer, &Buffer)>,
    ) -> Result<CudaTensor> {
        let projected = &projection.projected;
        let (states, dt) = (slots.map(|(_, _, states)| states), shape.projected() - shape.heads);
        // Whoever makes y multiplies by its gate; but rotated heads are turned back first.
        let own = parameters.rotation.is_none();
        match &parameters.internals {
            Internals::Float => {
                let windows = slots.map(|(_, windows, _)| windows);
                let xbc = self.convolve(projected, parameters, shape, tables, windows)?;
                let raw = Arguments::default().with(projected.buffer()).with(projected.cols).with(dt);
                let inputs = || Arguments::default().with(xbc.buffer());
                let gate = own.then_some(projected);
                let y = self.scan_chunks("", &raw, &inputs, projected.rows, parameters, shape, tables, states, gate)?;
                self.rotate_spans(Spans::heads(shape), &y, parameters, Some(projected))?;
                Ok(y)
            }
            Internals::Int8(taps) => {
                let slices = self.slices(projected, taps, parameters, shape)?;
                let windows = slots.map(|(windows, _, _)| windows);
                let convolved = self.convolve_codes(&slices, taps, parameters, shape, tables, windows)?;
                let (scales, stride, fixed) = slices.dt_scales(parameters, shape);
                let raw = Arguments::default().with(&slices.codes).with(shape.projected()).with(dt);
                let raw = raw.with(scales).with(stride).with(fixed);
                let inputs = || convolved.arguments(parameters);
                let scan = |gate: Option<&CudaTensor>| {
                    self.scan_chunks("_i8", &raw, &inputs, slices.tokens, parameters, shape, tables, states, gate)
                };
                if let (Some(rotation), Some(fixed)) = (parameters.rotation, fixed::of(parameters, shape)) {
                    let y = scan(None)?;
                    self.turn_by_fours(&fixed, &y, rotation.head, &slices, shape)?;
                    return Ok(y);
                }
                let gate = self.widened_gate(&slices, parameters, shape)?;
                let y = scan(own.then_some(&gate))?;
                self.rotate_spans(Spans::heads(shape), &y, parameters, Some(&gate))?;
                Ok(y)
            }
        }
    }

    /// The scan itself, level after level: `raw` is where dt comes from, `inputs` where x | B | C do, `suffix` that of the kernels
    /// which read those.
    #[allow(clippy::too_many_arguments, reason = "what the kernels of a scan read and write")]
    fn scan_chunks(
        &self,
        suffix: &str,
        raw: &Arguments,
        inputs: &dyn Fn() -> Arguments,
        tokens: usize,
        parameters: &Parameters,
        shape: &MambaShape,
        tables: &Tables,
        cache: Option<&Buffer>,
        gate: Option<&CudaTensor>,
    ) -> Result<CudaTensor> {
        let (y, dt, decay) = (self.tensor(tokens, shape.inner())?, self.tensor(tokens, shape.heads)?, self.tensor(tokens, shape.heads)?);
        let sizes = |arguments: Arguments| arguments.with(shape.heads).with(shape.head_dim).with(shape.groups).with(shape.state);
        let states_size = shape.head_dim * shape.state;
        for level in &tables.levels {
            let arguments = raw.clone().with(&parameters.a).with(&parameters.dt_bias).with(shape.dt_min).with(shape.dt_max);
            let arguments = arguments.with(shape.heads).with(&level.chunks).with(dt.buffer()).with(decay.buffer());
            let kernel = |name: &str| format!("{name}{suffix}");
            self.launch(&kernel("ssd_decay"), [shape.heads.div_ceil(32), level.chunk_count, 1], 128, 0, arguments)?;
            if scan::serves(self.device().arch(), shape) {
                let shared = self.buffer::<u8>(level.chunk_count * shape.groups * scan::SHARED_CHUNK)?;
                let blocks = [shape.groups, level.chunk_count, 1];
                let arguments = sizes(inputs().with(&level.chunks)).with(&shared);
                self.launch(&kernel("ssd_share"), blocks, scan::THREADS, scan::SHARE_MEMORY, arguments)?;
                let arguments = inputs().with(dt.buffer()).with(decay.buffer()).with(&shared).with(&parameters.d);
                let arguments = sizes(arguments.with(&level.chunks).with(&level.sequence_chunks)).with(cache);
                let blocks = [shape.heads * shape.head_dim.div_ceil(scan::CHANNELS), level.count, 1];
                self.launch(
                    &kernel("ssd_scan"),
                    blocks,
                    scan::THREADS,
                    scan::SCAN_MEMORY,
                    gate_arguments(arguments, gate).with(y.buffer()),
                )?;
                continue;
            }
            let states = self.buffer::<f32>(level.chunk_count * shape.heads * states_size)?;
            let arguments = inputs().with(dt.buffer()).with(decay.buffer()).with(&level.chunks);
            self.launch(&kernel("ssd_state"), [shape.heads, level.chunk_count, 1], 128, 49408, sizes(arguments).with(&states))?;
            let arguments = Arguments::default().with(&states).with(decay.buffer()).with(&level.chunks).with(&level.sequence_chunks);
            let arguments = arguments.with(shape.heads).with(shape.head_dim).with(shape.state).with(cache);
            self.launch("ssd_pass", [states_size.div_ceil(256), shape.heads, level.count], 256, 0, arguments)?;
            let arguments = inputs().with(dt.buffer()).with(decay.buffer()).with(&states).with(&parameters.d).with(&level.chunks);
            let arguments = gate_arguments(sizes(arguments), gate).with(y.buffer());
            self.launch(&kernel("ssd_output"), [shape.heads, level.chunk_count, 1], 256, 81920, arguments)?;
        }
        Ok(y)
    }
}

/// What y is multiplied by where it is stored: z, in the first columns of a tensor, or nothing.
fn gate_arguments(arguments: Arguments, gate: Option<&CudaTensor>) -> Arguments {
    arguments.with(gate.map(CudaTensor::buffer)).with(gate.map_or(0, |gate| gate.cols))
}

/// What the float convolutions begin with.
fn conv_arguments(projected: &CudaTensor, parameters: &Parameters, shape: &MambaShape) -> Arguments {
    let arguments = Arguments::default().with(projected.buffer()).with(projected.cols).with(shape.inner());
    arguments.with(&parameters.conv_weight).with(&parameters.conv_bias).with(shape.conv_channels()).with(shape.kernel)
}

impl Parameters {
    /// Static scales in front of and behind the convolution.
    fn fixed(&self) -> Option<(&Buffer, &Buffer)> {
        match &self.internals {
            Internals::Float => None,
            Internals::Int8(taps) => taps.fixed.as_ref().map(|(in_front, behind)| (in_front, behind)),
        }
    }
}

impl Slices {
    /// Of dt: address of the first token's scale, distance to the next token's, address of the static scales of the heads; 0 for none.
    fn dt_scales(&self, parameters: &Parameters, shape: &MambaShape) -> (u64, usize, u64) {
        let at = |buffer: Option<&Buffer>, index: usize| buffer.map_or(0, |buffer| buffer.address() + 4 * index as u64);
        let spans = Spans::projection(shape).count();
        let fixed = parameters.fixed().map(|(in_front, _)| in_front);
        (at(self.scales.as_ref(), spans - 1), spans, at(fixed, shape.projected() - shape.heads))
    }
}

impl Convolved {
    /// Codes, scales, static scales: where kernels of codes read x | B | C.
    fn arguments(&self, parameters: &Parameters) -> Arguments {
        Arguments::default().with(&self.codes).with(self.scales.as_ref()).with(parameters.fixed().map(|(_, behind)| behind))
    }
}
