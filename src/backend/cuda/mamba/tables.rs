//! What the kernels must know of a batch's sequences, on the device.

use std::sync::Arc;

use crate::backend::Sequences;
use crate::backend::cuda::device::Buffer;
use crate::backend::cuda::{Cuda, lock};
use crate::error::Result;

/// Tokens of a chunk of the scan.
const CHUNK: usize = 64;

/// The sequences of a batch, level by level.
pub struct Tables {
    sequences: Sequences,
    cached: bool,
    /// Sequences that depend on none of the same level, levels in order.
    pub(super) levels: Vec<Level>,
    /// Slots for what sequences continue from, where some do.
    pub(super) slots: usize,
}

pub(super) struct Level {
    pub count: usize,
    pub longest: usize,
    /// `[count, 4]`: first token, end token, slot in or −1, slot out or −1.
    pub sequences: Buffer,
    /// `[chunks, 2]`: first token, end token.
    pub chunks: Buffer,
    pub chunk_count: usize,
    /// `[count, 4]`: first chunk, end chunk, slot in or −1, slot out or −1.
    pub sequence_chunks: Buffer,
}

impl Cuda {
    /// The tables of `sequences`, which the layers of a forward pass share. `cached`: sequence i goes on from slot i.
    pub(super) fn tables(&self, sequences: &Sequences, cached: bool) -> Result<Arc<Tables>> {
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
