//! What a plan would cost on a GPU, from the bytes it moves and the operations it needs: [`Prediction`].
//!
//! A roofline (Williams, Waterman, Patterson: Roofline, CACM 52, 2009): each block takes the longer of moving its bytes
//! and doing its arithmetic, at a share of the peak rates that is named here, and a fixed time for its launches. It is
//! an estimate, not a measurement, and is marked so wherever it is shown. It needs a configuration alone.

use serde::Serialize;

use super::footprint::Footprint;
use super::gpu::Gpu;
use crate::checkpoint::Config;
use crate::format::{BlockKind, Format, Plan};

/// Share of the memory's peak rate that reading weights one token at a time reaches.
pub const BANDWIDTH_EFFICIENCY: f64 = 0.75;

/// Share of the tensor cores' peak rate that products over a long prompt reach.
pub const COMPUTE_EFFICIENCY: f64 = 0.5;

/// Seconds a block costs beside its bytes: a handful of dependent kernels in a captured graph.
pub const BLOCK_SECONDS: f64 = 10e-6;

/// Tokens in the caches when the time per token is predicted.
pub const DECODE_CONTEXT: usize = 2048;

/// Tokens of the prompt that prefill is predicted for; it runs as one batch.
pub const PROMPT_TOKENS: usize = 2048;

/// Tokens of an answer over which the time to read the prompt is spread when time is the cost of a plan.
pub const ANSWER_TOKENS: usize = 256;

/// Memory that is not there for weights and caches: the CUDA context, kernels, buffers.
pub const RESERVED_BYTES: u64 = 1 << 30;

/// Bytes of a value in the key/value cache, and in the SSM and convolution states.
const KV_VALUE_BYTES: u64 = 2;
const STATE_VALUE_BYTES: u64 = 4;

/// Tokens of a chunk of the SSD scan.
const SCAN_CHUNK: f64 = 128.0;

/// What a plan is expected to cost on a GPU, one sequence at a time.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Prediction {
    pub gpu: &'static str,
    /// Bytes of the whole model.
    pub weight_bytes: u64,
    /// Whether weights and states fit beside [`RESERVED_BYTES`].
    pub fits: bool,
    /// Tokens of context that fit beside the weights; `null` when the weights do not fit, or nothing grows with it.
    pub context_tokens: Option<u64>,
    /// Seconds a token takes behind [`DECODE_CONTEXT`] tokens.
    pub decode_seconds: f64,
    /// Tokens a second of a prompt of [`PROMPT_TOKENS`] tokens.
    pub prefill_tokens_per_s: f64,
    /// Neighbouring blocks that read activations of different bits.
    pub transitions: usize,
    /// Seconds that writing and reading the converted activations at those places takes for 1000 tokens.
    pub transition_seconds: f64,
}

impl Prediction {
    /// Seconds of a token of an answer of [`ANSWER_TOKENS`], its share of reading the prompt included.
    pub fn answer_seconds(&self) -> f64 {
        self.decode_seconds + PROMPT_TOKENS as f64 / self.prefill_tokens_per_s / ANSWER_TOKENS as f64
    }

