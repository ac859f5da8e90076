//! Texts that begin alike, as a tree of token runs, so that a model computes once what several texts share: the
//! question in front of its choices, and whatever questions have in common.

use crate::backend::Sequences;

/// Shared runs shorter than this are computed again: another sequence in the batch costs about as much.
const SHORTEST_SHARED: usize = 2;

/// A batch of texts with their common prefixes stored once.
pub struct PrefixTree {
    /// Tokens of all runs.
    pub ids: Vec<u32>,
    pub sequences: Sequences,
    /// For each text its runs: (first position in the text, first token in the batch).
    paths: Vec<Vec<(usize, usize)>>,
}

/// Length of the common beginning of two texts.
pub fn shared(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

impl PrefixTree {
    /// The tree of `texts`, which are sorted and differ from each other.
    pub fn new(texts: &[&[u32]]) -> Self {
        let mut ids = Vec::new();
        let (mut lengths, mut parents) = (Vec::new(), Vec::new());
        let mut paths = vec![Vec::new(); texts.len()];
        // Texts that agree up to `depth`, what lies before `depth` being computed by the runs up to `parent`.
        let mut open = vec![(0..texts.len(), 0, None)];
        while let Some((range, mut depth, mut parent)) = open.pop() {
            let (Some(first), Some(last)) = (texts.get(range.start), texts[range.clone()].last()) else { continue };
            let common = shared(first, last);
            if common - depth >= SHORTEST_SHARED || (range.len() == 1 && common > depth) {
                paths[range.clone()].iter_mut().for_each(|path| path.push((depth, ids.len())));
                ids.extend_from_slice(&first[depth..common]);
                lengths.push(common - depth);
                parents.push(parent);
                (depth, parent) = (common, Some(lengths.len() - 1));
            }
            if range.len() == 1 {
                continue;
            }
            // Sorted texts that go on with the same token lie together; one that ends here comes first.
            let mut start = range.start;
            let groups = texts[range].chunk_by(|a, b| a.get(common) == b.get(common));
            for group in groups {
                open.push((start..start + group.len(), depth, parent));
                start += group.len();
            }
        }
        Self { ids, sequences: Sequences::tree(lengths, parents), paths }
    }

    /// Where the token at `position` of a text lies in the batch.
    pub fn token(&self, text: usize, position: usize) -> usize {
        let path = &self.paths[text];
        let run = path.partition_point(|(first, _)| *first <= position);
        let (first, token) = path[run.saturating_sub(1)];
        token + position - first
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::backend::cpu::Cpu;
    use crate::checkpoint;
    use crate::model::Hybrid;

    fn texts() -> impl Strategy<Value = Vec<Vec<u32>>> {
        prop::collection::btree_set(prop::collection::vec(3_u32..5, 1..9), 1..12).prop_map(|texts| texts.into_iter().collect())
    }

    proptest! {
        #[test]
        fn every_text_is_found_along_its_path(texts in texts()) {
            let slices: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
            let tree = PrefixTree::new(&slices);
            prop_assert_eq!(tree.sequences.tokens(), tree.ids.len());
            prop_assert!(tree.ids.len() <= texts.iter().map(Vec::len).sum());
            for (index, text) in texts.iter().enumerate() {
                let found: Vec<u32> = (0..text.len()).map(|position| tree.ids[tree.token(index, position)]).collect();
                prop_assert_eq!(&found, text);
            }
        }
    }

    #[test]
    fn a_tree_gives_the_residual_stream_of_the_texts_one_by_one() {
        let model = Hybrid::load(Cpu, &checkpoint::open(checkpoint::DEMO).unwrap()).unwrap();
        let beginning: Vec<u32> = (3..40).collect();
        let mut texts: Vec<Vec<u32>> = vec![beginning.clone()];
        for (kept, end) in [(37, &[50, 51][..]), (37, &[50, 51, 52, 53, 54]), (37, &[60]), (20, &[70, 71, 72]), (0, &[80, 81])] {
            texts.push([&beginning[..kept], end].concat());
        }
        texts.sort();
        let slices: Vec<&[u32]> = texts.iter().map(Vec::as_slice).collect();
        let tree = PrefixTree::new(&slices);
        assert!(tree.sequences.is_tree() && tree.ids.len() < 60);
        let rows = |h: &<Cpu as crate::backend::Backend>::Tensor| h.to_vec2::<f32>().unwrap();
        let shared = rows(&model.forward(&tree.ids, &tree.sequences, None).unwrap());
        for (index, text) in texts.iter().enumerate() {
            let alone = rows(&model.forward(text, &Sequences::new(vec![text.len()]), None).unwrap());
            for (position, expected) in alone.iter().enumerate() {
                let found = &shared[tree.token(index, position)];
                let largest = expected.iter().zip(found).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
                // Matrix products of another number of rows may add in another order.
                assert!(largest < 1e-3, "text {index}, token {position}: {largest}");
            }
        }
    }
}
