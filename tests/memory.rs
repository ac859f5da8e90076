//! A checkpoint, and a sample, larger than the address space that a process may have is quantized, read back, evaluated and
//! traced.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::process::{Command, Output};

use common::{succeeded, text};
use strata::checkpoint::{Config, Layout, TensorSpec};

/// 20 MLP blocks of 16.8 MB, two SSM and one attention block, in f32, with the demo's vocabulary.
const CONFIG: &str = r#"{"model_type": "nemotron_h", "hidden_size": 1024, "vocab_size": 1536, "intermediate_size": 2048,
    "hybrid_override_pattern": "M----------*M----------", "mamba_num_heads": 16, "mamba_head_dim": 32, "n_groups": 2,
    "ssm_state_size": 32, "conv_kernel": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "attention_head_dim": 64,
    "torch_dtype": "float32", "max_position_embeddings": 2048}"#;

/// Three small blocks of the same width: beside a long sample they are nothing.
const SMALL_CONFIG: &str = r#"{"model_type": "nemotron_h", "hidden_size": 1024, "vocab_size": 1536, "intermediate_size": 128,
    "hybrid_override_pattern": "M*-", "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2,
    "ssm_state_size": 32, "conv_kernel": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "attention_head_dim": 64,
    "torch_dtype": "float32", "max_position_embeddings": 2048}"#;

/// Sequences of 256 tokens whose residual stream takes 1 MiB each.
const LONG_SAMPLE: u64 = 112;

/// Address space of the child, in KiB: less than the checkpoint, more than a block and what quantizing it takes.
const LIMIT_KIB: u64 = 300_000;

