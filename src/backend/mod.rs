//! The operations a model needs, as one trait, and the machines that implement it.
//!
//! A tensor is a matrix `[tokens, features]` of f32. The tokens of several sequences lie one after another,
//! without padding; [`Sequences`] says where each begins. Start with [`Backend`].

mod choice;
pub mod cpu;
pub mod cuda;

pub use choice::DeviceChoice;

use std::borrow::Cow;

use faer::{MatMut, MatRef};

use crate::error::Result;
use crate::format::{CacheFormats, LinearWeights, QuantizedMatrix, Scheme, round_to_nearest};

/// Tokens of a chunk of the selective scan where C·B is an integer product; chunks begin where a call begins. A text that is
/// computed in several calls, each but the last of a multiple of this, is the same as in one call.
pub const SSM_CHUNK: usize = 64;

/// How the tokens of a batch divide into sequences, and which of them go on from the end of another one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sequences {
    lengths: Vec<usize>,
    /// For each sequence the one in front of it that it continues; empty when none does.
    parents: Vec<Option<usize>>,
}

impl Sequences {
    /// Sequences of these lengths, one after another.
    pub fn new(lengths: Vec<usize>) -> Self {
        Self { lengths, parents: Vec::new() }
    }

    /// Sequences of which some continue another, so that what several texts begin with is computed once. Sequence i
    /// sees the tokens of sequence `parents[i]`, which stands before it in the batch, and of that one's parents, as if
    /// they stood in front of its own. Trees are for whole texts: they take no cache.
    pub fn tree(lengths: Vec<usize>, parents: Vec<Option<usize>>) -> Self {
        assert_eq!(lengths.len(), parents.len(), "one parent for each sequence");
        assert!(parents.iter().enumerate().all(|(i, parent)| parent.is_none_or(|parent| parent < i)), "a parent stands in front");
        Self { lengths, parents }
    }

    /// Sequences of one token each: a decoding step.
    pub fn steps(count: usize) -> Self {
        Self::new(vec![1; count])
    }

    /// Number of sequences.
    pub fn count(&self) -> usize {
        self.lengths.len()
    }

    /// Tokens of all sequences.
    pub fn tokens(&self) -> usize {
        self.lengths.iter().sum()
    }

    /// Token range of each sequence.
    pub fn ranges(&self) -> impl Iterator<Item = std::ops::Range<usize>> {
        self.lengths.iter().scan(0, |start, length| {
            let range = *start..*start + length;
            *start = range.end;
            Some(range)
        })
    }

    /// The sequence that `index` continues.
    pub fn parent(&self, index: usize) -> Option<usize> {
        self.parents.get(index).copied().flatten()
    }

    /// Whether some sequence continues another.
    pub fn is_tree(&self) -> bool {
        self.parents.iter().any(Option::is_some)
    }
}

/// In which forms an operation hands its result to the linears that read it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Emit {
    pub float: bool,
    pub int8: bool,
    /// Static scale of the int8 form; `None`: absmax / 127 of each token.
    pub scale: Option<f32>,
    /// Orthonormal Hadamard transform of each block of so many features before the result is handed on.
    pub hadamard: Option<usize>,
}

impl Emit {
    /// Nothing yet: what [`Emit::and`] begins with.
    pub const NONE: Self = Self { float: false, int8: false, scale: None, hadamard: None };
    pub const FLOAT: Self = Self { float: true, int8: false, scale: None, hadamard: None };
    pub const INT8: Self = Self { float: false, int8: true, scale: None, hadamard: None };

    /// Both forms that either asks for. Readers of one input agree on its rotation and on its static scale.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        debug_assert!(self.hadamard == other.hadamard || self == Self::NONE || other == Self::NONE);
        debug_assert!(self.scale == other.scale || !self.int8 || !other.int8);
        Self {
            float: self.float || other.float,
            int8: self.int8 || other.int8,
            scale: self.scale.or(other.scale),
            hadamard: self.hadamard.or(other.hadamard),
        }
    }
}