    /// Predicts `plan` for the model of `config`, whose bytes are in `footprint`.
    pub fn new(config: &Config, footprint: &Footprint, plan: &Plan, gpu: &Gpu) -> Self {
        let bandwidth = gpu.bandwidth * BANDWIDTH_EFFICIENCY;
        let (mut decode, mut prefill) = (0.0, 0.0);
        let prompt = PROMPT_TOKENS as f64;
        for (index, (kind, format)) in config.blocks.iter().zip(&plan.blocks).enumerate() {
            let (linears, float) = (footprint.linears(plan, index), footprint.float(index));
            let caches = cache_bytes(config, *kind, DECODE_CONTEXT);
            decode += (linears.active + float + caches) as f64 / bandwidth + BLOCK_SECONDS;
            // In a long prompt every expert is met by some token.
            let moved = (linears.stored + float + activation_bytes(config, *format) * PROMPT_TOKENS as u64) as f64 / bandwidth;
            let (int8, float) = footprint.weights_by_activations(plan, index);
            let linears = product_seconds(gpu, int8, true) + product_seconds(gpu, float, false);
            let mixing = mixing_operations(config, *kind) * prompt / (COMPUTE_EFFICIENCY * gpu.bf16_ops);
            prefill += moved.max(linears + mixing) + BLOCK_SECONDS;
        }
        decode += footprint.head(plan.head) as f64 / bandwidth + BLOCK_SECONDS;
        // Only the last token of a prompt needs the head.
        prefill += footprint.head(plan.head) as f64 / bandwidth + BLOCK_SECONDS;

        let weight_bytes = footprint.total_bytes(plan);
        let free = weight_room(config, gpu, 0).and_then(|room| room.checked_sub(weight_bytes));
        let kv: u64 = config.blocks.iter().map(|kind| kv_bytes(config, *kind)).sum();
        let converted: u64 = plan
            .blocks
            .windows(2)
            .filter(|pair| pair[0].activation_bits() != pair[1].activation_bits())
            .map(|pair| activation_bytes(config, pair[1]))
            .sum();
        Self {
            gpu: gpu.name,
            weight_bytes,
            fits: free.is_some(),
            context_tokens: free.and_then(|free| free.checked_div(kv)),
            decode_seconds: decode,
            prefill_tokens_per_s: prompt / prefill,
            transitions: plan.activation_transitions(),
            transition_seconds: converted as f64 * 1000.0 / bandwidth,
        }
    }
}

/// [`Prediction::answer_seconds`] as a sum over linears. Where a prompt is bound by arithmetic in some linears of a block
/// and by memory in others, the sum is the larger of the two.
#[derive(Debug, Clone, PartialEq)]
pub struct AnswerTime {
    gpu: Gpu,
    /// Seconds that no linear of a block is the reason of.
    fixed: f64,
    /// Experts that a token is sent to, of so many.
    routed: (u64, u64),
}

impl AnswerTime {
    /// For the model of `config` with embedding and head as in `ends`.
    pub fn new(config: &Config, footprint: &Footprint, ends: &Plan, gpu: &Gpu) -> Self {
        let bandwidth = gpu.bandwidth * BANDWIDTH_EFFICIENCY;
        let (mut decode, mut prefill) = (0.0, 0.0);
        for (index, kind) in config.blocks.iter().enumerate() {
            let float = footprint.float(index);
            decode += (float + cache_bytes(config, *kind, DECODE_CONTEXT)) as f64 / bandwidth + BLOCK_SECONDS;
            let moved = float + activation_bytes(config, Format::W16A16) * PROMPT_TOKENS as u64;
            let mixing = mixing_operations(config, *kind) * PROMPT_TOKENS as f64 / (COMPUTE_EFFICIENCY * gpu.bf16_ops);
            prefill += moved as f64 / bandwidth + mixing + BLOCK_SECONDS;
        }
        let head = footprint.head(ends.head) as f64 / bandwidth + BLOCK_SECONDS;
        let fixed = decode + head + (prefill + head) / ANSWER_TOKENS as f64;
        let routed = (config.moe.experts_per_token as u64, config.moe.experts.max(1) as u64);
        Self { gpu: *gpu, fixed, routed }
    }

    /// Seconds of an answered token without the blocks' linears.
    pub fn fixed(&self) -> f64 {
        self.fixed
    }

    /// Seconds of an answered token that linears of `weights` weights take which store `bytes` bytes and read what `format`
    /// says; of `routed` ones a token meets the experts it is sent to.
    pub fn linears(&self, bytes: u64, weights: u64, format: Format, routed: bool) -> f64 {
        let (chosen, experts) = if routed { self.routed } else { (1, 1) };
        let bandwidth = self.gpu.bandwidth * BANDWIDTH_EFFICIENCY;
        let products = product_seconds(&self.gpu, weights * chosen / experts, format.quantizes_activations());
        (bytes * chosen / experts) as f64 / bandwidth + products.max(bytes as f64 / bandwidth) / ANSWER_TOKENS as f64
    }
}

/// Seconds of multiplying a prompt of [`PROMPT_TOKENS`] with `weights` weights.
fn product_seconds(gpu: &Gpu, weights: u64, int8: bool) -> f64 {
    let rate = COMPUTE_EFFICIENCY * if int8 { gpu.int8_ops } else { gpu.bf16_ops };
    2.0 * weights as f64 * PROMPT_TOKENS as f64 / rate
}

