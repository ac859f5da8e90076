//! Attention on the device: tiled for sequences, split over the keys for a step.

use std::sync::{Arc, Mutex};

use super::device::{Arguments, Buffer};
use super::{Cuda, CudaTensor, lock};
use crate::backend::{AttentionShape, Sequences};
use crate::error::{Error, Result};
use crate::format::{CacheFormat, CacheFormats};

/// Query tokens that a block takes.
const QUERIES: usize = 64;
/// Keys that a block of a decoding step goes through, at least.
const SPLIT_KEYS: usize = 64;
/// Query heads of a key-value head that the decoding kernel takes.
const GROUPED_HEADS: usize = 16;
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
    width: usize,
    format: CacheFormat,
    positions: Arc<Mutex<Positions>>,
    /// Allocated when first used.
    buffers: Option<Slots>,
}

struct Slots {
    keys: Buffer,
    values: Buffer,
    /// `int [slots]`, as `positions` has them.
    lengths: Buffer,
}

impl KvCache {
    pub fn new(shape: &AttentionShape, sequences: usize, formats: CacheFormats) -> Self {
        let positions = Positions { lengths: vec![0; sequences], capacity: 0, moves: 0 };
        let width = shape.kv_heads * shape.head_dim;
        Self { width, format: formats.kv, positions: Arc::new(Mutex::new(positions)), buffers: None }
    }

    /// Bytes on the device.
    pub fn bytes(&self) -> u64 {
        self.buffers.as_ref().map_or(0, |slots| (slots.keys.bytes() + slots.values.bytes()) as u64)
    }
}

impl Cuda {
    /// Without a cache: each sequence sees its own keys behind those of the sequences that it continues.
    pub(super) fn attend(
        &self,
        q: &CudaTensor,
        k: &CudaTensor,
        v: &CudaTensor,
        shape: &AttentionShape,
        sequences: &Sequences,
    ) -> Result<CudaTensor> {
        let ranges: Vec<_> = sequences.ranges().collect();
        let (mut queries, mut segments) = (Vec::new(), Vec::new());
        for (index, range) in ranges.iter().enumerate() {
            let first = segments.len() / 2;
            let mut chain: Vec<usize> = std::iter::successors(Some(index), |index| sequences.parent(*index)).collect();
            chain.reverse();
            segments.extend(chain.into_iter().flat_map(|index| [ranges[index].start as i32, ranges[index].end as i32]));
            queries.extend([range.start as i32, range.end as i32, first as i32, segments.len() as i32 / 2]);
        }
        self.attend_segments(q, k.buffer(), v.buffer(), shape, &queries, &segments)
    }

    fn attend_segments(
        &self,
        q: &CudaTensor,
        keys: &Buffer,
        values: &Buffer,
        shape: &AttentionShape,
        queries: &[i32],
        segments: &[i32],
    ) -> Result<CudaTensor> {
        let longest = queries.chunks_exact(4).map(|row| (row[1] - row[0]) as usize).max().unwrap_or(0);
        let count = queries.len() / 4;
        let (queries, segments) = (self.upload_values(queries)?, self.upload_values(segments)?);
        let out = self.tensor(q.rows, q.cols)?;
        let arguments = Arguments::default()
            .with(q.buffer())
            .with(keys)
            .with(values)
            .with(&queries)
            .with(&segments)
            .with(shape.heads)
            .with(shape.kv_heads)
            .with(shape.head_dim)
            .with(out.buffer());
        self.launch("attention_f32", [longest.div_ceil(QUERIES), shape.heads, count], 128, 65536, arguments)?;
        Ok(out)
    }

