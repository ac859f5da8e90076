//! One block: `h + mixer(RMSNorm(h))`, for the four kinds of mixer.

use std::ops::Range;

use crate::backend::{
    AttentionShape, Backend, Emit, MambaParameters, MambaShape, SSM_CHUNK, Sequences, SsmInternals, SsmScales, StateRotation,
};
use crate::checkpoint::{AttentionConfig, BlockSpec, Checkpoint, Config, LinearSpec, MambaConfig};
use crate::error::{Error, Result};
use crate::format::{BlockKind, CacheFormats, Format, LinearWeights, SsmActivations, Transform};

use super::moe::Moe;

/// Longest piece of a text that a block computes at a time: a multiple of the scan's chunk, so that the result is that of
/// one call.
pub const PIECE: usize = 32 * SSM_CHUNK;

/// Whether sequences that go on from no cache are computed in pieces.
fn is_long(sequences: &Sequences, cached: bool) -> bool {
    !cached && !sequences.is_tree() && sequences.ranges().any(|range| range.len() > PIECE)
}

/// The tokens of each sequence in pieces.
fn pieces(sequences: &Sequences) -> impl Iterator<Item = impl Iterator<Item = Vec<usize>>> {
    let piece = |range: Range<usize>| move |start| (start..range.end.min(start + PIECE)).collect();
    sequences.ranges().map(move |range| range.clone().step_by(PIECE).map(piece(range)))
}

/// A block whose weights are on the device.
pub struct Block<B: Backend> {
    norm: B::Vector,
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
    norm: B::Vector,
    out_proj: B::Linear,
}

/// relu² MLP: `down(relu(up(x))²)`.
pub(super) struct Mlp<B: Backend> {
    /// In front of its linears' names: empty, or `experts.3.`.
    prefix: String,
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

/// Where a block's tensors come from: the checkpoint as stored, or weights just transformed or quantized.
pub trait BlockSource {
    /// A float tensor by its canonical name.
    fn tensor(&self, name: &str) -> Result<Vec<f32>>;
    /// A linear's weights.
    fn linear(&self, linear: &LinearSpec) -> Result<LinearWeights>;
    /// In which form z, x, B, C and dt pass through a state-space block.
    fn internals(&self, block: &BlockSpec) -> Result<SsmInternals>;
    /// Whether x, B and C are rotated behind the convolution.
    fn rotates_state(&self) -> bool;
}

/// Hands each linear of a block its input before it is applied: (name in the mixer, input). The router is no linear.
pub type Tap<'a, B> = dyn Fn(&str, &<B as Backend>::Activation) -> Result<()> + 'a;

/// Hands a linear's input to the tap, if there is one.
pub(super) fn observe<B: Backend>(tap: Option<&Tap<'_, B>>, name: &str, x: &B::Activation) -> Result<()> {
    tap.map_or(Ok(()), |tap| tap(name, x))
}

/// The sizes of a mixer.
pub fn mamba_shape(mamba: &MambaConfig) -> MambaShape {
    MambaShape {
        heads: mamba.heads,
        head_dim: mamba.head_dim,
        groups: mamba.groups,
        state: mamba.state,
        kernel: mamba.conv_kernel,
        dt_min: mamba.dt_min,
        dt_max: mamba.dt_max,
    }
}

/// The sizes of an attention mixer.
pub fn attention_shape(attention: &AttentionConfig) -> AttentionShape {
    AttentionShape { heads: attention.heads, kv_heads: attention.kv_heads, head_dim: attention.head_dim }
}

/// A mixer's last linear: its output, added to `into` where that is given.
pub(super) fn write<B: Backend>(backend: &B, into: Option<B::Tensor>, linear: &B::Linear, x: &B::Activation) -> Result<B::Tensor> {
    match into {
        Some(into) => backend.linear_add(into, linear, x),
        None => backend.linear(linear, x),
    }
}

/// A block as `checkpoint` stores it.
struct Stored<'a> {
    checkpoint: &'a Checkpoint,
    index: usize,
}

