//! Attention over whole sequences, trees and caches.

use half::{bf16, f16};

use super::{Check, EXACT, Extent, FLOAT, HALVES, Lab, difference, mismatches, worse};
use crate::backend::AttentionShape;
use crate::backend::cpu::stored::{round_span, to_f16};
use crate::backend::cuda::device::{Arguments, Buffer};
use crate::error::Result;

fn shape(heads: usize, kv_heads: usize, head_dim: usize) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim }
}

pub fn checks(extent: Extent) -> Vec<Check> {
    // The demo's, golden's; then heads per key/value head of the published models with one or two of these.
    let mut shapes = vec![shape(4, 2, 64), shape(4, 2, 24), shape(4, 1, 128), shape(10, 2, 128), shape(16, 1, 128)];
    if extent == Extent::Published {
        shapes.extend([shape(32, 8, 128), shape(40, 8, 128), shape(32, 2, 128)]);
    }
    let mut all = Vec::new();
    for shape in shapes {
        let text = format!("{}/{} heads x {}", shape.heads, shape.kv_heads, shape.head_dim);
        for kernel in ["attention_f32", "attention_bf16", "attention_f16", "attention_i8"] {
            all.push(Check::new(kernel, format!("{text}, sequences"), HALVES, move |lab| {
                prefill(lab, kernel, &shape, &[33, 1, 70], &[&[0], &[1], &[2]])
            }));
            all.push(Check::new(kernel, format!("{text}, tree"), HALVES, move |lab| {
                prefill(lab, kernel, &shape, &[40, 3, 35], &[&[0], &[0, 1], &[0, 1, 2]])
            }));
        }
        for kernel in ["attention_decode_f32", "attention_decode_bf16", "attention_decode_f16", "attention_decode_i8"] {
            // Blocks with one key, with none, with as many as they take at a time, with more; and lengths that grow beyond that.
            for (lengths, splits) in [([0, 1], 3), ([31, 299], 5), ([128, 63], 2), ([96, 5], 1), ([70, 40], 40)] {
                let name = format!("{text}, keys {lengths:?} in {splits}");
                all.push(Check::new(kernel, name, FLOAT, move |lab| decode(lab, kernel, &shape, &lengths, splits)));
            }
        }
    }
    for kernel in ["kv_append_f32", "kv_append_bf16", "kv_append_f16", "kv_append_i8"] {
        all.push(Check::new(kernel, "sequences", EXACT, move |lab| append(lab, kernel)));
    }
    for kernel in ["attention_decode_f32", "attention_decode_bf16", "attention_decode_f16", "attention_decode_i8"] {
        all.push(Check::new(kernel, "what is kept", EXACT, move |lab| keep(lab, kernel)));
    }
    all
}

/// Keys or values on the device as `kernel` reads them, and what they then are.
struct Stored {
    values: Buffer,
    /// int8: a scale a head.
    scales: Option<Buffer>,
    floats: Vec<f32>,
}

impl Stored {
    fn new(lab: &Lab, values: &[f32], kernel: &str, head_dim: usize) -> Result<Self> {
        let halves = |bits: Vec<u16>, widen: fn(u16) -> f32| -> Result<Self> {
            Ok(Self { values: lab.put(&bits)?, scales: None, floats: bits.into_iter().map(widen).collect() })
        };
        if kernel.ends_with("bf16") {
            return halves(values.iter().map(|x| bf16::from_f32(*x).to_bits()).collect(), |bits| bf16::from_bits(bits).to_f32());
        }
        if kernel.ends_with("f16") {
            return halves(to_f16(values).map(f16::to_bits).collect(), |bits| f16::from_bits(bits).to_f32());
        }
        if kernel.ends_with("i8") {
            let mut codes = vec![0; values.len()];
            let heads = values.chunks_exact(head_dim).zip(codes.chunks_exact_mut(head_dim));
            let scales: Vec<f32> = heads.map(|(values, codes)| round_span(values, codes)).collect();
            let floats = codes.iter().enumerate().map(|(i, code)| f32::from(*code) * scales[i / head_dim]).collect();
            return Ok(Self { values: lab.put(&codes)?, scales: Some(lab.put(&scales)?), floats });
        }
        Ok(Self { values: lab.put(values)?, scales: None, floats: values.to_vec() })
    }

