//! Which tensors a model of a given config has: every linear with its slices, every other tensor, by block.
//!
//! Names here are canonical: without the `backbone.` or `model.` in front.

use super::config::Config;
use crate::format::{BlockKind, Format, NamePattern, Plan, Scheme, Transform};

/// Rows of a linear that have a meaning, and may have a format, of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceSpec {
    /// Empty for a linear that is one slice.
    pub name: &'static str,
    pub rows: usize,
    /// Fewest weight bits a quantized slice may have (`dt` stays at 8 or more).
    pub min_bits: u8,
}

/// A linear layer: `[rows, cols]` weights, rows being outputs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearSpec {
    /// Name inside its block's mixer (`in_proj`, `experts.3.up_proj`), or `lm_head`.
    pub name: String,
    /// Canonical tensor name without `.weight`.
    pub stem: String,
    pub rows: usize,
    pub cols: usize,
    pub bias: bool,
    pub slices: Vec<SliceSpec>,
    /// The online transform that may stand in front of it, with its block size.
    pub online: Option<(Transform, usize)>,
}

impl LinearSpec {
    fn new(prefix: &str, name: impl Into<String>, rows: usize, cols: usize, bias: bool) -> Self {
        let name = name.into();
        Self {
            stem: format!("{prefix}{name}"),
            name,
            rows,
            cols,
            bias,
            slices: vec![SliceSpec { name: "", rows, min_bits: 2 }],
            online: None,
        }
    }

    /// With a Hadamard transform of blocks of the largest power of two that divides `width` in front.
    fn behind(mut self, transform: Transform, width: usize) -> Self {
        self.online = Some((transform, 1 << width.trailing_zeros()));
        self
    }

    /// Block size of the Hadamard transform that the linear's input goes through when `transforms` are applied.
    pub fn hadamard(&self, transforms: &[Transform]) -> Option<usize> {
        self.online.filter(|(transform, _)| transforms.contains(transform)).map(|(_, block)| block)
    }

    /// The scheme of each slice when the whole linear has `format`.
    pub fn schemes(&self, format: Format) -> Vec<Scheme> {
        self.slices.iter().map(|slice| Scheme::for_width(format, slice.min_bits, self.cols)).collect()
    }

    /// The scheme of each slice under `plan`; `block` is the index of the linear's block.
    pub fn planned_schemes(&self, plan: &Plan, block: usize) -> Vec<Scheme> {
        let scheme = |slice: &SliceSpec| Scheme::for_width(plan.slice(block, &self.stem, slice.name), slice.min_bits, self.cols);
        self.slices.iter().map(scheme).collect()
    }

    /// Bytes stored in `schemes`, one a slice; scales included, bias not.
    pub fn bytes_in(&self, schemes: &[Scheme], float_bytes: usize) -> u64 {
        self.slices.iter().zip(schemes).map(|(slice, scheme)| scheme.stored_bytes(slice.rows, self.cols, float_bytes)).sum()
    }

    /// Bytes stored under `format`, scales included, bias not.
    pub fn stored_bytes(&self, format: Format, float_bytes: usize) -> u64 {
        self.bytes_in(&self.schemes(format), float_bytes)
    }

    /// Weights, bias not counted.
    pub fn weights(&self) -> u64 {
        (self.rows * self.cols) as u64
    }
}

/// A tensor that is not a linear's weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    pub name: String,
    pub shape: Vec<usize>,
}

impl TensorSpec {
    fn new(name: String, shape: &[usize]) -> Self {
        Self { name, shape: shape.to_vec() }
    }

    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64
    }
}

/// One block: norm and mixer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockSpec {
    pub index: usize,
    pub kind: BlockKind,
    /// Canonical prefix of the block's tensors, `layers.3.`.
    pub prefix: String,
    pub linears: Vec<LinearSpec>,
    pub others: Vec<TensorSpec>,
}

impl BlockSpec {
    /// Parameters of the block, norm included.
    pub fn parameters(&self) -> u64 {
        self.linears.iter().map(LinearSpec::weights).sum::<u64>() + self.float_parameters()
    }

    /// Parameters outside the linears' weights: they stay in float.
    pub fn float_parameters(&self) -> u64 {
        self.others.iter().map(TensorSpec::elements).sum()
    }

    /// Bytes its linears store under `format`.
    pub fn linear_bytes(&self, format: Format, float_bytes: usize) -> u64 {
        self.linears.iter().map(|linear| linear.stored_bytes(format, float_bytes)).sum()
    }

    /// Static scales of a state-space block's internals: of z, of the convolution's input and output, and of dt.
    pub fn internal_scales(&self) -> [TensorSpec; 4] {
        let rows = |slices: &[&str]| {
            let slice = |name: &&str| self.linear("in_proj")?.slices.iter().find(|slice| slice.name == *name).map(|slice| slice.rows);
            slices.iter().filter_map(slice).sum::<usize>()
        };
        let conv = rows(&["x", "B", "C"]);
        [("z", rows(&["z"])), ("conv_in", conv), ("conv_out", conv), ("dt", rows(&["dt"]))]
            .map(|(name, width)| TensorSpec::new(format!("{}mixer.{name}_scale", self.prefix), &[width]))
    }

