//! What is not a weight: scale kinds of int8 activations, the inside of a state-space mixer, and what is kept between
//! the tokens of a sequence.

use serde::{Deserialize, Serialize};

/// Where the scale of an int8 activation comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScaleKind {
    /// The largest magnitude of each token, at run time.
    #[default]
    PerToken,
    /// Fixed when the variant is made, from calibration.
    Static,
}

/// How z, x, B, C and dt pass through a Mamba-2 mixer whose block reads int8 activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SsmActivations {
    /// As floats.
    #[default]
    Float,
    /// As int8 codes, each slice with scales of its own found at run time.
    Int8PerToken,
    /// As int8 codes with scales from calibration.
    Int8Static,
}

/// How activations are rounded in blocks that read int8.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Activations {
    /// Inputs of linears.
    pub linears: ScaleKind,
    /// The inside of state-space mixers.
    pub ssm: SsmActivations,
}

/// How a cached value is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheFormat {
    #[default]
    F32,
    F16,
    Int8,
}

/// How caches are kept between calls. Nothing else depends on them: a whole text computed in one call is the same
/// under all.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CacheFormats {
    /// SSM state; int8 has a scale for each head and channel.
    pub state: CacheFormat,
    /// Inputs that the convolution still needs. A mixer with int8 internals keeps its codes, whatever is said here.
    pub conv: CacheFormat,
    /// Keys and values; int8 has a scale for each head and token.
    pub kv: CacheFormat,
}

impl CacheFormats {
    /// Whether decoding is rounded where whole texts are not.
    pub fn is_quantized(&self) -> bool {
        *self != Self::default()
    }
}

impl CacheFormat {
    /// Bytes of `values` values that share a scale in runs of `run`.
    pub fn bytes(self, values: u64, run: u64) -> u64 {
        match self {
            Self::F32 => 4 * values,
            Self::F16 => 2 * values,
            Self::Int8 => values + 4 * values.div_ceil(run),
        }
    }
}
