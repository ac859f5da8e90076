//! Headless commands from end to end: the demo session, its table and its JSON, reuse of variants, the other commands.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr, reason = "tests")]

mod common;

use std::path::Path;

use common::{files, strata, succeeded, text, without_memory};
use safetensors::SafeTensors;
use serde_json::Value;
use tempfile::TempDir;

/// Largest loss of a demo task's accuracy at phase 1, in points.
const PHASE1_POINTS: f64 = 1.0;

fn json(stdout: &str) -> Value {
    serde_json::from_str(stdout).unwrap()
}

/// A session like the demo's that takes a second instead of a minute.
fn quick_session(folder: &Path) -> String {
    let path = folder.join("quick.toml");
    let demo = std::fs::read_to_string("sessions/demo.toml").unwrap();
    let quick = demo
        .replace("speed = true", "speed = false\nlimit = 4")
        .replace("windows = 24", "windows = 2")
        .replace("sequences = 32", "sequences = 2");
    std::fs::write(&path, quick).unwrap();
    path.display().to_string()
}

#[test]
fn the_demo_session_keeps_its_promises() {
    let data = TempDir::new().unwrap();
    let output = strata(data.path()).args(["--json"]).output().unwrap();
    let results = json(&succeeded(&output));
    assert_eq!(results["schema"], "strata.results/1");
    let names: Vec<&str> = results["results"].as_array().unwrap().iter().map(|result| result["variant"].as_str().unwrap()).collect();
    assert_eq!(names, ["base", "phase1", "phase2"]);
    let [base, phase1, phase2] = [0, 1, 2].map(|index| &results["results"][index]);
    assert!(base["kld"].is_null());
    let bytes = |result: &Value| result["weight_bytes"].as_f64().unwrap();
    assert!(bytes(phase1) <= 0.52 * bytes(base) && bytes(phase2) <= 0.27 * bytes(base));
    for task in ["arc_easy", "arc_challenge", "piqa", "winogrande", "hellaswag"] {
        for metric in ["acc", "acc_norm"] {
            let of = |result: &Value| result["tasks"][task][metric].as_f64();
            let (Some(before), Some(after)) = (of(base), of(phase1)) else { continue };
            assert!(100.0 * (before - after) <= PHASE1_POINTS, "{task} {metric} fell from {before} to {after}");
        }
    }
    // What lm-evaluation-harness measured on the same rows.
    assert!((base["tasks"]["arc_easy"]["acc"].as_f64().unwrap() - 0.532).abs() < 5e-4);
    assert!((base["tasks"]["arc_challenge"]["acc_norm"].as_f64().unwrap() - 0.524).abs() < 5e-4);
    for result in [phase1, phase2] {
        assert!(result["kld"]["mean"].as_f64().unwrap() > 0.0);
        assert!(result["memory"]["resident_weight_bytes"].as_f64().unwrap() < bytes(base));
    }
}

#[test]
fn a_replay_prints_a_table_and_reuses_its_variants() {
    let data = TempDir::new().unwrap();
    let session = quick_session(data.path());
    let page = data.path().join("page.html");
    let first = strata(data.path()).args(["replay", &session, "--html", page.to_str().unwrap()]).output().unwrap();
    let page = std::fs::read_to_string(page).unwrap();
    assert!(page.contains("<td>phase2</td>") && page.contains("<h2>Row by row against the base</h2>") && page.contains("<svg"));
    let table = without_memory(&succeeded(&first));
    for name in ["variant", "base", "phase1", "phase2", "arc_easy"] {
        assert!(table.contains(name), "{table}");
    }
    let store = data.path().join("strata/variants");
    assert_eq!(std::fs::read_dir(&store).unwrap().count(), 2);
    let second = strata(data.path()).args(["replay", &session]).output().unwrap();
    assert_eq!(table, without_memory(&succeeded(&second)), "the same numbers again");
    assert_eq!(text(&second.stderr).matches("verified and reused").count(), 2);

    // A variant that was changed behind strata's back is noticed.
    let variant = std::fs::read_dir(&store).unwrap().next().unwrap().unwrap().path();
    let shard = variant.join("model-00003-of-00013.safetensors");
    let mut bytes = std::fs::read(&shard).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&shard, bytes).unwrap();
    let third = strata(data.path()).args(["replay", &session]).output().unwrap();
    assert_eq!(third.status.code(), Some(1));
    assert!(text(&third.stderr).contains("is not the file that was validated"), "{}", text(&third.stderr));
    let fresh = strata(data.path()).args(["replay", &session, "--fresh"]).output().unwrap();
    assert_eq!(table, without_memory(&succeeded(&fresh)));
}

#[test]
fn a_replay_into_a_folder_names_variants_and_can_take_one() {
    let data = TempDir::new().unwrap();
    let session = quick_session(data.path());
    let out = data.path().join("out");
    let arguments = ["replay", &session, "--variant", "phase2", "--no-eval", "-o", out.to_str().unwrap()];
    assert_eq!(succeeded(&strata(data.path()).args(arguments).output().unwrap()), "");
    assert!(files(&out.join("phase2")).contains_key(Path::new("strata.toml")));
    assert!(!out.join("phase1").exists());
    let unknown = strata(data.path()).args(["replay", &session, "--variant", "phase9"]).output().unwrap();
    assert_eq!(unknown.status.code(), Some(2));
    assert!(text(&unknown.stderr).contains("phase1, phase2"));
}