/// Sizes of a Mamba-2 mixer. Its `in_proj` puts out rows of `z | x | B | C | dt`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MambaShape {
    pub heads: usize,
    pub head_dim: usize,
    pub groups: usize,
    pub state: usize,
    pub kernel: usize,
    pub dt_min: f32,
    pub dt_max: f32,
}

impl MambaShape {
    /// Channels of z, x and y.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of x | B | C, which the convolution sees.
    pub fn conv_channels(&self) -> usize {
        self.inner() + 2 * self.groups * self.state
    }

    /// Outputs of `in_proj`.
    pub fn projected(&self) -> usize {
        self.inner() + self.conv_channels() + self.heads
    }
}

/// In which form z, x, B, C and dt pass through a Mamba-2 mixer.
///
/// The int8 forms round four times, always code = round-half-even(v / scale) within ±127, 0 where the scale is 0:
/// 1. `in_proj`'s output (bias added), slice by slice: z, x | B | C, dt;
/// 2. the convolution's weights, one scale a channel ([`MambaParameters::conv_codes`]);
/// 3. the convolution's output behind SiLU, and behind the rotation if there is one: x, B, C.
///
/// The convolution and the products `C_i · B_j` of the tokens of a chunk are int8 × int8 → int32. z, x, dt and the
/// state are int8 in storage only: they meet float decays and gates, so their arithmetic is f32.
#[derive(Debug, Clone, PartialEq)]
pub enum SsmInternals {
    Float,
    /// One scale, absmax / 127, for each token and span of channels: of z and x a head, of B and C a state group, of dt
    /// all heads. A tap's integer product is scaled by the scale of the token it reads, and taps are added in f32,
    /// oldest first; then comes the weight's scale, then the bias.
    Int8PerToken,
    /// Scales from calibration. The convolution sums its taps in int32: `silu(acc · (s_in · s_w) + bias)`.
    Int8Static(SsmScales),
}

/// Static scales of a mixer's int8 internals.
#[derive(Debug, Clone, PartialEq)]
pub struct SsmScales {
    /// A channel, `[inner]`.
    pub z: Vec<f32>,
    /// A channel of x | B | C in front of the convolution, `[conv_channels]`.
    pub conv_in: Vec<f32>,
    /// A channel of x | B | C behind it, `[conv_channels]`; all channels of a state group have one scale in B, and one
    /// in C, for their products are summed as integers.
    pub conv_out: Vec<f32>,
    /// A head, `[heads]`.
    pub dt: Vec<f32>,
}

/// Orthonormal Hadamard transforms of x, B and C behind the convolution and SiLU, in blocks of so many channels (powers
/// of two): B and C of a group by one matrix U, x of a head by V. The scan then holds `V S Uᵀ`, its products with C
/// are unchanged, and V is undone on its output. Exact because a head decays by one scalar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateRotation {
    /// Block of B's and C's `state` channels.
    pub state: usize,
    /// Block of x's `head_dim` channels.
    pub head: usize,
}

impl StateRotation {
    /// The largest blocks that divide a mixer's state and head.
    pub fn of(shape: &MambaShape) -> Self {
        Self { state: 1 << shape.state.trailing_zeros(), head: 1 << shape.head_dim.trailing_zeros() }
    }
}

/// Small parameters of a Mamba-2 mixer.
#[derive(Debug, Clone)]
pub struct MambaParameters {
    /// `[conv_channels, kernel]`.
    pub conv_weight: Vec<f32>,
    /// `[conv_channels]`, zeros where the model has none.
    pub conv_bias: Vec<f32>,
    /// `[heads]` each; `a = −exp(A_log)`.
    pub a: Vec<f32>,
    pub d: Vec<f32>,
    pub dt_bias: Vec<f32>,
    pub internals: SsmInternals,
    pub rotation: Option<StateRotation>,
}

impl MambaParameters {
    /// The convolution's weights as int8 internals use them: codes `[conv_channels, kernel]`, a scale a channel.
    pub fn conv_codes(&self) -> QuantizedMatrix {
        let channels = self.conv_bias.len();
        round_to_nearest(&self.conv_weight, channels, self.conv_weight.len() / channels, Scheme::Int8)
    }
}

