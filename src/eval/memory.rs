//! Memory of this process and of the machine, as the kernel accounts it, and what caches will take.

use std::io::Write;

use serde::{Deserialize, Serialize};

use crate::checkpoint::{Config, Layout};
use crate::format::{BlockKind, CacheFormats};

/// Context lengths that caches are predicted for.
pub const CONTEXTS: [u64; 4] = [4 << 10, 32 << 10, 128 << 10, 1 << 20];

/// Bytes of one sequence's caches behind `context` tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheBytes {
    pub context: u64,
    /// Keys and values of the attention blocks: the only part that grows.
    pub kv: u64,
    /// SSM states.
    pub state: u64,
    /// Inputs that the convolutions still need.
    pub conv: u64,
}

impl CacheBytes {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.kv + self.state + self.conv
    }
}

/// Bytes of the caches of one sequence of `context` tokens, from the shapes of a model that keeps them in `formats`.
pub fn predict_caches(config: &Config, layout: &Layout, formats: CacheFormats, context: u64) -> CacheBytes {
    let count = |kind| layout.blocks.iter().filter(|block| block.kind == kind).count() as u64;
    let (mamba, attention) = (&config.mamba, &config.attention);
    let state = (mamba.heads * mamba.head_dim * mamba.state) as u64;
    let kv = (attention.kv_heads * attention.head_dim) as u64;
    let window = (mamba.conv_kernel.saturating_sub(1) * mamba.conv_channels()) as u64;
    CacheBytes {
        context,
        kv: count(BlockKind::Attention) * formats.kv.bytes(context * 2 * kv, attention.head_dim as u64),
        state: count(BlockKind::Ssm) * formats.state.bytes(state, mamba.state as u64),
        conv: count(BlockKind::Ssm) * formats.conv.bytes(window, mamba.conv_channels() as u64),
    }
}

/// Begins to watch the highest resident set anew; whether the system lets it.
pub fn reset_peak() -> bool {
    std::fs::OpenOptions::new().write(true).open("/proc/self/clear_refs").and_then(|mut file| file.write_all(b"5")).is_ok()
}

/// Highest resident set in bytes (`VmHWM`) since [`reset_peak`], or since the process began, where the system tells.
pub fn peak_bytes() -> Option<u64> {
    field("/proc/self/status", "VmHWM:")
}

/// Resident set now in bytes (`VmRSS`), where the system tells.
pub fn resident_bytes() -> Option<u64> {
    field("/proc/self/status", "VmRSS:")
}

fn field(file: &str, name: &str) -> Option<u64> {
    let status = std::fs::read_to_string(file).ok()?;
    let line = status.lines().find(|line| line.starts_with(name))?;
    line.split_whitespace().nth(1)?.parse::<u64>().ok().map(|kib| kib * 1024)
}

/// Memory of the machine in bytes, where the system tells.
pub fn total_bytes() -> Option<u64> {
    field("/proc/meminfo", "MemTotal:")
}

/// Memory that can be taken without swapping, in bytes, where the system tells.
pub fn available_bytes() -> Option<u64> {
    field("/proc/meminfo", "MemAvailable:")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Config, Layout};
    use crate::format::CacheFormat;

    #[test]
    fn the_peak_can_be_watched_anew() {
        const BYTES: usize = 256 << 20;
        let held = std::hint::black_box(vec![1_u8; BYTES]);
        let before = peak_bytes().unwrap();
        drop(held);
        // What other tests hold at the same time is less.
        assert!(!reset_peak() || peak_bytes().unwrap() < before - BYTES as u64 / 2);
    }

    /// Nemotron-H 8B by hand: 4 attention blocks of 8 x 128 keys and values; 24 SSM blocks of 128 heads x 64 x state 128,
    /// a window of 3 x (8192 + 2 x 8 x 128) inputs.
    #[test]
    fn caches_of_the_8b_shape() {
        let config = r#"{"model_type": "nemotron_h", "hidden_size": 4096, "vocab_size": 131072, "intermediate_size": 21504,
            "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-", "mamba_num_heads": 128,
            "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "num_attention_heads": 32,
            "num_key_value_heads": 8, "attention_head_dim": 128}"#;
        let config = Config::parse(config).unwrap();
        let found = predict_caches(&config, &Layout::new(&config), CacheFormats::default(), 1 << 20);
        let expected = CacheBytes { context: 1 << 20, kv: 34_359_738_368, state: 100_663_296, conv: 2_949_120 };
        assert_eq!(found, expected);
        assert_eq!(found.total(), 34_463_350_784);
        // int8 with an f32 scale for each head and token, and for each head and channel.
        let formats = CacheFormats { kv: CacheFormat::Int8, state: CacheFormat::Int8, conv: CacheFormat::F16 };
        let found = predict_caches(&config, &Layout::new(&config), formats, 1 << 20);
        let expected = CacheBytes { context: 1 << 20, kv: 8_589_934_592 + 268_435_456, state: 25_165_824 + 786_432, conv: 1_474_560 };
        assert_eq!(found, expected);
    }
}
