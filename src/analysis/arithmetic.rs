//! Products that a plan takes, by kind of arithmetic.

use crate::backend::SSM_CHUNK;
use crate::checkpoint::{BlockSpec, Checkpoint, LinearSpec};
use crate::format::{Activations, BlockKind, Format, Plan, Scheme, SsmActivations};

/// Products of linears, convolutions, attention, and of C and B inside a chunk of the scan.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlannedProducts {
    /// int8 × int8, added in int32 (int4, int3 and int2 weights are unpacked to int8).
    pub int8: u64,
    /// f32 × f32.
    pub float: u64,
}

impl PlannedProducts {
    fn add(&mut self, int8: bool, products: u64) {
        if int8 {
            self.int8 += products;
        } else {
            self.float += products;
        }
    }
}

/// Products of one text of `tokens` tokens in one call, the head's included, under `plan` with `activations`.
pub fn products(checkpoint: &Checkpoint, plan: &Plan, activations: Activations, tokens: usize) -> PlannedProducts {
    let (config, layout) = (&checkpoint.config, &checkpoint.layout);
    let tokens_wide = tokens as u64;
    let mut total = PlannedProducts::default();
    for (block, format) in layout.blocks.iter().zip(&plan.blocks) {
        for linear in &block.linears {
            let schemes = linear.planned_schemes(plan, block.index);
            linear_products(&mut total, block, linear, plan.linear(block.index, &linear.stem), &schemes, checkpoint, tokens_wide);
        }
        match block.kind {
            BlockKind::Ssm => {
                let mamba = &config.mamba;
                let int8 = activations.ssm != SsmActivations::Float && format.quantizes_activations();
                total.add(int8, (tokens * mamba.conv_channels() * mamba.conv_kernel) as u64);
                if int8 {
                    let pairs = |tokens: usize| tokens * (tokens + 1) / 2;
                    let all = tokens / SSM_CHUNK * pairs(SSM_CHUNK) + pairs(tokens % SSM_CHUNK);
                    total.add(true, (all * mamba.groups * mamba.state) as u64);
                }
            }
            BlockKind::Attention => {
                let visible = tokens * (tokens + 1) / 2;
                total.add(false, (2 * visible * config.attention.heads * config.attention.head_dim) as u64);
            }
            BlockKind::Moe => total.add(false, tokens_wide * (config.moe.experts * config.hidden_size) as u64),
            BlockKind::Mlp => {}
        }
    }
    let head = &layout.head;
    total.add(plan.head.quantizes_activations(), tokens_wide * head.weights());
    total
}

/// Each token goes through every linear, but through a few of the experts only.
fn linear_products(
    total: &mut PlannedProducts,
    block: &BlockSpec,
    linear: &LinearSpec,
    format: Format,
    schemes: &[Scheme],
    checkpoint: &Checkpoint,
    tokens: u64,
) {
    let moe = &checkpoint.config.moe;
    let expert = block.kind == BlockKind::Moe && linear.name.starts_with("experts.");
    // On average over the experts, which is exact for their sum.
    let (share, of) = if expert { (moe.experts_per_token as u64, moe.experts as u64) } else { (1, 1) };
    for (slice, scheme) in linear.slices.iter().zip(schemes) {
        let int8 = format.quantizes_activations() && *scheme != Scheme::Float;
        total.add(int8, tokens * (slice.rows * linear.cols) as u64 * share / of);
    }
}
