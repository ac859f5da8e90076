//! Int8 inside state-space blocks, static scales and rounded caches, from recipe to variant to evaluation; long texts.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests")]

mod common;

use std::path::Path;
use std::process::Command;

use common::{Parts, files, strata, succeeded, text};
use strata::backend::cpu::Cpu;
use strata::backend::{Backend, Sequences};
use strata::checkpoint::Checkpoint;
use strata::format::{CacheFormat, ScaleKind, SsmActivations};
use strata::model::Hybrid;

/// Largest difference of a logit between a text in one call and token by token with int8 internals, as a share of the
/// largest logit: rounding flips where float sums differ in their last bits, and a flip is a step of 1/127.
const DECODE_TOLERANCE: f32 = 0.02;

/// Writes a recipe for W8A8 with these extra lines.
fn recipe(folder: &Path, name: &str, transforms: &str, extra: &str) -> String {
    let path = folder.join(format!("{name}.toml"));
    let formats = "ssm = \"w8a8\"\nmlp = \"w8a8\"\nattention = \"w8a8\"\nmoe = \"w8a8\"\nembedding = \"w16a16\"\nhead = \"w8a8\"";
    let lines = format!(
        "schema = \"strata.recipe/1\"\nname = \"{name}\"\nmethod = \"rtn\"\ntransforms = [{transforms}]\n{extra}\n[formats]\n{formats}\n"
    );
    std::fs::write(&path, lines).unwrap();
    path.to_str().unwrap().to_owned()
}

fn quantize(folder: &Path, model: &str, recipe: &str, output: &str, threads: &str) -> Checkpoint {
    let out = folder.join(output);
    let arguments =
        ["quantize", model, "-r", recipe, "-o", out.to_str().unwrap(), "--sequences", "4", "--length", "80", "--threads", threads];
    succeeded(&strata(folder).args(arguments).output().unwrap());
    Checkpoint::open(&out).unwrap()
}

fn absmax(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |max, value| max.max(value.abs()))
}

#[test]
fn int8_internals_are_stored_read_back_and_agree_in_decoding_for_any_number_of_threads() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let ids: Vec<u32> = (0..100).map(|i| (i * 37 + 5) % 320).collect();
    for (name, ssm) in [("static", SsmActivations::Int8Static), ("token", SsmActivations::Int8PerToken)] {
        let (linears, word) = if name == "static" { ("static", "int8-static") } else { ("per-token", "int8-per-token") };
        let recipe = recipe(folder, name, "\"rotate-state\"", &format!("[activations]\nssm = \"{word}\"\nlinears = \"{linears}\""));
        let variant = quantize(folder, "tests/golden/dense", &recipe, name, "1");
        let other = format!("{name}-2");
        quantize(folder, "tests/golden/dense", &recipe, &other, "2");
        assert!(files(&folder.join(name)) == files(&folder.join(other)), "{name} depends on threads");
        let manifest = variant.variant.as_ref().unwrap();
        assert_eq!(manifest.activations.ssm, ssm);
        assert_eq!(manifest.activations.linears == ScaleKind::Static, name == "static");
        let scale = variant.read("layers.0.mixer.conv_out_scale");
        assert_eq!(scale.is_ok(), name == "static");
        assert_eq!(variant.read("layers.0.mixer.in_proj.input_scale").is_ok(), name == "static");

        let model = Hybrid::load(Cpu, &variant).unwrap();
        let whole = Cpu.download(&model.logits(&ids, &Sequences::new(vec![ids.len()]), None).unwrap()).unwrap();
        let mut cache = model.cache(1);
        let step = |id: &u32| Cpu.download(&model.logits(&[*id], &Sequences::steps(1), Some(&mut cache)).unwrap()).unwrap();
        let steps: Vec<f32> = ids.iter().flat_map(step).collect();
        let difference = whole.iter().zip(&steps).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(difference <= DECODE_TOLERANCE * absmax(&whole), "{name}: {difference} of {}", absmax(&whole));
    }
}

