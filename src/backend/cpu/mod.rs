//! The CPU backend: candle tensors and its matrix products for floats, integer kernels of our own for int8 and int4.
//! Work runs on the rayon pool that the caller is in; results do not depend on its number of threads.

mod attention;
mod embedding;
mod float_matmul;
pub mod hadamard;
pub mod int_matmul;
mod kv_cache;
mod mamba;
mod math;
pub(in crate::backend) mod norm;
pub mod operations;
mod router;
pub(in crate::backend) mod stored;
pub(in crate::backend) mod turn;

use std::borrow::Cow;

use candle_core::{CpuStorage, Device, Storage, Tensor};
use faer::{MatMut, MatRef};

pub use self::float_matmul::EXPANDED;
use self::float_matmul::FloatMatrix;
use self::int_matmul::{Isa, PackedMatrix, QuantizedRows};
use super::{Assignment, AttentionShape, Backend, Divergence, Emit, MambaParameters, MambaShape, RouterShape, Sequences, Side};
use crate::error::{Error, Result};
use crate::format::{CacheFormats, LinearWeights, WeightPart};

/// Tokens whose outer products are summed in f32.
const GRAM_TOKENS: usize = 256;

/// The machine's processor.
#[derive(Clone, Copy)]
pub struct Cpu;

/// Weights of a linear, in parts along the output.
pub struct CpuLinear {
    rows: usize,
    parts: Vec<Part>,
    bias: Option<Vec<f32>>,
    int8_activations: bool,
    input_scale: Option<f32>,
    hadamard: Option<usize>,
}

enum Part {
    Float(FloatMatrix),
    Packed(PackedMatrix),
}

impl Part {
    fn rows(&self) -> usize {
        match self {
            Self::Float(weights) => weights.rows(),
            Self::Packed(matrix) => matrix.rows(),
        }
    }
}

/// What a linear reads.
pub struct CpuActivation {
    float: Option<Tensor>,
    int8: Option<QuantizedRows>,
}

/// Runs `f` on the values of a contiguous f32 tensor.
fn with_values<R>(tensor: &Tensor, f: impl FnOnce(&[f32]) -> R) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match (&*storage, layout.contiguous_offsets()) {
        (Storage::Cpu(CpuStorage::F32(values)), Some((start, end))) => Ok(f(&values[start..end])),
        _ => Err(Error::run("a tensor of the CPU backend is not contiguous f32")),
    }
}

fn tensor(values: Vec<f32>, cols: usize) -> Result<Tensor> {
    let rows = values.len() / cols;
    Ok(Tensor::from_vec(values, (rows, cols), &Device::Cpu)?)
}

fn width(tensor: &Tensor) -> usize {
    tensor.dims()[1]
}

fn missing(form: &str) -> Error {
    Error::run(format!("a linear reads {form} activations that its input does not carry"))
}

impl Cpu {
    fn activation(mut values: Vec<f32>, cols: usize, emit: Emit) -> Result<CpuActivation> {
        if let Some(block) = emit.hadamard {
            hadamard::transform_rows(&mut values, cols, block);
        }
        let int8 = emit.int8.then(|| QuantizedRows::round(&values, values.len() / cols, cols, emit.scale));
        let float = if emit.float { Some(tensor(values, cols)?) } else { None };
        Ok(CpuActivation { float, int8 })
    }
}

impl Backend for Cpu {
    type Tensor = Tensor;
    type Linear = CpuLinear;
    type Experts = std::convert::Infallible;
    type Embedding = embedding::Embedding;
    type Vector = Vec<f32>;
    type Recording = std::convert::Infallible;
    type Activation = CpuActivation;
    type Mamba = mamba::Parameters;
    type SsmCache = mamba::SsmCache;
    type Projection = mamba::Projection;
    type Gram = Vec<f64>;
    type KvCache = kv_cache::KvCache;

    fn name(&self) -> String {
        format!("cpu {}", Isa::best())
    }

    fn upload(&self, values: Vec<f32>, cols: usize) -> Result<Tensor> {
        tensor(values, cols)
    }

    fn download(&self, tensor: &Tensor) -> Result<Vec<f32>> {
        with_values(tensor, <[f32]>::to_vec)
    }

    fn floats(&self, activation: &CpuActivation) -> Result<Vec<f32>> {
        self.download(activation.float.as_ref().ok_or_else(|| missing("float"))?)
    }