impl BlockSource for Stored<'_> {
    fn tensor(&self, name: &str) -> Result<Vec<f32>> {
        self.checkpoint.read(name)
    }

    fn linear(&self, linear: &LinearSpec) -> Result<LinearWeights> {
        self.checkpoint.linear(linear, Some(self.index))
    }

    fn internals(&self, block: &BlockSpec) -> Result<SsmInternals> {
        let Some(variant) = &self.checkpoint.variant else { return Ok(SsmInternals::Float) };
        internals(variant.activations.ssm, variant.plan.blocks[self.index], block, |name| self.checkpoint.read(name))
    }

    fn rotates_state(&self) -> bool {
        self.checkpoint.variant.as_ref().is_some_and(|variant| variant.provenance.transforms.contains(&Transform::RotateState))
    }
}

/// The internals of a state-space block of `format` whose variant holds them as `activations`; `tensor` reads the block's
/// tensors by canonical name.
pub fn internals(
    activations: SsmActivations,
    format: Format,
    block: &BlockSpec,
    tensor: impl Fn(&str) -> Result<Vec<f32>>,
) -> Result<SsmInternals> {
    if !format.quantizes_activations() {
        return Ok(SsmInternals::Float);
    }
    Ok(match activations {
        SsmActivations::Float => SsmInternals::Float,
        SsmActivations::Int8PerToken => SsmInternals::Int8PerToken,
        SsmActivations::Int8Static => {
            let [z, conv_in, conv_out, dt] = block.internal_scales().map(|spec| tensor(&spec.name));
            SsmInternals::Int8Static(SsmScales { z: z?, conv_in: conv_in?, conv_out: conv_out?, dt: dt? })
        }
    })
}

impl<B: Backend> Block<B> {
    /// Loads block `index` of `checkpoint` as it is stored.
    pub fn load(backend: &B, checkpoint: &Checkpoint, index: usize) -> Result<Self> {
        let spec = &checkpoint.layout.blocks[index];
        Self::assemble(backend, &checkpoint.config, spec, &Stored { checkpoint, index })
    }

    /// Builds a block from the tensors of `source`.
    pub fn assemble(backend: &B, config: &Config, spec: &BlockSpec, source: &impl BlockSource) -> Result<Self> {
        let mixer_tensor = |name: &str| source.tensor(&format!("{}mixer.{name}", spec.prefix));
        let linear = |name: &str| {
            let linear = spec.linear(name).ok_or_else(|| Error::run(format!("block {} has no linear `{name}`", spec.index)))?;
            backend.prepare(source.linear(linear)?)
        };
        let mixer = match spec.kind {
            BlockKind::Ssm => {
                let mamba = &config.mamba;
                let shape = mamba_shape(mamba);
                let parameters = MambaParameters {
                    conv_weight: mixer_tensor("conv1d.weight")?,
                    conv_bias: if mamba.conv_bias { mixer_tensor("conv1d.bias")? } else { vec![0.0; mamba.conv_channels()] },
                    a: mixer_tensor("A_log")?.into_iter().map(|a_log| -a_log.exp()).collect(),
                    d: mixer_tensor("D")?,
                    dt_bias: mixer_tensor("dt_bias")?,
                    internals: source.internals(spec)?,
                    rotation: source.rotates_state().then(|| StateRotation::of(&shape)),
                };
                Mixer::Ssm(Box::new(Ssm {
                    shape,
                    in_proj: linear("in_proj")?,
                    parameters: backend.prepare_mamba(parameters)?,
                    norm: backend.prepare_vector(mixer_tensor("norm.weight")?)?,
                    out_proj: linear("out_proj")?,
                }))
            }
            BlockKind::Mlp => Mixer::Mlp(Mlp::new(String::new(), linear("up_proj")?, linear("down_proj")?)),
            BlockKind::Attention => Mixer::Attention(Box::new(Attention {
                shape: attention_shape(&config.attention),
                q: linear("q_proj")?,
                k: linear("k_proj")?,
                v: linear("v_proj")?,
                o: linear("o_proj")?,
            })),
            BlockKind::Moe => Mixer::Moe(Box::new(Moe::assemble(backend, &config.moe, &mixer_tensor, &linear, config.hidden_size)?)),
        };
        let norm = backend.prepare_vector(source.tensor(&format!("{}norm.weight", spec.prefix))?)?;
        Ok(Self { norm, eps: config.norm_eps, mixer })
    }

