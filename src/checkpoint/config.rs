//! `config.json` of the Nemotron-H family, in every spelling that published checkpoints use.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::format::BlockKind;

/// Longest sequence of a model that names none: the default of transformers' `NemotronHConfig`, where lm-evaluation-harness
/// finds it.
const DEFAULT_POSITIONS: usize = 4096;

/// Shape and constants of a model. See DESIGN 3 for what each field does in the equations.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    pub hidden_size: usize,
    pub vocab_size: usize,
    pub blocks: Vec<BlockKind>,
    pub norm_eps: f32,
    /// Longest sequence that the model is made for.
    pub max_positions: usize,
    pub tie_embeddings: bool,
    pub bos_token: Option<u32>,
    pub eos_token: Option<u32>,
    /// Bytes of an element in the checkpoint's declared precision (2 for bf16 and f16, 4 for f32).
    pub float_bytes: usize,
    pub mamba: MambaConfig,
    pub attention: AttentionConfig,
    pub mlp: MlpConfig,
    pub moe: MoeConfig,
}

/// Mamba-2 mixer. `inner = heads × head_dim`; head h reads state group ⌊h / (heads/groups)⌋.
#[derive(Debug, Clone, PartialEq)]
pub struct MambaConfig {
    pub heads: usize,
    pub head_dim: usize,
    pub groups: usize,
    pub state: usize,
    pub conv_kernel: usize,
    pub conv_bias: bool,
    pub proj_bias: bool,
    /// Limits of dt after softplus.
    pub dt_min: f32,
    pub dt_max: f32,
}