/// Writes a random checkpoint of this configuration with the demo's tokenizer and returns its bytes.
fn write_checkpoint(folder: &Path, config_text: &str) -> u64 {
    let config = Config::parse(config_text).unwrap();
    let layout = Layout::new(&config);
    let linears = layout.blocks.iter().flat_map(|block| &block.linears).chain([&layout.embedding, &layout.head]);
    let mut tensors: Vec<(String, Vec<usize>)> =
        linears.map(|linear| (format!("{}.weight", linear.stem), vec![linear.rows, linear.cols])).collect();
    let others = layout.blocks.iter().flat_map(|block| &block.others).chain([&layout.final_norm]);
    tensors.extend(others.map(|TensorSpec { name, shape, .. }| (name.clone(), shape.clone())));

    let mut header = serde_json::Map::new();
    let mut end = 0;
    for (name, shape) in &tensors {
        let start = end;
        end += 4 * shape.iter().product::<usize>();
        let stored = if name.starts_with("lm_head") { name.clone() } else { format!("backbone.{name}") };
        header.insert(stored, serde_json::json!({ "dtype": "F32", "shape": shape, "data_offsets": [start, end] }));
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = BufWriter::with_capacity(1 << 20, File::create(folder.join("model.safetensors")).unwrap());
    file.write_all(&(header.len() as u64).to_le_bytes()).unwrap();
    file.write_all(header.as_bytes()).unwrap();
    let mut state = 1_u32;
    for (name, shape) in &tensors {
        let scale = if shape.len() == 2 { 1.0 / (shape[1] as f32).sqrt() } else { 0.1 };
        let centre = if name.ends_with("norm.weight") || name.ends_with("norm_f.weight") { 1.0 } else { 0.0 };
        for _ in 0..shape.iter().product() {
            // Marsaglia's xorshift: any values will do.
            state ^= state << 13;
            state ^= state >> 17;
            state ^= state << 5;
            let value = centre + scale * (state as f32 / u32::MAX as f32 - 0.5);
            file.write_all(&value.to_le_bytes()).unwrap();
        }
    }
    file.flush().unwrap();
    std::fs::write(folder.join("config.json"), config_text).unwrap();
    std::fs::copy("models/demo/tokenizer.json", folder.join("tokenizer.json")).unwrap();
    (8 + header.len() + end) as u64
}

/// Runs strata with at most `limit` KiB of address space, or `unlimited`.
fn run(limit: &str, folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new("sh");
    command.current_dir(env!("CARGO_MANIFEST_DIR")).env("XDG_DATA_HOME", folder).env("XDG_CACHE_HOME", folder);
    // An arena reserves 64 MiB of addresses for each thread, whatever it uses of them.
    command.env("MALLOC_ARENA_MAX", "1").env("TMPDIR", folder);
    command.args(["-c", &format!("ulimit -v {limit} && exec \"$0\" \"$@\""), env!("CARGO_BIN_EXE_strata")]);
    command.args(arguments).args(["--threads", "2"]).output().unwrap()
}

#[test]
fn a_checkpoint_larger_than_the_address_space_is_quantized_evaluated_and_traced() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    let bytes = write_checkpoint(&model, CONFIG);
    assert!(bytes > LIMIT_KIB * 1024, "{bytes} bytes fit");
    let limited = |arguments: &[&str]| run(&LIMIT_KIB.to_string(), folder.path(), arguments);
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (model, variant, traced) = (model.display().to_string(), path("variant"), path("trace.safetensors"));

    // The limit bites: the whole model cannot be held.
    let generate = limited(&["generate", &model, "--prompt", "a", "--max-tokens", "1"]);
    assert!(!generate.status.success(), "the model fits into {LIMIT_KIB} KiB");

    let sample = ["--sequences", "2", "--length", "64"];
    succeeded(&limited(&[&["quantize", &model, "--recipe", "rtn-w4a8", "-o", &variant][..], &sample].concat()));
    let measure = ["--tasks", "piqa", "--limit", "4", "--windows", "2", "--window-tokens", "64", "--no-speed", "--json"];
    let compare = limited(&[&["compare", &model, &variant, "--host-memory", "220MB"][..], &measure].concat());
    let results: serde_json::Value = serde_json::from_str(&succeeded(&compare)).unwrap();
    assert!(text(&compare.stderr).contains("block by block"), "{}", text(&compare.stderr));
    assert_eq!(results["results"][0]["tasks"]["piqa"]["rows"], 4);
    let kld = results["results"][1]["kld"]["mean"].as_f64().unwrap();
    assert!(kld > 0.0 && kld < 1.0, "{kld}");

    let ids = path("ids.json");
    std::fs::write(&ids, r#"{"input_ids": [[1, 2, 3, 4, 5, 6, 7, 8]]}"#).unwrap();
    succeeded(&limited(&["trace", &model, "--ids", &ids, "-o", &traced]));
    assert!(Path::new(&traced).exists());
}

/// Residual streams that do not fit wait in scratch files, and the variant is the same to the byte.
#[test]
fn a_sample_larger_than_the_address_space_is_calibrated_on_and_changes_no_byte() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    std::fs::create_dir(&model).unwrap();
    write_checkpoint(&model, SMALL_CONFIG);
    const { assert!(3 * LONG_SAMPLE * 1024 > LIMIT_KIB, "the three streams of the sample fit") };
    let quantize = |limit: &str, memory: &str, out: &str| {
        let (sequences, out) = (LONG_SAMPLE.to_string(), folder.path().join(out).display().to_string());
        let arguments = ["quantize", model.to_str().unwrap(), "-r", "phase2", "-o", &out, "--sequences", &sequences];
        run(limit, folder.path(), &[&arguments[..], &["--host-memory", memory]].concat())
    };
    let limit = LIMIT_KIB.to_string();
    assert!(!quantize(&limit, "4GB", "never").status.success(), "the sample's streams fit into {LIMIT_KIB} KiB");
    let spilled = quantize(&limit, "200MB", "spilled");
    succeeded(&spilled);
    assert!(text(&spilled.stderr).contains("scratch files in"), "{}", text(&spilled.stderr));
    let held = quantize("unlimited", "4GB", "held");
    succeeded(&held);
    assert!(!text(&held.stderr).contains("scratch files in"), "{}", text(&held.stderr));
    let files = |name: &str| {
        let entries = std::fs::read_dir(folder.path().join(name)).unwrap().map(|entry| entry.unwrap().path());
        let mut files: Vec<_> = entries.map(|path| (path.file_name().unwrap().to_owned(), std::fs::read(&path).unwrap())).collect();
        files.sort();
        files
    };
    assert!(files("held").len() > 4 && files("held") == files("spilled"));

    let refused = quantize("unlimited", "1MB", "never");
    assert_eq!(refused.status.code(), Some(2));
    let stderr = text(&refused.stderr);
    assert!(stderr.contains("1 MB of memory may be taken") && stderr.contains("--host-memory"), "{stderr}");
}