    /// An empty cache for `sequences` sequences.
    pub fn cache(&self, backend: &B, sequences: usize, formats: CacheFormats) -> BlockCache<B> {
        match &self.mixer {
            Mixer::Ssm(ssm) => BlockCache::Ssm(backend.ssm_cache(&ssm.parameters, &ssm.shape, sequences, formats)),
            Mixer::Attention(attention) => BlockCache::KeyValue(backend.kv_cache(&attention.shape, sequences, formats)),
            Mixer::Mlp(_) | Mixer::Moe(_) => BlockCache::None,
        }
    }

    /// The residual stream behind the block, `[tokens, hidden]`.
    pub fn forward(&self, backend: &B, h: B::Tensor, sequences: &Sequences, cache: Option<&mut BlockCache<B>>) -> Result<B::Tensor> {
        if is_long(sequences, cache.is_some()) {
            let mixed = self.mix_in_pieces(backend, &h, sequences, None)?;
            return backend.add(h, &mixed);
        }
        self.run(backend, &h.clone(), sequences, cache, None, Some(h))
    }

    /// What the block adds to the residual stream, `mixer(RMSNorm(h))`; `tap` sees every linear's input, of a long text
    /// piece by piece.
    pub fn mix(
        &self,
        backend: &B,
        h: &B::Tensor,
        sequences: &Sequences,
        cache: Option<&mut BlockCache<B>>,
        tap: Option<&Tap<'_, B>>,
    ) -> Result<B::Tensor> {
        if is_long(sequences, cache.is_some()) {
            return self.mix_in_pieces(backend, h, sequences, tap);
        }
        self.run(backend, h, sequences, cache, tap, None)
    }

    /// Hands `tap` what the linear of a state-space block in front reads, as [`Block::mix`] does, and computes nothing behind it.
    pub fn enter(&self, backend: &B, h: &B::Tensor, sequences: &Sequences, tap: &Tap<'_, B>) -> Result<()> {
        let Mixer::Ssm(ssm) = &self.mixer else { return Ok(()) };
        let see = |h: &B::Tensor| tap("in_proj", &backend.rms_norm(h, &self.norm, self.eps, backend.reads(&ssm.in_proj))?);
        if !is_long(sequences, false) {
            return see(h);
        }
        pieces(sequences).flatten().try_for_each(|tokens| see(&backend.gather_rows(h, &tokens)?))
    }

    /// Sequence after sequence in pieces that go on from a cache in full precision, so that what is held besides `h`
    /// and the result does not grow with the length (but for the keys and values of attention).
    fn mix_in_pieces(&self, backend: &B, h: &B::Tensor, sequences: &Sequences, tap: Option<&Tap<'_, B>>) -> Result<B::Tensor> {
        let mut mixed = Vec::new();
        for sequence in pieces(sequences) {
            let mut cache = self.cache(backend, 1, CacheFormats::default());
            for tokens in sequence {
                let piece = backend.gather_rows(h, &tokens)?;
                let out = self.run(backend, &piece, &Sequences::new(vec![tokens.len()]), Some(&mut cache), tap, None)?;
                mixed.extend(backend.download(&out)?);
            }
        }
        backend.upload(mixed, backend.features(h))
    }

