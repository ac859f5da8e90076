//! Linears and embedding tables: weights laid out for the kernels, and which kernel multiplies them.

use half::bf16;
use rayon::prelude::*;

use super::device::{Arguments, Buffer, Element, Gemm};
use super::experts::Selection;
use super::tensor::{Codes, Front};
use super::wgmma::{self, Operands};
use super::{Cuda, CudaActivation, CudaTensor, missing, padded, stream};
use crate::backend::Emit;
use crate::error::{Error, Result};
use crate::format::{LinearWeights, QuantizedMatrix, Scheme, WeightPart};

/// Tokens that matrix-vector kernels take; more go through matrix products.
pub(super) const FEW: usize = 16;
/// The same for bf16 weights: their matrix-vector kernel multiplies f32 activations, at three times the arithmetic.
const FEW_BF16: usize = 4;

/// Linears of fewer outputs always take the matrix-vector kernels, which read f32 activations exactly: routers choose
/// experts by small differences, and so little work gains nothing from a matrix product.
pub(super) const NARROW: usize = 512;

/// Outputs and tokens that a block of the matrix-vector kernels computes.
const FEW_OUTPUTS: usize = 16;
const FEW_TILE: usize = 8;
/// Tokens and outputs that a block of the matrix products computes.
const GEMM_TILE: usize = 128;
const GEMM_F32_TILE: usize = 64;
/// Shared memory of the matrix products: two stages of both tiles, and for int4 with int8 activations the scales.
const GEMM_SHARED: usize = 65536;
const GEMM_W4A8_SHARED: usize = 73728;

/// Inputs in a 16-byte chunk of int4 codes.
const CHUNK: usize = 32;

/// Weights of a linear on the device, in parts along the output.
pub struct CudaLinear {
    rows: usize,
    cols: usize,
    parts: Vec<Part>,
    bias: Option<Buffer>,
    int8_activations: bool,
    input_scale: Option<f32>,
    hadamard: Option<usize>,
}

struct Part {
    rows: usize,
    weights: Weights,
}

enum Weights {
    F32(Buffer),
    Bf16(Buffer),
    Int8 { codes: Buffer, scales: Buffer },
    Int4 { codes: Buffer, scales: Buffer, group: usize },
}

/// Which kernels multiply.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Product {
    /// Matrix-vector kernels.
    Few,
    /// Matrix products in tiles of so many tokens and outputs.
    Many(usize),
}

impl Product {
    /// Tokens that a block computes.
    pub(super) fn height(self) -> usize {
        match self {
            Self::Few => FEW_TILE,
            Self::Many(tile) => tile,
        }
    }
}

impl Part {
    fn product(&self, tokens: usize) -> Product {
        let few = if matches!(self.weights, Weights::Bf16(_)) { FEW_BF16 } else { FEW };
        match self.weights {
            _ if tokens <= few || self.rows < NARROW => Product::Few,
            Weights::F32(_) => Product::Many(GEMM_F32_TILE),
            _ => Product::Many(GEMM_TILE),
        }
    }
}

impl Weights {
    fn is_like(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Int4 { group, .. }, Self::Int4 { group: other, .. }) => group == other,
            _ => std::mem::discriminant(self) == std::mem::discriminant(other),
        }
    }

    /// Addresses of the weights and of their scales, 0 where there are none.
    fn addresses(&self) -> [u64; 2] {
        match self {
            Self::F32(values) | Self::Bf16(values) => [values.address(), 0],
            Self::Int8 { codes, scales } | Self::Int4 { codes, scales, .. } => [codes.address(), scales.address()],
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Self::F32(values) | Self::Bf16(values) => values.bytes(),
            Self::Int8 { codes, scales } | Self::Int4 { codes, scales, .. } => codes.bytes() + scales.bytes(),
        }
    }

    fn is_quantized(&self) -> bool {
        matches!(self, Self::Int8 { .. } | Self::Int4 { .. })
    }
}

