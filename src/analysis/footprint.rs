//! [`Footprint`]: the bytes of every block in every format, added up once, so that a plan's size is a sum over a table
//! however many experts a block has.

use std::sync::Arc;

use crate::checkpoint::{BlockSpec, Config, Layout, LinearSpec};
use crate::format::{BlockKind, Format, Plan};

/// Bytes that the linears of a block store, and those that one token reads: of routed experts, the chosen ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockBytes {
    pub stored: u64,
    pub active: u64,
}

/// What does not depend on the plan.
#[derive(Debug, Clone, PartialEq)]
struct BlockTable {
    /// By [`Format::ALL`].
    formats: Vec<BlockBytes>,
    weights: BlockBytes,
    float: u64,
}

/// A layout's bytes in every format.
#[derive(Debug, Clone, PartialEq)]
pub struct Footprint {
    layout: Arc<Layout>,
    tables: Vec<BlockTable>,
    weights: u64,
    float: u64,
    /// Experts that a token is sent to, of so many.
    routed: (u64, u64),
}

impl Footprint {
    /// Adds up every tensor of `layout`.
    pub fn new(config: &Config, layout: Arc<Layout>) -> Self {
        let routed = (config.moe.experts_per_token as u64, config.moe.experts.max(1) as u64);
        let table = |block: &BlockSpec| BlockTable {
            formats: Format::ALL.map(|format| sum(block, routed, |linear| linear.stored_bytes(format, layout.float_bytes))).to_vec(),
            weights: sum(block, routed, LinearSpec::weights),
            float: block.float_parameters() * layout.float_bytes as u64,
        };
        let tables: Vec<BlockTable> = layout.blocks.iter().map(table).collect();
        let float = tables.iter().map(|table| table.float).sum::<u64>() + layout.final_norm.elements() * layout.float_bytes as u64;
        Self { weights: layout.linear_weights(), float, tables, layout, routed }
    }

    /// Bytes of the linears of block `index` under `plan`.
    pub fn linears(&self, plan: &Plan, index: usize) -> BlockBytes {
        let block = &self.layout.blocks[index];
        let column = Format::ALL.iter().position(|format| *format == plan.blocks[index]);
        match column {
            Some(column) if !names_a_linear(plan, block) => self.tables[index].formats[column],
            _ => sum(block, self.routed, |linear| linear.bytes_in(&linear.planned_schemes(plan, index), self.layout.float_bytes)),
        }
    }

    /// Weights of the linears of block `index`; stored, and met by one token.
    pub fn weights(&self, index: usize) -> BlockBytes {
        self.tables[index].weights
    }

    /// Weights of block `index` that a token meets, by what their linears read under `plan`: int8, float.
    pub fn weights_by_activations(&self, plan: &Plan, index: usize) -> (u64, u64) {
        let block = &self.layout.blocks[index];
        let whole = self.weights(index).active;
        let int8 = if names_a_linear(plan, block) {
            sum(block, self.routed, |linear| if plan.linear(index, &linear.stem).quantizes_activations() { linear.weights() } else { 0 })
                .active
        } else if plan.blocks[index].quantizes_activations() {
            whole
        } else {
            0
        };
        (int8, whole - int8)
    }

    /// Bytes of block `index` that stay in float.
    pub fn float(&self, index: usize) -> u64 {
        self.tables[index].float
    }

    /// Bytes that the linears of the blocks store under `plan`: [`Layout::linear_bytes`].
    pub fn linear_bytes(&self, plan: &Plan) -> u64 {
        (0..self.tables.len()).map(|index| self.linears(plan, index).stored).sum()
    }

    /// Bytes of the head's table, which a tied head may share with the embedding.
    pub fn head(&self, format: Format) -> u64 {
        self.layout.head.stored_bytes(format, self.layout.float_bytes)
    }