    /// `into + mixer(RMSNorm(h))`, the same to the bit as the mixer's output added to it; or without `into` the mixer's output alone.
    #[allow(clippy::needless_pass_by_value, reason = "an optional exclusive reference is handed on")]
    fn run(
        &self,
        backend: &B,
        h: &B::Tensor,
        sequences: &Sequences,
        cache: Option<&mut BlockCache<B>>,
        tap: Option<&Tap<'_, B>>,
        into: Option<B::Tensor>,
    ) -> Result<B::Tensor> {
        let norm = |emit| backend.rms_norm(h, &self.norm, self.eps, emit);
        match &self.mixer {
            Mixer::Ssm(ssm) => {
                let cache = match cache {
                    Some(BlockCache::Ssm(cache)) => Some(cache),
                    _ => None,
                };
                let x = norm(backend.reads(&ssm.in_proj))?;
                observe::<B>(tap, "in_proj", &x)?;
                let projection = backend.project(&ssm.in_proj, &x, &ssm.parameters, &ssm.shape)?;
                let gated = backend.mamba_scan(&projection, &ssm.parameters, &ssm.shape, sequences, cache)?;
                let group = ssm.shape.inner() / ssm.shape.groups;
                let x = backend.group_norm(&gated, &ssm.norm, group, self.eps, backend.reads(&ssm.out_proj))?;
                observe::<B>(tap, "out_proj", &x)?;
                write(backend, into, &ssm.out_proj, &x)
            }
            Mixer::Mlp(mlp) => mlp.forward(backend, &norm(mlp.reads(backend))?, tap, into),
            Mixer::Attention(attention) => {
                let cache = match cache {
                    Some(BlockCache::KeyValue(cache)) => Some(cache),
                    _ => None,
                };
                let emit = [&attention.k, &attention.v].into_iter().fold(backend.reads(&attention.q), |emit, w| emit.and(backend.reads(w)));
                let x = norm(emit)?;
                for name in ["q_proj", "k_proj", "v_proj"] {
                    observe::<B>(tap, name, &x)?;
                }
                let (q, k, v) = (backend.linear(&attention.q, &x)?, backend.linear(&attention.k, &x)?, backend.linear(&attention.v, &x)?);
                let mixed = backend.attention(&q, &k, &v, &attention.shape, sequences, cache)?;
                let mixed = backend.emit(mixed, backend.reads(&attention.o))?;
                observe::<B>(tap, "o_proj", &mixed)?;
                write(backend, into, &attention.o, &mixed)
            }
            Mixer::Moe(moe) => {
                let mixed = moe.forward(backend, &norm(moe.reads(backend).and(Emit::FLOAT))?, tap)?;
                match into {
                    Some(into) => backend.add(into, &mixed),
                    None => Ok(mixed),
                }
            }
        }
    }

    /// Whether a decoding step through it can be recorded, because its launches are the same for every token.
    pub fn is_recordable(&self, backend: &B) -> bool {
        match &self.mixer {
            Mixer::Moe(moe) => moe.is_recordable(),
            Mixer::Attention(attention) => backend.records_attention(&attention.shape),
            Mixer::Ssm(_) | Mixer::Mlp(_) => true,
        }
    }

    /// Bytes of the block's linears that a step of so many tokens reads.
    pub fn read_bytes(&self, backend: &B, tokens: usize) -> u64 {
        match &self.mixer {
            Mixer::Moe(moe) => moe.read_bytes(backend, tokens),
            Mixer::Ssm(_) | Mixer::Mlp(_) | Mixer::Attention(_) => self.resident_bytes(backend),
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
    pub(super) fn new(prefix: String, up: B::Linear, down: B::Linear) -> Self {
        Self { prefix, up, down }
    }

    /// Its linears, up and down.
    pub(super) fn linears(&self) -> [&B::Linear; 2] {
        [&self.up, &self.down]
    }

    /// The form in which the first linear reads its input.
    pub(super) fn reads(&self, backend: &B) -> Emit {
        backend.reads(&self.up)
    }

    pub(super) fn forward(&self, backend: &B, x: &B::Activation, tap: Option<&Tap<'_, B>>, into: Option<B::Tensor>) -> Result<B::Tensor> {
        observe::<B>(tap, &format!("{}up_proj", self.prefix), x)?;
        let wide = backend.linear(&self.up, x)?;
        let x = backend.relu2(&wide, backend.reads(&self.down))?;
        observe::<B>(tap, &format!("{}down_proj", self.prefix), &x)?;
        write(backend, into, &self.down, &x)
    }

    pub(super) fn resident_bytes(&self, backend: &B) -> u64 {
        backend.resident_bytes(&self.up) + backend.resident_bytes(&self.down)
    }
}