impl CudaLinear {
    pub(super) fn bytes(&self) -> u64 {
        let weights: usize = self.parts.iter().map(|part| part.weights.bytes()).sum();
        (weights + self.bias.as_ref().map_or(0, Buffer::bytes)) as u64
    }

    pub(super) fn outputs(&self) -> usize {
        self.rows
    }

    /// Whether both have the same shape and format, so that one launch can serve them.
    pub(super) fn is_like(&self, other: &Self) -> bool {
        let ([own], [others]) = (&*self.parts, &*other.parts) else { return false };
        (self.rows, self.cols, self.bias.is_some()) == (other.rows, other.cols, other.bias.is_some())
            && own.weights.is_like(&others.weights)
            && self.int8_activations == other.int8_activations
            && self.reads() == other.reads()
    }

    /// Addresses of weights, scales and bias, 0 where there are none; `None` for a linear of several parts.
    pub(super) fn addresses(&self) -> Option<[u64; 3]> {
        let [part] = &*self.parts else { return None };
        let [weights, scales] = part.weights.addresses();
        Some([weights, scales, self.bias.as_ref().map_or(0, Buffer::address)])
    }

    /// The kernels for experts like this one, to each of which `tokens` tokens fall on average.
    pub(super) fn product_of_experts(&self, tokens: usize) -> Product {
        self.parts[0].product(tokens)
    }

    pub(super) fn reads(&self) -> Emit {
        let emit = self.parts.iter().fold(Emit::NONE, |emit, part| {
            emit.and(if part.weights.is_quantized() && self.int8_activations { Emit::INT8 } else { Emit::FLOAT })
        });
        Emit { scale: self.input_scale.filter(|_| emit.int8), hadamard: self.hadamard, ..emit }
    }
}

/// A table `[vocabulary, hidden]` on the device.
pub struct CudaEmbedding {
    rows: usize,
    cols: usize,
    table: Weights,
}

impl CudaEmbedding {
    pub(super) fn bytes(&self) -> u64 {
        self.table.bytes() as u64
    }
}

/// Rows of `cols` elements padded with `filler` to whole lines.
fn pad_rows<T: Copy + Send + Sync>(values: &[T], cols: usize, filler: T) -> Vec<T> {
    let width = padded(cols);
    let mut out = vec![filler; values.len() / cols * width];
    out.par_chunks_mut(width).zip(values.par_chunks(cols)).for_each(|(out, row)| out[..cols].copy_from_slice(row));
    out
}

/// int4 codes in chunks of 32 inputs: byte b has input b in its low and input 16 + b in its high half, two's complement.
fn pack_int4(codes: &[i8], cols: usize) -> Vec<u8> {
    let width = padded(cols) / 2;
    let mut out = vec![0; codes.len() / cols * width];
    out.par_chunks_mut(width).zip(codes.par_chunks(cols)).for_each(|(out, row)| {
        for (chunk, codes) in out.chunks_exact_mut(CHUNK / 2).zip(row.chunks(CHUNK)) {
            for (i, code) in codes.iter().enumerate() {
                let half = (code.cast_unsigned() & 0x0f) << (i / 16 * 4);
                chunk[i % 16] |= half;
            }
        }
    });
    out
}

impl Cuda {
    pub(super) fn prepare_linear(&self, weights: LinearWeights) -> Result<CudaLinear> {
        let (rows, cols) = (weights.rows(), weights.cols);
        let LinearWeights { parts, bias, int8_activations, input_scale, hadamard, .. } = weights;
        let part = |part: WeightPart| Ok(Part { rows: part.rows(cols), weights: self.weights(part, cols)? });
        let parts = parts.into_iter().map(part).collect::<Result<_>>()?;
        let bias = bias.map(|bias| self.upload_values(&bias)).transpose()?;
        Ok(CudaLinear { rows, cols, parts, bias, int8_activations, input_scale, hadamard })
    }