/// Bytes of weights that fit on `gpu` beside [`RESERVED_BYTES`] and the states and caches of one sequence of `context`
/// tokens; `None` when these alone do not fit.
pub fn weight_room(config: &Config, gpu: &Gpu, context: usize) -> Option<u64> {
    let kinds = || config.blocks.iter().copied();
    let states: u64 = kinds().map(|kind| cache_bytes(config, kind, 0)).sum::<u64>() / 2;
    let caches = kinds().map(|kind| kv_bytes(config, kind)).sum::<u64>() * context as u64;
    gpu.memory_bytes.checked_sub(RESERVED_BYTES + states + caches)
}

/// Bytes that one token adds to the caches of a block.
fn kv_bytes(config: &Config, kind: BlockKind) -> u64 {
    match kind {
        BlockKind::Attention => 2 * (config.attention.kv_heads * config.attention.head_dim) as u64 * KV_VALUE_BYTES,
        _ => 0,
    }
}

/// Bytes of a block's caches that a token reads, or reads and writes, behind `context` tokens.
fn cache_bytes(config: &Config, kind: BlockKind, context: usize) -> u64 {
    let mamba = &config.mamba;
    match kind {
        BlockKind::Ssm => 2 * (mamba.inner() * mamba.state + mamba.conv_channels() * mamba.conv_kernel) as u64 * STATE_VALUE_BYTES,
        BlockKind::Attention => kv_bytes(config, kind) * context as u64,
        BlockKind::Mlp | BlockKind::Moe => 0,
    }
}

/// Bytes a token's normalised activations take when a block of `format` reads them: written once, read once.
fn activation_bytes(config: &Config, format: Format) -> u64 {
    let hidden = config.hidden_size as u64;
    2 * if format.quantizes_activations() { hidden + 4 } else { 2 * hidden }
}