    fn rows(&self, tensor: &Tensor) -> usize {
        tensor.dims()[0]
    }

    fn features(&self, tensor: &Tensor) -> usize {
        width(tensor)
    }

    fn prepare_vector(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn prepare(&self, weights: LinearWeights) -> Result<CpuLinear> {
        let (rows, cols) = (weights.rows(), weights.cols);
        let parts = weights
            .parts
            .into_iter()
            .map(|part| match part {
                WeightPart::Float(values) => Ok(Part::Float(FloatMatrix::new(values, cols)?)),
                WeightPart::Quantized(matrix) => Ok(Part::Packed(PackedMatrix::new(&matrix))),
            })
            .collect::<Result<_>>()?;
        let LinearWeights { bias, int8_activations, input_scale, hadamard, .. } = weights;
        Ok(CpuLinear { rows, parts, bias, int8_activations, input_scale, hadamard })
    }

    fn resident_bytes(&self, linear: &CpuLinear) -> u64 {
        let weights = |part: &Part| match part {
            Part::Float(weights) => weights.bytes(),
            Part::Packed(matrix) => matrix.bytes(),
        };
        linear.parts.iter().map(weights).sum::<u64>() + linear.bias.as_ref().map_or(0, |bias| 4 * bias.len() as u64)
    }

    fn reads(&self, linear: &CpuLinear) -> Emit {
        let emit = linear.parts.iter().fold(Emit::NONE, |emit, part| match part {
            Part::Packed(_) if linear.int8_activations => emit.and(Emit::INT8),
            _ => emit.and(Emit::FLOAT),
        });
        Emit { scale: linear.input_scale.filter(|_| emit.int8), hadamard: linear.hadamard, ..emit }
    }

    fn prepare_embedding(&self, table: LinearWeights) -> Result<embedding::Embedding> {
        embedding::Embedding::new(table)
    }

    fn embedding_bytes(&self, table: &embedding::Embedding) -> u64 {
        table.bytes()
    }

    fn embed(&self, table: &embedding::Embedding, ids: &[u32]) -> Result<Tensor> {
        tensor(table.look_up(ids)?, table.cols())
    }

    fn linear(&self, linear: &CpuLinear, x: &CpuActivation) -> Result<Tensor> {
        let floats = || x.float.as_ref().ok_or_else(|| missing("float"));
        match (linear.parts.as_slice(), &linear.bias) {
            ([Part::Float(weights)], None) => return weights.product(floats()?),
            ([Part::Packed(matrix)], None) if !linear.int8_activations => return float_matmul::packed_product(matrix, floats()?),
            _ => {}
        }
        let tokens = match (&x.float, &x.int8) {
            (_, Some(codes)) => codes.tokens,
            (Some(float), None) => float.dims()[0],
            (None, None) => return Err(missing("some")),
        };
        let rows = linear.rows;
        let mut out = vec![0.0; tokens * rows];
        let mut offset = 0;
        for part in &linear.parts {
            let width = part.rows();
            let product = match part {
                Part::Float(weights) => weights.product(floats()?)?,
                Part::Packed(matrix) if linear.int8_activations => {
                    let codes = x.int8.as_ref().ok_or_else(|| missing("int8"))?;
                    int_matmul::matmul(matrix, codes, &mut out, rows, offset);
                    offset += width;
                    continue;
                }
                Part::Packed(matrix) => float_matmul::packed_product(matrix, floats()?)?,
            };
            with_values(&product, |values| {
                for (out, row) in out.chunks_exact_mut(rows).zip(values.chunks_exact(width)) {
                    out[offset..offset + width].copy_from_slice(row);
                }
            })?;
            offset += width;
        }
        if let Some(bias) = &linear.bias {
            for row in out.chunks_exact_mut(rows) {
                for (out, bias) in row.iter_mut().zip(bias) {
                    *out += bias;
                }
            }
        }
        tensor(out, rows)
    }

    fn emit(&self, x: Tensor, emit: Emit) -> Result<CpuActivation> {
        if emit.hadamard.is_some() {
            return Self::activation(self.download(&x)?, width(&x), emit);
        }
        let int8 = if emit.int8 {
            let (tokens, cols) = x.dims2()?;
            Some(with_values(&x, |values| QuantizedRows::round(values, tokens, cols, emit.scale))?)
        } else {
            None
        };
        Ok(CpuActivation { float: emit.float.then_some(x), int8 })
    }

    fn group_norm(&self, x: &Tensor, weight: &Vec<f32>, group: usize, eps: f32, emit: Emit) -> Result<CpuActivation> {
        Self::activation(with_values(x, |x| norm::rms(x, weight, group, eps))?, weight.len(), emit)
    }

    fn relu2(&self, x: &Tensor, emit: Emit) -> Result<CpuActivation> {
        Self::activation(with_values(x, norm::relu2)?, width(x), emit)
    }

    fn add(&self, a: Tensor, b: &Tensor) -> Result<Tensor> {
        let sum = with_values(&a, |a| with_values(b, |b| norm::add(a, b)))??;
        tensor(sum, width(b))
    }

    fn prepare_mamba(&self, parameters: MambaParameters) -> Result<mamba::Parameters> {
        Ok(mamba::Parameters::new(parameters))
    }

    fn ssm_cache(&self, parameters: &mamba::Parameters, shape: &MambaShape, sequences: usize, formats: CacheFormats) -> mamba::SsmCache {
        mamba::SsmCache::new(parameters, shape, sequences, formats)
    }

    fn ssm_cache_bytes(&self, cache: &mamba::SsmCache) -> u64 {
        cache.bytes()
    }

    fn project(
        &self,
        in_proj: &CpuLinear,
        x: &CpuActivation,
        parameters: &mamba::Parameters,
        shape: &MambaShape,
    ) -> Result<mamba::Projection> {
        mamba::Projection::new(self.linear(in_proj, x)?, parameters, shape)
    }

    fn mamba_scan(
        &self,
        projection: &mamba::Projection,
        parameters: &mamba::Parameters,
        shape: &MambaShape,
        sequences: &Sequences,
        cache: Option<&mut mamba::SsmCache>,
    ) -> Result<Tensor> {
        let y = projection.with(|projection| mamba::scan(projection, parameters, shape, sequences, cache))?;
        tensor(y, shape.inner())
    }

    fn kv_cache(&self, shape: &AttentionShape, sequences: usize, formats: CacheFormats) -> kv_cache::KvCache {
        kv_cache::KvCache::new(shape.head_dim, sequences, formats.kv)
    }

    fn kv_cache_bytes(&self, cache: &kv_cache::KvCache) -> u64 {
        cache.bytes()
    }

    fn attention(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        shape: &AttentionShape,
        sequences: &Sequences,
        cache: Option<&mut kv_cache::KvCache>,
    ) -> Result<Tensor> {
        let out = with_values(q, |q| with_values(k, |k| with_values(v, |v| attention::attend(q, k, v, shape, sequences, cache))))???;
        tensor(out, shape.heads * shape.head_dim)
    }

    fn prepare_experts(&self, _experts: &[[&Self::Linear; 2]]) -> Result<Option<Self::Experts>> {
        Ok(None)
    }

    fn mixture(
        &self,
        experts: &Self::Experts,
        _x: &CpuActivation,
        _raw: &Tensor,
        _correction: &Vec<f32>,
        _shape: &RouterShape,
    ) -> Result<Tensor> {
        match *experts {}
    }

    fn route(&self, raw: &Tensor, correction: &Vec<f32>, shape: &RouterShape) -> Result<Vec<Assignment>> {
        with_values(raw, |raw| router::assign(raw, correction, shape))
    }

    fn gather(&self, x: &CpuActivation, tokens: &[usize]) -> Result<CpuActivation> {
        let float = x.float.as_ref().map(|float| self.gather_rows(float, tokens)).transpose()?;
        Ok(CpuActivation { float, int8: x.int8.as_ref().map(|codes| codes.select(tokens)) })
    }

    fn gather_rows(&self, x: &Tensor, tokens: &[usize]) -> Result<Tensor> {
        let cols = width(x);
        let rows = with_values(x, |x| tokens.iter().flat_map(|t| &x[t * cols..(t + 1) * cols]).copied().collect())?;
        tensor(rows, cols)
    }

    fn scatter_add(&self, into: Tensor, x: &Tensor, tokens: &[usize], weights: &[f32]) -> Result<Tensor> {
        let cols = width(&into);
        let mut sum = self.download(&into)?;
        with_values(x, |x| {
            for ((row, token), weight) in x.chunks_exact(cols).zip(tokens).zip(weights) {
                for (sum, x) in sum[token * cols..(token + 1) * cols].iter_mut().zip(row) {
                    *sum += weight * x;
                }
            }
        })?;
        tensor(sum, cols)
    }

    fn record(&self, _step: &mut dyn FnMut() -> Result<Tensor>) -> Result<Option<(Self::Recording, Tensor)>> {
        Ok(None)
    }

    fn replay(&self, recording: &mut Self::Recording, _ids: &[u32]) -> Result<Option<Tensor>> {
        match *recording {}
    }

    fn copy_seconds(&self, bytes: usize) -> Result<f64> {
        use rayon::prelude::*;
        const PIECE: usize = 1 << 22;
        let (from, mut to) = (vec![1_u8; bytes], vec![0_u8; bytes]);
        self.time(3, &mut || {
            to.par_chunks_mut(PIECE).zip(from.par_chunks(PIECE)).for_each(|(to, from)| to.copy_from_slice(from));
            std::hint::black_box(&to);
            Ok(())
        })
    }

    fn peak_bytes(&self) -> Option<u64> {
        None
    }

    fn reset_peak(&self) -> Result<()> {
        Ok(())
    }

    fn add_gram(&self, total: &mut Option<Vec<f64>>, x: &CpuActivation) -> Result<()> {
        let x = x.float.as_ref().ok_or_else(|| missing("float"))?;
        let cols = width(x);
        // Products of a few tokens in f32, added up in f64: neither the number of tokens nor of threads matters.
        let mut sum = vec![0.0; cols * cols];
        for start in (0..x.dims()[0]).step_by(GRAM_TOKENS) {
            let part = x.narrow(0, start, GRAM_TOKENS.min(x.dims()[0] - start))?;
            let product = part.t()?.contiguous()?.matmul(&part.contiguous()?)?;
            with_values(&product, |values| sum.iter_mut().zip(values).for_each(|(sum, value)| *sum += f64::from(*value)))?;
        }
        match total {
            Some(total) => total.iter_mut().zip(sum).for_each(|(total, value)| *total += value),
            None => *total = Some(sum),
        }
        Ok(())
    }

    fn gram_values<'a>(&self, sum: &'a Vec<f64>) -> Result<Cow<'a, [f64]>> {
        Ok(Cow::Borrowed(sum))
    }

    fn gram_diagonal(&self, sum: &Vec<f64>) -> Result<Vec<f64>> {
        Ok(sum.iter().copied().step_by(sum.len().isqrt() + 1).collect())
    }

    fn turn(&self, weights: MatMut<'_, f64>, rotation: MatRef<'_, f64>, side: Side) -> Result<()> {
        turn::turn(weights, rotation, side);
        Ok(())
    }

    fn largest_magnitudes(&self, x: &CpuActivation) -> Result<Vec<f32>> {
        let x = x.float.as_ref().ok_or_else(|| missing("float"))?;
        // Magnitudes compare like their bits, NaN above all.
        let mut largest = vec![0; width(x)];
        with_values(x, |values| {
            for row in values.chunks_exact(largest.len()) {
                largest.iter_mut().zip(row).for_each(|(largest, x)| *largest = x.abs().to_bits().max(*largest));
            }
        })?;
        Ok(largest.into_iter().map(f32::from_bits).collect())
    }

    fn add_difference(&self, a: &Tensor, b: &Tensor, sums: &mut (f64, f64)) -> Result<()> {
        with_values(a, |a| {
            with_values(b, |b| {
                for (a, b) in a.iter().zip(b) {
                    sums.0 += f64::from(a - b).powi(2);
                    sums.1 += f64::from(*a).powi(2);
                }
            })
        })?
    }

    fn undecidedness(&self, logits: &Tensor) -> Result<Vec<f64>> {
        let width = width(logits);
        with_values(logits, |logits| logits.chunks_exact(width).map(norm::undecidedness).collect())
    }

    fn log_probabilities(&self, logits: &Tensor, targets: &[(usize, u32)]) -> Result<Vec<(f64, bool)>> {
        let width = width(logits);
        with_values(logits, |logits| norm::log_probabilities(logits, width, targets))
    }

    fn argmax(&self, logits: &Tensor) -> Result<Vec<u32>> {
        let width = width(logits);
        with_values(logits, |logits| logits.chunks_exact(width).map(|row| norm::argmax(row) as u32).collect())
    }

    fn divergence(&self, reference: &Tensor, logits: &Tensor) -> Result<Vec<Divergence>> {
        let width = width(logits);
        with_values(reference, |reference| with_values(logits, |logits| norm::divergence(reference, logits, width)))?
    }
}
