//! The Mamba-2 mixer on the device: convolution, chunked scan for sequences, state update for a step.

use std::sync::Arc;

use super::device::{Arguments, Buffer};
use super::{Cuda, CudaTensor, lock};
use crate::backend::{MambaParameters, MambaShape, Sequences, SsmInternals};
use crate::error::{Error, Result};
use crate::format::{CacheFormat, CacheFormats};

/// Tokens of a chunk of the scan.
const CHUNK: usize = 64;
/// Tokens that a block of the convolution goes through.
const CONV_TOKENS: usize = 16;
/// Channels of the convolution that a block takes.
const CONV_CHANNELS: usize = 128;

/// Parameters of a mixer on the device.
pub struct Parameters {
    conv_weight: Buffer,
    conv_bias: Buffer,
    a: Buffer,
    d: Buffer,
    dt_bias: Buffer,
}

/// Convolution windows `[slots, kernel − 1, channels]` and SSM states `[slots, heads, head_dim, state]` of some sequences.
pub struct SsmCache {
    sequences: usize,
    window: usize,
    /// Values of a sequence's state, and how many of them share a scale in int8.
    state: usize,
    run: usize,
    formats: CacheFormats,
    /// Allocated when first used.
    buffers: Option<Slots>,
}

struct Slots {
    windows: Buffer,
    states: States,
}

/// SSM states `[slots, heads, head_dim, state]` as they are kept.
struct States {
    format: CacheFormat,
    values: Buffer,
    /// int8: a scale for each head and channel.
    scales: Option<Buffer>,
}

impl SsmCache {
    pub fn new(shape: &MambaShape, sequences: usize, formats: CacheFormats) -> Self {
        let (window, state) = ((shape.kernel - 1) * shape.conv_channels(), shape.inner() * shape.state);
        Self { sequences, window, state, run: shape.state, formats, buffers: None }
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.buffers.as_ref().map_or(0, |slots| {
            (slots.windows.bytes() + slots.states.values.bytes() + slots.states.scales.as_ref().map_or(0, Buffer::bytes)) as u64
        })
    }
}

/// What the kernels must know of a batch's sequences, on the device.
pub struct Tables {
    sequences: Sequences,
    cached: bool,
    /// Sequences that depend on none of the same level, levels in order.
    levels: Vec<Level>,
    /// Slots for what sequences continue from, where some do.
    slots: usize,
}

struct Level {
    count: usize,
    longest: usize,
    /// `[count, 4]`: first token, end token, slot in or −1, slot out or −1.
    sequences: Buffer,
    /// `[chunks, 2]`: first token, end token.
    chunks: Buffer,
    chunk_count: usize,
    /// `[count, 4]`: first chunk, end chunk, slot in or −1, slot out or −1.
    sequence_chunks: Buffer,
}

impl Cuda {
    pub(super) fn mamba_parameters(&self, parameters: &MambaParameters) -> Result<Parameters> {
        if parameters.internals != SsmInternals::Float || parameters.rotation.is_some() {
            return Err(Error::input("the GPU computes the inside of Mamba-2 mixers in float and without rotate-state only so far")
                .hint("run this variant with --device cpu, or make one with float SSM activations"));
        }
        Ok(Parameters {
            conv_weight: self.upload_values(&parameters.conv_weight)?,
            conv_bias: self.upload_values(&parameters.conv_bias)?,
            a: self.upload_values(&parameters.a)?,
            d: self.upload_values(&parameters.d)?,
            dt_bias: self.upload_values(&parameters.dt_bias)?,
        })
    }

    /// Empty slots for `count` sequences.
    fn slots(&self, count: usize, window: usize, state: usize, run: usize, format: CacheFormat) -> Result<Slots> {
        let size = match format {
            CacheFormat::F32 => 4,
            CacheFormat::F16 => 2,
            CacheFormat::Int8 => 1,
        };
        let scales = if format == CacheFormat::Int8 { Some(self.buffer::<f32>(count * state / run)?) } else { None };
        let states = States { format, values: self.buffer::<u8>(count * state * size)?, scales };
        let slots = Slots { windows: self.buffer::<f32>(count * window)?, states };
        slots.windows.zero()?;
        slots.states.values.zero()?;
        slots.states.scales.iter().try_for_each(Buffer::zero)?;
        Ok(slots)
    }

    /// Runs `scan` over the states in f32, which is what the chunked scan reads and writes.
    fn widened(&self, states: &States, rows: usize, run: usize, scan: impl FnOnce(&Buffer) -> Result<CudaTensor>) -> Result<CudaTensor> {
        let (from, to) = match states.format {
            CacheFormat::F32 => return scan(&states.values),
            CacheFormat::F16 => ("state_from_f16", "state_to_f16"),
            CacheFormat::Int8 => ("state_from_i8", "state_to_i8"),
        };
        let wide = self.buffer::<f32>(rows * run)?;
        let arguments = Arguments::default().with(&states.values).with(states.scales.as_ref()).with(run).with(&wide);
        self.launch(from, [rows, 1, 1], 64, 0, arguments)?;
        let y = scan(&wide)?;
        let arguments = Arguments::default().with(&wide).with(run).with(&states.values).with(states.scales.as_ref());
        self.launch(to, [rows, 1, 1], 64, 0, arguments)?;
        Ok(y)
    }