/// Operations a token needs between its linears over a prompt of [`PROMPT_TOKENS`].
fn mixing_operations(config: &Config, kind: BlockKind) -> f64 {
    match kind {
        // Scores and values over half the prompt on average, two operations a product.
        BlockKind::Attention => {
            let width = (config.attention.heads * config.attention.head_dim) as f64;
            2.0 * 2.0 * width * PROMPT_TOKENS as f64 / 2.0
        }
        // Dao, Gu: Transformers are SSMs, 2024, section 6: C·Bᵀ and its product with x inside a chunk, the state in and out.
        BlockKind::Ssm => {
            let mamba = &config.mamba;
            let (inner, state) = (mamba.inner() as f64, mamba.state as f64);
            2.0 * SCAN_CHUNK / 2.0 * (mamba.bc() as f64 + inner) + 2.0 * 2.0 * inner * state
        }
        BlockKind::Mlp | BlockKind::Moe => 0.0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::Layout;

    /// The published 8B shape.
    fn shape() -> (Config, Footprint) {
        let config = Config::parse(
            r#"{"model_type": "nemotron_h", "hidden_size": 4096, "vocab_size": 131072, "intermediate_size": 21504,
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", "mamba_num_heads": 128,
            "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "num_attention_heads": 32,
            "num_key_value_heads": 8, "attention_head_dim": 128}"#,
        )
        .unwrap();
        let footprint = Footprint::new(&config, std::sync::Arc::new(Layout::new(&config)));
        (config, footprint)
    }

    fn uniform(format: Format) -> Plan {
        Plan { embedding: Format::W8A16, head: format, blocks: vec![format; 52], ..Plan::unquantized(0) }
    }

    /// By hand: 4 attention blocks × 2 × 8 × 128 values × 2 bytes = 16 KiB a token; 24 SSM blocks × (128·64·128 states +
    /// 10240·4 of the convolution) × 4 bytes = 107.6 MB.
    #[test]
    fn the_context_that_fits_is_what_the_weights_leave() {
        let (config, footprint) = shape();
        let gpu = Gpu::find("RTX 4090").unwrap();
        let plan = uniform(Format::W4A8);
        let prediction = Prediction::new(&config, &footprint, &plan, &gpu);
        let states = 24 * (128 * 64 * 128 + 10_240 * 4) * 4;
        let free = gpu.memory_bytes - RESERVED_BYTES - footprint.total_bytes(&plan) - states;
        assert_eq!(prediction.context_tokens, Some(free / 16_384));
        assert!(prediction.fits);
        let room = weight_room(&config, &gpu, (free / 16_384) as usize).unwrap();
        assert!((footprint.total_bytes(&plan)..footprint.total_bytes(&plan) + 16_384).contains(&room), "{room}");
        assert_eq!(weight_room(&config, &gpu, 2_000_000), None, "two million tokens take 32.8 GB");
        let float = Plan::unquantized(52);
        assert!(Prediction::new(&config, &footprint, &float, &gpu).fits, "16.2 GB fit 24 GiB");
        let small = Gpu { memory_bytes: 16 << 30, ..gpu };
        let none = Prediction::new(&config, &footprint, &float, &small);
        assert!(!none.fits && none.context_tokens.is_none());
    }

    /// Reading the weights bounds the time per token from below; four bits halve what eight take, nearly.
    #[test]
    fn time_per_token_follows_the_bytes_and_prefill_the_arithmetic() {
        let (config, footprint) = shape();
        let gpu = Gpu::find("H100").unwrap();
        let [float, eight, four] =
            [Format::W16A16, Format::W8A8, Format::W4A8].map(|format| Prediction::new(&config, &footprint, &uniform(format), &gpu));
        let read = (footprint.linear_bytes(&uniform(Format::W8A8)) + footprint.head(Format::W8A8)) as f64;
        assert!(eight.decode_seconds > read / gpu.bandwidth, "no faster than the memory");
        assert!(eight.decode_seconds < 2.0 * read / gpu.bandwidth);
        assert!(four.decode_seconds < 0.7 * eight.decode_seconds && eight.decode_seconds < 0.65 * float.decode_seconds);
        assert!(eight.prefill_tokens_per_s > 1.6 * float.prefill_tokens_per_s, "int8 products take half the time");
        let per_token = 2.0 * (0..52).map(|index| footprint.weights(index).stored).sum::<u64>() as f64;
        assert!(float.prefill_tokens_per_s * per_token < gpu.bf16_ops, "no faster than the tensor cores");
    }

    /// The sum that allocation minimises is the prediction, or a little more.
    #[test]
    fn the_time_of_an_answer_is_the_sum_of_its_linears() {
        let (config, footprint) = shape();
        let layout = Layout::new(&config);
        let gpu = Gpu::find("H100").unwrap();
        for format in [Format::W8A8, Format::W4A8, Format::W4A16] {
            let plan = uniform(format);
            let time = AnswerTime::new(&config, &footprint, &plan, &gpu);
            let linears = layout.blocks.iter().flat_map(|block| &block.linears);
            let sum: f64 = linears.map(|linear| time.linears(linear.stored_bytes(format, 2), linear.weights(), format, false)).sum();
            let predicted = Prediction::new(&config, &footprint, &plan, &gpu).answer_seconds();
            let excess = (time.fixed() + sum) / predicted;
            assert!((1.0..1.02).contains(&excess), "{format} {excess}");
        }
        let time = |format| Prediction::new(&config, &footprint, &uniform(format), &gpu).answer_seconds();
        assert!(time(Format::W4A8) < time(Format::W4A16), "int8 activations shorten the prompt");
    }

    #[test]
    fn transitions_are_counted_and_cost_something() {
        let (config, footprint) = shape();
        let gpu = Gpu::find("H100").unwrap();
        let mut plan = uniform(Format::W8A8);
        assert_eq!(Prediction::new(&config, &footprint, &plan, &gpu).transition_seconds, 0.0);
        plan.blocks[7] = Format::W8A16;
        let prediction = Prediction::new(&config, &footprint, &plan, &gpu);
        assert_eq!(prediction.transitions, 2);
        let bytes = 2.0 * (2.0 * 4096.0) + 2.0 * (4096.0 + 4.0);
        assert!((prediction.transition_seconds - bytes * 1000.0 / (gpu.bandwidth * BANDWIDTH_EFFICIENCY)).abs() < 1e-12);
    }
}
