//! [`Format`]: bits of weights and activations. [`Scheme`]: how a matrix slice stores its weights.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::packing;

/// Group sizes along the input, largest first; kernels support exactly these.
pub const GROUP_SIZES: [usize; 3] = [128, 64, 32];

/// Bits of a block's weights and activations; 16 means "float, as in the checkpoint". Below 8 bits weights have a scale
/// for each group of inputs: the largest of [`GROUP_SIZES`] that divides the width, and no larger than what the format
/// names (`w2a16g64`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Format {
    weights: u8,
    activations: u8,
    /// Largest group; the largest there is unless the format's name says otherwise.
    group: u8,
}

impl Format {
    pub const W16A16: Self = Self::new(16, 16);
    pub const W8A16: Self = Self::new(8, 16);
    pub const W8A8: Self = Self::new(8, 8);
    pub const W4A16: Self = Self::new(4, 16);
    pub const W4A8: Self = Self::new(4, 8);
    pub const W3A16: Self = Self::new(3, 16);
    pub const W3A8: Self = Self::new(3, 8);
    pub const W2A16: Self = Self::new(2, 16);
    pub const W2A8: Self = Self::new(2, 8);

    /// Every pair of bits that strata can store and run, widest first; those below 8 bits come in smaller groups too.
    pub const ALL: [Self; 9] =
        [Self::W16A16, Self::W8A16, Self::W8A8, Self::W4A16, Self::W4A8, Self::W3A16, Self::W3A8, Self::W2A16, Self::W2A8];

    const fn new(weights: u8, activations: u8) -> Self {
        Self { weights, activations, group: GROUP_SIZES[0] as u8 }
    }

    /// The same bits in groups of at most `group` (one of [`GROUP_SIZES`]) inputs; without effect from 8 bits on.
    #[must_use]
    pub fn with_group(self, group: usize) -> Self {
        match GROUP_SIZES.into_iter().find(|size| *size == group) {
            Some(group) if self.weights < 8 => Self { group: group as u8, ..self },
            _ => self,
        }
    }

    /// Inputs that share a scale at most, below 8 bits.
    pub fn largest_group(self) -> usize {
        usize::from(self.group)
    }

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
        let group = if self.group == Self::W16A16.group { String::new() } else { format!("g{}", self.group) };
        f.pad(&format!("w{}a{}{group}", self.weights, self.activations))
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (bits, group) = text.split_once('g').map_or((text, None), |(bits, group)| (bits, Some(group)));
        let known = Self::ALL.into_iter().find(|format| format.to_string() == bits);
        let found = match (known, group.map(|group| GROUP_SIZES.into_iter().find(|size| size.to_string() == group))) {
            (Some(format), None) => Some(format),
            (Some(format), Some(Some(group))) if format.weights < 8 => Some(format.with_group(group)),
            _ => None,
        };
        found.ok_or_else(|| {
            let names = Self::ALL.map(|f| f.to_string()).join(", ");
            format!("unknown format `{text}`; the formats are {names}, those below 8 bits also with g64 or g32 behind for smaller groups")
        })
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
    /// Codes of `bits` (4: −8…7, 3: −4…3, 2: −2…1) with one bf16 scale for each `group` inputs of a row.
    Grouped { bits: u8, group: usize },
}

impl Scheme {
    /// The scheme for `format` on a matrix with `cols` inputs, where weights keep at least `min_bits`. Below 8 bits the
    /// group is the largest of [`GROUP_SIZES`] that divides the width and is not larger than the format's; where none
    /// does, 8 bits per channel are used instead.
    pub fn for_width(format: Format, min_bits: u8, cols: usize) -> Self {
        let fits = |group: &usize| *group <= format.largest_group() && cols.is_multiple_of(*group);
        match format.weight_bits().max(min_bits) {
            16 => Self::Float,
            8 => Self::Int8,
            bits => GROUP_SIZES.into_iter().find(fits).map_or(Self::Int8, |group| Self::Grouped { bits, group }),
        }
    }

    /// Bits a code takes; 16 for float.
    pub fn bits(self) -> u8 {
        match self {
            Self::Float => 16,
            Self::Int8 => 8,
            Self::Grouped { bits, .. } => bits,
        }
    }

    /// Largest positive code.
    pub fn max_code(self) -> i8 {
        match self {
            Self::Float => 0,
            Self::Int8 => 127,
            Self::Grouped { bits, .. } => (1 << (bits - 1)) - 1,
        }
    }

    /// Smallest code.
    pub fn min_code(self) -> i8 {
        match self {
            Self::Float | Self::Int8 => -self.max_code(),
            Self::Grouped { .. } => -self.max_code() - 1,
        }
    }

    /// Inputs that share a scale, for a matrix with `cols` inputs.
    pub fn group(self, cols: usize) -> usize {
        match self {
            Self::Grouped { group, .. } => group,
            Self::Float | Self::Int8 => cols,
        }
    }

    /// Bytes stored for a `[rows, cols]` slice, scales included; `float_bytes` is the checkpoint's element size.
    pub fn stored_bytes(self, rows: usize, cols: usize, float_bytes: usize) -> u64 {
        let bytes = match self {
            Self::Float => rows * cols * float_bytes,
            Self::Int8 => rows * cols + 4 * rows,
            Self::Grouped { bits, group } => rows * packing::words_in_row(cols, bits) * 4 + rows * (cols / group) * 2,
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
        assert_eq!("w2a16g64".parse::<Format>().unwrap(), Format::W2A16.with_group(64));
        assert_eq!("w4a8g128".parse::<Format>().unwrap(), Format::W4A8, "the default spelt out");
        for unknown in ["w5a8", "w8a8g64", "w4a8g48", "w4a8g", ""] {
            assert!(unknown.parse::<Format>().unwrap_err().contains("w16a16, w8a16, w8a8, w4a16, w4a8, w3a16"), "{unknown}");
        }
    }

    #[test]
    fn group_size_is_the_largest_that_divides_the_width() {
        let groups = [4096, 3136, 15680, 1856, 160, 80].map(|cols| Scheme::for_width(Format::W4A8, 2, cols));
        let group = |group| Scheme::Grouped { bits: 4, group };
        assert_eq!(groups, [group(128), group(64), group(64), group(64), group(32), Scheme::Int8]);
        assert_eq!(Scheme::for_width(Format::W2A16.with_group(64), 2, 4096), Scheme::Grouped { bits: 2, group: 64 });
        assert_eq!(Scheme::for_width(Format::W2A16, 8, 4096), Scheme::Int8);
    }

    #[test]
    fn codes_span_the_whole_range_of_their_bits() {
        let range = |bits| (Scheme::Grouped { bits, group: 32 }.min_code(), Scheme::Grouped { bits, group: 32 }.max_code());
        assert_eq!([range(4), range(3), range(2)], [(-8, 7), (-4, 3), (-2, 1)]);
        assert_eq!((Scheme::Int8.min_code(), Scheme::Int8.max_code()), (-127, 127));
    }
}
