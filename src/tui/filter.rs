//! What the list of blocks is narrowed to: words that a block must meet by kind, format, number or name.

use nucleo_matcher::pattern::{CaseMatching, Normalization, Pattern};
use nucleo_matcher::{Config, Matcher, Utf32Str};

use super::tree;
use crate::checkpoint::Layout;
use crate::format::{BlockKind, Format, Plan};

/// A filter as it was typed. Every word must fit: a kind (`ssm`, `att`, `M`, `-`, `*`, `E`), a format (`w8a8`, `w4`),
/// a block's number (`7`) or a range of them (`3-9`), or letters of a module's name in their order (`qpr` for `q_proj`).
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    pub text: String,
}

impl Filter {
    /// The blocks that stay in the list.
    pub fn visible(&self, layout: &Layout, plan: &Plan) -> Vec<usize> {
        let blocks = 0..layout.blocks.len();
        let words: Vec<&str> = self.text.split_whitespace().collect();
        if words.is_empty() {
            return blocks.collect();
        }
        // Blocks of a kind have the same modules: names are matched once a kind.
        let named: Vec<Vec<BlockKind>> = words.iter().map(|word| kinds_with(layout, word)).collect();
        let meets = |index: &usize| {
            let (kind, format) = (layout.blocks[*index].kind, plan.blocks[*index]);
            words.iter().zip(&named).all(|(word, named)| word_meets(word, *index, kind, format) || named.contains(&kind))
        };
        blocks.filter(meets).collect()
    }
}

/// The kinds of block that have a module with the letters of `word` in its name.
fn kinds_with(layout: &Layout, word: &str) -> Vec<BlockKind> {
    if word.chars().any(|letter| !letter.is_alphabetic() && letter != '_') || word.len() < 3 {
        return Vec::new();
    }
    let pattern = Pattern::parse(word, CaseMatching::Ignore, Normalization::Smart);
    let mut matcher = Matcher::new(Config::DEFAULT);
    let mut letters = Vec::new();
    let mut has = |kind: &BlockKind| {
        let block = layout.blocks.iter().find(|block| block.kind == *kind);
        let modules = block.map(tree::modules).unwrap_or_default();
        modules.iter().any(|module| pattern.score(Utf32Str::new(&module.name, &mut letters), &mut matcher).is_some())
    };
    BlockKind::ALL.into_iter().filter(|kind| has(kind)).collect()
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
        let meets = |text: &str| text.split_whitespace().all(|word| word_meets(word, 7, BlockKind::Attention, Format::W8A8));
        for text in ["", "att", "attention", "*", "w8", "a8", "7", "3-9", "att w8a8", "3-9 att"] {
            assert!(meets(text), "{text}");
        }
        for text in ["ssm", "M", "w4", "8", "8-9", "att w4"] {
            assert!(!meets(text), "{text}");
        }
    }

    #[test]
    fn names_of_modules_match_by_their_letters() {
        let checkpoint = crate::checkpoint::open("demo").unwrap();
        let plan = Plan::unquantized(12);
        let visible = |text: &str| Filter { text: text.into() }.visible(&checkpoint.layout, &plan);
        assert_eq!(visible("qproj"), [5, 10], "attention has q_proj");
        assert_eq!(visible("in_proj"), [0, 2, 4, 7, 9]);
        assert_eq!(visible("down 0-5"), [1, 3]);
        assert!(visible("zzz").is_empty());
    }
}
