//! [`Format`]: bits of weights and activations. [`Scheme`]: how a matrix slice stores its weights.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Group sizes along the input, largest first; kernels support exactly these.
pub const GROUP_SIZES: [usize; 3] = [128, 64, 32];

/// Bits of a block's weights and activations; 16 means "float, as in the checkpoint".
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Format {
    weights: u8,
    activations: u8,
}

impl Format {
    pub const W16A16: Self = Self { weights: 16, activations: 16 };
    pub const W8A16: Self = Self { weights: 8, activations: 16 };
    pub const W8A8: Self = Self { weights: 8, activations: 8 };
    pub const W4A16: Self = Self { weights: 4, activations: 16 };
    pub const W4A8: Self = Self { weights: 4, activations: 8 };

    /// Every format that strata can store and run, widest first.
    pub const ALL: [Self; 5] = [Self::W16A16, Self::W8A16, Self::W8A8, Self::W4A16, Self::W4A8];

    /// Bits a weight takes, scales not counted.
    pub fn weight_bits(self) -> u8 {
        self.weights
    }

    /// Bits an activation takes when a linear of this format reads it.
    pub fn activation_bits(self) -> u8 {
        self.activations
    }

    /// Whether the linears read int8 activations.
    pub fn quantizes_activations(self) -> bool {
        self.activations == 8
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("w{}a{}", self.weights, self.activations))
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL
            .into_iter()
            .find(|format| format.to_string() == text)
            .ok_or_else(|| format!("unknown format `{text}`; the formats are {}", Self::ALL.map(|f| f.to_string()).join(", ")))
    }
}

impl TryFrom<String> for Format {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Format> for String {
    fn from(format: Format) -> Self {
        format.to_string()
    }
}

/// How a `[rows, cols]` slice of weights is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// The checkpoint's own floats, untouched.
    Float,
    /// int8 codes −127…127 with one f32 scale a row.
    Int8,
    /// int4 codes −8…7 with one bf16 scale for each `group` inputs of a row.
    Int4 { group: usize },
}

impl Scheme {
    /// The scheme for `weight_bits` (16, 8 or 4) on a matrix with `cols` inputs. 4 bits take the largest
    /// of [`GROUP_SIZES`] that divides the width; where none does, 8 bits per channel are used instead.
    pub fn for_width(weight_bits: u8, cols: usize) -> Self {
        match weight_bits {
            16 => Self::Float,
            4 => match GROUP_SIZES.into_iter().find(|group| cols.is_multiple_of(*group)) {
                Some(group) => Self::Int4 { group },
                None => Self::Int8,
            },
            _ => Self::Int8,
        }
    }

    /// Bits a code takes; 16 for float.
    pub fn bits(self) -> u8 {
        match self {
            Self::Float => 16,
            Self::Int8 => 8,
            Self::Int4 { .. } => 4,
        }
    }

    /// Largest positive code.
    pub fn max_code(self) -> i8 {
        match self {
            Self::Float => 0,
            Self::Int8 => 127,
            Self::Int4 { .. } => 7,
        }
    }

    /// Inputs that share a scale, for a matrix with `cols` inputs.
    pub fn group(self, cols: usize) -> usize {
        match self {
            Self::Int4 { group } => group,
            Self::Float | Self::Int8 => cols,
        }
    }

    /// Bytes stored for a `[rows, cols]` slice, scales included; `float_bytes` is the checkpoint's element size.
    pub fn stored_bytes(self, rows: usize, cols: usize, float_bytes: usize) -> u64 {
        let bytes = match self {
            Self::Float => rows * cols * float_bytes,
            Self::Int8 => rows * cols + 4 * rows,
            Self::Int4 { group } => rows * cols.div_ceil(8) * 4 + rows * (cols / group) * 2,
        };
        bytes as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats_round_trip_as_text_and_unknown_ones_name_the_known() {
        for format in Format::ALL {
            assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
        }
        assert!("w5a8".parse::<Format>().unwrap_err().contains("w16a16, w8a16, w8a8, w4a16, w4a8"));
    }

    #[test]
    fn group_size_is_the_largest_that_divides_the_width() {
        let groups = [4096, 3136, 15680, 1856, 160, 80].map(|cols| Scheme::for_width(4, cols));
        let group = |group| Scheme::Int4 { group };
        assert_eq!(groups, [group(128), group(64), group(64), group(64), group(32), Scheme::Int8]);
    }
}
