//! Causal grouped-query attention on the CPU.

use std::ops::Range;

use multiversion::multiversion;
use rayon::prelude::*;

use super::kv_cache::KvCache;
use super::{math, operations};
use crate::backend::{AttentionShape, Sequences};

/// Keys and values that lie together, `[tokens, kv_heads·head_dim]` each.
#[derive(Clone, Copy)]
struct Segment<'a> {
    keys: &'a [f32],
    values: &'a [f32],
}

/// See [`crate::backend::Backend::attention`].
pub fn attend(q: &[f32], k: &[f32], v: &[f32], shape: &AttentionShape, sequences: &Sequences, cache: Option<&mut KvCache>) -> Vec<f32> {
    let (q_width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let ranges: Vec<Range<usize>> = sequences.ranges().collect();
    let own = |range: &Range<usize>| {
        let range = range.start * kv_width..range.end * kv_width;
        Segment { keys: &k[range.clone()], values: &v[range] }
    };
    // What each sequence sees: one segment from its cache, or one for each sequence that it goes on from and its own.
    let kept: Option<Vec<_>> = cache.map(|cache| {
        for (sequence, range) in ranges.iter().enumerate() {
            let new = own(range);
            cache.extend(sequence, new.keys, new.values);
        }
        let cache = &*cache;
        (0..ranges.len()).map(move |sequence| cache.sequence(sequence)).collect()
    });
    let seen: Vec<Vec<Segment<'_>>> = match &kept {
        Some(kept) => kept.iter().map(|(keys, values)| vec![Segment { keys, values }]).collect(),
        None => (0..ranges.len())
            .map(|index| {
                let chain = std::iter::successors(Some(index), |index| sequences.parent(*index));
                let mut segments: Vec<Segment<'_>> = chain.map(|index| own(&ranges[index])).collect();
                segments.reverse();
                segments
            })
            .collect(),
    };
    let mut visible = 0;
    let mut out = vec![0.0; sequences.tokens() * q_width];
    let mut rest = out.as_mut_slice();
    let mut work = Vec::with_capacity(sequences.tokens());
    for (range, segments) in ranges.iter().zip(&seen) {
        let before = segments.iter().map(|segment| segment.keys.len()).sum::<usize>() / kv_width - range.len();
        for (i, t) in range.clone().enumerate() {
            let (own, after) = rest.split_at_mut(q_width);
            rest = after;
            visible += before + i + 1;
            work.push((&q[t * q_width..(t + 1) * q_width], segments.as_slice(), before + i + 1, own));
        }
    }
    // Scores and the sum of values.
    operations::count_float(2 * visible * q_width);
    work.into_par_iter().with_min_len(8).for_each(|(q, segments, visible, out)| attend_token(q, segments, visible, shape, out));
    out
}

/// One query token over the first `visible` keys, all heads.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn attend_token(q: &[f32], segments: &[Segment<'_>], visible: usize, shape: &AttentionShape, out: &mut [f32]) {
    let d = shape.head_dim;
    let kv_width = shape.kv_heads * d;
    let scale = 1.0 / (d as f32).sqrt();
    let mut scores = vec![0.0; visible];
    for (head, (q, out)) in q.chunks_exact(d).zip(out.chunks_exact_mut(d)).enumerate() {
        let offset = head / (shape.heads / shape.kv_heads) * d;
        let mut max = f32::NEG_INFINITY;
        let mut rest = scores.as_mut_slice();
        for segment in segments {
            let (own, after) = rest.split_at_mut(rest.len().min(segment.keys.len() / kv_width));
            rest = after;
            for (score, key) in own.iter_mut().zip(segment.keys.chunks_exact(kv_width)) {
                *score = math::dot(q, &key[offset..offset + d]) * scale;
                max = max.max(*score);
            }
        }
        for score in &mut scores {
            *score = math::exp(*score - max);
        }
        let total = math::sum(&scores, |score| score);
        let mut rest = scores.as_slice();
        for segment in segments {
            let (own, after) = rest.split_at(rest.len().min(segment.keys.len() / kv_width));
            rest = after;
            for (score, value) in own.iter().zip(segment.values.chunks_exact(kv_width)) {
                let weight = score / total;
                for (out, value) in out.iter_mut().zip(&value[offset..offset + d]) {
                    *out += weight * value;
                }
            }
        }
    }
}
