//! The GPUs that predictions are made for: what their makers say of them.

use serde::Serialize;

use crate::error::{Error, Result};

/// A GPU's memory and peak rates, dense (without structured sparsity), at boost clock.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Gpu {
    pub name: &'static str,
    /// As `nvidia-smi` shows it, with ECC where that is on by default.
    pub memory_bytes: u64,
    /// Bytes a second.
    pub bandwidth: f64,
    /// int8 tensor operations a second.
    pub int8_ops: f64,
    /// bf16 tensor operations a second, accumulated in f32.
    pub bf16_ops: f64,
    /// Where the rates stand.
    pub source: &'static str,
}

const fn gpu(name: &'static str, mebibytes: u64, gigabytes_s: f64, int8_tops: f64, bf16_tflops: f64, source: &'static str) -> Gpu {
    Gpu {
        name,
        memory_bytes: mebibytes << 20,
        bandwidth: gigabytes_s * 1e9,
        int8_ops: int8_tops * 1e12,
        bf16_ops: bf16_tflops * 1e12,
        source,
    }
}

impl Gpu {
    /// Every GPU in the table, smallest memory first.
    pub const ALL: [Self; 8] = [
        gpu("RTX 4090", 24_564, 1008.0, 660.6, 165.2, "NVIDIA Ada GPU architecture whitepaper 2.1, appendix A"),
        gpu("RTX 5090", 32_607, 1792.0, 838.0, 209.5, "NVIDIA RTX Blackwell GPU architecture whitepaper 1.1, appendix A"),
        gpu("A100 40GB", 40_960, 1555.0, 624.0, 312.0, "NVIDIA A100 datasheet, PCIe"),
        gpu("A40", 46_068, 696.0, 299.3, 149.7, "NVIDIA A40 datasheet"),
        gpu("L40S", 46_068, 864.0, 733.0, 362.05, "NVIDIA L40S datasheet, halved where it counts sparsity"),
        gpu("H100", 81_559, 3350.0, 1979.0, 989.4, "NVIDIA H100 datasheet, SXM, halved where it counts sparsity"),
        gpu("A100 80GB", 81_920, 2039.0, 624.0, 312.0, "NVIDIA A100 datasheet, SXM"),
        gpu("H200", 143_771, 4800.0, 1979.0, 989.4, "NVIDIA H200 datasheet, SXM, halved where it counts sparsity"),
    ];

    /// The GPU that `text` names; case and spaces do not count, and `4090` or `A100` will do (of several, the first).
    pub fn find(text: &str) -> Result<Self> {
        let plain = |text: &str| text.chars().filter(char::is_ascii_alphanumeric).collect::<String>().to_lowercase();
        let wanted = plain(text);
        let exact = Self::ALL.into_iter().find(|gpu| plain(gpu.name) == wanted);
        let part = || Self::ALL.into_iter().find(|gpu| wanted.len() >= 3 && plain(gpu.name).contains(&wanted));
        exact.or_else(part).ok_or_else(|| {
            let names = Self::ALL.map(|gpu| gpu.name).join(", ");
            Error::input(format!("no figures of a GPU `{text}` are known")).hint(format!("the GPUs are {names}"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documents_table_is_this_one() {
        let row = |gpu: Gpu| {
            let gibibytes = gpu.memory_bytes as f64 / f64::from(1 << 30);
            let [bandwidth, int8, bf16] = [gpu.bandwidth / 1e9, gpu.int8_ops / 1e12, gpu.bf16_ops / 1e12];
            format!("| {} | {gibibytes:.1} GiB | {bandwidth:.0} GB/s | {int8:.0} TOPS | {bf16:.0} TFLOPS | {} |\n", gpu.name, gpu.source)
        };
        let head = "| GPU | memory | bandwidth | int8 | bf16 | source |\n|---|--:|--:|--:|--:|---|\n";
        let table: String = std::iter::once(head.to_owned()).chain(Gpu::ALL.map(row)).collect();
        let document = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/prediction.md")).unwrap();
        assert!(document.contains(&table), "put this into docs/prediction.md:\n{table}");
    }

    #[test]
    fn gpus_are_found_by_any_spelling_and_unknown_ones_name_the_known() {
        for (text, name) in
            [("RTX 4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("5090", "RTX 5090"), ("a40", "A40"), ("a100-80gb", "A100 80GB")]
        {
            assert_eq!(Gpu::find(text).unwrap().name, name);
        }
        assert!(Gpu::find("A1").is_err(), "two letters could be anything");
        assert!(Gpu::find("T4").unwrap_err().hint.unwrap().contains("L40S"));
    }
}
