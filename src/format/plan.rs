//! [`Plan`]: a format for every block, the embedding and the head; [`Selector`]: which of them a rule means.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::Format;

/// What a block's mixer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BlockKind {
    /// Mamba-2 state-space mixer.
    Ssm,
    /// Dense relu² MLP.
    Mlp,
    /// Grouped-query attention.
    Attention,
    /// Mixture of relu² experts.
    Moe,
}

impl BlockKind {
    pub const ALL: [Self; 4] = [Self::Ssm, Self::Mlp, Self::Attention, Self::Moe];

    /// The word used in files and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ssm => "ssm",
            Self::Mlp => "mlp",
            Self::Attention => "attention",
            Self::Moe => "moe",
        }
    }

    /// The letter of `hybrid_override_pattern`.
    pub fn letter(self) -> char {
        match self {
            Self::Ssm => 'M',
            Self::Mlp => '-',
            Self::Attention => '*',
            Self::Moe => 'E',
        }
    }
}

impl fmt::Display for BlockKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// The format of every block of a model, of its embedding and of its head.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Weights only: activations of an embedding are token ids. Written like a block's format, `w8a16`.
    pub embedding: Format,
    pub head: Format,
    pub blocks: Vec<Format>,
}

impl Plan {
    /// The plan that leaves `blocks` blocks as they are in the checkpoint.
    pub fn unquantized(blocks: usize) -> Self {
        Self { embedding: Format::W16A16, head: Format::W16A16, blocks: vec![Format::W16A16; blocks] }
    }

    /// Gives `format` to everything that `selector` means; returns how many blocks (or embedding, head) it met.
    pub fn set(&mut self, selector: Selector, kinds: &[BlockKind], format: Format) -> usize {
        match selector {
            Selector::Embedding => self.embedding = embedding_format(format),
            Selector::Head => self.head = format,
            Selector::Kind(_) | Selector::Blocks(..) => {
                let mut met = 0;
                for (index, block) in self.blocks.iter_mut().enumerate() {
                    if selector.meets(index, kinds[index]) {
                        *block = format;
                        met += 1;
                    }
                }
                return met;
            }
        }
        1
    }

    /// How many neighbouring blocks read activations of different bits: the precision transitions.
    pub fn activation_transitions(&self) -> usize {
        self.blocks.windows(2).filter(|pair| pair[0].activation_bits() != pair[1].activation_bits()).count()
    }
}

/// An embedding reads token ids, so only the bits of its weights count.
fn embedding_format(format: Format) -> Format {
    match format.weight_bits() {
        8 => Format::W8A16,
        4 => Format::W4A16,
        _ => Format::W16A16,
    }
}

/// What an override matches: `kind:ssm`, `block:3`, `block:3-7`, `embedding` or `head`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Selector {
    Kind(BlockKind),
    /// First and last block, both included.
    Blocks(usize, usize),
    Embedding,
    Head,
}

impl Selector {
    fn meets(self, index: usize, block_kind: BlockKind) -> bool {
        match self {
            Self::Kind(kind) => kind == block_kind,
            Self::Blocks(first, last) => (first..=last).contains(&index),
            Self::Embedding | Self::Head => false,
        }
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kind(kind) => write!(f, "kind:{kind}"),
            Self::Blocks(first, last) if first == last => write!(f, "block:{first}"),
            Self::Blocks(first, last) => write!(f, "block:{first}-{last}"),
            Self::Embedding => f.write_str("embedding"),
            Self::Head => f.write_str("head"),
        }
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || {
            format!("unknown selector `{text}`; write kind:ssm, kind:mlp, kind:attention, kind:moe, block:3, block:3-7, embedding or head")
        };
        match text.split_once(':') {
            None if text == "embedding" => Ok(Self::Embedding),
            None if text == "head" => Ok(Self::Head),
            Some(("kind", name)) => BlockKind::ALL.into_iter().find(|kind| kind.name() == name).map(Self::Kind).ok_or_else(unknown),
            Some(("block", range)) => {
                let (first, last) = range.split_once('-').unwrap_or((range, range));
                match (first.parse(), last.parse()) {
                    (Ok(first), Ok(last)) if first <= last => Ok(Self::Blocks(first, last)),
                    _ => Err(unknown()),
                }
            }
            _ => Err(unknown()),
        }
    }
}

impl TryFrom<String> for Selector {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Selector> for String {
    fn from(selector: Selector) -> Self {
        selector.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_round_trip_and_select() {
        let kinds = [BlockKind::Ssm, BlockKind::Mlp, BlockKind::Ssm];
        let mut plan = Plan::unquantized(3);
        for (text, met) in [("kind:ssm", 2), ("block:1", 1), ("block:1-2", 2), ("head", 1), ("embedding", 1), ("kind:moe", 0)] {
            let selector: Selector = text.parse().unwrap();
            assert_eq!(selector.to_string(), text);
            assert_eq!(plan.set(selector, &kinds, Format::W4A8), met, "{text}");
        }
        assert_eq!(plan.embedding, Format::W4A16, "an embedding has no activations to quantize");
        assert!("block:7-3".parse::<Selector>().is_err());
    }
}
