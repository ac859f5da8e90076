//! Attention on the device: tiled for sequences, split over the keys for a step.

use std::sync::{Arc, Mutex};

use super::device::{Arguments, Buffer};
use super::{Cuda, CudaTensor, lock};
use crate::backend::{AttentionShape, Sequences};
use crate::error::{Error, Result};
use crate::format::{CacheFormat, CacheFormats};

/// Query tokens that a block takes.
const QUERIES: usize = 64;
/// Keys that a block of a decoding step goes through, at least: what it takes at a time.
const SPLIT_KEYS: usize = 32;
/// Warps of a block of a decoding step: as many read keys and values, and each query head of a key-value head has one.
const READING_WARPS: usize = 8;
/// Warps of such a block at most: query heads of a key-value head.
const MOST_WARPS: usize = 16;
/// Tokens that a new cache has room for, for each sequence; it doubles when they are used up.
const FIRST_CAPACITY: usize = 256;

/// How far the sequences of a cache are, on the host.
pub struct Positions {
    lengths: Vec<usize>,
    capacity: usize,
    /// How often the cache has moved.
    pub(super) moves: usize,
}

impl Positions {
    pub(super) fn has_room(&self, tokens: usize) -> bool {
        self.lengths.iter().all(|length| length + tokens <= self.capacity)
    }

    pub(super) fn advance(&mut self, tokens: usize) {
        self.lengths.iter_mut().for_each(|length| *length += tokens);
    }
}

/// Keys and values `[slots, capacity, kv_heads·head_dim]` of some sequences.
pub struct KvCache {
    kv_heads: usize,
    head_dim: usize,
    format: CacheFormat,
    positions: Arc<Mutex<Positions>>,
    /// Allocated when first used.
    buffers: Option<Slots>,
}

struct Slots {
    keys: Rows,
    values: Rows,
    /// `int [slots, kv_heads]`, for each head of a slot what `positions` has of the slot.
    lengths: Buffer,
    /// `int [slots, kv_heads]`: blocks of a decoding step that are done with a head; 0 between launches.
    tickets: Buffer,
}

/// Keys or values, row after row.
struct Rows {
    values: Buffer,
    /// int8: `[rows, kv_heads]`.
    scales: Option<Buffer>,
}

/// What the kernels of a format are called behind their names.
fn suffix(format: CacheFormat) -> &'static str {
    match format {
        CacheFormat::F32 => "f32",
        CacheFormat::F16 => "f16",
        CacheFormat::Int8 => "i8",
    }
}

/// Keys, values and their scales, where a kernel reads or writes them.
#[derive(Clone, Copy)]
struct Places<'a> {
    format: CacheFormat,
    keys: &'a Buffer,
    values: &'a Buffer,
    key_scales: Option<&'a Buffer>,
    value_scales: Option<&'a Buffer>,
}

impl Places<'_> {
    fn arguments(&self, arguments: Arguments) -> Arguments {
        arguments.with(self.keys).with(self.values).with(self.key_scales).with(self.value_scales)
    }
}

impl Slots {
    fn places(&self, format: CacheFormat) -> Places<'_> {
        let (keys, values) = (&self.keys, &self.values);
        Places {
            format,
            keys: &keys.values,
            values: &values.values,
            key_scales: keys.scales.as_ref(),
            value_scales: values.scales.as_ref(),
        }
    }
}

impl KvCache {
    pub fn new(shape: &AttentionShape, sequences: usize, formats: CacheFormats) -> Self {
        let positions = Positions { lengths: vec![0; sequences], capacity: 0, moves: 0 };
        Self {
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            format: formats.kv,
            positions: Arc::new(Mutex::new(positions)),
            buffers: None,
        }
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        let bytes = |rows: &Rows| (rows.values.bytes() + rows.scales.as_ref().map_or(0, Buffer::bytes)) as u64;
        self.buffers.as_ref().map_or(0, |slots| bytes(&slots.keys) + bytes(&slots.values))
    }
}

impl Cuda {
    /// Whether a step's attention is one launch, which reads on the device how far sequences are, so that it can be recorded.
    pub(super) fn steps_attention(shape: &AttentionShape) -> bool {
        shape.heads / shape.kv_heads <= MOST_WARPS
    }