    /// Bytes its linears store under `plan`.
    pub fn planned_bytes(&self, plan: &Plan, float_bytes: usize) -> u64 {
        self.linears.iter().map(|linear| linear.bytes_in(&linear.planned_schemes(plan, self.index), float_bytes)).sum()
    }

    /// The linear with this name inside the mixer.
    pub fn linear(&self, name: &str) -> Option<&LinearSpec> {
        self.linears.iter().find(|linear| linear.name == name)
    }
}

/// Every tensor of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// The embedding table `[vocabulary, hidden]`, seen as a linear so that it can be quantized by row.
    pub embedding: LinearSpec,
    /// The head; with tied embeddings it has no tensor of its own.
    pub head: LinearSpec,
    pub tied: bool,
    pub final_norm: TensorSpec,
    pub blocks: Vec<BlockSpec>,
    pub float_bytes: usize,
}

impl Layout {
    /// The layout of `config`.
    pub fn new(config: &Config) -> Self {
        let hidden = config.hidden_size;
        let blocks = config.blocks.iter().enumerate().map(|(index, kind)| block(config, index, *kind)).collect();
        Self {
            embedding: LinearSpec::new("", "embeddings", config.vocab_size, hidden, false),
            head: LinearSpec::new("", "lm_head", config.vocab_size, hidden, false),
            tied: config.tie_embeddings,
            final_norm: TensorSpec::new("norm_f.weight".into(), &[hidden]),
            blocks,
            float_bytes: config.float_bytes,
        }
    }

    /// Makes every linear one slice, at least as wide as its widest: what formats with one scheme a module can hold.
    pub fn merge_slices(&mut self) {
        for linear in self.blocks.iter_mut().flat_map(|block| &mut block.linears) {
            let min_bits = linear.slices.iter().map(|slice| slice.min_bits).max().unwrap_or(2);
            linear.slices = vec![SliceSpec { name: "", rows: linear.rows, min_bits }];
        }
    }

    /// Canonical names that `pattern` matches, of linears and of slices of linears, each with the index of its block.
    pub fn named(&self, pattern: &NamePattern) -> Vec<(String, usize)> {
        let slices = |linear: &LinearSpec| {
            let named = linear.slices.iter().filter(|slice| !slice.name.is_empty());
            named.map(|slice| format!("{}.{}", linear.stem, slice.name)).collect::<Vec<_>>()
        };
        let names = |linear: &LinearSpec| std::iter::once(linear.stem.clone()).chain(slices(linear)).collect::<Vec<_>>();
        let of_block = |block: &BlockSpec| block.linears.iter().flat_map(names).map(|name| (name, block.index)).collect::<Vec<_>>();
        self.blocks.iter().flat_map(of_block).filter(|(name, _)| pattern.matches(name)).collect()
    }

    /// Kinds of the blocks in order.
    pub fn kinds(&self) -> Vec<BlockKind> {
        self.blocks.iter().map(|block| block.kind).collect()
    }

    /// Parameters of the whole model (a tied head counts once).
    pub fn parameters(&self) -> u64 {
        let head = if self.tied { 0 } else { self.head.weights() };
        self.embedding.weights() + head + self.final_norm.elements() + self.blocks.iter().map(BlockSpec::parameters).sum::<u64>()
    }

    /// Bytes that the linears of the blocks store under `plan` (scales included).
    pub fn linear_bytes(&self, plan: &Plan) -> u64 {
        self.blocks.iter().map(|block| block.planned_bytes(plan, self.float_bytes)).sum()
    }

    /// Bytes of the whole model under `plan`: linears, embedding, head and what stays in float.
    pub fn total_bytes(&self, plan: &Plan) -> u64 {
        // A tied head is stored apart only when its format is not the embedding's.
        let shared_head = self.tied && plan.head == Format::W16A16 && plan.embedding == Format::W16A16;
        let head = if shared_head { 0 } else { self.head.stored_bytes(plan.head, self.float_bytes) };
        let float: u64 = self.blocks.iter().map(BlockSpec::float_parameters).sum::<u64>() + self.final_norm.elements();
        self.linear_bytes(plan) + self.embedding.stored_bytes(plan.embedding, self.float_bytes) + head + float * self.float_bytes as u64
    }

    /// Weights of the blocks' linears: what bits per weight are counted over.
    pub fn linear_weights(&self) -> u64 {
        self.blocks.iter().flat_map(|block| &block.linears).map(LinearSpec::weights).sum()
    }

    /// Stored bits per weight of the blocks' linears under `plan`.
    pub fn bits_per_weight(&self, plan: &Plan) -> f64 {
        #[allow(clippy::cast_precision_loss, reason = "a ratio for display")]
        let bits = 8.0 * self.linear_bytes(plan) as f64 / self.linear_weights() as f64;
        bits
    }
}

