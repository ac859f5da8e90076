//! One block: `h + mixer(RMSNorm(h))`, for the four kinds of mixer.

use crate::backend::{AttentionShape, Backend, Emit, MambaParameters, MambaShape, Sequences};
use crate::checkpoint::{BlockSpec, Checkpoint};
use crate::error::{Error, Result};
use crate::format::{BlockKind, LinearWeights};

use super::moe::Moe;

/// A block whose weights are on the device.
pub struct Block<B: Backend> {
    norm: Vec<f32>,
    eps: f32,
    mixer: Mixer<B>,
}

enum Mixer<B: Backend> {
    Ssm(Box<Ssm<B>>),
    Mlp(Mlp<B>),
    Attention(Box<Attention<B>>),
    Moe(Box<Moe<B>>),
}

struct Ssm<B: Backend> {
    shape: MambaShape,
    in_proj: B::Linear,
    parameters: B::Mamba,
    norm: Vec<f32>,
    out_proj: B::Linear,
}

/// relu² MLP: `down(relu(up(x))²)`.
pub(super) struct Mlp<B: Backend> {
    up: B::Linear,
    down: B::Linear,
}

struct Attention<B: Backend> {
    shape: AttentionShape,
    q: B::Linear,
    k: B::Linear,
    v: B::Linear,
    o: B::Linear,
}

/// What a block remembers of the tokens it has seen.
pub enum BlockCache<B: Backend> {
    Ssm(B::SsmCache),
    KeyValue(B::KvCache),
    None,
}

/// Where a block's linears come from: the checkpoint as stored, or weights just quantized.
pub type LinearSource<'a> = dyn Fn(&str) -> Result<LinearWeights> + 'a;

impl<B: Backend> Block<B> {
    /// Loads block `index` of `checkpoint` as it is stored.
    pub fn load(backend: &B, checkpoint: &Checkpoint, index: usize) -> Result<Self> {
        let spec = &checkpoint.layout.blocks[index];
        Self::assemble(backend, checkpoint, spec, &|name| {
            let linear = spec.linear(name).ok_or_else(|| Error::run(format!("block {index} has no linear `{name}`")))?;
            checkpoint.linear(linear, Some(index))
        })
    }

    /// Builds a block from `checkpoint`'s float tensors and the linears of `source`.
    pub fn assemble(backend: &B, checkpoint: &Checkpoint, spec: &BlockSpec, source: &LinearSource<'_>) -> Result<Self> {
        let config = &checkpoint.config;
        let mixer_tensor = |name: &str| checkpoint.read(&format!("{}mixer.{name}", spec.prefix));
        let linear = |name: &str| backend.prepare(source(name)?);
        let mixer = match spec.kind {
            BlockKind::Ssm => {
                let mamba = &config.mamba;
                let parameters = MambaParameters {
                    conv_weight: mixer_tensor("conv1d.weight")?,
                    conv_bias: if mamba.conv_bias { mixer_tensor("conv1d.bias")? } else { vec![0.0; mamba.conv_channels()] },
                    a: mixer_tensor("A_log")?.into_iter().map(|a_log| -a_log.exp()).collect(),
                    d: mixer_tensor("D")?,
                    dt_bias: mixer_tensor("dt_bias")?,
                };
                Mixer::Ssm(Box::new(Ssm {
                    shape: MambaShape {
                        heads: mamba.heads,
                        head_dim: mamba.head_dim,
                        groups: mamba.groups,
                        state: mamba.state,
                        kernel: mamba.conv_kernel,
                        dt_min: mamba.dt_min,
                        dt_max: mamba.dt_max,
                    },
                    in_proj: linear("in_proj")?,
                    parameters: backend.prepare_mamba(parameters)?,
                    norm: mixer_tensor("norm.weight")?,
                    out_proj: linear("out_proj")?,
                }))
            }
            BlockKind::Mlp => Mixer::Mlp(Mlp::new(linear("up_proj")?, linear("down_proj")?)),
            BlockKind::Attention => {
                let attention = &config.attention;
                Mixer::Attention(Box::new(Attention {
                    shape: AttentionShape { heads: attention.heads, kv_heads: attention.kv_heads, head_dim: attention.head_dim },
                    q: linear("q_proj")?,
                    k: linear("k_proj")?,
                    v: linear("v_proj")?,
                    o: linear("o_proj")?,
                }))
            }
            BlockKind::Moe => Mixer::Moe(Box::new(Moe::assemble(backend, &config.moe, &mixer_tensor, &linear, config.hidden_size)?)),
        };
        Ok(Self { norm: checkpoint.read(&format!("{}norm.weight", spec.prefix))?, eps: config.norm_eps, mixer })
    }