    /// See [`crate::backend::Backend::mamba_scan`].
    pub(super) fn scan(
        &self,
        projected: &CudaTensor,
        parameters: &Parameters,
        shape: &MambaShape,
        sequences: &Sequences,
        cache: Option<&mut SsmCache>,
    ) -> Result<CudaTensor> {
        let Some(cache) = cache else {
            let tables = self.tables(sequences, false)?;
            let (window, state) = ((shape.kernel - 1) * shape.conv_channels(), shape.inner() * shape.state);
            let slots = if tables.slots > 0 { Some(self.slots(tables.slots, window, state, shape.state, CacheFormat::F32)?) } else { None };
            let slots = slots.as_ref().map(|slots| (&slots.windows, &slots.states.values));
            return self.scan_sequences(projected, parameters, shape, &tables, slots);
        };
        if cache.formats.conv != CacheFormat::F32 {
            return Err(Error::input("the GPU keeps the convolution's inputs in f32 only so far")
                .hint("evaluate this variant with --device cpu, or make one with a float convolution cache"));
        }
        if cache.sequences != sequences.count() {
            return Err(Error::run(format!("a cache of {} sequences was given {}", cache.sequences, sequences.count())));
        }
        if cache.buffers.is_none() {
            cache.buffers = Some(self.slots(cache.sequences, cache.window, cache.state, cache.run, cache.formats.state)?);
        }
        let slots = cache.buffers.as_ref().ok_or_else(|| Error::run("a cache lost its buffers"))?;
        if sequences.tokens() == sequences.count() {
            return self.scan_step(projected, parameters, shape, sequences.count(), slots);
        }
        let tables = self.tables(sequences, true)?;
        let rows = cache.sequences * cache.state / cache.run;
        self.widened(&slots.states, rows, cache.run, |states| {
            self.scan_sequences(projected, parameters, shape, &tables, Some((&slots.windows, states)))
        })
    }

    /// One token a sequence.
    fn scan_step(
        &self,
        projected: &CudaTensor,
        parameters: &Parameters,
        shape: &MambaShape,
        count: usize,
        slots: &Slots,
    ) -> Result<CudaTensor> {
        let (channels, inner) = (shape.conv_channels(), shape.inner());
        let (xbc, y) = (self.tensor(count, channels)?, self.tensor(count, inner)?);
        let arguments = Arguments::default()
            .with(projected.buffer())
            .with(projected.cols)
            .with(inner)
            .with(&parameters.conv_weight)
            .with(&parameters.conv_bias)
            .with(channels)
            .with(shape.kernel)
            .with(&slots.windows)
            .with(xbc.buffer());
        self.launch("conv_step", [channels.div_ceil(CONV_CHANNELS), count, 1], 128, 0, arguments)?;
        let arguments = Arguments::default()
            .with(xbc.buffer())
            .with(projected.buffer())
            .with(projected.cols)
            .with(&parameters.a)
            .with(&parameters.d)
            .with(&parameters.dt_bias)
            .with(shape.dt_min)
            .with(shape.dt_max)
            .with(shape.heads)
            .with(shape.head_dim)
            .with(shape.groups)
            .with(shape.state)
            .with(&slots.states.values)
            .with(slots.states.scales.as_ref())
            .with(y.buffer());
        let kernel = match slots.states.format {
            CacheFormat::F32 => "ssm_step_f32",
            CacheFormat::F16 => "ssm_step_f16",
            CacheFormat::Int8 => "ssm_step_i8",
        };
        self.launch(kernel, [shape.heads, shape.head_dim.div_ceil(16), count], 128, 0, arguments)?;
        Ok(y)
    }