    /// Bytes of the whole model under `plan`: [`Layout::total_bytes`].
    pub fn total_bytes(&self, plan: &Plan) -> u64 {
        let shared = self.layout.tied && plan.head == Format::W16A16 && plan.embedding == Format::W16A16;
        let head = if shared { 0 } else { self.head(plan.head) };
        let embedding = self.layout.embedding.stored_bytes(plan.embedding, self.layout.float_bytes);
        self.linear_bytes(plan) + self.float + embedding + head
    }

    /// Stored bits per weight of the blocks' linears under `plan`.
    pub fn bits_per_weight(&self, plan: &Plan) -> f64 {
        8.0 * self.linear_bytes(plan) as f64 / self.weights as f64
    }
}

/// Whether `plan` gives some linear of `block` a format of its own: names sort by block, so that the first one that could
/// be of this block tells.
fn names_a_linear(plan: &Plan, block: &BlockSpec) -> bool {
    plan.linears.range(block.prefix.clone()..).next().is_some_and(|(name, _)| name.starts_with(&block.prefix))
}

/// Sums over a block's linears.
fn sum(block: &BlockSpec, (chosen, experts): (u64, u64), of: impl Fn(&LinearSpec) -> u64) -> BlockBytes {
    let (mut always, mut routed) = (0, 0);
    for linear in &block.linears {
        if block.kind == BlockKind::Moe && linear.name.starts_with("experts.") {
            routed += of(linear);
        } else {
            always += of(linear);
        }
    }
    BlockBytes { stored: always + routed, active: always + routed * chosen / experts }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stack with every kind of block, whose expert width no int4 group divides evenly into 128.
    const CONFIG: &str = r#"{"model_type": "nemotron_h", "hidden_size": 256, "vocab_size": 512, "intermediate_size": 320,
        "hybrid_override_pattern": "M-*E", "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2,
        "ssm_state_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_head_dim": 32,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 80, "n_group": 1, "topk_group": 1,
        "moe_shared_expert_intermediate_size": 64, "n_shared_experts": 1}"#;

    #[test]
    fn sums_are_the_layouts_and_a_token_reads_its_experts_only() {
        let config = Config::parse(CONFIG).unwrap();
        let layout = Arc::new(Layout::new(&config));
        let footprint = Footprint::new(&config, Arc::clone(&layout));
        for (index, format) in Format::ALL.into_iter().enumerate() {
            let mut plan = Plan { head: format, blocks: vec![format; 4], ..Plan::unquantized(4) };
            plan.blocks[index % 4] = Format::W4A16.with_group(32);
            if index % 2 == 0 {
                plan.linears.insert("layers.0.mixer.in_proj.B".into(), Format::W2A8);
                plan.linears.insert("layers.3.mixer.experts.5.up_proj".into(), Format::W8A8);
            }
            assert_eq!(footprint.total_bytes(&plan), layout.total_bytes(&plan));
            assert_eq!(footprint.linear_bytes(&plan), layout.linear_bytes(&plan));
            assert!((footprint.bits_per_weight(&plan) - layout.bits_per_weight(&plan)).abs() < 1e-12);
        }
        let mut plan = Plan { blocks: vec![Format::W4A8; 4], ..Plan::unquantized(4) };
        plan.linears.insert("layers.1.mixer.down_proj".into(), Format::W4A16);
        assert_eq!(footprint.weights_by_activations(&plan, 0), (footprint.weights(0).active, 0));
        assert_eq!(footprint.weights_by_activations(&plan, 1), (320 * 256, 320 * 256));
        assert_eq!(footprint.weights_by_activations(&Plan::unquantized(4), 3), (0, footprint.weights(3).active));
        // Two of eight experts of 2·80·256 weights, and the shared one of 2·64·256.
        assert_eq!(footprint.weights(3).active, 2 * 2 * 80 * 256 + 2 * 64 * 256);
        assert_eq!(footprint.weights(0).active, footprint.weights(0).stored);
    }
}