    /// Without a cache: each sequence sees its own keys behind those of the sequences that it continues.
    pub(super) fn attend(&self, [q, k, v]: [&CudaTensor; 3], shape: &AttentionShape, sequences: &Sequences) -> Result<CudaTensor> {
        let ranges: Vec<_> = sequences.ranges().collect();
        let (mut queries, mut segments) = (Vec::new(), Vec::new());
        for (index, range) in ranges.iter().enumerate() {
            let first = segments.len() / 2;
            let mut chain: Vec<usize> = std::iter::successors(Some(index), |index| sequences.parent(*index)).collect();
            chain.reverse();
            segments.extend(chain.into_iter().flat_map(|index| [ranges[index].start as i32, ranges[index].end as i32]));
            queries.extend([range.start as i32, range.end as i32, first as i32, segments.len() as i32 / 2]);
        }
        let places = Places { format: CacheFormat::F32, keys: k.buffer(), values: v.buffer(), key_scales: None, value_scales: None };
        self.attend_segments(q, places, shape, &queries, &segments)
    }

    fn attend_segments(
        &self,
        q: &CudaTensor,
        places: Places<'_>,
        shape: &AttentionShape,
        queries: &[i32],
        segments: &[i32],
    ) -> Result<CudaTensor> {
        let longest = queries.chunks_exact(4).map(|row| (row[1] - row[0]) as usize).max().unwrap_or(0);
        let count = queries.len() / 4;
        let (queries, segments) = (self.upload_values(queries)?, self.upload_values(segments)?);
        let out = self.tensor(q.rows, q.cols)?;
        let arguments = places.arguments(Arguments::default().with(q.buffer())).with(&queries).with(&segments);
        let arguments = arguments.with(shape.heads).with(shape.kv_heads).with(shape.head_dim).with(out.buffer());
        self.launch(
            &format!("attention_{}", suffix(places.format)),
            [longest.div_ceil(QUERIES), shape.heads, count],
            128,
            65536,
            arguments,
        )?;
        Ok(out)
    }

    /// With a cache: sequence i goes on from slot i.
    pub(super) fn attend_cached(
        &self,
        [q, k, v]: [&CudaTensor; 3],
        shape: &AttentionShape,
        sequences: &Sequences,
        cache: &mut KvCache,
    ) -> Result<CudaTensor> {
        let ranges: Vec<_> = sequences.ranges().collect();
        let longest = ranges.iter().map(std::iter::ExactSizeIterator::len).max().unwrap_or(0);
        self.reserve(cache, longest)?;
        let slots = cache.buffers.as_ref().ok_or_else(|| Error::run("a cache lost its buffers"))?;
        let mut positions = lock(&cache.positions);
        if positions.lengths.len() != ranges.len() {
            return Err(Error::run(format!("a cache of {} sequences was given {}", positions.lengths.len(), ranges.len())));
        }
        let (count, capacity) = (ranges.len(), positions.capacity);
        for (length, range) in positions.lengths.iter_mut().zip(&ranges) {
            *length += range.len();
        }
        let (moves, step) = (positions.moves, ranges.iter().all(|range| range.len() == 1));
        if step && Self::steps_attention(shape) {
            drop(positions);
            if let Some(notes) = &mut *lock(&self.recording) {
                notes.positions.push((Arc::clone(&cache.positions), moves));
            }
            return self.attend_step([q, k, v], slots, cache.format, shape, count, capacity);
        }
        let rows: Vec<i32> =
            ranges.iter().enumerate().flat_map(|(slot, range)| [range.start as i32, range.end as i32, slot as i32, 0]).collect();
        let table = self.upload_values(&rows)?;
        let places = slots.places(cache.format);
        let arguments = Arguments::default().with(k.buffer()).with(v.buffer()).with(cache.kv_heads).with(cache.head_dim);
        let arguments = places.arguments(arguments.with(&table).with(&slots.lengths).with(capacity));
        self.launch(&format!("kv_append_{}", suffix(cache.format)), [longest, count, 1], 256, 0, arguments)?;
        let arguments = Arguments::default().with(&slots.lengths).with(&table).with(count).with(cache.kv_heads);
        self.launch("advance", [1, 1, 1], 256, 0, arguments)?;
        let (mut queries, mut segments) = (Vec::new(), Vec::new());
        for (slot, (range, length)) in ranges.iter().zip(&positions.lengths).enumerate() {
            queries.extend([range.start as i32, range.end as i32, slot as i32, slot as i32 + 1]);
            segments.extend([(slot * capacity) as i32, (slot * capacity + length) as i32]);
        }
        self.attend_segments(q, places, shape, &queries, &segments)
    }