impl MambaConfig {
    /// Channels of x, z and y.
    pub fn inner(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Channels of B, and of C.
    pub fn bc(&self) -> usize {
        self.groups * self.state
    }

    /// Channels that the convolution sees: x | B | C.
    pub fn conv_channels(&self) -> usize {
        self.inner() + 2 * self.bc()
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct AttentionConfig {
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub bias: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct MlpConfig {
    pub intermediate: usize,
    pub bias: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct MoeConfig {
    pub experts: usize,
    pub experts_per_token: usize,
    pub groups: usize,
    pub top_groups: usize,
    pub intermediate: usize,
    /// Width of the shared expert, all shared experts together; 0 when there is none.
    pub shared_intermediate: usize,
    /// Width of the latent space the routed experts work in, if any.
    pub latent: Option<usize>,
    pub normalize: bool,
    pub scaling: f32,
}

/// `config.json` as it stands; every field that some published file lacks is optional.
#[derive(Deserialize)]
struct Raw {
    model_type: Option<String>,
    #[serde(default)]
    architectures: Vec<String>,
    hidden_size: usize,
    vocab_size: usize,
    num_hidden_layers: Option<usize>,
    layers_block_type: Option<Vec<String>>,
    hybrid_override_pattern: Option<String>,
    #[serde(alias = "rms_norm_eps", alias = "norm_eps")]
    layer_norm_epsilon: Option<f64>,
    max_position_embeddings: Option<usize>,
    #[serde(default)]
    tie_word_embeddings: bool,
    bos_token_id: Option<u32>,
    eos_token_id: Option<Value>,
    #[serde(alias = "torch_dtype")]
    dtype: Option<String>,
    mamba_num_heads: Option<usize>,
    mamba_head_dim: Option<usize>,
    n_groups: Option<usize>,
    ssm_state_size: Option<usize>,
    conv_kernel: Option<usize>,
    use_conv_bias: Option<bool>,
    #[serde(default)]
    use_bias: bool,
    #[serde(default)]
    mamba_proj_bias: bool,
    time_step_limit: Option<(JsonFloat, JsonFloat)>,
    num_attention_heads: Option<usize>,
    num_key_value_heads: Option<usize>,
    #[serde(alias = "attention_head_dim")]
    head_dim: Option<usize>,
    #[serde(default)]
    attention_bias: bool,
    intermediate_size: Option<usize>,
    #[serde(default)]
    mlp_bias: bool,
    n_routed_experts: Option<usize>,
    num_experts_per_tok: Option<usize>,
    n_group: Option<usize>,
    topk_group: Option<usize>,
    moe_intermediate_size: Option<usize>,
    moe_shared_expert_intermediate_size: Option<usize>,
    n_shared_experts: Option<usize>,
    moe_latent_size: Option<usize>,
    norm_topk_prob: Option<bool>,
    routed_scaling_factor: Option<f64>,
}

/// A number, or transformers' `{"__float__": "Infinity"}`.
#[derive(Deserialize)]
#[serde(untagged)]
enum JsonFloat {
    Number(f64),
    Named {
        #[serde(rename = "__float__")]
        name: String,
    },
}

impl JsonFloat {
    fn value(&self) -> Option<f64> {
        match self {
            Self::Number(value) => Some(*value),
            Self::Named { name } => match name.as_str() {
                "Infinity" => Some(f64::INFINITY),
                "-Infinity" => Some(f64::NEG_INFINITY),
                _ => None,
            },
        }
    }
}

impl Config {
    /// Reads a `config.json`.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).map_err(|error| Error::io("reading", path, &error))?;
        Self::parse(&text).map_err(|error| error.context(path.display()))
    }

    /// Parses the text of a `config.json`.
    pub fn parse(text: &str) -> Result<Self> {
        let value: Value =
            serde_json::from_str(&quote_bare_infinity(text)).map_err(|error| Error::input(format!("not valid JSON: {error}")))?;
        let family = value.get("model_type").and_then(Value::as_str).unwrap_or("").to_owned();
        if family != "nemotron_h" {
            let found = if family.is_empty() { "none".to_owned() } else { format!("`{family}`") };
            return Err(Error::input(format!("model_type is {found}, and strata reads `nemotron_h`"))
                .hint("give a checkpoint of the Nemotron-H family, or `demo` for the embedded one"));
        }
        let raw: Raw = serde_json::from_value(value).map_err(|error| Error::input(format!("unusable field: {error}")))?;
        raw.build()
    }
}

impl Raw {
    fn build(self) -> Result<Config> {
        debug_assert!(self.model_type.is_some() || self.architectures.is_empty());
        let blocks = self.blocks()?;
        let has = |kind| blocks.contains(&kind);
        let need = |value: Option<usize>, kind: BlockKind, name: &str| match value {
            Some(0) if has(kind) => Err(Error::input(format!("`{name}` is 0, and the model has {kind} blocks"))),
            None if has(kind) => Err(Error::input(format!("`{name}` is missing, and the model has {kind} blocks"))),
            value => Ok(value.unwrap_or(0)),
        };
        let heads = need(self.num_attention_heads, BlockKind::Attention, "num_attention_heads")?;
        let mamba = MambaConfig {
            heads: need(self.mamba_num_heads, BlockKind::Ssm, "mamba_num_heads")?,
            head_dim: need(self.mamba_head_dim, BlockKind::Ssm, "mamba_head_dim")?,
            groups: need(self.n_groups, BlockKind::Ssm, "n_groups")?,
            state: need(self.ssm_state_size, BlockKind::Ssm, "ssm_state_size")?,
            conv_kernel: self.conv_kernel.unwrap_or(4),
            conv_bias: self.use_conv_bias.unwrap_or(true),
            proj_bias: self.use_bias || self.mamba_proj_bias,
            dt_min: limit(self.time_step_limit.as_ref().map(|limits| &limits.0), 0.0)?,
            dt_max: limit(self.time_step_limit.as_ref().map(|limits| &limits.1), f64::INFINITY)?,
        };
        if has(BlockKind::Ssm) && !mamba.heads.is_multiple_of(mamba.groups) {
            return Err(Error::input(format!("{} Mamba heads cannot be shared by {} groups", mamba.heads, mamba.groups)));
        }
        let attention = AttentionConfig {
            heads,
            kv_heads: self.num_key_value_heads.unwrap_or(heads),
            head_dim: self.head_dim.unwrap_or(self.hidden_size.checked_div(heads).unwrap_or(0)),
            bias: self.attention_bias,
        };
        if has(BlockKind::Attention) && (attention.kv_heads == 0 || !heads.is_multiple_of(attention.kv_heads)) {
            return Err(Error::input(format!("{heads} attention heads cannot share {} key/value heads", attention.kv_heads)));
        }
        let moe = MoeConfig {
            experts: need(self.n_routed_experts, BlockKind::Moe, "n_routed_experts")?,
            experts_per_token: need(self.num_experts_per_tok, BlockKind::Moe, "num_experts_per_tok")?,
            groups: self.n_group.unwrap_or(1),
            top_groups: self.topk_group.unwrap_or(1),
            intermediate: need(self.moe_intermediate_size, BlockKind::Moe, "moe_intermediate_size")?,
            shared_intermediate: match self.n_shared_experts {
                Some(0) => 0,
                // The width stands for all shared experts together, as in the reference implementation.
                _ => self.moe_shared_expert_intermediate_size.unwrap_or(0),
            },
            latent: self.moe_latent_size,
            normalize: self.norm_topk_prob.unwrap_or(true),
            #[allow(clippy::cast_possible_truncation, reason = "the model computes in f32")]
            scaling: self.routed_scaling_factor.unwrap_or(1.0) as f32,
        };
        if has(BlockKind::Moe) && (moe.experts_per_token > moe.experts || moe.groups == 0 || !moe.experts.is_multiple_of(moe.groups)) {
            return Err(Error::input(format!(
                "{} experts in {} groups with {} chosen for a token is not possible",
                moe.experts, moe.groups, moe.experts_per_token
            )));
        }
        let mlp = MlpConfig { intermediate: need(self.intermediate_size, BlockKind::Mlp, "intermediate_size")?, bias: self.mlp_bias };
        Ok(Config {
            hidden_size: self.hidden_size,
            vocab_size: self.vocab_size,
            #[allow(clippy::cast_possible_truncation, reason = "the model computes in f32")]
            norm_eps: self.layer_norm_epsilon.unwrap_or(1e-5) as f32,
            max_positions: self.max_position_embeddings.unwrap_or(DEFAULT_POSITIONS),
            tie_embeddings: self.tie_word_embeddings,
            bos_token: self.bos_token_id,
            eos_token: first_token(self.eos_token_id.as_ref()),
            float_bytes: if self.dtype.as_deref() == Some("float32") { 4 } else { 2 },
            mamba,
            attention,
            mlp,
            moe,
            blocks,
        })
    }

    fn blocks(&self) -> Result<Vec<BlockKind>> {
        let blocks: Vec<BlockKind> = if let Some(names) = &self.layers_block_type {
            names.iter().enumerate().map(|(index, name)| kind_by_name(index, name)).collect::<Result<_>>()?
        } else if let Some(pattern) = &self.hybrid_override_pattern {
            pattern.chars().enumerate().map(|(index, letter)| kind_by_letter(index, letter)).collect::<Result<_>>()?
        } else {
            return Err(Error::input("neither `layers_block_type` nor `hybrid_override_pattern` is there")
                .hint("one of them says which mixer each layer has"));
        };
        match self.num_hidden_layers {
            _ if blocks.is_empty() => Err(Error::input("the model has no layers")),
            Some(layers) if layers != blocks.len() => {
                Err(Error::input(format!("num_hidden_layers is {layers}, and the pattern names {} layers", blocks.len())))
            }
            _ => Ok(blocks),
        }
    }
}

fn kind_by_name(index: usize, name: &str) -> Result<BlockKind> {
    match name {
        "linear_attention" | "mamba" => Ok(BlockKind::Ssm),
        "full_attention" | "attention" => Ok(BlockKind::Attention),
        "mlp" => Ok(BlockKind::Mlp),
        "moe" => Ok(BlockKind::Moe),
        other => Err(Error::input(format!("layer {index} has the unknown type `{other}`"))
            .hint("known: linear_attention or mamba, full_attention or attention, mlp, moe")),
    }
}

fn kind_by_letter(index: usize, letter: char) -> Result<BlockKind> {
    BlockKind::ALL.into_iter().find(|kind| kind.letter() == letter).ok_or_else(|| {
        Error::input(format!("layer {index} of hybrid_override_pattern has the unknown letter `{letter}`"))
            .hint("known: M (Mamba-2), * (attention), - (MLP), E (mixture of experts)")
    })
}

fn limit(value: Option<&JsonFloat>, default: f64) -> Result<f32> {
    let value = value.map_or(Some(default), JsonFloat::value).ok_or_else(|| Error::input("`time_step_limit` is not a pair of numbers"))?;
    #[allow(clippy::cast_possible_truncation, reason = "the model computes in f32")]
    Ok(value as f32)
}

/// `eos_token_id` is a number or a list of them.
fn first_token(value: Option<&Value>) -> Option<u32> {
    let value = value?;
    let number = value.as_u64().or_else(|| value.get(0)?.as_u64())?;
    u32::try_from(number).ok()
}

/// The JSON of a `config.json`, bare `Infinity` included.
pub fn parse_config_json(text: &str) -> Result<Value> {
    serde_json::from_str(&quote_bare_infinity(text)).map_err(|error| Error::input(format!("not valid JSON: {error}")))
}

/// Python writes a bare `Infinity`, which JSON lacks: turns it into the object spelling.
fn quote_bare_infinity(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    let mut in_string = false;
    while let Some(first) = rest.chars().next() {
        if !in_string && let Some(after) = rest.strip_prefix("Infinity") {
            out.push_str("{\"__float__\": \"Infinity\"}");
            rest = after;
            continue;
        }
        let mut width = first.len_utf8();
        if in_string && first == '\\' {
            width += rest[width..].chars().next().map_or(0, char::len_utf8);
        } else if first == '"' {
            in_string = !in_string;
        }
        out.push_str(&rest[..width]);
        rest = &rest[width..];
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"{"model_type": "nemotron_h", "hidden_size": 8, "vocab_size": 16, "hybrid_override_pattern": "M*-",
        "mamba_num_heads": 2, "mamba_head_dim": 4, "n_groups": 1, "ssm_state_size": 4, "num_attention_heads": 2,
        "attention_head_dim": 4, "intermediate_size": 16, "time_step_limit": [0.0, Infinity], "note": "Infinity \" Infinity"}"#;

    #[test]
    fn bare_infinity_and_both_head_dim_spellings_are_read() {
        let config = Config::parse(MINIMAL).unwrap();
        assert!(config.mamba.dt_max.is_infinite());
        assert_eq!(config.attention.head_dim, 4);
        assert_eq!(config.blocks, [BlockKind::Ssm, BlockKind::Attention, BlockKind::Mlp]);
        assert_eq!(config.max_positions, 4096);
    }

    #[test]
    fn unusable_configs_say_what_is_wrong() {
        for (from, to, expected) in [
            ("nemotron_h", "llama", "model_type is `llama`"),
            ("M*-", "M*X", "unknown letter `X`"),
            (r#""intermediate_size": 16"#, r#""other": 1"#, "`intermediate_size` is missing"),
            ("\"hidden_size\": 8,", "", "hidden_size"),
        ] {
            let error = Config::parse(&MINIMAL.replace(from, to)).unwrap_err();
            assert!(error.message.contains(expected), "{from} → {to}: {error}");
        }
    }
}