    fn weights(&self, part: WeightPart, cols: usize) -> Result<Weights> {
        match part {
            // Checkpoints in bf16 arrive as f32: what bf16 holds exactly takes half the memory.
            WeightPart::Float(values) if values.par_iter().all(|value| bf16::from_f32(*value).to_f32().to_bits() == value.to_bits()) => {
                let bits: Vec<u16> = values.par_iter().map(|value| bf16::from_f32(*value).to_bits()).collect();
                Ok(Weights::Bf16(self.upload_values(&pad_rows(&bits, cols, 0))?))
            }
            WeightPart::Float(values) => Ok(Weights::F32(self.upload_values(&values)?)),
            WeightPart::Quantized(QuantizedMatrix { scheme, codes, scales, .. }) => match scheme {
                Scheme::Int8 => {
                    Ok(Weights::Int8 { codes: self.upload_values(&pad_rows(&codes, cols, 0))?, scales: self.upload_values(&scales)? })
                }
                Scheme::Grouped { group, .. } => {
                    let scales: Vec<u16> = scales.iter().map(|scale| bf16::from_f32(*scale).to_bits()).collect();
                    let (codes, scales) = (self.upload_values(&pack_int4(&codes, cols))?, self.upload_values(&scales)?);
                    Ok(Weights::Int4 { codes, scales, group })
                }
                Scheme::Float => Err(Error::run("a quantized matrix says that it is float")),
            },
        }
    }

    pub(super) fn prepare_table(&self, mut weights: LinearWeights) -> Result<CudaEmbedding> {
        let (rows, cols) = (weights.rows(), weights.cols);
        match (weights.parts.pop(), weights.parts.is_empty()) {
            (Some(part), true) => Ok(CudaEmbedding { rows, cols, table: self.weights(part, cols)? }),
            _ => Err(Error::run("an embedding table must be stored in one part")),
        }
    }

    pub(super) fn look_up(&self, embedding: &CudaEmbedding, ids: &[u32]) -> Result<CudaTensor> {
        if let Some(id) = ids.iter().find(|id| **id as usize >= embedding.rows) {
            return Err(Error::input(format!("token id {id} is outside the vocabulary of {}", embedding.rows)));
        }
        let out = self.tensor(ids.len(), embedding.cols)?;
        let ids = self.upload_ids(ids)?;
        let (kernel, arguments) = match &embedding.table {
            Weights::F32(table) => ("embed_f32", Arguments::default().with(table)),
            Weights::Bf16(table) => ("embed_bf16", Arguments::default().with(table)),
            Weights::Int8 { codes, scales } => ("embed_int8", Arguments::default().with(codes).with(scales)),
            Weights::Int4 { codes, scales, group } => ("embed_int4", Arguments::default().with(codes).with(scales).with(*group)),
        };
        self.launch(kernel, [out.rows, 1, 1], 256, 0, arguments.with(&ids).with(embedding.cols).with(out.buffer()))?;
        Ok(out)
    }

    /// Token ids on the device; a recording reads those of each step.
    fn upload_ids(&self, ids: &[u32]) -> Result<Buffer> {
        let mut recording = super::lock(&self.recording);
        let Some(notes) = &mut *recording else {
            drop(recording);
            return self.upload_values(ids);
        };
        let buffer = self.buffer::<u32>(ids.len())?;
        notes.ids = Some(self.copy_pinned(&buffer, ids)?);
        Ok(buffer)
    }

