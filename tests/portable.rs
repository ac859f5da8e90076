//! A portable variant is what compressed-tensors takes it for: its own Python package unpacks it, and transformers gives
//! strata's logits. Skipped where Python or a package is missing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

mod common;

use std::process::Command;

use common::{strata, succeeded, text};
use tempfile::TempDir;

#[test]
fn compressed_tensors_and_transformers_read_a_portable_variant() {
    let folder = TempDir::new().unwrap();
    let out = folder.path().join("v");
    let mut quantize = strata(folder.path());
    quantize.args(["quantize", "demo", "-r", "gptq-w4a16", "--portable", "--sequences", "2", "-o", out.to_str().unwrap()]);
    // One module in each way of storing weights.
    quantize.args(["--override", "kind:attention=w8a16", "--override", "name:down_proj=w3a16", "--override", "name:q_proj=w2a16g64"]);
    succeeded(&quantize.output().unwrap());
    let mut python = Command::new("python3");
    python.args(["tests/portable.py", env!("CARGO_BIN_EXE_strata"), out.to_str().unwrap()]).current_dir(env!("CARGO_MANIFEST_DIR"));
    let Ok(output) = python.env("HF_HUB_OFFLINE", "1").output() else {
        eprintln!("skipped: python3 is not there");
        return;
    };
    let said = text(&output.stdout);
    assert!(output.status.success(), "{said}{}", text(&output.stderr));
    if said.starts_with("skipped") {
        eprintln!("{}", said.trim());
    } else {
        assert!(said.contains("largest difference of a logit"), "{said}");
    }
}
