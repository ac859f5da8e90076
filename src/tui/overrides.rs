//! The shortest list of overrides that turns a recipe's plan into an edited one.

use crate::format::{BlockKind, Format, Plan, Selector};
use crate::quant::Override;

/// Overrides that change `base` into `target` when they are applied in order: rules for kinds first, then ranges of
/// blocks, then embedding and head, then linears one by one. No shorter list of non-overlapping ranges exists, with or without rules for kinds.
///
/// Every choice of "this kind gets that format, or no rule" is tried (at most 6 choices for each of 4 kinds); what is
/// then left differs in runs of blocks of one target format, and each run takes one range, which may run across blocks
/// that have that format already.
pub fn minimal(base: &Plan, target: &Plan, kinds: &[BlockKind]) -> Vec<Override> {
    let choices: Vec<Vec<(BlockKind, Option<Format>)>> = BlockKind::ALL
        .into_iter()
        .filter(|kind| kinds.contains(kind))
        .map(|kind| {
            let formats = Format::ALL.into_iter().filter(|format| of_kind(target, kinds, kind).any(|other| other == *format));
            std::iter::once((kind, None)).chain(formats.map(|format| (kind, Some(format)))).collect()
        })
        .collect();
    let mut best: Option<(usize, usize, Vec<Override>)> = None;
    for mut number in 0..choices.iter().map(Vec::len).product::<usize>() {
        let mut painted = base.clone();
        let (mut rules, mut partial) = (Vec::new(), 0);
        for choice in &choices {
            let (kind, format) = choice[number % choice.len()];
            number /= choice.len();
            if let Some(format) = format {
                painted.set(&Selector::Kind(kind), kinds, format);
                rules.push(Override { selector: Selector::Kind(kind), format });
                partial += usize::from(of_kind(target, kinds, kind).any(|other| other != format));
            }
        }
        // Of equally short lists, the one with fewest rules for kinds that have exceptions; then the one with most
        // whole kinds, which reads best and holds for a deeper model too.
        let whole = rules.len() - partial;
        rules.extend(ranges(&painted.blocks, &target.blocks));
        let cost = (rules.len(), partial + (BlockKind::ALL.len() - whole));
        if best.as_ref().is_none_or(|(length, rank, _)| cost < (*length, *rank)) {
            best = Some((cost.0, cost.1, rules));
        }
    }
    let mut rules = best.map(|(_, _, rules)| rules).unwrap_or_default();
    for (selector, before, after) in [(Selector::Embedding, base.embedding, target.embedding), (Selector::Head, base.head, target.head)] {
        if before != after {
            rules.push(Override { selector, format: after });
        }
    }
    let name = |name: &String| format!("name:{name}").parse().ok();
    rules.extend(target.linears.iter().filter_map(|(linear, format)| Some(Override { selector: name(linear)?, format: *format })));
    rules
}

fn of_kind<'a>(plan: &'a Plan, kinds: &'a [BlockKind], kind: BlockKind) -> impl Iterator<Item = Format> + 'a {
    plan.blocks.iter().zip(kinds).filter(move |(_, other)| **other == kind).map(|(format, _)| *format)
}