    /// `x Wᵀ + bias`, added to `residual` where that is given.
    pub(super) fn product(&self, linear: &CudaLinear, x: &CudaActivation, residual: Option<&CudaTensor>) -> Result<CudaTensor> {
        if x.cols != linear.cols {
            return Err(Error::run(format!("a linear of {} inputs was given {}", linear.cols, x.cols)));
        }
        let out = self.tensor(x.tokens, linear.rows)?;
        if x.tokens <= FEW
            && linear.int8_activations
            && let [Part { rows, weights: Weights::Int4 { codes, scales, group } }, Part { rows: others, weights: other }] = &*linear.parts
            && let Weights::Int8 { codes: other_codes, scales: other_scales } = other
        {
            let weights = Arguments::default().with(codes).with(scales).with(*group).with(*rows);
            let weights = weights.with(other_codes).with(other_scales).with(*others);
            let place = Place { out: &out, residual, bias: linear.bias.as_ref(), offset: 0 };
            let tiles = rows.div_ceil(FEW_OUTPUTS) + others.div_ceil(FEW_OUTPUTS);
            if !self.stream(stream::Weights::Int4, weights.clone(), tiles, x, &place)? {
                let Codes { codes, scales } = self.int8(x)?;
                let arguments = place.tail(weights.with(codes).with(scales).with(x.tokens).with(x.cols));
                self.launch("few_w4w8a8", [tiles, x.tokens.div_ceil(FEW_TILE), 1], 256, 0, arguments)?;
            }
            return Ok(out);
        }
        let mut offset = 0;
        for part in &linear.parts {
            let place = Place { out: &out, residual, bias: linear.bias.as_ref(), offset };
            match part.product(x.tokens) {
                Product::Few if self.streamed(part, linear, x, &place)? => {}
                Product::Few => self.few(part, linear, x, &place, None)?,
                Product::Many(_) => self.many(part, linear, x, &place)?,
            }
            offset += part.rows;
        }
        Ok(out)
    }

    /// Linears like `linear`, of which `experts` says which rows of the output each computes.
    pub(super) fn product_by_experts(
        &self,
        linear: &CudaLinear,
        product: Product,
        x: &CudaActivation,
        out: &CudaTensor,
        experts: &Selection<'_>,
    ) -> Result<()> {
        let [part] = &*linear.parts else { return Err(Error::run("the linears of experts are of one part")) };
        let place = Place { out, residual: None, bias: None, offset: 0 };
        match product {
            Product::Few => self.few(part, linear, x, &place, Some(experts)),
            Product::Many(_) => self.tiled(part, linear, x, &place, Some(experts)),
        }
    }

    /// A matrix-vector kernel, a few tokens at a time.
    fn few(&self, part: &Part, linear: &CudaLinear, x: &CudaActivation, place: &Place<'_>, experts: Option<&Selection<'_>>) -> Result<()> {
        let sizes = |arguments: Arguments| arguments.with(x.tokens).with(part.rows).with(linear.cols);
        let float = |arguments: Arguments| Ok::<_, Error>(arguments.with(self.float(x)?.buffer()).with(linear.cols));
        let codes = |arguments: Arguments| Ok::<_, Error>(arguments.with(&self.int8(x)?.codes).with(&self.int8(x)?.scales));
        let begin = Arguments::default();
        let (kernel, arguments) = match &part.weights {
            Weights::F32(weights) => ("few_f32", float(begin.with(weights))?),
            Weights::Bf16(weights) => ("few_bf16", float(begin.with(weights))?),
            Weights::Int8 { codes: w, scales } if linear.int8_activations => ("few_w8a8", codes(begin.with(w).with(scales))?),
            Weights::Int8 { codes: w, scales } => ("few_w8a16", float(begin.with(w).with(scales))?),
            Weights::Int4 { codes: w, scales, group } if linear.int8_activations => {
                ("few_w4a8", codes(begin.with(w).with(scales).with(*group))?)
            }
            Weights::Int4 { codes: w, scales, group } => ("few_w4a16", float(begin.with(w).with(scales).with(*group))?),
        };
        let blocks = [part.rows.div_ceil(FEW_OUTPUTS), experts.map_or(x.tokens.div_ceil(FEW_TILE), Selection::tiles), 1];
        self.launch(kernel, blocks, 256, 0, place.tail(Selection::arguments(experts, sizes(arguments))))
    }

