//! [`Plan`]: a format for every block, the embedding and the head; [`Selector`]: which of them a rule means.

use std::collections::BTreeMap;
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

/// The format of every block of a model, of its embedding and of its head, and of single linears where they differ.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Weights only: activations of an embedding are token ids. Written like a block's format, `w8a16`.
    pub embedding: Format,
    pub head: Format,
    pub blocks: Vec<Format>,
    /// Linears and slices of linears with formats of their own, by canonical name: `layers.3.mixer.in_proj`,
    /// `layers.3.mixer.in_proj.B`. A slice goes before its linear, a linear before its block.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub linears: BTreeMap<String, Format>,
}

impl Plan {
    /// The plan that leaves `blocks` blocks as they are in the checkpoint.
    pub fn unquantized(blocks: usize) -> Self {
        Self { embedding: Format::W16A16, head: Format::W16A16, blocks: vec![Format::W16A16; blocks], linears: BTreeMap::new() }
    }

    /// The format of a linear of block `block`, which decides what it reads; `stem` is its canonical name.
    pub fn linear(&self, block: usize, stem: &str) -> Format {
        self.linears.get(stem).copied().unwrap_or_else(|| self.blocks[block])
    }

    /// The format of a slice of a linear; a linear of one slice has a nameless one.
    pub fn slice(&self, block: usize, stem: &str, slice: &str) -> Format {
        let own = if slice.is_empty() { None } else { self.linears.get(&format!("{stem}.{slice}")) };
        own.copied().unwrap_or_else(|| self.linear(block, stem))
    }

    /// Gives `format` to the blocks that `selector` means, to the embedding or to the head; returns how many it met.
    /// A name means linears, which only a model's layout knows: it meets nothing here.
    pub fn set(&mut self, selector: &Selector, kinds: &[BlockKind], format: Format) -> usize {
        match selector {
            Selector::Embedding => self.embedding = embedding_format(format),
            Selector::Head => self.head = format,
            Selector::Name(_) => return 0,
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
        16 => Format::W16A16,
        8 => Format::W8A16,
        4 => Format::W4A16.with_group(format.largest_group()),
        3 => Format::W3A16.with_group(format.largest_group()),
        _ => Format::W2A16.with_group(format.largest_group()),
    }
}

/// What an override matches: `kind:ssm`, `block:3`, `block:3-7`, `name:*.in_proj`, `embedding` or `head`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Selector {
    Kind(BlockKind),
    /// First and last block, both included.
    Blocks(usize, usize),
    /// Linears, and slices of linears, by name.
    Name(NamePattern),
    Embedding,
    Head,
}

impl Selector {
    /// Whether it names the block of this number and kind as a whole.
    pub fn meets(&self, index: usize, block_kind: BlockKind) -> bool {
        match self {
            Self::Kind(kind) => *kind == block_kind,
            Self::Blocks(first, last) => (*first..=*last).contains(&index),
            Self::Name(_) | Self::Embedding | Self::Head => false,
        }
    }
}

/// A pattern for canonical names of linears (`layers.3.mixer.in_proj`) and slices (`layers.3.mixer.in_proj.B`): `*`
/// stands for any characters, `?` for one. It matches a whole name or what follows one of its dots, so that `in_proj`,
/// `experts.3.*` and `layers.3.*` all say what they seem to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamePattern(String);

impl NamePattern {
    /// Whether the pattern matches `name`.
    pub fn matches(&self, name: &str) -> bool {
        let ends = std::iter::once(0).chain(name.match_indices('.').map(|(dot, _)| dot + 1));
        ends.into_iter().any(|start| glob(self.0.as_bytes(), &name.as_bytes()[start..]))
    }
}

/// Whether `text` is what `pattern` describes.
fn glob(pattern: &[u8], text: &[u8]) -> bool {
    match (pattern.split_first(), text.split_first()) {
        (None, None) => true,
        (Some((b'*', rest)), _) => (0..=text.len()).any(|skipped| glob(rest, &text[skipped..])),
        (Some((expected, pattern)), Some((found, text))) => (*expected == b'?' || expected == found) && glob(pattern, text),
        _ => false,
    }
}

impl fmt::Display for Selector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kind(kind) => write!(f, "kind:{kind}"),
            Self::Blocks(first, last) if first == last => write!(f, "block:{first}"),
            Self::Blocks(first, last) => write!(f, "block:{first}-{last}"),
            Self::Name(NamePattern(pattern)) => write!(f, "name:{pattern}"),
            Self::Embedding => f.write_str("embedding"),
            Self::Head => f.write_str("head"),
        }
    }
}

impl FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let unknown = || {
            format!(
                "unknown selector `{text}`; write kind:ssm, kind:mlp, kind:attention, kind:moe, block:3, block:3-7, name:PATTERN, embedding or head"
            )
        };
        match text.split_once(':') {
            None if text == "embedding" => Ok(Self::Embedding),
            None if text == "head" => Ok(Self::Head),
            Some(("kind", name)) => BlockKind::ALL.into_iter().find(|kind| kind.name() == name).map(Self::Kind).ok_or_else(unknown),
            Some(("name", pattern)) if !pattern.is_empty() => Ok(Self::Name(NamePattern(pattern.to_owned()))),
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
            assert_eq!(plan.set(&selector, &kinds, Format::W4A8), met, "{text}");
        }
        assert_eq!(plan.embedding, Format::W4A16, "an embedding has no activations to quantize");
        for wrong in ["block:7-3", "name:", "kind:mamba", "block"] {
            assert!(wrong.parse::<Selector>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn name_patterns_match_whole_names_and_their_ends() {
        let matches = |pattern: &str, name: &str| NamePattern(pattern.into()).matches(name);
        for pattern in ["in_proj", "*.in_proj", "layers.3.*", "mixer.in_proj", "layers.?.mixer.in_proj", "*"] {
            assert!(matches(pattern, "layers.3.mixer.in_proj"), "{pattern}");
        }
        for pattern in ["proj", "layers.33.*", "in_proj.B", "layers.3", "", "?"] {
            assert!(!matches(pattern, "layers.3.mixer.in_proj"), "{pattern}");
        }
        assert!(matches("in_proj.B", "layers.3.mixer.in_proj.B") && matches("experts.3.*", "layers.1.mixer.experts.3.up_proj"));
        assert!(!matches("experts.3.*", "layers.1.mixer.experts.13.up_proj"));
    }
}