    /// An empty cache for `sequences` sequences.
    pub fn cache(&self, backend: &B, sequences: usize) -> BlockCache<B> {
        match &self.mixer {
            Mixer::Ssm(ssm) => BlockCache::Ssm(backend.ssm_cache(&ssm.shape, sequences)),
            Mixer::Attention(attention) => BlockCache::KeyValue(backend.kv_cache(&attention.shape, sequences)),
            Mixer::Mlp(_) | Mixer::Moe(_) => BlockCache::None,
        }
    }

    /// The residual stream behind the block, `[tokens, hidden]`.
    pub fn forward(&self, backend: &B, h: B::Tensor, sequences: &Sequences, cache: Option<&mut BlockCache<B>>) -> Result<B::Tensor> {
        let mixed = self.mix(backend, &h, sequences, cache)?;
        backend.add(h, &mixed)
    }

    /// What the block adds to the residual stream, `mixer(RMSNorm(h))`.
    #[allow(clippy::needless_pass_by_value, reason = "an optional exclusive reference is handed on")]
    pub fn mix(&self, backend: &B, h: &B::Tensor, sequences: &Sequences, cache: Option<&mut BlockCache<B>>) -> Result<B::Tensor> {
        let norm = |emit| backend.rms_norm(h, &self.norm, self.eps, emit);
        match &self.mixer {
            Mixer::Ssm(ssm) => {
                let cache = match cache {
                    Some(BlockCache::Ssm(cache)) => Some(cache),
                    _ => None,
                };
                let projected = backend.linear(&ssm.in_proj, &norm(backend.reads(&ssm.in_proj))?)?;
                let y = backend.mamba_scan(&projected, &ssm.parameters, &ssm.shape, sequences, cache)?;
                let emit = backend.reads(&ssm.out_proj);
                let gated = backend.gated_norm(&y, &projected, &ssm.norm, &ssm.shape, self.eps, emit)?;
                backend.linear(&ssm.out_proj, &gated)
            }
            Mixer::Mlp(mlp) => mlp.forward(backend, &norm(mlp.reads(backend))?),
            Mixer::Attention(attention) => {
                let cache = match cache {
                    Some(BlockCache::KeyValue(cache)) => Some(cache),
                    _ => None,
                };
                let emit = [&attention.k, &attention.v].into_iter().fold(backend.reads(&attention.q), |emit, w| emit.and(backend.reads(w)));
                let x = norm(emit)?;
                let (q, k, v) = (backend.linear(&attention.q, &x)?, backend.linear(&attention.k, &x)?, backend.linear(&attention.v, &x)?);
                let mixed = backend.attention(&q, &k, &v, &attention.shape, sequences, cache)?;
                backend.linear(&attention.o, &backend.emit(mixed, backend.reads(&attention.o))?)
            }
            Mixer::Moe(moe) => moe.forward(backend, &norm(moe.reads(backend).and(Emit::FLOAT))?),
        }
    }

    /// Bytes that the block's linears take on the device.
    pub fn resident_bytes(&self, backend: &B) -> u64 {
        let bytes = |linear| backend.resident_bytes(linear);
        match &self.mixer {
            Mixer::Ssm(ssm) => bytes(&ssm.in_proj) + bytes(&ssm.out_proj),
            Mixer::Mlp(mlp) => mlp.resident_bytes(backend),
            Mixer::Attention(a) => [&a.q, &a.k, &a.v, &a.o].into_iter().map(bytes).sum(),
            Mixer::Moe(moe) => moe.resident_bytes(backend),
        }
    }
}

impl<B: Backend> Mlp<B> {
    pub(super) fn new(up: B::Linear, down: B::Linear) -> Self {
        Self { up, down }
    }

    /// The form in which the first linear reads its input.
    pub(super) fn reads(&self, backend: &B) -> Emit {
        backend.reads(&self.up)
    }

    pub(super) fn forward(&self, backend: &B, x: &B::Activation) -> Result<B::Tensor> {
        let wide = backend.linear(&self.up, x)?;
        backend.linear(&self.down, &backend.relu2(&wide, backend.reads(&self.down))?)
    }

    pub(super) fn resident_bytes(&self, backend: &B) -> u64 {
        backend.resident_bytes(&self.up) + backend.resident_bytes(&self.down)
    }
}
