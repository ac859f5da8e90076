//! [`Footprint`]: the bytes of every block in every format, added up once, so that a plan's size is a sum over a table
//! however many experts a block has.

use crate::checkpoint::{BlockSpec, Config, Layout, LinearSpec};
use crate::format::{BlockKind, Format, Plan};

/// Bytes and weights of a block.
#[derive(Debug, Clone, PartialEq)]
pub struct BlockFootprint {
    /// Bytes that the linears store, by [`Format::ALL`].
    linears: Vec<u64>,
    /// Bytes of the linears that one token reads: of routed experts, those that it is sent to.
    active: Vec<u64>,
    /// Bytes of what stays in float.
    pub float: u64,
    /// Weights of the linears, and those that one token meets.
    pub weights: u64,
    pub active_weights: u64,
}

/// A layout's bytes in every format.
#[derive(Debug, Clone, PartialEq)]
pub struct Footprint {
    pub blocks: Vec<BlockFootprint>,
    embedding: Vec<u64>,
    head: Vec<u64>,
    /// The head has no tensor of its own while neither it nor the embedding is quantized.
    tied: bool,
    final_norm: u64,
    weights: u64,
}

/// The place of a format in the tables.
fn column(format: Format) -> usize {
    Format::ALL.iter().position(|other| *other == format).unwrap_or(0)
}

impl BlockFootprint {
    fn new(config: &Config, block: &BlockSpec, float_bytes: usize) -> Self {
        let routed = |linear: &LinearSpec| block.kind == BlockKind::Moe && linear.name.starts_with("experts.");
        let share = |sum: u64| sum * config.moe.experts_per_token as u64 / config.moe.experts.max(1) as u64;
        let sum = |of: &dyn Fn(&LinearSpec) -> u64| {
            let part = |wanted: bool| block.linears.iter().filter(|linear| routed(linear) == wanted).map(of).sum::<u64>();
            let (always, experts) = (part(false), part(true));
            (always + experts, always + share(experts))
        };
        let (linears, active) = Format::ALL.map(|format| sum(&|linear| linear.stored_bytes(format, float_bytes))).into_iter().unzip();
        let (weights, active_weights) = sum(&LinearSpec::weights);
        Self { linears, active, float: block.float_parameters() * float_bytes as u64, weights, active_weights }
    }

    /// Bytes that the linears store under `format`.
    pub fn linears(&self, format: Format) -> u64 {
        self.linears[column(format)]
    }

    /// Bytes of the block under `format`, with what stays in float.
    pub fn bytes(&self, format: Format) -> u64 {
        self.linears(format) + self.float
    }

    /// Bytes that are read for one token.
    pub fn active_bytes(&self, format: Format) -> u64 {
        self.active[column(format)] + self.float
    }
}

impl Footprint {
    /// Adds up every tensor of `layout`.
    pub fn new(config: &Config, layout: &Layout) -> Self {
        let table = |linear: &LinearSpec| Format::ALL.map(|format| linear.stored_bytes(format, layout.float_bytes)).to_vec();
        Self {
            blocks: layout.blocks.iter().map(|block| BlockFootprint::new(config, block, layout.float_bytes)).collect(),
            embedding: table(&layout.embedding),
            head: table(&layout.head),
            tied: layout.tied,
            final_norm: layout.final_norm.elements() * layout.float_bytes as u64,
            weights: layout.linear_weights(),
        }
    }

    /// Bytes that the linears of the blocks store under `plan`, scales included.
    pub fn linear_bytes(&self, plan: &Plan) -> u64 {
        self.blocks.iter().zip(&plan.blocks).map(|(block, format)| block.linears(*format)).sum()
    }

    /// Bytes of the embedding table.
    pub fn embedding(&self, format: Format) -> u64 {
        self.embedding[column(format)]
    }

    /// Bytes of the head's table, which a tied head shares with the embedding.
    pub fn head(&self, format: Format) -> u64 {
        self.head[column(format)]
    }

    /// Bytes of the whole model under `plan`: [`Layout::total_bytes`].
    pub fn total_bytes(&self, plan: &Plan) -> u64 {
        let shared = self.tied && plan.head == Format::W16A16 && plan.embedding == Format::W16A16;
        let head = if shared { 0 } else { self.head(plan.head) };
        let float: u64 = self.blocks.iter().map(|block| block.float).sum();
        self.linear_bytes(plan) + float + self.final_norm + self.embedding(plan.embedding) + head
    }

    /// Stored bits per weight of the blocks' linears under `plan`.
    pub fn bits_per_weight(&self, plan: &Plan) -> f64 {
        8.0 * self.linear_bytes(plan) as f64 / self.weights as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A stack with every kind of block, whose expert width no int4 group divides evenly into 128.
    pub const CONFIG: &str = r#"{"model_type": "nemotron_h", "hidden_size": 256, "vocab_size": 512, "intermediate_size": 320,
        "hybrid_override_pattern": "M-*E", "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2,
        "ssm_state_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "attention_head_dim": 32,
        "n_routed_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 80, "n_group": 1, "topk_group": 1,
        "moe_shared_expert_intermediate_size": 64, "n_shared_experts": 1}"#;

    #[test]
    fn sums_are_the_layouts_and_a_token_reads_its_experts_only() {
        let config = Config::parse(CONFIG).unwrap();
        let layout = Layout::new(&config);
        let footprint = Footprint::new(&config, &layout);
        for (index, format) in Format::ALL.into_iter().enumerate() {
            let mut plan = Plan { embedding: Format::W8A16, head: format, blocks: vec![format; 4] };
            plan.blocks[index % 4] = Format::W4A16;
            assert_eq!(footprint.total_bytes(&plan), layout.total_bytes(&plan));
            assert_eq!(footprint.linear_bytes(&plan), layout.linear_bytes(&plan));
            assert!((footprint.bits_per_weight(&plan) - layout.bits_per_weight(&plan)).abs() < 1e-12);
        }
        let experts = &footprint.blocks[3];
        // Two of eight experts of 2·80·256 weights, and the shared one of 2·64·256.
        assert_eq!(experts.active_weights, 2 * 2 * 80 * 256 + 2 * 64 * 256);
        assert_eq!(footprint.blocks[0].active_weights, footprint.blocks[0].weights);
    }
}
