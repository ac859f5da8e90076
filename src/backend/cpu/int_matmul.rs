//! temporary naive version
use crate::format::{QuantizedMatrix, Scheme};
#[derive(Debug, Clone, Copy)]
pub enum Isa {
    Portable,
}
impl Isa {
    pub fn best() -> Self {
        Self::Portable
    }
}
impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("portable")
    }
}
pub struct QuantizedRows {
    pub tokens: usize,
    pub cols: usize,
    codes: Vec<i8>,
    pub scales: Vec<f32>,
}
impl QuantizedRows {
    pub fn per_token(x: &[f32], tokens: usize, cols: usize) -> Self {
        let m = crate::format::round_to_nearest(x, tokens, cols, Scheme::Int8);
        Self { tokens, cols, codes: m.codes, scales: m.scales }
    }
    pub fn select(&self, t: &[usize]) -> Self {
        Self {
            tokens: t.len(),
            cols: self.cols,
            codes: t.iter().flat_map(|t| self.codes[t * self.cols..(t + 1) * self.cols].to_vec()).collect(),
            scales: t.iter().map(|t| self.scales[*t]).collect(),
        }
    }
}
pub struct PackedMatrix(QuantizedMatrix);
impl PackedMatrix {
    pub fn new(m: &QuantizedMatrix) -> Self {
        Self(m.clone())
    }
    pub fn rows(&self) -> usize {
        self.0.rows
    }
    pub fn bytes(&self) -> u64 {
        self.0.stored_bytes()
    }
    pub fn dequantize_into(&self, out: &mut [f32]) {
        out.copy_from_slice(&self.0.dequantize());
    }
}
pub fn matmul(w: &PackedMatrix, x: &QuantizedRows, out: &mut [f32], stride: usize, offset: usize) {
    let m = &w.0;
    let g = m.group();
    let k = m.cols;
    for t in 0..x.tokens {
        for r in 0..m.rows {
            let (c, a) = (&m.codes[r * k..(r + 1) * k], &x.codes[t * k..(t + 1) * k]);
            let dot = |s: usize| -> i32 { c[s..s + g].iter().zip(&a[s..s + g]).map(|(c, a)| i32::from(*c) * i32::from(*a)).sum() };
            out[t * stride + offset + r] = if matches!(m.scheme, Scheme::Int8) {
                dot(0) as f32 * (x.scales[t] * m.scales[r])
            } else {
                let mut acc = 0.0f32;
                for i in 0..k / g {
                    let p = dot(i * g) as f32 * m.scales[r * (k / g) + i];
                    acc += p;
                }
                acc * x.scales[t]
            };
        }
    }
}