    pub(super) fn attend_cached(
        &self,
        q: &CudaTensor,
        k: &CudaTensor,
        v: &CudaTensor,
        shape: &AttentionShape,
        sequences: &Sequences,
        cache: &mut KvCache,
    ) -> Result<CudaTensor> {
        if cache.format != CacheFormat::F32 {
            return Err(Error::input("the GPU keeps keys and values in f32 only so far")
                .hint("evaluate this variant with --device cpu, or make one without a quantized key-value cache"));
        }
        let ranges: Vec<_> = sequences.ranges().collect();
        let longest = ranges.iter().map(std::iter::ExactSizeIterator::len).max().unwrap_or(0);
        self.reserve(cache, longest)?;
        let slots = cache.buffers.as_ref().ok_or_else(|| Error::run("a cache lost its buffers"))?;
        let mut positions = lock(&cache.positions);
        if positions.lengths.len() != ranges.len() {
            return Err(Error::run(format!("a cache of {} sequences was given {}", positions.lengths.len(), ranges.len())));
        }
        let (count, capacity) = (ranges.len(), positions.capacity);
        let step = ranges.iter().all(|range| range.len() == 1);
        let rows: Vec<i32> =
            ranges.iter().enumerate().flat_map(|(slot, range)| [range.start as i32, range.end as i32, slot as i32, 0]).collect();
        let table = if step { None } else { Some(self.upload_values(&rows)?) };
        let arguments = Arguments::default()
            .with(k.buffer())
            .with(v.buffer())
            .with(cache.width)
            .with(table.as_ref())
            .with(&slots.lengths)
            .with(capacity)
            .with(&slots.keys)
            .with(&slots.values);
        self.launch("kv_append_f32", [longest, count, 1], 128, 0, arguments)?;
        let arguments = Arguments::default().with(&slots.lengths).with(table.as_ref()).with(count);
        self.launch("advance", [1, 1, 1], 256, 0, arguments)?;
        for (length, range) in positions.lengths.iter_mut().zip(&ranges) {
            *length += range.len();
        }
        if step && shape.heads / shape.kv_heads <= GROUPED_HEADS {
            drop(positions);
            if let Some(notes) = &mut *lock(&self.recording) {
                let moves = lock(&cache.positions).moves;
                notes.positions.push((Arc::clone(&cache.positions), moves));
            }
            return self.attend_step(q, slots, shape, count, capacity);
        }
        let (mut queries, mut segments) = (Vec::new(), Vec::new());
        for (slot, (range, length)) in ranges.iter().zip(&positions.lengths).enumerate() {
            queries.extend([range.start as i32, range.end as i32, slot as i32, slot as i32 + 1]);
            segments.extend([(slot * capacity) as i32, (slot * capacity + length) as i32]);
        }
        self.attend_segments(q, &slots.keys, &slots.values, shape, &queries, &segments)
    }

    /// One query a sequence: blocks share out the keys, and their partial results are merged.
    fn attend_step(&self, q: &CudaTensor, slots: &Slots, shape: &AttentionShape, count: usize, capacity: usize) -> Result<CudaTensor> {
        // Two blocks a multiprocessor keep the memory busy; more only add to what is merged.
        let wanted = (2 * self.device().multiprocessors()).div_ceil(shape.kv_heads * count);
        let splits = wanted.clamp(1, capacity.div_ceil(SPLIT_KEYS));
        let partial = self.buffer::<f32>(count * shape.heads * splits * (shape.head_dim + 2))?;
        let out = self.tensor(q.rows, q.cols)?;
        let arguments = Arguments::default()
            .with(q.buffer())
            .with(&slots.keys)
            .with(&slots.values)
            .with(&slots.lengths)
            .with(capacity)
            .with(shape.heads)
            .with(shape.kv_heads)
            .with(shape.head_dim)
            .with(splits)
            .with(&partial);
        self.launch("attention_decode_f32", [shape.kv_heads, splits, count], 128, 0, arguments)?;
        let arguments = Arguments::default().with(&partial).with(shape.heads).with(shape.head_dim).with(splits).with(out.buffer());
        self.launch("attention_merge", [shape.heads, count, 1], 128, 0, arguments)?;
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
        let size = |capacity: usize| 4 * capacity * cache.width;
        let moved = Slots {
            keys: self.buffer::<u8>(count * size(capacity))?,
            values: self.buffer::<u8>(count * size(capacity))?,
            lengths: self.buffer::<i32>(count)?,
        };
        match &cache.buffers {
            Some(old) => {
                for (slot, length) in positions.lengths.iter().enumerate() {
                    let (to, from) = (slot * size(capacity), slot * size(positions.capacity));
                    moved.keys.copy_from(to, &old.keys, from, size(*length))?;
                    moved.values.copy_from(to, &old.values, from, size(*length))?;
                }
                moved.lengths.copy_from(0, &old.lengths, 0, 4 * count)?;
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