#[test]
fn rounded_caches_are_recorded_and_their_divergence_shows_in_decoding_only() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let coarse = recipe(folder, "coarse", "", "[cache]\nstate = \"int8\"\nconv = \"int8\"\nkv = \"int8\"");
    let exact = recipe(folder, "exact", "", "");
    let variant = quantize(folder, "demo", &coarse, "coarse-caches", "2");
    quantize(folder, "demo", &exact, "exact-caches", "2");
    assert_eq!(variant.variant.as_ref().unwrap().cache.state, CacheFormat::Int8);
    let paths = ["coarse-caches", "exact-caches"].map(|name| folder.join(name).to_str().unwrap().to_owned());
    let mut arguments = vec!["compare", "demo", &paths[0], &paths[1], "--tasks", "none", "--no-speed", "--json"];
    arguments.extend(["--windows", "4", "--decode-tokens", "512"]);
    let run = || {
        let output = strata(folder).args(&arguments).output().unwrap();
        let json: serde_json::Value = serde_json::from_str(&succeeded(&output)).unwrap();
        (json, String::from_utf8(output.stderr).unwrap().matches("says was found in").count())
    };
    let ((json, found), (again, found_again)) = (run(), run());
    let [base, coarse, exact] = [0, 1, 2].map(|index| json["results"][index].clone());
    assert_eq!((found, found_again), (0, 2), "what windows and decoding are compared with is kept");
    assert_eq!(again["results"][1]["kld_decode"], coarse["kld_decode"]);
    assert!(base["kld_decode"].is_null() && exact["kld_decode"].is_null());
    assert_eq!(coarse["kld"]["mean"], exact["kld"]["mean"], "a whole window never reads a cache");
    assert_eq!(coarse["kld_decode"]["tokens"], 512);
    let figure = |name: &str| coarse["kld_decode"][name].as_f64().unwrap();
    let order = ["median", "p90", "p95", "p99", "p999", "max"].map(figure);
    assert!(order.is_sorted() && order[0] > 0.0 && figure("rms_probability") > 0.0, "{order:?}");
    let (decoding, whole) = (coarse["kld_decode"]["mean"].as_f64().unwrap(), coarse["kld"]["mean"].as_f64().unwrap());
    assert!(decoding > whole && decoding < 0.1, "{decoding} against {whole}");
    let bytes = |result: &serde_json::Value, part: &str| result["caches"][0][part].as_u64().unwrap();
    for part in ["kv", "state", "conv"] {
        assert!(bytes(&coarse, part) * 3 < bytes(&exact, part), "{part}");
    }
}

#[test]
fn settings_that_mean_nothing_are_refused_in_one_sentence() {
    let folder = tempfile::tempdir().unwrap();
    for (name, extra, expected) in [
        ("percentile", "[observers]\nssm = 120.0", "percentile"),
        ("groups", "[observers]\nhead_groups = 0", "head_groups"),
        ("format", "[cache]\nstate = \"int4\"", "int4"),
    ] {
        let recipe = recipe(folder.path(), name, "", extra);
        let output = strata(folder.path()).args(["quantize", "demo", "-r", &recipe, "-o", "never"]).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{name}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains(expected), "{name}: {}", text(&output.stderr));
    }
}

/// Address space that a run on 65 536 tokens gets. It takes 206 MB of memory; it took 534 MB when state-space blocks held their
/// activations for the whole text.
const MEMORY_CAP_KIB: usize = 400 << 10;

#[test]
fn a_text_of_65536_tokens_is_calibrated_on_in_bounded_memory() {
    let folder = tempfile::tempdir().unwrap();
    let mut parts = Parts::dense();
    let mut config: serde_json::Value = serde_json::from_str(&parts.config).unwrap();
    config["layers_block_type"] = serde_json::json!(["linear_attention", "mlp", "linear_attention"]);
    config["num_hidden_layers"] = 3.into();
    parts.config = config.to_string();
    parts.tensors.retain(|name, _| !["3", "4", "5", "6"].iter().any(|layer| name.contains(&format!("layers.{layer}."))));
    let source = folder.path().join("source");
    parts.write(&source);
    let recipe = recipe(folder.path(), "long", "\"rotate-state\"", "[activations]\nssm = \"int8-static\"");
    let out = folder.path().join("long-text");
    let arguments = ["quantize", source.to_str().unwrap(), "-r", &recipe, "-o", out.to_str().unwrap()];
    let length = ["--sequences", "1", "--length", "65536", "--threads", "2"];
    let mut limited = Command::new("sh");
    limited.arg("-c").arg(format!("ulimit -v {MEMORY_CAP_KIB}; exec \"$@\"")).arg("sh").arg(env!("CARGO_BIN_EXE_strata"));
    limited.args(arguments).args(length).env("XDG_DATA_HOME", folder.path()).env("MALLOC_ARENA_MAX", "2");
    succeeded(&limited.output().unwrap());
    let variant = Checkpoint::open(&out).unwrap();
    assert_eq!(variant.variant.unwrap().sample.tokens, 65_536);
}