/// Sizes of an attention mixer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AttentionShape {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
}

/// How a router chooses experts from its scores `s = sigmoid(raw)`: by `s` + correction, first the best `top_groups` of
/// `groups` groups (a group's score is the sum of its two best), then the best experts in them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RouterShape {
    pub experts: usize,
    pub experts_per_token: usize,
    pub groups: usize,
    pub top_groups: usize,
    /// Divide the weights of a token's experts by their sum.
    pub normalize: bool,
    pub scaling: f32,
}

/// The tokens that chose an expert, in ascending order, with the weights of its outputs.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Assignment {
    pub tokens: Vec<usize>,
    pub weights: Vec<f32>,
}

/// How far one row of logits is from the reference's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Divergence {
    /// KL(reference ‖ other) in nats.
    pub kl: f64,
    /// Whether both find the same token most probable.
    pub same_top: bool,
}

/// Which side of weights `[outputs, inputs]` a rotation turns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Inputs,
    Outputs,
}

/// What GPTQ rounds: weights `[rows, cols]` under `scheme` by the Hessian `[cols, cols]` of their input.
pub struct Gptq<'a, G> {
    pub weights: &'a [f32],
    pub rows: usize,
    pub cols: usize,
    pub scheme: Scheme,
    /// Where it was summed.
    pub hessian: &'a G,
    /// `[cols]`.
    pub diagonal: &'a [f64],
    /// In which order columns are rounded.
    pub order: &'a [usize],
    /// What is added to the diagonal: the first that makes the Hessian positive definite.
    pub damping: &'a [f64],
    /// Times that coordinate descent goes through all codes behind it.
    pub sweeps: usize,
}

/// What GPTQ gives: codes `[rows, cols]` and scales `[rows, groups]`.
pub struct GptqCodes {
    pub codes: Vec<i8>,
    pub scales: Vec<f32>,
    /// Which damping was used; `None`: none served, and each weight was rounded for itself.
    pub damping: Option<usize>,
}

