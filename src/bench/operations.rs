//! Single operations at the sizes of a shape, each beside what it must read, write and compute.

use rayon::prelude::*;
use serde::Serialize;

use super::Shape;
use crate::backend::{AttentionShape, Backend, Emit, MambaParameters, Sequences, SsmInternals};
use crate::checkpoint::LinearSpec;
use crate::error::Result;
use crate::format::{BlockKind, CacheFormat, CacheFormats, Format, LinearWeights, QuantizedMatrix, Scheme, WeightPart};
use crate::model::{mamba_shape, router_shape};
use crate::monitor::Monitor;

/// Copies of an operation's weights that take turns, so that none is still in a cache; together at least so many bytes.
const ROTATED_BYTES: u64 = 512 << 20;
const REPEATS: usize = 20;

/// An operation, measured.
#[derive(Debug, Clone, Serialize)]
pub struct OperationSpeed {
    pub operation: String,
    pub tokens: usize,
    pub us: f64,
    /// What it must read and write.
    pub bytes: u64,
    /// Multiplications and additions.
    pub operations: u64,
    pub gb_per_s: f64,
    pub tera_per_s: f64,
    /// Share of the copy bandwidth measured in the same run.
    pub of_bandwidth: f64,
}

struct Bench<'a, B: Backend> {
    backend: &'a B,
    bandwidth: f64,
    monitor: &'a Monitor<'a>,
    measured: Vec<OperationSpeed>,
}

/// Measures the operations of `shape` for each number of tokens.
pub fn measure<B: Backend>(backend: &B, shape: &Shape, tokens: &[usize], bandwidth: f64, monitor: &Monitor) -> Result<Vec<OperationSpeed>> {
    let mut bench = Bench { backend, bandwidth, monitor, measured: Vec::new() };
    let layout = &shape.layout;
    let mut linears: Vec<&LinearSpec> = Vec::new();
    for kind in BlockKind::ALL {
        linears.extend(layout.blocks.iter().find(|block| block.kind == kind).iter().flat_map(|block| &block.linears));
    }
    linears.retain(|linear| !linear.name.starts_with("experts.") && !linear.name.starts_with("k_") && !linear.name.starts_with("v_"));
    linears.push(&layout.head);
    monitor.stage("operations", tokens.len() * (3 * linears.len() + 8));
    for linear in &linears {
        for format in [Format::W16A16, Format::W8A8, Format::W4A8] {
            bench.linear(linear, format, tokens)?;
        }
    }
    for format in [Format::W16A16, Format::W8A8, Format::W4A8] {
        bench.experts(shape, format, tokens)?;
    }
    for count in tokens {
        bench.rows(shape, *count)?;
        bench.mixers(shape, *count)?;
    }
    Ok(bench.measured)
}