    /// A matrix-vector kernel whose weights the copy engine brings; `false`, with nothing done, where there is none.
    fn streamed(&self, part: &Part, linear: &CudaLinear, x: &CudaActivation, place: &Place<'_>) -> Result<bool> {
        let begin = Arguments::default();
        let (kind, weights) = match &part.weights {
            Weights::Bf16(weights) => (stream::Weights::Bf16, begin.with(weights).with(part.rows)),
            Weights::Int8 { codes, scales } if linear.int8_activations => {
                (stream::Weights::Int8, begin.with(codes).with(scales).with(part.rows))
            }
            Weights::Int4 { codes, scales, group } if linear.int8_activations => {
                let none = None::<&Buffer>;
                let weights = begin.with(codes).with(scales).with(*group).with(part.rows);
                (stream::Weights::Int4, weights.with(none).with(none).with(0_usize))
            }
            Weights::F32(_) | Weights::Int8 { .. } | Weights::Int4 { .. } => return Ok(false),
        };
        self.stream(kind, weights, part.rows.div_ceil(FEW_OUTPUTS), x, place)
    }

    /// The same, `weights` being the kernel's first parameters.
    fn stream(&self, kind: stream::Weights, weights: Arguments, tiles: usize, x: &CudaActivation, place: &Place<'_>) -> Result<bool> {
        let device = self.device();
        if !stream::serves(device.arch()) {
            return Ok(false);
        }
        let blocks = stream::Launch::blocks(tiles, x.tokens, device.multiprocessors());
        let one = stream::Launch::of_one(kind, x.cols, device.arch()).filter(|_| x.tokens == 1);
        let (launch, arguments) = match (one, kind) {
            (Some(launch), stream::Weights::Bf16) => {
                let copied = if x.pending().is_none() { Some(Front::plain(self.float(x)?.clone())) } else { None };
                let Some(front) = x.pending().or(copied.as_ref()).filter(|front| stream::serves_front(front)) else {
                    return Ok(false);
                };
                (launch, stream::front_arguments(weights.with(x.cols).with(launch.stages), Some(front), None))
            }
            (Some(launch), _) => {
                let front = x.pending();
                let given = if front.is_none() { Some(self.int8(x)?) } else { None };
                let scale = x.emit.scale.filter(|_| front.is_some()).map(|scale| self.static_scale(scale)).transpose()?;
                let arguments = weights.with(x.cols).with(launch.stages);
                let arguments = arguments.with(given.map(|given| &given.codes)).with(given.map(|given| &given.scales));
                (launch, stream::front_arguments(arguments, front, scale.as_deref()))
            }
            (None, _) => {
                let Some(launch) = stream::Launch::of_several(kind, device.arch()) else { return Ok(false) };
                let Codes { codes, scales } = self.int8(x)?;
                (launch, weights.with(codes).with(scales).with(x.tokens).with(x.cols).with(launch.stages))
            }
        };
        self.launch(launch.kernel, blocks, launch.threads, launch.shared, place.tail(arguments))?;
        Ok(true)
    }

    /// A matrix product by Hopper's own instructions, for int8 activations.
    fn many_on_hopper(&self, part: &Part, linear: &CudaLinear, x: &CudaActivation, place: &Place<'_>) -> Result<()> {
        let (weights, scales, group) = match &part.weights {
            Weights::Int8 { codes, scales } => (codes, scales, None),
            Weights::Int4 { codes, scales, group } => (codes, scales, Some(*group)),
            Weights::F32(_) | Weights::Bf16(_) => return Err(missing("int8")),
        };
        let Codes { codes, scales: codes_scales } = self.int8(x)?;
        let operands = Operands { weights, scales, group, codes, codes_scales, tokens: x.tokens, rows: part.rows, cols: linear.cols };
        let launch = wgmma::Launch::of(group.is_some(), x.tokens);
        let blocks = launch.blocks(x.tokens, part.rows, self.device().multiprocessors());
        let arguments = place.tail(operands.arguments(self.device())?);
        self.launch(launch.kernel, [blocks, 1, 1], launch.threads, launch.shared, arguments)
    }