/// The operations of a Nemotron-H forward pass on one device.
pub trait Backend: Send + Sync + 'static {
    /// `[tokens, features]` in f32.
    type Tensor: Clone + Send + Sync;
    /// Weights of a linear, laid out for the device.
    type Linear: Send + Sync;
    /// The experts of a mixture, to be computed at once.
    type Experts: Send + Sync;
    /// An embedding table.
    type Embedding: Send + Sync;
    /// A row of float parameters on the device: a norm's weight.
    type Vector: Send + Sync;
    /// A decoding step that can be done again.
    type Recording: Send;
    /// What a linear reads: floats, int8 codes with a scale a token, or both.
    type Activation: Send + Sync;
    /// Small parameters of a Mamba-2 mixer on the device.
    type Mamba: Send + Sync;
    /// `in_proj`'s output z | x | B | C | dt in the form that the mixer's [`SsmInternals`] name.
    type Projection: Send;
    /// Convolution window and SSM state of some sequences.
    type SsmCache: Send;
    /// Keys and values of some sequences.
    type KvCache: Send;
    /// `Σ x xᵀ` of some activations, `[features, features]` in f64.
    type Gram: Send;

    /// What the results are computed by, for provenance: `cpu avx512-vnni`.
    fn name(&self) -> String;
    /// Names and versions of what computes on the device and is not built into this program.
    fn libraries(&self) -> Vec<(String, String)> {
        Vec::new()
    }

    /// Moves `values` `[rows, cols]` to the device.
    fn upload(&self, values: Vec<f32>, cols: usize) -> Result<Self::Tensor>;
    /// The values `[rows, cols]` of a tensor.
    fn download(&self, tensor: &Self::Tensor) -> Result<Vec<f32>>;
    /// The float form `[rows, cols]` of an activation that carries one.
    fn floats(&self, activation: &Self::Activation) -> Result<Vec<f32>>;
    /// Rows of a tensor.
    fn rows(&self, tensor: &Self::Tensor) -> usize;
    /// Features of a tensor.
    fn features(&self, tensor: &Self::Tensor) -> usize;

    /// Moves a row of float parameters to the device.
    fn prepare_vector(&self, values: Vec<f32>) -> Result<Self::Vector>;
    /// Lays out weights for the device.
    fn prepare(&self, weights: LinearWeights) -> Result<Self::Linear>;
    /// Bytes that prepared weights take on the device.
    fn resident_bytes(&self, linear: &Self::Linear) -> u64;
    /// The form in which `linear` reads its input.
    fn reads(&self, linear: &Self::Linear) -> Emit;

    /// Lays out an embedding table `[vocabulary, hidden]`.
    fn prepare_embedding(&self, table: LinearWeights) -> Result<Self::Embedding>;
    /// Bytes that an embedding table takes on the device.
    fn embedding_bytes(&self, table: &Self::Embedding) -> u64;
    /// Rows `ids` of an embedding table.
    fn embed(&self, table: &Self::Embedding, ids: &[u32]) -> Result<Self::Tensor>;
    /// `x Wᵀ + bias`: `[tokens, in]` to `[tokens, out]`.
    fn linear(&self, linear: &Self::Linear, x: &Self::Activation) -> Result<Self::Tensor>;
    /// `into + (x Wᵀ + bias)`, reusing `into`'s memory where possible.
    fn linear_add(&self, into: Self::Tensor, linear: &Self::Linear, x: &Self::Activation) -> Result<Self::Tensor> {
        self.add(into, &self.linear(linear, x)?)
    }
    /// Hands `x` on in the forms asked for.
    fn emit(&self, x: Self::Tensor, emit: Emit) -> Result<Self::Activation>;
    /// `x / rms(x) · weight` by row.
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Vector, eps: f32, emit: Emit) -> Result<Self::Activation> {
        self.group_norm(x, weight, self.features(x), eps, emit)
    }
    /// The same over `group` features at a time, which divides a row's.
    fn group_norm(&self, x: &Self::Tensor, weight: &Self::Vector, group: usize, eps: f32, emit: Emit) -> Result<Self::Activation>;
    /// `relu(x)²`.
    fn relu2(&self, x: &Self::Tensor, emit: Emit) -> Result<Self::Activation>;
    /// Computes what a backend put off until somebody reads `activation`: for whoever times it.
    fn settle(&self, _: &Self::Activation) -> Result<()> {
        Ok(())
    }
    /// `a + b`, reusing `a`'s memory where possible.
    fn add(&self, a: Self::Tensor, b: &Self::Tensor) -> Result<Self::Tensor>;

    /// Moves a mixer's small parameters to the device.
    fn prepare_mamba(&self, parameters: MambaParameters) -> Result<Self::Mamba>;
    /// An empty cache for `sequences` sequences.
    fn ssm_cache(&self, parameters: &Self::Mamba, shape: &MambaShape, sequences: usize, formats: CacheFormats) -> Self::SsmCache;
    /// Bytes that a cache takes now.
    fn ssm_cache_bytes(&self, cache: &Self::SsmCache) -> u64;
    /// The slices z | x | B | C | dt `[tokens, projected]` of a mixer: `in_proj` applied to x, rounded to int8 where
    /// the internals are.
    fn project(
        &self,
        in_proj: &Self::Linear,
        x: &Self::Activation,
        parameters: &Self::Mamba,
        shape: &MambaShape,
    ) -> Result<Self::Projection>;
    /// The selective scan between `in_proj` and the norm in front of `out_proj`: causal convolution and SiLU over x | B | C,
    /// rotation and rounding where the parameters say so, dt, state update and read-out with `D·x` added, rotation undone.
    /// Returns `y·silu(z)` `[tokens, inner]`: gated, the norm still to come. With a cache the sequences go on from it, and
    /// it is updated: state and window are rounded to their formats at the end of each call, and of nothing else.
    fn mamba_scan(
        &self,
        projection: &Self::Projection,
        parameters: &Self::Mamba,
        shape: &MambaShape,
        sequences: &Sequences,
        cache: Option<&mut Self::SsmCache>,
    ) -> Result<Self::Tensor>;

    /// Whether a decoding step with attention of this shape can be recorded.
    fn records_attention(&self, _: &AttentionShape) -> bool {
        true
    }
    /// An empty cache for `sequences` sequences. New keys and values are rounded to the format before any query sees
    /// them, so that a prefill in one call and token by token agree.
    fn kv_cache(&self, shape: &AttentionShape, sequences: usize, formats: CacheFormats) -> Self::KvCache;
    /// Bytes that a cache takes now.
    fn kv_cache_bytes(&self, cache: &Self::KvCache) -> u64;
    /// Causal grouped-query attention without positional encoding, scale head_dim^−½. q `[tokens, heads·d]`,
    /// k and v `[tokens, kv_heads·d]`; returns `[tokens, heads·d]`. With a cache, earlier keys are seen and new ones kept.
    fn attention(
        &self,
        q: &Self::Tensor,
        k: &Self::Tensor,
        v: &Self::Tensor,
        shape: &AttentionShape,
        sequences: &Sequences,
        cache: Option<&mut Self::KvCache>,
    ) -> Result<Self::Tensor>;

    /// What [`Backend::mixture`] needs of experts, their `[up, down]` each. `None`: they are computed one after another.
    fn prepare_experts(&self, experts: &[[&Self::Linear; 2]]) -> Result<Option<Self::Experts>>;
    /// What the experts that a router chooses make of x, `down(relu(up(x))²)`, each times its weight and added in ascending order
    /// of the experts: `[tokens, features]`. `raw`, `correction` and `shape` as for [`Backend::route`].
    fn mixture(
        &self,
        experts: &Self::Experts,
        x: &Self::Activation,
        raw: &Self::Tensor,
        correction: &Self::Vector,
        shape: &RouterShape,
    ) -> Result<Self::Tensor>;
    /// The experts of every token, by expert, from the router's raw outputs `[tokens, experts]`; `correction` `[experts]`
    /// counts for choosing, not for weighting.
    fn route(&self, raw: &Self::Tensor, correction: &Self::Vector, shape: &RouterShape) -> Result<Vec<Assignment>>;
    /// The rows `tokens` of an activation.
    fn gather(&self, x: &Self::Activation, tokens: &[usize]) -> Result<Self::Activation>;
    /// The rows `tokens` of a tensor.
    fn gather_rows(&self, x: &Self::Tensor, tokens: &[usize]) -> Result<Self::Tensor>;
    /// `into[tokens[i]] += weights[i] · x[i]`, in ascending i.
    fn scatter_add(&self, into: Self::Tensor, x: &Self::Tensor, tokens: &[usize], weights: &[f32]) -> Result<Self::Tensor>;

    /// Does `now`, and beside it, where the device can, `ahead`, which makes what later work reads: weights, nothing that is computed. What
    /// it makes is ready when this returns. A device's copies for `ahead` are not held up by what `now` launches.
    fn beside<T: Send>(&self, ahead: impl FnOnce(&Self) -> Result<T> + Send, now: impl FnOnce() -> Result<()>) -> Result<T>
    where
        Self: Sized,
    {
        now()?;
        ahead(self)
    }

    /// Does `step`, a decoding step whose launches do not depend on the token ids, so that [`Backend::replay`] can do it
    /// again. `None`, with nothing done: this device does not record.
    fn record(&self, step: &mut dyn FnMut() -> Result<Self::Tensor>) -> Result<Option<(Self::Recording, Self::Tensor)>>;
    /// Does a recorded step again, for the token ids `ids`; its result holds until the next one. `None`, with nothing
    /// done: a cache has moved since, and the step must be recorded again.
    fn replay(&self, recording: &mut Self::Recording, ids: &[u32]) -> Result<Option<Self::Tensor>>;

    /// Seconds that `run` takes on the device: the mean of `repeats`, after one that is not counted.
    fn time(&self, repeats: usize, run: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        run()?;
        let start = std::time::Instant::now();
        for _ in 0..repeats {
            run()?;
        }
        Ok(start.elapsed().as_secs_f64() / repeats as f64)
    }
    /// Seconds that copying `bytes` bytes within the device's memory takes.
    fn copy_seconds(&self, bytes: usize) -> Result<f64>;
    /// Bytes of the device that are free now; `None` where it is the process's memory.
    fn free_bytes(&self) -> Result<Option<u64>> {
        Ok(None)
    }
    /// Most memory of the device that was in use since [`Backend::reset_peak`]; `None` where it is the process's.
    fn peak_bytes(&self) -> Option<u64>;
    /// Gives unused memory back and begins to watch anew.
    fn reset_peak(&self) -> Result<()>;

    /// Adds `x_t x_tᵀ` of every token of the float form of an activation; the first one makes the sum.
    fn add_gram(&self, sum: &mut Option<Self::Gram>, x: &Self::Activation) -> Result<()>;
    /// The values of a sum, on the host.
    fn gram_values<'a>(&self, sum: &'a Self::Gram) -> Result<Cow<'a, [f64]>>;
    /// Its diagonal, on the host. Where that is finite the whole sum is: |Σ x y| is at most the larger of Σ x² and Σ y².
    fn gram_diagonal(&self, sum: &Self::Gram) -> Result<Vec<f64>>;
    /// `Σ_t x_t x_tᵀ` `[features, features]` of the float form of an activation, in f64.
    fn gram(&self, x: &Self::Activation) -> Result<Vec<f64>> {
        let mut sum = None;
        self.add_gram(&mut sum, x)?;
        sum.map_or_else(|| Ok(Vec::new()), |sum| Ok(self.gram_values(&sum)?.into_owned()))
    }
    /// GPTQ on the device. `None`, with nothing done: it has no kernels for that.
    fn gptq(&self, _: &Gptq<'_, Self::Gram>) -> Result<Option<GptqCodes>> {
        Ok(None)
    }
    /// Turns weights on the host in f64 by a square `rotation` Q: `W ← W Q`, or `W ← Qᵀ W`.
    fn turn(&self, weights: MatMut<'_, f64>, rotation: MatRef<'_, f64>, side: Side) -> Result<()>;
    /// Largest magnitude of each feature of the float form of an activation, NaN where a value is none.
    fn largest_magnitudes(&self, x: &Self::Activation) -> Result<Vec<f32>>;
    /// Adds `Σ (a − b)²` and `Σ a²` over all values to `sums`.
    fn add_difference(&self, a: &Self::Tensor, b: &Self::Tensor, sums: &mut (f64, f64)) -> Result<()>;
    /// 32 bytes that differ where values or their places do, made on the device; an error when a value is not finite. `None`:
    /// the host makes them.
    fn digest(&self, _: &Self::Tensor) -> Result<Option<[u8; 32]>> {
        Ok(None)
    }
    /// Of a mixer with float internals: largest magnitude of each channel of `in_proj` applied to x, and of x | B | C behind
    /// convolution, SiLU and rotation; of one sequence, which goes on from `cache`'s window. `None`, with nothing done: the
    /// host sees to it.
    fn mixer_magnitudes(
        &self,
        _in_proj: &Self::Linear,
        _x: &Self::Activation,
        _parameters: &Self::Mamba,
        _shape: &MambaShape,
        _cache: &mut Self::SsmCache,
    ) -> Result<Option<[Vec<f32>; 2]>> {
        Ok(None)
    }
    /// `1 − Σ p²` over the probabilities of each row of logits.
    fn undecidedness(&self, logits: &Self::Tensor) -> Result<Vec<f64>>;

    /// For each (row, token) of `targets`: the log-probability of `token` under that row of logits, and whether it is
    /// the most probable one.
    fn log_probabilities(&self, logits: &Self::Tensor, targets: &[(usize, u32)]) -> Result<Vec<(f64, bool)>>;
    /// Index of the first largest logit of each row.
    fn argmax(&self, logits: &Self::Tensor) -> Result<Vec<u32>>;
    /// Divergence of every row of `logits` from the same row of `reference`.
    fn divergence(&self, reference: &Self::Tensor, logits: &Self::Tensor) -> Result<Vec<Divergence>>;
}