fn block(config: &Config, index: usize, kind: BlockKind) -> BlockSpec {
    let prefix = format!("layers.{index}.");
    let mixer = format!("{prefix}mixer.");
    let hidden = config.hidden_size;
    let linear = |name: &str, rows, cols, bias| LinearSpec::new(&mixer, name, rows, cols, bias);
    let mut others = vec![TensorSpec::new(format!("{prefix}norm.weight"), &[hidden])];
    let linears = match kind {
        BlockKind::Ssm => {
            let mamba = &config.mamba;
            let (inner, bc, heads, conv) = (mamba.inner(), mamba.bc(), mamba.heads, mamba.conv_channels());
            others.push(TensorSpec::new(format!("{mixer}conv1d.weight"), &[conv, 1, mamba.conv_kernel]));
            if mamba.conv_bias {
                others.push(TensorSpec::new(format!("{mixer}conv1d.bias"), &[conv]));
            }
            for name in ["A_log", "D", "dt_bias"] {
                others.push(TensorSpec::new(format!("{mixer}{name}"), &[heads]));
            }
            others.push(TensorSpec::new(format!("{mixer}norm.weight"), &[inner]));
            let mut in_proj = linear("in_proj", 2 * inner + 2 * bc + heads, hidden, mamba.proj_bias);
            in_proj.slices = [("z", inner, 2), ("x", inner, 2), ("B", bc, 2), ("C", bc, 2), ("dt", heads, 8)]
                .map(|(name, rows, min_bits)| SliceSpec { name, rows, min_bits })
                .to_vec();
            vec![in_proj, linear("out_proj", hidden, inner, mamba.proj_bias).behind(Transform::RotateOut, inner / mamba.groups)]
        }
        BlockKind::Mlp => {
            let mlp = &config.mlp;
            vec![
                linear("up_proj", mlp.intermediate, hidden, mlp.bias),
                linear("down_proj", hidden, mlp.intermediate, mlp.bias).behind(Transform::RotateRelu2, mlp.intermediate),
            ]
        }
        BlockKind::Attention => {
            let attention = &config.attention;
            let (q, kv) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
            vec![
                linear("q_proj", q, hidden, attention.bias),
                linear("k_proj", kv, hidden, attention.bias),
                linear("v_proj", kv, hidden, attention.bias),
                linear("o_proj", hidden, q, attention.bias),
            ]
        }
        BlockKind::Moe => {
            let moe = &config.moe;
            others.push(TensorSpec::new(format!("{mixer}gate.weight"), &[moe.experts, hidden]));
            others.push(TensorSpec::new(format!("{mixer}gate.e_score_correction_bias"), &[moe.experts]));
            let width = moe.latent.unwrap_or(hidden);
            let mut linears = Vec::with_capacity(2 * moe.experts + 4);
            for expert in 0..moe.experts {
                linears.push(linear(&format!("experts.{expert}.up_proj"), moe.intermediate, width, config.mlp.bias));
                let down = linear(&format!("experts.{expert}.down_proj"), width, moe.intermediate, config.mlp.bias);
                linears.push(down.behind(Transform::RotateRelu2, moe.intermediate));
            }
            if moe.shared_intermediate > 0 {
                linears.push(linear("shared_experts.up_proj", moe.shared_intermediate, hidden, config.mlp.bias));
                let down = linear("shared_experts.down_proj", hidden, moe.shared_intermediate, config.mlp.bias);
                linears.push(down.behind(Transform::RotateRelu2, moe.shared_intermediate));
            }
            if let Some(latent) = moe.latent {
                linears.push(linear("fc1_latent_proj", latent, hidden, config.mlp.bias));
                linears.push(linear("fc2_latent_proj", hidden, latent, config.mlp.bias));
            }
            linears
        }
    };
    for linear in linears.iter().filter(|linear| linear.bias) {
        others.push(TensorSpec::new(format!("{}.bias", linear.stem), &[linear.rows]));
    }
    BlockSpec { index, kind, prefix, linears, others }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published shapes' fields that matter, so that the test needs no file: (config text, parameters).
    #[test]
    fn eight_billion_shape_has_the_published_parameter_count_and_ratios() {
        let config = Config::parse(
            r#"{"model_type": "nemotron_h", "hidden_size": 4096, "vocab_size": 131072, "intermediate_size": 21504,
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", "mamba_num_heads": 128,
            "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "num_attention_heads": 32,
            "num_key_value_heads": 8, "attention_head_dim": 128}"#,
        )
        .unwrap();
        let layout = Layout::new(&config);
        assert_eq!(layout.parameters(), 8_100_852_736);
        let base = layout.total_bytes(&Plan::unquantized(52));
        let ratio = |embedding, head, block| {
            let plan = Plan { embedding, head, blocks: vec![block; 52], ..Plan::unquantized(0) };
            layout.total_bytes(&plan) as f64 / base as f64
        };
        assert!(ratio(Format::W8A16, Format::W8A8, Format::W8A8) <= 0.505);
        assert!(ratio(Format::W4A16, Format::W4A8, Format::W4A8) <= 0.265);
    }
}