    /// A matrix product: on Hopper by its own instructions where they serve, for float weights by cuBLAS where it is there, otherwise
    /// by a kernel that every GPU runs.
    fn many(&self, part: &Part, linear: &CudaLinear, x: &CudaActivation, place: &Place<'_>) -> Result<()> {
        if self.device().arch() == wgmma::ARCH && linear.int8_activations && part.weights.is_quantized() {
            return self.many_on_hopper(part, linear, x, place);
        }
        let done = match &part.weights {
            Weights::F32(weights) => {
                let float = self.float(x)?.buffer();
                self.halves_product(weights, float, part, linear, x, place)?
                    || self.library_product(Element::F32, weights, linear.cols, float, linear.cols, part, linear, x, place)?
            }
            Weights::Bf16(weights) => {
                let (bf16, width) = (self.bf16(x)?, padded(linear.cols));
                self.library_product(Element::Bf16, weights, width, &bf16, width, part, linear, x, place)?
            }
            Weights::Int8 { .. } | Weights::Int4 { .. } => false,
        };
        if done { Ok(()) } else { self.tiled(part, linear, x, place, None) }
    }

    /// A matrix product by a kernel that every GPU runs.
    fn tiled(
        &self,
        part: &Part,
        linear: &CudaLinear,
        x: &CudaActivation,
        place: &Place<'_>,
        experts: Option<&Selection<'_>>,
    ) -> Result<()> {
        let begin = Arguments::default();
        let codes = |arguments: Arguments| Ok::<_, Error>(arguments.with(&self.int8(x)?.codes).with(&self.int8(x)?.scales));
        let (kernel, arguments) = match &part.weights {
            Weights::F32(weights) => ("gemm_f32", begin.with(weights).with(self.float(x)?.buffer()).with(linear.cols)),
            Weights::Bf16(weights) => ("gemm_bf16", begin.with(weights).with(&*self.bf16(x)?)),
            Weights::Int8 { codes: w, scales } if linear.int8_activations => ("gemm_w8a8", codes(begin.with(w).with(scales))?),
            Weights::Int8 { codes: w, scales } => ("gemm_w8a16", begin.with(w).with(scales).with(&*self.bf16(x)?)),
            Weights::Int4 { codes: w, scales, group } if linear.int8_activations => {
                ("gemm_w4a8", codes(begin.with(w).with(scales).with(*group))?)
            }
            Weights::Int4 { codes: w, scales, group } => ("gemm_w4a16", begin.with(w).with(scales).with(*group).with(&*self.bf16(x)?)),
        };
        let arguments = Selection::arguments(experts, arguments.with(x.tokens).with(part.rows).with(linear.cols));
        let (tile, shared) = match kernel {
            "gemm_f32" => (GEMM_F32_TILE, 0),
            "gemm_w4a8" => (GEMM_TILE, GEMM_W4A8_SHARED),
            _ => (GEMM_TILE, GEMM_SHARED),
        };
        let tiles = experts.map_or(x.tokens.div_ceil(tile), Selection::tiles);
        self.launch(kernel, [tiles, part.rows.div_ceil(tile), 1], 256, shared, place.tail(arguments))
    }

    /// f32 by f32 through cuBLAS on the tensor cores: each is split into two bf16, high + low, and three products of halves are
    /// added, smallest first, which leaves 2^-16 of each term. `false`, with nothing done: there is no cuBLAS, or the linear
    /// has a bias.
    fn halves_product(
        &self,
        weights: &Buffer,
        x: &Buffer,
        part: &Part,
        linear: &CudaLinear,
        input: &CudaActivation,
        place: &Place<'_>,
    ) -> Result<bool> {
        if place.bias.is_some() || (place.residual.is_some() && part.rows != place.out.cols) {
            return Ok(false);
        }
        let (tokens, rows, cols) = (input.tokens, part.rows, linear.cols);
        let (w_high, w_low) = self.split(weights, rows * cols)?;
        let (x_high, x_low) = self.split(x, tokens * cols)?;
        let product = if place.residual.is_some() { Some(self.tensor(tokens, rows)?) } else { None };
        let c = match &product {
            Some(product) => (product.buffer().address(), rows),
            None => (place.out.buffer().address() + 4 * place.offset as u64, place.out.cols),
        };
        for (index, (a, b)) in [(&x_low, &w_high), (&x_high, &w_low), (&x_high, &w_high)].into_iter().enumerate() {
            let gemm = Gemm {
                element: Element::Bf16,
                m: tokens,
                n: rows,
                k: cols,
                a: (a.address(), cols),
                b: (b.address(), cols),
                c,
                alpha: 1.0,
                beta: if index == 0 { 0.0 } else { 1.0 },
                a_transposed: false,
                b_transposed: false,
            };
            // SAFETY: the buffers have the sizes that these shapes give.
            if !unsafe { self.device().gemm(&gemm)? } {
                return Ok(false);
            }
        }
        if let (Some(product), Some(residual)) = (product, place.residual) {
            let count = tokens * rows;
            let arguments = Arguments::default().with(residual.buffer()).with(product.buffer()).with(count).with(place.out.buffer());
            self.launch("add", [count.div_ceil(1024), 1, 1], 256, 0, arguments)?;
        }
        Ok(true)
    }

