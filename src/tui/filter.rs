//! What the list of blocks is narrowed to: words that a block must meet by kind, format or number.

use crate::format::{BlockKind, Format};

/// A filter as it was typed. Every word must fit: a kind (`ssm`, `att`, `M`, `-`, `*`, `E`), a format (`w8a8`, `w4`),
/// a block's number (`7`) or a range of them (`3-9`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    pub text: String,
}

impl Filter {
    /// Whether the block stays in the list.
    pub fn meets(&self, index: usize, kind: BlockKind, format: Format) -> bool {
        self.text.split_whitespace().all(|word| word_meets(word, index, kind, format))
    }
}

fn word_meets(word: &str, index: usize, kind: BlockKind, format: Format) -> bool {
    let mut letters = word.chars();
    if let (Some(letter), None) = (letters.next(), letters.next())
        && letter == kind.letter()
    {
        return true;
    }
    if let Ok(number) = word.parse::<usize>() {
        return number == index;
    }
    if let Some((Ok(first), Ok(last))) = word.split_once('-').map(|(first, last)| (first.parse::<usize>(), last.parse::<usize>())) {
        return (first..=last).contains(&index);
    }
    let word = word.to_lowercase();
    kind.name().starts_with(&word) || format.to_string().contains(&word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_kinds_formats_and_numbers() {
        let meets = |text: &str| Filter { text: text.into() }.meets(7, BlockKind::Attention, Format::W8A8);
        for text in ["", "att", "attention", "*", "w8", "a8", "7", "3-9", "att w8a8", "3-9 att"] {
            assert!(meets(text), "{text}");
        }
        for text in ["ssm", "M", "w4", "8", "8-9", "att w4"] {
            assert!(!meets(text), "{text}");
        }
    }
}