    /// What is there now.
    fn read(&self, kernel: &str, head_dim: usize) -> Result<Vec<f32>> {
        let count = self.floats.len();
        match &self.scales {
            Some(scales) => {
                let scales = scales.download::<f32>(count / head_dim)?;
                let codes = self.values.download::<i8>(count)?;
                Ok(codes.iter().enumerate().map(|(i, code)| f32::from(*code) * scales[i / head_dim]).collect())
            }
            None if kernel.ends_with("bf16") => {
                Ok(self.values.download::<u16>(count)?.iter().map(|bits| bf16::from_bits(*bits).to_f32()).collect())
            }
            None if kernel.ends_with("f16") => {
                Ok(self.values.download::<u16>(count)?.iter().map(|bits| f16::from_bits(*bits).to_f32()).collect())
            }
            None => self.values.download(count),
        }
    }
}

/// Keys and values where kernels expect them.
fn places(arguments: Arguments, keys: &Stored, values: &Stored) -> Arguments {
    arguments.with(&keys.values).with(&values.values).with(keys.scales.as_ref()).with(values.scales.as_ref())
}

/// One query over the rows `seen` of keys and values, all heads, in f64.
fn attend(q: &[f32], keys: &[f32], values: &[f32], seen: &[usize], shape: &AttentionShape) -> Vec<f64> {
    let (d, width) = (shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut out = Vec::with_capacity(q.len());
    for (head, q) in q.chunks_exact(d).enumerate() {
        let offset = head / (shape.heads / shape.kv_heads) * d;
        let dot = |row: &usize| q.iter().zip(&keys[row * width + offset..]).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum::<f64>();
        let scores: Vec<f64> = seen.iter().map(|row| dot(row) / (d as f64).sqrt()).collect();
        let max = scores.iter().fold(f64::NEG_INFINITY, |max, x| max.max(*x));
        let weights: Vec<f64> = scores.iter().map(|x| (x - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        out.extend(
            (0..d).map(|c| seen.iter().zip(&weights).map(|(row, w)| w / total * f64::from(values[row * width + offset + c])).sum::<f64>()),
        );
    }
    out
}

/// Sequences of these lengths, each seeing those of its `chain`, of which it is the last.
fn prefill(lab: &Lab, kernel: &str, shape: &AttentionShape, lengths: &[usize], chains: &[&[usize]]) -> Result<f64> {
    let (tokens, q_width, width) = (lengths.iter().sum::<usize>(), shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let starts: Vec<usize> = lengths.iter().scan(0, |start, length| Some(std::mem::replace(start, *start + length))).collect();
    let q = lab.normal(60, tokens * q_width);
    let keys = Stored::new(lab, &lab.normal(61, tokens * width), kernel, shape.head_dim)?;
    let values = Stored::new(lab, &lab.normal(62, tokens * width), kernel, shape.head_dim)?;
    let (mut queries, mut segments, mut expected) = (Vec::new(), Vec::new(), Vec::new());
    for (index, chain) in chains.iter().enumerate() {
        let range = |index: &usize| starts[*index]..starts[*index] + lengths[*index];
        let first = segments.len() as i32;
        segments.extend(chain.iter().map(|index| [range(index).start as i32, range(index).end as i32]));
        queries.push([range(&index).start as i32, range(&index).end as i32, first, segments.len() as i32]);
        let rows: Vec<usize> = chain.iter().flat_map(range).collect();
        for t in range(&index) {
            let visible = rows.len() - (range(&index).end - 1 - t);
            expected.extend(attend(&q[t * q_width..(t + 1) * q_width], &keys.floats, &values.floats, &rows[..visible], shape));
        }
    }
    let (input, own, ranges) = (lab.put(&q)?, lab.put(queries.as_flattened())?, lab.put(segments.as_flattened())?);
    let out = lab.poisoned::<f32>(tokens * q_width)?;
    let arguments = places(Arguments::default().with(&input), &keys, &values).with(&own).with(&ranges);
    let arguments = arguments.with(shape.heads).with(shape.kv_heads).with(shape.head_dim).with(&out);
    let longest = lengths.iter().max().copied().unwrap_or(0);
    lab.launch(kernel, [longest.div_ceil(64), shape.heads, lengths.len()], 128, 65536, arguments)?;
    Ok(difference(&out.download::<f32>(tokens * q_width)?, &expected))
}

/// A cache and what a step needs besides.
struct Steps<'a> {
    lab: &'a Lab,
    kernel: &'static str,
    shape: AttentionShape,
    capacity: usize,
    splits: usize,
    keys: Stored,
    values: Stored,
    /// Of each slot's heads.
    lengths: Buffer,
    tickets: Buffer,
}

impl<'a> Steps<'a> {
    fn new(lab: &'a Lab, kernel: &'static str, shape: AttentionShape, lengths: &[usize], capacity: usize, splits: usize) -> Result<Self> {
        let size = lengths.len() * capacity * shape.kv_heads * shape.head_dim;
        let heads: Vec<i32> = lengths.iter().flat_map(|length| vec![*length as i32; shape.kv_heads]).collect();
        let keys = Stored::new(lab, &lab.normal(64, size), kernel, shape.head_dim)?;
        let values = Stored::new(lab, &lab.normal(65, size), kernel, shape.head_dim)?;
        let tickets = lab.put(&vec![0; heads.len()])?;
        Ok(Self { lab, kernel, shape, capacity, splits, keys, values, lengths: lab.put(&heads)?, tickets })
    }

    /// A step of every slot.
    fn run(&self, q: &[f32], k: &[f32], v: &[f32]) -> Result<Vec<f32>> {
        let AttentionShape { heads, kv_heads, head_dim } = self.shape;
        let (count, ratio) = (q.len() / (heads * head_dim), heads / kv_heads);
        let (query, key, value) = (self.lab.put(q)?, self.lab.put(k)?, self.lab.put(v)?);
        let partial = self.lab.poisoned::<f32>(count * heads * self.splits * (head_dim + 4))?;
        let out = self.lab.poisoned::<f32>(q.len())?;
        let arguments = places(Arguments::default().with(&query).with(&key).with(&value), &self.keys, &self.values);
        let arguments = arguments.with(&self.lengths).with(self.capacity).with(ratio).with(head_dim);
        let arguments = arguments.with((head_dim as f32).sqrt().recip()).with(&partial).with(&self.tickets).with(&out);
        self.lab.launch(self.kernel, [kv_heads, self.splits, count], 32 * ratio.max(8), 0, arguments)?;
        out.download(q.len())
    }

    /// Keeps `k` and `v` of each slot behind `lengths`.
    fn expect(&mut self, k: &[f32], v: &[f32], lengths: &[usize]) -> Result<()> {
        let width = self.shape.kv_heads * self.shape.head_dim;
        for (stored, new) in [(&mut self.keys, k), (&mut self.values, v)] {
            let kept = Stored::new(self.lab, new, self.kernel, self.shape.head_dim)?.floats;
            for ((slot, length), kept) in lengths.iter().enumerate().zip(kept.chunks_exact(width)) {
                let to = (slot * self.capacity + length) * width;
                stored.floats[to..to + width].copy_from_slice(kept);
            }
        }
        Ok(())
    }

    /// How much of cache and lengths is not as expected.
    fn wrong(&self, lengths: &[usize]) -> Result<f64> {
        let d = self.shape.head_dim;
        let expected: Vec<i32> = lengths.iter().flat_map(|length| vec![*length as i32; self.shape.kv_heads]).collect();
        let rows = mismatches(&self.keys.read(self.kernel, d)?, &self.keys.floats)
            + mismatches(&self.values.read(self.kernel, d)?, &self.values.floats);
        Ok(rows + mismatches(&self.lengths.download::<i32>(expected.len())?, &expected))
    }
}

/// Three steps behind so many keys: results, and what is then kept.
fn decode(lab: &Lab, kernel: &'static str, shape: &AttentionShape, lengths: &[usize], splits: usize) -> Result<f64> {
    let (q_width, width, count) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, lengths.len());
    let mut steps = Steps::new(lab, kernel, *shape, lengths, 320, splits)?;
    let (mut lengths, mut error) = (lengths.to_vec(), 0.0);
    for step in 0..3 {
        let (q, k, v) =
            (lab.normal(80 + step, count * q_width), lab.normal(90 + step, count * width), lab.normal(100 + step, count * width));
        let found = steps.run(&q, &k, &v)?;
        steps.expect(&k, &v, &lengths)?;
        for length in &mut lengths {
            *length += 1;
        }
        let mut expected = Vec::new();
        for (slot, (length, q)) in lengths.iter().zip(q.chunks_exact(q_width)).enumerate() {
            let seen: Vec<usize> = (slot * 320..slot * 320 + length).collect();
            expected.extend(attend(q, &steps.keys.floats, &steps.values.floats, &seen, shape));
        }
        error = worse(worse(error, difference(&found, &expected)), steps.wrong(&lengths)?);
    }
    Ok(error)
}

/// What a step keeps of keys that are beyond f16 and of a head of zeros.
fn keep(lab: &Lab, kernel: &'static str) -> Result<f64> {
    let (shape, lengths) = (shape(3, 3, 16), [4, 0, 7]);
    let width = shape.kv_heads * shape.head_dim;
    let mut steps = Steps::new(lab, kernel, shape, &lengths, 10, 2)?;
    let (mut k, v) = (lab.normal(66, 3 * width), lab.normal(67, 3 * width));
    k[0] = 1e6;
    k[width..width + shape.head_dim].fill(0.0);
    steps.run(&vec![0.0; 3 * width], &k, &v)?;
    steps.expect(&k, &v, &lengths)?;
    steps.wrong(&[5, 1, 8])
}

/// Appends to caches that hold something, then moves the lengths on.
fn append(lab: &Lab, kernel: &str) -> Result<f64> {
    let (heads, head_dim, capacity, slots) = (3, 16, 10, 3);
    let width = heads * head_dim;
    let before = [4, 0, 7].map(|length| [length; 3]);
    // Slots 2 and 0 get three and two tokens.
    let table = [[0, 3, 2, 0], [3, 5, 0, 0]];
    let (mut k, v) = (lab.normal(66, 5 * width), lab.normal(67, 5 * width));
    // One beyond f16, and a head of zeros.
    k[0] = 1e6;
    k[width..width + head_dim].fill(0.0);
    let (new_keys, new_values, lengths) = (lab.put(&k)?, lab.put(&v)?, lab.put(before.as_flattened())?);
    let sequences = lab.put(table.as_flattened())?;
    let size = slots * capacity * width;
    let keys = Stored::new(lab, &lab.normal(68, size), kernel, head_dim)?;
    let values = Stored::new(lab, &lab.normal(69, size), kernel, head_dim)?;
    let arguments = Arguments::default().with(&new_keys).with(&new_values).with(heads).with(head_dim).with(&sequences);
    lab.launch(kernel, [3, 2, 1], 256, 0, places(arguments.with(&lengths).with(capacity), &keys, &values))?;
    lab.launch("advance", [1, 1, 1], 256, 0, Arguments::default().with(&lengths).with(&sequences).with(2_usize).with(heads))?;
    let rows = [(2, 7), (2, 8), (2, 9), (0, 4), (0, 5)];
    let (k, v) = (Stored::new(lab, &k, kernel, head_dim)?.floats, Stored::new(lab, &v, kernel, head_dim)?.floats);
    let (mut expected_keys, mut expected_values) = (keys.floats.clone(), values.floats.clone());
    for (token, (slot, position)) in rows.iter().enumerate() {
        let to = (slot * capacity + position) * width;
        let from = token * width..(token + 1) * width;
        expected_keys[to..to + width].copy_from_slice(&k[from.clone()]);
        expected_values[to..to + width].copy_from_slice(&v[from]);
    }
    let after = [6, 0, 10].map(|length| [length; 3]);
    Ok(mismatches(&keys.read(kernel, head_dim)?, &expected_keys)
        + mismatches(&values.read(kernel, head_dim)?, &expected_values)
        + mismatches(&lengths.download::<i32>(3 * slots)?, after.as_flattened()))
}