#[test]
fn eval_and_compare_put_the_unquantized_model_first() {
    let data = TempDir::new().unwrap();
    let out = data.path().join("w8");
    let out = out.to_str().unwrap();
    succeeded(&strata(data.path()).args(["quantize", "demo", "-r", "phase1", "-o", out]).output().unwrap());
    let quick = ["--limit", "3", "--windows", "1", "--no-speed", "--tasks", "piqa,winogrande", "--json"];
    let samples = data.path().join("samples.jsonl");
    let eval = ["eval", out, "demo", "--samples", samples.to_str().unwrap()];
    let compare = ["compare", "demo", out];
    for arguments in [eval.as_slice(), compare.as_slice()] {
        let results = json(&succeeded(&strata(data.path()).args(arguments).args(quick).output().unwrap()));
        assert_eq!(results["results"][0]["variant"], "base");
        assert_eq!(results["results"][1]["variant"], "w8");
        assert_eq!(results["results"][1]["recipe"], "phase1");
        assert!(results["results"][1]["kld"]["top1"].as_f64().unwrap() > 0.9);
        assert_eq!(results["results"][1]["tasks"]["piqa"]["rows"], 3);
        assert!(results["results"][1]["tasks"]["winogrande"]["acc_norm"].is_null());
    }
    let lines = std::fs::read_to_string(&samples).unwrap();
    assert_eq!(lines.lines().count(), 12);
    let first = json(lines.lines().next().unwrap());
    for field in ["task", "index", "loglikelihoods", "lengths", "gold", "acc", "acc_norm"] {
        assert!(first.get(field).is_some(), "{field}");
    }
}

#[test]
fn trace_writes_logits_and_residual_streams() {
    let data = TempDir::new().unwrap();
    let (ids, out) = (data.path().join("ids.json"), data.path().join("trace.safetensors"));
    std::fs::write(&ids, "{\"input_ids\": [[1, 5, 9], [1, 7, 2]]}").unwrap();
    let run = |model: &str| {
        let arguments = ["trace", model, "--ids", ids.to_str().unwrap(), "-o", out.to_str().unwrap()];
        strata(data.path()).args(arguments).output().unwrap()
    };
    succeeded(&run("demo"));
    let bytes = std::fs::read(&out).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    assert_eq!(file.tensor("logits").unwrap().shape(), [2, 3, 1536]);
    assert_eq!(file.tensor("hidden.12").unwrap().shape(), [2, 3, 256]);
    assert_eq!(file.len(), 14);
    std::fs::write(&ids, "{\"input_ids\": [[1, 5], [1]]}").unwrap();
    assert_eq!(run("demo").status.code(), Some(2));
    std::fs::write(&ids, "{\"input_ids\": [[99999]]}").unwrap();
    let outside = run("demo");
    assert_eq!(outside.status.code(), Some(2));
    assert!(text(&outside.stderr).contains("99999"));
}

#[test]
fn generate_is_repeatable_and_knows_the_demo_world() {
    let data = TempDir::new().unwrap();
    let run = |arguments: &[&str]| succeeded(&strata(data.path()).args(["generate", "demo", "--prompt"]).args(arguments).output().unwrap());
    let cow = run(&["Question: How do you cut bread?\nAnswer:", "--max-tokens", "8"]);
    assert!(cow.contains("knife"), "{cow}");
    let sampled = ["The", "--temperature", "1.2", "--top-p", "0.9", "--seed", "3", "--json"];
    let (one, two) = (json(&run(&sampled)), json(&run(&sampled)));
    assert_eq!(one, two);
    assert!(one["tokens"].as_u64().unwrap() > 0);
}

#[test]
fn analyze_counts_the_published_shapes() {
    let data = TempDir::new().unwrap();
    let shapes = [
        ("nemotron-h-8b", 8_100_852_736_u64),
        ("nemotron-nano-9b-v2", 8_888_227_328),
        ("nemotron-3-nano-4b", 3_973_556_832),
        ("nemotron-3-nano-30b-a3b", 31_577_940_288),
    ];
    for (name, parameters) in shapes {
        let path = format!("../shared/configs/{name}.json");
        if !Path::new(&path).exists() {
            eprintln!("skipped: {path} is not there");
            continue;
        }
        let inventory = json(&succeeded(&strata(data.path()).args(["analyze", &path, "--json"]).output().unwrap()));
        assert_eq!(inventory["total_parameters"], parameters, "{name}");
        assert!(inventory["blocks"][0]["outlier_ratio"].is_null());
    }
    let demo = json(&succeeded(&strata(data.path()).args(["analyze", "demo", "--json"]).output().unwrap()));
    assert_eq!(demo["blocks"][5]["kind"], "attention");
    assert!(demo["blocks"][5]["outlier_ratio"].as_f64().unwrap() > 1.0);
    let tensors = json(&succeeded(&strata(data.path()).args(["analyze", "demo", "--tensors", "--json"]).output().unwrap()));
    assert_eq!(tensors["tensors"].as_array().unwrap().len(), 73);
    let csv = succeeded(&strata(data.path()).args(["analyze", "demo", "--csv"]).output().unwrap());
    assert_eq!(csv.lines().count(), 13);
}

#[test]
fn doctor_says_what_there_is() {
    let data = TempDir::new().unwrap();
    let found = json(&succeeded(&strata(data.path()).args(["doctor", "--json"]).output().unwrap()));
    assert!(found["integer_kernels"].as_str().unwrap().contains("portable"));
    assert!(found["data_folder"].as_str().unwrap().contains("writable"));
}