    /// The halves of `count` values in bf16: high and low.
    pub(super) fn split(&self, x: &Buffer, count: usize) -> Result<(Buffer, Buffer)> {
        let (high, low) = (self.buffer::<u16>(count)?, self.buffer::<u16>(count)?);
        let arguments = Arguments::default().with(x).with(count as u64).with(&high).with(&low);
        self.launch("split_halves", [count.div_ceil(2048).min(1 << 16), 1, 1], 256, 0, arguments)?;
        Ok((high, low))
    }

    /// The product by cuBLAS where there is one, and only then what is added to it: the sum is that of [`Cuda::sum`] to the
    /// bit.
    fn library_product(
        &self,
        element: Element,
        weights: &Buffer,
        weights_width: usize,
        activations: &Buffer,
        activations_width: usize,
        part: &Part,
        linear: &CudaLinear,
        x: &CudaActivation,
        place: &Place<'_>,
    ) -> Result<bool> {
        // A bias is added row by row by the kernels only.
        if place.bias.is_some() {
            return Ok(false);
        }
        let product = if place.residual.is_some() { Some(self.tensor(x.tokens, part.rows)?) } else { None };
        let c = match &product {
            Some(product) => (product.buffer().address(), part.rows),
            None => (place.out.buffer().address() + 4 * place.offset as u64, place.out.cols),
        };
        let gemm = Gemm {
            element,
            m: x.tokens,
            n: part.rows,
            k: linear.cols,
            a: (activations.address(), activations_width),
            b: (weights.address(), weights_width),
            c,
            alpha: 1.0,
            beta: 0.0,
            a_transposed: false,
            b_transposed: false,
        };
        // SAFETY: the buffers have the sizes that these shapes give.
        if !unsafe { self.device().gemm(&gemm)? } {
            return Ok(false);
        }
        if let (Some(product), Some(residual)) = (product, place.residual) {
            // Only linears of one part are added to the residual stream.
            if part.rows != place.out.cols {
                return Err(Error::run("a linear of several parts cannot be added to a residual"));
            }
            let count = x.tokens * part.rows;
            let arguments = Arguments::default().with(residual.buffer()).with(product.buffer()).with(count).with(place.out.buffer());
            self.launch("add", [count.div_ceil(1024), 1, 1], 256, 0, arguments)?;
        }
        Ok(true)
    }
}

/// Where a part of a linear puts its outputs.
struct Place<'a> {
    out: &'a CudaTensor,
    residual: Option<&'a CudaTensor>,
    bias: Option<&'a Buffer>,
    /// First output of the part.
    offset: usize,
}

impl Place<'_> {
    /// The kernels' last parameters: bias, residual, output, its stride.
    fn tail(&self, arguments: Arguments) -> Arguments {
        let at = |buffer: Option<&Buffer>| buffer.map_or(0, |buffer| buffer.address() + 4 * self.offset as u64);
        arguments.with(at(self.bias)).with(at(self.residual.map(CudaTensor::buffer))).with(at(Some(self.out.buffer()))).with(self.out.cols)
    }
}
