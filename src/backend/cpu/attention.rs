//! Causal grouped-query attention on the CPU.

use multiversion::multiversion;
use rayon::prelude::*;

use super::math;
use crate::backend::{AttentionShape, Sequences};

/// Keys and values of some sequences, `[tokens, kv_heads·head_dim]` each.
pub struct KvCache {
    sequences: Vec<(Vec<f32>, Vec<f32>)>,
}

impl KvCache {
    pub fn new(sequences: usize) -> Self {
        Self { sequences: vec![(Vec::new(), Vec::new()); sequences] }
    }
}

/// See [`crate::backend::Backend::attention`].
pub fn attend(q: &[f32], k: &[f32], v: &[f32], shape: &AttentionShape, sequences: &Sequences, cache: Option<&mut KvCache>) -> Vec<f32> {
    let (q_width, kv_width) = (shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim);
    let mut out = vec![0.0; sequences.tokens() * q_width];
    let mut cached = cache.map(|cache| cache.sequences.iter_mut());
    let mut rest = out.as_mut_slice();
    let mut work = Vec::new();
    for range in sequences.ranges() {
        let (new_k, new_v) = (&k[range.start * kv_width..range.end * kv_width], &v[range.start * kv_width..range.end * kv_width]);
        let (keys, values): (&[f32], &[f32]) = match cached.as_mut().and_then(Iterator::next) {
            Some((keys, values)) => {
                keys.extend_from_slice(new_k);
                values.extend_from_slice(new_v);
                (keys, values)
            }
            None => (new_k, new_v),
        };
        let before = keys.len() / kv_width - range.len();
        for (i, t) in range.enumerate() {
            let (own, after) = rest.split_at_mut(q_width);
            rest = after;
            work.push((&q[t * q_width..(t + 1) * q_width], keys, values, before + i + 1, own));
        }
    }
    work.into_par_iter().with_min_len(8).for_each(|(q, keys, values, visible, out)| attend_token(q, keys, values, visible, shape, out));
    out
}

/// One query token over the first `visible` keys, all heads.
#[multiversion(targets("x86_64+avx512f", "x86_64+avx2"))]
fn attend_token(q: &[f32], keys: &[f32], values: &[f32], visible: usize, shape: &AttentionShape, out: &mut [f32]) {
    let d = shape.head_dim;
    let kv_width = shape.kv_heads * d;
    let scale = 1.0 / (d as f32).sqrt();
    let mut scores = vec![0.0; visible];
    for (head, (q, out)) in q.chunks_exact(d).zip(out.chunks_exact_mut(d)).enumerate() {
        let offset = head / (shape.heads / shape.kv_heads) * d;
        let mut max = f32::NEG_INFINITY;
        for (score, key) in scores.iter_mut().zip(keys.chunks_exact(kv_width)) {
            *score = math::dot(q, &key[offset..offset + d]) * scale;
            max = max.max(*score);
        }
        for score in &mut scores {
            *score = math::exp(*score - max);
        }
        let total = math::sum(&scores, |score| score);
        for (score, value) in scores.iter().zip(values.chunks_exact(kv_width)) {
            let weight = score / total;
            for (out, value) in out.iter_mut().zip(&value[offset..offset + d]) {
                *out += weight * value;
            }
        }
    }
}