impl<B: Backend> Bench<'_, B> {
    fn record(&mut self, operation: String, tokens: usize, seconds: f64, bytes: u64, operations: u64) -> Result<()> {
        self.measured.push(OperationSpeed {
            us: 1e6 * seconds,
            gb_per_s: bytes as f64 / seconds / 1e9,
            tera_per_s: operations as f64 / seconds / 1e12,
            of_bandwidth: bytes as f64 / seconds / self.bandwidth,
            operation: operation.clone(),
            tokens,
            bytes,
            operations,
        });
        self.monitor.step(self.measured.len(), operation)
    }

    fn tensor(&self, rows: usize, cols: usize) -> Result<B::Tensor> {
        self.backend.upload((0..rows * cols).map(|i| ((i * 2_654_435_761) as u32 >> 8) as f32 / (1 << 23) as f32 - 1.0).collect(), cols)
    }

    /// Weights of no meaning.
    fn weights(rows: usize, cols: usize, format: Format) -> LinearWeights {
        let scheme = Scheme::for_width(format, 2, cols);
        let code = |i: usize, range: i32| (((i * 2_654_435_761) as u32 >> 16) as i32 % range - range / 2) as i8;
        let part = match scheme {
            Scheme::Float => WeightPart::Float((0..rows * cols).into_par_iter().map(|i| f32::from(code(i, 256)) / 256.0).collect()),
            _ => {
                let range = if scheme == Scheme::Int8 { 254 } else { 16 };
                let codes = (0..rows * cols).into_par_iter().map(|i| code(i, range)).collect();
                let scales = vec![1.0 / 128.0; rows * cols / scheme.group(cols)];
                WeightPart::Quantized(QuantizedMatrix { scheme, rows, cols, codes, scales })
            }
        };
        let int8_activations = format.quantizes_activations();
        LinearWeights { parts: vec![part], int8_activations, ..LinearWeights::float(Vec::new(), cols) }
    }

    fn linear(&mut self, linear: &LinearSpec, format: Format, tokens: &[usize]) -> Result<()> {
        let (rows, cols) = (linear.rows, linear.cols);
        let weight_bytes = Scheme::for_width(format, 2, cols).stored_bytes(rows, cols, 2);
        let copies = ROTATED_BYTES.div_ceil(weight_bytes).clamp(1, 16) as usize;
        let weights = Self::weights(rows, cols, format);
        let prepared = (0..copies).map(|_| self.backend.prepare(weights.clone())).collect::<Result<Vec<_>>>()?;
        drop(weights);
        for tokens in tokens.iter().copied() {
            let x = self.backend.emit(self.tensor(tokens, cols)?, self.backend.reads(&prepared[0]))?;
            let mut turn = 0;
            let seconds = self.backend.time(REPEATS.max(copies), &mut || {
                turn += 1;
                self.backend.linear(&prepared[turn % copies], &x).map(drop)
            })?;
            let activation = if format.quantizes_activations() { 1 } else { 4 };
            let bytes = weight_bytes + (tokens * (activation * cols + 4 * rows)) as u64;
            self.record(format!("{} {format} {rows}x{cols}", linear.name), tokens, seconds, bytes, 2 * (tokens * rows * cols) as u64)?;
        }
        Ok(())
    }

    /// All experts of a layer at once, where the device computes them so; the tokens choose others each time.
    fn experts(&mut self, shape: &Shape, format: Format, tokens: &[usize]) -> Result<()> {
        let Some(moe) = shape.layout.blocks.iter().find(|block| block.kind == BlockKind::Moe).map(|_| &shape.config.moe) else {
            return Ok(());
        };
        let (width, inner) = (moe.latent.unwrap_or(shape.config.hidden_size), moe.intermediate);
        let router = router_shape(moe);
        let (up, down) = (Self::weights(inner, width, format), Self::weights(width, inner, format));
        let prepare = |_| Ok([self.backend.prepare(up.clone())?, self.backend.prepare(down.clone())?]);
        let linears = (0..moe.experts).map(prepare).collect::<Result<Vec<_>>>()?;
        let Some(experts) = self.backend.prepare_experts(&linears.iter().map(|[up, down]| [up, down]).collect::<Vec<_>>())? else {
            return Ok(());
        };
        let correction = self.backend.prepare_vector(vec![0.0; moe.experts])?;
        let expert_bytes: u64 = [(inner, width), (width, inner)]
            .map(|(rows, cols)| Scheme::for_width(format, 2, cols).stored_bytes(rows, cols, 2))
            .iter()
            .sum();
        for tokens in tokens.iter().copied() {
            let x = self.backend.emit(self.tensor(tokens, width)?, self.backend.reads(&linears[0][0]))?;
            let random = |turn: usize| {
                let value = |i: usize| (((i + turn * 7919) * 2_654_435_761) as u32 >> 8) as f32 / (1 << 23) as f32;
                self.backend.upload((0..tokens * moe.experts).map(value).collect(), moe.experts)
            };
            let choices = (0..REPEATS).map(random).collect::<Result<Vec<_>>>()?;
            let mut chosen = 0;
            for raw in &choices {
                chosen += self.backend.route(raw, &correction, &router)?.iter().filter(|expert| !expert.tokens.is_empty()).count() as u64;
            }
            let mut turn = 0;
            let seconds = self.backend.time(REPEATS, &mut || {
                turn += 1;
                self.backend.mixture(&experts, &x, &choices[turn % REPEATS], &correction, &router).map(drop)
            })?;
            let pairs = (tokens * moe.experts_per_token) as u64;
            let bytes = chosen * expert_bytes / REPEATS as u64 + 4 * pairs * (inner + width) as u64;
            let operations = 4 * pairs * (inner * width) as u64;
            let name = format!("{} of {} experts {format} {inner}x{width}", moe.experts_per_token, moe.experts);
            self.record(name, tokens, seconds, bytes, operations)?;
        }
        Ok(())
    }

    /// Norms and what stands in front of the linears.
    fn rows(&mut self, shape: &Shape, tokens: usize) -> Result<()> {
        let (hidden, wide) = (shape.config.hidden_size, shape.config.mlp.intermediate.max(1));
        let (h, up) = (self.tensor(tokens, hidden)?, self.tensor(tokens, wide)?);
        let weight = self.backend.prepare_vector(vec![1.0; hidden])?;
        let seconds = self.backend.time(REPEATS, &mut || self.backend.settle(&self.backend.rms_norm(&h, &weight, 1e-5, Emit::INT8)?))?;
        self.record(format!("rms_norm to int8 {hidden}"), tokens, seconds, (5 * tokens * hidden) as u64, 4 * (tokens * hidden) as u64)?;
        let emit = Emit { hadamard: Some(1 << wide.trailing_zeros()), ..Emit::INT8 };
        let seconds = self.backend.time(REPEATS, &mut || self.backend.settle(&self.backend.relu2(&up, emit)?))?;
        self.record(format!("relu2, hadamard, to int8 {wide}"), tokens, seconds, (5 * tokens * wide) as u64, 12 * (tokens * wide) as u64)
    }

    /// Gated scan, its norm and attention, as a decoding step for few tokens and as one sequence for many.
    fn mixers(&mut self, shape: &Shape, tokens: usize) -> Result<()> {
        let mamba = &shape.config.mamba;
        let sizes = mamba_shape(mamba);
        let channels = sizes.conv_channels();
        let parameters = self.backend.prepare_mamba(MambaParameters {
            conv_weight: vec![0.25; channels * sizes.kernel],
            conv_bias: vec![0.0; channels],
            a: vec![-1.0; sizes.heads],
            d: vec![1.0; sizes.heads],
            dt_bias: vec![-3.0; sizes.heads],
            internals: SsmInternals::Float,
            rotation: None,
        })?;
        let step = tokens <= 64;
        let sequences = if step { Sequences::steps(tokens) } else { Sequences::new(vec![tokens]) };
        let in_proj = LinearWeights::float(vec![0.01; sizes.projected() * 64], 64);
        let in_proj = self.backend.prepare(in_proj)?;
        let x = self.backend.emit(self.tensor(tokens, 64)?, Emit::FLOAT)?;
        let projected = self.backend.project(&in_proj, &x, &parameters, &sizes)?;
        let caches = CacheFormats { state: CacheFormat::F16, ..CacheFormats::default() };
        let mut cache = self.backend.ssm_cache(&parameters, &sizes, sequences.count(), caches);
        let seconds = self
            .backend
            .time(REPEATS, &mut || self.backend.mamba_scan(&projected, &parameters, &sizes, &sequences, Some(&mut cache)).map(drop))?;
        let state = (sizes.inner() * sizes.state) as u64;
        let bytes = 4 * sequences.count() as u64 * state + 4 * (tokens * (sizes.projected() + sizes.inner())) as u64;
        let name = if step { "scan step, f16 state" } else { "scan of a sequence" };
        self.record(name.into(), tokens, seconds, bytes, 5 * tokens as u64 * state)?;
        let (y, weight) = (self.tensor(tokens, sizes.inner())?, self.backend.prepare_vector(vec![1.0; sizes.inner()])?);
        let group = sizes.inner() / sizes.groups;
        let seconds =
            self.backend.time(REPEATS, &mut || self.backend.settle(&self.backend.group_norm(&y, &weight, group, 1e-5, Emit::INT8)?))?;
        let values = tokens * sizes.inner();
        self.record("group_norm to int8".into(), tokens, seconds, (5 * values) as u64, 4 * values as u64)?;
        let config = &shape.config.attention;
        let sizes = AttentionShape { heads: config.heads, kv_heads: config.kv_heads, head_dim: config.head_dim };
        if sizes.heads == 0 {
            return Ok(());
        }
        let (width, kv_width) = (sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim);
        let (q, k, v) = (self.tensor(tokens, width)?, self.tensor(tokens, kv_width)?, self.tensor(tokens, kv_width)?);
        if step {
            const CONTEXT: usize = 2048;
            let mut cache = self.backend.kv_cache(&sizes, tokens, CacheFormats::default());
            let long = Sequences::new(vec![CONTEXT; tokens]);
            let (all_q, all_kv) = (self.tensor(tokens * CONTEXT, width)?, self.tensor(tokens * CONTEXT, kv_width)?);
            self.backend.attention(&all_q, &all_kv, &all_kv, &sizes, &long, Some(&mut cache))?;
            let seconds =
                self.backend.time(REPEATS, &mut || self.backend.attention(&q, &k, &v, &sizes, &sequences, Some(&mut cache)).map(drop))?;
            let bytes = (tokens * CONTEXT * kv_width * 8) as u64;
            return self.record(format!("attention step at {CONTEXT}"), tokens, seconds, bytes, 4 * (tokens * CONTEXT * width) as u64);
        }
        let seconds = self.backend.time(REPEATS, &mut || self.backend.attention(&q, &k, &v, &sizes, &sequences, None).map(drop))?;
        let bytes = (4 * tokens * (2 * width + 2 * kv_width)) as u64;
        self.record("attention of a sequence".into(), tokens, seconds, bytes, 2 * (tokens * tokens * width) as u64)
    }
}