/// One range for each run of equal formats in `target` that differs somewhere from `painted`.
fn ranges(painted: &[Format], target: &[Format]) -> Vec<Override> {
    let mut rules = Vec::new();
    let mut start = 0;
    for run in target.chunk_by(PartialEq::eq) {
        let differs = |index: &usize| painted[*index] != target[*index];
        let mut indices = start..start + run.len();
        start += run.len();
        if let Some(first) = indices.find(differs) {
            let last = indices.rfind(differs).unwrap_or(first);
            rules.push(Override { selector: Selector::Blocks(first, last), format: run[0] });
        }
    }
    rules
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::checkpoint::{Config, Layout};
    use crate::quant::Recipe;

    fn layout(pattern: &str) -> Layout {
        let config = format!(
            r#"{{"model_type": "nemotron_h", "hidden_size": 64, "vocab_size": 64, "intermediate_size": 128,
            "hybrid_override_pattern": "{pattern}", "mamba_num_heads": 2, "mamba_head_dim": 32, "n_groups": 1,
            "ssm_state_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "attention_head_dim": 32,
            "n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "n_group": 1, "topk_group": 1,
            "moe_shared_expert_intermediate_size": 64, "n_shared_experts": 1}}"#
        );
        Layout::new(&Config::parse(&config).unwrap())
    }

    fn texts(rules: &[Override]) -> Vec<String> {
        rules.iter().map(|rule| format!("{} {}", rule.selector, rule.format)).collect()
    }

    #[test]
    fn whole_kinds_then_ranges_then_single_blocks() {
        let layout = layout("M-M-M-M*-M");
        let kinds = layout.kinds();
        let base = Recipe::find("phase1").unwrap().plan(&layout, &[]).unwrap();
        let check = |edits: &[(&str, Format)], expected: &[&str]| {
            let mut plan = base.clone();
            for (selector, format) in edits {
                plan.set(&selector.parse().unwrap(), &kinds, *format);
            }
            assert_eq!(texts(&minimal(&base, &plan, &kinds)), expected);
        };
        check(&[], &[]);
        check(&[("kind:ssm", Format::W4A8)], &["kind:ssm w4a8"]);
        check(&[("block:7", Format::W16A16)], &["kind:attention w16a16"]);
        check(&[("block:2-5", Format::W4A8)], &["block:2-5 w4a8"]);
        check(&[("block:4", Format::W4A8)], &["block:4 w4a8"]);
        // An exception to a kind takes a rule of its own, and so is cheaper than four single blocks.
        check(&[("kind:ssm", Format::W4A8), ("block:4", Format::W8A8)], &["kind:ssm w4a8", "block:4 w8a8"]);
        // A range may run over blocks that have the format already.
        check(&[("kind:mlp", Format::W4A8), ("block:0-3", Format::W4A8)], &["kind:mlp w4a8", "block:0-2 w4a8"]);
        check(&[("embedding", Format::W4A16), ("head", Format::W4A8)], &["embedding w4a16", "head w4a8"]);
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn overrides_give_the_edited_plan_and_are_no_more_than_its_runs(
            letters in prop::collection::vec(prop::sample::select(vec!['M', '-', '*', 'E']), 1..14),
            formats in prop::collection::vec(prop::sample::select(Format::ALL.to_vec()), 16),
            recipe in prop::sample::select(vec!["phase1", "phase2", "phase3"]),
        ) {
            let layout = layout(&letters.iter().collect::<String>());
            let recipe = Recipe::find(recipe).unwrap();
            let base = recipe.plan(&layout, &[]).unwrap();
            let mut target = Plan { embedding: base.embedding, head: formats[14], blocks: formats[..letters.len()].to_vec(), ..Plan::unquantized(0) };
            target.set(&Selector::Embedding, &layout.kinds(), formats[15]);
            let rules = minimal(&base, &target, &layout.kinds());
            prop_assert_eq!(recipe.plan(&layout, &rules).unwrap(), target.clone());
            let outside = usize::from(base.embedding != target.embedding) + usize::from(base.head != target.head);
            prop_assert!(rules.len() - outside <= ranges(&base.blocks, &target.blocks).len());
            let differing: Vec<BlockKind> = BlockKind::ALL.into_iter().filter(|kind| {
                of_kind(&base, &layout.kinds(), *kind).ne(of_kind(&target, &layout.kinds(), *kind))
            }).collect();
            // Where each kind as a whole has one format, a rule a kind is enough.
            let uniform = BlockKind::ALL.into_iter().all(|kind| {
                let formats: Vec<Format> = of_kind(&target, &layout.kinds(), kind).collect();
                formats.windows(2).all(|pair| pair[0] == pair[1])
            });
            if uniform {
                prop_assert!(rules.len() - outside <= differing.len());
            }
        }
    }
}
