//! What a mixer keeps between calls: the convolution's windows and the SSM states, in their formats.

use super::spans::Spans;
use super::{Internals, Parameters};
use crate::backend::MambaShape;
use crate::backend::cuda::Cuda;
use crate::backend::cuda::device::{Arguments, Buffer};
use crate::error::{Error, Result};
use crate::format::{CacheFormat, CacheFormats};

/// Largest row that the kernels between f32 and f16 take.
const HALVES_ROW: u32 = 256;

/// Windows and states of some sequences.
pub struct SsmCache {
    pub(super) sequences: usize,
    shape: MambaShape,
    formats: CacheFormats,
    /// Allocated when first used.
    buffers: Option<Slots>,
}

pub(super) struct Slots {
    pub windows: Windows,
    pub states: States,
}

/// Inputs that the convolution still needs, `[slots, kernel − 1, channels]`, oldest first.
pub(super) struct Windows {
    /// Of floats; int8 internals keep their codes.
    pub format: Option<CacheFormat>,
    pub values: Buffer,
    /// `[slots, kernel − 1, spans]`, of int8 with scales of its own.
    pub scales: Option<Buffer>,
    slots: usize,
    shape: MambaShape,
}

/// SSM states `[slots, heads, head_dim, state]`.
pub(super) struct States {
    pub format: CacheFormat,
    pub values: Buffer,
    /// int8: a scale for each head and channel.
    pub scales: Option<Buffer>,
    slots: usize,
    shape: MambaShape,
}

impl SsmCache {
    pub fn new(shape: &MambaShape, sequences: usize, formats: CacheFormats) -> Self {
        Self { sequences, shape: *shape, formats, buffers: None }
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        let bytes = |values: &Buffer, scales: Option<&Buffer>| (values.bytes() + scales.map_or(0, Buffer::bytes)) as u64;
        self.buffers.as_ref().map_or(0, |Slots { windows, states }| {
            bytes(&windows.values, windows.scales.as_ref()) + bytes(&states.values, states.scales.as_ref())
        })
    }

    /// The slots, empty ones at first.
    pub(super) fn slots(&mut self, cuda: &Cuda, parameters: &Parameters) -> Result<&Slots> {
        if self.buffers.is_none() {
            self.buffers = Some(cuda.slots(self.sequences, &self.shape, parameters, self.formats)?);
        }
        self.buffers.as_ref().ok_or_else(|| Error::run("a cache lost its buffers"))
    }
}

fn bytes_of(format: CacheFormat) -> usize {
    match format {
        CacheFormat::F32 => 4,
        CacheFormat::F16 => 2,
        CacheFormat::Int8 => 1,
    }
}

impl Cuda {
    /// Empty slots for `count` sequences.
    pub(super) fn slots(&self, count: usize, shape: &MambaShape, parameters: &Parameters, formats: CacheFormats) -> Result<Slots> {
        let zeros = |bytes: usize| -> Result<Buffer> {
            let buffer = self.buffer::<u8>(bytes)?;
            buffer.zero()?;
            Ok(buffer)
        };
        let rows = count * (shape.kernel - 1);
        let (format, scaled) = match &parameters.internals {
            Internals::Float => (Some(formats.conv), formats.conv == CacheFormat::Int8),
            Internals::Int8(taps) => (None, taps.fixed.is_none()),
        };
        let windows = Windows {
            format,
            values: zeros(rows * shape.conv_channels() * format.map_or(1, bytes_of))?,
            scales: if scaled { Some(zeros(4 * rows * Spans::conv(shape).count())?) } else { None },
            slots: count,
            shape: *shape,
        };
        let states = States {
            format: formats.state,
            values: zeros(count * shape.inner() * shape.state * bytes_of(formats.state))?,
            scales: if formats.state == CacheFormat::Int8 { Some(zeros(4 * count * shape.inner())?) } else { None },
            slots: count,
            shape: *shape,
        };
        Ok(Slots { windows, states })
    }

    /// Runs `scan` over the states in f32, which is what the chunked scan reads and writes.
    pub(super) fn widened_states<R>(&self, states: &States, scan: impl FnOnce(&Buffer) -> Result<R>) -> Result<R> {
        let (rows, run) = (states.slots * states.shape.inner(), states.shape.state);
        let (from, to) = match states.format {
            CacheFormat::F32 => return scan(&states.values),
            CacheFormat::F16 => ("state_from_f16", "state_to_f16"),
            CacheFormat::Int8 => ("state_from_i8", "state_to_i8"),
        };
        let wide = self.buffer::<f32>(rows * run)?;
        let arguments = Arguments::default().with(&states.values).with(states.scales.as_ref()).with(run).with(&wide);
        self.launch(from, [rows, 1, 1], 64, 0, arguments)?;
        let result = scan(&wide)?;
        let arguments = Arguments::default().with(&wide).with(run).with(&states.values).with(states.scales.as_ref());
        self.launch(to, [rows, 1, 1], 64, 0, arguments)?;
        Ok(result)
    }

    /// Runs `convolve` over windows of floats in f32.
    pub(super) fn widened_windows<R>(&self, windows: &Windows, convolve: impl FnOnce(&Buffer) -> Result<R>) -> Result<R> {
        let (rows, channels) = (windows.slots * (windows.shape.kernel - 1), windows.shape.conv_channels());
        let format = windows.format.ok_or_else(|| Error::run("a window of codes has no floats"))?;
        if format == CacheFormat::F32 {
            return convolve(&windows.values);
        }
        let wide = self.buffer::<f32>(rows * channels)?;
        // Any division into rows serves f16, which has no scales.
        let size = 1 << channels.trailing_zeros().min(HALVES_ROW.trailing_zeros());
        let spans = Spans::conv(&windows.shape);
        if format == CacheFormat::F16 {
            let arguments = Arguments::default().with(&windows.values).with(None::<&Buffer>).with(size).with(&wide);
            self.launch("state_from_f16", [rows * channels / size, 1, 1], 64, 0, arguments)?;
        } else {
            self.widen_spans(
                spans,
                rows,
                (&windows.values, channels),
                windows.scales.as_ref().map(|scales| (scales, spans.count())),
                None,
                &wide,
            )?;
        }
        let result = convolve(&wide)?;
        if format == CacheFormat::F16 {
            let arguments = Arguments::default().with(&wide).with(size).with(&windows.values).with(None::<&Buffer>);
            self.launch("state_to_f16", [rows * channels / size, 1, 1], 64, 0, arguments)?;
        } else {
            self.round_spans(spans, rows, &wide, &windows.values, None, windows.scales.as_ref())?;
        }
        Ok(result)
    }
}