    fn scan_sequences(
        &self,
        projected: &CudaTensor,
        parameters: &Parameters,
        shape: &MambaShape,
        tables: &Tables,
        slots: Option<(&Buffer, &Buffer)>,
    ) -> Result<CudaTensor> {
        let (channels, inner, tokens) = (shape.conv_channels(), shape.inner(), projected.rows);
        let (xbc, y) = (self.tensor(tokens, channels)?, self.tensor(tokens, inner)?);
        let (dt, decay) = (self.tensor(tokens, shape.heads)?, self.tensor(tokens, shape.heads)?);
        let states_size = shape.head_dim * shape.state;
        for level in &tables.levels {
            let arguments = Arguments::default()
                .with(projected.buffer())
                .with(projected.cols)
                .with(inner)
                .with(&parameters.conv_weight)
                .with(&parameters.conv_bias)
                .with(channels)
                .with(shape.kernel)
                .with(&level.sequences)
                .with(slots.map(|(windows, _)| windows))
                .with(xbc.buffer());
            let blocks = [channels.div_ceil(CONV_CHANNELS), level.longest.div_ceil(CONV_TOKENS), level.count];
            self.launch("conv", blocks, 128, 0, arguments)?;
            if let Some((windows, _)) = slots {
                let arguments = Arguments::default()
                    .with(projected.buffer())
                    .with(projected.cols)
                    .with(inner)
                    .with(channels)
                    .with(shape.kernel)
                    .with(&level.sequences)
                    .with(windows);
                self.launch("conv_window", [channels.div_ceil(CONV_CHANNELS), level.count, 1], 128, 0, arguments)?;
            }
            let arguments = Arguments::default()
                .with(projected.buffer())
                .with(projected.cols)
                .with(inner + channels)
                .with(&parameters.a)
                .with(&parameters.dt_bias)
                .with(shape.dt_min)
                .with(shape.dt_max)
                .with(shape.heads)
                .with(&level.chunks)
                .with(dt.buffer())
                .with(decay.buffer());
            self.launch("ssd_decay", [shape.heads.div_ceil(32), level.chunk_count, 1], 32, 0, arguments)?;
            let states = self.buffer::<f32>(level.chunk_count * shape.heads * states_size)?;
            let arguments = Arguments::default()
                .with(xbc.buffer())
                .with(dt.buffer())
                .with(decay.buffer())
                .with(&level.chunks)
                .with(shape.heads)
                .with(shape.head_dim)
                .with(shape.groups)
                .with(shape.state)
                .with(&states);
            self.launch("ssd_state", [shape.heads, level.chunk_count, 1], 128, 49408, arguments)?;
            let arguments = Arguments::default()
                .with(&states)
                .with(decay.buffer())
                .with(&level.chunks)
                .with(&level.sequence_chunks)
                .with(shape.heads)
                .with(shape.head_dim)
                .with(shape.state)
                .with(slots.map(|(_, states)| states));
            self.launch("ssd_pass", [states_size.div_ceil(256), shape.heads, level.count], 256, 0, arguments)?;
            let arguments = Arguments::default()
                .with(xbc.buffer())
                .with(dt.buffer())
                .with(decay.buffer())
                .with(&states)
                .with(&parameters.d)
                .with(&level.chunks)
                .with(shape.heads)
                .with(shape.head_dim)
                .with(shape.groups)
                .with(shape.state)
                .with(y.buffer());
            self.launch("ssd_output", [shape.heads, level.chunk_count, 1], 128, 81920, arguments)?;
        }
        Ok(y)
    }

    /// The tables of `sequences`, which the layers of a forward pass share. `cached`: sequence i goes on from slot i.
    fn tables(&self, sequences: &Sequences, cached: bool) -> Result<Arc<Tables>> {
        let mut kept = lock(&self.tables);
        if let Some(tables) = kept.as_ref().filter(|tables| tables.cached == cached && tables.sequences == *sequences) {
            return Ok(Arc::clone(tables));
        }
        let ranges: Vec<_> = sequences.ranges().collect();
        let mut depth: Vec<usize> = Vec::with_capacity(ranges.len());
        let mut slot = vec![-1; ranges.len()];
        let mut slots = 0;
        for index in 0..ranges.len() {
            depth.push(sequences.parent(index).map_or(0, |parent| depth[parent] + 1));
            if let Some(parent) = sequences.parent(index)
                && slot[parent] < 0
            {
                slot[parent] = slots;
                slots += 1;
            }
        }
        let mut levels = Vec::new();
        for level in 0..=depth.iter().copied().max().unwrap_or(0) {
            let (mut rows, mut chunks, mut sequence_chunks) = (Vec::new(), Vec::new(), Vec::new());
            let mut longest = 0;
            for (index, range) in ranges.iter().enumerate().filter(|(index, _)| depth[*index] == level) {
                let (from, to) = if cached {
                    (index as i32, index as i32)
                } else {
                    (sequences.parent(index).map_or(-1, |parent| slot[parent]), slot[index])
                };
                rows.extend([range.start as i32, range.end as i32, from, to]);
                let first = chunks.len() as i32 / 2;
                for start in range.clone().step_by(CHUNK) {
                    chunks.extend([start as i32, range.end.min(start + CHUNK) as i32]);
                }
                sequence_chunks.extend([first, chunks.len() as i32 / 2, from, to]);
                longest = longest.max(range.len());
            }
            levels.push(Level {
                count: rows.len() / 4,
                longest,
                chunk_count: chunks.len() / 2,
                sequences: self.upload_values(&rows)?,
                chunks: self.upload_values(&chunks)?,
                sequence_chunks: self.upload_values(&sequence_chunks)?,
            });
        }
        let slots = if cached { 0 } else { slots as usize };
        let tables = Arc::new(Tables { sequences: sequences.clone(), cached, levels, slots });
        *kept = Some(Arc::clone(&tables));
        Ok(tables)
    }
}