    /// One query a sequence, whose key and value are kept on the way: blocks share out the keys, and the last one adds their results up.
    fn attend_step(
        &self,
        [q, k, v]: [&CudaTensor; 3],
        slots: &Slots,
        format: CacheFormat,
        shape: &AttentionShape,
        count: usize,
        capacity: usize,
    ) -> Result<CudaTensor> {
        // Two blocks a multiprocessor keep the memory busy; more only add to what is merged.
        let wanted = (2 * self.device().multiprocessors()).div_ceil(shape.kv_heads * count);
        let splits = wanted.clamp(1, capacity.div_ceil(SPLIT_KEYS));
        let partial = self.buffer::<f32>(count * shape.heads * splits * (shape.head_dim + 4))?;
        let (out, ratio) = (self.tensor(q.rows, q.cols)?, shape.heads / shape.kv_heads);
        let arguments = Arguments::default().with(q.buffer()).with(k.buffer()).with(v.buffer());
        let arguments = slots.places(format).arguments(arguments).with(&slots.lengths).with(capacity).with(ratio).with(shape.head_dim);
        let arguments = arguments.with((shape.head_dim as f32).sqrt().recip()).with(&partial).with(&slots.tickets).with(out.buffer());
        let (blocks, threads) = ([shape.kv_heads, splits, count], 32 * ratio.max(READING_WARPS));
        self.launch(&format!("attention_decode_{}", suffix(format)), blocks, threads, 0, arguments)?;
        Ok(out)
    }

    /// Makes room for `tokens` more of every sequence: moves the cache where it has none.
    fn reserve(&self, cache: &mut KvCache, tokens: usize) -> Result<()> {
        let recording = lock(&self.recording).is_some();
        let mut positions = lock(&cache.positions);
        if cache.buffers.is_some() && positions.has_room(tokens + usize::from(!recording)) {
            return Ok(());
        }
        if recording {
            return Err(Error::run("a key-value cache cannot move while a step is recorded"));
        }
        // Room for one token more, so that the next step finds it and can be recorded.
        let longest = positions.lengths.iter().copied().max().unwrap_or(0) + 1;
        let mut capacity = positions.capacity.max(FIRST_CAPACITY);
        while capacity < longest + tokens {
            capacity *= 2;
        }
        let count = positions.lengths.len();
        // Bytes of so many tokens' values, and of their scales.
        let size = |tokens: usize| {
            let rows = tokens * cache.kv_heads;
            match cache.format {
                CacheFormat::F32 => (4 * rows * cache.head_dim, 0),
                CacheFormat::F16 => (2 * rows * cache.head_dim, 0),
                CacheFormat::Int8 => (rows * cache.head_dim, 4 * rows),
            }
        };
        let rows = || -> Result<Rows> {
            let (values, scales) = size(count * capacity);
            Ok(Rows { values: self.buffer::<u8>(values)?, scales: if scales > 0 { Some(self.buffer::<u8>(scales)?) } else { None } })
        };
        let heads = count * cache.kv_heads;
        let (lengths, tickets) = (self.buffer::<i32>(heads)?, self.buffer::<i32>(heads)?);
        tickets.zero()?;
        let moved = Slots { keys: rows()?, values: rows()?, lengths, tickets };
        match &cache.buffers {
            Some(old) => {
                let (new_size, old_size) = (size(capacity), size(positions.capacity));
                for (slot, length) in positions.lengths.iter().enumerate() {
                    let (values, scales) = size(*length);
                    for (to, from) in [(&moved.keys, &old.keys), (&moved.values, &old.values)] {
                        to.values.copy_from(slot * new_size.0, &from.values, slot * old_size.0, values)?;
                        if let (Some(to), Some(from)) = (&to.scales, &from.scales) {
                            to.copy_from(slot * new_size.1, from, slot * old_size.1, scales)?;
                        }
                    }
                }
                moved.lengths.copy_from(0, &old.lengths, 0, 4 * heads)?;
            }
            None => moved.lengths.zero()?,
        }
        positions.capacity = capacity;
        positions.moves += 1;
        drop(positions);
        cache.buffers = Some(moved);
        Ok(())
    }
}
