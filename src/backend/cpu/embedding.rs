//! Embedding tables on the CPU: rows looked up and, where quantized, expanded.

use super::float_matmul::FloatMatrix;
use crate::error::{Error, Result};
use crate::format::{LinearWeights, QuantizedMatrix, Scheme, WeightPart, packing};

/// A table `[vocabulary, hidden]`.
pub struct Embedding {
    rows: usize,
    cols: usize,
    table: Table,
}

enum Table {
    Float(FloatMatrix),
    Int8 { codes: Vec<i8>, scales: Vec<f32> },
    Grouped { words: Vec<u32>, scales: Vec<f32>, bits: u8, group: usize },
}

impl Embedding {
    pub fn new(mut weights: LinearWeights) -> Result<Self> {
        let (rows, cols) = (weights.rows(), weights.cols);
        let table = match (weights.parts.pop(), weights.parts.is_empty()) {
            (Some(WeightPart::Float(values)), true) => Table::Float(FloatMatrix::new(values, cols)?),
            (Some(WeightPart::Quantized(QuantizedMatrix { scheme, codes, scales, .. })), true) => match scheme {
                Scheme::Grouped { bits, group } => Table::Grouped { words: packing::pack(&codes, cols, bits), scales, bits, group },
                _ => Table::Int8 { codes, scales },
            },
            _ => return Err(Error::run("an embedding table must be stored in one part")),
        };
        Ok(Self { rows, cols, table })
    }

    /// Features of a row.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes in memory.
    pub fn bytes(&self) -> u64 {
        match &self.table {
            Table::Float(values) => values.bytes(),
            Table::Int8 { codes, scales } => (codes.len() + 4 * scales.len()) as u64,
            Table::Grouped { words, scales, .. } => (4 * words.len() + 4 * scales.len()) as u64,
        }
    }

    /// The rows `ids`, `[ids, cols]`.
    pub fn look_up(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let cols = self.cols;
        let mut out = Vec::with_capacity(ids.len() * cols);
        for id in ids {
            let row = *id as usize;
            if row >= self.rows {
                return Err(Error::input(format!("token id {id} is outside the vocabulary of {}", self.rows)));
            }
            match &self.table {
                Table::Float(values) => values.append_row(row, &mut out)?,
                Table::Int8 { codes, scales } => {
                    out.extend(codes[row * cols..(row + 1) * cols].iter().map(|code| f32::from(*code) * scales[row]));
                }
                Table::Grouped { words, scales, bits, group } => {
                    let width = packing::words_in_row(cols, *bits);
                    let codes = packing::unpack(&words[row * width..(row + 1) * width], cols, *bits);
                    let scales = &scales[row * (cols / group)..];
                    out.extend(codes.iter().enumerate().map(|(c, code)| f32::from(*code) * scales[c / group]));
                }
            }
        }
        Ok(out)
    }
}
